"""Built-in data: tiny stories from a grammar of our own, with the exact probability of every story.

    python prepare/tales.py                     # writes data/tales: no download, a few seconds
    python prepare/tales.py --stories=100000    # more of them

A loss in bits per byte says little until one knows how low it can go. Here one does: each story is told by
a grammar whose choices are all uniform, and no text has two derivations, so `-ln p(text)` is the sum of
`ln n` over the choices made. `meta.json` holds that sum for each split as `floor_bpb`. A model that has
learned all there is to learn comes close to the floor; a loss below it proves a leak.

    text, nats = story(random.Random(1))        # tell a story
    nats(text)                                  # the same number, from the text alone

How the grammar is written (WORDS and PLOTS below):
    {name}        a slot: drawn where it is first met, repeated wherever it is met again
    {name.fact}   what WORDS says about the word in that slot: {object.fun} of kite is "fly it in the wind"
    [a | b | c]   one of them, all equally likely; alternatives may hold slots and brackets
Every line of a rule is told in order; a line that starts with | is another way to say the line above.
Sentences are written in lower case, and with "a" for both articles: `finish` puts that right.
"""
import itertools
import math
import random
import re
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from any folder
import config  # noqa: E402
from prepare import shards, tokenizer  # noqa: E402

# Tables: the first line names the slot and the facts that each row gives, separated by semicolons.
WORDS = """
hero: they
    Mia, Lily, Zoe, Rosa, Nora, Ella, Ruby, Luna, Hana, Tess, Pearl, Dot: she
    Tom, Ben, Leo, Max, Sam, Finn, Oscar, Hugo, Otto, Milo, Kofi, Pip: he

helper: they
    owl, hen, seal, turtle, goose, bee, robin, sheep: she
    frog, goat, crab, snail, mole, crow, donkey, beaver: he

object: fun
    kite: fly it in the wind
    ball: bounce it on the wall
    hat: wear it in bed
    drum: beat it like thunder
    bell: ring it at dinner
    flute: play it to the birds
    wagon: pull it up the hill
    crown: wear it in the bath
    boat: sail it in the bath
    puppet: make it dance

wish: way
    touch the moon: showed {them} a bowl of water with the moon in it
    catch a star: waited with {them} until a firefly sat on {their} nose
    wear a crown: made {them} a crown of yellow flowers
    fly: tied a rope to a tree and made a swing
    see a rainbow: splashed water into the sun until all the colors were there
    sail a ship: made a ship out of a box and a blanket
    play in the snow: shook a tree until white flowers fell like snow
    find a treasure: drew a map that led to a coin under a stone

tool: trouble; fix
    rope: was stuck in the mud; pulled at the rope until {helper.they} was free
    blanket: was cold and wet; put the blanket around {helper.them}
    lamp: was afraid of the dark; lit the lamp and waited with {helper.them}
    umbrella: did not like the rain; held the umbrella over {helper.them}
    ladder: could not reach the berries; climbed up the ladder and picked them all
    hammer: had a broken chair; took the hammer and made it as good as new
    flute: could not fall asleep; played a soft song on the flute
    teapot: had a bad cold; made hot tea in the teapot
"""

PLOTS = """
they: {hero.they}
them: {hero.them}
their: {hero.their}

kind: child | mouse | rabbit | kitten | puppy | bear | hedgehog | dragon | robot | fox | pony | lion | monkey | penguin
trait: little | brave | shy | curious | merry | clever | gentle | cheerful | quiet | silly | sleepy | kind | careful
  | noisy | lucky | patient
place: pond | forest | beach | farm | garden | mountain | river | meadow | castle | market | orchard | harbor | lake
  | mill | village | lighthouse
weather: sunny | windy | rainy | foggy | cloudy | chilly | warm | snowy | stormy | misty | bright | frosty
hour: morning | afternoon | evening | day | Monday | Friday | Saturday | Sunday
color: red | blue | green | yellow | pink | purple | orange | silver | golden | striped | spotted | shiny
look: old | wise | friendly | plump | funny | grumpy | young | polite | lazy | busy | proud | jolly | dreamy | famous
  | hungry | tired
shade: black | white | brown | gray | woolen | velvet | paper | straw | flowery | dotted | torn | new
garment: hat | scarf | coat | apron | belt | vest | cape | shirt
who: a {look} {helper} in a {shade} {garment}
windows: [two | three | five | seven | nine | ten | twenty | forty]
  [red | blue | green | yellow | round | tall | tiny | open]
soup: carrot | onion | tomato | pumpkin | noodle | potato | bean | fish
few: three | four | six | eight | eleven | twelve | thirteen | fifty
number: two | three | five | seven | nine | ten | twenty | forty
taste: sweet | warm | fresh | crunchy | juicy | sticky | tiny | giant | sour | soft | yummy | cold | spicy | round
  | salty | lovely
food: plums | pears | apples | cherries | berries | nuts | carrots | cookies | pancakes | muffins | grapes | beans
  | radishes | buns | waffles | figs
treat: {number} {taste} {food}
spot: [under | behind | beside | near] a [mossy | crooked | muddy | dusty | broken | lonely | wooden | painted]
  [log | tree | bench | fence | bush | gate | wall | cart]
junk: a [rusty | dirty | wet | rotten | flat | bent | sad | smelly]
  [spoon | sock | shoe | button | feather | egg | coin | leaf]
game: tag | chess | ball | marbles | cards | music | pirates | knights | school | hide and seek | doctor | shop
noise: tap | boom | ding | swish | toot | squeak | bump | rattle
monster: monster | ghost | giant | pirate | troll | witch | wizard | dinosaur
family: mother | father | grandmother | grandfather | sister | brother | aunt | uncle
happy: happy | glad | pleased | thrilled
until: until [the sun went down | the stars came out | the moon came up | it was dark | it rained
  | bedtime | lunch | dinner]
often: every [Monday | Tuesday | Friday | Saturday | Sunday | spring | summer | winter]

story: {opening} {home} [{lost} | {dream} | {friend} | {rescue} | {mystery}] {closing}

opening:
    once upon a time, a {trait} {kind} named {hero} lived near the {place}.
  | once there was a {trait} {kind} named {hero}.
  | near the {place} lived a {trait} {kind} named {hero}.
  | this is the story of {hero}, a {trait} {kind}.
  | everybody near the {place} knew {hero}, the {trait} {kind}.
  | do you know {hero}, the {trait} {kind}?
  | {hero} was a {trait} {kind} and lived near the {place}.
  | long ago, near the {place}, there was {hero}, a {trait} {kind}.

home:
    {hero} had a house with {windows} windows and a [round | tiny | squeaky | secret] door.
  | {hero} had {few} [brothers | sisters | cousins | goldfish] and a [tall | busy | funny | sleepy] {family}.
  | {hero} liked {soup} soup and [mint | apple | lemon | cherry] tea.
  | {hero} could [whistle | skip | hum | yodel] {few} [songs | times | hours | minutes] without a stop.
  | {hero} lived with {their} {family} in a [paper | wooden | stone | straw] [house | tower | boat | tent].
  | {hero} slept in a [paper | wooden | stone | straw] bed with {few} [pillows | teddies | blankets | quilts].

closing:
    from that day on, {hero} and the {helper} met {often}.
  | that night, {hero} dreamed of the {look} {helper}.
  | good night, {trait} {hero}, and good night, {look} {helper}!
  | the {helper} still [talks | sings | dreams | thinks] of the {trait} {kind}.
  | if you go to the {place}, you may see {hero} and the {helper} there.
  | {hero} told {their} {family} all about the {look} {helper}.
  | and so the {kind} and the {helper} became friends.
  | {often}, the {helper} comes to see {hero} near the {place}.

lost:
    {they} had a {color} {object} and loved to {object.fun}.
  | the best thing {they} had was a {color} {object}.
  | {their} {family} gave {them} a {color} {object}.
    but one {weather} {hour}, [it was gone | it rolled away | the wind took it | {they} lost it].
    {they} looked everywhere, but found only {junk}.
  | {they} cried {number} [big | small | salty | silver] tears.
  | "where are you, little {object}?" called {hero}.
    then {who} [found | saw | heard | smelled] it {spot}.
  | {who} brought it back. it had been {spot}.
    {hero} was so {happy} that {they} gave {helper.them} {treat}.
  | "thank you!" said {hero}, and they shared {treat}.
  | {hero} kissed the {object} {number} times.

dream:
    more than anything, {they} wanted to {wish}.
  | "I wish I could {wish}," {they} said {often}.
  | {they} told {their} {family}, "one day I will {wish}."
    one {weather} {hour}, {hero} met {who} {spot}.
  | one {weather} {hour}, {who} [walked | danced | rolled | marched] by.
    "that is easy," said the {helper}, and {wish.way}.
  | the {helper} thought about it. then {helper.they} {wish.way}.
    {hero} [danced | jumped | laughed | sang] {until}.
  | now nobody can say that {hero} cannot {wish}.
  | {hero} was so {happy} that {they} gave {helper.them} {treat}.

friend:
    {they} was sad, because {they} had nobody to play {game} with.
  | "who wants to play {game} with me?" {they} asked {often}.
    one {weather} {hour}, {hero} saw {who} {spot}.
  | one {weather} {hour}, {who} sat {spot}, all alone.
    {hero} held out {treat} and asked, "can we play {game}?"
  | "hello, I am {hero}," {they} said. "I have {treat}."
    The {helper} [smiled | nodded | laughed | jumped], and they played {game} {until}.
  | The {helper} was so {happy} that they played {game} {until}.

rescue:
    {they} never went out without a {color} {tool}.
  | {their} {family} gave {them} a {color} {tool}.
    one {weather} {hour}, {hero} met {who}, who {tool.trouble}.
  | one {weather} {hour}, {hero} heard a cry. {spot} sat {who}, who {tool.trouble}.
    so {hero} {tool.fix}.
  | "do not worry," said {hero}, and {tool.fix}.
    "thank you!" said the {helper}, and gave {them} {treat}.
  | the {helper} was so {happy} that they danced {until}.
  | then they sat down and ate {treat} {until}.
  | now everybody near the {place} wants to have a {color} {tool}.

mystery:
    one {weather} {hour}, {hero} heard a [strange | loud | soft | terrible] sound: {noise}, {noise}!
  | {noise}, {noise}! what was that sound, one {weather} {hour}?
    "it must be a {monster}!" cried {hero}.
  | {they} was not afraid of any {monster} and went to look.
    but it was only {who}, [mending | painting | washing | shaking] a {color} {object} {spot}.
  | and there sat {who} {spot}, [mending | painting | washing | shaking] a {color} {object}.
    "do you want {treat}?" asked the {helper}.
  | they laughed about it {until}.
  | they ate {treat} and played with the {object}.
"""

PRONOUNS = {"she": {"them": "her", "their": "her"}, "he": {"them": "him", "their": "his"}}
SENTENCE = re.compile(r'(^"?|[.!?] "?|\." "?| ")([a-z])')  # where a capital letter belongs


def finish(plain):
    """Capital letters at the start of sentences, and "an" before a vowel."""
    return SENTENCE.sub(lambda m: m[1] + m[2].upper(), re.sub(r"\ba(?= [aeiou])", "an", plain))


class Slot(str):
    """The name that stood between braces."""


def known(part, bound):
    """The text of `part` where nothing is left to choose, else None."""
    return bound.get(part) if isinstance(part, Slot) else part if isinstance(part, str) else None


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
    text = re.sub(r" *([|]) *", r"\1", text.strip())
    return read(iter(re.findall(r"\{[\w.]+\}|[][|]|[^][{}|]+", text + "]")))


class Grammar:
    """rules: {slot: alternatives}; facts: {word: {fact: alternatives}}; both as `parse_choice` gives them."""

    def __init__(self, words=WORDS, plots=PLOTS):
        self.rules, self.facts, lines = {}, {}, {}
        for table in words.strip().split("\n\n"):
            (slot, names), *rows = [line.strip().split(": ", 1) for line in table.splitlines()]
            for keys, cells in rows:
                values = dict(zip(names.split("; "), cells.split("; "), strict=True))
                values |= PRONOUNS.get(values.get("they"), {})
                for word in keys.split(", "):
                    self.rules.setdefault(slot, []).append((word,))
                    facts = self.facts.setdefault(word, {})
                    facts |= {fact: parse_choice(value) for fact, value in values.items()}
        for line in plots.splitlines():
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
        text = known(part, bound)
        if text is not None:
            return text, 0.0
        options = self.options(part, bound)
        drawn = [self.draw(p, bound, rng) for p in rng.choice(options)]
        text = "".join(t for t, _ in drawn)
        if isinstance(part, Slot):
            bound[part] = text
        return text, math.log(len(options)) + sum(n for _, n in drawn)

    def parses(self, parts, text, at, bound):
        """Every way in which `parts` spell lower-case `text` from `at` on: (spelling, bound, nats)."""
        if not parts:
            yield "", bound, 0.0
            return
        for head, then, nats in self.heads(parts[0], text, at, bound):
            for tail, end, more in self.parses(parts[1:], text, at + len(head), then):
                yield head + tail, end, nats + more

    def heads(self, part, text, at, bound):
        """The same for one part."""
        said = known(part, bound)
        if said is None:
            options = self.options(part, bound)
            for option in options:
                for said, then, nats in self.parses(option, text, at, bound):
                    yield said, then | {part: said} if isinstance(part, Slot) else then, nats + math.log(len(options))
        elif text.startswith(said.lower(), at):
            yield said, bound, 0.0

    def story(self, rng):
        """Tell a story -> (text, nats): nats = -ln p(text), from the choices made. rng: random.Random."""
        plain, nats = self.draw(Slot("story"), {}, rng)
        return finish(plain), nats

    def nats(self, text):
        """-ln p(text), from the text alone; ValueError where the grammar cannot tell it in exactly one way."""
        plain = re.sub(r"\ban(?= [aeiou])", "a", text.lower())
        found = [nats for said, _, nats in self.parses((Slot("story"),), plain, 0, {}) if finish(said) == text]
        if len(found) != 1:
            raise ValueError(f"{len(found)} derivations, not 1: {text!r}")
        return found[0]


GRAMMAR = Grammar()
story, nats = GRAMMAR.story, GRAMMAR.nats


@dataclass
class Settings:
    """How many tales, and where they go."""
    stories: int = 30000  # [1, inf) training stories: 3 million tokens, as much as a laptop reads in a few minutes
    val_stories: int = 1000  # [1, inf) validation stories, none of them in training
    vocab_size: int = 1536  # [1, inf) tokens of the BPE: enough for almost every word of the tales to be one
    seed: int = 1337  # [0, inf) the same seed gives the same files
    out: str | None = None  # folder to write; None: data/tales


def tell(seed, count, without=()):
    """Yield `count` stories that are not among `without`, as (text, nats)."""
    rng = random.Random(seed)
    while count:
        text, nats = story(rng)
        if text not in without:
            yield text, nats
            count -= 1


def main():
    from tqdm import tqdm
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
