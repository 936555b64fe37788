"""The project's own files: exact versions within the stated ranges, and code that the oldest Python can read."""
import os
import subprocess
import sys

import pytest
from conftest import PATIENCE, ROOT
from packaging.requirements import Requirement

try:
    import tomllib
except ImportError:  # Python 3.10, where pytest brings this
    import tomli as tomllib

FILES = ("requirements.txt", "requirements-dev.txt", "requirements-cuda.txt")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]


def lines_of(file):
    return [line for line in (ROOT / file).read_text(encoding="utf-8").splitlines() if not line.startswith("#")]


def pins(file):
    """The requirements that a file lists: a package may have several, for different Pythons or platforms."""
    return [Requirement(line) for line in lines_of(file) if not line.startswith("-")]


def test_what_is_installed_has_every_module():
    """A module that pyproject.toml leaves out is missing where the project was installed with pip."""
    assert sorted(PYPROJECT["tool"]["setuptools"]["py-modules"]) == sorted(path.stem for path in ROOT.glob("*.py"))


@pytest.mark.parametrize("file", FILES)
def test_versions_are_exact_and_of_any_platform(file):
    """One ==, no build of one index (+cpu), no address, no option but CUDA's limits; nothing twice on a machine."""
    for pin in pins(file):
        (version,) = pin.specifier
        assert version.operator == "==" and not pin.url, pin
        assert "+" not in version.version and "*" not in version.version, pin
    options = [line for line in lines_of(file) if line.startswith("-")]
    assert options == ([] if file == "requirements-cuda.txt" else ["-c requirements-cuda.txt"])
    for python in "3.10", "3.11", "3.12", "3.13":
        for system in "linux", "darwin", "win32":
            here = {"python_full_version": python + ".1", "python_version": python, "sys_platform": system}
            names = [p.name for p in pins(file) if not p.marker or p.marker.evaluate(here)]
            assert len(names) == len(set(names))


def test_what_is_pinned_is_in_the_stated_ranges():
    """`.ci/lock` was run after the last change of pyproject.toml."""
    for file, ranges in ((FILES[0], PROJECT["dependencies"]),
                         (FILES[1], PROJECT["dependencies"] + PROJECT["optional-dependencies"]["test"])):
        for wanted in map(Requirement, ranges):
            found = [p for p in pins(file) if p.name == wanted.name]
            assert found, f"{wanted.name} is not in {file}"
            assert all(wanted.specifier.contains(next(iter(p.specifier)).version) for p in found), (file, wanted)


def test_scripts_and_tests_take_the_same_versions():
    every = {(p.name, str(p.specifier)) for p in pins(FILES[1])}
    assert {(p.name, str(p.specifier)) for p in pins(FILES[0])} <= every


def test_ruff_finds_nothing():
    """Neither a mistake nor syntax that is newer than requires-python."""
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format=concise", "."],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_is_missing_is_one_line(tmp_path):
    """However many tests want it, and whether they ask by the fixture or by name."""
    (tmp_path / "test_a.py").write_text("""
import pytest
from conftest import real_data
@pytest.mark.parametrize("i", range(3))
def test_by_name(i): real_data("text/some.txt")
def test_all(data): pass
def test_other(): pytest.importorskip("nowhere_to_be_found", reason="needs nowhere_to_be_found")
""")
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "conftest", f"--rootdir={tmp_path}", tmp_path],
                          cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE, env=os.environ | {
                              "PYTHONPATH": str(ROOT / "tests"), "EVERYLLAMA_DATA": str(tmp_path / "none")})
    assert [line for line in done.stdout.splitlines() if "skipped:" in line] == [
        f"4 tests skipped: no real data in {tmp_path / 'none'}; set EVERYLLAMA_DATA",
        "1 test skipped: needs nowhere_to_be_found"], done.stdout + done.stderr
