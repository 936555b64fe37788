r"""From a bigram model to Llama 4, one idea a rung: equal data and steps, and from GPT-2 up equal active parameters.

    python prepare/tales.py && python tests/ladder.py                                # two cores: under 20 minutes
    python prepare/shakespeare.py && python tests/ladder.py config/shakespeare.py    # characters of Shakespeare
    python tests/ladder.py config/tales.py --dataset=tinystories --n_layer=8 --n_head=8 --dim=512 --ffn_dim=1408 \
        --block_size=256 --batch_size=64 --max_iters=1000 --dropout=0.1              # a GPU: some minutes

Takes what train.py takes; the shape is that of Llama 1. Each rung keeps what the ones before it added. Prints a table
whose links lead to the code of each idea, and a text by each; draws ladder.png. Runs lie in out/ladder_DATASET/, and
one that is complete is not made again: for other settings give another --out_dir. Ctrl-C stops it, and the same command
goes on with the rung it was at. Without any words it also keeps its figures in ladder.json, and README's table of them.
"""
import inspect
import json
import math
import shlex
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import config

if __name__ == "__main__":  # a typo is told before torch is imported
    words = sys.argv[1:]
    if not words or words[0].startswith("--"):
        words = ["config/tales.py", "--max_iters=300", "--eval_interval=100", *words]
    settings = config.run(config.load, "train.py:TrainConfig", words, config.SHAPE)

import torch
from safetensors.torch import save_model

import before_llama as before
import model
import records
import runs
import train
from common import keep_freed_memory, pick_device
from prepare.shards import write_text

KEPT = ROOT / "tests/ladder.json"
MARKS = "<!-- ladder: written by tests/ladder.py -->\n", "<!-- end of the ladder -->\n"


@dataclass
class Rung:
    """A model that differs from the one before in one idea."""
    name: str
    code: tuple  # the classes and functions where the idea is
    shape: dict  # fields of LlamaConfig that differ from the shape that was asked for
    changes: tuple = ()  # functions of before_llama that put back what a Llama replaced

    def __post_init__(self):
        self.links = ", ".join(map(link, self.code))  # now, before anybody edits these files


def link(code):
    """Markdown that leads to the lines of a class or function."""
    lines, start = inspect.getsourcelines(code)
    file = Path(inspect.getsourcefile(code)).relative_to(ROOT).as_posix()
    return f"[{code.__qualname__}]({file}#L{start}-L{start + len(lines) - 1})"


def rungs(base, block_size):
    """The rungs for `base`, a LlamaConfig, from GPT-2 up each with its active parameters within 2 %."""
    if base.arch != "llama" or base.n_layer % 4:
        raise config.Mistake("the ladder is for the shape of a dense Llama 1 with a multiple of 4 layers, "
                             "as config/tales.py")
    norm, positions, gelu = before.layer_norm, before.learned_positions, before.gelu
    few = max(1, base.n_head // 4)
    ffn = base.ffn_dim + round(2 * (base.n_head - few) * base.head_dim / 3)  # as much as keys and values give up
    llama1 = dict(n_kv_head=base.n_head, rope_theta=1e4)
    llama2 = llama1 | dict(n_kv_head=few, ffn_dim=ffn)
    llama3 = llama2 | dict(rope_theta=5e5)
    qk_norm = llama3 | dict(arch="llama4", qk_norm=True)
    irope = qk_norm | dict(nope_every=4, chunk=block_size // 2)
    experts = dict(n_experts=16, expert_dim=ffn // 2, router_noise=1.0, router_aux=0.01)  # config/scout.py's routing
    return [
        Rung("bigram", (before.no_blocks,), llama1, (norm, before.no_blocks)),
        Rung("RNN", (before.Recurrence,), llama1, (norm, gelu, before.recurrence)),
        Rung("GPT-2", (model.Attention, *(norm, positions, before.GELU)), llama1, (norm, positions, gelu)),
        Rung("+ RMSNorm", (model.RMSNorm,), llama1, (positions, gelu)),
        Rung("+ RoPE", (model.rope_angles, model.rotate), llama1, (gelu,)),
        Rung("+ SwiGLU: Llama 1", (model.SwiGLU,), llama1),
        Rung("+ grouped heads: Llama 2", (model.attend,), llama2),  # only its 70B has them, and all from Llama 3 on
        Rung("+ theta 500,000: Llama 3", (model.rope_frequencies,), llama3),
        Rung("+ QK norm", (model.Attention.forward,), qk_norm),
        Rung("+ iRoPE with chunks", (model.LlamaConfig.is_nope, model.LlamaConfig.chunk_of, model.attend), irope),
        Rung("+ experts: Llama 4", (model.MoE, model.Experts), irope | experts),
    ]


class Task(train.Text):
    """The model of a rung and its data, as `train.fit` takes them."""

    def __init__(self, cfg, shape, out, device, changes):
        super().__init__(cfg, shape, out, device)
        self.changes = changes
        torch.manual_seed(cfg.seed)
        for change in changes:
            change(self.llama)
        self.llama.to(device)

    def save(self, directory):
        """A Llama as always; of what is none the weights alone, since no config.json describes it."""
        if self.changes:
            save_model(self.llama, directory / "model.safetensors")
        else:
            super().save(directory)


@torch.no_grad()
def cache_bytes(llama, size):
    """What decoding a text of `size` tokens keeps of it."""
    weight = llama.lm_head.weight
    cache = model.KVCache(llama.config, 1, size, weight.device, weight.dtype)
    llama(torch.zeros(1, 1, dtype=torch.long, device=weight.device), cache=cache)
    return sum(cache.keys[i].nbytes + cache.values[i].nbytes for i in range(len(llama.model.layers)))


def climb(rung, cfg, shape, out):
    """Train a rung in the directory out, unless that was done before: {name: value} of what there is to say of it."""
    if (out / "rung.json").is_file():
        had = json.loads((out / "run.json").read_text(encoding="utf-8"))["settings"]
        if other := [k for k in ("seed", "max_iters")[:1 + (not cfg.epochs)] if had[k] != getattr(cfg, k)]:
            raise config.Mistake(f"{out} was made with {other[0]}={had[other[0]]}: give another --out_dir, or remove "
                                 "it")
        return json.loads((out / "rung.json").read_text(encoding="utf-8"))
    print(f"\n== {rung.name}", flush=True)
    if pick_device(cfg.device).type == "cuda":
        torch._dynamo.reset()  # each rung is another model to compile, and the compiler gives up after some
    task = Task(cfg, shape | rung.shape, out, pick_device(cfg.device), rung.changes)
    task.describe()
    train.fit(task, task.cfg, out)  # whose steps may follow from epochs
    log = runs.read_log(out / "log.jsonl")
    if log[-1]["step"] < task.cfg.max_iters:
        raise config.Mistake("the ladder was stopped; the same command goes on, with this rung from its beginning")
    total, active = task.llama.counts()
    facts = {"parameters": total, "active": active, "bits": log[-1].get("val_bpb", math.nan),
             "floor": task.val.floor_bpb, "seconds": log[-1]["seconds"],
             "cache": cache_bytes(task.llama, cfg.block_size), "text": task.samples()[0],
             "curve": [(entry["step"], entry["val_loss"]) for entry in log if "val_loss" in entry]}
    write_text(out / "rung.json", json.dumps(facts, indent=1) + "\n")
    return facts


def draw(found, path):
    """Draw {name: facts} as bars: a panel for each figure, a row for each rung."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(13, 1.2 + 0.35 * len(found)), dpi=110, layout="constrained")
    for axes, (key, title, unit, form) in zip(figure.subplots(1, 4, sharey=True), (
            ("bits", "bits/byte", 1, "{:.4f}"), ("active", "parameters in use, millions", 1e6, "{:.2f}"),
            ("seconds", "seconds of training", 1, "{:.0f}"), ("cache", "cache of a text, KiB", 1024, "{:.0f}"))):
        bars = axes.barh(list(found), [facts[key] / unit for facts in found.values()], color="#9db4d0")
        axes.bar_label(bars, fmt=form, padding=3)
        axes.margins(x=0.2)
        axes.set_title(title)
        axes.spines[["top", "right"]].set_visible(False)
        floor = next(iter(found.values()))["floor"]
        if key == "bits" and floor:
            axes.axvline(floor, color="#555555", linestyle="--", linewidth=1)
            axes.set_title(f"{title}, dashed floor {floor:.4f}")
    axes.invert_yaxis()
    runs.write_figure(figure, path)


def table(found, links=None):
    """{name: facts} as a table; links: {name: what leads to its code}, where that is wanted."""
    lines = ["| rung | " + "code | " * bool(links) + "parameters | active | bits/byte | seconds | cache, KiB |",
             "|---" * (6 + bool(links)) + "|"]
    for name, facts in found.items():
        sizes = f"{facts['parameters']:,} | {facts['active']:,} | {facts['bits']:.4f} | {facts['seconds']:.0f}"
        code = f"{links[name]} | " if links else ""
        lines.append(f"| {name} | {code}{sizes} | {facts['cache'] / 1024:.1f} |")
    return "\n".join(lines) + "\n"


def readme(kept):
    """What README says of ladder.json."""
    machine = kept["machine"]
    return f"{table(kept['rungs'])}\nOne seed each, on {records.machine(machine)}, {machine['date'].split()[0]}.\n"


def keep(found, device):
    """Write ladder.json, and what README says of it."""
    figures = "parameters", "active", "bits", "seconds", "cache"
    kept = {"machine": records.facts_of_machine(device),
            "rungs": {name: {key: facts[key] for key in figures} for name, facts in found.items()}}
    KEPT.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    records.write_readme(readme(kept), MARKS)


def main(settings, shape, words=("some",)):
    with config.mistakes(ValueError, KeyError, prefix="the shape of Llama 1: "):
        cfg = train.TrainConfig(**settings)
        ladder = rungs(train.shape_from(model.PRESETS[cfg.model], shape), cfg.block_size)
    keep_freed_memory()
    runs.command_to_resume = lambda out: shlex.join(["python", *sys.argv])  # which goes on with this rung
    if cfg.dtype == "auto" and pick_device(cfg.device).type == "cpu":
        cfg = replace(cfg, dtype="float32")  # what auto measures there may differ from rung to rung
    top, found = Path(cfg.out_dir or ROOT / "out").absolute() / f"ladder_{Path(cfg.dataset).name}", {}
    for number, rung in enumerate(ladder, 1):
        out = top / f"{number:02}"
        found[rung.name] = climb(rung, replace(cfg, out_dir=str(out)), shape, out)
    runs.plot({name: facts["curve"] for name, facts in found.items()}, top / "loss.png", "validation")
    draw(found, top / "ladder.png")
    for rung in ladder:
        print(f"\n{rung.name}\n  | " + found[rung.name]["text"].replace("\n", "\n  | "))
    print("\n" + table(found, {rung.name: rung.links for rung in ladder}), end="")
    if not words:
        keep(found, pick_device(cfg.device).type)
        shutil.copy(top / "ladder.png", ROOT / ".ci/ladder.png")
    floor = found[ladder[0].name]["floor"]
    print(f"\nfloor {floor}" * bool(floor), f"{top / 'ladder.png'}", sep="\n")


if __name__ == "__main__":
    config.run(main, *settings, sys.argv[1:])
