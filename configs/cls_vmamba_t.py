# ImageNet-1K, VMamba-T. Published: top-1 82.6 at 224x224.
_base_ = './_base_/cls_vmamba.py'
