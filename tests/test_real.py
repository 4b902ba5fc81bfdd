"""Real scans, from a raw folder to scores. Marked `real`: they run where ../shared/data (or MEDSAM_NB_REAL_DATA) is,
and skip with a reason elsewhere"""
import numpy as np, pandas as pd, pytest

from medsam_nb.core import InputError, ORGANS
from medsam_nb.curate import curate, find_npz, read_npz, read_split
from medsam_nb.view import Grid, Recipe, normalize
from medsam_nb.embed import EmbeddingStore, embed
from medsam_nb.evaluate import draw_boxes, evaluate, evaluate_case
from medsam_nb.finetune import finetune, list_samples
from medsam_nb.metrics import dsc
from medsam_nb.predict import Predictor, click_rounds, everything, match_regions, oracle_boxes, predict_volume
from medsam_nb.prompt import instances, line_to_box, longest_diameter, mask_to_box, short_diameter
from medsam_nb.sam import load_model
from medsam_nb.volume import check_pair, find_cases, read_volume, write_mask

pytestmark = pytest.mark.real
BTCV = {1:'spleen', 2:'right kidney', 3:'left kidney', 4:'gallbladder', 5:'oesophagus', 6:'liver', 7:'stomach', 8:'aorta', 9:'IVC',
        10:'portal vein', 11:'pancreas', 12:'right adrenal', 13:'left adrenal'}

@pytest.fixture(scope='module')
def lite(): return load_model('lite', device='cpu')

def say(text): print(f'\n{text}', flush=True)

def test_abdomen_ct_gallbladder(real_data, lite, tmp_path):
    "Curate label 9, embed, tight oracle boxes: 3-D DSC of at least 0.88 with the medsam window"
    folder = curate(real_data/'abdomen_ct/images', real_data/'abdomen_ct/labels', out=tmp_path/'npz', label_ids=(9,),
                    window='medsam').folder
    store, case = embed(folder, tmp_path/'emb.zarr', model=lite, device='cpu'), read_npz(find_npz(folder)[0])
    row, = evaluate_case(lite, case, store.open_case(case), draw_boxes(case, slacks=(0,)))
    say(f"abdomen_ct gallbladder, lite, tight oracle boxes, window medsam: 3-D DSC {row['DSC']:.3f}, NSD(1 mm) "
        f"{row['NSD']:.3f}, {row['slices']} slices, {row['missed']} missed by curation; 256 grid DSC "
        f"{row['DSC_256']:.3f}")
    assert row['DSC']>=.88

class Remembering(Predictor):
    "Encodes an image once"
    seen = {}
    def set_image(self, im, *args):
        if (key := im.tobytes()) in self.seen: return self.set_embedding(*self.seen[key])
        super().set_image(im, *args)
        self.seen[key] = self.embedding[0], self.grid, self.image
        return self

def test_abdomen_ct_all_organs(real_data, lite, tmp_path):
    "All twelve organs present, predicted as one label map on the volume, written and read back in the source geometry"
    c, = find_cases(real_data/'abdomen_ct/images', real_data/'abdomen_ct/labels')
    vol, lab = read_volume(c.image), read_volume(c.label, kind='label')
    boxes = oracle_boxes(lab)
    predictor = Remembering(lite)
    mask = predict_volume(predictor, vol, boxes, progress=False)
    ids = sorted(boxes.label.unique())
    table = pd.DataFrame([(i, ORGANS[i], int((lab.array==i).sum()), dsc(mask==i, lab.array==i)) for i in ids],
                         columns=['id', 'organ', 'voxels', 'DSC'])
    by_iou = predict_volume(predictor, vol, boxes, progress=False, overlap='iou')
    table['higher IoU wins'] = [dsc(by_iou==i, lab.array==i) for i in ids]
    say('abdomen_ct, lite, tight oracle boxes, one label map, where masks overlap the smaller wins (DSC), or the one '
        f'with the higher predicted IoU:\n{table.round(3).to_string(index=False)}\nmean {table.DSC.mean():.3f}, '
        f'{table["higher IoU wins"].mean():.3f}')
    assert len(table)==12 and set(table.id)==set(range(1,14))-{10}
    assert table.DSC.mean()>table['higher IoU wins'].mean()+.03   # why it is the rule
    assert table.DSC.mean()>=.78 and table.set_index('organ').DSC['liver']>=.8
    write_mask(mask, vol, tmp_path/'mask.nii.gz')
    back = read_volume(tmp_path/'mask.nii.gz', kind='label')
    check_pair(vol, back)
    assert np.array_equal(back.array, mask)

def ask_all_ways(pred, im, gt, spacing):
    "DSC of every prompt mode on one slice for one organ; everything comes from the ground truth"
    pred.set_image(im)
    box, (line,_) = mask_to_box(gt), longest_diameter(gt, spacing)
    short,_ = short_diameter(gt, line, spacing)
    one = pred.predict(box)
    clicks, carried, boxed = (click_rounds(pred, gt, 10, **kw)
                              for kw in (dict(carry=False), {}, dict(box=box, carry=False)))
    def after(r, n): return dsc(r[min(n, len(r))-1].masks[0], gt)
    return {'box': dsc(one.masks[0], gt), 'box of the long diameter': dsc(pred.predict(line_to_box(line, gt.shape,
        spacing=spacing)).masks[0], gt),
            'box of both diameters': dsc(pred.predict(line_to_box(line, gt.shape, short=short,
                                                                  spacing=spacing)).masks[0], gt),
            **{f'{n} click{"s"*(n>1)}': after(clicks, n) for n in (1,3,5,10)},
            **{f'{n} clicks, last mask shown': after(carried, n) for n in (3,10)},
            **{f'box and {n} click{"s"*(n>1)}': after(boxed, n+1) for n in (1,3)},
            'box and its own mask': dsc(pred.predict(box, mask=one.logits).masks[0], gt),
            'its mask alone': dsc(pred.predict(mask=one.logits).masks[0], gt)}

def regions_and_organs(sam, im, labels, organ):
    """Everything mode on one slice, no region thrown away: DSC of the best for one organ; regions, those that would
    pass the usual thresholds, those that are an organ"""
    found = everything(sam, im, points_per_side=6, pred_iou_thresh=0, stability_score_thresh=0)
    best = match_regions(found, labels).set_index('label').DSC[organ]
    return {'everything, best region': best}, (len(found),
                                               sum(r['predicted_iou']>.88 and r['stability_score']>.95 for r in found),
            sum(any(dsc(r['segmentation'], labels==k)>=.5 for k in np.unique(labels) if k) for r in found))

@pytest.mark.filterwarnings('ignore:lite was trained with boxes only')
def test_abdomen_ct_prompt_modes(real_data, lite):
    """Liver, right kidney, spleen, gallbladder on four slices each, every prompt mode on the same slices; a box beats
    one click on the mean"""
    c, = find_cases(real_data/'abdomen_ct/images', real_data/'abdomen_ct/labels')
    vol, lab = read_volume(c.image), read_volume(c.label, kind='label')
    ims, pred, rows, counts = normalize(vol.array, Recipe()), Predictor(lite), [], []
    for i in (1,2,3,9):
        zs = np.flatnonzero((lab.array==i).sum((1,2))>=30)
        for z in zs[np.linspace(0, len(zs)-1, 4).astype(int)]:
            best, n = regions_and_organs(lite, ims[z], lab.array[z], i)
            rows.append(dict(organ=ORGANS[i]) | ask_all_ways(pred, ims[z], lab.array[z]==i, vol.spacing) | best)
            counts.append(n)
    t = pd.DataFrame(rows).groupby('organ', sort=False).mean().T
    t['mean'] = t.mean(axis=1)
    n, sure, organs = np.sum(counts, 0)
    say(f'abdomen_ct, lite, window medsam, {len(rows)} slices, prompts from the ground truth, mean 2-D '
        f'DSC:\n{t.round(3).to_string()}\n'
        f'everything mode, 36 clicks a slice: {sure} regions at the usual thresholds, {n} without them, {organs} of '
        f'these with a DSC of 0.5 or more for any labelled organ, none with a name')
    assert len(t.columns)==5 and t['mean']['box']>t['mean']['1 click']+.3 and t['mean']['box']>.85
    assert t['mean']['box of both diameters']>.8
    assert (t.loc['box']>t.loc['1 click']).all()
    assert t['mean']['box']>t['mean']['everything, best region']

@pytest.mark.parametrize('name,modality', [('sarcoma_ct', 'CT'), ('spleen_ct', 'CT'), ('sarcoma_mr', 'MR')])
def test_other_scans_go_from_curate_to_predict(real_data, lite, tmp_path, name, modality):
    "CT and MR of other regions, with the same calls; boxes on a few slices keep it short"
    images, labels = real_data/name/'images', real_data/name/'labels'
    res = curate(images, labels, out=tmp_path/'npz', label_ids=(1,), modality=modality, anatomy='x')
    assert not res.failed and res.table.kept.sum()>0
    case = find_cases(images, labels)[0]
    vol, lab = read_volume(case.image), read_volume(case.label, kind='label')
    kept = read_npz(next(f for f in res.files() if f.stem.endswith(case.case))).z
    some = kept[np.linspace(0, len(kept)-1, min(4, len(kept))).astype(int)]
    boxes = oracle_boxes(lab).query('z in @some')
    mask = predict_volume(Predictor(lite), vol, boxes, Recipe(modality=modality, anatomy='x', label_ids=(1,)),
                          progress=False)
    score = dsc(mask[some]==1, lab.array[some]==1)
    say(f'{name} {vol.shape}: {res.table.kept.sum()} slices kept; {case.case}, {len(some)} slices, tight oracle '
        f'boxes: DSC {score:.3f}')
    assert score>.6

@pytest.fixture(scope='module')
def btcv(real_data, lite, tmp_path_factory):
    "BTCV slices of 17 patients, every organ, split by patient, one embedding a slice; shared by the tests below"
    tmp = tmp_path_factory.mktemp('btcv')
    # rows of these PNGs run bottom-up, and a PNG cannot say so
    # seed 0 is the first whose four test patients have gallbladders of 100 px or more (the default seed's have two, of
    # two patients)
    res = curate(real_data/'btcv2d/images', real_data/'btcv2d/labels', out=tmp/'npz', label_ids=tuple(BTCV),
                 modality='CT2D', patient=r'ABD_(\d+)_', flip='ud', test_fraction=.25, seed=0)
    store = embed(res.folder, tmp/'emb.zarr', model=lite, device='cpu')
    return res.folder, tmp/'emb.zarr', tmp

def masks_curve(ev):
    return ev.scores.pivot_table(index='slack', columns='decoder', values='DSC_256', sort=False)

def masks_mean(ev, slack):
    "Mean DSC over masks (not patients), per decoder: the prototype's figure"
    return ev.scores[ev.scores.slack==slack].groupby('decoder', sort=False).DSC_256.mean()

def test_btcv_is_split_by_patient(btcv):
    split = read_split(btcv[0])
    assert len(split)==125 and split.patient.nunique()==17
    split = split[split.kept>0]   # two slices with nothing of 100 px in them belong to no part
    assert len(split)==123 and set(split.part)=={'train', 'test'} and split.groupby('patient').part.nunique().max()==1
    assert split[split.part=='test'].patient.nunique()==4

def test_btcv_pretrained_on_all_organs(btcv, lite):
    """All patients, a tight oracle box round each piece of each organ: mean DSC over masks of at least 0.84 before any
    tuning; one box per organ, and the mean over organs, are said too"""
    folder, store, _ = btcv
    pred, rows = Predictor(lite), []
    for f in find_npz(folder):
        case = read_npz(f)
        emb = EmbeddingStore(store).open_case(case)
        for n, gts in enumerate(case.gts):
            pred.set_embedding(emb[n], Grid(gts.shape))
            for k in np.unique(gts[gts>0]):
                gt = gts==k
                pieces = instances(gt)
                each = dsc(pred.predict(np.stack([mask_to_box(m) for m in pieces])).masks.any(0), gt)
                rows.append((BTCV[case.label_ids[k-1]], len(pieces), each,
                             dsc(pred.predict(mask_to_box(gt)).masks[0], gt) if len(pieces)>1 else each))
    t = pd.DataFrame(rows, columns=['organ','pieces','a box for each piece','one box'])
    by_organ = t.groupby('organ', sort=False)[['pieces','a box for each piece','one box']].mean()
    say(f'btcv2d, lite pretrained, {len(t)} masks of {t.organ.nunique()} organs, tight oracle boxes, 256 grid, mean '
        f'DSC over masks {t["a box for each piece"].mean():.3f} (one box round all pieces: {t["one box"].mean():.3f}), '
        f'mean over the 13 organs {t.groupby("organ")["a box for each piece"].mean().mean():.3f} '
        f'({t.groupby("organ")["one box"].mean().mean():.3f})\n'
        f'{by_organ.round(3).assign(masks=t.organ.value_counts()).to_string()}')
    assert t['a box for each piece'].mean()>=.84 and t['one box'].mean()>=.81 and t.organ.nunique()==13

def test_btcv_gallbladder(btcv):
    "Tuned on gallbladder alone (nine slices): better with loose boxes; the whole curve is printed"
    folder, store, tmp = btcv
    run = finetune(folder, store, tmp/'gallbladder', device='cpu', label_ids=(4,), epochs=20, lr=5e-5)
    ev = evaluate(folder, store, tmp/'gallbladder', label_ids=(4,), device='cpu')
    t = masks_curve(ev)
    say(f'btcv2d gallbladder, {run}\nheld-out DSC against box slack, mean over {len(ev.scores)//12} '
        f'masks:\n{t.round(3).to_string()}')
    assert len(t)==6 and t['fine-tuned'][20]>t['pretrained'][20]

@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_btcv_many_organs(btcv):
    "Tuned on all organs at once: a large gain with slack, next to no loss with tight boxes"
    folder, store, tmp = btcv
    n = len(list_samples(find_npz(folder, 'train')))
    run = finetune(folder, store, tmp/'organs', device='cpu', epochs=6, lr=1e-4, val_fraction=.1)
    ev = evaluate(folder, store, tmp/'organs', slacks=(0,20), device='cpu')
    loose, tight = masks_mean(ev, 20), masks_mean(ev, 0)
    organs = ev.scores.assign(organ=ev.scores.label.map(BTCV)).pivot_table(index='organ', columns=['slack', 'decoder'],
        values='DSC_256', sort=False)
    say(f'btcv2d, {n} masks to train and validate on, {len(ev.scores)//4} held out, {run}\nwith slack '
        f'{loose.round(3).to_dict()}, tight '
        f'{tight.round(3).to_dict()}\n{organs.round(3).to_string()}\n{ev.table().to_string(index=False)}')
    assert loose['fine-tuned']>=.83 and tight['fine-tuned']>=tight['pretrained']-.01
