"""A broken installation of Transformer Engine is one line of error, before Megatron-Core is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.programs import ROOT

UNDEFINED = "libtransformer_engine.so: undefined symbol: cublasLtGroupedMatrixLayoutInit_internal"


def install(folder: Path, version: str, body: str, cublas: str | None = None) -> None:
    """A package ``transformer_engine`` whose import runs ``body``, and the metadata that pip would leave."""
    package = folder / "transformer_engine" / "pytorch"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").write_text(f"{body}\n")
    (package / "__init__.py").write_text("")
    for name, number in (("transformer_engine", version), ("nvidia_cublas", cublas)):
        if number:
            (folder / f"{name}-{number}.dist-info").mkdir()
            (folder / f"{name}-{number}.dist-info" / "METADATA").write_text(f"Name: {name}\nVersion: {number}\n")


def python(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=400)


OLD_CUBLAS = ["2.13.0", UNDEFINED, "13.1.1.3", "nvidia-cublas>=13.2"]
NO_CORE = ["2.12.0", "RuntimeError: Found empty meta package"]
NO_TORCH_PART = ["2.12.0", "No module named 'transformer_engine_torch'"]


@pytest.mark.parametrize(
    "version, body, cublas, parts",
    [
        ("2.13.0", f"raise OSError('{UNDEFINED}')", "13.1.1.3", OLD_CUBLAS),
        ("2.12.0", "raise RuntimeError('Found empty\\n meta package')", None, NO_CORE),
        ("2.12.0", "import transformer_engine_torch", None, NO_TORCH_PART),
        ("2.10.0", "raise SystemExit('was imported')", None, ["2.10.0", "2.11 is the oldest"]),
    ],
)
def test_a_broken_installation_is_one_line_with_a_remedy(tmp_path, version, body, cublas, parts):
    install(tmp_path, version, body, cublas)
    process = python(tmp_path, str(ROOT / "pretrain_unified.py"), "--config", str(ROOT / "examples/configs/tiny.yaml"))
    assert process.returncode == 2  # starting again cannot help
    assert process.stderr.count("\n") == 1, process.stderr
    for part in [*parts, "transformer-engine[pytorch]==2.12.*", "pip uninstall transformer-engine{"]:
        assert part in process.stderr


def test_without_an_import_of_megatron_it_is_not_imported(tmp_path):
    install(tmp_path, "2.13.0", "raise OSError('was imported')")
    process = python(tmp_path, str(ROOT / "pretrain_unified.py"), "--help")
    assert process.returncode == 0, process.stderr


def test_a_second_import_of_megatron_fails_the_same_way(tmp_path):
    install(tmp_path, "2.13.0", "raise OSError('broken')")
    attempt = "try:\n    import megatron.core\nexcept Exception as error:\n    print(type(error).__name__)\n"
    process = python(tmp_path, "-c", "import megatron_ext\n" + 2 * attempt)
    assert process.stdout.split() == ["UserError", "UserError"], process.stderr


def test_an_installation_can_be_ignored(tmp_path, monkeypatch):
    install(tmp_path, "2.13.0", "raise OSError('broken')")
    monkeypatch.setenv("WITHOUT_TRANSFORMER_ENGINE", "1")
    process = python(
        tmp_path, "-c", "import megatron_ext, megatron.core.transformer.transformer_layer; print('imported')"
    )
    assert process.stdout.strip() == "imported", process.stderr
