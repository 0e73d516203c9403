"""The vocabulary, data sets and run that an earlier version wrote (``tests/fixtures``) still load: the run goes on from
iteration 3 as it did then."""

import json
import tarfile
from pathlib import Path

import pytest

from megatron_ext.data.format import Dataset
from megatron_ext.vocabulary import Vocabulary
from support.forked_programs import run_forked

ARCHIVE = Path(__file__).parents[1] / "fixtures" / "earlier_version.tar.xz"


@pytest.fixture(scope="module")
def earlier(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("earlier")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder / "earlier_version"


def test_its_vocabulary_and_data_sets_have_the_fingerprints_of_then(earlier):
    assert Vocabulary(earlier / "vocabulary").fingerprint == "b0999e39d5730d96"
    for name in ("questions", "captions", "texts"):
        assert Dataset(earlier / "data" / name).metadata["vocabulary"] == "b0999e39d5730d96"


def test_its_run_goes_on_with_the_same_losses(earlier):
    metrics = earlier / "run" / "metrics.jsonl"
    then = {record["iteration"]: record for record in map(json.loads, metrics.read_text().splitlines())}
    paths = {"questions": "understanding", "captions": "generation"}
    sources = [{"path": str(earlier / "data" / name), "task": task} for name, task in paths.items()]
    sources.append({"path": str(earlier / "data" / "texts"), "task": "text", "weight": 0.5})
    overrides = (f"output={earlier / 'run'}", f"data.vocabulary={earlier / 'vocabulary'}")
    overrides += (f"data.train={json.dumps(sources)}",)
    text = run_forked(["pretrain_unified.py", "--config", earlier / "run.yaml", *overrides]).stdout
    assert "iter_0000003" in text
    now = {record["iteration"]: record for record in map(json.loads, metrics.read_text().splitlines())}
    assert list(now) == list(then) == [1, 2, 3, 4, 5, 6]
    for iteration in (4, 5, 6):
        for key in ("loss", "grad_norm", "flops", "consumed_flops", "consumed_tokens"):
            assert now[iteration][key] == pytest.approx(then[iteration][key], rel=2e-5), (iteration, key)
        assert now[iteration]["step_seconds"] != then[iteration]["step_seconds"]
