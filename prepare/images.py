"""Images on their way in, and the records that vlm.py trains on.

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
import contextlib
import hashlib
import json
import os
import re
import unicodedata
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

import config
from prepare import picture_files, shards, tokenizer

SPLITS = ("train", "val", "test")
IMAGE = "<image>"
ROLES = {"human": "user", "gpt": "assistant", "system": "system"}  # LLaVA's words: those of chat templates
TURNS = ("{{ bos_token or '' }}{% for m in messages %}{{ m['content'] }}"  # for tokenizers without a chat template
         "{{ eos_token if m['role'] == 'assistant' else '\\n' }}{% endfor %}")
FILES = r"((train|val|test)\.jsonl|bad_images\.txt|images\.npy|meta\.json)(\.\d+)?(\.tmp)?|images|features"
HALVES = re.compile("[\ud800-\udfff]")  # surrogates, which JSON can hold and no UTF-8 file
NAMED = 3  # records that are named for each reason why some are left out


@dataclass
class Settings:
    """What the prepare scripts for pictures share."""
    input: str | None = None  # folder with the downloaded files, in the data set's own layout; None: the hub
    out: str | None = None  # folder to write; None: data/<name of the script>, which vlm.py finds by that name
    limit: int | None = None  # [1, inf) stop after this many images of each split; None: all of them


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
    """What is said in a record: [(kind, [(role, text), ...]), ...], each picture placed by one mark in a user's turn.

    kind: caption, answer, chosen or rejected. Raises ValueError, with the reason, for a record that is not as the first
    lines of this file say, or that teaches nothing."""
    pictures, found = images_of(record), []
    need(all(isinstance(p, str) and p or type(p) is int and p >= 0 for p in pictures),
         "its image is no path, no row of images.npy and no list of those")
    if "captions" in record:
        captions = record["captions"]
        need(isinstance(captions, list) and captions, "its captions are not a list of texts")
        need(pictures, "it has captions and no picture")
        found += [("caption", [("user", IMAGE * len(pictures)), ("assistant", text)]) for text in captions]
    if "conversations" in record:
        turns = record["conversations"]
        need(isinstance(turns, list) and turns and all(isinstance(t, dict) for t in turns),
             "its conversations are not a list of turns")
        need(all(t.get("from") in list(ROLES) for t in turns), f"its turns are not all from {', '.join(ROLES)}")
        found.append(("answer", [(ROLES[t["from"]], t.get("value")) for t in turns]))
    if "chosen" in record:
        found += [(key, [("user", record.get("question")), ("assistant", record.get(key))])
                  for key in ("chosen", "rejected")]
    need(found, "it has neither captions, conversations nor a chosen answer")
    found = [(kind, placed(talk, len(pictures))) for kind, talk in found]
    if "chosen" in record:
        chosen, rejected = (" ".join(unicodedata.normalize("NFC", record[k]).split()) for k in ("chosen", "rejected"))
        need(chosen != rejected, "its chosen answer is the rejected one")
    return found


def placed(talk, count):
    """talk, [(role, text), ...], with a mark for each of `count` pictures. Raises ValueError where it is no talk."""
    need(all(isinstance(text, str) and (text.strip() or role == "system") for role, text in talk),
         "one of its texts is empty or no text")
    need(not any(HALVES.search(text) for _, text in talk), "one of its texts has half a character")
    roles = [role for role, _ in talk]
    first = int(roles[0] == "system")
    need(roles[first:] and roles[first:] == ["user", "assistant"] * (len(roles) // 2),
         "its turns do not go from human to gpt and back")
    marks = sum(text.count(IMAGE) for role, text in talk if role == "user")
    need(marks == sum(text.count(IMAGE) for _, text in talk), f"{IMAGE} stands elsewhere than in the human's words")
    need(marks in (0, count), f"it has {count} pictures and {marks} {IMAGE} marks")
    begin = "user", with_pictures(talk[first][1], 0 if marks else count)
    return [*talk[:first], begin, *talk[first + 1:]]


class Sieve:
    """Takes records in; counts those that are of no use, with the reason. Each picture is decoded once."""

    def __init__(self, folder):
        """folder: that of the data set, from which relative paths begin."""
        self.folder, self.refused = Path(folder), {}  # {reason: [where, ...]}
        self.pictures, self.bad, self.blind = {}, [], 0  # {path: hash or None}, why not, records left out for that

    @contextlib.contextmanager
    def refusing(self, where):
        """Within this block a ValueError is the reason why the record at `where` is of no use."""
        try:
            yield
        except ValueError as e:
            self.refused.setdefault(" ".join(str(e).split()), []).append(where)

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

    def keep(self, records, what, progress=True):
        """Those of use among {number: record}, which are named "`what` <number>"."""
        from tqdm import tqdm
        kept = []
        for n, record in tqdm(records.items(), f"checking {Path(what).name}", unit=" records", disable=not progress):
            with self.refusing(f"{what} {n}"):
                talks_of(record)
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


def save(records, folder, splits=SPLITS, progress=True, sieve=None):
    """Write {split}.jsonl for {split: list of records}, leaving out those of no use, which are counted and named.

    Pictures that cannot be read are listed in bad_images.txt. sieve: has seen the records already. Raises `Mistake`
    when nothing is left of the training split."""
    kept = {s: records[s] for s in splits if s in records}
    if sieve is None:
        sieve = Sieve(folder)
        kept = {s: sieve.keep(dict(enumerate(some, 1)), f"{s} record", progress) for s, some in kept.items()}
    folder, reasons = Path(folder), list(sieve.reasons())
    if "train" in splits and not kept.get("train"):
        raise config.Mistake("no usable record is left for training: " + ("; ".join(reasons) or "there are none"))
    with config.mistakes(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    for split, some in kept.items():
        shards.write_text(folder / f"{split}.jsonl", "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in some))
        print(f"{split}: {len(some):,} records, {len({p for r in some for p in images_of(r)}):,} images")
    print("".join(line + "\n" for line in reasons), end="")
    if sieve.bad:
        shards.write_text(folder / "bad_images.txt", "".join(line + "\n" for line in sieve.bad))
        print(f"the unreadable pictures are listed in {folder / 'bad_images.txt'}")
    else:
        (folder / "bad_images.txt").unlink(missing_ok=True)
    shown = {s: {sieve.pictures.get(p, p) for r in some for p in images_of(r)} for s, some in kept.items()}
    for split in shown.keys() - {"train"}:
        if both := len(shown[split] & shown.get("train", set())):
            print(f"{both:,} pictures of {split} are in train too: what {split} measures is partly learned by heart")
    if "val" in kept and not kept["val"]:
        print("val has no records, and vlm.py needs some to train: hold out more")


def load(folder, split):
    """The records of a split, list of dict. Raises `Mistake` for a missing data set and for a damaged line."""
    folder = Path(folder)
    path = folder / f"{split}.jsonl"
    if not path.is_file():
        script, there = f"prepare/{folder.name}.py", [s for s in SPLITS if (folder / f"{s}.jsonl").is_file()]
        hint = f"run `python {script}` first" if (config.ROOT / script).is_file() else "there is no such data set"
        raise config.Mistake(f"no {path}: " + (f"this data set has only {' and '.join(there)}" if there else hint))
    return read_json(path)


def read_json(path):
    """The objects of a .json list or of a .jsonl file."""
    with config.mistakes(OSError, ValueError, RecursionError, prefix=f"{path} cannot be read: "):
        text = Path(path).read_text(encoding="utf-8-sig")
        whole = text.lstrip().startswith("[")
        found = json.loads(text) if whole else [json.loads(line) for line in text.split("\n") if line.strip()]
        if not all(isinstance(r, dict) for r in found):
            raise ValueError("it is not a list of objects")
    return found


def json_of(path):
    """What a JSON file holds, with or without a byte order mark."""
    return json.loads(Path(path).read_text(encoding="utf-8-sig"))


def from_hub(name, folder, limit, words):
    """{split: records} of a hub data set with a column `image`, whose pictures are kept in folder/images.

    words(row): the record's captions. Rows of one picture become one record."""
    from datasets import Image, load_dataset
    from tqdm import tqdm
    records, place = {}, Path(folder) / "images"
    place.mkdir(parents=True, exist_ok=True)
    for split, theirs in (("train", "train"), ("val", "validation"), ("test", "test")):
        with config.mistakes(Exception, prefix=f"the hub did not give {name} (use --input FOLDER instead): "):
            rows = load_dataset(name, split=theirs, streaming=True).cast_column("image", Image(decode=False))
            found = {}
            for row in tqdm(rows, desc=f"{name} {split}", unit=" rows"):
                data = row["image"]["bytes"]
                path = f"images/{hashlib.sha256(data).hexdigest()[:20]}.jpg"
                if path in found:
                    found[path]["captions"] += words(row)["captions"]
                elif limit is None or len(found) < limit:
                    (place / Path(path).name).write_bytes(data)
                    found[path] = {"image": path, **words(row)}
        records[split] = list(found.values())
    return records


# -- examples: what a model reads and what it is to learn of it --------------------------------------------------

def with_image(tok):
    """(tokenizer in which <image> is one token and conversations have a form, id of <image>)."""
    settings = tok.settings if tok.chat_template else tok.settings | {"chat_template": TURNS}
    added = [t for t in tok.spec.get("added_tokens") or [] if t["content"] == IMAGE]
    if not added:  # not special, so that chat() takes it for an image within a message
        added = [{"id": tok.vocab_size, "content": IMAGE, "single_word": False, "lstrip": False, "rstrip": False,
                  "normalized": False, "special": False}]
        tok = tokenizer.Tokenizer(tok.spec | {"added_tokens": [*(tok.spec.get("added_tokens") or []), *added]},
                                  settings, tok.model)
    if tok.eos_id is None:
        raise config.Mistake("this tokenizer has no EOS, so captions could not end")
    return tok, added[0]["id"]


@dataclass
class Row:
    """One example: ids with one image_id for each picture, which to learn, pictures by number, accepted answers."""
    ids: np.ndarray
    learn: np.ndarray
    pictures: tuple
    answers: tuple
    kind: str

    def prompt(self):
        return self.ids[:self.learn.argmax()]


def caption_prompt(tok, count=1):
    """ids after which a caption follows: each picture on a line of its own, as in a conversation."""
    return tok.encode((IMAGE + "\n") * count, bos=True)


@lru_cache(maxsize=2**16)  # many pictures are asked the same and answer alike: tokenized once, and kept once
def spans(tok, turns):
    """ids of a conversation ((role, text), ...), and which of them are the assistant's words and endings."""
    messages = [{"role": role, "content": text} for role, text in turns]
    ids = tok.chat(messages, add_generation_prompt=False)
    learn = np.zeros(len(ids), bool)
    for i, m in enumerate(messages):
        if m["role"] == "assistant":
            before = tok.chat(messages[:i])
            if ids[:len(before)] != before:
                raise config.Mistake("this chat template changes earlier turns, so answers cannot be told from prompts")
            end = next((n for n in range(len(before), len(ids)) if ids[n] in tok.stop_ids), len(ids) - 1)
            learn[len(before):end + 1] = True
    return np.array(ids, np.int32), learn


def rows_of(record, tok, number):
    """The examples in a record; number: {picture: its number}, to which the record's pictures are added. A pair of
    preferences is two rows, chosen and rejected. Raises `Mistake` for a record that is of no use."""
    with config.mistakes(ValueError):
        talks = talks_of(record)
    pictures, found = tuple(number.setdefault(p, len(number)) for p in images_of(record)), []
    for kind, talk in talks:
        answer = next(text for role, text in talk if role == "assistant")
        if kind == "caption":
            prompt = caption_prompt(tok, len(pictures))
            ids = np.array(prompt + tok.encode(answer, eos=True), np.int32)
            learn, answers = np.arange(len(ids)) >= len(prompt), tuple(record["captions"])
        else:
            (ids, learn), answers = spans(tok, tuple(talk)), (answer,)
        found.append(Row(ids, learn, pictures, answers, kind))
    return found


def spread(ids, image_id, image_tokens):
    """ids (n,) with every image_id repeated image_tokens times."""
    return np.repeat(ids, np.where(ids == image_id, image_tokens, 1))


class Examples:
    """What a model reads of a split: each example is the rows about one picture that begin alike, or a chosen and a
    rejected row. Rows longer than block_size are cut after their last answer that ends within it, and left out where
    there is none; `shortened` and `lost` count them."""

    def __init__(self, folder, split, tok, image_id, image_tokens, block_size, number):
        """number: {picture: its number}, to which the split's pictures are added."""
        from tqdm import tqdm
        self.image_id, self.image_tokens = image_id, image_tokens
        self.examples, self.pairs, self.lost, self.shortened = [], False, 0, 0
        last, path, records = {}, Path(folder) / f"{split}.jsonl", load(folder, split)
        if not records:
            raise config.Mistake(f"{path} has no records: prepare the data again, with some for {split}")
        self.pairs = "chosen" in records[0]
        quiet = os.environ.get("RANK", "0") != "0"
        for n, record in enumerate(tqdm(records, f"reading {split}", unit=" records", leave=False, delay=2,
                                        disable=quiet), 1):
            with config.mistakes(config.Mistake, prefix=f"{path}, record {n}: "):
                if ("chosen" in record) != self.pairs:
                    raise config.Mistake("pairs of answers stand among other records: keep them in a data set apart")
                rows = rows_of(record, tok, number)
                fits = [self.cut(row, block_size) for row in rows]
            for some, fit in [(rows, all(fits))] if self.pairs else [([r], fit) for r, fit in zip(rows, fits)]:
                if not fit:
                    self.lost += 1
                    continue
                beginning = None if self.pairs else self.beginning(some[0])
                trunk = self.trunk(some[0])
                line, used = last.get(beginning, ([], trunk))
                branches = self.length(some) - trunk
                if not line or used + branches > block_size:
                    line, used = [], trunk
                    self.examples.append(line)
                line += some
                if beginning is not None:
                    last[beginning] = line, used + branches
        if not self.examples:
            raise config.Mistake(f"{path}: no example of {len(records):,} records fits block_size={block_size}; a "
                                 f"picture alone takes {image_tokens} tokens")

    def beginning(self, row):
        """What rows must share to be read as branches of one sequence: pictures, and the ids up to the last of them.
        None where there is no picture, or where the id right after it is to be learned: no branch predicts that one."""
        end = len(row.ids) - int((row.ids == self.image_id)[::-1].argmax())
        return (row.pictures, row.ids[:end].tobytes()) if row.pictures and not row.learn[end] else None

    def trunk(self, row):
        """Positions up to the end of a row's last picture; 0 without one."""
        if not row.pictures:
            return 0
        end = len(row.ids) - (row.ids == self.image_id)[::-1].argmax()
        return int(self.widths(row)[:end].sum())

    def length(self, rows):
        """Positions of a sequence in which these rows share their trunk."""
        return sum(int(self.widths(row).sum()) - self.trunk(row) for row in rows) + self.trunk(rows[0])

    def cut(self, row, block_size):
        """Cut a row that is too long after the last answer that ends within block_size; False if none does."""
        if (row.ids == self.image_id).sum() != len(row.pictures):
            raise config.Mistake(f"the chat template does not keep the {len(row.pictures)} {IMAGE} marks")
        room = self.widths(row).cumsum() <= block_size + 1  # the last id is never read, only learned
        if not room[-1]:
            ends = np.flatnonzero(row.learn & room & ~np.append(row.learn[1:], False))
            if not len(ends):
                return False
            keep = ends[-1] + 1
            self.shortened += bool(row.learn[keep:].any())
            row.ids, row.learn = row.ids[:keep], row.learn[:keep]
            row.pictures = row.pictures[:(row.ids == self.image_id).sum()]
        return True

    def __len__(self):
        return len(self.examples)

    def lines(self, which):
        """The rows of the examples numbered `which`, by the sequences in which they are read: pairs make two of them,
        all the chosen and then all the rejected ones."""
        some = [self.examples[i] for i in which]
        return [[rows[k]] for k in range(2) for rows in some] if self.pairs else some

    def collate(self, lines):
        """Inputs, targets and positions (B, T) int64 of `lines`, padded on the right. Targets are -100 where there is
        nothing to learn. Rows that share a beginning branch off after it; positions are None where no line has two."""
        made = []
        for rows in lines:
            parts = [[], [], []]
            for n, row in enumerate(rows):
                ids = spread(row.ids, self.image_id, self.image_tokens)
                learn = np.repeat(row.learn, self.widths(row))
                after = self.trunk(row) if n else 0  # where the branch begins
                for part, values in zip(parts, (ids[:-1], np.where(learn, ids, -100)[1:], np.arange(len(ids) - 1))):
                    part.append(values[after:])
            made.append([np.concatenate(part) for part in parts])
        T = max(len(ids) for ids, *_ in made)
        x, y, positions = (np.full((len(made), T), fill, np.int64) for fill in (0, -100, 0))
        for i, parts in enumerate(made):
            for whole, part in zip((x, y, positions), parts):
                whole[i, :len(part)] = part
        return x, y, positions if max(map(len, lines)) > 1 else None

    def widths(self, row):
        """Positions that each id of a row takes, (n,)."""
        return np.where(row.ids == self.image_id, self.image_tokens, 1)

    def questions(self):
        """One row for each picture and prompt (not one for each of its captions)."""
        seen = {}
        for rows in self.examples:
            for row in rows:
                seen.setdefault((row.pictures, row.prompt().tobytes()), row)
        return list(seen.values())
