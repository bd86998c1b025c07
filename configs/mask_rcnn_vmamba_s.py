# Mask R-CNN, VMamba-S, 1x. Published: box AP 48.7, mask AP 43.7 on COCO val2017.
_base_ = './mask_rcnn_vmamba_t.py'

model = dict(backbone=dict(arch='small', drop_path_rate=0.3))
