"""Modules that configs can name."""

from .backbone import Backbone
from .spatial_mamba import SpatialMamba

__all__ = ['Backbone', 'SpatialMamba']
