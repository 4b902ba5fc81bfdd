"DSC and NSD against counting, against the reference implementation, and at the edges of their definition."
import time, warnings
import numpy as np, pytest, surface_distance as sd, torch
from scipy import ndimage
from medsam_nb.core import InputError
from medsam_nb.metrics import _normals, dsc, nsd

def reference(pred, gt, spacing, tolerance):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return sd.compute_surface_dice_at_tolerance(sd.compute_surface_distances(gt, pred, spacing), tolerance)

def blob(rng, shape):
    noise = ndimage.gaussian_filter(rng.normal(size=shape), rng.uniform(.3,2.5))
    return noise>=np.quantile(noise, rng.uniform(.4,.97))

def pair(rng, ndim):
    "Two related masks, spacing and a tolerance, a third of the time exactly a distance that occurs"
    shape = tuple(rng.integers(1,18,ndim))
    gt = blob(rng, shape)
    pred = [blob(rng, shape), np.roll(gt, 1, rng.integers(ndim)), gt^(rng.random(shape)<.1)][rng.integers(3)]
    if not pred.any(): pred[(0,)*ndim] = True
    spacing = rng.integers(2,60,ndim)/10 if rng.random()<.5 else rng.uniform(.3,6,ndim)
    tolerance = [rng.uniform(.1,5), float(rng.integers(0,4)), float(rng.integers(1,4)*spacing[rng.integers(ndim)])][rng.integers(3)]
    return pred, gt, tuple(spacing.tolist()), float(tolerance)

@pytest.mark.parametrize('ndim', [2,3])
def test_nsd_equals_deepminds(ndim):
    rng = np.random.default_rng(ndim)
    got = []
    for _ in range(400):
        pred,gt,spacing,tolerance = pair(rng, ndim)
        want = reference(pred, gt, spacing, tolerance)
        got.append(want)
        assert nsd(pred, gt, spacing, tolerance)==pytest.approx(want, abs=1e-9), (pred.shape, spacing, tolerance)
    assert np.std(got)>.1 and np.mean((np.array(got)>.02)&(np.array(got)<.98))>.4

def test_element_sizes_equal_deepminds_table():
    from surface_distance import lookup_tables as tables
    rng = np.random.default_rng(0)
    for ndim,name in ((2,'create_table_neighbour_code_to_contour_length'), (3,'create_table_neighbour_code_to_surface_area')):
        for spacing in rng.uniform(.2,7,(10,ndim)):
            ours = np.linalg.norm(_normals(ndim)*(spacing.prod()/spacing), axis=-1).sum(-1)
            n = 2**ndim # their first corner has the highest bit, ours the lowest
            theirs = getattr(tables,name)(spacing)[[int(f'{c:0{n}b}'[::-1],2) for c in range(2**n)]]
            np.testing.assert_allclose(ours, theirs, atol=1e-12)

def test_surface_of_a_known_body():
    "A long box has the surface of its faces, up to what the cut edges save"
    m = np.zeros((30,40,50), bool); m[5:25,5:35,5:45] = True
    from medsam_nb.metrics import _surface
    s = np.array([2,.5,1]); sizes = np.linalg.norm(_normals(3)*(s.prod()/s), axis=-1).sum(-1)
    code,at = _surface(m)
    a,b,c = 20*2, 30*.5, 40*1
    assert sizes[code[at]].sum()==pytest.approx(2*(a*b+b*c+a*c), rel=.04)

def test_dsc_equals_counting():
    rng = np.random.default_rng(0)
    for _ in range(100):
        shape = tuple(rng.integers(1,9,rng.integers(2,4)))
        a,b = rng.random(shape)<.4, rng.random(shape)<.4
        A,B = ({tuple(i) for i in np.argwhere(m)} for m in (a,b))
        want = 2*len(A&B)/(len(A)+len(B)) if A or B else 1
        assert dsc(a,b)==pytest.approx(want) and dsc(a,b)==dsc(b,a)

@pytest.mark.parametrize('shape', [(5,6),(4,5,6),(1,1),(1,1,1)])
def test_empty_masks(shape):
    none, some = np.zeros(shape,bool), np.zeros(shape,bool); some.flat[0] = True
    for f in (dsc,nsd):
        assert f(none,none)==1 and f(none,some)==0 and f(some,none)==0 and f(some,some)==1
        assert isinstance(f(some,none), float)

def test_masks_of_zeros_and_ones_in_any_type():
    rng = np.random.default_rng(0)
    a,b = rng.random((5,6,7))<.4, rng.random((5,6,7))<.4
    for t in (np.uint8, np.int64, np.float32, torch.tensor, np.ndarray.tolist):
        x,y = (m.astype(t) if isinstance(t,type) else t(m) for m in (a,b))
        assert dsc(x,y)==dsc(a,b) and nsd(x,y,(3,1,.5))==nsd(a,b,(3,1,.5))
    before = a.copy(); nsd(a,b); assert (a==before).all()

def test_large_sums_do_not_wrap():
    m = np.ones((3,300,300), np.uint8)
    assert dsc(m,m)==1 and nsd(m,m)==1

@pytest.mark.parametrize('f', [dsc,nsd])
@pytest.mark.parametrize('bad,why', [(np.ones((4,5)),'differ in shape'), (np.ones(5),'has shape'), (np.ones((1,1,4,5,6)),'has shape'), (3,'has shape'),
    (np.full((4,5,6),255),'holds 255'), (np.full((4,5,6),.5),'holds 0.5'), (np.full((4,5,6),-1.),'holds -1'), (np.full((4,5,6),np.nan),'holds nan')])
def test_refused_masks(f, bad, why):
    good = np.ones((4,5,6), bool)
    with pytest.raises(InputError, match=why): f(bad, good)
    with pytest.raises(InputError, match=why): f(good, bad)

def test_refused_spacing_and_tolerance():
    m = np.ones((4,5,6), bool)
    for s in ((1,1),(1,1,0),(1,-1,1),(1,1,np.nan),(np.inf,1,1),2,None,'mm',(1,1,1,1)):
        with pytest.raises(InputError, match='spacing'): nsd(m,m,s)
        with pytest.raises(InputError, match='spacing'): nsd(~m,~m,s)
    for t in (-.1, np.nan, np.inf, None, (1,2)):
        with pytest.raises(InputError, match='tolerance'): nsd(m,m,tolerance=t)

def test_2d_uses_the_last_two_spacings():
    rng = np.random.default_rng(1)
    a = blob(rng,(20,30)); b = np.roll(a,2,1)
    assert nsd(a,b,(9,1,3))==nsd(a,b,(1,3))!=nsd(a,b,(3,1))

def test_crop_and_place_change_nothing():
    rng = np.random.default_rng(2)
    a = blob(rng,(6,9,10)); b = np.roll(a,1,2)
    A,B = np.zeros((2,20,40,40),bool)
    A[7:13,20:29,5:15], B[7:13,20:29,5:15] = a,b
    assert nsd(A,B,(4,1,.7))==pytest.approx(nsd(a,b,(4,1,.7)))

def test_properties():
    rng = np.random.default_rng(3)
    for _ in range(40):
        a,b,s,t = pair(rng,3)
        v = nsd(a,b,s,t)
        assert 0<=v<=1 and v==pytest.approx(nsd(b,a,s,t)) and nsd(a,b,s,t+1)>=v-1e-12
        assert nsd(a[::-1],b[::-1],s,t)==pytest.approx(v)
        assert nsd(a.transpose(2,0,1),b.transpose(2,0,1),(s[2],s[0],s[1]),t)==pytest.approx(v)
        assert nsd(a,b,s,1e6)==1

def test_a_gallbladder_in_a_scan_is_fast():
    z,y,x = np.ogrid[:40,:512,:512]
    a = ((z-20)/6)**2+((y-250)/22)**2+((x-180)/16)**2<1
    nsd(a,a); t = time.perf_counter(); nsd(a, np.roll(a,2,2), (5,.8,.8))
    assert time.perf_counter()-t<2
