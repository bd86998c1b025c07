# UPerNet, VMamba-T. Published: mIoU 47.9 (single scale), 48.8 (multi-scale, mmseg's own six) on ADE20K.
_base_ = ['./_base_/upernet_vmamba.py', './_base_/ade20k_160k.py', './_base_/six_scales.py']

tta_pipeline = {{_base_.tta_pipeline_six_scales}}
