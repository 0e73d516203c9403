"""Every kind of document, written out by hand.

Special tokens: bos 1, pad 100, <eod> 101, <boi> 102, <eoi> 103; image tokens are 110 and up.
"""

from dataclasses import replace

import pytest

from megatron_ext.data.format import ANSWER, IMAGE, TEXT
from megatron_ext.data.packed_rows import PackedRows
from megatron_ext.token_classes import Task
from support.data_sets import SPECIAL, mixture, write


def render(tmp_path, document, task, length, **options):
    """The only document of a row that is exactly as long as expected."""
    path = write(tmp_path / "set", [document], grid=[1, 3])
    blend = mixture((path, task, 1.0), length=length, **options)
    return PackedRows(blend, length)[0]


def check(batch, task, tokens, loss, modality):
    """Everything that a batch says about the document, given its tokens, loss mask and modalities."""
    assert batch.tokens.tolist() == [tokens]
    assert batch.labels.tolist() == [[*tokens[1:], 100]]
    assert batch.loss_mask.tolist() == [loss]
    assert batch.modality.tolist() == [modality]
    assert batch.positions.tolist() == [list(range(len(tokens)))]
    assert batch.document.tolist() == [[0] * len(tokens)]
    assert batch.task.tolist() == [[int(task)] * len(tokens)]


def test_a_conversation_learns_its_answers_and_where_they_end(tmp_path):
    document = [(IMAGE, [110, 111, 112]), (TEXT, [2, 3]), (ANSWER, [4]), (TEXT, [5]), (ANSWER, [6, 7])]
    # fmt: off
    check(
        render(tmp_path, document, "understanding", 14), Task.UNDERSTANDING,
        tokens  =[1, 102, 110, 111, 112, 103, 2, 3, 4, 101, 5, 6, 7, 101],
        loss    =[0,   0,   0,   0,   0,   0, 0, 1, 1,   0, 1, 1, 1,   0],
        modality=[0,   0,   1,   1,   1,   0, 0, 0, 0,   0, 0, 0, 0,   0],
    )
    # fmt: on


def test_a_turn_s_end_closes_answers_instead_and_nothing_else(tmp_path):
    document = [(IMAGE, [110, 111, 112]), (TEXT, [2]), (ANSWER, [4]), (TEXT, [5]), (ANSWER, [6, 7])]
    path, special = write(tmp_path / "set", [document], grid=[1, 3]), replace(SPECIAL, answer_end=9)
    for task, expected in (
        ("understanding", [1, 102, 110, 111, 112, 103, 2, 4, 9, 5, 6, 7, 9]),
        ("generation", [1, 2, 4, 5, 6, 7, 102, 110, 111, 112, 103, 101]),
    ):
        length = len(expected)
        batch = PackedRows(mixture((path, task, 1.0), length=length, special=special), length)[0]
        assert batch.tokens.tolist() == [expected]
    batch = PackedRows(mixture((path, "understanding", 1.0), length=13, special=special), 13)[0]
    assert batch.loss_mask.tolist() == [[0, 0, 0, 0, 0, 0, 1, 1, 0, 1, 1, 1, 0]]


def test_a_caption_pair_for_understanding_learns_the_caption(tmp_path):
    document = [(IMAGE, [110, 111, 112]), (ANSWER, [2, 3])]
    # fmt: off
    check(
        render(tmp_path, document, "understanding", 9), Task.UNDERSTANDING,
        tokens  =[1, 102, 110, 111, 112, 103, 2, 3, 101],
        loss    =[0,   0,   0,   0,   0,   1, 1, 1,   0],
        modality=[0,   0,   1,   1,   1,   0, 0, 0,   0],
    )
    # fmt: on


def test_a_caption_pair_for_generation_learns_the_image(tmp_path):
    document = [(IMAGE, [110, 111, 112]), (ANSWER, [2, 3])]
    # fmt: off
    check(
        render(tmp_path, document, "generation", 9), Task.GENERATION,
        tokens  =[1, 2, 3, 102, 110, 111, 112, 103, 101],
        loss    =[0, 0, 0,   1,   1,   1,   0,   0,   0],
        modality=[0, 0, 0,   0,   1,   1,   1,   0,   0],
    )
    # fmt: on


def test_a_dropped_caption_leaves_the_image(tmp_path):
    document = [(IMAGE, [110, 111, 112]), (ANSWER, [2, 3])]
    batch = render(tmp_path, document, "generation", 9, caption_dropout=1.0)
    assert batch.tokens.tolist() == [[1, 102, 110, 111, 112, 103, 101, 100, 100]]
    assert batch.loss_mask.tolist() == [[0, 1, 1, 1, 0, 0, 0, 0, 0]]


IMAGES_AND_TEXTS = [
    (TEXT, [2]),
    (IMAGE, [110, 111, 112]),
    (TEXT, [3]),
    (ANSWER, [4]),
    (IMAGE, [113, 114, 115]),
    (TEXT, [5]),
]


def test_interleaved_images_follow_their_texts_one_by_one(tmp_path):
    document = IMAGES_AND_TEXTS
    # fmt: off
    check(
        render(tmp_path, document, "generation", 16), Task.GENERATION,
        tokens  =[1, 2, 3, 4, 102, 110, 111, 112, 103, 5, 102, 113, 114, 115, 103, 101],
        loss    =[0, 0, 0, 0,   1,   1,   1,   0,   0, 0,   1,   1,   1,   0,   0,   0],
        modality=[0, 0, 0, 0,   0,   1,   1,   1,   0, 0,   0,   1,   1,   1,   0,   0],
    )
    # fmt: on


def test_generation_text_learns_the_tokens_around_images_too(tmp_path):
    # fmt: off
    check(
        render(tmp_path, IMAGES_AND_TEXTS, "generation", 16, generation_text=True), Task.GENERATION,
        tokens  =[1, 2, 3, 4, 102, 110, 111, 112, 103, 5, 102, 113, 114, 115, 103, 101],
        loss    =[0, 0, 0, 1,   1,   1,   1,   1,   0, 1,   1,   1,   1,   1,   1,   0],
        modality=[0, 0, 0, 0,   0,   1,   1,   1,   0, 0,   0,   1,   1,   1,   0,   0],
    )
    # fmt: on
    dropped = render(tmp_path, IMAGES_AND_TEXTS, "generation", 16, generation_text=True, caption_dropout=1.0)
    assert dropped.tokens.tolist() == [[1, 102, 110, 111, 112, 103, 102, 113, 114, 115, 103, 101, *[100] * 4]]
    assert dropped.loss_mask.tolist() == [[0, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, *[0] * 5]]  # no <boi> without a caption


def test_interleaved_images_stay_in_stored_order_for_understanding(tmp_path):
    document = [(TEXT, [2]), (IMAGE, [110, 111, 112]), (ANSWER, [3]), (IMAGE, [113, 114, 115]), (ANSWER, [4])]
    # fmt: off
    check(
        render(tmp_path, document, "understanding", 16), Task.UNDERSTANDING,
        tokens  =[1, 2, 102, 110, 111, 112, 103, 3, 101, 102, 113, 114, 115, 103, 4, 101],
        loss    =[0, 0,   0,   0,   0,   0,   1, 1,   0,   0,   0,   0,   0,   1, 1,   0],
        modality=[0, 0,   0,   1,   1,   1,   0, 0,   0,   0,   1,   1,   1,   0, 0,   0],
    )
    # fmt: on


def test_plain_text_learns_everything(tmp_path):
    check(
        render(tmp_path, [(TEXT, [2, 3]), (TEXT, [4])], "text", 5),
        Task.TEXT,
        tokens=[1, 2, 3, 4, 101],
        loss=[1, 1, 1, 1, 0],
        modality=[0] * 5,
    )


@pytest.mark.parametrize("task", ["understanding", "generation"])
def test_the_rest_of_a_row_is_padding(tmp_path, task):
    document = [(IMAGE, [110, 111, 112]), (ANSWER, [2, 3])]
    batch = render(tmp_path, document, task, 21)
    assert batch.document.tolist() == [[0] * 9 + [1] * 9 + [-1] * 3]
    assert batch.positions.tolist() == [[*range(9), *range(9), 0, 0, 0]]
    assert batch.tokens[0, 18:].tolist() == batch.labels[0, 18:].tolist() == [100] * 3
    assert batch.labels[0, [8, 17]].tolist() == [100, 100]
    assert batch.loss_mask[0, 17:].tolist() == [0.0] * 4
    assert batch.modality[0, 18:].tolist() == [0] * 3
    assert batch.task[0, 18:].tolist() == [int(Task.TEXT)] * 3
    assert {name: str(getattr(batch, name).dtype).removeprefix("torch.") for name in batch.names()} == batch.DTYPES
