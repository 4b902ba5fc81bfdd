"Coordinates there and back, and boxes that stay where they belong"
import numpy as np, pytest, torch
from hypothesis import assume, given, settings, strategies as st
from scipy.spatial.distance import pdist
from medsam_nb.core import InputError
from medsam_nb.prompt import (check_box, instances, line_to_box, longest_diameter, mask_to_box, next_click, perturb_box,
                              sample_points, short_diameter, slack_box)
from medsam_nb.view import Grid

sides = st.integers(1, 700)
grids = st.builds(lambda h,w,size,fit: Grid((h,w), size, fit), sides, sides, st.sampled_from([64,256,1024]),
                  st.sampled_from(['pad','squash']))
seeds = st.integers(0, 2**32-1)

def random_box(rng, H, W, whole=False):
    x,y = np.sort(rng.uniform(0,W,2)), np.sort(rng.uniform(0,H,2))
    b = np.array([x[0],y[0],x[1],y[1]])
    return np.concatenate([np.floor(b[:2]), np.ceil(b[2:])]) if whole else b

def centres(h, w): return np.stack(np.meshgrid(np.arange(w)+.5, np.arange(h)+.5), -1)

@given(grids, seeds)
def test_round_trip(g, seed):
    rng = np.random.default_rng(seed)
    H,W = g.shape
    pts = rng.uniform([-5,-5], [W+5,H+5], (7,2))
    box = np.stack([random_box(rng, H, W) for _ in range(3)])
    for c in (pts, box, pts[0], box[0], box.reshape(3,1,4)):
        assert g.to_grid(c).shape==c.shape
        np.testing.assert_allclose(g.from_grid(g.to_grid(c)), c, atol=1e-9)
        np.testing.assert_allclose(g.from_grid(g.to_grid(c.astype(np.float32))), c, atol=2e-3, rtol=1e-5)
        for size in (256,1024):
            np.testing.assert_allclose(g.from_model(g.to_model(c, size), size), c, atol=1e-9)

@given(grids)
def test_corners_meet_corners(g):
    (H,W),(h,w) = g.shape,g.content
    np.testing.assert_allclose(g.to_grid([0,0,W,H]), [0,0,w,h], rtol=1e-6)
    assert max(h,w)==g.size and min(h,w)>=1
    if g.fit=='squash': assert (h,w)==(g.size,g.size)
    np.testing.assert_allclose(g.to_model([0,0,g.size,g.size], 1024), [-.5,-.5,1023.5,1023.5])

@given(grids, seeds)
def test_whole_numbers_never_truncate(g, seed):
    H,W = g.shape
    box = random_box(np.random.default_rng(seed), H, W, whole=True)
    for dtype in (int, np.int32, np.uint16, np.uint8 if box.max()<256 else np.int64):
        for f in (g.to_grid, g.from_grid, lambda c: g.to_model(c, 1024), lambda c: g.from_model(c, 256)):
            assert f(box.astype(dtype)).dtype==np.float32
            np.testing.assert_allclose(f(box.astype(dtype)), f(box), rtol=1e-5, atol=1e-3)
    assert g.to_grid(box.astype(int).tolist()).dtype==np.float32
    assert g.to_grid(box).dtype==np.float64

def test_the_old_truncation_would_be_seen():
    box = np.array([10,10,33,27])
    old = np.empty_like(box)
    old[:] = box*(256/300)
    assert np.abs(Grid((200,300)).to_grid(box)-old).max()>.1

@given(grids, st.sampled_from([64,256]))
@settings(max_examples=60, deadline=None)
def test_mask_from_grid_puts_pixels_where_they_belong(g, S):
    H,W = g.shape
    xy = g.from_grid(centres(S,S)*g.size/S)
    back = g.mask_from_grid(torch.tensor(np.moveaxis(xy,-1,0)))
    assert back.shape==(2,H,W) and back.dtype==torch.float32
    # a bilinear ramp is exact except within a cell of the border of the content
    cell = np.maximum(1, g.size/S)*np.array([W,H])/np.array(g.content)[::-1]
    want = centres(H,W)
    inner = ((want>cell)&(want<np.array([W,H])-cell)).all(-1)
    err = np.abs(np.moveaxis(back.numpy(),0,-1)-want)
    assert (err[inner]<=1e-3*max(H,W)/100+1e-3).all()
    assert (err<=cell+1e-3).all()

def test_mask_from_grid_keeps_leading_axes_and_ignores_padding():
    g = Grid((50,200))
    x = torch.full((2,3,256,256), 7.)
    x[..., g.content[0]:, :] = -1000
    assert (g.mask_from_grid(x)==7).all() and g.mask_from_grid(x).shape==(2,3,50,200)
    assert g.mask_from_grid(x[0,0].half()).dtype==torch.float32
    for bad in (torch.zeros(256), torch.zeros(2,256,255)):
        with pytest.raises(InputError, match='square'): g.mask_from_grid(bad)

@given(st.integers(20,600), st.integers(20,600), st.sampled_from(['pad','squash']), st.booleans(), seeds)
@settings(max_examples=150, deadline=None)
def test_box_and_curated_label_agree(H, W, fit, ellipse, seed):
    from medsam_nb.view import resize_label
    rng, g = np.random.default_rng(seed), Grid((H,W), 256, fit)
    x0,y0 = rng.integers(0, W-10), rng.integers(0, H-10)
    x1,y1 = rng.integers(x0+10, W+1), rng.integers(y0+10, H+1)
    m = np.zeros((H,W), np.uint8)
    m[y0:y1,x0:x1] = 1
    if ellipse: # thin tips may fall between two grid pixels, so keep it round on the grid
        half = g.to_grid([(x1-x0)/2,(y1-y0)/2])
        assume(half.min()>=3 and half.max()<=2*half.min())
        m[(((centres(H,W)-[(x0+x1)/2,(y0+y1)/2])/[(x1-x0)/2,(y1-y0)/2])**2).sum(-1)>1] = 0
    apart = np.abs(mask_to_box(resize_label(m, 256, fit))-g.to_grid(mask_to_box(m))).max()
    assert apart<=(1 if ellipse else .51)

@given(st.integers(1,40), st.integers(1,40), seeds)
def test_tight_box(H, W, seed):
    m = np.random.default_rng(seed).random((H,W))<.1
    if not m.any():
        with pytest.raises(InputError, match='empty'): mask_to_box(m)
        return
    b = mask_to_box(m)
    assert b.dtype==np.float32
    x0,y0,x1,y1 = b.astype(int)
    inside = m[y0:y1,x0:x1]
    assert inside.sum()==m.sum()
    assert inside[0].any()
    assert inside[-1].any()
    assert inside[:,0].any()
    assert inside[:,-1].any()

def test_grid_refuses():
    for shape in ((10,), (10,10,3), (0,5), 7):
        with pytest.raises(InputError, match='image shape'): Grid(shape)
    with pytest.raises(InputError, match="'pad', 'squash'"): Grid((5,5), fit='stretch')
    with pytest.raises(InputError, match='size'): Grid((5,5), size=0)
    for bad in (3, [1,2,3], np.zeros((4,3))):
        with pytest.raises(InputError, match='last axis'): Grid((5,5)).to_grid(bad)
    with pytest.raises(InputError, match='one mask'): mask_to_box(np.zeros((2,3,4)))

def test_instances_largest_first_and_nothing_lost():
    m = np.zeros((30,30), bool)
    m[2:5,2:5] = True
    m[10:20,10:20] = True
    m[20,20] = True
    m[28,1] = True
    got = instances(m)
    assert [i.sum() for i in got]==[101,9,1] and (np.sum(got,0)==m).all()
    assert len(instances(m, 9))==2 and instances(m, 200)==[] and instances(np.zeros((4,4)))==[]

@given(st.integers(1,300), st.integers(1,300), st.floats(0,60), st.booleans(), seeds)
def test_perturbed_boxes_are_boxes(H, W, max_px, shrink, seed):
    rng = np.random.default_rng(seed)
    box = check_box(random_box(rng, H, W, whole=True), (H,W)) if H*W>1 else np.float32([0,0,1,1])
    for b in (perturb_box(box, (H,W), rng, max_px, shrink), slack_box(box, (H,W), max_px, rng),
              slack_box(box, (H,W), -max_px, rng)):
        assert b.dtype==np.float32 and (b[:2]>=0).all() and (b[2:]<=[W,H]).all()
        assert (b[2:]-b[:2]>=.999).all() and np.abs(b-box).max()<=max_px+1e-3
    if not shrink:
        b = perturb_box(box, (H,W), rng, max_px)
        assert (b[:2]<=box[:2]).all() and (b[2:]>=box[2:]).all()

@pytest.mark.parametrize('shrink', [False,True])
def test_growth_covers_the_whole_range_on_all_four_sides(shrink):
    rng, box = np.random.default_rng(0), np.float32([100,100,180,160])
    out = np.stack([perturb_box(box.astype(int), (300,300), rng, 20, shrink) for _ in range(5000)])-box
    out = out*[-1,-1,1,1]
    low = -20 if shrink else 0
    assert (out.max(0)>19.9).all()
    assert (out<=20).all()
    assert (out.min(0)<low+.1).all()
    assert (out>=low).all()
    assert (np.abs(out.mean(0)-(20+low)/2)<.6).all()
    assert (np.abs(np.corrcoef(out.T)-np.eye(4))<.06).all()

def test_growth_reaches_the_image_edge():
    rng = np.random.default_rng(0)
    out = np.stack([perturb_box([5,5,95,45], (50,100), rng) for _ in range(200)])
    assert (out.min(0)[:2]==0).all() and (out.max(0)[2:]==[100,50]).all()
    same = [perturb_box([5,5,95,45], (50,100), np.random.default_rng(3)) for _ in range(2)]
    assert (same[0]==same[1]).all()

def test_slack_never_passes_the_centre():
    rng, box = np.random.default_rng(0), np.float32([10,10,31,13])
    out = np.stack([slack_box(box, (50,50), -50, rng) for _ in range(500)])
    assert (out[:,:2]<=[20.01,11.01]).all() and (out[:,2:]>=[20.99,11.99]).all() and (out[:,0]>=10).all()
    thin = slack_box([3,3,3.4,9], (50,50), -4, rng)
    np.testing.assert_allclose(thin[[0,2]], [3,3.4])

@pytest.mark.parametrize('box,why', [([1,2,3],'four numbers'), ('abc','four numbers'), (None,'four numbers'),
                                     ([[1,2,3,4]],'four numbers'),
    ([0,0,np.inf,4],'not finite'), ([np.nan]*4,'not finite'), ([5,0,4,4],'inverted'), ([0,5,4,4],'inverted'),
    ([3,0,3,4],'no area'),
    ([50,0,60,5],'width 30, height 20'), ([-9,-9,0,5],'width 30, height 20')])
def test_check_box_names_the_fault(box, why):
    with pytest.raises(InputError, match=why): check_box(box, (20,30))

def test_check_box_accepts():
    assert (check_box((-3,-3,99,99), (20,30))==[0,0,30,20]).all()
    assert check_box(torch.tensor([1,2,3,4]), (20,30)).dtype==np.float32
    box = np.array([1.,2,3,4])
    check_box(box, (20,30))[0] = 9
    assert box[0]==1

@given(st.integers(3,60), st.integers(3,60), st.integers(0,6), st.integers(0,4), seeds)
@settings(deadline=None)
def test_points_lie_where_labelled(H, W, n, background, seed):
    rng = np.random.default_rng(seed)
    m = np.zeros((H,W), bool)
    m[H//3:H//3+max(2,H//3), W//3:W//3+max(2,W//3)] = True
    if n>m.sum() or background>(~m).sum(): return
    pts,labels = sample_points(m, n, rng, background)
    assert pts.dtype==np.float32 and pts.shape==(n+background,2) and labels.tolist()==[1]*n+[0]*background
    c,r = np.floor(pts).astype(int).T
    assert (m[r,c]==labels.astype(bool)).all() and (pts%1==.5).all() and len(np.unique(pts,axis=0))==len(pts)

def test_points_are_deep():
    yy,xx = np.mgrid[:101,:101]
    disc = (yy-50)**2+(xx-50)**2<=40**2
    pts,_ = sample_points(disc, 200, np.random.default_rng(0))
    assert np.hypot(*(pts-50.5).T).max()<21.5
    whole = np.ones((9,9), bool)
    with pytest.raises(InputError, match='near'):
        sample_points(whole, 1, np.random.default_rng(0), background=1)
    with pytest.raises(InputError, match='inside'): sample_points(~whole, 1, np.random.default_rng(0))

@given(st.integers(1,14), st.integers(1,14), st.floats(.3,5), st.floats(.3,5), seeds)
@settings(deadline=None)
def test_diameter_equals_brute_force(H, W, sy, sx, seed):
    rng = np.random.default_rng(seed)
    m = rng.random((H,W))<.4
    if not m.any(): m[rng.integers(H), rng.integers(W)] = True
    rc = np.argwhere(m)
    corners = np.concatenate([rc+d for d in ((0,0),(0,1),(1,0),(1,1))])
    line,mm = longest_diameter(m, (7,sy,sx))
    assert mm==pytest.approx(pdist(corners*[sy,sx]).max())
    assert np.hypot((line[2]-line[0])*sx, (line[3]-line[1])*sy)==pytest.approx(mm, rel=1e-5)
    assert {tuple(line[:2][::-1]),tuple(line[2:][::-1])}<={tuple(c) for c in corners.astype(float)}

def extent(m, mm, u, t):
    "How far the pixels of a mask reach along one line across `u`, pixel by pixel: the brute force"
    lo, hi, n = np.inf, -np.inf, np.array([-u[1],u[0]])
    for r,c in np.argwhere(m):
        p = np.array([(c,r),(c+1,r),(c+1,r+1),(c,r+1)])*mm
        a, b = p@u, p@n
        for i in range(4):
            j = (i+1)%4
            if min(a[i],a[j])-1e-9<=t<=max(a[i],a[j])+1e-9:
                w = [0,1] if abs(a[j]-a[i])<1e-9 else [np.clip((t-a[i])/(a[j]-a[i]),0,1)]
                lo, hi = min([lo]+[b[i]+k*(b[j]-b[i]) for k in w]), max([hi]+[b[i]+k*(b[j]-b[i]) for k in w])
    return hi-lo

@given(st.integers(1,8), st.integers(1,8), st.floats(.3,5), st.floats(.3,5), seeds)
@settings(deadline=None, max_examples=60)
def test_short_diameter_equals_brute_force(H, W, sy, sx, seed):
    rng = np.random.default_rng(seed)
    m = rng.random((H,W))<.5
    if not m.any(): m[rng.integers(H), rng.integers(W)] = True
    line,_ = longest_diameter(m, (sy,sx))
    mm = np.array([sx,sy])
    short,length = short_diameter(m, line, (7,sy,sx))
    v = (line[2:]-line[:2])*mm
    u = v/np.linalg.norm(v)
    corners = np.concatenate([np.argwhere(m)[:,::-1]+d for d in ((0,0),(0,1),(1,0),(1,1))])*mm@u
    everywhere = [extent(m, mm, u, t) for t in np.unique(np.r_[corners.round(12),
                                                               rng.uniform(corners.min(), corners.max(), 30)])]
    assert length==pytest.approx(max(everywhere), rel=1e-6, abs=1e-6)
    d = (short[2:]-short[:2])*mm
    # a right angle, in mm
    assert np.linalg.norm(d)==pytest.approx(length, rel=1e-4, abs=1e-4) and abs(d@u)<1e-4*max(length, 1)

def test_short_diameter_of_a_bar():
    "Ends in order, the first of several places as wide, and a box of both lines with its margin"
    m = np.zeros((20,30), bool)
    m[5:9,4:24] = True
    line,_ = longest_diameter(m)
    short,mm = short_diameter(m, [4,7,24,7])
    assert short.tolist()==[4,5,4,9] and mm==4
    np.testing.assert_allclose(line_to_box([4,7,24,7], m.shape, short=[14,5,14,9]), [4-.4,5-.4,24+.4,9+.4], atol=1e-5)

def test_short_diameter_refuses():
    m = np.ones((4,9), bool)
    with pytest.raises(InputError, match='empty'): short_diameter(~m, [0,2,9,2])
    with pytest.raises(InputError, match='no length'): short_diameter(m, [3,2,3,2])
    with pytest.raises(InputError, match='spacing'): short_diameter(m, [0,2,9,2], (1,np.nan))

@given(seeds)
@settings(deadline=None)
def test_both_diameters_lie_in_their_box(seed):
    rng = np.random.default_rng(seed)
    m = instances(rng.random((30,40))<.45)[0]
    mm = (rng.uniform(.5,3), rng.uniform(.5,3))
    line,_ = longest_diameter(m, mm)
    short,_ = short_diameter(m, line, mm)
    for margin in (0, None):
        b = line_to_box(line, m.shape, margin=margin, short=short, spacing=mm)
        for x0,y0,x1,y1 in (line,short):
            assert (b[:2]<=np.minimum([x0,y0],[x1,y1])+1e-3).all() and (b[2:]>=np.maximum([x0,y0],[x1,y1])-1e-3).all()
    scaled = line_to_box(np.array(line)*[2,1,2,1], (30,80), margin=0, short=np.array(short)*[2,1,2,1],
                         spacing=(mm[0],mm[1]/2))
    # the box is made in mm
    np.testing.assert_allclose(scaled, line_to_box(line, m.shape, margin=0, short=short, spacing=mm)*[2,1,2,1],
                               atol=1e-3)

@given(st.integers(4,40), st.integers(4,40), seeds)
@settings(deadline=None)
def test_next_click_hits_the_largest_error(H, W, seed):
    rng = np.random.default_rng(seed)
    pred, truth = rng.random((2,H,W))<.5
    got = next_click(pred, truth)
    if (pred==truth).all():
        assert got is None
        return
    (x,y),l = got
    r,c = int(y), int(x)
    err = truth&~pred if l else pred&~truth
    assert (x%1,y%1)==(.5,.5) and err[r,c]
    piece = next(p for p in instances(err) if p[r,c])
    assert piece.sum()==max(p.sum() for e in (truth&~pred, pred&~truth) for p in instances(e))
    depth = lambda i,j: min(np.hypot(i-a, j-b) for a in range(-1,H+1) for b in range(-1,W+1)
                            if not (0<=a<H and 0<=b<W and piece[a,b]))
    if H*W<150: assert depth(r,c)==pytest.approx(max(depth(i,j) for i,j in np.argwhere(piece)))

def test_next_click_by_hand():
    t = np.zeros((20,30), bool)
    t[4:13,5:16] = True
    assert next_click(np.zeros_like(t), t)[0].tolist() in ([10.5,8.5], [9.5,8.5],
                                                           [11.5,8.5]) and next_click(np.zeros_like(t), t)[1]==1
    assert next_click(t, t) is None
    more = t.copy()
    more[0:19,20:29] = True
    assert next_click(more, t)[1]==0 and next_click(more, t)[0][0]>20
    with pytest.raises(InputError, match='one grid'): next_click(t[1:], t)
    even = np.zeros((10,30), bool)
    even[2:5,2:5] = True
    pred = np.zeros_like(even)
    pred[2:5,20:23] = True
    assert next_click(pred, even)[1]==1                      # of two errors of one size, what is missing
    assert next_click(pred, even, [(30.,10.)])[1]==1         # a click on the image's very edge
    clicks = []
    for _ in range(6):                                       # the mask stays empty: clicks spread over the object
        p, l = next_click(np.zeros_like(t), t, clicks)
        clicks.append(p)
        assert l==1 and t[int(p[1]),int(p[0])]
    assert pdist(clicks).min()>1.9
    dot = np.zeros((5,5), bool)
    dot[2,2] = True
    assert next_click(~dot&False, dot, [(2.5,2.5)])[0].tolist()==[2.5,2.5]   # nowhere else to click

def test_line_to_box():
    np.testing.assert_allclose(line_to_box([10,20,30,20], (100,100), margin=0, ratio=.5), [10,15,30,25])
    np.testing.assert_allclose(line_to_box([20,10,20,30], (100,100), margin=.1, ratio=.5), [13,8,27,32])
    d = line_to_box([10,10,30,30], (100,100), margin=0, ratio=1)
    np.testing.assert_allclose(d, [20-200**.5]*2+[20+200**.5]*2, rtol=1e-6)
    assert (line_to_box([-10,5,10,5], (100,100))[:2]>=0).all()
    assert (line_to_box([30,20,10,20], (100,100))==line_to_box([10,20,30,20], (100,100))).all()
    for bad in ([1,2,3], [5,5,5,5], [0,0,np.nan,3], 'line'):
        with pytest.raises(InputError, match='line'): line_to_box(bad, (100,100))
    with pytest.raises(InputError, match='margin'): line_to_box([1,1,5,5], (100,100), margin=-1)

@given(seeds)
@settings(deadline=None)
def test_an_ellipse_lies_in_the_box_of_its_diameter(seed):
    rng = np.random.default_rng(seed)
    a = rng.uniform(10,25)
    b = a*rng.uniform(.4,.7)
    t = rng.uniform(0,np.pi)
    p = centres(80,80)-40
    m = ((p@[np.cos(t),np.sin(t)])/a)**2+((p@[-np.sin(t),np.cos(t)])/b)**2<=1
    box, tight = line_to_box(longest_diameter(m)[0], m.shape), mask_to_box(m)
    assert (box[:2]<=tight[:2]+.5).all() and (box[2:]>=tight[2:]-.5).all()
