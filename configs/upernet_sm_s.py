# UPerNet, Spatial-Mamba-S. Published: mIoU 50.6 (single scale), 51.4 (multi-scale) on ADE20K.
_base_ = './upernet_sm_t.py'

model = dict(backbone=dict(arch='small', drop_path_rate=0.3))
