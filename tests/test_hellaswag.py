"""HellaSwag: each ending scores as it would alone, in any batch, in any number of processes, in training too.

Against lm-eval and on real weights: test_weights.py.
"""
import json
import re

import pytest
import torch

import config
import runs
import train
from model import Llama, LlamaConfig
from prepare import hellaswag, shards, tokenizer
from scores import log_likelihoods

ITEMS = [{"query": "Cooking: A man cuts an onion. He ", "label": 0,
          "endings": ["cries.", "sleeps in it", "is", "eats a boat, whole"]},
         {"query": "Running: She", "label": 1,
          "endings": ["wins the race and is given a medal", "flies", "", "[x] naps"]}]
LLAMA4 = dict(arch="llama4", nope_every=2, chunk=8, qk_norm=True, attn_scale=0.1, floor_scale=4, n_experts=4, top_k=2)


def tiny(context=2048, **more):
    torch.manual_seed(0)
    return Llama(LlamaConfig(vocab_size=258, n_layer=2, n_head=2, n_kv_head=1, dim=16, ffn_dim=24, context=context,
                             **more))


def prepared(folder, n=3):
    """A folder laid out as data/hellaswag, its items repeated n times."""
    folder.mkdir(parents=True)
    (folder / "val.jsonl").write_text("".join(json.dumps(item) + "\n" for item in ITEMS * n))
    return folder


@pytest.mark.parametrize("context", [2048, 24], ids=["whole", "cut"])
@pytest.mark.parametrize("shape", [{}, LLAMA4], ids=["llama", "llama4"])
def test_each_ending_scores_as_if_alone(shape, context):
    """Sharing a context, sharing a batch and cutting what is too long change no score."""
    model, tok = tiny(context, **shape).eval(), tokenizer.byte()
    items = [item | {"endings": [e[:20] if context == 24 else e for e in item["endings"]]} for item in ITEMS]
    rows = hellaswag.rows(items, tok, context)
    for tokens in 1, 10_000:
        for item, scores in zip(items, log_likelihoods(model, rows, torch.device("cpu"), tokens)):
            for ending, score in zip(item["endings"], scores, strict=True):
                ids = tok.encode(f"{item['query']} {ending}", bos=True)
                n = len(ids) - len(tok.encode(item["query"].rstrip(), bos=True))
                ids = torch.tensor([ids[-(context + 1):]])
                logp = model(ids[:, :-1])[0].double().log_softmax(-1)[0]
                assert score == pytest.approx(logp[-n:].gather(1, ids[0, -n:, None]).sum().item(), abs=1e-4)
    with pytest.raises(config.Mistake, match="an ending of 35 tokens"):
        hellaswag.rows(ITEMS, tok, 24)


def test_the_best_ending_by_sum_and_by_character():
    scores = [[-10.0, -12.0, -1.0, -20.0], [-34.0, -6.0, -9.0, -9.0]]  # 2 and 1; per character 2 and 0
    assert hellaswag.correct(ITEMS, scores) == (1, 0)
    assert hellaswag.correct(ITEMS[:1], [[-3.0, -12.0, -0.9, -18.0]]) == (0, 0)
    assert hellaswag.correct(ITEMS[:1], [[-3.0, -12.0, -1.1, -18.0]]) == (0, 1)  # 0.5 a character against 0.55


@pytest.mark.parametrize("endings", ["['one' 'two']", {"0": "one", "1": "two"}], ids=type)
@pytest.mark.parametrize("words", [{"query": "a"}, dict(activity_label="a", ctx_a="b", ctx_b="c")], ids=["", "raw"])
def test_endings_that_are_no_list_are_refused(tmp_path, words, endings):
    """pandas writes a text; its letters and the keys of an object once passed for endings."""
    (tmp_path / "in.jsonl").write_text(json.dumps(words | {"endings": endings, "label": "1"}))
    with pytest.raises(config.Mistake, match="in.jsonl: line 1.*: this is no HellaSwag item"):
        list(hellaswag.items([tmp_path / "in.jsonl"]))


def test_in_training_it_lands_in_the_log(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(hellaswag, "FOLDER", tmp_path / "hellaswag")
    writer = shards.Writer(tmp_path / "data", tokenizer.byte())
    for split in shards.SPLITS:
        writer.add(split, [256, *range(200), 257] * 5, 1000)
    writer.finish()
    cfg = train.TrainConfig(dataset=str(tmp_path / "data"), out_dir=str(tmp_path / "run"), batch_size=2, block_size=32,
                            max_iters=2, eval_interval=1, sample_tokens=0, device="cpu", dtype="float32",
                            hellaswag=True, hellaswag_items=5)
    shape = dict(n_layer=1, n_head=2, n_kv_head=2, dim=16, head_dim=8, ffn_dim=24, context=256)
    with pytest.raises(config.Mistake, match="run `python prepare/hellaswag.py` first"):
        train.main(cfg, shape)
    assert not (tmp_path / "run").exists()
    prepared(tmp_path / "hellaswag")
    train.main(cfg, shape)
    found = [r for r in runs.read_log(tmp_path / "run/log.jsonl") if "hellaswag_acc" in r]
    assert [r["step"] for r in found] == [1, 2] and all(r["hellaswag_items"] == 5 and "val_loss" in r for r in found)
    model, tok, items = Llama.from_pretrained(tmp_path / "run"), tokenizer.load(tmp_path / "run"), (ITEMS * 3)[:5]
    scores = log_likelihoods(model, hellaswag.rows(items, tok, 256), torch.device("cpu"), 1)
    assert (found[-1]["hellaswag_acc"], found[-1]["hellaswag_acc_norm"]) == tuple(
        n / 5 for n in hellaswag.correct(items, scores))
    assert capsys.readouterr().out.count("over 5 items") == 2


@pytest.mark.slow
def test_processes_that_share_a_model_score_together(project, tmp_path):
    """Two processes with a copy of the model each, and two with half of its parameters each, in training."""
    prepared(tmp_path / "data/hellaswag", 4)
    writer = shards.Writer(tmp_path / "data/bytes", tokenizer.byte())
    for split in shards.SPLITS:
        writer.add(split, [256, *range(200), 257] * 5, 1000)
    writer.finish()
    found = []
    for split in False, True:
        project("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py", "--dataset=bytes",
                "--hellaswag=True", "--hellaswag_items=7", "--max_iters=1", "--eval_interval=1", "--n_layer=1",
                "--n_head=2", "--dim=16", "--ffn_dim=24", "--context=256", "--block_size=32", "--batch_size=2",
                "--gradient_accumulation_steps=2", "--sample_tokens=0", "--device=cpu", "--dtype=float32",
                f"--shard={split}", f"--out_dir={tmp_path / 'out' / str(len(found))}")
        found.append({k: v for k, v in runs.read_log(tmp_path / "out" / str(len(found)) / "log.jsonl")[-1].items()
                      if k.startswith("hellaswag")})
    assert found[0] == found[1] and found[0]["hellaswag_items"] == 7


def test_alone_it_needs_no_data_set_and_any_number_of_processes(project, tmp_path):
    prepared(tmp_path / "data/hellaswag")
    tiny(64).save_pretrained(tmp_path / "run")
    tokenizer.byte().save(tmp_path / "run")
    said = []
    for n in 1, 2:
        out, errors = project("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}", "train.py",
                              "--eval_only", "--hellaswag=True", "--init_from=run", "--device=cpu")
        assert "HellaSwag:   0%" in errors
        said.append(out)
    assert said[0] == said[1]
    assert re.fullmatch("model      run\n"
                        r"hellaswag acc 0\.\d{4} ± 0\.\d{3}  acc_norm 0\.\d{4} ± 0\.\d{3}  over 6 items\n", said[0])
    assert not (tmp_path / "out").exists()
