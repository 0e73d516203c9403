"""Images and text to data sets of unified tokens; resumable, and split over many machines.

::

    units.py        input files -> units of work (a shard takes some of them) -> samples (samples.py), read by
                    webdataset.py, llava.py, jsonl.py
    parts.py        samples -> parts of fixed size: text tokenised, each image listed once
    encoding.py     a part -> VQ codes: files read ahead, decoded ahead (dali_decoder.py or Pillow), encoded
    store.py        a part -> a small data set under PREFIX.parts/, complete or absent
                    all parts -> PREFIX.bin, .idx, .json
    pipeline.py     all of these, from options to files
    verification.py checking a finished data set

The batches that the VQ model encodes depend only on the inputs and the options, so work that is repeated after a
restart, or on another machine, gives the same bytes.
"""

from megatron_ext.preprocess.pipeline import PreprocessOptions, merge_shards, preprocess
from megatron_ext.preprocess.store import skipped_file
from megatron_ext.preprocess.verification import verify_data_set

__all__ = ["PreprocessOptions", "merge_shards", "preprocess", "skipped_file", "verify_data_set"]
