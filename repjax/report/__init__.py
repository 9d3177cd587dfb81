"""Pictures of runs: curves, speed, and what branches contribute to kernels.

`history` and `branches` read the folder of a run. `curves` and `kernels` draw what was read,
`figure` lays the panels out, and `picture` writes report.png. Only the last step needs matplotlib.
"""

from repjax.report.picture import draw_at_end, write_report

__all__ = ["draw_at_end", "write_report"]
