# ImageNet-1K, Spatial-Mamba-T. Published: top-1 83.5 at 224x224.
_base_ = './_base_/cls_sm.py'
