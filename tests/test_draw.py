"The drawing cell without a browser: what there is to draw on, prompts, history, carrying, saving, and what a gesture is answered with"
import json, threading, time
import numpy as np, pytest
from PIL import Image
from medsam_nb.core import InputError
from medsam_nb.curate import curate
from medsam_nb.draw import Annotator, DrawCase, Session, SliceEmbedder, annotate, guess_recipe, list_cases, stored_slices
from medsam_nb.embed import embed
from medsam_nb.predict import Predictor, predict_volume
from medsam_nb.prompt import Box, Line, as_prompt, line_to_box
from medsam_nb.view import Recipe, View
from medsam_nb.volume import Volume, read_volume
from tiny import dicom, disc, lite, python, quick, raw, save, scan

def volume(shape=(6,64,80), **kw):
    img, lab = scan(shape=shape, **kw)
    return Volume(img, (3,.8,.8), 'a'), Volume(lab, (3,.8,.8), 'a')

def session(model=None, **kw):
    vol, lab = volume(**kw)
    return Session(DrawCase('a', vol, lab), {'pretrained': model or quick()}, recipe=Recipe())

BOX = dict(kind='box', box=[20.,15.,50.,45.])
DRAWN = Box((20.,15.,50.,45.))

@pytest.fixture
def s():
    s = session(); yield s
    s.close()

@pytest.fixture
def app():
    vol, lab = volume()
    app = annotate(vol, lab, model=quick(), recipe=Recipe()); yield app
    app.close()

def wait(condition, seconds=30):
    end = time.monotonic()+seconds
    while not condition():
        assert time.monotonic() < end, 'it did not happen in time'
        time.sleep(.01)

class Change:
    "What a trait's observer is given"
    def __init__(self, new): self.new = new

def gesture(app, prompt=BOX, z=None, object=9, done=True, seq=None, **kw):
    app._on_gestures(Change([dict(seq=app.seq+1 if seq is None else seq, z=app.canvas.z if z is None else z, object=object, prompt=prompt, done=done, **kw)]))

def bits(data, shape): return np.unpackbits(np.frombuffer(data, np.uint8))[:np.prod(shape)].reshape(shape).astype(bool)


# ---- what there is to draw on ----
def test_sources(tmp_path):
    img, lab = scan()
    assert list_cases(img)[0].read()[0].shape == img.shape
    assert list_cases(img[0])[0].read()[0].shape == (1,64,80)
    rgb = np.zeros((8,9,3), np.uint8); assert list_cases(rgb)[0].read()[0].array.shape == (1,8,9,3)
    assert list_cases(np.zeros((2,8,9,3), np.uint8))[0].read()[0].array.shape == (2,8,9,3)
    vol, l = list_cases(img, lab)[0].read(); assert l.shape == vol.shape
    raw(tmp_path/'f', ['FLARE22_Tr_0001', 'FLARE22_Tr_0002'])
    assert [c.name for c in list_cases(tmp_path/'f')] == ['FLARE22_Tr_0001', 'FLARE22_Tr_0002'] and list_cases(tmp_path/'f')[0].read()[1] is not None
    assert [c.label for c in list_cases(tmp_path/'f'/'images')] == [None, None]
    assert len(list_cases(tmp_path/'f'/'images', tmp_path/'f'/'labels')) == 2
    file = tmp_path/'f'/'images'/'FLARE22_Tr_0001_0000.nii.gz'
    assert list_cases(file, tmp_path/'f'/'labels'/'FLARE22_Tr_0001.nii.gz')[0].read()[1].array.max() == 9
    (tmp_path/'p').mkdir()
    for k in 'ba': Image.fromarray(np.full((20,30), 7, np.uint8)).save(tmp_path/'p'/f'{k}.png')
    assert [c.name for c in list_cases(tmp_path/'p')] == ['a', 'b'] and list_cases(tmp_path/'p')[0].read()[0].shape == (1,20,30)
    case, = list_cases(); assert case.name == 'Phantom' and case.read()[1].array.max() == 13

def test_a_dicom_folder(tmp_path):
    img, _ = scan(shape=(3,16,20))
    for z in range(3): dicom(tmp_path/f'{z}.dcm', img[z:z+1], g0008_0060='CT', g0020_000e='1.2.3.4', g0020_000d='1.2.3', g0020_0032=f'0\\0\\{z*3}', g0020_0037='1\\0\\0\\0\\1\\0', g0020_0013=str(z), g0008_0018=f'1.2.3.4.{z+1}', g0018_0050='3')
    case, = list_cases(tmp_path)
    assert case.name == tmp_path.name and case.read()[0].shape == (3,16,20)

@pytest.mark.parametrize('source,match', [(np.zeros((2,3,4,5)), '4-D'), (np.zeros((0,4,5), np.int16), 'nothing in it'), (np.zeros(4), 'shape'), ('nowhere', 'There is nothing at'), (np.full((2,4,4), np.nan), 'NaN|finite')])
def test_bad_sources_are_told_in_a_sentence(source, match):
    with pytest.raises(InputError, match=match) as e: annotate(source, model=quick())
    assert e.value._render_traceback_() == [str(e.value)]

def test_bad_files_are_told_in_a_sentence(tmp_path):
    (tmp_path/'empty').mkdir()
    with pytest.raises(InputError, match='without DICOM slices'): annotate(tmp_path/'empty', model=quick())
    save(tmp_path/'a.nii.gz', scan()[0]); save(tmp_path/'l.nii.gz', scan(shape=(4,32,32), organs=((9,9,9,5),))[1])
    with pytest.raises(InputError, match='does not fit'): annotate(tmp_path/'a.nii.gz', tmp_path/'l.nii.gz', model=quick())
    with pytest.raises(InputError, match='no checkpoint'): annotate(tmp_path/'a.nii.gz', model='lite', checkpoint='never_run', device='cpu')

def test_the_recipe_is_guessed_from_the_values():
    assert guess_recipe(volume()[0]).modality == 'MR'
    assert guess_recipe(Volume(np.full((1,4,4), -1000, np.int16), (1,1,1))).limits == (-500,1000)
    assert guess_recipe(Volume(np.zeros((1,4,4,3), np.uint8), (1,1,1))).modality == 'Photo'

def test_names_of_organs_only_where_they_are_known():
    vol, lab = volume(); a = annotate(vol, lab, model=quick()); b = annotate(vol, lab, model=quick(), names={9:'cyst'})
    assert [o['name'] for o in a.session.objects] == ['label 9'] and [o['name'] for o in b.session.objects] == ['cyst']
    a.close(); b.close()
    assert 'gallbladder' in [o['name'] for o in Session(list_cases()[0], {'p': quick()}).objects]


# ---- embeddings ----
def test_the_model_sees_what_it_saw_in_curation(tmp_path):
    images, labels = raw(tmp_path, ['a'], shape=(3,90,64), organs=((9,40,30,20),))
    from medsam_nb.curate import find_npz, read_npz
    res = curate(images, labels, out=tmp_path/'npz', label_ids=(9,), progress=False)
    curated, vol, recipe = read_npz(find_npz(res.folder)[0]), read_volume(images/'a_0000.nii.gz'), Recipe()
    for i, z in enumerate(curated.z): assert np.array_equal(View(vol, recipe).image(z), curated.imgs[i])

def test_embeddings_equal_the_predictors():
    vol, _ = volume(); e = SliceEmbedder(lite(), View(vol, Recipe()))
    assert np.allclose(e.get(2).numpy(), Predictor(lite()).set_image(e.view.grey(2)).embedding[0].numpy(), atol=1e-5)
    e.close()

def test_the_store_is_used_where_it_fits(tmp_path):
    images, labels = raw(tmp_path, ['a'])
    npz = curate(images, labels, out=tmp_path/'npz', label_ids=(9,), progress=False).folder
    store = embed(npz, tmp_path/'s.zarr', model=quick(), device='cpu')
    case, = list_cases(images, labels)
    get, why = stored_slices(store, case, Recipe(label_ids=(1,)), quick())
    assert why == '' and np.allclose(get(1), store[store.cases[0]][1]) and get(99) is None
    assert stored_slices(str(tmp_path/'s.zarr'), case, Recipe(window='abdomen'), quick())[1] == 'the store was made with another recipe'
    assert stored_slices(store, case, Recipe(), quick(seed=1))[1] == 'the store is of another model'
    assert stored_slices(store, DrawCase('b', case.image, case.label), Recipe(), quick())[1] == 'the store has no such case'
    save(images/'a_0000.nii.gz', scan(seed=5)[0])
    assert stored_slices(store, case, Recipe(), quick())[1] == 'the store was made from other files'

def test_the_stored_embedding_and_the_encoder_agree(tmp_path):
    images, labels = raw(tmp_path, ['a'])
    store = embed(curate(images, labels, out=tmp_path/'npz', label_ids=(9,), progress=False).folder, tmp_path/'s.zarr', model=quick(), device='cpu')
    case, = list_cases(images, labels)
    with_store, without = Session(case, {'p': quick()}, Recipe(), store), Session(case, {'p': quick()}, Recipe())
    assert with_store.note == '' and with_store.embedders[quick().encoder_sha256].stored is not None
    a, b = (s.embedder('p').get(1).numpy() for s in (with_store, without))
    assert not np.array_equal(a, b) and np.allclose(a, b, atol=2e-3*np.abs(b).max())   # float16 against float32
    with_store.close(); without.close()

def test_neighbours_come_in_the_background_and_old_slices_go():
    seen = []
    e = SliceEmbedder(quick(), View(volume()[0], Recipe()), on_ready=lambda z, error: seen.append((z, error)), keep=3)
    e.want(2); wait(lambda: len(seen) == 3)
    assert seen == [(2,None), (3,None), (1,None)] and e.ready(1)
    e.get(5); assert not e.ready(3) and e.ready(2) and e.ready(5) and len(e.cache) == 3
    e.close()

def test_neighbours_wait_while_somebody_draws():
    e = SliceEmbedder(quick(), View(volume()[0], Recipe()))
    e.busy(); e.want(2); wait(lambda: e.ready(2))
    time.sleep(.25); assert not e.ready(3)
    wait(lambda: e.ready(3)); e.close()

def test_a_cached_slice_does_not_wait_for_the_encoder():
    e = SliceEmbedder(quick(), View(volume()[0], Recipe())); e.get(0)
    with e.encoding: assert e.get(0) is e.cache[0]
    e.close()

def test_an_error_in_the_background_is_told():
    told = []
    e = SliceEmbedder(quick(), View(volume()[0], Recipe()), stored=lambda z: 1/0, on_ready=lambda z, error: told.append(error))
    e.want(1); wait(lambda: told)
    assert isinstance(told[0], ZeroDivisionError); e.close()


# ---- prompts and history ----
@pytest.mark.parametrize('prompt', [None, 'box', {}, dict(kind='box'), dict(kind='box', box=[1,2,3]), dict(kind='box', box=[9,9,1,1]), dict(kind='box', box=[0,0,float('nan'),4]), dict(kind='line', line=[3,3,3,3]),
    dict(kind='points', points=[], labels=[]), dict(kind='points', points=[[1,999]], labels=[1]), dict(kind='points', points=[[1,2]], labels=[2]), dict(kind='points', points=[[1,2]]), dict(kind='points', points=[['a',2]], labels=[1])])
def test_bad_prompts(prompt):
    with pytest.raises((InputError, ValueError)): as_prompt(prompt, (64,80))

def test_prompts_are_asked_as_they_are_drawn(s):
    p = Predictor(quick()).set_embedding(s.embedder('pretrained').get(1), s.grid)
    for prompt, kw in ((BOX, dict(box=BOX['box'])), (dict(kind='line', line=[20.,20.,50.,40.]), dict(box=line_to_box([20,20,50,40], (64,80)))),
                       (dict(kind='points', points=[[30.,30.],[5.,5.]], labels=[1,0]), dict(points=[[30,30],[5,5]], labels=[1,0]))):
        s.set_prompt(9, 1, prompt)
        a, want = s.segment('pretrained', 9, 1), p.predict(**kw)
        assert np.array_equal(a.mask, want.masks[0]) and a.iou == want.iou[0] and s.segment('pretrained', 9, 1) is a

def test_undo_and_redo(s):
    states = [s.prompts]
    for k in range(3): s.set_prompt(9, k, BOX); states.append(s.prompts)
    for k in (2,1,0): assert s.undo() and s.prompts == states[k]
    assert not s.undo()
    for k in (1,2,3): assert s.redo() and s.prompts == states[k]
    assert not s.redo() and s.undo()
    s.set_prompt(9, 5, BOX); assert not s.redo()

def test_a_drag_is_one_step_back(s):
    s.set_prompt(9, 1, BOX)
    for x in range(5): s.set_prompt(9, 1, dict(kind='box', box=[20.+x,15.,50.,45.]), remember=False)
    s.set_prompt(9, 1, dict(kind='box', box=[25.,15.,50.,45.]))
    assert s.undo() and s.prompts[9,1] == DRAWN and s.undo() and s.prompts == {} and s.redo() and s.redo() and s.prompts[9,1].box[0] == 25

def test_objects(s):
    assert s.add_object('cyst') == 10 and s.add_object('', 300) == 300 and [o['name'] for o in s.objects] == ['label 9', 'cyst', 'object 300']
    assert len({o['colour'] for o in s.objects}) == 3
    with pytest.raises(InputError, match='already'): s.add_object('again', 9)
    for bad in (0, -1, 70000):
        with pytest.raises(InputError, match='from 1 to 65535'): s.add_object('bad', bad)
    with pytest.raises(InputError, match='no object 77'): s.set_prompt(77, 0, BOX)
    for z in (-1, 6, 1.5, None):
        with pytest.raises(InputError, match='no slice'): s.set_prompt(9, z, BOX)

def test_the_smaller_mask_lies_on_top(s):
    s.add_object('b', 2)
    s.set_prompt(9, 1, dict(kind='box', box=[0.,0.,80.,64.])); s.set_prompt(2, 1, dict(kind='box', box=[25.,20.,45.,40.]))
    a, b = (s.segment('pretrained', o, 1).mask for o in (9,2)); m = s.label_map()
    small, big = ((2,b),(9,a)) if b.sum() < a.sum() else ((9,a),(2,b))
    assert np.array_equal(m[1] == small[0], small[1]) and np.array_equal(m[1] == big[0], big[1]&~small[1]) and not m[[0,2,3,4,5]].any()

def test_scores_are_those_of_the_whole_slice(s):
    from medsam_nb.metrics import dsc, nsd
    s.set_prompt(9, 1, BOX); a, t = s.segment('pretrained', 9, 1), s.truth(9, 1)
    assert np.isclose(a.dsc, dsc(a.mask, t)) and np.isclose(a.nsd, nsd(a.mask, t, (.8,.8), 1.))

def test_no_scores_without_a_label():
    s = Session(DrawCase('a', volume()[0]), {'p': quick()}, Recipe())
    s.set_prompt(1, 1, BOX); a = s.segment('p', 1, 1)
    assert a.dsc is None and a.nsd is None and s.objects[0]['name'] == 'object 1' and s.picture(1)['truth'] == []
    s.close()


# ---- carrying ----
class Discs:
    "Stands in for a session's decoder: discs whose radius depends on the slice"
    def __init__(self, s, radii):
        self.s, self.boxes = s, {}
        def segment(decoder, object, z, prompt=None):
            from medsam_nb.draw import Answer
            prompt = prompt or s.prompts[object,z]; self.boxes[z] = list(prompt.box)
            return Answer(prompt, disc((64,80), 30, 34, radii[z]) if radii[z] else np.zeros((64,80), bool), .9)
        s.segment = segment

@pytest.mark.parametrize('radii,reached', [([9,10,12,12,11,9], [3,4,5,1,0]), ([0,10,12,12,3,9], [3,1]), ([9,9,12,0,11,9], [1,0]), ([9,2,12,12,30,9], [3])])
def test_carrying_stops_where_the_mask_dies(s, radii, reached):
    Discs(s, radii); s.set_prompt(9, 2, BOX)
    assert list(s.carry('pretrained', 9, 2)) == reached and {z for _, z in s.prompts} == {2, *reached}
    assert s.undo() and set(s.prompts) == {(9,2)} and s.redo() and len(s.prompts) == 1+len(reached)

def test_each_box_comes_from_the_last_mask(s):
    d = Discs(s, [9,10,12,12,11,9]); s.set_prompt(9, 2, BOX); list(s.carry('pretrained', 9, 2, margin=2))
    assert d.boxes[3] == [34-12-2, 30-12-2, 34+12+2, 30+12+2] and d.boxes[1] == d.boxes[3] and d.boxes[5] == [34-11-2, 30-11-2, 34+11+2, 30+11+2]

def test_what_was_drawn_by_hand_is_never_overwritten(s):
    Discs(s, [9]*6); s.set_prompt(9, 2, BOX); s.set_prompt(9, 4, BOX)
    assert list(s.carry('pretrained', 9, 2)) == [3,1,0] and s.prompts[9,4] == DRAWN
    assert list(s.carry('pretrained', 9, 2)) == [3,1,0]                     # its own it may draw again
    s.set_prompt(9, 3, BOX); assert list(s.carry('pretrained', 9, 2)) == [1,0] and s.prompts[9,3] == DRAWN

def test_a_journey_that_is_broken_off_keeps_what_it_reached(s):
    Discs(s, [9]*6); s.set_prompt(9, 2, BOX)
    for k in s.carry('pretrained', 9, 2): break
    assert set(s.prompts) == {(9,2), (9,3)} and s.undo() and set(s.prompts) == {(9,2)}


# ---- keeping ----
def test_saved_masks_lie_where_the_scan_lies(tmp_path):
    img, lab = scan()
    d = np.array([[0,-1,0],[1,0,0],[0,0,-1]], float)
    save(tmp_path/'i.nii.gz', img, origin=(5,6,7), direction=d.ravel().tolist()); save(tmp_path/'l.nii.gz', lab, origin=(5,6,7), direction=d.ravel().tolist())
    app = annotate(tmp_path/'i.nii.gz', tmp_path/'l.nii.gz', model=quick(), recipe=Recipe())
    app.session.set_prompt(9, 1, dict(kind='box', box=[10.,10.,40.,40.]))
    mask, prompts = app.save(tmp_path/'out.nii.gz')
    import SimpleITK as sitk
    a, b = sitk.ReadImage(str(tmp_path/'i.nii.gz')), sitk.ReadImage(str(mask))
    assert a.GetSize() == b.GetSize() and np.allclose(a.GetOrigin(), b.GetOrigin()) and np.allclose(a.GetDirection(), b.GetDirection()) and np.allclose(a.GetSpacing(), b.GetSpacing())
    assert np.array_equal(read_volume(mask, kind='label').array, app.masks) and app.masks.any()
    before = mask.read_bytes()
    with pytest.raises(InputError, match='exists already'): app.save(tmp_path/'out.nii.gz')
    assert mask.read_bytes() == before
    prompts.unlink()
    with pytest.raises(InputError, match='exists already'): app.save(tmp_path/'out.nii.gz')
    assert not prompts.exists() and app.save(tmp_path/'out.nii.gz', overwrite=True)[1].exists()
    app.close()

def test_a_picture_is_saved_as_png(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40,50), dtype=np.uint8)).save(tmp_path/'a.png')
    app = annotate(tmp_path/'a.png', model=quick())
    assert app.ui['path'].value.endswith('a_mask.png') and app.ui['slice'].layout.display == 'none' and app.session.picture(0)['unit'] == 'px'
    app.session.set_prompt(1, 0, dict(kind='box', box=[5.,5.,40.,30.])); mask, _ = app.save(tmp_path/'m.png')
    assert np.array_equal(np.asarray(Image.open(mask)), app.masks[0]); app.close()

@pytest.mark.parametrize('wait', [0, .3, 1.5])
def test_a_script_that_leaves_the_cell_open_ends_well(wait):
    "Embeddings are made in a thread; one that is inside torch when Python ends would abort the process"
    python(f"from medsam_nb.draw import annotate\nimport time\na = annotate()\ntime.sleep({wait})")   # asserts exit code 0

def test_prompts_come_back(tmp_path, app):
    app.session.add_object('cyst'); vol, lab = volume()
    for o, z, p in ((9,1,BOX), (10,2,dict(kind='line', line=[20.,20.,50.,40.])), (10,3,dict(kind='points', points=[[30.,30.]], labels=[1]))): app.session.set_prompt(o, z, p)
    app.session.save_prompts(tmp_path/'p.json')
    for again in (tmp_path/'p.json', str(tmp_path/'p.json'), json.loads((tmp_path/'p.json').read_text())):
        b = annotate(vol, lab, model=quick(), recipe=Recipe(), prompts=again)
        assert b.prompts == app.prompts and b.session.objects == app.session.objects and np.array_equal(b.masks, app.masks); b.close()

@pytest.mark.parametrize('change,match', [(dict(format='x'), 'not prompts of medsam_nb'), (dict(shape=[1,2,3]), 'drawn on a volume of shape'), (dict(prompts=[dict(z=1)]), 'damaged'),
    (dict(prompts=[dict(z=99, object=9, **BOX)]), 'not there'), (dict(prompts=[dict(z=1, object=5, **BOX)]), 'not there'), (dict(prompts=[dict(z=1, object=9, kind='box', box=[5,5,1,1])]), 'inverted'), (dict(objects=3), 'damaged')])
def test_bad_prompt_files_change_nothing(s, change, match):
    s.set_prompt(9, 2, BOX); before = s.prompts
    with pytest.raises(InputError, match=match): s.from_json(dict(s.to_json(), **change))
    assert s.prompts == before
    with pytest.raises(InputError, match='cannot be read'): s.from_json('nowhere.json')


# ---- the application, without a browser ----
def test_clicks_on_box_trained_weights_are_told_in_the_status_line(app, recwarn):
    gesture(app); wait(lambda: app.session.ready(app.canvas.z)); app.refresh()
    assert app.canvas.status == ''
    gesture(app, dict(kind='points', points=[[30.,30.]], labels=[1])); assert 'lite was trained with boxes only' in app.canvas.status
    gesture(app); assert app.canvas.status == ''
    assert not [w for w in recwarn if 'boxes only' in str(w.message)]   # and nowhere else

def test_a_gesture_is_answered(app):
    wait(lambda: app.session.ready(app.canvas.z)); gesture(app, seq=5)
    a, z = app.canvas.answer, app.canvas.z
    assert a['seq'] == 5 and a['z'] == z and a['prompts'] == {'9': BOX}
    o, = a['panes'][0]['objects']
    assert np.array_equal(bits(o['bits'], (64,80)), app.masks[z] == 9) and o['id'] == 9 and 0 <= o['dsc'] <= 1
    assert list(app.boxes.columns) == ['z','label','x0','y0','x1','y1'] and np.array_equal(predict_volume(Predictor(quick()), app.volume, app.boxes, Recipe(), progress=False), app.masks)

def test_a_gesture_before_the_embedding_is_answered_later():
    vol, lab = volume(); go = threading.Event()
    class Slow(SliceEmbedder): pass
    app = annotate(vol, lab, model=quick(), recipe=Recipe()); e = app.session.embedders[quick().encoder_sha256]
    wait(lambda: e.ready(app.canvas.z)); e.cache.clear(); load = e._load
    e._load = lambda z: (go.wait(10), load(z))[1]
    app.show(app.canvas.z); gesture(app, seq=3)
    assert app.canvas.answer['panes'][0]['objects'] == [] and 'preparing' in app.canvas.status and app.canvas.answer['prompts'] == {'9': BOX}
    go.set(); wait(lambda: app.canvas.answer['panes'][0]['objects'])
    assert app.canvas.answer['seq'] == 3 and app.canvas.status == ''; app.close()

def test_a_bad_gesture_becomes_a_sentence_and_changes_nothing(app):
    wait(lambda: app.session.ready(app.canvas.z)); gesture(app); before = app.session.prompts
    gesture(app, prompt=dict(kind='box', box=[9,9,1,1])); assert 'inverted' in app.canvas.status and app.session.prompts is before
    gesture(app, object=77); assert 'no object 77' in app.canvas.status
    gesture(app); assert app.canvas.status == ''

def test_slices_cases_and_what_was_drawn(tmp_path):
    app = annotate(raw(tmp_path, ['a','b'])[0].parent, model=quick(), recipe=Recipe())
    assert [o[0] for o in app.ui['case'].options] == ['a','b']
    app.canvas.z = 3; assert app.canvas.image['z'] == 3 and np.array_equal(np.frombuffer(app.canvas.image['pixels'], np.int16).reshape(64,80), app.volume.array[3])
    gesture(app); app.ui['case'].value = 1
    assert app.volume.case == 'b' and app.prompts == []
    app.ui['case'].value = 0; assert app.volume.case == 'a' and len(app.prompts) == 1; app.close()

def test_a_case_that_cannot_be_read_is_told_and_the_old_one_stays(tmp_path):
    images, _ = raw(tmp_path, ['a','b'])
    app = annotate(tmp_path, model=quick(), recipe=Recipe()); (images/'b_0000.nii.gz').write_bytes(b'no'); gesture(app)
    app.ui['case'].value = 1
    assert 'b_0000.nii.gz' in app.canvas.status and app.volume.case == 'a' and len(app.prompts) == 1 and app.ui['case'].value == 0; app.close()

def test_two_decoders(tmp_path):
    import torch
    from copy import deepcopy
    tuned = deepcopy(lite().state_dict())
    for k in tuned:
        if 'mask_decoder.output_hypernetworks' in k: tuned[k] = tuned[k]*1.3
    (tmp_path/'run').mkdir(); torch.save(tuned, tmp_path/'run'/'best.pth'); vol, lab = volume()
    app = annotate(vol, lab, model=lite(), checkpoint=tmp_path/'run', recipe=Recipe())
    assert app.views == ['pretrained','fine-tuned','both'] and app.decoder == 'fine-tuned' and len(app.session.embedders) == 1 and app.sams['fine-tuned'].image_encoder is lite().image_encoder
    app.session.embedder('pretrained').get(app.canvas.z); gesture(app, dict(kind='box', box=[12.,10.,56.,50.])); seen = {}
    for view in app.views:
        app.ui['decoder'].value = view
        for p in app.canvas.answer['panes']: seen.setdefault(p['name'], []).append(p['objects'][0]['bits'])
    assert set(seen) == {'pretrained','fine-tuned'} and all(len(set(v)) == 1 and len(v) == 2 for v in seen.values()) and seen['pretrained'][0] != seen['fine-tuned'][0]; app.close()

def test_buttons(app, tmp_path):
    wait(lambda: app.session.ready(app.canvas.z)); gesture(app)
    app.ui['undo'].click(); assert app.prompts == [] and app.canvas.answer['prompts'] == {}
    app.ui['undo'].click(); assert app.canvas.status == 'nothing to undo'
    app.ui['redo'].click(); assert len(app.prompts) == 1
    app.ui['clear'].click(); assert app.prompts == []
    app.ui['clear'].click(); app.ui['save'].click(); assert 'nothing to save' in app.canvas.status
    app._on_gestures(Change([dict(seq=app.seq+1, step='undo', done=True)])); assert len(app.prompts) == 1
    app.ui['name'].value = 'cyst'; app.ui['add'].click(); assert app.canvas.active == 10 and app.ui['object'].value == 10 and app.canvas.objects[-1]['name'] == 'cyst'
    app.ui['object'].value = 9; assert app.canvas.active == 9
    app.ui['path'].value = str(tmp_path/'m.nii.gz'); app.ui['save'].click(); assert 'wrote' in app.canvas.status and (tmp_path/'m.prompts.json').exists()
    app.ui['save'].click(); assert 'exists already' in app.canvas.status
    app.ui['overwrite'].value = True; app.ui['save'].click(); assert 'wrote' in app.canvas.status

def test_the_carry_button_works_in_its_own_thread(app):
    app.session.embedder('pretrained').get(app.canvas.z); Discs(app.session, [9]*6); gesture(app, z=2); app.canvas.z = 2
    app.ui['carry'].click(); wait(lambda: app.ui['carry'].description == 'carry on' and 'carried from' in app.canvas.status)
    assert app.canvas.status == 'carried from slice 2 to 5 more: 0 to 5' and len(app.prompts) == 6
    app.ui['clear'].click(); app.canvas.active = 9; app.ui['carry'].click(); wait(lambda: 'draw one first' in app.canvas.status)

def test_many_threads_at_once(app):
    "Gestures, slices and the background worker at the same time end in a consistent state"
    errors = []
    def work(k):
        try:
            for i in range(10):
                app.session.set_prompt(9, (k+i)%6, dict(kind='box', box=[10.+k,10.+i,50.,50.])); app.refresh()
                app.undo(); app.redo(); app.masks
        except Exception as e: errors.append(e)
    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for t in threads: t.start()
    for z in (1,4,2,5,0): app.canvas.z = z
    for t in threads: t.join()
    assert not errors and app.masks.shape == (6,64,80) and app.session.prompts is app.session.settled
    app.refresh(); assert app.canvas.answer['prompts'] == {str(o): p.to_dict() for (o, z), p in app.session.prompts.items() if z == app.canvas.z}


# ---- what went wrong once ----
def test_a_drag_taken_back_leaves_nothing(app):
    gesture(app, done=False); gesture(app, dict(kind='box', box=[1.,1.,60.,60.]), done=False); gesture(app, None)
    assert app.session.prompts == app.session.settled == {} and app.session.past == []
    gesture(app); gesture(app, dict(kind='box', box=[1.,1.,60.,60.]), done=False); assert app.prompts[0]['box'] == BOX['box'] and not app.session.prompts == app.session.settled
    app.canvas.z = (app.canvas.z+1)%6; assert app.session.prompts == app.session.settled       # another slice ends a drag

def test_the_same_again_is_no_step(s):
    s.set_prompt(9, 1, BOX); s.set_prompt(9, 1, BOX); assert len(s.past) == 1 and s.undo() and s.set_prompt(9, 2, None) is None and s.redo()

def test_gestures_come_once_in_order_and_to_their_case(tmp_path):
    app = annotate(raw(tmp_path, ['a','b'])[0].parent, model=quick(), recipe=Recipe()); g = lambda seq, z, case=0, **kw: dict(seq=seq, case=case, z=z, object=9, prompt=BOX, done=True)|kw
    app._on_gestures(Change([g(1,0), g(2,1), g(3,2,step='undo')])); assert [p['z'] for p in app.prompts] == [0]
    app._on_gestures(Change([g(2,1), g(3,2,step='undo'), g(4,3)])); assert [p['z'] for p in app.prompts] == [0,3]   # sent again, done once
    app.ui['case'].value = 1; app._on_gestures(Change([g(5,2,case=0)])); assert app.prompts == [] and app.canvas.answer['seq'] == 5 and app.canvas.image['case'] == 1
    app.close()

def test_undo_after_coming_back_does_not_empty_a_case(tmp_path):
    app = annotate(raw(tmp_path, ['a','b'])[0].parent, model=quick(), recipe=Recipe()); gesture(app); app.ui['case'].value = 1; app.ui['case'].value = 0
    app.undo(); assert len(app.prompts) == 1; app.close()

def test_prompts_go_to_the_case_they_were_drawn_on(tmp_path):
    images, _ = raw(tmp_path, ['a','b']); app = annotate(tmp_path, model=quick(), recipe=Recipe()); app.ui['case'].value = 1; gesture(app); saved = app.session.to_json(); app.close()
    b = annotate(tmp_path, model=quick(), recipe=Recipe(), prompts=saved); assert b.volume.case == 'b' and len(b.prompts) == 1; b.close()
    with pytest.raises(InputError, match='no such case'): annotate(tmp_path, model=quick(), recipe=Recipe(), prompts=dict(saved, case='c'))

def test_undo_while_the_worker_answers_does_not_kill_it(app):
    e = app.session.embedders[quick().encoder_sha256]; wait(lambda: all(e.ready(z) for z in (app.canvas.z, app.canvas.z+1)))
    said = []; e.on_ready = lambda z, error: (said.append(z), 1/0)
    e.cache.clear(); e.want(0); wait(lambda: 0 in said); e.want(5); wait(lambda: 5 in said)

def test_the_slice_on_screen_is_never_forgotten():
    e = SliceEmbedder(quick(), View(volume()[0], Recipe()), keep=2); e.want(0); wait(lambda: e.ready(0) and e.ready(1))
    for z in (2,3,4,5): e.get(z)
    assert e.ready(0) and e.ready(5) and len(e.cache) == 2; e.close()

@pytest.mark.parametrize('dtype', [np.float64, np.int64, bool, np.uint16, np.int32, np.float32])
def test_volumes_of_any_number_type(dtype):
    a = annotate(Volume((np.random.default_rng(0).random((2,32,40))*3).astype(dtype), (1,1,1), 'v'), model=quick())
    assert a.canvas.image['dtype'] in ('uint8','int16','uint16','int32','float32') and len(a.canvas.image['pixels']) == 32*40*np.dtype(a.canvas.image['dtype']).itemsize; a.close()

def test_volumes_that_cannot_be_shown():
    for bad in (np.full((2,8,8), np.nan), np.zeros((2,8,8,5), np.uint8)):
        with pytest.raises(InputError): annotate(Volume(bad, (1,1,1)), model=quick())

def test_small_values_fill_the_window():
    from medsam_nb.draw import display_windows
    v = Volume(np.random.default_rng(0).random((1,32,32)).astype(np.float32)*.003, (1,1,1)); lo, hi = next(iter(display_windows(View(v, Recipe(modality='MR'))).values())); assert 0 <= lo < hi <= .003

def test_array_labels_with_files(tmp_path):
    img, lab = scan(); save(tmp_path/'i'/'a.nii.gz', img); a = annotate(tmp_path/'i'/'a.nii.gz', lab, model=quick()); assert 9 in a.session.known; a.close()
    with pytest.raises(InputError, match='give a folder of labels'): annotate(tmp_path/'i', lab, model=quick())

@pytest.mark.parametrize('objects', [[dict(id=70000, name='a', colour='#ff9500')], [dict(id=0, name='a', colour='#ff9500')], [dict(id=2, name='a', colour='red')], [dict(id=2, name='a', colour='#ff9500')]*2])
def test_objects_out_of_a_file_are_checked(s, objects):
    with pytest.raises(InputError, match='damaged'): s.from_json(dict(s.to_json(), objects=objects))
    with pytest.raises(InputError, match='drawn on a volume'): s.from_json(dict(s.to_json(), shape=5))

def test_images_without_a_label_are_in_the_list_too(tmp_path):
    images, labels = raw(tmp_path, ['a','b']); (labels/'b.nii.gz').unlink()
    with pytest.warns(UserWarning, match='no partner'): cases = list_cases(tmp_path)
    assert sorted((c.name, c.label is None) for c in cases) == [('a',False), ('b_0000',True)]

def test_names_without_labels():
    a = annotate(volume()[0], model=quick(), names={4:'gallbladder', 7:'cyst'}); assert [(o['id'], o['name']) for o in a.session.objects] == [(4,'gallbladder'), (7,'cyst')]; a.close()

def test_a_diameter_is_measured_in_millimetres():
    b = Line((10.,20.,30.,20.)).around((64,80), (5,1)); flat = line_to_box([10,20,30,20], (64,80))
    assert np.allclose(b[[0,2]], flat[[0,2]]) and np.isclose((b[3]-b[1])*5, flat[3]-flat[1])

def test_a_mask_where_the_organ_is_not_scores_zero():
    img, lab = scan(shape=(3,64,80), zs=[0]); s = Session(DrawCase('a', Volume(img, (3,1,1)), Volume(lab, (3,1,1))), {'p': quick()}, Recipe())
    s.set_prompt(9, 2, BOX); a = s.segment('p', 9, 2); assert a.dsc == (0 if a.mask.any() else 1) and s.picture(2)['truth'] == []
    s.add_object('cyst'); s.set_prompt(10, 0, BOX); assert s.segment('p', 10, 0).dsc is None; s.close()

def test_a_journey_stops_when_its_slice_is_taken_away(s):
    Discs(s, [9]*6); s.set_prompt(9, 2, BOX)
    for k in s.carry('pretrained', 9, 2):
        if k == 3: s.undo()
    assert s.prompts == {(9,2): DRAWN} or set(s.prompts) == {(9,2), (9,1), (9,0)}

def test_a_window_by_hand_is_none_of_the_list(app):
    app.canvas.window = [1., 2.]; assert app.ui['window'].value is None
    app.ui['window'].value = app.ui['window'].options[0][1]; assert app.canvas.window == list(app.ui['window'].options[0][1])

def test_closing_stops_the_threads():
    vol, lab = volume(); app = annotate(vol, lab, model=quick(), recipe=Recipe()); e = app.session.embedders[quick().encoder_sha256]; wait(lambda: e.ready(app.canvas.z)); app.close()
    assert e.closed and not e.cache; wait(lambda: sum(t.name == 'medsam_nb embeddings' and t.is_alive() for t in threading.enumerate()) <= threading.active_count()-1)

def test_a_path_may_start_at_the_project(home):
    raw(home/'data'/'x', ['a']); assert [c.name for c in list_cases('data/x')] == ['a']

@pytest.mark.parametrize('flip', ['ud', 'lr', 'udlr'])
def test_a_turned_recipe_gives_the_mask_of_predict_volume(flip):
    vol, lab = volume(); recipe = Recipe(flip=flip); a = annotate(vol, lab, model=quick(), recipe=recipe)
    a.set_prompt(9, 2, BOX); want = predict_volume(Predictor(quick()), vol, a.boxes, recipe, progress=False)
    assert np.array_equal(a.masks, want) and want.any() and a.boxes.iloc[0].tolist() == [2, 9, *BOX['box']]; a.close()
