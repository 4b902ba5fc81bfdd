"Evaluation: scores by hand, the same boxes for both decoders, every case in the table, patients as the unit"
import json, shutil
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from scipy.stats import wilcoxon
from medsam_nb.core import InputError
from medsam_nb.curate import curate, find_npz, read_npz, read_split
from medsam_nb.embed import EmbeddingStore, ProvenanceError
from medsam_nb.evaluate import (SLACKS, bootstrap_mean, draw_boxes, evaluate, evaluate_case, medsam_evaluate, paired_test, per_patient, score, show_curve,
    summarize)
from medsam_nb.finetune import finetune
from medsam_nb.metrics import dsc, nsd
from medsam_nb.prompt import mask_to_box
from medsam_nb.sam import decode, load_model
from tiny import disc, fill, hospital, lite, quick, raw, save, scan, state_of, tree

CASES = [f'p{i}_{s}' for i in range(1,5) for s in 'ab']

@pytest.fixture(scope='module')
def world(tmp_path_factory):
    "Four patients with two cases each, two of them held out, and a run"
    tmp = tmp_path_factory.mktemp('e')
    npz = hospital(tmp, CASES, patient=r'p\d', test_fraction=.5, scans=dict(shape=(3,64,80), zs=(0,1)))
    store = fill(npz, tmp/'s.zarr')
    kw = dict(device='cpu', epoch_samples=2, batch_size=2)
    best = finetune(npz, store.path, tmp/'run', epochs=1, lr=1e-4, **kw).best
    g, state = torch.Generator().manual_seed(0), state_of(best)               # neither the start nor the last epoch, whatever was best
    torch.save({k: v+.1*v.std()*torch.randn(v.shape, generator=g) if k.startswith('mask_decoder') and v.numel()>1 else v for k,v in state.items()}, best)
    return npz, store, tmp/'run'

def go(world, **kw): return evaluate(world[0], world[1].path, world[2], device='cpu', **(dict(slacks=(0,10))|kw))

@pytest.fixture(scope='module')
def ev(world): return go(world)

def held_out(npz): return [read_npz(f) for f in find_npz(npz, 'test')]

def by_hand(sam, case, emb, boxes, slack, label=9):
    "Masks of one case from its rows in boxes.csv, with no code of the chapter"
    b = boxes[(boxes.case==case.case)&(boxes.slack==slack)&(boxes.label==label)].sort_values('i')
    grid, H, W = [], *case.source_shape[1:]
    h, w = (round(s*256/max(H, W)) for s in (H, W)); source = np.zeros(case.source_shape, bool)
    for r in b.itertuples():
        with torch.inference_mode(): l = decode(sam, torch.as_tensor(emb[r.i])[None], torch.tensor([[r.x0,r.y0,r.x1,r.y1]], dtype=torch.float32)-.5)[0]
        grid.append((l[0,0]>0).numpy())
        source[case.z[r.i]] = (torch.nn.functional.interpolate(l[...,:h,:w], (H,W), mode='bilinear', align_corners=False)[0,0]>0).numpy()
    return np.stack(grid), source


# ---- numbers ----
def test_scores_by_hand(world, ev):
    npz, store, run = world; case = held_out(npz)[2]; emb = store.open_case(case)
    boxes = pd.read_csv(run/'boxes.csv'); table = pd.read_csv(run/'eval.csv').set_index(['case','slack','decoder'])
    for name, sam in dict(pretrained=lite(), **{'fine-tuned': load_model('lite', run/'best.pth', 'cpu')}).items():
        for slack in (0,10):
            grid, source = by_hand(sam, case, emb, boxes, slack); row = table.loc[(case.case, slack, name)]
            truth, gt = case.labels==1, case.gts==1
            want = dict(DSC=2*(source&truth).sum()/(source.sum()+truth.sum()), NSD=nsd(source, truth, (3,.8,.8), 1.), DSC_256=dsc(grid, gt), NSD_256=nsd(grid, gt, (1,1,1), 1.))
            for k,v in want.items(): assert row[k]==pytest.approx(v, abs=1e-6), k
            assert row.slices==2 and row.missed==0 and row.patient==case.case[:2] and row.label==9

def test_the_best_decoder_is_scored_not_the_last(world, ev):
    npz, store, run = world
    best, plain = state_of(run/'best.pth'), lite().state_dict()
    assert torch.equal(ev.models['fine-tuned'].mask_decoder.mask_tokens.weight, best['mask_decoder.mask_tokens.weight'])
    assert torch.equal(ev.models['pretrained'].mask_decoder.mask_tokens.weight, plain['mask_decoder.mask_tokens.weight'])
    # the same with a best.pth that is the start: both decoders then score the same
    other = run.parent/'start'; shutil.copytree(run, other, ignore=shutil.ignore_patterns('eval.csv')); torch.save(plain, other/'best.pth')
    t = go((npz, store, other)).scores
    a, b = (t[t.decoder==d].drop(columns='decoder').reset_index(drop=True) for d in ('pretrained','fine-tuned'))
    pd.testing.assert_frame_equal(a, b)
    assert not np.allclose(*(ev.scores[ev.scores.decoder==d].DSC_256 for d in ('pretrained','fine-tuned')))

def test_defect10_every_test_case_is_scored(world, ev):
    split = read_split(world[0]); want = set(split.case[split.part=='test'])
    assert len(want)==4 and set(ev.scores.case)==want and len(ev.scores)==4*2*2
    assert set(zip(ev.scores.patient, ev.scores.case))=={(c[:2], c) for c in want}
    pd.testing.assert_frame_equal(pd.read_csv(world[2]/'eval.csv'), ev.scores, check_dtype=False)

def test_dropped_slices_count_as_missed(tmp_path):
    "The third slice has a piece too small to be curated: its voxels are in the truth, its prediction is not"
    im,lb = raw(tmp_path/'raw', ['a','b'], shape=(3,64,80), zs=(0,1))
    for f in lb.iterdir():
        lab = scan(seed=ord(f.name[0]), shape=(3,64,80), zs=(0,1))[1]; lab[2][disc((64,80), 30, 34, 2.5)] = 9; save(f, lab)
    npz = curate(im, lb, out=tmp_path/'npz', test_fraction=0, min_pixels=300, progress=False).folder; store = fill(npz, tmp_path/'s')
    case = read_npz(find_npz(npz)[0]); emb = store.open_case(case); boxes = draw_boxes(case, (0,))
    assert case.z.tolist()==[0,1] and (case.labels[2]>0).sum() > 10
    row, = evaluate_case(lite(), case, emb, boxes)
    grid, source = by_hand(lite(), case, emb, boxes, 0)
    assert row['missed']==1 and row['slices']==2 and not source[2].any()
    assert row['DSC']==pytest.approx(dsc(source, case.labels==1)) and row['DSC'] < dsc(source[:2], case.labels[:2]==1)
    assert row['NSD']==pytest.approx(nsd(source, case.labels==1, (3,.8,.8), 1.))

def test_an_organ_without_any_kept_slice_is_counted_not_scored(tmp_path, capsys):
    "A label that curation dropped on all slices of a case has no box: evaluate says how many there are"
    organs = ((9,30,34,12),(1,50,65,1.5))
    npz = hospital(tmp_path, ['a','b','c'], label_ids=(9,1), test_fraction=.3, scans=dict(shape=(2,64,80), organs=organs)); store = fill(npz, tmp_path/'s')
    case, = held_out(npz); assert set(np.unique(case.gts))=={0,1} and set(np.unique(case.labels))=={0,1,2}
    finetune(npz, store.path, tmp_path/'r', device='cpu', epochs=1, epoch_samples=1)
    t = go((npz, store, tmp_path/'r'), slacks=(0,5)).scores
    assert len(t)==4 and set(t.label)=={9} and '1 organs of these cases are not scored' in capsys.readouterr().out
    (tmp_path/'r'/'boxes.csv').unlink()
    assert set(go((npz, store, tmp_path/'r'), slacks=(0,5), labels=(9,)).scores.label)=={9}

def test_spacing_counts(tmp_path):
    "The same voxels at another spacing: the same DSC, another NSD"
    got = {}
    for s in (.5, 4.):
        d = tmp_path/str(s); im,lb = raw(d/'raw', ['a'], shape=(2,64,80))
        for f in (*im.iterdir(), *lb.iterdir()):
            from SimpleITK import GetArrayFromImage, ReadImage
            save(f, GetArrayFromImage(ReadImage(str(f))), spacing=(s,s,s))
        npz = curate(im, lb, out=d/'npz', test_fraction=0, progress=False).folder; store = fill(npz, d/'s')
        case = read_npz(find_npz(npz)[0]); got[s], = evaluate_case(lite(), case, store.open_case(case), draw_boxes(case, (5,)))
    a, b = got.values()
    assert a['DSC']==b['DSC']>0 and a['DSC_256']==b['DSC_256'] and a['NSD_256']==b['NSD_256'] and a['NSD'] > b['NSD']+.05

def test_images_are_scored_in_2d(tmp_path):
    for i,c in enumerate('ab'):
        gt = disc((64,80), 30+i, 34, 12); d = np.random.default_rng(i).integers(0, 60, (64,80))+150*gt
        for k,x in (('images',d),('labels',gt)): (tmp_path/k).mkdir(exist_ok=True); Image.fromarray(x.astype(np.uint8)).save(tmp_path/k/f'{c}.png')
    npz = curate(tmp_path/'images', tmp_path/'labels', out=tmp_path/'npz', modality='US', label_ids=(1,), test_fraction=0, progress=False).folder; store = fill(npz, tmp_path/'s')
    case = read_npz(find_npz(npz)[0]); boxes = draw_boxes(case, (0,)); row, = evaluate_case(lite(), case, store.open_case(case), boxes)
    grid, source = by_hand(lite(), case, store.open_case(case), boxes, 0, label=1)
    assert row['DSC']==pytest.approx(dsc(source[0], case.labels[0]==1)) and row['NSD']==pytest.approx(nsd(source[0], case.labels[0]==1, (1,1), 1.))
    a, b = disc((40,40), 20, 20, 10)[None], disc((40,40), 20, 23, 10)[None]
    assert score(a, b, (9,1,1))==(dsc(a[0], b[0]), nsd(a[0], b[0], (1,1))) and score(a, b, (9,1,1))[1]!=nsd(a, b, (9,1,1))

def test_the_image_need_not_fill_the_grid(world):
    "64 x 80 pixels lie on the upper 205 rows of the grid; a prediction goes back to the pixels it came from"
    case = held_out(world[0])[0]
    from medsam_nb.evaluate import _on_source
    l = np.where(case.gts==1, 10., -10.).astype(np.float32)
    back = _on_source(l, case.z, case)
    assert dsc(back, case.labels==1) > .95


# ---- boxes ----
def test_boxes_are_drawn_once_stored_and_shared(world, ev, monkeypatch):
    npz, store, run = world; stored = pd.read_csv(run/'boxes.csv')
    assert set(stored.case)==set(ev.scores.case) and set(stored.slack)=={0,10} and len(stored)==4*2*2
    import medsam_nb.evaluate as E
    seen = []; real = E._logits
    monkeypatch.setattr(E, '_logits', lambda sam, emb, boxes, size: seen.append(boxes[['case','i','slack','x0','y0','x1','y1']].to_numpy().tolist()) or real(sam, emb, boxes, size))
    monkeypatch.setattr(E, '_figures', lambda *a: None)
    again = go(world)
    assert len(seen)==8 and all(seen[i]==seen[i+1] for i in range(0, 8, 2)) and sum(map(len, seen[::2]))==len(stored)
    pd.testing.assert_frame_equal(again.scores, ev.scores); pd.testing.assert_frame_equal(pd.read_csv(run/'boxes.csv'), stored)

def test_slack_is_what_it_says(world):
    case = held_out(world[0])[0]; b = draw_boxes(case, (-5,0,20))
    for (i,s), r in b.groupby(['i','slack']):
        tight = mask_to_box(case.gts[i]==1); out = (r[['x0','y0','x1','y1']].to_numpy(float)[0]-tight)*[-1,-1,1,1]
        assert (out==0).all() if s==0 else (out>=0).all() and 0 < out.max() <= 20 if s>0 else (out<=0).all() and -5 <= out.min() < 0
    assert b.equals(draw_boxes(case, (-5,0,20))) and not b.equals(draw_boxes(case, (-5,0,20), seed=1))
    assert (b.z.to_numpy()==case.z[b.i]).all()

def test_boxes_of_one_label_are_those_of_all(tmp_path):
    npz = hospital(tmp_path, ['a'], label_ids=(9,1), test_fraction=0, scans=dict(shape=(2,64,80), organs=((9,30,34,12),(1,50,65,9))))
    case = read_npz(find_npz(npz)[0]); b = draw_boxes(case)
    assert b[b.label==1].reset_index(drop=True).equals(draw_boxes(case, labels=(1,))) and set(b.slack)==set(SLACKS)

def test_other_boxes_are_refused_and_whole_numbers_are_not_other(world, ev):
    before = tree(world[2])
    with pytest.raises(InputError, match='boxes.csv was drawn for other cases, labels or slacks'): go(world, slacks=(0,15))
    assert tree(world[2])==before
    pd.testing.assert_frame_equal(go(world, slacks=(0.,10.)).scores, ev.scores)

def test_case_names_that_look_like_missing_values(tmp_path, world):
    npz = hospital(tmp_path, ['NA','1','11','nan'], test_fraction=.5, scans=dict(shape=(1,64,80))); store = fill(npz, tmp_path/'s')
    finetune(npz, store.path, tmp_path/'r', device='cpu', epochs=1, epoch_samples=1)
    first = evaluate(npz, store.path, tmp_path/'r', slacks=(0,), device='cpu'); again = evaluate(npz, store.path, tmp_path/'r', slacks=(0,), device='cpu')
    assert set(again.scores.case)=={c.case for c in held_out(npz)} and again.scores.equals(first.scores)


# ---- patients ----
def test_bootstrap_is_over_patients():
    rng = np.random.default_rng(0); rows = []
    for p in range(8):
        m = rng.uniform(.3, .9)
        for c in range(5): rows += [dict(patient=f'p{p}', case=f'{p}{c}', label=9, slack=0, decoder=d, DSC=m+e+rng.normal(0, .001)) for d,e in (('pretrained',0),('fine-tuned',.05))]
    t = per_patient(pd.DataFrame(rows))
    assert t.shape==(8,2) and list(t)==['pretrained','fine-tuned']
    x = t['pretrained'].to_numpy(); m, lo, hi = bootstrap_mean(x)
    se = x.std()/np.sqrt(8)
    assert m==pytest.approx(x.mean()) and lo < m < hi and (hi-lo)/(2*1.96*se)==pytest.approx(1, abs=.15)
    many = bootstrap_mean([r['DSC'] for r in rows if r['decoder']=='pretrained']); assert many[2]-many[1] < .6*(hi-lo)   # what slices or cases would pretend
    s = summarize(pd.DataFrame(rows), metrics=('DSC',), slacks=(0,)).iloc[0]
    assert s.patients==8 and s.pretrained==f'{m:.3f} ({lo:.3f} to {hi:.3f})' and s.difference=='+0.050'
    assert float(s.p)==pytest.approx(wilcoxon(t['pretrained'], t['fine-tuned']).pvalue, rel=.01)

def test_a_patient_with_many_cases_counts_once():
    rows = [dict(patient='a', case=f'a{i}', label=9, slack=0, decoder='pretrained', DSC=1.) for i in range(9)]+[dict(patient='b', case='b', label=9, slack=0, decoder='pretrained', DSC=0.)]
    assert bootstrap_mean(per_patient(pd.DataFrame(rows))['pretrained'])[0]==.5

def test_paired_test_is_scipys():
    rng = np.random.default_rng(1); a = rng.random(12); b = a+rng.normal(.1, .2, 12)
    assert paired_test(a, b)==wilcoxon(a, b).pvalue and paired_test(a, a)==1. and paired_test([.5],[.7])==1.
    assert bootstrap_mean([.4])[0]==.4 and np.isnan(bootstrap_mean([.4])[1])
    assert bootstrap_mean(a)==bootstrap_mean(a)


# ---- refusals and files ----
def test_a_leak_is_refused(world, tmp_path):
    npz, store, run = world
    def with_config(name, **change):
        shutil.copytree(run, tmp_path/name, ignore=shutil.ignore_patterns('*.csv','*.png')); f = tmp_path/name/'config.json'
        f.write_text(json.dumps(json.loads(f.read_text())|change)); return tmp_path/name
    test = held_out(npz)[0].case
    for name, change in dict(case=dict(train=[test]), validate=dict(validate=[test]), patient=dict(patients=[test[:2]])).items():
        with pytest.raises(InputError, match='trained on patients of the test part'): go((npz, store, with_config(name, **change)))
        assert not list((tmp_path/name).glob('*.csv'))

def test_a_run_scored_on_another_folder_knows_its_patients(tmp_path, world):
    "A second scan of a training patient, curated elsewhere, is a leak"
    cfg = json.loads((world[2]/'config.json').read_text()); p = cfg['patients'][0]
    npz = hospital(tmp_path, [f'{p}_new','p99_x'], patient=r'p\d+', test_fraction=.5, scans=dict(shape=(1,64,80))); store = fill(npz, tmp_path/'s')
    for f in find_npz(npz, 'train'):                                      # both into the test part
        f.rename(npz/'test'/f.name)
    t = (npz/'split.csv').read_text(); (npz/'split.csv').write_text(t.replace(',train,', ',test,'))
    with pytest.raises(InputError, match=f'patients of the test part: {p}'): go((npz, store, world[2]))

def test_names_that_end_alike_are_no_leak(tmp_path):
    "'1' in the test part and '11' in the training part are two patients"
    npz = hospital(tmp_path, ['1','11','111'], test_fraction=0, scans=dict(shape=(1,64,80))); store = fill(npz, tmp_path/'s')
    (npz/'test').mkdir(); f = next(f for f in find_npz(npz) if read_npz(f).case=='1'); f.rename(npz/'test'/f.name)
    s = read_split(npz); s.loc[s.case=='1', 'part'] = 'test'
    from medsam_nb.curate import write_split
    write_split(s, npz)
    finetune(npz, store.path, tmp_path/'r', device='cpu', epochs=1, epoch_samples=1)
    assert set(evaluate(npz, store.path, tmp_path/'r', slacks=(0,), device='cpu').scores.case)=={'1'}

def test_no_run_no_cases_no_store(world, tmp_path):
    npz, store, run = world
    with pytest.raises(InputError, match='no config.json.*Fine-tune first'): go((npz, store, tmp_path))
    with pytest.raises(InputError, match='hold none of the labels'): go((npz, store, shutil.copytree(run, tmp_path/'r', ignore=shutil.ignore_patterns('*.csv'))), labels=(5,))
    assert not list((tmp_path/'r').glob('*.csv'))
    with pytest.raises(ProvenanceError): go((npz, fill(npz, tmp_path/'other', model=quick()), tmp_path/'r'))
    with pytest.raises(InputError, match="part 'val'"): go(world, part='val')
    with pytest.raises(InputError, match='not available'): evaluate(npz, store.path, run, device='cuda:99')
    torch.save(dict(a=1), tmp_path/'r'/'best.pth')
    with pytest.raises(InputError, match='best.pth'): go((npz, store, tmp_path/'r'))

def test_files_and_figures(world, ev):
    names = {p.name for p in world[2].iterdir()}
    assert {'boxes.csv','eval.csv','curve.png','figure.png','worst_1.png','worst_2.png','worst_3.png'} <= names and not [n for n in names if n.startswith('.')]
    assert all(Image.open(world[2]/n).size[0] > 200 for n in names if n.endswith('.png'))
    w = ev.worst(3, slack=10); assert len(w)==3 and w.DSC.is_monotonic_increasing
    assert 'held-out: 4 cases of 2 patients' in repr(ev) and show_curve(ev.scores, 'NSD') is not None
    assert ev.table(slacks=(0,10)).shape[0]==4

def test_the_worst_slices_are_the_worst(world, ev):
    "Of the three cases with the lowest DSC_256 of the fine-tuned decoder"
    t = ev.scores[(ev.scores.slack==10)&(ev.scores.decoder=='fine-tuned')].nsmallest(3, 'DSC_256')
    b = ev.boxes[(ev.boxes.slack==10)&ev.boxes.case.isin(t.case)]
    all_ = sorted(dsc(m['fine-tuned'], gt) for _,gt,m in (ev.masks(r) for _,r in b.iterrows()))
    assert len(all_)==6 and np.allclose(ev.worst(3, slack=10).DSC, all_[:3])

def test_training_part_has_its_own_files(world, tmp_path):
    npz, store, run = world; r = shutil.copytree(run, tmp_path/'r', ignore=shutil.ignore_patterns('*.csv','*.png'))
    t = go((npz, store, r), part='train')
    assert (r/'boxes_train.csv').exists() and (r/'eval_train.csv').exists() and not list(r.glob('eval.csv'))+list(r.glob('boxes.csv')) and (r/'curve_train.png').exists() and (r/'worst_1_train.png').exists() and not (r/'curve.png').exists() and t.what=='train' and t.scores.patient.nunique()==2

def test_command(world, ev, capsys):
    npz, store, run = world
    medsam_evaluate(str(npz), store.path, str(run), slacks='0,10', device='cpu')
    out = capsys.readouterr().out
    assert 'oracle boxes' in out and 'held-out' in out and all(c.case in out for c in held_out(npz))
    with pytest.raises(InputError, match="slacks '0,x'"): medsam_evaluate(str(npz), store.path, str(run), slacks='0,x', device='cpu')
    with pytest.raises(InputError, match="label_ids 'liver'"): medsam_evaluate(str(npz), store.path, str(run), labels='liver', device='cpu')
