"Masks from prompts: the right place in images of any shape, the source geometry, and refusals"
import warnings
from copy import deepcopy
import numpy as np, pandas as pd, pytest, torch
from hypothesis import given, settings, strategies as st
from medsam_nb.core import InputError
from medsam_nb.embed import encode
from medsam_nb.metrics import dsc
from medsam_nb.predict import (Prediction, Predictor, _asked, click_rounds, everything, label_map, match_regions,
                               oracle_boxes, predict_slices, predict_volume)
from medsam_nb.prompt import BOX_COLUMNS, Ask, Box, Line, Outline, Points, line_to_box, mask_to_box
from medsam_nb.view import Grid, Recipe, View, resize_image
from medsam_nb.volume import Volume
from tiny import disc, lite, quick, scan

SHAPE = (120,300)
BOXES_ONLY = 'ignore:lite was trained with boxes only'

def ellipse(shape, row, col, a, b):
    y,x = np.mgrid[:shape[0],:shape[1]]+.5
    return ((y-row)/a)**2+((x-col)/b)**2<1

def picture(mask, seed=0):
    noise = np.random.default_rng(seed).normal(70, 8, mask.shape)
    return np.clip(noise+90*mask, 0, 255).astype(np.uint8)

def sent(p, *args, **kwargs):
    "What the prompt encoder is given for the arguments of `predict`"
    return p._frame(_asked(p.grid, *args, **kwargs))

def centre(m): return np.argwhere(m).mean(0)

@pytest.fixture(scope='module')
def wide():
    "A wide image with two ellipses: predictor, image, masks"
    m = [ellipse(SHAPE, 70, 220, 30, 45), ellipse(SHAPE, 45, 70, 25, 35)]
    im = picture(m[0]|m[1])
    return Predictor(lite()).set_image(im),im,m

@pytest.fixture
def fresh():
    "LiteMedSAM that has not warned yet"
    sam = deepcopy(lite())
    sam.click_warned = False
    return sam


# ---- where the mask lies ----
@pytest.mark.parametrize('shape, where, fit', [
    ((120,300), (70,220,30,45), 'pad'),
    ((500,260), (380,120,60,50), 'pad'),
    ((120,240), (60,150,30,45), 'squash'),
    ((90,64), (60,30,15,12), 'pad')])
def test_mask_lies_on_the_object(shape, where, fit):
    gt = ellipse(shape, *where)
    p = Predictor(lite()).set_image(picture(gt), fit=fit).predict(mask_to_box(gt))
    assert p.masks.shape==(1,*shape) and p.masks.dtype==bool
    assert dsc(p.masks[0], gt)>.9
    assert np.abs(centre(p.masks[0])-centre(gt)).max()<.015*max(shape)

def test_two_boxes_give_two_masks(wide):
    p,im,m = wide
    both = p.predict(np.stack([mask_to_box(x) for x in m]))
    assert both.masks.shape==(2,*SHAPE) and both.iou.shape==(2,) and both.logits.shape==(2,256,256)
    assert all(dsc(a, b)>.9 for a,b in zip(both.masks, m))

def test_a_box_of_any_type_is_one_box(wide):
    p,im,m = wide
    box = mask_to_box(m[0])
    want = p.predict(box).masks
    for t in (int, np.int16, np.float64): assert np.array_equal(p.predict(box.astype(t)).masks, want)
    assert np.array_equal(p.predict(box.astype(int).tolist()).masks, want)

def test_a_box_gets_the_same_mask_alone_and_among_others(wide):
    p,im,m = wide
    boxes = np.stack([mask_to_box(x) for x in m])
    both = p.predict(boxes)
    assert np.array_equal(p.predict(boxes[:1]).masks[0], both.masks[0])
    assert np.allclose(p.predict(boxes[1]).logits[0], both.logits[1], atol=1e-3)

def test_a_stored_embedding_gives_the_same(wide):
    p,im,m = wide
    grid = Grid(im.shape)
    e = encode(lite(), np.stack([resize_image(im)]*3, -1)[None], grid.content)[0]
    q = Predictor(lite()).set_embedding(e.numpy(), grid)
    assert np.array_equal(q.predict(mask_to_box(m[0])).masks, p.predict(mask_to_box(m[0])).masks)

def test_a_prediction_without_an_image_can_be_shown(wide):
    p,im,m = wide
    q = Predictor(lite()).set_embedding(p.embedding[0], p.grid)
    assert q.image is None
    assert q.predict(mask_to_box(m[0])).show() is not None

@pytest.mark.filterwarnings(BOXES_ONLY)
def test_three_answers_to_one_click(wide):
    three = wide[0].predict(points=[[220,70]], multimask=True)
    assert three.masks.shape==(1,3,*SHAPE) and three.iou.shape==(1,3)
    assert repr(three) and three.show() is not None

@pytest.mark.filterwarnings(BOXES_ONLY)
@pytest.mark.parametrize('kwargs, n', [
    (dict(points=[[220,70],[70,45]], point_labels=[1,0]), 1),
    (dict(points=[[[220,70]],[[70,45]]]), 2)])
def test_clicks_on_one_object_and_on_several(wide, kwargs, n):
    assert wide[0].predict(**kwargs).masks.shape==(n,*SHAPE)

@pytest.mark.filterwarnings(BOXES_ONLY)
def test_logits_go_back_in(wide):
    p,im,m = wide
    box = mask_to_box(m[0])
    assert p.predict(box=box, mask=p.predict(box).logits[0]).masks.shape==(1,*SHAPE)

def test_colour_and_grey_agree(wide):
    p,im,m = wide
    q = Predictor(lite()).set_image(np.stack([im]*3, -1))
    assert np.array_equal(q.predict(mask_to_box(m[0])).masks, p.predict(mask_to_box(m[0])).masks)

@pytest.mark.parametrize('recipe', [Recipe(), Recipe(fit='squash', window='abdomen'), Recipe('MR', size=128)])
def test_a_view_is_seen_as_its_image_is(recipe):
    v = Volume(scan()[0], (3,.8,.8))
    view = View(v, recipe)
    p,q = Predictor(quick()).set_view(view, 2),Predictor(quick()).set_image(view.grey(2), recipe.size, recipe.fit)
    assert torch.equal(p.embedding, q.embedding) and p.grid==q.grid
    assert np.array_equal(p.image, q.image)

@pytest.mark.parametrize('flip', ['ud','lr','udlr'])
def test_a_turned_view_is_asked_and_answers_in_pixels_of_the_slice(flip):
    v = Volume(scan()[0], (3,.8,.8))
    turn = Grid(v.shape[1:], flip=flip).turn
    over = Volume(np.stack([turn(s) for s in v.array]), v.spacing)
    p = Predictor(quick(), quiet=True).set_view(View(v, Recipe()), 1)
    q = Predictor(quick(), quiet=True).set_view(View(over, Recipe(flip=flip)), 1)
    assert torch.equal(p.embedding, q.embedding)
    assert np.array_equal(q.image, turn(p.image))
    gt = disc((64,80), 30, 34, 12)
    by_box,by_mask = q.predict(mask_to_box(turn(gt))),q.predict(mask=turn(gt))
    assert np.array_equal(turn(by_box.masks[0]), p.predict(mask_to_box(gt)).masks[0])
    assert np.array_equal(turn(by_mask.masks[0]), p.predict(mask=gt).masks[0])


# ---- refusals ----
NONSENSE = [
    (dict(), 'no prompt'),
    (dict(box=(10,10,5,20)), 'inverted'),
    (dict(box=(20,10,5,20)), 'inverted'),
    (dict(box=(5,20,10,10)), 'inverted'),
    (dict(box=(10,10,10,20)), 'no area'),
    (dict(box=(400,10,500,20)), 'covers nothing|outside'),
    (dict(box=(-9,-9,0,0)), 'covers nothing'),
    (dict(box=(0,0,np.nan,9)), 'not finite'),
    (dict(box=(0,0,np.inf,9)), 'not finite'),
    (dict(box=(1,2,3)), 'four numbers'),
    (dict(box='a box'), 'box cannot be read'),
    (dict(box=['a','b','c','d']), 'cannot be read'),
    (dict(box=np.zeros((0,4))), 'at least one box'),
    (dict(box=np.zeros((1,1,4))), 'box has shape'),
    (dict(box=[(1,2,30,40),(1,2,3)]), 'box cannot be read.*give'),
    (dict(points=[[10,121]]), 'outside'),
    (dict(points=[[np.nan,3]]), 'outside'),
    (dict(points=[1,2,3]), 'points have shape'),
    (dict(points=np.zeros((0,2))), 'points have shape'),
    (dict(points=np.zeros((0,3,2))), 'points have shape'),
    (dict(points='x'), 'cannot be read as numbers'),
    (dict(points=[[1,2],[3,4]], point_labels=[1]), 'one 0 .background. or 1'),
    (dict(points=[[1,2],[3,4]], point_labels=[1,0,1]), 'one 0 .background. or 1'),
    (dict(points=[[1,2]], point_labels=[2]), 'one 0 .background. or 1'),
    (dict(points=[[1,2],[3,4]], point_labels=[[1],[1,0]]), 'labels cannot be read'),
    (dict(box=(1,1,9,9), point_labels=[1]), 'without points'),
    (dict(box=[(1,1,9,9)]*2, points=[[3,3]]), "do not pair: {'boxes': 2, 'points': 1}"),
    (dict(box=(1,1,9,9), mask=np.zeros((2,256,256))), 'do not pair'),
    (dict(mask=np.zeros((120,300))), 'mask prompt is float64 of shape .120, 300.'),
    (dict(mask=np.ones((256,256), bool)), 'mask prompt is bool'),
    (dict(mask=np.full((256,256), np.nan)), 'not finite'),
    (dict(mask=[[1,2],[3]]), 'mask cannot be read'),
    (dict(mask=np.eye(256)), 'pass mask > 0'),
    (dict(mask=np.zeros((0,256,256))), 'mask prompt'),
    (dict(mask='x'), 'cannot be read')]

@pytest.mark.parametrize('kwargs, match', NONSENSE)
def test_nonsense_is_refused(wide, kwargs, match):
    with pytest.raises(InputError, match=match): wide[0].predict(**kwargs)

def test_nothing_can_be_asked_without_an_image():
    p = Predictor(lite())
    with pytest.raises(InputError, match='no image is set'): p.predict((0,0,9,9))
    with pytest.raises(InputError, match='no image is set'): p.ask([Box((0,0,9,9))])

@pytest.mark.parametrize('bad', [
    np.zeros(SHAPE, np.int16)-200, np.full(SHAPE, 300.), np.full(SHAPE, np.nan), np.zeros((1,*SHAPE), np.uint8),
    np.zeros((4,4,4), np.uint8)])
def test_what_is_no_picture_is_refused(bad):
    with pytest.raises(InputError, match='view.normalize'): Predictor(lite()).set_image(bad)


# ---- prompts and what comes back ----
SHAPES = st.sampled_from([(120,300),(333,97),(64,64),(1024,512)])

@given(st.integers(0, 2**32-1), SHAPES, st.sampled_from(['pad','squash']))
@settings(deadline=None, max_examples=40)
def test_whole_numbers_reach_the_decoder_untruncated(seed, shape, fit):
    "Whatever type the numbers of a box or a click have, the prompt encoder is given the same ones"
    rng = np.random.default_rng(seed)
    H,W = shape
    p = Predictor(lite()).set_embedding(np.zeros((256,64,64), np.float32), Grid(shape, 256, fit))
    (x0,x1),(y0,y1) = np.sort(rng.choice(W, 2, replace=False)),np.sort(rng.choice(H, 2, replace=False))
    box = np.array([x0,y0,x1,y1])
    want = sent(p, box.astype(float), [[float(x0),float(y1)]])
    for t in (int, np.int32, np.uint16, np.float32):
        got = sent(p, box.astype(t), np.array([[x0,y1]]).astype(t), [1])
        for k in ('boxes','points'): torch.testing.assert_close(got[k], want[k], atol=1e-3, rtol=1e-5)
    by_hand = box*np.tile(np.array(p.grid.content[::-1])/[W,H], 2)-.5
    torch.testing.assert_close(want['boxes'][0].double(), torch.as_tensor(by_hand), atol=1e-3, rtol=1e-5)

def test_a_box_over_the_padded_border_is_cut_at_the_image(wide):
    p,im,m = wide
    x0,y0,x1,y1 = mask_to_box(m[0])
    over = (x0,y0,900,400) # a 120 x 300 image: the padding begins at row 120
    assert np.array_equal(p.predict((x0,y0,300,120)).masks, p.predict(over).masks)
    edge = torch.tensor([256,p.grid.content[0]])-.5
    torch.testing.assert_close(sent(p, over)['boxes'][0,2:], edge, atol=1e-4, rtol=0)

@pytest.fixture(scope='module')
def fine():
    "A mask in an image four times finer than the decoder's grid, and the truth"
    gt = ellipse((1024,1024), 520, 480, 260, 330)
    return Predictor(lite()).set_image(picture(gt)).predict(mask_to_box(gt)).masks[0],gt

def test_outlines_are_not_made_of_decoder_pixels(fine):
    "The outline has steps of one pixel, not of four as if thresholded first and enlarged after"
    m,gt = fine
    coarse = np.kron(m[2::4,2::4], np.ones((4,4), bool))
    def still(a): return (np.diff([r.argmax() for r in a[a.any(1)]])==0).mean()
    assert still(m)<.6<still(coarse)
    assert dsc(m, gt)>.9

def test_a_fine_mask_has_no_holes_like_a_comb(fine):
    rows = fine[0][:,480:520].sum(1)>0
    assert len(np.diff(np.flatnonzero(np.diff(rows))))==1

def test_a_mask_of_the_image_becomes_logits_where_it_lies(wide):
    p,im,m = wide
    got = sent(p, mask=m[0])['masks']
    assert got.shape==(1,1,256,256) and set(got.unique().tolist())=={-8.,8.}
    assert dsc(p.grid.mask_from_grid(got[0])[0].numpy()>0, m[0])>.97

@pytest.mark.parametrize('t', [np.uint8, int])
def test_a_mask_of_whole_numbers_is_a_mask(wide, t):
    p,im,m = wide
    assert torch.equal(sent(p, mask=m[0].astype(t))['masks'], sent(p, mask=m[0])['masks'])

def test_logits_are_passed_on_as_they_are(wide):
    p,im,m = wide
    logits = p.predict(mask_to_box(m[0])).logits
    assert np.array_equal(sent(p, mask=logits)['masks'].numpy()[:,0], logits)

@pytest.mark.filterwarnings(BOXES_ONLY)
def test_several_masks_pair_with_several_boxes(wide):
    p,im,m = wide
    assert p.predict([mask_to_box(o) for o in m], mask=np.stack(m)).masks.shape==(2,*SHAPE)

GRIDS = [(512,'pad',None), (256,'squash',None), (128,'squash',None), (256,'pad','ud'), (200,'squash','udlr')]

@pytest.mark.parametrize('size, fit, flip', GRIDS)
def test_mask_prompts_on_any_grid(size, fit, flip):
    gt = ellipse((120,240), 60, 150, 30, 45)
    p = Predictor(quick()).set_embedding(torch.zeros(256,64,64), Grid(gt.shape, size, fit, flip))
    got = sent(p, mask=gt)['masks']
    assert got.shape==(1,1,256,256)
    assert dsc(p.grid.mask_from_grid(got[0])[0].numpy()>0, gt)>.97
    assert p.predict(mask_to_box(gt), mask=gt).masks.shape==(1,120,240)

XY = torch.tensor([[220.,70.]])
@pytest.mark.filterwarnings(BOXES_ONLY)
@pytest.mark.parametrize('as_box, points, as_mask', [
    (lambda b: torch.tensor(b, requires_grad=True), XY.to(torch.bfloat16).round(), torch.tensor),
    (lambda b: torch.tensor(b).double(), XY.long(), lambda m: torch.tensor(m).int())])
def test_tensors_are_prompts_too(wide, as_box, points, as_mask):
    p,im,m = wide
    box = mask_to_box(m[0])
    want = p.predict(box, points=[[220,70]], mask=m[0])
    got = p.predict(as_box(box), points=points, point_labels=torch.tensor([1]), mask=as_mask(m[0]))
    assert np.array_equal(got.masks, want.masks)

@pytest.mark.filterwarnings(BOXES_ONLY)
def test_logits_may_be_a_tensor_with_gradients(wide):
    p,im,m = wide
    box = mask_to_box(m[0])
    logits = p.predict(box).logits
    again = p.predict(box, mask=torch.tensor(logits, requires_grad=True))
    assert np.array_equal(again.masks, p.predict(box, mask=logits).masks)

def test_the_boxes_that_were_asked_are_kept(wide):
    assert wide[0].predict((-30,-30,500,60)).boxes.tolist()==[[0,0,300,60]]

@pytest.mark.filterwarnings(BOXES_ONLY)
def test_labels_of_clicks_go_by_their_old_name_with_a_warning(wide):
    p = wide[0]
    two = [[70,45],[220,70]]
    with pytest.warns(FutureWarning, match='labels is called point_labels'): old = p.predict(points=two, labels=[1,0])
    assert np.array_equal(old.masks, p.predict(points=two, point_labels=[1,0]).masks)
    with pytest.warns(FutureWarning, match='point_labels'): assert old.labels.tolist()==[[1,0]]


# ---- prompts of any kind ----
@pytest.mark.filterwarnings(BOXES_ONLY)
def test_prompts_of_all_kinds_are_answered_in_their_order(wide):
    p,im,m = wide
    box,other = (tuple(map(float, mask_to_box(o))) for o in m)
    line,clicks = (175.,70.,265.,71.),((70.,45.),(220.,70.))
    got = p.ask([Points(clicks, (1,0)), Box(box), Line(line), Box(other)], (3,2,.8))
    boxes = p.predict([box, line_to_box(line, SHAPE, spacing=(2,.8)), other])
    click = p.predict(points=clicks, point_labels=(1,0))
    assert np.array_equal(got.logits, np.concatenate([click.logits, boxes.logits]))
    assert np.array_equal(got.masks, np.concatenate([click.masks, boxes.masks]))
    assert np.array_equal(got.iou, np.concatenate([click.iou, boxes.iou]))

def test_boxes_go_through_the_decoder_together(wide, monkeypatch):
    p,im,m = wide
    seen,run = [],p._answer
    monkeypatch.setattr(p, '_answer', lambda asked: seen.append(len(asked['boxes'])) or run(asked))
    p.ask([Box(tuple(mask_to_box(o))) for o in (*m, *m)])
    assert seen==[4]

def test_a_dict_is_a_prompt_and_a_prediction_shows_it(wide):
    p,im,m = wide
    got = p.ask([dict(kind='box', box=[-9,-9,90,90])])
    assert got.prompts==[Box((0.,0.,90.,90.))]
    assert len(got.show().patches)==1

@pytest.mark.filterwarnings(BOXES_ONLY)
def test_an_outline_is_asked_as_its_box_and_its_mask(wide):
    p,im,m = wide
    outline = Outline(((40.,25.),(100.,25.),(100.,65.),(40.,65.)))
    want = p.predict((40,25,100,65), mask=outline.mask(SHAPE))
    assert np.array_equal(p.ask([Box((1.,1.,50.,50.)), outline]).logits[1:], want.logits)

@pytest.mark.parametrize('prompts, match', [
    ([], 'no prompt'),
    ([Box((9,9,3,20))], 'inverted'),
    ([Points(((1,999),), (1,))], 'outside'),
    ([dict(kind='lasso')], "has to be 'box' or 'line' or 'points'"),
    ([3], "has to be 'box'")])
def test_prompts_that_cannot_be_meant_are_refused(wide, prompts, match):
    with pytest.raises(InputError, match=match): wide[0].ask(prompts)


# ---- everything ----
def test_everything_on_an_image_that_is_not_square(wide):
    found = everything(lite(), wide[1], points_per_side=2, pred_iou_thresh=0., stability_score_thresh=0.)
    areas = [r['area'] for r in found]
    assert found and all(r['segmentation'].shape==SHAPE for r in found)
    assert areas==sorted(areas, reverse=True)

@pytest.mark.parametrize('bad', [np.zeros((20,30), np.int16), np.zeros((20,30,4), np.uint8), np.full(SHAPE, 900.)])
def test_everything_refuses_what_is_no_picture(bad):
    with pytest.raises(InputError, match='view.normalize'): everything(lite(), bad)

@pytest.mark.parametrize('kwargs, most', [(dict(), 16), (dict(points_per_batch=25), 25)])
def test_everything_takes_small_batches_on_a_cpu(wide, monkeypatch, kwargs, most):
    seen,run = [],lite().mask_decoder.forward
    def forward(**kw):
        seen.append(len(kw['sparse_prompt_embeddings']))
        return run(**kw)
    monkeypatch.setattr(lite().mask_decoder, 'forward', forward)
    everything(lite(), wide[1], points_per_side=5, **kwargs)
    assert max(seen)==most

def test_regions_are_matched_with_organs(wide):
    im,m = wide[1:]
    truth = np.where(m[0], 3, np.where(m[1], 5, 0))
    left = m[0]&(np.arange(300)<220)
    t = match_regions([dict(segmentation=o) for o in (~(m[0]|m[1]), m[1], left)], truth)
    assert t.label.tolist()==[3,5] and t.pixels.tolist()==[m[0].sum(),m[1].sum()]
    assert t.region.tolist()==[2,1]
    assert t.DSC[1]==1 and .5<t.DSC[0]<.8

def test_a_region_that_touches_no_organ_is_none(wide):
    im,m = wide[1:]
    truth = np.where(m[0], 3, np.where(m[1], 5, 0))
    for regions in ([], [dict(segmentation=~(m[0]|m[1]))]):
        t = match_regions(regions, truth)
        assert t.region.isna().all() and (t.DSC==0).all() and len(t)==2

def test_without_organs_there_is_nothing_to_match(): assert not len(match_regions([], np.zeros((4,4))))


# ---- the warning about clicks ----
@pytest.fixture
def strict():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        yield

def test_a_box_never_warns(wide, fresh, strict): Predictor(fresh).set_image(wide[1]).predict(mask_to_box(wide[2][0]))

def test_clicks_warn_once(wide, fresh, strict):
    im,m = wide[1:]
    p = Predictor(fresh).set_image(im)
    with pytest.raises(UserWarning, match='lite was trained with boxes only'): p.predict(points=[[70,45]])
    p.predict(points=[[70,45]])
    p.predict(mask_to_box(m[0]), points=[[70,45]])
    everything(fresh, im, points_per_side=1)

@pytest.mark.parametrize('which', [('mask',), ('box','points'), ('box','mask')])
def test_what_is_not_only_a_box_warns(wide, fresh, strict, which):
    im,m = wide[1:]
    have = dict(mask=m[0], box=mask_to_box(m[0]), points=[[70,45]])
    p = Predictor(fresh).set_image(im)
    with pytest.raises(UserWarning, match='boxes only'): p.predict(**{k:have[k] for k in which})

def test_everything_warns(wide, fresh, strict):
    with pytest.raises(UserWarning, match='boxes only'): everything(fresh, wide[1], points_per_side=1)

def test_a_quiet_predictor_does_not_warn(wide, fresh, strict):
    Predictor(fresh, quiet=True).set_image(wide[1]).predict(points=[[70,45]])
    assert not fresh.click_warned

def test_a_model_that_was_trained_with_clicks_does_not_warn(wide, fresh, strict):
    fresh.boxes_only = False
    Predictor(fresh).set_image(wide[1]).predict(points=[[70,45]])


# ---- rounds of clicks ----
@pytest.fixture(scope='module')
def rounds(wide):
    p,im,m = wide
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return click_rounds(p, m[0], 4)

def test_each_round_has_a_click_more(rounds):
    assert [o.points.shape[1] for o in rounds]==[1,2,3,4]
    assert all(o.masks.shape==(1,*SHAPE) and o.iou.shape==(1,) for o in rounds)

def test_the_first_click_is_on_the_object(wide, rounds):
    x,y = rounds[0].points[0,0].astype(int)
    assert wide[2][0][y,x] and rounds[0].point_labels.tolist()==[[1]]

@pytest.mark.filterwarnings(BOXES_ONLY)
def test_the_first_of_three_masks_is_taken_by_predicted_iou(wide, rounds):
    three = wide[0].predict(points=rounds[0].points[0], multimask=True)
    assert np.array_equal(rounds[0].masks[0], three.masks[0,three.iou[0].argmax()])

@pytest.mark.filterwarnings(BOXES_ONLY)
def test_later_rounds_show_all_clicks_and_the_last_logits(wide, rounds):
    a,b = rounds[:2]
    again = wide[0].predict(points=b.points[0], point_labels=b.point_labels[0], mask=a.logits)
    assert np.array_equal(again.masks, b.masks)

def test_each_click_lies_where_the_mask_before_was_wrong(wide, rounds):
    gt = wide[2][0]
    for a,b in zip(rounds, rounds[1:]):
        x,y = b.points[0,-1].astype(int)
        assert a.masks[0][y,x]!=gt[y,x] and b.point_labels[0,-1]==gt[y,x]

@pytest.mark.filterwarnings(BOXES_ONLY)
def test_nothing_is_carried_where_it_is_not_wanted(wide):
    p,im,m = wide
    b = click_rounds(p, m[0], 2, carry=False)[1]
    assert np.array_equal(b.masks, p.predict(points=b.points[0], point_labels=b.point_labels[0]).masks)

@pytest.mark.filterwarnings(BOXES_ONLY)
def test_rounds_that_begin_with_a_box_keep_it(wide):
    p,im,m = wide
    box = mask_to_box(m[0])
    boxed = click_rounds(p, m[0], 2, box=box)
    assert len(boxed)==3 and boxed[0].points is None
    assert np.array_equal(boxed[0].masks, p.predict(box).masks)
    assert (boxed[2].boxes==box).all()

def test_a_right_mask_needs_no_click(wide):
    p,im,m = wide
    box = mask_to_box(m[0])
    assert len(click_rounds(p, p.predict(box).masks[0], 3, box=box))==1

def test_a_round_can_be_shown(rounds): assert rounds[2].show() is not None


# ---- label maps ----
BIG,SMALL = disc((20,20), 8, 8, 6),disc((20,20), 12, 12, 4)
TWO = BIG&SMALL

def prediction(iou, order=(0,1)): return Prediction(np.stack([BIG,SMALL])[list(order)], np.array(iou), None)

@pytest.mark.parametrize('iou, winner', [((.9,.5), 3), ((.5,.9), 7)])
def test_overlap_goes_to_the_smaller_or_by_iou(iou, winner):
    assert set(label_map(prediction(iou), [3,7], overlap='smaller')[TWO])=={7}
    assert set(label_map(prediction(iou), [3,7], overlap='iou')[TWO])=={winner}

@pytest.mark.parametrize('iou, order', [((.9,.5), (0,1)), ((.5,.9), (0,1)), ((.9,.5), (1,0))])
def test_the_smaller_mask_wins_whatever_the_decoder_thinks_in_whatever_order(iou, order):
    out = label_map(prediction(iou, order), np.array([3,7])[list(order)])
    assert set(out[SMALL])=={7} and set(out[BIG&~SMALL])=={3}
    assert TWO.any() and not out[~BIG&~SMALL].any()

def test_an_overlap_rule_that_is_not_known_is_refused():
    with pytest.raises(InputError, match="'smaller', 'iou'"): label_map(prediction((.9,.5)), [3,7], 'larger')

@pytest.mark.parametrize('bad', [[3], [3,70000], [3,0], [-1,2], [1.5,2], ['a','b'], [[1,2]]])
def test_ids_that_are_no_ids_are_refused(bad):
    with pytest.raises(InputError, match='one whole number from 1 to 65535 for each of the 2'):
        label_map(prediction((.9,.5)), bad)

def test_of_three_masks_the_best_is_mapped():
    three = Prediction(np.stack([BIG,SMALL,SMALL])[None], np.array([[.1,.9,.2]]), np.zeros((1,3,4,4)))
    assert (label_map(three, [5])==5*SMALL).all()

def test_label_ids_go_by_their_old_name_with_a_warning():
    with pytest.warns(FutureWarning, match='label_ids'): out = label_map(prediction((.9,.5)), labels=[3,7])
    assert set(np.unique(out))=={0,3,7}


# ---- volumes ----
def boxes_of(*rows): return pd.DataFrame(rows, columns=BOX_COLUMNS)

def ct(): return Volume(scan()[0], (3,.8,.8))

def predict(boxes, recipe=None, volume=None):
    return predict_volume(Predictor(quick()), volume or ct(), boxes, recipe, progress=False)

def test_a_label_map_is_small_and_empty_where_nothing_was_asked():
    out = predict_volume(Predictor(lite()), ct(), boxes_of((1,9,22,18,46,42)), progress=False)
    assert out.dtype==np.uint8 and out.shape==(4,64,80)
    assert set(np.unique(out))=={0,9} and not out[[0,2,3]].any()

def test_an_id_above_255_needs_two_bytes():
    out = predict_volume(Predictor(lite()), ct(), boxes_of((1,300,22,18,46,42)), progress=False)
    assert out.dtype==np.uint16 and out.max()==300

def test_a_list_of_asks_and_a_table_are_the_same():
    table = boxes_of((1,9,22,18,46,42), (1,2,50,10,70,30), (3,9,20,20,40,40))
    asks = [Ask(z, label, Box(tuple(map(float, four)))) for z,label,*four in table.itertuples(index=False)]
    assert np.array_equal(predict(asks), predict(table))

def test_slices_come_with_what_was_asked():
    asks = [Ask(3, 9, Box((20,20,40,40))), Ask(1, 9, Line((22,30,46,30))), Ask(1, 2, Box((50,10,70,30)), 'oracle box')]
    got = list(predict_slices(Predictor(quick()), ct(), asks, progress=False))
    assert [z for z,*_ in got]==[1,3]
    assert [[a for a,_ in some] for *_,some in got]==[asks[1:], asks[:1]]
    assert all(np.isscalar(iou) for *_,some in got for _,iou in some)

@pytest.mark.filterwarnings(BOXES_ONLY)
@pytest.mark.parametrize('recipe', [Recipe(), Recipe(flip='udlr')])
def test_clicks_in_columns_of_their_own_are_still_read_with_a_warning(recipe):
    nan = np.nan
    clicks = dict(points=[[[34,30],[5,5]],None], point_labels=[[1,0],None])
    table = boxes_of((1,9,nan,nan,nan,nan), (1,2,50,10,70,30)).assign(**clicks)
    asks = [Ask(1, 9, Points([[34,30],[5,5]], [1,0])), Ask(1, 2, Box((50,10,70,30)))]
    with pytest.warns(FutureWarning, match='list of Ask'): old = predict(table, recipe)
    assert np.array_equal(old, predict(asks, recipe))

@pytest.mark.parametrize('rows, match', [
    ([(-1,9,1,1,9,9)], 'slices the volume does not have'),
    ([(4,9,1,1,9,9)], 'slices the volume does not have'),
    ([(np.nan,9,1,1,9,9)], '1 boxes cannot be used'),
    ([(1.5,9,1,1,9,9)], 'cannot be used'),
    ([(1,0,1,1,9,9)], 'cannot be used'),
    ([(1,-2,1,1,9,9)], 'cannot be used'),
    ([(1,70000,1,1,9,9)], 'cannot be used'),
    ([(1,'liver',1,1,9,9)], "cannot be used, the first is .*'label': 'liver'"),
    ([(1,9,9,1,1,9)], 'inverted'),
    ([(1,9,100,1,110,9)], 'covers nothing')])
def test_boxes_that_cannot_be_meant(rows, match):
    with pytest.raises(InputError, match=match): predict(boxes_of((1,9,1,1,9,9), *rows))

@pytest.mark.parametrize('nothing', [boxes_of(), []])
def test_nothing_to_segment_is_refused(nothing):
    with pytest.raises(InputError, match='empty'): predict(nothing)

def test_eight_bit_values_have_no_hounsfield_window():
    v = Volume(scan()[0].clip(0, 255).astype(np.uint8), (1,1,1))
    with pytest.raises(InputError, match='8-bit.*modality Photo') as e: predict(boxes_of((1,9,1,1,9,9)), volume=v)
    assert e.value.code=='8-bit-window'
    assert predict(boxes_of((1,9,1,1,9,9)), Recipe('Photo'), v).shape==v.shape


# ---- oracle boxes ----
@pytest.fixture
def labels():
    lab = scan(organs=((9,30,34,12),(1,50,60,8)), zs=(1,3))[1]
    return Volume(lab, (3,.8,.8))

def test_oracle_boxes_are_the_tight_boxes_of_each_slice(labels):
    t = oracle_boxes(labels)
    assert list(t)==BOX_COLUMNS and t[['z','label']].values.tolist()==[[1,1],[1,9],[3,1],[3,9]]
    for r in t.itertuples(): assert np.array_equal(mask_to_box(labels.array[r.z]==r.label), [r.x0,r.y0,r.x1,r.y1])

def test_oracle_boxes_of_some_labels_only(labels): assert oracle_boxes(labels, [9]).label.tolist()==[9,9]

def test_labels_that_are_not_there_have_no_oracle_boxes(labels):
    with pytest.raises(InputError, match=r'none of the ids \[4\]; they hold \[0, 1, 9\]'): oracle_boxes(labels, [4])

def test_a_box_round_each_piece_of_an_organ():
    two = np.zeros((1,20,30), np.uint8)
    two[0,2:6,3:9] = two[0,10:18,12:20] = 4
    v = Volume(two, (3,.8,.8))
    assert oracle_boxes(v, pieces=True).values.tolist()==[[0,4,12,10,20,18],[0,4,3,2,9,6]]
    assert len(oracle_boxes(v))==1
