"""Train a Llama: from scratch, from where a run stopped, or from any Hugging Face checkpoint.

    python train.py config/tales.py                                       one process
    torchrun --nproc_per_node=8 train.py config/scout.py                  one process per GPU
    python train.py config/tales.py --learning_rate=1e-3 --n_layer=8      any key, also the model's
    python train.py --init_from=resume --out_dir=out/tales                go on where it stopped
    python train.py --eval_only --init_from=out/tales --dataset=tales     loss, perplexity, bits per byte
    python train.py --eval_only --init_from=out/tales --hellaswag=True    HellaSwag, after prepare/hellaswag.py

The run directory is a Hugging Face checkpoint (config.json, model.safetensors, the tokenizer's files) with
train_state.pt, run.json, log.jsonl and loss.png beside it; best/ has the weights of the lowest validation loss.
"""
import contextlib
import gc
import inspect
import itertools
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from array import array
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import config


@dataclass
class TrainConfig:
    """How to train; the keys of model.py's LlamaConfig shape the model."""
    model: str = "stories15m"  # preset whose shape the model's own keys then change; the default suits a laptop
    dataset: str = "tales"  # folder under data/ (or a path) made by a prepare script; tales needs no download
    out_dir: str | None = None  # where the run is kept; None: out/<dataset>
    init_from: str = "scratch"  # "scratch", "resume", or a directory or hub name to fine-tune
    batch_size: int = 32  # sequences in one forward pass on each process; what memory allows
    gradient_accumulation_steps: int = 1  # forward passes per step, over all processes together
    block_size: int = 256  # tokens in a sequence; a story fits
    whole_docs: bool = False  # True: windows begin with a document and hold whole ones; for documents shorter than one
    doc_mask: bool = False  # True: no attention across documents, positions restart; slower, cleaner for short ones
    max_iters: int = 2000  # optimizer steps
    optimizer: str = "muon"  # "muon" for the hidden matrices (AdamW for the rest) learns faster; "adamw" for all
    learning_rate: float = 3e-3  # peak; Muon's updates are scaled to AdamW's size, so that one rate serves both
    min_lr: float = 0.0  # rate at the end; decaying all the way to 0 beats stopping at a tenth
    warmup_iters: int = 100  # steps of linear rise; AdamW's second moment needs some to settle
    schedule: str = "cosine"  # "cosine", or "wsd": flat, then linear decay, which can be prolonged later
    decay_frac: float = 0.2  # share of the steps in which wsd decays
    beta1: float = 0.9  # AdamW's momentum, the usual
    beta2: float = 0.95  # shorter memory than the usual 0.999 is steadier in language models
    muon_momentum: float = 0.95  # Nesterov momentum of Muon, its author's
    weight_decay: float = 0.1  # on matrices, not on norms; GPT-3's
    grad_clip: float = 1.0  # largest norm of the gradient; 0: no clipping
    checkpointing: bool = False  # recompute activations in the backward pass: a third more work, far less memory
    eval_interval: int = 250  # steps between evaluations; each also saves a checkpoint
    eval_tokens: int = 0  # validation tokens per evaluation, always the same ones; 0: all of them
    eval_only: bool = False  # print loss, perplexity and bits per byte of the whole validation split, and stop
    hellaswag: bool = False  # score HellaSwag at each evaluation; with eval_only that alone, and no dataset is needed
    hellaswag_items: int = 0  # only the first so many of its items; 0: all 10,042
    log_interval: int = 10  # steps between log lines
    sample_tokens: int = 60  # length of the sample printed at each evaluation; 0: none
    shard: bool = False  # split parameters and optimizer over the processes (fully_shard); False: a copy on each (DDP)
    keep: int = 2  # latest checkpoints kept, so that a bad one is not the only one
    seed: int = 1337  # nanoGPT's; draws the weights, the order of the data, dropout and router noise
    device: str = "auto"  # "auto" takes cuda, then mps, then cpu
    dtype: str = "auto"  # "float32", "bfloat16", "float16" for matrix products; "auto" takes what is fast here
    compile: bool | None = None  # torch.compile; None: on CUDA only, elsewhere compiling costs more than it saves

    def __post_init__(self):
        for name, allowed in (("optimizer", ("muon", "adamw")), ("schedule", ("cosine", "wsd")),
                              ("dtype", ("auto", "float32", "bfloat16", "float16"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {getattr(self, name)!r}")
        for name in ("batch_size", "gradient_accumulation_steps", "block_size", "max_iters", "eval_interval",
                     "log_interval", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("learning_rate", "min_lr", "warmup_iters", "decay_frac", "weight_decay", "grad_clip", "eval_tokens",
                     "hellaswag_items"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must not be negative, not {getattr(self, name)}")


if __name__ == "__main__":  # read the arguments before torch is imported: a typo answers at once
    settings = config.run(config.load, TrainConfig, None, "model.py:LlamaConfig")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from safetensors import SafetensorError  # noqa: E402

from common import (  # noqa: E402
    RANK, WORLD, all_reduce_sum, atomic_write, autocast_to, cleanup, init_distributed, keep_freed_memory, pick_device,
    pick_dtype, print0, to_device)
from model import PRESETS, Llama, find  # noqa: E402
from prepare import hellaswag, shards, tokenizer  # noqa: E402
from prepare.windows import Windows, draws, restarts  # noqa: E402

TRAINING_ONLY = ("dropout", "router_noise", "router_aux", "router_bias")  # fields no checkpoint carries
NOT_HIDDEN = ("embed_tokens", "lm_head", "router", "pos_embedding")  # matrices that Muon is not meant for
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12, "3090": 71e12}  # dense bf16


# -- hardware ----------------------------------------------------------------------------------------------------

def peak_flops(device):
    """Dense bf16 FLOP/s that the maker gives, or 0 where that is not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for gpu, peak in PEAK_FLOPS.items() if gpu in name), 0)


# -- optimizers --------------------------------------------------------------------------------------------------

class Muon(torch.optim.Optimizer):
    """Momentum whose update is brought near an orthogonal matrix, for hidden weight matrices.

    Takes matrices (out, in), convolutions (out, in, h, w) as (out, in·h·w), and stacks of matrices (E, in, out);
    those of one shape are handled as one batch.
    Updates have the root mean square of AdamW's (0.2 * sqrt(max(out, in)) times an orthogonal matrix).
    Sources: Keller Jordan, "Muon", 2024 (the quintic iteration); Moonlight, arXiv:2502.16982 (the scale).
    """

    def __init__(self, params, lr, momentum, weight_decay, dtype):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.dtype = dtype  # of the iteration's products

    def orthogonalize(self, g):
        """g (n, a, b) -> about U V^T of each matrix's singular value decomposition."""
        x = g.to(self.dtype)
        tall = x.shape[-2] > x.shape[-1]
        x = x.mT if tall else x
        x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
        for _ in range(5):  # drives every singular value into 0.7 .. 1.2
            s = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(s, s, s, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
        return (x.mT if tall else x).to(g.dtype)

    def each(self, stack):
        """stack (n, ..., a, b), each matrix orthogonalized. Of a sharded stack each process has some rows of all matrices;
        for this it gets all rows of some in exchange."""
        if not hasattr(stack, "placements"):
            return self.orthogonalize(stack.flatten(0, -3)).view_as(stack)
        from torch.distributed.tensor import DTensor, Shard
        whole = stack.redistribute(placements=[Shard(0)])
        done = DTensor.from_local(self.each(whole.to_local()), whole.device_mesh, [Shard(0)], run_check=False,
                                  shape=whole.shape, stride=whole.stride())
        return done.redistribute(placements=stack.placements)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            slices = [ps[i:i + n] for ps in by_shape.values() for n in [max(WORLD, 2**26 * WORLD // ps[0].numel())]
                      for i in range(0, len(ps), n)]  # of some 2**26 elements on each process
            for params in slices:
                shape = params[0].shape
                for p in params:
                    if "momentum" not in self.state[p]:
                        self.state[p]["momentum"] = torch.zeros_like(p)
                grads = [p.grad for p in params]
                buffers = [self.state[p]["momentum"] for p in params]
                torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
                stack = torch.stack(torch._foreach_lerp(grads, buffers, group["momentum"]))  # (n, ..., a, b)
                stack = stack.flatten(2) if len(shape) == 4 else stack  # convolutions: (n, out, in·h·w)
                update = self.each(stack) * (-0.2 * group["lr"] * max(stack.shape[-2:]) ** 0.5)
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(params, [u.view(shape) for u in update.unbind()])


def for_muon(name, p, cfg):
    """Whether Muon takes this parameter; AdamW has the others."""
    return cfg.optimizer == "muon" and p.dim() > 1 and not any(part in name for part in NOT_HIDDEN)


def make_optimizers(model, cfg, device, dtype):
    """[AdamW] or [AdamW, Muon] over the parameters of a Llama (and of what vlm.py puts around it) that are to learn."""
    hidden, matrices, vectors = [], [], []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if p.dim() == 1:
            vectors.append(p)
        elif for_muon(name, p, cfg):
            hidden.append(p)
        else:
            matrices.append(p)
    adamw = torch.optim.AdamW([dict(params=matrices, weight_decay=cfg.weight_decay), dict(params=vectors, weight_decay=0.0)],
                              lr=cfg.learning_rate, betas=(cfg.beta1, cfg.beta2), eps=1e-8, fused=True)
    if not hidden:
        return [adamw]
    iteration = torch.float32 if device.type == "cpu" and dtype != torch.bfloat16 else torch.bfloat16
    return [adamw, Muon(hidden, cfg.learning_rate, cfg.muon_momentum, cfg.weight_decay, iteration)]


def learning_rate(step, cfg):
    """The rate of this step: linear warmup, then cosine decay, or flat and linear decay ("wsd")."""
    if step < cfg.warmup_iters:
        return cfg.learning_rate * (step + 1) / (cfg.warmup_iters + 1)
    if cfg.schedule == "cosine":
        done = (step - cfg.warmup_iters) / max(1, cfg.max_iters - cfg.warmup_iters)
        height = 0.5 * (1 + math.cos(math.pi * done))
    else:
        height = min(1.0, (cfg.max_iters - step) / max(1, cfg.decay_frac * cfg.max_iters))
    return cfg.min_lr + height * (cfg.learning_rate - cfg.min_lr)


# -- sharding ----------------------------------------------------------------------------------------------------

def shard(model, device, dtype):
    """Split a Llama over all processes, so that each computes with one whole block at a time, in dtype."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
    from torch.distributed.tensor import Shard

    def rows(p):  # which axis is split: the first, but of fewer experts than processes the second
        return Shard(1) if p.dim() == 3 and p.shape[0] % WORLD and p.shape[1] % WORLD == 0 else None
    mesh = init_device_mesh(device.type, (WORLD,))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    head = [] if model.config.tie_embeddings else [model.lm_head]
    for block in [*model.model.layers, *head]:  # already in dtype, so that autocast keeps no copy of its weights for the backward pass
        fully_shard(block, mesh=mesh, mp_policy=policy, shard_placement_fn=rows)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    register_fsdp_forward_method(model, "generate")
    register_fsdp_forward_method(model, "losses")
    return model


# -- evaluation --------------------------------------------------------------------------------------------------

@torch.no_grad()
def evaluate(model, windows, device, autocast, bos_id=None, limit=0, progress=False):
    """Mean loss in nats per token over the windows of a split, of which each process takes a share.

    limit: take about this many tokens, spread evenly and always the same; 0: each token but the first, exactly once.
    """
    cfg, spans, was, nats, count = windows.cfg, windows.epoch(None), model.training, 0.0, 0
    wanted = -(-limit // cfg.block_size) if limit else len(spans)
    if wanted < len(spans):
        spans = spans[np.linspace(0, len(spans) - 1, wanted).astype(int)]
    whole = WORLD * (cfg.batch_size if device.type == "cuda" else 1)  # a smaller last batch would be compiled anew
    spans = np.append(spans, [(0, 1)] * (-len(spans) % whole)).astype(int).reshape(-1, 2)[RANK::WORLD]  # (0, 1): no target
    batches = range(0, len(spans), cfg.batch_size)
    if progress and RANK == 0:
        from tqdm import tqdm
        batches = tqdm(batches, desc="evaluating", unit="batch", leave=False)
    model.eval()
    for i in batches:
        x, y = windows.read(spans[i:i + cfg.batch_size])
        n = int((y != -100).sum())
        x, y, positions = to_device(device, x, y, restarts(x, bos_id) if cfg.doc_mask else None)
        with autocast:
            loss = model(x, y, positions)[1].item()  # on every process: those that share a model compute together
        nats += loss * n if n else 0.0
        count += n
    model.train(was)
    nats, count = all_reduce_sum(nats, count)
    return nats / count


def hellaswag_scores(model, tok, cfg, device, autocast):
    """A function that scores HellaSwag, of which each process takes a share: {name: value} for the log.

    Reads and tokenizes the items at once, so that what is wrong with them shows before a long run."""
    items = hellaswag.load(cfg.hellaswag_items)
    rows = hellaswag.rows(items, tok, model.config.context)
    tokens = 256 if device.type == "cpu" else cfg.batch_size * cfg.block_size  # what stays in cache, or fits in memory

    def score():
        with autocast:
            found = hellaswag.log_likelihoods(model, rows, device, tokens, RANK, WORLD)
        acc, norm = (n / len(items) for n in all_reduce_sum(*hellaswag.correct(items, found)))
        error = [math.sqrt(p * (1 - p) / max(len(items) - 1, 1)) for p in (acc, norm)]
        print0(f"hellaswag acc {acc:.4f} ± {error[0]:.3f}  acc_norm {norm:.4f} ± {error[1]:.3f}  over {len(items):,} items")
        return {"hellaswag_acc": acc, "hellaswag_acc_norm": norm, "hellaswag_items": len(items)}
    return score


def bits_per_byte(loss, windows):
    """Nats per token over these windows -> bits per byte of the text, which does not depend on the tokenizer."""
    return loss / math.log(2) * (np.diff(windows.epoch(None)) - 1).sum().item() / windows.split.bytes


# -- the run directory -------------------------------------------------------------------------------------------

def latest(out):
    """The newest complete checkpoint of a run directory, or None. A checkpoint appears by one rename, whole."""
    found = sorted((out / "checkpoints").glob("step_*"))
    return found[-1] if found else None


def publish(source, directory, skip=()):
    """Link (or copy) the files of a checkpoint into directory, each replacing the old one whole."""
    directory.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.name not in skip:
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


def save(out, write, state, keep, best):
    """Make a checkpoint of what write(directory) writes and of `state`; publish it as the run's own files, and in
    best/ if it is the best. Raises `Mistake`, with the earlier checkpoints as they were, when the disk is full."""
    final, tmp = out / "checkpoints" / f"step_{state['step']:08d}", out / "checkpoints" / ".writing"
    try:
        shutil.rmtree(tmp, ignore_errors=True)
        tmp.mkdir(parents=True)
        write(tmp)
        with open(tmp / "train_state.pt", "wb") as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
        shutil.rmtree(final, ignore_errors=True)
        os.replace(tmp, final)
        publish(final, out)
        if best:
            publish(final, out / "best", skip=("train_state.pt",))
    except (OSError, RuntimeError, SafetensorError) as e:  # each library has its own error for a full disk
        shutil.rmtree(tmp, ignore_errors=True)
        before = latest(out)
        raise config.Mistake(f"cannot save to {out}: {str(e).splitlines()[0]}; "
                             + (f"the checkpoint {before.name} is intact" if before else "there is no checkpoint yet")) from e
    for old in sorted((out / "checkpoints").glob("step_*"))[:-keep]:
        shutil.rmtree(old, ignore_errors=True)


def read_state(path):
    """train_state.pt of a checkpoint directory."""
    try:
        state = torch.load(path / "train_state.pt", map_location="cpu", weights_only=True)
        return {"held_out": None} | {key: state[key] for key in ("step", "seconds", "best", "optimizers", "scaler", "router_bias")} | state
    except Exception as e:  # torch advises to load it without weights_only, which would run what code it holds
        raise config.Mistake(f"{path / 'train_state.pt'} cannot be read, or is no state of a run ({type(e).__name__}): "
                             f"remove {path} to go on from the checkpoint before") from e


def gathered(state):
    """A nested state whose sharded tensors are whole on the first process, and None on the others."""
    if isinstance(state, dict):
        return {key: gathered(value) for key, value in state.items()}
    if not hasattr(state, "full_tensor"):
        return state
    whole = state.full_tensor()  # every process takes part
    return whole.cpu() if RANK == 0 else None


def load_optimizer(optimizer, saved):
    """Restore an optimizer from a whole state, of which this process keeps its part where the parameters are sharded."""
    for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        if hasattr(p, "placements"):
            from torch.distributed.tensor import distribute_tensor
            saved["state"][i] = {
                key: distribute_tensor(value, p.device_mesh, p.placements, src_data_rank=None) if value.shape == p.shape else value
                for key, value in saved["state"][i].items()}
    optimizer.load_state_dict(saved)


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


def add_to(curves, entry):
    """Append to {name: array of step, loss, step, loss, ...} what an entry of the log has."""
    for name, key in ("training", "train_loss"), ("validation", "val_loss"):
        if key in entry:
            curves[name].extend((entry["step"], entry[key]))


DOTS = dict(marker="o", markersize=3)
STYLES = {"training": dict(color="#9db4d0", linewidth=1), "validation": dict(color="#c0392b", linewidth=2) | DOTS}


def plot(curves, path, title, floor=None):
    """Draw {name: steps and losses, as `add_to` makes them or (n, 2)}. floor: nats per token that no model beats, or None."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(8, 4.5), dpi=110, layout="constrained")
    axes, values = figure.add_subplot(), []
    for name, points in curves.items():
        points = np.array(points).reshape(-1, 2)  # (n, 2)
        if len(points):
            few = points[::-1 - len(points) // 1000][::-1]  # what a picture can show, the last one among them
            axes.plot(*few.T, label=f"{name}, {points[-1, 1]:.3f} at the end", **STYLES.get(name, DOTS))
            values += points[:, 1].min(), points[:, 1].max()
    if floor is not None:
        axes.axhline(floor, color="#555555", linestyle="--", linewidth=1, label=f"floor, {floor:.3f}")
    if values and max(values) > 2 * min(values) > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
    axes.set(xlabel="optimizer step", ylabel="loss, nats per token", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    write_figure(figure, path)


def write_figure(figure, path):
    """Write a matplotlib figure as a PNG, whole or not at all, and free it."""
    with atomic_write(path) as tmp:
        figure.savefig(tmp, format="png")
    figure.clear()
    gc.collect()  # figures are full of cycles, and would pile up for a hundred evaluations


def facts_of_run(cfg, model_config):
    """What run.json records: every setting, versions, hardware, code."""
    try:
        commit = subprocess.run(["git", "-C", config.ROOT, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
                                capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        commit = ""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"command": sys.argv, "settings": asdict(cfg), "model": asdict(model_config), "processes": WORLD,
            "run_id": os.environ.get("TORCHELASTIC_RUN_ID"), "git_commit": commit,
            "python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
            "machine": platform.machine(), "processor": platform.processor(), "cores": os.cpu_count(), "gpu": gpu,
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}


def check_writable(out):
    """Raise `Mistake` where a run directory cannot be made, without making it."""
    there = next(p for p in (out, *out.absolute().parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise config.Mistake(f"cannot write the run directory {out}: {there} is not a directory that can be written to")


def start_directory(out, cfg, model_config, log):
    """Make the run directory, or move an earlier run out of the way; write run.json and the log so far."""
    with config.mistakes(OSError, prefix="cannot write the run directory: "):
        if cfg.init_from != "resume" and latest(out):
            aside = next(p for i in range(1, 10**6) if not (p := out.with_name(f"{out.name}.{i}")).exists())
            out.rename(aside)
            print0(f"{out} held an earlier run, which is now {aside}")
        new = not out.exists()
        try:
            out.mkdir(parents=True, exist_ok=True)
            shards.write_text(out / "run.json", json.dumps(facts_of_run(cfg, model_config), indent=1) + "\n")
            shards.write_text(out / "log.jsonl", "".join(json.dumps(r) + "\n" for r in log))
        except OSError:
            if new:
                shutil.rmtree(out, ignore_errors=True)
            raise


# -- the loop ----------------------------------------------------------------------------------------------------

def fit(cfg, model, out, device, dtype, batches, validate, write, tokens_per_step, flops_per_token, floor=None, held_out=None):
    """Train `model` for cfg.max_iters steps, in the run directory `out`, from its last checkpoint if cfg says so.

    batches(step): this process's micro-batches, each the arguments of model(...), whose second result is the loss.
    validate(model): evaluates on every process and returns {"val_loss": nats per token, ...} for the log.
    write(directory): writes the model's own files, of a sharded model with the whole of it as state=.
    `model` may have `moe_layers` and `balance` like a Llama. held_out: tells one validation set from another.
    """
    sharded = hasattr(model, "unshard")
    if cfg.shard and WORLD > 1 and not sharded:
        raise config.Mistake("--shard=True splits a Llama, not one that sees")
    autocast = autocast_to(dtype, device)
    optimizers = make_optimizers(model, cfg, device, dtype)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16 and device.type == "cuda")
    experts, first, seconds, best, log = model.moe_layers(), 0, 0.0, math.inf, []
    if cfg.init_from == "resume":
        state = read_state(latest(out))
        first, seconds = state["step"], state["seconds"]
        if state["held_out"] == held_out:
            best = state["best"]
        else:
            print0("resume     with another validation set: best/ begins anew")
        with config.mistakes(ValueError, KeyError, prefix=f"{latest(out)} was made by another optimizer: "):
            for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
                load_optimizer(optimizer, saved)
        scaler.load_state_dict(state["scaler"])
        for layer, saved in zip(experts, state["router_bias"], strict=True):
            layer.bias.copy_(saved)
        log = [r for r in read_log(out / "log.jsonl") if r["step"] <= first]
    check_writable(out)
    compiled = torch.compile(model) if (device.type == "cuda" if cfg.compile is None else cfg.compile) else model
    step_model, ddp = compiled, WORLD > 1 and not sharded
    if ddp:  # the buffers, loads and biases of experts, are each process's own or the same anyway
        DDP = torch.nn.parallel.DistributedDataParallel
        new = "forward_sync_buffers" in inspect.signature(DDP).parameters  # what torch calls it from 2.13 on
        step_model = DDP(compiled, gradient_as_bucket_view=True, **{"forward_sync_buffers" if new else "broadcast_buffers": False})
    peak = peak_flops(device) * WORLD
    print0(f"run        {out}, compile {'off' if compiled is model else 'on'}, about "
        f"{memory_estimate(model, cfg, dtype) / 2**30:.1f} GiB" + (" for each process" if WORLD > 1 else "")
        + (f", resumed after step {first}" if first else ""))

    curves = {"training": array("d"), "validation": array("d")}
    for entry in log:
        add_to(curves, entry)

    def record(entry):
        if RANK == 0:
            add_to(curves, entry)
            with open(out / "log.jsonl", "a", encoding="utf-8") as f:
                f.write(json.dumps(entry) + "\n")

    skipped, times, coming, clock = 0, [], batches(first), time.perf_counter()
    with (listening() as stop, memory_advice(model, cfg, device, dtype),
          config.mistakes(OSError, prefix=f"cannot write to {out}, whose checkpoints are as they were: ")):
        for step in range(first, cfg.max_iters):
            rate = learning_rate(step, cfg)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = rate
            torch.manual_seed(int(draws(cfg.seed, 1, step, RANK).integers(2**63)))  # dropout and router noise
            micro_batches, loss_sum = coming, 0.0
            for i, batch in enumerate(micro_batches):
                with step_model.no_sync() if ddp and i < len(micro_batches) - 1 else nullcontext():
                    with autocast:
                        loss = step_model(*to_device(device, *batch))[1] / len(micro_batches)
                    scaler.scale(loss).backward()
                loss_sum = loss_sum + loss.detach()
            for optimizer in optimizers:
                scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf)
            coming = batches(step + 1)  # while a GPU still works on this step
            norm = (norm.full_tensor() if sharded else norm).item()
            if math.isfinite(norm) or scaler.is_enabled():  # the scaler skips bad steps of its own
                for optimizer in optimizers:
                    scaler.step(optimizer)
                scaler.update()
                skipped = 0
            else:
                skipped += 1
                print0(f"step {step + 1}: the gradient is {norm}; step skipped")
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=True)
            load = model.balance() if experts else None

            now, done = time.perf_counter(), step + 1
            elapsed, clock = now - clock, now
            seconds, times = seconds + elapsed, (times + [elapsed])[-50:]
            last, stopping = done == cfg.max_iters, all_reduce_sum(len(stop))[0] > 0
            if step == first and RANK == 0:  # now that a step fits into memory
                start_directory(out, cfg, model.config, log)
            if done % cfg.log_interval == 0 or done == first + 1 or last or skipped:
                typical = float(np.median(times))
                speed, left = tokens_per_step / typical, int((cfg.max_iters - done) * typical)
                entry = {"step": done, "tokens": done * tokens_per_step, "train_loss": all_reduce_sum(float(loss_sum))[0] / WORLD,
                         "lr": rate, "grad_norm": norm, "tokens_per_s": round(speed),
                         "mfu": round(flops_per_token * speed / peak, 4) if peak else 0.0, "seconds": round(seconds, 3)}
                if skipped:
                    entry["skipped"] = skipped  # so many steps in a row
                if experts:  # tokens of the least and most loaded expert, relative to the mean of its layer
                    share = load / load.mean(1, keepdim=True)
                    entry["expert_load"] = [round(share.min().item(), 3), round(share.max().item(), 3)]
                record(entry)
                print0(f"step {done:>6}/{cfg.max_iters}  loss {entry['train_loss']:.4f}  lr {rate:.2e}  norm {norm:.2f}  "
                    f"{elapsed * 1e3:.0f} ms  {speed:,.0f} tok/s"
                    + (f"  mfu {100 * entry['mfu']:.1f}%" if peak else "")
                    + (f"  expert load {entry['expert_load'][0]:.2f} to {entry['expert_load'][1]:.2f}" if experts else "")
                    + f"  left {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}")
            if skipped == 5:
                raise config.Mistake(f"5 steps in a row had no finite gradient: try --learning_rate={cfg.learning_rate / 3:.2g}, "
                                     "a longer --warmup_iters, or --dtype=float32; the last checkpoint is kept")
            if done % cfg.eval_interval == 0 or last or stopping:
                improved = False
                if not stopping:
                    found = validate(compiled)
                    improved, best = found["val_loss"] < best, min(found["val_loss"], best)
                    record({"step": done, "tokens": done * tokens_per_step, **found, "seconds": round(seconds, 3)})
                model_writes = partial(write, state=gathered(model.state_dict())) if sharded else write
                states = [gathered(o.state_dict()) for o in optimizers]
                if RANK == 0:
                    save(out, model_writes, {
                        "step": done, "seconds": seconds, "best": best, "held_out": held_out, "scaler": scaler.state_dict(),
                        "optimizers": states, "router_bias": [m.bias for m in experts]}, cfg.keep, improved)
                    plot(curves, out / "loss.png", out.name, floor)
                clock = time.perf_counter()
            if stopping:
                print0(f"stopped by a signal after step {done} and saved; go on with --init_from=resume")
                break


@contextlib.contextmanager
def listening():
    """A list that a signal which asks to stop is added to; a second Ctrl-C stops at once."""
    stop = []

    def ask(number, _):
        stop.append(number)
        signal.signal(number, before[number])
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def memory_advice(model, cfg, device, dtype):
    """When memory runs out in this block, say how much training takes and which flags take less."""
    try:
        yield
    except RuntimeError as e:
        if not isinstance(e, torch.OutOfMemoryError) and "can't allocate memory" not in str(e):
            raise
        have = f", and {device} has {torch.cuda.mem_get_info(device)[1] / 2**30:.1f}" if device.type == "cuda" else ""
        less = [f"--batch_size={cfg.batch_size // 2} --gradient_accumulation_steps={2 * cfg.gradient_accumulation_steps}"
                ] * (cfg.batch_size > 1) + ["--checkpointing"] * (not cfg.checkpointing) + ["a shorter --block_size"]
        less += ["--dtype=bfloat16"] * (dtype == torch.float32) + ["--shard on more GPUs"] * (not cfg.shard)
        raise config.Mistake(f"out of memory on {device}: training takes about {memory_estimate(model, cfg, dtype) / 2**30:.1f} GiB"
                             f"{have}; try {', '.join(less)}, or a smaller model") from e


def memory_estimate(model, cfg, dtype, world=WORLD):
    """Bytes that training takes on each of `world` processes; the model may be on the meta device. By calculation:

    4 bytes a parameter for weights, gradients and each state of the optimizer (AdamW 2, Muon 1), divided by `world` where they
    are sharded; the larger of what is there as the backward pass begins (all activations, three copies of the logits) and as it
    ends or the optimizer works. Bytes of each layer were counted with torch's MemTracker.
    """
    m, share, size, tokens = model.config, world if cfg.shard else 1, dtype.itemsize, cfg.batch_size * cfg.block_size
    learn = {n: p for n, p in model.named_parameters() if p.requires_grad}
    hidden = [p for n, p in learn.items() if for_muon(n, p, cfg)]
    weights, gradients = 4 * model.counts()[0], 4 * sum(p.numel() for p in learn.values())
    states = 2 * gradients - 4 * sum(p.numel() for p in hidden)
    first = last = weights / 4 * size * (size < 4)  # beside activations, at both ends of the backward pass
    if cfg.shard and world > 1:  # the embedding and the head; the embedding and a block, the next, its gradients in two types
        first, last = (4 + size) * m.vocab_size * m.dim, 4 * m.vocab_size * m.dim + (3 * size + 4) * max(
            sum(p.numel() for p in b.parameters()) for b in model.model.layers)
    muon = 16 * max((max(min(2**26, sum(q.numel() for q in hidden if q.shape == p.shape)), p.numel()) for p in hidden), default=0)
    attention = (22 if size == 4 else 28) * m.dim + (3 * m.n_head + 2 * m.n_kv_head) * m.head_dim * size
    layers = [attention + size * (4 * m.expert_dim * (1 + m.top_k) + (2 + 3 * m.top_k) * m.dim if m.is_moe(i) else 4 * m.ffn_dim)
              for i in range(m.n_layer)]
    kept = 12 * m.vocab_size + (4 * m.dim * m.n_layer if cfg.checkpointing else sum(layers))
    held = cfg.gradient_accumulation_steps > world or world > share  # gradients are there during the forward pass
    return (weights + states) / share + max(first + tokens * kept + gradients / share * held,
                                            gradients / share + max(last + tokens * max(layers), muon))


# -- starting ----------------------------------------------------------------------------------------------------

def passes(cfg):
    """Forward passes of each process in a step."""
    if cfg.gradient_accumulation_steps % WORLD:
        raise config.Mistake(f"gradient_accumulation_steps={cfg.gradient_accumulation_steps} must be a multiple of the "
                             f"{WORLD} processes, which share them")
    return cfg.gradient_accumulation_steps // WORLD


def folder_of(cfg):
    """The data set's folder: cfg.dataset as a path, or by its name under data/."""
    return Path(cfg.dataset) if Path(cfg.dataset).is_dir() else config.ROOT / "data" / cfg.dataset


def shape_from(base, given):
    """LlamaConfig `base` with the fields in `given`; sizes that follow from a changed field are derived anew."""
    if ("dim" in given or "n_head" in given) and "head_dim" not in given:
        given = given | {"head_dim": 0}
    if "n_head" in given and "n_kv_head" not in given:
        given = given | {"n_kv_head": 0}
    with config.mistakes(ValueError):
        return replace(base, **given)


def new_shape(cfg, shape, tok, vocab_size):
    """LlamaConfig of a model from scratch: the preset cfg.model for this tokenizer and block_size, changed by `shape`."""
    if cfg.model not in PRESETS:
        raise config.Mistake(f"no preset '{cfg.model}'; there are {', '.join(PRESETS)}")
    given = {"vocab_size": vocab_size, "context": cfg.block_size, "bos_id": tok.bos_id, "eos_ids": tuple(sorted(tok.stop_ids))}
    return shape_from(PRESETS[cfg.model], given | shape)


def need_fit(c, cfg, shape, vocab_size):
    """Refuse a LlamaConfig that differs from the fields in `shape`, or is too small for block_size or the data's ids."""
    for key, value in shape.items():
        if getattr(c, key) != value:
            raise config.Mistake(f"the checkpoint has {key}={getattr(c, key)}, not {value}; leave the key out")
    if cfg.block_size > c.context:
        raise config.Mistake(f"block_size={cfg.block_size} is beyond the model's context={c.context}")
    if c.vocab_size < vocab_size:
        raise config.Mistake(f"the data set has ids up to {vocab_size - 1}, the model only vocab_size={c.vocab_size}")


def build_model(cfg, shape, data, tok, out):
    """The Llama that cfg.init_from names. Refuses one that does not fit the data."""
    if cfg.init_from == "scratch":
        c = new_shape(cfg, shape, tok, data.vocab_size)
        need_fit(c, cfg, {}, data.vocab_size)
        torch.manual_seed(cfg.seed)
        return Llama(c)
    source = latest(out) if cfg.init_from == "resume" else Path(cfg.init_from)
    if source is None:
        raise config.Mistake(f"nothing to resume in {out}: it has no checkpoint")
    with config.mistakes(ValueError, FileNotFoundError):
        keep = {k: v for k, v in shape.items() if k in TRAINING_ONLY}
        model = Llama.from_pretrained(source if source.is_dir() else cfg.init_from, dtype=torch.float32, **keep)
    if source.is_dir() and (have := tokenizer.load(source)).fingerprint != tok.fingerprint:
        raise config.Mistake(f"{cfg.dataset} was made with another tokenizer ({tok.kind}, {tok.vocab_size} tokens) than "
                             f"{source} ({have.kind}, {have.vocab_size}); prepare it with --tokenizer={source}")
    need_fit(model.config, cfg, shape, data.vocab_size)
    return model


def after_restart(cfg, shape, out):
    """(cfg, shape), made to resume where torchrun started this process again after one of the run in `out` had died."""
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) == 0 or not latest(out) or not (out / "run.json").is_file():
        return cfg, shape
    facts = json.loads((out / "run.json").read_text(encoding="utf-8"))
    if (facts["run_id"], facts["command"]) != (os.environ.get("TORCHELASTIC_RUN_ID"), sys.argv):
        return cfg, shape
    print0(f"restart    a process had died; going on from {latest(out)}")
    return replace(cfg, init_from="resume"), {k: v for k, v in shape.items() if k in TRAINING_ONLY}


def main(cfg, shape):
    """Train as `cfg` says; `shape` holds the LlamaConfig fields that were given."""
    accumulate = 0 if cfg.eval_only else passes(cfg)
    device = pick_device(cfg.device)
    if device.type == "cpu":
        keep_freed_memory()
    dtype, why = pick_dtype(cfg.dtype, device)
    autocast, folder = autocast_to(dtype, device), folder_of(cfg)
    out = Path(cfg.out_dir) if cfg.out_dir else config.ROOT / "out" / folder.name
    if cfg.eval_only and cfg.hellaswag:
        with config.mistakes(ValueError, FileNotFoundError):
            source = find(latest(out) or out if cfg.init_from == "resume" else cfg.init_from)
            model = Llama.from_pretrained(source, dtype=torch.float32).to(device)
        init_distributed(device)
        hellaswag_scores(model, tokenizer.load(source), cfg, device, autocast)()
        return
    cfg, shape = after_restart(cfg, shape, out)
    val = shards.Split(folder, "val")
    data = val if cfg.eval_only else shards.Split(folder, "train")
    tok = tokenizer.load(folder)
    if tok.fingerprint != data.tokenizer["fingerprint"]:
        raise config.Mistake(f"{folder} was made with another tokenizer than the tokenizer.json in it: prepare the data again")
    if (cfg.doc_mask or cfg.whole_docs) and tok.bos_id is None:
        raise config.Mistake("doc_mask and whole_docs need documents that begin with BOS; this tokenizer has none")
    if len(data) < 2 * cfg.block_size and not cfg.eval_only:
        raise config.Mistake(f"the training split has {len(data)} tokens, too few for block_size={cfg.block_size}")
    model = build_model(cfg, shape, val, tok, out).train()
    model.model.checkpointing = cfg.checkpointing
    init_distributed(device)
    sharded = cfg.shard and WORLD > 1
    with memory_advice(model, cfg, device, dtype):
        model = shard(model, device, dtype) if sharded else model.to(device)
    held_out = Windows(val, cfg, tok.bos_id)

    def summary(loss):
        text = f"val loss {loss:.4f}"
        if val.bytes:
            text += f"  {bits_per_byte(loss, held_out):.4f} bits/byte"
            text += f" (floor {val.floor_bpb:.4f})" if val.floor_bpb else ""
        return text

    if cfg.eval_only:
        with memory_advice(model, cfg, device, dtype):
            loss = evaluate(model, held_out, device, autocast, tok.bos_id, progress=True)
        print0(f"{summary(loss)}  perplexity {math.exp(loss):.3f}  over {len(val) - 1:,} tokens of {folder}")
        return

    score = hellaswag_scores(model, tok, cfg, device, autocast) if cfg.hellaswag else dict
    windows = Windows(data, cfg, tok.bos_id)
    tokens_per_step = int(cfg.batch_size * cfg.gradient_accumulation_steps * cfg.block_size * windows.fill)
    parameters, active = model.counts()
    print0(f"model      {parameters:,} parameters" + (f", {active:,} active per token" if active != parameters else "")
        + f" ({model.config.arch}, {model.config.n_layer} layers, dim {model.config.dim})")
    print0(f"data       {folder.name}: {len(data):,} training tokens, {len(val):,} validation, vocabulary {val.vocab_size:,}")
    print0(f"step       {tokens_per_step:,} tokens = {cfg.batch_size} sequences x {cfg.block_size * windows.fill:.0f} tokens x {accumulate} passes x "
        f"{WORLD} process{'es' * (WORLD > 1)}")
    print0(f"schedule   {cfg.max_iters:,} steps ({cfg.max_iters * tokens_per_step / len(data):.2f} epochs), {cfg.optimizer}, "
        f"lr {cfg.learning_rate:g} after {cfg.warmup_iters} of warmup, {cfg.schedule} to {cfg.min_lr:g}")
    print0(f"hardware   {device}, {str(dtype).removeprefix('torch.')} ({why})")

    def batches(step):
        spans = windows.step(step)[RANK * accumulate * cfg.batch_size:]
        for i in range(accumulate):
            x, y = windows.read(spans[i * cfg.batch_size:][:cfg.batch_size])
            yield x, y, restarts(x, tok.bos_id) if cfg.doc_mask else None

    def validate(compiled):
        loss = evaluate(compiled, held_out, device, autocast, tok.bos_id, cfg.eval_tokens)
        print0(f"{summary(loss)}")
        if cfg.sample_tokens and (sharded or RANK == 0):
            start = torch.tensor([[tok.bos_id if tok.bos_id is not None else int(val[0])]], device=device)
            ends = tok.stop_ids if tok.stop_ids and not sharded else None  # sharded: the same length on every process
            with autocast:
                first, *ids = model.eval().generate(start, cfg.sample_tokens, eos_id=ends, seed=cfg.seed)[0].tolist()
            model.train()
            text = tok.decode([first, *itertools.takewhile(lambda i: i not in tok.stop_ids, ids)])
            print0("  | " + text.strip().replace("\n", "\n  | "))
        return {"val_loss": loss} | ({"val_bpb": bits_per_byte(loss, held_out)} if val.bytes else {}) | score()

    def write(directory, state=None):
        model.save_pretrained(directory, state)
        tok.save(directory)

    floor = val.floor_bpb / bits_per_byte(1.0, held_out) if val.floor_bpb else None  # nats per token
    fit(cfg, model, out, device, dtype, lambda step: list(batches(step)), validate, write, tokens_per_step,
        model.flops_per_token(cfg.block_size), floor, [val.meta["splits"]["val"], cfg.eval_tokens, cfg.block_size, cfg.whole_docs,
                                                       cfg.doc_mask])


if __name__ == "__main__":
    config.run(main, *settings)
    cleanup()
