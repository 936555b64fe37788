"""What a file holds: the records of txt, JSON and parquet, compressed or not, as a stream.

What is read depends on the file alone, not on where a buffer ends, and an error names the line. A text comes back to
the character, which it does not from the txt and JSON loaders of `datasets` (see LOG.md, 2026-11-27).
"""
import bz2
import codecs
import contextlib
import gzip
import itertools
import json
import lzma
import os
import re
import zlib
from pathlib import Path

import config
from prepare import tokenizer

READABLE = "txt, jsonl, json (each also .gz, .bz2, .xz, .zst) and parquet"
FORMATS = (".txt", ".jsonl", ".json", ".parquet")
MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
         codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}  # in this order: one begins with another
PIECE = 1 << 20  # bytes read at a time
LONGEST = 1 << 20  # characters of a .txt document; longer ones are cut: a file without separators must fit in memory
EDGE = 32  # characters at the end of a buffer that may look wrong for want of more: \uXXXX, -Infinity, 1.5e+300


def open_zst(file):
    """What Zstandard compressed in a file. pyarrow comes with `datasets`."""
    import pyarrow
    return pyarrow.CompressedInputStream(file, "zstd")


COMPRESSIONS = {"": lambda file: file, ".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": open_zst}


def format_of(path):
    """(one of FORMATS, one of COMPRESSIONS) by a file's name, in whatever case; None for what cannot be read."""
    endings = ["", "", *(ending.lower() for ending in path.suffixes)]
    format, compression = endings[-2:] if endings[-1] in COMPRESSIONS else (endings[-1], "")
    return (format, compression) if format in FORMATS and not (compression and format == ".parquet") else None


@contextlib.contextmanager
def opened(path):
    """The file, to be read in binary; whatever shows to be wrong with it is a `Mistake` that names it."""
    with config.mistakes(OSError, ValueError, NotImplementedError, prefix=f"{path}: "), open(path, "rb") as file:
        yield file


def text_of_file(file, compression=""):
    """The text of a file opened in binary, piece by piece, none of them empty: UTF-8, or UTF-16 and UTF-32 that begin
    with their byte order mark. Raises ValueError with the place for anything else, and for a damaged archive."""
    line, size = 1, 0

    def pieces(data):
        nonlocal size
        while data:
            size += len(data)
            yield data
            data = stream.read1(PIECE)  # unlike `read` it loses nothing that comes before a damage
    try:
        stream = COMPRESSIONS[compression](file)
        head = stream.read(4)
        if [byte == 0 for byte in head] in ([False, True] * 2, [True, False] * 2):
            raise ValueError("this is UTF-16 without its byte order mark; save it as UTF-8")
        encoding = next((name for mark, name in MARKS.items() if head.startswith(mark)), "utf-8")
        for text in codecs.iterdecode(pieces(head), encoding):
            line += text.count("\n")
            yield text
    except UnicodeDecodeError as e:
        text = e.object[:e.start].decode(e.encoding, "ignore")
        if text:
            yield text
        line, at = line + text.count("\n"), size - len(e.object) + e.start + 1
        raise ValueError(f"line {line}, byte {at}: not {encoding.upper()} ({e.reason}); save it as UTF-8") from None
    except (EOFError, OSError, zlib.error, lzma.LZMAError) as e:
        wide = "too much memory" in str(e)  # pyarrow's words for a window that takes more than it gives
        raise ValueError("packed with zstd --long: unpack it first, with zstd -d --long=31" if wide else
                         f"damaged after line {line}: {e}") from None


# -- txt ---------------------------------------------------------------------------------------------------------

def separator_of(pieces, separators):
    """The first of the separators that a text contains, as a pattern; one that matches nothing where there is none.

    A line in a separator may also end with CR LF. A CR at its very beginning is left to the document before, which
    loses white space at its end: the search is ten times as fast.
    """
    patterns = [re.compile(re.escape(s).replace("\\\n", "\r?\n").removeprefix("\r?")) for s in separators]
    first, tail = len(patterns), ""
    for piece in pieces:
        text = tail + piece
        first = next((i for i, pattern in enumerate(patterns[:first]) if pattern.search(text)), first)
        if first == 0:
            break
        tail = text[-2 * max(map(len, separators)):]  # a separator may lie across two pieces
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


# -- JSON and parquet --------------------------------------------------------------------------------------------

class Buffer:
    """The part of a text that is being looked at: `text` from `at` on, which is in line `line`. A ValueError that ends
    the pieces is kept as `damage`, so that what comes before it is used first."""

    def __init__(self, pieces):
        self.pieces, self.text, self.at, self.line, self.ended, self.damage = iter(pieces), "", 0, 1, False, None

    def more(self):
        """Read on, at least as much as is there: what is long is looked at seldom."""
        new, wanted = [], len(self.text) - self.at + 1
        try:
            while wanted > 0:
                new.append(next(self.pieces))
                wanted -= len(new[-1])
        except StopIteration:
            self.ended = True
        except ValueError as e:
            self.ended, self.damage = True, e
        self.text, self.at = self.text[self.at:] + "".join(new), 0

    def go_to(self, at):
        self.line += self.text.count("\n", self.at, at)
        self.at = at


def json_values(pieces):
    """(place, value) of the elements of a JSON array, or of JSON values one after another, as in jsonl.

    place: "line 7 (record 5)". Commas may be missing between values, and one may follow the last. A value outside of an
    array that is none comes as a ValueError, and reading goes on at the next line.
    """
    decode, gap, record, buffer = json.JSONDecoder().raw_decode, re.compile(r"[\s,]*"), 1, Buffer(pieces)
    while not buffer.text.strip() and not buffer.ended:
        buffer.more()
    is_array = buffer.text.lstrip().startswith("[")
    if is_array:
        buffer.go_to(buffer.text.index("[") + 1)
    while True:
        buffer.go_to(gap.match(buffer.text, buffer.at).end())
        text, at, place, error = buffer.text, buffer.at, f"line {buffer.line} (record {record})", ""
        if is_array and text.startswith("]", at):
            if text[at + 1:].strip() or any(map(str.strip, buffer.pieces)):
                raise ValueError(f"{place}: something follows after the list")
            break
        try:
            value, end = decode(text, at)
        except json.JSONDecodeError as e:
            error, end = e.msg, e.pos
        except (ValueError, RecursionError) as e:  # a number of thousands of digits, or lists in lists in lists
            error, end = str(e).split(":")[0], at
        may_go_on = len(text) - end < EDGE or error.startswith("Unterminated string")
        if may_go_on and not buffer.ended:
            buffer.more()
            continue
        if at == len(text) and is_array and not buffer.damage:
            raise ValueError(f"{place}: the file ends before its list does")
        if at == len(text) or error and may_go_on and buffer.damage:
            break
        if error:
            error = f"{error.removesuffix(' at')} at {text[end:end + 20]!r}"
            if is_array:
                buffer.go_to(end)
                raise ValueError(f"line {buffer.line} (record {record}): {error}")
            while (end := buffer.text.find("\n", buffer.at)) < 0 and not buffer.ended:
                buffer.more()
            end = end if end >= 0 else len(buffer.text)
            value = ValueError(error)
        buffer.go_to(end)
        yield place, value
        record += 1
    if buffer.damage:
        raise buffer.damage


def present(value):
    """A value of a parquet file without the keys that a struct has for the sake of others, whose values are None."""
    if isinstance(value, dict):
        return {key: present(part) for key, part in value.items() if part is not None}
    return list(map(present, value)) if isinstance(value, list) else value


def parquet_rows(file, field):
    """(place, {column: value}) of the rows of a parquet file, of the column `field` alone if there is one."""
    from pyarrow import parquet
    with open(file.name, "rb") as same, parquet.ParquetFile(same) as table:  # pyarrow opens no name beyond UTF-8
        count, n = table.schema_arrow.names.count(field), 0
        if count > 1:
            raise ValueError(f"{count} of its columns are called {field!r}")
        for batch in table.iter_batches(256, columns=[field] if count else None):
            for i in range(len(batch)):
                n += 1
                with config.mistakes(UnicodeDecodeError, prefix=f"{file.name}: row {n}: "):
                    row = [present(column[i].as_py()) for column in batch.columns]
                yield f"row {n}", dict(zip(batch.schema.names, row))
            file.seek(os.path.getsize(file.name) * n // table.metadata.num_rows)  # pyarrow reads `same`


# -- records and their texts -------------------------------------------------------------------------------------

def records(file, separators=(), field=None):
    """(place, record) of what a file opened in binary holds: a text (txt), a value or a ValueError that says why a line
    is none (JSON), {column: value} (parquet).

    field: the one column of parquet to read, None for all. The file's position shows how much of it has been read.
    """
    format, compression = format_of(Path(file.name))
    if format == ".parquet":
        yield from parquet_rows(file, field)
    elif format == ".txt":
        with open(file.name, "rb") as same:
            separator = separator_of(text_of_file(same, compression), separators)
        for n, text in enumerate(txt_documents(text_of_file(file, compression), separator), 1):
            yield f"document {n}", text
    else:
        yield from json_values(text_of_file(file, compression))


def text_of(record, field, place, before=0):
    """The text of a record: the record itself or its field; lone surrogates, which UTF-8 lacks, become U+FFFD.

    before: the number of records before it that have a text."""
    if isinstance(record, ValueError):
        raise config.Mistake(f"{place}: {record}")
    if isinstance(record, dict):
        if field not in record:
            others = "the one before it has" if before == 1 else f"the {before:,} before it have"
            has = ", ".join(record)[:200] or "none at all"
            raise config.Mistake(
                f"{place}: this record has no field '{field}', though {others}; it has {has}" if before > 0 else
                f"{place}: a record has no field '{field}'; it has {has}: name the right one with --field; records "
                "should stand in a list, or one a line")
        record = record[field]
    if not isinstance(record, str | None):
        raise config.Mistake(f"{place}: a text is a string, not {str(record)[:40]} ({type(record).__name__}); if "
                             "another field holds it, name that with --field")
    return tokenizer.valid(record or "")
