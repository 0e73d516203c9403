"""Which rows of a step share a replica and a micro-batch."""

import numpy as np

from megatron_ext.data.composition import rise_and_fall, shares_of, spread

COMPOSITIONS = ("in order", "composed", "cheap ends")


def compose(name: str, flops: np.ndarray, replicas: int, micro_batch_size: int) -> list[list[np.ndarray]]:
    """The numbers of the rows of each micro-batch of each replica.

    Args:
        name: of :data:`COMPOSITIONS`. "cheap ends" is what ``data.composition=balanced`` does; "composed" leaves out
            its last step, cheap micro-batches first and last.
        flops: [rows, parts].
    """
    costs = flops.sum(1).astype(np.int64)
    shares = shares_of(len(costs), replicas)
    if name == "in order":
        ends = np.cumsum(shares)
        own = [np.arange(end - share, end) for end, share in zip(ends, shares)]
        return [np.array_split(rows, -(-len(rows) // micro_batch_size)) for rows in own]
    step = []
    for rows in map(np.sort, spread(costs, shares)):
        bins = [
            rows[members] for members in spread(costs[rows], [micro_batch_size] * -(-len(rows) // micro_batch_size))
        ]
        if name == "cheap ends":
            bins = [bins[place] for place in rise_and_fall([costs[members].sum() for members in bins])]
        else:
            bins.sort(key=min)
        step.append(bins)
    return step
