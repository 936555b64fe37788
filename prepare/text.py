"""Prepare your own text: python prepare/text.py --input FILES_OR_FOLDER, then python train.py --dataset=text

Reads txt, jsonl, json (each also .gz, .bz2, .xz, .zst) and parquet as a stream, so memory does not grow with the
corpus; spreads the tokenizing over processes; goes on after an interruption. Neither shows in the result. Each document
gets the tokenizer's BOS before it and EOS after it. Which side of the split it falls on is decided by a hash of its
text, so a text that comes twice is not on both. A .txt file is cut at the separator; where it does not contain it, it
is one document, or, as the only file, is cut at its blank lines. White space around the documents of a .txt file is
dropped, and what is longer than a million characters is cut at a line break. tinystories, fineweb_edu and cosmopedia
are this with other settings.
"""
import hashlib
import itertools
import json
import multiprocessing
import os
import shlex
import signal
import sys
import threading
import time
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from any folder
import config
from prepare import shards, sources, tokenizer

BATCH = 1 << 19  # characters a worker tokenizes at a time
HEAD = 1000  # documents among which at least one validates and one trains, however small the fraction
FEW_TOKENS = 1000  # of validation, below which its loss says little
FEW_DOCUMENTS = 20  # among which a single one may be most of a split
SAMPLE = 1 << 25  # characters a new tokenizer is trained on
SHARE = 1 << 20  # characters of that sample which a file may give at least, however small it is among the others
COMMIT_SECONDS = 2  # at most so much work is done again after an interruption


@dataclass
class Settings:
    """What the scripts for text share."""
    input: tuple[str, ...] = ()  # files, folders or globs of txt, jsonl, json (also packed) and parquet; needed
    out: str | None = None  # folder to write; None: data/<name of the script>, which train.py finds by that name
    tokenizer: str | None = None  # a tokenizer's file or folder, 'byte' or 'char'; None: train a SentencePiece BPE
    vocab_size: int = 32768  # [1, 1048576] tokens of that BPE: a multiple of 128, and ids fit in two bytes
    val_fraction: float = 0.01  # [0, 1) share of the documents held out, picked by a hash of their text
    limit: int | None = None  # [1, inf) stop after this many documents; None: all of them
    workers: int = 0  # [0, 1024] processes that tokenize; 0: one per core
    separator: tuple[str, ...] = ("<|endoftext|>",)  # between documents of a .txt file: the first of these it contains
    field: str = "text"  # where a record of jsonl, json or parquet has its text

    def __post_init__(self):
        for typed, meant in (r"\n", "\n"), (r"\t", "\t"), (r"\r", "\r"), (r"\f", "\f"):  # as a shell passes them
            self.separator = tuple(s.replace(typed, meant) for s in self.separator)
        if not all(self.separator):
            raise ValueError("separator cannot be empty")


def hash_of(text):
    """64 bits that stand for a document."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def threshold_of(hashes, fraction):
    """The hash below which a document validates: this fraction of all hashes, moved if need be so that of the documents
    with these hashes at least one validates and one trains."""
    return min(max(int(fraction * 2**64), min(hashes) + 1), max(hashes))


def finer(separators):
    """Advice to one who has too few documents, cut at these separators."""
    if "\n" in separators or not separators:
        return "give more text"
    return ("--separator='\\n' cuts texts at their lines" if "\n\n" in separators else
            "--separator='\\n\\n' cuts texts at their blank lines")


def threshold_for(source, cfg):
    """The threshold for what a source reads, settled by its first documents; 0 where nothing is to be held out."""
    if not cfg.val_fraction:
        return 0
    hashes = {hash_of(text) for text in itertools.islice(source, min(HEAD, cfg.limit or HEAD))}
    if len(hashes) < 2:
        raise config.Mistake(f"the input has {len(hashes)} documents, too few to train on some and validate on others: "
                             f"{finer(source.separators)}, --val_fraction=0 holds nothing out")
    return threshold_of(hashes, cfg.val_fraction)


def new_tokenizer(source, cfg, threshold):
    """The tokenizer that cfg asks for, made from the text. One that is trained sees no validation document."""
    if cfg.tokenizer == "byte":
        return tokenizer.byte()
    if cfg.tokenizer == "char":
        characters = set(itertools.chain.from_iterable(itertools.islice(source, cfg.limit)))
        return tokenizer.char(characters, special=("<s>", "</s>"))
    sample, size = [], 0
    for part, share in [(source, 1)] if cfg.limit else source.parts():
        most = min(size + max(int(SAMPLE * share), SHARE), SAMPLE)
        for text in itertools.islice(part if size < most else (), cfg.limit):
            if hash_of(text) >= threshold:
                sample.append(text)
                size += len(text)
            if size >= most:
                break
    print(f"training a tokenizer of {cfg.vocab_size:,} tokens on {size:,} characters", flush=True)
    return tokenizer.train_sentencepiece(sample, cfg.vocab_size)


def batches(source, limit):
    """(texts, position after them) for about half a million characters at a time."""
    texts, size = [], 0
    for text in itertools.islice(source, limit):
        texts.append(text)
        size += len(text)
        if size >= BATCH:
            yield texts, source.position
            texts, size = [], 0
    yield texts, source.position


worker = {}  # what a worker process needs for each batch, set once when it starts


def start_worker(directory, threshold):
    """Load what `encode` needs. Ctrl-C is left to the parent process; when that is gone, this one ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    worker.update(tok=tokenizer.load(directory), threshold=threshold)


def encode(texts):
    """{split: (ids, UTF-8 bytes, documents)} of the documents that belong there, in order, each between BOS and EOS. A
    `Mistake` names the document by its beginning."""
    tok, sides, found = worker["tok"], {}, {}
    for text in texts:
        sides.setdefault("val" if hash_of(text) < worker["threshold"] else "train", []).append(text)
    eos = tok.eos_id != tok.bos_id  # one mark is enough if they are the same
    for split, some in sides.items():
        try:
            ids = tok.encode_batch(some, bos=True, eos=eos)
        except config.Mistake:
            for text in some:
                with config.mistakes(config.Mistake, prefix=f"the document that begins {text[:40]!r}: "):
                    tok.encode(text)
            raise
        ids = np.fromiter(itertools.chain.from_iterable(ids), np.uint32)
        found[split] = ids, sum(len(text.encode()) for text in some), len(some)
    return found


def encoded(some_batches, workers, tok, directory, threshold):
    """(encode(texts), len(texts), position after them) for each batch, in order; few are under way at a time."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    if workers == 1:
        worker.update(tok=tok, threshold=threshold)
        yield from ((encode(texts), len(texts), position) for texts, position in some_batches)
        return
    workers = min(workers, 61) if sys.platform == "win32" else workers  # more a ProcessPoolExecutor refuses there
    spawn, waiting = multiprocessing.get_context("spawn"), deque()
    with ProcessPoolExecutor(workers, spawn, start_worker, (directory, threshold)) as pool:
        try:
            for texts, position in some_batches:
                waiting.append((pool.submit(encode, texts), len(texts), position))
                if len(waiting) > 2 * workers:
                    done, *place = waiting.popleft()
                    yield done.result(), *place
            yield from ((done.result(), *place) for done, *place in waiting)
        except BrokenProcessPool:
            raise config.Mistake("a worker process was ended from outside, perhaps for lack of memory: "
                                 "the same command goes on from here; fewer --workers need less") from None
        finally:
            pool.shutdown(cancel_futures=True)


def recipe(cfg, source, given=None):
    """Text that changes with anything the result depends on. given: the tokenizer, unless it is made from the text."""
    settings = {k: v for k, v in asdict(cfg).items() if k not in ("input", "out", "workers", "tokenizer")}
    return json.dumps([settings, given.fingerprint if given else cfg.tokenizer, source.identity()])


def begin(cfg, out, source):
    """(source to read from, writer, state to go on from) of a new data set, or of one that was interrupted.

    state: {"documents": written so far, "source": the position after them, "threshold": see `threshold_for`}.
    """
    reading = source()
    given = None if cfg.tokenizer in (None, "char", "byte") else tokenizer.load(cfg.tokenizer).adding_bos()
    key = recipe(cfg, reading, given)
    if done := shards.unfinished(out, key):
        threshold = done["position"]["threshold"]
        writer = shards.Writer(out, given or tokenizer.load(Path(out) / shards.UNFINISHED), recipe=key)
    else:
        threshold = threshold_for(source(), cfg)
        writer = shards.Writer(out, given or new_tokenizer(source(), cfg, threshold), recipe=key)
    if writer.position:
        print(f"{out}: going on after {writer.position['documents']:,} documents")
    state = writer.position or {"documents": 0, "source": reading.position, "threshold": threshold}
    reading.position = state["source"]
    return reading, writer, state


def write(cfg, out, source):
    """Make the data set `out` of what source() reads, or go on making it; returns its meta.json."""
    reading, writer, state = begin(cfg, out, source)
    workers = cfg.workers or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    some_batches = batches(reading, cfg.limit and cfg.limit - state["documents"])
    start = committed = time.monotonic()
    style, tokens = "{percentage:3.0f}%|{bar:20}| {desc} [{elapsed}<{remaining}]", 0
    with tqdm(total=1, initial=reading.fraction(), bar_format=style) as bar:
        for splits, n, position in encoded(some_batches, workers, writer.tok, writer.work, state["threshold"]):
            for split, (ids, n_bytes, n_documents) in splits.items():
                writer.add(split, ids, n_bytes, n_documents)
                tokens += len(ids)
            done = state["documents"] + n
            state = state | {"documents": done, "source": position}
            fraction = max(reading.fraction(), done / cfg.limit if cfg.limit else 0)
            now = time.monotonic()
            bar.set_description_str(f"{done:,} documents, {tokens / (now - start):,.0f} tokens/s", refresh=False)
            bar.update(fraction - bar.n)
            if now - committed >= COMMIT_SECONDS:
                writer.commit(state)
                committed = now
    return writer.finish(skipped=reading.skipped)


def advice(splits, val_fraction, separators):
    """A line about two splits of which one is too small to train or to validate on, or "".

    splits: {split: {"tokens", "documents"}} as in meta.json, neither of them empty. separators: see `finer`."""
    train, val = splits["train"], splits["val"]
    if FEW_TOKENS <= val["tokens"] <= train["tokens"]:
        return ""
    documents, larger = train["documents"] + val["documents"], "=0.1" if val_fraction < 0.1 else ""
    said = f"only {val['tokens']:,} tokens"
    better = f"{'' if larger else 'a larger '}--val_fraction{larger} holds out more"
    if val["tokens"] > train["tokens"]:
        said = f"more tokens ({val['tokens']:,}) than training ({train['tokens']:,})"
        better = "a smaller --val_fraction holds out less"
    if documents < FEW_DOCUMENTS:
        better = f"there are {documents} documents; {finer(separators)}"
    return f"validation has {said}: {better}"


def name_of(out):
    """What train.py calls a data set: its name under data/, or its path."""
    return out.resolve().name if out.resolve().parent == config.ROOT / "data" else out.as_posix()


def prepare(cfg, name, hub=None):
    """Write data/<name> (or cfg.out) from cfg.input, or from the hub's (repository, configuration)."""
    if not cfg.input and not hub:
        raise config.Mistake(f"which text? --input takes files, folders and globs of {sources.READABLE}")
    out = shards.own_folder(cfg.out or config.ROOT / "data" / name, shards.DATA_FILES, cfg.input)

    def source():
        return sources.Files(paths, cfg.separator, cfg.field) if paths else sources.Hub(*hub, cfg.field)
    try:
        paths = sources.find_files(cfg.input, out)
        meta = write(cfg, out, source)
    except KeyboardInterrupt:
        raise config.Mistake("interrupted; the same command goes on from here") from None
    splits = meta["splits"]
    print(f"{sum(s['documents'] for s in splits.values()):,} documents, {meta['skipped']:,} skipped (without text)")
    for split, counts in splits.items():
        print(f"{split}: {counts['documents']:,} documents, {counts['tokens']:,} tokens, {counts['bytes']:,} bytes")
    if splits["val"]["tokens"] and splits["train"]["tokens"]:
        print(f"{out} is ready: python train.py {shlex.quote(f'--dataset={name_of(out)}')}")
        if said := advice(splits, cfg.val_fraction, source().separators):
            print(f"but {said}")
    else:
        print(f"{out} is ready, but for training there is nothing to validate on: see --val_fraction")


def main():
    prepare(config.load(Settings), "text")


if __name__ == "__main__":
    config.run(main)
