"""sample.py: a chat reads only what is new and says what it would have said anew; fast decoding changes no text."""
import contextlib
import io
from dataclasses import replace

import pytest
import torch

import sample
from model import PRESETS, KVCache, Llama, LlamaConfig
from prepare import tokenizer
from sample import Conversation, SampleConfig, to_decode

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
    assert isinstance(attention.q_proj, Adapter) and isinstance(attention.q_proj.base, sample.PackedLinear)
    half = to_decode(talker().bfloat16())
    assert not any(isinstance(m, (sample.PackedLinear, sample.QuickNorm)) for m in half.modules())
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
