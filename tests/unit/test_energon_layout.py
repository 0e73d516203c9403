"""Data sets in Megatron Energon's layout, with the metadata files that ``energon prepare`` 7.4.1 writes."""

import io
import json
import tarfile
from pathlib import Path

import pytest
import yaml

from megatron_ext.data.format import ANSWER, IMAGE, TEXT
from megatron_ext.errors import UserError
from megatron_ext.preprocess.samples import ImageFile, ReadOptions, Sample
from megatron_ext.preprocess.units import plan, read

SPLIT = """\
split_parts:
  train:
  - parts/{000..001}.tar
  val:
  - parts/002.tar
  test: []
exclude: []
"""


def data_set(folder: Path, description: dict, *samples: dict[str, bytes], split: str = SPLIT) -> Path:
    """A data set of three tars of these samples each, a file of a sample by its ending."""
    for tar in range(3):
        file = folder / "parts" / f"{tar:03d}.tar"
        file.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(file, "w") as archive:
            for number, sample in enumerate(samples):
                for ending, content in sample.items():
                    member = tarfile.TarInfo(f"{tar}{number}.{ending}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    metadata = folder / ".nv-meta"
    metadata.mkdir()
    counts = {f"parts/{tar:03d}.tar": len(samples) for tar in range(3)}
    (metadata / ".info.json").write_text(json.dumps({"energon_version": "7.4.1", "shard_counts": counts}))
    (metadata / "split.yaml").write_text(split)
    (metadata / "dataset.yaml").write_text(yaml.dump(description, sort_keys=False))
    return folder


def typed(name: str, **fields: str) -> dict:
    return {"sample_type": {"__module__": "megatron.energon", "__class__": name}, "field_map": fields}


def samples_of(folder: Path, part: str = "val") -> list[Sample]:
    options = ReadOptions(None, "conversation")
    return [sample for unit in plan([folder], 100, part) for sample in read(unit, options)]


def contents(sample: Sample) -> list:
    """The segments, with the bytes of images."""
    return [(mode, item if isinstance(item, str) else content_of(item)) for mode, item in sample.segments]


def content_of(image: ImageFile) -> bytes:
    with open(image.file, "rb") as file:
        file.seek(image.offset)
        return file.read(image.size)


def encoded(value) -> bytes:
    return json.dumps(value).encode()


def test_captions_and_the_parts_of_a_split(tmp_path):
    fields = {"image": "png,jpg", "caption": "txt"}
    folder = data_set(
        tmp_path, typed("CaptioningSample", **fields), {"jpg": b"one", "txt": b"a"}, {"jpg": b"two", "txt": b"b"}
    )
    assert [contents(sample) for sample in samples_of(folder)] == [
        [(IMAGE, b"one"), (ANSWER, "a")],
        [(IMAGE, b"two"), (ANSWER, "b")],
    ]
    assert [unit.file.name for unit in plan([folder], 100)] == ["000.tar", "001.tar"]
    with pytest.raises(UserError, match=r"\.nv-meta/split\.yaml: no tar in part 'test', only train, val, test"):
        plan([folder], 100, "test")


def test_excluded_tars_and_samples_are_left_out(tmp_path):
    split = SPLIT.replace("exclude: []", "exclude:\n- parts/001.tar\n- parts/000.tar/00")
    folder = data_set(tmp_path, typed("TextSample", text="txt"), {"txt": b"a"}, {"txt": b"b"}, split=split)
    samples = samples_of(folder, "train")
    assert [sample.filtered for sample in samples] == [True, False]
    assert contents(samples[1]) == [(TEXT, "b")]


def test_questions_take_the_answer_of_the_largest_weight(tmp_path):
    fields = {"image": "jpg", "context": "json[0][q]", "answers": "json[0][a]", "answer_weights": "json[0][w]"}
    record = [{"q": "what?", "a": ["no", "yes"], "w": [0.25, 0.75]}]
    folder = data_set(tmp_path, typed("VQASample", **fields), {"jpg": b"image", "json": encoded(record)})
    [sample] = samples_of(folder)
    assert contents(sample) == [(IMAGE, b"image"), (TEXT, "what?"), (ANSWER, "yes")]
    assert [role for role, _ in sample.turns if role] == ["user", "assistant"]


def test_choices_are_lettered(tmp_path):
    fields = {"image": "jpg", "context": "json[q]", "choices": "json[c]", "correct_choice_idx": "json[right]"}
    record = {"q": "which?", "c": ["x", "y"], "right": 1}
    folder = data_set(tmp_path, typed("MultiChoiceVQASample", **fields), {"jpg": b"image", "json": encoded(record)})
    assert contents(samples_of(folder)[0]) == [(IMAGE, b"image"), (TEXT, "which?\nA. x\nB. y"), (ANSWER, "B")]


def test_a_sample_loader_makes_interleaved_samples(tmp_path):
    description = typed("InterleavedSample") | {"sample_loader": "loader.py:load", "part_filter": "loader.py:keep"}
    del description["field_map"]
    record = {"texts": ["first", "second", "third"]}
    folder = data_set(tmp_path, description, {"a.jpg": b"image", "json": encoded(record), "bin": b"unused"})
    (folder / ".nv-meta" / "loader.py").write_text(
        "def load(raw):\n"
        "    assert 'bin' not in raw\n"
        "    texts = raw['json']['texts']\n"
        "    return dict(sequence=[texts[0], texts[1], raw['a.jpg'], texts[2]])\n"
        "def keep(part):\n"
        "    return part in ('a.jpg', 'json')\n"
    )
    assert contents(samples_of(folder)[0]) == [(TEXT, "first second"), (IMAGE, b"image"), (TEXT, "third")]


def test_crude_samples_are_those_of_any_tar(tmp_path):
    description = {"__module__": "megatron.energon", "__class__": "CrudeWebdataset"}
    folder = data_set(tmp_path, description, {"jpg": b"image", "txt": b"caption"})
    assert contents(samples_of(folder)[0]) == [(IMAGE, b"image"), (ANSWER, "caption")]


@pytest.mark.parametrize(
    ("description", "message"),
    [
        (typed("VidQASample", video="mp4"), r"dataset\.yaml: samples of type VidQASample, must be one of Captioning"),
        ({"sample_type": {"__class__": "TextSample"}}, r"neither a 'field_map' nor a 'sample_loader'"),
        (typed("TextSample", text="json[text]"), r"002\.tar:20: has nothing at 'json\[text\]'"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, description, message):
    folder = data_set(tmp_path, description, {"txt": b"a"})
    with pytest.raises(UserError, match=message):
        samples_of(folder)
