"""pretrain_unified.py: resumption bit for bit, other layouts, killed ranks, signals, refusals."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import psutil
import pytest

from support.programs import start_program, torchrun, wait_until

FIRST, LAST = 10, 20
SHARDED = ["parallel.tensor=2", "parallel.sequence=true"]


def metrics(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def losses(output: Path) -> dict[int, tuple]:
    """What steps and validations measured of the model, by iteration."""
    names = ("loss", "z_loss", "grad_norm", "learning_rate", "validation_loss", "validation_z_loss")
    return {m["iteration"]: {k: v for k, v in m.items() if k.startswith(names)} for m in metrics(output)}


def alignments(output: Path) -> dict[int, dict]:
    """The measured gradient alignment, by iteration."""
    return {m["iteration"]: m["gradient_alignment"] for m in metrics(output) if "gradient_alignment" in m}


def half_of(whole: Path, output: Path) -> Path:
    """A run like ``whole`` that was stopped right after its first checkpoint."""
    shutil.copytree(whole / "checkpoints" / f"iter_{FIRST:07}", output / "checkpoints" / f"iter_{FIRST:07}")
    return output


@pytest.fixture(scope="module")
def whole(tmp_path_factory, material, train):
    """An uninterrupted run of 20 iterations with TP 2 and sequence parallelism, evaluated twice. The runs that are
    compared with it have no evaluations, unless they say so."""
    output = tmp_path_factory.mktemp("whole")
    train(output, *SHARDED, *evaluation(material), processes=2)
    return output


def evaluation(material: Path) -> list[str]:
    pope = {"name": "pope", "data": str(material / "benchmarks" / "pope"), "limit": 9}
    settings = {"interval": FIRST, "vq": str(material / "vq"), "benchmarks": [pope], "prompts": ["red", "two circle"]}
    return [f"evaluation={json.dumps(settings)}"]


def answers(output: Path, iteration: int) -> dict[str, str]:
    lines = (output / "evaluation" / f"iter_{iteration:07}" / "pope.jsonl").read_text().splitlines()
    return {record["id"]: record["answer"] for record in map(json.loads, lines)}


def test_evaluations_are_in_the_record(whole, material):
    for iteration in (FIRST, LAST):
        record = metrics(whole)[iteration - 1]
        assert {"pope_accuracy", "pope_f1", "evaluation_seconds"} <= record.keys()
        names = {file.name for file in (whole / "evaluation" / f"iter_{iteration:07}").iterdir()}
        assert names == {"pope.jsonl", "evaluation.json", "0000.png", "0001.png", "sheet.png"}
        assert len(answers(whole, iteration)) == 9
    assert sum("pope_accuracy" in record for record in metrics(whole)) == 2


def test_a_run_leaves_its_record(whole):
    records = metrics(whole)
    assert [m["iteration"] for m in records] == list(range(1, LAST + 1))
    keys = {"loss", "loss_understanding", "loss_generation", "loss_text", "grad_norm", "learning_rate"}
    keys |= {"consumed_samples", "tokens_per_second", "step_seconds", "data_wait_seconds", "flops_ratio"}
    assert keys <= records[0].keys()
    assert records[-1]["consumed_samples"] == LAST * 8
    assert records[-1]["loss"] < 0.95 * records[0]["loss"]
    assert {"validation_loss_generation", "validation_z_loss"} <= records[FIRST - 1].keys()
    assert list(alignments(whole)) == [6, 12, 18, LAST]
    assert {"config.yaml", "FINISHED", "checkpoints", "tensorboard"} <= {p.name for p in whole.iterdir()}


def test_resumed_at_the_same_layout_every_bit_is_the_same_whether_alignment_is_measured_or_not(whole, tmp_path, train):
    output = half_of(whole, tmp_path)
    train(output, *SHARDED, "logging.gradient_alignment_interval=0", processes=2)
    assert not alignments(output)
    expected = {i: record for i, record in losses(whole).items() if i > FIRST}
    assert losses(output) == expected


@pytest.mark.parametrize(
    "processes, overrides, evaluates",
    [(None, [], False), (2, ["parallel.pipeline=2"], False), (2, ["training.micro_batch_size=1"], True)],
    ids=["alone", "pp2", "dp2"],
)
def test_resumed_under_another_layout_the_losses_are_the_same(
    whole, tmp_path, train, material, processes, overrides, evaluates
):
    output = half_of(whole, tmp_path)
    train(output, *overrides, *(evaluation(material) if evaluates else []), processes=processes)
    if evaluates:  # each replica answers a part of the questions
        assert answers(output, LAST) == answers(whole, LAST)
    for iteration, record in losses(output).items():
        assert record == pytest.approx(losses(whole)[iteration], rel=1e-5)
    assert max(losses(output)) == LAST
    for iteration, measured in alignments(output).items():
        for figure, values in alignments(whole)[iteration]["layer"].items():
            assert measured["layer"][figure] == pytest.approx(values, rel=1e-3, abs=1e-3), figure


def test_a_killed_rank_costs_no_more_than_the_steps_since_the_last_checkpoint(whole, tmp_path, train, material):
    command = [*torchrun(2), "pretrain_unified.py", "--config", str(material / "config.yaml"), f"output={tmp_path}"]
    command += [*SHARDED, "checkpoint.interval=3"]
    run = start_program(command, start_new_session=True)
    wait_until(lambda: (tmp_path / "checkpoints" / "iter_0000006").is_dir(), run)
    rank = next(p for p in psutil.Process(run.pid).children() if "pretrain_unified.py" in p.cmdline())
    os.kill(rank.pid, signal.SIGKILL)
    assert run.wait(timeout=400) != 0
    output = train(tmp_path, *SHARDED, "checkpoint.interval=3", processes=2).stdout
    assert "resumed from" in output
    assert losses(tmp_path) == losses(whole)


def test_a_signal_saves_and_leaves_cleanly(whole, tmp_path, train, material):
    command = [sys.executable, "pretrain_unified.py", "--config", str(material / "config.yaml")]
    run = start_program([*command, f"output={tmp_path}", "training.iterations=2000", "checkpoint.interval=0"])
    wait_until(lambda: (tmp_path / "metrics.jsonl").is_file() and len(metrics(tmp_path)) > 2, run)
    run.send_signal(signal.SIGUSR1)
    assert run.wait(timeout=400) == 0
    last = metrics(tmp_path)[-1]["iteration"]
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == [f"iter_{last:07}"]
    assert not (tmp_path / "FINISHED").exists()


def test_mistakes_are_one_line(whole, tmp_path, train, material):
    unknown = train(tmp_path, "model.hiden_size=3", check=False)
    assert unknown.returncode == 2
    assert "unknown key 'model.hiden_size' (did you mean 'hidden_size'?)" in unknown.stdout
    output = half_of(whole, tmp_path)
    other_shape = train(output, "model.hidden_size=64", check=False)
    assert other_shape.returncode == 1 and "Traceback" not in other_shape.stdout
    assert "hidden_size is 32, this run's is 64" in other_shape.stdout
    other_roles = train(output, "plan.himix_start=1", check=False)
    assert other_roles.returncode == 1 and "Traceback" not in other_roles.stdout
    assert (
        "was trained with understanding image tokens KV_ONLY in layer 0, this run has them FULL" in other_roles.stdout
    )
    damaged = next((output / "checkpoints" / f"iter_{FIRST:07}").rglob("*.distcp"))
    damaged.write_bytes(damaged.read_bytes()[:-7])
    truncated = train(output, check=False)
    assert truncated.returncode == 1 and "Traceback" not in truncated.stdout
    assert damaged.name in truncated.stdout
