"""Runs a submission of the synergy speedrun: checks, training with four seeds, evaluation, a row of the leaderboard."""

import argparse
import subprocess
from dataclasses import asdict
from pathlib import Path

from megatron_ext import command_line, files
from megatron_ext.errors import UserError

FROZEN = Path("examples/speedrun/frozen.yaml")


def main() -> None:
    arguments = _arguments()
    # Imported late: --help should not wait for numpy and the configuration.
    from megatron_ext.speedrun import frozen as frozen_file
    from megatron_ext.speedrun import submission
    from megatron_ext.speedrun.leaderboard import Leaderboard
    from megatron_ext.speedrun.speedrun import Speedrun

    frozen = frozen_file.read(arguments.frozen)
    board = Leaderboard(Path(frozen.leaderboard))
    if arguments.write_page:
        board.write_page()
        print(f"{board.page}: {len(board.rows)} rows")
        return
    if arguments.verify:
        frozen.verification_word = arguments.word or frozen.verification_word
        row = board.named(frozen, arguments.verify)
        entered = submission.of(row.name, row.settings, frozen)
        speedrun = Speedrun(frozen, entered, "verification")
    else:
        entered = submission.read(arguments.submission, frozen)
        speedrun = Speedrun(frozen, entered, "rehearsal" if arguments.rehearse else "run")
    if arguments.status:
        _show_status(speedrun, arguments)
        return
    is_row = not (arguments.estimate or arguments.rehearse)
    commit = speedrun.check_entry([arguments.submission] if arguments.submission else []) if is_row else ""
    speedrun.prepare()
    ratio = speedrun.check_estimate()
    made_with = speedrun.origin(commit) if is_row else None
    experiment = speedrun.experiment
    print(
        f"{entered.name}: {ratio:.3f} x the FLOPs of lossless dense (cap {frozen.flops_cap}), recipe {entered.digest}, "
        f"seeds {', '.join(map(str, experiment.seeds))}, {experiment.iterations} steps each",
        flush=True,
    )
    if arguments.estimate:
        _write(arguments, {"flops_ratio": ratio, "digest": entered.digest, "seeds": experiment.seeds})
        return
    result = speedrun.run(arguments.jobs)
    _show(result)
    if is_row:
        row = speedrun.enter(result, made_with, arguments.author or _user())
        print(f"{board.folder}, {board.page}: row {row.name}, score {row.score:.3f}")
    else:
        print("a rehearsal: nothing was recorded")
    _write(arguments, asdict(result))


def _arguments() -> argparse.Namespace:
    parser = command_line.parser(
        "Train and evaluate a submission of the synergy speedrun with its four seeds, and add its row to the\n"
        "leaderboard. docs/speedrun.md has the rules. After any interruption the same command resumes.",
        "python tools/speedrun.py runs/NAME.yaml --estimate    its FLOPs; nothing is trained\n"
        "  python tools/speedrun.py runs/NAME.yaml --rehearse    the whole path in a few minutes, nothing is recorded\n"
        "  python tools/speedrun.py runs/NAME.yaml --jobs 2\n"
        "  python tools/speedrun.py --verify NAME --jobs 2",
    )
    add = parser.add_argument
    add("submission", nargs="?", type=Path, metavar="SUBMISSION.yaml", help="the open keys that it sets")
    add("--frozen", type=Path, default=FROZEN, metavar="FILE", help="the round (default: %(default)s)")
    add("--jobs", type=int, default=1, metavar="N", help="runs at once (default: 1)")
    add("--author", metavar="NAME", help="of the row (default: git's user.name)")
    add("--verify", metavar="NAME", help="run the row NAME again, on the seeds and questions of verification")
    add("--word", metavar="WORD", help="of verification, as long as the round has not published it")
    add("--write-page", action="store_true", help="only write the tables again, from the rows")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--estimate", action="store_true", help="only check the submission and estimate its FLOPs")
    action.add_argument("--rehearse", action="store_true", help="with few tokens, seeds and questions; no row")
    action.add_argument("--status", action="store_true", help="only show the progress of its runs")
    arguments = parser.parse_args()
    if sum(map(bool, (arguments.submission, arguments.verify, arguments.write_page))) != 1:
        parser.error("give a submission, --verify with the name of a row, or --write-page")
    if arguments.word and not arguments.verify:
        parser.error("--word goes with --verify")
    if arguments.jobs < 1:
        parser.error("--jobs must be at least 1")
    if arguments.verify and arguments.rehearse:
        parser.error("--verify goes without --rehearse")
    return arguments


def _show_status(speedrun, arguments: argparse.Namespace) -> None:
    from megatron_ext.analysis import tables
    from megatron_ext.study import status

    table, counts = status.table(speedrun.experiment.study, speedrun.experiment.runs)
    print(f"{tables.markdown(table)}\n{counts}")
    _write(arguments, table.to_dict("records"))


def _show(result) -> None:
    for split, tasks in result.figures.items():
        for task, values in tasks.items():
            print(f"{split}, {task}: {' '.join(f'{v:.1f}' for v in values)} % above chance")
    cost = result.cost
    print(
        f"measured: {cost.flops_ratio:.3f} x the FLOPs of lossless dense"
        + (
            f", {cost.step_ratio:.2f} x its time, {cost.core_hours:.3f} core-hours of training"
            if cost.step_ratio
            else ""
        )
    )
    if result.score:
        for task in ("understanding", "generation"):
            print(f"{task} relative to dense: {' '.join(f'{v:.3f}' for v in getattr(result.score, task))}")
        print(f"score: {result.score.score:.3f}")


def _user() -> str:
    name = subprocess.run(["git", "config", "user.name"], capture_output=True, text=True).stdout.strip()
    if not name:
        raise UserError("git has no user.name; give --author")
    return name


def _write(arguments: argparse.Namespace, numbers) -> None:
    if arguments.json:
        files.write_json(arguments.json, numbers)


if __name__ == "__main__":
    command_line.run(main)
