"""Fast decoding: what is done to a plain Llama, from outside, so that it writes text quickly.

    model = to_decode(Llama.from_pretrained(directory, torch.float32))    packed, or rounded to 8 or 4 bits
    answers = decode_all(model, prompts, max_new_tokens=100)              many at once, a free row takes the next
"""
import functools
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn as nn

import checkpoint
import config
from common import pick_dtype
from model import KVCache, Linear, Llama, RMSNorm, Sampling, product_dtype, without_gradients

LEAST_BITS = {"router": 32, "lm_head": 8, "v_proj": 8, "down_proj": 8}  # with fewer the loss rises most, for little


# -- weights -----------------------------------------------------------------------------------------------------

class PackedLinear(nn.Module):
    """x W^T with W (out, in) cut into panels of 16 outputs, each stored as (in, 16): for a few rows on a CPU.

    The product of one row with a whole matrix runs on one core, at a fifth of the memory's bandwidth; a batch of
    products with panels runs on all of them, and a panel's 16 running sums stay in registers.
    """
    WIDTH = 16
    large = torch.float32  # dtype of products with more than 64 rows; `to_decode` may have another

    def __init__(self, panels):
        """panels (n, in, 16), as `stored` makes them."""
        super().__init__()
        self.weight = nn.Parameter(panels)  # with a gradient, or autocast would cast it anew at each call

    @classmethod
    def stored(cls, weight):
        """The panels of a matrix (out, in)."""
        return (weight.unflatten(0, (-1, cls.WIDTH)).mT.contiguous(),)

    def forward(self, x):
        """x (..., in) -> (..., out)."""
        rows = x.flatten(0, -2)  # (rows, in)
        if len(rows) > 64:  # a prompt: one large product is faster, even after putting W together again
            return (x.to(self.large) @ self.weight.to(self.large).transpose(0, 1).flatten(1)).to(x.dtype)
        y = torch.bmm(rows.expand(len(self.weight), -1, -1), self.weight)  # (n, rows, 16)
        return y.transpose(0, 1).reshape(*x.shape[:-1], -1)

    def rows(self, idx):
        """Rows idx (...) of W, (..., in)."""
        return self.weight[idx // self.WIDTH, :, idx % self.WIDTH]


@functools.cache
def product_units():
    """The dtype of large products that is fastest on this processor."""
    return pick_dtype("auto", torch.device("cpu"))[0]


class Int8Linear(nn.Module):
    """x W^T with W (out, in) in 8 bits, one scale for each output: W[n] = weight[n] * scale[n]."""

    FEW = 16  # rows; more are one product with the whole matrix, which is then faster even with making it

    def __init__(self, weight, scale):
        """weight (out, in) int8, scale (out,) bfloat16, as `stored` makes them."""
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("scale", scale)

    @staticmethod
    def stored(weight):
        """weight and scale for a matrix (out, in)."""
        scale = (weight.abs().amax(1) / 127).bfloat16()  # the kernel's; rounded first, so that weight makes up for it
        scale = torch.where(scale == 0, 1, scale)
        return (weight / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8), scale

    def whole(self):
        """W (out, in) in float32."""
        return self.weight.float() * self.scale.float()[:, None]

    def product(self, x):
        """x (rows, in) bfloat16, aligned -> (rows, out)."""
        return torch._weight_int8pack_mm(x, self.weight, self.scale)

    def forward(self, x):
        """x (..., in) -> (..., out). The kernel wants bfloat16 (15 to 30 times as fast as others) at a multiple of 32
        bytes, where a new tensor is, and would crash elsewhere."""
        rows = x.reshape(-1, x.shape[-1])  # (rows, in)
        if 0 < len(rows) <= self.FEW:
            y = self.product(rows.to(torch.bfloat16, copy=True, memory_format=torch.contiguous_format))
        else:
            y = nn.functional.linear(rows.to(product_units()), self.whole().to(product_units()))
        return y.to(x.dtype).view(*x.shape[:-1], len(self.weight))

    def rows(self, idx):
        """Rows idx (...) of W, (..., in)."""
        return self.weight[idx].float() * self.scale[idx].float()[..., None]


class Int4Linear(Int8Linear):
    """x W^T with W (out, in) in 4 bits: (q - 8) * scale + zero, with one scale and zero for 32 inputs of an output."""

    GROUP = 32  # the smallest the kernel knows, and divides Llama's widths

    def __init__(self, weight, scale):
        """weight (out, in / 2) uint8, two inputs in one number; scale (in / 32, out, 2) bfloat16: scale and zero."""
        super().__init__(weight, scale)
        self.register_buffer("laid_out", None, persistent=False)  # for this processor, so it is never saved

    @classmethod
    def stored(cls, weight):
        """weight and scale for a matrix (out, in)."""
        groups = weight.float().unflatten(1, (-1, cls.GROUP))  # (out, n, 32)
        low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
        scale = torch.where(high == low, low.abs() / 8, (high - low) / 15)  # equal weights want some scale too
        scale = scale.bfloat16().float()  # rounded first, as the kernel has both in bfloat16
        scale = torch.where(scale == 0, 1, scale)
        zero = (low + 8 * scale).bfloat16().float()
        q = ((groups - zero) / scale).round().add(8).clamp(0, 15).flatten(1).to(torch.uint8)  # (out, in)
        return q[:, ::2] | q[:, 1::2] << 4, torch.cat((scale, zero), 2).transpose(0, 1).bfloat16().contiguous()

    def unpacked(self):
        """q (out, in) uint8."""
        return torch.stack((self.weight & 15, self.weight >> 4), -1).flatten(1)

    def whole(self):
        scale, zero = self.scale.float().transpose(0, 1)[..., None].unbind(2)  # (out, n, 1) each
        return ((self.unpacked().float().unflatten(1, (-1, self.GROUP)) - 8) * scale + zero).flatten(1)

    def product(self, x):
        if self.laid_out is None:
            self.laid_out = torch._convert_weight_to_int4pack_for_cpu(self.unpacked().int(), 1)
        return torch._weight_int4pack_mm_for_cpu(x, self.laid_out, self.GROUP, self.scale)


class TiedEmbedding(nn.Module):
    """Rows of the W that a packed head holds, of which there is no other copy."""

    def __init__(self, head):
        super().__init__()
        self.weight, self.rows = head.weight, head.rows

    def forward(self, idx):
        """idx (...) -> (..., in)."""
        return self.rows(idx)


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


def kind_for(name, shape, bits):
    """The class that takes the place of a Linear called `name` in decoding: of so many bits, or of more where that
    costs little time and much of the loss, or where its shape (out, in) allows no fewer. None: leave it."""
    outputs, inputs = shape
    bits = max(bits, LEAST_BITS.get(name, 4))
    if bits == 4 and inputs % Int4Linear.GROUP == 0 and outputs % 16 == 0:
        return Int4Linear
    if bits <= 8 and inputs % 16 == 0:  # the kernel crashes with others
        return Int8Linear
    return PackedLinear if outputs % PackedLinear.WIDTH == 0 else None


def pack(model, bits=32):
    """Replace norms and matrices of a float32 model on a CPU, which then learns no more, and which `save_quantized`
    alone can save. bits 8 or 4: matrices are rounded, but for routed experts."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, RMSNorm):
                setattr(module, name, QuickNorm(child))
            elif isinstance(child, Linear) and (kind := kind_for(name, child.weight.shape, bits)):
                setattr(module, name, kind(*kind.stored(child.weight.detach())))
    if model.config.tie_embeddings and isinstance(model.lm_head, (PackedLinear, Int8Linear)):
        model.model.embed_tokens = TiedEmbedding(model.lm_head)


def check_quantize(device):
    """Raise `config.Mistake` where products of 8 and 4 bits are not to be had, or are slower than plain ones."""
    here = torch.backends.cpu.get_cpu_capability()
    if device.type != "cpu" or here not in ("AVX2", "AVX512"):
        what = f"this one is {here}" if device.type == "cpu" else f"not on {device.type}: add --device=cpu"
        raise config.Mistake(f"rounded weights want an x86 processor with AVX2; {what}")


# -- rounded weights in a directory ------------------------------------------------------------------------------

def own_state(model):
    """The model's state_dict, tied weights once."""
    tied = ("model.embed_tokens.weight",) if model.config.tie_embeddings else ()
    return {name: t for name, t in model.state_dict().items() if name not in tied}


def save_quantized(model, bits, directory):
    """Write a model that `pack` has rounded to so many bits; only `load_quantized` reads it."""
    hf = checkpoint.config_to_hf(model.config, "float32")
    hf["quantization_config"] = {"quant_method": checkpoint.METHOD, "bits": bits}
    checkpoint.write(directory, hf, own_state(model))


def bits_of(directory):
    """The bits of the weights that `save_quantized` wrote into a directory; 0 where it wrote none."""
    file = Path(directory) / "config.json"
    how = checkpoint.read_json(file).get("quantization_config") if file.exists() else None
    return how.get("bits") if isinstance(how, dict) and how.get("quant_method") == checkpoint.METHOD else 0


def load_quantized(directory):
    """The model that `save_quantized` wrote, on the CPU. Raises ValueError for what it would not have written."""
    hf, state = checkpoint.read_json(Path(directory) / "config.json"), checkpoint.read_tensors(Path(directory))
    bits = hf.pop("quantization_config").get("bits")
    with torch.device("meta"):
        model = Llama(checkpoint.config_from_hf(hf, {}))
    if bits not in (4, 8):
        raise ValueError(f"{directory}: bits must be 4 or 8, not {bits!r}")
    pack(model, bits)
    want = own_state(model)
    wrong = [name for name in want.keys() & state.keys()
             if (state[name].shape, state[name].dtype) != (want[name].shape, want[name].dtype)]
    checkpoint.refuse(directory, {"missing": want.keys() - state.keys(), "unexpected": state.keys() - want.keys(),
                                  f"not of the shape and type that {bits} bits want": wrong})
    if model.config.tie_embeddings:
        state["model.embed_tokens.weight"] = state["lm_head.weight"]
    model.allocate("cpu").load_state_dict(state)  # copied: a file has tensors anywhere, the kernels want 32 bytes
    return model.eval()


# -- a compiled step ---------------------------------------------------------------------------------------------

class CachePool:
    """The caches of a compiled step: of few sizes, and kept, as a CUDA graph knows where they are."""

    def __init__(self, model):
        self.model, self.free = model, {}

    def stream(self, prompt, max_new_tokens=1, *args, cache=None, **how):
        """`Llama.stream` with a cache of the pool where none is given."""
        weight, key = self.model.lm_head.weight, None
        if cache is None:
            size = max(256, min(prompt.shape[1] + max_new_tokens, self.model.config.context))
            key = len(prompt), power_of_two(size), weight.device, product_dtype(weight)
            cache = self.free.pop(key, None) or KVCache(self.model.config, *key)
        for tensor in (cache.lengths, *cache.keys, *cache.values):
            torch._dynamo.mark_static_address(tensor)
        try:
            yield from Llama.stream(self.model, prompt, max_new_tokens, *args, cache=cache, **how)
        finally:  # also when the stream is abandoned
            if key:
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


def to_decode(model, compile=False, bits=32, rows=0):
    """Make a Llama's generation fast; returns the model, which may be another one.

    On a CPU float32 matrices are packed. With rows, products are free to be what is fast on this processor: those of
    prompts, and all of them if a step of so many rows takes less time in bfloat16. compile: see `compile_step`. bits:
    see `pack`; ValueError where it cannot be.
    """
    weight, ready = model.lm_head.weight, isinstance(model.lm_head, (PackedLinear, Int8Linear))
    if weight.device.type == "cpu" and weight.dtype == torch.float32 and not ready:
        half = bfloat16_copy(model) if rows and bits == 32 and product_units() == torch.bfloat16 else None
        pack(model, bits)
        for module in model.modules() if rows else ():
            if isinstance(module, PackedLinear):
                module.large = product_units()
        if half and seconds_of_step(half, rows) < seconds_of_step(model, rows):
            model = half
    elif bits < 32:
        raise ValueError(f"{bits} bits are made of plain float32 weights on a CPU")
    if compile:
        compile_step(model)
    return model


def bfloat16_copy(model):
    """A Llama with the same weights in bfloat16."""
    with torch.device("meta"):
        half = Llama(model.config)
    half.load_state_dict({name: t.bfloat16() for name, t in model.state_dict().items()}, assign=True)
    if model.config.tie_embeddings:
        half.lm_head.weight = half.model.embed_tokens.weight
    return half.eval()


def seconds_of_step(model, rows):
    """The least time of a few steps of so many rows."""
    times = [time.perf_counter() for _ in model.stream(torch.zeros(rows, 1, dtype=torch.long), 6, temperature=0)]
    return min((after - before for before, after in zip(times, times[1:])), default=0.0)


def dtype_to_decode(name, device):
    """The torch.dtype to read weights in for decoding alone: on a CPU float32, to be packed or, where faster, halved.
    """
    return torch.float32 if name == "auto" and device.type == "cpu" else pick_dtype(name, device)[0]


def new_cache(model, rows, size):
    """An empty KVCache in the dtype of a model's products, which rounded weights do not tell."""
    device = model.lm_head.weight.device
    x = model.model.embed_tokens(torch.zeros(1, dtype=torch.long, device=device))
    return KVCache(model.config, rows, size, device, product_dtype(x))


# -- many requests at once ---------------------------------------------------------------------------------------

@dataclass(eq=False)
class Request:
    """A prompt to continue, how, and its continuation so far."""
    prompt: object  # ids, or a tensor (T, D) of embeddings, as a text with pictures has
    max_new_tokens: int
    stop_ids: frozenset  # a token of these is the last
    sampling: Sampling  # same seed, same tokens, whatever runs beside it (but for rounding)
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
    TOGETHER = 2048  # tokens of prompts that are read at once, unless one is longer: more gain no speed

    def __init__(self, model, rows=16, size=None):
        """size: tokens of the longest request, prompt included; None: the model's context."""
        context = model.config.context
        self.model, self.rows, self.size = model, rows, min(size or context, context)
        self.cache = new_cache(model, rows, self.size)
        self.waiting, self.running = deque(), []  # that which runs in row i is running[i]

    def add(self, prompt, max_new_tokens, stop_ids=frozenset(), seed=0, **sampling):
        """Queue a `Request`, with fields of `Sampling`. Raises ValueError for a prompt that leaves it no room."""
        if not 0 < len(prompt) < self.size:
            raise ValueError(f"a prompt of {len(prompt)} tokens: it takes 1 to {self.size - 1} here")
        new = min(max_new_tokens, self.size - len(prompt))
        request = Request(prompt, new, stop_ids, Sampling(seed=seed, **sampling), done=new < 1)
        request.generator = request.sampling.generator("cpu")  # a number a token: those of all rows go as one copy
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
        return any(not request.done for request in (*self.waiting, *self.running))

    @without_gradients
    def step(self):
        """[(request, its next token), ...]. Where rows are free and requests wait: the first token of each that takes
        one. Else the next token of each that runs."""
        fresh = []  # rows that take the next in line
        for row in range(self.rows):
            if self.waiting and (row == len(self.running) or self.running[row].done):
                self.running[row:row + 1] = [self.waiting.popleft()]
                fresh.append(row)
        if fresh:
            requests = [self.running[row] for row in fresh]
            return self.draw(requests, self.read([request.prompt for request in requests], fresh))
        self.close_up()
        if not self.running:
            return []
        last = torch.tensor([request.new[-1] for request in self.running], device=self.cache.lengths.device)
        return self.draw(self.running, self.model.decode_one_token(last, self.cache.part(slice(len(self.running)))))

    def read(self, prompts, rows):
        """Put each prompt into a row of the cache, which begins anew; returns the logits (n, V) of what follows them.

        Prompts of similar lengths are read together. One that several requests share (the same object) is read once."""
        rows_of, logits = {}, {}  # by the prompt's id()
        for prompt, row in zip(prompts, rows):
            rows_of.setdefault(id(prompt), []).append(row)
        different = sorted({id(p): p for p in prompts}.values(), key=len)
        while different:
            longest = len(different[-1])
            part = [p for p in different[-max(self.TOGETHER // longest, 1):] if 2 * len(p) > longest]
            del different[-len(part):]
            row = rows_of[id(part[0])][0]
            in_place = len(part) == 1  # a long prompt takes no second cache
            cache = self.cache.part(slice(row, row + 1)) if in_place else new_cache(self.model, len(part), longest)
            for i, (prompt, following) in enumerate(zip(part, self.prefill(part, cache))):
                logits[id(prompt)] = following
                if to := [other for other in rows_of[id(prompt)] if not (in_place and other == row)]:
                    self.cache.lengths[to] = len(prompt)
                    for mine, read in zip((*self.cache.keys, *self.cache.values), (*cache.keys, *cache.values)):
                        mine[to, :len(prompt)] = read[i, :len(prompt)].clone()  # it may be a view of the same tensor
        return torch.stack([logits[id(prompt)] for prompt in prompts])

    def prefill(self, prompts, cache):
        """Put these prompts into a cache, which begins anew; returns the logits (n, V) of what follows them."""
        embeds = [p if torch.is_tensor(p) and p.is_floating_point() else self.model.model.embed_tokens(
            torch.as_tensor(p, device=cache.lengths.device)) for p in prompts]  # (T, D) each
        x = nn.utils.rnn.pad_sequence(embeds, batch_first=True)  # (n, T, D)
        lengths = torch.tensor([len(p) for p in prompts], device=x.device)
        cache.lengths.zero_()
        hidden = self.model.model(embeds=x, cache=cache, lengths=lengths)[0]  # (n, T, D)
        return self.model.lm_head(hidden[torch.arange(len(x), device=x.device), lengths - 1])

    def close_up(self):
        """Forget those that are done, and move the last ones into their rows: a step takes no others."""
        count = sum(not request.done for request in self.running)
        free = [row for row in range(count) if self.running[row].done]
        late = [row for row in range(count, len(self.running)) if not self.running[row].done]
        for to, row in zip(free, late):
            length = self.cache.lengths[to] = self.cache.lengths[row]
            for tensor in (*self.cache.keys, *self.cache.values):
                tensor[to, :length] = tensor[row, :length]
            self.running[to] = self.running[row]
        del self.running[count:]

    @staticmethod
    def draw(requests, logits):
        """[(request, its next token), ...] from logits (n, V). Requests with the same settings are drawn together."""
        alike, picked = {}, []
        for row, request in enumerate(requests):
            alike.setdefault(request.sampling, []).append(row)
        for sampling, rows in alike.items():
            tokens = sampling.pick(logits[rows], [requests[row].generator for row in rows])
            picked += zip((requests[row] for row in rows), tokens.tolist())
        for request, token in picked:
            request.new.append(token)
            request.done = token in request.stop_ids or len(request.new) == request.max_new_tokens
        return picked


def decode_all(model, prompts, max_new_tokens, rows=16, seed=0, **how):
    """The continuation of each prompt (ids, or embeddings (T, D)), as a list of ids with the end token, if it came.

    rows: how many run at a time. The i-th prompt has seed + i. how: stop_ids, and fields of `Sampling`.
    """
    size = max(map(len, prompts), default=1) + max_new_tokens
    batch = Batch(model, min(rows, len(prompts)), size)
    requests = [batch.add(prompt, max_new_tokens, seed=seed + i, **how) for i, prompt in enumerate(prompts)]
    while batch.busy:
        batch.step()
    return [request.new for request in requests]


# -- the likeliest text ------------------------------------------------------------------------------------------

@without_gradients
def beam_search(model, prompt, max_new_tokens, beams, stop_ids=frozenset()):
    """The continuation of a prompt (ids, or embeddings (T, D)) whose tokens have the highest mean log-probability among
    those that a search with so many beams finds: ids with the end token, if it came. As generate(num_beams=...) of
    transformers with its defaults: length_penalty 1, early_stopping False.

    Each step continues the likeliest texts, `beams` of them, by every token. Of what comes out the best that end are
    kept apart, and the best that do not end are the texts of the next step."""
    batch = Batch(model, beams, len(prompt) + max_new_tokens)
    cache, steps = batch.cache, min(max_new_tokens, batch.size - len(prompt))
    logits = batch.read([prompt], [0])  # (1, V); later (n, V), a row for each text
    texts, totals, ended = [[]], torch.zeros(1, device=logits.device), []  # ended: [(mean log-probability, text), ...]
    for step in range(1, steps + 1):
        found = (totals[:, None] + logits.float().log_softmax(-1)).flatten()  # (n·V,)
        best = found.topk(min(max(2, 1 + len(stop_ids)) * beams, len(found)))  # enough, if all those of a text's end
        going = []  # [(sum of log-probabilities, row, token), ...] come first
        for rank, (total, place) in enumerate(zip(best.values.tolist(), best.indices.tolist())):
            row, token = divmod(place, logits.shape[1])
            if token not in stop_ids and step < steps:
                going.append((total, row, token))
            elif rank < beams:
                ended.append((total / step, [*texts[row], token]))
        going = going[:beams]
        ended = sorted(ended, key=lambda text: -text[0])[:beams]
        if not going or len(ended) == beams and going[0][0] / step <= ended[-1][0]:
            break
        texts = [[*texts[row], token] for _, row, token in going]
        rows, tokens = (torch.tensor(column, device=logits.device) for column in list(zip(*going))[1:])
        totals = torch.tensor([total for total, *_ in going], device=logits.device)
        for tensor in (cache.lengths, *cache.keys, *cache.values):
            tensor[:len(rows)] = tensor[rows]
        logits = model.decode_one_token(tokens, cache.part(slice(len(rows))))
    return ended[0][1] if ended else []  # there is no room, or none was asked for
