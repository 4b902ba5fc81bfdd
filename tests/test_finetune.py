"Fine-tuning: the defects of MedSAM v0.1 that must not come back, what trains, what is chosen, what a run refuses"
import json, math, os, shutil, subprocess, sys
from copy import deepcopy
from dataclasses import fields
from pathlib import Path
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import default_collate
from medsam_nb.core import InputError, command_parser
from medsam_nb.curate import CuratedFolder, curate, find_npz, patients_of, read_npz, read_split
from medsam_nb.embed import EmbeddingStore, ProvenanceError
from medsam_nb.finetune import (Config, DiceBCE, EpochSampler, PromptDataset, PromptedDecoder, Run, _accelerator,
    _save_best, finetune, list_samples, live_curve, medsam_finetune, running_mean, split_validation, train_epoch,
    validate)
from medsam_nb.prompt import mask_to_box
from medsam_nb.sam import build_model, decode, load_model
from tiny import disc, fill, hospital, lite, python, quick, raw, same_state, state_of, tree

CASES = ['p1_a','p1_b','p2_a','p3_a','p4_a']
SHORT = dict(epochs=1, epoch_samples=2, batch_size=2, lr=1e-4)
THREE = dict(epochs=3, lr=3e-4)
TOKEN = 'mask_decoder.iou_token.weight'

@pytest.fixture(scope='module')
def npz(tmp_path_factory):
    return hospital(tmp_path_factory.mktemp('h'), CASES, patient=r'p\d', scans=dict(shape=(2,64,80)))

@pytest.fixture(scope='module')
def store(npz, tmp_path_factory): return fill(npz, tmp_path_factory.mktemp('s')/'s.zarr')

@pytest.fixture(scope='module')
def two(tmp_path_factory):
    "Two labels on each slice; label 9 is two discs"
    organs = ((9,20,20,10), (9,45,60,7), (1,45,25,11))
    tmp = tmp_path_factory.mktemp('two')
    npz = hospital(tmp, ['a','b','c'], label_ids=(9,1,5), test_fraction=0, scans=dict(shape=(2,64,80), organs=organs))
    return npz, fill(npz, tmp/'s.zarr')

def go(npz, store, run, **kwargs): return finetune(npz, store.path, run, device='cpu', **(SHORT|kwargs))

def log_of(run): return (run.path/'log.csv').read_text()

def config_of(run): return json.loads((run.path/'config.json').read_text())

def dataset(npz, store, **kwargs): return PromptDataset(find_npz(npz, 'train'), store, 256, **kwargs)

@pytest.fixture(scope='module')
def done(npz, store, tmp_path_factory): return go(npz, store, tmp_path_factory.mktemp('runs')/'done', **THREE)

@pytest.fixture
def same_as_before(done):
    "The finished run is what it was when the test ends"
    before = tree(done.path)
    yield
    assert tree(done.path)==before


# ---- loss ----
@pytest.fixture
def guess():
    "Logits and a target, three samples"
    return torch.randn(3,1,8,8), (torch.rand(3,1,8,8)>.5).float()

def test_defect01_cross_entropy_is_there(guess):
    logits,target = guess
    p = logits.sigmoid()
    want = -(target*p.log()+(1-target)*(1-p).log()).mean()
    _,bce = DiceBCE()(logits, target)
    assert bce>.1
    torch.testing.assert_close(bce, want)

def test_the_other_term_is_the_dice_loss(guess):
    logits,target = guess
    p = logits.sigmoid()
    overlap,sizes = (p*target).sum((2,3)),(p**2).sum((2,3))+target.sum((2,3))
    dice,_ = DiceBCE()(logits, target)
    torch.testing.assert_close(dice, (1-2*overlap/sizes).mean(), atol=1e-4, rtol=1e-3)

def test_defect01_cross_entropy_is_logged(done): assert (done.log.bce_loss[1:]>1e-3).all()

def test_defect01_cross_entropy_is_part_of_the_loss(done):
    t = done.log[1:]
    assert np.allclose(t.train_loss, t.dice_loss+t.bce_loss)

def batch(n):
    return dict(embedding=torch.randn(n,1,4,4), box=torch.zeros(n,4), mask=(torch.rand(n,1,4,4)>.5).float())

@pytest.mark.parametrize('sizes', [[1], [2], [2,1], [3,3,1]])
def test_defect09_the_epoch_mean_is_over_samples(sizes):
    "Also with one batch, where v0.1 divided by zero"
    acc,net = _accelerator('cpu', 'no'),torch.nn.Linear(1, 1)
    net.forward = lambda e, b: e*net.weight
    batches = [batch(n) for n in sizes]
    got = train_epoch(acc, net, batches, torch.optim.SGD(net.parameters(), lr=0), DiceBCE())
    samples = [(b['embedding'][i:i+1], b['mask'][i:i+1]) for b in batches for i in range(len(b['mask']))]
    each = [DiceBCE()(e*net.weight, m) for e,m in samples]
    assert np.allclose(got, [np.mean([o[k].item() for o in each]) for k in (0,1)], atol=1e-5)

def test_defect09_first_row_by_hand(npz, store, tmp_path):
    "One epoch of one batch: the logged loss is that of the untrained decoder on these samples"
    run = go(npz, store, tmp_path/'r')
    files = [f for f in find_npz(npz, 'train') if read_npz(f).case in config_of(run)['train']]
    ds = PromptDataset(files, store, 256, seed=2023)
    sampler = EpochSampler(len(ds), 2023, 2)
    ds.epoch = sampler.epoch = 1
    b = default_collate([ds[n] for n in sampler])
    with torch.no_grad(): dice,bce = DiceBCE()(decode(lite(), b['embedding'], b['box'])[0], b['mask'])
    assert math.isclose(run.log.dice_loss[1], dice, abs_tol=1e-5)
    assert math.isclose(run.log.bce_loss[1], bce, rel_tol=1e-4)


# ---- samples ----
def test_a_sample_is_a_slice_and_a_label(two):
    t = list_samples(find_npz(two[0], 'train'))
    assert t.groupby(['file','i']).label.apply(list).tolist()==[[9,1]]*6

def test_a_sample_knows_the_value_of_its_label_in_gts(two):
    t = list_samples(find_npz(two[0], 'train'))
    assert set(zip(t.value, t.label))=={(1,9), (2,1)}

@pytest.mark.parametrize('label_ids, found', [((1,),{1}), ((5,),set()), ('all',{1,9}), (None,{1,9}), ([9],{9})])
def test_samples_of_some_labels(two, label_ids, found):
    assert set(list_samples(find_npz(two[0], 'train'), label_ids=label_ids).label)==found

def test_samples_of_pieces(two):
    t = list_samples(find_npz(two[0], 'train'), instances_=True)
    assert len(t)==18
    pieces = t.groupby(['file','i','label']).piece.apply(list).map(tuple).unstack()
    assert pieces[9].tolist()==[(0,1)]*6

@pytest.fixture
def parts(two):
    "All of label 9 on a slice, its larger disc, its smaller one"
    whole,pieces = (dataset(*two, box_px=0, instances_=o) for o in (False,True))
    return whole[0], pieces[0], pieces[1]

def test_pieces_make_up_the_whole(parts):
    whole,large,small = (o['mask'] for o in parts)
    assert torch.equal(whole, large+small)

def test_the_largest_piece_comes_first(parts):
    _,large,small = (o['mask'].sum() for o in parts)
    assert large>small>0

@pytest.mark.parametrize('k', range(3))
def test_a_box_without_slack_is_that_of_the_piece(parts, k):
    box,mask = parts[k]['box'].numpy(),parts[k]['mask'][0].numpy()
    assert np.array_equal(box+.5, mask_to_box(mask))

def test_pieces_share_an_embedding(parts): assert torch.equal(parts[0]['embedding'], parts[1]['embedding'])

def test_two_labels_of_a_slice_share_an_embedding(two):
    ds = dataset(*two)
    assert torch.equal(ds[0]['embedding'], ds[1]['embedding'])
    assert not torch.equal(ds[0]['embedding'], ds[2]['embedding'])

def test_two_labels_of_a_slice_differ_in_mask(two):
    ds = dataset(*two)
    assert not (ds[0]['mask']*ds[1]['mask']).any()

@pytest.mark.parametrize('n', range(12))
def test_a_sample_has_the_mask_and_the_embedding_of_its_row(two, n):
    ds = dataset(*two)
    row = ds.samples.iloc[n]
    case = read_npz(ds.files[row.file])
    assert np.array_equal(ds[n]['mask'][0].numpy(), case.gts[row.i]==row.value)
    assert np.array_equal(ds[n]['embedding'].numpy(), two[1].open_case(case)[row.i])

@pytest.fixture(scope='module')
def nines(two, tmp_path_factory):
    "A run on the pieces of one label of several"
    return go(*two, tmp_path_factory.mktemp('nines')/'r', instances=True, label_ids=(9,))

def test_the_labels_are_in_the_configuration(nines): assert config_of(nines)['label_ids']==[9]

@pytest.mark.parametrize('label_ids', [[9], '9', (9,)])
def test_the_same_labels_in_other_words_are_the_same_run(two, nines, label_ids):
    assert go(*two, nines.path, instances=True, label_ids=label_ids).log.equals(nines.log)

def test_all_labels_in_words_are_no_choice(done, npz, store):
    assert go(npz, store, done.path, label_ids='all', **THREE).log.equals(done.log)

def test_the_old_name_of_the_labels_works_and_says_so(two, nines):
    with pytest.warns(FutureWarning, match='labels is called label_ids now'):
        again = go(*two, nines.path, instances=True, labels=(9,))
    assert again.log.equals(nines.log)

def test_a_run_of_the_version_before_goes_on(two, nines, tmp_path, recwarn):
    "Its config.json says labels; after that it says label_ids"
    run = shutil.copytree(nines.path, tmp_path/'r')
    text = (run/'config.json').read_text()
    (run/'config.json').write_text(text.replace('"label_ids"', '"labels"'))
    again = go(*two, run, instances=True, label_ids=(9,))
    assert again.log.equals(nines.log)
    assert (run/'config.json').read_text()==text
    assert not [o for o in recwarn if o.category is FutureWarning]

def test_a_label_that_no_case_holds_is_refused(two, tmp_path):
    match = r'no training case in .* holds the labels \(5,\): it was curated with \(9, 1, 5\)'
    with pytest.raises(InputError, match=match): go(*two, tmp_path/'n', label_ids=(5,))
    assert not (tmp_path/'n').exists()


# ---- boxes ----
OUT = torch.tensor([-1,-1,1,1])

def test_boxes_do_not_depend_on_the_order_of_asking(npz, store):
    a,b = dataset(npz, store),dataset(npz, store)
    a.epoch = b.epoch = 3
    forward = [a[n]['box'] for n in range(len(a))]
    backward = [b[n]['box'] for n in reversed(range(len(b)))]
    assert torch.equal(torch.stack(forward), torch.stack(backward[::-1]))

def test_another_seed_gives_other_boxes(npz, store):
    a,b = dataset(npz, store, seed=1),dataset(npz, store, seed=2)
    assert not torch.equal(a[0]['box'], b[0]['box'])

def test_another_epoch_gives_other_boxes(npz, store):
    ds = dataset(npz, store)
    first,ds.epoch = ds[0]['box'],1
    assert not torch.equal(first, ds[0]['box'])

def test_boxes_move_outward_up_to_the_slack(npz, store):
    loose,tight = dataset(npz, store),dataset(npz, store, box_px=0)
    moved = torch.stack([(loose[n]['box']-tight[n]['box'])*OUT for n in range(len(loose))])
    assert (moved>=0).all()
    assert (moved<=20).all()
    assert (moved.amax(1)>0).all()

def test_boxes_that_may_shrink_do(npz, store):
    loose,tight = dataset(npz, store, shrink=True),dataset(npz, store, box_px=0)
    moved = torch.stack([(loose[n]['box']-tight[n]['box'])*OUT for n in range(len(loose))])
    assert (moved<0).any()

def test_boxes_are_in_the_models_frame(npz, store):
    small,large = (PromptDataset(find_npz(npz, 'train'), store, size) for size in (256,1024))
    torch.testing.assert_close(large[0]['box']+.5, (small[0]['box']+.5)*4)

def test_a_case_curated_again_is_read_again(tmp_path):
    images,labels = raw(tmp_path/'raw', ['a'], shape=(2,64,80))
    how = dict(out=tmp_path/'npz', test_fraction=0, progress=False, overwrite=True)
    npz = curate(images, labels, **how).folder
    before = dataset(npz, fill(npz, tmp_path/'1'))[0]['mask']
    raw(tmp_path/'raw', ['a'], shape=(2,64,80), organs=((9,30,34,20),))
    curate(images, labels, **how)
    after = dataset(npz, fill(npz, tmp_path/'2'))[0]['mask']
    assert after.sum()>before.sum()*2

def test_another_grid_is_refused_before_anything_is_written(tmp_path):
    npz = hospital(tmp_path, ['a','b'], test_fraction=0, size=128, scans=dict(shape=(1,64,80)))
    store = fill(npz, tmp_path/'s')
    with pytest.raises(InputError, match='curated with size=128.*size=256'): go(npz, store, tmp_path/'r')
    assert not (tmp_path/'r').exists()


# ---- order of the samples ----
def order(seed, n=None, epoch=0):
    s = EpochSampler(10, seed, n)
    s.epoch = epoch
    return list(s)

@pytest.mark.parametrize('epoch', [0,1,2])
def test_an_epoch_has_each_sample_once(epoch): assert sorted(order(7, epoch=epoch))==list(range(10))

def test_the_order_changes_with_the_epoch(): assert order(7)!=order(7, epoch=1)

def test_the_order_changes_with_the_seed(): assert order(7)!=order(8)

def test_the_order_is_the_same_again(): assert order(7)==order(7)

@pytest.mark.parametrize('n, length', [(None,10), (3,3), (99,10)])
def test_an_epoch_is_as_long_as_asked_for(n, length):
    assert len(order(7, n))==len(EpochSampler(10, 7, n))==length


# ---- who is trained on ----
def test_all_training_cases_are_used(npz, done):
    cfg,split = config_of(done),read_split(npz)
    assert sorted(cfg['train']+cfg['validate'])==sorted(split.case[split.part=='train'])

def test_nothing_is_trained_and_validated_on(done):
    cfg = config_of(done)
    assert not set(cfg['train'])&set(cfg['validate'])

def test_test_patients_are_never_seen(npz, done):
    split,seen = read_split(npz),set(config_of(done)['patients'])
    assert seen==set(split.patient[split.part=='train'])
    assert not seen&set(split.patient[split.part=='test'])

@pytest.fixture(scope='module')
def alphabet(tmp_path_factory):
    "Five patients with two cases each"
    tmp = tmp_path_factory.mktemp('abc')
    (tmp/'train').mkdir()
    who = {f'{p}{s}':p for p in 'ABCDE' for s in '12'}
    arrays = dict(imgs=np.zeros((1,2,2,3), np.uint8), gts=np.zeros((1,2,2), np.uint8))
    for c in who: np.savez(tmp/'train'/f'{c}.npz', **arrays)
    folder = CuratedFolder(tmp)
    folder.patients = who
    return folder

@pytest.mark.parametrize('fraction, n', [(.2,1), (.5,2), (.01,1), (.99,4)])
def test_validation_is_by_patient(alphabet, fraction, n):
    files = alphabet.files('train')
    for seed in range(30):
        train,val = split_validation(files, alphabet, fraction, seed)
        assert sorted(train+val)==sorted(files)
        assert len(val)==2*n
        assert not {f.stem[0] for f in train}&{f.stem[0] for f in val}

def test_another_seed_validates_on_others(alphabet):
    chosen = {split_validation(alphabet.files(), alphabet, .2, seed)[1][0].stem[0] for seed in range(30)}
    assert len(chosen)>1

def test_the_same_seed_validates_on_the_same(alphabet):
    first,again = (split_validation(alphabet.files(), alphabet, .5, 3) for _ in range(2))
    assert first==again

def test_one_patient_is_not_enough(alphabet):
    with pytest.raises(InputError, match='at least two training patients.*found 1'):
        split_validation(alphabet.files()[:2], alphabet, .2, 0)


# ---- what trains ----
@pytest.fixture(scope='module')
def stepped(npz, store):
    "A model with the gradients of one batch"
    sam = deepcopy(lite())
    net,ds = PromptedDecoder(sam).train(),dataset(npz, store)
    b = default_collate([ds[0], ds[1]])
    sum(DiceBCE()(net(b['embedding'], b['box']), b['mask'])).backward()
    return sam

@pytest.mark.parametrize('part', ['image_encoder','prompt_encoder'])
def test_the_encoders_get_no_gradients(stepped, part):
    assert all(p.grad is None and not p.requires_grad for p in getattr(stepped, part).parameters())

@pytest.mark.parametrize('name', ['mask_tokens.weight','transformer.layers.0.self_attn.q_proj.weight'])
def test_the_decoder_gets_gradients(stepped, name):
    assert dict(stepped.mask_decoder.named_parameters())[name].grad.abs().sum()>0

def test_only_the_decoder_of_the_best_model_has_changed(done):
    best,plain = state_of(done.best),lite().state_dict()
    assert best.keys()==plain.keys()
    assert {k.split('.')[0] for k in plain if not torch.equal(best[k], plain[k])}<={'mask_decoder'}

def test_the_prompt_encoder_in_the_state_is_bit_identical(done):
    last = load_file(done.path/'state-00003'/'model.safetensors')
    plain = {f'prompt_encoder.{k}':v for k,v in lite().prompt_encoder.state_dict().items()}
    assert all(torch.equal(last[k], v) for k,v in plain.items() if k in last)

def test_the_decoder_in_the_state_has_changed(done):
    last = load_file(done.path/'state-00003'/'model.safetensors')
    assert any(not torch.equal(last[f'mask_decoder.{k}'], v) for k,v in lite().mask_decoder.state_dict().items())

def dice_of(sam, sample):
    with torch.inference_mode(): p = decode(sam, sample['embedding'][None], sample['box'][None])[0][0]>0
    return 2*(p&(sample['mask']>.5)).sum().item()/(p.sum()+sample['mask'].sum()).item()

def val_dsc(npz, store, sam, cfg):
    "Mean DSC of a model on the validation samples of a run, without `finetune`"
    files = [f for f in find_npz(npz, 'train') if read_npz(f).case in cfg['validate']]
    sets = [PromptDataset(files, store, 256, seed=cfg['seed'], box_px=px) for px in (0,10,20)]
    return np.mean([dice_of(sam, ds[n]) for ds in sets for n in range(len(ds))])

def test_best_is_the_epoch_with_the_highest_validation_dsc(npz, store, done):
    assert done.log.val_dsc.nunique()>1
    got = val_dsc(npz, store, load_model('lite', done.best, 'cpu'), config_of(done))
    assert math.isclose(got, done.log.val_dsc.max(), abs_tol=1e-4)

def test_epoch_0_is_the_decoder_as_it_came(npz, store, done):
    assert done.log.epoch.tolist()==[0,1,2,3]
    assert math.isclose(val_dsc(npz, store, lite(), config_of(done)), done.log.val_dsc[0], abs_tol=1e-4)

def test_training_that_makes_it_worse_keeps_the_start(npz, store, tmp_path):
    run = go(npz, store, tmp_path/'r', lr=1.)
    assert run.log.val_dsc[0]>run.log.val_dsc[1]
    assert same_state(state_of(run.best), dict(lite().state_dict()))
    assert 'best' in repr(run) and 'in epoch 0' in repr(run)

def test_best_of_vit_b_loads_in_segment_anything(tmp_path):
    from segment_anything import sam_model_registry
    sam = build_model('vit_b')
    net = PromptedDecoder(sam)
    with torch.no_grad(): net.mask_decoder.iou_token.weight += 1
    _save_best(sam, net.mask_decoder, tmp_path)
    theirs = sam_model_registry['vit_b']()
    theirs.load_state_dict(state_of(tmp_path/'best.pth'), strict=True)
    assert torch.equal(theirs.mask_decoder.iou_token.weight, net.mask_decoder.iou_token.weight)

def test_running_mean_by_hand():
    one,want = torch.nn.Linear(2, 1),0
    mean = running_mean(one, .6)
    for n in range(8):
        torch.nn.init.normal_(one.weight)
        mean.update_parameters(one)
        d = min(.6, (1+n)/(4+n)) if n else 0
        want = d*want+(1-d)*one.weight.detach()
        torch.testing.assert_close(mean.module.weight.detach(), want)

@pytest.fixture(scope='module')
def with_and_without(npz, store, tmp_path_factory):
    "The same steps, with a running mean and without"
    tmp,how = tmp_path_factory.mktemp('ema'),dict(epoch_samples=6, lr=3e-4)
    return go(npz, store, tmp/'mean', **how), go(npz, store, tmp/'last', ema=0, **how)

def token(run, file):
    "A weight of the decoder in the state after epoch 1: of the net, or of its mean"
    name = TOKEN if file=='model.safetensors' else 'module.'+TOKEN
    return load_file(run.path/'state-00001'/file)[name]

def test_the_mean_does_not_change_the_steps(with_and_without):
    mean,last = with_and_without
    assert mean.log.train_loss.equals(last.log.train_loss)
    assert torch.equal(token(mean, 'model.safetensors'), token(last, 'model.safetensors'))

def test_the_mean_lags_behind_the_weights(with_and_without):
    mean,_ = with_and_without
    assert not torch.equal(token(mean, 'model.safetensors'), token(mean, 'model_1.safetensors'))

def test_no_mean_is_the_last_weights(with_and_without):
    _,last = with_and_without
    assert torch.equal(token(last, 'model.safetensors'), token(last, 'model_1.safetensors'))

def test_the_mean_is_what_is_validated(with_and_without):
    mean,last = with_and_without
    assert mean.log.val_dsc[1]!=last.log.val_dsc[1]

def test_the_mean_is_what_is_kept(with_and_without):
    better = [r for r in with_and_without if r.log.val_dsc.idxmax()==1]
    assert better
    for r in better: assert torch.equal(state_of(r.best)[TOKEN], token(r, 'model_1.safetensors'))

def test_it_learns(npz, store, tmp_path):
    "Four epochs on discs lower the loss"
    run = go(npz, store, tmp_path/'r', epochs=4, epoch_samples=None, lr=3e-4)
    assert run.log.train_loss.iloc[-1]<.9*run.log.train_loss[1]

def test_validation_does_not_change_the_model(npz, store):
    acc,net,ds = _accelerator('cpu', 'no'),PromptedDecoder(deepcopy(lite())),dataset(npz, store)
    loader = [default_collate([ds[0], ds[1]])]
    assert validate(acc, net, loader)==validate(acc, net, loader)


# ---- the same again ----
def test_the_same_seed_gives_the_same_run(npz, store, tmp_path, done):
    again = go(npz, store, tmp_path/'a', **THREE)
    assert log_of(again)==log_of(done)
    assert same_state(state_of(again.best), state_of(done.best))

def test_another_seed_gives_another_run(npz, store, tmp_path, done):
    other = go(npz, store, tmp_path/'c', lr=3e-4, seed=7)
    assert log_of(other).splitlines()!=log_of(done).splitlines()[:3]

def test_more_epochs_equal_a_longer_run(npz, store, tmp_path, done):
    for epochs in (1,2,3): run = go(npz, store, tmp_path/'r', epochs=epochs, lr=3e-4)
    assert log_of(run)==log_of(done)
    assert same_state(state_of(run.best), state_of(done.best))
    assert [p.name for p in run.path.glob('state-*')]==['state-00003']

def test_a_finished_run_trains_nothing(npz, store, done, same_as_before):
    seen = []
    again = go(npz, store, done.path, callback=seen.append, **THREE)
    assert not seen
    assert again.log.equals(done.log)

def test_the_callback_gets_the_log_after_each_epoch(npz, store, tmp_path):
    seen = []
    go(npz, store, tmp_path/'r', callback=lambda log: seen.append(log.epoch.tolist()))
    assert seen==[[0], [0,1]]

def test_the_live_curve_returns_nothing():
    log = pd.DataFrame(dict(epoch=[0,1], train_loss=[None,1.], val_dsc=[.5,.6]))
    assert live_curve()(log) is None


# ---- what a run refuses ----
@pytest.mark.parametrize('change, match', [
    (dict(lr=1e-3), 'lr is 0.0003 there and 0.001 now'), (dict(epochs=2), 'epochs is 3 there and 2 now'),
    (dict(seed=1), 'seed is 2023 there and 1 now'), (dict(shrink=True), 'shrink is False there'),
    (dict(label_ids=(9,)), 'label_ids is None there'), (dict(val_fraction=.5), 'val_fraction')])
def test_another_configuration_is_refused(npz, store, done, same_as_before, change, match):
    with pytest.raises(InputError, match=match): go(npz, store, done.path, **(THREE|change))

def test_other_data_are_refused(done, two, same_as_before):
    with pytest.raises(InputError, match='data_sha256 is .* there'): go(*two, done.path, **THREE)

def test_the_data_may_move(npz, store, tmp_path, done):
    "The same curated files and embeddings in another folder are the same run"
    for old,new in ((done.path,'run'), (npz,'npz'), (store.path,'s')): shutil.copytree(old, tmp_path/new)
    assert go(tmp_path/'npz', EmbeddingStore(tmp_path/'s'), tmp_path/'run', **THREE).log.equals(done.log)

@pytest.fixture(scope='module')
def rare(tmp_path_factory):
    "Only two of five cases, d and e, hold label 1"
    tmp,organs = tmp_path_factory.mktemp('rare'),((9,30,34,12),)
    raw(tmp/'raw', ['a','b','c'], shape=(1,64,80), organs=organs)
    images,labels = raw(tmp/'raw', ['d','e'], shape=(1,64,80), organs=(*organs, (1,45,60,10)))
    npz = curate(images, labels, out=tmp/'npz', label_ids=(9,1), test_fraction=0, progress=False).folder
    return npz, fill(npz, tmp/'s')

@pytest.mark.parametrize('seed', [1,2,3])
def test_validation_patients_have_something_to_validate(rare, tmp_path, seed):
    cfg = config_of(go(*rare, tmp_path/'r', label_ids=(1,), seed=seed, epoch_samples=1))
    assert sorted(cfg['train']+cfg['validate'])==['d','e']
    assert len(cfg['validate'])==1

def test_data_curated_again_is_another_run(tmp_path):
    how = dict(test_fraction=0, scans=dict(shape=(1,64,80)))
    npz = hospital(tmp_path, ['a','b'], **how)
    go(npz, fill(npz, tmp_path/'s'), tmp_path/'r')
    hospital(tmp_path, ['a','b'], window='abdomen', overwrite=True, **how)
    with pytest.raises(InputError, match='data_sha256'):
        go(npz, fill(npz, tmp_path/'s2'), tmp_path/'r', epochs=2)

def test_a_foreign_folder_is_refused_and_stays(npz, store, tmp_path):
    (tmp_path/'mine').mkdir()
    (tmp_path/'mine'/'thesis.txt').write_text('x')
    with pytest.raises(InputError, match='not empty and holds no config.json'):
        go(npz, store, tmp_path/'mine')
    assert tree(tmp_path/'mine')=={'thesis.txt':b'x'}

def test_an_empty_folder_is_used(npz, store, tmp_path):
    (tmp_path/'empty').mkdir()
    assert go(npz, store, tmp_path/'empty').best.exists()

@pytest.mark.parametrize('bad, match', [
    (dict(epochs=0), 'epochs is 0'), (dict(epochs=1.5), 'epochs is 1.5'),
    (dict(lr=-1), 'lr is -1'), (dict(lr=float('nan')), 'lr is nan'), (dict(batch_size=0), 'batch_size'),
    (dict(box_px=-3), 'box_px is -3'), (dict(epoch_samples=0), 'epoch_samples is 0'),
    (dict(epoch_samples=-1), 'epoch_samples'), (dict(val_fraction=0), 'val_fraction'),
    (dict(val_fraction=1), 'val_fraction'), (dict(mixed_precision='fp8'), 'mixed_precision'),
    (dict(ema=1), 'ema'), (dict(ema=-.1), 'ema'), (dict(learning_rate=1), "unknown settings .'learning_rate'"),
    (dict(model='vit_x'), 'no model called'), (dict(checkpoint='nowhere.pth'), 'no checkpoint at nowhere.pth'),
    (dict(seed=-1), 'seed is -1'), (dict(label_ids='liver'), "label_ids 'liver'")])
def test_bad_settings_leave_nothing(npz, store, tmp_path, bad, match):
    with pytest.raises(InputError, match=match): go(npz, store, tmp_path/'r', **bad)
    assert not (tmp_path/'r').exists()

def test_no_store_leaves_nothing(npz, tmp_path):
    with pytest.raises(InputError, match='no embedding store'):
        finetune(npz, tmp_path/'none', tmp_path/'r', device='cpu')
    assert not (tmp_path/'r').exists()

def test_embeddings_of_another_model_leave_nothing(npz, tmp_path):
    other = fill(npz, tmp_path/'other', model=quick())
    with pytest.raises(ProvenanceError, match='encoder_sha256'): go(npz, other, tmp_path/'r')
    assert not (tmp_path/'r').exists()

def test_a_missing_slice_leaves_nothing(npz, tmp_path):
    hole = fill(npz, tmp_path/'hole')
    shutil.rmtree(tmp_path/'hole'/read_npz(find_npz(npz, 'train')[0]).case/'c'/'0')
    with pytest.raises(InputError, match='lacks 1 of 2 slices'): go(npz, hole, tmp_path/'r')
    assert not (tmp_path/'r').exists()

def test_a_folder_too_deep_leaves_nothing(npz, store, tmp_path):
    with pytest.raises(InputError, match='no npz'): go(npz/'train', store, tmp_path/'r')
    assert not (tmp_path/'r').exists()

def test_no_device_that_is_not_there(npz, store, tmp_path):
    with pytest.raises(InputError, match='not available'):
        finetune(npz, store.path, tmp_path/'r', device='cuda:99')
    assert not (tmp_path/'r').exists()

@pytest.mark.cuda
def test_on_cuda(npz, store, tmp_path):
    run = finetune(npz, store.path, tmp_path/'r', device='cuda', epochs=1, batch_size=2, mixed_precision='bf16')
    assert torch.cuda.max_memory_allocated()>0
    assert run.log.val_dsc.notna().all()

def test_start_from_a_checkpoint(npz, store, tmp_path, done):
    run = go(npz, store, tmp_path/'r', checkpoint=str(done.best))
    assert math.isclose(run.log.val_dsc[0], done.log.val_dsc.max(), abs_tol=1e-4)


# ---- what is written ----
def test_files_of_a_run(done):
    assert {p.name for p in done.path.iterdir()}=={'config.json','best.pth','log.csv','tensorboard','state-00003'}

def test_the_log_is_a_table(done):
    pd.testing.assert_frame_equal(pd.read_csv(done.path/'log.csv'), done.log, check_dtype=False)

def test_the_configuration_says_what_the_run_was_made_with(done):
    facts = {'encoder_sha256','package_version','train','validate','patients','data_sha256'}
    assert set(config_of(done))==facts|{f.name for f in fields(Config)}
    assert config_of(done)['encoder_sha256']==lite().encoder_sha256

@pytest.fixture(scope='module')
def board(done):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    e = EventAccumulator(str(done.path/'tensorboard'))
    e.Reload()
    return e

def test_tensorboard_has_the_columns_of_the_log(board):
    assert set(board.Tags()['scalars'])=={'train_loss','dice_loss','bce_loss','val_dsc'}

def test_tensorboard_holds_the_log(board, done):
    assert np.allclose([s.value for s in board.Scalars('val_dsc')], done.log.val_dsc, atol=1e-6)
    assert [s.step for s in board.Scalars('train_loss')]==[1,2,3]

def test_v01_files_train(tmp_path):
    (tmp_path/'n'/'train').mkdir(parents=True)
    rng = np.random.default_rng(0)
    for c in 'ab':
        gts = disc((256,256), 100, 90, 30)[None].astype(np.uint8)
        np.savez(tmp_path/'n'/'train'/f'{c}.npz', imgs=rng.integers(0, 255, (1,256,256,3), dtype=np.uint8), gts=gts)
    assert patients_of(tmp_path/'n')=={}
    assert len(go(tmp_path/'n', fill(tmp_path/'n', tmp_path/'s'), tmp_path/'r').log)==2


# ---- the command ----
def test_the_command_trains_and_says_where(npz, store, home, capsys):
    medsam_finetune(str(npz), store=store.path, run='tiny', epochs=1, epoch_samples=2, label_ids='9', device='cpu')
    assert (home/'work_dir'/'tiny'/'best.pth').exists()
    assert 'best weights' in capsys.readouterr().out

def test_the_command_takes_the_old_name_of_the_labels(npz, store, home):
    with pytest.warns(FutureWarning, match='labels is called label_ids now'):
        medsam_finetune(str(npz), store=store.path, run='tiny', epochs=1, epoch_samples=2, labels='9', device='cpu')
    assert config_of(Run(home/'work_dir'/'tiny', None))['label_ids']==[9]

def test_the_command_cannot_read_a_word_as_a_label(npz, store):
    with pytest.raises(InputError, match="label_ids 'liver'"):
        medsam_finetune(str(npz), store=store.path, run='tiny2', label_ids='liver', device='cpu')

def test_the_command_has_an_option_for_each_setting():
    options = vars(command_parser(medsam_finetune).parse_args(['npz']))
    for f in fields(Config)[2:]: assert options[f.name]==f.default

@pytest.mark.parametrize('name', [f.name for f in fields(Config)])
def test_each_setting_has_a_comment(name):
    from fastcore.docments import docments
    assert docments(Config)[name]


# ---- many cases ----
MANY = '''
import json, re, resource, sys
from pathlib import Path
import numpy as np, torch
torch.set_num_threads(1)
from medsam_nb.curate import find_npz, read_npz
from medsam_nb.embed import EmbeddingStore, case_provenance
from tiny import disc, lite
def build(root, cases, slices):
    "Cases in the old format and embeddings of one value, which take no room"
    (root/'npz'/'train').mkdir(parents=True)
    store = EmbeddingStore.create(root/'s.zarr', model='lite', encoder_sha256=lite().encoder_sha256, dtype='float16')
    gts = np.repeat(disc((256,256), 100, 90, 30)[None].astype(np.uint8), slices, 0)
    for i in range(cases):
        f = root/'npz'/'train'/f'c{i:04d}.npz'
        np.savez_compressed(f, gts=gts, imgs=np.zeros((slices,1,1,3), np.uint8))
        a = store.group.create_array(f.stem, shape=(slices,256,64,64), chunks=(1,256,64,64), dtype='float16',
                                     attributes=case_provenance(read_npz(f)))
        a[:] = np.float16(.1+i*1e-4)
'''
TRAIN = MANY+'''
from torch.utils.data import DataLoader
from medsam_nb.finetune import finetune, PromptDataset
root, cases, slices, limit = Path(sys.argv[1]), *map(int, sys.argv[2:])
build(root, cases, slices)
def peak():
    "In MB; ru_maxrss would count the parent's memory too"
    return int(re.search('VmHWM:.*?([0-9]+)', Path('/proc/self/status').read_text())[1])/1024
before = peak()
if limit: resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
few = dict(epochs=1, epoch_samples=2, batch_size=2, val_fraction=1e-3)
run = finetune(root/'npz', root/'s.zarr', root/'run', device='cpu', **few)
ds = PromptDataset(find_npz(root/'npz'), EmbeddingStore(root/'s.zarr'), 256)
n = sum(len(b['mask']) for b in DataLoader(ds, batch_size=4))
print(json.dumps(dict(n=n, before=before, mb=peak(), epochs=len(run.log))))
'''
def many(*jobs):
    "What TRAIN says about each (folder, cases, slices, limit), all at once"
    ps = [python(TRAIN, *j, threads=1, wait=False) for j in jobs]
    said = [p.communicate() for p in ps]
    assert not any(p.returncode for p in ps), said
    return [json.loads(out.splitlines()[-1]) for out,_ in said]

def test_defect08_file_handles_do_not_grow_with_the_cases(tmp_path):
    got, = many((tmp_path, 200, 1, 128))
    assert got['n']==200
    assert got['epochs']==2

@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='peak memory is read from /proc')
def test_memory_does_not_grow_with_the_slices(tmp_path):
    "2,000 slices are 8 GB as float32; they may cost less than 150 MB more than 100 slices do"
    few,lots = many((tmp_path/'few', 5, 20, 0), (tmp_path/'lots', 100, 20, 0))
    print(f'peak memory: {few["mb"]:.0f} MB with {few["n"]} slices, {lots["mb"]:.0f} MB with {lots["n"]}')
    assert (few['n'], lots['n'])==(100, 2000)
    assert lots['mb']-few['mb']<150
    assert lots['before']<lots['mb']


# ---- several processes ----
@pytest.mark.slow
def test_two_processes(npz, store, tmp_path):
    "accelerate launch with the installed command: one log, one best, all patients apart"
    bin_ = Path(sys.executable).parent
    how = '--cpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no'.split()
    what = '--epochs 1 --batch_size 1 --device cpu --run'.split()
    cmd = [bin_/'accelerate', 'launch', *how, bin_/'medsam_finetune', npz, '--store', store.path, *what, tmp_path/'r']
    env = dict(os.environ, OMP_NUM_THREADS='1')
    p = subprocess.run(list(map(str, cmd)), env=env, capture_output=True, text=True)
    assert p.returncode==0, p.stderr[-3000:]
    log = pd.read_csv(tmp_path/'r'/'log.csv')
    assert log.epoch.tolist()==[0,1]
    assert log.val_dsc.notna().all()
    assert load_model('lite', tmp_path/'r'/'best.pth', 'cpu')
