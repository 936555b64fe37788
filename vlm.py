"""A Llama that sees: an image encoder, a projector, and image tokens where `<image>` stands in the text.

    python prepare/shapes.py && python vlm.py config/vlm_shapes.py     train from scratch, on a laptop
    python vlm.py config/vlm_align.py                                  teach a projector to speak to a Llama
    python vlm.py config/vlm_instruct.py                               then both of them to follow instructions
    python vlm.py --caption img.jpg folder                             what the newest run sees
    python vlm.py --ask "What is on the table?" img.jpg
    python vlm.py --chat img.jpg
    python vlm.py config/vlm_align.py --eval --split=test              loss, CIDEr-D, BLEU-4, exact match

The encoders are in vision.py. With Llama 4's tower and a Llama 4 it is Llama 4 as published: the run directory is a
checkpoint that transformers' AutoModelForImageTextToText and AutoProcessor open, and theirs open here. Of any other
Llama it is the Llama's checkpoint with vlm.json and projector.safetensors beside it, and encoder.safetensors where the
encoder learned too. Training is train.py's loop with its keys: resume, several processes, checkpoints and log are the
same. The run is kept in out/vlm_<dataset>.

Letters in shapes: B rows, T positions, D the Llama's width, N squares (a picture is one, or with Llama 4 several), S
their side in pixels, P image tokens of a square, W their width.

Sources: LLaVA (arXiv:2304.08485, 2310.03744), DPO (2305.18290), RLAIF-V (2405.17220); for Llama 4, transformers
modeling_llama4.py and processing_llama4.py.
"""
import hashlib
import json
import sys
import textwrap
import warnings
from collections import OrderedDict
from dataclasses import dataclass, replace
from pathlib import Path

import config

if __name__ == "__main__":  # read the arguments before torch is imported: a typo answers at once
    settings = config.run(config.load, "vlm.py:VlmConfig", None, "model.py:LlamaConfig")

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.nn as nn  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

import adapter  # noqa: E402
import checkpoint  # noqa: E402
import common  # noqa: E402
import decode  # noqa: E402
import lora  # noqa: E402
import model  # noqa: E402
import runs  # noqa: E402
import train  # noqa: E402
import vision  # noqa: E402
from common import RANK, WORLD, print0  # noqa: E402
from feedback import preference  # noqa: E402
from prepare import images, picture_files, tokenizer  # noqa: E402
from prepare.images import (  # noqa: E402
    IMAGE, Examples, caption_prompt, with_image, with_pictures)
from prepare.windows import order  # noqa: E402
from scores import agree, caption_scores  # noqa: E402

STAGES = {"align": ("projector",), "see": ("encoder", "projector"), "instruct": ("projector", "llama"),
          "prefer": ("projector", "llama"), "together": ("encoder", "projector", "llama")}  # what learns in each

REPLY = 16  # tokens of the context that an answer finds free
FONTS = ("DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Micro Hei", "Microsoft YaHei", "PingFang SC",
         "Noto Sans Devanagari", "Noto Sans Thai")  # of samples.png: each for what the earlier ones lack


@dataclass
class VlmConfig(train.TrainConfig):
    """How to train and use a Llama that sees; the keys of model.py's LlamaConfig shape a new one."""
    stage: str = "align"  # what learns: projector; "see": encoder too; "instruct", "prefer": Llama too; "together": all
    encoder: str | None = None  # "vit_b_16" or another of vision.py; None: the checkpoint's, else vit_b_16
    vit_weights: str | None = None  # file of torchvision's ViT weights; None: their download, in stage together none
    pixel_shuffle: bool | None = None  # join 2 x 2 image tokens: 196 -> 49; None: as the checkpoint, else no
    feature_gb: float = 16.0  # [0, 1e6] of disk for what a frozen encoder saw, so that it looks once; COCO needs 35
    beta: float = 0.1  # (0, 1000] DPO's strength of the tie to the reference model; its authors'
    out_dir: str | None = None  # where the run is kept; None: out/vlm_<dataset>
    dataset: str = "shapes"  # folder under data/ (or a path) made by prepare/shapes, coco, flickr8k or llava
    sample_tokens: int = 128  # [1, inf) longest caption or answer, in tokens
    sample_images: int = 16  # [1, inf) validation pictures described at each evaluation and drawn in samples.png
    caption: tuple[str, ...] = ()  # describe these pictures, and all in these folders
    ask: tuple[str, ...] = ()  # a question, then the pictures that it is about
    chat: tuple[str, ...] = ()  # talk about these pictures
    json: bool = False  # print captions, an answer or scores as JSON, one object a line
    eval: bool = False  # score the run of out_dir, or of init_from, or the newest, on a whole split
    split: str = "val"  # the split to score: val, test or train

    def __post_init__(self):
        super().__post_init__()
        names = (*vision.VITS, "efficientnet_lite0")
        for name, value, allowed in (("stage", self.stage, STAGES), ("split", self.split, images.SPLITS),
                                     ("encoder", self.encoder, (None, *names))):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(a for a in allowed if a)}, not {value!r}")
        if sum(map(bool, (self.caption, self.ask, self.chat))) > 1:
            raise ValueError("give one of --caption, --ask and --chat")
        if self.ask and len(self.ask) < 2:
            raise ValueError("ask takes a question and at least one picture: --ask \"What is this?\" img.jpg")
        if self.lora_rank:
            raise ValueError("lora_rank is for train.py; a Llama that was adapted there can learn to see here")
        if self.doc_mask or self.whole_docs or self.epochs:
            raise ValueError("doc_mask, whole_docs and epochs are for train.py")


# -- the model ---------------------------------------------------------------------------------------------------

class Vlm(nn.Module):
    """encoder -> projector -> Llama.

    In a text one token, `mark`, stands for a picture. The model reads `picture_ids` in its place: P times image_id,
    whose embeddings are those of the picture's tokens, and with Llama 4 the tokens of `frame` around them."""

    def __init__(self, llama, encoder, image_id, frame=(), pixel_shuffle=False, beta=0.1):
        """frame: ids of vision.FRAME, () where pictures have none; pixel_shuffle: join 2 x 2 tokens of the encoder."""
        super().__init__()
        self.llama, self.encoder, self.image_id, self.frame = llama, encoder, image_id, frame
        self.pixel_shuffle, self.beta = pixel_shuffle, beta
        self.llama4 = encoder.llama4
        if self.llama4 and llama.config.arch != "llama4":
            raise config.Mistake("Llama 4's tower goes with a Llama 4: --arch=llama4, or --model=llama4-tiny")
        if pixel_shuffle and (encoder.grid % 2 or self.llama4):
            raise config.Mistake(f"pixel_shuffle joins 2 x 2 tokens, which the {encoder.grid} x {encoder.grid} of "
                                 f"{encoder.name} do not allow" + "; it joins its own" * self.llama4)
        width, dim = encoder.width * (4 if pixel_shuffle else 1), llama.config.dim
        self.image_tokens = encoder.grid ** 2 // (4 if pixel_shuffle else 1)
        if self.llama4:
            self.projector = nn.Sequential(OrderedDict(linear_1=nn.Linear(width, dim, bias=False)))
        else:
            self.projector = nn.Sequential(nn.Linear(width, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        last = self.projector[-1]
        scale = llama.model.embed_tokens.weight.detach().std()  # image tokens start as large as words
        with torch.no_grad():
            last.weight.normal_().mul_(scale / last.in_features ** 0.5)
        self.frozen, self.encoder_learned = (), False  # what does not learn now; whether the encoder ever did
        self.learned = set()  # kinds of examples: caption, answer, chosen, rejected

    def freeze(self, learning):
        """Let the parts named in `learning` learn, and no other."""
        self.frozen = [n for n in ("encoder", "projector", "llama") if n not in learning]
        for name in ("encoder", "projector", "llama"):
            getattr(self, name).requires_grad_(name in learning)
        self.encoder_learned |= "encoder" in learning
        return self.train()

    def train(self, mode=True):
        super().train(mode)
        if "encoder" in self.frozen:
            self.encoder.eval()  # its batch norms keep their statistics
        return self

    @property
    def mark(self):
        """The token that stands for a picture in a text."""
        return self.frame[-1] if self.frame else self.image_id

    def picture_ids(self, rows=1, columns=1):
        """What the model reads in the place of a picture of so many squares. Where they are several, Llama 4 reads them
        row by row, and then the whole picture in one square."""
        patches = [self.image_id] * self.image_tokens
        if not self.frame:
            return patches
        start, end, beside, below, whole = self.frame
        row = [*patches, *[beside, *patches] * (columns - 1), below]
        return [start, *(row * rows if rows * columns > 1 else []), whole, *patches, end]

    def spread(self, ids, canvases=None):
        """ids (n,) with what the model reads in the place of each mark, int64. canvases: an iterator of the pictures'
        (rows, columns); None: each is one square."""
        parts = ([i] if i != self.mark else self.picture_ids(*(next(canvases) if canvases else ()))
                 for i in np.asarray(ids).tolist())
        return np.array([i for part in parts for i in part], np.int64)

    def embed(self, idx, pictures):
        """idx (B, T) with P times image_id for each square, pictures as for `forward` -> (B, T, D)."""
        x = self.llama.model.embed_tokens(idx)
        if pictures is None:
            return x
        seen = self.encoder(pictures) if pictures.dim() == 4 else pictures
        seen = self.projector(vision.shuffle(seen) if self.pixel_shuffle else seen)  # (N, P, D)
        return x.masked_scatter((idx == self.image_id)[..., None], seen.to(x.dtype))

    def forward(self, idx, targets=None, pictures=None, positions=None, reference=None):
        """Logits (B, T, V) and loss, as Llama.forward.

        pictures: squares (N, 3, S, S), or what the encoder made of them, (N, P, W), in the order of their tokens in
        idx; N may be 0; None: idx is text alone. With reference (2, B/2), log-probabilities of the reference model,
        rows are B/2 chosen and then B/2 rejected answers; the result is DPO's margins (B/2,) and loss.
        """
        embeds = self.embed(idx, pictures)
        if reference is None:
            return self.llama(embeds=embeds, targets=targets, positions=positions)
        log_probs = self.log_probs(self.llama(embeds=embeds)[0], targets).view(2, -1)
        return preference(log_probs, reference, self.beta)

    @staticmethod
    def log_probs(logits, targets):
        """Sum over each row's targets of their log-probability, (B,)."""
        return -F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100,
                                reduction="none").view(targets.shape).sum(1)

    @torch.no_grad()
    def generate(self, prompts, pictures, max_new_tokens, stop_ids, canvases=None):
        """Greedy continuations, as lists of ids without the end, of prompts: ids with a mark for each picture.
        pictures: the squares of all, in order; canvases: their (rows, columns), see `spread`."""
        device, was = self.llama.lm_head.weight.device, self.training
        self.eval()
        pictures, canvases = pictures.to(device), canvases and iter(canvases)
        pictures, begun, embeds = self.encoder(pictures) if pictures.dim() == 4 else pictures, 0, []
        for prompt in prompts:
            ids = self.spread(prompt, canvases)
            end = begun + (ids == self.image_id).sum() // self.image_tokens
            embeds.append(self.embed(torch.from_numpy(ids)[None].to(device), pictures[begun:end])[0])
            begun = end
        new = decode.decode_all(self.llama, embeds, max_new_tokens, len(embeds), stop_ids=stop_ids, temperature=0)
        self.train(was)
        return [[token for token in row if token not in stop_ids] for row in new]

    def save_pretrained(self, directory, tok):
        """Write a checkpoint: of a Llama 4 transformers' own, else the Llama's and, beside it, what makes it see. Each
        file appears whole."""
        directory = Path(directory)
        if self.llama4:
            checkpoint.write(directory, *self.to_hf())
            tok = vision.renamed(tok, IMAGE, vision.FRAME[-1], special=True)
            files = vision.processor_files(self.encoder) | {"chat_template.jinja": tok.chat_template["default"]}
        else:
            self.llama.save_pretrained(directory)
            learned = {"projector": self.projector} | ({"encoder": self.encoder} if self.encoder_learned else {})
            for name, part in learned.items():
                with common.atomic_write(directory / f"{name}.safetensors") as path:
                    save_file({k: t.detach().cpu().contiguous() for k, t in part.state_dict().items()}, path)
            digest = None if self.encoder_learned else digest_of(self.encoder)[:16]
            files = {"vlm.json": {"encoder": self.encoder.name, "encoder_learned": self.encoder_learned,
                                  "encoder_digest": digest, "image_id": self.image_id,
                                  "pixel_shuffle": self.pixel_shuffle, "learned": sorted(self.learned)}}
        tok.save(directory)
        for name, facts in files.items():
            with common.atomic_write(directory / name) as path:
                path.write_text(facts if isinstance(facts, str) else json.dumps(facts, indent=1) + "\n", "utf-8")

    def to_hf(self):
        """(config.json, {name: tensor}) of a Llama 4, as transformers' Llama4ForConditionalGeneration has them."""
        parts = {"language_model.": self.llama, "vision_model.": self.encoder, "multi_modal_projector.": self.projector}
        state = {prefix + name: t for prefix, part in parts.items() for name, t in part.state_dict().items()}
        tied = self.llama.config.tie_embeddings
        if tied:
            del state["language_model.lm_head.weight"]
        dtype = str(self.llama.lm_head.weight.dtype).removeprefix("torch.")
        text = checkpoint.config_to_hf(self.llama.config, dtype)
        hf = {"architectures": ["Llama4ForConditionalGeneration"], "model_type": "llama4", "dtype": dtype,
              "torch_dtype": dtype, "tie_word_embeddings": tied, "image_token_index": self.image_id,
              **dict(zip(("boi_token_index", "eoi_token_index"), self.frame)),
              "learned": sorted(self.learned),  # no key of transformers, which keeps it
              "text_config": text, "vision_config": vision.config_to_hf(self.encoder.config)}
        return hf, state

    @classmethod
    def from_pretrained(cls, directory, vit_weights=None, beta=0.1, dtype=torch.float32, **overrides):
        """Read what `save_pretrained` wrote, or transformers' Llama4ForConditionalGeneration. Raises ValueError or
        FileNotFoundError, naming what is wrong."""
        directory = Path(directory)
        llama = model.Llama.from_pretrained(directory, dtype=dtype, **overrides)
        if (directory / "vlm.json").exists():
            facts = checkpoint.read_json(directory / "vlm.json")
            try:
                name, learned, image_id, joined = (facts[k] for k in ("encoder", "encoder_learned", "image_id",
                                                                      "pixel_shuffle"))
            except KeyError as e:
                raise ValueError(f"{directory / 'vlm.json'} has no {e}") from None
            if learned and vit_weights:
                raise ValueError(f"{directory} has an encoder of its own, which learned: leave vit_weights out")
            encoder = vision.make_encoder(name, vit_weights, not learned)
            if not learned and facts.get("encoder_digest") not in (None, digest_of(encoder)[:16]):  # None: an older run
                raise ValueError(f"{directory} learned with other weights of {name}: name their file with "
                                 "--vit_weights")
            vlm = cls(llama, encoder, image_id, (), joined, beta)
            parts = ("projector", "encoder")[:1 + learned]
            states = {part: checkpoint.read_tensors(directory / f"{part}.safetensors") for part in parts}
        else:
            if vit_weights:
                raise ValueError(f"{directory} has an encoder of its own: leave vit_weights out")
            facts = hf = checkpoint.read_json(directory / "config.json")
            if not isinstance(hf.get("vision_config"), dict):
                raise ValueError(f"{directory} holds a model that does not see: no vlm.json, no vision_config")
            encoder = vision.Vit("llama4", vision.config_from_hf(hf["vision_config"], vision.read_tiles(directory)))
            vlm, learned = cls(llama, encoder, hf.get("image_token_index", 200092), beta=beta), True
            tensors = checkpoint.vision_tensors(directory)
            states = {part: {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
                      for part, prefix in (("encoder", "vision_model."), ("projector", "multi_modal_projector."))}
        for part, state in states.items():
            try:
                old = "vit.class_token" in state  # a run of before vision.py
                getattr(vlm, part).load_state_dict(vision.from_torchvision(state) if old else state)
            except RuntimeError as e:
                raise ValueError(f"{directory}: not the weights of its {part}: {' '.join(str(e).split())}") from None
        vlm.encoder_learned, vlm.learned = learned, set(facts.get("learned", ()))
        return vlm.to(dtype).freeze(()).eval()


def digest_of(module):
    """Stands for all weights of a module: hexadecimal digits."""
    digest = hashlib.sha256()
    for t in module.state_dict().values():
        digest.update(t.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def sees(directory):
    """Whether a directory holds a model that sees."""
    hf = directory / "config.json"
    return (directory / "vlm.json").is_file() or hf.is_file() and "vision_config" in checkpoint.read_json(hf)


def open_run(directory, vit_weights=None, beta=0.1, **overrides):
    """(Vlm, tokenizer) of a directory."""
    vlm, tok = Vlm.from_pretrained(directory, vit_weights, beta, **overrides), tokenizer.load(directory)
    if vlm.llama4:
        tok, patch, vlm.frame = vision.with_frame(tok)
        if patch != vlm.image_id:
            raise ValueError(f"{directory}: {vision.PATCH} has the id {patch}, config.json says {vlm.image_id}")
    return vlm, tok


def grow(llama, vocab_size):
    """Give a Llama embeddings for vocab_size tokens (up to a multiple of 64); the new ones are the mean of the old."""
    old = llama.config.vocab_size
    if old >= vocab_size:
        return llama
    llama.config = llama.model.cfg = replace(llama.config, vocab_size=-(-vocab_size // 64) * 64)
    with torch.no_grad():
        for part, name in ((llama.model, "embed_tokens"), (llama, "lm_head")):
            w = getattr(part, name).weight
            w = nn.Parameter(torch.cat((w, w.mean(0).expand(llama.config.vocab_size - old, -1))))
            getattr(part, name).weight = w
    if llama.config.tie_embeddings:
        llama.lm_head.weight = llama.model.embed_tokens.weight
    return llama


# -- a model at work ---------------------------------------------------------------------------------------------

class Runner:
    """A Vlm on its device, with its tokenizer and settings, and the pictures of a data set."""

    def __init__(self, cfg, vlm, tok, device, dtype):
        self.cfg, self.vlm, self.tok, self.device = cfg, vlm.to(device), tok, device
        self.autocast = common.autocast_to(dtype, device)

    def read(self, folder, *splits):
        """The examples of these splits of a data set; from now on the runner sees its pictures."""
        number, vlm = {}, self.vlm
        size = min(self.cfg.block_size, vlm.llama.config.context)
        vlm.encoder.tiles = 1  # each picture of a data set is one square, so that all take as many tokens
        found = [Examples(folder, s, self.tok, vlm.mark, len(vlm.picture_ids()), size, number) for s in splits]
        if lost := sum(data.lost for data in found):
            print0(f"{lost:,} examples do not fit block_size={size} and were left out")
        if shortened := sum(data.shortened for data in found):
            print0(f"{shortened:,} conversations were cut after the last answer that ends within block_size={size}")
        limit = self.cfg.feature_gb if "encoder" in vlm.frozen else None
        self.pictures = vision.Pictures(folder, list(number), vlm.encoder, self.device, self.autocast, limit)
        return found

    def expect(self, kind, what):
        """Say so where the model learned other things only. (Older runs do not tell.)"""
        if self.vlm.learned and kind not in self.vlm.learned:
            print(f"note: this run learned no {what} ({', '.join(sorted(self.vlm.learned))} only): expect no sense",
                  file=sys.stderr)

    def batch(self, data, which):
        """Inputs, targets, pictures and positions, as `Vlm.forward` takes them, of the examples numbered `which`."""
        lines = data.lines(which)
        x, y, positions = data.collate(lines)
        pictures = [p for rows in lines for p in rows[0].pictures]
        x[x == self.vlm.mark] = np.tile(self.vlm.picture_ids(), len(pictures))
        return x, y, self.pictures(pictures), positions

    def some(self, data, limit=0):
        """The numbers of the examples to evaluate, the same each time, until they have `limit` tokens (0: of all)."""
        which = order(0, 0, len(data))
        if not limit:
            return which
        learned = np.cumsum([sum(int(r.learn[1:].sum()) for r in data.examples[i]) for i in which])
        return which[:int(np.searchsorted(learned, limit)) + 1]

    def loss(self, model, data, limit=0):
        """Mean loss over the learned tokens of `some` of the data; every process takes a share."""
        mine, size = self.some(data, limit)[RANK::WORLD], self.cfg.batch_size
        batches = (self.batch(data, mine[i:i + size]) for i in range(0, len(mine), size))
        return train.evaluate(model, ((int((b[1] != -100).sum()), b) for b in batches), self.device, self.autocast)

    @torch.no_grad()
    def log_probs(self, data, which):
        """Log-probabilities (2, n) of the chosen and rejected answers numbered `which`; every process takes a share."""
        found, size, was = torch.zeros(2, len(which)), self.cfg.batch_size, self.vlm.training
        mine = np.arange(len(which))[RANK::WORLD]
        self.vlm.eval()
        for i in track(range(0, len(mine), size), "pairs"):
            x, y, seen, _ = common.to_device(self.device, *self.batch(data, which[mine[i:i + size]]))
            with self.autocast:
                found[:, mine[i:i + size]] = self.vlm.log_probs(self.vlm(x, None, seen)[0], y).view(2, -1).float().cpu()
        self.vlm.train(was)
        if WORLD > 1:
            dist.all_reduce(found)
        return found

    def answers(self, rows):
        """The model's text for each row's prompt."""
        texts, size = [], self.cfg.batch_size
        for i in track(range(0, len(rows), size), "answering"):
            batch = rows[i:i + size]
            texts += self.texts([r.prompt() for r in batch], self.pictures([p for r in batch for p in r.pictures]))
        return texts

    def texts(self, prompts, seen, canvases=None):
        """The model's text after each prompt; see `Vlm.generate`."""
        with self.autocast:
            new = self.vlm.generate(prompts, seen, self.cfg.sample_tokens, self.tok.stop_ids, canvases)
        return [self.tok.decode(ids).strip() for ids in new]


def track(batches, what):
    """The batches, with a bar on the first process once they take a while."""
    from tqdm import tqdm
    return tqdm(batches, what, unit="batch", leave=False, delay=2, disable=RANK > 0)


# -- training ----------------------------------------------------------------------------------------------------

def new_tokenizer(folder, vocab_size):
    """A SentencePiece BPE of so many tokens, trained on the texts of a data set."""
    texts = []
    for n, record in enumerate(images.load(folder, "train"), 1):
        with config.mistakes(ValueError, prefix=f"{Path(folder) / 'train.jsonl'}, record {n}: "):
            texts += [text.replace(IMAGE, "") for _, talk in images.talks_of(record) for _, text in talk]
    return tokenizer.train_sentencepiece(texts, vocab_size)


def build(cfg, shape, folder, source):
    """(Vlm, tokenizer) of the checkpoint `source`, to which a plain Llama adds a projector; None: a new one."""
    kept = {k: v for k, v in shape.items() if k in train.TRAINING_ONLY}
    torch.manual_seed(cfg.seed)
    with config.mistakes(ValueError, FileNotFoundError):
        source = source and checkpoint.find_checkpoint(source)
        if source and sees(source):
            begun = cfg.init_from == "resume" and "encoder" in STAGES[cfg.stage]  # no longer that of the file
            vlm, tok = open_run(source, None if begun else cfg.vit_weights, cfg.beta, **kept)
            for key, have in (("encoder", vlm.encoder.name), ("pixel_shuffle", vlm.pixel_shuffle)):
                if getattr(cfg, key) not in (None, have):
                    raise config.Mistake(f"{source} was trained with {key}={have}; leave the key out")
        else:
            pretrained = "encoder" not in STAGES[cfg.stage]
            encoder = vision.make_encoder(cfg.encoder or "vit_b_16", cfg.vit_weights, pretrained)
            add, count = (vision.with_frame, len(vision.FRAME) + 1) if encoder.llama4 else (with_image, 1)
            vocab_size = shape.get("vocab_size", 512)
            tok = adapter.load_tokenizer(source) if source else new_tokenizer(folder, vocab_size - count)
            tok, *ids = add(tok)
            if source:
                llama = adapter.load(source, torch.float32, **kept)
                lora.merge(llama)
                llama = grow(llama.requires_grad_(True), tok.vocab_size)
            else:
                llama = model.Llama(train.new_shape(cfg, shape, tok, tok.vocab_size), cfg.seed)
            vlm = Vlm(llama, encoder, *ids, pixel_shuffle=bool(cfg.pixel_shuffle), beta=cfg.beta)
    train.need_fit(vlm.llama.config, cfg, shape if source else {}, tok.vocab_size)
    return vlm, tok


def draw(path, pictures, texts):
    """A grid of pictures (PIL or arrays) with their texts, as a PNG."""
    from matplotlib import font_manager
    from matplotlib.figure import Figure
    installed = {font.name for font in font_manager.fontManager.ttflist}
    fonts = [name for name in FONTS if name in installed]
    rows, columns = -(-len(texts) // 4), min(4, len(texts))
    figure = Figure(figsize=(3 * columns, 3.6 * rows), dpi=80, layout="constrained")
    for axes, picture, text in zip(figure.subplots(rows, columns, squeeze=False).flat, pictures, texts):
        axes.imshow(picture)
        lines = "\n".join(textwrap.fill(line, 38) for line in text.replace("$", r"\$").split("\n"))
        axes.set_title(lines, fontsize=8, fontfamily=fonts)
    for axes in figure.axes:
        axes.axis("off")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a box stands for what no font has
        runs.write_figure(figure, path)


class Stage:
    """A stage of training: what train.fit trains. Its model is a Vlm, of which some parts learn."""

    def __init__(self, cfg, shape, out, device):
        self.cfg, self.out = cfg, out
        self.folder = train.folder_of(cfg)
        records = [r for split in ("train", "val") for r in images.load(self.folder, split)]  # before any download
        if {"chosen" in r for r in records} != {cfg.stage == "prefer"}:
            raise config.Mistake(f"stage {cfg.stage!r} takes " + (
                "pairs of chosen and rejected answers and nothing else" if cfg.stage == "prefer" else
                "captions and conversations, not pairs of answers"))
        if cfg.stage == "prefer" and cfg.init_from == "scratch":
            raise config.Mistake("stage 'prefer' goes on from a model that answers: name its run with --init_from")
        resumed = runs.common_latest(out) if cfg.init_from == "resume" else None
        self.model, self.tok = build(cfg, shape, self.folder, None if cfg.init_from == "scratch" else
                                     resumed or cfg.init_from)
        self.model.freeze(STAGES[cfg.stage])
        self.llama = self.model.llama
        self.llama.model.checkpointing = cfg.checkpointing
        self.dtype, self.why_dtype = common.pick_dtype(cfg.dtype, device)
        self.run = Runner(cfg, self.model, self.tok, device, self.dtype)
        self.device, self.floor = device, None
        self.data, self.val = self.run.read(self.folder, "train", "val")
        self.model.learned |= {row.kind for rows in self.data.examples for row in rows}
        self.tokens = float(np.mean([self.data.length(rows) for rows in self.data.examples]))  # of an example
        gradients = 2 / 3 if "llama" in self.model.frozen else 1  # a frozen Llama has none
        self.flops_per_token = self.llama.flops_per_token(int(self.tokens)) * gradients
        digest = hashlib.sha256((self.folder / "val.jsonl").read_bytes()).hexdigest()
        self.val_fingerprint = [digest, cfg.eval_tokens, cfg.block_size]
        self.references = None, None  # log-probabilities of the training and the validation pairs
        if cfg.stage == "prefer":
            if resumed:
                self.references = read_references(resumed / "reference.pt", self.fingerprint())
            else:
                self.references = [self.run.log_probs(data, np.arange(len(data))) for data in (self.data, self.val)]
        questions = self.val.questions()
        places = np.linspace(0, len(questions) - 1, min(cfg.sample_images, len(questions))).astype(int)
        self.shown = [questions[i] for i in places]

    def fingerprint(self):
        """Stands for the pairs as they are read, in their order, and for their pictures."""
        names, folder = self.run.pictures.names, self.folder
        sizes = [(folder / ("images.npy" if isinstance(n, int) else n)).stat().st_size for n in names]
        digest = hashlib.sha256(json.dumps([names, sizes]).encode())
        for row in (row for data in (self.data, self.val) for rows in data.examples for row in rows):
            digest.update(row.ids.tobytes() + row.learn.tobytes() + json.dumps(row.pictures).encode())
        return digest.hexdigest()

    def describe(self):
        """Print what is trained, on what and how."""
        vlm = self.model
        sizes = [f"{n} {sum(p.numel() for p in getattr(vlm, n).parameters()):,}" + " (frozen)" * (n in vlm.frozen)
                 for n in ("encoder", "projector", "llama")]
        print0(f"model      {', '.join(sizes)} parameters; {vlm.encoder.name}, {vlm.image_tokens} tokens a picture")
        print0(f"data       {self.folder.name}: {len(self.data):,} training examples, {len(self.val):,} validation, "
               f"{len(self.run.pictures.names):,} pictures, {self.tokens:.0f} tokens an example")
        print0(f"step       {train.sequences_per_step(self.cfg)} examples")
        train.print_schedule(self, len(self.data))

    def batch(self, drawn):
        """This process's micro-batches of the step that begins after `drawn` examples. Of preferences each pair counts,
        of all else each token that is learned."""
        seed, length, micro_batches = self.cfg.seed, len(self.data), []
        for row in train.numbers_of_step(self.cfg, drawn):
            which = [order(seed, int(n) // length, length)[n % length] for n in row]
            args = self.run.batch(self.data, which)
            if self.data.pairs:
                micro_batches.append((len(which), (*args, self.references[0][:, which])))
            else:
                micro_batches.append((int((args[1] != -100).sum()), args))
        return micro_batches

    def evaluate(self, model):
        """Validation loss, of pairs DPO's with its margin and accuracy, and the share of answers that are exact among
        those drawn in samples.png."""
        if self.data.pairs:
            which = self.run.some(self.val, self.cfg.eval_tokens)
            log_probs = self.run.log_probs(self.val, which)
            margin, loss = preference(log_probs, self.references[1][:, which], self.model.beta)
            scores = {"val_loss": loss.item(), "margin": margin.mean().item(),
                      "accuracy": (margin > 0).float().mean().item()}
        else:
            scores = {"val_loss": self.run.loss(model, self.val, self.cfg.eval_tokens)}
        if RANK == 0:
            texts = self.run.answers(self.shown)
            scores["exact"] = agree(texts, self.shown)
            seen = [(self.tok.decode(r.prompt()).replace(IMAGE, "").strip(), t, r.pictures[0])
                    for t, r in zip(texts, self.shown) if r.pictures]
            if seen:
                draw(self.out / "samples.png", [self.run.pictures.look(p) for *_, p in seen],
                     [f"{question}\n{t}".strip() for question, t, _ in seen])
            print0("val " + "  ".join(f"{k.removeprefix('val_')} {v:.4f}" for k, v in scores.items()))
            print0("\n".join(f"  | {t}" for t in texts[:4]))
        return scores

    def save(self, directory):
        """Write the model and its tokenizer, and what the reference model thinks of each pair."""
        self.model.save_pretrained(directory, self.tok)
        if self.references[0] is not None:
            torch.save({"pairs": self.fingerprint(), "references": self.references}, Path(directory) / "reference.pt")


def read_references(path, pairs):
    """Log-probabilities of the training and the validation pairs, as `Stage.save` wrote them for the same pairs."""
    with config.mistakes(Exception, prefix=f"{path} cannot be read: "):
        saved = torch.load(path, weights_only=True)
    if not isinstance(saved, dict) or saved.get("pairs") != pairs:
        raise config.Mistake(f"{path} belongs to other pairs of answers: go on with the data and the block_size that "
                             "this run began with, or begin anew with another --out_dir")
    return saved["references"]


def fit(cfg, shape):
    """Train one stage as `cfg` says."""
    if cfg.shard and WORLD > 1:
        raise config.Mistake("--shard=True splits a Llama, not one that sees")
    train.start(Stage, cfg, shape, "vlm_")


# -- use ---------------------------------------------------------------------------------------------------------

def run_to_use(out_dir=None, init_from="scratch"):
    """The directory or hub name of the run in out_dir, of init_from, or of the newest run."""
    if out_dir or init_from not in ("scratch", "resume"):
        return out_dir or init_from
    runs = [path for path in (config.ROOT / "out").glob("*/config.json") if sees(path.parent)]
    if not runs:
        raise config.Mistake("no model that sees under out/: train one with `python prepare/shapes.py && "
                             "python vlm.py config/vlm_shapes.py`, or name one with --init_from")
    return max(runs, key=lambda path: path.stat().st_mtime).parent


def load(cfg):
    """Runner of the model that cfg names."""
    directory = run_to_use(cfg.out_dir, cfg.init_from)
    device = common.pick_device(cfg.device)
    dtype, _ = decode.dtype_to_decode(cfg.dtype, device)
    with config.mistakes(ValueError, FileNotFoundError):
        run = Runner(cfg, *open_run(checkpoint.find_checkpoint(directory), cfg.vit_weights), device, dtype)
    decode.to_decode(run.vlm.llama)
    return run


def look(run, paths, need_all=False):
    """[(path, features (n, P, W), (rows, columns)), ...] of the pictures that can be read; of the others each is named,
    or, with need_all, the first is raised."""
    seen, encoder = [], run.vlm.encoder
    for path in paths:
        try:
            squares, canvas = encoder.cut(picture_files.read(path))
        except config.Mistake as e:
            if need_all:
                raise
            print(f"error: {e}", file=sys.stderr)
            continue
        with torch.no_grad(), run.autocast:
            seen.append((path, encoder(squares.to(run.device)), canvas))
    return seen


def caption(cfg):
    """One line for each picture, those of folders included; exit code 2 if any could not be read."""
    from tqdm import tqdm
    paths, size, failed = picture_files.expand(cfg.caption), cfg.batch_size, 0
    run = load(cfg)
    run.expect("caption", "captions")
    bar = tqdm(total=len(paths), desc="captions", unit=" pictures", leave=False, disable=len(paths) <= size)
    for i in range(0, len(paths), size):
        seen = look(run, paths[i:i + size])
        failed += len(paths[i:i + size]) - len(seen)
        good, features, canvases = zip(*seen) if seen else ((), (), ())
        texts = run.texts([caption_prompt(run.tok)] * len(good), torch.cat(features), canvases) if good else []
        for path, text in zip(good, texts):
            found = json.dumps({"image": str(path), "caption": text}, ensure_ascii=False)
            bar.write(found if cfg.json else f"{path}: {text}")
        sys.stdout.flush()
        bar.update(len(paths[i:i + size]))
    bar.close()
    if failed:
        sys.exit(2)


def fitting(run, turns, canvases):
    """(turns, ids) of a conversation about pictures of these canvases, without its oldest turns where the context is
    full: the pictures then go to the first turn that is left. Raises `Mistake` for a question that has no place."""
    vlm, context, count = run.vlm, run.vlm.llama.config.context, len(canvases)
    while True:
        if not any(IMAGE in turn["content"] for turn in turns):
            turns = [turns[0] | {"content": with_pictures(turns[0]["content"], count)}, *turns[1:]]
        if (places := sum(turn["content"].count(IMAGE) for turn in turns)) != count:
            raise config.Mistake(f"the text places {places} pictures with {IMAGE}, but there are {count}")
        ids = vlm.spread(run.tok.chat(turns), iter(canvases))
        if len(ids) <= context - REPLY or len(turns) == 1:
            break
        turns = turns[2:]
    if len(ids) >= context:
        raise config.Mistake(f"{len(ids)} tokens are too many for the model's context={context}: shorten it")
    return turns, ids


def reply(run, ids, features, show=True):
    """The answer to a conversation as text; shown as it comes. features: of its pictures, (N, P, W)."""
    text, new, stops = run.tok.stream(), [], run.tok.stop_ids
    with torch.no_grad(), run.autocast:
        embeds = run.vlm.embed(torch.from_numpy(ids)[None].to(run.device), features)
        for token in run.vlm.llama.stream(embeds, run.cfg.sample_tokens, stops, temperature=0):
            if token.item() not in stops:
                new.append(token.item())
                print(text.feed(new[-1]) if show else "", end="", flush=True)
    print(text.end() + "\n" if show else "", end="", flush=True)
    return run.tok.decode(new)


def ask(cfg):
    """Answer one question about pictures."""
    question, *paths = cfg.ask
    if not question.strip():
        raise config.Mistake("the question is empty")
    run = load(cfg)
    run.expect("answer", "questions")
    _, features, canvases = zip(*look(run, paths, need_all=True))
    _, ids = fitting(run, [{"role": "user", "content": question.strip()}], canvases)
    answer = reply(run, ids, torch.cat(features), show=not cfg.json)
    if cfg.json:
        print(json.dumps({"images": paths, "question": question, "answer": answer.strip()}, ensure_ascii=False))


def chat(cfg):
    """A conversation about pictures until an empty line, Ctrl-C or Ctrl-D; what cannot be asked is said."""
    run, turns = load(cfg), []
    run.expect("answer", "questions")
    _, features, canvases = zip(*look(run, cfg.chat, need_all=True))
    features = torch.cat(features)
    while True:
        try:
            text = input("you> ").strip()
        except (EOFError, KeyboardInterrupt):
            text = ""
        if not text:
            print()
            return
        asked = [*turns, {"role": "user", "content": text}]
        try:
            kept, ids = fitting(run, asked, canvases)
        except config.Mistake as e:
            print(e, file=sys.stderr)
            continue
        if len(kept) < len(asked):
            print(f"(the context of {run.vlm.llama.config.context} tokens is full: the first "
                  f"{(len(asked) - len(kept)) // 2} questions and answers were dropped)", file=sys.stderr)
        print("llama> ", end="", flush=True)
        turns = [*kept, {"role": "assistant", "content": reply(run, ids, features).replace(IMAGE, "")}]


def score(cfg):
    """Print the loss and the quality of captions and answers on a whole split; returns them."""
    run, folder = load(cfg), train.folder_of(cfg)
    data, = run.read(folder, cfg.split)
    if data.pairs:
        raise config.Mistake("--eval scores captions and answers; the log has the margin and accuracy of preferences")
    found, pictures, n = {"loss": run.loss(run.vlm, data)}, run.pictures, len(run.pictures.names)
    if n > 1:  # what the pictures are worth: each example gets another one's
        run.pictures = lambda which: pictures([(i + n // 2) % n for i in which])
        found["loss with wrong pictures"] = run.loss(run.vlm, data)
        run.pictures = pictures
    else:
        print0(f"no loss with wrong pictures: the split has {n} in all")
    rows = data.questions()
    texts = run.answers(rows)
    for kind in sorted({r.kind for r in rows}):
        pairs = [(t, r) for t, r in zip(texts, rows) if r.kind == kind]
        found[f"{kind} exact"] = agree(*zip(*pairs))
        if kind == "caption":
            found |= caption_scores(pairs)
    if cfg.json:
        print0(json.dumps({"dataset": folder.name, "split": cfg.split, "prompts": len(rows)} | found))
        return found
    print0(f"{folder.name} {cfg.split}: {len(rows):,} prompts  " + "  ".join(f"{k} {v:.4f}" for k, v in found.items()))
    return found


def main(given, shape):
    """Use the model if the settings ask for that, else train it. Settings of a run that goes on or is scored hold."""
    if given.get("init_from") == "resume":
        out = train.run_directory(given.get("out_dir"), given.get("dataset", VlmConfig.dataset), "vlm_")
        given, shape = train.with_run(given | {"out_dir": str(out)}, shape, out, "vlm.py:VlmConfig")
    elif given.get("eval") or given.get("eval_only"):
        directory = run_to_use(given.get("out_dir"), given.get("init_from", "scratch"))
        named = given.get("vit_weights")
        given, shape = train.with_run(given, shape, directory, "vlm.py:VlmConfig")
        if "encoder" in STAGES.get(given.get("stage"), ()):
            given["vit_weights"] = named  # not where its encoder began: it has one of its own now
    cfg = config.make(VlmConfig, given)
    if cfg.caption:
        caption(cfg)
    elif cfg.ask:
        ask(cfg)
    elif cfg.chat:
        chat(cfg)
    elif cfg.eval or cfg.eval_only:
        score(cfg)
    else:
        fit(cfg, shape)


if __name__ == "__main__":
    config.run(main, *settings)
    common.cleanup()
