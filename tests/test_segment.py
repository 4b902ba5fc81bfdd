"Whole volumes: five forms of prompts, every mistake in a file, the source geometry whatever its orientation, scores, and nothing half written"
import json, os, signal, tempfile, time, warnings
from pathlib import Path
from dataclasses import replace
from functools import lru_cache
import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
from hypothesis import example, given, settings, strategies as st
from PIL import Image
from medsam_nb.core import InputError
from medsam_nb.curate import Recipe
from medsam_nb.metrics import dsc, nsd
from medsam_nb.predict import BOX_COLUMNS, Predictor, ask, oracle_boxes, predict_volume
from medsam_nb.prompt import mask_to_box
from medsam_nb.segment import Segmentation, interpolate_boxes, medsam_predict, read_boxes, segment
from medsam_nb.volume import Volume, read_volume, write_mask
from tiny import python, quick, save, scan, tree

ORGANS = ((9,30,34,12),(2,20,62,7))
HEAD = 'z,label,x0,y0,x1,y1\n'

def volume(**kw):
    img, lab = scan(**dict(dict(shape=(5,64,80), organs=ORGANS), **kw))
    return Volume(img, (3,.8,.8), 'a'), Volume(lab, (3,.8,.8), 'a')

def asked(): return Predictor(quick(seed=2))

def put(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding='utf-8'); return path

def drawn(*prompts, shape=(5,64,80), ids=(9,2), **over):
    return dict(format='medsam_nb prompts', version=1, case='a', shape=list(shape), objects=[dict(id=i, name=f'o{i}', colour='#ff9500') for i in ids], prompts=list(prompts))|over

BOX = dict(z=1, label=9, x0=20, y0=18, x1=46, y1=42)


# ---- five forms ----
def rows_of(t): return t[BOX_COLUMNS].to_numpy(float).tolist()

@pytest.mark.parametrize('content, name', [(HEAD+'1,9,20,18,46,42\n', 'b.csv'), ('Label; Z ;X0;y0;x1;Y1\n9;1;20;18;46;42\n', 'b.csv'), ('\ufeffz\tlabel\tx0\ty0\tx1\ty1\tnote\n1\t9\t20\t18\t46\t42\tno idea\n', 'b.txt'),
    (HEAD+'\n1.0, 9, 20, 18, 46, 42,\n,,,,,\n', 'b.csv'), ([BOX], 'b.json'), (dict(boxes=[BOX]), 'b.json'), (dict(boxes=[{k: str(v) for k, v in BOX.items()}]), 'b.csv'), ([dict(BOX, kind='Box', z0=None)], 'b.json'),
    (drawn(dict(z=1, object=9, kind='box', box=[20,18,46,42])), 'b.json')])
def test_a_box_per_slice(tmp_path, content, name):
    t = read_boxes(put(tmp_path/name, content), volume()[0])
    assert rows_of(t) == [[1,9,20,18,46,42]] and t.prompt.tolist() == ['box'] and t.z.dtype.kind == t.label.dtype.kind == 'i'

def test_a_box_with_a_depth(tmp_path):
    t = read_boxes(put(tmp_path/'b.csv', 'z0,z1,label,x0,y0,x1,y1,z\n1,3,9,20,18,46,42,\n4,4,2,1,1,9,9,\n,,3,1,1,9,9,0\n'), volume()[0])
    assert rows_of(t) == [[0,3,1,1,9,9], *([z,9,20,18,46,42] for z in (1,2,3)), [4,2,1,1,9,9]] and t.prompt.tolist() == ['box', *['3-D box']*4]

def test_key_slices(tmp_path):
    f = put(tmp_path/'b.csv', HEAD+'4,9,28,10,48,50\n0,9,20,18,40,42\n2,9,24,30,44,46\n1,2,50,10,60,20\n')
    t = read_boxes(f, volume()[0], interpolate=True)
    assert rows_of(t) == [[0,9,20,18,40,42], [1,2,50,10,60,20], [1,9,22,24,42,44], [2,9,24,30,44,46], [3,9,26,20,46,48], [4,9,28,10,48,50]]
    assert t.prompt.tolist() == ['box','box','interpolated','box','interpolated','box'] and len(read_boxes(f, volume()[0])) == 4

@settings(max_examples=60, deadline=None)
@given(st.data())
def test_interpolated_boxes_lie_between_their_neighbours(data):
    zs = data.draw(st.lists(st.integers(0, 40), min_size=2, max_size=6, unique=True)); n = st.floats(0, 500)
    keys = pd.DataFrame([(z, 3, x, y, x+1+w, y+1+h) for z in zs for x, y, w, h in [data.draw(st.tuples(n, n, n, n))]], columns=BOX_COLUMNS).assign(prompt='box')
    t = interpolate_boxes(keys).sort_values('z', ignore_index=True)
    assert t.z.tolist() == list(range(min(zs), max(zs)+1)) and (t.x1 > t.x0).all() and (t.y1 > t.y0).all()
    k = keys.set_index('z')
    for r in t.itertuples():
        a, b = max(z for z in zs if z <= r.z), min(z for z in zs if z >= r.z); w = 0 if a == b else (r.z-a)/(b-a)
        for c in BOX_COLUMNS[2:]: assert np.isclose(getattr(r, c), (1-w)*k.loc[a, c]+w*k.loc[b, c])

def test_a_diameter(tmp_path):
    v = Volume(volume()[0].array, (3,2,.8), 'a')
    t = read_boxes(put(tmp_path/'b.csv', 'z,label,kind,x0,y0,x1,y1\n2,9,line,46,40,22,20\n3,9,,1,1,9,9\n'), v)
    assert np.allclose(rows_of(t)[0], [2, 9, *ask(dict(kind='line', line=[46,40,22,20]), v.shape[1:], v.spacing)['box']]) and t.prompt.tolist() == ['line','box']
    assert not np.allclose(rows_of(t)[0][2:], ask(dict(kind='line', line=[46,40,22,20]), v.shape[1:])['box'])   # spacing counts

@pytest.mark.filterwarnings('ignore:lite was trained with boxes only')
def test_what_the_drawing_cell_saved(tmp_path):
    draw = pytest.importorskip('medsam_nb.draw')
    v, lab = volume(); s = draw.Session(draw.DrawCase('a', v, lab), {'p': quick(seed=2)}, Recipe())
    s.set_prompt(9, 1, dict(kind='box', box=[20,18,46,42])); s.set_prompt(2, 1, dict(kind='line', line=[56,20,68,21])); s.set_prompt(9, 3, dict(kind='points', points=[[34,30],[5,5]], labels=[1,0]))
    t = read_boxes(s.save_prompts(tmp_path/'p.json'), v)
    assert t[['z','label','prompt']].values.tolist() == [[1,2,'line'], [1,9,'box'], [3,9,'points']] and t.points.iloc[2] == [[34,30],[5,5]] and t.point_labels.iloc[2] == [1,0]
    seg = segment(v, t, lab, asked(), progress=False)
    assert np.array_equal(seg.mask, s.label_map()) and (seg.mask[3] == 9).any()   # the same masks as in the cell
    assert np.allclose(seg.slices.predicted_iou, [s.segment('p', o, z).iou for o, z in ((2,1),(9,1),(9,3))]) and np.isnan(seg.slices.x0[2])
    seg.save(tmp_path/'m.nii.gz'); s.close()

def test_clicks_between_key_slices_stay_clicks(tmp_path):
    f = put(tmp_path/'p.json', drawn(dict(z=0, object=9, kind='box', box=[20,18,40,42]), dict(z=3, object=9, kind='box', box=[26,18,46,42]), dict(z=2, object=9, kind='points', points=[[34,30]], labels=[1])))
    assert read_boxes(f, volume()[0], interpolate=True).prompt.tolist() == ['box','interpolated','points','box']


# ---- mistakes ----
def csv(*rows, head=HEAD): return head+'\n'.join(rows)

BAD = {'no z': (csv('9,1,1,9,9', head='label,x0,y0,x1,y1\n'), r"lacks the columns \['z'\]"), 'z0 alone': (csv('1,9,1,1,9,9', head='z0,label,x0,y0,x1,y1\n'), r"lacks the columns \['z'\]"),
    'no y1': (csv('1,9,1,1,9', head='z,label,x0,y0,x1\n'), r"lacks the columns \['y1'\]"), 'twice': (csv('1,9,1,1,9,9,2', head='z,label,x0,y0,x1,y1,x0\n'), "column 'x0' twice"), 'header only': (HEAD, 'no prompt in it'),
    'empty': ('', "lacks the columns"), 'a word': (csv('1,9,1,1,9,9', '1,9,left,1,9,9'), "row 2: x0 is 'left'; a number"), 'nan': (csv('1,9,nan,1,9,9'), "row 1: x0 is 'nan'; a number"), 'inf': (csv('1,9,1,1,inf,9'), "x1 is 'inf'; a number"),
    'missing': (csv('1,9,1,1,9,9', '2,9,1,,9,9'), 'row 2: y0 is missing'), 'short': (csv('1,9,1,1'), 'row 1: x1 is missing'), 'long': (csv('1,9,1,1,9,9', '2,9,1,5,2,9,9'), 'row 2: it has more fields'),
    'decimal comma': (csv('1,9,1;5,1,9,9'), "x0 is '1;5'"), 'no label': (csv('1,,1,1,9,9'), 'row 1: label is missing'), 'label 0': (csv('1,0,1,1,9,9'), 'row 1: label is 0; it is a whole number from 1 to 65535'), 'label high': (csv('1,65536,1,1,9,9'), 'label is 65536'),
    'label 1.5': (csv('1,1.5,1,1,9,9'), 'label is 1.5'), 'label word': (csv('1,liver,1,1,9,9'), "label is 'liver'"), 'z low': (csv('-1,9,1,1,9,9'), 'row 1: z is -1; the volume has slices 0 to 4'), 'z high': (csv('5,9,1,1,9,9'), 'z is 5; the volume has slices 0 to 4'), 'z 1.5': (csv('1.5,9,1,1,9,9'), 'z is 1.5'),
    'no z value': (csv(',9,1,1,9,9'), 'row 1: z is missing'), 'z1 missing': (csv('1,,9,1,1,9,9', head='z0,z1,label,x0,y0,x1,y1\n'), 'row 1: z1 is missing'), 'z0 above z1': (csv('3,1,9,1,1,9,9', head='z0,z1,label,x0,y0,x1,y1\n'), 'row 1: z0 is 3 and z1 is 1'),
    'z1 high': (csv('3,7,9,1,1,9,9', head='z0,z1,label,x0,y0,x1,y1\n'), 'z1 is 7; the volume has slices 0 to 4'), 'both': (csv('2,1,3,9,1,1,9,9', head='z,z0,z1,label,x0,y0,x1,y1\n'), 'z and z0, z1 are both given'),
    'inverted': (csv('1,9,9,1,1,9'), 'row 1: The box .* is inverted'), 'flat': (csv('1,9,1,5,9,5'), 'row 1: The box .* has no area'), 'outside': (csv('1,9,100,1,110,9'), 'row 1: The box .* covers nothing'), 'above': (csv('1,9,1,-9,9,-1'), 'covers nothing'),
    'kind': (csv('1,9,1,1,9,9,lasso', head=HEAD.strip()+',kind\n'), "row 1: kind is 'lasso'; it has to be box or line"), 'no length': (csv('1,9,5,5,5,5,line', head=HEAD.strip()+',kind\n'), 'row 1: The line .* has no length'), 'line outside': (csv('1,9,500,5,520,5,line', head=HEAD.strip()+',kind\n'), 'row 1: .* covers nothing'),
    'again': (csv('1,9,1,1,9,9', '2,9,1,1,9,9', '1,9,2,2,8,8'), 'row 3: label 9 on slice 1 is asked for in row 1 already'), 'again in 3-D': (csv('0,4,9,1,1,9,9,', ',,9,1,1,9,9,2', head='z0,z1,label,x0,y0,x1,y1,z\n'), 'row 2: label 9 on slice 2 is asked for in row 1'),
    'of medsam_evaluate': (csv('x,0,1,9,0,1,1,9,9', head='case,i,z,label,slack,x0,y0,x1,y1\n'), 'box file of medsam_evaluate.*--labels'),
    'quotes': (HEAD+'1,9,"1,1,9,9\n', 'cannot be read as a table of boxes'),
    'JSON cut off': ('[{"z": 1', 'cannot be read as a table of boxes'), 'JSON word': ('{"rows": []}', "no list of rows"), 'JSON boxes': ('{"boxes": {"z": 1}}', 'no list of rows'), 'JSON empty': ('[]', 'no prompt in it'), 'JSON list': ([[1,9,1,1,9,9]], 'row 1: it is \\[1, 9'), 'JSON true': ([dict(BOX, z=True)], 'row 1: z is True'),
    'JSON list value': ([BOX, dict(BOX, z=2, x0=[1])], r'row 2: x0 is \[1\]'), 'JSON key': ([{k: v for k, v in BOX.items() if k != 'label'}], 'row 1: label is missing'), 'JSON huge': ('[{"z": 1, "label": 1%s, "x0": 1, "y0": 1, "x1": 9, "y1": 9}]' % ('0'*400), 'row 1: label is'), 'JSON nested': ('['*100000, 'cannot be read'),
    'JSON empty row': ([BOX, {}], 'row 2: z is missing'),
    'other format': (drawn(format='x'), 'not prompts of medsam_nb'), 'other shape': (drawn(shape=(5,64,81)), 'drawn on a volume of shape'), 'no prompts': (drawn(), 'no prompt in it'), 'prompt z': (drawn(dict(z=5, object=9, kind='box', box=[1,1,9,9])), 'Prompt 1 belongs to object 9 on slice 5'),
    'prompt object': (drawn(dict(z=1, object=3, kind='box', box=[1,1,9,9])), 'object 3 on slice 1, which is not there'), 'prompt kind': (drawn(dict(z=1, object=9, kind='box', box=[1,1,9,9]), dict(z=2, object=9, kind='lasso')), 'Prompt 2 .*has to be'), 'prompt twice': (drawn(*[dict(z=1, object=9, kind='box', box=[1,1,9,9])]*2), 'Prompt 2 is a second one'),
    'prompt 1.5': (drawn(dict(z=1.5, object=9, kind='box', box=[1,1,9,9])), 'slice 1.5'), 'prompt words': (drawn(dict(z=1, object=9, kind='line', line=['a',1,2,3])), 'Prompt 1'), 'prompt points': (drawn(dict(z=1, object=9, kind='points', points=[[1]], labels=[1])), 'Prompt 1'), 'objects': (drawn(objects=[dict(id=9)]), 'damaged')}

@pytest.mark.parametrize('name', BAD)
def test_mistakes_have_a_name_and_a_number(tmp_path, name):
    content, match = BAD[name]; f = put(tmp_path/'mine.csv', content)
    with pytest.raises(InputError, match=match) as e: read_boxes(f, volume()[0])
    assert str(f) in str(e.value) and len(str(e.value)) < 1000

def test_a_box_that_is_cut_at_the_edge_is_told(tmp_path):
    "The classic sign of another grid; a box that ends on the edge, or a hair beyond, says nothing"
    with pytest.warns(UserWarning, match=r'row 2: the box reaches beyond the image \(width 80, height 64\) and was cut to 40, 30, 80, 64. Is it in the pixels of another grid'):
        t = read_boxes(put(tmp_path/'b.csv', csv('1,9,1,1,9,9', '2,9,40,30,500,500')), volume()[0])
    assert rows_of(t)[1] == [2,9,40,30,80,64]
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        read_boxes(put(tmp_path/'b.csv', csv('1,9,-.5,0,80.4,64', '2,9,5,5,75,60,line', head=HEAD.strip()+',kind\n')), volume()[0])

def test_files_that_are_no_text(tmp_path):
    (tmp_path/'b.csv').write_bytes(bytes(range(256)))
    with pytest.raises(InputError, match='cannot be read as a table of boxes'): read_boxes(tmp_path/'b.csv', volume()[0])
    for p in (tmp_path, tmp_path/'none.csv'):
        with pytest.raises(InputError, match='no box file'): read_boxes(p, volume()[0])
    with pytest.raises(InputError, match='nothing to interpolate'): read_boxes(put(tmp_path/'o.csv', csv('1,9,1,1,9,9','2,2,1,1,9,9')), volume()[0], interpolate=True)

@settings(max_examples=150, deadline=None)
@given(st.one_of(st.text(max_size=80), st.lists(st.lists(st.one_of(st.integers(-9, 99), st.floats(), st.text(max_size=4)), max_size=8), max_size=5).map(lambda r: HEAD+'\n'.join(','.join(map(str, x)) for x in r)),
    st.recursive(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)), lambda c: st.one_of(st.lists(c, max_size=4), st.dictionaries(st.sampled_from([*BOX_COLUMNS,'z0','z1','kind','boxes','format']), c, max_size=9)), max_leaves=20).map(json.dumps)))
def test_any_text_is_a_table_or_a_sentence(text):
    v = Volume(np.zeros((5,64,80), np.int16), (3,.8,.8), 'a')
    with tempfile.TemporaryDirectory() as d:
        p = Path(d)/'x.csv'; p.write_text(text, encoding='utf-8', newline='')
        try: t = read_boxes(p, v)
        except InputError: return
    assert len(t) and t.z.between(0, 4).all() and t.label.between(1, 65535).all() and (t.x1 > t.x0).all() and not t.duplicated(['z','label']).any()


# ---- answers ----
def test_the_answer_is_that_of_predict_volume_and_flips_are_undone():
    seg = answer(); assert np.array_equal(seg.mask, predict_volume(asked(), seg.volume, oracle_boxes(seg.label), progress=False)) and set(np.unique(seg.mask)) == {0,2,9} and seg.mask.dtype == np.uint8
    v, lab = volume(shape=(1,64,80)); t = oracle_boxes(lab)
    rows = pd.DataFrame([dict(z=0, label=2, x0=np.nan, y0=np.nan, x1=np.nan, y1=np.nan, points=[[62.,20.],[30.,3.]], point_labels=[1,0]), dict(zip(BOX_COLUMNS, t.iloc[1]))])   # a click and a box
    upright = segment(v, rows, None, asked(), progress=False); assert set(np.unique(upright.mask)) == {0,2,9} and upright.scores is None
    for flip in ('ud','lr','udlr'):
        ud, lr, r = 'ud' in flip, 'lr' in flip, rows.copy()
        if lr: r['x0'], r['x1'] = 80-rows.x1, 80-rows.x0
        if ud: r['y0'], r['y1'] = 64-rows.y1, 64-rows.y0
        r['points'] = [[[80-x if lr else x, 64-y if ud else y] for x, y in rows.points[0]], None]
        over = (slice(None), slice(None, None, -1 if ud else 1), slice(None, None, -1 if lr else 1))
        assert np.array_equal(segment(Volume(v.array[over], v.spacing), r, None, asked(), Recipe(flip=flip), progress=False).mask[over], upright.mask)   # a decoder of flipped slices sees what it learned

def test_scores_are_those_of_the_whole_volume():
    img, lab = scan(shape=(6,64,80), organs=ORGANS, zs=(1,2,4)); lab[4][lab[4]==2] = 0; lab[5, 3:6, 3:6] = 2   # empty slices for both labels, and one for one of them
    v, truth = Volume(img, (3,.8,1.1), 'a'), Volume(lab, (3,.8,1.1), 'a')
    boxes = pd.DataFrame([(1,9,20,18,46,42), (0,9,20,18,46,42), (1,2,54,12,70,28), (3,7,3,3,30,30)], columns=BOX_COLUMNS)
    seg = segment(v, boxes, truth, asked(), tolerance=2.5, progress=False)
    s = seg.scores.set_index('label')
    assert s.index.tolist() == [2,7,9] and s.missed.to_dict() == {2:2, 7:0, 9:2} and s.slices.to_dict() == {2:1, 7:1, 9:2} and set(s.prompts) == {'prompts'} and set(s.unit) == {'mm'}
    for l in (2,7,9):
        p, t = seg.mask == l, lab == l
        assert s.DSC[l] == 2*(p&t).sum()/(p.sum()+t.sum()) and s.NSD[l] == nsd(p, t, (3,.8,1.1), 2.5) and s.voxels[l] == p.sum() and s.true_voxels[l] == t.sum()
    assert s.DSC[7] == 0 and s.NSD[9] != nsd(seg.mask == 9, lab == 9, (3,.8,1.1), 1.) and s.DSC[9] < dsc((seg.mask == 9)[[1]], (lab == 9)[[1]])
    rows = seg.slices.set_index(['z','label'])
    assert rows.DSC[1,9] == dsc(seg.mask[1] == 9, lab[1] == 9) and rows.DSC[3,7] == 0 and rows.pixels[0,9] == (seg.mask[0] == 9).sum() and np.isclose(rows.area_mm2[1,2], (seg.mask[1] == 2).sum()*.88)
    assert (seg.slices.predicted_iou != 0).all() and list(seg.slices) == ['z','label','x0','y0','x1','y1','prompt','pixels','area_mm2','predicted_iou','DSC']
    one = segment(Volume(img[1:2], (3,.8,1.1)), boxes.iloc[:1].assign(z=0), Volume(lab[1:2], (3,.8,1.1)), asked(), progress=False)
    assert one.scores.NSD[0] == nsd(one.mask[0] == 9, lab[1] == 9, (.8,1.1), 1.)   # one slice has no surface across it

def test_oracle_is_said_wherever_there_is_a_number(tmp_path):
    seg = answer()
    assert set(seg.scores.prompts) == {'oracle boxes'} and set(seg.slices.prompt) == {'oracle box'} and 'oracle boxes' in repr(seg)
    again = read_boxes(seg.save(tmp_path/'m.nrrd')['slices'], seg.volume)
    assert replace(seg, prompts=again).what == 'oracle boxes'   # also when the table comes back
    assert 'among them' in replace(seg, prompts=again.assign(prompt=['box', *again.prompt[1:]])).what
    assert segment(seg.volume, oracle_boxes(seg.label), None, asked(), label_ids=[2], progress=False).what == 'prompts'

@pytest.mark.parametrize('kw, match', [(dict(boxes=None, label=None), 'Give boxes, or labels'), (dict(tolerance=-1), 'tolerance is -1'), (dict(tolerance=np.nan), 'tolerance'), (dict(label_ids=[4]), r'No box is of the labels \[4\]'), (dict(boxes=pd.DataFrame({'z':[1]})), 'lack the columns'),
    (dict(boxes=pd.DataFrame(columns=BOX_COLUMNS)), 'empty'), (dict(label='small'), 'size'), (dict(boxes=None, label_ids=[4]), r'none of the ids \[4\]')])
def test_nonsense_in_python(kw, match):
    v, lab = volume(shape=(2,64,80)); kw = dict(boxes=oracle_boxes(lab), label=lab)|kw
    if isinstance(kw['label'], str): kw['label'] = Volume(lab.array[:,:,:50], lab.spacing)
    with pytest.raises(InputError, match=match): segment(v, predictor=asked(), progress=False, **kw)


# ---- the picture ----
def test_the_picture_shows_every_label_on_at_most_twelve_slices():
    v, lab = volume(shape=(30,64,80)); t = oracle_boxes(lab).assign(prompt='box'); mask = np.where(lab.array == 9, 9, 0).astype(np.uint8)
    t = t[(t.label == 9)|(t.z > 26)]
    fig = Segmentation(v, mask, t, t, label=lab).show()
    zs = [int(a.get_title().split()[1]) for a in fig.axes]
    assert 6 <= len(zs) <= 12 and zs == sorted(set(zs)) and max(zs) > 26 and min(zs) < 5
    assert all(len(a.patches) == (t.z == z).sum() for a, z in zip(fig.axes, zs)) and all(len(a.collections) == len(np.unique(lab.array[z]))-1 > 0 for a, z in zip(fig.axes, zs))
    assert len(Segmentation(v, mask, t, t).show(3).axes) <= 3
    few = t[t.z == 3]; ax = Segmentation(v, mask*0, few, few).show().axes[0]; a = ax.images[0].get_array()
    full = v.array[3]; x0, y0, x1, y1 = few.iloc[0][BOX_COLUMNS[2:]].astype(float); (x, y), w, h = ax.patches[0].get_xy(), ax.patches[0].get_width(), ax.patches[0].get_height()
    assert (w, h) == (x1-x0, y1-y0) and a.shape[0] < 64 and a.shape[1] < 80
    bright = np.clip((full[int(y0):int(y1), int(x0):int(x1)]+500)/1500*255, 0, 255); shown = a[round(y+.5):round(y+.5+h), round(x+.5):round(x+.5+w)]
    assert np.abs(bright-shown).max() <= 1   # the box lies on the same pixels as in the scan


# ---- geometry ----
def rotation(*angles):
    t = sitk.Euler3DTransform(); t.SetRotation(*angles); return np.reshape(t.GetMatrix(), (3,3))

def world(path, value):
    "Millimetre positions of the voxels of a label, sorted"
    im = sitk.ReadImage(str(path)); idx = np.argwhere(sitk.GetArrayFromImage(im) == value)[:,::-1]
    p = np.array(im.GetOrigin())+(idx*np.array(im.GetSpacing()))@np.reshape(im.GetDirection(), (3,3)).T
    return p[np.lexsort(np.round(p, 2).T)]

@settings(max_examples=14, deadline=None)
@example(order=[2,0,1], flips=(True,False,True), spacing=(.5,5.,.6), angles=(.1,0.,-.2), ext='.nii.gz')   # cut coronal
@given(order=st.permutations(range(3)), flips=st.tuples(*[st.booleans()]*3), spacing=st.tuples(*[st.sampled_from([.5,.6,.7])]*2, st.sampled_from([.3,.6,1.2,5.])), angles=st.tuples(*[st.floats(-.3, .3)]*3), ext=st.sampled_from(['.nii.gz','.nii','.nrrd','.mha']))
def test_a_scan_stored_another_way_gets_the_same_mask(tmp_path_factory, order, flips, spacing, angles, ext):
    d, (img, lab), turn, masks = tmp_path_factory.mktemp('turn'), scan(seed=3, shape=(2,20,24), organs=((9,9,8,5),(2,12,17,4))), rotation(*angles), []
    lab[1][lab[1]==2] = 0   # the slices differ
    for name, (o, f) in dict(plain=((0,1,2), (0,0,0)), turned=(order, flips)).items():   # stored axis k is axis o[k] of the room, backwards where f[k]
        n, s = np.array(img.shape[::-1]), np.array(spacing)
        first = np.zeros(3); first[list(o)] = np.where(f, n[list(o)]-1, 0)
        kw = dict(spacing=s[list(o)].tolist(), origin=(np.array([-12.5,30.25,7])+turn@(s*first)).tolist(), direction=(turn[:,list(o)]*np.where(f, -1, 1)).ravel().tolist())
        for k, a in dict(i=img, l=lab).items(): save(d/f'{name}_{k}{ext}', np.ascontiguousarray(np.flip(a.T.transpose(o), np.flatnonzero(f)).T), **kw)
        v, l = read_volume(d/f'{name}_i{ext}'), read_volume(d/f'{name}_l{ext}', kind='label')
        seg = segment(v, None, l, asked(), progress=False)
        write_mask(seg.mask, v, d/f'{name}_m{ext}')
        a, b = (sitk.ReadImage(str(d/f'{name}_{k}{ext}')) for k in 'im')
        for get in ('GetSize','GetSpacing','GetOrigin','GetDirection'): assert getattr(a, get)() == getattr(b, get)() if ext.startswith('.nii') else np.allclose(getattr(a, get)(), getattr(b, get)(), rtol=0, atol=1e-12), get   # NRRD keeps spacing and direction as one product
        masks.append((seg.mask, sitk.GetArrayFromImage(b)))
    (shown, stored), (shown2, stored2) = masks
    assert np.array_equal(shown, shown2) and shown.any()                                                       # the same slices, the same answers
    assert np.array_equal(stored2, np.flip(stored.T.transpose(order), np.flatnonzero(flips)).T)                # each at its voxel
    for value in (2,9): assert np.allclose(world(d/f'plain_m{ext}', value), world(d/f'turned_m{ext}', value), atol=2e-2)   # and at its place in the room

def dice(a, b): return 2*(a&b).sum()/(a.sum()+b.sum())

def test_the_mask_lies_on_the_organ(tmp_path):
    direction = rotation(.1,-.15,.2)@np.diag([-1,-1,1])
    img,lab = scan(shape=(2,96,120), organs=((9,40,70,18),))
    img[1],lab[1] = (a[0] for a in scan(seed=1, shape=(1,96,120), organs=((9,60,35,13),)))   # the second slice differs: no symmetry
    kw = dict(spacing=(.8,.9,3.), origin=(-12.5,30.25,7), direction=np.asarray(direction, float).ravel().tolist())
    save(tmp_path/'i.nii.gz', img, **kw); save(tmp_path/'l.nii.gz', lab, **kw)
    medsam_predict(str(tmp_path/'i.nii.gz'), str(tmp_path/'m.nii.gz'), labels=str(tmp_path/'l.nii.gz'), label_id='9', device='cpu')
    a, b = sitk.ReadImage(str(tmp_path/'i.nii.gz')), sitk.ReadImage(str(tmp_path/'m.nii.gz'))
    for get in ('GetSize','GetSpacing','GetOrigin','GetDirection'): assert getattr(a, get)()==getattr(b, get)(), get
    out = sitk.GetArrayFromImage(b)
    assert set(np.unique(out))=={0,9} and dice(out==9, lab==9) > .8
    for flip in (out[::-1], out[:,::-1], out[:,:,::-1]): assert dice(flip==9, lab==9) < dice(out==9, lab==9)-.1


# ---- files ----
FILES = {'m.nii.gz','m_slices.csv','m_qc.png','m_scores.csv'}

@lru_cache
def answer():
    v, lab = volume(shape=(2,64,80)); return segment(v, None, lab, asked(), progress=False)

def test_what_is_written(tmp_path):
    seg = answer(); paths = seg.save(tmp_path/'deep'/'er'/'m.nii.gz'); d = tmp_path/'deep'/'er'
    assert {p.name for p in d.iterdir()} == FILES == {p.name for p in paths.values()}
    assert np.array_equal(read_volume(paths['mask'], kind='label').array, seg.mask)
    pd.testing.assert_frame_equal(pd.read_csv(paths['slices']), seg.slices, check_dtype=False, rtol=1e-4); pd.testing.assert_frame_equal(pd.read_csv(paths['scores']), seg.scores, check_dtype=False, rtol=1e-4)
    assert np.asarray(Image.open(paths['qc'])).std() > 10

@pytest.mark.parametrize('there', sorted(FILES))
def test_nothing_is_replaced_unasked(tmp_path, there):
    (tmp_path/there).write_text('mine'); before = tree(tmp_path); seg = answer()
    with pytest.raises(InputError, match=f'{there} exists already'): seg.save(tmp_path/'m.nii.gz')
    with pytest.raises(InputError, match=f'{there} exists already'): medsam_predict('nowhere.nii.gz', str(tmp_path/'m.nii.gz'), labels='x')   # before anything is read
    assert tree(tmp_path) == before
    seg.save(tmp_path/'m.nii.gz', overwrite=True)
    assert {p.name for p in tmp_path.iterdir()} == FILES and tree(tmp_path)[there] != b'mine'
    replace(seg, label=None, scores=None).save(tmp_path/'m.nii.gz', overwrite=True)
    assert {p.name for p in tmp_path.iterdir()} == FILES-{'m_scores.csv'}   # scores of an older mask do not stay beside a new one

@pytest.mark.parametrize('n', range(4))
@pytest.mark.parametrize('old', [False, True])
def test_interrupted_renames_leave_no_mask(tmp_path, monkeypatch, n, old):
    seg = answer(); real, calls = os.replace, []
    if old: seg.save(tmp_path/'m.nii.gz')
    def replace(a, b):
        if os.path.dirname(b) == str(tmp_path):   # one of ours, not one inside the hidden folder
            if len(calls) == n: raise KeyboardInterrupt
            calls.append(b)
        return real(a, b)
    monkeypatch.setattr(os, 'replace', replace)
    with pytest.raises(KeyboardInterrupt): seg.save(tmp_path/'m.nii.gz', overwrite=old)
    assert 'm.nii.gz' not in tree(tmp_path) and not [p for p in tmp_path.iterdir() if p.name.startswith('.')]

def test_a_failure_while_writing_changes_nothing(tmp_path):
    seg = answer(); seg.save(tmp_path/'m.nii.gz'); before = tree(tmp_path)
    with pytest.raises(InputError): replace(seg, mask=seg.mask.astype(float)+.5).save(tmp_path/'m.nii.gz', overwrite=True)
    assert tree(tmp_path) == before

KILLED = """
import sys, numpy as np, pandas as pd
from tiny import quick, scan
from medsam_nb.predict import Predictor
from medsam_nb.segment import segment
from medsam_nb.volume import Volume
img, lab = scan(shape=(3,64,80)); out = sys.argv[1]
seg = segment(Volume(img, (3,1,1)), None, Volume(lab, (3,1,1)), Predictor(quick(seed=2)), progress=False)
print('ready', flush=True)
seg.save(out)
"""
@pytest.mark.parametrize('wait', [0, .2])
def test_killed_while_writing(tmp_path, wait):
    "Wherever the kill falls: there is no mask, or all four files are there and whole"
    p = python(KILLED, tmp_path/'m.nii.gz', wait=False, threads=1)
    assert p.stdout.readline().strip() == 'ready', p.stderr.read()
    until = time.time()+60
    while not any(tmp_path.iterdir()) and p.poll() is None and time.time() < until: time.sleep(.002)
    time.sleep(wait); p.send_signal(signal.SIGKILL); p.wait(); p.stdout.close(); p.stderr.close()
    found = {q.name for q in tmp_path.iterdir() if not q.name.startswith('.')}
    assert found == FILES if 'm.nii.gz' in found else found < FILES
    if found == FILES: assert read_volume(tmp_path/'m.nii.gz', kind='label').array.any() and len(pd.read_csv(tmp_path/'m_scores.csv'))
    else: answer().save(tmp_path/'m.nii.gz', overwrite=True); assert FILES <= {q.name for q in tmp_path.iterdir()}


# ---- the command ----
def test_command_reads_boxes_and_never_overwrites(tmp_path, capsys):
    img,lab = scan(shape=(2,64,80)); save(tmp_path/'i.nii.gz', img); save(tmp_path/'l.nii.gz', lab)
    args = dict(image=str(tmp_path/'i.nii.gz'), device='cpu')
    medsam_predict(out=str(tmp_path/'m.nrrd'), labels=str(tmp_path/'l.nii.gz'), **args)
    said = capsys.readouterr().out
    assert '2 oracle boxes' in said and 'over the whole volume, oracle boxes' in said and 'm_scores.csv' in said
    assert pd.read_csv(tmp_path/'m_scores.csv').DSC[0] > .8
    oracle_boxes(read_volume(tmp_path/'l.nii.gz', kind='label')).iloc[[0]].to_csv(tmp_path/'b.csv', index=False)
    before = tree(tmp_path)
    with pytest.raises(InputError, match='m_slices.csv exists already|m.nrrd exists already'): medsam_predict(out=str(tmp_path/'m.nrrd'), boxes=str(tmp_path/'b.csv'), **args)
    for kw in (dict(boxes=str(tmp_path/'b.csv'), out=str(tmp_path/'i.nii.gz')), dict(boxes=str(tmp_path/'m_slices.csv'), out=str(tmp_path/'m.nrrd')), dict(labels=str(tmp_path/'l.nii.gz'), out=str(tmp_path/'l.nii.gz'))):
        with pytest.raises(InputError, match='is an input'): medsam_predict(overwrite=True, **kw, **args)
    assert tree(tmp_path)==before
    medsam_predict(out=str(tmp_path/'m.nrrd'), boxes=str(tmp_path/'b.csv'), labels=str(tmp_path/'l.nii.gz'), tolerance=2., overwrite=True, **args)
    out = capsys.readouterr().out
    assert '1 prompt,' in out and 'oracle' not in out and pd.read_csv(tmp_path/'m_scores.csv')[['missed','tolerance']].values.tolist() == [[1,2]]
    assert not read_volume(tmp_path/'m.nrrd', kind='label').array[1].any() and tree(tmp_path).keys()==before.keys()

@pytest.mark.parametrize('change, match', [(dict(), 'Give boxes .* or labels'), (dict(boxes='none.csv'), 'no box file at none.csv'), (dict(labels='L', label_id='liver'), "label_ids 'liver'"), (dict(labels='L', interpolate=True), 'interpolate needs boxes'), (dict(labels='L', flip='up'), "flip"), (dict(labels='L', fit='crop'), 'fit'),
    (dict(labels='L', label_id='4'), r'none of the ids \[4\]'), (dict(labels='L', out='m.jpg'), 'cannot be written as m.jpg'), (dict(labels='L', out='mask'), 'cannot be written as mask'), (dict(labels='L', out='m.png'), 'cannot be written as m.png'), (dict(labels='L', out='L.nii.gz/m.nii.gz'), 'Nothing can be written'), (dict(boxes='EMPTY'), 'lacks the columns'),
    (dict(boxes='BINARY'), 'cannot be read as a table'), (dict(boxes='OTHER'), r"lacks the columns \['label'"), (dict(labels='L', window='bone'), "window 'bone'"), (dict(labels='L', window='1,b'), "window '1,b'"), (dict(labels='L', model='vit_x'), 'no model called'), (dict(labels='SMALL'), 'size'), (dict(labels='L', tolerance=-1.), 'tolerance'),
    (dict(boxes='ROW'), r'ROW.csv: row 2: z is 2; the volume has slices 0 to 1'), (dict(boxes='ROW', labels='none.nii.gz'), 'does not exist')])
def test_command_refuses_and_writes_nothing(tmp_path, change, match):
    img,lab = scan(shape=(2,64,80)); save(tmp_path/'i.nii.gz', img); save(tmp_path/'L.nii.gz', lab); save(tmp_path/'SMALL.nii.gz', lab[:,:50])
    (tmp_path/'EMPTY.csv').write_text(''); (tmp_path/'BINARY.csv').write_bytes(bytes(range(256))); (tmp_path/'OTHER.csv').write_text('a,b\n1,2\n'); (tmp_path/'ROW.csv').write_text(HEAD+'1,9,1,1,9,9\n2,9,1,1,9,9\n')
    before = tree(tmp_path); kw = dict(image=str(tmp_path/'i.nii.gz'), out='m.nii.gz', device='cpu')|change
    kw['out'] = str(tmp_path/kw['out'])
    for k,ext in (('labels','.nii.gz'),('boxes','.csv')):
        if kw.get(k, '').isupper(): kw[k] = str(tmp_path/(kw[k]+ext))
    with pytest.raises(InputError, match=match): medsam_predict(**kw)
    assert tree(tmp_path)==before

def test_a_picture_in_a_picture_out(tmp_path, capsys):
    y,x = np.mgrid[:90,:140]+.5; gt = ((y-40)/20)**2+((x-90)/25)**2 < 1
    rgb = np.stack([np.clip(np.random.default_rng(s).normal(70, 8, gt.shape)+90*gt, 0, 255) for s in range(3)], -1).astype(np.uint8)
    Image.fromarray(rgb).save(tmp_path/'bild.v2.png'); Image.fromarray(gt.astype(np.uint8)).save(tmp_path/'gt.png')
    with pytest.raises(InputError, match='8-bit.*modality Photo'): medsam_predict(str(tmp_path/'bild.v2.png'), str(tmp_path/'out.png'), labels=str(tmp_path/'gt.png'), device='cpu')
    put(tmp_path/'b.csv', [dict(zip(BOX_COLUMNS, (0, 1, *map(float, mask_to_box(gt)))))])
    medsam_predict(str(tmp_path/'bild.v2.png'), str(tmp_path/'out.png'), boxes=str(tmp_path/'b.csv'), labels=str(tmp_path/'gt.png'), modality='Photo', device='cpu')
    out = np.asarray(Image.open(tmp_path/'out.png')); s = pd.read_csv(tmp_path/'out_scores.csv').iloc[0]
    assert out.shape==gt.shape and set(np.unique(out))=={0,1} and dice(out==1, gt) > .9
    assert s.unit == 'px' and np.isclose(s.DSC, dice(out==1, gt), atol=1e-5) and np.isclose(s.NSD, nsd(out==1, gt, (1,1)), atol=1e-5) and pd.read_csv(tmp_path/'out_slices.csv').area_mm2.isna().all()

def test_help_says_what_it_takes():
    code = "import sys; sys.argv = ['medsam_predict', *sys.argv[1:]]\nfrom medsam_nb.segment import medsam_predict\nmedsam_predict()"
    said = python(code, '--help'); assert all(o in said for o in ('--boxes','--interpolate','--tolerance','--fit','--flip')) and 'the smaller one wins' in ' '.join(said.split())
