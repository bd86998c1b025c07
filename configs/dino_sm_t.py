# DINO with four scales and Spatial-Mamba-T, 12 epochs. No published result. The optimizer is DINO's own: AdamW, a tenth
# of the learning rate for the backbone.
_base_ = 'mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py'

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
    neck=dict(in_channels=[128, 256, 512]),
)

auto_scale_lr = dict(enable=False, base_batch_size=16)  # the base lacks enable, which --auto-scale-lr asks for
