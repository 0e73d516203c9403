"""What is detected in a picture."""

from dataclasses import dataclass

from megatron_ext.picture_world.world import PlacedObject


@dataclass(frozen=True)
class DetectedObject(PlacedObject):
    """One detected object; ``explained`` (0 .. 1) is how well the best template fits."""

    explained: float


@dataclass(frozen=True)
class DetectedScene:
    """What a picture shows.

    Attributes:
        background: its color; empty if none is.
        objects: those detected, row by row.
        unknown: number of other things that are no objects; detected in the compositional world alone.
    """

    background: str
    objects: tuple[DetectedObject, ...]
    unknown: int = 0
