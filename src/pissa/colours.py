"""The colours of every figure and page."""

from __future__ import annotations

INK, GRID = "#1b1f24", "#d7dbe0"
"""The colour of text and axes, and that of the grid, in a picture on white."""
FAINT = "#b9c4d3"
"""Single values behind their mean."""
LIGHT = ("#0d4eae", "#d95015", "#338b6f", "#7c3370", "#484c14", "#3597ed", "#2c263c")
"""Seven colours that people with any colour vision tell apart, on white."""
DARK = ("#6289f6", "#f9630d", "#33cea4", "#ba71a5", "#ecc618", "#b8d9fe", "#fffae0")
"""The same on black."""
