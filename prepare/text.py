"""Prepare your own text: python prepare/text.py --input FILES_OR_FOLDER, then python train.py --dataset=text

Reads txt, jsonl, json (each also .gz) and parquet as a stream, so memory does not grow with the corpus; spreads
the tokenizing over processes; goes on after an interruption where it stopped. Neither the processes nor the
interruptions show in the result. Each document gets the tokenizer's BOS before it and EOS after it. Which side of
the split a document falls on is decided by a hash of its text, so a text that comes twice is not on both sides.
A .txt file is one document unless it contains the separator; a file alone is also cut at its blank lines. White space
around the documents of a .txt file is dropped.
The other scripts for text (tinystories, fineweb_edu, cosmopedia) are this one with other settings.
"""
import copy
import glob
import gzip
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import random
import re
import signal
import sys
import threading
import time
import urllib.error
import urllib.request
import zlib
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from any folder
import config  # noqa: E402
from prepare import shards, tokenizer  # noqa: E402

KINDS = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
PIECE = 1 << 20  # characters read at a time; a longer .txt document is cut at a line break
BATCH = 1 << 19  # characters a worker tokenizes at a time
HEAD = 1000  # documents among which at least one validates and one trains, however small the fraction
SAMPLE = 1 << 25  # characters a new tokenizer is trained on
COMMIT_SECONDS = 2  # at most so much work is done again after an interruption


@dataclass
class Settings(shards.Settings):
    """What the scripts for text share."""
    separator: tuple[str, ...] = ("<|endoftext|>",)  # between documents of a .txt file: the first of these it contains
    field: str = "text"  # where a record of jsonl, json or parquet has its text

    def __post_init__(self):
        super().__post_init__()
        self.separator = tuple(s.replace("\\n", "\n") for s in self.separator)  # '\n\n' as a shell passes it
        if not all(self.separator):
            raise ValueError("separator cannot be empty")


def find_files(patterns, out=None):
    """The readable files that files, folders (searched to the bottom, but for hidden files) and globs stand for, each
    once; none that lie in `out`, where the results go."""
    found = []
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            some = sorted(p for p in path.rglob("*") if p.is_file() and p.name.endswith(KINDS)
                          and not any(part.startswith(".") for part in p.relative_to(path).parts))
        elif path.is_file():
            some = [path]
        else:
            some = sorted(p for p in map(Path, glob.glob(pattern, recursive=True)) if p.is_file())
        some = [p for p in some if not out or out.resolve() not in p.resolve().parents]
        if not some:
            raise config.Mistake(f"--input {pattern}: no such file, nor a folder with any of {', '.join(KINDS)}")
        found += some
    for path in found:
        if not path.name.endswith(KINDS):
            raise config.Mistake(f"--input {path}: cannot read this kind of file, only {', '.join(KINDS)}")
    return list(dict.fromkeys(path.resolve() for path in found))


def txt_documents(f, separators):
    """The documents of a text file; which separator it has shows in its first piece."""
    rest = f.read(PIECE)
    separator = next((s for s in separators if s in rest), None)
    while rest:
        more = f.read(PIECE)
        if separator:
            *whole, rest = rest.split(separator)
            yield from whole
        if len(rest) >= PIECE and more:
            cut = rest.rfind("\n") + 1 or len(rest)
            yield rest[:cut]
            rest = rest[cut:]
        if not more:
            yield rest
        rest = rest + more if more else ""


def json_values(f):
    """The elements of a JSON array, or JSON values one after another (as in jsonl), with little of f in memory."""
    decode, gap = json.JSONDecoder().raw_decode, re.compile(r"[\s,\[\]]*")
    text, at, more = f.read(PIECE), 0, True
    array, between = text.lstrip().startswith("["), ""
    while True:
        between = gap.match(text, at).group()
        try:
            value, end = decode(text, at + len(between))
            if end == len(text) and more:
                raise ValueError("may go on")
        except ValueError:
            if not more and at + len(between) == len(text):
                break
            if not more or len(text) > 64 * PIECE:  # broken, rather than cut off where the piece ends
                raise
            chunk = f.read(max(PIECE, len(text) - at))
            text, at, more = text[at:] + chunk, 0, bool(chunk)
            continue
        yield value
        at = end
    if array and "]" not in between:
        raise ValueError("ends before the array does")


def hub_library():
    """The package `datasets`, which only parquet and the hub need."""
    try:
        import datasets
    except ImportError:
        raise config.Mistake("parquet files and the hub need one more package: pip install datasets") from None
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what goes wrong is raised as well
    return datasets


def open_hub(repository, name, split):
    """A split of a data set on the Hugging Face hub as a stream; offline, a `Mistake` at once."""
    address = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:  # `datasets` itself takes half a minute to give up
        urllib.request.urlopen(f"{address}/api/datasets/{repository}", timeout=10).close()
    except urllib.error.HTTPError:
        pass  # it answers; whether it lets us in, `datasets` says better
    except (OSError, ValueError) as e:
        raise config.Mistake(f"cannot reach {address} for {repository} ({e}): give your own files with --input, or "
                             "make data that needs no network with `python prepare/tales.py`") from None
    return hub_library().load_dataset(repository, name, split=split, streaming=True)


def rows_of(columns):
    """The records of one batch that `datasets` read: {column: values} -> {column: value} for each."""
    return [dict(zip(columns, row)) for row in zip(*columns.values())]


def records(path, raw, separators=()):
    """What a file holds, one at a time: documents (txt), JSON values (jsonl, json) or {column: value} (parquet).
    raw: the file opened in binary, whose position shows how much of it has been read."""
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    if kind == "parquet":
        data = hub_library().load_dataset("parquet", data_files=str(path), split="train", streaming=True)
        from pyarrow import parquet  # comes with `datasets`
        size, total, n = path.stat().st_size, parquet.read_metadata(raw).num_rows, 0
        for columns in data.iter(batch_size=256):
            n += len(next(iter(columns.values())))
            raw.seek(size * n // total)  # `datasets` opens the file itself
            yield from rows_of(columns)
        return
    f = io.TextIOWrapper(gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw, "utf-8-sig", newline="")
    if kind == "txt":
        yield from (text.strip() for text in txt_documents(f, separators))
    else:
        yield from json_values(f)


def text_of(record, field):
    """The text of one record: the record itself or its field; lone surrogates, which UTF-8 lacks, become U+FFFD."""
    text = record.get(field, record) if isinstance(record, dict) else record
    if text is None:
        return ""
    if not isinstance(text, str):
        has = f"; it has {', '.join(map(str, text))[:200]}" if isinstance(text, dict) else ""
        raise ValueError(f"a record has no text in its field '{field}'{has}: name the right one with --field")
    return tokenizer.valid(text)


class Files:
    """The documents of files, in order. `position`, [file, documents read of it], can be set before reading."""

    def __init__(self, paths, cfg):
        self.paths, self.field, self.separators, self.position = paths, cfg.field, cfg.separator, [0, 0]
        if len(paths) == 1:  # one book alone would have nothing to validate on
            self.separators += ("\n\n", "\r\n\r\n")
        self.sizes = [path.stat().st_size for path in paths]
        self.raw = None

    def identity(self):
        """What tells these files from others, or from the same ones after a change."""
        return [[str(path), size, path.stat().st_mtime_ns] for path, size in zip(self.paths, self.sizes)]

    def fraction(self):
        """How much has been read, from 0 to 1."""
        now = self.raw.tell() if self.raw and not self.raw.closed else 0
        return min((sum(self.sizes[:self.position[0]]) + now) / max(sum(self.sizes), 1), 1)

    def parts(self):
        """Each file as a source of its own, in an order that has nothing to do with their names."""
        for i in random.Random(0).sample(range(len(self.paths)), len(self.paths)):
            part = copy.copy(self)
            part.paths, part.sizes = [self.paths[i]], [self.sizes[i]]
            yield part

    def __iter__(self):
        first, skip = self.position
        for i, path in list(enumerate(self.paths))[first:]:
            with config.mistakes(OSError, EOFError, ValueError, RecursionError, zlib.error, prefix=f"{path}: "), \
                    open(path, "rb") as self.raw:
                for n, record in enumerate(records(path, self.raw, self.separators), 1):
                    if n > skip:
                        self.position = [i, n]
                        yield text_of(record, self.field)
            self.position, skip = [i + 1, 0], 0


class Hub:
    """The documents of a data set on the Hugging Face hub, streamed. `position` can be set before reading."""

    def __init__(self, repository, name, cfg):
        self.repository, self.name, self.field = repository, name, cfg.field
        self.position = [None, 0, 0]  # state of the stream, documents read since then, and in all
        self.total = None

    def identity(self):
        return [self.repository, self.name]

    def fraction(self):
        return min(self.position[2] / self.total, 1) if self.total else 0

    def parts(self):
        yield self

    def __iter__(self):
        state, skip, before = self.position
        before -= skip
        with config.mistakes(OSError, ValueError, prefix=f"{self.repository}: "):
            data = open_hub(self.repository, self.name, "train")
            self.total = data.info.splits["train"].num_examples if data.info.splits else None
            if state:
                data.load_state_dict(state)
            for columns in data.iter(batch_size=256):
                for n, record in enumerate(rows_of(columns), 1):
                    if n > skip:
                        self.position = [state, n, before + n]
                        yield text_of(record, self.field)
                state, skip, before = data.state_dict(), 0, before + n


def hash_of(text):
    """64 bits that stand for a document."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def documents(source, limit=None):
    """The documents of a source that have any text, at most `limit` of them."""
    return itertools.islice((text for text in source if text and not text.isspace()), limit)


def hold_out(source, cfg):
    """The hash below which a document validates: val_fraction of all hashes, moved if need be so that of the first
    documents at least one validates and one trains."""
    if not cfg.val_fraction:
        return 0
    hashes = {hash_of(text) for text in documents(source, min(HEAD, cfg.limit or HEAD))}
    if len(hashes) < 2:
        raise config.Mistake(f"the input has {len(hashes)} documents, too few to train on some and validate on others: "
                             "--separator='\\n\\n' cuts texts at their blank lines, --val_fraction=0 holds nothing out")
    return min(max(int(cfg.val_fraction * 2**64), min(hashes) + 1), max(hashes))


def new_tokenizer(source, cfg, threshold):
    """The tokenizer that cfg asks for, made from the text. One that is trained sees no validation document."""
    if cfg.tokenizer == "byte":
        return tokenizer.byte()
    if cfg.tokenizer == "char":
        return tokenizer.char(set().union(*documents(source, cfg.limit)), special=("<s>", "</s>"))
    sample, size = [], 0
    parts = [source] if cfg.limit else list(source.parts())
    for part in parts:
        most = min(size + max(SAMPLE // len(parts), PIECE), SAMPLE)
        for text in documents(part, cfg.limit):
            if size >= most:
                break
            if hash_of(text) >= threshold:
                sample.append(text)
                size += len(text)
        if size >= SAMPLE:
            break
    print(f"training a tokenizer of {cfg.vocab_size:,} tokens on {size:,} characters", flush=True)
    return tokenizer.train_sentencepiece(sample, cfg.vocab_size)


def batches(source, limit):
    """(texts, position after them, fraction of the source read) for about half a million characters at a time."""
    texts, size = [], 0
    for text in documents(source, limit):
        texts.append(text)
        size += len(text)
        if size >= BATCH:
            yield texts, source.position, source.fraction()
            texts, size = [], 0
    yield texts, source.position, source.fraction()


worker = {}  # what a worker process needs for each batch, set once when it starts


def start_worker(directory, threshold):
    """Load what `encode` needs. Ctrl-C is left to the parent process; when that is gone, this one ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    worker.update(tok=tokenizer.load(directory), threshold=threshold)


def encode(texts):
    """{split: (ids, UTF-8 bytes, documents)} of the documents that belong there, in order."""
    tok, sides = worker["tok"], {split: [] for split in shards.SPLITS}
    for text in texts:
        sides["val" if hash_of(text) < worker["threshold"] else "train"].append(text)
    bos, eos = tok.bos_id is not None, tok.eos_id not in (None, tok.bos_id)  # one mark is enough if they are the same
    dtype = shards.DTYPES[shards.dtype_of(tok.vocab_size)]
    return {split: (np.fromiter(itertools.chain.from_iterable(tok.encode_batch(some, bos=bos, eos=eos)), dtype),
                    sum(len(text.encode()) for text in some), len(some)) for split, some in sides.items() if some}


def encoded(some_batches, workers, tok, directory, threshold):
    """(encode(texts), len(texts), position, fraction) for each batch, in order; few batches are under way at a time."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    if workers == 1:
        worker.update(tok=tok, threshold=threshold)
        for texts, *place in some_batches:
            yield encode(texts), len(texts), *place
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, start_worker, (directory, threshold)) as pool:
        waiting = deque()
        try:
            for texts, *place in some_batches:
                waiting.append((pool.submit(encode, texts), len(texts), place))
                if len(waiting) > 2 * workers:
                    done, n, place = waiting.popleft()
                    yield done.result(), n, *place
            for done, n, place in waiting:
                yield done.result(), n, *place
        except BrokenProcessPool:
            raise config.Mistake("a worker process was ended from outside, perhaps for lack of memory: "
                                 "the same command goes on from here; fewer --workers need less") from None
        finally:
            pool.shutdown(cancel_futures=True)


def recipe(cfg, source, given=None):
    """Text that changes with anything the result depends on. given: the tokenizer, unless it is made from the text."""
    settings = {k: v for k, v in asdict(cfg).items() if k not in ("input", "out", "workers", "tokenizer")}
    return json.dumps([settings, given.fingerprint if given else cfg.tokenizer, source.identity()])


def write(cfg, out, source):
    """Make the data set `out` of what source() reads, or go on making it; returns its meta.json."""
    from tqdm import tqdm
    reading = source()
    given = None if cfg.tokenizer in (None, "char", "byte") else tokenizer.load(cfg.tokenizer)
    key = recipe(cfg, reading, given)
    state = shards.unfinished(out, key)
    threshold = state["position"]["threshold"] if state else hold_out(source(), cfg)
    tok = given or (tokenizer.load(out) if state else new_tokenizer(source(), cfg, threshold))
    writer = shards.Writer(out, tok, recipe=key)
    at = writer.position or {"documents": 0, "fraction": 0, "source": reading.position}
    reading.position = at["source"]
    if writer.position:
        print(f"{out}: going on after {at['documents']:,} documents")
    workers = cfg.workers or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    left = cfg.limit and cfg.limit - at["documents"]
    begin, last, new = time.monotonic(), time.monotonic(), 0
    style = "{percentage:3.0f}%|{bar:20}| {desc} [{elapsed}<{remaining}]"
    with tqdm(total=1, initial=at["fraction"], bar_format=style) as bar:
        for result, n, position, fraction in encoded(batches(reading, left), workers, tok, out, threshold):
            for split, (ids, n_bytes, n_documents) in result.items():
                writer.add(split, ids, n_bytes, n_documents)
                new += len(ids)
            done = at["documents"] + n
            at = {"documents": done, "fraction": max(fraction, done / cfg.limit if cfg.limit else 0),
                  "source": position, "threshold": threshold}
            now = time.monotonic()
            bar.set_description_str(f"{done:,} documents, {new / (now - begin):,.0f} tokens/s", refresh=False)
            bar.update(at["fraction"] - bar.n)
            if now - last > COMMIT_SECONDS:
                writer.commit(at)
                last = now
    return writer.finish()


def prepare(cfg, name, hub=None):
    """Write data/<name> (or cfg.out) from cfg.input, or from the hub's (repository, configuration)."""
    if not cfg.input and not hub:
        raise config.Mistake("which text? --input takes files, folders and globs of " + ", ".join(KINDS))
    out = Path(cfg.out) if cfg.out else config.ROOT / "data" / name
    try:
        with config.mistakes(OSError):
            meta = write(cfg, out, lambda: Files(find_files(cfg.input, out), cfg) if cfg.input else Hub(*hub, cfg))
    except KeyboardInterrupt:
        raise config.Mistake("interrupted; the same command goes on from here") from None
    for split, counts in meta["splits"].items():
        print(f"{split}: {counts['documents']:,} documents, {counts['tokens']:,} tokens, {counts['bytes']:,} bytes")
    name = out.name if out.resolve().parent == config.ROOT / "data" else out
    print(f"{out} is ready: python train.py --dataset={name}")


def main():
    prepare(config.load(Settings), "text")


if __name__ == "__main__":
    config.run(main)
