"What would break the flow of chapter 01: the half pixel, colours for everyone, and refusals"
import matplotlib
matplotlib.use('Agg')
import numpy as np, pytest, torch
import matplotlib.pyplot as plt
from hypothesis import HealthCheck, given, settings, strategies as st
from hypothesis.extra.numpy import arrays
from matplotlib.colors import to_rgb
from skimage.color import rgb2lab
from medsam_nb.core import InputError
from medsam_nb.show import *

masks = arrays(bool, st.tuples(st.integers(1, 12), st.integers(1, 12))).filter(lambda m: m.any())
quick = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])

@pytest.fixture(autouse=True)
def no_figures_left():
    yield
    plt.close('all')

def tight(m):
    r,c = np.nonzero(m)
    return np.array([c.min(), r.min(), c.max()+1, r.max()+1], np.float32)

def black(shape): return show_image(np.zeros(shape, np.uint8))

def render(ax, shape, k):
    "The axes as pixels, k screen pixels to an image pixel, (H*k,W*k,3)"
    fig = ax.figure
    fig.set_layout_engine('none')
    fig.set_dpi(100)
    fig.set_size_inches(shape[1]*k/100, shape[0]*k/100)
    ax.set_position([0,0,1,1])
    ax.set_title('')
    fig.canvas.draw()
    return np.asarray(fig.canvas.buffer_rgba())[...,:3].astype(int)

# --- geometry -------------------------------------------------------------------------------------
def between(v):
    "True from the first to the last true value of `v`"
    return np.maximum.accumulate(v) & np.maximum.accumulate(v[::-1])[::-1]

@quick
@given(masks)
def test_tight_box_encloses_exactly_the_pixels(m):
    b = show_box(tight(m), show_image(m)).patches[0].get_bbox()
    r,c = np.indices(m.shape) # imshow centres pixels on whole numbers
    across = (c-.5>=b.x0) & (c+.5<=b.x1)
    down = (r-.5>=b.y0) & (r+.5<=b.y1)
    assert ((across&down)==np.outer(between(m.any(1)), between(m.any(0)))).all()
    plt.close('all')

@pytest.mark.parametrize('where', [(2,6,3,9), (0,8,0,12), (7,8,11,12)])
def test_the_painted_box_lies_on_the_edges(where):
    k = 20
    m = np.zeros((8,12), bool)
    r0,r1,c0,c1 = where
    m[r0:r1,c0:c1] = True
    out = render(show_box(tight(m), black(m.shape), color='lime'), m.shape, k)
    rr,cc = np.nonzero((out[...,1]>128) & (out[...,0]<128))
    got = np.array([rr.min(), rr.max()+1, cc.min(), cc.max()+1])
    # a line of 1.5 points is 2 screen pixels wide, half of it on either side of the edge, and cut at the image's border
    assert np.abs(got-np.array(where)*k).max()<=2

@quick
@given(masks)
def test_there_are_as_many_sides_as_the_perimeter_is_long(m):
    sides = mask_sides(m)
    p = np.pad(m, 1).astype(int)
    assert len(sides)==np.abs(np.diff(p, axis=0)).sum()+np.abs(np.diff(p, axis=1)).sum()
    assert (np.abs(sides[:,0]-sides[:,1]).sum(-1)==1).all()

@quick
@given(masks)
def test_sides_reach_as_far_as_the_tight_box(m):
    sides = mask_sides(m)
    assert (sides.min((0,1))==tight(m)[:2]-.5).all()
    assert (sides.max((0,1))==tight(m)[2:]-.5).all()

def neighbours(side):
    "Row and column of the two pixels that share a side"
    (x0,y0),(x1,_) = side
    x,y = side.mean(0)
    if x0==x1: return [(int(np.floor(y+.5)),int(x+d)) for d in (-.5,.5)]
    return [(int(y+d),int(np.floor(x+.5))) for d in (-.5,.5)]

@quick
@given(masks)
def test_each_side_parts_a_pixel_of_the_mask_from_one_that_is_not(m):
    p = np.pad(m, 1)
    for side in mask_sides(m)[:20]: assert sum(bool(p[r+1,c+1]) for r,c in neighbours(side))==1

def filled_red(m): return render(show_mask(m, black(m.shape), color='red', alpha=1), m.shape, 10)[...,0]

@pytest.fixture
def bar_and_dot():
    m = np.zeros((8,12), bool)
    m[2:5,3:7] = True
    m[7,11] = True
    return m

def test_a_filled_mask_paints_the_middle_of_its_pixels(bar_and_dot):
    assert ((filled_red(bar_and_dot)[5::10,5::10]>200)==bar_and_dot).all()

def test_a_filled_mask_paints_its_pixels_to_their_edges(bar_and_dot):
    whole = np.kron(bar_and_dot, np.ones((10,10), bool))
    assert ((filled_red(bar_and_dot)>128)==whole).mean()>.995

def test_points_are_half_a_pixel_back():
    ax = show_points([[3,4],[5,6]], [1,0], black((20,30)))
    assert [c.get_offsets().tolist() for c in ax.collections]==[[[2.5,3.5]], [[4.5,5.5]]]

def test_lines_are_half_a_pixel_back():
    ax = show_line([1,2,11,2], black((20,30)))
    assert ax.lines[0].get_xydata().tolist()==[[.5,1.5], [10.5,1.5]]

def test_the_end_marks_of_a_line_stand_across_it():
    ax = show_line([1,2,51,2], black((20,60)))
    assert [o.get_xydata().tolist() for o in ax.lines[1:]]==[[[.5,-2.5], [.5,5.5]], [[50.5,-2.5], [50.5,5.5]]]

def test_a_line_of_no_length_is_a_point_and_not_a_crash():
    assert len(show_line([4,4,4,4], black((20,30))).lines)==3

def test_outlines_are_half_a_pixel_back_and_closed():
    ax = show_outline([[1,2],[9,2],[5,8]], black((20,30)))
    assert ax.patches[0].get_xy().tolist()==[[.5,1.5], [8.5,1.5], [4.5,7.5], [.5,1.5]]
    assert not ax.patches[0].get_fill()

def test_drawing_on_top_does_not_move_the_view():
    ax = black((20,30))
    show_slice(np.zeros((20,30)), np.ones((20,30), int), [-5,-5,40,50], [[35,2]], [-9,0,40,40], ax=ax)
    show_mask(np.ones((20,30), bool), ax, contour=True)
    show_outline([[-9,-9],[50,0],[3,40]], ax)
    assert (ax.get_xlim(),ax.get_ylim())==((-.5,29.5),(19.5,-.5))

# --- colours --------------------------------------------------------------------------------------
# red and green blindness, G. M. Machado et al., IEEE TVCG 2009, severity 1, linear RGB
DEUTAN = np.array([[.367322,.860646,-.227968], [.280085,.672501,.047413], [-.011820,.042940,.968881]])
PROTAN = np.array([[.152286,1.052583,-.204868], [.114503,.786281,.099216], [-.003882,-.048116,1.051998]])
RGB = [to_rgb(c) for c in PALETTE]

def seen(c, M):
    lin = np.where(c<=.04045, c/12.92, ((c+.055)/1.055)**2.4)@M.T
    lin = lin.clip(0, 1)
    return np.where(lin<=.0031308, lin*12.92, 1.055*lin**(1/2.4)-.055)

EYES = {'all three cones':np.eye(3), 'no green cone':DEUTAN, 'no red cone':PROTAN}
everyone = pytest.mark.parametrize('M', EYES.values(), ids=EYES)

def as_lab(M): return rgb2lab(seen(np.array(RGB), M)[None])[0]

def test_the_palette_holds_thirteen_colours_as_the_web_writes_them():
    assert len(PALETTE)==13
    assert all(len(c)==7 and c[0]=='#' and c==c.lower() for c in PALETTE)

@pytest.mark.parametrize('M,least', [(np.eye(3),30), (DEUTAN,15), (PROTAN,15)])
def test_colours_can_be_told_apart(M, least):
    lab = as_lab(M)
    d = np.linalg.norm(lab[:,None]-lab[None], axis=-1)+1000*np.eye(13)
    assert d.min()>least, np.unravel_index(d.argmin(), d.shape)

@everyone
def test_colours_are_far_from_every_grey(M):
    lab = as_lab(M)
    assert np.hypot(lab[:,1], lab[:,2]).min()>=18

@everyone
def test_colours_are_not_dark(M): assert as_lab(M)[:,0].min()>40

@given(st.integers(1, 10**6))
def test_the_palette_starts_again_after_thirteen(k):
    assert color(k)==color(k+13)==color(np.int64(k))==PALETTE[(k-1)%13]

label_values = st.lists(st.integers(0, 300), min_size=1, max_size=12)

@quick
@given(label_values, st.sampled_from([np.uint8, np.uint16, np.int64, np.float32]))
def test_a_label_has_one_colour_whatever_else_is_there(values, dtype):
    m = np.array([values]).astype(dtype)
    rgba = show_mask(m, alpha=.5).images[-1].get_array()
    for value,drawn in zip(m[0], rgba[0]):
        assert tuple(drawn)==((0,0,0,0) if value==0 else (*to_rgb(color(value)),.5))
    plt.close('all')

def test_one_colour_for_all_labels_can_be_asked_for():
    assert (show_mask(np.array([[0,1,2]]), color='red').images[-1].get_array()[0,1:,:3]==(1,0,0)).all()

def test_an_empty_mask_paints_nothing():
    assert show_mask(np.zeros((3,3), bool)).images[-1].get_array()[...,3].max()==0

def test_outlines_of_labels_have_their_colours():
    ax = show_mask(np.array([[0,1,2]]), contour=True)
    assert [tuple(c.get_colors()[0][:3]) for c in ax.collections]==RGB[:2]

# --- images, grids, panels ------------------------------------------------------------------------
PICTURES = dict(
    uint8=np.zeros((5,6), np.uint8), bool=np.zeros((5,6), bool), nan=np.full((5,6), np.nan, np.float32),
    colour=np.zeros((5,6,3), np.uint8), one_channel=np.zeros((5,6,1)), hu=np.zeros((5,6), np.int16)-1024,
    tensor=torch.zeros(5, 6), with_opacity=np.zeros((5,6,4)))
@pytest.mark.parametrize('im', PICTURES.values(), ids=PICTURES)
def test_images_of_every_kind_are_shown(im): assert show_image(im).images[0].get_array().shape[:2]==(5,6)

def clim(ax): return ax.images[0].get_clim()

@pytest.mark.parametrize('kwargs,want', [({},(0,255)), (dict(vmin=90, vmax=110),(90,110))])
def test_uint8_is_shown_from_0_to_255_unless_told(kwargs, want):
    assert clim(show_image(np.full((5,6), 100, np.uint8), **kwargs))==want

@pytest.mark.parametrize('kwargs,want', [({},(-1000,300)), (dict(vmin=-160, vmax=240),(-160,240))])
def test_images_of_a_grid_share_one_grey_scale(kwargs, want):
    hu = [np.full((5,6), v, np.int16) for v in (-1000,40,300)]
    assert {clim(ax) for ax in show_grid(hu, **kwargs).axes}=={want}

flat = np.zeros((5,6))
DRAWERS = dict(
    image=lambda ax: show_image(flat, ax), mask=lambda ax: show_mask(flat>0, ax),
    box=lambda ax: show_box([0,0,1,1], ax),
    points=lambda ax: show_points([1,1], None, ax), line=lambda ax: show_line([0,0,1,1], ax),
    outline=lambda ax: show_outline([[0,0],[1,0],[1,1]], ax), slice=lambda ax: show_slice(flat, ax=ax))
@pytest.mark.parametrize('f', DRAWERS.values(), ids=DRAWERS)
def test_draws_into_the_axes_given_and_returns_them(f):
    fig,axs = plt.subplots(1, 2)
    assert f(axs[0]) is axs[0]
    assert plt.get_fignums()==[fig.number] and not axs[1].has_data()

def test_a_box_can_carry_a_text():
    assert show_box([1,1,3,3], show_image(flat), label='x').texts[0].get_text()=='x'

@pytest.mark.parametrize('images,kwargs,n', [
    (np.zeros((7,5,6)),dict(ncols=3),7), ([flat],dict(ncols=9),1), ([flat,np.zeros((8,3,3), np.uint8)],{},2)])
def test_a_grid_has_axes_for_each_image(images, kwargs, n): assert len(show_grid(images, **kwargs).axes)==n

@pytest.fixture
def gt():
    m = np.zeros((40,50), np.uint8)
    m[10:20,15:30] = 1
    return m

@pytest.fixture
def wide(gt):
    m = gt.copy()
    m[10:20,10:15] = 1
    return m

@pytest.fixture
def panels(gt, wide):
    masks = {'SAM, DSC 0.86':wide, 'tuned, DSC 1.00':gt.astype(bool)}
    return show_panels(np.zeros((40,50), np.uint8), tight(gt), gt, masks, zoom=5)

def test_panels_stand_in_one_order(panels):
    titles = [ax.get_title() for ax in panels.axes]
    assert titles==['original', 'oracle box', 'ground truth', 'SAM, DSC 0.86', 'tuned, DSC 1.00']
    assert [len(ax.patches) for ax in panels.axes]==[0,1,0,0,0]

def test_panels_show_each_mask_as_it_is(panels, gt, wide):
    drawn = [ax.images[-1].get_array()[...,3]>0 for ax in panels.axes[2:]]
    assert all((d==(m>0)).all() for d,m in zip(drawn, (gt,wide,gt)))

def test_panels_lay_the_outline_of_the_truth_on_each_mask(panels):
    assert [len(ax.collections) for ax in panels.axes]==[0,0,0,1,1]

def test_panels_zoom_to_the_box_but_in_the_first(panels):
    assert panels.axes[0].get_xlim()==(-.5,49.5)
    assert {(ax.get_xlim(),ax.get_ylim()) for ax in panels.axes[1:]}=={((9.5,34.5),(24.5,4.5))}

def test_panels_can_be_drawn(panels): panels.canvas.draw()

def test_panels_without_a_mask_are_three(gt): assert len(show_panels(gt, tight(gt), gt, {}).axes)==3

# --- refusals -------------------------------------------------------------------------------------
REFUSED = [
    (lambda: show_image(np.zeros((3,64,64))),'channels come last'),
    (lambda: show_image(np.zeros((40,64,64))),'pick one slice'),
    (lambda: show_image(np.zeros(5)),r'shape \(5,\)'),
    (lambda: show_image(np.zeros((2,3,4,5))),r'\(2, 3, 4, 5\)'),
    (lambda: show_mask(flat+.5),'thresholded first'),
    (lambda: show_mask(flat-1),'thresholded first'),
    (lambda: show_mask(flat*np.nan),'thresholded first'),
    (lambda: show_mask(np.zeros((2,5,6))),r'give \(H,W\)'),
    (lambda: show_mask(np.zeros((6,5)), show_image(flat)),'one grid'),
    (lambda: show_box([1,2,3]),'4 finite numbers'),
    (lambda: show_box([1,2,np.nan,4]),'4 finite'),
    (lambda: show_box([5,5,2,2]),'not width and height'),
    (lambda: show_points([1,2,3]),r'\(n,2\)'),
    (lambda: show_points([[1,2]], [2]),'a 1 or a 0'),
    (lambda: show_line([[1,2],[3,4]]),'4 finite'),
    (lambda: show_outline([[1,2],[3,4]]),'3 or more'),
    (lambda: show_outline([[1,2],[3,4],[np.inf,0]]),'finite points'),
    (lambda: show_outline([1,2,3]),r'\(n,2\)'),
    (lambda: show_grid([]),'list is empty'),
    (lambda: show_grid([flat], masks=[]),'1 images came with 0 masks'),
    (lambda: show_grid([flat], ['a','b']),'1 images came with 2 titles'),
    (lambda: show_panels(flat, [0,0,1,1], np.zeros((6,5)), {}),'one grid')]
@pytest.mark.parametrize('f,why', REFUSED)
def test_what_cannot_be_shown_is_refused(f, why):
    with pytest.raises(InputError, match=why): f()
