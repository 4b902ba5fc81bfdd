"Masks from prompts: the right place in images of any shape, the source geometry, and refusals"
import numpy as np
import pandas as pd
import pytest
import torch
from medsam_nb.core import InputError
from medsam_nb.curate import Recipe
from medsam_nb.embed import encode
from medsam_nb.predict import BOX_COLUMNS, Prediction, Predictor, _paint, everything, oracle_boxes, predict_volume
from medsam_nb.prompt import Grid, mask_to_box
from medsam_nb.volume import Volume
from tiny import disc, lite, quick, scan

def ellipse(shape, row, col, a, b):
    y,x = np.mgrid[:shape[0],:shape[1]]+.5
    return ((y-row)/a)**2+((x-col)/b)**2 < 1

def picture(mask, seed=0): return np.clip(np.random.default_rng(seed).normal(70, 8, mask.shape)+90*mask, 0, 255).astype(np.uint8)

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
                      (dict(points=[[1,2],[3,4]], labels=[1,0,1]), 'one 0 .background. or 1'), (dict(points=[[1,2]], labels=[2]), 'one 0 .background. or 1')):
        with pytest.raises(InputError, match=match): p.predict(**kw)
    with pytest.raises(InputError, match='No image is set'): Predictor(lite()).predict((0,0,9,9))
    for bad in (im.astype(np.int16)-200, im.astype(float)*2, np.where(m[0], np.nan, 1.), im[None], np.zeros((4,4,4), np.uint8)):
        with pytest.raises(InputError, match='curate.normalize'): Predictor(lite()).set_image(bad)


# ---- volumes ----
def test_the_smaller_mask_wins_where_masks_overlap():
    big, small = disc((20,20), 8, 8, 6), disc((20,20), 12, 12, 4)
    for iou, order in (((.9,.5), (0,1)), ((.5,.9), (0,1)), ((.9,.5), (1,0))):   # whatever the decoder thinks of them, in whatever order
        masks, labels = np.stack([big,small])[list(order)], np.array([3,7])[list(order)]
        out = _paint(Prediction(masks, np.array(iou), None), labels)
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
    with pytest.raises(InputError, match=r'none of the ids \[4\]; they hold \[0, 1, 9\]'): oracle_boxes(Volume(lab, (1,1,1)), [4])
