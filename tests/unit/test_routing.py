"""The routed model equals the plain reference under any roles, and the properties that hold for every plan."""

import dataclasses

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from megatron_ext import config_file
from megatron_ext.config import Config, DenseShareConfig, ModelConfig, PlanConfig, ProjectionConfig, RoleEntry
from megatron_ext.data.batch import Batch
from megatron_ext.routing.dense_share import Selection
from megatron_ext.routing.plan import PRESETS, Plan
from megatron_ext.routing.roles import Role
from megatron_ext.routing.route import Route
from megatron_ext.token_classes import PADDING_DOCUMENT, Layout, Modality, Task
from megatron_ext.transformer.hidden_states import joined
from megatron_ext.transformer.model import build_chunks
from megatron_ext.transformer.resolved import resolve
from support import reference

VOCABULARY, LAYERS, LENGTH = 64, 4, 44
SHAPE = (
    f"model.num_layers={LAYERS}",
    "model.hidden_size=32",
    "model.num_attention_heads=4",
    "model.num_query_groups=2",
    "model.ffn_hidden_size=48",
    f"data.sequence_length={LENGTH}",
)
ALL_MODULES = ["qkv", "proj", "fc1", "fc2"]

PLANS = {name: [f"plan.preset={name}"] for name in PRESETS} | {
    "per_task": ["plan.preset=himix_hmgen_share_partial", "plan.projections={per_task: true}"],
    "rank": ["plan.preset=himix_hmgen_share_partial", "plan.projections={rank: 4}"],
    "all_modules": ["plan.preset=hmgen", "plan.projections={modules: [qkv, proj, fc1, fc2]}"],
    "rank_per_task_all_modules": [
        "plan.preset=himix_hmgen_share_partial",
        "plan.projections={modules: [qkv, proj, fc1, fc2], rank: 3, per_task: true}",
    ],
    "himix_late": ["plan.preset=himix", "plan.himix_start=2", "plan.projections={kind: separate}"],
    "hmgen_evenly": ["plan.preset=hmgen", "plan.shallow_placement=evenly", "plan.shallow_count=2"],
    "hmgen_listed": ["plan.preset=himix_hmgen_share_all", "plan.shallow_layers=[0, 3]"],
    "text_without_ffn": [
        "plan.table=[{layers: '1-2', task: all, modality: text, role: kv_only}]",
        "plan.projections={kind: delta, modules: [fc1, proj]}",
    ],
    "some_image_tokens_dense": [
        "plan.preset=himix_hmgen_share_partial",
        "plan.dense_share={of: image_tokens, start: 0.4}",
    ],
}

SPLITS = {
    "separate": ProjectionConfig("separate", ALL_MODULES),
    "separate_per_task": ProjectionConfig("separate", ALL_MODULES, per_task=True),
    "delta": ProjectionConfig("delta", ALL_MODULES),
    "delta_rank": ProjectionConfig("delta", ALL_MODULES, rank=4),
    "delta_rank_per_task": ProjectionConfig("delta", ALL_MODULES, rank=4, per_task=True),
}


def config_of(*overrides: str) -> Config:
    """A configuration for :func:`build_chunks`, in a world that runs already."""
    return config_file.load(Config, [], [*SHAPE, *overrides])


def features(seed: int) -> list[str]:
    """Bias, norms of queries and keys, and another head size than the default: any combination."""
    bias, norm, head_size = (bool(seed >> bit & 1) for bit in range(3))
    return [
        f"model.qkv_bias={str(bias).lower()}",
        f"model.qk_norm={str(norm).lower()}",
        f"model.head_size={12 if head_size else 'null'}",
    ]


def plan_of(config: Config) -> Plan:
    return Plan.of(config.plan, config.model.num_layers)


def build(config: Config, seed: int = 0, dtype: torch.dtype = torch.float64):
    """The model with random values in every parameter, so that an error in any term shows."""
    (model,) = build_chunks(resolve(config, VOCABULARY))
    rng = np.random.default_rng(seed)
    for parameter in model.parameters():
        noise = torch.from_numpy(0.2 * rng.standard_normal(parameter.shape))
        parameter.data.copy_(noise + 1 if parameter.dim() == 1 else noise)
    return model.to(dtype)


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone().requires_grad_() for name, parameter in model.named_parameters()}


def random_document(rng) -> list[int]:
    """Modalities of a document's tokens: runs of text and image in turn, of a few tokens or of many."""
    length, longest_run = rng.integers(1, 25), rng.choice([1, 3, 16])
    modality, tokens = rng.integers(2), []
    while len(tokens) < length:
        tokens += [modality] * rng.integers(1, longest_run + 1)
        modality = 1 - modality
    return tokens[:length]


def random_rows(seed: int, modality: Modality | None = None, rows: int = 2) -> Batch:
    """Packed documents of all layouts, any loss mask, and padding: none, some, or a whole row of it. In interleaved
    documents each run of image tokens is given or drawn.

    With ``modality``, every token is of that modality.
    """
    rng = np.random.default_rng(seed)
    batch = Batch.zeros(rows, LENGTH)
    batch.task[:], batch.document[:] = Task.TEXT, PADDING_DOCUMENT
    batch.tokens[:], batch.labels[:] = torch.from_numpy(rng.integers(VOCABULARY, size=(2, rows, LENGTH)))
    with_loss = {task: rng.random() < 0.85 for task in Task}
    for row in range(rows):
        filled = rng.choice([LENGTH, rng.integers(LENGTH), 0], p=[0.55, 0.4, 0.05])
        start = number = 0
        while start < filled:
            modalities = random_document(rng)[: filled - start]
            layout, document = Layout(rng.integers(4)), (row, slice(start, start + len(modalities)))
            task = Task.UNDERSTANDING if layout == Layout.INTERLEAVED else Task(layout)
            loss_rate = rng.choice([0, 0.3, 1], p=[0.2, 0.4, 0.4]) * with_loss[task]
            batch.positions[document] = torch.arange(len(modalities))
            batch.modality[document] = torch.tensor(modalities, dtype=torch.int8) if modality is None else modality
            batch.task[document], batch.document[document] = task, number
            if layout == Layout.INTERLEAVED:
                runs = np.diff(modalities, prepend=0).astype(bool).cumsum()
                drawn = (rng.random(runs.max() + 1) < 0.5)[runs] & (batch.modality[document].numpy() == Modality.IMAGE)
                batch.task[document][torch.from_numpy(drawn)] = Task.GENERATION
            batch.loss_mask[document] = torch.from_numpy(rng.random(len(modalities)) < loss_rate).float()
            start, number = start + len(modalities), number + 1
    return batch


def filled(batch: Batch) -> torch.Tensor:
    """Which tokens are no padding, bool [b, s]."""
    return batch.document != PADDING_DOCUMENT


def random_plan(seed: int) -> PlanConfig:
    """Any role for any class of token in any layer, with any projections."""
    rng = np.random.default_rng(seed)
    table = []
    for layer in range(LAYERS):
        # Even odds, mostly one role, or never one of them: layers that are nearly dense, and layers without queries.
        odds = rng.permutation([[1, 1, 1], [8, 1, 1], [1, 1, 0]][rng.integers(3)])
        for task in Task:
            for modality in Modality:
                role = Role(rng.choice(3, p=odds / odds.sum()))
                table.append(RoleEntry(layer, task.name.lower(), modality.name.lower(), role.name.lower()))
    kind = str(rng.choice(["shared", "separate", "delta"]))
    modules = [module for module in ALL_MODULES if rng.random() < 0.6] or ["qkv"]
    rank = int(rng.integers(1, 6)) if kind == "delta" and rng.random() < 0.5 else None
    return PlanConfig(table=table, projections=ProjectionConfig(kind, modules, rank, bool(rng.random() < 0.5)))


def assert_near(actual: torch.Tensor, expected: torch.Tensor, tolerance: float, what: str, floor: float = 0.0) -> None:
    """The relative error of a whole tensor, as Frobenius norms; errors up to ``floor`` count as rounding."""
    error, size = float((actual - expected).detach().norm()), float(expected.detach().norm())
    assert error <= tolerance * size + floor, f"{what}: error {error:.3g} in {size:.3g}"


def assert_equals_reference(
    model, config: Config, batch: Batch, tolerance: float, case: str = "", selection: Selection | None = None
) -> None:
    """Objective and the gradient of every parameter."""
    plan = plan_of(config)
    weights = weights_of(model)
    targets = (batch.loss_mask > 0).flatten().nonzero()[:, 0]
    labels, tasks = batch.labels.flatten()[targets], batch.task.flatten()[targets]
    expected_logits = reference.logits(weights, config.model, plan, batch, selection).flatten(0, 1)[targets]
    expected = reference.objective(expected_logits, labels, tasks)
    gradients = torch.autograd.grad(expected, tuple(weights.values()), allow_unused=True, materialize_grads=True)

    # Where the true gradient is zero (a softmax over one key), either side may be left with rounding.
    floor = 8 * torch.finfo(expected.dtype).eps * float(torch.stack([g.norm() for g in gradients]).norm())
    for bucketed in (False, True):
        case = f"{case} in buckets:" if bucketed else case
        route = Route.of(batch, plan, selection=selection, bucketed=bucketed)
        assert torch.equal(route.targets, targets), case
        ours = model(route)
        assert ours.shape == (len(targets), 1, VOCABULARY), case
        assert ours.dtype == expected_logits.dtype, case
        assert_near(ours[:, 0], expected_logits, tolerance, f"{case} logits")
        value = reference.objective(ours[:, 0], labels, tasks)
        assert_near(value, expected, tolerance, f"{case} objective")
        model.zero_grad()
        value.backward()
        for (name, parameter), gradient in zip(model.named_parameters(), gradients):
            actual = torch.zeros_like(gradient) if parameter.grad is None else parameter.grad
            assert_near(actual, gradient, tolerance, f"{case} gradient of {name}", floor)


@pytest.mark.parametrize("overrides", PLANS.values(), ids=PLANS)
def test_every_method_equals_the_reference(one_process, overrides):
    config = one_process(*SHAPE, *overrides)
    model = build(config)
    for seed in range(5):
        assert_equals_reference(model, config, random_rows(seed), 1e-9, f"rows {seed}:")


@pytest.mark.parametrize("unit", ["documents", "image_tokens"])
def test_any_role_table_with_a_dense_share_equals_the_reference(one_process, unit):
    one_process(*SHAPE)
    for seed in range(8):
        plan = dataclasses.replace(random_plan(seed), dense_share=DenseShareConfig(unit))
        config, selection = dataclasses.replace(config_of(), plan=plan), Selection(0.5, seed)
        assert_equals_reference(build(config, seed), config, random_rows(seed), 1e-9, f"table {seed}:", selection)


@pytest.mark.parametrize("block", range(8))
def test_any_role_table_equals_the_reference(one_process, block):
    one_process(*SHAPE)
    for seed in range(25 * block, 25 * (block + 1)):
        config = config_of(f"model.tie_embeddings={'true' if seed % 4 == 0 else 'false'}", *features(seed))
        config = dataclasses.replace(config, plan=random_plan(seed))
        case = f"table {seed}:"
        roles = {(int(e.layers), e.task, e.modality): e.role for e in config.plan.table}
        for (layer, task, modality), role in roles.items():
            assert plan_of(config).role(layer, Task[task.upper()], Modality[modality.upper()]).name == role.upper()
        assert_equals_reference(build(config, seed), config, random_rows(1000 + seed), 1e-9, case)
        if seed % 5 == 0:
            single = build(config, seed, torch.float32)
            assert_equals_reference(single, config, random_rows(1000 + seed), 1e-5, f"float32 {case}")


@pytest.mark.parametrize("overrides", PLANS.values(), ids=PLANS)
def test_logits_of_any_chosen_positions_equal_the_reference(one_process, overrides):
    config = one_process(*SHAPE, *overrides)
    model, plan = build(config), plan_of(config)
    for seed in range(3):
        batch = random_rows(seed)
        rate = (0.1, 0.5, 1.0)[seed]
        mask = filled(batch) & (torch.rand(batch.shape, generator=torch.Generator().manual_seed(seed)) < rate)
        route = Route.of(batch, plan, logit_mask=mask)
        assert torch.equal(route.targets, mask.flatten().nonzero()[:, 0])
        with torch.no_grad():
            expected = reference.logits(weights_of(model), config.model, plan, batch)[mask]
            assert_near(model(route)[:, 0], expected, 1e-9, f"rows {seed}")


def test_a_batch_of_padding_has_no_logits_and_no_gradient(one_process):
    config = one_process(*SHAPE, "plan.preset=himix_hmgen_share_partial")
    model = build(config)
    batch = random_rows(0)
    batch.document[:], batch.modality[:], batch.task[:] = PADDING_DOCUMENT, Modality.TEXT, Task.TEXT
    batch.positions[:], batch.loss_mask[:] = 0, 0
    logits = model(Route.of(batch, plan_of(config)))
    assert logits.shape == (0, 1, VOCABULARY)
    logits.sum().backward()
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.parameters())


def states_around_layers(model) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """A list that gets (input, output), each [tokens, h], of every layer as the model runs."""
    inputs, seen = [], []

    def whole(hidden_states) -> torch.Tensor:
        return joined(hidden_states).detach().clone()[:, 0]

    def enter(_, args, kwargs):
        inputs.append(whole(args[0] if args else kwargs["hidden_states"]))

    def leave(_, args, kwargs, output):
        seen.append((inputs[-1], whole(output[0] if isinstance(output, tuple) else output)))

    for layer in model.decoder.layers:
        layer.register_forward_pre_hook(enter, with_kwargs=True)
        layer.register_forward_hook(leave, with_kwargs=True)
    return seen


def assert_others_unchanged(config: Config, batch: Batch, dtype: torch.dtype) -> int:
    """Only FULL tokens leave a layer changed, and they all do. Gives the number of tokens that were not FULL."""
    model, plan = build(config, dtype=dtype), plan_of(config)
    seen = states_around_layers(model)
    route = Route.of(batch, plan)
    with torch.no_grad():
        model(route)
        expected = reference.hidden_states(weights_of(model), config.model, plan, batch)
    stored = route.order >= 0
    rows = route.order[stored]
    assert len(rows.unique()) == len(rows)
    assert filled(batch).flatten()[rows].sum() == filled(batch).sum()
    assert len(seen) == LAYERS
    idle = 0
    for layer, (before, after) in enumerate(seen):
        full = (reference.roles_of(plan, layer, batch).flatten()[route.order] == Role.FULL) & stored
        assert torch.equal(before[~full], after[~full]), f"layer {layer}"
        assert (before[full] != after[full]).any(dim=1).all(), f"layer {layer}"
        if dtype == torch.float64:
            assert_near(after[stored], expected[layer].flatten(0, 1)[rows], 1e-9, f"layer {layer}")
        idle += int((~full & stored).sum())
    return idle


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_tokens_that_are_not_full_leave_every_layer_with_the_bits_they_came_with(one_process, dtype):
    one_process(*SHAPE)
    configs = [config_of(*overrides) for overrides in PLANS.values()]
    configs += [dataclasses.replace(config_of(), plan=random_plan(seed)) for seed in range(20)]
    idle = [assert_others_unchanged(config, random_rows(seed), dtype) for seed, config in enumerate(configs)]
    assert sum(idle) > 1000


def component_gradients(model, config: Config, batch: Batch) -> dict[str, float]:
    """Largest entry of the gradient of each image-specific parameter."""
    model.zero_grad()
    route = Route.of(batch, plan_of(config), logit_mask=filled(batch))
    cross_entropy(model(route)[:, 0], batch.labels.flatten()[route.targets]).backward()
    names = {name for name, _ in model.named_parameters() if is_component(name)}
    assert names
    return {n: 0.0 if p.grad is None else float(p.grad.abs().max()) for n, p in model.named_parameters() if n in names}


def is_component(name: str) -> bool:
    return name.rsplit(".", 1)[1].startswith(("image_", "understanding_", "generation_"))


NO_IMAGES = [RoleEntry("all", "all", "image", "skip")]


@pytest.mark.parametrize("modality,table", [(Modality.TEXT, []), (None, NO_IMAGES)], ids=["text", "images_skip"])
@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
def test_text_tokens_never_touch_what_is_for_images(one_process, split, modality, table):
    one_process(*SHAPE)
    config = dataclasses.replace(config_of(), plan=PlanConfig(table=table, projections=split))
    model = build(config)
    batch = random_rows(3, modality, rows=4)
    assert len(batch.task[filled(batch)].unique()) == len(Task)
    assert not any(component_gradients(model, config, batch).values())
    with torch.no_grad():
        route = Route.of(batch, plan_of(config), logit_mask=filled(batch))
        before = model(route)
        for name, parameter in model.named_parameters():
            if is_component(name):
                parameter.fill_(float("nan"))
        assert_near(model(route), before, 0.0, "logits")


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
def test_images_train_what_is_for_them(one_process, split):
    one_process(*SHAPE)
    config = dataclasses.replace(config_of(), plan=PlanConfig(projections=split))
    model, batch = build(config), random_rows(3, rows=4)
    assert all(component_gradients(model, config, batch).values())


@pytest.mark.parametrize("overrides", PLANS.values(), ids=PLANS)
def test_a_document_alone_equals_the_document_in_a_packed_row(one_process, overrides):
    config = one_process(*SHAPE, *overrides)
    model = build(config)

    def losses(batch: Batch) -> torch.Tensor:
        """Of every token that is no padding."""
        route = Route.of(batch, plan_of(config), logit_mask=filled(batch))
        return cross_entropy(model(route)[:, 0], batch.labels.flatten()[route.targets], reduction="none")

    rows = random_rows(4)
    assert len(rows.document.unique()) > 3
    with torch.no_grad():
        for row in range(2):
            packed = rows.rows(row, row + 1)
            in_row, numbers = losses(packed), packed.document[filled(packed)]
            for number in numbers.unique():
                columns = packed.document[0] == number
                alone = Batch(*(getattr(packed, name)[:, columns] for name in Batch.names()))
                alone.document = torch.zeros_like(alone.document)
                assert_near(in_row[numbers == number], losses(alone), 1e-9, f"row {row}, document {number}")


class TestReference:
    """The reference itself against Hugging Face's Llama."""

    MODEL = ModelConfig(3, 32, 4, 2, 48, rotary_base=500.0)

    def llama(self):
        from transformers import LlamaConfig, LlamaForCausalLM

        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCABULARY,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=3,
                num_attention_heads=4,
                num_key_value_heads=2,
                rms_norm_eps=self.MODEL.norm_epsilon,
                tie_word_embeddings=False,
                rope_parameters={"rope_type": "default", "rope_theta": 500.0},
            )
        )
        rng = np.random.default_rng(0)
        for parameter in model.parameters():
            noise = torch.from_numpy(0.2 * rng.standard_normal(parameter.shape))
            parameter.data.copy_(noise + 1 if parameter.dim() == 1 else noise)
        return model.requires_grad_(False)

    def rows(self) -> Batch:
        """Two documents of understanding, an image of 15 tokens before 10 of text."""
        batch = Batch.zeros(2, 25)
        batch.tokens = torch.randint(VOCABULARY, (2, 25), generator=torch.Generator().manual_seed(0))
        batch.positions[:] = torch.arange(25)
        batch.modality[:, :15] = Modality.IMAGE
        return batch

    def logits(self, llama, batch: Batch, role: str) -> torch.Tensor:
        from megatron_ext.hugging_face.weights import StateDict, parameters_of

        plan = Plan.of(PlanConfig(table=[RoleEntry("all", "understanding", "image", role)]), self.MODEL.num_layers)
        return reference.logits(parameters_of(StateDict(llama.state_dict(), self.MODEL)), self.MODEL, plan, batch)

    def test_dense_equals_llama(self):
        llama, batch = self.llama(), self.rows()
        assert_near(self.logits(llama, batch, "full"), llama(batch.tokens).logits, 1e-5, "logits")

    def test_skipped_images_equal_llama_without_them(self):
        llama, batch = self.llama(), self.rows()
        ours = self.logits(llama, batch, "skip")
        expected = llama(batch.tokens[:, 15:], position_ids=batch.positions[:, 15:]).logits
        assert_near(ours[:, 15:], expected, 1e-5, "logits of text")
        untouched = llama.lm_head(llama.model.norm(llama.model.embed_tokens(batch.tokens[:, :15])))
        assert_near(ours[:, :15], untouched, 1e-5, "logits of images")

    def test_key_value_only_images_equal_llama_with_a_cache_of_their_embeddings(self):
        from transformers import DynamicCache
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        llama, batch = self.llama(), self.rows()
        embedded = llama.model.embed_tokens(batch.tokens[:, :15])
        cos, sin = llama.model.rotary_emb(embedded, batch.positions[:, :15])
        cache = DynamicCache()
        for number, layer in enumerate(llama.model.layers):
            normed = layer.input_layernorm(embedded)
            key, value = (
                project(normed).view(2, 15, 2, 8).transpose(1, 2)
                for project in (layer.self_attn.k_proj, layer.self_attn.v_proj)
            )
            cache.update(apply_rotary_pos_emb(key, key, cos, sin)[0], value, number)
        expected = llama(batch.tokens[:, 15:], position_ids=batch.positions[:, 15:], past_key_values=cache).logits
        assert_near(self.logits(llama, batch, "kv_only")[:, 15:], expected, 1e-5, "logits of text")


def test_rows_that_do_not_change_are_normed_once(one_process, monkeypatch):
    from megatron_ext.transformer.norm import InputNorm

    config = one_process(*SHAPE, "plan.preset=himix")
    model, forward, normed = build(config), InputNorm.forward, []

    def counting(self, full, kv_only):
        normed.append(0 if kv_only is None else kv_only.shape[0])
        return forward(self, full, kv_only)

    monkeypatch.setattr(InputNorm, "forward", counting)
    route = Route.of(random_rows(1), plan_of(config))
    model(route)
    assert len(normed) == LAYERS and normed[0] > 0 and not any(normed[1:])
