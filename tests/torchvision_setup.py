"""Makes torchvision importable for mmpretrain, the one toolbox that needs it; import this before mmpretrain.

`make env` puts torchvision into a folder of its own: the build on PyPI is for CUDA, and where torch is a CPU build it
cannot be imported without the schemas of its two missing operators.
"""

import importlib.util
import sys
from pathlib import Path

import torch

if importlib.util.find_spec('torchvision') is None:
    sys.path.append(str(Path(sys.prefix) / 'torchvision'))
if torch.version.cuda is None:
    LIBRARY = torch.library.Library('torchvision', 'DEF')
    for name in ('nms', 'qnms'):
        LIBRARY.define(f'{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')
