"""LoRA: teach a Llama something new by learning a small change of each matrix, and nothing else.

A matrix W (out, in) stays as it is, and beside it x takes a second path, through r numbers only:

    y = W x + s B (A x)        A (r, in) and B (out, r) learn;  s = lora_alpha / r

B starts at zero, so training starts from exactly the model that was there. A change of rank 16 is enough for most of
what fine-tuning teaches: of a 1B Llama it has 11M numbers, only they need gradients and an optimizer's moments, and a
checkpoint holds nothing else. W + s B A is a matrix of W's shape, so in the end `merge` can make one of the two.

    python prepare/text.py --input my_folder --out data/mine --tokenizer=out/smollm2
    python train.py --init_from=out/smollm2 --dataset=mine --lora_rank=16
    python sample.py --init_from=out/mine                       opens the adapter together with its base model

model.py knows nothing of this: modules are put around those of a plain Llama. How adapters lie in files, and what peft
means by its settings, is in adapter.py. In shapes: r rank, E experts, N tokens. Source: arXiv:2106.09685.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from model import Experts, Head, Linear, draw_normal, grouped_mm, product_dtype, put


# -- the second path -------------------------------------------------------------------------------------------------

class LoraLinear(nn.Module):
    """W x + s B (A x) around a Linear, whose W (out, in) is frozen. A and B are float32, whatever W is."""

    def __init__(self, base_layer, rank, scale):
        super().__init__()
        (out, inputs), device = base_layer.weight.shape, base_layer.weight.device
        self.base_layer, self.scale = base_layer, scale
        self.lora_A = nn.Parameter(torch.zeros(rank, inputs, device=device))
        self.lora_B = nn.Parameter(torch.zeros(out, rank, device=device))

    def forward(self, x):
        """x (..., in) -> (..., out)."""
        rows = x.flatten(0, -2)  # (N, in)
        y = self.base_layer(rows)  # (N, out)
        rows, A, B = (t.to(y.dtype) for t in (rows, self.lora_A, self.lora_B))
        y = y.addmm_(self.scale * F.linear(rows, A), B.T)  # adds B (s A x) in the one pass that makes it
        return y.unflatten(0, x.shape[:-1])


class LoraStack(nn.Module):
    """A second path beside the matrices W (E, in, out) of E experts, with an A (r, out) and a B (in, r) for each.

    They multiply from the right, x W + s (x B) A. As in peft it is B that starts at zero, here on the side of x."""

    def __init__(self, weight, rank, scale):
        super().__init__()
        E, inputs, out = weight.shape
        self.scale = scale
        self.lora_A = nn.Parameter(torch.zeros(E, rank, out, device=weight.device))
        self.lora_B = nn.Parameter(torch.zeros(E, inputs, rank, device=weight.device))

    def forward(self, x, weight, ends):
        """x (N, in) sorted by expert, ends (E,) the end of each expert's rows -> (N, out)."""
        x, weight, A, B = (t.to(product_dtype(x)) for t in (x, weight, self.lora_A, self.lora_B))
        return grouped_mm(x, weight, ends) + self.scale * grouped_mm(grouped_mm(x, B, ends), A, ends)


class LoraExperts(nn.Module):
    """Experts with a LoraStack for gate_up_proj, for down_proj or for both, as modules of these names."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer

    forward = Experts.forward

    def product(self, name, x, ends):
        """As `Experts.product`, by both paths where this matrix is adapted."""
        base = self.base_layer
        return getattr(self, name)(x, getattr(base, name), ends) if hasattr(self, name) else base.product(name, x, ends)


# -- around a whole model --------------------------------------------------------------------------------------------

def matrices(llama):
    """Names of all that can be adapted: the Linears but the head, and the stacks of matrices in Experts."""
    for name, module in llama.named_modules():
        if isinstance(module, Experts):
            yield from (f"{name}.{stack}" for stack, _ in module.named_parameters())
        elif isinstance(module, Linear) and not isinstance(module, Head):
            yield name


def attach(llama, ranks):
    """Freeze a Llama, and put a second path, zero as yet, beside each matrix in ranks: {name: (rank, scale)}."""
    llama.requires_grad_(False)
    for name, (rank, scale) in ranks.items():
        parent, _, last = name.rpartition(".")
        holder = llama.get_submodule(parent)
        if isinstance(holder, Experts):
            holder = LoraExperts(holder)
            llama.set_submodule(parent, holder)
        if isinstance(holder, LoraExperts):
            setattr(holder, last, LoraStack(getattr(holder.base_layer, last), rank, scale))
        else:
            setattr(holder, last, LoraLinear(getattr(holder, last), rank, scale))
    llama.train(llama.training)


@torch.no_grad()
def draw(llama, seed):
    """Draw every A, as spread as peft's (uniform within ±1/sqrt(size of A's last axis)); every B is zero."""
    for name, p in llama.named_parameters():
        if name.endswith(".lora_A"):
            put(p, draw_normal(p.shape, (3 * p.shape[-1]) ** -0.5, seed, name, p.device))
        elif name.endswith(".lora_B"):
            p.zero_()


def float32_stream(llama):
    """Have a Llama with weights in bfloat16 add up its residual stream in float32, as autocast does."""
    llama.model.embed_tokens.register_forward_hook(lambda module, args, x: x.float())


@torch.no_grad()
def merge(llama, dtype=None):
    """Make W + s B A of each pair, added in float32 and rounded to dtype (None: that of W), and leave a plain Llama.

    Returns how much of the change rounding takes: the norm of the errors over that of all s B A. Weights in bfloat16
    have 8 bits: a change of 1 % of W is then 17 % wrong, one of 0.3 % 47 %."""
    lost = whole = 0.0
    for name, module in list(llama.named_modules()):
        if isinstance(module, LoraLinear):
            pairs = [(module.base_layer.weight, module)]
        elif isinstance(module, LoraExperts):
            stacks = [(part, path) for part, path in module.named_children() if isinstance(path, LoraStack)]
            pairs = [(getattr(module.base_layer, part), path) for part, path in stacks]
        else:
            continue
        for weight, path in pairs:
            change = path.scale * (path.lora_B @ path.lora_A)
            exact = weight.float() + change
            weight.data = exact.to(dtype or weight.dtype)
            lost, whole = lost + (weight.float() - exact).square().sum(), whole + change.square().sum()
        llama.set_submodule(name, module.base_layer)
    if dtype:
        llama.to(dtype)
    vars(llama).pop("adapter", None)  # what adapter.py knows of it
    return float((lost / whole) ** 0.5) if whole else 0.0
