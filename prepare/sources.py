"""Where documents come from: files, and data sets on the Hugging Face hub; read as streams that can go on anywhere."""
import copy
import glob
import itertools
import os
import random
import ssl
import urllib.error
import urllib.request
from collections import Counter
from http.client import HTTPException
from pathlib import Path

import config
from prepare.formats import READABLE, format_of, opened, records, text_of

OFFLINE = "give your own files with --input, or make data that needs no network with `python prepare/tales.py`"


# -- which files -------------------------------------------------------------------------------------------------

def why_skipped(path):
    """Why a file in a folder is not read, or None."""
    if not path.is_file():
        return "no file"  # a link that leads nowhere
    if not format_of(path):
        return path.suffix or "without an ending"
    return None if path.stat().st_size else "empty"


def walk(folder, skipped):
    """The files below a folder, sorted, behind links too; each folder once. Counts the hidden ones in `skipped`."""
    def refuse(error):
        raise error
    seen, paths = set(), []
    for top, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        if os.path.realpath(top) in seen:  # a link that leads in a circle, or where another one led
            folders.clear()
            continue
        seen.add(os.path.realpath(top))
        skipped["hidden"] += sum(name.startswith(".") for name in folders + names)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths += [Path(top, name) for name in names if not name.startswith(".")]
    return sorted(paths)


def find_files(patterns, out=None, flag="--input"):
    """The readable files that files, folders (searched to the bottom) and globs stand for, each once, in order.

    Says what it skips; leaves out what lies in `out`, where the results go. Raises `Mistake`, which names the flag, for
    a pattern without any readable file, and for a file of another kind that is named itself; an empty one is skipped.
    """
    files, skipped, said = {}, Counter(), ""  # {real path: path}, {reason: number}
    for pattern in patterns:
        paths, readable = [], 0
        for path in map(Path, [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))):
            if path.is_file() and not format_of(path):
                raise config.Mistake(f"{flag} {path}: cannot read this kind of file, only {READABLE}")
            paths += walk(path, skipped) if path.is_dir() else [path]
        for path in paths:
            real = Path(os.path.realpath(path))  # resolve() raises for a link to itself
            if out and out.resolve() in real.parents:
                continue
            reason = why_skipped(path)
            readable += not reason
            if reason or real in files:
                skipped[reason or "given twice"] += 1
            else:
                files[real] = Path(os.path.abspath(path))
        said = ", ".join(f"{n:,} {reason}" for reason, n in sorted(skipped.items()) if n)
        if not readable and why_skipped(Path(pattern)) != "empty":
            raise config.Mistake(f"{flag} {pattern}: no such file, nor a folder with any of {READABLE}"
                                 + (f"; skipped: {said}" if said else ""))
    if patterns and not files:
        raise config.Mistake(f"{flag} {' '.join(patterns)[:200]}: empty, there is nothing to read")
    if said:
        print(f"files skipped: {said}", flush=True)
    return list(files.values())


# -- sources of documents ----------------------------------------------------------------------------------------

class Source:
    """The documents of what a subclass reads, in order, but for empty ones.

    position: JSON that says how much has been read, to be set before going on: the arguments of `read`, whose last one
    counts the records of the file or data set, and then the number of empty documents.
    """
    separators = ()  # of .txt files, where there are any

    def __iter__(self):
        for position, place, record in self.read(*self.position[:-1]):
            text = text_of(record, self.field, place, before=position[-1] - 1)
            self.position = [*position, self.skipped + (not text.strip())]
            if text.strip():
                yield text

    @property
    def skipped(self):
        return self.position[-1]


class Files(Source):
    """The documents of files. Its position begins with the number of the file and of the records read of it."""

    def __init__(self, paths, separators=(), field=None):
        self.paths, self.field, self.position, self.file = paths, field, [0, 0, 0], None
        formats = [format_of(path)[0] for path in paths]
        self.separators = separators if ".txt" in formats else ()
        if formats == [".txt"]:  # one book alone would have nothing to validate on
            self.separators += ("\n\n",)
        self.sizes = [path.stat().st_size for path in paths]

    def identity(self):
        """What tells these files from others, or from the same ones after a change."""
        return [[str(path), size, path.stat().st_mtime_ns] for path, size in zip(self.paths, self.sizes)]

    def fraction(self):
        """How much has been read, from 0 to 1."""
        here = self.position[0]
        done = 0 if not self.file else self.sizes[here] if self.file.closed else self.file.tell()
        return min((sum(self.sizes[:here]) + done) / max(sum(self.sizes), 1), 1)

    def parts(self):
        """(each file as a source of its own, its share of all bytes), in an order that has nothing to do with names."""
        whole = max(sum(self.sizes), 1)
        for i in random.Random(0).sample(range(len(self.paths)), len(self.paths)):
            part = copy.copy(self)
            part.paths, part.sizes = [self.paths[i]], [self.sizes[i]]
            yield part, self.sizes[i] / whole

    def read(self, first=0, done=0):
        """(position, place, record), from record `done` of file `first` on."""
        for i, path in list(enumerate(self.paths))[first:]:
            with opened(path) as self.file:
                numbered = enumerate(records(self.file, self.separators, self.field), 1)
                for n, (place, record) in itertools.islice(numbered, done, None):
                    yield [i, n], f"{path}: {place}", record
            done = 0


def download(url, otherwise):
    """The bytes at an address. otherwise: what to do without a network, or where the connection breaks."""
    try:
        import certifi  # where Python knows no certificates, as python.org's on macOS
        trusted = ssl.create_default_context()
        trusted.load_verify_locations(certifi.where())
        with urllib.request.urlopen(url, timeout=20, context=trusted) as answer:
            return answer.read()
    except (OSError, HTTPException) as e:
        raise config.Mistake(f"cannot download {url} ({e}): {otherwise}") from None


def reach_hub(repository, otherwise):
    """Raise a `Mistake` at once where the Hugging Face hub does not answer; `datasets` takes half a minute for that.
    otherwise: what to do then."""
    from huggingface_hub import constants
    address = os.environ.get("HF_ENDPOINT", constants.ENDPOINT)
    try:
        urllib.request.urlopen(f"{address}/api/datasets/{repository}", timeout=10).close()
    except urllib.error.HTTPError:
        pass  # it answers; whether it lets us in, `datasets` says better
    except (OSError, ValueError) as e:
        if isinstance(getattr(e, "reason", None), str | ssl.SSLError):
            return  # kinds of proxies and certificates that `datasets` may know better
        raise config.Mistake(f"cannot reach {address} for {repository} ({e}): {otherwise}") from None


def hub_batches(repository, name, split, state=None, otherwise=OFFLINE):
    """(records, state of the stream after them, number of records in all or None) of a data set on the hub, by batches.
    state: where to go on. otherwise: see `reach_hub`. What the libraries raise is a `Mistake`: it is gated, say."""
    reach_hub(repository, otherwise)
    with config.mistakes(Exception, prefix=f"{repository}: "):  # nothing here but calls of `datasets`
        import datasets
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what goes wrong is raised as well
        data = datasets.load_dataset(repository, name, split=split, streaming=True)
        total = data.info.splits[split].num_examples if data.info.splits else None
        if state:
            data.load_state_dict(state)
        for columns in data.iter(batch_size=256):
            yield [dict(zip(columns, row)) for row in zip(*columns.values())], data.state_dict(), total


class Hub(Source):
    """The documents of a data set on the Hugging Face hub, streamed. Its position begins with the state of the stream
    and the numbers of records read since then, and in all."""

    def __init__(self, repository, name, field):
        self.repository, self.name, self.field, self.position = repository, name, field, [None, 0, 0, 0]
        self.total = None

    def identity(self):
        return [self.repository, self.name]

    def fraction(self):
        return min(self.position[2] / self.total, 1) if self.total else 0

    def parts(self):
        yield self, 1

    def read(self, state, done, total):
        """(position, place, record), from record `done` after `state` on."""
        for rows, after, self.total in hub_batches(self.repository, self.name, "train", state):
            for n in range(done, len(rows)):
                total += 1
                yield [state, n + 1, total], f"{self.repository}: row {total}", rows[n]
            state, done = after, 0
