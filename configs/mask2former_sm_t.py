# Mask2Former for instance segmentation with Spatial-Mamba-T. No published result. The optimizer is Mask2Former's own.
_base_ = 'mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco.py'

custom_imports = dict(imports=['mmspatialmamba'], allow_failed_imports=False)

model = dict(
    backbone=dict(_delete_=True, type='mmspatialmamba.SpatialMamba', arch='tiny', drop_path_rate=0.2, pretrained=None),
    panoptic_head=dict(in_channels=[64, 128, 256, 512]),
)
