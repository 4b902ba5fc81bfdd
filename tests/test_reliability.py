"Killed and started again: the same bytes as if nothing had happened; and bad files through the whole chain"
import json, os, shutil, signal, subprocess, sys, time
from pathlib import Path
import numpy as np
import pandas as pd
import pytest
import torch
from medsam_nb.core import InputError
from medsam_nb.curate import curate, find_npz, read_npz, read_split
from medsam_nb.embed import EmbeddingStore, embed
from medsam_nb.evaluate import evaluate
from medsam_nb.finetune import finetune
from tiny import fill, hospital, lite, python, quick, raw, same_state, save, scan, state_of, tree

def kill_when(code, ready, *args, limit=240, after=0):
    "Start `code`, SIGKILL it as soon as `ready()`; fails when it ends before that"
    p, end = python(code, *args, wait=False, threads=1, stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE), time.time()+limit
    try:
        while not ready() and p.poll() is None and time.time()<end: time.sleep(.002)
        time.sleep(after)
        assert p.poll() is None, f'it ended before it could be killed: {p.stderr.read()[-2000:]}'
        assert time.time()<end, 'it took too long'
    finally:
        p.kill()
        p.wait()
        p.stderr.close()
    assert p.returncode==-signal.SIGKILL

@pytest.fixture(scope='module', autouse=True)
def one_thread():
    "As in the processes that are started here: sums in another order would round differently"
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)

def leftovers(path):
    return [p.name for p in Path(path).rglob('*') if p.suffix in ('.tmp','.partial','.part') or p.name=='.staging']


# ---- embedding ----
def slices_in(store):
    return [p for p in Path(store).glob('*/c/*/0/0/0') if p.is_file() and p.parts[-6]!='_ranges']

SLOW = '''
import sys, time
from medsam_nb.embed import embed
from tiny import quick
sam = quick(); real = sam.image_encoder.forward
def forward(x): time.sleep(.1); return real(x)
sam.image_encoder.forward = forward
embed(sys.argv[1], sys.argv[2], model=sam, dtype=sys.argv[3], batch_size=int(sys.argv[4]), device='cpu')
'''
@pytest.mark.parametrize('dtype, batch_size', [('float16','1'), ('uint8','2')])
def test_embedding_killed_twice(tmp_path, dtype, batch_size):
    npz = hospital(tmp_path, ['a','b','c'], scans=dict(shape=(5,64,80)))
    embed(npz, tmp_path/'whole', model=quick(), dtype=dtype, batch_size=int(batch_size), device='cpu')
    for n in (1,7):
        kill_when(SLOW, lambda: len(slices_in(tmp_path/'cut'))>=n, npz, tmp_path/'cut', dtype, batch_size)
        assert n<=len(slices_in(tmp_path/'cut'))<15
    (tmp_path/'cut'/'a'/'c'/'0'/'0'/'0'/'0.00ff.partial').write_bytes(b'half')      # what a kill inside zarr leaves
    with pytest.raises(InputError, match='lacks|no case'):
        [EmbeddingStore(tmp_path/'cut').open_case(read_npz(f)) for f in find_npz(npz)]
    embed(npz, tmp_path/'cut', model=quick(), dtype=dtype, batch_size=int(batch_size), device='cpu')
    a, b = tree(tmp_path/'whole'), {k: v for k,v in tree(tmp_path/'cut').items() if not k.endswith('.partial')}
    assert len(slices_in(tmp_path/'cut'))==15 and a==b
    for f in find_npz(npz): EmbeddingStore(tmp_path/'cut').open_case(read_npz(f))

@pytest.mark.slow
def test_embedding_with_the_real_encoder_killed_once(tmp_path):
    code = "import sys; from medsam_nb.embed import medsam_embed; medsam_embed(sys.argv[1], sys.argv[2], device='cpu')"
    npz = hospital(tmp_path, ['a','b','c'], scans=dict(shape=(1,64,80)))
    kill_when(code, lambda: len(slices_in(tmp_path/'cut'))>=1, npz, tmp_path/'cut')
    assert 1<=len(slices_in(tmp_path/'cut'))<3
    for d in ('cut','whole'): embed(npz, tmp_path/d, model=lite(), device='cpu')
    assert tree(tmp_path/'whole')==tree(tmp_path/'cut') and len(slices_in(tmp_path/'cut'))==3


# ---- fine-tuning ----
TUNE = '''
import sys
from medsam_nb.finetune import finetune
finetune(sys.argv[1], sys.argv[2], sys.argv[3], device='cpu', epochs=3, batch_size=1, lr=3e-4)
'''
@pytest.fixture(scope='module')
def data(tmp_path_factory):
    tmp = tmp_path_factory.mktemp('h')
    npz = hospital(tmp, ['a','b','c','d'], test_fraction=0, scans=dict(shape=(2,64,80)))
    return npz, fill(npz, tmp/'s').path

@pytest.fixture(scope='module')
def whole(data, tmp_path_factory):
    run = tmp_path_factory.mktemp('w')/'run'
    again(data, run)
    return run

def same_run(a, b):
    return (a/'log.csv').read_text()==(b/'log.csv').read_text() and same_state(state_of(a/'best.pth'),
        state_of(b/'best.pth'))

def test_fine_tuning_killed_in_an_epoch_and_while_saving(data, whole, tmp_path):
    run = tmp_path/'run'
    # inside epoch 2
    kill_when(TUNE, lambda: (run/'state-00001').exists() and '\n1,' in (run/'log.csv').read_text(), *data, run,
              after=.3)
    assert [p.name for p in run.glob('state-*')]==['state-00001'] and pd.read_csv(run/'log.csv').epoch.tolist()==[0,1]
    # while state-00002 is being written
    kill_when(TUNE, lambda: list(run.glob('.*.tmp/state-00002/*')), *data, run)
    assert [p.name for p in run.glob('state-*')]==['state-00001'] and leftovers(run)
    python(TUNE, *data, run, threads=1)
    assert pd.read_csv(run/'log.csv').epoch.tolist()==[0,1,2,3] and same_run(run, whole) and not leftovers(run)
    assert [p.name for p in run.glob('state-*')]==['state-00003']

def again(data, run, **kw):
    return finetune(*data, run, device='cpu', **(dict(epochs=3, batch_size=1, lr=3e-4)|kw))

def test_killed_between_state_and_log(data, whole, tmp_path):
    run = shutil.copytree(whole, tmp_path/'run')
    log = (run/'log.csv').read_text()
    (run/'log.csv').write_text(''.join(log.splitlines(True)[:-1]))
    again(data, run)
    assert (run/'log.csv').read_text()==log
    (run/'log.csv').unlink()
    again(data, run)
    assert (run/'log.csv').read_text()==log

def test_killed_between_best_and_state(data, whole, tmp_path):
    "best.pth is of an epoch that the state does not know yet: the epoch is done again and ends the same"
    run = tmp_path/'run'
    again(data, run, epochs=1)
    shutil.copy(whole/'best.pth', run/'best.pth')
    again(data, run)
    assert same_run(run, whole)

def test_a_half_written_state_is_ignored_and_removed(data, whole, tmp_path):
    run = shutil.copytree(whole, tmp_path/'run')
    (run/'.k7x.tmp'/'state-00009').mkdir(parents=True)
    (run/'.k7x.tmp'/'state-00009'/'progress.json').write_text('{')
    assert again(data, run).log.epoch.tolist()==[0,1,2,3] and same_run(run, whole) and not leftovers(run)

def test_killed_before_the_first_file_was_there(data, tmp_path):
    run = tmp_path/'run'
    (run/'.a1.tmp').mkdir(parents=True)
    (run/'.a1.tmp'/'config.json').write_text('{"npz"')
    assert len(again(data, run, epochs=1, epoch_samples=1).log)==2 and not leftovers(run)

@pytest.mark.slow
def test_best_is_never_half_written(data, tmp_path):
    "Whenever somebody looks, best.pth is a whole checkpoint"
    run, seen = tmp_path/'run', 0
    p = python(TUNE, *data, run, wait=False, threads=1, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while p.poll() is None:
        if (run/'best.pth').exists():
            state_of(run/'best.pth')
            seen += 1
        time.sleep(.01)
    assert p.returncode==0 and seen>3


# ---- curation ----
def test_adding_cases_killed_in_the_middle(tmp_path):
    "Cases that were there stay usable, in their part; the next run ends like one that was never killed"
    kw = dict(shape=(24,200,200), organs=((9,100,100,40),))
    names = [f'c{i:02d}' for i in range(8)]
    im,lb = raw(tmp_path/'raw', names[:3], **kw)
    for out in ('cut','whole'): curate(im, lb, tmp_path/out, progress=False)
    raw(tmp_path/'raw', names, **kw)
    folder = tmp_path/'cut'/'CT_Abd'
    before = tree(folder)
    code = 'import sys; from medsam_nb.curate import curate; curate(*sys.argv[1:], progress=False)'
    kill_when(code, lambda: list((folder/'.staging').glob('*.npz')), im, lb, tmp_path/'cut')
    assert {k: v for k,v in tree(folder).items() if '.staging' not in k}==before and len(find_npz(folder))==3
    python(code, im, lb, tmp_path/'cut')
    python(code, im, lb, tmp_path/'whole')
    assert not leftovers(folder)
    a, b = (find_npz(tmp_path/d/'CT_Abd') for d in ('cut','whole'))
    assert len(a)==8 and [f.parts[-2:] for f in a]==[f.parts[-2:] for f in b]
    for f,g in zip(a, b):
        assert np.array_equal(read_npz(f).imgs, read_npz(g).imgs) and np.array_equal(read_npz(f).gts,
            read_npz(g).gts) and np.array_equal(read_npz(f).labels, read_npz(g).labels)
    pd.testing.assert_frame_equal(read_split(a[0].parents[1]), read_split(b[0].parents[1]))


# ---- bad files through the chain ----
def test_a_folder_of_bad_files(tmp_path, capsys):
    kw = dict(shape=(2,64,80))
    im,lb = raw(tmp_path/'raw', ['gut','größe.v2','日本','one','cut','size','float','fraction','empty','nan','flat',
                                 'flatslice'], **kw)
    img,lab = scan(**kw)
    save(lb/'one.nii.gz', scan(zs=(1,), **kw)[1])                                                   # a one-slice organ
    (im/'cut_0000.nii.gz').write_bytes((im/'cut_0000.nii.gz').read_bytes()[:700])
    save(lb/'size.nii.gz', lab[:,:60])
    save(lb/'float.nii.gz', lab.astype(np.float32))
    save(lb/'fraction.nii.gz', lab.astype(np.float32)*.37)
    save(lb/'empty.nii.gz', lab*0)
    save(im/'nan_0000.nii.gz', np.where(lab>0, np.nan, img).astype(np.float32))
    save(im/'flat_0000.nii.gz', img*0+40)
    half = img.copy()
    half[0] = 7
    save(im/'flatslice_0000.nii.gz', half)
    (im/'alone_0000.nii.gz').write_bytes((im/'gut_0000.nii.gz').read_bytes())                       # no partner
    with pytest.warns(UserWarning, match='1 of 25 files have no partner.*alone'):
        res = curate(im, lb, tmp_path/'npz', test_fraction=.4, progress=False)
    t = res.table.set_index('case')
    assert set(res.failed)=={'cut','size','fraction','nan'}
    for case, word in dict(cut='cut_0000.nii.gz', size='size', fraction='whole numbers', nan='NaN').items():
        assert word in res.failed[case]
    assert t.kept.to_dict()=={'gut':2,'größe.v2':2,'日本':2,'one':1,'float':2,'flatslice':1,'cut':0,'size':0,
                              'fraction':0,'empty':0,'nan':0,'flat':0}
    reasons = dict(empty='empty label', flat='constant image', one='no label', flatslice='constant image')
    assert t.reasons[list(reasons)].to_dict()=={case: {why: 1} for case, why in reasons.items()}
    npz, kept = res.folder, {'gut','größe.v2','日本','one','float','flatslice'}
    store = embed(npz, tmp_path/'s.zarr', model=quick(), device='cpu')
    assert set(store.cases)==kept and all(store.open_case(read_npz(f)) for f in find_npz(npz))
    shutil.rmtree(tmp_path/'s.zarr')
    store = fill(npz, tmp_path/'s.zarr')
    run = finetune(npz, store.path, tmp_path/'run', device='cpu', epochs=1, epoch_samples=1)
    ev = evaluate(npz, store.path, run.path, slacks=(0,), device='cpu')
    cfg = json.loads((run.path/'config.json').read_text())
    assert set(ev.scores.case)|set(cfg['train'])|set(cfg['validate'])==kept and ev.scores[['DSC',
        'NSD']].notna().all().all()
    assert not leftovers(tmp_path)

@pytest.mark.parametrize('how', ['nothing pairs','all broken','all empty'])
def test_a_folder_where_nothing_is_usable(tmp_path, how):
    im,lb = raw(tmp_path/'raw', ['a','b'], shape=(1,64,80))
    for f in list(lb.iterdir()):
        if how=='nothing pairs': f.rename(lb/f'x{f.name}')
        elif how=='all broken': f.write_bytes(b'')
        else: save(f, scan(shape=(1,64,80))[1]*0)
    with pytest.raises(InputError, match={'nothing pairs': 'no image pairs with a label: 2 images',
                                          'all broken': 'all 2 cases failed', 'all empty': 'no slice was kept'}[how]):
        curate(im, lb, tmp_path/'npz', progress=False)
    for f in (embed, finetune, lambda n: evaluate(n, run=tmp_path/'run')):
        with pytest.raises(InputError): f(tmp_path/'npz'/'CT_Abd')
    assert not list(tmp_path.rglob('*.npz')) and not list(tmp_path.rglob('*.zarr')) and not (tmp_path/'run').exists()

@pytest.mark.slow
def test_commands_end_in_one_sentence(tmp_path):
    "From a console a mistake is one line on stderr and exit code 2"
    bin_ = Path(sys.executable).parent
    if not (bin_/'medsam_predict').exists():
        pytest.skip('the package is not installed, so there are no commands')
    (tmp_path/'x.nii.gz').write_bytes(b'nothing')
    jobs = {'medsam_finetune': ['nowhere'], 'medsam_predict': ['x.nii.gz','out.nii.gz','--boxes','b.csv']}
    ps = {c: subprocess.Popen([bin_/c, *a], cwd=tmp_path,
                              env=dict(os.environ, MEDSAM_NB_HOME=str(tmp_path), PYTHONWARNINGS='ignore',
                                       OMP_NUM_THREADS='1'), text=True, stdout=subprocess.PIPE,
                                       stderr=subprocess.PIPE) for c,a in jobs.items()}
    for c,p in ps.items():
        out, err = p.communicate()
        assert p.returncode==2 and err.startswith(f'{c}: ') and err.count('\n')==1, (c, out, err)
    assert {p.name for p in tmp_path.iterdir()}=={'x.nii.gz'}
