# Mask R-CNN, Spatial-Mamba-T, 3x. Published: box AP 49.3, mask AP 43.6 on COCO val2017.
_base_ = ['./_base_/mask_rcnn_sm.py', './_base_/coco_3x.py']
