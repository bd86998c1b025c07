"""Puts a backbone of this package into the config of any detector, segmentor or classifier that has another one.

What the heads expect is measured, not looked up: the former backbone is built without weights and sees one small
image, so every backbone of the toolboxes, mmpretrain and timm is served by the same rule, and only what is no stack of
maps for a neck or head to use is refused, by name.
"""

import copy
import inspect
from collections.abc import Iterator, Sequence
from itertools import combinations
from math import log2

import torch
from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS, DefaultScope

from .config_types import type_name
from .models import Backbone
from .normalization import normalize_as_pretrained
from .registry import MODELS as OWN_MODELS

REFUSED = {
    'UNet': 'its decoder is part of the backbone, and the heads use the maps of the decoder',
    'ICNet': 'it runs parts of its own ResNet on three image sizes',
    'BiSeNetV2': 'detail branch, semantic branch and heads are one network',
    'CGNet': 'its context-guided blocks are the whole network, at strides 2 to 8',
    'ERFNet': 'encoder and decoder are one network, with one map for the head',
    'FastSCNN': 'its branches and their fusion are one network, with one map for the head',
    'PIDNet': 'its three branches and the heads are one network',
    'DDRNet': 'its two branches and the heads are one network',
    'VPD': 'it is a text-conditioned diffusion network',
    'HourglassNet': 'its maps are repeated estimates at one stride, each with a head of its own',
    'TridentResNet': 'its detector needs the three branches of this backbone',
    'RFP': 'this neck feeds its maps back into a second backbone of its own kind',
    'LRASPPHead': 'its pooling of 49x49 pixels needs a deep map at stride 8',
    'DPTHead': 'it needs the class token and the patches of a vision transformer',
    'SparseConvNeXt': 'it is pre-trained on the patches that a mask leaves of an image',
    'SparseResNet': 'it is pre-trained on the patches that a mask leaves of an image',
    'LeNet5': 'it is made for gray digits of 32x32 pixels, which have one position at stride 32',
}
"""Backbones, necks and heads that cannot do with another backbone, and why."""

PYRAMID_NECKS = ('Feature2Pyramid', 'MultiLevelNeck')
"""Necks that only resize maps of one stride to a pyramid, which our maps are already."""

ALL_MAPS = ('BiSeNetV1', 'NASFCOS_FPN')
"""Context paths and necks that want every map by its place and use some of them only."""

LAYER_DECAY = (
    'LayerDecayOptimizerConstructor',
    'LearningRateDecayOptimizerConstructor',
    'LearningRateDecayOptimWrapperConstructor',
    'LayerDecayOptimWrapperConstructor',
)
"""Optimizer constructors of the toolboxes that know the layers of a few backbones, or take a rate for their number.

The last is mmpose's, and this package's own, which has no ``num_layers``.
"""

WEIGHT_AND_BIAS = ('YOLOv5OptimizerConstructor', 'YOLOv7OptimWrapperConstructor')
"""Optimizer constructors of MMYOLO that leave out every parameter which is called neither ``weight`` nor ``bias``."""

TOKEN_HEADS = ('ConformerHead', 'DeiTClsHead')
"""Heads of classifiers that take two vectors of an image."""

MAP_HEADS = ('CSRAClsHead',)
"""Heads of classifiers that pool a map themselves."""

BARE_HEADS = {'ClsHead': 'LinearClsHead', 'MultiLabelClsHead': 'MultiLabelLinearClsHead'}
"""Heads without a layer, since the backbone ends in logits, and those that have one."""

PRETRAINED = ('Pretrained', 'PretrainedInit')
"""Name in the registry, and of the class, of the initializer that loads a checkpoint."""

PROBE_SIZE = 128
"""Height and width of the image that a backbone is measured with: at least two pixels at stride 64."""


def swap_backbone(
    cfg: Config,
    arch: str | dict = 'tiny',
    *,
    backbone: str = 'SpatialMamba',
    drop_path_rate: float = 0.2,
    pretrained: str | None = None,
) -> Config:
    """Returns a config in which a backbone of this package takes the place of its own.

    Each map of the former backbone is replaced by that of a stage: by stride (4, 8, 16, 32), as near as
    possible while the maps stay in order, so the four maps of a dilated ResNet (strides 4, 8, 8, 8) become all four
    stages. Then everything that takes these maps is told their channels: the neck, or without one the heads, nested
    ones too, and their ``strides`` where they state them. In detail:

    - Maps that nothing uses are not returned (``start_level`` of a neck, ``in_index`` of heads), so that no parameter
      stays without a gradient, which distributed training refuses. Where all must be returned (`ALL_MAPS`), the config
      gets ``find_unused_parameters=True``.
    - Necks that resize maps of one stride to a pyramid (`PYRAMID_NECKS`, of vision transformers) are dropped;
      SETR-MLA's neck, which adds maps of one stride, gets a ``MultiLevelNeck`` before it.
    - A two-stage detector without a neck (C4, DC5) gets a 1x1 ``ChannelMapper`` to the former channels as its neck, so
      that its shared head keeps its shape and its weights.
    - Behind a neck of MMPose that selects maps or puts them together, the head states the channels that come of ours.
    - Necks of MMYOLO, which state channels before their ``widen_factor``, state those that they have.
    - Where object-contextual representations (OCR) took two maps of one stride, both heads take both of ours, resized.
    - The backbone inside the context path of BiSeNetV1 and STDC is swapped, the path stays.
    - Of a tracker or a semi-supervised detector, the detector's backbone is swapped. A teacher that averages the
      student's weights averages BatchNorm's statistics too, which the former backbone did not need
      (``MeanTeacherHook``).
    - A classifier gets the last stage's map, pooled. Heads that take the tokens of a vision transformer
      (`TOKEN_HEADS`), or the logits of the backbone (`BARE_HEADS`), become linear ones.
    - What would load weights of the whole former model is removed: ``load_from``, and ``init_cfg`` of type Pretrained
      on the model. Layer-wise learning-rate decay (`LAYER_DECAY`) goes to this package's constructor, with a rate at
      which the stem learns as fast as the former stem. MMYOLO's constructors, which train what is called ``weight`` and
      ``bias`` alone, get one around them that trains the rest too.
    - With ``pretrained``, images are normalized as ImageNet weights expect it, and the log says what changed.

    Everything else stays, the optimizer among it, and without ``pretrained`` the normalization of images. Further
    arguments of the backbone can be set in the result: ``swapped.model.backbone.with_cp = True``.

    Args:
        cfg: Config of a toolbox, as ``Config.fromfile`` returns it. It is not changed.
        arch: ``arch`` of the new backbone.
        backbone: Its name in the registry of this package.
        drop_path_rate: ``drop_path_rate`` of the new backbone.
        pretrained: Checkpoint of the backbone, or None to start from random weights.

    Returns:
        A new config. The backbone has its scoped name, which needs no ``custom_imports``.

    Raises:
        TypeError: ``cfg`` is no ``Config``, or an argument of the backbone has a wrong type.
        ValueError: The model cannot do with another backbone, or how it uses the former one is not understood; the
            message names the part and the reason. Also an argument of the backbone that is not allowed.
    """
    if not isinstance(cfg, Config):
        raise TypeError(f'swap_backbone: cfg must be an mmengine Config, got {type(cfg).__name__}')
    # Not a backbone under another's arguments, such as MM_SpatialMamba.
    known = {name: cls for name, cls in OWN_MODELS.module_dict.items() if 'ARCHITECTURES' in vars(cls)}
    if backbone not in known:
        raise ValueError(f'swap_backbone: backbone must be one of {", ".join(known)}, got {backbone!r}')
    with torch.device('meta'):  # checks the arguments
        new = known[backbone](arch, drop_path_rate=drop_path_rate, pretrained=pretrained)
    cfg = copy.deepcopy(cfg)
    part = _part_with_backbone(cfg)
    _refuse_by_name(part)

    arguments = {'arch': arch, 'drop_path_rate': drop_path_rate, 'pretrained': pretrained}
    with torch.random.fork_rng(devices=()), DefaultScope.overwrite_default_scope(cfg.get('default_scope')):
        _swap_constructor(cfg.get('optim_wrapper') or {}, part.backbone, blocks=sum(new.depths))
        swapped = ConfigDict(type=f'mmspatialmamba.{backbone}', **arguments)
        if type_name(part).endswith('Classifier') and 'in_channels' not in _first_neck(part):
            _swap_in_classifier(part, new, swapped)
        else:
            _swap(part, new, swapped)

    if type_name(part.backbone) in ALL_MAPS or type_name(_first_neck(part)) in ALL_MAPS:
        cfg.find_unused_parameters = True
    for owner in {id(owner): owner for owner in (cfg.model, part)}.values():
        if 'pretrained' in owner:  # of the backbone; segmentors refuse it beside the backbone's own
            owner.pretrained = None
        if owner.get('init_cfg'):
            owner.init_cfg = _without_pretrained(owner.init_cfg)
    if cfg.get('load_from'):
        cfg.load_from = None
    for hook in cfg.get('custom_hooks') or ():
        if type_name(hook) == 'MeanTeacherHook':
            hook.skip_buffer = False
    if pretrained:
        normalize_as_pretrained(cfg, part.backbone.get('backbone_cfg', part.backbone).get('in_channels', 3))
    return cfg


def _without_pretrained(init_cfg: ConfigDict | list[ConfigDict]) -> ConfigDict | list[ConfigDict] | None:
    """Returns what of an ``init_cfg`` sets no weights of the former model."""
    if isinstance(init_cfg, Sequence):
        return [rule for rule in init_cfg if type_name(rule) not in PRETRAINED]
    return None if type_name(init_cfg) in PRETRAINED else init_cfg


def _part_with_backbone(cfg: Config) -> ConfigDict:
    """Returns the model or, of a tracker or a semi-supervised detector, its detector."""
    model = cfg.get('model') or {}
    part = model if 'backbone' in model else model.get('detector') or {}
    if not isinstance(part.get('backbone'), dict) or 'type' not in part.backbone:
        raise ValueError(
            f'swap_backbone: expected a model with a backbone, found {type_name(model) or "none"} with the keys '
            f'{", ".join(model) or "none"}'
        )
    return part


def _refuse_by_name(part: ConfigDict) -> None:
    neck = part.get('neck') or []
    for key, used in [
        ('backbone', part.backbone),
        *(('neck', neck) for neck in (neck if isinstance(neck, Sequence) else [neck])),
        *_heads(part),
    ]:
        if type_name(used) in REFUSED:
            raise ValueError(
                f'swap_backbone: {key} {type_name(used)} cannot be swapped or kept: {REFUSED[type_name(used)]}'
            )


def _swap(part: ConfigDict, backbone: Backbone, swapped: ConfigDict) -> None:
    """Swaps the backbone of ``part`` for one with the config ``swapped``, and tells neck or heads the new maps."""
    path = part.backbone if 'backbone_cfg' in part.backbone else None  # a context path around the backbone
    former_cfg = path.backbone_cfg if path else part.backbone
    maps = _run(former_cfg, _image(former_cfg), 'backbone')
    former, strides = _channels(maps), _strides(maps)
    stages = _stages(strides, backbone.STRIDES, type_name(former_cfg))
    segmentor = 'decode_head' in part
    if not segmentor and any(backbone.STRIDES[i] != stride for i, stride in zip(stages, strides, strict=True)):
        raise ValueError(
            f'swap_backbone: {type_name(former_cfg)} has maps at strides {strides}, {type(backbone).__name__} at '
            f'{backbone.STRIDES}; anchors and points of {type_name(part)} depend on them'
        )
    if len(strides) > 1 == len(set(strides)) and type_name(part.get('neck')) in PYRAMID_NECKS:
        part.neck = None

    _drop_unread_maps(part)
    used = list(range(len(former))) if path else _used_maps(part, former)
    stages = tuple(stages[i] for i in used)
    ours = [backbone.channels[stage] for stage in stages]
    swapped.out_indices = stages
    if former_cfg.get('in_channels', 3) != 3:
        swapped.in_channels = former_cfg.in_channels
    if path:
        path.backbone_cfg = swapped
        _fit_context_path(path, ours)
    else:
        part.backbone = swapped

    neck = _first_neck(part)
    if 'in_channels' in neck:
        _fit_neck(part, neck, former, ours, [strides[i] for i in used], [backbone.STRIDES[i] for i in stages])
    if segmentor:
        swapped = copy.deepcopy(part.backbone)
        shallow = {**backbone.arch, 'depths': (1, 1, 1, 1)}  # has the same channels, and is quick
        swapped.get('backbone_cfg', swapped).arch = shallow
        maps = _run(swapped, _image(swapped), 'backbone')
        if neck:
            maps = _run(part.neck, maps, 'neck')
        own = None if path or neck else used
        _fit_segmentation_heads(part, maps, own, strides)
    elif 'in_channels' not in neck:
        _fit_detection_heads(part, [former[i] for i in used], ours)
    if neck.get('select_index') is not None:
        neck.select_index = tuple(used.index(range(len(former))[i]) for i in _selected(neck))


def _swap_in_classifier(part: ConfigDict, backbone: Backbone, swapped: ConfigDict) -> None:
    """Swaps the backbone of a classifier for ``swapped``; the head takes the pooled map of the last stage."""
    former, head = part.backbone, part.get('head') or ConfigDict()
    last = len(backbone.channels) - 1
    part.backbone = ConfigDict(swapped, out_indices=(last,))
    if former.get('in_channels', 3) != 3:
        part.backbone.in_channels = former.in_channels
    name = type_name(head)
    if name in BARE_HEADS:
        if former.get('num_classes', 0) < 1:
            raise ValueError(f'swap_backbone: head {name} has no layer, and the backbone states no num_classes')
        head.update(type=f'mmpretrain.{BARE_HEADS[name]}', num_classes=former.num_classes, in_channels=0)
    elif name in TOKEN_HEADS:
        kept = {key: head[key] for key in ('num_classes', 'loss', 'topk', 'cal_acc', 'train_cfg') if key in head}
        head = part.head = ConfigDict(type='mmpretrain.LinearClsHead', in_channels=0, **kept)
    if 'in_channels' not in head:
        raise ValueError(f'swap_backbone: {type_name(part)} has no neck or head that states in_channels')
    head.in_channels = backbone.channels[last]
    neck = _first_neck(part)
    pooling = ConfigDict(type='mmpretrain.GlobalAveragePooling')
    if name in MAP_HEADS:
        part.neck = None
    elif type_name(neck) == 'ClsBatchNormNeck':  # norms the pooled vector, for a linear probe
        neck.input_features = backbone.channels[last]
        part.neck = [pooling, neck]
    elif not neck or neck.get('dim', 2) != 2:  # the latter pools tokens
        part.neck = pooling


def _stages(strides: list[int], available: Sequence[int], name: str) -> tuple[int, ...]:
    """Returns a stage for each map: in order, each once, with strides as near as possible."""
    if strides != sorted(strides) or len(strides) > len(available):
        raise ValueError(
            f'swap_backbone: backbone {name} has maps at strides {strides}; expected at most '
            f'{len(available)}, from fine to coarse'
        )

    def distance(stages: tuple[int, ...]) -> float:
        return sum(abs(log2(stride / available[stage])) for stride, stage in zip(strides, stages, strict=True))

    return min(combinations(range(len(available)), len(strides)), key=distance)


def _fit_context_path(path: ConfigDict, ours: list[int]) -> None:
    """Sets the channels inside the context path of STDC or BiSeNetV1, whose last two maps have strides 16 and 32."""
    *_, eighth, sixteenth, last = ours
    if type_name(path) == 'STDCContextPathNet':
        path.last_in_channels = (last, sixteenth)
        path.ffm_cfg.in_channels = eighth + path.get('out_channels', 128)
    elif type_name(path) == 'BiSeNetV1':
        path.context_channels = (eighth, sixteenth, last)
        # The fusion takes both paths together and has as many channels as the context has at stride 16.
        path.spatial_channels = (*path.get('spatial_channels', (64, 64, 64, 128))[:-1], sixteenth - eighth)
    else:
        raise ValueError(
            f'swap_backbone: backbone {type_name(path)} has a backbone_cfg of its own, with an unknown use'
        )


def _drop_unread_maps(part: ConfigDict) -> None:
    """Takes from EncNet's head the maps that it is given and, without lateral connections, does not read."""
    for _, head in _heads(part):
        if type_name(head) == 'EncHead' and not head.get('add_lateral'):
            head.update(in_channels=head.in_channels[-1:], in_index=head.in_index[-1:])


def _used_maps(part: ConfigDict, former: list[int]) -> list[int]:
    """Returns which maps neck or heads use: without the norms of others, no parameter stays without a gradient."""
    every = list(range(len(former)))
    neck = _first_neck(part)
    if type_name(neck) in ALL_MAPS:
        return every
    if 'in_channels' in neck:
        return every[-1:] if isinstance(neck.in_channels, int) else every[neck.get('start_level', 0) :]
    if neck.get('select_index') is not None:
        return sorted(every[i] for i in _selected(neck))
    heads = [head for _, head in _heads(part) if 'in_channels' in head]
    if 'decode_head' not in part:
        last = all(isinstance(head.in_channels, int) and head.in_channels != sum(former) for head in heads)
        return every[-1:] if last else every
    used = {0} if any(head.get('c1_in_channels') for head in heads) else set()
    for head in heads:
        if isinstance(head.in_channels, int):
            used.add(every[head.get('in_index', -1)])
        else:
            used.update(every[i] for i in head.get('in_index', every))
    return sorted(used)


def _selected(neck: ConfigDict) -> Sequence[int]:
    """Returns which maps a ``FeatureMapProcessor`` of MMPose takes."""
    index = neck.select_index
    return (index,) if isinstance(index, int) else index


def _fit_neck(
    part: ConfigDict,
    neck: ConfigDict,
    former: list[int],
    ours: list[int],
    former_strides: list[int],
    strides: list[int],
) -> None:
    """Tells the neck our channels, and that it gets no map below its ``start_level``."""
    if type_name(neck) == 'MLANeck':  # adds maps of one stride
        resize = ConfigDict(
            type='mmseg.MultiLevelNeck',
            in_channels=ours,
            out_channels=former[0],
            scales=[ours_at / former_at for ours_at, former_at in zip(strides, former_strides, strict=True)],
            norm_cfg=neck.get('norm_cfg'),
        )
        part.neck = [resize, neck]
        return
    if 'out_channels' in neck and _widened(neck) == former:
        _widen(part, neck, former, ours)
    dropped = len(former) - len(ours)
    _set_channels(neck, 'neck', former, ours)
    if dropped and 'start_level' in neck:
        neck.start_level -= dropped
        if neck.get('end_level', -1) > 0:
            neck.end_level -= dropped
    if type_name(neck) == 'SSDNeck':  # hands its input on, and adds maps
        neck.out_channels = (*ours, *neck.out_channels[len(ours) :])
        part.bbox_head.in_channels = neck.out_channels


def _widened(neck: ConfigDict) -> list[int] | None:
    """Returns the channels of a neck's inputs if it states them as MMYOLO does, before its ``widen_factor``."""
    if 'widen_factor' not in neck or not isinstance(neck.in_channels, Sequence):
        return None
    return [round(channels * neck.widen_factor) for channels in neck.in_channels]


def _widen(part: ConfigDict, neck: ConfigDict, former: list[int], ours: list[int]) -> None:
    """Lets a neck of MMYOLO state the channels that it has, in place of those before its ``widen_factor``."""
    factor, stated, out = neck.widen_factor, neck.in_channels, neck.out_channels
    neck.in_channels = former
    neck.widen_factor = 1
    if out == stated:  # the layers of such a neck take both to be the same, so its outputs are as wide as our maps
        neck.out_channels = list(ours)
        module = part.bbox_head.head_module
        module.in_channels = [int(channels / module.get('widen_factor', 1)) for channels in ours]
    elif isinstance(out, Sequence):
        neck.out_channels = [round(channels * factor) for channels in out]
    else:
        neck.out_channels = round(out * factor)


def _fit_segmentation_heads(
    part: ConfigDict, maps: list[torch.Tensor], used: list[int] | None, former_strides: list[int]
) -> None:
    """Fits heads that name their maps by ``in_index``.

    Args:
        part: The segmentor.
        maps: What its heads get.
        used: For each of these maps, its index among the former backbone's maps; None if they come from a neck or a
            context path, whose maps keep their indices.
        former_strides: Strides of the former backbone's maps.
    """
    channels, strides = _channels(maps), _strides(maps)
    last = len(maps) - 1
    new_index = {old: new for new, old in enumerate(used or range(len(maps)))}
    for old in list(new_index):
        new_index[old - len(former_strides if used else maps)] = new_index[old]

    heads = list(_heads(part))
    for key, head in heads:
        stated = head.get('in_channels')
        index = head.get('in_index', list(range(len(maps))) if isinstance(stated, Sequence) else last)
        if 'in_index' in head:
            index = new_index[index] if isinstance(index, int) else type(index)(new_index[i] for i in index)
            head.in_index = index
        if isinstance(index, int) and isinstance(stated, int):
            head.in_channels = channels[index]
        elif isinstance(index, Sequence) and isinstance(stated, Sequence):
            head.in_channels = type(stated)(channels[i] for i in index)
            if used and 'strides' in head:
                head.strides = [strides[i] for i in index]
        else:
            raise ValueError(
                f'swap_backbone: {key} {type_name(head)} with in_channels {stated} and in_index {index} is unknown; '
                'expected both to be numbers or both to be sequences'
            )
        if head.get('num_convs') == 0 and head.get('channels') == stated:  # FCNHead: a classifier on the map itself
            head.channels = head.in_channels
        if head.get('c1_in_channels'):  # of DeepLabV3+: the first map, whatever in_index is
            head.c1_in_channels = channels[0]

    if used and any(type_name(head) == 'OCRHead' for _, head in heads):
        _resize_for_ocr(part.decode_head, channels, [former_strides[i] for i in used])


def _resize_for_ocr(heads: list[ConfigDict], channels: list[int], former_strides: list[int]) -> None:
    """Gives both heads of OCR, which compare map and prediction pixel by pixel, the same maps again."""
    indices = sorted({head.in_index for head in heads if isinstance(head.in_index, int)})
    if len(indices) > 1 and len({former_strides[i] for i in indices}) == 1:
        for head in heads:
            head.update(in_index=indices, in_channels=[channels[i] for i in indices], input_transform='resize_concat')


def _fit_detection_heads(part: ConfigDict, former: list[int], ours: list[int]) -> None:
    """Fits the heads of a detector or classifier without a neck; two-stage ones get a neck instead."""
    if 'rpn_head' in part:
        part.neck = ConfigDict(
            type='mmdet.ChannelMapper',
            in_channels=ours,
            out_channels=former[-1],
            kernel_size=1,
            act_cfg=None,
            num_outs=len(ours),
        )
        return
    heads = [(key, head) for key, head in _heads(part) if 'in_channels' in head]
    if not heads:
        raise ValueError(f'swap_backbone: {type_name(part)} has no neck or head that states in_channels')
    for key, head in heads:
        _set_channels(head, key, former, ours)


def _set_channels(user: ConfigDict, key: str, former: list[int], ours: list[int]) -> None:
    """Replaces the former channels in ``in_channels``: all of them in either order or as a sum, or the last."""
    stated = user.in_channels
    if isinstance(stated, int) and stated == former[-1]:
        user.in_channels = ours[-1]
    elif isinstance(stated, int) and stated == sum(former):
        user.in_channels = sum(ours)
    elif isinstance(stated, Sequence) and list(stated) == former:
        user.in_channels = type(stated)(ours)
    elif isinstance(stated, Sequence) and list(stated) == former[::-1]:
        user.in_channels = type(stated)(ours[::-1])
    else:
        raise ValueError(
            f'swap_backbone: {key} {type_name(user)} states in_channels {stated}; expected the channels of the '
            f'backbone, {former}'
        )


def _first_neck(part: ConfigDict) -> ConfigDict:
    """Returns the neck, the first of several, or an empty config."""
    neck = part.get('neck') or ConfigDict()
    return neck[0] if isinstance(neck, Sequence) else neck


def _heads(part: ConfigDict) -> Iterator[tuple[str, ConfigDict]]:
    """Yields key and config of each head that takes maps; of K-Net's head, the one that generates the kernels."""
    for key, value in part.items():
        if key == 'head' or key.endswith('_head'):
            for head in value if isinstance(value, Sequence) else [value]:
                if head:
                    yield key, head.get('kernel_generate_head', head)


def _swap_constructor(optim_wrapper: dict, former: ConfigDict, blocks: int) -> None:
    """Puts this package's constructor in place of one that does not know our layers, or not all of our parameters.

    Layer decay gets a rate that fits our number of blocks.
    """
    rules = optim_wrapper.get('paramwise_cfg') or {}
    if type_name(optim_wrapper, 'constructor') in WEIGHT_AND_BIAS:
        optim_wrapper.paramwise_cfg = ConfigDict(rules, constructor=optim_wrapper.constructor)
        optim_wrapper.constructor = 'mmspatialmamba.WholeModelOptimWrapperConstructor'
        return
    is_ours = 'decay_rate' in rules and 'num_layers' not in rules
    if type_name(optim_wrapper, 'constructor') not in LAYER_DECAY or is_ours:
        return
    rate = rules.get('decay_rate', rules.get('layer_decay_rate'))
    if 'num_layers' in rules:
        layers = rules.num_layers + 2
    else:  # mmpretrain asks the model
        _, layers = _build(former, 'backbone').get_layer_depth('head', 'backbone.')
    optim_wrapper.constructor = 'mmspatialmamba.LayerDecayOptimWrapperConstructor'
    optim_wrapper.paramwise_cfg = ConfigDict(
        decay_rate=rate ** ((layers - 1) / (blocks + 1)),
        # The former constructors exempt all of these from weight decay.
        norm_decay_mult=0.0,
        bias_decay_mult=0.0,
        flat_decay_mult=0.0,
        custom_keys={'A_log': {'decay_mult': 0.0}, 'dt_bias': {'decay_mult': 0.0}},
    )


def _image(backbone: ConfigDict) -> torch.Tensor:
    channels = backbone.get('in_channels', 3)
    return torch.zeros(1, channels if isinstance(channels, int) else 3, PROBE_SIZE, PROBE_SIZE)


def _strides(maps: Sequence[torch.Tensor]) -> list[int]:
    return [PROBE_SIZE // x.shape[-2] for x in maps]


def _channels(maps: Sequence[torch.Tensor]) -> list[int]:
    return [x.shape[1] for x in maps]


@torch.no_grad()
def _run(cfg: ConfigDict | list[ConfigDict], x: torch.Tensor | Sequence[torch.Tensor], key: str) -> list[torch.Tensor]:
    """Builds a backbone or neck without its weights and returns its maps."""
    name = _names(cfg)
    module = _build(cfg, key)
    module.eval()  # of the toolboxes' backbones, returns None
    if {'mask', 'importance'} & set(inspect.signature(module.forward).parameters):
        raise ValueError(
            f'swap_backbone: the {key} {name} is pre-trained on the patches that a mask leaves of an image'
        )
    try:
        maps = module(x)
    except Exception as error:
        raise _not_measured(key, name, error) from error
    if not isinstance(maps, Sequence) or not all(isinstance(x, torch.Tensor) and x.ndim == 4 for x in maps):
        raise ValueError(f'swap_backbone: the {key} {name} does not return maps (N, C, H, W)')
    return list(maps)


def _build(cfg: ConfigDict | list[ConfigDict], key: str) -> torch.nn.Module:
    """Builds a backbone or neck without its weights, for images of the probe's size."""
    name = _names(cfg)
    cfg = copy.deepcopy(cfg)
    for part in cfg if isinstance(cfg, list) else [cfg]:
        for weights in ('init_cfg', 'pretrained'):
            if part.get(weights):
                part[weights] = False if part[weights] is True else None  # True: timm
        if 'img_size' in part:  # some vision transformers take no other
            part.img_size = PROBE_SIZE
    try:
        return MODELS.build(cfg)
    except Exception as error:
        raise _not_measured(key, name, error) from error


def _names(cfg: ConfigDict | list[ConfigDict]) -> str:
    return ' and '.join(map(type_name, cfg)) if isinstance(cfg, list) else type_name(cfg)


def _not_measured(key: str, name: str, error: Exception) -> ValueError:
    return ValueError(f'swap_backbone: cannot measure the maps of the {key} {name}: {type(error).__name__}: {error}')
