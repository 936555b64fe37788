"""What a shared model takes of each process's own memory: 400M parameters start, train and save on 4 processes, and go
on with 2. Measured by polling Linux's RssAnon, beside an idle Python with torch.

    python tests/host_memory.py              a few minutes, 12 GB of memory and as much of disk

The bound: 1.3 times a process's share (16 bytes a parameter with AdamW), the largest tensor, and 0.5 GiB.
"""
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import config
from prepare import shards, tokenizer

SHAPE = dict(n_layer=26, n_head=16, n_kv_head=8, dim=1024, head_dim=64, ffn_dim=3072, vocab_size=32000,
             tie_embeddings=False)
TRAIN = dict(batch_size=1, block_size=32, gradient_accumulation_steps=4, eval_interval=2, eval_tokens=64,
             log_interval=1, sample_tokens=0, optimizer="adamw", shard=True, checkpointing=True, device="cpu",
             dtype="float32", keep=1)
GIB = 2**30


def anonymous(pid):
    """Bytes of a process that no file backs."""
    try:
        return int(re.search(r"RssAnon:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) * 1024
    except (OSError, TypeError):
        return 0


def workers(torchrun):
    """Process ids of torchrun's children that run train.py."""
    return Path(f"/proc/{torchrun}/task/{torchrun}/children").read_text().split()


def peak(processes, *args):
    """({phase: the most bytes that any process held in it}, seconds from the start of all to the first step, output) of
    train.py, whose lines tell the phases."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}",
               "train.py", *args]
    with tempfile.TemporaryFile("w+") as said:
        run = subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=subprocess.STDOUT)
        most, text, begin, started = {}, "", time.perf_counter(), None
        while run.poll() is None:
            said.seek(0)
            text = said.read()
            phase = "save" if "val loss" in text else "train" if "\nrun  " in text else "start"
            started = started or (time.perf_counter() - begin if phase != "start" else None)
            try:
                most[phase] = max(most.get(phase, 0), *map(anonymous, workers(run.pid)), 0)
            except OSError:
                pass
            time.sleep(0.02)
        said.seek(0)
        text = said.read()
    if run.returncode:
        raise SystemExit(text[-3000:])
    return most, started, text


def idle():
    """Bytes of a process that has imported what train.py imports, and does nothing."""
    code = "import train, torch.distributed.checkpoint, torch.distributed.fsdp; print(flush=True); input()"
    run = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    run.stdout.readline()
    found = anonymous(run.pid)
    run.communicate(b"\n")
    return found


def main(folder):
    writer, tok = shards.Writer(folder / "noise", tokenizer.byte()), tokenizer.byte()
    for split in "train", "val":
        text = "".join(np.random.default_rng(0).choice(list("abcdefgh "), 4000))
        writer.add(split, tok.encode(text), len(text))
    writer.finish()
    keys = [f"--{k}={v}" for k, v in dict(dataset=folder / "noise", out_dir=folder / "run", **TRAIN).items()]
    shape = [f"--{k}={v}" for k, v in SHAPE.items()]
    beyond, base, largest = False, idle(), 4 * SHAPE["vocab_size"] * SHAPE["dim"]
    print(f"an idle Python with torch: {base / GIB:.2f} GiB; the largest tensor: {largest / GIB:.2f} GiB")
    for processes, args in (4, [*shape, "--max_iters=2"]), (2, ["--init_from=resume", "--max_iters=4"]):
        found, seconds, text = peak(processes, *keys, *args)
        parameters = int(re.search(r"model +([\d,]+) parameters", text)[1].replace(",", ""))
        share = 16 * parameters / processes
        bound = 1.3 * share + largest + GIB / 2
        phases = ", ".join(f"{phase} {(n - base) / GIB:.2f}" for phase, n in found.items())
        print(f"{processes} processes, {parameters:,} parameters, share {share / GIB:.2f} GiB: {phases} GiB; "
              f"{(max(found.values()) - base) / GIB:.2f} of a bound of {bound / GIB:.2f}")
        saved = float(re.search(r"^saved .* in ([\d.]+) s", text, re.M)[1])
        files = sum(f.stat().st_size for f in next((folder / "run/checkpoints").glob("step_*")).rglob("*.safetensors"))
        print(f"  {files / 1e9:.2f} GB saved in {saved:.1f} s, {files / 1e9 / saved:.2f} GB/s; the first step begins "
              f"{seconds:.1f} s after the processes")
        beyond = beyond or max(found.values()) - base > bound
    files = sorted((folder / "run/checkpoints").glob("*/*.safetensors"))
    print(f"exported: {len(files)} files, {sum(f.stat().st_size for f in files) / GIB:.2f} GiB")
    if beyond:
        raise SystemExit("beyond the bound")


if __name__ == "__main__":
    config.run(config.names_first, sys.argv[1:], (), "row")  # -h alone
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder))
