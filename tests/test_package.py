"The package as people get it: sdist and wheel of a clean copy, the wheel in an environment far from the repository"
import os, re, shutil, subprocess, sys, sysconfig, tarfile, venv, zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import pytest
from test_repo import ROOT, copy_tracked, pins

pytestmark = [pytest.mark.slow]
VERSION = pins.settings()['version']

def clean_env():
    "This process's environment without what leads Python back to the repository"
    drop = {'PYTHONPATH', 'PYTHONHOME', 'VIRTUAL_ENV', 'MEDSAM_NB_HOME', 'IN_TEST'}
    return {**{k: v for k, v in os.environ.items() if k not in drop}, 'PIP_DISABLE_PIP_VERSION_CHECK': '1',
            'PIP_NO_INDEX': '1'}

def run(*args, cwd, ok=0):
    r = subprocess.run([str(o) for o in args], cwd=cwd, env=clean_env(), capture_output=True, text=True,
                       stdin=subprocess.DEVNULL)
    assert ok is None or r.returncode==ok, f'{args}: exit {r.returncode}\n{r.stdout[-3000:]}\n{r.stderr[-3000:]}'
    return r

@pytest.fixture(scope='module')
def dist(tmp_path_factory):
    "sdist, and the wheel built from that sdist"
    src = copy_tracked(tmp_path_factory.mktemp('src'))
    run(sys.executable, '-m', 'build', '--no-isolation', '--outdir', src/'dist', src, cwd=src)
    return src/'dist'

@pytest.fixture(scope='module')
def wheel(dist):
    found = list(dist.glob('*.whl'))
    assert len(found)==1
    return found[0]

@pytest.fixture(scope='module')
def python(wheel, tmp_path_factory):
    "Python of a fresh environment with the wheel in it; the dependencies are borrowed from this one"
    top = tmp_path_factory.mktemp('fresh')/'env'
    venv.create(top, with_pip=False)
    exe = top/('Scripts' if os.name=='nt' else 'bin')/'python'
    own = Path(run(exe, '-c', 'import sysconfig; print(sysconfig.get_path("purelib"))', cwd=top).stdout.strip())
    # A .pth line adds the folder at the end of sys.path, and .pth files inside it (the editable install) are not read.
    (own/'borrowed.pth').write_text('\n'.join({sysconfig.get_path('purelib'), sysconfig.get_path('platlib')}) + '\n')
    run(exe, '-m', 'pip', 'install', '--no-deps', '--no-index', '--quiet', '--ignore-installed', wheel, cwd=top)
    return exe

def in_wheel(wheel): return set(zipfile.ZipFile(wheel).namelist())

def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = in_wheel(wheel)
    code = {f'medsam_nb/{o.name}' for o in (ROOT/'medsam_nb').glob('*.py')}
    static = {o.relative_to(ROOT).as_posix() for o in (ROOT/'medsam_nb'/'static').rglob('*') if o.is_file()}
    assert static, 'medsam_nb/static is empty'
    assert {o for o in names if '.dist-info/' not in o}==code | static
    assert any(o.endswith('LICENSE') for o in names)

def test_sdist_can_build(dist):
    found = list(dist.glob('*.tar.gz'))
    assert len(found)==1
    with tarfile.open(found[0]) as t: names = {o.partition('/')[2] for o in t.getnames()}
    assert {'settings.ini', 'setup.py', 'pyproject.toml', 'README.md', 'LICENSE', 'medsam_nb/__init__.py'}<=names
    assert not [o for o in names if o.startswith(('data/', 'work_dir/', 'nbs/', '.venv'))]

def test_wheel_straight_from_the_tree_is_the_same(wheel, tmp_path):
    src = copy_tracked(tmp_path/'src')
    run(sys.executable, '-m', 'build', '--wheel', '--no-isolation', '--outdir', tmp_path/'out', src, cwd=src)
    assert in_wheel(next((tmp_path/'out').glob('*.whl')))==in_wheel(wheel)

def test_metadata(wheel):
    z = zipfile.ZipFile(wheel)
    meta = z.read(f'medsam_nb-{VERSION}.dist-info/METADATA').decode()
    cfg = pins.settings()
    assert f"Requires-Python: >={cfg['min_python']}" in meta
    assert '\n# medsam_nb\n' in meta  # the README is the long description
    base = [o for o in re.findall(r'^Requires-Dist: (.+)$', meta, re.M) if 'extra ==' not in o]
    assert len(base)==len(cfg['requirements'].split())
    assert len(re.findall(r'^Requires-Dist: .*extra == "dev"', meta, re.M))==len(cfg['dev_requirements'].split())
    entry = z.read(f'medsam_nb-{VERSION}.dist-info/entry_points.txt').decode()
    assert '[nbdev]\nmedsam_nb = medsam_nb._modidx:d' in entry
    assert entry.count(' = medsam_nb.')==len(cfg['console_scripts'].split()) + 1

def test_imports_from_the_wheel(python, tmp_path):
    names = sorted(o.stem for o in (ROOT/'medsam_nb').glob('*.py') if o.stem!='__init__')
    code = f'''
import importlib, importlib.resources as r, medsam_nb
print(medsam_nb.__file__)
print(medsam_nb.__version__)
for o in {names!r}: importlib.import_module("medsam_nb." + o)
print(sum(1 for o in r.files("medsam_nb").joinpath("static").iterdir()))'''
    where, version, static = run(python, '-c', code, cwd=tmp_path).stdout.split('\n')[:3]
    assert Path(where).is_relative_to(python.parents[1]) and version==VERSION and int(static)>0
    assert list(tmp_path.iterdir())==[], 'importing wrote files'

def test_every_command_helps(python, tmp_path):
    names = [o.partition('=')[0] for o in pins.settings()['console_scripts'].split()]
    assert len(names)>5
    with ThreadPoolExecutor(2) as pool:
        runs = dict(zip(names, pool.map(lambda o: run(python.parent/o, '--help', cwd=tmp_path), names)))
    for name, r in runs.items():
        assert r.stdout.startswith(f'usage: {name}') and len(r.stdout.splitlines())>4, f'{name}: {r.stdout}'
    assert list(tmp_path.iterdir())==[], 'asking for help wrote files'

def test_a_command_works_outside_the_repository(python, tmp_path):
    run(python.parent/'medsam_phantom', '--out', 'mine', '--n', '1', '--size', '8,64,64', cwd=tmp_path)
    assert {'images', 'labels'}<={o.name for o in (tmp_path/'mine').iterdir()}
    r = run(python.parent/'medsam_curate', 'nowhere', 'nowhere', '--label_id', '9', '--out', 'x', cwd=tmp_path, ok=None)
    assert r.returncode==2 and 'nowhere' in r.stderr and 'Traceback' not in r.stderr, r.stderr

def test_the_first_mask_of_the_readme(python, tmp_path):
    "The Python lines of the README, as they stand there, in the fresh environment and far from the repository"
    text = (ROOT/'README.md').read_text(encoding='utf-8').split('## A first mask')[1].split('\n## ')[0]
    code = '\n'.join(o[4:] for o in text.splitlines() if o.startswith('    '))
    assert 'Predictor' in code and 'make_phantom' in code
    (tmp_path/'first.py').write_text(code + '\nassert found.masks.shape == (1, 256, 256) and 300 < found.masks.sum() '
                                            '< 1500, found\n', encoding='utf-8')
    run(python, 'first.py', cwd=tmp_path)
    assert (tmp_path/'mask.png').stat().st_size>5000
