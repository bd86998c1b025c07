# upernet_sm_b.py with mmseg's own six scales in place of the published three, for mim test --tta.
_base_ = ['./upernet_sm_b.py', './_base_/six_scales.py']

tta_pipeline = {{_base_.tta_pipeline_six_scales}}
