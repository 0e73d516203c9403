"""benchmarks/gpu_check.sh: a step that fails stops no other, a complete step is not repeated, and the page says what
was measured and what was not."""

import math
import os
import threading
import time
from pathlib import Path

import pytest

from gpu import implementations, runner
from gpu.logs import last_error
from gpu.page import page
from gpu.precision import LOCAL, TINY, relative_error
from gpu.records import DONE, FAILED, NOT_RUN, Context, of_step, read, write_machine
from gpu.steps import STEPS, Figure, Step, missed
from gpu.tiny_run import write_config
from support.programs import PYTHON_PATH, ROOT

STEP_PROGRAM = """
import os, sys, time
from pathlib import Path
if "hangs" in sys.argv:  # before anything that takes time itself
    if os.fork() == 0:
        Path(sys.argv[1], "child").write_text(str(os.getpid()))
    time.sleep(60)
from gpu import runner
from gpu.records import Context, NotRun
from gpu.steps import Figure

class FakeStep:
    figures = {"error": Figure("logits", at_most=1e-5, everywhere=True), "x": Figure("MFU", at_least=9.0)}
    name = sys.argv[sys.argv.index("--step") + 1]
    def measure(self, context, record):
        record.figures["begun"] = 1.0
        record.write()
        getattr(self, self.name)(record)
    def good(self, record): record.figures["x"] = 2.0
    def raises(self, record): raise RuntimeError("CUDA out of memory\\nmore of it")
    def absent(self, record): raise NotRun("DALI is not installed")
    def killed(self, record):
        print("torch.AcceleratorError: an illegal memory access", flush=True)
        os.abort()
    def wrong(self, record): record.figures["error"] = 0.5

runner.measure(FakeStep(), Context(Path(sys.argv[1]), None, None, "--rehearse" in sys.argv))
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A function that runs fake steps by their names and gives their records; ``run.results`` is where."""
    program = tmp_path / "step.py"
    program.write_text(STEP_PROGRAM)
    monkeypatch.setattr(runner, "PROGRAM", program)
    monkeypatch.setenv("PYTHONPATH", PYTHON_PATH)
    monkeypatch.setattr(runner, "SHORTEST", 0)

    def run_steps(*names: str, minutes: float = 20, rehearsal: bool = False) -> dict:
        context = Context(run_steps.results, tmp_path / "references", tmp_path, rehearsal)
        ended = {}
        steps = [Step(name, name, "kernels", seconds=4 if name == "hangs" else 200) for name in names]
        runner.run(steps, context, minutes, lambda step, record: ended.update({step.name: record}))
        return ended

    run_steps.results = tmp_path / "results"
    run_steps.results.mkdir()
    return run_steps


def test_an_exception_of_one_step_is_recorded_and_the_others_run(run):
    ended = run("raises", "killed", "absent", "wrong", "good")
    assert {name: (record.status, record.reason) for name, record in ended.items()} == {
        "raises": (FAILED, "RuntimeError: CUDA out of memory"),
        "killed": (FAILED, "torch.AcceleratorError: an illegal memory access"),
        "absent": (NOT_RUN, "DALI is not installed"),
        "wrong": (FAILED, "logits: 0.5, not <= 1e-05"),
        "good": (DONE, ""),  # slow, which is no failure
    }
    assert all(record.figures["begun"] == 1.0 for record in ended.values())  # what was known by then is kept
    assert read(run.results / "gpu_check.json")["steps"].keys() == ended.keys()


def test_a_step_that_hangs_ends_with_its_time_box_and_takes_its_children_along(run):
    ended = run("hangs", "good")
    assert (ended["hangs"].status, ended["hangs"].reason) == (FAILED, "not ready after 4 s")
    assert ended["good"].status == DONE
    child = int((run.results / "child").read_text())
    with pytest.raises(ProcessLookupError):
        for _ in range(50):  # the process that adopts an orphan takes a moment to reap it
            os.kill(child, 0)
            if "State:\tZ" in Path(f"/proc/{child}/status").read_text():
                raise ProcessLookupError
            time.sleep(0.1)


def test_complete_steps_are_not_run_again_and_the_others_are(run):
    run("good", "raises")
    log = run.results / "gpu_check.log"
    first = log.read_text()
    ended = run("good", "raises")
    assert ended["good"].figures["x"] == 2.0
    second = log.read_text().removeprefix(first)
    assert "=== raises ===" in second and "=== good ===" not in second


def test_a_rehearsal_is_no_measurement(run):
    run("good", rehearsal=True)
    assert of_step(run.results / "gpu_check.json", "good", rehearsal=False).figures == {}
    before = (run.results / "gpu_check.log").read_text()
    run("good")
    assert (run.results / "gpu_check.log").read_text().removeprefix(before).count("=== good ===") == 1


def test_a_step_for_which_no_time_is_left_says_so(run):
    assert run("good", minutes=0)["good"].reason == "no time left"


def test_transformer_engine_is_waited_for_until_its_build_has_ended(tmp_path, monkeypatch):
    ended = tmp_path / "built"
    monkeypatch.setenv(runner.WAIT_FOR_TE, str(ended))
    builder = threading.Timer(1.0, ended.touch)
    builder.start()
    runner.wait_for_build(time.monotonic() + 30)
    assert ended.exists()
    ended.unlink()
    runner.wait_for_build(time.monotonic() + 0.1)  # and no longer than there is time
    builder.join()
    assert runner.import_problem("json") == ""
    assert "No module named 'transformer_engine_of_no_kind'" in runner.import_problem("transformer_engine_of_no_kind")


@pytest.mark.parametrize(
    "figure, value, met",
    [
        (Figure("x", at_most=1.1), 1.1, True),
        (Figure("x", at_most=1.1), 1.2, False),
        (Figure("x", at_least=0.45), 0.44, False),
        (Figure("x", at_most=1e-5), math.nan, False),
        (Figure("x"), 7.0, True),
    ],
)
def test_an_aim_is_met_or_missed(figure, value, met):
    assert figure.met(value) is met


def test_wrong_figures_are_missed_anywhere_and_slow_ones_on_a_gpu_alone():
    step = next(step for step in STEPS if step.name == "dali")
    figures = {"differing": 3.0, "ratio": 0.5}
    assert missed(step.figures, figures, everywhere=True) == [
        "steps that differ from the plain loader's, of 8: 3, not <= 0"
    ]
    assert missed(step.figures, figures) == [
        "steps that differ from the plain loader's, of 8: 3, not <= 0",
        "tokens per second / those of torch's DataLoader: 0.5, not >= 1",
    ]


def test_the_page_has_every_figure_and_says_what_was_not_run(tmp_path):
    file = tmp_path / "gpu_check.json"
    write_machine(file, {"GPU": "NVIDIA H100 80GB HBM3", "torch": "2.11.0+cu130"})
    record = of_step(file, "table_bf16", rehearsal=False)
    record.figures, record.tables = {"dense mfu": 0.47, "himix time_per_flop": 1.3}, {"Steps": "| a |"}
    record.end(FAILED, "not ready after 150 s")
    text = page(read(file))
    assert "| dense: MFU | 0.470 | >= 0.45 | met |" in text
    assert "| himix: time / dense over FLOPs / dense | 1.300 | <= 1.1 | missed |" in text
    assert "--only table_bf16`: failed: not ready after 150 s." in text
    assert "NVIDIA H100 80GB HBM3" in text and "\nSteps:\n\n| a |\n" in text
    for step in STEPS:
        section = text.partition(f"\n## {step.title}\n")[2].partition("\n## ")[0]
        assert all(f"| {figure.label} | " in section for figure in step.figures.values()), step.name
    assert text.count("| not run |") == sum(len(step.figures) for step in STEPS) - 2


def test_the_committed_page_is_what_the_check_writes():
    text = (ROOT / "docs" / "gpu.md").read_text()
    if "Nothing has been measured on a GPU yet" in text:
        assert text == page({"machine": {}, "steps": {}})
    for step in STEPS:
        for figure in step.figures.values():
            assert f"| {figure.label} |" in text


def test_the_last_error_of_a_log_is_found(tmp_path):
    log = tmp_path / "log"
    assert last_error(log) == ""
    log.write_text(
        "host:1:2 [0] NCCL WARN Duplicate GPU detected : rank 0 and rank 1 both on CUDA device 1000\n"
        "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: \n"
    )
    assert last_error(log).endswith("NCCL WARN Duplicate GPU detected : rank 0 and rank 1 both on CUDA device 1000")
    log.write_text(log.read_text() + "[rank1]: torch.distributed.DistBackendError: NCCL error\nand more\n")
    assert last_error(log) == "torch.distributed.DistBackendError: NCCL error"


def test_hidden_states_of_every_layer_are_compared_in_the_order_of_the_batch():
    dense, masked = (
        implementations.hidden_states([*TINY, LOCAL, f"plan.preset={preset}"])
        for preset in ("dense", "himix_hmgen_share_all")
    )
    assert len(dense) == len(masked) == 2 and dense[0].shape == masked[0].shape
    # Text of both is FULL in the first layer; only what the plan leaves out differs.
    alike = (dense[0] - masked[0]).abs().amax(dim=1) < 1e-5
    assert 0.2 < float(alike.float().mean()) < 1
    assert relative_error(dense, dense) == 0 < relative_error(masked, dense)


def test_the_runs_that_implementations_are_compared_by_learn_something(tmp_path, monkeypatch):
    monkeypatch.setattr(implementations, "ITERATIONS", 12)
    losses = implementations.losses(write_config(tmp_path, rehearsal=True), tmp_path / "run", [LOCAL])
    assert len(losses) == 12 and losses[-1] < 0.97 * losses[0]
