"""Built-in data: tiny stories from a grammar of our own, with the exact probability of every story.

    python prepare/tales.py                     # writes data/tales: no download, a few seconds
    python prepare/tales.py --stories=100000    # more of them

A loss in bits per byte says little until one knows how low it can go. Here one does: each story is told by
a grammar whose choices are all uniform, and no text has two derivations, so `-ln p(text)` is the sum of
`ln n` over the choices made. `meta.json` holds that sum for each split as `floor_bpb`. A model that has
learned all there is to learn comes close to the floor; a loss below it proves a leak.

    text, nats = GRAMMAR.story(random.Random(1))        # tell a story

The grammar is prepare/tales.txt, which says how it is written.
"""
import itertools
import math
import random
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from any folder
import config
from prepare import shards, tokenizer

_, WORDS, PLOTS = Path(__file__).with_suffix(".txt").read_text(encoding="utf-8").split("\n---\n")
PRONOUNS = {"she": {"them": "her", "their": "her"}, "he": {"them": "him", "their": "his"}}
SENTENCE = re.compile(r'(^"?|[.!?] "?|\." "?| ")([a-z])')  # where a capital letter belongs


def finish(plain):
    """Capital letters at the start of sentences, and "an" before a vowel."""
    return SENTENCE.sub(lambda m: m[1] + m[2].upper(), re.sub(r"\ba(?= [aeiou])", "an", plain))


class Slot(str):
    """The name that stood between braces."""


def parse_choice(text):
    """"a | b {slot} [c | d]" -> its alternatives, each a tuple of text, Slot, and nested lists of alternatives."""
    def read(tokens):
        alternatives, parts = [], []
        for token in tokens:
            if token == "[":
                parts.append(read(tokens))
            elif token in ("|", "]"):
                alternatives.append(tuple(parts))
                parts = []
                if token == "]":
                    return alternatives
            else:
                parts.append(Slot(token[1:-1]) if token[0] == "{" else token)
    text = re.sub(r" *\| *", "|", text.strip())
    return read(iter(re.findall(r"\{[\w.]+\}|[][|]|[^][{}|]+", text + "]")))


class Grammar:
    """rules: {slot: alternatives}; facts: {word: {fact: alternatives}}; both as `parse_choice` gives them."""

    def __init__(self):
        self.rules, self.facts, lines = {}, {}, {}
        for table in WORDS.strip().split("\n\n"):
            (slot, names), *rows = [line.strip().split(": ", 1) for line in table.splitlines()]
            for keys, cells in rows:
                values = dict(zip(names.split("; "), cells.split("; "), strict=True))
                values |= PRONOUNS.get(values.get("they"), {})
                for word in keys.split(", "):
                    self.rules.setdefault(slot, []).append((word,))
                    facts = self.facts.setdefault(word, {})
                    facts |= {fact: parse_choice(value) for fact, value in values.items()}
        for line in PLOTS.splitlines():
            if line[:1].strip():
                slot, line = line.split(":")
                lines[slot] = []
            line = line.strip()
            if line.startswith("|"):
                lines[slot][-1] += line
            elif line:
                lines[slot].append(line)
        for slot, (first, *more) in lines.items():
            self.rules[slot] = parse_choice(" ".join(f"[{line}]" for line in (first, *more)) if more else first)

    def options(self, part, bound):
        """The alternatives of a list, or of a slot that is not bound yet."""
        if isinstance(part, list):
            return part
        owner, _, fact = part.rpartition(".")
        return self.facts[bound[owner]][fact] if owner else self.rules[part]

    def draw(self, part, bound, rng):
        """Spell `part`, entering the slots it draws in `bound` -> (text, nats)."""
        if type(part) is str:
            return part, 0.0
        if isinstance(part, Slot) and part in bound:
            return bound[part], 0.0
        options = self.options(part, bound)
        drawn = [self.draw(p, bound, rng) for p in rng.choice(options)]
        text = "".join(t for t, _ in drawn)
        if isinstance(part, Slot):
            bound[part] = text
        return text, math.log(len(options)) + sum(n for _, n in drawn)

    def story(self, rng):
        """Tell a story -> (text, nats): nats = -ln p(text), from the choices made. rng: random.Random."""
        plain, nats = self.draw(Slot("story"), {}, rng)
        return finish(plain), nats


GRAMMAR = Grammar()


@dataclass
class Settings:
    """How many tales, and where they go."""
    stories: int = 30000  # [1, inf) training stories: 3 million tokens, as much as a laptop reads in a few minutes
    val_stories: int = 1000  # [1, inf) validation stories, none of them in training
    vocab_size: int = 1536  # [1, 1048576] tokens of the BPE: enough for almost every word of the tales to be one
    seed: int = 1337  # [0, inf) the same seed gives the same files
    out: str | None = None  # folder to write; None: data/tales


def tell(seed, count, without=()):
    """Yield `count` stories that are not among `without`, as (text, nats)."""
    rng = random.Random(seed)
    while count:
        text, nats = GRAMMAR.story(rng)
        if text not in without:
            yield text, nats
            count -= 1


def main():
    cfg = config.load(Settings)
    out = shards.own_folder(cfg.out or config.ROOT / "data/tales", shards.DATA_FILES)
    val = dict(tell(f"{cfg.seed} val", cfg.val_stories))
    tok = tokenizer.train_sentencepiece(
        (text for text, _ in tell(f"{cfg.seed} train", min(cfg.stories, 10_000), val)), cfg.vocab_size)
    writer, floor = shards.Writer(out, tok), {}
    for split, stories in ("val", iter(val.items())), ("train", tell(f"{cfg.seed} train", cfg.stories, val)):
        bits = size = 0
        with tqdm(desc=split, unit=" stories", total=len(val) if split == "val" else cfg.stories) as bar:
            while batch := list(itertools.islice(stories, 1000)):
                texts = [text for text, _ in batch]
                n_bytes = sum(len(text.encode()) for text in texts)
                ids = tok.encode_batch(texts, bos=True, eos=True)
                writer.add(split, list(itertools.chain.from_iterable(ids)), n_bytes, len(batch))
                bits, size = bits + sum(nats for _, nats in batch) / math.log(2), size + n_bytes
                bar.update(len(batch))
        floor[split] = bits / size
    meta = writer.finish(floor_bpb=floor)
    print("\n\n".join(["", *list(val)[:2], ""]))
    for split, have in meta["splits"].items():
        print(f"{split}: {have['documents']:,} stories, {have['tokens']:,} tokens, {have['bytes']:,} bytes, "
              f"floor {have['floor_bpb']:.4f} bits per byte")


if __name__ == "__main__":
    config.run(main)
