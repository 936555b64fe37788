"""prepare/tales.py: the probability of a story is exact, so the floor of the loss is."""
import functools
import hashlib
import json
import math
import random
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from prepare import shards, tales, tokenizer
from prepare.tales import GRAMMAR, Grammar, Slot


@pytest.fixture(scope="module")
def told():
    """3,000 stories with the nats of the choices made."""
    rng = random.Random(7)
    return [GRAMMAR.story(rng) for _ in range(3000)]


def lists(part):
    """Every list of alternatives in `part`, itself included."""
    if isinstance(part, list):
        yield part
        for option in part:
            for inner in option:
                yield from lists(inner)


def all_lists(grammar):
    for options in [*grammar.rules.values(), *(o for facts in grammar.facts.values() for o in facts.values())]:
        yield from lists(options)


def parses(grammar, parts, text, at, bound):
    """Every way in which `parts` spell lower-case `text` from `at` on: (spelling, bound, nats)."""
    if not parts:
        yield "", bound, 0.0
        return
    for head, then, nats in heads(grammar, parts[0], text, at, bound):
        for tail, end, more in parses(grammar, parts[1:], text, at + len(head), then):
            yield head + tail, end, nats + more


def heads(grammar, part, text, at, bound):
    """The same for one part."""
    said = bound.get(part) if isinstance(part, Slot) else part if isinstance(part, str) else None
    if said is None:
        options = grammar.options(part, bound)
        for option in options:
            for said, then, nats in parses(grammar, option, text, at, bound):
                yield said, then | {part: said} if isinstance(part, Slot) else then, nats + math.log(len(options))
    elif text.startswith(said.lower(), at):
        yield said, bound, 0.0


def nats_of(text, grammar=GRAMMAR):
    """-ln p(text), from the text alone; ValueError where the grammar cannot tell it in exactly one way."""
    plain = re.sub(r"\ban(?= [aeiou])", "a", text.lower())
    found = [nats for said, _, nats in parses(grammar, (Slot("story"),), plain, 0, {}) if tales.finish(said) == text]
    if len(found) != 1:
        raise ValueError(f"{len(found)} derivations, not 1: {text!r}")
    return found[0]


# ---------------------------------------------------------------- the probability of a text

def test_the_text_alone_gives_the_probability_of_the_choices(told):
    for text, nats in told:
        assert nats_of(text) == pytest.approx(nats, abs=1e-9)


def test_other_texts_are_outside(told):
    for text, _ in told[:20]:
        other = told[100][0]
        for wrong in ("", text[:-1], text + " ", text + " " + other, text.lower(), text[0].lower() + text[1:],
                      text.replace(" a ", " an ", 1), text.replace(" the ", " a ", 1), text[:100] + other[100:]):
            assert wrong != text
            with pytest.raises(ValueError):
                nats_of(wrong)
    # what was said must be repeated: another word of the same kind in one place is no longer a story
    text = next(t for t, _ in told if t.count("Lily") > 1)
    with pytest.raises(ValueError):
        nats_of(text[::-1].replace("yliL", "yvI", 1)[::-1])


def meanings(slot):
    """The lists of alternatives that a slot can stand for: one, or one for each word that has such a fact."""
    owner, _, fact = slot.rpartition(".")
    return [facts[fact] for facts in GRAMMAR.facts.values() if fact in facts] if owner else [GRAMMAR.rules[slot]]


def any_meaning(slot):
    """All that a slot can stand for, whatever is bound: more than the grammar allows in any one story."""
    return [option for options in meanings(slot) for option in options]


@functools.cache
def free(slot):
    """Is there never anything to choose in it? So it is with pronouns."""
    return all(len(options) == 1 and all(free(p) if isinstance(p, Slot) else isinstance(p, str) for p in options[0])
               for options in meanings(slot))


CELLS = {}


def push(parts, rest):
    """(first, (second, ... rest)); each such pair is made only once, so that it can be told by its identity."""
    for part in reversed(parts):
        rest = CELLS.setdefault((id(part), id(rest)), (part, rest))
    return rest


def unfold(left):
    """(text, what is left then) for each way to go on with what is left to tell; None at the end."""
    if left is None:
        yield None
        return
    part, rest = left
    if isinstance(part, str) and not isinstance(part, Slot):
        yield part.lower(), rest
        return
    for option in any_meaning(part) if isinstance(part, Slot) else part:
        yield from unfold(push(option, rest))


def clash(a, b):
    """A text of alternative `a` that begins or equals a text of `b`, or the other way round; None if there is none."""
    todo, seen = [("", x, y) for x in unfold(push(a, None)) for y in unfold(push(b, None))], set()
    while todo:
        said, x, y = todo.pop()
        if x is None or y is None:
            return said
        (p, after_p), (q, after_q) = x, y
        n = min(len(p), len(q))
        if p[:n] == q[:n] and (key := (p[n:], id(after_p), q[n:], id(after_q))) not in seen:
            seen.add(key)
            ys = [(q[n:], after_q)] if q[n:] else list(unfold(after_q))
            todo += [(said + p[:n], x, y) for x in ([(p[n:], after_p)] if p[n:] else unfold(after_p)) for y in ys]
    return None


def test_no_alternative_begins_another():
    """The proof that a text has one derivation, and that its end is in the text, so that EOS costs nothing.

    If at each choice no text of one alternative is the beginning of a text of another, then by induction
    every slot stands for a set of texts of which none begins another, each with one derivation.
    """
    for options in all_lists(GRAMMAR):
        for i, a in enumerate(options):
            for b in options[:i]:
                assert clash(a, b) is None, (a, b)


def test_capitals_and_articles_lose_nothing(told):
    """`finish` can be undone, so two derivations cannot end in one text."""
    assert not re.search(r"\ban\b", tales.WORDS + tales.PLOTS)
    for text, _ in told:
        plain = re.sub(r"\ban(?= [aeiou])", "a", text.lower())
        assert tales.finish(plain).lower() == text.lower()


# ---------------------------------------------------------------- the probabilities of all texts

class Odometer:
    """Stands in for the random numbers: `choice` goes through all combinations, one after another."""

    def __init__(self):
        self.wheels, self.at = [], 0

    def choice(self, options):
        if self.at == len(self.wheels):
            self.wheels.append([0, len(options)])
        self.at += 1
        return options[self.wheels[self.at - 1][0]]

    def forward(self):
        self.at = 0
        while self.wheels and self.wheels[-1][0] + 1 == self.wheels[-1][1]:
            self.wheels.pop()
        if self.wheels:
            self.wheels[-1][0] += 1
        return bool(self.wheels)


def thin(part, rng):
    """A smaller grammar: one or two alternatives of each list."""
    if not isinstance(part, list):
        return part
    kept = rng.sample(part, min(len(part), 1 + (rng.random() < 0.25)))
    return [tuple(thin(p, rng) for p in option) for option in kept]


def test_every_story_of_small_grammars():
    """Told exhaustively: probabilities sum to 1, texts differ, none begins another, each is parsed to its own nats."""
    total = 0
    for seed in range(40):
        small, rng = Grammar(), random.Random(seed)
        small.rules = {slot: thin(options, rng) for slot, options in small.rules.items()}
        small.facts = {word: {fact: thin(options, rng) for fact, options in facts.items()}
                       for word, facts in small.facts.items()}
        wheels, found = Odometer(), []
        while True:
            found.append(small.story(wheels))
            if not wheels.forward():
                break
            assert len(found) < 20_000
        texts = sorted(text for text, _ in found)
        assert all(not b.startswith(a) for a, b in zip(texts, texts[1:]))
        assert math.fsum(math.exp(-nats) for _, nats in found) == pytest.approx(1, abs=1e-9)
        for text, nats in rng.sample(found, min(len(found), 50)):
            assert nats_of(text, small) == pytest.approx(nats, abs=1e-9)
        total += len(found)
    assert total > 5000


class Bind:
    """Stands behind an alternative of a slot: once it has been told, the slot is bound."""

    def __init__(self, slot, option):
        self.slot, self.option = slot, option


class Entropy:
    """The expected nats of a story, by recursion over what is left to tell and what is bound.

    Of what is bound only that matters which may still be asked for. Words whose facts offer the same choices
    are alike here: the first of them stands for all.
    """

    def __init__(self, grammar):
        self.grammar, self.known, self.met, self.first, self.binds = grammar, {}, {}, {}, {}

    def like(self, word):
        facts = self.grammar.facts.get(word, {})
        return self.first.setdefault(tuple((fact, self.shape(facts[fact])) for fact in sorted(facts)), word)

    def shape(self, part):
        if isinstance(part, list):
            return tuple(tuple(self.shape(p) for p in option if not (isinstance(p, Slot) and free(p)))
                         for option in part)
        return part if isinstance(part, Slot) else self.like(part) if part in self.grammar.facts else ""

    def mentions(self, part):
        """The slots that telling `part` may ask for, and "slot." where it matters which word is in it."""
        if isinstance(part, Bind):
            return {f"{p}." for p in part.option if isinstance(p, Slot)}
        if isinstance(part, list):
            return set().union(*(self.mentions(p) for option in part for p in option))
        if not isinstance(part, Slot):
            return set()
        if part not in self.met:
            owner = part.rpartition(".")[0]
            self.met[part] = {part, owner, owner + "."} | self.mentions(any_meaning(part))
        return self.met[part]

    def asked(self, left):
        if left is None:
            return set()
        if id(left) not in self.met:
            self.met[id(left)] = self.mentions(left[0]) | self.asked(left[1])
        return self.met[id(left)]

    def word(self, option, bound):
        """The word that an alternative told, where it is one word and not a phrase."""
        part = option[0] if len(option) == 1 else []
        return "" if isinstance(part, list) else bound.get(part, "") if isinstance(part, Slot) else self.like(part)

    def expect(self, left, bound):
        """Expected nats of what is left. bound: {slot: a word like the one in it}."""
        while left and not isinstance(left[0], list) and (
                not isinstance(left[0], Slot) or left[0] in bound or free(left[0])):  # nothing to choose
            if isinstance(left[0], Bind):
                bound = bound | {left[0].slot: self.word(left[0].option, bound)}
            left = left[1]
        if left is None:
            return 0.0
        (part, rest), asked = left, self.asked(left)
        bound = {slot: word if slot + "." in asked else "" for slot, word in bound.items()
                 if slot in asked or slot + "." in asked}
        key = (id(left), *sorted(bound.items()))
        if key not in self.known:
            options = self.grammar.options(part, bound)
            nats = [self.expect(push(option, self.then_bind(part, option, rest)), bound) for option in options]
            self.known[key] = math.log(len(options)) + math.fsum(nats) / len(nats)
        return self.known[key]

    def then_bind(self, part, option, rest):
        if not isinstance(part, Slot):
            return rest
        return push((self.binds.setdefault((part, id(option)), Bind(part, option)),), rest)


def test_mean_nats_is_the_entropy(told):
    exact = Entropy(GRAMMAR).expect(push((Slot("story"),), None), {})
    rng = random.Random(8)
    nats = [n for _, n in told] + [GRAMMAR.story(rng)[1] for _ in range(9000)]
    mean = math.fsum(nats) / len(nats)
    error = math.sqrt(math.fsum((n - mean) ** 2 for n in nats)) / len(nats)
    assert error < 0.06
    assert abs(mean - exact) < 4 * error, (mean, exact, error)


# ---------------------------------------------------------------- what it reads like

def test_stories_are_the_size_that_was_asked_for(told):
    n = len(told)
    assert len({text for text, _ in told}) == n
    assert 80 < sum(nats for _, nats in told) / n / math.log(2) < 110
    assert 60 < sum(len(text.split()) for text, _ in told) / n < 90
    assert all(300 <= len(text) <= 500 for text, _ in told)
    forms = {word.lower() for text, _ in told for word in re.findall(r"[A-Za-z]+", text)}
    assert 500 < len(forms) < 700


def test_grammar_of_the_grammar(told):
    speech = {"said", "asked", "cried", "called", "he", "she"}  # what may go on in lower case after a quotation
    for text, _ in told:
        assert not re.search(r"\b[Aa] [aeiouAEIOU]|\b[Aa]n [^aeiou]", text), text
        assert not re.search(r'(^|[.!?] "?|\." "?| ")[a-z]', text), text
        for after in re.findall(r'[!?]" ([a-z]+)', text):
            assert after in speech, text
        assert text.count('"') % 2 == 0 and text[-1] in ".!" and "  " not in text and not set("[]{}|;") & set(text)


def test_every_alternative_is_told():
    """No line of the grammar is dead."""
    used, rng = set(), random.Random(0)

    class Watch:
        def choice(self, options):
            i = rng.randrange(len(options))
            used.add((id(options), i))
            return options[i]

    for _ in range(10_000):
        GRAMMAR.story(Watch())
    pronouns = [facts[fact] for facts in GRAMMAR.facts.values() for fact in ("them", "their") if fact in facts]
    dead = [o[i] for o in all_lists(GRAMMAR) for i in range(len(o))
            if (id(o), i) not in used and not any(o is p for p in pronouns)]  # not all whom we meet need every pronoun
    assert not dead, dead


# ---------------------------------------------------------------- the script

def run(monkeypatch, out, *args):
    monkeypatch.setattr(sys, "argv", ["tales.py", "--out", str(out), "--stories=600", "--val_stories=80", *args])
    tales.main()
    return json.loads((out / "meta.json").read_text())


def test_script(tmp_path, monkeypatch, capsys):
    meta = run(monkeypatch, tmp_path / "a")
    assert "floor" in capsys.readouterr().out
    tok, seen = tokenizer.load(tmp_path / "a"), {}
    for name, count in ("train", 600), ("val", 80):
        split = shards.Split(tmp_path / "a", name)
        ids = split[:].tolist()
        begins, ends = ([i for i, x in enumerate(ids) if x == mark] for mark in (tok.bos_id, tok.eos_id))
        texts = [tok.decode(ids[i + 1:j]) for i, j in zip(begins, ends, strict=True)]
        assert len(texts) == split.documents == count and len(ids) == split.tokens
        assert split.bytes == sum(len(t.encode()) for t in texts)
        bits = math.fsum(nats_of(t) for t in texts) / math.log(2)
        assert split.floor_bpb == pytest.approx(bits / split.bytes, rel=1e-12)
        seen[name] = set(texts)
    assert not seen["train"] & seen["val"]

    def digests(name):
        return [hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted((tmp_path / name).glob("*.bin"))]
    assert run(monkeypatch, tmp_path / "b") == meta | {"name": "b"} and digests("a") == digests("b")
    run(monkeypatch, tmp_path / "c", "--seed=2")
    assert digests("c") != digests("a")
