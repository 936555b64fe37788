"""A Llama that sees: an image encoder, a projector, and image tokens where `<image>` stands in the text.

    python prepare/shapes.py && python vlm.py config/vlm_shapes.py     train from scratch, on a laptop
    python vlm.py config/vlm_align.py                                  teach a projector to speak to a Llama
    python vlm.py config/vlm_instruct.py                               then both of them to follow instructions
    python vlm.py --caption img.jpg folder                             what the newest run sees
    python vlm.py --ask "What is on the table?" img.jpg
    python vlm.py --chat img.jpg
    python vlm.py --trace --caption img.jpg                            each step from the pixels to the logits
    python vlm.py config/vlm_align.py --eval --split=test              loss, CIDEr-D, BLEU-4, exact match

Of train.py's keys, epochs, doc_mask, whole_docs, hellaswag and head_copy are refused. In use, --top_k keeps so many
likely tokens, as in sample.py.

How a picture's numbers reach a logit, in `Vlm.embed` and `Vlm.forward`:

    pixels (N, 3, S, S) -encoder-> features (N, P, W) -projector-> image tokens (N, P, D), as wide as the embeddings of
    words, in whose places they then stand: (B, T, D) -Llama-> logits (B, T, V)

In shapes: B rows, T positions, D the Llama's width, V its vocabulary, N squares (a picture is one, or with Llama 4
several), S their side in pixels, P image tokens of a square, W their width. The encoders are in vision.py, what is read
and learned of a data set is in prepare/examples.py, and the loop is train.py's with its keys, checkpoints and log.

Sources: LLaVA (arXiv:2304.08485, 2310.03744), DPO (2305.18290), RLAIF-V (2405.17220); transformers' Llama 4.
"""
import contextlib
import json
import sys
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import config

KEYS = "vlm.py:VlmConfig"

if __name__ == "__main__":  # read the arguments before torch is imported: a typo answers at once
    settings = config.run(config.load, KEYS, None, config.SHAPE)

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from tqdm import tqdm

import adapter
import checkpoint
import common
import decode
import lora
import model
import runs
import sample
import train
import vision
from common import RANK, WORLD, print0
from feedback import preference
from prepare import images, picture_files, tokenizer
from prepare.examples import (
    FRAME, PATCH, Examples, caption_prompt, new_tokenizer, with_frame, with_image)
from prepare.features import Pictures, pairs_digest, read_references
from prepare.images import IMAGE, with_pictures
from prepare.windows import order
from scores import agree, measured, track
from vision import sees

STAGES = {  # what learns in each; the loss is that of the assistant's words, in "prefer" DPO's
    "align": ("projector",),  # to put what the encoder sees into the words of a Llama that stays as it is
    "see": ("encoder", "projector"),  # to see what those words are about
    "instruct": ("projector", "llama"),  # to answer what is asked about it
    "prefer": ("projector", "llama"),  # to give the better of two answers
    "together": ("encoder", "projector", "llama")}  # everything, as where nothing was learned before


# -- the model ---------------------------------------------------------------------------------------------------

class Vlm(nn.Module):
    """encoder -> projector -> Llama.

    In a text one token, `mark`, stands for a picture. The model reads `picture_ids` in its place: P times image_id,
    whose embeddings are those of the picture's tokens, and with Llama 4 the tokens of `frame` around them."""

    def __init__(self, llama, encoder, image_id, frame=(), pixel_shuffle=False):
        """frame: ids of FRAME, () where pictures have none; pixel_shuffle: join 2 x 2 tokens of the encoder."""
        super().__init__()
        self.llama, self.encoder, self.image_id, self.frame = llama, encoder, image_id, frame
        self.pixel_shuffle, self.llama4 = pixel_shuffle, encoder.llama4
        if self.llama4 and llama.config.arch != "llama4":
            raise config.Mistake("Llama 4's tower goes with a Llama 4: --arch=llama4, or --model=llama4-tiny")
        if pixel_shuffle and (encoder.grid % 2 or self.llama4):
            raise config.Mistake(f"pixel_shuffle joins 2 x 2 tokens, which the {encoder.grid} x {encoder.grid} of "
                                 f"{encoder.name} do not allow" + "; it joins its own" * self.llama4)
        joined, dim = 4 if pixel_shuffle else 1, llama.config.dim
        width, self.image_tokens = encoder.width * joined, encoder.grid ** 2 // joined
        if self.llama4:
            self.projector = nn.Sequential(OrderedDict(linear_1=nn.Linear(width, dim, bias=False)))
        else:
            self.projector = nn.Sequential(nn.Linear(width, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        last = self.projector[-1]
        scale = llama.model.embed_tokens.weight.detach().std()  # image tokens start as large as words
        with torch.no_grad():
            last.weight.normal_().mul_(scale / last.in_features ** 0.5)
        self.beta, self.frozen = 0.1, ()  # of DPO; the parts that do not learn now
        self.encoder_learned, self.encoder_digest = False, None  # whether it ever did; if not, what its weights were
        self.learned = set()  # kinds of examples: caption, answer, chosen, rejected; None: nobody knows

    # -- from pixels to logits -----------------------------------------------------------------------------------

    def project(self, pictures):
        """Image tokens (N, P, D) of squares (N, 3, S, S), or of what the encoder made of them, (N, P, W)."""
        seen = self.encoder(pictures) if pictures.dim() == 4 else pictures
        return self.projector(vision.shuffle(seen) if self.pixel_shuffle else seen)

    def embed(self, idx, pictures):
        """idx (B, T) with P times image_id for each square, pictures as for `project` -> (B, T, D)."""
        x = self.llama.model.embed_tokens(idx)
        if pictures is None:
            return x
        return x.masked_scatter((idx == self.image_id)[..., None], self.project(pictures).to(x.dtype))

    def forward(self, idx, targets=None, pictures=None, positions=None, reference=None):
        """Logits (B, T, V) and loss, as Llama.forward.

        pictures: as for `project`, in the order of their tokens in idx; N may be 0; None: idx is text alone.
        With reference (2, B/2), log-probabilities of the reference model, rows are B/2 chosen and then B/2 rejected
        answers; the result is DPO's margins (B/2,) and loss.
        """
        embeds = self.embed(idx, pictures)
        if reference is None:
            return self.llama(embeds=embeds, targets=targets, positions=positions)
        return preference(-self.row_nats(embeds, targets).view(2, -1), reference, self.beta)

    def row_nats(self, embeds, targets):
        """The summed nats of each row's targets, (B,), for embeddings (B, T, D) and targets (B, T)."""
        place = (targets.flatten() != -100).nonzero().squeeze(1)  # (M,)
        x = self.llama.model(embeds=embeds)[0].flatten(0, 1)[place]  # (M, D)
        nats = self.llama.lm_head(x, targets.flatten()[place])  # (M,)
        return torch.zeros(len(embeds), device=x.device).index_add(0, place // embeds.shape[1], nats)

    # -- pictures in a text --------------------------------------------------------------------------------------

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
        return [start, *row * (rows if rows * columns > 1 else 0), whole, *patches, end]

    def spread(self, ids, canvases=None):
        """ids (n,) with what the model reads in the place of each mark, int64. canvases: the pictures' (rows, columns),
        in a list or an iterator; None: each is one square."""
        spread, canvases = [], canvases and iter(canvases)
        for i in ids:
            spread += [i] if i != self.mark else self.picture_ids(*next(canvases) if canvases else ())
        return np.array(spread, np.int64)

    @torch.no_grad()
    def generate(self, prompts, pictures, max_new_tokens, stop_ids, canvases=None, num_beams=1, **how):
        """For each prompt, ids with a mark for each picture, its new ids, with the end token if it came.

        pictures: the squares of all, in order; canvases: their (rows, columns), see `spread`; num_beams: search with so
        many; how: temperature, top_k, top_p, min_p and seed; without them, greedy."""
        device, was, canvases = self.llama.lm_head.weight.device, self.training, canvases and iter(canvases)
        self.eval()
        ids = [torch.from_numpy(self.spread(prompt, canvases)) for prompt in prompts]
        embeds = self.embed(torch.cat(ids)[None].to(device), pictures.to(device))[0].split([*map(len, ids)])  # (T, D)
        if num_beams > 1:
            new = [decode.beam_search(self.llama, x, max_new_tokens, num_beams, stop_ids) for x in embeds]
        else:
            how = {"temperature": 0, "stop_ids": stop_ids} | how
            new = decode.decode_all(self.llama, embeds, max_new_tokens, len(embeds), **how)
        self.train(was)
        return new

    # -- what learns ---------------------------------------------------------------------------------------------

    def freeze(self, learning):
        """Let the parts named in `learning` learn, and no other; of an adapted Llama only its adapter."""
        self.frozen = [part for part in STAGES["together"] if part not in learning]
        for part in STAGES["together"]:
            getattr(self, part).requires_grad_(part in learning)
        if hasattr(self.llama, "adapter"):
            for name, p in self.llama.named_parameters():
                p.requires_grad_("llama" in learning and ".lora_" in name)
        self.encoder_learned |= "encoder" in learning
        return self.train()

    def train(self, mode=True):
        super().train(mode)
        if "encoder" in self.frozen:
            self.encoder.eval()  # its batch norms keep their statistics
        return self

    # -- files: see vision.py -----------------------------------------------------------------------------------

    save_pretrained = vision.save

    def kinds(self):
        """Those of the examples that it learned, as a list; None where nobody knows, as of a published model."""
        return None if self.learned is None else sorted(self.learned)

    @classmethod
    def from_pretrained(cls, directory, vit_weights=None, frame=(), **overrides):
        """Read what `save_pretrained` wrote, or transformers' Llama4ForConditionalGeneration. frame: as for `Vlm`;
        overrides: fields of the Llama's config. Raises ValueError or FileNotFoundError, naming what is wrong."""
        llama = adapter.load(directory, torch.float32, **overrides)
        facts, encoder, states = vision.read(Path(directory), vit_weights)
        vlm = cls(llama, encoder, facts["image_id"], frame, facts["pixel_shuffle"])
        for part, state in states.items():
            try:
                getattr(vlm, part).load_state_dict(state)
            except RuntimeError as e:
                raise ValueError(f"{directory}: not the weights of its {part}: {' '.join(str(e).split())}") from None
        vlm.encoder_learned, vlm.encoder_digest = facts["encoder_learned"], facts.get("encoder_digest")
        vlm.learned = None if facts.get("learned") is None else set(facts["learned"])
        return vlm.freeze(()).eval()


def open_run(directory, vit_weights=None, **overrides):
    """(Vlm, tokenizer) of a directory."""
    tok = tokenizer.load(directory)
    tok, patch, frame = with_frame(tok) if vision.is_llama4(Path(directory)) else (*with_image(tok), ())
    vlm = Vlm.from_pretrained(directory, vit_weights, frame, **overrides)
    if patch != vlm.image_id:
        raise ValueError(f"{directory}: {PATCH if frame else IMAGE} has the id {patch}, the model's is {vlm.image_id}")
    return vlm, tok


# -- training ----------------------------------------------------------------------------------------------------

class Stage:
    """A stage of training: what train.fit trains. Its model is a Vlm, of which some parts learn.

    Each picture of a data set is one square, also for Llama 4's tower, which would cut a large one into up to 16: so
    all take the same number of tokens, and what a frozen encoder saw is kept as one array. Pictures in use are cut."""

    def __init__(self, cfg, shape, out, device):
        self.cfg, self.out, self.device, self.floor = cfg, out, device, None
        self.folder = runs.folder_of(cfg)
        records = [images.load(self.folder, split) for split in ("train", "val")]
        need_records(cfg, records)  # before any download
        resumed = runs.common_latest(out) if cfg.init_from == "resume" else None
        self.model, self.tok = build(cfg, shape, records[0], None if cfg.init_from == "scratch" else
                                     resumed or cfg.init_from)
        self.model.freeze(STAGES[cfg.stage])
        self.llama = self.model.llama
        self.llama.model.checkpointing = cfg.checkpointing
        self.dtype, self.why_dtype = common.agreed_dtype(cfg.dtype, device)
        self.run = Runner(cfg, self.model, self.tok, device, self.dtype)
        self.data, self.val = self.run.read(*records)
        if self.model.learned is not None:
            self.model.learned |= {row.kind for rows in self.data.examples for row in rows}
        self.tokens = float(np.mean([self.data.length(rows) for rows in self.data.examples]))  # of an example
        fixed = "llama" in self.model.frozen or hasattr(self.llama, "adapter")  # weights that have no gradients
        self.flops_per_token = self.llama.flops_per_token(int(self.tokens)) * (2 / 3 if fixed else 1)
        self.train_fingerprint, digest = runs.digests_of(self.folder)
        self.val_fingerprint = [digest, cfg.eval_tokens, cfg.block_size]
        self.pairs, self.references = None, []  # log-probabilities (2, n) of the training and of the validation pairs
        if cfg.stage == "prefer":
            self.pairs = pairs_digest(self.run.pictures, self.data, self.val)
            self.references = (read_references(resumed / "reference.pt", self.pairs) if resumed else
                               [self.run.log_probs(data, np.arange(len(data))) for data in (self.data, self.val)])
        self.shown = self.val.questions(cfg.sample_images)

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
            if self.pairs:
                micro_batches.append((len(which), (*args, self.references[0][:, which])))
            else:
                micro_batches.append((int((args[1] != -100).sum()), args))
        return micro_batches

    def evaluate(self, model):
        """Validation loss, of pairs DPO's with its margin and accuracy, and the share of exact answers to sample_images
        of its questions, of which those about pictures are drawn in samples.png."""
        if self.data.pairs:
            which = self.val.some(self.cfg.eval_tokens)
            log_probs = self.run.log_probs(self.val, which)
            margin, loss = preference(log_probs, self.references[1][:, which], self.model.beta)
            scores = {"val_loss": loss.item(), "margin": margin.mean().item(),
                      "accuracy": (margin > 0).float().mean().item()}
        else:
            scores = {"val_loss": self.run.loss(model, self.val, self.cfg.eval_tokens)}
        if RANK == 0:
            texts = self.run.answers(self.shown)
            scores["exact"] = agree(texts, self.shown)
            seen = [(r.shown(self.model.mark)[0], self.tok.decode(r.prompt()).replace(IMAGE, "").strip(), text)
                    for r, text in zip(self.shown, texts) if r.shown(self.model.mark)]
            if seen:
                picture_files.draw(self.out / "samples.png", [self.run.pictures.look(p) for p, *_ in seen],
                                   ["\n".join(words).strip() for _, *words in seen])
            print0("val " + "  ".join(f"{k.removeprefix('val_')} {v:.4f}" for k, v in scores.items()))
            print0("\n".join(f"  | {t}" for t in texts[:4]))
        return scores

    def save(self, directory):
        """Write the model and its tokenizer, and what the reference model thinks of each pair."""
        self.model.save_pretrained(directory, self.tok)
        if self.pairs:
            with config.atomic_write(directory / "reference.pt") as path:
                torch.save({"pairs": self.pairs, "references": self.references}, path)


def need_records(cfg, splits):
    """Refuse a stage that does not fit the records of these splits, or has nothing to go on from."""
    if {"chosen" in record for records in splits for record in records} != {cfg.stage == "prefer"}:
        raise config.Mistake(f"stage {cfg.stage!r} takes " + (
            "pairs of chosen and rejected answers and nothing else" if cfg.stage == "prefer" else
            "captions and conversations, not pairs of answers"))
    if cfg.stage == "prefer" and cfg.init_from == "scratch":
        raise config.Mistake("stage 'prefer' goes on from a model that answers: name its run with --init_from")


def build(cfg, shape, records, source):
    """(Vlm, tokenizer) of the checkpoint `source`, to which a plain Llama adds a projector; None: a new one, with a
    tokenizer trained on the texts of these records."""
    kept = {k: v for k, v in shape.items() if k in train.TRAINING_ONLY}
    torch.manual_seed(cfg.seed)
    with config.mistakes(ValueError, FileNotFoundError):
        name, source = source, source and checkpoint.find_checkpoint(source)
        if source and sees(source):
            begun = cfg.init_from == "resume" and "encoder" in STAGES[cfg.stage]  # no longer that of the file
            vlm, tok = open_run(source, None if begun else cfg.vit_weights, **kept)
            for key, have in (("encoder", vlm.encoder.name), ("pixel_shuffle", vlm.pixel_shuffle)):
                if getattr(cfg, key) not in (None, have):
                    raise config.Mistake(f"{source} was trained with {key}={have}; leave the key out")
        else:
            if source and adapter.is_adapter(source) and sees(base := adapter.base_of(source)):
                raise config.Mistake(f"{source} does not see, as its base model {base} does: go on from that one, or "
                                     "merge the adapter to begin with new eyes")
            pretrained = "encoder" not in STAGES[cfg.stage]
            encoder = vision.make_encoder(cfg.encoder or "vit_b_16", cfg.vit_weights, pretrained)
            add, count = (with_frame, len(FRAME) + 1) if encoder.llama4 else (with_image, 1)
            if source:
                tok, *ids = add(adapter.load_tokenizer(source))
                llama = adapter.load(source, torch.float32, **kept)
                if "llama" not in STAGES[cfg.stage] or encoder.llama4:  # else its adapter, if it has one, goes on
                    lora.merge(llama)
                llama = adapter.grow(llama.requires_grad_(True), tok.vocab_size)
            else:
                tok, *ids = add(new_tokenizer(records, shape.get("vocab_size", 512), count))
                llama = model.Llama(train.new_shape(cfg, shape, tok, tok.vocab_size), cfg.seed)
            vlm = Vlm(llama, encoder, *ids, pixel_shuffle=bool(cfg.pixel_shuffle))
        if cfg.lora_rank:
            if vlm.llama4:
                raise config.Mistake("lora_rank: Llama 4's checkpoint with vision has no place for an adapter")
            adapter.begin(vlm.llama, cfg.lora_rank, cfg.lora_alpha, name, cfg.seed)
    vlm.beta = cfg.beta
    train.need_shape(vlm.llama.config, shape if source else {})
    train.need_room(vlm.llama.config, cfg, tok.vocab_size)
    return vlm, tok


# -- a model at work ---------------------------------------------------------------------------------------------

def batched(items, size):
    """items, so many at a time."""
    return [items[i:i + size] for i in range(0, len(items), size)]


class Runner:
    """A Vlm on its device, with its tokenizer and settings, and the pictures of a data set."""

    def __init__(self, cfg, vlm, tok, device, dtype):
        self.cfg, self.vlm, self.tok, self.device, self.dtype = cfg, vlm.to(device), tok, device, dtype
        self.autocast = common.autocast_to(dtype, device)

    def read(self, *splits):
        """The examples of these splits, as `images.load` gives them; from now on the runner sees their pictures."""
        number, vlm = {}, self.vlm
        size = min(self.cfg.block_size, vlm.llama.config.context)
        vlm.encoder.tiles = 1  # see `Stage`
        found = [Examples(records, self.tok, len(vlm.picture_ids()), size, number) for records in splits]
        if lost := sum(data.lost for data in found):
            print0(f"{lost:,} examples do not fit block_size={size} and were left out")
        if shortened := sum(data.shortened for data in found):
            print0(f"{shortened:,} conversations were cut after the last answer that ends within block_size={size}")
        limit = self.cfg.feature_gb if "encoder" in vlm.frozen else None
        self.pictures = Pictures(splits[0].path.parent, list(number), vlm.encoder, self.dtype, limit)
        return found

    def batch(self, data, which, shift=0):
        """Inputs, targets, pictures and positions, as `Vlm.forward` takes them, of the examples numbered `which`.
        shift: in place of each picture, the one so many numbers later."""
        lines = data.lines(which)
        x, y, positions = data.collate(lines)
        pictures = [(p + shift) % len(self.pictures.names) for rows in lines for p in rows[0].pictures]
        x[x == self.vlm.mark] = np.tile(self.vlm.picture_ids(), len(pictures))
        return x, y, self.pictures(pictures), positions

    def loss(self, model, data, limit=0, shift=0):
        """Mean loss over the learned tokens of `Examples.some`; every process takes a share."""
        mine = data.some(limit)[RANK::WORLD]
        batches = (self.batch(data, which, shift) for which in batched(mine, self.cfg.batch_size))
        return train.evaluate(model, ((int((b[1] != -100).sum()), b) for b in batches), self.device, self.autocast)

    @torch.no_grad()
    def log_probs(self, data, which):
        """Log-probabilities (2, n) of the chosen and rejected answers numbered `which`; every process takes a share."""
        found, was, mine = torch.zeros(2, len(which)), self.vlm.training, np.arange(len(which))[RANK::WORLD]
        self.vlm.eval()
        for places in track(batched(mine, self.cfg.batch_size), "pairs", delay=2):
            x, y, seen, _ = common.to_device(self.device, *self.batch(data, which[places]))
            with self.autocast:
                nats = self.vlm.row_nats(self.vlm.embed(x, seen), y)
            found[:, places] = -nats.view(2, -1).float().cpu()
        self.vlm.train(was)
        if WORLD > 1:
            dist.all_reduce(found)
        return found

    def prepare_to_write(self):
        """Have a Llama without adapter write text faster: it learns no more, and packed weights have no loss."""
        if self.dtype != torch.float32:  # in which autocast would cast its weights anew for each token or text
            lora.float32_stream(self.vlm.llama.to(self.dtype))
        decode.to_decode(self.vlm.llama)

    def answers(self, rows):
        """The model's text for each row's prompt."""
        texts = []
        for batch in track(batched(rows, self.cfg.batch_size), "answering", delay=2):
            seen = self.pictures([p for r in batch for p in r.shown(self.vlm.mark)])
            texts += self.texts([r.prompt() for r in batch], seen, number=len(texts))
        return texts

    def texts(self, prompts, seen, canvases=None, number=0):
        """The model's text after each prompt, as the settings ask for it; see `Vlm.generate`. number: of the first."""
        cfg, how = self.cfg, {"num_beams": self.cfg.num_beams, "seed": self.cfg.seed + number}
        how |= {key: getattr(cfg, key) for key in ("temperature", "top_k", "top_p", "min_p")}
        with self.autocast:
            new = self.vlm.generate(prompts, seen, cfg.sample_tokens, self.tok.stop_ids, canvases, **how)
        stops, context = self.tok.stop_ids, self.vlm.llama.config.context
        if cut := sum(len(ids) < cfg.sample_tokens and ids[-1] not in stops for ids in new):
            print(f"(the model's context of {context} tokens is full: {cut} texts were cut)", file=sys.stderr)
        return [self.tok.decode([i for i in ids if i not in stops]).strip() for ids in new]


# -- use ---------------------------------------------------------------------------------------------------------

def run_to_use(out_dir, init_from):
    """The directory or hub name of the run: of out_dir, else of init_from, else of the newest one. An --init_from that
    is said counts before out_dir, since most config files name both."""
    said = any(word.startswith(("--init_from", "--init-from")) for word in sys.argv)
    named = [out_dir] * bool(out_dir) + [init_from] * (init_from not in ("scratch", "resume"))
    if named:
        return named[-1 if said else 0]
    files = [path for name in ("config.json", "vlm.json") for path in (config.ROOT / "out").glob(f"*/{name}")]
    files = [path for path in files if sees(path.parent)]
    if not files:
        raise config.Mistake("no model that sees under out/: train one with `python prepare/shapes.py && "
                             "python vlm.py config/vlm_shapes.py`, or name one with --init_from")
    return max(files, key=lambda path: path.stat().st_mtime).parent


def frozen_weights(directory):
    """The file of weights with which the run in a directory froze its encoder, or None."""
    settings, _ = config.of_run(directory, KEYS)
    return None if "encoder" in STAGES.get(settings.get("stage"), ()) else settings.get("vit_weights")


def load(cfg, kind="", what="", pack=True):
    """Runner of the model that cfg names. Prints a note where it is known to have learned no examples of this kind,
    called `what`. pack: its weights, which then write text faster but have no loss."""
    device = common.pick_device(cfg.device)
    dtype = decode.dtype_to_decode(cfg.dtype, device)
    with config.mistakes(ValueError, FileNotFoundError):
        directory = checkpoint.find_checkpoint(run_to_use(cfg.out_dir, cfg.init_from))
        run = Runner(cfg, *open_run(directory, cfg.vit_weights or frozen_weights(directory)), device, dtype)
    learned = run.vlm.learned
    if kind and learned and kind not in learned:
        print(f"note: this run learned no {what} ({', '.join(sorted(learned))} only): expect no sense", file=sys.stderr)
    lora.merge(run.vlm.llama)
    if pack:
        run.prepare_to_write()
    return run


def look(run, path):
    """(features (n, P, W), (rows, columns)) of a picture. Raises `Mistake` for one that cannot be read or that leaves
    no room for words."""
    squares, canvas = run.vlm.encoder.cut(picture_files.read(path))
    count, context = len(run.vlm.spread(caption_prompt(run.tok), [canvas])), run.vlm.llama.config.context
    if count >= context:
        raise config.Mistake(f"{path}: its {count} tokens leave no room in the model's context={context}")
    with torch.no_grad(), run.autocast:
        return run.vlm.encoder(squares.to(run.device)), canvas


def caption(cfg):
    """One line for each picture, those of folders included; exit code 2 if any could not be read."""
    paths, size, failed = picture_files.expand(cfg.caption), cfg.batch_size, 0
    run = load(cfg, "caption", "captions")
    bar = tqdm(total=len(paths), desc="captions", unit=" pictures", leave=False, disable=len(paths) <= size)
    for number, some in enumerate(batched(paths, size)):
        seen = []
        for path in some:
            try:
                seen.append((path, *look(run, path)))
            except config.Mistake as e:
                print(f"error: {e}", file=sys.stderr)
                failed += 1
        if seen:
            good, features, canvases = zip(*seen)
            texts = run.texts([caption_prompt(run.tok)] * len(good), torch.cat(features), canvases, number * size)
            for path, text in zip(good, texts):
                found = json.dumps({"image": str(path), "caption": text})
                bar.write(found if cfg.json else f"{path}: {text}")
        sys.stdout.flush()
        bar.update(len(some))
    bar.close()
    if failed:
        sys.exit(2)


class PictureTokenizer:
    """A tokenizer for conversations about some pictures, whose image tokens have ids of their own, which the Llama then
    knows. So sample.py can hold such a conversation, and keep it in its cache, as if it were all words."""

    def __init__(self, run, paths):
        self.vlm, self.tok, llama = run.vlm, run.tok, run.vlm.llama
        features, self.canvases = zip(*(look(run, path) for path in paths))
        with torch.no_grad():
            seen = run.vlm.project(torch.cat(features)).flatten(0, 1)  # (N, P, D) -> (N·P, D)
        words, V = llama.model.embed_tokens, llama.config.vocab_size
        llama.model.embed_tokens = vision.PictureEmbedding(words, V, seen)

    def __getattr__(self, name):
        return getattr(self.tok, name)

    def chat(self, turns):
        """ids of a conversation. The pictures stand in its first question: at its beginning, if it does not place them.
        Raises `Mistake` where there are other pictures."""
        count, first = len(self.canvases), next(i for i, turn in enumerate(turns) if turn["role"] == "user")
        turns = [turn | {"content": turn["content"].replace(IMAGE, "")} if turn["role"] == "assistant" else turn
                 for turn in turns]
        turns[first] = turns[first] | {"content": with_pictures(turns[first]["content"], count)}
        if (places := sum(turn["content"].count(IMAGE) for turn in turns)) != count:
            raise config.Mistake(f"the text places {places} pictures with {IMAGE}, but there are {count}")
        ids = self.vlm.spread(self.tok.chat(turns), self.canvases)
        here = ids == self.vlm.image_id
        ids[here] = self.vlm.llama.config.vocab_size + np.arange(here.sum())
        return ids.tolist()


def aside(json):
    """A block that prints to stderr where stdout is for JSON alone."""
    return contextlib.redirect_stdout(sys.stderr if json else sys.stdout)


def ask(cfg):
    """Answer one question about pictures."""
    question, *paths = cfg.ask
    run = load(cfg, "answer", "questions")
    with run.autocast, aside(cfg.json):  # the words as they come
        tok = PictureTokenizer(run, paths)
        turns = [{"role": "system", "content": cfg.system}] if cfg.system is not None else []
        ids = sample.fitting(tok.chat([*turns, {"role": "user", "content": question.strip()}]), run.vlm.llama)
        new = sample.write(run.vlm.llama, tok, ids, cfg, cfg.seed)
    if cfg.json:
        answer = tok.decode([i for i in new if i not in tok.stop_ids]).strip()
        print(json.dumps({"images": paths, "question": question, "answer": answer}))


def chat(cfg):
    """A conversation about pictures, as sample.py holds it."""
    run = load(cfg, "answer", "questions")
    with run.autocast:
        sample.chat(run.vlm.llama, PictureTokenizer(run, cfg.chat), cfg, f"{len(cfg.chat)} pictures")


def trace(cfg):
    """List the steps from the pixels of a picture to the logits of its caption's first word."""
    run, path = load(cfg), picture_files.expand(cfg.caption)[0]
    squares, canvas = run.vlm.encoder.cut(picture_files.read(path))
    ids = run.vlm.spread(caption_prompt(run.tok), [canvas]).tolist()
    print(f"{path}: {len(squares)} squares {run.vlm.encoder.size} pixels wide, {len(ids)} tokens")
    with run.autocast:
        sample.print_steps(sample.steps_of(run.vlm, ids, None, squares.to(run.device)))


@common.in_company()
def score(cfg):
    """Print the loss and the quality of captions and answers on a whole split; returns them."""
    folder = runs.folder_of(cfg)
    records = images.load(folder, cfg.split)
    if any("chosen" in record for record in records):  # before anything is encoded
        raise config.Mistake("--eval scores captions and answers; the log has the margin and accuracy of preferences")
    with aside(cfg.json):
        run = load(cfg, pack=False)
        common.init_distributed(run.device)
        data, = run.read(records)
        rows = data.questions()
        found, n = {"loss": run.loss(run.vlm, data)}, len(run.pictures.names)
        if n > 1:  # what the pictures are worth: each example gets another one's
            found["loss with wrong pictures"] = run.loss(run.vlm, data, shift=n // 2)
        else:
            print0(f"no loss with wrong pictures: the split has {n} in all")
        run.prepare_to_write()
        found |= measured(run.answers(rows), rows)
    source = str(run_to_use(cfg.out_dir, cfg.init_from))
    if cfg.json:
        print0(json.dumps({"run": source, "dataset": folder.name, "split": cfg.split, "prompts": len(rows)} | found))
        return found
    print0(f"{source} on {folder.name} {cfg.split}: {len(rows):,} prompts  "
           + "  ".join(f"{k} {v:.4f}" for k, v in found.items()))
    return found


# -- settings and the command line -------------------------------------------------------------------------------

@dataclass
class VlmConfig(train.TrainConfig):
    """How to train and use a Llama that sees; the keys of model.py's LlamaConfig shape a new one."""
    stage: str = "align"  # {align, see, instruct, prefer, together} projector; with encoder; with Llama; by DPO; all
    encoder: str | None = None  # "vit_b_16" or another of vision.py; None: the checkpoint's, else vit_b_16
    vit_weights: str | None = None  # file of torchvision's ViT weights; None: their download, where it learns none
    pixel_shuffle: bool | None = None  # join 2 x 2 image tokens: 196 -> 49; None: as the checkpoint, else no
    feature_gb: float = 16.0  # [0, 1e6] of disk for what a frozen encoder saw, so that it looks once; COCO needs 35
    beta: float = 0.1  # (0, 1000] DPO's strength of the tie to the reference model; its authors'
    out_dir: str | None = None  # where the run is kept; None: out/vlm_<dataset>
    dataset: str = "shapes"  # folder under data/ (or a path) made by prepare/shapes, coco, flickr8k or llava
    sample_tokens: int = 128  # [1, inf) longest caption or answer, in tokens
    sample_images: int = 16  # [1, inf) validation pictures described at each evaluation and drawn in samples.png
    # -- use
    caption: tuple[str, ...] = ()  # describe these pictures, and all in these folders
    ask: tuple[str, ...] = ()  # a question, then the pictures that it is about
    chat: tuple[str, ...] = ()  # talk about these pictures
    system: str | None = None  # system message of --ask and --chat; None: the template's own
    trace: bool = False  # list the steps from the first picture of --caption to a logit
    json: bool = False  # print captions, an answer or scores as JSON, one object a line
    eval: bool = False  # score the run of out_dir, or of init_from, or the newest, on a whole split
    split: str = "val"  # {train, val, test} the split to score
    # -- how words are chosen
    num_beams: int = 1  # [1, 64] beams of a search for the likeliest caption; 1: word by word
    temperature: float = 0.0  # [0, 1e4] 0 takes what is likeliest, which is what scores best; 1 is as the model thinks
    top_p: float = 1.0  # [0, 1] keep the fewest tokens that hold this probability
    min_p: float = 0.0  # [0, 1] keep tokens at least this likely relative to the best; 0: no limit
    unused, text_only = ("shard",), train.TEXT_ONLY
    top_k = 0  # as in sample.py; in training --top_k is a key of the model, so `main` moves it here

    def __post_init__(self):
        super().__post_init__()
        names = (*vision.VITS, "efficientnet_lite0")
        refused = {
            f"encoder must be one of {', '.join(names)}, not {self.encoder!r}": self.encoder not in (*names, None),
            "give one of --caption, --ask, --chat and --eval":
                sum(map(bool, (self.caption, self.ask, self.chat, self.eval or self.eval_only))) > 1,
            "ask takes a question and at least one picture: --ask \"What is this?\" img.jpg": len(self.ask) == 1,
            "the question is empty": self.ask and not self.ask[0].strip(),
            "trace follows a picture: --trace --caption img.jpg": self.trace and not self.caption,
            "num_beams is for captions and --eval, and goes without --temperature":
                self.num_beams > 1 and (self.temperature or self.ask or self.chat),
            f"lora_rank changes the Llama, which stage {self.stage} leaves as it is":
                self.lora_rank and "llama" not in STAGES.get(self.stage, ()),
            "--shard=True splits a Llama, not one that sees": self.shard and WORLD > 1}
        for reason, holds in refused.items():
            if holds:
                raise ValueError(reason)

    @property
    def max_new_tokens(self):
        """sample.py's name of it."""
        return self.sample_tokens


def settled(given, shape):
    """(settings, shape), among them those of a run that goes on or is scored."""
    scored, named = given.get("eval") or given.get("eval_only"), given.get("vit_weights")
    if given.get("init_from") == "resume":
        given, shape = train.with_run(given, shape, KEYS, "vlm_")
    elif scored:
        config.make(VlmConfig, given | {"lora_rank": 0})  # its own mistakes before a run is looked for
        directory = run_to_use(given.get("out_dir"), given.get("init_from", "scratch"))
        given, shape = train.with_run(given, shape, KEYS, directory=directory)
    if scored:
        given = given | {"lora_rank": 0, "vit_weights": named}  # its adapter is there, and `load` knows its encoder
    return given, shape


def main(given, shape):
    """Use the model if the settings ask for that, else train it."""
    with aside(given.get("json")):
        given, shape = settled(given, shape)
    cfg = config.make(VlmConfig, given)
    uses = {trace: cfg.trace, caption: cfg.caption, ask: cfg.ask, chat: cfg.chat, score: cfg.eval or cfg.eval_only}
    for use, wanted in uses.items():
        if wanted:
            cfg.top_k = shape.get("top_k", 0)
            return use(cfg)
    fit(cfg, shape)


def fit(cfg, shape):
    """Train one stage as `cfg` says."""
    train.start(Stage, cfg, shape, "vlm_")


if __name__ == "__main__":
    config.run(main, *settings)
    common.cleanup()
