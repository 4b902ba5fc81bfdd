"The documentation site is built from the working tree and looked at in a browser."
import functools, os, re, shutil, subprocess, sys, threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
import pytest

pytestmark = [pytest.mark.slow]
FLAGS = ['--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking',
         '--disable-component-update', '--disable-sync']

@pytest.fixture(scope='module')
def site(root, tmp_path_factory):
    "The built site; tools/docs.py itself fails on a missing page, on a page outside the sidebar and on a link to nowhere"
    out = tmp_path_factory.mktemp('docs')/'site'
    env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'}
    r = subprocess.run([sys.executable, root/'tools'/'docs.py', '--out', out], capture_output=True, text=True, env=env, cwd=out.parent)
    assert r.returncode == 0, r.stderr[-4000:]
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
    exe = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
    if not exe: pytest.skip('no Chromium on this machine: apt-get install chromium')
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        b = p.chromium.launch(executable_path=exe, args=FLAGS)
        yield b
        b.close()

class Visit:
    "One page opened, with what it asked for and what it complained about"
    def __init__(self, browser, url, page):
        self.requests, self.complaints = [], []
        self.page = browser.new_context().new_page()
        self.page.on('request', lambda o: self.requests.append(o.url))
        self.page.on('console', lambda o: self.complaints.append(o.text) if o.type == 'error' and 'favicon' not in o.location.get('url', '') else None)
        self.page.on('pageerror', lambda o: self.complaints.append(str(o)))
        self.page.goto(f'{url}/{page}', wait_until='networkidle')
        self.external = [o for o in self.requests if not o.startswith((url, 'data:', 'blob:'))]
    def widths(self): return self.page.eval_on_selector_all('main img', 'imgs => imgs.map(o => o.naturalWidth)')

def pages(site): return sorted(o.relative_to(site).as_posix() for o in site.rglob('*.html'))

def test_every_notebook_has_a_page(site, root):
    wanted = {re.sub(r'^\d+[a-zA-Z0-9]*_', '', o.name.lower()).replace('.ipynb', '.html') for o in (root/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in o.parts}
    assert len(wanted) > 2
    assert wanted <= {o.rpartition('/')[2] for o in pages(site)}

def test_index(site, url, browser):
    v = Visit(browser, url, 'index.html')
    assert 'medsam_nb' in v.page.title()
    entries = [o.strip() for o in v.page.locator('#quarto-sidebar a').all_inner_texts()]
    assert 'core' in ' '.join(entries).lower(), entries
    headings = v.page.locator('#quarto-sidebar').inner_text()
    assert 'Tutorials' in headings and 'Reference' in headings
    assert not v.external and not v.complaints

def test_chapter_with_api_cards_and_figures(site, url, browser):
    v = Visit(browser, url, 'show.html')
    heads = v.page.locator('main h3').all_inner_texts()
    assert any('show_image' in o for o in heads), heads
    table = v.page.locator('main table:has(th:text-is("Type")):has(th:text-is("Details"))')
    assert table.count() > 0 and table.first.locator('tbody tr').count() > 0
    assert v.widths() and min(v.widths()) > 0
    assert v.page.locator('main img:not([alt])').count() == 0
    assert not v.external and not v.complaints

def test_no_page_asks_outside_or_complains(site, url, browser):
    bad = {}
    for name in pages(site):
        v = Visit(browser, url, name)
        if v.external or v.complaints or (v.widths() and min(v.widths()) == 0): bad[name] = v.external + v.complaints
        v.page.context.close()
    assert not bad

def test_search_finds_a_function(site, url, browser):
    v = Visit(browser, url, 'index.html')
    v.page.keyboard.press('/')
    box = v.page.locator('input[type=search], .aa-Input, #quarto-search input').first
    box.wait_for(state='visible', timeout=5000)
    box.fill('show_image')
    v.page.locator('a[href*="show.html"]:visible', has_text='show').first.wait_for(timeout=5000)

def test_symbols_link_within_the_site(site):
    text = ''.join((site/o).read_text(encoding='utf-8') for o in pages(site))
    assert re.search(r'href="(\.\./|\./)?core\.html#\w+', text), 'no name in backticks became a link to the chapter core'
    assert 'katex' not in text and 'fonts.googleapis' not in ''.join(o.read_text(encoding='utf-8') for o in site.rglob('*.css'))
