"""People's own inputs: DICOM series, DICOM-SEG, one file per structure, colour masks, pictures of all kinds, folders
as cases, and the two commands of the MedSAM tutorials"""
import json, os, subprocess, sys, unicodedata, warnings
from pathlib import Path
import highdicom as hd, numpy as np, pydicom, pytest
import SimpleITK as sitk
from PIL import Image
from pydicom.sr.codedict import codes
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian
from tiny import disc, save, scan
from medsam_nb.core import InputError, parse_pairs
from medsam_nb.curate import curate, medsam_curate, read_names, read_npz, read_split
from medsam_nb.pre_CT import name_suffix, pre_CT
from medsam_nb.pre_grey_rgb2D import pre_grey_rgb2D, read_pairs
from medsam_nb.volume import check_pair, find_cases, label_names, read_volume, to_stored, write_mask

UID = '1.2.826.0.1.3680043.10.1'
TILT = (1,0,0, 0,.978147601,-.207911691)   # a table tilted by 12 degrees

def series(folder, array, spacing=(3.,.8,.9), origin=(-30.,-25.,10.), iop=(1,0,0,0,1,0), number=2,
           desc='Portal venous', slope=1, intercept=-1024, keep=None, names='{:04}.dcm', modality='CT', uid=None,
           **tags):
    """Write an array (D,H,W) as a DICOM series with pydicom, slices `keep`, file order reversed; returns the headers.
    A slope or a tag may be a list, one for each slice"""
    folder, done, n = Path(folder), [], np.cross(iop[:3], iop[3:])
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(len(array)) if keep is None else keep:
        d, s = pydicom.Dataset(), slope[k] if np.ndim(slope) else slope
        d.file_meta = pydicom.dataset.FileMetaDataset()
        d.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        a = np.round((array[k]-intercept)/s).astype(np.int16)
        for t, v in (dict(SpecificCharacterSet='ISO_IR 192', SOPClassUID=CTImageStorage,
                          SOPInstanceUID=f'{UID}.{number}.{k+1}', StudyInstanceUID=UID, SeriesInstanceUID=uid
                          or f'{UID}.{number}',
            FrameOfReferenceUID=f'{UID}.99', PatientID='p', PatientName='', PatientBirthDate='', PatientSex='',
            StudyDate='', StudyTime='', StudyID='', AccessionNumber='', ReferringPhysicianName='',
            Modality=modality, SeriesNumber=number, SeriesDescription=desc, InstanceNumber=k+1,
            ImagePositionPatient=[f'{x:.9g}' for x in origin+n*spacing[0]*k],
            ImageOrientationPatient=[f'{x:.9g}' for x in iop],
            PixelSpacing=list(spacing[1:]), SliceThickness=spacing[0], RescaleSlope=s, RescaleIntercept=intercept,
            Rows=a.shape[0], Columns=a.shape[1], SamplesPerPixel=1, PhotometricInterpretation='MONOCHROME2',
            BitsAllocated=16, BitsStored=16, HighBit=15, PixelRepresentation=1, PixelData=a.tobytes())|tags).items():
            if v is not None: setattr(d, t, v[k] if isinstance(v, tuple) else v)
        d.save_as(folder/names.format(999-k), enforce_file_format=True)
        done.append(d)
    return done

def seg(path, masks, on, labels=('Liver','Spleen'), kind='BINARY', change=None, **kw):
    "Write (n,H,W,segments) masks on the headers `on` as DICOM-SEG; `change` edits the dataset before it is saved"
    parts = [hd.seg.SegmentDescription(i, name, codes.SCT.Tissue, codes.SCT.Organ, 'MANUAL') for i,
             name in enumerate(labels, 1)]
    s = hd.seg.Segmentation(on, masks, kind, parts, hd.UID(), 9, hd.UID(), 1, 'nobody', 'none', '1', 'none', **kw)
    if change: change(s)
    path.parent.mkdir(parents=True, exist_ok=True)
    s.save_as(path)
    return path

def values(shape=(5,12,10), seed=0): return np.random.default_rng(seed).integers(-900, 900, shape)
def two(shape=(5,12,10)):
    "Masks (D,H,W,2): apart, the second not on every slice"
    m = np.zeros((*shape,2), np.uint8)
    m[1:4,2:6,1:5,0] = 1
    m[2:3,7:10,4:9,1] = 1
    return m
def as_map(m): return (m*np.arange(1, m.shape[-1]+1)).sum(-1)
def refused(*says, f=read_volume, **kw):
    "One sentence with `says` in it"
    def check(*args):
        with pytest.raises(InputError) as e: f(*args, **kw)
        for s in says: assert s in str(e.value), str(e.value)
        assert '\n' not in str(e.value)
    return check

# ---- DICOM series

@pytest.mark.parametrize('slope,intercept', [(1,-1024), (1,0), (2,-1000), (.5,-1024)])
def test_hu_are_rescaled(tmp_path, slope, intercept):
    a = values()//2*2
    series(tmp_path/'s', a, slope=slope, intercept=intercept)
    v = read_volume(tmp_path/'s')
    np.testing.assert_array_equal(v.array, a)
    np.testing.assert_allclose(v.spacing, (3,.8,.9))
    assert v.case=='s' and v.source.frame==f'{UID}.99'

def test_a_slope_for_every_slice_as_in_pet(tmp_path):
    a = np.arange(5*12*10).reshape(5,12,10)
    series(tmp_path/'s', a*np.array([1,.5,.25,.1,.7])[:,None,None], slope=[1,.5,.25,.1,.7], intercept=0, modality='PT')
    np.testing.assert_allclose(read_volume(tmp_path/'s').array, a*np.array([1,.5,.25,.1,.7])[:,None,None], rtol=1e-6)

@pytest.mark.parametrize('iop,plane', [((1,0,0,0,1,0),'axial'), (TILT,'axial'), ((-1,0,0,0,-1,0),'axial'),
                                       ((1,0,0,0,0,-1),'coronal'), ((0,1,0,0,0,-1),'sagittal')])
def test_orientation_is_that_of_the_same_scan_as_nrrd(tmp_path, iop, plane):
    a = values()
    series(tmp_path/'s', a, iop=iop)
    r, c = np.array(iop[:3]), np.array(iop[3:])
    im = sitk.GetImageFromArray(a.astype(np.int16))
    im.SetSpacing((.9,.8,3.))
    im.SetOrigin((-30.,-25.,10.))
    im.SetDirection(np.stack([r,c,np.cross(r,c)], 1).ravel().tolist())
    sitk.WriteImage(im, str(tmp_path/'x.nrrd'))
    v, w = read_volume(tmp_path/'s'), read_volume(tmp_path/'x.nrrd')
    np.testing.assert_array_equal(v.array, w.array)
    assert v.source.plane==w.source.plane==plane
    check_pair(v, w)
    check_pair(v, read_volume(write_mask(v.array>0, v, tmp_path/'m.nii.gz'), 'label'))

@pytest.mark.parametrize('kw,says', [(dict(keep=[0,1,3,4]), '6 mm between'),
                                     (dict(ImagePositionPatient=tuple([-30,-25,z] for z in (10,13,13,16,19))),
                                      'same place'),
    (dict(ImagePositionPatient=tuple([-30,-25+z,10+3*z] for z in range(5))), 'shifted sideways'),
    (dict(ImagePositionPatient=tuple([-30,-25,z] for z in (10,13,16.4,19,22))), 'is one missing')])
def test_slices_that_are_no_stack(tmp_path, kw, says):
    series(tmp_path/'s', values(), **kw)
    refused('s: ', says)(tmp_path/'s')

def test_a_localizer_in_the_series(tmp_path):
    a = values((4,12,12))
    series(tmp_path/'s', a, spacing=(3,1,1))
    series(tmp_path/'s', a, spacing=(3,1,1), iop=(1,0,0,0,0,-1), keep=[0], names='loc{}.dcm', SOPInstanceUID='1.2.9.9',
           ImagePositionPatient=[-30,-25,22])
    refused('turned against each other')(tmp_path/'s')

@pytest.fixture
def study(tmp_path):
    "Three series in one folder; two have one number, files have no extension"
    a = values()
    series(tmp_path/'st', a, names='A{}')
    series(tmp_path/'st', a[:4]+1, number=3, desc='Spät-arteriell', names='B{}')
    series(tmp_path/'st', a[:3]+2, number=3, desc='Dünn', uid=f'{UID}.77', names='C{}', modality='MR')
    return tmp_path/'st'

def test_several_series_are_listed(study):
    refused('3 DICOM series', "number 2, 'Portal venous', CT, 5 slices", "number 3, 'Spät-arteriell', CT, 4 slices",
            "'Dünn', MR, 3 slices, UID …", '10.1.77', 'series=2 (--series 2)')(study)

@pytest.mark.parametrize('series,n', [(2,5), ('2',5), ('portal',5), ('SPÄT',4), (f'{UID}.3',4), (f'{UID}.77',3),
                                      ('10.1.77',3), ('Dünn',3)])
def test_a_series_is_chosen(study, series, n): assert len(read_volume(study, series=series).array)==n

@pytest.mark.parametrize('series,fits', [(3,'fits 2 of 3'), ('n','fits 2 of 3'), (7,'fits none of 3'),
                                         ('lung','fits none'), ('','fits none')])
def test_a_series_that_is_not_clear(study, series, fits): refused(fits, 'choose one', series=series)(study)

def test_series_is_refused_where_there_is_none(tmp_path):
    save(tmp_path/'x.nii.gz', scan()[0])
    refused('leave it out', series=2)(tmp_path/'x.nii.gz')
    series(tmp_path/'s', values())
    refused('fits none of 1', series=5)(tmp_path/'s')

# ---- DICOM-SEG

@pytest.mark.parametrize('iop', [(1,0,0,0,1,0), TILT, (-1,0,0,0,-1,0), (1,0,0,0,0,-1), (0,1,0,0,0,-1)])
@pytest.mark.parametrize('order', [1, -1])
def test_seg_lies_voxel_for_voxel(tmp_path, iop, order):
    heads, m = series(tmp_path/'s', values(), iop=iop), two()
    seg(tmp_path/'x.dcm', m[::order], heads[::order])
    v = read_volume(tmp_path/'s')
    l = read_volume(tmp_path/'x.dcm', 'label', like=v)
    assert (l.names=={1:'Liver',
                     2:'Spleen'})
    assert l.case=='x'
    assert l.array.dtype==np.uint8
    assert 'names 1 Liver, 2 Spleen' in repr(l)
    np.testing.assert_array_equal(to_stored(l.array, v.source), as_map(m))
    # the scan as NIfTI: no frame of reference, positions in float32
    w = read_volume(write_mask(v.array>0, v, tmp_path/'same.nii.gz'))
    np.testing.assert_array_equal(read_volume(tmp_path/'x.dcm', 'label', like=w).array, l.array)

def test_seg_alone_in_a_folder_and_by_name(tmp_path):
    heads = series(tmp_path/'s', values())
    seg(tmp_path/'d'/'1-1.dcm', two(), heads)
    v = read_volume(tmp_path/'s')
    np.testing.assert_array_equal(read_volume(tmp_path/'d', 'label', like=v).array, as_map(two()))
    l = read_volume(tmp_path/'d', 'label', like=v, ids={'Spleen':300})
    assert l.names=={300:'Spleen'} and l.array.dtype==np.uint16 and set(np.unique(l.array))=={0,300}
    refused('none of liver', 'Liver, Spleen', like=v, ids={'liver':1})(tmp_path/'d', 'label')
    assert label_names(tmp_path/'d')==[(1,'Liver'), (2,'Spleen')]

def move(by):
    def change(s):
        # frames of two segments share one
        places = {id(o): o for p in s.PerFrameFunctionalGroupsSequence for o in p.PlanePositionSequence}
        for o in places.values():
            o.ImagePositionPatient = [float(a)+b for a,b in zip(o.ImagePositionPatient, by)]
    return change
def shared(k, tag, value):
    def change(s): setattr(getattr(s.SharedFunctionalGroupsSequence[0], k)[0], tag, value)
    return change

def test_seg_moved_by_whole_voxels(tmp_path):
    heads = series(tmp_path/'s', values())
    seg(tmp_path/'x.dcm', two(), heads, change=move((.9,-.8,3)))
    m = np.roll(as_map(two()), (1,-1,1), (0,1,2))
    np.testing.assert_array_equal(read_volume(tmp_path/'x.dcm', 'label', like=read_volume(tmp_path/'s')).array, m)

@pytest.mark.parametrize('change,says', [(move((.45,0,0)), '0.5 voxels'), (move((0,0,1)), '0.333 voxels'),
                                         (move((0,0,30)), 'reaches beyond the image'),
                                         (move((-1.8,0,0)), 'reaches beyond'),
    (shared('PixelMeasuresSequence', 'PixelSpacing', [.8,1.8]), 'does not lie on the grid'),
    (shared('PixelMeasuresSequence', 'PixelSpacing', [.81,.9]), 'does not lie on the grid'),
    (shared('PlaneOrientationSequence', 'ImageOrientationPatient', list(TILT)), 'does not lie on the grid'),
    (lambda s: setattr(s, 'FrameOfReferenceUID', '1.2.3'), 'frame of reference'),
    (lambda s: delattr(s.SharedFunctionalGroupsSequence[0], 'PlaneOrientationSequence'), 'cannot be read')])
def test_seg_that_does_not_lie_on_the_image(tmp_path, change, says):
    heads = series(tmp_path/'s', values())
    seg(tmp_path/'x.dcm', two(), heads, change=change)
    refused('x.dcm', says, like=read_volume(tmp_path/'s'))(tmp_path/'x.dcm', 'label')

def test_seg_of_another_series(tmp_path):
    heads = series(tmp_path/'s', values())
    seg(tmp_path/'x.dcm', two(), heads)
    series(tmp_path/'part', values(), keep=[0,1])
    series(tmp_path/'fine', values((9,12,10)), spacing=(1.3,.8,.9))
    refused('reaches beyond the image', 'part', like=read_volume(tmp_path/'part'))(tmp_path/'x.dcm', 'label')
    refused('does not lie on the grid', 'fine', like=read_volume(tmp_path/'fine'))(tmp_path/'x.dcm', 'label')
    refused('only makes sense on its image', 'like=')(tmp_path/'x.dcm', 'label')
    Image.fromarray(np.zeros((12,10), np.uint8)).save(tmp_path/'p.png')
    refused('no place in the room', like=read_volume(tmp_path/'p.png'))(tmp_path/'x.dcm', 'label')

def test_overlapping_segments_are_refused_by_name(tmp_path):
    heads, m = series(tmp_path/'s', values()), two()
    m[2,4:8,3:6,1] = 1
    seg(tmp_path/'x.dcm', m, heads)
    v = read_volume(tmp_path/'s')
    refused("'Liver' and 'Spleen' overlap in 4 voxels", like=v)(tmp_path/'x.dcm', 'label')
    np.testing.assert_array_equal(read_volume(tmp_path/'x.dcm', 'label', like=v, ids=dict(Spleen=2)).array, m[...,1]*2)

def test_kinds_of_seg(tmp_path):
    heads = series(tmp_path/'s', values())
    v, m = read_volume(tmp_path/'s'), two()
    seg(tmp_path/'l.dcm', as_map(m).astype(np.uint8), heads, kind='LABELMAP')
    np.testing.assert_array_equal(read_volume(tmp_path/'l.dcm', 'label', like=v).array, as_map(m))
    seg(tmp_path/'f.dcm', m.astype(float), heads, kind='FRACTIONAL')
    np.testing.assert_array_equal(read_volume(tmp_path/'f.dcm', 'label', like=v).array, as_map(m))
    seg(tmp_path/'p.dcm', m*.4, heads, kind='FRACTIONAL')
    refused('fractions', like=v)(tmp_path/'p.dcm', 'label')
    seg(tmp_path/'e.dcm', m, heads, omit_empty_frames=False)
    np.testing.assert_array_equal(read_volume(tmp_path/'e.dcm', 'label', like=v).array, as_map(m))

def test_other_dicom_files_as_labels(tmp_path):
    heads = series(tmp_path/'s', values())
    seg(tmp_path/'x.dcm', two(), heads)
    v, one = read_volume(tmp_path/'s'), next((tmp_path/'s').iterdir())
    refused('single DICOM file (CT)', 'give the folder')(one)
    refused('single DICOM file (CT)', 'DICOM-SEG', like=v)(one, 'label')
    refused('single DICOM file (SEG)', "kind='label'")(tmp_path/'x.dcm')
    b = (tmp_path/'x.dcm').read_bytes()
    (tmp_path/'cut.dcm').write_bytes(b[:len(b)*9//10])
    refused('cut.dcm', like=v)(tmp_path/'cut.dcm', 'label')
    (tmp_path/'text.dcm').write_text('not DICOM')
    refused('unknown kind of file')(tmp_path/'text.dcm', 'label')

# ---- one file per structure

def structures(folder, lab, **names):
    for n,k in names.items(): save(folder/f'{n}.nii.gz', (lab==k).astype(np.uint8))
    return folder

def test_structures(tmp_path):
    lab = scan(organs=((1,20,20,8), (2,40,50,9), (3,50,20,5)))[1]
    d = structures(tmp_path/'case.1', lab, spleen=1, Leber=2, aorta=3)
    (d/'statistics.json').write_text('{}')
    l = read_volume(d, 'label')
    assert l.names=={1:'Leber', 2:'aorta', 3:'spleen'}
    assert l.case=='case.1'
    assert l.path==d
    assert (label_names(d)==[(None,
        'Leber'), (None,'aorta'), (None,'spleen')])
    for i,k in ((1,2), (2,3), (3,1)): np.testing.assert_array_equal(l.array==i, lab==k)
    l = read_volume(d, 'label', ids=dict(spleen=300, aorta=9, heart=4))
    assert l.names=={9:'aorta', 300:'spleen'} and set(np.unique(l.array))=={0,9,300}
    refused('none of heart', 'Leber, aorta, spleen', ids=dict(heart=1))(d, 'label')
    for bad in (dict(spleen=0), dict(spleen=1, aorta=1), dict(spleen='x'), {}, dict(spleen=1.5)):
        refused('id of its own', ids=bad)(d, 'label')
    refused('without DICOM slices')(d)

def test_structures_that_do_not_fit(tmp_path):
    lab = scan(organs=((1,20,20,8), (2,40,50,9)))[1]
    d = structures(tmp_path/'c', lab, a=1, b=2)
    save(d/'b.nii.gz', (lab>0).astype(np.uint8)*255)
    refused("'a' and 'b' overlap", 'c: ')(d, 'label')
    assert read_volume(d, 'label', ids=dict(b=1)).array.sum()==(lab>0).sum()          # 255 is a mask like any other
    save(d/'b.nii.gz', lab)
    refused('b.nii.gz', 'holds the ids [1, 2]')(d, 'label')
    save(d/'b.nii.gz', (lab==2).astype(np.uint8), origin=(5,0,0))
    refused('b.nii.gz', 'origin')(d, 'label')
    # TotalSegmentator writes empty files too
    save(d/'b.nii.gz', lab*0)
    assert read_volume(d, 'label').names=={1:'a', 2:'b'}
    save(tmp_path/'im.nii.gz', scan()[0], origin=(5,0,0))
    refused('im.nii.gz', 'origin', like=read_volume(tmp_path/'im.nii.gz'))(d, 'label')
    save(d/'b.nrrd', lab*0)
    refused('two files have one name')(d, 'label')

def test_what_is_not_for_a_label_is_refused(tmp_path):
    img, lab = scan()
    save(tmp_path/'i.nii.gz', img)
    save(tmp_path/'l.nii.gz', lab)
    v = read_volume(tmp_path/'i.nii.gz')
    refused('ids are for folders', ids=dict(a=1))(tmp_path/'l.nii.gz', 'label')
    refused('colors are for pictures', colors={'#ff0000':1})(tmp_path/'l.nii.gz', 'label')
    for kw in (dict(like=v), dict(ids=dict(a=1)), dict(colors={'#ff0000':1})):
        refused("kind='label'", **kw)(tmp_path/'i.nii.gz')
    d = structures(tmp_path/'d', lab, a=9)
    refused('not for a folder of structures', colors={'#ff0000':1})(d, 'label')
    assert read_volume(tmp_path/'l.nii.gz', 'label', like=read_volume(tmp_path/'i.nii.gz',
        plane='coronal')).source.plane=='coronal'

# ---- pictures

RGB = np.zeros((6,8,3), np.uint8)
RGB[1:4,1:4], RGB[3:5,5:8] = (255,0,0), (0,128,0)
IDS = np.zeros((6,8), int)
IDS[1:4,1:4], IDS[3:5,5:8] = 1, 2
COLORS = {'#FF0000':1, '008000':2}

def palette():
    p = Image.new('P', (8,6))
    p.putdata(IDS.ravel().tolist())
    p.putpalette([0,0,0, 255,0,0, 0,128,0]+[0]*759)
    return p

PICTURES = dict(rgb=lambda: Image.fromarray(RGB), rgba=lambda: Image.fromarray(np.dstack([RGB,
    (IDS>0).astype(np.uint8)*255])), palette=palette)

@pytest.mark.parametrize('ext', ['png', 'tif', 'bmp', 'TIFF'])
@pytest.mark.parametrize('kind', PICTURES)
def test_colour_masks(tmp_path, kind, ext):
    p = tmp_path/f'Maske.v1.{ext}'
    try: PICTURES[kind]().save(p)
    except OSError: pytest.skip(f'{ext} cannot hold {kind}')
    l = read_volume(p, 'label', colors=COLORS)
    np.testing.assert_array_equal(l.array[0], IDS)
    assert l.array.dtype==np.uint8
    refused('Maske.v1', 'without an id: #008000 (6 px)', colors={'#ff0000':1})(p, 'label')
    # without colours a palette picture means its indices
    if kind=='palette':
        np.testing.assert_array_equal(read_volume(p, 'label').array[0], IDS)
    else:
        refused('#000000 (33 px), #ff0000 (9 px), #008000 (6 px)', "colors={'#ff0000': 1, '#008000': 2}",
                "--colors '#ff0000=1,#008000=2'")(p, 'label')
    np.testing.assert_array_equal(read_volume(p).array[0], RGB)

def test_colours_on_grey_and_white_backgrounds(tmp_path):
    Image.fromarray((IDS>0).astype(np.uint8)*255).save(tmp_path/'g.png')
    np.testing.assert_array_equal(read_volume(tmp_path/'g.png', 'label', colors={'#ffffff':7}).array[0], (IDS>0)*7)
    a = RGB.copy()
    a[IDS==0] = 255
    Image.fromarray(a).save(tmp_path/'w.png')
    np.testing.assert_array_equal(read_volume(tmp_path/'w.png', 'label', colors=COLORS|{'#ffffff':0}).array[0], IDS)
    refused('#ffffff (33 px)', colors=COLORS)(tmp_path/'w.png', 'label')
    refused('#ff0000 (9 px)')(tmp_path/'w.png', 'label')
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (6,8,3), np.uint8)).save(tmp_path/'n.png')
    refused('40 more', 'without smoothing')(tmp_path/'n.png', 'label')
    for bad in ({'red':1}, {'#ff00':1}, {'#ff0000':-1}, {'#ff0000':70000}, {'#ff0000':'a'}, {}):
        refused("'#rrggbb'", colors=bad)(tmp_path/'w.png', 'label')
    Image.fromarray(RGB).save(tmp_path/'x.jpg')
    refused('JPEG', colors=COLORS)(tmp_path/'x.jpg', 'label')

@pytest.mark.parametrize('ext', ['png', 'tif'])
def test_sixteen_bit_pictures(tmp_path, ext):
    a = (IDS*300).astype(np.uint16)
    Image.fromarray(a).save(tmp_path/f'x.{ext}')
    for kind in ('image','label'):
        v = read_volume(tmp_path/f'x.{ext}', kind)
        assert v.array.dtype==np.uint16
        np.testing.assert_array_equal(v.array[0], a)
    refused('without colours', colors=COLORS)(tmp_path/f'x.{ext}', 'label')

def test_sixteen_bits_per_channel_are_not_halved(tmp_path):
    import struct, zlib
    rows = b''.join(b'\0'+np.repeat(r[:,None], 3, 1).astype('>u2').tobytes() for r in IDS)
    def chunk(t, d): return struct.pack('>I', len(d))+t+d+struct.pack('>I', zlib.crc32(t+d))
    (tmp_path/'x.png').write_bytes(b'\x89PNG\r\n\x1a\n'+chunk(b'IHDR',
                                                              struct.pack('>IIBBBBB', 8, 6, 16, 2, 0, 0,
                                                                  0))+chunk(b'IDAT',
                                                                      zlib.compress(rows))+chunk(b'IEND', b''))
    for kind in ('image','label'): refused('16 bits in each of 3 channels')(tmp_path/'x.png', kind)

@pytest.mark.parametrize('ext', ['png', 'bmp', 'tif'])
def test_two_valued_masks(tmp_path, ext):
    for top in (1, 255):
        Image.fromarray(((IDS>0)*top).astype(np.uint8)).save(tmp_path/f'{top}.{ext}')
        assert set(np.unique(read_volume(tmp_path/f'{top}.{ext}', 'label').array))=={0,top}
    Image.fromarray(np.dstack([(IDS>0).astype(np.uint8)*255]*3)).save(tmp_path/f'grey.{ext}')
    np.testing.assert_array_equal(read_volume(tmp_path/f'grey.{ext}', 'label').array[0], (IDS>0)*255)

# ---- folders as cases

def test_folders_are_cases(tmp_path):
    i, l = tmp_path/'images', tmp_path/'labels'
    for name in ('Müller.v2_0000', 'b', 'c_0000'):
        heads = series(i/unicodedata.normalize('NFD', name), values())
    save(i/'d_0000.nii.gz', scan()[0])
    (i/'notes').mkdir()
    (i/'.hidden').mkdir()
    structures(l/'Müller.v2', scan()[1], gallbladder=9)
    seg(l/'b.dcm', two(), heads)
    seg(l/'c'/'1-1.dcm', two(), heads)
    save(l/'d.nii.gz', scan()[1])
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        c = find_cases(i, l)
    assert [o.case for o in c]==['Müller.v2', 'b', 'c', 'd'] and [o.label.name for o in c]==['Müller.v2', 'b.dcm', 'c',
        'd.nii.gz'] and c[1].image==i/'b'
    save(l/'b.nii.gz', scan()[1])
    refused("case 'b' pairs more than once", f=find_cases)(i, l)

def test_one_series_is_one_case(tmp_path):
    heads = series(tmp_path/'Fall.1_0000', values())
    s = seg(tmp_path/'seg.dcm', two(), heads)
    c, = find_cases(tmp_path/'Fall.1_0000', s)
    assert (c.case, c.image, c.label)==('Fall.1', tmp_path/'Fall.1_0000', s)
    d = structures(tmp_path/'parts', scan()[1], liver=9)
    assert find_cases(tmp_path/'Fall.1_0000', d)[0].label==d
    save(tmp_path/'labels'/'Fall.1.nii.gz', scan()[1])
    save(tmp_path/'labels'/'other.nii.gz', scan()[1])
    assert find_cases(tmp_path/'Fall.1_0000', tmp_path/'labels')[0].label.name=='Fall.1.nii.gz'
    refused('do not exist', f=find_cases)(tmp_path/'Fall.1_0000', tmp_path/'nowhere')
    refused('one folder', f=find_cases)(tmp_path/'Fall.1_0000', tmp_path/'Fall.1_0000')

# ---- curation

def organs(seed=0, **kw): return scan(seed, organs=((1,20,20,9), (2,40,50,12), (3,50,20,8)), **kw)

def test_one_list_of_names_for_all_cases(tmp_path, capsys):
    i, l = tmp_path/'i', tmp_path/'l'
    for k,name in enumerate('abc'):
        img, lab = organs(k)
        save(i/f'{name}_0000.nii.gz', img)
        structures(l/name, lab, **(dict(spleen=3, liver=1) if k else dict(spleen=3)))
    res = curate(i, l, tmp_path/'npz', label_ids='all', progress=False, min_pixels=20)
    assert (res.names==read_names(res.folder)=={1:'liver',
                                               2:'spleen'})
    assert 'labels: 1 liver, 2 spleen' in capsys.readouterr().out
    assert json.loads((res.folder/'names.json').read_text())=={'1':'liver', '2':'spleen'}
    ids = {read_npz(f).case: set(np.unique(read_npz(f).labels))-{0} for f in res.files()}
    assert ids==dict(a={2}, b={1,2}, c={1,2})
    assert set(curate(i, l, tmp_path/'npz', label_ids='all', progress=False, min_pixels=20).table.status)=={'as before'}
    # a new case with a new name: nobody's number changes, and nothing is curated twice
    img, lab = organs(9)
    save(i/'d_0000.nii.gz', img)
    structures(l/'d', lab, aorta=2, liver=1)
    more = curate(i, l, tmp_path/'npz', label_ids=(1,2), progress=False, min_pixels=20)
    assert more.names=={1:'liver', 2:'spleen', 3:'aorta'} and dict(zip(more.table.case,
        more.table.status))==dict(a='as before', b='as before', c='as before', d='new')
    refused("'liver' is label 5 in ids and was 1", f=curate, names=dict(liver=5), label_ids=(5,), progress=False)(i,
        l, tmp_path/'npz')
    # a structure under another name is another label, though its bytes are the same
    (l/'b'/'liver.nii.gz').rename(l/'b'/'leber.nii.gz')
    assert dict(zip(*(t:=curate(i, l, tmp_path/'npz', label_ids=(1,2), progress=False, min_pixels=20).table)[['case',
        'status']].values.T))['b']=='new'
    (res.folder/'names.json').write_text('[]')
    refused('names.json', f=read_names)(res.folder)

def test_segment_numbers_must_mean_one_thing(tmp_path):
    img, m = organs()[0], np.stack([organs()[1]==k for k in (1,2)], -1).astype(np.uint8)
    for name,labels in dict(a=('Liver','Spleen'), b=('Liver','Tumour')).items():
        seg(tmp_path/'l'/f'{name}.dcm', m, series(tmp_path/'i'/name, img), labels)
    refused("label 2 is 'Tumour' in b and 'Spleen' elsewhere", f=curate, label_ids=(1,2), progress=False)(tmp_path/'i',
        tmp_path/'l', tmp_path/'npz')
    res = medsam_curate(str(tmp_path/'i'), str(tmp_path/'l'), str(tmp_path/'npz'), label_id='all',
                        names='Liver=1,Spleen=2,Tumour=3', progress=False, min_pixels=20)
    assert {read_npz(f).case: set(np.unique(read_npz(f).labels))-{0} for f in res.files()}==dict(a={1,2}, b={1,3})

def test_curation_picks_the_series(tmp_path):
    (img, lab), i = organs(), tmp_path/'i'
    for name in 'ab':
        series(i/name, img)
        series(i/name, img[:3], number=3, desc='Thin', names='t{}.dcm')
        save(tmp_path/'l'/f'{name}.nii.gz', read_volume(i/name, series=2).array*0, spacing=(.9,.8,3.),
             origin=(-30.,-25.,10.))
    for name in 'ab':
        v = read_volume(i/name, series=2)
        write_mask(lab, v, tmp_path/'l'/f'{name}.nii.gz', overwrite=True)
    with pytest.raises(InputError, match='2 DICOM series'):
        curate(i, tmp_path/'l', tmp_path/'npz', label_ids=(1,), progress=False)
    res = medsam_curate(str(i), str(tmp_path/'l'), str(tmp_path/'npz'), label_id='1,2', series='Portal', min_pixels=20,
                        progress=False)
    assert not res.failed and res.table.kept.tolist()==[4,4]
    assert set(curate(i, tmp_path/'l', tmp_path/'npz', label_ids=(1,2), series='portal', min_pixels=20,
                      progress=False).table.status)<={'new','as before'}
    with pytest.raises(InputError, match='against'):
        curate(i, tmp_path/'l', tmp_path/'npz', label_ids=(1,2), series=3, min_pixels=20, progress=False)

def test_curation_reads_colour_masks(tmp_path):
    for name in 'ab':
        img, lab = organs(ord(name), shape=(1,64,80))
        (tmp_path/'i').mkdir(exist_ok=True)
        (tmp_path/'m').mkdir(exist_ok=True)
        Image.fromarray((img[0]+100).clip(0,255).astype(np.uint8)).save(tmp_path/'i'/f'{name}.png')
        Image.fromarray(np.array([(0,0,0), (255,0,0), (0,255,0), (0,0,255)],
                                 np.uint8)[lab[0]]).save(tmp_path/'m'/f'{name}.png')
    args = str(tmp_path/'i'), str(tmp_path/'m'), str(tmp_path/'npz')
    with pytest.raises(InputError, match=r'all 2 cases failed.*\n.*#ff0000'):
        medsam_curate(*args, modality='Photo', label_id='1', progress=False)
    res = medsam_curate(*args, modality='Photo', label_id='all', colors='#ff0000=1,#00ff00=2,#0000ff=9',
                        progress=False, min_pixels=20)
    assert res.recipe.label_ids==(1,2,9) and not res.names and not (res.folder/'names.json').exists()
    assert set(curate(*args, modality='Photo', label_ids=(1,2,9), colors={'00FF00':2, '0000ff':9, 'ff0000':1},
                      progress=False, min_pixels=20).table.status)=={'as before'}
    assert set(curate(*args, modality='Photo', label_ids=(1,2,9), colors={'00FF00':9, '0000ff':2, 'ff0000':1},
                      progress=False, min_pixels=20).table.status)=={'new'}

def test_pairs_as_text():
    assert parse_pairs(None) is None and parse_pairs('a=1, b c=2')=={'a':1, 'b c':2}
    for bad in ('a', 'a=', '=1', 'a=x', 'a=1,a=2', ''):
        with pytest.raises(InputError, match='ids'): parse_pairs(bad)

def test_curate_needs_labels(tmp_path): refused('no labels are given', f=curate)(tmp_path)

# ---- pre_CT, pre_grey_rgb2D

def fails(job, *args, says='', capsys=None):
    with pytest.raises(SystemExit) as e: job([str(o) for o in args])
    err = capsys.readouterr().err
    assert e.value.code==2, err
    assert says in err
    assert err.splitlines()[-1].startswith(f'{job.__name__}: ')
    assert 'Traceback' not in err

def test_name_suffix():
    assert [name_suffix(o) for o in ('_0000.nii.gz', '.png', '_CT.NII.GZ', '_img', '')]==['_0000', '', '_CT', '_img',
        '']

def test_pre_ct_end_to_end(home, capsys, monkeypatch):
    monkeypatch.chdir(home)
    for n in ('a.1','b'):
        img, lab = scan(ord(n[0]), shape=(1,64,80))
        save(home/'in'/'images'/f'{n}_CT.nii.gz', img)
        save(home/'in'/'labels'/f'{n}.nii.gz', lab)
    pre_CT('-i in/images -gt in/labels -o out --image_size 256 --modality CT --anatomy Abd-Gallbladder '
           '--img_name_suffix _CT.nii.gz --label_id 9 --model_type lite --device cpu --seed 2023'.split())
    out = capsys.readouterr().out
    store = 'data/embeddings/lite/CT_Abd-Gallbladder.zarr'
    assert f'next: medsam_finetune out/CT_Abd-Gallbladder --store {store} --model lite' in out
    assert '2 embeddings' in out
    t = read_split(home/'out'/'CT_Abd-Gallbladder')
    assert sorted(t.part)==['test','train'] and t.kept.tolist()==[1,1] and t.case.tolist()==['a.1','b']
    assert (home/'data'/'embeddings'/'lite'/'CT_Abd-Gallbladder.zarr'/'zarr.json').exists()

def test_pre_commands_tell_in_one_sentence(home, capsys, tmp_path):
    save(home/'i'/'a_0000.nii.gz', scan()[0])
    save(home/'l'/'a.nii.gz', scan()[1])
    fails(pre_CT, '-i', home/'nowhere', '-gt', home/'l', '--device', 'cpu', says='does not exist', capsys=capsys)
    fails(pre_CT, '--device', 'cpu', says='FLARE22Train', capsys=capsys)
    fails(pre_CT, '-i', home/'i', '-gt', home/'l', '--model_type', 'vit_z', says='vit_z', capsys=capsys)
    fails(pre_CT, '-i', home/'i', '-gt', home/'l', '--device', 'abacus', says='abacus', capsys=capsys)
    fails(pre_CT, '-i', home/'i', '-gt', home/'l', '--label_id', '77', '--device', 'cpu', says='hold ids [9]',
          capsys=capsys)
    fails(pre_CT, '-i', home/'i', '-gt', home/'l', '--label_id', 'liver', '--device', 'cpu', says='label_id',
          capsys=capsys)
    fails(pre_CT, '-i', home/'i', '-gt', home/'l', '--checkpoint', home/'no.pth', '--device', 'cpu', says='no.pth',
          capsys=capsys)
    fails(pre_grey_rgb2D, '--csv', home/'no.csv', '--device', 'cpu', says='no.csv', capsys=capsys)
    assert not (home/'data').exists()

def test_python_m(tmp_path):
    "The modules as the tutorials call their scripts, in another process, with a table of pairs"
    root = Path(__file__).resolve().parents[1]
    for d in ('img/x','gt'): (tmp_path/d).mkdir(parents=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60,80,3), np.uint8)).save(tmp_path/'img'/'x'/'1.png')
    Image.fromarray(disc((60,80), 30, 40, 15).astype(np.uint8)*255).save(tmp_path/'gt'/'x1.png')
    (tmp_path/'t.csv').write_text('image_filename,mask_filename\nx/1.png,x1.png\n', encoding='utf-8-sig')
    def m(module, *args):
        return subprocess.run([sys.executable, '-m', f'medsam_nb.{module}', *args], cwd=tmp_path,
                              env=dict(os.environ, PYTHONPATH=str(root), MEDSAM_NB_HOME=str(tmp_path)),
                              capture_output=True, text=True)
    r = m('pre_grey_rgb2D', *'-i img -gt gt --csv t.csv -o out --data_name demo2d --label_id 255 --device cpu'.split())
    assert r.returncode==0 and 'next: medsam_finetune out/2D_demo2d' in r.stdout, r.stdout+r.stderr
    assert read_split(tmp_path/'out'/'2D_demo2d').case.tolist()==['x_1']
    r = m('pre_CT', '-i', 'img', '-gt', 'nowhere')
    assert r.returncode==2 and r.stderr.strip().splitlines()[-1].startswith('pre_CT: ') and 'Traceback' not in r.stderr

def test_help_names_the_options_of_the_tutorials(capsys):
    more = dict(pre_CT='-i -gt -o --nii_path --gt_path --npz_path --image_size --modality --anatomy --img_name_suffix '
                       '--label_id --model_type --checkpoint --device --seed',
                       pre_grey_rgb2D='-i -gt -o --img_path --gt_path --csv --npz_path --data_name --image_size '
                                      '--img_name_suffix --label_id --model_type --checkpoint --device --seed')
    for job in (pre_CT, pre_grey_rgb2D):
        with pytest.raises(SystemExit) as e: job(['--help'])
        out = capsys.readouterr().out
        assert not e.value.code and 'default: lite' in out and set(more[job.__name__].split())<=set(out.replace(',',
            ' ').split()), out

def test_tables_of_pairs(tmp_path):
    def table(text):
        (tmp_path/'t.csv').write_text(text)
        return tmp_path/'t.csv'
    for n in ('a_0000.png','b.png'): Image.new('L', (9,9)).save(tmp_path/n)
    head = 'mask_filename,image_filename\n'
    c, = read_pairs(table(head+'b.png,a_0000.png\n'), tmp_path, tmp_path, '_0000')
    assert (c.case, c.image, c.label)==('a', tmp_path/'a_0000.png', tmp_path/'b.png')
    for text,says in ((head, '0 pairs'), (head+'b.png,c.png\n', '1 of their files'), (head+'b.png,\n', 'line 2'),
                      (head+'b.png,b.png\nb.png,b.png\n', 'more than once'),
                      ('image_filename\nb.png\n', 'mask_filename'), ('', 'cannot be read')):
        refused('t.csv', says, f=read_pairs)(table(text), tmp_path, tmp_path)

# ---- real scans

@pytest.mark.real
def test_real_dicom_and_seg_are_curated(real_data, tmp_path):
    "Three real CT slices and the liver that somebody drew on them, from raw folders to npz, as people have them"
    res = medsam_curate(str(real_data/'dicom_ct'), str(real_data/'dicom_seg'/'liver.dcm'), str(tmp_path), label_id='1',
                        anatomy='Liver', progress=False)
    case = read_npz(res.files()[0])
    raw = pydicom.dcmread(real_data/'dicom_seg'/'liver.dcm').pixel_array
    assert case.case=='dicom_ct'
    assert len(case)==3
    assert res.names=={1:'Liver'}
    assert not res.failed
    np.testing.assert_array_equal(case.labels, raw)        # frames of this file run upwards, as its slices do
    v = read_volume(real_data/'dicom_ct')
    assert case.labels.shape==v.shape and -50<np.median(v.array[case.labels>0])<250   # HU of a liver, not of air
    np.testing.assert_allclose(case.spacing, (1,.810547,.810547), atol=1e-6)
    # the folder it lies in
    again = medsam_curate(str(real_data/'dicom_ct'), str(real_data/'dicom_seg'), str(tmp_path/'b'), label_id='all',
                          anatomy='Liver', progress=False)
    np.testing.assert_array_equal(read_npz(again.files()[0]).labels, raw)
