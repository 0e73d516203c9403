"""The results as one Markdown page, which also says what was not measured."""

import re
import statistics
from collections.abc import Sequence
from pathlib import Path

from megatron_ext import files
from megatron_ext.study import report, state, steps, study_file
from megatron_ext.study.grid import StudyRun
from megatron_ext.study.study_file import Study
from megatron_ext.training.metrics import read_metrics

STUDY = Path(__file__).with_name("study.yaml")
ROW = 1024
"""Tokens of a row of the base configuration."""
HEAD = """# The study of deeper models on one GPU

Made by `bash benchmarks/gpu_study.sh RESULTS --page docs/study/gpu.md` from what these commands leave in RESULTS:

```bash
bash benchmarks/gpu_study.sh runs/gpu_study --prepare    # on any machine
bash benchmarks/gpu_study.sh runs/gpu_study              # on the GPU: under nine minutes; the same command resumes
bash benchmarks/gpu_study.sh runs/rehearsal --rehearse   # at tiny sizes on a CPU: five minutes of two cores
```

Bring the folder to the GPU without `world`, which is packed beside it (2 MB), and back without `runs/*/checkpoints`.
RESULTS must be the same path relative to the checkout wherever a command resumes or reports, here `runs/gpu_study`: a
run's configuration names the data in it, and a run whose configuration has changed is refused.
With `--learning-rates runs/studies/decisive/learning_rates.json`, `--prepare` takes each method's learning rate,
relative to dense's, from the search of the [decisive study](../studies.md); without it every method has the rate of its
size.

[The study file](../../benchmarks/gpu_study/study.yaml) has models of twelve layers on the compositional world, 16
thousand tokens a step, in bf16. Many runs share the GPU: their processes fork from one that has imported torch and
Megatron-Core. Runs go seed by seed, each seed with all methods, so a study that is cut short has whole seeds.
Hypotheses, gates and statistics are those of [the protocol](protocol.md), but for H4, which is tested at equal tokens
and steps alone. `untrained` has the initial weights, beside the depth curves. The size h256 has three seeds: intervals,
but no test of a trend over depth, which needs five. The largest size is exploratory.
"""
ESTIMATE = """## Does it fit?

An estimate, made without a GPU. Up to its gradients a step of dense starts 640 kernels at twelve layers, of Share All
1120, of Share Partial 1500, whatever the width (counted on torch's meta device, as
`tests/unit/test_no_synchronisation.py` counts them). At 128 wide and 16 thousand tokens a kernel moves about 4 MB,
which takes 2 to 5 microseconds, so the GPU is busy for 3 to 6 ms of a step. The host needs more: 55 ms of a slow core
for dense, 80 ms for Share All, 140 ms for Share Partial, without any kernel, and 6 ms to pack the rows, which programs
do themselves; a server's core needs perhaps half. So one process leaves the GPU idle for most of the time, and a dozen
use it up, at some 200 to 300 steps a second in all. The 78,000 steps of the study then take 260 to 390 s; the trial
below, starts, evaluation and the last runs add 80 to 140 s. If all goes slower, the last seeds are missing.

The estimate assumes that kernels of different processes run side by side, or at least that switching between processes
costs little. CUDA alone gives processes the GPU in turns. So `gpu_study.sh` starts NVIDIA's Multi-Process Service (MPS)
where it is installed and the GPU can be reached through it, which runs them side by side. And the first 20 s are a
trial: one program, four, and three fewer than the machine has cores count steps of a stand-in with as many kernels. The
least number that comes within 5 % of the most steps a second is how many runs there are at once (`--jobs` sets it).
"""


def page(study: Study, runs: Sequence[StudyRun]) -> str:
    """The page of a study's folder. Of a study that ran on a GPU the report is written, too, and part of the page."""
    results = Path(study.output)
    machines = files.read_json(results / "machine.json") if (results / "machine.json").is_file() else []
    parts = [HEAD, _planned(study_file.read(STUDY)), ESTIMATE, *_calls(machines), _done(study, runs)]
    if machines and not machines[-1]["rehearsal"]:
        report.write(study, runs)
        parts.append(_selected((results / "report.md").read_text()))
    return "\n".join(parts)


def _planned(study: Study) -> str:
    """What the study file says."""
    lines = ["| size | hidden size | runs | steps | tokens a run | learning rate |", "|" + 6 * " --- |"]
    for size in study.sizes:
        runs = sum(len(study.seeds_of(size, method)) for method in study.methods_of(size))
        training = {**study.settings["training"], **size.settings.get("training", {})}
        steps_of_run, rows = training["iterations"], training["global_batch_size"]
        lines.append(
            f"| {size.name} | {size.settings['model']['hidden_size']} | {runs} | {steps_of_run} "
            f"| {steps_of_run * rows * ROW / 1e6:.1f} M | {size.settings['optimizer']['lr']:g} |"
        )
    return "\n".join(lines) + "\n"


def _calls(machines: Sequence[dict]) -> list[str]:
    """The machine of each call that ran something."""
    if not any(not call["rehearsal"] for call in machines):
        parts = ["**Nothing has been measured on a GPU yet.** What follows is a rehearsal: tiny sizes on a CPU.\n"]
    else:
        parts = ["## Measured\n"]
    for call in machines:
        lines = ["| | |", "| --- | --- |"]
        lines += [f"| {name} | {value} |" for name, value in call.items() if name != "rehearsal"]
        parts.append("\n".join(lines) + "\n")
    return parts


def _done(study: Study, runs: Sequence[StudyRun]) -> str:
    """How far each model of each size has come, and how fast steps went."""
    lines = ["| size | model | trained on | complete, of seeds | steps | ms a step, median |", "|" + 6 * " --- |"]
    for size in study.sizes:
        for method in study.methods_of(size):
            own = [run for run in runs if run.size is size and run.method is method]
            complete = [run for run in own if state.result(run, steps.fingerprint(run, study.evaluation))]
            speed = f"{1e3 * statistics.median(map(_step_seconds, complete)):.0f}" if complete else "-"
            lines.append(
                f"| {size.name} | {method.label or method.name} | {method.trained_on} | {len(complete)} of {len(own)} "
                f"| {own[0].iterations} | {speed} |"
            )
    return "\n".join(lines) + "\n"


def _step_seconds(run: StudyRun) -> float:
    return statistics.median(record["step_seconds"] for record in read_metrics(run.folder / "metrics.jsonl"))


def _selected(report_text: str) -> str:
    """The report without its title, its figures and the comparison with the paper."""
    _, *sections = re.split(r"(?m)^(?=##? )", report_text)
    first = sections[0].partition("\n")[2]
    kept = [first, *(section for section in sections[1:] if not section.startswith("## Beside"))]
    lines = "".join(kept).splitlines()
    return "\n".join(line for line in lines if not line.startswith("![")).strip() + "\n"
