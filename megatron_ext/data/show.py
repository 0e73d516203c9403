"""Packed rows and stored documents in readable form: texts, images and learnt tokens."""

from itertools import groupby

from torch import Tensor

from megatron_ext.data.batch import Batch
from megatron_ext.data.format import Dataset, is_image
from megatron_ext.data.packed_rows import PackedRows
from megatron_ext.data.statistics import KINDS
from megatron_ext.errors import UserError
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
        codes = vocabulary.codes(tokens)[:, None] if batch.codes is None else batch.codes[0][selected]
        source = rows.mixture.sources[source_number]
        lines.append(
            f"  {source.layout.name.lower()}, document {document} of {source.path}, epoch {epoch}: "
            f"{len(tokens)} tokens, {int(loss.sum())} learnt"
        )
        lines.append(f"    {_readable(tokens, codes, loss, vocabulary)}")
    return "\n".join(lines)


def describe_document(dataset: Dataset, number: int, vocabulary: Vocabulary | None) -> list[dict]:
    """The sequences of a stored document: kind, tokens, and text or codes; ids where no vocabulary is given."""
    if not 0 <= number < len(dataset):
        raise UserError(f"{dataset.prefix}: has no document {number}, only 0 .. {len(dataset) - 1}")
    described = []
    for mode, ids in dataset.document(number):
        image = is_image(mode)
        entry = {"kind": KINDS[mode], "tokens": len(ids) // dataset.depth if image else len(ids)}
        if vocabulary is None:
            entry["ids"] = ids.tolist()
        elif image:
            entry["codes"] = (ids - vocabulary.image_offset).tolist()
        else:
            entry["text"] = vocabulary.decode(ids.tolist())
        described.append(entry)
    return described


def _readable(tokens: Tensor, codes: Tensor, loss: Tensor, vocabulary: Vocabulary) -> str:
    """Tokens [t], whose VQ codes are [t, D] if they are image tokens."""
    special = {
        **vocabulary.text.control,
        vocabulary.bos: "<bos>",
        vocabulary.eod: "<eod>",
        vocabulary.boi: "<boi>",
        vocabulary.eoi: "<eoi>",
        vocabulary.pad: "<pad>",
    }
    ids = tokens.tolist()
    kinds = [special.get(i) or ("image" if vocabulary.is_image(i) else "text") for i in ids]
    learnt = [False, *(loss[:-1] > 0).tolist()]
    spans = []
    for is_learnt, places in groupby(range(len(ids)), key=learnt.__getitem__):
        parts = []
        for kind, run in groupby(places, key=kinds.__getitem__):
            run = list(run)
            if kind == "text":
                parts.append(vocabulary.decode([ids[i] for i in run]))
            elif kind == "image":
                parts.append(_image(codes[run]))
            else:
                parts += [kind] * len(run)
        text = " ".join(parts)
        spans.append(f"[[{text}]]" if is_learnt else text)
    return " ".join(spans)


def _image(codes: Tensor) -> str:
    """Image tokens of D codes each, [t, D]: their number, and the codes of the first."""
    count, depth = codes.shape
    unit = "codes" if depth == 1 else f"tokens of {depth} codes"
    first = " ".join("/".join(map(str, of_token)) for of_token in codes[:4].tolist())
    return f"({count} {unit}: {first}{' ...' if count > 4 else ''})"


def statistics(batch: Batch) -> dict[str, float]:
    """Shares of padding, image tokens and learnt tokens in a batch of arrays, and its documents per row."""
    return {
        "padding": float((batch.document == PADDING_DOCUMENT).mean()),
        "image_tokens": float(batch.modality.mean()),
        "learnt_tokens": float((batch.loss_mask > 0).mean()),
        "documents_per_row": float((batch.document.max(axis=1) + 1).mean()),
    }
