"""What a model reads of records about pictures, and what it is to learn of it.

Each record makes rows: ids with one `<image>` for each picture, of which the assistant's words are learned. Rows about
one picture are read as branches of one sequence, so that its image tokens are computed once. With a picture of two
tokens (P), NL for the line's end after it, E for the end, and captions "a b" and "c":

    reads      BOS P  P  NL a  b  NL c
    learns     -   -  -  a  b  E  c  E
    positions  0   1  2  3  4  5  3  4      so that the second caption does not see the first: `Decoder.masks`
"""
import os
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from tqdm import tqdm

import config
from prepare import chat, images, tokenizer
from prepare.images import IMAGE
from prepare.tokenizer_spec import added_token
from prepare.windows import order

FRAME = "<|image_start|>", "<|image_end|>", "<|tile_x_separator|>", "<|tile_y_separator|>", "<|image|>"
PATCH = "<|patch|>"  # each image token of a square; FRAME stands around them, and <|image|> for a picture in a text
TURNS = ("{{ bos_token or '' }}{% for m in messages %}{{ m['content'] }}"  # for tokenizers without a chat template
         "{{ eos_token if m['role'] == 'assistant' else '\\n' }}{% endfor %}")


def adding(tok, *texts, special=True):
    """A tokenizer in which each of these texts is one token."""
    tokens = list(tok.spec.get("added_tokens") or [])
    new = [text for text in texts if text not in tok.added]
    tokens += [added_token(text, tok.vocab_size + n, special, normalized=False) for n, text in enumerate(new)]
    return tokenizer.Tokenizer(tok.spec | {"added_tokens": tokens}, tok.settings, tok.model) if new else tok


def renamed(tok, old, new):
    """A tokenizer whose added token `old` is called `new`: a special one, but for <image>, so that messages may contain
    it."""
    tokens = [t | {"content": new, "special": new != IMAGE} if t["content"] == old else t
              for t in tok.spec.get("added_tokens") or []]
    return tokenizer.Tokenizer(tok.spec | {"added_tokens": tokens}, tok.settings, tok.model)


def with_image(tok):
    """(tokenizer in which <image> is one token and conversations have a form, id of <image>)."""
    if tok.eos_id is None:
        raise config.Mistake("this tokenizer has no EOS, so captions could not end")
    if not tok.chat_template:
        tok = tokenizer.Tokenizer(tok.spec, tok.settings | {"chat_template": TURNS}, tok.model)
    tok = adding(renamed(tok, IMAGE, IMAGE), IMAGE, special=False)
    return tok, tok.added[IMAGE]


def with_frame(tok):
    """(tokenizer with all of Llama 4's tokens for pictures, id of <|patch|>, ids of FRAME). Its <|image|> is
    called <image> in the program, as the mark of every model is; `save_pretrained` gives it its name back."""
    tok, mark = with_image(renamed(tok, FRAME[-1], IMAGE))
    tok = adding(tok, *FRAME[:-1], PATCH)
    return tok, tok.added[PATCH], (*(tok.added[text] for text in FRAME[:-1]), mark)


def new_tokenizer(records, vocab_size, added):
    """A SentencePiece BPE of vocab_size tokens, less those that are `added` to it, trained on a data set's texts."""
    talks = [talk for talks in records.each(images.talks_of) for _, talk in talks]
    texts = [text.replace(IMAGE, "") for talk in talks for _, text in talk]
    return tokenizer.train_sentencepiece(texts, vocab_size, added)


@dataclass(slots=True)
class Row:
    """One example."""
    ids: np.ndarray  # (n,) with one mark for each picture
    learn: np.ndarray  # (n,) bool
    pictures: tuple  # by number
    answers: tuple  # that are accepted
    kind: str  # caption, answer, chosen or rejected
    trunk: int = 0  # how many ids go up to the last picture

    def prompt(self):
        """ids up to the first answer."""
        return self.ids[:self.learn.argmax()]

    def shown(self, mark):
        """Numbers of the pictures in the prompt; `mark` stands for each of them. Others may come in later turns."""
        return self.pictures[:(self.prompt() == mark).sum()]


@lru_cache
def caption_prompt(tok, count=1):
    """ids after which a caption follows: each picture on a line of its own, as in a conversation."""
    return tok.encode((IMAGE + "\n") * count, bos=True)


@lru_cache(maxsize=2**16)  # many pictures are asked the same and answer alike: tokenized once, and kept once
def lesson(tok, kind, talk, count):
    """(ids (n,) of ((role, text), ...) about `count` pictures, which of them are the assistant's words and endings, how
    many go up to the last picture)."""
    if kind == "caption":
        prompt = caption_prompt(tok, count)
        ids = prompt + tok.encode(talk[-1][1], eos=True)
        learn = np.arange(len(ids)) >= len(prompt)
    else:
        ids, learn = tok.lesson([{"role": role, "content": text} for role, text in talk],
                                [role == "assistant" for role, _ in talk], date=chat.Settings.date)
    if ids.count(tok.added[IMAGE]) != count:
        raise config.Mistake(f"the chat template does not keep the {count} {IMAGE} marks")
    ids = np.array(ids, np.int32)
    return ids, np.array(learn), trunk_of(ids, tok.added[IMAGE])


def trunk_of(ids, image_id):
    """How many ids go up to the last picture, and with it."""
    return int(np.flatnonzero(np.append(image_id, ids) == image_id)[-1])


def rows_of(record, tok, number):
    """The examples in a record; number: {picture: its number}, to which the record's pictures are added. A pair of
    preferences is two rows, chosen and rejected. Raises ValueError or `Mistake` for a record that is of no use."""
    talks, rows = images.talks_of(record), []
    pictures = tuple(number.setdefault(p, len(number)) for p in images.images_of(record))
    captions = tuple(record.get("captions", ()))
    for kind, talk in talks:
        answer = next(text for role, text in talk if role == "assistant")
        answers = captions if kind == "caption" else (answer,)
        ids, learn, trunk = lesson(tok, kind, talk, len(pictures))
        rows.append(Row(ids, learn, pictures, answers, kind, trunk))
    return rows


class Examples:
    """What a model reads of a split: each example is the rows about one picture that begin alike, or a chosen and a
    rejected row. Rows longer than block_size are cut after their last answer that ends within it, and left out where
    there is none; `shortened` and `lost` count them."""

    def __init__(self, records, tok, image_tokens, block_size, number):
        """records: an `images.Records`; image_tokens: positions of a picture; number: {picture: its number}, to which
        those of the records are added."""
        if not records:
            raise config.Mistake(f"{records.path} has no records: prepare the data again, with some for "
                                 f"{records.path.stem}")
        self.image_id, self.image_tokens, self.block_size = tok.added[IMAGE], image_tokens, block_size
        self.examples, self.pairs, self.lost, self.shortened = [], "chosen" in records[0], 0, 0
        latest = {}  # {how its rows begin: the example that was last added to}
        for rows in tqdm(records.each(lambda record: rows_of(record, tok, number)), f"reading {records.path.stem}",
                         len(records), unit=" records", leave=False, delay=2,
                         disable=os.environ.get("RANK", "0") != "0"):
            for some in [rows] if self.pairs else [[row] for row in rows]:
                if all([self.cut(row) for row in some]):
                    self.add(some, latest)
                else:
                    self.lost += 1
        if not self.examples:
            raise config.Mistake(f"{records.path}: no example of {len(records):,} records fits block_size="
                                 f"{block_size}; a picture alone takes {image_tokens} tokens")

    def cut(self, row):
        """Cut a row that is too long after the last answer that ends within block_size; False if none does."""
        longest = self.block_size + 1  # the last id is never read, only learned
        if self.positions(row, len(row.ids)) > longest:
            room = self.widths(row).cumsum() <= longest
            ends = np.flatnonzero(row.learn & room & ~np.append(row.learn[1:], False))
            if not len(ends):
                return False
            keep = ends[-1] + 1
            self.shortened += bool(row.learn[keep:].any())
            row.ids, row.learn = row.ids[:keep], row.learn[:keep]
            row.pictures = row.pictures[:(row.ids == self.image_id).sum()]
            row.trunk = trunk_of(row.ids, self.image_id)
        return True

    def add(self, rows, latest):
        """Add rows to the latest example that begins as they do, up to the last picture, or make one of them."""
        row, end = rows[0], rows[0].trunk
        shares = end and not self.pairs and not row.learn[end]  # what comes right after is predicted by no branch
        beginning = (row.pictures, row.ids[:end].tobytes()) if shares else None
        example = latest.get(beginning)
        if example is None or self.length([*example, *rows]) > self.block_size:
            example = []
            self.examples.append(example)
        example += rows
        if shares:
            latest[beginning] = example

    def widths(self, row):
        """Positions that each id of a row takes, (n,)."""
        return np.where(row.ids == self.image_id, self.image_tokens, 1)

    def positions(self, row, count):
        """Positions of the first `count` ids of a row, all its pictures among them."""
        return count + len(row.pictures) * (self.image_tokens - 1)

    def length(self, rows):
        """Positions of a sequence in which these rows share their trunk."""
        trunk = rows[0].trunk
        return self.positions(rows[0], trunk) + sum([len(row.ids) - trunk for row in rows])

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
            parts, after = [], 0  # where the next branch begins
            for row in rows:
                ids, learn = (np.repeat(values, self.widths(row)) for values in (row.ids, row.learn))
                parts.append(np.stack((ids[:-1], np.where(learn, ids, -100)[1:], np.arange(len(ids) - 1)))[:, after:])
                after = self.positions(row, row.trunk)
            made.append(np.concatenate(parts, 1))  # (3, t)
        whole = np.zeros((3, len(made), max(line.shape[1] for line in made)), np.int64)
        whole[1] = -100
        for i, line in enumerate(made):
            whole[:, i, :line.shape[1]] = line
        x, y, positions = whole
        return x, y, positions if max(map(len, lines)) > 1 else None

    def some(self, limit=0):
        """The numbers of the examples to evaluate, the same each time, until they have `limit` tokens (0: of all)."""
        which = order(0, 0, len(self))
        if not limit:
            return which
        learned = np.cumsum([sum(int(row.learn[1:].sum()) for row in self.examples[i]) for i in which])
        return which[:int(np.searchsorted(learned, limit)) + 1]

    def questions(self, most=None):
        """One row for each picture and prompt (not one for each of its captions), or as many of them, spread evenly."""
        seen = {}  # {question: (its first row, {id of a record's answers: those answers})}: each record counts once
        for row in (row for rows in self.examples for row in rows if row.kind != "rejected"):
            _, records = seen.setdefault((row.kind, row.pictures, row.prompt().tobytes()), (row, {}))
            records[id(row.answers)] = row.answers
        rows = [replace(row, answers=tuple(a for some in records.values() for a in some))
                for row, records in seen.values()]
        return [rows[i] for i in np.linspace(0, len(rows) - 1, min(most or len(rows), len(rows))).astype(int)]
