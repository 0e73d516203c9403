"""Training curves of all methods on the picture world: the same model, data, seed and number of tokens.

    python benchmarks/training_curves.py --markdown docs/training_curves.md
    python benchmarks/training_curves.py --presets dense,himix --out runs/curves training.iterations=600

Needs the data of examples/quickstart.sh. Complete runs are not repeated; the others resume where they stopped.
"""

import subprocess
import sys
from pathlib import Path

from megatron_ext import command_line, config_file, files
from megatron_ext.config import Config
from megatron_ext.errors import UserError
from megatron_ext.routing.plan import PRESETS
from megatron_ext.training.metrics import read_metrics

ROOT = Path(__file__).parents[1]
CONFIG = "examples/configs/quickstart.yaml"
TASKS = ("understanding", "generation")


def train(preset: str, output: Path, overrides: list[str]) -> list[dict]:
    """Train a run to its end and return its metrics."""
    if not (output / "FINISHED").exists():
        command = [
            sys.executable,
            "pretrain_unified.py",
            "--config",
            CONFIG,
            f"output={output}",
            f"plan.preset={preset}",
            "evaluation.interval=0",
        ]
        finished = subprocess.run(
            [*command, *overrides], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=7200
        )
        if finished.returncode:
            raise UserError(f"{output}: training failed: {finished.stdout.strip().splitlines()[-1]}")
    return read_metrics(output / "metrics.jsonl")


def summary(records: list[dict]) -> dict:
    """Final validation losses of a run, and its FLOPs relative to dense."""
    last = [r for r in records if "validation_loss" in r][-1]
    return {
        "iterations": last["iteration"],
        "tokens": last["consumed_tokens"],
        **{task: last[f"validation_loss_{task}"] for task in TASKS},
        "flops_ratio": sum(r["flops_ratio"] for r in records) / len(records),
    }


def image_grid(config: Config) -> tuple[int, int]:
    """Rows and columns of tokens in a picture of the training data."""
    metadata = [files.read_json(ROOT / f"{source.path}.json") for source in config.data.train]
    return tuple(next(metadata["vq"]["grid"] for metadata in metadata if metadata["vq"]))


def plot(runs: dict[str, list[dict]], file: Path) -> None:
    """Validation losses over the iterations, a panel per task."""
    import matplotlib

    from megatron_ext.analysis import plots

    figure, panels = plots.subplots(1, len(TASKS), figsize=(11, 4))
    for task, panel in zip(TASKS, panels):
        for preset, records in runs.items():
            points = [(r["iteration"], r[f"validation_loss_{task}"]) for r in records if "validation_loss" in r]
            panel.plot(*zip(*points), label=preset, marker=".", linewidth=1.3)
        panel.set(title=f"{task}: validation loss", xlabel="iteration", yscale="log")
        panel.yaxis.set_minor_formatter(matplotlib.ticker.FormatStrFormatter("%.2g"))
        panel.grid(alpha=0.3, which="both")
    panels[0].legend(fontsize=8)
    plots.save(figure, file)


def table(results: dict[str, dict]) -> str:
    """The results as a Markdown table."""
    lines = [
        "| method | FLOPs / dense | understanding loss | generation loss |",
        "| --- | --- | --- | --- |",
    ]
    for preset, r in results.items():
        lines.append(f"| {preset} | {r['flops_ratio']:.3f} | {r['understanding']:.4f} | {r['generation']:.4f} |")
    return "\n".join(lines)


def main() -> None:
    parser = command_line.parser(__doc__.splitlines()[0], "python benchmarks/training_curves.py --presets dense,himix")
    parser.add_argument("--presets", default=",".join(PRESETS), help="comma-separated presets (default: all of them)")
    parser.add_argument("--out", type=Path, default=Path("runs/curves"), metavar="FOLDER", help="where the runs go")
    parser.add_argument(
        "--markdown", type=Path, metavar="FILE", help="also write a page of documentation and its figure"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings for every run")
    arguments = parser.parse_args()
    config = config_file.load(Config, [ROOT / CONFIG], arguments.overrides)
    runs = {}
    for preset in command_line.progress(arguments.presets.split(","), desc="methods"):
        output = arguments.out.absolute() / preset
        runs[preset] = train(preset, output, ["training.validation_interval=20", *arguments.overrides])
        print(f"{preset}: {summary(runs[preset])}", flush=True)
    results = {preset: summary(records) for preset, records in runs.items()}
    print(table(results))
    if arguments.json:
        files.write_json(arguments.json, results)
    if arguments.markdown:
        figure = arguments.markdown.with_suffix(".svg")
        plot(runs, figure)
        first = next(iter(results.values()))
        settings = " ".join(arguments.overrides)
        arguments.markdown.write_text(
            PAGE.format(
                command=f"python benchmarks/training_curves.py --markdown {arguments.markdown} {settings}".strip(),
                layers=config.model.num_layers,
                hidden=config.model.hidden_size,
                iterations=first["iterations"],
                rows=config.training.global_batch_size,
                length=config.data.sequence_length,
                million=first["tokens"] / 1e6,
                grid="{} x {}".format(*image_grid(config)),
                figure=figure.name,
                table=table(results),
            )
        )


PAGE = """# Training curves

Made by `{command}`.

Every method trains the same model ({layers} layers, hidden size {hidden}) from the same weights on the same rows of the
picture world: {iterations} iterations of {rows} rows of {length} tokens, {million:.2f} million tokens. A picture is
{grid} tokens here (`tokenizer.grid` of its recipe). The losses are on the validation sets: answers for
understanding, image tokens for generation. One seed and this few tokens show that every method trains and what it
costs; they do not rank the methods.

![validation losses]({figure})

{table}

FLOPs are those of the training mix of tasks, including plain texts and the output head. `tools/flops.py --mix` gives
the cost of a method on other documents.
"""


if __name__ == "__main__":
    command_line.run(main)
