"""Injects faults into real runs of a tiny model and records what each run does about them.

    python benchmarks/faults.py --markdown docs/faults.md
    python benchmarks/faults.py --only 3,10 --json faults.json

Every case starts pretrain_unified.py under torchrun over gloo, harms it from outside or by a callback, and checks the
outcome. A file of --json keeps the outcomes: cases that passed are not run again unless --only names them, or their
code is another one now. The table names cases that have not been run.
"""

import hashlib
import importlib
import inspect
import pkgutil
import shutil
import sysconfig
import tempfile
import time
from pathlib import Path

import fault_cases
from fault_cases import harness
from megatron_ext import command_line, files
from megatron_ext.errors import UserError

HEAD = """# Faults

What a run does when something breaks. Every row is a real run of a tiny model under torchrun over gloo, on a CPU, to
which the fault was done; `python benchmarks/faults.py --markdown docs/faults.md` makes this page. Seconds are of the
whole case; starting programs takes most of them.

| # | fault | expected | outcome | s |
| --- | --- | --- | --- | --- |
"""


def main() -> None:
    parser = command_line.parser(__doc__.splitlines()[0], "python benchmarks/faults.py --only 1,16")
    parser.add_argument("--only", default="", metavar="1,2", help="numbers of the cases to run, done or not")
    parser.add_argument("--list", action="store_true", help="only list the cases")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep each case's last runs in this folder")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table of all recorded outcomes")
    arguments = parser.parse_args()
    _load()
    if arguments.list:
        for number, case in sorted(harness.CASES.items()):
            print(f"{number:3} {case.title}: {case.expected}")
        return
    record = arguments.json or Path(__file__).parent / "results" / "faults.json"
    done = files.read_json(record) if record.exists() else {}
    chosen = _chosen(arguments.only, done)
    for number in chosen:
        done[str(number)] = outcome = _run(harness.CASES[number], arguments.keep)
        print(
            f"{number:3} {'passed' if outcome['passed'] else 'FAILED'} ({outcome['seconds']} s): {outcome['outcome']}"
        )
        files.write_json(record, dict(sorted(done.items(), key=lambda item: int(item[0]))))
    if arguments.markdown:
        rows = (_row(number, done.get(str(number))) for number in sorted(harness.CASES))
        files.write_text(arguments.markdown, HEAD + "".join(rows))
    asked = chosen if arguments.only else sorted(harness.CASES)
    not_passed = [str(number) for number in asked if not _has_passed(number, done)]
    if not_passed:
        raise UserError(f"cases that failed: {', '.join(not_passed)}")


def _has_passed(number: int, done: dict) -> bool:
    outcome = done.get(str(number))
    return bool(outcome) and outcome["passed"] and not _is_of_other_code(number, outcome)


def _is_of_other_code(number: int, outcome: dict) -> bool:
    return outcome.get("code", _code(number)) != _code(number)


def _code(number: int) -> str:
    """A hash of a case's source."""
    return hashlib.sha256(inspect.getsource(harness.CASES[number].function).encode()).hexdigest()[:16]


def _load() -> None:
    """Import every file of cases."""
    for module in pkgutil.iter_modules(fault_cases.__path__):
        if not module.name.endswith("injections"):
            importlib.import_module(f"fault_cases.{module.name}")


def _chosen(only: str, done: dict) -> list[int]:
    try:
        numbers = [int(number) for number in only.split(",") if number]
    except ValueError:
        raise UserError(f"--only {only}: expected numbers, such as 1,16") from None
    if unknown := [number for number in numbers if number not in harness.CASES]:
        raise UserError(f"--only {only}: no case {unknown[0]}; --list shows them")
    left = [number for number in sorted(harness.CASES) if not _has_passed(number, done)]
    return numbers or left


def _run(case: harness.Case, keep: Path | None) -> dict:
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="faults-") as scratch:
        folder = (keep or Path(scratch)).resolve() / f"case-{case.number}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        try:
            outcome, passed = case.function(folder), True
        except (harness.Missed, OSError, AssertionError) as error:
            outcome, passed = f"{error}".replace("\n", " ")[:1000] or type(error).__name__, False
        finally:
            harness.end_all()
        outcome = outcome.replace(str(folder), "RUN").replace(str(harness.ROOT), ".")
        outcome = outcome.replace(f"{sysconfig.get_paths()['stdlib']}/", "")
    seconds = round(time.monotonic() - started)
    return {
        "title": case.title,
        "expected": case.expected,
        "outcome": outcome,
        "passed": passed,
        "seconds": seconds,
        "code": _code(case.number),
    }


def _row(number: int, outcome: dict | None) -> str:
    case = harness.CASES[number]
    if outcome is None:
        cells = [str(number), case.title, case.expected, "**not run**", ""]
    else:
        passed = outcome["outcome"] if outcome["passed"] else f"**failed**: {outcome['outcome']}"
        if _is_of_other_code(number, outcome):
            passed = f"before the case was changed: {passed}"
        cells = [str(number), outcome["title"], outcome["expected"], passed, str(outcome["seconds"])]
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |\n"


if __name__ == "__main__":
    command_line.run(main)
