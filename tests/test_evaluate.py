"Evaluation: scores by hand, the same boxes for both decoders, every case in the table, patients as the unit"
import json, shutil
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from scipy.stats import wilcoxon
from SimpleITK import GetArrayFromImage, ReadImage
from torch.nn.functional import interpolate
from medsam_nb import evaluate as chapter
from medsam_nb.core import InputError, command_parser
from medsam_nb.curate import curate, find_npz, read_npz, read_split, write_split
from medsam_nb.embed import ProvenanceError
from medsam_nb.evaluate import (SLACKS, _on_source, bootstrap_mean, draw_boxes, evaluate, evaluate_case,
    medsam_evaluate, paired_test, per_patient, show_curve, summarize)
from medsam_nb.finetune import finetune
from medsam_nb.metrics import dsc, nsd
from medsam_nb.prompt import mask_to_box
from medsam_nb.sam import decode, load_model
from tiny import disc, fill, hospital, lite, quick, raw, save, scan, state_of, tree

CASES = [f'p{i}_{s}' for i in range(1,5) for s in 'ab']
CORNERS = ['x0','y0','x1','y1']
DECODERS = ['pretrained','fine-tuned']
ONCE = dict(device='cpu', epochs=1, epoch_samples=1)
FLAT = dict(shape=(1,64,80))

def stir(path):
    "Change the decoder of a best.pth a little: then it is neither the start nor the last epoch"
    g,state = torch.Generator().manual_seed(0),state_of(path)
    for k,v in state.items():
        if k.startswith('mask_decoder') and v.numel()>1:
            state[k] = v+.1*v.std()*torch.randn(v.shape, generator=g)
    torch.save(state, path)

@pytest.fixture(scope='module')
def world(tmp_path_factory):
    "Four patients with two cases each, two of them held out, and a run"
    tmp = tmp_path_factory.mktemp('e')
    npz = hospital(tmp, CASES, patient=r'p\d', test_fraction=.5, scans=dict(shape=(3,64,80), zs=(0,1)))
    store = fill(npz, tmp/'s.zarr')
    stir(finetune(npz, store.path, tmp/'run', device='cpu', epochs=1, epoch_samples=2, batch_size=2, lr=1e-4).best)
    return npz, store, tmp/'run'

def go(world, **kwargs):
    npz,store,run = world
    return evaluate(npz, store.path, run, device='cpu', **(dict(slacks=(0,10))|kwargs))

@pytest.fixture(scope='module')
def ev(world): return go(world)

@pytest.fixture
def copy(world, tmp_path):
    "The run without its evaluation"
    return shutil.copytree(world[2], tmp_path/'r', ignore=shutil.ignore_patterns('*.csv','*.png'))

def held_out(npz): return [read_npz(f) for f in find_npz(npz, 'test')]

def first(npz): return read_npz(find_npz(npz)[0])

def by_hand(sam, case, emb, boxes, slack, label=9):
    "Masks of one case from its rows in boxes.csv, with no code of the chapter"
    b = boxes[(boxes.case==case.case)&(boxes.slack==slack)&(boxes.label==label)].sort_values('i')
    H,W = case.source_shape[1:]
    h,w = (round(s*256/max(H, W)) for s in (H, W))
    grid,source = [],np.zeros(case.source_shape, bool)
    for r in b.itertuples():
        box = torch.tensor([[r.x0,r.y0,r.x1,r.y1]], dtype=torch.float32)-.5
        with torch.inference_mode(): logits = decode(sam, torch.as_tensor(emb[r.i])[None], box)[0]
        grid.append((logits[0,0]>0).numpy())
        back = interpolate(logits[...,:h,:w], (H,W), mode='bilinear', align_corners=False)
        source[case.z[r.i]] = (back[0,0]>0).numpy()
    return np.stack(grid), source


# ---- numbers ----
@pytest.mark.parametrize('slack', [0,10])
@pytest.mark.parametrize('name', DECODERS)
def test_scores_by_hand(world, ev, name, slack):
    npz,store,run = world
    case = held_out(npz)[2]
    sam = lite() if name=='pretrained' else load_model('lite', run/'best.pth', 'cpu')
    grid,source = by_hand(sam, case, store.open_case(case), pd.read_csv(run/'boxes.csv'), slack)
    truth,gt = case.labels==1,case.gts==1
    row = pd.read_csv(run/'eval.csv').set_index(['case','slack','decoder']).loc[(case.case, slack, name)]
    assert row.DSC==pytest.approx(2*(source&truth).sum()/(source.sum()+truth.sum()), abs=1e-6)
    assert row.NSD==pytest.approx(nsd(source, truth, (3,.8,.8), 1.), abs=1e-6)
    assert row.DSC_256==pytest.approx(dsc(grid, gt), abs=1e-6)
    assert row.NSD_256==pytest.approx(nsd(grid, gt, (1,1,1), 1.), abs=1e-6)
    assert (row.slices, row.missed, row.patient, row.label)==(2, 0, case.case[:2], 9)

def test_the_best_decoder_is_scored_not_the_last(world, ev):
    best = state_of(world[2]/'best.pth')
    assert torch.equal(ev.models['fine-tuned'].mask_decoder.mask_tokens.weight, best['mask_decoder.mask_tokens.weight'])

def test_the_other_decoder_is_the_start(ev):
    assert torch.equal(ev.models['pretrained'].mask_decoder.mask_tokens.weight, lite().mask_decoder.mask_tokens.weight)

def rows_of(scores, decoder):
    return scores[scores.decoder==decoder].drop(columns='decoder').reset_index(drop=True)

def test_the_same_decoder_twice_scores_the_same(world, copy):
    npz,store,_ = world
    torch.save(lite().state_dict(), copy/'best.pth')
    scores = go((npz, store, copy)).scores
    pd.testing.assert_frame_equal(*(rows_of(scores, d) for d in DECODERS))

def test_two_decoders_score_differently(ev):
    assert not np.allclose(*(rows_of(ev.scores, d).DSC_256 for d in DECODERS))

def test_defect10_every_test_case_is_scored(world, ev):
    split = read_split(world[0])
    want = set(split.case[split.part=='test'])
    assert len(want)==4
    assert set(ev.scores.case)==want
    assert len(ev.scores)==4*2*2

def test_each_case_has_its_patient(ev): assert (ev.scores.case.str[:2]==ev.scores.patient).all()

def test_the_scores_are_in_a_file(world, ev):
    pd.testing.assert_frame_equal(pd.read_csv(world[2]/'eval.csv'), ev.scores, check_dtype=False)

@pytest.fixture
def dropped(tmp_path):
    "The third slice has a piece too small to be curated: its voxels are in the truth, its prediction is not"
    images,labels = raw(tmp_path/'raw', ['a','b'], shape=(3,64,80), zs=(0,1))
    for f in labels.iterdir():
        lab = scan(seed=ord(f.name[0]), shape=(3,64,80), zs=(0,1))[1]
        lab[2][disc((64,80), 30, 34, 2.5)] = 9
        save(f, lab)
    npz = curate(images, labels, out=tmp_path/'npz', test_fraction=0, min_pixels=300, progress=False).folder
    case,store = first(npz),fill(npz, tmp_path/'s')
    return case, store.open_case(case), draw_boxes(case, (0,))

def test_curation_dropped_a_slice_of_the_organ(dropped):
    case,_,_ = dropped
    assert case.z.tolist()==[0,1]
    assert (case.labels[2]>0).sum()>10

def test_dropped_slices_are_counted(dropped):
    row, = evaluate_case(lite(), *dropped)
    assert (row['slices'], row['missed'])==(2, 1)

def test_dropped_slices_count_as_missed(dropped):
    case,emb,boxes = dropped
    row, = evaluate_case(lite(), case, emb, boxes)
    _,source = by_hand(lite(), case, emb, boxes, 0)
    assert not source[2].any()
    assert row['DSC']==pytest.approx(dsc(source, case.labels==1))
    assert row['DSC']<dsc(source[:2], case.labels[:2]==1)
    assert row['NSD']==pytest.approx(nsd(source, case.labels==1, (3,.8,.8), 1.))

@pytest.fixture(scope='module')
def gone(tmp_path_factory):
    "A folder where curation dropped label 1 on all slices, and a run of it"
    tmp,organs = tmp_path_factory.mktemp('gone'),((9,30,34,12), (1,50,65,1.5))
    scans = dict(shape=(2,64,80), organs=organs)
    npz = hospital(tmp, ['a','b','c'], label_ids=(9,1), test_fraction=.3, scans=scans)
    store = fill(npz, tmp/'s')
    finetune(npz, store.path, tmp/'r', **ONCE)
    return npz, store, tmp/'r'

def test_curation_dropped_the_organ_but_its_labels_are_there(gone):
    case, = held_out(gone[0])
    assert set(np.unique(case.gts))=={0,1}
    assert set(np.unique(case.labels))=={0,1,2}

def test_an_organ_without_any_kept_slice_is_counted_not_scored(gone, capsys):
    scores = go(gone, slacks=(0,5)).scores
    assert len(scores)==4
    assert set(scores.label)=={9}
    assert '1 organs of these cases are not scored' in capsys.readouterr().out

def test_an_organ_that_nobody_asks_for_is_not_counted(gone, capsys):
    (gone[2]/'boxes.csv').unlink(missing_ok=True)
    assert set(go(gone, slacks=(0,5), label_ids=(9,)).scores.label)=={9}
    assert 'not scored' not in capsys.readouterr().out

def at_spacing(tmp, s):
    "The scores of a case whose voxels are `s` mm wide"
    images,labels = raw(tmp/'raw', ['a'], shape=(2,64,80))
    for f in (*images.iterdir(), *labels.iterdir()):
        save(f, GetArrayFromImage(ReadImage(str(f))), spacing=(s,s,s))
    npz = curate(images, labels, out=tmp/'npz', test_fraction=0, progress=False).folder
    case = first(npz)
    row, = evaluate_case(lite(), case, fill(npz, tmp/'s').open_case(case), draw_boxes(case, (5,)))
    return row

def test_spacing_counts(tmp_path):
    "The same voxels at another spacing: the same DSC, another NSD"
    fine,coarse = (at_spacing(tmp_path/str(s), s) for s in (.5,4.))
    assert fine['DSC']==coarse['DSC']>0
    assert fine['NSD']>coarse['NSD']+.05
    for k in ('DSC_256','NSD_256'): assert fine[k]==coarse[k]

def test_images_are_scored_in_2d(tmp_path):
    for i,c in enumerate('ab'):
        gt = disc((64,80), 30+i, 34, 12)
        grey = np.random.default_rng(i).integers(0, 60, (64,80))+150*gt
        for k,x in (('images',grey), ('labels',gt)):
            (tmp_path/k).mkdir(exist_ok=True)
            Image.fromarray(x.astype(np.uint8)).save(tmp_path/k/f'{c}.png')
    how = dict(modality='US', label_ids=(1,), test_fraction=0, progress=False)
    npz = curate(tmp_path/'images', tmp_path/'labels', out=tmp_path/'npz', **how).folder
    case = first(npz)
    emb,boxes = fill(npz, tmp_path/'s').open_case(case),draw_boxes(case, (0,))
    row, = evaluate_case(lite(), case, emb, boxes)
    _,source = by_hand(lite(), case, emb, boxes, 0, label=1)
    assert row['DSC']==pytest.approx(dsc(source[0], case.labels[0]==1))
    assert row['NSD']==pytest.approx(nsd(source[0], case.labels[0]==1, (1,1), 1.))

def test_the_image_need_not_fill_the_grid(world):
    "64 x 80 pixels lie on the upper 205 rows of the grid; a prediction goes back to the pixels it came from"
    case = held_out(world[0])[0]
    logits = np.where(case.gts==1, 10., -10.).astype(np.float32)
    assert dsc(_on_source(logits, case.z, case), case.labels==1)>.95


# ---- boxes ----
def test_the_boxes_are_stored(world, ev):
    stored = pd.read_csv(world[2]/'boxes.csv')
    assert set(stored.case)==set(ev.scores.case)
    assert set(stored.slack)=={0,10}
    assert len(stored)==4*2*2

@pytest.fixture
def asked(monkeypatch):
    "The boxes that each decoder was shown, call by call; no figures are drawn"
    seen,real = [],chapter._logits
    def spy(sam, emb, boxes, size):
        seen.append(boxes[['case','i','slack',*CORNERS]].to_numpy().tolist())
        return real(sam, emb, boxes, size)
    monkeypatch.setattr(chapter, '_logits', spy)
    monkeypatch.setattr(chapter, '_figures', lambda *a: None)
    return seen

def test_both_decoders_see_the_stored_boxes(world, ev, asked):
    go(world)
    assert len(asked)==8
    assert asked[::2]==asked[1::2]
    assert sum(map(len, asked[::2]))==len(pd.read_csv(world[2]/'boxes.csv'))

def test_the_same_again_gives_the_same(world, ev, asked):
    before = (world[2]/'boxes.csv').read_bytes()
    pd.testing.assert_frame_equal(go(world).scores, ev.scores)
    assert (world[2]/'boxes.csv').read_bytes()==before

@pytest.fixture(scope='module')
def moved(world):
    "How far each side of each box is off, outward positive: slack -> (n,4) pixels"
    case = held_out(world[0])[0]
    boxes = draw_boxes(case, (-5,0,20))
    tight = np.stack([mask_to_box(case.gts[i]==1) for i in boxes.i])
    out = (boxes[CORNERS].to_numpy()-tight)*[-1,-1,1,1]
    return {s:out[boxes.slack==s] for s in (-5,0,20)}

def test_no_slack_is_tight(moved): assert (moved[0]==0).all()

def test_slack_above_0_is_outward(moved):
    assert (moved[20]>=0).all()
    assert (moved[20]<=20).all()
    assert (moved[20].max(1)>0).all()

def test_slack_below_0_is_inward(moved):
    assert (moved[-5]<=0).all()
    assert (moved[-5]>=-5).all()
    assert (moved[-5].min(1)<0).all()

def test_boxes_depend_on_the_seed(world):
    case = held_out(world[0])[0]
    assert draw_boxes(case).equals(draw_boxes(case))
    assert not draw_boxes(case).equals(draw_boxes(case, seed=1))

def test_boxes_know_their_slice_in_the_source(world):
    case = held_out(world[0])[0]
    boxes = draw_boxes(case)
    assert (boxes.z.to_numpy()==case.z[boxes.i]).all()

@pytest.fixture(scope='module')
def pair(tmp_path_factory):
    "A case with two labels"
    scans = dict(shape=(2,64,80), organs=((9,30,34,12), (1,50,65,9)))
    return first(hospital(tmp_path_factory.mktemp('pair'), ['a'], label_ids=(9,1), test_fraction=0, scans=scans))

def test_boxes_of_one_label_are_those_of_all(pair):
    every = draw_boxes(pair)
    assert every[every.label==1].reset_index(drop=True).equals(draw_boxes(pair, label_ids=(1,)))

def test_boxes_have_all_slacks_unless_told_otherwise(pair): assert set(draw_boxes(pair).slack)==set(SLACKS)

def test_all_labels_in_words(pair): assert draw_boxes(pair, label_ids='all').equals(draw_boxes(pair))

def test_other_boxes_are_refused_and_nothing_changes(world, ev):
    before = tree(world[2])
    with pytest.raises(InputError, match='boxes.csv was drawn for other cases, labels or slacks'):
        go(world, slacks=(0,15))
    assert tree(world[2])==before

def test_whole_numbers_are_not_other_slacks(world, ev):
    assert go(world, slacks=(0.,10.)).scores.equals(ev.scores)

def test_case_names_that_look_like_missing_values(tmp_path):
    npz = hospital(tmp_path, ['NA','1','11','nan'], test_fraction=.5, scans=FLAT)
    store = fill(npz, tmp_path/'s')
    finetune(npz, store.path, tmp_path/'r', **ONCE)
    once,again = (go((npz, store, tmp_path/'r'), slacks=(0,)).scores for _ in range(2))
    assert set(again.case)=={c.case for c in held_out(npz)}
    assert again.equals(once)


# ---- patients ----
def row(patient, case, decoder, DSC):
    return dict(patient=patient, case=case, label=9, slack=0, decoder=decoder, DSC=DSC)

@pytest.fixture(scope='module')
def eight():
    "Eight patients with five cases each that hardly differ; the fine-tuned decoder is 0.05 better"
    rng,rows = np.random.default_rng(0),[]
    for p in range(8):
        m = rng.uniform(.3, .9)
        for c in range(5):
            for name,more in zip(DECODERS, (0,.05)):
                rows.append(row(f'p{p}', f'{p}{c}', name, m+more+rng.normal(0, .001)))
    return pd.DataFrame(rows)

def test_a_row_per_patient_and_a_column_per_decoder(eight):
    t = per_patient(eight)
    assert t.shape==(8,2)
    assert list(t)==DECODERS

def test_the_bootstrap_interval_is_that_of_the_patients(eight):
    x = per_patient(eight).pretrained.to_numpy()
    m,lo,hi = bootstrap_mean(x)
    assert m==pytest.approx(x.mean())
    assert lo<m<hi
    assert (hi-lo)/(2*1.96*x.std()/np.sqrt(8))==pytest.approx(1, abs=.15)

def test_cases_would_pretend_a_narrower_interval(eight):
    _,lo,hi = bootstrap_mean(per_patient(eight).pretrained)
    _,low,high = bootstrap_mean(eight.DSC[eight.decoder=='pretrained'])
    assert high-low<.6*(hi-lo)

def test_the_table_says_mean_interval_difference_and_p(eight):
    t,s = per_patient(eight),summarize(eight, metrics=('DSC',), slacks=(0,)).iloc[0]
    assert s.patients==8
    assert s.pretrained=='{:.3f} ({:.3f} to {:.3f})'.format(*bootstrap_mean(t.pretrained))
    assert s.difference=='+0.050'
    assert float(s.p)==pytest.approx(wilcoxon(t['pretrained'], t['fine-tuned']).pvalue, rel=.01)

def test_a_patient_with_many_cases_counts_once():
    rows = [row('a', f'a{i}', 'pretrained', 1.) for i in range(9)]+[row('b', 'b', 'pretrained', 0.)]
    assert bootstrap_mean(per_patient(pd.DataFrame(rows)).pretrained)[0]==.5

@pytest.fixture
def twelve():
    rng = np.random.default_rng(1)
    a = rng.random(12)
    return a, a+rng.normal(.1, .2, 12)

def test_the_paired_test_is_scipys(twelve): assert paired_test(*twelve)==wilcoxon(*twelve).pvalue

def test_no_difference_is_p_1(twelve): assert paired_test(twelve[0], twelve[0])==1.

def test_one_patient_proves_nothing():
    assert paired_test([.5], [.7])==1.
    assert bootstrap_mean([.4])[0]==.4
    assert np.isnan(bootstrap_mean([.4])[1])

def test_the_bootstrap_is_the_same_again(twelve): assert bootstrap_mean(twelve[0])==bootstrap_mean(twelve[0])


# ---- refusals ----
@pytest.mark.parametrize('where', ['train','validate','patients'])
def test_a_leak_is_refused(world, copy, where):
    npz,store,_ = world
    case,file = held_out(npz)[0].case,copy/'config.json'
    cfg = json.loads(file.read_text())
    file.write_text(json.dumps(cfg|{where:[case[:2] if where=='patients' else case]}))
    with pytest.raises(InputError, match='trained on patients of the test part'): go((npz, store, copy))
    assert not list(copy.glob('*.csv'))

def test_a_run_scored_on_another_folder_knows_its_patients(tmp_path, world):
    "A second scan of a training patient, curated elsewhere, is a leak"
    p = json.loads((world[2]/'config.json').read_text())['patients'][0]
    npz = hospital(tmp_path, [f'{p}_new','p99_x'], patient=r'p\d+', test_fraction=.5, scans=FLAT)
    store = fill(npz, tmp_path/'s')
    for f in find_npz(npz, 'train'): f.rename(npz/'test'/f.name) # both are in the test part then
    split = (npz/'split.csv').read_text()
    (npz/'split.csv').write_text(split.replace(',train,', ',test,'))
    with pytest.raises(InputError, match=f'patients of the test part: {p}'): go((npz, store, world[2]))

def test_names_that_end_alike_are_no_leak(tmp_path):
    "'1' in the test part and '11' in the training part are two patients"
    npz = hospital(tmp_path, ['1','11','111'], test_fraction=0, scans=FLAT)
    store = fill(npz, tmp_path/'s')
    one, = (f for f in find_npz(npz) if read_npz(f).case=='1')
    (npz/'test').mkdir()
    one.rename(npz/'test'/one.name)
    split = read_split(npz)
    split.loc[split.case=='1', 'part'] = 'test'
    write_split(split, npz)
    finetune(npz, store.path, tmp_path/'r', **ONCE)
    assert set(go((npz, store, tmp_path/'r'), slacks=(0,)).scores.case)=={'1'}

def test_a_folder_that_is_no_run(world, tmp_path):
    with pytest.raises(InputError, match='no config.json.*fine-tune first'): go((*world[:2], tmp_path))

def test_a_label_that_no_case_holds_leaves_nothing(world, copy):
    with pytest.raises(InputError, match='hold none of the labels'): go((*world[:2], copy), label_ids=(5,))
    assert not list(copy.glob('*.csv'))

def test_embeddings_of_another_model(world, copy, tmp_path):
    other = fill(world[0], tmp_path/'other', model=quick())
    with pytest.raises(ProvenanceError): go((world[0], other, copy))

def test_a_part_that_does_not_exist(world):
    with pytest.raises(InputError, match="part 'val'"): go(world, part='val')

def test_a_device_that_is_not_there(world):
    npz,store,run = world
    with pytest.raises(InputError, match='not available'): evaluate(npz, store.path, run, device='cuda:99')

def test_a_checkpoint_of_something_else(world, copy):
    torch.save(dict(a=1), copy/'best.pth')
    with pytest.raises(InputError, match='best.pth'): go((*world[:2], copy))


# ---- what is written ----
FIGURES = ['curve.png','figure.png','worst_1.png','worst_2.png','worst_3.png']

def test_files_of_an_evaluation(world, ev):
    names = {p.name for p in world[2].iterdir()}
    assert {'boxes.csv','eval.csv',*FIGURES}<=names
    assert not [n for n in names if n.startswith('.')]

@pytest.mark.parametrize('name', FIGURES)
def test_figures_can_be_read(world, ev, name): assert Image.open(world[2]/name).size[0]>200

def test_the_worst_begin_with_the_worst(ev):
    worst = ev.worst(3, slack=10)
    assert len(worst)==3
    assert worst.DSC.is_monotonic_increasing

def test_an_evaluation_says_what_it_is_of(ev): assert 'held-out: 4 cases of 2 patients' in repr(ev)

def test_a_curve_of_another_metric(ev): assert show_curve(ev.scores, 'NSD').get_ylabel()=='NSD'

def test_the_table_has_a_row_for_each_metric_and_slack(ev): assert len(ev.table(slacks=(0,10)))==4

def test_the_worst_slices_are_the_worst(ev):
    "Of the three cases with the lowest DSC_256 of the fine-tuned decoder"
    t = ev.scores[(ev.scores.slack==10)&(ev.scores.decoder=='fine-tuned')].nsmallest(3, 'DSC_256')
    boxes = ev.boxes[(ev.boxes.slack==10)&ev.boxes.case.isin(t.case)]
    found = [ev.masks(r) for _,r in boxes.iterrows()]
    every = sorted(dsc(masks['fine-tuned'], gt) for _,gt,masks in found)
    assert len(every)==6
    assert np.allclose(ev.worst(3, slack=10).DSC, every[:3])

@pytest.fixture(scope='module')
def trained(world, tmp_path_factory):
    "The training part, evaluated"
    run = tmp_path_factory.mktemp('t')/'r'
    shutil.copytree(world[2], run, ignore=shutil.ignore_patterns('*.csv','*.png'))
    return go((*world[:2], run), part='train')

@pytest.mark.parametrize('name', ['boxes_train.csv','eval_train.csv','curve_train.png','worst_1_train.png'])
def test_the_training_part_has_its_own_files(trained, name): assert (trained.run/name).exists()

@pytest.mark.parametrize('name', ['boxes.csv','eval.csv','curve.png'])
def test_the_training_part_writes_no_files_of_the_test_part(trained, name):
    assert not (trained.run/name).exists()

def test_the_training_part_says_so(trained):
    assert trained.what=='train'
    assert trained.scores.patient.nunique()==2


# ---- the command ----
def command(world, **kwargs):
    npz,store,run = world
    return medsam_evaluate(str(npz), **(dict(store=store.path, run=str(run), slacks='0,10', device='cpu')|kwargs))

def test_the_command_prints_each_case_and_the_table(world, ev, asked, capsys):
    command(world)
    out = capsys.readouterr().out
    for word in ('oracle boxes', 'held-out', *(c.case for c in held_out(world[0]))): assert word in out

def test_the_command_cannot_read_a_word_as_a_slack(world):
    with pytest.raises(InputError, match="slacks '0,x'"): command(world, slacks='0,x')

def test_the_command_cannot_read_a_word_as_a_label(world):
    with pytest.raises(InputError, match="label_ids 'liver'"): command(world, label_ids='liver')

def test_the_old_name_of_the_labels_works_and_says_so(world, ev, asked):
    with pytest.warns(FutureWarning, match='labels is called label_ids now'): again = go(world, labels=(9,))
    assert again.scores.equals(ev.scores)

def test_the_command_has_the_options_of_the_function():
    options = vars(command_parser(medsam_evaluate).parse_args(['npz', '--slacks=0,20', '--label_ids', '1,9']))
    want = {'npz','store','run','part','slacks','label_ids','labels','tolerance','seed','device'}
    assert set(options)==want
