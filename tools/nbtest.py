"""Run nbdev_test over every notebook, say how many there were and how long each took; no notebook at all is a failure. A translation is not run a
second time, and that is said; a notebook that is skipped for any other reason is a failure."""
import argparse, os, shutil, sys, tempfile, time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('path', nargs='?', help='one notebook or a folder; all of nbs/ by default')
    p.add_argument('--workers', type=int, default=min(2, os.cpu_count() or 1), help='notebooks at a time')
    p.add_argument('--flags', default='', help="cells to run that are skipped by default, such as 'slow cuda'")
    a = p.parse_args()
    path = str(Path(a.path).resolve()) if a.path else None
    os.chdir(ROOT)
    os.environ.setdefault('MPLBACKEND', 'agg')
    os.environ['MEDSAM_NB_HOME'] = home = tempfile.mkdtemp(prefix='medsam_nb-')   # tutorials start from nothing, and the repository stays clean
    from nbdev.doclinks import nbglob
    from nbdev.test import nbdev_test
    found = nbglob(path)
    if not found:
        print(f"No notebook to test: looked for *.ipynb in {path or 'nbs/'}", file=sys.stderr)
        sys.exit(1)
    from notebooks import original, skips
    start = time.time()
    n_workers = 0 if len(found) == 1 else a.workers
    try:
        left = [f'{o.relative_to(ROOT)}: not run, skip_exec: its code is that of {original(o).relative_to(ROOT)} (tests/test_repo.py compares them)' for o in map(Path, found) if skips(o)]
        nbdev_test.__wrapped__(path=path, flags=a.flags, n_workers=n_workers, timing=True)  # exits with 1 when a notebook fails
    except ValueError as e: sys.exit(str(e))
    finally: shutil.rmtree(home, ignore_errors=True)
    for o in left: print(o)
    print(f'{len(found) - len(left)} notebooks tested in {time.time()-start:.0f} s' + (f', {len(left)} not run' if left else ''))

if __name__ == '__main__': main()
