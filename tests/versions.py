"""The suite with the oldest, the pinned and the newest versions of what it needs, each in an environment of its own.

    python tests/versions.py                                        # the whole suite in each, one after the other
    python tests/versions.py oldest newest tests/test_model.py      # some environments, some tests

Needs uv. On Linux PyTorch for CUDA takes some 5 GB in each; they are kept in --folder for the next time. "oldest" takes
python3.10 where the machine has it. Prints a table for LOG.md, and ends with 1 if anything fails.
"""
import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from shutil import which
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
OLDEST_PYTHON = "3.10"  # as requires-python in pyproject.toml has it
NAMES = ("oldest", "pinned", "newest")
SHOWN = ("torch", "transformers", "numpy", "datasets", "tokenizers")  # what most often changes its mind
FIND = ("import platform; from importlib.metadata import version; "
        f"print(platform.python_version(), *map(version, {SHOWN}))")


def call(*command):
    """Run a command of the set-up; what it prints is seen where it fails, and ends all."""
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


def python_for(name):
    """The interpreter for an environment: the oldest supported one for "oldest", where there is one; else this one."""
    oldest = which(f"python{OLDEST_PYTHON}")
    runs = oldest and not subprocess.run([oldest, "-c", ""], capture_output=True).returncode  # a shim of pyenv may not
    return oldest if name == "oldest" and runs else sys.executable


def environment(name, folder):
    """The Python of an environment that has exactly the versions of that name."""
    place = folder / name
    python = place / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        call("uv", "venv", "--seed", "--python", python_for(name), place)
    if name == "pinned":  # by the command that README has
        call(python, "-m", "pip", "install", "-r", "requirements-dev.txt")
        return python
    resolution = "lowest-direct" if name == "oldest" else "highest"
    versions = call("uv", "pip", "compile", "--no-config", "--python", python, "--resolution", resolution,
                    "--extra", "test", "pyproject.toml")  # --no-config: the pin of torch is for the lock alone
    (folder / f"{name}.txt").write_text(versions)
    call("uv", "pip", "sync", "--python", python, folder / f"{name}.txt")
    return python


def run(python, tests):
    """Run these tests; their counts by outcome, as JUnit's file has them, the seconds, and pytest's exit code."""
    with tempfile.TemporaryDirectory() as place:
        report, start = Path(place) / "report.xml", time.perf_counter()
        code = subprocess.run([python, "-m", "pytest", "-q", f"--junitxml={report}", *tests], cwd=ROOT).returncode
        suite = ElementTree.parse(report).getroot().find("testsuite") if report.exists() else {}
    total, failed, errors, skipped = (int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped"))
    counts = total - failed - errors - skipped, failed + errors, skipped
    return counts, time.perf_counter() - start, code


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", help=f"environments ({', '.join(NAMES)}) and tests; neither: all of them")
    parser.add_argument("--folder", type=Path, default=Path.home() / ".cache/everyllama/versions",
                        help="where environments are kept")
    args, options = parser.parse_known_args()  # other options are pytest's
    if not which("uv"):
        sys.exit("tests/versions.py needs uv: pip install uv")
    folder = args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    tests = [word for word in args.what if word not in NAMES] + options
    rows, worst = [], 0
    for name in [word for word in args.what if word in NAMES] or NAMES:
        python = environment(name, folder)
        have = call(python, "-c", FIND).split()
        print(f"== {name}: Python {have[0]}, " + ", ".join(map(" ".join, zip(SHOWN, have[1:]))), flush=True)
        counts, seconds, code = run(python, tests)
        rows.append((name, *have, *counts, f"{seconds:.0f}"))
        worst = worst or code != 0
    titles = ("environment", "Python", *SHOWN, "passed", "failed", "skipped", "seconds")
    for row in (titles, ["---"] * len(titles), *rows):
        print("| " + " | ".join(map(str, row)) + " |")
    print(f"\n{platform.machine()}, {os.cpu_count()} cores")
    sys.exit(int(worst))


if __name__ == "__main__":
    main()
