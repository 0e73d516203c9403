"""The tokenizer of an exported folder: the text model with the special tokens and VQ codes, and a chat template.

Every string of a prompt gets the ids that training gave it (:class:`Glue`).
"""

import json
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Tokenizer

from megatron_ext.errors import UserError
from megatron_ext.export_hf.sentencepiece_json import tokenizer_of
from megatron_ext.files import write_json, write_text
from megatron_ext.text_model import SentencePieceModel
from megatron_ext.vocabulary import SPECIAL_TOKENS, Vocabulary

IMAGE_TOKEN = "<image>"


def write_tokenizer(folder: Path, vocabulary: Vocabulary, sequence_length: int, with_images: bool) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja.

    Args:
        with_images: add ``<image>``, which stands for the codes of a picture.

    Raises:
        UserError: the text model cannot be expressed as a tokenizer.json.
    """
    tokenizer = exported_tokenizer(vocabulary, with_images)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = SPECIAL_TOKENS + ((IMAGE_TOKEN,) if with_images else ())
    pad, _, boi, eoi, *image = names
    config = {
        # By this name no class of transformers rebuilds the tokenizer from code of its own.
        "tokenizer_class": "TokenizersBackend",
        "bos_token": token_string(vocabulary, vocabulary.bos),
        "eos_token": token_string(vocabulary, vocabulary.answer_end),
        "pad_token": pad,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_max_length": sequence_length,
        "model_input_names": ["input_ids", "attention_mask"],
        "extra_special_tokens": {"boi_token": boi, "eoi_token": eoi} | ({"image_token": image[0]} if image else {}),
    }
    write_json(folder / "tokenizer_config.json", config)
    write_text(folder / "chat_template.jinja", chat_template(vocabulary, tokenizer))


def exported_tokenizer(vocabulary: Vocabulary, with_images: bool) -> Tokenizer:
    """The text model's tokenizer with ``<pad> <eod> <boi> <eoi> <vq_0> ...`` under their ids.

    Raises:
        UserError: as for :func:`write_tokenizer`.
    """
    file = vocabulary.text_file
    if isinstance(vocabulary.text, SentencePieceModel):
        tokenizer = tokenizer_of(file)
    else:
        tokenizer = _with_all_ids(json.loads(file.read_text()), vocabulary.text_size)
    names = [*SPECIAL_TOKENS, *(f"<vq_{code}>" for code in range(vocabulary.codebook_size))]
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


def token_string(vocabulary: Vocabulary, token: int) -> str:
    """The string of a token of text or a special token."""
    if token < vocabulary.text_size:
        return vocabulary.text.piece(token)
    return SPECIAL_TOKENS[token - vocabulary.text_size]


@dataclass(frozen=True)
class Glue:
    """What to write before a text so that the tokenizer gives it the ids that it has when encoded by itself.

    Attributes:
        opening, after_image, after_text, after_answer: by what stands before it.
    """

    opening: str
    after_image: str
    after_text: str
    after_answer: str

    @classmethod
    def of(cls, vocabulary: Vocabulary, tokenizer: Tokenizer) -> "Glue":
        """Found by trial.

        Raises:
            UserError: nothing gives the ids of training.
        """
        first, later = vocabulary.encode("a"), vocabulary.encode_segment("a")
        bos, end = vocabulary.bos, vocabulary.answer_end

        def find(before: str, before_ids: list[int], expected: list[int]) -> str:
            for glue in ("", " "):
                ids = tokenizer.encode(f"{before}{glue}a", add_special_tokens=False).ids
                if ids == before_ids + expected:
                    return glue
            raise UserError(f"{vocabulary.text_file}: a text after {before!r} does not get the ids of training")

        return cls(
            opening=find(token_string(vocabulary, bos), [bos], first),
            after_image=find("", [], later),  # the processor encodes what stands between images by itself
            after_text=find("a", first, later),
            after_answer=find(token_string(vocabulary, end), [end], later),
        )


def chat_template(vocabulary: Vocabulary, tokenizer: Tokenizer) -> str:
    """A Jinja template that writes conversations as training documents are written."""
    glue = Glue.of(vocabulary, tokenizer)
    return _PLAIN_LAYOUT.format(**{name: json.dumps(value) for name, value in vars(glue).items()})


_PLAIN_LAYOUT = """\
{{%- set state = namespace(glue={opening}) -%}}
{{{{- bos_token -}}}}
{{%- for message in messages -%}}
{{%- set parts = [{{"type": "text", "text": message.content}}] if message.content is string else message.content -%}}
{{%- for part in parts -%}}
{{%- if part.type == "text" and part.text -%}}
{{{{- state.glue + part.text -}}}}
{{%- set state.glue = {after_text} -%}}
{{%- elif part.type != "text" -%}}
{{{{- "<image>" -}}}}
{{%- set state.glue = {after_image} -%}}
{{%- endif -%}}
{{%- endfor -%}}
{{%- if message.role == "assistant" -%}}
{{{{- eos_token -}}}}
{{%- set state.glue = {after_answer} -%}}
{{%- endif -%}}
{{%- endfor -%}}
"""
