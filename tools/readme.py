"Write README.md from nbs/index.ipynb, without Quarto; --check only says whether it is up to date"
import argparse, re, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NB = 'nbs/index.ipynb'
HEAD = f'<!-- Written by tools/readme.py from {NB}: edit that, then `make sync`. -->\n\n'

def relink(text:str)->str:
    "Links and pictures relative to nbs/ become relative to the repository's top"
    def f(m):
        pre, url = m[1], m[2]
        if re.match(r'[a-z][a-z0-9+.-]*:|[#/]', url): return m[0]
        return pre + (url[3:] if url.startswith('../') else f'nbs/{url}')
    return re.sub(r'(\]\()([^)\s]+)', f, text)

def build(nb_path:Path)->tuple: # (the text, pictures by file name)
    "The notebook as GitHub Markdown: hidden cells, directives and the front matter left out, stored outputs kept"
    import nbformat
    from nbconvert import MarkdownExporter
    nb, cells = nbformat.read(nb_path, 4), []
    for c in nb.cells:
        flags = re.findall(r'^#\|\s*(\S+)\s*(\S*)', c.source, re.M) if c.cell_type=='code' else []
        names = [o[0] for o in flags]
        if c.cell_type=='raw' or 'hide' in names or ('include:', 'false') in flags: continue
        if ('output:', 'false') in flags: c.outputs = []
        if ('echo:', 'false') in flags: c.source = ''
        elif flags: c.source = re.sub(r'^#\|.*\n?', '', c.source, flags=re.M)
        if c.cell_type=='markdown': c.source = relink(c.source)
        cells.append(c)
    nb.cells = cells
    body, res = MarkdownExporter().from_notebook_node(nb, {'output_files_dir': 'README_files', 'unique_key': 'README'})
    body = re.sub(r'\n{3,}', '\n\n', re.sub(r'[ \t]+$', '', body, flags=re.M)).strip() + '\n'
    return HEAD + body, res.get('outputs', {})

def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--check', action='store_true', help='write nothing; exit with 1 when README.md is out of date')
    a = p.parse_args()
    text, pictures = build(ROOT/NB)
    files = {'README.md': text.encode(), **pictures}
    stale = [o for o, data in files.items() if not (ROOT/o).is_file() or (ROOT/o).read_bytes()!=data]
    if a.check:
        if stale: sys.exit(f"Out of date with {NB}: {' '.join(stale)}. Run `make sync`.")
        return
    for o in stale:
        (ROOT/o).parent.mkdir(exist_ok=True)
        (ROOT/o).write_bytes(files[o])
    print(f"{' '.join(stale)} written" if stale else 'README.md is up to date')

if __name__=='__main__': main()
