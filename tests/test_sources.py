"""Reading: every document of every kind of file, wherever a buffer ends, or one line that names file and place."""
import bz2
import codecs
import functools
import gzip
import json
import lzma
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

import config
from prepare import formats, hellaswag, shakespeare, sources

ROOT = Path(__file__).resolve().parents[1]
PIECES = 1, 2, 7, 64, 1 << 20
END = ("<|endoftext|>",)


def read(paths, field="text", separators=END):
    """(documents, records skipped) of these files."""
    source = sources.Files(sources.find_files([str(path) for path in paths]), separators, field)
    return list(source), source.skipped


def outcome(paths, **options):
    """What reading gives, or the message with which it is refused."""
    try:
        return read(paths, **options)
    except config.Mistake as e:
        assert "\n" not in str(e)
        return str(e)


def in_every_buffer(monkeypatch, paths, **options):
    """The one outcome that all sizes of buffers have."""
    found = []
    for size in PIECES:
        monkeypatch.setattr(formats, "PIECE", size)
        found.append(outcome(paths, **options))
    assert all(other == found[0] for other in found), found
    return found[0]


def zst(content):
    import pyarrow
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as packed:
        packed.write(content)
    return sink.getvalue().to_pybytes()


gz = functools.partial(gzip.compress, mtime=0)  # the same bytes in each process that collects the tests
PACK = {".gz": gz, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zst}
OBJECTS = b'{"text": "a\\u00e9\\ud83d\\ude42"}\n{"id": 1.5e+30, "text": "b\\n\\"}{[", "x": [{}, [1]]}\n{"text": "c"}'
WANTED = ["aé🙂", 'b\n"}{[', "c"]

TORN = random.Random(0).randbytes(99_999).hex().encode()

# name, content, the documents or a pattern of the error
TABLE = [
    # encodings and line ends
    ("plain.txt", "né 🙂".encode(), ["né 🙂"]),
    ("bom.txt", "né".encode("utf-8-sig"), ["né"]),
    ("utf16.txt", "né 🙂".encode("utf-16"), ["né 🙂"]),
    ("utf16be.txt", codecs.BOM_UTF16_BE + "né 🙂".encode("utf-16-be"), ["né 🙂"]),
    ("utf32.txt", "né 🙂".encode("utf-32"), ["né 🙂"]),
    ("utf16.jsonl", OBJECTS.decode().encode("utf-16"), WANTED),
    ("bom.jsonl", codecs.BOM_UTF8 + OBJECTS, WANTED),
    ("bom.json", codecs.BOM_UTF8 + b'["a", "b"]', ["a", "b"]),
    ("nobom.txt", "hello".encode("utf-16-le"),
     "nobom.txt: this is UTF-16 without its byte order mark; save it as UTF-8"),
    ("nobom.jsonl", '"hello"'.encode("utf-16-be"), "nobom.jsonl: this is UTF-16 without"),
    ("latin.txt", "one\ntwo\ncaf".encode() + b"\xe9 x",
     r"latin.txt: line 3, byte 12: not UTF-8 \(.*\); save it as UTF-8"),
    ("latin.jsonl", b'{"text": "a"}\n{"text": "\xe9"}', "latin.jsonl: line 2, byte 25: not UTF-8"),
    ("cut.txt", "a\né".encode()[:-1], "cut.txt: line 2, byte 3: not UTF-8"),
    ("odd.txt", "a\nb".encode("utf-16")[:-1], "odd.txt: line 2, byte 7: not UTF-16"),
    ("bomlatin.txt", codecs.BOM_UTF8 + b"ab\n\xff", "bomlatin.txt: line 2, byte 7: not UTF-8"),
    ("crlf.txt", b"a\r\nb\r\n<|endoftext|>\r\nc\rd\x0ce\xe2\x80\xa8f\r\n", ["a\r\nb", "c\rd\x0ce\u2028f"]),
    ("crlf.jsonl", OBJECTS.replace(b"\n", b"\r\n"), WANTED),
    ("nul.txt", b"a\0b<|endoftext|>\0c", ["a\0b", "\0c"]),
    ("nul.jsonl", b'"a\\u0000b"\n', ["a\0b"]),
    ("rawnul.jsonl", b'"a"\n"a\0b"\n', r"rawnul.jsonl: line 2 \(record 2\): Invalid control character at '\\x00b"),
    # txt
    ("end.txt", b"a\n<|endoftext|>\nb<|endoftext|>\n", ["a", "b"]),
    ("empties.txt", b"<|endoftext|>a<|endoftext|> \n<|endoftext|><|endoftext|>b", (["a", "b"], 3)),
    ("half.txt", b"a<|endoftext|<|endoftext|>|>b<|endof", ["a<|endoftext|", "|>b<|endof"]),
    ("late.txt", b"x y\n" * 50 + b"<|endoftext|>b", [("x y\n" * 50).strip(), "b"]),
    ("alone.txt", b"a\n\nb\r\n\r\nc\n\r\n\r\nd\n \ne", ["a", "b", "c", "d\n \ne"]),
    ("both.txt", b"a\n\nb<|endoftext|>c", ["a\n\nb", "c"]),
    ("blank.txt", b" \n\n\n", ([], 1)),
    # json, whatever its layout and whichever of the two names it has
    *((f"lines.{kind}", OBJECTS, WANTED) for kind in ("json", "jsonl")),
    *((f"list.{kind}", b" \n[\n" + OBJECTS.replace(b"\n", b" ,\n") + b"]\n", WANTED) for kind in ("json", "jsonl")),
    *((f"tight.{kind}", b"[" + OBJECTS.replace(b"\n", b",") + b"]", WANTED) for kind in ("json", "jsonl")),
    *((f"indented.{kind}", json.dumps([json.loads(line) for line in OBJECTS.splitlines()], indent=2).encode(), WANTED)
      for kind in ("json", "jsonl")),
    ("one.json", b'{\n "text":\n "a"\n}\n', ["a"]),
    ("strings.jsonl", b'"a"\n"b"\n', ["a", "b"]),
    ("gaps.jsonl", b'\n\n"a"\n\n  \n"b"\n\t\n', ["a", "b"]),
    ("commas.jsonl", b'{"text": "a"},\n{"text": "b"},\n', ["a", "b"]),
    ("comma.json", b'["a", "b",\n]', ["a", "b"]),
    ("null.jsonl", b'{"text": null}\n{"text": ""}\nnull\n{"text": " \\n"}\n{"text": "a"}', (["a"], 4)),
    ("none.json", b"[]", ([], 0)),
    ("surrogate.jsonl", b'"a\\ud800b"', ["a\ufffdb"]),
    ("date.jsonl", b'"2020-01-01"\n"1.0"', ["2020-01-01", "1.0"]),
    ("mixed.jsonl", b'{"text": "a"}\n"b"\n{"meta": {"x": 1}, "text": "c"}', ["a", "b", "c"]),
    ("long.jsonl", b'"' + b"word " * 999 + b'"\n"b"', ["word " * 999, "b"]),
    ("nested.json", b'{"data": [{"text": "a"}]}',
     r"nested.json: line 1 \(record 1\): .*no field 'text'; it has data.*--field"),
    ("fieldless.jsonl", b'"a"\n{"text": "b"}\n{"x": 1}',
     r"fieldless.jsonl: line 3 \(record 3\): this record has no field 'text', though the 2 before it have; it has x$"),
    ("nofields.jsonl", b'{"text": "a"}\n{}', r"line 2 .*though the one before it has; it has none at all$"),
    ("cutoff.jsonl", b'"a"\n"b', r"cutoff.jsonl: line 2 \(record 2\): Unterminated string starting at '"),
    ("other.jsonl", b'{"text": "a"}\n\n{"title": "x", "body": "b"}', r"line 3 \(record 2\): .* it has title, body"),
    ("number.jsonl", b'{"text": "a"}\n{"text": 15}',
     r"number.jsonl: line 2 \(record 2\): a text is a string, not 15 \(int\)"),
    ("inner.jsonl", b'{"text": ["a", "b"]}',
     r"inner.jsonl: line 1 \(record 1\): a text is a string, not \['a', 'b'\] \(list\)"),
    ("numbers.json", b"[\n1.5e+30,\n2]",
     r"numbers.json: line 2 \(record 1\): a text is a string, not 1.5e\+30 \(float\)"),
    ("lists.json", b'[["a"], ["b"]]', r"lists.json: line 1 \(record 1\): a text is a string, not \['a'\]"),
    ("listlines.jsonl", b'["a"]\n["b"]', r"listlines.jsonl: line 1 \(record 2\): something follows after the list"),
    ("after.json", b'["a"] ' + b" " * 99 + b"\n]", "after.json: line 1.*something follows"),
    ("open.json", b'["a",\n"b"', r"open.json: line 2 \(record 3\): the file ends before its list does"),
    ("opencomma.json", b'["a",\n', r"opencomma.json: line 2 \(record 2\): the file ends before its list does"),
    ("torn.jsonl", b'{"text": "a"}\n{"text": "b', r"torn.jsonl: line 2 \(record 2\): Unterminated string"),
    ("torn2.jsonl", b'{"text": "a"}\n{"text": ', r"torn2.jsonl: line 2 \(record 2\): Expecting value"),
    ("words.jsonl", b'"a"\n{"text": oops, "more": "and more and more and more"}\n"b"',
     r"words.jsonl: line 2 \(record 2\): Expecting value at 'oops, \"more\": \"and m'"),
    ("pretty.json", b'[{"text": "a"},\n {"text": "b",\n  "x" 3}]',
     r"pretty.json: line 3 \(record 2\): Expecting ':' delimiter"),
    ("below.json", b'[{"text":\n\n "a"},\n {"text": 2}]',
     r"below.json: line 4 \(record 2\): a text is a string, not 2"),
    ("newline.jsonl", b'"a"\n"b\nc"\n', r"newline.jsonl: line 2 \(record 2\): Invalid control character"),
    ("escape.jsonl", b'"a"\n"\\u12"', r"escape.jsonl: line 2 \(record 2\): Invalid \\uXXXX escape"),
    ("digits.jsonl", b'"a"\n' + b"9" * 5000, r"digits.jsonl: line 2 \(record 2\): Exceeds the limit"),
    ("deep.json", b"[" * 100_000, r"deep.json: line 1 \(record 1\): .*recursion"),
    ("plain.json", b"hello world", r"plain.json: line 1 \(record 1\): Expecting value at 'hello world'"),
    # names
    ("A.TXT", b"a", ["a"]), ("B.JsonL", b'"a"', ["a"]), ("my.notes.v2.Json", b'"a"', ["a"]),
    ("C.Json.GZ", gz(b'"a"'), ["a"]), ("[1].txt", b"a", ["a"]), ("a b.txt", b"a", ["a"]),
    ("picture.png", b"x", "picture.png: cannot read this kind of file, only txt"),
    ("txt", b"x", "txt: cannot read this kind of file"), ("a.parquet.gz", b"x", "a.parquet.gz: cannot read this kind"),
    ("zero.txt", b"", "zero.txt: empty"),
    # archives
    *((f"ok.jsonl{ending}", pack(OBJECTS), WANTED) for ending, pack in PACK.items()),
    *((f"utf16.txt{ending}", pack("né".encode("utf-16")), ["né"]) for ending, pack in PACK.items()),
    *((f"torn.txt{ending}", pack(TORN.replace(b"7", b"" if ending == ".zst" else b"\n"))[:-999],
       rf"torn.txt{ending}: damaged after line \d+: ") for ending, pack in PACK.items()),  # pyarrow's zst loses a block
    *((f"no.txt{ending}", b"no archive at all", f"no.txt{ending}: damaged after line 1") for ending in PACK),
    ("long.txt.zst", b"\x28\xb5\x2f\xfd\x00\xa8\x09\0\0a",  # one letter, in a window of 2 GiB
     "long.txt.zst: packed with zstd --long: unpack it first, with zstd -d --long=31$"),
    ("two.jsonl.gz", gz(b'"a"\n') + gz(b'"b"'), ["a", "b"]),
    ("no.parquet", b"PAR1", "no.parquet: "),
]


@pytest.mark.parametrize("name, content, wanted", TABLE, ids=[row[0] for row in TABLE])
def test_documents_or_one_line(tmp_path, monkeypatch, name, content, wanted):
    (tmp_path / name).write_bytes(content)
    found = in_every_buffer(monkeypatch, [tmp_path / name])
    if isinstance(wanted, str):
        assert isinstance(found, str) and re.search(wanted, found), found
    elif isinstance(wanted, tuple):
        assert found == wanted
    else:
        assert found == (wanted, 0)


def test_jsonl_as_json_loads_each_line(tmp_path, monkeypatch):
    """Random records, against json.loads of each line; a bad one anywhere is named by its line."""
    draw = random.Random(0)
    texts = ["".join(draw.choices('abc"\\{}[],: \n\t\r\x00é🙂\u2028', k=draw.randint(0, 80))) for _ in range(200)]
    lines = [json.dumps({"n": draw.random() * 1e30, "text": t, "tail": [None, True, {}]}, ensure_ascii=i % 2 == 0)
             for i, t in enumerate(texts)]
    for bad in (None, 0, 1, 57, 199):
        some = list(lines)
        if bad is not None:
            some[bad] = some[bad].replace(":", "", 1)
        (tmp_path / "a.jsonl").write_bytes("\n".join(some).encode())
        found = in_every_buffer(monkeypatch, [tmp_path / "a.jsonl"])
        if bad is None:
            texts = [json.loads(line)["text"] for line in some]
            assert found == ([t for t in texts if t.strip()], sum(not t.strip() for t in texts))
        else:
            assert f"a.jsonl: line {bad + 1} (record {bad + 1}): Expecting ':' delimiter" in found


@pytest.mark.parametrize("separator", ["<|endoftext|>", "\n\n", "\n---\n", "aba", "\n"])
def test_separators_wherever_a_buffer_ends(tmp_path, monkeypatch, separator):
    """Against str.split of the whole text, the first separator at each place from 0 to 140; and with CR LF."""
    for at in range(140):
        whole = "x" * at + separator + "ab a" + separator * 3 + "\nlast ab" + separator
        (tmp_path / "a.txt").write_bytes(whole.encode())
        parts = [part.strip() for part in whole.split(separator)]
        wanted = [part for part in parts if part], len([part for part in parts[:-1] if not part])
        monkeypatch.setattr(formats, "PIECE", 64)
        assert read([tmp_path / "a.txt"], separators=("never", separator)) == wanted
        if at % 20 == 0:
            assert in_every_buffer(monkeypatch, [tmp_path / "a.txt"], separators=("never", separator)) == wanted
            (tmp_path / "a.txt").write_bytes(whole.replace("\n", "\r\n").encode())
            found = in_every_buffer(monkeypatch, [tmp_path / "a.txt"], separators=("never", separator))
            assert ([text.replace("\r", "") for text in found[0]], found[1]) == wanted


def test_the_separator_a_file_has_may_come_late(tmp_path, monkeypatch):
    """The first of the separators that stands anywhere in the file, even after another one."""
    (tmp_path / "a.txt").write_bytes(b"a\n\nb" * 100 + b"<|endoftext|>c")
    wanted = [("a\n\nb" * 100), "c"], 0
    assert in_every_buffer(monkeypatch, [tmp_path / "a.txt"]) == wanted
    whole = "line\n" * 300_000  # a megabyte and a half, and then the mark
    (tmp_path / "b.txt").write_text(whole[:(1 << 20) - 5] + "<|endoftext|>" + whole)
    documents, _ = read([tmp_path / "b.txt"])
    assert documents[0] == whole[:(1 << 20) - 5] and "\n".join(documents[1:]).split() == whole.split()
    assert not any("endoftext" in text for text in documents)


@pytest.mark.parametrize("separators", [END, ("\n\n",), ("<|e|>", "\n---\n")])
def test_long_documents_are_cut_at_the_same_places(tmp_path, monkeypatch, separators):
    """Against a cut of the whole document, in whatever pieces it is read; no separator is cut in two."""
    monkeypatch.setattr(formats, "LONGEST", 50)
    draw = random.Random(1)
    for trial in range(20):
        words = draw.choices(["word", "\n", "\n\n", "a" * 60, " ", *separators, separators[0][:-1]], k=60)
        (tmp_path / "a.txt").write_bytes("".join(words).encode())
        (tmp_path / "b.txt").write_text("b")  # not a file alone
        whole = "".join(words)
        separator = next((s for s in separators if s in whole), None)
        wanted = ["b"]
        for document in reversed(whole.split(separator) if separator else [whole]):
            parts = []
            while len(document) > 50:
                end = document.rfind("\n", 0, 50) + 1 or 50
                parts.append(document[:end].strip())
                document = document[end:]
            wanted = [*filter(None, [*parts, document.strip()]), *wanted]
        found = in_every_buffer(monkeypatch, [tmp_path], separators=separators)
        assert found[0] == wanted


def test_every_place_is_right_after_going_on(tmp_path):
    """The message for a bad record is the same whether reading begins before it or goes on from any place."""
    good = [f'{{"text": "t{i}"}}' for i in range(20)]
    (tmp_path / "a.jsonl").write_text("\n".join(good))
    (tmp_path / "b.jsonl").write_text("\n".join([*good, "", '{"text": 7}']))
    paths, positions = sources.find_files([str(tmp_path)]), [[0, 0, 0]]
    source = sources.Files(paths, END, "text")
    with pytest.raises(config.Mistake) as first:
        for _ in source:
            positions.append(json.loads(json.dumps(source.position)))
    assert str(first.value).startswith(f"{tmp_path}/b.jsonl: line 22 (record 21): a text is a string")
    assert len(positions) == 41
    for position in positions:
        again = sources.Files(paths, END, "text")
        again.position = position
        with pytest.raises(config.Mistake, match=re.escape(str(first.value))):
            list(again)


def test_a_bad_line_far_down_is_named_rightly(tmp_path):
    lines = [json.dumps({"text": f"text {i} " * 10}) for i in range(60_000)]  # some megabytes
    for n, bad, words in (50_000, '{"text": oops}', "Expecting value at 'oops}"), (59_999, '{"text": 5}', "not 5"):
        some = list(lines)
        some[n] = bad
        (tmp_path / "a.jsonl").write_text("\n".join(some) + "\n")
        found = outcome([tmp_path / "a.jsonl"])
        assert f"a.jsonl: line {n + 1} (record {n + 1}): " in found and words in found
        (tmp_path / "a.json").write_text("[" + ", ".join(some) + "]")
        found = outcome([tmp_path / "a.json"])
        assert f"a.json: line 1 (record {n + 1}): " in found and words in found
    (tmp_path / "a.txt").write_bytes(("line\n" * 500_000).encode() + b"caf\xe9\n" + b"more\n" * 9)
    assert "a.txt: line 500001, byte 2500004: not UTF-8" in outcome([tmp_path / "a.txt"])


@pytest.mark.parametrize("name, content", [
    ("a.txt", "<|endoftext|>".join(f"text {i}" for i in range(30)).encode() + b"\xff<|endoftext|>more" * 9),
    ("a.jsonl", b'"text"\n' * 30 + b'"\xff"\n' * 9), ("b.jsonl", b'"text"\n' * 30 + b"oops\n" * 9),
    ("a.jsonl.gz", gz(b'"text"\n' * 10_000)[:-20])])
def test_what_comes_before_a_damage_is_read_in_every_buffer(tmp_path, monkeypatch, name, content):
    """So that --limit does not depend on buffers either."""
    (tmp_path / name).write_bytes(content)
    counts = []
    for size in PIECES:
        monkeypatch.setattr(formats, "PIECE", size)
        n = 0
        with pytest.raises(config.Mistake):
            for _ in sources.Files([tmp_path / name], END, "text"):
                n += 1
        counts.append(n)
    assert len(set(counts)) == 1 and counts[0] >= 25, counts


def test_parquet_columns_and_rows(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet
    texts = [f"text {i}" if i % 100 else [None, "", " "][i // 100 % 3] for i in range(700)]
    wanted = [t for t in texts if t and t.strip()], 7
    for kind in pyarrow.string(), pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string()):
        table = pyarrow.table({"id": range(700), "text": pyarrow.array(texts, pyarrow.string()).cast(kind)})
        parquet.write_table(table, tmp_path / "A.Parquet", row_group_size=90)
        assert read([tmp_path / "A.Parquet"]) == wanted
    found = outcome([tmp_path / "A.Parquet"], field="body")
    assert re.search(r"A.Parquet: row 1: .*no field 'body'; it has id, text: .*--field", found)
    found = outcome([tmp_path / "A.Parquet"], field="id")
    assert re.search(r"A.Parquet: row 1: a text is a string, not 0 \(int\)", found)
    name = os.fsdecode(b"caf\xe9.parquet" if sys.platform == "linux" else b"cafe.parquet")  # others allow UTF-8 alone
    (tmp_path / name).write_bytes((tmp_path / "A.Parquet").read_bytes())
    assert read([tmp_path / name]) == wanted
    twice = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    parquet.write_table(twice, tmp_path / "twice.parquet")
    assert "twice.parquet: 2 of its columns are called 'text'" in outcome([tmp_path / "twice.parquet"])
    raw = pyarrow.array([b"a"] * 300 + [b"caf\xe9"], pyarrow.binary())
    parquet.write_table(pyarrow.table({"text": raw}), tmp_path / "b.parquet")
    assert "b.parquet: row 1: a text is a string, not b'a' (bytes)" in outcome([tmp_path / "b.parquet"])
    parquet.write_table(pyarrow.table({"text": raw.view(pyarrow.string())}), tmp_path / "c.parquet")
    assert re.search("c.parquet: row 301: .*0xe9", outcome([tmp_path / "c.parquet"]))
    whole = (tmp_path / "b.parquet").read_bytes()
    for n in 0, 3, 100, len(whole) - 1:
        (tmp_path / "d.parquet").write_bytes(whole[:n])
        assert "d.parquet: " in outcome([tmp_path / "d.parquet"])


# -- which files -----------------------------------------------------------------------------------------------------

def test_what_a_folder_holds_besides_is_said_and_counted(tmp_path, capsys):
    for name in ("A.TXT", "b.md", "c.MD", "d.pdf", "README", "e.txt", ".f.txt", ".git/g.txt", "deep/er/h.Txt",
                 "i.parquet.gz"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "e.txt").write_text("")
    (tmp_path / "nowhere.txt").symlink_to(tmp_path / "not there")
    (tmp_path / "itself.txt").symlink_to(tmp_path / "itself.txt")
    found = sources.find_files([str(tmp_path), str(tmp_path / "A.TXT"), str(tmp_path / "deep" / "*")])
    assert found == [tmp_path / "A.TXT", tmp_path / "deep/er/h.Txt"]
    assert capsys.readouterr().out == ("files skipped: 1 .MD, 1 .gz, 1 .md, 1 .pdf, 1 empty, 2 given twice, 2 hidden, "
                                       "2 no file, 1 without an ending\n")
    named = [str(tmp_path / name) for name in ("A.TXT", "e.txt")]  # as a shell spells my_folder/*.txt
    assert sources.find_files(named) == [tmp_path / "A.TXT"]
    assert capsys.readouterr().out == "files skipped: 1 empty\n"
    with pytest.raises(config.Mistake, match="e.txt: empty"):
        sources.find_files(named[1:])
    (tmp_path / "only").mkdir()
    (tmp_path / "only/x.pdf").write_text("x")
    with pytest.raises(config.Mistake, match="no such file, nor a folder with any of txt.*; skipped: 1 .pdf$"):
        sources.find_files([str(tmp_path / "only")])
    sources.find_files([str(tmp_path / "deep")])
    assert capsys.readouterr().out == ""


def test_links_are_followed_and_circles_broken(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "elsewhere/more").mkdir(parents=True)
    (tmp_path / "elsewhere/more/a.txt").write_text("a")
    (tmp_path / "blob").write_text("b")  # as the hub's own cache keeps files
    (tmp_path / "in/b.jsonl").symlink_to(tmp_path / "blob")
    (tmp_path / "blob").write_text('"b"')
    (tmp_path / "in/folder").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/circle").symlink_to(tmp_path / "in")
    (tmp_path / "elsewhere/self").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in/again.txt").symlink_to(tmp_path / "elsewhere/more/a.txt")
    assert read([tmp_path / "in"])[0] == ["a", "b"]
    assert read([tmp_path / "in" / "*"])[0] == ["a", "b"]


def test_a_folder_that_may_not_be_read_is_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "in/locked").mkdir(parents=True)
    (tmp_path / "in/a.txt").write_text("a")
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="locked"):
        sources.find_files([str(tmp_path / "in")])
    monkeypatch.setattr(sys, "argv", ["", f"--input={tmp_path / 'in'}", f"--out={tmp_path / 'out'}"])
    for script in hellaswag, shakespeare:
        with pytest.raises(SystemExit, match="2"):
            config.run(script.main)
        said = capsys.readouterr().err
        assert said.startswith("error: ") and "locked" in said and said.count("\n") == 1


# -- the hub ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("status, headers, words", [
    (404, {"X-Error-Code": "RepoNotFound"}, "doesn't exist on the Hub or cannot be accessed"),
    (401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}, "doesn't exist on the Hub or "),
    (403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to dataset is restricted"}, "gated dataset"),
    (None, {}, "disconnected"),
])
@pytest.mark.parametrize("script", ["tinystories", "hellaswag"])
def test_a_missing_or_gated_data_set_is_one_line(tmp_path, script, status, headers, words):
    """`datasets` itself, against a server on this machine that answers as the hub does, or breaks off."""
    pytest.importorskip("datasets")
    program = f"""
import http.server, os, sys, threading
asked = []
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        asked.append(self.path)
        if {not status} and len(asked) > 1:
            return
        self.send_response({status or 200})
        for key, value in {headers!r}.items():
            self.send_header(key, value)
        self.send_header("Content-Length", "0")
        self.end_headers()
    do_HEAD = do_POST = do_GET
    def log_message(self, *_): pass
server = http.server.HTTPServer(("127.0.0.1", 0), Answer)
threading.Thread(target=server.serve_forever, daemon=True).start()
os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{{server.server_port}}"
os.environ["HF_HOME"] = {str(tmp_path)!r}
sys.path.insert(0, {str(ROOT)!r})
import config
from prepare import {script}
sys.argv = [{script!r}, "--out", {str(tmp_path / 'out')!r}]
config.run({script}.main)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    said = done.stderr.strip().splitlines()
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stderr.count("error: ") == 1, said
    name = {"tinystories": "roneneldan/TinyStories", "hellaswag": "Rowan/hellaswag"}[script]
    assert said[-1].startswith(f"error: {name}: ") and words in said[-1], said
    assert len(said) == 1 or status is None, said  # the libraries tell of their attempts
    assert not (tmp_path / "out").exists()
