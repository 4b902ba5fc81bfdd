"The store of embeddings: what it is made from, what is missing, how small it can be, what it refuses"
import json, shutil
from collections import namedtuple
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from medsam_nb.core import InputError
from medsam_nb.curate import curate, find_npz, read_npz
from medsam_nb.embed import (CaseEmbeddings, EmbeddingStore, ProvenanceError, case_grid, case_provenance, default_store, dequantize, embed, encode,
    medsam_embed, quantize)
from medsam_nb.prompt import Grid, mask_to_box
from medsam_nb.sam import decode
from tiny import disc, fill, hospital, lite, quick, raw, save, scan, tree

@pytest.fixture(scope='module')
def npz(tmp_path_factory): return hospital(tmp_path_factory.mktemp('h'), ['a','b'], scans=dict(shape=(3,64,80)))

def one(npz, i=0): return read_npz(find_npz(npz)[i])

def run(npz, path, **kw): return embed(npz, path, **(dict(model=quick(), device='cpu')|kw))


# ---- numbers ----
@pytest.mark.parametrize('make', [lambda r: r.normal(0, 1, (256,64,64)), lambda r: r.normal(0, 1, (256,64,64))*np.exp(r.normal(0, 4, (256,1,1))),
                                  lambda r: np.full((256,64,64), .3), lambda r: r.normal(0, 1, (256,1,1))*np.ones((1,64,64))])
def test_quantize(make):
    e = make(np.random.default_rng(0)).astype(np.float32)
    q, rng = quantize(e); back = dequantize(q, rng)
    assert q.dtype==np.uint8 and rng.shape==(256,2) and back.dtype==np.float32
    assert (np.abs(back-e).max((1,2)) <= rng[:,1]*.5001+1e-6*np.abs(e).max((1,2))).all()

def test_masks_survive_float16_and_uint8(tmp_path):
    "Mask Dice against float32 is at least 0.995"
    img,_ = scan(shape=(1,256,256), organs=((9,120,140,40),))
    x = np.repeat(np.clip(img[0]+60, 0, 255).astype(np.uint8)[...,None], 3, -1)
    e = encode(lite(), x[None])[0].numpy(); box = torch.as_tensor(mask_to_box(disc((256,256), 120, 140, 40))-.5)[None]
    def mask(e):
        with torch.inference_mode(): return (decode(lite(), torch.as_tensor(e)[None].float(), box)[0][0,0]>0).numpy()
    want = mask(e)
    assert want.sum() > 2000
    for other in (e.astype(np.float16), dequantize(*quantize(e))):
        m = mask(other); assert 2*(m&want).sum()/(m.sum()+want.sum()) >= .995
    assert np.abs(dequantize(*quantize(e))-e).max() > 0

def test_only_the_content_is_encoded(npz):
    "Zero padding takes no part in the stretch to 0..1, and what lies there does not matter"
    case = one(npz); h,w = case_grid(case).content
    assert (h,w)==(205,256)
    imgs = case.imgs.copy(); imgs[:,h:] = 255
    a, b = encode(quick(), case.imgs, (h,w)), encode(quick(), imgs, (h,w))
    assert torch.equal(a, b) and a.shape==(3,256,64,64) and a.dtype==torch.float32
    x = torch.as_tensor(case.imgs[0,:h]).permute(2,0,1).float(); x = F.pad((x-x.min())/(x.max()-x.min()), (0,0,0,256-h))
    with torch.inference_mode(): torch.testing.assert_close(a[0], quick().image_encoder(x[None])[0])
    assert not torch.equal(a, encode(quick(), case.imgs))

def test_a_larger_model_gets_a_larger_image(npz):
    case = one(npz); h,w = case_grid(case).content
    big = encode(quick(1024), case.imgs[:1], (h,w))
    x = F.interpolate(torch.as_tensor(case.imgs[:1,:h]).permute(0,3,1,2).float(), (820,1024), mode='bilinear', antialias=True)
    with torch.inference_mode(): torch.testing.assert_close(big, quick(1024).image_encoder(quick(1024).preprocess(x)))

@pytest.mark.parametrize('dtype', ['float16','uint8'])
def test_what_comes_back_is_what_was_encoded(npz, tmp_path, dtype):
    store = run(npz, tmp_path/'s', dtype=dtype)
    for f in find_npz(npz):
        case = read_npz(f); emb = store.open_case(case)
        assert len(emb)==3 and emb.missing()==[]
        for i in range(3):
            want = encode(quick(), case.imgs[i:i+1], case_grid(case).content)[0].numpy()
            want = want.astype(np.float16).astype(np.float32) if dtype=='float16' else dequantize(*quantize(want))
            assert emb[i].dtype==np.float32 and emb[i].shape==(256,64,64) and np.array_equal(emb[i], want)
    assert not np.array_equal(store['a'][0], store['a'][1]) and not np.array_equal(store['a'][0], store['b'][0])

def test_second_run_writes_nothing(npz, tmp_path):
    run(npz, tmp_path/'s'); before = {f: f.stat().st_mtime_ns for f in (tmp_path/'s').rglob('*')}
    run(npz, tmp_path/'s'); assert {f: f.stat().st_mtime_ns for f in (tmp_path/'s').rglob('*')}==before

@pytest.mark.parametrize('dtype', ['float16','uint8'])
def test_holes_in_a_batch_are_filled_with_the_same_bits(npz, tmp_path, dtype):
    kw = dict(dtype=dtype, batch_size=2)
    run(npz, tmp_path/'s', **kw); before = tree(tmp_path/'s')
    for c,i in (('a',1),('b',0),('b',2)): shutil.rmtree(tmp_path/'s'/c/'c'/str(i))
    assert EmbeddingStore(tmp_path/'s')['b'].missing()==[0,2] and 'b' in repr(EmbeddingStore(tmp_path/'s').cases)
    run(npz, tmp_path/'s', **kw); assert tree(tmp_path/'s')==before


# ---- what is missing ----
def test_partial_and_stray_files_are_no_slices(npz, tmp_path):
    store = run(npz, tmp_path/'s'); d = tmp_path/'s'/'a'/'c'/'1'/'0'/'0'
    chunk = d/'0'; whole = chunk.read_bytes(); chunk.rename(d/'0.0123abcd.partial')   # zarr died before the rename
    (tmp_path/'s'/'a'/'c'/'7').mkdir(); (tmp_path/'s'/'a'/'notes.txt').write_text('x')
    assert EmbeddingStore(tmp_path/'s')['a'].missing()==[1]
    with pytest.raises(InputError, match='a in the store s lacks 1 of 3 slices.*same embed command'): EmbeddingStore(tmp_path/'s').open_case(one(npz))
    run(npz, tmp_path/'s'); assert chunk.read_bytes()==whole and store['a'].missing()==[]

def test_a_range_without_its_slice_is_missing(npz, tmp_path):
    run(npz, tmp_path/'s', dtype='uint8'); before = tree(tmp_path/'s')
    (tmp_path/'s'/'a'/'c'/'2'/'0'/'0'/'0').unlink()
    assert EmbeddingStore(tmp_path/'s')['a'].missing()==[2]
    shutil.rmtree(tmp_path/'s'/'b')                                       # killed after ranges/b was made, before b was
    run(npz, tmp_path/'s', dtype='uint8'); assert tree(tmp_path/'s')==before

def test_unknown_case_and_no_store(npz, tmp_path):
    store = fill(npz, tmp_path/'s')
    with pytest.raises(InputError, match="no case 'zz'. It has: a, b"): store['zz']
    other = hospital(tmp_path, ['c','d'], scans=dict(shape=(2,64,80)))
    with pytest.raises(InputError, match="no case 'c'"): store.open_case(one(other))
    with pytest.raises(InputError, match='no embedding store at .*nothing'): EmbeddingStore(tmp_path/'nothing')
    assert not (tmp_path/'nothing').exists()
    with pytest.raises(InputError, match='no npz|no folder'): run(tmp_path/'nowhere', tmp_path/'x')
    assert not (tmp_path/'x').exists()

@pytest.mark.parametrize('where', ['{}/s', 'memory://test_embed.zarr'])
def test_names_that_begin_alike(tmp_path, where):
    npz = hospital(tmp_path, ['p1','p10','p1.5','übergröße'], scans=dict(shape=(2,32,32), organs=((9,16,16,8),)))
    store = fill(npz, where.format(tmp_path))
    for f in find_npz(npz): assert store.open_case(read_npz(f)).missing()==[]
    assert len(store.cases)==4

def test_a_case_called_ranges(tmp_path):
    npz = hospital(tmp_path, ['ranges','other'], scans=dict(shape=(1,32,32), organs=((9,16,16,8),)))
    store = fill(npz, tmp_path/'s', dtype='uint8')
    for f in find_npz(npz): assert store.open_case(read_npz(f)).missing()==[]


# ---- provenance ----
def refused(npz, path, match, **kw):
    before = tree(path)
    with pytest.raises(ProvenanceError, match=match) as e: run(npz, path, **kw)
    assert tree(path)==before and 'delete this one and embed again' in str(e.value)

def test_another_encoder_or_format_is_refused(npz, tmp_path):
    run(npz, tmp_path/'s')
    refused(npz, tmp_path/'s', 'encoder_sha256 is .* in the store and .* now', model=quick(seed=1))
    refused(npz, tmp_path/'s', 'dtype is float16 in the store and uint8 now', dtype='uint8')
    with pytest.raises(ProvenanceError, match='model is lite in the store and vit_b now'): EmbeddingStore(tmp_path/'s', wanted=dict(model='vit_b'))

@pytest.mark.parametrize('change, match', [('window', 'recipe.window is medsam in the store and abdomen now'), ('source', 'source_sha256 is'), ('z', r'z is \[0, 1, 2\] in the store and \[0, 1\] now')])
def test_another_case_under_the_same_name_is_refused(tmp_path, change, match):
    kw = dict(shape=(3,32,32), organs=((9,16,16,8),))
    npz = hospital(tmp_path/'1', ['a','b'], scans=kw); run(npz, tmp_path/'s')
    if change=='window': npz2 = hospital(tmp_path/'2', ['a','b'], scans=kw, window='abdomen')
    else:
        im,lb = raw(tmp_path/'2'/'raw', ['a','b'], **kw)
        if change=='source': save(im/'a_0000.nii.gz', scan(seed=5, **kw)[0])
        else: save(lb/'a.nii.gz', scan(zs=(0,1), **kw)[1])
        npz2 = curate(im, lb, out=tmp_path/'2'/'npz', progress=False).folder
    refused(npz2, tmp_path/'s', match)
    case = next(c for c in map(read_npz, find_npz(npz2)) if c.case=='a')
    with pytest.raises(ProvenanceError, match=match): EmbeddingStore(tmp_path/'s').open_case(case)

def test_v01_files(tmp_path):
    (tmp_path/'npz').mkdir(); rng = np.random.default_rng(0)
    def write(seed): np.savez(tmp_path/'npz'/'CT_Abd_x.npz', imgs=np.random.default_rng(seed).integers(0, 255, (2,256,256,3), dtype=np.uint8), gts=np.ones((2,256,256), np.uint8))
    write(0); store = run(tmp_path/'npz', tmp_path/'s'); store.open_case(one(tmp_path/'npz'))
    write(1); refused(tmp_path/'npz', tmp_path/'s', 'source_sha256')      # their pixels are hashed


# ---- disk, arguments, command ----
def test_a_full_disk_is_seen_before_anything_is_written(npz, tmp_path, monkeypatch):
    usage = namedtuple('usage', 'total used free')
    monkeypatch.setattr(shutil, 'disk_usage', lambda p: usage(10**12, 0, 10*10**6))
    with pytest.raises(InputError, match='6 embeddings need 0.0 GB and the disk of .* 0.0 GB free.*uint8'): run(npz, tmp_path/'deep'/'s')
    assert not (tmp_path/'deep').exists()
    run(npz, tmp_path/'u', dtype='uint8')                                  # 6.3 MB fit

def test_what_is_stored_needs_no_room_again(npz, tmp_path, monkeypatch):
    "Going on after an interruption asks only for the room of the slices that are missing"
    run(npz, tmp_path/'s'); shutil.rmtree(tmp_path/'s'/'a'/'c'/'1')
    usage = namedtuple('usage', 'total used free')
    monkeypatch.setattr(shutil, 'disk_usage', lambda p: usage(10**12, 0, 3*10**6))
    assert run(npz, tmp_path/'s')['a'].missing()==[]
    monkeypatch.setattr(shutil, 'disk_usage', lambda p: usage(10**12, 0, 0))
    run(npz, tmp_path/'s')

@pytest.mark.parametrize('kw, match', [(dict(dtype='float32'), "dtype is 'float32'"), (dict(precision='fp8'), "precision is 'fp8'"), (dict(model='vit_x'), 'no model called'), (dict(device='cuda:99'), 'not available')])
def test_bad_arguments(npz, tmp_path, kw, match):
    with pytest.raises(InputError, match=match): run(npz, tmp_path/'s', **kw)
    assert not list(tmp_path.rglob('c/*'))

def test_a_damaged_curated_file_is_named(npz, tmp_path):
    shutil.copytree(npz, tmp_path/'npz'); f = find_npz(tmp_path/'npz')[1]; f.write_bytes(f.read_bytes()[:2000])
    with pytest.raises(InputError, match=f.name): run(tmp_path/'npz', tmp_path/'s')

def test_command(tmp_path, home, capsys):
    npz = hospital(tmp_path, ['a'], scans=dict(shape=(1,64,80)), test_fraction=0)
    medsam_embed(str(npz), device='cpu')
    assert '1 embeddings of 1 cases' in capsys.readouterr().out
    assert EmbeddingStore(default_store(npz, 'lite'), wanted=dict(model='lite', encoder_sha256=lite().encoder_sha256)).open_case(one(npz)).missing()==[]
    assert default_store(npz, 'lite')==home/'data'/'embeddings'/'lite'/f'{npz.name}.zarr'

def test_no_file_stays_open(npz, tmp_path):
    import os
    store = run(npz, tmp_path/'s'); n = len(os.listdir('/proc/self/fd'))
    for _ in range(20):
        for f in find_npz(npz): store.open_case(read_npz(f))[0]
    assert len(os.listdir('/proc/self/fd')) <= n+2
