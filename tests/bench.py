"""How fast everyllama is, beside what people would use instead: every row measured in this run, on this machine.

    python tests/bench.py                               # every row
    python tests/bench.py tokenize hellaswag            # some rows
    python tests/bench.py hellaswag --device=cuda --out=bench.json

A row is a function that yields `Pair`s: two callables that do the same work. They run in turn, so that whatever else
the machine does falls on both; compared are the medians. A goal is met when theirs / ours is at least as large.
"""
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from itertools import islice, takewhile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"  # real data that is not part of the project
sys.path.insert(0, str(ROOT))
import config  # noqa: E402


@dataclass
class Settings:
    """What can be chosen beside the rows."""
    device: str = "cpu"  # where models run
    out: str | None = None  # JSON file to write; None: only the table
    nanogpt: str | None = None  # a clone of nanoGPT; None: rows that need it are left out
    runs: int = 0  # times that each side runs; 0: what the row asks for

    def __post_init__(self):
        if self.runs < 0:
            raise ValueError("runs must not be negative")


@dataclass
class Pair:
    """Two ways to do the same work. Each callable is timed, unless it returns its own seconds as a float."""
    what: str
    ours: Callable
    theirs: Callable
    goal: float  # theirs / ours wanted
    runs: int = 5
    warmup: bool = True  # run both once before they count; not for what takes minutes


class Skip(Exception):
    """A row cannot be measured here; says why."""


ROWS = {}


def row(function):
    """Register a row under its function's name. It takes the Settings and yields Pairs, or raises `Skip`."""
    ROWS[function.__name__] = function
    return function


def seconds(work):
    """How long work() takes, or says that it took."""
    start = time.perf_counter()
    said = work()
    return said if isinstance(said, float) else time.perf_counter() - start


def measure(pair, runs=0):
    """Run both sides of a Pair in turn -> what the JSON records of it."""
    sides = pair.ours, pair.theirs
    if pair.warmup:
        for work in sides:
            work()
    took = [[seconds(work) for work in sides] for _ in range(runs or pair.runs)]
    ours, theirs = (statistics.median(side) for side in zip(*took))
    return {"what": pair.what, "ours": ours, "theirs": theirs, "ratio": theirs / ours, "goal": pair.goal,
            "met": theirs / ours >= pair.goal, "seconds": took}


def hardware(device):
    """What the figures depend on beside the code."""
    import torch
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    facts = dict(line.split(":", 1) for line in info.partition("\n\n")[0].splitlines() if ":" in line)
    facts = {key.strip(): value.strip() for key, value in facts.items()}
    units = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in facts.get("flags", "").split()]
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    return {"processor": facts.get("model name", platform.processor()), "units": units, "cores": os.cpu_count(),
            "threads": torch.get_num_threads(), "gpu": gpu,
            "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None, "torch": torch.__version__,
            "python": platform.python_version(), "date": time.strftime("%Y-%m-%d %H:%M")}


def main(argv):
    names = list(takewhile(lambda a: not a.startswith("-"), argv))
    cfg = config.load(Settings, argv[len(names):])
    unknown = [n for n in names if n not in ROWS]
    if unknown:
        raise config.Mistake(f"no row '{unknown[0]}'; there are {', '.join(ROWS)}")
    facts = hardware(cfg.device)
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    print(f"\n{'row':<12} {'ours':>10} {'theirs':>10} {'ratio':>7} {'goal':>6}")
    results = []
    for name in names or ROWS:
        try:
            for pair in ROWS[name](cfg):
                found = {"row": name} | measure(pair, cfg.runs)
                results.append(found)
                print(f"{name:<12} {found['ours']:>9.4g}s {found['theirs']:>9.4g}s {found['ratio']:>6.2f}x "
                      f"{pair.goal:>5.2f}x  {'' if found['met'] else 'NOT MET: '}{pair.what}", flush=True)
        except Skip as e:
            print(f"{name:<12} left out: {e}", flush=True)
    if cfg.out:
        Path(cfg.out).write_text(json.dumps({"hardware": facts, "rows": results}, indent=1) + "\n")


# -- rows -------------------------------------------------------------------------------------------------------------

def shared(path):
    """A file of the optional real data."""
    if not (DATA / path).exists():
        raise Skip(f"needs {DATA / path}")
    return DATA / path


@row
def tokenize(cfg):
    """Web pages to shards with prepare/text.py, from reading the files to the last hash."""
    from prepare import text, tokenizer
    page_file, model = shared("text/fineweb_sample.jsonl.gz"), shared("tokenizers/llama2_tokenizer.model")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer.load(model).save(folder / "tokenizer")
        for i in range(4):  # 78 MB: starting a process should not count for much
            shutil.copy(page_file, folder / f"{i}.jsonl.gz")
        files = [str(path) for path in sorted(folder.glob("*.gz"))]

        def prepare(workers):
            with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
                text.prepare(text.Settings(input=tuple(files), out=str(folder / "out"), workers=workers,
                                           tokenizer=str(folder / "tokenizer")), "bench")
        yield Pair("2 processes against 1", lambda: prepare(2), lambda: prepare(1), 1.8, runs=3, warmup=False)

        try:
            import datasets
            import transformers
        except ImportError as e:
            raise Skip(f"{e.name} is not installed") from None
        datasets.disable_progress_bars()
        theirs = transformers.AutoTokenizer.from_pretrained(folder / "tokenizer")
        pages = datasets.load_dataset("json", data_files=files, split="train", cache_dir=str(folder / "cache"))

        def map_pages():
            pages.map(lambda some: {"ids": theirs(some["text"])["input_ids"]}, batched=True, num_proc=2,
                      remove_columns=pages.column_names, load_from_cache_file=False)
        yield Pair("2 processes against datasets.map(num_proc=2), which finds the files read and hashes nothing",
                   lambda: prepare(2), map_pages, 1.0, runs=3, warmup=False)


@row
def hellaswag(cfg):
    """Log-likelihoods of HellaSwag's endings, SmolLM2-135M's shape."""
    import torch

    from model import PRESETS, Llama
    from prepare import hellaswag, text, tokenizer
    device, path = torch.device(cfg.device), shared("text/hellaswag_val.jsonl.gz")
    with open(path, "rb") as raw:
        some = islice(text.records(path, raw), 20 if cfg.device == "cpu" else 400)
        items = [hellaswag.normalise(item) for item in some]
    tok = tokenizer.load(shared("tokenizers/llama2_tokenizer.model"))
    model = Llama(PRESETS["smollm2-135m"]).to(device)
    rows = hellaswag.rows(items, tok, model.config.context)

    def batched():
        return hellaswag.log_likelihoods(model, rows, device, 256 if cfg.device == "cpu" else 8192)

    @torch.inference_mode()
    def one_by_one():
        found = []
        for item in items:
            context = tok.encode(item["query"], bos=True)
            for ending in item["endings"]:
                ids = torch.tensor(tok.encode(f"{item['query']} {ending}", bos=True), device=device)
                start = len(context)
                logp = model(ids[None])[0][0].log_softmax(-1)
                found.append(logp[start - 1:-1].gather(1, ids[start:, None]).sum().item())
        return found
    ours, theirs = torch.tensor(batched()).flatten(), torch.tensor(one_by_one())
    assert torch.allclose(ours, theirs, atol=0.5 if cfg.device == "cuda" else 0.01), "not the same figures"
    yield Pair(f"{len(items)} items in batches against one ending at a time", batched, one_by_one, 3.0, runs=3,
               warmup=False)


if __name__ == "__main__":
    config.run(main, sys.argv[1:])
