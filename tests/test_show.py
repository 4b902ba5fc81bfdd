"What would break the flow of chapter 01: the half pixel, colours for everyone, and refusals."
import matplotlib
matplotlib.use('Agg')
import numpy as np, pytest, torch
import matplotlib.pyplot as plt
from hypothesis import HealthCheck, given, settings, strategies as st
from hypothesis.extra.numpy import arrays
from skimage.color import rgb2lab
from medsam_nb.core import InputError
from medsam_nb.show import *
from medsam_nb.show import _outline

masks = arrays(bool, st.tuples(st.integers(1,12), st.integers(1,12))).filter(lambda m: m.any())
quick = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])

@pytest.fixture(autouse=True)
def no_figures_left():
    yield
    plt.close('all')

def tight(m):
    r,c = np.nonzero(m)
    return np.array([c.min(), r.min(), c.max()+1, r.max()+1], np.float32)

def render(ax, shape, k):
    "The axes as pixels, k screen pixels to an image pixel, (H*k,W*k,3)"
    fig = ax.figure
    fig.set_layout_engine('none'); fig.set_dpi(100); fig.set_size_inches(shape[1]*k/100, shape[0]*k/100)
    ax.set_position([0,0,1,1]); ax.set_title('')
    fig.canvas.draw()
    return np.asarray(fig.canvas.buffer_rgba())[...,:3].astype(int)

# --- geometry -------------------------------------------------------------------------------------
@quick
@given(masks)
def test_tight_box_encloses_exactly_the_pixels(m):
    ax = show_box(tight(m), show_image(m))
    b = ax.patches[0].get_bbox()
    r,c = np.indices(m.shape) # imshow centres pixels on whole numbers
    inside = (c-.5>=b.x0) & (c+.5<=b.x1) & (r-.5>=b.y0) & (r+.5<=b.y1)
    rows,cols = m.any(1), m.any(0)
    want = np.outer(np.maximum.accumulate(rows) & np.maximum.accumulate(rows[::-1])[::-1], np.maximum.accumulate(cols) & np.maximum.accumulate(cols[::-1])[::-1])
    assert (inside==want).all()
    plt.close('all')

@pytest.mark.parametrize('where', [(2,6,3,9), (0,8,0,12), (7,8,11,12)])
def test_the_painted_box_lies_on_the_edges(where):
    k, m = 20, np.zeros((8,12), bool)
    r0,r1,c0,c1 = where
    m[r0:r1,c0:c1] = True
    out = render(show_box(tight(m), show_image(np.zeros(m.shape, np.uint8)), color='lime'), m.shape, k)
    rr,cc = np.nonzero((out[...,1]>128) & (out[...,0]<128))
    # a line of 1.5 points is 2 screen pixels wide, half of it on either side of the edge, and cut at the image's border
    assert abs(rr.min()-r0*k)<=2 and abs(rr.max()+1-r1*k)<=2 and abs(cc.min()-c0*k)<=2 and abs(cc.max()+1-c1*k)<=2

@quick
@given(masks)
def test_outline_is_the_border_of_the_pixels(m):
    o = _outline(m)
    p = np.pad(m, 1).astype(int)
    assert len(o)==np.abs(np.diff(p, axis=0)).sum()+np.abs(np.diff(p, axis=1)).sum() # the perimeter
    assert (np.abs(o[:,0]-o[:,1]).sum(-1)==1).all()
    assert (o.min((0,1))==tight(m)[:2]-.5).all() and (o.max((0,1))==tight(m)[2:]-.5).all()
    for a,b in o[:20]: # each side parts a pixel of the mask from one that is not
        x,y = (a+b)/2
        sides = [(int(np.floor(y+.5)), int(x+d)) for d in (-.5,.5)] if a[0]==b[0] else [(int(y+d), int(np.floor(x+.5))) for d in (-.5,.5)]
        assert sum(bool(p[r+1,c+1]) for r,c in sides)==1

def test_filled_mask_paints_its_pixels_and_no_other():
    m = np.zeros((8,12), bool); m[2:5,3:7] = True; m[7,11] = True
    out = render(show_mask(m, show_image(np.zeros(m.shape, np.uint8)), color='red', alpha=1), m.shape, 10)
    assert ((out[5::10,5::10,0]>200)==m).all() and ((out[...,0]>128)==np.kron(m, np.ones((10,10), bool))).mean()>.995

def test_points_and_lines_are_half_a_pixel_back():
    ax = show_image(np.zeros((20,30)))
    show_points([[3,4],[5,6]], [1,0], ax); show_line([1,2,11,2], ax)
    assert [c.get_offsets().tolist() for c in ax.collections]==[[[2.5,3.5]], [[4.5,5.5]]]
    assert ax.lines[0].get_xydata().tolist()==[[.5,1.5],[10.5,1.5]]
    show_line([4,4,4,4], ax) # a line of no length is a point, not a crash

def test_drawing_on_top_does_not_move_the_view():
    ax = show_image(np.zeros((20,30)))
    before = ax.get_xlim(), ax.get_ylim()
    show_slice(np.zeros((20,30)), np.ones((20,30), int), [-5,-5,40,50], [[35,2]], [-9,0,40,40], ax=ax)
    show_mask(np.ones((20,30), bool), ax, contour=True)
    assert (ax.get_xlim(), ax.get_ylim())==before==((-.5,29.5), (19.5,-.5))

# --- colours --------------------------------------------------------------------------------------
# red and green blindness, G. M. Machado et al., IEEE TVCG 2009, severity 1, linear RGB
DEUTAN = np.array([[.367322,.860646,-.227968], [.280085,.672501,.047413], [-.011820,.042940,.968881]])
PROTAN = np.array([[.152286,1.052583,-.204868], [.114503,.786281,.099216], [-.003882,-.048116,1.051998]])
def seen(c, M):
    lin = np.where(c<=.04045, c/12.92, ((c+.055)/1.055)**2.4)@M.T
    lin = lin.clip(0, 1)
    return np.where(lin<=.0031308, lin*12.92, 1.055*lin**(1/2.4)-.055)

@pytest.mark.parametrize('M,least', [(np.eye(3), 30), (DEUTAN, 15), (PROTAN, 15)])
def test_colours_can_be_told_apart(M, least):
    assert len(COLORS)==13 and all(len(c)==3 and all(0<=v<=1 for v in c) for c in COLORS)
    lab = rgb2lab(seen(np.array(COLORS), M)[None])[0]
    d = np.linalg.norm(lab[:,None]-lab[None], axis=-1)+1000*np.eye(13)
    assert d.min()>least, np.unravel_index(d.argmin(), d.shape)
    assert np.hypot(lab[:,1], lab[:,2]).min()>=18 # far from every grey
    assert lab[:,0].min()>40 # not dark

@quick
@given(st.lists(st.integers(0,300), min_size=1, max_size=12), st.sampled_from([np.uint8, np.uint16, np.int64, np.float32]))
def test_a_label_has_one_colour_whatever_else_is_there(values, dtype):
    m = np.array([values]).astype(dtype)
    rgba = show_mask(m, alpha=.5).images[-1].get_array()
    for v,c in zip(m[0], rgba[0]): assert tuple(c)==((0,0,0,0) if v==0 else (*COLORS[(int(v)-1)%13], .5))
    plt.close('all')

def test_mask_colours():
    m = np.array([[0,1,2]])
    assert (show_mask(m, color='red').images[-1].get_array()[0,1:,:3]==(1,0,0)).all()
    assert show_mask(np.zeros((3,3), bool)).images[-1].get_array()[...,3].max()==0
    ax = show_mask(m, contour=True)
    assert [tuple(c.get_colors()[0][:3]) for c in ax.collections]==COLORS[:2]

# --- images, grids, panels ------------------------------------------------------------------------
@pytest.mark.parametrize('im', [np.zeros((5,6), np.uint8), np.zeros((5,6), bool), np.full((5,6), np.nan, np.float32), np.zeros((5,6,3), np.uint8),
                                np.zeros((5,6,1)), np.zeros((5,6), np.int16)-1024, torch.zeros(5,6), np.zeros((5,6,4))])
def test_images(im): assert show_image(im).images[0].get_array().shape[:2]==(5,6)

def test_grey_scale():
    im = np.full((5,6), 100, np.uint8)
    assert show_image(im).images[0].get_clim()==(0,255)
    assert show_image(im, vmin=90, vmax=110).images[0].get_clim()==(90,110)
    hu = [np.full((5,6), v, np.int16) for v in (-1000, 40, 300)]
    assert {ax.images[0].get_clim() for ax in show_grid(hu).axes}=={(-1000,300)}
    assert {ax.images[0].get_clim() for ax in show_grid(hu, vmin=-160, vmax=240).axes}=={(-160,240)}

def test_draws_into_the_axes_given_and_returns_them():
    fig,axs = plt.subplots(1,2)
    im = np.zeros((5,6))
    for f in (lambda ax: show_image(im, ax), lambda ax: show_mask(im>0, ax), lambda ax: show_box([0,0,1,1], ax), lambda ax: show_points([1,1], None, ax),
              lambda ax: show_line([0,0,1,1], ax), lambda ax: show_slice(im, ax=ax)): assert f(axs[0]) is axs[0]
    assert plt.get_fignums()==[fig.number] and not axs[1].has_data()

def test_box_label(): assert show_box([1,1,3,3], show_image(np.zeros((5,6))), label='x').texts[0].get_text()=='x'

def test_grid_shapes():
    assert len(show_grid(np.zeros((7,5,6)), ncols=3).axes)==7
    assert len(show_grid([np.zeros((5,6))], ncols=9).axes)==1
    assert len(show_grid([np.zeros((5,6)), np.zeros((8,3,3), np.uint8)]).axes)==2

def test_panels_with_two_decoders():
    im, gt = np.zeros((40,50), np.uint8), np.zeros((40,50), np.uint8)
    gt[10:20,15:30] = 1
    a,b = gt.copy(), gt.astype(bool)
    a[10:20,10:15] = 1
    fig = show_panels(im, tight(gt), gt, {'SAM, DSC 0.86':a, 'tuned, DSC 1.00':b}, zoom=5)
    assert [ax.get_title() for ax in fig.axes]==['original', 'oracle box', 'ground truth', 'SAM, DSC 0.86', 'tuned, DSC 1.00']
    assert [len(ax.patches) for ax in fig.axes]==[0,1,0,0,0]
    drawn = [ax.images[-1].get_array()[...,3]>0 for ax in fig.axes[2:]]
    assert (drawn[0]==(gt>0)).all() and (drawn[1]==(a>0)).all() and (drawn[2]==b).all()
    assert [len(ax.collections) for ax in fig.axes]==[0,0,0,1,1] # the truth's outline on each mask
    assert fig.axes[0].get_xlim()==(-.5,49.5) and all((ax.get_xlim(), ax.get_ylim())==((9.5,34.5), (24.5,4.5)) for ax in fig.axes[1:])
    fig.canvas.draw()
    assert len(show_panels(im, tight(gt), gt, {}).axes)==3

# --- refusals -------------------------------------------------------------------------------------
ok = np.zeros((5,6))
@pytest.mark.parametrize('f,match', [
    (lambda: show_image(np.zeros((3,64,64))), 'channels come last'), (lambda: show_image(np.zeros(5)), r'shape \(5,\)'), (lambda: show_image(np.zeros((2,3,4,5))), r'\(2, 3, 4, 5\)'),
    (lambda: show_mask(ok+.5), 'thresholded first'), (lambda: show_mask(ok-1), 'thresholded first'), (lambda: show_mask(ok*np.nan), 'thresholded first'),
    (lambda: show_mask(np.zeros((2,5,6))), r'give \(H,W\)'), (lambda: show_mask(np.zeros((6,5)), show_image(ok)), 'one grid'),
    (lambda: show_box([1,2,3]), '4 finite numbers'), (lambda: show_box([1,2,np.nan,4]), '4 finite'), (lambda: show_box([5,5,2,2]), 'not width and height'),
    (lambda: show_points([1,2,3]), r'\(n,2\)'), (lambda: show_points([[1,2]], [2]), 'a 1 or a 0'), (lambda: show_line([[1,2],[3,4]]), '4 finite'),
    (lambda: show_grid([]), 'list is empty'), (lambda: show_grid([ok], masks=[]), '1 images came with 0 masks'),
    (lambda: show_panels(ok, [0,0,1,1], np.zeros((6,5)), {}), 'one grid')])
def test_refusals(f, match):
    with pytest.raises(InputError, match=match): f()
