"""Pictures and records of all kinds on their way from other people's files into a data set, and out of it."""
import hashlib
import importlib
import io
import json
import struct
import sys
import tarfile
import time
import unicodedata
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

import config
import runs
import train
from model import LlamaConfig
from prepare import examples, images, picture_files, text, tokenizer
from prepare import llava as llava_script

TALK = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A dog."}]
MORE = [{"from": "human", "value": "And?"}, {"from": "gpt", "value": "A cat."}]
SYSTEM = [{"from": "system", "value": "Be brief."}]
PARTS = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a.png"}},
                                      {"type": "text", "text": "What?"}]},
         {"role": "assistant", "content": [{"type": "text", "text": "A dog."}]}]


@pytest.fixture
def prepare(monkeypatch, capsys):
    """prepare(script, *args) -> (exit code, stdout, stderr)."""
    def call(script, *args):
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, args)])
        code = 0
        try:
            config.run(importlib.import_module(f"prepare.{script}").main)
        except SystemExit as e:
            code = e.code
        out, err = capsys.readouterr()
        return code, out, "\n".join(line for line in err.splitlines() if line.startswith("error") or "\r" not in line)
    return call


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


def photo(path, color=(200, 10, 10)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), color).save(path, {".jpg": "jpeg", ".png": "png"}.get(path.suffix.lower()))
    return path


def llava(prepare, folder, raw, *args):
    """(exit code, stdout, stderr, {split: records}) of raw records, with the photo a.png."""
    photo(folder / "a.png")
    code, out, err = prepare("llava", "--input", write(folder / "raw.json", raw), "--out", folder / "out", *args)
    splits = {s: images.load(folder / "out", s) for s in images.SPLITS if (folder / f"out/{s}.jsonl").exists()}
    return code, out, err, splits


# -- records -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("raw, said", [
    ([], "there are none"),
    ([{"image": "a.png", "conversations": TALK[:1]}] * 7, "7 of no use: its turns do not go from human to gpt"),
    ([{"image": "gone.png", "conversations": TALK}] * 3, "1 pictures cannot be read and were left out: "),
])
def test_nothing_usable_is_one_line(raw, said, prepare, tmp_path):
    """G1: with the first reason and the count; nothing is written."""
    code, _, err, _ = llava(prepare, tmp_path, raw)
    assert code == 2 and "no usable record" in err and said in err, err
    assert len([line for line in err.splitlines() if line.startswith("error")]) == 1
    assert not (tmp_path / "out").exists()


def test_nothing_usable_in_captions(prepare, tmp_path):
    """G1 of COCO and Flickr8k: the first reason, and how many."""
    for split in "train", "val":
        write(tmp_path / f"coco/captions_{split}2017.json", {
            "images": [{"id": 1, "file_name": "1.jpg"}], "annotations": [{"image_id": 1, "caption": "A dog."}]})
    code, _, err = prepare("coco", "--input", tmp_path / "coco", "--out", tmp_path / "o")
    assert code == 2 and "none of the 1 photos" in err and "train2017" in err
    write(tmp_path / "flickr/captions.txt", "image,caption\na.jpg,A dog .\n")
    for split in "train", "dev", "test":
        write(tmp_path / f"flickr/Flickr_8k.{split}Images.txt", "a.jpg\n")
    code, _, err = prepare("flickr8k", "--input", tmp_path / "flickr", "--out", tmp_path / "o")
    assert code == 2 and "1 pictures cannot be read" in err and "a.jpg: there is no such file" in err
    assert not (tmp_path / "o").exists()


def test_captions_whose_photos_are_there_count(prepare, tmp_path):
    """COCO's annotations of 2014 and 2017 in one folder, with the photos of one of them."""
    for split in "train", "val":
        for year in 2014, 2017:
            write(tmp_path / f"coco/annotations/captions_{split}{year}.json", {
                "images": [{"id": 1, "file_name": "1.png"}], "annotations": [{"image_id": 1, "caption": f"{year}."}]})
        photo(tmp_path / f"coco/{split}2014/1.png")
    code, out, err = prepare("coco", "--input", tmp_path / "coco", "--out", tmp_path / "o")
    assert code == 0 and images.load(tmp_path / "o", "val")[0]["captions"] == ["2014."], err


MARKED = {  # conversations that are kept, by what is odd about them: (record, where marks stand then)
    "first turn": ({"image": "a.png", "conversations": TALK + MORE}, [1, 0, 0, 0]),
    "end of the turn": ({"image": "a.png", "conversations": [{"from": "human", "value": "What?\n<image>"}, *TALK[1:]]},
                        [1, 0]),
    "second turn": ({"image": "a.png", "conversations": MORE + TALK}, [0, 0, 1, 0]),
    "nowhere": ({"image": "a.png", "conversations": MORE}, [1, 0]),
    "nowhere, two": ({"image": ["a.png", "a.png"], "conversations": MORE + MORE}, [2, 0, 0, 0]),
    "one in each turn": ({"image": ["a.png", "a.png"], "conversations": TALK + TALK}, [1, 0, 1, 0]),
    "after a system turn": ({"image": "a.png", "conversations": SYSTEM + TALK}, [0, 1, 0]),
    "system, second turn": ({"image": "a.png", "conversations": SYSTEM + MORE + TALK}, [0, 0, 0, 1, 0]),
    "system, nowhere": ({"image": "a.png", "conversations": SYSTEM + MORE}, [0, 1, 0]),
    "system, text only": ({"conversations": SYSTEM + MORE}, [0, 0, 0]),
}


@pytest.mark.parametrize("name", MARKED)
def test_where_a_mark_may_stand(name, prepare, tmp_path):
    """G3: in any user's turn; a system turn stays; what prepare accepts trains."""
    raw, marks = MARKED[name]
    code, out, err, made = llava(prepare, tmp_path, [raw], "--val_fraction=0")
    assert code == 0 and len(made["train"]) == 1 and "0 of no use" in out, out + err
    [(_, talk)] = images.talks_of(made["train"][0])
    assert [text.count("<image>") for _, text in talk] == marks
    assert [role for role, _ in talk] == [images.ROLES[t["from"]] for t in raw["conversations"]]
    tok, image_id = examples.with_image(tokenizer.byte())
    data = examples.Examples(images.load(tmp_path / "out", "train"), tok, 4, 200, {})
    row, = data.examples[0]
    assert len(row.pictures) == sum(marks) == (row.ids == image_id).sum()
    told = [t["value"] for t in raw["conversations"] if t["from"] == "gpt"]
    assert tok.decode(row.ids[row.learn], special=True) == "".join(f"{text}</s>" for text in told)


BAD = {  # by reason: records that are of no use
    "elsewhere than in the human's words": [
        {"image": "a.png", "conversations": [TALK[0], {"from": "gpt", "value": "<image>"}]},
        {"image": "a.png", "conversations": [{"from": "system", "value": "<image>"}, *MORE]},
        {"image": "a.png", "question": "What?", "chosen": "<image> a dog", "rejected": "b"},
        {"image": "a.png", "question": "<image> What?", "chosen": "a", "rejected": "b <image>"}],
    "1 pictures and 2 <image> marks": [
        {"image": "a.png", "conversations": TALK + TALK},
        {"image": "a.png", "question": "<image><image>?", "chosen": "a", "rejected": "b"}],
    "2 pictures and 1 <image> marks": [{"image": ["a.png", "a.png"], "conversations": TALK},
                                       {"image": ["a.png", "a.png"], "messages": PARTS}],
    "0 pictures and 1 <image> marks": [{"conversations": TALK}, {"image": "", "conversations": TALK}],
    "from human to gpt and back": [
        {"conversations": MORE[::-1]}, {"conversations": SYSTEM}, {"conversations": MORE + SYSTEM},
        {"conversations": MORE + MORE[:1]}, {"conversations": SYSTEM + SYSTEM + MORE}],
    "not all from human, gpt, system": [
        {"conversations": [{"from": "bot", "value": "x"}]}, {"conversations": [{"value": "x"}]},
        {"conversations": [{"from": ["human"], "value": "x"}, MORE[1]]},
        {"messages": [{"role": "tool", "content": "5"}]}],
    "it is about a video": [{"video": "a.mp4", "conversations": MORE}, {"videos": ["a.mp4"], "messages": [{}]}],
    "its messages are not a list": [{"messages": "hi"}, {"messages": [5]}],
    "not a list of turns": [{"conversations": "Hello"}, {"conversations": ["Hello"]}, {"conversations": 5},
                            {"conversations": {"from": "human"}}],
    "is not the name of a file": [{"image": n, "conversations": TALK} for n in (3, 0, 1.5, True, {}, [["a.png"]])],
    "empty or no text": [
        {}, {"instruction": "a"}, {"instruction": "a", "output": ["b"]}, {"instruction": 1, "output": "b"},
        {"conversations": [MORE[0], {"from": "gpt", "value": " "}]}, {"conversations": [MORE[0], {"from": "gpt"}]},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": [{"text": "b"}]}]},
        {"question": "a", "chosen": "b"}, {"question": "a", "chosen": "b", "rejected": 3}],
    "chosen answer is the rejected one": [
        {"question": "a", "chosen": "b c", "rejected": "b c"},
        {"question": "a", "chosen": "b c", "rejected": " b  c\n"},
        {"question": "a", "chosen": "\u00e9", "rejected": "e\u0301"}],
    "a system text beside a chosen answer": [
        {"image": "a.png", "system": "Be brief.", "question": "a", "chosen": "b", "rejected": "c"}],
    "it has history": [{"instruction": "a", "output": "b", "history": [["c", "d"]]}],
    "it has tools": [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
                      "tools": [{"type": "function"}]}],
    "not to be learned": [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"} | how]}
        for how in ({"weight": 0}, {"weight": 0.0}, {"train": False})] + [
        {"conversations": MORE + [MORE[0], MORE[1] | {"train": False}]}],
    "half a character": [{"instruction": "a", "output": "\ud83d"}],
}


@pytest.mark.parametrize("reason", BAD)
def test_of_no_use_is_counted_with_its_reason_and_number(reason, prepare, tmp_path):
    """G3, G6, G15, G10: refused by prepare, whatever its type, and never by training."""
    raw = [{"conversations": MORE}, *BAD[reason], {"conversations": MORE}]
    code, out, err, made = llava(prepare, tmp_path, raw, "--val_fraction=0")
    assert code == 0 and len(made["train"]) == 2, out + err
    assert f"4 records, {len(BAD[reason])} of no use".replace("4", str(len(raw)), 1) in out
    line, = (x for x in out.splitlines() if reason in x)
    assert line.startswith(f"{len(BAD[reason])} of no use: ") and "raw.json: record 2" in line


RECORDS = {  # of a data set made by hand: what training says of them
    "not a list of texts": [{"image": "a.png", "captions": "A red square."}, {"image": "a.png", "captions": []},
                            {"image": "a.png", "captions": {"a": 1}}],
    "empty or no text": [{"image": "a.png", "captions": ["a", 5]}, {"image": "a.png", "captions": [""]}],
    "captions and no picture": [{"captions": ["A dog."]}],
    "neither captions": [{"image": "a.png"}],
    "no path, no row": [{"image": {"path": "a.png"}, "captions": ["a"]}, {"image": -1, "captions": ["a"]},
                        {"image": 1.0, "captions": ["a"]}, {"image": True, "captions": ["a"]}],
    "elsewhere": [{"image": "a.png", "captions": ["<image> is a dog"]}],
    "the rejected one": [{"image": "a.png", "question": "q", "chosen": "a", "rejected": "a"}],
    "not a list of turns": [{"image": "a.png", "conversations": "hello"}],
    "beside captions or a conversation": [
        {"image": "a.png", "captions": ["c"], "question": "q", "chosen": "a", "rejected": "b"},
        {"image": "a.png", "conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}],
         "question": "q", "chosen": "a", "rejected": "b"}],
}


@pytest.mark.parametrize("reason", RECORDS)
def test_records_by_hand(reason, tmp_path, capsys):
    """G6, G15: save leaves them out; training names file and record in one line."""
    photo(tmp_path / "a.png")
    good = {"image": "a.png", "captions": ["A dog."]}
    images.save({"train": [good, *RECORDS[reason]], "val": [good]}, tmp_path)
    out = capsys.readouterr().out
    assert images.load(tmp_path, "train") == [good]
    assert f"{len(RECORDS[reason])} of no use: " in out and reason in out and "train record 2" in out
    tok, image_id = examples.with_image(tokenizer.byte())
    for record in RECORDS[reason]:
        first = record | {"chosen": "x", "rejected": "x"} if "chosen" in record else good
        write(tmp_path / "train.jsonl", "\n".join(map(json.dumps, [first, record])))
        with pytest.raises(config.Mistake, match=r"train.jsonl, record [12]: .*" + reason) as e:
            examples.Examples(images.load(tmp_path, "train"), tok, 4, 64, {})
        assert "\n" not in str(e.value)


def test_several_pictures_have_captions_too(tmp_path):
    tok, image_id = examples.with_image(tokenizer.byte())
    row, = examples.rows_of({"image": ["a", "b"], "captions": ["Two."]}, tok, {"a": 0, "b": 1})
    assert row.pictures == (0, 1) and list(row.prompt()) == [256, image_id, 10, image_id, 10]


# -- cut to length -------------------------------------------------------------------------------------------------

def read_examples(folder, records, block_size):
    tok, image_id = examples.with_image(tokenizer.byte())
    write(folder / "train.jsonl", "\n".join(map(json.dumps, records)))
    return examples.Examples(images.load(folder, "train"), tok, 4, block_size, {}), tok


@pytest.mark.parametrize("block_size", range(12, 64))
def test_conversations_are_cut_at_whole_turns(block_size, tmp_path):
    """G4: two pictures in two turns, at every length: whole, cut after the first answer, or left out; each is counted.
    """
    short = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    data, tok = read_examples(tmp_path, [{"image": ["a", "b"], "conversations": TALK + TALK}, short], block_size)
    one = 1 + 4 + len("\nWhat?\nA dog.") + 1  # BOS, picture, words, EOS
    rows = [r for rows in data.examples for r in rows if r.pictures]
    turns = 2 if 2 * one - 1 <= block_size + 1 else 1 if one <= block_size + 1 else 0
    assert (data.lost, data.shortened) == (int(turns == 0), int(turns == 1))
    assert [len(r.pictures) for r in rows] == [turns] * (turns > 0)
    for row in rows:
        assert tok.decode(row.ids[row.learn], special=True) == "A dog.</s>" * turns and row.learn[-1]
        x, y, _ = data.collate([[row]])
        assert x.shape[1] <= block_size and (y != -100).sum() == row.learn.sum()


def test_captions_and_pairs_are_whole_or_left_out(tmp_path):
    """G4: a caption without its end teaches to go on and on; a pair needs both answers."""
    long = "A dog runs and runs and runs."
    data, tok = read_examples(tmp_path, [{"image": "a", "captions": ["A dog.", long]}], 20)
    assert [tok.decode(r.ids[r.learn], special=True) for rows in data.examples for r in rows] == ["A dog.</s>"]
    assert (data.lost, data.shortened) == (1, 0)
    pairs = [{"image": "a", "question": "q", "chosen": "a", "rejected": long},
             {"image": "a", "question": "q", "chosen": "a", "rejected": "b"}]
    data, _ = read_examples(tmp_path, pairs, 20)
    assert len(data) == 1 and data.lost == 1


# -- pictures ------------------------------------------------------------------------------------------------------

def chunk(name, data, checksum=None):
    crc = zlib.crc32(name + data) if checksum is None else checksum
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", crc)


def png(*extra, color=(200, 10, 10)):
    """The bytes of a PNG picture with more chunks after its head."""
    file = io.BytesIO()
    Image.new("RGB", (50, 30), color).save(file, "png")
    data = file.getvalue()
    return data[:33] + b"".join(extra) + data[33:]


def test_pictures_that_viewers_open(tmp_path):
    """G13: only what decoding needs may refuse a picture: no text, no profile, no note of a camera."""
    rng = np.random.default_rng(0)
    words = rng.integers(97, 123, 3 << 20, np.uint8).tobytes()
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", words.decode(), zip=True)
    file = io.BytesIO()
    Image.new("RGB", (50, 30), (200, 10, 10)).save(file, "png", pnginfo=info, icc_profile=words)
    files = {"generator.png": file.getvalue(),
             "long.png": png(chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(100 << 20)))),
             "many.png": png(*[chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 20)))] * 80),
             "international.png": png(chunk(b"iTXt", b"a\0\1\0\0\0" + zlib.compress(words))),
             "damaged_text.png": png(chunk(b"zTXt", b"a\0\0no zlib")), "checksum.png": png(chunk(b"tEXt", b"a\0b", 5)),
             "profile.png": png(chunk(b"iCCP", b"a\0\0no zlib")), "exif.png": png(chunk(b"eXIf", b"nothing")),
             "exif_checksum.png": png(chunk(b"eXIf", b"II*\0\x08\0\0\0\0\0", 5))}
    exif = Image.Exif()
    exif[0x0112] = 6
    for name, notes in (("turned.jpg", exif.tobytes()), ("broken.jpg", b"Exif\0\0II*\0\xff\xff\xff\x7f"),
                        ("odd.jpg", b"Exif\0\0" + bytes(range(200)))):
        file = io.BytesIO()
        Image.new("RGB", (50, 30), (200, 10, 10)).save(file, "jpeg", exif=notes, icc_profile=words[:70000])
        files[name] = file.getvalue()
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        for source in tmp_path / name, io.BytesIO(data):
            picture = picture_files.read(source)
            assert picture.size == ((30, 50) if name == "turned.jpg" else (50, 30)), name
            assert np.abs(np.array(picture.getpixel((20, 20))) - (200, 10, 10)).max() < 8, name
    whole = files["generator.png"]
    lost = png().replace(b"IDAT", b"IDAX")
    for name, data in (("cut.png", whole[:-40]), ("head.png", whole[:33]), ("lost.png", lost)):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(config.Mistake, match=name):
            picture_files.read(tmp_path / name)


@pytest.mark.parametrize("values, gray", [
    (np.float32([0, 0.5, 1, np.nan]), [0, 128, 255, 0]), (np.float32([0, 100, 200, np.nan]), [0, 100, 200, 0]),
    (np.float32([-np.inf, 0.2, 1, np.inf]), [0, 51, 255, 255]), (np.float32([-0.02, 0.2, 1, 1.02]), [0, 51, 255, 255]),
    (np.float32([0, 2, 3, 255]), [0, 2, 3, 255]), (np.float32([np.nan] * 4), [0] * 4),
    (np.uint16([0, 257, 65535, 25700]), [0, 1, 255, 100]), (np.uint16([0, 200, 130, 257]), [0, 1, 1, 1])])
def test_deep_gray_becomes_8_bits(values, gray, tmp_path):
    for name in ["a.tiff"] + ["a.png"] * (values.dtype == np.uint16):
        Image.fromarray(values[None]).save(tmp_path / name)
        assert np.array(picture_files.read(tmp_path / name))[0].tolist() == [[x] * 3 for x in gray]


@pytest.mark.parametrize("depth, kind", [(8, 0), (8, 2), (16, 0)])
def test_a_color_that_a_png_calls_transparent_is_white(depth, kind, tmp_path):
    """Gray (0) and RGB (2): the picture's first pixel, where the second is almost the same."""
    size, bands = depth // 8, (1, 3)[kind > 0]
    pixels = bytes([0] * size * bands + [0] * (size * bands - 1) + [100] + [90] * size * bands)
    head = struct.pack(">IIBBBBB", 3, 1, depth, kind, 0, 0, 0)
    chunks = {b"IHDR": head, b"tRNS": bytes(2 * bands), b"IDAT": zlib.compress(b"\0" + pixels), b"IEND": b""}
    (tmp_path / "a.png").write_bytes(picture_files.PNG + b"".join(chunk(*some) for some in chunks.items()))
    made = np.array(picture_files.read(tmp_path / "a.png"))[0].tolist()
    assert made[0] == [255] * 3 and made[1] != [255] * 3 and made[2] == [90] * 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_pictures_are_as_pillow_turns_them(orientation, tmp_path):
    from PIL import ImageOps
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (5, 7, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture.save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as theirs:
        assert picture_files.read(tmp_path / "a.png").tobytes() == ImageOps.exif_transpose(theirs).tobytes()


def test_errors_name_the_whole_path(tmp_path, capsys):
    """G10: of two files with one name, which? In errors and in bad_images.txt."""
    paths = [str(write(tmp_path / folder / "x.jpg", "no picture")) for folder in "ab"]
    good = {"image": str(photo(tmp_path / "a.png")), "captions": ["a"]}
    images.save({"train": [good] + [{"image": p, "captions": ["a"]} for p in paths], "val": [good]}, tmp_path / "o")
    assert (tmp_path / "o/bad_images.txt").read_text().splitlines() == [f"{p}: it is not a picture" for p in paths]
    out = capsys.readouterr().out
    assert f"2 pictures cannot be read and were left out: {paths[0]}" in out and "(with 2 records)" in out


def test_a_folder_whose_name_is_no_utf_8_holds_pictures(prepare, tmp_path):
    folder = tmp_path / "caf\udce9 é"
    photo(folder / "b.png").write_bytes(b"no picture")
    raw = [{"image": name, "conversations": TALK} for name in ("a.png", "b.png")]
    code, out, err, made = llava(prepare, folder, raw, "--val_fraction=0")
    assert code == 0 and [record["image"] for record in made["train"]] == [str(folder / "a.png")]
    assert "caf\\udce9 é" in (folder / "out/bad_images.txt").read_text("utf-8")


def test_what_a_telephone_takes_is_named(tmp_path):
    """HEIC, which Pillow does not open."""
    for brand in b"heic", b"mif1":
        (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftyp" + brand + b"\0\0\0\0mif1heic" + bytes(99))
        with pytest.raises(config.Mistake, match="a.heic: it is HEIC, which cannot be read: convert it to JPEG"):
            picture_files.read(tmp_path / "a.heic")
    with pytest.raises(config.Mistake, match="it is a folder without pictures that can be read, which end in .jpg, "):
        picture_files.read(tmp_path)
    photo(tmp_path / "sub/b.png")
    with pytest.raises(config.Mistake, match="it is a folder$"):
        picture_files.read(tmp_path)


ARRAYS = {  # G16: what images.npy holds, and what is said of it
    "float": (np.zeros((4, 8, 8, 3), np.float32), "uint8"),
    "flat": (np.zeros((4, 8, 8), np.uint8), "N, H, W, 3"),
    "planes": (np.zeros((4, 3, 8, 8), np.uint8), "N, H, W, 3"),
    "rgba": (np.zeros((4, 8, 8, 4), np.uint8), "N, H, W, 3"),
    "empty": (np.zeros((4, 0, 8, 3), np.uint8), "N, H, W, 3"),
    "few": (np.zeros((3, 8, 8, 3), np.uint8), "3 rows, no 3"),
    "objects": (np.array([{}]), "cannot be read"),
    "absent": (None, "0 rows, no 0"),
    "text": (b"not numpy", "cannot be read"),
    "nothing": (b"", "cannot be read"),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_own_arrays_are_checked_at_load(name, tmp_path):
    array, said = ARRAYS[name]
    if isinstance(array, np.ndarray):
        np.save(tmp_path / "images.npy", array)
    elif array is not None:
        (tmp_path / "images.npy").write_bytes(array)
    with pytest.raises(config.Mistake, match=said) as e:
        picture_files.open_array(tmp_path, [0, 1, 3])
    assert "\n" not in str(e.value) and "images.npy" in str(e.value)


def test_pictures_that_went(tmp_path):
    """G7: all that are missing are counted, before anything else is done."""
    photo(tmp_path / "a.png")
    assert picture_files.open_array(tmp_path, ["a.png"]) is None
    np.save(tmp_path / "images.npy", np.zeros((2, 8, 8, 3), np.uint8))
    assert picture_files.open_array(tmp_path, [0, 1, "a.png"]).shape == (2, 8, 8, 3)
    with pytest.raises(config.Mistake, match=r"2 of the 3 pictures .* not there .*/b.png; prepare"):
        picture_files.open_array(tmp_path, ["a.png", "b.png", str(tmp_path / "c.png")])


# -- names and splits ----------------------------------------------------------------------------------------------

NAMES = {"a.jpg": "a.JPG", "b.jpg": "b.png", "Caf\u00e9.jpg": unicodedata.normalize("NFD", "CAF\u00e9.JPEG"),
         "\u72d7.jpg": "\u72d7.Jpg", "with space.jpg": "with space.webp", "f#1.jpg": "f#1.tiff"}


@pytest.mark.parametrize("form", ["folder", "link", "tar", "token.txt"])
def test_flickr8k_finds_photos_by_any_name(form, prepare, tmp_path):
    """G8: whatever the ending, its case, accents and signs in the name; one photo, one record."""
    source = tmp_path / "flickr"
    for i, name in enumerate(NAMES.values()):
        photo((tmp_path if form in ("tar", "link") else source) / "sub" / name, (40 * i, 0, 0))
    if form == "link":
        (source.mkdir() or source / "photos").symlink_to(tmp_path / "sub")
    if form == "tar":
        with tarfile.open(source.mkdir() or source / "all.tar", "w") as tar:
            tar.add(tmp_path / "sub", "photos")
    if form == "token.txt":
        lines = [f"{n}#{i}\tA dog , number {i} ." for n in NAMES for i in range(2)]
        write(source / "Flickr8k.token.txt", "\r\n".join(lines))
    else:
        lines = [f'{n},"A dog , number {i} ."' for n in NAMES for i in range(2)]
        write(source / "captions.txt", "\ufeffimage,caption\n" + "\n".join(lines))
    for split, some in (("train", list(NAMES)), ("dev", ["a.jpg"]), ("test", ["b.jpg"])):
        write(source / f"Flickr_8k.{split}Images.txt", "\n".join(some) + "\n")
    code, out, err = prepare("flickr8k", "--input", source, "--out", tmp_path / "out")
    assert code == 0, err
    train = images.load(tmp_path / "out", "train")
    assert len(train) == len(NAMES) and all(r["captions"] == ["A dog, number 0.", "A dog, number 1."] for r in train)
    reds = [picture_files.read(tmp_path / "out" / r["image"]).getpixel((4, 4))[0] for r in train]
    assert np.abs(np.array(reds) - 40 * np.arange(len(NAMES))).max() < 8
    assert "1 pictures of val are in train too" in out  # G12: said, where others made the split


def test_flickr8k_unpacks_what_it_needs(prepare, tmp_path):
    """--limit=2 of forty photos: six files."""
    source = tmp_path / "flickr"
    for i in range(40):
        photo(tmp_path / f"photos/{i:02}.jpg")
    with tarfile.open(source.mkdir() or source / "all.tar", "w") as tar:
        tar.add(tmp_path / "photos", "photos")
    write(source / "captions.txt", "image,caption\n" + "".join(f"{i:02}.jpg,A dog .\n" for i in range(40)))
    for split, start in (("train", 0), ("dev", 20), ("test", 30)):
        write(source / f"Flickr_8k.{split}Images.txt", "".join(f"{i:02}.jpg\n" for i in range(start, start + 10)))
    code, _, err = prepare("flickr8k", "--input", source, "--out", tmp_path / "out", "--limit=2")
    assert code == 0, err
    assert sorted(p.name for p in (tmp_path / "out/images").iterdir()) == [f"{i}.jpg" for i in
                                                                          ("00", "01", "20", "21", "30", "31")]


def test_folders_behind_links_are_searched_once(tmp_path):
    for name in "a.png", ".b.png", "sub/c.png", ".sub/d.png":
        photo(tmp_path / "elsewhere" / name)
    write(tmp_path / "elsewhere/e.txt", "text")
    (tmp_path / "in").mkdir()
    for link, to in ("in/link", "elsewhere"), ("in/more", "elsewhere"), ("elsewhere/circle", "in"):
        (tmp_path / link).symlink_to(tmp_path / to)
    assert picture_files.below(tmp_path / "in") == ([tmp_path / f"in/link/{n}" for n in ("a.png", "sub/c.png")], 3)


def test_flickr8k_names_a_missing_photo_where_it_was_sought(prepare, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photo(tmp_path / "f/a.jpg")
    write(tmp_path / "f/captions.txt", "image,caption\na.jpg,A dog\nb.jpg,A cat\n")
    for split in "train", "dev", "test":
        write(tmp_path / f"f/Flickr_8k.{split}Images.txt", "a.jpg\nb.jpg\n")
    _, out, err = prepare("flickr8k", "--input", "f", "--out", "out")
    assert f"left out: {tmp_path.resolve() / 'f/b.jpg'}: there is no such file" in out, err


def test_flickr8k_captions_of_no_use(prepare, tmp_path):
    """G6: lines without words, or without a caption, a stray quote; names without captions are counted."""
    photo(tmp_path / "f/a.jpg")
    photo(tmp_path / "f/b.jpg")
    write(tmp_path / "f/captions.txt", 'image,caption\na.jpg,"\na.jpg,...\na.jpg\n\na.jpg,"A dog\na.jpg,A cat , sat\n')
    for split in "train", "dev", "test":
        write(tmp_path / f"f/Flickr_8k.{split}Images.txt", "a.jpg\nb.jpg\na.jpg\n")
    code, out, err = prepare("flickr8k", "--input", tmp_path / "f", "--out", tmp_path / "out")
    assert code == 0, err
    assert [r["captions"] for r in images.load(tmp_path / "out", "train")] == [["A dog.", "A cat, sat."]]
    assert "Flickr_8k.trainImages.txt: 1 of 2 photos have no captions" in out


def test_llava_and_coco_find_photos_by_any_ending(prepare, tmp_path):
    """G8: OCR-VQA's .jpg in LLaVA's list may be a .png or .gif on disk; a byte order mark is no error."""
    for name in "B.PNG", "c.jpeg", "d.txt":
        photo(tmp_path / name) if name != "d.txt" else write(tmp_path / name, "text")
    raw = [{"image": n, "conversations": TALK} for n in ("a.png", "b.jpg", "C.JPG", "d.jpg")]
    code, out, err, made = llava(prepare, tmp_path, raw, "--val_fraction=0")
    assert code == 0 and len(made["train"]) == 3, err
    assert "1 pictures cannot be read" in out and "d.jpg: there is no such file" in out
    for split in "train", "val":
        photo(tmp_path / f"coco/{split}2017/1.JPG")
        write(tmp_path / f"coco/annotations/captions_{split}2017.json", "\ufeff" + json.dumps(
            {"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": [{"image_id": 1, "caption": "A dog ."}]}))
    code, _, err = prepare("coco", "--input", tmp_path / "coco", "--out", tmp_path / "out2")
    assert code == 0 and images.load(tmp_path / "out2", "val")[0]["image"].endswith("1.JPG"), err


@pytest.mark.parametrize("table, said", [
    ([], "not COCO's"), ({"images": []}, "not COCO's"), ({"images": 5, "annotations": []}, "not COCO's"),
    ({"images": ["a"], "annotations": []}, "not COCO's"), ({"images": [], "annotations": ["a"]}, "not COCO's"),
    ({"images": [{"id": 1, "file_name": 5}], "annotations": [{"image_id": 1, "caption": "a"}]}, "not COCO's"),
    ("{", "not COCO's"),
])
def test_coco_of_other_types_is_one_line(table, said, prepare, tmp_path):
    """G6."""
    write(tmp_path / "coco/captions_train2017.json", table)
    write(tmp_path / "coco/captions_val2017.json", table)
    code, _, err = prepare("coco", "--input", tmp_path / "coco", "--out", tmp_path / "out")
    assert code == 2 and said in err and len(err.splitlines()) == 1, err


def test_coco_captions_that_are_no_text_are_counted(prepare, tmp_path):
    """G6: one odd annotation costs itself."""
    for split in "train", "val":
        photo(tmp_path / f"coco/{split}2017/1.jpg")
        write(tmp_path / f"coco/captions_{split}2017.json", {
            "images": [{"id": 1, "file_name": "1.jpg"}],
            "annotations": [{"image_id": 1, "caption": c} for c in ("A dog.", 5, None, " ", ["a"])]})
    code, out, err = prepare("coco", "--input", tmp_path / "coco", "--out", tmp_path / "out")
    assert code == 0 and images.load(tmp_path / "out", "train")[0]["captions"] == ["A dog."], err
    assert "4 captions are empty or no text" in out


def test_pictures_are_held_out_with_all_that_is_said_about_them(prepare, tmp_path):
    """G12: by what the file holds, under any name; pictures that share a record stay together."""
    for i in range(60):
        photo(tmp_path / f"{i}.png", (4 * i, i, 0))
    (tmp_path / "copies").mkdir()
    for i in range(60):
        (tmp_path / f"copies/{i}.png").write_bytes((tmp_path / f"{i}.png").read_bytes())
    raw = [{"image": f"{folder}{i}.png", "instruction": f"{n}?", "output": "a"}
           for n in range(5) for i in range(60) for folder in ("", "copies/", "copies/../")]
    raw += [{"image": [f"{i}.png", f"{i + 1}.png"], "instruction": "both?", "output": "a"} for i in range(0, 60, 2)]
    raw += [{"instruction": f"{i}?", "output": "b"} for i in range(100)]
    code, out, err, made = llava(prepare, tmp_path, raw, "--val_fraction=0.2")
    assert code == 0 and sum(map(len, made.values())) == len(raw), err
    held = [{picture_files.read(p).tobytes() for r in made[s] for p in images.images_of(r)} for s in ("train", "val")]
    assert not held[0] & held[1] and 4 <= len(held[1]) <= 26 and len(held[0]) + len(held[1]) == 60
    assert 8 <= sum("image" not in r for r in made["val"]) <= 32
    again = llava(prepare, tmp_path, raw[::-1], "--val_fraction=0.2")[3]  # the order of records changes nothing
    key = json.dumps
    assert sorted(map(key, again["val"])) == sorted(map(key, made["val"]))


@pytest.mark.parametrize("order", ["one in all", "a chain", "a chain backwards"])
def test_pictures_that_hang_together_take_linear_time(order):
    """20,000 records; their side is that of the least of the hashes."""
    pairs = [[0 if order == "one in all" else i, i + 1] for i in range(20_000)]
    files = {i: hashlib.sha256(str(i).encode()).hexdigest() for i in range(20_002)}
    records = [{"image": pair} for pair in (pairs[::-1] if "back" in order else pairs)] + [{"image": 20_001}]
    start = time.process_time()
    made = llava_script.hold_out(records, files, 0.5)
    assert time.process_time() - start < 2
    side, = [some for some in made.values() if len(some) > 1]
    assert sorted(r["image"] for r in side) == pairs and sum(map(len, made.values())) == 20_001
    least, alone = (text.hash_of(min(files[i] for i in some)) for some in (range(20_001), [20_001]))
    assert (side is made["val"]) == (least < alone)


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("fraction", [0, 0.02, 0.99])
def test_few_records_still_make_both_splits(count, fraction, prepare, tmp_path):
    """G10: no empty validation split, and no empty training split, where there are two records."""
    raw = [{"instruction": f"{i}?", "output": "b"} for i in range(count)]
    code, out, err, made = llava(prepare, tmp_path, raw, f"--val_fraction={fraction}")
    assert code == 0 and bool(made["val"]) == (count > 1 and fraction > 0) and made["train"], err
    assert ("val has no records" in out) == (not made["val"])


def test_what_an_earlier_preparation_left_is_no_split_of_this_one(tmp_path):
    """Its test pictures may be in training now."""
    good = {"conversations": MORE}
    images.save({split: [good] for split in images.SPLITS}, tmp_path / "data")
    images.save({"train": [good], "val": [good]}, tmp_path / "data")
    with pytest.raises(config.Mistake, match="only train and val"):
        images.load(tmp_path / "data", "test")


def test_answers_of_one_question_in_several_records_count_together(tmp_path):
    """Five captions in one line or in five count alike, equal ones each, as pycocoevalcap averages over all; a rejected
    answer is no reference."""
    lines = [{"image": "a", "captions": some} for some in (["A dog."], ["A brown dog.", "A dog."], ["A dog."])]
    data, _ = read_examples(tmp_path, lines, 60)
    for _ in range(2):  # to ask again changes nothing
        row, = data.questions()
        assert row.answers == ("A dog.", "A brown dog.", "A dog.", "A dog.")
    data, _ = read_examples(tmp_path, [{"image": "a", "question": "q", "chosen": "yes", "rejected": "no"}], 60)
    row, = data.questions()
    assert row.kind == "chosen" and row.answers == ("yes",)


SEEN = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "A dog."}]
SAID = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "A cat."}]


@pytest.mark.parametrize("raw, turns, count", [
    ({"images": ["a.png"], "conversations": SEEN}, SEEN, 1), ({"images": "a.png", "conversations": SEEN}, SEEN, 1),
    ({"image": "", "images": ["a.png"] * 2, "conversations": MORE}, MORE, 2),
    ({"image": None, "image_path": "a.png", "conversations": SEEN}, SEEN, 1),
    ({"system": "Be brief.", "messages": SAID[1:]}, SYSTEM + MORE, 0),
    ({"system": "Be brief.", "images": ["a.png"], "conversations": SEEN}, SYSTEM + SEEN, 1),
    ({"system": "Be brief.", "instruction": "And?", "output": "A cat."}, SYSTEM + MORE, 0),
    ({"images": ["a.png"], "messages": PARTS}, TALK, 1),
    ({"messages": [SAID[1] | {"weight": 0}, SAID[2] | {"weight": 1, "train": None}]}, MORE, 0),
    ({"messages": SAID}, SYSTEM + MORE, 0), ({"messages": SAID, "images": ["a.png"]}, SYSTEM + MORE, 1)])
def test_other_words_for_the_same(raw, turns, count, prepare, tmp_path):
    """`images`, `image_path`, `messages`, also in parts, and `system`."""
    code, out, err, made = llava(prepare, tmp_path, [{"conversations": MORE}, raw], "--val_fraction=0")
    assert made["train"][1]["conversations"] == turns and len(images.images_of(made["train"][1])) == count


def test_an_instruction_has_its_input(prepare, tmp_path):
    raw = [{"instruction": "Translate.", "input": "Hi", "output": "Salut"}]
    made = llava(prepare, tmp_path, raw, "--val_fraction=0")[3]["train"]
    assert made[0]["conversations"][0]["value"] == "Translate.\n\nHi"


def test_a_data_set_goes_before_a_folder_of_its_name(tmp_path, monkeypatch):
    """Downloads lie in a folder of the data set's name; a path with a separator is that path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(config, "ROOT", tmp_path / "project")
    (tmp_path / "coco").mkdir()
    found = [runs.folder_of(train.TrainConfig(dataset=name)) for name in ("coco", "./coco", "nowhere")]
    (tmp_path / "project/data/coco").mkdir(parents=True)
    found += [runs.folder_of(train.TrainConfig(dataset=name)) for name in ("coco", f"{tmp_path}/coco")]
    raw, prepared = tmp_path / "coco", tmp_path / "project/data/coco"
    assert [path.resolve() for path in found] == [raw, raw, tmp_path / "project/data/nowhere", prepared, raw]
    kept = [runs.facts_of_run(train.TrainConfig(dataset=name), LlamaConfig(), [])["settings"]["dataset"]
            for name in ("coco", "./coco")]
    assert kept == ["coco", str(raw)]  # so that a run goes on with the same data, from any folder


def test_splits_that_are_not_there(tmp_path):
    """G10: the message says which splits there are, and what is wrong with an empty one."""
    good = {"conversations": MORE}
    images.save({"train": [good], "val": []}, tmp_path / "shapes")
    with pytest.raises(config.Mistake, match="only train and val"):
        images.load(tmp_path / "shapes", "test")
    tokenizer.byte().save(tmp_path / "tales")
    with pytest.raises(config.Mistake, match="tales: it holds text, which is for train.py"):
        images.load(tmp_path / "tales", "train")
    with pytest.raises(config.Mistake, match="run `python prepare/coco.py` first"):
        images.load(tmp_path / "coco", "train")
    tok, image_id = examples.with_image(tokenizer.byte())
    with pytest.raises(config.Mistake, match="val.jsonl has no records"):
        examples.Examples(images.load(tmp_path / "shapes", "val"), tok, 4, 64, {})


def test_a_data_set_can_be_prepared_again_after_training(prepare, tmp_path):
    """What vlm.py keeps in it is no stranger's."""
    (tmp_path / "out/features").mkdir(parents=True)
    assert llava(prepare, tmp_path, [{"conversations": MORE}])[0] == 0
