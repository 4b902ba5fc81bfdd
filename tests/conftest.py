"What every test shares: a home outside the repository, few threads, an order for two workers, reasons to skip"
import os, shutil, tempfile
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parents[1]
THREADS = 'OMP_NUM_THREADS', 'MKL_NUM_THREADS', 'ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS'
LONGEST = ['btcv', 'JupyterLab', 'Notebook 7', 'test_real.py', 'test_docs.py', 'test_lab.py', 'test_finetune.py']
_home = None

def pytest_configure(config):
    "Set the environment before anything imports torch: nothing is written into the repository, and threads are few"
    global _home
    _home = tempfile.mkdtemp(prefix='medsam_nb-tests-')
    os.environ.update(MEDSAM_NB_HOME=_home, MPLBACKEND='agg')
    several = getattr(config.option, 'numprocesses', None) or os.environ.get('PYTEST_XDIST_WORKER')
    for o in THREADS: os.environ.setdefault(o, '1' if several else '2')

def pytest_unconfigure(config):
    if _home: shutil.rmtree(_home, ignore_errors=True)

def group_of(item)->str:
    "Tests of a group run on one worker, one after another: those of a file, or those that a mark takes out of it"
    mark = item.get_closest_marker('xdist_group')
    return mark.args[0] if mark else item.path.name

def place(item)->int:
    "The longest groups come first, so that several workers end together"
    group = group_of(item)
    return LONGEST.index(group) if group in LONGEST else len(LONGEST)

@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    items.sort(key=place)
    if config.pluginmanager.hasplugin('xdist'):
        for o in items:
            if not o.get_closest_marker('xdist_group'): o.add_marker(pytest.mark.xdist_group(group_of(o)))
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
    if not path.is_dir():
        pytest.skip('no real scans: neither MEDSAM_NB_REAL_DATA nor ../shared/data is a folder')
    return path

@pytest.fixture
def home(tmp_path, monkeypatch)->Path:
    "A home of the test's own, where data/ and work_dir/ of this one test go"
    monkeypatch.setenv('MEDSAM_NB_HOME', str(tmp_path))
    return tmp_path

def on_real_scans(report): return report.when=='call' and 'test_real' in report.nodeid

def pytest_terminal_summary(terminalreporter):
    "Show what the tests on real scans measured, not only that they passed"
    passed = terminalreporter.stats.get('passed', [])
    found = [r.capstdout.strip() for r in passed if on_real_scans(r) and r.capstdout.strip()]
    if not found: return
    terminalreporter.section('measured on real scans')
    terminalreporter.write_line('\n\n'.join(found))
