"The documentation site is built from the working tree and looked at in a browser"
import functools, json, os, re, shutil, subprocess, sys, threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
import pytest, yaml
from labs import FLAGS, chromium

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT/'tools'))
import docs

pytestmark = [pytest.mark.slow]
MAIN = [
    'index.html', 'tutorials/draw_a_box.html', 'tutorials/flare22_gallbladder.html', 'howto/own_ct.html',
    'predict.html', 'ko/index.html', 'explain/dsc_and_nsd.html', 'explain/inside_sam.html', 'howto/troubleshooting.html']
WIDE, PHONE = dict(width=1280, height=900), dict(width=400, height=800)

# --- the site, a server, a browser ----------------------------------------------------------------

@pytest.fixture(scope='module')
def site(root, tmp_path_factory):
    "The built site; tools/docs.py fails on a missing page, one outside the sidebar and a link to nowhere"
    out = tmp_path_factory.mktemp('docs')/'site'
    env = {k: v for k, v in os.environ.items() if k!='IN_TEST'}
    r = subprocess.run([sys.executable, root/'tools'/'docs.py', '--out', out], capture_output=True, text=True, env=env,
                       cwd=out.parent)
    assert r.returncode==0, r.stderr[-4000:]
    assert 'warning:' not in r.stderr, r.stderr
    return out

@pytest.fixture(scope='module')
def url(site):
    "The site served on loopback"
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *a): pass
    with ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{server.server_port}'
        server.shutdown()

@pytest.fixture(scope='module')
def browser():
    exe = chromium()
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        b = p.chromium.launch(executable_path=exe, args=FLAGS)
        yield b
        b.close()

@pytest.fixture
def tab(browser, url):
    "`tab(page, …)` opens a page in a profile of its own"
    made = []
    def f(name, **kw):
        made.append(browser.new_context(**{'viewport': WIDE, **kw}))
        page = made[-1].new_page()
        page.complaints = []
        page.on('pageerror', lambda o: page.complaints.append(str(o)))
        page.goto(f'{url}/{name}', wait_until='load')
        return page
    yield f
    for o in made: o.close()

def pages(site): return sorted(o.relative_to(site).as_posix() for o in site.rglob('*.html'))

LOOK = r'''() => {
  const main = document.querySelector('main'), text = main.cloneNode(true);
  const all = (s, o=document) => Array.from(o.querySelectorAll(s));
  const boxes = all('main pre, main .sd-table, main .cell-output-display');
  const wide = boxes.filter(o => o.scrollWidth > o.clientWidth + 1);
  const out = o => o.getBoundingClientRect().right > innerWidth && !o.closest('.sd-table, .cell-output-display, pre');
  all('pre, code, math, script', text).forEach(o => o.remove());
  return {title: document.title, lang: document.documentElement.lang,
    about: document.querySelector('meta[name=description]')?.content || '',
    over: document.scrollingElement.scrollWidth - innerWidth,
    loose: all('main pre, main table').filter(out).length,
    unreached: wide.filter(o => getComputedStyle(o).overflowX != 'visible' && o.tabIndex != 0).length,
    scrolling: wide.length,
    alts: all('img').map(o => o.alt.trim()),
    svgs: all('svg[role=img]').filter(o => !o.getAttribute('aria-label') && !o.querySelector('title')).length,
    empty: all('main img').filter(o => !o.naturalWidth).length,
    h1: all('h1').length, mains: all('main').length, skip: document.body.firstElementChild.className,
    unscoped: all('main th:not([scope])').length, unnamed: all('nav:not([aria-label])').length,
    anchors: all('main h2[id], main h3[id]').length,
    math: all('math').length, prose: text.textContent, whole: main.innerText};
}'''

@pytest.fixture(scope='module')
def visits(site, url, browser):
    "Every page looked at once, on a phone: what it asked for, what it complained about, and what LOOK sees"
    context = browser.new_context(viewport=PHONE)
    page, found, asked, complaints = context.new_page(), {}, [], []
    page.on('request', lambda o: asked.append(o.url))
    page.on('console', lambda o: complaints.append(o.text) if o.type=='error'
            and 'favicon' not in o.location.get('url', '') else None)
    page.on('pageerror', lambda o: complaints.append(str(o)))
    for name in pages(site):
        asked.clear()
        complaints.clear()
        page.goto(f'{url}/{name}', wait_until='load')
        page.wait_for_timeout(50)
        found[name] = SimpleNamespace(**page.evaluate(LOOK),
                                      external=[o for o in asked if not o.startswith((url, 'data:', 'blob:'))],
                                      complaints=list(complaints))
    context.close()
    return found

def bad(visits, f): return {k: r for k, v in visits.items() if (r := f(v))}

# --- every page -----------------------------------------------------------------------------------

def test_every_notebook_has_a_page(site, root):
    nbs = [o.relative_to(root/'nbs') for o in (root/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in o.parts]
    wanted = {(o.parent/docs.page_name(o.name)).with_suffix('.html').as_posix() for o in nbs}
    assert len(nbs)==len(wanted)>2 and wanted==set(pages(site))

def test_no_page_asks_outside_or_complains(visits):
    assert not bad(visits, lambda v: v.external + v.complaints + ['a picture did not load']*v.empty)

def test_no_page_scrolls_sideways_at_400_pixels(visits):
    assert not bad(visits, lambda v: max(v.over, 0) + v.loose)
    assert sum(v.scrolling
               for v in visits.values())>20, 'wide code and tables were meant to scroll in boxes of their own'
    assert not bad(visits, lambda v: v.unreached)

def test_every_picture_has_alternative_text(visits):
    assert sum(len(v.alts) for v in visits.values())>20
    assert not bad(visits, lambda v: v.alts.count('') + v.svgs)

def test_title_language_description_and_landmarks(visits):
    titles = [v.title for v in visits.values()]
    assert len(set(titles))==len(titles), sorted(o for o in titles if titles.count(o)>1)
    assert not bad(visits, lambda v: not v.title.strip() or len(v.about)<20 or v.h1!=1 or v.mains!=1 or v.skip!='skip'
                   or v.unnamed or v.unscoped)
    assert not bad(visits, lambda v: v.lang!=('ko' if (name := next(k for k, o in visits.items()
                                                                    if o is v)).startswith('ko/') else 'en') and name)
    assert sum(v.anchors for v in visits.values())>100

def test_maths_is_drawn_and_no_tex_is_left(visits, root):
    commands = r'\\\(|\\\[|\\(?:frac|sum|cdot|mathrm|text|sqrt|hat|bar|left|lvert|times)\b'
    tex = re.compile(commands + r'|\$\$|\$[^$\n]*[\\_^{][^$\n]*\$')
    assert not bad(visits, lambda v: tex.findall(v.prose))
    for path in (root/'nbs').rglob('*.ipynb'):
        text = '\n'.join(''.join(c['source']) for c in json.loads(path.read_text(encoding='utf-8'))['cells']
                         if c['cell_type']=='markdown')
        text = re.sub(r'```.*?```|`[^`]*`', '', text, flags=re.S)
        if not re.search(r'\$[^$\s][^$\n]*[\\_^{][^$\n]*\$|\$\$.+?\$\$', text, re.S): continue
        name = (path.relative_to(root/'nbs').parent/docs.page_name(path.name)).with_suffix('.html').as_posix()
        assert visits[name].math, f'{path.name} has formulas and {name} has none'
    assert visits['metrics.html'].math>=2 and visits['finetune.html'].math

def test_widgets_show_a_still_and_say_how_to_run(visits, tab):
    assert not bad(visits, lambda v: re.findall(r'Widget\(|VBox\(|HBox\(|Box\(children|widget-view', v.whole))
    for name in ('tutorials/draw_a_box.html', 'draw.html'):
        page = tab(name)
        assert page.locator('main img[src*="draw_a_box"]').count()==1
        assert 'make lab' in page.locator('main .live').inner_text()

def test_symbols_link_within_the_site(site):
    text = ''.join((site/o).read_text(encoding='utf-8') for o in pages(site))
    assert re.search(r'href="(\.\./|\./)?core\.html#\w+',
                     text), 'no name in backticks became a link to the chapter core'
    assert 'katex' not in text and 'fonts.googleapis' not in ''.join(o.read_text(encoding='utf-8')
                                                                     for o in site.rglob('*.css'))

# --- moving about ---------------------------------------------------------------------------------

def test_index_and_the_four_parts(tab, root):
    page = tab('index.html')
    assert 'medsam_nb' in page.title()
    parts = page.locator('#quarto-sidebar .section-toggle').all_inner_texts()
    assert [o.strip() for o in parts][:4]==['Tutorials', 'How-to', 'Explanation', 'Reference']
    tops = page.locator('#navbarCollapse .nav-link .menu-text').all_inner_texts()
    assert [o.strip() for o in tops][:4]==['Tutorials', 'How-to', 'Explanation', 'Reference']
    entries = ' '.join(page.locator('#quarto-sidebar a').all_inner_texts()).lower()
    assert 'core' in entries and 'draw a box' in entries
    chapters = yaml.safe_load((root/'nbs'/'sidebar.yml').read_text())['website']['sidebar']['contents']
    kept = {o['section']: o['contents'] for o in chapters if isinstance(o, dict)}
    for part, folder in (('Tutorials', 'tutorials/'), ('How-to', 'howto/'), ('Explanation', 'explain/')):
        assert kept[part] and all(o.startswith(folder) for o in kept[part])

def test_previous_and_next_page_and_a_way_past_the_navigation(tab):
    page = tab('show.html')
    assert [o.get_attribute('href') for o in page.locator('.page-navigation a').all()]==['core.html', 'metrics.html']
    page.keyboard.press('Tab')
    assert page.evaluate('document.activeElement.className')=='skip' and page.locator('.skip').bounding_box()['y']>=0
    page.keyboard.press('Enter')
    assert page.evaluate('location.hash')=='#quarto-document-content'

@pytest.mark.parametrize('words,target', [('show_image', '/show.html#show_image'),
                                          ('a whole volume', '/predict.html#a-whole-volume')],
                                          ids=['function', 'heading'])
def test_search_by_keyboard_finds_functions_and_headings(tab, words, target):
    page = tab('index.html')
    page.keyboard.press('/')
    assert page.evaluate('document.activeElement.type')=='search'
    page.keyboard.type(words)
    hit = page.locator(f'.search-result[href$="{target.rpartition("/")[2]}"]')
    hit.first.wait_for(timeout=10000)
    for _ in range(20):
        page.keyboard.press('ArrowDown')
        if 'active' in hit.first.get_attribute('class').split(): break
    page.keyboard.press('Enter')
    page.wait_for_url(f'**{target}', timeout=10000)

def test_sidebar_of_a_phone_opens_by_keyboard(tab):
    page = tab('predict.html', viewport=PHONE)
    button, sidebar = page.locator('.quarto-btn-toggle'), page.locator('#quarto-sidebar')
    assert not sidebar.is_visible() and button.is_visible() and button.get_attribute('aria-expanded')=='false'
    for _ in range(12):
        page.keyboard.press('Tab')
        if page.evaluate('document.activeElement.classList.contains("quarto-btn-toggle")'): break
    assert page.evaluate('getComputedStyle(document.activeElement).outlineStyle')=='solid'
    page.keyboard.press('Enter')
    sidebar.locator('a.active').wait_for(state='visible', timeout=2000)
    assert button.get_attribute('aria-expanded')=='true'
    page.wait_for_function('document.querySelector("#quarto-sidebar").contains(document.activeElement)', timeout=2000)
    page.keyboard.press('Escape')
    sidebar.wait_for(state='hidden', timeout=2000)
    assert page.evaluate('document.activeElement.classList.contains("quarto-btn-toggle")')
    assert button.get_attribute('aria-expanded')=='false'

def test_sections_of_the_sidebar_fold_by_keyboard(tab):
    page = tab('index.html')
    toggle = page.locator('#quarto-sidebar .section-toggle').first
    inside = page.locator('#quarto-sidebar a[href*="draw_a_box"]')
    assert inside.is_visible()
    toggle.focus()
    page.keyboard.press('Enter')
    inside.wait_for(state='hidden', timeout=3000)
    assert toggle.get_attribute('aria-expanded')=='false'

# --- API cards ------------------------------------------------------------------------------------

def test_api_cards(tab):
    page = tab('predict.html')
    heads = page.locator('main h3').all_inner_texts()
    assert {'Prediction', 'Predictor', 'predict_volume'}<={o.strip('# ') for o in heads}
    assert not any(o.startswith('_') for o in heads)
    def rows(name):
        table = page.locator(f'main section#{name} table:has(th:text-is("Details")), main h3#{name} ~ * table').first
        found = table.locator('tbody tr').all()
        found = {r.locator('td, th').first.inner_text(): r.inner_text().split('\t') for r in found}
        return table.locator('thead th').all_inner_texts(), found
    head, row = rows('oracle_boxes')
    assert head==['Name', 'Type', 'Default', 'Details']
    assert row['pieces'][1:3]==['bool', 'False']
    assert 'piece' in row['pieces'][3] and '(D,H,W)' in row['label'][3]
    assert 'Returns' in row
    head, row = rows('prediction')  # a dataclass
    assert head==['Name', 'Type', 'Default', 'Details']
    assert '(B,H,W) bool' in row['masks'][3] and row['image'][2]=='None'
    method = page.locator('main h4[id="predictor.set_embedding"]')
    assert method.inner_text().strip('# ')=='Predictor.set_embedding'
    text = page.locator('main table:below(h4[id="predictor.set_embedding"])').first.inner_text()
    assert all(o in text for o in ('embedding', 'grid', 'image', 'only for showing'))

def test_private_names_have_no_card(site, root):
    index = ' '.join(o.read_text(encoding='utf-8') for o in (root/'medsam_nb').glob('*.py'))
    private = set(re.findall(r'^def (_[a-z]\w+)', index, re.M))
    assert len(private)>10
    ids = {i for o in site.rglob('*.html') for i in re.findall(r'\bid="([^"]+)"', o.read_text(encoding='utf-8'))}
    assert 'predict_volume' in ids and not {i for i in ids if i in private or i.rpartition('.')[2].startswith('_')
                                            and not i.endswith('__')}

def test_code_reads_and_copies_as_written(tab, root):
    page = tab('tutorials/draw_a_box.html')
    nb = json.loads((root/'nbs'/'tutorials'/'draw_a_box.ipynb').read_text(encoding='utf-8'))
    cells = [''.join(c['source']) for c in nb['cells'] if c['cell_type']=='code']
    cell = next(o for o in cells if 'import annotate' in o)
    source = re.sub(r'^#\|.*\n', '', cell, flags=re.M).strip()
    assert page.locator('main pre.cell-code code').first.evaluate('o => o.innerText').strip()==source

# --- colours, paper, accessibility ----------------------------------------------------------------

LIGHTNESS = '''o => {
  const [r, g, b] = getComputedStyle(o).backgroundColor.match(/[\\d.]+/g).map(Number);
  return (.299*r + .587*g + .114*b)/255;
}'''

def test_dark_colours_follow_the_system_and_the_choice_stays(tab):
    page = tab('predict.html', color_scheme='dark')
    dark = lambda: page.locator('body').evaluate(LIGHTNESS)<.2
    assert dark()
    code = page.locator('main pre').first.evaluate('o => getComputedStyle(o.querySelector("code")).color')
    assert code!='rgb(0, 59, 79)', 'the light code colours on a dark page'
    assert page.locator('main img').first.evaluate(LIGHTNESS)>.9, 'a transparent figure needs paper under it'
    switch = page.locator('.quarto-color-scheme-toggle')
    assert switch.get_attribute('aria-pressed')=='true'
    switch.focus()
    page.keyboard.press('Enter')
    page.wait_for_function(f'({LIGHTNESS})(document.body) > .9', timeout=3000)
    assert switch.get_attribute('aria-pressed')=='false'
    page.goto(page.url.replace('predict', 'show'), wait_until='load')
    assert not dark() and not page.complaints
    assert tab('predict.html').locator('body').evaluate(LIGHTNESS)>.9

@pytest.mark.parametrize('system,chosen', [('light', 'rgb(27, 30, 34)'), ('dark', 'rgb(255, 255, 255)')])
def test_no_flash_of_the_other_colours(tab, system, chosen):
    page = tab('index.html', color_scheme=system)
    page.locator('.quarto-color-scheme-toggle').click()
    page.add_init_script('window.seen = new Set(); (function look() { if (document.body && '
                         'performance.getEntriesByType("paint").length) '
                         'window.seen.add(getComputedStyle(document.body).backgroundColor); '
                         'requestAnimationFrame(look); })()')
    page.goto(page.url.replace('index', 'predict'), wait_until='load')
    page.wait_for_timeout(300)
    assert page.evaluate('[...window.seen]')==[chosen]

@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_paper(tab, scheme):
    page = tab('tutorials/flare22_gallbladder.html', color_scheme=scheme)
    page.emulate_media(media='print', color_scheme=scheme)
    for o in ('#quarto-header', '#quarto-sidebar', '#quarto-margin-sidebar', '.page-navigation', '.skip'):
        assert not page.locator(o).is_visible(), o
    assert page.locator('main').is_visible() and page.locator('main h1').is_visible()
    style = lambda o, k, pseudo='': page.locator(o).first.evaluate(f'o => getComputedStyle(o, "{pseudo}")["{k}"]')
    assert page.locator('body').evaluate(LIGHTNESS)>.9 and style('main p', 'color')==style('main pre code span',
        'color')=='rgb(0, 0, 0)'
    assert style('main pre.sourceCode > code', 'whiteSpace')=='pre-wrap'
    assert {style(o, 'breakInside') for o in ('main figure', 'main img')}=={'avoid'}
    page.goto(page.url.replace('tutorials/flare22_gallbladder', 'predict'), wait_until='load')
    assert 'github.com' in style('main a[href^="https://"]', 'content', '::after')

@pytest.mark.parametrize('name', MAIN)
def test_axe_finds_nothing_serious(tab, name):
    from axe_playwright_python.base import AXE_SCRIPT
    page, found = tab(name), {}
    page.evaluate(AXE_SCRIPT)
    for scheme, view in (('light', WIDE), ('light', PHONE), ('dark', PHONE), ('dark', WIDE)):
        page.set_viewport_size(view)
        page.emulate_media(color_scheme=scheme)
        page.wait_for_function(f'({LIGHTNESS})(document.body) {"<" if scheme == "dark" else ">"} .5', timeout=5000)
        page.wait_for_timeout(400)  # transitions
        r = page.evaluate("axe.run({resultTypes: ['violations']}).then(r => r.violations.map(v => [v.impact, v.id, "
                          'v.nodes.map(n => n.html.slice(0, 120))]))')
        serious = [o for o in r if o[0] in ('serious', 'critical')]
        if serious: found[scheme, view['width']] = serious
    assert not found

# --- what the builder refuses ---------------------------------------------------------------------

def cell(kind, source, id, **kw):
    return dict(cell_type=kind, id=id, metadata={}, source=source,
                **(dict(outputs=[], execution_count=None) if kind=='code' else {}), **kw)

def notebook(path, *cells, about='A page of a site that a test made'):
    path.parent.mkdir(parents=True, exist_ok=True)
    front = cell('raw', f'---\ntitle: {path.parent.name} {path.stem}\ndescription: {about}\n---', 'front')
    path.write_text(json.dumps(dict(cells=[front, *cells], metadata={}, nbformat=4, nbformat_minor=5)),
                    encoding='utf-8')

PNG = 'iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=='
CFG = SimpleNamespace(doc_host='https://example.org', doc_baseurl='/x', git_url='https://example.org/x', branch='main',
                      title='x', description='A small site')

@pytest.fixture
def small(tmp_path, root):
    "A processed folder of two languages, two pages of one name, a formula and a widget; `docs.render` makes its site"
    for o in ('_quarto.yml', 'nbdev.yml', 'styles.css'): shutil.copy(root/'nbs'/o, tmp_path)
    yml = yaml.safe_load((tmp_path/'_quarto.yml').read_text())
    yml['website']['navbar']['left'] = []
    (tmp_path/'_quarto.yml').write_text(yaml.safe_dump(yml, sort_keys=False))
    (tmp_path/'sidebar.yml').write_text('website:\n  sidebar:\n    contents:\n      - index.ipynb\n      - section: '
                                        'Tutorials\n        contents: [page.ipynb, ko/index.ipynb]\n')
    view = dict(output_type='display_data', metadata={},
                data={docs.WIDGET: {'model_id': 'a'}, 'text/plain': 'AnnotateWidget(x=1)', 'image/png': PNG})
    widget = cell('code', "#| fig-alt: 'a square'\napp", 'w')
    widget['outputs'] = [view]
    notebook(tmp_path/'index.ipynb',
             cell('markdown', '## One\n\n[to the other](ko/index.ipynb#two), [to a part](#one)', 'a'))
    notebook(tmp_path/'ko'/'index.ipynb', cell('markdown', '## Two\n\n[back](../index.ipynb#one)', 'b'))
    notebook(tmp_path/'page.ipynb', cell('markdown', r'Inline $\frac{a}{b_i}$ and' + '\n\n$$\\sum_i x_i^2$$\n', 'c'),
             widget)
    return tmp_path

def test_language_names_maths_and_widgets_of_a_small_site(small):
    site = docs.render(small, CFG).out
    assert docs.check(site, small)==[]
    read = lambda o: (site/o).read_text(encoding='utf-8')
    assert '<html lang="en">' in read('index.html') and '<html lang="ko">' in read('ko/index.html')
    assert {o['href'].partition('#')[0] for o in json.loads(read('search.json'))}>={'index.html', 'ko/index.html'}
    page = read('page.html')
    assert page.count('<math')==2 and '<mfrac>' in page
    assert not [o for o in ('\\frac', '\\sum', 'katex') if o in page]
    assert f'base64,{PNG}' in page
    assert 'alt="a square"' in page
    assert 'make lab' in page
    assert 'AnnotateWidget' not in page
    assert 'ko/index.llms.md' in read('llms.txt')

def test_a_widget_without_a_still_is_refused(small):
    nb = json.loads((small/'page.ipynb').read_text())
    del nb['cells'][2]['outputs'][0]['data']['image/png']
    (small/'page.ipynb').write_text(json.dumps(nb))
    with pytest.raises(SystemExit, match="page.ipynb.*'app'.*no still"): docs.render(small, CFG)

def test_planted_faults_are_found(small):
    site = docs.render(small, CFG).out
    page = (site/'ko'/'index.html').read_text(encoding='utf-8')
    for planted, url in (('<a href="nowhere.html">x</a>', 'nowhere.html'),
                         ('<a href="../index.html#no-such-part">x</a>', '../index.html#no-such-part'),
                         ('<a href="#no-such-part">x</a>', '#no-such-part'),
                         ('<img alt="x" src="gone.png">', 'gone.png')):
        (site/'ko'/'index.html').write_text(page.replace('</main>', planted + '</main>'), encoding='utf-8')
        assert docs.check(site, small)==[f'ko/index.html: {url} leads nowhere']
    (site/'ko'/'index.html').unlink()
    assert 'ko/index.html: no such page was made' in docs.check(site, small)
    yml = (small/'sidebar.yml').read_text()
    (small/'sidebar.yml').write_text(yml.replace('page.ipynb', 'other.ipynb'))
    found = docs.check(site, small)
    assert 'page.html: not in nbs/sidebar.yml' in found
    assert 'nbs/sidebar.yml names other.ipynb, which is no notebook' in found

def test_llms_txt_lists_every_page_with_a_line(site, root):
    text = (site/'llms.txt').read_text(encoding='utf-8')
    cfg = docs_settings(root)
    base = cfg['doc_host'].rstrip('/') + '/' + cfg['doc_baseurl'].strip('/') + '/'
    assert text.startswith(f'# {cfg["title"]}\n\n> {cfg["description"]}\n')
    found = re.findall(r'^- \[[^\]]+\]\(([^)]+)\): .{20,}$', text, re.M)
    assert sorted(o.removeprefix(base).replace('.llms.md', '.html') for o in found)==pages(site)
    assert all((site/o.removeprefix(base)).is_file() for o in found)

def docs_settings(root):
    from configparser import ConfigParser
    cfg = ConfigParser(delimiters=['='])
    cfg.read(root/'settings.ini', encoding='utf-8')
    return cfg['DEFAULT']

# --- configuration --------------------------------------------------------------------------------

def test_quarto_configuration(root):
    "Keys that Quarto documents, with values of the kind that it expects"
    yml = {o: yaml.safe_load((root/'nbs'/o).read_text(encoding='utf-8'))
           for o in ('_quarto.yml', 'nbdev.yml', 'sidebar.yml')}
    kinds = {'project.type': str, 'project.output-dir': str, 'metadata-files': list, 'format.commonmark': str,
        'format.html.theme.light': str, 'format.html.theme.dark': str, 'format.html.respect-user-color-scheme': bool,
        'format.html.css': str, 'format.html.toc': bool,
        'format.html.keep-md': bool, 'format.html.code-overflow': str, 'website.title': str, 'website.site-url': str,
        'website.description': str,
        'website.repo-url': str, 'website.repo-branch': str, 'website.repo-actions': list,
        'website.twitter-card': bool, 'website.open-graph': bool,
        'website.page-navigation': bool, 'website.navbar.search': bool, 'website.navbar.tools-collapse': bool,
        'website.navbar.left': list,
        'website.sidebar.style': str, 'website.sidebar.contents': list}
    def walk(o, at=''):
        for k, v in o.items():
            if isinstance(v, dict): yield from walk(v, f'{at}{k}.')
            else: yield f'{at}{k}', v
    for name, o in yml.items():
        for key, v in walk(o): assert key in kinds and isinstance(v, kinds[key]), (name, key, v)
    quarto = yml['_quarto.yml']
    assert quarto['metadata-files']==['nbdev.yml', 'sidebar.yml']
    assert (root/'nbs'/quarto['format']['html']['css']).is_file()
    for o in yml['_quarto.yml']['website']['navbar']['left']:
        assert set(o)=={'text', 'href'} and (root/'nbs'/o['href']).is_file(), o
    for o in yml['sidebar.yml']['website']['sidebar']['contents']:
        for path in [o] if isinstance(o, str) else o['contents']: assert (root/'nbs'/path).is_file(), path
        assert isinstance(o, str) or set(o)=={'section', 'contents'}

def test_cell_options_are_yaml(root):
    "Quarto reads `#| key: value` as YAML; a text with a colon needs quotes, or an alternative text is lost"
    bad = []
    for path in (root/'nbs').rglob('*.ipynb'):
        if '.ipynb_checkpoints' in path.parts: continue
        for c in json.loads(path.read_text(encoding='utf-8'))['cells']:
            for line in re.findall(r'^#\|\s*([\w-]+:\s.*)$', ''.join(c['source']), re.M):
                try: good = isinstance(yaml.safe_load(line), dict)
                except yaml.YAMLError: good = False
                if not good: bad.append(f'{path.relative_to(root)}: {line[:60]}')
    assert not bad, '\n'.join(bad)

def test_pages_workflow(root):
    flow = yaml.safe_load((root/'.github'/'workflows'/'docs.yml').read_text(encoding='utf-8'))
    # YAML reads the key `on` as true
    assert flow[True]=={'push': {'branches': ['main']}}, 'only what is pushed to main is published'
    assert flow['permissions']=={'contents': 'read'}
    build, deploy = flow['jobs']['build'], flow['jobs']['deploy']
    assert 'permissions' not in build and deploy['permissions']=={'pages': 'write',
                                                                  'id-token': 'write'} and deploy['needs']=='build'
    uses = {o['uses'].split('@')[0]: o for j in (build, deploy) for o in j['steps'] if 'uses' in o}
    assert {'actions/checkout', 'actions/upload-pages-artifact', 'actions/deploy-pages'}<=set(uses)
    assert uses['actions/upload-pages-artifact']['with']['path']==docs_settings(root)['doc_path']
    assert [o['run'] for o in build['steps'] if 'run' in o]==['make docs']
    assert all(docs_settings(root)['git_url'].endswith(re.search(r"github\.repository == '([^']+)'", j['if'])[1])
               for j in (build, deploy))
