# Mask R-CNN, VMamba-B, 1x. Published: box AP 49.2, mask AP 44.1 on COCO val2017.
_base_ = './mask_rcnn_vmamba_t.py'

model = dict(backbone=dict(arch='base', drop_path_rate=0.6), neck=dict(in_channels=[128, 256, 512, 1024]))
