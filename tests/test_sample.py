"""sample.py: a chat reads only what is new and says what it would have said anew; fast decoding changes no text."""
import contextlib
import copy
import io
import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import config
import decode
import sample
from model import PRESETS, KVCache, Linear, Llama, LlamaConfig, MoE
from prepare import examples, tokenizer
from decode import Batch, Int4Linear, Int8Linear, decode_all, to_decode
from sample import Conversation, SampleConfig
from test_model import VOCAB, build, distinct, tiny

USER, ASSISTANT, END = 1, 2, 3


class Letters:
    """A tokenizer of one id a character, with a chat template of three marks."""
    stop_ids, chat_template, bos_id, vocab_size = {END}, "yes", None, 128

    def encode(self, text, bos=False):
        return [ord(c) for c in text]

    def decode(self, ids):
        return "".join(chr(i) for i in ids)

    def chat(self, messages):
        ids = []
        for message in messages:
            mark = ASSISTANT if message["role"] == "assistant" else USER
            ids += [mark, *self.encode(message["content"]), END]
        return [*ids, ASSISTANT]

    def stream(self, after=()):
        return self

    def feed(self, id):
        return chr(id)

    def end(self):
        return ""


def talker(context=4096, **changes):
    """A model whose replies are 5 to 40 letters of nonsense: random weights with sharp logits."""
    cfg = replace(PRESETS["llama4-tiny"], vocab_size=128, n_layer=4, n_head=4, n_kv_head=2, head_dim=8, dim=32,
                  ffn_dim=48, expert_dim=16, chunk=16, context=context)
    model = Llama(replace(cfg, **changes), seed=1).eval()
    torch.nn.init.normal_(model.lm_head.weight, std=0.5, generator=torch.Generator().manual_seed(0))
    return model


@contextlib.contextmanager
def counting(model):
    """A list of the numbers of tokens that each forward pass of the model reads."""
    read = []
    hook = model.model.layers[0].register_forward_hook(lambda module, args, out: read.append(args[0].shape[1]))
    yield read
    hook.remove()


def said(model, messages, monkeypatch, **settings):
    """(what each turn printed, errors, tokens read in each forward pass) of a chat of these messages."""
    lines, out, errors = iter([*messages, ""]), io.StringIO(), io.StringIO()
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors), counting(model) as read:
        sample.chat(model, Letters(), SampleConfig(chat=True, **settings), "a title")
    return [turn.rstrip("\n") for turn in out.getvalue().split("llama> ")[1:]], errors.getvalue(), read


MESSAGES = ["hello", "what is it", "x", "a rather longer message than those before it", "and so on, " * 20 + "etc.",
            "bye"]


DENSE = dict(n_experts=0, top_k=1, chunk=0, nope_every=0, attn_scale=0.0)


@pytest.mark.parametrize("changes", [{}, dict(chunk=0), DENSE])
def test_a_turn_reads_what_is_new_and_replies_as_if_it_read_all(changes, monkeypatch):
    model, tok = talker(**changes), Letters()
    replies, _, read = said(model, MESSAGES, monkeypatch, max_new_tokens=40, temperature=0.7)
    turns, held, passes = [], [], iter(read)
    for i, (message, reply) in enumerate(zip(MESSAGES, replies, strict=True)):
        turns.append({"role": "user", "content": message})
        ids = tok.chat(turns)
        anew = model.generate(torch.tensor([ids]), 40, 0.7, 0, 0.95, 0.0, {END}, SampleConfig().seed + 2 * i + 1)
        new = anew[0, len(ids):].tolist()
        text = tok.decode([t for t in new if t != END])
        assert reply == text.rstrip("\n")
        assert ids[:len(held)] == held
        assert len(ids) - len(held) <= len(message) + 5  # the message, its marks, the last letter before it
        prompt = 0
        while prompt < len(ids) - len(held):  # in pieces, where chunks end
            prompt += next(passes)
        assert prompt == len(ids) - len(held)
        assert [next(passes) for _ in new[1:]] == [1] * (len(new) - 1)
        held = ids + new[:-1]
        turns.append({"role": "assistant", "content": text})
    assert next(passes, None) is None


def test_a_text_that_is_encoded_otherwise_is_read_again_from_there():
    model, cfg = talker(), SampleConfig(max_new_tokens=8, temperature=0)
    conversation, generator = Conversation(model), torch.Generator().manual_seed(0)
    ids = torch.randint(4, 127, (30,), generator=generator).tolist()
    with contextlib.redirect_stdout(io.StringIO()):
        for same in (0, 30, 33, 12, 40, 40, 5, 17):  # tokens that each prompt shares with what the cache holds
            ids = conversation.ids[:same] + torch.randint(4, 127, (9,), generator=generator).tolist()
            new = conversation.reply(Letters(), ids, cfg, 0)
            assert ids + new == model.generate(torch.tensor([ids]), 8, 0, eos_id={END})[0].tolist()
            assert conversation.cache.lengths.tolist() == [len(conversation.ids)]
        again = conversation.reply(Letters(), ids, cfg, 0)  # nothing is new: the last token is read again
    assert again == new


@pytest.mark.parametrize("context, long", [(200, 300), (120, 119)])
def test_a_message_that_is_too_long_ends_no_chat(context, long, monkeypatch):
    replies, errors, _ = said(talker(context), ["hi", "y" * long, "hi again"], monkeypatch, max_new_tokens=5)
    assert len(replies) == 2
    assert f"tokens, and the model's context holds {context}: shorten it" in errors
    short, _, _ = said(talker(context), ["hi", "hi again"], monkeypatch, max_new_tokens=5)
    assert replies[1] == short[1]  # as if it had not been said


def test_the_oldest_turns_are_dropped_when_the_context_is_full(monkeypatch):
    replies, errors, _ = said(talker(context=100), ["ab" * 15] * 8, monkeypatch, max_new_tokens=30, system="be brief")
    assert len(replies) == 8 and "shorten" not in errors


def test_an_abandoned_stream_gives_its_cache_back(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)
    model, prompt = to_decode(talker(), compile=True), torch.tensor([[5, 6, 7]])
    whole = model.generate(prompt, 12, temperature=0)
    pool = model.cache_pool.free
    cache, = pool.values()
    for steps in (1, 5):
        stream = model.stream(prompt, 12, temperature=0)
        for _ in range(steps):
            next(stream)
        assert not pool
        stream.close()
        assert list(pool.values()) == [cache] and not cache.lengths.any()
    with pytest.raises(KeyboardInterrupt):
        for _ in model.stream(prompt, 12, temperature=0):
            raise KeyboardInterrupt
    with pytest.raises(ValueError, match="prompt"):
        list(model.stream(prompt[:, :0], 12))
    assert torch.equal(model.generate(prompt, 12, temperature=0), whole)
    assert list(pool.values()) == [cache]


def test_two_streams_at_once_do_not_share_a_cache(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)
    model, prompts = to_decode(talker(), compile=True), (torch.tensor([[5, 6, 7]]), torch.tensor([[9, 8, 7]]))
    want = [[t.item() for t in model.stream(p, 9, temperature=0)] for p in prompts]
    both = zip(*(model.stream(p, 9, temperature=0) for p in prompts))
    assert [list(row) for row in zip(*([t.item() for t in pair] for pair in both))] == want


@torch.no_grad()
def test_a_compiled_chat_says_the_same(monkeypatch):
    plain, _, _ = said(talker(), MESSAGES, monkeypatch, max_new_tokens=20)
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)
    compiled, _, _ = said(to_decode(talker(), compile=True), MESSAGES, monkeypatch, max_new_tokens=20)
    assert compiled == plain


def test_only_plain_layers_are_packed_and_half_precision_stays_as_it_is():
    """What another module put in a layer's place, as an adapter does, keeps its own forward."""
    class Adapter(torch.nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base

        def forward(self, x):
            return self.base(x) + 1
    model, idx = talker(**DENSE), torch.tensor([[5, 6, 7]])
    attention = model.model.layers[0].self_attn
    attention.q_proj = Adapter(attention.q_proj)
    want = model(idx)[0]
    torch.testing.assert_close(to_decode(model)(idx)[0], want, rtol=1e-5, atol=1e-5)
    assert isinstance(attention.q_proj, Adapter) and isinstance(attention.q_proj.base, decode.PackedLinear)
    half = to_decode(talker().bfloat16())
    for rounded in model, half:
        with pytest.raises(ValueError, match="8 bits"):
            to_decode(rounded, bits=8)
    assert not any(isinstance(m, (decode.PackedLinear, decode.QuickNorm)) for m in half.modules())
    assert to_decode(model) is model  # a second time changes nothing


def test_sampling_on_a_processor_takes_float32_unless_it_is_told(tmp_path, monkeypatch):
    from prepare import tokenizer
    talker(vocab_size=258).bfloat16().save_pretrained(tmp_path)
    tokenizer.byte().save(tmp_path)
    for dtype, want in (("auto", torch.float32), ("bfloat16", torch.bfloat16)):
        model, _, _ = sample.load(SampleConfig(init_from=str(tmp_path), device="cpu", dtype=dtype))
        assert model.lm_head.weight.dtype == want


def test_a_cache_of_another_model_is_not_needed():
    model = talker()
    cache = KVCache(model.config, 1, 64)
    first = [t.item() for t in model.stream(torch.tensor([[5, 6, 7]]), 6, temperature=0, cache=cache)]
    assert cache.lengths.tolist() == [8]  # the last new token was not read
    more = [t.item() for t in model.stream(torch.tensor([[first[-1], 9]]), 6, temperature=0, cache=cache)]
    whole = torch.tensor([[5, 6, 7, *first, 9]])
    assert more == model.generate(whole, 6, temperature=0)[0, whole.shape[1]:].tolist()


def test_a_full_context_is_said(tmp_path, capsys):
    """A text that ends for want of room once looked like one that the model had ended."""
    tok = tokenizer.byte()
    Llama(LlamaConfig(vocab_size=258, n_layer=1, n_head=2, dim=16, ffn_dim=16, context=12)).save_pretrained(tmp_path)
    tok.save(tmp_path)
    for count, full in (50, True), (3, False):
        cfg = sample.SampleConfig(init_from=str(tmp_path), start=("abcd",), max_new_tokens=count, temperature=0.0,
                                  device="cpu")
        sample.main(cfg)
        assert ("context of 12 tokens is full" in capsys.readouterr().err) == full


def test_added_tokens_may_be_more_than_the_model_has(tmp_path, monkeypatch, capsys):
    """As in Code Llama 34B, and where [PAD] was added later: only a prompt that has one of them is refused."""
    tok = examples.adding(tokenizer.byte(), "[PAD]", "<pre>")
    template = "{% for m in messages %}{{ m.content }}{{ '[PAD]' if m.content == 'pad' }}{% endfor %}"
    tok = tokenizer.Tokenizer(tok.spec, tok.settings | {"chat_template": template})
    talker(vocab_size=258).save_pretrained(tmp_path)
    tok.save(tmp_path)
    cfg = dict(init_from=str(tmp_path), device="cpu", max_new_tokens=3, temperature=0.0)
    sample.main(SampleConfig(start=("a [PAD]",), **cfg))  # a special token's name in a text is text
    assert capsys.readouterr().out.startswith("a [PAD]")
    lines = iter(["pad", "paid", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    sample.main(SampleConfig(chat=True, **cfg))
    said = capsys.readouterr()
    assert "the prompt has '[PAD]', which is not in the model's vocabulary" in said.err
    assert said.out.count("llama> ") == 1
    talker(vocab_size=256).save_pretrained(tmp_path)
    for how in {}, {"trace": True}:
        with pytest.raises(config.Mistake, match="the prompt has '<s>'"):
            sample.main(SampleConfig(**cfg | how))


def test_a_prompt_from_a_file_has_no_byte_order_mark(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for encoding in "utf-8", "utf-8-sig":
        (tmp_path / "prompt.txt").write_text("Once é", encoding=encoding)
        assert sample.read_prompt(f"FILE:{tmp_path / 'prompt.txt'}") == "Once é"
        assert sample.read_prompt("FILE:~/prompt.txt") == "Once é"


def test_compiling_without_a_compiler_is_one_line_before_anything_is_loaded(tmp_path, monkeypatch):
    def no_compiler(f, **_):
        raise RuntimeError("no C++ compiler\nand a traceback")
    talker().save_pretrained(tmp_path)
    monkeypatch.setattr(torch, "compile", no_compiler)
    monkeypatch.setattr("adapter.load", None)
    with pytest.raises(config.Mistake, match=r"^torch.compile does not work here \(no C\+\+ compiler\): .*=False$"):
        sample.main(SampleConfig(init_from=str(tmp_path), device="cpu", compile=True))


# -- many requests at once ---------------------------------------------------------------------------------------

def some_prompts(count=11, longest=30):
    """Prompts of 1 to `longest` ids, and how many new tokens each asks for, at least 1."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, longest + 1, (count, 2), generator=generator).tolist()
    return [(torch.randint(VOCAB, (T,), generator=generator).tolist(), new) for T, new in lengths]


def one_by_one(model, requests, **how):
    """What `Llama.stream` says to each prompt alone, without other rows."""
    return [[token.item() for token in model.stream(torch.tensor([ids]), new, **how)] for ids, new in requests]


def run_all(batch):
    """Step until nothing is left to do; what the steps say is what the requests have."""
    said = {}
    while batch.busy:
        for request, token in batch.step():
            assert request.new[len(said.setdefault(request, request.new[:-1])):] == [token]
            said[request] = list(request.new)
    assert all(request.done for request in said)


@pytest.mark.parametrize("name", distinct())
def test_requests_decoded_together_say_what_each_says_alone(name):
    """Of other lengths, in rows that others had before, moved to another row at the end; greedy and sampled."""
    model, requests = build(tiny(name, dim=32, n_head=4, head_dim=8, ffn_dim=48, expert_dim=16)), some_prompts()
    for rows, how in (3, dict(temperature=0)), (16, dict(temperature=0.9, top_k=20, top_p=0.9, min_p=0.01, seed=3)):
        batch = Batch(model, rows, size=64)
        got = [batch.add(ids, new, **how) for ids, new in requests]
        run_all(batch)
        assert [request.new for request in got] == one_by_one(model, requests, **how)
        to_decode(model)


def test_no_request_depends_on_its_neighbours():
    """Each has its own settings and seed; with others beside it, or others before it, it draws the same tokens."""
    model, requests = build(tiny("llama-4-scout")), some_prompts()
    settings = [dict(temperature=t, top_k=k, seed=s) for t, k, s in ((1.0, 0, 1), (0.7, 5, 1), (0, 0, 0), (1.0, 0, 2))]
    want = {}
    for order in (range(11), (3, 10, 2, 9, 0, 5, 4, 1, 8, 7, 6), (4, 8)):
        batch = Batch(model, 3)
        for i in order:
            ids, new = requests[i]
            want.setdefault(i, []).append(batch.add(ids, new, **settings[i % 4]))
        run_all(batch)
    assert all(request.new == first.new for first, *more in want.values() for request in more)
    twins = [Batch(model, 3).add([1, 2], 20, seed=seed) for seed in (1, 1, 2)]
    for request in twins:
        batch = Batch(model, 1)
        batch.waiting.append(request)
        run_all(batch)
    assert twins[0].new == twins[1].new != twins[2].new


def test_a_client_that_leaves_frees_its_row():
    model, requests = build(tiny("scout-128m")), some_prompts()
    want = one_by_one(model, requests, temperature=0)
    batch = Batch(model, 2)
    running = [batch.add(ids, new, temperature=0) for ids, new in requests]
    batch.drop(running[4])  # while it waits
    batch.step(), batch.step()
    longest = max((r for r in batch.running if r and not r.done), key=lambda r: r.max_new_tokens)
    had = list(longest.new)
    batch.drop(longest)
    batch.drop(longest)  # twice does no harm
    run_all(batch)
    assert longest.new == had and not running[4].new
    gone = longest, running[4]
    assert all(r.new == tokens for r, tokens in zip(running, want) if r not in gone)
    assert batch.step() == [] and not batch.busy


def test_a_step_reads_prompts_or_decodes_the_rows_that_run_and_no_others():
    model = build(tiny("llama-3.2-1b"))
    batch, read = Batch(model, 4), []
    model.model.layers[0].register_forward_hook(lambda module, args, out: read.append(tuple(args[0].shape[:2])))
    for T, new in (5, 1), (9, 4), (3, 2), (4, 6), (7, 3):
        batch.add(list(range(T)), new, temperature=0)
    run_all(batch)
    # prompts of similar lengths together; the first request ends with its first token, and its row goes to the last one
    assert read == [(2, 9), (2, 4), (1, 7), (4, 1), (3, 1), (2, 1), (1, 1), (1, 1)]


def test_a_request_ends_where_it_is_asked_to_or_where_its_row_is_full():
    model = build(tiny("llama-3.2-1b"))
    whole = one_by_one(model, [([1, 2, 3], 60)], temperature=0)[0]
    end = whole[7]
    assert decode_all(model, [[1, 2, 3]], 60, temperature=0, stop_ids={end}) == [whole[:whole.index(end) + 1]]
    batch = Batch(model, 2, size=10)
    short, none = batch.add([1, 2, 3], 60, temperature=0), batch.add([1, 2, 3], 0)
    run_all(batch)
    assert short.new == whole[:7] and none.new == [] and none.done
    full = decode_all(model, [[1, 2, 3]] * 3, 10**6, rows=2, temperature=0)
    assert full == [full[0]] * 3 and full[0][:60] == whole and len(full[0]) + 3 == model.config.context
    for prompt in [], [1] * 10:
        with pytest.raises(ValueError, match="takes 1 to 9"):
            batch.add(prompt, 5)
    assert decode_all(model, [], 5) == []


class Casts(TorchDispatchMode):
    """How often each matrix of a model is cast, as autocast does it."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        casts = func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.to)  # the latter in inference mode
        if casts and isinstance(args[0], torch.nn.Parameter) and args[0].dim() > 1:
            self.counts[args[0]] += 1
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("way", [
    lambda model: list(model.stream(torch.tensor([[1, 2, 3]]), 4)), lambda model: decode_all(model, [[1, 2, 3]], 4),
    lambda model: decode.beam_search(model, [1, 2, 3], 4, 2)], ids=("stream", "batch", "beams"))
def test_autocast_casts_each_matrix_once_for_all_tokens(way, packed):
    model = build(tiny("llama-3.2-1b"))
    model = to_decode(model) if packed else model
    with torch.autocast("cpu", torch.bfloat16), Casts() as casts:
        way(model)
    assert len(casts.counts) > 10 and set(casts.counts.values()) == {1}


@pytest.mark.parametrize("more", [{}, dict(arch="llama4", chunk=4, nope_every=2)])
def test_a_prompt_that_many_share_is_read_once(more, monkeypatch):
    """Its continuations are those of copies that are read one by one, also where a free row takes another, and those of
    its embeddings."""
    model = Llama(LlamaConfig(vocab_size=24, n_layer=2, n_head=2, dim=16, ffn_dim=32, context=32, **more), seed=2)
    a, b = [1, 2, 3, 4, 5, 6], [7, 8]
    with monkeypatch.context() as one_by_one:
        one_by_one.setattr(Batch, "TOGETHER", 1)
        want = decode_all(model, [[*a], [*a], [*a], [*b], [*b], [*a]], 9, rows=4, seed=3, stop_ids={0, 1})
    prefill, read = Batch.prefill, []
    monkeypatch.setattr(Batch, "prefill", lambda self, some, cache: read.extend(some) or prefill(self, some, cache))
    assert decode_all(model, [a, a, a, b, b, a], 9, rows=4, seed=3, stop_ids={0, 1}) == want
    assert len(read) < 6
    x = model.model.embed_tokens(torch.tensor(a)).detach()
    assert decode_all(model, [x, a, x, b, b, a], 9, rows=6, seed=3, stop_ids={0, 1}) == want
    monkeypatch.setattr(Batch, "TOGETHER", 6)  # as if they were too long to be read together
    assert decode_all(model, [a, a, a, b, b, a], 9, rows=4, seed=3, stop_ids={0, 1}) == want


def test_decode_all_takes_ids_and_embeddings_and_a_seed_for_each():
    """A text with pictures is embeddings."""
    model, prompts = build(tiny("llama4-tiny")), [ids for ids, _ in some_prompts()]
    with torch.no_grad():
        embeds = [model.model.embed_tokens(torch.tensor(ids)) for ids in prompts]
    want = [one_by_one(model, [(ids, 9)], seed=5 + i, top_p=0.9)[0] for i, ids in enumerate(prompts)]
    assert decode_all(model, prompts, 9, rows=4, seed=5, top_p=0.9) == want
    assert decode_all(model, embeds, 9, rows=4, seed=5, top_p=0.9) == want
    assert decode_all(model, [torch.tensor(ids) for ids in prompts], 9, rows=3, seed=5, top_p=0.9) == want
    idx = torch.tensor([prompts[0]])
    model(idx, idx)[1].backward()  # nothing of decoding is left in the model


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("changes", [
    dict(tie_embeddings=True), dict(n_kv_head=1), dict(arch="llama4", nope_every=2, chunk=4, n_experts=4, top_k=2)])
def test_a_trace_adds_up(changes, packed):
    """Its parameters to those of the model, its FLOPs to a third of those of a training step (but for the norms, whose
    products these count), the router's choices to the tokens of each expert."""
    llama = Llama(LlamaConfig(**dict(vocab_size=96, n_layer=2, n_head=4, dim=32, ffn_dim=48, context=24) | changes))
    total, norms = llama.counts()[0], sum(p.numel() for name, p in llama.named_parameters() if "norm" in name)
    flops = llama.flops_per_token(11) - 6 * norms
    loads = []
    for module in llama.modules():
        if isinstance(module, MoE):
            module.register_forward_hook(lambda _, inputs, output: loads.append(output[2].tolist()))
    steps = sample.steps_of(to_decode(llama) if packed else llama, list(range(11)))
    assert sum(step[2] for step in steps) == total
    assert sum(step[3] for step in steps) == pytest.approx(flops * 11 / 3, rel=1e-12)
    chosen = [json.loads(step[4].removeprefix("chose ")) for step in steps if step[0].endswith(".router")]
    assert [[sum(row.count(e) for row in rows) for e in range(4)] for rows in chosen] == loads
    names = [step[0] for step in steps]
    assert names[0] == "model.embed_tokens" and names[-1] == "lm_head" and steps[-1][1] == (1, 11, 96)
    at = names.index("model.layers.1.self_attn.attend")
    assert names[at - 1:at + 2:2] == ["model.layers.1.self_attn.v_proj", "model.layers.1.self_attn.o_proj"]
    assert steps[at][4] == ("no RoPE" if "chunk" in changes else "RoPE") and steps[at][1] == (1, 11, 32)
    assert len(sample.steps_of(llama, [1, 2])) == len(steps)


def test_a_search_without_room_finds_nothing():
    model = build(tiny("llama-3.2-1b"))
    assert decode.beam_search(model, [1, 2], 0, 3) == []
    assert decode.beam_search(model, [1] * model.config.context, 5, 3) == []


# -- 8 and 4 bits ------------------------------------------------------------------------------------------------

try:
    decode.check_quantize(torch.device("cpu"))
    UNITS = True
except config.Mistake:
    UNITS = False
quantized = pytest.mark.skipif(not UNITS, reason="a processor without AVX2")


def exact(layer):
    """W (out, in) in float64 by the definition of each format, element by element from what is stored."""
    if isinstance(layer, Int4Linear):
        q = torch.stack((layer.weight % 16, layer.weight // 16), 2).flatten(1).double()
        scale, zero = (t.T.repeat_interleave(32, 1) for t in layer.scale.double().unbind(2))
        return (q - 8) * scale + zero
    return layer.weight.double() * layer.scale.double()[:, None]


@pytest.fixture(params=(torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
def units(request, monkeypatch):
    """The dtype of large products, as on a processor with or without units for bfloat16."""
    monkeypatch.setattr(decode, "product_units", lambda: request.param)
    return request.param


@quantized
@torch.no_grad()
@pytest.mark.parametrize("kind, error", [(Int8Linear, 0.01), (Int4Linear, 0.09)])
@pytest.mark.parametrize("rows", (1, 2, 5, 16, 17, 40))
def test_rounded_matrices_multiply_as_in_float64(kind, error, rows, units):
    torch.manual_seed(rows)
    weight, x = torch.randn(48, 96), torch.randn(rows, 96)
    weight[5] = 0  # its scale would be 0
    flat = torch.tensor([3.25, 0.01, -0.3, 1e-3, -2e-5, 0.3])
    weight[7:13] = flat[:, None]
    weight[12] += 1e-4 * torch.randn(96)  # a range that is small beside what it is around
    layer = kind(*kind.stored(weight))
    want, W = x.bfloat16().double() @ exact(layer).T, exact(layer)
    rounding = 0.003 if rows <= kind.FEW else 1e-6  # the kernel's answer is bfloat16
    if rows > kind.FEW and units == torch.bfloat16:
        want, rounding = x.bfloat16().double() @ W.bfloat16().double().T, 0.003
    elif rows > kind.FEW:
        want = x.double() @ W.T
    got = layer(x)
    assert got.dtype == torch.float32 and got.shape == (rows, 48)
    assert (got.double() - want).norm() < rounding * want.norm()
    assert (W - weight.double()).norm() < error * weight.norm()  # a Gaussian's: 0.008 and 0.078
    assert not W[5].any() and ((W[7:13] - weight[7:13]) / flat[:, None]).abs().max() < 0.006
    torch.testing.assert_close(layer.whole().double(), W)
    assert layer(x[:, None]).shape == (rows, 1, 48)


FUZZ = """
import sys, torch
sys.path.insert(0, {root!r})
from model import Linear
from decode import kind_for
with torch.no_grad():
    for outputs in 1, 3, 15, 16, 17, 32, 80:
        for inputs in 1, 8, 16, 17, 24, 32, 48, 96, 100:
            linear = Linear(inputs, outputs)
            torch.nn.init.normal_(linear.weight)
            for bits in 4, 8:
                if inputs % 16:
                    continue  # not rounded
                kind = kind_for("", linear.weight.shape, bits)
                layer = kind(*kind.stored(linear.weight))
                for rows in 0, 1, 2, 3, 5, 17:
                    for start in 0, 1, 3:  # slices, whose memory begins anywhere, and strides
                        for step in 1, 2:
                            x = torch.randn(rows + start, inputs * step + start)[start:, start::step][:, :inputs]
                            x = x if x.shape[1] == inputs else x.new_ones(rows, inputs)
                            y, want = layer(x), x @ linear.weight.T
                            assert y.shape == want.shape
                            assert (y - want).norm() <= (0.2 if bits == 4 else 0.03) * want.norm() + 0.2, (inputs, bits)
print("alive")
"""


@quantized
def test_no_shape_ends_the_process():
    """In a process of its own: with a width that is no multiple of 16, the kernel of 8 bits would kill this one."""
    code = FUZZ.format(root=str(config.ROOT))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.stdout == "alive\n", done.stderr[-2000:]


@quantized
@torch.no_grad()
@pytest.mark.parametrize("bits", (8, 4))
@pytest.mark.parametrize("name", distinct())
def test_a_quantised_model_computes_what_its_rounded_weights_say(name, bits, monkeypatch):
    """Every structure, against a plain model in whose matrices the rounded weights stand."""
    monkeypatch.setattr(decode, "product_units", lambda: torch.float32)
    model = build(tiny(name, vocab_size=48, dim=32, n_head=4, head_dim=8, ffn_dim=64, expert_dim=32))
    plain, idx = copy.deepcopy(model), torch.randint(48, (1, 30), generator=torch.Generator().manual_seed(0))
    to_decode(model, bits=bits)
    layers = dict(model.named_modules())
    for path, linear in plain.named_modules():
        if isinstance(linear, Linear) and isinstance(layers[path], Int8Linear):
            linear.weight.copy_(exact(layers[path]))
    kinds = {type(layer) for layer in layers.values()}
    assert (Int4Linear in kinds) == (bits == 4) and type(model.lm_head) is Int8Linear
    want = plain(idx)[0]
    torch.testing.assert_close(model(idx)[0], want, atol=1e-4, rtol=1e-4)  # many rows: products in float32
    cache = KVCache(plain.config, 1, 30)
    got = torch.cat([model(part, cache=cache)[0] for part in idx.split(1, 1)], 1)
    routed = bool(plain.config.n_experts)  # rounding to bfloat16 may choose another expert
    assert ((got - want).norm(dim=-1) < 0.1 * want.norm(dim=-1))[0, :5 if routed else 30].float().mean() > 0.7
    batch = Batch(model, 3, size=20)
    requests = [batch.add([1, 2, 3], 6, temperature=0) for _ in range(4)]
    run_all(batch)
    assert batch.cache.keys[0].dtype == torch.float32 and all(len(r.new) == 6 for r in requests)
    assert len(model.generate(idx[:, :4], 5)[0]) == 9


@quantized
@pytest.mark.parametrize("bits", (8, 4))
@pytest.mark.parametrize("name", distinct())
def test_rounded_weights_are_saved_and_read(name, bits, tmp_path):
    """Bit for bit, in a directory that says what it is, which transformers and `from_pretrained` refuse."""
    model = build(tiny(name, vocab_size=48, dim=32, n_head=4, head_dim=8, ffn_dim=64, expert_dim=32))
    idx = torch.randint(48, (2, 9))
    to_decode(model, bits=bits)
    decode.save_quantized(model, bits, tmp_path)
    assert decode.bits_of(tmp_path) == bits
    read = to_decode(decode.load_quantized(tmp_path), bits=32)  # rounds nothing anew
    with torch.no_grad():
        assert torch.equal(read(idx)[0], model(idx)[0]) and torch.equal(read(idx[:1, :1])[0], model(idx[:1, :1])[0])
    assert {type(m) for m in read.modules()} == {type(m) for m in model.modules()}
    with pytest.raises(ValueError, match="quantization_config"):
        Llama.from_pretrained(tmp_path)


@quantized
@pytest.mark.parametrize("change, words", [
    (lambda state: state.pop("lm_head.scale"), "lm_head.scale"),
    (lambda state: state.update({"lm_head.weight": state["lm_head.weight"].float()}), "lm_head.weight"),
    (lambda state: state.update({"lm_head.scale": state["lm_head.scale"][:-1].clone()}), "lm_head.scale"),
    (lambda state: state.update(more=torch.zeros(1)), "more")])
def test_rounded_weights_that_do_not_fit_are_named(change, words, tmp_path):
    """A kernel that got them would read beyond their end."""
    from safetensors.torch import load_file, save_file
    model = build(tiny("llama-3.2-1b", vocab_size=48, dim=32, n_head=4, head_dim=8, ffn_dim=64))
    to_decode(model, bits=4)
    decode.save_quantized(model, 4, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    change(state)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=words):
        decode.load_quantized(tmp_path)


@quantized
def test_sample_saves_rounded_weights_and_samples_from_them(tmp_path, capsys, monkeypatch):
    plain, rounded = str(tmp_path / "a"), str(tmp_path / "b")
    Llama(LlamaConfig(vocab_size=258, n_layer=1, n_head=2, dim=32, ffn_dim=32, context=64)).save_pretrained(plain)
    tokenizer.byte().save(tmp_path / "a")
    how = dict(start=("ab",), max_new_tokens=9, temperature=0.0, device="cpu")
    sample.main(SampleConfig(init_from=plain, quantize="int4", **how))
    want = capsys.readouterr().out
    sample.main(SampleConfig(init_from=plain, quantize="int4", save=rounded, device="cpu"))
    capsys.readouterr()
    sample.main(SampleConfig(init_from=rounded, **how))
    assert capsys.readouterr().out == want
    for wrong in dict(quantize="int8"), dict(dtype="bfloat16"), dict(compile=True):
        with pytest.raises(config.Mistake, match="4 bits"):
            sample.main(SampleConfig(init_from=rounded, **how, **wrong))
    file = tmp_path / "b" / "config.json"
    for there, words in (plain, "not empty"), (str(file), "--save: "), (str(file / "folder"), "--save: "):
        with pytest.raises(config.Mistake, match=words):  # before anything is loaded
            sample.main(SampleConfig(init_from="nowhere", quantize="int4", save=there, device="cpu"))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    with pytest.raises(config.Mistake, match="AVX2; this one is DEFAULT"):
        sample.main(SampleConfig(init_from=rounded, **how))
    for wrong in {}, dict(quantize="int8", start=("a",)), dict(quantize="int8", chat=True):
        with pytest.raises(ValueError, match="--save"):
            SampleConfig(save="there", **wrong)
    for wrong in dict(start=("a", "b")), dict(compile=True):
        with pytest.raises(ValueError, match="--trace"):
            SampleConfig(trace=True, **wrong)


@pytest.mark.parametrize("faster", (True, False))
def test_auto_takes_the_faster_of_packed_float32_and_bfloat16(faster, monkeypatch):
    monkeypatch.setattr(decode, "product_units", lambda: torch.bfloat16)
    monkeypatch.setattr(decode, "seconds_of_step",
                        lambda model, rows: 1.0 + faster * (model.lm_head.weight.dtype == torch.float32))
    plain, prompt = talker(**DENSE), torch.tensor([[5, 6, 7]])
    taken = to_decode(copy.deepcopy(plain), rows=1)
    assert taken.lm_head.weight.dtype == (torch.bfloat16 if faster else torch.float32)
    want = copy.deepcopy(plain).bfloat16() if faster else plain
    assert torch.equal(taken.generate(prompt, 8, temperature=0), want.generate(prompt, 8, temperature=0))
    monkeypatch.setattr(decode, "product_units", lambda: torch.float32)  # where bfloat16 crawls it is not tried
    monkeypatch.setattr(decode, "seconds_of_step", None)
    assert to_decode(plain, rows=1) is plain


@torch.no_grad()
def test_products_of_prompts_are_in_what_is_fast_unless_float32_was_asked_for(monkeypatch):
    monkeypatch.setattr(decode, "product_units", lambda: torch.bfloat16)
    monkeypatch.setattr(decode, "seconds_of_step", lambda model, rows: 0.0)  # so that float32 stays
    plain = talker(**DENSE)
    idx = torch.arange(70)[None] % plain.config.vocab_size
    exact, free = to_decode(copy.deepcopy(plain))(idx)[0], to_decode(copy.deepcopy(plain), rows=1)
    torch.testing.assert_close(exact, plain(idx)[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(free(idx[:, :9])[0], exact[:, :9], atol=1e-5, rtol=1e-5)  # few rows stay float32
    prompt = free(idx)[0]
    assert prompt.dtype == torch.float32 and 1e-4 < (prompt - exact).abs().max() / exact.std() < 0.05


def test_a_token_is_timed():
    assert 0 < decode.seconds_of_step(talker(), 3) < 10
    assert decode.seconds_of_step(talker(context=2), 1) == 0  # there is one token, and nothing between two


def test_quantising_is_refused_in_one_line_where_it_cannot_be(monkeypatch):
    with pytest.raises(config.Mistake, match="--device=cpu"):
        decode.check_quantize(torch.device("meta"))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    with pytest.raises(config.Mistake, match="AVX2; this one is DEFAULT"):
        decode.check_quantize(torch.device("cpu"))
    for wrong in dict(compile=True), dict(dtype="bfloat16"), dict(trace=True):
        with pytest.raises(ValueError, match="quantize"):
            SampleConfig(quantize="int4", **wrong)
