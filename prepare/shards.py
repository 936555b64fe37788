"""A data set on disk: shards of token ids and meta.json, written so that a crash costs nothing, and read so that
damage shows.

    data/<name>/train_000.bin, val_000.bin, ...   ids, little-endian uint16 (uint32 for vocabularies over 65,535)
    data/<name>/train_marks_000.bin, ...          of conversations only: a byte for each id, LEARN, START, both or 0
    data/<name>/meta.json                         tokenizer, vocabulary, counts, sha256 of each shard; written last
    data/<name>/.unfinished/                      only while unfinished: all of this, and progress.json, which says how
                                                  much is safely on disk and where to go on

An earlier data set stays as it is until the new one is complete. A split is one long sequence of ids, cut into shards
of equal length wherever the cut falls. So the files depend on the documents alone: not on batches, processes or
interruptions.
"""
import bisect
import contextlib
import hashlib
import json
import os
import re
import shlex
import shutil
from itertools import accumulate
from pathlib import Path

import numpy as np
from tqdm import tqdm

import config

SPLITS = ("train", "val")
DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
LEARN, START = 1, 2  # marks of an id, which add up: it is to be learned; a conversation begins with it
UNFINISHED = ".unfinished"  # the folder, within that of the data set, where a new one is made
VERIFIED = ".verified.json"  # {"file size mtime sha256": largest id} of the shards read before: each is hashed once
SHARDS = r"(train|val)(_marks)?_\d{3,}\.bin"
TOKENIZER_FILES = r"tokenizer\.(json|model)|tokenizer_config\.json"
DATA_FILES = rf"{SHARDS}|{TOKENIZER_FILES}|(meta|\.verified)\.json(\.\d+\.tmp)?"  # those of a data set here
RUN_FILES = {"config.json", "run.json", "model.safetensors", "checkpoints"}  # what tells a run directory
META = {"vocab_size": int, "dtype": str, "tokenizer": {"kind": str, "file": str, "fingerprint": str}}
META_OF_SPLIT = {"tokens": int, "documents": int, "bytes": int,
                 "shards": [{"file": str, "tokens": int, "sha256": str}]}


def dtype_in(split, name):
    """The type of a split's shards: that of this name in DTYPES, or bytes for marks."""
    return np.dtype("u1") if split.endswith("_marks") else DTYPES.get(name)


def write_text(path, text):
    """Write a small file so that it is there complete or not at all. What UTF-8 lacks, as a file's name may
    have it, is escaped as in JSON."""
    with config.atomic_write(path) as tmp:
        tmp.write_text(text, "utf-8", "backslashreplace")


# -- writing -----------------------------------------------------------------------------------------------------

def new_array(path, shape, dtype):
    """An array of zeros in a new .npy file, to be filled. Its room on the disk is taken at once where that is possible:
    else a full disk ends the process while the array is filled, and is no OSError."""
    array = np.lib.format.open_memmap(path, "w+", dtype, shape)
    array.flush()
    if hasattr(os, "posix_fallocate"):
        try:
            with open(path, "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, os.path.getsize(path))
        except OSError:
            os.unlink(path)
            raise
    return array


def own_folder(out, pattern, inputs=()):
    """The folder `out` to write to, as a Path. Raises `Mistake` where it holds a run, any of the inputs, or files whose
    names do not match the pattern: nothing of others' is lost. Hidden files are left alone."""
    out = Path(out)
    if out.is_file():
        raise config.Mistake(f"--out {out} is a file: choose a folder")
    real, names = out.resolve(), sorted(p.name for p in out.iterdir()) if out.exists() else []
    inside = [str(i) for i in inputs if real in (Path(i).resolve(), *Path(i).resolve().parents)]
    others = [name for name in names if not name.startswith(".") and not re.fullmatch(pattern, name)]
    run = sorted(RUN_FILES & set(names))
    for what, found in ("a model or a run", run), ("the input", inside), ("other files than this data set's", others):
        if found:
            end = found[0] if found is inside else f"({found[0]})"
            raise config.Mistake(f"--out {out} holds {what} {end}: choose another folder")
    return out


def files_in(directory, pattern):
    """The files of a folder whose whole name matches the pattern; meta.json, which vouches for others, is the last."""
    found = [path for path in Path(directory).iterdir() if re.fullmatch(pattern, path.name) and path.is_file()]
    return sorted(found, key=lambda path: (path.name == "meta.json", path.name))


def unfinished(directory, recipe):
    """What progress.json says an interrupted run with the same recipe has safely on disk, or None.

    What that run had already moved to its final place comes back: it is all that lies there without a meta.json."""
    directory, work = Path(directory), Path(directory) / UNFINISHED
    try:
        state = json.loads((work / "progress.json").read_text(encoding="utf-8"))
        if recipe is None or state["recipe"] != recipe:
            return None
        if not (directory / "meta.json").exists():
            for path in files_in(directory, f"{SHARDS}|{TOKENIZER_FILES}"):
                os.replace(path, work / path.name)
        return state if (work / "tokenizer.json").is_file() else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


class Writer:
    """Writes one data set directory; an earlier data set stays there until `finish`.

    tok: the tokenizer, saved beside the shards. shard_tokens: ids in each shard but the last. recipe: text that stands
    for everything the result depends on. If an earlier run with the same recipe was interrupted, the Writer goes on
    from its last `commit`, whose argument is then in `.position` (None otherwise). marked: whether `add` gets marks.
    counts: {split: {"tokens", "documents", "bytes"}} of what was added.
    """

    def __init__(self, directory, tok, shard_tokens=100_000_000, recipe=None, marked=False):
        self.directory, self.work, self.tok = Path(directory), Path(directory) / UNFINISHED, tok
        self.shard_tokens, self.recipe, self.unsafe = shard_tokens, recipe, set()  # unsafe: files not yet flushed
        self.dtype = "uint16" if tok.vocab_size <= 65535 else "uint32"
        progress = unfinished(directory, recipe)
        try:
            self.counts, self.position = progress["splits"], progress["position"]
            self._cut_back()
        except (OSError, ValueError, TypeError, KeyError):  # there is nothing to go on from, or it is damaged
            shutil.rmtree(self.work, ignore_errors=True)
            self.work.mkdir(parents=True)
            if not (self.directory / "meta.json").exists():  # what is left there is no data set
                self._clear()
            tok.save(self.work)
            splits = [*SPLITS, *(f"{split}_marks" for split in SPLITS if marked)]
            self.counts, self.position = {s: {"tokens": 0, "documents": 0, "bytes": 0} for s in splits}, None

    def _cut_back(self):
        """Cut files back to what was there at the last commit; OSError where they hold less."""
        for path, counted, size in self._sizes():
            if size < counted:
                raise OSError(f"{path} has lost its end")
            os.truncate(path, counted)

    def _clear(self):
        """Remove the earlier data set, and nothing else."""
        for path in files_in(self.directory, DATA_FILES):
            path.unlink()

    def _path(self, split, number):
        return self.work / f"{split}_{number:03d}.bin"

    def _shards(self, split):
        """(path, tokens) of each shard."""
        full, rest = divmod(self.counts[split]["tokens"], self.shard_tokens)
        return [(self._path(split, i), n) for i, n in enumerate([self.shard_tokens] * full + [rest] * (rest > 0))]

    def _sizes(self):
        """(path, bytes that were counted, bytes that it has) of each shard of all splits."""
        return [(path, tokens * dtype_in(split, self.dtype).itemsize, path.stat().st_size)
                for split in self.counts for path, tokens in self._shards(split)]

    def _append(self, split, ids):
        """Add ids, or marks, to the last shard, and to new ones."""
        ids = np.ascontiguousarray(ids, dtype_in(split, self.dtype))
        while len(ids):
            number, tokens = divmod(self.counts[split]["tokens"], self.shard_tokens)
            path = self._path(split, number)
            now, ids = np.split(ids, [self.shard_tokens - tokens])
            with open(path, "ab" if tokens else "wb") as file:
                file.write(now.data)
            self.unsafe.add(path)
            self.counts[split]["tokens"] += len(now)

    def add(self, split, ids, n_bytes, documents=1, marks=None):
        """Append ids (a sequence of int, or an array) that encode n_bytes of UTF-8 text in so many documents.

        marks: an array of uint8 of the same length."""
        ids = np.asarray(ids)
        if len(ids) and not 0 <= ids.min() <= ids.max() < self.tok.vocab_size:
            raise ValueError(f"ids from {ids.min()} to {ids.max()} do not fit a vocabulary of {self.tok.vocab_size}")
        self._append(split, ids)
        self.counts[split]["documents"] += documents
        self.counts[split]["bytes"] += n_bytes
        if marks is not None:
            self._append(f"{split}_marks", marks)

    def _flush(self):
        """Make what was added survive a crash."""
        while self.unsafe:
            with open(self.unsafe.pop(), "ab") as file:
                os.fsync(file.fileno())

    def commit(self, position):
        """Make all that was added survive a crash; position: JSON that tells the caller where to go on."""
        self._flush()
        progress = {"recipe": self.recipe, "position": position, "splits": self.counts}
        write_text(self.work / "progress.json", json.dumps(progress))

    def finish(self, floor_bpb=None, **extra):
        """Write meta.json and return it. floor_bpb: {split: exact bits per byte}; extra: more for meta.json."""
        self._flush()
        if any(size != counted for _, counted, size in self._sizes()):
            (self.work / "progress.json").unlink(missing_ok=True)  # there is nothing to go on from
            raise config.Mistake(f"another process writes to {self.directory} too: run one of them, from the beginning")
        splits = {}
        for split, counts in self.counts.items():
            shards = tqdm(self._shards(split), f"hashing {split}", unit="shard", leave=False, delay=1)  # seconds
            shards = [{"file": path.name, "tokens": tokens, "sha256": _contents(path, dtype_in(split, self.dtype))[0]}
                      for path, tokens in shards]
            splits[split] = counts | {"shards": shards} | ({"floor_bpb": floor_bpb[split]} if floor_bpb else {})
        meta = {"name": self.directory.resolve().name,
                "tokenizer": {"kind": self.tok.kind, "file": "tokenizer.json", "fingerprint": self.tok.fingerprint},
                "vocab_size": self.tok.vocab_size, "dtype": self.dtype, **extra, "splits": splits}
        shards = {shard["file"] for split in splits.values() for shard in split["shards"]}
        self._clear()
        for path in files_in(self.work, f"{SHARDS}|{TOKENIZER_FILES}"):
            if path.name in shards or not re.fullmatch(SHARDS, path.name):  # not what came after the last commit
                os.replace(path, self.directory / path.name)
        write_text(self.directory / "meta.json", json.dumps(meta, indent=1) + "\n")
        shutil.rmtree(self.work)
        return meta


# -- reading -----------------------------------------------------------------------------------------------------

def _require(value, form, where):
    """Raise `Mistake` unless JSON has this form: a type, [the form of each element] or {key: form}. Numbers are sizes.
    """
    if isinstance(form, dict) and isinstance(value, dict):
        for key in form:
            _require(value.get(key), form[key], f"{where}: {key}")
    elif isinstance(form, list) and isinstance(value, list):
        for element in value:
            _require(element, form[0], where)
    elif type(value) is not form or form is not str and not 0 <= value < 1 << 48:
        raise config.Mistake(f"{where} is missing or not as it should be; prepare the data again")


def how_to_make(directory, otherwise):
    """What to do about a data set that is missing: run the script, or see the config file, of its name; `otherwise`
    where there is neither."""
    script, commands = (f"{folder}/{Path(directory).name}.py" for folder in ("prepare", "config"))
    if (config.ROOT / script).is_file():
        return f"run `python {script}` first"
    path = config.ROOT / commands
    found = path.is_file() and f'dataset = "{Path(directory).name}"' in path.read_text(encoding="utf-8")
    return f"{commands} begins with the commands that make it" if found else otherwise


def read_meta(directory):
    """meta.json of a prepared data set; a `Mistake` that says how to make it when there is none."""
    directory = Path(directory)
    path = directory / "meta.json"
    if not path.is_file():
        if (directory / UNFINISHED).is_dir():
            again = ", it continues" if (directory / UNFINISHED / "progress.json").is_file() else ""
            raise config.Mistake(f"{directory} is only half prepared: run the same prepare command again{again}")
        own = f"run `python prepare/text.py --input YOUR_FILES --out {shlex.quote(str(directory))}` first"
        raise config.Mistake(f"no data in {directory}: {how_to_make(directory, own)}")
    with config.mistakes(OSError, ValueError, RecursionError, prefix=f"{path} is damaged, prepare the data again: "):
        return json.loads(path.read_text(encoding="utf-8"))


class Split:
    """One split of a prepared data set, as one long sequence of ids: len(split), split[i], split[i:j].

    A slice is an ndarray (uint16 or uint32): a view of the memory-mapped shard, or a copy when it spans several.
    `tokens`, `documents`, `bytes` count what is there; `floor_bpb` is the exact entropy in bits per byte of
    generated text, else None; `vocab_size`, `tokenizer` ({"kind", "file", "fingerprint"}) and `meta` say what ids mean.
    `largest`: the largest id. `marks`: those of conversations, as another Split, else None. Raises `Mistake` for a
    missing data set, and by name for a shard that is truncated, altered or has ids beyond the vocabulary.
    """

    def __init__(self, directory, split):
        self.directory, self.meta, where = Path(directory), read_meta(directory), f"{directory}/meta.json"
        _require(self.meta, META | {"splits": {split: META_OF_SPLIT}}, where)
        self.vocab_size, self.tokenizer = self.meta["vocab_size"], self.meta["tokenizer"]
        entry, dtype = self.meta["splits"][split], dtype_in(split, self.meta["dtype"])
        self.tokens, self.documents, self.bytes = entry["tokens"], entry["documents"], entry["bytes"]
        self.floor_bpb = entry.get("floor_bpb")
        if self.floor_bpb is not None:
            _require(self.floor_bpb, float, f"{where}: floor_bpb")
        if dtype is None:
            raise config.Mistake(f"{where}: dtype should be one of {', '.join(DTYPES)}")
        self.starts = [0, *accumulate(shard["tokens"] for shard in entry["shards"])]
        if self.starts[-1] != self.tokens:
            raise config.Mistake(f"{where}: {split} should have {self.tokens} tokens, its shards have "
                                 f"{self.starts[-1]}: prepare the data again")
        if not self.tokens:
            raise config.Mistake(f"{directory} has no {split} tokens: prepare it again with another --val_fraction")
        verified, self.maps, self.largest = _verified(self.directory), [], 0
        for shard in tqdm(entry["shards"], f"checking {directory}", unit="shard", leave=False, delay=1):  # seconds
            path = self.directory / shard["file"]
            with config.mistakes(OSError, ValueError):
                self._check(path, shard, dtype, verified)
            self.maps.append(np.memmap(path, dtype, "r").view(np.ndarray))
        self.marks = Split(directory, f"{split}_marks") if f"{split}_marks" in self.meta["splits"] else None
        if self.marks and len(self.marks) != len(self):
            raise config.Mistake(f"{where}: {len(self)} {split} tokens have {len(self.marks)} marks: prepare again")

    def _check(self, path, shard, dtype, verified):
        """Raise `Mistake` unless the file is the shard that meta.json describes."""
        if path.parent != self.directory or not shard["tokens"] or not path.is_file():
            raise config.Mistake(f"shard {path} is missing: prepare the data again")
        stat, size = path.stat(), shard["tokens"] * dtype.itemsize
        if stat.st_size != size:
            raise config.Mistake(f"shard {path} is truncated or altered: it has {stat.st_size} bytes "
                                 f"instead of {size}; prepare the data again")
        version = f"{path.name} {size} {stat.st_mtime_ns} {shard['sha256']}"
        if type(verified.get(version)) is not int:
            sha256, verified[version] = _contents(path, dtype)
            if sha256 != shard["sha256"]:
                raise config.Mistake(f"shard {path} is altered: its sha256 is not the one in meta.json; prepare again")
            with contextlib.suppress(OSError):  # a read-only data set is hashed each time
                write_text(self.directory / VERIFIED, json.dumps(verified))
        self.largest = max(self.largest, verified[version])
        if verified[version] >= self.vocab_size:
            raise config.Mistake(f"shard {path} has ids up to {verified[version]}, beyond the vocabulary of "
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
        first = min(bisect.bisect_right(self.starts, i), len(self.maps)) - 1  # the shard of i, and the one after j's
        end = max(bisect.bisect_left(self.starts, j), first + 1)
        parts = [self.maps[s][max(i - self.starts[s], 0):max(j - self.starts[s], 0)] for s in range(first, end)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _verified(directory):
    """What the file VERIFIED says; {} where it is missing or damaged."""
    try:
        verified = json.loads((directory / VERIFIED).read_text(encoding="utf-8"))
        return verified if isinstance(verified, dict) else {}
    except (OSError, ValueError, RecursionError):
        return {}


def _contents(path, dtype):
    """(sha256, largest id) of a shard, read once from end to end."""
    sha, largest = hashlib.sha256(), 0
    with open(path, "rb") as f:
        while chunk := f.read(1 << 24):
            sha.update(chunk)
            largest = max(largest, int(np.frombuffer(chunk, dtype).max()))
    return sha.hexdigest(), largest
