"The drawing cell without a browser: what there is to draw on, prompts, history, carrying, saving, answers to gestures"
import json, threading, time
from contextlib import closing, contextmanager
from copy import deepcopy
from dataclasses import replace
import numpy as np, pytest, SimpleITK as sitk, torch
from PIL import Image
from medsam_nb.core import InputError
from medsam_nb.curate import curate, find_npz, read_npz
from medsam_nb.draw import (Answer, DrawCase, History, Session, SliceCache, SliceEmbedder, annotate,
                            display_windows, guess_recipe, list_cases, stored_slices)
from medsam_nb.embed import embed
from medsam_nb.metrics import dsc, nsd
from medsam_nb.predict import Predictor, predict_volume
from medsam_nb.prompt import KINDS, Box, Line, as_prompt, line_to_box
from medsam_nb.view import Recipe, View
from medsam_nb.volume import Volume, read_volume
from tiny import dicom, disc, lite, python, quick, raw, save, scan

BOX = dict(kind='box', box=[20.,15.,50.,45.])
DRAWN = Box((20.,15.,50.,45.))
WIDE = dict(kind='box', box=[1.,1.,60.,60.])
LINE = dict(kind='line', line=[20.,20.,50.,40.])
POINTS = dict(kind='points', points=[[30.,30.],[5.,5.]], labels=[1,0])
OUTLINE = dict(kind='outline', outline=[[20.,15.],[50.,15.],[50.,45.],[20.,45.]])

def volume(shape=(6,64,80), **kwargs):
    img,lab = scan(shape=shape, **kwargs)
    return Volume(img, (3,.8,.8), 'a'), Volume(lab, (3,.8,.8), 'a')

def session(recipe=None, **kwargs):
    return Session(DrawCase('a', *volume(**kwargs)), {'pretrained':quick()}, recipe or Recipe())

@contextmanager
def drawing(*args, **kwargs):
    "A drawing cell that is closed at the end, with an encoder that costs nothing"
    app = annotate(*args, **(dict(model=quick(), recipe=Recipe())|kwargs))
    try: yield app
    finally: app.close()

@pytest.fixture
def s():
    with closing(session()) as s: yield s

@pytest.fixture
def app():
    with drawing(*volume()) as app: yield app

@pytest.fixture
def two(tmp_path):
    "A drawing cell on a folder with the cases a and b"
    raw(tmp_path, ['a','b'])
    with drawing(tmp_path) as app: yield app

@pytest.fixture
def ready(app):
    "A drawing cell whose slice is encoded"
    wait(lambda: app.session.ready(app.canvas.z))
    return app

def wait(condition, seconds=30):
    end = time.monotonic()+seconds
    while not condition():
        assert time.monotonic()<end, 'it did not happen in time'
        time.sleep(.01)

class Change:
    "What a trait's observer is given"
    def __init__(self, new): self.new = new

def gesture(app, prompt=BOX, z=None, object=9, done=True, seq=None, **kwargs):
    z = app.canvas.z if z is None else z
    seq = app.seq+1 if seq is None else seq
    app._on_gestures(Change([dict(seq=seq, z=z, object=object, prompt=prompt, done=done, **kwargs)]))

def bits(data, shape):
    return np.unpackbits(np.frombuffer(data, np.uint8))[:np.prod(shape)].reshape(shape).astype(bool)

def the_embedder(app): return app.session.embedders[quick().encoder_sha256]


# ---- what there is to draw on
@pytest.mark.parametrize('array,shape', [
    (scan()[0], (4,64,80)), (scan()[0][0], (1,64,80)), (np.zeros((8,9,3), np.uint8), (1,8,9,3)),
    (np.zeros((2,8,9,3), np.uint8), (2,8,9,3))])
def test_an_array_becomes_slices(array, shape):
    case, = list_cases(array)
    assert case.read()[0].array.shape==shape

def test_an_array_may_have_an_array_of_labels():
    vol,lab = list_cases(*scan())[0].read()
    assert lab.shape==vol.shape

def test_the_cases_of_a_flare_folder_have_labels(tmp_path):
    raw(tmp_path, ['FLARE22_Tr_0001','FLARE22_Tr_0002'])
    cases = list_cases(tmp_path)
    assert [c.name for c in cases]==['FLARE22_Tr_0001','FLARE22_Tr_0002']
    assert cases[0].read()[1] is not None

def test_a_folder_of_images_has_labels_where_they_are_given(tmp_path):
    images,labels = raw(tmp_path, ['a','b'])
    assert [c.label for c in list_cases(images)]==[None,None]
    assert None not in [c.label for c in list_cases(images, labels)]

def test_a_file_is_a_case(tmp_path):
    images,labels = raw(tmp_path, ['a'])
    case, = list_cases(images/'a_0000.nii.gz', labels/'a.nii.gz')
    assert case.read()[1].array.max()==9

def test_pictures_come_in_the_order_of_their_names(tmp_path):
    for k in 'ba': Image.fromarray(np.full((20,30), 7, np.uint8)).save(tmp_path/f'{k}.png')
    cases = list_cases(tmp_path)
    assert [c.name for c in cases]==['a','b']
    assert cases[0].read()[0].shape==(1,20,30)

def test_nothing_is_a_phantom():
    case, = list_cases()
    assert case.name=='Phantom'
    assert case.read()[1].array.max()==13

def test_a_dicom_folder_is_a_case(tmp_path):
    img,_ = scan(shape=(3,16,20))
    series = dict(g0008_0060='CT', g0020_000e='1.2.3.4', g0020_000d='1.2.3',
                  g0020_0037='1\\0\\0\\0\\1\\0', g0018_0050='3')
    for z in range(3):
        own = dict(g0020_0032=f'0\\0\\{z*3}', g0020_0013=str(z), g0008_0018=f'1.2.3.4.{z+1}')
        dicom(tmp_path/f'{z}.dcm', img[z:z+1], **series, **own)
    case, = list_cases(tmp_path)
    assert case.name==tmp_path.name
    assert case.read()[0].shape==(3,16,20)

def test_images_without_a_label_are_in_the_list_too(tmp_path):
    _,labels = raw(tmp_path, ['a','b'])
    (labels/'b.nii.gz').unlink()
    with pytest.warns(UserWarning, match='no partner'): cases = list_cases(tmp_path)
    assert sorted((c.name,c.label is None) for c in cases)==[('a',False),('b_0000',True)]

def test_a_path_may_start_at_the_project(home):
    raw(home/'data'/'x', ['a'])
    assert [c.name for c in list_cases('data/x')]==['a']

@pytest.mark.parametrize('source,match', [
    (np.zeros((2,3,4,5)), '4-D'), (np.zeros((0,4,5), np.int16), 'nothing in it'), (np.zeros(4), 'shape'),
    ('nowhere', 'there is nothing at'), (np.full((2,4,4), np.nan), 'NaN|finite'),
    (Volume(np.full((2,8,8), np.nan), (1,1,1)), 'NaN|finite'),
    (Volume(np.zeros((2,8,8,5), np.uint8), (1,1,1)), 'shape')])
def test_a_bad_source_is_told_in_a_sentence(source, match):
    with pytest.raises(InputError, match=match) as e: annotate(source, model=quick())
    assert e.value._render_traceback_()==[str(e.value)]

def test_an_empty_folder_is_told(tmp_path):
    with pytest.raises(InputError, match='without DICOM slices'): annotate(tmp_path, model=quick())

def test_a_label_of_another_size_is_told(tmp_path):
    save(tmp_path/'a.nii.gz', scan()[0])
    save(tmp_path/'l.nii.gz', scan(shape=(4,32,32), organs=((9,9,9,5),))[1])
    with pytest.raises(InputError, match='does not fit'):
        annotate(tmp_path/'a.nii.gz', tmp_path/'l.nii.gz', model=quick())

def test_a_checkpoint_that_is_not_there_is_told():
    with pytest.raises(InputError, match='no checkpoint'):
        annotate(scan()[0], checkpoint='never_run', device='cpu')

def test_8_bit_values_under_a_window_are_told():
    with pytest.raises(InputError, match='8-bit') as e:
        annotate(np.zeros((8,9), np.uint8), model=quick(), recipe=Recipe())
    assert e.value.code=='8-bit-window'

def test_one_label_array_does_not_fit_a_folder(tmp_path):
    img,lab = scan()
    save(tmp_path/'a.nii.gz', img)
    with pytest.raises(InputError, match='give a folder of labels'): annotate(tmp_path, lab, model=quick())

def test_one_label_array_fits_a_file(tmp_path):
    img,lab = scan()
    save(tmp_path/'a.nii.gz', img)
    with drawing(tmp_path/'a.nii.gz', lab) as app: assert 9 in app.session.known

@pytest.mark.parametrize('dtype', [np.float64, np.int64, bool, np.uint16, np.int32, np.float32])
def test_a_volume_may_have_any_number_type(dtype):
    a = (np.random.default_rng(0).random((2,32,40))*3).astype(dtype)
    with drawing(Volume(a, (1,1,1), 'v'), recipe=None) as app: image = app.canvas.image
    assert image['dtype'] in ('uint8','int16','uint16','int32','float32')
    assert len(image['pixels'])==32*40*np.dtype(image['dtype']).itemsize

# ---- recipe, windows and names
@pytest.mark.parametrize('array,modality,limits', [
    (scan()[0], 'MR', None), (np.full((1,4,4), -1000, np.int16), 'CT', (-500,1000)),
    (np.zeros((1,4,4,3), np.uint8), 'Photo', None)])
def test_the_recipe_is_guessed_from_the_values(array, modality, limits):
    r = guess_recipe(Volume(array, (1,1,1)))
    assert (r.modality,r.limits)==(modality,limits)

def test_small_values_fill_the_window():
    v = Volume(np.random.default_rng(0).random((1,32,32)).astype(np.float32)*.003, (1,1,1))
    lo,hi = next(iter(display_windows(View(v, Recipe(modality='MR'))).values()))
    assert 0<=lo<hi<=.003

def test_a_window_by_hand_is_none_of_the_list(app):
    app.canvas.window = [1.,2.]
    assert app.ui['window'].value is None

def test_a_window_of_the_list_is_shown(app):
    _,window = app.ui['window'].options[1]
    app.ui['window'].value = window
    assert app.canvas.window==list(window)

def names(app): return {o['id']:o['name'] for o in app.session.objects}

def test_labels_have_names_of_organs_only_where_they_are_known(app):
    assert names(app)=={9:'label 9'}
    with closing(Session(list_cases()[0], {'p':quick()})) as s:
        assert 'gallbladder' in [o['name'] for o in s.objects]

def test_labels_may_be_named():
    with drawing(*volume(), names={9:'cyst'}) as app: assert names(app)=={9:'cyst'}

def test_objects_may_be_named_without_labels():
    with drawing(volume()[0], names={4:'gallbladder', 7:'cyst'}) as app:
        assert names(app)=={4:'gallbladder', 7:'cyst'}

def test_an_object_has_the_colour_of_its_label_in_figures():
    with drawing(volume()[0], names={9:'gallbladder'}) as app:
        assert app.canvas.objects[0]['colour']=='#ff5959'


# ---- embeddings
def test_the_model_sees_what_it_saw_in_curation(tmp_path):
    images,labels = raw(tmp_path, ['a'], shape=(3,90,64), organs=((9,40,30,20),))
    curated = read_npz(find_npz(curate(images, labels, out=tmp_path/'npz', label_ids=(9,), progress=False).folder)[0])
    with closing(Session(list_cases(images, labels)[0], {'p':quick()}, Recipe())) as s:
        for i,z in enumerate(curated.z): assert np.array_equal(s.view.image(z), curated.imgs[i])

def test_embeddings_equal_the_predictors():
    view = View(volume()[0], Recipe())
    want = Predictor(lite()).set_image(view.grey(2)).embedding[0]
    assert torch.allclose(SliceCache(lite(), view).get(2), want, atol=1e-5)

@pytest.fixture(scope='module')
def embedded(tmp_path_factory):
    "A case in files, and the store of its embeddings"
    root = tmp_path_factory.mktemp('embedded')
    images,labels = raw(root, ['a'])
    npz = curate(images, labels, out=root/'npz', label_ids=(9,), progress=False).folder
    return list_cases(images, labels)[0], embed(npz, root/'s.zarr', model=quick(), device='cpu')

def test_a_store_is_used_whatever_labels_were_curated(embedded):
    case,store = embedded
    get,why = stored_slices(store, case, Recipe(label_ids=(1,)), quick())
    assert why==''
    assert np.allclose(get(1), store[store.cases[0]][1])
    assert get(99) is None

def test_a_store_of_another_recipe_is_not_used(embedded):
    case,store = embedded
    for recipe in (Recipe(window='abdomen'), Recipe(flip='ud')):
        assert stored_slices(store.path, case, recipe, quick())[1]=='the store was made with another recipe'

def test_a_store_of_another_model_is_not_used(embedded):
    case,store = embedded
    assert stored_slices(store, case, Recipe(), quick(seed=1))[1]=='the store is of another model'

def test_a_store_without_the_case_is_not_used(embedded):
    case,store = embedded
    other = DrawCase('b', case.image, case.label)
    assert stored_slices(store, other, Recipe(), quick())[1]=='the store has no such case'

def test_a_store_of_other_files_is_not_used(embedded, tmp_path):
    case,store = embedded
    save(tmp_path/'a_0000.nii.gz', scan(seed=5)[0])
    other = DrawCase(case.name, tmp_path/'a_0000.nii.gz', case.label)
    assert stored_slices(store, other, Recipe(), quick())[1]=='the store was made from other files'

def test_the_stored_embedding_and_the_encoder_agree(embedded):
    case,store = embedded
    def first(*args):
        with closing(Session(case, {'p':quick()}, Recipe(), *args)) as s:
            assert s.note==''
            return s.embedder('p').get(1).numpy()
    a,b = first(store),first()
    assert not np.array_equal(a, b) # float16 against float32: the store was read
    assert np.allclose(a, b, atol=2e-3*np.abs(b).max())

@contextmanager
def slices(**kwargs):
    with closing(SliceEmbedder(quick(), View(volume()[0], Recipe()), **kwargs)) as e: yield e

def test_neighbours_come_in_the_background():
    seen = []
    with slices(on_ready=lambda z, error: seen.append((z,error))) as e:
        e.want(2)
        wait(lambda: len(seen)==3)
        assert seen==[(2,None),(3,None),(1,None)]
        assert e.ready(1)

def test_old_slices_go():
    with slices(keep=3) as e:
        e.want(2)
        wait(lambda: len(e.cache)==3)
        e.get(5)
        assert set(e.cache)=={2,1,5} # 2 is on screen, 3 the oldest of the others

def test_the_slice_on_screen_is_never_forgotten():
    with slices(keep=2) as e:
        e.want(0)
        wait(lambda: e.ready(0) and e.ready(1))
        for z in (2,3,4,5): e.get(z)
        assert set(e.cache)=={0,5}

def test_neighbours_wait_while_somebody_draws():
    with slices() as e:
        e.busy()
        e.want(2)
        wait(lambda: e.ready(2))
        time.sleep(.25)
        assert not e.ready(3)
        wait(lambda: e.ready(3))

def test_a_cached_slice_does_not_wait_for_the_encoder():
    with slices() as e:
        e.get(0)
        with e.encoding: assert e.get(0) is e.cache[0]

def test_an_error_in_the_background_is_told():
    told = []
    with slices(stored=lambda z: 1/0, on_ready=lambda z, error: told.append(error)) as e:
        e.want(1)
        wait(lambda: told)
        assert isinstance(told[0], ZeroDivisionError)

def test_there_is_no_thread_before_a_slice_is_wanted():
    with slices() as e:
        e.get(0)
        assert e.thread is None

def test_closing_ends_the_thread():
    with slices() as e:
        e.want(0)
        wait(lambda: e.ready(0))
    wait(lambda: not e.thread.is_alive())

def test_closing_the_cell_closes_its_embedders():
    with drawing(*volume()) as app:
        e = the_embedder(app)
        wait(lambda: e.ready(app.canvas.z))
    assert e.closed and not e.cache

def test_an_error_of_the_answer_does_not_end_the_thread(app):
    e,said = the_embedder(app),[]
    wait(lambda: e.ready(app.canvas.z) and e.ready(app.canvas.z+1))
    e.on_ready = lambda z, error: (said.append(z), 1/0)
    e.cache.clear()
    for z in (0,5):
        e.want(z)
        wait(lambda: z in said)

@pytest.mark.parametrize('wait', [0, .3, 1.5])
def test_a_script_that_leaves_the_cell_open_ends_well(wait):
    "Embeddings are made in a thread; one that is inside torch when Python ends would abort the process"
    code = f'from medsam_nb.draw import annotate\nimport time\na = annotate()\ntime.sleep({wait})'
    python(code) # asserts exit code 0

def test_a_script_that_closes_the_cell_at_its_end_ends_well():
    python('from medsam_nb.draw import annotate\nannotate().close()')


# ---- prompts and history
@pytest.mark.parametrize('prompt', [
    None, 'box', {}, dict(kind='box'), dict(kind='box', box=[1,2,3]), dict(kind='box', box=[9,9,1,1]),
    dict(kind='box', box=[0,0,float('nan'),4]), dict(kind='line', line=[3,3,3,3]),
    dict(kind='points', points=[], labels=[]),
    dict(kind='points', points=[[1,999]], labels=[1]), dict(kind='points', points=[[1,2]], labels=[2]),
    dict(kind='points', points=[[1,2]]), dict(kind='points', points=[['a',2]], labels=[1])])
def test_a_bad_prompt_is_refused(prompt):
    with pytest.raises((InputError,ValueError)): as_prompt(prompt, (64,80))

@pytest.mark.parametrize('prompt,asked', [
    (BOX, dict(box=BOX['box'])), (LINE, dict(box=line_to_box(LINE['line'], (64,80)))),
    (POINTS, dict(points=POINTS['points'], point_labels=POINTS['labels']))])
def test_a_prompt_is_asked_as_it_is_drawn(s, prompt, asked):
    want = Predictor(quick(), quiet=True).set_embedding(s.embedder('pretrained').get(1), s.grid).predict(**asked)
    s.set_prompt(9, 1, prompt)
    a = s.segment('pretrained', 9, 1)
    assert np.array_equal(a.mask, want.masks[0])
    assert a.iou==want.iou[0]

def test_an_outline_is_asked_with_its_mask_and_its_box(s):
    s.set_prompt(9, 1, OUTLINE)
    asked = s.prompts[9,1].asked(s.grid)
    p = Predictor(quick(), quiet=True).set_embedding(s.embedder('pretrained').get(1), s.grid)
    want = p.predict(asked['boxes'], mask=asked['masks'][:,0])
    assert np.array_equal(s.segment('pretrained', 9, 1).mask, want.masks[0])

def test_a_mask_is_asked_for_once(s):
    s.set_prompt(9, 1, BOX)
    assert s.segment('pretrained', 9, 1) is s.segment('pretrained', 9, 1)

def test_a_diameter_is_measured_in_millimetres():
    tall = Line((10.,20.,30.,20.)).around((64,80), (5,1))
    flat = line_to_box([10,20,30,20], (64,80))
    assert np.allclose(tall[[0,2]], flat[[0,2]])
    assert np.isclose((tall[3]-tall[1])*5, flat[3]-flat[1])

def test_every_state_comes_back():
    h = History()
    states = [h.prompts]
    for z in range(3):
        h.put((9,z), DRAWN)
        states.append(h.prompts)
    for want in states[-2::-1]: assert h.undo() and h.prompts==want
    assert not h.undo()
    for want in states[1:]: assert h.redo() and h.prompts==want
    assert not h.redo()

def test_something_new_ends_redo():
    h = History()
    h.put((9,0), DRAWN)
    h.undo()
    h.put((9,5), DRAWN)
    assert not h.redo()

def test_a_drag_is_one_step_back(s):
    s.set_prompt(9, 1, BOX)
    for x in range(5): s.set_prompt(9, 1, dict(kind='box', box=[20.+x,15.,50.,45.]), remember=False)
    s.set_prompt(9, 1, dict(kind='box', box=[25.,15.,50.,45.]))
    assert s.undo() and s.prompts[9,1]==DRAWN
    assert s.undo() and s.prompts=={}
    assert s.redo() and s.redo() and s.prompts[9,1].box[0]==25

def test_the_same_again_is_no_step(s):
    s.set_prompt(9, 1, BOX)
    s.set_prompt(9, 1, BOX)
    assert len(s.past)==1

def test_taking_away_nothing_is_no_step(s):
    s.set_prompt(9, 1, BOX)
    s.undo()
    s.set_prompt(9, 2, None)
    assert s.redo()

def test_a_new_object_gets_the_next_id_and_a_name(s):
    assert s.add_object('cyst')==10
    assert s.add_object('', 300)==300
    assert [o['name'] for o in s.objects]==['label 9','cyst','object 300']

def test_objects_have_different_colours(s):
    for name in 'abc': s.add_object(name)
    assert len({o['colour'] for o in s.objects})==4

def test_an_id_is_given_once(s):
    with pytest.raises(InputError, match='already'): s.add_object('again', 9)

@pytest.mark.parametrize('id', [0, -1, 70000])
def test_an_id_that_no_file_can_hold_is_refused(s, id):
    with pytest.raises(InputError, match='from 1 to 65535'): s.add_object('bad', id)

@pytest.mark.parametrize('object', [77, None, [9]])
def test_an_object_that_is_not_there_has_no_prompt(s, object):
    with pytest.raises(InputError, match='no object'): s.set_prompt(object, 0, BOX)

@pytest.mark.parametrize('z', [-1, 6, 1.5, None])
def test_a_slice_that_is_not_there_has_no_prompt(s, z):
    with pytest.raises(InputError, match='no slice'): s.set_prompt(9, z, BOX)

def test_the_smaller_mask_lies_on_top(s):
    s.add_object('b', 2)
    s.set_prompt(9, 1, dict(kind='box', box=[0.,0.,80.,64.]))
    s.set_prompt(2, 1, dict(kind='box', box=[25.,20.,45.,40.]))
    masks = {o:s.segment('pretrained', o, 1).mask for o in (9,2)}
    small,big = sorted(masks, key=lambda o: masks[o].sum())
    m = s.label_map()
    assert np.array_equal(m[1]==small, masks[small])
    assert np.array_equal(m[1]==big, masks[big]&~masks[small])
    assert not m[[0,2,3,4,5]].any()

def test_scores_are_those_of_the_whole_slice(s):
    s.set_prompt(9, 1, BOX)
    a,t = s.segment('pretrained', 9, 1),s.truth(9, 1)
    assert np.isclose(a.dsc, dsc(a.mask, t))
    assert np.isclose(a.nsd, nsd(a.mask, t, (.8,.8), 1.))

def test_there_are_no_scores_without_a_label():
    with closing(Session(DrawCase('a', volume()[0]), {'p':quick()}, Recipe())) as s:
        s.set_prompt(1, 1, BOX)
        a = s.segment('p', 1, 1)
        assert a.dsc is None and a.nsd is None
        assert s.objects[0]['name']=='object 1'
        assert s.picture(1)['truth']==[]

@pytest.fixture
def once():
    "A session whose organ is on the first of three slices only"
    with closing(session(shape=(3,64,80), zs=[0])) as s: yield s

def test_a_mask_where_the_organ_is_not_scores_zero(once):
    once.set_prompt(9, 2, BOX)
    a = once.segment('pretrained', 9, 2)
    assert a.dsc==(0 if a.mask.any() else 1)
    assert once.picture(2)['truth']==[]

def test_an_object_that_the_label_does_not_know_has_no_score(once):
    once.add_object('cyst')
    once.set_prompt(10, 0, BOX)
    assert once.segment('pretrained', 10, 0).dsc is None


# ---- recipes that turn the slices
@pytest.fixture(params=['ud','lr','udlr'])
def turned(request):
    "A drawing cell whose model sees the slices turned, and the recipe"
    recipe = Recipe(flip=request.param)
    with drawing(*volume(), recipe=recipe) as app: yield app, recipe

@pytest.mark.parametrize('prompt', [BOX, LINE], ids=['box','line'])
def test_a_turned_recipe_gives_the_mask_of_predict_volume(turned, prompt):
    app,recipe = turned
    app.set_prompt(9, 2, prompt)
    want = predict_volume(Predictor(quick()), app.volume, app.boxes, recipe, progress=False)
    assert want.any() and np.array_equal(app.masks, want)

def test_a_turned_recipe_gives_the_mask_of_a_turned_volume(turned):
    app,recipe = turned
    app.set_prompt(9, 2, POINTS)
    grid,(H,W) = app.session.grid,app.volume.shape[1:]
    straight = replace(app.volume, array=np.stack([grid.turn(a) for a in app.volume.array]))
    x,y = np.array(POINTS['points']).T
    there = np.stack([W-x if 'lr' in recipe.flip else x, H-y if 'ud' in recipe.flip else y], 1)
    with drawing(straight) as b:
        b.set_prompt(1, 2, dict(POINTS, points=there.tolist()))
        agree = grid.turn(b.masks[2]>0)==(app.masks[2]>0)
    assert agree.mean()>.99

def test_a_turned_recipe_leaves_truth_and_scores_where_the_slice_lies(turned):
    app,_ = turned
    app.set_prompt(9, 2, BOX)
    a,t = app.session.segment('pretrained', 9, 2),app.session.label.array[2]==9
    assert np.array_equal(app.session.truth(9, 2), t)
    assert np.isclose(a.dsc, dsc(a.mask, t))

def test_a_turned_recipe_sends_the_slice_as_it_lies(turned):
    app,_ = turned
    sent = app.canvas.image
    assert np.array_equal(np.frombuffer(sent['pixels'], np.int16).reshape(64,80), app.volume.array[sent['z']])

def test_a_turned_recipe_carries_the_box_of_the_mask_as_it_lies(turned):
    app,_ = turned
    d = Discs(app.session, [9]*6)
    app.set_prompt(9, 2, BOX)
    list(app.session.carry('pretrained', 9, 2, margin=2))
    assert d.boxes[3]==[34-9-2, 30-9-2, 34+9+2, 30+9+2]

def test_a_turned_recipe_saves_masks_where_the_scan_lies(turned, tmp_path):
    app,_ = turned
    app.set_prompt(9, 2, BOX)
    path,_ = app.save(tmp_path/'m.nii.gz')
    assert np.array_equal(read_volume(path, kind='label').array, app.masks)


# ---- carrying
class Discs:
    "Stands in for a session's decoder: discs whose radius depends on the slice"
    def __init__(self, s, radii):
        self.s,self.boxes,self.radii = s,{},radii
        s.segment = self.segment
    def segment(self, decoder, object, z, prompt=None):
        prompt = prompt or self.s.prompts[object,z]
        self.boxes[z] = list(prompt.box)
        r = self.radii[z]
        return Answer(prompt, disc((64,80), 30, 34, r) if r else np.zeros((64,80), bool), .9)

def carried(s, z=2): return list(s.carry('pretrained', 9, z))

@pytest.mark.parametrize('radii,reached', [
    ([9,10,12,12,11,9], [3,4,5,1,0]), ([0,10,12,12,3,9], [3,1]), ([9,9,12,0,11,9], [1,0]), ([9,2,12,12,30,9], [3])])
def test_carrying_stops_where_the_mask_dies(s, radii, reached):
    Discs(s, radii)
    s.set_prompt(9, 2, BOX)
    assert carried(s)==reached
    assert {z for _,z in s.prompts}=={2,*reached}

def test_one_undo_takes_back_the_journey(s):
    Discs(s, [9]*6)
    s.set_prompt(9, 2, BOX)
    carried(s)
    assert s.undo() and set(s.prompts)=={(9,2)}
    assert s.redo() and len(s.prompts)==6

def test_each_box_comes_from_the_last_mask(s):
    d = Discs(s, [9,10,12,12,11,9])
    s.set_prompt(9, 2, BOX)
    list(s.carry('pretrained', 9, 2, margin=2))
    def around(r): return [34-r-2, 30-r-2, 34+r+2, 30+r+2]
    assert (d.boxes[3],d.boxes[1],d.boxes[5])==(around(12),around(12),around(11))

def test_what_was_drawn_by_hand_is_never_overwritten(s):
    Discs(s, [9]*6)
    s.set_prompt(9, 2, BOX)
    s.set_prompt(9, 4, BOX)
    assert carried(s)==[3,1,0]
    assert s.prompts[9,4]==DRAWN

def test_what_was_carried_may_be_carried_again(s):
    Discs(s, [9]*6)
    s.set_prompt(9, 2, BOX)
    assert carried(s)==carried(s)

def test_what_was_carried_and_then_drawn_is_drawn(s):
    Discs(s, [9]*6)
    s.set_prompt(9, 2, BOX)
    carried(s)
    s.set_prompt(9, 3, BOX)
    assert carried(s)==[1,0]
    assert s.prompts[9,3]==DRAWN

def test_a_journey_that_is_broken_off_keeps_what_it_reached(s):
    Discs(s, [9]*6)
    s.set_prompt(9, 2, BOX)
    for k in s.carry('pretrained', 9, 2): break
    assert set(s.prompts)=={(9,2),(9,3)}
    assert s.undo() and set(s.prompts)=={(9,2)}

def test_a_journey_stops_when_its_slice_is_taken_away(s):
    Discs(s, [9]*6)
    s.set_prompt(9, 2, BOX)
    for k in s.carry('pretrained', 9, 2):
        if k==3: s.undo()
    assert s.prompts=={(9,2):DRAWN} or set(s.prompts)=={(9,2),(9,1),(9,0)}


# ---- keeping
@pytest.fixture
def oblique(tmp_path):
    "A drawing cell on a scan that lies turned in the room, with a box drawn, and the scan's file"
    img,lab = scan()
    place = dict(origin=(5,6,7), direction=[0,-1,0,1,0,0,0,0,-1])
    save(tmp_path/'i.nii.gz', img, **place)
    save(tmp_path/'l.nii.gz', lab, **place)
    with drawing(tmp_path/'i.nii.gz', tmp_path/'l.nii.gz') as app:
        app.session.set_prompt(9, 1, dict(kind='box', box=[10.,10.,40.,40.]))
        yield app, tmp_path/'i.nii.gz'

def test_saved_masks_lie_where_the_scan_lies(oblique, tmp_path):
    app,image = oblique
    mask,_ = app.save(tmp_path/'out.nii.gz')
    a,b = (sitk.ReadImage(str(f)) for f in (image,mask))
    for of in ('GetSize','GetOrigin','GetDirection','GetSpacing'):
        assert np.allclose(getattr(a, of)(), getattr(b, of)())

def test_saved_masks_are_those_on_show(oblique, tmp_path):
    app,_ = oblique
    mask,_ = app.save(tmp_path/'out.nii.gz')
    assert app.masks.any() and np.array_equal(read_volume(mask, kind='label').array, app.masks)

@pytest.mark.parametrize('there', ['out.nii.gz','out.prompts.json'])
def test_saving_replaces_nothing_unasked(oblique, tmp_path, there):
    app,_ = oblique
    (tmp_path/there).write_text('mine')
    with pytest.raises(InputError, match='exists already'): app.save(tmp_path/'out.nii.gz')
    assert (tmp_path/there).read_text()=='mine'
    assert {f.name for f in tmp_path.glob('out*')}=={there}

def test_saving_replaces_when_asked(oblique, tmp_path):
    app,_ = oblique
    for _ in range(2): mask,prompts = app.save(tmp_path/'out.nii.gz', overwrite=True)
    assert mask.exists() and prompts.exists()

@pytest.fixture
def photo(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40,50), dtype=np.uint8)).save(tmp_path/'a.png')
    with drawing(tmp_path/'a.png', recipe=None) as app: yield app

def test_a_picture_is_shown_without_slider_and_millimetres(photo):
    assert photo.ui['path'].value.endswith('a_mask.png')
    assert photo.ui['slice'].layout.display=='none'
    assert photo.session.picture(0)['unit']=='px'

def test_the_mask_of_a_picture_is_saved_as_png(photo, tmp_path):
    photo.session.set_prompt(1, 0, dict(kind='box', box=[5.,5.,40.,30.]))
    mask,_ = photo.save(tmp_path/'m.png')
    assert np.array_equal(np.asarray(Image.open(mask)), photo.masks[0])

@pytest.fixture
def kept(app, tmp_path):
    "A drawing cell with three prompts of two objects, saved in p.json"
    app.session.add_object('cyst')
    for o,z,p in ((9,1,BOX),(10,2,LINE),(10,3,POINTS)): app.session.set_prompt(o, z, p)
    app.session.save_prompts(tmp_path/'p.json')
    return app, tmp_path/'p.json'

@pytest.mark.parametrize('given', [lambda f: f, str, lambda f: json.loads(f.read_text())], ids=['path','str','dict'])
def test_prompts_come_back(kept, given):
    app,file = kept
    with drawing(*volume(), prompts=given(file)) as b:
        assert b.prompts==app.prompts
        assert b.session.objects==app.session.objects
        assert np.array_equal(b.masks, app.masks)

def test_prompts_are_saved_as_in_the_version_before(kept):
    _,file = kept
    data = json.loads(file.read_text())
    assert list(data)==['format','version','case','shape','objects','prompts']
    assert data['prompts']==[dict(z=1, object=9, **BOX), dict(z=2, object=10, **LINE), dict(z=3, object=10, **POINTS)]

def test_colours_of_saved_objects_come_back(kept):
    data = json.loads(kept[1].read_text())
    data['objects'].append(dict(id=77, name='old', colour='#0a84ff'))
    with drawing(*volume(), prompts=data) as b:
        assert b.canvas.objects[-1]==dict(id=77, name='old', colour='#0a84ff')

GIVEN = dict(id=2, name='a', colour='#ff9500')

@pytest.mark.parametrize('change,match', [
    (dict(format='x'), 'not prompts of medsam_nb'), (dict(shape=[1,2,3]), 'drawn on a volume of shape'),
    (dict(shape=5), 'drawn on a volume'), (dict(prompts=[dict(z=1)]), 'damaged'), (dict(objects=3), 'damaged'),
    (dict(prompts=[dict(z=99, object=9, **BOX)]), 'not there'),
    (dict(prompts=[dict(z=1, object=5, **BOX)]), 'not there'),
    (dict(prompts=[dict(z=1, object=9, kind='box', box=[5,5,1,1])]), 'inverted'),
    (dict(objects=[dict(GIVEN, id=70000)]), 'damaged'), (dict(objects=[dict(GIVEN, id=0)]), 'damaged'),
    (dict(objects=[dict(GIVEN, colour='red')]), 'damaged'), (dict(objects=[GIVEN,GIVEN]), 'damaged')])
def test_a_bad_prompt_file_changes_nothing(s, change, match):
    s.set_prompt(9, 2, BOX)
    before = s.prompts
    with pytest.raises(InputError, match=match): s.from_json(dict(s.to_json(), **change))
    assert s.prompts is before

def test_a_prompt_file_that_is_not_there_is_told(s):
    with pytest.raises(InputError, match='cannot be read'): s.from_json('nowhere.json')

def test_prompts_go_to_the_case_they_were_drawn_on(two, tmp_path):
    two.ui['case'].value = 1
    gesture(two)
    with drawing(tmp_path, prompts=two.session.to_json()) as b:
        assert b.volume.case=='b'
        assert len(b.prompts)==1

def test_prompts_of_another_case_are_refused(two, tmp_path):
    saved = dict(two.session.to_json(), case='c')
    with pytest.raises(InputError, match='no such case'):
        annotate(tmp_path, model=quick(), recipe=Recipe(), prompts=saved)


# ---- the application, without a browser
def test_every_kind_of_prompt_has_a_tool(app):
    tools = [name for _,name in app.ui['tool'].options]
    assert tools==[name for k in KINDS.values() for name,*_ in k.tools]+['ruler']
    assert len(app.ui['tool'].tooltips)==len(tools)

@pytest.mark.parametrize('prompt,told', [(BOX, False), (LINE, False), (POINTS, True), (OUTLINE, True)],
                         ids=lambda p: p['kind'] if isinstance(p, dict) else '')
def test_box_trained_weights_asked_with_more_than_boxes_are_told(ready, prompt, told, recwarn):
    gesture(ready, prompt)
    assert ('lite was trained with boxes only' in ready.canvas.status)==told
    assert not [w for w in recwarn if 'boxes only' in str(w.message)] # and nowhere else

def test_the_note_goes_with_the_clicks(ready):
    gesture(ready, POINTS)
    gesture(ready)
    assert ready.canvas.status==''

def test_a_gesture_is_answered(ready):
    gesture(ready, seq=5)
    a,z = ready.canvas.answer,ready.canvas.z
    assert (a['seq'],a['z'],a['prompts'])==(5,z,{'9':BOX})
    o, = a['panes'][0]['objects']
    assert np.array_equal(bits(o['bits'], (64,80)), ready.masks[z]==9)
    assert o['id']==9 and 0<=o['dsc']<=1

def test_boxes_are_a_table_for_predict_volume(ready):
    gesture(ready)
    assert list(ready.boxes.columns)==['z','label','x0','y0','x1','y1']
    masks = predict_volume(Predictor(quick()), ready.volume, ready.boxes, Recipe(), progress=False)
    assert np.array_equal(masks, ready.masks)

def test_clicks_are_no_boxes(app):
    for z,p in ((3,BOX),(1,LINE),(2,POINTS)): app.session.set_prompt(9, z, p)
    assert app.boxes.z.tolist()==[1,3]
    assert np.allclose(app.boxes.iloc[0,2:], line_to_box(LINE['line'], (64,80), spacing=(.8,.8)))

def test_a_gesture_before_the_embedding_is_answered_later(ready):
    e,go = the_embedder(ready),threading.Event()
    load = e._load
    def slow(z):
        go.wait(10)
        return load(z)
    e.cache.clear()
    e._load = slow
    ready.show(ready.canvas.z)
    gesture(ready, seq=3)
    assert ready.canvas.answer['panes'][0]['objects']==[]
    assert ready.canvas.answer['prompts']=={'9':BOX}
    assert 'preparing' in ready.canvas.status
    go.set()
    wait(lambda: ready.canvas.answer['panes'][0]['objects'])
    assert ready.canvas.answer['seq']==3 and ready.canvas.status==''

@pytest.mark.parametrize('bad,match', [
    (dict(prompt=dict(kind='box', box=[9,9,1,1])), 'inverted'), (dict(object=77), 'no object 77'),
    (dict(prompt=dict(kind='wish')), 'kind')])
def test_a_bad_gesture_becomes_a_sentence_and_changes_nothing(ready, bad, match):
    gesture(ready)
    before = ready.session.prompts
    gesture(ready, **bad)
    assert match in ready.canvas.status
    assert ready.session.prompts is before

def test_a_good_gesture_takes_the_sentence_away(ready):
    gesture(ready, object=77)
    gesture(ready)
    assert ready.canvas.status==''

def test_the_slice_that_is_asked_for_is_shown(two):
    two.canvas.z = 3
    image = two.canvas.image
    assert image['z']==3
    assert np.array_equal(np.frombuffer(image['pixels'], np.int16).reshape(64,80), two.volume.array[3])

def test_what_was_drawn_on_a_case_comes_back_with_it(two):
    assert [name for name,_ in two.ui['case'].options]==['a','b']
    gesture(two)
    two.ui['case'].value = 1
    assert two.volume.case=='b' and two.prompts==[]
    two.ui['case'].value = 0
    assert two.volume.case=='a' and len(two.prompts)==1

def test_undo_after_coming_back_does_not_empty_a_case(two):
    gesture(two)
    two.ui['case'].value = 1
    two.ui['case'].value = 0
    two.undo()
    assert len(two.prompts)==1

def test_a_case_that_cannot_be_read_is_told_and_the_old_one_stays(two, tmp_path):
    (tmp_path/'images'/'b_0000.nii.gz').write_bytes(b'no')
    gesture(two)
    two.ui['case'].value = 1
    assert 'b_0000.nii.gz' in two.canvas.status
    assert (two.volume.case,two.ui['case'].value,len(two.prompts))==('a',0,1)

@pytest.fixture(scope='module')
def tuned(tmp_path_factory):
    "The folder of a run whose decoder differs and whose encoder does not"
    state = deepcopy(lite().state_dict())
    for k in state:
        if 'mask_decoder.output_hypernetworks' in k: state[k] = state[k]*1.3
    run = tmp_path_factory.mktemp('run')
    torch.save(state, run/'best.pth')
    return run

@pytest.fixture(scope='module')
def models(tuned):
    "A drawing cell with two decoders and a box"
    with drawing(*volume(), model=lite(), checkpoint=tuned) as app:
        app.session.embedder('pretrained').get(app.canvas.z)
        gesture(app, dict(kind='box', box=[12.,10.,56.,50.]))
        yield app

def test_two_decoders_share_an_encoder(models):
    assert models.views==['pretrained','fine-tuned','both']
    assert len(models.session.embedders)==1
    assert models.sams['fine-tuned'].image_encoder is lite().image_encoder

def test_the_fine_tuned_decoder_is_shown_first(tuned):
    with drawing(np.zeros((1,8,8), np.int16), model=lite(), checkpoint=tuned) as app:
        assert app.decoder=='fine-tuned'

def test_two_decoders_answer_apart_and_side_by_side(models):
    seen = {'pretrained':[], 'fine-tuned':[]}
    for view in models.views:
        models.ui['decoder'].value = view
        for p in models.canvas.answer['panes']: seen[p['name']].append(p['objects'][0]['bits'])
    assert [len(v) for v in seen.values()]==[2,2]
    assert [len(set(v)) for v in seen.values()]==[1,1]
    assert seen['pretrained'][0]!=seen['fine-tuned'][0]

def test_the_buttons_undo_and_redo(ready):
    gesture(ready)
    ready.ui['undo'].click()
    assert ready.prompts==[] and ready.canvas.answer['prompts']=={}
    ready.ui['undo'].click()
    assert ready.canvas.status=='nothing to undo'
    ready.ui['redo'].click()
    assert len(ready.prompts)==1

def test_undo_is_a_gesture_too(ready):
    gesture(ready)
    ready._on_gestures(Change([dict(seq=ready.seq+1, step='undo', done=True)]))
    assert ready.prompts==[]

def test_the_button_clear_takes_the_prompt_away(ready):
    gesture(ready)
    ready.ui['clear'].click()
    ready.ui['clear'].click()
    assert ready.prompts==[]

def test_the_button_add_makes_an_object_and_picks_it(ready):
    ready.ui['name'].value = 'cyst'
    ready.ui['add'].click()
    assert ready.canvas.active==ready.ui['object'].value==10
    assert ready.canvas.objects[-1]['name']=='cyst'

def test_the_picker_of_objects_picks(ready):
    ready.session.add_object('cyst')
    ready._set_objects(10)
    ready.ui['object'].value = 9
    assert ready.canvas.active==9

def test_the_picker_of_tools_picks(ready):
    ready.ui['tool'].value = 'line'
    assert ready.canvas.tool=='line'

def test_the_button_save_says_what_it_did(ready, tmp_path):
    ready.ui['path'].value = str(tmp_path/'m.nii.gz')
    ready.ui['save'].click()
    assert 'nothing to save' in ready.canvas.status
    gesture(ready)
    ready.ui['save'].click()
    assert 'wrote' in ready.canvas.status and (tmp_path/'m.prompts.json').exists()
    ready.ui['save'].click()
    assert 'exists already' in ready.canvas.status
    ready.ui['overwrite'].value = True
    ready.ui['save'].click()
    assert 'wrote' in ready.canvas.status

def test_the_button_carry_works_in_its_own_thread(app):
    app.session.embedder('pretrained').get(app.canvas.z)
    Discs(app.session, [9]*6)
    gesture(app, z=2)
    app.canvas.z = 2
    app.ui['carry'].click()
    wait(lambda: app.ui['carry'].description=='carry on' and 'carried from' in app.canvas.status)
    assert app.canvas.status=='carried from slice 2 to 5 more: 0 to 5'
    assert len(app.prompts)==6

def test_carrying_nothing_is_told(app):
    app.ui['carry'].click()
    wait(lambda: 'draw one first' in app.canvas.status)

def test_many_threads_at_once(app):
    "Gestures, slices and the background worker at the same time end in a consistent state"
    errors = []
    def work(k):
        try:
            for i in range(10):
                app.session.set_prompt(9, (k+i)%6, dict(kind='box', box=[10.+k,10.+i,50.,50.]))
                for f in (app.refresh, app.undo, app.redo): f()
                app.masks
        except Exception as e: errors.append(e)
    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for t in threads: t.start()
    for z in (1,4,2,5,0): app.canvas.z = z
    for t in threads: t.join()
    assert not errors
    assert app.session.prompts is app.session.settled
    app.refresh()
    here = {str(o):p.to_dict() for (o,z),p in app.session.prompts.items() if z==app.canvas.z}
    assert app.canvas.answer['prompts']==here


# ---- what went wrong once
def test_a_drag_taken_back_leaves_nothing(app):
    gesture(app, done=False)
    gesture(app, WIDE, done=False)
    gesture(app, None)
    assert app.session.prompts==app.session.settled=={}
    assert app.session.past==[]

def test_a_drag_is_not_kept_before_its_end(app):
    gesture(app)
    gesture(app, WIDE, done=False)
    assert app.prompts[0]['box']==BOX['box']
    assert app.session.prompts!=app.session.settled

def test_another_slice_ends_a_drag(app):
    gesture(app)
    gesture(app, WIDE, done=False)
    app.canvas.z = (app.canvas.z+1)%6
    assert app.session.prompts==app.session.settled

def drawn(seq, z, case=0, **kwargs):
    return dict(seq=seq, case=case, z=z, object=9, prompt=BOX, done=True)|kwargs

def test_gestures_come_once_and_in_order(two):
    undo = drawn(3, 2, step='undo')
    two._on_gestures(Change([drawn(1, 0), drawn(2, 1), undo]))
    assert [p['z'] for p in two.prompts]==[0]
    two._on_gestures(Change([drawn(2, 1), undo, drawn(4, 3)])) # sent again, done once
    assert [p['z'] for p in two.prompts]==[0,3]

def test_gestures_go_to_their_case(two):
    two.ui['case'].value = 1
    two._on_gestures(Change([drawn(5, 2, case=0)]))
    assert two.prompts==[]
    assert (two.canvas.answer['seq'],two.canvas.image['case'])==(5,1)
