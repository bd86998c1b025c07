# Mask R-CNN, Spatial-Mamba-B, 1x. Published: box AP 50.4, mask AP 45.1 on COCO val2017.
_base_ = './mask_rcnn_sm_t.py'

model = dict(backbone=dict(arch='base', drop_path_rate=0.5), neck=dict(in_channels=[96, 192, 384, 768]))
