"""Text from a Llama: from the newest run here, from any run directory, or from a Hugging Face hub name.

    python sample.py --start "Once upon"                    the newest run under out/
    python sample.py --init_from out/tales --num_samples 3
    python sample.py --start FILE:prompt.txt --temperature 0
    python sample.py --init_from out/smollm2 --chat         a conversation, for models with a chat template
    python sample.py --trace --start "Once upon"            each step of one forward pass, with its shape and FLOPs
"""
import os
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import config


@dataclass
class SampleConfig:
    """How to sample."""
    init_from: str | None = None  # a run directory or hub name; None: the newest run under out/
    start: tuple[str, ...] = ()  # the prompt, or several, or FILE:path; none: the beginning of a document
    num_samples: int = 1  # [1, inf) texts for each prompt
    max_new_tokens: int = 256  # [1, inf) longest continuation; a text that ends by itself is shorter
    temperature: float = 0.8  # [0, 1e4] below 1 prefers likely words, which small models need; 0 is greedy
    top_k: int = 0  # [0, inf) keep this many most likely tokens; 0: no limit
    top_p: float = 0.95  # [0, 1] keep the fewest tokens that hold this probability; cuts the tail of nonsense
    min_p: float = 0.0  # [0, 1] keep tokens at least this likely relative to the best; 0: no limit
    seed: int = 1337  # [0, inf) same seed, same text
    chat: bool = False  # talk with the model in its own chat template
    trace: bool = False  # list the steps of one forward pass over the prompt, to learn what happens in a Llama
    system: str | None = None  # system message of the chat; None: the template's own
    device: str = "auto"  # "auto" takes cuda, then mps, then cpu
    compile: bool = False  # a token's step as one graph, on a GPU one CUDA graph: pays after thousands of tokens
    dtype: str = "auto"  # "float32", "bfloat16", "float16"; "auto" takes what is fast here

    def __post_init__(self):
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ValueError(f"dtype must be auto, float32, bfloat16 or float16, not {self.dtype!r}")
        if self.chat and (self.start or self.trace):
            raise ValueError("--chat asks for what you say: leave --start and --trace out")
        if self.system and not self.chat:
            raise ValueError("--system is for --chat")


if __name__ == "__main__":  # read the arguments before torch is imported: a typo answers at once
    settings = config.run(config.load, SampleConfig)

import torch  # noqa: E402
import torch.nn as nn  # noqa: E402

import adapter  # noqa: E402
import lora  # noqa: E402
from checkpoint import find_checkpoint  # noqa: E402
from common import pick_device, pick_dtype  # noqa: E402
from model import Attention, Experts, KVCache, Linear, Llama, RMSNorm, pick, product_dtype  # noqa: E402


# -- fast decoding: done to a plain model from outside -----------------------------------------------------------

class PackedLinear(nn.Module):
    """x W^T with W (out, in) cut into panels of 16 outputs, each stored as (in, 16): for a few rows on a CPU.

    The product of one row with a whole matrix runs on one core, at a fifth of the memory's bandwidth; a batch of
    products with panels runs on all of them, and a panel's 16 running sums stay in registers.
    """
    WIDTH = 16

    def __init__(self, weight):
        super().__init__()
        panels = weight.detach().unflatten(0, (-1, self.WIDTH)).mT.contiguous()  # (n, in, 16)
        self.weight = nn.Parameter(panels)  # with a gradient, or autocast would cast it anew at each call

    def forward(self, x):
        """x (..., in) -> (..., out)."""
        rows = x.flatten(0, -2)  # (rows, in)
        if len(rows) > 64:  # a prompt: one large product is faster, even after putting W together again
            return x @ self.weight.transpose(0, 1).flatten(1)
        y = torch.bmm(rows.expand(len(self.weight), -1, -1), self.weight)  # (n, rows, 16)
        return y.transpose(0, 1).reshape(*x.shape[:-1], -1)


class PackedEmbedding(nn.Module):
    """Rows of the W that a PackedLinear holds, of which there is no other copy."""

    def __init__(self, head):
        super().__init__()
        self.weight = head.weight  # (n, in, 16)

    def forward(self, idx):
        """idx (...) -> (..., in)."""
        return self.weight[idx // PackedLinear.WIDTH, :, idx % PackedLinear.WIDTH]


class QuickNorm(nn.Module):
    """RMSNorm for a few rows on a CPU, where calls are what it costs: four of them, `F.rms_norm` makes nine."""

    def __init__(self, norm):
        super().__init__()
        dim = len(norm.weight)  # x / rms(x) is x * dim^0.5 over the length of x, with eps * dim added to its square
        self.scale = nn.Parameter(norm.weight.detach() * dim ** 0.5, requires_grad=False)
        self.register_buffer("least", torch.tensor((norm.eps * dim) ** 0.5))

    def forward(self, x):
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return x / torch.hypot(length, self.least) * self.scale


def pack(model):
    """Replace norms and matrices of a float32 model on a CPU; it is then no longer fit for training or saving."""
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, RMSNorm):
                setattr(module, name, QuickNorm(child))
            elif isinstance(child, Linear) and child.out_features % PackedLinear.WIDTH == 0:
                setattr(module, name, PackedLinear(child.weight))
    if tied and isinstance(model.lm_head, PackedLinear):
        model.model.embed_tokens = PackedEmbedding(model.lm_head)


def pinned(cache):
    """cache, whose tensors stay where they are, as a CUDA graph wants."""
    for tensor in (cache.lengths, *cache.keys, *cache.values):
        torch._dynamo.mark_static_address(tensor)
    return cache


class CachePool:
    """The caches of a compiled step: of few sizes, and kept, as a CUDA graph knows where they are."""

    def __init__(self, model):
        self.model, self.free = model, {}

    def stream(self, idx=None, max_new_tokens=1, *args, embeds=None, cache=None, **more):
        """`Llama.stream` with a cache of the pool where none is given."""
        def stream(cache):
            return Llama.stream(self.model, idx, max_new_tokens, *args, embeds=embeds, cache=cache, **more)
        if cache is not None:
            yield from stream(pinned(cache))
            return
        prompt, weight = idx if embeds is None else embeds, self.model.lm_head.weight
        size = max(256, min(prompt.shape[1] + max_new_tokens, self.model.config.context))
        key = len(prompt), power_of_two(size), weight.device, product_dtype(weight)
        cache = self.free.pop(key, None) or pinned(KVCache(self.model.config, *key))
        try:
            yield from stream(cache)
        finally:  # also when the stream is abandoned
            cache.lengths.zero_()
            self.free[key] = cache


def power_of_two(n):
    """The least that is not below n."""
    return 1 << (n - 1).bit_length()


def compile_step(model):
    """Have a token's step run as one compiled graph, on a GPU as one CUDA graph; the first takes half a minute."""
    def decode_one_token(token, cache):
        """`Llama.decode_one_token` in which no shape changes: all slots are looked at, and no length is asked for."""
        cache.in_use = cache.size
        positions = cache.lengths[:, None]  # (B, 1)
        masks = cache.mask(positions, 0), cache.mask(positions, model.config.chunk)
        x, _ = model.model.blocks(model.model.embed_tokens(token[:, None]), positions, masks, cache)
        cache.lengths += 1
        return model.lm_head(x[:, 0])
    model.decode_one_token = torch.compile(decode_one_token, mode="reduce-overhead", dynamic=False)
    model.cache_pool = CachePool(model)
    model.stream = model.cache_pool.stream


def to_decode(model, compile=False):
    """Make a Llama's generation fast; returns the model.

    On a CPU float32 matrices are packed: 1.5 to 1.8 times the speed of plain float32, and on processors with
    bfloat16 units 0.8 to 1.4 times that of plain bfloat16, which packing would halve. compile: see `compile_step`.
    """
    weight = model.lm_head.weight
    if weight.device.type == "cpu" and weight.dtype == torch.float32 and not isinstance(model.lm_head, PackedLinear):
        pack(model)
    if compile:
        compile_step(model)
    return model


def dtype_to_decode(name, device):
    """(torch.dtype of products, why), as `pick_dtype`, for a model that only generates."""
    if name == "auto" and device.type == "cpu":
        return torch.float32, "packed: as fast as bfloat16 where there are units for that, far faster elsewhere"
    return pick_dtype(name, device)


# -- many requests at once ---------------------------------------------------------------------------------------

@dataclass(eq=False)
class Request:
    """A prompt to continue, how, and its continuation so far."""
    prompt: object  # ids, or a tensor (T, D) of embeddings, as a text with pictures has
    max_new_tokens: int
    stop_ids: frozenset = frozenset()  # a token of these is the last
    temperature: float = 1.0  # this and the next three: see `model.pick`
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0  # same seed, same tokens, whatever runs beside it (but for rounding)
    new: list = field(default_factory=list)  # ids so far, with the one of stop_ids
    done: bool = False


class Batch:
    """Requests of any lengths, decoded together: `rows` at a time, and a row that is free takes the next in line.

        batch = Batch(model, rows=16, size=600)
        request = batch.add(ids, max_new_tokens=100, temperature=0)
        while batch.busy:
            for request, token in batch.step():
                ...
    """

    def __init__(self, model, rows=16, size=None):
        """size: tokens of the longest request, prompt included; None: the model's context."""
        weight, context = model.lm_head.weight, model.config.context
        self.model, self.size = model, min(size or context, context)
        self.cache = KVCache(model.config, rows, self.size, weight.device, product_dtype(weight))
        self.waiting, self.running = deque(), [None] * rows  # a request for each row of the cache

    def add(self, *args, **kwargs):
        """Queue a `Request` of these fields; returns it. Raises ValueError for a prompt that leaves it no room."""
        request = Request(*args, **kwargs)
        if not 0 < len(request.prompt) < self.size:
            raise ValueError(f"a prompt of {len(request.prompt)} tokens: it takes 1 to {self.size - 1} here")
        request.max_new_tokens = min(request.max_new_tokens, self.size - len(request.prompt))
        request.generator = torch.Generator(self.cache.lengths.device).manual_seed(request.seed)
        request.done = request.max_new_tokens < 1
        if not request.done:
            self.waiting.append(request)
        return request

    def drop(self, request):
        """Forget a request: its row is free, for whoever is next."""
        request.done = True
        if request in self.waiting:
            self.waiting.remove(request)

    @property
    def busy(self):
        """Whether a request waits or runs."""
        return bool(self.waiting) or any(request and not request.done for request in self.running)

    @torch.inference_mode()
    def step(self):
        """[(request, its next token), ...]: the first of each that a row is free for, or else one of each that runs."""
        self.running = [request if request and not request.done else None for request in self.running]
        free = [row for row, request in enumerate(self.running) if request is None]
        first = []
        for row in free[:len(self.waiting)]:
            request = self.running[row] = self.waiting.popleft()
            first += self.draw([request], self.read(request.prompt, row))
        if first:
            return first
        self.close_up()
        running = [request for request in self.running if request]
        if not running:
            return []
        last = torch.tensor([request.new[-1] for request in running], device=self.cache.lengths.device)
        return self.draw(running, self.model.decode_one_token(last, self.cache.part(slice(len(running)))))

    def read(self, prompt, row):
        """Put a prompt into a row of the cache, which begins anew; returns the logits (1, V) of what follows it."""
        cache = self.cache.part(slice(row, row + 1))
        cache.lengths.zero_()
        if not torch.is_tensor(prompt) or not prompt.is_floating_point():
            ids = torch.as_tensor(prompt, device=cache.lengths.device)
            prompt = self.model.model.embed_tokens(ids)
        return self.model.lm_head(self.model.model(embeds=prompt[None], cache=cache)[0][:, -1])

    def close_up(self):
        """Move the last requests into free rows, so that those that run are the first: a step takes no others."""
        count = sum(request is not None for request in self.running)
        free = [row for row in range(count) if self.running[row] is None]
        late = [row for row in range(count, len(self.running)) if self.running[row]]
        for to, row in zip(free, late):
            length = self.cache.lengths[to] = self.cache.lengths[row]
            for tensor in (*self.cache.keys, *self.cache.values):
                tensor[to, :length] = tensor[row, :length]
            self.running[to], self.running[row] = self.running[row], None

    @staticmethod
    def draw(requests, logits):
        """[(request, its next token), ...] from logits (n, V). Requests with the same settings are drawn together."""
        alike, picked = {}, []
        for row, r in enumerate(requests):
            alike.setdefault((r.temperature, r.top_k, r.top_p, r.min_p), []).append(row)
        for how, rows in alike.items():
            wanted = logits if len(rows) == len(logits) else logits[rows]
            tokens = pick(wanted.float(), *how, [requests[row].generator for row in rows])
            picked += zip((requests[row] for row in rows), tokens.tolist())
        for request, token in picked:
            request.new.append(token)
            request.done = token in request.stop_ids or len(request.new) == request.max_new_tokens
        return picked


def decode_all(model, prompts, max_new_tokens, rows=16, seed=0, **how):
    """The continuation of each prompt (ids, or embeddings (T, D)), as a list of ids with the end token, if it came.

    rows: how many run at a time. The i-th prompt has seed + i. how: stop_ids, temperature and so on, as in `Request`.
    """
    size = max(map(len, prompts), default=1) + max_new_tokens
    batch = Batch(model, min(rows, len(prompts)), size)
    requests = [batch.add(prompt, max_new_tokens, seed=seed + i, **how) for i, prompt in enumerate(prompts)]
    while batch.busy:
        batch.step()
    return [request.new for request in requests]


# -- what to sample from -----------------------------------------------------------------------------------------

def newest_run(out=config.ROOT / "out"):
    """The run directory under out/ whose weights were written last."""
    runs = [path for pattern in ("*/config.json", "*/adapter_config.json") for path in out.glob(pattern)]
    if not runs:
        raise config.Mistake(f"no trained model under {out}: train one with `python prepare/tales.py && "
                             "python train.py config/tales.py`, or name one with --init_from")
    return max(runs, key=lambda path: path.stat().st_mtime).parent


def read_prompt(text):
    """The text of a prompt, or of the file it names as FILE:path."""
    if not text.startswith("FILE:"):
        return text
    with config.mistakes(OSError, UnicodeDecodeError, prefix=f"cannot read the prompt {text}: "):
        return Path(text[len("FILE:"):]).read_text(encoding="utf-8")


def load(cfg):
    """(model, tokenizer, directory) ready to sample on the device and in the dtype asked for."""
    directory = Path(cfg.init_from) if cfg.init_from else newest_run()
    device = pick_device(cfg.device)
    dtype, _ = dtype_to_decode(cfg.dtype, device)
    with config.mistakes(ValueError, FileNotFoundError):
        directory = find_checkpoint(directory)
        model = adapter.load(directory, dtype, device)
        if dtype == torch.float32:  # a narrower one would round away much of what an adapter changes
            lora.merge(model)
        model = to_decode(model, cfg.compile)
    tok = adapter.load_tokenizer(directory)
    if tok.vocab_size > model.config.vocab_size:
        raise config.Mistake(f"{directory}: the tokenizer has {tok.vocab_size} tokens, the model "
                             f"{model.config.vocab_size}; they do not belong together")
    return model, tok, directory


# -- text --------------------------------------------------------------------------------------------------------

def fitting(ids, model):
    """ids, if the model's context holds them and at least one more."""
    room = model.config.context - len(ids)
    if not ids or room < 1:
        raise config.Mistake("the prompt is empty" if not ids else f"the prompt has {len(ids)} tokens, and the model's "
                             f"context holds {model.config.context}: shorten it by at least {1 - room}")
    return ids


def write(model, tok, ids, cfg, seed, cache=None, held=0):
    """Generate after ids and print each piece as it comes; returns the new ids. cache: has the first `held` ids."""
    text, new, stops = tok.stream(after=ids), [], tok.stop_ids | set(model.config.eos_ids)
    idx = torch.tensor([ids[held:]], device=model.lm_head.weight.device)
    for token in model.stream(idx, cfg.max_new_tokens, cfg.temperature, cfg.top_k, cfg.top_p, cfg.min_p, stops, seed,
                              cache=cache):
        new.append(token.item())
        print(text.feed(new[-1]) if new[-1] not in stops else "", end="", flush=True)
    print(text.end(), flush=True)
    return new


def complete(model, tok, cfg, title):
    """Continue every prompt num_samples times; title goes first."""
    prompts = [read_prompt(t) for t in cfg.start] or [""]
    if cfg.start and "" in prompts:
        raise config.Mistake("the prompt is empty: give some text, or leave --start out to begin a document")
    encoded = []
    for prompt in prompts:
        ids = tok.encode(prompt, bos=tok.adds_bos or not prompt)
        encoded.append(fitting(ids or tok.encode("\n"), model))  # without a BOS a document begins after a line's end
    print(title, file=sys.stderr)
    count, seconds = 0, 0.0
    for prompt, ids in zip(prompts, encoded):
        for i in range(cfg.num_samples):
            print(prompt, end="", flush=True)
            begin = time.perf_counter()
            new = write(model, tok, ids, cfg, cfg.seed + i)
            count += len(new)
            seconds += time.perf_counter() - begin
            if len(ids) + len(new) == model.config.context and len(new) < cfg.max_new_tokens:
                print(f"(the model's context of {model.config.context} tokens is full)", file=sys.stderr)
            if len(prompts) * cfg.num_samples > 1:
                print("---", flush=True)
    print(f"{count} tokens, {count / seconds:.1f} tokens/s", file=sys.stderr)


class Conversation:
    """A cache and the ids in it: of a conversation that grows, each turn reads only what is new."""

    def __init__(self, model):
        weight = model.lm_head.weight
        self.model, self.ids = model, []
        self.cache = KVCache(model.config, 1, 256, weight.device, product_dtype(weight))

    def reply(self, tok, ids, cfg, seed):
        """`write` after the conversation ids, as they are now; returns the new ids."""
        same = 0
        while same < min(len(self.ids), len(ids) - 1) and self.ids[same] == ids[same]:
            same += 1
        held = self.cache.rewind(same)
        size = min(len(ids) + cfg.max_new_tokens, self.model.config.context)
        if size > self.cache.size:
            self.cache.grow(power_of_two(size))  # seldom, and never back
        new = write(self.model, tok, ids, cfg, seed, self.cache, held)
        self.ids = (ids + new)[:-1]  # the last one was never read
        return new


def chat(model, tok, cfg, title):
    """A conversation until an empty line, Ctrl-C or Ctrl-D; the oldest turns are dropped when the context is full."""
    if not tok.chat_template:
        raise config.Mistake("this model has no chat template; use --start, or a chat model such as "
                             "`python prepare/smollm2.py`")
    print(title, file=sys.stderr)
    system = [{"role": "system", "content": cfg.system}] if cfg.system else []
    turns, conversation, context = [], Conversation(model), model.config.context
    while True:
        try:
            text = input("you> ").strip()
        except (EOFError, KeyboardInterrupt):
            text = ""
        if not text:
            print()
            return
        kept = [*turns, {"role": "user", "content": text}]
        ids = tok.chat(system + kept)
        while len(ids) > context - 16 and len(kept) > 2:
            kept = kept[2:]
            ids = tok.chat(system + kept)
        if len(ids) >= context:
            print(f"that is {len(ids)} tokens, and the model's context holds {context}: shorten it", file=sys.stderr)
            continue
        turns = kept
        print("llama> ", end="", flush=True)
        begin = time.perf_counter()
        new = conversation.reply(tok, ids, cfg, cfg.seed + len(turns))
        print(f"({len(new) / (time.perf_counter() - begin):.1f} tokens/s)", file=sys.stderr)
        turns.append({"role": "assistant", "content": tok.decode([i for i in new if i not in tok.stop_ids])})


# -- what happens in a forward pass ------------------------------------------------------------------------------

def steps_of(model, ids):
    """The steps of a forward pass over ids (T,), in order: (name, shape that comes out, parameters, FLOPs, note).

    FLOPs: 2 for each weight that a row is multiplied with, and 4·d for each key that a query head sees. Parameters of
    tied weights are counted where they are used first."""
    cfg, steps, seen, hooks = model.config, [], set(), []

    def after(name):
        def hook(module, _, output):
            weights = list(module.parameters())
            new = [p for p in weights if p not in seen]
            seen.update(new)
            used = sum(p.numel() for p in weights) if isinstance(module, (Linear, PackedLinear, Experts)) else 0
            used //= cfg.n_experts if isinstance(module, Experts) else 1  # a row goes to one of them
            note = f"chose {output.topk(cfg.top_k).indices.tolist()}" if name.endswith(".router") else ""
            steps.append((name, output.shape, sum(p.numel() for p in new), 2 * used * output.shape[:-1].numel(), note))
        return hook

    def before_o_proj(name, attention):
        def hook(_, inputs):
            keys = sum(t % (attention.chunk or len(ids)) + 1 for t in range(len(ids)))
            note = "no RoPE" if attention.nope else "RoPE"
            note += f", chunks of {attention.chunk}" if attention.chunk else ""
            steps.append((f"{name}.attend", inputs[0].shape, 0, 4 * cfg.n_head * cfg.head_dim * keys, note))
        return hook

    for name, module in model.named_modules():
        if isinstance(module, Attention):
            hooks.append(module.o_proj.register_forward_pre_hook(before_o_proj(name, module)))
        if not list(module.children()) and list(module.parameters()):
            hooks.append(module.register_forward_hook(after(name)))
    with torch.inference_mode():
        model(torch.tensor([ids], device=model.lm_head.weight.device))
    for hook in hooks:
        hook.remove()
    return steps


def trace(model, tok, cfg, title):
    """Print the steps of a forward pass over the first prompt."""
    prompt = read_prompt(cfg.start[0]) if cfg.start else ""
    ids = fitting(tok.encode(prompt, bos=tok.adds_bos or not prompt) or tok.encode("\n"), model)
    print(title, "tokens: " + " ".join(f"{i}={tok.decode([i], special=True)!r}" for i in ids), sep="\n")
    form = "{:<48} {:>16} {:>13} {:>16}  {}"
    print(form.format("step", "shape", "parameters", "FLOPs", ""))
    steps = steps_of(model, ids)
    for name, shape, parameters, flops, note in steps:
        print(form.format(name, " x ".join(map(str, shape)), f"{parameters:,}", f"{flops:,}", note))
    print(form.format("in all", "", *(f"{sum(step[i] for step in steps):,}" for i in (2, 3)), ""))


def main(cfg):
    """Load the model once, then complete, chat or trace."""
    advice = "try --dtype=bfloat16, fewer --max_new_tokens or --device=cpu: "
    with config.mistakes(torch.OutOfMemoryError, prefix=advice):
        model, tok, directory = load(cfg)
        parameters = model.counts()[0]
        if parameters < 10e6:  # they stay in the caches of one core; two would mostly wait for each other
            torch.set_num_threads(1)
        talk = chat if cfg.chat else trace if cfg.trace else complete
        talk(model, tok, cfg, f"{os.path.relpath(directory)}: {parameters:,} parameters")


if __name__ == "__main__":
    config.run(main, settings)
