"""A study's runs, their lengths, states and locks; the Slurm array; the report."""

import dataclasses
import json
import math
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import yaml

from megatron_ext.errors import UserError
from megatron_ext.evaluation import gqa, scene_check
from megatron_ext.files import read_json, write_json
from megatron_ext.picture_world.benchmark_files import BenchmarkConfig, write_benchmarks
from megatron_ext.run_config import BadStepConfig
from megatron_ext.study import claims as claim_checks
from megatron_ext.study import (
    collect,
    execution,
    grid,
    learning_rates,
    outcome,
    report,
    scheduler,
    slurm,
    state,
    status,
    steps,
    study_file,
)
from megatron_ext.training.bad_steps import BadSteps
from megatron_ext.training.metrics import MetricsFile
from support.data_sets import write_pairs, write_texts
from support.vocabularies import make_vocabulary

NOTHING = {"benchmarks": [], "evaluate_as": {}}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict:
    """A configuration's data: pairs for both tasks, some texts; generation is 60 % of the documents with images."""
    folder = tmp_path_factory.mktemp("data")
    vocabulary = make_vocabulary(folder / "vocabulary")
    write_pairs(folder / "pairs", vocabulary, [["a red circle", "a red circle"]] * 50, grid=(4, 4))
    write_texts(folder / "texts", vocabulary, ["a red circle"] * 50)
    sources = [
        {"path": str(folder / "pairs"), "task": "understanding", "weight": 2},
        {"path": str(folder / "pairs"), "task": "generation", "weight": 3},
        {"path": str(folder / "texts"), "task": "text"},
    ]
    return {
        "vocabulary": str(folder / "vocabulary"),
        "train": sources,
        "validation": sources[:2],
        "sequence_length": 64,
    }


@pytest.fixture(scope="module")
def measured() -> dict:
    """The measurements of planning, shared by all tests."""
    return {}


@pytest.fixture
def study(data, measured, tmp_path):
    """A function (changes) that gives a study of the paper's seven rows in tmp_path."""
    (tmp_path / "base.yaml").write_text(yaml.safe_dump({"data": data, "training": {"iterations": 100}}))
    tree = yaml.safe_load((Path(__file__).parents[2] / "examples/studies/smoke.yaml").read_text())
    tree |= {"base": [str(tmp_path / "base.yaml")], "settings": {}, "output": str(tmp_path / "out")}

    if "plan" in measured:  # by an earlier test: the same data and methods
        write_json(tmp_path / "out" / "plan.json", measured["plan"])

    def make(**changes) -> study_file.Study:
        (tmp_path / "study.yaml").write_text(yaml.safe_dump(tree | changes))
        return study_file.read(tmp_path / "study.yaml")

    return make


def test_files_of_a_study_are_laid_over_one_another_and_named_together(study, tmp_path):
    study()
    (tmp_path / "over.yaml").write_text("{seeds: [5], settings: {training: {seed: 3}}}")
    laid_over = study_file.read(tmp_path / "study.yaml", tmp_path / "over.yaml")
    assert laid_over.seeds == [5] and len(laid_over.methods) > 1
    (tmp_path / "over.yaml").write_text("{seed: [5]}")
    with pytest.raises(UserError, match=r"study.yaml \+ .*over.yaml: unknown key 'seed'"):
        study_file.read(tmp_path / "study.yaml", tmp_path / "over.yaml")


def test_runs_keep_the_sources_of_their_tasks_and_validate_on_all(study, measured):
    example = study(seeds=[3])
    runs = {run.method.name: run for run in grid.runs(example)}
    measured["plan"] = read_json(Path(example.output) / "plan.json")
    tasks = {name: [s.task for s in run.config.data.train] for name, run in runs.items()}
    assert tasks["dense"] == ["understanding", "generation", "text"]
    assert tasks["himix-u"] == ["understanding", "text"] and tasks["hmgen-g"] == ["generation", "text"]
    assert all([s.task for s in run.config.data.validation] == ["understanding", "generation"] for run in runs.values())
    assert {(run.config.training.seed, run.config.data.seed) for run in runs.values()} == {(3, 3)}
    assert runs["dense-u"].config.training.validation_interval == runs["dense-u"].iterations  # once, at the end
    without = {r.method.name: r for r in grid.runs(study(keep_text=False))}["himix-u"]
    assert [s.task for s in without.config.data.train] == ["understanding"]


def test_a_size_may_set_seeds_budgets_and_methods_and_a_method_budgets(study):
    size = {"settings": {"model": {"num_layers": 2}}}
    own = {"seeds": [7], "budgets": ["tokens"], "methods": ["dense", "dense-u", "dense-g"]}
    sizes = [{"name": "a", **size}, {"name": "b", **size, **own}]
    runs = grid.runs(study(sizes=sizes, seeds=[1, 2], budgets=["tokens", "flops"]))
    seeds = {size: {r.config.training.seed for r in runs if r.size.name == size} for size in ("a", "b")}
    assert seeds == {"a": {1, 2}, "b": {7}}
    budgets = {size: {b for r in runs if r.size.name == size for b in r.budgets} for size in ("a", "b")}
    assert budgets == {"a": {"tokens", "flops"}, "b": {"tokens"}}
    methods = {size: [r.method.name for r in runs if r.size.name == size] for size in ("a", "b")}
    assert methods["b"] == ["dense-u", "dense-g", "dense"]  # the study's order
    assert {*methods["b"]} < {*methods["a"]}
    some = [{"name": "dense", "trained_on": "unified", "partner_group": "dense", "budgets": ["tokens"]}]
    runs = grid.runs(study(sizes=sizes[:1], seeds=[1, 2], budgets=["flops", "tokens"], methods=some))
    assert [run.budgets for run in runs] == [("tokens",), ("tokens",)]
    with pytest.raises(UserError, match=r"'sizes\[0\].methods' has 'none', which is not among the study's 'methods'"):
        study(sizes=[{"name": "a", **size, "methods": ["none"]}])


def test_equal_tokens_steps_and_flops(study):
    settings = {"training": {"micro_batch_size": 2, "global_batch_size": 8}}
    runs = grid.runs(study(budgets=["tokens", "steps", "total", "flops"], settings=settings))
    iterations = {(run.method.name, run.budgets): run.iterations for run in runs}
    assert iterations["dense", ("tokens", "steps", "total", "flops")] == 100  # one run for all
    alone = iterations["dense-u", ("tokens", "flops")], iterations["dense-g", ("tokens", "flops")]
    assert 100 < sum(alone) < 125  # text is in both
    for name in ("dense-u", "dense-g", "himix-u", "hmgen-g"):
        assert iterations[name, ("steps",)] == iterations[name, ("total",)] == 100
    assert iterations["share-all", ("tokens", "steps", "total")] == 100
    batches = {(run.method.name, run.budgets[0]): run.config.training for run in runs}
    assert {batches[name, "tokens"].global_batch_size for name in ("dense", "dense-u", "dense-g")} == {8}
    assert {batches[name, "total"].global_batch_size for name in ("dense-u", "dense-g")} == {8}
    cut = [batches[name, "steps"] for name in ("dense-u", "dense-g")]
    rows = batches["dense", "tokens"].validation_batches * 8  # validated on, or those and some more
    assert all(rows <= training.validation_batches * training.global_batch_size < rows + 8 for training in cut)
    # Of 8 rows, by share.
    assert [(training.global_batch_size, training.micro_batch_size) for training in cut] == [(3, 1), (5, 1)]
    ratios = {run.method.name: run.length.flops_ratio for run in runs}
    assert ratios["himix-u"] < ratios["share-all"] < ratios["hmgen-g"] < 1
    for name in ("himix-u", "hmgen-g", "share-all"):
        shared = ("tokens", "steps", "total") if name == "share-all" else ("tokens",)
        tokens, flops = iterations[name, shared], iterations[name, ("flops",)]
        assert flops * ratios[name] == pytest.approx(tokens, abs=1)


def test_the_data_are_measured_once(study, monkeypatch):
    before = grid.runs(study())
    monkeypatch.setattr(grid, "Lengths", None)
    assert [run.iterations for run in grid.runs(study())] == [run.iterations for run in before]


ASKED = {"evaluation": {"vq": "x", "benchmarks": [{"name": "gqa", "data": "x"}]}}
SHARE_ALL = {"method": "share-all", "trained_on": "unified"}
TOTAL = {"budgets": ["steps", "total"], "sizes": [{"name": "a", "settings": {}, "budgets": ["steps"]}]}


def claims(metric: str, method: str, requires: str | None = None, **others) -> list[dict]:
    """A hypothesis with one claim about one model; ``others`` are keys of the claim or of its term."""
    of_claim = {key: others.pop(key) for key in ("below", "budget") if key in others}
    claim = {"metric": metric, "above": 0, "terms": [{"method": method, "trained_on": "unified", **others}]} | of_claim
    return [{"name": "H", "statement": "", "claims": [claim], "requires": requires}]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"sizes": []}, "'sizes' is empty"),
        ({"budget": ["tokens"]}, "unknown key 'budget' .did you mean 'budgets'"),
        ({"budgets": ["time"]}, r"'budgets\[0\]' is 'time', must be one of tokens, steps, total, flops"),
        ({"seeds": [1, 1]}, r"'seeds' is \[1, 1\]; give at least one, each once"),
        ({"evaluation": {"benchmarks": [{"name": "gqa", "data": "x"}]}}, "'evaluation.vq' is missing"),
        ({"sizes": [{"name": "a", "settings": {}, "budgets": ["flops"]}]}, "'flops', which is not among the study's"),
        ({"sizes": [{"name": "a", "settings": {}, "budgets": []}]}, r"'sizes\[0\].budgets' is \[\]; give at least"),
        ({"sizes": [{"name": "a/b", "settings": {}}]}, r"'sizes\[0\].name' is 'a/b'; it names a folder"),
        ({"gate": {"GQA": 60}}, "'gate' names 'GQA'; there are understanding loss, generation loss, and what begins"),
        ({"learning_rates": {"values": [1e-3], "seed": 1}}, "'learning_rates.seed' is 1, a seed of the study"),
        ({"hypotheses": claims("loss", "dense")}, r"'hypotheses\[0\].claims\[0\].metric' names 'loss'"),
        ({"hypotheses": claims("Generation loss", "dense")}, "metric' names 'Generation loss'; there are und"),
        (ASKED | {"hypotheses": claims("GQA chance corrected", "dense")}, "names .*; there are .* GQA, chance-corr"),
        (
            {"hypotheses": claims("generation loss", "dense", trained_on="understanding")},
            "und.*, and has no gen.* loss",
        ),
        ({"hypotheses": claims("generation loss", "dense", below=-1)}, "is above 0 and below -1, which nothing is"),
        (TOTAL | {"hypotheses": claims("generation loss", "dense", budget="total")}, "no size .* budget 'total'"),
        (
            {"hypotheses": [*claims("generation loss", "dense", requires="H")]},
            r"'hypotheses\[0\].requires' is 'H', must",
        ),
        ({"hypotheses": claims("generation loss", "dens")}, "no method trained on unified is labelled 'dens'"),
        ({"hypotheses": claims("generation loss", "dense", evaluated_as="x")}, "evaluated_as' is 'x', not in its 'ev"),
    ],
)
def test_a_mistake_in_a_study_file_is_named(study, tmp_path, changes, message):
    with pytest.raises(UserError, match=message) as refusal:
        study(**changes)
    assert str(refusal.value).startswith(f"{tmp_path / 'study.yaml'}: ")


def test_figures_corrected_for_chance_are_named_as_their_benchmarks_name_them():
    assert claim_checks.CHANCE_CORRECTED == {"gqa": gqa.CORRECTED, "mjhq": scene_check.CORRECTED}


def test_a_search_for_rates_without_validation_data_is_refused(study):
    example = study(settings={"data": {"validation": []}}, learning_rates={"values": [0.1], "seed": 9})
    with pytest.raises(
        UserError, match="run tiny.dense-u.lr0.1.seed9: 'learning_rates' compares validation losses, and"
    ):
        learning_rates.trials(example)


def test_a_configuration_that_cannot_run_is_refused_before_any_run(study):
    sizes = [{"name": "odd", "settings": {"model": {"hidden_size": 30, "num_attention_heads": 4}}}]
    with pytest.raises(UserError, match="run odd.dense-u.tokens.seed1: model.hidden_size .30. is not divisible"):
        grid.runs(study(sizes=sizes))


def test_an_ambiguous_partner_run_is_refused(study):
    single = {"trained_on": "understanding", "partner_group": "a"}
    unified = {"name": "both", "trained_on": "unified", "partner_group": ["a", "b"]}
    with pytest.raises(
        UserError, match="one and two share a partner_group with both, which can have one partner run for und"
    ):
        study(methods=[unified, {"name": "one", **single}, {"name": "two", **single}])
    with pytest.raises(UserError, match="two methods trained on understanding are labelled 'x'; give each a label"):
        study(methods=[{"name": "one", "label": "x", **single}, {"name": "x", **single}])


def test_evaluation_is_checked_before_training(study, tmp_path):
    write_benchmarks(tmp_path / "benchmarks", BenchmarkConfig(pictures=3, size=16))
    pope = {"name": "pope", "data": str(tmp_path / "benchmarks" / "pope")}
    valid = {"vq": str(tmp_path), "benchmarks": [pope], "evaluate_as": {"trained": []}}
    for changes, message in (
        ({"benchmarks": [pope | {"parts": "popular,none"}]}, "none"),
        ({"benchmarks": [pope | {"data": str(tmp_path / "no")}]}, "no: no such folder .benchmark pope"),
        ({"evaluate_as": {"trained": [], "other": ["plan.presett=dense"]}}, "evaluate_as.other, run .*plan.presett"),
    ):
        changed = study(evaluation=valid | changes)
        with pytest.raises(UserError, match=message):
            steps.check(grid.runs(changed), changed.evaluation)
    with pytest.raises(UserError, match="'evaluation.evaluate_as' needs one entry of"):
        study(evaluation=valid | {"evaluate_as": {"dense": ["plan.preset=dense"]}})
    good = study(evaluation=valid)
    steps.check(grid.runs(good), good.evaluation)


def finish(run, loss=2.0) -> None:
    """Write the files of a finished training."""
    state.begin(run)
    write_json(run.folder / "FINISHED", {"iteration": run.iterations})
    losses = {f"validation_loss_{task}": loss for task in ("understanding", "generation")}
    cost = {"consumed_tokens": 10 * run.iterations, "consumed_flops": 5.0, "consumed_dense_flops": 10.0}
    MetricsFile(run.folder / "metrics.jsonl").write({"iteration": run.iterations} | cost | losses)


def test_each_method_is_trained_at_the_rate_with_the_lowest_mean_log_loss_of_its_trials(study):
    settings = {"optimizer": {"lr": 0.004, "min_lr": 0.001, "warmup_iterations": 0}}
    example = study(settings=settings, learning_rates={"values": [0.1, 0.2, 0.4], "seed": 9, "iterations": 10})
    example.methods[0].searches_rate = False
    before = execution.plan(example)
    names = {(trial.size.name, trial.method.name, trial.seed) for trial in before.trials}
    assert len(before.trials) == 15 and ("tiny", "dense-u", 9) not in names and ("tiny", "dense", 9) in names
    by_name = {trial.name: trial for trial in before.trials}
    trial = by_name["tiny.dense.lr0.2.seed9"]
    assert trial.iterations == 10 and trial.config.optimizer.min_lr == pytest.approx(0.05)
    assert trial.folder == Path(example.output) / "learning_rates" / trial.name
    assert [step.name for step in steps.steps(trial, example.evaluation)] == ["training"]
    assert before.waiting == {run.name for run in before.runs} - {"tiny.dense-u.tokens.seed1"}
    for trial in before.trials:
        if trial.method.name != "hmgen-g":
            finish(trial, loss={0.1: 3.0, 0.2: 2.0, 0.4: 2.5 if trial.method.name == "dense" else 1.5}[lr_of(trial)])
            outcome.write(trial, example.evaluation)
    plan = execution.plan(example)
    rates = {run.method.name: lr_of(run) for run in plan.runs}
    assert rates == {"dense-u": 0.004, "dense": 0.2} | dict.fromkeys(("dense-g", "himix-u", "share-all"), 0.4) | {
        "hmgen-g": 0.004
    }
    assert plan.waiting == {"tiny.hmgen-g.tokens.seed1"}
    assert {run.name for run in plan.needed(["tiny.dense.tokens.seed1"])} == {
        "tiny.dense.tokens.seed1",
        *(f"tiny.dense.lr{rate}.seed9" for rate in (0.1, 0.2, 0.4)),
    }
    _, text, rows = learning_rates.section(example)
    assert text.endswith("might be better: dense-g (tiny, 0.4), himix-u (tiny, 0.4), share-all (tiny, 0.4).")
    assert f"**{np.log(2.0):.4f}**" in next(row for row in rows.splitlines() if " dense |" in row)


def test_a_diverged_trial_is_no_candidate_and_is_not_repeated(study):
    example = study(learning_rates={"values": [0.1, 0.2], "seed": 9})
    example.methods = [method for method in example.methods if method.name in ("dense", "share-all")]
    trials = execution.plan(example).trials
    bad_steps = BadSteps(BadStepConfig(max_consecutive=0))
    bad_steps.judge(math.inf, 1.0)
    with pytest.raises(UserError) as error:
        bad_steps.enforce_limits(1)
    for trial in trials:
        if trial.name == "tiny.dense.lr0.1.seed9":
            finish(trial)
            outcome.write(trial, example.evaluation)
        else:
            state.begin(trial)
            failure = {"step": "training", "returncode": 2, "error": f"pretrain_unified.py: {error.value}"}
            write_json(trial.folder / "failed.json", failure)
    plan = execution.plan(example)
    assert "tiny.dense.tokens.seed1" not in plan.waiting and plan.without_rate == {"tiny.share-all.tokens.seed1"}
    assert status.unfinished(example, trials) == [] == status.failed(example, trials)
    assert status.table(example, trials)[1] == "1 finished, 3 diverged"
    found = learning_rates.searches(example, plan.trials)
    learning_rates.write(example, found)
    kept = json.loads((Path(example.output) / "learning_rates.json").read_text())["searches"]
    shared = next(entry for entry in kept if entry["method"] == "share-all")
    assert shared["best"] is None and shared["mean_log_losses"] == {"0.1": None, "0.2": None}
    _, text, rows = learning_rates.section(example)
    assert text.endswith("Training diverged with every rate, so that there are no runs: share-all (tiny).")
    assert next(row for row in rows.splitlines() if " dense |" in row).split()[-2] == "diverged"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler, "execute", lambda runs, *_: started.extend(run.name for run in runs))
        started: list[str] = []
        execution.execute(example, ["tiny.dense.tokens.seed1", "tiny.share-all.tokens.seed1"])
    assert started == ["tiny.dense.lr0.1.seed9", "tiny.dense.tokens.seed1"]


def lr_of(run) -> float:
    return run.config.optimizer.lr


def test_runs_of_a_seed_on_the_same_tasks_differ_in_their_plan_alone(study):
    """So their rows are the same, in the same order, and so are the initial weights that they share."""
    configs = {}
    for run in grid.runs(study(seeds=[1, 2])):
        config = dataclasses.replace(run.config, plan=None, output="")
        assert configs.setdefault((run.method.trained_on, run.seed), config) == config
    assert len(configs) == 6


def test_the_state_of_a_run_is_read_from_its_folder(study):
    run = grid.runs(study())[0]
    assert state.of(run, NOTHING).kind == "waiting"
    descriptor = state.lock(run)
    assert state.of(run, NOTHING).kind == "running" and state.lock(run) is None
    os.close(descriptor)
    finish(run)
    assert state.of(run, NOTHING).kind == "trained"
    write_json(run.folder / "failed.json", {"step": "training", "returncode": 1, "error": "no room"})
    assert state.of(run, NOTHING) == state.State("failed", run.iterations, "training: no room")


def test_another_configuration_in_the_same_folder_is_refused_but_another_layout_is_not(study):
    state.begin(grid.runs(study())[0])
    settings = {"logging": {"interval": 5}, "checkpoint": {"keep": 1}}
    state.begin(grid.runs(study(settings=settings))[0])
    changed = grid.runs(study(settings={"optimizer": {"lr": 0.5}}))[0]
    with pytest.raises(UserError, match="was started with optimizer.lr = 0.0003, the study file now says 0.5; remove"):
        state.begin(changed)
    assert state.of(changed, NOTHING).kind == "changed"


def test_figures_of_another_configuration_data_or_evaluation_are_not_collected(study, data, tmp_path):
    write_benchmarks(tmp_path / "benchmarks", BenchmarkConfig(pictures=3, size=16))
    pope = {"name": "pope", "data": str(tmp_path / "benchmarks" / "pope")}
    evaluation = {"vq": str(tmp_path), "benchmarks": [pope], "evaluate_as": {"trained": []}}
    runs = grid.runs(study(evaluation=evaluation))

    def collected(**changes) -> int:
        example = study(**({"evaluation": evaluation} | changes))
        return len(collect.collect(example, grid.runs(example)).rows)

    for run in runs:
        finish(run)
        figures = {"iterations": 1, "tokens": 1, "flops": 1.0, "flops_ratio": 1.0, "losses": {"generation loss": 2.0}}
        fingerprint = steps.fingerprint(run, study(evaluation=evaluation).evaluation)
        write_json(run.folder / "result.json", figures | {"evaluated": {"trained": {}}, "evaluation": fingerprint})
    assert collected() == len(runs)
    assert collected(settings={"optimizer": {"lr": 0.5}}) == 0
    of_generation_alone = sum(run.tasks == ("generation",) for run in runs)
    for changes in (
        {"vq": str(tmp_path / "benchmarks")},
        {"benchmarks": [pope | {"options": ["--max-new-tokens", "3"]}]},
    ):
        assert collected(evaluation=evaluation | changes) == of_generation_alone
    questions = tmp_path / "benchmarks" / "pope" / "coco_pope_random.json"
    questions.write_text(questions.read_text().replace("Is there", "Do you see"))
    steps._checksum.cache_clear()  # kept as long as the program runs
    assert collected() == of_generation_alone
    metadata = Path(f"{data['train'][0]['path']}.json")
    before = metadata.read_text()
    metadata.write_text(before + " ")
    try:
        assert "another data set" in state.changed(runs[0]) and collected() == 0
    finally:
        metadata.write_text(before)


def test_the_roles_of_training_have_no_name_and_names_of_figures_say_how_to_read_them(study):
    example = study(evaluation={"evaluate_as": {"trained": [], "dense": ["plan.preset=dense"]}})
    run = next(run for run in grid.runs(example) if run.method.name == "share-all")
    finish(run)
    corrected, difference = "GQA, chance-corrected", "MJHQ-facts, difference"
    scores = {corrected: -1.0, difference: 3.0, "MJHQ-FID": 9.0}
    cost = {"iterations": 1, "tokens": 1, "flops": 1.0, "flops_ratio": 1.0}
    figures = {"losses": {"generation loss": 2.0}, "evaluated": {"trained": scores, "dense": {corrected: 5.0}}}
    write_json(run.folder / "result.json", cost | figures | {"evaluation": steps.fingerprint(run, example.evaluation)})
    collected = collect.collect(example, [run])
    assert {row.evaluated_as: row.metrics for row in collected.rows} == {
        None: scores | {"generation loss": 2.0},
        "dense": {corrected: 5.0},
    }
    metrics = collected.metrics
    assert [metrics[name].scale for name in (corrected, difference, "MJHQ-FID")] == ["points", "points", "log"]
    assert [metrics[name].in_average for name in (corrected, difference, "MJHQ-FID")] == [True, False, True]
    assert {name for name, metric in metrics.items() if not metric.higher_is_better} == {"MJHQ-FID", "generation loss"}


def test_a_failure_is_described_by_the_error_line_of_the_log(tmp_path):
    log = tmp_path / "log.txt"
    log.write_text("== training: x\na.py: old\n== evaluation: y\n[rank1]: evaluate.py: x.json: no such file\n=======\n")
    assert state.last_line(log) == "evaluate.py: x.json: no such file"
    log.write_text("== training: x\nfine\ndisk: no room\n-----\n")
    assert state.last_line(log) == "disk: no room"
    log.write_text("== training: x\n")
    assert state.last_line(log) == "no output"


def test_a_running_program_keeps_the_lock_of_a_killed_study(study):
    run = grid.runs(study())[0]
    descriptor = state.lock(run)
    program = subprocess.Popen(["sleep", "60"], pass_fds=[descriptor])
    os.close(descriptor)
    assert state.locked(run)
    program.kill()
    program.wait()
    assert not state.locked(run)


def test_the_report_names_unfinished_runs_and_its_uncertainty(study):
    claim = {"metric": "understanding loss", "terms": [{"method": "dense", "trained_on": "unified"}], "below": 0}
    hypotheses = [{"name": "H", "statement": "dense learns", "claims": [claim]}]
    hypotheses.append({"name": "I", "statement": "all", "claims": [claim | {"terms": [SHARE_ALL]}], "requires": "H"})
    example = study(seeds=[1, 2], hypotheses=hypotheses, gate={"understanding loss": 3})
    runs = grid.runs(example)
    for run in runs[:-2]:
        diverged = (run.method.name, run.seed) == ("hmgen-g", 2)
        finish(run, loss=math.nan if diverged else 2.0 + 0.1 * run.seed * len(run.tasks))
        outcome.write(run, example.evaluation)
    write_json(runs[-1].folder / "failed.json", {"step": "training", "returncode": 1, "error": "no room"})
    numbers = report.write(example, runs)
    text = (Path(example.output) / "report.md").read_text()
    assert "- 10 of 12 runs are complete" in text and "seeds 1, 2" in text
    assert f"- {runs[-1].name}: failed at iteration 0 of 100 (training: no room)" in text
    assert f"- {runs[-2].name}: waiting at iteration 0 of 100" in text
    (dense,) = numbers["methods"]
    synergy = 100 * np.log([2.1 / 2.2, 2.2 / 2.4])
    effect = dense["effects"][0]
    assert effect["metric"] == "understanding loss" and effect["seeds"] == [1, 2]
    assert effect["gain"] == pytest.approx((2.15 - 2.3) / 2.15)
    half_width = 12.706 * np.std(synergy, ddof=1) / 2**0.5  # Student's t with one degree of freedom
    bounds = synergy.mean() - half_width, synergy.mean() + half_width
    assert (effect["synergy"]["low"], effect["synergy"]["high"]) == pytest.approx(bounds, rel=1e-4)
    assert f"{synergy.mean():+.1f} [{bounds[0]:+.1f}, {bounds[1]:+.1f}]" in text
    assert numbers["gates"][0]["verdict"] == numbers["hypotheses"][0]["verdict"] == "uninformative"
    assert "incomplete (without seed 1, 2) |" in text and {o["verdict"] for o in numbers["tests"]} == {"incomplete"}
    assert "- Not finite, so missing: generation loss of tiny.hmgen-g.tokens.seed2 (tokens)." in text
    assert numbers["hypotheses"][0]["claims"][0]["estimate"]["mean"] == pytest.approx(-100 * np.log(2.3), abs=0.2)
    assert status.failed(example, runs) == [runs[-1].name]
    assert (Path(example.output) / "figures" / "synergy-tokens-tiny.svg").is_file()


def test_a_benchmark_is_asked_again_only_under_roles_that_differ_for_its_documents(study):
    roles = {"himix_from_0": ["plan.preset=himix"], "himix_from_1": ["plan.preset=himix", "plan.himix_start=1"]}
    roles["skip_from_0"] = ["plan.table=[{layers: 0-, task: generation, modality: image, role: skip}]"]
    benchmarks = [study_file.StudyBenchmark(name, "data") for name in ("pope", "mjhq")]
    evaluation = study_file.StudyEvaluation("vq", benchmarks, {"trained": []})
    run = next(run for run in grid.runs(study()) if run.method.name == "dense")
    run.method.evaluate_as = roles
    commands = {step.name: step.command for step in steps.steps(run, evaluation)}
    asked = {name: [b for b in ("pope", "mjhq") if b in command] for name, command in commands.items()}
    assert asked == {  # lossless dense freezes the images of questions in layer 1, the last
        "training": [],
        "evaluation (trained)": ["pope", "mjhq"],
        "evaluation (himix_from_0)": ["pope"],
        "evaluation (skip_from_0)": ["mjhq"],
        "validation losses": [],
    }
    command = commands["validation losses"]
    named = [command[number + 1] for number, word in enumerate(command) if word == "--roles"]
    assert named == ["himix_from_0", "skip_from_0"]
    files = {"trained": {"pope.jsonl": {"F1": 1.0}, "mjhq": {"FID": 2.0}}, "skip_from_0": {"mjhq": {"FID": 3.0}}}
    for name, scores in files.items():
        entries = [{"file": f"x/{file}", "scores": {"headline": headline}} for file, headline in scores.items()]
        write_json(run.folder / "benchmarks" / f"{name}.json", {"files": entries})
    assert steps.scores(run, evaluation, "himix_from_1") == {"F1": 1.0, "FID": 2.0}
    assert steps.scores(run, evaluation, "skip_from_0") == {"F1": 1.0, "FID": 3.0}


def test_evaluations_are_separate_and_incomplete_while_answers_are_missing(study, tmp_path, monkeypatch):
    write_benchmarks(tmp_path / "benchmarks", BenchmarkConfig(pictures=3, size=16))
    shares = {f"share-{share}": [f"plan.himix_start={layer}"] for layer, share in enumerate((0.5, 0.25))}
    pope = study_file.StudyBenchmark("pope", str(tmp_path / "benchmarks" / "pope"))
    evaluation = study_file.StudyEvaluation("vq", [pope], {"trained": [], **shares})
    run = next(run for run in grid.runs(study()) if run.method.name == "share-all")
    _, *evaluations = steps.steps(run, evaluation)
    files = [Path(step.command[step.command.index("--json") + 1]) for step in evaluations]
    assert len(files) > 1 and len({file.name for file in files}) == len(files)
    for missing in (2, 0):
        for file in files:
            write_json(file, {"files": [{"file": "pope.jsonl", "benchmark": "POPE", "scores": {"missing": missing}}]})
        if missing:
            with pytest.raises(UserError, match="pope.jsonl: 2 of POPE are missing"):
                evaluations[0].finish()
        else:
            evaluations[0].finish()
        assert [step.is_done() for step in evaluations] == [not missing] + [False] * (len(evaluations) - 1)
    monkeypatch.setattr(steps, "ROOT", tmp_path / "another checkout")
    moved = list(steps.steps(run, evaluation))[1]
    assert moved.command != evaluations[0].command and moved.is_done()


def test_a_slurm_array_does_every_run_and_requeues_incomplete_runs(study, tmp_path, monkeypatch):
    example = study()
    runs = grid.runs(example)
    (tmp_path / "bin").mkdir()
    finished = (
        f'case "$*" in *--status) case "$*" in *{runs[1].name}*) echo 1 finished;; *) echo 1 stopped;; esac;; esac'
    )
    programs = {
        "sbatch": 'for last; do :; done; cp "$last" submitted.sh; echo "$@" >> submissions; echo 77',
        "scontrol": 'echo "$@" >> requeued',
        "python": f'echo "$@" >> called; {finished}',
    }
    for name, does in programs.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr(slurm.sys, "executable", "python")
    monkeypatch.chdir(tmp_path)
    example.slurm = ["--time=4:00:00"]
    assert slurm.submit(example, [tmp_path / "study.yaml"], runs) == "77"
    script = (tmp_path / "submitted.sh").read_text()
    assert f"#SBATCH --array=1-{len(runs)}\n" in script and "#SBATCH --time=4:00:00\n" in script
    for task, run in enumerate(runs[:2], start=1):
        Path("called").unlink(missing_ok=True)
        environment = os.environ | {"SLURM_ARRAY_TASK_ID": str(task), "SLURM_ARRAY_JOB_ID": "77"}
        done = subprocess.run(["bash", "submitted.sh"], capture_output=True, text=True, env=environment, timeout=60)
        assert done.returncode == 0, done.stderr + script
        run_command, status_command = Path("called").read_text().splitlines()
        assert run_command.endswith(f"scaling_study.py {tmp_path}/study.yaml --out {example.output} --run {run.name}")
        assert status_command == f"{run_command} --status"
    assert (tmp_path / "requeued").read_text() == "requeue 77_1\n"
    plan = execution.plan(study(learning_rates={"values": [0.1], "seed": 9}))
    slurm.submit(example, [tmp_path / "study.yaml"], plan.all)
    *_, trials, others = (tmp_path / "submissions").read_text().splitlines()
    assert trials == f"--parsable {example.output}/slurm-trials.sh"
    assert others == f"--parsable --dependency=afterany:77 {example.output}/slurm.sh"
    assert ".lr0.1.seed9" not in (tmp_path / "submitted.sh").read_text()
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="sbatch is not on this machine; .*slurm.sh is written"):
        slurm.submit(example, [tmp_path / "study.yaml"], runs)


def test_the_decisive_study_has_partner_runs_for_all_that_is_trained():
    example = study_file.read(Path(__file__).parents[2] / "examples/studies/decisive.yaml")
    for method in example.methods:
        if method.trained_on == "unified" and method.name != "untrained":
            for task in ("understanding", "generation"):
                groups = set(method.partner_groups)
                assert any(m.trained_on == task and groups & set(m.partner_groups) for m in example.methods), (
                    method.name,
                    task,
                )
