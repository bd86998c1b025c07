"""`VMamba` under the name and with the arguments of the original code, so that its configs run as they are."""

from collections.abc import Sequence

from mmengine.registry import MODELS as ROOT_MODELS

from ..registry import MODELS
from .original_arguments import BuiltIn, first_width, take_arguments
from .vmamba import VMamba

GENERATION = 'the second generation of VMamba has it, and the first is another network'
BUILT_IN = {
    'ssm_d_state': BuiltIn((1,), GENERATION, default=16),
    'ssm_dt_rank': BuiltIn(('auto',), 'the rank of the step size is a sixteenth of the channels'),
    'ssm_act_layer': BuiltIn(('silu',), 'SiLU comes after the depthwise convolution'),
    'ssm_conv': BuiltIn((3,), 'the depthwise convolution is 3x3'),
    'ssm_conv_bias': BuiltIn((False,), GENERATION, default=True),
    'ssm_drop_rate': BuiltIn((0,), 'there is no dropout beside drop path'),
    'ssm_init': BuiltIn(('v0',), 'step sizes are drawn as in the published models'),
    'forward_type': BuiltIn(('v05_noz',), GENERATION, default='v2'),
    'mlp_ratio': BuiltIn((4,), 'the MLP of a block has four times its channels'),
    'mlp_act_layer': BuiltIn(('gelu',), 'the MLP has a GELU'),
    'mlp_drop_rate': BuiltIn((0,), 'there is no dropout beside drop path'),
    'gmlp': BuiltIn((False,), 'the MLP has no gate'),
    'patch_norm': BuiltIn((True,), 'the stem has norms'),
    'patch_size': BuiltIn((4,), 'the stem has stride 4'),
    'norm_layer': BuiltIn(('ln', 'ln2d'), 'blocks and outputs have LayerNorm'),
    'downsample_version': BuiltIn(('v3',), GENERATION, default='v2'),
    'patchembed_version': BuiltIn(('v2',), GENERATION, default='v1'),
    'posembed': BuiltIn((False,), 'there is no position embedding'),
}
"""Arguments of the original that are no choice here. Where its default is another one, they have to be given."""


@ROOT_MODELS.register_module(name='MM_VSSM')
@MODELS.register_module(name='MM_VSSM')
class MMVSSM(VMamba):
    """`VMamba` with the arguments of the original repository's ``MM_VSSM``.

    New configs should use `VMamba`, which refuses what it does not know. Here, keys of an inherited Swin or ResNet are
    listed in a warning and have no effect, as in the original.

    Args:
        out_indices: As in `VMamba`.
        pretrained: Checkpoint of the backbone; None or an empty text for none. Unlike in the original, a file that is
            missing or does not match raises.
        dims: Channels of the first stage, or of all four, each twice the one before.
        depths: Number of blocks of each of the four stages.
        ssm_ratio: Inner channels of a state space model for each channel of its map; a whole number.
        drop_path_rate: As in `VMamba`.
        in_chans: Number of image channels.
        use_checkpoint: Whether blocks are computed again in backward to save memory.
        frozen_stages: As in `VMamba`.
        norm_eval: As in `VMamba`.
        with_cp: As ``use_checkpoint``.
        init_cfg: As in `VMamba`.
        imgsize: Without effect: images have any size.
        num_classes: Without effect: a backbone has no classifier.
        **others: Arguments with the value that is built in (`BUILT_IN`), and keys left over from an inherited backbone
            (`mmspatialmamba.models.original_arguments.WITHOUT_EFFECT`).

    Raises:
        TypeError: An argument is unknown.
        ValueError: An argument has another value than the one that is built in, or was not given and has another
            default in the original.
    """

    def __init__(
        self,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        pretrained: str | None = None,
        dims: int | Sequence[int] = 96,
        depths: Sequence[int] = (2, 2, 9, 2),
        ssm_ratio: float = 2.0,
        drop_path_rate: float = 0.1,
        in_chans: int = 3,
        use_checkpoint: bool = False,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        init_cfg: dict | list[dict] | None = None,
        imgsize: int = 224,
        num_classes: int = 1000,
        **others,
    ):
        ours = {'frozen_stages': frozen_stages, 'norm_eval': norm_eval, 'with_cp': with_cp, 'init_cfg': init_cfg}
        ours = take_arguments('MM_VSSM', BUILT_IN, others, ours)
        ours['with_cp'] |= use_checkpoint
        width = first_width('MM_VSSM', dims, len(self.STRIDES))
        ratio = int(ssm_ratio) if ssm_ratio == int(ssm_ratio) else ssm_ratio
        super().__init__(
            arch={'embed_dims': width, 'depths': tuple(depths), 'ssm_ratio': ratio},
            in_channels=in_chans,
            out_indices=out_indices,
            drop_path_rate=drop_path_rate,
            pretrained=pretrained or None,
            **ours,
        )
