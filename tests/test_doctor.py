"A healthy folder gets no complaint; each planted fault is found, by its own name, in its own case, and nothing else is"
import json, os, shutil, subprocess, sys
from pathlib import Path
import matplotlib.pyplot as plt
import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image
import tiny
from medsam_nb import doctor
from medsam_nb.core import InputError, command_parser
from medsam_nb.curate import curate
from medsam_nb.view import Recipe
from medsam_nb.doctor import RULES, Exam, Folder, examine, guess_patients, list_folder, looks_like, medsam_doctor, _ask

CASES = ('a1', 'a2', 'a3', 'a4')
ORGANS = ((9,30,34,12), (1,30,60,12))

def ct(seed, shape=(4,64,80), **kw):
    "A scan of tiny's with air around it, so that it looks like a CT"
    img, lab = tiny.scan(seed, shape, kw.pop('organs', ORGANS), **kw)
    img[:,:8] = img[:,-8:] = img[:,:,:8] = img[:,:,-6:] = -1000
    img[:,8,8] = 900     # and a piece of bone
    return img, lab

def healthy(root, names=CASES, **kw):
    "images/ and labels/ with a CT per name"
    for k, n in enumerate(names):
        img, lab = ct(k, **dict(kw))
        tiny.save(root/'images'/f'{n}_0000.nii.gz', img)
        tiny.save(root/'labels'/f'{n}.nii.gz', lab)
    return root

def image(root, n): return root/'images'/f'{n}_0000.nii.gz'
def label(root, n): return root/'labels'/f'{n}.nii.gz'
def array(path): return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))

def again(path, change=lambda a: a, **geometry):
    "Write a file again, changed"
    tiny.save(path, change(array(path)), **geometry)

def look(root, **kw):
    return examine(root/'images', root/'labels', **(dict(quick=True, progress=False, label_ids=(9,1)) | kw))
def faults(r): return {(o.code, o.case) for o in r.findings if o.level!='note'}

# ---- a healthy folder

def test_healthy_ct(tmp_path):
    r = look(healthy(tmp_path))
    assert r.findings==[] and r.exit_code==0
    assert list(r.cases.looks_like)==['HU']*4 and list(r.cases.plane)==['axial']*4 and set(r.cases.status)=={'kept'}
    assert len(r.labels)==8 and r.labels.wanted.all() and (r.labels.kept==4).all()
    one = r.labels.iloc[0]
    assert one.voxels==(array(label(tmp_path, 'a1'))==one.id).sum() and one.ml==pytest.approx(one.voxels*.8*.8*3/1000)
    assert 'medsam_curate' in repr(r) and '0 errors' in repr(r)

def test_healthy_folder_is_left_alone(tmp_path):
    before = tiny.tree(healthy(tmp_path))
    look(tmp_path)
    assert tiny.tree(tmp_path)==before

def test_healthy_mr(tmp_path):
    healthy(tmp_path)
    for n in CASES: again(image(tmp_path, n), lambda a: np.maximum(a+50, 0).astype(np.float32)*3)
    r = look(tmp_path, modality='MR')
    assert faults(r)==set() and set(r.cases.looks_like)=={'grey values'}
    assert faults(look(tmp_path))=={('not-hu', n) for n in CASES}

def png(root, names, colour=False, seed=0):
    rng = np.random.default_rng(seed)
    for k in ('images', 'labels'): (root/k).mkdir(parents=True, exist_ok=True)
    for n in names:
        im = rng.integers(0, 256, (96,120)+(3,)*colour).astype(np.uint8)
        lab = np.where(tiny.disc((96,120), 40, 50, 20), 255, 0).astype(np.uint8)
        Image.fromarray(im).save(root/'images'/f'{n}.png')
        Image.fromarray(lab).save(root/'labels'/f'{n}.png')
    return root

@pytest.mark.parametrize('colour', [False, True])
def test_healthy_png(tmp_path, colour):
    r = look(png(tmp_path, CASES, colour), modality='Photo', label_ids='all')
    assert faults(r)==set() and {o.code for o in r.findings}=={'label-255', 'label-default'}
    assert list(r.cases.plane)==['image']*4 and r.labels.ml.isna().all() and (r.cases.kept==1).all()
    plt.close(r.show())
    assert faults(look(tmp_path, label_ids='all'))=={('window-8bit', n) for n in CASES}

# ---- planted faults: code -> (what plants it, in which case it is then found, options)

PLANTS = {}
def plant(case='a2', code=None, **options):
    "Register a function that spoils a healthy folder; `case` is where the fault is found ('' for the folder)"
    def add(f):
        PLANTS[f.__name__] = (code or f.__name__.replace('_', '-'), f, case if isinstance(case, tuple) else (case,),
                              options)
        return f
    return add

@plant('')
def no_pairs(d):
    for k, p in enumerate(sorted((d/'labels').iterdir())):
        p.rename(p.with_name('qwertz'+'xyz'[k%3]*(k+1)+'.nii.gz'))

@plant('')
def image_suffix(d):
    for n in CASES: image(d, n).rename(d/'images'/f'{n}_ct.nii.gz')

@plant('')
def label_suffix(d):
    for n in CASES: label(d, n).rename(d/'labels'/f'{n}_seg.nii.gz')

@plant('a2')
def pairs_twice(d): tiny.save(d/'images'/'a2_0000.nrrd', array(image(d, 'a2')))

@plant('A2_0000.nii.gz')
def near_miss(d): image(d, 'a2').rename(d/'images'/'A2_0000.nii.gz')

@plant('a02.nii.gz', code='unpaired')
def unpaired_label(d): shutil.copy(label(d, 'a2'), d/'labels'/'a02.nii.gz')

@plant('a2_0000.nii.gz')
def unpaired(d): label(d, 'a2').unlink()

@plant('a2.dcm')
def unread_format(d): (d/'images'/'a2.dcm').write_bytes(b'x')

@plant('more')
def subfolder(d): (d/'images'/'more').mkdir()

@plant('')
def ignored(d):
    (d/'labels'/'.DS_Store').write_bytes(b'x')
    (d/'labels'/'notes.txt').write_text('x')

@plant()
def swapped(d):
    a, b = image(d, 'a2').read_bytes(), label(d, 'a2').read_bytes()
    image(d, 'a2').write_bytes(b)
    label(d, 'a2').write_bytes(a)

@plant()
def unreadable(d): image(d, 'a2').write_bytes(image(d, 'a2').read_bytes()[:2000])

@plant(code='unreadable')
def unreadable_label(d): label(d, 'a2').write_text('not an image')

@plant()
def nan(d): again(image(d, 'a2'), lambda a: np.where(a==a.max(), np.nan, a).astype(np.float32))

@plant()
def label_probabilities(d): again(label(d, 'a2'), lambda a: (a==9)*np.float32(.75))

@plant()
def label_fraction(d): again(label(d, 'a2'), lambda a: a.astype(np.float32)*.97)

@plant()
def label_negative(d): again(label(d, 'a2'), lambda a: -a.astype(np.int16))

@plant()
def label_too_large(d): again(label(d, 'a2'), lambda a: a.astype(np.float32)*1e5)

@plant()
def label_colour(d):
    label(d, 'a2').unlink()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64,80,3)).astype(np.uint8)).save(d/'labels'/'a2.png')

@plant()
def geometry_size(d): again(label(d, 'a2'), lambda a: a[:3])

@plant()
def geometry_spacing(d): again(label(d, 'a2'), spacing=(1,1,1))

@plant()
def geometry_origin(d): again(label(d, 'a2'), origin=(0,0,5))

@plant()
def geometry_direction(d):
    again(label(d, 'a2'), direction=(np.cos(.1),-np.sin(.1),0, np.sin(.1),np.cos(.1),0, 0,0,1))

@plant()
def size_odd(d):
    for p in (image(d, 'a2'), label(d, 'a2')): again(p, spacing=(.08,.08,.3))

@plant()
def spacing_unit(d):
    for p in (image(d, 'a2'), label(d, 'a2')): again(p, spacing=(1,1,1))

@plant()
def label_empty(d): again(label(d, 'a2'), lambda a: a*0)

@plant()
def label_many_ids(d):
    again(label(d, 'a2'), lambda a: a+((a==0)*np.where(np.arange(80)>40, 100+np.arange(64)[:,None]*2+np.arange(80)%2,
                                                       0)[None]).astype(np.uint8))

@plant()
def no_background(d): again(label(d, 'a2'), lambda a: np.where(a==0, 1, a).astype(np.uint8))

@plant(CASES, label_ids='all')
def label_255(d):
    for n in CASES: again(label(d, n), lambda a: ((a>0)*255).astype(np.uint8))

@plant()
def one_slice(d): again(label(d, 'a2'), lambda a: a*((a==9)|(np.arange(4)==1)[:,None,None]))

@plant('')
def small_organ(d):
    for n in CASES:
        again(label(d, n), lambda a: np.where((a==1)&(np.arange(4)>0)[:,None,None]&~tiny.disc((64,80), 30, 60, 1.5), 0,
                                              a).astype(np.uint8))

@plant()
def nothing_kept(d): again(label(d, 'a2'), lambda a: (a>0).astype(np.uint8)*7)

@plant()
def constant_image(d): again(image(d, 'a2'), lambda a: a*0+5)

@plant()
def window_8bit(d): again(image(d, 'a2'), lambda a: np.clip(a+60, 0, 255).astype(np.uint8))

@plant()
def already_windowed(d): again(image(d, 'a2'), lambda a: np.clip(a+60, 0, 255))

@plant()
def scaled(d): again(image(d, 'a2'), lambda a: np.clip((a+160)/400, 0, 1).astype(np.float32))

@plant(code='scaled')
def standardised(d): again(image(d, 'a2'), lambda a: ((a-a.mean())/a.std()).astype(np.float32))

@plant()
def shifted(d): again(image(d, 'a2'), lambda a: a+1024)

@plant()
def not_hu(d): again(image(d, 'a2'), lambda a: np.maximum(a+50, 0)*3)

@plant()
def clipped(d): again(image(d, 'a2'), lambda a: np.clip(a, -160, 120))

@plant()
def no_air(d):
    again(image(d, 'a2'), lambda a: np.where(a<-500, 30, a)-(np.arange(80)==0)[None,
        None].astype(np.int16)*np.int16(100))

@plant(CASES, modality='MR')
def hu_without_window(d): pass

@plant()
def outliers(d): again(image(d, 'a2'), lambda a: np.where(a==a.max(), 20000, a).astype(np.int16))

@plant(CASES, window=(-1000,0))
def saturated(d): pass

@plant()
def duplicate_image(d): shutil.copy(image(d, 'a1'), image(d, 'a2'))

@plant('a2', patient='(a[134])')
def patient_pattern(d): pass

@plant('')
def several_scans(d):
    for k, n in enumerate(CASES):
        image(d, n).rename(image(d, f'p{k//2}_scan{n[1]}'))
        label(d, n).rename(label(d, f'p{k//2}_scan{n[1]}'))

@plant('')
def few_patients(d):
    for n in CASES[2:]:
        image(d, n).unlink()
        label(d, n).unlink()

@plant()
def plane_mixed(d):
    for p in (image(d, 'a2'), label(d, 'a2')): again(p, spacing=(4,.8,.8))

@plant('', label_ids=(9,77))
def id_absent(d): pass

@plant('a2', label_ids='all')
def id_lonely(d):
    again(label(d, 'a2'), lambda a: np.where(a==9, 8, a).astype(np.uint8)+((a==0)&tiny.disc((64,80), 46, 34,
        4)[None])*np.uint8(9))

@plant('', min_pixels=60000)
def no_slice_kept(d): pass

@plant('', label_ids='all')
def label_default(d):
    for n in CASES: again(label(d, n), lambda a: (a>0).astype(np.uint8)*2)

BRINGS = dict(no_slice_kept={'nothing-kept', 'small-organ'})   # what a fault brings along, and rightly so

@pytest.mark.parametrize('name', PLANTS)
def test_planted_fault_is_found_alone(tmp_path, name):
    code, spoil, cases, options = PLANTS[name]
    spoil(healthy(tmp_path))
    r = look(tmp_path, **options)
    wanted = {(code, c) for c in cases}
    found = {(o.code, o.case) for o in r.findings}
    assert wanted<=found, r
    if RULES[code].level!='note': assert {o for o in faults(r) if o[0] not in BRINGS.get(name, ())}==wanted, r
    else: assert faults(r)==set() and {o for o in found if o[0]==code}==wanted, r
    assert r.exit_code==int(RULES[code].level=='error')
    assert all(o.message for o in r.findings) and code in repr(r)
    json.loads(r.to_json())
    if r.thumbnails: plt.close(r.show())

def test_every_rule_is_planted():
    "All but those that need a full disk, or a fault that no other rule knows"
    assert {o[0] for o in PLANTS.values()}==set(RULES)-{'disk', 'not-measured', 'geometry-other', 'not-curated',
                                                        'names-clash'} and len(PLANTS)>=24

# ---- what the rules say

def one(r, code): return next(o for o in r.findings if o.code==code)

def test_geometry_names_every_difference_with_both_values(tmp_path):
    again(label(healthy(tmp_path), 'a3'), lambda a: a[:3], spacing=(.9,.9,3), origin=(1,2,3))
    r = look(tmp_path)
    assert faults(r)=={('geometry-size','a3'), ('geometry-spacing','a3'), ('geometry-origin','a3')}
    assert one(r, 'geometry-size').values==dict(image=[4,64,80], label=[3,64,80], difference=[-1,0,0])
    assert one(r, 'geometry-origin').values['difference']==[1,2,3]
    assert one(r, 'geometry-spacing').values['label']==pytest.approx([3,.9,.9])

def test_a_label_without_spacing_has_the_same_size(tmp_path):
    "Cut in another plane the label would seem to have another size; only its spacing is wrong"
    healthy(tmp_path)
    again(image(tmp_path, 'a1'), spacing=(4,.8,.8))
    again(label(tmp_path, 'a1'), spacing=(1,1,1))
    assert {o for o in faults(look(tmp_path)) if o[0].startswith('geometry')}=={('geometry-spacing', 'a1')}

def test_two_folders_exchanged(tmp_path):
    healthy(tmp_path)
    for n in CASES: image(tmp_path, n).rename(image(tmp_path, n).with_name(f'{n}.nii.gz'))
    r = examine(tmp_path/'labels', tmp_path/'images', quick=True, progress=False)
    assert faults(r)=={('swapped', n) for n in CASES}

def test_guessed_pairs_are_examined(tmp_path):
    "Nothing pairs, and still the fault inside is found"
    image_suffix(healthy(tmp_path))
    again(label(tmp_path, 'a2'), origin=(0,0,5))
    r = look(tmp_path)
    assert faults(r)=={('image-suffix',''), ('geometry-origin','a2')} and '--image_suffix _ct' in one(r,
        'image-suffix').do
    assert faults(look(tmp_path, image_suffix='_ct'))=={('geometry-origin','a2')}

def test_several_scans_names_a_pattern_that_curate_takes(tmp_path):
    several_scans(healthy(tmp_path, ('a1','a2','a3','a4')))
    pattern = one(look(tmp_path), 'several-scans').values['pattern']
    t = curate(tmp_path/'images', tmp_path/'labels', tmp_path/'out', label_ids=(9,), patient=pattern,
               progress=False).table
    assert list(t.patient)==['0','0','1','1']
    assert faults(look(tmp_path, patient=pattern))=={('few-patients','')}

@pytest.mark.parametrize('names', [['FLARE22_Tr_0001','FLARE22_Tr_0002'], ['a','b'], ['1','2'],
                                   ['p12_axis2_mid','p7_axis2_mid'], ['x1_y1','z1_y2'], []])
def test_no_patients_are_made_up(names): assert guess_patients(names)==(None, {})

def test_disk_too_small(tmp_path):
    f = list_folder(*(healthy(tmp_path)/o for o in ('images','labels')))
    f.recipe, f.needs = Recipe(), dict(bytes=3e9, free_bytes=1e9)
    found, = _ask('folder', f)
    assert found.code=='disk' and '3.0 GB' in found.message and '1.0 GB' in found.message

def test_faults_unknown_to_the_rules_keep_their_sentence(tmp_path):
    f = list_folder(*(healthy(tmp_path)/o for o in ('images','labels')))
    x = Exam(f.cases[0], Recipe(), (9,))
    assert x.status=='kept'
    x.errors.update(pair='odd pair', curate='odd case')
    assert {(o.code, o.message) for o in _ask('case', x, 'a1')}=={('geometry-other','odd pair'),
                                                                  ('not-curated','odd case')}

def test_a_rule_of_ones_own(tmp_path):
    healthy(tmp_path)
    try:
        @doctor.rule('case', 'warning')
        def _bright(x):
            if x.span[1]>800: yield doctor.Found('bright')
        assert faults(look(tmp_path))=={('bright', n) for n in CASES}
    finally: RULES.pop('bright', None)

def test_folders_that_cannot_be_used(tmp_path):
    d = healthy(tmp_path/'d')
    (tmp_path/'empty').mkdir()
    for a, b, words in ((d/'images', d/'no', 'does not exist'), (d/'images', d/'images', 'one folder'),
                        (tmp_path/'empty', d/'labels', 'no images'), (d/'images', image(d, 'a1'), 'is a file')):
        with pytest.raises(InputError, match=words): examine(a, b, quick=True)
    with pytest.raises(InputError, match='regular expression'): look(d, patient='(')
    with pytest.raises(InputError, match='label_ids'): look(d, label_ids=(0,))

# ---- the same numbers as curation

@pytest.mark.parametrize('ids', ['all', (9,), (1,9)])
def test_dry_run_counts_are_those_of_curate(tmp_path, ids):
    d = healthy(tmp_path, ('a1','a2','a3','a4','a5','a6'), shape=(6,64,80), zs=(1,2,4))
    label_empty(d)
    again(label(d, 'a3'), lambda a: np.where((a==1)&~tiny.disc((64,80), 30, 60, 4), 0, a).astype(np.uint8))
    again(label(d, 'a4'), origin=(0,0,5))
    unreadable_label(d) if ids==(9,) else None
    again(image(d, 'a5'), lambda a: np.where((np.arange(6)==2)[:,None,None], 7, a).astype(np.int16))
    mine, theirs = look(d, label_ids=ids).cases, curate(d/'images', d/'labels', tmp_path/'out', label_ids=ids,
                                                        progress=False).table
    for k in ('case','kept','dropped'): assert list(mine[k])==list(theirs[k]), k
    for a, b, s in zip(mine.reasons, theirs.reasons, mine.status):
        assert (a==b) if s!='failed' else set(a)==set(b)=={'error'}
    assert list(mine.status.replace('kept', 'new'))==list(theirs.status)
    assert mine.reasons.map(len).sum()>6

def test_measured_size_is_near_the_real_one(tmp_path, home):
    d = healthy(tmp_path/'d')
    r = examine(d/'images', d/'labels', label_ids=(9,), device='cpu', progress=False)
    files = curate(d/'images', d/'labels', tmp_path/'out', label_ids=(9,), progress=False).files()
    real = sum(f.stat().st_size for f in files)
    assert .7*real<r.needs['npz_bytes']<1.4*real
    assert r.needs['slices']==16
    assert r.needs['embedding_bytes']==16*256*64*64*2
    assert r.needs['bytes']==r.needs['npz_bytes']+r.needs['embedding_bytes']
    assert r.needs['embed_seconds']>0
    assert r.needs['curate_seconds']>0
    assert r.needs['free_bytes']>0
    assert r.needs['device']=='cpu'
    assert 'disk: about' in repr(r) and 'time: about' in repr(r)

def test_what_cannot_be_measured_is_a_note(tmp_path):
    d = healthy(tmp_path)
    r = look(d, quick=False, checkpoint=str(tmp_path/'no.pth'))
    assert [(o.level, o.code) for o in r.findings]==[('note', 'not-measured')]

def test_one_case_in_memory(tmp_path, monkeypatch):
    "When a case is read, the exams before it are gone, and each file is read once"
    import weakref
    d, alive, reads = healthy(tmp_path), [], []
    real = doctor.read_volume
    def watch(path, **kw):
        reads.append(Path(path).name)
        v = real(path, **kw)
        assert sum(o() is not None for o in alive)<=1
        alive.append(weakref.ref(v))
        return v
    monkeypatch.setattr(doctor, 'read_volume', watch)
    look(d)
    assert sorted(reads)==sorted([f'{n}_0000.nii.gz' for n in CASES]+[f'{n}.nii.gz' for n in CASES])

@pytest.mark.parametrize('make,verdict', [(lambda a: a, 'HU'), (lambda a: a+1024, 'HU + 1024'),
                                          (lambda a: np.clip(a+60, 0, 255), '0 to 255'), (lambda a: a*0, 'constant'),
                                          (lambda a: np.clip(a, -100, 100), 'HU clipped')])
def test_looks_like(make, verdict): assert looks_like(make(ct(0)[0]).reshape(-1))==verdict

# ---- the command

def call(where, *args, code=0):
    "Run the command as its console script runs it"
    script = where/'medsam_doctor'
    script.write_text('import sys\nfrom medsam_nb.doctor import medsam_doctor\nsys.exit(medsam_doctor())\n')
    env = dict(os.environ, MEDSAM_NB_HOME=str(where), PYTHONPATH=str(Path(__file__).resolve().parents[1]),
               PYTHONWARNINGS='ignore', MPLBACKEND='agg')
    p = subprocess.run([sys.executable, str(script), *map(str, args)], env=env, capture_output=True, text=True,
                       cwd=where)
    assert p.returncode==code and 'Traceback' not in p.stderr, p.stdout+p.stderr
    return p

def test_command_exit_codes_and_json(tmp_path):
    d = healthy(tmp_path/'d')
    before = tiny.tree(d)
    p = call(tmp_path, d/'images', d/'labels', '--quick', '--label_ids', '1,9')
    sheet = tmp_path/'work_dir/doctor/d_images.png'
    assert '0 errors' in p.stdout and str(sheet) in p.stdout and Image.open(sheet).size[0]>300
    # warnings alone: 0
    p = call(tmp_path, d/'images', d/'labels', '--quick', '--window=-1000,0', '--json', '-', '--label_ids', '9')
    told = json.loads(p.stdout)
    assert told['counts']==dict(error=0, warning=4, note=0) and {o['code'] for o in told['findings']}=={'saturated'}
    assert tiny.tree(d)==before
    again(label(d, 'a2'), origin=(0,0,5))
    call(tmp_path, d/'images', d/'labels', '--quick', '--json', 'x.json', '--out', 'x.png', code=1)
    told = json.loads((tmp_path/'x.json').read_text())
    first = told['findings'][0]
    assert ({k:first[k] for k in ('level','code','case')}==dict(level='error', code='geometry-origin',
                                                               case='a2'))
    assert (first['values']['difference']==[0,0,
                                                                   5])
    assert first['message']
    assert first['do']
    assert len(told['cases'])==4
    assert told['cases'][1]['status']=='failed'
    assert len(told['labels'])==8
    assert (tmp_path/'x.png').exists()

def test_command_refuses(tmp_path, home):
    d = healthy(tmp_path/'d', CASES[:1])
    (tmp_path/'mine.png').write_text('mine')
    both = str(d/'images'), str(d/'labels')
    assert 'nowhere' in call(tmp_path, d/'images', d/'nowhere', '--quick', code=2).stderr
    for options, words in ((dict(out=d/'labels'/'x.png'), 'writes nothing into the data'),
                           (dict(out=tmp_path/'mine.png'), 'exists already'), (dict(out='x.tif'), 'must end in .png'),
                           (dict(out=tmp_path/'d', json=tmp_path), 'must end in'),
                           (dict(json=d/'images'/'x.json'), 'writes nothing'), (dict(json=tmp_path), 'is a folder'),
                           (dict(label_ids='liver'), 'cannot be read'), (dict(window='bone'), 'is not known')):
        with pytest.raises(InputError, match=words): medsam_doctor(*both, quick=True, **options)
    assert (tmp_path/'mine.png').read_text()=='mine' and not (tmp_path/'work_dir').exists()
    medsam_doctor(*both, quick=True, out=tmp_path/'mine.png', overwrite=True, progress=False)
    # its own sheet is replaced
    medsam_doctor(*both, quick=True, progress=False)
    medsam_doctor(*both, quick=True, progress=False)
    assert Image.open(tmp_path/'mine.png').format=='PNG'
    assert [o.name for o in (tmp_path/'work_dir/doctor').iterdir()]==['d_images.png']

def test_command_help_tells_the_exit_codes():
    text = ' '.join(command_parser(medsam_doctor).format_help().split())
    assert 'exit code 0 no errors, 1 errors, 2 a folder or option is of no use' in text

def test_command_has_the_options_of_examine_and_of_a_recipe():
    options = {o for a in command_parser(medsam_doctor)._actions for o in a.option_strings}
    assert {'--label_ids','--out','--json','--quick','--ids','--colors','--no-progress','--window','--min_pixels',
            '--flip'}<=options
    assert not {'--recipe','--anatomy'}&options

@pytest.mark.parametrize('old,new', [('label_id','label_ids'), ('names','ids')])
def test_old_names_of_options_work_for_one_version(old, new): assert medsam_doctor.renamed[old]==new

def test_old_name_of_label_ids_warns_and_counts(tmp_path, home):
    d = healthy(tmp_path/'d', CASES[:1])
    with pytest.warns(FutureWarning, match='label_id is called label_ids now'):
        r = medsam_doctor(str(d/'images'), str(d/'labels'), label_id='9', quick=True, progress=False)
    assert r.folder.label_ids==(9,)

# ---- codes

SPOILS = [(nan,'nan'), (label_fraction,'label-fraction'), (label_negative,'label-negative'),
          (label_too_large,'label-too-large'),
          (label_colour,'label-colour'), (unreadable,'cut-off'), (geometry_size,'pair-size'),
          (geometry_origin,'pair-origin')]
@pytest.mark.parametrize('spoil,code', SPOILS)
def test_the_table_of_cases_holds_the_code_of_the_error(tmp_path, spoil, code):
    spoil(healthy(tmp_path))
    rows = {r['case']:r for r in json.loads(look(tmp_path).to_json())['cases']}
    assert {n:r['code'] for n,r in rows.items()}=={'a1':'', 'a2':code, 'a3':'', 'a4':''}

def test_a_finding_of_the_reader_holds_the_code_of_its_error(tmp_path):
    unreadable(healthy(tmp_path))
    assert one(look(tmp_path), 'unreadable').values['error']=='cut-off'

def test_rules_do_not_read_sentences(tmp_path, monkeypatch):
    "The same findings when the reader speaks another language"
    nan(healthy(tmp_path))
    real = doctor.read_volume
    def read(*args, **kwargs):
        try: return real(*args, **kwargs)
        except InputError as e: raise InputError('schade', e.code) from None
    monkeypatch.setattr(doctor, 'read_volume', read)
    assert faults(look(tmp_path))=={('nan','a2')}

def test_the_voxels_of_a_header_are_not_complained_of(tmp_path):
    healthy(tmp_path)
    tiny.save(tmp_path/'images'/'b_0000.mhd', ct(9)[0])
    assert 'ignored' not in {o.code for o in look(tmp_path).findings}

# ---- real scans

@pytest.mark.real
@pytest.mark.parametrize('name,options,looks', [('abdomen_ct', {}, 'HU'), ('spleen_ct', {}, 'HU'),
                                                ('sarcoma_ct', {}, 'HU'),
                                                ('sarcoma_mr', dict(modality='MR'), 'grey values'),
    ('btcv2d', dict(modality='CT2D', flip='ud', patient=r'ABD_(\d+)_'), '0 to 255'),
    ('xray_mr_2d/SCD', dict(modality='MR'), '0 to 255'), ('xray_mr_2d/HipXRay', dict(modality='XR'), '0 to 255')])
def test_real_scans_have_no_errors(real_data, name, options, looks):
    r = examine(real_data/name/'images', real_data/name/'labels', quick=True, progress=False, **options)
    print(r)
    assert r.errors==[] and set(r.cases.looks_like)=={looks} and r.cases.kept.sum()>0
    plt.close(r.show())

@pytest.mark.real
def test_real_mr_under_a_ct_window_is_told(real_data):
    r = examine(real_data/'sarcoma_mr/images', real_data/'sarcoma_mr/labels', quick=True, progress=False)
    assert {o.case for o in r.warnings if o.code in ('not-hu','shifted')}==set(r.cases.case)

@pytest.mark.real
def test_real_slices_of_a_few_patients_are_told(real_data):
    r = examine(real_data/'btcv2d/images', real_data/'btcv2d/labels', quick=True, progress=False, modality='CT2D')
    assert one(r, 'several-scans').values==dict(pattern=r'^ABD_(\d+)', patients=17)
