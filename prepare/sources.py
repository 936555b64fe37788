"""Where documents come from: files of txt, JSON and parquet, compressed or not, and data sets on the Hugging Face hub.

All is read as a stream. What is read depends on the files alone, not on where a buffer ends; each error names the file
and the line. txt and JSON are read here and not by `datasets` because text has to come back to the character: its
"text" turns \\r\\n into \\n and keeps the byte order mark; its "json" makes a date of a text that looks like one, refuses
half a surrogate pair, holds a whole array in memory, and counts lines from the start of a block. Parquet is pyarrow's,
the hub is `datasets`'.
"""
import bz2
import codecs
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

KINDS = (".txt", ".jsonl", ".json", ".parquet")
READABLE = "txt, jsonl, json (each also .gz, .bz2, .xz, .zst) and parquet"
MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
         codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}  # in this order: one begins with another
PIECE = 1 << 20  # bytes read at a time
LONGEST = 1 << 20  # characters of a .txt document; a longer one is cut, so that a file without separators fits in memory
EDGE = 32  # what ends so near the end of what has been read may look different with more: \uXXXX, -Infinity, 1.5e+300


def open_zst(raw):
    """The bytes in a file that Zstandard packed; `pyarrow` comes with `datasets`."""
    import pyarrow
    return pyarrow.CompressedInputStream(raw, "zstd")


PACKED = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": open_zst}


# -- which files -------------------------------------------------------------------------------------------------

def kind_of(path):
    """(one of KINDS, one of PACKED or "") from a file's name, in whatever case; None for a file that cannot be read."""
    endings = [ending.lower() for ending in path.suffixes]
    packed = endings.pop() if endings and endings[-1] in PACKED else ""
    kind = endings[-1] if endings else ""
    return (kind, packed) if kind in KINDS and not (packed and kind == ".parquet") else None


def why_skipped(path):
    """Why a file in a folder is not read, or None."""
    if not path.is_file():
        return "no file"  # a link that leads nowhere
    if not kind_of(path):
        return f"of the kind {path.suffix}" if path.suffix else "of no kind"
    return None if path.stat().st_size else "empty"


def walk(folder, skipped):
    """The files below a folder, behind links too, each folder once; counts the hidden ones in `skipped`."""
    def refuse(error):
        raise error
    seen, found = set(), []
    for top, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        if os.path.realpath(top) in seen:  # a link that leads in a circle, or to where another one led
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
        paths = []
        for path in [Path(pattern)] if os.path.exists(pattern) else sorted(map(Path, glob.glob(pattern, recursive=True))):
            if path.is_file() and not kind_of(path):
                raise config.Mistake(f"--input {path}: cannot read this kind of file, only {READABLE}")
            paths += walk(path, skipped) if path.is_dir() else [path]
        paths = [path for path in paths if not out or out.resolve() not in path.resolve().parents]
        skipped.update(filter(None, map(why_skipped, paths)))
        paths = [path for path in paths if not why_skipped(path)]
        if not paths:
            raise config.Mistake(f"--input {pattern}: no such file, nor a folder with any of {READABLE}{listed(skipped)}")
        for path in paths:
            skipped["given twice"] += path.resolve() in found
            found.setdefault(path.resolve(), Path(os.path.abspath(path)))
    if +skipped:
        print(f"files{listed(skipped)}", flush=True)
    return list(found.values())


def listed(skipped):
    """A Counter of reasons in words: "; skipped: 2 empty, 1 hidden", or nothing where nothing was skipped."""
    reasons = ", ".join(f"{n:,} {why}" for why, n in sorted(skipped.items()) if n)
    return f"; skipped: {reasons}" if reasons else ""


# -- what a file holds -------------------------------------------------------------------------------------------

def pieces(raw, packed=""):
    """The text of a file that is open in binary, piece by piece, none of them empty: UTF-8, or UTF-16 and UTF-32 that
    begin with their byte order mark. Raises ValueError with line and byte where it is none of these, or damaged."""
    line, size = 1, 0
    try:
        f = PACKED[packed](raw) if packed else raw
        data = f.read(4)
        if [byte == 0 for byte in data] in ([False, True] * 2, [True, False] * 2):
            raise ValueError("this is UTF-16 without its byte order mark: save the file as UTF-8")
        encoding = next((name for mark, name in MARKS.items() if data.startswith(mark)), "utf-8")
        decoder, last = codecs.getincrementaldecoder(encoding)(), False
        while not last:
            last = not data
            size += len(data)
            text = decoder.decode(data, last)
            line += text.count("\n")
            if text:
                yield text
            data = f.read(PIECE)
    except UnicodeDecodeError as e:
        line += e.object[:e.start].decode(e.encoding, "ignore").count("\n")
        raise ValueError(f"line {line}, byte {size - len(e.object) + e.start + 1}: this is no {encoding.upper()} "
                         f"({e.reason}); save the file as UTF-8") from None
    except (EOFError, OSError, zlib.error, lzma.LZMAError) as e:
        raise ValueError(f"damaged after line {line}: {e}") from e


def separator_of(some_pieces, separators):
    """The first of the separators that a text contains, as a pattern; one that matches nothing where there is none.

    A line of a separator may also end with \\r\\n. That \\r is left out at the beginning, where it is white space at the
    end of a document and only slows the search.
    """
    patterns = [re.compile(re.escape(s).replace("\\\n", "\r?\n").removeprefix("\r?")) for s in separators]
    first, before = len(patterns), ""
    for piece in some_pieces:
        text = before + piece
        first = next((i for i, pattern in enumerate(patterns[:first]) if pattern.search(text)), first)
        if first == 0:
            break
        before = text[-2 * max(map(len, separators)):]  # it may be cut in two
    return [*patterns, re.compile("(?!)")][first]


def cut(text, slack=0):
    """A document in parts of at most LONGEST characters (+ slack for the last), which end with a line where they can."""
    while len(text) > LONGEST + slack:
        end = text.rfind("\n", 0, LONGEST) + 1 or LONGEST
        yield text[:end]
        text = text[end:]
    yield text


def txt_documents(some_pieces, separator):
    """What lies between separators, without white space around it; nothing for white space after the last one."""
    text, slack = "", len(separator.pattern)  # a separator that begins within LONGEST characters is seen whole
    for piece in some_pieces:
        *whole, text = separator.split(text + piece)
        *parts, text = cut(text, slack)
        for document in itertools.chain(*map(cut, whole), parts):
            yield document.strip()
    yield from filter(None, map(str.strip, cut(text)))


def json_values(some_pieces):
    """(place, value) of the elements of a JSON array, or of JSON values one after another, as in jsonl.

    place: "line 7 (record 5)", for messages. Commas may be missing between values and stand after the last one.
    """
    decode, gap = json.JSONDecoder().raw_decode, re.compile(r"\s*,?\s*")
    text, last, record = "", False, 0
    while not text.strip() and (piece := next(some_pieces, "")):
        text += piece
    array = text.lstrip().startswith("[")
    at = text.index("[") + 1 if array else 0  # what comes before it is done with
    line = 1 + text.count("\n", 0, at)
    while True:
        start = gap.match(text, at).end()
        if array and text.startswith("]", start):
            break
        wrong = None
        try:
            value, end = decode(text, start)
        except json.JSONDecodeError as e:
            wrong, end = e.msg, e.pos
        except (ValueError, RecursionError) as e:  # a number of thousands of digits, or lists in lists in lists
            wrong, end = str(e), start
        if not last and (len(text) - end < EDGE or wrong and wrong.startswith("Unterminated string")):
            more = "".join(itertools.takewhile(bool, (next(some_pieces, "") for _ in range(1 + (len(text) - at) // PIECE))))
            text, at, last = text[at:] + more, 0, not more
            continue
        line += text.count("\n", at, start)
        if start == len(text):
            break
        record, at = record + 1, end
        if wrong:
            line += text.count("\n", start, end)
            raise ValueError(f"line {line} (record {record}): {wrong} at {text[end:end + 20]!r}")
        yield f"line {line} (record {record})", value
        line += text.count("\n", start, end)
    if array and not text.startswith("]", start):
        raise ValueError(f"line {line} (record {record + 1}): the file ends before its list does")
    if array and (text[start + 1:].strip() or any(map(str.strip, some_pieces))):
        raise ValueError(f"line {line} (record {record + 1}): more follows after the end of the list")


def parquet_rows(path, raw, field):
    """(place, {column: value}) of the rows of a parquet file, of the column `field` alone if there is one."""
    from pyarrow import parquet
    with parquet.ParquetFile(path) as file:
        columns, n = [field] if field in file.schema_arrow.names else None, 0
        for batch in file.iter_batches(256, columns=columns):
            for i in range(len(batch)):
                n += 1
                try:
                    row = {name: column[i].as_py() for name, column in zip(batch.schema.names, batch.columns)}
                except UnicodeDecodeError as e:
                    raise ValueError(f"row {n}: {e}") from None
                yield f"row {n}", row
            raw.seek(path.stat().st_size * n // file.metadata.num_rows)


def records(path, raw, separators=(), field=None):
    """(place, record) of all that a file holds: documents (txt), values (json) or {column: value} (parquet).

    raw: the file opened in binary, whose position shows how much of it has been read. field: the one column of parquet
    to read, None for all. Raises ValueError with the place, or OSError, where the file is not what its name says.
    """
    kind, packed = kind_of(path)
    if kind == ".parquet":
        yield from parquet_rows(path, raw, field)
    elif kind == ".txt":
        separator = separator_of(pieces(raw, packed), separators)
        raw.seek(0)
        for n, text in enumerate(txt_documents(pieces(raw, packed), separator), 1):
            yield f"document {n}", text
    else:
        yield from json_values(pieces(raw, packed))


def text_of(record, field, place):
    """The text of a record: the record itself or its field; lone surrogates, which UTF-8 lacks, become U+FFFD."""
    if isinstance(record, dict):
        if field not in record:
            raise ValueError(f"{place}: there is no field '{field}'; it has {', '.join(record)[:200]}: name the right one "
                             "with --field, and give records as a list or one a line")
        record = record[field]
    if record is None:
        return ""
    if not isinstance(record, str):
        raise ValueError(f"{place}: the text is no string but {str(record)[:40]!r} ({type(record).__name__}): another "
                         "--field may hold it")
    return tokenizer.valid(record)


# -- sources of documents ----------------------------------------------------------------------------------------

class Files:
    """The documents of files, in order, but for empty ones.

    position: [file, records read of it, records skipped so far for want of text], can be set before reading.
    """

    def __init__(self, paths, cfg):
        self.paths, self.field, self.separators, self.position = paths, cfg.field, cfg.separator, [0, 0, 0]
        if len(paths) == 1:  # one book alone would have nothing to validate on
            self.separators += ("\n\n",)
        self.sizes = [path.stat().st_size for path in paths]
        self.raw = None

    @property
    def skipped(self):
        return self.position[2]

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
            part.paths, part.sizes, part.position = [self.paths[i]], [self.sizes[i]], [0, 0, 0]
            yield part

    def __iter__(self):
        first, done, skipped = self.position
        for i, path in list(enumerate(self.paths))[first:]:
            with config.mistakes(OSError, ValueError, NotImplementedError, prefix=f"{path}: "), open(path, "rb") as self.raw:
                everything = enumerate(records(path, self.raw, self.separators, self.field), 1)
                for n, (place, record) in itertools.islice(everything, done, None):
                    text = text_of(record, self.field, place)
                    blank = not text or text.isspace()
                    skipped += blank
                    self.position = [i, n, skipped]
                    if not blank:
                        yield text
            done = 0
            self.position = [i + 1, 0, skipped]


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
    import datasets
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what goes wrong is raised as well
    return datasets.load_dataset(repository, name, split=split, streaming=True)


def rows_of(columns):
    """The records of one batch that `datasets` read: {column: values} -> {column: value} for each."""
    return [dict(zip(columns, row)) for row in zip(*columns.values())]


class Hub:
    """The documents of a data set on the Hugging Face hub, streamed, but for empty ones.

    position: [state of the stream, records read since then, records in all, skipped], can be set before reading.
    """

    def __init__(self, repository, name, cfg):
        self.repository, self.name, self.field = repository, name, cfg.field
        self.position, self.total = [None, 0, 0, 0], None

    @property
    def skipped(self):
        return self.position[3]

    def identity(self):
        return [self.repository, self.name]

    def fraction(self):
        return min(self.position[2] / self.total, 1) if self.total else 0

    def parts(self):
        yield self

    def __iter__(self):
        state, done, total, skipped = self.position
        with config.mistakes(OSError, ValueError, prefix=f"{self.repository}: "):
            data = open_hub(self.repository, self.name, "train")
            self.total = data.info.splits["train"].num_examples if data.info.splits else None
            if state:
                data.load_state_dict(state)
            for columns in data.iter(batch_size=256):
                for n, record in list(enumerate(rows_of(columns), 1))[done:]:
                    total += 1
                    text = text_of(record, self.field, f"row {total}")
                    blank = not text or text.isspace()
                    skipped += blank
                    self.position = [state, n, total, skipped]
                    if not blank:
                        yield text
                state, done = data.state_dict(), 0
