"""Images and text to data sets of unified tokens, restartable and cut for many machines.

::

    inputs.plan     input files -> units of work         } a shard takes some of the units
    inputs.read     a unit      -> samples               (WebDataset tar, LLaVA JSON, JSONL)
    parts           samples     -> parts: so many samples, text tokenised, each image listed once
    encoding        a part      -> read ahead, decoded ahead (DALI, or Pillow), encoded by the VQ model
    store           a part      -> a small data set under PREFIX.parts/, there whole or not at all
    store.join      all parts   -> PREFIX.bin, .idx, .json

The batches that the VQ model sees depend only on the inputs and the options. So what is done again after a
restart, or by another machine, gives the same bytes.
"""

from megatron_ext.preprocess.check import check
from megatron_ext.preprocess.run import Options, merge_shards, preprocess
from megatron_ext.preprocess.store import skipped_file

__all__ = ["Options", "check", "merge_shards", "preprocess", "skipped_file"]
