"""Reading data sets in the layout of Megatron Energon: WebDataset tars below a folder with ``.nv-meta/``.

::

    .nv-meta/.info.json     (or .info.yaml) the tars
    .nv-meta/split.yaml     which of them are train, val and test; tars and samples to leave out
    .nv-meta/dataset.yaml   the type of the samples, and the file of a sample (``jpg``, ``json[0][q]``) for each field,
                            or a Python function that makes the fields (``sample_loader``)

A ``sample_loader`` is called as Energon does, but with an :class:`.ImageFile` in place of each image's pixels. Crude
data sets have no type: their samples are read as those of any WebDataset tar.
"""

import importlib.util
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from itertools import islice
from pathlib import Path

import yaml
from braceexpand import braceexpand

from megatron_ext.data.format import IMAGE, TEXT
from megatron_ext.errors import UserError
from megatron_ext.preprocess import webdataset
from megatron_ext.preprocess.samples import ImageFile, ReadOptions, Sample, Unit, make_sample, naming_errors
from megatron_ext.preprocess.webdataset import Member
from megatron_ext.vq.image_decoder import IMAGE_SUFFIXES

FOLDER = ".nv-meta"

CRUDE = "Crude"
"""Type of a data set whose samples Energon leaves to the program."""

_ACCESS = re.compile(r"([^\[\]]+)((?:\[[^\[\]]+\])*)")
_TEXT_ENDINGS, _NUMBER_ENDINGS = ("txt", "text", "transcript"), ("cls", "class", "count", "index", "id")


def is_data_set(folder: Path) -> bool:
    """Whether a folder has Energon's layout."""
    return (folder / FOLDER).is_dir()


def units(folder: Path, split_part: str) -> Iterator[Unit]:
    """Each tar of a part of the split (train, val, test) as one unit.

    Raises:
        UserError: the metadata is missing or malformed, or has no such part.
    """
    _kind(folder)
    split = _metadata(folder, "split.yaml", "split.json")
    parts = split.get("split_parts") or {}
    if not parts.get(split_part):
        raise UserError(f"{folder / FOLDER}/split.yaml: no tar in part '{split_part}', only {', '.join(parts)}")
    excluded = _excluded(folder)
    for name in (name for pattern in parts[split_part] for name in braceexpand(pattern)):
        if name not in excluded:
            try:
                yield Unit(folder / name, (folder / name).stat().st_size, data_set=folder)
            except OSError as error:
                raise UserError(f"{folder / name}: {error.strerror}") from None


def read(unit: Unit, options: ReadOptions, skip: int) -> Iterator[Sample]:
    """The samples of a unit from sample ``skip`` on.

    Raises:
        UserError: the tar is damaged, or a sample lacks a field of its type.
    """
    kind, excluded = _kind(unit.data_set), _excluded(unit.data_set)
    shard = unit.file.relative_to(unit.data_set)
    with naming_errors(str(unit.file)):
        for key, members in islice(webdataset.grouped(unit.file), skip, None):
            name, size = f"{unit.file}:{key}", sum(member.size for member in members)
            with naming_errors(name):
                if f"{shard}/{key}" in excluded:
                    sample = Sample(name, filtered=True)
                elif kind == CRUDE:
                    sample = webdataset.sample_of(name, members, options)
                else:
                    parts = {_ending(member): member for member in members}
                    sample = _SAMPLES[kind](name, _loader(unit.data_set)(parts), options)
                yield replace(sample, bytes=size)


def _metadata(folder: Path, *names: str) -> dict:
    """The first of these files that is there."""
    file = next((file for name in names if (file := folder / FOLDER / name).is_file()), None)
    if file is None:
        raise UserError(f"{folder / FOLDER / names[0]}: not found; energon prepare makes it")
    try:
        content = yaml.safe_load(file.read_text())  # JSON is YAML
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{file}: {str(error).splitlines()[0]}") from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: not a mapping")
    return content


@cache
def _excluded(folder: Path) -> frozenset[str]:
    """Tars, and samples as TAR/KEY, that the split leaves out."""
    split = _metadata(folder, "split.yaml", "split.json")
    return frozenset(name for pattern in split.get("exclude") or () for name in braceexpand(pattern))


@cache
def _kind(folder: Path) -> str:
    """Type of the samples: "Captioning", "VQA", ... Of old data sets it is the name of a class of Energon's."""
    description = _metadata(folder, "dataset.yaml")
    name = (description.get("sample_type") or description).get("__class__") or ""
    kind = name.removesuffix("Sample").removesuffix("Webdataset")
    if kind not in (*_SAMPLES, CRUDE):
        known = ", ".join((*_SAMPLES, CRUDE))
        raise UserError(f"{folder / FOLDER}/dataset.yaml: samples of type {name or 'none'}, must be one of {known}")
    return kind


@cache
def _loader(folder: Path) -> Callable[[dict[str, Member]], dict]:
    """What makes the fields of a sample of its files, which are given by their endings."""
    description = _metadata(folder, "dataset.yaml")
    if fields := description.get("field_map"):
        return lambda parts: {name: _field(parts, access) for name, access in fields.items()}
    function = description.get("sample_loader")
    if not isinstance(function, str):
        raise UserError(f"{folder / FOLDER}/dataset.yaml: has neither a 'field_map' nor a 'sample_loader'")
    load = _function(folder, function)
    chosen = description.get("part_filter")
    keeps = _function(folder, chosen) if isinstance(chosen, str) else (lambda part: chosen is None or part in chosen)

    def loader(parts: dict[str, Member]) -> dict:
        try:
            return load({ending: _decoded(member) for ending, member in parts.items() if keeps(ending)})
        except (LookupError, AttributeError) as error:
            raise ValueError(f"{function}: {error!r}") from None

    return loader


def _function(folder: Path, name: str) -> Callable:
    file, _, function = name.partition(":")
    specification = importlib.util.spec_from_file_location(Path(file).stem, folder / FOLDER / file)
    try:
        module = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(module)
        return getattr(module, function)
    except (OSError, SyntaxError, ImportError, AttributeError) as error:
        raise UserError(f"{folder / FOLDER / file}: {error}") from None


def _field(parts: dict[str, Member], access: str):
    """The value at ``ENDING``, ``ENDING[key][0]``, or the first that is there of several with commas between."""
    for option in access.split(","):
        ending, keys = _ACCESS.fullmatch(option).groups() if _ACCESS.fullmatch(option) else (option, "")
        if ending not in parts:
            continue
        value = _decoded(parts[ending])
        try:
            for key in re.findall(r"\[([^\[\]]+)\]", keys):
                value = value[int(key)] if isinstance(value, list) else value[key]
            return value
        except (LookupError, TypeError, ValueError):
            continue
    raise ValueError(f"has nothing at '{access}'")


def _ending(member: Member) -> str:
    return Path(member.path).name.partition(".")[2]


def _decoded(member: Member):
    """What Energon makes of a file by its ending; an image stays a place."""
    ending = _ending(member).rpartition(".")[2].lower()
    if f".{ending}" in IMAGE_SUFFIXES:
        return member.place
    content = member.read()
    if ending == "json":
        return json.loads(content)
    if ending in _TEXT_ENDINGS:
        return content.decode()
    return int(content) if ending in _NUMBER_ENDINGS else content


def _record(name: str, fields: dict, record: dict, options: ReadOptions) -> Sample:
    """The sample of a record; ``--caption`` and filters also see the fields."""
    others = {key: value for key, value in fields.items() if not isinstance(value, ImageFile)}
    return make_sample(name, others | record, [_image(fields["image"])] if "image" in fields else [], options)


def _captioning(name: str, fields: dict, options: ReadOptions) -> Sample:
    return _record(name, fields, {"caption": fields["caption"]}, options)


def _vqa(name: str, fields: dict, options: ReadOptions) -> Sample:
    answers, weights = fields.get("answers"), fields.get("answer_weights")
    answers = [answers] if isinstance(answers, str) else answers
    if not answers:
        return Sample(name, unusable="has no answer")
    best = max(range(len(answers)), key=lambda i: float(weights[i])) if weights is not None else 0
    return _record(name, fields, _conversation(fields["context"], answers[best]), options)


def _choice(name: str, fields: dict, options: ReadOptions) -> Sample:
    """The choices are lettered, and the answer is a letter."""
    choices = fields.get("choices")
    if not choices:
        return Sample(name, unusable="has no choices")
    lines = [fields["context"], *(f"{chr(65 + i)}. {choice}" for i, choice in enumerate(choices))]
    answer = chr(65 + int(fields.get("correct_choice_idx", 0)))
    return _record(name, fields, _conversation("\n".join(lines), answer), options)


def _text(name: str, fields: dict, options: ReadOptions) -> Sample:
    return _record(name, fields, {"text": fields["text"]}, options)


def _interleaved(name: str, fields: dict, options: ReadOptions) -> Sample:
    """Texts that follow each other are joined by a space."""
    segments: list[tuple[int, str | ImageFile]] = []
    for item in fields["sequence"]:
        if not isinstance(item, str):
            segments.append((IMAGE, _image(item)))
        elif item.strip():
            text = item.strip()
            if segments and segments[-1][0] == TEXT:
                text = f"{segments.pop()[1]} {text}"
            segments.append((TEXT, text))
    return Sample(name, tuple(segments), required_mode=TEXT)


def _similarity(name: str, fields: dict, options: ReadOptions) -> Sample:
    """Each image stands before the text that it is matched with."""
    texts, images, places = (fields.get(key) for key in ("texts", "images", "matched_text_indices"))
    if places is None or len(places) != len(images):
        raise ValueError("'matched_text_indices' has no place for each image")
    sequence = []
    for number, text in enumerate(texts):
        sequence += [*(image for image, place in zip(images, places) if place == number), text]
    return _interleaved(name, {"sequence": sequence}, options)


_SAMPLES = {
    "Captioning": _captioning,
    "VQA": _vqa,
    "MultiChoiceVQA": _choice,
    "Text": _text,
    "Interleaved": _interleaved,
    "SimilarityInterleaved": _similarity,
}
"""What makes the sample of a type's fields."""


def _conversation(question: str, answer: str) -> dict:
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}


def _image(value) -> ImageFile:
    if not isinstance(value, ImageFile):
        raise ValueError(f"an image is {type(value).__name__}, not a file of the sample")
    return value
