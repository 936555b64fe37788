"""Images on their way in, and the records that vlm.py trains on.

A prepared data set is a folder with {train,val,test}.jsonl, one record a line, in LLaVA's and RLAIF-V's words:
    {"image": "a.jpg", "captions": ["A dog runs.", ...]}                       alternatives, each an example of its own
    {"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
                                         {"from": "gpt", "value": "A dog."}, ...]}
    {"image": "a.jpg", "question": "What is it?", "chosen": "A dog.", "rejected": "A cat."}
`image` is a path (absolute or from the folder), a row of the folder's images.npy (N, H, W, 3), or a list of those;
without it the record is text only. Other keys are left alone.
"""
import hashlib
import json
import warnings
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

import config
from prepare import shards, tokenizer

SPLITS = ("train", "val", "test")
IMAGE = "<image>"
TURNS = ("{{ bos_token or '' }}{% for m in messages %}{{ m['content'] }}"  # for tokenizers without a chat template
         "{{ eos_token if m['role'] == 'assistant' else '\\n' }}{% endfor %}")
FILES = r"((train|val|test)\.jsonl|bad_images\.txt|images\.npy|meta\.json)(\.\d+)?(\.tmp)?|images"  # of a data set here
MAX_PIXELS = 100_000_000  # a photo has up to 60 million; more than this is a mistake or an attack


@dataclass
class Settings:
    """What the prepare scripts for pictures share."""
    input: str | None = None  # folder with the downloaded files, in the data set's own layout; None: the hub
    out: str | None = None  # folder to write; None: data/<name of the script>, which vlm.py finds by that name
    limit: int | None = None  # [1, inf) stop after this many images of each split; None: all of them


def read(path):
    """The picture in a file (path or bytes stream) as upright RGB; transparency becomes white, of an animation the
    first frame counts, 16 bits a channel become 8. Raises `config.Mistake`, one line, for what is no readable picture.
    """
    from PIL import Image, ImageOps
    name = getattr(path, "name", path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about sizes, which are checked here, and about odd metadata
            Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit: it refuses large photos of good faith
            with Image.open(path) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise ValueError(f"{image.width} x {image.height} pixels are more than the {MAX_PIXELS:,} allowed")
                return _rgb(ImageOps.exif_transpose(image))
    except Exception as e:  # Pillow's decoders raise whatever a damaged file leads them to
        reason = {"FileNotFoundError": "there is no such file", "UnidentifiedImageError": "it is not a picture",
                  "IsADirectoryError": "it is a folder"}.get(type(e).__name__) or " ".join(str(e).split()) or repr(e)
        raise config.Mistake(f"{name}: {reason}") from e


def _rgb(image):
    from PIL import Image
    if image.mode.startswith("I") or image.mode == "F":  # Pillow would clip these instead of scaling them
        x = np.asarray(image, np.float32)
        top = next((t for t in (1 if image.mode == "F" else 255, 255, 65535) if x.max() <= t), x.max())
        image = Image.fromarray((x.clip(0) * (255 / top)).round().astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def save(records, folder, splits=SPLITS, progress=True):
    """Write {split}.jsonl for {split: list of records}, leaving out records whose picture cannot be read.

    The bad ones are counted, and listed in bad_images.txt. Each picture is decoded once. Raises `Mistake` when
    nothing is left of the training split."""
    from tqdm import tqdm
    folder, bad, checked, kept = Path(folder), {}, {}, {}
    for split in (s for s in splits if s in records):
        kept[split] = []
        for record in tqdm(records[split], desc=f"checking {split}", unit=" records", disable=not progress):
            paths = [p for p in images_of(record) if isinstance(p, str)]
            for path in paths:
                if path not in checked:
                    try:
                        read(folder / path)
                        checked[path] = True
                    except config.Mistake as e:
                        checked[path], bad[path] = False, str(e)
            if all(checked[p] for p in paths):
                kept[split].append(record)
    if "train" in splits and not kept.get("train"):
        raise config.Mistake(": ".join(["no usable record is left for training", *list(bad.values())[:1]]))
    with config.mistakes(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    for split, some in kept.items():
        shards.write_text(folder / f"{split}.jsonl", "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in some))
        print(f"{split}: {len(some):,} records, {len({p for r in some for p in images_of(r)}):,} images")
    if bad:
        shards.write_text(folder / "bad_images.txt", "".join(line + "\n" for line in bad.values()))
        print(f"{len(bad):,} pictures cannot be read and were left out: {folder / 'bad_images.txt'}")


def images_of(record):
    """The pictures of a record, in order, as a list."""
    image = record.get("image")
    return image if isinstance(image, list) else [] if image is None else [image]


def load(folder, split):
    """The records of a split, list of dict. Raises `Mistake` for a missing data set and for a damaged line."""
    path = Path(folder) / f"{split}.jsonl"
    if not path.is_file():
        script = f"prepare/{Path(folder).name}.py"
        known = (config.ROOT / script).is_file()
        hint = f"run `python {script}` first" if known else "there is no such data set"
        raise config.Mistake(f"no {path}: {hint}")
    return read_json(path)


def json_of(path):
    """What a JSON file holds."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


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


def read_json(path):
    """The objects of a .json list or of a .jsonl file."""
    with config.mistakes(OSError, ValueError, RecursionError, prefix=f"{path} cannot be read: "):
        text = Path(path).read_text(encoding="utf-8")
        whole = text.lstrip().startswith("[")
        found = json.loads(text) if whole else [json.loads(line) for line in text.split("\n") if line.strip()]
        if not all(isinstance(r, dict) for r in found):
            raise ValueError("it is not a list of objects")
    return found


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


def caption_prompt(tok):
    """ids after which a caption follows: the picture on a line of its own, as in a conversation."""
    return tok.encode(IMAGE + "\n", bos=True)


def with_pictures(text, count):
    """text, begun by <image> for each of `count` pictures that it does not place itself."""
    return text if IMAGE in text else (IMAGE + "\n") * count + text


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
    """The examples in a record (see prepare/images.py); number: {picture: its number}. A pair of preferences is
    two rows, chosen and rejected."""
    pictures = tuple(number[p] for p in images_of(record))

    def conversation(turns, kind):
        (role, text), *rest = turns
        answer = next(text for role, text in turns if role == "assistant")
        return Row(*spans(tok, ((role, with_pictures(text, len(pictures))), *rest)), pictures, (answer,), kind)
    try:
        found = []
        for caption in record.get("captions", ()):
            prompt, words = caption_prompt(tok), tok.encode(caption, eos=True)
            ids = np.array(prompt + words, np.int32)
            found.append(Row(ids, np.arange(len(ids)) >= len(prompt), pictures, tuple(record["captions"]), "caption"))
        if "conversations" in record:
            roles = {"human": "user", "gpt": "assistant", "system": "system"}
            found.append(conversation([(roles[t["from"]], t["value"]) for t in record["conversations"]], "answer"))
        if "chosen" in record:
            found += [conversation([("user", record["question"]), ("assistant", record[key])], key)
                      for key in ("chosen", "rejected")]
    except (KeyError, TypeError, ValueError, StopIteration, AttributeError) as e:
        raise config.Mistake(f"{e!r} in a record that is not as prepare/images.py says: {str(record)[:200]}") from None
    return found


def spread(ids, image_id, image_tokens):
    """ids (n,) with every image_id repeated image_tokens times."""
    return np.repeat(ids, np.where(ids == image_id, image_tokens, 1))


class Examples:
    """What a model reads of a split: each example is the rows about one picture that begin alike, or a chosen and a
    rejected row. Rows are cut to block_size tokens; those that lose a picture or all their answer are left out."""

    def __init__(self, folder, split, tok, image_id, image_tokens, block_size, number):
        """number: {picture: its number}, to which the split's pictures are added."""
        self.image_id, self.image_tokens = image_id, image_tokens
        self.examples, self.pairs, self.lost = [], False, 0
        last = {}
        for record in load(folder, split):
            for p in images_of(record):
                number.setdefault(p, len(number))
            rows, self.pairs = rows_of(record, tok, number), "chosen" in record
            for some in [rows] if self.pairs else [[row] for row in rows]:
                if not all([self.cut(row, block_size) for row in some]):
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
            raise config.Mistake(f"{folder}: no {split} example fits block_size={block_size}")

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
        """Shorten a row; False if it is of no use then."""
        if (row.ids == self.image_id).sum() != len(row.pictures):
            raise config.Mistake(f"an example has {len(row.pictures)} pictures but not as many {IMAGE} marks")
        keep = int((self.widths(row).cumsum() <= block_size + 1).sum())
        whole = not (row.ids[keep:] == self.image_id).any()
        row.ids, row.learn = row.ids[:keep], row.learn[:keep]
        return whole and bool(row.learn.any())

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
