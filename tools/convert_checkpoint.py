"""Converts checkpoints between the published names and this project's, or takes a part of one.

Example:
    python tools/convert_checkpoint.py published.pth checkpoints/spatial_mamba_t.pth

writes ``checkpoints/spatial_mamba_t-1a2b3c4d.pth``, where the eight digits begin the SHA-256 of the file. Names of a
detector's or segmentor's heads stay as they are, and published classification files become those of an mmpretrain
``ImageClassifier``. No value changes: ``--names official`` gives the names and tensors of the published file again.
Published files load without conversion too; this tool is for sharing weights, and for

    --backbone           the backbone of a detector, segmentor or classifier alone
    --weights ema        weights that were averaged in training (EMA)
    --in-channels 4      images of another number of channels: more keep the kernels of their first channels, the others
                         get the mean kernel; fewer get the mean kernel each. All are scaled by old / new number of
                         channels, so that an image whose channels are equal gives the response that it gave before
    --bgr                images that come as blue, green, red (and others), as cv2 reads them, where the weights expect
                         red, green, blue

What training stores beside the weights is left out, except the meta data of a whole model.
"""

import argparse
import hashlib
import io
import json
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from mmspatialmamba.checkpoint import NOTES, CheckpointError, get_weights, read, unwrap
from mmspatialmamba.checkpoint_names import BACKBONE_PREFIX, TABLES, NameTable


class ConversionError(ValueError):
    """A checkpoint does not hold what was asked for."""


def select_weights(checkpoint: dict, kind: str | None) -> dict:
    """Returns the averaged weights of a checkpoint, or those that were trained.

    MMEngine's EMAHook stores the averaged weights under ``state_dict``, and then the trained ones under
    ``ema_state_dict``. The original project stores the trained weights under ``model``, the averaged ones under
    ``model_ema``.

    Args:
        checkpoint: Content of a file.
        kind: 'ema', 'trained', or None for what loading the file gives.

    Raises:
        ConversionError: The file does not hold these weights.
    """
    if kind == 'ema' and 'ema_state_dict' not in checkpoint:
        if 'model_ema' not in checkpoint:
            raise ConversionError(
                f'expected averaged weights (key ema_state_dict or model_ema), found only {", ".join(checkpoint)}'
            )
        return checkpoint['model_ema']
    if kind == 'trained' and 'ema_state_dict' in checkpoint:
        prefix = 'module.'
        states = checkpoint['ema_state_dict'].items()
        return {name.removeprefix(prefix): value for name, value in states if name.startswith(prefix)}
    return unwrap(get_weights(checkpoint))


def rename_backbone(weights: dict, rename: Callable[[str, object], tuple[str, object]]) -> OrderedDict:
    """Renames what lies under ``backbone.`` in the state dict of a whole model; the rest stays, metadata too."""

    def renamed(entries: dict) -> OrderedDict:
        result = OrderedDict()
        for name, value in entries.items():
            if name.startswith(BACKBONE_PREFIX):
                name, value = rename(name.removeprefix(BACKBONE_PREFIX), value)
                name = BACKBONE_PREFIX + name
            result[name] = value
        return result

    result = renamed(weights)
    if hasattr(weights, '_metadata'):  # versions of the modules, by which heads recognize old names
        result._metadata = renamed(weights._metadata)
    return result


def find_table(weights: dict) -> NameTable:
    """Returns the names of the backbone that a state dict holds, alone or under ``backbone.``.

    Raises:
        ConversionError: It holds no backbone of this package, or a relative of one.
    """
    for table in TABLES:
        relative = table.find_relative(weights)
        if relative is not None:
            raise ConversionError(relative)
        if any(table.is_official(weights, prefix) or table.is_own(weights, prefix) for prefix in ('', BACKBONE_PREFIX)):
            return table
    raise ConversionError(
        f'expected the weights of a backbone of mmspatialmamba, under own or published names, found '
        f'{", ".join(list(weights)[:3])}'
    )


def to_own_names(weights: dict, table: NameTable) -> OrderedDict:
    """Gives a state dict own names: that of a whole model, of a published classifier, or of a backbone alone."""
    classifier = table.is_classifier(weights)

    def to_own(name: str, value: object) -> tuple[str, object]:
        name = table.to_own(name, classifier)
        return name, table.to_own_value(name, value)

    if classifier:
        renamed = ((table.to_toolbox(name), value) for name, value in weights.items())
        weights = {name: table.to_own_value(name, value) for name, value in renamed}
    if any(name.startswith(BACKBONE_PREFIX) for name in weights):
        return rename_backbone(weights, to_own)
    return OrderedDict(to_own(*entry) for entry in weights.items())


def to_official_names(weights: dict, table: NameTable) -> OrderedDict:
    """Gives a state dict with own names the published ones: the inverse of `to_own_names`."""
    classifier = is_classifier(weights)

    def to_official(name: str, value: object) -> tuple[str, object]:
        return table.to_official(name, classifier), table.to_official_value(name, value)

    if classifier:
        return OrderedDict(to_official(table.from_toolbox(name), value) for name, value in weights.items())
    if any(name.startswith(BACKBONE_PREFIX) for name in weights):
        return rename_backbone(weights, to_official)
    return OrderedDict(to_official(*entry) for entry in weights.items())


def is_classifier(weights: dict) -> bool:
    """Whether a state dict with own names has a classifier's head and nothing else beside the backbone."""
    others = [name for name in weights if not name.startswith(BACKBONE_PREFIX)]
    return 0 < len(others) < len(weights) and all(name.startswith(f'{NameTable.TOOLBOX_HEAD}.') for name in others)


def extract_backbone(weights: dict) -> OrderedDict:
    """Returns the backbone's part of a state dict, under the names that the backbone alone has."""
    if not any(name.startswith(BACKBONE_PREFIX) for name in weights):
        return OrderedDict(weights)
    return OrderedDict(
        (name.removeprefix(BACKBONE_PREFIX), value)
        for name, value in weights.items()
        if name.startswith(BACKBONE_PREFIX)
    )


def adapt_stem(kernel: torch.Tensor, in_channels: int, bgr: bool = False) -> torch.Tensor:
    """Gives the first convolution another number of image channels.

    More channels keep the kernels of the first ones, and each further channel gets their mean; fewer channels get the
    mean each. All are scaled by old / new number of channels, so that their sum, which is the response to an image with
    equal channels, stays as it is.

    Args:
        kernel: (out_channels, channels, 3, 3).
        in_channels: New number of channels.
        bgr: Whether the first three channels come in the reverse order.

    Returns:
        (out_channels, in_channels, 3, 3).

    Raises:
        ConversionError: ``bgr`` is asked for, and there are not three channels whose order can be reversed.
    """
    channels = kernel.shape[1]
    if bgr:
        if channels != 3 or in_channels < 3:
            raise ConversionError(
                f'--bgr: expected a stem of 3 channels and at least 3 new ones, found {channels} and {in_channels}'
            )
        kernel = kernel.flip(1)
    if in_channels == channels:
        return kernel.contiguous()
    mean = kernel.mean(1, keepdim=True)
    kept = kernel if in_channels > channels else kernel[:, :0]
    added = mean.expand(-1, in_channels - kept.shape[1], -1, -1)
    return torch.cat((kept, added), dim=1) * (channels / in_channels)


def convert(
    checkpoint: dict,
    names: str = 'own',
    kind: str | None = None,
    backbone: bool = False,
    in_channels: int | None = None,
    bgr: bool = False,
) -> dict:
    """Converts the content of a checkpoint file.

    Args:
        checkpoint: Content, as `mmspatialmamba.checkpoint.read` gives it.
        names: 'own' or 'official'.
        kind: Weights to take, see `select_weights`.
        backbone: Whether to keep the backbone alone.
        in_channels: Number of image channels of the result; None keeps it.
        bgr: Whether the stem is to take blue, green, red.

    Returns:
        Content for a file: the weights, and the meta data of a whole model if there are any.

    Raises:
        ConversionError: The checkpoint does not hold what is asked for.
    """
    weights = select_weights(checkpoint, kind)
    table = find_table(weights)
    weights = to_own_names(weights, table)
    if in_channels is not None or bgr:
        stem = table.stem if table.stem in weights else BACKBONE_PREFIX + table.stem
        weights[stem] = adapt_stem(weights[stem], in_channels or weights[stem].shape[1], bgr)
    if backbone:
        weights = extract_backbone(weights)
    key = 'model' if names == 'official' and is_classifier(weights) else 'state_dict'
    if names == 'official':
        weights = to_official_names(weights, table)
    meta = {} if backbone or 'meta' not in checkpoint else {'meta': checkpoint['meta']}
    return {**meta, key: weights}


def to_pickle(checkpoint: dict) -> bytes:
    """Returns the content of a ``.pth`` file."""
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    return buffer.getvalue()


def to_safetensors(checkpoint: dict) -> bytes:
    """Returns the content of a ``.safetensors`` file, which holds the meta data and the modules' versions as JSON.

    Raises:
        ConversionError: The checkpoint holds what such a file cannot.
    """
    try:
        from safetensors.torch import save as serialize
    except ModuleNotFoundError as error:
        raise ConversionError(f'expected the package safetensors, which writes such files: {error}') from error

    def plain(value: object) -> object:
        if isinstance(value, np.ndarray | np.generic):
            return value.tolist()
        if isinstance(value, Path):
            return str(value)
        raise ConversionError(f'expected meta data that JSON can hold, found a {type(value).__name__}: write .pth')

    weights = get_weights(checkpoint)
    for name, value in weights.items():
        if not isinstance(value, torch.Tensor):
            raise ConversionError(f'expected tensors only, found a {type(value).__name__} as {name}: write .pth')
    notes = {'meta': checkpoint['meta']} if 'meta' in checkpoint else {}
    if hasattr(weights, '_metadata'):  # by which heads recognize old names
        notes['versions'] = weights._metadata
    # One entry alone: their order in the file is not fixed.
    entry = {NOTES: json.dumps(notes, default=plain)} if notes else {'format': 'pt'}
    return serialize({name: value.clone().contiguous() for name, value in weights.items()}, entry)


def save(checkpoint: dict, target: Path) -> Path:
    """Writes a checkpoint to ``target`` with the first eight digits of the file's SHA-256 added to its name.

    Equal contents give equal files: nothing of the name or the date goes into them.
    """
    content = to_safetensors(checkpoint) if target.suffix == '.safetensors' else to_pickle(checkpoint)
    path = target.with_name(f'{target.stem}-{hashlib.sha256(content).hexdigest()[:8]}{target.suffix}')
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + '.partial')
    partial.write_bytes(content)
    partial.replace(path)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('source', help='checkpoint to read')
    parser.add_argument('target', type=Path, help='file to write, .pth or .safetensors; the hash is added to its name')
    parser.add_argument('--names', choices=('own', 'official'), default='own', help='names to write (default own)')
    parser.add_argument('--weights', choices=('ema', 'trained'), help='which weights; by default those that load')
    parser.add_argument('--backbone', action='store_true', help='write the backbone alone')
    parser.add_argument('--in-channels', type=int, metavar='N', help='number of image channels to write')
    parser.add_argument('--bgr', action='store_true', help='reverse the order of the first three image channels')
    args = parser.parse_args()
    if args.target.suffix not in ('.pth', '.safetensors'):
        parser.error(f'argument target: expected a name that ends in .pth or .safetensors, got {args.target}')
    if args.in_channels is not None and args.in_channels < 1:
        parser.error(f'argument --in-channels: expected at least 1, got {args.in_channels}')
    try:
        source = read(args.source, map_location='cpu')
        result = convert(source, args.names, args.weights, args.backbone, args.in_channels, args.bgr)
        path = save(result, args.target)
    except ConversionError as error:
        sys.exit(f'{args.source}: {error}')
    except (FileNotFoundError, CheckpointError) as error:
        sys.exit(str(error))
    print(f'wrote {path}: {len(get_weights(result))} tensors under {args.names} names')


if __name__ == '__main__':
    main()
