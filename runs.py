"""What a run keeps on disk: checkpoints that appear whole, log.jsonl, loss.png, run.json and the lock on it.

    out/<run>/            the newest checkpoint's files, as links; run.json, log.jsonl, loss.png
    out/<run>/best/       links to the weights with the lowest validation loss
    out/<run>/checkpoints/step_00000250/ ...    the newest few: weights, tokenizer, train_state.json, optimizer/
"""
import contextlib
import gc
import hashlib
import json
import math
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
import warnings
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

import adapter
import checkpoint
import config
from common import RANK, WORLD, all_reduce_sum, first_line, gather, print0, together
from prepare import shards


# -- checkpoints -------------------------------------------------------------------------------------------------

def checkpoints(out):
    """The complete checkpoints of a run directory, oldest first. Each appears by one rename, whole."""
    return sorted((Path(out) / "checkpoints").glob("step_" + 8 * "[0-9]"))


def latest(out):
    """The newest complete checkpoint of a run directory, or None."""
    return (checkpoints(out) or [None])[-1]


def common_latest(out):
    """The newest checkpoint as the first process sees it. Raises `Mistake` where there is none, or another process
    does not see it: they would go on from different steps."""
    newest = latest(out)
    step, = all_reduce_sum(int(newest.name.removeprefix("step_")) if newest and RANK == 0 else 0)
    path = Path(out) / "checkpoints" / f"step_{int(step):08d}"
    missing, = all_reduce_sum(int(not path.is_dir()))
    if missing == WORLD:
        run = next((p for p in Path(out).absolute().parents if (p / "checkpoints").is_dir()), None)
        raise config.Mistake(f"nothing to resume in {out}: it has no checkpoint" + (f"; {run} has some" if run else ""))
    if missing:
        raise config.Mistake(f"{missing:.0f} of {WORLD} processes do not see {path}: all need the same disk to resume")
    return path


def link_checkpoint(source, directory, skip=()):
    """Link (or copy) the files of a checkpoint into directory, each replacing the old one whole."""
    directory.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.name in skip or path.is_dir():
            continue
        tmp = directory / (path.name + ".tmp")
        tmp.unlink(missing_ok=True)
        try:
            try:
                os.link(path, tmp)
            except OSError:  # a file system without hard links
                shutil.copyfile(path, tmp)
            os.replace(tmp, directory / path.name)
        finally:
            tmp.unlink(missing_ok=True)
    checkpoint.remove_weights(directory, except_for=os.listdir(source))


def save_checkpoint(out, write, state, tensors, shared, keep):
    """Make a checkpoint of what write(directory) writes, of `state` (for JSON) and of `tensors` ({name: tensor}, the
    optimizers'); link it as the run's own files, and in best/ if it has improved.

    All processes call it; of a shared model each writes its part, else the first one writes. Raises `Mistake`, with the
    earlier checkpoints as they were, when the disk is full."""
    final, tmp = out / "checkpoints" / f"step_{state['step']:08d}", out / "checkpoints" / ".writing"
    start = time.perf_counter()
    try:
        with together():
            if RANK == 0:
                shutil.rmtree(tmp, ignore_errors=True)
                tmp.mkdir(parents=True)
        with together():
            if shared or RANK == 0:
                write(tmp)
                (tmp / f"rank{RANK}").touch()  # for the first process to find
        with together():
            if shared:
                checkpoint.save_parts(tensors, tmp / "optimizer")
            elif RANK == 0:
                checkpoint.write(tmp / "optimizer", None, tensors)
        with together():
            if RANK == 0:
                for rank in range(WORLD if shared else 1):
                    if not os.path.exists(tmp / f"rank{rank}"):
                        raise OSError(f"process {rank} writes to another disk, and a model that is shared needs one")
                    (tmp / f"rank{rank}").unlink()
                best = state["best"] if math.isfinite(state["best"]) else None
                shards.write_text(tmp / "train_state.json", json.dumps(state | {"best": best}, indent=1) + "\n")
                os.replace(tmp, final)
                link_checkpoint(final, out)
                if state["improved"]:
                    link_checkpoint(final, out / "best", skip=("train_state.json",))
    except (OSError, RuntimeError) as e:  # torch has an error of its own for a full disk
        if RANK > 0:
            sys.exit(2)  # one line is enough
        shutil.rmtree(tmp, ignore_errors=True)
        before = latest(out)
        rest = f"the checkpoint {before.name} is intact" if before else "there is no checkpoint yet"
        raise config.Mistake(f"cannot save to {out}: {first_line(e)}; {rest}") from e
    print0(f"saved      {final.name} in {time.perf_counter() - start:.1f} s")
    for old in checkpoints(out)[:-keep] if RANK == 0 else ():
        shutil.rmtree(old, ignore_errors=True)


NEW = {"step": 0, "sequences": 0, "tokens": 0, "seconds": 0.0, "best": math.inf}  # the loop of a run that begins
STATE = *NEW, "improved", "train_fingerprint", "val_fingerprint", "scaler"


def read_state(path):
    """train_state.json of a checkpoint directory."""
    file = path / "train_state.json"
    advice = f"remove {path} to go on from the checkpoint before, or begin anew from its weights with --init_from"
    with config.mistakes(OSError, ValueError, KeyError, TypeError, prefix=f"{file} cannot be read ({advice}): "):
        found = {"train_fingerprint": None} | json.loads(file.read_text(encoding="utf-8"))  # older ones are without
        state = {key: found[key] for key in STATE}
        state["best"] = math.inf if state["best"] is None else state["best"]  # JSON has no infinity
        return state


def read_log(path):
    """The objects of a log.jsonl; a line that a crash cut short ends it."""
    lines = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:
                break
    return lines


DOTS = dict(marker="o", markersize=3)
STYLES = {"training": dict(color="#9db4d0", linewidth=1), "validation": dict(color="#c0392b", linewidth=2) | DOTS}


def plot(curves, path, title, floor=None):
    """Draw {name: [(step, loss), ...]}. floor: nats per token that no model beats, or None."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(8, 4.5), dpi=110, layout="constrained")
    axes, values = figure.add_subplot(), []
    for name, points in curves.items():
        points = np.array(points).reshape(-1, 2)  # (n, 2)
        if len(points):
            axes.plot(*points.T, label=f"{name}, {points[-1, 1]:.3f} at the end", **STYLES.get(name, DOTS))
            values += points[:, 1].min(), points[:, 1].max()
    if floor is not None:
        axes.axhline(floor, color="#555555", linestyle="--", linewidth=1, label=f"floor, {floor:.3f}")
    if values and max(values) > 2 * min(values) > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
    axes.set(xlabel="optimizer step", ylabel="loss, nats per token")
    axes.set_title(title.encode(errors="replace").decode(), parse_math=False)  # any bytes can name a file
    axes.grid(alpha=0.3)
    axes.legend()
    write_figure(figure, path)


def write_figure(figure, path):
    """Write a matplotlib figure as a PNG, whole or not at all, and free it."""
    with config.atomic_write(path) as tmp, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a box stands for what no font has
        figure.savefig(tmp, format="png")
    figure.clear()
    gc.collect()  # figures are full of cycles, and would pile up for a hundred evaluations


class Log:
    """log.jsonl and loss.png of a run, and TensorBoard's files where they are asked for."""

    def __init__(self, out, step, tensorboard=False):
        """step: after which a run goes on, 0 for a new one."""
        self.out, self.path, self.board, self.make_board = out, out / "log.jsonl", None, None
        self.earlier = [entry for entry in read_log(self.path) if entry["step"] <= step]
        if tensorboard:  # an extra; what is missing is said before the run
            with config.mistakes(ImportError, prefix="--tensorboard: pip install tensorboard: "):
                from torch.utils.tensorboard import SummaryWriter
            self.make_board = SummaryWriter

    def start(self):
        """Write anew what was logged up to the step that is resumed."""
        shards.write_text(self.path, "".join(json.dumps(entry) + "\n" for entry in self.earlier))
        if self.make_board:
            after = self.earlier[-1]["step"] + 1 if self.earlier else 0
            self.board = self.make_board(self.out / "tensorboard", purge_step=after)

    def write(self, entry):
        """Append an entry; of a number that is none, JSON's null."""
        if RANK > 0:
            return
        entry = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()}
        with open(self.path, "a", encoding="utf-8") as f:
            f.write(json.dumps(entry) + "\n")
        if self.board:
            for name, value in entry.items():
                if isinstance(value, (int, float)) and name != "step":
                    self.board.add_scalar(name, value, entry["step"])
            self.board.flush()

    def plot(self, floor):
        """Draw what was logged as loss.png. floor: as for `plot`."""
        curves = {}
        for name, key in ("training", "train_loss"), ("validation", "val_loss"):
            curves[name] = [(entry["step"], entry[key]) for entry in read_log(self.path) if entry.get(key) is not None]
        plot(curves, self.out / "loss.png", self.out.resolve().name, floor)


def digests_of(folder):
    """The hashes of the training and of the validation records in a data set's jsonl files."""
    return [hashlib.sha256((folder / f"{split}.jsonl").read_bytes()).hexdigest() for split in ("train", "val")]


def folder_of(cfg):
    """The data set's folder: by its name under data/, or cfg.dataset as a path."""
    named, path = config.ROOT / "data" / cfg.dataset, Path(cfg.dataset)
    is_name = path.name == cfg.dataset and named.is_dir()  # downloads often lie in a folder of the same name
    return path if path.is_dir() and not is_name else named


def facts_of_run(cfg, model_config, agents):
    """What run.json records: every setting, versions, hardware, code."""
    try:
        describe = ["git", "-C", config.ROOT, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        commit = subprocess.run(describe, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        commit = ""
    settings = asdict(cfg)
    if folder_of(cfg) == Path(cfg.dataset):
        settings["dataset"] = os.path.abspath(cfg.dataset)  # found again from any folder
    for key in "reference", "vit_weights":
        if settings.get(key) and os.path.exists(settings[key]):
            settings[key] = os.path.abspath(settings[key])
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"command": sys.argv, "settings": settings, "model": asdict(model_config), "processes": WORLD,
            "agents": agents, "git_commit": commit,
            "python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
            "machine": platform.machine(), "processor": platform.processor(), "cores": os.cpu_count(), "gpu": gpu,
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}


def starts_from(cfg):
    """The directories whose weights a new run needs: those of its start and of its reference model, and their bases."""
    found = [Path(name) for name in (cfg.init_from, getattr(cfg, "reference", None)) if name and os.path.isdir(name)]
    with config.mistakes(ValueError, OSError):
        return found + [Path(adapter.base_of(directory)) for directory in found if adapter.is_adapter(directory)]


def check_writable(cfg, out):
    """Raise `Mistake` if a run directory cannot be made, without making it, or is needed for something else."""
    there = next(p for p in (out, *out.absolute().parents) if os.path.exists(p))
    if not os.path.isdir(there) or not os.access(there, os.W_OK | os.X_OK):
        raise config.Mistake(f"cannot write the run directory {out}: {there} is not a directory that can be written to")
    if cfg.init_from != "resume" and any(out.resolve() in (path / "_").resolve().parents for path in starts_from(cfg)):
        raise config.Mistake(f"{out} is where this run starts from: give another --out_dir")
    if os.path.isdir(out) and latest(out) and cfg.init_from != "resume" and out.resolve() in (Path.cwd() / "_").parents:
        raise config.Mistake(f"{out} holds an earlier run, and you are in it, so that it cannot be moved aside: give "
                             "another --out_dir")
    if os.path.isdir(out) and os.listdir(out) and not os.path.exists(out / "run.json") and cfg.init_from != "resume":
        raise config.Mistake(f"{out} holds something else than a run: give another --out_dir")
    held(out).close()


def held(out):
    """run.json of a run, if it has one, locked as long as it is open. Raises `Mistake` if another process holds it."""
    path = out / "run.json"
    if not os.path.exists(path):
        return open(os.devnull)
    file = open(path)
    try:
        import fcntl  # Windows has none
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise config.Mistake(f"another process is writing the run {out}: give another --out_dir") from None
    except (ImportError, OSError):
        pass  # or a disk that knows no locks
    return file


def need_common(out):
    """Refuse, once there is a run.json, a process that does not see it: it could not write its part of a model."""
    all_reduce_sum(0)  # until the first process has written it
    with together():
        if not (out / "run.json").is_file():
            raise OSError(f"process {RANK} does not see it, and a model that is split needs one disk for all")


def start_directory(out, facts, log):
    """Make the run directory, an earlier run moved aside; write the log so far and run.json, returned locked."""
    held(out).close()  # by a process that began at the same time, when neither had a run.json yet
    real = Path(os.path.realpath(out))  # a link to another disk stays one
    with config.mistakes(OSError, prefix="cannot write the run directory: "):
        if facts["settings"]["init_from"] != "resume" and latest(out):
            aside = next(p for i in range(1, 10**6) if not (p := real.with_name(f"{real.name}.{i}")).exists())
            real.rename(aside)
            print0(f"{out} held an earlier run, which is now {aside}")
        new = not out.exists()
        try:
            real.mkdir(parents=True, exist_ok=True)
            shards.write_text(out / "run.json", json.dumps(facts, indent=1) + "\n")
            log.start()
        except OSError:
            if new:
                shutil.rmtree(out, ignore_errors=True)
            raise
    return held(out)


def command_to_resume(out):
    """What to type to go on with a run, on each of its machines."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", WORLD))
    launcher = ["torchrun", f"--nproc_per_node={local}"] if WORLD > 1 else ["python"]
    if WORLD > local:  # they meet at the first machine, however they found each other before
        launcher[1:1] = [f"--nnodes={WORLD // local}", "--rdzv_backend=c10d",
                         f"--rdzv_endpoint={os.environ['MASTER_ADDR']}"]
    return shlex.join([*launcher, sys.argv[0], "--init_from=resume", f"--out_dir={config.as_seen(out)}"])


def torchrun_agents():
    """A name for the torchrun of each process, [] without one. A torchrun outlives processes that it starts again."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return []
    began = ""  # in a container a new torchrun often has the number of the one before
    with contextlib.suppress(OSError, IndexError):
        began = Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")[2].split()[19]
    return gather(f"{platform.node()} {os.getppid()} {began}")
