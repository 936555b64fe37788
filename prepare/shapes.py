"""Built-in pictures: scenes of colored shapes, with captions, and questions whose answers are exact.

    python prepare/shapes.py                    # writes data/shapes: no download, half a minute
    python prepare/shapes.py --images=50000     # more of them
    python prepare/shapes.py --stage=text       # writes data/shapes_text, for the first of four stages (see `told`)

A scene holds one or two objects, each with a color, a shape, a size and one of nine positions. Every seventh
combination of these four is held out (see `held_out`): validation and test scenes are made of such objects
only, training scenes of the others only. So a model that answers about them has understood how the four go
together; it cannot have seen the object. Where, how large, how turned and on what background an object
is drawn varies a little, as do the colors themselves.

Where stages follow each other, captions come plain and with "there is" in front, half each, and preferences are for the
plain ones.

`meta.json` has the chance level: how often the best guess without looking is right, for each kind of question.
The pictures are rows of one images.npy (N, 48, 48, 3), read through a memory map: no files to open and nothing
to decode, which loads fastest, at 7 kB each.
"""
import json
import math
import os
import random
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from any folder
import config
from prepare import chat, examples, images, shards

COLORS = {"red": (215, 40, 40), "orange": (245, 140, 25), "yellow": (245, 225, 55), "green": (45, 160, 70),
          "blue": (45, 85, 215), "purple": (135, 50, 170), "black": (20, 20, 20), "white": (248, 248, 248)}
SHAPES = ("circle", "square", "triangle", "star", "cross", "heart")
SIZES = {"small": (3.75, 4.2), "large": (6.0, 6.75)}  # range of radii, in pixels of SIDE
PLACES = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
SIDE = 48  # pixels: each of the nine places is one patch of vit_tiny, which sees whole shapes and learns far sooner
VOCABULARY, LONGEST = 512, 64  # tokens of the text's tokenizer with <image>; of its longest conversation
SHARP = 4  # drawn so many times larger, then reduced: smooth edges


def held_out(color, shape, size, place):
    """Is this combination (of names) kept from training? One in seven is: where the four indices add up to 7 n."""
    return (list(COLORS).index(color) + SHAPES.index(shape) + list(SIZES).index(size) + PLACES.index(place)) % 7 == 0


OBJECTS = [(c, s, z, p) for c in COLORS for s in SHAPES for z in SIZES for p in PLACES]
SEEN, UNSEEN = [o for o in OBJECTS if not held_out(*o)], [o for o in OBJECTS if held_out(*o)]


def outline(shape):
    """Corners of a shape around (0, 0) within the unit circle, y down; None for the circle itself."""
    def around(angle, radius=1.0):
        return radius * math.sin(math.radians(angle)), -radius * math.cos(math.radians(angle))
    if shape == "square":
        return [around(a) for a in (45, 135, 225, 315)]
    if shape == "triangle":
        return [around(a) for a in (0, 120, 240)]
    if shape == "star":
        return [around(36 * i, (1.0, 0.45)[i % 2]) for i in range(10)]
    if shape == "cross":
        quarter = 0.3 - 0.95j, 0.3 - 0.3j, 0.95 - 0.3j  # x + yj; times j it is turned by 90 degrees
        return [((z * 1j ** turn).real, (z * 1j ** turn).imag) for turn in range(4) for z in quarter]
    if shape == "heart":
        waves = ((13, 1), (-5, 2), (-2, 3), (-1, 4))
        return [(math.sin(t) ** 3, -sum(a * math.cos(k * t) for a, k in waves) / 17)
                for t in (math.pi * i / 20 for i in range(40))]


def draw(objects, rng):
    """A picture (PIL, RGB, SIDE x SIDE) of objects (color, shape, size, place), each in its own place."""
    from PIL import Image, ImageDraw
    gray = rng.uniform(110, 165)
    image = Image.new("RGB", (SIDE * SHARP, SIDE * SHARP), tuple(round(gray + rng.uniform(-12, 12)) for _ in range(3)))
    pen = ImageDraw.Draw(image)
    for color, shape, size, place in objects:
        row, column = divmod(PLACES.index(place), 3)
        x, y = ((cell + 0.5) * SIDE / 3 + rng.uniform(-1, 1) for cell in (column, row))
        r, turn = rng.uniform(*SIZES[size]), math.radians(rng.uniform(-12, 12))
        fill = tuple(max(0, min(255, round(level + rng.uniform(-12, 12)))) for level in COLORS[color])
        corners = outline(shape)
        if corners is None:
            r *= 0.9  # as large to the eye as the others
            pen.ellipse([SHARP * v for v in (x - r, y - r, x + r, y + r)], fill)
        else:
            pen.polygon([(SHARP * (x + r * (u * math.cos(turn) - v * math.sin(turn))),
                          SHARP * (y + r * (u * math.sin(turn) + v * math.cos(turn)))) for u, v in corners], fill)
    return image.reduce(SHARP)


def describe(objects):
    """The caption that names objects in this order."""
    return " and ".join(f"a {size} {color} {shape} at the {place}" for color, shape, size, place in objects)


def captions(objects):
    """The two captions of a scene, plain and with words in front."""
    return [describe(objects), "there is " + describe(objects)]


def questions(objects, rng):
    """One question of each kind that has an answer here, in random order: [(question, answer), ...].

    The kind is the first two words. A question names an object by what no other one shares; yes and no are equally
    likely. To be asked one at a time: a question can give away the answer to another."""
    color, shape, size, place = rng.choice(objects)
    asked = [("How many shapes are there?", ("one", "two")[len(objects) - 1]),
             (f"What is at the {place}?", f"a {size} {color} {shape}")]
    if sum(o[1] == shape for o in objects) == 1:
        asked += [(f"What color is the {shape}?", color), (f"What size is the {shape}?", size),
                  (f"Where is the {shape}?", f"at the {place}")]
    if sum(o[0] == color for o in objects) == 1:
        asked.append((f"Which shape is {color}?", shape))
    yes, present = rng.random() < 0.5, {o[:2] for o in objects}
    absent = [(c, s) for c in COLORS for s in SHAPES if (c == color) != (s == shape) and (c, s) not in present]
    c, s = (color, shape) if yes else rng.choice(absent)  # absent, but with the color or the shape of what is there
    asked.append((f"Is there a {c} {s}?".replace("a orange", "an orange"), "yes" if yes else "no"))
    if len({o[1] for o in objects}) == 2:
        a, b = rng.sample(objects, 2)
        (y, x), (v, u) = (divmod(PLACES.index(o[3]), 3) for o in (a, b))
        yes = rng.random() < 0.5
        relation = rng.choice([name for name, holds in (("left of", x < u), ("right of", x > u), ("above", y < v),
                                                        ("below", y > v)) if holds == yes])
        asked.append((f"Is the {a[1]} {relation} the {b[1]}?", "yes" if yes else "no"))
    rng.shuffle(asked)
    return asked


def scene(rng, held_out=False):
    """A scene -> (picture, objects in reading order, [(question, answer), ...]). rng: random.Random; held_out: made of
    objects that training never shows, else of objects that validation never shows."""
    pool = UNSEEN if held_out else SEEN
    objects = [rng.choice(pool)]
    if rng.random() < 0.5:
        objects.append(rng.choice([o for o in pool if o[3] != objects[0][3]]))
    return draw(objects, rng), sorted(objects, key=lambda o: PLACES.index(o[3])), questions(objects, rng)


# -- what is told of a scene -------------------------------------------------------------------------------------

def talk(question, answer):
    """A conversation of one question."""
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}


def texts(objects, asked, rng):
    """Conversations without a picture: a scene made up, one said again in any order, and each question about one. A
    third form has other words behind the color: so "Which shape is red?" asks for more than the word behind "red"."""
    def said():
        some = rng.sample(objects, len(objects))
        turned = " and ".join(f"a {shape}, {size} and {color}, at the {place}" for color, shape, size, place in some)
        return rng.choice([*captions(some), turned])
    return [talk("Make up a picture.", said()), talk(said(), said()),
            *(talk(f"{said()}\n{question}", answer) for question, answer in asked)]


def told(stage, row, objects, asked, rng):
    """The records about a scene whose picture is this row of images.npy, as images.py has them, by the stage that
    learns them: "text" a Llama without pictures; "align" captions; "instruct" captions, questions and some text, lest
    it be forgotten; "prefer" two captions; "together" the plain caption and questions."""
    plain, longer = captions(objects)
    caption = {"image": row, "captions": [plain, longer]}
    about = [{"image": row} | talk(f"<image>\n{question}", answer) for question, answer in asked]
    if stage == "text":
        return texts(objects, asked, rng)
    if stage == "align":
        return [caption]
    if stage == "prefer":
        return [{"image": row, "question": "<image>", "chosen": plain, "rejected": longer}]
    if stage == "instruct":
        return [caption, *about, *rng.sample(texts(objects, asked, rng), rng.random() < 0.375)]
    return [{"image": row, "captions": [plain]}, *about]


# -- the script --------------------------------------------------------------------------------------------------

@dataclass
class Settings:
    """How many scenes, for what, and where they go."""
    stage: str = "together"  # {together, text, align, instruct, prefer} what is to learn from them, see `told`
    images: int = 16000  # [1, inf) training pictures: 110 MB; too many for a small model to learn by heart
    val_images: int = 1000  # [1, inf) validation pictures, of held-out combinations only
    test_images: int = 1000  # [1, inf) test pictures, the same: for figures on what no choice of settings has seen
    questions: int = 8  # [1, inf) about a picture at most, each in a conversation of its own: answers give away others
    seed: int = 1337  # [0, inf) the same seed gives the same files
    out: str | None = None  # folder to write; None: data/shapes, data/shapes_text and so on


def kind(question):
    """The kind of a question: its first two words."""
    return " ".join(question.split()[:2])


def chance(train, val):
    """{kind: share of val that the best guess without looking gets right}; each is a list of (question, answer).

    The guess for a question is the answer most frequent in training for its text (for its kind if the text is new)."""
    counts = defaultdict(Counter)
    for question, answer in train:
        counts[question][answer] += 1
        counts[kind(question)][answer] += 1
    right = defaultdict(list)
    for question, answer in val:
        guess = (counts.get(question) or counts[kind(question)]).most_common(1)
        right[kind(question)].append(bool(guess) and guess[0][0] == answer)
    return {k: sum(v) / len(v) for k, v in sorted(right.items())} | {"all": sum(map(sum, right.values())) / len(val)}


def write_text(out, cfg):
    """Write conversations without pictures as train.py reads them, with a tokenizer that has vlm.py's <image>."""
    sizes, records = {"train": cfg.images, "val": cfg.val_images}, {}
    for split, count in sizes.items():
        rng = random.Random(f"{cfg.seed} {split} text")
        scenes = (scene(rng) for _ in range(count))
        records[split] = [record for _, objects, found in scenes
                          for record in told("text", None, objects, found[:cfg.questions], rng)]
    images.save(records, out)
    tok, _ = examples.with_image(examples.new_tokenizer(images.load(out, "train"), VOCABULARY, 1))
    chat.write(out, tok, chat.Lessons(tok, chat.Settings(), LONGEST), *([out / f"{split}.jsonl"] for split in sizes))


def write_pictures(out, cfg):
    """Write the pictures of all splits and what is told of them, as vlm.py reads them, and meta.json.

    Returns the chance level."""
    sizes = {"train": cfg.images, "val": cfg.val_images, "test": cfg.test_images}
    out.mkdir(parents=True, exist_ok=True)
    pixels = shards.new_array(out / "images.npy.tmp", (sum(sizes.values()), SIDE, SIDE, 3), np.uint8)
    row, records, asked = 0, defaultdict(list), defaultdict(list)
    for split, count in sizes.items():
        rng, choices = random.Random(f"{cfg.seed} {split}"), random.Random(f"{cfg.seed} {split} {cfg.stage}")
        for _ in tqdm(range(count), desc=split, unit=" pictures"):
            pixels[row], objects, found = scene(rng, split != "train")
            records[split] += told(cfg.stage, row, objects, found[:cfg.questions], choices)
            asked[split] += found
            row += 1
    pixels.flush()
    guess = chance(asked["train"], asked["val"])
    meta = {"name": out.resolve().name, "images": sizes, "seed": cfg.seed, "chance": guess,
            "held_out": {"rule": "(color + shape + size + place) % 7 == 0, as indices in these lists",
                         "color": list(COLORS), "shape": SHAPES, "size": list(SIZES), "place": PLACES}}
    os.replace(out / "images.npy.tmp", out / "images.npy")
    images.save(records, out)
    shards.write_text(out / "meta.json", json.dumps(meta, indent=1) + "\n")
    return guess


def main():
    cfg = config.load(Settings)
    name = "shapes" if cfg.stage == "together" else f"shapes_{cfg.stage}"
    out = shards.own_folder(cfg.out or config.ROOT / "data" / name, f"{images.FILES}|{shards.DATA_FILES}")
    if cfg.stage == "text":
        write_text(out, cfg)
        print(f"{out}: {cfg.images:,} conversations to learn from")
        return
    guess = write_pictures(out, cfg)
    print(f"{out}: {cfg.images:,} pictures to learn from; of held-out combinations {cfg.val_images:,} and "
          f"{cfg.test_images:,}")
    print("right without looking: " + ", ".join(f"{k} {v:.0%}" for k, v in guess.items()))


if __name__ == "__main__":
    config.run(main)
