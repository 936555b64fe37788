"""model.py by itself: nothing leaks from the future, nothing is dead, nothing is drawn or counted wrongly.

Each test names the mistake that it would catch; parity with transformers is in test_parity.py.
"""
import itertools
import math
from dataclasses import fields, replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import fused
import model as model_file
from fused import CrossEntropy
from model import (PRESETS, Decoder, Experts, Head, KVCache, Llama, LlamaConfig, MoE, RMSNorm, Sampling, attend,
                   attend_by_products, rope_angles, rope_frequencies)
from decode import PackedLinear, to_decode

VOCAB = 29


def tiny(name, **changes):
    """A preset's structure (grouping, ties, RoPE scaling, layer pattern, experts) at a size that takes milliseconds."""
    cfg = PRESETS[name]
    group = min(cfg.n_head // cfg.n_kv_head, 4)
    narrow = cfg.dim != cfg.n_head * cfg.head_dim
    small = replace(cfg, vocab_size=VOCAB, n_layer=cfg.nope_every or 2, n_head=2 * group, n_kv_head=2, head_dim=8,
                    dim=16 * group + 4 * narrow, ffn_dim=24, expert_dim=12, context=64, n_experts=min(cfg.n_experts, 8),
                    chunk=8 if cfg.chunk else 0, floor_scale=3,
                    rope_scaling=(*cfg.rope_scaling[:3], 16.0) if cfg.rope_scaling else ())
    return replace(small, **changes)


def distinct():
    """Presets whose tiny versions differ in more than numbers: one name for each structure."""
    seen = {}
    for name in PRESETS:
        cfg = tiny(name, rope_theta=1e4, norm_eps=1e-5)
        seen.setdefault(repr(cfg), name)
    return list(seen.values())


def tokens(*shape, seed=0):
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def build(cfg, seed=0):
    """A model in eval mode whose logits have unit scale: those of the default draw are so small that errors hide."""
    model = Llama(cfg, seed).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(0.1 * torch.randn_like(p))
        model.model.embed_tokens.weight.normal_()
        model.lm_head.weight.normal_(std=cfg.dim ** -0.5)
    return model


# -- leaks -------------------------------------------------------------------------------------------------------

@torch.no_grad()
@pytest.mark.parametrize("name", PRESETS)
def test_a_token_moves_no_logit_before_itself_and_every_one_that_may_see_it(name):
    cfg = tiny(name)
    model, idx = build(cfg), tokens(2, 27)
    before, _ = model(idx)
    for j in (0, 7, 8, 9, 17, 26):
        changed = idx.clone()
        changed[:, j] = (changed[:, j] + 1) % VOCAB
        moved = (model(changed)[0] - before).abs().amax((0, 2))
        rounding = 1e-6 * before.abs().max() if cfg.n_experts else 0.0  # experts multiply groups of other sizes
        assert (moved[:j] <= rounding).all(), f"token {j} reaches back"
        seen = moved[j:] if not cfg.chunk or cfg.nope_every else moved[j:(j // cfg.chunk + 1) * cfg.chunk]
        assert seen.min() > 1e-4, f"token {j} is invisible to a later position"


@torch.no_grad()
def test_chunks_hide_earlier_chunks_exactly():
    cfg = tiny("llama-4-scout", nope_every=0, attn_scale=0.0, chunk=4, n_layer=3)
    model, idx = build(cfg), tokens(1, 14)
    changed = idx.clone()
    changed[:, 5] += 1
    moved = (model(changed % VOCAB)[0] - model(idx)[0]).abs().amax((0, 2))
    assert moved[5:8].min() > 1e-4 and moved[8:].max() <= 1e-6 and moved[:5].max() <= 1e-6


def fit(cfg, target, steps, seed=0):
    """Loss on fresh data after training on iid random tokens; target(idx (B, T + 1)) makes inputs and targets."""
    model = Llama(cfg, seed)
    opt = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(steps):
        x, y = target(tokens(16, 33, seed=1 + step))
        loss = model(x, y)[1]
        opt.zero_grad()
        loss.backward()
        opt.step()
    with torch.no_grad():
        return model.eval()(*target(tokens(64, 33, seed=10**6)))[1].item()


def honest(idx):
    return idx[:, :-1], idx[:, 1:]


@pytest.mark.parametrize("name", distinct())
def test_random_tokens_cannot_be_predicted(name):
    # 2,048 iid tokens: a calibrated model's loss scatters by far less than 0.02 around ln V
    assert fit(tiny(name), honest, 25) > math.log(VOCAB) - 0.02


def test_the_test_above_would_see_a_leak(monkeypatch):
    cfg = tiny("llama-2-7b")
    assert fit(cfg, lambda idx: (idx[:, 1:], idx[:, 1:]), 25) < math.log(VOCAB) - 1  # targets that were not shifted
    attention = F.scaled_dot_product_attention

    def reach(q, k, v, is_causal, **more):  # each position sees the next one, and none else
        nearest = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1).tril(1)
        nearest[-1, -1] = True
        return attention(q, k, v, attn_mask=nearest, **more)
    monkeypatch.setattr(F, "scaled_dot_product_attention", reach)
    assert fit(cfg, honest, 100) < math.log(VOCAB) - 0.5


@torch.no_grad()
@pytest.mark.parametrize("name", PRESETS)
def test_cached_greedy_decoding_equals_the_full_forward(name):
    model, idx = build(tiny(name)), tokens(3, 5)
    out, cached = idx, model.generate(idx, 25, temperature=0)
    for _ in range(25):
        out = torch.cat((out, model(out)[0][:, -1:].argmax(-1)), 1)
    assert torch.equal(out, cached)


@pytest.mark.parametrize("name", ("llama-3.2-1b", "llama-4-scout"))
def test_a_compiled_step_is_one_graph_that_writes_only_where_a_cuda_graph_may(name, monkeypatch):
    """One graph for prompts and lengths of any kind; all that it changes lies at addresses it was promised to stay."""
    from functorch.compile import make_boxed_func
    from torch._functorch.aot_autograd import aot_module_simplified
    written = []

    def backend(graph, inputs):
        def look(graph, _):
            facts = torch._guards.TracingContext.get().fw_metadata
            written.append(set(facts.mutated_inp_runtime_indices) - set(facts.static_input_indices))
            return make_boxed_func(graph.forward)
        return aot_module_simplified(graph, inputs, fw_compiler=look, inference_compiler=look)
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, mode, dynamic: compiler(f, backend=backend, dynamic=dynamic))
    cfg = tiny(name, dim=32, n_head=4, head_dim=8, ffn_dim=48, expert_dim=16, context=128)
    model = to_decode(build(cfg).bfloat16())  # torch's compiler knows grouped_mm in bfloat16 only
    prompts = [(tokens(2, 5), 80), (tokens(2, 3), 20), (tokens(2, 17), 30)]
    want = [model.generate(idx, new, temperature=0) for idx, new in prompts]
    to_decode(model, compile=True)
    got = [model.generate(idx, new, temperature=0) for idx, new in prompts]
    plain = build(cfg).bfloat16()
    for row, other in ((row, other) for a, b in zip(want, got) for row, other in zip(a, b)):
        if len(at := (row != other).nonzero()):  # two tokens that bfloat16 can hardly tell apart
            logits = plain(row[None, :at[0]])[0][0, -1].float()
            assert abs(logits[row[at[0]]] - logits[other[at[0]]]) <= 2**-6 * logits.abs().max()
    assert written == [set()] and len(model.cache_pool.free) == 1  # one graph, one cache that was used three times


# -- nothing dead ------------------------------------------------------------------------------------------------

@torch.no_grad()
@pytest.mark.parametrize("name", distinct())
def test_packed_matrices_multiply_as_they_did(name):
    """Panels are read in their order, and a tied embedding is looked up in the right row."""
    cfg = tiny(name, vocab_size=48, dim=32, n_head=4, head_dim=8, ffn_dim=48, expert_dim=16)
    # 120 rows are one product, 3 rows of the cached steps a product of each panel
    model, idx = build(cfg), tokens(3, 40)
    want, greedy = model(idx)[0], model.generate(idx, 8, temperature=0)
    counts = model.counts()
    to_decode(model)
    assert model.counts() == counts
    assert isinstance(model.lm_head, PackedLinear)
    assert isinstance(model.model.layers[0].self_attn.q_proj, PackedLinear)
    torch.testing.assert_close(model(idx)[0], want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(idx[:1, :5])[0], want[:1, :5], rtol=1e-5, atol=1e-5)
    assert torch.equal(model.generate(idx, 8, temperature=0), greedy)
    odd = to_decode(Llama(replace(cfg, vocab_size=VOCAB)))
    assert odd.lm_head.out_features == VOCAB  # what cannot be cut stays as it is


@pytest.mark.parametrize("name", ["llama-3.2-1b", "scout-128m"])
def test_compiling_changes_nothing(name):
    """In float32, where torch's compiler refuses grouped_mm (the MoE stays outside); without a break in bfloat16."""
    model, idx = build(tiny(name, expert_dim=16, ffn_dim=16)).train(), tokens(2, 20)
    want = model(idx, idx)[1]
    compiled = torch.compile(model, backend="aot_eager")(idx, idx)[1]
    compiled.backward()
    torch.testing.assert_close(compiled, want)
    assert all(p.grad is not None for p in model.parameters())
    torch._dynamo.reset()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch._dynamo.explain(model)(idx, idx).graph_break_count == 0
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim, width", [(16, 24), (12, 20), (14, 9), (13, 8), (16, 9)])
def test_experts_of_any_width_are_swiglus_side_by_side(dim, width, dtype):
    """Also where torch's own product of groups would refuse their rows; gradients too, with empty experts between."""
    experts, sizes = Experts(4, dim, width).to(dtype), [3, 0, 5, 1]
    for p in experts.parameters():
        torch.nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(0))
    x = torch.randn(9, dim, generator=torch.Generator().manual_seed(1)).to(dtype)

    def side_by_side():
        for rows, gate_up, down in zip(x.split(sizes), experts.gate_up_proj, experts.down_proj):
            gate, up = (rows @ gate_up).chunk(2, -1)
            yield F.silu(gate) * up @ down
    want, got = torch.cat([*side_by_side()]), experts(x, torch.tensor(sizes).cumsum(0).int())
    error = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(got, want, rtol=error, atol=error)
    gradients = [torch.autograd.grad(y.float().square().sum(), list(experts.parameters())) for y in (got, want)]
    torch.testing.assert_close(*gradients, rtol=4 * error, atol=4 * error)


def mixtures(model):
    """The mixture-of-experts modules, in order of depth."""
    return [m for m in model.modules() if isinstance(m, MoE)]


@pytest.mark.parametrize("name", distinct())
def test_every_parameter_gets_a_gradient_and_every_expert_is_used(name):
    cfg = tiny(name)
    model = Llama(cfg).train()
    model(*honest(tokens(16, 61)))[1].backward()
    for name, p in model.named_parameters():
        rows = p.grad.flatten(1).abs().sum(1) if p.dim() > 1 else p.grad.abs()  # each expert, neuron, token
        assert rows.min() > 0, name
    assert len(mixtures(model)) == sum(cfg.is_moe(i) for i in range(cfg.n_layer))
    load = model.pop_expert_load()
    assert load.shape == (len(mixtures(model)), cfg.n_experts)
    assert (load > 0).all() and (load.sum(1) == 16 * 60 * cfg.top_k).all()
    assert not model.pop_expert_load().any()


@torch.no_grad()
def test_eval_is_deterministic_and_training_helps_leave_no_trace_in_it():
    plain = tiny("llama4-tiny")
    helped = replace(plain, router_noise=1.0, router_aux=0.5, dropout=0.3)
    model, other, idx = Llama(plain).eval(), Llama(helped).eval(), tokens(4, 20)
    other.load_state_dict(model.state_dict())
    x, y = honest(idx)
    for _ in range(2):
        assert torch.equal(model(x)[0], other(x)[0]) and model(x, y)[1] == other(x, y)[1]
    assert not other.pop_expert_load().any()  # counted in training only
    other.train()
    assert not torch.equal(other(idx)[0], other(idx)[0])


# -- the router's help in training -------------------------------------------------------------------------------

def router_model(**changes):
    return Llama(tiny("scout-128m", **changes), seed=0).train()


@torch.no_grad()
def test_router_noise_only_selects():
    model = router_model(router_noise=1.0, n_experts=2, top_k=2)  # every expert is selected, whatever the noise
    idx = tokens(4, 20)
    torch.testing.assert_close(model(idx)[0], model.eval()(idx)[0])
    model = router_model(router_noise=1.0)
    assert not torch.allclose(model(idx)[0], model(idx)[0])


def test_router_aux_adds_the_balancing_loss():
    idx, weight = tokens(8, 33), 0.7
    plain, helped = router_model(), router_model(router_aux=weight)
    losses = [m(*honest(idx))[1] for m in (plain, helped)]
    routers = [[m.router.weight for m in mixtures(model)] for model in (plain, helped)]
    grads = [torch.autograd.grad(loss, weights) for loss, weights in zip(losses, routers)]
    got = [h - p for p, h in zip(*grads)]

    seen = []  # the inputs of each router, to write Switch's formula down a second time
    hooks = [m.router.register_forward_hook(lambda _, inputs, out: seen.append(out)) for m in mixtures(plain)]
    plain(*honest(idx))
    for h in hooks:
        h.remove()
    switch = 0.0
    for logits in seen:
        share = F.one_hot(logits.argmax(-1), 8).float().mean(0)
        switch = switch + 8 * (share * logits.softmax(-1).mean(0)).sum()
    assert (losses[1] - losses[0]).item() == pytest.approx(weight * switch.item(), abs=1e-5)
    assert helped.eval()(*honest(idx))[1] == plain.eval()(*honest(idx))[1]  # not in evaluation
    want = torch.autograd.grad(weight * switch, routers[0])
    assert all(w.norm() > 1e-3 for w in want)
    for g, w in zip(got, want):
        torch.testing.assert_close(g, w, atol=1e-6, rtol=1e-3)


# -- draw of the weights -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ("llama-2-7b", "smollm2-135m", "llama4-tiny"))
def test_init_by_role(name):
    cfg = tiny(name, vocab_size=512, n_layer=8, dim=160, n_head=8, n_kv_head=4, head_dim=24, ffn_dim=320,
               expert_dim=200)
    torch.manual_seed(0)
    model, reads, writes = Llama(cfg), cfg.dim ** -0.5, 16 ** -0.5  # 16 writes to the stream in 8 layers
    for name, p in model.named_parameters():
        width = cfg.expert_dim if "expert" in name else cfg.ffn_dim
        want = {"embed_tokens": cfg.dim ** -0.5 if cfg.tie_embeddings else 1.0, "lm_head": 0.02,
                "q_proj": reads, "k_proj": reads, "v_proj": reads, "gate_proj": reads, "up_proj": reads,
                "gate_up_proj": reads, "router": reads,
                "o_proj": writes * (cfg.n_head * cfg.head_dim) ** -0.5, "down_proj": writes * width ** -0.5}
        role = name.removesuffix(".weight").rsplit(".", 1)[-1]
        if role.endswith("norm"):
            assert (p == 1).all()
        else:
            assert p.std().item() == pytest.approx(want[role], rel=0.05) and abs(p.mean()) < 0.05 * want[role], name


def test_weights_depend_on_seed_and_name_alone():
    cfg = tiny("llama4-tiny")
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one = Llama(cfg, seed=3).state_dict()
    assert torch.equal(torch.get_rng_state(), before)  # and torch's own generator is not touched
    torch.manual_seed(6)
    again, other = Llama(cfg, seed=3).state_dict(), Llama(cfg, seed=4).state_dict()
    assert all(torch.equal(one[name], again[name]) for name in one)
    drawn = [name for name in one if "norm" not in name]
    assert not any(torch.equal(one[name], other[name]) for name in drawn)
    assert len({one[name].flatten()[:8].numpy().tobytes() for name in drawn}) == len(drawn)  # no stream is used twice
    deeper = Llama(replace(cfg, n_layer=8), seed=3).state_dict()  # more modules, and other ones before the same name
    same = [name for name in drawn if "o_proj" not in name and "down_proj" not in name]  # which scale with depth
    assert all(torch.equal(one[name], deeper[name]) for name in same)


def test_weights_are_drawn_in_float32_and_in_place():
    """As a model that was built on "meta" is drawn later, also in half precision."""
    cfg = tiny("llama4-tiny")
    with torch.device("meta"):
        empty = Llama(cfg)
    assert empty.lm_head.weight.is_meta and not empty.model.expert_load.is_meta
    late = empty.to_empty(device="cpu").to(torch.bfloat16)
    late.init_weights(7)
    want = Llama(cfg, seed=7).state_dict()
    assert all(torch.equal(t, want[name].bfloat16()) for name, t in late.state_dict().items())


@torch.no_grad()
@pytest.mark.parametrize("depth", (2, 32))
def test_first_loss_is_ln_v_and_the_stream_does_not_grow_with_depth(depth):
    torch.manual_seed(0)
    model = Llama(tiny("llama-3-8b", n_layer=depth, dim=128, ffn_dim=256))
    stream = []
    model.model.norm.register_forward_hook(lambda _, inputs, out: stream.append(inputs[0].std().item()))
    _, loss = model(*honest(tokens(8, 33)))
    assert abs(loss.item() - math.log(VOCAB)) < 0.1 and 1 < stream[0] < 1.6


# -- counts ------------------------------------------------------------------------------------------------------

COUNTS = {
    "stories15m": 15191712, "stories42m": 41689600, "stories110m": 109529856, "smollm2-135m": 134515008,
    "smollm2-360m": 361821120, "smollm2-1.7b": 1711376384, "tinyllama-1.1b": 1100048384, "llama-1-7b": 6738415616,
    "llama-2-7b": 6738415616, "llama-2-13b": 13015864320, "llama-2-70b": 68976648192, "llama-3-8b": 8030261248,
    "llama-3.1-8b": 8030261248, "llama-3-70b": 70553706496, "llama-3.1-70b": 70553706496, "llama-3.3-70b": 70553706496,
    "llama-3.1-405b": 405853388800, "llama-3.2-1b": 1235814400, "llama-3.2-3b": 3212749824,
    "llama-4-scout": 107769861120, "llama-4-maverick": 400711848960, "scout-128m": 127785472, "mini-llama": 109529856,
    "code-llama-7b": 6738546688, "code-llama-13b": 13016028160, "code-llama-34b": 33743970304,
    "llama-guard-3-8b": 8030261248, "llama-guard-4-12b": 11129164800}  # and 0.87B of vision: the published 12B
ACTIVE = {"llama-4-scout": 17.17e9, "llama-4-maverick": 17.17e9, "llama4-tiny": 139e6}


@pytest.mark.parametrize("name", PRESETS)
def test_counts(name):
    with torch.device("meta"):
        total, active = Llama(PRESETS[name]).counts()
    if name == "llama4-tiny":
        assert total == pytest.approx(224e6, rel=0.005)
    else:
        assert total == COUNTS[name]
    if name in ACTIVE:
        assert active == pytest.approx(ACTIVE[name], rel=0.003)
    elif name != "scout-128m":
        assert active == total


@pytest.mark.parametrize("name", ("stories15m", "llama-3-8b"))
def test_flops_are_those_that_torch_counts(name):
    cfg, T = tiny(name), 16
    model = Llama(cfg)
    with FlopCounterMode(display=False) as counter:
        model(*honest(tokens(1, T + 1)))[1].backward()
    products = counter.get_total_flops() - sum(
        flops for op, flops in counter.get_flop_counts()["Global"].items() if "attention" in str(op))
    pairs = T * (T + 1) // 2  # what a causal query sees
    attention = 12 * pairs * cfg.n_head * cfg.head_dim * cfg.n_layer
    norms = 6 * T * cfg.dim * (2 * cfg.n_layer + 1)  # their weights count as one multiplication each
    assert model.flops_per_token(T) * T == pytest.approx(products + attention + norms)


@pytest.mark.parametrize("length", (5, 8, 27))
def test_flops_of_chunks_count_the_keys_that_are_visible(length):
    cfg = tiny("llama4-tiny")
    model, pairs = Llama(cfg), 0
    for layer in range(cfg.n_layer):
        chunk = cfg.chunk_of(layer) or 10**9
        pairs += sum(j // chunk == i // chunk for i in range(length) for j in range(i + 1))
    _, active = model.counts()
    want = 6 * (active - VOCAB * cfg.dim) + 12 * cfg.n_head * cfg.head_dim * pairs / length
    assert model.flops_per_token(length) == pytest.approx(want)


# -- config ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("wrong, names", [
    (dict(arch="gpt2"), "arch"), (dict(dim=0), "dim"), (dict(n_layer=-1), "n_layer"), (dict(n_head=5), "n_head"),
    (dict(n_head=8, n_kv_head=3), "n_kv_head"), (dict(head_dim=7), "head_dim"),
    (dict(rope_scaling=(8.0, 1.0)), "rope_scaling"), (dict(dropout=1.0), "dropout"), (dict(dropout=-0.1), "dropout"),
    (dict(vocab_size=float("nan")), "vocab_size"), (dict(norm_eps=0.0), "norm_eps"), (dict(rope_theta=-1.0), "theta"),
    (dict(n_experts=4), "n_experts"), (dict(chunk=8), "chunk"), (dict(qk_norm=True), "qk_norm"),
    (dict(nope_every=4), "nope_every"), (dict(arch="llama4", attn_scale=0.1), "attn_scale"),
    (dict(arch="llama4", n_experts=2, top_k=3), "top_k"), (dict(arch="llama4", n_experts=2, moe_every=0), "moe_every"),
    (dict(rope_scaling=(8.0, 1.0, 4.0, float("nan"))), "rope_scaling"), (dict(bos_id=-1), "bos_id"),
    (dict(rope_scaling=(8.0, 0.0, 4.0, 64.0)), "rope_scaling"), (dict(rope_scaling=(8, 4, 1, 64)), "rope_scaling"),
    (dict(eos_ids=(2.0,)), "eos_ids"),
    (dict(n_layer=5000), "n_layer"), (dict(tie_embeddings=1), "tie_embeddings"),
])
def test_a_shape_that_cannot_be_built_is_an_error_that_names_the_field(wrong, names):
    with pytest.raises(ValueError, match=names):
        LlamaConfig(**({"n_head": 4, "dim": 64} | wrong))


NUMBERS = [f.name for f in fields(LlamaConfig) if f.type in (int, float)]


@pytest.mark.parametrize("name", NUMBERS)
def test_every_number_has_a_range(name):
    """What is no such number is refused in a line that names it; 0 where it makes no sense."""
    good = dict(arch="llama4", n_head=4, dim=64, nope_every=2, n_experts=4)
    for wrong in (-1, -0.5, float("nan"), float("inf"), -float("inf"), 2**64, "1", None, True, [1]):
        with pytest.raises(ValueError, match=name):
            LlamaConfig(**good | {name: wrong})
    may_be_zero = {"n_kv_head", "head_dim", "nope_every", "chunk", "attn_scale", "n_experts", "expert_dim", "dropout",
                   "router_noise", "router_aux"}
    if name in may_be_zero:
        LlamaConfig(**good | {name: 0})
    else:
        with pytest.raises(ValueError, match=name):
            LlamaConfig(**good | {name: 0})


def test_a_config_fills_in_what_follows_from_the_rest():
    cfg = LlamaConfig(n_head=4, dim=64, eos_ids=[1, 2])
    assert (cfg.n_kv_head, cfg.head_dim, cfg.eos_ids) == (4, 16, (1, 2))
    assert replace(cfg, arch="llama4", ffn_dim=99, n_experts=4).expert_dim == 99  # and not the first ffn_dim


# -- loss, documents, memory -------------------------------------------------------------------------------------

@torch.no_grad()
def test_the_loss_counts_only_real_targets():
    model, (x, y) = build(tiny("llama-3.2-1b")), honest(tokens(3, 21))
    hole = y.clone()
    hole[0], hole[1, 4:9], hole[2, -1] = -100, -100, -100
    (logits, nothing), (none, loss) = model(x), model(x, hole)
    assert nothing is None and none is None
    logp = logits.log_softmax(-1).gather(2, y[..., None])[..., 0]
    torch.testing.assert_close(loss, -logp[hole != -100].mean())
    assert logits.shape == (3, 20, VOCAB)


@pytest.mark.parametrize("name", ("llama-3.2-1b", "scout-128m"))
def test_a_batch_without_targets_has_no_loss_and_no_gradient(name):
    model, idx = build(tiny(name)).train(), tokens(2, 9)
    _, loss = model(idx, torch.full_like(idx, -100))
    loss.backward()
    assert loss.item() == 0.0 and all(p.grad is None or not p.grad.any() for p in model.parameters())


@torch.no_grad()
@pytest.mark.parametrize("count", (0, 1, 255, 256, 257, 600))
def test_losses_at_some_places_are_those_of_the_whole_with_one_call_of_the_head(count, monkeypatch):
    """One call for any number of places: over several processes each call gathers the head."""
    model, idx, calls = build(tiny("llama-3-8b")), tokens(12, 60), []
    positions = torch.arange(60).expand(12, -1)
    generator = torch.Generator().manual_seed(0)
    source = torch.randint(12 * 60, (count,), generator=generator)
    target = torch.randint(VOCAB, (count,), generator=generator)
    model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    got = model.losses(idx, positions, source, target)
    assert len(calls) == 1 and got.dtype == torch.float32 and got.shape == (count,)
    want = F.cross_entropy(model(idx)[0].flatten(0, 1)[source], target, reduction="none")
    torch.testing.assert_close(got, want)
    assert isinstance(model.lm_head, Head) and "lm_head.weight" in model.state_dict()


def gradients(function, *inputs):
    """A function's output and the gradients of its weighted sum."""
    y = function(*inputs)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    return [y, *torch.autograd.grad((y * weights).sum(), inputs)]


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("T", (1, 2, 33))
@pytest.mark.parametrize("masked", (False, True))
def test_attention_by_products_is_attention(heads, kv_heads, T, masked):
    q, k, v = (torch.randn(2, T, n, 8, dtype=torch.float64).transpose(1, 2).requires_grad_()
               for n in (heads, kv_heads, kv_heads))
    mask = ((torch.rand(2, 1, T, T) < 0.5) | torch.eye(T, dtype=torch.bool)) if masked else None
    plain = partial(F.scaled_dot_product_attention, attn_mask=mask, is_causal=not masked, enable_gqa=True)
    want = gradients(plain, q, k, v)
    torch.testing.assert_close(gradients(partial(attend_by_products, mask=mask), q, k, v), want)


def test_short_rows_in_training_in_bfloat16_take_products(monkeypatch):
    taken = []
    monkeypatch.setattr(model_file, "attend_by_products", lambda q, k, v, mask: taken.append(q.shape))
    for T, dtype, learns in [(512, torch.bfloat16, True), (513, torch.bfloat16, True), (512, torch.float32, True),
                             (512, torch.bfloat16, False)]:
        attend(*(torch.zeros(1, 2, T, 4, dtype=dtype, requires_grad=learns) for _ in range(3)))
    assert taken == [(1, 2, 512, 4)]


@pytest.mark.parametrize("rows", (1, 2, 7, 100))
def test_the_loss_of_a_few_rows_at_a_time_is_the_loss(rows, monkeypatch):
    monkeypatch.setattr(CrossEntropy, "CACHED", 11 * rows)
    logits, targets = torch.randn(30, 11), torch.randint(11, (30,))
    logits[3, targets[3]] = -1e4  # a probability that is 0 in float32
    targets[::4], logits = -100, logits.requires_grad_()
    want = gradients(lambda z: F.cross_entropy(z, targets, reduction="sum"), logits)
    got = gradients(lambda z: CrossEntropy.apply(z, targets), logits)
    torch.testing.assert_close(got, want)
    assert not got[1][::4].any()
    loss = CrossEntropy.apply(logits, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):  # the gradient has been scaled where it lay
        loss.backward()


@pytest.mark.parametrize("name", ("llama-3-8b", "llama-4-scout"))
def test_what_is_fused_is_the_model(name):
    model, idx, found = build(tiny(name)), tokens(2, 25), []
    for change in (lambda _: None, fused.use):
        change(model)
        model.zero_grad()
        loss = model(idx, idx)[1]
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    assert "CrossEntropy" in str(loss.grad_fn.next_functions)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(model(idx, idx)[1], found[0][0])


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16))
@pytest.mark.parametrize("eps", (1e-5, 1.0))
def test_the_norm_in_training_is_the_norm(dtype, eps):
    norm, x = RMSNorm(24, eps).to(dtype), (3 * torch.randn(5, 7, 24)).to(dtype).requires_grad_()
    torch.nn.init.normal_(norm.weight)
    fused.use(norm)
    got = gradients(lambda x, w: norm(x), x, norm.weight)
    want = gradients(lambda x, w: F.rms_norm(x, (24,), w, eps), *(t.detach().double().requires_grad_()
                                                                  for t in (x, norm.weight)))
    accuracy = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.01}[dtype]
    for ours, exact in zip(got, want):
        assert ours.dtype == dtype and (ours.double() - exact).norm() < accuracy * exact.norm()


@torch.no_grad()
@pytest.mark.parametrize("name", ("llama-3.2-1b", "llama4-tiny", "scout-128m"))
def test_documents_in_a_row_do_not_see_each_other(name):
    model, idx, cuts = build(tiny(name)), tokens(2, 40), ((11, 3, 26), (20, 17, 3))
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in cuts])
    together, _ = model(idx, positions=positions)
    for b, row in enumerate(cuts):
        for part, alone in zip(together[b].split(row), idx[b].split(row)):
            torch.testing.assert_close(part, model(alone[None])[0][0], atol=1e-5, rtol=1e-5)


def varlen(q, k, v, starts, starts_k, longest, longest_k, window_size, enable_gqa):
    """What torch.nn.attention.varlen.varlen_attn, which only runs on GPUs, computes by its documentation."""
    assert window_size == (-1, 0) and enable_gqa == (q.shape[1] > k.shape[1]) and starts is starts_k
    assert starts.dtype == torch.int32 and starts[0] == 0 and starts[-1] == len(q)
    assert (starts.diff() > 0).all() and starts.diff().max() <= longest == longest_k
    return torch.cat([F.scaled_dot_product_attention(*(t[a:b].transpose(0, 1)[None] for t in (q, k, v)), is_causal=True,
                                                     enable_gqa=enable_gqa)[0].transpose(0, 1)
                      for a, b in itertools.pairwise(starts.tolist())])  # (N, H, d)


@pytest.mark.parametrize("name", ("llama-3.2-1b", "llama4-tiny", "scout-128m"))
def test_documents_on_a_gpu_are_attended_without_a_mask(name, monkeypatch):
    """Loss and gradients are those with the mask, padding (documents of one token) and edges of chunks included; and
    on a processor the mask is used."""
    import torch.nn.attention.varlen
    model, idx = build(tiny(name)).train(), tokens(2, 41)
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in ((11, 3, 26), (20, 17, 1, 1, 1))])
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", varlen)
    found = []
    for on_gpu in False, True:
        if on_gpu:
            monkeypatch.setattr("model.takes_starts", lambda x, head_dim: True)
            monkeypatch.setattr(Decoder, "masks", lambda *_: pytest.fail("a mask is made"))
        model.zero_grad()
        loss = model(idx[:, :-1], idx[:, 1:], positions)[1]
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    for with_mask, without in zip(*found):
        torch.testing.assert_close(with_mask, without, atol=1e-6, rtol=1e-5)


def test_branches_on_a_gpu_do_not_see_each_other_while_they_are_learned(monkeypatch):
    """Captions of one picture share its row, and the picture comes as embeddings."""
    model, idx = build(tiny("llama4-tiny", chunk=4)), tokens(2, 13)
    positions = torch.tensor([[0, 1, 2, 3, 4, 3, 4, 5, 3, 0, 1, 2]] * 2)
    embeds = model.model.embed_tokens(idx[:, :-1]).detach()
    want = F.cross_entropy(model(idx[:, :-1], positions=positions)[0].flatten(0, 1), idx[:, 1:].flatten())
    monkeypatch.setattr("model.takes_starts", lambda x, head_dim: True)
    torch.testing.assert_close(model(embeds=embeds, targets=idx[:, 1:], positions=positions)[1], want)


def test_queries_have_the_dtype_of_values_where_autocast_widens_the_norm(monkeypatch):
    """CUDA's does, and the kernel for documents takes one dtype."""
    narrow, seen = F.rms_norm, []
    monkeypatch.setattr(F, "rms_norm", lambda *args, **more: narrow(*args, **more).float())
    attend = model_file.attend
    monkeypatch.setattr("model.attend", lambda q, k, v, *rest: seen.append((q.dtype, k.dtype, v.dtype)) or attend(
        q, k, v, *rest))
    with torch.autocast("cpu", torch.bfloat16):
        build(tiny("scout-128m"))(tokens(1, 9))
    assert seen and all(dtypes == (torch.bfloat16,) * 3 for dtypes in seen)


def branches(T, generator):
    """Random positions (T,) of documents and continuations that jump back anywhere, also within continuations."""
    positions = [0]
    while len(positions) < T:
        jump = torch.rand((), generator=generator) < 0.4
        positions.append(int(torch.randint(positions[-1] + 1, (), generator=generator)) if jump else positions[-1] + 1)
    return positions


def test_a_continuation_sees_the_branch_that_it_continues_and_no_other():
    generator = torch.Generator().manual_seed(0)
    cfg = tiny("llama4-tiny", chunk=4)
    rows = [branches(24, generator) for _ in range(200)]
    rows[0][:9] = 0, 1, 2, 3, 4, 5, 3, 4, 4  # the last one sees token 6, which took the place of token 3
    full, chunked = Decoder(cfg).masks(torch.tensor(rows))
    for positions, seen, seen_in_chunk in zip(rows, full[:, 0], chunked[:, 0]):
        branch = []  # the tokens in place: number p of them is the one at position p
        for i, p in enumerate(positions):
            branch = [*branch[:p], i]
            assert seen[i].nonzero().flatten().tolist() == sorted(branch)
            assert seen_in_chunk[i].nonzero().flatten().tolist() == branch[p // 4 * 4:]
    assert full[0, 0, 8].nonzero().flatten().tolist() == [0, 1, 2, 6, 8]


@torch.no_grad()
@pytest.mark.parametrize("name", ("llama-3.2-1b", "llama4-tiny", "scout-128m"))
def test_branches_in_a_row_are_each_as_if_alone(name):
    model, generator = build(tiny(name)), torch.Generator().manual_seed(1)
    rows = [branches(30, generator) for _ in range(3)]
    idx = tokens(3, 30)
    together, _ = model(idx, positions=torch.tensor(rows))
    for b, positions in enumerate(rows):
        branch = []
        for i, p in enumerate(positions):
            branch = [*branch[:p], i]
            alone, _ = model(idx[b, branch][None])
            torch.testing.assert_close(together[b, i], alone[0, -1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ("llama-3.2-1b", "llama4-tiny"))
def test_checkpointing_changes_memory_and_nothing_else(name):
    helps = dict(router_noise=0.5, router_aux=0.1) if name == "llama4-tiny" else {}
    cfg, found = tiny(name, dropout=0.2, **helps), []
    for checkpointing in (False, True):
        model = Llama(cfg).train()
        model.model.checkpointing = checkpointing
        torch.manual_seed(1)  # the same dropout and noise
        loss = model(*honest(tokens(4, 33)))[1]
        loss.backward()
        found.append((loss.item(), [p.grad for p in model.parameters()], model.pop_expert_load()))
    (loss, grads, load), (loss2, grads2, load2) = found
    assert loss == loss2 and torch.equal(load, load2)
    assert all(torch.equal(a, b) for a, b in zip(grads, grads2))


@torch.no_grad()
def test_embeddings_may_replace_tokens():
    model, idx = build(tiny("llama4-tiny")), tokens(2, 12)
    torch.testing.assert_close(model(embeds=model.model.embed_tokens(idx))[0], model(idx)[0])
    text = list(model.stream(idx, 9, temperature=0))
    seen = list(model.stream(model.model.embed_tokens(idx), 9, temperature=0))
    assert torch.equal(torch.stack(text), torch.stack(seen))


# -- numbers -----------------------------------------------------------------------------------------------------

def test_half_precision_leaves_the_angles_of_rope_alone():
    cfg = tiny("llama-3.1-8b")
    model, positions = Llama(cfg).to(torch.bfloat16), torch.arange(60)
    cos, sin = rope_angles(cfg, positions)
    seen = []
    model.model.layers[0].register_forward_pre_hook(lambda _, inputs: seen.extend(inputs[1]))
    model(positions[None] % VOCAB)
    assert torch.equal(seen[0], cos) and torch.equal(seen[1], sin) and cos.dtype == torch.float32


@pytest.mark.parametrize("name", ("llama-3.1-8b", "llama-3.2-1b", "llama-4-scout", "llama-2-7b"))
def test_rope_scaling_per_frequency(name):
    cfg = PRESETS[name]
    for i, got in enumerate(rope_frequencies(cfg).double().tolist()):
        want = cfg.rope_theta ** (-2 * i / cfg.head_dim)
        if cfg.rope_scaling:  # the published rule, in wavelengths
            factor, low, high, original = cfg.rope_scaling
            length = 2 * math.pi / want
            if length > original / low:
                want /= factor
            elif length >= original / high and low != high:
                smooth = (original / length - low) / (high - low)
                want *= (1 - smooth) / factor + smooth
        assert got == pytest.approx(want, rel=2e-6)


def test_sampling_draws_from_the_cut_distribution():
    p = torch.tensor([0.05, 0.4, 0.25, 0.2, 0.1])
    logits = p.log()[None].repeat(40000, 1)
    generator = torch.Generator().manual_seed(0)

    def share(**how):
        return Sampling(**how).pick(logits, generator).bincount(minlength=5) / 40000
    cases = [({}, p), (dict(top_k=2), p * (p > 0.2001)), (dict(top_k=99), p), (dict(top_p=0.6), p * (p > 0.2001)),
             (dict(top_p=0.66), p * (p > 0.1001)), (dict(top_p=1.0), p), (dict(top_p=1e-9), p * (p > 0.3)),
             (dict(min_p=0.26), p * (p > 0.0999) * (p != 0.1)), (dict(temperature=0.5), p * p),
             (dict(temperature=0), p * (p > 0.3)), (dict(top_k=3, min_p=0.6), p * (p > 0.2001))]
    for how, want in cases:
        want = want / want.sum()
        got = share(**how)
        assert ((got - want).abs() < 0.012).all() and not got[want == 0].any(), how


TEMPERATURES = 0.0, 1e-320, 1e-40, 1e-9, 1e-3, 1.0, 1e4, 1e38
LOGITS = {"unit": 1.0, "large": 1e6, "huge": 1e38, "small": 1e-3}


@pytest.mark.parametrize("scale", LOGITS)
@pytest.mark.parametrize("hidden", (False, True), ids=("all", "some at -inf"))
def test_no_setting_within_its_range_draws_nonsense(scale, hidden):
    """Only tokens that every cut keeps are drawn, whatever the other settings are; a low temperature is greedy."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(64, 11, generator=generator).clamp(-3, 3) * LOGITS[scale]
    if hidden:
        logits[:, ::2] = -torch.inf
    best = logits.argmax(-1)
    for temperature in TEMPERATURES:
        exact = ((logits.double() - logits.double().max(-1, keepdim=True).values) / max(temperature, 1e-12)).softmax(-1)
        for top_k in (None, 0, 1, 3, 11, 12, 2**30):
            for top_p in (None, 0.0, 1e-9, 0.5, 1.0):
                for min_p in (None, 0.0, 0.5, 1.0):
                    token = Sampling(temperature, top_k, top_p, min_p).pick(logits, generator)
                    how = temperature, top_k, top_p, min_p
                    assert torch.isfinite(logits.gather(1, token[:, None])).all(), how
                    if temperature <= 1e-9 or top_k == 1 or top_p in (0.0, 1e-9) or min_p == 1.0 and temperature < 1e3:
                        assert torch.equal(token, best), how
                    rank = (logits > logits.gather(1, token[:, None])).sum(-1)  # tokens that are likelier
                    assert (rank < (top_k or 11)).all(), how
                    p = exact.gather(1, token[:, None])[:, 0]
                    likelier = torch.where(exact > p[:, None], exact, 0).sum(-1)
                    assert (likelier < max(1 if top_p is None else top_p, 1e-12) + 1e-5).all(), how
                    assert (p >= (min_p or 0) * exact.max(-1).values * (1 - 1e-5)).all(), how


@pytest.mark.parametrize("name", distinct())
def test_generation_under_autocast(name):
    """As a training run on a GPU does at each evaluation: weights in float32, keys and values in bfloat16."""
    model, idx = build(tiny(name, expert_dim=16)), tokens(2, 20)
    with torch.autocast("cpu", torch.bfloat16):
        new = model.generate(idx, 4, temperature=0)[:, 20:]
        for i in range(4):
            logits = model(torch.cat((idx, new[:, :i]), 1))[0][:, -1].float()
            best, chosen = logits.max(-1).values, logits.gather(1, new[:, i:i + 1])[:, 0]
            assert (best - chosen < 0.1).all()  # the same up to bfloat16's rounding, for logits of unit scale


@torch.no_grad()
def test_generation_is_seeded_and_bounded():
    model, idx = build(tiny("llama-3.2-1b")), tokens(2, 6)
    a, b, c = (model.generate(idx, 30, seed=s) for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c) and a.shape == (2, 36)
    assert model.generate(idx, 1000).shape[1] == model.config.context  # it stops where the context is full
    assert torch.equal(model.generate(idx, 0), idx)
    for bad in (tokens(1, 0), tokens(1, model.config.context)):
        with pytest.raises(ValueError, match="prompt"):
            model.generate(bad, 1)
    with pytest.raises(ValueError, match="empty"):
        model.generate(idx, 1, mask=torch.tensor([[1] * 6, [0] * 6]))


@pytest.mark.parametrize("new", (0, 3))
def test_what_was_generated_can_be_trained_on(new):
    """Generation runs in inference mode, whose tensors autograd refuses, or without gradients; none of its tensors may
    come out of it, nor autocast's copies of weights."""
    for autocast in False, True:
        model = build(tiny("llama-3.2-1b"))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            ids = model.generate(tokens(2, 6), new)
            loss = model(ids[:, :-1], ids[:, 1:])[1]
        loss.backward()
        assert all(p.grad is not None and p.grad.any() for p in model.parameters())


CHUNKED = ("llama-3.2-1b", {}), ("llama-4-scout", {}), ("llama4-tiny", dict(chunk=7)), ("scout-128m", dict(chunk=4)), (
    "llama-4-scout", dict(nope_every=0, attn_scale=0.0, n_layer=2)), ("llama-4-scout", dict(n_experts=0, chunk=100))


def random_pieces(total, generator):
    """Random positive numbers that sum to total."""
    sizes = []
    while sum(sizes) < total:
        sizes.append(int(torch.randint(1, total - sum(sizes) + 1, (), generator=generator)))
    return sizes


@torch.no_grad()
@pytest.mark.parametrize("name, changes", CHUNKED)
def test_a_cache_takes_a_text_in_any_pieces(name, changes):
    """At once, token by token or in random pieces, alone or after prompts of different lengths: as the full forward."""
    cfg, generator = tiny(name, **changes), torch.Generator().manual_seed(0)
    model, idx = build(cfg), tokens(3, 40)
    want = model(idx)[0]
    divisions = [[40], [1] * 40, [1, 39], [8, 8, 24], *(random_pieces(40, generator) for _ in range(12))]
    for sizes in divisions:
        cache = KVCache(cfg, 3, 40)
        got = [model(part, cache=cache)[0] for part in idx.split(sizes, 1)]
        torch.testing.assert_close(torch.cat(got, 1), want, atol=1e-5, rtol=1e-5, msg=f"pieces {sizes}")
    for lengths in ([1, 8, 17], [16, 3, 7], [5, 6, 20], [20, 20, 20]):
        cache, width = KVCache(cfg, 3, 40), max(lengths)
        prompt = idx[:, :width].clone()
        for row, length in enumerate(lengths):
            prompt[row, length:] = 0  # padding
        got = model(prompt, cache=cache, lengths=torch.tensor(lengths))[0]
        for row, length in enumerate(lengths):
            torch.testing.assert_close(got[row, :length], want[row, :length], atol=1e-5, rtol=1e-5)
        seen = list(lengths)
        for size in random_pieces(20, generator):
            piece = torch.stack([idx[row, n:n + size] for row, n in enumerate(seen)])
            got = model(piece, cache=cache)[0]
            for row, n in enumerate(seen):
                torch.testing.assert_close(got[row], want[row, n:n + size], atol=1e-5, rtol=1e-5, msg=f"{lengths}")
            seen = [n + size for n in seen]
        assert cache.lengths.tolist() == seen


@torch.no_grad()
@pytest.mark.parametrize("name, changes", CHUNKED)
def test_a_cache_that_was_rewound_goes_on_from_there(name, changes):
    """Also twice in a row: the first may have ended where a chunk begins."""
    cfg, generator = tiny(name, **changes), torch.Generator().manual_seed(0)
    model, texts = build(cfg), [tokens(2, 40, seed=s) for s in range(30)]
    cache, held = KVCache(cfg, 2, 6), texts[0][:, :0]
    for i, text in enumerate(texts):
        for _ in range(1 + i % 2):
            back = held.shape[1] if i % 10 == 9 else 3  # mostly a few tokens, so that it grows
            wanted = held.shape[1] + 2 - int(torch.randint(back + 3, (), generator=generator))
            wanted = max(wanted, 0)
            length = cache.rewind(wanted)
            chunk = cfg.chunk if cfg.chunk < cache.size else 0
            least = wanted // chunk * chunk if chunk else wanted  # back to the beginning of a chunk at most
            assert min(least, held.shape[1]) <= length <= min(wanted, held.shape[1])
            assert chunk or length == min(wanted, held.shape[1])
            held = held[:, :length]
        more = int(torch.randint(1, 9, (), generator=generator))
        if length + more > cache.size:
            cache.grow(length + more)
        held = torch.cat((held, text[:, :more]), 1)
        got = model(text[:, :more], cache=cache)[0]
        torch.testing.assert_close(got, model(held)[0][:, length:], atol=1e-5, rtol=1e-5)
    assert cache.size > 20


@torch.no_grad()
def test_only_an_empty_cache_takes_lengths():
    cfg = tiny("llama-3.2-1b")
    model, cache = build(cfg), KVCache(cfg, 2, 20)
    model(tokens(2, 5), cache=cache, lengths=torch.tensor([5, 3]))
    with pytest.raises(ValueError, match="empty cache"):
        model(tokens(2, 5), cache=cache, lengths=torch.tensor([5, 3]))


@torch.no_grad()
def test_a_cache_says_what_does_not_fit():
    cfg = tiny("llama-3.2-1b")
    model, cache, idx = build(cfg), KVCache(cfg, 2, 6), tokens(2, 7)
    for part, fits in ((idx, False), (idx[:, :5], True), (idx[:, 5:], False), (idx[:, 5:6], True), (idx[:, 6:], False)):
        if fits:
            model(part, cache=cache)
        else:
            with pytest.raises(ValueError, match="do not fit"):
                model(part, cache=cache)


def test_loading_draws_nothing(monkeypatch, tmp_path):
    model = build(tiny("llama-3.2-1b"))
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(Llama, "init_weights", lambda self: pytest.fail("weights are drawn and then thrown away"))
    assert torch.equal(Llama.from_pretrained(tmp_path)(tokens(1, 9))[0], model(tokens(1, 9))[0])


@pytest.mark.parametrize("name", ["llama", "llama4"])
def test_logits_where_targets_count_give_the_same_loss(name):
    """few_targets leaves out the logits of places without a target: loss and gradients stay, also where none counts."""
    given = dict(arch="llama4", n_experts=3, nope_every=2, chunk=4) if name == "llama4" else {}
    model = Llama(LlamaConfig(vocab_size=37, n_layer=2, n_head=2, dim=16, ffn_dim=32, context=16, **given))
    idx = torch.randint(37, (3, 11), generator=torch.Generator().manual_seed(1))
    targets = torch.where(torch.arange(11) % 4 == 0, idx.roll(-1, 1), -100)
    for wanted in targets, torch.full_like(targets, -100):
        found = []
        for model.few_targets in False, True:
            model.zero_grad()
            loss = model(idx, wanted)[1]
            loss.backward()
            found.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
        assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(*found))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("few", [False, True])
def test_the_loss_in_parts_is_the_loss(tied, few, monkeypatch):
    """Beyond Head.WHOLE logits are made by parts: loss and gradients stay within 1e-6, with any number of targets."""
    model = Llama(LlamaConfig(vocab_size=37, n_layer=1, n_head=2, dim=16, ffn_dim=32, context=16, tie_embeddings=tied))
    model.few_targets, idx = few, torch.randint(37, (3, 11), generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(Head, "ROWS", 8)
    for wanted in idx.roll(-1, 1), torch.where(torch.arange(11) % 4 == 0, idx, -100), torch.full_like(idx, -100):
        found = []
        for whole in 3 * 11 * 37, 0:
            monkeypatch.setattr(Head, "WHOLE", whole)
            model.zero_grad()
            loss = model(idx, wanted)[1]
            loss.backward()
            found.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
        assert all(torch.allclose(a, b, rtol=0, atol=1e-6) for a, b in zip(*found))


def test_the_loss_in_parts_is_compiled(monkeypatch):
    """As on a GPU, where the whole model is compiled: in one graph, with the same loss and gradients."""
    model, idx, found = build(tiny("llama-3-8b")), tokens(2, 25), []
    monkeypatch.setattr(Head, "WHOLE", 0)
    monkeypatch.setattr(Head, "ROWS", 16)
    for run in model, torch.compile(model, backend="aot_eager", fullgraph=True):
        model.zero_grad()
        loss = run(idx, idx)[1]
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(*found))


def test_the_loss_has_few_numbers_of_parts(monkeypatch):
    """torch.compile makes a graph for each, and gives up after eight; the number of targets changes at each step."""
    calls, plain = [], model_file.checkpoint
    monkeypatch.setattr(Head, "WHOLE", 0)
    monkeypatch.setattr(Head, "ROWS", 64)
    monkeypatch.setattr(model_file, "checkpoint", lambda *args, **more: calls.append(1) or plain(*args, **more))
    head, counts = build(tiny("llama-3-8b")).lm_head, set()
    for n in range(2, 64 * 16, 7):
        calls.clear()
        head(torch.randn(n, head.in_features), torch.zeros(n, dtype=torch.long), "sum")
        counts.add(len(calls))
    assert counts == {2, 4, 8, 16}


def test_the_loss_in_parts_never_has_all_logits(monkeypatch):
    """Neither forward nor backward makes more rows of logits than ROWS."""
    model, rows, plain = build(tiny("llama-3-8b")), [], Head.nats
    monkeypatch.setattr(Head, "WHOLE", 0)
    monkeypatch.setattr(Head, "ROWS", 16)
    monkeypatch.setattr(Head, "nats", lambda self, x, *to: rows.append(len(x)) or plain(self, x, *to))
    idx = tokens(2, 25)
    model(idx, idx)[1].backward()
    assert rows == [13, 13, 13, 11] + [11, 13, 13, 13]
