"""The ways in agree: pyproject.toml, constraints.txt, environment.yml, the Makefile, and the version."""

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import influence_nb

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
DEFAULT = PROJECT["dependencies"] + EXTRAS["lab"] + EXTRAS["test"]  # what `make setup` installs
CONDA_TO_PIP = {"pytorch": "torch", "matplotlib-base": "matplotlib"}
CONDA_ONLY = {"python", "pip", "torchvision"}


def ranges(lines):
    """{name: version range} of requirement lines."""
    return {r.name.lower(): r.specifier for r in map(Requirement, lines)}


def environment():
    lines = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    conda = [line for line in lines if isinstance(line, str)]
    (pip,) = [line["pip"] for line in lines if isinstance(line, dict)]
    return conda, pip


def make(*arguments):
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # we may run under make
    command = ["make", "--no-print-directory", *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


def test_conda_environment_equals_pyproject():
    conda, pip = environment()
    found = {CONDA_TO_PIP.get(name, name): spec for name, spec in ranges(conda).items() if name not in CONDA_ONLY}
    assert pip[-1] == "-e .", "the package itself comes last, when all that it needs is there"
    assert found | ranges(pip[:-1]) == ranges(DEFAULT)
    assert not set(found) & set(ranges(pip[:-1])), "a package comes from one place only"
    assert ranges(conda)["python"] == PROJECT["requires-python"]


def test_constraints_pin_every_direct_dependency_inside_its_range():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    pins = ranges(lines)
    assert set(pins) == set(ranges(DEFAULT))
    for name, allowed in ranges(DEFAULT).items():
        (pin,) = pins[name]
        assert pin.operator == "==" and pin.version in allowed, f"{name}: {pin} is not in {allowed}"


def test_core_and_extras_are_what_the_design_names():
    core = {"torch", "numpy", "scipy", "scikit-learn", "matplotlib", "umap-learn", "ipywidgets", "anywidget", "tqdm"}
    assert set(ranges(PROJECT["dependencies"])) == core
    assert set(EXTRAS) == {"lab", "test", "text", "distributed"}
    for name, lines in EXTRAS.items():
        assert not core & set(ranges(lines)), f"[{name}] repeats a core dependency"


def test_version_is_one():
    changes = re.findall(r"^## (\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert changes[0] == PROJECT["version"] == influence_nb.__version__


def test_help_lists_every_target():
    listed = set(re.findall(r"^  make (\w+)", make("help").stdout, re.M))
    (phony,) = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)
    assert listed == set(phony.split()) >= {"setup", "lab", "test", "notebooks", "bench", "lint"}


@pytest.mark.parametrize("target", ["lab", "test", "notebooks", "bench", "lint"])
def test_every_target_sets_up_first_and_only_once(target, tmp_path):
    fresh, ready = tmp_path / "fresh", tmp_path / "ready"
    ready.mkdir()
    (ready / "ready").touch()
    assert "pip install" in make("-n", target, f"VENV={fresh}").stdout
    assert "pip install" not in make("-n", target, f"VENV={ready}").stdout


def test_an_old_python_is_named_and_refused(tmp_path):
    old = tmp_path / "python-old"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.9.2" || exit 1\n')
    old.chmod(0o755)
    done = make("setup", f"PYTHON={old}", f"VENV={tmp_path / 'fresh'}")
    assert done.returncode != 0
    assert "Python 3.11 or newer is needed" in done.stderr and "Python 3.9.2" in done.stderr
    assert not (tmp_path / "fresh").exists()


def test_the_lab_opens_the_first_notebook_and_takes_flags():
    lab = make("-n", "lab", "LAB_FLAGS=--no-browser").stdout
    assert re.search(r"jupyter lab .*-dir=notebooks .*/lab/tree/00_start_here\.ipynb --no-browser$", lab, re.M)
    assert ("--allow-root" in lab) == (os.getuid() == 0)
