"""The toolboxes' inferencers with configs of this project: they predict and write pictures."""

from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import save_checkpoint

import mmspatialmamba

pytestmark = pytest.mark.end_to_end


@pytest.fixture
def image(tmp_path):
    """A picture on disk, and its path."""
    import mmcv

    path = tmp_path / 'image.png'
    mmcv.imwrite(np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8), str(path))
    return str(path)


def random_checkpoint(folder: Path, name: str, **backbone) -> tuple[str, str]:
    """A config that inherits the named one, and a checkpoint of it with random weights."""
    config = Config.fromfile(mmspatialmamba.config_path(name))
    config.model.backbone.update(backbone)
    path = folder / name
    config.dump(path)
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope(config.default_scope):
        model = MODELS.build(config.model)
    checkpoint = folder / 'random.pth'
    save_checkpoint({'state_dict': model.state_dict(), 'meta': {}}, str(checkpoint))
    return str(path), str(checkpoint)


def test_det_inferencer_draws_and_reports(image, tmp_path):
    from mmdet.apis import DetInferencer

    config, checkpoint = random_checkpoint(tmp_path, 'quickstart_mask_rcnn.py')
    inferencer = DetInferencer(config, checkpoint, device='cpu', show_progress=False)
    results = inferencer(image, out_dir=str(tmp_path / 'out'), no_save_pred=False)
    assert set(results['predictions'][0]) == {'labels', 'scores', 'bboxes', 'masks'}
    assert (tmp_path / 'out' / 'vis' / 'image.png').stat().st_size > 0
    assert (tmp_path / 'out' / 'preds' / 'image.json').stat().st_size > 0


def test_det_inferencer_takes_the_name_of_published_weights(image, tmp_path, monkeypatch):
    from mmdet.apis import DetInferencer

    config, checkpoint = random_checkpoint(tmp_path, 'quickstart_mask_rcnn.py')
    Path(checkpoint).rename(tmp_path / 'mask_rcnn_sm_t.pth')
    monkeypatch.setenv('MMSPATIALMAMBA_WEIGHTS', str(tmp_path))
    inferencer = DetInferencer(config, 'spatialmamba://mask_rcnn_sm_t', device='cpu', show_progress=False)
    expected = torch.load(tmp_path / 'mask_rcnn_sm_t.pth', weights_only=True)['state_dict']
    assert all(torch.equal(value, expected[name]) for name, value in inferencer.model.state_dict().items())


def test_mmseg_inferencer_draws_and_reports(image, tmp_path):
    from mmseg.apis import MMSegInferencer

    config, checkpoint = random_checkpoint(tmp_path, 'segformer_sm_t.py', arch={'embed_dims': 64, 'depths': (1,) * 4})
    inferencer = MMSegInferencer(config, checkpoint, dataset_name='ade20k', device='cpu')
    results = inferencer(image, out_dir=str(tmp_path / 'out'))
    assert results['predictions'].shape == (64, 96)
    assert (tmp_path / 'out' / 'vis' / 'image.png').stat().st_size > 0
    assert (tmp_path / 'out' / 'pred').is_dir()
