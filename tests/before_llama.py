"""What came before Llama 1, for `ladder.py`: each function puts back into a new `Llama` a part that Llamas replaced."""
import torch
import torch.nn as nn
import torch.nn.functional as F

from model import Linear, RMSNorm


def layer_norm(model):
    """LayerNorm (arXiv:1607.06450) in place of RMSNorm: it also takes the mean away, and has a bias."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, RMSNorm):
                setattr(module, name, nn.LayerNorm(len(child.weight), child.eps))


def learned_positions(model):
    """A learned vector for each position, added to the tokens (GPT-2), in place of RoPE."""
    decoder, cfg = model.model, model.config
    for block in decoder.layers:
        block.self_attn.nope = True
    scale = decoder.embed_tokens.weight.std().item()  # as loud as the tokens, or they are learned late
    decoder.positional_embedding = nn.Embedding(cfg.context, cfg.dim)
    nn.init.normal_(decoder.positional_embedding.weight, std=scale)
    blocks = decoder.blocks

    def blocks_at(x, positions, *more):
        """`Decoder.blocks` of x (B, T, D) with the vectors of positions (T,) or (B, T)."""
        return blocks(x + decoder.positional_embedding(positions), positions, *more)
    decoder.blocks = blocks_at


class GELU(nn.Module):
    """down(gelu(up(x))): the feed-forward of GPT-2, without its biases."""

    def __init__(self, swiglu):
        super().__init__()
        dim, width = swiglu.up_proj.in_features, swiglu.up_proj.out_features * 3 // 2  # two matrices in place of three
        self.up_proj, self.down_proj = Linear(dim, width), Linear(width, dim)
        nn.init.normal_(self.up_proj.weight, std=swiglu.up_proj.weight.std().item())
        nn.init.normal_(self.down_proj.weight, std=swiglu.down_proj.weight.std().item())

    def forward(self, x):
        return self.down_proj(F.gelu(self.up_proj(x)))


def gelu(model):
    """Feed-forwards with GELU (arXiv:1606.08415) in place of SwiGLU."""
    for block in model.model.layers:
        setattr(block, block.ffn_name, GELU(block.ffn))


class Recurrence(nn.Module):
    """h[t] = tanh(W x[t] + U h[t-1] + b): all that it knows of what came before is h[t-1], D numbers."""
    chunk = 0

    def __init__(self, cfg, layer):
        super().__init__()
        self.layer, self.rnn = layer, nn.RNN(cfg.dim, cfg.dim, batch_first=True)

    def forward(self, x, rope, positions, mask=None, cache=None):
        """x (B, T, D) -> (B, T, D). Arguments as for `model.Attention`; the cache has h in place of keys."""
        begins = cache is None or positions.dim() == 1
        with torch.autocast(x.device.type, enabled=False):  # CUDA's has RNNs in float16, where gradients vanish
            y, h = self.rnn(x.float(), None if begins else cache.keys[self.layer].float())  # h (1, B, D)
        if cache is not None:
            cache.keys[self.layer], cache.values[self.layer] = h, torch.empty(0)
        return y


def recurrence(model):
    """A recurrence in place of attention (Elman 1990): an RNN."""
    for block in model.model.layers:
        block.self_attn = Recurrence(model.config, block.self_attn.layer)


def no_blocks(model):
    """No blocks: a token is guessed from the one before alone (a bigram model, whose table has the rank D)."""
    model.model.layers = nn.ModuleList()
