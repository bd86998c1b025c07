"""The backbone beside what else lives in a process: other packages, workers, threads, functional transforms."""

import copy
import io
import subprocess
import sys
import textwrap
import threading

import pytest
import torch
from mmspatialmamba.ops import (
    depthwise_conv,
    downsample,
    fusion_taps,
    gated_norm,
    layer_norm,
    mlp,
    scan_states,
    ssm_layer,
    state_fusion,
    structure_aware_ssm,
)
from oracles import (
    conv_arguments,
    downsample_arguments,
    fusion_weights,
    layer_arguments,
    mlp_arguments,
    norm_arguments,
    require_grad,
    scan_inputs,
    ssm_arguments,
)

from mmspatialmamba import SpatialMamba

SMALL = {'embed_dims': 8, 'depths': (1, 1, 1, 1)}


def backbone(seed=0):
    torch.manual_seed(seed)
    return SpatialMamba(SMALL, drop_path_rate=0.0).eval()


def image(seed=0, batch=2):
    return torch.randn(batch, 3, 40, 56, generator=torch.Generator().manual_seed(seed))


def run(code, folder):
    """Runs a script in a fresh interpreter that finds modules in ``folder`` first, and returns what it printed."""
    (folder / 'script.py').write_text(textwrap.dedent(code))
    result = subprocess.run([sys.executable, folder / 'script.py'], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_beside_a_package_called_models(tmp_path):
    """VMamba's code base has a top-level package ``models`` and a top-level module ``ops`` is as likely."""
    for name in ('models', 'ops'):
        (tmp_path / name).mkdir()
        (tmp_path / name / '__init__.py').write_text('OWNER = "somebody else"')
    code = """
    import models, ops
    import mmspatialmamba, torch
    model = mmspatialmamba.SpatialMamba(dict(embed_dims=8, depths=(1, 1, 1, 1)))
    model(torch.zeros(2, 3, 64, 64))
    import models as again, ops as ops_again
    print(again.OWNER, '-', ops_again.OWNER)
    """
    assert run(code, tmp_path) == 'somebody else - somebody else\n'


@pytest.mark.end_to_end
@pytest.mark.parametrize('method', ['spawn', 'fork'])
def test_workers_of_a_data_loader(method, tmp_path):
    """Workers compute features themselves, after the parent has used the ops: what they give equals the parent's."""
    code = f"""
    import torch
    from mmspatialmamba import SpatialMamba
    from torch.utils.data import DataLoader, Dataset

    class Features(Dataset):
        def __init__(self, model):
            self.model = model

        def __len__(self):
            return 4

        @torch.no_grad()
        def __getitem__(self, index):
            x = torch.randn(1, 3, 40, 56, generator=torch.Generator().manual_seed(index))
            return self.model(x)[3][0]

    if __name__ == '__main__':
        features = Features(SpatialMamba(dict(embed_dims=8, depths=(1, 1, 1, 1))).eval())
        expected = torch.stack([features[index] for index in range(4)])
        loader = DataLoader(features, batch_size=2, num_workers=2, multiprocessing_context={method!r})
        print((torch.cat(list(loader)) - expected).abs().max().item())
    """
    assert run(code, tmp_path) == '0.0\n'


def test_two_models_in_two_threads():
    """Forward and backward of two models at once give the same bits as one after the other."""

    def gradients(model, x):
        loss = sum(output.square().mean() for output in model(x))
        return torch.autograd.grad(loss, list(model.parameters()))

    models = [backbone(seed) for seed in range(2)]
    images = [image(seed) for seed in range(2)]
    expected = [gradients(model, x) for model, x in zip(models, images, strict=True)]
    results = {}

    def work(index):
        results[index] = [gradients(models[index], images[index]) for _ in range(5)]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(2):
        for run_gradients in results[index]:
            for one, other in zip(run_gradients, expected[index], strict=True):
                assert torch.equal(one, other)


def test_one_model_in_many_threads():
    model, x = backbone(), image()
    with torch.no_grad():
        expected = model(x)
    results = {}

    def work(index):
        with torch.no_grad():
            results[index] = model(x)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    for outputs in results.values():
        assert all(torch.equal(one, other) for one, other in zip(outputs, expected, strict=True))


def test_inference_mode():
    model, x = backbone(), image()
    expected = model(x)
    with torch.inference_mode():
        outputs = model(x)
    for one, other in zip(outputs, expected, strict=True):
        assert one.is_inference()
        assert torch.equal(one, other)


def test_functional_call():
    model, other, x = backbone(0), backbone(1), image()
    state = {**dict(other.named_parameters()), **dict(other.named_buffers())}
    for one, two in zip(torch.func.functional_call(model, state, (x,)), other(x), strict=True):
        assert torch.equal(one, two)


def test_a_copy_in_training_is_independent():
    model, x = backbone().train(), image()
    twin = copy.deepcopy(model)
    before = copy.deepcopy(twin.state_dict())
    sum(output.square().mean() for output in model(x)).backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in twin.state_dict().items())
    assert all(parameter.grad is None for parameter in twin.parameters())


def test_half_a_state_dict_goes_through_a_file():
    model = backbone()
    buffer = io.BytesIO()
    torch.save(model.half().state_dict(), buffer)
    buffer.seek(0)
    twin = backbone(1)
    twin.load_state_dict(torch.load(buffer, weights_only=True))
    assert all(
        torch.equal(one, other.float()) for one, other in zip(twin.parameters(), model.parameters(), strict=True)
    )


@pytest.mark.filterwarnings('ignore:There is a performance drop')
def test_vmap():
    """PyTorch runs an op that has no batching rule in a loop, and says so once."""
    u, delta, A, B = scan_inputs(7)
    many = torch.stack((u, 2 * u, -u))
    expected = torch.stack([scan_states(one, delta, A, B) for one in many])
    assert torch.equal(torch.vmap(scan_states, (0, None, None, None))(many, delta, A, B), expected)


def op_calls():
    """Each op with arguments: name, function, arguments."""
    u, *others, taps = ssm_arguments((4, 5))
    return (
        ('scan_states', scan_states, scan_inputs(7)),
        ('fusion_taps', fusion_taps, [*fusion_weights(5)[0], fusion_weights(5)[1]]),
        ('state_fusion', state_fusion, (u, taps)),
        ('structure_aware_ssm', structure_aware_ssm, (u, *others, taps)),
        ('depthwise_conv', depthwise_conv, conv_arguments((4, 5))),
        ('downsample', downsample, downsample_arguments((4, 5))),
        ('gated_norm', gated_norm, norm_arguments((4, 5))),
        ('layer_norm', layer_norm, norm_arguments((4, 5))[1:]),
        ('mlp', mlp, mlp_arguments(7)),
        ('ssm_layer', ssm_layer, layer_arguments((4, 5))),
    )


@pytest.mark.parametrize('call', op_calls(), ids=lambda call: call[0])
@pytest.mark.parametrize('position', [0, -1])
def test_forward_mode_is_refused(call, position):
    """Without a formula PyTorch would return tangents of zero and no error."""
    name, function, arguments = call

    def of_one(x):
        changed = list(arguments)
        changed[position] = x
        return function(*changed)

    x = arguments[position]
    with pytest.raises(NotImplementedError, match=f'{name}: forward-mode differentiation is not supported'):
        torch.func.jvp(of_one, (x,), (torch.ones_like(x),))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(NotImplementedError, match=f'{name}: forward-mode differentiation is not supported'):
            of_one(dual)


def test_functorch_gradients_are_refused():
    """PyTorch refuses torch.func.grad through every op of torch.library; torch.autograd is the way."""
    u, delta, A, B = scan_inputs(7)
    with pytest.raises(RuntimeError, match='functorch transforms'):
        torch.func.grad(lambda u: scan_states(u, delta, A, B).sum())(u)


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')


@needs_cuda
def test_cuda_streams():
    model, x = backbone().cuda(), image().cuda()
    expected = model(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        outputs = model(x)
    torch.cuda.current_stream().wait_stream(stream)
    for one, other in zip(outputs, expected, strict=True):
        assert torch.equal(one, other)


@needs_cuda
def test_cuda_graphs():
    arguments = [x.cuda() for x in ssm_arguments((8, 9), dtype=torch.float32)]
    expected = structure_aware_ssm(*arguments)
    captured = require_grad(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        y = structure_aware_ssm(*captured)
    y.zero_()
    graph.replay()
    assert torch.equal(y, expected)
