"""Whole detectors: the module that is exported against mmdet, its file in both runtimes, and what is refused."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.hub import get_config
from mmengine.registry import MODELS, DefaultScope
from onnx_files import OPENERS, complaints
from tiny_detectors import CONFIGS, picture, predict, tiny_detector
from tool_runner import load_tool

from mmspatialmamba.deploy.agreement import Agreement, compare
from mmspatialmamba.deploy.detector import WholeDetector, export_detector
from mmspatialmamba.deploy.refusals import CannotExport

run_onnx = load_tool('run_onnx')

SIZES = ((128, 160), (141, 97), (64, 200), (128, 160), (97, 141), (128, 160), (128, 160), (128, 160))
"""Height and width: multiples of the divisor and none, portrait and landscape, one of them five times."""

LIMITS = {'box': 1e-3, 'score': 1e-5, 'pixels': 2}


def detections(outputs, size):
    """Returns the rows of a file's outputs as what mmdet finds in a picture of that size."""
    boxes, scores, labels, *masks = (np.asarray(output) for output in outputs)
    kept = scores > 0
    pasted = None
    if masks:
        pasted = np.zeros((kept.sum(), *size), bool)
        for canvas, mask, box in zip(pasted, masks[0][kept], boxes[kept], strict=True):
            run_onnx.paste(canvas, mask, box, 0.5)
    return SimpleNamespace(boxes=boxes[kept], scores=scores[kept], labels=labels[kept], masks=pasted)


@pytest.mark.parametrize('name', CONFIGS)
def test_each_head_finds_what_mmdet_finds(name):
    model = tiny_detector(name)
    detector = WholeDetector(model).eval()
    for seed, size in enumerate(SIZES[1:3]):
        image = picture(*size, seed)
        with torch.no_grad():
            found = detections(detector(image), size)
        wanted = predict(model, image)
        assert len(wanted.scores) > 5
        assert len(np.unique(wanted.scores)) > 5
        assert wanted.scores.max() < 0.999
        assert compare(found, wanted).holds(**LIMITS)


def check_file(name, sizes=SIZES, **overrides):
    model = tiny_detector(name, **overrides)
    detector = WholeDetector(model).eval()
    file = export_detector(detector).model_proto
    assert complaints(file) == []
    content = file.SerializeToString()
    counts = []
    for opener in OPENERS.values():
        run = opener(content)
        for seed, size in enumerate(sizes):
            image = picture(*size, seed)
            wanted = predict(model, image)
            counts.append(len(wanted.scores))
            agreement = compare(detections(run(image.numpy()), size), wanted)
            assert agreement.holds(**LIMITS), (opener, size, agreement)
    return counts


def test_file_of_a_single_stage_detector():
    assert min(check_file('fcos', SIZES[:4])) > 5


@pytest.mark.end_to_end
@pytest.mark.parametrize('name', [name for name in CONFIGS if name != 'fcos'])
def test_file_of_each_head(name):
    assert min(check_file(name)) > 5


@pytest.mark.end_to_end
def test_pictures_without_detections_between_others():
    best = [predict(tiny_detector('mask_rcnn'), picture(*size, seed)).scores.max() for seed, size in enumerate(SIZES)]
    between = float(np.sort(best)[3:5].mean())
    model = tiny_detector('mask_rcnn')
    model.roi_head.test_cfg.score_thr = between
    detector = WholeDetector(model).eval()
    content = export_detector(detector).model_proto.SerializeToString()
    for opener in OPENERS.values():
        run, counts = opener(content), []
        for seed, size in enumerate(SIZES):
            image = picture(*size, seed)
            wanted = predict(model, image)
            counts.append(len(wanted.scores))
            assert compare(detections(run(image.numpy()), size), wanted).holds(**LIMITS)
        assert 0 in counts
        assert max(counts) > 0


@pytest.mark.parametrize(
    ('fault', 'name'),
    [('smaller boxes', 'fcos'), ('no centerness', 'fcos'), ('one stage', 'cascade_rcnn'), ('no clipping', 'retinanet')],
)
def test_named_faults_are_noticed(fault, name, monkeypatch):
    model = tiny_detector(name)
    detector = WholeDetector(model).eval()
    image = picture(128, 160)
    wanted = predict(model, image)
    if fault == 'smaller boxes':
        monkeypatch.setitem(model.bbox_head.test_cfg, 'min_bbox_size', 40)
    elif fault == 'no centerness':
        head = model.bbox_head.forward
        monkeypatch.setattr(model.bbox_head, 'forward', lambda maps: head(maps)[:2])
    elif fault == 'one stage':
        detector.detect.boxes = detector.detect.boxes[2:]
    else:
        monkeypatch.setattr(model.bbox_head.bbox_coder, 'clip_border', False)
    with torch.no_grad():
        assert not compare(detections(detector(image), (128, 160)), wanted).holds(**LIMITS)


def test_agreement_is_of_sets_and_notices_each_difference():
    rng = np.random.default_rng(0)
    one = SimpleNamespace(
        boxes=rng.uniform(0, 100, (6, 4)),
        scores=np.full(6, 0.5),
        labels=np.array([0, 0, 0, 1, 1, 2]),
        masks=rng.random((6, 9, 8)) > 0.5,
    )
    order = [2, 0, 1, 4, 3, 5]
    same = SimpleNamespace(**{name: value[order] for name, value in vars(one).items()})
    assert compare(same, one) == Agreement(detections=6)
    changed = SimpleNamespace(**{name: value.copy() for name, value in vars(same).items()})
    changed.boxes[1, 2] += 0.25
    changed.scores[2] += 0.125
    changed.masks[3, 0, :2] ^= True
    found = compare(changed, one)
    assert found.same
    assert (found.box, found.score, found.pixels) == pytest.approx((0.25, 0.125, 2))
    for limit in LIMITS:
        assert not dataclasses.replace(Agreement(), **{limit: 3.0}).holds(**LIMITS)
    changed.labels[0] = 2
    assert not compare(changed, one).same


def build(config):
    with DefaultScope.overwrite_default_scope('mmdet'):
        return MODELS.build(config).eval()


REFUSED = {
    'soft suppression': ('mask_rcnn', {'nms': {'type': 'soft_nms', 'iou_threshold': 0.5}}, 'nms.type: expected nms'),
    'class-agnostic': (
        'mask_rcnn',
        {'nms': {'type': 'nms', 'iou_threshold': 0.5, 'class_agnostic': True}},
        'class_agnostic: expected False',
    ),
    'all detections': ('atss', {'max_per_img': -1}, 'max_per_img: expected a positive number of rows, found -1'),
}


@pytest.mark.parametrize('name', REFUSED)
def test_what_onnx_cannot_is_refused_by_name(name):
    detector, options, message = REFUSED[name]
    model = tiny_detector(detector, **options)
    with pytest.raises(CannotExport, match=message):
        WholeDetector(model)


@pytest.mark.parametrize(
    ('config', 'message'),
    [
        ('mmdet::tood/tood_r50_fpn_1x_coco.py', 'TOODHead, whose _predict_by_feat_single is another'),
        ('mmdet::point_rend/point-rend_r50-caffe_fpn_ms-1x_coco.py', 'PointRendRoIHead'),
        ('mmdet::htc/htc_r50_fpn_1x_coco.py', 'HybridTaskCascadeRoIHead'),
        ('mmdet::yolox/yolox_s_8xb8-300e_coco.py', 'YOLOXHead'),
    ],
)
def test_other_heads_are_refused_by_name(config, message):
    model = get_config(config).model
    model.backbone.pop('init_cfg', None)
    model.data_preprocessor = {'type': 'DetDataPreprocessor'}
    with pytest.raises(CannotExport, match=message):
        WholeDetector(build(model))


@pytest.mark.parametrize('config', ['dino_sm_t.py', 'mask2former_sm_t.py'])
def test_deformable_attention_is_refused_with_its_reason(config):
    from mmspatialmamba.inspection import build_model, read_config

    model = build_model(read_config(str(run_onnx.Path(__file__).parents[1] / 'configs' / config)))
    with pytest.raises(CannotExport, match='attention loops over sizes of maps'):
        WholeDetector(model)
