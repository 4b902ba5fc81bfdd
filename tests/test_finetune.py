"Fine-tuning: the defects of MedSAM v0.1 that must not come back, what trains, what is chosen, what a run refuses"
import json, math, shutil, sys
from copy import deepcopy
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import default_collate
from medsam_nb.core import InputError
from medsam_nb.curate import curate, find_npz, patients_of, read_npz, read_split
from medsam_nb.embed import EmbeddingStore, ProvenanceError
from medsam_nb.finetune import (Config, DiceBCE, EpochSampler, PromptDataset, PromptedDecoder, _accelerator, finetune, list_samples, live_curve,
    medsam_finetune, running_mean, split_validation, train_epoch, validate)
from medsam_nb.prompt import mask_to_box
from medsam_nb.sam import decode, load_model
from tiny import disc, fill, hospital, lite, python, quick, raw, same_state, state_of, tree

CASES = ['p1_a','p1_b','p2_a','p3_a','p4_a']

@pytest.fixture(scope='module')
def npz(tmp_path_factory): return hospital(tmp_path_factory.mktemp('h'), CASES, patient=r'p\d', scans=dict(shape=(2,64,80)))

@pytest.fixture(scope='module')
def store(npz, tmp_path_factory): return fill(npz, tmp_path_factory.mktemp('s')/'s.zarr')

@pytest.fixture(scope='module')
def two(tmp_path_factory):
    "Two labels on each slice; label 9 is two discs"
    organs = ((9,20,20,10),(9,45,60,7),(1,45,25,11))
    npz = hospital(tmp_path_factory.mktemp('two'), ['a','b','c'], label_ids=(9,1,5), test_fraction=0, scans=dict(shape=(2,64,80), organs=organs))
    return npz, fill(npz, tmp_path_factory.mktemp('two2')/'s.zarr')

def go(npz, store, run, **kw): return finetune(npz, store.path, run, device='cpu', **(dict(epochs=1, epoch_samples=2, batch_size=2, lr=1e-4)|kw))

def text(run): return (run.path/'log.csv').read_text()

def dataset(npz, store, **kw): return PromptDataset(find_npz(npz, 'train'), store, 256, **kw)

@pytest.fixture(scope='module')
def done(npz, store, tmp_path_factory): return go(npz, store, tmp_path_factory.mktemp('runs')/'done', epochs=3, lr=3e-4)


# ---- loss ----
def test_defect01_cross_entropy_is_there():
    logits, target = torch.randn(3,1,8,8), (torch.rand(3,1,8,8)>.5).float()
    dice, bce = DiceBCE()(logits, target)
    p = logits.sigmoid()
    want = -(target*p.log()+(1-target)*(1-p).log()).mean()
    torch.testing.assert_close(bce, want); assert bce > .1
    torch.testing.assert_close(dice, (1-2*(p*target).sum((2,3))/((p**2).sum((2,3))+target.sum((2,3)))).mean(), atol=1e-4, rtol=1e-3)

def test_defect01_cross_entropy_is_logged_and_part_of_the_loss(done):
    t = done.log.iloc[1:]
    assert (t.bce_loss > 1e-3).all() and np.allclose(t.train_loss, t.dice_loss+t.bce_loss)

@pytest.mark.parametrize('sizes', [[1], [2], [2,1], [3,3,1]])
def test_defect09_the_epoch_mean_is_over_samples(sizes):
    "Also with one batch, where v0.1 divided by zero"
    acc, net = _accelerator('cpu', 'no'), torch.nn.Linear(1, 1)
    net.forward = lambda e, b: e*net.weight
    batches = [dict(embedding=torch.randn(n,1,4,4), box=torch.zeros(n,4), mask=(torch.rand(n,1,4,4)>.5).float()) for n in sizes]
    got = train_epoch(acc, net, batches, torch.optim.SGD(net.parameters(), lr=0), DiceBCE())
    each = [DiceBCE()(b['embedding'][i:i+1]*net.weight, b['mask'][i:i+1]) for b in batches for i in range(len(b['mask']))]
    assert np.allclose(got, [np.mean([e[k].item() for e in each]) for k in (0,1)], atol=1e-5)

def test_defect09_first_row_by_hand(npz, store, tmp_path):
    "One epoch of one batch: the logged loss is that of the untrained decoder on these samples"
    run = go(npz, store, tmp_path/'r'); cfg = json.loads((run.path/'config.json').read_text())
    files = [f for f in find_npz(npz, 'train') if read_npz(f).case in cfg['train']]
    ds = PromptDataset(files, store, 256, seed=2023); ds.epoch = 1
    s = EpochSampler(len(ds), 2023, 2); s.epoch = 1
    b = default_collate([ds[n] for n in s])
    with torch.no_grad(): dice, bce = DiceBCE()(decode(lite(), b['embedding'], b['box'])[0], b['mask'])
    row = run.log.iloc[1]
    assert math.isclose(row.dice_loss, dice, abs_tol=1e-5) and math.isclose(row.bce_loss, bce, rel_tol=1e-4)


# ---- samples ----
def test_samples_of_labels_and_pieces(two):
    npz, store = two; files = find_npz(npz, 'train')
    t = list_samples(files)
    assert t.groupby(['file','i']).label.apply(list).tolist()==[[9,1]]*6 and set(zip(t.value, t.label))=={(1,9),(2,1)}
    assert set(list_samples(files, labels=(1,)).label)=={1} and len(list_samples(files, labels=(5,)))==0
    t = list_samples(files, instances_=True)
    assert t.groupby(['file','i','label']).piece.apply(list).map(tuple).unstack()[9].tolist()==[(0,1)]*6 and len(t)==18
    whole, pieces = dataset(npz, store, box_px=0), dataset(npz, store, box_px=0, instances_=True)
    a, b, c = (d[n] for d,n in ((whole,0),(pieces,0),(pieces,1)))          # all of label 9, its larger disc, its smaller one
    assert torch.equal(a['mask'], b['mask']+c['mask']) and b['mask'].sum() > c['mask'].sum() > 0
    for s in (a,b,c): assert np.array_equal(s['box'].numpy()+.5, mask_to_box(s['mask'][0].numpy()))
    assert torch.equal(a['embedding'], b['embedding'])

def test_two_labels_share_an_embedding_and_differ_in_mask(two):
    npz, store = two; ds = dataset(npz, store)
    assert torch.equal(ds[0]['embedding'], ds[1]['embedding']) and not (ds[0]['mask']*ds[1]['mask']).any() and not torch.equal(ds[0]['embedding'], ds[2]['embedding'])
    for n in range(len(ds)):
        s = ds.samples.iloc[n]; case = read_npz(ds.files[s.file])
        assert np.array_equal(ds[n]['mask'][0].numpy(), case.gts[s.i]==s.value) and np.array_equal(ds[n]['embedding'].numpy(), store.open_case(case)[s.i])

def test_training_on_several_labels_and_pieces(two, tmp_path):
    npz, store = two
    run = go(npz, store, tmp_path/'r', instances=True, labels=(9,))
    assert json.loads((run.path/'config.json').read_text())['labels']==[9]
    go(npz, store, tmp_path/'r', instances=True, labels=[9])               # a list is the same choice
    with pytest.raises(InputError, match=r'No training case in .* holds the labels \(5,\); it was curated with \(9, 1, 5\)'): go(npz, store, tmp_path/'n', labels=(5,))
    assert not (tmp_path/'n').exists()

def test_boxes_depend_on_seed_epoch_and_sample_only(npz, store):
    a, b = dataset(npz, store, seed=1), dataset(npz, store, seed=1)
    for d in (a,b): d.epoch = 3
    forward = [a[n]['box'] for n in range(len(a))]; backward = [b[n]['box'] for n in reversed(range(len(b)))][::-1]
    assert all(torch.equal(x, y) for x,y in zip(forward, backward))
    assert not torch.equal(forward[0], dataset(npz, store, seed=2)[0]['box'])
    a.epoch = 4; assert not torch.equal(forward[0], a[0]['box'])
    tight = dataset(npz, store, box_px=0)
    for n in range(len(a)):
        d = (a[n]['box']-tight[n]['box'])*torch.tensor([-1,-1,1,1]); assert (d >= 0).all() and (d <= 20).all() and d.max() > 0
    loose = dataset(npz, store, shrink=True)
    assert any(((loose[n]['box']-tight[n]['box'])*torch.tensor([-1,-1,1,1]) < 0).any() for n in range(len(loose)))

def test_boxes_are_in_the_models_frame(npz, store):
    small, large = dataset(npz, store), PromptDataset(find_npz(npz, 'train'), store, 1024)
    torch.testing.assert_close(large[0]['box']+.5, (small[0]['box']+.5)*4)

def test_a_case_curated_again_is_read_again(tmp_path):
    im,lb = raw(tmp_path/'raw', ['a'], shape=(2,64,80)); kw = dict(out=tmp_path/'npz', test_fraction=0, progress=False, overwrite=True)
    npz = curate(im, lb, **kw).folder; ds = dataset(npz, fill(npz, tmp_path/'1')); before = ds[0]['mask']
    raw(tmp_path/'raw', ['a'], shape=(2,64,80), organs=((9,30,34,20),)); curate(im, lb, **kw)
    after = dataset(npz, fill(npz, tmp_path/'2'))[0]['mask']
    assert after.sum() > before.sum()*2

def test_epoch_sampler():
    s = EpochSampler(10, 7); first = list(s); s.epoch = 1; second = list(s)
    assert sorted(first)==sorted(second)==list(range(10)) and first!=second and len(s)==10
    s.epoch = 0; assert list(s)==first and list(EpochSampler(10, 8))!=first
    assert len(list(EpochSampler(10, 7, 3)))==3==len(EpochSampler(10, 7, 3)) and len(EpochSampler(10, 7, 99))==10

def test_another_grid_is_refused_before_anything_is_written(tmp_path):
    npz = hospital(tmp_path, ['a','b'], test_fraction=0, size=128, scans=dict(shape=(1,64,80))); s = fill(npz, tmp_path/'s')
    with pytest.raises(InputError, match='curated with size=128.*size=256'): go(npz, s, tmp_path/'r')
    assert not (tmp_path/'r').exists()


# ---- who is trained on ----
def test_test_patients_are_never_seen(npz, done):
    cfg, split = json.loads((done.path/'config.json').read_text()), read_split(npz)
    seen = cfg['train']+cfg['validate']
    assert sorted(seen)==sorted(split.case[split.part=='train']) and set(split.case[split.part=='test']) and not set(cfg['train'])&set(cfg['validate'])
    assert set(cfg['patients'])==set(split.patient[split.part=='train']) and not set(cfg['patients'])&set(split.patient[split.part=='test'])

def test_validation_is_by_patient(tmp_path):
    (tmp_path/'train').mkdir(parents=True)
    who = {f'{p}{s}': p for p in 'ABCDE' for s in '12'}
    for c in who: np.savez(tmp_path/'train'/f'{c}.npz', imgs=np.zeros((1,2,2,3), np.uint8), gts=np.zeros((1,2,2), np.uint8))
    files, chosen = find_npz(tmp_path, 'train'), set()
    for seed in range(30):
        for fraction, n in ((.2,1),(.5,2),(.01,1),(.99,4)):
            train, val = split_validation(files, who, fraction, seed)
            assert sorted(train+val)==sorted(files) and len(val)==2*n
            assert not {who[f.stem] for f in train}&{who[f.stem] for f in val}
        chosen.add(val[0].stem[0])
    assert len(chosen) > 1 and split_validation(files, who, .5, 3)==split_validation(files, who, .5, 3)
    with pytest.raises(InputError, match='at least two training patients.*found 1'): split_validation(files[:2], who, .2, 0)


# ---- what trains ----
def test_only_the_decoder_gets_gradients(npz, store):
    sam = deepcopy(lite()); net = PromptedDecoder(sam).train()
    b = default_collate([dataset(npz, store)[n] for n in (0,1)])
    sum(DiceBCE()(net(b['embedding'], b['box']), b['mask'])).backward()
    for part in (sam.image_encoder, sam.prompt_encoder): assert all(p.grad is None and not p.requires_grad for p in part.parameters())
    with_grad = [n for n,p in sam.mask_decoder.named_parameters() if p.grad is not None and p.grad.abs().sum()>0]
    assert 'mask_tokens.weight' in with_grad and 'transformer.layers.0.self_attn.q_proj.weight' in with_grad

def test_encoders_are_bit_identical_and_the_decoder_is_not(done):
    best, plain = state_of(done.best), lite().state_dict()
    assert best.keys()==plain.keys()
    changed = {k.split('.')[0] for k in plain if not torch.equal(best[k], plain[k])}
    assert changed <= {'mask_decoder'}
    last = load_file(done.path/'state-00003'/'model.safetensors')
    assert all(torch.equal(last[f'prompt_encoder.{k}'], v) for k,v in lite().prompt_encoder.state_dict().items() if f'prompt_encoder.{k}' in last)
    assert any(not torch.equal(last[f'mask_decoder.{k}'], v) for k,v in lite().mask_decoder.state_dict().items())

def val_dsc(npz, store, checkpoint, cfg):
    "Mean DSC of a checkpoint on the validation samples of a run, without `finetune`"
    sam = lite() if checkpoint is None else load_model('lite', checkpoint, 'cpu')
    files = [f for f in find_npz(npz, 'train') if read_npz(f).case in cfg['validate']]
    sets = [PromptDataset(files, store, 256, seed=cfg['seed'], box_px=px) for px in (0,10,20)]
    scores = []
    for b in (ds[n] for ds in sets for n in range(len(ds))):
        with torch.inference_mode(): p = decode(sam, b['embedding'][None], b['box'][None])[0][0]>0
        scores.append(2*(p&(b['mask']>.5)).sum().item()/(p.sum()+b['mask'].sum()).item())
    return np.mean(scores)

def test_best_is_the_epoch_with_the_highest_validation_dsc(npz, store, done):
    cfg = json.loads((done.path/'config.json').read_text())
    assert done.log.epoch.tolist()==[0,1,2,3] and done.log.val_dsc.nunique() > 1
    assert math.isclose(val_dsc(npz, store, done.best, cfg), done.log.val_dsc.max(), abs_tol=1e-4)
    assert math.isclose(val_dsc(npz, store, None, cfg), done.log.val_dsc[0], abs_tol=1e-4)

def test_training_that_makes_it_worse_keeps_the_start(npz, store, tmp_path):
    run = go(npz, store, tmp_path/'r', lr=1., epochs=1)
    assert run.log.val_dsc.idxmax()==0 and run.log.val_dsc[0] > run.log.val_dsc[1]
    assert same_state(state_of(run.best), dict(lite().state_dict())) and 'best' in repr(run) and 'in epoch 0' in repr(run)

def test_best_of_vit_b_loads_in_segment_anything(tmp_path):
    from medsam_nb.finetune import _save_best
    from medsam_nb.sam import build_model
    from segment_anything import sam_model_registry
    sam = build_model('vit_b'); net = PromptedDecoder(sam)
    with torch.no_grad(): net.mask_decoder.iou_token.weight += 1
    _save_best(sam, net.mask_decoder, tmp_path)
    theirs = sam_model_registry['vit_b']()
    theirs.load_state_dict(state_of(tmp_path/'best.pth'), strict=True)
    assert torch.equal(theirs.mask_decoder.iou_token.weight, net.mask_decoder.iou_token.weight)

def test_running_mean_by_hand():
    one = torch.nn.Linear(2, 1); mean, want = running_mean(one, .6), None
    for n in range(8):
        with torch.no_grad(): one.weight.copy_(torch.randn(1, 2))
        mean.update_parameters(one)
        d = min(.6, (1+n)/(4+n))
        want = one.weight.detach().clone() if n == 0 else d*want+(1-d)*one.weight.detach()
        torch.testing.assert_close(mean.module.weight.detach(), want)

def test_the_mean_is_what_is_validated_and_kept(npz, store, tmp_path):
    kw = dict(epochs=1, epoch_samples=6, lr=3e-4)
    mean, last = go(npz, store, tmp_path/'mean', **kw), go(npz, store, tmp_path/'last', ema=0, **kw)
    assert mean.log.train_loss.equals(last.log.train_loss)    # the same steps
    w = {r.path.name: {k: load_file(r.path/'state-00001'/f) for k, f in (('net', 'model.safetensors'), ('mean', 'model_1.safetensors'))} for r in (mean, last)}
    a = 'mask_decoder.iou_token.weight'
    assert torch.equal(w['mean']['net'][a], w['last']['net'][a]) and torch.equal(w['last']['net'][a], w['last']['mean']['module.'+a])
    assert not torch.equal(w['mean']['net'][a], w['mean']['mean']['module.'+a])
    for r in (mean, last):
        if r.log.val_dsc.idxmax() == 1: assert torch.equal(state_of(r.best)[a], w[r.path.name]['mean']['module.'+a])
    assert any(r.log.val_dsc.idxmax() == 1 for r in (mean, last)) and mean.log.val_dsc[1] != last.log.val_dsc[1]

def test_it_learns(npz, store, tmp_path):
    "Four epochs on discs lower the loss"
    run = go(npz, store, tmp_path/'r', epochs=4, epoch_samples=None, lr=3e-4)
    assert run.log.train_loss.iloc[-1] < .9*run.log.train_loss.iloc[1]


# ---- the same again ----
def test_same_seed_same_log_other_seed_other_log(npz, store, tmp_path, done):
    again = go(npz, store, tmp_path/'a', epochs=3, lr=3e-4)
    assert text(again)==text(done) and same_state(state_of(again.best), state_of(done.best))
    assert text(go(npz, store, tmp_path/'c', epochs=1, lr=3e-4, seed=7)) != '\n'.join(text(done).splitlines()[:3])+'\n'

def test_more_epochs_equal_a_longer_run(npz, store, tmp_path, done):
    kw = dict(lr=3e-4)
    go(npz, store, tmp_path/'r', epochs=1, **kw); go(npz, store, tmp_path/'r', epochs=2, **kw)
    run = go(npz, store, tmp_path/'r', epochs=3, **kw)
    assert text(run)==text(done) and same_state(state_of(run.best), state_of(done.best)) and len(run.log)==4
    assert [p.name for p in run.path.glob('state-*')]==['state-00003']

def test_a_finished_run_trains_nothing(npz, store, done):
    before, seen = tree(done.path), []
    again = finetune(npz, store.path, done.path, device='cpu', epochs=3, epoch_samples=2, batch_size=2, lr=3e-4, callback=seen.append)
    assert tree(done.path)==before and not seen and again.log.equals(done.log)

def test_callback_and_curve(npz, store, tmp_path, capsys):
    seen = []
    go(npz, store, tmp_path/'r', callback=lambda log: seen.append(log.epoch.tolist()))
    assert seen==[[0],[0,1]]
    assert live_curve()(pd.DataFrame(dict(epoch=[0,1], train_loss=[None,1.], val_dsc=[.5,.6]))) is None


# ---- what a run refuses ----
def test_another_configuration_is_refused_and_changes_nothing(npz, store, done, two):
    kw, before = dict(epochs=3, lr=3e-4), tree(done.path)
    for change, match in ((dict(lr=1e-3), 'lr is 0.0003 there and 0.001 now'), (dict(epochs=2), 'epochs is 3 there and 2 now'), (dict(seed=1), 'seed is 2023 there and 1 now'),
                          (dict(shrink=True), 'shrink is False there'), (dict(labels=(9,)), 'labels is None there'), (dict(val_fraction=.5), 'val_fraction')):
        with pytest.raises(InputError, match=match): go(npz, store, done.path, **(kw|change))
    with pytest.raises(InputError, match='data_sha256 is .* there'): go(two[0], two[1], done.path, **kw)
    assert tree(done.path)==before

def test_the_data_may_move(npz, store, tmp_path, done):
    "The same curated files and embeddings in another folder are the same run"
    run = shutil.copytree(done.path, tmp_path/'run')
    shutil.copytree(npz, tmp_path/'npz'); shutil.copytree(store.path, tmp_path/'s')
    assert go(tmp_path/'npz', EmbeddingStore(tmp_path/'s'), run, epochs=3, lr=3e-4).log.equals(done.log)

def test_validation_patients_have_something_to_validate(tmp_path):
    "Only two of five cases hold label 1: with labels=(1,) one trains and one validates, whatever the seed"
    organs = ((9,30,34,12),)
    im,lb = raw(tmp_path/'raw', ['a','b','c'], shape=(1,64,80), organs=organs); raw(tmp_path/'raw', ['d','e'], shape=(1,64,80), organs=(*organs,(1,45,60,10)))
    npz = curate(im, lb, out=tmp_path/'npz', label_ids=(9,1), test_fraction=0, progress=False).folder; store = fill(npz, tmp_path/'s')
    for seed in (1,2,3):
        cfg = json.loads((go(npz, store, tmp_path/f'r{seed}', labels=(1,), seed=seed, epoch_samples=1).path/'config.json').read_text())
        assert sorted(cfg['train']+cfg['validate'])==['d','e'] and len(cfg['validate'])==1

def test_data_curated_again_is_another_run(tmp_path):
    kw = dict(test_fraction=0, scans=dict(shape=(1,64,80)))
    npz = hospital(tmp_path, ['a','b'], **kw); go(npz, fill(npz, tmp_path/'s'), tmp_path/'r')
    shutil.rmtree(tmp_path/'s'); hospital(tmp_path, ['a','b'], window='abdomen', overwrite=True, **kw); s = fill(npz, tmp_path/'s')
    with pytest.raises(InputError, match='data_sha256'): go(npz, s, tmp_path/'r', epochs=2)

def test_a_foreign_folder_is_refused_and_stays(npz, store, tmp_path):
    (tmp_path/'mine').mkdir(); (tmp_path/'mine'/'thesis.txt').write_text('x')
    with pytest.raises(InputError, match='not empty and holds no config.json'): go(npz, store, tmp_path/'mine')
    assert tree(tmp_path/'mine')=={'thesis.txt': b'x'}
    (tmp_path/'empty').mkdir(); go(npz, store, tmp_path/'empty')           # an empty one is fine

@pytest.mark.parametrize('bad, match', [(dict(epochs=0), 'epochs is 0'), (dict(epochs=1.5), 'epochs is 1.5'), (dict(lr=-1), 'lr is -1'), (dict(lr=float('nan')), 'lr is nan'),
    (dict(batch_size=0), 'batch_size'), (dict(box_px=-3), 'box_px is -3'), (dict(epoch_samples=0), 'epoch_samples is 0'), (dict(epoch_samples=-1), 'epoch_samples'),
    (dict(val_fraction=0), 'val_fraction'), (dict(val_fraction=1), 'val_fraction'), (dict(mixed_precision='fp8'), 'mixed_precision'), (dict(ema=1), 'ema'), (dict(ema=-.1), 'ema'), (dict(learning_rate=1), "Unknown settings .'learning_rate'"),
    (dict(model='vit_x'), 'no model called'), (dict(checkpoint='nowhere.pth'), 'no checkpoint at nowhere.pth'), (dict(seed=-1), 'seed is -1')])
def test_bad_settings_leave_nothing(npz, store, tmp_path, bad, match):
    with pytest.raises(InputError, match=match): go(npz, store, tmp_path/'r', **bad)
    assert not (tmp_path/'r').exists()

def test_bad_embeddings_leave_nothing(npz, tmp_path):
    with pytest.raises(InputError, match='no embedding store'): finetune(npz, tmp_path/'none', tmp_path/'r', device='cpu')
    other = fill(npz, tmp_path/'other', model=quick())
    with pytest.raises(ProvenanceError, match='encoder_sha256'): go(npz, other, tmp_path/'r')
    hole = fill(npz, tmp_path/'hole'); shutil.rmtree(tmp_path/'hole'/read_npz(find_npz(npz, 'train')[0]).case/'c'/'0')
    with pytest.raises(InputError, match='lacks 1 of 2 slices'): go(npz, hole, tmp_path/'r')
    with pytest.raises(InputError, match='no npz'): go(npz/'train', hole, tmp_path/'r')
    assert not (tmp_path/'r').exists()

def test_no_device_that_is_not_there(npz, store, tmp_path):
    with pytest.raises(InputError, match='not available'): finetune(npz, store.path, tmp_path/'r', device='cuda:99')
    assert not (tmp_path/'r').exists()

@pytest.mark.cuda
def test_on_cuda(npz, store, tmp_path):
    run = finetune(npz, store.path, tmp_path/'r', device='cuda', epochs=1, batch_size=2, mixed_precision='bf16')
    assert torch.cuda.max_memory_allocated() > 0 and run.log.val_dsc.notna().all()

def test_start_from_a_checkpoint(npz, store, tmp_path, done):
    run = go(npz, store, tmp_path/'r', checkpoint=str(done.best))
    assert math.isclose(run.log.val_dsc[0], done.log.val_dsc.max(), abs_tol=1e-4)


# ---- what is written ----
def test_files_of_a_run(done):
    names = {p.name for p in done.path.iterdir()}
    assert names=={'config.json','best.pth','log.csv','tensorboard','state-00003'}
    log = pd.read_csv(done.path/'log.csv')
    pd.testing.assert_frame_equal(log, done.log, check_dtype=False)
    cfg = json.loads((done.path/'config.json').read_text())
    assert {'npz','store','model','lr','seed','box_px','encoder_sha256','package_version','train','validate','patients','data_sha256'} <= cfg.keys() and cfg['encoder_sha256']==lite().encoder_sha256

def test_tensorboard_holds_the_log(done):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    e = EventAccumulator(str(done.path/'tensorboard')); e.Reload()
    assert set(e.Tags()['scalars'])=={'train_loss','dice_loss','bce_loss','val_dsc'}
    assert np.allclose([s.value for s in e.Scalars('val_dsc')], done.log.val_dsc, atol=1e-6) and [s.step for s in e.Scalars('train_loss')]==[1,2,3]

def test_v01_files_train(tmp_path):
    (tmp_path/'n'/'train').mkdir(parents=True); rng = np.random.default_rng(0)
    for c in 'ab': np.savez(tmp_path/'n'/'train'/f'{c}.npz', imgs=rng.integers(0, 255, (1,256,256,3), dtype=np.uint8), gts=disc((256,256), 100, 90, 30)[None].astype(np.uint8))
    assert patients_of(tmp_path/'n')=={}
    run = go(tmp_path/'n', fill(tmp_path/'n', tmp_path/'s'), tmp_path/'r')
    assert len(run.log)==2

def test_command(npz, store, tmp_path, home, capsys):
    medsam_finetune(str(npz), store.path, 'tiny', epochs=1, epoch_samples=2, labels='9', device='cpu')
    assert (home/'work_dir'/'tiny'/'best.pth').exists() and 'best weights' in capsys.readouterr().out
    with pytest.raises(InputError, match="label_id 'liver'"): medsam_finetune(str(npz), store.path, 'tiny2', labels='liver', device='cpu')


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
        a = store.group.create_array(f.stem, shape=(slices,256,64,64), chunks=(1,256,64,64), dtype='float16', attributes=case_provenance(read_npz(f)))
        a[:] = np.float16(.1+i*1e-4)
'''
TRAIN = MANY+'''
from torch.utils.data import DataLoader
from medsam_nb.finetune import finetune, PromptDataset
root, cases, slices, limit = Path(sys.argv[1]), *map(int, sys.argv[2:])
build(root, cases, slices)
def peak(): return int(re.search('VmHWM:.*?([0-9]+)', Path('/proc/self/status').read_text())[1])/1024   # ru_maxrss would count the parent's memory too
before = peak()
if limit: resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
run = finetune(root/'npz', root/'s.zarr', root/'run', device='cpu', epochs=1, epoch_samples=2, batch_size=2, val_fraction=1e-3)
ds = PromptDataset(find_npz(root/'npz'), EmbeddingStore(root/'s.zarr'), 256)
n = sum(len(b['mask']) for b in DataLoader(ds, batch_size=4))
print(json.dumps(dict(n=n, before=before, mb=peak(), epochs=len(run.log))))
'''
def many(*jobs):
    "What TRAIN says about each (folder, cases, slices, limit), all at once"
    ps = [python(TRAIN, *j, threads=1, wait=False) for j in jobs]; said = [p.communicate() for p in ps]
    assert not any(p.returncode for p in ps), said
    return [json.loads(out.splitlines()[-1]) for out,_ in said]

def test_defect08_file_handles_do_not_grow_with_the_cases(tmp_path):
    got, = many((tmp_path, 200, 1, 128)); assert got['n']==200 and got['epochs']==2

@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='peak memory is read from /proc')
def test_memory_does_not_grow_with_the_slices(tmp_path):
    "2,000 slices are 8 GB as float32; they may cost less than 150 MB more than 100 slices do"
    few, lots = many((tmp_path/'few', 5, 20, 0), (tmp_path/'lots', 100, 20, 0))
    print(f'peak memory: {few["mb"]:.0f} MB with {few["n"]} slices, {lots["mb"]:.0f} MB with {lots["n"]}')
    assert few['n']==100 and lots['n']==2000 and lots['mb']-few['mb'] < 150 and lots['before'] < lots['mb']


# ---- several processes ----
@pytest.mark.slow
def test_two_processes(npz, store, tmp_path):
    "accelerate launch with the installed command: one log, one best, all patients apart"
    import os, subprocess, sys
    from pathlib import Path
    bin_ = Path(sys.executable).parent
    cmd = [bin_/'accelerate','launch','--cpu','--num_processes','2','--num_machines','1','--mixed_precision','no','--dynamo_backend','no',bin_/'medsam_finetune',npz,'--store',store.path,'--run',tmp_path/'r','--epochs','1','--batch_size','1','--device','cpu']
    p = subprocess.run(list(map(str, cmd)), env=dict(os.environ, OMP_NUM_THREADS='1'), capture_output=True, text=True)
    assert p.returncode==0, p.stderr[-3000:]
    log = pd.read_csv(tmp_path/'r'/'log.csv')
    assert log.epoch.tolist()==[0,1] and log.val_dsc.notna().all() and load_model('lite', tmp_path/'r'/'best.pth', 'cpu')
