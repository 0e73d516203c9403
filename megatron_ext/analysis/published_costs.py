"""The costs that arXiv 2606.01503 prints for its methods (tables 1 to 3), relative to dense, next to this project's.

The paper does not give the length of its prompts. The documents here are those whose cost by this project's formula is
the printed cost: 72 text tokens per image of 256 tokens for understanding, and the image alone for generation. Costs
with a caption of 30 tokens are given separately. The output head counts all tokens that are FULL in the last layer.
"""

from dataclasses import dataclass

from megatron_ext.analysis import results
from megatron_ext.config import ModelConfig, PlanConfig
from megatron_ext.routing.document_mix import mix_batch
from megatron_ext.routing.flops import count, dense, forward_flops, with_all_logits
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


def flops_ratio(plan: Plan, mix: str) -> float:
    """The cost of a plan on a mix of documents, relative to dense, by the paper's accounting and for its model."""
    batch = mix_batch(mix)
    reduced_flops, dense_flops = (
        forward_flops(MODEL, VOCABULARY, p, with_all_logits(count(batch, p), p)) for p in (plan, dense(plan))
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
