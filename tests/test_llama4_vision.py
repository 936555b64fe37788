"""Llama 4's eyes against transformers: tower, pictures, texts, files, and what they are used for."""
import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import checkpoint
import config
import sample
import train
import vision
import vlm
from conftest import need_transformers_5_24
from model import PRESETS, Decoder, KVCache, Llama, LlamaConfig
from prepare import examples, images, tokenizer

transformers = pytest.importorskip("transformers", reason="needs transformers, the oracle")

TEXT = dict(arch="llama4", vocab_size=97, dim=48, n_head=4, n_kv_head=2, head_dim=12, n_layer=4, n_experts=4,
            ffn_dim=64, expert_dim=40, chunk=8, floor_scale=4, attn_scale=0.1, nope_every=4, qk_norm=True, context=64,
            rope_theta=500.0)
TOWER = dict(size=24, patch=4, n_layer=2, n_head=2, dim=32, mlp_dim=128, llama4=True, out_dim=40, rope_theta=100.0)
PATCH = 92


@pytest.fixture(scope="module", autouse=True)
def forward_works():
    """transformers 5.24.0 asks its output class for a field that it lacks, and so always fails."""
    from transformers import modeling_outputs
    lacks = not hasattr(modeling_outputs.MoeCausalLMOutputWithPast, "image_outputs")
    if lacks:
        modeling_outputs.MoeCausalLMOutputWithPast.image_outputs = None
    yield
    if lacks:
        del modeling_outputs.MoeCausalLMOutputWithPast.image_outputs


def make(text=None, tower=None, frame=(93, 94, 95, 96, 91)):
    """A Vlm with weights of std 0.2, of norms 1 + 0.2 noise: at the first weights a wrong RoPE passes any test."""
    torch.manual_seed(0)
    llama = Llama(LlamaConfig(**TEXT | (text or {})))
    see = vlm.Vlm(llama, vision.Vit("llama4", vision.VitConfig(**TOWER | (tower or {}))), PATCH, frame)
    with torch.no_grad():
        for name, p in see.named_parameters():
            noise = 0.2 * torch.randn(p.shape)
            p.copy_(1 + noise if "norm" in name and name.endswith("weight") else noise)
    return see.eval()


def theirs_of(see, folder):
    """transformers' model, read from what ours writes. 5.3 leaves its table of rotations on the meta device."""
    need_transformers_5_24()
    tok, *_ = examples.with_frame(tokenizer.byte())
    see.save_pretrained(folder, tok)
    return transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


def prompt(see, seed=0, pictures=2):
    """ids (1, T) of text around pictures of one square, and the squares."""
    rng, P = random.Random(seed), see.image_tokens
    ids = []
    for _ in range(pictures):
        ids += [rng.randrange(90) for _ in range(rng.randint(1, 5))] + [PATCH] * P
    ids += [rng.randrange(90) for _ in range(3)]
    size = see.encoder.size
    return torch.tensor([ids]), torch.randn(pictures, 3, size, size, generator=torch.Generator().manual_seed(seed))


def close(ours, theirs, bound=1e-5):
    return (ours - theirs).abs().max() <= bound * max(1, theirs.abs().max())


# -- the model -----------------------------------------------------------------------------------------------------

def test_logits_and_gradients(tmp_path):
    """Tower, logits, loss and the gradient of every weight; two pictures of which one crosses the edge of a chunk."""
    see = make()
    theirs = theirs_of(see, tmp_path)
    idx, x = prompt(see)
    assert type(theirs).__name__ == "Llama4ForConditionalGeneration"
    tower = theirs.model.get_image_features(x) if hasattr(theirs, "model") else theirs.get_image_features(x)
    with torch.no_grad():
        assert close(see.encoder(x), getattr(tower, "last_hidden_state", tower))
    labels = idx.masked_fill(idx == PATCH, -100)
    wanted = theirs(input_ids=idx, pixel_values=x, labels=labels)
    with torch.no_grad():
        logits = see(idx, None, x)[0]
    assert close(logits, wanted.logits) and wanted.logits.std() > 1
    targets = torch.cat((labels[:, 1:], torch.full((1, 1), -100)), 1)
    loss = see(idx, targets, x)[1]
    assert loss.item() == pytest.approx(wanted.loss.item(), abs=1e-5)
    see.requires_grad_(True)
    see(idx, targets, x)[1].backward()
    wanted.loss.backward()
    names = {n.replace("language_model.", "llama.").replace("vision_model.", "encoder.").replace(
        "multi_modal_projector.", "projector."): p for n, p in theirs.named_parameters()}
    for name, p in see.named_parameters():
        other = names[name].grad
        error = (p.grad - other).abs().max()
        assert error <= 1e-5 * max(other.abs().max(), 1e-3), (name, error)
    assert not see.llama.model.embed_tokens.weight.grad[PATCH].any()


@pytest.mark.parametrize("seed", range(6))
def test_random_configurations(seed, tmp_path):
    """Logits of models of random shapes; what ours writes is read back, what transformers writes too."""
    rng = random.Random(seed)
    join, heads = rng.choice([1, 2, 3]), rng.choice([1, 2, 4])
    patch, side, width = rng.choice([2, 3, 7]), join * rng.choice([1, 2, 3]), heads * 4 * rng.choice([1, 2, 5])
    tower = dict(size=patch * side, patch=patch, n_head=heads, dim=width, mlp_dim=width * join ** 2, join=join,
                 n_layer=rng.choice([1, 3]), out_dim=rng.choice([8, 40, 96]), rope_theta=rng.choice([20., 100., 1e4]))
    text = dict(tie_embeddings=rng.random() < 0.5, qk_norm=rng.random() < 0.5, moe_every=rng.choice([1, 2]),
                chunk=rng.choice([4, 8, 64]), n_kv_head=rng.choice([1, 2, 4]), top_k=rng.choice([1, 2]),
                attn_scale=rng.choice([0.0, 0.1]), n_layer=rng.choice([1, 4, 5]))
    see = make(text, tower)
    theirs = theirs_of(see, tmp_path / "ours")
    idx, x = prompt(see, seed, rng.randint(1, 3))
    with torch.no_grad():
        ours = see(idx, None, x)[0]
        assert close(ours, theirs(input_ids=idx, pixel_values=x).logits), (tower, text)
        theirs.save_pretrained(tmp_path / "theirs")
        for folder in "ours", "theirs":
            again = vlm.Vlm.from_pretrained(tmp_path / folder)
            assert again.encoder.config == see.encoder.config and close(again(idx, None, x)[0], ours)
            assert all(torch.equal(t, again.state_dict()[n]) for n, t in see.state_dict().items())
    saved = json.loads((tmp_path / "theirs/config.json").read_text())
    mine = json.loads((tmp_path / "ours/config.json").read_text())
    assert mine["image_token_index"] == saved["image_token_index"] == PATCH
    mine["image_token_id"] = mine.pop("image_token_index")  # another name for the same in transformers
    (tmp_path / "ours/config.json").write_text(json.dumps(mine))
    assert vlm.Vlm.from_pretrained(tmp_path / "ours").image_id == PATCH


def test_published_sizes():
    """Scout's tower and projector, and all of Scout."""
    with torch.device("meta"):
        see = vlm.Vlm(Llama(PRESETS["llama-4-scout"]), vision.Vit("llama4"), 200092)
    counts = {n: sum(p.numel() for p in getattr(see, n).parameters()) for n in ("encoder", "projector")}
    assert counts == {"encoder": 850_960_896, "projector": 20_971_520}
    assert sum(p.numel() for p in see.parameters()) == 108_641_793_536
    assert see.image_tokens == 144
    theirs = transformers.Llama4VisionConfig(
        hidden_size=1408, image_size=336, vision_output_dim=4096)  # the published values that are no defaults
    assert vision.config_from_hf(theirs.to_dict()) == vision.VITS["llama4"]


def test_text_alone(tmp_path):
    """Without pictures, patch tokens are ordinary tokens; sample.py's way to open it gives the same logits."""
    see = make()
    theirs = theirs_of(see, tmp_path)
    idx, _ = prompt(see)
    with torch.no_grad():
        ours = see(idx)[0]
        assert close(ours, theirs(input_ids=idx).logits)
        assert torch.equal(Llama.from_pretrained(tmp_path)(idx)[0], ours)
        text = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        assert close(ours, text(input_ids=idx).logits)


@pytest.mark.parametrize("first", [1, 5, 13, 20])
def test_cached_decoding_across_chunks(first):
    """A prompt of `first` tokens that ends in or behind a picture, then pieces and single tokens: the logits are those
    of all at once."""
    see = make()
    idx, x = prompt(see)
    T = idx.shape[1]
    with torch.no_grad():
        whole = see(idx, None, x)[0]
        embeds, cache = see.embed(idx, x), KVCache(see.llama.config, 1, T)
        found = [see.llama(embeds=embeds[:, a:b], cache=cache)[0]
                 for a, b in [(0, first), (first, first + 2), *((i, i + 1) for i in range(first + 2, T))]]
    assert close(torch.cat(found, 1), whole)


def test_greedy_text_of_several_pictures(tmp_path):
    """Prompts with one and two pictures, one of several squares: `generate` says what transformers' generate says."""
    see = make(dict(context=256))
    theirs = theirs_of(see, tmp_path)
    squares = torch.randn(7, 3, 24, 24)
    prompts, canvases = [[3, see.mark, 4], [5, see.mark, see.mark, 6, 7]], [(1, 2), (1, 1), (1, 1)]
    squares = squares[:3 + 2]
    ours = see.generate(prompts, squares, 12, set(), canvases)
    ids = [see.spread(prompts[0], iter(canvases)), see.spread(prompts[1])]
    for row, x, new in zip(ids, (squares[:3], squares[3:]), ours):
        idx = torch.from_numpy(row)[None]
        answer = theirs.generate(input_ids=idx, pixel_values=x, max_new_tokens=12, do_sample=False, eos_token_id=None)
        assert answer[0, len(row):].tolist() == new and len(new) == 12


# -- pictures ------------------------------------------------------------------------------------------------------

def shapes_of_pictures():
    rng = random.Random(0)
    fixed = [(336, 336), (337, 337), (336, 337), (335, 336), (672, 336), (1, 1), (1, 3000), (3000, 1), (10, 700),
             (1344, 1344), (1345, 1344), (480, 640), (333, 500), (500, 375), (2000, 1500), (100, 1700), (5377, 336),
             (861, 2296)]  # the last: rounding to float32 decides
    return fixed + [(rng.randint(1, 900), rng.randint(1, 900)) for _ in range(40)]


@pytest.fixture(scope="module")
def processors(tmp_path_factory):
    """make(most tiles, size, patch) -> (Vlm, tokenizer, transformers' processor read from what ours writes)."""
    def make_processor(tiles, size=24, patch=4):
        folder = tmp_path_factory.mktemp("processor")
        tok, patch_id, frame = examples.with_frame(tokenizer.byte())
        tower = vision.VitConfig(**TOWER | dict(size=size, patch=patch, tiles=tiles))
        see = vlm.Vlm(Llama(LlamaConfig(**TEXT | dict(vocab_size=320))), vision.Vit("llama4", tower), patch_id, frame)
        see.save_pretrained(folder, tok)
        return see, tok, transformers.AutoProcessor.from_pretrained(folder)
    return make_processor


@pytest.mark.parametrize("tiles, size, patch", [(16, 336, 14), (1, 336, 14), (5, 24, 4)])
def test_pixels_and_tokens(processors, tiles, size, patch):
    """Pixel values, canvases and ids are Llama4Processor's, for pictures of all shapes."""
    see, tok, theirs = processors(tiles, size, patch)
    assert type(theirs).__name__ == "Llama4Processor"
    rng = np.random.default_rng(0)
    for height, width in shapes_of_pictures():
        small = rng.integers(0, 256, (-(-height // 8), -(-width // 8), 3), np.uint8)
        image = Image.fromarray(small.repeat(8, 0).repeat(8, 1)[:height, :width])
        squares, canvas = see.encoder.cut(image)
        wanted = theirs(images=image, text="see <|image|> and", return_tensors="pt", add_special_tokens=False)
        assert torch.equal(squares, wanted["pixel_values"].float()), (height, width)
        ids = see.spread(tok.encode("see <image> and"), iter([canvas]))
        assert ids.tolist() == wanted["input_ids"][0].tolist(), (height, width)


def test_conversations_have_the_form_of_the_tokenizer(processors):
    """Not Llama 4's own, which transformers' processor takes where it finds none."""
    _, tok, theirs = processors(1)
    talk = [("user", "<image>\nWhat?"), ("assistant", "A dog."), ("user", "Where?")]
    wanted = tok.render([{"role": role, "content": text} for role, text in talk])
    talk = [{"role": role, "content": text.replace("<image>", "<|image|>")} for role, text in talk]
    assert theirs.apply_chat_template(talk, add_generation_prompt=True) == wanted.replace("<image>", "<|image|>")
    assert theirs.tokenizer.apply_chat_template(talk, add_generation_prompt=True, tokenize=False) == wanted.replace(
        "<image>", "<|image|>")


def test_pictures_are_cut_as_the_image_processor_says(processors, tmp_path):
    """What transformers saves is read, its nested form before an older file; what is not done here is refused."""
    _, tok, theirs = processors(5)
    for save, most, wanted in (theirs.image_processor, 5, 5), (theirs, 7, 7), (theirs.image_processor, 3, 7):
        save.max_patches = theirs.image_processor.max_patches = most
        save.save_pretrained(tmp_path)
        read = transformers.AutoImageProcessor.from_pretrained(tmp_path)
        assert vision.read_tiles(tmp_path, 24) == read.max_patches == wanted
    with pytest.raises(ValueError, match="size .*24.* is not supported"):
        vision.read_tiles(tmp_path, 48)
    (tmp_path / "processor_config.json").unlink()
    good = json.loads((tmp_path / "preprocessor_config.json").read_text())
    for key, value in {"image_mean": [0.48, 0.45, 0.4], "image_std": 0.5, "rescale_factor": 1, "resample": 3,
                       "resize_to_max_canvas": True, "do_normalize": False, "size": {"shortest_edge": 24}}.items():
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(good | {key: value}))
        with pytest.raises(ValueError, match=f"image processor's {key} .* is not supported"):
            vision.read_tiles(tmp_path, 24)


def test_canvases_of_every_size():
    """(rows, columns) as transformers' get_best_fit has them."""
    need_transformers_5_24()
    from transformers.models.llama4 import image_processing_llama4 as theirs
    square = transformers.image_utils.SizeDict(height=336, width=336)
    sizes = torch.tensor(theirs.find_supported_resolutions(16, square))
    rng = random.Random(1)
    for _ in range(2000):
        height, width = (int(10 ** rng.uniform(0, 4)) for _ in range(2))
        rows, columns = vision.canvas(height, width, 336, 16)
        assert [336 * rows, 336 * columns] == theirs.get_best_fit((height, width), sizes).tolist(), (height, width)


def test_string_of_a_picture(processors):
    """By hand: 2 x 3 squares of 4 tokens."""
    see = make(tower=dict(size=8, patch=2))
    start, end, beside, below, whole = see.frame
    p = [PATCH] * 4
    row = p + [beside] + p + [beside] + p + [below]
    assert see.picture_ids(2, 3) == [start] + row + row + [whole] + p + [end] and see.image_tokens == 4
    assert see.picture_ids() == [start, whole] + p + [end]


# -- files and use -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("change, message", [
    (dict(intermediate_size=100), "intermediate_size 100 must be hidden_size times 4"),
    (dict(projector_input_dim=7), "projector_input_dim and vision_output_dim"),
    (dict(pixel_shuffle_ratio=0.4), "pixel_shuffle_ratio 0.4"),
    (dict(hidden_size="x"), "hidden_size must be a positive int"),
    (dict(num_attention_heads=3), "3 heads"),
    (dict(image_size=25), "must divide 25"),
    (dict(rope_parameters={"rope_type": "yarn"}), "RoPE"),
])
def test_configs_that_cannot_be(change, message):
    good = vision.config_to_hf(vision.VitConfig(**TOWER))
    assert vision.config_from_hf(good) == vision.VitConfig(**TOWER)
    with pytest.raises(ValueError, match=message):
        vision.config_from_hf(good | change)


def test_missing_weights_are_named(tmp_path):
    see = make()
    tok, *_ = examples.with_frame(tokenizer.byte())
    see.save_pretrained(tmp_path, tok)
    hf, state = vision.to_hf(see)
    del state["vision_model.class_embedding"]
    checkpoint.write(tmp_path, hf, state)
    with pytest.raises(ValueError, match="class_embedding"):
        vlm.Vlm.from_pretrained(tmp_path)
    checkpoint.write(tmp_path, {k: v for k, v in hf.items() if k != "vision_config"}, vision.to_hf(see)[1])
    with pytest.raises(ValueError, match="does not see"):
        vlm.Vlm.from_pretrained(tmp_path)


def test_a_run_is_such_a_checkpoint(tmp_path, capsys):
    """Training from scratch, going on, using: each time the run directory opens in transformers with our logits, and
    its processor gives our ids."""
    need_transformers_5_24()
    folder = tmp_path / "squares"
    folder.mkdir()
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)] * 2
    np.save(folder / "images.npy", np.stack([np.full((24, 24, 3), c, np.uint8) for c in colours]))
    words = ["red", "green", "blue", "white"] * 2
    records = [r for i, c in enumerate(words) for r in (
        {"image": i, "captions": [f"{c} square"]},
        {"image": i, "conversations": [{"from": "human", "value": "<image>\ncolour?"}, {"from": "gpt", "value": c}]})]
    images.save({"train": records, "val": records}, folder)
    vision.VITS["llama4_test"] = vision.VitConfig(**TOWER | dict(tiles=4))
    shape = {k: v for k, v in TEXT.items() if k != "context"} | dict(vocab_size=320, n_layer=2, nope_every=2)
    cfg = vlm.VlmConfig(stage="together", encoder="llama4_test", dataset=str(folder), out_dir=str(tmp_path / "run"),
                        batch_size=4, block_size=64, max_iters=120, warmup_iters=2, eval_interval=120, sample_tokens=8,
                        sample_images=8, device="cpu", dtype="float32", learning_rate=1e-2)
    try:
        vlm.fit(cfg, shape)
        see, tok = vlm.open_run(tmp_path / "run")
        entry = [json.loads(line) for line in open(tmp_path / "run/log.jsonl")][-1]
        assert entry["val_loss"] < 0.5 and entry["exact"] > 0.5
        theirs = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "run", dtype=torch.float32)
        processor = transformers.AutoProcessor.from_pretrained(tmp_path / "run")
        image = Image.fromarray(np.full((40, 60, 3), (0, 255, 0), np.uint8))
        inputs = processor(images=image, text="<|image|>\ncolour?\n", return_tensors="pt")
        squares, canvas = see.encoder.cut(image)
        ids = see.spread(tok.chat([{"role": "user", "content": "<image>\ncolour?"}]), iter([canvas]))
        assert inputs["input_ids"][0].tolist() == ids.tolist()
        with torch.no_grad():
            wanted = theirs(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"].float()).logits
            assert close(see(torch.from_numpy(ids)[None], None, squares)[0], wanted)
        more = replace(cfg, stage="instruct", init_from=str(tmp_path / "run"), encoder=None, max_iters=2,
                       out_dir=str(tmp_path / "next"), learning_rate=1e-4)
        vlm.fit(more, {})
        assert vision.read_tiles(tmp_path / "next", 24) == 4  # though each picture of the data was one square
        vlm.fit(replace(more, init_from="resume", max_iters=4), {})
    finally:
        del vision.VITS["llama4_test"]
    before, after = (checkpoint.read_tensors(tmp_path / run, checkpoint.VISION) for run in ("run", "next"))
    assert all(torch.equal(t, after[n]) for n, t in before.items() if n.startswith("vision_model."))
    assert not torch.equal(before["multi_modal_projector.linear_1.weight"],
                           after["multi_modal_projector.linear_1.weight"])
    image.crop((0, 0, 24, 24)).save(tmp_path / "green.png")
    capsys.readouterr()
    vlm.main(dict(init_from=str(tmp_path / "next"), caption=(str(tmp_path / "green.png"),), device="cpu"), {})
    assert train.runs.read_log(tmp_path / "next/log.jsonl")[-1]["exact"] == 1.0
    vlm.main(dict(init_from=str(tmp_path / "next"), ask=("colour?", str(tmp_path / "green.png")), device="cpu"), {})
    assert capsys.readouterr().out.splitlines() == [f"{tmp_path / 'green.png'}: green square", "green"]


def test_a_fresh_tower_learns_before_it_is_frozen(tmp_path):
    """G11: it has no weights to download, and would see at random."""
    np.save(tmp_path / "images.npy", np.zeros((1, 24, 24, 3), np.uint8))
    images.save({split: [{"image": 0, "captions": ["x"]}] for split in ("train", "val")}, tmp_path)
    cfg = vlm.VlmConfig(stage="align", encoder="llama4_tiny", dataset=str(tmp_path), out_dir=str(tmp_path / "run"),
                        block_size=64, device="cpu")
    for stage in "align", "instruct":
        with pytest.raises(config.Mistake, match="no pretrained weights of llama4_tiny"):
            vlm.fit(replace(cfg, stage=stage), {k: v for k, v in TEXT.items() if k != "context"} | dict(vocab_size=320))


def test_what_a_published_model_learned_is_not_known(tmp_path):
    """So nothing is said about it, also after it has learned captions here; a run of ours knows."""
    for learned in None, {"caption"}, set():
        see = make(dict(vocab_size=320))
        tok, see.image_id, see.frame = examples.with_frame(tokenizer.byte())
        see.learned = learned
        see.save_pretrained(tmp_path, tok)
        assert vlm.open_run(tmp_path)[0].learned == learned
        config_json = json.loads((tmp_path / "config.json").read_text())
        if not learned:
            config_json.pop("learned")
            (tmp_path / "config.json").write_text(json.dumps(config_json))
            assert vlm.open_run(tmp_path)[0].learned is None  # as published


@pytest.mark.parametrize("tiles", [1, 6])
def test_a_conversation_across_chunks(tiles, tmp_path, monkeypatch, capsys):
    """Each turn reads what is new, however pictures of several squares lie in the chunks, and says what it says when
    all is read anew."""
    see = make(dict(vocab_size=320, context=512), dict(tiles=tiles))
    tok, see.image_id, see.frame = examples.with_frame(tokenizer.byte())
    see.save_pretrained(tmp_path / "run", tok)
    rng = np.random.default_rng(0)
    for name, size in ("a", (24, 48, 3)), ("b", (60, 30, 3)):
        Image.fromarray(rng.integers(0, 256, size, np.uint8)).save(tmp_path / f"{name}.png")
    real, said, read = sample.Conversation.reply, [], []
    append = Decoder.append
    monkeypatch.setattr(Decoder, "append", lambda self, x, *more: read.append(x.shape[1]) or append(self, x, *more))

    def anew(self, *args):
        self.ids = []
        return real(self, *args)
    for reply in real, anew:
        monkeypatch.setattr(sample.Conversation, "reply", reply)
        lines = iter(["what?", "and <b>?", "?" * 9, ""])
        monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
        read.clear()
        vlm.main(dict(init_from=str(tmp_path / "run"), chat=(str(tmp_path / "a.png"), str(tmp_path / "b.png")),
                      sample_tokens=11, device="cpu", dtype="float32"), {})
        said.append((capsys.readouterr().out, [n for n in read if n > 1]))
    assert said[0][0] == said[1][0] and said[0][0].count("llama> ") == 3
    assert said[0][1][0] == said[1][1][0] and all(n < 32 for n in said[0][1][1:]) and min(said[1][1]) > 32


def test_a_tower_needs_a_llama4():
    with pytest.raises(config.Mistake, match="--arch=llama4"):
        vlm.Vlm(Llama(train.shape_from(PRESETS["stories15m"], dict(n_layer=1, vocab_size=97, dim=48))),
                vision.Vit("llama4", vision.VitConfig(**TOWER)), PATCH)
