# UPerNet, Spatial-Mamba-T. Published: mIoU 48.6 (single scale), 49.4 (multi-scale) on ADE20K.
_base_ = ['./_base_/upernet_sm.py', './_base_/ade20k_160k.py']
