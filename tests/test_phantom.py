"Chapter 04 at length: many people measured, the same bytes everywhere, a folder that is stopped, shared or in the way"
import hashlib, json, os, signal, subprocess, sys, time
from itertools import combinations
from pathlib import Path
import numpy as np, pytest
from hypothesis import given, settings, strategies as st
from scipy.ndimage import binary_erosion, distance_transform_edt
from medsam_nb import phantom
from medsam_nb.core import ORGANS, InputError, sha256_array
from medsam_nb.metrics import dsc
from medsam_nb.phantom import make_phantom, medsam_phantom, write_phantoms
from medsam_nb.volume import check_pair, find_cases, read_volume

IDS = {n:i for i, n in ORGANS.items()}
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
    got = {seed:round(float(ml(l, IDS[organ])), 1) for seed,(_,l) in zip(SEEDS, people)}
    lo,hi = VOLUMES[organ]
    assert not {k:v for k,v in got.items() if not lo<=v<=hi}, got

@pytest.mark.parametrize('organ', HU)
def test_densities_are_those_of_the_portal_phase(people, organ):
    lo,hi = HU[organ]
    got = {seed:float(np.median(i.array[l.array==IDS[organ]])) for seed,(i,l) in zip(SEEDS, people)}
    assert not {k:v for k,v in got.items() if not lo<=v<=hi}, got

def test_bile_itself_is_near_water(people):
    for i,l in people:
        inner = binary_erosion(l.array==9, np.ones((1, 3, 3)))
        assert inner.sum()>20 and 0<=i.array[inner].mean()<=20

def test_both_arrays_are_of_the_type_that_files_have(people):
    for i,l in people:
        assert (i.array.dtype,l.array.dtype)==(np.int16,np.uint8)
        assert i.array.min()>=-1024

def test_everybody_has_all_organs(people):
    for _,l in people: assert set(np.unique(l.array))=={0,*ORGANS}

def test_everybody_has_fat_of_the_right_density(people):
    for i,_ in people:
        fat = i.array[(i.array>-140) & (i.array<-70)]
        assert fat.size>.05*i.array.size
        assert abs(np.median(fat)+103)<6

def test_everybody_has_bone(people):
    for i,_ in people: assert (i.array>250).mean()>.002

def test_there_is_air_in_front_of_the_patient(people):
    for i,_ in people: assert np.median(i.array[:,:6])<-980

def test_there_is_lung_in_the_uppermost_slices(people):
    for i,_ in people:
        top = i.array[-4:]
        assert (top[top>-900]<-700).sum()>50

@pytest.fixture(scope='module')
def places(people):
    "Middle (z, y, x) of each organ of everybody"
    return [{n:np.argwhere(l.array==k).mean(0) for k,n in ORGANS.items()} for _,l in people]

# axis 2 runs from the picture's left, the patient's right; axis 1 from front to back; axis 0 from feet to head
IN_ORDER = [
    (2,('liver','spleen')), (2,('gallbladder','stomach')),
    (2,('right kidney','inferior vena cava','aorta','left kidney')),
    (1,('gallbladder','right kidney')), (1,('stomach','spleen')),
    (0,('right kidney','liver')), (0,('duodenum','oesophagus'))]

@pytest.mark.parametrize('axis,organs', IN_ORDER)
def test_organs_lie_in_order_along_the_axes(places, axis, organs):
    for at in places:
        along = [at[n][axis] for n in organs]
        assert along==sorted(along)

@pytest.mark.parametrize('left,right', [('liver','spleen'), ('gallbladder','stomach')])
def test_organs_lie_on_their_side_of_the_body(people, places, left, right):
    for (_,l),at in zip(people, places): assert at[left][2]<l.shape[2]/2<at[right][2]

def test_bone_lies_behind_the_aorta(people, places):
    for (i,_),at in zip(people, places): assert np.argwhere(i.array>250).mean(0)[1]>at['aorta'][1]

def test_air_lies_above_fluid_in_the_stomach(people):
    for i,l in people:
        inside = l.array==IDS['stomach']
        gas = np.argwhere(inside & (i.array<-600))[:,1]
        fluid = np.argwhere(inside & (i.array>-50) & (i.array<60))[:,1]
        if len(gas)>20: assert gas.mean()<fluid.mean()

def from_gallbladder(l, k):
    "Least distance of the gallbladder from organ `k`, mm"
    return distance_transform_edt(l.array!=k, sampling=l.spacing)[l.array==9].min()

def test_the_gallbladder_touches_the_liver(people):
    for _,l in people: assert from_gallbladder(l, 1)<=min(10, 1.01*max(l.spacing))

def test_the_gallbladder_nears_the_duodenum(people):
    for _,l in people: assert from_gallbladder(l, 12)<20

def test_no_two_gallbladders_are_the_same(people):
    for (_,a),(_,b) in combinations(people, 2): assert dsc(a.array==9, b.array==9)<.9

def test_gallbladders_differ_in_size(people):
    sizes = [ml(l, 9) for _,l in people]
    assert max(sizes)>1.5*min(sizes)

def test_spacings_differ(people): assert len({tuple(i.spacing) for i,_ in people})>10

def test_organs_taper(people):
    for _,l in people:
        for k in (1, 9, 13):
            area = (l.array==k).sum((1, 2))
            area = area[area>0]
            assert len(set(area))>.6*len(area) and area.min()<.5*area.max()

def test_an_organ_is_in_one_piece_mostly(people):
    from scipy.ndimage import label as pieces
    for _,l in people:
        for k in (1, 2, 3, 9, 11, 13):
            n = np.bincount(pieces(l.array==k, np.ones((3, 3, 3)))[0].ravel())[1:]
            assert n.max()>.9*n.sum(), (k, n)

# --- noise and partial volume -----------------------------------------------------------------------
@pytest.fixture(scope='module', params=range(3))
def liver_core(request):
    "HU of one slice, and where deep in the liver it lies"
    i,l = make_phantom(request.param, (8,512,512))
    core = binary_erosion(l.array==1, np.ones((1,3,3)), 8)
    z = int(core.sum((1,2)).argmax())
    return i.array[z].astype(float), core[z] & (np.abs(i.array[z]-112.)<60)

def test_noise_has_the_strength_of_a_ct(liver_core):
    a,m = liver_core
    assert 8<a[m].std()<24

def test_noise_is_correlated(liver_core):
    a,m = liver_core
    d = a-a[m].mean()
    both = m[:,1:] & m[:,:-1]
    assert .3<(d[:,1:]*d[:,:-1])[both].mean()/a[m].var()<.9

def under_the_dome(dz):
    "HU of a column of slices `dz` mm apart, where the surface of the liver runs along the slices"
    i,l = make_phantom(4, (int(220/dz),128,128), spacing=(dz,2.8,2.8))
    top = l.array[int(.8*len(l.array)):]==1
    r,c = (int(q.mean()) for q in np.nonzero(top.any(0)))
    return i.array[-int(70/dz):,r-8:r+9,c-8:c+9]

def test_thick_slices_hold_more_voxels_that_are_part_liver_part_lung():
    thin,thick = under_the_dome(1.), under_the_dome(5.)
    for a in (thin,thick): assert a.min()<-700 and a.max()>60, 'the column must hold lung and liver'
    def mixed(a): return ((a>-600) & (a<-250)).mean()
    assert mixed(thick)>1.5*mixed(thin)

# --- the same bytes ---------------------------------------------------------------------------------
def hashes(seed, size): return [sha256_array(v.array) for v in make_phantom(seed, size)]

SMALL = (10,96,96)

def test_same_seed_same_bytes_whatever_was_drawn_before():
    a = hashes(5, SMALL)
    np.random.seed(1)
    make_phantom(6, (2,64,64))
    assert hashes(5, SMALL)==a!=hashes(6, SMALL)

def test_the_global_generator_is_not_touched():
    np.random.seed(1)
    state = np.random.get_state()[1].copy()
    make_phantom(6, (2,64,64))
    assert (np.random.get_state()[1]==state).all()

HASH = '''
from medsam_nb.core import sha256_array
from medsam_nb.phantom import make_phantom
print(*[sha256_array(v.array) for v in make_phantom(5, (10,96,96))])'''

def said(code, **env):
    "What a Python of its own prints"
    return subprocess.run(
        [sys.executable,'-c',code], env={**os.environ,**env}, capture_output=True, text=True, check=True).stdout

@pytest.mark.parametrize('n', ['1','2'])
def test_threads_change_nothing(n):
    assert said(HASH, OMP_NUM_THREADS=n, OPENBLAS_NUM_THREADS=n).split()==hashes(5, SMALL)

def test_slices_do_not_depend_on_how_they_were_grouped():
    "The stack is painted 16 slices at a time; one slice more at each end moves every group boundary"
    spacing = (5.,2.8,2.8)
    z = [phantom._scan(phantom._draw_person(8), (n,96,96), spacing)[1][0] for n in (34,36)]
    assert np.allclose(z[0], z[1][1:-1])
    a,b = (make_phantom(8, (n,96,96), spacing=spacing)[1].array for n in (34,36))
    assert (a==b[1:-1]).all()

@pytest.fixture(scope='module')
def two_sizes():
    "The labels of one person at 128 and at 256 pixels"
    return [make_phantom(9, (30,n,n), spacing=(5.,358.4/n,358.4/n))[1] for n in (128,256)]

@pytest.mark.parametrize('k', ORGANS)
def test_an_organ_is_as_large_at_every_size(two_sizes, k):
    coarse,fine = (ml(l, k) for l in two_sizes)
    assert coarse==pytest.approx(fine, rel=.25 if k in (7,8) else .1)

def test_one_seed_is_one_person_at_every_size(two_sizes):
    coarse,fine = (l.array==1 for l in two_sizes)
    assert dsc(coarse.repeat(2, 1).repeat(2, 2), fine)>.95

# --- sizes, spacings, geometry ----------------------------------------------------------------------
@pytest.mark.parametrize('size', [(6, 96, 128), (8, 128, 128), (12, 128, 128), (16, 200, 256), (24, 64, 64)])
def test_the_gallbladder_is_always_inside(size):
    for seed in (*range(5),70001,110001):
        i,l = make_phantom(seed, size)
        assert i.shape==l.shape==size
        per_slice = (l.array==9).sum((1,2))
        largest = per_slice.max()*np.prod(l.spacing[1:])
        assert (per_slice>0).sum()>=3 and largest>100, f'seed {seed}'

@pytest.fixture(scope='module')
def spacings():
    return [phantom._scan(phantom._draw_person(seed), (40,512,512), None)[0] for seed in range(30)]

def test_slices_are_as_far_apart_as_those_of_a_ct(spacings):
    for z,_,_ in spacings:
        assert 1<=z<=5
        assert 140<40*z<=225

def test_pixels_are_square_and_as_large_as_those_of_a_ct(spacings):
    for _,y,x in spacings: assert .6<=y==x<=.9

def test_pixels_of_a_smaller_image_are_larger():
    small,large = (make_phantom(0, (3,n,n))[0].spacing[1] for n in (64,512))
    assert small==pytest.approx(8*large)

@settings(max_examples=12, deadline=None)
@given(st.integers(0, 10**9), st.tuples(st.integers(1, 20), st.integers(32, 90), st.integers(32, 90)),
       st.none() | st.tuples(st.floats(.5, 12), st.floats(.3, 9), st.floats(.3, 9)))
def test_any_size_and_spacing_can_be_made(seed, size, spacing):
    i,l = make_phantom(seed, size, spacing)
    assert i.shape==l.shape==size
    assert set(np.unique(l.array))<={0,*ORGANS}
    assert i.array.min()>=-1024 and i.array.max()<=3000
    if spacing: assert np.allclose(i.spacing, spacing)

@pytest.mark.parametrize('size', [(40,512), (0,64,64), (4,64,8), (4,64.5,64), '40'], ids=str)
def test_what_is_no_size_is_refused(size):
    with pytest.raises(InputError, match='size'): make_phantom(size=size)

@pytest.mark.parametrize('seed', [-1,1.5,None])
def test_what_is_no_seed_is_refused(seed):
    with pytest.raises(InputError, match='seed'): make_phantom(seed)

@pytest.mark.parametrize('spacing', [(1,2), (0,1,1), (float('nan'),1,1), 'thin'], ids=str)
def test_what_is_no_spacing_is_refused(spacing):
    with pytest.raises(InputError, match='spacing'): make_phantom(size=(4,64,64), spacing=spacing)

WIDE = (5,64,72)

def code_of(seed): return phantom._room(phantom._draw_person(seed), WIDE, np.array([4.,5.,5.])).code

@pytest.fixture(scope='module')
def seed_of():
    "Storage order -> a seed that has it"
    return {code_of(seed):seed for seed in reversed(range(40))}

def test_cases_are_stored_in_three_orders(seed_of): assert set(seed_of)=={'LPS','RAS','LPI'}

@pytest.fixture(scope='module', params=['LPS','RAS','LPI'])
def read_back(request, seed_of, tmp_path_factory):
    "Made and read (image, label), stored in one of the orders"
    seed,out = seed_of[request.param],tmp_path_factory.mktemp(request.param)
    files = [out/'i_0000.nii.gz',out/'i.nii.gz']
    phantom._write_case(files, seed, WIDE, False)
    return make_phantom(seed, WIDE),(read_volume(files[0]),read_volume(files[1], 'label')),request.param

def test_files_read_back_equal_in_every_storage_order(read_back):
    made,read,code = read_back
    assert read[0].source.code==code
    for m,r in zip(made, read):
        assert r.array.dtype==m.array.dtype
        assert (r.array==m.array).all()

def test_geometry_reads_back_in_every_storage_order(read_back):
    (made,_),(read,label),_ = read_back
    assert np.allclose(read.spacing, made.spacing, atol=1e-5)
    assert np.allclose(read.source.origin, made.source.origin, atol=1e-3)
    check_pair(read, label)

# --- the folder -------------------------------------------------------------------------------------
SIZE = (5, 64, 64)
def write(out, **kwargs): return write_phantoms(out, **{'n':2, 'size':SIZE, 'progress':False, **kwargs})
def sha(path): return hashlib.sha256(path.read_bytes()).hexdigest()
def files(out):
    "Name and hash of every file with its final name; what a killed run left in a hidden folder does not count"
    return {p.relative_to(out).as_posix():sha(p) for p in sorted(out.glob('[il]*/*.nii.gz'))}
def times(out): return {p.name:p.stat().st_mtime_ns for p in out.rglob('*.nii.gz')}

def test_a_folder_has_the_layout_of_flare22(tmp_path):
    out = write(tmp_path)
    cases = [f'Phantom_000{i}' for i in (1,2)]
    assert list(files(out))==[f'images/{c}_0000.nii.gz' for c in cases]+[f'labels/{c}.nii.gz' for c in cases]
    assert len(find_cases(out/'images', out/'labels'))==2
    assert not [p for p in out.rglob('*') if p.name.startswith('.')]

def test_files_written_twice_have_equal_bytes(tmp_path):
    a = write(tmp_path/'a')
    time.sleep(1.1) # a time stamp inside the gzip file would show
    assert files(a)==files(write(tmp_path/'b'))
    assert len(set(files(a).values()))==4

def test_cases_are_kept_and_added(tmp_path):
    before = times(write(tmp_path))
    assert times(write(tmp_path))==before
    after = times(write(tmp_path, n=3))
    assert {k:after[k] for k in before}==before
    assert len(after)==6

def test_what_is_right_already_needs_no_rewriting(tmp_path):
    before = times(write(tmp_path))
    assert times(write(tmp_path, overwrite=True))==before

def test_without_a_record_cases_are_drawn_and_compared_and_kept(tmp_path):
    before = times(write(tmp_path))
    (tmp_path/'phantom.json').unlink()
    assert times(write(tmp_path))==before

def test_cases_of_a_copied_folder_are_compared_and_kept(tmp_path):
    write(tmp_path)
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
    foreign = b'my notes' if what=='not an image' else (write(tmp_path/'other', seed=5)/name).read_bytes()
    mine = tmp_path/'mine'/name
    mine.parent.mkdir(parents=True)
    mine.write_bytes(foreign)
    with pytest.raises(InputError, match='Phantom_0002'): write(tmp_path/'mine')
    assert mine.read_bytes()==foreign
    assert [k for k in files(tmp_path/'mine') if '0002' in k]==[name], 'its partner must not be written either'
    write(tmp_path/'mine', overwrite=True)
    assert files(tmp_path/'mine')==files(write(tmp_path/'fresh'))

@pytest.mark.parametrize('kwargs', [dict(seed=1), dict(size=(6,64,64))], ids=str)
def test_another_seed_or_size_in_the_same_folder_is_refused(tmp_path, kwargs):
    want = files(write(tmp_path))
    with pytest.raises(InputError, match='overwrite'): write(tmp_path, **kwargs)
    assert files(tmp_path)==want

def test_another_seed_can_overwrite(tmp_path):
    want = files(write(tmp_path))
    assert files(write(tmp_path, seed=1, overwrite=True))!=want

@pytest.mark.parametrize('text', ['{"a": 1}', '[1]', 'no json'])
def test_a_foreign_record_is_not_touched(tmp_path, text):
    (tmp_path/'phantom.json').write_text(text)
    with pytest.raises(InputError, match='phantom.json'): write(tmp_path)
    assert (tmp_path/'phantom.json').read_text()==text and not files(tmp_path)

@pytest.mark.parametrize('kwargs', [dict(n=0), dict(n=10_000), dict(seed=-1), dict(size=(1,2))], ids=str)
def test_a_request_without_sense_leaves_no_folder(tmp_path, kwargs):
    with pytest.raises(InputError): write(tmp_path/'x', **kwargs)
    assert not (tmp_path/'x').exists()

def test_a_file_is_no_folder(tmp_path):
    (tmp_path/'file').write_text('x')
    with pytest.raises(InputError, match='is a file'): write(tmp_path/'file')

WRITE = '''
import sys
from medsam_nb.phantom import write_phantoms
write_phantoms(sys.argv[1], n=6, size=(5,64,64), progress=False)'''

def cut_short(out):
    "A run that is killed once three files are there"
    p = subprocess.Popen([sys.executable,'-c',WRITE,str(out)])
    end = time.time()+60
    while len(files(out))<3 and p.poll() is None and time.time()<end: time.sleep(.005)
    p.send_signal(signal.SIGKILL)
    p.wait()

def test_killed_in_the_middle_then_resumed(tmp_path):
    want = files(write(tmp_path/'whole', n=6))
    cut_short(tmp_path/'cut')
    got = files(tmp_path/'cut')
    assert len(got)>=3
    assert got.items()<=want.items(), 'a file with its final name is whole'
    assert files(write(tmp_path/'cut', n=6))==want

# --- the command ------------------------------------------------------------------------------------
def test_the_command_fills_the_data_folder_and_says_where(home, capsys):
    medsam_phantom(n=1, size='5,64,64', progress=False)
    assert len(files(home/'data'/'phantom'))==2
    assert str(home/'data'/'phantom') in capsys.readouterr().out

def test_the_command_refuses_a_size_in_words(tmp_path):
    with pytest.raises(InputError, match='size'): medsam_phantom(str(tmp_path/'y'), size='large')

def test_the_console_command_writes_and_refuses(tmp_path):
    exe = Path(sys.executable).parent/'medsam_phantom'
    if not exe.exists(): pytest.skip('the package is not installed here, so there is no console command')
    def run(size):
        words = [exe,'--out','o','--n','1','--size',size]
        return subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    good = run('5,64,64')
    assert good.returncode==0, good.stderr
    assert '1 phantoms' in good.stdout and 'phantoms' in good.stderr
    bad = run('6,64,64')
    assert bad.returncode==2
    assert 'Traceback' not in bad.stderr and 'overwrite' in bad.stderr
    assert json.loads((tmp_path/'o'/'phantom.json').read_text())['Phantom_0001']['seed']==2023

# --- cost -------------------------------------------------------------------------------------------
PEAK = '''
import re
from medsam_nb.phantom import make_phantom
make_phantom(1, (40,512,512))
print(re.search('VmHWM:.*?([0-9]+)', open('/proc/self/status').read())[1])'''

linux_only = pytest.mark.skipif(not sys.platform.startswith('linux'), reason='only Linux has /proc')

@pytest.mark.slow
@linux_only
def test_memory_of_a_full_case():
    "A case needs about 0.8 GB, libraries included; VmHWM, because ru_maxrss counts the parent's memory too"
    kb = int(said(PEAK, OMP_NUM_THREADS='1'))
    assert kb<1.5e6, f'{kb/1024:.0f} MB'
