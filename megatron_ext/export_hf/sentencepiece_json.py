"""A SentencePiece model as a tokenizer.json that gives the same ids.

The converters of transformers either lose the mark of a space that SentencePiece puts before every text, or treat a
leading space differently, so the parts are put together here.
"""

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from megatron_ext.errors import UserError

_SPACE = "\u2581"
_BPE = 2  # ModelType in SentencePiece's trainer_spec


def tokenizer_of(file: Path, in_templates: bool) -> Tokenizer:
    """The tokenizer of a BPE model in SentencePiece's form.

    Args:
        in_templates: text gets the mark of a space at the start of a string alone, as in the output of chat templates,
            and not after every control token.

    Raises:
        UserError: the model is of another kind, or rewrites its text.
    """
    from transformers.convert_slow_tokenizer import SentencePieceExtractor

    extractor = SentencePieceExtractor(str(file))
    trainer, normalizer = extractor.proto.trainer_spec, extractor.proto.normalizer_spec
    for wrong, what in (
        (trainer.model_type != _BPE, "is not a BPE model"),
        (normalizer.precompiled_charsmap != b"", "rewrites characters (normalization_rule_name)"),
        (normalizer.remove_extra_whitespaces, "drops spaces (remove_extra_whitespaces)"),
        (not normalizer.add_dummy_prefix, "does not begin texts with a space (add_dummy_prefix)"),
        (trainer.treat_whitespace_as_suffix, "has spaces as suffixes (treat_whitespace_as_suffix)"),
    ):
        if wrong:
            raise UserError(f"{file}: {what}, which tokenizer.json cannot express exactly")
    parts = extractor.extract(models.BPE)
    unknown = extractor.proto.pieces[trainer.unk_id].piece
    tokenizer = Tokenizer(
        models.BPE(
            parts["vocab"],
            parts["merges"],
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=trainer.byte_fallback,
            ignore_merges=False,
        )
    )
    if in_templates:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE, prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    control = [piece.piece for piece in extractor.proto.pieces if piece.type == 3]
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in control])
    return tokenizer
