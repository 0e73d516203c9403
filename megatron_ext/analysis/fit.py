"""How a quantity grows with the model: a + b ln N by least squares, N the parameters of the dense model."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from scipy.special import stdtr, stdtrit

from megatron_ext.analysis.statistics import LEVEL, Estimate


@dataclass(frozen=True)
class Fit:
    """A line through the values of one method at several sizes.

    Attributes:
        a: the line at N = 1.
        b: the change as N grows e-fold; its interval is Student's, from the distances of all values to the line.
        parameters: parameters of the sizes, ascending.
        residual: root mean square distance of the values from the line.
    """

    a: float
    b: Estimate
    parameters: tuple[int, ...]
    residual: float

    def at(self, parameters) -> np.ndarray:
        """The line at these parameters."""
        return self.a + self.b.mean * np.log(parameters)

    def as_json(self) -> dict:
        return asdict(self)


def fit(parameters: Sequence[int], values: Sequence[Sequence[float]]) -> Fit | None:
    """The line through the values of every seed, or None for fewer than two different sizes.

    Args:
        values: for each size, a value per seed.
    """
    points = [(n, value) for n, of_size in zip(parameters, values) for value in of_size]
    sizes = sorted({n for n, _ in points})
    if len(sizes) < 2:
        return None
    x, y = np.log([n for n, _ in points]), np.array([value for _, value in points])
    centred = x - x.mean()
    b = float(centred @ y / (centred @ centred))  # in closed form: np.polyfit leaves rounding errors at slopes of 0
    a = float(y.mean() - b * x.mean())
    squares, freedom = float(np.sum((y - a - b * x) ** 2)), len(points) - 2
    estimate = Estimate(b, None, None, LEVEL, len(points), None)
    if freedom and squares:
        error = float(np.sqrt(squares / freedom / (centred @ centred)))
        half_width = float(stdtrit(freedom, (1 + LEVEL) / 2)) * error
        p = float(2 * stdtr(freedom, -abs(b) / error))
        estimate = Estimate(b, b - half_width, b + half_width, LEVEL, len(points), p)
    return Fit(a, estimate, tuple(sizes), float(np.sqrt(squares / len(points))))
