"""Conversations in the format of a language model: what its chat template writes, as segments of a document.

A chat template is a Jinja program that writes the turns of a conversation and control tokens around them. It does not
say where the turns are in its output, so a conversation is rendered twice: with a mark in place of each turn's content,
which shows the places, and with the contents. Both must agree, since templates may trim or rewrite what they are given.

::

    turns       user: [image] what color?              assistant: red
    rendered    <|im_start|>user [image]what color?<|im_end|> <|im_start|>assistant red<|im_end|> ...
    segments    TEXT             IMAGE  TEXT                                        ANSWER        TEXT

An answer is what follows the generation prompt, up to the token that ends answers, which rendering adds
(:mod:`megatron_ext.data.rendering`), as it adds the token that opens documents. The text between two images is encoded
as a whole, as the language model read it, and then cut into segments. A token that lies across the border of an answer
belongs to the given text.
"""

import hashlib
import json
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from functools import cache

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from megatron_ext.data.format import ANSWER, TEXT
from megatron_ext.errors import UserError
from megatron_ext.templates import NO_TEMPLATES, Templates
from megatron_ext.text_model import TextModel, any_of
from megatron_ext.vocabulary import CHAT_TEMPLATE, Vocabulary

DATE = datetime(2024, 7, 26)
"""The day that templates are told: text must not depend on when it was prepared."""

_IMAGE_MARK = "\U0010fffd"
_FIRST_TURN_MARK = 0xF0000
_DROPPED = -1  # mode of a token that rendering adds
_QUOTED = 60  # most characters of a text that a message quotes

Segments = list[tuple[int, object]]
"""(mode, text or token ids) and (mode, an image of any kind)."""

Turn = tuple[str, Segments]
"""A role, ``system``, ``user`` or ``assistant``, and what was said: texts and images."""


class UnusableConversation(UserError):
    """A conversation that a chat template cannot write."""


class ChatTemplate:
    """The chat template of a vocabulary."""

    def __init__(
        self,
        source: str,
        name: str,
        text: TextModel,
        bos: str | None,
        answer_end: str,
        templates: Templates = NO_TEMPLATES,
    ):
        """
        Args:
            name: of the template, for messages.
            bos, answer_end: tokens that open documents and end answers.
            templates: how images stand in what it writes.

        Raises:
            UserError: the template is damaged, or does not write a conversation in which answers can be found.
        """
        self._name, self._text = name, text
        self._bos, self._answer_end, self._templates = bos, answer_end, templates
        self._control = any_of(text.control.values())
        self._template = _compiled(source, name)
        self._lead = ""
        try:
            self._lead = self._find_lead()
            turns = [(role, [(mode, content)]) for role, mode, content in _PROBE]
            answers = [self._text.decode(ids).strip() for mode, ids in self.segments(turns) if mode == ANSWER]
        except UnusableConversation as error:
            raise UserError(f"{name}: {error}") from None
        if answers != [content for _, mode, content in _PROBE if mode == ANSWER]:
            raise UserError(f"{name}: the answers {answers} are not those of the conversation")

    def segments(self, turns: Sequence[Turn], prompt: bool = False, bare: bool = False) -> Segments:
        """The segments of a document without the token that opens it and those that end answers.

        Args:
            prompt: add the words after which an answer begins.
            bare: images stand without ``<boi>`` and ``<eoi>``, so that text after one never goes on.

        Returns:
            (mode, token ids) of texts; images as they are in ``turns``.

        Raises:
            UnusableConversation: the template refuses or rewrites the conversation, or a content has a control token.
        """
        for _, parts in turns:
            for mode, part in parts:
                if mode in (TEXT, ANSWER):
                    self._check(part)
        text, spans = self._spans(turns, prompt)
        continued = self._templates.text_after_image == "continued" and not bare
        images = iter(part for _, parts in turns for part in parts if part[0] not in (TEXT, ANSWER))
        segments: Segments = []
        for start, stretch in _stretches(text):
            if start:
                segments.append(next(images))
            for mode, ids in self._encode(stretch, start, spans, continued and start > 0):
                if segments and segments[-1][0] == mode:
                    segments[-1][1].extend(ids)
                else:
                    segments.append((mode, ids))
        return self._without_added(segments)

    def before_picture(self, caption: str) -> list[int]:
        """What stands between the token that opens documents and ``<boi>`` where a picture answers a caption; an empty
        caption gives an empty turn.

        Raises:
            UnusableConversation: as :meth:`segments`.
        """
        self._check(caption)
        text, found, _ = self._render(["user", "assistant"], [caption, _IMAGE_MARK], False).partition(_IMAGE_MARK)
        if not found or caption not in text:
            raise UnusableConversation(f"the chat template rewrites its texts: {_quoted(caption)}")
        return self._without_added([(TEXT, self._text.encode_template(text)[0])])[0][1]

    def _check(self, content: str) -> None:
        if found := self._control.search(content):
            raise UnusableConversation(f"a text has the control token {found[0]!r}: {_quoted(content)}")
        if any(ord(character) >= _FIRST_TURN_MARK for character in content):
            raise UnusableConversation(f"a text has a character of the private planes of Unicode: {_quoted(content)}")

    def _spans(self, turns: Sequence[Turn], prompt: bool) -> tuple[str, list[tuple[int, int]]]:
        """The rendered conversation, and (start, mode) of its stretches of one mode, in order."""
        contents = [self._content(parts) for _, parts in turns]
        roles = [role for role, _ in turns]
        marks = [chr(_FIRST_TURN_MARK + i) for i in range(len(turns))]
        marked = self._render(roles, marks, prompt)
        between = re.split("([" + "".join(marks) + "])", marked)
        if between[1::2] != marks:
            raise UnusableConversation("the chat template leaves out, repeats or reorders turns")
        between = between[::2]
        text = "".join(fixed + content for fixed, content in zip(between, [*contents, ""]))
        rendered = self._render(roles, contents, prompt)
        if rendered != text:
            changed = next((content for content in contents if content not in rendered), "".join(contents))
            raise UnusableConversation(f"the chat template rewrites its texts: {_quoted(changed)}")
        spans, place = [(0, TEXT)], 0
        for (role, parts), before, content, after in zip(turns, between, contents, between[1:]):
            place += len(before)
            if role == "assistant" and parts and parts[-1][0] == ANSWER:
                spans += self._answer(parts, place, before, len(content), after)
            place += len(content)
        return text, spans

    def _content(self, parts: Segments) -> str:
        """The content of a turn, with marks for images."""
        content = ""
        for number, (mode, part) in enumerate(parts):
            if mode in (TEXT, ANSWER):
                content += part
                continue
            content += self._templates.before_image if number else ""
            content += _IMAGE_MARK + (self._templates.after_image if number < len(parts) - 1 else "")
        return content

    def _answer(self, parts: Segments, place: int, before: str, length: int, after: str) -> list[tuple[int, int]]:
        """(start, mode) of an answer, its end, and what follows."""
        if before_image := [text for mode, text in parts[:-1] if mode == ANSWER]:
            raise UnusableConversation(f"an answer has text before an image: {_quoted(before_image[0])}")
        answer, end = place + length - len(parts[-1][1]), after.find(self._answer_end)
        if len(parts) == 1 and before.endswith(self._lead):
            answer -= len(self._lead)
        if end < 0 or after[:end].strip():
            reason = f"the chat template does not end an answer with {self._answer_end!r}"
            raise UnusableConversation(f"{reason}: {_quoted(parts[-1][1])}")
        end += place + length
        return [(answer, ANSWER), (end, _DROPPED), (end + len(self._answer_end), TEXT)]

    def _encode(self, stretch: str, start: int, spans: list[tuple[int, int]], continued: bool) -> Segments:
        """(mode, token ids) of text that begins at ``start``, cut where the mode changes."""
        starts, segments = [place for place, _ in spans], []
        # After a control token, which is left out again, text models know that a text goes on.
        lead = self._answer_end if continued else ""
        ids, offsets = self._text.encode_template(lead + stretch)
        start -= len(lead)
        for i, (begin, _) in list(zip(ids, offsets))[continued:]:
            # A piece across the border of an answer counts to what is given; none goes across its end, a control token.
            mode = spans[bisect_right(starts, start + begin) - 1][1]
            if segments and segments[-1][0] == mode:
                segments[-1][1].append(i)
            else:
                segments.append((mode, [i]))
        return segments

    def _without_added(self, segments: Segments) -> Segments:
        """Without the tokens that rendering adds, and without empty segments."""
        if segments and segments[0][0] == TEXT and self._text.piece(segments[0][1][0]) == self._bos:
            segments[0] = (TEXT, segments[0][1][1:])
        return [(mode, item) for mode, item in segments if mode != _DROPPED and item != []]

    def _render(self, roles: Sequence[str], contents: Sequence[str], prompt: bool) -> str:
        messages = [{"role": role, "content": content} for role, content in zip(roles, contents)]
        return _rendered(self._template, messages, self._bos, self._answer_end, prompt)

    def _find_lead(self) -> str:
        """What the template writes between the generation prompt and an answer: nothing or spaces."""
        roles, marks = ["user", "assistant"], [chr(_FIRST_TURN_MARK + i) for i in range(2)]
        prompt = self._render(roles[:1], marks[:1], True)
        whole = self._render(roles, marks, False)
        lead = whole.removeprefix(prompt).partition(marks[1])[0]
        if not whole.startswith(prompt) or lead.strip():
            raise UnusableConversation("its generation prompt is not what it writes before an answer")
        return lead


_PROBE = (
    ("user", TEXT, "Which One is it?"),
    ("assistant", ANSWER, "The 2nd."),
    ("user", TEXT, "and why"),
    ("assistant", ANSWER, "No Reason"),
)


@cache
def of(vocabulary: Vocabulary) -> ChatTemplate:
    """The chat template of a vocabulary that has one.

    Raises:
        UserError: it is damaged or cannot be used.
    """
    text, name = vocabulary.text, str(vocabulary.folder / CHAT_TEMPLATE)
    if vocabulary.answer_end == vocabulary.eod:
        raise UserError(f"{name}: the vocabulary was made without a token that ends answers; make it again")
    bos, answer_end = text.piece(vocabulary.bos), text.piece(vocabulary.answer_end)
    return ChatTemplate(vocabulary.chat_template, name, text, bos, answer_end, vocabulary.templates)


def description(vocabulary: Vocabulary) -> dict:
    """The template of a vocabulary that has one, for the metadata of a data set."""
    uses = {} if vocabulary.templates == NO_TEMPLATES else {"uses": asdict(vocabulary.templates)}
    return {"fingerprint": fingerprint(vocabulary), "source": vocabulary.chat_template, **uses}


def fingerprint(vocabulary: Vocabulary) -> str | None:
    """16 hexadecimal digits of the hash of a vocabulary's template and of its uses; None if it has none."""
    source = vocabulary.chat_template
    if source is None:
        return None
    uses = "" if vocabulary.templates == NO_TEMPLATES else json.dumps(asdict(vocabulary.templates))
    return hashlib.sha256((source + uses).encode()).hexdigest()[:16]


def turn_end(source: str, name: str, text: TextModel, bos: str | None, eos: str | None) -> str:
    """The control token that a template writes after an answer.

    Args:
        bos, eos: the tokens that templates know by these names.

    Raises:
        UserError: there is none.
    """
    marks = [chr(_FIRST_TURN_MARK + i) for i in range(2)]
    messages = [{"role": role, "content": mark} for role, mark in zip(("user", "assistant"), marks)]
    try:
        rendered = _rendered(_compiled(source, name), messages, bos, eos, False)
    except UnusableConversation as error:
        raise UserError(f"{name}: {error}") from None
    after = rendered.partition(marks[1])[2].lstrip()
    tokens = [token for token in text.control.values() if after.startswith(token)]
    if not tokens:
        raise UserError(f"{name}: writes no control token after an answer; name one with --answer-end TOKEN")
    return max(tokens, key=len)


def _quoted(text: str) -> str:
    """The beginning of a text, for messages."""
    text = text.replace(_IMAGE_MARK, "[image]")
    return repr(text if len(text) <= _QUOTED else text[:_QUOTED] + "...")


def _stretches(text: str) -> list[tuple[int, str]]:
    """(start, text) of what stands before, between and after images."""
    stretches, start = [], 0
    for stretch in text.split(_IMAGE_MARK):
        stretches.append((start, stretch))
        start += len(stretch) + 1
    return stretches


class _Generation(jinja2.ext.Extension):
    """``{% generation %}`` ... ``{% endgeneration %}``, by which some templates mark answers."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list:
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)


def _compiled(source: str, name: str) -> jinja2.Template:
    """The template in the environment in which transformers runs it, except that the day is always the same.

    transformers itself takes seconds to import.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )

    def raise_exception(message: str):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": DATE.strftime}
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise UserError(f"{name}: not a Jinja template ({error})") from None


def _rendered(template: jinja2.Template, messages: list[dict], bos: str | None, eos: str | None, prompt: bool) -> str:
    tokens = {name: token for name, token in (("bos_token", bos), ("eos_token", eos)) if token is not None}
    variables = {**tokens, "date_string": DATE.strftime("%d %b %Y"), "enable_thinking": False}
    try:
        return template.render(messages=messages, tools=None, documents=None, add_generation_prompt=prompt, **variables)
    except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
        raise UnusableConversation(f"the chat template refuses it ({error})") from None
