"""Exports a model to ONNX with dynamic batch, height and width, and checks the file in ONNX Runtime against PyTorch.

Examples:
    python tools/export_onnx.py configs/upernet_sm_t.py checkpoints/FILE --out upernet.onnx
    python tools/export_onnx.py configs/mask_rcnn_sm_t.py checkpoints/FILE --part backbone --out backbone.onnx

The input, ``image``, is a normalized float32 batch (N, C, H, W): what the model's data preprocessor returns. Outputs:

- ``--part backbone``: ``map_0`` to ``map_3``, the backbone's maps.
- a segmentor: ``logits`` of each class at the size of the input, as ``encode_decode`` returns them.
- a classifier: ``logits``.
- a detector: what its dense head computes from each map, without anchors, suppression and what follows.

Needs ``pip install -r requirements/export.txt``. docs/deploy.md says what each runtime does with the file.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from mmspatialmamba.checkpoint import CheckpointError
from mmspatialmamba.inspection import build_model, read_config

TOLERANCE = 1e-4
"""Largest allowed difference between ONNX Runtime and PyTorch, relative to the largest value of the output."""


class Exported(nn.Module):
    """A model's computation from a normalized image batch to a tuple of tensors.

    Args:
        model: Where the weights are.
        compute: Maps model and image batch (N, C, H, W) to a tensor or a nest of sequences of tensors.
    """

    def __init__(self, model: nn.Module, compute: Callable):
        super().__init__()
        self.model = model
        self.compute = compute

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Returns the outputs as a flat tuple."""
        return tuple(_flatten(self.compute(self.model, images)))


def _flatten(outputs: torch.Tensor | list | tuple) -> list[torch.Tensor]:
    if isinstance(outputs, torch.Tensor):
        return [outputs]
    return [tensor for part in outputs for tensor in _flatten(part)]


def compute_logits(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Returns a segmentor's logits at the size of the images, (N, classes, H, W)."""
    return model.encode_decode(images, [{'img_shape': images.shape[2:]}])  # it reads the first image's alone


def compute_dense_head(model: nn.Module, images: torch.Tensor) -> tuple[list[torch.Tensor], ...]:
    """Returns what a detector's RPN or single-stage head computes: a list over the maps for each kind of output."""
    head = model.rpn_head if getattr(model, 'with_rpn', False) else model.bbox_head
    return head(model.extract_feat(images))


def choose(model: nn.Module, part: str) -> tuple[Exported, str]:
    """Returns the module to export and the stem of its outputs' names."""
    if part == 'backbone':
        return Exported(model, lambda model, images: model.backbone(images)), 'map'
    if hasattr(model, 'encode_decode'):
        return Exported(model, compute_logits), 'logits'
    if hasattr(model, 'bbox_head') or getattr(model, 'with_rpn', False):
        return Exported(model, compute_dense_head), 'dense'
    return Exported(model, lambda model, images: model(images, mode='tensor')), 'logits'


def compare(session, module: nn.Module, shape: tuple[int, ...]) -> float:
    """Returns the largest difference between ONNX Runtime and PyTorch, relative to each output's largest value.

    Args:
        session: ``onnxruntime.InferenceSession`` of the exported file.
        module: What was exported.
        shape: Shape (N, C, H, W) of the batch of random pixels that both get.
    """
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = module(images)
    found = [torch.from_numpy(output) for output in session.run(None, {'image': images.numpy()})]
    return max(
        ((one - other).abs().max() / other.abs().max()).item() for one, other in zip(found, expected, strict=True)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help="config file of mmdet, mmseg or mmpretrain, or a toolbox's, such as mmseg::…")
    parser.add_argument('checkpoint', nargs='?', help='checkpoint file; random weights by default')
    parser.add_argument('--out', type=Path, default=Path('model.onnx'), help='file to write (default model.onnx)')
    parser.add_argument('--part', choices=('model', 'backbone'), default='model', help='what to export (default model)')
    parser.add_argument(
        '--shape', type=int, nargs=2, default=(224, 224), metavar=('HEIGHT', 'WIDTH'),
        help='image size in pixels at which the model is traced and checked first (default 224 224)',
    )  # fmt: skip
    args = parser.parse_args()
    if not args.out.parent.is_dir():
        parser.error(f'argument --out: expected a file in an existing folder, found no folder {args.out.parent}')
    try:
        import onnxruntime

        from mmspatialmamba.onnx_export import MIN_SIDE, export_onnx
    except ImportError as error:
        sys.exit(f'export_onnx: expected the packages of requirements/export.txt, found {error}')
    height, width = args.shape
    if min(args.shape) < MIN_SIDE:
        parser.error(f'argument --shape: expected a height and a width of at least {MIN_SIDE} pixels, got {args.shape}')
    try:
        config = read_config(args.config)
        model = build_model(config, args.checkpoint)
    except (FileNotFoundError, ValueError, CheckpointError) as error:
        sys.exit(f'export_onnx: {error}')

    module, stem = choose(model, args.part)
    module.eval()
    channels = config.model.backbone.get('in_channels', 3)
    images = torch.zeros(2, channels, height, width)
    with torch.no_grad():
        count = len(module(images))
    names = [stem] if count == 1 else [f'{stem}_{index}' for index in range(count)]
    try:
        program = export_onnx(module, images, names)
    except torch.onnx.OnnxExporterError as error:
        sys.exit(f'{args.config}: expected a {args.part} that torch.onnx can export, found {_last_cause(error)}')
    program.save(args.out)
    print(f'wrote {args.out}: {", ".join(names)}')

    session = onnxruntime.InferenceSession(args.out, providers=['CPUExecutionProvider'])
    worst = 0.0
    for shape in ((2, channels, height, width), (1, channels, height * 3 // 4 + MIN_SIDE, width + 29)):
        difference = compare(session, module, shape)
        print(f'largest relative difference between ONNX Runtime and PyTorch at {"x".join(map(str, shape))}: '
              f'{difference:.1e}')  # fmt: skip
        worst = max(worst, difference)
    if not worst <= TOLERANCE:
        sys.exit(f'{args.out}: expected the outputs of PyTorch within {TOLERANCE}, found a difference of {worst:.1e}')


def _last_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return ' '.join(f'{type(error).__name__}: {error}'.split())


if __name__ == '__main__':
    main()
