"""The tokenizer of an exported folder: the text model with the special tokens and VQ codes, and a chat template."""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer

from megatron_ext.errors import UserError
from megatron_ext.export_hf.chat_format import IMAGE_TOKEN, Glue, exported_chat_template
from megatron_ext.export_hf.sentencepiece_json import tokenizer_of
from megatron_ext.files import write_json, write_text
from megatron_ext.text_model import SentencePieceModel
from megatron_ext.vocabulary import SPECIAL_TOKENS, Vocabulary, code_name


def write_tokenizer(folder: Path, vocabulary: Vocabulary, sequence_length: int, with_images: bool) -> Glue:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja.

    Args:
        with_images: add ``<image>``, which stands for the codes of a picture.

    Returns:
        What stands before texts in prompts.

    Raises:
        UserError: the text model cannot be expressed as a tokenizer.json.
    """
    tokenizer = exported_tokenizer(vocabulary, with_images)
    tokenizer.save(str(folder / "tokenizer.json"))
    bos, end = (token_string(vocabulary, i) for i in (vocabulary.bos, vocabulary.answer_end))
    pad, _, boi, eoi = SPECIAL_TOKENS
    config = {
        # By this name no class of transformers rebuilds the tokenizer from code of its own.
        "tokenizer_class": "TokenizersBackend",
        "bos_token": bos,
        "eos_token": end,
        "pad_token": pad,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_max_length": sequence_length,
        "model_input_names": ["input_ids", "attention_mask"],
        "extra_special_tokens": {"boi_token": boi, "eoi_token": eoi},
    }
    if with_images:
        config["extra_special_tokens"]["image_token"] = IMAGE_TOKEN
    write_json(folder / "tokenizer_config.json", config)
    glue = Glue.of(vocabulary, tokenizer, bos, end)
    write_text(folder / "chat_template.jinja", exported_chat_template(vocabulary, tokenizer, glue, bos))
    return glue


def exported_tokenizer(vocabulary: Vocabulary, with_images: bool) -> Tokenizer:
    """The text model's tokenizer with ``<pad> <eod> <boi> <eoi> <vq_0> ...`` under their ids.

    Raises:
        UserError: as for :func:`write_tokenizer`.
    """
    file = vocabulary.text_file
    if isinstance(vocabulary.text, SentencePieceModel):
        tokenizer = tokenizer_of(file, in_templates=drops_leading_space(vocabulary))
    else:
        tokenizer = _with_all_ids(json.loads(file.read_text()), vocabulary.text_size)
    names = [*SPECIAL_TOKENS, *map(code_name, range(vocabulary.codebook_size))]
    names += [IMAGE_TOKEN] if with_images else []
    if taken := [name for name in names if tokenizer.token_to_id(name) is not None]:
        raise UserError(f"{file}: has a token {taken[0]!r} already, which would be that of images")
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in names])
    if tokenizer.token_to_id(names[-1]) != vocabulary.text_size + len(names) - 1:
        raise UserError(f"{file}: new tokens do not get the ids after its own")
    return tokenizer


def _with_all_ids(tokenizer: dict, size: int) -> Tokenizer:
    """A tokenizer.json whose ids have no holes: new tokens get the ids that follow the number of those there."""
    vocab = tokenizer["model"]["vocab"]
    if isinstance(vocab, dict):
        present = {*vocab.values(), *(token["id"] for token in tokenizer["added_tokens"])}
        vocab |= {f"<unused_{i}>": i for i in range(size) if i not in present}
    return Tokenizer.from_str(json.dumps(tokenizer))


def drops_leading_space(vocabulary: Vocabulary) -> bool:
    """Whether the exported tokenizer takes a space at the start of a string for the one that SentencePiece adds: only
    so can it leave out that space after the control tokens of a chat template."""
    return isinstance(vocabulary.text, SentencePieceModel) and vocabulary.chat_template is not None


def token_string(vocabulary: Vocabulary, token: int) -> str:
    """The string of a token of text or a special token."""
    if token < vocabulary.text_size:
        return vocabulary.text.piece(token)
    return SPECIAL_TOKENS[token - vocabulary.text_size]
