"""What is detected in a picture."""

from dataclasses import dataclass

from megatron_ext.picture_world.world import PlacedObject


@dataclass(frozen=True)
class DetectedObject(PlacedObject):
    """One detected object; ``explained`` (0 .. 1) is how well the best template fits."""

    explained: float


@dataclass(frozen=True)
class DetectedScene:
    """The detected background color and objects, row by row."""

    background: str
    objects: tuple[DetectedObject, ...]
