"The drawing cell in a real JupyterLab and a real Notebook 7, with a real Chromium and the real model"
import json, os, re, shutil, signal, subprocess, time
import numpy as np, pytest
from scipy.ndimage import binary_dilation, binary_erosion
from labs import FLAGS, Notebook, Server, chromium, settings
from medsam_nb.prompt import KINDS
from medsam_nb.volume import read_volume

pytestmark = [pytest.mark.slow]
GALL = [68,67,95,109]     # drawn loosely round the phantom's gallbladder on slice 9, image pixels

@pytest.fixture(scope='module')
def server(tmp_path_factory):
    s = Server(tmp_path_factory.mktemp('lab'))
    yield s
    s.stop()

@pytest.fixture(scope='module')
def browser():
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        b = p.chromium.launch(executable_path=chromium(), args=FLAGS)
        yield b
        b.close()

class Cell:
    "A drawing cell in an open notebook: a hand, eyes, and the kernel's side of the story"
    def __init__(self, nb, n=0): self.nb, self.page, self.n = nb, nb.page, n
    def js(self, code, arg=None):
        return self.page.evaluate("([n, arg]) => { const d = document.querySelectorAll('.medsam-draw')[n].medsam; "
                                  'return ('+code+')(d, arg) }', [self.n, arg])
    def screen(self, x, y, pane=0):
        x, y = float(x), float(y)
        return self.js('(d, [x,y,p]) => { const r = d.view.canvas.getBoundingClientRect(), [ox,oy] = d.view.origin, s '
                       '= d.view.scale; return [r.left+p*d.view.size[0]/d.view.panes+ox+x*s, '
                       'r.top+oy+y*s*d.view.aspect] }', [x,y,pane])
    def drag(self, a, b, pane=0, steps=6, up=True, button='left'):
        m = self.page.mouse
        m.move(*self.screen(*a, pane))
        m.down(button=button)
        m.move(*self.screen(*b, pane), steps=steps)
        if up: m.up(button=button)
    def click(self, x, y): self.page.mouse.click(*self.screen(x, y))
    def box(self, b, **kw):
        self.drag(b[:2], b[2:], **kw)
        self.settle()
    def settle(self, masks=True):
        "Wait until the last gesture is answered and painted"
        self.page.wait_for_function("n => { const d = document.querySelectorAll('.medsam-draw')[n].medsam, a = "
                                    "d.model.get('answer'); return a.seq >= d.hand.seq && a.z === d.view.image.z && "
                                    "!d.model.get('status').startsWith('preparing') && !d.view.frame }", arg=self.n,
                                    timeout=60_000)
        self.page.wait_for_timeout(60)
    @property
    def prompts(self): return self.js('d => d.hand.prompts')
    @property
    def caption(self): return self.js('d => d.painter.caption.textContent')
    def said(self, text, timeout=60_000):
        says = ("([n, t]) => document.querySelectorAll('.medsam-draw')[n]"
                '.medsam.painter.caption.textContent.includes(t)')
        self.page.wait_for_function(says, arg=[self.n, text], timeout=timeout)
    def mask(self, object=9, pane=0):
        "(H,W) bool: the picture that is laid over the slice"
        got = self.js('''(d, [o,p]) => { const m = d.painter.masks[p].find(m => m.id === o); if (!m) return null
            const {width, height} = m.picture, a = m.picture.getContext('2d').getImageData(0, 0, width, height).data, out = []
            for (let i=0; i<width*height; i++) if (a[4*i+3]) out.push(i)
            return [height, width, out] }''', [object,pane])
        if got is None: return None
        m = np.zeros(got[0]*got[1], bool)
        m[got[2]] = True
        return m.reshape(got[:2])
    def pixels(self, pane=0):
        "(H,W,3): what the visible canvas shows at the centre of each image pixel"
        h, w, got = self.js('''(d, p) => { const c = d.view.canvas, k = c.width/d.view.size[0], [ox,oy] = d.view.origin, s = d.view.scale, {width, height} = d.view.image, a = c.getContext('2d').getImageData(0, 0, c.width, c.height).data, out = []
            for (let y=0; y<height; y++) for (let x=0; x<width; x++) { const px = Math.floor((p*d.view.size[0]/d.view.panes+ox+(x+.5)*s)*k), py = Math.floor((oy+(y+.5)*s*d.view.aspect)*k), i = 4*(py*c.width+px); out.push(a[i], a[i+1], a[i+2]) }
            return [height, width, out] }''', pane)
        return np.array(got, np.uint8).reshape(h, w, 3)
    def kernel(self, what='app'): return np.array(self.nb.ask(f'{what}.masks[{what}.canvas.z].tolist()'))
    def button(self, title): self.page.locator(f'button[title^="{title}"]').nth(self.n).click()
    def tool(self, name):
        self.page.locator('.widget-toggle-button', has_text=name).locator(f'text="{name}"').nth(self.n).click()
        self.page.wait_for_function('([n, t]) => '
                                    "document.querySelectorAll('.medsam-draw')[n].medsam.model.get('tool') === t",
                                    arg=[self.n, {'box':'box','diameter':'line','+ point':'foreground',
                                                  '− point':'background','outline':'outline','ruler':'ruler'}[name]])

def visit(browser, server, name, *cells, app='lab', **context):
    page = browser.new_context(**(dict(viewport=dict(width=1280, height=1000))|context)).new_page()
    nb = Notebook(page, server, server.notebook(name, *cells), app)
    nb.run()
    return nb

# a group of tests for each application, so that two workers share them (tests/conftest.py)
APPS = [
    pytest.param('lab', marks=pytest.mark.xdist_group('JupyterLab')),
    pytest.param('notebook', marks=pytest.mark.xdist_group('Notebook 7'))]

@pytest.fixture(scope='module', params=APPS)
def opened(browser, server, request):
    nb = visit(browser, server, f'one_{request.param}', 'from medsam_nb.draw import annotate', 'app = annotate()\napp',
               app=request.param)
    yield nb
    assert not nb.complaints, nb.complaints
    nb.close()

@pytest.fixture
def cell(opened):
    "The cell of a notebook that stays open, as it was at first"
    c = Cell(opened)
    opened.python('s = app.session; s.prompts = s.settled = {}; s.past, s.future = [], []; app.stop = True; '
                  "app.say(''); app.ui['window'].value = app.ui['window'].options[0][1]; app.ui['tool'].value = "
                  "'box'; app.ui['object'].value = 9; app.ui['opacity'].value = .45; app.ui['slice'].value = 9; "
                  'app.show(9)')
    c.js('d => { d.view.fit(); d.hand.ruler = null }')
    c.page.wait_for_function("() => { const d = document.querySelector('.medsam-draw').medsam; return d.view.image.z "
                             "=== 9 && !Object.keys(d.hand.prompts).length && d.model.get('tool') === 'box' }")
    c.settle()
    return c

def test_a_drawn_box_becomes_a_mask(cell):
    cell.box(GALL)
    assert np.abs(np.array(cell.prompts['9']['box'])-GALL).max()<=.6
    assert cell.nb.ask('app.prompts[0]["box"]')==cell.prompts['9']['box']
    m = cell.mask()
    assert m.any() and np.array_equal(m, cell.kernel()==9)
    dsc = cell.nb.ask("app.session.segment('pretrained', 9, 9).dsc")
    assert dsc>.9
    assert f'DSC {dsc:.3f}' in cell.caption
    assert 'gallbladder' in cell.caption
    assert 'predicted IoU' in cell.caption

def test_the_screen_shows_the_kernels_mask(cell):
    "The visible pixels, not only the picture behind them; boxes off, mask opaque"
    cell.nb.python("app.ui['opacity'].value = 1.; app.ui['contour'].value = False")
    cell.box(GALL)
    cell.js('d => { d.hand.prompts = {}; d.painter.draw() }')
    m, colour = cell.kernel()==9, np.array(bytearray.fromhex(cell.js('d => d.painter.object(9).colour')[1:]), int)
    painted = (np.abs(cell.pixels().astype(int)-colour).max(-1)<40)
    assert painted[binary_erosion(m)].all() and not painted[~binary_dilation(m)].any() and m.sum()>300
    cell.nb.python("app.ui['contour'].value = True")

def test_the_slice_is_shown_through_the_window(cell):
    cell.js("d => { d.model.set('contour', false); d.painter.draw() }")
    lo, hi = cell.nb.ask('app.canvas.window')
    a = np.array(cell.nb.ask('app.volume.array[9].tolist()'))
    want, got = np.clip((a-lo)/(hi-lo)*255, 0, 255), cell.pixels()[...,0]
    # where smoothing changes little
    flat = np.ptp(np.stack([np.roll(want, s, (0,1)) for s in ((0,1),(1,0),(0,-1),(-1,0),(0,0))]), axis=0)<6
    inner = np.s_[40:-40,40:-40]
    assert flat[inner].mean()>.15 and np.abs(got.astype(int)-want)[inner][flat[inner]].max()<12
    cell.js("d => { d.model.set('contour', true) }")

def test_the_mask_follows_while_the_button_is_down(cell):
    cell.drag(GALL[:2], GALL[2:], up=False, steps=10)
    cell.page.wait_for_function("() => { const d = document.querySelector('.medsam-draw').medsam; return "
                                'd.painter.answered >= 1 && d.painter.masks[0]?.length }', timeout=30_000)
    assert cell.mask().any() and cell.nb.ask('len(app.session.past)')==0
    cell.page.mouse.up()
    cell.settle()
    assert cell.nb.ask('len(app.session.past)')==1

def test_moving(cell):
    cell.box(GALL)
    b = np.array(cell.prompts['9']['box'])
    cell.drag((82,88), (92,80))
    cell.settle()
    assert np.abs(np.array(cell.prompts['9']['box'])-(b+[10,-8,10,-8])).max()<.6 and np.array_equal(cell.mask(),
        cell.kernel()==9)
    cell.drag((92,80), (-60,80))
    cell.settle()
    c = np.array(cell.prompts['9']['box'])
    assert c[0]==0 and np.isclose(c[2]-c[0], b[2]-b[0], atol=.05)    # stops at the edge, keeps its size

@pytest.mark.parametrize('handle,moves', [(0,(0,1)), (1,(1,2)), (2,(2,3)), (3,(0,3)), (4,(1,)), (5,(2,)), (6,(3,)),
                                          (7,(0,))])
def test_resizing(cell, handle, moves):
    cell.box(GALL)
    b = np.array(cell.prompts['9']['box'])
    x0, y0, x1, y1 = b
    at = [(x0,y0), (x1,y0), (x1,y1), (x0,y1), ((x0+x1)/2,y0), (x1,(y0+y1)/2), ((x0+x1)/2,y1), (x0,(y0+y1)/2)][handle]
    cell.drag(at, (at[0]+5,at[1]+6))
    cell.settle()
    want = b+np.array([5,6,5,6])*np.isin(np.arange(4), moves)
    assert np.abs(np.array(cell.prompts['9']['box'])-want).max()<.6 and np.array_equal(cell.mask(), cell.kernel()==9)

def test_a_click_draws_nothing(cell):
    cell.click(80, 80)
    cell.page.wait_for_timeout(200)
    assert cell.prompts=={} and cell.nb.ask('app.prompts')==[]

def test_the_keyboard(cell):
    key = cell.page.keyboard.press
    cell.box(GALL)
    b = np.array(cell.prompts['9']['box'])
    def now():
        cell.settle()
        return np.array(cell.prompts['9']['box'])
    for _ in range(3): key('ArrowRight')
    key('ArrowUp')
    assert np.allclose(now(), b+[3,-1,3,-1])
    key('Shift+ArrowDown')
    assert np.allclose(now(), b+[3,9,3,9])
    key('Alt+ArrowLeft')
    assert np.allclose(now(), b+[3,9,2,9])
    key('Alt+Shift+ArrowDown')
    assert np.allclose(now(), b+[3,9,2,19])
    assert np.array_equal(cell.mask(), cell.kernel()==9)
    key('Control+z')
    assert np.allclose(now(), b+[3,9,2,9])
    key('Control+Shift+z')
    assert np.allclose(now(), b+[3,9,2,19])
    key('Escape')
    cell.settle()
    assert cell.prompts=={} and cell.nb.ask('app.prompts')==[]
    key('Enter')
    assert np.allclose(now(), [96,96,160,160])
    # JupyterLab took none of the keys
    assert cell.nb.js('() => window.jupyterapp.shell.currentWidget.content.mode') in ('command',
        'edit') and cell.nb.js('() => window.jupyterapp.shell.currentWidget.content.widgets.length')==2
    key('PageDown')
    cell.said('slice 10 ')
    key('PageUp')
    cell.said('slice 9 ')

def test_every_control_is_reached_by_tab(cell):
    cell.page.locator('.widget-text input').first.focus()
    seen = set()
    for _ in range(40):
        cell.page.keyboard.press('Tab')
        seen.add(cell.nb.js("() => { const e = document.activeElement; return e.tagName+' '+(e.title || "
                            "e.getAttribute('aria-label') || e.textContent || e.type || '').trim().slice(0,12) }"))
    names = ' | '.join(seen)
    for want in ('CANVAS Slice', 'Undo', 'Redo', 'Remove', 'Use this box', 'Masks as NI', 'SELECT', 'checkbox'):
        assert want in names, (want, names)

def test_wheel_and_slider(cell):
    cell.page.mouse.move(*cell.screen(128,128))
    cell.page.mouse.wheel(0, 120)
    cell.page.wait_for_function("() => document.querySelector('.medsam-draw').medsam.view.image.z === 10")
    cell.settle()
    assert cell.nb.ask('[app.canvas.z, app.ui["slice"].value, app.canvas.image["z"]]')==[10,10,
        10] and 'slice 10 ' in cell.caption
    cell.page.mouse.wheel(0, -40)
    cell.page.wait_for_function("() => document.querySelector('.medsam-draw').medsam.view.image.z === 9")
    h = cell.page.locator('.widget-slider .noUi-handle').first
    h.focus()
    cell.page.keyboard.press('ArrowRight')
    cell.page.wait_for_function("() => document.querySelector('.medsam-draw').medsam.view.image.z === 10")
    got = cell.js('d => Array.from(d.painter.data)')
    assert np.array_equal(np.array(got).reshape(256,256), np.array(cell.nb.ask('app.volume.array[10].tolist()')))

def test_each_slice_keeps_its_prompt(cell):
    cell.box(GALL)
    first = cell.mask()
    cell.page.keyboard.press('PageDown')
    cell.said('slice 10 ')
    cell.settle()
    assert cell.prompts=={} and cell.mask() is None
    cell.box([70,70,95,105])
    cell.page.keyboard.press('PageUp')
    cell.said('slice 9 ')
    cell.settle()
    assert np.array_equal(cell.mask(), first) and len(cell.nb.ask('app.prompts'))==2

def test_zoom_and_pan_do_not_shift_anything(cell):
    x, y = cell.screen(80, 90)
    cell.page.mouse.move(x, y)
    cell.page.keyboard.down('Control')
    for _ in range(2): cell.page.mouse.wheel(0, -100)
    cell.page.keyboard.up('Control')
    assert cell.js('d => d.view.zoom')>2 and np.allclose(cell.screen(80, 90), (x, y), atol=1)
    a = cell.screen(80, 90)
    cell.drag((80,90), (85,94), button='middle')
    b = cell.screen(80, 90)
    assert np.hypot(*(np.array(b)-a))>10
    cell.box(GALL)
    assert np.abs(np.array(cell.prompts['9']['box'])-GALL).max()<.3 and np.array_equal(cell.mask(), cell.kernel()==9)
    cell.page.keyboard.press('0')
    assert cell.js('d => d.view.zoom')==1

def test_window_by_the_right_button(cell):
    before = cell.nb.ask('app.canvas.window')
    cell.drag((100,100), (140,100), button='right')
    cell.page.wait_for_timeout(300)
    after = cell.nb.ask('app.canvas.window')
    assert after[1]-after[0]>before[1]-before[0] and np.isclose(sum(after), sum(before), atol=1) and cell.prompts=={}
    # for the eye only
    cell.box(GALL)
    m = cell.mask()
    cell.nb.python(f'app.canvas.window = {before}')
    cell.settle()
    assert np.array_equal(cell.mask(), m)

def test_points(cell):
    cell.tool('+ point')
    cell.click(80, 85)
    cell.settle()
    cell.click(82, 95)
    cell.settle()
    cell.tool('− point')
    cell.click(110, 90)
    cell.settle()
    q = cell.prompts['9']
    assert q['labels']==[1,1,0] and np.abs(np.array(q['points'])-[[80,85],[82,95],
                                                                  [110,90]]).max()<.6 and '3 points' in cell.caption
    assert np.array_equal(cell.mask() if cell.mask() is not None else False, cell.kernel()==9)
    cell.page.keyboard.press('Backspace')
    cell.settle()
    assert cell.prompts['9']['labels']==[1,1] and cell.nb.ask('app.prompts[0]["labels"]')==[1,1]

def test_a_recist_diameter(cell):
    cell.tool('diameter')
    cell.drag((76,72), (88,106))
    cell.settle()
    line = cell.prompts['9']['line']
    mm = np.hypot(line[2]-line[0], line[3]-line[1])*cell.nb.ask('float(app.volume.spacing[1])')
    assert f'diameter {mm:.0f} mm' in cell.caption and np.array_equal(cell.mask(),
        cell.kernel()==9) and cell.mask().any()
    cell.drag(line[2:], (86,100))
    cell.settle()
    assert np.abs(np.array(cell.prompts['9']['line'][2:])-[86,100]).max()<.6 and cell.prompts['9']['line'][:2]==line[:2]

def test_a_diameter_and_points_by_keyboard(cell):
    cell.tool('diameter')
    cell.page.locator('.medsam-draw canvas').focus()
    cell.page.keyboard.press('Enter')
    cell.settle()
    assert cell.prompts['9']['line']==[96,128,160,128]
    cell.page.keyboard.press('ArrowDown')
    cell.page.keyboard.press('Alt+Shift+ArrowLeft')
    cell.settle()
    assert cell.prompts['9']['line']==[96,129,150,129]
    cell.page.keyboard.press('Escape')
    cell.settle()
    cell.tool('+ point')
    cell.page.locator('.medsam-draw canvas').focus()
    cell.page.keyboard.press('Enter')
    cell.page.keyboard.press('Shift+ArrowUp')
    cell.settle()
    assert cell.prompts['9']['points']==[[128,118]] and cell.nb.ask('app.prompts[0]["points"]')==[[128,118]]

# ---- freehand outlines ----

def ring(n=48):
    "A hand's way round the phantom's gallbladder on slice 9, image pixels (n,2)"
    x0, y0, x1, y1 = GALL
    t = np.linspace(0, 2*np.pi, n, endpoint=False)
    return np.stack([(x0+x1)/2+(x1-x0)/2*np.cos(t), (y0+y1)/2+(y1-y0)/2*np.sin(t)], 1)

def stroke(cell, points, up=True):
    "Draw through points with the button down"
    mouse = cell.page.mouse
    mouse.move(*cell.screen(*points[0]))
    mouse.down()
    for p in points[1:]: mouse.move(*cell.screen(*p))
    if up: mouse.up()

def coloured(cell):
    "(H,W) bool: where the screen has the colour of the gallbladder; masks are made invisible first"
    cell.js("d => { d.model.set('opacity', 0); d.painter.draw() }")
    colour = np.array(bytearray.fromhex(cell.js('d => d.painter.object(9).colour')[1:]), int)
    return np.abs(cell.pixels().astype(int)-colour).max(-1)<60

@pytest.fixture
def outlined(cell):
    "The cell with the outline tool in hand"
    cell.tool('outline')
    cell.page.locator('.medsam-draw canvas').focus()
    return cell

def test_a_freehand_ring_becomes_a_mask(outlined):
    stroke(outlined, ring())
    outlined.settle()
    q = outlined.prompts['9']
    assert q['kind']=='outline' and len(q['outline'])>20
    assert [p['kind'] for p in outlined.nb.ask('app.prompts')]==['outline']
    assert outlined.nb.ask("app.prompts[0]['outline']")==q['outline']
    assert outlined.mask().any() and np.array_equal(outlined.mask(), outlined.kernel()==9)
    assert f"outline of {len(q['outline'])} points" in outlined.caption and '…' not in outlined.caption

def test_the_stroke_of_an_outline_is_seen(outlined):
    "Pixels of the object's colour lie all round the ring that was drawn, and nowhere else"
    stroke(outlined, ring())
    outlined.settle()
    ys, xs = np.nonzero(coloured(outlined))
    far = np.linalg.norm(ring(400)-np.stack([xs, ys], 1)[:,None]-.5, axis=-1).min(1)
    x0, y0, x1, y1 = GALL
    quarters = set(zip(xs>(x0+x1)/2, ys>(y0+y1)/2))
    assert len(xs)>20 and far.max()<2 and len(quarters)==4

def test_an_outline_is_followed_while_the_button_is_down(outlined):
    stroke(outlined, ring()[:30], up=False)
    outlined.page.wait_for_function("n => document.querySelectorAll('.medsam-draw')[n].medsam.painter.masks[0]?.length",
                                    arg=outlined.n, timeout=30_000)
    assert outlined.mask().any() and outlined.nb.ask('len(app.session.past)')==0
    outlined.page.mouse.up()
    outlined.settle()
    assert outlined.nb.ask('len(app.session.past)')==1

def test_a_stroke_without_area_keeps_the_outline_that_was_there(outlined):
    stroke(outlined, ring())
    outlined.settle()
    before = outlined.prompts
    stroke(outlined, [(120,120), (130,120), (140,120), (150,120)])
    outlined.settle()
    assert outlined.prompts==before and outlined.nb.ask('len(app.session.past)')==1

def test_an_outline_by_keyboard(outlined):
    "Enter makes an octagon in the middle, arrows move it as a whole, Escape removes it"
    key = outlined.page.keyboard.press
    key('Enter')
    outlined.settle()
    made = np.array(outlined.prompts['9']['outline'])
    assert made.shape==(8,2) and np.allclose(made.mean(0), 128) and outlined.mask() is not None
    key('ArrowRight')
    key('Shift+ArrowUp')
    outlined.settle()
    assert np.allclose(outlined.prompts['9']['outline'], made+[1,-10], atol=.02)
    assert np.allclose(outlined.nb.ask("app.prompts[0]['outline']"), made+[1,-10], atol=.02)
    key('Escape')
    outlined.settle()
    assert outlined.prompts=={} and outlined.nb.ask('app.prompts')==[]

def test_a_drag_back_to_nothing_and_escape(cell):
    cell.box(GALL)
    b = cell.prompts
    m = cell.page.mouse
    cell.drag((150,150), (190,190), up=False)
    m.move(*cell.screen(150,150), steps=4)
    m.up()
    cell.settle()
    assert cell.prompts==b and cell.nb.ask('len(app.session.past)')==1
    cell.drag((150,150), (190,190), up=False)
    cell.page.keyboard.press('Escape')
    m.up()
    cell.settle()
    assert cell.prompts==b and cell.nb.ask('len(app.session.past)')==1

def test_the_wheel_waits_while_a_box_is_drawn(cell):
    cell.drag((150,150), (190,190), up=False)
    cell.page.mouse.wheel(0, 120)
    cell.page.wait_for_timeout(200)
    cell.page.mouse.up()
    cell.settle()
    assert cell.nb.ask('[p["z"] for p in app.prompts]')==[9] and cell.js('d => d.view.image.z')==9

def test_nothing_is_lost_while_the_kernel_is_busy(cell):
    cell.nb.python('import threading, time\ndef hold():\n    with app.lock: '
                   'time.sleep(1.5)\nthreading.Thread(target=hold).start(); time.sleep(.1)')
    cell.drag(GALL[:2], GALL[2:])
    cell.drag((150,150), (190,190))
    cell.page.keyboard.press('Control+z')
    cell.settle()
    assert cell.nb.ask('len(app.session.past)')==1 and np.abs(np.array(cell.prompts['9']['box'])-GALL).max()<.6

def test_scores_in_the_caption_belong_to_the_box_in_view(cell):
    "Until the mask of a new box is there the caption says … and not the old mask's scores"
    cell.box(GALL)
    assert 'DSC' in cell.caption and '…' not in cell.caption
    cell.nb.python('import threading, time\ndef hold():\n    with app.lock: '
                   'time.sleep(2)\nthreading.Thread(target=hold).start(); time.sleep(.1)')
    cell.drag((150,150), (190,190))
    cell.page.wait_for_timeout(300)
    assert 'box 150' in cell.caption
    assert '…' in cell.caption
    assert 'DSC' not in cell.caption
    assert 'IoU' not in cell.caption
    cell.settle()
    assert 'DSC' in cell.caption and '…' not in cell.caption

def test_the_ruler_changes_nothing(cell):
    cell.tool('ruler')
    cell.drag((50,50), (90,80))
    assert np.isclose(cell.js('d => parseFloat(d.painter.length(d.hand.ruler))'),
                      50*cell.nb.ask('float(app.volume.spacing[1])'), atol=1) and cell.nb.ask('app.prompts')==[]

def test_several_objects(cell):
    cell.box(GALL)
    cell.page.locator('select').filter(has_text='gallbladder').select_option('liver')
    cell.page.wait_for_function("() => document.querySelector('.medsam-draw').medsam.hand.active === 1")
    cell.box([30,88,100,180])
    assert set(cell.prompts)=={'1','9'} and 'liver' in cell.caption
    k = cell.kernel()
    assert {1,9}<=set(np.unique(k)) and cell.mask(1).sum()>=(k==1).sum() and np.array_equal(cell.mask(9), k==9)

def test_carrying_and_undo(cell):
    cell.box(GALL)
    cell.button('Use this box')
    cell.said('carried from', 120_000)
    n = len(cell.nb.ask('app.prompts'))
    assert n>6
    truth, mask = (np.array(cell.nb.ask(f'({o} == 9).any((1,2)).tolist()'))
                   for o in ('app.session.label.array', 'app.masks'))
    assert (mask&truth).sum()>=.8*truth.sum() and (mask&~truth).sum()<=3
    cell.button('Undo')
    cell.page.wait_for_timeout(400)
    assert len(cell.nb.ask('app.prompts'))==1
    cell.button('Redo')
    cell.page.wait_for_timeout(400)
    assert len(cell.nb.ask('app.prompts'))==n

def test_saving(cell, tmp_path):
    cell.box(GALL)
    path = tmp_path/'ünï mask.nii.gz'
    field = cell.page.locator('.widget-text input').last
    field.fill(str(path))
    field.press('Enter')
    cell.button('Masks as NIfTI')
    cell.said('wrote')
    saved = read_volume(path, kind='label').array
    assert (np.array_equal(saved[9]==9,
                          cell.mask()))
    assert cell.nb.ask('[int(v) for v in app.masks.nonzero()[0]]')==saved.nonzero()[0].tolist()
    cell.button('Masks as NIfTI')
    cell.said('exists already')
    data = json.loads((tmp_path/'ünï mask.prompts.json').read_text())
    assert data['prompts'][0]['box']==cell.prompts['9']['box']

def test_what_a_screen_reader_hears(cell):
    cell.box(GALL)
    role = cell.page.locator('.medsam-spoken')
    assert role.get_attribute('aria-live')=='polite'
    assert 'Enter makes a box' in cell.page.locator('.medsam-draw canvas').get_attribute('aria-label')
    t = role.text_content()
    assert all(w in t for w in ('slice 9', 'gallbladder', 'box', 'DSC'))

def test_a_wrong_prompt_is_told_in_the_cell(cell):
    cell.js("d => d.hand.draft({kind:'box', box:[9,9,1,1]}, true)")
    cell.said('inverted')
    assert cell.nb.ask('app.prompts')==[]

def test_touch(browser, server):
    nb = visit(browser, server, 'touch', 'from medsam_nb.draw import annotate', 'app = annotate()\napp',
               viewport=dict(width=800, height=1000), has_touch=True)
    c = Cell(nb)
    c.page.locator('.medsam-draw canvas').scroll_into_view_if_needed()
    cdp = c.page.context.new_cdp_session(c.page)
    def touch(kind, *points):
        cdp.send('Input.dispatchTouchEvent', dict(type=kind,
                                                  touchPoints=[dict(x=x, y=y, id=i) for i, (x,y) in enumerate(points)]))
    a, b = c.screen(*GALL[:2]), c.screen(*GALL[2:])
    touch('touchStart', a)
    touch('touchMove', [(a[0]+b[0])/2, (a[1]+b[1])/2])
    touch('touchMove', b)
    touch('touchEnd')
    c.settle()
    assert np.abs(np.array(c.prompts['9']['box'])-GALL).max()<1 and np.array_equal(c.mask(), c.kernel()==9)
    m = c.screen(200, 200)
    before = c.prompts
    touch('touchStart', [m[0]-20,m[1]])
    touch('touchStart', [m[0]-20,m[1]], [m[0]+20,m[1]])
    touch('touchMove', [m[0]-50,m[1]], [m[0]+50,m[1]])
    touch('touchEnd')
    c.settle()
    assert 2<c.js('d => d.view.zoom')<3 and c.prompts==before
    nb.close()

@pytest.mark.parametrize('app', APPS)
def test_reload_and_restart(browser, server, app):
    """In JupyterLab and in Notebook 7: what was drawn survives a reload of the page; a restarted kernel is told, not
    suffered"""
    nb = visit(browser, server, f'again_{app}', 'from medsam_nb.draw import annotate', 'app = annotate()\napp', app=app)
    c = Cell(nb)
    c.box(GALL)
    m, prompts = c.mask(), c.prompts
    assert np.array_equal(m, c.kernel()==9)
    nb.save()
    c.page.wait_for_timeout(500)
    nb.url = nb.url.replace('&reset', '')
    nb.open()
    c.page.wait_for_function("() => document.querySelector('.medsam-draw')?.medsam?.painter?.masks?.[0]?.length",
                             timeout=60_000)
    assert c.prompts==prompts and np.array_equal(c.mask(), m)
    c.drag((82,88), (92,88))
    c.settle()
    assert np.array_equal(c.mask(), c.kernel()==9) and c.prompts!=prompts
    nb.js('async () => { await window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.restart() }')
    c.said('run its cell again')
    nb.close()

def test_two_cells_on_one_page_do_not_meet(browser, server):
    nb = visit(browser, server, 'two', 'from medsam_nb.draw import annotate', 'a = annotate(height=300)\na',
               'b = annotate(height=300)\nb')
    nb.page.wait_for_function("() => document.querySelectorAll('.medsam-draw').length === 2 && "
                              "[...document.querySelectorAll('.medsam-draw')].every(e => e.medsam?.view?.image)",
                              timeout=60_000)
    one, two = Cell(nb, 0), Cell(nb, 1)
    one.page.locator('.medsam-draw canvas').nth(0).scroll_into_view_if_needed()
    one.box(GALL)
    two.page.locator('.medsam-draw canvas').nth(1).scroll_into_view_if_needed()
    two.page.wait_for_timeout(300)
    two.box([60,60,110,120])
    assert np.array_equal(one.mask(), one.kernel('a')==9) and np.array_equal(two.mask(),
        two.kernel('b')==9) and one.prompts!=two.prompts
    nb.close()

def test_pretrained_against_fine_tuned(browser, server):
    make = '''import torch; from medsam_nb.draw import annotate; from medsam_nb.sam import load_model
sam = load_model('lite', device='cpu'); s = sam.state_dict()
torch.save({k: v*1.3 if 'output_hypernetworks' in k else v for k, v in s.items()}, 'tuned.pth')'''
    nb = visit(browser, server, 'models', make, "app = annotate(checkpoint='tuned.pth')\napp")
    c = Cell(nb)
    c.box(GALL)
    def view(name):
        c.page.locator('.widget-toggle-button', has_text=name).first.click()
        c.page.wait_for_function("n => document.querySelector('.medsam-draw').medsam.model.get('answer').panes.map(p "
                                 '=> p.name).join() === n', arg={'both':'pretrained,fine-tuned'}.get(name, name))
        c.settle()
    tuned = c.mask()
    assert np.array_equal(tuned, c.kernel()==9)
    view('pretrained')
    plain = c.mask()
    assert np.array_equal(plain, c.kernel()==9)
    view('both')
    assert np.array_equal(c.mask(pane=0), plain) and np.array_equal(c.mask(pane=1),
                                                                    tuned) and 'fine-tuned: ' in c.caption
    c.drag((140,140), (190,190), pane=1)
    c.settle()
    assert np.abs(np.array(c.prompts['9']['box'])-[140,140,190,190]).max()<1
    nb.close()

def luminance(c):
    return np.dot([.2126,.7152,.0722], [v/12.92 if v<=.03928 else ((v+.055)/1.055)**2.4 for v in np.array(c)/255])

def test_themes_and_widths(cell):
    "Light and dark, 1280 and 800 px: nothing sticks out, and the caption can be read (contrast of at least 4.5)"
    cell.box(GALL)
    for width in (1280, 800):
        cell.page.set_viewport_size(dict(width=width, height=1000))
        cell.page.wait_for_timeout(300)
        for theme in ('JupyterLab Dark', 'JupyterLab Light'):
            cell.nb.js("async t => { await window.jupyterapp.commands.execute('apputils:change-theme', {theme:t}) }",
                       theme)
            cell.page.wait_for_function('t => document.body.dataset.jpThemeLight === String(t)',
                                        arg=str(theme.endswith('Light')).lower())
            cell.page.wait_for_timeout(500)
            out = cell.nb.js('''() => { const e = document.querySelector('.medsam-draw').closest('.jp-OutputArea-output'), r = e.getBoundingClientRect()
                return [...e.querySelectorAll('canvas,button,input,select')].filter(x => { const b = x.getBoundingClientRect(); return b.width && (b.right > r.right+1 || b.left < r.left-1) }).map(x => x.outerHTML.slice(0,80)) }''')
            fg, bg = cell.nb.js('''() => { const c = document.querySelector('.medsam-caption'); let b = c; while (b && getComputedStyle(b).backgroundColor === 'rgba(0, 0, 0, 0)') b = b.parentElement
                return [getComputedStyle(c).color, getComputedStyle(b).backgroundColor].map(s => s.match(/[0-9.]+/g).map(Number)) }''')
            alpha = fg[3] if len(fg)>3 else 1
            a, b = sorted((luminance(np.array(fg[:3])*alpha+np.array(bg[:3])*(1-alpha)), luminance(bg[:3])))
            assert not out and (b+.05)/(a+.05)>4.5, (theme, width, out, fg, bg)
    cell.page.set_viewport_size(dict(width=1280, height=1000))
    cell.page.wait_for_timeout(300)

@pytest.mark.real
def test_the_gallbladder_of_a_real_scan(browser, server, real_data):
    r = real_data/'abdomen_ct'
    nb = visit(browser, server, 'real', 'from medsam_nb.draw import annotate',
               f"app = annotate({str(r)!r}, names={{9:'gallbladder'}})\napp")
    c = Cell(nb)
    z, box = nb.ask('(lambda z, m: [z, [float(v) for v in m]])(app.canvas.z, '
                    "__import__('medsam_nb.prompt').prompt.mask_to_box(app.session.label.array[app.canvas.z] == 9))")
    c.box([box[0]-1.5, box[1]-1, box[2]+1, box[3]+1.5])
    d = nb.ask(f"app.session.segment('pretrained', 9, {z}).dsc")
    print(f'\nabdomen_ct, gallbladder, slice {z}, box drawn by mouse 1 to 1.5 px outside the organ, lite: DSC {d:.3f}')
    assert d>=.85 and np.array_equal(c.mask(), c.kernel()==9)
    nb.close()

def test_wrong_input_is_a_sentence_in_the_cell(browser, server):
    nb = Notebook(browser.new_context().new_page(), server,
                  server.notebook('wrong', 'from medsam_nb.draw import annotate\nannotate("nowhere")'))
    nb.js("async () => { await window.jupyterapp.commands.execute('notebook:run-all-cells') }")
    out = nb.page.locator('.jp-OutputArea-output')
    out.first.wait_for(timeout=60_000)
    t = out.first.inner_text()
    assert t.startswith('there is nothing at nowhere') and 'Traceback' not in t and len(t.splitlines())==1
    nb.close()


# ---- make lab ----
@pytest.mark.skipif(not shutil.which('make'), reason='there is no make on this machine')
def test_make_lab_opens_the_index(browser, root, tmp_path):
    """`make lab` as people type it: JupyterLab asks the system's browser for the index, and Chromium shows it with its
    links"""
    if not (root/'.venv'/'.made').exists(): pytest.skip('make lab needs .venv, which make env makes')
    before = (root/'nbs'/'index.ipynb').read_bytes()
    own = settings(tmp_path)
    (tmp_path/'config'/'jupyter_server_config.json').write_text(json.dumps(dict(ServerApp=dict(allow_root=True,
        port=0), LabApp=dict(extension_manager='readonly', expose_app_in_browser=True))))
    (open_ := tmp_path/'browser').write_text(f'#!/bin/sh\nprintf %s "$1" > {tmp_path}/asked.tmp && mv '
                                             f'{tmp_path}/asked.tmp {tmp_path}/asked\n')
    open_.chmod(0o755)
    env = {k: v for k, v in os.environ.items() if k not in ('MAKEFLAGS', 'MAKELEVEL',
                                                            'MFLAGS')} | own | dict(BROWSER=f'{open_} %s',
                                                                PYTHONWARNINGS='ignore')
    with open(tmp_path/'log', 'wb') as log:
        p = subprocess.Popen(['make', 'lab'], cwd=root, env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        end = time.monotonic()+90
        while not (tmp_path/'asked').exists():
            assert p.poll() is None and time.monotonic()<end, (tmp_path/'log').read_text()[-3000:]
            time.sleep(.2)
        asked = (tmp_path/'asked').read_text()
        page = browser.new_page()
        page.goto(asked, wait_until='domcontentloaded')   # a file that leads to the server, with its token
        page.wait_for_url(re.compile('/lab/tree/nbs/index.ipynb'), timeout=60_000)
        page.locator('.jp-RenderedMarkdown h1', has_text='medsam_nb').first.wait_for(timeout=60_000)
        page.locator('.jp-RenderedMarkdown a', has_text='Draw a box').first.click()
        page.locator('.lm-TabBar-tabLabel', has_text='draw_a_box.ipynb').first.wait_for(timeout=30_000)
        page.close()
        # the addresses it prints, for those whose browser is elsewhere
        assert '/lab/tree/nbs/index.ipynb?token=' in (tmp_path/'log').read_text()
    finally:
        os.killpg(p.pid, signal.SIGTERM)
        try: p.wait(10)
        except subprocess.TimeoutExpired: os.killpg(p.pid, signal.SIGKILL)
    assert (root/'nbs'/'index.ipynb').read_bytes()==before   # looking changes nothing
