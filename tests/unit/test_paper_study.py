"""The study files of the paper's rows, and results beside the paper's tables."""

import dataclasses

import pytest

from megatron_ext import config_file
from megatron_ext.analysis import beside_paper, results
from megatron_ext.analysis.results import Metric, Results
from megatron_ext.config import Config
from megatron_ext.routing.plan import Plan
from megatron_ext.routing.roles import Role, class_index
from megatron_ext.study import study_file
from megatron_ext.token_classes import Modality, Task
from support.programs import ROOT

FILES = ["examples/studies/paper.yaml", "examples/studies/paper_tiny.yaml"]


@pytest.mark.parametrize("files", [FILES[:1], FILES], ids=["whole", "tiny"])
def test_the_study_has_the_papers_rows_with_their_partners_and_layers(monkeypatch, files):
    monkeypatch.chdir(ROOT)
    study = study_file.read(*files)
    ours = {(method.label or method.name, method.trained_on): method for method in study.methods}
    paper = {(row.method, row.task): row for row in results.published().rows}
    assert ours.keys() == paper.keys()
    (size,) = study.sizes
    for key, method in ours.items():
        assert method.partner_groups == paper[key].partner_groups
        trees = [*map(config_file.read_yaml, study.base), study.settings, size.settings, method.settings]
        config = config_file.from_trees(Config, trees)
        assert (config.model.num_layers, config.model.image_codes.depth) == (16, 4)
        roles = Plan.of(config.plan, 16).roles
        skipped = sum(of_layer[class_index(Task.GENERATION, Modality.IMAGE)] == Role.SKIP for of_layer in roles)
        key_value = sum(of_layer[class_index(Task.UNDERSTANDING, Modality.IMAGE)] == Role.KV_ONLY for of_layer in roles)
        name = key[0]
        assert skipped == (5 if name.startswith("HMGen, 5") else 3 if "HMGen" in name else 0), name
        assert key_value == (16 if "HiMix" in name else 1 if name == "dense" else 0), name


@pytest.fixture
def ours() -> Results:
    """Two seeds of the paper's methods, with half and one and a half times its figures; SEED under our name."""
    paper = results.published()
    rows = [
        dataclasses.replace(
            row,
            seed=seed,
            metrics={("SEED" if name == "SEED-Img" else name): factor * x for name, x in row.metrics.items()},
        )
        for row in paper.rows
        for seed, factor in ((1, 0.5), (2, 1.5))
    ]
    metrics = {name: metric for name, metric in paper.metrics.items() if name != "SEED-Img"}
    return Results("ours", {**metrics, "SEED": Metric("understanding")}, rows)


def test_our_means_stand_below_the_papers_figures_with_the_change_against_dense(ours):
    by_task = {title.split(":")[0]: table for title, table in beside_paper.tables(ours)}
    split = by_task.pop(beside_paper.SPLIT)
    assert list(by_task) == ["Table 1", "Table 2", "Table 3"]
    of_gqa = split[split["metric"] == "GQA"].iloc[0].tolist()
    ours_of_gqa = [f"{x} [{x}, {x}]" for x in ("+52.9", "-5.7", "+47.2")]  # the same in both seeds
    assert of_gqa == ["GQA", "HiMix-HMGen (Share All)", "+52.9", "-5.7", "+47.2", *ours_of_gqa]
    assert "SEED-Img" in split["metric"].tolist()
    for table in by_task.values():
        of_paper, of_ours = (table[table["of"] == source].drop(columns="of") for source in ("paper", "ours"))
        assert of_paper.values.tolist() == of_ours.values.tolist()  # the means are the paper's own figures
    himix = by_task["Table 1"].set_index(["method", "of"]).loc["HiMix", "ours"]
    assert himix["SEED-Img"] == "40.88 (-11.2 %)" and himix["POPE-R"] == "79.49 (+6.3 %)"
    skipped = by_task["Table 2"].set_index(["method", "of"]).loc["HMGen, 3 shallow layers", "paper"]
    assert skipped["MJHQ-FID"] == "12.16 (+30.3 %)"  # less is better


def test_there_is_no_change_against_a_figure_of_0(ours):
    for row in ours.rows:
        if row.method == "dense" and "GQA" in row.metrics:
            row.metrics["GQA"] = 0.0
    table = dict(beside_paper.tables(ours))["Table 3: trained on both"].set_index(["method", "of"])
    assert table.loc["HiMix-HMGen (Share All)", "ours"]["GQA"] == "33.00"


def test_a_table_needs_one_of_the_papers_reduced_methods(ours):
    ours.rows = [row for row in ours.rows if row.method in ("dense", "HiMix")]
    ((title, table),) = beside_paper.tables(ours)
    assert title.startswith("Table 1")
    ours.rows = [row for row in ours.rows if row.method == "dense"]
    assert beside_paper.tables(ours) == []
