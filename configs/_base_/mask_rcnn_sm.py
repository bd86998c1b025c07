# Mask R-CNN with Spatial-Mamba-T.
_base_ = 'mmdet::_base_/models/mask-rcnn_r50_fpn.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmspatialmamba.SpatialMamba',
        arch='tiny',
        out_indices=(0, 1, 2, 3),
        drop_path_rate=0.2,
        # The published runs start from ImageNet-1K weights (pip install "gdown>=6.5"):
        # --cfg-options model.backbone.pretrained=spatialmamba://cls_sm_t
        pretrained=None,
    ),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
