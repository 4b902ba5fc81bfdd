"Bad input, given to the real commands: each ends in one clear sentence and exit code 2, and touches no file"
import gzip, os, re, shlex, shutil, tempfile
from pathlib import Path
import numpy as np, pytest, torch
from PIL import Image
from terminal import Terminal
from tiny import SPACING, curate, fill, raw, save, scan
from medsam_nb.finetune import finetune

IMG, LAB = 'raw/images/a_0000.nii.gz', 'raw/labels/a.nii.gz'
CURATE = 'medsam_curate raw/images raw/labels --out out'
EMBED = 'medsam_embed npz/CT_Abd --store new.zarr'
TUNE = 'medsam_finetune npz/CT_Abd --store s.zarr --run new'
SCORE = 'medsam_evaluate npz/CT_Abd --store s.zarr --run runs/run'
ASK = f'medsam_predict {IMG} mask.nii.gz --boxes boxes.csv'
FAULTS = {} # name -> (command, what is done to the folder first, words of the sentence, extras of the job)

def fault(name, command, words, plant=None, **job):
    assert name not in FAULTS, name
    FAULTS[name] = command, plant, words, job

# ---- what is done to a folder: each returns a function of the folder ----
def image(array=None, spacing=SPACING, path=IMG):
    if array is None: array = scan(shape=(2,64,80))[0]
    return lambda d: save(d/path, array, spacing)

def label(array=None, spacing=SPACING):
    if array is None: array = scan(shape=(2,64,80))[1]
    return image(array, spacing, LAB)

def text(path, content=''):
    def f(d):
        (d/path).parent.mkdir(parents=True, exist_ok=True)
        (d/path).write_text(content)
    return f

def replaced(path, content): # a new file: the old one may be shared with other folders
    path.unlink()
    path.write_bytes(content)

def cut(path, share=.5):
    def f(d):
        content = (d/path).read_bytes()
        replaced(d/path, content[:int(len(content)*share)])
    return f

def gone(path): return lambda d: shutil.rmtree(d/path) if (d/path).is_dir() else (d/path).unlink()

def both(*plants): return lambda d: [p(d) for p in plants]

def renamed(path, to): return lambda d: (d/path).rename(d/to)

def to_dir(path):
    def f(d):
        (d/path).unlink(missing_ok=True)
        (d/path).mkdir()
    return f

def link(path, to):
    def f(d):
        (d/path).unlink()
        (d/path).symlink_to(to)
    return f

def closed_folder(d):
    (d/'out').mkdir()
    (d/'out').chmod(0o555)

def zero_spacing(d):
    "A header whose pixels have no width"
    b = bytearray(gzip.decompress((d/IMG).read_bytes()))
    b[80:84] = bytes(4)
    (d/IMG).write_bytes(gzip.compress(bytes(b)))

def pngs(mode='L', masks='png'):
    grey, mask = np.arange(64*80).reshape(64,80)%255, scan(shape=(1,64,80))[1][0]
    def f(d):
        for k in ('images', 'labels'):
            shutil.rmtree(d/'raw'/k)
            (d/'raw'/k).mkdir()
        Image.fromarray(grey.astype(np.uint8)).save(d/'raw/images/a.png')
        Image.fromarray(mask.astype(np.uint8)).convert(mode).save(d/f'raw/labels/a.{masks}')
    return f

def coloured(d):
    noise = np.random.default_rng(0).integers(0, 255, (64,80,3), dtype=np.uint8)
    Image.fromarray(noise).save(d/'raw/labels/a.png')

def an_npz(d): return next((d/'npz').rglob('*.npz'))

def pickled(d):
    f = an_npz(d)
    f.unlink()
    np.savez(f, imgs=np.array([{}], dtype=object))

def other_data(d):
    image(scan(seed=9, shape=(2,64,80))[0])(d)
    curate(d/'raw/images', d/'raw/labels', d/'npz2', progress=False)

def one_patient(d):
    for f in sorted((d/'npz/CT_Abd/train').glob('*.npz'))[1:]: f.unlink()

class Boom:
    def __reduce__(self): return os.mkdir, ('boom',)

# curation: folders
fault('no images folder', 'medsam_curate nowhere raw/labels --out out', 'nowhere.*does not exist')
fault('no labels folder', 'medsam_curate raw/images nowhere --out out', 'nowhere.*does not exist')
fault('a folder with a name in another script that is not there', 'medsam_curate 写真 raw/labels --out out', '写真')
fault('a file for a folder', f'medsam_curate {IMG} raw/labels --out out', 'is a file')
fault('one folder for both', 'medsam_curate raw/images raw/images --out out', 'one folder')
fault('an empty folder', 'medsam_curate empty raw/labels --out out', 'empty', lambda d: (d/'empty').mkdir())
fault('names that do not pair', CURATE, 'no image pairs', renamed(LAB, 'raw/labels/b.nii.gz'))
fault('two labels of one image', CURATE, 'more than once', lambda d: shutil.copy(d/LAB, d/'raw/labels/a_0000.nii.gz'))
fault('the output is a file', CURATE, 'out', text('out', 'mine'))
fault('the output lies in a file', 'medsam_curate raw/images raw/labels --out boxes.csv/deep', 'boxes.csv')
fault('another recipe in the folder', 'medsam_curate raw/images raw/labels --out npz --window abdomen', 'window')
# curation: files
fault('a truncated image', CURATE, r'a_0000\.nii\.gz', cut(IMG))
fault('a truncated label', CURATE, r'a\.nii\.gz', cut(LAB))
fault('an empty image file', CURATE, r'a_0000\.nii\.gz', text(IMG))
fault('text that is called an image', CURATE, r'a_0000\.nii\.gz', text(IMG, 'dear colleague'))
fault('a folder that is called an image', CURATE, 'a_0000|no images', to_dir(IMG))
fault('a symbolic link to itself', CURATE, 'a_0000|no images', link(IMG, Path(IMG).name))
fault('a link to nothing', CURATE, 'a_0000|no images', link(IMG, 'lost.nii.gz'))
fault('another size', CURATE, 'size', label(scan(shape=(2,64,64))[1]))
fault('another spacing', CURATE, 'spacing', label(spacing=(.9,.9,3.)))
fault('labels that are probabilities', CURATE, 'whole numbers', label(np.full((2,64,80), .3, np.float32)))
fault('negative labels', CURATE, 'negative', label(np.full((2,64,80), -1, np.int16)))
fault('a label above 65535', CURATE, '65535', label(np.full((2,64,80), 70000, np.int32)))
fault('nothing labelled', CURATE, 'no slice', label(np.zeros((2,64,80), np.uint8)))
fault('NaN', CURATE, 'NaN|finite', image(np.full((2,64,80), np.nan, np.float32)))
fault('infinity', CURATE, 'inf|finite', image(np.full((2,64,80), np.inf, np.float32)))
fault('a constant image', CURATE, 'no slice', image(np.full((2,64,80), 40, np.int16)))
fault('four dimensions', CURATE, 'values per voxel|dimensions', image(np.zeros((2,2,64,80), np.int16), (1,1,1,1)))
fault('spacing zero', CURATE, 'voxel size', zero_spacing)
fault('a picture with a CT window', CURATE, '8-bit', pngs())
fault('labels in a JPEG', CURATE+' --modality Photo', 'JPEG', pngs(masks='jpg'))
fault('labels in colour', CURATE+' --modality Photo', 'colour', both(pngs('RGB'), coloured))
fault('a truncated picture', CURATE+' --modality Photo', r'a\.png', both(pngs(), cut('raw/images/a.png')))
# curation: options
for option, words in {'--label_id liver':'liver', '--label_id 0':'label_ids', '--label_id 77':'77|no slice',
                      '--window lung':'lung', '--window medsam --modality MR':'Hounsfield',
                      '--low 99 --high 5 --window percentile':'low', '--size 0':'size',
                      '--min_pixels -3':'min_pixels', '--fit stretch':'fit', '--flip up':'flip',
                      '--test_fraction 2':'fraction', "--patient '('":'pattern|expression', '--anatomy a/b':'anatomy',
                      '--workers 0':'workers', '--workers -4':'workers'}.items():
    fault(f'curate {option}', f'{CURATE} {option}', words)
# the disk's own refusals
fault('an image nobody may read', CURATE, r'a_0000\.nii\.gz', lambda d: (d/IMG).chmod(0), nobody=True)
fault('an output folder nobody may write', CURATE, 'ermission', closed_folder, nobody=True)
fault('a full disk while curating', CURATE, 'large|space', limit=3000)
fault('a full disk while predicting', ASK.replace('mask.nii.gz', 'mask.nii')+' --device cpu', 'large|space', limit=5000)
# embedding
for option, words in {'--model vit_x':'vit_x', '--dtype float8':'float8', '--precision fp8':'fp8',
                      '--batch_size 0':'batch_size', '--device tpu':'tpu', '--checkpoint none.pth':'none.pth',
                      '--checkpoint boxes.csv':'boxes.csv'}.items():
    fault(f'embed {option}', f'{EMBED} {option}', words)
fault('embed nothing', 'medsam_embed nowhere', 'nowhere')
fault('embed what is not curated', 'medsam_embed raw/images', 'raw/images')
fault('embed a damaged file', EMBED, 'npz', lambda d: cut(an_npz(d).relative_to(d))(d))
fault('embed a pickle', EMBED, 'npz', pickled)
fault('a checkpoint that runs code', EMBED+' --checkpoint evil.pth', 'evil.pth',
      lambda d: torch.save(dict(a=Boom()), d/'evil.pth'))
fault('a truncated checkpoint', EMBED+' --checkpoint runs/run/best.pth', 'best.pth', cut('runs/run/best.pth'))
fault('a checkpoint of something else', EMBED+' --checkpoint odd.pth', 'odd.pth',
      lambda d: torch.save(dict(conv=torch.zeros(2)), d/'odd.pth'))
fault('a store that is a file', 'medsam_embed npz/CT_Abd --store boxes.csv', 'boxes.csv is a file')
fault('a store in a folder of other things', 'medsam_embed npz/CT_Abd --store raw', 'raw is a folder of other things')
fault('a store of other data', 'medsam_embed npz2/CT_Abd --store s.zarr', 'source|differ|another', other_data)
# fine-tuning
for option, words in {'--epochs 0':'epochs', '--lr -1':'lr', '--lr nan':'lr', '--batch_size 0':'batch_size',
                      '--box_px -4':'box_px', '--val_fraction 1':'val_fraction', '--label_ids 3':'label',
                      '--label_ids x':'x', '--ema 1':'ema', '--mixed_precision int4':'int4',
                      '--model vit_b':'vit_b|model', '--epoch_samples 0':'epoch_samples'}.items():
    fault(f'finetune {option}', f'{TUNE} {option}', words)
fault('fine-tune on nothing', 'medsam_finetune nowhere', 'nowhere')
fault('fine-tune without embeddings', 'medsam_finetune npz/CT_Abd --store none.zarr', 'none.zarr')
fault('fine-tune into a folder of other things', 'medsam_finetune npz/CT_Abd --store s.zarr --run raw/images',
      'raw/images')
fault('fine-tune with other settings into a run', 'medsam_finetune npz/CT_Abd --store s.zarr --run runs/run --lr 1',
      'lr')
fault('one training patient', TUNE, 'two', one_patient)
# evaluation
for option, words in {'--slacks wide':'wide', '--label_ids 3':'3', '--part both':'both', '--tolerance -1':'tolerance',
                      '--device tpu':'tpu'}.items():
    fault(f'evaluate {option}', f'{SCORE} {option}', words)
fault('evaluate no run', 'medsam_evaluate npz/CT_Abd --store s.zarr --run never', 'never')
fault('evaluate without a checkpoint', SCORE, 'best.pth', gone('runs/run/best.pth'))
fault('evaluate a damaged configuration', SCORE, 'config.json', text('runs/run/config.json', '{'))
fault('evaluate without test cases', SCORE, 'test', gone('npz/CT_Abd/test'))
# prediction
fault('predict nothing', 'medsam_predict nowhere.nii.gz mask.nii.gz --boxes boxes.csv', 'nowhere')
fault('predict without boxes', f'medsam_predict {IMG} mask.nii.gz', 'boxes')
fault('predict over a file', f'medsam_predict {IMG} {LAB} --boxes boxes.csv', 'exists')
fault('predict into a JPEG', f'medsam_predict {IMG} mask.jpg --boxes boxes.csv', 'mask.jpg')
fault('no box file', f'medsam_predict {IMG} mask.nii.gz --boxes none.csv', 'none.csv')
fault('predict a label of another size', f'medsam_predict {IMG} mask.nii.gz --labels {LAB}', 'size',
      label(scan(shape=(2,64,64))[1]))
for name, (row, words) in {'columns':('a,b\n1,2', 'column|lack'), 'nothing':('', 'boxes'),
                           'no row':('z,label,x0,y0,x1,y1', 'empty|no '),
                           'a slice that is not there':('z,label,x0,y0,x1,y1\n9,1,5,5,20,20', '9'),
                           'words':('z,label,x0,y0,x1,y1\none,1,5,5,20,20', 'one|number'),
                           'NaN':('z,label,x0,y0,x1,y1\n0,1,,5,20,20', 'x0|number|row|pixels'),
                           'label 0':('z,label,x0,y0,x1,y1\n0,0,5,5,20,20', 'label'),
                           'no area':('z,label,x0,y0,x1,y1\n0,1,5,5,5,20', 'box|area'),
                           'outside':('z,label,x0,y0,x1,y1\n0,1,500,500,520,520', 'outside|image')}.items():
    fault(f'boxes with {name}', ASK, words, text('boxes.csv', row))
# the doctor, and the tutorials' names
fault('the doctor without a folder', 'medsam_doctor nowhere raw/labels', 'nowhere')
fault('the doctor told to write into the data',
      'medsam_doctor raw/images raw/labels --quick --json raw/images/report.json', 'raw/images')
fault('the doctor with a wrong window', 'medsam_doctor raw/images raw/labels --quick --window lung', 'lung')
fault('pre_CT without a folder', 'pre_CT -i nowhere -gt raw/labels -o out', 'nowhere')
fault('pre_CT with names that do not pair', 'pre_CT -i raw/images -gt raw/labels -o out', 'no image pairs',
      renamed(LAB, 'raw/labels/b.nii.gz'))
fault('pre_grey_rgb2D without masks', 'pre_grey_rgb2D -i raw/images -gt nowhere -o out', 'nowhere')
fault('pre_grey_rgb2D with a table that is not there',
      'pre_grey_rgb2D -i raw/images -gt raw/labels --csv none.csv -o out', 'none.csv')
# downloads
fault('fetch what is unknown', 'medsam_fetch sam_vit_z', 'sam_vit_z')
fault('fetch two from one address', 'medsam_fetch sam_vit_b sam_vit_l --url http://127.0.0.1:9/x', 'one')
fault('fetch from nowhere', 'medsam_fetch sam_vit_b --url http://127.0.0.1:9/x', '127.0.0.1')
fault('fetch by another protocol', 'medsam_fetch sam_vit_b --url ftp://127.0.0.1/x', 'ftp')

@pytest.fixture(scope='module')
def top():
    "A folder that nobody may enter too, which pytest's own is not"
    top = Path(tempfile.mkdtemp(prefix='bad-'))
    top.chmod(0o777)
    yield top
    shutil.rmtree(top, ignore_errors=True)

@pytest.fixture(scope='module')
def good(top):
    "A scan, a curated folder, its embeddings, a run and boxes: nothing is wrong with them yet"
    good = top/'good'
    raw(good/'more', 'abcd', shape=(2,64,80))
    raw(good/'raw', 'a', shape=(2,64,80))
    folder = curate(good/'more/images', good/'more/labels', out=good/'npz', progress=False).folder
    store = fill(folder, good/'s.zarr')
    run = finetune(folder, store.path, good/'runs'/'run', device='cpu', epochs=1, epoch_samples=1)
    for f in [good/'more', *run.path.glob('state-*'), run.path/'tensorboard']: shutil.rmtree(f)
    (good/'boxes.csv').write_text('z,label,x0,y0,x1,y1\n0,9,20,16,48,44\n')
    return good

@pytest.fixture(scope='module')
def terminal():
    with Terminal() as t: yield t

def copied(a, b):
    "A large file is linked, so that a hundred folders cost no more than one"
    return os.link(a, b) if os.path.getsize(a)>1e5 else shutil.copy2(a, b)

def seen_of(f):
    if f.is_symlink(): return os.readlink(f)
    s = f.stat()
    return f.read_bytes() if s.st_size<=1e5 else (s.st_ino, s.st_size, s.st_mtime_ns)

def seen(d):
    "Every file with its bytes, a large one with its inode, size and time of change; links as what they point to"
    return {str(f.relative_to(d)): seen_of(f) for f in sorted(d.rglob('*')) if f.is_symlink() or f.is_file()}

def lines_of(err):
    "What was said, without progress bars"
    lines = err.replace('\r', '\n').splitlines()
    return [o for o in lines if o.strip() and '%|' not in o and 'it/s' not in o]

def test_there_are_enough(): assert len(FAULTS)>=60

@pytest.mark.parametrize('name', FAULTS)
def test_one_sentence_exit_2_nothing_touched(terminal, good, top, name):
    command, plant, words, job = FAULTS[name]
    d = top/str(list(FAULTS).index(name))
    shutil.copytree(good, d, copy_function=copied)
    if plant: plant(d)
    if job.get('nobody'): d.chmod(0o777)
    before = seen(d)
    said = terminal.run(d, *shlex.split(command), **job)
    assert said.code==2, said
    assert 'Traceback' not in said.err
    last = lines_of(said.err)[-1]
    assert last.startswith(command.split()[0]+': ') and len(last)>40
    assert re.search(words, last), last
    after = seen(d)
    assert after==before, sorted(set(after)^set(before)) or 'changed'
