# UPerNet, Spatial-Mamba-B. Published: mIoU 51.8 (single scale), 52.6 (multi-scale) on ADE20K.
_base_ = './upernet_sm_t.py'

model = dict(
    backbone=dict(arch='base', drop_path_rate=0.5),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
