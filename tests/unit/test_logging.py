"""What a run logs can be read back, also after it was killed and resumed."""

import gzip
import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_ext.callbacks.logging import Logger, console_line
from megatron_ext.callbacks.profiling import Profiling
from megatron_ext.command_line import duration
from megatron_ext.config import Config, TrainingConfig
from megatron_ext.run_config import LoggingConfig
from megatron_ext.training.callback import StepRecord
from megatron_ext.training.devices import model_flops_utilisation, peak_flops
from megatron_ext.training.metrics import MetricsFile, read_metrics


def record(iteration, **more):
    return {
        "iteration": iteration,
        "loss": 5.0 / iteration,
        "loss_understanding": 2.0,
        "loss_generation": 3.0,
        "grad_norm": 1.25,
        "learning_rate": 3e-4,
        "consumed_samples": 8 * iteration,
        "tokens_per_second": 12345.0,
        "step_seconds": 0.5,
        "data_wait_seconds": 0.002,
        "flops_ratio": 1.0,
        "mfu": None,
        "skipped_steps": 0,
    } | more


@pytest.fixture
def config(tmp_path):
    return Config(output=str(tmp_path / "run"), training=TrainingConfig(iterations=10))


def run(config, iterations, resumed=0, pictures=(), **more):
    lines = []
    logger = Logger(config, resumed, say=lines.append)
    for iteration in iterations:
        logger.log(record(iteration, **more), pictures)
    logger.close()
    return lines


def test_every_logged_iteration_is_one_json_line(config, tmp_path):
    run(config, range(1, 4))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [record(i) for i in (1, 2, 3)]


def test_numbers_that_are_not_finite_are_null_in_strict_json(config, tmp_path):
    run(config, [1], loss=math.nan, grad_norm=math.inf, skip_reason="the loss is nan", skipped_steps=1)
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    strict = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert strict["loss"] is None and strict["grad_norm"] is None and strict["skip_reason"] == "the loss is nan"


def test_a_resumed_run_removes_records_after_its_checkpoint(config, tmp_path):
    run(config, range(1, 8))
    with (tmp_path / "run" / "metrics.jsonl").open("a") as stream:
        stream.write('{"iteration": 8, "lo')
    assert [r["iteration"] for r in read_metrics(tmp_path / "run" / "metrics.jsonl")] == list(range(1, 8))
    run(config, range(5, 7), resumed=4)
    assert [r["iteration"] for r in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_a_line_is_in_the_file_as_soon_as_it_is_written(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.write({"iteration": 1})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"iteration": 1}]
    metrics.close()


def test_tensorboard_has_the_curves_and_a_resumed_run_replaces_its_tail(config, tmp_path):
    run(config, range(1, 6), validation_loss=4.0, validation_loss_generation=4.5)
    run(config, range(4, 6), resumed=3, loss=7.0)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert {"loss/all", "loss/generation", "validation_loss/generation", "run/grad_norm"} <= set(
        events.Tags()["scalars"]
    )
    curve = {e.step: e.value for e in events.Scalars("loss/all")}
    assert curve == pytest.approx({1: 5.0, 2: 2.5, 3: 5 / 3, 4: 7.0, 5: 7.0})
    assert [event.step for event in events.Scalars("loss/all")] == [1, 2, 3, 4, 5]


def test_the_console_line():
    line = console_line(record(7, mfu=0.412, flops_ratio=0.56), iterations=1000, seconds_left=3723)
    assert line == (
        "   7/1000 | loss 0.7143 (understanding 2.0000, generation 3.0000) | lr 3.00e-04 | grad norm 1.25 | "
        "12.3k tokens/s | step 0.50 s (data 2 ms) | MFU 41.2 % | FLOPs 0.56 of dense | left 1:02:03"
    )


def test_a_skipped_step_and_a_validation_have_their_own_console_lines(config):
    lines = run(config, [3], skip_reason="the loss is nan", skipped_steps=2, validation_loss=4.0)
    assert lines[0] == "iteration 3: step skipped, the loss is nan (2 skipped so far)"
    assert lines[2] == "iteration 3: validation loss 4.0000"


def test_the_z_loss_is_shown_beside_the_losses(config, tmp_path):
    lines = run(config, [3], z_loss=0.00123, validation_loss=4.0, validation_z_loss=0.002)
    assert "(understanding 2.0000, generation 3.0000), z-loss 1.23e-03 |" in lines[0]
    assert lines[1] == "iteration 3: validation loss 4.0000, z-loss 2.00e-03"
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert {"loss/z_loss", "validation_loss/z_loss"} <= set(events.Tags()["scalars"])


def test_an_evaluation_has_its_own_console_line_and_charts(config, tmp_path):
    pictures = [("a red circle", tmp_path / "0000.png")]
    Image.new("RGB", (6, 4), "red").save(pictures[0][1])
    figures = {"pope_accuracy": 61.25, "mme_perception": 900.0, "evaluation_seconds": 7.5}
    lines = run(config, [3], pictures=pictures, **figures)
    expected = f"pope accuracy 61.2, mme perception 900.0, 1 picture in {tmp_path} (7.5 s)"
    assert lines[1] == f"iteration 3: evaluation {expected}"
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert events.Scalars("pope/accuracy")[0].value == 61.25
    assert {"mme/perception", "run/evaluation_seconds"} <= set(events.Tags()["scalars"])
    (image,) = events.Images("pictures/0: a red circle")
    assert (image.step, image.width, image.height) == (3, 6, 4)


def test_the_time_left_follows_the_pace_of_this_process(config):
    times = iter([100.0, 130.0])
    lines = []
    logger = Logger(config, resumed_iteration=4, say=lines.append, clock=lambda: next(times))
    logger.log(record(7))
    logger.close()
    assert lines[0].endswith("left 0:30")  # 3 iterations in 30 s, 3 to go


def test_durations():
    assert [duration(s) for s in (0, 61.4, 3600)] == ["0:00", "1:01", "1:00:00"]


def test_wandb_offline_writes_a_run_and_resumes_the_same_one(config, tmp_path):
    pytest.importorskip("wandb")
    config.logging = LoggingConfig(wandb="offline", tensorboard=False)
    run(config, range(1, 3))
    first = (tmp_path / "run" / "wandb_id").read_text()
    Image.new("RGB", (6, 4), "red").save(tmp_path / "0000.png")
    run(config, [2], resumed=1, pictures=[("a red circle", tmp_path / "0000.png")], evaluation_seconds=1.0)
    assert (tmp_path / "run" / "wandb_id").read_text() == first
    files = list((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert files and all(file.name == f"run-{first}.wandb" and file.stat().st_size > 0 for file in files)
    (picture,) = (tmp_path / "run" / "wandb").glob("offline-run-*/files/media/images/pictures_*.png")
    assert Image.open(picture).size == (6, 4)


def test_without_wandb_one_line_says_so_and_the_run_continues(config, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    config.logging = LoggingConfig(wandb="online", tensorboard=False)
    lines = run(config, [1])
    assert lines[0].startswith("wandb is not installed")
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 1


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H200", 989.5),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A10", 125.0),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA GB200", 2500.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA L4", 121.0),
    ],
)
def test_peaks_by_the_name_the_driver_gives(name, tflops):
    assert peak_flops(name) == tflops * 1e12


def test_an_unknown_device_has_no_mfu():
    assert peak_flops("Tesla T4") is None
    assert model_flops_utilisation(1e15, 1.0, 8, "Tesla T4") is None
    assert model_flops_utilisation(989.5e12, 1.0, 2, "NVIDIA H200") == pytest.approx(0.5)


def test_the_profiler_traces_its_window_only(tmp_path):
    profiling = Profiling(LoggingConfig(profile_start=2, profile_iterations=2), tmp_path, rank=0)
    run = SimpleNamespace(progress=SimpleNamespace(iteration=0))
    written = []
    for iteration in range(1, 6):
        profiling.before_batch(run)
        torch.ones(iteration, 7).sum()
        run.progress.iteration = iteration
        profiling.after_step(run, StepRecord({"iteration": iteration}))
        written.append(profiling.file.exists())
    assert written == [False, False, True, True, True]
    trace = json.loads(gzip.decompress(profiling.file.read_bytes()))
    shapes = {tuple(e["args"]["Input Dims"][0]) for e in trace["traceEvents"] if e.get("name") == "aten::sum"}
    assert shapes == {(2, 7), (3, 7)}
