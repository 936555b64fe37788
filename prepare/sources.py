"""Where documents come from: files of txt, JSON and parquet, packed or not, and data sets on the Hugging Face hub.

All is read as a stream. What is read depends on the files alone, not on where a buffer ends, and an error names the
file and the line. txt and JSON are read here, not by `datasets`, because a text has to come back to the character: its
"text" turns CR LF into LF and keeps the byte order mark; its "json" makes a date of a text that looks like one, refuses
half a surrogate pair, holds a whole array in memory, and counts lines from the start of a block.
"""
import bz2
import codecs
import contextlib
import copy
import glob
import gzip
import itertools
import json
import lzma
import os
import random
import re
import urllib.error
import urllib.request
import zlib
from collections import Counter
from pathlib import Path

import config
from prepare import tokenizer

READABLE = "txt, jsonl, json (each also .gz, .bz2, .xz, .zst) and parquet"
KINDS = (".txt", ".jsonl", ".json", ".parquet")
MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
         codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}  # in this order: one begins with another
PIECE = 1 << 20  # bytes read at a time
LONGEST = 1 << 20  # characters of a .txt document; longer ones are cut: a file without separators must fit in memory
EDGE = 32  # characters at the end of a buffer that may look wrong for want of more: \uXXXX, -Infinity, 1.5e+300


def open_zst(file):
    """What was packed into a file by Zstandard. pyarrow comes with `datasets`."""
    import pyarrow
    return pyarrow.CompressedInputStream(file, "zstd")


PACKED = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": open_zst}


# -- which files -------------------------------------------------------------------------------------------------

def kind_of(path):
    """(one of KINDS, one of PACKED or "") from a file's name, in whatever case; None for a file that cannot be read."""
    endings = ["", *(ending.lower() for ending in path.suffixes)]
    packed = endings.pop() if endings[-1] in PACKED else ""
    kind = endings[-1]
    return (kind, packed) if kind in KINDS and not (packed and kind == ".parquet") else None


def why_skipped(path):
    """Why a file in a folder is not read, or None."""
    if not path.is_file():
        return "no file"  # a link that leads nowhere
    if not kind_of(path):
        return path.suffix or "without an ending"
    return None if path.stat().st_size else "empty"


def walk(folder, skipped):
    """The files below a folder, sorted, behind links too; each folder once. Counts the hidden ones in `skipped`."""
    def refuse(error):
        raise error
    seen, found = set(), []
    for top, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        if os.path.realpath(top) in seen:  # a link that leads in a circle, or where another one led
            folders.clear()
            continue
        seen.add(os.path.realpath(top))
        skipped["hidden"] += sum(name.startswith(".") for name in folders + names)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(top, name) for name in names if not name.startswith(".")]
    return sorted(found)


def find_files(patterns, out=None):
    """The readable files that files, folders (searched to the bottom) and globs stand for, each once, in order.

    Says what it skips; leaves out what lies in `out`, where the results go. Raises `Mistake` for a pattern without any
    readable file, and for a file of another kind that is named itself.
    """
    found, skipped = {}, Counter()
    for pattern in patterns:
        paths, readable = [], 0
        for path in map(Path, [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))):
            if path.is_file() and not kind_of(path):
                raise config.Mistake(f"--input {path}: cannot read this kind of file, only {READABLE}")
            paths += walk(path, skipped) if path.is_dir() else [path]
        for path in paths:
            real = Path(os.path.realpath(path))  # resolve() raises for a link to itself
            if out and out.resolve() in real.parents:
                continue
            why = why_skipped(path)
            readable += not why
            if why or real in found:
                skipped[why or "given twice"] += 1
            else:
                found[real] = Path(os.path.abspath(path))
        reasons = ", ".join(f"{n:,} {why}" for why, n in sorted(skipped.items()) if n)
        if not readable:
            raise config.Mistake(f"--input {pattern}: no such file, nor a folder with any of {READABLE}"
                                 + f"; skipped: {reasons}" * bool(reasons))
    if skipped.total():
        print(f"files skipped: {reasons}", flush=True)
    return list(found.values())


@contextlib.contextmanager
def opened(path):
    """The file, to be read in binary; whatever shows to be wrong with it is a `Mistake` that names it."""
    with config.mistakes(OSError, ValueError, NotImplementedError, prefix=f"{path}: "), open(path, "rb") as file:
        yield file


# -- what a file holds: text -------------------------------------------------------------------------------------

def text_of_file(file, packed=""):
    """The text of a file opened in binary, piece by piece, none of them empty: UTF-8, or UTF-16 and UTF-32 that begin
    with their byte order mark. Raises ValueError with line and byte for anything else, and for a damaged archive."""
    line, size = 1, 0
    try:
        stream = PACKED[packed](file) if packed else file
        data = stream.read(4)
        if [byte == 0 for byte in data] in ([False, True] * 2, [True, False] * 2):
            raise ValueError("this is UTF-16 without its byte order mark; save it as UTF-8")
        encoding = next((name for mark, name in MARKS.items() if data.startswith(mark)), "utf-8")
        decoder, last = codecs.getincrementaldecoder(encoding)(), False
        while not last:
            last = not data
            size += len(data)
            text = decoder.decode(data, last)
            line += text.count("\n")
            if text:
                yield text
            data = stream.read1(PIECE)  # unlike `read` it loses nothing that comes before a damage
    except UnicodeDecodeError as e:
        text = e.object[:e.start].decode(e.encoding, "ignore")
        if text:
            yield text
        line += text.count("\n")
        at = size - len(e.object) + e.start + 1
        raise ValueError(f"line {line}, byte {at}: not {encoding.upper()} ({e.reason}); save it as UTF-8") from None
    except (EOFError, OSError, zlib.error, lzma.LZMAError) as e:
        raise ValueError(f"damaged after line {line}: {e}") from None


def separator_of(pieces, separators):
    """The first of the separators that a text contains, as a pattern; one that matches nothing where there is none.

    A line in a separator may also end with CR LF. A CR at its very beginning is left to the document before, which
    loses white space at its end: the search is ten times as fast.
    """
    patterns = [re.compile(re.escape(s).replace("\\\n", "\r?\n").removeprefix("\r?")) for s in separators]
    first, before = len(patterns), ""
    for piece in pieces:
        text = before + piece
        first = next((i for i, pattern in enumerate(patterns[:first]) if pattern.search(text)), first)
        if first == 0:
            break
        before = text[-2 * max(map(len, separators)):]  # a separator may lie across two pieces
    return [*patterns, re.compile("(?!)")][first]


def cut(text, slack=0):
    """A document in parts of at most LONGEST characters (the last: + slack), which end with a line where they can."""
    while len(text) > LONGEST + slack:
        end = text.rfind("\n", 0, LONGEST) + 1 or LONGEST
        yield text[:end]
        text = text[end:]
    yield text


def txt_documents(pieces, separator):
    """What lies between separators, without white space around it; nothing for white space after the last one."""
    text, slack = "", len(separator.pattern)  # whatever separator begins within LONGEST characters is then seen whole
    for piece in pieces:
        *whole, text = separator.split(text + piece)
        *parts, text = cut(text, slack)
        for document in itertools.chain(*map(cut, whole), parts):
            yield document.strip()
    yield from filter(None, map(str.strip, cut(text)))


# -- what a file holds: records ----------------------------------------------------------------------------------

def take(pieces, n):
    """(the next n characters or some more, fewer only at the end; the pieces after them, which may raise at once)"""
    def fail(error):
        raise error
        yield

    text = next(pieces, "")
    try:
        while len(text) < n and (piece := next(pieces, "")):
            text += piece
    except ValueError as e:  # what comes before is used first
        pieces = fail(e)
    return text, pieces


def json_values(pieces):
    """(place, value) of the elements of a JSON array, or of JSON values one after another, as in jsonl.

    place: "line 7 (record 5)". Commas may be missing between values, and one may follow the last value.
    """
    decode, gap = json.JSONDecoder().raw_decode, re.compile(r"\s*,?\s*")
    text, last, record = "", False, 0
    while not text.strip() and (piece := next(pieces, "")):
        text += piece
    array = text.lstrip().startswith("[")
    at = text.index("[") + 1 if array else 0  # what stands before it is done with
    line = 1 + text.count("\n", 0, at)
    while True:
        start = gap.match(text, at).end()
        if array and text.startswith("]", start):
            break
        wrong = ""
        try:
            value, end = decode(text, start)
        except json.JSONDecodeError as e:
            wrong, end = e.msg, e.pos
        except (ValueError, RecursionError) as e:  # a number of thousands of digits, or lists in lists in lists
            wrong, end = str(e), start
        near_edge = len(text) - end < EDGE and (wrong or isinstance(value, int | float))  # others have a last character
        if not last and (near_edge or wrong.startswith("Unterminated string")):
            more, pieces = take(pieces, len(text) - at)  # twice as much each time: long values are not read often
            text, at, last = text[at:] + more, 0, not more
            continue
        line += text.count("\n", at, start)
        if start == len(text):
            break
        record += 1
        if wrong:
            line += text.count("\n", start, end)
            raise ValueError(f"line {line} (record {record}): {wrong} at {text[end:end + 20]!r}")
        yield f"line {line} (record {record})", value
        line += text.count("\n", start, end)
        at = end
    if array and start == len(text):
        raise ValueError(f"line {line} (record {record + 1}): the file ends before its list does")
    if array and (text[start + 1:].strip() or any(map(str.strip, pieces))):
        raise ValueError(f"line {line} (record {record + 1}): something follows after the list")


def parquet_rows(file, field):
    """(place, {column: value}) of the rows of a parquet file, of the column `field` alone if there is one."""
    from pyarrow import parquet
    with parquet.ParquetFile(file.name) as table:
        columns, n = [field] if field in table.schema_arrow.names else None, 0
        for batch in table.iter_batches(256, columns=columns):
            for i in range(len(batch)):
                n += 1
                with config.mistakes(UnicodeDecodeError, prefix=f"{file.name}: row {n}: "):
                    row = [column[i].as_py() for column in batch.columns]
                yield f"row {n}", dict(zip(batch.schema.names, row))
            file.seek(os.path.getsize(file.name) * n // table.metadata.num_rows)  # pyarrow has opened it for itself


def records(file, separators=(), field=None):
    """(place, record) of what a file opened in binary holds: a text (txt), a value (json), {column: value} (parquet).

    field: the one column of parquet to read, None for all. The file's position shows how much of it has been read.
    Raises ValueError, OSError or NotImplementedError where the file is not what its name says: see `opened`.
    """
    kind, packed = kind_of(Path(file.name))
    if kind == ".parquet":
        yield from parquet_rows(file, field)
    elif kind == ".txt":
        with open(file.name, "rb") as same:
            separator = separator_of(text_of_file(same, packed), separators)
        for n, text in enumerate(txt_documents(text_of_file(file, packed), separator), 1):
            yield f"document {n}", text
    else:
        yield from json_values(text_of_file(file, packed))


def text_of(record, field, place):
    """The text of a record: the record itself or its field; lone surrogates, which UTF-8 lacks, become U+FFFD."""
    if isinstance(record, dict):
        if field not in record:
            raise config.Mistake(f"{place}: a record has no field '{field}'; it has {', '.join(record)[:200]}: name "
                                 "the right one with --field; records should stand in a list, or one a line")
        record = record[field]
    if not isinstance(record, str | None):
        raise config.Mistake(f"{place}: a text is a string, not {str(record)[:40]} ({type(record).__name__}); if "
                             "another field holds it, name that with --field")
    return tokenizer.valid(record or "")


# -- sources of documents ----------------------------------------------------------------------------------------

class Source:
    """The documents of what a subclass reads, in order, but for empty ones.

    position: JSON that says how much has been read, to be set before going on; its last number counts the empty ones.
    """

    def __iter__(self):
        empty = self.position[-1]
        for position, place, record in self.read(*self.position[:-1]):
            text = text_of(record, self.field, place)
            blank = not text or text.isspace()
            empty += blank
            self.position = [*position, empty]
            if not blank:
                yield text

    @property
    def skipped(self):
        return self.position[-1]


class Files(Source):
    """The documents of files. Its position begins with the number of the file and of the records read of it."""

    def __init__(self, paths, separators, field):
        self.paths, self.separators, self.field, self.position = paths, separators, field, [0, 0, 0]
        if len(paths) == 1:  # one book alone would have nothing to validate on
            self.separators += ("\n\n",)
        self.sizes = [path.stat().st_size for path in paths]
        self.file = None

    def identity(self):
        """What tells these files from others, or from the same ones after a change."""
        return [[str(path), size, path.stat().st_mtime_ns] for path, size in zip(self.paths, self.sizes)]

    def fraction(self):
        """How much has been read, from 0 to 1."""
        now = 0 if not self.file else self.sizes[self.position[0]] if self.file.closed else self.file.tell()
        return min((sum(self.sizes[:self.position[0]]) + now) / max(sum(self.sizes), 1), 1)

    def parts(self):
        """Each file as a source of its own, in an order that has nothing to do with their names."""
        for i in random.Random(0).sample(range(len(self.paths)), len(self.paths)):
            part = copy.copy(self)
            part.paths, part.sizes = [self.paths[i]], [self.sizes[i]]
            yield part

    def read(self, first, done):
        """(position, place, record), from record `done` of file `first` on."""
        for i, path in list(enumerate(self.paths))[first:]:
            with opened(path) as self.file:
                everything = enumerate(records(self.file, self.separators, self.field), 1)
                for n, (place, record) in itertools.islice(everything, done, None):
                    yield [i, n], f"{path}: {place}", record
            done = 0


def reach_hub(repository):
    """Raise a `Mistake` at once where the Hugging Face hub does not answer; `datasets` takes half a minute for that."""
    from huggingface_hub import constants
    address = os.environ.get("HF_ENDPOINT", constants.ENDPOINT)
    try:
        urllib.request.urlopen(f"{address}/api/datasets/{repository}", timeout=10).close()
    except urllib.error.HTTPError:
        pass  # it answers; whether it lets us in, `datasets` says better
    except (OSError, ValueError) as e:
        raise config.Mistake(f"cannot reach {address} for {repository} ({e}): give your own files with --input, or "
                             "make data that needs no network with `python prepare/tales.py`") from None


def hub_batches(repository, name, split, state=None):
    """(records, state of the stream after them, number of records in all or None) of a data set on the hub, by batches.

    state: where to go on. Whatever the libraries raise, for a missing or a gated data set say, is a `Mistake`.
    """
    reach_hub(repository)
    with config.mistakes(Exception, prefix=f"{repository}: "):  # nothing here but calls of `datasets`
        import datasets
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what goes wrong is raised as well
        data = datasets.load_dataset(repository, name, split=split, streaming=True)
        total = data.info.splits[split].num_examples if data.info.splits else None
        if state:
            data.load_state_dict(state)
        for columns in data.iter(batch_size=256):
            records = [dict(zip(columns, row)) for row in zip(*columns.values())]
            yield records, data.state_dict(), total


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
        yield self

    def read(self, state, done, total):
        """(position, place, record), from record `done` after `state` on."""
        for rows, after, self.total in hub_batches(self.repository, self.name, "train", state):
            for n in range(done, len(rows)):
                total += 1
                yield [state, n + 1, total], f"{self.repository}: row {total}", rows[n]
            state, done = after, 0
