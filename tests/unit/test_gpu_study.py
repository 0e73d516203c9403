"""benchmarks/gpu_study.sh: programs in forked processes, whole seeds first, data that travels in one file."""

import argparse
import fcntl
import importlib.util
import json
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from gpu_study import order, page, preparation, rates
from megatron_ext.errors import UserError
from megatron_ext.study import forked, scheduler, study_file
from support.programs import ROOT

FOLDER = ROOT / "benchmarks" / "gpu_study"


def wait(program: forked.ForkedProgram, seconds: float = 60) -> int:
    deadline = time.monotonic() + seconds
    while (code := program.poll()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return code


@pytest.fixture
def start(tmp_path):
    """A function that starts a program with this source, arguments and lock; its output goes to ``start.log``."""

    def start_script(source: str, *arguments: str, lock: int | None = None) -> forked.ForkedProgram:
        script = tmp_path / "script.py"
        script.write_text(source)
        environment = {"PATH": os.environ["PATH"], "CHOSEN": "1"}
        return forked.start_program([sys.executable, str(script), *arguments], start_script.log, environment, lock)

    start_script.log = tmp_path / "log.txt"
    return start_script


def test_a_forked_program_has_its_arguments_environment_and_exit_code_and_everything_imported(start):
    source = "import os, sys; print(__name__, sys.argv[1:], os.environ['CHOSEN'], 'HOME' in os.environ, flush=True);"
    program = start(source + "print('megatron.core' in sys.modules, flush=True); sys.exit(3)", "--seed", "1")
    assert wait(program) == 3
    assert start.log.read_text() == "__main__ ['--seed', '1'] 1 False\nTrue\n"


def test_a_forked_program_keeps_its_lock_and_gets_signals(start, tmp_path):
    source = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))\n"
    lock = os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)
    program = start(source + "print('ready', flush=True); time.sleep(60)", lock=lock)
    os.close(lock)
    again = os.open(tmp_path / "lock", os.O_RDWR)
    while not (start.log.exists() and start.log.read_text()):
        assert program.poll() is None
        time.sleep(0.02)
    with pytest.raises(BlockingIOError):
        fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)
    program.send_signal(signal.SIGTERM)
    assert wait(program) == 5
    fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(again)


def study() -> study_file.Study:
    return study_file.read(FOLDER / "study.yaml")


def test_every_seed_has_all_its_methods_before_the_next_and_sizes_keep_pace():
    whole = study()
    runs = [
        SimpleNamespace(size=size, method=method.name, seed=seed)
        for size in whole.sizes
        for method in whole.methods_of(size)
        for seed in whole.seeds_of(size)
    ]
    groups: dict[tuple, list[str]] = {}
    previous = None
    for run in order.by_share_of_seeds(whole, runs):
        key = run.size.name, run.seed
        assert key == previous or key not in groups, "a seed is interrupted by another one"
        groups.setdefault(key, []).append(run.method)
        previous = key
    for (name, _), methods in groups.items():
        size = next(size for size in whole.sizes if size.name == name)
        assert methods == [method.name for method in whole.methods_of(size)]
    of_large = [number for number, (name, _) in enumerate(groups) if name == "h256"]
    assert of_large == [2, 6, 10]  # after 2, 5 and 8 of the 8 seeds of the small one


def test_a_rehearsal_has_the_layers_and_methods_of_the_study():
    real, tiny = study(), study_file.read(FOLDER / "study.yaml", FOLDER / "rehearsal.yaml")
    assert tiny.methods == real.methods and tiny.evaluation == real.evaluation
    assert tiny.settings["model"] == real.settings["model"] and real.settings["model"]["num_layers"] == 12
    assert not any("num_layers" in size.settings["model"] for size in (*real.sizes, *tiny.sizes))


def test_data_are_unpacked_where_they_are_missing(tmp_path, monkeypatch):
    def prepare(recipe, out: Path, say) -> None:
        for name in (*preparation.PACKED, "scenes"):
            (out / name).mkdir(parents=True)
            (out / name / "file").write_text(name)

    monkeypatch.setattr(preparation, "prepare", prepare)
    monkeypatch.setattr(preparation, "WORLD", tmp_path / "world")
    monkeypatch.chdir(ROOT)
    made, carried = tmp_path / "made", tmp_path / "carried"
    with pytest.raises(UserError, match="run --prepare first"):
        preparation.unpack_world(carried)
    packed = preparation.make_world(made, rehearsal=False)
    carried.mkdir()
    packed.rename(carried / packed.name)
    world = preparation.unpack_world(carried)
    assert {f.parent.name: f.read_text() for f in world.glob("*/file")} == {name: name for name in preparation.PACKED}
    (carried / packed.name).unlink()
    assert preparation.unpack_world(carried) == world


def test_a_rate_is_that_of_the_size_times_what_a_search_found_for_the_method(tmp_path):
    found = [("dense", 2e-3), ("share-all", 1e-3), ("himix-u", None)]
    searches = [{"size": "small", "method": method, "best": best} for method, best in found]
    (tmp_path / "search.json").write_text(json.dumps({"searches": searches}))
    whole = study()
    whole.output = str(tmp_path)
    assert rates.rates(whole) == {}  # nothing was carried over
    rates.carry_over(tmp_path / "search.json", tmp_path)
    assert rates.rates(whole) == {
        (size, method): pytest.approx(rate * factor)
        for size, rate in (("h128", 2e-3), ("h256", 1e-3), ("h576", 5e-4))
        for method, factor in (("dense", 1.0), ("share-all", 0.5))
    }


def test_runs_are_told_to_stop_when_time_is_up_and_the_machine_is_recorded(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("gpu_study_program", ROOT / "benchmarks" / "gpu_study.py")
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)

    def until_told(runs, evaluation, jobs, start) -> None:
        def told(*_) -> None:
            raise UserError("stopped by SIGTERM")

        before = signal.signal(signal.SIGTERM, told)
        try:
            time.sleep(60)
            raise AssertionError("nobody said so")
        finally:
            signal.signal(signal.SIGTERM, before)

    monkeypatch.setattr(scheduler, "execute", until_told)
    monkeypatch.setattr(program, "start_of_programs", lambda results: None)
    before = signal.getsignal(signal.SIGALRM)
    arguments = argparse.Namespace(results=tmp_path, minutes=0.001, jobs=3, rehearse=True)
    try:
        program.execute(arguments, study(), [])
    finally:
        signal.signal(signal.SIGALRM, before)
    (call,) = json.loads((tmp_path / "machine.json").read_text())
    assert call["jobs"] == 3 and call["rehearsal"]


def test_the_page_has_the_report_without_figures_and_the_paper():
    report = "# Study x\n\nfacts\n\n## Gate\n\n![a](b.svg)\ntable\n\n## Beside arXiv\n\nlong\n\n## Statistics\n\nend\n"
    assert page._selected(report).split() == ["facts", "##", "Gate", "table", "##", "Statistics", "end"]


def test_the_page_counts_complete_runs_and_takes_the_median_of_their_steps(tmp_path, monkeypatch):
    whole = study()
    whole.output = str(tmp_path)
    runs = []
    for size in whole.sizes:
        for method in whole.methods_of(size):
            for seed in whole.seeds_of(size):
                folder = tmp_path / f"{size.name}.{method.name}.{seed}"
                runs.append(SimpleNamespace(size=size, method=method, seed=seed, folder=folder, iterations=9))
    for seed, milliseconds in ((1, 10), (2, 30)):
        folder = tmp_path / f"h128.share-all.{seed}"
        folder.mkdir()
        records = [{"iteration": i, "step_seconds": ms / 1e3} for i, ms in enumerate((900, milliseconds, milliseconds))]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    monkeypatch.setattr(page.steps, "fingerprint", lambda run, evaluation: {})
    monkeypatch.setattr(page.state, "result", lambda run, evaluation: run.folder.exists())
    text = page.page(whole, runs)
    assert "Nothing has been measured on a GPU yet" in text
    assert "| h128 | Share All | unified | 2 of 8 | 9 | 20 |" in text
    assert "| h256 | dense | unified | 0 of 3 | 9 | - |" in text
    assert "| h576 | 576 | 2 x 1 | 500 | 8.2 M | 0.0005 |" in text
