"""Small files ``tokenizer.json`` of the kinds that published models have, trained in a moment."""

import json
import random
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

CONTROL = ("<|begin|>", "<|end|>", "<|turn|>", "<|eot|>")
"""Control tokens of every such file: open and end a document, begin and end a turn."""

HOLES = 5
"""Ids before the control tokens that stand for nothing."""

WORDS = ["a", "red", "green", "circle", "is", "left", "of", "the", "what", "color", "two", "42", "émigré", "漢字", "no"]


def sentences(count: int = 300, seed: int = 0) -> list[str]:
    """Random text."""
    draw = random.Random(seed)
    return [
        " ".join(draw.choices(WORDS, k=draw.randint(1, 9))) + draw.choice((".", "?", "\n", "")) for _ in range(count)
    ]


def byte_level(file: Path, add_bos: bool = False) -> Path:
    """Like Llama 3 and Qwen: byte-level BPE, NFC, a post-processor that adds BOS, ids with holes."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*| ?\p{L}+|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    return _finished(tokenizer, trainer, file, trim=True, add_bos=add_bos)


def metaspace(file: Path, prepend_scheme: str = "first") -> Path:
    """Like Mistral (``first``), Llama 2 (``always``) and Gemma (``never``): spaces as ▁, bytes for what is unknown."""
    tokenizer = tokenizers.Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme, split=False)
    strip = [] if prepend_scheme == "never" else [decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    units = ["<unk>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=units, show_progress=False, max_token_length=8)
    return _finished(tokenizer, trainer, file)


def _finished(tokenizer, trainer, file: Path, trim: bool = False, add_bos: bool = False) -> Path:
    tokenizer.train_from_iterator(sentences(), trainer)
    content = json.loads(tokenizer.to_str())
    vocabulary = content["model"]["vocab"]
    first = max(vocabulary.values()) + 1 + HOLES
    content["added_tokens"] = []
    for i, token in enumerate((*CONTROL, "<tool>"), first):
        vocabulary[token] = i
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        content["added_tokens"].append({"id": i, "content": token, "special": token in CONTROL, **flags})
    parts = [{"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}] if trim else []
    if add_bos:
        bos = {"SpecialToken": {"id": CONTROL[0], "type_id": 0}}
        text = {"Sequence": {"id": "A", "type_id": 0}}
        special = {CONTROL[0]: {"id": CONTROL[0], "ids": [first], "tokens": [CONTROL[0]]}}
        parts.append(
            {"type": "TemplateProcessing", "single": [bos, text], "pair": [bos, text], "special_tokens": special}
        )
    if parts:
        content["post_processor"] = {"type": "Sequence", "processors": parts}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, ensure_ascii=False))
    return file
