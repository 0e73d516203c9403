"""The plan: the role of every class of token in every layer.

The only module that knows methods by name. Layers ask for roles and never for a method.
"""

from dataclasses import dataclass
from enum import IntEnum

from megatron_ext.errors import UserError
from megatron_ext.token_classes import Modality, Task


class Role(IntEnum):
    """What a token does in a layer.

    FULL: query, key, value, FFN; its hidden state is updated. KV_ONLY: gives a key and a value, and leaves the layer
    unchanged. SKIP: takes no part.
    """

    FULL = 0
    KV_ONLY = 1
    SKIP = 2


PRESETS = ("dense",)


@dataclass(frozen=True)
class Plan:
    """Role of (layer, task, modality), for every layer of a model.

    Attributes:
        name: the preset's name.
        num_layers: number of layers, counted from 0.
    """

    name: str
    num_layers: int

    @classmethod
    def preset(cls, name: str, num_layers: int) -> "Plan":
        """The plan called ``name`` for a model of ``num_layers`` layers.

        Raises:
            UserError: there is no such preset.
        """
        if name not in PRESETS:
            raise UserError(f"config: 'plan.preset' is {name!r}, must be one of {', '.join(PRESETS)}")
        return cls(name, num_layers)

    def role(self, layer: int, task: Task, modality: Modality) -> Role:
        """What tokens of this task and modality do in ``layer`` (0-based)."""
        return Role.FULL
