"""Packed rows: pure functions of their number, so that a run resumes exactly under any number of replicas."""

from collections import Counter

import numpy as np
import pytest
import torch

from megatron_ext.data import packed_rows as rows_module
from megatron_ext.data.composition import Composition
from megatron_ext.data.format import TEXT
from megatron_ext.data.packed_rows import NO_ROW, PackedRows
from megatron_ext.data.packed_tokens import PADDING, TASK
from megatron_ext.data.step_rows import StepRows
from megatron_ext.token_classes import PADDING_DOCUMENT, Modality, Task
from support.data_sets import SPECIAL, captions, mixture, write


def test_a_row_depends_on_its_number_alone(blend, monkeypatch):
    monkeypatch.setattr(rows_module, "BLOCK", 64)  # so that 500 rows are many blocks and several chunks
    whole = PackedRows(blend, 64).packed_tokens(0, 500)
    backwards = PackedRows(blend, 64)
    for row in (499, 250, 3, 251, 0):
        np.testing.assert_array_equal(backwards.packed_tokens(row, row + 1)[0], whole[row])
    np.testing.assert_array_equal(PackedRows(blend, 64).packed_tokens(100, 400), whole[100:400])


@pytest.mark.parametrize("replicas", [1, 2, 3, 5, 7, 13])
def test_resuming_under_another_number_of_replicas_gives_the_same_rows(blend, replicas):
    whole = PackedRows(blend, 64).packed_tokens(0, 60)
    shares = [StepRows(PackedRows(blend, 64), 12, replica, replicas, Composition(2)) for replica in range(replicas)]
    for step in (3, 4):  # resumed at step 3
        together = np.concatenate([share[step] for share in shares])
        assert [len(share[step]) for share in shares] == [share.shape[0] for share in shares]
        rows = together[(together & TASK != PADDING).any(axis=1)]
        np.testing.assert_array_equal(rows, whole[step * 12 : (step + 1) * 12])


def test_rows_by_task_hold_the_same_documents_and_one_task_each(blend, monkeypatch):
    monkeypatch.setattr(rows_module, "BLOCK", 64)
    mixed, by_task = PackedRows(blend, 64), PackedRows(blend, 64, by_task=True)
    tasks = [by_task[row].task[0][by_task[row].document[0] >= 0].unique().tolist() for row in range(120)]
    assert all(len(of_row) == 1 for of_row in tasks)
    # As evenly mixed as the samples: every task in every tenth of the rows.
    assert all({t for of_row in tasks[i : i + 12] for t in of_row} == {0, 1, 2} for i in range(0, 120, 12))
    assert any(len(mixed[row].task[0].unique()) > 1 for row in range(20))
    seen = Counter(document for row in range(400) for document in by_task.documents(row))
    expected = Counter(document for row in range(200) for document in mixed.documents(row))
    assert expected - seen == Counter()


def test_every_document_is_in_the_rows_once_per_epoch(tmp_path):
    rows = PackedRows(mixture((captions(tmp_path / "pairs", 90), "generation", 1.0)), 64)
    seen = Counter()
    for row in range(300):
        seen.update((document, epoch) for _, document, epoch in rows.documents(row))
    epochs = max(epoch for _, epoch in seen) - 1  # the last ones are still under way
    assert epochs >= 5
    assert all(seen[document, epoch] == 1 for document in range(90) for epoch in range(epochs))
    # Documents in order: rows of epoch 1 begin where those of epoch 0 end.
    assert len({document for row in range(10) for _, document, _ in rows.documents(row)}) == sum(
        len(rows.documents(row)) for row in range(10)
    )


def test_replicas_that_change_in_number_show_every_document_once_per_epoch(tmp_path, monkeypatch):
    monkeypatch.setattr(rows_module, "BLOCK", 64)
    pairs = captions(tmp_path / "pairs", 90)
    seen, step, random = Counter(), 0, np.random.default_rng(0)
    while step < 24:  # each time a new start, which knows the number of its first step alone
        rows = PackedRows(mixture((pairs, "understanding", 1.0)), 64)
        replicas, composition = int(random.choice([1, 5, 7, 11])), Composition(int(random.integers(1, 4)))
        for _ in range(random.integers(1, 8)):
            for replica in range(replicas):
                numbers = composition.row_numbers(rows, step, 11, replica, replicas)
                seen.update(shown for row in numbers[numbers != NO_ROW].tolist() for shown in rows.documents(row))
            step += 1
    epochs = max(epoch for *_, epoch in seen) - 1  # the last ones are still under way
    assert epochs >= 3
    assert all(seen[0, document, epoch] == 1 for document in range(90) for epoch in range(epochs))


def test_a_row_is_whole_documents_then_padding(blend):
    batch = blend_rows = PackedRows(blend, 64)
    for row in range(200):
        batch = blend_rows[row]
        document, positions = batch.document[0], batch.positions[0]
        used = int((document != PADDING_DOCUMENT).sum())
        assert (document[used:] == PADDING_DOCUMENT).all() and (batch.tokens[0, used:] == SPECIAL.pad).all()
        assert (document[:used].diff() >= 0).all() and (document[:used].diff() <= 1).all() and document[0] == 0
        starts = positions[:used] == 0
        assert int(starts.sum()) == int(document.max()) + 1 == len(blend_rows.documents(row))
        torch.testing.assert_close(positions[1:used][~starts[1:]], positions[: used - 1][~starts[1:]] + 1)
        last = torch.cat([starts[1:], torch.tensor([True])])
        assert (batch.labels[0, :used][last] == SPECIAL.pad).all() and not batch.loss_mask[0, :used][last].any()
        torch.testing.assert_close(batch.labels[0, : used - 1][~last[:-1]], batch.tokens[0, 1:used][~last[:-1]])
        for number, (source, _, _) in enumerate(blend_rows.documents(row)):
            assert (batch.task[0][document == number] == int(blend.sources[source].layout)).all()
        learnt = batch.loss_mask[0] > 0
        generation = batch.task[0] == int(Task.GENERATION)
        assert (batch.labels[0][learnt & generation] >= 104).all()
        assert (batch.labels[0][learnt & ~generation] < 104).all()
        torch.testing.assert_close(batch.modality[0] == int(Modality.IMAGE), batch.tokens[0] >= 104)


def test_a_long_text_is_cut_into_pieces_that_predict_every_token_once(tmp_path):
    lengths = [1, 30, 31, 32, 93, 200]
    stored = [list(np.random.default_rng(n).permutation(90)[: min(n, 90)] + 2) for n in lengths]
    stored = [(ids * 3)[:n] for ids, n in zip(stored, lengths)]
    rows = PackedRows(mixture((write(tmp_path / "set", [[(TEXT, ids)] for ids in stored]), "text", 1.0), length=32), 32)
    predicted, pieces = Counter(), Counter()
    for row in range(200):
        batch = rows[row]
        for number, (_, document, epoch) in enumerate(rows.documents(row)):
            if epoch == 0:
                learnt = (batch.document[0] == number) & (batch.loss_mask[0] > 0)
                predicted.update((document, label) for label in batch.labels[0][learnt].tolist())
                pieces[document] += 1
    assert predicted == Counter((i, token) for i, ids in enumerate(stored) for token in [*ids, SPECIAL.eod])
    assert [pieces[document] for document in range(6)] == [1, 1, 2, 2, 4, 7]


def test_pieces_of_a_long_text_are_spread_out(tmp_path):
    path = write(tmp_path / "set", [[(TEXT, [2 + n] * 2000)] for n in range(40)])
    rows = PackedRows(mixture((path, "text", 1.0), length=32), 32)
    documents = [rows.documents(row)[0][1] for row in range(2000)]
    assert np.mean(np.diff(documents) == 0) < 0.2
