"""Built-in conversations: questions about the tales of prepare/tales.py, whose answers are exact.

    python prepare/tales.py && python prepare/quiz.py       # writes data/quiz: no download, a minute
    python prepare/quiz.py --names=False --excerpts=1 --conversations=8000 --out=data/quiz_begin      # to begin with
    python prepare/quiz.py --two_tales=1 --out=data/quiz_two    # harder: which of two tales is meant?

A conversation begins with a tale (with --two_tales one or two), told by the grammar, which has the answer to every
question. Every seventh combination of hero, helper and what the helper wears is held out (see `combinations`):
validation tells of these only, training of the others only. So a model that answers about validation has read the
tale. `best_guess` is how often one is right who has not read it, exact from the grammar; kinds of questions where that
is more than half are not asked.

The quick start's model copies names, which tales repeat. What a tale tells once, as where a hat was, it has never
copied: none of its heads looks for it, and its outputs hardly tell such words apart. Neither is learned without the
other, and beside questions for names, which are easy, it is not learned at all. So data/quiz_begin asks for no names,
and about a sentence or two, where there are few words to look among. Which of two tales a question means it does not
learn: half of its answers are right.

train.jsonl, val.jsonl: the conversations as {"messages": [...], "wrong": [...]}, for any model and its chat template.
meta.json, shards: the same in the ids of the tales' tokenizer, with marks of what is learned (see prepare/chat.py). It
has no chat template, so it gets the plainest one (TEMPLATE): tales, line end, question, space, answer, EOS. With the
space the words of an answer are the tokens that they are in the tale.

    grade("the owl", "the owl")       # the reward of an answer: right or not
"""
import functools
import itertools
import json
import math
import random
import re
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from any folder
import config
from prepare import chat, shards, tokenizer
from prepare.tales import GRAMMAR, Slot, finish, parse_choice

# The plots in which it is asked, a colon, the question, the answer; slots as in the grammar ("story" is any plot).
QUESTIONS = """
lost: who lost the {color} {object}? {hero}
lost: what had {hero} lost? a {color} {object}
lost: who found the {object}? the {helper}
lost: where was the {object}? {spot}
lost: who had a {color} {object}? {hero}
mystery: who had a {color} {object}? the {helper}
rescue: who had a {color} {tool}? {hero}
rescue: who {tool.trouble}? the {helper}
rescue: who helped the {helper}? {hero}
lost dream: who helped {hero}? the {helper}
dream: who wanted to {wish}? {hero}
dream: what did {hero} want to do? {wish}
friend: who wanted to play {game}? {hero}
friend: what did the {helper} play? {game}
mystery: who heard a {noise}? {hero}
dream friend rescue mystery: where was the {helper}? {spot}
story: whose friend was the {helper}? {hero}
story: whose friend had a {shade} {garment}? {hero}
story: who was in a {shade} {garment}? the {helper}
story: what was the {helper} in? a {shade} {garment}
story: who liked {soup} soup? {hero}
story: what did {hero} like? {soup} soup
story: how was the weather? {weather}
mystery: what did {hero} think of? a {monster}
"""
COMBINATION = ("hero", "helper", "shade", "garment")  # every tale has one of each
TEMPLATE = """\
{{ bos_token }}{% for message in messages %}{% if message.role == "assistant" %}
{% generation %} {{ message.content.strip() }}{{ eos_token }}{% endgeneration %}
{% else %}{{ "" if loop.first else "\\n" }}{{ message.content }}{% endif %}{% endfor %}"""


# -- questions ---------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Kind:
    """A line of QUESTIONS: plots in which it is asked, question and answer with slots."""
    plots: tuple
    question: str
    answer: str

    @functools.cached_property
    def slots(self):
        """(slots of the question, slots of the answer that it does not name): sets."""
        asked, told = (set(re.findall(r"{(\w+)", text)) for text in (self.question, self.answer))
        return asked, told - asked

    @functools.cached_property
    def named(self):
        """The slots, and facts about slots, that question and answer name."""
        return re.findall(r"{([\w.]+)}", self.question + self.answer)

    def ask(self, heard, bound):
        """(question, answer) about a tale, or some of it, in which `bound` says what each slot is. None where `heard`,
        its words between spaces, does not tell what they need."""
        if any(plot in bound for plot in self.plots) and set().union(*self.slots) <= bound.keys():
            told = (bound.get(slot) or spell(f"{{{slot}}}", bound) for slot in self.named)
            if all(f" {words.lower()} " in heard for words in told):
                return finish(spell(self.question, bound)), spell(self.answer, bound)
        return None


parse = functools.cache(parse_choice)


def spell(text, bound, rng=random):
    """A text with slots, where `bound` does not say what they are drawn anew."""
    said, _ = GRAMMAR.draw(parse(text), dict(bound), rng)
    return said[0] + finish(said)[1:]  # the "a" becomes "an" where it should; nothing new begins with a capital


def kinds(table=QUESTIONS):
    """The kinds of questions of which nobody guesses more than half."""
    found = [Kind(tuple(plots.split()), *re.fullmatch(r"(.*\?) (.*)", line).groups())
             for plots, line in (row.split(": ") for row in table.strip().splitlines())]
    return [kind for kind in found if best_guess(kind) <= 0.5]


def ways(part):
    """In how many equally likely ways a part of the grammar can be told."""
    if not isinstance(part, list):
        return ways(GRAMMAR.rules[part]) if isinstance(part, Slot) else 1
    return sum(math.prod(map(ways, option)) for option in part)


def best_guess(kind):
    """How often the most likely answer to a validation question is right, given nothing but the question: exact, since
    all choices in a tale are uniform and independent but for the combinations, which are counted."""
    asked, told = kind.slots
    named, answers = ([i for i, slot in enumerate(COMBINATION) if slot in slots] for slots in (asked, told))
    counts = defaultdict(Counter)  # of the answers to each question
    for combination in combinations(True):
        counts[tuple(combination[i] for i in named)][tuple(combination[i] for i in answers)] += 1
    right = sum(max(of.values()) for of in counts.values()) / len(combinations(True))
    return right / math.prod(ways(Slot(slot)) for slot in told - set(COMBINATION))


# -- conversations -----------------------------------------------------------------------------------------------

@functools.cache
def combinations(held_out):
    """What a hero, a helper and its clothes may be in validation (held_out) or in training: one of seven combinations
    is held out, where the four indices add up to 7 n."""
    words = [[word for (word,) in GRAMMAR.rules[slot]] for slot in COMBINATION]
    indices = itertools.product(*(range(len(some)) for some in words))
    return [combination for combination, at in zip(itertools.product(*words), indices)
            if (sum(at) % 7 == 0) == held_out]


def tell(rng, number, held_out):
    """So many tales in which all heroes and all helpers differ -> [(text, what each slot is), ...]."""
    while True:
        chosen = [rng.choice(combinations(held_out)) for _ in range(number)]
        if all(len(set(column)) == number for column in list(zip(*chosen))[:2]):
            break
    told = []
    for combination in chosen:
        bound = dict(zip(COMBINATION, combination))
        told.append((finish(GRAMMAR.draw(Slot("story"), bound, rng)[0]), bound))
    return told


def excerpt(text, rng):
    """One or two sentences of a tale."""
    sentences = re.findall(r'.+?[.!?]"?(?: |$)', text)
    count = rng.randint(1, 2)
    first = rng.randrange(len(sentences) - count + 1)
    return "".join(sentences[first:first + count]).strip()


def questions(tales, asked, rng):
    """[(question, answer, wrong answer), ...] about these tales together: all of these kinds that have one answer. The
    wrong one is what the same kind asks of the other tale, if there is one, or drawn anew."""
    found = []
    for text, bound in tales:
        heard = re.sub(r"\W+", " ", f" {text.lower()} ")
        for kind in asked:
            if pair := kind.ask(heard, bound):
                others = [spell(kind.answer, other, rng) for _, other in tales if other is not bound]
                while (wrong := others.pop() if others else spell(kind.answer, {}, rng)) == pair[1]:
                    pass
                found.append((*pair, wrong))
    times = Counter(question for question, _, _ in found)
    return [one for one in found if times[one[0]] == 1]


def conversation(asked, rng, held_out, most, two_tales=0.0, excerpts=0.0):
    """{"messages": [...], "wrong": [a wrong answer to each]}: at most so many questions about an excerpt of a tale in a
    share of the conversations, in a share of the others about two tales, else about one. No answer comes twice: most
    ask for a name, which would repeat what was just said."""
    while True:
        if rng.random() < excerpts:
            tales = [(excerpt(text, rng), bound) for text, bound in tell(rng, 1, held_out)]
        else:
            tales = tell(rng, 1 + (rng.random() < two_tales), held_out)
        if found := questions(tales, asked, rng):
            break
    rng.shuffle(found)
    found = list({answer: (question, answer, wrong) for question, answer, wrong in found}.values())[:most]
    messages = [{"role": role, "content": text} for question, answer, _ in found
                for role, text in (("user", question), ("assistant", answer))]
    messages[0]["content"] = "\n".join([*(text for text, _ in tales), messages[0]["content"]])
    return {"messages": messages, "wrong": [wrong for _, _, wrong in found]}


def grade(text, answer):
    """Is this the answer? Every word of it and no other; space around does not count."""
    return text.strip() == answer.strip()


# -- the script --------------------------------------------------------------------------------------------------

LONGEST = 1024  # tokens in a conversation: the longest has a fifth of them in the tales' tokens, of two tales a third
FILES = rf"{shards.DATA_FILES}|(train|val)\.jsonl(\.\d+\.tmp)?"  # those of this data set


@dataclass
class Settings:
    """How many conversations, and where they go."""
    conversations: int = 20000  # [1, inf) to learn from, 3 million tokens: twice what config/quiz.py reads
    val_conversations: int = 6000  # [1, inf) of held-out combinations, a question each: 95 % has an error of 0.3 points
    questions: int = 20  # [1, inf) in a training conversation at most, nearly all it can have: reading costs more
    names: bool = True  # False: no questions for the name of a hero or a helper
    two_tales: float = 0.0  # [0, 1] share of those about whole tales that have two: which is meant is not learned
    excerpts: float = 0.0  # [0, 1] share of the training conversations that are about a sentence or two
    tokenizer: str | None = None  # file or folder, of the model that is to learn; None: data/tales, the quick start's
    seed: int = 1337  # [0, inf) the same seed gives the same files
    out: str | None = None  # folder to write; None: data/quiz


def with_template(tok):
    """The tokenizer with a form for conversations: TEMPLATE, if it has none of its own."""
    return tok if tok.chat_template else tokenizer.Tokenizer(tok.spec, tok.settings | {"chat_template": TEMPLATE},
                                                             tok.model)


def write(out, cfg, asked):
    """Write both splits as jsonl."""
    for split, count, how in (("train", cfg.conversations, dict(most=cfg.questions, excerpts=cfg.excerpts)),
                              ("val", cfg.val_conversations, dict(most=1))):
        rng = random.Random(f"{cfg.seed} {split}")
        lines = [json.dumps(conversation(asked, rng, split == "val", two_tales=cfg.two_tales, **how)) + "\n"
                 for _ in tqdm(range(count), split, unit=" conversations")]
        shards.write_text(out / f"{split}.jsonl", "".join(lines))


def main():
    cfg = config.load(Settings)
    out, tales = shards.own_folder(cfg.out or config.ROOT / "data/quiz", FILES), config.ROOT / "data/tales"
    if cfg.tokenizer is None and not (tales / "meta.json").is_file():
        raise config.Mistake("no data in data/tales: run `python prepare/tales.py` first, or give --tokenizer FOLDER")
    tok = with_template(tokenizer.load(cfg.tokenizer or tales))
    asked = [kind for kind in kinds() if cfg.names or not kind.question.startswith("who")]
    out.mkdir(parents=True, exist_ok=True)
    write(out, cfg, asked)
    lessons = chat.Lessons(tok, chat.Settings(), LONGEST)
    chat.write(out, tok, lessons, [out / "train.jsonl"], [out / "val.jsonl"])
    print(*lessons.report(), sep="\n")
    print(f"{out}: {cfg.conversations:,} conversations to learn from, {cfg.val_conversations:,} with what is held out")
    print("right unread, at best: " + ", ".join(f"{kind.question} {best_guess(kind):.1%}" for kind in asked))


if __name__ == "__main__":
    config.run(main)
