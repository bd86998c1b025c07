# UPerNet with VMamba-T for ADE20K's 150 classes. mmseg's file is named by path, see ade20k_160k.py.
_base_ = __import__('mmseg').__path__[0] + '/.mim/configs/_base_/models/upernet_swin.py'

model = dict(
    data_preprocessor=dict(size=(512, 512)),
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
    decode_head=dict(in_channels=[96, 192, 384, 768], num_classes=150),
    auxiliary_head=dict(in_channels=384, num_classes=150),
)
