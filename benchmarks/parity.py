"""Parallel layouts against one process: the same global batch, the same loss, the same gradient of every parameter,
under every plan.

    python benchmarks/parity.py                        # the whole table, on CPU processes (half an hour)
    python benchmarks/parity.py --layouts tp2,pp2,tp2-sp-dp2 --plans dense,himix
    python benchmarks/parity.py --markdown docs/parity.md --json parity.json    # goes on where it was stopped

A layout is written tp2-pp2-vp2-sp-dp2. For each one and each plan this measures the relative error of the loss and of
the gradient norm, and the largest relative error |g - g'| / |g'| over all parameters (Frobenius norms of whole
parameters), in float32 against one process. A further optimizer step is compared by its loss, with replicas also when
the optimizer's states are sharded.
"""

import argparse
import os
import re
import socket
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import torch

from megatron_ext import command_line, config_file
from megatron_ext.config import Config
from megatron_ext.data.batch import Batch
from megatron_ext.routing.plan import PRESETS
from megatron_ext.token_classes import PADDING_DOCUMENT, Modality, Task

VOCABULARY = 256
BASE = [
    "model.num_layers=8",
    "model.hidden_size=64",
    "model.num_attention_heads=8",
    "model.num_query_groups=4",
    "data.sequence_length=64",
    "training.micro_batch_size=1",
    "training.global_batch_size=8",
    "training.iterations=1000",
]
STEPS = 2
LIMIT = 1e-5

RANK = "plan.projections={kind: decomposed, rank: 4, per_task: true, modules: [qkv, proj, fc1, fc2]}"
PLANS = {
    **{preset: [f"plan.preset={preset}"] for preset in PRESETS},
    "rank 4 per task": ["plan.preset=himix_hmgen_share_partial", "plan.himix_start=2", RANK],
}


def all_layouts() -> list[str]:
    """{TP 1, 2, 4} x {PP 1, 2, 4, virtual} x {SP on, off} x {DP 1, 2} in up to 8 processes."""
    names = []
    for tp in (1, 2, 4):
        for pipeline in ("", "-pp2", "-pp2-vp2", "-pp4", "-pp4-vp2"):
            for sp in ("", "-sp") if tp > 1 else ("",):
                for dp in ("", "-dp2"):
                    name = f"tp{tp}{pipeline}{sp}{dp}"
                    if processes(name) <= 8:
                        names.append(name)
    return names


def overrides(layout: str) -> list[str]:
    """Configuration of a layout by its name."""
    keys = {"tp": "tensor", "pp": "pipeline", "vp": "virtual_pipeline"}
    sizes = re.findall(r"(tp|pp|vp)(\d+)", layout)
    return [f"parallel.{keys[k]}={n}" for k, n in sizes] + ["parallel.sequence=true"] * ("sp" in layout.split("-"))


def processes(layout: str) -> int:
    """Processes that a layout takes."""
    total = 1
    for _, size in re.findall(r"(tp|pp|dp)(\d+)", layout):
        total *= int(size)
    return total


def packed_batch(rows: int, length: int, seed: int) -> Batch:
    """Random packed rows: documents of all tasks and lengths, image runs, padding."""
    random = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=random)

    batch = Batch.zeros(rows, length)
    batch.tokens[:] = integers(0, VOCABULARY, rows, length)
    batch.labels[:] = integers(0, VOCABULARY, rows, length)
    batch.modality[:] = (batch.tokens >= VOCABULARY // 2) * Modality.IMAGE
    batch.loss_mask[:] = torch.rand(rows, length, generator=random) < 0.7
    for row in range(rows):
        start, number, used = 0, 0, length - int(integers(0, 6, 1))
        while start < used:
            stop = min(used, start + int(integers(1, 24, 1)))
            batch.document[row, start:stop] = number
            batch.positions[row, start:stop] = torch.arange(stop - start)
            batch.task[row, start:stop] = int(integers(0, len(Task), 1))
            start, number = stop, number + 1
        batch.document[row, used:] = PADDING_DOCUMENT
        batch.loss_mask[row, used:] = 0
    return batch


def measure(config: Config) -> tuple[dict[str, torch.Tensor], list[float], list[float]]:
    """This rank's gradients of the first step by global name, and the losses and gradient norms of all steps."""
    from megatron.core import parallel_state

    from megatron_ext.training.prepare import prepare
    from megatron_ext.training.setup import build_model, build_optimizer
    from megatron_ext.training.step import train_step
    from megatron_ext.transformer.initialization import global_parameters

    chunks = build_model(config, VOCABULARY)
    perturb(chunks)
    optimizer = build_optimizer(config, chunks)
    replicas, replica = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    rows = config.training.global_batch_size // replicas
    gradients, losses, norms = {}, [], []

    def keep_gradients(loss: float, grad_norm: float) -> bool:
        for chunk in chunks if not gradients else ():
            gradients.update((name, p.main_grad.clone()) for name, p in global_parameters(chunk.module))
        return True

    for step in range(STEPS):
        batch = packed_batch(config.training.global_batch_size, config.data.sequence_length, seed=step)
        batch = batch.rows(replica * rows, (replica + 1) * rows)
        step_input = prepare(batch, config, torch.cuda.current_device())
        result = train_step(chunks, optimizer, step_input, config, accept=keep_gradients)
        losses.append(result.loss)
        norms.append(result.grad_norm)
    return gradients, losses, norms


@torch.no_grad()
def perturb(chunks: list) -> None:
    """Move every weight a little, by its name, so that no difference of weights is zero and no gradient vanishes."""
    from megatron_ext.transformer.initialization import full_shape, global_parameters, shard

    for chunk in chunks:
        for name, parameter in global_parameters(chunk.module):
            random = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            noise = torch.empty(full_shape(name, parameter.shape)).normal_(std=0.02, generator=random)
            parameter += shard(noise, name).to(parameter.device)


def worker(layouts: list[str], plans: list[str], settings: list[str], folder: Path, result_file: Path) -> None:
    """One rank of a group of processes that goes through several layouts of the same size."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    from megatron_ext.training import distributed

    meeting_point = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    for layout in layouts:
        config = config_file.load(Config, [], BASE + settings + overrides(layout))
        config.validate(distributed.world_size())
        distributed.initialize(config, dist.PrefixStore(layout, meeting_point))
        results = {}
        for plan in plans:
            config = config_file.load(Config, [], BASE + settings + overrides(layout) + PLANS[plan])
            gradients, losses, norms = measure(config)
            gradients = {name: gradient.cpu() for name, gradient in gradients.items()}
            reference = folder / f"{plan}.pt"
            if not reference.exists():
                torch.save((gradients, losses, norms), reference)
            expected_gradients, expected_losses, expected_norms = torch.load(reference)
            results[plan] = {
                "loss": relative(losses[:1], expected_losses),
                "gradient": worst_gradient(gradients, expected_gradients),
                "gradient_norm": relative(norms[:1], expected_norms),
                "later_losses": relative(losses, expected_losses),
            }
            # The optimizer does not know of plans: one without and one with components stand for all.
            if parallel_state.get_data_parallel_world_size() > 1 and plan in (plans[0], plans[-1]):
                config.parallel.distributed_optimizer = config.parallel.overlap = True
                results[plan]["sharded_optimizer_losses"] = relative(measure(config)[1], expected_losses)
        if dist.get_rank() == 0:
            known = command_line.read_json(result_file) if result_file.exists() else {}
            known[layout] = known.get(layout, {}) | results
            command_line.write_json(result_file, known)
        # Groups hold threads; those of many layouts would drown the machine.
        distributed.shut_down()


def worst_gradient(gradients: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Largest relative error over all parameters; each rank holds its slices of some of them."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    from megatron_ext.transformer.initialization import shard

    assert expected.keys() >= gradients.keys()
    # Squared errors of the slices of one parameter add up over the tensor-parallel group.
    names = sorted(gradients)
    squares = torch.stack([(gradients[n] - shard(expected[n], n)).double().square().sum() for n in names])
    squares = squares.to(torch.cuda.current_device())
    dist.all_reduce(squares, group=parallel_state.get_tensor_model_parallel_group())
    sizes = torch.stack([expected[n].double().norm() for n in names]).to(squares.device)
    errors = squares.sqrt() / sizes.clamp(min=1e-30)
    worst = errors.max()
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return float(worst)


def relative(values: list[float], expected: list[float]) -> float:
    """Largest relative error of the first ``len(values)`` numbers."""
    return max(abs(v - e) / abs(e) for v, e in zip(values, expected))


def compare(
    layouts: list[str], plans: list[str], settings: list[str], minutes: float, file: Path | None = None
) -> dict[str, dict[str, dict]]:
    """Errors of each layout under each plan against one process; each size of world is started once.

    Args:
        file: where results are kept as they come; layouts that are there are not measured again.
    """
    with tempfile.TemporaryDirectory() as folder:
        result_file = file or Path(folder) / "results.json"
        known = command_line.read_json(result_file) if result_file.exists() else {}
        todo = [name for name in layouts if set(plans) - known.get(name, {}).keys()]
        for size in sorted({1, *map(processes, todo)}) if todo else ():
            group = [name for name in todo if processes(name) == size]
            group = ["tp1", *(name for name in group if name != "tp1")] if size == 1 else group
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(size)]
            command += ["--master_addr", "127.0.0.1", "--master_port", str(port), __file__, "--worker", folder]
            command += ["--layouts", ",".join(group), "--plans", ",".join(plans), "--json", str(result_file), *settings]
            subprocess.run(command, check=True, timeout=60 * minutes, env={**os.environ, "OMP_NUM_THREADS": "1"})
        results = command_line.read_json(result_file)
    return {name: results[name] for name in layouts}


def table(results: dict[str, dict[str, dict]]) -> str:
    """The results as a Markdown table: worst gradient by plan, then the worst of all plans for the other figures."""
    plans = list(dict.fromkeys(plan for of_plan in results.values() for plan in of_plan))
    others = {
        "loss": "loss",
        "gradient_norm": "gradient norm",
        "later_losses": "losses of 2 steps",
        "sharded_optimizer_losses": "sharded optimizer",
    }
    heads = ["layout", "processes", *(plan.replace("_", " ") for plan in plans), *others.values()]
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    for name, of_plan in results.items():
        cells = [f"{of_plan[plan]['gradient']:.0e}" if plan in of_plan else "" for plan in plans]
        for key in others:
            values = [r[key] for r in of_plan.values() if key in r]
            cells.append(f"{max(values):.0e}" if values else "")
        lines.append(f"| {name} | {processes(name)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def worst(results: dict[str, dict[str, dict]]) -> float:
    """Largest error of all."""
    return max(error for of_plan in results.values() for errors in of_plan.values() for error in errors.values())


def main() -> None:
    parser = command_line.parser(__doc__.splitlines()[0], "python benchmarks/parity.py --layouts tp2-sp,pp2-vp2")
    parser.add_argument("--layouts", default="all", help="comma-separated layouts (default: all of them)")
    parser.add_argument("--plans", default=",".join(PLANS), help="comma-separated plans (default: all of them)")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the table as a page of documentation")
    parser.add_argument("--minutes", type=float, default=60, help="time limit of each size of world")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("settings", nargs="*", metavar="section.key=value", help="settings of the model under test")
    arguments = parser.parse_args()
    layouts = all_layouts() if arguments.layouts == "all" else arguments.layouts.split(",")
    plans = arguments.plans.split(",")
    if unknown := [plan for plan in plans if plan not in PLANS]:
        parser.error(f"unknown plan {unknown[0]!r}; known: {', '.join(map(repr, PLANS))}")
    if arguments.worker:
        return worker(layouts, plans, arguments.settings, arguments.worker, arguments.json)
    results = compare(layouts, plans, arguments.settings, arguments.minutes, arguments.json)
    print(table(results))
    print(
        f"{len(results)} layouts x {len(plans)} plans; largest relative error {worst(results):.1e} (limit {LIMIT:.0e})"
    )
    if arguments.markdown:
        arguments.markdown.write_text(PAGE.format(settings=" ".join(BASE), table=table(results), count=len(results)))
    if worst(results) >= LIMIT:
        sys.exit(1)


PAGE = """# Parallel layouts agree

Made by `python benchmarks/parity.py --markdown docs/parity.md`. {count} layouts train the same model on the same
global batch under every plan, in float32 over gloo; each number is a relative error against one process. The model:
`{settings}`.

`tp` tensor, `pp` pipeline, `vp` virtual stages (interleaved schedule), `sp` sequence parallelism, `dp` replicas. Under
a plan's name stands the largest |g - g'| / |g'| over all parameters of the model, each taken whole; the other columns
are the worst of all plans. The last one repeats the steps with the optimizer's states sharded over the replicas. The
plan "rank 4 per task" lets HiMix begin in layer 2 and gives all four projections low-rank differences for each task. An
empty cell was not measured.

{table}
"""


if __name__ == "__main__":
    command_line.run(main)
