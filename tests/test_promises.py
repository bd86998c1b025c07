"""What every backbone promises: sizes, arguments, freezing, no stale values, behaviour as a module."""

import copy
import io
import math
import pickle

import pytest
import torch
from mmengine.model import ExponentialMovingAverage
from torch import nn

from mmspatialmamba import SpatialMamba, VMamba

SIZES = {'embed_dims': 8, 'depths': (1, 1, 2, 1)}
SMALL = {SpatialMamba: SIZES, VMamba: {**SIZES, 'ssm_ratio': 2}}


@pytest.fixture(params=SMALL, ids=lambda backbone: backbone.__name__)
def small(request):
    """Builds a small model of each backbone; the class is its attribute ``backbone``."""

    def build(**arguments):
        torch.manual_seed(0)
        return request.param(**{'arch': SMALL[request.param], 'drop_path_rate': 0.0, **arguments})

    build.backbone = request.param
    return build


def image(height=32, width=48, batch=2, channels=3):
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize('size', [(1, 1), (1, 70), (33, 2), (31, 45), (64, 32)])
def test_any_size_gives_contiguous_maps_at_four_strides(size, small):
    outputs = small().eval()(image(*size))
    for index, output in enumerate(outputs):
        stride = 4 * 2**index
        assert output.shape == (2, 8 * 2**index, math.ceil(size[0] / stride), math.ceil(size[1] / stride))
        assert output.is_contiguous()
        assert output.isfinite().all()


def test_shapes_on_the_meta_device(small):
    with torch.device('meta'):
        outputs = small()(torch.zeros(2, 3, 64, 32))
    assert [tuple(out.shape) for out in outputs] == [(2, 8 * 2**i, 16 // 2**i, 8 // 2**i) for i in range(4)]


def test_empty_batch(small):
    assert [out.shape[0] for out in small().eval()(image(batch=0))] == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ('given', 'expected'), [([0, 2], (0, 2)), ((-1,), (3,)), ((-1, 0), (3, 0)), (1, (1,)), ((0, 1, 2, 3), (0, 1, 2, 3))]
)
def test_out_indices(given, expected, small):
    before = copy.copy(given)
    model, full = small(out_indices=given).eval(), small().eval()
    full.load_state_dict(model.state_dict(), strict=False)
    assert given == before
    assert model.out_indices == expected
    assert len(model.stages) == max(expected) + 1
    everything = full(image())
    for output, index in zip(model(image()), expected, strict=True):
        assert torch.equal(output, everything[index])


def test_every_parameter_gets_a_gradient(small):
    for indices in ((0, 1, 2, 3), (1, 2)):
        model = small(out_indices=indices)
        sum(out.square().mean() for out in model(image())).backward()
        assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_in_channels(small):
    assert small(in_channels=5).eval()(image(channels=5))[0].shape[1] == 8
    with pytest.raises(ValueError, match=r'expected an image batch \(N, 5, H, W\), got \(2, 3, 32, 48\)'):
        small(in_channels=5)(image())


def test_drop_path_grows_linearly(small):
    model = small(drop_path_rate=0.4)
    rates = [block.drop_path.drop_prob for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])


@pytest.mark.parametrize('frozen', [-1, 0, 1, 4])
def test_frozen_stages(frozen, small):
    model = small(frozen_stages=frozen).train()
    parts = [model.stem, *model.stages]
    for index, part in enumerate(parts):
        is_frozen = index <= frozen
        assert all(p.requires_grad != is_frozen for p in part.parameters())
        assert all(m.training != is_frozen for m in part.modules() if isinstance(m, nn.BatchNorm2d))
    for index, norm in model.out_norms.items():  # with their stage, as mmdet's Swin freezes them
        assert all(p.requires_grad != (int(index) < frozen) for p in norm.parameters())
        assert norm.training != (int(index) < frozen)


def test_norm_eval_keeps_statistics(small):
    model = small(norm_eval=True).train()
    before = copy.deepcopy(dict(model.named_buffers()))
    model(image())
    assert model.training
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_train_and_eval_return_the_module(small):
    model = small(frozen_stages=1)
    assert model.train() is model
    assert model.eval() is model


def test_checkpointing_changes_nothing(small):
    plain, recomputed = small().train(), small(with_cp=True).train()
    gradients = []
    for model in (plain, recomputed):
        sum(out.square().mean() for out in model(image())).backward()
        gradients.append([p.grad for p in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-7)
    assert all(torch.equal(one, other) for one, other in zip(plain.buffers(), recomputed.buffers(), strict=True))


def fresh_copy_of(model):
    twin = type(model)(model.arch, drop_path_rate=0.0)
    twin.load_state_dict(model.state_dict())
    return twin.to(next(model.parameters()).dtype).eval()


def assert_not_stale(model):
    x = image().to(next(model.parameters()).dtype)
    with torch.no_grad():
        for one, other in zip(model.eval()(x), fresh_copy_of(model)(x), strict=True):
            assert torch.equal(one, other)


def train_a_step(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sum(out.square().mean() for out in model.train()(image())).backward()
    optimizer.step()


def test_evaluation_after_training_is_not_stale(small):
    model = small()
    before = model.eval()(image())
    train_a_step(model)
    assert_not_stale(model)
    assert not torch.equal(model(image())[0], before[0])


def test_evaluation_after_loading_is_not_stale(small):
    model, other = small(), small()
    train_a_step(other)
    model.eval()(image())
    model.load_state_dict(other.state_dict())
    assert_not_stale(model)
    assert torch.equal(model(image())[3], other.eval()(image())[3])


def test_evaluation_after_ema_is_not_stale(small):
    model = small()
    ema = ExponentialMovingAverage(model, momentum=0.5)
    ema.module.eval()(image())
    train_a_step(model)
    ema.update_parameters(model)
    assert_not_stale(ema.module)


def test_evaluation_after_a_move_is_not_stale(small):
    model = small().eval()
    model(image())
    assert_not_stale(model.to(torch.float64))


def test_backward_in_evaluation_mode(small):
    model = small().eval()
    x = image().requires_grad_()
    (model(x)[3] ** 3).sum().backward()  # the plain sum of normalized values is constant
    assert x.grad.abs().sum() > 0
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.stages.parameters())


def test_copies_and_pickles(small):
    model = small().eval()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    twins = (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False))
    for twin in twins:
        assert torch.equal(twin(image())[3], model(image())[3])


@pytest.mark.parametrize(
    ('arguments', 'error', 'message'),
    [
        ({'depth': 50, 'style': 'pytorch'}, TypeError, r'unknown argument depth, style; allowed are .*_delete_=True'),
        ({'arch': 'large'}, ValueError, r"arch must be one of tiny, t, small, s, base, b.* or a dict, got 'large'"),
        ({'arch': 3}, TypeError, 'arch must be a name or a dict, got int'),
        ({'arch': {'embed_dims': 8}}, ValueError, 'exactly the keys embed_dims.* and .*, got embed_dims'),
        ({'out_indices': (4,)}, ValueError, 'out_indices must be an integer from -4 to 3, got 4'),
        ({'out_indices': (0, -4)}, ValueError, 'out_indices must name each stage once'),
        ({'out_indices': ()}, ValueError, 'out_indices must be one or more integers'),
        ({'in_channels': 0}, ValueError, 'in_channels must be an integer of at least 1, got 0'),
        ({'frozen_stages': 5}, ValueError, 'frozen_stages must be an integer from -1 to 4, got 5'),
        ({'drop_path_rate': 1.0}, ValueError, r'drop_path_rate must be a number in \[0, 1\), got 1.0'),
        ({'pretrained': True}, TypeError, 'pretrained must be a path or None, got bool'),
        ({'pretrained': 'a', 'init_cfg': {}}, ValueError, 'expected pretrained or init_cfg, got both'),
    ],
)
def test_bad_arguments(small, arguments, error, message):
    with pytest.raises(error, match=f'{small.backbone.__name__}: .*{message}'):
        small(**arguments)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'d_state': 1}, 'exactly the keys .* got embed_dims, depths, .*d_state'),
        ({'embed_dims': 7}, "arch\\['embed_dims'\\] must be even, got 7"),
        ({'depths': (1, 1, 1)}, "arch\\['depths'\\] must be 4 integers"),
        ({'depths': (1, 0, 1, 1)}, 'at least 1, got 0'),
    ],
)
def test_bad_architectures(small, change, message):
    with pytest.raises(ValueError, match=f'{small.backbone.__name__}: .*{message}'):
        small(arch={**SMALL[small.backbone], **change})
