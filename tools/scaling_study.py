"""Runs a study over methods, sizes and seeds: training, evaluation, and a report on synergy."""

from pathlib import Path

from megatron_ext import command_line, files
from megatron_ext.errors import UserError


def main() -> None:
    parser = command_line.parser(
        "Train and evaluate every run of a study file (megatron_ext/study/study_file.py documents its keys), and\n"
        "report on synergy, its losses and hypotheses. After any interruption the same command resumes: finished\n"
        "runs are kept, others resume from their checkpoints, failed runs are retried.",
        "python tools/scaling_study.py examples/studies/decisive.yaml --jobs 2 --fork\n"
        "  python tools/scaling_study.py examples/studies/decisive.yaml --status\n"
        "  python tools/scaling_study.py examples/studies/decisive.yaml --slurm     an array with a task per run\n"
        "  python tools/scaling_study.py examples/studies/paper.yaml examples/studies/paper_tiny.yaml --jobs 2",
    )
    add = parser.add_argument
    add("study", nargs="+", type=Path, metavar="STUDY.yaml", help="a study, or several files laid over one another")
    add("--out", metavar="FOLDER", help="instead of the study file's output")
    add("--jobs", type=int, default=1, metavar="N", help="runs at once (default: 1)")
    add("--gpus", default="", metavar="0,1", help="GPUs to share out among the runs, one per process")
    add("--fork", action="store_true", help="fork programs from one that has imported torch, seconds sooner each")
    add("--run", action="append", metavar="NAME", help="only this run, without a report; may be given several times")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--status", action="store_true", help="only show the progress of every run")
    action.add_argument("--report", action="store_true", help="only report on the finished runs")
    action.add_argument("--slurm", action="store_true", help="submit the unfinished runs as a Slurm array")
    action.add_argument("--slurm-print", action="store_true", help="only print the script that --slurm would submit")
    arguments = parser.parse_args()
    if arguments.jobs < 1:
        parser.error("--jobs must be at least 1")
    # Imported late: --help should not wait for numpy and the configuration.
    from megatron_ext.study import execution, forked, status, steps, study_file

    study = study_file.read(*arguments.study)
    study.output = arguments.out or study.output
    plan = execution.plan(study)
    selected = plan.selected(arguments.run)
    if arguments.status:
        _show(arguments, *status.table(study, selected, plan.waiting))
        return
    if not arguments.report:
        steps.check(selected, study.evaluation)
    if arguments.slurm or arguments.slurm_print:
        _slurm(study, arguments, status.unfinished(study, plan.needed(arguments.run)))
        return
    if not arguments.report:
        gpus = [gpu for gpu in arguments.gpus.split(",") if gpu]
        start = forked.start_program if arguments.fork else None
        plan = execution.execute(study, arguments.run, arguments.jobs, gpus, start)
    if not arguments.run:
        _report(study, plan.runs, arguments)
    needed = plan.needed(arguments.run)
    left = status.failed(study, needed)
    if left and not arguments.report:
        raise UserError(f"{len(left)} of {len(needed)} runs failed: {', '.join(left)}")
    left = [run.name for run in needed if run.name in plan.without_rate]
    if left and not arguments.report:
        raise UserError(f"training diverged at each of 'learning_rates.values'; without a rate: {', '.join(left)}")


def _slurm(study, arguments, left) -> None:
    from megatron_ext.study import slurm

    if not left:
        print("every run is finished")
    elif arguments.slurm_print:
        # Trials of learning rates are an array of their own, before that of the runs.
        trials = [run for run in left if run.is_trial]
        print(slurm.script(study, arguments.study, trials or left), end="")
    else:
        print(f"submitted as job {slurm.submit(study, arguments.study, left)}: {len(left)} runs")


def _report(study, runs, arguments) -> None:
    from megatron_ext.study import report

    numbers = report.write(study, runs)
    print(f"{study.output}/report.md: written")
    if arguments.json:
        files.write_json(arguments.json, numbers)


def _show(arguments, table, counts: str) -> None:
    from megatron_ext.analysis import tables

    print(f"{tables.markdown(table)}\n{counts}")
    if arguments.json:
        files.write_json(arguments.json, table.to_dict("records"))


if __name__ == "__main__":
    command_line.run(main)
