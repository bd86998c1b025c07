# SegFormer's head with Spatial-Mamba-T on ADE20K. No published result.
_base_ = [
    __import__('mmseg').__path__[0] + '/.mim/configs/segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py',
    './_base_/no_decay.py',
]

custom_imports = dict(imports=['mmspatialmamba'], allow_failed_imports=False)

model = dict(
    backbone=dict(_delete_=True, type='mmspatialmamba.SpatialMamba', arch='tiny', drop_path_rate=0.2, pretrained=None),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
)
optim_wrapper = dict(
    _delete_=True,
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=6e-5, betas=(0.9, 0.999), weight_decay=0.01),
    paramwise_cfg={{_base_.no_decay}},
)

auto_scale_lr = dict(enable=False, base_batch_size=16)  # 8 GPUs x 2
