"""Nothing moved: what an earlier version gave (tests/same/held.json, made at commit 892a524) is what this version gives

`python tests/test_same.py` writes the file anew with the medsam_nb that is imported, `… run chain` these two groups.
Do so only where a result is meant to move, and say why in the changelog.
Pixels, tables and text are held exactly. What comes out of a network is held exactly where torch and
the processor's instructions are those of the file, and closely elsewhere"""
import base64, csv, hashlib, io, json, os, sys, tempfile, zlib
from copy import deepcopy
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
import numpy as np
import pytest
import torch
import zarr
from PIL import Image
from medsam_nb.core import sha256_file
from medsam_nb.curate import Recipe, curate, find_npz, medsam_curate, read_npz
from medsam_nb.draw import DrawCase, Session
from medsam_nb.embed import EmbeddingStore, ProvenanceError, embed, medsam_embed
from medsam_nb.evaluate import draw_boxes, evaluate, evaluate_case, medsam_evaluate
from medsam_nb.finetune import Config, finetune, medsam_finetune
from medsam_nb.phantom import make_phantom, medsam_phantom
from medsam_nb.predict import Predictor, oracle_boxes, predict_volume
from medsam_nb.prompt import line_to_box, longest_diameter, next_click, perturb_box, sample_points, slack_box
from medsam_nb.segment import medsam_predict, read_boxes, segment
from medsam_nb.volume import read_volume
from tiny import disc, fill, hospital, lite, quick, save

STORED = Path(__file__).parent/'same'/'held.json'

@lru_cache
def stored(): return json.loads(STORED.read_text(encoding='utf-8'))

def held(group, name=None):
    "What the earlier version gave"
    return stored()[group] if name is None else stored()[group][name]

def machine(): return [torch.__version__.split('+')[0], torch.backends.cpu.get_cpu_capability()]

def tolerance(near=1e-6, far=2e-2): return near if held('machine')==machine() else far

@pytest.fixture(scope='module', autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

@pytest.fixture(scope='module')
def tmp(tmp_path_factory): return tmp_path_factory.mktemp('same')


# ---- how two results are compared ----
def sha(a):
    "Type, shape and hash of an array, as text"
    return f'{a.dtype} {a.shape} {hashlib.sha256(np.ascontiguousarray(a).tobytes()).hexdigest()[:24]}'

def packed(a):
    "A small label map as text"
    return dict(shape=list(a.shape), data=base64.b64encode(zlib.compress(a.astype(np.uint8).tobytes(), 9)).decode())

def unpacked(d):
    "The label map that `packed` wrote"
    return np.frombuffer(zlib.decompress(base64.b64decode(d['data'])), np.uint8).reshape(d['shape'])

def moved_pixels(now, then): return int((unpacked(now)!=unpacked(then)).sum())

def cell(word):
    try: return float(word)
    except ValueError: return word

def cells(text):
    "The rows of a CSV file, numbers as numbers"
    return [[cell(w) for w in row] for row in csv.reader(io.StringIO(text))]

def same(now, then, tol=0.):
    "Are two values of JSON equal, numbers up to `tol` (relative above one)?"
    if isinstance(then, dict): return list(now)==list(then) and all(same(now[k], then[k], tol) for k in then)
    if isinstance(then, list): return len(now)==len(then) and all(same(a, b, tol) for a,b in zip(now, then))
    if isinstance(then, float) and np.isfinite(then): return abs(now-then)<=tol*max(1, abs(then))
    return now==then or (now!=now and then!=then)

def as_json(value): return json.loads(json.dumps(value))


# ---- curated pixels ----
RECIPES = dict(
    medsam={}, brief=dict(window='brief'), percentiles=dict(modality='MR'), own=dict(window=(-150.,250.)),
    squash=dict(fit='squash'), ud=dict(flip='ud'), lr=dict(flip='lr'), udlr=dict(flip='udlr', fit='squash'),
    small=dict(size=128, min_pixels=30), many=dict(label_ids='all', min_pixels=300), photo=dict(modality='Photo'))

@lru_cache
def phantom(seed, size): return make_phantom(seed, size)

def scans(folder):
    "Two phantoms, one of them not square"
    for case,seed,size in (('p1',3,(12,96,96)),('p2',4,(8,80,112))):
        image,label = phantom(seed, size)
        spacing = tuple(float(s) for s in image.spacing[::-1])
        save(folder/'images'/f'{case}_0000.nii', image.array, spacing)
        save(folder/'labels'/f'{case}.nii', label.array, spacing)
    return folder/'images', folder/'labels'

def photos(folder):
    "Two colour pictures with a disc"
    for n,shape in enumerate(((70,90),(120,50))):
        rgb = np.random.default_rng(n).integers(0, 200, (*shape,3)).astype(np.uint8)
        label = 9*disc(shape, 40, 25, 18).astype(np.uint8)
        rgb[label>0] += np.array([50,20,5], np.uint8)
        for kind,name,array in (('images',f'q{n}_0000.png',rgb),('labels',f'q{n}.png',label)):
            (folder/kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(folder/kind/name)
    return folder/'images', folder/'labels'

def curated(tmp, name):
    "The folder of a recipe"
    sources = photos(tmp/'photos') if name=='photo' else scans(tmp/'scans')
    return curate(*sources, out=tmp/name, progress=False, **RECIPES[name]).folder

def told(array):
    "An array of an npz: its hash, or all it says where that is little"
    return array.tolist() if array.size<30 else sha(array)

def contents(path):
    "All arrays of an npz but the hash of its source, which depends on how files are written"
    with np.load(path) as d: return {k:told(d[k]) for k in d.files if k!='source_sha256'}

def curation(tmp, name):
    "What a recipe makes"
    folder = curated(tmp, name)
    files = {str(f.relative_to(folder)):contents(f) for f in find_npz(folder)}
    names = sorted(str(f.relative_to(folder.parent)) for f in folder.rglob('*') if f.is_file())
    return dict(files=files, names=names, split=(folder/'split.csv').read_text())

@pytest.mark.parametrize('name', RECIPES)
def test_curated_files_are_what_they_were(tmp, name): assert as_json(curation(tmp, name))==held('curated', name)

def pair_hash(*files): return hashlib.sha256(''.join(map(sha256_file, files)).encode()).hexdigest()

def test_the_hash_of_a_source_is_that_of_its_two_files(tmp_path):
    images,labels = scans(tmp_path)
    case = read_npz(find_npz(curated(tmp_path, 'medsam'))[0])
    assert case.source_sha256==pair_hash(images/'p1_0000.nii', labels/'p1.nii')

def test_the_hash_of_a_source_knows_the_colours_it_was_read_with(tmp_path):
    images,labels = photos(tmp_path)
    for f in labels.iterdir():
        red = (np.asarray(Image.open(f))>0)[...,None]*np.array([255,0,0], np.uint8)
        Image.fromarray(red).save(f)
    folder = curate(images, labels, tmp_path/'npz', modality='Photo', colors={'#FF0000':9}, progress=False).folder
    plain = pair_hash(images/'q0_0000.png', labels/'q0.png')
    want = hashlib.sha256((plain+json.dumps(dict(colors={'#ff0000':9}))).encode()).hexdigest()
    assert read_npz(find_npz(folder)[0]).source_sha256==want


# ---- embeddings and their provenance ----
def as_lite():
    "A model that passes for the packaged one, with an encoder that costs nothing"
    sam = deepcopy(quick())
    sam.encoder_sha256 = lite().encoder_sha256
    return sam

def attributes(folder):
    "The attributes in the zarr.json of a store and of its cases, those that depend on how files are written left out"
    def of(path): return json.loads(path.read_text())['attributes']
    out = {str(f.parent.relative_to(folder)):of(f) for f in sorted(folder.rglob('zarr.json'))}
    for found in out.values():
        if 'source_sha256' in found: found['source_sha256'] = 'of the case'
    return out

def metadata(folder):
    "The zarr.json files of a store, as text"
    return {str(f.relative_to(folder)):f.read_text() for f in sorted(folder.rglob('zarr.json'))}

def provenance(tmp, dtype):
    "What a store of two cases says of itself"
    npz = curated(tmp, 'medsam')
    embed(npz, tmp/f'{dtype}.zarr', model=as_lite(), dtype=dtype, device='cpu')
    files = metadata(tmp/f'{dtype}.zarr')
    for f in find_npz(npz):
        sha256 = read_npz(f).source_sha256
        files = {k:v.replace(sha256, f'SOURCE {f.stem}') for k,v in files.items()}
    return dict(attributes=attributes(tmp/f'{dtype}.zarr'), files=files)

def without_version(found):
    "The attributes; the version of the package may grow, but has to be there"
    assert found['.'].pop('package_version')
    return found

@pytest.mark.parametrize('dtype', ['float16','uint8'])
def test_a_store_says_of_itself_what_it_did(tmp, dtype):
    now,then = as_json(provenance(tmp, dtype)['attributes']),deepcopy(held('provenance', dtype)['attributes'])
    assert without_version(now)==without_version(then)

def old_store(tmp, npz, dtype):
    "A store as the earlier version wrote it, with random embeddings"
    folder = tmp/f'old_{dtype}.zarr'
    for name,text in held('provenance', dtype)['files'].items():
        for f in find_npz(npz): text = text.replace(f'SOURCE {f.stem}', read_npz(f).source_sha256)
        (folder/name).parent.mkdir(parents=True, exist_ok=True)
        (folder/name).write_text(text)
    rng = np.random.default_rng(0)
    for _,array in zarr.open_group(folder, mode='r+').arrays():
        array[:] = rng.integers(0, 9, array.shape).astype(array.dtype)
    return folder

@pytest.mark.parametrize('dtype', ['float16','uint8'])
def test_a_store_of_the_earlier_version_is_still_taken(tmp, dtype):
    npz = curated(tmp, 'medsam')
    wanted = dict(model='lite', encoder_sha256=lite().encoder_sha256, dtype=dtype)
    store = EmbeddingStore(old_store(tmp, npz, dtype), wanted=wanted)
    for f in find_npz(npz): assert store.open_case(read_npz(f))[0].shape==(256,64,64)

def test_a_store_of_the_earlier_version_needs_nothing_embedded(tmp_path):
    npz = curated(tmp_path, 'medsam')
    folder = old_store(tmp_path, npz, 'float16')
    before = {f:f.stat().st_mtime_ns for f in folder.rglob('*') if f.is_file()}
    embed(npz, folder, model=as_lite(), device='cpu')
    assert {f:f.stat().st_mtime_ns for f in folder.rglob('*') if f.is_file()}==before

def test_a_store_of_the_earlier_version_is_refused_for_other_pixels(tmp_path):
    store = EmbeddingStore(old_store(tmp_path, curated(tmp_path, 'medsam'), 'float16'))
    other = read_npz(find_npz(curated(tmp_path, 'brief'))[0])
    with pytest.raises(ProvenanceError, match='window'): store.open_case(other)


# ---- masks ----
class Watched(torch.nn.Module):
    "The packaged encoder: encodes an image once, and tells what it was shown"
    def __init__(self, encoder):
        super().__init__()
        self.encoder, self.img_size = encoder, encoder.img_size
        self.known, self.seen = {}, []
    def forward(self, x):
        key = sha(x.numpy())
        self.seen.append(key)
        if key not in self.known: self.known[key] = self.encoder(x)
        return self.known[key]

@lru_cache
def watched():
    "`lite` with a watched encoder"
    sam = deepcopy(lite())
    sam.image_encoder = Watched(sam.image_encoder)
    return sam

LOOSE = '''z,label,x0,y0,x1,y1
0,1,13,24.5,57,63
0,9,30,20,48.5,40
1,9,33,22,50,39.5
1,3,77,33,95,58
'''
DEPTH = '''label;z0;z1;x0;y0;x1;y1;z
11;0;1;48;10;79;33;
9;;;33;22;50;39.5;1
'''
DIAMETER = '''z,label,x0,y0,x1,y1,kind
0,9,38,24,41,36,line
1,1,20,30,49,57,line
1,9,33,22,50,39.5,
'''
ROWS = [dict(z=0, label=9, x0=30, y0=20, x1=48.5, y1=40), dict(z=1, label=3, x0='77', y0=33, x1=95, y1=58, kind='box')]
DRAWN = dict(
    format='medsam_nb prompts', version=1, case='scan', shape=[2,80,112],
    objects=[dict(id=i, name=f'organ {i}', colour='#ff9500') for i in (1,3,9,11)],
    prompts=[
        dict(z=0, object=1, kind='points', points=[[30.,40.],[25.,50.],[50.,30.]], labels=[1,1,0]),
        dict(z=0, object=9, kind='box', box=[30.,20.,48.5,40.]),
        dict(z=1, object=3, kind='line', line=[83.,36.,88.,54.]),
        dict(z=1, object=9, kind='box', box=[33.,22.,50.,39.5], carried=True),
        dict(z=1, object=11, kind='points', points=[[60.,20.]], labels=[1])])
PROMPTS = dict(oracle=None, loose=('p.csv', LOOSE), depth=('p.csv', DEPTH), diameter=('p.csv', DIAMETER),
               rows=('p.json', json.dumps(ROWS)), drawn=('p.json', json.dumps(DRAWN)))
FLIPS = ('ud','lr','udlr')
FLIPPED = {f'{p} {f}':(p, dict(flip=f)) for p in ('loose','drawn','diameter') for f in FLIPS}
OTHERS = {
    'drawn squash':('drawn', dict(fit='squash')), 'drawn squash ud':('drawn', dict(fit='squash', flip='ud')),
    'oracle squash lr':('oracle', dict(fit='squash', flip='lr')), 'loose brief':('loose', dict(window='brief')),
    'drawn percentiles':('drawn', dict(modality='MR'))}
ASKED = {p:(p, {}) for p in PROMPTS}|FLIPPED|OTHERS

def two_slices(tmp):
    "Two slices of a phantom, and their labels, with pixels that are not square"
    files = tmp/'scan.nii',tmp/'scan_label.nii'
    for f,v in zip(files, phantom(4, (8,80,112))): save(f, v.array[2:4], (3.4,2.5,5.))
    image = read_volume(files[0])
    return image, read_volume(files[1], kind='label', like=image)

def prompts_of(tmp, name, volume):
    "What a file of prompts asks, or None for oracle boxes"
    if PROMPTS[name] is None: return None
    file,text = PROMPTS[name]
    (tmp/file).write_text(text, encoding='utf-8')
    return read_boxes(tmp/file, volume)

def result(mask, slices, scores): return dict(mask=packed(mask), slices=slices, scores=scores)

def segmented(tmp, name):
    "What the library answers, and what the encoder was shown for it"
    prompts,choices = ASKED[name]
    volume,label = two_slices(tmp)
    sam = watched()
    sam.image_encoder.seen.clear()
    asked = prompts_of(tmp, prompts, volume)
    ids = (1,9,11) if asked is None else None
    seg = segment(volume, asked, label, Predictor(sam, quiet=True), Recipe(**choices), ids, progress=False)
    slices,scores = (t.to_csv(index=False, float_format='%.6g') for t in (seg.slices, seg.scores))
    return result(seg.mask, slices, scores)|dict(seen=list(sam.image_encoder.seen))

def check_masks(now, then):
    "Label map and tables of an answer are those of before"
    assert moved_pixels(now['mask'], then['mask'])<=(0 if tolerance()<1e-3 else 4)
    for k in ('slices','scores'): assert same(cells(now[k]), cells(then[k]), tolerance(1e-5)), k

@pytest.mark.parametrize('name', ASKED)
def test_masks_are_what_they_were(tmp, name):
    now,then = segmented(tmp, name),held('masks', name)
    assert now['seen']==then['seen'], 'the encoder was shown another image'
    check_masks(now, then)

def commanded(tmp, name):
    "What the command writes"
    prompts,choices = ASKED[name]
    two_slices(tmp)
    file,text = PROMPTS[prompts]
    (tmp/file).write_text(text, encoding='utf-8')
    medsam_predict(str(tmp/'scan.nii'), str(tmp/'mask.nii.gz'), str(tmp/file), labels=str(tmp/'scan_label.nii'),
                   device='cpu', overwrite=True, **choices)
    mask = read_volume(tmp/'mask.nii.gz', kind='label').array
    return result(mask, (tmp/'mask_slices.csv').read_text(), (tmp/'mask_scores.csv').read_text())

def test_the_command_writes_the_same(tmp_path):
    check_masks(commanded(tmp_path, 'drawn ud'), held('masks', 'drawn ud'))
    written = ['mask.nii.gz','mask_qc.png','mask_scores.csv','mask_slices.csv']
    assert sorted(f.name for f in tmp_path.glob('mask*'))==written

def overlapping(tmp, overlap):
    "Boxes that overlap, as a table"
    volume,label = two_slices(tmp)
    boxes = oracle_boxes(label, (1,2,4,6,11,12))
    boxes[['x1','y1']] += 6.5
    mask = predict_volume(Predictor(watched()), volume, boxes, Recipe(), progress=False, overlap=overlap)
    return dict(dtype=str(mask.dtype), mask=packed(mask))

@pytest.mark.parametrize('overlap', ['smaller','iou'])
def test_overlapping_masks_share_their_pixels_as_before(tmp, overlap):
    now,then = overlapping(tmp, overlap),held('overlap', overlap)
    assert now['dtype']==then['dtype'] and moved_pixels(now['mask'], then['mask'])<=(0 if tolerance()<1e-3 else 4)


# ---- prompts as JSON ----
def drawing(tmp, **kwargs):
    "A session on the two slices, and what closes it"
    volume,_ = two_slices(tmp)
    return Session(DrawCase('scan', volume), {'pretrained':watched()}, recipe=Recipe(), **kwargs)

def saved_prompts(tmp):
    "What a session saves: boxes (one of them cut at the edge), a line, clicks, and a box carried to the next slice"
    s = drawing(tmp, names={9:'gallbladder', 1:'liver', 11:'stomach', 3:'spleen'})
    try:
        s.set_prompt(9, 0, dict(kind='box', box=[30,20,48.5,40]))
        s.set_prompt(1, 0, dict(kind='points', points=[[30,40],[25.25,50]], labels=[1,0]))
        s.set_prompt(3, 1, dict(kind='line', line=[83,36,88,54]))
        s.set_prompt(11, 1, dict(kind='box', box=[-4,10,79,33]))
        list(s.carry('pretrained', 9, 0))
        return s.to_json()
    finally: s.close()

def read_back(tmp, data):
    "What a session that took over saved prompts saves, its own first object left out"
    s = drawing(tmp)
    try:
        s.from_json(as_json(data))
        out = as_json(s.to_json())
        ids = [o['id'] for o in data['objects']]
        return out|dict(objects=sorted((o for o in out['objects'] if o['id'] in ids), key=lambda o: ids.index(o['id'])))
    finally: s.close()

def test_drawn_prompts_are_saved_as_before(tmp):
    now,then = as_json(saved_prompts(tmp)),held('prompts')
    def but_colours(d): return d|dict(objects=[(o['id'],o['name']) for o in d['objects']])
    assert same(but_colours(now), but_colours(then), tolerance())

def test_saved_prompts_are_read_and_written_again(tmp):
    then = held('prompts')
    back = read_back(tmp, then)
    assert list(back)==list(then) and back['prompts']==then['prompts']

@pytest.mark.parametrize('what', ['drawn','saved'])
def test_saved_prompts_lose_nothing(tmp, what):
    data = as_json(DRAWN if what=='drawn' else held('prompts'))
    objects = [o for o in data['objects'] if o['id']!=1]   # a session has an object 1 of its own
    prompts = [p for p in data['prompts'] if p['object']!=1]
    data |= dict(objects=objects, prompts=prompts)
    assert read_back(tmp, data)==data

def test_the_drawing_cell_gives_the_mask_of_the_command(tmp):
    s = drawing(tmp)
    try:
        s.from_json(DRAWN)
        now = s.label_map()
    finally: s.close()
    assert moved_pixels(packed(now), held('masks', 'drawn')['mask'])<=(0 if tolerance()<1e-3 else 4)


# ---- geometry of prompts ----
def geometry():
    "Boxes, points, clicks and diameters for seeds"
    shape,box = (80,112),(30.5,20,48,40)
    mask = disc(shape, 35, 50, 17)&~disc(shape, 30, 60, 8)
    part = disc(shape, 38, 44, 13)
    def rng(k): return np.random.default_rng(k)
    def drawn(n, background): return [o.tolist() for o in sample_points(mask, n, rng(n), background)]
    def click(pred, clicks=()): return [np.asarray(o).tolist() for o in next_click(pred, mask, clicks)]
    def moved(k, px): return [perturb_box(box, shape, rng(k), px, shrink).tolist() for shrink in (False,True)]
    line = longest_diameter(mask, (2.5,3.4))[0]
    return dict(
        perturb=[b for k in range(3) for px in (0,5,40) for b in moved(k, px)],
        slack=[slack_box(box, shape, s, rng(k)).tolist() for k in range(3) for s in (-30,-5,0,5,40)],
        points=[drawn(n, background) for n in (1,3,10) for background in (0,4)],
        clicks=[click(part), click(part, [(54.5,38.5)]), click(np.zeros(shape, bool)), click(np.ones(shape, bool))],
        line=line.tolist(),
        boxes=[line_to_box(line, shape, spacing=s).tolist() for s in ((1,1),(5,2.5,3.4))]
            +[line_to_box((1,1,100,70), shape, margin=.2, ratio=.3).tolist()])

@pytest.mark.parametrize('what', ['perturb','slack','points','clicks','line','boxes'])
def test_geometry_of_prompts_is_what_it_was(what): assert same(as_json(geometry()[what]), held('geometry', what), 1e-6)


# ---- training and scores ----
CASES = ['p1_a','p1_b','p2_a','p3_a','p4_a']
ORGANS = ((9,20,20,12),(9,45,60,9),(1,45,25,11))
OLD_NAMES = dict(label_ids='labels')   # fields of a run's config.json that were called otherwise

def ids_setting(): return 'label_ids' if 'label_ids' in Config.__dataclass_fields__ else 'labels'

@lru_cache
def clinic(tmp):
    "A curated folder and random embeddings"
    npz = hospital(tmp/'clinic', CASES, label_ids=(9,1), patient=r'p\d', scans=dict(shape=(2,64,80), organs=ORGANS))
    return npz, fill(npz, tmp/'clinic.zarr', seed=5)

def scored(tmp):
    "Boxes and scores of one case by the packaged decoder"
    npz,store = clinic(tmp)
    case = read_npz(find_npz(npz, 'test')[0])
    boxes = draw_boxes(case, (-5,0,10))
    rows = evaluate_case(lite(), case, store.open_case(case), boxes)
    return dict(boxes=boxes.to_csv(index=False, float_format='%.5f'), rows=rows)

def trained(tmp, run='run'):
    "A short run"
    npz,store = clinic(tmp)
    return finetune(npz, store.path, tmp/run, device='cpu', epochs=2, lr=3e-5, batch_size=2, epoch_samples=4, ema=.5,
                    **{ids_setting():(9,)}).path

def by_old_names(config):
    "config.json of a run with the names of before, without what depends on folders, files and version"
    out = {OLD_NAMES.get(k, k):v for k,v in config.items()}
    return {k:out[k] is not None if k in ('npz','store','data_sha256','package_version') else out[k] for k in out}

def run_of(tmp):
    "What a run leaves, and its scores"
    npz,store = clinic(tmp)
    run = trained(tmp)
    evaluate(npz, store.path, run, slacks=(0,10), device='cpu')
    text = {k:(run/k).read_text() for k in ('log.csv','boxes.csv','eval.csv')}
    config = by_old_names(json.loads((run/'config.json').read_text()))
    return dict(text, config=config, files=sorted(f.name for f in run.iterdir()))

@pytest.fixture(scope='module')
def run(tmp): return run_of(tmp)

def test_boxes_and_scores_of_a_case_are_what_they_were(tmp):
    now,then = as_json(scored(tmp)),held('scored')
    assert now['boxes']==then['boxes']
    assert same(now['rows'], then['rows'], tolerance())

@pytest.mark.parametrize('file', ['log.csv','eval.csv'])
def test_numbers_of_a_run_are_what_they_were(run, file):
    assert same(cells(run[file]), cells(held('run', file)), tolerance())

@pytest.mark.parametrize('what', ['boxes.csv','config','files'])
def test_files_of_a_run_are_what_they_were(run, what): assert run[what]==held('run', what)

def test_a_run_of_the_earlier_version_is_taken_up(tmp, run):
    config = tmp/'run'/'config.json'
    now = json.loads(config.read_text())
    before = (tmp/'run'/'best.pth').stat().st_mtime_ns
    config.write_text(json.dumps({OLD_NAMES.get(k, k):v for k,v in now.items()}))
    assert same(cells((trained(tmp)/'log.csv').read_text()), cells(held('run', 'log.csv')), tolerance())
    assert (tmp/'run'/'best.pth').stat().st_mtime_ns==before


# ---- the chain ----
def chain(home):
    "Scores of the demo's five commands on three small phantoms"
    medsam_phantom(out=str(home/'phantom'), n=3, size='10,128,128', progress=False)
    medsam_curate(str(home/'phantom/images'), str(home/'phantom/labels'), out=str(home/'npz'), anatomy='same',
                  min_pixels=200, progress=False)
    npz = str(home/'npz'/'CT_same')
    medsam_embed(npz, device='cpu')
    medsam_finetune(npz, run='same', epochs=1, lr=5e-5, batch_size=2, device='cpu')
    medsam_evaluate(npz, run='same', slacks='0,20', device='cpu')
    run = home/'work_dir'/'same'
    return {k:(run/k).read_text() for k in ('log.csv','boxes.csv','eval.csv')}

@pytest.mark.slow
def test_the_demo_scores_as_before(home):
    now = chain(home)
    assert now['boxes.csv']==held('chain', 'boxes.csv')
    for k in ('log.csv','eval.csv'): assert same(cells(now[k]), cells(held('chain', k)), tolerance(1e-4)), k


# ---- the file itself ----
GROUPS = dict(
    machine=lambda tmp: machine(),
    curated=lambda tmp: {k:curation(tmp, k) for k in RECIPES},
    provenance=lambda tmp: {k:provenance(tmp, k) for k in ('float16','uint8')},
    masks=lambda tmp: {k:segmented(tmp, k) for k in ASKED},
    overlap=lambda tmp: {k:overlapping(tmp, k) for k in ('smaller','iou')},
    prompts=saved_prompts, geometry=lambda tmp: geometry(), scored=scored, run=run_of,
    chain=lambda tmp: chain(tmp/'home'))

def make(groups):
    "Write what the package gives now: these groups, or all"
    torch.set_num_threads(1)
    now = json.loads(STORED.read_text(encoding='utf-8')) if groups else {}
    with tempfile.TemporaryDirectory() as t:
        os.environ.update(MEDSAM_NB_HOME=f'{t}/home', MPLBACKEND='agg')
        for k in groups or GROUPS: now[k] = GROUPS[k](Path(t))
    STORED.parent.mkdir(exist_ok=True)
    STORED.write_text(json.dumps(now, indent=1)+'\n', encoding='utf-8')
    print(f'{STORED}: {STORED.stat().st_size} bytes, by {sys.modules["medsam_nb"].__file__}')

def test_what_is_held_is_small(): assert STORED.stat().st_size<400_000

if __name__=='__main__': make(sys.argv[1:])
