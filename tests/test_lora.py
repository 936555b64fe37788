"""LoRA: peft is the oracle, of logits, gradients, a step and files; then the training loop and the scripts."""
import json
import math
import shutil
import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file
from test_train import DENSE, MANY, SPARSE, log_of, optimizer_state, same, settings, torchrun

import adapter
import config
import lora
import optim
import runs
import decode
import sample
import train
from model import Llama, LlamaConfig
from prepare import chat, shards, tokenizer

SHAPE = DENSE | dict(vocab_size=48, context=32, n_layer=2)
SHAPE4 = SPARSE | dict(vocab_size=48, context=32, top_k=1, moe_every=2, n_experts=3, ffn_dim=40)
SQUARE4 = SHAPE4 | dict(expert_dim=32, dim=64, head_dim=16)  # gate_up_proj is square: shapes tell no layout
SHAPES = {"llama": SHAPE, "llama 4": SHAPE4, "llama 4, square": SQUARE4}
MATRICES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EXPERTS = ["feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"]
ADAPTERS = {  # peft's LoraConfig, and the shape
    "list": (SHAPE, dict(target_modules=["q_proj", "v_proj", "down_proj"])),
    "all-linear": (SHAPE, dict(target_modules="all-linear")),
    "regex": (SHAPE, dict(target_modules=r".*\.1\.(self_attn\.[qo]_proj|mlp\.up_proj)")),
    "whole names": (SHAPE, dict(target_modules=["model.layers.0.self_attn.k_proj", "layers.1.mlp.gate_proj"])),
    "rslora": (SHAPE, dict(target_modules="all-linear", use_rslora=True)),
    "patterns": (SHAPE, dict(target_modules="all-linear", rank_pattern={r"layers\.1\.mlp\.down_proj": 3, "v_proj": 1},
                             alpha_pattern={"q_proj": 5, r".*\.0\.mlp\..*": 20})),
    "rslora and patterns": (SHAPE, dict(target_modules=["v_proj", "o_proj"], use_rslora=True,
                                        rank_pattern={"v_proj": 9}, alpha_pattern={"o_proj": 2})),
    "excluded": (SHAPE, dict(target_modules=["q_proj", "v_proj"], exclude_modules=r".*\.0\.self_attn\.v_proj")),
    "excluded by list": (SHAPE, dict(target_modules="all-linear", exclude_modules=["layers.1.self_attn.q_proj"])),
    "one layer": (SHAPE, dict(target_modules=["q_proj", "v_proj"], layers_to_transform=1)),
    "dropout, which is for training": (SHAPE, dict(target_modules=["q_proj"], lora_dropout=0.5)),
    "4": (SHAPE4, dict(target_modules=MATRICES)),
    "4 experts": (SHAPE4, dict(target_modules=MATRICES, target_parameters=EXPERTS)),
    "4 experts alone": (SHAPE4, dict(target_modules=[], target_parameters=EXPERTS)),
    "4 gate_up_proj": (SHAPE4, dict(target_modules=["q_proj"], target_parameters=EXPERTS[:1])),
    "4 down_proj": (SHAPE4, dict(target_modules=["q_proj"], target_parameters=["experts.down_proj"])),
    "4 patterns": (SHAPE4, dict(target_modules=["down_proj"], target_parameters=EXPERTS, use_rslora=True,
                                rank_pattern={"experts.gate_up_proj": 2, "down_proj": 5},
                                alpha_pattern={"shared_expert.down_proj": 3, "gate_up_proj": 7})),
    "4 square": (SQUARE4, dict(target_modules=["o_proj"], target_parameters=EXPERTS)),
}


@pytest.fixture(scope="session")
def peft():
    """The library, or a skip."""
    found = pytest.importorskip("peft", reason="needs peft, the oracle of these tests")
    import transformers
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    return found


@pytest.fixture
def base(tmp_path):
    """base(shape) -> the directory of a random Llama."""
    def make(shape):
        Llama(LlamaConfig(**shape), seed=0).save_pretrained(tmp_path / "base")
        return tmp_path / "base"
    return make


def theirs_of(directory):
    from transformers import AutoModelForCausalLM
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()


def randomize(parameters):
    """Give A and B values that are no zeros."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in parameters:
            if "lora_" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.15)


def tokens(seed=0):
    return torch.randint(48, (2, 20), generator=torch.Generator().manual_seed(seed))


def close(ours, theirs, bound=1e-5):
    assert (ours - theirs).abs().max() <= bound * theirs.abs().max().clamp(min=1)


# -- peft's adapters open here ---------------------------------------------------------------------------------------

@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_of_peft_has_its_logits(peft, base, tmp_path, name):
    shape, given = ADAPTERS[name]
    folder, idx = base(shape), tokens()
    theirs = peft.get_peft_model(theirs_of(folder), peft.LoraConfig(**dict(r=4, lora_alpha=8, task_type="CAUSAL_LM")
                                                                    | given)).eval()
    randomize(theirs.named_parameters())
    theirs.save_pretrained(tmp_path / "adapter")
    ours, plain = adapter.load(tmp_path / "adapter"), Llama.from_pretrained(folder)
    with torch.no_grad():
        expected = theirs(idx).logits
        close(ours(idx)[0], expected)
        assert (plain(idx)[0] - expected).abs().max() > 0.01  # it does something
        assert lora.merge(ours) < 1e-5
        close(ours(idx)[0], expected)
        close(ours(idx)[0], theirs.merge_and_unload()(idx).logits)
    assert ours.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("key", ["fan_in_fan_out", "ensure_weight_tying"])
def test_keys_that_change_nothing_for_peft(peft, base, tmp_path, key):
    llama, path = Llama.from_pretrained(base(SHAPE)), tmp_path / "adapter/adapter_config.json"
    adapter.begin(llama, 4, 8, tmp_path / "base", seed=0)
    randomize(llama.named_parameters())
    adapter.save(llama, path.parent)
    changed(path.parent, **{key: True})
    theirs, idx = peft.PeftModel.from_pretrained(theirs_of(tmp_path / "base"), path.parent).eval(), tokens()
    path.write_text(path.read_text(), encoding="utf-8-sig")  # as some editors write it
    with torch.no_grad():
        close(adapter.load(path.parent)(idx)[0], theirs(idx).logits)


@pytest.mark.parametrize("shape", [SHAPE4, SQUARE4], ids=["by shape", "by version"])
def test_experts_as_peft_wrote_them_before_0_19(base, tmp_path, shape):
    """A (E·r, in), B (out, r·E): the change is s·(B A)^T of each expert, written here as a loop."""
    llama = Llama.from_pretrained(base(shape))
    adapter.begin(llama, 4, 8, tmp_path / "base", seed=0)
    adapter.save(llama, tmp_path / "old")
    path, generator = tmp_path / "old/adapter_model.safetensors", torch.Generator().manual_seed(0)
    expected, tensors = Llama.from_pretrained(tmp_path / "base"), load_file(path)
    experts, cfg = expected.model.layers[1].ffn.experts, expected.config
    for place, weight in (".base_layer", experts.gate_up_proj.data), ("", experts.down_proj.data):
        E, inputs, out = weight.shape
        A, B = torch.randn(E * 4, inputs, generator=generator), torch.randn(out, 4 * E, generator=generator)
        start = f"base_model.model.model.layers.1.feed_forward.experts{place}.lora_"
        assert f"{start}A.weight" in tensors and cfg.n_experts == E
        tensors |= {f"{start}A.weight": A, f"{start}B.weight": B}
        for e in range(E):
            weight[e] += 2 * (B.view(out, 4, E)[:, :, e] @ A[4 * e:4 * e + 4]).T
    save_file(tensors, path)
    said = json.loads((tmp_path / "old/adapter_config.json").read_text())
    for version in ("0.18.1", "0.19.0", None):
        (tmp_path / "old/adapter_config.json").write_text(json.dumps(said | {"peft_version": version}))
        adapter.save(adapter.load(tmp_path / "old"), tmp_path / "again")  # as a run that goes on does
        with torch.no_grad():
            for name in "old", "again":
                close(adapter.load(tmp_path / name)(tokens())[0], expected(tokens())[0])


# -- and ours open in peft -------------------------------------------------------------------------------------------

@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("shape", SHAPES)
def test_peft_opens_ours_and_learns_as_ours_does(peft, base, tmp_path, shape):
    """Logits, gradients of every A and B, and what one step of AdamW makes of them."""
    folder, idx, target = base(SHAPES[shape]), tokens(), tokens(1)
    ours = Llama.from_pretrained(folder)
    adapter.begin(ours, 4, 8, folder, seed=0)
    with torch.no_grad():
        assert torch.equal(ours(idx)[0], Llama.from_pretrained(folder)(idx)[0])  # B is zero
    randomize(ours.named_parameters())
    adapter.save(ours, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(theirs_of(folder), tmp_path / "adapter", is_trainable=True)
    with torch.no_grad():
        close(ours(idx)[0], theirs(idx).logits)

    def learning(model):
        return [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in learning(ours)) == sum(p.numel() for p in learning(theirs))
    ours(idx, target)[1].backward()
    torch.nn.functional.cross_entropy(theirs(idx).logits.flatten(0, 1), target.flatten()).backward()
    grads = {n: p.grad for n, p in ours.named_parameters() if p.requires_grad}
    state = {n.replace(".default", ""): p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    places = list(adapter.places(ours))
    assert len(places) * 2 == len(grads) == len(state)
    for place, name, module in places:
        for part, grad in zip("AB", adapter.to_peft(grads[f"{name}.lora_A"], grads[f"{name}.lora_B"])):
            expected = state[f"{place}.lora_{part}.weight"]
            assert expected.abs().max() > 0
            close(grad, expected, 1e-5)
    for model in ours, theirs:
        torch.optim.AdamW(learning(model), lr=0.01, weight_decay=0.1).step()
    adapter.save(ours, tmp_path / "after")
    theirs.save_pretrained(tmp_path / "theirs")
    after, expected = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("after", "theirs"))
    assert after.keys() == expected.keys()
    assert all(torch.allclose(after[n], expected[n], atol=2e-5) for n in after)
    close(ours(idx)[0], theirs(idx).logits, 1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_files_come_back_bit_for_bit(base, tmp_path, shape):
    folder = base(SHAPES[shape])
    llama = Llama.from_pretrained(folder)
    adapter.begin(llama, 4, 8, folder, seed=0)
    randomize(llama.named_parameters())
    adapter.save(llama, tmp_path / "adapter")
    again = adapter.load(tmp_path / "adapter")
    assert same(dict(llama.state_dict()), dict(again.state_dict())) and again.adapter == llama.adapter
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n in again.state_dict() if "lora_" in n}


def test_a_base_opens_in_float16(base, tmp_path):
    """Rounded to float16 first, 1 + 2^-8 + 2^-12 is another number in bfloat16; the base is the same all the same."""
    plain = Llama.from_pretrained(base(SHAPE4))
    plain.model.layers[0].self_attn.k_proj.weight.data.fill_(1 + 2**-8 + 2**-12)
    plain.save_pretrained(tmp_path / "base")
    adapter.begin(plain, 4, 8, tmp_path / "base", seed=0)
    adapter.save(plain, tmp_path / "adapter")
    for dtype in torch.float32, torch.bfloat16, torch.float16:
        adapter.load(tmp_path / "adapter", dtype)


def test_a_base_that_was_trained_on_is_refused(base, tmp_path):
    """In any dtype, and after a single step at a small rate; a base in bfloat16 is the same one."""
    llama = Llama.from_pretrained(base(SHAPE4))
    adapter.begin(llama, 4, 8, tmp_path / "base", seed=0)
    adapter.save(llama, tmp_path / "adapter")
    plain = Llama.from_pretrained(tmp_path / "base")
    plain.to(torch.bfloat16).save_pretrained(tmp_path / "base")
    for dtype in torch.float32, torch.bfloat16:
        adapter.save(adapter.load(tmp_path / "adapter", dtype), tmp_path / "adapter")
    plain.float()
    for p in plain.parameters():
        p.data.add_(1e-5)
    plain.save_pretrained(tmp_path / "base")
    for dtype in torch.float32, torch.bfloat16:
        with pytest.raises(ValueError, match="the base model has changed since"):
            adapter.load(tmp_path / "adapter", dtype)


# -- what is not supported -------------------------------------------------------------------------------------------

def changed(folder, **keys):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def with_tensors(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
WRONG = {  # what is done to a directory, and a word of the line that refuses it
    "DoRA": (lambda d: changed(d, use_dora=True), "use_dora"),
    "modules_to_save": (lambda d: changed(d, modules_to_save=["lm_head"]), "modules_to_save"),
    "bias": (lambda d: changed(d, bias="lora_only"), "bias"),
    "lora_bias": (lambda d: changed(d, lora_bias=True), "lora_bias"),
    "trainable tokens": (lambda d: changed(d, trainable_token_indices=[3]), "trainable_token_indices"),
    "PiSSA, which changes the base model": (lambda d: changed(d, init_lora_weights="pissa_niter_4"), "pissa"),
    "aLoRA": (lambda d: changed(d, alora_invocation_tokens=[1]), "alora_invocation_tokens"),
    "layers twice": (lambda d: changed(d, layer_replication=[[0, 2], [1, 2]]), "layer_replication"),
    "a key of tomorrow": (lambda d: changed(d, use_zora={"a": 1}), "use_zora"),
    "IA3": (lambda d: changed(d, peft_type="IA3"), "IA3"),
    "no targets": (lambda d: changed(d, target_modules=None), "target_modules"),
    "targets of another model": (lambda d: changed(d, target_modules=["c_attn"]), "c_attn"),
    "no regular expression": (lambda d: changed(d, target_modules="(q_proj"), "regular expression"),
    "targets that are a number": (lambda d: changed(d, target_modules=3), "target_modules"),
    "rank 0": (lambda d: changed(d, r=0), "positive"),
    "rank in quotes": (lambda d: changed(d, r="4"), "positive"),
    "half a rank": (lambda d: changed(d, r=4.0), "r must be a whole number"),
    "half a rank in a pattern": (lambda d: changed(d, rank_pattern={"q_proj": 1.5}), "rank_pattern must be a whole"),
    "a pattern that is no number": (lambda d: changed(d, rank_pattern={"q_proj": None}), "positive"),
    "a pattern that is no dict": (lambda d: changed(d, rank_pattern=["q_proj"]), "rank_pattern"),
    "another rank": (lambda d: changed(d, r=8), "wrong shape"),
    "fewer targets than tensors, which peft drops": (lambda d: changed(d, target_modules=["q_proj"]), "not supported"),
    "more targets than tensors": (lambda d: with_tensors(d, lambda t: t.pop(f"{Q}A.weight")), "missing"),
    "a tensor of the head": (lambda d: with_tensors(d, lambda t: t.update(
        {"base_model.model.lm_head.lora_A.weight": torch.zeros(4, 32)})), "lm_head"),
    "a magnitude vector": (lambda d: with_tensors(d, lambda t: t.update(
        {f"{Q}magnitude_vector": torch.zeros(32)})), "magnitude_vector"),
    "an embedding": (lambda d: with_tensors(d, lambda t: t.update(
        {"base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(4, 48)})), "lora_embedding_A"),
    "integers": (lambda d: with_tensors(d, lambda t: t.update(
        {f"{Q}A.weight": torch.zeros(4, 32, dtype=torch.int8)})), "wrong shape or type"),
    "pickled": (lambda d: (d / "adapter_model.safetensors").rename(d / "adapter_model.bin"), "pickled"),
    "cut": (lambda d: (d / "adapter_model.safetensors").write_bytes(b"{}"), "safetensors"),
    "no base": (lambda d: changed(d, base_model_name_or_path=None), "base_model_name_or_path"),
    "a base that is gone": (lambda d: changed(d, base_model_name_or_path="a/b/c"), "is missing"),
    "not JSON": (lambda d: (d / "adapter_config.json").write_text("{"), "JSON"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_not_supported_is_named(base, tmp_path, name):
    change, word = WRONG[name]
    llama = Llama.from_pretrained(base(SHAPE))
    adapter.begin(llama, 4, 8, tmp_path / "base", seed=0)
    adapter.save(llama, tmp_path / "adapter")
    change(tmp_path / "adapter")
    with pytest.raises((ValueError, FileNotFoundError), match=word) as e:
        adapter.load(tmp_path / "adapter")
    assert len(str(e.value).splitlines()) == 1


def test_a_plain_checkpoint_opens_in_the_same_way(base, tmp_path):
    folder = base(SHAPE)
    assert same(dict(adapter.load(folder).state_dict()), dict(Llama.from_pretrained(folder).state_dict()))
    with pytest.raises(ValueError, match="adapter.load opens"):
        llama = Llama.from_pretrained(folder)
        adapter.begin(llama, 4, 8, folder, seed=0)
        adapter.save(llama, tmp_path / "adapter")
        Llama.from_pretrained(tmp_path / "adapter")


def test_a_folder_of_runs_can_be_moved(tmp_path, monkeypatch):
    """Base model and run in one folder: a relative path is found from wherever the folder lies, also for best/."""
    monkeypatch.setattr(config, "ROOT", tmp_path)
    folder, run = tmp_path / "out/base", tmp_path / "out/run"
    Llama(LlamaConfig(**SHAPE)).save_pretrained(folder)
    llama = Llama.from_pretrained(folder)
    monkeypatch.chdir(tmp_path / "out")
    adapter.begin(llama, 4, 8, "base", seed=0)
    assert llama.adapter["base_model_name_or_path"] == "out/base"
    for place in run, run / "best", run / "checkpoints/step_00000010":
        adapter.save(llama, place)
    shutil.move(tmp_path / "out", tmp_path / "elsewhere" / "out")
    for place in "run", "run/best", "run/checkpoints/step_00000010":
        assert adapter.base_of(tmp_path / "elsewhere/out" / place) == tmp_path / "elsewhere/out/base"
    adapter.save(llama, tmp_path.parent / f"{tmp_path.name}_far")  # and from the project's root
    shutil.move(tmp_path / "elsewhere/out", tmp_path / "out")
    assert adapter.base_of(tmp_path.parent / f"{tmp_path.name}_far") == tmp_path / "out/base"
    assert adapter.portable("meta-llama/Llama-3.2-1B") == "meta-llama/Llama-3.2-1B"


def test_what_goes_on_from_an_adapter_elsewhere_finds_its_base(tmp_path, monkeypatch):
    """Which the first one names by a path within its own folder."""
    monkeypatch.setattr(config, "ROOT", tmp_path / "project")
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    Llama(LlamaConfig(**SHAPE)).save_pretrained(tmp_path / "theirs/out/base")
    llama = Llama.from_pretrained(tmp_path / "theirs/out/base")
    adapter.begin(llama, 4, 8, "out/base", seed=0)
    adapter.save(llama, tmp_path / "theirs/out/first")
    adapter.save(adapter.load(tmp_path / "theirs/out/first"), tmp_path / "project/out/mine")
    assert adapter.base_of(tmp_path / "project/out/mine") == tmp_path / "theirs/out/base"
    adapter.load(tmp_path / "project/out/mine")


# -- training --------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A char-level data set of words."""
    rng = np.random.default_rng(0)
    text = " ".join(f"the {w} eats." for w in rng.choice(["llama", "alpaca", "vicuna"], 1500))
    tok = tokenizer.char(text)
    folder = tmp_path_factory.mktemp("data") / "words"
    writer = shards.Writer(folder, tok)
    for split, part in ("train", text[:-2000]), ("val", text[-2000:]):
        writer.add(split, tok.encode(part), len(part.encode()))
    writer.finish()
    return folder


@pytest.fixture(params=[DENSE, SPARSE], ids=["dense", "moe"])
def run(request, words, tmp_path):
    """The directory of a short run of whole weights."""
    train.main(settings(words, tmp_path / "whole", max_iters=4), request.param)
    return tmp_path / "whole"


LORA = dict(lora_rank=4, lora_alpha=8, learning_rate=1e-2, sample_tokens=5)


def test_a_run_learns_an_adapter_and_resumes_to_the_bit(words, run, tmp_path, capsys):
    """20 steps equal 10 + resume + 10; the files hold A and B and nothing else; the base model is as it was."""
    before = (run / "model.safetensors").read_bytes()
    whole, halves = tmp_path / "lora", tmp_path / "halves"
    train.main(settings(words, whole, init_from=str(run), **LORA), {})
    said = capsys.readouterr().out
    assert "parameters learn" in said and ", adamw, lr" in said
    shutil.copytree(whole / "checkpoints/step_00000010", halves / "checkpoints/step_00000010")
    shutil.copy(whole / "log.jsonl", halves)
    train.main(settings(words, halves, init_from="resume", **LORA), {})
    states = [load_file(d / "adapter_model.safetensors") for d in (whole, halves)]
    optimizers = [optimizer_state(d / "checkpoints/step_00000020") for d in (whole, halves)]
    assert same(*states) and same(*optimizers) and log_of(whole) == log_of(halves)
    assert all("lora_" in name for name in states[0]) and any(t.abs().max() > 0 for t in states[0].values())
    assert not (whole / "model.safetensors").exists() and not (whole / "config.json").exists()
    assert (run / "model.safetensors").read_bytes() == before
    losses = [r["val_loss"] for r in log_of(whole) if "val_loss" in r]
    assert losses[-1] < [r["val_loss"] for r in log_of(run) if "val_loss" in r][-1]
    learned = sum(t.numel() for t in states[0].values())
    # AdamW has A and B, Muon nothing, although the run asks for it
    assert sum(t.numel() for name, t in optimizers[0].items() if name.endswith(".exp_avg")) == learned
    assert not any("momentum" in name for name in optimizers[0])


def test_scripts_open_an_adapter_as_any_other_directory(words, run, tmp_path, capsys):
    """--eval_only, sample.py's load, the newest run, --merge, and a run that goes on from an adapter."""
    out = tmp_path / "out/lora"
    train.main(settings(words, out, init_from=str(run), **LORA), {})
    loss = [r["val_loss"] for r in log_of(out) if "val_loss" in r][-1]
    capsys.readouterr()
    train.main(settings(words, tmp_path / "unused", init_from=str(out), eval_only=True), {})
    whole = float(capsys.readouterr().out.split("val loss ")[1].split()[0])

    tok, idx = tokenizer.load(words), torch.from_numpy(shards.Split(words, "val")[:32].astype(np.int64))[None]
    assert sample.newest_run(tmp_path / "out") == out
    adapted = adapter.load(out)
    model, its_tok, _ = sample.load(sample.SampleConfig(init_from=str(out), device="cpu", dtype="float32"))
    assert its_tok.fingerprint == tok.fingerprint and not hasattr(model, "adapter")
    adapter.main(adapter.MergeConfig(merge=str(out), out=str(tmp_path / "merged")))
    merged = Llama.from_pretrained(tmp_path / "merged")
    assert tokenizer.load(tmp_path / "merged").fingerprint == tok.fingerprint
    with torch.no_grad():
        for other in model, merged:
            close(other(idx)[0], adapted(idx)[0])
    train.main(settings(words, tmp_path / "unused", init_from=str(tmp_path / "merged"), eval_only=True), {})
    assert float(capsys.readouterr().out.split("val loss ")[1].split()[0]) == pytest.approx(whole, abs=2e-4)
    assert whole == pytest.approx(loss, abs=0.2)

    train.main(settings(words, tmp_path / "further", init_from=str(out), max_iters=2), {})
    first, second = (load_file(d / "adapter_model.safetensors") for d in (out, tmp_path / "further"))
    assert first.keys() == second.keys() and not same(first, second)
    with pytest.raises(config.Mistake, match="rank 4 and alpha 8, not 2 and 8"):
        train.main(settings(words, tmp_path / "other", init_from=str(out), **LORA | dict(lora_rank=2)), {})


def test_an_adapter_keeps_the_context_that_it_learned_with(words, run, tmp_path, monkeypatch, capsys):
    """Longer than its base model's: where it goes on, is evaluated, sampled, merged or learned from."""
    out, step = tmp_path / "lora", "checkpoints/step_00000001"
    train.main(settings(words, out, init_from=str(run), block_size=64, max_iters=1, **LORA), {"context": 64})

    def call(*argv):
        monkeypatch.setattr(sys, "argv", ["train.py", *argv])
        train.main(*train.read_settings())
    call("--init_from=resume", f"--out_dir={out}", "--max_iters=2")
    assert json.loads((out / "run.json").read_text())["model"]["context"] == 64
    for part in out, out / "best", out / step:
        call("--eval_only", f"--init_from={part}")
        assert "val loss" in capsys.readouterr().out
        assert sample.load(sample.SampleConfig(init_from=str(part), device="cpu"))[0].config.context == 64
    assert adapter.load(out, context=16).config.context == 16
    (tmp_path / "t.jinja").write_text("{% for m in messages %}{{ m.content }}\n{% endfor %}")
    monkeypatch.setattr(chat, "unlearned", lambda *_: [])  # which asks in words that this tokenizer lacks
    assert chat.open_model(chat.Settings(init_from=str(out), template=str(tmp_path / "t.jinja")))[1] == 64
    adapter.main(adapter.MergeConfig(merge=str(out), out=str(tmp_path / "merged")))
    assert Llama.from_pretrained(tmp_path / "merged").config.context == 64
    train.main(settings(words, tmp_path / "new", init_from=str(out), block_size=64, max_iters=1), {})
    (out / "run.json").unlink()
    assert adapter.load(out).config.context == Llama.from_pretrained(run).config.context == 32
    with pytest.raises(config.Mistake, match="head_copy changes the head, which an adapter leaves as it is: merge it"):
        train.main(settings(words, tmp_path / "copy", init_from=str(tmp_path / "new"), head_copy=1.0), {})


def test_merging_says_what_rounding_takes(words, tmp_path, capsys):
    """In bfloat16 a change of some thousandths of W is half lost, as float64 says too."""
    llama = Llama(LlamaConfig(**SHAPE))
    llama.to(torch.bfloat16).save_pretrained(tmp_path / "base")
    llama = Llama.from_pretrained(tmp_path / "base", torch.float32)
    tokenizer.load(words).save(tmp_path / "adapter")
    adapter.begin(llama, 4, 4, tmp_path / "base", seed=0)
    randomize(llama.named_parameters())
    for name, p in llama.named_parameters():
        p.data.mul_(0.003 if "lora_B" in name else 1)
    adapter.save(llama, tmp_path / "adapter")
    errors, changes = 0.0, 0.0
    for _, name, module in adapter.places(llama):
        change = module.lora_B.double() @ module.lora_A.double()
        exact = module.base_layer.weight.double() + change
        errors += (exact.to(torch.bfloat16).double() - exact).square().sum().item()
        changes += change.square().sum().item()
    adapter.main(adapter.MergeConfig(merge=str(tmp_path / "adapter"), out=str(tmp_path / "merged"), dtype="bfloat16"))
    said = capsys.readouterr().out
    assert f"{math.sqrt(errors / changes):.0%}"[:1] in said and "keep the adapter" in said
    assert Llama.from_pretrained(tmp_path / "merged").lm_head.weight.dtype == torch.bfloat16
    with pytest.raises(config.Mistake, match="not empty"):
        adapter.main(adapter.MergeConfig(merge=str(tmp_path / "adapter"), out=str(tmp_path / "merged")))


def test_frozen_weights_are_bfloat16_where_products_are(words, run, tmp_path):
    """The base in bfloat16, A and B in float32, and a residual stream that stays float32."""
    out = tmp_path / "lora"
    train.main(settings(words, out, init_from=str(run), dtype="bfloat16", max_iters=2, **LORA), {})
    cfg = settings(words, out, init_from="resume", dtype="bfloat16", **LORA)
    llama, _ = train.load_llama(cfg, {}, runs.latest(out), train.Place(cfg, torch.device("cpu"), torch.bfloat16))
    assert {p.dtype for n, p in llama.named_parameters() if "lora_" not in n} == {torch.bfloat16}
    assert {p.dtype for n, p in llama.named_parameters() if "lora_" in n} == {torch.float32}
    streams = []
    for block in llama.model.layers:
        block.register_forward_hook(lambda module, args, y: streams.append(y[0].dtype))
    idx = torch.zeros(1, 8, dtype=torch.long)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        narrow = llama(idx)[0].float()
    assert set(streams) == {torch.float32}
    wide = adapter.load(out)
    with torch.no_grad():
        assert (narrow - wide(idx)[0]).abs().max() < 0.1


@pytest.mark.slow
def test_two_processes_do_what_one_does(words, tmp_path):
    """One process, two with a copy each, two that share: the same losses within 1e-5; and each resumes to the bit."""
    jobs = []
    for shape in "dense", "moe":
        base = tmp_path / shape
        train.main(settings(words, base, max_iters=1, eval_interval=1), {"dense": DENSE, "moe": SPARSE}[shape])
        more = LORA | dict(batch_size=2, gradient_accumulation_steps=4, init_from=str(base))
        train.main(settings(words, tmp_path / f"{shape}_alone", **more), {})
        for run, own in ("copies", {}), ("shared", {"shard": True}):
            jobs += (f"{shape}_{run}", more | own), (f"{shape}_{run}_on", more | own | {"init_from": "resume"})
            folder = tmp_path / f"{shape}_{run}_on/checkpoints"
            folder.mkdir(parents=True)
            (folder / "step_00000010").symlink_to(tmp_path / f"{shape}_{run}/checkpoints/step_00000010")
    (tmp_path / "many.py").write_text(MANY.format(root=str(ROOT), jobs=json.dumps(
        [(asdict(settings(words, tmp_path / name, **keys)), {}) for name, keys in jobs])))
    torchrun(2, tmp_path / "many.py")
    for run in "dense_copies", "dense_shared", "moe_copies", "moe_shared":
        alone = log_of(tmp_path / f"{run.split('_')[0]}_alone")
        for a, b in zip(alone, log_of(tmp_path / run), strict=True):
            for key in a.keys() & {"train_loss", "val_loss"}:
                assert a[key] == pytest.approx(b[key], abs=1e-5)
        tensors = [load_file(tmp_path / d / "adapter_model.safetensors") for d in (run, f"{run}_on")]
        assert same(*tensors) and log_of(tmp_path / run)[-11:] == log_of(tmp_path / f"{run}_on")


def test_lora_needs_a_model_that_is_there():
    with pytest.raises(ValueError, match="init_from"):
        train.TrainConfig(lora_rank=4)
    with pytest.raises(config.Mistake):
        config.make(adapter.MergeConfig, {"merge": "x"})


def test_replicas_are_of_split_models():
    with pytest.raises(ValueError, match="replicas counts split models: it needs --shard=True"):
        train.TrainConfig(replicas=4)
    train.TrainConfig(replicas=4, shard=True)


def test_the_head_and_muon_leave_adapters_alone(base, tmp_path):
    llama = Llama.from_pretrained(base(SHAPE4))
    adapter.begin(llama, 4, 8, tmp_path / "base", seed=0)
    adamw, = optim.make_optimizers(llama, train.TrainConfig(optimizer="muon"), torch.device("cpu"), torch.float32)
    count = sum(p.numel() for group in adamw.param_groups for p in group["params"])
    assert count == sum(p.numel() for n, p in llama.named_parameters() if "lora_" in n)
    assert not any("router" in n or "lm_head" in n for n, p in llama.named_parameters() if p.requires_grad)


def test_muon_iterates_in_bfloat16_only_where_that_is_fast_or_asked_for(base):
    llama, cfg = Llama.from_pretrained(base(SHAPE)), train.TrainConfig(optimizer="muon")
    for device, dtype, expected in ("cpu", "float32", "float32"), ("cpu", "bfloat16", "bfloat16"), (
            "mps", "float32", "float32"), ("mps", "float16", "float32"):
        _, muon = optim.make_optimizers(llama, cfg, torch.device(device), getattr(torch, dtype))
        assert muon.dtype == getattr(torch, expected), (device, dtype)


def test_decoding_is_the_same_with_a_cache(base, tmp_path):
    """Greedy tokens of an adapted model, packed or not."""
    llama = Llama.from_pretrained(base(SHAPE4))
    adapter.begin(llama, 4, 8, tmp_path / "base", seed=0)
    randomize(llama.named_parameters())
    idx = tokens()[:, :5]
    plain = llama.generate(idx, 10, temperature=0)
    lora.merge(llama)
    assert torch.equal(decode.to_decode(llama).generate(idx, 10, temperature=0), plain)
