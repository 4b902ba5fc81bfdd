"`make demo` itself, small: the README's first command, on a copy of the tree, with the environment this test runs in"
import os, shutil, subprocess, sys
from pathlib import Path
import pandas as pd, pytest

ROOT = Path(__file__).resolve().parents[1]
VENV = Path(sys.prefix)

@pytest.fixture(scope='module')
def checkout(tmp_path_factory):
    "Makefile, settings and an empty data/ in a fresh folder that shares this environment"
    if not (VENV/'.made').exists(): pytest.skip('not run from an environment that `make env` made')
    d = tmp_path_factory.mktemp('checkout')
    for f in ('Makefile', 'settings.ini', 'setup.py', 'constraints.txt'): shutil.copy2(ROOT/f, d/f)
    (d/'nbs').mkdir()
    (d/'.venv').symlink_to(VENV)
    return d

def make(checkout, *args):
    env = {k: v for k, v in os.environ.items() if k not in ('MEDSAM_NB_HOME', 'MAKEFLAGS', 'MAKELEVEL')}
    return subprocess.run(['make', *args], cwd=checkout, env=env, capture_output=True, text=True, timeout=1500)

def test_demo_runs_the_chain_and_runs_again(checkout):
    small = ['demo', 'N=5', 'SIZE=6,128,128', 'EPOCHS=1', 'MAKEFLAGS=']
    r = make(checkout, *small)
    assert r.returncode==0, r.stdout[-2000:]+r.stderr[-2000:]
    run = checkout/'work_dir'/'demo'
    assert {'config.json', 'log.csv', 'best.pth', 'boxes.csv', 'eval.csv', 'figure.png', 'curve.png'}<={p.name
        for p in run.iterdir()}
    scores = pd.read_csv(run/'eval.csv')
    assert set(scores.decoder)=={'pretrained', 'fine-tuned'} and scores.DSC.between(0,
        1).all() and scores.NSD.between(0, 1).all()
    assert 'phantom results, oracle boxes' in r.stdout and 'Phantom_' in r.stdout
    before = (run/'eval.csv').read_bytes(), (run/'log.csv').read_bytes(), (run/'best.pth').stat().st_mtime_ns
    r = make(checkout, *small)
    assert r.returncode==0, r.stdout[-2000:]+r.stderr[-2000:]
    # nothing trained twice
    assert before==((run/'eval.csv').read_bytes(), (run/'log.csv').read_bytes(), (run/'best.pth').stat().st_mtime_ns)

def test_demo_takes_other_data(checkout):
    r = make(checkout, '-n', 'demo', 'DATA=data/mine/', 'LABEL=1,3')
    assert r.returncode==0
    assert 'medsam_curate data/mine/images data/mine/labels --label_id 1,3' in r.stdout
    assert 'medsam_phantom' not in r.stdout
    (checkout/'data/FLARE22Train/images').mkdir(parents=True)
    r = make(checkout, '-n', 'demo')
    assert 'medsam_curate data/FLARE22Train/images' in r.stdout and 'medsam_phantom' not in r.stdout
