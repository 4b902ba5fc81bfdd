"Run nbdev_test over every notebook, say how many there were and how long each took; no notebook at all is a failure."
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
    start = time.time()
    n_workers = 0 if len(found) == 1 else a.workers
    try: nbdev_test.__wrapped__(path=path, flags=a.flags, n_workers=n_workers, timing=True)  # exits with 1 when a notebook fails
    finally: shutil.rmtree(home, ignore_errors=True)
    print(f'{len(found)} notebooks tested in {time.time()-start:.0f} s')

if __name__ == '__main__': main()
