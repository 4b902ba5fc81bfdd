"Real scans, from a raw folder to scores. Marked `real`: they run where ../shared/data (or MEDSAM_NB_REAL_DATA) is"
import numpy as np, pandas as pd, pytest
from medsam_nb.core import ORGANS
from medsam_nb.curate import curate, find_npz, normalize, read_npz, read_split
from medsam_nb.embed import EmbeddingStore, embed
from medsam_nb.evaluate import draw_boxes, evaluate, evaluate_case
from medsam_nb.finetune import finetune, list_samples
from medsam_nb.metrics import dsc
from medsam_nb.predict import Predictor, click_rounds, everything, match_regions, oracle_boxes, predict_volume
from medsam_nb.prompt import instances, line_to_box, longest_diameter, mask_to_box, short_diameter
from medsam_nb.sam import load_model
from medsam_nb.view import Grid, Recipe
from medsam_nb.volume import check_pair, find_cases, read_volume, write_mask

pytestmark = pytest.mark.real
of_btcv = pytest.mark.xdist_group('btcv') # they share the embeddings of one fixture
BTCV = {1:'spleen', 2:'right kidney', 3:'left kidney', 4:'gallbladder', 5:'oesophagus', 6:'liver', 7:'stomach',
        8:'aorta', 9:'IVC', 10:'portal vein', 11:'pancreas', 12:'right adrenal', 13:'left adrenal'}

@pytest.fixture(scope='module')
def lite(): return load_model('lite', device='cpu')

def say(*lines): print('', *lines, sep='\n', flush=True)

def folders(data, name): return data/name/'images', data/name/'labels'

def first(images, labels):
    "The first case of a folder and its label"
    case = find_cases(images, labels)[0]
    return case, read_volume(case.image), read_volume(case.label, kind='label')

def evenly(values, n): return values[np.linspace(0, len(values)-1, n).astype(int)]


# ---- a CT of the abdomen ----
def test_a_gallbladder_from_tight_boxes(real_data, lite, tmp_path):
    "Curate label 9, embed, ask with oracle boxes, with the medsam window"
    folder = curate(*folders(real_data, 'abdomen_ct'), out=tmp_path/'npz', label_ids=(9,), window='medsam').folder
    store = embed(folder, tmp_path/'emb.zarr', model=lite, device='cpu')
    case = read_npz(find_npz(folder)[0])
    row, = evaluate_case(lite, case, store.open_case(case), draw_boxes(case, slacks=(0,)))
    say(f"abdomen_ct gallbladder, lite, tight oracle boxes, window medsam: 3-D DSC {row['DSC']:.3f}, "
        f"NSD(1 mm) {row['NSD']:.3f}, {row['slices']} slices, {row['missed']} missed by curation; "
        f"256 grid DSC {row['DSC_256']:.3f}")
    assert row['DSC']>=.88

class Remembering(Predictor):
    "Encodes an image once"
    seen = {}
    def set_image(self, im, *args):
        key = im.tobytes()
        if key in self.seen: return self.set_embedding(*self.seen[key])
        super().set_image(im, *args)
        self.seen[key] = self.embedding[0], self.grid, self.image
        return self

@pytest.fixture(scope='module')
def abdomen(real_data): return first(*folders(real_data, 'abdomen_ct'))

@pytest.fixture(scope='module')
def label_maps(abdomen, lite):
    "All organs predicted as one label map from tight oracle boxes, by both rules for where masks overlap"
    _, vol, lab = abdomen
    predictor, boxes = Remembering(lite), oracle_boxes(lab)
    maps = {rule: predict_volume(predictor, vol, boxes, progress=False, overlap=rule) for rule in ('smaller', 'iou')}
    Remembering.seen.clear()
    return maps

@pytest.fixture(scope='module')
def organ_scores(abdomen, label_maps):
    "DSC of every organ, by rule"
    truth = abdomen[2].array
    ids = [int(i) for i in np.unique(truth) if i]
    rows = {i: dict(organ=ORGANS[i], voxels=(truth==i).sum()) for i in ids}
    for i in ids: rows[i] |= {rule: dsc(m==i, truth==i) for rule, m in label_maps.items()}
    table = pd.DataFrame(rows.values(), index=ids)
    say('abdomen_ct, lite, tight oracle boxes, one label map, DSC where the smaller mask wins, or the higher '
        'predicted IoU:',
        table.round(3).to_string(), table[['smaller', 'iou']].mean().round(3).to_dict())
    return table

def test_twelve_organs_are_one_label_map(organ_scores):
    assert set(organ_scores.index)==set(range(1,14))-{10}
    assert organ_scores.smaller.mean()>=.78
    assert organ_scores.smaller[1]>=.8 # liver

def test_the_smaller_mask_wins_because_it_scores_better(organ_scores):
    assert organ_scores.smaller.mean()>organ_scores.iou.mean()+.03

def test_a_label_map_is_written_and_read_in_the_geometry_of_its_scan(abdomen, label_maps, tmp_path):
    _, vol, _ = abdomen
    write_mask(label_maps['smaller'], vol, tmp_path/'mask.nii.gz')
    back = read_volume(tmp_path/'mask.nii.gz', kind='label')
    check_pair(vol, back)
    assert np.array_equal(back.array, label_maps['smaller'])

def after(rounds, n, gt):
    "DSC after `n` rounds, or after the last"
    return dsc(rounds[min(n, len(rounds))-1].masks[0], gt)

def many(n, what): return f'{n} {what}{"s"*(n>1)}'

def ask_all_ways(pred, im, gt, spacing):
    "DSC of every prompt mode on one slice for one organ; everything comes from the ground truth"
    pred.set_image(im)
    box = mask_to_box(gt)
    long, _ = longest_diameter(gt, spacing)
    short, _ = short_diameter(gt, long, spacing)
    one = pred.predict(box)
    clicks = click_rounds(pred, gt, 10, carry=False)
    carried = click_rounds(pred, gt, 10)
    boxed = click_rounds(pred, gt, 10, box=box, carry=False)
    def score(*args, **kwargs): return dsc(pred.predict(*args, **kwargs).masks[0], gt)
    return {
        'box': dsc(one.masks[0], gt),
        'box of the long diameter': score(line_to_box(long, gt.shape, spacing=spacing)),
        'box of both diameters': score(line_to_box(long, gt.shape, short=short, spacing=spacing)),
        **{many(n, 'click'): after(clicks, n, gt) for n in (1,3,5,10)},
        **{f'{n} clicks, last mask shown': after(carried, n, gt) for n in (3,10)},
        **{f'box and {many(n, "click")}': after(boxed, n+1, gt) for n in (1,3)},
        'box and its own mask': score(box, mask=one.logits),
        'its mask alone': score(mask=one.logits)}

def is_sure(region): return region['predicted_iou']>.88 and region['stability_score']>.95

def is_an_organ(region, labels):
    return any(dsc(region['segmentation'], labels==k)>=.5 for k in np.unique(labels) if k)

def regions_and_organs(sam, im, labels, organ):
    "Everything mode, no region thrown away: DSC of the best for an organ; regions, those sure, those that are an organ"
    found = everything(sam, im, points_per_side=6, pred_iou_thresh=0, stability_score_thresh=0)
    best = match_regions(found, labels).set_index('label').DSC[organ]
    counts = len(found), sum(is_sure(r) for r in found), sum(is_an_organ(r, labels) for r in found)
    return {'everything, best region': best}, counts

@pytest.fixture(scope='module')
def modes(abdomen, lite):
    "Liver, right kidney, spleen, gallbladder on four slices each, every prompt mode on the same slices: mean DSC"
    _, vol, lab = abdomen
    ims, pred, rows, counts = normalize(vol.array, Recipe()), Predictor(lite), [], []
    for i in (1,2,3,9):
        for z in evenly(np.flatnonzero((lab.array==i).sum((1,2))>=30), 4):
            best, n = regions_and_organs(lite, ims[z], lab.array[z], i)
            rows.append(dict(organ=ORGANS[i]) | ask_all_ways(pred, ims[z], lab.array[z]==i, vol.spacing) | best)
            counts.append(n)
    t = pd.DataFrame(rows).groupby('organ', sort=False).mean().T
    t['mean'] = t.mean(axis=1)
    n, sure, organs = np.sum(counts, 0)
    say(f'abdomen_ct, lite, window medsam, {len(rows)} slices, prompts from the ground truth, mean 2-D DSC:',
        t.round(3).to_string(),
        f'everything mode, 36 clicks a slice: {sure} regions at the usual thresholds, {n} without them, '
        f'{organs} of these with a DSC of 0.5 or more for any labelled organ, none with a name')
    return t

boxes_only = pytest.mark.filterwarnings('ignore:lite was trained with boxes only')

@boxes_only
def test_a_box_beats_one_click_for_every_organ(modes):
    assert len(modes.columns)==5
    assert (modes.loc['box']>modes.loc['1 click']).all()
    assert modes['mean']['box']>modes['mean']['1 click']+.3

@boxes_only
def test_a_box_and_two_diameters_are_good(modes):
    assert modes['mean']['box']>.85
    assert modes['mean']['box of both diameters']>.8

@boxes_only
def test_a_box_beats_the_best_region_of_everything_mode(modes):
    assert modes['mean']['box']>modes['mean']['everything, best region']


# ---- other scans ----
@pytest.mark.parametrize('name,modality', [('sarcoma_ct', 'CT'), ('spleen_ct', 'CT'), ('sarcoma_mr', 'MR')])
def test_other_scans_go_from_curate_to_predict(real_data, lite, tmp_path, name, modality):
    "CT and MR of other regions, with the same calls; boxes on a few slices keep it short"
    images, labels = folders(real_data, name)
    res = curate(images, labels, out=tmp_path/'npz', label_ids=(1,), modality=modality, anatomy='x')
    assert not res.failed and res.table.kept.sum()>0
    case, vol, lab = first(images, labels)
    kept = read_npz(next(f for f in res.files() if f.stem.endswith(case.case))).z
    some = evenly(kept, min(4, len(kept)))
    boxes = oracle_boxes(lab).query('z in @some')
    mask = predict_volume(Predictor(lite), vol, boxes, Recipe(modality=modality, anatomy='x', label_ids=(1,)),
                          progress=False)
    score = dsc(mask[some]==1, lab.array[some]==1)
    say(f'{name} {vol.shape}: {res.table.kept.sum()} slices kept; {case.case}, {len(some)} slices, '
        f'tight oracle boxes: DSC {score:.3f}')
    assert score>.6


# ---- slices of 17 patients ----
@pytest.fixture(scope='module')
def btcv(real_data, lite, tmp_path_factory):
    "BTCV slices of 17 patients, every organ, split by patient, one embedding a slice; shared by the tests below"
    tmp = tmp_path_factory.mktemp('btcv')
    # rows of these PNGs run bottom-up, and a PNG cannot say so
    # seed 0 is the first whose four test patients have gallbladders of 100 px or more (the default seed's have two)
    res = curate(*folders(real_data, 'btcv2d'), out=tmp/'npz', label_ids=tuple(BTCV), modality='CT2D',
        patient=r'ABD_(\d+)_', flip='ud', test_fraction=.25, seed=0)
    embed(res.folder, tmp/'emb.zarr', model=lite, device='cpu')
    return res.folder, tmp/'emb.zarr', tmp

def masks_mean(ev, slack):
    "Mean DSC over masks (not patients), per decoder"
    return ev.scores[ev.scores.slack==slack].groupby('decoder', sort=False).DSC_256.mean()

@of_btcv
def test_btcv_is_split_by_patient(btcv):
    split = read_split(btcv[0])
    assert len(split)==125 and split.patient.nunique()==17
    kept = split[split.kept>0] # two slices with nothing of 100 px in them belong to no part
    assert len(kept)==123 and set(kept.part)=={'train', 'test'}
    assert kept.groupby('patient').part.nunique().max()==1
    assert kept[kept.part=='test'].patient.nunique()==4

def ask_pieces(pred, gt):
    "How many pieces, DSC of a box for each, DSC of one box round all"
    pieces = instances(gt)
    each = dsc(pred.predict(np.stack([mask_to_box(m) for m in pieces])).masks.any(0), gt)
    if len(pieces)==1: return 1, each, each
    return len(pieces), each, dsc(pred.predict(mask_to_box(gt)).masks[0], gt)

@of_btcv
def test_btcv_pretrained_on_all_organs(btcv, lite):
    "All patients, a tight oracle box round each piece of each organ, before any tuning"
    folder, store, _ = btcv
    pred, rows = Predictor(lite), []
    for f in find_npz(folder):
        case = read_npz(f)
        emb = EmbeddingStore(store).open_case(case)
        for n, gts in enumerate(case.gts):
            pred.set_embedding(emb[n], Grid(gts.shape))
            for k in np.unique(gts[gts>0]): rows.append((BTCV[case.label_ids[k-1]], *ask_pieces(pred, gts==k)))
    t = pd.DataFrame(rows, columns=['organ', 'pieces', 'each', 'one box'])
    means = t[['each', 'one box']].mean()
    organs = t.groupby('organ', sort=False)[['pieces', 'each', 'one box']].mean().assign(masks=t.organ.value_counts())
    say(f'btcv2d, lite pretrained, {len(t)} masks of {t.organ.nunique()} organs, tight oracle boxes, 256 grid, '
        f'mean DSC over masks {means["each"]:.3f} (one box round all pieces: {means["one box"]:.3f}), '
        f'mean over the organs {organs["each"].mean():.3f} ({organs["one box"].mean():.3f})',
        organs.round(3).to_string())
    assert t.organ.nunique()==13
    assert means['each']>=.84 and means['one box']>=.81

@of_btcv
def test_btcv_gallbladder(btcv):
    "Tuned on gallbladder alone (nine slices): better with loose boxes; the whole curve is printed"
    folder, store, tmp = btcv
    run = finetune(folder, store, tmp/'gallbladder', device='cpu', labels=(4,), epochs=20, lr=5e-5)
    ev = evaluate(folder, store, tmp/'gallbladder', labels=(4,), device='cpu')
    t = ev.scores.pivot_table(index='slack', columns='decoder', values='DSC_256', sort=False)
    say(f'btcv2d gallbladder, {run}', f'held-out DSC against box slack, mean over {len(ev.scores)//12} masks:',
        t.round(3).to_string())
    assert len(t)==6
    assert t['fine-tuned'][20]>t['pretrained'][20]

@pytest.fixture(scope='module')
def all_organs(btcv):
    "Tuned on all organs at once: a few hundred masks an epoch, drawn anew for each"
    folder, store, tmp = btcv
    n = len(list_samples(find_npz(folder, 'train')))
    run = finetune(folder, store, tmp/'organs', device='cpu', epochs=2, epoch_samples=400, lr=1e-4, val_fraction=.1)
    ev = evaluate(folder, store, tmp/'organs', slacks=(0,20), device='cpu')
    organs = ev.scores.assign(organ=ev.scores.label.map(BTCV))
    organs = organs.pivot_table(index='organ', columns=['slack', 'decoder'], values='DSC_256', sort=False)
    say(f'btcv2d, {n} masks to train and validate on, {len(ev.scores)//4} held out, {run}',
        *(f'slack {s}: {masks_mean(ev, s).round(3).to_dict()}' for s in (20,0)), organs.round(3).to_string(),
        ev.table().to_string(index=False))
    return ev

@of_btcv
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_btcv_many_organs_gain_with_loose_boxes(all_organs):
    assert masks_mean(all_organs, 20)['fine-tuned']>=.83

@of_btcv
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_btcv_many_organs_lose_next_to_nothing_with_tight_boxes(all_organs):
    tight = masks_mean(all_organs, 0)
    assert tight['fine-tuned']>=tight['pretrained']-.01
