"""Build the documentation site into _docs/ without Quarto: nbdev prepares the notebooks, smalldocs renders them, and the gaps between the two are
mended here. Everything happens in a temporary copy, so the working tree stays as it is. The configuration is Quarto's own, for those who have it."""
import argparse, os, posixpath, re, shutil, sys, tempfile
from html import unescape
from pathlib import Path
from urllib.parse import unquote

ROOT = Path(__file__).resolve().parents[1]
NUMBER = re.compile(r'^\d+[a-zA-Z0-9]*_')  # what nbdev takes off a notebook's name to make the page's

KNOWN = re.compile('output-file is not read|format commonmark is not built|keep-md is ignored')  # seen to here, or Quarto's alone

def page_name(name:str)->str:
    "`04_curate.ipynb` as nbdev names its page's source: `curate.ipynb`"
    return NUMBER.sub('', name.lower())

def copy_tree(dest:Path):
    "Put what a build reads into `dest`"
    skip = shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints', '.last_checked')
    for o in ('nbs', 'medsam_nb'): shutil.copytree(ROOT/o, dest/o, ignore=skip)
    for o in ('settings.ini', 'pyproject.toml'): shutil.copy(ROOT/o, dest)
    with open(dest/'settings.ini', 'a', encoding='utf-8') as f: f.write('\nrenderer = apicard.Card\n')

def split_titles(nbs:Path):
    "nbdev takes the whole first cell for the title and its line; what else the cell says gets a cell of its own"
    from execnb.nbio import mk_cell, read_nb, write_nb
    for path in nbs.rglob('*.ipynb'):
        nb = read_nb(path)
        first = next((o for o in nb.cells if o.cell_type == 'markdown'), None)
        m = first and re.match(r'(#\s+\S.*\n+)(>\s+\S.*\n*)?((?:-\s+\S+:.*\n*)*)', first.source + '\n')
        rest = m and first.source[m.end():].strip()
        if not rest: continue
        first.source = first.source[:m.end()].strip()
        nb.cells.insert(nb.cells.index(first) + 1, mk_cell(rest, 'markdown'))
        write_nb(nb, path)

def prepare()->Path:
    "nbdev's part, run in the copy: configuration, index of symbols, notebooks with API cards; the processed folder comes back"
    import nbdev.doclinks
    from nbdev.quarto import nbdev_sidebar, refresh_quarto_yml
    from nbdev.serve import proc_nbs
    refresh_quarto_yml()
    nbdev.doclinks._build_modidx()
    nbdev_sidebar.__wrapped__()
    # A relative path: nbdev skips every file whose path has a folder that starts with a dot, those above the checkout too.
    return Path(proc_nbs('nbs', n_workers=min(2, os.cpu_count() or 1), force=True))

def mend_source(text:str, folder:str, cfg)->str:
    "Links of one processed Markdown text (in `folder` under nbs/): pages by their new names, files outside nbs/ at the repository"
    def link(m):
        url, tail = re.match(r'([^#]*)(#.*)?$', m[2]).groups()
        if re.match(r'[a-z][a-z0-9+.-]*:|[#/]', m[2]) or not url: return m[0]
        target = posixpath.normpath(posixpath.join('nbs', folder, url))
        if not target.startswith('nbs/'): return f'{m[1]}{cfg.git_url}/blob/{cfg.branch}/{target}{tail or ""}'
        head, name = posixpath.split(url)
        return m[1] + posixpath.join(head, page_name(name) if name.endswith('.ipynb') else name) + (tail or '')
    text = re.sub(r'(\]\()([^)\s]+)', link, text)
    return re.sub(r'^(#+ .*)$', lambda m: re.sub(r'(?<![\\`\w])__(\w+?)__(?![`\w])', r'\_\_\1\_\_', m[0]), text, flags=re.M)

def mend_folder(proc:Path, cfg):
    "Name pages as nbdev's links do, mend links and headings, and leave out widget states, which no static page can show"
    from execnb.nbio import read_nb, write_nb
    for path in sorted(proc.rglob('*.ipynb')):
        nb, folder = read_nb(path), path.relative_to(proc).parent.as_posix()
        nb.metadata.pop('widgets', None)
        for c in nb.cells:
            if c.cell_type == 'markdown' and c.source: c.source = mend_source(c.source, folder, cfg)
            outs = c.get('outputs', [])
            for o in outs:
                md = o.get('data', {}).get('text/markdown')
                if md: o['data']['text/markdown'] = mend_source(md if isinstance(md, str) else ''.join(md), folder, cfg)
            if outs: c['outputs'] = [o for o in outs if 'application/vnd.jupyter.widget-view+json' not in o.get('data', {})]
        write_nb(nb, path)
        new = path.with_name(page_name(path.name))
        if new != path:
            if new.exists(): sys.exit(f'{path.name} and another notebook both make the page {new.stem}.html; rename one.')
            path.rename(new)
    for yml in proc.glob('*.yml'):
        yml.write_text(re.sub(r'[\w-]+\.ipynb', lambda m: page_name(m[0]), yml.read_text(encoding='utf-8')), encoding='utf-8')

def mathml(html:str)->str:
    "TeX as MathML, which browsers draw themselves: no script, no fonts, nothing fetched"
    from latex2mathml.converter import convert
    def f(m): return m[1] + convert(unescape(m[3]), display='block' if m[2] == '[' else 'inline') + m[4]
    html = re.sub(r'(<span class="math (?:inline|display)">)\\([(\[])(.*?)\\[)\]](</span>)', f, html, flags=re.S)
    return re.sub(r'<(?:link|script)\b[^>]*cdn\.jsdelivr\.net/npm/katex[^>]*>(?:</script>)?\s*', '', html)

def mend_site(site:Path, cfg):
    "Relative links instead of the published address, maths drawn without scripts, no web fonts"
    base = cfg.doc_host.rstrip('/') + '/' + cfg.doc_baseurl.strip('/') + '/'
    for page in site.rglob('*.html'):
        up = '../' * (len(page.relative_to(site).parts) - 1)
        html = page.read_text(encoding='utf-8')
        html = re.sub(rf'(<a\b[^>]*\bhref="){re.escape(base)}', lambda m: m[1] + (up or './'), html)
        page.write_text(mathml(html), encoding='utf-8')
    mend_symbols(site)
    for css in site.rglob('*.css'):
        text = css.read_text(encoding='utf-8')
        new = re.sub(r'@import\s+url\((["\']?)https?://[^)]*\1\)\s*;', '', text)
        if new != text: css.write_text(new, encoding='utf-8')

def mend_symbols(site:Path):
    "nbdev links every name it knows; one without a card goes to its class's card, or is no link (a private name)"
    ids = {o.resolve(): set(re.findall(r'\bid="([^"]+)"', o.read_text(encoding='utf-8'))) for o in site.rglob('*.html')}
    def mend(m, page):
        have, frag = ids.get((page.parent/m[2]).resolve() if m[2] else page.resolve()), unquote(m[3])
        if have is None or frag in have: return m[0]
        owner = frag.rpartition('.')[0]
        return f'{m[1]}{m[2]}#{owner}{m[4]}{m[5]}</a>' if owner in have else m[5]
    for page in site.rglob('*.html'):
        html = page.read_text(encoding='utf-8')
        new = re.sub(r'(<a\b[^>]*\bhref=")([^":#?]*)#([^"]+)("[^>]*>)(<code>[^<]*</code>)</a>', lambda m: mend(m, page), html)
        if new != html: page.write_text(new, encoding='utf-8')

def broken_links(site:Path)->list:
    "Links between pages that lead nowhere: (page, link)"
    pages = {o: o.read_text(encoding='utf-8') for o in site.rglob('*.html')}
    ids = {o: set(re.findall(r'\bid="([^"]+)"', t)) for o, t in pages.items()}
    bad = []
    for page, text in pages.items():
        for url in re.findall(r'<(?:a|img|link|script)\b[^>]*?\b(?:href|src)="([^"]*)"', text):
            if re.match(r'[a-z][a-z0-9+.-]*:|//', url) or not url: continue
            path, _, frag = unescape(url).partition('#')
            path = path.split('?')[0]
            to = (page.parent/unquote(path)).resolve() if path else page
            if to.is_dir(): to = to/'index.html'
            if not to.exists() or (frag and to in ids and unquote(frag) not in ids[to]): bad.append((page.relative_to(site).as_posix(), url))
    return sorted(set(bad))

def check(site:Path, proc:Path):
    "Stop when the site is not whole: a page is missing, out of the sidebar, or links to nowhere"
    problems = []
    for nb in proc.rglob('*.ipynb'):
        page = nb.relative_to(proc).with_suffix('.html')
        if not (site/page).is_file(): problems.append(f'{page}: no such page was made')
        elif f'{nb.relative_to(proc).as_posix()}' not in (proc/'sidebar.yml').read_text(): problems.append(f'{page}: not in nbs/sidebar.yml')
    for name in re.findall(r'[\w/-]+\.ipynb', (proc/'sidebar.yml').read_text()):
        if not (proc/name).is_file(): problems.append(f'nbs/sidebar.yml names {name}, which is no notebook')
    problems += [f'{page}: {url} leads nowhere' for page, url in broken_links(site)]
    if not (site/'index.html').is_file(): problems.append('there is no index.html')
    return problems

def build(out:Path)->int: # how many pages
    "Build the site into `out`, replacing an older one"
    if out.exists() and any(out.iterdir()) and not (out/'site_libs').is_dir(): sys.exit(f'{out.name} is not empty and is no site; nothing was written.')
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp).resolve()
        copy_tree(tmp)
        os.environ.pop('IN_TEST', None)
        os.environ.update(PYTHONPATH=os.pathsep.join([str(tmp), str(ROOT/'tools')]), MPLBACKEND='agg', PYTHONWARNINGS='ignore', MEDSAM_NB_HOME=str(tmp))
        sys.path[:0] = [str(tmp), str(ROOT/'tools')]
        here = os.getcwd()
        os.chdir(tmp)
        try:
            from nbdev.config import get_config
            split_titles(tmp/'nbs')
            try: proc = prepare().resolve()
            except Exception as e: sys.exit(f'nbdev could not prepare the notebooks. {e}\n(It runs the cells that export or import; imports belong in cells of their own.)')
            cfg = get_config()
            mend_folder(proc, cfg)
            from smalldocs.site import build as render
            site = render(proc, quiet=True)
            mend_site(site.out, cfg)
            problems = check(site.out, proc)
            for o in site.warnings:
                if not KNOWN.search(o): print(f'warning: {o}', file=sys.stderr)
            if problems: sys.exit('The site is not whole:\n' + '\n'.join(f'- {o}' for o in problems))
            if out.exists(): shutil.rmtree(out)
            shutil.copytree(site.out, out)
        finally: os.chdir(here)
    return len(list(out.rglob('*.html')))

def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--out', type=Path, default=ROOT/'_docs', help='folder for the site, _docs/ by default')
    out = p.parse_args().out.resolve()
    n = build(out)
    print(f'{n} pages in {os.path.relpath(out)}: open {os.path.relpath(out/"index.html")}')

if __name__ == '__main__': main()
