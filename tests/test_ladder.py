"""tests/ladder.py: rungs that differ in nothing but what they add, and what came before Llama 1 against an oracle."""
import json
import re
import subprocess
import sys
from dataclasses import replace

import before_llama
import ladder
import pytest
import torch

import config
import model
from conftest import ROOT
from model import PRESETS, KVCache, Llama, LlamaConfig

SMALL = LlamaConfig(vocab_size=96, n_layer=4, n_head=4, dim=32, ffn_dim=48, context=24)


def made(rung, base):
    """The Llama of a rung."""
    llama = Llama(replace(base, **rung.shape))
    for change in rung.changes:
        change(llama)
    return llama.eval()


@pytest.mark.parametrize("shape", [dict(n_layer=4, n_head=4, dim=128, ffn_dim=384, vocab_size=1536, context=120),
                                   dict(n_layer=8, n_head=8, dim=512, ffn_dim=1408)])
def test_from_gpt_2_up_the_active_parameters_are_equal(shape):
    base = LlamaConfig(**shape)
    counts = [made(rung, base).counts() for rung in ladder.rungs(base, 120)]
    assert all(active == pytest.approx(counts[5][1], rel=0.02) for _, active in counts[2:])
    assert counts[-1][0] > 2 * counts[0][0] - base.vocab_size * base.dim  # the experts that rest


def test_each_rung_keeps_what_the_ones_before_it_added():
    found = ladder.rungs(SMALL, 24)
    assert [len(rung.changes) for rung in found] == [2, 3, 3, 2, 1, 0, 0, 0, 0, 0, 0]
    for a, b in zip(found[2:], found[3:]):
        assert set(b.changes) <= set(a.changes)
        adapted = {k: v for k, v in a.shape.items() if k not in ("ffn_dim", "n_kv_head", "rope_theta")}
        assert b.shape.items() >= adapted.items()
    with pytest.raises(config.Mistake, match="dense Llama"):
        ladder.rungs(PRESETS["scout-128m"], 120)


def test_gpt_2_is_that_of_transformers():
    """The same weights, the same logits: LayerNorm, learned positions and GELU are GPT-2's."""
    transformers = pytest.importorskip("transformers")
    ours = made(ladder.rungs(SMALL, 24)[2], SMALL)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=96, n_positions=24, n_embd=32, n_layer=4, n_head=4, n_inner=72, activation_function="gelu",
        layer_norm_epsilon=SMALL.norm_eps, tie_word_embeddings=False)).eval()
    state, decoder = {n: torch.zeros_like(p) for n, p in theirs.state_dict().items()}, ours.model
    for norm in (m for m in ours.modules() if isinstance(m, torch.nn.LayerNorm)):
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
    state |= {"transformer.wte.weight": decoder.embed_tokens.weight, "lm_head.weight": ours.lm_head.weight,
              "transformer.wpe.weight": decoder.positional_embedding.weight,
              "transformer.ln_f.weight": decoder.norm.weight, "transformer.ln_f.bias": decoder.norm.bias}
    for i, block in enumerate(decoder.layers):
        at, attention = f"transformer.h.{i}.", block.self_attn
        q, k, v = attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight
        state |= {at + "ln_1.weight": block.input_layernorm.weight, at + "ln_1.bias": block.input_layernorm.bias,
                  at + "ln_2.weight": block.post_attention_layernorm.weight,
                  at + "ln_2.bias": block.post_attention_layernorm.bias,
                  at + "attn.c_attn.weight": torch.cat((q, k, v)).T,
                  at + "attn.c_proj.weight": attention.o_proj.weight.T,
                  at + "mlp.c_fc.weight": block.ffn.up_proj.weight.T,
                  at + "mlp.c_proj.weight": block.ffn.down_proj.weight.T}
    theirs.load_state_dict(state)
    ids = torch.randint(96, (2, 24))
    torch.testing.assert_close(ours(ids)[0], theirs(ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("number", range(11))
def test_a_rung_decodes_as_it_reads(number):
    """Token by token with the cache, or all at once: the same logits. No logit depends on a later token."""
    llama = made(ladder.rungs(SMALL, 24)[number], SMALL)
    ids = torch.randint(96, (2, 20))
    whole, cache = llama(ids)[0], KVCache(llama.config, 2, 24)
    steps = [llama(ids[:, :7], cache=cache)[0], *(llama(ids[:, i:i + 1], cache=cache)[0] for i in range(7, 20))]
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-5)
    ids[:, 12] = 95 - ids[:, 12]
    assert torch.equal(llama(ids)[0][:, :12].argmax(-1), whole[:, :12].argmax(-1))


def test_bytes_of_the_caches():
    """4 layers of 24 positions, float32: k and v of 32 numbers, then of 8 for one head of four; chunks of 12."""
    found = {rung.name: ladder.cache_bytes(made(rung, SMALL), 24) for rung in ladder.rungs(SMALL, 24)}
    assert found["bigram"] == 0 and found["RNN"] == 4 * 32 * 4
    assert found["GPT-2"] == found["+ SwiGLU: Llama 1"] == 4 * 24 * 2 * 32 * 4
    assert found["+ QK norm"] == 4 * 24 * 2 * 8 * 4
    assert found["+ iRoPE with chunks"] == (3 * 12 + 24) * 2 * 8 * 4


def test_links_lead_to_their_lines():
    """Each link of the ladder, and each of its kind in README.md, whose text is a name in that file."""
    links = "\n".join(rung.links for rung in ladder.rungs(SMALL, 24))
    for text in links, (ROOT / "README.md").read_text(encoding="utf-8"):
        for name, file, start, end in re.findall(r"\[`?([\w.]+)`?\]\(([\w/.]+\.py)#L(\d+)-L(\d+)\)", text):
            lines = (ROOT / file).read_text(encoding="utf-8").splitlines()[int(start) - 1:int(end)]
            own = name.split(".")[-1]
            assert re.match(rf" *(@|class {own}\b|def {own}\b)", lines[0]), f"{name} is not in line {start} of {file}"
            code = model if file == "model.py" else before_llama
            for part in name.split("."):
                code = getattr(code, part)
            assert ladder.link(code).endswith(f"({file}#L{start}-L{end})"), f"{name}: {ladder.link(code)}"
    assert len(links.splitlines()) == 11


def test_readme_says_what_was_measured(tmp_path, monkeypatch):
    """The table in README is that of ladder.json, and `keep` writes both."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    between = readme.partition(ladder.MARKS[0])[2].partition(ladder.MARKS[1])[0]
    kept = json.loads(ladder.KEPT.read_text()) if ladder.KEPT.exists() else {}
    assert between == (ladder.readme(kept) if kept else "") and ladder.MARKS[1] in readme
    (tmp_path / "README.md").write_text(readme)
    monkeypatch.setattr(ladder, "KEPT", tmp_path / "ladder.json")
    monkeypatch.setattr(ladder.records, "ROOT", tmp_path)
    ladder.keep({"GPT-2": dict(parameters=1200, active=1100, bits=0.3, seconds=2.4, cache=2048, curve=[])}, "cpu")
    assert "| GPT-2 | 1,200 | 1,100 | 0.3000 | 2 | 2.0 |\n" in (tmp_path / "README.md").read_text()
    assert json.loads((tmp_path / "ladder.json").read_text())["rungs"]["GPT-2"]["cache"] == 2048


@pytest.mark.slow
def test_ladder_runs_and_does_not_repeat_itself(project, tmp_path):
    project("prepare/tales.py", "--stories=500", "--val_stories=50")
    words = [sys.executable, ROOT / "tests/ladder.py", "config/tales.py", f"--dataset={tmp_path / 'data/tales'}",
             f"--out_dir={tmp_path / 'out'}", "--max_iters=4", "--eval_interval=2", "--dim=64", "--ffn_dim=96",
             "--batch_size=2", "--eval_tokens=500", "--device=cpu", "--sample_tokens=20"]
    first, second = (subprocess.run(words, cwd=ROOT, capture_output=True, text=True) for _ in range(2))
    assert first.returncode == second.returncode == 0, first.stderr[-2000:] + second.stderr[-2000:]
    rows = [line for line in first.stdout.splitlines() if line.startswith("| ")][1:]
    assert [row.split("|")[1].strip() for row in rows] == [rung.name for rung in ladder.rungs(SMALL, 24)]
    assert len({row.split("|")[5] for row in rows}) == 11 and "==" not in second.stdout
    for name in "ladder.png", "loss.png":
        assert (tmp_path / "out/ladder_tales" / name).read_bytes().startswith(b"\x89PNG")
