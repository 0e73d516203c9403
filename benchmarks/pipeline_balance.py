"""What balanced pipeline stages and composed micro-batches gain under token reduction: simulated, and measured in
Megatron-Core's own schedules.

    python benchmarks/pipeline_balance.py --only table     # simulated for a 7B model on 32 ranks, a minute
    python benchmarks/pipeline_balance.py --only sleep     # measured with layers that sleep, any machine, 5 minutes
    python benchmarks/pipeline_balance.py --only compute   # measured with a real model on 2 cores; they must be idle

Rows are filled with documents of understanding and of generation; the plan is HiMix-HMGen. Layouts are chosen from the
FLOPs of other rows than those of the measured steps. A gain is 1 - time / time of even stages with rows in order.
"""

from collections.abc import Callable

import numpy as np

from megatron_ext import command_line, config_file
from megatron_ext.config import Config
from megatron_ext.files import read_json, write_json
from megatron_ext.routing.pipeline_balance import balance
from megatron_ext.routing.pipeline_layout import even_counts, layout_string
from megatron_ext.routing.plan import Plan
from pipeline_steps.compositions import COMPOSITIONS, compose
from pipeline_steps.rows import Documents, drawn_rows, model_costs, row_flops

MODEL_7B = [
    "model.num_layers=32",
    "model.hidden_size=4096",
    "model.num_attention_heads=32",
    "model.num_query_groups=32",
    "model.ffn_hidden_size=11008",
]
VOCABULARY_7B = 40_960
PLANS = ("himix", "hmgen", "himix_hmgen_share_partial")
CASES = [("even", "in order"), ("even", "cheap ends"), ("balanced", "in order"), ("balanced", "cheap ends")]


def sampled(preset: str, rows: int, seed: int) -> np.ndarray:
    """FLOPs of rows of 4096 tokens in a 7B model, [rows, layers + 2]."""
    config = config_file.load(Config, [], [*MODEL_7B, f"plan.preset={preset}"])
    batch = drawn_rows(Documents(), rows, 4096, VOCABULARY_7B, seed).arrays()
    return row_flops(config.model, VOCABULARY_7B, Plan.from_config(config), batch)


def simulated(flops: np.ndarray, counts: list[int], pipeline: int, composition: list, scale: float = 1.0) -> float:
    """Makespan of a step whose replicas work on micro-batches of these rows: that of the slowest replica."""
    return max(
        model_costs(flops, micro_batches, scale).simulate(counts, pipeline).makespan for micro_batches in composition
    )


def chosen(flops: np.ndarray, pipeline: int, virtual: int) -> list[int]:
    return balance(model_costs(flops, [np.array([row]) for row in range(len(flops))]), pipeline, virtual)


def table(pipeline: int = 4, replicas: int = 8, steps: int = 4, batch: int = 256) -> list[dict]:
    """Simulated time over that of the same work without waiting, the mean of several steps."""
    results = []
    for preset in PLANS:
        sample, rows = sampled(preset, 64, seed=1000), [sampled(preset, batch, seed) for seed in range(steps)]
        cost = np.concatenate(rows).sum(1)
        for virtual in (1, 2):
            layouts = {"even": even_counts(32, pipeline * virtual), "balanced": chosen(sample, pipeline, virtual)}
            result = {"plan": preset, "virtual": virtual, "layout": layout_string(layouts["balanced"])}
            result["spread"] = float(cost.std() / cost.mean())
            for layout, counts in layouts.items():
                for name in COMPOSITIONS:
                    times = [
                        simulated(flops, counts, pipeline, compose(name, flops, replicas, 1))
                        * (pipeline * replicas / 3 / flops.sum())
                        for flops in rows
                    ]
                    result[f"{layout}, {name}"] = float(np.mean(times))
            results.append(result)
    return results


def describe_table(results: list[dict]) -> str:
    columns = [f"{layout}, {name}" for layout in ("even", "balanced") for name in COMPOSITIONS]
    lines = [f"| plan (row cost varies by) | V | {' | '.join(columns)} | layout |", "| --- " * (3 + len(columns)) + "|"]
    for result in results:
        cells = [f"{result['plan']} ({result['spread']:.0%})", str(result["virtual"])]
        cells += [f"{result[column]:.3f}" for column in columns] + [f"`{result['layout']}`"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


SLEPT = [(2, 1, 1), (2, 2, 1), (4, 1, 1), (4, 2, 1), (4, 1, 2)]  # (pipeline, virtual, replicas)
MICRO_BATCHES = 16
WAITING = {"waiting": "seconds", "simulated_waiting": "simulated"}
"""Waiting over work, of measured and simulated seconds."""


def sleep(unit: float = 0.1, repeats: int = 3) -> list[dict]:
    """Steps of a 7B model's shape whose mean forward pass through a chunk takes ``unit`` seconds of sleep."""
    from pipeline_steps.ranks import world
    from pipeline_steps.sleeping import measure

    preset = "himix_hmgen_share_partial"
    sample, results = sampled(preset, 64, seed=1000), []
    for pipeline, virtual, replicas in SLEPT:
        chunks = pipeline * virtual
        flops = sampled(preset, MICRO_BATCHES * replicas, seed=pipeline)
        scale = unit * chunks * len(flops) / flops.sum()
        layouts = {"even": even_counts(32, chunks), "balanced": chosen(sample, pipeline, virtual)}
        forward = [[[unit] * MICRO_BATCHES] * chunks] * replicas
        steps = [("equal", "", forward, 3 * unit * (virtual * MICRO_BATCHES + pipeline - 1))]
        for layout, name in CASES:
            composition, counts = compose(name, flops, replicas, 1), layouts[layout]
            forward = [model_costs(flops, replica, scale).of_chunks(counts) for replica in composition]
            expected = simulated(flops, counts, pipeline, composition, scale)
            steps.append((layout, name, forward, expected))
        measured = world(pipeline * replicas, measure, pipeline, virtual, [step for *_, step, _ in steps], repeats)[0]
        shared = {"pipeline": pipeline, "virtual": virtual, "replicas": replicas}
        shared["layout"] = layout_string(layouts["balanced"])
        work = 3 * unit * virtual * MICRO_BATCHES  # of each rank, on average, in every case
        # Sleeps last longer than asked for where other processes run: that is taken out.
        cases = [(*step[:2], work * seconds / asleep, step[3]) for step, (seconds, asleep) in zip(steps, measured)]
        for result, (seconds, _) in zip(compared(shared, cases), measured):
            waiting = {key: result[name] / work - 1 for key, name in WAITING.items()}
            results.append(result | waiting | {"unscaled_seconds": seconds})
        print(describe_measured(results[-len(steps) :]), flush=True)
    return results


def compared(shared: dict, cases: list[tuple[str, str, float, float]]) -> list[dict]:
    """The figures of cases (layout, composition, seconds, simulated seconds) against even stages with rows in order."""
    (base, base_simulated), results = [case[2:] for case in cases if case[:2] == ("even", "in order")][0], []
    for layout, name, seconds, expected in cases:
        result = {**shared, "stages": layout, "rows": name, "seconds": seconds, "simulated": expected}
        if layout != "equal":
            result |= {"gain": 1 - seconds / base, "simulated_gain": 1 - expected / base_simulated}
        results.append(result)
    return results


def describe_measured(results: list[dict]) -> str:
    lines = []
    for r in results:
        text = f"P {r['pipeline']} V {r['virtual']} D {r['replicas']}  {r['stages']:>8}, {r['rows'] or 'costs':<10} "
        text += f"{r['seconds']:.3f} s, simulated {r['simulated']:.3f}: {r['seconds'] / r['simulated']:.3f}"
        if "waiting" in r:
            text += f"; waiting {r['waiting']:.3f}, simulated {r['simulated_waiting']:.3f}"
        if r.get("simulated_gain"):
            text += f"; gain {r['gain']:.3f}, simulated {r['simulated_gain']:.3f}"
        lines.append(text)
    return "\n".join(lines)


def compute(repeats: int = 7) -> list[dict]:
    """Steps of a real model on 2 pipeline stages, one core each."""
    from megatron_ext.data.batch import Batch
    from pipeline_steps import computing
    from pipeline_steps.ranks import world

    length, rows, layers = 768, 8, 12
    settings = [
        f"model.num_layers={layers}",
        "model.hidden_size=256",
        "model.num_attention_heads=4",
        "model.ffn_hidden_size=704",
        "model.implementation=local",
        "plan.preset=himix_hmgen_share_partial",
        "parallel.pipeline=2",
        f"data.sequence_length={length}",
        "training.micro_batch_size=1",
        f"training.global_batch_size={rows}",
        "training.iterations=1000",
    ]
    config = config_file.load(Config, [], settings)
    documents = Documents(image=144, question=15, answer=20, caption=10)
    batches = [drawn_rows(documents, size, length, computing.VOCABULARY, seed) for size, seed in ((rows, 0), (64, 1))]
    flops, sample = (
        row_flops(config.model, computing.VOCABULARY, Plan.from_config(config), batch.arrays()) for batch in batches
    )
    layouts = {"even": even_counts(layers, 2), "balanced": chosen(sample, 2, 1)}
    cases, expected = {}, {}
    for layout, name in CASES:
        composition = compose(name, flops, 1, 1)
        order = np.concatenate(composition[0])
        ordered = Batch(**{field: getattr(batches[0], field)[order] for field in Batch.names()})
        cases[f"{layout}, {name}"] = layout_string(layouts[layout]), ordered
        expected[f"{layout}, {name}"] = simulated(flops, layouts[layout], 2, composition)
    measured = world(2, computing.measure, settings, cases, repeats)[0]
    shared = {"pipeline": 2, "virtual": 1, "replicas": 1, "layout": layout_string(layouts["balanced"])}
    names = [(layout, name, f"{layout}, {name}") for layout, name in CASES]
    results = compared(shared, [(a, b, measured[key]["seconds"], measured[key]["simulated"]) for a, b, key in names])
    for result, (*_, key) in zip(results, names):
        base = names[0][-1]
        result["gain_by_cpu_seconds"] = 1 - measured[key]["of_cpu_seconds"] / measured[base]["of_cpu_seconds"]
        result["gain_by_flops"] = 1 - expected[key] / expected[base]
    print(describe_measured(results))
    for name in ("flops", "cpu_seconds"):
        gains = [f"{r['stages']}, {r['rows']} {r[f'gain_by_{name}']:.3f}" for r in results]
        print(f"gain by {name}: {'; '.join(gains)}")
    return results


PARTS: dict[str, Callable[[], list[dict]]] = {"table": table, "sleep": sleep, "compute": compute}


def main() -> None:
    parser = command_line.parser(__doc__, "python benchmarks/pipeline_balance.py --only sleep --json results.json")
    parser.add_argument("--only", choices=PARTS, nargs="+", default=list(PARTS), help="parts to run (default: all)")
    arguments = parser.parse_args()
    results = read_json(arguments.json) if arguments.json and arguments.json.exists() else {}
    for part in arguments.only:
        results[part] = PARTS[part]()
        if part == "table":
            print(describe_table(results[part]))
        if arguments.json:
            write_json(arguments.json, results)


if __name__ == "__main__":
    command_line.run(main)
