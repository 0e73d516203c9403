"""Texts with images between their sentences, as MMC4 describes them.

A record has ``text_list``, sentences, and ``image_info``, a list of ``{"image_name", "matched_text_index", ...}``. Each
image stands before the sentence that it is matched with. The document holds context text and given images alone, so its
task is ``interleaved`` and all its text is learnt (``data/rendering.py``).
"""

from megatron_ext.data.format import IMAGE, TEXT
from megatron_ext.preprocess.samples import ReadOptions, Sample
from megatron_ext.preprocess.tar_members import ImageFolder, exists

MOST_IMAGES = 6
"""Images of a document that are used: the first of ``image_info`` that are kept and there."""


def is_interleaved(record: dict) -> bool:
    """Whether a record is such a text with images."""
    return "text_list" in record and "image_info" in record


def interleaved_sample(name: str, record: dict, folder: ImageFolder, options: ReadOptions) -> Sample:
    """The sample of such a record. Filters apply to the entries of ``image_info``; images that are not there are left
    out.

    Raises:
        ValueError: the record is malformed; names the key.
    """
    sentences, entries = record["text_list"], record["image_info"]
    if not isinstance(sentences, list) or not all(isinstance(sentence, str) for sentence in sentences):
        raise ValueError("'text_list' is not a list of strings")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError("'image_info' is not a list of objects")
    if not entries:
        return Sample(name, unusable="holds no image")
    kept = [entry for entry in entries if options.keeps(entry)]
    if not kept:
        return Sample(name, filtered=True)
    placed = [(_sentence(entry, len(sentences)), folder.find(_image_name(entry))) for entry in kept]
    there = [(index, image) for index, image in placed if exists(image)]
    missing = len(placed) - len(there)
    if not there:
        return Sample(name, unusable=f"none of its {missing} images is there", missing=missing)
    segments, text = [], []
    for number, sentence in enumerate(sentences):
        images = [(IMAGE, image) for index, image in there[:MOST_IMAGES] if index == number]
        if images:
            segments += [(TEXT, " ".join(text)), *images]
            text = []
        text += [sentence.strip()] if sentence.strip() else []
    segments.append((TEXT, " ".join(text)))
    return Sample(name, tuple(part for part in segments if part[1]), required_mode=TEXT, missing=missing)


def _image_name(entry: dict) -> str:
    if not isinstance(entry.get("image_name"), str):
        raise ValueError("'image_info' has an entry without an 'image_name'")
    return entry["image_name"]


def _sentence(entry: dict, sentences: int) -> int:
    index = entry.get("matched_text_index")
    if type(index) is not int or not 0 <= index < sentences:
        raise ValueError(f"'matched_text_index' is {index!r}, but 'text_list' has {sentences} sentences")
    return index
