"""From data sets on disk to the same packed batch on every rank.

::

    format.py                  PREFIX.bin .idx .json: documents of text, image and answer sequences; metadata
    source.py                  opens a data set for a task and checks it
        |
        v   sample n -> (source, epoch, document, caption dropped?)
    mixture.py                 a pure function of (seed, n); weights kept exactly; every document once per epoch;
                               caption dropout
        |
        v   samples -> rows
    packing.py packed_rows.py  a pure function of the row number; whole documents, best fit, little padding
        |
        v   rows of a step -> those of a replica, micro-batch after micro-batch
    step_rows.py composition.py     neighbours, or rows of equal work (row_contents.py); any number of replicas
        |
        v   documents -> packed tokens, by task
    rendering.py packed_tokens.py   one int32 a token: id, loss, modality, task, first of its document
        |
        v   worker processes, ahead of training: a Batch (batch.py), and what ``prepare`` makes of it
    workers.py                 as one buffer (serialization.py)
        |
        v   through memory shared with the trainer
    dali_loader.py | plain_loader.py    the same steps, bit for bit
        |
        v   one reader per replica, one broadcast per step; one copy to the device (transfer.py)
    step_loader.py             the same step on every tensor- and pipeline-parallel rank (rank_info.py)

A trainer needs two calls. To resume, it needs only the number of the next step, under any number of replicas::

    mixture = build_mixture(config.data.train, config.data, vocabulary, train=True)    # build.py
    print(mixture.tree(rows=iterations * global_batch_size, row_length=config.data.sequence_length))
    steps = step_batches(mixture, config.data, global_batch_size, start_step, prepare=...)
    for step in steps: ...

``PackedRows(mixture, 512)[7]`` is row 7 alone.

This package imports its members on first use, because the worker processes must not import torch.
"""

from megatron_ext.lazy_members import lazy_members

_HOMES = {
    "build_mixture": "build",
    "step_batches": "step_loader",
    "Mixture": "mixture",
    "PackedRows": "packed_rows",
    "Batch": "batch",
}
__all__ = list(_HOMES)
__getattr__ = lazy_members(__name__, _HOMES)
