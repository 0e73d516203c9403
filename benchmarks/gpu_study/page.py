"""The results as one Markdown page, which also says what was not measured."""

import statistics
from collections.abc import Sequence
from pathlib import Path

from megatron_ext import files
from megatron_ext.study import report, state, steps
from megatron_ext.study.grid import StudyRun
from megatron_ext.study.study_file import Study
from megatron_ext.training.metrics import read_metrics

HEAD = """# The study of deeper models on one GPU

Made by `bash benchmarks/gpu_study.sh RESULTS --page docs/study/gpu.md` from what these commands left in RESULTS:

```bash
bash benchmarks/gpu_study.sh runs/gpu_study --prepare    # on any machine; then bring runs/gpu_study to the GPU
bash benchmarks/gpu_study.sh runs/gpu_study              # on the GPU: under nine minutes; the same command resumes
bash benchmarks/gpu_study.sh runs/rehearsal --rehearse   # the same programs at tiny sizes on a CPU
```

Bring the folder back without `runs/*/checkpoints`. `--prepare --learning-rates runs/studies/decisive/learning_rates.json`
takes each method's learning rate, relative to dense's, from the search of the [decisive study](../studies.md).

[The study file](../../benchmarks/gpu_study/study.yaml) has models of twelve layers on the compositional world, 16 thousand
tokens a step, in bf16. Many runs share the GPU: their processes fork from one that has imported torch and Megatron-Core.
Runs go seed by seed, each seed with all methods, so a study that is cut short has whole seeds. Hypotheses, gates and
statistics are those of [the protocol](protocol.md), but for H4, which is tested at equal tokens and steps alone.
"""
ESTIMATE = """## Does it fit?

A step of dense at twelve layers starts 640 kernels from its first operator to its gradients, of Share All 1120, of Share
Partial 1500, whatever the width (counted on torch's meta device, as `tests/unit/test_no_synchronisation.py` does), and an
optimizer step some 20. At 128 wide and 16 thousand tokens a kernel moves about 4 MB, which takes 2 to 5 microseconds, so
the GPU is busy for 3 to 6 ms of a step and the host for 20 to 50 ms. One process leaves the GPU idle for most of the
time, and a dozen use it up: some 200 to 300 steps a second over all processes. The 79,000 steps of the study then take
260 to 400 s; starts, evaluation and the last runs are estimated at 60 to 100 s. If the GPU is slower than that, the last
seeds are missing. This is an estimate, made without a GPU.
"""


def page(study: Study, runs: Sequence[StudyRun]) -> str:
    """The page of a study's folder; writes its report as well."""
    results = Path(study.output)
    machines = files.read_json(results / "machine.json") if (results / "machine.json").is_file() else []
    parts = [HEAD, ESTIMATE, _status(machines), _sizes(study, runs)]
    if machines:
        report.write(study, runs)
        parts.append(_demoted((results / "report.md").read_text()))
    return "\n".join(parts)


def _status(machines: Sequence[dict]) -> str:
    if not machines:
        return "**Nothing has been measured on a GPU yet.**\n"
    lines = ["| | |", "| --- | --- |"]
    for call in machines:
        lines += [f"| {name} | {value} |" for name, value in call.items() if name != "rehearsal"]
    if any(call["rehearsal"] for call in machines):
        lines = ["**A rehearsal: tiny sizes on a CPU. No figure below says anything about methods.**", "", *lines]
    return "\n".join(lines) + "\n"


def _sizes(study: Study, runs: Sequence[StudyRun]) -> str:
    """What was planned at each size, what of it is complete, and how fast steps went."""
    lines = ["| size | parameters | runs | complete | steps | tokens a run | ms a step, median of runs |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    for size in study.sizes:
        own = [run for run in runs if run.size is size]
        complete = [run for run in own if state.result(run, steps.fingerprint(run, study.evaluation))]
        unified = next(run.config for run in own if run.method.trained_on == "unified")
        tokens = unified.training.iterations * unified.training.global_batch_size * unified.data.sequence_length
        speed = f"{1e3 * statistics.median(map(_step_seconds, complete)):.0f}" if complete else "not run"
        lines.append(
            f"| {size.name} | {own[0].length.parameters / 1e6:.1f} M | {len(own)} | {len(complete)} "
            f"| {unified.training.iterations} | {tokens / 1e6:.1f} M | {speed} |"
        )
    return "\n".join(lines) + "\n"


def _step_seconds(run: StudyRun) -> float:
    return statistics.median(record["step_seconds"] for record in read_metrics(run.folder / "metrics.jsonl"))


def _demoted(text: str) -> str:
    """The report without its title and its figures."""
    _, *lines = text.splitlines()
    return "\n".join(line for line in lines if not line.startswith("![")).strip() + "\n"
