"""The chat template of an exported folder: a generic client that applies it asks as training did."""

import json
import re
from dataclasses import asdict, dataclass

from tokenizers import Tokenizer

from megatron_ext import chat_template
from megatron_ext.data.format import TEXT
from megatron_ext.errors import UserError
from megatron_ext.vocabulary import SPECIAL_TOKENS, Vocabulary

IMAGE_TOKEN = "<image>"


@dataclass(frozen=True)
class Glue:
    """What to write before a text so that the exported tokenizer gives it the ids that training gave it.

    Attributes:
        opening, alone, after_image, after_text, after_answer: by what stands before it: the token that opens documents,
            nothing (the processor encodes what follows an image by itself), ``<eoi>`` in a question, another text, the
            token that ends answers.
    """

    opening: str
    alone: str
    after_image: str
    after_text: str
    after_answer: str

    @classmethod
    def of(cls, vocabulary: Vocabulary, tokenizer: Tokenizer, bos: str, end: str) -> "Glue":
        """Found by trial.

        Args:
            bos, end: the strings of the tokens that open documents and end answers.

        Raises:
            UserError: nothing gives the ids of training.
        """
        first, later = vocabulary.encode("a"), vocabulary.encode_segment("a")
        in_question = later if vocabulary.chat_template is None else list(vocabulary.text.encode_template("a")[0])

        def find(before: str, before_ids: list[int], expected: list[int]) -> str | None:
            for glue in ("", " "):
                if tokenizer.encode(f"{before}{glue}a", add_special_tokens=False).ids == before_ids + expected:
                    return glue
            return None

        glue = {
            "opening": find(bos, [vocabulary.bos], first),
            "alone": find("", [], later),
            "after_image": find(SPECIAL_TOKENS[-1], [vocabulary.eoi], in_question),
            "after_answer": find(end, [vocabulary.answer_end], later),
        }
        if None in glue.values():
            raise UserError(f"{vocabulary.text_file}: texts do not get the ids of training from an exported tokenizer")
        # A model with pieces across spaces cannot encode two texts in a string as it encodes them apart.
        after_text = find("a", first, later)
        return cls(after_text=" " if after_text is None else after_text, **glue)


def exported_chat_template(vocabulary: Vocabulary, tokenizer: Tokenizer, glue: Glue, bos: str) -> str:
    """A Jinja template that writes conversations as training documents are written: by the vocabulary's template, or
    with nothing but the texts, images and ends of answers.

    Args:
        bos: the string of the token that opens documents.

    Raises:
        UserError: the exported tokenizer gives the template's output other ids.
    """
    source = vocabulary.chat_template
    if source is None:
        return _PLAIN_LAYOUT % {name: json.dumps(text) for name, text in asdict(glue).items()}
    formats = sorted(set(re.findall(r"strftime_now\(\s*['\"]([^'\"]*)['\"]", source)))
    days = {text: chat_template.DATE.strftime(text) for text in formats}
    day = chat_template.DATE.strftime("%d %b %Y")
    for opening in ("", " "):
        settings = {"days": days, "day": day, "opening": opening, "bos": bos}
        parts = {name: json.dumps(value) for name, value in settings.items()}
        template = _FAMILY % (parts | {"source": source.removesuffix("\n")})  # as Jinja drops a last newline
        if _gives_ids_of_training(template, vocabulary, tokenizer, bos):
            return template
    raise UserError(f"{vocabulary.folder}: what its chat template writes does not get the ids of training")


def _gives_ids_of_training(template: str, vocabulary: Vocabulary, tokenizer: Tokenizer, bos: str) -> bool:
    """Whether a prompt of the template, encoded as a whole, is that of training documents."""
    from transformers.utils.chat_template_utils import render_jinja_template

    segments = chat_template.of(vocabulary).segments([("user", [(TEXT, _PROBE)])], prompt=True)
    conversation = [{"role": "user", "content": [{"type": "text", "text": _PROBE}]}]
    end = vocabulary.text.piece(vocabulary.answer_end)
    (text,), _ = render_jinja_template(
        [conversation], chat_template=template, add_generation_prompt=True, bos_token=bos, eos_token=end
    )
    expected = [vocabulary.bos, *(i for _, ids in segments for i in ids)]
    return tokenizer.encode(text, add_special_tokens=False).ids == expected


_PROBE = "Which one is it?"

_PLAIN_LAYOUT = """\
{%%- set state = namespace(glue=%(opening)s) -%%}
{{- bos_token -}}
{%%- for message in messages -%%}
{%%- set parts = [{"type": "text", "text": message.content}] if message.content is string else message.content -%%}
{%%- for part in parts -%%}
{%%- if part.type != "text" -%%}
{{- "<image>" -}}
{%%- set state.glue = %(alone)s -%%}
{%%- elif part.text -%%}
{{- ("" if part.text.startswith("<boi>") else state.glue) + part.text -}}
{%%- set state.glue = %(after_text)s -%%}
{%%- endif -%%}
{%%- endfor -%%}
{%%- if message.role == "assistant" and parts and parts[-1].type == "text" -%%}
{{- eos_token -}}
{%%- set state.glue = %(after_answer)s -%%}
{%%- endif -%%}
{%%- endfor -%%}
"""

_FAMILY = """\
{#- Conversations come with lists of parts, which the template below may not know; the day is that of training. -#}
{%%- set state = namespace(messages=[], text="") -%%}
{%%- for message in messages -%%}
{%%- if message.content is string -%%}
{%%- set state.text = message.content -%%}
{%%- else -%%}
{%%- set state.text = "" -%%}
{%%- for part in message.content -%%}
{%%- set state.text = state.text + (part.text if part.type == "text" else "<image>") -%%}
{%%- endfor -%%}
{%%- endif -%%}
{%%- set state.messages = state.messages + [dict(message, content=state.text)] -%%}
{%%- endfor -%%}
{%%- set messages = state.messages -%%}
{%%- macro strftime_now(format) -%%}{{- %(days)s[format] -}}{%%- endmacro -%%}
{%%- set date_string = %(day)s -%%}
{%%- set enable_thinking = false -%%}
{%%- set written %%}
%(source)s{%% endset -%%}
{%%- set written = written if written.startswith(%(bos)s) else %(bos)s + written -%%}
{{- written | replace(%(bos)s, %(bos)s + %(opening)s) -}}
"""
