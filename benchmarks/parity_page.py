"""The errors of all layouts as a page of the documentation."""

from parity_layouts import processes

PAGE = """# Parallel layouts agree

Made by `python benchmarks/parity.py --markdown docs/parity.md`. {count} layouts train the same model on the same
global batch under every plan, in float32 over gloo; each number is a relative error against one process. The model:
`{settings}`.

`tp` tensor, `cp` context, `pp` pipeline, `vp` virtual stages (interleaved schedule), `sp` sequence parallelism, `dp`
replicas; `uneven` stages of different depths, `selective` and `full` recomputation. The column of a plan is the largest
|g - g'| / |g'| over all parameters of the model, each taken whole; the other columns are the worst of all plans. The
last column repeats the steps with optimizer states sharded over context ranks and replicas. The plan
"rank 4 per task" starts HiMix in layer 2 and gives all four projections a low-rank delta of rank 4 for each task;
"interleaved documents" is separate projections for each task over rows that also hold documents with given and drawn
images. "4 codes" has image tokens of 4 codes, with projector and depth head, which takes 8 image tokens at once; one of
its micro-batches has no image, and another no text to learn. An empty cell was not measured.

The references are one process on a CPU. `--references FOLDER` keeps them (a file of 2 to 2.5 MB per plan). On a GPU
they must exist already, computed on a CPU by `python benchmarks/parity.py --layouts tp1 --references FOLDER`: a GPU is
never compared with itself. If there are more ranks than GPUs, all ranks share the first GPU, over nccl's sockets.

{table}
"""


def table(results: dict[str, dict[str, dict]]) -> str:
    """The results as a Markdown table: worst gradient by plan, then the worst of all plans for the other figures."""
    plans = list(dict.fromkeys(plan for plan_errors in results.values() for plan in plan_errors))
    others = {
        "loss": "loss",
        "logits": "logits",
        "gradient_norm": "gradient norm",
        "later_losses": "losses of 2 steps",
        "sharded_optimizer_losses": "sharded optimizer",
    }
    heads = ["layout", "processes", *(plan.replace("_", " ") for plan in plans), *others.values()]
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    for name, plan_errors in results.items():
        cells = [f"{plan_errors[plan]['gradient']:.0e}" if plan in plan_errors else "" for plan in plans]
        for key in others:
            values = [r[key] for r in plan_errors.values() if key in r]
            cells.append(f"{max(values):.0e}" if values else "")
        lines.append(f"| {name} | {processes(name)} | {' | '.join(cells)} |")
    return "\n".join(lines)
