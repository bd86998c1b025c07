"""Whole detectors: the module that is exported against mmdet, its file in both runtimes, and what is refused."""

import copy
import dataclasses
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.registry import MODELS, DefaultScope
from onnx_files import OPENERS, complaints
from tiny_detectors import CONFIGS, picture, predict, tiny_config, tiny_detector
from tool_runner import load_tool, run_tool

from mmspatialmamba.deploy.agreement import Agreement, compare
from mmspatialmamba.deploy.detector import WholeDetector, export_detector
from mmspatialmamba.deploy.refusals import CannotExport

run_onnx = load_tool('run_onnx')
export_onnx = load_tool('export_onnx')

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


def check_file(model, sizes=SIZES):
    """Runs a model's file on pictures, one after the other, in both runtimes; returns how much mmdet finds in each."""
    file = export_detector(WholeDetector(model).eval()).model_proto
    assert complaints(file) == []
    images = [picture(*size, seed) for seed, size in enumerate(sizes)]
    wanted = [predict(model, image) for image in images]
    for opener in OPENERS.values():
        run = opener(file.SerializeToString())
        for size, image, one in zip(sizes, images, wanted, strict=True):
            agreement = compare(detections(run(image.numpy()), size), one)
            assert agreement.holds(**LIMITS), (opener, size, agreement)
    return [len(one.scores) for one in wanted]


def test_file_of_a_single_stage_detector():
    assert min(check_file(tiny_detector('fcos'), SIZES[:4])) > 5


@pytest.mark.end_to_end
@pytest.mark.parametrize('name', [name for name in CONFIGS if name not in ('fcos', 'faster_rcnn', 'cascade_rcnn')])
def test_file_of_each_head(name):
    assert min(check_file(tiny_detector(name))) > 5


@pytest.mark.end_to_end
def test_pictures_without_detections_between_others():
    model = tiny_detector('mask_rcnn')
    best = [predict(model, picture(*size, seed)).scores.max() for seed, size in enumerate(SIZES)]
    model.roi_head.test_cfg.score_thr = float(np.sort(best)[3:5].mean())
    counts = check_file(model)
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


@pytest.mark.end_to_end
def test_tool_writes_checks_and_quantizes_a_detector(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'run_onnx', run_onnx)
    model = tiny_config('mask_rcnn', max_per_img=30)
    resize = {'type': 'Resize', 'scale': (120, 100), 'keep_ratio': True}
    keys = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')
    steps = [{'type': 'LoadImageFromFile'}, resize, {'type': 'PackDetInputs', 'meta_keys': keys}]
    dataset = {'type': 'CocoDataset', 'metainfo': {'classes': list('abcde')}, 'pipeline': steps}
    config = Config({'default_scope': 'mmdet', 'model': model, 'test_dataloader': {'dataset': dataset}})
    config.dump(tmp_path / 'config.py')
    torch.save(tiny_detector('mask_rcnn').state_dict(), tmp_path / 'weights.pth')
    (tmp_path / 'images').mkdir()
    for seed, size in enumerate(((150, 200), (131, 90))):
        image = picture(*size, seed)[0].permute(1, 2, 0).numpy().astype(np.uint8)
        run_onnx.write_image(tmp_path / 'images' / f'{seed}.png', image)
    file = tmp_path / 'a.onnx'
    args = (tmp_path / 'config.py', tmp_path / 'weights.pth', '--out', file, '--max-detections', 10)
    folder = tmp_path / 'images'
    run_tool(export_onnx, *args, '--check', folder, '--int8', folder, monkeypatch=monkeypatch)
    printed = capsys.readouterr().out
    assert 'wrote' in printed
    assert '10 rows' in printed
    assert '20 detections in 2 images, ONNX Runtime against PyTorch: boxes' in printed

    image = run_onnx.read_image(folder / '0.png')
    exact, int8 = (run_onnx.Detector(tmp_path / name)(image) for name in ('a.onnx', 'a_int8.onnx'))
    assert int8.masks.shape == exact.masks.shape == (10, 150, 200)
    assert not np.array_equal(int8.scores, exact.scores)
    assert abs(np.sort(int8.scores) - np.sort(exact.scores)).max() < 0.05

    model = export_onnx.build_model(config, str(tmp_path / 'weights.pth'))
    export_onnx.limit_detections(model, 10)
    other = copy.deepcopy(model)
    other.roi_head.bbox_head.fc_cls.bias.data[0] += 0.01
    with pytest.raises(SystemExit, match='expected the detections of PyTorch within'):
        export_onnx.check_detections(file, config, other, [folder / '0.png'])
    monkeypatch.setattr(run_onnx, 'Detector', lambda path: lambda image: dataclasses.replace(exact, **empty(exact)))
    model.roi_head.test_cfg.score_thr = 1.0
    with pytest.raises(SystemExit, match='expected detections to compare, found none'):
        export_onnx.check_detections(file, config, model, [folder / '0.png'])


def empty(found):
    return {field.name: getattr(found, field.name)[:0] for field in dataclasses.fields(found)}
