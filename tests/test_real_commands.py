"Real scans by commands alone: look, curate, embed, predict, from a raw folder to a mask in its own geometry. Marked `real`, as in test_real.py"
import json, os, shutil, subprocess, sys
from pathlib import Path
import numpy as np, pandas as pd, pytest
from scipy.ndimage import binary_fill_holes
from medsam_nb.curate import find_npz, read_npz, read_split
from medsam_nb.metrics import dsc
from medsam_nb.volume import check_pair, find_cases, read_volume

pytestmark = [pytest.mark.real, pytest.mark.slow]
BIN = Path(sys.executable).parent

def run(home, command, *args, code=0):
    "One command as a person types it; what it printed"
    if not (BIN/command).exists(): pytest.skip('the package is not installed, so there are no commands')
    p = subprocess.run([BIN/command, *map(str, args)], cwd=home, env=dict(os.environ, MEDSAM_NB_HOME=str(home), PYTHONWARNINGS='ignore', OMP_NUM_THREADS='1'), text=True, capture_output=True)
    assert p.returncode == code, (command, p.returncode, p.stdout, p.stderr)
    return p.stdout

def road(home, images, labels, options, predict=(), ids='1', embed=True):
    "Doctor, curate, embed and predict one folder with oracle boxes; the scores of its first case"
    run(home, 'medsam_doctor', images, labels, '--quick', '--label_id', ids, '--out', home/'sheet.png', *options)
    run(home, 'medsam_curate', images, labels, '--label_id', ids, *options)
    npz, = (home/'data/npz').iterdir()
    n = sum(len(read_npz(f)) for f in find_npz(npz)); assert n == read_split(npz).kept.sum() > 0
    if embed: assert f'{n} embeddings' in run(home, 'medsam_embed', npz, '--device', 'cpu')    # one a slice, however many organs
    case = find_cases(images, labels)[0]
    out = home/('mask.png' if case.image.suffix == '.png' else 'mask.nii.gz')
    flags = [o for k in ('--modality', '--flip') if k in options for o in (k, options[options.index(k)+1])]
    said = run(home, 'medsam_predict', case.image, out, '--labels', case.label, '--label_id', ids, '--device', 'cpu', *flags, *predict)
    assert 'oracle' in said and (home/'mask_qc.png').stat().st_size > 5000
    vol, mask = read_volume(case.image), read_volume(out, kind='label')
    check_pair(vol, mask); assert mask.array.any()
    slices, scores = pd.read_csv(home/'mask_slices.csv'), pd.read_csv(home/'mask_scores.csv')
    assert len(slices) and set(scores.label) == set(np.unique(read_volume(case.label, kind='label', like=vol).array))-{0} if ids == 'all' else len(scores) == len(ids.split(','))
    print(f'{images.parent.name if images.parent != home/"raw" else options[1]}, {n} slices kept, first case {case.case}, tight oracle boxes, by commands:\n{scores.round(3).to_string(index=False)}')
    return scores

def test_hip_xrays(real_data, tmp_path):
    assert road(tmp_path, *pair(real_data/'xray_mr_2d/HipXRay', tmp_path, 6), ['--modality', 'XRay'], ids='255').DSC.mean() > .7

def test_cardiac_mr_slices(real_data, tmp_path):
    "The label is the heart's muscle, a ring: a box asks for what fills it, and that is the answer, with a low score and a good picture"
    images, labels = pair(real_data/'xray_mr_2d/SCD', tmp_path, 6)
    score = road(tmp_path, images, labels, ['--modality', 'MR'], ids='255').DSC[0]
    ring = read_volume(find_cases(images, labels)[0].label, kind='label').array[0] > 0
    blood, mask = binary_fill_holes(ring)&~ring, read_volume(tmp_path/'mask.png', kind='label').array[0] > 0
    assert dsc(mask, blood) > .8 > score

def test_abdominal_slices_all_organs(real_data, tmp_path):
    "Rows of these PNGs run bottom-up"
    assert road(tmp_path, *pair(real_data/'btcv2d', tmp_path, 9), ['--modality', 'CT2D', '--flip', 'ud', '--patient', r'ABD_(\d+)_'], ids='all').DSC.mean() > .6

def test_sarcoma_mr(real_data, tmp_path):
    assert road(tmp_path, real_data/'sarcoma_mr/images', real_data/'sarcoma_mr/labels', ['--modality', 'MR'], embed=False).DSC[0] > .7

def test_spleen_ct(real_data, tmp_path):
    assert road(tmp_path, real_data/'spleen_ct/images', real_data/'spleen_ct/labels', [], embed=False).DSC[0] > .7

def test_dicom_with_dicom_seg(real_data, tmp_path):
    "One series folder a case, its DICOM-SEG as the label. Its contour is loose, so no score is asked for"
    (tmp_path/'images').mkdir(); (tmp_path/'labels').mkdir()
    shutil.copytree(real_data/'dicom_ct', tmp_path/'images/ct'); shutil.copy(real_data/'dicom_seg/liver.dcm', tmp_path/'labels/ct.dcm')
    assert len(road(tmp_path, tmp_path/'images', tmp_path/'labels', [])) == 1

def pair(folder, home, n):
    "The first image of `n` evenly chosen names, and their labels, as folders of their own"
    files = sorted((folder/'images').iterdir()); stems = {f.stem: f for f in (folder/'labels').iterdir()}
    for f in [files[i] for i in np.linspace(0, len(files)-1, n).astype(int)]:
        for k, p in (('images', f), ('labels', stems[f.stem])): (home/'raw'/k).mkdir(parents=True, exist_ok=True); shutil.copy(p, home/'raw'/k)
    return home/'raw/images', home/'raw/labels'
