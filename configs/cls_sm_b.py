# ImageNet-1K, Spatial-Mamba-B. Published: top-1 85.3 at 224x224.
_base_ = './cls_sm_t.py'

model = dict(mesa_weight=2.0, backbone=dict(arch='base', drop_path_rate=0.5), head=dict(in_channels=768))
