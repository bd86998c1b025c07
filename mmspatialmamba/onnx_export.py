"""The backbones in standard ONNX operators, for `torch.onnx.export`; needs ``requirements/export.txt``.

Each op's translation lies beside the op. Nothing depends on the exported size: batch, height and width stay dynamic.

``import mmspatialmamba`` leaves this module out.
"""

import torch
from onnxscript import ir
from onnxscript import opset18 as op

from .models.fused import FusedBlock
from .ops.compat import VERSION
from .ops.onnx_translations import TRANSLATIONS as OP_TRANSLATIONS

if VERSION < (2, 6):
    raise RuntimeError(f'ONNX export needs PyTorch 2.6 or later, found {VERSION}')

MIN_SIDE = 33
"""Smallest height and width of the example image: below it the last map is a single row or column, which
`torch.export` would take for a constant. The exported file accepts any size."""


def adaptive_avg_pool2d(x, output_size):
    """Translates `torch.nn.functional.adaptive_avg_pool2d` of a map of any size, as products with two matrices.

    PyTorch 2.13's own translation keeps the window sizes of the exported map, and is silently wrong at every other.
    """
    rows, columns = (_averaging_matrix(x, axis, size) for axis, size in zip((2, 3), output_size, strict=True))
    return op.MatMul(op.MatMul(rows, x), op.Transpose(columns, perm=[1, 0]))


def _averaging_matrix(x, axis: int, size: int):
    """Returns the matrix (size, length) that averages ``x`` over the ``size`` windows of an axis of some length."""
    length = op.Squeeze(op.Shape(x, start=axis, end=axis + 1))
    window = op.Constant(value_ints=list(range(size)))
    start = op.Unsqueeze(op.Div(op.Mul(window, length), size), [1])
    end = op.Unsqueeze(op.Div(op.Add(op.Mul(op.Add(window, 1), length), size - 1), size), [1])
    position = op.Range(0, length, 1)
    inside = op.And(op.GreaterOrEqual(position, start), op.Less(position, end))
    return op.Div(op.CastLike(inside, x), op.CastLike(op.Sub(end, start), x))


TRANSLATIONS = {
    **OP_TRANSLATIONS,
    torch.ops.aten.adaptive_avg_pool2d.default: adaptive_avg_pool2d,
    torch.ops.aten._adaptive_avg_pool2d.default: adaptive_avg_pool2d,
}
"""For ``custom_translation_table`` of `torch.onnx.export`."""


def export_onnx(model: torch.nn.Module, images: torch.Tensor, output_names: list[str]) -> torch.onnx.ONNXProgram:
    """Exports a model with dynamic batch, height and width.

    Args:
        model: Maps an image batch to a tensor or a tuple of tensors; in evaluation mode.
        images: Example batch, (N, C, H, W), N at least 2, H and W at least ``MIN_SIDE``.
        output_names: Name of each output.

    Returns:
        The program; its ``save(path)`` writes the file.

    Raises:
        ValueError: The example is too small, or the model is fused or in training mode.
    """
    if images.ndim != 4 or len(images) < 2 or min(images.shape[2:]) < MIN_SIDE:
        raise ValueError(
            f'export_onnx: images must be (N, C, H, W) with N of at least 2 and sides of at least {MIN_SIDE}, got '
            f'{tuple(images.shape)}'
        )
    if model.training:
        raise ValueError('export_onnx: model must be in evaluation mode, got one in training mode')
    if any(isinstance(module, FusedBlock) for module in model.modules()):
        raise ValueError('export_onnx: model must be layered, got a fused one: call mmspatialmamba.unfuse(model) first')
    program = torch.onnx.export(
        model,
        (images,),
        dynamo=True,
        verbose=False,
        dynamic_shapes=({0: 'batch', 2: 'height', 3: 'width'},),
        custom_translation_table=TRANSLATIONS,
        input_names=['image'],
        output_names=output_names,
    )
    _rename_apart(program.model.graph)
    return program


def _rename_apart(graph: ir.Graph) -> None:
    """Gives other names to values inside a graph that have the name of an input or output, which runtimes refuse.

    PyTorch 2.13 names the outputs without looking at the rest.
    """
    ends = (*graph.inputs, *graph.outputs)
    taken = {value.name for value in ends}
    inside = [value for node in graph.all_nodes() for value in node.outputs if value not in ends]
    inside += [value for body in graph.subgraphs() for value in body.inputs]
    for number, value in enumerate(inside):
        if value.name in taken:
            value.name = f'{value.name}_{number}_inside'
