"Whole volumes: prompts of many forms, every mistake in a file, any orientation, scores, and nothing half written"
import json, os, signal, tempfile, time, warnings
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
import numpy as np, pandas as pd, pytest
import SimpleITK as sitk
from hypothesis import example, given, settings, strategies as st
from PIL import Image
from medsam_nb.core import InputError
from medsam_nb.metrics import dsc, nsd
from medsam_nb.predict import Predictor, oracle_boxes, predict_volume
from medsam_nb.prompt import BOX_COLUMNS, Ask, Box, Line, Outline, Points, asks_of, line_to_box, mask_to_box, table_of
from medsam_nb.segment import Segmentation, interpolate_boxes, medsam_predict, read_boxes, segment
from medsam_nb.view import Recipe, View
from medsam_nb.volume import Volume, read_volume, write_mask
from tiny import python, quick, save, scan, tree

ORGANS = ((9,30,34,12),(2,20,62,7))
HEAD = 'z,label,x0,y0,x1,y1\n'
SIDES = BOX_COLUMNS[2:]
BOXES_ONLY = 'ignore:lite was trained with boxes only'

def volume(**kwargs):
    img,lab = scan(**dict(dict(shape=(5,64,80), organs=ORGANS), **kwargs))
    return Volume(img, (3,.8,.8), 'a'),Volume(lab, (3,.8,.8), 'a')

def asked(): return Predictor(quick(seed=2))

def answer_to(boxes, label=None, on=None, recipe=None, **kwargs):
    return segment(on or volume()[0], boxes, label, asked(), recipe, progress=False, **kwargs)

def put(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding='utf-8')
    return path

def drawn(*prompts, shape=(5,64,80), ids=(9,2), **over):
    objects = [dict(id=i, name=f'o{i}', colour='#ff9500') for i in ids]
    kept = dict(format='medsam_nb prompts', version=1, case='a', shape=list(shape))
    return kept|dict(objects=objects, prompts=list(prompts))|over

BOX = dict(z=1, label=9, x0=20, y0=18, x1=46, y1=42)

def table(asks, shape=(64,80), spacing=(1,1)): return table_of(asks, shape, spacing)

def rows_of(asks, **kwargs): return table(asks, **kwargs)[BOX_COLUMNS].to_numpy(float).tolist()

def said(asks): return [a.said for a in asks]


# ---- many forms ----
@pytest.mark.parametrize('content, name', [
    (HEAD+'1,9,20,18,46,42\n', 'b.csv'),
    ('Label; Z ;X0;y0;x1;Y1\n9;1;20;18;46;42\n', 'b.csv'),
    ('\ufeffz\tlabel\tx0\ty0\tx1\ty1\tnote\n1\t9\t20\t18\t46\t42\tno idea\n', 'b.txt'),
    (HEAD+'\n1.0, 9, 20, 18, 46, 42,\n,,,,,\n', 'b.csv'),
    ([BOX], 'b.json'),
    (dict(boxes=[BOX]), 'b.json'),
    (dict(boxes=[{k:str(v) for k,v in BOX.items()}]), 'b.csv'),
    ([dict(BOX, kind='Box', z0=None)], 'b.json'),
    (drawn(dict(z=1, object=9, kind='box', box=[20,18,46,42])), 'b.json')])
def test_a_box_per_slice(tmp_path, content, name):
    assert read_boxes(put(tmp_path/name, content), volume()[0])==[Ask(1, 9, Box((20.,18.,46.,42.)))]

def test_a_box_with_a_depth(tmp_path):
    text = 'z0,z1,label,x0,y0,x1,y1,z\n1,3,9,20,18,46,42,\n4,4,2,1,1,9,9,\n,,3,1,1,9,9,0\n'
    asks = read_boxes(put(tmp_path/'b.csv', text), volume()[0])
    assert rows_of(asks)==[[0,3,1,1,9,9], *([z,9,20,18,46,42] for z in (1,2,3)), [4,2,1,1,9,9]]
    assert said(asks)==['box',*['3-D box']*4]

KEYS = HEAD+'4,9,28,10,48,50\n0,9,20,18,40,42\n2,9,24,30,44,46\n1,2,50,10,60,20\n'

def test_boxes_on_key_slices_are_filled_in(tmp_path):
    asks = read_boxes(put(tmp_path/'b.csv', KEYS), volume()[0], interpolate=True)
    assert rows_of(asks)==[[0,9,20,18,40,42], [1,2,50,10,60,20], [1,9,22,24,42,44],
                           [2,9,24,30,44,46], [3,9,26,20,46,48], [4,9,28,10,48,50]]
    assert said(asks)==['box','box','interpolated','box','interpolated','box']

def test_boxes_on_key_slices_stay_alone_unasked(tmp_path):
    assert len(read_boxes(put(tmp_path/'b.csv', KEYS), volume()[0]))==4

SIDE = st.floats(0, 500)

@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.integers(0, 40), st.tuples(SIDE, SIDE, SIDE, SIDE), min_size=2, max_size=6))
def test_interpolated_boxes_lie_between_their_neighbours(drawn):
    keys = {z:(x,y,x+1+w,y+1+h) for z,(x,y,w,h) in drawn.items()}
    asks = interpolate_boxes([Ask(z, 3, Box(b)) for z,b in keys.items()], (2000,2000))
    assert sorted(a.z for a in asks)==list(range(min(keys), max(keys)+1))
    for ask in asks:
        a,b = max(z for z in keys if z<=ask.z),min(z for z in keys if z>=ask.z)
        w = 0 if a==b else (ask.z-a)/(b-a)
        assert np.allclose(ask.prompt.box, (1-w)*np.array(keys[a])+w*np.array(keys[b]), atol=1e-3)

def test_a_table_of_boxes_can_be_filled_in():
    t = pd.DataFrame([(0,9,1,1,9,9), (2,9,3,3,9,9)], columns=BOX_COLUMNS)
    new = [a for a in interpolate_boxes(t, (64,80)) if a.origin=='interpolated']
    assert new==[Ask(1, 9, Box((2.,2.,9.,9.)), 'interpolated')]

def test_a_diameter_is_asked_as_its_box_in_millimetres(tmp_path):
    v = Volume(volume()[0].array, (3,2,.8), 'a')
    asks = read_boxes(put(tmp_path/'b.csv', 'z,label,kind,x0,y0,x1,y1\n2,9,line,46,40,22,20\n3,9,,1,1,9,9\n'), v)
    assert asks[0].prompt==Line((46.,40.,22.,20.)) and said(asks)==['line','box']
    got = rows_of(asks, spacing=v.spacing)[0]
    assert np.allclose(got, [2, 9, *line_to_box([46,40,22,20], (64,80), spacing=v.spacing)])
    assert not np.allclose(got[2:], line_to_box([46,40,22,20], (64,80))) # spacing counts

def test_a_diameter_may_be_a_key_slice(tmp_path):
    text = 'z,label,kind,x0,y0,x1,y1\n0,9,line,46,40,22,20\n2,9,,1,1,9,9\n'
    asks = read_boxes(put(tmp_path/'b.csv', text), volume()[0], interpolate=True)
    t = table(asks)
    assert said(asks)==['line','interpolated','box']
    assert np.allclose(t.loc[1, SIDES].astype(float), (t.loc[0, SIDES]+t.loc[2, SIDES]).astype(float)/2)

JSON_KINDS = [
    (dict(kind='points', points=[[30,30],[5,5]], labels=[1,0]), Points(((30.,30.),(5.,5.)), (1,0))),
    (dict(BOX, kind='line'), Line((20.,18.,46.,42.))),
    (dict(kind='outline', outline=[[20,18],[46,18],[33,42]]), Outline(((20.,18.),(46.,18.),(33.,42.))))]

@pytest.mark.parametrize('row, prompt', JSON_KINDS)
def test_rows_of_json_name_any_kind(tmp_path, row, prompt):
    asks = read_boxes(put(tmp_path/'b.json', [dict(row, z=2, label=9)]), volume()[0])
    assert asks==[Ask(2, 9, prompt)]

@pytest.mark.filterwarnings(BOXES_ONLY)
@pytest.mark.parametrize('row, prompt', JSON_KINDS)
def test_each_kind_gets_the_mask_that_a_predictor_gives(row, prompt):
    v = volume()[0]
    seg = answer_to([Ask(2, 9, prompt)], None, v)
    one = asked().set_view(View(v, Recipe()), 2).ask([prompt], v.spacing)
    assert np.array_equal(seg.mask[2]==9, one.masks[0]) and not seg.mask[[0,1,3,4]].any()
    assert seg.show() is not None

@pytest.fixture
def session():
    "A drawing with a box, a diameter and clicks"
    draw = pytest.importorskip('medsam_nb.draw')
    v,lab = volume()
    s = draw.Session(draw.DrawCase('a', v, lab), {'p': quick(seed=2)}, Recipe())
    s.set_prompt(9, 1, dict(kind='box', box=[20,18,46,42]))
    s.set_prompt(2, 1, dict(kind='line', line=[56,20,68,21]))
    s.set_prompt(9, 3, dict(kind='points', points=[[34,30],[5,5]], labels=[1,0]))
    yield s,v,lab
    s.close()

def test_what_the_drawing_cell_saved_is_read(tmp_path, session):
    s,v,_ = session
    asks = read_boxes(s.save_prompts(tmp_path/'p.json'), v)
    assert [(a.z, a.label, a.said) for a in asks]==[(1,2,'line'), (1,9,'box'), (3,9,'points')]
    assert asks[2].prompt==Points(((34.,30.),(5.,5.)), (1,0))

@pytest.mark.filterwarnings(BOXES_ONLY)
def test_what_was_drawn_gets_the_masks_it_got_in_the_cell(tmp_path, session):
    s,v,lab = session
    seg = answer_to(read_boxes(s.save_prompts(tmp_path/'p.json'), v), lab, v)
    assert np.array_equal(seg.mask, s.label_map()) and (seg.mask[3]==9).any()
    assert np.allclose(seg.slices.predicted_iou, [s.segment('p', o, z).iou for o,z in ((2,1),(9,1),(9,3))])
    assert np.isnan(seg.slices.x0[2])
    seg.save(tmp_path/'m.nii.gz')

def test_clicks_between_key_slices_stay_clicks(tmp_path):
    f = put(tmp_path/'p.json', drawn(dict(z=0, object=9, kind='box', box=[20,18,40,42]),
                                     dict(z=3, object=9, kind='box', box=[26,18,46,42]),
                                     dict(z=2, object=9, kind='points', points=[[34,30]], labels=[1])))
    assert said(read_boxes(f, volume()[0], interpolate=True))==['box','interpolated','points','box']


# ---- mistakes ----
def csv(*rows, head=HEAD): return head+'\n'.join(rows)

DEEP = 'z0,z1,label,x0,y0,x1,y1\n'
KIND = HEAD.strip()+',kind\n'
def at(z, **kwargs): return dict(dict(z=z, object=9, kind='box', box=[1,1,9,9]), **kwargs)

BAD = {
    'no z': (csv('9,1,1,9,9', head='label,x0,y0,x1,y1\n'), r"lacks the columns \['z'\]"),
    'z0 alone': (csv('1,9,1,1,9,9', head='z0,label,x0,y0,x1,y1\n'), r"lacks the columns \['z'\]"),
    'no y1': (csv('1,9,1,1,9', head='z,label,x0,y0,x1\n'), r"lacks the columns \['y1'\]"),
    'twice': (csv('1,9,1,1,9,9,2', head='z,label,x0,y0,x1,y1,x0\n'), "column 'x0' twice"),
    'header only': (HEAD, 'no prompt in it'),
    'empty': ('', 'lacks the columns'),
    'a word': (csv('1,9,1,1,9,9', '1,9,left,1,9,9'), "row 2: x0 is 'left': give a number"),
    'nan': (csv('1,9,nan,1,9,9'), "row 1: x0 is 'nan': give a number"),
    'inf': (csv('1,9,1,1,inf,9'), "x1 is 'inf': give a number"),
    'missing': (csv('1,9,1,1,9,9', '2,9,1,,9,9'), 'row 2: y0 is missing'),
    'short': (csv('1,9,1,1'), 'row 1: x1 is missing'),
    'long': (csv('1,9,1,1,9,9', '2,9,1,5,2,9,9'), 'row 2: it has more fields'),
    'decimal comma': (csv('1,9,1;5,1,9,9'), "x0 is '1;5'"),
    'no label': (csv('1,,1,1,9,9'), 'row 1: label is missing'),
    'label 0': (csv('1,0,1,1,9,9'), 'row 1: label is 0: it is a whole number from 1 to 65535'),
    'label high': (csv('1,65536,1,1,9,9'), 'label is 65536'),
    'label 1.5': (csv('1,1.5,1,1,9,9'), 'label is 1.5'),
    'label word': (csv('1,liver,1,1,9,9'), "label is 'liver'"),
    'z low': (csv('-1,9,1,1,9,9'), 'row 1: z is -1: the volume has slices 0 to 4'),
    'z high': (csv('5,9,1,1,9,9'), 'z is 5: the volume has slices 0 to 4'),
    'z 1.5': (csv('1.5,9,1,1,9,9'), 'z is 1.5'),
    'no z value': (csv(',9,1,1,9,9'), 'row 1: z is missing'),
    'z1 missing': (csv('1,,9,1,1,9,9', head=DEEP), 'row 1: z1 is missing'),
    'z0 above z1': (csv('3,1,9,1,1,9,9', head=DEEP), 'row 1: z0 is 3 and z1 is 1'),
    'z1 high': (csv('3,7,9,1,1,9,9', head=DEEP), 'z1 is 7: the volume has slices 0 to 4'),
    'both': (csv('2,1,3,9,1,1,9,9', head='z,z0,z1,label,x0,y0,x1,y1\n'), 'z and z0, z1 are both given'),
    'inverted': (csv('1,9,9,1,1,9'), 'row 1: .* is inverted'),
    'flat': (csv('1,9,1,5,9,5'), 'row 1: .* has no area'),
    'outside': (csv('1,9,100,1,110,9'), 'row 1: .* covers nothing'),
    'above': (csv('1,9,1,-9,9,-1'), 'covers nothing'),
    'kind': (csv('1,9,1,1,9,9,lasso', head=KIND), "row 1: kind is 'lasso': it has to be box or line"),
    'kind of JSON': (csv('1,9,1,1,9,9,points', head=KIND), "row 1: kind is 'points', and there is no 'points'"),
    'no length': (csv('1,9,5,5,5,5,line', head=KIND), 'row 1: .* has no length'),
    'line outside': (csv('1,9,500,5,520,5,line', head=KIND), 'row 1: .* covers nothing'),
    'again': (csv('1,9,1,1,9,9', '2,9,1,1,9,9', '1,9,2,2,8,8'),
        'row 3: label 9 on slice 1 is asked for in row 1 already'),
    'again in 3-D': (csv('0,4,9,1,1,9,9,', ',,9,1,1,9,9,2', head=DEEP.strip()+',z\n'),
        'row 2: label 9 on slice 2 is asked for in row 1'),
    'of medsam_evaluate': (csv('x,0,1,9,0,1,1,9,9', head='case,i,z,label,slack,x0,y0,x1,y1\n'),
        'box file of medsam_evaluate.*--labels'),
    'quotes': (HEAD+'1,9,"1,1,9,9\n', 'cannot be read as a table of boxes'),
    'JSON cut off': ('[{"z": 1', 'cannot be read as a table of boxes'),
    'JSON word': ('{"rows": []}', 'no list of rows'),
    'JSON boxes': ('{"boxes": {"z": 1}}', 'no list of rows'),
    'JSON empty': ('[]', 'no prompt in it'),
    'JSON list': ([[1,9,1,1,9,9]], 'row 1: it is \\[1, 9'),
    'JSON true': ([dict(BOX, z=True)], 'row 1: z is True'),
    'JSON list value': ([BOX, dict(BOX, z=2, x0=[1])], r'row 2: x0 is \[1\]'),
    'JSON key': ([{k:v for k,v in BOX.items() if k!='label'}], 'row 1: label is missing'),
    'JSON huge': ('[{"z": 1, "label": 1%s, "x0": 1, "y0": 1, "x1": 9, "y1": 9}]' % ('0'*400), 'row 1: label is'),
    'JSON nested': ('['*100000, 'cannot be read'),
    'JSON empty row': ([BOX, {}], 'row 2: z is missing'),
    'JSON clicks without labels': ([dict(z=1, label=9, kind='points', points=[[3,3]])], 'row 1: .*no labels'),
    'JSON clicks outside': ([dict(z=1, label=9, kind='points', points=[[3,300]], labels=[1])], 'row 1: .*outside'),
    'JSON huge click': ([dict(z=1, label=9, kind='points', points=[[10**400,3]], labels=[1])], 'row 1: '),
    'prompt huge': (drawn(dict(z=1, object=9, kind='points', points=[[10**400,3]], labels=[1])), 'prompt 1 '),
    'other format': (drawn(format='x'), 'not prompts of medsam_nb'),
    'other shape': (drawn(shape=(5,64,81)), 'drawn on a volume of shape'),
    'no prompts': (drawn(), 'no prompt in it'),
    'prompt z': (drawn(at(5)), 'prompt 1 belongs to object 9 on slice 5'),
    'prompt object': (drawn(at(1, object=3)), 'object 3 on slice 1, which is not there'),
    'prompt kind': (drawn(at(1), dict(z=2, object=9, kind='lasso')), 'prompt 2 .*has to be'),
    'prompt twice': (drawn(at(1), at(1)), 'prompt 2 is a second one'),
    'prompt 1.5': (drawn(at(1.5)), 'slice 1.5'),
    'prompt words': (drawn(dict(z=1, object=9, kind='line', line=['a',1,2,3])), 'prompt 1'),
    'prompt points': (drawn(dict(z=1, object=9, kind='points', points=[[1]], labels=[1])), 'prompt 1'),
    'objects': (drawn(objects=[dict(id=9)]), 'damaged')}

@pytest.mark.parametrize('name', BAD)
def test_mistakes_have_a_name_and_a_number(tmp_path, name):
    content,match = BAD[name]
    f = put(tmp_path/'mine.csv', content)
    with pytest.raises(InputError, match=match) as e: read_boxes(f, volume()[0])
    assert str(f) in str(e.value) and len(str(e.value))<1000

def test_a_box_that_is_cut_at_the_edge_is_told(tmp_path):
    "The classic sign of another grid"
    told = (r'row 2: the box reaches beyond the image \(width 80, height 64\) and was cut to 40, 30, 80, 64. '
            'Is it in the pixels of another grid')
    with pytest.warns(UserWarning, match=told):
        asks = read_boxes(put(tmp_path/'b.csv', csv('1,9,1,1,9,9', '2,9,40,30,500,500')), volume()[0])
    assert rows_of(asks)[1]==[2,9,40,30,80,64]

def test_a_box_that_ends_at_the_edge_or_a_hair_beyond_is_not_told(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        read_boxes(put(tmp_path/'b.csv', csv('1,9,-.5,0,80.4,64,', '2,9,5,5,75,60,line', head=KIND)), volume()[0])

def test_a_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path/'b.csv').write_bytes(bytes(range(256)))
    with pytest.raises(InputError, match='cannot be read as a table of boxes'):
        read_boxes(tmp_path/'b.csv', volume()[0])

@pytest.mark.parametrize('name', ['.','none.csv'])
def test_what_is_no_file_is_refused(tmp_path, name):
    with pytest.raises(InputError, match='no box file'): read_boxes(tmp_path/name, volume()[0])

def test_one_slice_of_each_label_leaves_nothing_to_interpolate(tmp_path):
    f = put(tmp_path/'o.csv', csv('1,9,1,1,9,9','2,2,1,1,9,9'))
    with pytest.raises(InputError, match='nothing to interpolate'): read_boxes(f, volume()[0], interpolate=True)

CELLS = st.one_of(st.integers(-9, 99), st.floats(), st.text(max_size=4))
LINES = st.lists(st.lists(CELLS, max_size=8), max_size=5)
KEYS_OF_JSON = st.sampled_from([*BOX_COLUMNS,'z0','z1','kind','points','labels','outline','boxes','format'])
LEAVES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5),
                   st.sampled_from(['line','points','outline']))
def branches(c): return st.one_of(st.lists(c, max_size=4), st.dictionaries(KEYS_OF_JSON, c, max_size=9))

TREES = st.recursive(LEAVES, branches, max_leaves=20)
TABLES = LINES.map(lambda r: HEAD+'\n'.join(','.join(map(str, x)) for x in r))
TEXTS = st.one_of(st.text(max_size=80), TABLES, TREES.map(json.dumps))

@settings(max_examples=150, deadline=None)
@given(TEXTS)
def test_any_text_is_a_list_of_prompts_or_a_sentence(text):
    v = Volume(np.zeros((5,64,80), np.int16), (3,.8,.8), 'a')
    with tempfile.TemporaryDirectory() as d:
        p = Path(d)/'x.csv'
        p.write_text(text, encoding='utf-8', newline='')
        try: asks = read_boxes(p, v)
        except InputError: return
    assert asks and all(0<=a.z<5 and 1<=a.label<=65535 for a in asks)
    assert len({(a.z, a.label) for a in asks})==len(asks)
    boxes = table(asks).dropna(subset=SIDES)
    assert (boxes.x1>boxes.x0).all() and (boxes.y1>boxes.y0).all()


# ---- answers ----
@lru_cache
def answer():
    v,lab = volume(shape=(2,64,80))
    return answer_to(None, lab, v)

def test_the_answer_is_that_of_predict_volume():
    seg = answer()
    assert np.array_equal(seg.mask, predict_volume(asked(), seg.volume, oracle_boxes(seg.label), progress=False))
    assert set(np.unique(seg.mask))=={0,2,9} and seg.mask.dtype==np.uint8

def test_a_table_of_boxes_is_asked_as_it_is():
    seg = answer()
    again = answer_to(oracle_boxes(seg.label), None, seg.volume)
    assert np.array_equal(again.mask, seg.mask)
    assert set(said(again.asks))=={'box'} and again.scores is None

@pytest.mark.filterwarnings(BOXES_ONLY)
@pytest.mark.parametrize('flip', ['ud','lr','udlr'])
def test_a_decoder_of_flipped_slices_sees_what_it_learned(flip):
    v,lab = volume(shape=(1,64,80))
    ud,lr = 'ud' in flip,'lr' in flip
    def turned(xy): return tuple((80-x if lr else x, 64-y if ud else y) for x,y in xy)
    def prompts(turn):
        (x0,y0),(x1,y1) = turn([oracle_boxes(lab).iloc[1][['x0','y0']], oracle_boxes(lab).iloc[1][['x1','y1']]])
        box = Box((min(x0,x1), min(y0,y1), max(x0,x1), max(y0,y1)))
        return [Ask(0, 2, Points(turn([(62.,20.),(30.,3.)]), (1,0))), Ask(0, 9, box)]
    upright = answer_to(prompts(lambda o: o), None, v)
    assert set(np.unique(upright.mask))=={0,2,9}
    over = np.s_[:, ::-1 if ud else 1, ::-1 if lr else 1]
    seg = answer_to(prompts(turned), None, Volume(v.array[over], v.spacing), Recipe(flip=flip))
    assert np.array_equal(seg.mask[over], upright.mask)

def test_fields_of_the_recipe_go_by_name():
    v,lab = volume(shape=(1,64,80))
    fields = dict(fit='squash', window='abdomen')
    by_name,by_recipe = answer_to(None, lab, v, **fields),answer_to(None, lab, v, Recipe(**fields))
    assert np.array_equal(by_name.mask, by_recipe.mask) and by_name.recipe==by_recipe.recipe

@pytest.fixture(scope='module')
def uneven():
    "Slices that were not asked, slices that are empty, a label that is not there"
    img,lab = scan(shape=(6,64,80), organs=ORGANS, zs=(1,2,4))
    lab[4][lab[4]==2] = 0
    lab[5,3:6,3:6] = 2
    v,truth = Volume(img, (3,.8,1.1), 'a'),Volume(lab, (3,.8,1.1), 'a')
    rows = [(1,9,20,18,46,42), (0,9,20,18,46,42), (1,2,54,12,70,28), (3,7,3,3,30,30)]
    return answer_to(pd.DataFrame(rows, columns=BOX_COLUMNS), truth, v, tolerance=2.5)

def test_scores_count_what_was_asked_and_what_was_missed(uneven):
    s = uneven.scores.set_index('label')
    assert s.index.tolist()==[2,7,9]
    assert s.missed.to_dict()=={2:2, 7:0, 9:2} and s.slices.to_dict()=={2:1, 7:1, 9:2}
    assert set(s.prompts)=={'prompts'} and set(s.unit)=={'mm'}

@pytest.mark.parametrize('label_id', [2,7,9])
def test_scores_are_those_of_the_whole_volume(uneven, label_id):
    s = uneven.scores.set_index('label').loc[label_id]
    p,t = uneven.mask==label_id,uneven.label.array==label_id
    assert s.DSC==2*(p&t).sum()/(p.sum()+t.sum())
    assert s.NSD==nsd(p, t, (3,.8,1.1), 2.5)
    assert s.voxels==p.sum() and s.true_voxels==t.sum()

def test_the_tolerance_and_the_slices_that_were_missed_count(uneven):
    s,p,t = uneven.scores.set_index('label'),uneven.mask==9,uneven.label.array==9
    assert s.DSC[7]==0
    assert s.NSD[9]!=nsd(p, t, (3,.8,1.1), 1.)
    assert s.DSC[9]<dsc(p[[1]], t[[1]])

def test_each_prompt_has_a_row(uneven):
    rows = uneven.slices.set_index(['z','label'])
    assert rows.DSC[1,9]==dsc(uneven.mask[1]==9, uneven.label.array[1]==9) and rows.DSC[3,7]==0
    assert rows.pixels[0,9]==(uneven.mask[0]==9).sum()
    assert np.isclose(rows.area_mm2[1,2], (uneven.mask[1]==2).sum()*.88)
    assert (uneven.slices.predicted_iou!=0).all()
    assert list(uneven.slices)==['z','label','x0','y0','x1','y1','prompt','pixels','area_mm2','predicted_iou','DSC']

def test_one_slice_has_no_surface_across_it():
    v,lab = volume(shape=(1,64,80))
    one = answer_to(oracle_boxes(lab, [9]), lab, v)
    assert one.scores.NSD[0]==nsd(one.mask[0]==9, lab.array[0]==9, (.8,.8), 1.)

def test_oracle_is_said_wherever_there_is_a_number():
    seg = answer()
    assert set(seg.scores.prompts)=={'oracle boxes'} and set(seg.slices.prompt)=={'oracle box'}
    assert 'oracle boxes' in repr(seg)

def test_oracle_is_said_when_the_table_comes_back(tmp_path):
    seg = answer()
    again = read_boxes(seg.save(tmp_path/'m.nrrd')['slices'], seg.volume)
    assert replace(seg, asks=again).what=='oracle boxes'
    assert 'among them' in replace(seg, asks=[replace(again[0], origin=''), *again[1:]]).what

def test_a_table_of_somebody_is_not_called_oracle():
    seg = answer()
    assert answer_to(oracle_boxes(seg.label), None, seg.volume, label_ids=[2]).what=='prompts'

@pytest.mark.parametrize('kwargs, match', [
    (dict(boxes=None, label=None), 'give boxes, or labels'),
    (dict(tolerance=-1), 'tolerance is -1'),
    (dict(tolerance=np.nan), 'tolerance'),
    (dict(label_ids=[4]), r'no box is of the labels \[4\]'),
    (dict(label_ids='liver'), "label_ids 'liver'"),
    (dict(recipe=Recipe(), fit='squash'), 'give one of them'),
    (dict(boxes=pd.DataFrame({'z':[1]})), 'lack the columns'),
    (dict(boxes=pd.DataFrame(columns=BOX_COLUMNS)), 'empty'),
    (dict(boxes=[]), 'empty'),
    (dict(label='small'), 'size'),
    (dict(boxes=None, label_ids=[4]), r'none of the ids \[4\]')])
def test_nonsense_in_python(kwargs, match):
    v,lab = volume(shape=(2,64,80))
    kwargs = dict(boxes=oracle_boxes(lab), label=lab)|kwargs
    if kwargs['label']=='small': kwargs['label'] = Volume(lab.array[:,:,:50], lab.spacing)
    with pytest.raises(InputError, match=match): segment(v, predictor=asked(), progress=False, **kwargs)


# ---- the picture ----
@pytest.fixture(scope='module')
def tall():
    "Many slices of one label and few of another: asks, mask, volume, label"
    v,lab = volume(shape=(30,64,80))
    asks = [a for a in asks_of(oracle_boxes(lab)) if a.label==9 or a.z>26]
    return v, lab, asks, np.where(lab.array==9, 9, 0).astype(np.uint8)

def pictured(v, mask, asks, n=12, **kwargs): return Segmentation(v, mask, asks, table(asks), **kwargs).show(n)

def shown(fig): return [int(a.get_title().split()[1]) for a in fig.axes]

def test_the_picture_shows_every_label_on_at_most_twelve_slices(tall):
    v,lab,asks,mask = tall
    zs = shown(pictured(v, mask, asks, label=lab))
    assert 6<=len(zs)<=12 and zs==sorted(set(zs))
    assert max(zs)>26 and min(zs)<5

def test_the_picture_shows_every_prompt_and_every_true_outline(tall):
    v,lab,asks,mask = tall
    fig = pictured(v, mask, asks, label=lab)
    for ax,z in zip(fig.axes, shown(fig)):
        assert len(ax.patches)==sum(a.z==z for a in asks)
        assert len(ax.collections)==len(np.unique(lab.array[z]))-1>0

def test_the_picture_has_no_more_slices_than_wanted(tall):
    v,lab,asks,mask = tall
    assert len(pictured(v, mask, asks, 3).axes)<=3

def test_the_picture_shows_the_part_where_something_is(tall):
    "The box lies on the pixels of the scan, and whole slices are not shown"
    v,lab,asks,mask = tall
    few = [a for a in asks if a.z==3]
    ax = pictured(v, mask*0, few).axes[0]
    x0,y0,x1,y1 = few[0].prompt.box
    corner,side = ax.patches[0].get_xy(),(ax.patches[0].get_width(), ax.patches[0].get_height())
    assert corner==(x0-.5,y0-.5) and side==(x1-x0,y1-y0) # matplotlib's pixel 0 begins at -0.5
    (left,right),(bottom,top) = ax.get_xlim(),ax.get_ylim()
    assert -.5<=left<x0 and x1<right<80 and -.5<=top<y0 and y1<bottom<64
    assert right-left<80 and bottom-top<64

def test_the_picture_has_the_grey_values_of_the_scan(tall):
    v,lab,asks,mask = tall
    grey = pictured(v, mask*0, asks[:1]).axes[0].images[0].get_array()
    bright = np.clip((v.array[asks[0].z]+500)/1500*255, 0, 255)
    assert np.abs(bright-grey).max()<=1

@pytest.mark.parametrize('flip', ['ud','lr'])
def test_the_picture_lies_as_the_scan_lies(tall, flip):
    v,lab,asks,mask = tall
    def grey(recipe): return np.array(pictured(v, mask*0, asks[:1], recipe=recipe).axes[0].images[0].get_array())
    assert np.array_equal(grey(Recipe(flip=flip)), grey(Recipe()))


# ---- geometry ----
def rotation(*angles):
    t = sitk.Euler3DTransform()
    t.SetRotation(*angles)
    return np.reshape(t.GetMatrix(), (3,3))

def stored(path):
    "The image in a file, and its voxels as they are stored"
    im = sitk.ReadImage(str(path))
    return im,sitk.GetArrayFromImage(im)

def world(path, value):
    "Millimetre positions of the voxels of a label, sorted"
    im,a = stored(path)
    idx = np.argwhere(a==value)[:,::-1]
    p = np.array(im.GetOrigin())+(idx*np.array(im.GetSpacing()))@np.reshape(im.GetDirection(), (3,3)).T
    return p[np.lexsort(np.round(p, 2).T)]

GEOMETRY = ('GetSize','GetSpacing','GetOrigin','GetDirection')

def check_geometry(a, b, exact):
    "NRRD keeps spacing and direction as one product, so they are not exact there"
    for get in GEOMETRY:
        one,other = getattr(a, get)(),getattr(b, get)()
        assert one==other if exact else np.allclose(one, other, rtol=0, atol=1e-12), get

def laid(shape, order, flips, spacing, turn):
    "Where a scan lies whose stored axis k is axis order[k] of the room, backwards where flips[k]"
    n,s,order = np.array(shape[::-1]),np.array(spacing),list(order)
    first = np.zeros(3)
    first[order] = np.where(flips, n[order]-1, 0)
    origin = np.array([-12.5,30.25,7])+turn@(s*first)
    direction = turn[:,order]*np.where(flips, -1, 1)
    return dict(spacing=s[order].tolist(), origin=origin.tolist(), direction=direction.ravel().tolist())

def in_order(a, order, flips):
    "An array with its axes in another order, and backwards where `flips`"
    return np.ascontiguousarray(np.flip(a.T.transpose(order), np.flatnonzero(flips)).T)

def masked(d, name, ext):
    "Segment a scan in files, write the mask, and give it as it is shown and as it is stored"
    v,label = read_volume(d/f'{name}_i{ext}'),read_volume(d/f'{name}_l{ext}', kind='label')
    seg = answer_to(None, label, v)
    write_mask(seg.mask, v, d/f'{name}_m{ext}')
    (scan_,_),(mask,voxels) = stored(d/f'{name}_i{ext}'),stored(d/f'{name}_m{ext}')
    check_geometry(scan_, mask, ext.startswith('.nii'))
    return seg.mask,voxels

SMALL,THICK = st.sampled_from([.5,.6,.7]),st.sampled_from([.3,.6,1.2,5.])

@settings(max_examples=14, deadline=None)
@example(order=[2,0,1], flips=(True,False,True), spacing=(.5,5.,.6), angles=(.1,0.,-.2), ext='.nii.gz') # cut coronal
@given(order=st.permutations(range(3)), flips=st.tuples(*[st.booleans()]*3), spacing=st.tuples(SMALL, SMALL, THICK),
       angles=st.tuples(*[st.floats(-.3, .3)]*3), ext=st.sampled_from(['.nii.gz','.nii','.nrrd','.mha']))
def test_a_scan_stored_another_way_gets_the_same_mask(tmp_path_factory, order, flips, spacing, angles, ext):
    d,turn = tmp_path_factory.mktemp('turn'),rotation(*angles)
    img,lab = scan(seed=3, shape=(2,20,24), organs=((9,9,8,5),(2,12,17,4)))
    lab[1][lab[1]==2] = 0 # the slices differ
    for name,o,f in (('plain', (0,1,2), (0,0,0)), ('turned', order, flips)):
        where = laid(img.shape, o, f, spacing, turn)
        for k,a in dict(i=img, l=lab).items(): save(d/f'{name}_{k}{ext}', in_order(a, o, f), **where)
    (as_shown,as_stored),(as_shown2,as_stored2) = masked(d, 'plain', ext),masked(d, 'turned', ext)
    assert np.array_equal(as_shown, as_shown2) and as_shown.any() # the same slices, the same answers
    assert np.array_equal(as_stored2, in_order(as_stored, order, flips)) # each at its voxel
    for value in (2,9): # and at its place in the room
        assert np.allclose(world(d/f'plain_m{ext}', value), world(d/f'turned_m{ext}', value), atol=2e-2)

@pytest.fixture(scope='module')
def oblique(tmp_path_factory):
    "A scan that lies askew, its label, and the mask of the command: images and arrays"
    d = tmp_path_factory.mktemp('oblique')
    direction = rotation(.1,-.15,.2)@np.diag([-1,-1,1])
    img,lab = scan(shape=(2,96,120), organs=((9,40,70,18),))
    other = scan(seed=1, shape=(1,96,120), organs=((9,60,35,13),))
    img[1],lab[1] = (a[0] for a in other) # the second slice differs: no symmetry
    where = dict(spacing=(.8,.9,3.), origin=(-12.5,30.25,7), direction=np.asarray(direction, float).ravel().tolist())
    save(d/'i.nii.gz', img, **where)
    save(d/'l.nii.gz', lab, **where)
    medsam_predict(str(d/'i.nii.gz'), str(d/'m.nii.gz'), labels=str(d/'l.nii.gz'), label_ids='9', device='cpu')
    return stored(d/'i.nii.gz')[0], lab, *stored(d/'m.nii.gz')

def test_the_mask_has_the_geometry_of_the_scan(oblique):
    image,lab,mask,out = oblique
    check_geometry(image, mask, True)

def test_the_mask_lies_on_the_organ(oblique):
    image,lab,mask,out = oblique
    right = dsc(out==9, lab==9)
    assert set(np.unique(out))=={0,9} and right>.8
    for flipped in (out[::-1], out[:,::-1], out[:,:,::-1]): assert dsc(flipped==9, lab==9)<right-.1


# ---- files ----
FILES = {'m.nii.gz','m_slices.csv','m_qc.png','m_scores.csv'}

def test_four_files_are_written(tmp_path):
    paths = answer().save(tmp_path/'deep'/'er'/'m.nii.gz')
    assert {p.name for p in (tmp_path/'deep'/'er').iterdir()}==FILES=={p.name for p in paths.values()}

def test_what_is_written_is_what_there_was(tmp_path):
    seg = answer()
    paths = seg.save(tmp_path/'m.nii.gz')
    assert np.array_equal(read_volume(paths['mask'], kind='label').array, seg.mask)
    for k in ('slices','scores'):
        pd.testing.assert_frame_equal(pd.read_csv(paths[k]), getattr(seg, k), check_dtype=False, rtol=1e-4)
    assert np.asarray(Image.open(paths['qc'])).std()>10

@pytest.mark.parametrize('there', sorted(FILES))
def test_nothing_is_replaced_unasked(tmp_path, there):
    (tmp_path/there).write_text('mine')
    before = tree(tmp_path)
    with pytest.raises(InputError, match=f'{there} exists already'): answer().save(tmp_path/'m.nii.gz')
    with pytest.raises(InputError, match=f'{there} exists already'): # before anything is read
        medsam_predict('nowhere.nii.gz', str(tmp_path/'m.nii.gz'), labels='x')
    assert tree(tmp_path)==before

@pytest.mark.parametrize('there', sorted(FILES))
def test_what_is_there_is_replaced_when_asked(tmp_path, there):
    (tmp_path/there).write_text('mine')
    answer().save(tmp_path/'m.nii.gz', overwrite=True)
    assert {p.name for p in tmp_path.iterdir()}==FILES and tree(tmp_path)[there]!=b'mine'

def test_scores_of_an_older_mask_do_not_stay_beside_a_new_one(tmp_path):
    seg = answer()
    seg.save(tmp_path/'m.nii.gz')
    replace(seg, label=None, scores=None).save(tmp_path/'m.nii.gz', overwrite=True)
    assert {p.name for p in tmp_path.iterdir()}==FILES-{'m_scores.csv'}

@pytest.mark.parametrize('n', range(4))
@pytest.mark.parametrize('old', [False, True])
def test_interrupted_renames_leave_no_mask(tmp_path, monkeypatch, n, old):
    seg,real,calls = answer(),os.replace,[]
    if old: seg.save(tmp_path/'m.nii.gz')
    def interrupted(a, b):
        ours = os.path.dirname(b)==str(tmp_path) # not one inside the hidden folder
        if ours and len(calls)==n: raise KeyboardInterrupt
        if ours: calls.append(b)
        return real(a, b)
    monkeypatch.setattr(os, 'replace', interrupted)
    with pytest.raises(KeyboardInterrupt): seg.save(tmp_path/'m.nii.gz', overwrite=old)
    assert 'm.nii.gz' not in tree(tmp_path)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith('.')]

def test_a_failure_while_writing_changes_nothing(tmp_path):
    seg = answer()
    seg.save(tmp_path/'m.nii.gz')
    before = tree(tmp_path)
    broken = replace(seg, mask=seg.mask.astype(float)+.5)
    with pytest.raises(InputError): broken.save(tmp_path/'m.nii.gz', overwrite=True)
    assert tree(tmp_path)==before

KILLED = """
import sys, numpy as np
from tiny import quick, scan
from medsam_nb.predict import Predictor
from medsam_nb.segment import segment
from medsam_nb.volume import Volume
img,lab = scan(shape=(3,64,80))
seg = segment(Volume(img, (3,1,1)), None, Volume(lab, (3,1,1)), Predictor(quick(seed=2)), progress=False)
print('ready', flush=True)
seg.save(sys.argv[1])
"""

def killed(out, wait):
    "Kill a process `wait` seconds after it began to write, and say what lies there"
    p = python(KILLED, out, wait=False, threads=1)
    assert p.stdout.readline().strip()=='ready', p.stderr.read()
    until = time.time()+60
    while not any(out.parent.iterdir()) and p.poll() is None and time.time()<until: time.sleep(.002)
    time.sleep(wait)
    p.send_signal(signal.SIGKILL)
    p.wait()
    p.stdout.close()
    p.stderr.close()
    return {q.name for q in out.parent.iterdir() if not q.name.startswith('.')}

@pytest.mark.parametrize('wait', [0, .2])
def test_killed_while_writing(tmp_path, wait):
    "Wherever the kill falls: there is no mask, or all four files are there and whole"
    found = killed(tmp_path/'m.nii.gz', wait)
    assert found==FILES if 'm.nii.gz' in found else found<FILES
    if found==FILES:
        assert read_volume(tmp_path/'m.nii.gz', kind='label').array.any()
        assert len(pd.read_csv(tmp_path/'m_scores.csv'))
    answer().save(tmp_path/'m.nii.gz', overwrite=True)
    assert FILES<={q.name for q in tmp_path.iterdir()}


# ---- the command ----
@pytest.fixture
def ward(tmp_path):
    "A folder with a scan, its label, and a box on the first slice; a function runs the command in it"
    img,lab = scan(shape=(2,64,80))
    save(tmp_path/'i.nii.gz', img)
    save(tmp_path/'l.nii.gz', lab)
    boxes = oracle_boxes(read_volume(tmp_path/'l.nii.gz', kind='label'))
    boxes.iloc[[0]].to_csv(tmp_path/'b.csv', index=False)
    def run(out, **kwargs):
        files = {k:str(tmp_path/v) if k in ('boxes','labels') else v for k,v in kwargs.items()}
        return medsam_predict(str(tmp_path/'i.nii.gz'), str(tmp_path/out), device='cpu', **files)
    return tmp_path,run

def test_the_command_takes_oracle_boxes_and_says_so(ward, capsys):
    d,run = ward
    run('m.nrrd', labels='l.nii.gz')
    out = capsys.readouterr().out
    assert '2 oracle boxes' in out and 'over the whole volume, oracle boxes' in out and 'm_scores.csv' in out
    assert pd.read_csv(d/'m_scores.csv').DSC[0]>.8

def test_the_command_reads_boxes(ward, capsys):
    d,run = ward
    run('m.nrrd', boxes='b.csv', labels='l.nii.gz', tolerance=2.)
    out = capsys.readouterr().out
    assert '1 prompt,' in out and 'oracle' not in out
    assert pd.read_csv(d/'m_scores.csv')[['missed','tolerance']].values.tolist()==[[1,2]]
    assert not read_volume(d/'m.nrrd', kind='label').array[1].any()

def test_the_command_replaces_results_only_when_asked(ward):
    d,run = ward
    run('m.nrrd', labels='l.nii.gz')
    before = tree(d)
    with pytest.raises(InputError, match='m_slices.csv exists already'): run('m.nrrd', boxes='b.csv')
    assert tree(d)==before
    run('m.nrrd', boxes='b.csv', labels='l.nii.gz', overwrite=True)
    assert tree(d).keys()==before.keys() and tree(d)['m_slices.csv']!=before['m_slices.csv']

@pytest.mark.parametrize('kwargs', [
    dict(boxes='b.csv', out='i.nii.gz'),
    dict(boxes='m_slices.csv', out='m.nrrd'),
    dict(labels='l.nii.gz', out='l.nii.gz')])
def test_the_command_never_replaces_an_input(ward, kwargs):
    d,run = ward
    (d/'m_slices.csv').write_text((d/'b.csv').read_text())
    before = tree(d)
    with pytest.raises(InputError, match='is an input'): run(overwrite=True, **kwargs)
    assert tree(d)==before

def test_old_names_of_options_are_taken_with_a_warning(ward):
    d,run = ward
    with pytest.warns(FutureWarning, match='label_id is called label_ids'):
        run('old.nii.gz', labels='l.nii.gz', label_id='9')
    run('new.nii.gz', labels='l.nii.gz', label_ids='9')
    assert (d/'old_slices.csv').read_text()==(d/'new_slices.csv').read_text()

REFUSED = [
    (dict(), 'give boxes .* or labels'),
    (dict(boxes='none.csv'), 'no box file at none.csv'),
    (dict(boxes='EMPTY'), 'lacks the columns'),
    (dict(boxes='BINARY'), 'cannot be read as a table'),
    (dict(boxes='OTHER'), r"lacks the columns \['label'"),
    (dict(boxes='ROW'), r'ROW.csv: row 2: z is 2: the volume has slices 0 to 1'),
    (dict(boxes='ROW', labels='none.nii.gz'), 'does not exist'),
    (dict(labels='L', label_ids='liver'), "label_ids 'liver'"),
    (dict(labels='L', label_ids='4'), r'none of the ids \[4\]'),
    (dict(labels='L', interpolate=True), 'interpolate needs boxes'),
    (dict(labels='L', flip='up'), 'flip'),
    (dict(labels='L', fit='crop'), 'fit'),
    (dict(labels='L', window='bone'), "window 'bone'"),
    (dict(labels='L', window='1,b'), "window '1,b'"),
    (dict(labels='L', tolerance=-1.), 'tolerance'),
    (dict(labels='L', model='vit_x'), 'no model called'),
    (dict(labels='L', out='m.jpg'), 'cannot be written as m.jpg'),
    (dict(labels='L', out='mask'), 'cannot be written as mask'),
    (dict(labels='L', out='m.png'), 'cannot be written as m.png'),
    (dict(labels='L', out='L.nii.gz/m.nii.gz'), 'nothing can be written'),
    (dict(labels='SMALL'), 'size')]

@pytest.fixture(scope='module')
def shelf(tmp_path_factory):
    "A folder with a scan, labels and box files that are wrong in some way"
    d = tmp_path_factory.mktemp('shelf')
    img,lab = scan(shape=(2,64,80))
    for name,a in (('i', img), ('L', lab), ('SMALL', lab[:,:50])): save(d/f'{name}.nii.gz', a)
    (d/'BINARY.csv').write_bytes(bytes(range(256)))
    for name,text in (('EMPTY', ''), ('OTHER', 'a,b\n1,2\n'), ('ROW', csv('1,9,1,1,9,9', '2,9,1,1,9,9'))):
        put(d/f'{name}.csv', text)
    return d

@pytest.mark.parametrize('change, match', REFUSED)
def test_the_command_refuses_and_writes_nothing(shelf, change, match):
    before = tree(shelf)
    kwargs = dict(image=str(shelf/'i.nii.gz'), out='m.nii.gz', device='cpu')|change
    kwargs['out'] = str(shelf/kwargs['out'])
    for k,ext in (('labels','.nii.gz'), ('boxes','.csv')):
        if kwargs.get(k, '').isupper(): kwargs[k] = str(shelf/(kwargs[k]+ext))
    with pytest.raises(InputError, match=match): medsam_predict(**kwargs)
    assert tree(shelf)==before

@pytest.fixture(scope='module')
def photo(tmp_path_factory):
    "A colour picture with its label, and a file with a box; what the command made of them"
    d = tmp_path_factory.mktemp('photo')
    y,x = np.mgrid[:90,:140]+.5
    gt = ((y-40)/20)**2+((x-90)/25)**2<1
    noise = [np.random.default_rng(s).normal(70, 8, gt.shape) for s in range(3)]
    rgb = np.stack([np.clip(n+90*gt, 0, 255) for n in noise], -1).astype(np.uint8)
    Image.fromarray(rgb).save(d/'bild.v2.png')
    Image.fromarray(gt.astype(np.uint8)).save(d/'gt.png')
    put(d/'b.csv', [dict(zip(BOX_COLUMNS, (0, 1, *map(float, mask_to_box(gt)))))])
    files = dict(boxes=str(d/'b.csv'), labels=str(d/'gt.png'))
    medsam_predict(str(d/'bild.v2.png'), str(d/'out.png'), **files, modality='Photo', device='cpu')
    return d,gt,np.asarray(Image.open(d/'out.png'))

def test_a_picture_has_no_window_in_hounsfield_units(photo):
    d,*_ = photo
    with pytest.raises(InputError, match='8-bit.*modality Photo'):
        medsam_predict(str(d/'bild.v2.png'), str(d/'ct.png'), labels=str(d/'gt.png'), device='cpu')

def test_a_picture_in_a_picture_out(photo):
    d,gt,out = photo
    assert out.shape==gt.shape and set(np.unique(out))=={0,1}
    assert dsc(out==1, gt)>.9

def test_a_picture_is_scored_in_pixels(photo):
    d,gt,out = photo
    s = pd.read_csv(d/'out_scores.csv').iloc[0]
    assert s.unit=='px'
    assert np.isclose(s.DSC, dsc(out==1, gt), atol=1e-5)
    assert np.isclose(s.NSD, nsd(out==1, gt, (1,1)), atol=1e-5)
    assert pd.read_csv(d/'out_slices.csv').area_mm2.isna().all()

HELP = """
import sys
from medsam_nb.segment import medsam_predict
sys.argv[0] = 'medsam_predict'
medsam_predict()
"""

@pytest.fixture(scope='module')
def manual():
    return python(HELP, '--help')

OPTIONS = ('boxes','interpolate','label_ids','ids','tolerance','modality','window','low','high','fit','flip')

@pytest.mark.parametrize('option', OPTIONS)
def test_help_has_the_options_of_the_command_and_of_the_recipe(manual, option): assert f'--{option}' in manual

def test_help_says_what_it_does(manual): assert 'the smaller one wins' in ' '.join(manual.split())
