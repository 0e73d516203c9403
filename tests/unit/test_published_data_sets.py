"""The layouts of ShareGPT4V, MMC4, JourneyDB and COYO become the documents that they should."""

import gzip
import json
import random
import zipfile
from pathlib import Path

import pytest

from megatron_ext import vq as vq_package
from megatron_ext.data.format import ANSWER, IMAGE, TEXT, Dataset, is_image
from megatron_ext.data.source import Source, SourceConfig
from megatron_ext.errors import UserError
from megatron_ext.preprocess import PreprocessOptions, llava, preprocess
from megatron_ext.preprocess.record_fields import Filter
from megatron_ext.preprocess.samples import ReadOptions
from megatron_ext.preprocess.units import TRIED, plan, read
from support.images import encoded, write_tar
from support.tiny_vq import make_vq


def read_all(*files: Path, images: Path | None = None, part_samples: int = 100, **options) -> list:
    read_options = ReadOptions(images, "conversation", **options)
    return [sample for unit in plan(list(files), part_samples) for sample in read(unit, read_options)]


def segments(sample) -> list:
    """The segments, images by the name of their file."""
    return [(mode, Path(item.name).name if is_image(mode) else item) for mode, item in sample.segments]


def write_lines(file: Path, *records) -> Path:
    """A .jsonl file, compressed as its name says."""
    content = "".join(json.dumps(record) + "\n" for record in records).encode()
    if file.suffix == ".zip":
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(file.name.removesuffix(".zip"), content)
    else:
        file.write_bytes(gzip.compress(content) if file.suffix == ".gz" else content)
    return file


# ShareGPT4V: a list in LLaVA's form, images in several folders


def test_sharegpt4v_becomes_instructions_or_by_a_key_captions(tmp_path):
    def record(image, question, answer):
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        return {"id": "0", **({"image": image} if image else {"model": ""}), "conversations": turns}

    file = tmp_path / "share-captioner_coco_lcs_sam_1246k_1107.json"
    file.write_text(
        json.dumps(
            [
                record("sam/images/sa_545504.jpg", "What do you see?\n<image>", "A park. "),
                record("coco/train2017/000000000009.jpg", "<image>\nDescribe it.", "Food."),
                record(None, "Who are you?", "A model."),
            ]
        )
    )
    park, food, text = read_all(file, images=Path("data"))
    assert segments(park) == [(TEXT, "What do you see?"), (IMAGE, "sa_545504.jpg"), (ANSWER, "A park.")]
    assert food.segments[0][1].file == "data/coco/train2017/000000000009.jpg"
    assert segments(text) == [(TEXT, "Who are you?"), (ANSWER, "A model.")]
    park, food, text = read_all(file, images=Path("data"), caption=("conversations.1.value",))
    assert segments(park) == [(IMAGE, "sa_545504.jpg"), (ANSWER, "A park.")]
    assert segments(food) == [(IMAGE, "000000000009.jpg"), (ANSWER, "Food.")]
    assert text.unusable == "a caption without an image"


@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("indent", [None, 2])
def test_a_list_read_in_small_chunks_is_what_json_reads(tmp_path, monkeypatch, ascii_only, indent):
    monkeypatch.setattr(llava, "CHUNK", 7)
    numbers = random.Random(0)
    texts = ["".join(numbers.choices('[]{},:"\\ \n\té漢😀x', k=numbers.randrange(1, 30))) for _ in range(40)]
    file = tmp_path / "list.json"
    file.write_text(
        json.dumps([{"text": text, "n": [1.5, {}]} for text in texts], ensure_ascii=ascii_only, indent=indent)
    )
    assert [sample.segments[0][1] for sample in read_all(file, part_samples=3)] == texts


def test_a_damaged_list_is_named_with_the_byte(tmp_path):
    file = tmp_path / "list.json"
    file.write_text('[{"text": "a"}, {"text": b}]')
    with pytest.raises(UserError, match=r"list\.json: Expecting value \(byte 25\)"):
        read_all(file)
    for content, message in (
        ('[{"text": "a"}, ]', r"Expecting value \(byte 16\)"),
        ('[{"text": "a"}]\n {', r"Extra data \(byte 17\)"),
        ("[] []", r"Extra data \(byte 3\)"),
    ):
        file.write_text(content)
        with pytest.raises(UserError, match=rf"list\.json: {message}"):
            read_all(file)
    file.write_text('[{"text": "a"} {"text": "b"}]')
    with pytest.raises(UserError, match=r"list\.json: Expecting ',' delimiter \(byte 15\)"):
        read_all(file)


def test_a_list_may_begin_with_a_byte_order_mark_and_end_with_blanks(tmp_path):
    file = tmp_path / "list.json"
    file.write_bytes(b'\xef\xbb\xbf[{"text": "\xc3\xa9"}, {"text": "b"}] \n\n')
    assert [sample.segments[0][1] for sample in read_all(file, part_samples=1)] == ["é", "b"]


# MMC4: compressed shards of texts whose images have places


def entry(name: str, index: int, similarity: float = 0.3) -> dict:
    url = f"http://a.b/{name}"
    return {"image_name": name, "raw_url": url, "matched_text_index": index, "matched_sim": similarity}


def mmc4(sentences: list[str], *entries: dict) -> dict:
    similarities = [[0.2] * len(sentences)] * len(entries)
    return {"url": "http://a.b", "text_list": sentences, "image_info": entries, "similarity_matrix": similarities}


@pytest.fixture
def pictures(tmp_path) -> Path:
    """A folder with the images of shard_0: 0.png to 7.png."""
    folder = tmp_path / "shard_0_images"
    folder.mkdir()
    for i in range(8):
        (folder / f"{i}.png").write_bytes(encoded(i))
    return folder


def test_mmc4_puts_each_image_before_its_sentence(tmp_path, pictures):
    sentences = ["One.", " Two. ", "", "Three."]
    documents = [
        mmc4(sentences, entry("0.png", 3), entry("1.png", 1), entry("2.png", 3)),
        mmc4(["A.", "B."], *(entry(f"{7 - i}.png", i % 2) for i in range(8))),
        mmc4(sentences, entry("gone.png", 1), entry("3.png", 0)),
        mmc4(sentences, entry("gone.png", 1)),
        mmc4(sentences),
    ]
    first, many, partly, gone, bare = read_all(write_lines(tmp_path / "shard_0.jsonl", *documents), images=pictures)
    assert segments(first) == [
        (TEXT, "One."),
        (IMAGE, "1.png"),
        (TEXT, "Two."),
        (IMAGE, "0.png"),
        (IMAGE, "2.png"),
        (TEXT, "Three."),
    ]
    assert [name for mode, name in segments(many) if mode == IMAGE] == [f"{i}.png" for i in (7, 5, 3, 6, 4, 2)]
    assert segments(partly) == [(IMAGE, "3.png"), (TEXT, "One. Two. Three.")] and partly.missing == 1
    assert gone.unusable == "none of its 1 images is there" and gone.missing == 1
    assert bare.unusable == "holds no image" and not bare.filtered and not many.filtered


def test_mmc4_leaves_images_out_that_filters_refuse(tmp_path, pictures):
    documents = [mmc4(["A."], entry("0.png", 0, 0.2), entry("1.png", 0, 0.4)), mmc4(["B."], entry("2.png", 0, 0.2))]
    file = write_lines(tmp_path / "shard_0.jsonl", *documents)
    some, none = read_all(file, images=pictures, filters=(Filter("matched_sim", minimum=0.25),))
    assert segments(some) == [(IMAGE, "1.png"), (TEXT, "A.")] and some.missing == 0
    assert none.filtered


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".jsonl.zip"])
def test_compressed_shards_and_images_in_tars_are_read_as_plain_ones(tmp_path, pictures, ending):
    documents = [mmc4(["A.", f"{i}."], entry(f"{i}.png", 1)) for i in range(8)]
    plain = read_all(write_lines(tmp_path / "plain.jsonl", *documents), images=pictures)
    tars = tmp_path / "tars"
    tars.mkdir()
    prefix = "./" if ending == ".jsonl" else ""
    write_tar(tars / "shard_0_images.tar", {prefix + file.name: file.read_bytes() for file in pictures.iterdir()})
    file = write_lines(tmp_path / f"shard_0{ending}", *documents)
    samples = read_all(file, images=tars / "{shard}_images", part_samples=3)
    assert [segments(sample)[::2] for sample in samples] == [segments(sample)[::2] for sample in plain]
    for here, there in zip(samples, plain):
        image = here.segments[1][1]
        content = Path(image.file).read_bytes()[image.offset : image.offset + image.size]
        assert content == Path(there.segments[1][1].file).read_bytes()
    assert [sample.name for sample in samples] == [f"{file}:{line}" for line in range(1, 9)]
    assert 0 < sum(sample.bytes for sample in samples) <= file.stat().st_size
    options = ReadOptions(tars / "{shard}_images", "conversation")
    assert [sample for unit in plan([file], 8) for sample in read(unit, options, skip=5)] == samples[5:]


@pytest.mark.parametrize(
    "record, message",
    [
        (mmc4("A.", entry("0.png", 0)), r"jsonl:1: 'text_list' is not a list of strings"),
        ({"text_list": [], "image_info": {}}, r"jsonl:1: 'image_info' is not a list of objects"),
        (mmc4(["A."], entry("0.png", 1)), r"jsonl:1: 'matched_text_index' is 1, but 'text_list' has 1 sentences"),
        (mmc4(["A."], {"matched_text_index": 0}), r"jsonl:1: 'image_info' has an entry without an 'image_name'"),
    ],
)
def test_a_wrong_layout_of_mmc4_is_named(tmp_path, record, message):
    with pytest.raises(UserError, match=message):
        read_all(write_lines(tmp_path / "a.jsonl", record))


def test_damaged_shards_are_named(tmp_path):
    file = write_lines(tmp_path / "a.jsonl.gz", *({"text": str(i)} for i in range(1000)))
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(UserError, match=r"a\.jsonl\.gz: .*end-of-stream"):
        read_all(file)
    file = tmp_path / "b.jsonl.zip"
    file.write_bytes(b"no zip")
    with pytest.raises(UserError, match=r"b\.jsonl\.zip: File is not a zip file"):
        read_all(file)


# JourneyDB: lines with a path, a prompt and a caption deeper in the record


def test_journeydb_takes_the_caption_or_the_prompt(tmp_path):
    records = [
        {"img_path": "./000/a.jpg", "prompt": "a cat --ar 2:3", "Task2": {"Caption": "A cat."}},
        {"img_path": "./001/b.jpg", "prompt": "a dog", "Task2": {"Caption": None}},
        {"img_path": "./001/c.jpg", "prompt": "a cow"},
    ]
    file = write_lines(tmp_path / "train_anno_realease_repath.jsonl", *records)
    cat, dog, cow = read_all(file, images=Path("imgs"), caption=("Task2.Caption",))
    assert segments(cat) == [(IMAGE, "a.jpg"), (ANSWER, "A cat.")] and cat.segments[0][1].file == "imgs/000/a.jpg"
    assert dog.unusable == cow.unusable == "has no text at 'Task2.Caption'"
    texts = [sample.segments[1][1] for sample in read_all(file, caption=("Task2.Caption", "prompt"))]
    assert texts == ["A cat.", "a dog", "a cow"]
    with pytest.raises(UserError, match=r"repath\.jsonl:1: has none of .*; --caption names the key"):
        read_all(file)


def test_a_caption_that_no_sample_has_is_refused_before_all_are_read(tmp_path):
    file = write_lines(tmp_path / "a.jsonl", *({"image": "a", "prompt": "b"} for _ in range(TRIED)))
    with pytest.raises(UserError, match=rf"a\.jsonl:1 has no text at 'promt', nor have the {TRIED - 1} samples after"):
        read_all(file, caption=("promt",))


def test_a_stretch_without_the_caption_is_skipped_once_a_file_s_start_has_it(tmp_path):
    records = [{"image": "a", "prompt": "b"} if i < TRIED else {"image": "a"} for i in range(2 * TRIED)]
    file = write_lines(tmp_path / "a.jsonl", *records)
    samples = read_all(file, part_samples=TRIED, caption=("prompt",))  # the second unit
    assert [sample.unusable is None for sample in samples] == [True] * TRIED + [False] * TRIED
    (unit,) = plan([file], len(records))
    assert len(list(read(unit, ReadOptions(None, "caption", caption=("prompt",)), skip=TRIED))) == TRIED


# COYO: what img2dataset writes


def coyo(i: int, similarity: float | None) -> dict[str, bytes | str | dict]:
    record = {"url": "http://a.b", "key": f"{i:09d}", "status": "success", "original_width": 100 + i}
    metadata = {**record, "caption": f"number {i}", "clip_similarity_vitl14": similarity}
    return {f"{i:09d}.jpg": encoded(i, "JPEG"), f"{i:09d}.txt": f"number {i}", f"{i:09d}.json": metadata}


def test_coyo_in_tars_and_in_folders_is_filtered_by_numbers_of_its_records(tmp_path):
    members = {name: c for i, s in enumerate([0.3, 0.1, None, 0.4]) for name, c in coyo(i, s).items()}
    tar = write_tar(tmp_path / "00000.tar", members)
    folder = tmp_path / "unpacked" / "00000"
    folder.mkdir(parents=True)
    for name, content in {**members, "00000.parquet": b"table"}.items():
        content = json.dumps(content) if isinstance(content, dict) else content
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    filters = (Filter("clip_similarity_vitl14", minimum=0.2), Filter("original_width", maximum=102))
    kept = read_all(tar, filters=filters)
    assert [sample.filtered for sample in kept] == [False, True, True, True]
    assert segments(kept[0]) == [(IMAGE, "00000.tar:000000000.jpg"), (ANSWER, "number 0")]
    table, *unpacked = read_all(folder.parent, filters=filters)
    assert table.unusable == "neither a caption nor conversations"
    assert [sample.filtered for sample in unpacked] == [False, True, True, True]
    assert segments(unpacked[0]) == [(IMAGE, "000000000.jpg"), (ANSWER, "number 0")]
    with pytest.raises(UserError, match=r"00000\.tar:000000000: has no 'similarity' to filter by"):
        read_all(tar, filters=(Filter("similarity", 0.2),))


# The whole way


def test_mmc4_becomes_a_data_set_that_rows_can_hold(tmp_path, pictures, vocabulary):
    words = "a red picture " * 6
    documents = [mmc4([words] * 4, *(entry(f"{i}.png", i) for i in range(4))), mmc4(["a"], entry("gone.png", 0))]
    documents += [mmc4(["a red picture", "green"], entry("5.png", 1), entry("gone.png", 0)), mmc4(["a"])]
    file = write_lines(tmp_path / "shard_0.jsonl.gz", *documents)
    vq = vq_package.load(make_vq(tmp_path / "vq"))
    options = {"images": tmp_path / "{shard}_images", "max_tokens": 60, "part_samples": 3}
    metadata = preprocess(PreprocessOptions([file], tmp_path / "set", **options), vocabulary, vq).metadata
    counts = {key: metadata["source"].get(key) for key in ("samples", "skipped", "filtered", "missing_images")}
    assert counts == {"samples": 4, "skipped": 2, "filtered": None, "missing_images": 2}
    long, short = (Dataset(tmp_path / "set").document(i) for i in range(2))
    assert [mode for mode, _ in short] == [TEXT, IMAGE, TEXT]
    assert [mode for mode, _ in long] == [IMAGE, TEXT] * (len(long) // 2) and 0 < len(long) < 8
    source = Source.open("train", SourceConfig(str(tmp_path / "set"), "interleaved"), vocabulary.fingerprint, 60)
    assert 60 < source.tokens <= 120
