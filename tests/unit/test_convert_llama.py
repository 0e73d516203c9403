"""A Hugging Face Llama as a checkpoint to start from: it computes what Llama does on text, or is refused by name."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_ext import config_file, distributed
from megatron_ext.checkpoints.checkpointer import Checkpointer
from megatron_ext.config import Config
from megatron_ext.conversion.hugging_face import EMBEDDING, HEAD
from megatron_ext.conversion.llama import convert_llama
from megatron_ext.conversion.projections import convert
from megatron_ext.data.batch import Batch
from megatron_ext.errors import UserError
from megatron_ext.generation.checkpoint import load
from megatron_ext.model_config import RotaryScalingConfig
from megatron_ext.routing.plan import Plan
from megatron_ext.routing.route import Route
from megatron_ext.training.config_checks import validate
from megatron_ext.training.run import build_run, identity_of
from megatron_ext.training.setup import build_model, build_optimizer
from megatron_ext.transformer.resolved import resolve
from megatron_ext.vocabulary import Vocabulary
from support.data_sets import write_texts
from support.vocabularies import make_vocabulary

TOOL = Path(__file__).parents[2] / "tools" / "convert_hf.py"
TEXT_SIZE, CODES = 40, 300
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3["original_max_position_embeddings"] = 8192


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory) -> Vocabulary:
    return small_vocabulary(tmp_path_factory.mktemp("vocabulary"), "red rings left of", "blue bars")


def small_vocabulary(folder: Path, things: str, others: str) -> Vocabulary:
    sentences = [f"{n} {things} {n + 1} {others}" for n in range(99)]
    return make_vocabulary(folder / "vocabulary", CODES, sentences, pieces=TEXT_SIZE)


def make_llama(folder: Path, rows: int = TEXT_SIZE, dtype: torch.dtype = torch.float32, **settings):
    """A Llama in several shards, with weights that leave no term of it invisible."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 8}
    shape |= {"num_key_value_heads": 2, "max_position_embeddings": 16384}
    llama = LlamaForCausalLM(LlamaConfig(**shape | settings, vocab_size=rows)).to(dtype)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in llama.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        std = 0.3 if "embed" in name else 0.05 if "head" in name else 0.1
        parameter.data.copy_(1 + 0.2 * noise if parameter.dim() == 1 else std * noise)
    llama.save_pretrained(folder, max_shard_size="60KB")
    return llama


@torch.no_grad()
def logits_of_both(model, llama) -> tuple[torch.Tensor, torch.Tensor]:
    """[b, s, text pieces] of rows of text."""
    tokens = torch.randint(0, TEXT_SIZE, (2, 40), generator=torch.Generator().manual_seed(0))
    batch = Batch.zeros(*tokens.shape)
    batch.tokens, batch.positions = tokens, torch.arange(40).repeat(2, 1)
    everywhere = torch.ones(tokens.shape, dtype=torch.bool)
    route = Route.of(batch, Plan.of(Config().plan, model.config.num_layers), logit_mask=everywhere)
    return model(route).view(*tokens.shape, -1)[..., :TEXT_SIZE], llama(tokens).logits[..., :TEXT_SIZE]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("rotary", [None, LLAMA3], ids=["plain-rotary", "llama3-rotary"])
def test_logits_of_text_are_llama_s_in_a_run_that_starts_from_it(one_process, vocabulary, tmp_path, tied, rotary):
    llama = make_llama(tmp_path / "llama", tie_word_embeddings=tied, rope_parameters=rotary, rms_norm_eps=3e-6)
    assert len(list((tmp_path / "llama").glob("*.safetensors"))) > 2
    convert_llama(tmp_path / "llama", vocabulary, tmp_path / "start", seed=5)
    assert not torch.distributed.is_initialized()

    write_texts(tmp_path / "texts", vocabulary, [f"{n} red rings" for n in range(20)])
    # Of another shape and size of image tokens' positions: what the conversion wrote is laid over it.
    (tmp_path / "my.yaml").write_text("model: {num_layers: 6, num_query_groups: 1, max_image_tokens: 4}")
    config = config_file.load(
        Config,
        [tmp_path / "my.yaml", tmp_path / "start" / "model.yaml"],
        [
            f"output={tmp_path / 'run'}",
            f"checkpoint.load={tmp_path / 'start' / 'iter_0000000'}",
            f"data.vocabulary={vocabulary.folder}",
            f"data.train=[{{path: {tmp_path / 'texts'}, task: text}}]",
            "data.sequence_length=48",
            "training.seed=6",
        ],
    )
    validate(config, world_size=1)
    distributed.initialize(config)
    run = build_run(config)
    logits, expected = logits_of_both(run.chunks[0].module, llama)
    assert expected.std() > 0.1
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def run_tool(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["convert_hf.py", *map(str, arguments)])
    runpy.run_path(str(TOOL))["main"]()


def test_new_rows_are_initial_weights_with_the_spread_of_llama_s(one_process, vocabulary, tmp_path, monkeypatch):
    llama = make_llama(tmp_path / "llama")
    shutil.copy(vocabulary.folder / "tokenizer.model", tmp_path / "llama")
    start, numbers = tmp_path / "start" / "iter_0000000", tmp_path / "numbers.json"
    arguments = ("--llama", tmp_path / "llama", "--vocabulary", vocabulary.folder, "--out", start.parent)
    run_tool(monkeypatch, *arguments, "--seed", 5, "--json", numbers)

    model = load(start, []).model
    tables = {EMBEDDING: model.embedding.word_embeddings.weight, HEAD: model.output_layer.weight}
    llama_tables = {EMBEDDING: llama.model.embed_tokens.weight.detach(), HEAD: llama.lm_head.weight.detach()}
    seeded = config_file.load(Config, [start.parent / "model.yaml"], ["training.seed=5"])
    initial = dict(build_model(resolve(seeded, len(tables[HEAD])))[0].module.named_parameters())
    numbers = json.loads(numbers.read_text())
    for name, table in tables.items():
        assert torch.equal(table[:TEXT_SIZE], llama_tables[name])
        assert torch.equal(table[vocabulary.eod], llama_tables[name][vocabulary.text.end])
        std = float(llama_tables[name].std())
        assert numbers["new_rows_std"][name] == pytest.approx(std)
        new = [vocabulary.pad, vocabulary.boi, vocabulary.eoi, *range(vocabulary.image_offset, len(table))]
        torch.testing.assert_close(table[new], initial[name][new] * (std / 0.02))
        assert float(table[new].std()) == pytest.approx(std, rel=0.03)
        assert len(table[new].unique(dim=0)) == len(new)
    assert numbers["rows"] == {"llama": TEXT_SIZE + 1, "new": CODES + 3, "padding": 40, "left_out": 0}
    assert numbers["parameters"] == sum(p.numel() for p in model.parameters())


def test_bf16_stays_bf16_and_starts_runs_of_either_precision(one_process, vocabulary, tmp_path):
    from transformers import LlamaForCausalLM

    make_llama(tmp_path / "llama", dtype=torch.bfloat16)
    numbers = convert_llama(tmp_path / "llama", vocabulary, tmp_path / "start", seed=5)
    assert numbers["precision"] == "bf16"
    trained = load(tmp_path / "start" / "iter_0000000", [])
    assert {p.dtype for p in trained.model.parameters()} == {torch.bfloat16}
    trained = load(tmp_path / "start" / "iter_0000000", ["training.precision=float32"])
    assert {p.dtype for p in trained.model.parameters()} == {torch.float32}
    llama = LlamaForCausalLM.from_pretrained(tmp_path / "llama", dtype=torch.float32)
    torch.testing.assert_close(*logits_of_both(trained.model, llama), atol=1e-5, rtol=1e-5)


def test_rows_beyond_the_text_pieces_are_left_out(one_process, vocabulary, tmp_path):
    llama = make_llama(tmp_path / "llama", rows=TEXT_SIZE + 24)
    with pytest.raises(UserError, match="has 40 text pieces, the embedding of .*llama 64 rows, and no tokenizer.model"):
        convert_llama(tmp_path / "llama", vocabulary, tmp_path / "start", seed=5)
    pieces = {vocabulary.text.piece(i): i for i in range(TEXT_SIZE)}
    added = [{"id": TEXT_SIZE, "content": "<|user|>"}]
    write(tmp_path / "llama" / "tokenizer.json", {"model": {"vocab": pieces}, "added_tokens": added})
    assert convert_llama(tmp_path / "llama", vocabulary, tmp_path / "start", seed=5)["rows"]["left_out"] == 24
    trained = load(tmp_path / "start" / "iter_0000000", [])
    torch.testing.assert_close(*logits_of_both(trained.model, llama), atol=1e-5, rtol=1e-5)


def test_image_tokens_may_get_projections_of_their_own(one_process, vocabulary, tmp_path):
    llama = make_llama(tmp_path / "llama")
    convert_llama(tmp_path / "llama", vocabulary, tmp_path / "start", seed=5)
    convert(tmp_path / "start" / "iter_0000000", tmp_path / "split", ["plan.projections.kind=separate"])
    trained = load(tmp_path / "split" / "iter_0000000", [])
    assert trained.plan.projections.kind == "separate"
    torch.testing.assert_close(*logits_of_both(trained.model, llama), atol=1e-5, rtol=1e-5)


def test_a_run_cannot_go_on_from_weights_alone(one_process, vocabulary, tmp_path):
    make_llama(tmp_path / "llama")
    convert_llama(tmp_path / "llama", vocabulary, tmp_path / "start", seed=5)
    config = config_file.load(Config, [tmp_path / "start" / "model.yaml"])
    distributed.initialize(config)
    chunks = build_model(resolve(config, 384))
    path = tmp_path / "start" / "iter_0000000"
    with pytest.raises(UserError, match="iter_0000000: has only weights, .* checkpoint.load"):
        Checkpointer(path.parent).load(
            path, chunks, build_optimizer(config, chunks), identity_of(resolve(config), vocabulary)
        )


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "llama"
    make_llama(folder)
    return folder


def write(file: Path, value: dict) -> None:
    file.write_text(json.dumps(value))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mistral"}, "'model_type' is 'mistral', must be 'llama'"),
        ({"attention_bias": True}, "'attention_bias' is True, this model supports only False"),
        ({"mlp_bias": True}, "'mlp_bias' is True"),
        ({"hidden_act": "gelu"}, "'hidden_act' is 'gelu', this model supports only 'silu'"),
        ({"quantization_config": {"bits": 4}}, "'quantization_config' is {'bits': 4}"),
        ({"head_dim": 16}, r"'head_dim' is 16, this model supports only hidden_size / num_attention_heads \(64 / 8\)"),
        ({"num_key_value_heads": 3}, r"num_attention_heads \(8\) is not divisible by model.num_query_groups \(3\)"),
        ({"intermediate_size": None}, "'intermediate_size' is None, must be a whole number"),
        (
            {"rope_parameters": {"rope_type": "yarn"}},
            "'rope_type' is 'yarn', this model supports 'default' and 'llama3'",
        ),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2}}, "'rope_type' is 'linear'"),
        ({"rope_parameters": LLAMA3 | {"high_freq_factor": 8}}, "'high_freq_factor' of 'llama3' is 8, .* only 4"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "'partial_rotary_factor' is 0.5"),
    ],
)
def test_what_the_model_cannot_express_is_refused(saved, vocabulary, tmp_path, changes, message):
    llama = shutil.copytree(saved, tmp_path / "llama")
    write(llama / "config.json", json.loads((llama / "config.json").read_text()) | changes)
    with pytest.raises(UserError, match=f"^{llama}/config.json: .*{message}"):
        convert_llama(llama, vocabulary, tmp_path / "out", seed=5)
    assert not (tmp_path / "out").exists()


def test_older_configurations_are_understood(saved, vocabulary, tmp_path):
    llama = shutil.copytree(saved, tmp_path / "llama")
    config = json.loads((llama / "config.json").read_text())
    for key in ("rope_parameters", "head_dim", "attention_bias", "mlp_bias", "dtype", "tie_word_embeddings"):
        config.pop(key, None)
    write(llama / "config.json", config | {"rope_theta": 500000, "rope_scaling": LLAMA3, "torch_dtype": "float32"})
    convert_llama(llama, vocabulary, tmp_path / "out", seed=5)
    model = config_file.load(Config, [tmp_path / "out" / "model.yaml"]).model
    assert (model.rotary_base, model.rotary_scaling, model.tie_embeddings) == (
        500000.0,
        RotaryScalingConfig(8.0),
        False,
    )


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), "llama: lacks the parameter model.norm.weight"),
        (lambda t: t.update({"lora.weight": torch.ones(2)}), "has the parameter lora.weight, which a Llama of this"),
        (lambda t: t.update({"lm_head.weight": torch.ones(41, 64)}), r"has the shape \[41, 64\], .* it is \[40, 64\]"),
        (lambda t: t.update({"model.norm.weight": torch.ones(64).half().double()}), "of the type F64, must be BF16"),
    ],
)
def test_other_tensors_are_refused(saved, vocabulary, tmp_path, damage, message):
    tensors = {name: t for file in saved.glob("*.safetensors") for name, t in load_file(file).items()}
    damage(tensors)
    (tmp_path / "llama").mkdir()
    shutil.copy(saved / "config.json", tmp_path / "llama")
    save_file(tensors, tmp_path / "llama" / "model.safetensors")
    with pytest.raises(UserError, match=message):
        convert_llama(tmp_path / "llama", vocabulary, tmp_path / "out", seed=5)


def test_missing_and_damaged_files_are_named(saved, vocabulary, tmp_path):
    llama = shutil.copytree(saved, tmp_path / "llama")
    shard = min(llama.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(UserError, match=f"^{shard}: "):
        convert_llama(llama, vocabulary, tmp_path / "out", seed=5)
    shard.unlink()
    with pytest.raises(UserError, match=f"^{shard}: not found"):
        convert_llama(llama, vocabulary, tmp_path / "out", seed=5)
    (llama / "model.safetensors.index.json").unlink()
    with pytest.raises(UserError, match="llama: has neither model.safetensors nor model.safetensors.index.json"):
        convert_llama(llama, vocabulary, tmp_path / "out", seed=5)
    with pytest.raises(UserError, match="absent/config.json: .*No such file"):
        convert_llama(tmp_path / "absent", vocabulary, tmp_path / "out", seed=5)


def test_a_vocabulary_of_other_text_is_refused(saved, vocabulary, tmp_path):
    make_llama(tmp_path / "smaller", rows=TEXT_SIZE - 8)
    with pytest.raises(UserError, match="has 40 text pieces, the embedding of .* 32 rows"):
        convert_llama(tmp_path / "smaller", vocabulary, tmp_path / "out", seed=5)

    llama = shutil.copytree(saved, tmp_path / "llama")
    other = small_vocabulary(tmp_path, "green boxes above", "black dots")
    shutil.copy(other.folder / "tokenizer.model", llama)
    with pytest.raises(
        UserError, match=r"its text piece \d+ is '.+', that of .*tokenizer.model '.+'; a vocabulary must"
    ):
        convert_llama(llama, vocabulary, tmp_path / "out", seed=5)
    (llama / "tokenizer.model").unlink()
    write(llama / "tokenizer.json", {"model": {"vocab": {"<unk>": 0}}})
    with pytest.raises(UserError, match="its text piece 1 is '<s>', that of .*tokenizer.json missing"):
        convert_llama(llama, vocabulary, tmp_path / "out", seed=5)


def test_other_checkpoints_are_never_replaced(saved, vocabulary, tmp_path):
    (tmp_path / "out" / "iter_0000003").mkdir(parents=True)
    with pytest.raises(UserError, match="out: already holds checkpoints, such as iter_0000003"):
        convert_llama(saved, vocabulary, tmp_path / "out", seed=5)
