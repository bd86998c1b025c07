# UPerNet, VMamba-B. Published: mIoU 51.0 (single scale), 51.6 (multi-scale, mmseg's own six) on ADE20K.
_base_ = './upernet_vmamba_t.py'

model = dict(
    backbone=dict(arch='base', drop_path_rate=0.6),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
