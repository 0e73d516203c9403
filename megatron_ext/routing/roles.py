"""Roles, the classes of tokens that have them, and the numbers of layers in a configuration."""

import re
from enum import IntEnum

from megatron_ext.errors import UserError
from megatron_ext.token_classes import Modality, Task


class Role(IntEnum):
    """What a token does in a layer.

    FULL: query, key, value, FFN; its hidden state is updated. KV_ONLY: only its key and value are computed; its hidden
    state stays unchanged. SKIP: takes no part.
    """

    FULL = 0
    KV_ONLY = 1
    SKIP = 2


CLASSES = (
    (Task.UNDERSTANDING, Modality.IMAGE),
    (Task.UNDERSTANDING, Modality.TEXT),
    (Task.GENERATION, Modality.TEXT),
    (Task.GENERATION, Modality.IMAGE),
    (Task.TEXT, Modality.TEXT),
)
"""The classes of tokens in training data, in document order. Images in documents of the text task are legal too, and
FULL unless a table says otherwise."""


def class_index(task: Task, modality: Modality) -> int:
    """Index of a class of token; also accepts arrays and tensors of tasks and modalities."""
    return task * len(Modality) + modality


def task_and_modality(index: int) -> tuple[Task, Modality]:
    """Task and modality of a class of token by its index, in any of a plan's tables."""
    task, modality = divmod(index % (len(Task) * len(Modality)), len(Modality))
    return Task(task), Modality(modality)


def class_indices(task: str, modality: str) -> list[int]:
    """The classes of an entry; ``all`` stands for every task or modality."""
    tasks = Task if task == "all" else [Task[task.upper()]]
    modalities = Modality if modality == "all" else [Modality[modality.upper()]]
    return [class_index(t, m) for t in tasks for m in modalities]


def layer_numbers(text: str, key: str, num_layers: int) -> list[int]:
    """Layers of an entry: ``all``, or numbers and ranges such as ``0,2-4,6-`` (to the last), both ends included."""
    if text == "all":
        return list(range(num_layers))
    layers = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(-?)\s*(\d*)\s*", part)
        if not match or (match[3] and not match[2]):
            raise UserError(f"config: '{key}' is {text!r}; write all, or layers and ranges such as 0,2-4,6-")
        first = checked_layer(int(match[1]), key, num_layers)
        last = first if not match[2] else checked_layer(int(match[3]), key, num_layers) if match[3] else num_layers - 1
        if last < first:
            raise UserError(f"config: '{key}' is {text!r}; the range {part.strip()} runs backwards")
        layers += range(first, last + 1)
    return layers


def checked_layer(layer: int, key: str, num_layers: int) -> int:
    """The number of a layer that the model has."""
    if not 0 <= layer < num_layers:
        raise UserError(f"config: '{key}' names layer {layer}; the model has layers 0 .. {num_layers - 1}")
    return layer
