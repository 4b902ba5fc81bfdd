"Commands as people type them, each in a process of its own, forked from one that has paid for the imports"
import json, os, subprocess, sys, tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MODULES = dict(
    medsam_curate='curate', medsam_embed='embed', medsam_finetune='finetune', medsam_evaluate='evaluate',
    medsam_predict='segment', medsam_fetch='core', medsam_doctor='doctor', pre_CT='pre_CT',
    pre_grey_rgb2D='pre_grey_rgb2D')

FORKS = '''
import importlib, json, os, resource, sys, traceback, warnings
warnings.simplefilter('ignore')
from medsam_nb import core, curate, doctor, embed, evaluate, finetune, pre_CT, pre_grey_rgb2D, segment
import torch, zarr, timm, PIL.PngImagePlugin, skimage.transform, encodings.idna
from medsam_nb.sam import build_model
build_model('lite')

def redirect(fd, path): os.dup2(os.open(path, os.O_CREAT|os.O_WRONLY|os.O_TRUNC, 0o666), fd)

def become_nobody():
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)

def run(job):
    os.chdir(job['dir'])
    os.environ['MEDSAM_NB_HOME'] = job['dir']
    torch.set_num_threads(1)
    redirect(1, job['say']+'.out')
    redirect(2, job['say']+'.err')
    if job['limit']: resource.setrlimit(resource.RLIMIT_FSIZE, (job['limit'], job['limit']))
    if job['nobody'] and os.getuid()==0: become_nobody()
    sys.argv = job['argv']
    command = getattr(importlib.import_module(job['module']), job['argv'][0])
    try: command()
    except SystemExit as e: return e.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0

def fork(job):
    pid = os.fork()
    if pid: return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    code = 99
    try: code = run(job)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

for line in sys.stdin: print(json.dumps(fork(json.loads(line))), flush=True)
'''

@dataclass
class Said:
    "How a command ended, and what it printed"
    code:int
    out:str
    err:str

class Terminal:
    "One process that forks for every command; `with Terminal() as t: t.run(folder, 'medsam_curate', …)`"
    def __enter__(self):
        self.tmp = tempfile.TemporaryDirectory(prefix='said-')
        Path(self.tmp.name).chmod(0o777)
        env = dict(os.environ, PYTHONWARNINGS='ignore', OMP_NUM_THREADS='1', MKL_NUM_THREADS='1')
        self.process = subprocess.Popen(
            [sys.executable, '-c', FORKS], cwd=ROOT, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        return self
    def __exit__(self, *args):
        self.process.communicate()
        self.tmp.cleanup()
    def run(self, folder, command, *args, limit=0, nobody=False)->Said:
        "Run one command in `folder`; `limit` is the largest file it may write, `nobody` takes the rights of root away"
        say = f'{self.tmp.name}/said'
        argv = [command, *map(str, args)]
        job = dict(dir=str(folder), argv=argv, module='medsam_nb.'+MODULES[command], say=say, limit=limit,
                   nobody=nobody)
        self.process.stdin.write(json.dumps(job)+'\n')
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, 'the process that forks has ended'
        return Said(int(answer), *(Path(say+o).read_text(encoding='utf-8') for o in ('.out', '.err')))
