r"""From Llama 2 to Llama 4 one step at a time: the same data, steps and active parameters, one picture and one table.

    python tests/ladder.py config/tales.py                                   # two cores: a quarter of an hour
    python tests/ladder.py config/tales.py --dataset=tinystories --n_layer=8 --n_head=8 --dim=512 --ffn_dim=1408 \
        --block_size=256 --batch_size=64 --max_iters=1000 --dropout=0.1      # a GPU: some minutes

Takes what train.py takes. The shape is the first rung and must be a dense Llama; each rung keeps what the ones before
it added. Runs lie in out/ladder_DATASET/; those that are complete are not run again, one that was stopped goes on: for
other settings give another --out_dir.
"""
import subprocess
import sys
from pathlib import Path
from statistics import median_high

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import config  # noqa: E402


def rungs(base, block_size):
    """{name: the shape's keys that differ from base, a LlamaConfig}, each with base's active parameters within 2 %."""
    if base.arch != "llama" or base.n_layer % 4:
        raise config.Mistake("the ladder starts at a dense Llama 1 to 3 with a multiple of 4 layers, "
                             "as config/tales.py")
    few = max(1, base.n_head // 4)
    ffn = base.ffn_dim + round(2 * (base.n_head - few) * base.head_dim / 3)  # as much as keys and values give up
    steps = {"Llama 2": dict(n_kv_head=base.n_head),
             "+ GQA": dict(n_kv_head=few, ffn_dim=ffn),
             "+ QK norm": dict(arch="llama4", qk_norm=True),
             "+ iRoPE, chunks": dict(nope_every=4, chunk=block_size // 2),
             "+ MoE": dict(n_experts=16, expert_dim=ffn // 2,
                           router_noise=1.0, router_aux=0.01)}  # config/scout.py's routing
    found, so_far = {}, {}
    for name, changes in steps.items():
        so_far = found[name] = so_far | changes
    return found


def main(argv):
    settings, shape = config.load("train.py:TrainConfig", argv, "model.py:LlamaConfig")
    import runs  # only now: a typo is told at once
    import train
    from model import PRESETS, Llama
    with config.mistakes(ValueError, KeyError, prefix="the first rung: "):
        cfg = train.TrainConfig(**settings)
        base = train.shape_from(PRESETS[cfg.model], shape)
    top = Path(cfg.out_dir or ROOT / "out").absolute() / f"ladder_{Path(cfg.dataset).name}"
    lines, curves, ladder = [], {}, rungs(base, cfg.block_size)
    with config.mistakes(ValueError, prefix="a later rung: "):
        for changes in ladder.values():
            train.shape_from(base, changes)
    for name, changes in ladder.items():
        out = top / name.strip("+ ").lower().replace(",", "").replace(" ", "_")
        log = runs.read_log(out / "log.jsonl")
        if not any("val_loss" in entry and entry["step"] == cfg.max_iters for entry in log):
            print(f"\n== {name}", flush=True)
            keys = changes | {"out_dir": out} | ({"init_from": "resume"} if runs.latest(out) else {})
            done = subprocess.run([sys.executable, ROOT / "train.py", *argv,
                                   *(f"--{key}={value}" for key, value in keys.items())])
            if done.returncode:
                sys.exit(done.returncode)
            log = runs.read_log(out / "log.jsonl")
        total, active = Llama.from_pretrained(out).counts()
        evaluations, steps = ([entry for entry in log if key in entry] for key in ("val_loss", "tokens_per_s"))
        curves[name], last = [(entry["step"], entry["val_loss"]) for entry in evaluations], evaluations[-1]
        lines.append(f"| {name} | {total:,} | {active:,} | "
                     f"{last['val_loss']:.4f} | {last.get('val_bpb', float('nan')):.4f} | "
                     f"{median_high(entry['tokens_per_s'] for entry in steps):,} |")
    runs.plot(curves, top / "ladder.png", f"validation, {Path(cfg.dataset).name}, {steps[-1]['tokens']:,} tokens")
    print("\n| what | parameters | active | nats/token | bits/byte | tokens/s |\n|---|---|---|---|---|---|",
          *lines, top / "ladder.png", sep="\n")


if __name__ == "__main__":
    config.run(main, sys.argv[1:])
