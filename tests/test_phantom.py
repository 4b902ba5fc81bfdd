"""What would break the flow of chapter 04: many people measured, the same bytes everywhere, and a folder that is
stopped, shared or in the way"""
import hashlib, json, os, signal, subprocess, sys, time
from itertools import combinations
from pathlib import Path
import numpy as np, pytest
from hypothesis import given, settings, strategies as st
from scipy.ndimage import binary_erosion, distance_transform_edt
from medsam_nb import phantom
from medsam_nb.core import InputError, ORGANS, sha256_array
from medsam_nb.phantom import make_phantom, medsam_phantom, write_phantoms
from medsam_nb.volume import check_pair, find_cases, read_volume

IDS = {n: i for i, n in ORGANS.items()}
SEEDS = range(100, 118)

@pytest.fixture(scope='module')
def people():
    "Eighteen people, small, with slices that cover the upper abdomen"
    return [make_phantom(seed, (36, 112, 112)) for seed in SEEDS]

def ml(label, i): return (label.array==i).sum()*np.prod(label.spacing)/1000

# --- anatomy ----------------------------------------------------------------------------------------
# ml; the lower ends allow for what the ends of the stack cut off
VOLUMES = {'liver': (800, 2200), 'spleen': (90, 400), 'right kidney': (80, 250), 'left kidney': (85, 250), 'pancreas': (25, 130), 'aorta': (30, 130),
           'inferior vena cava': (40, 160), 'right adrenal gland': (2, 12), 'left adrenal gland': (2, 12), 'gallbladder': (10, 75), 'oesophagus': (2, 30),
           'stomach': (120, 800), 'duodenum': (30, 130)}
# HU, medians; limbs of an adrenal are hardly wider than the 3 mm pixels here, so fat takes its share
HU = {'liver': (98, 130), 'spleen': (104, 135), 'right kidney': (145, 205), 'left kidney': (145, 205), 'pancreas': (70, 112), 'aorta': (145, 180),
      'inferior vena cava': (130, 170), 'right adrenal gland': (30, 95), 'left adrenal gland': (30, 95), 'gallbladder': (0, 30), 'oesophagus': (40, 85), 'duodenum': (15, 85)}

@pytest.mark.parametrize('organ', VOLUMES)
def test_volumes_are_plausible_in_everybody(people, organ):
    got = {seed: round(float(ml(l, IDS[organ])), 1) for seed, (_, l) in zip(SEEDS, people)}
    lo, hi = VOLUMES[organ]
    assert not {k: v for k, v in got.items() if not lo<=v<=hi}, got

@pytest.mark.parametrize('organ', HU)
def test_densities_are_those_of_the_portal_phase(people, organ):
    lo, hi = HU[organ]
    got = {seed: float(np.median(i.array[l.array==IDS[organ]])) for seed, (i, l) in zip(SEEDS, people)}
    assert not {k: v for k, v in got.items() if not lo<=v<=hi}, got

def test_bile_itself_is_near_water(people):
    for i, l in people:
        inner = binary_erosion(l.array==9, np.ones((1, 3, 3)))
        assert inner.sum()>20 and 0<=i.array[inner].mean()<=20

def test_surroundings(people):
    for i, l in people:
        a = i.array
        assert a.dtype==np.int16 and l.array.dtype==np.uint8 and a.min()>=-1024
        assert set(np.unique(l.array))=={0, *ORGANS}
        fat = a[(a>-140) & (a<-70)]
        assert fat.size>.05*a.size and abs(np.median(fat)+103)<6
        assert (a>250).mean()>.002, 'no bone'
        assert np.median(a[:, :6])<-980, 'no air in front of the patient'
        assert (a[-4:][(a[-4:]>-900)]<-700).sum()>50, 'no lung in the uppermost slices'

def test_everything_is_on_its_side(people):
    for i, l in people:
        at = {n: np.argwhere(l.array==k).mean(0) for k, n in ORGANS.items()}
        middle = l.shape[2]/2
        assert at['liver'][2]<middle<at['spleen'][2], 'liver left in the picture, spleen right'
        assert at['right kidney'][2]<at['inferior vena cava'][2]<at['aorta'][2]<at['left kidney'][2]
        assert at['gallbladder'][2]<middle<at['stomach'][2]
        assert at['gallbladder'][1]<at['right kidney'][1] and at['stomach'][1]<at['spleen'][1], 'rows run from front to back'
        assert at['liver'][0]>at['right kidney'][0] and at['oesophagus'][0]>at['duodenum'][0], 'slices run from feet to head'
        bone = np.argwhere(i.array>250).mean(0)
        assert bone[1]>at['aorta'][1]
        inside = l.array==IDS['stomach']
        gas, fluid = (np.argwhere(inside & m)[:, 1] for m in (i.array<-600, (i.array>-50) & (i.array<60)))
        if len(gas)>20: assert gas.mean()<fluid.mean(), 'air lies above fluid'

def test_the_gallbladder_touches_liver_and_nears_the_duodenum(people):
    for _, l in people:
        far = lambda k: distance_transform_edt(l.array!=k, sampling=l.spacing)[l.array==9].min()
        assert far(1)<=1.01*max(l.spacing) and far(1)<10
        assert far(12)<20

def test_people_differ(people):
    for (_, a), (_, b) in combinations(people, 2):
        x, y = a.array==9, b.array==9
        assert 2*(x & y).sum()/(x.sum()+y.sum())<.9
    size = [ml(l, 9) for _, l in people]
    assert max(size)>1.5*min(size)
    assert len({tuple(i.spacing) for i, _ in people})>10

def test_organs_taper(people):
    for _, l in people:
        for k in (1, 9, 13):
            area = (l.array==k).sum((1, 2))
            area = area[area>0]
            assert len(set(area))>.6*len(area) and area.min()<.5*area.max()

def test_an_organ_is_in_one_piece_mostly(people):
    from scipy.ndimage import label as pieces
    for _, l in people:
        for k in (1, 2, 3, 9, 11, 13):
            n = np.bincount(pieces(l.array==k, np.ones((3, 3, 3)))[0].ravel())[1:]
            assert n.max()>.9*n.sum(), (k, n)

# --- noise and partial volume -----------------------------------------------------------------------
def test_noise_is_correlated_and_of_ct_strength():
    for seed in range(3):
        i, l = make_phantom(seed, (8, 512, 512))
        core = binary_erosion(l.array==1, np.ones((1, 3, 3)), 8)
        z = int(core.sum((1, 2)).argmax())
        a, m = i.array[z].astype(float), core[z] & (np.abs(i.array[z]-112.)<60)
        assert 8<a[m].std()<24
        d = a-a[m].mean()
        both = m[:, 1:] & m[:, :-1]
        assert .3<(d[:, 1:]*d[:, :-1])[both].mean()/a[m].var()<.9

def test_thick_slices_blur_the_dome():
    """Under the dome the surface of the liver runs along the slices: there 5 mm slices hold more voxels that are part
    liver, part lung than 1 mm slices"""
    def mixed(dz):
        i, l = make_phantom(4, (int(220/dz), 128, 128), spacing=(dz, 2.8, 2.8))
        top = l.array[int(.8*len(l.array)):]==1
        r, c = (int(q.mean()) for q in np.nonzero(top.any(0)))
        a = i.array[-int(70/dz):, r-8:r+9, c-8:c+9]
        assert (a<-700).any() and (a>60).any(), 'the window must hold lung and liver'
        return ((a>-600) & (a<-250)).mean()
    assert mixed(5.)>1.5*mixed(1.)

# --- the same bytes ---------------------------------------------------------------------------------
def hashes(seed, size): return [sha256_array(v.array) for v in make_phantom(seed, size)]

def test_same_seed_same_bytes_whatever_was_drawn_before():
    a = hashes(5, (10, 96, 96))
    np.random.seed(1)
    make_phantom(6, (2, 64, 64))
    state = np.random.get_state()[1].copy()
    assert hashes(5, (10, 96, 96))==a!=hashes(6, (10, 96, 96))
    assert (np.random.get_state()[1]==state).all(), 'the global generator was touched'

def test_threads_change_nothing():
    code = 'from medsam_nb.phantom import *; from medsam_nb.core import sha256_array as h; print(*[h(v.array) for v in make_phantom(5, (10,96,96))])'
    out = {subprocess.run([sys.executable, '-c', code], env={**os.environ, 'OMP_NUM_THREADS': n,
                                                             'OPENBLAS_NUM_THREADS': n}, capture_output=True,
                                                             text=True, check=True).stdout for n in '12'}
    assert out=={' '.join(hashes(5, (10, 96, 96)))+'\n'}

def test_slices_do_not_depend_on_how_they_were_grouped():
    "The stack is painted 16 slices at a time; one slice more at each end moves every group boundary"
    sp = (5., 2.8, 2.8)
    z = [phantom._scan(phantom._draw_person(8), (n, 96, 96), sp)[1][0] for n in (34, 36)]
    assert np.allclose(z[0], z[1][1:-1])
    a, b = (make_phantom(8, (n, 96, 96), spacing=sp)[1].array for n in (34, 36))
    assert (a==b[1:-1]).all()

def test_one_seed_is_one_person_at_every_size():
    coarse, fine = (make_phantom(9, (30, n, n), spacing=(5., 358.4/n, 358.4/n))[1] for n in (128, 256))
    for k in ORGANS: assert ml(coarse, k)==pytest.approx(ml(fine, k), rel=.25 if k in (7, 8) else .1)
    x, y = (v.array==1 for v in (coarse, fine))
    up = x.repeat(2, 1).repeat(2, 2)
    assert 2*(up & y).sum()/(up.sum()+y.sum())>.95

# --- sizes, spacings, geometry ----------------------------------------------------------------------
@pytest.mark.parametrize('size', [(6, 96, 128), (8, 128, 128), (12, 128, 128), (16, 200, 256), (24, 64, 64)])
def test_the_gallbladder_is_always_inside(size):
    for seed in (*range(5), 70001, 110001):
        i, l = make_phantom(seed, size)
        assert i.shape==l.shape==size
        per_slice = (l.array==9).sum((1, 2))
        assert (per_slice>0).sum()>=3 and per_slice.max()*np.prod(l.spacing[1:])>100, f'seed {seed}'

def test_default_spacing_is_that_of_ct():
    for seed in range(30):
        s = phantom._scan(phantom._draw_person(seed), (40, 512, 512), None)[0]
        assert 1<=s[0]<=5 and .6<=s[1]==s[2]<=.9 and 140<40*s[0]<=225
    assert make_phantom(0, (3, 64, 64))[0].spacing[1]==pytest.approx(8*make_phantom(0, (3, 512, 512))[0].spacing[1])

@settings(max_examples=12, deadline=None)
@given(st.integers(0, 10**9), st.tuples(st.integers(1, 20), st.integers(32, 90), st.integers(32, 90)),
       st.none() | st.tuples(st.floats(.5, 12), st.floats(.3, 9), st.floats(.3, 9)))
def test_any_size_and_spacing(seed, size, spacing):
    i, l = make_phantom(seed, size, spacing)
    assert i.shape==l.shape==size and set(np.unique(l.array))<={0, *ORGANS}
    assert i.array.min()>=-1024 and i.array.max()<=3000
    if spacing: assert np.allclose(i.spacing, spacing)

@pytest.mark.parametrize('kw, word', [(dict(size=(40, 512)), 'size'), (dict(size=(0, 64, 64)), 'size'),
                                      (dict(size=(4, 64, 8)), 'size'), (dict(size=(4, 64.5, 64)), 'size'),
    (dict(size='40'), 'size'), (dict(seed=-1), 'seed'), (dict(seed=1.5), 'seed'), (dict(seed=None), 'seed'),
    (dict(size=(4, 64, 64), spacing=(1, 2)), 'spacing'), (dict(size=(4, 64, 64), spacing=(0, 1, 1)), 'spacing'),
    (dict(size=(4, 64, 64), spacing=(np.nan, 1, 1)), 'spacing'), (dict(size=(4, 64, 64), spacing='thin'), 'spacing')])
def test_what_cannot_be_made_is_refused(kw, word):
    with pytest.raises(InputError, match=word): make_phantom(**kw)

def test_files_read_back_equal_in_every_storage_order(tmp_path):
    codes = set()
    for seed in range(40):
        code = phantom._room(phantom._draw_person(seed), (5, 64, 72), np.array([4., 5., 5.])).code
        if code in codes: continue
        codes.add(code)
        i, l = make_phantom(seed, (5, 64, 72))
        out = tmp_path/code
        phantom._write_case([out/'i_0000.nii.gz', out/'i.nii.gz'], seed, (5, 64, 72), False)
        a, b = read_volume(out/'i_0000.nii.gz'), read_volume(out/'i.nii.gz', 'label')
        assert a.source.code==code and (a.array==i.array).all() and (b.array==l.array).all()
        assert a.array.dtype==np.int16 and b.array.dtype==np.uint8
        assert np.allclose(a.spacing, i.spacing, atol=1e-5) and np.allclose(a.source.origin, i.source.origin, atol=1e-3)
        check_pair(a, b)
    assert codes=={'LPS', 'RAS', 'LPI'}

# --- the folder -------------------------------------------------------------------------------------
SIZE = (5, 64, 64)
def write(out, **kw): return write_phantoms(out, **{'n': 2, 'size': SIZE, 'progress': False, **kw})
def files(out):
    """Name and hash of every file with its final name; what a killed run left in a hidden temporary folder does not
    count"""
    return {p.relative_to(out).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in sorted(out.glob('[il]*/*.nii.gz'))}
def times(out): return {p.name: p.stat().st_mtime_ns for p in out.rglob('*.nii.gz')}

def test_layout_and_equal_bytes(tmp_path):
    a = write(tmp_path/'a')
    time.sleep(1.1)  # a time stamp inside the gzip file would show
    b = write(tmp_path/'b')
    assert list(files(a))==['images/Phantom_0001_0000.nii.gz', 'images/Phantom_0002_0000.nii.gz',
                            'labels/Phantom_0001.nii.gz', 'labels/Phantom_0002.nii.gz']
    assert files(a)==files(b) and len(set(files(a).values()))==4
    assert len(find_cases(a/'images', a/'labels'))==2
    assert not [p for p in a.rglob('*') if p.name.startswith('.')]

def test_cases_are_kept_and_added(tmp_path):
    before = times(write(tmp_path))
    assert times(write(tmp_path))==before
    after = times(write(tmp_path, n=3))
    assert {k: after[k] for k in before}==before and len(after)==6
    assert {k: v for k,
            v in times(write(tmp_path, n=3, overwrite=True)).items()}==after, 'what is right already needs no rewriting'

def test_memory_lost_or_copied_folder(tmp_path):
    "Without phantom.json, or with other time stamps (a copy), cases are drawn and compared, and kept"
    before = times(write(tmp_path))
    (tmp_path/'phantom.json').unlink()
    assert times(write(tmp_path))==before
    for p in tmp_path.rglob('*.nii.gz'): os.utime(p, ns=(1, 1))
    write(tmp_path)
    assert set(times(tmp_path).values())=={1}

def test_half_a_case_is_completed(tmp_path):
    want = files(write(tmp_path))
    stamp = (tmp_path/'images'/'Phantom_0002_0000.nii.gz').stat().st_mtime_ns
    (tmp_path/'labels'/'Phantom_0002.nii.gz').unlink()
    assert files(write(tmp_path))==want
    assert (tmp_path/'images'/'Phantom_0002_0000.nii.gz').stat().st_mtime_ns==stamp

@pytest.mark.parametrize('name', ['images/Phantom_0002_0000.nii.gz', 'labels/Phantom_0002.nii.gz'])
@pytest.mark.parametrize('what', ['another phantom', 'not an image'])
def test_a_foreign_file_is_refused_untouched(tmp_path, name, what):
    other = files(write(tmp_path/'other', seed=5)) and (tmp_path/'other'/name)
    mine = tmp_path/'mine'/name
    mine.parent.mkdir(parents=True)
    mine.write_bytes(other.read_bytes() if what=='another phantom' else b'my notes')
    was = mine.read_bytes()
    with pytest.raises(InputError, match='Phantom_0002'): write(tmp_path/'mine')
    assert mine.read_bytes()==was
    assert [k for k in files(tmp_path/'mine') if '0002' in k]==[name], 'its partner must not be written either'
    write(tmp_path/'mine', overwrite=True)
    assert files(tmp_path/'mine')==files(write(tmp_path/'fresh'))

def test_other_seed_or_size_in_the_same_folder(tmp_path):
    want = files(write(tmp_path))
    for kw in (dict(seed=1), dict(size=(6, 64, 64))):
        with pytest.raises(InputError, match='overwrite'): write(tmp_path, **kw)
        assert files(tmp_path)==want
    assert files(write(tmp_path, seed=1, overwrite=True))!=want

@pytest.mark.parametrize('text', ['{"a": 1}', '[1]', 'no json'])
def test_a_foreign_record_is_not_touched(tmp_path, text):
    (tmp_path/'phantom.json').write_text(text)
    with pytest.raises(InputError, match='phantom.json'): write(tmp_path)
    assert (tmp_path/'phantom.json').read_text()==text and not files(tmp_path)

def test_bad_requests(tmp_path):
    for kw in (dict(n=0), dict(n=10_000), dict(seed=-1), dict(size=(1, 2))):
        with pytest.raises(InputError): write(tmp_path/'x', **kw)
    assert not (tmp_path/'x').exists()
    (tmp_path/'file').write_text('x')
    with pytest.raises(InputError, match='is a file'): write(tmp_path/'file')

def test_killed_in_the_middle_then_resumed(tmp_path):
    want = files(write(tmp_path/'whole', n=6))
    code = f'from medsam_nb.phantom import write_phantoms; write_phantoms({str(tmp_path/"cut")!r}, n=6, size={SIZE}, progress=False)'
    p = subprocess.Popen([sys.executable, '-c', code])
    end = time.time()+60
    while len(files(tmp_path/'cut'))<3 and p.poll() is None and time.time()<end: time.sleep(.005)
    p.send_signal(signal.SIGKILL)
    p.wait()
    got = files(tmp_path/'cut')
    assert len(got)>=3 and got.items()<=want.items(), 'a file with its final name is whole'
    write(tmp_path/'cut', n=6)
    assert files(tmp_path/'cut')==want

# --- the command ------------------------------------------------------------------------------------
def test_command(tmp_path, home, capsys):
    medsam_phantom(n=1, size='5,64,64', progress=False)
    assert len(files(home/'data'/'phantom'))==2
    assert str(home/'data'/'phantom') in capsys.readouterr().out
    with pytest.raises(InputError, match='size'): medsam_phantom(str(tmp_path/'y'), size='large')

def test_console(tmp_path):
    exe = Path(sys.executable).parent/'medsam_phantom'
    if not exe.exists(): pytest.skip('the package is not installed here, so there is no console command')
    run = lambda *a: subprocess.run([exe, '--out', 'o', '--n', '1', *a], cwd=tmp_path, capture_output=True, text=True)
    ok = run('--size', '5,64,64')
    assert ok.returncode==0 and '1 phantoms' in ok.stdout and 'phantoms' in ok.stderr, ok.stderr
    bad = run('--size', '6,64,64')
    assert bad.returncode==2 and 'Traceback' not in bad.stderr and 'overwrite' in bad.stderr
    assert json.loads((tmp_path/'o'/'phantom.json').read_text())['Phantom_0001']['seed']==2023

# --- cost -------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith('linux'),
                    reason='reads the peak memory from /proc, which only Linux has')
def test_memory_of_a_full_case():
    """A 40 x 512 x 512 case needs about 0.8 GB, libraries included; VmHWM, because ru_maxrss counts the parent's
    memory too"""
    code = '''
import re
make_phantom(1, (40,512,512))
print(re.search('VmHWM:.*?([0-9]+)', open('/proc/self/status').read())[1])'''
    out = subprocess.run([sys.executable, '-c', code], env={**os.environ, 'OMP_NUM_THREADS': '1'}, capture_output=True,
                         text=True, check=True).stdout
    assert int(out)<1.5e6, f'{int(out)/1024:.0f} MB'
