"""The list of callbacks, its order, and callbacks named in the configuration."""

import json
import re
from pathlib import Path

import pytest

from megatron_ext.callbacks import build_callbacks, named_callbacks
from megatron_ext.config import Config
from megatron_ext.errors import UserError
from megatron_ext.training.callback import Callback, CallbackList, StepRecord
from megatron_ext.training.loop import train
from megatron_ext.training.metrics import read_metrics
from megatron_ext.training.run import build_run
from support.data_sets import write_pairs
from support.programs import ROOT
from support.tiny_vq import GRID, make_vq


@pytest.fixture
def settings(tmp_path, vocabulary) -> list[str]:
    """A small run of four iterations."""
    write_pairs(tmp_path / "pairs", vocabulary, [["a red circle"]] * 20, grid=(GRID, GRID))
    sources = [{"path": str(tmp_path / "pairs"), "task": task} for task in ("understanding", "generation")]
    return [
        f"output={tmp_path / 'run'}",
        *("model.num_layers=1", "model.hidden_size=32", "model.num_attention_heads=2"),
        *(f"data.vocabulary={vocabulary.folder}", f"data.train={json.dumps(sources)}"),
        *("data.workers=0", "data.sequence_length=64", "logging.tensorboard=false"),
        *("training.iterations=4", "training.global_batch_size=2", "optimizer.warmup_iterations=1"),
    ]


class Recorder(Callback):
    """Records each call with the number of complete iterations."""

    def __init__(self):
        self.calls = []

    def before_batch(self, run):
        self.calls.append(("before_batch", run.progress.iteration))

    def before_step(self, run, step):
        self.calls.append(("before_step", run.progress.iteration))

    def after_step(self, run, record):
        self.calls.append(("after_step", record.iteration))

    def on_train_begin(self, run):
        self.calls.append("on_train_begin")

    def on_train_end(self, run):
        self.calls.append("on_train_end")

    def close(self):
        self.calls.append("close")


def test_a_named_callback_adds_a_number_to_the_metrics(one_process, settings):
    config = one_process(*settings, "callbacks=[mean_loss:MeanLoss]")
    run, recorder = build_run(config), Recorder()
    assert train(run, [*build_callbacks(run), recorder])
    records = read_metrics(Path(config.output, "metrics.jsonl"))
    losses = [record["loss"] for record in records]
    assert [r["mean_loss"] for r in records] == [sum(losses[: n + 1]) / (n + 1) for n in range(4)]
    steps = [call for n in range(4) for call in (("before_batch", n), ("before_step", n), ("after_step", n + 1))]
    assert recorder.calls == ["on_train_begin", *steps, "on_train_end", "close"]


def test_the_order_of_the_list(one_process, settings, tmp_path):
    make_vq(tmp_path / "vq")
    evaluation = {"interval": 2, "vq": str(tmp_path / "vq"), "prompts": ["red"]}
    more = [f"evaluation={json.dumps(evaluation)}", "logging.gradient_alignment_interval=2"]
    run = build_run(one_process(*settings, *more, "callbacks=[mean_loss:MeanLoss]"))
    assert [type(callback).__name__ for callback in build_callbacks(run)] == [
        *("GradientAlignment", "Validation", "Benchmarking", "MeanLoss", "Logging", "Profiling"),
        *("BadStepLimits", "Checkpointing"),
    ]


def test_the_last_bad_step_is_logged_and_not_saved(one_process, settings, monkeypatch):
    run = build_run(one_process(*settings, "bad_steps.max_total=0", "checkpoint.interval=1"))
    monkeypatch.setattr(run.bad_steps, "_judgement", lambda loss, grad_norm: "a test")
    recorder = Recorder()
    with pytest.raises(UserError, match="iteration 1: 1 bad step in all"):
        train(run, [*build_callbacks(run), recorder])
    (record,) = read_metrics(Path(run.config.output, "metrics.jsonl"))
    assert record["skip_reason"] == "a test" and run.checkpoints.newest() is None
    assert recorder.calls == ["on_train_begin", ("before_batch", 0), ("before_step", 0), "close"]


def test_callbacks_are_called_in_order_and_closed_in_reverse():
    calls = []

    class Named(Callback):
        def __init__(self, name):
            self.name = name

        def after_step(self, run, record):
            calls.append(self.name)

        def close(self):
            calls.append(f"close {self.name}")

    callbacks = CallbackList([Named("a"), Named("b")])
    callbacks.after_step(None, StepRecord({"iteration": 1}))
    callbacks.close()
    assert calls == ["a", "b", "close b", "close a"]


@pytest.mark.parametrize(
    "name, problem",
    [
        ("mean_loss", "must be module:Class"),
        ("no_such_module:MeanLoss", "cannot be imported: No module named 'no_such_module'"),
        ("mean_loss:MeanLos", r"mean_loss\.py has no MeanLos"),
        ("json:JSONDecoder", "is no subclass of megatron_ext.training.callback.Callback"),
    ],
)
def test_a_wrong_name_is_refused(name, problem):
    with pytest.raises(UserError, match=rf"config: 'callbacks\[1\]' is '{name}'.*{problem}"):
        named_callbacks(Config(callbacks=["mean_loss:MeanLoss", name]))


def test_the_documentation_shows_the_tested_callback():
    source = (Path(__file__).parent / "mean_loss.py").read_text().partition("\n\n")[2]
    shown = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "training.md").read_text(), re.DOTALL)[1]
    assert shown.strip() == source.strip()
