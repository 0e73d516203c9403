"""From a folder of a published model to a trained and exported one, by the commands of docs/published_models.md."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_ext import text_model
from support.data_sets import write_pairs, write_texts
from support.forked_programs import run_forked
from support.published_models import LLAMA3, make_published
from support.text_models import CONTROL, byte_level, sentences
from support.tiny_vq import GRID, make_vq

BEGIN, END, *_ = CONTROL
CHAT = (
    "{% for m in messages %}<|turn|>{{ m.role }}\n{{ m.content }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)
STEPS = 20


def make_folder(folder: Path, family: str) -> Path:
    """A published model with its tokenizer files."""
    file = byte_level(folder / "tokenizer.json")
    config = {"bos_token": BEGIN, "eos_token": END, "chat_template": CHAT}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    settings = {"rope_parameters": LLAMA3} if family == "llama" else {}
    make_published(
        folder, family, rows=text_model.load(file).size + 3, tie_word_embeddings=family == "qwen3", **settings
    )
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.fixture(scope="module")
def vq(tmp_path_factory) -> Path:
    return make_vq(tmp_path_factory.mktemp("published") / "vq")


@pytest.mark.parametrize("family", ["llama", pytest.param("qwen2", marks=pytest.mark.slow), "qwen3"])
def test_a_published_model_is_trained_and_exported(tmp_path, vq, family):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from megatron_ext.vocabulary import Vocabulary

    folder, words, run = make_folder(tmp_path / "published", family), tmp_path / "vocabulary", tmp_path / "run"
    command = ["tools/train_tokenizer.py", "--from-model", folder, "--chat-template", "model", "--vq", vq]
    run_forked([*command, "--out", words])
    run_forked(["tools/convert_hf.py", "--model", folder, "--shape", tmp_path / "shape.yaml"])

    # What is converted and exported again at once is the published model, bit for bit.
    run_forked(["tools/convert_hf.py", "--model", folder, "--vocabulary", words, "--out", tmp_path / "start"])
    command = ["tools/export_hf.py", "--form", "plain", "--vq", vq]
    run_forked([*command, "--checkpoint", tmp_path / "start" / "iter_0000000", "--out", tmp_path / "again"])
    vocabulary = Vocabulary(words)
    published, again = tensors(folder), tensors(tmp_path / "again")
    assert again.keys() == published.keys()
    for name, tensor in published.items():
        rows = vocabulary.text_size if "embed_tokens" in name or "lm_head" in name else None
        assert torch.equal(again[name][:rows], tensor[:rows]), name

    # Trained under tensor, sequence and pipeline parallelism, straight from the folder.
    pairs = write_pairs(tmp_path / "pairs", vocabulary, [[sentence] for sentence in sentences(40)], [GRID, GRID])
    texts = write_texts(tmp_path / "texts", vocabulary, sentences(40, seed=1))
    data = [{"path": pairs, "task": task} for task in ("understanding", "generation")]
    overrides = {"output": run, "checkpoint.load": folder, "data.vocabulary": words, "data.sequence_length": 64}
    overrides |= {"data.train": json.dumps([*data, {"path": texts, "task": "text"}]), "training.iterations": STEPS}
    overrides |= {"parallel.tensor": 2, "parallel.pipeline": 2, "parallel.sequence": "true", "data.loader": "plain"}
    settings = [f"{key}={value}" for key, value in overrides.items()]
    run_forked(["pretrain_unified.py", "--config", tmp_path / "shape.yaml", *settings], processes=4)
    run_forked([*command, "--checkpoint", run, "--out", tmp_path / "exported"])

    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported").eval()
    assert exported.config.model_type == family
    ids = torch.randint(0, vocabulary.size, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = exported(ids).logits[..., : vocabulary.size]
        before = AutoModelForCausalLM.from_pretrained(tmp_path / "again")(ids).logits[..., : vocabulary.size]
    expected = trained_logits(run, ids)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert (logits - before).abs().max() > 0.01
    text = "what color is 42?"
    assert AutoTokenizer.from_pretrained(tmp_path / "exported").encode(text, add_special_tokens=False) == (
        vocabulary.encode(text)
    )


@torch.no_grad()
def trained_logits(run: Path, ids: torch.Tensor) -> torch.Tensor:
    """Logits of rows of tokens of a trained run, [rows, tokens, vocabulary]."""
    from megatron_ext import distributed
    from megatron_ext.generation.checkpoint import load
    from megatron_ext.generation.document_batch import document_batch
    from megatron_ext.routing.route import Route
    from megatron_ext.token_classes import Task

    trained = load(run, [])
    try:
        tasks = [[Task.UNDERSTANDING] * len(row) for row in ids]
        batch = document_batch(trained.vocabulary, ids.tolist(), tasks, torch.zeros(len(ids), dtype=torch.int64))
        route = Route.of(batch, trained.plan, logit_mask=torch.ones(ids.shape, dtype=torch.bool))
        logits = trained.model(route).squeeze(1).view(*ids.shape, -1)
        return logits[..., : trained.vocabulary.size]
    finally:
        distributed.shut_down()
