# UPerNet, VMamba-S. Published: mIoU 50.6 (single scale), 51.2 (multi-scale, mmseg's own six) on ADE20K.
_base_ = './upernet_vmamba_t.py'

model = dict(backbone=dict(arch='small', drop_path_rate=0.3))
