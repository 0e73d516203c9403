"""benchmarks/gpu_study.sh: whole seeds first, data that travels in one file."""

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from gpu_study import order, page, preparation, rates, sharing
from megatron_ext.errors import UserError
from megatron_ext.study import forked, scheduler, study_file
from support.programs import ROOT

FOLDER = ROOT / "benchmarks" / "gpu_study"


def study() -> study_file.Study:
    return study_file.read(FOLDER / "study.yaml")


def test_every_seed_has_all_its_methods_before_the_next_and_sizes_keep_pace():
    whole = study()
    runs = [
        SimpleNamespace(size=size, method=method.name, seed=seed)
        for size in whole.sizes
        for method in whole.methods_of(size)
        for seed in whole.seeds_of(size, method)
    ]
    groups: dict[tuple, list[str]] = {}
    previous = None
    for run in order.by_share_of_seeds(whole, runs):
        key = run.size.name, run.seed
        assert key == previous or key not in groups, "a seed is interrupted by another one"
        groups.setdefault(key, []).append(run.method)
        previous = key
    for (name, seed), methods in groups.items():
        size = next(size for size in whole.sizes if size.name == name)
        expected = [m.name for m in whole.methods_of(size) if seed in whole.seeds_of(size, m)]
        assert methods == expected and len(methods) >= 2
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


def program_of_the_study():
    """The module benchmarks/gpu_study.py, beside the package of that name."""
    spec = importlib.util.spec_from_file_location("gpu_study_program", ROOT / "benchmarks" / "gpu_study.py")
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    return program


def test_runs_are_told_to_stop_when_time_is_up_and_the_machine_is_recorded(tmp_path, monkeypatch):
    program = program_of_the_study()

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
    monkeypatch.setattr(sharing, "side_by_side", lambda results: contextlib.nullcontext((None, False)))
    monkeypatch.setattr(sharing, "trial", lambda numbers, *_: {number: 10.0 * number for number in numbers})
    before = signal.getsignal(signal.SIGALRM)
    arguments = argparse.Namespace(results=tmp_path, minutes=0.001, jobs=None, rehearse=True)
    try:
        program.execute(arguments, study(), [])
    finally:
        signal.signal(signal.SIGALRM, before)
    (call,) = json.loads((tmp_path / "machine.json").read_text())
    assert call["jobs"] == 2 and call["rehearsal"] and call["MPS"] == "no"
    assert "10 with 1, 20 with 2" in call.values()


def test_a_page_is_made_of_results_that_were_carried_without_the_unpacked_data(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu_study.py", str(tmp_path), "--page", str(tmp_path / "page.md")])
    with pytest.raises(UserError, match="world.tar.xz: not found"):
        program_of_the_study().main()


def test_programs_start_slowly_where_forked_ones_cannot_use_the_gpu(tmp_path, monkeypatch):
    def start(*_):
        return SimpleNamespace(poll=lambda: code)

    monkeypatch.setattr(forked, "start_program", start)
    code = 0
    assert sharing.start_of_programs(tmp_path) is start
    code = 1
    assert sharing.start_of_programs(tmp_path) is scheduler.start_program


def fake_mps(folder: Path, monkeypatch, source: str = "") -> Path:
    """A control program of MPS that logs its calls; a file with the log."""
    log = folder / "mps.log"
    (folder / sharing.MPS).write_text(f'#!/bin/sh\necho "$1" "$([ "$1" ] || cat)" >> {log}\n{source}\n')
    (folder / sharing.MPS).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_MPS_PIPE_DIRECTORY", raising=False)
    return log


@pytest.mark.parametrize("fails", ["nothing", "the service", "the gpu under it"])
def test_kernels_run_side_by_side_where_the_service_works_and_nothing_fails_without_it(tmp_path, monkeypatch, fails):
    log = fake_mps(tmp_path, monkeypatch, "exit 1" if fails == "the service" else "")

    def start(command, file, environment, lock):
        under_mps = "CUDA_MPS_PIPE_DIRECTORY" in environment
        return SimpleNamespace(poll=lambda: int(under_mps and fails == "the gpu under it"))

    monkeypatch.setattr(forked, "start_program", start)
    with sharing.side_by_side(tmp_path) as (chosen, has_mps):
        assert chosen is start and has_mps == (fails == "nothing")
        assert ("CUDA_MPS_PIPE_DIRECTORY" in os.environ) == has_mps
        assert log.read_text().split() == (["-d"] if has_mps else ["-d", "quit"])
    assert log.read_text().split() == ["-d", "quit"] and "CUDA_MPS_PIPE_DIRECTORY" not in os.environ


def test_a_trial_counts_steps_of_all_programs_and_a_number_that_fails_has_none(tmp_path, monkeypatch):
    monkeypatch.setattr(sharing, "TRIAL_SECONDS", 0.3)
    monkeypatch.setattr(sharing, "READY_SECONDS", 60)
    rates = sharing.trial([1, 2], forked.start_program, tmp_path / "trial")
    assert sorted(rates) == [1, 2] and min(rates.values()) > 0
    monkeypatch.setattr(sharing, "LOAD", tmp_path / "missing.py")
    assert sharing.trial([1], forked.start_program, tmp_path / "trial") == {1: 0}


def test_the_least_number_of_programs_near_the_most_steps_is_taken():
    assert sharing.best_number({1: 10, 4: 38.5, 13: 40}) == 4
    assert sharing.best_number({1: 10, 4: 30, 13: 0}) == 4
    assert sharing.best_number({1: 0, 4: 0}) is None


def test_the_page_has_the_report_without_figures_and_the_paper():
    report = "# Study x\n\nfacts\n\n## Gate\n\n![a](b.svg)\ntable\n\n## Beside arXiv\n\nlong\n\n## Statistics\n\nend\n"
    assert page._selected(report).split() == ["facts", "##", "Gate", "table", "##", "Statistics", "end"]


def test_the_page_counts_complete_runs_and_takes_the_median_of_their_steps(tmp_path, monkeypatch):
    whole = study()
    whole.output = str(tmp_path)
    runs = []
    for size in whole.sizes:
        for method in whole.methods_of(size):
            for seed in whole.seeds_of(size, method):
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
    assert "| h576 | 576 | 2 | 500 | 8.2 M | 0.0005 |" in text
