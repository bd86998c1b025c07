"""Modules that configs can name."""

from .mm_spatial_mamba import MMSpatialMamba
from .spatial_mamba import SpatialMamba

__all__ = ['MMSpatialMamba', 'SpatialMamba']
