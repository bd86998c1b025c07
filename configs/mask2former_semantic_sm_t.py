# Mask2Former for semantic segmentation of ADE20K with Spatial-Mamba-T. No published result. The optimizer is
# Mask2Former's own. Its pixel decoder is mmdet's, so mmdet has to be installed beside mmseg.
_base_ = __import__('mmseg').__path__[0] + '/.mim/configs/mask2former/mask2former_r50_8xb2-160k_ade20k-512x512.py'

custom_imports = dict(imports=['mmspatialmamba', 'mmdet.models'], allow_failed_imports=False)

model = dict(
    backbone=dict(_delete_=True, type='mmspatialmamba.SpatialMamba', arch='tiny', drop_path_rate=0.2, pretrained=None),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
)
