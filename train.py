"""Train a Llama: from scratch, from where a run stopped, or from any Hugging Face checkpoint.

    python train.py config/tales.py                                       one process
    torchrun --nproc_per_node=8 train.py config/mini_llama.py             one process per GPU
    python train.py config/tales.py --learning_rate=1e-3 --n_layer=8      any key, also the model's
    python train.py --init_from=resume --out_dir=out/tales                go on where it stopped
    python train.py --eval_only --init_from=out/tales                     loss, perplexity, bits per byte
    python train.py --eval_only --init_from=out/smollm2 --hellaswag=True  HellaSwag, after prepare/hellaswag.py

The run directory is a Hugging Face checkpoint (config.json, model.safetensors, the tokenizer's files) with
run.json, log.jsonl and loss.png beside it; best/ has the weights of the lowest validation loss.
A run that goes on or is evaluated keeps the settings of its run.json, but for the keys that are given now.
"""
import contextlib
import itertools
import json
import math
import os
import re
import signal
import sys
import time
from collections import deque
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import config


@dataclass
class TrainConfig:
    """How to train; the keys of model.py's LlamaConfig shape the model. A comment begins with the range of
    a number or the choices for a word, which config/ enforces."""
    # -- what is trained, on what
    model: str = "stories15m"  # preset whose shape the model's own keys then change; the default suits a laptop
    dataset: str = "tales"  # folder under data/ (or a path) made by a prepare script; tales needs no download
    out_dir: str | None = None  # where the run is kept; None: out/<dataset>
    init_from: str = "scratch"  # "scratch", "resume", or a directory or hub name to fine-tune
    head_copy: float = 0.0  # [0, 10] begin with this much of the embedding added to the head, which then copies sooner
    # -- LoRA
    lora_rank: int = 0  # [0, inf) learn a change of this rank of each matrix (lora.py), often 16; 0: the weights learn
    lora_alpha: int = 32  # [1, inf) LoRA's change counts lora_alpha/lora_rank; 32 lets the rank vary at one rate
    # -- a step
    batch_size: int = 32  # [1, inf) sequences in one forward pass on each process; what memory allows
    gradient_accumulation_steps: int = 1  # [1, inf) forward passes per step, over all processes together
    block_size: int = 256  # [1, inf) tokens in a sequence; a story fits
    whole_docs: bool = False  # True: windows begin with a document and hold whole ones; for documents shorter than one
    doc_mask: bool = False  # True: no attention across documents, positions restart; slower, cleaner for short ones
    # -- how it learns
    max_iters: int = 2000  # [1, inf) optimizer steps
    epochs: float = 0.0  # [0, inf) passes over the data, from which max_iters then follows; 0: max_iters alone counts
    optimizer: str = "muon"  # {muon, adamw} muon, for the hidden matrices (AdamW for the rest), learns faster
    learning_rate: float = 3e-3  # [0, 1000] peak; Muon's updates are scaled to AdamW's size, so one rate serves both
    min_lr: float = 0.0  # [0, 1000] rate at the end; decaying all the way to 0 beats stopping at a tenth
    warmup_iters: int = 100  # [0, inf) steps of linear rise; AdamW's second moment needs some to settle
    schedule: str = "cosine"  # {cosine, wsd} wsd is flat, then falls in a line, and can be prolonged later
    decay_frac: float = 0.2  # [0, 1] share of the steps in which wsd decays
    beta1: float = 0.9  # [0, 1) AdamW's momentum, the usual
    beta2: float = 0.95  # [0, 1) shorter memory than the usual 0.999 is steadier in language models
    muon_momentum: float = 0.95  # [0, 1) Nesterov momentum of Muon, its author's
    weight_decay: float = 0.1  # [0, 1000] on matrices, not on norms; GPT-3's
    grad_clip: float = 1.0  # [0, 1e9] largest norm of the gradient; 0: no clipping
    checkpointing: bool = False  # recompute activations in the backward pass: a third more work, far less memory
    # -- what is measured and kept
    eval_interval: int = 250  # [1, inf) steps between evaluations; each also saves a checkpoint
    eval_tokens: int = 0  # [0, inf) validation tokens per evaluation, always the same ones; 0: all of them
    eval_only: bool = False  # print loss, perplexity and bits per byte of the whole validation split, and stop
    hellaswag: bool = False  # score HellaSwag at each evaluation; with eval_only that alone, and no dataset is needed
    hellaswag_items: int = 0  # [0, inf) only the first so many of its items; 0: all 10,042
    log_interval: int = 10  # [1, inf) steps between log lines
    tensorboard: bool = False  # write TensorBoard's files too, into the run directory; wandb and others read them
    sample_tokens: int = 60  # [0, inf) length of the sample printed at each evaluation; 0: none
    keep: int = 2  # [1, inf) latest checkpoints kept, so that a bad one is not the only one
    seed: int = 1337  # [0, inf) nanoGPT's; draws the weights, the order of the data, dropout and router noise
    # -- the machine
    shard: bool = False  # split parameters and optimizer over the processes (fully_shard); False: a copy on each (DDP)
    replicas: int = 1  # [1, inf) with shard: so many split models (HSDP), each on as many GPUs as share fast links
    device: str = "auto"  # "auto" takes cuda, then mps, then cpu
    dtype: str = "auto"  # {auto, float32, bfloat16, float16} of matrix products; auto takes what is fast here
    compile: bool | None = None  # torch.compile; None: on CUDA only, elsewhere compiling costs more than it saves
    unused = text_only = ()  # keys that a script whose settings extend these does not heed; those that it refuses

    def __post_init__(self):
        if any(getattr(self, key) for key in self.text_only):
            raise ValueError(f"{', '.join(self.text_only[:-1])} and {self.text_only[-1]} are for train.py")
        if self.lora_rank and self.init_from == "scratch":
            raise ValueError("lora_rank: LoRA changes a model that is there, which --init_from names")
        if self.head_copy and self.lora_rank:
            raise ValueError("head_copy changes the head, which LoRA leaves as it is: take --head_copy=0")
        if self.replicas > 1 and not self.shard:
            raise ValueError("replicas counts split models: it needs --shard=True")


TRAINING_ONLY = ("dropout", "router_noise", "router_aux")  # fields of LlamaConfig that no checkpoint carries
TEXT_ONLY = "epochs", "doc_mask", "whole_docs", "hellaswag", "head_copy"  # keys of TrainConfig for train.py alone
SCRIPTS = "train.py", "feedback.py", "vlm.py"  # that train
KEYS = "train.py:TrainConfig"


def run_directory(out_dir, dataset, prefix=""):
    """Where a run is kept: out_dir, or out/<the data set's name>."""
    return Path(out_dir) if out_dir else config.ROOT / "out" / (prefix + Path(dataset).resolve().name)


def need_script(directory, keys):
    """Refuse to go on with a run of another script than that of the settings `keys`."""
    path = Path(directory) / "run.json"
    command = json.loads(path.read_text(encoding="utf-8")).get("command") if path.is_file() else None
    script = Path(command[0]).name if command else ""
    if script in SCRIPTS and script != keys.partition(":")[0]:
        raise config.Mistake(f"{directory} is a run of {script}: go on with that")


def with_run(given, shape, keys=KEYS, prefix="", directory=None, only=None):
    """(settings, shape): what is given now, over what run.json holds; prints what differs. directory: the run that is
    evaluated; None: the one that goes on, in out_dir. only: the settings to take of it; None: all. Without a run.json,
    only what is given."""
    if directory is None:
        dataset = given.get("dataset", config.keys_of(keys)["dataset"].default)
        directory = run_directory(given.get("out_dir"), dataset, prefix)
        given = given | {"out_dir": str(directory)}
    settings, model = config.of_run(directory, keys)
    if given.get("init_from") == "resume" and not given.get("eval_only"):
        need_script(directory, keys)
        if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not directory.is_dir():
            raise config.Mistake(f"nothing to resume in {directory}: all processes need the same disk to go on")
        for key in given.keys() & {"model", "lora_rank", "head_copy"}:  # heeded where a run begins
            if given[key] != (had := settings.get(key, given[key])):
                raise config.Mistake(f"{directory} began with {key}={had}, and goes on with it: leave the key out")
    own = {"init_from", "out_dir", "eval_only", "eval", "split", "caption", "ask", "chat", "json"}  # of each call
    own |= {"head_copy", "epochs"}  # done once, in the weights; what max_iters was made of
    own |= {"hellaswag"} if given.get("eval_only") else set()
    settings = {k: v for k, v in settings.items() if k not in own and k in (only or settings)}
    model = {k: v for k, v in model.items() if k in TRAINING_ONLY}
    for key, value in (given | shape).items():
        before = (settings | model).get(key, value)
        if value != before and os.environ.get("RANK", "0") == "0":
            print(f"settings   {key}={value}, where the run had {before}", flush=True)
    return settings | given, model | shape


def read_settings():
    """(TrainConfig, shape of the model) that the command line asks for."""
    given, shape = config.load(KEYS, also=config.SHAPE)
    if given.get("epochs") and "max_iters" in list(given)[list(given).index("epochs"):]:  # what is said last counts
        raise config.Mistake(f"epochs={given['epochs']:g} says how long to train: with --max_iters give --epochs=0")
    source = given.get("init_from", "scratch")
    if source == "resume":
        given, shape = with_run(given, shape)
    elif given.get("eval_only"):
        if source == "scratch":
            raise config.Mistake("what is to be evaluated? --init_from takes a run's directory or a hub name")
        given, shape = with_run(given, shape, directory=source)
    return config.make(TrainConfig, given), shape


if __name__ == "__main__":  # before torch is imported: a typo answers at once
    settings = config.run(read_settings)

import numpy as np
import torch

import adapter
import checkpoint
import fused
import lora
import optim
import runs
from checkpoint import find_checkpoint
from common import (RANK, WORLD, IdleThreads, agreed_dtype, all_reduce_sum, autocast_to, cleanup, in_company,
                    init_distributed, keep_freed_memory, peak_memory, pick_device, print0, to_device)
from model import PRESETS
from prepare import shards, tokenizer
from prepare.windows import rng_for, windows_of
from scores import HellaSwag, bits_per_byte, eval_batches, eval_spans, evaluate, micro_batch, track
from shard import Place, can_compile, data_parallel, share_buffers

CHATS, SHOWN = 2, 1000  # held-out conversations that are sampled at each evaluation; characters of a sample's end
PEAK_FLOPS = {"GB200": 2500e12, "B200": 2250e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12,
              "RTX 5090": 209e12, "RTX 4090": 165e12, "RTX 3090": 71e12, "MI300X": 1307e12}  # bf16, dense


# -- the loop ----------------------------------------------------------------------------------------------------

def fit(task, cfg, out):
    """Train a task for cfg.max_iters steps, in the run directory `out`, from its last checkpoint if cfg says so.

    task: an object like `Text`. It has model, device and dtype; llama, the Llama in it; batch(drawn), this process's
    micro-batches [(targets, arguments of the model), ...] of the step that begins after so many sequences;
    evaluate(model), {"val_loss": ..., ...}; save(directory); flops_per_token, floor, train_ and val_fingerprint.
    model(*arguments)[1] is the mean loss over the targets of a micro-batch, 0 where it has none.
    """
    model, device, llama = task.model, task.device, task.llama
    sharded, autocast = hasattr(model, "unshard"), autocast_to(task.dtype, device)
    optimizers = optim.make_optimizers(model, cfg, device, task.dtype)
    scaler = torch.amp.GradScaler(device.type, enabled=task.dtype == torch.float16)
    if RANK == 0:
        runs.check_writable(cfg, out)
    state = dict(runs.NEW)
    if cfg.init_from == "resume":
        state = resume(task, cfg, out, optimizers, scaler)
    log = runs.Log(out, state["step"], cfg.tensorboard)
    compiles = can_compile(cfg, device)
    if device.type == "cpu" and not compiles:
        fused.use(model)
    compiled_model = torch.compile(model) if compiles and not sharded else model  # blocks that are split are already
    ddp = WORLD > 1 and not sharded
    step_model = data_parallel(compiled_model) if ddp else compiled_model
    print0(f"run        {out}, compile {'on' if compiles else 'off'}"
           + (f", resumed after step {state['step']}" if state["step"] else ""))
    first_step, times, bad_steps, agents = state["step"], deque(maxlen=50), 0, runs.torchrun_agents()
    most_bad_steps = 25 if scaler.is_enabled() else 5  # in a row; the scaler's first scales are too large on purpose
    with (stop_signals() as signals, IdleThreads(device) as threads, memory_advice(cfg, device, task.dtype),
          contextlib.ExitStack() as stack,
          config.mistakes(OSError, prefix=f"cannot write to {out}, whose checkpoints are as they were: ")):
        for step in range(first_step, cfg.max_iters):
            began, done = time.perf_counter(), step + 1
            rate = optim.learning_rate(step, cfg)
            for group in itertools.chain(*(optimizer.param_groups for optimizer in optimizers)):
                group["lr"] = rate

            # The gradient of the mean over all targets of the step, however they are spread over micro-batches and
            # processes. Dropout and router noise have a seed for each step, so that resuming is exact.
            torch.manual_seed(int(rng_for(cfg.seed, 1, step, RANK).integers(2**63)))
            micro_batches = task.batch(state["sequences"])
            targets, stopping = all_reduce_sum(sum(count for count, _ in micro_batches), len(signals))
            targets = max(targets, 1)
            loss = 0.0
            for i, (count, args) in enumerate(micro_batches):
                is_last = i == len(micro_batches) - 1  # here DDP averages the gradients of all processes
                with step_model.no_sync() if ddp and not is_last else nullcontext():
                    with autocast:
                        part = step_model(*to_device(device, *args))[1] * (count / targets)
                    scaler.scale(part * WORLD).backward()  # both DDP and fully_shard divide by the processes
                loss += part.detach()

            # Clip and step, or change nothing if the norm is not finite. The scaler alone would skip one optimizer and
            # not the other; one norm decides for both, and on all processes alike.
            for optimizer in optimizers:
                scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf)
            norm = (norm.full_tensor() if sharded else norm).item()
            if math.isfinite(norm):
                for optimizer in optimizers:
                    scaler.step(optimizer)
                scaler.update()
                bad_steps = 0
            else:
                scaler.update(scaler.get_scale() / 2)
                bad_steps += 1
                print0(f"step {done}: the gradient is {norm}; step skipped")
            for optimizer in optimizers:
                optimizer.zero_grad()
            load = llama.pop_expert_load()

            elapsed = time.perf_counter() - began
            threads.adapt(elapsed)
            times.append(elapsed)
            state = state | {"step": done, "sequences": state["sequences"] + sequences_per_step(cfg),
                             "tokens": state["tokens"] + int(targets), "seconds": state["seconds"] + elapsed}
            first, last = step == first_step, done == cfg.max_iters
            if first and RANK == 0:  # now that a step fits into memory
                stack.enter_context(runs.start_directory(out, runs.facts_of_run(cfg, llama.config, agents), log))
                print0(f"memory     {peak_memory(device) / 2**30:.1f} GiB after the first step")
            if first and sharded:
                runs.need_common(out)
            if done % cfg.log_interval == 0 or first or last or bad_steps:
                typical, peak = float(np.median(times)), peak_flops(device)
                entry = {"step": done, "tokens": state["tokens"], "train_loss": all_reduce_sum(float(loss))[0],
                         "lr": rate, "grad_norm": norm, "tokens_per_s": round(targets / typical),
                         "mfu": round(task.flops_per_token * targets / typical / peak, 4) if peak else 0.0,
                         "seconds": round(state["seconds"], 3)}
                entry |= ({"skipped": bad_steps} if bad_steps else {}) | relative_load(load)  # so many steps in a row
                log.write(entry)
                print0(log_line(entry, cfg.max_iters, elapsed, typical))
            if bad_steps == most_bad_steps:
                raise config.Mistake(f"{bad_steps} steps in a row had no finite gradient: try --learning_rate="
                                     f"{cfg.learning_rate / 3:.2g}, a longer --warmup_iters, or --dtype=float32; "
                                     "the last checkpoint is kept")

            if done % cfg.eval_interval == 0 or last or stopping:
                improved = False
                if ddp:
                    share_buffers(model)
                if not stopping or last:
                    found = task.evaluate(compiled_model)
                    improved = found["val_loss"] < state["best"]  # a NaN is no improvement
                    state["best"] = found["val_loss"] if improved else state["best"]
                    log.write({"step": done, "tokens": state["tokens"], "seconds": round(state["seconds"], 3)} | found)
                saved = state | {"improved": improved, "val_fingerprint": task.val_fingerprint,
                                 "train_fingerprint": task.train_fingerprint,
                                 "scaler": scaler.state_dict()}
                runs.save_checkpoint(out, task.save, saved, optim.states(model, optimizers), sharded, cfg.keep)
                if RANK == 0:
                    log.plot(task.floor)
            if stopping and not last:
                print0(f"stopped by a signal after step {done} and saved; to go on: {runs.command_to_resume(out)}")
                break


def sequences_per_step(cfg):
    """Sequences that all processes together draw for a step."""
    return cfg.batch_size * cfg.gradient_accumulation_steps


def micro_batches_per_process(cfg):
    """Forward passes of each process in a step."""
    if cfg.gradient_accumulation_steps % WORLD:
        raise config.Mistake(f"gradient_accumulation_steps={cfg.gradient_accumulation_steps} must be a multiple of the "
                             f"{WORLD} processes, which share them")
    return cfg.gradient_accumulation_steps // WORLD


def numbers_of_step(cfg, drawn):
    """Which examples this process takes in the step after `drawn` of them: (micro-batches, batch_size)."""
    numbers = np.arange(drawn, drawn + sequences_per_step(cfg))
    return numbers.reshape(WORLD, micro_batches_per_process(cfg), cfg.batch_size)[RANK]


def resume(task, cfg, out, optimizers, scaler):
    """Restore optimizers and scaler from the newest checkpoint; returns the state of the loop."""
    folder = runs.common_latest(out)
    state = runs.read_state(folder)
    if state["step"] >= cfg.max_iters:
        raise config.Mistake(f"{out} has done its {state['step']} steps: to go on, give a larger --max_iters")
    if RANK == 0:  # a crash may have come between the checkpoint and its links
        runs.link_checkpoint(folder, out)
        if state["improved"]:
            runs.link_checkpoint(folder, out / "best", skip=("train_state.json",))
    if state["val_fingerprint"] != task.val_fingerprint:
        print0("resume     with another validation set: best/ begins anew")
        state["best"] = math.inf
    if state["train_fingerprint"] not in (None, task.train_fingerprint):
        print0("resume     with other training data than before: what comes now may have been learned already")
    with torch.no_grad(), config.mistakes(ValueError, KeyError, prefix=f"{folder} {made_otherwise(cfg, folder)}"
                                          "cannot be read: "):
        names = checkpoint.tensor_names(folder / "optimizer")
        checkpoint.load_tensors(optim.make_states(task.model, optimizers, names), folder / "optimizer")
    if state["scaler"]:  # empty unless the run was in float16
        scaler.load_state_dict(state["scaler"])
    return {key: state[key] for key in runs.NEW}


def made_otherwise(cfg, folder):
    """For a message: which of the settings that shape the optimizers' state have changed since a checkpoint was made;
    "" if none."""
    before, _ = config.of_run(folder, type(cfg))
    keys = [key for key in ("stage", "lora_rank", "optimizer") if key in before and before[key] != getattr(cfg, key)]
    names = " and ".join(keys), " and ".join(f"--{key}" for key in keys)
    return "was made by another {} (leave {} out), or ".format(*names) if keys else ""


def peak_flops(device):
    """What the GPUs of all processes can do in a second, 0 where that is not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((flops for gpu, flops in PEAK_FLOPS.items() if re.search(rf"\b{gpu}\b", name)), 0) * WORLD


def relative_load(load):
    """{"expert_load": [least, most]}, relative to the layer's mean, of load (layers, E): tokens on this process."""
    if not load.numel():
        return {}
    load = torch.tensor(all_reduce_sum(*load.flatten().tolist())).view(load.shape)
    share = load / load.mean(1, keepdim=True)
    return {"expert_load": [round(share.min().item(), 3), round(share.max().item(), 3)]}


def log_line(entry, max_iters, elapsed, typical):
    """An entry of the log as people read it."""
    left = int((max_iters - entry["step"]) * typical)
    return (f"step {entry['step']:>6}/{max_iters}  loss {entry['train_loss']:.4f}  lr {entry['lr']:.2e}  "
            f"norm {entry['grad_norm']:.2f}  {elapsed * 1e3:.0f} ms  {entry['tokens_per_s']:,} tok/s"
            + (f"  mfu {100 * entry['mfu']:.1f}%" if entry["mfu"] else "")
            + ("  expert load {} to {}".format(*entry["expert_load"]) if "expert_load" in entry else "")
            + f"  left {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}")


@contextlib.contextmanager
def stop_signals():
    """A list that a signal which asks to stop is added to; a second Ctrl-C stops at once."""
    signals = []

    def ask(number, _):
        signals.append(number)
        signal.signal(number, before[number])
        if RANK == 0:  # print() is not safe here
            with contextlib.suppress(OSError):  # nobody may be reading
                os.write(1, b"stopping after the next step; a second Ctrl-C stops at once\n")
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def memory_advice(cfg, device, dtype):
    """When memory runs out in this block, say which flags take less."""
    try:
        yield
    except RuntimeError as e:
        if not re.search("out of memory|can't allocate memory", str(e)):  # the words of CUDA and MPS, and of CPUs
            raise
        reached = f"{peak_memory(device) / 2**30:.1f} GiB"
        if device.type == "cuda":
            reached += f" of {torch.cuda.mem_get_info(device)[1] / 2**30:.1f}"
        half = (f"--batch_size={cfg.batch_size // 2} "
                f"--gradient_accumulation_steps={2 * cfg.gradient_accumulation_steps}")
        less = {half: cfg.batch_size > 1, "--checkpointing": not cfg.checkpointing,
                "a shorter --block_size": "block_size" not in cfg.unused, "--dtype=bfloat16": dtype == torch.float32,
                "--shard on more GPUs": not cfg.shard and "shard" not in cfg.unused}
        raise config.Mistake(f"out of memory on {device} at {reached}; try "
                             f"{', '.join(way for way, helps in less.items() if helps)}, or a smaller model") from e


# -- what is trained ---------------------------------------------------------------------------------------------

def print_schedule(task, per_epoch):
    """Print for how many steps a task learns from so many examples an epoch, at what rate, and on what."""
    cfg, epochs = task.cfg, task.cfg.max_iters * sequences_per_step(task.cfg) / per_epoch
    if hasattr(task.llama, "adapter"):
        print0(f"lora       {adapter.describe(task.llama)}")
    if cfg.warmup_iters >= cfg.max_iters:
        print0(f"warmup     ends after step {cfg.warmup_iters}, training after step {cfg.max_iters}: give a smaller "
               "--warmup_iters, or smaller steps")
    learning = [(name, p) for name, p in task.model.named_parameters() if p.requires_grad]
    optimizer = "muon" if any(optim.for_muon(name, p, cfg) for name, p in learning) else "adamw"
    print0(f"schedule   {cfg.max_iters:,} steps ({epochs:.2f} epochs), {optimizer}, lr {cfg.learning_rate:g} after "
           f"{cfg.warmup_iters} of warmup, {cfg.schedule} to {cfg.min_lr:g}")
    print0(f"hardware   {task.device}, {str(task.dtype).removeprefix('torch.')} ({task.why_dtype})")


def shape_from(base, given):
    """LlamaConfig `base` with the fields in `given`; sizes that follow from a changed field are derived anew."""
    if ("dim" in given or "n_head" in given) and "head_dim" not in given:
        given = given | {"head_dim": 0}
    if "n_head" in given and "n_kv_head" not in given:
        given = given | {"n_kv_head": 0}
    with config.mistakes(ValueError):
        return replace(base, **given)


def new_shape(cfg, shape, tok, vocab_size):
    """LlamaConfig of a new model: the preset cfg.model for this tokenizer and block_size, changed by `shape`."""
    if cfg.model not in PRESETS:
        raise config.Mistake(f"no preset '{cfg.model}'; there are {', '.join(PRESETS)}")
    given = {"vocab_size": vocab_size, "context": cfg.block_size, "bos_id": tok.bos_id,
             "eos_ids": tuple(sorted(tok.stop_ids))}
    return shape_from(PRESETS[cfg.model], given | shape)


def need_shape(c, shape):
    """Refuse the LlamaConfig of a checkpoint that differs from the fields in `shape`."""
    for key, value in shape.items():
        if getattr(c, key) != value:
            raise config.Mistake(f"the checkpoint has {key}={getattr(c, key)}, not {value}; leave the key out")


def need_room(c, cfg, vocab_size):
    """Refuse a LlamaConfig that is too small for block_size or the data's ids."""
    if cfg.block_size > c.context:
        raise config.Mistake(f"block_size={cfg.block_size} is beyond the model's context={c.context}: "
                             f"give --block_size={c.context} or less")
    if c.vocab_size < vocab_size:
        raise config.Mistake(f"the data set has ids up to {vocab_size - 1}, the model only vocab_size={c.vocab_size}")


def load_llama(cfg, shape, source, place, narrow=False):
    """(Llama, tokenizer) of a checkpoint, a directory or a hub name, where `place` says (`shard.Place`). Weights that
    learn are float32, those that LoRA freezes, or of which narrow says so, are bfloat16 if products are."""
    with config.mistakes(ValueError, OSError):
        directory = find_checkpoint(source)
        kept = {k: v for k, v in shape.items() if k in (*TRAINING_ONLY, "context")}  # RoPE has no longest position
        new = (cfg.lora_rank, cfg.lora_alpha, source, cfg.seed) if cfg.lora_rank else None
        narrow = place.dtype == torch.bfloat16 and (narrow or new or adapter.is_adapter(directory))
        llama = adapter.load(directory, torch.bfloat16 if narrow else torch.float32, place.device, place.split, new,
                             **kept)
        if narrow:
            lora.float32_stream(llama)
    return llama, adapter.load_tokenizer(directory)


def start_from(cfg, shape, out, place):
    """(Llama, tokenizer) of the checkpoint that cfg.init_from names: for "resume" the newest of the run in `out`."""
    return load_llama(cfg, shape, runs.common_latest(out) if cfg.init_from == "resume" else cfg.init_from, place)


def copy_to_head(llama, share):
    """Add this share of the embedding to the head: a word that attention copies then raises its own logit, before the
    head has learned to."""
    if hasattr(llama, "adapter"):
        raise config.Mistake("head_copy changes the head, which an adapter leaves as it is: merge it first")
    if llama.config.tie_embeddings:
        raise config.Mistake("head_copy: the head is the embedding already (tie_embeddings): take --head_copy=0")
    with torch.no_grad():
        llama.lm_head.weight.add_(llama.model.embed_tokens.weight, alpha=share)


def build_model(cfg, shape, splits, tok, out, place):
    """The Llama that cfg.init_from names, where `place` says. Refuses one that does not fit the data's splits. One that
    is there may lack tokens that its tokenizer has and the data have not."""
    if cfg.init_from == "scratch":
        c = new_shape(cfg, shape, tok, splits[0].vocab_size)
        need_room(c, cfg, splits[0].vocab_size)
        return place.new(c, cfg.seed)
    llama, its_tok = start_from(cfg, shape, out, place)
    if its_tok.fingerprint != tok.fingerprint:
        source = out if cfg.init_from == "resume" else cfg.init_from
        raise config.Mistake(f"{cfg.dataset} was made with another tokenizer ({tok.kind}, {tok.vocab_size} tokens) "
                             f"than {source} ({its_tok.kind}, {its_tok.vocab_size}); prepare it with "
                             f"--tokenizer={source}{' (prepare/chat.py: --init_from)' * bool(splits[0].marks)}")
    need_shape(llama.config, shape)
    need_room(llama.config, cfg, max(split.largest for split in splits) + 1)
    return llama


def open_data(folder, cfg):
    """(training split, validation split, tokenizer) of a data set of text; to evaluate, both are that of validation."""
    if (folder / "train.jsonl").is_file() and not (folder / "tokenizer.json").is_file():
        raise config.Mistake(f"{folder} holds pictures, which are for vlm.py")
    val, tok = shards.Split(folder, "val"), tokenizer.load(folder)
    data = val if cfg.eval_only else shards.Split(folder, "train")
    if tok.fingerprint != data.tokenizer["fingerprint"]:
        raise config.Mistake(f"{folder} was made with another tokenizer than the tokenizer.json in it: prepare the "
                             "data again")
    if (cfg.doc_mask or cfg.whole_docs) and tok.bos_id is None and not data.marks:
        raise config.Mistake("doc_mask and whole_docs need documents that begin with BOS; this tokenizer has none")
    if len(data) < 2 * cfg.block_size and not cfg.eval_only and not data.marks:
        raise config.Mistake(f"the training split has {len(data)} tokens, too few for block_size={cfg.block_size}")
    return data, val, tok


class Text:
    """A Llama and the data set of text that it learns from: what `fit` trains, and what --eval_only scores."""

    def __init__(self, cfg, shape, out, device):
        self.cfg, self.device = cfg, device
        self.dtype, self.why_dtype = agreed_dtype(cfg.dtype, device)
        self.autocast = autocast_to(self.dtype, device)
        self.folder = runs.folder_of(cfg)
        self.data, self.val, self.tok = open_data(self.folder, cfg)
        self.windows = windows_of(self.data, cfg, self.tok.bos_id)
        self.val_windows = windows_of(self.val, cfg, self.tok.bos_id)
        if cfg.epochs:
            steps = math.ceil(cfg.epochs * self.windows.per_epoch / sequences_per_step(cfg))
            self.cfg = cfg = replace(cfg, max_iters=steps, epochs=0.0)  # a run that goes on may have more steps
        with memory_advice(cfg, device, self.dtype):
            self.place = Place(cfg, device, self.dtype)
            self.llama = self.model = build_model(cfg, shape, (self.data, self.val), self.tok, out,
                                                 self.place).train()
            if cfg.head_copy and cfg.init_from != "resume" and not cfg.eval_only:
                copy_to_head(self.llama, cfg.head_copy)
            self.llama.model.checkpointing = cfg.checkpointing
            self.llama.few_targets = bool(self.data.marks)  # of conversations only the answers count
            self.sharded = self.place.mesh is not None
        if self.data.marks:
            adapter.name_ends(self.llama, self.tok)
        self.hellaswag = HellaSwag(cfg, self.tok, self.llama.config.context) if cfg.hellaswag else None
        gradients = 2 / 3 if hasattr(self.llama, "adapter") else 1  # frozen weights have none
        self.flops_per_token = self.llama.flops_per_token(cfg.block_size) * gradients
        self.floor = None  # nats per token
        if self.val.floor_bpb:
            self.floor = self.val.floor_bpb / bits_per_byte(1.0, self.val_windows)
        self.train_fingerprint = [self.data.meta["splits"].get(name) for name in ("train", "train_marks")]
        self.val_fingerprint = [self.val.meta["splits"]["val"], cfg.eval_tokens, cfg.block_size, cfg.whole_docs,
                                cfg.doc_mask] + ([self.val.marks.meta["splits"]["val_marks"]] if self.val.marks else [])

    def describe(self):
        """Print what is trained, on what and how."""
        cfg, c = self.cfg, self.llama.config
        total, active = self.llama.counts()
        count = micro_batches_per_process(cfg)
        targets = int(sequences_per_step(cfg) * cfg.block_size * self.windows.packing_efficiency)
        print0(f"model      {total:,} parameters" + (f", {active:,} active per token" if active != total else "")
               + f" ({c.arch}, {c.n_layer} layers, dim {c.dim})")
        print0(f"data       {self.folder.resolve().name}: {len(self.data):,} training tokens, {len(self.val):,} "
               f"validation, vocabulary {self.val.vocab_size:,}")
        if self.data.marks:
            print0(f"chats      {self.data.documents:,} in {self.windows.per_epoch:,} sequences, "
                   f"{self.windows.packing_efficiency:.1%} full; {self.val.documents:,} held out; only answers count")
        print0(f"step       {targets:,} tokens = {cfg.batch_size} sequences x {targets / sequences_per_step(cfg):.0f} "
               f"tokens x {count} passes x {WORLD} process{'es' * (WORLD > 1)}")
        print_schedule(self, self.windows.per_epoch)

    def batch(self, drawn):
        """This process's micro-batches of the step that begins after `drawn` sequences."""
        return [micro_batch(self.windows, self.windows.draw(int(row[0]), len(row)))
                for row in numbers_of_step(self.cfg, drawn)]

    def val_loss(self, model, limit=0, progress=False):
        """Nats per token on the validation split, or on about `limit` tokens of it."""
        spans = eval_spans(self.val_windows, self.device, limit)
        batches = eval_batches(self.val_windows, spans)
        if progress:
            batches = track(batches, "evaluating", -(-len(spans) // self.cfg.batch_size))
        return evaluate(model, batches, self.device, self.autocast)

    def summary(self, loss):
        """A validation loss as people read it."""
        text = f"val loss {loss:.4f}"
        if self.val.bytes:
            text += f"  {bits_per_byte(loss, self.val_windows):.4f} bits/byte"
            text += f" (floor {self.val.floor_bpb:.4f})" if self.val.floor_bpb else ""
        return text

    def evaluate(self, model):
        """Validation loss, a printed sample, HellaSwag: {name: value} for the log."""
        loss = self.val_loss(model, self.cfg.eval_tokens)
        print0(self.summary(loss))
        found = {"val_loss": loss}
        if self.val.bytes:
            found["val_bpb"] = bits_per_byte(loss, self.val_windows)
        with self.place.eager():
            for text in self.samples() if self.cfg.sample_tokens and self.llama.config.context > 1 else ():
                print0("  | " + text.replace("\n", "\n  | "))
            return found | (self.hellaswag(self.model, self.device, self.autocast) if self.hellaswag else {})

    def prompts(self):
        """[(ids that a sample begins with, its temperature), ...]; held-out conversations are answered greedily."""
        tok = self.tok
        if not self.val.marks:
            return [([tok.bos_id if tok.bos_id is not None else int(self.val[0])], 1.0)]
        lessons = map(self.val_windows.example, range(min(CHATS, self.val.documents)))
        return [(ids[:max(learned.argmax(), 1)].tolist(), 0.0) for ids, learned in lessons]  # without a prompt, 1 token

    def samples(self):
        """Texts that the model makes up: all processes that share it make them together, of copies the first one."""
        cfg, tok = self.cfg, self.tok
        if RANK > 0 and not self.sharded:
            return []
        ends = tok.stop_ids if tok.stop_ids and not self.sharded else None  # sharded: equal lengths on all processes
        self.model.eval()
        texts = []
        for prompt, temperature in self.prompts():
            with self.autocast:
                ids = self.model.generate(torch.tensor([prompt], device=self.device), cfg.sample_tokens, temperature,
                                          eos_id=ends, seed=cfg.seed)[0].tolist()
            new = itertools.takewhile(lambda i: i not in tok.stop_ids, ids[len(prompt):])
            texts.append(tok.decode([*prompt, *new])[-SHOWN:].strip())
        self.model.train()
        return texts

    def save(self, directory):
        """Write the model, of which each process that shares it writes some files, and the tokenizer."""
        adapter.save(self.llama, directory)
        if RANK == 0:
            self.tok.save(directory)


# -- starting ----------------------------------------------------------------------------------------------------

def after_restart(cfg, shape, out):
    """(cfg, shape), made to resume if torchrun has started all processes again after one of the run in `out` had died:
    one of its agents is there still. The first process decides for all."""
    if cfg.init_from == "resume":
        return cfg, shape
    agents, goes_on = runs.torchrun_agents(), 0
    if RANK == 0 and agents and runs.latest(out) and (out / "run.json").is_file():
        facts = json.loads((out / "run.json").read_text(encoding="utf-8"))
        goes_on = int(bool(set(facts.get("agents", ())) & set(agents)) and facts["command"] == sys.argv)
    if not all_reduce_sum(goes_on)[0]:
        return cfg, shape
    print0(f"restart    a process had died; going on from {runs.latest(out)}")
    return replace(cfg, init_from="resume"), {k: v for k, v in shape.items() if k in TRAINING_ONLY}


def begin(cfg, prefix=""):
    """(torch.device, run directory) of this process, which joins the others. prefix: of the directory's name."""
    device = pick_device(cfg.device)
    init_distributed(device)
    keep_freed_memory(device.type == "cpu" and not cfg.shard)
    return device, run_directory(cfg.out_dir, cfg.dataset, prefix)


@in_company()
def start(task_of, cfg, shape, prefix=""):
    """Train what task_of(cfg, shape, out, device) makes: an object like `Text`."""
    micro_batches_per_process(cfg)  # says what is wrong before anything is loaded
    device, out = begin(cfg, prefix)
    cfg, shape = after_restart(cfg, shape, out)
    task = task_of(cfg, shape, out, device)
    task.describe()
    fit(task, task.cfg, out)


@in_company()
def evaluate_run(cfg, shape):
    """Print the loss of a model on the whole validation split, or its scores on HellaSwag."""
    device, out = begin(cfg)
    source = out if cfg.init_from == "resume" else cfg.init_from
    if cfg.hellaswag:
        print0(f"model      {source}")
        dtype, _ = agreed_dtype(cfg.dtype, device)
        llama, tok = start_from(cfg, {}, out, Place(cfg, device, dtype))
        HellaSwag(cfg, tok, llama.config.context)(llama, device, autocast_to(dtype, device))
        return
    task = Text(cfg, shape, out, device)
    with memory_advice(cfg, device, task.dtype):
        loss = task.val_loss(task.model, progress=True)
    print0(f"{task.summary(loss)}  perplexity {math.exp(min(loss, 700)):.3f}  over {task.val_windows.targets():,} "
           f"tokens of {task.folder}, by {source}")


def main(cfg, shape):
    """Train, or evaluate, as `cfg` says; `shape` holds the LlamaConfig fields that were given."""
    if cfg.eval_only:
        evaluate_run(cfg, shape)
    else:
        start(Text, cfg, shape)


if __name__ == "__main__":
    config.run(main, *settings)
    cleanup()
