"""tools/run_onnx.py: what it does with a file's outputs against mmdet, mmcv, pycocotools, and without PyTorch."""

import json
import subprocess
import sys

import cv2
import mmcv
import numpy as np
import pytest
import torch
from mmdet.models.roi_heads.mask_heads.fcn_mask_head import _do_paste_mask
from mmengine.config import Config
from onnx import TensorProto, helper, save
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tool_runner import ROOT, load_tool, refusal, run_tool

from mmspatialmamba.deploy import metadata
from mmspatialmamba.deploy.refusals import CannotExport

run_onnx = load_tool('run_onnx')

BOXES = np.array([[2.0, 3.0, 18.0, 11.0], [0.0, 0.0, 4.0, 4.0], [0.0, 0.0, 0.0, 0.0]], np.float32)
DESCRIPTION = {'classes': ['cat', 'dog'], 'scale': [40, 30], 'keep_ratio': True, 'pad': None, 'mask_threshold': 0.5}


def write_file(path, description=DESCRIPTION):
    """Writes a detector that finds the same two objects in every picture."""
    rng = np.random.default_rng(0)
    values = {
        'boxes_0': BOXES,
        'scores': np.array([0.9, 0.4, 0.0], np.float32),
        'labels': np.array([1, 0, 0]),
        'masks': rng.random((3, 28, 28)).astype(np.float32),
    }
    nodes = [
        helper.make_node('ReduceMax', ['image'], ['most'], keepdims=0),
        helper.make_node('Sub', ['most', 'most'], ['zero']),
        helper.make_node('Add', ['boxes_0', 'zero'], ['boxes']),
        *(helper.make_node('Identity', [f'{name}_0'], [name]) for name in ('scores', 'labels', 'masks')),
    ]
    initializers = [
        helper.make_tensor(
            name if name.endswith('_0') else f'{name}_0',
            TensorProto.INT64 if name == 'labels' else TensorProto.FLOAT,
            value.shape,
            value.reshape(-1).tolist(),
        )
        for name, value in values.items()
    ]
    image = helper.make_tensor_value_info('image', TensorProto.FLOAT, [1, 3, 'height', 'width'])
    outputs = [
        helper.make_tensor_value_info(name, TensorProto.INT64 if name == 'labels' else TensorProto.FLOAT, None)
        for name in ('boxes', 'scores', 'labels', 'masks')
    ]
    graph = helper.make_graph(nodes, 'detector', [image], outputs, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 18)], ir_version=10)
    if description is not None:
        helper.set_model_props(model, {metadata.KEY: json.dumps(description)})
    save(model, path)
    return values


@pytest.fixture
def folder(tmp_path):
    """A folder with a file, two pictures and their annotations."""
    write_file(tmp_path / 'detector.onnx')
    (tmp_path / 'images').mkdir()
    rng = np.random.default_rng(1)
    images = []
    for number, size in enumerate(((60, 80), (90, 50)), 7):
        cv2.imwrite(str(tmp_path / 'images' / f'{number}.png'), rng.integers(0, 256, (*size, 3), np.uint8))
        images.append({'id': number, 'file_name': f'{number}.png', 'height': size[0], 'width': size[1]})
    categories = [{'id': 18, 'name': 'dog'}, {'id': 17, 'name': 'cat'}]
    truth = {'id': 1, 'image_id': 7, 'category_id': 18, 'bbox': [4, 6, 32, 16], 'area': 512, 'iscrowd': 0}
    truth['segmentation'] = [[4, 6, 36, 6, 36, 22, 4, 22]]
    content = {'images': images, 'categories': categories, 'annotations': [truth]}
    (tmp_path / 'annotations.json').write_text(json.dumps(content))
    return tmp_path


def test_masks_are_pasted_as_mmdet_does():
    rng = np.random.default_rng(0)
    for height, width in ((40, 60), (33, 20)):
        for _ in range(20):
            corners = np.sort(rng.uniform(-5, 65, (2, 2)), axis=0).reshape(4).astype(np.float32)
            mask = rng.random((28, 28)).astype(np.float32)
            canvas = np.zeros((height, width), bool)
            run_onnx.paste(canvas, mask, corners, 0.5)
            expected, _ = _do_paste_mask(
                torch.from_numpy(mask)[None, None], torch.from_numpy(corners)[None], height, width, skip_empty=False
            )
            assert (canvas != (expected[0] >= 0.5).numpy()).sum() <= 1


@pytest.mark.parametrize('shape', [(1, 1), (3, 70), (64, 5), (90, 120)])
def test_run_lengths_are_those_of_pycocotools(shape):
    rng = np.random.default_rng(0)
    noise, block = rng.random(shape) > 0.5, np.zeros(shape, bool)
    block[shape[0] // 3 :, : 1 + shape[1] // 2] = True
    for mask in (noise, block, ~block, np.zeros(shape, bool), np.ones(shape, bool)):
        expected = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
        assert run_onnx.encode_mask(mask) == {'size': expected['size'], 'counts': expected['counts'].decode()}


@pytest.mark.parametrize(('width', 'height'), [(640, 480), (480, 640), (333, 500), (1000, 100), (50, 50)])
def test_sizes_are_those_of_the_pipeline(width, height):
    for scale in ((1333, 800), (160, 128), (640, 640)):
        assert run_onnx.fitted_size(width, height, list(scale), True) == mmcv.rescale_size((width, height), scale)
        assert run_onnx.fitted_size(width, height, list(scale), False) == scale


def test_resize_without_opencv_is_within_a_level_of_it(monkeypatch):
    image = np.random.default_rng(0).integers(0, 256, (37, 53, 3), np.uint8)
    for width, height in ((80, 60), (20, 30), (53, 37), (54, 36)):
        expected = run_onnx.resize(image, width, height)
        with monkeypatch.context() as patch:
            patch.setattr(run_onnx, 'cv2', None)
            found = run_onnx.resize(image, width, height)
        assert found.shape == expected.shape
        assert abs(found.astype(int) - expected.astype(int)).max() <= 1


@pytest.mark.parametrize('runtime', run_onnx.RUNTIMES)
def test_detections_are_at_the_size_of_the_image(folder, runtime):
    detector = run_onnx.Detector(folder / 'detector.onnx', runtime)
    image = run_onnx.read_image(folder / 'images' / '7.png')
    found = detector(image)  # 60x80 was resized to 30x40
    assert found.boxes == pytest.approx(2 * BOXES[:2])
    assert found.labels.tolist() == [1, 0]
    assert found.masks.shape == (2, 60, 80)
    assert found.masks[0].any()
    assert [detector.name(label) for label in (*found.labels, 2)] == ['dog', 'cat', 'class 3']


def test_padding_of_the_pipeline(tmp_path):
    pad = {'width': 50, 'height': 45, 'value': [114, 115, 116]}
    write_file(tmp_path / 'a.onnx', {**DESCRIPTION, 'pad': pad})
    inputs, _ = run_onnx.Detector(tmp_path / 'a.onnx').prepare(np.zeros((60, 80, 3), np.uint8))
    assert inputs.shape == (1, 3, 45, 50)
    assert inputs[0, :, 0, 0].tolist() == [0, 0, 0]
    assert inputs[0, :, 30, 40].tolist() == inputs[0, :, -1, 0].tolist() == [114, 115, 116]


def test_folder_gives_pictures_and_json_that_coco_evaluates(folder, monkeypatch, capsys):
    args = (folder / 'detector.onnx', folder / 'images', '--out', folder / 'out')
    run_tool(run_onnx, *args, '--annotations', folder / 'annotations.json', monkeypatch=monkeypatch)
    assert capsys.readouterr().out == f'4 detections in 2 images: {folder / "out"}\n'
    assert run_onnx.read_image(folder / 'out' / '8.png').shape == (90, 50, 3)
    truth = COCO(str(folder / 'annotations.json'))
    results = truth.loadRes(str(folder / 'out' / 'detections.json'))
    assert {entry['image_id'] for entry in results.dataset['annotations']} == {7, 8}
    assert [entry['category_id'] for entry in results.dataset['annotations'][:2]] == [18, 17]
    for kind in ('bbox', 'segm'):
        evaluation = COCOeval(truth, results, kind)
        evaluation.evaluate()
        evaluation.accumulate()
    evaluation = COCOeval(truth, results, 'bbox')
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert evaluation.stats[0] == pytest.approx(1.0)


BARE = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        root = name.split('.')[0]
        if root in {hidden!r} or root.startswith(('torch', 'mm')):
            raise ImportError(f'refused: {{name}}')

sys.meta_path.insert(0, Refuse())
sys.path.insert(0, {tools!r})
sys.argv = ['run_onnx', *{args!r}]
import run_onnx
run_onnx.main()
"""


@pytest.mark.parametrize('hidden', [('PIL', 'openvino'), ('cv2', 'openvino'), ('PIL', 'onnxruntime')])
def test_needs_neither_pytorch_nor_a_toolbox(folder, hidden):
    runtime = 'openvino' if 'onnxruntime' in hidden else 'onnxruntime'
    args = [str(folder / 'detector.onnx'), str(folder / 'images'), '--out', str(folder / 'out'), '--runtime', runtime]
    code = BARE.format(hidden=hidden, tools=str(ROOT / 'tools'), args=args)
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith('4 detections in 2 images')


def test_bad_input_is_one_line(folder, monkeypatch, capsys):
    write_file(folder / 'other.onnx', None)
    (folder / 'text.jpg').write_text('no image')
    (folder / 'empty').mkdir()
    detector, images = folder / 'detector.onnx', folder / 'images'
    cases = {
        (folder / 'none.onnx', images): 'none.onnx: expected an ONNX file, found no such file',
        (folder / 'other.onnx', images): 'other.onnx: expected a whole detector as tools/export_onnx.py writes it',
        (detector, folder / 'text.jpg'): 'text.jpg: expected an image file, found no image',
        (detector, folder / 'none.jpg'): 'none.jpg: expected an image or a folder of images, found no such file',
        (detector, folder / 'empty'): 'empty: expected a folder with images',
        (detector, images, '--annotations', folder / 'none.json'): 'none.json: expected a COCO annotation file',
    }
    for args, message in cases.items():
        assert message in refusal(run_onnx, *args, '--out', folder / 'o', monkeypatch=monkeypatch, capsys=capsys)
    content = json.loads((folder / 'annotations.json').read_text())
    content['images'].pop()
    (folder / 'annotations.json').write_text(json.dumps(content))
    args = (detector, images, '--annotations', folder / 'annotations.json')
    assert 'expected an entry for image 8.png, found none' in refusal(
        run_onnx, *args, monkeypatch=monkeypatch, capsys=capsys
    )


def pipeline(*steps):
    config = Config({'test_dataloader': {'dataset': {'type': 'mmdet.CocoDataset', 'pipeline': list(steps)}}})
    return metadata.describe(config, torch.nn.Module())


def test_metadata_say_how_a_picture_is_resized():
    read, resize = {'type': 'LoadImageFromFile'}, {'type': 'mmdet.Resize', 'scale': (640, 640), 'keep_ratio': True}
    pad = {'type': 'Pad', 'size': (640, 512), 'pad_val': {'img': (114, 114, 114)}}
    found = pipeline(read, resize, pad, {'type': 'LoadAnnotations'}, {'type': 'PackDetInputs'})
    assert found['scale'] == [640, 640]
    assert found['keep_ratio'] is True
    assert found['pad'] == {'width': 640, 'height': 512, 'value': [114, 114, 114]}
    assert len(found['classes']) == 80
    for steps, message in (
        ((read,), 'test pipeline: expected a Resize, found none'),
        ((read, resize, {'type': 'RandomFlip'}), 'and perhaps Pad, found RandomFlip'),
        ((read, {**resize, 'interpolation': 'bicubic'}), 'no options but scale, keep_ratio, found interpolation'),
        ((read, resize, {'type': 'Pad', 'size_divisor': 32}), 'no options but size, pad_val, found size_divisor'),
        (({**read, 'to_float32': True}, resize), 'found to_float32'),
    ):
        with pytest.raises(CannotExport, match=message):
            pipeline(*steps)
