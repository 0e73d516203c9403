"""From data sets on disk to the same packed batch on every rank.

::

    PREFIX.bin .idx .json       format.py       documents: sequences of text, image, answer; metadata
            |
            v   sample n -> (source, epoch, document, caption dropped?)
        mixture.py              a pure function of (seed, n); weights kept exactly; every document once per epoch
            |
            v   samples -> rows
        packing.py packed_rows.py   a pure function of the row number; whole documents, best fit, little padding
            |
            v   documents -> tokens, by task
        rendering.py packed_tokens.py   one int32 a token: id, loss, modality, task, first of its document
            |
            v   ahead of training, in worker processes: a Batch (decoding.py, batch.py), and what a step needs of it
        workers.py              as one buffer (serialization.py)
            |
            v   through memory shared with the trainer
        dali.py | loader.py     the same steps, bit for bit
            |
            v   one reader per replica, one broadcast per step; one copy to the device (transfer.py)
        distribute.py           the same on every tensor- and pipeline-parallel rank

A trainer needs two calls, and to resume it needs the number of the next step, under any number of replicas::

    mixture = build_mixture(config.data.train, config.data, vocabulary, train=True)
    print(mixture.tree(rows=iterations * global_batch_size, row_length=config.data.sequence_length))
    steps = step_batches(mixture, config.data, global_batch_size, start_step, prepare=...)
    for step in steps: ...

and to look at row 7 alone: ``PackedRows(mixture, 512)[7]``.

Importing this package is cheap; what is named above is imported when it is asked for, because the worker processes
must not wait for torch. What they make of a step's rows is up to ``prepare``; without it, it is their Batch.
"""

import importlib

_HOMES = {
    "build_mixture": "distribute",
    "step_batches": "distribute",
    "Mixture": "mixture",
    "PackedRows": "packed_rows",
    "Batch": "batch",
}
__all__ = list(_HOMES)


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
