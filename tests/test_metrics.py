"DSC and NSD against counting, against the reference implementation, and at the edges of their definition"
import time, warnings
import numpy as np, pytest, surface_distance as sd, torch
from scipy import ndimage
from surface_distance import lookup_tables as tables
from medsam_nb.core import InputError
from medsam_nb.metrics import _sizes, _surface, dsc, nsd, score

def reference(pred, gt, spacing, tolerance):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        distances = sd.compute_surface_distances(gt, pred, spacing)
        return sd.compute_surface_dice_at_tolerance(distances, tolerance)

def blob(rng, shape):
    noise = ndimage.gaussian_filter(rng.normal(size=shape), rng.uniform(.3, 2.5))
    return noise>=np.quantile(noise, rng.uniform(.4, .97))

def pair(rng, ndim):
    "Two related masks, spacing and a tolerance, a third of the time exactly a distance that occurs"
    shape = tuple(rng.integers(1, 18, ndim))
    gt = blob(rng, shape)
    preds = [blob(rng, shape), np.roll(gt, 1, rng.integers(ndim)), gt^(rng.random(shape)<.1)]
    pred = preds[rng.integers(3)]
    if not pred.any(): pred[(0,)*ndim] = True
    spacing = rng.integers(2, 60, ndim)/10 if rng.random()<.5 else rng.uniform(.3, 6, ndim)
    occurs = rng.integers(1, 4)*spacing[rng.integers(ndim)]
    tolerances = [rng.uniform(.1, 5), rng.integers(0, 4), occurs]
    return pred, gt, tuple(spacing.tolist()), float(tolerances[rng.integers(3)])

# --- against others ---------------------------------------------------------------------------------
@pytest.fixture(scope='module', params=[2,3], ids=['2-D','3-D'])
def pairs(request):
    rng = np.random.default_rng(request.param)
    cases = [pair(rng, request.param) for _ in range(400)]
    return [(case,reference(*case)) for case in cases]

def test_nsd_equals_deepminds(pairs):
    for (pred,gt,spacing,tolerance),want in pairs:
        assert nsd(pred, gt, spacing, tolerance)==pytest.approx(want, abs=1e-9), (pred.shape, spacing, tolerance)

def test_the_masks_of_that_comparison_are_neither_all_right_nor_all_wrong(pairs):
    scores = np.array([want for _,want in pairs])
    assert scores.std()>.1
    assert np.mean((scores>.02)&(scores<.98))>.4

THEIRS = {2:tables.create_table_neighbour_code_to_contour_length, 3:tables.create_table_neighbour_code_to_surface_area}

@pytest.mark.parametrize('ndim', [2,3])
def test_element_sizes_equal_deepminds_table(ndim):
    n = 2**ndim # their first corner has the highest bit, ours the lowest
    turned = [int(f'{code:0{n}b}'[::-1], 2) for code in range(2**n)]
    for spacing in np.random.default_rng(ndim).uniform(.2, 7, (10,ndim)):
        np.testing.assert_allclose(_sizes(spacing), THEIRS[ndim](spacing)[turned], atol=1e-12)

def test_a_long_box_has_the_surface_of_its_faces_up_to_what_the_cut_edges_save():
    m = np.zeros((30,40,50), bool)
    m[5:25,5:35,5:45] = True
    code,at = _surface(m)
    a,b,c = 20*2, 30*.5, 40*1
    surface = _sizes(np.array([2,.5,1]))[code[at]].sum()
    assert surface==pytest.approx(2*(a*b+b*c+a*c), rel=.04)

def counted(a, b):
    "DSC from sets of places"
    A,B = ({tuple(i) for i in np.argwhere(m)} for m in (a,b))
    return 2*len(A&B)/(len(A)+len(B)) if A or B else 1

@pytest.mark.parametrize('seed', range(100))
def test_dsc_equals_counting(seed):
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(1, 9, rng.integers(2, 4)))
    a,b = rng.random(shape)<.4, rng.random(shape)<.4
    assert dsc(a, b)==pytest.approx(counted(a, b))
    assert dsc(a, b)==dsc(b, a)

# --- edges of the definition ------------------------------------------------------------------------
both = pytest.mark.parametrize('f', [dsc,nsd])

@both
@pytest.mark.parametrize('shape', [(5,6), (4,5,6), (1,1), (1,1,1)])
def test_empty_masks_agree_with_each_other_and_with_nothing_else(f, shape):
    none,some = np.zeros(shape, bool), np.zeros(shape, bool)
    some.flat[0] = True
    assert [f(none, none), f(none, some), f(some, none), f(some, some)]==[1,0,0,1]
    assert isinstance(f(some, none), float)

@pytest.fixture
def noise():
    rng = np.random.default_rng(0)
    return rng.random((5,6,7))<.4, rng.random((5,6,7))<.4

AS = dict(
    uint8=lambda m: m.astype(np.uint8), int64=lambda m: m.astype(np.int64),
    float32=lambda m: m.astype(np.float32), tensor=torch.tensor, lists=np.ndarray.tolist)

@pytest.mark.parametrize('kind', AS.values(), ids=AS)
def test_masks_of_zeros_and_ones_may_have_any_type(noise, kind):
    a,b = noise
    assert dsc(kind(a), kind(b))==dsc(a, b)
    assert nsd(kind(a), kind(b), (3,1,.5))==nsd(a, b, (3,1,.5))

def test_masks_are_left_as_they_were(noise):
    before = noise[0].copy()
    nsd(*noise)
    assert (noise[0]==before).all()

@both
def test_large_sums_do_not_wrap(f):
    m = np.ones((3,300,300), np.uint8)
    assert f(m, m)==1

NO_MASKS = [
    (np.ones((4,5)),'differ in shape'), (np.ones(5),'has shape'), (np.ones((1,1,4,5,6)),'has shape'), (3,'has shape'),
    (np.full((4,5,6), 255),'holds 255'), (np.full((4,5,6), .5),'holds 0.5'), (np.full((4,5,6), -1.),'holds -1'),
    (np.full((4,5,6), np.nan),'holds nan')]

@both
@pytest.mark.parametrize('bad,why', NO_MASKS)
def test_what_is_no_mask_is_refused_on_either_side(f, bad, why):
    good = np.ones((4,5,6), bool)
    with pytest.raises(InputError, match=why): f(bad, good)
    with pytest.raises(InputError, match=why): f(good, bad)

NO_SPACINGS = [(1,1), (1,1,0), (1,-1,1), (1,1,float('nan')), (float('inf'),1,1), 2, None, 'mm', (1,1,1,1)]

@pytest.mark.parametrize('value', [True,False], ids=['full','empty'])
@pytest.mark.parametrize('spacing', NO_SPACINGS, ids=str)
def test_what_is_no_spacing_is_refused(spacing, value):
    m = np.full((4,5,6), value)
    with pytest.raises(InputError, match='spacing'): nsd(m, m, spacing)

@pytest.mark.parametrize('tolerance', [-.1, float('nan'), float('inf'), None, (1,2)], ids=str)
def test_what_is_no_tolerance_is_refused(tolerance):
    m = np.ones((4,5,6), bool)
    with pytest.raises(InputError, match='tolerance'): nsd(m, m, tolerance=tolerance)

def test_2d_uses_the_last_two_spacings():
    a = blob(np.random.default_rng(1), (20,30))
    b = np.roll(a, 2, 1)
    assert nsd(a, b, (9,1,3))==nsd(a, b, (1,3))!=nsd(a, b, (3,1))

def test_crop_and_place_change_nothing():
    a = blob(np.random.default_rng(2), (6,9,10))
    b = np.roll(a, 1, 2)
    A,B = np.zeros((2,20,40,40), bool)
    A[7:13,20:29,5:15] = a
    B[7:13,20:29,5:15] = b
    assert nsd(A, B, (4,1,.7))==pytest.approx(nsd(a, b, (4,1,.7)))

# --- what holds for any masks -----------------------------------------------------------------------
anything = pytest.mark.parametrize('case', [pair(np.random.default_rng(seed), 3) for seed in range(40)], ids=range(40))

@anything
def test_nsd_is_a_share(case): assert 0<=nsd(*case)<=1

@anything
def test_nsd_does_not_ask_which_mask_is_the_truth(case):
    a,b,spacing,tolerance = case
    assert nsd(a, b, spacing, tolerance)==pytest.approx(nsd(b, a, spacing, tolerance))

@anything
def test_nsd_grows_with_the_tolerance_up_to_1(case):
    a,b,spacing,tolerance = case
    assert nsd(a, b, spacing, tolerance+1)>=nsd(a, b, spacing, tolerance)-1e-12
    assert nsd(a, b, spacing, 1e6)==1

@anything
def test_nsd_is_the_same_upside_down(case):
    a,b,spacing,tolerance = case
    assert nsd(a[::-1], b[::-1], spacing, tolerance)==pytest.approx(nsd(*case))

@anything
def test_nsd_is_the_same_with_the_axes_in_another_order(case):
    a,b,(z,y,x),tolerance = case
    turned = nsd(a.transpose(2, 0, 1), b.transpose(2, 0, 1), (x,z,y), tolerance)
    assert turned==pytest.approx(nsd(*case))

# --- both scores ------------------------------------------------------------------------------------
def test_a_volume_is_scored_in_3d(noise):
    assert score(*noise, (3,1,.5), 2.)==(dsc(*noise),nsd(*noise, (3,1,.5), 2.))

def test_a_volume_of_one_slice_is_scored_as_a_picture():
    a = blob(np.random.default_rng(4), (1,20,30))
    b = np.roll(a, 2, 2)
    assert score(a, b, (9,1,2))==(dsc(a[0], b[0]),nsd(a[0], b[0], (1,2)))
    assert score(a, b, (9,1,2))[1]!=nsd(a, b, (9,1,2))

def test_one_slice_is_no_score_of_a_volume(noise):
    with pytest.raises(InputError, match='differ in shape'): score(noise[0][:1], noise[1], (3,1,.5))

# --- cost -------------------------------------------------------------------------------------------
def test_a_gallbladder_in_a_scan_is_fast():
    z,y,x = np.ogrid[:40,:512,:512]
    a = ((z-20)/6)**2+((y-250)/22)**2+((x-180)/16)**2<1
    nsd(a, a)
    start = time.perf_counter()
    nsd(a, np.roll(a, 2, 2), (5,.8,.8))
    assert time.perf_counter()-start<2
