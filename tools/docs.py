"""Build the documentation site into _docs/ without Quarto: nbdev prepares the notebooks, smalldocs renders them, and the gaps between the two are
mended here. Everything happens in a temporary copy, so the working tree stays as it is. The configuration is Quarto's own, for those who have it."""
import argparse, os, posixpath, re, shutil, sys, tempfile
from html import unescape
from pathlib import Path
from urllib.parse import unquote

ROOT = Path(__file__).resolve().parents[1]
NUMBER = re.compile(r'^\d+[a-zA-Z0-9]*_')  # what nbdev takes off a notebook's name to make the page's

# seen to here, or Quarto's alone
KNOWN = re.compile('output-file is not read|format commonmark is not built|keep-md is '
                   'ignored|respect-user-color-scheme is ignored')
WIDGET = 'application/vnd.jupyter.widget-view+json'
STILL = 'draw_a_box.png'  # the picture that stands in for the drawing cell
LIVE = {'en': 'A still picture: this page has no kernel. For the live cell, run `make lab` and open `nbs/tutorials/draw_a_box.ipynb`.',
        'ko': '정지 화면입니다. 직접 그려 보려면 `make lab`을 실행하고 `nbs/tutorials/draw_a_box.ipynb`를 여십시오.'}

LABELS = {'en': dict(skip='Skip to the text', site='Site', place='Place', pages='All pages', page='Contents',
                     margin='On this page', next='Previous and next page', dark='Dark colours', copy='Copy'),
          'ko': dict(skip='본문으로 건너뛰기', site='사이트', place='현재 위치', pages='모든 페이지', page='차례', margin='이 페이지의 내용',
                     next='이전 페이지와 다음 페이지', dark='어두운 색', copy='복사')}
SAID = {'ko': {'>On this page<': '>이 페이지의 내용<', 'placeholder="Search" aria-label="Search"': 'placeholder="검색" aria-label="검색"', 'Report an issue': '문제 알리기'}}

def lang_of(page)->str:
    "Language of a page or notebook: the name of its folder where that is a language, such as ko/, else English"
    return next((o for o in Path(page).parts[:1] if re.fullmatch('[a-z]{2}', o)), 'en')

def page_name(name:str)->str:
    "`06_curate.ipynb` as nbdev names its page's source: `curate.ipynb`"
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
        first = next((o for o in nb.cells if o.cell_type=='markdown'), None)
        m = first and re.match(r'(#\s+\S.*\n+)(>\s+\S.*\n*)?((?:-\s+\S+:.*\n*)*)', first.source + '\n')
        rest = m and first.source[m.end():].strip()
        if not rest: continue
        first.source = first.source[:m.end()].strip()
        nb.cells.insert(nb.cells.index(first) + 1, mk_cell(rest, 'markdown'))
        write_nb(nb, path)

def prepare()->Path:
    """nbdev's part, run in the copy: configuration, index of symbols, notebooks with API cards; the processed folder
    comes back"""
    import nbdev.doclinks
    from nbdev.quarto import nbdev_sidebar, refresh_quarto_yml
    from nbdev.serve import proc_nbs
    refresh_quarto_yml()
    nbdev.doclinks._build_modidx()
    nbdev_sidebar.__wrapped__()
    # A relative path: nbdev skips every file whose path has a folder that starts with a dot, those above the checkout
    # too.
    return Path(proc_nbs('nbs', n_workers=min(2, os.cpu_count() or 1), force=True))

def mend_source(text:str, folder:str, cfg)->str:
    """Links of one processed Markdown text (in `folder` under nbs/): pages by their new names, files outside nbs/ at
    the repository"""
    def link(m):
        url, tail = re.match(r'([^#]*)(#.*)?$', m[2]).groups()
        if re.match(r'[a-z][a-z0-9+.-]*:|[#/]', m[2]) or not url: return m[0]
        target = posixpath.normpath(posixpath.join('nbs', folder, url))
        if not target.startswith('nbs/'): return f'{m[1]}{cfg.git_url}/blob/{cfg.branch}/{target}{tail or ""}'
        head, name = posixpath.split(url)
        return m[1] + posixpath.join(head, page_name(name) if name.endswith('.ipynb') else name) + (tail or '')
    text = re.sub(r'(\]\()([^)\s]+)', link, text)
    text = re.sub(rf'^(!\[.*{re.escape(STILL)}\).*)$',
                  lambda m: f'{m[1]}\n\n::: {{.live}}\n{LIVE.get(lang_of(folder), LIVE["en"])}\n:::\n', text,
                  flags=re.M)
    return re.sub(r'^(#+ .*)$', lambda m: re.sub(r'(?<![\\`\w])__(\w+?)__(?![`\w])', r'\_\_\1\_\_', m[0]), text,
                  flags=re.M)

def mend_widgets(nb, folder:str)->list:
    """Leave a widget's still picture where its output was, and the line that says where the live one is; the cells
    that have none come back"""
    bad, after = [], [*nb.cells[1:], None]
    for c, then in zip(nb.cells, after):
        outs = c.get('outputs', [])
        if not any(WIDGET in o.get('data', {}) for o in outs): continue
        for o in outs:
            if WIDGET in o.get('data', {}):
                o['data'] = {k: v for k, v in o.data.items() if k.startswith('image/')}
        still = any(k.startswith('image/') for o in outs for k in o.get('data', {}))
        if still:
            outs.append(dict(output_type='display_data', metadata={},
                             data={'text/markdown': f'::: {{.live}}\n{LIVE.get(lang_of(folder), LIVE["en"])}\n:::'}))
        elif not (then and then.cell_type=='markdown' and STILL in then.source):
            bad.append(c.source.strip().splitlines()[-1])
        c['outputs'] = [o for o in outs if o.get('data') or o['output_type'] in ('stream', 'error')]
    return bad

def mend_folder(proc:Path, cfg):
    """Name pages as nbdev's links do, mend links and headings, and put stills in place of widgets, which no static
    page can show"""
    from execnb.nbio import read_nb, write_nb
    for path in sorted(proc.rglob('*.ipynb')):
        nb, folder = read_nb(path), path.relative_to(proc).parent.as_posix()
        nb.metadata.pop('widgets', None)
        bad = mend_widgets(nb, folder)
        if bad:
            sys.exit(f'{path.relative_to(proc)}: the cell that ends in {bad[0]!r} shows a widget, and no still '
                     f'picture of it follows.')
        for c in nb.cells:
            if c.cell_type=='markdown' and c.source: c.source = mend_source(c.source, folder, cfg)
            for o in c.get('outputs', []):
                md = o.get('data', {}).get('text/markdown')
                if md:
                    o['data']['text/markdown'] = mend_source(md if isinstance(md, str) else ''.join(md), folder, cfg)
        write_nb(nb, path)
        new = path.with_name(page_name(path.name))
        if new!=path:
            if new.exists():
                sys.exit(f'{path.name} and another notebook both make the page {new.stem}.html; rename one.')
            path.rename(new)
    for yml in proc.glob('*.yml'):
        yml.write_text(re.sub(r'[\w-]+\.ipynb', lambda m: page_name(m[0]), yml.read_text(encoding='utf-8')),
                       encoding='utf-8')

def mathml(html:str)->str:
    "TeX as MathML, which browsers draw themselves: no script, no fonts, nothing fetched"
    from latex2mathml.converter import convert
    def f(m): return m[1] + convert(unescape(m[3]), display='block' if m[2]=='[' else 'inline') + m[4]
    html = re.sub(r'(<span class="math (?:inline|display)">)\\([(\[])(.*?)\\[)\]](</span>)', f, html, flags=re.S)
    return re.sub(r'<(?:link|script)\b[^>]*cdn\.jsdelivr\.net/npm/katex[^>]*>(?:</script>)?\s*', '', html)

def mend_site(site:Path, cfg):
    "Relative links instead of the published address, maths drawn without scripts, no web fonts, what keyboards need"
    base = cfg.doc_host.rstrip('/') + '/' + cfg.doc_baseurl.strip('/') + '/'
    for page in site.rglob('*.html'):
        up = '../' * (len(page.relative_to(site).parts) - 1)
        html = page.read_text(encoding='utf-8')
        html = re.sub(rf'(<a\b[^>]*\bhref="){re.escape(base)}', lambda m: m[1] + (up or './'), html)
        page.write_text(mend_access(mend_text(mathml(html)), lang_of(page.relative_to(site)), up), encoding='utf-8')
    mend_symbols(site)
    shutil.copy(ROOT/'tools'/'site.js', site/'site_libs'/'site.js')
    for css in site.rglob('*.css'):
        text = css.read_text(encoding='utf-8')
        new = re.sub(r'@import\s+url\((["\']?)https?://[^)]*\1\)\s*;', '', text)
        if new!=text: css.write_text(new, encoding='utf-8')

def lines(code:str)->str:
    """Highlighted code with a span for each line that knows its indent, so that a long line goes on below itself, not
    at the margin"""
    out, opened = [], []
    for o in code.split('\n'):
        text, before = unescape(re.sub('<[^>]*>', '', o)), ''.join(opened)
        for t in re.findall('<span[^>]*>|</span>', o): opened = opened[:-1] if t=='</span>' else [*opened, t]
        out.append('<span class="line" '
                   f'style="--in:{len(text) - len(text.lstrip(" "))}ch">{before}{o}{"</span>"*len(opened)}</span>')
    return '\n'.join(out)

def mend_text(html:str)->str:
    "Code line by line, options of commands in one piece; printed columns told from printed sentences, which may wrap"
    def options(m):
        return m[1] + re.sub(r'(?<![\w-])--[a-z]\w*', r'<span class="option">\g<0></span>', m[2]) + m[3]
    html = re.sub(r'(<code\b[^>]*>)(.*?)(</code>)', options, html, flags=re.S)
    html = re.sub(r'(<code class="sourceCode[^>]*>)(.*?)(</code>)', lambda m: m[1] + lines(m[2]) + m[3], html,
                  flags=re.S)
    def columns(m):
        return m[0].replace('<pre>', '<pre class="columns">',
                            1) if len(re.findall(r'\S {2,}\S.*$', m[1], re.M))>1 else m[0]
    return re.sub(r'<pre><code>(.*?)</code></pre>', columns, html, flags=re.S)

def mend_access(html:str, lang:str, up:str)->str:
    """What keyboards and screen readers need: the language, a way past the navigation, named landmarks, buttons that
    are buttons, table headers"""
    head = LABELS.get(lang, LABELS['en'])
    html = re.sub(r'<html lang="[^"]*"', f'<html lang="{lang}"', html, count=1)
    html = re.sub(r'(<body\b[^>]*>)',
                  lambda m: f'{m[1]}<a class="skip" href="#quarto-document-content">{head["skip"]}</a>', html, count=1)
    for old, new in SAID.get(lang, {}).items(): html = html.replace(old, new)
    html = html.replace('</head>', f'<script src="{up}site_libs/site.js" defer></script>\n</head>', 1)
    for o, name in (('nav class="navbar ', 'site'), ('nav class="quarto-secondary-nav"', 'place'),
                    ('nav id="quarto-sidebar"', 'pages'), ('nav id="TOC"', 'page'),
                    ('nav class="page-navigation"', 'next'), ('div id="quarto-margin-sidebar"', 'margin')):
        role = ' role="complementary"' if o.startswith('div') else ''
        html = html.replace(f'<{o}', f'<{o.split(" ", 1)[0]}{role} aria-label="{head[name]}" {o.split(" ", 1)[1]}')
    html = re.sub(r'<a class="sidebar-item-text sidebar-link text-start" data-bs-toggle="collapse" '
                  r'data-bs-target="#([\w-]+)" role="navigation" aria-expanded="(\w+)">(.*?)</a>\s*'
        r'<a class="sidebar-item-toggle[^>]*>(.*?)</a>',
        r'<button type="button" class="section-toggle" data-bs-toggle="collapse" data-bs-target="#\1" '
        r'aria-controls="\1" '
        r'aria-expanded="\2">\3\4</button>', html, flags=re.S)
    html = re.sub(r'<a class="(quarto-color-scheme-toggle[^"]*)" href="" title="[^"]*" (onclick="[^"]*")>(.*?)</a>',
                  rf'<button type="button" class="\1" title="{head["dark"]}" \2>\3</button>', html, flags=re.S)
    html = re.sub(r'<button title="[^"]*" class="code-copy-button">',
                  f'<button type="button" title="{head["copy"]}" class="code-copy-button">', html)
    def scope(m):
        return re.sub(r'<th\b(?![^>]*\bscope=)([^>]*)>',
                      rf'<th scope="{"col" if m[0].startswith("<thead") else "row"}"\1>', m[0])
    html = re.sub(r'<(thead|tbody)\b.*?</\1>', scope, html, flags=re.S)
    return re.sub(r'<th\b[^>]*></th>', '<td></td>', html)

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
        new = re.sub(r'(<a\b[^>]*\bhref=")([^":#?]*)#([^"]+)("[^>]*>)(<code>[^<]*</code>)</a>',
                     lambda m: mend(m, page), html)
        if new!=html: page.write_text(new, encoding='utf-8')

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
            if not to.exists() or (frag and to in ids and unquote(frag) not in ids[to]):
                bad.append((page.relative_to(site).as_posix(), url))
    return sorted(set(bad))

def sidebar(proc:Path)->dict:
    "Part of the sidebar -> its notebooks, in order; what stands outside the parts is under ''"
    import yaml
    parts = {'': []}
    for o in yaml.safe_load((proc/'sidebar.yml').read_text(encoding='utf-8'))['website']['sidebar']['contents']:
        if isinstance(o, str): parts[''].append(o)
        else: parts[o['section']] = [x for x in o['contents'] if isinstance(x, str)]
    return parts

def write_llms(site:Path, proc:Path, cfg):
    """llms.txt: what the package is, and for each part of the sidebar its pages, with a line on each and a link to the
    page's Markdown"""
    base = cfg.doc_host.rstrip('/') + '/' + cfg.doc_baseurl.strip('/') + '/'
    lines = [f'# {cfg.title}', '', f'> {cfg.description}']
    for part, names in sidebar(proc).items():
        lines += ['', f'## {part or "Start"}', '']
        for o in names:
            page = site/Path(o).with_suffix('.html')
            if not page.is_file(): continue
            text = page.read_text(encoding='utf-8')
            title, about = (unescape(m[1]) if m else ''
                            for m in (re.search(r'<title>(.*?)(?: – [^<]*)?</title>', text),
                                      re.search(r'<meta name="description" content="([^"]*)"', text)))
            lines.append(f'- [{title}]({base}{Path(o).with_suffix(".llms.md").as_posix()})' + (f': {about}' if about
                else ''))
    (site/'llms.txt').write_text('\n'.join(lines) + '\n', encoding='utf-8')

def check(site:Path, proc:Path)->list:
    "What keeps the site from being whole: a page that is missing or out of the sidebar, a link to nowhere"
    listed, problems = [o for part in sidebar(proc).values() for o in part], []
    for nb in proc.rglob('*.ipynb'):
        name = nb.relative_to(proc)
        if not (site/name.with_suffix('.html')).is_file():
            problems.append(f'{name.with_suffix(".html")}: no such page was made')
        elif name.as_posix() not in listed:
            problems.append(f'{name.with_suffix(".html")}: not in nbs/sidebar.yml')
    problems += [f'nbs/sidebar.yml names {o}, which is no notebook' for o in listed if not (proc/o).is_file()]
    problems += [f'{page}: {url} leads nowhere' for page, url in broken_links(site)]
    if not (site/'index.html').is_file(): problems.append('there is no index.html')
    return problems

def render(proc:Path, cfg):
    "The processed folder as a site: mended, rendered, mended again; smalldocs' own account of it comes back"
    from smalldocs.site import build
    mend_folder(proc, cfg)
    yml = proc/'_quarto.yml'  # a key of Quarto 1.9, which older ones refuse
    yml.write_text(re.sub(r'^website:\n', 'website:\n  llms-txt: true\n', yml.read_text(encoding='utf-8'), flags=re.M),
                   encoding='utf-8')
    site = build(proc, quiet=True)
    mend_site(site.out, cfg)
    write_llms(site.out, proc, cfg)
    return site

def build(out:Path)->int: # how many pages
    "Build the site into `out`, replacing an older one"
    if out.exists() and any(out.iterdir()) and not (out/'site_libs').is_dir():
        sys.exit(f'{out.name} is not empty and is no site; nothing was written.')
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp).resolve()
        copy_tree(tmp)
        os.environ.pop('IN_TEST', None)
        os.environ.update(PYTHONPATH=os.pathsep.join([str(tmp), str(ROOT/'tools')]), MPLBACKEND='agg',
                          PYTHONWARNINGS='ignore', MEDSAM_NB_HOME=str(tmp))
        sys.path[:0] = [str(tmp), str(ROOT/'tools')]
        here = os.getcwd()
        os.chdir(tmp)
        try:
            from nbdev.config import get_config
            split_titles(tmp/'nbs')
            try: proc = prepare().resolve()
            except Exception as e:
                sys.exit(f'nbdev could not prepare the notebooks. {e}\n(It runs the cells that export or import; '
                         f'imports belong in cells of their own.)')
            cfg = get_config()
            site = render(proc, cfg)
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

if __name__=='__main__': main()
