# ImageNet-1K, VMamba-B. Published: top-1 83.9 at 224x224.
_base_ = './cls_vmamba_t.py'

model = dict(backbone=dict(arch='base', drop_path_rate=0.6), head=dict(in_channels=1024))
