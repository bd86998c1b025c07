"""Modules that configs can name, and their fused form."""

from .fused import fuse, unfuse
from .spatial_mamba import SpatialMamba

__all__ = ['SpatialMamba', 'fuse', 'unfuse']
