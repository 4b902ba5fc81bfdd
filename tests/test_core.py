"What would break the flow of chapter 00: every way a download, an archive, a write or a command can go wrong"
import errno, hashlib, os, random, re, stat, subprocess, sys, threading, zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
import numpy as np, pytest, requests, torch
from medsam_nb import core
from medsam_nb.core import *

REPO = Path(__file__).resolve().parents[1]
DATA = np.random.default_rng(0).bytes(300_000)

# --- a real server that can be told to misbehave, by the first part of the path -------------------
class Handler(BaseHTTPRequestHandler):
    def log_message(self, *a): pass
    def do_GET(self):
        mode, rng, body = self.path.split('/')[1], self.headers.get('Range'), self.server.body
        self.server.asked.append((self.path, rng))
        if mode=='login': body = b'<html>log in first</html>'
        if mode=='wrong': body = body[::-1]
        if mode=='missing': return self.send_error(404)
        if rng and mode=='refuses': return self.send_error(416)
        start = int(re.fullmatch(r'bytes=(\d+)-', rng)[1]) if rng and mode!='norange' else 0
        if start>=len(body): return self.send_error(416)
        if rng and mode=='confused': start = 7 # 206, but another range than asked for
        self.send_response(206 if start else 200)
        if start: self.send_header('Content-Range', f'bytes {start}-{len(body)-1}/{len(body)}')
        if mode not in ('nolength', 'cutnolength', 'toolong'):
            self.send_header('Content-Length', str(10**18 if mode=='huge' else len(body)-start))
        self.end_headers()
        out = body[start:]
        if mode in ('cut', 'cutnolength'): out = out[:100_000]
        if mode=='toolong': out += b'more'
        self.wfile.write(out)

@pytest.fixture
def server():
    s = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    s.body, s.asked = DATA, []
    s.url = f'http://127.0.0.1:{s.server_port}'
    threading.Thread(target=s.serve_forever, args=(.01,), daemon=True).start()
    yield s
    s.shutdown()
    s.server_close()

@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.setenv('MEDSAM_NB_HOME', str(tmp_path/'home'))
    # the server is on this machine
    for k in ('http_proxy', 'HTTP_PROXY', 'all_proxy', 'ALL_PROXY'):
        monkeypatch.delenv(k, raising=False)
    return tmp_path/'home'

def thing(server, mode='ok', body=DATA, size='yes', unzip_to=None, alg='sha256', dest='work_dir/SAM/tiny.pth'):
    return Download('tiny', f'{server.url}/{mode}/tiny', dest, len(body) if size else None,
                    f'{alg}:{hashlib.new(alg, body).hexdigest()}', 'made up', unzip_to)

def left(d): return sorted(p.name for p in d.path.parent.iterdir())
def get(d, **kw): return fetch(d, progress=False, **kw)

# --- fetch ----------------------------------------------------------------------------------------
def test_fetch_and_reuse(server, capsys):
    d = thing(server)
    assert get(d)==d.path and d.path.read_bytes()==DATA and left(d)==['tiny.pth']
    assert 'licence: made up' in capsys.readouterr().out
    server.shutdown()
    assert get(d, url='http://127.0.0.1:1/nobody')==d.path # no network for a good file
    assert len(server.asked)==1

def test_permissions_are_ordinary(server):
    old = os.umask(0o022)
    try: assert stat.S_IMODE(get(thing(server)).stat().st_mode)==0o644
    finally: os.umask(old)

def test_progress_bar(server, capsys):
    fetch(thing(server))
    assert '300k/300k' in capsys.readouterr().err

def test_md5_and_no_size(server):
    assert get(thing(server, size=None, alg='md5')).read_bytes()==DATA

@pytest.mark.parametrize('size', ['yes', None])
def test_truncated_is_refused_kept_and_resumed(server, size):
    d = thing(server, 'cut', size=size)
    with pytest.raises(InputError, match=r'tiny: 300,000 bytes expected, (\d+),(\d+) arrived.*call again'):
        get(d)
    assert not d.path.exists() and left(d)==['tiny.pth.part']
    n = d.path.with_name('tiny.pth.part').stat().st_size
    assert 80_000<n<=100_000 and d.path.with_name('tiny.pth.part').read_bytes()==DATA[:n]
    assert get(d, url=f'{server.url}/ok/tiny').read_bytes()==DATA
    assert server.asked[-1]==('/ok/tiny', f'bytes={n}-') and left(d)==['tiny.pth']

def test_cut_until_done(server):
    d = thing(server, 'cut')
    for i in range(10):
        try: get(d)
        except InputError: continue
        break
    assert d.path.read_bytes()==DATA and 2<=i<=4

@pytest.mark.parametrize('mode', ['norange', 'refuses', 'confused'])
def test_server_that_cannot_resume_starts_over(server, mode):
    d = thing(server, mode)
    part = d.path.with_name('tiny.pth.part')
    part.parent.mkdir(parents=True)
    part.write_bytes(DATA[:1234])
    assert get(d).read_bytes()==DATA and left(d)==['tiny.pth']
    assert server.asked[0][1]=='bytes=1234-'
    assert len(server.asked)==(1 if mode=='norange' else 2)

def test_finished_part_needs_no_network(server):
    d = thing(server)
    d.path.parent.mkdir(parents=True)
    d.path.with_name('tiny.pth.part').write_bytes(DATA)
    assert get(d).read_bytes()==DATA and server.asked==[]

def test_part_longer_than_the_file_starts_over(server):
    d = thing(server)
    d.path.parent.mkdir(parents=True)
    d.path.with_name('tiny.pth.part').write_bytes(DATA+b'x')
    assert get(d).read_bytes()==DATA and server.asked==[('/ok/tiny', None)]

def test_part_of_another_file_heals_at_the_second_call(server):
    d = thing(server)
    d.path.parent.mkdir(parents=True)
    d.path.with_name('tiny.pth.part').write_bytes(b'?'*5000)
    with pytest.raises(InputError, match='expected .* but got .*deleted: call again'): get(d)
    assert left(d)==[]
    assert get(d).read_bytes()==DATA

def test_wrong_bytes(server):
    d = thing(server, 'wrong')
    with pytest.raises(InputError) as e: get(d)
    assert hashlib.sha256(DATA).hexdigest() in str(e.value) and hashlib.sha256(DATA[::-1]).hexdigest() in str(e.value)
    assert left(d)==[]

@pytest.mark.parametrize('mode,size,match', [
    ('login', 'yes', 'the server offers 25: this is another file'), ('login', None, 'but got'),
    ('missing', 'yes', 'answered 404.*bring the file to work_dir/SAM/tiny.pth yourself'),
    ('cutnolength', 'yes', '300,000 bytes expected, 100,000 arrived'), ('cutnolength', None, 'but got'),
    ('toolong', 'yes', 'but got')])
def test_refusals_leave_nothing_at_the_place(server, mode, size, match):
    d = thing(server, mode, size=size)
    with pytest.raises(InputError, match=match) as e: get(d)
    assert '\n' not in str(e.value) and not d.path.exists()
    assert left(d) in ([], ['tiny.pth.part']) and (left(d)==[])==(mode!='cutnolength' or size is None)
    assert get(d, url=f'{server.url}/ok/tiny').read_bytes()==DATA

def test_no_length_is_fine(server): assert get(thing(server, 'nolength')).read_bytes()==DATA

def test_no_server():
    d = Download('tiny', 'http://127.0.0.1:1/x', 'x', 5, 'md5:0', 'none')
    with pytest.raises(InputError, match='could not be reached.*bring the file to x yourself'): get(d)

@pytest.mark.parametrize('url', ['ftp://127.0.0.1/x', 'no address', 'http://'])
def test_bad_address(server, url):
    with pytest.raises(InputError, match='could not be reached'): get(thing(server), url=url)

def test_wrong_file_is_not_touched_unasked(server):
    d = thing(server)
    d.path.parent.mkdir(parents=True)
    d.path.write_bytes(b'mine')
    with pytest.raises(InputError, match='move it away, or ask for overwrite'): get(d)
    assert d.path.read_bytes()==b'mine' and server.asked==[]
    with pytest.raises(InputError, match='arrived'): get(d, url=f'{server.url}/cut/tiny', overwrite=True)
    assert d.path.read_bytes()==b'mine' # a failed overwrite keeps the old file
    assert get(d, overwrite=True).read_bytes()==DATA

def test_no_room(server):
    d = Download('tiny', f'{server.url}/ok/tiny', 'x', None, 'md5:0', 'none')
    with pytest.raises(InputError, match='make room, or set MEDSAM_NB_HOME'):
        core._check_space(REPO, 10**18, 'tiny')
    with pytest.raises(InputError, match='tiny needs 1,000,000,000.0 GB'):
        get(d, url=f'{server.url}/huge/tiny')
    assert left(d)==[]

def test_unknown_name():
    with pytest.raises(InputError, match="'sam' is not known: choose one of .*sam_vit_b"): fetch('sam')

def test_a_full_disk_in_the_middle_leaves_no_file(server, here):
    "The write itself fails: a limit on file size stands for the full disk, the error is a real OSError"
    code = f'''
import resource; from medsam_nb.core import *
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try: fetch(Download('tiny', {server.url+'/ok/tiny'!r}, 'd/tiny', 300_000, 'sha256:{hashlib.sha256(DATA).hexdigest()}', 'x'), progress=False)
except OSError as e: print('OSError')
try:
    with atomic_path('{here}/a/b.bin') as p: p.write_bytes(bytes(60_000))
except OSError as e: print('OSError')
'''
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=REPO)
    assert r.stdout.count('OSError')==2, r.stderr
    assert [p.name for p in (here/'d').iterdir()]==['tiny.part'] and list((here/'a').iterdir())==[]

def test_registry():
    assert set(REGISTRY)=={'sam_vit_b', 'sam_vit_l', 'sam_vit_h', 'medsam_vit_b', 'flare22'}
    for k,d in REGISTRY.items():
        alg,h = d.hash.split(':')
        assert d.name==k
        assert d.url.startswith('https://')
        assert (re.fullmatch('[0-9a-f]{%d}'%dict(sha256=64, md5=32)[alg],
            h))
        assert d.licence
    assert [REGISTRY[f'sam_vit_{k}'].size for k in 'blh']==[375042383, 1249524607, 2564550879]
    assert all(s in REGISTRY['flare22'].licence for s in ('CC BY 4.0', 'CC BY-NC-SA 4.0', 'research only'))

# --- archives -------------------------------------------------------------------------------------
def zipped(path, files, link=None, **kw):
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as zf:
        for n,c in files.items(): zf.writestr(n, c)
        if link:
            i = zipfile.ZipInfo(link)
            i.create_system = 3
            i.external_attr = (stat.S_IFLNK|0o777)<<16
            zf.writestr(i, '/etc/passwd')
    return path.read_bytes()

def archive(server, tmp_path, files, **kw):
    server.body = zipped(tmp_path/'made.zip', files, **kw)
    return thing(server, body=server.body, dest='data/FLARE22Train.zip', unzip_to='data/FLARE22Train')

def tree(p): return sorted(q.relative_to(p).as_posix() for q in p.rglob('*') if q.is_file())

@pytest.mark.parametrize('prefix', ['', 'FLARE22Train/', 'FLARE22Train/FLARE22Train/', 'FLARE22Train\\'])
def test_unzip_flattens(server, tmp_path, prefix):
    files = {prefix+'images/FLARE22_Tr_0001_0000.nii.gz':b'1', prefix+'labels/FLARE22_Tr_0001.nii.gz':b'2',
             '__MACOSX/x':b'3', prefix+'.DS_Store':b'4'}
    p = get(archive(server, tmp_path, files))
    assert p==data_dir('FLARE22Train') and tree(p)==['images/FLARE22_Tr_0001_0000.nii.gz',
                                                     'labels/FLARE22_Tr_0001.nii.gz']
    assert sorted(q.name for q in p.parent.iterdir())==['FLARE22Train', 'FLARE22Train.zip']

def test_a_single_folder_of_another_name_stays(server, tmp_path):
    assert tree(get(archive(server, tmp_path, {'images/a':b'1', 'images/b':b'2'})))==['images/a', 'images/b']

@pytest.mark.parametrize('name', ['../evil', 'a/../../evil', '/tmp/evil', 'C:\\evil', 'C:/evil', '..\\evil', '\\evil',
                                  'FLARE22Train/../../evil'])
def test_zip_slip(server, tmp_path, here, name):
    d = archive(server, tmp_path, {'FLARE22Train/good':b'1', name:b'evil'})
    with pytest.raises(InputError, match='do not trust this archive'): get(d)
    assert left(d)==['FLARE22Train.zip'] and not list(tmp_path.rglob('*evil*'))

def test_zip_link(server, tmp_path):
    d = archive(server, tmp_path, {'good':b'1'}, link='passwd')
    with pytest.raises(InputError, match="'passwd', which is a link"): get(d)
    assert left(d)==['FLARE22Train.zip']

def test_folder_in_place_is_left_alone(server, tmp_path):
    d = archive(server, tmp_path, {'a':b'new'})
    mine = data_dir('FLARE22Train')
    mine.mkdir(parents=True)
    (mine/'mine').write_bytes(b'x')
    assert get(d)==mine and tree(mine)==['mine'] and server.asked==[]
    assert tree(get(d, overwrite=True))==['a']
    assert len(server.asked)==1
    assert tree(get(d, overwrite=True))==['a'] and len(server.asked)==1 # the good zip is not fetched again

def test_empty_folder_is_filled(server, tmp_path):
    d = archive(server, tmp_path, {'a':b'new'})
    data_dir('FLARE22Train').mkdir(parents=True)
    assert tree(get(d))==['a']

@pytest.mark.parametrize('body,match', [(b'no zip at all', 'cannot be unpacked'), (None, 'cannot be unpacked'),
                                        ('empty', 'holds no files')])
def test_damaged_archive(server, tmp_path, body, match):
    d = archive(server, tmp_path, {'a':bytes(1000), 'b':os.urandom(1000)} if body!='empty' else {'__MACOSX/x':b''})
    if body!='empty': server.body = body or server.body.replace(server.body[200:210], b'0123456789', 1)
    d = thing(server, body=server.body, dest=d.dest, unzip_to=d.unzip_to)
    with pytest.raises(InputError, match=match): get(d)
    assert left(d)==['FLARE22Train.zip']

# --- writing --------------------------------------------------------------------------------------
@pytest.mark.parametrize('name', ['a.nii.gz', 'ü n.1.2.npz', 'x', 'n'*240+'.npz'])
def test_atomic_file(tmp_path, name):
    with atomic_path(tmp_path/'new'/name) as p:
        assert p.name==name and not list((tmp_path/'new').glob('*.npz'))
        p.write_text('1')
    with atomic_path(tmp_path/'new'/name) as p: p.write_text('2')
    assert [(q.name, q.read_text()) for q in (tmp_path/'new').iterdir()]==[(name, '2')]

@pytest.mark.parametrize('kind', ['file', 'folder'])
@pytest.mark.parametrize('exc', [KeyboardInterrupt, OSError(errno.ENOSPC, 'full'), SystemExit])
def test_atomic_failure_keeps_the_old(tmp_path, kind, exc):
    target = tmp_path/'t'
    def make(p, text):
        if kind=='folder':
            p.mkdir()
            p = p/'inside'
        p.write_text(text)
    with atomic_path(target) as p: make(p, 'old')
    with pytest.raises(BaseException):
        with atomic_path(target) as p:
            make(p, 'new')
            raise exc
    assert (target/'inside' if kind=='folder' else target).read_text()=='old' and os.listdir(tmp_path)==['t']
    with atomic_path(target) as p: make(p, 'new')
    assert (target/'inside' if kind=='folder' else target).read_text()=='new' and os.listdir(tmp_path)==['t']

def test_atomic_no_overwrite(tmp_path):
    t = tmp_path/'t'
    t.write_text('old')
    with pytest.raises(InputError, match='exists already'):
        with atomic_path(t, overwrite=False): pytest.fail('the block must not start')
    t.unlink()
    with pytest.raises(InputError, match='exists already'):
        with atomic_path(t, overwrite=False) as p:
            # somebody was faster
            p.write_text('mine')
            t.write_text('theirs')
    assert t.read_text()=='theirs' and os.listdir(tmp_path)==['t']

def test_atomic_slips(tmp_path):
    with pytest.raises(FileNotFoundError, match='nothing was written'):
        with atomic_path(tmp_path/'t'): pass
    (tmp_path/'folder').mkdir()
    (tmp_path/'folder'/'precious').touch()
    with pytest.raises(InputError, match='is a folder'):
        with atomic_path(tmp_path/'folder') as p: p.write_text('file')
    assert os.listdir(tmp_path)==['folder'] and os.listdir(tmp_path/'folder')==['precious']

def test_killed_process_leaves_no_target(tmp_path):
    code = ('import os,signal\nfrom medsam_nb.core import *\n'
            f'with atomic_path("{tmp_path}/t.npz") as p:\n'
            '    p.write_text("half")\n    os.kill(os.getpid(), signal.SIGKILL)')
    assert subprocess.run([sys.executable, '-c', code], cwd=REPO).returncode==-9
    assert not (tmp_path/'t.npz').exists() and not list(tmp_path.glob('*.npz'))
    assert [p.suffix for p in tmp_path.iterdir()]==['.tmp'] # what .gitignore hides

# --- small tools ----------------------------------------------------------------------------------
def test_home(tmp_path, monkeypatch):
    assert home()==tmp_path/'home' and data_dir('a','b')==tmp_path/'home/data/a/b'
    monkeypatch.delenv('MEDSAM_NB_HOME')
    (tmp_path/'repo/nbs/howto').mkdir(parents=True)
    (tmp_path/'repo/settings.ini').touch()
    for sub,want in (('repo/nbs/howto', 'repo'), ('repo', 'repo'), ('', '')):
        monkeypatch.chdir(tmp_path/sub)
        assert home()==tmp_path/want
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('MEDSAM_NB_HOME', 'rel')
    assert home()==tmp_path/'rel'
    monkeypatch.setenv('MEDSAM_NB_HOME', '')
    assert home()==tmp_path

def test_pick_device():
    assert pick_device('cpu')==torch.device('cpu')==pick_device(torch.device('cpu'))
    want = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    assert pick_device().type==want
    for bad in ('cuda:99', 'gpu', 'mps:5', 'meta', 3.5, ''):
        with pytest.raises(InputError, match='use one of'): pick_device(bad)

def test_seed_everything():
    def draw(): return random.random(), np.random.rand(), torch.rand(3).tolist()
    seed_everything(1)
    a = draw()
    seed_everything(2)
    b = draw()
    seed_everything(1)
    assert draw()==a!=b
    for bad in (-1, 2**32):
        with pytest.raises(InputError): seed_everything(bad)

def test_hashes(tmp_path):
    (tmp_path/'f').write_bytes(DATA*10)
    assert sha256_file(tmp_path/'f')==hashlib.sha256(DATA*10).hexdigest()
    x = np.arange(24, dtype=np.float32).reshape(2,3,4)
    assert sha256_array(x[:,::2])==sha256_array(x[:,::2].copy())
    assert sha256_array(x)==sha256_array(np.asfortranarray(x))==sha256_array(x.astype('>f4'))
    assert len({sha256_array(o) for o in (x, x[0], x.T, x.astype(np.float64), np.float32(3), np.float32([3]))})==6
    with pytest.raises(InputError): sha256_array(np.array([None, 'x']))

def test_light_import():
    "`medsam_fetch --help` must answer without loading torch"
    code = 'import sys, medsam_nb.core; sys.exit("torch" in sys.modules)'
    assert subprocess.run([sys.executable, '-c', code], cwd=REPO).returncode==0

# --- commands, through real console scripts -------------------------------------------------------
MODULE = '''
from medsam_nb.core import command, InputError
@command
def medsam_toy(
    n:int, # a number to print
    word:str='x', # a word beside it
    shout:bool=False, # in capitals?
):
    "Print a number"
    if n<0: raise InputError(f"n is {n}:\\n  give a number from 0 on")
    if n==99: raise KeyboardInterrupt
    if n==98: raise ZeroDivisionError('a bug')
    print(n, word.upper() if shout else word)
    return n
@command
def medsam_outer(n:int=3): # a number
    "Call the other command"
    assert medsam_toy(n)==n
    try: medsam_toy(-1)
    except InputError: print('caught')
'''
@pytest.fixture
def toy(tmp_path, here):
    "The scripts as pip writes them"
    maker = pytest.importorskip('pip._vendor.distlib.scripts').ScriptMaker(None, str(tmp_path/'bin'))
    maker.executable, maker.variants, maker.set_mode = sys.executable, {''}, True
    (tmp_path/'bin').mkdir()
    (tmp_path/'toy_module.py').write_text(MODULE)
    maker.make('medsam_toy = toy_module:medsam_toy')
    maker.make('medsam_outer = toy_module:medsam_outer')
    maker.make('medsam_fetch = medsam_nb.core:medsam_fetch')
    env = {**os.environ, 'PYTHONPATH':f'{tmp_path}{os.pathsep}{REPO}'}
    return lambda name, *a: subprocess.run([str(tmp_path/'bin'/name), *a], capture_output=True, text=True, env=env,
                                           cwd=tmp_path)

def test_console(toy):
    r = toy('medsam_toy', '5', '--word', 'hey', '--shout')
    assert (r.returncode, r.stdout, r.stderr)==(0, '5 HEY\n', '')
    r = toy('medsam_toy', '--help')
    assert r.returncode==0
    assert r.stdout.startswith('usage: medsam_toy')
    assert 'a word beside it' in r.stdout
    assert 'Print a number' in r.stdout
    assert toy('medsam_toy').returncode==2 and 'required: n' in toy('medsam_toy').stderr
    assert toy('medsam_toy', 'five').returncode==2

def test_console_errors(toy):
    r = toy('medsam_toy', '--', '-1')
    assert (r.returncode, r.stdout, r.stderr)==(2, '', 'medsam_toy: n is -1: give a number from 0 on\n')
    r = toy('medsam_toy', '99')
    assert (r.returncode, r.stderr)==(130, '')
    r = toy('medsam_toy', '98')
    assert r.returncode==1 and 'Traceback' in r.stderr and 'a bug' in r.stderr # a bug stays a bug

def test_console_that_calls_another(toy):
    r = toy('medsam_outer', '--n', '4')
    assert (r.returncode, r.stdout)==(0, '4 x\ncaught\n'), r.stderr

def test_command_called_from_a_script_is_a_function(toy, tmp_path):
    (tmp_path/'train.py').write_text('from toy_module import *\nmedsam_outer()\ntry: medsam_toy(-1)\nexcept '
                                     'InputError as e: print("raised")')
    r = subprocess.run([sys.executable, 'train.py', '--epochs', '3'], capture_output=True, text=True, cwd=tmp_path,
                       env={**os.environ, 'PYTHONPATH':f'{tmp_path}{os.pathsep}{REPO}'})
    assert (r.returncode, r.stdout)==(0, '3 x\ncaught\nraised\n'), r.stderr

def test_medsam_fetch_console(toy, server, here):
    r = toy('medsam_fetch')
    assert r.returncode==0 and all(n in r.stdout for n in REGISTRY) and 'CC BY-NC-SA' in r.stdout
    r = toy('medsam_fetch', 'sam_vit_xxl')
    assert r.returncode==2
    assert r.stderr.startswith("medsam_fetch: 'sam_vit_xxl' is not known")
    assert r.stderr.count('\n')==1
    r = toy('medsam_fetch', 'sam_vit_b', '--url', f'{server.url}/ok/tiny')
    assert r.returncode==2
    assert r.stderr.count('\n')==1
    assert '375,042,383 bytes expected, the server offers 300,000' in r.stderr
    assert 'licence: Apache 2.0' in r.stdout and not REGISTRY['sam_vit_b'].path.exists()
    r = toy('medsam_fetch', 'sam_vit_b', 'sam_vit_l', '--url', 'http://x')
    assert r.returncode==2 and 'exactly one name' in r.stderr

def test_installed_command():
    exe = Path(sys.executable).with_name('medsam_fetch')
    if not exe.exists(): pytest.skip('the package is not installed in this environment')
    r = subprocess.run([str(exe), '--help'], capture_output=True, text=True)
    assert r.returncode==0 and 'usage: medsam_fetch' in r.stdout
