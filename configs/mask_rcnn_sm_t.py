# Mask R-CNN, Spatial-Mamba-T, 1x. Published: box AP 47.6, mask AP 42.9 on COCO val2017.
_base_ = ['./_base_/mask_rcnn_sm.py', './_base_/coco_1x.py']
