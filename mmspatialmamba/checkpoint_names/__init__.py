"""The name table of each backbone, and which one a state dict is of."""

from collections.abc import Iterable

from .spatial_mamba import SPATIAL_MAMBA
from .table import BACKBONE_PREFIX, NameTable
from .vmamba import VMAMBA

TABLES = (SPATIAL_MAMBA, VMAMBA)
"""The table of every backbone of this package."""


def find_table(names: Iterable[str]) -> NameTable | None:
    """Returns the table of the backbone that a state dict with these names holds, under any prefix, or None."""
    names = list(names)
    return next((table for table in TABLES if table.fits(names)), None)


__all__ = ['BACKBONE_PREFIX', 'SPATIAL_MAMBA', 'TABLES', 'VMAMBA', 'NameTable', 'find_table']
