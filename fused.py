"""RMSNorm and the loss in fewer passes over memory, each with a gradient of its own, for training on processors.

`use(model)` puts them into a plain model. Nothing else of it changes, and its figures only by rounding.
"""
from types import MethodType

import torch

from model import Head, RMSNorm, product_dtype


def use(model):
    """Let a model learn with what is in this file; where nothing learns, it stays what it was."""
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.forward = MethodType(norm, module)
        elif isinstance(module, Head):
            module.nats = MethodType(nats, module)


def norm(self, x):
    """`RMSNorm.forward`."""
    learns = x.requires_grad or (self.weight.requires_grad and torch.is_grad_enabled())
    return Normalize.apply(x, self.weight, self.eps, product_dtype(x)) if learns else RMSNorm.forward(self, x)


def nats(self, logits, targets, reduction):
    """`Head.nats`."""
    if reduction == "sum" and logits.requires_grad:
        return CrossEntropy.apply(logits, targets)
    return Head.nats(self, logits, targets, reduction)


class Normalize(torch.autograd.Function):
    """x / rms(x) * w, in about half the time of F.rms_norm and its gradient.

    With n = x / rms(x) and y = n w, the gradient of w is sum(dy n) over the rows, and that of x is what is left of
    dy w without its part along n, over rms(x)."""

    @staticmethod
    def forward(ctx, x, weight, eps, dtype):
        wide = torch.promote_types(x.dtype, torch.float32)
        x, weight = x.to(wide), weight.to(wide)
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / x.shape[-1]
        scale = (square + eps).rsqrt()  # 1 / rms(x), (..., 1)
        n = x * scale
        ctx.save_for_backward(n, scale, weight)
        return (n * weight).to(dtype)

    @staticmethod
    def backward(ctx, dy):
        n, scale, weight = ctx.saved_tensors
        dy = dy.to(n.dtype)
        along = (dy * n).flatten(0, -2)  # (rows, D)
        part = (along @ weight).view_as(scale) / n.shape[-1]
        return torch.addcmul(dy * weight, n, part, value=-1) * scale, along.sum(0), None, None


class CrossEntropy(torch.autograd.Function):
    """Nats of logits (M, V) with targets (M,), those that are -100 left out, summed: a float32 number.

    So few rows at a time that they stay in the caches, and their gradient, p - 1 at the target and p elsewhere, is
    made while they are there: two thirds of F.cross_entropy's time, half of its memory."""
    CACHED = 2**18  # numbers: 1 MB, half of a core's second cache

    @staticmethod
    def forward(ctx, logits, targets):
        grad, rows = torch.empty_like(logits), max(1, CrossEntropy.CACHED // logits.shape[1])
        nats = logits.new_zeros((), dtype=torch.float32)
        ignored, places = (targets == -100)[:, None], targets.clamp(min=0)[:, None]  # (M, 1) each
        for z, g, ignore, place in zip(*(t.split(rows) for t in (logits, grad, ignored, places))):
            logp = z.float().log_softmax(-1)  # (rows, V)
            nats -= logp.gather(1, place).masked_fill(ignore, 0).sum()
            p = logp.exp_().scatter_add_(1, place, -torch.ones_like(place, dtype=logp.dtype))
            g.copy_(p.masked_fill_(ignore, 0))
        ctx.save_for_backward(grad)
        return nats

    @staticmethod
    def backward(ctx, scale):
        return ctx.saved_tensors[0].mul_(scale), None  # a second backward pass is an error, which autograd raises
