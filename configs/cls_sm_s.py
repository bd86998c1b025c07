# ImageNet-1K, Spatial-Mamba-S. Published: top-1 84.6 at 224x224.
_base_ = './cls_sm_t.py'

model = dict(mesa_weight=1.5, backbone=dict(arch='small', drop_path_rate=0.3))
