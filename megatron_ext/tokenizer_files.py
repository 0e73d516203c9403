"""The tokenizer files of a published model: its text model, the tokens that it opens and ends documents and answers
with, its chat template.

The tokens are named in ``tokenizer_config.json``, ``special_tokens_map.json`` and ``generation_config.json``; the first
file that names one counts. Models that open documents with no token of their own (Qwen) read the end of the document
before; their documents here open with that token.
"""

from dataclasses import dataclass
from pathlib import Path

from megatron_ext import chat_template, text_model
from megatron_ext.chat_template import ChatTemplate
from megatron_ext.errors import UserError
from megatron_ext.files import read_json
from megatron_ext.text_model import SENTENCEPIECE, TOKENIZER_JSON, TextModel
from megatron_ext.vocabulary import CHAT_TEMPLATE

TOKENIZER_CONFIG, TOKENS_MAP, GENERATION_CONFIG = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
)
MODEL = "model"
"""As a chat template: that of the model itself."""


@dataclass
class TokenizerFiles:
    """What a model's files say.

    Attributes:
        file: its ``tokenizer.json`` or ``tokenizer.model``.
        bos, end: tokens that open and end documents; None if no file names one.
        answer_end: the token that ends answers, if a chat template is used.
        chat_template: the Jinja template, if one is used.
    """

    file: Path
    bos: str | None
    end: str | None
    answer_end: str | None
    chat_template: str | None


def read(
    source: Path, template: str | None = None, bos: str | None = None, answer_end: str | None = None
) -> TokenizerFiles:
    """Read the tokenizer files of a model.

    Args:
        source: ``tokenizer.json`` or ``tokenizer.model`` with the other files beside it, or their folder, in which
            ``tokenizer.json`` counts if it has both.
        template: the file of a chat template, ``"model"`` for the model's own, None to use none.
        bos, answer_end: the tokens that open documents and end answers, instead of those that the files name.

    Raises:
        UserError: a file is missing or damaged, or names a token that the tokenizer lacks; the chat template cannot be
            used.
    """
    file = _text_file(source)
    folder, model = file.parent, text_model.load(file)
    opens, ends = (_named(folder, kind, model, file) for kind in ("bos", "eos"))
    names = bos or (opens[0] if opens else None), ends[0] if ends else None
    used = None
    if template is not None:
        used, name = _own_template(folder) if template == MODEL else (_text(Path(template)), template)
        if used is None:
            raise UserError(f"{folder}: has no chat template; name the file of one instead of {MODEL!r}")
        answer_end = answer_end or chat_template.turn_end(used, name, model, *names)
        ChatTemplate(used, name, model, names[0], answer_end)  # refuses one that cannot be used
    turn_end = answer_end
    if turn_end is None and len(ends) > 1:
        turn_end = _own_turn_end(folder, model, *names)
    end = next((token for token in ends if token != turn_end), names[1])
    return TokenizerFiles(file, names[0], end, answer_end, used)


def _text_file(source: Path) -> Path:
    if not source.is_dir():
        return source
    for name in (TOKENIZER_JSON, SENTENCEPIECE):
        if (source / name).is_file():
            return source / name
    raise UserError(f"{source}: has neither {TOKENIZER_JSON} nor {SENTENCEPIECE}")


def _named(folder: Path, kind: str, model: TextModel, tokenizer: Path) -> list[str]:
    """The tokens of a kind, ``bos`` or ``eos``, in the order of files."""
    tokens = []
    for name in (TOKENIZER_CONFIG, TOKENS_MAP):
        file, key = folder / name, f"{kind}_token"
        token = _config(file).get(key)
        token = token.get("content") if isinstance(token, dict) else token
        if token is not None and (not isinstance(token, str) or model.id(token) is None):
            raise UserError(f"{file}: '{key}' is {token!r}, which {tokenizer} lacks")
        tokens.append(token)
    file, key = folder / GENERATION_CONFIG, f"{kind}_token_id"
    ids = _config(file).get(key)
    for i in ids if isinstance(ids, list) else [] if ids is None else [ids]:
        if not isinstance(i, int) or (token := model.piece(i)) is None:
            raise UserError(f"{file}: '{key}' has {i!r}, which {tokenizer} lacks")
        tokens.append(token)
    return list(dict.fromkeys(token for token in tokens if token is not None))


def _own_turn_end(folder: Path, model: TextModel, bos: str | None, eos: str | None) -> str | None:
    """The token that a model's own chat template writes after an answer; None if that is unknown, as of a damaged
    template, which is no error where no template is asked for."""
    try:
        source, name = _own_template(folder)
        return None if source is None else chat_template.turn_end(source, name, model, bos, eos)
    except UserError:
        return None


def _own_template(folder: Path) -> tuple[str | None, str]:
    """The chat template of a model, and the name of its file.

    Raises:
        UserError: the file cannot be read, or the template is not text.
    """
    file = folder / CHAT_TEMPLATE
    if file.is_file():
        return _text(file), str(file)
    file = folder / TOKENIZER_CONFIG
    template = _config(file).get("chat_template")
    if isinstance(template, list):  # several, each with a name
        named = [t for t in template if isinstance(t, dict) and t.get("name") == "default"]
        template = named[0].get("template") if named else None
    if template is not None and not isinstance(template, str):
        raise UserError(f"{file}: 'chat_template' is not a string")
    return template, str(file)


def _config(file: Path) -> dict:
    if not file.is_file():
        return {}
    config = read_json(file)
    if not isinstance(config, dict):
        raise UserError(f"{file}: not a JSON object")
    return config


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: {error}") from None
