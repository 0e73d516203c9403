"""tools/preprocess_vq.py as a user runs it: killed, sharded by the Slurm script, and given wrong things."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.images import caption_tar, encoded
from support.programs import ROOT, run_program, start_program, wait_until
from support.tiny_vq import make_vq
from support.vocabularies import make_vocabulary

TOOL = [sys.executable, "tools/preprocess_vq.py"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """A folder with vq/, vocabulary/, a.tar and b.tar."""
    folder = tmp_path_factory.mktemp("pictures")
    make_vq(folder / "vq")
    make_vocabulary(folder / "vocabulary")
    caption_tar(folder / "a.tar", 40)
    caption_tar(folder / "b.tar", 40, first=40)
    return folder


def arguments(pictures: Path, out: Path) -> list:
    models = ["--vq", pictures / "vq", "--vocabulary", pictures / "vocabulary"]
    return [pictures / "a.tar", pictures / "b.tar", *models, "--out", out, "--part-samples", 2, "--batch-size", 2]


@pytest.fixture(scope="module")
def whole(pictures, tmp_path_factory) -> dict[str, bytes]:
    """The files of an uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "set"
    run_program([*TOOL, *arguments(pictures, out)])
    return contents(out.parent)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


def test_a_killed_run_goes_on_and_gives_the_same_bytes(pictures, whole, tmp_path):
    command = [str(part) for part in [*TOOL, *arguments(pictures, tmp_path / "set")]]
    killed = start_program(command)
    wait_until(lambda: len(list(tmp_path.glob("set.parts/*.part.json"))) >= 5, killed, seconds=200)
    killed.kill()
    killed.wait()
    assert not (tmp_path / "set.json").exists(), "the run was over before it could be killed"
    numbers = tmp_path / "out" / "numbers.json"
    completed = run_program([*command, "--json", numbers])
    assert "set: 80 documents, 80 images" in completed.stdout
    assert 0 < json.loads(numbers.read_text())["images_encoded"] <= 70
    assert contents(tmp_path) == whole
    again = run_program(command)
    assert "set: already there, 80 documents" in again.stdout


def test_the_slurm_script_runs_shards_and_joins_them(pictures, whole, tmp_path):
    script = ["bash", str(ROOT / "examples" / "preprocess_slurm_array.sh")]
    files = [str(part) for part in arguments(pictures, tmp_path / "set")]
    at = files.index("--vq")
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHON": sys.executable,
        "OUT": str(tmp_path / "set"),
        "VQ": str(pictures / "vq"),
        "VOCABULARY": str(pictures / "vocabulary"),
        "SLURM_ARRAY_TASK_COUNT": "2",
        "SLURM_ARRAY_TASK_MIN": "1",
    }
    for task in ("2", "1"):
        command = [*script, *files[:at], "--part-samples", "2", "--batch-size", "2"]
        subprocess.run(command, env={**environment, "SLURM_ARRAY_TASK_ID": task}, check=True, timeout=300)
        assert contents(tmp_path) == {}
    subprocess.run(script, env={**environment, "MERGE": "1"}, check=True, timeout=300)
    assert contents(tmp_path) == whole


def test_plain_text_needs_no_vq_and_is_verified(pictures, tmp_path):
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": f"red circle {i}"}) + "\n" for i in range(5)))
    vocabulary = ["--vocabulary", pictures / "vocabulary"]
    run_program([*TOOL, tmp_path / "text.jsonl", *vocabulary, "--out", tmp_path / "set"])
    completed = run_program([*TOOL, "--verify", tmp_path / "set", *vocabulary])
    assert "set: complete and undamaged; 5 documents, 0 images" in completed.stdout
    (tmp_path / "set.bin").write_bytes((tmp_path / "set.bin").read_bytes()[:-1])
    completed = run_program([*TOOL, "--verify", tmp_path / "set"], check=False)
    assert completed.returncode == 1
    assert (
        completed.stdout.startswith(f"preprocess_vq.py: {tmp_path / 'set.bin'}: ") and completed.stdout.count("\n") == 1
    )


@pytest.mark.parametrize(
    "line, options, named",
    [
        ('{"image": "a.png", "caption": "a"}', ["--vq", "gone"], "gone/config.json: not found; "),
        ('{"image": "a.png", "caption": "a"}', [], "a.png: the input has images; give the VQ tokenizer with --vq"),
        ('{"text": "a"', [], "lines.jsonl:1: Expecting"),
    ],
)
def test_a_mistake_is_one_line(pictures, tmp_path, line, options, named):
    (tmp_path / "a.png").write_bytes(encoded(0))
    (tmp_path / "lines.jsonl").write_text(line + "\n")
    common = ["--vocabulary", pictures / "vocabulary", "--out", tmp_path / "set"]
    completed = run_program([*TOOL, tmp_path / "lines.jsonl", *common, *options], check=False)
    assert completed.returncode == 1
    assert named in completed.stdout and completed.stdout.count("\n") == 1


@pytest.mark.parametrize("wrong", [[], ["a.tar", "--out", "x"], ["--shard", "3/2"], ["--merge", "a.tar", "--out", "x"]])
def test_wrong_usage_exits_with_2(wrong):
    completed = run_program([*TOOL, *wrong], check=False)
    assert completed.returncode == 2 and "usage:" in completed.stdout
