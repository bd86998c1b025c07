# Cascade Mask R-CNN, Spatial-Mamba-T, 3x. No published result.
_base_ = ['./_base_/cascade_mask_rcnn_sm.py', './_base_/coco_3x.py']
