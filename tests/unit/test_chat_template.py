"""Chat templates: segments together are what transformers renders and encodes; answers are what was answered."""

import pytest
from transformers import PreTrainedTokenizerFast

from megatron_ext import chat_template, tokenizer_files
from megatron_ext.chat_template import UnusableConversation
from megatron_ext.data.format import ANSWER, IMAGE, TEXT
from megatron_ext.errors import UserError
from megatron_ext.generation import prompts
from megatron_ext.text_model import load
from megatron_ext.vocabulary import Vocabulary
from support.text_models import CONTROL, byte_level, metaspace

BEGIN, END, TURN, EOT = CONTROL

CHATML = """\
{%- if messages[0].role != 'system' %}{{ '<|turn|>system\n42 is the left.<|eot|>\n' }}{% endif %}
{%- for message in messages %}
{{- '<|turn|>' + message.role + '\n' }}
{%- if message.role == 'assistant' and loop.last and not enable_thinking %}{{ '<tool>\n\n<tool>\n\n' }}{% endif %}
{{- message.content + '<|eot|>' + '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|turn|>assistant\n' }}
{%- if not enable_thinking %}{{ '<tool>\n\n<tool>\n\n' }}{% endif %}{% endif %}"""
HEADERS = """\
{{- bos_token }}
{%- if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}
{{- '<|turn|>system\n\nToday is ' + date_string + ' ' + strftime_now('%Y') + '<|eot|>' }}
{%- for message in messages %}
    {{- '<|turn|>' + message['role'] + '\n\n' + message['content'] | trim + '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|turn|>assistant\n\n' }}{% endif %}"""
STRICT = """\
{{ bos_token }}{% for message in messages %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{%- if message['role'] == 'user' %}{{ '<|turn|> ' + message['content'] + '<|turn|>' }}
{%- else %}{% generation %}{{ ' ' + message['content'] + ' ' + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"""
MODEL = """\
{{ bos_token }}{% for message in messages %}
{%- if message['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
{{- '<|turn|>' + role + '\n' + message['content'] | trim + '<|eot|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|turn|>model\n' }}{% endif %}"""
STYLES = {
    "chatml": (CHATML, byte_level, {}),
    "headers": (HEADERS, lambda file: byte_level(file, add_bos=True), {"bos": BEGIN}),
    "strict": (STRICT, metaspace, {"bos": BEGIN}),
    "strict, a space everywhere": (STRICT, lambda file: metaspace(file, "always"), {"bos": BEGIN}),
    "model": (MODEL, lambda file: metaspace(file, "never"), {"bos": BEGIN}),
}
CONVERSATION = [
    ("user", [(IMAGE, "a.png"), (TEXT, "what color is\nthe circle?")]),
    ("assistant", [(ANSWER, "Red 漢字 and ሰ.")]),
    ("user", [(TEXT, "compare"), (IMAGE, "b.png"), (TEXT, "with"), (IMAGE, "c.png")]),
    ("assistant", [(ANSWER, "no,not left\n of it")]),
]


class Family:
    """A tokenizer with a chat template, as a vocabulary and in transformers."""

    def __init__(self, folder, style: str, template: str | None = None):
        source, make, tokens = STYLES[style]
        self.source, file = template or source, make(folder / "tokenizer.json")
        answer_end = chat_template.turn_end(self.source, "template", load(file), tokens.get("bos"), EOT)
        self.vocabulary = Vocabulary.create(
            folder / "vocabulary", file, 50, end=END, answer_end=answer_end, chat_template=self.source, **tokens
        )
        self.reference = PreTrainedTokenizerFast(
            tokenizer_file=str(file), chat_template=self.source, bos_token=BEGIN, eos_token=EOT
        )

    @property
    def template(self):
        return chat_template.of(self.vocabulary)

    def rendered(self, turns, prompt: bool = False) -> str:
        """What transformers renders, on the day that templates are told."""
        messages = [
            {"role": role, "content": "".join("<image>" if mode == IMAGE else part for mode, part in parts)}
            for role, parts in turns
        ]
        day, year = (chat_template.DATE.strftime(form) for form in ("%d %b %Y", "%Y"))
        source = self.source.replace("strftime_now('%Y')", f"'{year}'")
        variables = {"date_string": day, "enable_thinking": False, "chat_template": source}
        return self.reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt, **variables)

    def ids(self, rendered: str) -> list:
        """The ids of transformers; images, as None, are cut out."""
        ids = []
        for stretch in rendered.split("<image>"):
            ids += [*self.reference(stretch, add_special_tokens=False).input_ids, None]
        return ids[:-1]

    def joined(self, segments) -> list:
        """Segments with what rendering adds, images as None."""
        ids = [self.vocabulary.bos] if "bos_token" in self.source else []
        for mode, item in segments:
            ids += [None] if mode == IMAGE else item
            ids += [self.vocabulary.answer_end] if mode == ANSWER else []
        return ids


@pytest.fixture(scope="module", params=STYLES)
def family(request, tmp_path_factory):
    return Family(tmp_path_factory.mktemp("family"), request.param)


def test_segments_put_together_are_what_transformers_encodes(family):
    segments = family.template.segments(CONVERSATION)
    assert family.joined(segments) == family.ids(family.rendered(CONVERSATION))
    assert [item for mode, item in segments if mode == IMAGE] == ["a.png", "b.png", "c.png"]
    assert all(a != b for (a, _), (b, _) in zip(segments, segments[1:]) if a != IMAGE)
    text_alone = [(role, [part for part in parts if part[0] != IMAGE]) for role, parts in CONVERSATION]
    messages = [{"role": role, "content": "".join(text for _, text in parts)} for role, parts in text_alone]
    if "date_string" not in family.source:
        whole = family.reference.apply_chat_template(messages, enable_thinking=False, return_dict=False)
        assert family.joined(family.template.segments(text_alone)) == whole


def test_answers_are_decoded_to_what_was_answered(family):
    vocabulary = family.vocabulary
    answers = [ids for mode, ids in family.template.segments(CONVERSATION) if mode == ANSWER]
    decoded = [vocabulary.decode_answer([*ids, vocabulary.answer_end]).strip() for ids in answers]
    assert decoded == [parts[0][1] for role, parts in CONVERSATION if role == "assistant"]


def test_what_is_asked_is_what_stood_before_the_answer_in_training(family):
    vocabulary, question = family.vocabulary, "what color is\nthe circle?"
    turns = [("user", [(IMAGE, None), (TEXT, question)]), ("assistant", [(ANSWER, "Red 42.")])]
    segments = family.template.segments(turns)
    before, answer = [list(segments[i]) for i in range(3)], segments[3]
    assert [mode for mode, _ in before] == [TEXT, IMAGE, TEXT] and answer[0] == ANSWER
    request = prompts.answer(vocabulary, [7, 8], question, 9)
    image = [vocabulary.boi, vocabulary.image_offset + 7, vocabulary.image_offset + 8, vocabulary.eoi]
    assert request.tokens == [vocabulary.bos, *before[0][1], *image, *before[2][1]]
    assert prompts.answer_tokens(vocabulary, question, "Red 42.") == [*answer[1], vocabulary.answer_end]
    expected = family.ids(family.rendered(turns[:1], prompt=True))
    assert family.joined(family.template.segments(turns[:1], prompt=True)) == expected


def test_space_around_what_is_asked_is_left_out(family):
    vocabulary, blank = family.vocabulary, " {}\n".format
    assert prompts.answer(vocabulary, [7], blank("what"), 9) == prompts.answer(vocabulary, [7], "what", 9)
    choice = prompts.answer_tokens(vocabulary, blank("what"), blank("red"))
    assert choice == prompts.answer_tokens(vocabulary, "what", "red")
    texts = ["what", "left"]
    assert prompts.edit(vocabulary, [[7], [8]], list(map(blank, texts))) == prompts.edit(vocabulary, [[7], [8]], texts)
    assert prompts.picture(vocabulary, blank("a circle")) == prompts.picture(vocabulary, "a circle")


def test_captions_are_plain_text(family):
    vocabulary = family.vocabulary
    expected = [vocabulary.bos, *vocabulary.encode(vocabulary.segment_prefix + "a circle"), vocabulary.boi]
    assert prompts.picture(vocabulary, "a circle").tokens == expected


def test_a_piece_across_the_border_of_an_answer_belongs_to_the_given_text(tmp_path):
    source = "{% for m in messages %}{{ '<|turn|>' if m.role == 'user' else '' }}{{ m.content }}"
    source += "{{ ' ' if m.role == 'user' else '<|eot|>' }}{% endfor %}"
    family = Family(tmp_path, "chatml", source)
    turns = [("user", [(TEXT, "what is it")]), ("assistant", [(ANSWER, "red green")])]
    (given, question), (answered, answer) = family.template.segments(turns)
    assert (given, answered) == (TEXT, ANSWER)
    assert family.vocabulary.decode(question).endswith("it red") and family.vocabulary.decode(answer) == " green"


def test_answers_that_meet_keep_an_end_each(tmp_path):
    user, answer = "'<|turn|>' + m.content + '<|turn|>'", "m.content + '<|eot|>'"
    source = "{% for m in messages %}{{ " + user + " if m.role == 'user' else " + answer + " }}"
    family = Family(tmp_path, "chatml", source + "{% endfor %}")
    turns = [("user", [(TEXT, "what")]), ("assistant", [(ANSWER, "red")]), ("assistant", [(ANSWER, "green")])]
    segments = family.template.segments(turns)
    assert [mode for mode, _ in segments] == [TEXT, ANSWER, ANSWER]
    assert family.joined(segments) == family.ids(family.rendered(turns))


@pytest.mark.parametrize(
    "content, reason",
    [
        (f"is {EOT} left", r"control token '<\|eot\|>': 'is <\|eot\|> left'$"),
        ("left " * 20 + EOT, r"control token '<\|eot\|>': '(left ){12}\.\.\.'$"),
        ("a \U0010fffd", "private planes"),
        ("\U000f0001", "private planes"),
    ],
)
def test_contents_that_would_be_mistaken_make_a_conversation_unusable(family, content, reason):
    with pytest.raises(UnusableConversation, match=reason):
        family.template.segments([("user", [(TEXT, content)]), ("assistant", [(ANSWER, "no")])])


def test_text_before_an_image_of_an_answer_makes_it_unusable_but_an_image_alone_does_not(family):
    drawn = [("user", [(TEXT, "what")]), ("assistant", [(IMAGE, "a")])]
    segments = family.template.segments(drawn)
    assert [mode for mode, _ in segments][:3] == [TEXT, IMAGE, TEXT]
    assert family.vocabulary.answer_end in segments[2][1]
    with pytest.raises(UnusableConversation, match="an answer has text before an image: 'no'"):
        family.template.segments([drawn[0], ("assistant", [(ANSWER, "no"), (IMAGE, "a"), (ANSWER, "left")])])


def test_what_a_template_refuses_is_unusable_and_named(tmp_path):
    family = Family(tmp_path, "strict")
    with pytest.raises(UnusableConversation, match="refuses it .roles must alternate"):
        family.template.segments([("assistant", [(ANSWER, "no")])])


@pytest.mark.parametrize(
    "content, message",
    [
        ("m.content | upper", "rewrites its texts"),
        ("m.content[:12]", "rewrites its texts"),
        ("m.content if m.role == 'assistant' else ''", "leaves out, repeats or reorders"),
        ("m.content + m.content", "leaves out, repeats or reorders"),
        ("m.content + ' ok'", r"does not end an answer with '<\|eot\|>'"),
        ("m.content if messages[0].bad.worse else ''", "refuses it"),
    ],
)
def test_templates_that_change_conversations_are_refused_by_name(tmp_path, content, message):
    source = "{% for m in messages %}{{ '<|turn|>' + m.role + '\n' + (" + content + ") + '<|eot|>' }}{% endfor %}"
    source += "{% if add_generation_prompt %}{{ '<|turn|>assistant\n' }}{% endif %}"
    file = byte_level(tmp_path / "tokenizer.json")
    vocabulary = Vocabulary.create(tmp_path / "v", file, 50, end=END, answer_end=EOT, chat_template=source)
    with pytest.raises(UserError, match=f"chat_template.jinja: .*{message}"):
        chat_template.of(vocabulary)


def test_a_conversation_that_a_template_rewrites_is_unusable(tmp_path):
    source = CHATML.replace("message.content +", "message.content.split('STOP')[0] +")
    family = Family(tmp_path, "chatml", source)
    turns = [("user", [(TEXT, "what")]), ("assistant", [(ANSWER, "no STOP left")])]
    with pytest.raises(UnusableConversation, match="rewrites its texts: 'no STOP left'"):
        family.template.segments(turns)


def test_a_generation_prompt_that_drifts_from_training_is_refused(tmp_path):
    family = Family(tmp_path, "chatml", CHATML.replace("{{ '<|turn|>assistant\n' }}", "{{ '<|turn|>model\n' }}"))
    with pytest.raises(UserError, match="generation prompt is not what it writes before an answer"):
        chat_template.of(family.vocabulary)


def test_a_vocabulary_without_a_token_that_ends_answers_refuses_a_template(tmp_path):
    file = byte_level(tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match="without a token that ends answers"):
        Vocabulary.create(tmp_path / "v", file, 50, end=END, chat_template=CHATML)
    vocabulary = Vocabulary.create(tmp_path / "v", file, 50, end=END)
    (vocabulary.folder / "chat_template.jinja").write_text(CHATML)
    with pytest.raises(UserError, match="chat_template.jinja: the vocabulary was made without a token"):
        chat_template.of(Vocabulary(vocabulary.folder))


def test_the_turn_end_of_each_style_is_found(family):
    assert family.vocabulary.answer_end == family.vocabulary.text.id(EOT)
    assert tokenizer_files.read(family.vocabulary.folder).chat_template is None
    names = tokenizer_files.read(family.vocabulary.folder, template="model", answer_end=EOT)
    assert names.chat_template == family.source
