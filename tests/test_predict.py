"Masks from prompts: the right place in images of any shape, the source geometry, and refusals"
import warnings
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st
from medsam_nb.core import InputError
from medsam_nb.curate import Recipe
from medsam_nb.embed import encode
from medsam_nb.predict import BOX_COLUMNS, Prediction, Predictor, _asked, ask, check_prompt, click_rounds, everything, label_map, match_regions, oracle_boxes, predict_volume
from medsam_nb.prompt import Grid, mask_to_box
from medsam_nb.volume import Volume
from tiny import disc, lite, quick, scan

def ellipse(shape, row, col, a, b):
    y,x = np.mgrid[:shape[0],:shape[1]]+.5
    return ((y-row)/a)**2+((x-col)/b)**2 < 1

def picture(mask, seed=0): return np.clip(np.random.default_rng(seed).normal(70, 8, mask.shape)+90*mask, 0, 255).astype(np.uint8)

def sent(p, *prompts):
    "What the prompt encoder is given for (box, points, labels, mask)"
    return p._frame(_asked(p.grid, *prompts))

def dice(a, b): return 2*(a&b).sum()/(a.sum()+b.sum())

def centre(m): return np.argwhere(m).mean(0)

@pytest.fixture(scope='module')
def wide():
    "A wide image with two ellipses: predictor, image, masks"
    m = [ellipse((120,300), 70, 220, 30, 45), ellipse((120,300), 45, 70, 25, 35)]
    im = picture(m[0]|m[1])
    return Predictor(lite()).set_image(im), im, m


# ---- where the mask lies ----
@pytest.mark.parametrize('shape, where, fit', [((120,300), (70,220,30,45), 'pad'), ((500,260), (380,120,60,50), 'pad'), ((120,240), (60,150,30,45), 'squash'), ((90,64), (60,30,15,12), 'pad')])
def test_mask_lies_on_the_object(shape, where, fit):
    gt = ellipse(shape, *where)
    p = Predictor(lite()).set_image(picture(gt), fit=fit).predict(mask_to_box(gt))
    assert p.masks.shape==(1,*shape) and p.masks.dtype==bool
    assert dice(p.masks[0], gt) > .9 and np.abs(centre(p.masks[0])-centre(gt)).max() < .015*max(shape)

def test_boxes_of_any_type_and_number(wide):
    p, im, m = wide; boxes = np.stack([mask_to_box(x) for x in m])
    both = p.predict(boxes)
    assert both.masks.shape==(2,120,300) and both.iou.shape==(2,) and both.logits.shape==(2,256,256) and all(dice(a, b) > .9 for a,b in zip(both.masks, m))
    for t in (int, np.int16, np.float64):
        one = p.predict(boxes[0].astype(t)); assert one.masks.shape==(1,120,300) and np.array_equal(one.masks[0], both.masks[0])
    assert np.array_equal(p.predict(boxes[0].astype(int).tolist()).masks[0], both.masks[0])
    assert np.array_equal(p.predict(boxes[:1]).masks[0], both.masks[0]) and np.allclose(p.predict(boxes[1]).logits[0], both.logits[1], atol=1e-3)

def test_a_stored_embedding_gives_the_same(wide):
    from medsam_nb.curate import resize_image
    p, im, m = wide; grid = Grid(im.shape); x = resize_image(im)
    e = encode(lite(), np.stack([x]*3, -1)[None], grid.content)[0]
    q = Predictor(lite()).set_embedding(e.numpy(), grid)
    assert np.array_equal(q.predict(mask_to_box(m[0])).masks, p.predict(mask_to_box(m[0])).masks) and q.image is None
    q.predict(mask_to_box(m[0])).show()

@pytest.mark.filterwarnings('ignore:lite was trained with boxes only')
def test_points_masks_and_three_answers(wide):
    p, im, m = wide
    three = p.predict(points=[[220,70]], multimask=True)
    assert three.masks.shape==(1,3,120,300) and three.iou.shape==(1,3) and repr(three) and three.show() is not None
    one = p.predict(points=[[220,70],[70,45]], labels=[1,0])
    assert one.masks.shape==(1,120,300)
    assert p.predict(points=[[[220,70]],[[70,45]]]).masks.shape==(2,120,300)
    again = p.predict(box=mask_to_box(m[0]), mask=p.predict(mask_to_box(m[0])).logits[0])
    assert again.masks.shape==(1,120,300)

def test_everything_on_an_image_that_is_not_square(wide):
    found = everything(lite(), wide[1], points_per_side=2, pred_iou_thresh=0., stability_score_thresh=0.)
    assert found and all(r['segmentation'].shape==(120,300) for r in found) and [r['area'] for r in found]==sorted((r['area'] for r in found), reverse=True)

def test_colour_and_grey_agree(wide):
    p, im, m = wide
    q = Predictor(lite()).set_image(np.stack([im]*3, -1))
    assert np.array_equal(q.predict(mask_to_box(m[0])).masks, p.predict(mask_to_box(m[0])).masks)


# ---- refusals ----
def test_nonsense_is_refused(wide):
    p, im, m = wide
    for kw, match in ((dict(), 'no prompt'), (dict(box=(10,10,5,20)), 'inverted'), (dict(box=(10,10,10,20)), 'no area'), (dict(box=(400,10,500,20)), 'covers nothing|outside'),
                      (dict(box=(0,0,np.nan,9)), 'not finite'), (dict(box=(1,2,3)), 'four numbers'), (dict(points=[[10,121]]), 'outside'), (dict(points=[[np.nan,3]]), 'outside'),
                      (dict(points=[1,2,3]), 'points have shape'), (dict(points=np.zeros((0,2))), 'points have shape'), (dict(points=[[1,2],[3,4]], labels=[1]), 'one 0 .background. or 1'),
                      (dict(points=[[1,2],[3,4]], labels=[1,0,1]), 'one 0 .background. or 1'), (dict(points=[[1,2]], labels=[2]), 'one 0 .background. or 1'),
                      (dict(box=(20,10,5,20)), 'inverted'), (dict(box=(5,20,10,10)), 'inverted'), (dict(box=(-9,-9,0,0)), 'covers nothing'), (dict(box=(0,0,np.inf,9)), 'not finite'),
                      (dict(box='a box'), 'box cannot be read'), (dict(box=['a','b','c','d']), 'cannot be read'), (dict(box=np.zeros((0,4))), 'at least one box'), (dict(box=np.zeros((1,1,4))), 'box has shape'),
                      (dict(box=[(1,2,30,40),(1,2,3)]), 'box cannot be read.*is needed'), (dict(points='x'), 'cannot be read as numbers'), (dict(points=np.zeros((0,3,2))), 'points have shape'), (dict(box=(1,1,9,9), labels=[1]), 'without points'),
                      (dict(box=[(1,1,9,9)]*2, points=[[3,3]]), "do not pair: {'boxes': 2, 'points': 1}"), (dict(box=(1,1,9,9), mask=np.zeros((2,256,256))), 'do not pair'),
                      (dict(mask=np.zeros((120,300))), 'mask prompt is float64 of shape .120, 300.'), (dict(mask=np.ones((256,256), bool)), 'mask prompt is bool'), (dict(mask=np.full((256,256), np.nan)), 'not finite'),
                      (dict(points=[[1,2],[3,4]], labels=[[1],[1,0]]), 'labels cannot be read'), (dict(mask=[[1,2],[3]]), 'mask cannot be read'), (dict(mask=np.eye(256)), 'pass mask > 0'),
                      (dict(mask=np.zeros((0,256,256))), 'mask prompt'), (dict(mask='x'), 'cannot be read')):
        with pytest.raises(InputError, match=match): p.predict(**kw)
    with pytest.raises(InputError, match='No image is set'): Predictor(lite()).predict((0,0,9,9))
    for bad in (im.astype(np.int16)-200, im.astype(float)*2, np.where(m[0], np.nan, 1.), im[None], np.zeros((4,4,4), np.uint8)):
        with pytest.raises(InputError, match='curate.normalize'): Predictor(lite()).set_image(bad)


# ---- prompts and what comes back ----
@given(st.integers(0, 2**32-1), st.sampled_from([(120,300),(333,97),(64,64),(1024,512)]), st.sampled_from(['pad','squash']))
@settings(deadline=None, max_examples=40)
def test_whole_numbers_reach_the_decoder_untruncated(seed, shape, fit):
    "Whatever type the numbers of a box, a click or a diameter have, the prompt encoder is given the same ones"
    rng = np.random.default_rng(seed); H, W = shape
    p = Predictor(lite()).set_embedding(np.zeros((256,64,64), np.float32), Grid(shape, 256, fit))
    (x0,x1),(y0,y1) = np.sort(rng.choice(W, 2, replace=False)), np.sort(rng.choice(H, 2, replace=False))
    box = [int(v) for v in (x0,y0,x1,y1)]
    want = sent(p, np.array(box, float), [[float(x0),float(y1)]], None, None)
    for t in (int, np.int32, np.uint16, np.float32):
        got = sent(p, np.array(box).astype(t), np.array([[x0,y1]]).astype(t), [1], None)
        for k in ('boxes','points'): torch.testing.assert_close(got[k], want[k], atol=1e-3, rtol=1e-5)
    by_hand = np.array(box)*np.tile(np.array(p.grid.content[::-1])/[W,H], 2)-.5
    torch.testing.assert_close(want['boxes'][0].double(), torch.as_tensor(by_hand), atol=1e-3, rtol=1e-5)
    assert ask(dict(kind='line', line=[0,0,W-1,H-1]), shape)['box'].dtype==np.float32

def test_a_box_over_the_padded_border_is_cut_at_the_image(wide):
    p, im, m = wide
    x0,y0,x1,y1 = mask_to_box(m[0])
    inside, over = p.predict((x0,y0,300,120)), p.predict((x0,y0,900,400))   # a 120 x 300 image: the padding begins at row 120
    assert np.array_equal(inside.masks, over.masks)
    torch.testing.assert_close(sent(p, (x0,y0,900,400), None, None, None)['boxes'][0,2:], torch.tensor([256,p.grid.content[0]])-.5, atol=1e-4, rtol=0)

def test_outlines_are_not_made_of_decoder_pixels():
    "An image four times finer than the decoder's grid: the outline has steps of one pixel, not of four, and follows the ellipse"
    gt = ellipse((1024,1024), 520, 480, 260, 330)
    m = Predictor(lite()).set_image(picture(gt)).predict(mask_to_box(gt)).masks[0]
    coarse = np.kron(m[2::4,2::4], np.ones((4,4), bool))   # thresholded first, enlarged after: the artefact
    steps = lambda a: np.abs(np.diff([r.argmax() for r in a[a.any(1)]]))
    assert (steps(m)==0).mean() < .6 < (steps(coarse)==0).mean() and dice(m, gt) > .9
    runs = np.diff(np.flatnonzero(np.diff(m[:,480:520].sum(1)>0)))       # no holes like a comb
    assert len(runs)==1

def test_mask_prompts(wide):
    "A mask in image pixels becomes logits where it lies; logits go through as they are; several pair with several boxes"
    p, im, m = wide
    got = sent(p, None, None, None, m[0])['masks']
    assert got.shape==(1,1,256,256) and set(got.unique().tolist())=={-8.,8.}
    back = p.grid.mask_from_grid(got[0])[0].numpy()>0
    assert dice(back, m[0]) > .97
    for t in (np.uint8, int): assert torch.equal(sent(p, None, None, None, m[0].astype(t))['masks'], got)
    logits = p.predict(mask_to_box(m[0])).logits
    assert np.array_equal(sent(p, None, None, None, logits)['masks'].numpy()[:,0], logits)
    assert p.predict([mask_to_box(o) for o in m], mask=np.stack(m)).masks.shape==(2,120,300)

@pytest.mark.parametrize('size, fit', [(512,'pad'), (256,'squash'), (128,'squash')])
def test_mask_prompts_on_any_grid(size, fit):
    gt = ellipse((120,240), 60, 150, 30, 45)
    p = Predictor(quick()).set_image(picture(gt), size, fit)
    got = sent(p, None, None, None, gt)['masks']
    assert got.shape==(1,1,256,256) and dice(p.grid.mask_from_grid(got[0])[0].numpy()>0, gt) > .97
    assert p.predict(mask_to_box(gt), mask=gt).masks.shape==(1,120,240)

def test_tensors_are_prompts_too(wide):
    p, im, m = wide; box = mask_to_box(m[0])
    want = p.predict(box, points=[[220,70]], mask=m[0])
    for box_, xy, mask in ((torch.tensor(box, requires_grad=True), torch.tensor([[220.,70.]], dtype=torch.bfloat16).round(), torch.tensor(m[0])), (torch.tensor(box).double(), torch.tensor([[220,70]]), torch.tensor(m[0]).int())):
        assert np.array_equal(p.predict(box_, points=xy, labels=torch.tensor([1]), mask=mask).masks, want.masks)
    logits = torch.tensor(want.logits, requires_grad=True)
    assert np.array_equal(p.predict(box, mask=logits).masks, p.predict(box, mask=want.logits).masks)

def test_the_boxes_that_were_asked_are_kept(wide):
    assert wide[0].predict((-30,-30,500,60)).boxes.tolist()==[[0,0,300,60]]

@pytest.mark.parametrize('prompt, match', [(dict(kind='points', points=[[1,2],[3]], labels=[1,0]), 'cannot be read'), (dict(kind='points', points=[[1,2]], labels=[[1],[0]]), 'one 0'), (dict(kind='points', points=[[1,2]]), 'no labels'),
    (dict(kind='points', points=[[[1,2]],[[3,4]]], labels=[[1],[1]]), 'clicks of one prompt'), (dict(kind='points', points=[[1,99]], labels=[1]), 'outside'), (dict(kind='box', box='x'), 'four numbers'), (3, "'box', 'line' or 'points'")])
def test_prompts_from_outside_are_refused_in_a_sentence(prompt, match):
    with pytest.raises(InputError, match=match): check_prompt(prompt, (50,60))

def test_everything_refuses_what_is_no_picture(wide):
    for bad in (np.zeros((20,30), np.int16), np.zeros((20,30,4), np.uint8), wide[1].astype(float)*9):
        with pytest.raises(InputError, match='curate.normalize'): everything(lite(), bad)

def test_everything_takes_small_batches_on_a_cpu(wide, monkeypatch):
    seen, run = [], lite().mask_decoder.forward
    monkeypatch.setattr(lite().mask_decoder, 'forward', lambda **kw: seen.append(len(kw['sparse_prompt_embeddings'])) or run(**kw))
    everything(lite(), wide[1], points_per_side=5)
    assert max(seen)==16
    everything(lite(), wide[1], points_per_side=5, points_per_batch=25); assert max(seen)==25

def test_clicks_and_masks_warn_once_and_boxes_never(wide):
    im, m = wide[1:]
    from copy import deepcopy
    sam = deepcopy(lite()); sam.click_warned = False
    p = Predictor(sam).set_image(im)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        p.predict(mask_to_box(m[0]))
        with pytest.raises(UserWarning, match='lite was trained with boxes only'): p.predict(points=[[70,45]])
        p.predict(points=[[70,45]]); p.predict(mask_to_box(m[0]), points=[[70,45]]); everything(sam, im, points_per_side=1)
        for kw in (dict(mask=m[0]), dict(box=mask_to_box(m[0]), points=[[70,45]]), dict(box=mask_to_box(m[0]), mask=m[0])):
            sam.click_warned = False
            with pytest.raises(UserWarning, match='boxes only'): p.predict(**kw)
        sam.click_warned = False
        quiet = Predictor(sam, quiet=True).set_image(im); quiet.predict(points=[[70,45]]); assert not sam.click_warned
        sam.click_warned = False
        with pytest.raises(UserWarning, match='boxes only'): everything(sam, im, points_per_side=1)
        sam.click_warned, sam.boxes_only = False, False
        p.predict(points=[[70,45]])

def test_rounds_of_clicks(wide):
    p, im, m = wide
    r = click_rounds(p, m[0], 4)
    assert len(r)==4 and [o.points.shape[1] for o in r]==[1,2,3,4] and all(o.masks.shape==(1,120,300) and o.iou.shape==(1,) for o in r)
    assert m[0][int(r[0].points[0,0,1]), int(r[0].points[0,0,0])] and r[0].labels.tolist()==[[1]]
    three = p.predict(points=r[0].points[0], multimask=True)
    assert np.array_equal(r[0].masks[0], three.masks[0,three.iou[0].argmax()])            # the first of three masks, by predicted IoU
    again = p.predict(points=r[1].points[0], labels=r[1].labels[0], mask=r[0].logits)      # the second: all clicks and the last logits
    assert np.array_equal(again.masks, r[1].masks)
    for a,b in zip(r, r[1:]):                                                             # each click lies where the mask before was wrong
        x,y = b.points[0,-1].astype(int); assert a.masks[0][y,x]!=m[0][y,x] and b.labels[0,-1]==m[0][y,x]
    other = click_rounds(p, m[0], 2, carry=False)
    assert np.array_equal(other[1].masks, p.predict(points=other[1].points[0], labels=other[1].labels[0]).masks)
    boxed = click_rounds(p, m[0], 2, box=mask_to_box(m[0]))
    assert len(boxed)==3 and boxed[0].points is None and np.array_equal(boxed[0].masks, p.predict(mask_to_box(m[0])).masks) and (boxed[2].boxes==mask_to_box(m[0])).all()
    assert len(click_rounds(p, boxed[0].masks[0], 3, box=mask_to_box(m[0])))==1            # nothing to correct
    r[2].show(); p.predict(points=[[220,70]], multimask=True).show()

def test_regions_and_organs(wide):
    im, m = wide[1:]
    truth = np.where(m[0], 3, np.where(m[1], 5, 0))
    t = match_regions([dict(segmentation=~(m[0]|m[1])), dict(segmentation=m[1]), dict(segmentation=m[0]&(np.arange(300)<220))], truth)
    assert t.label.tolist()==[3,5] and t.pixels.tolist()==[m[0].sum(),m[1].sum()] and t.region.tolist()==[2,1] and t.DSC[1]==1 and .5 < t.DSC[0] < .8
    assert match_regions([dict(segmentation=~(m[0]|m[1]))], truth).region.isna().all()     # a region that touches no organ
    none = match_regions([], truth)
    assert none.region.isna().all() and (none.DSC==0).all() and not len(match_regions([], np.zeros((4,4))))

# ---- volumes ----
def test_overlap_rules():
    big, small = disc((20,20), 8, 8, 6), disc((20,20), 12, 12, 4)
    for iou in ((.9,.5), (.5,.9)):
        p = Prediction(np.stack([big,small]), np.array(iou), None)
        first, second = (label_map(p, [3,7], overlap=o)[big&small] for o in ('smaller','iou'))
        assert set(first)=={7} and set(second)=={3 if iou[0]>iou[1] else 7}
    with pytest.raises(InputError, match="'smaller' or 'iou'"): label_map(p, [3,7], 'larger')
    for bad in ([3], [3,70000], [3,0], [-1,2], [1.5,2], ['a','b'], [[1,2]]):
        with pytest.raises(InputError, match='one whole number from 1 to 65535 for each of the 2'): label_map(p, bad)
    three = Prediction(np.stack([big,small,small])[None], np.array([[.1,.9,.2]]), np.zeros((1,3,4,4)))
    assert (label_map(three, [5])==5*small).all()

def test_the_smaller_mask_wins_where_masks_overlap():
    big, small = disc((20,20), 8, 8, 6), disc((20,20), 12, 12, 4)
    for iou, order in (((.9,.5), (0,1)), ((.5,.9), (0,1)), ((.9,.5), (1,0))):   # whatever the decoder thinks of them, in whatever order
        masks, labels = np.stack([big,small])[list(order)], np.array([3,7])[list(order)]
        out = label_map(Prediction(masks, np.array(iou), None), labels)
        assert set(out[small])=={7} and set(out[big&~small])=={3} and not out[~big&~small].any() and (big&small).any()

def boxes_of(*rows): return pd.DataFrame(rows, columns=BOX_COLUMNS)

def predict(volume, boxes, recipe=None): return predict_volume(Predictor(quick()), volume, boxes, recipe, progress=False)

def test_label_types_and_empty_slices():
    v = Volume(scan()[0], (3,.8,.8))
    p = lite(); out = predict_volume(Predictor(p), v, boxes_of((1,9,22,18,46,42)), progress=False)
    assert out.dtype==np.uint8 and out.shape==v.shape and set(np.unique(out))=={0,9} and not out[[0,2,3]].any()
    assert predict_volume(Predictor(p), v, boxes_of((1,300,22,18,46,42)), progress=False).dtype==np.uint16

@pytest.mark.parametrize('rows, match', [([(-1,9,1,1,9,9)], 'slices the volume does not have'), ([(4,9,1,1,9,9)], 'slices the volume does not have'), ([(np.nan,9,1,1,9,9)], '1 boxes cannot be used'),
    ([(1.5,9,1,1,9,9)], 'cannot be used'), ([(1,0,1,1,9,9)], 'cannot be used'), ([(1,-2,1,1,9,9)], 'cannot be used'), ([(1,70000,1,1,9,9)], 'cannot be used'),
    ([(1,'liver',1,1,9,9)], "cannot be used, the first is .*'label': 'liver'"), ([(1,9,9,1,1,9)], 'inverted'), ([(1,9,100,1,110,9)], 'covers nothing'), ([], 'empty')])
def test_boxes_that_cannot_be_meant(rows, match):
    with pytest.raises(InputError, match=match): predict(Volume(scan()[0], (3,.8,.8)), boxes_of((1,9,1,1,9,9), *rows) if rows else boxes_of())

def test_eight_bit_values_have_no_hounsfield_window():
    v = Volume(scan()[0].clip(0, 255).astype(np.uint8), (1,1,1))
    with pytest.raises(InputError, match='8-bit.*modality Photo'): predict(v, boxes_of((1,9,1,1,9,9)))
    assert predict(v, boxes_of((1,9,1,1,9,9)), Recipe('Photo')).shape==v.shape

def test_oracle_boxes():
    _,lab = scan(organs=((9,30,34,12),(1,50,60,8)), zs=(1,3))
    t = oracle_boxes(Volume(lab, (3,.8,.8)))
    assert list(t)==BOX_COLUMNS and t[['z','label']].values.tolist()==[[1,1],[1,9],[3,1],[3,9]]
    for r in t.itertuples(): assert np.array_equal(mask_to_box(lab[r.z]==r.label), [r.x0,r.y0,r.x1,r.y1])
    assert oracle_boxes(Volume(lab, (3,.8,.8)), [9]).label.tolist()==[9,9]
    two = np.zeros((1,20,30), np.uint8); two[0,2:6,3:9] = two[0,10:18,12:20] = 4
    t = oracle_boxes(Volume(two, (3,.8,.8)), pieces=True)
    assert t.values.tolist()==[[0,4,12,10,20,18],[0,4,3,2,9,6]] and len(oracle_boxes(Volume(two, (3,.8,.8))))==1
    with pytest.raises(InputError, match=r'none of the ids \[4\]; they hold \[0, 1, 9\]'): oracle_boxes(Volume(lab, (1,1,1)), [4])
