# Mask R-CNN, VMamba-S, 3x. Published: box AP 49.9, mask AP 44.2 on COCO val2017.
_base_ = './mask_rcnn_vmamba_t_3x.py'

model = dict(backbone=dict(arch='small', drop_path_rate=0.3))
