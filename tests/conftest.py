"What every test shares: a home outside the repository, few threads, and the reasons why a test cannot run here."
import os, shutil, tempfile
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parents[1]
_home = None

def pytest_configure(config):
    "Set the environment before anything imports torch: nothing is written into the repository, and two threads are enough, or one for each of several workers"
    global _home
    _home = tempfile.mkdtemp(prefix='medsam_nb-tests-')
    os.environ.update(MEDSAM_NB_HOME=_home, MPLBACKEND='agg')
    for o in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS', 'ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS'): os.environ.setdefault(o, '1' if getattr(config.option, 'numprocesses', None) or os.environ.get('PYTEST_XDIST_WORKER') else '2')

def pytest_unconfigure(config):
    if _home: shutil.rmtree(_home, ignore_errors=True)

def pytest_collection_modifyitems(items):
    items.sort(key=lambda o: not o.path.name.startswith('test_real'))    # the longest files first, so that several workers end together
    marked = [o for o in items if o.get_closest_marker('cuda')]
    if not marked: return
    import torch
    if torch.cuda.is_available(): return
    for o in marked: o.add_marker(pytest.mark.skip(reason='no CUDA device on this machine'))

@pytest.fixture(scope='session')
def root()->Path:
    "The repository's top folder"
    return ROOT

@pytest.fixture(scope='session')
def real_data()->Path:
    "The folder of real scans: MEDSAM_NB_REAL_DATA, else shared/data beside the repository"
    path = Path(os.environ.get('MEDSAM_NB_REAL_DATA', ROOT.parent/'shared'/'data'))
    if not path.is_dir(): pytest.skip('no real scans: neither MEDSAM_NB_REAL_DATA nor ../shared/data is a folder')
    return path

@pytest.fixture
def home(tmp_path, monkeypatch)->Path:
    "A home of the test's own, where data/ and work_dir/ of this one test go"
    monkeypatch.setenv('MEDSAM_NB_HOME', str(tmp_path))
    return tmp_path

def pytest_terminal_summary(terminalreporter):
    "Show what the tests on real scans measured, not only that they passed"
    found = [r.capstdout.strip() for r in terminalreporter.stats.get('passed', []) if r.when == 'call' and 'test_real' in r.nodeid and r.capstdout.strip()]
    if found: terminalreporter.section('measured on real scans'); terminalreporter.write_line('\n\n'.join(found))
