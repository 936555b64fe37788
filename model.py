"""Every Llama, from Llama 1 to Llama 4, in one file.

A model is described by a `LlamaConfig`; `PRESETS` holds the published ones. Parameters carry Hugging Face's
names and layouts, so `state_dict()` is a Hugging Face state dict and a saved directory is a Hugging Face checkpoint.

    model = Llama(PRESETS["stories15m"])
    logits, loss = model(idx, targets)
    ids = model.generate(idx, max_new_tokens=100)

Letters in shapes: B batch, T positions, D dim, H query heads, K key/value heads, d head_dim, V vocabulary,
F width of a feed-forward, E experts, N tokens (B·T), k experts per token, C chunk, S slots of a cache.

Sources: LLaMA (arXiv:2302.13971), Llama 2 (2307.09288), Llama 3 (2407.21783), RoPE (2104.09864), SwiGLU
(2002.05202), GQA (2305.13245), Switch (2101.03961), balancing by bias (2408.15664), temperature tuning
(2501.19399); for Llama 4, meta-llama/llama-models `models/llama4` and transformers `modeling_llama4.py`.
"""
import contextlib
import functools
import json
import math
import os
import shutil
import tempfile
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


@dataclass
class LlamaConfig:
    """The shape of a Llama. Raises ValueError, naming the field, for a shape that cannot be built."""
    arch: str = "llama"  # "llama" (1 to 3) or "llama4": decides the layout of RoPE and the names of parameters
    vocab_size: int = 32000  # the SentencePiece vocabulary of Llama 1 and 2
    n_layer: int = 32  # this and the next sizes: Llama 7B
    n_head: int = 32  # query heads
    n_kv_head: int = 0  # key/value heads, shared by n_head/n_kv_head query heads each; 0: as many as n_head
    dim: int = 4096  # width of the residual stream
    head_dim: int = 0  # 0: dim / n_head
    ffn_dim: int = 11008  # width of a dense SwiGLU; Llama 1 rounds 2/3 of 4*dim up to a multiple of 256
    context: int = 2048  # longest sequence the model is meant for
    norm_eps: float = 1e-5  # Llama 1 uses 1e-6, all later ones 1e-5
    rope_theta: float = 10000.0  # base of the RoPE wavelengths; longer contexts want a larger one
    rope_scaling: tuple[float, ...] = ()  # Llama 3.1's (factor, low, high, original context); (): no scaling
    tie_embeddings: bool = False  # small models save vocab_size*dim parameters by sharing embedding and head
    bos_id: int | None = None  # token that begins a document; recorded for other tools
    eos_ids: tuple[int, ...] = ()  # tokens that end a generation; recorded for other tools
    nope_every: int = 0  # iRoPE: every n-th layer has no RoPE and full attention (Llama 4: 4); 0: RoPE everywhere
    chunk: int = 0  # RoPE layers attend within chunks of this many positions (Llama 4: 8192); 0: full attention
    qk_norm: bool = False  # weightless RMSNorm of q and k after RoPE, on RoPE layers (Scout: yes, Maverick: no)
    attn_scale: float = 0.0  # temperature tuning of NoPE layers (Llama 4: 0.1); 0: off
    floor_scale: int = 8192  # positions for each step of that temperature
    n_experts: int = 0  # routed experts of a mixture-of-experts layer; 0: every layer is dense
    top_k: int = 1  # routed experts a token visits; one is enough beside the shared expert
    moe_every: int = 1  # every n-th layer is a mixture of experts (Scout 1, Maverick 2)
    expert_dim: int = 0  # width of each routed expert and of the shared one; 0: ffn_dim
    dropout: float = 0.0  # training only: several epochs on little data want 0.1 to 0.2, one epoch wants none
    router_noise: float = 0.0  # training only: std of noise on the logits that select experts; keeps all in play
    router_aux: float = 0.0  # training only: weight of Switch's balancing loss in the gradient (Switch: 0.01)
    router_bias: float = 0.0  # training only: step of the selection bias that balances load without a loss (1e-3)

    def __post_init__(self):
        self.n_kv_head = self.n_kv_head or self.n_head
        self.rope_scaling, self.eos_ids = tuple(self.rope_scaling), tuple(self.eos_ids)
        self.expert_dim = (self.expert_dim or self.ffn_dim) if self.n_experts else 0

        def need(ok, why):
            if not ok:
                raise ValueError(why)
        for f in fields(self):
            value = getattr(self, f.name)
            if f.type in (int, float):  # 0 is allowed where it is the default
                need(type(value) in (int, f.type) and 0 <= value < 2**40 and (value or not f.default),
                     f"{f.name} must be {'a' if f.default else '0 or a'} positive {f.type.__name__}, not {value!r}")
        need(max(self.n_layer, self.n_experts) <= 4096, "more than 4096 layers or experts: no Llama has that many")
        need(self.arch in ("llama", "llama4"), f"arch must be 'llama' or 'llama4', not {self.arch!r}")
        need(self.dim % self.n_head == 0, f"dim={self.dim} is not divisible by n_head={self.n_head}")
        self.head_dim = self.head_dim or self.dim // self.n_head
        need(self.head_dim % 2 == 0, f"head_dim={self.head_dim} must be even: RoPE turns pairs")
        need(self.n_head % self.n_kv_head == 0,
             f"n_head={self.n_head} is not divisible by n_kv_head={self.n_kv_head}")
        need(len(self.rope_scaling) in (0, 4) and all(type(x) in (int, float) and x > 0 for x in self.rope_scaling),
             f"rope_scaling takes (factor, low, high, original context) or (), not {self.rope_scaling}")
        need(all(type(i) is int for i in (*self.eos_ids, self.bos_id or 0)), "bos_id and eos_ids must be token ids, "
             f"not {self.bos_id!r} and {self.eos_ids}")
        need(type(self.tie_embeddings) is type(self.qk_norm) is bool, "tie_embeddings and qk_norm must be bool")
        need(self.top_k <= max(self.n_experts, 1), f"top_k={self.top_k} is more than n_experts={self.n_experts}")
        need(self.dropout < 1, f"dropout={self.dropout} must be below 1")
        new = [n for n in ("nope_every", "chunk", "qk_norm", "attn_scale", "n_experts") if getattr(self, n)]
        need(self.arch == "llama4" or not new, f"{', '.join(new)}: only arch='llama4' has this")
        need(not self.attn_scale or self.nope_every, "attn_scale tunes NoPE layers: it needs nope_every")

    def is_nope(self, layer):
        """Whether layer (0-based) has no RoPE, full attention and a tuned temperature."""
        return self.nope_every > 0 and (layer + 1) % self.nope_every == 0

    def is_moe(self, layer):
        """Whether layer (0-based) is a mixture of experts."""
        return self.n_experts > 0 and (layer + 1) % self.moe_every == 0

    def chunk_of(self, layer):
        """Chunk of layer's attention in positions, 0 where it is full."""
        return 0 if self.is_nope(layer) else self.chunk


def _presets():
    """{name: LlamaConfig} of every published Llama (sources: their config.json) and of this project's own."""
    llama1 = LlamaConfig(norm_eps=1e-6)
    llama2 = LlamaConfig(context=4096)
    size13 = dict(n_layer=40, n_head=40, dim=5120, ffn_dim=13824)
    llama3 = LlamaConfig(vocab_size=128256, n_kv_head=8, ffn_dim=14336, context=8192, rope_theta=5e5)
    size70 = dict(n_layer=80, n_head=64, n_kv_head=8, dim=8192, head_dim=128, ffn_dim=28672)
    size405 = dict(n_layer=126, n_head=128, dim=16384, head_dim=128, ffn_dim=53248)
    llama31 = replace(llama3, context=131072, rope_scaling=(8.0, 1.0, 4.0, 8192.0))
    llama32 = replace(llama31, rope_scaling=(32.0, 1.0, 4.0, 8192.0), tie_embeddings=True)
    stories = LlamaConfig(n_layer=6, n_head=6, n_kv_head=6, dim=288, head_dim=48, ffn_dim=768, context=256,
                          tie_embeddings=True)
    stories110m = replace(stories, n_layer=12, n_head=12, n_kv_head=12, dim=768, head_dim=64, ffn_dim=2048,
                          context=1024)
    smollm2 = LlamaConfig(vocab_size=49152, n_layer=30, n_head=9, n_kv_head=3, dim=576, ffn_dim=1536, context=8192,
                          rope_theta=1e5, tie_embeddings=True)
    scout = LlamaConfig(arch="llama4", vocab_size=202048, n_layer=48, n_head=40, n_kv_head=8, dim=5120, head_dim=128,
                        ffn_dim=16384, context=10485760, rope_theta=5e5, rope_scaling=(16.0, 1.0, 1.0, 8192.0),
                        nope_every=4, chunk=8192, qk_norm=True, attn_scale=0.1, n_experts=16, expert_dim=8192)
    scout128m = replace(scout, vocab_size=32768, n_layer=6, n_head=8, n_kv_head=2, dim=512, head_dim=64, ffn_dim=576,
                        expert_dim=576, context=256, chunk=128, rope_scaling=())
    return {
        "llama-1-7b": llama1, "llama-2-7b": llama2,
        "llama-2-13b": replace(llama2, n_kv_head=40, head_dim=128, **size13),
        "llama-2-70b": replace(llama2, **size70),
        "llama-3-8b": llama3, "llama-3-70b": replace(llama3, **size70), "llama-3.1-8b": llama31,
        "llama-3.1-70b": replace(llama31, **size70), "llama-3.1-405b": replace(llama31, **size405),
        "llama-3.3-70b": replace(llama31, **size70),
        "llama-3.2-1b": replace(llama32, n_layer=16, dim=2048, head_dim=64, ffn_dim=8192),
        "llama-3.2-3b": replace(llama32, n_layer=28, n_head=24, dim=3072, head_dim=128, ffn_dim=8192),
        "tinyllama-1.1b": LlamaConfig(n_layer=22, n_kv_head=4, dim=2048, ffn_dim=5632),
        "smollm2-135m": smollm2,
        "smollm2-360m": replace(smollm2, n_layer=32, n_head=15, n_kv_head=5, dim=960, ffn_dim=2560),
        "smollm2-1.7b": replace(smollm2, n_layer=24, n_head=32, n_kv_head=32, dim=2048, ffn_dim=8192, rope_theta=1.3e5),
        "stories15m": stories,
        "stories42m": replace(stories, n_layer=8, n_head=8, n_kv_head=8, dim=512, head_dim=64, ffn_dim=1376,
                              context=1024),
        "stories110m": stories110m,
        "llama-4-scout": scout,
        "llama-4-maverick": replace(scout, context=1048576, rope_scaling=(), qk_norm=False, n_experts=128, moe_every=2),
        "scout-128m": scout128m,
        "mini-llama": stories110m,
        "llama4-tiny": replace(scout, vocab_size=32000, n_layer=12, n_head=12, n_kv_head=4, dim=768, head_dim=64,
                               ffn_dim=2048, expert_dim=1024, context=2048, chunk=512, n_experts=8, top_k=2,
                               moe_every=2, rope_scaling=()),
    }


PRESETS = _presets()


def rope_frequencies(cfg, device=None):
    """RoPE's angle per position, (d/2,) float32, with Llama 3.1's scaling where cfg has one.

    Wavelengths below original/high stay, those above original/low grow by factor, those between are mixed;
    low == high (Llama 4 Scout) is a step. Source: meta-llama/llama-models `apply_scaling`.
    """
    freq = 1.0 / cfg.rope_theta ** (torch.arange(0, cfg.head_dim, 2, device=device).float() / cfg.head_dim)
    if not cfg.rope_scaling:
        return freq
    factor, low, high, original = cfg.rope_scaling
    turns = original * freq / (2 * math.pi)  # how often a pair turns within the original context
    keep = (turns > high).float() if low == high else ((turns - low) / (high - low)).clamp(0, 1)
    return keep * freq + (1 - keep) * freq / factor


def rope_angles(cfg, positions):
    """cos and signed sin at positions (T,) or (B, T), for `rotate`: (T, d) or (B, 1, T, d) each, float32 at any dtype."""
    angle = positions[..., None].float() * rope_frequencies(cfg, positions.device)
    angle = angle if positions.dim() == 1 else angle[:, None]
    cos, sin, pair = angle.cos(), angle.sin(), -1 if cfg.arch == "llama4" else -2
    return torch.stack((cos, cos), pair).flatten(-2), torch.stack((-sin, sin), pair).flatten(-2)


def rotate(x, cos, sin, interleaved):
    """Turn the pairs (a, b) of x (B, H, T, d) to (a cos - b sin, b cos + a sin), in float32.

    A pair is (x[2i], x[2i+1]) when interleaved (Meta's layout, Llama 4), else (x[i], x[i+d/2]) (Hugging Face's
    layout for Llama 1 to 3, whose q_proj and k_proj rows are permuted to match).
    """
    x32 = x.float()
    other = x32.unflatten(-1, (-1, 2)).flip(-1).flatten(-2) if interleaved else x32.roll(x.shape[-1] // 2, -1)
    return torch.addcmul(x32 * cos, other, sin).type_as(x)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis (arXiv:1910.07467), in float32 inside."""

    def __init__(self, dim, eps):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.eps)


class QuickNorm(nn.Module):
    """RMSNorm for a few rows on a CPU, where calls are what it costs: four of them, `F.rms_norm` makes nine."""

    def __init__(self, norm):
        super().__init__()
        dim = len(norm.weight)  # x / rms(x) is x * dim^0.5 over the length of x, with eps * dim added to its square
        self.scale = nn.Parameter(norm.weight.detach().float() * dim ** 0.5, requires_grad=False)  # still one of `counts`
        self.register_buffer("least", torch.tensor((norm.eps * dim) ** 0.5))

    def forward(self, x):
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        return (x / torch.hypot(length, self.least) * self.scale).type_as(x)


class Panels(nn.Module):
    """x W^T with W (out, in), or several of them, cut into panels of 16 outputs, each stored as (in, 16): for a few rows on a
    CPU.

    The product of one row with a whole matrix runs on one core, at a fifth of the memory's bandwidth; a batch of products
    with panels runs on all of them, and a panel's 16 running sums stay in registers."""
    WIDTH = 16

    def __init__(self, *weights):
        super().__init__()
        self.sizes = [len(w) for w in weights]
        self.weight = nn.Parameter(torch.cat(weights).detach().unflatten(0, (-1, self.WIDTH)).mT.contiguous())  # (n, in, 16)

    def forward(self, x):
        """x (..., in) -> (..., out) of all W side by side."""
        rows = x.flatten(0, -2)
        if len(rows) > 64:  # a prompt: one large product is faster, even after putting W together again
            return x @ self.weight.transpose(0, 1).flatten(1)
        y = torch.bmm(rows.expand(len(self.weight), -1, -1), self.weight)  # (n, rows, 16)
        return y.transpose(0, 1).reshape(*x.shape[:-1], -1)


def project(x, first, *others):
    """What each of several layers makes of x. `Llama.to_decode` leaves one, Panels that hold them all."""
    if isinstance(first, Panels):
        return first(x).split(first.sizes, -1)
    return first(x), *(layer(x) for layer in others)


class TiedEmbedding(nn.Module):
    """Rows of a head's W, of which there is no other copy."""

    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, idx):
        """idx (...) -> (..., in)."""
        return self.head.weight[idx // Panels.WIDTH, :, idx % Panels.WIDTH]


class KVCache:
    """Keys and values of B rows decoded together, preallocated.

    Slot s of a layer holds position s; where attention is chunked, position s modulo chunk, so such a layer never
    keeps more than one chunk. Rows may differ in length: `lengths` (B,) counts the positions seen in each.
    static: for a compiled step, whose shapes and addresses must not change: all slots are always looked at.
    """

    def __init__(self, cfg, batch, size, device=None, dtype=None, static=False):
        self.lengths = torch.zeros(batch, dtype=torch.long, device=device)
        self.rows = torch.arange(batch, device=device)
        self.size, self.step = size, size if static else 64  # slots come into use so many at a time: work grows with what is used
        self.used = self.reach = 0  # tokens, an upper bound of lengths known without asking the device; slots in use
        self.begun = False  # whether the model is to append a token, not to fill in a prompt
        self.kv = [torch.zeros(2, batch, cfg.n_kv_head, min(cfg.chunk_of(i) or size, size), cfg.head_dim,
                               device=device, dtype=dtype) for i in range(cfg.n_layer)]
        for t in (self.lengths, *self.kv) if static else ():
            torch._dynamo.mark_static_address(t)  # a CUDA graph writes to them where they are

    def clear(self):
        """Begin anew, at the same addresses."""
        self.lengths.zero_()
        self.used = self.reach = 0

    def take(self, tokens):
        """Make room for a prompt of so many tokens, later for one; to be called before the model sees them.

        Raises ValueError where they do not fit. Stays out of compiled graphs, to which these numbers are constants."""
        self.begun = self.used > 0
        if tokens > (min(1, self.size - self.used) if self.begun else self.size):
            raise ValueError(f"{tokens} tokens do not fit: a cache takes a prompt, then one token at a time, "
                             f"up to its size of {self.size}")
        self.used += tokens
        self.reach = -(-self.used // self.step) * self.step

    def fill(self, layer, k, v, lengths):
        """Store a prompt's k, v (B, K, T, d); row b is lengths[b] long (None: T) and padded on the right."""
        kv, T = self.kv[layer], k.shape[2]
        S = kv.shape[3]
        if T <= S:
            kv[0, :, :, :T], kv[1, :, :, :T] = k, v
            return
        lengths = torch.full_like(self.lengths, T) if lengths is None else lengths
        start = lengths // S * S  # (B,) where the chunk that the next token continues begins
        source = (start[:, None] + torch.arange(S, device=k.device)).clamp(max=T - 1)  # (B, S)
        source = source[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3])  # (B, K, S, d)
        kv[0], kv[1] = k.gather(2, source), v.gather(2, source)

    def append(self, layer, k, v):
        """Store one token's k, v (B, K, 1, d); returns all k, v (B, K, S, d), of which `mask` tells the visible."""
        kv = self.kv[layer]
        slot = self.lengths if kv.shape[3] == self.size else self.lengths % kv.shape[3]  # (B,)
        new = torch.stack((k, v), 1).squeeze(3).to(kv.dtype)  # (B, 2, K, d)
        kv[:, self.rows, :, slot] = new  # compiled: in place, where scatter_ copies the cache
        return kv[:, :, :, :self.reach].unbind()

    def mask(self, chunk):
        """Which slots the next token sees in layers of this chunk (0: full attention), (B, 1, 1, S) bool."""
        size = min(chunk or self.size, self.size)
        slots = torch.arange(min(size, self.reach), device=self.lengths.device)
        return (slots <= (self.lengths % size)[:, None])[:, None, None]


def attend(q, k, v, mask):
    """Attention of q (B, H, T, d) to what mask (B, 1, T, S) shows of k, v (B, K, S, d) -> (B, H, T, d).

    Without enable_gqa, with which a GPU's fast kernels take no mask."""
    groups = q.shape[1] // k.shape[1]
    if groups > 1 and q.shape[2] == 1:  # all queries of a group see the same, as if they were positions
        q = q.unflatten(1, (-1, groups)).squeeze(3)  # (B, K, H/K, d)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).flatten(1, 2)[:, :, None]
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)  # (B, H, S, d)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class Attention(nn.Module):
    """Causal grouped-query attention of one layer: RoPE or NoPE, full or chunked."""

    def __init__(self, cfg, layer):
        super().__init__()
        self.cfg, self.layer, self.nope, self.chunk = cfg, layer, cfg.is_nope(layer), cfg.chunk_of(layer)
        self.q_proj = nn.Linear(cfg.dim, cfg.n_head * cfg.head_dim, bias=False)
        self.k_proj = nn.Linear(cfg.dim, cfg.n_kv_head * cfg.head_dim, bias=False)
        self.v_proj = nn.Linear(cfg.dim, cfg.n_kv_head * cfg.head_dim, bias=False)
        self.o_proj = nn.Linear(cfg.n_head * cfg.head_dim, cfg.dim, bias=False)

    def forward(self, x, rope, positions, mask, cache, lengths):
        """x (B, T, D) -> (B, T, D); see Decoder.forward for the rest."""
        cfg, (B, T, _) = self.cfg, x.shape
        q, k, v = (t.view(B, T, -1, cfg.head_dim).transpose(1, 2)  # (B, H, T, d), k and v (B, K, T, d)
                   for t in project(x, self.q_proj, self.k_proj, self.v_proj))
        if not self.nope:
            q, k = (rotate(t, *rope, interleaved=cfg.arch == "llama4") for t in (q, k))
            if cfg.qk_norm:
                q, k = (F.rms_norm(t, t.shape[-1:], eps=cfg.norm_eps) for t in (q, k))
        elif cfg.attn_scale:
            heat = 1 + cfg.attn_scale * torch.log1p(((positions + 1) // cfg.floor_scale).float())
            q = (q * (heat[:, None] if positions.dim() == 1 else heat[:, None, :, None])).type_as(q)
        if cache is not None and cache.begun:
            k, v = cache.append(self.layer, k, v)
        elif cache is not None:
            cache.fill(self.layer, k, v, lengths)
        gqa = cfg.n_kv_head != cfg.n_head
        if mask is not None:
            y = attend(q, k, v, mask)
        elif self.chunk and T > self.chunk:  # chunks beside each other on the batch axis, the last one padded
            n = -(-T // self.chunk)
            q, k, v = (F.pad(t, (0, 0, 0, n * self.chunk - T)).unflatten(2, (n, -1)).transpose(1, 2).flatten(0, 1)
                       for t in (q, k, v))  # (B·n, H, C, d)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
            y = y.unflatten(0, (B, n)).transpose(1, 2).flatten(2, 3)[:, :, :T]  # (B, H, T, d)
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)): the dense feed-forward, and the shared expert."""

    def __init__(self, dim, width):
        super().__init__()
        self.gate_proj = nn.Linear(dim, width, bias=False)
        self.up_proj = nn.Linear(dim, width, bias=False)
        self.down_proj = nn.Linear(width, dim, bias=False)

    def forward(self, x):
        gate, up = project(x, self.gate_proj, self.up_proj)
        return self.down_proj(F.silu(gate) * up)


def product_dtype(x):
    """The dtype of products with x: autocast's where that is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def grouped_mm(x, weight, ends):
    """F.grouped_mm; outside of a compiled graph where torch's compiler does not know it: in all but bfloat16."""
    known = x.dtype == torch.bfloat16 or not torch.compiler.is_compiling()
    return (F.grouped_mm if known else torch.compiler.disable(F.grouped_mm))(x, weight, offs=ends)


class Experts(nn.Module):
    """E SwiGLUs side by side, run over tokens that are sorted by expert."""

    def __init__(self, n_experts, dim, width):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(n_experts, dim, 2 * width))
        self.down_proj = nn.Parameter(torch.empty(n_experts, width, dim))

    def forward(self, x, ends):
        """x (N·k, D) sorted by expert, ends (E,) int32 the end of each expert's rows -> (N·k, D)."""
        dtype = product_dtype(x)  # grouped_mm is not on autocast's list
        x, gate_up, down = (t.to(dtype) for t in (x, self.gate_up_proj, self.down_proj))
        gate, up = grouped_mm(x, gate_up, ends).chunk(2, -1)  # (N·k, F) each
        return grouped_mm(F.silu(gate) * up, down, ends)


class MoE(nn.Module):
    """Llama 4's mixture: y = shared(x) + sum over the top k experts of expert(sigmoid(logit) * x)."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.router = nn.Linear(cfg.dim, cfg.n_experts, bias=False)
        self.experts = Experts(cfg.n_experts, cfg.dim, cfg.expert_dim)
        self.shared_expert = SwiGLU(cfg.dim, cfg.expert_dim)
        for name in ("load", "bias"):  # tokens per expert since balance(); what moves the selection, in training
            self.register_buffer(name, torch.zeros(cfg.n_experts, device="cpu"), persistent=False)

    def forward(self, x):
        """x (B, T, D) -> y (B, T, D), balancing loss (0 where it is not asked for), tokens per expert (E,)."""
        cfg, shape = self.cfg, x.shape
        x = x.reshape(-1, cfg.dim)  # (N, D)
        logits = self.router(x).float()  # (N, E)
        choice = logits
        if self.training and cfg.router_noise:
            choice = choice + cfg.router_noise * torch.randn_like(choice)
        if self.training and cfg.router_bias:
            choice = choice + self.bias
        expert = choice.topk(cfg.top_k, dim=-1).indices  # (N, k)
        score = logits.gather(1, expert).sigmoid()  # (N, k) from the raw logits: noise and bias only select
        order = expert.flatten().argsort(stable=True)  # (N·k,) by expert, tokens in their order
        count = (expert.flatten()[:, None] == torch.arange(cfg.n_experts, device=x.device)).sum(0)  # (E,)
        token = order // cfg.top_k
        routed = x[token] * score.flatten()[order][:, None].type_as(x)  # (N·k, D) the score multiplies the input
        routed = self.experts(routed, count.cumsum(0).int())
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))  # undoes the sort
        y = self.shared_expert(x) + routed[back].unflatten(0, (-1, cfg.top_k)).sum(1)  # (N, D)
        aux = logits.new_zeros(())
        if self.training and cfg.router_aux:  # E * sum_e (share of tokens) * (mean probability), 1 when balanced
            aux = cfg.n_experts * (count / count.sum() * logits.softmax(-1).mean(0)).sum()
        return y.view(shape), aux, count


class Block(nn.Module):
    """h = x + attention(norm(x)); out = h + feed_forward(norm(h))."""

    def __init__(self, cfg, layer):
        super().__init__()
        self.input_layernorm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.self_attn = Attention(cfg, layer)
        self.post_attention_layernorm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.feed_forward_name = "mlp" if cfg.arch == "llama" else "feed_forward"  # Hugging Face's names
        self.add_module(self.feed_forward_name, MoE(cfg) if cfg.is_moe(layer) else SwiGLU(cfg.dim, cfg.ffn_dim))
        self.dropout = nn.Dropout(cfg.dropout)

    @property
    def ffn(self):
        """The feed-forward: a SwiGLU or an MoE."""
        return getattr(self, self.feed_forward_name)

    def forward(self, x, *context):
        """x (B, T, D) -> (B, T, D) and, from a mixture of experts, its balancing loss and load."""
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), *context))
        y, routing = self.ffn(self.post_attention_layernorm(x)), ()
        if isinstance(self.ffn, MoE):
            y, *routing = y
        return x + self.dropout(y), *routing


class Decoder(nn.Module):
    """Embedding, blocks and final norm: everything but the head."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.embed_tokens = nn.Embedding(cfg.vocab_size, cfg.dim)
        self.layers = nn.ModuleList(Block(cfg, i) for i in range(cfg.n_layer))
        self.norm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.dropout = nn.Dropout(cfg.dropout)
        self.checkpointing = False  # recompute each block in the backward pass: less memory, a third more work

    def masks(self, positions):
        """Which keys each query sees when texts share a row: (full, chunked), (B, 1, T, T) bool each.

        A document begins where positions (B, T) is 0. Where they jump back to p > 0, another continuation of the
        document's first p tokens begins, which does not see the continuations before it."""
        T = positions.shape[1]
        document, place = (positions == 0).cumsum(1), torch.arange(T, device=positions.device)
        full = (document[:, :, None] == document[:, None]) & (place[:, None] >= place)
        jump = F.pad(positions.diff(dim=1) != 1, (1, 0), value=True)  # (B, T)
        begin = torch.where(jump, place, 0).cummax(1).values  # where each token's continuation begins
        full &= (place >= begin[:, :, None]) | (positions[:, None] < positions.gather(1, begin)[:, :, None])
        chunk = positions // (self.cfg.chunk or self.cfg.context)
        return full[:, None], (full & (chunk[:, :, None] == chunk[:, None]))[:, None]

    def forward(self, idx=None, embeds=None, positions=None, cache=None, lengths=None):
        """Hidden states (B, T, D) and the balancing loss, summed over layers. See Llama.forward."""
        x = self.embed_tokens(idx) if embeds is None else embeds
        full = chunked = None
        if cache is not None and cache.begun:
            positions = cache.lengths[:, None]  # (B, 1)
            full, chunked = cache.mask(0), cache.mask(self.cfg.chunk)
        elif positions is None:
            positions = torch.arange(x.shape[1], device=x.device)
        else:
            full, chunked = self.masks(positions)
        rope = rope_angles(self.cfg, positions)
        x, balance = self.dropout(x), 0.0
        for block in self.layers:
            context = rope, positions, chunked if block.self_attn.chunk else full, cache, lengths
            if self.checkpointing and self.training:
                x, *routing = checkpoint(block, x, *context, use_reentrant=False)
            else:
                x, *routing = block(x, *context)
            if routing and self.training:  # here and not in the block: checkpointing runs a block twice
                balance = balance + routing[0]
                block.ffn.load += routing[1]
        if cache is not None:
            cache.lengths += 1 if cache.begun else x.shape[1] if lengths is None else lengths
        return self.norm(x), balance


class Llama(nn.Module):
    """A Llama language model. Draws its weights with `init_weights`; `from_pretrained` reads them."""

    def __init__(self, cfg):
        super().__init__()
        self.config = cfg
        self.static, self.spare = False, {}  # whether decoding keeps to shapes that do not change; caches it has used
        self.model = Decoder(cfg)
        self.lm_head = nn.Linear(cfg.dim, cfg.vocab_size, bias=False)
        if cfg.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        if not self.lm_head.weight.is_meta:
            self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Draw every tensor by its role.

        norms: 1. Embedding: normal, std 1, or dim^-0.5 where it is the head too: a token must stand out from what blocks
        add to it, or copying is learned late. Head: std 0.02, so that the first loss is close to ln V. Matrices that read
        the residual stream: normal, std 1/sqrt(inputs), so that activations start at unit scale at any width.
        Matrices that write to it (o_proj, every down_proj): the same over sqrt(2 * n_layer), so that the stream's
        variance does not grow with depth (GPT-2). Router: std 1/sqrt(dim), logits of unit scale.
        """
        for name, p in self.named_parameters():
            role = name.removesuffix(".weight").rsplit(".", 1)[-1]
            if role.endswith("norm"):
                p.fill_(1.0)
            elif role == "embed_tokens":
                p.normal_(std=self.config.dim ** -0.5 if self.config.tie_embeddings else 1.0)
            elif role == "lm_head":
                p.normal_(std=0.02)
            else:
                inputs = p.shape[1]  # Linear is (out, in), Experts are (E, in, out): both have it second
                depth = 2 * self.config.n_layer if role in ("o_proj", "down_proj") else 1
                p.normal_(std=(inputs * depth) ** -0.5)

    def to_decode(self, compile=False):
        """Make generation fast; returns the model.

        On a CPU, store matrices as `Panels` and norms as `QuickNorm`: several times the speed, but no longer fit for training
        or for saving. compile: a token's step as one compiled graph, on a GPU one CUDA graph; the first takes half a minute.
        """
        if compile:
            self.static, self.after = True, torch.compile(self.after, mode="reduce-overhead", dynamic=False)
        if self.lm_head.weight.device.type != "cpu" or any(isinstance(m, Panels) for m in self.modules()):
            return self

        def pack(parent, first, *others):
            weights = [getattr(parent, name).weight for name in (first, *others)]
            if all(len(w) % Panels.WIDTH == 0 for w in weights):
                setattr(parent, first, Panels(*weights))
                for name in others:
                    setattr(parent, name, None)
        for m in list(self.modules()):
            for name, norm in list(m.named_children()):
                if isinstance(norm, RMSNorm):
                    setattr(m, name, QuickNorm(norm))
            if isinstance(m, Attention):
                pack(m, "q_proj", "k_proj", "v_proj"), pack(m, "o_proj")
            elif isinstance(m, SwiGLU):
                pack(m, "gate_proj", "up_proj"), pack(m, "down_proj")
        pack(self, "lm_head")
        if self.config.tie_embeddings and isinstance(self.lm_head, Panels):
            self.model.embed_tokens = TiedEmbedding(self.lm_head)
        return self

    def forward(self, idx=None, targets=None, positions=None, *, embeds=None, cache=None, lengths=None):
        """Logits at every position, and the loss.

        idx (B, T) int64, or embeds (B, T, D) in its place. targets (B, T): the token that follows each position,
        -100 where it does not count. positions (B, T): restart at 0 where a new document begins; it then sees
        nothing before itself. cache: a KVCache, filled by the first call (rows padded on the right to T,
        lengths (B,) their true lengths) and extended by calls with T = 1.
        Returns logits (B, T, V) and loss: mean nats per counted target, or None without targets. With targets, gradients
        flow through the loss alone; in training it also carries the gradient, but not the value, of router_aux times the
        balancing loss.
        """
        if cache is not None:
            cache.take((idx if embeds is None else embeds).shape[1])
        x, balance = self.model(idx, embeds, positions, cache, lengths)
        logits = self.lm_head(x)
        if targets is None:
            return logits, None
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100, reduction="sum")
        loss = loss / (targets != -100).sum().clamp(min=1)
        if self.training and self.config.router_aux:
            extra = self.config.router_aux * balance
            loss = loss + (extra - extra.detach())
        return logits.detach(), loss  # a compiled backward pass would add their gradient, zeros as large as the logits

    def losses(self, idx, positions, source, target):
        """Nats of each target (M,), predicted at the places source (M,) of idx (B, T) laid flat: (M,), float32.

        positions as in `forward`. Logits exist only for these places, a few at a time, as they are large."""
        x = self.model(idx, positions=positions)[0].flatten(0, 1)[source]  # (M, D)
        return torch.cat([F.cross_entropy(self.lm_head(part).float(), want, reduction="none")
                          for part, want in zip(x.split(256), target.split(256))])

    # -- facts ---------------------------------------------------------------------------------------------------

    def counts(self):
        """(parameters, parameters that one token uses), tied weights once."""
        total = sum(p.numel() for p in self.parameters())
        routed = sum(p.numel() for m in self.modules() if isinstance(m, Experts) for p in m.parameters())
        return total, total - (routed - routed * self.config.top_k // max(self.config.n_experts, 1))

    def flops_per_token(self, length):
        """Floating-point operations of forward and backward per token, averaged over a sequence of `length`.

        6 for each weight that a token is multiplied with (embedding rows are looked up, not multiplied), and
        12·H·d for each key that it attends to: causal attention sees half of the square.
        """
        cfg = self.config
        lookup = 0 if cfg.tie_embeddings else cfg.vocab_size * cfg.dim
        keys = 0.0  # summed over the layers
        for i in range(cfg.n_layer):
            C = min(cfg.chunk_of(i) or length, length)
            whole, rest = divmod(length, C)
            keys += (whole * C * (C + 1) + rest * (rest + 1)) / 2 / length
        return 6 * (self.counts()[1] - lookup) + 12 * cfg.n_head * cfg.head_dim * keys

    # -- balancing of experts ------------------------------------------------------------------------------------

    def moe_layers(self):
        """The mixture-of-experts modules, in order of depth."""
        return [m for m in self.modules() if isinstance(m, MoE)]

    @torch.no_grad()
    def pop_expert_load(self):
        layers = self.moe_layers()
        if not layers:
            return torch.zeros(0, 0)
        load = torch.stack([m.load for m in layers])
        for m in layers:
            m.load.zero_()
        return load

    @torch.no_grad()
    def balance(self):
        """After an optimizer step: move each selection bias toward balance; returns and clears the load (layers, E).

        Experts with more than the mean load lose router_bias, the others gain it (arXiv:2408.15664)."""
        layers = self.moe_layers()
        load = torch.stack([m.load for m in layers])
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(load)
        for m, row in zip(layers, load):
            m.bias += self.config.router_bias * (row.mean() - row).sign()
            m.load.zero_()
        return load

    # -- generation ----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def cache_for(self, batch, size, device):
        """A KVCache for this block. Static ones are of few sizes and kept: a CUDA graph knows where they are."""
        if self.static:
            size = max(256, 1 << (size - 1).bit_length())
        kind = batch, size, device, product_dtype(self.lm_head.weight)
        cache = self.spare.pop(kind, None) or KVCache(self.config, *kind, self.static)
        yield cache
        if self.static:
            cache.clear()
            self.spare[kind] = cache

    def after(self, token, cache):
        """Logits (B, V) of what follows token (B,), the next of each row in cache: what `to_decode` compiles."""
        return self.lm_head(self.model(token[:, None], cache=cache)[0][:, 0])

    @torch.inference_mode()
    def stream(self, idx=None, max_new_tokens=1, temperature=1.0, top_k=None, top_p=None, min_p=None, eos_id=None,
               seed=None, mask=None, embeds=None):
        """Yield the next token of every row, (B,) int64, until all rows have ended or the context is full.

        idx (B, T) or embeds (B, T, D): prompts; mask (B, T): 1 where they are real, 0 for padding on the left or
        right. temperature 0 is greedy. eos_id: an id, or several, that end a row, which then repeats its ending.
        Raises ValueError when a prompt is empty or leaves no room in the context.
        """
        x = self.model.embed_tokens(idx) if embeds is None else embeds
        B, T, device = *x.shape[:2], x.device
        if not 0 < T < self.config.context:
            raise ValueError(f"a prompt of {T} tokens: it takes 1 to {self.config.context - 1} in this context")
        lengths = torch.full((B,), T, device=device)
        if mask is not None:
            lengths = mask.sum(1)
            if (lengths == 0).any():
                raise ValueError("a prompt is empty")
            source = mask.int().argmax(1, keepdim=True) + torch.arange(T, device=device)  # left padding goes right
            x = x.gather(1, source.clamp(max=T - 1)[..., None].expand_as(x))
        ends = [] if eos_id is None else [eos_id] if isinstance(eos_id, int) else sorted(eos_id)
        ends = torch.tensor(ends, dtype=torch.long, device=device)
        dice = None if seed is None else torch.Generator(device).manual_seed(seed)
        steps = min(max_new_tokens, self.config.context - T)
        done, token = torch.zeros(B, dtype=torch.bool, device=device), None
        with self.cache_for(B, T + steps, device) as cache:
            for step in range(steps):
                cache.take(1 if step else T)
                if step:
                    logits = self.after(token, cache)
                else:
                    x = self.model(embeds=x, cache=cache, lengths=lengths)[0]
                    logits = self.lm_head(x[torch.arange(B, device=device), lengths - 1])  # (B, V)
                following = pick(logits.float(), temperature, top_k, top_p, min_p, dice)
                token = following if token is None else torch.where(done, token, following)
                done = done | torch.isin(token, ends)
                yield token
                if len(ends) and done.all():
                    return

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, min_p=None, eos_id=None, seed=None,
                 mask=None):
        """idx (B, T) with up to max_new_tokens more tokens, (B, T + new). Arguments as for `stream`."""
        new = list(self.stream(idx, max_new_tokens, temperature, top_k, top_p, min_p, eos_id, seed, mask))
        return torch.cat((idx, torch.stack(new, 1)), 1) if new else idx

    # -- files ---------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, name, dtype=None, device="cpu", **overrides):
        """Read a directory or a Hugging Face hub name: config.json and *.safetensors, whole or sharded.

        dtype None keeps the file's; overrides replace fields of the config (dropout=0.1). Raises FileNotFoundError
        when there is nothing to read, and ValueError, naming it, for what is not built here and for missing,
        unexpected or mis-shaped tensors.
        """
        directory = find_checkpoint(name)
        if (directory / "adapter_config.json").exists():
            raise ValueError(f"{directory} holds an adapter (adapter_config.json): merge it into its base model first")
        generation = directory / "generation_config.json"
        cfg = config_from_hf(read_json(directory / "config.json"), read_json(generation) if generation.exists() else {})
        cfg = replace(cfg, **overrides)
        with torch.device("meta"):
            model = cls(cfg)
        shapes = {name: t.shape for name, t in model.state_dict().items()}
        model.load_state_dict(_read_tensors(directory, cfg, shapes, dtype, device), assign=True)
        if cfg.tie_embeddings:
            model.lm_head.weight = model.model.embed_tokens.weight
        return model.to(device).requires_grad_(True).eval()

    def save_pretrained(self, directory, state=None, max_shard_size="5GB"):
        """Write config.json and the weights (state, default: this model's) as transformers does: model.safetensors, or
        parts of at most max_shard_size and an index. Each file appears whole or not at all.
        """
        from huggingface_hub import split_torch_state_dict_into_shards
        from safetensors.torch import save_file
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        state = dict(self.state_dict() if state is None else state)
        if self.config.tie_embeddings:
            state.pop("lm_head.weight", None)
        state = {n: t.detach().cpu().contiguous() for n, t in state.items()}
        dtype = str(next(iter(state.values())).dtype).removeprefix("torch.")
        split = split_torch_state_dict_into_shards(state, max_shard_size=max_shard_size)
        texts = {"config.json": config_to_hf(self.config, dtype)}
        if split.is_sharded:
            texts["model.safetensors.index.json"] = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        with tempfile.TemporaryDirectory(".tmp", dir=directory) as folder:
            for file, content in texts.items():
                Path(folder, file).write_text(json.dumps(content, indent=2) + "\n")
            for file, names in split.filename_to_tensors.items():
                save_file({name: state[name] for name in names}, Path(folder, file), metadata={"format": "pt"})
                shutil.copymode(Path(folder, "config.json"), Path(folder, file))  # safetensors lets only the owner read
            written = {directory / file.name for file in Path(folder).iterdir()}
            for file in Path(folder).iterdir():
                with open(file, "rb") as f:
                    os.fsync(f.fileno())
                file.replace(directory / file.name)
        earlier = {directory / "model.safetensors", directory / "model.safetensors.index.json",
                   *directory.glob("model-?????-of-?????.safetensors")}
        for file in earlier - written:  # weights of before, cut in another way
            file.unlink(missing_ok=True)


def pick(logits, temperature=1.0, top_k=None, top_p=None, min_p=None, generator=None):
    """Draw a token from each row of logits (B, V) -> (B,). temperature 0 takes the most likely.

    top_k keeps the k most likely tokens, top_p the fewest whose probabilities reach p (arXiv:1904.09751), min_p
    those with at least min_p times the probability of the most likely (arXiv:2407.01082)."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(min(top_k, logits.shape[-1])).values[:, -1:], -torch.inf)
    p = logits.softmax(-1)
    if top_p is not None and top_p < 1:
        value, index = p.sort(-1, descending=True)
        p = p.masked_fill((value.cumsum(-1) - value >= top_p).gather(1, index.argsort(-1)), 0)
    if min_p:
        p = p.masked_fill(p < min_p * p.max(-1, keepdim=True).values, 0)
    return (p / torch.empty_like(p).exponential_(generator=generator)).argmax(-1)  # a race that p wins with chance p


# -- Hugging Face files ------------------------------------------------------------------------------------------

LLAMA_KEYS = {  # field of LlamaConfig: (key of config.json, what transformers takes where the key is left out)
    "vocab_size": ("vocab_size", 32000), "n_layer": ("num_hidden_layers", 32), "n_head": ("num_attention_heads", 32),
    "n_kv_head": ("num_key_value_heads", None), "dim": ("hidden_size", 4096), "head_dim": ("head_dim", None),
    "ffn_dim": ("intermediate_size", 11008), "context": ("max_position_embeddings", 2048),
    "norm_eps": ("rms_norm_eps", 1e-6), "tie_embeddings": ("tie_word_embeddings", False), "bos_id": ("bos_token_id", 1)}
LLAMA4_KEYS = {
    "vocab_size": ("vocab_size", 202048), "n_layer": ("num_hidden_layers", 48), "n_head": ("num_attention_heads", 40),
    "n_kv_head": ("num_key_value_heads", 8), "dim": ("hidden_size", 5120), "head_dim": ("head_dim", 128),
    "ffn_dim": ("intermediate_size_mlp", 16384), "context": ("max_position_embeddings", 131072),
    "norm_eps": ("rms_norm_eps", 1e-5), "tie_embeddings": ("tie_word_embeddings", False), "bos_id": ("bos_token_id", 1),
    "expert_dim": ("intermediate_size", 8192), "n_experts": ("num_local_experts", 16),
    "top_k": ("num_experts_per_tok", 1), "moe_every": ("interleave_moe_layer_step", 1),
    "nope_every": ("no_rope_layer_interval", 4), "chunk": ("attention_chunk_size", 8192),
    "qk_norm": ("use_qk_norm", True), "attn_scale": ("attn_scale", 0.1), "floor_scale": ("floor_scale", 8192)}
SCALING_KEYS = "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"
SUPPORTED = {  # key that changes what a model computes: the values of it that are built here
    "hidden_act": ("silu", "swish"), "attention_bias": (False,), "mlp_bias": (False,), "is_causal": (True,),
    "partial_rotary_factor": (1, None), "sliding_window": (None,), "per_layer_config": (None,),
    "quantization_config": (None,), "compression_config": (None,)}
ARCHITECTURES = {"LlamaForCausalLM", "Llama4ForCausalLM", "Llama4ForConditionalGeneration"}


def config_to_hf(cfg, dtype="float32"):
    """LlamaConfig -> the dict of a config.json, with the spellings of transformers 4 and 5 for dtype and RoPE."""
    llama4, scaling = cfg.arch == "llama4", None
    if cfg.rope_scaling:  # whole numbers as such: transformers wants the original context to be one
        numbers = [int(x) if x % 1 == 0 else x for x in cfg.rope_scaling]
        scaling = {"rope_type": "llama3"} | dict(zip(SCALING_KEYS, numbers))
    hf = {key: getattr(cfg, field) for field, (key, _) in (LLAMA4_KEYS if llama4 else LLAMA_KEYS).items()}
    hf |= {"architectures": ["Llama4ForCausalLM" if llama4 else "LlamaForCausalLM"],
           "model_type": "llama4_text" if llama4 else "llama", "dtype": dtype, "torch_dtype": dtype,
           "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
           "eos_token_id": cfg.eos_ids[0] if len(cfg.eos_ids) == 1 else list(cfg.eos_ids) or None,
           "rope_theta": cfg.rope_theta, "rope_scaling": scaling,
           "rope_parameters": {"rope_theta": cfg.rope_theta, "rope_type": "default"} | (scaling or {})}
    if llama4:  # which wants a width, a number and a chunk even where no layer uses them
        layers = range(cfg.n_layer)
        hf |= {"moe_layers": [i for i in layers if cfg.is_moe(i)],
               "no_rope_layers": [int(not cfg.is_nope(i)) for i in layers],  # 1 means that RoPE is used
               "no_rope_layer_interval": cfg.nope_every or cfg.n_layer + 1,
               "layer_types": ["chunked_attention" if cfg.chunk_of(i) else "full_attention" for i in layers],
               "attn_temperature_tuning": cfg.attn_scale > 0, "attention_chunk_size": cfg.chunk or cfg.context,
               "intermediate_size": cfg.expert_dim or cfg.ffn_dim, "num_local_experts": cfg.n_experts or 1}
    return hf


def config_from_hf(hf, generation=None):
    """The dict of a config.json and, for what ends a generation, of a generation_config.json -> LlamaConfig.

    Keys mean what they mean to transformers 5 (configuration_llama.py, configuration_llama4.py). Raises ValueError,
    naming the key, for what is not built here."""
    family = hf.get("model_type")
    if family not in ("llama", "llama4", "llama4_text"):
        raise ValueError(f"config.json: model_type {family!r} is not supported: it takes llama, llama4 and llama4_text")
    try:
        text = (hf.get("text_config") or {}) if family == "llama4" else hf  # beside it: vision_config
        if set(hf.get("architectures") or ()) - ARCHITECTURES:
            raise ValueError(f"architectures {hf['architectures']} is none of {', '.join(sorted(ARCHITECTURES))}")
        if not isinstance(text, dict):
            raise ValueError(f"text_config {text!r} is no object")
        _refuse_unsupported(hf)
        _refuse_unsupported(text)
        cfg = LlamaConfig(**_common_fields(text, LLAMA_KEYS, 10000.0)) if family == "llama" else _llama4_config(text)
        ends = _token_ids((generation or {}).get("eos_token_id"))
        if "eos_token_id" in text or not ends:
            ends = cfg.eos_ids + ends
        return replace(cfg, eos_ids=dict.fromkeys(ends))
    except (ValueError, TypeError) as e:
        raise ValueError(f"config.json: {e}") from None


def _refuse_unsupported(hf):
    """Raise ValueError for a key that changes what a model computes, and is not read."""
    for key, supported in SUPPORTED.items():
        if hf.get(key, supported[0]) not in supported:
            raise ValueError(f"{key} {hf[key]!r} is not supported; {supported[0]!r} is")


def _common_fields(hf, keys, rope_theta):
    """{field: value} of LlamaConfig, for what all families have. rope_theta: that of a config.json without one."""
    fields = {"eos_ids": _token_ids(hf.get("eos_token_id", 2))}
    for field, (key, default) in keys.items():
        value = hf.get(key, default)
        if value is None and (default is None or field in ("chunk", "bos_id")):
            continue  # LlamaConfig's own: as many as query heads, dim / n_head, full attention, no BOS
        kind = int if default is None else type(default)
        if type(value) is not kind or kind is int and value < 1 and field != "bos_id":
            raise ValueError(f"{key} ({field}) must be a positive {kind.__name__}, not {value!r}")
        fields[field] = value
    pad, vocab_size = hf.get("pad_token_id"), fields["vocab_size"]
    if pad is not None and not (type(pad) is int and -vocab_size <= pad < vocab_size):
        raise ValueError(f"pad_token_id {pad!r} is none of vocab_size={vocab_size} tokens")
    fields["rope_theta"], fields["rope_scaling"] = _read_rope(hf, rope_theta, fields["context"])
    return fields


def _token_ids(ids):
    """A number, a list of them, or None -> tuple."""
    return () if ids is None else tuple(ids) if isinstance(ids, list) else (ids,)


def _read_rope(hf, theta, context):
    """(rope_theta, rope_scaling) of a config.json. `rope_scaling` (transformers 4) overrules `rope_parameters` (5)."""
    rope = hf.get("rope_scaling") or hf.get("rope_parameters")
    rope = {} if rope is None else rope
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise ValueError(f"rope_parameters {rope} is no object of numbers; RoPE by type of layer is not supported")
    _refuse_unsupported(rope)
    theta = rope.get("rope_theta", hf.get("rope_theta", theta))
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type == "default":
        return theta, ()
    if rope_type == "linear":  # as if the original context were one position: all wavelengths are beyond it
        return theta, (rope.get("factor"), 1, 1, 1)
    if rope_type != "llama3":
        raise ValueError(f"rope_type {rope_type!r} is not supported; 'default', 'linear' and 'llama3' are")
    factor, low, high, original = (rope.get(key) for key in SCALING_KEYS)
    if None not in (low, high) and low > high:
        raise ValueError(f"low_freq_factor {low} is above high_freq_factor {high}")
    for given in (rope, hf):  # the later counts
        context = given.get("original_max_position_embeddings", context)
    return theta, (factor, low, high, context)


def _llama4_config(hf):
    """LlamaConfig of a Llama 4's text model. What config.json lists for each layer overrules the intervals."""
    cfg = LlamaConfig(arch="llama4", **_common_fields(hf, LLAMA4_KEYS, 500000.0))
    layers = range(cfg.n_layer)

    def listed(key, kind):
        """The list of a key, None where it is left out."""
        values = hf.get(key)
        if values is not None and not (isinstance(values, list) and all(isinstance(v, kind) for v in values)):
            raise ValueError(f"{key} {values!r} is no list of {kind.__name__}")
        return values

    def interval(key, chosen):
        """n, where every n-th layer is chosen (a bool for each); 0 where none is."""
        n = chosen.index(True) + 1 if True in chosen else 0
        if chosen != [n > 0 and (i + 1) % n == 0 for i in layers]:
            raise ValueError(f"{key} {hf[key]} is no regular pattern of layers, as all that is built has")
        return n

    moe, rope, types = listed("moe_layers", int), listed("no_rope_layers", int), listed("layer_types", str)
    is_moe = [cfg.is_moe(i) if moe is None else i in moe for i in layers]
    is_nope = [not r for r in rope] if rope else [cfg.is_nope(i) for i in layers]  # 1 means that RoPE is used
    nope_every = interval("no_rope_layers", is_nope)
    full = ["full_attention"] * cfg.n_layer
    by_rope = ["chunked_attention" if cfg.chunk and not nope else "full_attention" for nope in is_nope]
    types = by_rope if types is None else types
    if types not in (by_rope, full):
        raise ValueError(f"layer_types {types} must be chunked_attention where RoPE is used, or nowhere")
    if types == full:
        cfg = replace(cfg, chunk=0)
    if not any(is_moe):
        cfg = replace(cfg, n_experts=0, top_k=1)
    tuning = hf.get("attn_temperature_tuning", True)  # transformers 4.51 wrote 4 for true
    if not isinstance(tuning, int):
        raise ValueError(f"attn_temperature_tuning must be true or false, not {tuning!r}")
    if not (tuning and nope_every):
        cfg = replace(cfg, attn_scale=0.0)
    return replace(cfg, moe_every=interval("moe_layers", is_moe) or 1, nope_every=nope_every)


def read_json(path):
    """The dict in a JSON file."""
    if not path.exists():
        raise FileNotFoundError(f"no {path.name} in {path.parent}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path} is not JSON: {e}") from None
    except OSError as e:
        raise ValueError(f"cannot read {path}: {e.strerror}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object")
    return value


def _weight_files(directory):
    """The safetensors files of a checkpoint: the whole or, where there is none, the parts that an index names."""
    whole, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if whole.exists():
        return [whole]
    if not index.exists():
        pickled = " (pickled weights are not read: they can run code)" * any(directory.glob("*.bin"))
        raise FileNotFoundError(f"no model.safetensors in {directory}{pickled}")
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise ValueError(f"{index} has no weight_map")
    return [directory / file for file in sorted({Path(str(file)).name for file in table.values()})]


def _our_name(name, cfg, shapes):
    """The name here of a tensor that a file calls `name`; None for one that the language model does not use."""
    if name.endswith("rotary_emb.inv_freq"):  # transformers before 4.32 stored RoPE's frequencies
        return None
    if cfg.arch == "llama4":  # Llama4ForConditionalGeneration wraps the language model
        vision = name.startswith(("vision_model.", "multi_modal_projector."))
        return None if vision else name.removeprefix("language_model.")
    names = name, f"model.{name}", name.removeprefix("model.")  # LlamaModel's have no prefix
    return next((n for n in names if n in shapes), name)


def _read_tensors(directory, cfg, shapes, dtype, device):
    """{name: tensor} for exactly the names of `shapes` ({name: shape}), from the safetensors files of a directory.

    dtype None: the files' own, or the narrowest that holds all of them."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    state, head, embedding = {}, "lm_head.weight", "model.embed_tokens.weight"
    floats = torch.float16, torch.bfloat16, torch.float32, torch.float64  # 8 bits would need scales
    for path in _weight_files(directory):
        try:
            tensors = load_file(path, device=str(device))
        except (SafetensorError, OSError) as e:
            raise ValueError(f"{path} is not a readable safetensors file: {e}") from None
        for name, tensor in tensors.items():
            ours = _our_name(name, cfg, shapes)
            if ours in state:
                raise ValueError(f"{path}: {ours} is there twice, once as {name}")
            if ours is not None:
                state[ours] = tensor
    if cfg.tie_embeddings:
        tied = [state[name] for name in (embedding, head) if name in state]
        if len(tied) == 2 and (tied[0].dtype != tied[1].dtype or not torch.equal(*tied)):
            raise ValueError(f"{directory}: tie_word_embeddings is true in config.json, but {head} is not {embedding}; "
                             "false keeps both")
        state |= dict.fromkeys((embedding, head), tied[0]) if tied else {}
    wrong = [f"{name} {t.dtype} {tuple(t.shape)} for {tuple(shapes[name])}" for name, t in state.items()
             if name in shapes and (t.shape != shapes[name] or t.dtype not in floats)]
    for what, names in (("missing", shapes.keys() - state.keys()), ("unexpected", state.keys() - shapes.keys()),
                        ("of the wrong shape or type", wrong)):
        if names:
            more = ", …" if len(names) > 5 else ""
            raise ValueError(f"{directory}: {len(names)} tensors are {what}: {', '.join(sorted(names)[:5])}{more}")
    dtype = dtype or functools.reduce(torch.promote_types, {t.dtype for t in state.values()})
    for name in state:
        state[name] = state[name].to(dtype)
    return state


def find_checkpoint(name):
    """The local directory of a checkpoint: `name` itself, or the copy of the Hugging Face hub's model of that name.

    Raises FileNotFoundError when there is neither. A model that is not public needs a token in HF_TOKEN."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import errors, snapshot_download
    name = str(name)
    if name.count("/") != 1:  # a name on the hub is owner/model
        raise FileNotFoundError(f"no directory {name}")
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.model", "*.jinja"],
                                      ignore_patterns="*/*"))  # folders hold other formats
    except errors.HFValidationError:
        raise FileNotFoundError(f"no directory {name}") from None
    except errors.GatedRepoError:
        why = "the hub's model of that name is gated: ask for access on its page and set HF_TOKEN"
    except errors.RepositoryNotFoundError:
        why = "the hub has no public model of that name (a private one needs HF_TOKEN)"
    except errors.LocalEntryNotFoundError:
        why = "the hub does not answer, and nothing of that name is in its cache"
    except Exception as e:  # the hub's client raises many kinds, none of them ours to mend
        why = f"the hub did not give a model of that name: {type(e).__name__}: {' '.join(str(e).split())[:200]}"
    raise FileNotFoundError(f"no directory {name}, and {why}")
