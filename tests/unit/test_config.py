"""Configuration: files, overrides, and refusals that name the key, the value and what would do."""

import dataclasses
from pathlib import Path

import pytest

from megatron_ext import config_file
from megatron_ext.config import Config
from megatron_ext.errors import UserError
from megatron_ext.evaluation.config_checks import validate_evaluation
from megatron_ext.routing.flops import parameter_count
from megatron_ext.routing.plan import Projections
from megatron_ext.training.config_checks import validate

EXAMPLES = Path(__file__).parents[2] / "examples" / "configs"
EVALUATED = ["evaluation.interval=5", "evaluation.vq=vq", "evaluation.prompts=[a circle]"]


def benchmarks(*entries: str) -> str:
    return f"evaluation.benchmarks=[{', '.join(entries)}]"


def load(*overrides: str) -> Config:
    return config_file.load(Config, [], overrides)


def check(config: Config, world_size: int) -> None:
    validate(config, world_size)
    validate_evaluation(config)


def test_later_files_and_overrides_win_and_sections_merge(tmp_path):
    size, method = tmp_path / "size.yaml", tmp_path / "method.yaml"
    size.write_text("model: {num_layers: 8, hidden_size: 256}\noptimizer: {lr: 3e-4}\n")
    method.write_text("model: {num_layers: 6}\n")
    config = config_file.load(Config, [size, method], ["model.num_attention_heads=16", "optimizer.lr=1e-4"])
    assert (config.model.num_layers, config.model.hidden_size, config.model.num_attention_heads) == (6, 256, 16)
    assert config.optimizer.lr == 1e-4


def test_a_written_configuration_loads_as_itself(tmp_path):
    config = load("data.train=[{path: a, task: text, weight: 2}]", "model.rotary_scaling_factor=32")
    config_file.write_yaml(tmp_path / "config.yaml", config)
    assert config_file.load(Config, [tmp_path / "config.yaml"]) == config


def test_words_of_yaml_1_1_are_strings(tmp_path):
    assert load("logging.wandb=off").logging.wandb == "off"
    (tmp_path / "off.yaml").write_text("logging: {wandb: off, wandb_project: yes, tensorboard: false}\n")
    logging = config_file.load(Config, [tmp_path / "off.yaml"]).logging
    assert (logging.wandb, logging.wandb_project, logging.tensorboard) == ("off", "yes", False)
    config_file.write_yaml(tmp_path / "again.yaml", load("logging.wandb=off", "output=on"))
    assert config_file.load(Config, [tmp_path / "again.yaml"]).output == "on"


@pytest.mark.parametrize(
    "override, parts",
    [
        ("model.hiden_size=3", ["model.hiden_size", "did you mean 'hidden_size'"]),
        ("modle.hidden_size=3", ["modle", "did you mean 'model'"]),
        ("model.num_layers=many", ["model.num_layers", "int", "'many'"]),
        ("model.tie_embeddings=1", ["model.tie_embeddings", "bool", "1"]),
        ("training.precision=fp8", ["training.precision", "fp8", "float32, bf16"]),
        ("data.train=[{path: x}]", ["data.train[0]", "task"]),
        ("data.train=[{path: x, task: poetry}]", ["data.train[0].task", "poetry", "understanding"]),
        ("optimizer=3", ["optimizer", "section"]),
        ("model.hidden_size", ["model.hidden_size", "section.key=value"]),
    ],
)
def test_unknown_keys_and_wrong_types_are_named(override, parts):
    with pytest.raises(UserError) as error:
        load(override)
    assert all(part in str(error.value) for part in parts), error.value


@pytest.mark.parametrize(
    "overrides, world_size, parts",
    [
        (["parallel.tensor=3"], 3, ["num_attention_heads", "(4)", "parallel.tensor", "(3)"]),
        (["model.num_query_groups=2", "parallel.tensor=4"], 4, ["num_query_groups", "(2)", "parallel.tensor"]),
        (["parallel.pipeline=3"], 3, ["num_layers", "(4)", "parallel.pipeline"]),
        (["parallel.pipeline=8"], 8, ["model.num_layers", "4", "fewer", "8 x 1"]),
        (
            ["parallel.pipeline=2", "parallel.layout=Et|t*2|tL"],
            2,
            ["parallel.layout", "3 chunks", "2 x 1", "Et*2|t*2L"],
        ),
        (["parallel.pipeline=2", "parallel.layout=Et|t*2L"], 2, ["parallel.layout", "3 layers", "4"]),
        (["parallel.pipeline=2", "parallel.layout=Et*4|L"], 2, ["parallel.layout", "chunk 1 has no layer"]),
        (["parallel.pipeline=2", "parallel.layout=t*2|Et*2L"], 2, ["parallel.layout", "begin with E"]),
        (["parallel.pipeline=2", "parallel.layout=Et*2|m|t*2L"], 2, ["parallel.layout", "'m'"]),
        (["parallel.virtual_pipeline=2"], 1, ["parallel.virtual_pipeline", "parallel.pipeline > 1"]),
        (["parallel.tensor=2"], 3, ["3 processes", "parallel.tensor", "(2)", "start 2"]),
        (["parallel.tensor=2"], 1, ["1 processes", "parallel.tensor", "(2)", "start 2"]),
        (["parallel.sequence=true"], 1, ["parallel.sequence", "parallel.tensor > 1"]),
        (["data.caption_dropout=1.5"], 1, ["data.caption_dropout", "1.5"]),
        (["optimizer.schedule=wsd"], 1, ["optimizer.wsd_decay_iterations"]),
        (["optimizer.warmup_iterations=100"], 1, ["optimizer.warmup_iterations", "training.iterations"]),
        (["model.num_attention_heads=3"], 1, ["model.hidden_size (128)", "num_attention_heads (3)"]),
        (["model.head_size=33"], 1, ["model.head_size", "33", "even"]),
        (["model.head_size=0"], 1, ["model.head_size", "0", "at least 1"]),
        (["model.rotary_scaling.factor=0.5"], 1, ["model.rotary_scaling.factor", "0.5", "at least 1"]),
        (["model.rotary_scaling={factor: 2, low_freq_factor: 4}"], 1, ["model.rotary_scaling", "low_freq_factor 4"]),
        (["model.rotary_interpolation_factor=0.5"], 1, ["model.rotary_interpolation_factor", "0.5", "at least 1"]),
        (["model.rotary_scaling.factor=2", "model.rotary_interpolation_factor=2"], 1, ["give only one"]),
        (["training.z_loss=-1"], 1, ["training.z_loss", "-1", "at least 0"]),
        (["training.z_loss=1e-5", "model.image_codes.depth=4"], 1, ["training.z_loss", "1e-05", "image_codes.depth=1"]),
        (["training.z_loss=1e-5", "training.means=modality"], 1, ["training.z_loss", "training.means=task"]),
        (["training.task_weights.text=2", "training.means=modality"], 1, ["training.task_weights", "means=task"]),
        (["model.image_codes.codebook=tower"], 1, ["model.image_codes.codebook", "'tower'", "image_codes.depth"]),
        (["model.image_codes.codebook_size=64"], 1, ["model.image_codes.codebook_size", "64", "image_codes.depth"]),
        (["model.image_codes={depth: 4, width: 6}"], 1, ["model.image_codes.width", "6", "codebook is empty"]),
        (["model.image_codes={depth: 4, fingerprint: a}"], 1, ["model.image_codes.fingerprint", "codebook is empty"]),
        (["model.image_codes={depth: 4, codebook: vq, width: 0}"], 1, ["model.image_codes.width", "at least 1"]),
        (["optimizer.groups=[{parameters: x, lr_multiplier: .nan}]"], 1, ["groups[0].lr_multiplier", "nan"]),
        (["lifecycle.hang_minutes=7"], 1, ["lifecycle.distributed_timeout_minutes", "40", "42"]),
        (["model.num_layers=0"], 1, ["model.num_layers", "at least 1"]),
        (["evaluation.interval=-1"], 1, ["evaluation.interval", "-1"]),
        ([*EVALUATED, 'evaluation.vq=""'], 1, ["evaluation.vq", "empty"]),
        ([*EVALUATED, "evaluation.prompts=[]"], 1, ["evaluation.benchmarks", "evaluation.prompts", "empty"]),
        ([*EVALUATED, "evaluation.temperature=-1"], 1, ["evaluation.temperature", "-1"]),
        ([*EVALUATED, "evaluation.top_k=-1"], 1, ["evaluation.top_k", "-1"]),
        ([*EVALUATED, "evaluation.top_p=1.5"], 1, ["evaluation.top_p", "1.5"]),
        ([*EVALUATED, "evaluation.batch_size=0"], 1, ["evaluation.batch_size", "at least 1"]),
        ([*EVALUATED, benchmarks("{name: vqa, data: x}")], 1, ["evaluation.benchmarks[0].name", "'vqa'", "gqa, mme"]),
        ([*EVALUATED, benchmarks("{name: gqa, data: x, limit: -1}")], 1, ["evaluation.benchmarks[0].limit", "-1"]),
        ([*EVALUATED, benchmarks("{name: mme, data: x, parts: [sound]}")], 1, [".parts", "'sound'", "existence"]),
        ([*EVALUATED, benchmarks(*2 * ["{name: gqa, data: x}"])], 1, ["evaluation.benchmarks[1].name", "again"]),
    ],
)
def test_impossible_combinations_are_refused(overrides, world_size, parts):
    with pytest.raises(UserError) as error:
        check(load(*overrides), world_size)
    assert all(part in str(error.value) for part in parts), error.value


def test_a_run_without_evaluation_needs_none_of_its_settings():
    check(load("parallel.pipeline=2", *EVALUATED), 2)
    check(load(*EVALUATED, benchmarks("{name: mme, data: x, parts: [count, OCR], limit: 20}")), 1)


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(UserError, match="absent.yaml"):
        config_file.load(Config, [tmp_path / "absent.yaml"])
    (tmp_path / "broken.yaml").write_text("model: [1,\n")
    with pytest.raises(UserError, match="broken.yaml: not YAML"):
        config_file.load(Config, [tmp_path / "broken.yaml"])


@pytest.mark.parametrize(
    "name, world_size, millions",
    [
        ("tiny", 1, 0.329),
        ("quickstart", 2, 0.435),
        ("llama-3.2-1b", 8, 1236),
        ("llama-2-7b", 8, 6738),
        ("llama-2-13b", 16, 13016),
        ("llama-2-70b", 512, 68977),
        ("qwen3-0.6b", 8, 596),
        ("qwen3-8b", 16, 8191),
        ("qwen2.5-7b", 16, 7616),
    ],
)
def test_the_examples_fit_their_machines_and_have_the_published_sizes(name, world_size, millions):
    config = config_file.load(Config, [EXAMPLES / f"{name}.yaml"])
    check(config, world_size)
    text_vocabularies = {"llama-3.2": 128256, "llama-2": 32000, "qwen3-0.6b": 151936, "qwen3-8b": 151936}
    text_vocabularies |= {"qwen2.5-7b": 152064}
    size = next((size for start, size in text_vocabularies.items() if name.startswith(start)), 1028)
    assert parameter_count(config.model, size, Projections()) / 1e6 == pytest.approx(millions, rel=0.01)


OLD_IDENTITY = {
    "num_layers": 4,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_query_groups": 4,
    "ffn_hidden_size": 384,
    "rotary_base": 10000.0,
    "rotary_scaling_factor": None,
    "max_image_tokens": 0,
    "norm_epsilon": 1e-05,
    "tie_embeddings": False,
}


@pytest.mark.parametrize(
    ("overrides", "identity"),
    [
        ([], OLD_IDENTITY),
        (["model.head_size=32", "model.init_std=1"], OLD_IDENTITY),
        (["model.rotary_scaling_factor=32"], OLD_IDENTITY | {"rotary_scaling_factor": 32.0}),
        (["model.rotary_scaling.factor=32"], OLD_IDENTITY | {"rotary_scaling_factor": 32.0}),
        (["model.head_size=48"], OLD_IDENTITY | {"head_size": 48}),
        (["model.qkv_bias=true", "model.qk_norm=true"], OLD_IDENTITY | {"qkv_bias": True, "qk_norm": True}),
    ],
)
def test_a_model_that_older_checkpoints_could_have_has_their_identity(overrides, identity):
    model = load(*overrides).model
    assert model.identity == identity
    assert config_file.from_tree(type(model), identity).identity == identity


def test_rotary_scaling_has_a_short_form():
    full = load("model.rotary_scaling={factor: 8, original_max_position_embeddings: 1024}").model
    assert dataclasses.astuple(full.rotary_scaling) == (8.0, 1.0, 4.0, 1024)
    assert full.identity["rotary_scaling"]["original_max_position_embeddings"] == 1024
    assert load("model.rotary_scaling_factor=8").model == load("model.rotary_scaling.factor=8").model
    with pytest.raises(UserError, match="'model.rotary_scaling_factor' is a short form .* only one"):
        load("model.rotary_scaling_factor=8", "model.rotary_scaling.factor=8")
