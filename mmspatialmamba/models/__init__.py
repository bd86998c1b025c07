"""Modules that configs can name, and their fused form."""

from .backbone import Backbone
from .fused import fuse, unfuse
from .mm_spatial_mamba import MMSpatialMamba
from .mm_vssm import MMVSSM
from .spatial_mamba import SpatialMamba
from .vmamba import VMamba

__all__ = ['MMVSSM', 'Backbone', 'MMSpatialMamba', 'SpatialMamba', 'VMamba', 'fuse', 'unfuse']
