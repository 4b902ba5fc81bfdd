"Curation: the defects of MedSAM v0.1 that must not come back, the split, the files, real data"
import json, os, signal, subprocess, sys, time
from pathlib import Path
import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
from hypothesis import given, settings, strategies as st
from PIL import Image
from medsam_nb import curate as cu
from medsam_nb.core import InputError
from medsam_nb.curate import (code_labels, curate, curate_case, curate_label, find_npz, medsam_curate, read_npz,
                              read_split, source_hash, split_cases, write_split)
from medsam_nb.view import Recipe, fit_shape, intensity_limits, normalize, rescale, resize_image, resize_label
from medsam_nb.volume import Volume

REPO = Path(__file__).resolve().parents[1]


def disc(shape, centre, radius):
    "Boolean disc, centre and radius in continuous coordinates (row, column)"
    y,x = np.mgrid[:shape[0],:shape[1]]+.5
    return (y-centre[0])**2+(x-centre[1])**2<radius**2

def pair(seed=0, shape=(6,64,64), zs=(1,2,3), radius=15, label=9):
    "A noisy CT with a brighter disc of `label` on slices `zs`"
    rng = np.random.default_rng(seed)
    img = rng.normal(40, 20, shape).astype(np.int16)
    lab = np.zeros(shape, np.uint8)
    for z in zs: lab[z][disc(shape[1:], (30,34), radius)] = label
    img[lab>0] += 60
    return img, lab

def volumes(img, lab, spacing=(3.,.8,.8)):
    return Volume(img, spacing, case='c'), Volume(lab, spacing, case='c')

def write(path, array, spacing=(.8,.8,3.)):
    "Write an array as an image file with `spacing` in x,y,z"
    path.parent.mkdir(parents=True, exist_ok=True)
    im = sitk.GetImageFromArray(array)
    im.SetSpacing(spacing)
    sitk.WriteImage(im, str(path))

def folder(root, names, **kw):
    "FLARE22-like folders with one pair per name; returns (images, labels)"
    for i,n in enumerate(names):
        img,lab = pair(seed=sum(map(ord, n)), **kw)
        write(root/'images'/f'{n}_0000.nii.gz', img)
        write(root/'labels'/f'{n}.nii.gz', lab)
    return root/'images', root/'labels'

def run(images, labels, out, **kw): return curate(images, labels, out, progress=False, **kw)

def parts_of(out): 
    "case -> part, from the files that are there"
    return {read_npz(f).case:f.parent.name for p in ('train','test') for f in (out/'CT_Abd'/p).glob('*.npz')}


# ---- defects of v0.1 ----
def test_defect02_disc_of_radius_20_keeps_its_area():
    big = disc((512,512), (256,256), 40).astype(np.uint8)
    small = resize_label(big)
    assert abs(int(small.sum())-np.pi*20**2)/(np.pi*20**2)<.01
    r20 = disc((512,512), (200,300), 20).astype(np.uint8)           # radius 20 in the source: 314 px on the 256 grid
    assert abs(resize_label(r20).sum()-np.pi*100)<8
    lab = np.zeros((1,512,512), np.uint8)
    lab[0][big>0] = 9
    arrays,_ = curate_case(*volumes(np.random.default_rng(0).normal(40,9,lab.shape).astype(np.int16), lab), Recipe())
    assert (arrays['gts']==1).sum()==small.sum()

@pytest.mark.parametrize('window', ['medsam','brief','abdomen',(-200.,200.)])
def test_defect03_zero_hu_is_not_black(window):
    r = Recipe(window=window)
    lo,hi = r.limits
    got = normalize(np.array([-1,0,1]), r).astype(int)
    assert got[1]==round(-lo/(hi-lo)*255)>60
    assert got[2]-got[0]<=2

def test_defect03_no_pepper_in_a_case():
    img,lab = pair()
    img[2,28:32,28:32] = 0
    arrays,_ = curate_case(*volumes(img, lab), Recipe())
    assert arrays['imgs'].min()>60

def test_defect04_both_ends_of_the_organ_are_kept():
    for zs in ((0,1,2),(3,4,5),(0,1,2,3,4,5),(0,5)):
        arrays,_ = curate_case(*volumes(*pair(zs=zs)), Recipe())
        assert arrays['z'].tolist()==list(zs)

@pytest.mark.parametrize('z', [0,3,5])
def test_defect04_one_slice_organ_is_kept(z):
    arrays,drops = curate_case(*volumes(*pair(zs=(z,))), Recipe())
    assert arrays['z'].tolist()==[z] and arrays['gts'].shape==(1,256,256)
    assert drops==[(i,None,'no label') for i in range(6) if i!=z]

def test_defect04_one_slice_volume_is_kept():
    arrays,drops = curate_case(*volumes(*pair(shape=(1,64,64), zs=(0,))), Recipe())
    assert arrays['imgs'].shape==(1,256,256,3) and drops==[]

@pytest.mark.parametrize('radius', [.8,1.5,2.7])
def test_defect04_small_organ_is_dropped_with_a_reason_and_does_not_crash(radius):
    img,lab = pair(shape=(6,256,256), radius=radius)
    assert 0<(lab>0).sum()<1000
    arrays,drops = curate_case(*volumes(img, lab), Recipe())
    assert arrays is None
    assert [d for d in drops if d[1]==9]==[(z,9,'under 100 px') for z in (1,2,3)] and drops[-1]==(None,None,
        'no slice kept')

def test_defect04_organ_of_less_than_1000_voxels_but_100_px_is_kept():
    img,lab = pair(shape=(6,256,256), radius=8, zs=(2,))
    assert (lab>0).sum()<1000
    assert curate_case(*volumes(img, lab), Recipe())[0]['z'].tolist()==[2]

def test_defect05_scaled_by_the_window_not_by_the_scan():
    img,lab = pair()
    bone = img.copy()
    bone[0] = 3000
    bone[5] = -1000
    a,b = (curate_case(*volumes(i, lab), Recipe())[0]['imgs'] for i in (img, bone))
    assert np.array_equal(a, b)
    assert np.array_equal(normalize(np.array([-500,1000]), Recipe()), [0,255])
    assert normalize(np.array([0,100]), Recipe()).tolist()==[85,102]

@pytest.mark.parametrize('value', [-2000,0,40,5000])
@pytest.mark.parametrize('modality', ['CT','MR'])
def test_defect05_constant_image_is_a_counted_skip(value, modality):
    img,lab = pair()
    img[:] = value
    with np.errstate(all='raise'):
        assert curate_case(*volumes(img, lab), Recipe(modality))==(None, [(None,None,'constant image')])
        normalize(img, Recipe(modality))

def test_defect05_constant_slice_is_a_counted_skip():
    img,lab = pair()
    img[2] = 7
    arrays,drops = curate_case(*volumes(img, lab), Recipe())
    assert arrays['z'].tolist()==[1,3] and (2,None,'constant image') in drops

def test_defect06_adding_cases_never_moves_one(tmp_path):
    names = [f'p{i}' for i in range(6)]
    im,lb = folder(tmp_path/'raw', names[:3])
    run(im, lb, tmp_path/'out')
    seen = parts_of(tmp_path/'out')
    for n in range(4, 7):
        folder(tmp_path/'raw', names[:n])
        run(im, lb, tmp_path/'out')
        now = parts_of(tmp_path/'out')
        assert len(now)==n and {k:now[k] for k in seen}==seen
        seen = now
    assert set(seen.values())=={'train','test'}

def test_defect06_resume_finds_what_is_done_in_either_part(tmp_path):
    im,lb = folder(tmp_path/'raw', 'abcd')
    first = run(im, lb, tmp_path/'out')
    files = {f:f.stat().st_mtime_ns for f in first.files()}
    again = run(im, lb, tmp_path/'out')
    assert set(again.table.status)=={'as before'} and {f:f.stat().st_mtime_ns for f in again.files()}==files
    pd.testing.assert_frame_equal(first.table.drop(columns='status'), again.table.drop(columns='status'))
    lost = first.files('train')[0]
    case = read_npz(lost).case
    lost.unlink()
    third = run(im, lb, tmp_path/'out')
    assert third.table.set_index('case').status[case]=='new' and set(third.files())==set(files)

def test_defect06_removing_a_case_moves_nobody_and_it_comes_back_to_its_part(tmp_path):
    im,lb = folder(tmp_path/'raw', 'abcdef')
    run(im, lb, tmp_path/'out')
    before = parts_of(tmp_path/'out')
    test = [k for k,v in before.items() if v=='test'][0]
    for d in (im, lb): next(d.glob(f'{test}*')).rename(tmp_path/f'{d.name}{test}.nii.gz')
    run(im, lb, tmp_path/'out')
    assert parts_of(tmp_path/'out')==before
    (tmp_path/f'images{test}.nii.gz').rename(im/f'{test}_0000.nii.gz')
    (tmp_path/f'labels{test}.nii.gz').rename(lb/f'{test}.nii.gz')
    (tmp_path/'out'/'CT_Abd'/'test'/f'CT_Abd_{test}.npz').unlink()
    run(im, lb, tmp_path/'out')
    assert parts_of(tmp_path/'out')==before

def test_defect06_a_patient_is_never_in_both_parts(tmp_path):
    names = [f'ABD_{p:03d}_{s}' for p in range(4) for s in range(3)]
    im,lb = folder(tmp_path/'raw', names[::2])
    run(im, lb, tmp_path/'out', patient=r'ABD_(\d+)_')
    folder(tmp_path/'raw', names)
    run(im, lb, tmp_path/'out', patient=r'ABD_(\d+)_')
    parts = parts_of(tmp_path/'out')
    assert len(parts)==12
    by = {p:{v for k,v in parts.items() if k.split('_')[1]==p} for p in {k.split('_')[1] for k in parts}}
    assert all(len(v)==1 for v in by.values()) and sum(v=={'test'} for v in by.values())==1
    with pytest.raises(InputError, match='belongs to patient'): run(im, lb, tmp_path/'out')

def test_defect07_spacing_slices_and_source_shape_are_stored(tmp_path):
    img,lab = pair(shape=(6,70,90), zs=(2,4))
    write(tmp_path/'i'/'x_0000.nii.gz', img, spacing=(.7,.9,2.5))
    write(tmp_path/'l'/'x.nii.gz', lab, spacing=(.7,.9,2.5))
    c = read_npz(run(tmp_path/'i', tmp_path/'l', tmp_path/'out').files()[0])
    assert np.allclose(c.spacing, (2.5,.9,.7)) and c.source_shape==(6,70,90) and c.label_ids==(9,)
    assert len(c.z)==2
    assert c.labels.shape==(6,70,90)
    assert c.labels.dtype==np.uint8
    assert c.labels.max()==1
    assert (c.labels>0).sum()==(lab>0).sum() and (c.labels[c.z]>0).any((1,2)).all()
    assert c.recipe==Recipe() and c.source_sha256==source_hash(tmp_path/'i'/'x_0000.nii.gz', tmp_path/'l'/'x.nii.gz')

def _move_one(o):
    f = next((o/'train').glob('*.npz'))
    f.rename(o/'test'/f.name)

def _lose_last_row(out):
    rows = (out/'split.csv').read_text().splitlines()
    (out/'split.csv').write_text('\n'.join(rows[:-1]))

@pytest.mark.parametrize('harm', [lambda o: (o/'split.csv').unlink(), _move_one, _lose_last_row])
def test_defect06_a_lost_or_contradicted_split_stops_the_run(tmp_path, harm):
    im,lb = folder(tmp_path/'raw', 'abcd')
    run(im, lb, tmp_path/'out')
    harm(tmp_path/'out'/'CT_Abd')
    with pytest.raises(InputError, match='restore split.csv'): run(im, lb, tmp_path/'out')
    with pytest.raises(InputError, match='restore split.csv'): run(im, lb, tmp_path/'out', overwrite=True)

@pytest.mark.skipif(not Path('/proc/self/fd').exists(), reason='needs /proc to count open files')
def test_defect08_no_file_stays_open(tmp_path):
    im,lb = folder(tmp_path/'raw', 'abc')
    files = run(im, lb, tmp_path/'out').files()
    n = len(os.listdir('/proc/self/fd'))
    cases = [read_npz(f) for f in files]
    assert not any('imgs' in vars(c) or 'labels' in vars(c) for c in cases)
    for c in cases: c.imgs, c.gts, c.labels
    assert len(os.listdir('/proc/self/fd'))==n

@pytest.mark.parametrize('name', ['1.2.840.113619.2', 'scan.v2', 'Müller_Jürgen', '患者一', 'with space'])
def test_defect12_dotted_and_non_ascii_names(tmp_path, name):
    im,lb = folder(tmp_path/'raw', [name, name+'b'])
    res = run(im, lb, tmp_path/'out')
    assert sorted(res.table.case)==sorted([name, name+'b'])
    assert {read_npz(f).case for f in find_npz(res.folder)}=={name, name+'b'}
    assert set(read_split(res.folder).case)=={name, name+'b'}
    assert set(run(im, lb, tmp_path/'out').table.status)=={'as before'}

def test_defect12_names_that_look_like_numbers_or_missing_values_stay_text(tmp_path):
    im,lb = folder(tmp_path/'raw', ['001','1','NA','nan'])
    run(im, lb, tmp_path/'out')
    assert set(run(im, lb, tmp_path/'out').table.case)=={'001','1','NA','nan'}

def test_defect12_nothing_pairs_is_an_error(tmp_path):
    im,lb = folder(tmp_path/'raw', 'ab')
    for f in lb.iterdir(): f.rename(lb/f'seg-{f.name}')
    with pytest.raises(InputError): run(im, lb, tmp_path/'out')
    with pytest.raises(InputError): run(tmp_path/'nowhere', lb, tmp_path/'out')
    assert not (tmp_path/'out').exists()

def test_defect12_pad_keeps_proportions_and_squash_is_a_choice():
    lab = disc((120,240), (60,120), 30).astype(np.uint8)
    def extent(a):
        r,c = np.where(a)
        return np.ptp(r)+1, np.ptp(c)+1
    h,w = extent(resize_label(lab))
    assert abs(h-w)<=1
    h,w = extent(resize_label(lab, fit='squash'))
    assert abs(h/w-2)<.1
    assert resize_image(np.full((120,240),200.))[128:].max()==0

def test_defect12_colour_16_bit_and_alpha_are_handled_on_purpose(tmp_path):
    rng = np.random.default_rng(0)
    lab = (disc((80,60), (40,30), 20)*255).astype(np.uint8)
    rgb = rng.integers(0, 256, (80,60,3), dtype=np.uint8)
    rgb[...,0] //= 4
    for d in ('i','l'): (tmp_path/d).mkdir()
    for n,im in dict(rgb=Image.fromarray(rgb), deep=Image.fromarray(rng.integers(0, 60000,
        (80,60)).astype(np.uint16))).items():
        im.save(tmp_path/'i'/f'{n}.png')
        Image.fromarray(lab).save(tmp_path/'l'/f'{n}.png')
    res = run(tmp_path/'i', tmp_path/'l', tmp_path/'out', modality='Photo', anatomy='Skin', label_ids=(255,))
    got = {read_npz(f).case:read_npz(f) for f in res.files()}
    grey,colour = got['deep'].imgs[0], got['rgb'].imgs[0]
    assert (grey[...,0]==grey[...,1]).all() and grey.max()>250
    assert not (colour[...,0]==colour[...,1]).all()
    assert colour[:,192:].max()==0 and set(np.unique(got['rgb'].gts))=={0,1}

def test_defect13_a_killed_run_leaves_nothing_that_looks_finished(tmp_path):
    im,lb = folder(tmp_path/'raw', [f'c{i:02d}' for i in range(12)], shape=(20,256,256), zs=range(20), radius=40)
    out = tmp_path/'out'
    code = f'from medsam_nb.curate import curate; curate({str(im)!r}, {str(lb)!r}, {str(out)!r}, progress=False)'
    p = subprocess.Popen([sys.executable, '-c', code], cwd=REPO)
    staging = out/'CT_Abd'/'.staging'
    end = time.time()+120
    while p.poll() is None and time.time()<end and len(list(staging.glob('*.npz')))<2: time.sleep(.01)
    assert p.poll() is None, 'the run ended before it could be killed'
    p.send_signal(signal.SIGKILL)
    p.wait()
    half = list(staging.glob('*.npz'))
    assert half and not list(out.rglob('train/*.npz')) and not list(out.rglob('test/*.npz'))
    with pytest.raises(InputError): find_npz(out/'CT_Abd')
    # whatever has its final name is whole
    for f in half:
        read_npz(f).imgs
    res = run(im, lb, out)
    assert len(res.files())==12 and not staging.exists()
    assert {'new','as before'}==set(res.table.status)
    ref = run(im, lb, tmp_path/'ref')
    pd.testing.assert_frame_equal(read_split(res.folder), read_split(ref.folder))
    for a,b in zip(res.files(), ref.files()):
        assert a.name==b.name and np.array_equal(read_npz(a).imgs,
                                                 read_npz(b).imgs) and np.array_equal(read_npz(a).gts, read_npz(b).gts)

def test_defect13_a_damaged_finished_file_is_made_again(tmp_path):
    im,lb = folder(tmp_path/'raw', 'abc')
    res = run(im, lb, tmp_path/'out')
    f = res.files('train')[0]
    good = f.read_bytes()
    f.write_bytes(good[:len(good)//2])
    with pytest.raises(InputError, match='damaged'): read_npz(f)
    res = run(im, lb, tmp_path/'out')
    assert sorted(res.table.status)==['as before','as before','new'] and read_npz(f).imgs.shape==(3,256,256,3)

def test_defect13_an_error_in_one_case_is_reported_and_the_rest_goes_on(tmp_path):
    im,lb = folder(tmp_path/'raw', 'abcd')
    (im/'b_0000.nii.gz').write_bytes((im/'b_0000.nii.gz').read_bytes()[:300])
    write(lb/'c.nii.gz', pair()[1], spacing=(.8,.8,5.))
    res = run(im, lb, tmp_path/'out')
    assert set(res.failed)=={'b','c'} and {read_npz(f).case for f in res.files()}=={'a','d'}
    assert 'failed: b: ' in repr(res) and 'failed: c: ' in repr(res)
    t = read_split(res.folder).set_index('case')
    assert t.part[['b','c']].tolist()==['',''] and t.kept[['b','c']].tolist()==[0,
        0] and 'b_0000' in t.reasons['b']['error']
    with pytest.raises(InputError, match='^b: '): run(im, lb, tmp_path/'strict', strict=True)
    folder(tmp_path/'raw', 'abcd')                                          # mended: they join, nobody moves
    parts = parts_of(tmp_path/'out')
    run(im, lb, tmp_path/'out')
    now = parts_of(tmp_path/'out')
    assert len(now)==4 and {k:now[k] for k in parts}==parts

def test_defect13_a_source_that_breaks_later_keeps_its_finished_file_and_is_named(tmp_path):
    im,lb = folder(tmp_path/'raw', 'abc')
    run(im, lb, tmp_path/'out')
    (im/'a_0000.nii.gz').write_bytes(b'broken')
    res = run(im, lb, tmp_path/'out')
    t = read_split(res.folder).set_index('case')
    assert set(res.failed)=={'a'}
    assert t.kept['a']==3
    assert (t.part['a'] in ('train',
        'test'))
    assert 'a' in parts_of(tmp_path/'out')

def test_defect13_a_bug_is_not_swallowed(tmp_path, monkeypatch):
    im,lb = folder(tmp_path/'raw', 'ab')
    monkeypatch.setattr(cu, 'curate_case', lambda *a, **k: 1/0)
    with pytest.raises(ZeroDivisionError): run(im, lb, tmp_path/'out')

def test_defect13_all_cases_failing_or_nothing_kept_is_an_error(tmp_path):
    im,lb = folder(tmp_path/'raw', 'ab')
    with pytest.raises(InputError, match=r'label ids \[5\].*hold ids \[9\]'):
        run(im, lb, tmp_path/'out', label_ids=5)
    with pytest.raises(InputError, match='under 65536 px'): run(im, lb, tmp_path/'out', min_pixels=65536)
    for f in im.iterdir(): f.write_bytes(b'not a volume')
    with pytest.raises(InputError, match='all 2 cases failed'): run(im, lb, tmp_path/'out')
    assert not list((tmp_path/'out').rglob('*.npz'))


# ---- recipe and grey values ----
@settings(deadline=None)
@given(st.builds(Recipe, modality=st.sampled_from(['CT','MR','XR']),
                 label_ids=st.lists(st.integers(1,65535), min_size=1, max_size=20, unique=True).map(tuple),
    window=st.one_of(st.none(), st.just('auto'), st.tuples(st.integers(-2000,0), st.integers(1,3000))),
    size=st.integers(64,1024),
    fit=st.sampled_from(['pad','squash']), flip=st.sampled_from([None,'ud','lr','udlr'])))
def test_recipe_round_trip(r):
    assert Recipe.from_json(r.to_json())==r and Recipe.from_json(r.to_json()).to_json()==r.to_json() and r.diff(r)==''

@pytest.mark.parametrize('kw', [dict(window='lung'), dict(window=(1,1)), dict(window=(0,np.nan)), dict(window=3),
                                dict(modality='MR', window='medsam'), dict(label_ids=()),
    dict(label_ids=(0,)), dict(label_ids=(1.5,)), dict(label_ids='liver'), dict(label_ids=(2,2)), dict(low=-1),
    dict(high=101), dict(low=50, high=50), dict(size=0), dict(size=256.5),
    dict(min_pixels=0), dict(min_pixels='many'), dict(fit='crop'), dict(flip='up'), dict(modality='../x'),
    dict(anatomy=''), dict(anatomy='a/b')])
def test_recipe_refuses(kw):
    with pytest.raises(InputError): Recipe(**kw)

def test_another_recipe_in_the_same_folder_is_refused_with_the_field(tmp_path):
    im,lb = folder(tmp_path/'raw', 'abc')
    run(im, lb, tmp_path/'out')
    parts = parts_of(tmp_path/'out')
    with pytest.raises(InputError, match="window is 'brief' here and 'medsam' there.*overwrite=True"):
        run(im, lb, tmp_path/'out', window='brief')
    res = run(im, lb, tmp_path/'out', window='brief', overwrite=True)
    assert {read_npz(f).recipe.window for f in res.files()}=={'brief'} and parts_of(tmp_path/'out')==parts
    for d in (im, lb): next(d.glob('a*')).unlink()
    with pytest.raises(InputError, match='not among the cases of this run'):
        run(im, lb, tmp_path/'out', overwrite=True)

def test_a_changed_label_is_noticed_and_an_emptied_one_loses_its_file(tmp_path):
    im,lb = folder(tmp_path/'raw', 'abc')
    run(im, lb, tmp_path/'out')
    write(lb/'a.nii.gz', pair(zs=(4,))[1])
    write(lb/'b.nii.gz', pair(zs=())[1])
    res = run(im, lb, tmp_path/'out')
    t = res.table.set_index('case')
    assert t.status.to_dict()=={'a':'new','b':'nothing kept','c':'as before'}
    assert t.reasons['b']=={'empty label':1} and t.dropped['b']==6
    got = {read_npz(f).case:len(read_npz(f)) for f in res.files()}
    assert got=={'a':1,'c':3}

def test_percentiles_are_of_non_zero_voxels_and_per_channel():
    a = np.zeros((2,50,20))
    a[0] = np.arange(1,1001).reshape(50,20)
    lo,hi = intensity_limits(a, Recipe('MR'))
    assert np.isclose(lo, 1+.0095*999) and np.isclose(hi, 1+.995*999)
    rgb = np.stack([a, a*2, a*0], -1)
    lo,hi = intensity_limits(rgb, Recipe('Photo'))
    assert np.allclose(lo[1], 2*lo[0]) and np.allclose(hi[1], 2*hi[0]) and lo[2]==hi[2]==0
    n = normalize(rgb, Recipe('Photo'))
    assert np.abs(n[...,0].astype(int)-n[...,1]).max()<=1 and n[...,2].max()==0 and n[0,...,0].max()==255
    assert normalize(np.array([[0,7,7]]), Recipe('XR')).tolist()==[[0,255,255]]

@settings(deadline=None)
@given(st.integers(-3000,3000), st.sampled_from(['medsam','brief','abdomen']))
def test_normalize_rounds_to_nearest(v, w):
    r = Recipe(window=w)
    lo,hi = r.limits
    exact = np.clip((v-lo)/(hi-lo),0,1)*255
    assert abs(float(normalize(np.array([v]), r)[0])-exact)<=.5+1e-4

def test_normalize_leaves_its_input_alone():
    a = np.arange(-600,600,dtype=np.int16)
    b = a.copy()
    normalize(a, Recipe())
    assert np.array_equal(a, b)


# ---- size ----
@settings(deadline=None)
@given(st.integers(1,1500), st.integers(1,1500), st.sampled_from([64,256,1024]))
def test_fit_shape(h, w, size):
    a,b = fit_shape((h,w), size)
    assert max(a,b)==size and min(a,b)>=1
    k = size/max(h,w)
    assert abs(a-h*k)<=.5 or a==1
    assert abs(b-w*k)<=.5 or b==1
    assert fit_shape((h,w), size, 'squash')==(size,size)

@settings(max_examples=40, deadline=None)
@given(st.integers(40,400), st.integers(40,400), st.floats(.3,.7), st.floats(.3,.7), st.sampled_from(['pad','squash']))
def test_coordinates_scale_purely(h, w, cy, cx, fit):
    "The centre of a disc moves by the scale alone, for label and image alike, and its area by the product of scales"
    d = disc((h,w), (cy*h,cx*w), min(h,w)*.25)
    gh,gw = fit_shape((h,w), 256, fit)
    ky,kx = gh/h, gw/w
    def centre(a):
        return (a*(np.arange(a.shape[0])+.5)[:,None]).sum()/a.sum(), (a*(np.arange(a.shape[1])+.5)[None]).sum()/a.sum()
    want = centre(d.astype(float))
    lab, im = resize_label(d.astype(np.uint8), fit=fit), resize_image(d*255., fit=fit).astype(float)/255
    for got in (lab.astype(float), im):
        y,x = centre(got)
        assert abs(y-want[0]*ky)<.6 and abs(x-want[1]*kx)<.6
    assert abs(lab.sum()/(d.sum()*ky*kx)-1)<.06 and abs(im.sum()/(d.sum()*ky*kx)-1)<.02

@settings(max_examples=40, deadline=None)
@given(st.integers(1,90), st.integers(1,90), st.integers(0,2**31), st.sampled_from([np.uint8,np.uint16]))
def test_label_resizing_makes_no_new_ids(h, w, seed, dtype):
    a = np.random.default_rng(seed).choice(np.array([0,1,9,13,255], dtype), (h,w))
    out = resize_label(a, 64)
    assert out.dtype==dtype and set(np.unique(out))<=set(np.unique(a)) | {0}

def test_image_is_not_aliased_or_overshot():
    stripes = np.tile(np.array([0.,255.,255.]), (1024,342))[:,:1024]
    assert np.ptp(resize_image(stripes)[:,20:-20].astype(int))<20            # anti-aliasing turns them grey
    bump = lambda n: 250*np.exp(-((np.mgrid[:n,:n]+.5)/n*16-8)**2/8).prod(0)
    # the very top is clipped to the source's largest value
    off = np.abs(resize_image(bump(32)).astype(float)-bump(256))[bump(256)<bump(32).max()]
    # cubic follows a smooth curve, linear cuts through it
    assert off.max()<1
    edge = np.zeros((100,100))
    edge[:,50:] = 255
    up = resize_image(edge, 256)
    assert up[:,0].max()==0 and up[:,-1].min()==255
    assert resize_image(np.full((100,100),100.), 256).tolist()==np.full((256,256),100).tolist()

def test_labels_of_a_slice_are_dropped_one_by_one():
    c = np.zeros((256,256), np.uint8)
    c[:10,:10] = 1
    c[50:59,50:61] = 2
    gt,drops = curate_label(c, Recipe(label_ids=(3,8)))
    assert (gt==1).sum()==100 and (gt==2).sum()==0 and drops==[(8,'under 100 px')]
    assert code_labels(np.array([0,3,8,9], np.uint16), (8,3)).tolist()==[0,2,1,0]
    assert code_labels(np.zeros((0,), np.uint8), (8,)).size==0

def test_flip_turns_image_and_labels_together():
    img,lab = pair(zs=(1,))
    v = volumes(img, lab)
    a,b = (curate_case(*v, Recipe(flip=f))[0] for f in (None,'ud'))
    assert np.array_equal(a['imgs'][:,::-1], b['imgs']) and np.array_equal(a['labels'][:,::-1], b['labels'])
    # nearest label: ties may fall on the other side
    assert (a['gts']!=b['gts'][:,::-1]).sum()<60
    c = curate_case(*v, Recipe(flip='udlr'))[0]
    assert np.array_equal(a['labels'][:,::-1,::-1], c['labels'])

@pytest.mark.parametrize('change,words', [
    (lambda i,l: (i, l[:3]), 'one grid'), (lambda i,l: (i, l.astype(float)), 'whole numbers'),
    (lambda i,l: (i, l.astype(np.int16)-1), 'negative'),
    (lambda i,l: (np.where(i>60, np.nan, i).astype(float), l), 'not finite'),
    (lambda i,l: (i.clip(0,255).astype(np.uint8), l), 'window=None'), (lambda i,l: (i[...,None], l), 'expected')])
def test_curate_case_refuses(change, words):
    with pytest.raises(InputError, match=words): curate_case(*volumes(*change(*pair())), Recipe())


# ---- split ----
@settings(deadline=None)
@given(st.lists(st.tuples(st.text('abcdefgh', min_size=1, max_size=3), st.text('0123456789', max_size=3)), min_size=1,
                max_size=30, unique=True),
    st.integers(0,5), st.floats(0,.9), st.randoms())
def test_split_properties(pairs, seed, fraction, rnd):
    cases, patients = ['_'.join(o) for o in pairs], [o[0] for o in pairs]
    parts = split_cases(cases, patients, fraction, seed)
    by = {p:{parts[c] for c,q in zip(cases,patients) if q==p} for p in patients}
    assert all(len(v)==1 for v in by.values())
    n = len(by)
    test = sum(v=={'test'} for v in by.values())
    assert test==(min(max(int(n*fraction+.5),1),n-1) if fraction and n>1 else 0)
    order = list(zip(cases, patients))
    rnd.shuffle(order)
    assert split_cases([c for c,_ in order], [p for _,p in order], fraction, seed)==parts
    known = {p:next(iter(by[p])) for p in list(by)[::2]}
    later = split_cases(cases, patients, fraction, seed, existing=known)
    assert all(later[c]==known[p] for c,p in zip(cases,patients) if p in known)

def test_split_of_50_is_40_and_10_and_depends_on_the_seed():
    names = [f'FLARE22_Tr_{i:04d}' for i in range(1,51)]
    a,b = split_cases(names), split_cases(names, seed=1)
    assert list(a.values()).count('test')==10 and a!=b
    assert sorted(c for c,p in a.items() if p=='test')==SPLIT_2023

# recomputed by any version: a change here is a leak for users
SPLIT_2023 = [f'FLARE22_Tr_{i:04d}' for i in (7,10,11,17,26,32,36,44,46,50)]

def test_split_table_refuses_nonsense(tmp_path):
    t = pd.DataFrame(dict(case=['a','b'], patient=['p','p'], part=['train','test'], kept=[1,1], dropped=[0,0],
                          reasons=[{},{}]))
    for bad,words in ((t, 'in train and in test'), (t.assign(case='a', part='train'), 'appears twice'),
                      (t.assign(part='val'), 'neither')):
        write_split(bad, tmp_path)
        with pytest.raises(InputError, match=words): read_split(tmp_path)
    (tmp_path/'split.csv').write_text('a,b\n1,2\n')
    with pytest.raises(InputError, match='no column'): read_split(tmp_path)
    with pytest.raises(InputError, match='no split.csv'): read_split(tmp_path/'x')

def test_one_patient_has_no_test_part_and_says_so(tmp_path, capsys):
    im,lb = folder(tmp_path/'raw', ['p1_a','p1_b'])
    res = run(im, lb, tmp_path/'out', patient=r'(p\d)_')
    assert set(res.table.part)=={'train'} and 'no test part' in capsys.readouterr().out
    with pytest.raises(InputError): find_npz(res.folder, 'test')

def test_unusable_cases_take_no_place_in_the_test_part(tmp_path):
    im,lb = folder(tmp_path/'raw', [f'c{i}' for i in range(10)])
    for i in range(8): write(lb/f'c{i}.nii.gz', pair(zs=())[1])
    res = run(im, lb, tmp_path/'out')
    assert sorted(res.table[res.table.kept>0].part)==['test','train'] and set(res.table[res.table.kept==0].part)=={''}


@pytest.mark.parametrize('pattern,words', [(r'ABD_(\d+', 'not a regular expression'), (r'P(\d+)', 'finds no patient'),
                                           (r'x*', 'finds no patient')])
def test_patient_pattern_is_checked_before_any_work(tmp_path, pattern, words):
    im,lb = folder(tmp_path/'raw', 'ab')
    with pytest.raises(InputError, match=words): run(im, lb, tmp_path/'out', patient=pattern)
    with pytest.raises(InputError, match='test fraction'): run(im, lb, tmp_path/'out', test_fraction=1.2)
    assert not (tmp_path/'out').exists()

# ---- files ----
def test_files_are_read_the_way_v01_code_reads_them(tmp_path):
    im,lb = folder(tmp_path/'raw', 'abc')
    run(im, lb, tmp_path/'out')
    root = str(tmp_path/'out'/'CT_Abd'/'train')
    names = sorted(os.listdir(root))
    assert names and all(n.endswith('.npz') for n in names)
    data = [np.load(os.path.join(root, f)) for f in names]
    imgs, gts = np.vstack([d['imgs'] for d in data]), np.vstack([d['gts'] for d in data])
    assert imgs.shape==(len(names)*3,256,256,3) and imgs.dtype==gts.dtype==np.uint8
    y,x = np.where(gts[0]>0)
    assert 100<=len(y) and x.min()<x.max() and set(np.unique(gts))=={0,1}
    for d in data: d.close()

def test_a_v01_file_is_read(tmp_path):
    rng = np.random.default_rng(0)
    f = tmp_path/'CT_Abd-Gallbladder_FLARE22_Tr_0001.npz'
    imgs,gts = rng.integers(0,256,(4,256,256,3),dtype=np.uint8), rng.integers(0,2,(4,256,256),dtype=np.uint8)
    np.savez_compressed(f, imgs=imgs, gts=gts, img_embeddings=rng.random((4,2,2)))
    c = read_npz(f)
    assert np.array_equal(c.imgs, imgs)
    assert np.array_equal(c.gts, gts)
    assert c.z.tolist()==[0,1,2,3]
    assert c.label_ids==(1,)
    assert c.spacing is None
    assert c.recipe is None
    assert c.labels is None
    assert c.source_sha256 is None
    assert c.case==f.stem
    assert len(c)==4
    assert find_npz(tmp_path)==[f]

def test_npz_needs_no_pickle_and_has_the_contract(tmp_path):
    im,lb = folder(tmp_path/'raw', 'ab')
    with np.load(run(im, lb, tmp_path/'out').files()[0], allow_pickle=False) as d:
        got = {k:d[k] for k in d.files}
    assert {'imgs','gts','z','spacing','source_shape','label_ids','recipe','source_sha256','labels'}<=set(got)
    assert not any(v.dtype.hasobject for v in got.values())
    assert Recipe.from_json(str(got['recipe']))==Recipe() and len(str(got['source_sha256']))==64

def test_read_npz_refuses(tmp_path):
    for name,words in (('gone.npz','does not exist'),):
        with pytest.raises(InputError, match=words): read_npz(tmp_path/name)
    np.savez(tmp_path/'other.npz', a=1)
    np.save(tmp_path/'one.npy', np.ones(2))
    (tmp_path/'t.npz').write_text('hello')
    np.savez(tmp_path/'pickled.npz', gts=np.array([{}], dtype=object))
    for name,words in (('other.npz','no gts'),('one.npy','single array'),('t.npz','damaged'),('pickled.npz','damaged')):
        with pytest.raises(InputError, match=words): read_npz(tmp_path/name)

def test_find_npz_says_what_is_there(tmp_path):
    im,lb = folder(tmp_path/'raw', 'ab')
    run(im, lb, tmp_path/'out')
    with pytest.raises(InputError, match='did you mean out/CT_Abd'): find_npz(tmp_path/'out')
    with pytest.raises(InputError, match='no folder'): find_npz(tmp_path/'nothing')
    with pytest.raises(InputError, match='part'): find_npz(tmp_path/'out'/'CT_Abd', 'val')
    assert len(find_npz(tmp_path/'out'/'CT_Abd'))==2 and len(find_npz(tmp_path/'out'/'CT_Abd', 'test'))==1

def test_all_labels_and_two_workers_give_the_same_as_one(tmp_path):
    im,lb = folder(tmp_path/'raw', 'ab')
    im,lb = folder(tmp_path/'raw', 'cd', label=12)
    a = run(im, lb, tmp_path/'one', label_ids='all')
    b = run(im, lb, tmp_path/'two', label_ids='all', workers=2)
    assert a.recipe.label_ids==(9,12) and a.table.equals(b.table)
    for f,g in zip(a.files(), b.files()):
        x,y = read_npz(f), read_npz(g)
        assert x.case==y.case and np.array_equal(x.imgs, y.imgs) and np.array_equal(x.gts, y.gts)
    assert {read_npz(f).gts.max() for f in a.files()}=={1,2}


def test_source_hash_sees_every_byte_of_a_source(tmp_path):
    img,lab = pair()
    write(tmp_path/'a.mhd', img)
    first = source_hash(tmp_path/'a.mhd', lab)
    raw = next(tmp_path.glob('a.*raw'))
    b = bytearray(raw.read_bytes())
    b[-1] ^= 1
    raw.write_bytes(b)
    assert source_hash(tmp_path/'a.mhd', lab)!=first
    (tmp_path/'d').mkdir()
    (tmp_path/'d'/'1').write_bytes(b'x')
    one = source_hash(tmp_path/'d', lab)
    (tmp_path/'d'/'2').write_bytes(b'y')
    assert source_hash(tmp_path/'d', lab)!=one!=source_hash(tmp_path/'d', lab*0)

# ---- command ----
def console(args, cwd, script):
    "Run the console command as an installed script would"
    script.write_text('import sys\nfrom medsam_nb.curate import medsam_curate\nsys.exit(medsam_curate())\n')
    env = dict(os.environ, PYTHONPATH=str(REPO), MEDSAM_NB_HOME=str(cwd))
    return subprocess.run([sys.executable, str(script), *map(str, args)], cwd=cwd, env=env, capture_output=True,
                          text=True)

def test_command(tmp_path):
    im,lb = folder(tmp_path/'raw', 'abc')
    p = console([im, lb, '--label_id', 'all', '--window=-100,300', '--size', 128, '--min_pixels', 20, '--fit',
                 'squash', '--test_fraction', .4], tmp_path, tmp_path/'medsam_curate')
    assert p.returncode==0, p.stderr
    assert '3 cases in data/npz/CT_Abd' in p.stdout
    r = read_npz(find_npz(tmp_path/'data'/'npz'/'CT_Abd')[0]).recipe
    assert (r.window, r.size, r.min_pixels, r.fit, r.label_ids)==((-100.,300.), 128, 20, 'squash', (9,))
    p = console([im, lb, '--label_id', 'liver'], tmp_path, tmp_path/'medsam_curate')
    assert p.returncode==2 and p.stderr.startswith('medsam_curate: ') and 'Traceback' not in p.stderr
    p = console(['--help'], tmp_path, tmp_path/'medsam_curate')
    assert p.returncode==0 and all(f'--{o}' in p.stdout
                                   for o in ('out','label_ids','window','modality','anatomy','size','min_pixels',
                                             'test_fraction','seed','patient','fit','workers'))
    assert medsam_curate(str(im), str(lb), str(tmp_path/'o'), window='percentile').recipe.window is None


# ---- real data ----
def real(name):
    "A folder of the shared real data; skips when it is not there"
    root = Path(os.environ.get('MEDSAM_NB_REAL_DATA') or REPO.parent/'shared'/'data')
    if not (root/name).is_dir(): pytest.skip(f'no real data at {root/name} (set MEDSAM_NB_REAL_DATA)')
    return root/name/'images', root/name/'labels'

@pytest.mark.real
def test_real_btcv2d_by_patient(tmp_path):
    im,lb = real('btcv2d')
    res = run(im, lb, tmp_path, window=None, label_ids=(4,), patient=r'ABD_(\d+)_', flip='ud', min_pixels=50)
    t = res.table
    assert len(t)==125
    assert (set(t.patient)=={f.name.split('_')[1]
                                            for f in im.iterdir()})
    assert t.patient.nunique()>=17
    assert not res.failed
    assert 15<=t.kept.sum()<=22
    kept = t[t.kept>0]
    assert not set(kept[kept.part=='train'].patient) & set(kept[kept.part=='test'].patient)
    c = read_npz(res.files('train')[0])
    assert c.imgs.shape==(1,256,256,3) and c.imgs.max()>200 and c.source_shape==(1,512,512)
    with pytest.raises(InputError, match='window=None'): run(im, lb, tmp_path/'w', label_ids=(4,))

@pytest.mark.real
@pytest.mark.parametrize('name,modality,ids,cases', [('abdomen_ct','CT',(9,),1), ('sarcoma_ct','CT',(1,),2),
                                                     ('sarcoma_mr','MR',(1,),2), ('spleen_ct','CT',(1,),1)])
def test_real_volumes(tmp_path, name, modality, ids, cases):
    from medsam_nb.volume import find_cases, read_volume
    im,lb = real(name)
    res = run(im, lb, tmp_path, modality=modality, label_ids=ids)
    assert len(res.files())==cases and not res.failed
    for src,f in zip(find_cases(im, lb), sorted(res.files(), key=lambda f: read_npz(f).case)):
        c, lab = read_npz(f), read_volume(src.label, kind='label')
        assert c.case==src.case and np.array_equal(c.labels==1, lab.array==ids[0]) and np.allclose(c.spacing,
            lab.spacing)
        has = np.where((lab.array==ids[0]).any((1,2)))[0]
        assert set(c.z)<=set(has) and len(c.z)>=.6*len(has)
        h,w = fit_shape(lab.array.shape[1:])
        area = (lab.array[c.z]==ids[0]).sum((1,2))*(h/lab.array.shape[1])*(w/lab.array.shape[2])
        assert np.abs(c.gts.astype(bool).sum((1,2))/area-1).max()<.12           # no erosion on real organs
        assert c.imgs.std()>10 and c.imgs[:,:h,:w].max()>120
