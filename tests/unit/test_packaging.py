"""An installed package has every file of the repository's."""

import runpy
from pathlib import Path

import setuptools

ROOT = Path(__file__).parents[2]


def test_every_file_of_the_package_is_installed(monkeypatch):
    given = {}
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(setuptools, "setup", given.update)
    runpy.run_path("setup.py")
    patterns = {package: ["*.py", *given["package_data"].get(package, [])] for package in given["packages"]}
    installed = {
        file for package, names in patterns.items() for name in names for file in Path(*package.split(".")).glob(name)
    }
    there = {file for file in Path("megatron_ext").rglob("*") if file.is_file() and "__pycache__" not in file.parts}
    assert there - installed == set()
