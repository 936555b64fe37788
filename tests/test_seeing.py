"""vlm.py used as people use it: odd data sets, other eyes, conversations that go on, folders, JSON."""
import json
import os
import re
import shutil
import sys
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import adapter
import config
import model
import runs
import sample
import train
import vision
import vlm
from test_sample import Casts
from prepare import features, images, picture_files, tokenizer

SHAPE = dict(n_layer=1, n_head=2, n_kv_head=1, dim=32, head_dim=16, ffn_dim=48, vocab_size=300)
TALK = [{"from": "human", "value": "hi?"}, {"from": "gpt", "value": "ho"}]
USE = dict(device="cpu", dtype="float32", sample_tokens=4)


def settings(folder, out, **more):
    return vlm.VlmConfig(**dict(stage="together", encoder="vit_tiny", dataset=str(folder), out_dir=str(out),
                                batch_size=2, block_size=64, max_iters=2, warmup_iters=1, eval_interval=2,
                                log_interval=1, sample_tokens=4, sample_images=2, device="cpu", dtype="float32") | more)


def data_set(folder, records, val=None):
    folder.mkdir(exist_ok=True)
    if not (folder / "images.npy").exists():
        np.save(folder / "images.npy", np.random.default_rng(0).integers(0, 255, (6, 48, 48, 3), np.uint8))
    images.save({"train": records, "val": val or records}, folder)
    return folder


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A run of two steps that learned captions of six pictures, its encoder too."""
    folder = tmp_path_factory.mktemp("start")
    records = [{"image": i, "captions": [f"{word} thing"]} for i, word in enumerate("a b c d e f".split())]
    vlm.fit(settings(data_set(folder / "data", records), folder / "run"), SHAPE)
    return folder


@pytest.fixture
def photos(tmp_path):
    """A folder of three photos in all, one of them below, and of what is none."""
    for i, name in enumerate(("B.JPG", "a.png", "sub/\u72d7.webp", ".hidden.png")):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        kind = {"b.jpg": "jpeg", "a.png": "png"}.get(name.lower(), "webp")
        Image.new("RGB", (20, 30), (80 * i, 0, 0)).save(tmp_path / "photos" / name, kind)
    (tmp_path / "photos/notes.txt").write_text("no picture")
    return tmp_path / "photos"


# -- data sets -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("stage", ["align", "together", "prefer"])
@pytest.mark.parametrize("pictures_in_training", [True, False])
def test_validation_without_pictures(stage, pictures_in_training, start, tmp_path):
    """G2: no picture to draw is no error, in training nor in scoring."""
    text = {"conversations": TALK}
    seen = {"image": 0, "conversations": TALK}
    if stage == "prefer":
        text, seen = ({k: v for k, v in r.items() if k == "image"} | {"question": "q", "chosen": "a", "rejected": "b"}
                      for r in (text, seen))
    data = data_set(tmp_path / "data", [seen if pictures_in_training else text, text], [text])
    vlm.fit(settings(data, tmp_path / "run", stage=stage, init_from=str(start / "run"), encoder=None), {})
    log = runs.read_log(tmp_path / "run/log.jsonl")
    assert np.isfinite([r["val_loss"] for r in log if "val_loss" in r]).all()
    if stage != "prefer":
        assert np.isfinite(vlm.score(settings(data, tmp_path / "run", encoder=None, eval=True))["loss"])


@pytest.mark.parametrize("record", [
    {"image": 0, "captions": "A red square."}, {"image": 0, "conversations": "hello"}, {"image": 0, "captions": [5]},
    {"image": {"a": 1}, "captions": ["a"]}, {"image": 0, "conversations": [{"from": "human", "value": "<image>"}]},
    {"conversations": [{"from": "human", "value": "<image>"}, TALK[1]]}])
def test_records_by_hand_are_one_line_before_training(record, start, tmp_path):
    """G3, G6: with a new tokenizer, and with the one of a checkpoint."""
    data = data_set(tmp_path / "data", [{"image": 0, "captions": ["a"]}])
    with open(data / "train.jsonl", "a") as file:
        file.write(json.dumps(record) + "\n")
    for source, shape in ("scratch", SHAPE), (str(start / "run"), {}):
        with pytest.raises(config.Mistake, match="train.jsonl, record 2: "):
            vlm.fit(settings(data, tmp_path / "run", encoder=None, init_from=source), shape)
    assert not (tmp_path / "run/log.jsonl").exists()


def test_the_size_told_to_a_vocabulary_that_is_too_small_is_enough(tmp_path):
    """With the tokens that stand for pictures."""
    data = data_set(tmp_path / "data", [{"image": 0, "captions": ["a thing"]}])
    with pytest.raises(config.Mistake, match="of 10 tokens: ") as e:
        vlm.fit(settings(data, tmp_path / "run"), SHAPE | {"vocab_size": 10})
    least = int(re.search(r"--vocab_size=(\d+) at least", str(e.value))[1])
    with pytest.raises(config.Mistake, match=f"of {least - 1} tokens: "):
        vlm.fit(settings(data, tmp_path / "run"), SHAPE | {"vocab_size": least - 1})
    vlm.fit(settings(data, tmp_path / "run"), SHAPE | {"vocab_size": least})


def test_preferences_need_a_model(tmp_path):
    """G10."""
    data = data_set(tmp_path / "data", [{"image": 0, "question": "q", "chosen": "a", "rejected": "b"}])
    with pytest.raises(config.Mistake, match="goes on from a model that answers"):
        vlm.fit(settings(data, tmp_path / "run", stage="prefer"), SHAPE)


@pytest.mark.parametrize("stage", ["align", "together"])
def test_pictures_that_went_are_one_line_before_training(stage, start, tmp_path):
    """G7, G16: with a frozen encoder and with one that learns."""
    data = data_set(tmp_path / "data", [{"image": i, "captions": ["x"]} for i in range(3)])
    cfg = settings(data, tmp_path / "run", stage=stage, init_from=str(start / "run"), encoder=None)
    np.save(data / "images.npy", np.zeros((2, 48, 48, 3), np.uint8))
    with pytest.raises(config.Mistake, match="1 of the 3 pictures .* 2 rows, no 2"):
        vlm.fit(cfg, {})
    Image.new("RGB", (48, 48)).save(data / "a.png")
    data_set(data, [{"image": "a.png", "captions": ["x"]}])
    (data / "a.png").unlink()
    with pytest.raises(config.Mistake, match="a.png"):
        vlm.fit(cfg, {})
    assert not (tmp_path / "run/log.jsonl").exists()


def test_damaged_features_are_made_anew(start, tmp_path):
    """G7: what was kept of a frozen encoder is cut short, or half of it is gone."""
    data = data_set(tmp_path / "data", [{"image": i, "captions": ["x"]} for i in range(3)])
    losses = []
    for damage in (None, "cut", "empty", "gone"):
        for path in (data / "features").glob("*.npy") if damage else ():
            if damage == "gone" and not path.name.endswith(".ready.npy"):
                path.unlink()
            elif damage != "gone":
                path.write_bytes(path.read_bytes()[:150 if damage == "cut" else 0])
        cfg = settings(data, tmp_path / str(damage), stage="align", init_from=str(start / "run"), encoder=None)
        vlm.fit(cfg, {})
        losses.append([r.get("val_loss") for r in runs.read_log(tmp_path / str(damage) / "log.jsonl")])
    assert losses[0] == losses[1] == losses[2] == losses[3]


def test_references_belong_to_their_pairs(start, tmp_path):
    """G5: records in another order, with other words or pictures, another block_size that changes what is read: refused
    on resuming; the same go on."""
    pairs = [{"image": i, "question": "q?", "chosen": f"a{i}" * (1 + 6 * (i == 5)), "rejected": "b"} for i in range(6)]
    data = data_set(tmp_path / "data", pairs)
    cfg = settings(data, tmp_path / "run", stage="prefer", init_from=str(start / "run"), encoder=None)
    vlm.fit(cfg, {})
    more = replace(cfg, init_from="resume", max_iters=3)
    for changed, block_size in ((pairs[::-1], 64), (pairs[:5], 64), (pairs, 20),
                                ([pairs[0] | {"chosen": "c"}, *pairs[1:]], 64),
                                ([pairs[0] | {"image": 1}, *pairs[1:]], 64)):
        data_set(data, changed, pairs)
        with pytest.raises(config.Mistake, match="other pairs of answers"):
            vlm.fit(replace(more, block_size=block_size), {})
    data_set(data, pairs)
    array = np.load(data / "images.npy")
    np.save(data / "images.npy", 255 - array)
    with pytest.raises(config.Mistake, match="other pairs of answers"):
        vlm.fit(more, {})
    np.save(data / "images.npy", array)
    vlm.fit(more, {})
    assert runs.read_log(tmp_path / "run/log.jsonl")[-1]["step"] == 3
    path = runs.common_latest(tmp_path / "run") / "reference.pt"
    saved = torch.load(path)
    torch.save(saved | {"pairs": saved["pairs"].partition("+")[0]}, path)  # as runs of before have it
    vlm.fit(replace(more, max_iters=4), {})
    assert torch.load(runs.common_latest(tmp_path / "run") / "reference.pt")["pairs"] == saved["pairs"]


# -- eyes ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("stage", ["align", "instruct"])
def test_an_encoder_that_knows_nothing_does_not_stay_so(stage, start, tmp_path):
    """G11: vit_tiny has no pretrained weights: frozen, each load would see with other eyes."""
    with pytest.raises(config.Mistake, match="no pretrained weights of vit_tiny"):
        vlm.fit(settings(start / "data", tmp_path / "run", stage=stage), SHAPE)


@pytest.mark.parametrize("stage", ["align", "together"])
def test_a_file_of_weights_is_read_or_refused(stage, start, tmp_path):
    """G11."""
    (tmp_path / "text.pth").write_text("no weights")
    for name in ("nonexistent.pth", "text.pth"):
        with pytest.raises(config.Mistake, match=f"{name} cannot be read"):
            vlm.fit(settings(start / "data", tmp_path / "run", stage=stage, vit_weights=str(tmp_path / name)), SHAPE)
    with pytest.raises(config.Mistake, match="encoder of its own"):
        vlm.fit(settings(start / "data", tmp_path / "run", stage=stage, encoder=None, init_from=str(start / "run"),
                         vit_weights=str(tmp_path / "nonexistent.pth")), {})


def test_a_frozen_encoder_is_known_again(start, tmp_path):
    """G11: a run whose frozen encoder came from a file opens with that file, and with no other."""
    from safetensors.torch import load_file, save_file
    state = load_file(start / "run/encoder.safetensors")
    state = {name.removeprefix("vit."): t for name, t in state.items()}
    save_file(state, tmp_path / "a.safetensors")
    save_file({n: t + 1 for n, t in state.items()}, tmp_path / "b.safetensors")
    cfg = settings(start / "data", tmp_path / "run", stage="align", vit_weights=str(tmp_path / "a.safetensors"))
    vlm.fit(cfg, SHAPE)
    vlm.fit(replace(cfg, init_from="resume", max_iters=3), {})
    see = vlm.Vlm.from_pretrained(tmp_path / "run", tmp_path / "a.safetensors")
    assert not see.encoder_learned
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    for use in dict(caption=(str(tmp_path / "a.png"),)), dict(eval=True), dict(init_from="resume", eval=True):
        vlm.main(USE | dict(out_dir=str(tmp_path / "run")) | use, {})
    with pytest.raises(ValueError, match="learned with other weights of vit_tiny"):
        vlm.Vlm.from_pretrained(tmp_path / "run", tmp_path / "b.safetensors")
    with pytest.raises(config.Mistake, match="no pretrained weights of vit_tiny"):
        vlm.Vlm.from_pretrained(tmp_path / "run")
    cfg = settings(start / "data", tmp_path / "both", stage="together", vit_weights=str(tmp_path / "a.safetensors"))
    vlm.fit(cfg, SHAPE)
    vlm.fit(replace(cfg, init_from="resume", max_iters=3), {})  # begins with its own, not with the file's
    for use in dict(eval=True), dict(init_from="resume", eval=True), dict(caption=(str(tmp_path / "a.png"),)):
        vlm.main(USE | dict(out_dir=str(tmp_path / "both")) | use, {})


@pytest.mark.parametrize("size", [(900, 200), (200, 900), (3000, 1), (1, 1), (48, 48), (47, 49)])
def test_pictures_are_seen_whole(size):
    """G17: the first and the last column and row of a picture are on the square."""
    picture = np.zeros((size[1], size[0], 3), np.uint8)
    picture[..., 0] = np.linspace(0, 255, size[0])[None, :].astype(np.uint8)  # red grows to the right, green downwards
    picture[..., 1] = np.linspace(0, 255, size[1])[:, None].astype(np.uint8)
    square = np.asarray(picture_files.on_square(Image.fromarray(picture), 48, (0, 0, 255)))
    assert square.shape == (48, 48, 3)
    inside = square[..., 2] < 128
    height, width = inside.any(1).sum(), inside.any(0).sum()
    scale = 48 / max(size)
    assert (width, height) == tuple(max(1, round(side * scale)) for side in size) and inside.sum() == width * height
    for axis, side in ((0, width), (1, height)):
        if min(side, size[axis]) > 10:
            assert square[..., axis][inside].min() < 26 and square[..., axis][inside].max() > 229


def test_what_an_encoder_saw_is_kept_for_each_dtype(start, tmp_path):
    """In bfloat16 it sees with other digits than in float32."""
    data = data_set(tmp_path / "data", [{"image": i, "captions": ["x"]} for i in range(6)])
    encoder = vlm.Vlm.from_pretrained(start / "run").encoder
    kept = [features.Pictures(data, list(range(6)), encoder, dtype, 1.0)([0, 5])
            for dtype in (torch.float32, torch.bfloat16, torch.float32)]
    assert len(list((data / "features").glob("*.ready.npy"))) == 2
    assert torch.equal(kept[0], kept[2]) and not torch.equal(kept[0], kept[1])
    assert torch.allclose(kept[0], kept[1], atol=0.1)


def test_feature_gb_is_for_the_whole_folder(start, tmp_path, capsys):
    """Three encoders where two have room: what was used longest ago goes."""
    data = data_set(tmp_path / "data", [{"image": i, "captions": ["x"]} for i in range(6)])
    encoder, place = vlm.Vlm.from_pretrained(start / "run").encoder, data / "features"
    size = 6 * 9 * 128 * 2
    seen = {}
    for number in (0, 1, 0, 2, 0, 1):
        with torch.no_grad():
            encoder.class_embedding.fill_(number)
        before = {path.name for path in place.glob("*")}
        pictures = features.Pictures(data, list(range(6)), encoder, torch.float32, 2.5 * size / 2**30)
        again = seen.setdefault(number, pictures([3]))
        assert torch.equal(pictures([3]), again)
        new = {path.name for path in place.glob("*")} - before
        assert bool(new) == (capsys.readouterr().err != "") and len(list(place.glob("*"))) <= 4, number
        seen[number, "new"] = bool(new)
        for path in place.glob("*"):  # a clock that does not stand still
            os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns - 10**9))
    assert [seen[number, "new"] for number in range(3)] == [False, True, True]  # 0 stayed, 1 was made twice


def test_features_are_not_kept_where_that_cannot_be(start, tmp_path, monkeypatch, capsys):
    """A data set's folder that one may only read: each use encodes anew, and says why."""
    data = data_set(tmp_path / "data", [{"image": i, "captions": ["x"]} for i in range(6)])
    encoder = vlm.Vlm.from_pretrained(start / "run").encoder
    monkeypatch.setattr(features.os, "access", lambda path, mode: (path, mode) != (data, os.W_OK))  # root may always
    pictures = features.Pictures(data, list(range(6)), encoder, torch.float32, 1.0)
    assert "features, which is read-only; the others are encoded at each use" in capsys.readouterr().out
    assert not (data / "features").exists()
    assert torch.equal(pictures([5, 2]), pictures.encode([5, 2]))


def test_a_save_reads_the_frozen_encoder_and_the_pairs_no_more(start, tmp_path, monkeypatch):
    """They are the same at each: one digest for the features, one for vlm.json, one of the pairs."""
    from safetensors.torch import load_file, save_file
    save_file(load_file(start / "run/encoder.safetensors"), tmp_path / "a.safetensors")
    calls = []
    for module, name in ((vision, "digest_of"), (vlm, "pairs_digest")):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, real=real, name=name: calls.append(name) or real(*args))
    vlm.fit(settings(start / "data", tmp_path / "run", stage="align", vit_weights=str(tmp_path / "a.safetensors"),
                     max_iters=4, eval_interval=1), SHAPE)
    assert calls == ["digest_of"] * 2
    data = data_set(tmp_path / "data", [{"image": 0, "question": "q", "chosen": "a", "rejected": "b"}])
    calls.clear()
    vlm.fit(settings(data, tmp_path / "prefer", stage="prefer", init_from=str(start / "run"), encoder=None,
                     max_iters=4, eval_interval=1), {})
    assert calls.count("pairs_digest") == 1


def test_letters_without_a_font_are_no_warning(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        picture_files.draw(tmp_path / "a.png", [np.zeros((8, 8, 3), np.uint8)], ["\u4e00\u53ea\u72d7 $5 \U0001f436"])
    assert (tmp_path / "a.png").stat().st_size > 100


# -- use -----------------------------------------------------------------------------------------------------------

def test_a_folder_is_captioned(start, photos, capsys):
    """All pictures in it and below, in order, whatever the ending's case; what is skipped is counted; batches change
    nothing."""
    use = USE | dict(init_from=str(start / "run"))
    names = ["B.JPG", "a.png", "sub/\u72d7.webp"]
    found = []
    for size in (1, 2, 64):
        vlm.main(use | dict(caption=(str(photos),), batch_size=size), {})
        out, err = capsys.readouterr()
        assert [line.split(": ")[0] for line in out.splitlines()] == [str(photos / n) for n in names]
        assert "2 files are hidden or no pictures" in err and ("captions: " in err) == (size < 3)  # a bar
        found.append(out)
    assert found[0] == found[1] == found[2]
    (photos / "empty").mkdir()
    with pytest.raises(SystemExit) as e:
        vlm.main(use | dict(caption=(str(photos / "empty"), str(photos / "a.png"))), {})
    out, err = capsys.readouterr()
    assert e.value.code == 2 and len(out.splitlines()) == 1 and "empty: it is a folder" in err


def test_json_is_one_object_a_line(start, photos, capsys):
    use = USE | dict(init_from=str(start / "run"), json=True)
    (photos / "c.png").write_text("no picture")
    with pytest.raises(SystemExit):
        vlm.main(use | dict(caption=(str(photos),)), {})
    out, err = capsys.readouterr()
    assert out.isascii()  # what a terminal's encoding lacks is not lost
    made = [json.loads(line) for line in out.splitlines()]
    assert [m["image"] for m in made] == [str(photos / n) for n in ("B.JPG", "a.png", "sub/\u72d7.webp")]
    assert all(isinstance(m["caption"], str) for m in made) and "c.png: it is not a picture" in err
    vlm.main(use | dict(ask=("what\u00df?", str(photos / "a.png"))), {})
    assert (out := capsys.readouterr().out).isascii()
    made, = map(json.loads, out.splitlines())
    assert made["images"] == [str(photos / "a.png")] and made["question"] == "what\u00df?" and "answer" in made
    vlm.main(USE | dict(eval=True, json=True, out_dir=str(start / "run"), batch_size=3), {})
    out, err = capsys.readouterr()
    made = json.loads(out)
    assert "settings   batch_size=3" in err and "features   6 of 6" in err
    assert made["dataset"] == "data" and made["prompts"] == 6 and made["loss"] > 0 and made["run"] == str(start / "run")


@pytest.mark.parametrize("said, run", [([], "a"), (["--init_from", "b"], "b"), (["--init-from=b", "--eval"], "b")])
def test_what_is_said_counts_before_a_config_file(tmp_path, monkeypatch, said, run):
    """Most config files name both where their run is and where it began."""
    (tmp_path / "my.py").write_text("out_dir = 'a'\ninit_from = 'b0'\n")
    monkeypatch.setattr(sys, "argv", ["vlm.py", str(tmp_path / "my.py"), *said])
    cfg = config.load(vlm.VlmConfig)
    assert vlm.run_to_use(cfg.out_dir, cfg.init_from) == run


def test_what_a_run_did_not_learn_is_said(start, photos, tmp_path, capsys):
    """--ask to a run that learned captions only, --caption to one that learned answers only; both at last."""
    picture, answers = str(photos / "a.png"), tmp_path / "answers"
    vlm.main(USE | dict(init_from=str(start / "run"), ask=("what?", picture)), {})
    assert "note: this run learned no questions (caption only)" in capsys.readouterr().err
    vlm.main(USE | dict(init_from=str(start / "run"), caption=(picture,)), {})
    assert "note" not in capsys.readouterr().err
    data = data_set(tmp_path / "data", [{"image": 0, "conversations": TALK}])
    vlm.fit(settings(data, answers), SHAPE)
    vlm.main(USE | dict(init_from=str(answers), caption=(picture,)), {})
    assert "learned no captions (answer only)" in capsys.readouterr().err
    vlm.fit(settings(data, tmp_path / "both", stage="instruct", encoder=None, init_from=str(start / "run")), {})
    for words in (dict(caption=(picture,)), dict(ask=("what?", picture))):
        vlm.main(USE | words | dict(init_from=str(tmp_path / "both")), {})
        assert "note" not in capsys.readouterr().err


@pytest.mark.parametrize("question", ["", "  ", "\n"])
def test_an_empty_question_is_one_line(question, start, photos):
    """G14."""
    with pytest.raises(config.Mistake, match="the question is empty"):
        vlm.main(USE | dict(init_from=str(start / "run"), ask=(question, str(photos / "a.png"))), {})


@pytest.mark.parametrize("keys, said", [
    (dict(eval=True, caption=("a.png",)), "give one of --caption, --ask, --chat and --eval"),
    (dict(hellaswag=True), "hellaswag and head_copy are for train.py")])
def test_keys_without_effect_are_refused(keys, said):
    with pytest.raises(config.Mistake, match=said):
        vlm.main(USE | keys, {})


def test_a_question_has_its_system_message(start, photos, monkeypatch, capsys):
    asked = []
    real = vlm.PictureTokenizer.chat
    monkeypatch.setattr(vlm.PictureTokenizer, "chat", lambda tok, turns: asked.append(turns) or real(tok, turns))
    use = USE | dict(init_from=str(start / "run"), ask=("what?", str(photos / "a.png")))
    vlm.main(use | dict(system="Answer in French."), {})
    vlm.main(use, {})
    assert [turn["role"] for turn in asked[0]] == ["system", "user"] and [t["role"] for t in asked[1]] == ["user"]


def test_a_conversation_goes_on(start, photos, monkeypatch, capsys):
    """G14: past the end of the context, past marks in later turns and in the model's own words, past what is too long;
    what is dropped is said, and the picture stays."""
    marks = []
    real = vlm.PictureTokenizer.chat

    def ids_of(tok, turns):
        ids = real(tok, turns)
        marks.append(sum(i >= tok.vlm.llama.config.vocab_size for i in ids) // tok.vlm.image_tokens)
        return ids
    monkeypatch.setattr(vlm.PictureTokenizer, "chat", ids_of)
    monkeypatch.setattr(vlm.PictureTokenizer, "decode", lambda tok, ids: tok.tok.decode(ids) + "<image>", raising=False)
    lines = iter(["first?", "<image> again?", *[f"what is it number {i}?" for i in range(12)], "very " * 200, "last?",
                  ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    vlm.main(USE | dict(init_from=str(start / "run"), chat=(str(photos / "a.png"),)), {})
    out, err = capsys.readouterr()
    assert out.count("llama> ") == 14 and set(marks) == {1}
    assert "places 2 pictures with <image>, but there are 1" in err and "context holds 64: shorten it" in err
    assert "is full: the first " in err and "were dropped" in err


def test_a_turn_reads_only_what_is_new(start, photos, monkeypatch, capsys):
    """And says what it says when all is read anew. Sampled, past the end of the context, with two pictures."""
    said, read = [], []
    real, reply = model.Decoder.append, sample.Conversation.reply
    monkeypatch.setattr(model.Decoder, "append", lambda self, x, *more: read.append(x.shape[1]) or real(self, x, *more))

    def anew(self, *args):
        self.ids = []
        return reply(self, *args)
    for how in reply, anew:
        monkeypatch.setattr(sample.Conversation, "reply", how)
        lines = iter(["<image> or <image>?", *[f"no {i}" for i in range(5)], ""])
        monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
        read.clear()
        vlm.main(USE | dict(init_from=str(start / "run"), temperature=1.0, seed=3,
                            chat=(str(photos / "a.png"), str(photos / "B.JPG"))), {"top_k": 20})
        said.append((capsys.readouterr().out, [n for n in read if n > 1]))
    assert said[0][0] == said[1][0] and said[0][0].count("llama> ") == 6
    few, whole = said[0][1], said[1][1]
    assert few[0] == whole[0] and min(whole) > 18  # of which the pictures have 18
    assert len(few) == len(whole) == 6 and sum(n < 18 for n in few) >= 3  # all, but where the oldest turns were dropped


def test_sampling(start, photos, capsys):
    """As in sample.py: the seed decides, not what is captioned beside a picture; temperature 0 is greedy."""
    def captions(**more):
        vlm.main(USE | dict(init_from=str(start / "run"), caption=(str(photos),)) | more, {"top_k": 100})
        return capsys.readouterr().out
    greedy, one, two = captions(), captions(temperature=1.5, seed=1), captions(temperature=1.5, seed=2)
    assert len({greedy, one, two}) == 3
    assert captions(temperature=1.5, seed=1, batch_size=1) == captions(temperature=1.5, seed=1, batch_size=2) == one
    assert captions(temperature=1e-12, seed=1) == captions(temperature=9.0, top_p=0.0) == greedy
    with pytest.raises(config.Mistake, match="num_beams"):
        captions(temperature=1.0, num_beams=2)
    assert captions(num_beams=1) == greedy and captions(num_beams=3).count("\n") == 3
    vlm.main(USE | dict(init_from=str(start / "run"), ask=("what?", str(photos / "a.png")), temperature=1.5), {})


def test_in_half_precision_nothing_of_the_llama_is_cast_at_a_token(start, photos):
    """It is as near to what float32 computes as float32 weights under autocast are."""
    how = USE | dict(init_from=str(start / "run"), dtype="bfloat16")
    run, whole = (vlm.load(vlm.VlmConfig(**how), pack=pack) for pack in (True, False))
    seen, canvas = vlm.look(run, str(photos / "a.png"))
    with Casts() as casts:
        run.texts([vlm.caption_prompt(run.tok)], seen, [canvas])
    assert not {*casts.counts} & {*run.vlm.llama.parameters()}
    idx = torch.tensor([[256, *run.vlm.picture_ids(), 10]])
    with torch.no_grad():
        exact = whole.vlm(idx, pictures=seen.float())[0]
        with run.autocast:
            errors = [(each.vlm(idx, pictures=seen)[0] - exact).norm() / exact.norm() for each in (run, whole)]
    assert errors[0] < 1.5 * errors[1] < 0.02, errors


def test_trace(start, photos, capsys):
    """Parameters add up to the model's, FLOPs of encoder and projector to those of the formulas."""
    vlm.main(USE | dict(init_from=str(start / "run"), caption=(str(photos / "a.png"),), trace=True), {})
    lines = capsys.readouterr().out.splitlines()
    see, _ = vlm.open_run(start / "run")
    assert lines[-1].split()[2] == f"{sum(p.numel() for p in see.parameters()):,}"
    names = [line.split()[0] for line in lines[2:-1]]
    groups = [name.split(".")[0] for name in names]
    assert names[-1] == "llama.lm_head" and groups.index("encoder") < groups.index("projector") < groups.index(
        "llama", groups.index("projector"))
    run = vlm.load(vlm.VlmConfig(**USE, init_from=str(start / "run")))
    steps = sample.steps_of(run.vlm, [256, *run.vlm.picture_ids(), 10], None, torch.zeros(1, 3, 48, 48))
    flops = {part: sum(step[3] for step in steps if step[0].startswith(part)) for part in ("encoder", "projector")}
    W, L = 128, 10  # nine patches and the class token
    stem = sum(2 * a * b * 9 * side ** 2 for a, b, side in ((3, 32, 24), (32, 64, 12), (64, 128, 6), (128, 128, 3)))
    layer = 2 * L * (4 * W * W + 2 * W * 4 * W) + 4 * L * L * W
    assert flops["encoder"] == stem + 2 * W * W * 9 + layer
    assert flops["projector"] == 2 * 9 * (W * 4 * 32 + 4 * 32 * 32)
    with pytest.raises(config.Mistake, match="--trace --caption"):
        vlm.main(USE | dict(init_from=str(start / "run"), trace=True), {})


def plain_llama(folder):
    """A folder with a Llama that does not see."""
    torch.manual_seed(0)
    llama = model.Llama(train.shape_from(model.PRESETS["stories15m"], SHAPE | dict(
        vocab_size=258, context=64, eos_ids=(257,))))
    llama.save_pretrained(folder)
    tokenizer.byte().save(folder)
    return folder


@pytest.mark.parametrize("plain", [False, True])
def test_lora(plain, start, tmp_path, photos, capsys):
    """On a Llama that sees, and on a plain one, which gets a token for pictures: the run holds adapter and projector,
    peft opens it, it goes on, and it is used."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    from safetensors.torch import load_file
    base = start / "run"
    shutil.copy(base / "encoder.safetensors", tmp_path / "eyes.safetensors")
    eyes = dict(encoder="vit_tiny", vit_weights=str(tmp_path / "eyes.safetensors")) if plain else dict(encoder=None)
    base = plain_llama(tmp_path / "plain") if plain else base
    before = {path.name: path.read_bytes() for path in base.glob("*.safetensors")}
    cfg = settings(start / "data", tmp_path / "run", stage="instruct", init_from=str(base), lora_rank=2, **eyes)
    vlm.fit(replace(cfg, learning_rate=0.1, warmup_iters=0), {})
    assert {path.name: path.read_bytes() for path in base.glob("*.safetensors")} == before
    files = {path.name for path in (tmp_path / "run").glob("*.safetensors")}
    assert files == {"adapter_model.safetensors", "projector.safetensors"} | (
        set() if plain else {"encoder.safetensors"})
    see, _ = vlm.open_run(tmp_path / "run", eyes.get("vit_weights"))
    idx = torch.randint(256, (2, 9))
    theirs = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), tmp_path / "run")
    with torch.no_grad():
        ours, wanted = see.llama(idx)[0], theirs(input_ids=idx).logits
        assert torch.allclose(ours[..., :wanted.shape[-1]], wanted, atol=1e-5)
        with theirs.disable_adapter():
            assert (wanted - theirs(input_ids=idx).logits).abs().max() > 1e-3
    changed = load_file(tmp_path / "run/adapter_model.safetensors")
    assert all(t.any() for name, t in changed.items() if "lora_B" in name)
    vlm.fit(replace(cfg, init_from="resume", max_iters=3), {})
    assert runs.read_log(tmp_path / "run/log.jsonl")[-1]["step"] == 3
    capsys.readouterr()
    vlm.main(USE | dict(init_from=str(tmp_path / "run"), caption=(str(photos / "a.png"),)), {})
    assert capsys.readouterr().out.startswith(str(photos / "a.png"))
    vlm.main(dict(out_dir=str(tmp_path / "run"), eval=True, device="cpu"), {})
    assert "6 prompts" in capsys.readouterr().out
    llama, *_ = sample.load(sample.SampleConfig(init_from=str(tmp_path / "run"), device="cpu", dtype="float32"))
    with torch.no_grad():
        see, _ = vlm.open_run(tmp_path / "run", eyes.get("vit_weights"))
        assert torch.allclose(llama(idx)[0], see.llama(idx)[0], atol=1e-5)
    adapter.main(adapter.MergeConfig(merge=str(tmp_path / "run"), out=str(tmp_path / "merged")))
    assert "run's projector and encoder are left out" in capsys.readouterr().err
    merged, *_ = sample.load(sample.SampleConfig(init_from=str(tmp_path / "merged"), device="cpu", dtype="float32"))
    assert torch.allclose(merged(idx)[0], llama(idx)[0], atol=1e-5)
    with pytest.raises(config.Mistake, match="stage align leaves"):
        vlm.main(dict(stage="align", init_from=str(base), lora_rank=2), {})


def test_from_an_adapter_that_learned_text(start, tmp_path):
    """Where the Llama learns, its adapter goes on and its base stays, as without pictures; where not, it is merged; the
    eyes of its base are not left out in silence."""
    from safetensors.torch import load_file
    shutil.copy(start / "run/encoder.safetensors", tmp_path / "eyes.safetensors")
    eyes = dict(encoder="vit_tiny", vit_weights=str(tmp_path / "eyes.safetensors"))
    for name, base in ("text", plain_llama(tmp_path / "plain")), ("blind", start / "run"):
        llama = adapter.load(base, torch.float32, new=(4, 8, base, 0))
        adapter.save(llama, tmp_path / name)
    for stage, whole in ("instruct", False), ("together", False), ("align", True):
        out = tmp_path / stage
        cfg = settings(start / "data", out, stage=stage, init_from=str(tmp_path / "text"), **eyes)
        vlm.fit(replace(cfg, learning_rate=0.1, warmup_iters=0), {})
        assert [(out / f"{name}.safetensors").exists() for name in ("model", "adapter_model")] == [whole, not whole]
        if not whole:
            before, after = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "text", out))
            assert before.keys() == after.keys() and not any(torch.equal(before[n], after[n]) for n in before)
            vlm.fit(replace(cfg, init_from="resume", max_iters=3), {})
    with pytest.raises(config.Mistake, match="does not see, as its base model .*run does"):
        vlm.fit(settings(start / "data", tmp_path / "new", stage="instruct", init_from=str(tmp_path / "blind"), **eyes),
                {})


@pytest.mark.parametrize("keys, said", [
    (dict(stage="align"), "another stage (leave --stage out)"), (dict(optimizer="adamw"), "another optimizer (leave"),
    (dict(stage="instruct", lora_rank=2), "another stage and lora_rank (leave --stage and --lora_rank out)")])
def test_going_on_otherwise_names_what_differs(keys, said, start, tmp_path):
    shutil.copytree(start / "run", tmp_path / "run")
    with pytest.raises(config.Mistake, match=re.escape(f"was made by {said}")):
        vlm.fit(replace(settings(start / "data", tmp_path / "run", encoder=None, max_iters=3), init_from="resume",
                        **keys), {})


def test_pairs_are_refused_before_a_model_is_read(start, tmp_path, monkeypatch):
    data = data_set(tmp_path / "data", [{"image": 0, "question": "q", "chosen": "a", "rejected": "b"}])
    monkeypatch.setattr(vlm, "load", lambda *args, **more: pytest.fail("the model was read"))
    with pytest.raises(config.Mistake, match="preferences"):
        vlm.score(settings(data, start / "run", encoder=None, eval=True))


def test_nothing_usable_in_a_split_says_so(start, tmp_path):
    """G10: a split that is not there, and one that is empty."""
    with pytest.raises(config.Mistake, match="only train and val"):
        vlm.score(settings(start / "data", start / "run", encoder=None, eval=True, split="test"))
    data = data_set(tmp_path / "data", [{"image": 0, "captions": ["x"]}])
    (data / "val.jsonl").write_text("")
    with pytest.raises(config.Mistake, match="val.jsonl has no records"):
        vlm.fit(settings(data, tmp_path / "run"), SHAPE)


def test_scores_of_a_split_with_one_picture_are_said(start, tmp_path, capsys):
    """G9: there is no other picture to compare with, nor are there words to weigh."""
    data = data_set(tmp_path / "data", [{"image": 0, "captions": ["..."]}])
    found = vlm.score(settings(data, start / "run", encoder=None, eval=True))
    assert "loss with wrong pictures" not in found and "CIDEr-D" not in found
    assert "no loss with wrong pictures: the split has 1" in capsys.readouterr().out
    assert torch.isfinite(torch.tensor(found["loss"]))
