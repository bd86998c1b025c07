# Mask R-CNN with VMamba-T.
_base_ = 'mmdet::_base_/models/mask-rcnn_r50_fpn.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmspatialmamba.VMamba',
        arch='tiny',
        out_indices=(0, 1, 2, 3),
        drop_path_rate=0.2,
        # The published runs start from ImageNet-1K weights:
        # --cfg-options model.backbone.pretrained=vmamba://cls_vmamba_t
        pretrained=None,
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
