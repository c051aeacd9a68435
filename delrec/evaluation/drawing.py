"""Axes and colours of figures. matplotlib is imported where something is drawn: a command that
draws nothing does not load it.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, ORANGE, GREY = "#1f5fa8", "#c8641e", "#777777"
GREEN = "#3f8f5b"


def subplots(
    width: float, height: float, columns: int = 1, rows: int = 1, squeeze: bool = True
) -> tuple["Figure", Any]:
    """(figure, its axes), width and height in inches. squeeze: no array around one axes, no rows
    around one row.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = (width, height)
    return plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=squeeze)
