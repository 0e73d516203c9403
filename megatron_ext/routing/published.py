"""The cost that arXiv 2606.01503 (tables 1 to 3) gives for its methods, relative to the dense model, beside ours.

The paper does not say how long its prompts are. The documents here are those whose cost under our formula is the
printed one: 72 text tokens to an image of 256 for understanding, and the image alone for generation. A caption of 30
tokens is given apart. The output head is counted for all tokens that are FULL in the last layer.
"""

from dataclasses import dataclass

from megatron_ext.analysis import results
from megatron_ext.config import ModelConfig, PlanConfig
from megatron_ext.routing.cost import count, dense, forward_flops, with_all_logits
from megatron_ext.routing.document_mix import mix_batch
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

VOCABULARY = 128256

UNDERSTANDING = "understanding: 256 image, 72 text"
GENERATION = "generation: 256 image"
CAPTIONED = "generation: 30 text, 256 image"


@dataclass(frozen=True)
class Published:
    """A row of the paper's tables, by its name in analysis/published.json: the plan that it is here, and what it is
    trained on."""

    name: str
    plan: PlanConfig
    understanding: bool
    generation: bool


PUBLISHED = (
    Published("HiMix", PlanConfig("himix"), True, False),
    Published("HMGen, 3 shallow layers", PlanConfig("hmgen", shallow_count=3), False, True),
    Published("HMGen, 5 shallow layers", PlanConfig("hmgen", shallow_count=5), False, True),
    Published("HiMix-HMGen (Share All)", PlanConfig("himix_hmgen_share_all"), True, True),
    Published("HiMix-HMGen (Share Partial)", PlanConfig("himix_hmgen_share_partial"), True, True),
)


def flops_ratio(plan: Plan, mix: str) -> float:
    """Cost of a plan on a mix, relative to dense, by the paper's accounting and for its model."""
    batch = mix_batch(mix)
    ours, theirs = (
        forward_flops(MODEL, VOCABULARY, p, with_all_logits(count(batch, p), p)) for p in (plan, dense(plan))
    )
    return ours / theirs


def compare() -> list[dict]:
    """The paper's figures and ours; for a unified method, ours is the mean of the two tasks' ratios."""
    printed = {row.method: row.flops_ratio for row in results.published().rows}
    rows = []
    for row in PUBLISHED:
        plan = Plan.of(row.plan, MODEL.num_layers)
        understanding = [flops_ratio(plan, UNDERSTANDING)] if row.understanding else []
        alone, captioned = (
            understanding + ([flops_ratio(plan, mix)] if row.generation else []) for mix in (GENERATION, CAPTIONED)
        )
        rows.append(
            {
                "method": row.name,
                "paper": printed[row.name],
                "ours": sum(alone) / len(alone),
                "ours_with_captions": sum(captioned) / len(captioned),
            }
        )
    return rows


def describe(rows: list[dict]) -> str:
    """The rows of :func:`compare` as a table."""
    lines = [f"{'FLOPs relative to dense':30}  paper   ours  ours with captions"]
    for row in rows:
        lines.append(f"{row['method']:30}  {row['paper']:5.2f}  {row['ours']:5.3f}  {row['ours_with_captions']:18.3f}")
    lines.append(
        f"{UNDERSTANDING}; {GENERATION} (captioned: {CAPTIONED.partition(': ')[2]}); unified: the mean of both."
    )
    lines.append("The output head is counted for all tokens that are FULL in the last layer.")
    return "\n".join(lines)
