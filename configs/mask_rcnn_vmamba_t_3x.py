# Mask R-CNN, VMamba-T, 3x. Published: box AP 48.8, mask AP 43.7 on COCO val2017.
_base_ = ['./_base_/mask_rcnn_vmamba.py', './_base_/coco_3x.py']
