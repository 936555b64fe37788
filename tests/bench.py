"""How fast everyllama is, beside what people would use instead: every row measured in this run, on this machine.

    python tests/bench.py                               # every row
    python tests/bench.py tokenize hellaswag            # some rows
    python tests/bench.py --keep                        # kept in bench.json, and README's tables written from it

A row is a function that yields `Pair`s: two callables that do the same work. They run in turn, so that whatever else
the machine does falls on both; compared are the medians. A goal is met when theirs / ours is at least as large.
"""
import gc
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from functools import cache, partial
from io import StringIO
from itertools import islice
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
REAL_DATA = Path(os.environ.get("EVERYLLAMA_DATA", ROOT.parent / "shared" / "data"))  # no part of the project
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import common
import config


@dataclass
class Settings:
    """What can be chosen beside the rows."""
    device: str = "cpu"  # {cpu, cuda} where models run
    keep: bool = False  # keep what is found in bench.json and write README's tables from it
    nanogpt: str | None = None  # a clone of nanoGPT; None: rows that need it are left out
    runs: int = 0  # times that each side runs; 0: what the row asks for

    def __post_init__(self):
        if self.runs < 0:
            raise ValueError("runs must not be negative")


@dataclass
class Pair:
    """Two ways to do the same work. Each callable is timed, unless it returns a float: its own seconds, or GiB."""
    what: str
    ours: Callable
    theirs: Callable
    goal: float  # theirs / ours wanted
    runs: int = 5
    warmup: bool = True  # run both once before they count; not for what takes minutes
    unit: str = "s"  # "GiB" where memory is compared


class Skip(Exception):
    """A row cannot be measured here; says why."""


ROWS = {}
KEPT = ROOT / "tests/bench.json"
MARKS = "<!-- bench: written by tests/bench.py -->\n", "<!-- end of the bench -->\n"


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
    return {"what": pair.what, "unit": pair.unit, "ours": ours, "theirs": theirs, "ratio": theirs / ours,
            "goal": pair.goal, "met": theirs / ours >= pair.goal, "seconds": took}


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


def remember(name, results, facts):
    """Keep the Pairs of a row, one list of `measure` for each kind of machine, and write them into README.md."""
    import records
    kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    kind = kept.setdefault(records.machine(facts), {})
    kind |= {"machine": records.facts_of_machine("cuda" if facts["gpu"] else "cpu"), name: results}
    KEPT.write_text(json.dumps(kept, indent=1) + "\n")
    records.write_readme(readme(kept), MARKS)


def readme(kept):
    """What README says of bench.json: a table for each kind of machine."""
    tables = []
    for kind, rows in kept.items():
        torch, date = rows["machine"]["torch"].split("+")[0], rows["machine"]["date"].split()[0]
        lines = [f"On {kind}, torch {torch}, {date}:\n", "| row | what | ours | theirs | ratio |", "|---" * 5 + "|"]
        for name in ROWS:
            lines += [f"| `{name}` | {pair['what']} | {pair['ours']:.3g} {pair['unit']} | {pair['theirs']:.3g} "
                      f"{pair['unit']} | {pair['ratio']:.2f} |" for pair in rows.get(name, ())]
        tables.append("\n".join(lines) + "\n")
    return "\n".join(tables)


def forget(device):
    """Free the models that are gone, and what the compiler has learned from their shapes."""
    gc.collect()
    if device == "cuda":
        import torch
        torch._dynamo.reset()
        torch.cuda.empty_cache()


def main(argv):
    names, rest = config.names_first(argv, ROWS, "row")
    cfg = config.load(Settings, rest)
    facts = hardware(cfg.device)
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    print(f"\n{'row':<12} {'ours':>10} {'theirs':>10} {'ratio':>7} {'goal':>6}")
    failed = []
    for name in names or ROWS:
        forget(cfg.device)
        results = []
        try:
            for pair in ROWS[name](cfg):
                found = measure(pair, cfg.runs)
                results.append(found)
                print(f"{name:<12} {found['ours']:>9.4g}{pair.unit} {found['theirs']:>9.4g}{pair.unit} "
                      f"{found['ratio']:>6.2f}x {pair.goal:>5.2f}x  "
                      f"{'' if found['met'] else 'NOT MET: '}{pair.what}", flush=True)
                del pair
                gc.collect()  # the pair's models
        except Skip as e:
            print(f"{name:<12} left out: {e}", flush=True)
        except Exception:  # the other rows are worth their time all the same
            traceback.print_exc()
            print(f"{name:<12} FAILED", flush=True)
            failed.append(name)
        if cfg.keep and results:  # after each row, so that nothing that was measured is lost
            remember(name, results, facts)
    sys.exit(1 if failed else 0)


# -- rows -------------------------------------------------------------------------------------------------------------

def real_data(path):
    """A file of the optional real data."""
    if not (REAL_DATA / path).exists():
        raise Skip(f"no {path} in {REAL_DATA}; set EVERYLLAMA_DATA")
    return REAL_DATA / path


@row
def tokenize(cfg):
    """Web pages to shards with prepare/text.py, from reading the files to the last hash."""
    from prepare import text, tokenizer
    page_file, model = real_data("text/fineweb_sample.jsonl.gz"), real_data("tokenizers/llama2_tokenizer.model")
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

        def map_pages():
            with tempfile.TemporaryDirectory() as cache:  # from the files, as ours
                pages = datasets.load_dataset("json", data_files=files, split="train", cache_dir=cache)
                pages.map(lambda some: {"ids": theirs(some["text"])["input_ids"]}, batched=True, num_proc=2,
                          remove_columns=pages.column_names)
        yield Pair("2 processes against datasets.load_dataset and map(num_proc=2)", lambda: prepare(2), map_pages, 1.0,
                   runs=3, warmup=False)


@row
def hellaswag(cfg):
    """Log-likelihoods of HellaSwag's endings, SmolLM2-135M's shape."""
    import torch

    from model import PRESETS, Llama
    from prepare import hellaswag, tokenizer
    from scores import log_likelihoods
    (device, dtype, autocast), path = precision(cfg.device), real_data("text/hellaswag_val.jsonl.gz")
    items = list(islice(hellaswag.items([path]), 20 if cfg.device == "cpu" else 400))
    tok = tokenizer.load(real_data("tokenizers/llama2_tokenizer.model"))
    model = Llama(PRESETS["smollm2-135m"]).to(device)
    rows = hellaswag.rows(items, tok, model.config.context)

    def batched():
        with autocast():
            return log_likelihoods(model, rows, device, 256 if cfg.device == "cpu" else 8192)

    @torch.inference_mode()
    def one_by_one():
        found = []
        for item in items:
            context = tok.encode(item["query"], bos=True)
            for ending in item["endings"]:
                ids = torch.tensor(tok.encode(f"{item['query']} {ending}", bos=True), device=device)
                start = len(context)
                with autocast():
                    logp = model(ids[None])[0][0].float().log_softmax(-1)
                found.append(logp[start - 1:-1].gather(1, ids[start:, None]).sum().item())
        return found
    ours, theirs = torch.tensor(batched()).flatten(), torch.tensor(one_by_one())
    assert torch.allclose(ours, theirs, atol=0.01 if dtype == torch.float32 else 0.5), "not the same figures"
    yield Pair(f"{len(items)} items in batches against one ending at a time", batched, one_by_one, 3.0, runs=3,
               warmup=False)


def peers():
    """transformers, or `Skip`."""
    environment = dict(os.environ)
    try:
        import conftest  # noqa: F401  lets a torchvision that was built for another torch be imported
        import transformers
    except ImportError as e:
        raise Skip(f"{e.name} is not installed") from None
    os.environ.clear()
    os.environ.update(environment)  # the one thread of the tests is not for what other rows start
    transformers.logging.set_verbosity_error()
    return transformers


def twin(model):
    """transformers' model of the same shape with the same weights."""
    transformers = peers()
    from checkpoint import config_to_hf
    shape = transformers.AutoConfig.for_model(**config_to_hf(model.config))
    theirs = transformers.AutoModelForCausalLM.from_config(shape, attn_implementation="sdpa").float()
    theirs.load_state_dict(model.state_dict())
    return theirs.to(next(model.parameters()).device)


@cache
def precision(device):
    """(device, dtype, autocast()) that training takes here."""
    device = common.pick_device(device)
    dtype, _ = common.pick_dtype("auto", device)
    if device.type == "cpu":
        common.keep_freed_memory()
    return device, dtype, lambda: common.autocast_to(dtype, device)


def wait(device):
    """Until the device has done its work."""
    import torch
    if device.type == "cuda":
        torch.cuda.synchronize()


def peak_memory(work):
    """work(), as a callable that returns the most GiB it had allocated on the GPU beyond what was there before."""
    import torch

    def once():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - before) / 2**30
    return once


def as_trained(module):
    """module, as train.py would have it: compiled in place on a GPU, with fused parts of ours on a processor."""
    import fused
    if next(module.parameters()).is_cuda:
        module.compile()
    else:
        fused.use(module)
    return module


def training_step(model, loss_of, autocast, device):
    """Forward, backward and AdamW on one batch, as a callable."""
    import torch
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step():
        with autocast():
            loss = loss_of()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        wait(device)
    return step


def our_step(shape, batch, length, cfg, **changes):
    """A whole training step of a LlamaConfig on random tokens, compiled on a GPU -> (model, x, step)."""
    import torch

    from model import Llama
    device, _, autocast = precision(cfg.device)
    torch.manual_seed(0)
    model = as_trained(Llama(replace(shape, **changes)).to(device).train())
    idx = torch.randint(model.config.vocab_size, (batch, length + 1), device=device)
    x, y = idx[:, :-1].contiguous(), idx[:, 1:].contiguous()
    return model, x, training_step(model, lambda: model(x, y)[1], autocast, device)


def never_waits(model, x, cfg):
    """Forward and backward of a compiled model; torch raises an error where the host would wait for the GPU."""
    import torch
    y = x.clone()
    for mode in ("default", "error") if cfg.device != "cpu" else ():  # the first compiles
        torch.cuda.set_sync_debug_mode(mode)
        try:
            with precision(cfg.device)[2]():
                loss = model(x, y)[1]
            loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    model.zero_grad(set_to_none=True)


def against_transformers(name, cfg, batch, length, goal):
    """A Pair of whole training steps of one shape, and our model, its tokens and step."""
    from model import PRESETS
    device, dtype, autocast = precision(cfg.device)
    model, x, ours = our_step(PRESETS[name], batch, length, cfg)
    theirs = as_trained(twin(model).train())
    other = training_step(theirs, lambda: theirs(input_ids=x, labels=x, use_cache=False).loss, autocast, device)
    what = f"training step of {name}, {batch} x {length} tokens, {str(dtype).removeprefix('torch.')}"
    return Pair(what + ", against transformers with SDPA", ours, other, goal, runs=5), model, x, ours


def against_products(model, step, batch, length, goal, cfg):
    """A Pair of a training step and nothing but large products of its model FLOPs: the ratio is the share of the speed
    that products reach here."""
    return Pair(f"a step of {model.counts()[0] / 1e6:.0f}M parameters, {batch} x {length} tokens, against nothing but "
                "products of its model FLOPs",
                step, products(model.flops_per_token(length) * batch * length, cfg), goal)


def products(flops, cfg):
    """Nothing but large products of so many floating-point operations, as a callable."""
    import torch
    device, dtype, _ = precision(cfg.device)
    rows, inputs, outputs = (8192, 8192, 8192) if device.type == "cuda" else (1024, 768, 3072)
    times = max(1, round(flops / (2 * rows * inputs * outputs)))
    rows = max(16, round(flops / (2 * inputs * outputs * times) / 16) * 16)  # so that it comes out even
    a, b = (torch.randn(size, dtype=dtype, device=device) for size in ((rows, inputs), (inputs, outputs)))

    def work():
        for _ in range(times):
            a @ b
        wait(device)
    return work


def gpt2(folder, x, cfg):
    """A training step of nanoGPT's GPT-2 124M on tokens x."""
    import importlib.util
    device, _, autocast = precision(cfg.device)
    found = importlib.util.spec_from_file_location("nanogpt", Path(folder) / "model.py")
    nanogpt = importlib.util.module_from_spec(found)
    found.loader.exec_module(nanogpt)
    model = as_trained(nanogpt.GPT(nanogpt.GPTConfig(vocab_size=50304, dropout=0.0, bias=False)).to(device).train())
    return training_step(model, lambda: model(x, x)[1], autocast, device)


@row
def shakespeare(cfg):
    """From the start of the process to a validation loss of 1.88, nanoGPT's CPU recipe beside ours."""
    import subprocess
    if not cfg.nanogpt:
        raise Skip("needs --nanogpt=DIR, with its data/shakespeare_char prepared")
    if not (ROOT / "data/shakespeare").is_dir():
        raise Skip("run prepare/shakespeare.py first")
    reached = {}

    def run(name, folder, *words):
        start = time.perf_counter()
        with subprocess.Popen([sys.executable, *words], cwd=folder, stdout=subprocess.PIPE, text=True) as process:
            losses = [line.split("val loss ")[1].split()[0] for line in process.stdout if "val loss" in line]
        took = time.perf_counter() - start
        if process.returncode:
            raise Skip(f"{name} failed: {' '.join(words)}")
        reached[name] = float(losses[-1])
        return took
    with tempfile.TemporaryDirectory() as folder:
        recipe = dict(device="cpu", compile=False, eval_iters=20, block_size=64, batch_size=12,
                      n_layer=4, n_head=4, n_embd=128,
                      max_iters=2000, lr_decay_iters=2000, dropout=0.0, out_dir=folder)
        theirs = run("nanoGPT", cfg.nanogpt, "train.py", "config/train_shakespeare_char.py",
                     *(f"--{key}={value}" for key, value in recipe.items()))
        recipe = dict(n_layer=2, n_head=3, dim=96, ffn_dim=256, tie_embeddings=False,
                      block_size=64, learning_rate=3e-2, warmup_iters=3,
                      muon_momentum=0.85, beta2=0.99, weight_decay=0.2,  # for a short run: shorter momentum, more decay
                      max_iters=270, eval_interval=270, sample_tokens=0, device="cpu", out_dir=f"{folder}/run")
        ours = run("everyllama", ROOT, "train.py", "config/shakespeare.py",
                   *(f"--{key}={value}" for key, value in recipe.items()))
    yield Pair(f"process start to the end: validation loss {reached['everyllama']:.3f}, nanoGPT's CPU recipe "
               f"{reached['nanoGPT']:.3f} (its own estimate)",
               lambda: ours, lambda: theirs, 8.0, runs=1, warmup=False)


@row
def moe(cfg):
    """Forward and backward of a mixture-of-experts layer: 16 experts, top-1 beside a shared one, 4,096 tokens."""
    import torch

    from checkpoint import config_to_hf
    from model import LlamaConfig, MoE, SwiGLU
    device, dtype, autocast = precision(cfg.device)
    torch.manual_seed(0)
    shape = LlamaConfig(arch="llama4", dim=512, n_head=8, n_layer=1, ffn_dim=1024, n_experts=16, expert_dim=1024,
                        vocab_size=64)
    layer, dense = MoE(shape).to(device), SwiGLU(512, 2048).to(device)  # the shared expert and one routed: 2 x 1024
    for name, p in (*layer.named_parameters(), *dense.named_parameters()):
        torch.nn.init.normal_(p, std=0.02)
    x = torch.randn(1, 4096, 512, device=device, requires_grad=True)

    def work(forward):
        forward = torch.compile(forward) if device.type == "cuda" else forward  # else kernels' starts would be measured

        def once():
            with autocast():
                y = forward(x)
            y.float().sum().backward()
            wait(device)
        return once

    def loop(x):
        """The plain way: each expert in turn, on the tokens that chose it."""
        flat = x[0]
        logits = layer.router(flat)
        score, expert = logits.topk(1, -1)
        out = layer.shared_expert(flat)
        for e in range(16):
            rows = (expert[:, 0] == e).nonzero()[:, 0]
            gate, up = (flat[rows] * score[rows].sigmoid() @ layer.experts.gate_up_proj[e]).chunk(2, -1)
            found = (torch.nn.functional.silu(gate) * up) @ layer.experts.down_proj[e]
            out = out.index_add(0, rows, found.to(out.dtype))
        return out[None]
    ours = work(lambda x: layer(x)[0])
    assert torch.allclose(layer(x)[0], loop(x), atol=1e-4), "not the same mixture"
    kind = f"MoE layer, forward and backward, 4,096 tokens, {str(dtype).removeprefix('torch.')}: "
    yield Pair(kind + "against a dense layer of the same active work", ours, work(dense), 0.85, runs=9)
    yield Pair(kind + "against a loop over experts", ours, work(loop), 2.5, runs=9)
    peers()
    from transformers.models.llama4.modeling_llama4 import Llama4TextConfig, Llama4TextMoe
    theirs = Llama4TextMoe(Llama4TextConfig(**config_to_hf(shape))).to(device).float()
    theirs.load_state_dict(layer.state_dict())
    assert torch.allclose(layer(x)[0], theirs(x)[0].view(x.shape), atol=1e-4), "not the same mixture"
    yield Pair(kind + "against transformers' Llama 4", ours, work(lambda x: theirs(x)[0]), 12.0, runs=3)


@row
def scout(cfg):
    """A whole training step of config/scout.py, batch reduced on a processor, and of a dense Llama with its active
    parameters."""
    from model import PRESETS
    batch, shapes, gpu = 4 if cfg.device == "cpu" else 64, {"scout-128m": PRESETS["scout-128m"]}, cfg.device != "cpu"
    yield against_transformers("scout-128m", cfg, batch, 256, 8.0 if gpu else 3.5)[0]
    if gpu:
        shapes["1B in all"] = replace(shapes["scout-128m"], dim=1024, n_head=16, n_kv_head=4, n_layer=12,
                                      ffn_dim=1536, expert_dim=1536)
    for name, shape in shapes.items():
        model, x, ours = our_step(shape, batch, 256, cfg)
        never_waits(model, x, cfg)
        active = 2 * shape.expert_dim  # the shared expert and one routed
        plain, _, theirs = our_step(shape, batch, 256, cfg, n_experts=0, ffn_dim=active)
        yield Pair(f"training step of {name}, {batch} x 256 tokens, {model.counts()[0] / 1e6:.0f}M parameters of which "
                   f"{model.counts()[1] / 1e6:.0f}M active, against a dense one of {plain.counts()[0] / 1e6:.0f}M",
                   ours, theirs, 0.7)


@row
def dense(cfg):
    """A whole training step of the 109.5M mini-llama, and how much of the machine's arithmetic it uses."""
    from model import PRESETS
    gpu = cfg.device != "cpu"
    batch, length = (64, 1024) if gpu else (4, 256)
    pair, model, x, ours = against_transformers("mini-llama", cfg, batch, length, 1.5 if gpu else 1.3)
    yield pair
    yield against_products(model, ours, batch, length, 0.5 if gpu else 0.6, cfg)
    if cfg.nanogpt:
        yield Pair(f"the same step against nanoGPT's GPT-2 124M, {batch} x {length} tokens",
                   ours, gpt2(cfg.nanogpt, x, cfg), 1.15 if gpu else 1.0)
    for name, rows, goal in (("smollm2-135m", 32, 0.5), ("llama-3.2-1b", 8, 0.55)) if gpu else ():
        model, _, ours = our_step(PRESETS[name], rows, length, cfg)
        yield against_products(model, ours, rows, length, goal, cfg)


def lora_step(whose, learned, device):
    """A step of fine-tuning SmolLM2-135M with LoRA of rank 16 on 4 x 512 tokens, of which each row's last `learned`
    are targets, as a callable. whose: "ours", or "theirs": peft and transformers."""
    import torch

    import adapter
    from model import PRESETS, Llama
    device, _, autocast = precision(device)
    model = Llama(PRESETS["smollm2-135m"]).to(device)
    idx = torch.randint(model.config.vocab_size, (4, 513), generator=torch.Generator().manual_seed(0)).to(device)
    x, y = idx[:, :-1].contiguous(), idx[:, 1:].clone()
    y[:, :512 - learned] = -100
    if whose == "ours":
        adapter.begin(model, 16, 32, "none", seed=0)
        model.few_targets = True  # as train.py has it for conversations
        model = as_trained(model.train())
        return training_step(model, lambda: model(x, y)[1], autocast, device)
    try:
        import peft
    except ImportError as e:
        raise Skip(f"{e.name} is not installed") from None
    settings = peft.LoraConfig(r=16, lora_alpha=32, target_modules=adapter.MATRICES, task_type="CAUSAL_LM")
    theirs = as_trained(peft.get_peft_model(twin(model), settings).train())
    return training_step(theirs, lambda: theirs(input_ids=x, shift_labels=y, labels=y, use_cache=False).loss, autocast,
                         device)


def lora_memory(whose, learned, device):
    """The most GiB that a process of its own takes for two of these steps; on a GPU, what it allocates there."""
    code = (f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]; import bench, common; "
            f"step = bench.lora_step({whose!r}, {learned}, {device!r}); step(); step(); "
            f"print(common.peak_memory(common.pick_device({device!r})))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        raise Skip(f"{whose}: {done.stderr[-300:]}")
    return int(done.stdout.split()[-1]) / 2**30


@row
def finetune(cfg):
    """A step of fine-tuning with LoRA, and its memory, against peft and transformers."""
    for learned in 256, 512:
        what = f"LoRA of rank 16 on SmolLM2-135M, 4 x 512 tokens, {learned} of 512 learned, against peft"
        ours, theirs = (lora_step(whose, learned, cfg.device) for whose in ("ours", "theirs"))
        yield Pair(f"a step of {what}", ours, theirs, 1.3, runs=3)
        del ours, theirs
        gc.collect()
        yield Pair(f"memory of {what}", *(partial(lora_memory, whose, learned, cfg.device)
                                          for whose in ("ours", "theirs")), 1.0, runs=1, warmup=False, unit="GiB")


@row
def memory(cfg):
    """GPU memory of a training step: activation checkpointing, and what a token takes."""
    if cfg.device == "cpu":
        raise Skip("counts the memory of a GPU")
    from model import PRESETS
    for name, batch in (("mini-llama", 16), ("scout-128m", 64), ("smollm2-135m", 16)):
        length = min(PRESETS[name].context, 1024)
        model, _, step = our_step(PRESETS[name], batch, length, cfg)
        whole = peak_memory(step)
        whole()  # makes the optimizer's moments
        plain = whole()  # compiled by now
        model.model.checkpointing = True
        whole(), whole()
        yield Pair(f"{name}, {batch} x {length} tokens: memory beyond weights and moments with activation "
                   f"checkpointing against without, {plain * 2**20 / (batch * length):.0f} KiB a token without",
                   whole, lambda plain=plain: plain, 1.0, runs=1, warmup=False, unit="GiB")


@row
def decode(cfg):
    """Greedy decoding, random weights: 256 tokens one by one, many rows at once, and a long prompt. On a GPU through
    CUDA graphs. transformers has its weights in the dtype whose products are fastest here, ours are as sample.py takes
    them."""
    import torch

    import decode
    from model import PRESETS, Llama
    device, dtype, _ = precision(cfg.device)
    gpu = device.type == "cuda"
    for name in ("smollm2-135m", "llama-3.2-1b") if gpu else ("stories15m", "smollm2-135m"):
        forget(cfg.device)
        torch.manual_seed(0)
        new = 240 if name == "stories15m" else 256  # with the prompt, what stories15m's context holds
        model = Llama(PRESETS[name]).to(device, dtype if gpu else torch.float32).eval()
        theirs, weights = twin(model).to(dtype).eval(), sum(p.numel() for p in model.parameters())
        whole = {name: t.clone() for name, t in model.state_dict().items()}
        model = decode.to_decode(model, compile=gpu, rows=1)
        ours_in = str(model.lm_head.weight.dtype).removeprefix("torch.")
        if gpu:
            check_graphs(model)
        prompt = torch.randint(model.config.vocab_size, (1, min(2048, model.config.context - 1)), device=device)
        idx, rows, length = prompt[:, :8], 64 if gpu else 32, prompt.shape[1]
        many = idx.expand(rows, -1).contiguous()
        wide = Llama(model.config).to(device, dtype if gpu else torch.float32).eval()
        wide.load_state_dict(whole)
        wide = decode.to_decode(wide, compile=gpu, rows=rows)

        def ours(idx=idx, model=model, new=new):
            model.generate(idx, new, temperature=0)
            wait(device)

        def generate(idx=idx, theirs=theirs, new=new):
            theirs.generate(idx, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
        memory = torch.randn(weights, device=device).to(model.lm_head.weight.dtype)

        def read(memory=memory, new=new):
            for _ in range(new):
                memory.sum()
            wait(device)
        kind = f"{name}, {new} tokens one by one, {ours_in}: "
        bare = "against transformers.generate in " + str(dtype).removeprefix("torch.")
        yield Pair(kind + bare, ours, generate, 2.0, runs=3)
        yield Pair(kind + "against reading the weights once a token", ours, read, 0.6 if gpu else 0.7, runs=3)
        yield Pair(f"{name}: {rows} rows at once against {rows} one after another",
                   lambda: ours(many, wide), lambda: rows * seconds(ours), 20.0 if gpu else 10.0, runs=3)
        yield Pair(f"{name}: {rows} rows at once {bare}", lambda: ours(many, wide), lambda: generate(many), 2.0, runs=3)
        head = 2 * model.config.vocab_size * model.config.dim  # which only the last position needs
        yield Pair(f"{name}: a prompt of {length} tokens against nothing but products of its FLOPs",
                   lambda: ours(prompt, new=1),
                   products((model.flops_per_token(length) / 3 - head) * length, cfg), 0.5, runs=3)
        small = name == "stories15m"
        for bits, goal in () if gpu else ((8, 2.5 if small else 3.0), (4, 2.5 if small else 3.5)):
            rounded = Llama(model.config)
            rounded.load_state_dict(whole)
            decode.to_decode(rounded.eval(), bits=bits)
            yield Pair(f"{name}, {new} tokens one by one, --quantize=int{bits}: {bare}",
                       partial(ours, model=rounded), generate, goal, runs=3)
        if not gpu:
            yield from llama_cpp(model.config, whole, idx, new, kind, ours)


@row
def requests(cfg):
    """Many requests of different lengths, nano-vllm's benchmark scaled down: 64 requests of 30 to 300 tokens in and
    out, 16 at a time, prompts counted. A row that is free takes the next request, against batches that wait for their
    longest."""
    import random

    import torch

    import decode
    from model import PRESETS, Llama
    device, dtype, _ = precision(cfg.device)
    dtype = dtype if device.type == "cuda" else torch.float32  # of which decode.py takes what is faster
    model = decode.to_decode(Llama(replace(PRESETS["stories15m"], context=600)).to(device, dtype).eval(), rows=16)
    rng = random.Random(0)
    asked = [([rng.randrange(model.config.vocab_size) for _ in range(rng.randint(30, 300))], rng.randint(30, 300))
             for _ in range(64)]
    tokens = sum(new for _, new in asked)

    def refilled():
        batch = decode.Batch(model, rows=16)
        for ids, new in asked:
            batch.add(ids, new, temperature=0)
        while batch.busy:
            batch.step()

    def static():
        for start in range(0, 64, 16):
            some = asked[start:start + 16]
            T = max(len(ids) for ids, _ in some)
            idx = torch.tensor([ids + [0] * (T - len(ids)) for ids, _ in some], device=device)
            mask = torch.tensor([[1] * len(ids) + [0] * (T - len(ids)) for ids, _ in some], device=device)
            model.generate(idx, max(new for _, new in some), temperature=0, mask=mask)
        wait(device)
    yield Pair(f"64 requests for {tokens:,} tokens, 16 at a time, rows refilled, against batches of 16", refilled,
               static, 1.4, runs=3)


def check_graphs(model):
    """Assert that a model's compiled steps give the logits of its plain ones and, on a GPU, are CUDA graphs."""
    import torch

    from model import KVCache, Llama
    weight, idx, found = model.lm_head.weight, torch.arange(12), []
    idx = idx.to(weight.device)
    with torch.inference_mode():
        for step in model.decode_one_token, partial(Llama.decode_one_token, model):
            cache, logits = KVCache(model.config, 1, 256, weight.device, weight.dtype), []
            for tensor in (cache.lengths, *cache.keys, *cache.values):
                torch._dynamo.mark_static_address(tensor)
            model(idx[None, :4], cache=cache)
            for token in idx[4:]:
                logits.append(step(token[None], cache).float().cpu())
            found.append(torch.cat(logits))
    assert (found[0] - found[1]).std() < 0.1 * found[1].std(), "compiled steps give other logits"
    skips = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
    assert weight.device.type == "cpu" or not skips, f"{skips} graphs are no CUDA graphs"


def llama_cpp(cfg, state, idx, new, kind, ours):
    """A Pair with llama.cpp at float32, if it is installed and the `gguf` package to write its file."""
    try:
        import gguf
        import llama_cpp
    except ImportError as e:
        print(f"{'decode':<12} left out: {e.name} is not installed", flush=True)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "model.gguf")
        w = gguf.GGUFWriter(path, "llama")
        for key, value in dict(context_length=cfg.context, embedding_length=cfg.dim, block_count=cfg.n_layer,
                               head_count=cfg.n_head, head_count_kv=cfg.n_kv_head,
                               feed_forward_length=cfg.ffn_dim, layer_norm_rms_eps=cfg.norm_eps,
                               rope_dimension_count=cfg.head_dim, rope_freq_base=cfg.rope_theta).items():
            getattr(w, f"add_{key}")(value)
        w.add_tokenizer_model("llama")
        w.add_token_list([f"<{i}>" for i in range(cfg.vocab_size)])
        w.add_token_scores([0.0] * cfg.vocab_size)
        w.add_token_types([gguf.TokenType.NORMAL] * cfg.vocab_size)
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, cfg.n_layer)
        for name, t in state.items():
            if name != "lm_head.weight" or not cfg.tie_embeddings:
                w.add_tensor(names.get_name(name, try_suffixes=(".weight",)), t.float().contiguous().cpu().numpy())
        w.write_header_to_file()
        w.write_kv_data_to_file()
        w.write_tensors_to_file()
        w.close()
        other = llama_cpp.Llama(path, n_ctx=cfg.context, n_threads=os.cpu_count(), n_threads_batch=os.cpu_count(),
                                verbose=False, logits_all=False)

        def theirs():
            other.reset()
            other.eval(idx[0].tolist())
            for _ in range(new - 1):
                other.eval([other.sample(temp=0.0)])
        yield Pair(kind + f"against llama.cpp {llama_cpp.__version__} in float32", ours, theirs, 1.0, runs=3)


@row
def long_context(cfg):
    """Attention in chunks of 512: forward and backward of one layer, 1,024 and 16,384 tokens (65,536 on a GPU)."""
    import torch

    from model import Block, LlamaConfig, rope_angles
    device, _, autocast = precision(cfg.device)
    shape = LlamaConfig(arch="llama4", dim=256, n_head=4, n_kv_head=2, n_layer=1, ffn_dim=512, chunk=512,
                        vocab_size=64, context=65536)
    torch.manual_seed(0)
    block = as_trained(Block(shape, 0).to(device))
    for p in block.parameters():
        torch.nn.init.normal_(p, std=0.02)

    def work(length):
        x, positions = torch.randn(1, length, 256, device=device), torch.arange(length, device=device)
        rope = rope_angles(shape, positions)

        def once():
            with autocast():
                block(x, rope, positions)[0].float().sum().backward()
            wait(device)
        return once
    times = 16 if cfg.device == "cpu" else 64
    short, whole = work(1024), work(1024 * times)
    what = f"a layer with chunks of 512: {1024 * times:,} tokens at once against {times} times 1,024"
    yield Pair(what, whole, lambda: [short() for _ in range(times)], 1 / 1.2)
    if cfg.device != "cpu":
        yield Pair(f"{what}, memory", peak_memory(whole), lambda: times * peak_memory(short)(), 1 / 1.2, unit="GiB")


@row
def start_up(cfg):
    """From the start of the process to what one waits for."""
    import subprocess

    def command(*words, until=None):
        start = time.perf_counter()
        with subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=subprocess.PIPE,
                              stderr=subprocess.DEVNULL) as process:
            seen = b""
            while chunk := process.stdout.read1(1):
                seen += chunk
                if until and seen.startswith(until) and len(seen) > len(until) + 1:
                    took = time.perf_counter() - start
                    process.kill()
                    return took
            if until or process.wait():
                raise Skip(f"{' '.join(words)} did not do what it should")
            return time.perf_counter() - start
    yield Pair("`train.py -h` against 1 s", lambda: command("train.py", "-h"), lambda: 1.0, 1.0)
    from model import PRESETS, Llama
    from prepare import tokenizer
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.load(real_data("tokenizers/llama2_tokenizer.model")).save(folder)
        Llama(PRESETS["stories15m"]).save_pretrained(folder)
        start = "Once upon a time"
        yield Pair("`sample.py` of stories15m's size: first token, against 4 s",
                   lambda: command("sample.py", f"--init_from={folder}", f"--start={start}", "--device=cpu",
                                   until=start.encode()),
                   lambda: 4.0, 1.0, runs=3)


@row
def overhead(cfg):
    """What train.py's loop costs beside forward, backward and optimizers, and what its evaluations cost, with
    config/tales.py."""
    import optim
    import runs
    import train
    from prepare import shards, tokenizer
    from prepare.windows import Windows
    device, dtype, autocast = precision(cfg.device)
    folder = ROOT / "data/tales"
    if not folder.is_dir():
        raise Skip("run prepare/tales.py first")
    words = [str(ROOT / "config/tales.py"), f"--device={cfg.device}"]
    settings, shape = config.load(train.TrainConfig, words, "model.py:LlamaConfig")
    tok, steps = tokenizer.load(folder), 40
    windows = {name: Windows(shards.Split(folder, name), settings, tok.bos_id) for name in ("train", "val")}
    place = train.Place(settings, device, dtype)
    model = as_trained(train.build_model(settings, shape, [windows["val"].split], tok, None, place).train())
    optimizers = optim.make_optimizers(model, settings, device, dtype)
    draws = [windows["train"].draw(i * settings.batch_size, settings.batch_size) for i in range(steps)]
    batches = [common.to_device(device, *windows["train"].read(spans)) for spans in draws]

    def bare():
        for x, y, _ in batches:
            with autocast():
                loss = model(x, y)[1]
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        wait(device)

    def loop():
        """The seconds of `steps` steps, from the loop's own log."""
        with tempfile.TemporaryDirectory() as name, redirect_stdout(StringIO()):
            train.main(replace(settings, max_iters=steps + 1, eval_interval=steps + 1, eval_tokens=256,
                               sample_tokens=0, log_interval=1, out_dir=f"{name}/run"), shape)
            log = [r for r in runs.read_log(Path(name) / "run/log.jsonl") if "train_loss" in r]
        return log[-1]["seconds"] - log[0]["seconds"]
    yield Pair(f"{steps} steps of train.py, a log line at each, against forward, backward and optimizers alone",
               loop, bare, 0.97, runs=3)
    evaluations = -(-settings.max_iters // settings.eval_interval)

    def evaluate():
        batches = train.eval_batches(windows["val"], train.eval_spans(windows["val"], device, settings.eval_tokens))
        return evaluations * seconds(lambda: train.evaluate(model, batches, device, autocast()))
    yield Pair(f"the run's {evaluations} evaluations against a tenth of its {settings.max_iters} steps", evaluate,
               lambda: settings.max_iters / steps * seconds(bare) / 10, 1.0, runs=3)


@row
def busy(cfg):
    """Training steps beside one other busy program, against 2.5 times the quiet step; what watching for it costs."""
    alone = "import common; common.IdleThreads.adapt = lambda *_: None; "

    def step(words, steps, beside=False, first=""):
        """The median seconds of a step of a run of its own."""
        other = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if beside else None
        with tempfile.TemporaryDirectory() as folder:
            argv = [*words, f"--out_dir={folder}/run", f"--max_iters={steps}", f"--eval_interval={steps}",
                    "--eval_tokens=200", "--log_interval=1", "--device=cpu"]
            code = f"import sys, runpy; sys.path.insert(0, ''); {first}sys.argv = {argv!r}; " \
                   f"runpy.run_path({words[0]!r}, run_name='__main__')"
            done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
            if other:
                other.kill()
                other.wait()
            if done.returncode:
                raise Skip(f"{' '.join(words)}: {done.stderr[-300:]}")
            log = [json.loads(line) for line in (Path(folder) / "run/log.jsonl").read_text().splitlines()]
        at = [entry["seconds"] for entry in log if "train_loss" in entry]
        return statistics.median(after - before for before, after in zip(at[2:], at[3:]))

    smollm2 = ["train.py", "--init_from=out/smollm2", "--dataset=smollm2_text", "--block_size=256", "--batch_size=4",
               "--sample_tokens=0"]
    for words, steps, needs in ((["train.py", "config/tales.py", "--sample_tokens=0"], 40, "data/tales"),
                                (["vlm.py", "config/vlm_shapes.py"], 40, "data/shapes"),
                                (smollm2, 10, "data/smollm2_text")):
        if not (ROOT / needs).is_dir():
            print(f"busy: {needs} is not there: prepare it first")
            continue
        name = words[1].removeprefix("config/")
        yield Pair(f"{name}: a step beside a busy process, against 2.5 quiet ones", lambda: step(words, steps, True),
                   lambda: 2.5 * step(words, steps), 1.0, runs=1, warmup=False)  # each is a median of its steps
        yield Pair(f"{name}: a quiet step, against one whose threads always wait in a loop", lambda: step(words, steps),
                   lambda: step(words, steps, first=alone), 0.97, runs=1, warmup=False)


if __name__ == "__main__":
    config.run(main, sys.argv[1:])
