# Mask R-CNN, VMamba-T, 1x. Published: box AP 47.3, mask AP 42.7 on COCO val2017.
_base_ = ['./_base_/mask_rcnn_vmamba.py', './_base_/coco_1x.py']
