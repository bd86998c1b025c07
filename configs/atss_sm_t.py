# ATSS (one-stage) with Spatial-Mamba-T, 1x. No published result.
_base_ = ['mmdet::atss/atss_r50_fpn_1x_coco.py', './_base_/no_decay.py']

custom_imports = dict(imports=['mmspatialmamba'], allow_failed_imports=False)

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmspatialmamba.SpatialMamba',
        arch='tiny',
        out_indices=(1, 2, 3),
        drop_path_rate=0.2,
        pretrained=None,
    ),
    # The neck's R50 begins at the second of four maps: here the first is not computed at all.
    neck=dict(in_channels=[128, 256, 512], start_level=0),
)
optim_wrapper = dict(
    _delete_=True,
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg={{_base_.no_decay}},
)
