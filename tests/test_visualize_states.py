"""`tools/visualize_states.py`: sheets of states, Grad-CAM against its formula and on each kind of model, bad input."""

import cv2
import numpy as np
import pytest
import torch
import torchvision_setup  # noqa: F401
from mmengine.structures import BaseDataElement, InstanceData, PixelData
from tool_runner import ROOT, load_tool, refusal, run_tool
from torch import nn

from mmspatialmamba.inspection import Sample, build_model, prepare, read_config

CONFIGS = ROOT / 'configs'
QUICKSTART = CONFIGS / 'quickstart_mask_rcnn.py'

states = load_tool('visualize_states')


@pytest.fixture(scope='module')
def image(tmp_path_factory):
    path = tmp_path_factory.mktemp('images') / 'image.png'
    cv2.imwrite(str(path), np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8))
    return path


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp('weights') / 'file.pth'
    weights = build_model(read_config(str(QUICKSTART))).state_dict()
    torch.save({'state_dict': weights, 'meta': {'dataset_meta': {'classes': ('circle', 'square', 'triangle')}}}, path)
    return path


def colours(path):
    return len(np.unique(cv2.imread(str(path)).reshape(-1, 3), axis=0))


@pytest.mark.parametrize('options', [pytest.param((), marks=pytest.mark.end_to_end), ('--block', 2, 1, '--channel', 3)])
def test_sheet_of_states(options, image, tmp_path, monkeypatch):
    run_tool(
        states, 'states', QUICKSTART, image, '--out', tmp_path / 'out' / 's.png', *options, monkeypatch=monkeypatch
    )
    assert colours(tmp_path / 'out' / 's.png') > 1000


def test_sheet_of_a_vmamba(image, tmp_path, monkeypatch):
    config = tmp_path / 'config.py'
    config.write_text(
        f'_base_ = {str(CONFIGS / "cls_vmamba_t.py")!r}\n'
        'model = dict(backbone=dict(arch=dict(_delete_=True, embed_dims=16, depths=(1, 1, 1, 1), ssm_ratio=1)),\n'
        '             head=dict(in_channels=128))\n'
    )
    options = ('--block', 0, 0, '--channel', 3, '--out', tmp_path / 's.png')
    run_tool(states, 'states', config, image, *options, monkeypatch=monkeypatch)
    assert colours(tmp_path / 's.png') > 1000


def test_summary_of_channels():
    values = torch.tensor([3.0, -4.0]).expand(1, 2, 5, 2)
    assert np.array_equal(states.summarize(values, None), np.full((2, 5), np.sqrt(12.5, dtype=np.float32)))
    assert np.array_equal(states.summarize(values, 1), np.full((2, 5), -4))


class TwoMaps(nn.Module):
    """Two convolutions as a backbone, of which a prediction uses the second."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 5, 4, 4)

    def forward(self, x):
        return self.first(x), self.second(x)


class Classifier(nn.Module):
    """A score that is a weighted sum of squares of the second map."""

    def __init__(self):
        super().__init__()
        self.backbone = TwoMaps()
        self.weight = nn.Parameter(torch.randn(5, 4, 6))

    def predict(self, inputs, data_samples):
        self.features = self.backbone(inputs)[1]
        score = (self.features[0].square() * self.weight).sum()
        return [BaseDataElement(pred_score=torch.stack((score - 1, score)))]


def test_grad_cam_is_its_formula():
    torch.manual_seed(0)
    model = Classifier()
    sample = Sample(np.zeros((16, 24, 3), np.uint8), torch.randn(1, 3, 16, 24), [])
    (unused, used), answer = states.grad_cam(model, sample, None)
    assert (unused == 0).all()
    assert answer.label == 1
    features = model.features[0].detach()
    slope = (2 * features * model.weight.detach()).mean((1, 2))  # of the score, by feature, averaged over the map
    expected = torch.einsum('c,chw->hw', slope, features).relu()
    expected = nn.functional.interpolate(expected[None, None], (16, 24), mode='bilinear')[0, 0]
    assert used.max() > 0
    assert np.allclose(used, expected, rtol=0, atol=1e-6 * used.max())  # measured: 1e-7


def test_a_detector_that_detaches_is_refused():
    model = Classifier()
    predict = model.predict
    model.predict = lambda *inputs: [BaseDataElement(pred_score=predict(*inputs)[0].pred_score.detach())]
    sample = Sample(np.zeros((16, 24, 3), np.uint8), torch.randn(1, 3, 16, 24), [])
    with pytest.raises(ValueError, match='expected an answer with a gradient, found none: Classifier detaches it'):
        states.grad_cam(model, sample, None)


def test_answers():
    objects = InstanceData(
        scores=torch.tensor([0.2, 0.7, 0.9]), labels=torch.tensor([4, 4, 1]), bboxes=torch.arange(12.0).view(3, 4)
    )
    detection = BaseDataElement(pred_instances=objects)
    assert (states.find_answer(detection, None).label, states.find_answer(detection, None).score) == (
        1,
        objects.scores[2],
    )
    assert states.find_answer(detection, 4).score == objects.scores[1]
    assert states.find_answer(detection, 4).box.tolist() == [4, 5, 6, 7]
    with pytest.raises(ValueError, match=r'expected an answer of class 2, found objects of the classes \[1, 4\]'):
        states.find_answer(detection, 2)
    logits = torch.tensor([[1.0, 5.0, 2.0, 6.0], [3.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]).view(3, 2, 2)
    segmentation = BaseDataElement(seg_logits=PixelData(data=logits))
    assert states.find_answer(segmentation, None).label == 0
    assert states.find_answer(segmentation, None).score == torch.tensor(13 / 3)
    assert states.find_answer(segmentation, 1).score == 3
    with pytest.raises(ValueError, match=r'expected an answer of class 2, found pixels of the classes \[0, 1\]'):
        states.find_answer(segmentation, 2)
    with pytest.raises(ValueError, match='expected an answer of class 2, found scores of 2 classes'):
        states.find_answer(BaseDataElement(pred_score=torch.rand(2)), 2)
    with pytest.raises(ValueError, match='expected the result of a detector, segmentor or classifier, found Base'):
        states.find_answer(BaseDataElement(), None)


def test_cam_of_a_detector(checkpoint, image, tmp_path, monkeypatch, capsys):
    args = ('cam', QUICKSTART, image, '--checkpoint', checkpoint, '--out', tmp_path / 'cam.png')
    run_tool(states, *args, monkeypatch=monkeypatch)
    assert 'score of the best object, 0.' in capsys.readouterr().out
    assert colours(tmp_path / 'cam.png') > 1000


@pytest.mark.parametrize(('name', 'width'), [('upernet_sm_t.py', 150), ('cls_sm_t.py', 1000)])
def test_cam_of_other_toolboxes(name, width, image):
    config = read_config(str(CONFIGS / name))
    config.model.backbone.arch = {'embed_dims': 16, 'depths': (1, 1, 1, 1)}
    if name.startswith('upernet'):
        config.model.decode_head.update(in_channels=[16, 32, 64, 128], channels=16)
        config.model.auxiliary_head.update(in_channels=64, channels=16)
        config.test_dataloader.dataset.pipeline[1].scale = (128, 96)
    else:
        config.model.head.in_channels = 128
    model = build_model(config)
    sample = prepare(config, model, image)
    maps, answer = states.grad_cam(model, sample, None)
    assert 0 <= answer.label < width
    assert all(values.shape == sample.inputs.shape[2:] and np.isfinite(values).all() for values in maps)
    assert any(values.max() > 0 for values in maps)


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        (('states', 'none.py', 'image'), 'none.py: expected a config file, found no such file'),
        (('states', QUICKSTART, 'none.png'), 'none.png: expected an image file, found no such file'),
        (('states', QUICKSTART, 'image', '--block', 4, 0), 'among 1, 1, 2, 1 blocks of the stages, found (4, 0)'),
        (('states', QUICKSTART, 'image', '--channel', 48), 'expected a channel from 0 to 47, which all blocks have'),
        (('cam', QUICKSTART, 'image'), 'the following arguments are required: --checkpoint'),
        (
            ('cam', QUICKSTART, 'image', '--checkpoint', 'file', '--label', 3),
            'expected an answer of class 3, found objects',
        ),
    ],
)
def test_bad_input_is_one_line(args, message, image, checkpoint, monkeypatch, capsys):
    args = [{'image': image, 'file': checkpoint}.get(arg, arg) for arg in args]
    assert message in refusal(states, *args, monkeypatch=monkeypatch, capsys=capsys)
