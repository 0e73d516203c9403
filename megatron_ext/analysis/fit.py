"""How synergy loss grows with the model: loss = a + b ln N by least squares, N the parameters of the dense model.

In closed form: np.polyfit solves by SVD, which leaves rounding errors where a slope is exactly 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_ext.analysis.bootstrap import interval


@dataclass(frozen=True)
class Fit:
    """A line through the losses of one method at several sizes.

    Attributes:
        a, b: [1 + replicates], a fit to each replicate of the losses; b is the change as N grows e-fold.
        parameters: parameters of the sizes, ascending.
        residual: root mean square distance of the losses from the line; 0 by construction for two sizes.
    """

    a: np.ndarray
    b: np.ndarray
    parameters: tuple[int, ...]
    residual: float

    def at(self, parameters) -> np.ndarray:
        """The loss on the line at these parameters, without replicates."""
        return self.a[0] + self.b[0] * np.log(parameters)

    def as_json(self) -> dict:
        return {
            "a": float(self.a[0]),
            "a_interval": interval(self.a),
            "b": float(self.b[0]),
            "b_interval": interval(self.b),
            "parameters": list(self.parameters),
            "residual": self.residual,
        }


def fit(parameters: Sequence[int], losses: Sequence[np.ndarray]) -> Fit | None:
    """The line through the losses, or None for fewer than two different sizes.

    Args:
        losses: [1 + replicates] for each size.
    """
    points = [(n, loss) for n, loss in sorted(zip(parameters, losses), key=lambda p: p[0]) if np.isfinite(loss[0])]
    if len({n for n, _ in points}) < 2:
        return None
    x = np.log([n for n, _ in points])
    y = np.array([loss for _, loss in points])  # [sizes, 1 + replicates]
    centred = x - x.mean()
    b = centred @ y / (centred @ centred)
    a = y.mean(axis=0) - b * x.mean()
    residual = float(np.sqrt(np.mean((y[:, 0] - a[0] - b[0] * x) ** 2)))
    return Fit(a, b, tuple(n for n, _ in points), residual)
