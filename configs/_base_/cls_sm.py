# A classifier with Spatial-Mamba-T, trained with MESA as the published runs were.
_base_ = './imagenet_300e.py'

model = dict(
    type='mmspatialmamba.mesa.MESAImageClassifier',
    # From a quarter of the epochs on, the criterion against the EMA model's softmax is added with this weight.
    mesa_weight=1.0,
    backbone=dict(type='mmspatialmamba.SpatialMamba', arch='tiny', out_indices=(3,), drop_path_rate=0.2),
    head=dict(in_channels=512),
)

default_hooks = dict(mesa=dict(type='mmspatialmamba.mesa.MESAHook', begin_epoch=75))
