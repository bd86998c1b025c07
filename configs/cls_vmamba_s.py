# ImageNet-1K, VMamba-S. Published: top-1 83.6 at 224x224.
_base_ = './cls_vmamba_t.py'

model = dict(backbone=dict(arch='small', drop_path_rate=0.3))
