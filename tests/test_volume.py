"Geometry round trips and refusals of medsam_nb.volume"
import gzip, itertools, os, struct, tempfile, unicodedata, warnings
from dataclasses import replace
from pathlib import Path
import numpy as np, pytest
import SimpleITK as sitk
from PIL import Image
from hypothesis import HealthCheck, given, settings, strategies as st
from scipy.spatial.transform import Rotation
from tiny import dicom, python
from medsam_nb import volume
from medsam_nb.core import InputError
from medsam_nb.volume import (FLAT, FORMATS, MEDICAL, Case, Format, Geometry, Volume, case_name, check_pair,
                              choose_plane,
                              display_axes, display_geometry, find_cases, format_of, image_values, label_values,
                              read_volume,
                              split_name, to_display, to_stored, writable, write_mask, write_volume)

sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
EXTS = ['.nii.gz', '.nii', '.nrrd', '.mha']

def make(size, spacing, origin, direction, seed=0, dtype=np.int16):
    im = sitk.GetImageFromArray(np.random.default_rng(seed).integers(-1000, 1000, size[::-1]).astype(dtype))
    im.SetSpacing([float(s) for s in spacing])
    im.SetOrigin([float(o) for o in origin])
    im.SetDirection(np.ravel(direction).astype(float).tolist())
    return im

def storages(im):
    "The same physical volume in all 48 axis orders, geometry adjusted"
    for p in itertools.permutations(range(3)):
        for f in itertools.product([False, True], repeat=3): yield sitk.Flip(sitk.PermuteAxes(im, p), f)

def write(im, path):
    sitk.WriteImage(im, str(path))
    return path
def array(im): return sitk.GetArrayFromImage(im)
def read(path): return sitk.ReadImage(str(path))

@st.composite
def grids(draw):
    """size, spacing, origin, direction: any rotation times any signed permutation, anisotropic, non-square, one-slice
    too"""
    size = draw(st.tuples(*[st.integers(1, 7)]*3))
    spacing = draw(st.tuples(*[st.sampled_from([.5, .7421875, .9765625, 1, 1.2, 2.5, 3.27, 5, 7.5])]*3))
    origin = draw(st.tuples(*[st.floats(-500, 500, width=32)]*3))
    q = draw(st.tuples(*[st.integers(-1000, 1000)]*4).filter(any))
    if draw(st.booleans()): q = (0, 0, 0, 1)
    d = Rotation.from_quat(q).as_matrix()[:, draw(st.permutations(range(3)))]*draw(st.tuples(*[st.sampled_from([-1,
        1])]*3))
    return size, spacing, origin, d

quick = settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))

@quick
@given(grids(), st.sampled_from(['.nii.gz', '.nrrd', '.mha']), st.sampled_from([None, 'axial', 'coronal', 'sagittal']),
       st.integers(0, 99), st.integers(-900, 900))
def test_mask_round_trip(grid, ext, plane, seed, level):
    with tempfile.TemporaryDirectory() as d:
        p,out = Path(d)/f'x_0000{ext}', Path(d)/f'm{ext}'
        write(make(*grid, seed=seed), p)
        v = read_volume(p, plane=plane)
        write_mask(v.array>level, v, out)
        src,got = read(p), read(out)
    np.testing.assert_array_equal(array(got), array(src)>level)
    assert got.GetPixelID()==sitk.sitkUInt8 and got.GetSize()==src.GetSize()
    for f in ('GetSpacing', 'GetOrigin', 'GetDirection'):
        a,b = getattr(src, f)(), getattr(got, f)()
        # NRRD stores spacing times direction, so the last bit may differ after reading
        if ext=='.nrrd': np.testing.assert_allclose(a, b, rtol=1e-14, atol=1e-14)
        else: assert a==b, f

@quick
@given(grids(), st.sampled_from(EXTS), st.sampled_from(['.nii.gz', '.nrrd', '.mha']), st.integers(0, 47))
def test_two_storages_one_array(grid, ext, ext2, k):
    a = make(*grid)
    b = next(itertools.islice(storages(a), k, None))
    with tempfile.TemporaryDirectory() as d:
        v,w = read_volume(write(a, Path(d)/f'a{ext}')), read_volume(write(b, Path(d)/f'b{ext2}'))
    np.testing.assert_array_equal(v.array, w.array)
    np.testing.assert_allclose(v.spacing, w.spacing, rtol=1e-6)
    assert v.source.plane==w.source.plane
    check_pair(v, w)

@quick
@given(grids(), st.sampled_from(['axial', 'coronal', 'sagittal']), st.data())
def test_display_geometry_places_voxels(grid, plane, data):
    im = make(*grid)
    g = Geometry(im.GetSize(), im.GetSpacing(), im.GetOrigin(), im.GetDirection(), plane)
    a,d = to_display(array(im), g), display_geometry(g)
    zyx = [data.draw(st.integers(0, n-1)) for n in a.shape]
    point = d['origin']+d['direction']@(d['spacing']*zyx)[::-1]
    i = im.TransformPhysicalPointToContinuousIndex(point.tolist())
    np.testing.assert_allclose(i, np.round(i), atol=1e-5)
    assert im[[int(round(x)) for x in i]]==a[tuple(zyx)]
    np.testing.assert_array_equal(to_stored(a, g), array(im))

ANGLES = [(0,0,0), (0,0,45), (45,45,0), (45,45,45), (45,0,45), (30,60,45), (54.7356103172,0,45), (90,45,0), (60,60,60)]
@pytest.mark.parametrize('angles', ANGLES)
def test_all_48_storages_agree_even_at_45_degrees(angles, tmp_path):
    im = make((3,4,5), (1,1,1), (10,-20,30), Rotation.from_euler('xyz', angles, degrees=True).as_matrix())
    for plane in ('axial', 'coronal', 'sagittal'):
        seen = {(a.shape, a.tobytes()) for s in storages(im)
                for a in [to_display(array(s), Geometry(s.GetSize(), s.GetSpacing(), s.GetOrigin(), s.GetDirection(),
                                                        plane))]}
        assert len(seen)==1, plane

@pytest.mark.parametrize('seed', range(12))
def test_agrees_with_dicomorient_for_everyday_tilts(seed):
    rng = np.random.default_rng(seed)
    im = make((3,4,5), (1,1.1,5), (1,2,3), Rotation.from_euler('xyz', rng.uniform(-20, 20, 3),
                                                               degrees=True).as_matrix())
    for i,s in enumerate(storages(im)):
        for plane,code in dict(axial='LPS', coronal='LIP', sagittal='PIL').items():
            if (i+seed)%5: continue
            g = Geometry(s.GetSize(), s.GetSpacing(), s.GetOrigin(), s.GetDirection(), plane)
            o,d = sitk.DICOMOrient(s, code), display_geometry(g)
            np.testing.assert_array_equal(to_display(array(s), g), array(o))
            np.testing.assert_allclose(d['origin'], o.GetOrigin(), atol=1e-9)
            np.testing.assert_allclose(d['direction'].ravel(), o.GetDirection(), atol=1e-12)
            np.testing.assert_allclose(d['spacing'], o.GetSpacing()[::-1])

def test_display_order_is_the_radiological_one(tmp_path):
    "A bright voxel at a known place of the body appears where a radiologist looks for it"
    z,y,x = np.indices((20,20,20))-9.5                      # LPS grid centred on 0
    a = ((x>5)*1+(y>5)*2+(z>5)*4).astype(np.uint8)          # left 1, posterior 2, superior 4
    im = sitk.GetImageFromArray(a)
    im.SetOrigin([-9.5]*3)
    p = write(sitk.Flip(im, (True,True,False)), tmp_path/'x.nii.gz')
    ax,co,sa = (read_volume(p, plane=k).array for k in ('axial', 'coronal', 'sagittal'))
    # last slice head, last row back, last column left
    assert (ax[-1]&4).all() and (ax[:,-1]&2).all() and (ax[:,:,-1]&1).all()
    assert (co[:,0]&4).all() and (co[:,:,-1]&1).all()                         # first row head, last column left
    assert (sa[:,0]&4).all() and (sa[:,:,-1]&2).all()                         # first row head, last column back

@pytest.mark.parametrize('size,spacing,plane', [
    ((9,9,9), (1,1,1), 'axial'), ((9,9,9), (1,1,1.5), 'axial'), ((9,9,9), (1.5,1,1), 'sagittal'),
    ((9,9,9), (1,1.5,1), 'coronal'),
    ((9,9,9), (1.45,1,1), 'axial'), ((9,9,9), (5,5,1), 'axial'), ((9,1,9), (1,1,1), 'coronal'),
    ((1,9,9), (1,1,7), 'sagittal'), ((9,9,1), (5,1,1), 'axial')])
def test_plane(size, spacing, plane):
    assert choose_plane(Geometry(size, spacing, (0,0,0), tuple(np.eye(3).ravel())))==plane

@pytest.mark.parametrize('kind', ['image', 'label'])
def test_array_outlives_the_reader(tmp_path, kind):
    "A grid that needs no turning must still be a copy, not a view of memory that SimpleITK frees"
    im = sitk.GetImageFromArray(np.ones((30,200,200), np.uint8))
    p = write(im, tmp_path/'x.nii.gz')
    del im
    v = read_volume(p, kind)
    junk = [read_volume(p, kind).array+np.uint8(7) for _ in range(3)]
    assert (v.array==1).all() and len(junk)==3

def test_plane_is_overridden(tmp_path):
    p = write(make((5,6,7), (1,1,4), (0,0,0), np.eye(3)), tmp_path/'x.mha')
    assert read_volume(p).shape==(7,6,5) and read_volume(p, plane='coronal').shape==(6,7,5) and read_volume(p,
        plane='sagittal').shape==(5,7,6)
    np.testing.assert_allclose(read_volume(p, plane='coronal').spacing, (1,4,1))
    with pytest.raises(InputError, match='oblique'): read_volume(p, plane='oblique')

# what a NIfTI header says, byte for byte

def test_nifti_geometry_bytes_are_kept_when_qform_and_sform_differ(tmp_path):
    p,out = write(make((4,5,6), (1,2,3), (7,8,9), np.eye(3)), tmp_path/'x.nii'), tmp_path/'m.nii.gz'
    b = bytearray(p.read_bytes())
    b[292:296] = struct.pack('<f', 77)                                     # sform x offset, the qform keeps its own
    b[252:256] = struct.pack('<hh', 1, 2)
    p.write_bytes(b)
    v = read_volume(p)
    write_mask(v.array>0, v, out)
    m = gzip.decompress(out.read_bytes())
    for i,j in ((76,92), (123,124), (252,328)): assert m[i:j]==bytes(b[i:j])
    assert struct.unpack('<h', m[70:72])[0]==2                             # uint8

@pytest.mark.parametrize('unit,factor', [(1,1000), (3,.001)])
def test_units_other_than_mm(tmp_path, unit, factor):
    p = write(make((4,5,6), (1,2,3), (0,0,0), np.eye(3)), tmp_path/'x.nii')
    b = bytearray(p.read_bytes())
    b[123] = unit
    p.write_bytes(b)
    v = read_volume(p)
    write_mask(v.array>0, v, tmp_path/'m.nii')
    src,got = read(p), read(tmp_path/'m.nii')
    np.testing.assert_allclose(src.GetSpacing(), np.array([1,2,3])*factor)
    assert src.GetSpacing()==got.GetSpacing()
    assert src.GetOrigin()==got.GetOrigin()
    assert src.GetDirection()==got.GetDirection()

def test_big_endian_nifti(tmp_path):
    p = write(make((4,5,6), (1,2,3), (7,8,9), np.diag([-1,-1,1])), tmp_path/'x.nii')
    b = p.read_bytes()
    out = bytearray(b)
    for fmt,at in (('i',0),('8h',40),('4h',68),('8f',76),('f',108),('2f',112),('i',32),('h',36),('2h',252),('6f',256),
                   ('12f',280),('2f',124)):
        n = struct.calcsize(fmt)
        out[at:at+n] = struct.pack('>'+fmt, *struct.unpack('<'+fmt, b[at:at+n]))
    out[352:] = np.frombuffer(b[352:], '<i2').astype('>i2').tobytes()
    q = tmp_path/'big.nii'
    q.write_bytes(out)
    v,w = read_volume(p), read_volume(q)
    np.testing.assert_array_equal(v.array, w.array)
    write_mask(w.array>0, w, tmp_path/'m.nii.gz')
    np.testing.assert_array_equal(array(read(tmp_path/'m.nii.gz')), array(read(p))>0)
    np.testing.assert_allclose(read(tmp_path/'m.nii.gz').GetDirection(), read(q).GetDirection(), atol=1e-6)
    q.write_bytes(out[:-9])
    with pytest.raises(InputError, match='big.nii'): read_volume(q)

def test_several_gzip_members_and_padding(tmp_path):
    p = write(make((4,5,6), (1,2,3), (7,8,9), np.eye(3)), tmp_path/'x.nii')
    b = p.read_bytes()
    q = tmp_path/'x.nii.gz'
    q.write_bytes(gzip.compress(b[:300])+gzip.compress(b[300:])+b'\0'*50)
    np.testing.assert_array_equal(read_volume(q).array, read_volume(p).array)

def test_same_mask_same_bytes(tmp_path):
    p = write(make((9,8,7), (1,2,3), (7,8,9), np.eye(3)), tmp_path/'x.nii.gz')
    v = read_volume(p)
    a,b = (write_mask(v.array>0, v, tmp_path/n/'m.nii.gz').read_bytes() for n in 'ab')
    assert a==b

def test_mask_without_the_source_file(tmp_path):
    p = write(make((4,5,6), (1,2,3), (7,8,9), np.diag([1,-1,1])), tmp_path/'x.nii.gz')
    v = read_volume(p)
    src = read(p)
    p.unlink()
    got = read(write_mask(v.array>0, v, tmp_path/'m.nii.gz'))
    assert got.GetOrigin()==src.GetOrigin() and (array(got)==(array(src)>0)).all()

def test_cross_format(tmp_path):
    d = Rotation.from_euler('xyz', (10,20,30), degrees=True).as_matrix()
    for a,b in itertools.permutations(EXTS, 2):
        p = write(make((4,5,6), (1,2,3), (7,8,9), d), tmp_path/f'x{a}')
        v = read_volume(p)
        got = read(write_mask(v.array>0, v, tmp_path/f'm{b}', overwrite=True))
        src = read(p)
        np.testing.assert_array_equal(array(got), array(src)>0)
        for f in ('GetSpacing', 'GetOrigin', 'GetDirection'):
            np.testing.assert_allclose(getattr(got, f)(), getattr(src, f)(), atol=1e-6)

# refusals

def fails(path, *parts, kind='image'):
    with pytest.raises(InputError) as e: read_volume(path, kind)
    said = str(e.value)
    assert Path(path).name in said
    assert '\n' not in said
    assert 'Error' not in said and '.cxx' not in said, said
    for s in parts: assert s in str(e.value), str(e.value)

@pytest.mark.parametrize('ext', EXTS)
@pytest.mark.parametrize('packed', [True, False])
@pytest.mark.parametrize('keep', [.97, .5, .05, 0])
def test_truncated(tmp_path, capfd, ext, packed, keep):
    p = tmp_path/f'Fälle.v1{ext}'
    sitk.WriteImage(make((20,21,22), (1,2,3), (0,0,0), np.eye(3)), str(p), packed)
    p.write_bytes(p.read_bytes()[:int(p.stat().st_size*keep)])
    fails(p)
    assert capfd.readouterr().err==''

@pytest.mark.parametrize('ext', ['.nii.gz', '.nrrd', '.mha'])
def test_one_damaged_byte(tmp_path, capfd, ext):
    p = tmp_path/f'x{ext}'
    sitk.WriteImage(make((20,21,22), (1,2,3), (0,0,0), np.eye(3)), str(p), True)
    b = bytearray(p.read_bytes())
    b[len(b)//2] ^= 255
    p.write_bytes(b)
    fails(p, 'damaged')
    assert capfd.readouterr().err==''

@pytest.mark.parametrize('ext', EXTS)
def test_4d(tmp_path, ext):
    im = sitk.Image([4,5,6,2], sitk.sitkInt16)
    sitk.WriteImage(im, str(tmp_path/f'x{ext}'))
    fails(tmp_path/f'x{ext}', '4 x 5 x 6 x 2')

def test_several_values_per_voxel(tmp_path):
    sitk.WriteImage(sitk.Image([4,5,6], sitk.sitkVectorUInt8, 3), str(tmp_path/'x.nrrd'))
    fails(tmp_path/'x.nrrd', '3 values per voxel')

@pytest.mark.parametrize('ext', EXTS)
@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_not_finite(tmp_path, ext, bad):
    a = np.zeros((3,4,5), np.float32)
    a[1,2,3] = bad
    write(sitk.GetImageFromArray(a), tmp_path/f'x{ext}')
    fails(tmp_path/f'x{ext}', '1 of 60')
    fails(tmp_path/f'x{ext}', '1 of 60', kind='label')

def test_zero_spacing(tmp_path, capfd):
    im = make((4,5,6), (1,2,3), (0,0,0), np.eye(3))
    p = write(im, tmp_path/'x.nii')
    b = bytearray(p.read_bytes())
    b[84:88] = struct.pack('<f', 0)
    p.write_bytes(b)
    fails(p, 'voxel size is zero')
    (tmp_path/'x.nii.gz').write_bytes(gzip.compress(b))
    fails(tmp_path/'x.nii.gz', 'voxel size is zero')
    p.write_bytes(b[:84]+struct.pack('<f', np.nan)+b[88:])
    fails(p, 'voxel size is zero')
    p = write(im, tmp_path/'x.mha')
    p.write_bytes(p.read_bytes().replace(b'ElementSpacing = 1 2 3', b'ElementSpacing = 1 0 3'))
    fails(p, 'voxel size is zero')
    p = write(im, tmp_path/'x.nrrd')
    p.write_bytes(p.read_bytes().replace(b'(0,2,0)', b'(0,0,0)'))
    fails(p)
    assert capfd.readouterr().err==''

def test_sheared(tmp_path, capfd):
    p = write(make((4,5,6), (1,2,3), (0,0,0), np.eye(3)), tmp_path/'x.nii')
    b = bytearray(p.read_bytes())
    b[252:254] = struct.pack('<h', 0)
    b[280:328] = struct.pack('<12f', 1,.5,0,0, 0,2,0,0, 0,0,3,0)
    p.write_bytes(b)
    fails(p, 'right angles')
    p = write(make((4,5,6), (1,2,3), (0,0,0), np.eye(3)), tmp_path/'x.nrrd')
    p.write_bytes(p.read_bytes().replace(b'(0,2,0)', b'(.5,2,0)'))
    fails(p, 'right angles')
    assert capfd.readouterr().err==''

def test_paths(tmp_path):
    (tmp_path/'empty').mkdir()
    fails(tmp_path/'empty', 'it is empty')
    (tmp_path/'dir.nii.gz').mkdir()
    (tmp_path/'dir.nii.gz'/'readme.md').write_text('x')
    fails(tmp_path/'dir.nii.gz', 'is a folder', 'readme.md')
    fails(tmp_path/'missing.nii.gz', 'does not exist')
    fails(tmp_path/'no'/'missing.nii.gz', 'does not exist')
    (tmp_path/'x.xyz').write_text('x')
    fails(tmp_path/'x.xyz', 'unknown kind of file')
    (tmp_path/'.nii.gz').write_text('x')
    fails(tmp_path/'.nii.gz', 'unknown kind of file')
    for e in EXTS+['.mhd', '.png', '.jpg', '.tif', '.bmp']:
        (tmp_path/f'text{e}').write_text('not an image, but long enough to be asked about '*20)
        fails(tmp_path/f'text{e}')
        (tmp_path/f'none{e}').write_text('')
        fails(tmp_path/f'none{e}')
    with pytest.raises(InputError, match='kind'): read_volume(tmp_path, 'mask')

def test_mhd_without_its_raw_file(tmp_path, capfd):
    p = write(make((4,5,6), (1,2,3), (0,0,0), np.eye(3)), tmp_path/'x.mhd')
    assert read_volume(p).shape==(6,5,4)
    b = (tmp_path/'x.raw').read_bytes()
    (tmp_path/'x.raw').write_bytes(b[:-1])
    fails(p, 'cut off')
    (tmp_path/'x.raw').unlink()
    fails(p, 'x.raw, is missing')
    assert capfd.readouterr().err==''

# values

def test_labels(tmp_path):
    w = lambda a: write(sitk.GetImageFromArray(a), tmp_path/'l.nii.gz')
    base = np.zeros((3,4,5))
    base[1,2,3] = 3
    for t in ('float32', 'float64', 'uint8', 'int16', 'int64'):
        v = read_volume(w(base.astype(t)), 'label')
        assert v.array.dtype==np.uint8 and v.array.sum()==3
    base[0,0,0] = 300
    v = read_volume(w(base.astype('float32')), 'label')
    assert v.array.dtype==np.uint16 and v.array.max()==300
    base[0,0,0] = .5
    w(base.astype('float32'))
    fails(tmp_path/'l.nii.gz', 'whole numbers', '0.5', kind='label')
    base[0,0,0] = -1
    w(base.astype('int16'))
    fails(tmp_path/'l.nii.gz', 'negative', '-1', kind='label')
    base[0,0,0] = 70000
    w(base.astype('int32'))
    fails(tmp_path/'l.nii.gz', '65535', kind='label')

@pytest.mark.parametrize('t,lo,hi,want', [('uint8',0,255,'uint8'), ('int8',-5,9,'int16'), ('int16',-1024,3000,'int16'),
                                          ('uint16',0,60000,'uint16'), ('int32',-1024,3000,'int16'),
    ('int64',0,60000,'uint16'), ('int32',-70000,0,'int32'), ('int64',0,2**40,'float32'), ('float32',0,1,'float32'),
    ('float64',-1,1,'float32')])
def test_image_dtypes(t, lo, hi, want):
    a = image_values(np.array([lo,hi], t))
    assert a.dtype==want and (a==np.array([lo,hi], t)).all()

def test_float64_beyond_float32(): 
    with pytest.raises(InputError, match='infinite'): image_values(np.array([1e300]))

def test_large_labels_survive_writing(tmp_path):
    p = write(make((4,5,6), (1,2,3), (7,8,9), np.eye(3)), tmp_path/'x.nii.gz')
    v = read_volume(p)
    m = np.zeros(v.shape, int)
    m[1,2,3] = 300
    w = read_volume(write_mask(m, v, tmp_path/'m.nii.gz'), 'label')
    assert w.array.dtype==np.uint16
    np.testing.assert_array_equal(w.array, m)

def test_array_can_go_to_torch(tmp_path):
    for d in (np.eye(3), np.diag([-1,-1,1])):
        a = read_volume(write(make((4,5,6), (1,2,3), (7,8,9), d), tmp_path/'x.nii.gz')).array
        assert a.flags.c_contiguous and a.flags.writeable
        assert a.flags.owndata or a.base is not None

# writing

def test_write_refuses(tmp_path):
    p = write(make((4,5,6), (1,2,3), (7,8,9), np.eye(3)), tmp_path/'x.nii.gz')
    v = read_volume(p)
    m = v.array>0
    for bad,what in ((m[1:], 'shape'), (m[...,None], 'shape'), (m*.5, 'whole numbers'), (m*-1, 'negative'),
                     (m*70000, '65535'), (m.astype(str), 'no labels')):
        with pytest.raises(InputError, match=what): write_mask(bad, v, tmp_path/'m.nii.gz')
    for name in ('m.png', 'm.txt', 'm', 'm.mhd', 'm.jpg'):
        with pytest.raises(InputError, match=name): write_mask(m, v, tmp_path/name)
    (tmp_path/'folder.nii.gz').mkdir()
    with pytest.raises(InputError, match='folder'): write_mask(m, v, tmp_path/'folder.nii.gz', overwrite=True)
    with pytest.raises(InputError, match='exists'): write_mask(m, v, p)
    np.testing.assert_array_equal(read_volume(p).array, v.array)
    assert sorted(x.name for x in tmp_path.iterdir())==['folder.nii.gz', 'x.nii.gz']
    write_mask(m, v, p, overwrite=True)
    np.testing.assert_array_equal(read_volume(p, 'label').array, m)

def test_volume_made_in_memory(tmp_path):
    a = np.arange(60, dtype=np.int16).reshape(3,4,5)
    v = Volume(a, (5,.7,.8), 'mine')
    p = write_volume(v, tmp_path/'mine_0000.nii.gz')
    w = read_volume(p)
    np.testing.assert_array_equal(w.array, a)
    np.testing.assert_allclose(w.spacing, (5,.7,.8), rtol=1e-6)
    assert w.case=='mine' and 'mine' in repr(v)
    check_pair(v, w)
    for s in ((1,1), (1,0,1), (1,np.nan,1)):
        with pytest.raises(InputError, match='spacing'): Volume(a, s)
    with pytest.raises(InputError, match='shape'): Volume(a[0], (1,1,1))
    with pytest.raises(InputError, match='does not fit'):
        write_volume(Volume(a[1:], v.spacing, source=v.source), tmp_path/'y.nii.gz')

def test_2d_medical_file(tmp_path):
    for ext in EXTS:
        im = sitk.GetImageFromArray(np.arange(20, dtype=np.int16).reshape(4,5))
        im.SetSpacing((.5,.7))
        im.SetOrigin((3,4))
        v = read_volume(write(im, tmp_path/f'x{ext}'))
        assert v.shape==(1,4,5)
        np.testing.assert_allclose(v.spacing, (1,.7,.5), rtol=1e-6)
        got = read(write_mask(v.array>7, v, tmp_path/f'm{ext}'))
        src = read(tmp_path/f'x{ext}')
        assert got.GetDimension()==2 and got.GetSpacing()==src.GetSpacing() and got.GetOrigin()==src.GetOrigin()
        np.testing.assert_array_equal(array(got), array(src)>7)

# pictures

def test_pictures(tmp_path):
    rng = np.random.default_rng(0)
    p = tmp_path/'é.v1.png'
    save = lambda a,q=p: (Image.fromarray(a).save(q), q)[1]
    g8,g16,rgb = (rng.integers(0, n, s).astype(t) for n,s,
                  t in ((256,(7,9),'uint8'), (65536,(7,9),'uint16'), (256,(7,9,3),'uint8')))
    for e in ('.png', '.tif', '.bmp', '.TIFF'):
        np.testing.assert_array_equal(read_volume(save(g8, tmp_path/f'x{e}')).array, g8[None])
    for e in ('.png', '.tif'):
        v = read_volume(save(g16, tmp_path/f'y{e}'))
        assert v.array.dtype==np.uint16
        np.testing.assert_array_equal(v.array, g16[None])
    v = read_volume(save(rgb))
    assert v.case=='é.v1' and v.shape==(1,7,9)
    np.testing.assert_array_equal(v.array, rgb[None])
    np.testing.assert_array_equal(read_volume(save(np.dstack([rgb, g8]))).array, rgb[None])
    np.testing.assert_array_equal(read_volume(save(np.dstack([g8]*3))).array, g8[None])
    np.testing.assert_array_equal(read_volume(save(np.dstack([g8]*3+[g8.T.reshape(7,9)])), 'label').array, g8[None])
    np.testing.assert_array_equal(read_volume(save(np.dstack([g8]*2))).array, g8[None])
    save(rgb)
    fails(p, 'colour', kind='label')
    Image.fromarray(g8>99).save(p)
    assert set(np.unique(read_volume(p).array))=={0,255} and set(np.unique(read_volume(p, 'label').array))=={0,1}
    assert read_volume(save(rgb, tmp_path/'x.jpg')).array.shape==(1,7,9,3)
    fails(tmp_path/'x.jpg', 'JPEG', kind='label')
    Image.fromarray(g8).save(tmp_path/'pages.tif', save_all=True, append_images=[Image.fromarray(g8)]*2)
    fails(tmp_path/'pages.tif', '3 pages')
    save(rng.integers(0, 256, (99,99)).astype('uint8'))
    p.write_bytes(p.read_bytes()[:2000])
    fails(p, 'whole')
    f = g8.astype('float32')
    f[0,0] = np.nan
    save(f, tmp_path/'f.tif')
    fails(tmp_path/'f.tif', 'NaN')

def test_picture_masks(tmp_path):
    a = np.zeros((7,9,3), np.uint8)
    a[2:4,5:8,0] = 200
    Image.fromarray(a).save(tmp_path/'x.png')
    v = read_volume(tmp_path/'x.png')
    m = a[...,0]>0
    for mask in (m, m[None]):
        p = write_mask(mask, v, tmp_path/'m.png', overwrite=True)
        with Image.open(p) as im:
            assert im.size==(9,7) and im.mode=='L'
            np.testing.assert_array_equal(np.asarray(im), m)
    big = m*300
    np.testing.assert_array_equal(read_volume(write_mask(big, v, tmp_path/'b.png'), 'label').array[0], big)
    check_pair(v, read_volume(p, 'label'))
    for n in ('m.jpg', 'm.bmp'):
        with pytest.raises(InputError, match=n): write_mask(m, v, tmp_path/n)

# pairs

def test_check_pair_names_the_difference(tmp_path):
    size,sp,o,d = (4,5,6), (1.,2.,3.), (7.,8.,9.), np.eye(3)
    v = read_volume(write(make(size, sp, o, d), tmp_path/'x_0000.nii.gz'))
    tilt = Rotation.from_euler('x', 1, degrees=True).as_matrix()
    for what,(a,b,c,e) in dict(size=((4,5,7),sp,o,d), spacing=(size,(1,2,3.01),o,d), origin=(size,sp,(7,8,9.01),d),
                               direction=(size,sp,o,tilt)).items():
        l = read_volume(write(make(a,b,c,e,dtype=np.int16)*0, tmp_path/'l.mha'), 'label')
        with pytest.raises(InputError, match=what) as err: check_pair(v, l)
        assert 'x_0000.nii.gz' in str(err.value) and 'l.mha' in str(err.value)
    check_pair(v, read_volume(write(make(size, sp, (7.0002,8,9), d)*0, tmp_path/'l.mha'), 'label'))

def touch(folder, *names):
    folder.mkdir(exist_ok=True)
    for n in names: (folder/n).write_bytes(b'')
    return folder

def test_find_cases(tmp_path):
    i = touch(tmp_path/'i', 'FLARE22_Tr_0001_0000.nii.gz', '1.2.840_0000.nii.gz',
              unicodedata.normalize('NFD', 'Jürgen_0000.mha'), 'same.PNG', 'seg_0000.png', '._x_0000.nii.gz',
              'notes.txt')
    l = touch(tmp_path/'l', 'FLARE22_Tr_0001.nii.gz', '1.2.840.nrrd', unicodedata.normalize('NFC', 'Jürgen.nii'),
              'same.tif', 'seg_0000.png', 'x.csv')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        c = find_cases(i, l)
    assert ([x.case for x in c]==['1.2.840', 'FLARE22_Tr_0001', 'Jürgen', 'same',
                                 'seg'])
    assert not c.unpaired
    assert isinstance(c, list)
    assert isinstance(c[0], Case)
    assert c[1].image.name=='FLARE22_Tr_0001_0000.nii.gz' and c[1].label==l/'FLARE22_Tr_0001.nii.gz'

def test_find_cases_tells_of_what_is_left(tmp_path):
    i,l = touch(tmp_path/'i', 'a_0000.nii.gz', 'b_0000.nii.gz', 'a_0001.nii.gz'), touch(tmp_path/'l', 'a.nii.gz',
        'c.nii.gz')
    with pytest.warns(UserWarning, match='3 of 5 files.*i/a_0001.nii.gz, i/b_0000.nii.gz, l/c.nii.gz'):
        c = find_cases(i, l)
    assert [x.case for x in c]==['a'] and [p.name for p in c.unpaired]==['a_0001.nii.gz', 'b_0000.nii.gz',
        'c.nii.gz'] and '3 files without' in repr(c)

@pytest.mark.parametrize('ims,labs', [(['a_0000.nii.gz','a.nii.gz'],['a.nii.gz']), (['a.png','a.nrrd'],['a.png']),
                                      (['a.png'],['a.png','a.tif']), (['a_0000.png'],['a.png','a_0000.png'])])
def test_find_cases_ambiguous(tmp_path, ims, labs):
    with pytest.raises(InputError, match="case 'a' pairs more than once"):
        find_cases(touch(tmp_path/'i', *ims), touch(tmp_path/'l', *labs))

def test_find_cases_nothing(tmp_path):
    i,l,e = touch(tmp_path/'i', 'a_0000.nii.gz'), touch(tmp_path/'l', 'b.nii.gz'), touch(tmp_path/'e')
    with pytest.raises(InputError, match='no image pairs.*a_0000.nii.gz.*b.nii.gz'): find_cases(i, l)
    for a,b,what in ((e,l,'it is empty'), (i,tmp_path/'x','does not exist'), (i/'a_0000.nii.gz',l,'is a file'),
                     (i,i,'one folder'), (touch(tmp_path/'t','x.txt'),l,'x.txt')):
        with pytest.raises(InputError, match=what): find_cases(a, b)
    assert find_cases(i, touch(tmp_path/'s', 'a_0000.nii.gz'), image_suffix='')[0].case=='a_0000'

def test_names():
    assert split_name('a/b.c/x.y.nii.GZ')==('x.y', '.nii.gz')
    assert (split_name('x.gz')==('x.gz',
        ''))
    assert case_name('_0000.png')=='_0000'
    assert case_name('a_0000.png', '')=='a_0000'

# DICOM

def test_two_series_in_one_folder(tmp_path):
    for s in '12':
        dicom(tmp_path/f'{s}.dcm', np.zeros((5,4), np.int16), g0008_0060='CT', g0020_000e=f'1.2.{s}', g0020_000d='1.2',
              g0008_0018=f'1.2.{s}.1')
    fails(tmp_path, '2 DICOM series')

# formats and codes

@pytest.mark.parametrize('flat', [False, True])
def test_what_is_writable_is_written_and_nothing_else(tmp_path, flat):
    v = Volume(np.ones((1,4,5), np.uint8), (1,1,1))
    if flat: v = Volume(v.array, v.spacing, source=Geometry((5,4), (1.,1.), (0.,0.), (1.,0.,0.,1.), 'image'))
    done = []
    for form in FORMATS:
        try: done.append(split_name(write_mask(v.array, v, tmp_path/f'm{form.ext}'))[1])
        except InputError as e: assert e.code=='not-writable'
    assert tuple(done)==writable(flat)

def test_a_format_is_a_row_and_its_reader(tmp_path, monkeypatch):
    "What `.mgz` would cost: a row of the table and a function that reads"
    def read_mgz(form, path, kind, colors):
        return np.ones((3,4,5), np.int16), Geometry((5,4,3), (1.,1.,2.), (0.,0.,0.), tuple(np.eye(3).ravel()))
    monkeypatch.setattr(volume, 'FORMATS', FORMATS+(Format('.mgz', read=read_mgz),))
    (tmp_path/'i').mkdir()
    (tmp_path/'l').mkdir()
    for k in 'il': (tmp_path/k/'brain.mgz').write_bytes(b'x')
    case, = find_cases(tmp_path/'i', tmp_path/'l')
    v = read_volume(case.image)
    assert v.case=='brain' and v.shape==(3,4,5)
    check_pair(v, read_volume(case.label, 'label'))
    assert '.mgz' not in writable(False)

def test_endings_follow_from_the_rows():
    assert MEDICAL+FLAT==tuple(f.ext for f in FORMATS)
    assert MEDICAL==('.nii.gz','.nii','.nrrd','.mha','.mhd')
    assert format_of('x.MHD').beside==('.raw','.zraw') and format_of('x.txt') is None

def coded(code, f, *args, **kwargs):
    with pytest.raises(InputError) as e: f(*args, **kwargs)
    assert e.value.code==code

@pytest.mark.parametrize('what', ['size','spacing','origin','direction'])
def test_the_code_of_a_pair_names_the_difference(what):
    a = np.zeros((3,4,5), np.uint8)
    plain = Volume(a, (1,1,1)).source
    tilt = tuple(Rotation.from_euler('x', 1, degrees=True).as_matrix().ravel())
    other = dict(size=plain, spacing=replace(plain, spacing=(2.,1.,1.)), origin=replace(plain, origin=(1.,0.,0.)),
                 direction=replace(plain, direction=tilt))[what]
    coded(f'pair-{what}', check_pair, Volume(a, (1,1,1)), Volume(a[1:] if what=='size' else a, (1,1,1), source=other))

VALUES = [([np.nan],'nan'), ([.5],'label-fraction'), ([-1],'label-negative'), ([70000],'label-too-large'),
          (['a'],'no-numbers')]
@pytest.mark.parametrize('values,code', VALUES)
def test_labels_are_refused_with_a_code(values, code): coded(code, label_values, np.array(values))

def test_files_are_refused_with_a_code(tmp_path):
    p = write(make((4,5,6), (1,2,3), (0,0,0), np.eye(3)), tmp_path/'x.nii')
    p.write_bytes(p.read_bytes()[:-9])
    coded('cut-off', read_volume, p)
    coded('missing', read_volume, tmp_path/'y.nii')
    Image.fromarray(np.arange(60, dtype=np.uint8).reshape(4,5,3)).save(tmp_path/'c.png')
    coded('label-colour', read_volume, tmp_path/'c.png', 'label')

def test_a_picture_is_flat_and_a_slice_with_millimetres_is_not(tmp_path):
    Image.fromarray(np.zeros((4,5), np.uint8)).save(tmp_path/'x.png')
    im = sitk.GetImageFromArray(np.zeros((4,5), np.uint8))
    im.SetSpacing((.5,.7))
    assert read_volume(tmp_path/'x.png').flat
    assert not read_volume(write(im, tmp_path/'x.nii')).flat
    assert not Volume(np.zeros((1,4,5), np.uint8), (1,1,1)).flat

def test_the_old_name_of_ids_warns(tmp_path):
    d = tmp_path/'case'
    v = Volume(np.ones((3,4,5), np.uint8), (1,1,1))
    write_mask(v.array, v, d/'liver.nii.gz')
    with pytest.warns(FutureWarning, match='names is called ids now'):
        l = read_volume(d, 'label', names=dict(liver=7))
    assert l.names=={7:'liver'}

# real files

REAL = Path(os.environ.get('MEDSAM_NB_REAL_DATA') or Path(__file__).resolve().parents[1]/'..'/'shared'/'data')
real = pytest.mark.skipif(not REAL.is_dir(), reason=f'no real images at {REAL} (set MEDSAM_NB_REAL_DATA)')

@real
@pytest.mark.real
@pytest.mark.parametrize('name', ['abdomen_ct', 'spleen_ct', 'sarcoma_ct', 'sarcoma_mr', 'xray_mr_2d/SCD',
                                  'xray_mr_2d/HipXRay'])
def test_real_pairs(name, tmp_path):
    cases = find_cases(REAL/name/'images', REAL/name/'labels')
    assert cases and not cases.unpaired
    for c in cases:
        v,l = read_volume(c.image), read_volume(c.label, 'label')
        check_pair(v, l)
        assert l.array.any()
        if v.source.plane=='image':
            p = write_mask(l.array, v, tmp_path/c.image.name)
            with Image.open(p) as a, Image.open(c.label) as b:
                assert a.size==b.size
                np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
                continue
        src,lab,got = read(c.image), read(c.label), read(write_mask(l.array, v, tmp_path/f'{c.case}.nii.gz'))
        np.testing.assert_array_equal(array(got), array(lab))
        for f in ('GetSize', 'GetSpacing', 'GetOrigin', 'GetDirection'):
            assert getattr(src, f)()==getattr(got, f)()

@real
@pytest.mark.real
def test_real_abdomen_is_the_right_way_up():
    l = read_volume(REAL/'abdomen_ct'/'labels'/'TS_0001.nii.gz', 'label')
    centre = {k: np.argwhere(l.array==k).mean(0) for k in (1,3,5,9)}
    # liver left of spleen, aorta below gallbladder
    assert (l.array==9).sum()==1333 and centre[1][2]<centre[3][2] and centre[5][1]>centre[9][1]

@real
@pytest.mark.real
def test_real_dicom(tmp_path):
    v = read_volume(REAL/'dicom_ct')
    assert v.array.dtype==np.int16 and v.shape==(3,512,512) and v.case=='dicom_ct'
    np.testing.assert_allclose(v.spacing, (1,.810547,.810547), atol=1e-6)
    got = read(write_mask(v.array>0, v, tmp_path/'m.nrrd'))
    assert (array(got)==(v.array>0)).all()
    np.testing.assert_allclose(got.GetOrigin(), v.source.origin, atol=1e-9)
    with pytest.raises(InputError, match='no stack of grey slices'): read_volume(REAL/'dicom_seg')

@pytest.mark.parametrize('ext', ['.nii', '.nii.gz', '.nrrd', '.mha'])
def test_a_full_disk_never_leaves_a_mask(tmp_path, ext):
    """A limit on file size stands for the disk. ITK's NIfTI writer notices nothing, so the writing is checked; noise,
    so that compression does not make it fit"""
    code = '''
import resource, sys; import numpy as np; from tiny import save; from medsam_nb.volume import *
save(sys.argv[1]+'/a.nii.gz', np.zeros((4,64,80), np.int16)); v = read_volume(sys.argv[1]+'/a.nii.gz')
mask = np.random.default_rng(0).integers(0, 255, v.shape, dtype=np.uint8)
resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))
try: write_mask(mask, v, sys.argv[1]+'/mask'+sys.argv[2])
except OSError as e: print('refused', e)
'''
    assert 'refused' in python(code, tmp_path, ext)
    assert [p.name for p in tmp_path.iterdir()]==['a.nii.gz']
