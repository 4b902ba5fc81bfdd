"""Run notebooks from a fresh kernel, each in its own folder, and store their outputs, cleaned. Cells marked eval: false, slow or cuda keep theirs;
a translation (nbs/ko/) that says `skip_exec: true` under its title is not run, but takes the outputs of its original."""
import argparse, os, re, shutil, sys, tempfile, time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KEEP = re.compile(r'^#\|\s*(eval:\s*false|notest\b|slow\b|cuda\b)', re.M | re.I)
WIDGET = 'application/vnd.jupyter.widget-view+json'
QUIET = re.compile(r'^#\|\s*output:\s*false', re.M)   # housekeeping: nobody sees it, so nobody stores it

def is_progress(out)->bool:
    "Is this output a progress bar, which changes with each run and says nothing afterwards?"
    if out.output_type!='stream' or out.name!='stderr': return False
    return not out.text.strip() or bool(re.search(r'\d+%\|.*\||\d+(it|slice|s)?\s*\[\d\d:\d\d', out.text))

ALT = re.compile(r'^#\|\s*fig-alt:.*\n?', re.M)   # the only line of code that a translation translates

def skips(path:Path)->bool:
    "Does the front matter say skip_exec? Asked of nbdev, whose tests leave such a notebook out without a word"
    from fastcore.basics import str2bool
    from nbdev.frontmatter import FrontmatterProc
    from nbdev.process import NBProcessor
    return str2bool(getattr(NBProcessor(path, procs=FrontmatterProc, process=True).nb, 'frontmatter_',
                            {}).get('skip_exec', False))

def original(path:Path)->Path:
    "The notebook that one in a language's folder (nbs/ko/) translates: the one of the same name outside these folders"
    inside = lambda o: re.fullmatch('[a-z]{2}', o.relative_to(ROOT/'nbs').parts[0])
    found = [o for o in (ROOT/'nbs').rglob(path.name) if '.ipynb_checkpoints' not in o.parts and not inside(o)]
    if not inside(path) or len(found)!=1:
        raise ValueError(f'{path.relative_to(ROOT)} is the translation of no notebook: it has to be run, so take '
                         f'skip_exec out')
    return found[0]

def borrow(path:Path, source:Path):
    "Give a translation the outputs of its original, cell by cell"
    import nbformat
    nb, src = nbformat.read(path, 4), nbformat.read(source, 4)
    mine, theirs = ([c for c in o.cells if c.cell_type=='code'] for o in (nb, src))
    if [ALT.sub('', c.source) for c in mine]!=[ALT.sub('', c.source) for c in theirs]:
        raise ValueError(f'its code differs from that of {source.relative_to(ROOT)}: bring it in step first')
    for a, b in zip(mine, theirs): a.outputs = b.outputs
    nbformat.write(nb, path)

def run(path:Path, force:str='', timeout:int=1800)->float:
    """Execute one notebook and write it back; `force` names flags ('slow', 'cuda') whose cells are run too. Returns
    seconds"""
    import nbformat
    from nbclient import NotebookClient
    start, nb, own = time.time(), nbformat.read(path, 4), {}
    for c in nb.cells:
        if c.cell_type!='code': continue
        m = KEEP.search(c.source)
        if m and m[1].lower() not in force.split():
            own[c.id] = c.metadata.get('tags')
            c.metadata['tags'] = ['skip-execution']
        else: c.outputs = []
    NotebookClient(nb, timeout=timeout, kernel_name='python3', store_widget_state=False,
                   resources={'metadata': {'path': str(path.parent)}}).execute()
    for c in nb.cells:
        c.metadata.pop('execution', None)
        if c.get('outputs'): c.outputs = [o for o in c.outputs if not is_progress(o)]
        if c.cell_type=='code' and QUIET.search(c.source): c.outputs = []
        # a page without a kernel cannot show one
        elif c.cell_type=='code':
            c.outputs = [o for o in c.outputs if WIDGET not in o.get('data', {})]
        if c.id in own:
            c.metadata.pop('tags')
            if own[c.id] is not None: c.metadata['tags'] = own[c.id]
    nbformat.write(nb, path)
    return time.time() - start

def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('paths', nargs='*', type=Path, help='notebooks; all of nbs/ by default')
    p.add_argument('--flags', default='', help="marked cells to run as well: 'slow', 'cuda' or both")
    a = p.parse_args()
    paths = [o.resolve() for o in a.paths] or sorted(o for o in (ROOT/'nbs').rglob('*.ipynb')
                                                     if '.ipynb_checkpoints' not in o.parts)
    if not paths: sys.exit('No notebook to run: looked for *.ipynb in nbs/')
    # what anyone's first run shows
    os.environ.update(IN_TEST='1', PYTHONWARNINGS='ignore', TQDM_DISABLE='1',
                      MEDSAM_NB_HOME=(home := tempfile.mkdtemp(prefix='medsam_nb-')))
    failed, left = [], [o for o in paths if skips(o)]
    # translations last: they take what their originals have just stored
    for o in [*(o for o in paths if o not in left), *left]:
        name = o.relative_to(ROOT)
        try:
            if o in left:
                borrow(o, source := original(o))
                print(f'{name}: not run, skip_exec: its code is that of {source.relative_to(ROOT)}, whose outputs it '
                      f'has taken', flush=True)
            else: print(f'{name}: {run(o, a.flags):.0f} s', flush=True)
        except Exception as e:  # the others still run; nothing of a failing notebook is written
            failed.append(name)
            print(f'{name}: failed\n{e}', file=sys.stderr, flush=True)
    os.environ.pop('IN_TEST')
    shutil.rmtree(home, ignore_errors=True)
    os.chdir(ROOT)
    from nbdev.clean import nbdev_clean
    for o in paths: nbdev_clean.__wrapped__(fname=str(o))
    if failed: sys.exit(f"{len(failed)} of {len(paths)} notebooks failed: {' '.join(map(str, failed))}")
    print(f'{len(paths) - len(left)} notebooks run and stored' + (f', {len(left)} not run' if left else ''))

if __name__=='__main__': main()
