"""Shows what the blocks of a backbone compute of an image, and what a detector's or segmentor's answer rests on.

Examples:
    python tools/visualize_states.py states configs/mask_rcnn_sm_t.py IMAGE --checkpoint FILE --block 0 1 --block 3 3
    python tools/visualize_states.py cam configs/mask_rcnn_sm_t.py IMAGE --checkpoint FILE --label 0

``states`` draws a row for each block: of a Spatial-Mamba input u and step size Δ of its SSM, state h before and g after
the fusion, and the observation y; of a VMamba input, step size, what each of its orders observes (rows, columns, both
backwards), and their sum y. Each is drawn as the root mean square over the channels of a token, or as the signed
values of one channel (``--channel``). ``cam`` draws Grad-CAM (arXiv 1610.02391) at every map of the backbone, whatever
backbone it is: where the features speak for the answer. The answer of a detector is the score of its best object, that
of a segmentor the mean logit of its largest class over the pixels of that class, that of a classifier the score of its
best class; ``--label`` picks another class. It needs Captum: pip install captum.
"""

import argparse
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from mmengine.structures import BaseDataElement
from torch import nn
from torch.nn.functional import interpolate

from mmspatialmamba.checkpoint import CheckpointError
from mmspatialmamba.inspection import (
    Sample,
    ScanRecord,
    SSMRecord,
    build_model,
    last_blocks,
    picture_path,
    prepare,
    read_config,
    record_ssm,
)


def summarize(values: torch.Tensor, channel: int | None) -> np.ndarray:
    """Returns the root mean square over the channels of (1, H, W, E), or the values of one channel, as (H, W)."""
    values = values[0].float()
    return (values.square().mean(-1).sqrt() if channel is None else values[..., channel]).numpy()


def draw_states(
    sample: Sample, records: dict[tuple[int, int], SSMRecord | ScanRecord], channel: int | None, title: str, path: Path
) -> None:
    """Draws the image and, in a row for each block, its maps; writes the picture."""
    height, width = sample.image.shape[:2]
    padded = sample.inputs.shape[2:]
    maps = {block: record.maps() for block, record in records.items()}
    shape = (len(records), max(map(len, maps.values())) + 1)
    figure = Figure(figsize=(2.9 * shape[1], (2.4 * height / width + 0.6) * shape[0] + 0.4), layout='constrained')
    figure.suptitle(title, fontsize=10)
    for axes, ((stage, block), record) in zip(figure.subplots(*shape, squeeze=False), records.items(), strict=True):
        tokens = record.u.shape[1:3]
        axes[0].imshow(sample.image)
        axes[0].set_title('image', fontsize=10)
        axes[0].set_ylabel(f'stage {stage}, block {block}\n{tokens[0]}x{tokens[1]} tokens\nrow, px', fontsize=9)
        for axis, (label, found) in zip(axes[1:], maps[stage, block].items(), strict=True):
            values = summarize(found, channel)
            signed = (values < 0).any()
            largest = np.abs(values).max()
            image = axis.imshow(
                values,
                cmap='RdBu_r' if signed else 'viridis',
                vmin=-largest if signed else None,
                vmax=largest if signed else None,
                extent=(0, padded[1], padded[0], 0),
            )
            axis.set(xlim=(0, width), ylim=(height, 0))
            axis.set_title(label, fontsize=10)
            figure.colorbar(image, ax=axis, shrink=0.75).ax.tick_params(labelsize=7)
        for axis in axes:
            axis.tick_params(labelsize=7)
    for axis in axes:
        axis.set_xlabel('column, px', fontsize=8)
    figure.savefig(path, dpi=80)


@dataclass(frozen=True)
class Answer:
    """What Grad-CAM explains.

    Attributes:
        score: Differentiable score, 0-dimensional.
        label: Class.
        kind: What the score is.
        box: Left, top, right and bottom of the object in pixels of the original image, if the answer is an object.
    """

    score: torch.Tensor
    label: int
    kind: str
    box: np.ndarray | None = None


def find_answer(result: BaseDataElement, label: int | None) -> Answer:
    """Picks from a prediction what Grad-CAM explains.

    Args:
        result: Prediction of a detector, a segmentor or a classifier for one image.
        label: Class to look at; None picks the one that the model is surest of, or that covers most pixels.

    Raises:
        ValueError: The model found no object or pixel of this class, or has another kind of result.
    """
    if 'pred_instances' in result:
        instances = result.pred_instances
        classes = sorted(set(instances.labels.tolist()))
        found = f'objects of the classes {classes}' if classes else 'no object'
        if label is not None:
            instances = instances[instances.labels == label]
        if len(instances):
            best = int(instances.scores.argmax())
            box = instances.bboxes[best].detach().numpy()
            return Answer(instances.scores[best], int(instances.labels[best]), 'score of the best object', box)
    elif 'seg_logits' in result:
        logits = result.seg_logits.data
        classes = logits.argmax(0)
        found = f'pixels of the classes {classes.unique().tolist()}'
        label = int(classes.flatten().bincount().argmax()) if label is None else label
        if (classes == label).any():
            return Answer(logits[label][classes == label].mean(), label, 'mean logit of its pixels')
    elif 'pred_score' in result:
        scores = result.pred_score
        found = f'scores of {len(scores)} classes'
        label = int(scores.argmax()) if label is None else label
        if 0 <= label < len(scores):
            return Answer(scores[label], label, 'score of the image')
    else:
        raise ValueError(f'expected the result of a detector, segmentor or classifier, found {type(result).__name__}')
    raise ValueError(f'expected {"an answer" if label is None else f"an answer of class {label}"}, found {found}')


def grad_cam(model: nn.Module, sample: Sample, label: int | None) -> tuple[list[np.ndarray], Answer]:
    """Computes Grad-CAM at every map of a model's backbone.

    Args:
        model: Model of mmdet, mmseg or mmpretrain in evaluation mode, with weights.
        sample: Its input.
        label: As in `find_answer`.

    Returns:
        A map for each output of the backbone, (H, W) of the model's input, from 0 up, dimensionless; zero where the
        answer does not use the output. And the answer.

    Raises:
        ValueError: As in `find_answer`, or the answer has no gradient.
    """
    from captum.attr import LayerGradCam

    answers = []

    def score(inputs: torch.Tensor) -> torch.Tensor:
        (result,) = model.predict(inputs, sample.data_samples)
        answers.append(find_answer(result, label))
        if not answers[0].score.requires_grad:
            raise ValueError(f'expected an answer with a gradient, found none: {type(model).__name__} detaches it')
        return answers[0].score[None]

    cam = LayerGradCam(score, model.backbone)
    # A proposal that the FPN serves from a deep level leaves the maps before it without a gradient: zeros.
    maps = cam.attribute(sample.inputs, relu_attributions=True, grad_kwargs={'materialize_grads': True})
    size = sample.inputs.shape[2:]
    maps = maps if isinstance(maps, tuple) else (maps,)
    return [interpolate(values, size, mode='bilinear')[0, 0].detach().numpy() for values in maps], answers[0]


def describe(answer: Answer, model: nn.Module) -> str:
    """Returns class, kind and value of an answer as text; the class by its name if the checkpoint holds it."""
    classes = (getattr(model, 'dataset_meta', None) or {}).get('classes', ())
    name = classes[answer.label] if answer.label < len(classes) else f'class {answer.label}'
    return f'{name}: {answer.kind}, {answer.score.item():.3f}'


def draw_cam(sample: Sample, maps: list[np.ndarray], answer: Answer, title: str, path: Path) -> None:
    """Draws the image with the object, if the answer is one, and each map over the image; writes the picture."""
    height, width = sample.image.shape[:2]
    figure = Figure(figsize=(3.2 * (len(maps) + 1), 3 * height / width + 0.9), layout='constrained')
    figure.suptitle(title, fontsize=10)
    axes = figure.subplots(1, len(maps) + 1)
    axes[0].imshow(sample.image)
    axes[0].set_title('image', fontsize=10)
    for index, (axis, values) in enumerate(zip(axes[1:], maps, strict=True)):
        axis.imshow(sample.image)
        picture = axis.imshow(values[:height, :width], cmap='jet', alpha=0.5, vmin=0, vmax=values.max() or 1)
        axis.set_title(f'output {index} of the backbone' + ('' if values.any() else ' (no part)'), fontsize=10)
        figure.colorbar(picture, ax=axis, shrink=0.75).ax.tick_params(labelsize=7)
    for axis in axes:
        if answer.box is not None:
            left, top, right, bottom = answer.box * np.tile(sample.data_samples[0].scale_factor, 2)
            axis.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor='white'))
        axis.tick_params(labelsize=7)
        axis.set_xlabel('column, px', fontsize=8)
    axes[0].set_ylabel('row, px', fontsize=8)
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest='command', required=True)
    states = commands.add_parser('states', help='input, step size, states and observation of blocks')
    states.add_argument(
        '--block', type=int, nargs=2, action='append', metavar=('STAGE', 'BLOCK'),
        help='counted from 0, may be given several times (default: the last of each stage)',
    )  # fmt: skip
    states.add_argument('--channel', type=int, help='inner channel to draw (default: root mean square over all)')
    cam = commands.add_parser('cam', help='Grad-CAM on a detector, segmentor or classifier')
    cam.add_argument('--label', type=int, help='class of the answer, counted from 0')
    for name, command in (('states', states), ('cam', cam)):
        command.add_argument('config', help='config of the model')
        command.add_argument('image', type=Path, help='image file')
        command.add_argument('--checkpoint', required=name == 'cam', help='of the model; without one, random weights')
        command.add_argument(
            '--out',
            type=picture_path,
            default=Path(f'work_dirs/{name}.png'),
            help='picture to write',
        )
    args = parser.parse_args()
    if args.command == 'cam' and importlib.util.find_spec('captum') is None:
        sys.exit('visualize_states: cam needs Captum: pip install captum')

    weights = Path(args.checkpoint).name if args.checkpoint else 'random weights'
    title = f'{Path(args.config).name}, {weights}, {args.image.name}'
    try:
        config = read_config(args.config)
        model = build_model(config, args.checkpoint)
        sample = prepare(config, model, args.image)
        if args.command == 'states':
            blocks = [tuple(block) for block in args.block or last_blocks(model.backbone)]
            records = record_ssm(model.backbone, sample.inputs, blocks)
            check_channel(args.channel, records)
        else:
            maps, answer = grad_cam(model, sample, args.label)
    except (CheckpointError, FileNotFoundError, ValueError) as error:
        sys.exit(f'visualize_states: {error}')

    args.out.parent.mkdir(parents=True, exist_ok=True)
    if args.command == 'states':
        what = 'root mean square over the channels' if args.channel is None else f'channel {args.channel}'
        draw_states(sample, records, args.channel, f'{title}: {what}', args.out)
    else:
        print(describe(answer, model))
        draw_cam(sample, maps, answer, f'{title}\n{describe(answer, model)}', args.out)
    print(f'wrote {args.out}')


def check_channel(channel: int | None, records: dict[tuple[int, int], SSMRecord | ScanRecord]) -> None:
    """Raises a ValueError unless all blocks have this channel."""
    fewest = min(record.u.shape[-1] for record in records.values())
    if channel is not None and not 0 <= channel < fewest:
        raise ValueError(f'expected a channel from 0 to {fewest - 1}, which all blocks have, found {channel}')


if __name__ == '__main__':
    main()
