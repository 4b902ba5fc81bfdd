"A tiny hospital for the tests: discs in noise, a model loaded once, stores filled without running an encoder"
import locale, os, subprocess, sys
from functools import lru_cache
from pathlib import Path
import numpy as np
import SimpleITK as sitk
import torch
from medsam_nb.curate import curate, find_npz, read_npz
from medsam_nb.embed import EmbeddingStore, case_provenance
from medsam_nb.sam import load_model

SPACING = (.8,.8,3.)   # x, y, z

@lru_cache
def lite():
    "The packaged model, on the CPU; do not change it (deepcopy first)"
    return load_model('lite', device='cpu')

def disc(shape, row, col, radius):
    "Boolean disc, centre in continuous coordinates"
    y,x = np.mgrid[:shape[0],:shape[1]]+.5
    return (y-row)**2+(x-col)**2<radius**2

def scan(seed=0, shape=(4,64,80), organs=((9,30,34,12),), zs=None):
    "A noisy CT with a brighter disc for each organ (label, row, column, radius) on slices `zs` (default all)"
    rng = np.random.default_rng(seed)
    img, lab = rng.normal(40, 15, shape).astype(np.int16), np.zeros(shape, np.uint8)
    for z in range(shape[0]) if zs is None else zs:
        for label,row,col,radius in organs: lab[z][disc(shape[1:], row, col, radius)] = label
    img[lab>0] += 80
    return img, lab

def save(path, array, spacing=SPACING, origin=(0,0,0), direction=None):
    "Write an array as an image file, spacing in x,y,z"
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    im = sitk.GetImageFromArray(array)
    im.SetSpacing(spacing[:im.GetDimension()])
    im.SetOrigin(origin[:im.GetDimension()])
    if direction is not None: im.SetDirection(direction)
    sitk.WriteImage(im, str(path))

def dicom(path, array, **tags):
    "Write a slice (H,W) as DICOM; tags like g0008_0060='CT'. SimpleITK leaves the C locale behind: it is put back"
    was = locale.setlocale(locale.LC_ALL)
    im, w = sitk.GetImageFromArray(array), sitk.ImageFileWriter()
    for k, v in tags.items(): im.SetMetaData(k[1:].replace('_', '|'), v)
    w.KeepOriginalImageUIDOn()
    w.SetFileName(str(path))
    w.Execute(im)
    locale.setlocale(locale.LC_ALL, was)

def raw(root, names, **kw):
    "images/ and labels/ with a scan per name; each has its own noise"
    for n in names:
        img,lab = scan(seed=sum(map(ord, n)), **kw)
        save(root/'images'/f'{n}_0000.nii.gz', img)
        save(root/'labels'/f'{n}.nii.gz', lab)
    return root/'images', root/'labels'

def hospital(root, names, label_ids=(9,), scans={}, **kw):
    "A curated folder with a case per name"
    return curate(*raw(root/'raw', names, **scans), out=root/'npz', label_ids=label_ids, progress=False, **kw).folder

def fill(npz, path, seed=0, model=None, dtype='float16', **over):
    "A store with random embeddings for all cases of a curated folder"
    model = model or lite()
    store = EmbeddingStore.create(path, **(dict(model=model.name, encoder_sha256=model.encoder_sha256,
                                                dtype=dtype) | over))
    rng = np.random.default_rng(seed)
    for f in find_npz(npz):
        case = read_npz(f)
        emb = store.add(case.case, case_provenance(case))
        for i in range(len(emb)): emb.write(i, rng.normal(0, .5, (256,64,64)).astype(np.float32))
    return store

def state_of(path): return torch.load(path, map_location='cpu', weights_only=True)

def same_state(a, b): return a.keys()==b.keys() and all(torch.equal(a[k], b[k]) for k in a)

def python(code, *args, limits='', threads=2, wait=True, **kw):
    "Run code in another process, with the warnings of other people's packages off"
    env = dict(os.environ, PYTHONWARNINGS='ignore', PYTHONPATH=str(Path(__file__).parent),
               OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads))
    cmd = [sys.executable, '-c', code, *map(str, args)]
    kw = dict(cwd=Path(__file__).resolve().parents[1], env=env, text=True, stdout=subprocess.PIPE,
              stderr=subprocess.PIPE)|kw
    if not wait: return subprocess.Popen(cmd, **kw)
    p = subprocess.run(cmd, **kw)
    assert p.returncode==0, p.stdout+p.stderr
    return p.stdout

class _Stem(torch.nn.Module):
    "An image encoder of one convolution, for tests where speed matters and the encoder does not"
    def __init__(self, img_size=256):
        super().__init__()
        self.img_size, self.conv = img_size, torch.nn.Conv2d(3, 256, img_size//64, img_size//64)
    def forward(self, x): return self.conv(x)

@lru_cache
def quick(img_size=256, seed=0):
    "A `Sam` like `lite` with an encoder that costs nothing"
    from medsam_nb.sam import build_model, encoder_sha256
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        sam = build_model('lite')
        sam.image_encoder = _Stem(img_size)
    sam.encoder_sha256 = encoder_sha256(sam)
    return sam.eval()

def tree(path):
    "File name -> bytes, for all files below a folder"
    return {str(f.relative_to(path)): f.read_bytes() for f in sorted(Path(path).rglob('*')) if f.is_file()}
