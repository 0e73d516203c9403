"""benchmarks/gpu_study.sh: whole seeds first, data that travels in one file."""

import argparse
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
