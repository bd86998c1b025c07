# Mask R-CNN with Spatial-Mamba, 1x: the published recipe (arXiv 2410.15091), 16 images a step on 8 GPUs x 2.
_base_ = 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'

custom_imports = dict(imports=['mmspatialmamba'], allow_failed_imports=False)

model = dict(
    backbone=dict(
        _delete_=True,
        type='SpatialMamba',
        arch='tiny',
        out_indices=(0, 1, 2, 3),
        drop_path_rate=0.2,
        # The published runs start from ImageNet-1K weights, which have to be downloaded by hand (see the README):
        # --cfg-options model.backbone.pretrained=checkpoints/FILE
        pretrained=None,
    ),
    neck=dict(in_channels=[64, 128, 256, 512]),
)

optim_wrapper = dict(
    _delete_=True,
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    # No decay on norms, biases and other 1-D parameters (D, step bias, alpha); A_log is 2-D, so it needs its name.
    paramwise_cfg=dict(
        norm_decay_mult=0.0,
        bias_decay_mult=0.0,
        flat_decay_mult=0.0,
        custom_keys={'A_log': dict(decay_mult=0.0)},
    ),
)

param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=1000),
    dict(type='MultiStepLR', by_epoch=True, begin=0, end=12, milestones=[8, 11], gamma=0.1),
]

auto_scale_lr = dict(base_batch_size=16)
