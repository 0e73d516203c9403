"""One rank of a world that trains over the stand-in for Transformer Engine; writes what it saw as JSON.

Megatron-Core looks for Transformer Engine when it is imported, so this is a separate program:

    RANK=0 WORLD_SIZE=2 ... python transformer_engine_ranks.py OUT.json
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_ext import config_file, distributed
from megatron_ext.checkpoints import state as checkpoint_state
from megatron_ext.config import Config
from megatron_ext.training.config_checks import validate
from megatron_ext.training.prepare import prepare
from megatron_ext.training.setup import build_model, build_optimizer
from megatron_ext.training.step import evaluate_step, evaluation_mode, train_step
from megatron_ext.transformer import fp8, resolved
from megatron_ext.transformer.resolved import resolve
from parity import perturb
from support.labelled_rows import VOCABULARY, generation, rows_of, text, understanding

SETTINGS = [
    "model.num_layers=2",
    "model.hidden_size=64",
    "model.num_attention_heads=4",
    "model.num_query_groups=2",
    "model.ffn_hidden_size=96",
    "training.micro_batch_size=1",
    "training.global_batch_size=4",
    "data.sequence_length=48",
    "plan.shallow_layers=[1]",
]
PLANS = {
    "dense": [],
    "himix": ["plan.preset=himix", "plan.himix_start=1"],
    "separate": ["plan.preset=himix_hmgen_share_all_separate", "plan.projections.per_task=true"],
    "low rank": ["plan.preset=himix_hmgen_share_partial", "plan.projections.rank=8"],
    "bias and norms": ["plan.preset=himix", "model.qkv_bias=true", "model.qk_norm=true", "model.head_size=24"],
}
ROWS = [
    [[understanding(6, (3, 2), (1, 3)), generation(4, 5)], [text(20)]],
    [[generation(2, 20)], [understanding(9, (4, 2)), understanding(3, (1, 1), (2, 2))]],
]


def model_and_rows(overrides: list[str]):
    config = config_file.load(Config, [], [*SETTINGS, *overrides])
    validate(config, dist.get_world_size())
    chunks = build_model(resolve(config, VOCABULARY))
    with torch.no_grad():
        perturb(chunks)
    optimizer = build_optimizer(config, chunks)
    optimizer.reload_model_params()
    batch, _ = rows_of(*ROWS[dist.get_rank()], length=48)
    return config, chunks, optimizer, batch


def over(implementation: str) -> None:
    """Build models from here on over torch's layers (local) or over the stand-in's (transformer_engine)."""
    resolved._implementation = lambda config: implementation


def gradients(overrides: list[str]) -> dict[str, torch.Tensor]:
    """Of every parameter, after two micro-batches."""
    config, chunks, optimizer, batch = model_and_rows(overrides)
    train_step(chunks, optimizer, prepare(batch, resolve(config)), config, accept=lambda *_: False)
    return {name: parameter.main_grad.clone() for name, parameter in chunks[0].named_parameters()}


def difference(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The largest between gradients, relative to the largest gradient."""
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    return max(float((actual[name] - expected[name]).abs().max()) for name in expected) / scale


def agreement(plan: list[str]) -> dict:
    """Of gradients over the stand-in with those over torch's layers in float32, and of those in FP8 with those in bf16,
    which the stand-in computes alike; and the projections whose weight gradients are fused."""
    over("local")
    expected = gradients(plan)
    over("transformer_engine")
    bf16, current = ([*plan, "training.precision=bf16", f"training.fp8={recipe}"] for recipe in ("none", "current"))
    _, chunks, *_ = model_and_rows(plan)
    fused = {n.split(".")[-1] for n, m in chunks[0].named_modules() if getattr(m, "fuse_wgrad_accumulation", False)}
    return {
        "float32": difference(gradients(plan), expected),
        "fp8": difference(gradients(current), gradients(bf16)),
        "fused": sorted(fused),
    }


def delayed() -> dict:
    """Histories of delayed scaling after two steps, and what becomes of them in another model's state."""
    from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

    config, chunks, optimizer, batch = model_and_rows(["training.precision=bf16", "training.fp8=delayed"])
    for _ in range(2):
        train_step(chunks, optimizer, prepare(batch, resolve(config)), config)
    histories = FP8GlobalStateManager.global_amax_history_buffer
    stored = chunks[0].state_dict()
    _, others, *_ = model_and_rows(["training.precision=bf16", "training.fp8=delayed"])
    others[0].load_state_dict(stored)
    states = [[m.fp8_meta["amax_history_fwd"] for m in _with_histories(c[0])] for c in (chunks, others)]
    sharded = checkpoint_state.model_state(chunks)["chunk0"]
    return {
        "registered": {direction: [list(h.shape) for h in kept] for direction, kept in histories.items()},
        "largest": [float(h.max()) for h in histories["fwd"]],
        "restored": all(torch.equal(a, b) for a, b in zip(*states)) and len(states[0]) == len(states[1]) == 8,
        "in checkpoints": sum(name.endswith("_extra_state") and "linear" in name for name in sharded),
    }


def _with_histories(chunk) -> list:
    return [m for m in chunk.modules() if getattr(m, "fp8_meta", None)]


def staleness() -> dict[str, float]:
    """How far a step moves logits, and how far they and the loss are, after it, from those of another model that has
    been given the new weights."""
    overrides = ["training.precision=bf16", "training.fp8=current", "optimizer.lr=0.05"]
    config, chunks, optimizer, batch = model_and_rows(overrides)
    before = _logits(chunks, config, batch)
    train_step(chunks, optimizer, prepare(batch, resolve(config)), config)
    after = _logits(chunks, config, batch)
    loss = evaluate_step(chunks, prepare(batch, resolve(config)), config)[0]
    _, others, *_ = model_and_rows(overrides)
    others[0].load_state_dict(chunks[0].state_dict())
    return {
        "moved": float((after - before).abs().max()),
        "stale": float((after - _logits(others, config, batch)).abs().max()),
        "stale loss": float((loss - evaluate_step(others, prepare(batch, resolve(config)), config)[0]).abs().max()),
    }


@torch.no_grad()
def _logits(chunks, config, batch) -> torch.Tensor:
    from megatron_ext.routing.plan import Plan
    from megatron_ext.routing.route import Route

    route = Route.of(batch, Plan.of(config.plan, config.model.num_layers), multiple=16)
    with evaluation_mode(chunks):
        return chunks[0].module(route).float()


def main(out: Path) -> None:
    distributed.initialize(config_file.load(Config, [], SETTINGS))
    fp8.why_not = lambda recipe: None
    results = {"plans": {name: agreement(plan) for name, plan in PLANS.items()}}
    results |= {"delayed": delayed(), "staleness": staleness()}
    out.write_text(json.dumps(results))
    distributed.shut_down()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
