"""The page about a run: self-contained, escaped, complete without data, vocabulary or evaluations."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from megatron_ext.errors import UserError
from megatron_ext.report.chart import MAX_POINTS, Series, line_chart, number, smooth, thin
from megatron_ext.report.write import write_report
from support.run_folder import write_run

SPIKE = 1e6


@pytest.fixture
def run(tmp_path) -> Path:
    """A run's folder whose data sets, vocabulary and environment are gone."""
    sources = [{"path": "gone/<b>&|", "task": task} for task in ("understanding", "generation")]
    return write_run(tmp_path / "a <run>", f"data.train={json.dumps(sources)}", "data.vocabulary=gone")


def test_page_is_one_escaped_file(run, tmp_path):
    paths = write_report(run, tmp_path / "out" / "page.html")
    page, text = Path(paths["html"]).read_text(), Path(paths["markdown"]).read_text()
    assert "/a &lt;run&gt;</h1>" in page and "gone/&lt;b&gt;&amp;|" in page and "<b>&" not in page
    assert not re.search(r"<script|<link|@import|src=\"(?!data:)", page)
    assert "prefers-color-scheme: dark" in page and "#0000" not in page
    assert "iteration 15\ntraining, smoothed: 0.3333\nvalidation: 0.3667" in page
    assert "layer 2, generation, image\n" in page
    assert "`gone/<b>&|` 50 % (no longer there)" in text and "/a <run>\n" in text
    assert "| generation | 5.000 | 0.333 | 0.367 | 1.44 | – |" in text
    assert "- **0:08** of training" in text, "15 steps of half a second"
    for name in re.findall(r"\]\(page_files/(.*?)\)", text):
        assert (tmp_path / "out" / "page_files" / name).read_text().startswith("<svg"), name


def test_interleaved_documents_train_understanding_and_generation(tmp_path):
    run = write_run(tmp_path / "run", 'data.train=[{"path": "gone", "task": "interleaved"}]', "data.vocabulary=gone")
    text = Path(write_report(run, tmp_path / "page.html")["markdown"]).read_text()
    assert (
        "- **interleaved** 100 %" in text and "| understanding | 5.000 |" in text and "| generation | 5.000 |" in text
    )


def test_a_folder_without_a_run_and_a_file_that_is_no_page_are_refused(run, tmp_path):
    with pytest.raises(UserError, match="ends in .html"):
        write_report(run, tmp_path / "page.pdf")
    with pytest.raises(UserError, match="no config.yaml"):
        write_report(tmp_path, tmp_path / "page.html")
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="nothing logged yet"):
        write_report(run, tmp_path / "page.html")


def test_long_curves_become_means():
    points = np.column_stack([np.arange(1000.0), np.ones(1000)])
    assert thin(points[:5]).tolist() == points[:5].tolist()
    assert len(thin(points)) == MAX_POINTS and thin(points)[-1].tolist() == [999, 1]
    points[500, 1] = SPIKE
    smoothed = smooth(points)
    assert smoothed[0, 1] == smoothed[-1, 1] == 1 and smoothed[500, 1] == pytest.approx((SPIKE + 60) / 61)
    assert len(smooth(np.empty((0, 2)))) == 0


def test_spikes_of_faint_lines_do_not_flatten_a_chart():
    points = np.column_stack([np.arange(100.0), np.linspace(1, 2, 100)])
    points[50, 1] = SPIKE
    ticks = re.findall(r">([\d.]+)</text>", line_chart("x", "y", [Series("a", "ink", points, "faint")]).plot)
    assert max(map(float, ticks)) <= 100


@pytest.mark.parametrize("points", [0, 2])
def test_a_chart_needs_three_points(points):
    series = Series("a", "ink", np.ones((points, 2)))
    assert line_chart("x", "y", [series]) is None
    assert "b: 1" in line_chart("x", "y", [series, Series("b", "ink", np.ones((3, 2)))]).bands[0][3]


@pytest.mark.parametrize(
    "value, text", [(0, "0"), (3717.2, "3717"), (81920, "81.9k"), (5.32e6, "5.32M"), (3e-4, "3.0e-4")]
)
def test_numbers_are_short(value, text):
    assert number(value) == text


def test_a_model_of_several_codes_an_image_token_shows_their_losses(tmp_path):
    codes = "model.image_codes={depth: 2, codebook_size: 64, width: 8, head: {num_layers: 2, hidden_size: 32}}"
    run = write_run(tmp_path / "run", codes, 'data.train=[{"path": "gone", "task": "generation"}]')
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    records = [record | {"loss_depth_1": 2.0, "loss_depth_2": 4.0} for record in records]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    text = Path(write_report(run, tmp_path / "page.html")["markdown"]).read_text()
    assert (
        "| image token | 2 codes of 64 |" in text and "| depth head: layers, hidden size, heads | 2, 32, 16 |" in text
    )
    assert "| depth 2 | 4.000 | 4.000 |" in text and "| image token | 6.000 | 6.000 |" in text
