# Poses with MMPose: a heatmap head on the last map of Spatial-Mamba-T, COCO; the recipe of ResNet-50 with AdamW.
_base_ = [
    'mmpose::body_2d_keypoint/topdown_heatmap/coco/td-hm_res50_8xb64-210e_coco-256x192.py',
    '../_base_/no_decay.py',
]

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmspatialmamba.SpatialMamba',
        arch='tiny',
        out_indices=(3,),
        drop_path_rate=0.2,
        pretrained=None,
    ),
    head=dict(in_channels=512),
)

optim_wrapper = dict(
    _delete_=True,
    optimizer=dict(type='AdamW', lr=5e-4, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg={{_base_.no_decay}},
)
