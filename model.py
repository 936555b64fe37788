"""Every Llama, from Llama 1 to Llama 4, in one file.

A model is described by a `LlamaConfig`; `PRESETS` holds the published ones. Parameters carry Hugging Face's
names and layouts, so `state_dict()` is a Hugging Face state dict and a saved directory is a Hugging Face checkpoint.

    model = Llama(PRESETS["stories15m"])
    logits, _ = model(idx)
    _, loss = model(idx, targets)
    ids = model.generate(idx, max_new_tokens=100)

Letters in shapes: B batch, T positions, D dim, H query heads, K key/value heads, d head_dim, V vocabulary,
F width of a feed-forward, E experts, N tokens (B·T), k experts per token, C chunk, S slots of a cache. In code, F is
torch.nn.functional, and k is keys.

Sources: LLaMA (arXiv:2302.13971), Llama 2 (2307.09288), Llama 3 (2407.21783), RoPE (2104.09864), SwiGLU
(2002.05202), GQA (2305.13245), Switch (2101.03961), temperature tuning (2501.19399); for Llama 4,
meta-llama/llama-models `models/llama4` and transformers `modeling_llama4.py`.
"""
import copy
import functools
import hashlib
import math
from dataclasses import dataclass, field, fields, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


@dataclass
class LlamaConfig:
    """The shape of a Llama. Raises ValueError, naming the field, for a shape that cannot be built."""
    # -- the model's shape: what is not given is as in its preset, not as here; the data give the vocabulary
    arch: str = "llama"  # {llama, llama4} llama is 1 to 3: decides the layout of RoPE and the names of parameters
    vocab_size: int = 32000  # the SentencePiece vocabulary of Llama 1 and 2
    n_layer: int = 32  # this and the next sizes: Llama 7B
    n_head: int = 32  # query heads
    n_kv_head: int = 0  # key/value heads, shared by n_head/n_kv_head query heads each; 0: as many as n_head
    dim: int = 4096  # width of the residual stream
    head_dim: int = 0  # 0: dim / n_head
    ffn_dim: int = 11008  # width of a dense SwiGLU; Llama 1 rounds 2/3 of 4*dim up to a multiple of 256
    context: int = 2048  # longest sequence the model is meant for; of a new one block_size, unless given
    norm_eps: float = 1e-5  # Llama 1 uses 1e-6, all later ones 1e-5
    rope_theta: float = 10000.0  # base of the RoPE wavelengths; longer contexts want a larger one
    rope_scaling: tuple[float, ...] = ()  # Llama 3.1's (factor, low, high, original context); (): no scaling
    tie_embeddings: bool = False  # small models save vocab_size*dim parameters by sharing embedding and head
    bos_id: int | None = None  # token that begins a document; recorded for other tools
    eos_ids: tuple[int, ...] = ()  # tokens that end a generation; recorded for other tools
    # -- Llama 4
    nope_every: int = 0  # iRoPE: every n-th layer uses full attention without RoPE (Llama 4: 4); 0: RoPE everywhere
    chunk: int = 0  # RoPE layers attend within chunks of this many positions (Llama 4: 8192); 0: full attention
    qk_norm: bool = False  # weightless RMSNorm of q and k after RoPE, on RoPE layers (Scout: yes, Maverick: no)
    attn_scale: float = 0.0  # temperature tuning of NoPE layers (Llama 4: 0.1); 0: off
    floor_scale: int = 8192  # positions for each step of that temperature
    n_experts: int = 0  # routed experts of a mixture-of-experts layer; 0: every layer is dense
    top_k: int = 1  # routed experts a token visits; one is enough beside the shared expert
    moe_every: int = 1  # every n-th layer is a mixture of experts (Scout 1, Maverick 2)
    expert_dim: int = 0  # width of each routed expert and of the shared one; 0: ffn_dim
    # -- the model in training
    dropout: float = 0.0  # training only: several epochs on little data want 0.1 to 0.2, one epoch wants none
    router_noise: float = 0.0  # training only: std of noise on the logits that select experts, so that all get tokens
    router_aux: float = 0.0  # training only: weight of Switch's balancing loss (Switch: 0.01)

    def __post_init__(self):
        for f in fields(self):
            value = getattr(self, f.name)
            if f.type in (int, float) and not (type(value) in (int, f.type) and 0 <= value < 2**40):
                raise ValueError(f"{f.name} must be {f.type.__name__}, at least 0 and below 2**40, not {value!r}")
            if f.type is bool and type(value) is not bool:
                raise ValueError(f"{f.name} must be True or False, not {value!r}")
        for name in ("vocab_size", "n_layer", "n_head", "dim", "ffn_dim", "context", "norm_eps", "rope_theta",
                     "floor_scale", "top_k", "moe_every"):
            if getattr(self, name) == 0:
                raise ValueError(f"{name} must be above 0")
        self.n_kv_head = self.n_kv_head or self.n_head
        self.expert_dim = (self.expert_dim or self.ffn_dim) if self.n_experts else 0
        self.rope_scaling, self.eos_ids = tuple(self.rope_scaling), tuple(self.eos_ids)
        if self.arch not in ("llama", "llama4"):
            raise ValueError(f"arch must be 'llama' or 'llama4', not {self.arch!r}")
        if self.dim % self.n_head:
            raise ValueError(f"dim={self.dim} is not divisible by n_head={self.n_head}")
        self.head_dim = self.head_dim or self.dim // self.n_head
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: RoPE turns pairs")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head={self.n_head} is not divisible by n_kv_head={self.n_kv_head}")
        if max(self.n_layer, self.n_experts) > 4096:
            raise ValueError("n_layer and n_experts must not exceed 4096: no Llama has that many")
        if self.top_k > max(self.n_experts, 1):
            raise ValueError(f"top_k={self.top_k} is more than n_experts={self.n_experts}")
        if self.dropout >= 1:
            raise ValueError(f"dropout={self.dropout} must be below 1")
        numbers = all(type(x) in (int, float) and 0 < x < 2**40 for x in self.rope_scaling)
        if len(self.rope_scaling) not in (0, 4) or not numbers:
            raise ValueError(f"rope_scaling takes (factor, low, high, original context) or (), not {self.rope_scaling}")
        if self.rope_scaling and self.rope_scaling[1] > self.rope_scaling[2]:
            raise ValueError(f"rope_scaling={self.rope_scaling}: low must not be above high")
        if not all(type(i) is int and 0 <= i < 2**40 for i in (*self.eos_ids, self.bos_id or 0)):
            raise ValueError(f"bos_id and eos_ids must be token ids, not {self.bos_id!r} and {self.eos_ids}")
        new = [n for n in ("nope_every", "chunk", "qk_norm", "attn_scale", "n_experts") if getattr(self, n)]
        if self.arch != "llama4" and new:
            raise ValueError(f"{', '.join(new)}: only arch='llama4' has this")
        if self.attn_scale and not self.nope_every:
            raise ValueError("attn_scale tunes NoPE layers: it needs nope_every")

    def is_nope(self, layer):
        """Whether layer (0-based) uses full attention without RoPE, and scales its queries."""
        return self.nope_every > 0 and (layer + 1) % self.nope_every == 0

    def is_moe(self, layer):
        """Whether layer (0-based) is a mixture of experts."""
        return self.n_experts > 0 and (layer + 1) % self.moe_every == 0

    def chunk_of(self, layer):
        """Chunk of layer's attention in positions, 0 where it is full."""
        return 0 if self.is_nope(layer) else self.chunk


def _presets():
    """{name: LlamaConfig} of published Llamas (sources: their config.json) and of this project's own.

    `replace` copies sizes that __post_init__ has filled in: with another n_head, n_kv_head and head_dim are given too.
    """
    llama1 = LlamaConfig(norm_eps=1e-6)
    llama2 = LlamaConfig(context=4096)
    size13 = dict(n_layer=40, n_head=40, n_kv_head=40, dim=5120, head_dim=128, ffn_dim=13824)
    code = replace(llama2, vocab_size=32016, context=16384, rope_theta=1e6)
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
        "llama-1-7b": llama1, "llama-2-7b": llama2, "llama-2-13b": replace(llama2, **size13),
        "llama-2-70b": replace(llama2, **size70), "code-llama-7b": code, "code-llama-13b": replace(code, **size13),
        "code-llama-34b": replace(code, **size70 | dict(vocab_size=32000, n_layer=48, ffn_dim=22016)),
        "llama-3-8b": llama3, "llama-3-70b": replace(llama3, **size70), "llama-3.1-8b": llama31,
        "llama-3.1-70b": replace(llama31, **size70), "llama-3.1-405b": replace(llama31, **size405),
        "llama-3.3-70b": replace(llama31, **size70), "llama-guard-3-8b": llama31,
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
        "llama-guard-4-12b": replace(scout, n_experts=0, ffn_dim=8192),  # Scout's shared experts alone; width from 12B
        "scout-128m": scout128m,
        "mini-llama": stories110m,
        "llama4-tiny": replace(scout, vocab_size=32000, n_layer=12, n_head=12, n_kv_head=4, dim=768, head_dim=64,
                               ffn_dim=2048, expert_dim=1024, context=2048, chunk=512, n_experts=8, top_k=2,
                               moe_every=2, rope_scaling=()),
    }


PRESETS = _presets()


# -- positions: RoPE ---------------------------------------------------------------------------------------------

def rope_frequencies(cfg, device=None):
    """RoPE's angle per position, (d/2,) float32, with Llama 3.1's scaling where cfg has one.

    Wavelengths below original/high are unchanged, those above original/low are multiplied by factor, those between are
    interpolated; low == high (Llama 4 Scout) is a hard threshold. Source: meta-llama/llama-models `apply_scaling`.
    """
    freq = 1.0 / cfg.rope_theta ** (torch.arange(0, cfg.head_dim, 2, device=device).float() / cfg.head_dim)
    if not cfg.rope_scaling:
        return freq
    factor, low, high, original = cfg.rope_scaling
    turns = original * freq / (2 * math.pi)  # full turns of each pair within the original context
    keep = (turns > high).float() if low == high else ((turns - low) / (high - low)).clamp(0, 1)
    return keep * freq + (1 - keep) * freq / factor


def rope_angles(cfg, positions):
    """cos and sin at positions (T,) or (B, T), sin with the signs of the formula in `rotate`: (1, T, d) or (B, 1, T, d)
    each, float32.

    With d = 4, and angles a and b for its two pairs:
        Llama 1 to 3, pairs (x0, x2) (x1, x3):  cos a, cos b, cos a, cos b  and  -sin a, -sin b, sin a, sin b
        Llama 4, pairs (x0, x1) (x2, x3):       cos a, cos a, cos b, cos b  and  -sin a, sin a, -sin b, sin b
    """
    angle = positions[..., None].float() * rope_frequencies(cfg, positions.device)  # (..., T, d/2)
    cos, sin = angle.cos().unsqueeze(-3), angle.sin().unsqueeze(-3)  # one axis more, for the heads
    pair = -1 if cfg.arch == "llama4" else -2  # the axis to stack on: a pair is side by side, or half of d apart
    return torch.stack((cos, cos), pair).flatten(-2), torch.stack((-sin, sin), pair).flatten(-2)


def rotate(x, rope, interleaved):
    """Turn the pairs (a, b) of x (B, H, T, d) to (a cos - b sin, b cos + a sin), in float32.

    A pair is (x[2i], x[2i+1]) when interleaved (Meta's layout, Llama 4), else (x[i], x[i+d/2]) (Hugging Face's
    layout for Llama 1 to 3, whose q_proj and k_proj rows are permuted to match).
    """
    cos, sin = rope
    x32 = x.float()
    if interleaved:
        other = x32.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)  # x1, x0, x3, x2
    else:
        other = x32.roll(x.shape[-1] // 2, -1)  # x2, x3, x0, x1
    return torch.addcmul(x32 * cos, other, sin).type_as(x)


def query_scale(cfg, positions):
    """The factor for the queries of NoPE layers at positions (T,) or (B, T): (1, T, 1) or (B, 1, T, 1).

    It grows slowly, so that attention over long texts stays sharp (arXiv:2501.19399).
    """
    steps = ((positions + 1) // cfg.floor_scale).float()
    return (1 + cfg.attn_scale * torch.log1p(steps)).unsqueeze(-2).unsqueeze(-1)


# -- layers ------------------------------------------------------------------------------------------------------

class Linear(nn.Linear):
    """x W^T with W (out, in). torch's own initialisation is skipped, since `Llama.init_weights` does it."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs, bias=False)

    def reset_parameters(self):
        pass


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis (arXiv:1910.07467), in float32 inside. It comes out in the dtype of the
    products it goes into, so that it is cast once and not for each of them."""

    def __init__(self, dim, eps):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.eps).to(product_dtype(x))


def attend(q, k, v, mask=None, chunk=0):
    """Attention of q (B, H, T, d) to k, v (B, K, S, d), each shared by H/K query heads -> (B, H, T, d).

    With a mask, chunk is ignored: it is (B, 1, T, S), True where a query sees a key, or (n + 1,) from `Decoder.starts`.
    Without one, S is T and each query sees the keys up to its own position, or, where chunk > 0, those of them that lie
    in its own chunk.
    """
    B, H, T, _ = q.shape
    groups = H // k.shape[1]
    if mask is not None and mask.dim() == 1:
        from torch.nn.attention.varlen import varlen_attn  # not above: it loads torch's compiler, for seconds
        q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (q, k, v))  # (B·T, H, d)
        y = varlen_attn(q, k, v, mask, mask, T, T, window_size=(-1, 0), enable_gqa=groups > 1)
        return y.unflatten(0, (B, T)).transpose(1, 2)  # (B, H, T, d)
    if mask is None and chunk and T > chunk:  # chunks beside each other on the batch axis, the last one padded
        n = -(-T // chunk)
        q, k, v = (F.pad(t, (0, 0, 0, n * chunk - T)).unflatten(2, (n, chunk)).transpose(1, 2).flatten(0, 1)
                   for t in (q, k, v))  # (B·n, H, C, d)
        y = attend(q, k, v)
        return y.unflatten(0, (B, n)).transpose(1, 2).flatten(2, 3)[:, :, :T]  # (B, H, T, d)
    if q.requires_grad and q.dtype == torch.bfloat16 and q.device.type == "cpu" and T <= 512:
        return attend_by_products(q, k, v, mask)
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=groups > 1)
    if T == 1:  # the heads of a group take the place of the positions, so that no key has to be repeated
        q = q.reshape(B, -1, groups, q.shape[3])  # (B, K, H/K, d)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).reshape(B, H, 1, -1)  # (B, H, 1, d)
    if groups > 1:  # enable_gqa together with a mask would rule out a GPU's fast kernels
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)  # (B, H, S, d)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def attend_by_products(q, k, v, mask=None):
    """As `attend`, in two products and a softmax. torch's kernel for processors computes bfloat16 gradients without the
    processor's bfloat16 units: this takes a fifth of its time at 128 positions, half at 256, as much at 1,024."""
    B, H, T, d = q.shape
    K, S = k.shape[1:3]
    if mask is None:
        hidden = q.new_full((T, S), -torch.inf).triu(1).repeat(H // K, 1)  # (H/K·T, S): heads of a group are more rows
    else:
        hidden = q.new_zeros(mask.shape).masked_fill(~mask, -torch.inf)[:, None]  # (B, 1, 1, T, S)
        hidden = hidden.expand(B, K, H // K, T, S).reshape(B * K, -1, S)  # (B·K, H/K·T, S)
    q, k, v = q.reshape(B * K, -1, d), k.flatten(0, 1), v.flatten(0, 1)  # (B·K, H/K·T, d), (B·K, S, d) twice
    scores = torch.baddbmm(hidden, q, k.mT, alpha=d ** -0.5)  # (B·K, H/K·T, S)
    return torch.bmm(scores.softmax(-1), v).view(B, H, T, d)


VARLEN = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)  # in 2.10 `varlen_attn` had no grouped heads


def takes_starts(x, head_dim):
    """Whether `attend` can take `Decoder.starts` for x: on GPUs from Ampere on, in 16 bits."""
    return (VARLEN and x.is_cuda and product_dtype(x).itemsize == 2 and head_dim % 8 == 0 and head_dim <= 256
            and torch.cuda.get_device_capability(x.device) >= (8, 0))


class Attention(nn.Module):
    """Causal grouped-query attention of one layer: RoPE or NoPE, full or chunked."""

    def __init__(self, cfg, layer):
        super().__init__()
        self.cfg, self.layer, self.nope, self.chunk = cfg, layer, cfg.is_nope(layer), cfg.chunk_of(layer)
        self.q_proj = Linear(cfg.dim, cfg.n_head * cfg.head_dim)
        self.k_proj = Linear(cfg.dim, cfg.n_kv_head * cfg.head_dim)
        self.v_proj = Linear(cfg.dim, cfg.n_kv_head * cfg.head_dim)
        self.o_proj = Linear(cfg.n_head * cfg.head_dim, cfg.dim)

    def forward(self, x, rope, positions, mask=None, cache=None):
        """x (B, T, D) -> (B, T, D). rope: from `rope_angles`; mask: see `attend`; cache: a KVCache to append to."""
        cfg, (B, T, _) = self.cfg, x.shape
        q = self.q_proj(x).view(B, T, -1, cfg.head_dim).transpose(1, 2)  # (B, H, T, d)
        k = self.k_proj(x).view(B, T, -1, cfg.head_dim).transpose(1, 2)  # (B, K, T, d)
        v = self.v_proj(x).view(B, T, -1, cfg.head_dim).transpose(1, 2)  # (B, K, T, d)
        if not self.nope:
            q, k = (rotate(t, rope, interleaved=cfg.arch == "llama4") for t in (q, k))
        if cfg.qk_norm and not self.nope:
            q, k = (F.rms_norm(t, t.shape[-1:], eps=cfg.norm_eps).type_as(v) for t in (q, k))  # CUDA's autocast widens
        if cfg.attn_scale and self.nope:
            q = (q * query_scale(cfg, positions)).type_as(q)
        if cache is not None:
            k, v = cache.update(self.layer, k, v, positions)  # (B, K, S, d)
        y = attend(q, k, v, mask, self.chunk)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))  # (B, T, H·d): the heads side by side


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)): the dense feed-forward, and the shared expert."""

    def __init__(self, dim, width):
        super().__init__()
        self.gate_proj = Linear(dim, width)
        self.up_proj = Linear(dim, width)
        self.down_proj = Linear(width, dim)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def without_gradients(function):
    """The function in inference mode, whose steps take up to a tenth less time; but under autocast in `no_grad`, since
    inference mode keeps no casts, and every matrix would be cast anew for each token."""
    modes = torch.inference_mode()(function), torch.no_grad()(function)

    @functools.wraps(function)
    def call(*args, **kwargs):
        return modes[any(map(torch.is_autocast_enabled, ("cpu", "cuda", "mps")))](*args, **kwargs)
    return call


def product_dtype(x):
    """The dtype of products with x: autocast's if that is on, else its own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def grouped_mm(x, weight, ends):
    """F.grouped_mm, which wants rows of 16 bytes: others get zeros. torch.compile supports it in bfloat16 only; in
    another dtype it runs outside the compiled graph."""
    (_, inputs, out), unit = weight.shape, 16 // x.itemsize
    if inputs % unit or out % unit:
        x, weight = F.pad(x, (0, -inputs % unit)), F.pad(weight, (0, -out % unit, 0, -inputs % unit))
        return grouped_mm(x, weight, ends)[:, :out]
    known = x.dtype == torch.bfloat16 or not torch.compiler.is_compiling()
    return (F.grouped_mm if known else torch.compiler.disable(F.grouped_mm))(x, weight, offs=ends)


class Experts(nn.Module):
    """E SwiGLUs side by side, run over tokens that are sorted by expert."""

    def __init__(self, n_experts, dim, width):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(n_experts, dim, 2 * width))
        self.down_proj = nn.Parameter(torch.empty(n_experts, width, dim))

    def product(self, name, x, ends):
        """x (N·k, inputs) sorted by expert, times each expert's matrix of this name -> (N·k, outputs)."""
        dtype = product_dtype(x)  # grouped_mm is not on autocast's list
        return grouped_mm(x.to(dtype), getattr(self, name).to(dtype), ends)

    def forward(self, x, ends):
        """x (N·k, D) sorted by expert, ends (E,) int32 the end of each expert's rows -> (N·k, D)."""
        gate, up = self.product("gate_up_proj", x, ends).chunk(2, -1)  # (N·k, F) each
        return self.product("down_proj", F.silu(gate) * up, ends)


class MoE(nn.Module):
    """Llama 4's mixture: y = shared(x) + sum over the top k experts of expert(sigmoid(logit) * x)."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.router = Linear(cfg.dim, cfg.n_experts)
        self.experts = Experts(cfg.n_experts, cfg.dim, cfg.expert_dim)
        self.shared_expert = SwiGLU(cfg.dim, cfg.expert_dim)

    def forward(self, x):
        """x (B, T, D) -> y (B, T, D), balancing loss (0 where it is not asked for), tokens per expert (E,).

        Each expert takes its tokens as one slice, so they are sorted by expert first. With k = 1 and four tokens:
            expert = 2 0 1 0   token t goes to expert[t]
            order  = 1 3 2 0   row r of the sorted is row order[r] of the unsorted
            back   = 3 0 2 1   row t of the unsorted is row back[t] of the sorted
        With k = 2, token t has the rows 2t and 2t + 1 of the unsorted.
        """
        cfg, shape = self.cfg, x.shape
        x = x.reshape(-1, cfg.dim)  # (N, D)
        logits = self.router(x).float()  # (N, E)
        choice = logits
        if self.training and cfg.router_noise:
            choice = logits + cfg.router_noise * torch.randn_like(logits)
        expert = choice.topk(cfg.top_k, dim=-1).indices  # (N, k)
        score = logits.gather(1, expert).sigmoid()  # (N, k) from the raw logits: noise only selects
        count = (expert.flatten()[:, None] == torch.arange(cfg.n_experts, device=x.device)).sum(0)  # (E,)

        order = expert.flatten().argsort(stable=True)  # (N·k,)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=x.device)
        routed = x[order // cfg.top_k] * score.flatten()[order][:, None].type_as(x)  # (N·k, D) scores scale inputs
        routed = self.experts(routed, count.cumsum(0).int())[back]  # (N·k, D) unsorted again
        y = self.shared_expert(x) + routed.unflatten(0, (-1, cfg.top_k)).sum(1)  # (N, D)

        balance = logits.new_zeros(())
        if self.training and cfg.router_aux:  # Switch: E * sum_e (share of tokens) * (mean probability); 1 is best
            balance = cfg.n_experts * (count / count.sum() * logits.softmax(-1).mean(0)).sum()
        return y.view(shape), balance, count


class Block(nn.Module):
    """h = x + attention(norm(x)); out = h + feed_forward(norm(h))."""

    def __init__(self, cfg, layer):
        super().__init__()
        self.is_moe = cfg.is_moe(layer)
        self.input_layernorm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.self_attn = Attention(cfg, layer)
        self.post_attention_layernorm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.ffn_name = "mlp" if cfg.arch == "llama" else "feed_forward"  # Hugging Face's names
        self.add_module(self.ffn_name, MoE(cfg) if self.is_moe else SwiGLU(cfg.dim, cfg.ffn_dim))
        self.dropout = nn.Dropout(cfg.dropout)

    @property
    def ffn(self):
        """The feed-forward: a SwiGLU or an MoE."""
        return getattr(self, self.ffn_name)

    def forward(self, x, rope, positions, mask=None, cache=None):
        """x (B, T, D) -> x (B, T, D), balancing loss, tokens per expert (E,); a dense layer has 0 for both."""
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), rope, positions, mask, cache))
        h = self.post_attention_layernorm(x)
        if self.is_moe:
            y, balance, load = self.ffn(h)
        else:
            y, balance, load = self.ffn(h), 0.0, 0.0
        return x + self.dropout(y), balance, load


class Head(Linear):
    """Logits of hidden states, or the loss of each."""
    WHOLE = 2**28  # so many logits, 1 GiB in float32, are made at once; the loss then holds three such
    ROWS = 1024  # where there are more: the most rows made at a time, and made again in the backward pass

    def forward(self, x, targets=None, reduction="none"):
        """x (..., D) -> logits (..., V). With x (N, D) and targets (N,): the loss of each in nats, (N,) float32, 0
        where the target is -100; or their sum, (), with reduction "sum".

        All within this one call: FSDP gathers the weight at each call, and all processes must call equally often,
        however many targets they have.
        """
        if targets is None:
            return super().forward(x)

        def part(x, targets):
            return self.nats(F.linear(x, self.weight), targets, reduction)
        if len(x) * self.out_features <= self.WHOLE:
            return part(x, targets)
        count = 2
        while count * self.ROWS < len(x):  # a power of two: torch.compile makes a graph for each number of parts
            count *= 2
        size = -(-len(x) // count)
        parts = [checkpoint(part, rows, wanted, use_reentrant=False, preserve_rng_state=False)
                 for rows, wanted in zip(x.split(size), targets.split(size))]
        return torch.stack(parts).sum() if reduction == "sum" else torch.cat(parts)

    def nats(self, logits, targets, reduction):
        return F.cross_entropy(logits.float(), targets, ignore_index=-100, reduction=reduction)


# -- the model ---------------------------------------------------------------------------------------------------

class Decoder(nn.Module):
    """Embedding, blocks and final norm: everything but the head."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        unset = torch.empty(cfg.vocab_size, cfg.dim)  # until init_weights
        self.embed_tokens = nn.Embedding.from_pretrained(unset, freeze=False)
        self.layers = nn.ModuleList(Block(cfg, i) for i in range(cfg.n_layer))
        self.norm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.dropout = nn.Dropout(cfg.dropout)
        self.checkpointing = False  # recompute each block in the backward pass: less memory, a third more work
        load = torch.zeros(cfg.n_layer, cfg.n_experts, device="cpu")  # real even if the weights are on "meta"
        self.register_buffer("expert_load", load, persistent=False)

    def masks(self, positions):
        """Which keys each query sees when texts share a row: (full, chunked), (B, 1, T, T) bool each.

        A token at position p hides, from itself on, all tokens to its left whose position is p or more. It sees itself
        and what is to its left and not hidden. So position 0 begins a new document, and a jump back to p keeps p
        tokens of what was seen and drops the rest. Positions 0 1 2 3, 2 3, 3 (commas only for the eye):
        token 4 sees tokens 0 1 4, token 5 sees 0 1 4 5, and token 6 sees 0 1 4 6: it takes the place of 5.
        """
        T = positions.shape[1]
        place = torch.arange(T, device=positions.device)
        hides = (positions[:, None] <= positions[:, :, None]) & (place > place[:, None])  # (B, T, T): [key, by token]
        end = F.pad(hides, (0, 1), value=True).byte().argmax(2)  # (B, T) the first token that hides each key, else T
        full = (place <= place[:, None]) & (place[:, None] < end[:, None])  # (B, T, T): [query, key]
        chunk = positions // (self.cfg.chunk or self.cfg.context)  # without chunks all are in the first one
        same = chunk[:, :, None] == chunk[:, None]
        return full[:, None], (full & same)[:, None]

    def starts(self, positions):
        """What `masks` says, for positions (B, T) that only ever begin again at 0: where each document begins in rows
        laid flat, and each chunk of one, and in the end B·T: (n + 1,) int32 each. Positions 0 1 2 0 1: 0, 3, 5."""
        flat = positions.flatten()  # (B·T,)
        found = (flat == 0).nonzero(), (flat % (self.cfg.chunk or self.cfg.context) == 0).nonzero()  # (n, 1)
        return tuple(F.pad(places.squeeze(1), (0, 1), value=len(flat)).int() for places in found)

    def forward(self, idx=None, embeds=None, positions=None, cache=None, lengths=None, documents=False):
        """Hidden states (B, T, D) and the balancing loss, summed over layers. documents: positions restart
        at 0 only, so that some GPUs need no mask. See Llama.forward."""
        x = self.embed_tokens(idx) if embeds is None else embeds
        if positions is not None and cache is not None or lengths is not None and cache is None:
            raise ValueError("a cache knows its own positions, and only a cache takes lengths")
        if cache is not None:
            return self.append(x, cache, lengths), 0.0
        if positions is None:
            return self.blocks(x, torch.arange(x.shape[1], device=x.device))
        starts = documents and takes_starts(x, self.cfg.head_dim)
        return self.blocks(x, positions, self.starts(positions) if starts else self.masks(positions))

    def append(self, x, cache, lengths=None):
        """Hidden states of x (B, T, D), which follow the tokens in cache and are added to it.

        Later tokens go in by pieces that do not cross the edge of a chunk (see `KVCache.pieces`), or else their last
        keys would overwrite those that their first queries need. A prompt sees its own keys, so it goes in whole.
        """
        hidden = []
        for piece in x.split(cache.pieces(x.shape[1]), dim=1):
            positions = cache.extend(piece.shape[1], lengths)
            masks = cache.mask(positions, 0), cache.mask(positions, self.cfg.chunk)
            hidden.append(self.blocks(piece, positions, masks, cache)[0])
        return torch.cat(hidden, 1)

    def blocks(self, x, positions, masks=(None, None), cache=None):
        """Hidden states (B, T, D) and the summed balancing loss of x (B, T, D) at positions (T,) or (B, T).

        masks: for full and for chunked attention, as `attend` takes them.
        """
        full, chunked = masks
        rope = rope_angles(self.cfg, positions)
        x, total = self.dropout(x), 0.0
        for i, block in enumerate(self.layers):
            mask = chunked if block.self_attn.chunk else full
            if self.checkpointing and self.training:
                x, balance, load = checkpoint(block, x, rope, positions, mask, cache, use_reentrant=False)
            else:
                x, balance, load = block(x, rope, positions, mask, cache)
            total = total + balance
            if self.training and block.is_moe:  # counted here, because checkpointing runs each block twice
                self.expert_load[i] += load
        return self.norm(x), total


class Llama(nn.Module):
    """A Llama language model. Draws its weights with `init_weights`; `from_pretrained` reads them."""

    def __init__(self, cfg, seed=1337):  # nanoGPT's seed
        super().__init__()
        self.config = cfg
        self.model = Decoder(cfg)
        self.lm_head = Head(cfg.dim, cfg.vocab_size)
        self.few_targets = False  # make logits only where a target counts: pays where few do, as in conversations
        if cfg.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        if not self.lm_head.weight.is_meta:
            self.init_weights(seed)

    @torch.no_grad()
    def init_weights(self, seed):
        """Initialise every tensor by its role.

        norms        1
        embedding    normal, std 1: a token must stand out from what the blocks add to it, otherwise copying is
                     learned late; dim^-0.5 if it is the head too: logits of unit scale
        head         std 0.02: small logits, so that the first loss is close to ln V
        reads the residual stream    std 1/sqrt(inputs): activations start at unit scale at any width
        writes to it (o_proj, every down_proj)    the same over sqrt(2 * n_layer), so that the stream's variance does
                     not grow with depth (GPT-2)
        router       std 1/sqrt(dim), logits of unit scale
        The numbers depend on seed, the tensor's name and the device alone, not on what else was drawn.
        """
        for name, p in self.named_parameters():
            role = name.removesuffix(".weight").rsplit(".", 1)[-1]
            if role.endswith("norm"):
                p.fill_(1.0)
                continue
            if role == "embed_tokens":
                std = self.config.dim ** -0.5 if self.config.tie_embeddings else 1.0
            elif role == "lm_head":
                std = 0.02
            else:
                inputs = p.shape[1]  # Linear is (out, in), Experts are (E, in, out): both have it second
                depth = 2 * self.config.n_layer if role in ("o_proj", "down_proj") else 1
                std = (inputs * depth) ** -0.5
            put(p, draw_normal(p.shape, std, seed, name, p.device))

    def allocate(self, device):
        """Give a model that was made on the meta device memory there, to be filled; returns the model."""
        self._apply(lambda t: t.new_empty(t.shape, device=device))  # `to_empty` imports the compiler, for seconds
        self.model.expert_load = torch.zeros_like(self.model.expert_load, dtype=torch.float32)
        if self.config.tie_embeddings:  # `_apply` has made two of it
            self.lm_head.weight = self.model.embed_tokens.weight
        return self

    def forward(self, idx=None, targets=None, positions=None, *, embeds=None, cache=None, lengths=None):
        """Returns (logits (B, T, V), None) without targets, and (None, loss) with them.

        idx (B, T) int64, or embeds (B, T, D) in its place. targets (B, T): the token that follows each position,
        -100 if it does not count. positions (B, T): restart at 0 with each document, which then sees no earlier one;
        with embeds, or without targets, as `Decoder.masks` says. cache: a KVCache; the new tokens continue those in it
        and are appended. lengths (B,): the real lengths of right-padded prompts, for an empty cache only. Raises
        ValueError if the tokens do not fit the cache.
        The loss is the mean over the targets that count, in nats, 0 if none does. In training, router_aux times the
        balancing loss is added.
        """
        documents = targets is not None and embeds is None
        x, balance = self.model(idx, embeds, positions, cache, lengths, documents)
        if targets is None:
            return self.lm_head(x), None
        x, targets = x.flatten(0, 1), targets.flatten()  # (B·T, D), (B·T,)
        if self.few_targets:
            x, targets = x[targets != -100], targets[targets != -100]  # (M, D), (M,)
        loss = self.lm_head(x, targets, "sum") / (targets != -100).sum().clamp(min=1)
        if self.training and self.config.router_aux:
            loss = loss + self.config.router_aux * balance
        return None, loss

    def losses(self, idx, positions, source, target):
        """Nats of each target (M,), predicted at the places source (M,) of idx (B, T) laid flat: (M,), float32.

        Where few of the places count, as in scores and answers: no other logits are made. positions as in `forward`."""
        x = self.model(idx, positions=positions)[0].flatten(0, 1)[source]  # (M, D)
        return self.lm_head(x, target)

    # -- facts ---------------------------------------------------------------------------------------------------

    def counts(self):
        """(parameters, parameters that one token uses), tied weights once."""
        total = sum(p.numel() for p in self.parameters())
        routed = sum(p.numel() for m in self.modules() if isinstance(m, Experts) for p in m.parameters())
        idle = routed - routed * self.config.top_k // max(self.config.n_experts, 1)  # experts that a token skips
        return total, total - idle

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

    @torch.no_grad()
    def pop_expert_load(self):
        """(layers with experts, E): tokens that each expert got in training since the last call, on this process."""
        load = self.model.expert_load[[block.is_moe for block in self.model.layers]]
        self.model.expert_load.zero_()
        return load

    # -- generation ----------------------------------------------------------------------------------------------

    def decode_one_token(self, token, cache):
        """Append token (B,) to the cache; returns the logits (B, V) of what follows it."""
        return self.lm_head(self.model(token[:, None], cache=cache)[0][:, 0])

    @without_gradients
    def stream(self, prompt, max_new_tokens=1, eos_id=None, mask=None, cache=None, **sampling):
        """Yield the next token of every row, (B,) int64, until all rows have ended or the context is full.

        prompt: ids (B, T), or embeddings (B, T, D); mask (B, T): 1 where it is real, 0 for padding on the left or
        right. eos_id: an id, or several; a row that has ended repeats its end token. cache: a KVCache to continue from,
        large enough for all that is new. Afterwards it holds the prompts and all new tokens except the last.
        sampling: fields of `Sampling`. Raises ValueError when a prompt is empty or leaves no room in the context.
        """
        x = prompt if prompt.is_floating_point() else self.model.embed_tokens(prompt)
        (B, T, _), device, sampling = x.shape, x.device, Sampling(**sampling)
        room = self.config.context - (0 if cache is None else int(cache.lengths.max()))
        if not 0 < T < room:
            raise ValueError(f"a prompt of {T} tokens: it takes 1 to {room - 1} in this context")
        steps = min(max_new_tokens, room - T)
        if cache is None:
            cache = KVCache(self.config, B, T + steps, device, product_dtype(x))
        lengths, last = None, -1
        if mask is not None:
            lengths = mask.sum(1)
            if (lengths == 0).any():
                raise ValueError("a prompt is empty")
            first = mask.int().argmax(1, keepdim=True)  # (B, 1) where each prompt begins: left padding moves right
            source = (first + torch.arange(T, device=device)).clamp(max=T - 1)  # (B, T)
            x, last = x.gather(1, source[..., None].expand_as(x)), lengths - 1
        ends = torch.tensor([] if eos_id is None else [eos_id] if isinstance(eos_id, int) else sorted(eos_id),
                            dtype=torch.long, device=device)
        generator, done = sampling.generator(device), torch.zeros(B, dtype=torch.bool, device=device)
        for step in range(steps):
            if step == 0:
                hidden = self.model(embeds=x, cache=cache, lengths=lengths)[0]  # (B, T, D)
                token = sampling.pick(self.lm_head(hidden[torch.arange(B, device=device), last]), generator)
            else:
                token = torch.where(done, token, sampling.pick(self.decode_one_token(token, cache), generator))
            done = done | torch.isin(token, ends)
            yield token
            if len(ends) and done.all():
                return

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, min_p=None, eos_id=None, seed=None,
                 mask=None):
        """idx (B, T) with up to max_new_tokens more tokens, (B, T + new). Arguments as for `stream` and `Sampling`."""
        new = list(self.stream(idx, max_new_tokens, eos_id, mask, temperature=temperature, top_k=top_k, top_p=top_p,
                               min_p=min_p, seed=seed))
        torch.clear_autocast_cache()  # torch 2.10 keeps casts made without gradients, of no use to a backward pass
        return torch.cat((idx, torch.stack(new, 1)), 1) if new else idx

    # -- files: see checkpoint.py ------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, name, dtype=None, device="cpu", **overrides):
        """Read a checkpoint of transformers: a directory or a hub name. See `checkpoint.load`."""
        import checkpoint
        return checkpoint.load(name, dtype, device, **overrides)

    def save_pretrained(self, directory, state=None, max_shard_size="5GB"):
        """Write a checkpoint that transformers opens. See `checkpoint.save`."""
        import checkpoint
        checkpoint.save(self, directory, state, max_shard_size)


def draw_normal(shape, std, seed, name, device):
    """Normal numbers (shape), float32, that depend on nothing but seed, name and device."""
    key = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(key, "big") >> 1)  # 63 bits
    return torch.empty(shape, dtype=torch.float32, device=device).normal_(std=std, generator=generator)


def put(p, whole):
    """Copy a whole tensor into p, or the part of it that this process has where p is a DTensor; asks no other."""
    if not hasattr(p, "placements"):
        p.copy_(whole)
        return
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
    size, start = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
    if all(size):  # the last processes may have nothing of a small one
        p.to_local().copy_(whole[tuple(slice(a, a + n) for a, n in zip(start, size))])


# -- generation --------------------------------------------------------------------------------------------------

class KVCache:
    """Keys and values of B rows that are decoded together, preallocated for `size` positions.

    A layer with chunked attention has S = min(chunk, size) slots, any other S = size. Slot s holds the last position p
    with p % S == s. With S = 4, a row of 6 tokens has 4 5 2 3 in its slots.
    Rows may differ in length: lengths (B,) counts the tokens of each. An empty cache takes a prompt, whose positions
    are (T,), the same for all rows: it attends to its own keys, as in training. Later tokens have positions (B, T), and
    see the slots up to their own: the others hold keys of an earlier chunk, or none yet.
    """

    def __init__(self, cfg, batch, size, device=None, dtype=None):
        self.cfg, self.size = cfg, size
        self.in_use = 0  # attention reads only so many slots
        shapes = [(batch, self.slots(cfg.chunk_of(i)), cfg.n_kv_head, cfg.head_dim) for i in range(cfg.n_layer)]
        self.keys = [torch.zeros(s, device=device, dtype=dtype) for s in shapes]  # (B, S, K, d) of each layer
        self.values = [torch.zeros(s, device=device, dtype=dtype) for s in shapes]
        self.lengths = torch.zeros(batch, dtype=torch.long, device=device)  # last: the largest fail first
        self.rows = torch.arange(batch, device=device)[:, None]  # (B, 1)

    def part(self, rows):
        """A cache of these rows alone (a slice). Its tensors are views: what it stores is stored here too."""
        part = copy.copy(self)
        part.lengths = self.lengths[rows]
        part.rows = self.rows[:len(part.lengths)]
        part.keys, part.values = [k[rows] for k in self.keys], [v[rows] for v in self.values]
        return part

    def slots(self, chunk):
        """S of a layer with this chunk; 0: with full attention."""
        return min(chunk or self.size, self.size)

    def pieces(self, T):
        """The sizes of the pieces in which T new tokens go in. Raises ValueError where they do not fit."""
        longest, chunk = int(self.lengths.max()), self.cfg.chunk
        if longest + T > self.size:
            raise ValueError(f"{T} tokens do not fit a cache of {self.size}, which holds {longest}")
        edges = {0, T}
        if longest and 0 < chunk < self.size:  # after 6 tokens, with chunks of 4, new tokens 2, 6, ... begin a chunk
            for length in self.lengths.tolist():
                edges.update(range(-length % chunk, T, chunk))
        edges = sorted(edges)
        return [end - start for start, end in zip(edges, edges[1:])]

    def extend(self, T, lengths=None):
        """Count T more tokens in each row, or lengths (B,) in an empty cache; returns their positions."""
        positions = torch.arange(T, device=self.lengths.device)  # (T,)
        if self.lengths.any():
            if lengths is not None:
                raise ValueError("only an empty cache takes prompts of different lengths")
            positions = self.lengths[:, None] + positions  # (B, T)
        self.lengths += T if lengths is None else lengths
        self.in_use = int(self.lengths.max())
        return positions

    def mask(self, positions, chunk):
        """Which slots the tokens at positions see in layers of this chunk, (B, 1, T, S); None for a prompt in an empty
        cache, where `attend` is causal by itself."""
        if positions.dim() == 1:
            return None
        slots = torch.arange(min(self.slots(chunk), self.in_use), device=positions.device)
        return (slots <= (positions % self.slots(chunk))[..., None])[:, None]

    def update(self, layer, k, v, positions):
        """Store k, v (B, K, T, d) of a layer; returns what to attend to: those of all slots in use, or a prompt's."""
        keys, values = self.keys[layer], self.values[layer]  # (B, S, K, d)
        S, T = keys.shape[1], k.shape[2]
        new_k, new_v = k.transpose(1, 2).to(keys.dtype), v.transpose(1, 2).to(keys.dtype)  # (B, T, K, d)
        stored = positions
        if T > S:  # each row's last S tokens (a row that has fewer repeats position 0)
            stored = (self.lengths[:, None] - S + torch.arange(S, device=k.device)).clamp(min=0)  # (B, S)
            new_k, new_v = new_k[self.rows, stored], new_v[self.rows, stored]  # (B, S, K, d)
        slot = stored % S
        keys[self.rows, slot] = new_k
        values[self.rows, slot] = new_v
        if positions.dim() == 1:
            return k, v
        return keys[:, :self.in_use].transpose(1, 2), values[:, :self.in_use].transpose(1, 2)

    def rewind(self, length):
        """Forget all but the first `length` tokens of each row, as a chat does whose text has changed; returns how many
        are kept. With chunks of 4, rows of 6 tokens can go back to 5 or 4, but not to 3: the slots of positions 0 and 1
        hold 4 and 5 by now, so they go back to where that chunk begins, to 0. So do rows of 4: they may have had more,
        and have come back to here."""
        longest, chunk = int(self.lengths.max()), self.cfg.chunk
        length = min(length, longest)
        if 0 < chunk < self.size and length // chunk != longest // chunk:
            length = length // chunk * chunk
        self.lengths.clamp_(max=length)
        return length

    def grow(self, size):
        """Make room for `size` positions in all, as a chat that goes on needs it."""
        self.size = max(size, self.size)
        for i in range(self.cfg.n_layer):
            more = self.slots(self.cfg.chunk_of(i)) - self.keys[i].shape[1]
            self.keys[i] = F.pad(self.keys[i], (0, 0, 0, 0, 0, more))  # (B, S, K, d)
            self.values[i] = F.pad(self.values[i], (0, 0, 0, 0, 0, more))


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn."""
    temperature: float = 1.0  # below 1 prefers likely tokens; 0 takes the most likely
    top_k: int | None = None  # keep this many most likely tokens; None or 0: all
    top_p: float | None = None  # keep the fewest whose probabilities reach this (arXiv:1904.09751); None or 1: all
    min_p: float | None = None  # keep those at least this likely relative to the best (arXiv:2407.01082)
    seed: int | None = field(default=None, compare=False)  # same seed, same tokens; None: torch's own state

    def generator(self, device):
        """torch.Generator of this seed, or None."""
        return None if self.seed is None else torch.Generator(device).manual_seed(self.seed)

    def pick(self, logits, generator=None):
        """Draw a token from each row of logits (B, V) -> (B,). generator: one, or a list of one for each row, which
        then does not depend on the other rows. One number is drawn for a row, however many tokens there are."""
        logits, ids = logits.float(), None
        if self.temperature < 1e-9:  # in float32 all probability is then on the most likely token
            return logits.argmax(-1)
        logits = logits - logits.max(-1, keepdim=True).values  # 0 for the most likely, so that nothing overflows
        if self.top_k:
            logits, ids = logits.topk(min(self.top_k, logits.shape[-1]))
        p = (logits / self.temperature).softmax(-1)
        if self.top_p is not None and self.top_p < 1:
            count = (p * p.shape[-1] > 1 - self.top_p).sum(-1).max()  # all others together hold at most 1 - top_p
            order = logits.topk(max(int(count), 1)).indices
            p, ids = p.gather(1, order), order if ids is None else ids.gather(1, order)
            dropped = p.cumsum(-1) - p >= self.top_p  # the tokens before it reach top_p already
            dropped[:, 0] = False
            p = p.masked_fill(dropped, 0)
        if self.min_p:
            p = p.masked_fill(p < self.min_p * p.max(-1, keepdim=True).values, 0)
        each, wide = generator if isinstance(generator, list) else [generator], torch.float64
        if p.device.type == "mps":  # it has no float64
            wide = torch.float32
        draw = torch.cat([torch.rand(len(p) // len(each), 1, dtype=wide, device=g.device if g else p.device,
                                     generator=g) for g in each]).to(p.device)
        sums = p.cumsum(-1, dtype=wide)  # token i is drawn between sums[i - 1] and sums[i]
        place = torch.searchsorted(sums, draw * sums[:, -1:], right=True).clamp(max=p.shape[-1] - 1)
        return (place if ids is None else ids.gather(1, place))[:, 0]
