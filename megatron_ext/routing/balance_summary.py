"""Layers of each pipeline stage that balance a plan's work on given documents, as numbers and as text."""

import random
from itertools import chain, islice

from megatron_ext.config import Config
from megatron_ext.data.batch import Batch
from megatron_ext.routing.document_mix import cut, drawn_rows, mix_documents
from megatron_ext.routing.flops import count, head_flops, layer_flops, projector_flops, with_all_logits
from megatron_ext.routing.pipeline_balance import ModelCosts, balance
from megatron_ext.routing.pipeline_layout import even_counts, layers_of_chunks, layout_string
from megatron_ext.routing.plan import Plan


def sampled_costs(
    config: Config, vocab_size: int, mix: str, micro_batches: int, all_logits: bool = False
) -> ModelCosts:
    """FLOPs of forward passes of micro-batches whose rows are filled with documents drawn from a mix.

    Args:
        vocab_size: rows of the output head.
        mix: as for :func:`~megatron_ext.routing.document_mix.mix_batch`.
        all_logits: compute the output head for all tokens that are FULL in the last layer instead of those with loss.
    """
    model, plan = config.model, Plan.from_config(config)
    length, size = config.data.sequence_length, config.training.micro_batch_size
    weights, lengths, parts = [], [], []
    for number, batch in mix_documents(mix, model.image_codes.depth, config.data.generation_text):
        pieces = cut(batch, length)
        weights.append(number)
        lengths.append([piece.shape[1] for piece in pieces])
        parts.append([_flops(config, vocab_size, plan, piece, all_logits) for piece in pieces])
    rows, columns = drawn_rows(random.Random(0), weights, lengths, length), []
    for _ in range(micro_batches):
        documents = chain.from_iterable(islice(rows, size))
        columns.append([float(sum(flops)) for flops in zip(*(parts[n][piece] for n, piece in documents))])
    *layers, first, last = map(list, zip(*columns))
    return ModelCosts(layers, first, last)


def _flops(config: Config, vocab_size: int, plan: Plan, batch: Batch, all_logits: bool) -> list[int]:
    """FLOPs of the layers, and of what comes before and after them."""
    model = config.model
    counts = with_all_logits(count(batch, plan), plan) if all_logits else count(batch, plan)
    return [*layer_flops(model, plan, counts), projector_flops(model, counts), head_flops(model, vocab_size, counts)]


def summarize_balance(config: Config, vocab_size: int, mix: str, micro_batches: int, all_logits: bool = False) -> dict:
    """The even layout, that of the configuration and the balanced one, with the time that a step of each takes by
    simulation over that of the same work without waiting.

    Args:
        micro_batches: of a step and replica.
        all_logits: as for :func:`sampled_costs`.
    """
    parallel = config.parallel
    costs = sampled_costs(config, vocab_size, mix, micro_batches, all_logits)
    layouts = {"even": even_counts(config.model.num_layers, parallel.pipeline * parallel.virtual_pipeline)}
    given = layers_of_chunks(parallel.layout) if parallel.layout else layouts["even"]
    if given != layouts["even"]:
        layouts["given"] = given
    layouts["balanced"] = balance(costs, parallel.pipeline, parallel.virtual_pipeline)
    steps = {name: costs.simulate(counts, parallel.pipeline) for name, counts in layouts.items()}
    return {
        "micro_batches": micro_batches,
        "layouts": {
            name: {
                "layout": layout_string(layouts[name]),
                "over_ideal": step.over_ideal,
                "idle_of_stages": [seconds / step.makespan for seconds in step.idle],
                "of_even": step.makespan / steps["even"].makespan,
            }
            for name, step in steps.items()
        },
    }


def describe_balance(summary: dict) -> str:
    """The numbers of :func:`summarize_balance` as text."""
    lines = [f"pipeline layouts, a step of {summary['micro_batches']} micro-batches simulated:"]
    for name, layout in summary["layouts"].items():
        idle = ", ".join(f"{share:.0%}" for share in layout["idle_of_stages"])
        lines.append(
            f"  {name:<8}  parallel.layout='{layout['layout']}'  {layout['over_ideal']:.3f} of the time without "
            f"waiting, {layout['of_even']:.3f} of the even one's; stages idle {idle}"
        )
    return "\n".join(lines)
