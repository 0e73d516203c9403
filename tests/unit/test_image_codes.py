"""Image tokens of several codes: the model and its training against the plain reference."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_routing import SHAPE, VOCABULARY, assert_near, config_of, plan_of, random_plan, random_rows, weights_of
from torch.nn.functional import cross_entropy

from megatron_ext import vq
from megatron_ext.analysis import batches
from megatron_ext.checkpoints.checks import check_compatible
from megatron_ext.config import Config
from megatron_ext.data.batch import Batch
from megatron_ext.errors import UserError
from megatron_ext.routing.plan import PRESETS
from megatron_ext.routing.route import Route
from megatron_ext.token_classes import Modality, Task
from megatron_ext.training.image_codes import check_images, with_code_shape, with_tokenizer
from megatron_ext.training.losses import MeanLosses
from megatron_ext.training.prepare import prepare
from megatron_ext.training.setup import build_model, build_optimizer
from megatron_ext.training.step import evaluate_step, task_gradients, train_step
from megatron_ext.transformer.model import build_chunks
from megatron_ext.transformer.resolved import resolve
from megatron_ext.vocabulary import Vocabulary
from support import reference
from support.vila_u import write_vision_tower
from support.vocabularies import make_vocabulary

DEPTH, CODES, WIDTH = 4, 24, 6
FROZEN = (
    f"model.image_codes={{depth: {DEPTH}, codebook: tower, codebook_size: {CODES}, width: {WIDTH}, "
    "head: {num_layers: 2, hidden_size: 16, num_attention_heads: 4}}",
)
LEARNED = (*FROZEN, "model.image_codes.codebook=''", "model.image_codes.width=null")


def build(config, seed: int = 0, dtype: torch.dtype = torch.float64):
    """The model with random values in every parameter and code vector."""
    random = torch.Generator().manual_seed(seed)
    vectors = torch.randn(CODES, WIDTH, generator=random) if config.model.image_codes.width else None
    (model,) = build_chunks(resolve(config, VOCABULARY), vectors)
    for parameter in model.parameters():
        noise = 0.2 * torch.randn(parameter.shape, generator=random)
        parameter.data.copy_(noise + 1 if parameter.dim() == 1 else noise)
    return model.to(dtype)


def rows_of_codes(seed: int, rows: int = 2) -> Batch:
    """Random packed rows whose image tokens have codes."""
    batch = random_rows(seed, rows=rows)
    codes = np.random.default_rng(seed).integers(CODES, size=(*batch.shape, DEPTH)).astype(np.int32)
    batch.codes = torch.from_numpy(codes) * (batch.modality == Modality.IMAGE)[..., None]
    batch.tokens[batch.modality == Modality.IMAGE] = 2**20  # not a row of the embedding
    return batch


def expected_losses(weights: dict, config, batch: Batch, selection=None) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of text targets and cross-entropies [m, D] of code targets."""
    plan, model = plan_of(config), config.model
    learnt = batch.loss_mask > 0
    codes = learnt & torch.from_numpy(batch.predicts_image())
    logits = reference.logits(weights, model, plan, batch, selection)[learnt & ~codes]
    hidden = reference.final_states(weights, model, plan, batch, selection)[codes]
    following = batch.codes.roll(-1, 1)[codes].long()
    return logits, cross_entropy(
        reference.code_logits(weights, model, hidden, following).transpose(1, 2), following, reduction="none"
    )


def assert_equals_reference(model, config, batch: Batch, case: str) -> None:
    weights = weights_of(model) | {n: x for n, x in model.named_buffers() if n == "code_vectors.weight"}
    parameters = [weights[name] for name, _ in model.named_parameters()]
    logits, losses = expected_losses(weights, config, batch)
    total = logits.square().sum() + losses.mean(1).sum()
    gradients = torch.autograd.grad(total, parameters, allow_unused=True, materialize_grads=True)
    floor = 8 * torch.finfo(total.dtype).eps * float(torch.stack([g.norm() for g in gradients]).norm())
    route = Route.of(batch, plan_of(config), bucketed=True)
    ours, hidden = model(route, hidden_rows=True)
    code_logits = model.depth_head.logits(hidden.squeeze(1), route.target_codes, model.code_vectors)
    our_losses = cross_entropy(code_logits.transpose(1, 2), route.target_codes, reduction="none")
    assert_near(ours[:, 0], logits, 1e-9, f"{case} logits")
    assert_near(our_losses, losses, 1e-9, f"{case} losses")
    with torch.no_grad():
        assert_near(model(route)[1].double(), losses, 1e-6, f"{case} float32 losses")
    model.zero_grad()
    (ours.square().sum() + our_losses.mean(1).sum()).backward()
    for (name, parameter), gradient in zip(model.named_parameters(), gradients):
        assert parameter.grad is not None or not gradient.any(), f"{case} {name}"
        if parameter.grad is not None:
            assert_near(parameter.grad, gradient, 1e-9, f"{case} gradient of {name}", floor)


def test_every_method_equals_the_reference(one_process):
    one_process(*SHAPE)
    for seed, preset in enumerate(PRESETS):
        tied = f"model.tie_embeddings={str(seed % 2 == 0).lower()}"
        config = config_of(*(LEARNED if seed % 3 == 2 else FROZEN), tied, f"plan.preset={preset}")
        assert_equals_reference(build(config), config, rows_of_codes(seed), preset)


def test_any_role_table_equals_the_reference(one_process):
    one_process(*SHAPE)
    for seed in range(12):
        config = dataclasses.replace(config_of(*(FROZEN if seed % 3 else LEARNED)), plan=random_plan(seed))
        assert_equals_reference(build(config, seed), config, rows_of_codes(1000 + seed), f"table {seed}:")


@pytest.mark.parametrize("codes", [FROZEN, ()], ids=["4 codes", "1 code"])
@pytest.mark.parametrize("means", ["task", "modality"])
def test_the_objective_is_a_sum_of_means_over_the_global_batch(one_process, codes, means):
    sizes = ("training.global_batch_size=4", "training.micro_batch_size=2", "plan.preset=himix_hmgen_share_all")
    config = one_process(
        *SHAPE, *sizes, *codes, "model.image_codes.head.chunk=3", "training.row_multiple=4", f"training.means={means}"
    )
    chunks = build_model(resolve(config, VOCABULARY))
    model, batch = chunks[0].module, rows_of_codes(12, rows=4) if codes else random_rows(12, rows=4)
    predicted = torch.from_numpy(batch.predicted_task())
    of_image = torch.from_numpy(batch.predicts_image())
    losses = torch.zeros(batch.shape)
    route = Route.of(batch, plan_of(config))
    output = model(route)
    logits, code_losses = output if codes else (output, None)
    of_text = cross_entropy(logits[:, 0], batch.labels.flatten()[route.targets], reduction="none")
    losses = losses.flatten().index_put((route.targets,), of_text)
    if codes:
        losses = losses.index_put((route.code_targets,), code_losses.mean(1))
    losses, learnt = losses.view(batch.shape), batch.loss_mask > 0
    kinds = {task.name.lower(): learnt & (predicted == task) for task in Task}
    tasks = {name: losses[chosen].mean() for name, chosen in kinds.items()}
    modalities = {"text_tokens": losses[learnt & ~of_image].mean(), "codes": losses[learnt & of_image].mean()}
    objective = sum((tasks if means == "task" else modalities).values())
    gradients = torch.autograd.grad(objective, list(model.parameters()))

    step, optimizer = prepare(batch, resolve(config)), build_optimizer(config, chunks)
    evaluated = MeanLosses.of(*(x.tolist() for x in evaluate_step(chunks, step, config)), config.training)
    trained = train_step(chunks, optimizer, step, config, accept=lambda *_: False).losses
    expected = {"loss": objective} | {f"loss_{name}": loss for name, loss in tasks.items()}
    if codes:
        of_depths = code_losses[: len(route.code_targets)].mean(0)
        expected |= {f"loss_depth_{number}": loss for number, loss in enumerate(of_depths, start=1)}
    if means == "modality":
        expected |= {f"loss_{name}": loss for name, loss in modalities.items()}
    for found in (evaluated, trained):
        assert found.named() == pytest.approx({name: float(loss) for name, loss in expected.items()}, rel=1e-5)
    of_step = {name: parameter.main_grad.clone() for name, parameter in model.named_parameters()}
    of_tasks = {name: torch.zeros_like(gradient) for name, gradient in of_step.items()}
    for task in Task:
        task_gradients(chunks, step, config, task)
        for name, parameter in model.named_parameters():
            of_tasks[name] += parameter.main_grad
    for name, gradient in zip(of_step, gradients):
        for found in (of_step, of_tasks):
            assert_near(found[name], gradient, 1e-5, name, floor=1e-7)


@pytest.fixture(scope="module")
def tower(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tower")
    write_vision_tower(folder, depth=DEPTH, codebook_size=CODES, width=16, head_width=16, grid=4)
    return folder


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory) -> Vocabulary:
    return make_vocabulary(tmp_path_factory.mktemp("vocabulary"), CODES)


def of_tower(tower: Path, *overrides: str) -> Config:
    return config_of(f"model.image_codes={{depth: {DEPTH}, codebook: '{tower}'}}", *overrides)


def test_a_run_takes_sizes_and_vectors_from_its_tokenizer(tower, vocabulary):
    tokenizer = vq.load(tower)
    for given in ([], ["model.image_codes.width=16", f"model.image_codes.fingerprint='{tokenizer.fingerprint}'"]):
        config, vectors = with_tokenizer(of_tower(tower, *given), vocabulary)
        codes = config.model.image_codes
        assert (codes.codebook_size, codes.width, codes.fingerprint) == (CODES, 16, tokenizer.fingerprint)
        assert torch.equal(vectors, tokenizer.vectors)
    config, vectors = with_tokenizer(config_of(f"model.image_codes.depth={DEPTH}"), vocabulary)
    assert (config.model.image_codes.codebook_size, config.model.image_codes.width, vectors) == (CODES, None, None)


def test_costs_need_no_weights_of_the_tower_and_read_any_tokenizer_once(tower, vocabulary, tmp_path, monkeypatch):
    read, whole = [], vq.load(tower)
    monkeypatch.setattr(vq.loading, "load", lambda folder: read.append(folder) or whole)
    for name in ("whole", "without"):
        config = json.loads((tower / "config.json").read_text())
        if name == "without":
            del config["rqvaesiglip"]["latent_shape"]
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        for known in (vocabulary, None, vocabulary):
            codes = with_code_shape(of_tower(tmp_path / name), known).model.image_codes
            assert (codes.codebook_size, codes.width) == tuple(whole.vectors.shape)
    assert read == [str(tmp_path / "without")]
    given = ("model.image_codes.width=16", f"model.image_codes.codebook_size={CODES}")
    assert with_code_shape(of_tower(tmp_path / "absent", *given), None).model.image_codes.width == 16
    with pytest.raises(UserError, match="absent/config.json: not found"):
        with_code_shape(of_tower(tmp_path / "absent"), None)
    with pytest.raises(UserError, match="'model.image_codes.depth' is 2, .* has 4"):
        with_code_shape(of_tower(tmp_path / "whole", "model.image_codes.depth=2"), vocabulary)


@pytest.mark.parametrize(
    "override, codes, message",
    [
        ("model.image_codes.depth=2", CODES, "'model.image_codes.depth' is 2, .* has 4"),
        ("model.image_codes.fingerprint=abc", CODES, "'model.image_codes.fingerprint' is abc, .* has "),
        ("parallel.tensor=1", CODES + 1, f"has {CODES} codes, the vocabulary .* {CODES + 1}"),
    ],
    ids=["depth", "fingerprint", "codebook"],
)
def test_another_tokenizer_is_refused(tower, tmp_path, override, codes, message):
    with pytest.raises(UserError, match=message):
        with_tokenizer(of_tower(tower, override), make_vocabulary(tmp_path, codes))


def test_data_of_another_tokenizer_are_refused(tower, vocabulary):
    config, _ = with_tokenizer(of_tower(tower), vocabulary)
    own = {"fingerprint": config.model.image_codes.fingerprint}
    for images in (None, own):
        check_images(config, SimpleNamespace(vq=images), "data.train")
    with pytest.raises(UserError, match=f"data.train.*VQ model abc.*{own['fingerprint']}"):
        check_images(config, SimpleNamespace(vq={"fingerprint": "abc"}), "data.train")


def test_analyses_refuse_data_of_another_tokenizer(tower, vocabulary, monkeypatch):
    config, _ = with_tokenizer(of_tower(tower, "data.validation=[{path: pairs, task: generation}]"), vocabulary)
    monkeypatch.setattr(batches, "build_mixture", lambda *_, **__: SimpleNamespace(vq={"fingerprint": "abc"}))
    with pytest.raises(UserError, match="'data.validation': images were encoded with VQ model abc"):
        batches.run_batches(config, vocabulary, "validation", 1, 1)


def test_a_checkpoint_of_another_depth_is_refused_by_name():
    four, one = ({"model": config_of(*settings).model.identity} for settings in (FROZEN, ()))
    for saved, expected, values in ((four, one, "4.*None"), (one, four, "None.*4")):
        with pytest.raises(UserError, match=f"its model.image_codes.depth is {values}"):
            check_compatible(saved, expected)
