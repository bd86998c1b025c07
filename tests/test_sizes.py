"""Every size from no image to 4096x4096: values, BatchNorm, memory, and no growth over many shapes."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from mmengine.model import convert_sync_batchnorm, revert_sync_batchnorm
from torch import nn

from mmspatialmamba import SpatialMamba

SMALL = {'embed_dims': 8, 'depths': (1, 1, 1, 1)}


def backbone(**arguments):
    torch.manual_seed(0)
    return SpatialMamba(**{'arch': SMALL, 'drop_path_rate': 0.0, **arguments})


def image(height, width, batch=1):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(3))


def backward(model, x):
    outputs = model(x)
    sum(output.square().sum() for output in outputs).backward()
    return outputs


@pytest.mark.parametrize(
    'size', [(1, 1), (1, 2), (2, 1), (1, 4096), (4096, 1), (3, 1023), (1025, 5), (31, 33), (63, 65), (513, 683)]
)
def test_any_size_trains(size):
    """With BatchNorm in evaluation mode, as one pixel has no variance."""
    model = backbone(norm_eval=True).train()
    for output in backward(model, image(*size)):
        assert output.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_rows_of_a_batch_do_not_depend_on_each_other():
    """Maps of an image alone equal those in a batch."""
    model, x = backbone().eval(), image(33, 47, batch=3)
    with torch.no_grad():
        for alone, together in zip(model(x[1:2]), model(x), strict=True):
            assert (alone[0] - together[1]).abs().max() < 2.4e-6  # Measured: 2.4e-7.


def test_a_batch_of_one_trains():
    model = backbone().train()
    backward(model, image(64, 64))
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize('arguments', [{'norm_eval': True}, {'frozen_stages': 4}])
def test_a_batch_of_one_pixel_trains_with_frozen_batch_norm(arguments):
    model = backbone(**arguments).train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    backward(model, image(1, 1).requires_grad_())
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_a_batch_of_one_pixel_says_what_batch_norm_needs():
    with pytest.raises(ValueError, match='Expected more than 1 value per channel when training'):
        backbone().train()(image(1, 1))


def test_an_empty_batch_trains_and_spoils_nothing():
    """mmdet makes empty batches of crops; gradients are zeros and BatchNorm's statistics stay."""
    model = backbone().train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers() if 'num_batches' not in name}
    outputs = backward(model, image(40, 56, batch=0))
    assert [output.shape[0] for output in outputs] == [0, 0, 0, 0]
    assert not any(parameter.grad.any() for parameter in model.parameters())
    buffers = dict(model.named_buffers())
    assert all(torch.equal(buffers[name], buffer) for name, buffer in before.items())


def test_sync_batch_norm_converts_and_reverts():
    """``sync_bn='torch'`` of a config: the same parameters and, in one process, the same values."""
    plain = backbone().eval()
    synced = convert_sync_batchnorm(backbone()).eval()
    assert sum(isinstance(module, nn.SyncBatchNorm) for module in synced.modules()) == 8
    assert synced.state_dict().keys() == plain.state_dict().keys()
    reverted = revert_sync_batchnorm(synced).eval()
    x = image(40, 56)
    for one, other in zip(reverted(x), plain(x), strict=True):
        assert torch.equal(one, other)


PROBE = """
import json, sys
from pathlib import Path
import psutil, torch
from mmspatialmamba import SpatialMamba

arguments, sizes, training = json.loads(sys.argv[1])
model = SpatialMamba(**arguments).train(training)

def run(height, width):
    with torch.set_grad_enabled(training):
        outputs = model(torch.zeros(1, 3, height, width))
        if training:
            sum(output.square().mean() for output in outputs).backward()

def peak(height, width):
    Path('/proc/self/clear_refs').write_text('5')  # starts the peak anew
    base = psutil.Process().memory_info().rss
    run(height, width)
    lines = Path('/proc/self/status').read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith('VmHWM')) - base

run(256, 256)
print(json.dumps([peak(*size) for size in sizes]))
"""


# What is freed goes back at once: otherwise the next size would find it and seem to need less.
FREES_AT_ONCE = {'MALLOC_MMAP_THRESHOLD_': '65536', 'MALLOC_TRIM_THRESHOLD_': '0'}


def run(*command):
    """Runs Python in a process of its own and returns the JSON that it prints."""
    environment = {**os.environ, **FREES_AT_ONCE}
    result = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def peak_memory(sizes, training=True, **arguments):
    """Bytes that each size needs at its peak, beyond the weights, in a process of its own."""
    return run('-c', PROBE, json.dumps((arguments, sizes, training)))


@pytest.mark.end_to_end
@pytest.mark.parametrize('training', [True, False])
def test_memory_is_linear_in_pixels(training):
    """Over a factor of four in pixels and of 64 in height over width, to a tenth."""
    sizes = [(512, 512), (256, 2048), (2048, 256), (1024, 1024)]
    peaks = peak_memory(sizes, training, arch={'embed_dims': 16, 'depths': (1, 1, 2, 1)})
    per_pixel = [peak / (height * width) for peak, (height, width) in zip(peaks, sizes, strict=True)]
    # Measured: 342 to 345 bytes per pixel in training, 64 to 65 in evaluation.
    assert max(per_pixel) < 1.1 * min(per_pixel)


@pytest.mark.end_to_end
def test_with_cp_saves_memory():
    """With the depths of the published tiny backbone, 18 blocks."""
    arch = {'embed_dims': 16, 'depths': (2, 4, 8, 4)}
    (plain,), (recomputed,) = (peak_memory([(512, 512)], arch=arch, with_cp=with_cp) for with_cp in (False, True))
    assert plain > 2.4 * recomputed  # Measured: 630 and 238 bytes per pixel, a factor of 2.6.


@pytest.mark.end_to_end
def test_many_shapes_do_not_leak():
    """The same forty shapes again and again: after the first round nothing grows."""
    code = """
    import json
    import psutil, torch
    from mmspatialmamba import SpatialMamba

    model = SpatialMamba(dict(embed_dims=8, depths=(1, 1, 1, 1)))
    def used_after_all_shapes():
        for index in range(40):
            x = torch.zeros(2, 3, 64 + 7 * index % 61, 64 + 11 * index % 53)
            sum(output.square().mean() for output in model(x)).backward()
        return psutil.Process().memory_info().rss / 2**20
    print(json.dumps([used_after_all_shapes() for _ in range(5)]))
    """
    used = run('-c', textwrap.dedent(code))
    # Measured: 451, 459, 461, 463, 464 MiB. To keep the input of every step would be 6 MiB a round.
    assert used[-1] - used[-2] < 3


@pytest.mark.long
def test_the_published_tiny_backbone_at_4096():
    (peak,) = peak_memory([(4096, 4096)], training=False, arch='tiny')
    assert peak / 4096**2 < 280  # Measured: 254 bytes per pixel, 4.3 GB.


def test_padding_in_a_batch_moves_what_is_near_it():
    """docs/reliability.md has the figures of Spatial-Mamba-T; zeros beside an image are seen as a part of it."""
    alone = image(128, 128)
    padded = nn.functional.pad(alone, (0, 32))
    with torch.no_grad():
        model = backbone().eval()
        first, beside = model(alone)[0], model(padded)[0][..., :32]
    moved = (first - beside).abs() / first.abs().max()
    assert moved[..., :16].max() < 0.01 < 0.05 < moved[..., 16:].max()
