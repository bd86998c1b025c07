# Mask R-CNN, Spatial-Mamba-S, 1x. Published: box AP 49.2, mask AP 44.0 on COCO val2017.
_base_ = './mask_rcnn_sm_t.py'

model = dict(backbone=dict(arch='small', drop_path_rate=0.3))
