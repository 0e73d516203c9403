"""Packed rows in readable form: their documents, texts, images and learnt tokens."""

from itertools import groupby

import torch

from megatron_ext.data.batch import Batch
from megatron_ext.data.packed_rows import PackedRows
from megatron_ext.token_classes import PADDING_DOCUMENT
from megatron_ext.vocabulary import Vocabulary


def describe_row(rows: PackedRows, row: int, vocabulary: Vocabulary) -> str:
    """A paragraph per document of a row, with learnt tokens between ``[[`` and ``]]``."""
    batch = rows[row]
    padding = int((batch.document == PADDING_DOCUMENT).sum())
    lines = [f"row {row}: {batch.shape[1] - padding} tokens, {padding} padding"]
    for number, (source_number, document, epoch) in enumerate(rows.documents(row)):
        selected = batch.document[0] == number
        tokens, loss = batch.tokens[0][selected], batch.loss_mask[0][selected]
        source = rows.mixture.sources[source_number]
        lines.append(
            f"  {source.layout.name.lower()}, document {document} of {source.path}, epoch {epoch}: "
            f"{len(tokens)} tokens, {int(loss.sum())} learnt"
        )
        lines.append(f"    {_readable(tokens, loss, vocabulary)}")
    return "\n".join(lines)


def _readable(tokens: torch.Tensor, loss: torch.Tensor, vocabulary: Vocabulary) -> str:
    special = {
        **vocabulary.text.control,
        vocabulary.bos: "<bos>",
        vocabulary.eod: "<eod>",
        vocabulary.boi: "<boi>",
        vocabulary.eoi: "<eoi>",
        vocabulary.pad: "<pad>",
    }
    learnt = [False, *(loss[:-1] > 0).tolist()]
    spans = []
    for is_learnt, group in groupby(zip(tokens.tolist(), learnt), key=lambda pair: pair[1]):
        ids, parts = [token for token, _ in group], []
        for kind, run in groupby(ids, key=lambda i: special.get(i) or ("image" if vocabulary.is_image(i) else "text")):
            run = list(run)
            if kind == "text":
                parts.append(vocabulary.decode(run))
            elif kind == "image":
                codes = " ".join(str(vocabulary.codes(i)) for i in run[:4])
                parts.append(f"({len(run)} codes: {codes}{' ...' if len(run) > 4 else ''})")
            else:
                parts += [kind] * len(run)
        text = " ".join(parts)
        spans.append(f"[[{text}]]" if is_learnt else text)
    return " ".join(spans)


def statistics(batch: Batch) -> dict[str, float]:
    """Shares of padding, image tokens and learnt tokens in a batch of arrays, and its documents per row."""
    return {
        "padding": float((batch.document == PADDING_DOCUMENT).mean()),
        "image_tokens": float(batch.modality.mean()),
        "learnt_tokens": float((batch.loss_mask > 0).mean()),
        "documents_per_row": float((batch.document.max(axis=1) + 1).mean()),
    }
