"""prepare/quiz.py: every answer is what the tales say, found by reading them anew; nobody can guess it unread."""
import json
import math
import random
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from test_tales import parses

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import config
from prepare import quiz, shards, tales, tokenizer
from prepare.tales import GRAMMAR, Slot

KINDS = quiz.kinds()
A = "(?:a|an)"


@pytest.fixture(scope="module")
def records():
    """{split: 1,500 conversations with as many questions as they can have}."""
    return {split: [quiz.conversation(KINDS, random.Random(f"{split} {i}"), split == "val", 99, two_tales=0.2)
                    for i in range(1500)]
            for split in ("train", "val")}


def read(record):
    """(texts of the tales, [(question, answer, wrong answer), ...]) of a conversation."""
    texts = [m["content"] for m in record["messages"]]
    *told, texts[0] = texts[0].split("\n")
    return told, list(zip(texts[::2], texts[1::2], record["wrong"], strict=True))


def parse(text):
    """What each slot of a tale is, from its text alone."""
    plain = re.sub(r"\ban(?= [aeiou])", "a", text.lower())
    (found,) = [bound for said, bound, _ in parses(GRAMMAR, (Slot("story"),), plain, 0, {})
                if tales.finish(said) == text]
    return found


# -- an oracle that knows the sentences of the tales, not the generator ------------------------------------------

HERO = re.compile(r"named (\w+)|^Everybody near the \w+ knew (\w+)|story of (\w+)|Do you know (\w+)|^(\w+) was a"
                  r"|there was (\w+),")
WHO = re.compile(r"\b[Aa]n? \w+ (\w+) in an? (\w+) (\w+)")  # the helper and what it wears
SPOT = re.compile(r"\b(?:[Uu]nder|[Bb]ehind|[Bb]eside|[Nn]ear) an? \w+ \w+")
LOST = re.compile(rf"(?:(?:had|thing s?he had was) {A}|gave (?:her|him) {A}) (\w+) (\w+)(?: and loved|\. But one)")
TOOL = re.compile(rf"(?:without|gave (?:her|him)) {A} (\w+) (rope|blanket|lamp|umbrella|ladder|hammer|flute|teapot)\. ?"
                  r"(?!But one)")
WORK = re.compile(rf"(?:mending|painting|washing|shaking) {A} (\w+) (\w+)")


def a(color, thing):
    return f"{'an' if color[0] in 'aeiou' else 'a'} {color} {thing}"


def facts(text):
    """{question: answer} that the sentences of one tale bear out."""
    hero = next(filter(None, HERO.search(text).groups()))
    helper, shade, garment = WHO.search(text).groups()
    helper, spot, found = f"the {helper}", SPOT.search(text), {}
    clothes = a(shade, garment)
    found |= {f"Whose friend was {helper}?": hero, f"Whose friend had {clothes}?": hero,
              f"Who was in {clothes}?": helper, f"What was {helper} in?": clothes}
    found["How was the weather?"] = re.search(r"\b[Oo]ne (\w+) \w+[,?]", text)[1]
    if soup := re.search(r"liked (\w+) soup", text):
        found |= {f"Who liked {soup[1]} soup?": hero, f"What did {hero} like?": f"{soup[1]} soup"}
    if spot:
        found["spot"] = spot[0][0].lower() + spot[0][1:]

    if "heard a" in text and "sound" in text or "What was that sound" in text:
        noise = re.search(r"(\w+), \1!", text, re.I)[1].lower()
        found[f"Who heard a {noise}?"], found[f"Who had {a(*WORK.search(text).groups())}?"] = hero, helper
        found[f"Where was {helper}?"] = found["spot"]
        found[f"What did {hero} think of?"] = "a " + re.search(r"(?:must be a|afraid of any) (\w+)", text)[1]
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


def sure(told):
    """{question: answer} of what the sentences of these tales answer in one way."""
    answers = defaultdict(list)
    for text in told:
        for question, answer in facts(text).items():
            answers[question].append(answer)
    return {question: found[0] for question, found in answers.items() if len(found) == 1}


def test_answers_are_what_the_sentences_say(records):
    """All that may be asked is asked, with the only answer that the sentences of the tales bear out."""
    rng = random.Random(4)
    for i in range(1500):
        told = quiz.tell(rng, 1 + i % 2, i % 4 < 2)
        asked = quiz.questions(told, KINDS, rng)
        assert {question: answer for question, answer, _ in asked} == sure(text for text, _ in told), told
        assert len({question for question, _, _ in asked}) == len(asked)
    for record in records["train"] + records["val"]:
        told, asked = read(record)
        assert {(question, answer) for question, answer, _ in asked} <= sure(told).items()
        assert len({answer for _, answer, _ in asked}) == len(asked) > 2  # none twice, so most differ


def test_excerpts_tell_what_is_asked_about_them():
    """Some sentences of a tale in a row, questions with the answers of the whole tale, whose words they have."""
    kinds, rng = Counter(), random.Random(6)
    for _ in range(500):
        (text, bound), = quiz.tell(rng, 1, False)
        part = quiz.excerpt(text, rng)
        assert part in text and re.fullmatch(r'(.+?[.!?]"?( |$)){1,3}', part)
        for question, answer, _ in quiz.questions([(part, bound)], KINDS, rng):
            told = set(re.findall(r"\w+", part.lower()))
            assert sure([text])[question] == answer and set(answer.lower().split()) - {"a", "an", "the"} <= told
            kinds[question.split()[0]] += 1
    assert min(kinds[word] for word in ("Who", "Whose", "Where", "What")) > 20


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
            pattern = r"the \w+|[A-Z]\w+" if question.startswith("Who") else r"[a-z ]+"
            assert re.fullmatch(pattern, answer) and re.fullmatch(pattern, wrong)
            assert (answer[:4] == "the ") == (wrong[:4] == "the ")
            near += len(told) == 2 and any(wrong in text for text in told)
    assert near > 500  # with two tales, what is right of the other one


def test_grade():
    assert quiz.grade(" the owl\n", "the owl") and quiz.grade("the owl", " the owl\n")
    for text in "", "owl", "the owls", "the owl the owl", "The owl", "the  owl", "the hen":
        assert not quiz.grade(text, "the owl")


# -- nobody answers unread ---------------------------------------------------------------------------------------

def test_held_out_by_combination(records):
    """One combination in seven is held out; no tale of validation has one that training tells, and each part of them
    is in both."""
    seen = {split: {tuple(parse(text)[slot] for slot in quiz.COMBINATION) for record in some[:500]
                    for text in read(record)[0]} for split, some in records.items()}
    order = [[option[0] for option in GRAMMAR.rules[slot]] for slot in quiz.COMBINATION]
    for split, found in seen.items():
        assert {sum(words.index(word) for words, word in zip(order, one)) % 7 == 0 for one in found} == {split == "val"}
        assert [set(column) for column in zip(*found)] == [set(words) for words in order]
    assert len(quiz.combinations(True)) == pytest.approx(math.prod(map(len, order)) / 7, rel=1e-3)


def test_best_guess_of_clothes_by_hand():
    """24 heroes and 16 helpers: given the clothes, the sum of their indices has one remainder by 7. Remainders 0 to 2
    have 4 heroes and the others 3; 0 and 1 have 3 helpers and the others 2."""
    heroes, helpers = [4, 4, 4, 3, 3, 3, 3], [3, 3, 2, 2, 2, 2, 2]
    expected = {"hero": [], "helper": []}
    for rest in range(7):
        ways = sum(heroes[i] * helpers[(rest - i) % 7] for i in range(7))
        expected["hero"].append((3, ways))  # some hero goes with 3 of the helpers
        expected["helper"].append((4, ways))
    clothes = Counter((i + j) % 7 for i in range(12) for j in range(8))
    for told, asked in ("hero", "whose friend had a {shade}"), ("helper", "who was in a {shade}"):
        right, ways = (sum(clothes[-rest % 7] * pair[k] for rest, pair in enumerate(expected[told])) for k in (0, 1))
        (kind,) = [kind for kind in KINDS if kind.question.startswith(asked)]
        assert quiz.best_guess(kind) == pytest.approx(right / ways, rel=1e-12)


def test_best_guess_is_not_beaten():
    """Who knows the most frequent answer to each question of thousands of other validation tales is right as often as
    best_guess says, or less: within four standard errors."""
    def asked(name, count):
        rng = random.Random(name)
        for _ in range(count):
            (text, bound), = quiz.tell(rng, 1, True)
            heard = re.sub(r"\W+", " ", f" {text.lower()} ")
            yield from ((kind, *pair) for kind in KINDS if (pair := kind.ask(heard, bound)))
    counts = defaultdict(Counter)
    for kind, question, answer in asked("learn", 4000):
        counts[question][answer] += 1
    right = defaultdict(list)
    for kind, question, answer in asked("guess", 2000):
        right[kind].append(question in counts and counts[question].most_common(1)[0][0] == answer)
    for kind, found in right.items():
        best = quiz.best_guess(kind)
        assert sum(found) / len(found) < best + 4 * math.sqrt(best * (1 - best) / len(found)), kind
    (soup,) = [kind for kind in KINDS if "soup" in kind.question]  # few questions, so here it comes close
    (found,) = [quiz.best_guess(kind) for kind in KINDS if "found" in kind.question]
    assert quiz.best_guess(soup) == pytest.approx(1 / 24, rel=0.01) and found == pytest.approx(1 / 16, rel=0.01)


def test_what_can_be_guessed_is_not_asked():
    table = """
    lost: who lost the {object}? {hero}
    story: was {hero} a child? no
    story: was {hero} a {kind}? yes
    story: is {hero} he or she? {hero.they}
    lost: what had {hero}? a {object}
    """
    assert [kind.question for kind in quiz.kinds(table)] == ["who lost the {object}?", "what had {hero}?"]
    assert len(KINDS) == len(quiz.QUESTIONS.strip().splitlines())  # of those that are asked, nobody guesses so much
    assert max(map(quiz.best_guess, KINDS)) == 1 / 8


# -- the script --------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def tok():
    """A tokenizer as prepare/tales.py trains it, with the form for conversations."""
    some = [text for text, _ in tales.tell("tok", 3000)]
    return quiz.with_template(tokenizer.train_sentencepiece(some, 1536))


def test_words_are_those_of_the_tales(records, tok):
    """Questions have few words that the tales do not, and each word of an answer is one token."""
    known = {word.lower() for text, _ in tales.tell("known", 3000) for word in re.findall(r"\w+", text)}
    asked = {word.lower() for record in records["train"] for question, _, _ in read(record)[1]
             for word in re.findall(r"\w+", question)}
    assert asked - known == {"whose", "friend", "helped", "how", "weather", "think"}
    for record in records["train"][:300]:
        for _, answer, _ in read(record)[1]:
            assert len(tok.encode(" " + answer)) == len(answer.split())


def test_form_of_a_conversation(records, tok, tmp_path):
    """What is learned is each answer with its EOS; a prompt has exactly the ids before; transformers agrees."""
    from transformers import AutoTokenizer
    tok.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for record in records["train"][:20]:
        told, asked = read(record)
        messages = record["messages"]
        text = "\n".join(told) + "".join(f"\n{question} {answer}</s>" for question, answer, _ in asked)
        ids = tok.chat(messages, add_generation_prompt=False)
        assert ids == [tok.bos_id] + tok.encode(text, special=True) and tok.decode(ids, special=True) == "<s>" + text
        said_back = [m | {"content": f" {m['content']}"} if m["role"] == "assistant" else m for m in messages]
        assert tok.chat(said_back, add_generation_prompt=False) == ids  # decoded answers begin with their space
        found = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        assert found["input_ids"] == ids
        learned = [i for i, learn in zip(ids, found["assistant_masks"]) if learn]
        assert tok.decode(learned, special=True) == "".join(f" {answer}</s>" for _, answer, _ in asked)
        for i in range(1, len(messages), 2):
            prompt = tok.chat(messages[:i])
            assert ids[:len(prompt)] == prompt
            rest = tok.decode(ids[len(prompt):])  # an answer as a model would give it
            assert i + 1 < len(messages) or quiz.grade(rest, messages[i]["content"])


def run(monkeypatch, out, *args):
    sizes = "--conversations=40", "--val_conversations=30"
    monkeypatch.setattr(sys, "argv", ["quiz.py", "--out", str(out), *sizes, *args])
    quiz.main()
    return {split: [json.loads(line) for line in (out / f"{split}.jsonl").read_text().splitlines()]
            for split in ("train", "val")}


def test_script(tok, tmp_path, monkeypatch, capsys):
    tok.save(tmp_path / "tok")
    first = run(monkeypatch, tmp_path / "a", f"--tokenizer={tmp_path / 'tok'}")
    assert "unread" in capsys.readouterr().out
    assert [len(first[split]) for split in ("train", "val")] == [40, 30]
    assert {len(record["messages"]) for record in first["val"]} == {2}
    assert max(len(record["messages"]) for record in first["train"]) > 8
    assert {len(read(record)[0]) for records in first.values() for record in records} == {1}
    for records in run(monkeypatch, tmp_path / "c", f"--tokenizer={tmp_path / 'tok'}", "--two_tales=0.5").values():
        assert {len(read(record)[0]) for record in records} == {1, 2}
    assert run(monkeypatch, tmp_path / "b", f"--tokenizer={tmp_path / 'tok'}") == first
    assert run(monkeypatch, tmp_path / "a", f"--tokenizer={tmp_path / 'tok'}", "--seed=2") != first


def test_shards_learn_the_answers_and_nothing_else(tok, tmp_path, monkeypatch):
    tok.save(tmp_path / "tok")
    for split, records in run(monkeypatch, tmp_path / "a", f"--tokenizer={tmp_path / 'tok'}").items():
        data, mine = shards.Split(tmp_path / "a", split), tokenizer.load(tmp_path / "a")
        ids, marks = data[:], data.marks[:]
        assert mine.chat_template == {"default": quiz.TEMPLATE} and mine.fingerprint == tok.fingerprint
        starts = [*(i for i, mark in enumerate(marks) if mark & shards.START), len(ids)]
        assert len(starts) == len(records) + 1 and starts[0] == 0
        for first, end, record in zip(starts, starts[1:], records):
            assert ids[first:end].tolist() == tok.chat(record["messages"], add_generation_prompt=False)
            learned = [i for i, mark in zip(ids[first:end], marks[first:end]) if mark & shards.LEARN]
            assert tok.decode(learned, special=True) == "".join(f" {answer}</s>" for _, answer, _ in read(record)[1])


def test_without_tales_there_is_a_line(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "ROOT", tmp_path)
    with pytest.raises(config.Mistake, match="prepare/tales.py"):
        run(monkeypatch, tmp_path / "a")
