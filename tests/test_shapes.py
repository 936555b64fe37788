"""prepare/shapes.py: the pictures show what the captions say, and training never shows what is held out."""
import hashlib
import json
import random
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import chain

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import config
import train
import vlm
from prepare import examples, images, shapes, shards, tokenizer

CAPTION = re.compile(r"a (small|large) (\w+) (\w+) at the (\w+(?: (?:left|right))?)(?: and |$)")
TURNED = re.compile(r"a (\w+), (\w+) and (\w+), at the")
CELL = shapes.SIDE // 3  # pixels of a place


def read(caption):
    """A caption, plain or not, or what only text says -> its objects (color, shape, size, place)."""
    caption = TURNED.sub(r"a \2 \3 \1 at the", caption.removeprefix("there is "))
    found = [(color, shape, size, place) for size, color, shape, place in CAPTION.findall(caption)]
    assert shapes.describe(found) == caption and all(o in shapes.OBJECTS for o in found)
    return found


def inside(shape, x, y):
    """Is (x, y), y down, in a shape of radius 1? Written as inequalities, not as the outlines that are drawn."""
    if shape == "circle":
        return np.hypot(x, y) < 0.9
    if shape == "square":
        return np.maximum(abs(x), abs(y)) < 0.707
    if shape == "triangle":
        return (y < 0.5) & (y > 3 ** 0.5 * abs(x) - 1)
    if shape == "cross":
        return (np.minimum(abs(x), abs(y)) < 0.3) & (np.maximum(abs(x), abs(y)) < 0.95)
    if shape == "heart":
        c = np.sqrt(1 - np.minimum(abs(x), 1) ** (2 / 3))  # cos t where sin(t) ** 3 = x: between the arcs of c and -c
        above, below = (-(19 * k - 2 * k * k - 8 * k ** 3 - 8 * k ** 4 + 4) / 17 for k in (c, -c))
        return (abs(x) < 1) & (above < y) & (y < below)
    angle = np.abs((np.degrees(np.arctan2(x, -y)) + 36) % 72 - 36)  # the star: from its nearest point
    radius, t = np.hypot(x, y), np.radians(angle)
    # the edge from the point (1 at 0 degrees) to the notch (0.45 at 36 degrees)
    nx, ny = 0.45 * np.cos(np.pi / 5), 0.45 * np.sin(np.pi / 5)
    return radius * (np.cos(t) * ny + np.sin(t) * (1 - nx)) < ny


def templates():
    """[(shape, size, mask (CELL, CELL))] over turns, shifts and radii."""
    grid = (np.arange(CELL * 4) + 0.5) / 4 - CELL / 2
    made = []
    for shape in shapes.SHAPES:
        for size, radii in shapes.SIZES.items():
            for r in radii:
                for turn in np.radians((-8, 0, 8)):
                    for dx in (-0.7, 0, 0.7):
                        for dy in (-0.7, 0, 0.7):
                            x, y = np.meshgrid((grid - dx) / r, (grid - dy) / r)
                            c, s = np.cos(turn), np.sin(turn)
                            mask = inside(shape, x * c + y * s, y * c - x * s)
                            made.append((shape, size, mask.reshape(CELL, 4, CELL, 4).mean((1, 3))))
    return made


def decode(pixels, made, flat):
    """What a picture shows, by comparing each of its nine places with templates -> objects."""
    pixels = np.asarray(pixels, float)
    ground = np.median(pixels.reshape(-1, 3), 0)  # most of a picture is background
    found = []
    for i, place in enumerate(shapes.PLACES):
        row, column = divmod(i, 3)
        part = pixels[row * CELL:][:CELL, column * CELL:][:, :CELL] - ground
        far = np.linalg.norm(part, axis=2)
        if (far > 30).sum() < 12:
            continue
        level = np.median(part[far > 0.85 * np.quantile(far[far > 30], 0.9)], 0)  # away from the soft edge
        color = min(shapes.COLORS, key=lambda c: np.linalg.norm(ground + level - shapes.COLORS[c]))
        cover = np.clip(part @ level / (level @ level), 0, 1)
        shape, size, _ = made[((flat - cover.reshape(-1)) ** 2).sum(1).argmin()]
        found.append((color, shape, size, place))
    return found


def test_pictures_are_not_for_train_py(tmp_path):
    """Though they have a meta.json, which says how often guessing is right."""
    shapes.images.save({split: [{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}]
                        for split in ("train", "val")}, tmp_path)
    (tmp_path / "meta.json").write_text(json.dumps({"chance": {"all": 0.4}}))
    with pytest.raises(config.Mistake, match="holds pictures, which are for vlm.py"):
        train.open_data(tmp_path, train.TrainConfig())


def test_pictures_show_what_captions_say():
    """A decoder with nothing learned reads the objects off the picture."""
    made, rng = templates(), random.Random(3)
    flat = np.stack([mask.reshape(-1) for _, _, mask in made])
    wrong = []
    for i in range(400):
        picture, objects, _ = shapes.scene(rng, held_out=i % 2)
        assert picture.size == (48, 48) and picture.mode == "RGB"
        if decode(picture, made, flat) != objects:  # in reading order
            wrong.append(objects)
    assert not wrong


def answer(question, objects):
    """The answer, worked out from the objects in another way than the questions are made."""
    words = question.rstrip("?").split()

    def one(key, value):
        [found] = [o for o in objects if o[key] == value]
        return found
    if question == "How many shapes are there?":
        return {1: "one", 2: "two"}[len(objects)]
    if question.startswith("What is at the "):
        color, shape, size, _ = one(3, " ".join(words[4:]))
        return f"a {size} {color} {shape}"
    if question.startswith("What color is the "):
        return one(1, words[-1])[0]
    if question.startswith("What size is the "):
        return one(1, words[-1])[2]
    if question.startswith("Where is the "):
        return "at the " + one(1, words[-1])[3]
    if question.startswith("Which shape is "):
        return one(0, words[-1])[1]
    if question.startswith("Is there "):
        return "yes" if any(o[:2] == tuple(words[-2:]) for o in objects) else "no"
    first, second = (shapes.PLACES.index(one(1, words[i])[3]) for i in (2, -1))
    return "yes" if {"left": first % 3 < second % 3, "right": first % 3 > second % 3, "above": first // 3 < second // 3,
                     "below": first // 3 > second // 3}[words[3]] else "no"


def test_questions():
    rng, yes, kinds = random.Random(4), Counter(), Counter()
    for i in range(4000):
        _, objects, asked = shapes.scene(rng, held_out=i % 2)
        assert len({shapes.kind(q) for q, _ in asked}) == len(asked) >= 3
        for question, said in asked:
            assert answer(question, objects) == said, (objects, question, said)
            kinds[shapes.kind(question)] += 1
            yes[shapes.kind(question)] += said == "yes"
    assert set(kinds) == {"How many", "What is", "What color", "What size", "Where is", "Which shape", "Is there",
                          "Is the"}
    for kind in "Is there", "Is the":
        assert abs(yes[kind] / kinds[kind] - 0.5) < 2 / kinds[kind] ** 0.5


def test_held_out_combinations():
    assert len(shapes.SEEN) + len(shapes.UNSEEN) == len(shapes.OBJECTS) == 8 * 6 * 2 * 9
    assert not set(shapes.SEEN) & set(shapes.UNSEEN)
    for i in range(4):  # whatever three of the four are, training shows them together
        assert {o[:i] + o[i + 1:] for o in shapes.SEEN} == {o[:i] + o[i + 1:] for o in shapes.OBJECTS}
    for pool in shapes.SEEN, shapes.UNSEEN:
        for i, names in enumerate((shapes.COLORS, shapes.SHAPES, shapes.SIZES, shapes.PLACES)):
            counts = Counter(o[i] for o in pool)
            assert set(counts) == set(names) and max(counts.values()) < 1.5 * min(counts.values())
    rng, shown = random.Random(5), {False: set(), True: set()}
    for i in range(6000):
        held = bool(i % 2)
        shown[held] |= set(shapes.scene(rng, held)[1])
    assert shown[False] <= set(shapes.SEEN) and shown[True] == set(shapes.UNSEEN)


def run(monkeypatch, out, *args):
    monkeypatch.setattr(sys, "argv", ["shapes.py", "--out", str(out), "--images=400", "--val_images=100",
                                      "--test_images=50", "--questions=5", *args])
    shapes.main()
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in out.iterdir()}


def test_script(tmp_path, monkeypatch, capsys):
    files = run(monkeypatch, tmp_path / "a")
    assert "without looking" in capsys.readouterr().out
    assert set(files) == {"images.npy", "train.jsonl", "val.jsonl", "test.jsonl", "meta.json"}
    meta = json.loads((tmp_path / "a" / "meta.json").read_text())
    pixels = np.load(tmp_path / "a" / "images.npy", mmap_mode="r")
    assert pixels.shape == (550, 48, 48, 3) and pixels.dtype == np.uint8
    rows = []
    for split in "train", "val", "test":
        rng, left = random.Random(f"1337 {split}"), []
        for record in images.load(tmp_path / "a", split):
            if "captions" in record:
                assert not left
                picture, objects, asked = shapes.scene(rng, split != "train")
                assert [read(caption) for caption in record["captions"]] == [objects]
                assert np.array_equal(pixels[record["image"]], np.asarray(picture))
                assert all(shapes.held_out(*o) == (split != "train") for o in objects)
                rows.append(record["image"])
                left = asked[:5]
            else:
                assert record["image"] == rows[-1] and [t["from"] for t in record["conversations"]] == ["human", "gpt"]
                question, answer = left.pop(0)
                assert [t["value"] for t in record["conversations"]] == [f"<image>\n{question}", answer]
    assert rows == list(range(550))
    chance = meta["chance"]
    assert chance["all"] < 0.5 and all(0 <= v < 0.75 for v in chance.values())
    assert run(monkeypatch, tmp_path / "b")["images.npy"] == files["images.npy"]
    again = run(monkeypatch, tmp_path / "a")
    assert again == files
    assert run(monkeypatch, tmp_path / "c", "--seed=2")["images.npy"] != files["images.npy"]


def lines(folder, split):
    return [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]


def test_stages_tell_of_the_same_scenes(monkeypatch, tmp_path):
    """Captions of both kinds to align and to instruct, the same questions as ever, some text among them; pairs prefer
    the plain ones."""
    together = run(monkeypatch, tmp_path / "together")
    for stage in "align", "instruct", "prefer":
        files = run(monkeypatch, tmp_path / stage, f"--stage={stage}")
        assert files["images.npy"] == together["images.npy"]
    for split in "train", "val", "test":
        old, align, instruct, prefer = (lines(tmp_path / stage, split) for stage in ("together", "align", "instruct",
                                                                                      "prefer"))
        kinds = {r["image"]: [text, f"there is {text}"] for r in old for text in r.get("captions", ())}
        assert [r for r in instruct if "captions" in r] == align
        assert {r["image"]: r["captions"] for r in align} == kinds
        assert [r for r in instruct if "image" in r and "captions" not in r] == [r for r in old if "captions" not in r]
        assert 0.25 < sum("image" not in r for r in instruct) / len(align) < 0.5
        assert {r["image"]: [r["chosen"], r["rejected"]] for r in prefer} == kinds
        assert {r["question"] for r in prefer} == {"<image>"}


def test_text_is_read_alone_and_as_a_picture_is(monkeypatch, tmp_path):
    """Each answer is in the description before it; only what training shows is told; the order of two is open."""
    run(monkeypatch, tmp_path, "--stage=text")
    tok, orders, kinds, turned = tokenizer.load(tmp_path), Counter(), Counter(), Counter()
    assert images.IMAGE in tok.added and tok.vocab_size == 512
    for record in lines(tmp_path, "train") + lines(tmp_path, "val"):
        human, gpt = (turn["value"] for turn in record["conversations"])
        told, _, question = human.partition("\n")
        objects = read(gpt if told == "Make up a picture." else told)
        turned[bool(TURNED.search(told + gpt))] += 1
        if question:
            assert answer(question, objects) == gpt
        elif told != "Make up a picture.":
            assert sorted(read(gpt)) == sorted(objects)
        assert set(objects) <= set(shapes.SEEN)
        kinds[bool(question), told == "Make up a picture."] += 1
        if len(objects) == 2:
            orders[shapes.PLACES.index(objects[0][3]) < shapes.PLACES.index(objects[1][3])] += 1
    assert kinds[False, True] == kinds[False, False] == 500 and kinds[True, False] > 2000
    assert 0.45 < orders[True] / orders.total() < 0.55
    assert 0.3 < turned[True] / turned.total() < 0.5  # a third of what is told; of what is said again, both may be
    split = shards.Split(tmp_path, "val")
    assert split.marks is not None and split.documents == len(lines(tmp_path, "val"))


def test_a_preferred_caption_is_asked_for_as_any_caption(tmp_path):
    tok, image_id = examples.with_image(tokenizer.byte())
    pair = {"image": 0, "question": "<image>", "chosen": "a", "rejected": "b"}
    caption, = examples.rows_of({"image": 0, "captions": ["a"]}, tok, {})
    chosen, _ = examples.rows_of(pair, tok, {})
    assert chosen.ids.tolist() == caption.ids.tolist() and chosen.learn.tolist() == caption.learn.tolist()


def test_chance_is_the_best_guess_without_looking():
    first, second, new = (f"What color is {word}?" for word in ("a", "b", "c"))
    train = [(first, "red")] * 3 + [(first, "blue")] + [(second, "blue")] * 4
    val = [(first, "red"), (first, "blue"), (second, "red"), (new, "blue"), ("How many?", "one")]
    assert shapes.chance(train, val) == {"How many?": 0.0, "What color": 0.5, "all": 0.4}


@pytest.mark.parametrize("shape", shapes.SHAPES)
def test_outlines_fit_their_circle(shape):
    corners = shapes.outline(shape)
    assert corners is None or max(x * x + y * y for x, y in corners) < 1.1


def weights(folder):
    """{part: its tensors} of a run."""
    return {path.stem: load_file(path) for path in folder.glob("*.safetensors")}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_each_stage_goes_on_from_the_one_before_and_changes_its_parts_alone(monkeypatch, tmp_path):
    """The four configs with few scenes and steps: the text's Llama stays as it is until instruct, the encoder after
    align; whatever sees is scored by train.py too, on the same text."""
    before, few = None, ("--images=40", "--val_images=8", "--test_images=1")
    for stage in "text", "align", "instruct", "prefer":
        data, out = tmp_path / f"data_{stage}", tmp_path / stage
        run(monkeypatch, data, f"--stage={stage}", *few)
        words = [f"config/shapes_{stage}.py", f"--dataset={data}", f"--out_dir={out}", "--max_iters=2",
                 "--batch_size=4", "--sample_tokens=3", "--device=cpu", "--dtype=float32"]
        keys = train.KEYS if stage == "text" else "vlm.py:VlmConfig"
        given, shape = config.load(keys, words, config.SHAPE)
        if stage == "text":
            train.main(config.make(train.TrainConfig, given), shape)
        else:
            assert given["init_from"] == f"out/shapes_{before}"
            vlm.main(given | {"init_from": str(tmp_path / before)}, shape)
        before = stage
    text, align, instruct, prefer = (weights(tmp_path / stage) for stage in ("text", "align", "instruct", "prefer"))
    assert same(align["model"], text["model"]) and not same(instruct["model"], align["model"])
    assert not same(instruct["encoder"], align["encoder"]) and same(prefer["encoder"], instruct["encoder"])
    assert not same(instruct["projector"], align["projector"]) and not same(prefer["model"], instruct["model"])
    cfg = train.TrainConfig(dataset=str(tmp_path / "data_text"), block_size=64, init_from=str(tmp_path / "prefer"),
                            eval_only=True, device="cpu", dtype="float32")
    task = train.Text(cfg, {}, tmp_path / "prefer", torch.device("cpu"))
    assert 0 < task.val_loss(task.model) < 10


def test_readme_says_what_the_chain_found():
    kept, marks = json.loads(chain.KEPT.read_text()), chain.MARKS
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.partition(marks[0])[2].partition(marks[1])[0] == chain.readme(kept)
    one = {stage: {"captions": 0.5, "minutes": 2.0} for stage in chain.SCENES}
    two = {stage: {"captions": 0.7, "minutes": 3.0} for stage in chain.SCENES}
    assert "| align | 2.5 | 60.0% ± 14.1% |  |" in chain.table([one, two])
