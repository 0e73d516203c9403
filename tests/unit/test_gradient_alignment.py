"""Gradient alignment equals what torch's autograd gives for the two losses, and measuring it changes nothing."""

import json

import pytest
import torch
import torch.nn.functional as F

from megatron_ext.analysis import gradients, gradients_report
from megatron_ext.callbacks.logging import Logger
from megatron_ext.config import Config
from megatron_ext.data.batch import Batch
from megatron_ext.errors import UserError
from megatron_ext.routing.plan import Plan
from megatron_ext.routing.route import Route
from megatron_ext.token_classes import Modality, Task
from megatron_ext.training.config_checks import validate
from megatron_ext.training.metrics import read_metrics
from megatron_ext.training.prepare import prepare
from megatron_ext.training.setup import build_model, build_optimizer
from megatron_ext.training.step import train_step
from megatron_ext.transformer.resolved import resolve
from support.labelled_rows import VOCABULARY, generation, rows_of, text, understanding

SMALL = (
    "model.num_layers=3",
    "model.hidden_size=32",
    "data.sequence_length=48",
    "training.global_batch_size=2",
    "training.micro_batch_size=1",
    "training.task_weights={understanding: 3.0, generation: 0.5, text: 1.0}",
)
ROWS = (
    [understanding(6, (3, 2), (1, 3)), generation(4, 5), text(3)],
    [generation(0, 7), understanding(4, (2, 1)), understanding(3, (1, 1), (2, 2), (1, 1))],
)
FIGURES = ("cosine", "norm_understanding", "norm_generation", "only_understanding", "only_generation", "untrained")


def model_of(config):
    """Weights without the zeros that differences begin with."""
    chunks = build_model(resolve(config, VOCABULARY))
    random = torch.Generator().manual_seed(1)
    for parameter in chunks[0].parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=random)
    return chunks


def by_autograd(chunks, config, batch, task) -> dict[str, torch.Tensor]:
    model = chunks[0].module
    route = Route.of(batch, Plan.of(config.plan, config.model.num_layers))
    chosen = batch.task.flatten()[route.targets] == task
    logits = model(route).view(-1, VOCABULARY)[chosen]
    loss = F.cross_entropy(logits, batch.labels.flatten()[route.targets][chosen])
    names, parameters = zip(*model.named_parameters())
    return dict(zip(names, torch.autograd.grad(loss, parameters)))


def figures_of(u: list[torch.Tensor], g: list[torch.Tensor]) -> dict[str, float]:
    u, g = (torch.cat([x.flatten() for x in xs]).double() for xs in (u, g))
    cosine = float(F.cosine_similarity(u, g, dim=0, eps=1e-30))
    alone = [float((a & b).double().mean()) for a, b in ((u != 0, g == 0), (u == 0, g != 0), (u == 0, g == 0))]
    return dict(zip(FIGURES, (cosine, float(u.norm()), float(g.norm()), *alone)))


@pytest.mark.parametrize("codebook, width", [("vq", 6), ("''", "null")], ids=["frozen vectors", "learned codes"])
def test_generation_alone_trains_the_depth_head_and_both_tasks_what_images_enter_through(one_process, codebook, width):
    head = "{num_layers: 1, hidden_size: 8, num_attention_heads: 2}"
    config = one_process(
        *SMALL, f"model.image_codes={{depth: 2, codebook: {codebook}, codebook_size: 9, width: {width}, head: {head}}}"
    )
    chunks = model_of(config)
    if width == 6:
        chunks[0].module.code_vectors.weight.normal_()
    batch, _ = rows_of(*ROWS, length=48)
    batch.codes = torch.randint(9, (*batch.shape, 2)).int() * (batch.modality == Modality.IMAGE)[..., None]
    result = gradients.alignment(chunks, prepare(batch, resolve(config)), resolve(config))
    entry = "projector" if width == 6 else "code embedding"
    assert result["outside"].keys() == {"embedding", entry, "final norm", "head", "depth head"}
    assert result["outside"][entry]["cosine"] is not None
    assert (
        result["outside"]["depth head"]["norm_understanding"] == 0 < result["outside"]["depth head"]["norm_generation"]
    )
    assert result["outside"]["depth head"]["only_generation"] > 0.5


@pytest.mark.parametrize(
    "overrides, part, names",
    [
        (["model.tie_embeddings=true"], "fc1", ["mlp.linear_fc1.weight"]),
        (["plan.preset=himix_hmgen_share_all_separate"], "qkv image", ["self_attention.linear_qkv.image_weight"]),
        (
            ["plan.projections={kind: delta, rank: 2, per_task: true, modules: [qkv, fc2]}"],
            "fc2 generation",
            ["mlp.linear_fc2.generation_down", "mlp.linear_fc2.generation_up"],
        ),
        (
            ["model.qkv_bias=true", "model.qk_norm=true", "training.z_loss=0.1"],
            "qkv",
            ["self_attention.linear_qkv.weight", "self_attention.linear_qkv.bias"],
        ),
    ],
    ids=["dense", "separate", "rank 2 per task", "bias, norms and z-loss"],
)
def test_figures_are_those_of_the_two_losses_gradients(one_process, overrides, part, names):
    config = one_process(*SMALL, *overrides)
    chunks = model_of(config)
    batch, _ = rows_of(*ROWS, length=48)
    # A step, though refused, leaves gradients behind; they are no part of what follows.
    train_step(
        chunks,
        build_optimizer(config, chunks),
        prepare(batch, resolve(config)),
        config,
        accept=lambda loss, norm: False,
    )
    result = gradients.alignment(chunks, prepare(batch, resolve(config)), resolve(config))
    u, g = (by_autograd(chunks, config, batch, task) for task in (Task.UNDERSTANDING, Task.GENERATION))

    def expected(chosen) -> dict:
        return pytest.approx(figures_of([u[n] for n in chosen], [g[n] for n in chosen]), rel=1e-4, abs=1e-6)

    assert set(result["layers"]) == set(gradients.part_names(resolve(config).plan))
    for layer in range(3):
        prefix = f"decoder.layers.{layer}."
        head_norms = ("q_layernorm", "k_layernorm") if config.model.qk_norm else ()
        norms = ("input_layernorm", "pre_mlp_layernorm", *(f"self_attention.{norm}" for norm in head_norms))
        norms = [f"{prefix}{norm}.weight" for norm in norms]
        for name, members in ((part, [prefix + n for n in names]), ("norms", norms)):
            measured = {figure: result["layers"][name][figure][layer] for figure in FIGURES}
            if measured["cosine"] is None:  # a part of one task alone
                assert 0.0 in (measured["norm_understanding"], measured["norm_generation"])
                measured["cosine"] = 0.0
            assert measured == expected(members)
        whole = {figure: result["layer"][figure][layer] for figure in FIGURES}
        assert whole == expected([n for n in u if n.startswith(prefix)])
    assert result["outside"]["embedding"] == expected(["embedding.word_embeddings.weight"])
    head = set() if config.model.tie_embeddings else {"head"}
    assert result["outside"].keys() == {"embedding", "final norm"} | head
    assert result["all"] == expected(list(u))


def test_halves_of_the_rows_separate_noise_from_disagreement(one_process):
    config = one_process(*SMALL)
    chunks = model_of(config)
    both, _ = rows_of(*ROWS, length=48)
    halves = [both.rows(0, 1), both.rows(1, 2)]
    result = gradients.corrected(chunks, both, resolve(config))
    u, g = (
        [by_autograd(chunks, config, half, task) for half in halves] for task in (Task.UNDERSTANDING, Task.GENERATION)
    )

    def cosine(a: dict, b: dict, prefix: str) -> float:
        names = [name for name in a if name.startswith(prefix)]
        return figures_of([a[n] for n in names], [b[n] for n in names])["cosine"]

    for layer, prefix in enumerate(f"decoder.layers.{n}." for n in range(3)):
        repeats = cosine(u[0], u[1], prefix), cosine(g[0], g[1], prefix)
        crossed = (cosine(u[0], g[1], prefix) + cosine(u[1], g[0], prefix)) / 2
        of_layer = {name: values[layer] for name, values in result["layer"].items()}
        assert [of_layer[f"repeat_{task}"] for task in ("understanding", "generation")] == pytest.approx(
            repeats, abs=1e-5
        )
        expected = crossed / (repeats[0] * repeats[1]) ** 0.5 if min(repeats) > 0 else None
        assert of_layer["corrected_cosine"] == (None if expected is None else pytest.approx(expected, abs=1e-4))
    again = Batch(*(torch.cat([getattr(halves[0], name)] * 2) for name in Batch.names()))
    same = gradients.corrected(chunks, again, resolve(config))  # no noise: nothing to correct
    assert same["all"]["repeat_generation"] == pytest.approx(1)
    of_again, of_both = (
        gradients.alignment(chunks, prepare(batch, resolve(config)), resolve(config)) for batch in (again, both)
    )
    assert same["all"]["corrected_cosine"] == pytest.approx(of_again["all"]["cosine"])
    assert "without noise" in gradients_report.table(of_both, result)


def test_a_task_gives_no_gradient_to_weights_it_does_not_use(one_process):
    """Each task alone trains its image weights, and plain text trains neither."""
    config = one_process(*SMALL, "plan.projections={kind: separate, per_task: true, modules: [qkv]}")
    chunks = model_of(config)
    layers = gradients.alignment(chunks, prepare(rows_of(*ROWS, length=48)[0], resolve(config)), resolve(config))[
        "layers"
    ]
    # What images ask for in the last layer reaches no answer: a third of its query, key and value has no gradient.
    assert layers["qkv understanding"]["only_understanding"] == pytest.approx([1, 1, 2 / 3])
    assert layers["qkv generation"]["only_generation"] == [1.0] * 3
    assert layers["qkv generation"]["cosine"] == [None] * 3
    assert all(shared is not None for shared in layers["qkv"]["cosine"])
    of_text = gradients.alignment(
        chunks, prepare(rows_of([text(20)], [text(40)], length=48)[0], resolve(config)), resolve(config)
    )
    assert of_text["all"]["untrained"] == 1.0 and of_text["all"]["cosine"] is None


@pytest.mark.parametrize("settings", [[], ["training.precision=bf16", "parallel.distributed_optimizer=true"]])
def test_measuring_changes_no_bit_of_training(one_process, settings):
    config = one_process(*SMALL, *settings)
    batch, _ = rows_of(*ROWS, length=48)
    ends = []
    for measure in (False, True):
        chunks = model_of(config)
        optimizer = build_optimizer(config, chunks)
        optimizer.reload_model_params()
        steps = []
        for _ in range(3):
            if measure:
                gradients.alignment(chunks, prepare(batch, resolve(config)), resolve(config))
            result = train_step(chunks, optimizer, prepare(batch, resolve(config)), config)
            steps.append((result.loss, result.grad_norm))
        ends.append((steps, torch.cat([p.detach().flatten() for p in chunks[0].parameters()]), torch.get_rng_state()))
    (steps, weights, state), (measured_steps, measured_weights, measured_state) = ends
    assert steps == measured_steps and len(set(steps)) == 3
    assert torch.equal(weights, measured_weights) and torch.equal(state, measured_state)


def test_findings_are_logged_and_shown(one_process, tmp_path):
    config = one_process(*SMALL, "logging.gradient_alignment_interval=5", f"output={tmp_path}")
    result = gradients.alignment(
        model_of(config), prepare(rows_of(*ROWS, length=48)[0], resolve(config)), resolve(config)
    )
    lines = []
    record = {"iteration": 5, "loss": 1.0, "grad_norm": 1.0, "learning_rate": 1e-3, "step_seconds": 0.5}
    logger = Logger(config, say=lines.append)
    record |= {"tokens_per_second": 1.0, "data_wait_seconds": 0.0}
    logger.log(record | {"gradient_alignment": result | {"seconds": 2.5}})
    logger.close()
    assert "every 5 iterations that is 50 % of time" in lines[-1]
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["gradient_alignment"]["layers"] == result["layers"]
    cosines = [result["layers"][part]["cosine"][2] for part in ("norms", "qkv", "proj", "fc1", "fc2")]
    assert gradients_report.scalars(result)["layer_02"] == pytest.approx(sum(cosines) / 5)
    assert f"{result['layers']['proj']['cosine'][1]:+.3f}" in gradients_report.table(result)
    gradients_report.plot(json.loads(json.dumps(result)), tmp_path / "figure.png", "title")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_scales_learnt_from_every_pass_are_not_disturbed():
    config = Config()
    config.training.precision, config.training.fp8 = "bf16", "delayed"
    config.logging.gradient_alignment_interval = 10
    with pytest.raises(UserError, match="gradient_alignment_interval"):
        validate(config, 1)
