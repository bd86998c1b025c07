"""`mmspatialmamba.inspection`: models from configs and checkpoints, images, and what an SSM computes."""

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from oracles import fusion_convolutions, orders_loop, relative_error, scan_loop
from tool_runner import ROOT

from mmspatialmamba import SpatialMamba, VMamba
from mmspatialmamba.checkpoint import CheckpointError
from mmspatialmamba.inspection import build_model, crop_image, last_blocks, normalize, prepare, read_config, record_ssm
from mmspatialmamba.models.vmamba import SelectiveScan

QUICKSTART = str(ROOT / 'configs' / 'quickstart_mask_rcnn.py')
ARCH = {'embed_dims': 16, 'depths': (1, 1, 2, 1)}


@pytest.fixture(scope='module')
def config():
    return read_config(QUICKSTART)


def same_weights(model, other):
    return all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


def test_records_what_each_block_computes():
    torch.manual_seed(0)
    backbone = SpatialMamba(ARCH).double().eval()
    for module in backbone.modules():  # no fusion of equal taps
        if hasattr(module, 'alpha'):
            torch.nn.init.normal_(module.dwconv_d3)
            torch.nn.init.normal_(module.alpha)
    records = record_ssm(backbone, torch.randn(1, 3, 40, 72, dtype=torch.float64), [(2, 1), (0, 0)])
    assert list(records) == [(2, 1), (0, 0)]
    for at, record in records.items():
        ssm = backbone.stages[at[0]].blocks[at[1]].ssm
        assert torch.equal(record.dt_weight, ssm.dt_weight)
        delta = torch.log1p(torch.exp(record.dt @ ssm.dt_weight.T + ssm.dt_bias))
        A = -torch.exp(ssm.A_log[:, 0])
        h = scan_loop(record.u.flatten(1, 2), delta.flatten(1, 2), A, record.B.flatten(1, 2)).view_as(record.u)
        fusion = ssm.state_fusion
        g = fusion_convolutions(h, (fusion.dwconv_d1, fusion.dwconv_d3, fusion.dwconv_d5), fusion.alpha)
        # Measured: at most 2e-15.
        assert relative_error(record.delta, delta) < 2e-14
        assert relative_error(record.h, h) < 2e-14
        assert relative_error(record.g, g) < 2e-14
        assert relative_error(record.g * record.C + ssm.D * record.u, record.y) < 2e-14


def test_records_what_each_order_of_vmamba_computes():
    torch.manual_seed(0)
    backbone = VMamba({**ARCH, 'ssm_ratio': 1}).double().eval()
    for parameter in backbone.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    records = record_ssm(backbone, torch.randn(1, 3, 24, 40, dtype=torch.float64), [(2, 1), (0, 0)])
    assert list(records) == [(2, 1), (0, 0)]
    for (stage, block), record in records.items():
        assert torch.equal(record.dt_weight, backbone.stages[stage].blocks[block].ss2d.dt_weight)
        inputs = (record.u, record.dt, record.B, record.C, record.dt_weight, record.dt_bias, record.A, record.D)
        y = orders_loop(*inputs, SelectiveScan.ORDERS)
        maps = record.maps()
        observed = [maps[f'C·h of order {k}'] for k in range(4)]
        for k, name in enumerate(SelectiveScan.ORDERS):
            alone = (x[:, :, :, k, None] for x in inputs[1:4]), (x[k, None] for x in inputs[4:])
            expected = orders_loop(record.u, *alone[0], *alone[1], [name]) - record.D[k] * record.u
            assert relative_error(observed[k], expected) < 2e-14  # measured: at most 2e-15
        assert relative_error(sum(observed) + record.D.sum(0) * record.u, y) < 2e-14
        assert relative_error(record.y, y) < 2e-14
        assert {tuple(values.shape) for values in maps.values()} == {tuple(record.u.shape)}
        assert (maps['mean step size Δ'] > 0).all()


def test_last_blocks():
    assert last_blocks(SpatialMamba(ARCH, out_indices=(2,))) == [(0, 0), (1, 0), (2, 1)]


@pytest.mark.parametrize('block', [(2, 2), (4, 0), (-1, 0)])
def test_unknown_block(block):
    with pytest.raises(ValueError, match='expected a stage and a block among 1, 1, 2, 1 blocks of the stages, found'):
        record_ssm(SpatialMamba(ARCH), torch.rand(1, 3, 32, 32), [block])


def test_another_backbone_has_no_ssm():
    with pytest.raises(ValueError, match='expected a backbone of mmspatialmamba, found Identity'):
        record_ssm(torch.nn.Identity(), torch.rand(1, 3, 32, 32), [(0, 0)])


def test_a_fused_backbone_is_refused():
    with pytest.raises(ValueError, match='expected a layered backbone, found a fused one: call'):
        record_ssm(SpatialMamba(ARCH, fused=True), torch.rand(1, 3, 32, 32), [(0, 0)])


def test_random_weights_depend_on_the_seed_alone(config):
    state = torch.random.get_rng_state()
    model = build_model(config, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not model.training
    assert same_weights(model, build_model(config, seed=1))
    assert not same_weights(model, build_model(config, seed=2))


def test_weights_that_the_config_names_are_left_out(config):
    named = Config(config.to_dict())
    named.model.backbone.init_cfg = {'type': 'Pretrained', 'checkpoint': 'none.pth'}
    named.model.init_cfg = [{'type': 'Pretrained', 'checkpoint': 'none.pth'}]
    assert same_weights(build_model(named), build_model(config))


def test_checkpoint_gives_weights_and_names(config, tmp_path):
    path = tmp_path / 'file.pth'
    trained = build_model(config, seed=3)
    torch.save({'state_dict': trained.state_dict(), 'meta': {'dataset_meta': {'classes': ('a', 'b', 'c')}}}, path)
    model = build_model(config, str(path))
    assert same_weights(model, trained)
    assert model.dataset_meta['classes'] == ('a', 'b', 'c')


def test_checkpoint_of_another_model(config, tmp_path):
    weights = build_model(config).state_dict()
    path = tmp_path / 'file.pth'
    without = {name: tensor for name, tensor in weights.items() if 'stages.3' not in name}
    torch.save({'state_dict': without}, path)
    expected = (
        r'file.pth: expected the weights of this model, found none for 27 tensors of its backbone: backbone.stages'
    )
    with pytest.raises(ValueError, match=expected):
        build_model(config, str(path))
    torch.save({'state_dict': {**weights, 'rpn_head.rpn_conv.bias': torch.zeros(7)}}, path)
    with pytest.raises(ValueError, match=r'file.pth: expected the weights of this model, found .*size mismatch'):
        build_model(config, str(path))
    path.write_text('no checkpoint')
    with pytest.raises(CheckpointError, match=r'file.pth'):
        build_model(config, str(path))


@pytest.mark.parametrize('name', ['official_small_classification.pth', 'official_small_detector.pth'])
def test_published_layouts(config, name):
    small = Config(config.to_dict())
    small.model.backbone.arch = ARCH
    small.model.neck.in_channels = [16, 32, 64, 128]
    path = ROOT / 'tests' / 'data' / name
    content = torch.load(path, weights_only=True)
    loaded = build_model(small, str(path)).backbone.stages[2].blocks[1].ssm.in_proj.weight
    (published,) = (
        tensor
        for key, tensor in (content.get('state_dict') or content['model']).items()
        if key.endswith('layers.2.blocks.1.self_attention.in_proj.weight')
    )
    assert torch.equal(loaded, published.float())


def test_config_that_is_none(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'none.py: expected a config file, found no such file'):
        read_config('none.py')
    path = tmp_path / 'empty.py'
    path.write_text('lr = 1')
    with pytest.raises(ValueError, match=r'empty.py: expected a config with a model that has a backbone, found no'):
        read_config(str(path))


def test_crop_covers_the_size_and_keeps_the_centre(tmp_path):
    image = np.zeros((40, 100, 3), np.uint8)
    image[:, 30:70] = 200
    cv2.imwrite(str(tmp_path / 'image.png'), image)
    cropped = crop_image(tmp_path / 'image.png', 80, 60)  # scaled twice: columns 30 to 70 become 60 to 140 of 200
    assert cropped.shape == (80, 60, 3)
    assert (cropped == 200).all()


def test_image_that_is_none(config, tmp_path):
    (tmp_path / 'text.png').write_text('no image')
    with pytest.raises(ValueError, match=r'text.png: expected an image file, found no image'):
        crop_image(tmp_path / 'text.png', 8, 8)
    with pytest.raises(ValueError, match=r'none.png: expected an image file, found no such file'):
        prepare(config, build_model(config), tmp_path / 'none.png')


def test_prepared_image_is_that_of_the_test_pipeline(config, tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    path = tmp_path / 'image.png'
    cv2.imwrite(str(path), image)
    model = build_model(config)
    sample = prepare(config, model, path)
    assert sample.image.shape == (120, 160, 3)  # the pipeline scales to 160x128 and keeps the ratio
    assert sample.inputs.shape == (1, 3, 128, 160)  # padded to a multiple of 32
    assert sample.data_samples[0].ori_shape == (60, 80)
    preprocessor = model.data_preprocessor
    shown = sample.inputs[:, :, :120] * preprocessor.std + preprocessor.mean
    # Measured: 2e-5 of 255, float32 of the normalization.
    assert torch.allclose(shown[0].permute(1, 2, 0), torch.from_numpy(sample.image.copy()).float(), rtol=0, atol=2e-4)
    assert torch.equal(normalize(model, sample.image[..., ::-1])[:, :, :120], sample.inputs[:, :, :120])
    assert np.array_equal(cv2.resize(image, (160, 120))[..., ::-1], sample.image)
