"""Which layers are on which pipeline stage: even, or as ``parallel.layout`` says, in Megatron-Core's notation.

``"Et*7|t*9|t*9|t*7L"`` are four chunks: the embedding and 7 layers, twice 9 layers, 7 layers and the output head with
the loss. Chunk c is on stage c mod P. ``(x)*n`` repeats, commas mean nothing: ``"E,(t|)*3,t,L"``.
"""

import re
from collections.abc import Sequence
from itertools import accumulate

from megatron_ext.errors import UserError

_KEY = "config: 'parallel.layout'"


def layers_of_chunks(layout: str) -> list[int]:
    """The number of layers of each chunk of the model in a layout string.

    Raises:
        UserError: the string has other letters than E, t and L, not the embedding first and the loss last, or a chunk
            without a layer.
    """
    chunks = _unrolled(layout).split("|")
    text = "".join(chunks)
    if unknown := sorted(set(text) - set("EtL")):
        raise UserError(
            f"{_KEY} is {layout!r}: {unknown[0]!r} is not E (embedding), t (a layer) or L (loss); "
            f"write for example {layout_string([7, 9, 9, 7])!r}"
        )
    if not (text.startswith("E") and text.endswith("L") and text.count("E") == text.count("L") == 1):
        raise UserError(f"{_KEY} is {layout!r}, must begin with E (embedding) and end with L (loss), each once")
    counts = [chunk.count("t") for chunk in chunks]
    if 0 in counts:
        raise UserError(
            f"{_KEY} is {layout!r}: chunk {counts.index(0)} has no layer; give each of the {len(counts)} at least one"
        )
    return counts


def layout_string(counts: Sequence[int]) -> str:
    """The layout string of chunks with so many layers each."""
    chunks = ["t" if n == 1 else f"t*{n}" for n in counts]
    return "E" + "|".join(chunks) + "L"


def even_counts(num_layers: int, chunks: int) -> list[int]:
    """Layers of each chunk, as equal as can be; the first chunks have one more."""
    size, more = divmod(num_layers, chunks)
    return [size + (n < more) for n in range(chunks)]


def stage_layers(num_layers: int, pipeline: int, virtual: int = 1, layout: str = "") -> list[list[int]]:
    """Numbers of the layers of each pipeline stage, chunk after chunk.

    Args:
        layout: ``parallel.layout``; empty: the same number in each of the ``pipeline * virtual`` chunks.
    """
    counts = layers_of_chunks(layout) if layout else [num_layers // (pipeline * virtual)] * (pipeline * virtual)
    ends = list(accumulate(counts))
    return [
        [n for end, size in list(zip(ends, counts))[stage::pipeline] for n in range(end - size, end)]
        for stage in range(pipeline)
    ]


def _unrolled(layout: str) -> str:
    """The layout without commas and repetitions, exactly as Megatron-Core 0.16.1 to 0.19 unrolls it."""
    layout = layout.replace(",", "")
    for pattern in (r"\(([^)]+)\)\*(\d+)", r"(.)\*(\d+)"):
        layout = re.sub(pattern, lambda match: match[1] * int(match[2]), layout)
    return layout
