"Real scans by commands alone, from a raw folder to a mask in its own geometry. Marked `real`"
import os, shutil, subprocess, sys
from pathlib import Path
import numpy as np, pandas as pd, pytest
from scipy.ndimage import binary_fill_holes
from medsam_nb.curate import find_npz, read_npz, read_split
from medsam_nb.metrics import dsc
from medsam_nb.volume import check_pair, find_cases, read_volume

pytestmark = [pytest.mark.real, pytest.mark.slow]
BIN = Path(sys.executable).parent

def installed(home, command, *args):
    "One command as a person types it, from its file; what it printed"
    if not (BIN/command).exists(): pytest.skip('the package is not installed, so there are no commands')
    env = dict(os.environ, MEDSAM_NB_HOME=str(home), PYTHONWARNINGS='ignore', OMP_NUM_THREADS='1')
    p = subprocess.run([BIN/command, *map(str, args)], cwd=home, env=env, text=True, capture_output=True)
    assert p.returncode==0, (command, p.returncode, p.stdout, p.stderr)
    return p.stdout

def organs_in(path, like=None): return set(np.unique(read_volume(path, kind='label', like=like).array))-{0}

def embeds(home, npz, n):
    "One embedding a slice, however many organs"
    assert f'{n} embeddings' in installed(home, 'medsam_embed', npz, '--device', 'cpu')

def predicts(home, case, ids, options)->Path:
    "Predict one case with oracle boxes, in the geometry of its image; returns the mask's path"
    out = home/('mask.png' if case.image.suffix=='.png' else 'mask.nii.gz')
    flags = [o for k in ('--modality', '--flip') if k in options for o in (k, options[options.index(k)+1])]
    label = ['--labels', case.label, '--label_ids', ids]
    assert 'oracle' in installed(home, 'medsam_predict', case.image, out, *label, '--device', 'cpu', *flags)
    vol, mask = read_volume(case.image), read_volume(out, kind='label')
    check_pair(vol, mask)
    assert mask.array.any()
    return out

def road(home, images, labels, options, ids='1', embed=True):
    "Doctor, curate, embed and predict one folder with oracle boxes; the scores of its first case"
    installed(home, 'medsam_doctor', images, labels, '--quick', '--label_ids', ids, '--out', home/'sheet.png', *options)
    installed(home, 'medsam_curate', images, labels, '--label_ids', ids, *options)
    npz, = (home/'data/npz').iterdir()
    n = sum(len(read_npz(f)) for f in find_npz(npz))
    assert n==read_split(npz).kept.sum()>0
    if embed: embeds(home, npz, n)
    case = find_cases(images, labels)[0]
    predicts(home, case, ids, options)
    assert (home/'mask_qc.png').stat().st_size>5000
    assert len(pd.read_csv(home/'mask_slices.csv'))
    scores = pd.read_csv(home/'mask_scores.csv')
    wanted = organs_in(case.label, like=read_volume(case.image)) if ids=='all' else {int(i) for i in ids.split(',')}
    assert set(scores.label)==wanted
    name = options[1] if images.parent==home/'raw' else images.parent.name
    print(f'{name}, {n} slices kept, first case {case.case}, tight oracle boxes, by commands:')
    print(scores.round(3).to_string(index=False))
    return scores

def pair(folder, home, n):
    "The first image of `n` evenly chosen names, and their labels, as folders of their own"
    files = sorted((folder/'images').iterdir())
    label_of = {f.stem: f for f in (folder/'labels').iterdir()}
    for k in ('images', 'labels'): (home/'raw'/k).mkdir(parents=True)
    for i in np.linspace(0, len(files)-1, n).astype(int):
        shutil.copy(files[i], home/'raw/images')
        shutil.copy(label_of[files[i].stem], home/'raw/labels')
    return home/'raw/images', home/'raw/labels'

def test_hip_xrays(real_data, tmp_path):
    folders = pair(real_data/'xray_mr_2d/HipXRay', tmp_path, 6)
    assert road(tmp_path, *folders, ['--modality', 'XRay'], ids='255').DSC.mean()>.7

def test_a_ring_in_cardiac_mr_is_answered_by_what_fills_it(real_data, tmp_path):
    "The label is the heart's muscle: a box asks for what fills it, and that is the answer, with a low score"
    images, labels = pair(real_data/'xray_mr_2d/SCD', tmp_path, 6)
    score = road(tmp_path, images, labels, ['--modality', 'MR'], ids='255').DSC[0]
    ring = read_volume(find_cases(images, labels)[0].label, kind='label').array[0]>0
    blood = binary_fill_holes(ring)&~ring
    mask = read_volume(tmp_path/'mask.png', kind='label').array[0]>0
    assert dsc(mask, blood)>.8>score

def test_abdominal_slices_all_organs(real_data, tmp_path):
    "Rows of these PNGs run bottom-up"
    folders = pair(real_data/'btcv2d', tmp_path, 9)
    options = ['--modality', 'CT2D', '--flip', 'ud', '--patient', r'ABD_(\d+)_']
    assert road(tmp_path, *folders, options, ids='all').DSC.mean()>.6

@pytest.mark.parametrize('name,options', [('sarcoma_mr', ['--modality', 'MR']), ('spleen_ct', [])])
def test_volumes(real_data, tmp_path, name, options):
    folder = real_data/name
    assert road(tmp_path, folder/'images', folder/'labels', options, embed=False).DSC[0]>.7

def test_dicom_with_dicom_seg(real_data, tmp_path):
    "One series folder a case, its DICOM-SEG as the label. Its contour is loose, so no score is asked for"
    for k in ('images', 'labels'): (tmp_path/k).mkdir()
    shutil.copytree(real_data/'dicom_ct', tmp_path/'images/ct')
    shutil.copy(real_data/'dicom_seg/liver.dcm', tmp_path/'labels/ct.dcm')
    assert len(road(tmp_path, tmp_path/'images', tmp_path/'labels', []))==1
