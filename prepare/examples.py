"""What a model reads of records about pictures, and what it is to learn of it.

Each record makes rows: ids with one `<image>` for each picture, of which the assistant's words are learned. Rows about
one picture are read as branches of one sequence, so that its image tokens are computed once. With a picture of two
tokens (P), NL for the line's end after it, E for the end, and captions "a b" and "c":

    reads      BOS P  P  NL a  b  NL c
    learns     -   -  -  a  b  E  c  E
    positions  0   1  2  3  4  5  3  4      so that the second caption does not see the first: `Decoder.masks`
"""
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

import config
from prepare import images, tokenizer
from prepare.images import IMAGE

FRAME = "<|image_start|>", "<|image_end|>", "<|tile_x_separator|>", "<|tile_y_separator|>", "<|image|>"
PATCH = "<|patch|>"  # each image token of a square; FRAME stands around them, and <|image|> for a picture in a text
TURNS = ("{{ bos_token or '' }}{% for m in messages %}{{ m['content'] }}"  # for tokenizers without a chat template
         "{{ eos_token if m['role'] == 'assistant' else '\\n' }}{% endfor %}")


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


def renamed(tok, old, new, special):
    """A tokenizer whose added token `old` is called `new`."""
    tokens = [t | {"content": new, "special": special} if t["content"] == old else t
              for t in tok.spec.get("added_tokens") or []]
    return tokenizer.Tokenizer(tok.spec | {"added_tokens": tokens}, tok.settings, tok.model)


def with_frame(tok):
    """(tokenizer with all of Llama 4's tokens for pictures, id of <|patch|>, ids of FRAME). Its <|image|> is
    called <image> in the program, as the mark of every model is; `save_pretrained` gives it its name back."""
    tok, mark = with_image(renamed(tok, FRAME[-1], IMAGE, special=False))
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    for text in (*FRAME[:-1], PATCH):
        if text not in tok.added:
            more = [*tok.spec["added_tokens"], {"id": tok.vocab_size, "content": text, **plain}]
            tok = tokenizer.Tokenizer(tok.spec | {"added_tokens": more}, tok.settings, tok.model)
    return tok, tok.added[PATCH], (*(tok.added[text] for text in FRAME[:-1]), mark)


def new_tokenizer(folder, vocab_size):
    """A SentencePiece BPE of so many tokens, trained on the texts of a data set."""
    texts = []
    for n, record in enumerate(images.load(folder, "train"), 1):
        with config.mistakes(ValueError, prefix=f"{Path(folder) / 'train.jsonl'}, record {n}: "):
            texts += [text.replace(IMAGE, "") for _, talk in images.talks_of(record) for _, text in talk]
    return tokenizer.train_sentencepiece(texts, vocab_size)


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
        talks = images.talks_of(record)
    pictures, found = tuple(number.setdefault(p, len(number)) for p in images.images_of(record)), []
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

    def __init__(self, folder, split, tok, image_tokens, block_size, number):
        """image_tokens: positions of a picture. number: {picture: its number}, to which the split's are added."""
        from tqdm import tqdm
        self.image_id, self.image_tokens = tok.added[IMAGE], image_tokens
        self.examples, self.pairs, self.lost, self.shortened = [], False, 0, 0
        last, path, records = {}, Path(folder) / f"{split}.jsonl", images.load(folder, split)
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
