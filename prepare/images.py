"""Records about pictures, which vlm.py trains on: their form, what is refused, their files.

A prepared data set is a folder with {train,val,test}.jsonl, one record a line, in LLaVA's and RLAIF-V's words:
    {"image": "a.jpg", "captions": ["A dog runs.", ...]}                       alternatives, each an example of its own
    {"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
                                         {"from": "gpt", "value": "A dog."}, ...]}
    {"image": "a.jpg", "question": "What is it?", "chosen": "A dog.", "rejected": "A cat."}
`image` is a path (absolute or from the folder), a row of the folder's images.npy (N, H, W, 3), or a list of those;
without it the record is text only. A conversation may begin with one turn from "system". `<image>` stands in the
human's turns, once for each picture, or nowhere: then the pictures come before the first of them. Other keys are left
alone.
"""
import hashlib
import json
import re
import unicodedata
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from tqdm import tqdm

import config
from prepare import picture_files, shards

SPLITS = ("train", "val", "test")
IMAGE = "<image>"
ROLES = {"human": "user", "gpt": "assistant", "system": "system"}  # LLaVA's words: those of chat templates
FILES = r"((train|val|test)\.jsonl|bad_images\.txt|images\.npy|meta\.json)(\.\d+)?(\.tmp)?|images|features"
HALVES = re.compile("[\ud800-\udfff]")  # surrogates, which JSON can hold and no UTF-8 file
NOT_FROM = f"its turns are not all from {', '.join(ROLES)}"
NAMED = 3  # records that are named for each reason why some are left out


@dataclass
class Settings:
    """What the prepare scripts for pictures share."""
    input: str | None = None  # folder with the downloaded files, in the data set's own layout; None: the hub
    out: str | None = None  # folder to write; None: data/<name of the script>, which vlm.py finds by that name
    limit: int | None = None  # [1, inf) keep this many images of each split (the hub's are all read); None: all


# -- records -----------------------------------------------------------------------------------------------------

def images_of(record):
    """The pictures of a record, in order, as a list."""
    image = record.get("image")
    return image if isinstance(image, list) else [] if image is None else [image]


def need(holds, reason):
    """Raise ValueError with this reason unless it holds."""
    if not holds:
        raise ValueError(reason)


def with_pictures(text, count):
    """text, begun by <image> for each of `count` pictures that it does not place itself."""
    return text if IMAGE in text else (IMAGE + "\n") * count + text


def talks_of(record):
    """What is said in a record: [(kind, ((role, text), ...)), ...], each picture placed by one mark in a user's turn.

    kind: caption, answer, chosen or rejected. Raises ValueError, with the reason, for a record that is not as the first
    lines of this file say, or that teaches nothing."""
    pictures, found = images_of(record), []
    need(all([type(p) is int and p >= 0 or isinstance(p, str) and p for p in pictures]),
         "its image is no path, no row of images.npy and no list of those")
    if "captions" in record:
        captions = record["captions"]
        need(isinstance(captions, list) and captions, "its captions are not a list of texts")
        need(pictures, "it has captions and no picture")
        found += [("caption", (("user", IMAGE * len(pictures)), ("assistant", text))) for text in captions]
    if "conversations" in record:
        turns = record["conversations"]
        need(isinstance(turns, list) and {*map(type, turns)} == {dict}, "its conversations are not a list of turns")
        talk = tuple([(ROLES.get(str(turn.get("from"))), turn.get("value")) for turn in turns])
        need(all([role for role, _ in talk]), NOT_FROM)
        found.append(("answer", talk))
    if "chosen" in record:
        need(not found, "it has a chosen answer beside captions or a conversation")
        found += [(key, (("user", record.get("question")), ("assistant", record.get(key))))
                  for key in ("chosen", "rejected")]
    need(found, "it has neither captions, conversations nor a chosen answer")
    need({type(text) for _, talk in found for _, text in talk} == {str}, "one of its texts is empty or no text")
    found = [(kind, placed(talk, len(pictures))) for kind, talk in found]
    if "chosen" in record:
        chosen, rejected = (" ".join(unicodedata.normalize("NFC", record[k]).split()) for k in ("chosen", "rejected"))
        need(chosen != rejected, "its chosen answer is the rejected one")
    return found


@lru_cache(maxsize=2**14)  # many pictures are asked the same
def placed(talk, count):
    """talk, ((role, text), ...), with a mark for each of `count` pictures. Raises ValueError where it is no talk."""
    need(all(text.strip() or role == "system" for role, text in talk), "one of its texts is empty or no text")
    need(not any(HALVES.search(text) for _, text in talk), "one of its texts has half a character")
    roles = [role for role, _ in talk]
    first = int(roles[0] == "system")
    need(roles[first:] and roles[first:] == ["user", "assistant"] * (len(roles) // 2),
         "its turns do not go from human to gpt and back")
    marks = sum(text.count(IMAGE) for role, text in talk if role == "user")
    need(marks == sum(text.count(IMAGE) for _, text in talk), f"{IMAGE} stands elsewhere than in the human's words")
    need(marks in (0, count), f"it has {count} pictures and {marks} {IMAGE} marks")
    return *talk[:first], ("user", with_pictures(talk[first][1], 0 if marks else count)), *talk[first + 1:]


# -- what is kept of others' records -----------------------------------------------------------------------------

class Sieve:
    """Takes records in; counts those that are of no use, with the reason. Each picture is decoded once."""

    def __init__(self, folder):
        """folder: that of the data set, from which relative paths begin."""
        self.folder, self.refused = Path(folder), {}  # {reason: [where, ...]}
        self.pictures, self.bad, self.blind = {}, [], 0  # {path: hash or None}, why not, records left out for that

    def picture(self, path):
        """The hash of a picture's file; None where it is no picture."""
        if path not in self.pictures:
            try:
                picture_files.read(self.folder / path)
                self.pictures[path] = hashlib.sha256((self.folder / path).read_bytes()).hexdigest()
            except (config.Mistake, OSError, ValueError) as e:
                self.pictures[path] = None
                self.bad.append(" ".join(str(e).split()))
        return self.pictures[path]

    def keep(self, records, what, change=lambda record: record):
        """change(record) of each record, where that is of use. One that is refused is named "`what` <number>"."""
        kept, bar = [], tqdm(records, f"checking {Path(what).name}", unit=" records", leave=False, delay=2)
        for n, record in enumerate(bar, 1):
            try:
                record = change(record)
                talks_of(record)
            except ValueError as e:
                self.refused.setdefault(" ".join(str(e).split()), []).append(f"{what} {n}")
                continue
            if all([self.picture(p) for p in images_of(record) if isinstance(p, str)]):
                kept.append(record)
            else:
                self.blind += 1
        return kept

    def reasons(self):
        """One line for each reason why records are left out."""
        for reason, where in sorted(self.refused.items(), key=lambda item: -len(item[1])):
            yield f"{len(where):,} of no use: {reason} ({', '.join(where[:NAMED])}{', ...' * (len(where) > NAMED)})"
        if self.bad:
            yield (f"{len(self.bad):,} pictures cannot be read and were left out: {self.bad[0]} "
                   f"(with {self.blind:,} records)")


def save(records, folder, sieve=None):
    """Write {split}.jsonl for {split: list of records}, leaving out those of no use, which are counted and named.

    Pictures that cannot be read are listed in bad_images.txt. sieve: has seen the records already. Raises `Mistake`
    when nothing is left of the training split."""
    if sieve is None:
        sieve = Sieve(folder)
        records = {split: sieve.keep(some, f"{split} record") for split, some in records.items()}
    folder, reasons = Path(folder), list(sieve.reasons())
    if not records.get("train"):
        raise config.Mistake("no usable record is left for training: " + ("; ".join(reasons) or "there are none"))
    folder.mkdir(parents=True, exist_ok=True)
    for split in {*SPLITS} - records.keys():  # of an earlier preparation: its pictures may be in training now
        (folder / f"{split}.jsonl").unlink(missing_ok=True)
    pictures = {split: {p for r in some for p in images_of(r)} for split, some in records.items()}
    for split, some in records.items():
        shards.write_text(folder / f"{split}.jsonl", "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in some))
        print(f"{split}: {len(some):,} records, {len(pictures[split]):,} images")
    print("".join(line + "\n" for line in reasons), end="")
    (folder / "bad_images.txt").unlink(missing_ok=True)
    if sieve.bad:
        shards.write_text(folder / "bad_images.txt", "".join(line + "\n" for line in sieve.bad))
        print(f"the unreadable pictures are listed in {folder / 'bad_images.txt'}")
    shown = {split: {sieve.pictures.get(p, p) for p in some} for split, some in pictures.items()}
    for split in shown.keys() - {"train"}:
        if both := len(shown[split] & shown["train"]):
            print(f"{both:,} pictures of {split} are in train too: what {split} measures is partly learned by heart")
    if not records.get("val", True):
        print("val has no records, and vlm.py needs some to train: hold out more")


# -- files -------------------------------------------------------------------------------------------------------

class Records(list):
    """The records of a split, and `path`, that of their file."""

    def each(self, function):
        """function(record) of each record, one after the other. Its errors are one line that names the record."""
        for n, record in enumerate(self, 1):
            try:
                yield function(record)
            except (ValueError, config.Mistake) as e:
                raise config.Mistake(f"{self.path}, record {n}: {' '.join(str(e).split())}") from e


def load(folder, split):
    """The `Records` of a split. Raises `Mistake` for a missing data set and for a damaged line."""
    folder = Path(folder)
    path = folder / f"{split}.jsonl"
    if not path.is_file():
        if (folder / "tokenizer.json").is_file():
            raise config.Mistake(f"{folder}: it holds text, which is for train.py")
        there = " and ".join(s for s in SPLITS if (folder / f"{s}.jsonl").is_file())
        raise config.Mistake(f"no {path}: " + (f"this data set has only {there}" if there else
                                               shards.how_to_make(folder, "there is no such data set")))
    records = Records(read_json(path))
    records.path = path
    return records


def read_json(path):
    """The objects of a .json list or of a .jsonl file."""
    with config.mistakes(OSError, ValueError, RecursionError, prefix=f"{path} cannot be read: "):
        text = Path(path).read_text(encoding="utf-8-sig")
        if not text.lstrip().startswith("["):
            text = "[" + ",\n".join(line for line in text.split("\n") if line.strip()) + "]"  # read at once: faster
        found = json.loads(text)
        if not all(isinstance(r, dict) for r in found):
            raise ValueError("it is not a list of objects")
    return found


# -- data sets of captions ---------------------------------------------------------------------------------------

def prepare(cfg, name, hub, from_folder, captions):
    """Write data/`name`, or cfg.out, from {split: records} = from_folder(input, out, limit), or else from the hub."""
    out = shards.own_folder(cfg.out or config.ROOT / "data" / name, FILES, [cfg.input] if cfg.input else [])
    save(from_folder(Path(cfg.input), out, cfg.limit) if cfg.input else from_hub(hub, out, cfg.limit, captions), out)


def from_hub(name, folder, limit, captions):
    """{split: records} of a hub data set with a column `image`, whose pictures are kept in folder/images.

    captions(row): those of a row, a list. Rows of one picture become one record."""
    from datasets import Image, load_dataset
    records = {}
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for split, theirs in (("train", "train"), ("val", "validation"), ("test", "test")):
        with config.mistakes(Exception, prefix=f"the hub did not give {name} (use --input FOLDER instead): "):
            rows = load_dataset(name, split=theirs, streaming=True).cast_column("image", Image(decode=False))
            found = {}
            for row in tqdm(rows, desc=f"{name} {split}", unit=" rows"):
                data = row["image"]["bytes"]
                path = f"images/{hashlib.sha256(data).hexdigest()[:20]}.jpg"
                if path in found:
                    found[path]["captions"] += captions(row)
                elif limit is None or len(found) < limit:
                    (folder / path).write_bytes(data)
                    found[path] = {"image": path, "captions": captions(row)}
        records[split] = list(found.values())
    return records
