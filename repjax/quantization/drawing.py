"""A picture of the sensitivity of layers. Needs matplotlib."""

import io
from collections.abc import Sequence

from matplotlib.figure import Figure

from repjax.quantization.sensitivity import Sensitivity

_FLOAT, _INT8 = "#D55E00", "#0072B2"  # two colors of Okabe and Ito, as in all pictures


def picture(
  rows: Sequence[Sensitivity], left_in_float: Sequence[str] = (), title: str = ""
) -> bytes:
  """Draws a bar for each layer, as PNG.

  Args:
    rows: layers in the order in which they are drawn, from the top.
    left_in_float: nodes that stay in float, which are drawn in a different color.
    title: title of the figure.
  """
  figure = Figure((9, 1.3 + 0.28 * len(rows)), dpi=100, layout="constrained")
  axes = figure.subplots()
  colors = [_FLOAT if row.node in left_in_float else _INT8 for row in rows]
  errors = [100 * row.error for row in rows]
  bars = axes.barh(range(len(rows)), errors, color=colors)
  notes = [
    f"{row.error:.2%}" + (f", {row.changed:.1%} of images change class" if row.changed else "")
    for row in rows
  ]
  axes.bar_label(bars, notes, padding=3, fontsize=8)
  axes.set_yticks(range(len(rows)), [row.layer for row in rows], fontsize=8)
  axes.invert_yaxis()
  axes.set_xlim(0, 1.45 * max(errors, default=0) or 1)
  axes.set_xlabel("error of the logits with this layer alone in int8, %", fontsize=9)
  axes.tick_params(axis="x", labelsize=8)
  axes.spines[["top", "right"]].set_visible(False)
  figure.suptitle(title, fontsize=11, fontweight="bold")
  if left_in_float:
    handles = [axes.barh(0, 0, color=color) for color in (_INT8, _FLOAT)]
    axes.legend(handles, ["int8", "left in float32"], loc="lower right", fontsize=8)
  content = io.BytesIO()
  figure.savefig(content, format="png", dpi=100, metadata={"Software": None})
  return content.getvalue()
