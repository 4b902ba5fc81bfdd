"""Run nbdev's test over every notebook, say how many there were and how long each took; none at all is a failure.
A translation is not run again, and that is said; a notebook that is skipped for any other reason is a failure."""
import argparse, os, shutil, sys, tempfile, time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LONGEST = ['flare22_gallbladder', 'images_2d', 'prompt_modes']   # first, so that two workers end together

def place(path:Path)->tuple:
    "Where a notebook stands in the queue: the longest first, the others by name"
    known = LONGEST.index(path.stem) if path.stem in LONGEST else len(LONGEST)
    return known, str(path)

def run(files:list, flags:str, workers:int)->list:
    "`nbdev_test` takes notebooks by name, the tutorials last; this takes them by `place`. Returns [(passed, seconds)]"
    from fastcore.parallel import parallel
    from nbdev.config import get_config
    from nbdev.test import test_nb
    cfg = get_config()
    return list(parallel(test_nb, files, skip_flags=cfg.tst_flags.split(), force_flags=flags.split(),
                         basepath=cfg.config_path, n_workers=workers, pause=.01))

def report(files:list, results:list):
    "Say how long each took, then end with 1 when one failed"
    for f, (passed, seconds) in sorted(zip(files, results),
                                       key=lambda o: -o[1][1]): print(f'{f.name}: {seconds:.0f} secs')
    failed = [f.name for f, (passed, _) in zip(files, results) if not passed]
    if failed: sys.exit('nbdev tests failed on: ' + ', '.join(failed))

def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('path', nargs='?', help='one notebook or a folder; all of nbs/ by default')
    p.add_argument('--workers', type=int, default=min(2, os.cpu_count() or 1), help='notebooks at a time')
    p.add_argument('--flags', default='', help="cells to run that are skipped by default, such as 'slow cuda'")
    a = p.parse_args()
    path = str(Path(a.path).resolve()) if a.path else None
    os.chdir(ROOT)
    os.environ.setdefault('MPLBACKEND', 'agg')
    # tutorials start from nothing, and the repository stays clean
    os.environ['MEDSAM_NB_HOME'] = home = tempfile.mkdtemp(prefix='medsam_nb-')
    from nbdev.doclinks import nbglob
    found = nbglob(path)
    if not found:
        print(f"No notebook to test: looked for *.ipynb in {path or 'nbs/'}", file=sys.stderr)
        sys.exit(1)
    from notebooks import original, skips
    start = time.time()
    n_workers = 0 if len(found)==1 else a.workers
    try:
        left = [f'{o.relative_to(ROOT)}: not run, skip_exec: its code is that of {original(o).relative_to(ROOT)} '
                f'(tests/test_repo.py compares them)' for o in map(Path, found) if skips(o)]
        files = sorted((Path(o).absolute() for o in found), key=place)
        report(files, run(files, a.flags, n_workers))
    except ValueError as e: sys.exit(str(e))
    finally: shutil.rmtree(home, ignore_errors=True)
    for o in left: print(o)
    print(f'{len(found) - len(left)} notebooks tested in {time.time()-start:.0f} s' + (f', {len(left)} not run'
        if left else ''))

if __name__=='__main__': main()
