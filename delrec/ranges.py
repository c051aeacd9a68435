"""What the numbers of the command line may be."""

import math
from typing import Any

import click


class Number(click.FloatRange):
    """A number in a range: nan and inf, which click takes, are none."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """The number; a sentence where there is none, or not in the range."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is no number; give one, such as .5", param, ctx)
        return number


WHOLE = click.IntRange(1)  # 1, 2, 3, ..
FROM_0 = Number(0)
ABOVE_0 = Number(0, min_open=True)
