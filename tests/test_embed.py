"The store of embeddings: what it is made from, what is missing, how small it can be, what it refuses"
import json, os, shutil
from collections import namedtuple
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from medsam_nb.core import InputError, command_parser
from medsam_nb.curate import CuratedFolder, curate
from medsam_nb.embed import (EmbeddingStore, ProvenanceError, default_store, dequantize, embed, encode, medsam_embed,
                             quantize)
from medsam_nb.prompt import mask_to_box
from medsam_nb.sam import decode
from tiny import disc, fill, hospital, lite, quick, raw, save, scan, tree

SMALL = dict(shape=(3,32,32), organs=((9,16,16,8),))

@pytest.fixture(scope='module')
def npz(tmp_path_factory): return hospital(tmp_path_factory.mktemp('h'), ['a','b'], scans=dict(shape=(3,64,80)))

@pytest.fixture
def where(npz, tmp_path):
    "A store of all cases"
    run(npz, tmp_path/'s')
    return tmp_path/'s'

def cases(npz): return CuratedFolder(npz).cases()
def one(npz, i=0): return cases(npz)[i]
def run(npz, path, **kw): return embed(npz, path, **(dict(model=quick(), device='cpu')|kw))
def dice(a, b): return 2*(a&b).sum()/(a.sum()+b.sum())
def is_complete(store, npz): return all(store.open_case(c).missing()==[] for c in cases(npz))


# ---- numbers
KINDS = dict(noise=lambda r: r.normal(0, 1, (256,64,64)),
             scales=lambda r: r.normal(0, 1, (256,64,64))*np.exp(r.normal(0, 4, (256,1,1))),
             constant=lambda r: np.full((256,64,64), .3),
             constant_channels=lambda r: r.normal(0, 1, (256,1,1))*np.ones((1,64,64)))

@pytest.mark.parametrize('kind', KINDS)
def test_bytes_are_right_to_half_a_step(kind):
    e = KINDS[kind](np.random.default_rng(0)).astype(np.float32)
    q,rng = quantize(e)
    back = dequantize(q, rng)
    assert (q.dtype, rng.shape, back.dtype)==(np.uint8, (256,2), np.float32)
    far,high = np.abs(back-e).max((1,2)),np.abs(e).max((1,2))
    assert (far<=rng[:,1]*.5001+1e-6*high).all()

@pytest.fixture(scope='module')
def seen():
    "An embedding of a disc, and the mask that a box round it gives"
    img,_ = scan(shape=(1,256,256), organs=((9,120,140,40),))
    grey = np.clip(img[0]+60, 0, 255).astype(np.uint8)
    e = encode(lite(), np.stack([grey]*3, -1)[None])[0].numpy()
    box = torch.as_tensor(mask_to_box(disc((256,256), 120, 140, 40))-.5)[None]
    def mask(e):
        with torch.inference_mode(): logits,_ = decode(lite(), torch.as_tensor(e)[None].float(), box)
        return (logits[0,0]>0).numpy()
    return e, mask

@pytest.mark.parametrize('stored', [lambda e: e.astype(np.float16), lambda e: dequantize(*quantize(e))],
                         ids=['float16','uint8'])
def test_a_mask_survives_storing(seen, stored):
    e,mask = seen
    want = mask(e)
    assert want.sum()>2000
    assert not np.array_equal(stored(e), e)
    assert dice(mask(stored(e)), want)>=.995

def test_padding_takes_no_part_in_the_encoding(npz):
    case = one(npz)
    h,w = case.grid.content
    assert (h,w)==(205,256)
    other = case.imgs.copy()
    other[:,h:] = 255
    a,b = encode(quick(), case.imgs, (h,w)),encode(quick(), other, (h,w))
    assert a.shape==(3,256,64,64) and a.dtype==torch.float32
    assert torch.equal(a, b)
    assert not torch.equal(a, encode(quick(), case.imgs))

def test_what_the_encoder_gets_is_stretched_and_padded(npz):
    case = one(npz)
    h,w = case.grid.content
    x = torch.as_tensor(case.imgs[0,:h]).permute(2,0,1).float()
    x = F.pad((x-x.min())/(x.max()-x.min()), (0,0,0,256-h))
    with torch.inference_mode(): want = quick().image_encoder(x[None])[0]
    torch.testing.assert_close(encode(quick(), case.imgs, (h,w))[0], want)

def test_a_larger_model_gets_a_larger_image(npz):
    case,sam = one(npz),quick(1024)
    h,w = case.grid.content
    x = torch.as_tensor(case.imgs[:1,:h]).permute(0,3,1,2).float()
    x = F.interpolate(x, (820,1024), mode='bilinear', antialias=True)
    with torch.inference_mode(): want = sam.image_encoder(sam.preprocess(x))
    torch.testing.assert_close(encode(sam, case.imgs[:1], (h,w)), want)

@pytest.mark.parametrize('dtype', ['float16','uint8'])
def test_what_comes_back_is_what_was_encoded(npz, tmp_path, dtype):
    store = run(npz, tmp_path/'s', dtype=dtype)
    assert is_complete(store, npz)
    for case in cases(npz):
        emb = store.open_case(case)
        assert len(emb)==3
        for i in range(3):
            want = encode(quick(), case.imgs[i:i+1], case.grid.content)[0].numpy()
            want = want.astype(np.float16).astype(np.float32) if dtype=='float16' else dequantize(*quantize(want))
            assert emb[i].dtype==np.float32
            assert np.array_equal(emb[i], want)

@pytest.mark.parametrize('other', [('a',1), ('b',0)])
def test_slices_and_cases_have_embeddings_of_their_own(npz, where, other):
    store = EmbeddingStore(where)
    case,i = other
    assert not np.array_equal(store['a'][0], store[case][i])

def test_a_second_run_writes_nothing(npz, where):
    def times(): return {f:f.stat().st_mtime_ns for f in where.rglob('*')}
    before = times()
    run(npz, where)
    assert times()==before

@pytest.mark.parametrize('dtype', ['float16','uint8'])
def test_holes_in_a_batch_are_filled_with_the_same_bits(npz, tmp_path, dtype):
    path,kw = tmp_path/'s',dict(dtype=dtype, batch_size=2)
    run(npz, path, **kw)
    before = tree(path)
    for c,i in (('a',1),('b',0),('b',2)): shutil.rmtree(path/c/'c'/str(i))
    assert EmbeddingStore(path)['b'].missing()==[0,2]
    assert EmbeddingStore(path).cases==['a','b']
    run(npz, path, **kw)
    assert tree(path)==before


# ---- what is missing
def test_a_partial_file_is_no_slice(npz, where):
    "zarr died before it renamed the file"
    folder = where/'a'/'c'/'1'/'0'/'0'
    chunk = folder/'0'
    whole = chunk.read_bytes()
    chunk.rename(folder/'0.0123abcd.partial')
    assert EmbeddingStore(where)['a'].missing()==[1]
    with pytest.raises(InputError, match='a in the store s lacks 1 of 3 slices: run the same embed command'):
        EmbeddingStore(where).open_case(one(npz))
    run(npz, where)
    assert chunk.read_bytes()==whole
    assert EmbeddingStore(where)['a'].missing()==[]

def test_stray_files_are_no_slices(where):
    (where/'a'/'c'/'7').mkdir()
    (where/'a'/'notes.txt').write_text('x')
    assert EmbeddingStore(where)['a'].missing()==[]
    shutil.rmtree(where/'a'/'c'/'1')
    assert EmbeddingStore(where)['a'].missing()==[1]

def test_a_range_without_its_slice_is_missing(npz, tmp_path):
    path = tmp_path/'s'
    run(npz, path, dtype='uint8')
    before = tree(path)
    (path/'a'/'c'/'2'/'0'/'0'/'0').unlink()
    assert EmbeddingStore(path)['a'].missing()==[2]
    run(npz, path, dtype='uint8')
    assert tree(path)==before

def test_ranges_of_a_case_that_was_never_made_are_used(npz, tmp_path):
    "Killed after _ranges/b was made, before b was"
    path = tmp_path/'s'
    run(npz, path, dtype='uint8')
    before = tree(path)
    shutil.rmtree(path/'b')
    run(npz, path, dtype='uint8')
    assert tree(path)==before

def test_an_unknown_case_is_refused_with_those_there_are(npz, tmp_path):
    store = fill(npz, tmp_path/'s')
    with pytest.raises(InputError, match="no case 'zz', it has: a, b"): store['zz']
    other = hospital(tmp_path, ['c','d'], scans=SMALL)
    with pytest.raises(InputError, match="no case 'c'"): store.open_case(one(other))

def test_looking_for_a_store_makes_none(tmp_path):
    with pytest.raises(InputError, match='no embedding store at .*nothing'): EmbeddingStore(tmp_path/'nothing')
    assert not (tmp_path/'nothing').exists()

def test_without_curated_files_no_store_is_made(tmp_path):
    with pytest.raises(InputError, match='no npz|no folder'): run(tmp_path/'nowhere', tmp_path/'x')
    assert not (tmp_path/'x').exists()

@pytest.mark.parametrize('there', ['folder','file'])
def test_something_else_is_not_taken_for_a_store(npz, tmp_path, there):
    path = tmp_path/'mine'
    if there=='folder': path.mkdir()
    (path/'notes.txt' if there=='folder' else path).write_text('x')
    with pytest.raises(InputError, match='not an embedding store: give the store a name of its own'): run(npz, path)

@pytest.mark.parametrize('path', ['{}/s','memory://test_embed.zarr'])
def test_names_that_begin_alike(tmp_path, path):
    npz = hospital(tmp_path, ['p1','p10','p1.5','übergröße'], scans=dict(SMALL, shape=(2,32,32)))
    store = fill(npz, path.format(tmp_path))
    assert is_complete(store, npz)
    assert len(store.cases)==4

def test_a_case_may_be_called_ranges(tmp_path):
    npz = hospital(tmp_path, ['ranges','other'], scans=dict(SMALL, shape=(1,32,32)))
    assert is_complete(fill(npz, tmp_path/'s', dtype='uint8'), npz)


# ---- provenance
def refused(npz, path, match, **kw):
    "Refused with this sentence, and not a byte of the store has changed"
    before = tree(path)
    with pytest.raises(ProvenanceError, match=match) as e: run(npz, path, **kw)
    assert tree(path)==before
    assert 'delete this one and embed again' in str(e.value)

def test_another_encoder_is_refused(npz, where):
    refused(npz, where, 'encoder_sha256 is .* in the store and .* now', model=quick(seed=1))

def test_another_number_format_is_refused(npz, where):
    refused(npz, where, 'dtype is float16 in the store and uint8 now', dtype='uint8')

def test_another_model_is_refused(where):
    with pytest.raises(ProvenanceError, match='model is lite in the store and vit_b now'):
        EmbeddingStore(where, wanted=dict(model='vit_b'))

def changed(root, change):
    "The cases a and b curated from something else, or otherwise"
    if change=='window': return hospital(root, ['a','b'], scans=SMALL, window='abdomen')
    images,labels = raw(root/'raw', ['a','b'], **SMALL)
    if change=='source': save(images/'a_0000.nii.gz', scan(seed=5, **SMALL)[0])
    if change=='z': save(labels/'a.nii.gz', scan(zs=(0,1), **SMALL)[1])
    return curate(images, labels, out=root/'npz', progress=False).folder

@pytest.mark.parametrize('change, match', [('window', 'recipe.window is medsam in the store and abdomen now'),
                                           ('source', 'source_sha256 is'),
                                           ('z', r'z is \[0, 1, 2\] in the store and \[0, 1\] now')])
def test_another_case_under_the_same_name_is_refused(tmp_path, change, match):
    path = tmp_path/'s'
    run(hospital(tmp_path/'1', ['a','b'], scans=SMALL), path)
    npz = changed(tmp_path/'2', change)
    refused(npz, path, match)
    case = next(c for c in cases(npz) if c.case=='a')
    with pytest.raises(ProvenanceError, match=match): EmbeddingStore(path).open_case(case)

def edit_recipe(path, edit):
    "Change the recipe that a stored case is said to be made with"
    file = path/'a'/'zarr.json'
    meta = json.loads(file.read_text())
    recipe = edit(json.loads(meta['attributes']['recipe']))
    meta['attributes']['recipe'] = json.dumps(recipe)
    file.write_text(json.dumps(meta))

@pytest.mark.parametrize('field', ['flip','fit','size','high'])
def test_a_store_made_before_a_field_of_the_recipe_is_accepted(npz, where, field):
    edit_recipe(where, lambda r: {k:v for k,v in r.items() if k!=field})
    assert is_complete(run(npz, where), npz)

def test_a_lacking_field_counts_as_its_default(npz, where):
    npz = hospital(where.parent/'other', ['a','b'], scans=dict(shape=(3,64,80)), flip='ud')
    edit_recipe(where, lambda r: {k:v for k,v in r.items() if k!='flip'})
    with pytest.raises(ProvenanceError, match='recipe.flip is None in the store and ud now'):
        EmbeddingStore(where).open_case(one(npz))

def write_v01(folder, seed):
    "A file as MedSAM v0.1 wrote it"
    folder.mkdir(exist_ok=True)
    imgs = np.random.default_rng(seed).integers(0, 255, (2,256,256,3), dtype=np.uint8)
    np.savez(folder/'CT_Abd_x.npz', imgs=imgs, gts=np.ones((2,256,256), np.uint8))

def test_files_of_v01_are_known_by_their_pixels(tmp_path):
    npz = tmp_path/'npz'
    write_v01(npz, 0)
    assert is_complete(run(npz, tmp_path/'s'), npz)
    write_v01(npz, 1)
    refused(npz, tmp_path/'s', 'source_sha256')


# ---- disk, arguments, command
@pytest.fixture
def disk(monkeypatch):
    "Sets how many bytes are free"
    usage = namedtuple('usage', 'total used free')
    return lambda free: monkeypatch.setattr(shutil, 'disk_usage', lambda p: usage(10**12, 0, int(free)))

def test_a_full_disk_is_seen_before_anything_is_written(npz, tmp_path, disk):
    disk(10e6)
    with pytest.raises(InputError, match='6 embeddings need 0.0 GB and the disk of .* 0.0 GB free.*uint8'):
        run(npz, tmp_path/'deep'/'s')
    assert not (tmp_path/'deep').exists()

def test_bytes_need_half_the_room(npz, tmp_path, disk):
    disk(10e6)
    assert is_complete(run(npz, tmp_path/'s', dtype='uint8'), npz) # 6.3 MB

def test_going_on_needs_room_for_what_is_missing_only(npz, where, disk):
    shutil.rmtree(where/'a'/'c'/'1')
    disk(3e6)
    assert is_complete(run(npz, where), npz)

def test_what_is_stored_needs_no_room_again(npz, where, disk):
    disk(0)
    assert is_complete(run(npz, where), npz)

@pytest.mark.parametrize('kw, match', [(dict(dtype='float32'), "dtype 'float32' is not known"),
                                       (dict(precision='fp8'), "precision 'fp8' is not known"),
                                       (dict(model='vit_x'), 'no model called'),
                                       (dict(device='cuda:99'), 'not available'),
                                       (dict(batch_size=0), 'batch_size is 0'),
                                       (dict(batch_size=1.5), 'batch_size is 1.5')])
def test_bad_arguments_write_nothing(npz, tmp_path, kw, match):
    with pytest.raises(InputError, match=match): run(npz, tmp_path/'s', **kw)
    assert not list(tmp_path.rglob('c/*'))

def test_a_damaged_curated_file_is_named(npz, tmp_path):
    shutil.copytree(npz, tmp_path/'npz')
    f = CuratedFolder(tmp_path/'npz').files()[1]
    f.write_bytes(f.read_bytes()[:2000])
    with pytest.raises(InputError, match=f.name): run(tmp_path/'npz', tmp_path/'s')

def test_the_command_stores_at_the_default_place(tmp_path, home, capsys):
    npz = hospital(tmp_path, ['a'], scans=dict(shape=(1,64,80)), test_fraction=0)
    medsam_embed(str(npz), device='cpu')
    assert '1 embeddings of 1 cases' in capsys.readouterr().out
    path = home/'data'/'embeddings'/'lite'/f'{npz.name}.zarr'
    assert default_store(npz, 'lite')==path
    made = dict(model='lite', encoder_sha256=lite().encoder_sha256)
    assert EmbeddingStore(path, wanted=made).open_case(one(npz)).missing()==[]

def test_the_command_has_the_options_of_embed():
    p = command_parser(medsam_embed)
    given = {o for a in p._actions for o in a.option_strings}
    options = 'store model checkpoint dtype batch_size precision device'.split()
    assert given=={'-h','--help',*(f'--{o}' for o in options)}
    read = p.parse_args('npz --batch_size 3 --dtype uint8'.split())
    assert (read.npz, read.batch_size, read.dtype, read.model, read.device)==('npz', 3, 'uint8', 'lite', None)

def test_no_file_stays_open(npz, where):
    store = EmbeddingStore(where)
    def n_open(): return len(os.listdir('/proc/self/fd'))
    before = n_open()
    for _ in range(20):
        for case in cases(npz): store.open_case(case)[0]
    assert n_open()<=before+2
