# A classifier with VMamba-T.
_base_ = './imagenet_300e.py'

model = dict(
    type='ImageClassifier',
    backbone=dict(type='mmspatialmamba.VMamba', arch='tiny', out_indices=(3,), drop_path_rate=0.2),
    head=dict(in_channels=768),
)
