"""Memory that training steps take on each rank against what ``tools/plan_run.py`` predicts.

    python benchmarks/plan_memory.py                                     # all cases, on CPU processes (5 minutes)
    python benchmarks/plan_memory.py --only tp2-sp,pp2
    python benchmarks/plan_memory.py --json FILE --markdown FILE

Real training steps in float32 over gloo: the bytes of all tensors alive at once, from the outputs of every operator, in
the second step, when optimizer states are there. The prediction uses nothing that was measured. ``total`` compares the
peak of a rank, ``activations`` the peak without weights, gradients and optimizer states; both are judged.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from megatron_ext import command_line, config_file, files
from megatron_ext.config import Config
from megatron_ext.data.batch import Batch
from megatron_ext.planning.devices import DEVICES
from megatron_ext.planning.memory import MicroBatchMemory, rank_memory
from megatron_ext.planning.workload import Workload
from megatron_ext.routing.document_mix import mix_batch
from megatron_ext.routing.plan import Plan
from parity_layouts import overrides, processes

VOCABULARY = 4096
BASE = [
    "model.num_layers=8",
    "model.hidden_size=256",
    "model.num_attention_heads=8",
    "model.num_query_groups=4",
    "model.implementation=local",
    "data.sequence_length=512",
    "training.micro_batch_size=2",
    "training.global_batch_size=8",
    "training.iterations=1000",
]
PLANS = {
    "dense": [],
    "himix": ["plan.preset=himix"],
    "share partial": ["plan.preset=himix_hmgen_share_partial"],
    "share partial, norms": ["plan.preset=himix_hmgen_share_partial", "model.qk_norm=true"],
}
CASES = (
    ("tp1", "share partial", "none"),
    ("tp2", "himix", "none"),
    ("tp2-sp", "dense", "none"),
    ("tp2-sp", "himix", "none"),
    ("tp2-sp", "share partial", "full"),
    ("pp2", "dense", "none"),
    ("pp2", "share partial", "none"),
    ("pp2-vp2", "himix", "none"),
    ("pp2-vp2", "share partial", "full"),
    ("cp2", "dense", "none"),
    ("cp2", "himix", "none"),
    ("cp2", "share partial", "selective"),
    ("dp2-sharded", "dense", "selective"),
    ("dp2-sharded", "himix", "none"),
    ("dp2-sharded", "share partial", "full"),
    ("tp2-pp2-uneven", "share partial, norms", "none"),
)
"""Layout, plan and ``training.recompute``."""
MIX = (
    "understanding: 200 image, 40 text, 12 answer",
    "generation: 30 text, 200 image",
    "text: 90 text",
    "understanding: 100 image, 20 text, 100 image, 20 answer",
)
LIMITS = {"total": 0.06, "activations": 0.25}
"""Largest errors that pass."""


def case_config(layout: str, plan: str, recompute: str) -> Config:
    """The configuration of a case."""
    settings = [*BASE, *PLANS[plan], *overrides(layout), f"training.recompute={recompute}"]
    if "sharded" in layout:
        settings.append("parallel.distributed_optimizer=true")
    return config_file.load(Config, [], settings)


def rows_of_documents(rows: int, length: int) -> Batch:
    """Rows [rows, length] of documents drawn from :data:`MIX`, each followed by padding where no document fits."""
    random, documents = np.random.default_rng(1), [mix_batch(mix) for mix in MIX]
    batch = Batch.zeros(rows, length).arrays()
    batch.document[:] = -1
    for row in range(rows):
        start = number = 0
        while True:
            document = documents[int(random.integers(len(documents)))]
            stop = start + document.shape[1]
            if stop > length:
                break
            for name in ("loss_mask", "positions", "modality", "task"):
                getattr(batch, name)[row, start:stop] = getattr(document, name)[0]
            batch.document[row, start:stop] = number
            start, number = stop, number + 1
    batch.tokens[:] = random.integers(0, VOCABULARY, batch.shape)
    batch.labels[:] = random.integers(0, VOCABULARY, batch.shape)
    return batch


def measure(config: Config) -> tuple[int, int]:
    """Bytes of this rank that stay between steps, and most of the second step."""
    from megatron.core import parallel_state

    from megatron_ext.training.setup import build_model, build_optimizer
    from megatron_ext.training.step import train_step
    from megatron_ext.transformer.resolved import resolve
    from training_step.memory import PeakStorage
    from training_step.random_rows import step_input

    batch = rows_of_documents(config.training.global_batch_size, config.data.sequence_length)
    rows = batch.shape[0] // parallel_state.get_data_parallel_world_size()
    start = parallel_state.get_data_parallel_rank() * rows
    step = step_input(batch.rows(start, start + rows), config)
    with PeakStorage() as memory:
        chunks = build_model(resolve(config, VOCABULARY))
        optimizer = build_optimizer(config, chunks)
        train_step(chunks, optimizer, step, config)
        memory.peak = memory.live
        train_step(chunks, optimizer, step, config)
        return memory.live, memory.peak


def predict(config: Config, world_size: int, replica: int) -> list[tuple[int, int]]:
    """The same as :func:`measure` for a rank of each pipeline stage of a replica, as predicted."""
    batch = rows_of_documents(config.training.global_batch_size, config.data.sequence_length)
    rows = batch.shape[0] // config.data_parallel(world_size)
    own = batch.rows(replica * rows, (replica + 1) * rows)
    workload = Workload.of_batch(own, Plan.from_config(config))
    sizes = MicroBatchMemory(config, workload, VOCABULARY, DEVICES["cpu"], in_order=True)
    ranks = rank_memory(config, sizes, VOCABULARY, world_size, DEVICES["cpu"])
    return [(rank.static, rank.total) for rank in ranks]


def worker(cases: list[list[str]], file: Path) -> None:
    """One rank of a group of processes that goes through cases of the same size of world."""
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state

    from megatron_ext import distributed

    torch.set_num_threads(1)
    meeting_point = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    for case in cases:
        config = case_config(*case)
        distributed.initialize(config, dist.PrefixStore("/".join(case), meeting_point))
        place = parallel_state.get_pipeline_model_parallel_rank(), parallel_state.get_data_parallel_rank()
        results = [None] * dist.get_world_size()
        dist.all_gather_object(results, (*place, *measure(config)))
        distributed.shut_down()
        if int(os.environ["RANK"]) == 0:
            known = files.read_json(file) if file.exists() else []
            files.write_json(file, [*known, {"case": case, "ranks": results}])


def launch(size: int, cases: list[list[str]], file: Path) -> None:
    """Run cases in ``size`` processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(size)]
    command += ["--master_addr", "127.0.0.1", "--master_port", str(port), __file__]
    command += ["--worker", json.dumps(cases), "--json", str(file)]
    subprocess.run(command, check=True, timeout=3600, env={**os.environ, "OMP_NUM_THREADS": "1"})


def compare(cases: list[list[str]]) -> list[dict]:
    """Measured and predicted bytes of each case, with the errors of the rank that is furthest off."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "measured.json"
        for size in sorted({processes(layout) for layout, *_ in cases}):
            launch(size, [case for case in cases if processes(case[0]) == size], file)
        results = [judged(*entry["case"], entry["ranks"]) for entry in files.read_json(file)]
    return results


def judged(layout: str, plan: str, recompute: str, measured: list[tuple[int, int, int, int]]) -> dict:
    """A case with predictions and errors, from stage, replica, static bytes and peak of each rank."""
    config, ranks = case_config(layout, plan, recompute), []
    for stage, replica, *sizes in measured:
        predicted = predict(config, processes(layout), replica)[stage]
        ranks.append({"stage": stage, "replica": replica, "measured": sizes, "predicted": list(predicted)})
    return {"layout": layout, "plan": plan, "recompute": recompute, "ranks": ranks} | _errors(ranks)


def _errors(ranks: list[dict]) -> dict[str, float]:
    def furthest(value) -> float:
        return max((value(r["predicted"]) / value(r["measured"]) - 1 for r in ranks), key=abs)

    return {
        "static": furthest(lambda pair: pair[0]),
        "activations": furthest(lambda pair: pair[1] - pair[0]),
        "total": furthest(lambda pair: pair[1]),
    }


def table(results: list[dict]) -> str:
    """The results as a Markdown table."""
    lines = [
        "| layout | plan | recompute | measured, MB per stage | predicted | static | activations | total |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for result in results:
        stages = {rank["stage"]: rank for rank in result["ranks"]}
        sizes = [
            " ".join(f"{stages[s][kind][1] / 1e6:.0f}" for s in sorted(stages)) for kind in ("measured", "predicted")
        ]
        errors = [f"{result[name]:+.1%}" for name in ("static", "activations", "total")]
        lines.append("| " + " | ".join([*(result[k] for k in ("layout", "plan", "recompute")), *sizes, *errors]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = command_line.parser(__doc__.splitlines()[0], "python benchmarks/plan_memory.py --only tp2-sp,pp2")
    layouts = ",".join(dict.fromkeys(layout for layout, *_ in CASES))
    parser.add_argument("--only", default=layouts, help="comma-separated layouts (default: all)")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the table")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return worker(json.loads(arguments.worker), arguments.json)
    results = compare([list(case) for case in CASES if case[0] in arguments.only.split(",")])
    print(table(results))
    if arguments.json:
        files.write_json(arguments.json, results)
    if arguments.markdown:
        arguments.markdown.write_text(table(results) + "\n")
    worst = {name: max(abs(result[name]) for result in results) for name in LIMITS}
    errors = ", ".join(f"{name} {worst[name]:.1%} (limit {limit:.0%})" for name, limit in LIMITS.items())
    print(f"{len(results)} cases; largest errors of a rank's peak: {errors}")
    if any(worst[name] > limit for name, limit in LIMITS.items()):
        sys.exit(1)


if __name__ == "__main__":
    command_line.run(main)
