"""A published model as the start of a run: it computes what it does in transformers on text, or is refused by name."""

import dataclasses
import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file

from megatron_ext import config_file, distributed
from megatron_ext.checkpoints.checkpointer import Checkpointer
from megatron_ext.config import Config
from megatron_ext.conversion.projections import convert
from megatron_ext.conversion.published_model import convert_published, write_shape
from megatron_ext.data.batch import Batch
from megatron_ext.errors import UserError
from megatron_ext.export_hf.tokenizer_files import exported_tokenizer
from megatron_ext.generation.checkpoint import load
from megatron_ext.hugging_face.config_json import model_config
from megatron_ext.hugging_face.folder import ModelFolder
from megatron_ext.hugging_face.loading import require_same_shape
from megatron_ext.model_config import RotaryScalingConfig
from megatron_ext.routing.plan import Plan
from megatron_ext.routing.route import Route
from megatron_ext.training.config_checks import validate
from megatron_ext.training.run import build_run, identity_of
from megatron_ext.training.setup import build_model, build_optimizer
from megatron_ext.transformer.resolved import resolve
from megatron_ext.vocabulary import Vocabulary
from support.data_sets import write_texts
from support.exported import llama_vocabulary
from support.published_models import FAMILIES, LINEAR, LLAMA3, OTHER_EDGES, make_published
from support.vocabularies import make_vocabulary

TOOL = Path(__file__).parents[2] / "tools" / "convert_hf.py"
TEXT_SIZE, CODES = 40, 300
EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory) -> Vocabulary:
    return small_vocabulary(tmp_path_factory.mktemp("vocabulary"), "red rings left of", "blue bars")


def small_vocabulary(folder: Path, things: str, others: str) -> Vocabulary:
    sentences = [f"{n} {things} {n + 1} {others}" for n in range(99)]
    return make_vocabulary(folder / "vocabulary", CODES, sentences, pieces=TEXT_SIZE)


@torch.no_grad()
def logits_of_both(model, published) -> tuple[torch.Tensor, torch.Tensor]:
    """[b, s, text tokens] of rows of text, at positions from 0 to past the edges of Llama 3's rotary scaling."""
    tokens = torch.randint(0, TEXT_SIZE, (2, 40), generator=torch.Generator().manual_seed(0))
    positions = (torch.arange(40) * 300).repeat(2, 1)
    batch = Batch.zeros(*tokens.shape)
    batch.tokens, batch.positions = tokens, positions
    everywhere = torch.ones(tokens.shape, dtype=torch.bool)
    route = Route.of(batch, Plan.of(Config().plan, model.config.num_layers), logit_mask=everywhere)
    logits = model(route).view(*tokens.shape, -1)[..., :TEXT_SIZE]
    return logits, published(tokens, position_ids=positions).logits[..., :TEXT_SIZE]


def run_from(folder: Path, vocabulary: Vocabulary, tmp_path: Path, load: Path, *overrides: str):
    """A run of ``folder``/model.yaml's shape on some texts that starts from ``load``."""
    write_texts(tmp_path / "texts", vocabulary, [f"{n} red rings" for n in range(20)])
    # Of another shape and size of image tokens' positions: what the conversion wrote is laid over it.
    (tmp_path / "my.yaml").write_text("model: {num_layers: 6, num_query_groups: 1, max_image_tokens: 4, head_size: 2}")
    config = config_file.load(
        Config,
        [tmp_path / "my.yaml", folder / "model.yaml"],
        [
            f"output={tmp_path / 'run'}",
            f"checkpoint.load={load}",
            f"data.vocabulary={vocabulary.folder}",
            f"data.train=[{{path: {tmp_path / 'texts'}, task: text}}]",
            "data.sequence_length=48",
            "training.seed=6",
            *overrides,
        ],
    )
    validate(config, world_size=1)
    distributed.initialize(config)
    return build_run(config)


CASES = [(family, tied, {}) for family in FAMILIES for tied in (False, True)]
CASES += [("llama", False, {"rope_parameters": LLAMA3}), ("qwen3", True, {"rope_parameters": OTHER_EDGES})]
CASES += [("llama", False, {"rope_parameters": LINEAR})]


@pytest.mark.parametrize(
    ("family", "tied", "rotary"),
    CASES,
    ids=lambda value: (
        str(value.get("rope_parameters", {}).get("factor", "")) if isinstance(value, dict) else str(value)
    ),
)
def test_logits_of_text_are_the_model_s_in_a_run_that_starts_from_it(
    one_process, vocabulary, tmp_path, family, tied, rotary
):
    folder = tmp_path / "published"
    published = make_published(folder, family, tie_word_embeddings=tied, rms_norm_eps=3e-6, **rotary)
    assert len(list(folder.glob("*.safetensors"))) > 2
    convert_published(folder, vocabulary, tmp_path / "start", seed=6)
    assert not torch.distributed.is_initialized()

    run = run_from(tmp_path / "start", vocabulary, tmp_path, tmp_path / "start" / "iter_0000000")
    logits, expected = logits_of_both(run.chunks[0].module, published)
    assert expected.std() > 0.1
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    converted = {name: weight.clone() for name, weight in run.chunks[0].module.named_parameters()}
    distributed.shut_down()

    run = run_from(tmp_path / "start", vocabulary, tmp_path, folder)
    for name, weight in run.chunks[0].module.named_parameters():
        assert torch.equal(weight, converted[name]), name


@pytest.mark.parametrize("kind", ["separate", "delta"])
def test_a_run_with_image_projections_may_start_from_the_folder(one_process, vocabulary, tmp_path, kind):
    published = make_published(tmp_path / "published", "qwen2")
    (tmp_path / "shape").mkdir()
    write_shape(ModelFolder(tmp_path / "published"), tmp_path / "shape" / "model.yaml")
    projections = (f"plan.projections.kind={kind}", "plan.projections.modules=[qkv,proj,fc1,fc2]")
    overrides = (*projections, "model.max_image_tokens=9")
    run = run_from(tmp_path / "shape", vocabulary, tmp_path, tmp_path / "published", *overrides)
    parameters = dict(run.chunks[0].module.named_parameters())
    torch.testing.assert_close(*logits_of_both(run.chunks[0].module, published), atol=1e-5, rtol=1e-5)
    components = [name for name in parameters if ".image_" in name]
    assert len(components) == 8
    for name in components:
        own = parameters[name.rsplit(".", 1)[0] + ".weight"] if kind == "separate" else torch.zeros(())
        assert (parameters[name] == own).all()


def test_a_written_shape_wins_over_an_example_s_and_leaves_the_positions_inside_images(tmp_path):
    make_published(tmp_path / "published", "qwen3", tie_word_embeddings=True)
    shape = write_shape(ModelFolder(tmp_path / "published"), tmp_path / "shape.yaml")
    example = Path(__file__).parents[2] / "examples" / "configs" / "llama-3.2-1b.yaml"
    (tmp_path / "own.yaml").write_text("model: {rotary_scaling_factor: 8, rotary_scaling: null, max_image_tokens: 4}")
    for below in ([example], [example, tmp_path / "own.yaml"]):
        model = config_file.load(Config, [*below, shape]).model
        assert model.rotary_scaling is None
        assert model.identity == ModelFolder(tmp_path / "published").model.identity | {
            "max_image_tokens": 4 * (len(below) - 1)
        }


def test_a_model_with_all_tokens_of_the_vocabulary_gives_all_their_rows(one_process, tmp_path):
    vocabulary = llama_vocabulary(tmp_path / "vocabulary")
    published = make_published(tmp_path / "published", rows=vocabulary.size + 3)
    exported_tokenizer(vocabulary, with_images=False).save(str(tmp_path / "published" / "tokenizer.json"))
    numbers = convert_published(tmp_path / "published", vocabulary, tmp_path / "start", seed=5)
    assert numbers["rows"] == {"published": vocabulary.size, "new": 0, "padding": -vocabulary.size % 128, "left_out": 3}
    model = load(tmp_path / "start" / "iter_0000000", []).model
    for table, expected in zip((model.embedding.word_embeddings, model.output_layer), published.children()):
        expected = (expected.embed_tokens if hasattr(expected, "embed_tokens") else expected).weight
        assert torch.equal(table.weight[: vocabulary.size], expected[: vocabulary.size])


def test_tokens_without_a_row_start_as_new_ones(one_process, vocabulary, tmp_path):
    published = make_published(tmp_path / "published", rows=TEXT_SIZE - 2)
    shutil.copy(vocabulary.folder / "tokenizer.model", tmp_path / "published")
    numbers = convert_published(tmp_path / "published", vocabulary, tmp_path / "start", seed=5)
    assert numbers["rows"] == {"published": TEXT_SIZE - 1, "new": CODES + 5, "padding": 40, "left_out": 0}
    table = load(tmp_path / "start" / "iter_0000000", []).model.embedding.word_embeddings.weight
    assert torch.equal(table[: TEXT_SIZE - 2], published.model.embed_tokens.weight)
    assert 0 < float(table[TEXT_SIZE - 2 : TEXT_SIZE].std()) < 1


def test_a_run_of_another_shape_is_refused(one_process, vocabulary, tmp_path):
    make_published(tmp_path / "published", "qwen3")
    (tmp_path / "shape").mkdir()
    write_shape(ModelFolder(tmp_path / "published"), tmp_path / "shape" / "model.yaml")
    with pytest.raises(UserError, match="published: its model.qk_norm is True, this run's is False; .* --shape"):
        run_from(tmp_path / "shape", vocabulary, tmp_path, tmp_path / "published", "model.qk_norm=false")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"rotary_interpolation_factor": 2.0}, "model.rotary_interpolation_factor is 1.0, this run's is 2.0"),
        (
            {"rotary_scaling_factor": 32.0},
            r"model.rotary_scaling is None, this run's is RotaryScalingConfig\(factor=32",
        ),
    ],
)
def test_a_run_with_other_rotary_positions_is_refused_by_name(saved, overrides, message):
    source = ModelFolder(saved)
    with pytest.raises(UserError, match=f"its {message}"):
        require_same_shape(source, dataclasses.replace(source.model, **overrides))


def run_tool(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["convert_hf.py", *map(str, arguments)])
    runpy.run_path(str(TOOL))["main"]()


def test_new_rows_are_initial_weights_with_the_spread_of_llama_s(one_process, vocabulary, tmp_path, monkeypatch):
    llama = make_published(tmp_path / "llama")
    shutil.copy(vocabulary.folder / "tokenizer.model", tmp_path / "llama")
    start, numbers = tmp_path / "start" / "iter_0000000", tmp_path / "numbers.json"
    arguments = ("--model", tmp_path / "llama", "--vocabulary", vocabulary.folder, "--out", start.parent)
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
    assert numbers["rows"] == {"published": TEXT_SIZE + 1, "new": CODES + 3, "padding": 40, "left_out": 0}
    assert numbers["parameters"] == sum(p.numel() for p in model.parameters())


def test_bf16_stays_bf16_and_starts_runs_of_either_precision(one_process, vocabulary, tmp_path):
    from transformers import LlamaForCausalLM

    make_published(tmp_path / "llama", dtype=torch.bfloat16)
    numbers = convert_published(tmp_path / "llama", vocabulary, tmp_path / "start", seed=5)
    assert numbers["precision"] == "bf16"
    trained = load(tmp_path / "start" / "iter_0000000", [])
    assert {p.dtype for p in trained.model.parameters()} == {torch.bfloat16}
    trained = load(tmp_path / "start" / "iter_0000000", ["training.precision=float32"])
    assert {p.dtype for p in trained.model.parameters()} == {torch.float32}
    llama = LlamaForCausalLM.from_pretrained(tmp_path / "llama", dtype=torch.float32)
    torch.testing.assert_close(*logits_of_both(trained.model, llama), atol=1e-5, rtol=1e-5)


def test_rows_beyond_the_text_pieces_are_left_out(one_process, vocabulary, tmp_path):
    llama = make_published(tmp_path / "llama", rows=TEXT_SIZE + 24)
    with pytest.raises(UserError, match="has 40 text tokens, the embedding of .*llama 64 rows, and no tokenizer file"):
        convert_published(tmp_path / "llama", vocabulary, tmp_path / "start", seed=5)
    pieces = [vocabulary.text.piece(i) for i in range(TEXT_SIZE)]
    write_tokenizer(tmp_path / "llama" / "tokenizer.json", pieces, ["<|user|>"])
    assert convert_published(tmp_path / "llama", vocabulary, tmp_path / "start", seed=5)["rows"]["left_out"] == 24
    trained = load(tmp_path / "start" / "iter_0000000", [])
    torch.testing.assert_close(*logits_of_both(trained.model, llama), atol=1e-5, rtol=1e-5)


def test_image_tokens_may_get_projections_of_their_own(one_process, vocabulary, tmp_path):
    llama = make_published(tmp_path / "llama")
    convert_published(tmp_path / "llama", vocabulary, tmp_path / "start", seed=5)
    convert(tmp_path / "start" / "iter_0000000", tmp_path / "split", ["plan.projections.kind=separate"])
    trained = load(tmp_path / "split" / "iter_0000000", [])
    assert trained.plan.projections.kind == "separate"
    torch.testing.assert_close(*logits_of_both(trained.model, llama), atol=1e-5, rtol=1e-5)


def test_a_run_cannot_go_on_from_weights_alone(one_process, vocabulary, tmp_path):
    make_published(tmp_path / "llama")
    convert_published(tmp_path / "llama", vocabulary, tmp_path / "start", seed=5)
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
    make_published(folder)
    return folder


def write_tokenizer(file: Path, pieces: list[str], added: list[str] = ()) -> None:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({piece: i for i, piece in enumerate(pieces)}, []))
    tokenizer.add_special_tokens(list(added))
    tokenizer.save(str(file))


def write(file: Path, value: dict) -> None:
    file.write_text(json.dumps(value))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma3_text"}, "'model_type' is 'gemma3_text', must be one of llama, mistral, qwen2, qwen3"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "'use_sliding_window' is True, .* only False"),
        ({"model_type": "qwen2", "layer_types": ["sliding_attention"]}, r"'layer_types' is \['sliding_attention'\]"),
        ({"model_type": "mistral", "sliding_window": 4096}, "'sliding_window' is 4096, below 'max_position_embedd"),
        ({"attention_bias": True}, "'attention_bias' is True, this model supports only False"),
        ({"mlp_bias": True}, "'mlp_bias' is True"),
        ({"hidden_act": "gelu"}, "'hidden_act' is 'gelu', this model supports only 'silu'"),
        ({"quantization_config": {"bits": 4}}, "'quantization_config' is {'bits': 4}"),
        ({"head_dim": 15}, "head.size.* 15"),
        ({"num_key_value_heads": 3}, r"num_attention_heads \(8\) is not divisible by model.num_query_groups \(3\)"),
        ({"intermediate_size": None}, "'intermediate_size' is None, must be a whole number"),
        (
            {"rope_parameters": {"rope_type": "yarn"}},
            "'rope_type' is 'yarn', this model supports 'default', 'linear' and 'llama3'",
        ),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear"}}, "'factor' of 'linear' is None, must be"),
        ({"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2}}, "'rope_type' is 'dynamic'"),
        ({"rope_parameters": LLAMA3 | {"high_freq_factor": None}}, "'high_freq_factor' of 'llama3' is None, must be"),
        ({"model_type": ["llama"]}, r"'model_type' is \['llama'\], must be one of"),
        ({"layer_types": 5}, "'layer_types' is 5"),
        ({"model_type": "mistral", "sliding_window": "4096"}, "'sliding_window' is '4096'"),
        ({"rope_parameters": "yarn"}, "'rope_parameters' is 'yarn', must be the settings of all layers"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "must be the settings of all layers"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "'partial_rotary_factor' is 0.5"),
    ],
)
def test_what_the_model_cannot_express_is_refused(saved, vocabulary, tmp_path, changes, message):
    llama = shutil.copytree(saved, tmp_path / "llama")
    write(llama / "config.json", json.loads((llama / "config.json").read_text()) | changes)
    with pytest.raises(UserError, match=f"^{llama}/config.json: .*{message}"):
        convert_published(llama, vocabulary, tmp_path / "out", seed=5)
    assert not (tmp_path / "out").exists()


def test_older_configurations_are_understood(saved, vocabulary, tmp_path):
    llama = shutil.copytree(saved, tmp_path / "llama")
    config = json.loads((llama / "config.json").read_text())
    for key in ("rope_parameters", "head_dim", "attention_bias", "mlp_bias", "dtype", "tie_word_embeddings"):
        config.pop(key, None)
    write(llama / "config.json", config | {"rope_theta": 500000, "rope_scaling": LLAMA3, "torch_dtype": "float32"})
    convert_published(llama, vocabulary, tmp_path / "out", seed=5)
    model = config_file.load(Config, [tmp_path / "out" / "model.yaml"]).model
    linear = model_config(config | {"rope_scaling": {"type": "linear", "factor": 2.0}}, llama / "config.json")
    assert (linear.rotary_scaling, linear.rotary_interpolation_factor) == (None, 2.0)
    assert (model.rotary_base, model.rotary_scaling, model.tie_embeddings) == (
        500000.0,
        RotaryScalingConfig(8.0),
        False,
    )


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), "llama: lacks the parameter model.norm.weight"),
        (lambda t: t.update({"lora.weight": torch.ones(2)}), "has the parameter lora.weight, which a model of this"),
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
        convert_published(tmp_path / "llama", vocabulary, tmp_path / "out", seed=5)


def test_missing_and_damaged_files_are_named(saved, vocabulary, tmp_path):
    llama = shutil.copytree(saved, tmp_path / "llama")
    shard = min(llama.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(UserError, match=f"^{shard}: "):
        convert_published(llama, vocabulary, tmp_path / "out", seed=5)
    shard.unlink()
    with pytest.raises(UserError, match=f"^{shard}: not found"):
        convert_published(llama, vocabulary, tmp_path / "out", seed=5)
    (llama / "model.safetensors.index.json").unlink()
    with pytest.raises(UserError, match="llama: has neither model.safetensors nor model.safetensors.index.json"):
        convert_published(llama, vocabulary, tmp_path / "out", seed=5)
    with pytest.raises(UserError, match="absent: not a folder of a published model"):
        convert_published(tmp_path / "absent", vocabulary, tmp_path / "out", seed=5)


def test_a_vocabulary_of_other_text_is_refused(saved, vocabulary, tmp_path):
    make_published(tmp_path / "smaller", rows=TEXT_SIZE - 8)
    with pytest.raises(UserError, match="has 40 text tokens, the embedding of .* 32 rows, and no tokenizer file"):
        convert_published(tmp_path / "smaller", vocabulary, tmp_path / "out", seed=5)

    llama = shutil.copytree(saved, tmp_path / "llama")
    other = small_vocabulary(tmp_path, "green boxes above", "black dots")
    shutil.copy(other.folder / "tokenizer.model", llama)
    with pytest.raises(UserError, match=r"its text token \d+ is '.+', that of .*llama '.+'; a vocabulary must"):
        convert_published(llama, vocabulary, tmp_path / "out", seed=5)
    (llama / "tokenizer.model").unlink()
    write_tokenizer(llama / "tokenizer.json", ["<unk>"])
    with pytest.raises(UserError, match="its text token 1 is '<s>', that of .*llama missing"):
        convert_published(llama, vocabulary, tmp_path / "out", seed=5)


def test_other_checkpoints_are_never_replaced(saved, vocabulary, tmp_path):
    (tmp_path / "out" / "iter_0000003").mkdir(parents=True)
    with pytest.raises(UserError, match="out: already holds checkpoints, such as iter_0000003"):
        convert_published(saved, vocabulary, tmp_path / "out", seed=5)
