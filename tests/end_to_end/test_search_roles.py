"""A search for roles from its file to its report, stopped and started again."""

import json
from pathlib import Path

import pytest
import yaml

from megatron_ext import config_file
from megatron_ext.config import Config
from megatron_ext.errors import UserError
from megatron_ext.files import read_json
from megatron_ext.role_search import search, settings, status
from megatron_ext.routing.plan import Plan
from megatron_ext.study import outcome, scheduler, state, steps
from megatron_ext.training.metrics import read_metrics
from support.data_sets import write_pairs
from support.forked_programs import run_forked
from support.vocabularies import make_vocabulary

ARMS = ("searched", "random")


@pytest.fixture
def search_file(tmp_path) -> Path:
    """A search over a tiny model with a few steps for each run."""
    vocabulary = make_vocabulary(tmp_path / "vocabulary")
    write_pairs(tmp_path / "pairs", vocabulary, [["is it red", "yes"], ["is it blue", "no"]] * 30, grid=(4, 4))
    sources = [{"path": str(tmp_path / "pairs"), "task": task} for task in ("understanding", "generation")]
    base = {
        "model": {"num_layers": 3, "hidden_size": 32, "num_attention_heads": 4, "ffn_hidden_size": 64},
        "data": {"vocabulary": str(tmp_path / "vocabulary"), "train": sources, "validation": sources},
        "training": {"iterations": 100, "micro_batch_size": 2, "global_batch_size": 4, "validation_batches": 2},
        "optimizer": {"schedule": "wsd", "wsd_decay_iterations": 50},
        "logging": {"tensorboard": False},
    }
    base["data"] |= {"sequence_length": 128, "workers": 0}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    tree = {
        "name": "tiny",
        "output": str(tmp_path / "out"),
        "base": [str(tmp_path / "base.yaml")],
        "cost": 0.8,
        "drawn": {"tokens": 4 * 512, "tables": 4, "rows": 8},
        "rungs": [{"tables": 2, "tokens": 2 * 512}, {"tables": 1, "tokens": 3 * 512}],
        "report": {"seeds": [11], "tokens": 3 * 512},
    }
    (tmp_path / "search.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path / "search.yaml"


def test_a_search_that_was_stopped_ends_with_a_report_and_a_method_that_costs_what_was_asked(search_file, monkeypatch):
    trained, stop_after = [], 3

    def execute(runs, evaluation, *_) -> None:
        for run in runs:
            if state.result(run, steps.fingerprint(run, evaluation)):
                continue
            if len(trained) == stop_after:
                raise UserError("stopped by SIGTERM")
            state.lock(run)
            state.begin(run)
            run_forked(["pretrain_unified.py", "--config", run.folder / "run.yaml"])
            outcome.write(run, evaluation)
            trained.append(run.name)

    monkeypatch.setattr(scheduler, "execute", execute)
    read = settings.read(search_file)
    output = Path(read.output)
    assert "drawn: 1 waiting" in status.text(read)
    with pytest.raises(UserError, match="stopped by SIGTERM"):
        search.run(read)
    assert "rung1: 2 finished, 3 waiting" in status.text(read)
    measured = (output / "measured.json").read_bytes()
    stop_after = None
    numbers = search.run(read)
    assert "every run is finished" in status.text(read)
    assert len(trained) == len(set(trained)) == 1 + 5 + 3 + 3  # unchanged beside the tables of each rung
    assert (output / "measured.json").read_bytes() == measured
    assert read_json(output / "search.json") == json.loads(json.dumps(numbers))
    assert "## On fresh seeds" in (output / "report.md").read_text()

    # The same rows under the same table: the losses of the drawn model's own validation.
    (drawn,) = (output / "drawn" / "runs").iterdir()
    validated = read_metrics(drawn / "metrics.jsonl")[-1]
    for task, loss in numbers["unchanged"]["losses"].items():
        assert loss == pytest.approx(validated[f"validation_loss_{task}"], rel=1e-6)

    for arm in ARMS:
        of_arm = {name: table["rungs"] for name, table in numbers["tables"].items() if name.startswith(arm)}
        scores = {name: rungs[0]["score"] for name, rungs in of_arm.items() if rungs}  # others are measured alone
        assert len(scores) == 2
        best = min(scores, key=scores.__getitem__)
        assert numbers["best"][arm] == best and len(numbers["tables"][best]["rungs"]) == 2
        assert numbers["tables"][best]["cost"] <= 0.8
        ratio = numbers["fresh"]["comparisons"][f"{arm} / unchanged"]["flops_ratio"]
        assert ratio == pytest.approx(numbers["tables"][best]["cost"], abs=0.03)

    text = (output / "best.yaml").read_text()
    assert len(text.splitlines()) <= 20
    method = config_file.load(Config, [search_file.parent / "base.yaml", output / "best.yaml"])
    section = numbers["tables"][numbers["best"]["searched"]]["plan"]
    assert (
        Plan.from_config(method).roles
        == Plan.from_config(
            config_file.from_tree(Config, {"model": config_file.to_tree(method.model), "plan": section})
        ).roles
    )
