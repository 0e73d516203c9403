"""Preprocessing: a run that was stopped, ran in shards or met damaged images still gives the right bytes."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from megatron_ext import vq as vq_package
from megatron_ext.data import copying
from megatron_ext.data.format import ANSWER, DRAWN, IMAGE, TEXT, Dataset
from megatron_ext.data.rendering import lay_out
from megatron_ext.data.writer import DatasetWriter
from megatron_ext.errors import UserError
from megatron_ext.preprocess import PreprocessOptions, dali_decoder, merge_shards, preprocess, verify_data_set
from megatron_ext.preprocess.parts import split_turns
from megatron_ext.token_classes import Layout
from megatron_ext.vq.image_decoder import SQUASH, PillowDecoder, Preparation
from support.images import caption_tar, encoded, write_tar
from support.tiny_vq import CODES, GRID, PIXELS, ResidualPixels, make_vq
from support.vocabularies import make_vocabulary


@pytest.fixture(scope="module")
def vq(tmp_path_factory):
    return vq_package.load(make_vq(tmp_path_factory.mktemp("vq")))


@pytest.fixture(scope="module")
def tars(tmp_path_factory) -> list[Path]:
    """Three tars of 11 captioned pictures."""
    folder = tmp_path_factory.mktemp("tars")
    return [caption_tar(folder / f"{i}.tar", 11, first=11 * i) for i in range(3)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tars, vocabulary, vq) -> dict[str, bytes]:
    """The files of an uninterrupted run over the tars."""
    out = tmp_path_factory.mktemp("whole") / "set"
    preprocess(small(tars, out), vocabulary, vq)
    return contents(out)


def restore(files: dict[str, bytes], folder: Path) -> Path:
    """Put the files of a data set into a folder; gives its prefix."""
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder / "set"


def small(inputs, out, **options) -> PreprocessOptions:
    return PreprocessOptions([Path(file) for file in inputs], out, **{"batch_size": 3, "part_samples": 4, **options})


def contents(out: Path) -> dict[str, bytes]:
    """The bytes of every file in the folder of a data set."""
    return {file.name: file.read_bytes() for file in out.parent.iterdir() if file.is_file()}


class Failing:
    """A VQ model that is stopped after some batches."""

    def __init__(self, vq, batches: int):
        self._vq, self._left = vq, batches

    def __getattr__(self, name):
        return getattr(self._vq, name)

    def encode(self, images):
        if not self._left:
            raise KeyboardInterrupt
        self._left -= 1
        return self._vq.encode(images)


def test_a_run_makes_a_document_of_every_sample(whole, tmp_path, vocabulary):
    dataset = Dataset(restore(whole, tmp_path))
    assert len(dataset) == 33
    assert sorted(whole) == ["set.bin", "set.idx", "set.json"]
    texts = [vocabulary.decode(dataset.document(i)[1][1].tolist()) for i in range(3)]
    assert texts == ["a a picture", "a red picture", "a green picture"]
    assert [mode for mode, _ in dataset.document(0)] == [IMAGE, ANSWER]
    assert len({bytes(dataset.document(i)[0][1]) for i in range(33)}) > 16, "the codes hardly depend on the picture"


@pytest.mark.parametrize("batches", [1, 3, 8])
def test_a_stopped_run_resumes_and_gives_the_same_bytes(tmp_path, tars, vocabulary, vq, whole, batches):
    options = small(tars, tmp_path / "set")
    with pytest.raises(KeyboardInterrupt):
        preprocess(options, vocabulary, Failing(vq, batches))
    done = len(list(tmp_path.glob("set.parts/*.part.json")))
    summary = preprocess(options, vocabulary, vq)
    # Parts of 4, 4 and 3 samples, in batches of 3: a part takes 2, 2 and 1 batches.
    assert done == {1: 0, 3: 1, 8: 4}[batches]
    assert summary.images == 33 - {0: 0, 1: 4, 4: 15}[done]
    assert contents(tmp_path / "set") == whole
    assert not (tmp_path / "set.parts").exists()


@pytest.mark.parametrize("shards", [2, 3, 5])
def test_shards_join_to_the_bytes_of_one_run(tmp_path, tars, vocabulary, vq, whole, shards):
    images = 0
    for shard in reversed(range(1, shards + 1)):
        images += preprocess(small(tars, tmp_path / "set", shard=(shard, shards)), vocabulary, vq).images
    merge_shards(tmp_path / "set")
    assert images == 33
    assert contents(tmp_path / "set") == whole


def test_a_residual_tokenizer_s_codes_are_stored_token_by_token_in_one_run_and_in_shards(
    tmp_path, tars, vocabulary, monkeypatch
):
    monkeypatch.setattr(dali_decoder, "available", lambda: False)  # so that pixels are Pillow's to the bit
    vq, (one, shards) = ResidualPixels(depth=4), (tmp_path / name / "set" for name in ("one", "shards"))
    preprocess(small(tars[:2], one), vocabulary, vq)
    for shard in (2, 1):
        preprocess(small(tars[:2], shards, shard=(shard, 2)), vocabulary, vq)
    merge_shards(shards)
    assert contents(shards) == contents(one)
    metadata, dataset = verify_data_set(one, vocabulary, vq.metadata), Dataset(one)
    assert metadata["vq"]["depth"] == 4 and metadata["image_tokens"] == 22 * GRID**2
    [pixels] = PillowDecoder(vq.image_size, "crop", 1)([encoded(0, "JPEG")])
    stored = (dataset.document(0)[0][1] - vocabulary.image_offset).reshape(GRID, GRID, 4)
    codebook, side = vq.vectors.double().numpy(), PIXELS // GRID
    for row, column in np.ndindex(GRID, GRID):
        patch = pixels.numpy()[row * side :, column * side :][:side, :side] / 127.5 - 1
        residual = patch.transpose(2, 0, 1).reshape(-1)
        for code in stored[row, column]:
            assert code == np.argmin(((residual - codebook) ** 2).sum(1))
            residual = residual - codebook[code]


def test_merging_names_the_part_that_is_missing(tmp_path, tars, vocabulary, vq):
    preprocess(small(tars, tmp_path / "set", shard=(1, 2)), vocabulary, vq)
    with pytest.raises(UserError, match=r"000001-0000\.part\.json: not found; the shard that makes it has not"):
        merge_shards(tmp_path / "set")
    assert not (tmp_path / "set.json").exists()


def test_a_killed_join_is_repeated(tmp_path, tars, vocabulary, vq, whole, monkeypatch):
    preprocess(small(tars, tmp_path / "set", shard=(1, 1)), vocabulary, vq)
    (tmp_path / ".set.4711.tmp.bin").write_bytes(b"left by a process that was killed")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(copying, "publish", interrupt)
        merge_shards(tmp_path / "set")
    assert not list(tmp_path.glob("set.*[!s]"))  # nothing but set.parts
    merge_shards(tmp_path / "set")
    assert contents(tmp_path / "set") == whole
    assert merge_shards(tmp_path / "set").already


def interrupt(*_) -> None:
    raise KeyboardInterrupt


def test_a_damaged_part_is_refused(tmp_path, tars, vocabulary, vq):
    preprocess(small(tars, tmp_path / "set", shard=(1, 1)), vocabulary, vq)
    file = tmp_path / "set.parts" / "000001-0000.bin"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(UserError, match=r"000001-0000\.bin: .* bytes, the metadata says"):
        merge_shards(tmp_path / "set")
    assert not (tmp_path / "set.json").exists()


def test_a_finished_data_set_is_left_alone(tmp_path, tars, vocabulary, vq, whole):
    options = small(tars, tmp_path / "set")
    restore(whole, tmp_path)
    summary = preprocess(options, vocabulary, Failing(vq, 0))
    assert summary.already and summary.images == 0 and summary.metadata["documents"] == 33
    with pytest.raises(UserError, match=r"set\.json: made with resize crop, now squash; delete it, or choose"):
        preprocess(small(tars, tmp_path / "set", resize="squash"), vocabulary, vq)
    assert contents(tmp_path / "set") == whole


def test_a_damaged_data_set_is_written_again(tmp_path, tars, vocabulary, vq, whole, capsys):
    options = small(tars, tmp_path / "set")
    restore(whole, tmp_path)
    (tmp_path / "set.bin").write_bytes(b"")
    preprocess(options, vocabulary, vq)
    assert "set.bin: 0 bytes" in capsys.readouterr().out
    assert contents(tmp_path / "set") == whole


@pytest.mark.parametrize(
    "changed, named",
    [
        ({"batch_size": 2}, "batch_size 3, now 2"),
        ({"resize": "squash"}, "resize crop, now squash"),
        ({"prefer": "caption"}, "as conversation, now caption"),
        ({"split_turns": True}, "split_turns None, now True"),
    ],
)
def test_resuming_with_other_options_is_refused(tmp_path, tars, vocabulary, vq, changed, named):
    with pytest.raises(KeyboardInterrupt):
        preprocess(small(tars, tmp_path / "set"), vocabulary, Failing(vq, 3))
    with pytest.raises(UserError, match=rf"set\.parts: started with {named}; delete that folder, or choose another"):
        preprocess(small(tars, tmp_path / "set", **changed), vocabulary, vq)


def test_resuming_with_other_inputs_is_refused(tmp_path, tars, vocabulary, vq):
    with pytest.raises(KeyboardInterrupt):
        preprocess(small(tars, tmp_path / "set"), vocabulary, Failing(vq, 3))
    with pytest.raises(UserError, match=r"other inputs \(3 files, now 2\)"):
        preprocess(small(tars[:2], tmp_path / "set"), vocabulary, vq)
    with pytest.raises(UserError, match=r"other inputs \(.*0\.tar of .*, now .*1\.tar of"):
        preprocess(small([tars[1], tars[0], tars[2]], tmp_path / "set"), vocabulary, vq)


def test_a_folder_with_another_file_is_another_input(tmp_path, vocabulary, vq):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "0.png").write_bytes(encoded(0))
    (folder / "0.txt").write_text("red")
    preprocess(small([folder], tmp_path / "set"), vocabulary, vq)
    assert preprocess(small([folder], tmp_path / "set"), vocabulary, vq).already
    (folder / "0.txt").rename(folder / "1.txt")
    with pytest.raises(UserError, match=r"other inputs \(.*in of .* bytes in 2 files \(.*\), now .* in 2 files \("):
        preprocess(small([folder], tmp_path / "set"), vocabulary, vq)


@pytest.fixture
def damaged(tmp_path) -> Path:
    """JSONL of captions for: a whole image, a truncated one, text, a PNG with a wrong checksum, none, and a whole."""
    bad_checksum = bytearray(encoded(3))
    bad_checksum[len(bad_checksum) // 2] ^= 255
    files = {
        "0.jpg": encoded(0, "JPEG"),
        "1.jpg": encoded(1, "JPEG", height=200, width=200)[:-900],
        "2.png": b"this is no picture",
        "3.png": bytes(bad_checksum),
        "5.webp": encoded(5, "WEBP"),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    records = [{"image": name, "caption": f"a {i} picture"} for i, name in enumerate([*list(files)[:4], "4.png"])]
    records.append({"image": "5.webp", "caption": "two"})
    file = tmp_path / "captions.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def test_damaged_images_are_skipped_and_listed_and_spare_their_batch(tmp_path, damaged, vocabulary, vq):
    out = tmp_path / "out" / "set"
    summary = preprocess(small([damaged], out, batch_size=16, part_samples=16), vocabulary, vq)
    dataset = Dataset(out)
    assert len(dataset) == 2 and summary.skipped == 4
    assert vocabulary.decode(dataset.document(1)[1][1].tolist()) == "two"
    skipped = [json.loads(line) for line in Path(f"{out}.skipped.jsonl").read_text().splitlines()]
    assert [Path(entry["image"]).name for entry in skipped] == ["1.jpg", "2.png", "3.png", "4.png"]
    assert [entry["sample"] for entry in skipped] == [f"{damaged}:{line}" for line in (2, 3, 4, 5)]
    assert skipped[1]["reason"] == "not an image of a known format"
    assert skipped[3]["reason"] == "No such file or directory"
    assert dataset.metadata["source"]["skipped"] == 4


def test_images_beside_damaged_ones_get_the_codes_they_get_alone(tmp_path, damaged, vocabulary, vq):
    preprocess(small([damaged], tmp_path / "set", batch_size=16), vocabulary, vq)
    alone = tmp_path / "alone.jsonl"
    alone.write_text("".join(damaged.read_text().splitlines(keepends=True)[i] for i in (0, 5)))
    preprocess(small([alone], tmp_path / "alone", batch_size=16), vocabulary, vq)
    assert (tmp_path / "set.bin").read_bytes() == (tmp_path / "alone.bin").read_bytes()


def test_strict_stops_at_the_first_damaged_image(tmp_path, damaged, vocabulary, vq):
    with pytest.raises(UserError, match=r"1\.jpg: .*truncated.*; without --strict it is skipped"):
        preprocess(small([damaged], tmp_path / "set", strict=True), vocabulary, vq)
    assert not (tmp_path / "set.json").exists()


def test_strict_also_stops_at_what_an_earlier_run_skipped(tmp_path, damaged, vocabulary, vq):
    preprocess(small([damaged], tmp_path / "set", shard=(1, 1)), vocabulary, vq)
    with pytest.raises(UserError, match=r"1\.jpg: .*; without --strict it is skipped"):
        preprocess(small([damaged], tmp_path / "set", strict=True), vocabulary, vq)


def test_nothing_usable_is_an_error(tmp_path, vocabulary, vq):
    tar = write_tar(tmp_path / "a.tar", {"0.jpg": b"no", "0.txt": "a"})
    with pytest.raises(UserError, match="none of 1 samples was usable"):
        preprocess(small([tar], tmp_path / "set"), vocabulary, vq)


def test_a_vocabulary_for_another_codebook_is_refused(tmp_path, tars, vq):
    wrong = make_vocabulary(tmp_path / "vocabulary", codes=CODES * 2)
    with pytest.raises(UserError, match=rf"made for {CODES * 2} VQ codes, but .* has {CODES}"):
        preprocess(small(tars, tmp_path / "set"), wrong, vq)


def test_images_without_a_vq_tokenizer_are_refused(tmp_path, tars, vocabulary):
    with pytest.raises(UserError, match=r"0\.tar:0000\.jpg: the input has images; give the VQ tokenizer with --vq"):
        preprocess(small(tars, tmp_path / "set"), vocabulary, None)


def test_checking_passes_what_is_right(tmp_path, whole, vocabulary, vq):
    restore(whole, tmp_path)
    assert verify_data_set(tmp_path / "set")["documents"] == 33
    assert verify_data_set(tmp_path / "set", vocabulary, vq.metadata)["images"] == 33


@pytest.fixture
def conversations(tmp_path) -> Path:
    """Two samples of two questions, the second of which shows another image, and a text without a picture."""
    ask = [{"from": "human", "value": "<image>\nred"}, {"from": "gpt", "value": "a"}]
    ask += [{"from": "human", "value": "<image>\ngreen"}, {"from": "gpt", "value": "two"}]
    records = [{"image": [f"{i}.png", f"{i + 1}.png"], "conversations": ask} for i in (0, 2)]
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(encoded(i))
    file = tmp_path / "conversations.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in [*records, {"text": "a picture"}]))
    return file


def test_split_turns_are_documents_with_the_images_before_them(tmp_path, conversations, vocabulary, vq):
    preprocess(small([conversations], tmp_path / "joint"), vocabulary, vq)
    summary = preprocess(small([conversations], tmp_path / "set", split_turns=True), vocabulary, vq)
    assert summary.images == 4  # each is encoded once
    joint, split = Dataset(tmp_path / "joint"), Dataset(tmp_path / "set")
    assert (len(joint), len(split)) == (3, 5)
    for sample in range(2):
        first, question, answer, second, *last = [(mode, item.tolist()) for mode, item in joint.document(sample)]
        turns = [[(m, item.tolist()) for m, item in split.document(2 * sample + turn)] for turn in range(2)]
        assert turns == [[first, question, answer], [first, second, *last]]
    assert [item.tolist() for _, item in split.document(4)] == [item.tolist() for _, item in joint.document(2)]


def test_split_turns_leave_out_a_question_without_an_answer():
    turn = [(IMAGE, "a"), (TEXT, "red"), (ANSWER, "yes"), (ANSWER, "no")]
    assert split_turns([*turn, (TEXT, "green")]) == [turn]


def test_a_drawn_image_ends_a_turn_and_is_given_in_later_ones():
    first, second = [(IMAGE, "a"), (TEXT, "red"), (DRAWN, "b")], [(TEXT, "blue"), (DRAWN, "c")]
    assert split_turns([*first, *second]) == [first, [(IMAGE, "a"), (IMAGE, "b"), *second]]


def test_a_damaged_image_skips_every_turn_of_its_sample_and_lists_it_once(tmp_path, conversations, vocabulary, vq):
    (tmp_path / "1.png").write_bytes(b"no picture")
    summary = preprocess(small([conversations], tmp_path / "set", split_turns=True), vocabulary, vq)
    assert summary.skipped == 1 and len(Dataset(tmp_path / "set")) == 3


def test_documents_that_a_row_cannot_hold_are_counted_and_listed_and_others_kept(
    tmp_path, conversations, vocabulary, vq
):
    def longest(name: str, **options) -> int:
        """The least row length that holds the data set."""
        preprocess(small([conversations], tmp_path / name, split_turns=True, **options), vocabulary, vq)
        dataset = Dataset(tmp_path / name)
        lengths = [
            lay_out(dataset, np.arange(len(dataset)), np.zeros(len(dataset), dtype=bool), layout).length
            for layout in (Layout.UNDERSTANDING, Layout.GENERATION)
        ]
        return int(np.max(lengths))

    row = longest("all")
    assert longest("fits", max_tokens=row) == row
    assert not (tmp_path / "fits.skipped.jsonl").exists()
    assert longest("less", max_tokens=row - 1) < row
    counts = {key: Dataset(tmp_path / "less").metadata["source"].get(key) for key in ("skipped", "skipped_documents")}
    assert counts == {"skipped": 0, "skipped_documents": 2} and len(Dataset(tmp_path / "less")) == 3
    listed = [json.loads(line) for line in (tmp_path / "less.skipped.jsonl").read_text().splitlines()]
    reason = f"more tokens than --max-tokens {row - 1}"
    assert listed == [{"sample": f"{conversations}:{line}", "documents": 1, "reason": reason} for line in (1, 2)]


def test_drawn_images_need_one_way_for_all_where_a_tokenizer_has_two(tmp_path, vocabulary):
    vq = ResidualPixels(depth=2)
    vq.preparation = Preparation(understanding=SQUASH)
    (tmp_path / "0.png").write_bytes(encoded(0))
    turns = [{"from": "human", "value": "red"}, {"from": "gpt", "value": "<image>"}]
    file = tmp_path / "drawn.jsonl"
    file.write_text(json.dumps({"image": "0.png", "conversations": turns}))
    with pytest.raises(UserError, match=r"0\.png: an answer draws it, and .* --resize \(crop or squash\)"):
        preprocess(small([file], tmp_path / "set"), vocabulary, vq)
    shutil.rmtree(tmp_path / "set.parts")
    assert preprocess(small([file], tmp_path / "set", resize="crop"), vocabulary, vq).images == 1


def test_captions_by_a_key_are_prepared_as_pictures_to_be_drawn():
    assert small([], "set", caption=("prompt",)).prefer == "caption"


@pytest.mark.parametrize("kind", ["bin", "idx"])
def test_checking_finds_truncation_and_alteration(tmp_path, whole, kind):
    restore(whole, tmp_path)
    file = tmp_path / f"set.{kind}"
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=rf"set\.{kind}: sha256 differs"):
        verify_data_set(tmp_path / "set")
    file.write_bytes(content[:-4])
    with pytest.raises(UserError, match=rf"set\.{kind}: .* bytes, the metadata says"):
        verify_data_set(tmp_path / "set")


def test_checking_finds_another_vocabulary_and_vq(tmp_path, whole, vocabulary, vq):
    restore(whole, tmp_path)
    other = make_vocabulary(tmp_path / "other", codes=CODES * 2)
    with pytest.raises(UserError, match=r"set\.json: of vocabulary .*, but .*other is"):
        verify_data_set(tmp_path / "set", other)
    with pytest.raises(UserError, match=r"set\.json: encoded by the VQ tokenizer"):
        verify_data_set(tmp_path / "set", vocabulary, {**vq.metadata, "fingerprint": "0" * 16})


def test_checking_finds_tokens_of_the_wrong_kind(tmp_path, vocabulary):
    metadata = {"fingerprint": "x", "grid": [GRID, GRID], "codebook_size": CODES}
    image = [vocabulary.image_offset] * GRID * GRID

    def write(document):
        with DatasetWriter(tmp_path / "set", vocabulary.fingerprint, metadata, {}) as writer:
            writer.add(document)

    write([(IMAGE, image), (ANSWER, [vocabulary.eod])])
    with pytest.raises(UserError, match=rf"set\.bin: token {vocabulary.eod} in a text sequence"):
        verify_data_set(tmp_path / "set", vocabulary)
    write([(IMAGE, [*image[1:], vocabulary.size]), (ANSWER, [5])])
    with pytest.raises(UserError, match=rf"set\.bin: token {vocabulary.size} in an image"):
        verify_data_set(tmp_path / "set", vocabulary)
    with pytest.raises(UserError, match=rf"set\.bin: token {vocabulary.size} in an image"):
        verify_data_set(tmp_path / "set")
    write([(IMAGE, image), (ANSWER, [vocabulary.image_offset + 1])])
    with pytest.raises(UserError, match=rf"set\.bin: token {vocabulary.image_offset + 1} in a text sequence"):
        verify_data_set(tmp_path / "set")


def test_without_dali_pillow_decodes(tmp_path, tars, vocabulary, vq, whole, monkeypatch, capsys):
    monkeypatch.setattr(dali_decoder, "available", lambda: False)
    preprocess(small(tars, tmp_path / "pillow"), vocabulary, vq)
    assert "DALI is missing (pip install nvidia-dali-cuda130)" in capsys.readouterr().out
    (tmp_path / "dali").mkdir()
    by_pillow, by_dali = Dataset(tmp_path / "pillow"), Dataset(restore(whole, tmp_path / "dali"))
    assert by_pillow.metadata["source"]["settings"]["decoder"] == "pillow"
    codes = [np.stack([dataset.document(i)[0][1] for i in range(33)]) for dataset in (by_pillow, by_dali)]
    # A picture's pixels differ by a level or two, which moves a latent to another code now and then.
    assert (codes[0] == codes[1]).mean() > 0.9
    if by_dali.metadata["source"]["settings"]["decoder"] != "pillow":
        monkeypatch.undo()
        with pytest.raises(UserError, match=r"pillow\.json: made with decoder pillow, now dali "):
            preprocess(small(tars, tmp_path / "pillow"), vocabulary, vq)
