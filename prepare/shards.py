"""A data set on disk: shards of token ids and meta.json, written so that a crash costs nothing, and read so that
damage shows.

    data/<name>/train_000.bin, val_000.bin, ...   ids, little-endian uint16 (uint32 for vocabularies over 65,535)
    data/<name>/meta.json                         tokenizer, vocabulary, counts, sha256 of each shard; written last
    data/<name>/progress.json                     only while unfinished: what is safely on disk, and where to go on

A split is one long sequence of ids cut into shards of equal length wherever the cut falls, so the files
depend on the documents alone: not on batches, processes or interruptions.
"""
import bisect
import contextlib
import hashlib
import json
import os
import re
import shlex
from itertools import accumulate
from pathlib import Path

import numpy as np

import config

SPLITS = ("train", "val")
DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
VERIFIED = ".verified.json"  # what the reader found in each shard, so that it hashes a shard once
DATA_FILES = r"((train|val)_\d{3,}\.bin|(meta|progress|\.verified)\.json(\.\d+)?)(\.tmp)?"  # those of a data set here
TOKENIZER_FILES = r"tokenizer\.(json|model)|tokenizer_config\.json"


def dtype_of(vocab_size):
    """The name of the smallest type of DTYPES that holds the ids."""
    return "uint16" if vocab_size <= 65535 else "uint32"


def write_text(path, text):
    """Write a small file so that it is there complete or not at all."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def unfinished(directory, recipe):
    """What progress.json says an interrupted run with the same recipe has safely on disk, or None."""
    try:
        state = json.loads((Path(directory) / "progress.json").read_text(encoding="utf-8"))
        return state if recipe is not None and state["recipe"] == recipe else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


EMPTY = {"tokens": 0, "documents": 0, "bytes": 0, "shards": []}  # a split before anything is written


class _Tail:
    """One split while it is written: finished shards, and the open one under a temporary name.

    done: the split as the progress file has it. Raises OSError where the directory does not hold that much.
    """

    def __init__(self, directory, split, dtype, shard_tokens, done):
        self.directory, self.split, self.dtype, self.shard_tokens = directory, split, dtype, shard_tokens
        self.shards, self.counts = list(done["shards"]), {k: done[k] for k in ("tokens", "documents", "bytes")}
        self.open_tokens = self.counts["tokens"] - sum(s["tokens"] for s in self.shards)
        self.file, self.sha = None, hashlib.sha256()
        for shard in self.shards:
            self._demand(directory / shard["file"], shard["tokens"])
        if self.open_tokens:
            self._reopen()

    def _path(self):
        return self.directory / f"{self.split}_{len(self.shards):03d}.bin"

    def _demand(self, path, tokens):
        """Raise OSError for a file that is missing or has fewer tokens; return their size in bytes."""
        size = tokens * self.dtype.itemsize
        if path.stat().st_size < size:
            raise OSError(f"{path} has lost its end")
        return size

    def _reopen(self):
        """Cut the open shard back to what the progress file vouches for, and hash that."""
        path = self._path()
        temporary = path.with_name(path.name + ".tmp")
        if path.exists() and not temporary.exists():  # it was completed after the last commit
            path.rename(temporary)
        size = self._demand(temporary, self.open_tokens)
        self.file = open(temporary, "r+b")
        while self.file.tell() < size:
            self.sha.update(self.file.read(min(1 << 24, size - self.file.tell())))
        self.file.truncate(size)

    def add(self, ids):
        while len(ids):
            if self.file is None:
                path = self._path()
                self.file = open(path.with_name(path.name + ".tmp"), "wb")
            now, ids = np.split(ids, [self.shard_tokens - self.open_tokens])
            self.file.write(now.data)
            self.sha.update(now.data)
            self.open_tokens += len(now)
            if self.open_tokens == self.shard_tokens:
                self.close_shard()

    def flush(self):
        if self.file is not None:
            self.file.flush()
            os.fsync(self.file.fileno())

    def close_shard(self):
        if self.file is not None:
            self.flush()
            self.file.close()
            os.replace(self.file.name, self._path())
            self.shards.append({"file": self._path().name, "tokens": self.open_tokens, "sha256": self.sha.hexdigest()})
            self.file, self.sha, self.open_tokens = None, hashlib.sha256(), 0

    def state(self):
        return {**self.counts, "shards": self.shards}


class Writer:
    """Writes one data set directory; whatever data set was there before is removed first.

    tok: the tokenizer, saved beside the shards. shard_tokens: ids in each shard but the last.
    recipe: text that stands for everything the result depends on. If an earlier run with the same recipe
    was interrupted, the Writer goes on from its last `commit`, whose argument is then in `.position`
    (None otherwise).
    """

    def __init__(self, directory, tok, shard_tokens=100_000_000, recipe=None):
        self.directory, self.tok, self.recipe = Path(directory), tok, recipe
        self.dtype, self.shard_tokens = dtype_of(tok.vocab_size), shard_tokens
        state = unfinished(directory, recipe)
        try:
            self.tails, self.position = self._open(state["splits"]), state["position"]
        except (OSError, TypeError, KeyError):  # there is nothing to go on from, or it is damaged
            with config.mistakes(OSError):
                self.directory.mkdir(parents=True, exist_ok=True)
                self._clear(f"{DATA_FILES}|{TOKENIZER_FILES}")
                tok.save(self.directory)
            self.tails, self.position = self._open(dict.fromkeys(SPLITS, EMPTY)), None

    def _open(self, splits):
        return {s: _Tail(self.directory, s, DTYPES[self.dtype], self.shard_tokens, splits[s]) for s in SPLITS}

    def _clear(self, pattern, keep=()):
        """Remove what an earlier data set left here (meta.json before its shards), and nothing else."""
        for path in sorted(self.directory.iterdir()):
            if re.fullmatch(pattern, path.name) and path.name not in keep:
                path.unlink()

    def add(self, split, ids, n_bytes, documents=1):
        """Append ids (a sequence of int, or an array) that encode n_bytes of UTF-8 text in so many documents."""
        ids = np.asarray(ids)
        if len(ids) and not 0 <= ids.min() <= ids.max() < self.tok.vocab_size:
            raise ValueError(f"ids from {ids.min()} to {ids.max()} do not fit a vocabulary of {self.tok.vocab_size}")
        tail = self.tails[split]
        tail.add(np.ascontiguousarray(ids, tail.dtype))
        for key, n in ("tokens", len(ids)), ("documents", documents), ("bytes", n_bytes):
            tail.counts[key] += n

    def commit(self, position):
        """Make all that was added survive a crash; position: JSON that tells the caller where to go on."""
        for tail in self.tails.values():
            tail.flush()
        state = {"recipe": self.recipe, "position": position, "splits": {s: t.state() for s, t in self.tails.items()}}
        write_text(self.directory / "progress.json", json.dumps(state))

    def finish(self, floor_bpb=None, **extra):
        """Close the last shards, write meta.json and return it. floor_bpb: {split: exact bits per byte}; extra: more
        for meta.json."""
        for tail in self.tails.values():
            tail.close_shard()
        splits = {s: t.state() | ({"floor_bpb": floor_bpb[s]} if floor_bpb else {}) for s, t in self.tails.items()}
        meta = {"name": self.directory.resolve().name,
                "tokenizer": {"kind": self.tok.kind, "file": "tokenizer.json", "fingerprint": self.tok.fingerprint},
                "vocab_size": self.tok.vocab_size, "dtype": self.dtype, **extra, "splits": splits}
        write_text(self.directory / "meta.json", json.dumps(meta, indent=1) + "\n")
        self._clear(DATA_FILES, {"meta.json"} | {s["file"] for split in splits.values() for s in split["shards"]})
        return meta


def _field(table, key, kind, where):
    """table[key], which must be of this kind; numbers are sizes, so 0 or more and of this world."""
    value = table.get(key) if isinstance(table, dict) else None
    if type(value) is not kind or kind in (int, float) and not 0 <= value < 1 << 48:
        raise config.Mistake(f"{where}: '{key}' is missing or not as it should be; prepare the data again")
    return value


def read_meta(directory):
    """meta.json of a prepared data set; a `Mistake` that names the script to run when there is none."""
    directory = Path(directory)
    path, script = directory / "meta.json", f"prepare/{directory.name}.py"
    if not path.is_file():
        if (directory / "progress.json").is_file():
            raise config.Mistake(f"{directory} is only half prepared: run the same prepare command again, it continues")
        if not (config.ROOT / script).is_file():
            script = f"prepare/text.py --input YOUR_FILES --out {shlex.quote(str(directory))}"
        raise config.Mistake(f"no data in {directory}: run `python {script}` first")
    with config.mistakes(OSError, ValueError, RecursionError, prefix=f"{path} is damaged, prepare the data again: "):
        return json.loads(path.read_text(encoding="utf-8"))


class Split:
    """One split of a prepared data set, as one long sequence of ids: len(split), split[i], split[i:j].

    A slice is an ndarray (uint16 or uint32): a view of the memory-mapped shard, or a copy when it spans several.
    `tokens`, `documents`, `bytes` count what is there; `floor_bpb` is the exact entropy in bits per byte of
    generated text, else None; `vocab_size`, `tokenizer` ({"kind", "file", "fingerprint"}) and `meta` say what ids mean.
    Raises `Mistake` for a missing data set, and by name for a shard that is truncated, altered or has ids
    beyond the vocabulary. Sizes are checked each time; contents once for each file name, size and time.
    """

    def __init__(self, directory, split):
        self.directory, where = Path(directory), f"{directory}/meta.json"
        self.meta = read_meta(directory)
        self.vocab_size = _field(self.meta, "vocab_size", int, where)
        self.tokenizer = _field(self.meta, "tokenizer", dict, where)
        for key in ("kind", "file", "fingerprint"):
            _field(self.tokenizer, key, str, where)
        dtype = DTYPES.get(_field(self.meta, "dtype", str, where))
        if dtype is None:
            raise config.Mistake(f"{where}: dtype should be one of {', '.join(DTYPES)}")
        mine = _field(_field(self.meta, "splits", dict, where), split, dict, where)
        self.tokens, self.documents = _field(mine, "tokens", int, where), _field(mine, "documents", int, where)
        self.bytes = _field(mine, "bytes", int, where)
        self.floor_bpb = _field(mine, "floor_bpb", float, where) if mine.get("floor_bpb") is not None else None
        shards = _field(mine, "shards", list, where)
        lengths = [_field(s, "tokens", int, where) for s in shards]
        if sum(lengths) != self.tokens:
            raise config.Mistake(f"{where}: {split} should have {self.tokens} tokens, its shards have {sum(lengths)}: "
                                 "prepare the data again")
        if not self.tokens:
            raise config.Mistake(f"{directory} has no {split} tokens: prepare it again with another --val_fraction")
        self.starts, self.maps = [0, *accumulate(lengths)], []
        known = _verified(self.directory)
        for shard, length in zip(shards, lengths):
            path, sha = self.directory / _field(shard, "file", str, where), _field(shard, "sha256", str, where)
            with config.mistakes(OSError, ValueError):
                self._check(path, length, dtype, sha, known)
            self.maps.append(np.memmap(path, dtype, "r").view(np.ndarray))

    def _check(self, path, length, dtype, sha, known):
        """Raise `Mistake` unless the shard is the one meta.json describes."""
        if path.parent != self.directory or not length or not path.is_file():
            raise config.Mistake(f"shard {path} is missing: prepare the data again")
        stat = path.stat()
        if stat.st_size != length * dtype.itemsize:
            raise config.Mistake(f"shard {path} is truncated or altered: it has {stat.st_size} bytes "
                                 f"instead of {length * dtype.itemsize}; prepare the data again")
        version = f"{path.name} {stat.st_size} {stat.st_mtime_ns} {sha}"
        if type(known.get(version)) is not int:
            found, known[version] = _contents(path, dtype)
            if found != sha:
                raise config.Mistake(f"shard {path} is altered: its sha256 is not the one in meta.json; prepare again")
            with contextlib.suppress(OSError):  # a read-only data set is hashed each time
                write_text(self.directory / VERIFIED, json.dumps(known))
        if not known[version] < self.vocab_size:
            raise config.Mistake(f"shard {path} has ids up to {known[version]}, beyond the vocabulary of "
                                 f"{self.vocab_size}")

    def __len__(self):
        return self.tokens

    def __getitem__(self, at):
        if not isinstance(at, slice):
            at = range(self.tokens)[at]  # IndexError beyond either end
            return int(self[at:at + 1][0])
        i, j, step = at.indices(self.tokens)
        if step != 1:
            raise ValueError("a split is read in contiguous pieces")
        first = bisect.bisect_right(self.starts, i) - 1
        if j <= self.starts[min(first + 1, len(self.maps))]:  # the usual case: within one shard
            start = self.starts[first]
            return self.maps[min(first, len(self.maps) - 1)][i - start:max(i, j) - start]
        last = bisect.bisect_left(self.starts, j) - 1
        return np.concatenate([self.maps[s][max(i - self.starts[s], 0):j - self.starts[s]]
                               for s in range(first, last + 1)])


def _verified(directory):
    """{"shard size mtime_ns sha256": largest id} of the shards read before; empty if there is no such file."""
    try:
        known = json.loads((directory / VERIFIED).read_text(encoding="utf-8"))
        return known if isinstance(known, dict) else {}
    except (OSError, ValueError, RecursionError):
        return {}


def _contents(path, dtype):
    """(sha256, largest id) of a shard, read once from end to end."""
    from tqdm import tqdm
    sha, largest, size = hashlib.sha256(), 0, path.stat().st_size
    with open(path, "rb") as f, tqdm(total=size, desc=f"checking {path.name}", unit="B", unit_scale=True, leave=False,
                                     disable=size < 1 << 28) as bar:
        while chunk := f.read(1 << 24):
            sha.update(chunk)
            largest = max(largest, int(np.frombuffer(chunk, dtype).max()))
            bar.update(len(chunk))
    return sha.hexdigest(), largest
