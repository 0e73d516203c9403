"""The results as one Markdown page, which also names what was not measured."""

from gpu.records import DONE, NOT_RUN
from gpu.steps import STEPS, Figure, Step

COMMAND = "bash benchmarks/gpu_check.sh RESULTS"
HEAD = """# The GPU path

Made by `{command} --page docs/gpu.md` from what
`{command}` measured on one GPU in under nine minutes. The steps run most valuable first, each in
a time box. A second call resumes with the missing steps. `--rehearse` runs the same steps at tiny sizes on a CPU, as a
test, and computes the references for float32: copy `RESULTS/references` to the machine with the GPU and name the folder
there with `--references FOLDER`. With `WAIT_FOR_TE=FILE` in the environment, the steps that need Transformer Engine
wait until FILE exists, for a build that is still running.

The 1B tables have the shape of Llama 3.2 1B, rows of 4096 tokens, 3 micro-batches of 2 rows (for understanding, one of
6) and a vocabulary of 128256. "By masking" is the same method computed without leaving tokens out: every layer computes
every token, and `torch.where` keeps the hidden states that the layer may not change.
"""


def page(everything: dict) -> str:
    """The page of a results file."""
    machine, steps = everything["machine"], everything["steps"]
    parts = [HEAD.format(command=COMMAND), _status(machine, steps)]
    parts += [_section(step, steps.get(step.name)) for step in STEPS]
    return "\n".join(parts)


def _status(machine: dict, steps: dict) -> str:
    if not any(step["figures"] for step in steps.values()):
        return "**Nothing has been measured on a GPU yet.** Every figure below waits for one.\n"
    lines = ["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in machine.items())]
    if any(step["rehearsal"] for step in steps.values()):
        lines = ["**A rehearsal: tiny sizes on a CPU. No figure below is a measurement.**", "", *lines]
    return "\n".join(lines) + "\n"


def _section(step: Step, record: dict | None) -> str:
    status, reason = (record["status"], record["reason"]) if record else (NOT_RUN, "")
    outcome = f"{status}: {reason}" if reason else status
    outcome += f", {record['seconds']:.0f} s" if record and status == DONE else ""
    lines = [f"## {step.title}", "", f"`{COMMAND} --only {step.name}`: {outcome}.", ""]
    lines += ["| figure | measured | aim | |", "| --- | --- | --- | --- |"]
    measured = record["figures"] if record else {}
    rehearsal = bool(record and record["rehearsal"])
    lines += [_row(figure, measured.get(name), rehearsal) for name, figure in step.figures.items()]
    for title, table in (record["tables"] if record else {}).items():
        lines += ["", f"{title}:", "", table]
    return "\n".join(lines) + "\n"


def _row(figure: Figure, value: float | None, rehearsal: bool) -> str:
    if value is None:
        return f"| {figure.label} | not run | {figure.aim} | |"
    judged = figure.aim and (figure.everywhere or not rehearsal)
    verdict = ("met" if figure.met(value) else "missed") if judged else ""
    return f"| {figure.label} | {_number(value)} | {figure.aim} | {verdict} |"


def _number(value: float) -> str:
    if value == int(value) and abs(value) < 1e6:
        return str(int(value))
    return f"{value:.3f}" if 0.01 <= abs(value) < 1e4 else f"{value:.2e}"
