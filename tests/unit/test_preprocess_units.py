"""Every form of input becomes the documents it should, and what is malformed is named by file and place."""

import json
from pathlib import Path

import pytest

from megatron_ext.data.format import ANSWER, DRAWN, IMAGE, TEXT, is_image
from megatron_ext.errors import UserError
from megatron_ext.preprocess.samples import ImageFile, ReadOptions
from megatron_ext.preprocess.units import plan, read
from support.images import encoded, write_tar

TURNS = [
    {"from": "human", "value": "<image>\nWhat colour?"},
    {"from": "gpt", "value": "red"},
    {"from": "human", "value": "And left?"},
    {"from": "gpt", "value": " blue \n"},
]
ASKED = [(TEXT, "What colour?"), (ANSWER, "red"), (TEXT, "And left?"), (ANSWER, "blue")]


def read_all(file: Path, images: Path | None = None, prefer: str = "conversation", part_samples: int = 100):
    return [sample for unit in plan([file], part_samples) for sample in read(unit, ReadOptions(images, prefer))]


def segments(sample) -> list:
    """The segments, images by the name of their file."""
    return [(m, Path(item.name).name if is_image(m) else item) for m, item in sample.segments]


def llava(tmp_path, *records) -> Path:
    file = tmp_path / "llava.json"
    file.write_text(json.dumps(list(records)))
    return file


def jsonl(tmp_path, *lines) -> Path:
    file = tmp_path / "lines.jsonl"
    file.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return file


def conversation(*values: str, image=None) -> dict:
    """A sample whose turns alternate between the two sides."""
    turns = [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]
    return {"id": "0", "conversations": turns, **({"image": image} if image else {})}


def test_llava_conversation(tmp_path):
    [sample] = read_all(llava(tmp_path, {"id": "1", "image": "a.jpg", "conversations": TURNS}))
    assert segments(sample) == [(IMAGE, "a.jpg"), *ASKED]
    assert sample.segments[0][1].file == str(tmp_path / "a.jpg")


def test_images_of_llava_lie_in_the_folder_that_is_given(tmp_path):
    [sample] = read_all(llava(tmp_path, {"image": "x/a.jpg", "conversations": TURNS}), images=Path("photos"))
    assert sample.segments[0][1].file == "photos/x/a.jpg"


@pytest.mark.parametrize(
    "values, image, expected",
    [
        (("What is <image> here?", "red"), "a", [(TEXT, "What is"), (IMAGE, "a"), (TEXT, "here?"), (ANSWER, "red")]),
        (("Why?\n<image>", "red"), "a", [(TEXT, "Why?"), (IMAGE, "a"), (ANSWER, "red")]),
        (
            ("<image><image> Same?", "no", "And <image>?", "yes"),
            ["a", "b", "c"],
            [(IMAGE, "a"), (IMAGE, "b"), (TEXT, "Same?"), (ANSWER, "no")]
            + [(TEXT, "And"), (IMAGE, "c"), (TEXT, "?"), (ANSWER, "yes")],
        ),
        (
            ("Selection it", "Here: <image> done"),
            "a",
            [(TEXT, "Selection it"), (ANSWER, "Here:"), (DRAWN, "a"), (ANSWER, "done")],
        ),
        (("<image>\nRed", "<image>"), ["a", "b"], [(IMAGE, "a"), (TEXT, "Red"), (DRAWN, "b")]),
        (("What?", "red"), ["a", "b"], [(IMAGE, "a"), (IMAGE, "b"), (TEXT, "What?"), (ANSWER, "red")]),
        (("How are you?", "well"), None, [(TEXT, "How are you?"), (ANSWER, "well")]),
    ],
    ids=["middle", "end", "several", "in the answer", "an edit", "no placeholder", "no image"],
)
def test_placeholders_keep_their_place(tmp_path, values, image, expected):
    [sample] = read_all(llava(tmp_path, conversation(*values, image=image)))
    assert segments(sample) == expected


@pytest.mark.parametrize("image, count", [("a", 1), (None, 0), (["a", "b", "c"], 3)])
def test_placeholders_that_do_not_fit_make_a_sample_unusable(tmp_path, image, count):
    [sample] = read_all(llava(tmp_path, conversation("<image><image> Same?", "no", image=image)))
    assert sample.unusable == f"2 <image> placeholders for {count} images"


def test_jsonl_of_captions_texts_and_conversations(tmp_path):
    file = jsonl(
        tmp_path, {"image": "a.png", "caption": " a circle "}, "", {"text": "red\nblue"}, {"conversations": TURNS[2:]}
    )
    samples = read_all(file)
    assert [segments(sample) for sample in samples] == [
        [(IMAGE, "a.png"), (ANSWER, "a circle")],
        [(TEXT, "red\nblue")],
        ASKED[2:],
    ]
    assert [sample.name for sample in samples] == [f"{file}:{line}" for line in (1, 3, 4)]
    assert [sample.required_mode for sample in samples] == [ANSWER, TEXT, ANSWER]


@pytest.mark.parametrize("part_samples", [1, 3, 7])
@pytest.mark.parametrize("form", [llava, jsonl])
def test_cutting_a_file_into_units_changes_nothing_but_the_units(tmp_path, form, part_samples):
    file = form(tmp_path, *({"text": f"number {i}"} for i in range(7)))
    units = plan([file], part_samples)
    assert len(units) == -(-7 // part_samples)
    assert sum(unit.count for unit in units) == 7
    strip = [(sample.name, sample.segments) for sample in read_all(file, part_samples=part_samples)]
    assert strip == [(sample.name, sample.segments) for sample in read_all(file)]


@pytest.fixture
def tar(tmp_path) -> Path:
    """A sample of each kind."""
    return write_tar(
        tmp_path / "a.tar",
        {
            "both.jpg": encoded(0, "JPEG"),
            "both.json": {"conversations": TURNS},
            "both.txt": "a caption\n",
            "pair.png": encoded(1),
            "pair.txt": "a pair",
            "asked.webp": encoded(2, "WEBP"),
            "asked.json": {"conversations": TURNS},
            "bare.png": encoded(3),
            "x/pair.png": encoded(4),
            "x/pair.json": {"caption": "in a folder", "width": 30},
            "talk.json": {"conversations": TURNS[2:]},
        },
    )


@pytest.mark.parametrize("prefer", ["conversation", "caption"])
def test_webdataset_tar(tar, prefer):
    both, pair, asked, bare, in_folder, talk = read_all(tar, prefer=prefer)
    if prefer == "conversation":
        assert segments(both) == [(IMAGE, "a.tar:both.jpg"), *ASKED]
    else:
        assert segments(both) == [(IMAGE, "a.tar:both.jpg"), (ANSWER, "a caption")]
    assert segments(pair) == [(IMAGE, "a.tar:pair.png"), (ANSWER, "a pair")]
    assert segments(asked) == [(IMAGE, "a.tar:asked.webp"), *ASKED]
    assert bare.unusable == "neither a caption nor conversations"
    assert segments(in_folder) == [(IMAGE, "pair.png"), (ANSWER, "in a folder")]
    assert segments(talk) == ASKED[2:]
    assert both.name == f"{tar}:both" and in_folder.name == f"{tar}:x/pair"


def test_images_in_a_tar_are_found_by_their_bytes(tar):
    image: ImageFile = read_all(tar)[1].segments[0][1]
    assert tar.read_bytes()[image.offset : image.offset + image.size] == encoded(1)


def test_a_tar_is_read_from_any_sample_on(tar):
    [unit] = plan([tar], 2)
    assert list(read(unit, ReadOptions(None, "caption"), skip=4)) == read_all(tar, prefer="caption")[4:]


@pytest.mark.parametrize(
    "lines, message",
    [
        (['{"text": "a"}', '{"text": '], r"lines\.jsonl:2: Expecting value"),
        (['{"text": "a"}', "", "7"], r"lines\.jsonl:3: not a JSON object"),
        (['{"txt": "a"}'], r"lines\.jsonl:1: has none of 'conversations', 'caption', 'text'"),
        (['{"text": 3}'], r"lines\.jsonl:1: 'text' is not a string"),
        (['{"image": 3, "caption": "a"}'], r"lines\.jsonl:1: 'image' is neither a path nor a list of paths"),
        (['{"conversations": [{"from": "me", "value": "a"}]}'], r"lines\.jsonl:1: a turn .* one of human, "),
        (['{"conversations": 7}'], r"lines\.jsonl:1: 'conversations' is not a list"),
        ([], r"lines\.jsonl: holds no sample"),
    ],
)
def test_malformed_lines_are_named(tmp_path, lines, message):
    with pytest.raises(UserError, match=message):
        read_all(jsonl(tmp_path, *lines))


def test_malformed_json_is_named(tmp_path):
    file = tmp_path / "llava.json"
    file.write_text('[{"id": ')
    with pytest.raises(UserError, match=r"llava\.json: Expecting value"):
        read_all(file)
    file.write_text('{"id": 0}')
    with pytest.raises(UserError, match=r"llava\.json: not a list of LLaVA samples"):
        read_all(file)
    file.write_text(json.dumps([conversation("a", "b"), {"id": 1}]))
    with pytest.raises(UserError, match=r"llava\.json\[1\]: has none of"):
        read_all(file)


def test_malformed_tars_are_named(tmp_path, tar):
    with pytest.raises(UserError, match=r"b\.tar:k: Expecting property name"):
        read_all(write_tar(tmp_path / "b.tar", {"k.png": encoded(0), "k.json": "{"}))
    (tmp_path / "c.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(UserError, match=r"c\.tar: "):
        read_all(tmp_path / "c.tar")
    content = tar.read_bytes()
    (tmp_path / "d.tar").write_bytes(content[:2000])
    with pytest.raises(UserError, match=r"d\.tar: "):
        read_all(tmp_path / "d.tar")
    at = content.index(b"pair.txt")
    (tmp_path / "e.tar").write_bytes(content[:at] + b"\xff" * 512 + content[at + 512 :])
    with pytest.raises(UserError, match=r"e\.tar: damaged after "):
        read_all(tmp_path / "e.tar")


def test_inputs_that_are_missing_or_of_another_kind_are_named(tmp_path):
    with pytest.raises(UserError, match=r"gone\.tar: No such file or directory"):
        plan([tmp_path / "gone.tar"], 1)
    (tmp_path / "a.csv").touch()
    with pytest.raises(UserError, match=r"a\.csv: neither a WebDataset \.tar"):
        plan([tmp_path / "a.csv"], 1)
