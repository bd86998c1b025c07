"""Whole models as ONNX files: what a detector does after its network, written so that it can be exported.

One file holds one family of heads: `dense` and `two_stage`; `detector` joins them to a computation from picture to
detections, `operators` defines the two ops that they need, `refusals` says what cannot be exported. ``import
mmspatialmamba`` leaves all of it out.
"""
