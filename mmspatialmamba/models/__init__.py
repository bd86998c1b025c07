"""Modules that configs can name."""

from .backbone import Backbone
from .mm_spatial_mamba import MMSpatialMamba
from .spatial_mamba import SpatialMamba

__all__ = ['Backbone', 'MMSpatialMamba', 'SpatialMamba']
