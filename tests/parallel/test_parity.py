"""The same global batch gives the same loss and gradients under every parallel layout and every plan."""

import json
import subprocess
import sys

import pytest

from support.programs import ROOT


@pytest.mark.parametrize(
    "layouts, plans, settings",
    [
        ("tp2-sp,pp2-vp2,tp1-dp2,tp2-pp4-vp2-sp", "rank 4 per task", []),
        (
            "tp2-pp2-sp,pp2-vp2-dp2",
            "dense,himix_hmgen_share_all_separate",
            ["model.tie_embeddings=true", "training.recompute=full", "model.max_image_tokens=64"],
        ),
    ],
    ids=["untied", "tied-recomputed"],
)
def test_layouts_agree_with_one_process(tmp_path, layouts, plans, settings):
    command = [sys.executable, "benchmarks/parity.py", "--layouts", layouts, "--plans", plans]
    command += ["--json", str(tmp_path / "parity.json"), *settings]
    subprocess.run(command, cwd=ROOT, check=True, timeout=900)
    results = json.loads((tmp_path / "parity.json").read_text())
    assert set(results) == {"tp1", *layouts.split(",")}
    for layout, of_plan in results.items():
        assert set(of_plan) == set(plans.split(","))
        for plan, errors in of_plan.items():
            assert errors and all(error < 1e-5 for error in errors.values()), (layout, plan, errors)
