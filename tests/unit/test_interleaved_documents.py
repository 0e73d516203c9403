"""Documents in which some images are given and others are drawn: stored, rendered, dropped and packed."""

import json

import numpy as np
import pytest

from megatron_ext import config_file
from megatron_ext.config import Config
from megatron_ext.data.copying import merge
from megatron_ext.data.format import ANSWER, DRAWN, IMAGE, TEXT, Dataset, is_image, verify
from megatron_ext.data.packed_rows import PackedRows
from megatron_ext.data.source import Source, SourceConfig
from megatron_ext.errors import UserError
from megatron_ext.token_classes import Modality, Task
from megatron_ext.training.prepare import prepare
from megatron_ext.transformer.resolved import resolve
from support.data_sets import FIRST_CODE, SPECIAL, mixture, write

EDIT = [(IMAGE, [110, 111, 112]), (TEXT, [2, 3]), (DRAWN, [113, 114, 115])]


def render(tmp_path, document, task, length, caption_dropout=0.0):
    """The only document of a row that is exactly as long as expected."""
    path = write(tmp_path / "set", [document], grid=[1, 3])
    return PackedRows(mixture((path, task, 1.0), length=length, caption_dropout=caption_dropout), length)[0]


def random_document(random, drawn: bool) -> list[tuple[int, list[int]]]:
    """Sequences of random modes, with something to learn."""
    modes = [TEXT, IMAGE, ANSWER, DRAWN] if drawn else [TEXT, IMAGE, ANSWER]
    while True:
        chosen = random.choice(modes, random.integers(1, 8)).tolist()
        if {ANSWER, DRAWN} & set(chosen) or drawn and TEXT in chosen:
            break
    return [
        (mode, random.integers(110, 140, 3).tolist() if is_image(mode) else random.integers(2, 90, n).tolist())
        for mode, n in zip(chosen, random.integers(1, 5, len(chosen)))
    ]


def slowly(document, dropped: bool = False) -> tuple[list[int], list[bool], list[int]]:
    """Token ids, whether each is learnt, and tasks, token by token."""
    plain = not {ANSWER, DRAWN} & {mode for mode, _ in document}
    ids, learnt, tasks = [SPECIAL.bos], [False], [Task.UNDERSTANDING]

    def add(token, is_learnt=False, task=Task.UNDERSTANDING):
        ids.append(token), learnt.append(is_learnt), tasks.append(task)

    kept = [(mode, tokens) for mode, tokens in document if not dropped or is_image(mode)]
    for (mode, tokens), (following, _) in zip(kept, [*kept[1:], (None, None)]):
        if is_image(mode):
            add(SPECIAL.boi, mode == DRAWN)
            for token in tokens:
                add(token, mode == DRAWN, Task.GENERATION if mode == DRAWN else Task.UNDERSTANDING)
            add(SPECIAL.eoi)
        else:
            for token in tokens:
                add(token, mode == ANSWER or plain)
            if mode == ANSWER and following != DRAWN:
                add(SPECIAL.eod, True)
    if kept[-1][0] == DRAWN or plain:
        add(SPECIAL.eod, kept[-1][0] == TEXT)
    return ids, learnt, tasks


def test_an_edit_learns_the_drawn_image_and_the_decision_to_draw_it(tmp_path):
    batch = render(tmp_path, EDIT, "interleaved", 14)
    # fmt: off
    assert batch.tokens.tolist() ==    [[1, 102, 110, 111, 112, 103, 2, 3, 102, 113, 114, 115, 103, 101]]
    assert batch.loss_mask.tolist() == [[0,   0,   0,   0,   0,   0, 0, 1,   1,   1,   1,   0,   0,   0]]
    assert batch.modality.tolist() ==  [[0,   0,   1,   1,   1,   0, 0, 0,   0,   1,   1,   1,   0,   0]]
    assert batch.task.tolist() ==      [[0,   0,   0,   0,   0,   0, 0, 0,   0,   1,   1,   1,   0,   0]]
    assert batch.predicted_task().tolist() \
                               ==      [[0,   0,   0,   0,   0,   0, 0, 1,   1,   1,   1,   1,   0,   0]]
    # fmt: on
    assert batch.document.tolist() == [[0] * 14] and batch.positions.tolist() == [list(range(14))]


def test_a_document_without_answers_and_drawn_images_learns_all_its_text(tmp_path):
    document = [(TEXT, [2, 3]), (IMAGE, [110, 111, 112]), (TEXT, [4, 5])]
    batch = render(tmp_path, document, "interleaved", 11, caption_dropout=1.0)
    # fmt: off
    assert batch.tokens.tolist() ==    [[1, 2, 3, 102, 110, 111, 112, 103, 4, 5, 101]]
    assert batch.loss_mask.tolist() == [[1, 1, 0,   0,   0,   0,   0,   1, 1, 1,   0]]
    # fmt: on
    assert set(batch.task[0].tolist()) == {Task.UNDERSTANDING}
    some = write(tmp_path / "some", [document, EDIT, document], grid=[1, 3])
    line = "documents without answers and drawn images: all their text is learnt"
    assert f"2 {line}" in mixture((some, "interleaved", 1.0)).tree()
    edits = write(tmp_path / "edits", [EDIT], grid=[1, 3])
    assert line not in mixture((edits, "interleaved", 1.0)).tree()


def test_drawn_images_and_their_boi_count_to_generation_s_loss_and_answers_to_understanding_s(tmp_path):
    document = [*EDIT, (TEXT, [4]), (ANSWER, [5, 6]), (TEXT, [7]), (DRAWN, [113, 114, 115])]
    batch = render(tmp_path, document, "interleaved", len(slowly(document)[0]))
    row = batch.tokens.shape[1]
    config = config_file.load(Config, [], [f"data.sequence_length={row}", "training.micro_batch_size=1"])
    step = prepare(batch, resolve(config))
    assert step.loss_tokens.tolist() == [3, 8, 0, 0]  # an answer and its end; two images and their <boi>
    (part,) = step.micro_batches
    of_code = np.asarray(part.labels) >= FIRST_CODE
    assert np.asarray(part.tasks)[of_code].tolist() == [Task.GENERATION] * 6


def test_a_dropped_instruction_leaves_the_given_and_the_drawn_image(tmp_path):
    batch = render(tmp_path, EDIT, "interleaved", 14, caption_dropout=1.0)
    assert batch.tokens.tolist() == [[1, 102, 110, 111, 112, 103, 102, 113, 114, 115, 103, 101, 100, 100]]


def test_a_document_with_an_answer_keeps_its_texts(tmp_path):
    answered = [*EDIT, (TEXT, [4]), (ANSWER, [5])]
    batch = render(tmp_path, answered, "interleaved", 16, caption_dropout=1.0)
    assert batch.tokens[0].tolist() == slowly(answered)[0]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_random_documents_equal_a_slow_renderer(tmp_path, dropout):
    random = np.random.default_rng(7)
    documents = [random_document(random, drawn=True) for _ in range(150)]
    blend = mixture(
        (write(tmp_path / "set", documents, grid=[1, 3]), "interleaved", 1.0), length=64, caption_dropout=dropout
    )
    rows, seen, drops = PackedRows(blend, 64), 0, 0
    for row in range(12):
        batch = rows[row]
        for number, (_, document, _) in enumerate(rows.documents(row)):
            here = batch.document[0] == number
            ids, learnt, tasks = slowly(documents[document])
            if dropped := int(here.sum()) != len(ids) or batch.tokens[0][here].tolist() != ids:
                ids, learnt, tasks = slowly(documents[document], dropped=True)
                assert not any(mode == ANSWER for mode, _ in documents[document])
            assert batch.tokens[0][here].tolist() == ids
            assert (batch.loss_mask[0][here] > 0).tolist() == [*learnt[1:], False]
            assert batch.task[0][here].tolist() == tasks
            image = [token >= FIRST_CODE for token in ids]
            assert (batch.modality[0][here] == Modality.IMAGE).tolist() == image
            seen, drops = seen + 1, drops + dropped
    assert seen > 25 and (drops > 0) == (dropout > 0)


def test_documents_without_drawn_images_come_out_as_those_of_understanding(tmp_path):
    random = np.random.default_rng(3)
    path = write(tmp_path / "set", [random_document(random, drawn=False) for _ in range(80)], grid=[1, 3])
    rows = [PackedRows(mixture((path, task, 1.0), length=48), 48) for task in ("understanding", "interleaved")]
    interleaved, of_understanding = (r.packed_tokens(0, 16) for r in rows)
    assert np.array_equal(interleaved, of_understanding)


def test_other_layouts_take_drawn_images_as_images(tmp_path):
    documents = {mode: [(TEXT, [2, 3]), (mode, [110, 111, 112]), (ANSWER, [4])] for mode in (IMAGE, DRAWN)}
    for task in ("understanding", "generation"):
        rendered = [render(tmp_path / str(mode), document, task, 12) for mode, document in documents.items()]
        assert all(getattr(rendered[0], n).tolist() == getattr(rendered[1], n).tolist() for n in rendered[0].names())


def test_rows_by_task_keep_interleaved_documents_apart(tmp_path):
    edits = write(tmp_path / "edits", [EDIT] * 30, grid=[1, 3])
    answers = write(tmp_path / "answers", [[(IMAGE, [110, 111, 112]), (ANSWER, [4])]] * 30, grid=[1, 3])
    blend = mixture((edits, "interleaved", 1.0), (answers, "understanding", 1.0), length=48)
    rows = PackedRows(blend, 48, by_task=True)
    sources = [{source for source, _, _ in rows.documents(row)} for row in range(8)]
    assert all(len(of_row) == 1 for of_row in sources) and len(set.union(*sources)) == 2


def test_a_data_set_with_drawn_images_is_of_format_2_and_others_stay_of_format_1(tmp_path):
    edits = write(tmp_path / "edits", [EDIT], grid=[1, 3])
    others = write(tmp_path / "others", [[(IMAGE, [110, 111, 112]), (ANSWER, [4])]], grid=[1, 3])
    assert (verify(edits)["format"], verify(others)["format"]) == (2, 1)
    merged = merge([others, edits], tmp_path / "merged")
    assert (merged["format"], merged["images"], merged["image_tokens"]) == (2, 3, 9)
    assert verify(tmp_path / "merged") == merged
    assert [mode for mode, _ in Dataset(edits).document(0)] == [IMAGE, TEXT, DRAWN]
    metadata = json.loads((tmp_path / "edits.json").read_text())
    (tmp_path / "edits.json").write_text(json.dumps({**metadata, "format": 1}))
    with pytest.raises(UserError, match="'format' is 1, the index has 2"):
        verify(edits)


def test_a_document_with_nothing_to_learn_is_refused(tmp_path):
    path = write(tmp_path / "set", [EDIT, EDIT[:1]], grid=[1, 3])
    with pytest.raises(UserError, match="document 1 holds neither text nor a drawn image"):
        Source.open("data.train[0]", SourceConfig(path, "interleaved"), "tiny", 64)
