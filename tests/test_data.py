"""Data sets: what the prepare scripts write, what the reader refuses, and that interruptions do not show."""
import functools
import gzip
import hashlib
import http.server
import importlib
import json
import os
import random
import re
import shlex
import ssl
import subprocess
import sys
import threading
import tracemalloc
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import config
from prepare import hellaswag, images, shards, sources, text, tokenizer

ROOT = Path(__file__).resolve().parents[1]


def run(script, *args, check=True, **environment):
    """Run a prepare script as a user does."""
    done = subprocess.run([sys.executable, ROOT / "prepare" / script, *map(str, args)], capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"} | environment)
    assert not check or done.returncode == 0, done.stderr
    return done


def prepare(*args):
    """prepare/text.py within this process."""
    text.prepare(config.load(text.Settings, [*map(str, args), "--workers=1"]), "text")


def refusal(script, *args, **environment):
    """The one line with which a script refuses."""
    done = run(script, *args, check=False, **environment)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    return done.stderr


def bytes_of(directory):
    """Everything a data set consists of, but for its name: {file: content}."""
    return {p.name: p.read_bytes().replace(f'"name": "{directory.name}"'.encode(), b"") for p in directory.iterdir()
            if p.name not in (shards.VERIFIED, shards.UNFINISHED)}


def make_documents(n, seed=0, alphabet="abc déÜ🙂\n你 "):
    """n different texts of 2 to 200 characters, without white space around them."""
    draw = random.Random(seed)
    return [f"{i}:" + "".join(draw.choices(alphabet, k=draw.randint(0, 200))) + "." for i in range(n)]


def documents_in(directory, split, tok=None):
    """The texts of a split, read back from its shards."""
    tok, data = tok or tokenizer.load(directory), shards.Split(directory, split)
    ids = data[:]
    starts = [*np.flatnonzero(ids == tok.bos_id), len(ids)]
    assert starts[0] == 0 and all(ids[j - 1] == tok.eos_id for j in starts[1:])
    texts = [tok.decode(ids[i:j].tolist()) for i, j in zip(starts, starts[1:])]
    assert (data.documents, data.bytes) == (len(texts), sum(len(t.encode()) for t in texts))
    return texts


def all_documents(directory):
    """The texts of both splits, sorted; none may be on both sides."""
    tok = tokenizer.load(directory)
    train, val = documents_in(directory, "train", tok), documents_in(directory, "val", tok)
    assert train and val and not set(train) & set(val)
    return sorted(train + val)


def files_of(paths):
    """The source that these files are with the default settings."""
    return sources.Files(paths, text.Settings().separator, text.Settings().field)


def jsonl(path, texts):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"id": i, "text": t}) + "\n" for i, t in enumerate(texts)), encoding="utf-8")
    return path


def make_small(tmp_path):
    """A data set of 7 shards of 1,000 ids (the last one shorter) and its ids; vocabulary of 258."""
    ids = np.random.default_rng(0).integers(0, 258, 6500)
    writer = shards.Writer(tmp_path / "small", tokenizer.byte(), shard_tokens=1000)
    for part in np.split(ids, [1, 700, 700, 2500, 4000]):
        writer.add("train", part, len(part))
    writer.add("val", [1, 2, 3], 3)
    writer.finish(floor_bpb={"train": 0.5, "val": 0.25}, source="random")
    return tmp_path / "small", ids


@pytest.fixture
def small(tmp_path):
    return make_small(tmp_path)


# -- writer and reader ------------------------------------------------------------------------------------------------

def test_the_reader_returns_what_was_written_across_shards(small):
    directory, ids = small
    data = shards.Split(directory, "train")
    assert [len(np.fromfile(p, np.uint16)) for p in sorted(directory.glob("train_*.bin"))] == [1000] * 6 + [500]
    assert (len(data), data.tokens, data.documents, data.bytes) == (6500, 6500, 6, 6500)
    assert (data.vocab_size, data.floor_bpb, data.meta["source"], data.meta["name"]) == (258, 0.5, "random", "small")
    assert shards.Split(directory, "val").floor_bpb == 0.25
    draw = random.Random(1)
    spans = [(0, 6500), (999, 1000), (999, 1001), (1000, 1000), (500, 3700), (6499, 6500), (6500, 6500), (6000, 9000)]
    for i, j in spans + [sorted(draw.choices(range(6501), k=2)) for _ in range(300)]:
        assert data[i:j].dtype == np.uint16 and np.array_equal(data[i:j], ids[i:j])
    assert np.array_equal(data[-700:], ids[-700:]) and len(data[5:3]) == 0
    assert data[0] == ids[0] and data[-1] == ids[-1]
    with pytest.raises(IndexError):
        data[6500]


def test_meta_is_written_last_and_nothing_else_stays(tmp_path, monkeypatch):
    written, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (replace(a, b), written.append(Path(b).name)))
    directory, _ = make_small(tmp_path)
    assert written[-1] == "meta.json" and written.count("meta.json") == 1
    assert {p.name for p in directory.iterdir()} == {"meta.json", "tokenizer.json", "tokenizer_config.json",
                                                     "val_000.bin", *(f"train_{i:03d}.bin" for i in range(7))}
    for split in json.loads((directory / "meta.json").read_text())["splits"].values():
        for shard in split["shards"]:
            assert hashlib.sha256((directory / shard["file"]).read_bytes()).hexdigest() == shard["sha256"]


def test_a_new_data_set_replaces_the_old_one_and_spares_other_files(small):
    directory, _ = small
    (directory / "notes.txt").write_text("mine")
    (directory / "train_set.bin").write_text("mine too")
    (directory / "tokenizer.model").write_text("of another tokenizer")
    old = bytes_of(directory)
    writer = shards.Writer(directory, tokenizer.byte())
    writer.add("train", [7], 1)
    writer.commit(None)
    assert bytes_of(directory) == old, "until the new one is complete"
    assert shards.Split(directory, "train").tokens == 6500
    writer.add("val", [8], 1)
    writer.finish()
    assert list(shards.Split(directory, "train")[:]) == [7]
    assert {p.name for p in directory.iterdir()} == {
        "train_000.bin", "val_000.bin", "meta.json", "tokenizer.json", "tokenizer_config.json", "notes.txt",
        "train_set.bin", shards.VERIFIED}


def test_vocabularies_over_65535_take_four_bytes(tmp_path):
    for size, width in (65535, 2), (65536, 4), (70000, 4):
        tok = tokenizer.char(map(chr, range(0x10000, 0x10000 + size)))
        assert tok.vocab_size == size
        writer = shards.Writer(tmp_path / str(size), tok, shard_tokens=2)
        for split in shards.SPLITS:
            writer.add(split, [0, size - 1, 1], 12)
        writer.finish()
        data = shards.Split(tmp_path / str(size), "train")
        assert list(data[:]) == [0, size - 1, 1] and data[:].dtype.itemsize == width
        assert (tmp_path / str(size) / "train_000.bin").stat().st_size == 2 * width


def test_the_writer_refuses_ids_beyond_the_vocabulary(tmp_path):
    writer = shards.Writer(tmp_path, tokenizer.byte())
    for ids in [258], [-1], [0, 65536 + 3]:
        with pytest.raises(ValueError, match="vocabulary of 258"):
            writer.add("train", ids, 1)


def test_truncated_altered_and_missing_shards_are_refused_by_name(small):
    directory, _ = small
    path = directory / "train_003.bin"
    good = path.read_bytes()
    for bad, word in (good[:-2], "truncated"), (good + b"\0\0", "truncated"), (b"\1\0" + good[2:], "altered"):
        path.write_bytes(bad)
        with pytest.raises(config.Mistake, match=f"train_003.bin.*{word}"):
            shards.Split(directory, "train")
        shards.Split(directory, "val")
    path.unlink()
    with pytest.raises(config.Mistake, match="train_003.bin is missing"):
        shards.Split(directory, "train")
    path.write_bytes(good)
    assert len(shards.Split(directory, "train")) == 6500


def test_a_shard_is_hashed_once_for_each_size_and_time(small, monkeypatch):
    directory, _ = small
    hashed, contents = [], shards._contents
    monkeypatch.setattr(shards, "_contents", lambda path, dtype: hashed.append(path.name) or contents(path, dtype))
    for _ in range(2):
        shards.Split(directory, "train")
    assert hashed == [f"train_{i:03d}.bin" for i in range(7)]
    os.utime(directory / "train_005.bin", ns=(1, 1))
    shards.Split(directory, "train")
    assert hashed[7:] == ["train_005.bin"]
    known = json.loads((directory / shards.VERIFIED).read_text())
    for nonsense in "{", "[]", "[" * 100_000, json.dumps(dict.fromkeys(known, "x")), json.dumps(dict.fromkeys(known)):
        (directory / shards.VERIFIED).write_text(nonsense)
        assert len(shards.Split(directory, "train")) == 6500


def test_a_read_only_data_set_can_be_read(small, monkeypatch):
    def refuse(path, text):
        raise PermissionError(path)
    monkeypatch.setattr(shards, "write_text", refuse)
    assert len(shards.Split(small[0], "train")) == 6500


def test_ids_beyond_the_vocabulary_are_refused(small):
    directory, _ = small
    meta = json.loads((directory / "meta.json").read_text())
    (directory / "meta.json").write_text(json.dumps(meta | {"vocab_size": 257}))
    with pytest.raises(config.Mistake, match="train_000.bin has ids up to 257, beyond the vocabulary of 257"):
        shards.Split(directory, "train")


def test_missing_data_names_the_script_to_run(tmp_path):
    for name, said in (("tinystories", "run `python prepare/tinystories.py`"), ("mine", "prepare/text.py --input"),
                       ("quiz_begin", "config/quiz_begin.py begins with the commands that make it"),
                       ("scout", "prepare/text.py --input")):  # config/scout.py takes another data set
        with pytest.raises(config.Mistake, match=said):
            shards.Split(tmp_path / name, "train")
    with pytest.raises(config.Mistake, match="config/shapes_align.py begins with the commands that make it"):
        images.load(tmp_path / "shapes_align", "train")
    writer = shards.Writer(tmp_path / "half", tokenizer.byte(), recipe="r")
    writer.commit(None)
    with pytest.raises(config.Mistake, match="half prepared"):
        shards.Split(tmp_path / "half", "train")


@pytest.mark.parametrize("path, value", [
    ((), []), ((), 3), (("vocab_size",), "258"), (("vocab_size",), True), (("vocab_size",), 10**400),
    (("vocab_size",), -1),
    (("dtype",), "float32"), (("dtype",), None), (("tokenizer",), None), (("tokenizer", "fingerprint"), 5),
    (("splits",), None), (("splits", "train"), []), (("splits", "train", "tokens"), 10**30),
    (("splits", "train", "tokens"), 6501), (("splits", "train", "bytes"), 1.5), (("splits", "train", "floor_bpb"), "x"),
    (("splits", "train", "floor_bpb"), float("nan")), (("splits", "train", "shards"), {}),
    (("splits", "train", "shards"), []), (("splits", "train", "shards", 0), None),
    (("splits", "train", "shards", 0, "file"), "../small/train_000.bin"),
    (("splits", "train", "shards", 0, "file"), "train_\0.bin"), (("splits", "train", "shards", 0, "file"), "."),
    (("splits", "train", "shards", 0, "sha256"), 0), (("splits", "train", "shards", 0, "tokens"), -1000),
], ids=lambda x: str(x)[:40])
def test_a_damaged_meta_json_is_refused_in_one_line(small, path, value):
    file = small[0] / "meta.json"
    meta = json.loads(file.read_text())
    if path:
        place = meta
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
    file.write_text(json.dumps(meta if path else value))
    with pytest.raises(config.Mistake):
        shards.Split(small[0], "train")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"vocab_size": ' + b"9" * 5000 + b"}"],
                         ids=["empty", "open", "utf-16", "deep", "huge"])
def test_a_meta_json_that_is_no_json_is_refused(small, content):
    (small[0] / "meta.json").write_bytes(content)
    with pytest.raises(config.Mistake, match="meta.json"):
        shards.Split(small[0], "train")


def test_the_writer_goes_on_from_its_last_commit(tmp_path):
    """What is added after a commit and before a crash leaves no trace, wherever the crash falls among the shards."""
    parts = [list(range(n)) for n in (3, 10, 0, 25, 7, 1, 40)]

    def go_on(writer, stop):
        for i in range(writer.position or 0, stop):
            writer.add("train" if i % 3 else "val", parts[i], i)
            if i % 2:
                writer.commit(i + 1)

    whole = shards.Writer(tmp_path / "whole", tokenizer.byte(), shard_tokens=10, recipe="r")
    go_on(whole, len(parts))
    whole.finish()
    for crash in range(len(parts) + 1):
        directory = tmp_path / f"crash{crash}"
        first = shards.Writer(directory, tokenizer.byte(), shard_tokens=10, recipe="r")
        go_on(first, crash)
        second = shards.Writer(directory, tokenizer.byte(), shard_tokens=10, recipe="r")
        assert second.position == (crash // 2 * 2 or None)
        go_on(second, len(parts))
        second.finish()
        assert bytes_of(directory) == bytes_of(tmp_path / "whole")


def test_two_processes_in_one_folder_refuse_and_the_old_data_set_stays(small):
    """Neither is complete, and nothing of what they mixed is gone on from."""
    directory, _ = small
    old = bytes_of(directory)
    first, other = (shards.Writer(directory, tokenizer.byte(), recipe="r") for _ in range(2))
    for writer in first, other, first, other:
        writer.add("train", [1, 2, 3], 3)
        writer.commit(1)
    for writer in first, other:
        with pytest.raises(config.Mistake, match="another process writes to .* too"):
            writer.finish()
    assert bytes_of(directory) == old
    assert shards.Writer(directory, tokenizer.byte(), recipe="r").position is None


def test_killed_while_it_replaces_an_old_data_set_nothing_is_lost(tmp_path, monkeypatch):
    """Before and after each file that `finish` moves, removes or writes: the old set or the new one can be read, or
    the reader refuses; and the same command always ends with the new one, going on where it was."""
    class Killed(BaseException):
        pass

    def begin(directory):
        return shards.Writer(directory, tokenizer.byte(), shard_tokens=10, recipe="r")

    def go_on(writer):
        if not writer.position:
            writer.add("train", range(35), 35)
            writer.add("val", range(5), 5)
            writer.commit("all")
            committed.append(writer)
        writer.finish()
    committed = []
    go_on(begin(tmp_path / "whole"))
    whole, directory = bytes_of(tmp_path / "whole"), tmp_path / "new"
    steps, last = 0, -1

    def step():
        nonlocal steps
        steps += 1
        if steps == last:
            raise Killed

    def counted(function):
        def inner(*arguments, **options):
            step()
            result = function(*arguments, **options)
            step()
            return result
        return inner
    for place, name in (os, "replace"), (Path, "unlink"), (shards.shutil, "rmtree"):
        monkeypatch.setattr(place, name, counted(getattr(place, name)))
    seen = set()
    for kill in range(1, 200):
        last = -1
        old = shards.Writer(directory, tokenizer.byte(), shard_tokens=4)
        old.add("train", [9] * 30, 30)
        old.add("val", [8] * 3, 3)
        old.finish()
        (directory / "tokenizer.model").write_text("the old one's")
        steps, last, committed = 0, kill, []
        try:
            go_on(begin(directory))
            break
        except Killed:
            last = -1
        try:
            seen.add(tuple(shards.Split(directory, "train")[:3]))
        except config.Mistake as e:
            assert "half prepared" in str(e) or "is missing" in str(e)
            seen.add(str(e).split()[-1])
        again = begin(directory)
        progress = again.position
        assert progress or not committed or (0, 1, 2) in seen, "it goes on, unless it had no commit yet or had ended"
        go_on(again)
        assert bytes_of(directory) == whole and not (directory / shards.UNFINISHED).exists()
    assert 50 < kill < 199 and {(9, 9, 9), (0, 1, 2)} < seen


def test_the_writer_starts_over_for_another_recipe_or_damaged_shards(tmp_path):
    def begin(recipe):
        return shards.Writer(tmp_path, tokenizer.byte(), shard_tokens=2, recipe=recipe)
    first = begin("a")
    first.add("train", [1, 2, 3], 3)
    first.commit("here")
    assert begin("a").position == "here"
    assert begin("b").position is None and not list(tmp_path.glob("**/*.bin*"))
    first = begin("a")
    first.add("train", [1, 2, 3], 3)
    first.commit("here")
    (tmp_path / shards.UNFINISHED / "train_000.bin").write_bytes(b"1")
    assert begin("a").position is None
    first = begin(None)
    first.commit("here")
    assert begin(None).position is None


# -- the text pipeline ------------------------------------------------------------------------------------------------

def test_every_format_gives_the_same_data(tmp_path):
    texts = make_documents(300)
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow
    lines = [json.dumps({"text": t}) for t in texts]
    files = {"a.jsonl": "\n".join(lines), "a.json": json.dumps([{"text": t} for t in texts], indent=1),
             "b.json": json.dumps(texts, ensure_ascii=False), "c.json": "\n".join(lines),
             "a.txt": "\ufeff" + "\n<|endoftext|>\n".join(texts) + "<|endoftext|>\n"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content.encode())
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content.encode()))
    parquet.write_table(pyarrow.table({"text": texts, "score": range(300)}), tmp_path / "a.parquet", row_group_size=70)
    folder = tmp_path / "folder/deeper"
    folder.mkdir(parents=True)
    for i in range(10):
        (folder / f"{i}.txt").write_bytes("<|endoftext|>".join(texts[30 * i:30 * i + 30]).encode())
    (folder / "0.md").write_text("not for us")
    zipped = [f"{name}.gz" for name in files]
    for given in [*files, *zipped, "a.parquet", "folder", "folder/*/*.txt", "folder/**/[0-9].txt"]:
        assert list(files_of(sources.find_files([str(tmp_path / given)]))) == texts, given


def test_documents_come_back_whole_and_are_counted(tmp_path):
    texts = make_documents(2000)
    prepare("--input", jsonl(tmp_path / "in.jsonl", texts), "--out", tmp_path / "out", "--tokenizer=byte",
            "--val_fraction=0.1")
    train, val = documents_in(tmp_path / "out", "train"), documents_in(tmp_path / "out", "val")
    assert sorted(train + val) == sorted(texts) and not set(train) & set(val)
    assert 120 < len(val) < 280
    assert train == [t for t in texts if t in set(train)], "in the order of the input"
    prepare("--input", tmp_path / "in.jsonl", "--out", tmp_path / "few", "--tokenizer=byte", "--limit=50",
            "--val_fraction=0.1")
    assert all_documents(tmp_path / "few") == sorted(texts[:50])


@pytest.mark.parametrize("kind", ["char", "sentencepiece", "file"])
def test_documents_come_back_whole_with_other_tokenizers(tmp_path, data, kind):
    texts = [t for t in make_documents(300) if not t.startswith("9:")]
    options = {"char": ["--tokenizer=char"], "sentencepiece": ["--vocab_size=500"],
               "file": [f"--tokenizer={data}/tokenizers/llama3_tokenizer.model"]}[kind]
    jsonl(tmp_path / "in.jsonl", texts)
    prepare("--input", tmp_path / "in.jsonl", "--out", tmp_path / "out", *options)
    assert all_documents(tmp_path / "out") == sorted(texts)
    assert (shards.Split(tmp_path / "out", "val")[:].dtype == np.uint32) == (kind == "file")


def test_characters_are_found_in_the_memory_of_one_document():
    def documents():
        for i in range(100):
            yield "x" * 100_000 + chr(0x4e00 + i)
    tracemalloc.start()
    try:
        tok = text.new_tokenizer(documents(), text.Settings(tokenizer="char"), 0)
        assert tok.vocab_size == 101 + 2 and tracemalloc.get_traced_memory()[1] < 3_000_000
    finally:
        tracemalloc.stop()


def test_a_large_file_among_small_ones_fills_the_sample_of_a_new_tokenizer(tmp_path, monkeypatch):
    """Of each file its share of the bytes, of a small one SHARE, and no more than SAMPLE in all."""
    samples = []
    monkeypatch.setattr(tokenizer, "train_sentencepiece", lambda sample, size: samples.append(sample))
    monkeypatch.setattr(text, "SAMPLE", 4000)
    monkeypatch.setattr(text, "SHARE", 40)
    for i in range(10):
        jsonl(tmp_path / f"{i}.jsonl", [f"{i}" * 10] * 9)
    jsonl(tmp_path / "large.jsonl", ["l" * 10] * 9000)
    text.new_tokenizer(files_of(sources.find_files([str(tmp_path)])), text.Settings(), 0)
    sizes = Counter("".join(samples[0]))
    assert max(sizes[f"{i}"] for i in range(10)) == 40 and sizes["l"] > 3500 and sizes.total() == 4000


def test_processes_and_batches_do_not_show(tmp_path):
    texts = make_documents(12_000)  # several batches
    jsonl(tmp_path / "in.jsonl", texts)
    for workers in 1, 2:
        run("text.py", "--input", tmp_path / "in.jsonl", "--out", tmp_path / f"w{workers}", "--tokenizer=byte",
            f"--workers={workers}")
    assert bytes_of(tmp_path / "w1") == bytes_of(tmp_path / "w2")


def test_windows_takes_at_most_61_processes(tmp_path, monkeypatch):
    class Started(Exception):
        pass

    def start(workers, *_):
        raise Started(workers)
    monkeypatch.setattr(text, "ProcessPoolExecutor", start)
    for platform, most in ("win32", "61"), ("linux", "100"):
        monkeypatch.setattr(sys, "platform", platform)
        with pytest.raises(Started, match=most):
            next(text.encoded([], 100, None, tmp_path, 0))


def test_a_document_that_comes_twice_is_on_one_side(tmp_path):
    texts = make_documents(400)
    jsonl(tmp_path / "in/a.jsonl", texts + texts[::-1])
    (tmp_path / "in/b.txt").write_bytes("<|endoftext|>".join(texts).encode())
    prepare("--input", tmp_path / "in", "--out", tmp_path / "out", "--tokenizer=byte", "--val_fraction=0.3")
    train, val = documents_in(tmp_path / "out", "train"), documents_in(tmp_path / "out", "val")
    assert not set(train) & set(val) and len(train) + len(val) == 1200 and len(val) % 3 == 0 and val


def test_a_few_files_still_have_both_sides(tmp_path):
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for i, t in enumerate(["the first book", "the second book"]):
        (folder / f"{i}.txt").write_text(t + "\n")
    for fraction in 0.001, 0.999:
        prepare("--input", folder, "--out", out, "--tokenizer=char", f"--val_fraction={fraction}")
        assert all_documents(out) == ["the first book", "the second book"]
    (folder / "1.txt").write_text("the first book")
    with pytest.raises(config.Mistake, match="--separator"):
        prepare("--input", folder, "--out", tmp_path / "new")
    assert not (tmp_path / "new").exists()
    (folder / "1.txt").write_bytes(b"one paragraph\n\ntwo\nlines\n\n\n\nthree\r\n\r\n")
    paragraphs = ["one paragraph", "three", "two\nlines"]
    prepare("--input", folder, "--out", out, "--tokenizer=char", r"--separator=\n\n")
    assert all_documents(out) == sorted(["the first book", *paragraphs])
    prepare("--input", folder / "1.txt", "--out", out, "--tokenizer=char")
    assert all_documents(out) == paragraphs, "a file alone"
    prepare("--input", folder / "0.txt", "--out", out, "--tokenizer=char", "--val_fraction=0")
    assert documents_in(out, "train") == ["the first book"]
    with pytest.raises(config.Mistake, match="no val tokens.*--val_fraction"):
        shards.Split(out, "val")


@pytest.mark.parametrize("texts, arguments, said", [
    (["a\nb\nc"], [], r"the input has 1 documents, .*: --separator='\\n' cuts texts at their lines, --val_fraction=0 "),
    (["a"], [r"--separator=\n"], ": give more text, --val_f"),
    (["a\n\n" + "long " * 999], [], r"there are 2 documents; --separator='\\n' cuts texts at their lines$"),
    (["a", "a"], [], r"1 documents, .*: --separator='\\n\\n' cuts texts at their blank lines, --val_fraction=0 ")])
def test_a_finer_separator_is_advised_than_was_tried(tmp_path, capsys, texts, arguments, said):
    for i, content in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(content)
    try:
        prepare("--input", *tmp_path.glob("*.txt"), "--out", tmp_path / "out", "--tokenizer=byte", *arguments)
    except config.Mistake as e:
        print(e)
    assert re.search(said, capsys.readouterr().out.splitlines()[-1])


def test_records_are_not_cut_and_no_separator_is_advised(tmp_path):
    jsonl(tmp_path / "in.jsonl", ["one\n\ntwo"])
    with pytest.raises(config.Mistake, match="1 documents, .*: give more text, --val_fraction=0 "):
        prepare("--input", tmp_path / "in.jsonl", "--out", tmp_path / "out", "--tokenizer=byte")
    assert text.finer(sources.Hub("a/b", None, "text").separators) == "give more text"


def test_separators_as_a_shell_passes_them(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\ftwo\fthree")
    (tmp_path / "b.txt").write_bytes(b"four\t\r\nfive")
    prepare("--input", tmp_path, "--out", tmp_path / "out", "--tokenizer=byte", "--separator", r"\f", r"\t\r\n")
    assert all_documents(tmp_path / "out") == ["five", "four", "one", "three", "two"]


def test_results_among_the_input_are_not_read(tmp_path):
    texts = make_documents(20)
    jsonl(tmp_path / "in.jsonl", texts)
    jsonl(tmp_path / ".hidden/other.jsonl", ["no"])
    for _ in range(2):
        prepare("--input", tmp_path, "--out", tmp_path / "out", "--tokenizer=byte")
        assert all_documents(tmp_path / "out") == sorted(texts)


@pytest.mark.parametrize("script, record", [("shakespeare", {"text": "some text " * 9}),
                                            ("hellaswag", {"query": "How?", "endings": ["a", "b"], "label": 0})])
def test_a_second_run_does_not_read_the_first_ones_results(tmp_path, script, record):
    (tmp_path / "in.jsonl").write_text(json.dumps(record))
    found = []
    for _ in range(2):
        run(f"{script}.py", "--input", tmp_path, "--out", tmp_path / "out")
        found.append(bytes_of(tmp_path / "out"))
    assert found[0] == found[1]


def test_reading_goes_on_at_any_document(tmp_path):
    texts = make_documents(60)
    for i in range(3):
        jsonl(tmp_path / f"{i}.jsonl", texts[20 * i:20 * i + 20])
    files = files_of(sources.find_files([str(tmp_path)]))
    places = [(list(files.position), files.fraction())]
    for _ in files:
        places.append((json.loads(json.dumps(files.position)), files.fraction()))
    assert [f for _, f in places] == sorted(f for _, f in places) and places[-1][1] == 1
    for n, (position, _) in enumerate(places):
        again = files_of(files.paths)
        again.position = position
        assert list(again) == texts[n:]


def test_the_hub_goes_on_at_any_document(tmp_path, monkeypatch):
    """Against the streams of `datasets` itself, only over local files instead of the hub's."""
    datasets = pytest.importorskip("datasets")
    import pyarrow
    from pyarrow import parquet
    texts = make_documents(1500)
    texts[3] = texts[700] = texts[-1] = " "
    for i in range(3):
        table = pyarrow.table({"text": texts[500 * i:500 * i + 500]})
        parquet.write_table(table, tmp_path / f"{i}.parquet", row_group_size=90)
    load = functools.partial(datasets.load_dataset, "parquet", data_files=str(tmp_path / "*.parquet"))
    monkeypatch.setattr(datasets, "load_dataset", lambda _, __, **options: load(**options))
    monkeypatch.setattr(sources, "reach_hub", lambda *_: None)
    hub = sources.Hub("someone/something", None, "text")
    places, wanted = [hub.position], [t for t in texts if t != " "]
    for _ in hub:
        places.append(json.loads(json.dumps(hub.position)))
    assert len(places) == 1498
    for n in 0, 1, 255, 256, 257, 499, 500, 697, 698, 699, 700, 1023, 1024, 1496, 1497:
        again = sources.Hub("someone/something", None, "text")
        again.position = places[n]
        assert list(again) == wanted[n:] and (again.position[2], again.skipped) == (1500, 3)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """hub(records) lets `datasets` find these records under any name, behind a server that answers on this machine; it
    returns the lists of what was then asked of the server and of `datasets`."""
    datasets, parquet = pytest.importorskip("datasets"), pytest.importorskip("pyarrow.parquet")
    visits, asked, load_dataset = [], [], datasets.load_dataset

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            visits.append(self.path)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    def load(*names, **options):
        asked.append((*names, *options.items()))
        return load_dataset("parquet", data_files=str(tmp_path / "hub.parquet"), split="train", streaming=True)

    def start(records):
        import pyarrow
        parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "hub.parquet", row_group_size=90)
        monkeypatch.setattr(datasets, "load_dataset", load)
        return visits, asked
    with http.server.HTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        yield start
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("script, repository, part", [
    ("tinystories", "roneneldan/TinyStories", None), ("fineweb_edu", "HuggingFaceFW/fineweb-edu", "sample-10BT"),
    ("cosmopedia", "HuggingFaceTB/smollm-corpus", "cosmopedia-v2")])
def test_the_hub_gives_what_files_give(tmp_path, monkeypatch, hub, script, repository, part):
    texts = [f"<s>{t}</s>" for t in make_documents(700)]  # names of special tokens are text like any other
    visits, asked = hub([{"text": t, "score": i} for i, t in enumerate(texts)])
    main = importlib.import_module(f"prepare.{script}").main

    def prepare(out, *more):
        monkeypatch.setattr(sys, "argv", [script, f"--out={tmp_path / out}", "--tokenizer=byte", "--workers=1",
                                          "--limit=600", *more])
        main()
    prepare("hub")
    assert asked == [(repository, part, ("split", "train"), ("streaming", True))] * 2  # to find what validates; to read
    assert visits == [f"/api/datasets/{repository}"] * 2
    prepare("files", f"--input={jsonl(tmp_path / 'in.jsonl', texts)}")
    assert len(asked) == 2 and bytes_of(tmp_path / "hub") == bytes_of(tmp_path / "files")
    assert all_documents(tmp_path / "hub") == sorted(texts[:600])


def test_hellaswag_from_the_hub(tmp_path, monkeypatch, hub):
    items = [{"query": f"How {i}", "endings": ["a", "b", "c", "d"], "label": str(i % 4)} for i in range(9)]
    _, asked = hub(items)
    monkeypatch.setattr(sys, "argv", ["hellaswag", f"--out={tmp_path / 'out'}", "--limit=7"])
    hellaswag.main()
    assert asked == [("Rowan/hellaswag", None, ("split", "validation"), ("streaming", True))]
    found = [json.loads(line) for line in (tmp_path / "out/val.jsonl").read_text().splitlines()]
    assert found == [item | {"label": i % 4} for i, item in enumerate(items[:7])]


def test_ones_own_folder_in_the_two_commands_of_the_readme(project, tmp_path):
    texts = make_documents(300)
    for i in range(3):
        (tmp_path / f"my_folder/deeper/{i}").mkdir(parents=True)
        (tmp_path / f"my_folder/deeper/{i}/a.txt").write_text("<|endoftext|>".join(texts[100 * i:100 * i + 100]))
    out, bar = project("prepare/text.py", "--input", "my_folder", "--out", "data/mine", "--vocab_size=300")
    assert "python train.py --dataset=mine" in out
    assert re.search(r"100%\|.*300 documents, [\d,]+ tokens/s \[\d\d:\d\d<00:00\]", bar)  # ETA after the <
    out, _ = project("train.py", "--dataset=mine", "--max_iters=2", "--n_layer=1", "--n_head=2", "--dim=32",
                     "--ffn_dim=48", "--batch_size=2", "--block_size=64", "--device=cpu")
    assert (tmp_path / "out/mine/model.safetensors").exists() and "bits/byte" in out


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv.pop(1))
import config
from prepare import shards, text
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job begins with it ignored
    text.BATCH, text.COMMIT_SECONDS = 2000, 0
    shards.Writer.__init__.__defaults__ = 4999, None, False
    last, name, log = int(sys.argv.pop(1)), sys.argv.pop(1), sys.argv.pop(1)
    steps = 0

    def step():
        global steps
        steps += 1
        if steps == last:
            signal.raise_signal(getattr(signal, name))

    def counted(function):
        def inner(*arguments):
            step()
            result = function(*arguments)
            step()
            return result
        return inner
    for place, attribute in ((os, "replace"), (os, "fsync"), (shards.Writer, "_append"), (shards.Writer, "commit")):
        setattr(place, attribute, counted(getattr(place, attribute)))
    try:
        config.run(text.main)
    finally:
        open(log, "w").write(str(steps))
"""  # text.py, but a signal ends it at step `last` of those that write something


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_at_random_points_the_result_is_the_same(tmp_path, workers):
    """Before and after any write, flush, rename or commit, as often as five times; the clock has no part in it."""
    texts = make_documents(1200)
    jsonl(tmp_path / "in/0.jsonl", texts[:200] + [""] + texts[200:400] + ["\n"])
    (tmp_path / "in/1.txt").write_bytes("<|endoftext|>".join(texts[400:] + [" ", "end"]).encode())
    (tmp_path / "killed.py").write_text(KILLED)

    def start(out, last, name="SIGKILL"):
        """Exit code, and what was printed, of a run that gets this signal at step `last`, if it has so many."""
        done = subprocess.run([sys.executable, tmp_path / "killed.py", ROOT, str(last), name, tmp_path / "steps",
                               "--input", tmp_path / "in", "--out", out, "--vocab_size=400", f"--workers={workers}"],
                              capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        return done.returncode, done.stdout + done.stderr

    code, said = start(tmp_path / "whole", -1)
    assert code == 0 and "1,201 documents, 3 skipped (without text)" in said
    assert len(list((tmp_path / "whole").glob("train_*.bin"))) > 10
    draw, steps, resumed = random.Random(workers), int((tmp_path / "steps").read_text()), 0
    assert steps > 500
    kills = draw.sample(["SIGKILL", "SIGTERM", "SIGINT", "SIGKILL", "SIGKILL"], 5)
    for name in kills:
        code, said = start(tmp_path / "cut", draw.randrange(20, steps // 8), name)
        assert code == {"SIGKILL": -9, "SIGTERM": -15, "SIGINT": 2}[name], said
        resumed += "going on after" in said
    code, said = start(tmp_path / "cut", -1)
    assert code == 0 and "going on after" in said and "1,201 documents, 3 skipped (without text)" in said
    assert resumed == 4
    assert bytes_of(tmp_path / "cut") == bytes_of(tmp_path / "whole")


def test_a_changed_setting_or_input_starts_over(tmp_path):
    file, cfg = jsonl(tmp_path / "in.jsonl", make_documents(500)), text.Settings(tokenizer="byte")
    texts = make_documents(500)

    def begin():
        """An interrupted run: nonsense that a run that continues it would keep."""
        writer = shards.Writer(tmp_path / "out", tokenizer.byte(), recipe=text.recipe(cfg, files_of([file])))
        writer.add("train", [256, 1, 257], 1)
        writer.commit({"documents": 499, "source": [0, 499, 0], "threshold": 0})

    arguments = "--input", file, "--out", tmp_path / "out", "--tokenizer=byte"
    begin()
    prepare(*arguments)
    assert documents_in(tmp_path / "out", "train") == ["\1", texts[-1]], "it does continue with the same settings"
    for change in "--val_fraction=0.2", "--limit=400", "--tokenizer=char", "--workers=2", "touch":
        begin()
        if change == "touch":
            os.utime(file, ns=(1, 1))
        prepare(*arguments, *[change] * change.startswith("--"))
        if change == "--workers=2":
            assert len(documents_in(tmp_path / "out", "train")) == 2, "which changes nothing in the result"
        else:
                assert all_documents(tmp_path / "out") == sorted(texts[:400] if "limit" in change else texts)


def test_what_is_said_at_the_end_holds_and_can_be_pasted(tmp_path):
    jsonl(tmp_path / "my texts/a.JSONL", ["one", "", "two", " ", "three"])
    (tmp_path / "my texts/notes.md").write_text("x")
    out = tmp_path / "my data; it's here"
    with pytest.raises(config.Mistake) as missing:
        shards.Split(out, "train")
    command = re.search("`(.*)`", str(missing.value)).group(1)
    assert shlex.split(command)[-2:] == ["--out", str(out)]
    said = run("text.py", "--input", tmp_path / "my texts", "--out", out, "--tokenizer=byte").stdout.splitlines()
    assert said[0] == "files skipped: 1 .md" and said[1] == "3 documents, 2 skipped (without text)"
    found = {split: shards.Split(out, split) for split in shards.SPLITS}
    assert said[2:4] == [f"{split}: {s.documents} documents, {s.tokens} tokens, {s.bytes} bytes"
                         for split, s in found.items()]
    command = shlex.split(said[4].removeprefix(f"{out} is ready: "))
    assert command == ["python", "train.py", f"--dataset={out}"]
    said = run("text.py", "--input", tmp_path / "my texts", "--out", out, "--tokenizer=byte", "--val_fraction=0").stdout
    assert "train.py" not in said and "--val_fraction" in said


def test_the_folder_that_one_is_in_has_a_name(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "ROOT", tmp_path)
    (tmp_path / "data/mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "data/mine")
    assert [text.name_of(Path(out)) for out in (".", "../mine", "../mine/../mine", "..")] == ["mine"] * 3 + [".."]


@pytest.mark.parametrize("texts, arguments, words", [
    (["a" * 99] * 50 + ["b"], ["--val_fraction=0.2"], ""),
    (["word " * 9] * 300, [], "validation has only [0-9]+ tokens: --val_fraction=0.1 holds out more$"),
    (["word " * 9] * 60, ["--val_fraction=0.3"], "only [0-9]+ tokens: a larger --val_fraction holds out more$"),
    (["word " * 99] * 300, ["--val_fraction=0.8"], r"more tokens \([0-9,]+\) than training \([0-9,]+\): a smaller"),
    (["short", "long " * 999], [], "2 documents; give more text$"),
], ids=["sound", "small", "small still", "upside down", "one long"])
def test_splits_that_make_no_sense_are_said(tmp_path, capsys, texts, arguments, words):
    jsonl(tmp_path / "in.jsonl", [f"{i} {t}" for i, t in enumerate(texts)])
    prepare("--input", tmp_path / "in.jsonl", "--out", tmp_path / "out", "--tokenizer=byte", *arguments)
    last = capsys.readouterr().out.splitlines()[-1]
    assert re.search(words, last) and last.startswith("but validation has ") == bool(words), last


def test_a_failure_in_the_middle_keeps_the_old_data_set_and_names_the_document(tmp_path):
    out = tmp_path / "out"
    jsonl(tmp_path / "a.jsonl", ["one two", "two three", "three one"])
    prepare("--input", tmp_path / "a.jsonl", "--out", out, "--tokenizer=char")
    old = bytes_of(out)
    jsonl(tmp_path / "b.jsonl", ["one two", "two 7 three", "three"])
    for workers in 1, 2:
        done = run("text.py", "--input", tmp_path / "b.jsonl", "--out", out, f"--tokenizer={out}",
                   f"--workers={workers}", check=False)
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert "error: the document that begins 'two 7 three': the character '7' is not among" in done.stderr
        assert bytes_of(out) == old and shards.Split(out, "train").documents


def test_vocabularies_too_small_and_too_large_are_said(tmp_path, capsys):
    with pytest.raises(config.Mistake, match=r"of 10 tokens: smaller than .*: --vocab_size=(\d+) at least$") as e:
        tokenizer.train_sentencepiece(["hello world"] * 9, 10)
    least = int(re.search(r"size=(\d+)", str(e.value))[1])
    with pytest.raises(config.Mistake, match="at least"):
        tokenizer.train_sentencepiece(["hello world"] * 9, least - 1)
    assert tokenizer.train_sentencepiece(["hello world"] * 9, least).vocab_size == least
    assert "never used" not in capsys.readouterr().out
    with pytest.raises(config.Mistake, match="give a larger --vocab_size$"):
        tokenizer.train_sentencepiece(["hello world"] * 9, 2)
    with pytest.raises(config.Mistake, match="no text to train on$"):
        tokenizer.train_sentencepiece(["", "\n"], 300)
    tok = tokenizer.train_sentencepiece(["hello world"] * 9, 2000)
    found = int(re.search("^only ([0-9]+) of 2,000 tokens were found; the others are never used$",
                          capsys.readouterr().out)[1])
    assert tok.vocab_size == 2000 and sum(t.startswith("<unused_") for t in tok.ids) == 2000 - found


@pytest.mark.parametrize("script", ["text", "tinystories", "fineweb_edu", "cosmopedia", "shakespeare", "hellaswag"])
def test_help_is_true(script):
    said = " ".join(run(f"{script}.py", "-h").stdout.split())
    assert "no effect" not in said and "python prepare/" in said
    assert ("none: the hub" in said) == (script not in ("text", "shakespeare"))


def test_mistakes_are_one_line_and_leave_nothing(tmp_path):
    out = tmp_path / "out"
    jsonl(tmp_path / "body.jsonl", ["x", "y"])
    files = {"broken.jsonl": b'{"text": "a"}\n{"text": ', "cut.json": b'[{"text": "a"}, {"text": "b"}',
             "latin.txt": b"caf\xe9", "torn.txt.gz": gzip.compress(b"some text" * 100)[:-20], "no.txt.gz": b"not gzip",
             "number.json": b"[1]", "empty.txt": b" \n", "picture.png": b"", "no.parquet": b"PAR1"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(config.Mistake, match="0 documents" if name == "empty.txt" else name):
            prepare("--input", tmp_path / name, "--out", out, "--tokenizer=byte")
    cases = [([], "--input takes"), (["--input", tmp_path / "nowhere"], "nowhere"),
             (["--input", tmp_path / "*.tex"], "no such"),
             (["--input", tmp_path / "body.jsonl", "--field=body"], "it has id, text"),
             (["--input", tmp_path / "body.jsonl", "--val_fraction=1"], "val_fraction"),
             *((["--input", tmp_path / "body.jsonl", f"--{key}={value}"], key)
               for key in ("val_fraction", "limit", "workers", "vocab_size") for value in (-1, "nan", "inf", 2**64)),
             (["--input", tmp_path / "body.jsonl", "--limit=0"], "limit"),
             (["--input", tmp_path / "body.jsonl", f"--limit={2**63}"], "limit"),
             (["--input", tmp_path / "body.jsonl", "--separator="], "separator"),
             (["--input", tmp_path / "body.jsonl", "--tokenizer=nowhere"], "nowhere")]
    for arguments, words in cases:
        with pytest.raises(config.Mistake, match=words):
            text.prepare(config.load(text.Settings, [*map(str, arguments), f"--out={out}"]), "text")
    assert "no.parquet" in refusal("text.py", "--input", tmp_path / "no.parquet", "--out", out)
    assert not out.exists()


@pytest.mark.parametrize("script", ["text", "tales", "shakespeare", "hellaswag", "shapes", "coco", "flickr8k", "llava",
                                    "smollm2", "stories15m"])
def test_a_folder_that_holds_something_else_is_refused_untouched(tmp_path, script):
    mine, out = jsonl(tmp_path / "in/train.jsonl", make_documents(20)), tmp_path / "out"
    given = [f"--input={mine}"] * (script not in ("tales", "shapes"))

    def refused(words, **files):
        folder = out / words
        folder.mkdir(parents=True)
        for name, content in files.items():
            (folder / name.replace("_", ".")).write_text(content)
        before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        assert words in refusal(f"{script}.py", *given, "--out", folder)
        assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before

    assert "is a file" in refusal(f"{script}.py", *given, "--out", mine)
    if script in ("smollm2", "stories15m"):
        refused("holds a run that was trained", run_json="{}", config_json="{}")
        refused("holds a data set", meta_json="{}", tokenizer_json="mine")
        return
    refused("holds a model or a run", config_json="{}")
    refused("holds other files", essay="mine", meta_json="{}")
    if given:
        assert "holds the input" in refusal(f"{script}.py", *given, "--out", mine.parent)
        assert [p.name for p in mine.parent.iterdir()] == ["train.jsonl"]


@pytest.mark.parametrize("record, words", [
    ({"conversations": [{"from": "human", "value": "<image> What?"}, {"from": "gpt", "value": "A dog."}]},
     "it has 0 pictures and 1 <image> marks"),
    ({"conversations": [{"from": "gpt", "value": "A dog."}]}, "from human to gpt"),
    ({"conversations": "A dog."}, "record 1"), ({"text": "A dog."}, "one of its texts is empty or no text"),
    ({"image": "gone.png", "instruction": "What?", "output": "A dog."}, "gone.png: there is no such file")])
def test_pictures_without_a_usable_record_are_one_line_and_leave_nothing(tmp_path, record, words):
    (tmp_path / "in.json").write_text(json.dumps([record] * 3))
    done = run("llava.py", "--input", tmp_path / "in.json", "--out", tmp_path / "out", "--val_fraction=0", check=False)
    line = done.stderr.splitlines()[-1]  # after a progress bar
    assert done.returncode == 2 and "no usable record" in line and words in line and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("script", ["tinystories", "fineweb_edu", "cosmopedia", "hellaswag", "shakespeare"])
def test_offline_is_one_clear_line_at_once(tmp_path, script):
    nowhere = dict.fromkeys(("HF_ENDPOINT", "https_proxy", "http_proxy"), "http://127.0.0.1:9")
    (tmp_path / "datasets.py").write_text("raise SystemExit('half a minute of attempts begins')")  # none is made
    line = refusal(f"{script}.py", "--out", tmp_path / "out", PYTHONPATH=str(tmp_path), **nowhere)
    assert "--input" in line and not (tmp_path / "out").exists()
    assert ("hellaswag_val.jsonl" if script == "hellaswag" else "python prepare/tales.py") in line
    assert ("tales.py" in line) == (script != "hellaswag")


def test_certificates_that_python_lacks_are_left_to_the_libraries(monkeypatch):
    def urlopen(error):
        def call(*_, **__):
            raise urllib.error.URLError(error)
        return call
    monkeypatch.setattr(urllib.request, "urlopen", urlopen(ssl.SSLCertVerificationError(1, "self-signed")))
    assert sources.reach_hub("a/b", "x") is None
    monkeypatch.setattr(urllib.request, "urlopen", urlopen("unknown url type: socks5h"))
    assert sources.reach_hub("a/b", "x") is None
    monkeypatch.setattr(urllib.request, "urlopen", urlopen(ConnectionRefusedError(111, "refused")))
    with pytest.raises(config.Mistake, match="cannot reach .* for a/b .*: give files"):
        sources.reach_hub("a/b", "give files")


def test_an_array_that_does_not_fit_leaves_no_file(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError):
        shards.new_array(tmp_path / "a.npy", (9, 9), np.float16)
    assert not [*tmp_path.iterdir()]


def test_a_connection_that_breaks_is_one_line():
    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", "9")
            self.end_headers()
            self.wfile.write(b"half")
    with http.server.HTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        with pytest.raises(config.Mistake, match=r"file.bin \(IncompleteRead.*\): give a file$"):
            sources.download(f"http://127.0.0.1:{server.server_port}/file.bin", "give a file")


@pytest.mark.skipif(sys.platform == "win32", reason="a limit of Unix stands for a full disk")
def test_a_disk_that_fills_up_is_one_line(tmp_path):
    command = [sys.executable, ROOT / "prepare/tales.py", "--stories=3000", "--vocab_size=400", "--out", tmp_path / "a"]
    done = subprocess.run(["sh", "-c", f"ulimit -f 400; exec {shlex.join(map(str, command))}"], capture_output=True,
                          text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == "error: [Errno 27] File too large"


# -- the corpora ------------------------------------------------------------------------------------------------------

def test_shakespeare_is_nanogpts(tmp_path, data):
    file = data / "text/tinyshakespeare.txt"
    run("shakespeare.py", "--input", file, "--out", tmp_path)
    whole, tok = file.read_text(), tokenizer.load(tmp_path)
    train, val = shards.Split(tmp_path, "train"), shards.Split(tmp_path, "val")
    assert (train.tokens, val.tokens, train.vocab_size, tok.bos_id, tok.eos_id) == (1_003_854, 111_540, 65, None, None)
    assert (train.bytes, val.bytes) == (1_003_854, 111_540)
    chars = sorted(set(whole))  # nanoGPT's ids: characters in order
    assert [chars[i] for i in val[:1000]] == list(whole[1_003_854:1_003_854 + 1000])
    assert tok.decode(train[:].tolist()) + tok.decode(val[:].tolist()) == whole


def test_shakespeare_takes_other_files_and_tokenizers(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.txt").write_text(" Who's there?\n\nNay, answer me.\n" * 40)
    jsonl(tmp_path / "in/b.jsonl", ["Long live", "the king!"])
    whole = (tmp_path / "in/a.txt").read_text() + "Long live\n\nthe king!"
    for more, size in (["--tokenizer=byte"], 258), (["--tokenizer=None", "--vocab_size=300"], 300), ([], None):
        run("shakespeare.py", "--input", tmp_path / "in", "--out", tmp_path / "out", "--val_fraction=0.25",
            "--limit=1000", *more)
        tok, train = tokenizer.load(tmp_path / "out"), shards.Split(tmp_path / "out", "train")
        assert tok.vocab_size == (size or len(set(whole[:1000]))) and train.bytes == 750
        assert tok.decode(train[:].tolist()) == whole[:750]
        assert tok.decode(shards.Split(tmp_path / "out", "val")[:].tolist()) == whole[750:1000]
    run("shakespeare.py", "--input", tmp_path / "in/a.txt", tmp_path / "in/b.jsonl", "--out", tmp_path / "out")
    assert tok.vocab_size <= len(set(whole)) == tokenizer.load(tmp_path / "out").vocab_size
    assert sum(shards.Split(tmp_path / "out", s).bytes for s in shards.SPLITS) == len(whole)


@pytest.mark.parametrize("script", ["text", "tinystories", "fineweb_edu", "cosmopedia", "shakespeare", "hellaswag"])
def test_every_script_takes_the_shared_flags(script):
    """And no script has one that does nothing."""
    keys = config.keys_of(f"prepare/{script}.py:Settings")
    shared = {"input", "out", "limit"}
    if script != "hellaswag":
        shared |= {"tokenizer", "vocab_size", "val_fraction", "field"}
        if script != "shakespeare":
            shared |= {"workers", "separator"}
    assert keys.keys() == shared and not any("no effect" in key.why for key in keys.values())
    assert ("none: the hub" in keys["input"].why) == (script not in ("text", "shakespeare"))


def test_tinystories_from_both_kinds_of_files(tmp_path, data):
    head = (data / "text/tinystories_train.txt").read_text().split("<|endoftext|>")[:200]
    (tmp_path / "train.txt").write_text("<|endoftext|>".join(head))
    run("tinystories.py", "--input", tmp_path / "train.txt", "--out", tmp_path / "a", "--workers=1", "--tokenizer",
        data / "tokenizers/llama2_tokenizer.model")
    assert all_documents(tmp_path / "a") == sorted(t.strip() for t in head)
    file = data / "text/tinystories_valid.txt"
    run("tinystories.py", "--input", file, "--out", tmp_path / "b", "--tokenizer=byte", "--limit=50", "--workers=1")
    blocks = file.read_text().split("\n\n")[:50]
    assert all_documents(tmp_path / "b") == sorted(b.strip() for b in blocks)


@pytest.mark.slow
def test_tinystories_has_the_vocabulary_of_the_scout(tmp_path, data):
    run("tinystories.py", "--input", data / "text/tinystories_train.txt", "--out", tmp_path)
    train, val = shards.Split(tmp_path, "train"), shards.Split(tmp_path, "val")
    assert train.vocab_size == 32768 and train.documents + val.documents == 10_266


@pytest.mark.parametrize("script", ["fineweb_edu.py", "cosmopedia.py"])
def test_web_documents(tmp_path, data, script):
    file = data / "text/fineweb_sample.jsonl.gz"
    run(script, "--input", file, "--out", tmp_path, "--tokenizer=byte", "--limit=300", "--workers=1")
    with gzip.open(file) as f:
        texts = [json.loads(line)["text"] for line in f][:300]
    assert all_documents(tmp_path) == sorted(texts) and (tmp_path / "val_000.bin").exists()


def test_hellaswag_raw_and_cleaned_items(tmp_path):
    raw = {"ind": 1, "activity_label": "Health", "ctx_a": "How to rest [title] Lie down. [step] Take a  bed.",
           "ctx_b": "the Bed", "ctx": "unused", "label": "2",
           "endings": ["[substeps] Sleep.", " sing [title] Loud", "rest.", "run"]}
    clean = {"query": "Health: how. [x]", "endings": ["a", "b [c]", "c", "d"], "label": 0, "ctx": "how"}
    wanted = [{"query": "Health: How to rest. Lie down. Take a bed. The bed",
               "endings": [" Sleep.", "sing. Loud", "rest.", "run"], "label": 2},
              {"query": "Health: how. [x]", "endings": ["a", "b [c]", "c", "d"], "label": 0}]
    (tmp_path / "in.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, [raw, clean])).encode()))
    run("hellaswag.py", "--input", tmp_path / "in.jsonl.gz", "--out", tmp_path / "out")
    assert [json.loads(line) for line in (tmp_path / "out/val.jsonl").read_text().splitlines()] == wanted
    for broken in {}, [], raw | {"label": ""}, raw | {"label": 4}, {k: v for k, v in raw.items() if k != "ctx_a"}, \
            clean | {"endings": [1, 2]}, clean | {"query": None}:
        with pytest.raises(ValueError, match="no HellaSwag item"):
            hellaswag.normalise(broken)
        jsonl_lines = [json.dumps(raw), "", json.dumps(broken)]
        (tmp_path / "bad.jsonl").write_text("\n".join(jsonl_lines))
        with pytest.raises(config.Mistake, match=r"bad.jsonl: line 3 \(record 2\): this is no HellaSwag item"):
            list(hellaswag.items([tmp_path / "bad.jsonl"]))


def test_hellaswag_without_items_keeps_the_old_file(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/val.jsonl").write_text("old")
    (tmp_path / "in.json").write_text("[]")
    monkeypatch.setattr(sys, "argv", ["", f"--input={tmp_path / 'in.json'}", f"--out={tmp_path / 'out'}"])
    with pytest.raises(config.Mistake, match="no items"):
        hellaswag.main()
    assert (tmp_path / "out/val.jsonl").read_text() == "old"


def test_hellaswag_whole(tmp_path, data):
    run("hellaswag.py", "--input", data / "text/hellaswag_val.jsonl.gz", "--out", tmp_path)
    items = [json.loads(line) for line in (tmp_path / "val.jsonl").read_text().splitlines()]
    assert len(items) == 10_042 and all(len(i["endings"]) == 4 and 0 <= i["label"] < 4 for i in items)


# -- size and speed ---------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_memory_stays_flat(tmp_path):
    """Ten times the corpus, the same memory: peak of the parent and of its largest worker."""
    peaks = {}
    for millions in 20, 200:
        with open(tmp_path / "in.jsonl", "w") as f:
            draw, words = random.Random(0), [f"word{i}" for i in range(1000)]
            while f.tell() < millions * 1_000_000:
                f.write(json.dumps({"text": " ".join(draw.choices(words, k=300))}) + "\n")
        program = ("import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True)\n"
                   "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)")
        done = subprocess.run([sys.executable, "-c", program, sys.executable, ROOT / "prepare/text.py", "--input",
                               tmp_path / "in.jsonl", "--out", tmp_path / "out", "--tokenizer=byte", "--workers=2"],
                              capture_output=True, text=True, check=True)
        peaks[millions] = int(done.stdout.split()[-1]) / 1024
    assert peaks[200] < peaks[20] * 1.2 + 30 and peaks[200] < 1024, peaks
