"""The backbones of this package, each with a small model and the files that its original code wrote of it."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from mmspatialmamba import SpatialMamba, VMamba
from mmspatialmamba.checkpoint_names import SPATIAL_MAMBA, VMAMBA, NameTable
from mmspatialmamba.models import Backbone

DATA = Path(__file__).parent / 'data'


@dataclass(frozen=True)
class Family:
    """A backbone and golden files of it (tests/data/README.md).

    Attributes:
        backbone: The class.
        names: Its table of names.
        files: What the names of its golden files begin with.
        arch: Architecture of the golden files.
        tensors: Number of entries of this architecture's state dict.
    """

    backbone: type[Backbone]
    names: NameTable
    files: str
    arch: dict
    tensors: int

    @property
    def classification(self) -> str:
        """Path of the file in the layout of published classifiers."""
        return str(DATA / f'{self.files}_classification.pth')

    @property
    def detector(self) -> str:
        """Path of the file in the layout of published detectors and segmentors."""
        return str(DATA / f'{self.files}_detector.pth')

    @property
    def outputs(self) -> str:
        """Path of the file with images, outputs and gradients."""
        return str(DATA / f'{self.files}_outputs.pth')

    def build(self, **arguments) -> Backbone:
        """Returns the small model."""
        return self.backbone(self.arch, **arguments)


DEPTHS = (1, 1, 2, 1)
FAMILIES = (
    Family(SpatialMamba, SPATIAL_MAMBA, 'official_small', {'embed_dims': 16, 'depths': DEPTHS}, 206),
    Family(VMamba, VMAMBA, 'vmamba_small', {'embed_dims': 16, 'depths': DEPTHS, 'ssm_ratio': 2}, 118),
    Family(VMamba, VMAMBA, 'vmamba_small_s1', {'embed_dims': 12, 'depths': DEPTHS, 'ssm_ratio': 1}, 118),
)
"""Both kinds of inner width of VMamba, of which the first stands for it where one is enough."""

each_family = pytest.mark.parametrize('family', FAMILIES[:2], ids=lambda family: family.backbone.__name__)
each_golden_set = pytest.mark.parametrize('family', FAMILIES, ids=lambda family: family.files)
