# Mask R-CNN, Spatial-Mamba-S, 3x. Published: box AP 50.5, mask AP 44.6 on COCO val2017.
_base_ = './mask_rcnn_sm_t_3x.py'

model = dict(backbone=dict(arch='small', drop_path_rate=0.3))
