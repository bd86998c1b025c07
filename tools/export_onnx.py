"""Exports a model to ONNX, of any image size, and checks the file in ONNX Runtime against PyTorch.

Examples:
    python tools/export_onnx.py configs/mask_rcnn_sm_t.py checkpoints/FILE --out mask_rcnn.onnx --check photos/
    python tools/export_onnx.py configs/upernet_sm_t.py checkpoints/FILE --argmax --out upernet.onnx
    python tools/export_onnx.py configs/dino_sm_t.py checkpoints/FILE --part head --out dino_head.onnx

A detector is written whole: its file takes a picture as the config's reader gives it, after a resize (``image``,
(1, 3, H, W), float32, 0 to 255, BGR), and returns ``boxes``, ``scores``, ``labels`` and ``masks``: a fixed number of
rows, best first, score 0 where there is none. tools/run_onnx.py runs it without PyTorch. What cannot be exported is
refused before anything is.

Everything else takes a normalized batch ``image``, (N, C, H, W), float32: what the model's data preprocessor returns.

- a segmentor: ``logits`` of each class at the size of the input, or with ``--argmax`` its ``labels``.
- a classifier: ``scores``.
- ``--part backbone``: ``map_0`` to ``map_3``, the backbone's maps.
- ``--part head``: what a detector's dense head computes from each map, without anchors, suppression and what follows;
  a classifier's ``logits``.

Needs ``pip install -r requirements/export.txt``. docs/deploy.md says what each runtime does with the file.
"""

import argparse
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

from mmspatialmamba.checkpoint import CheckpointError
from mmspatialmamba.deploy.parts import PARTS, Exported, choose_part, is_detector
from mmspatialmamba.inspection import build_model, prepare, read_config

TOLERANCE = 1e-4
"""Largest allowed difference between ONNX Runtime and PyTorch, relative to the largest value of the output."""

DETECTION_TOLERANCE = {'box': 1e-3, 'score': 1e-5, 'pixels': 2}
"""Largest allowed differences of detections: pixels after the resize, score, mask pixels per image."""


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


def label_difference(session, module: nn.Module, shape: tuple[int, ...]) -> float:
    """Returns the share of pixels of random batches to which ONNX Runtime gives another label than PyTorch."""
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        (expected,) = module(images)
    (found,) = session.run(None, {'image': images.numpy()})
    return (torch.from_numpy(found) != expected).double().mean().item()


@torch.no_grad()
def compare_detections(path: Path, config, model: nn.Module, images: list[Path]):
    """Returns the `Agreement` between tools/run_onnx.py with a file and mmdet's own result, at the images' own sizes.

    Boxes are compared in pixels after the resize: an image of 4000 pixels would multiply the differences.
    """
    import run_onnx

    from mmspatialmamba.deploy.agreement import compare as compare_images
    from mmspatialmamba.deploy.agreement import worst

    detector = run_onnx.Detector(path)
    agreements = []
    for image in images:
        found = detector(run_onnx.read_image(image))
        sample = prepare(config, model, image)
        (result,) = model.predict(sample.inputs, sample.data_samples, rescale=True)
        expected = result.pred_instances.numpy()
        factors = [factor for _ in range(2) for factor in result.scale_factor]
        agreements.append(
            compare_images(
                SimpleNamespace(**{**vars(found), 'boxes': found.boxes * factors}),
                SimpleNamespace(
                    boxes=expected.bboxes * factors,
                    scores=expected.scores,
                    labels=expected.labels,
                    masks=expected.get('masks'),
                ),
            )
        )
    return worst(agreements)


def export_detector(args: argparse.Namespace, config, model: nn.Module) -> None:
    """Writes a whole detector, and compares it with PyTorch on the images of ``--check``."""
    import run_onnx

    from mmspatialmamba.deploy import detector as deploy
    from mmspatialmamba.deploy import metadata
    from mmspatialmamba.deploy.refusals import CannotExport

    try:
        limit_detections(model, args.max_detections)
        whole = deploy.WholeDetector(model)
        description = metadata.describe(config, model)
    except CannotExport as error:
        sys.exit(f'{args.config}: {error}; --part backbone and --part head export what comes before')
    images, calibration = (
        [image for path in paths for image in run_onnx.find_images(path)] for paths in (args.check, args.int8)
    )
    program = deploy.export_detector(whole)
    metadata.write(program, description)
    program.save(args.out)
    print(f'wrote {args.out}: {", ".join(whole.output_names)}, {whole.detect.count} rows')
    if calibration:
        from mmspatialmamba.deploy.int8 import quantize

        prepare_image = run_onnx.Detector(args.out).prepare
        target = args.out.with_name(f'{args.out.stem}_int8.onnx')
        quantize(args.out, target, (prepare_image(run_onnx.read_image(image))[0] for image in calibration))
        print(f'wrote {target}, calibrated on {len(calibration)} images')
    if images:
        check_detections(args.out, config, model, images)
    else:
        print('not compared with PyTorch: give images with --check')


def check_detections(path: Path, config, model: nn.Module, images: list[Path]) -> None:
    """Prints how a file's detections agree with PyTorch's; exits if they do not, or if there are none to compare."""
    agreement = compare_detections(path, config, model, images)
    print(f'{agreement.detections} detections in {len(images)} images, ONNX Runtime against PyTorch: {agreement}')
    if not agreement.detections:
        sys.exit(f'{path}: expected detections to compare, found none in the images of --check')
    if not agreement.holds(**DETECTION_TOLERANCE):
        limits = ', '.join(f'{name} {limit}' for name, limit in DETECTION_TOLERANCE.items())
        sys.exit(f'{path}: expected the detections of PyTorch within {limits}, found {agreement}')


def limit_detections(model: nn.Module, count: int | None) -> None:
    """Sets the number of detections that a detector keeps, if one is given."""
    if count is not None:
        head = getattr(model, 'roi_head', None) or model.bbox_head
        head.test_cfg['max_per_img'] = count


def export_part(args: argparse.Namespace, config, model: nn.Module) -> None:
    """Writes what a model computes from a normalized batch, and compares it with PyTorch on random pixels."""
    import onnxruntime

    from mmspatialmamba.onnx_export import MIN_SIDE, export_onnx

    module, stem = choose_part(model, args.part, args.argmax)
    module.eval()
    height, width = args.shape
    channels = config.model.backbone.get('in_channels', 3)
    images = torch.zeros(2, channels, height, width)
    names = output_names(module, stem, images)
    program = export_onnx(module, images, names)
    program.save(args.out)
    print(f'wrote {args.out}: {", ".join(names)}')

    session = onnxruntime.InferenceSession(args.out, providers=['CPUExecutionProvider'])
    measure = label_difference if stem == 'labels' else compare
    worst = 0.0
    for shape in ((2, channels, height, width), (1, channels, height * 3 // 4 + MIN_SIDE, width + 29)):
        difference = measure(session, module, shape)
        kind = 'share of other labels' if stem == 'labels' else 'largest relative difference'
        print(f'{kind} between ONNX Runtime and PyTorch at {"x".join(map(str, shape))}: {difference:.1e}')
        worst = max(worst, difference)
    if not worst <= TOLERANCE:
        sys.exit(f'{args.out}: expected the outputs of PyTorch within {TOLERANCE}, found a difference of {worst:.1e}')


@torch.no_grad()
def output_names(module: Exported, stem: str, images: torch.Tensor) -> list[str]:
    """Returns the stem, with a number if there are several outputs."""
    count = len(module(images))
    return [stem] if count == 1 else [f'{stem}_{index}' for index in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help="config file of mmdet, mmseg or mmpretrain, or a toolbox's, such as mmseg::…")
    parser.add_argument('checkpoint', nargs='?', help='checkpoint file; random weights by default')
    parser.add_argument('--out', type=Path, default=Path('model.onnx'), help='file to write (default model.onnx)')
    parser.add_argument('--part', choices=PARTS, help='what to export; the whole model by default')
    parser.add_argument(
        '--check', type=Path, nargs='+', default=[], metavar='IMAGES',
        help='images, or folders of images, on which a whole detector is compared with PyTorch',
    )  # fmt: skip
    parser.add_argument(
        '--max-detections', type=int, metavar='N', help="rows of a whole detector (default the config's max_per_img)"
    )
    parser.add_argument(
        '--int8', type=Path, nargs='+', default=[], metavar='IMAGES',
        help='writes a second file of a whole detector, in int8, calibrated on these images or folders',
    )  # fmt: skip
    parser.add_argument('--argmax', action='store_true', help="end a segmentor in each pixel's label")
    parser.add_argument(
        '--shape', type=int, nargs=2, default=(224, 224), metavar=('HEIGHT', 'WIDTH'),
        help='image size in pixels at which all but whole detectors are traced and checked first (default 224 224)',
    )  # fmt: skip
    args = parser.parse_args()
    if not args.out.parent.is_dir():
        parser.error(f'argument --out: expected a file in an existing folder, found no folder {args.out.parent}')
    try:
        import onnxruntime  # noqa: F401

        from mmspatialmamba.onnx_export import MIN_SIDE
    except ImportError as error:
        sys.exit(f'export_onnx: expected the packages of requirements/export.txt, found {error}')
    if min(args.shape) < MIN_SIDE:
        parser.error(f'argument --shape: expected a height and a width of at least {MIN_SIDE} pixels, got {args.shape}')
    if args.max_detections is not None and args.max_detections < 1:
        parser.error(f'argument --max-detections: expected a positive number, got {args.max_detections}')
    try:
        config = read_config(args.config)
        model = build_model(config, args.checkpoint)
        whole = is_detector(model) and args.part is None
        if (args.check or args.int8 or args.max_detections is not None) and not whole:
            parser.error('--check, --int8 and --max-detections are for whole detectors')
        if args.argmax and not hasattr(model, 'encode_decode'):
            parser.error(f'argument --argmax: expected a segmentor, found {type(model).__name__}')
        (export_detector if whole else export_part)(args, config, model)
    except (FileNotFoundError, ValueError, CheckpointError) as error:
        sys.exit(f'export_onnx: {error}')
    except torch.onnx.OnnxExporterError as error:
        sys.exit(f'{args.config}: expected a model that torch.onnx can export, found {_last_cause(error)}')


def _last_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return ' '.join(f'{type(error).__name__}: {error}'.split())


if __name__ == '__main__':
    main()
