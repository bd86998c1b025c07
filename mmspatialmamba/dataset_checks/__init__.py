"""What can be wrong with a data set, found before anything is trained: `tools/check_dataset.py` puts it together.

For tools alone: training and evaluation do not need it, and ``import mmspatialmamba`` leaves it out.
"""

from .classes import check_classes
from .coco import check_coco, read_coco
from .findings import ERROR, NOTE, WARNING, Finding, Findings, listed
from .images import FileForm, ImageChecks, check_network_input, find_annotations, read_form
from .label_maps import LabelMapChecks, check_folders

__all__ = [
    'ERROR',
    'NOTE',
    'WARNING',
    'FileForm',
    'Finding',
    'Findings',
    'ImageChecks',
    'LabelMapChecks',
    'check_classes',
    'check_coco',
    'check_folders',
    'check_network_input',
    'find_annotations',
    'listed',
    'read_coco',
    'read_form',
]
