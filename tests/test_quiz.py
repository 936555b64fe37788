"""prepare/quiz.py: every answer is what the tales say, found by reading them anew; nobody can guess it unread."""
import json
import math
import random
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import config  # noqa: E402
from prepare import quiz, tales, tokenizer  # noqa: E402
from prepare.tales import GRAMMAR, Slot  # noqa: E402

KINDS = quiz.kinds()
A = "(?:a|an)"


@pytest.fixture(scope="module")
def records():
    """{split: 1,500 conversations with all their questions}."""
    return {split: [quiz.conversation(KINDS, random.Random(f"{split} {i}"), split == "val", 99) for i in range(1500)]
            for split in ("train", "val")}


def read(record):
    """(texts of the tales, [(question, answer, wrong answer), ...]) of a conversation."""
    texts = [m["content"] for m in record["messages"]]
    *told, texts[0] = texts[0].split("\n")
    return told, list(zip(texts[::2], texts[1::2], record["wrong"], strict=True))


def parse(text):
    """What each slot of a tale is, from its text alone."""
    plain = re.sub(r"\ban(?= [aeiou])", "a", text.lower())
    (bound,) = [bound for said, bound, _ in GRAMMAR.parses((Slot("story"),), plain, 0, {}) if tales.finish(said) == text]
    return bound


# -- an oracle that knows the sentences of the tales, not the generator ------------------------------------------

HERO = re.compile(r"named (\w+)|^Everybody near the \w+ knew (\w+)|story of (\w+)|Do you know (\w+)|^(\w+) was a"
                  r"|there was (\w+),")
WHO = re.compile(r"\b[Aa]n? \w+ (\w+) in an? (\w+) (\w+)")  # the helper and what it wears
SPOT = re.compile(r"\b(?:[Uu]nder|[Bb]ehind|[Bb]eside|[Nn]ear) an? \w+ \w+")
LOST = re.compile(rf"(?:(?:had|thing s?he had was) {A}|gave (?:her|him) {A}) (\w+) (\w+)(?: and loved|\. But one)")
TOOL = re.compile(rf"(?:without|gave (?:her|him)) {A} (\w+) (rope|blanket|lamp|umbrella|ladder|hammer|flute|teapot)\. ?"
                  r"(?!But one)")
WORK = re.compile(rf"(?:mending|painting|washing|shaking) {A} (\w+) (\w+)")


def facts(text):
    """{question: answer} that the sentences of one tale bear out."""
    hero = next(filter(None, HERO.search(text).groups()))
    helper, shade, garment = WHO.search(text).groups()
    helper, spot, found = f"the {helper}", SPOT.search(text), {}
    clothes = f"{'an' if shade[0] in 'aeiou' else 'a'} {shade} {garment}"
    found |= {f"Whose friend was {helper}?": hero, f"Whose friend had {clothes}?": hero, f"Who was in {clothes}?": helper}
    if soup := re.search(r"liked (\w+) soup", text):
        found[f"Who liked {soup[1]} soup?"] = hero
    if spot:
        found["spot"] = spot[0][0].lower() + spot[0][1:]

    def a(color, thing):
        return f"{'an' if color[0] in 'aeiou' else 'a'} {color} {thing}"
    if "heard a" in text and "sound" in text or "What was that sound" in text:
        noise = re.search(r"(\w+), \1!", text, re.I)[1].lower()
        found[f"Who heard a {noise}?"], found[f"Who had {a(*WORK.search(text).groups())}?"] = hero, helper
        found[f"Where was {helper}?"] = found["spot"]
    elif lost := LOST.search(text):
        color, thing = lost.groups()
        found |= {f"Who lost the {color} {thing}?": hero, f"What had {hero} lost?": a(color, thing),
                  f"Who found the {thing}?": helper, f"Where was the {thing}?": found["spot"],
                  f"Who had {a(color, thing)}?": hero, f"Who helped {hero}?": helper}
    elif tool := TOOL.search(text):
        trouble = re.search(r", who (.*?)\.", text)[1]
        found |= {f"Who had {a(*tool.groups())}?": hero, f"Who {trouble}?": helper, f"Who helped {helper}?": hero}
    elif game := re.search(r"play ([\w ]+?) with", text):
        found |= {f"Who wanted to play {game[1]}?": hero, f"What did {helper} play?": game[1]}
    else:
        wish = re.search(r'(?:wanted to|I wish I could|one day I will) (.*?)[.,]', text, re.I)[1]
        found |= {f"Who wanted to {wish}?": hero, f"What did {hero} want to do?": wish, f"Who helped {hero}?": helper}
    spot = found.pop("spot", None)
    if spot and not LOST.search(text):
        found[f"Where was {helper}?"] = spot
    return found


def test_answers_are_what_the_sentences_say(records):
    """All that may be asked is asked, with the only answer that the sentences of the tales bear out."""
    for record in records["train"] + records["val"]:
        told, asked = read(record)
        answers = defaultdict(list)
        for text in told:
            for question, answer in facts(text).items():
                answers[question].append(answer)
        expected = {question: found[0] for question, found in answers.items() if len(found) == 1}
        assert {question: answer for question, answer, _ in asked} == expected, told
        assert len(asked) == len(expected)


def test_the_text_alone_gives_what_the_slots_were():
    rng = random.Random(3)
    for i in range(300):
        for text, bound in quiz.tell(rng, 1 + i % 2, i % 3 == 0):
            assert parse(text) == bound


def test_a_wrong_answer_is_wrong_and_of_its_kind(records):
    near = 0
    for record in records["val"]:
        told, asked = read(record)
        for question, answer, wrong in asked:
            assert wrong != answer and not quiz.grade(wrong, answer)
            pattern = {"Wh": r"the \w+|[A-Z]\w+" if question.startswith("Who") else r"[a-z ]+"}["Wh"]
            assert re.fullmatch(pattern, answer) and re.fullmatch(pattern, wrong)
            assert (answer[:4] == "the ") == (wrong[:4] == "the ")
            near += len(told) == 2 and any(wrong in text for text in told)
    assert near > 1000  # with two tales, what is right of the other one


def test_grade():
    assert quiz.grade(" the owl\n", "the owl")
    for text in "", "owl", "the owls", "the owl the owl", "The owl", "the  owl", "the hen":
        assert not quiz.grade(text, "the owl")
