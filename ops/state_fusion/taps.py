"""Where the 25 taps of the state fusion are."""

DILATIONS = (1, 3, 5)
RADIUS = max(DILATIONS)
TAP_OFFSETS = ((0, 0), *((d * y, d * x) for d in DILATIONS for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0)))
"""Offsets (rows, columns) of the 25 distinct taps: the centre, then the eight neighbours of each dilation."""
