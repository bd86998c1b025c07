"""Parameter names of published Spatial-Mamba checkpoints and of this project, both ways."""

from .table import NameTable

SPATIAL_MAMBA = NameTable(
    pairs=(
        ('patch_embed.conv1', 'stem.reduce'),
        ('patch_embed.conv2.0', 'stem.residual.0'),
        ('patch_embed.conv2.1', 'stem.residual.2'),
        ('patch_embed.conv3.0', 'stem.expand'),
        ('patch_embed.conv3.1', 'stem.project'),
        ('layers.{i}.blocks.{j}.ln_1', 'stages.{i}.blocks.{j}.norm1'),
        ('layers.{i}.blocks.{j}.ln_2', 'stages.{i}.blocks.{j}.norm2'),
        ('layers.{i}.blocks.{j}.self_attention.conv2d', 'stages.{i}.blocks.{j}.ssm.dwconv'),
        ('layers.{i}.blocks.{j}.self_attention.x_proj_weight', 'stages.{i}.blocks.{j}.ssm.x_proj.weight'),
        ('layers.{i}.blocks.{j}.self_attention.dt_projs_weight', 'stages.{i}.blocks.{j}.ssm.dt_weight'),
        ('layers.{i}.blocks.{j}.self_attention.dt_projs_bias', 'stages.{i}.blocks.{j}.ssm.dt_bias'),
        ('layers.{i}.blocks.{j}.self_attention.A_logs', 'stages.{i}.blocks.{j}.ssm.A_log'),
        ('layers.{i}.blocks.{j}.self_attention.Ds', 'stages.{i}.blocks.{j}.ssm.D'),
        ('layers.{i}.blocks.{j}.self_attention.out_norm', 'stages.{i}.blocks.{j}.ssm.norm'),
        (
            'layers.{i}.blocks.{j}.self_attention.state_fusion.kernel_3',
            'stages.{i}.blocks.{j}.ssm.state_fusion.dwconv_d1',
        ),
        (
            'layers.{i}.blocks.{j}.self_attention.state_fusion.kernel_3_1',
            'stages.{i}.blocks.{j}.ssm.state_fusion.dwconv_d3',
        ),
        (
            'layers.{i}.blocks.{j}.self_attention.state_fusion.kernel_3_2',
            'stages.{i}.blocks.{j}.ssm.state_fusion.dwconv_d5',
        ),
        ('layers.{i}.blocks.{j}.self_attention', 'stages.{i}.blocks.{j}.ssm'),
        ('layers.{i}.downsample.conv.0.conv', 'stages.{i}.downsample.expand'),
        ('layers.{i}.downsample.conv.1.conv', 'stages.{i}.downsample.dwconv'),
        ('layers.{i}.downsample.conv.2', 'stages.{i}.downsample.project'),
        ('layers.{i}', 'stages.{i}'),
        ('outnorm{i}', 'out_norms.{i}'),
    ),
    signature=(
        'layers.{i}.blocks.{j}.self_attention.state_fusion.kernel_3_1',
        'stages.{i}.blocks.{j}.ssm.state_fusion.dwconv_d3',
    ),
    stem='stem.reduce.conv.weight',
    classifier_norm='norm',
    classifier_head='head',
)
