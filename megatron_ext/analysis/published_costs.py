"""The costs that arXiv 2606.01503 prints for its methods (tables 1 to 3), relative to dense, next to this project's.

The paper does not give the length of its prompts. The documents here are those whose cost by this project's formula is
the printed cost: 72 text tokens per image of 256 tokens for understanding, and the image alone for generation. Costs
with a caption of 30 tokens are given separately. The output head counts all tokens that are FULL in the last layer.

The paper builds on VILA-U, whose image tokens have several codes and a depth head (arXiv 2409.04429), and does not say
how large its own is. Its ratios fit the plain output head above, or a depth head of about the same cost, as the second
table shows: a published head of 6 layers of 2560 costs more than twice the layers of Llama 3.2 1B.
"""

from dataclasses import dataclass, replace

from megatron_ext.analysis import results
from megatron_ext.config import ModelConfig, PlanConfig
from megatron_ext.model_config import DepthHeadConfig, ImageCodesConfig
from megatron_ext.routing.document_mix import mix_batch
from megatron_ext.routing.flops import (
    TRAINING_PER_FORWARD,
    count,
    dense,
    forward_flops,
    projection_shapes,
    with_all_logits,
)
from megatron_ext.routing.image_code_costs import depth_head_multiply_adds, depth_head_parameters
from megatron_ext.routing.plan import Plan

MODEL = ModelConfig(
    num_layers=16,
    hidden_size=2048,
    num_attention_heads=32,
    num_query_groups=8,
    ffn_hidden_size=8192,
    tie_embeddings=True,
)
"""Llama 3.2 1B."""

LLAMA_2_7B = ModelConfig(num_layers=32, hidden_size=4096, num_attention_heads=32, ffn_hidden_size=11008)

VILA_U_HEAD = DepthHeadConfig(num_layers=6, hidden_size=2560, num_attention_heads=40)
"""Published with VILA-U's 7B."""


def _codes(depth: int, width: int, head: DepthHeadConfig) -> ImageCodesConfig:
    return ImageCodesConfig(depth, "tower", 16384, width, head=head)


HEADS = {
    "7B, 4 codes, 6 x 2560": replace(LLAMA_2_7B, image_codes=_codes(4, 1024, VILA_U_HEAD)),
    "7B, 16 codes, 6 x 2560": replace(LLAMA_2_7B, image_codes=_codes(16, 1152, VILA_U_HEAD)),
    "1B, 1 code, output head": MODEL,
    "1B, 4 codes, 6 x 2560": replace(MODEL, image_codes=_codes(4, 1024, VILA_U_HEAD)),
    "1B, 4 codes, 4 x 1024": replace(MODEL, image_codes=_codes(4, 1024, DepthHeadConfig())),
}
"""Models with the heads that may predict their image tokens; VILA-U at 256 pixels has 4 codes, at 384 pixels 16."""

HERE = HEADS["1B, 4 codes, 4 x 1024"]
"""The model of examples/studies/paper.yaml."""

VOCABULARY = 128256

UNDERSTANDING = "understanding: 256 image, 72 text"
GENERATION = "generation: 256 image"
CAPTIONED = "generation: 30 text, 256 image"
ANSWERED = "understanding: 256 image, 64 text, 8 answer"


@dataclass(frozen=True)
class PublishedMethod:
    """A row of the paper's tables: its name in analysis/published.json, its plan here, and the tasks it trains on."""

    name: str
    plan: PlanConfig
    understanding: bool
    generation: bool


METHODS = (
    PublishedMethod("HiMix", PlanConfig("himix"), True, False),
    PublishedMethod("HMGen, 3 shallow layers", PlanConfig("hmgen", shallow_count=3), False, True),
    PublishedMethod("HMGen, 5 shallow layers", PlanConfig("hmgen", shallow_count=5), False, True),
    PublishedMethod("HiMix-HMGen (Share All)", PlanConfig("himix_hmgen_share_all"), True, True),
    PublishedMethod("HiMix-HMGen (Share Partial)", PlanConfig("himix_hmgen_share_partial"), True, True),
)


def flops_ratio(plan: Plan, mix: str, model: ModelConfig = MODEL) -> float:
    """The cost of a plan on a mix of documents, relative to dense, by the paper's accounting and for its model."""
    batch = mix_batch(mix, model.image_codes.depth)
    reduced_flops, dense_flops = (
        forward_flops(model, VOCABULARY, p, with_all_logits(count(batch, p), p)) for p in (plan, dense(plan))
    )
    return reduced_flops / dense_flops


def compare() -> list[dict]:
    """The printed and the computed ratios; that of a unified method is the mean of its two tasks' ratios."""
    printed = {row.method: row.flops_ratio for row in results.published().rows}
    rows = []
    for method in METHODS:
        plan = Plan.of(method.plan, MODEL.num_layers)
        understanding = [flops_ratio(plan, UNDERSTANDING)] if method.understanding else []
        plain, captioned = (
            understanding + ([flops_ratio(plan, mix)] if method.generation else []) for mix in (GENERATION, CAPTIONED)
        )
        rows.append(
            {
                "method": method.name,
                "paper": printed[method.name],
                "ours": sum(plain) / len(plain),
                "ours_with_captions": sum(captioned) / len(captioned),
            }
        )
    return rows


def compare_heads() -> list[dict]:
    """For each of :data:`HEADS`, multiply-adds of the layers for a token and of the head for a predicted image token,
    and what HMGen costs on images alone, relative to dense."""
    rows = []
    for name, model in HEADS.items():
        stack = model.num_layers * sum(inputs * outputs for inputs, outputs in projection_shapes(model).values())
        head = depth_head_multiply_adds(model) or model.hidden_size * VOCABULARY
        hmgen = [
            flops_ratio(Plan.of(method.plan, model.num_layers), GENERATION, model)
            for method in METHODS
            if method.plan.preset == "hmgen" and model.num_layers == MODEL.num_layers
        ]
        parameters = depth_head_parameters(model) or None
        rows.append({"head": name, "stack": stack, "multiply_adds": head, "parameters": parameters, "hmgen": hmgen})
    return rows


def compare_training(tokens: float, flops_per_second: float) -> list[dict]:
    """What the rows of the paper's tables cost to train here (:data:`HERE`), with as many documents of each task.

    Args:
        tokens: of a unified run; a run on one task has those of its task.
        flops_per_second: that a GPU reaches.

    Returns:
        Name, tokens, training FLOPs and GPU-hours of each row.
    """
    dense_rows = (
        PublishedMethod("dense, understanding", PlanConfig(), True, False),
        PublishedMethod("dense, generation", PlanConfig(), False, True),
        PublishedMethod("dense, both", PlanConfig(), True, True),
    )
    pairs = tokens / mix_batch(f"{ANSWERED}; {CAPTIONED}").tokens.size
    rows = []
    for method in (*dense_rows, *METHODS):
        mix = "; ".join([ANSWERED] * method.understanding + [CAPTIONED] * method.generation)
        batch, plan = mix_batch(mix, HERE.image_codes.depth), Plan.of(method.plan, HERE.num_layers)
        flops = TRAINING_PER_FORWARD * pairs * forward_flops(HERE, VOCABULARY, plan, count(batch, plan))
        hours = flops / flops_per_second / 3600
        rows.append({"method": method.name, "tokens": pairs * batch.tokens.size, "flops": flops, "gpu_hours": hours})
    return rows


def describe_training(rows: list[dict]) -> str:
    """The rows of :func:`compare_training` as a table."""
    lines = [f"{'1B, 4 codes, 4 x 1024':28}  billion tokens    FLOPs  GPU-hours"]
    for row in rows:
        lines.append(f"{row['method']:28}  {row['tokens'] / 1e9:14.2f}  {row['flops']:.1e}  {row['gpu_hours']:9.0f}")
    lines.append(f"{'all':28}  {'':14}  {sum(r['flops'] for r in rows):.1e}  {sum(r['gpu_hours'] for r in rows):9.0f}")
    return "\n".join(lines)


def describe(rows: list[dict], heads: list[dict]) -> str:
    """The rows of :func:`compare` and of :func:`compare_heads` as two tables."""
    lines = [f"{'FLOPs relative to dense':30}  paper   ours  ours with captions"]
    for row in rows:
        lines.append(f"{row['method']:30}  {row['paper']:5.2f}  {row['ours']:5.3f}  {row['ours_with_captions']:18.3f}")
    lines.append(
        f"{UNDERSTANDING}; {GENERATION} (captioned: {CAPTIONED.partition(': ')[2]}); unified: the mean of both."
    )
    lines.append("The output head is counted for all tokens that are FULL in the last layer.")
    lines += ["", f"{'million multiply-adds':24}  layers  head  head / layers  HMGen, 3 and 5 shallow layers"]
    for row in heads:
        share, hmgen = row["multiply_adds"] / row["stack"], " ".join(f"{ratio:.3f}" for ratio in row["hmgen"])
        costs = f"{row['stack'] / 1e6:6.0f}  {row['multiply_adds'] / 1e6:4.0f}  {share:13.2f}"
        lines.append(f"{row['head']:24}  {costs}  {hmgen}".rstrip())
    lines.append("For a token in the layers, without attention, and a predicted image token in the head.")
    return "\n".join(lines)
