"""Images and text to data sets of unified tokens; resumable, and split over many machines.

::

    units.py        input files -> units of work (a shard takes some of them) -> samples (samples.py), read by
                    webdataset.py (tars, folders), energon.py, llava.py (lists), jsonl.py (lines, also compressed)
    records.py      a JSON record -> a sample, of captions and filters by key (record_fields.py), of images in folders
                    and tars (tar_members.py), of texts with images (interleaved.py)
    parts.py        samples -> parts of fixed size: text tokenised, each image listed once
    encoding.py     a part -> VQ codes: files read ahead, decoded ahead (dali_decoder.py or Pillow), encoded
    store.py        a part -> a small data set under PREFIX.parts/, complete or absent
                    all parts -> PREFIX.bin, .idx, .json
    pipeline.py     all of these, from options to files
    verification.py checking a finished data set

The batches that the VQ model encodes depend only on the inputs and the options, so work that is repeated after a
restart, or on another machine, gives the same bytes.

recipe.py and picture_world.py make the whole preparation of the picture world, from scenes to data sets.

This package imports its members on first use: a complete preparation is recognized without torch.
"""

from megatron_ext.lazy_members import lazy_members

_HOMES = {
    "PreprocessOptions": "pipeline",
    "merge_shards": "pipeline",
    "preprocess": "pipeline",
    "skipped_file": "store",
    "verify_data_set": "verification",
}
__all__ = list(_HOMES)
__getattr__ = lazy_members(__name__, _HOMES)
