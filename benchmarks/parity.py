"""Parallel layouts against one process: equal losses and gradients of every parameter on the same global batch,
under every plan.

    python benchmarks/parity.py                        # the whole table, on CPU processes (an hour)
    python benchmarks/parity.py --layouts tp2,pp2,tp2-sp-dp2 --plans dense,himix
    python benchmarks/parity.py --markdown docs/parity.md --json parity.json    # resumes where it stopped
    python benchmarks/parity.py --references FOLDER --layouts tp1               # on a CPU: computes the references
    python benchmarks/parity.py --references FOLDER --layouts tp1,tp2,tp2-sp    # on a GPU: against the CPU's

A layout is written tp2-pp2-vp2-cp2-sp-dp2. For each layout and plan this measures, in float32 against one process, the
relative error of the loss, of the logits and of the gradient norm, and the largest relative error |g - g'| / |g'| over
all parameters (Frobenius norms of whole parameters). The loss of a second optimizer step is compared too; with replicas
also with sharded optimizer states.

Each rank takes a GPU; if there are too few, all ranks take the first one (see one_gpu.py).
"""

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
import torch

from megatron_ext import command_line, config_file, cpu, files
from megatron_ext.config import Config
from megatron_ext.data.batch import Batch
from megatron_ext.errors import UserError
from megatron_ext.routing.plan import PRESETS
from megatron_ext.routing.route import Route
from megatron_ext.token_classes import PADDING_DOCUMENT, Modality, Task
from megatron_ext.training.prepare import Preparation
from megatron_ext.transformer.resolved import resolve
from one_gpu import share_one_gpu
from parity_layouts import all_layouts, overrides, processes
from parity_page import PAGE, table
from parity_references import MAKE, Measured, References, errors, relative
from training_step.random_rows import step_input

VOCABULARY = 256
BASE = [
    "model.num_layers=8",
    "model.hidden_size=64",
    "model.num_attention_heads=8",
    "model.num_query_groups=4",
    "model.implementation=local",
    "data.sequence_length=64",
    "training.micro_batch_size=1",
    "training.global_batch_size=8",
    "training.iterations=1000",
]
STEPS = 2
LIMIT = 1e-5

RANK = "plan.projections={kind: delta, rank: 4, per_task: true, modules: [qkv, proj, fc1, fc2]}"
CODES = [
    f"model.image_codes={{depth: 4, codebook: random, codebook_size: {VOCABULARY}, width: 24}}",
    "model.image_codes.head={num_layers: 2, hidden_size: 32, num_attention_heads: 4, chunk: 8}",
]
PLANS = {
    **{preset: [f"plan.preset={preset}"] for preset in PRESETS},
    "rank 4 per task": ["plan.preset=himix_hmgen_share_partial", "plan.himix_start=2", RANK],
    "interleaved documents": ["plan.preset=himix_hmgen_share_all_separate", "plan.projections={per_task: true}"],
    "drawn tables": ["plan.preset=himix_hmgen_share_partial", "plan.drawn_tables={count: 5}"],
    "4 codes": ["plan.preset=himix_hmgen_share_partial", *CODES],
}
INTERLEAVED = "interleaved documents"
"""The plan whose rows also hold documents with given and drawn images."""


def packed_batch(rows: int, length: int, seed: int, interleaved: bool = False, depth: int = 1) -> Batch:
    """Random packed rows: documents of all tasks and lengths, image runs, padding.

    Args:
        interleaved: understanding's documents have drawn images, too, which are of generation.
        depth: codes of an image token. With several, the first row has no image token, and the second no text target.
    """
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
    if interleaved:
        given = (batch.task == Task.UNDERSTANDING) & (batch.modality == Modality.IMAGE)
        batch.task[given & (batch.document >= 0) & (torch.rand(rows, length, generator=random) < 0.5)] = Task.GENERATION
    if depth > 1:
        batch.codes = integers(0, VOCABULARY, rows, length, depth).int()
        batch.modality[0] = Modality.TEXT
        batch.loss_mask[1] *= torch.from_numpy(batch.predicts_image()[1])
    return batch


def measure(config: Config, interleaved: bool = False) -> Measured:
    """Run the steps on this rank and return what it measures.

    Args:
        interleaved: the rows also hold interleaved documents.
    """
    from megatron.core import parallel_state

    from megatron_ext.training.setup import build_model, build_optimizer
    from megatron_ext.training.step import train_step
    from megatron_ext.transformer.initialization import global_parameters

    codes = config.model.image_codes
    code_vectors = None
    if codes.width:
        code_vectors = torch.empty(codes.codebook_size, codes.width).normal_(generator=torch.Generator().manual_seed(0))
    chunks = build_model(resolve(config, VOCABULARY), code_vectors)
    perturb(chunks)
    optimizer = build_optimizer(config, chunks)
    replicas, replica = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    rows = config.training.global_batch_size // replicas
    batch = packed_batch(config.training.global_batch_size, config.data.sequence_length, 0, interleaved, codes.depth)
    targets = own_targets(batch.rows(replica * rows, (replica + 1) * rows), config)
    measured = Measured({}, [], [], [], targets)

    def keep_logits(model, arguments, output) -> None:
        if model.post_process and not measured.losses:
            logits = output[0] if isinstance(output, tuple) else output
            measured.logits.append(logits.detach().cpu().clone())  # the loss works in place

    def keep_gradients(loss: float, grad_norm: float) -> bool:
        for chunk in chunks if not measured.losses else ():
            gradients = ((name, p.main_grad.cpu().clone()) for name, p in global_parameters(chunk.module))
            measured.gradients.update(gradients)
        return True

    for chunk in chunks:
        chunk.module.register_forward_hook(keep_logits)
    for step in range(STEPS):
        sizes = config.training.global_batch_size, config.data.sequence_length
        batch = packed_batch(*sizes, step, interleaved, codes.depth)
        batch = step_input(batch.rows(replica * rows, (replica + 1) * rows), config, VOCABULARY, step)
        result = train_step(chunks, optimizer, batch, config, accept=keep_gradients)
        measured.losses.append(result.loss + (result.losses.z_loss or 0))
        measured.norms.append(result.grad_norm)
    return measured


def own_targets(batch: Batch, config: Config) -> list[torch.Tensor]:
    """For each micro-batch of a replica's rows, the places of this rank's targets among all of them."""
    from megatron.core import parallel_state

    prepare, b = Preparation.of(resolve(config), VOCABULARY, training=False), config.training.micro_batch_size
    selection = prepare.plan.selection(0, config.training.iterations)
    own, places = prepare.row_layout.of_rank(parallel_state.get_context_parallel_rank()), []
    for start in range(0, batch.shape[0], b):
        part = batch.rows(start, start + b).arrays()
        placement = prepare.placement(part, selection)
        held = Route.arrays(part, prepare.plan, **own, selection=selection, placement=placement).targets
        places.append(torch.from_numpy(np.searchsorted(Route.arrays(part, prepare.plan).targets, held)))
    return places


def sampled_numbers(config: Config) -> torch.Tensor:
    """Some of the random numbers that weights and rows consist of."""
    batch = packed_batch(config.training.global_batch_size, config.data.sequence_length, seed=0)
    weights = torch.empty(config.model.num_layers, config.model.hidden_size)
    weights.normal_(generator=torch.Generator().manual_seed(config.training.seed))
    return torch.cat([weights.flatten(), batch.tokens[0].float(), batch.document[-1].float()])


@torch.no_grad()
def perturb(chunks: list) -> None:
    """Add noise to every weight, seeded by its name, so that no delta is zero and no gradient vanishes."""
    from megatron_ext.transformer.initialization import full_shape, global_parameters, shard

    for chunk in chunks:
        for name, parameter in global_parameters(chunk.module):
            random = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            noise = torch.empty(full_shape(name, parameter.shape)).normal_(std=0.02, generator=random)
            parameter += shard(noise, name).to(parameter.device)


def against_references(
    layout: str, plans: list[str], settings: list[str], folder: Path, store=None
) -> dict[str, dict[str, float]]:
    """Errors of a layout under each plan, in a world that this call joins and leaves. Missing references are computed.

    Args:
        store: the store through which ranks meet, see :func:`megatron_ext.distributed.initialize`.
    """
    from megatron_ext import distributed
    from megatron_ext.training.config_checks import validate

    config = config_file.load(Config, [], BASE + settings + overrides(layout))
    validate(config, distributed.world_size())
    distributed.initialize(config, store)
    references = References(folder, sampled_numbers(config))
    results = {}
    for plan in plans:
        config = config_file.load(Config, [], BASE + PLANS[plan] + settings + overrides(layout))
        measured = measure(config, plan == INTERLEAVED)
        if references.missing([plan]):
            references.save(plan, measured)
        expected = references.load(plan)
        results[plan] = errors(measured, expected)
        # The optimizer does not know plans: one plan without and one with components stand for all.
        replicas = config.data_parallel(distributed.world_size())
        if replicas * config.parallel.context > 1 and plan in (plans[0], plans[-1]):
            config.parallel.distributed_optimizer = config.parallel.overlap = True
            results[plan]["sharded_optimizer_losses"] = relative(
                measure(config, plan == INTERLEAVED).losses, expected.losses
            )
    # Process groups hold threads: those of many layouts would slow the machine down.
    distributed.shut_down()
    return results


def worker(layouts: list[str], plans: list[str], settings: list[str], folder: Path, result_file: Path) -> None:
    """One rank of a group of processes that goes through several layouts of the same size."""
    import torch.distributed as dist

    share_one_gpu()
    meeting_point = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    for layout in layouts:
        store = dist.PrefixStore(layout, meeting_point)
        results = against_references(layout, plans, settings, folder, store)
        if int(os.environ["RANK"]) == 0:
            known = files.read_json(result_file) if result_file.exists() else {}
            known[layout] = known.get(layout, {}) | results
            files.write_json(result_file, known)


def launch(size: int, arguments: list[str], minutes: float, program: str = __file__) -> None:
    """Run a program, by default this one, in ``size`` processes, for so many minutes at most."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(size)]
    command += ["--master_addr", "127.0.0.1", "--master_port", str(port), program, *arguments]
    subprocess.run(command, check=True, timeout=60 * minutes, env={**os.environ, "OMP_NUM_THREADS": "1"})


def compare(
    layouts: list[str],
    plans: list[str],
    settings: list[str],
    minutes: float,
    file: Path | None = None,
    references: Path | None = None,
) -> dict[str, dict[str, dict]]:
    """Errors of each layout under each plan against one process. Each size of world is started once.

    Args:
        file: results are written here as they come; layouts in it are not measured again.
        references: folder of the references; missing ones are computed. None: a temporary folder.

    Raises:
        UserError: a reference is missing on a machine with a GPU.
    """
    with tempfile.TemporaryDirectory() as folder:
        result_file = file or Path(folder) / "results.json"
        known = files.read_json(result_file) if result_file.exists() else {}
        todo = [name for name in layouts if set(plans) - known.get(name, {}).keys()]
        folder = references or Path(folder)
        missing = References(folder, sampled_numbers(config_file.load(Config, [], BASE + settings))).missing(plans)
        if missing and not cpu.available():
            raise UserError(f"{folder}: no reference for {missing[0]}, and a GPU computes none; on a CPU: {MAKE}")
        if todo and missing and todo[0] != "tp1":
            todo.insert(0, "tp1")
        for size in sorted(set(map(processes, todo))):
            group = list(dict.fromkeys(name for name in todo if processes(name) == size))
            arguments = ["--worker", str(folder), "--layouts", ",".join(group), "--plans", ",".join(plans)]
            launch(size, [*arguments, "--json", str(result_file), *settings], minutes)
        results = files.read_json(result_file)
    return {name: results[name] for name in layouts}


def worst(results: dict[str, dict[str, dict]]) -> float:
    """The largest of all errors."""
    return max(
        error for plan_errors in results.values() for errors in plan_errors.values() for error in errors.values()
    )


def main() -> None:
    parser = command_line.parser(__doc__.splitlines()[0], "python benchmarks/parity.py --layouts tp2-sp,pp2-vp2")
    parser.add_argument("--layouts", default="all", help="comma-separated layouts (default: all of them)")
    parser.add_argument("--plans", default=",".join(PLANS), help="comma-separated plans (default: all of them)")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the table as a page of documentation")
    parser.add_argument("--minutes", type=float, default=60, help="time limit of each size of world")
    parser.add_argument("--references", type=Path, metavar="FOLDER", help="folder of the references; required on a GPU")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("settings", nargs="*", metavar="section.key=value", help="settings of the model under test")
    arguments = parser.parse_args()
    layouts = all_layouts() if arguments.layouts == "all" else arguments.layouts.split(",")
    plans = arguments.plans.split(",")
    if unknown := [plan for plan in plans if plan not in PLANS]:
        parser.error(f"unknown plan {unknown[0]!r}; known: {', '.join(map(repr, PLANS))}")
    if arguments.worker:
        return worker(layouts, plans, arguments.settings, arguments.worker, arguments.json)
    results = compare(layouts, plans, arguments.settings, arguments.minutes, arguments.json, arguments.references)
    print(table(results))
    print(
        f"{len(results)} layouts x {len(plans)} plans; largest relative error {worst(results):.1e} (limit {LIMIT:.0e})"
    )
    if arguments.markdown:
        arguments.markdown.write_text(PAGE.format(settings=" ".join(BASE), table=table(results), count=len(results)))
    if worst(results) >= LIMIT:
        sys.exit(1)


if __name__ == "__main__":
    command_line.run(main)
