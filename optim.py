"""Optimizers (Muon for the hidden matrices, AdamW for the rest) and the schedule of their learning rate."""
import math

import torch

NOT_HIDDEN = ("embed_tokens", "lm_head", "router", "positional_embedding", "lora_")  # not meant for Muon


class Muon(torch.optim.Optimizer):
    """Momentum whose update is brought near an orthogonal matrix, for hidden weight matrices.

    Takes matrices (out, in), convolutions (out, in, h, w) as (out, in·h·w), and stacks of matrices (E, in, out);
    those of one shape are handled as one batch.
    Updates have the root mean square of AdamW's (0.2 * sqrt(max(out, in)) times an orthogonal matrix).
    Sources: Keller Jordan, "Muon", 2024 (the quintic iteration); Moonlight, arXiv:2502.16982 (the scale).
    """
    BATCH = 2**26  # elements on each process that are handled at once: a few copies of them must fit in memory

    def __init__(self, params, lr, momentum, weight_decay, dtype):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.dtype = dtype  # of the iteration's products

    def orthogonalize(self, g):
        """g (n, a, b) -> about U V^T of each matrix's singular value decomposition."""
        x = g.to(self.dtype)
        tall = x.shape[-2] > x.shape[-1]
        x = x.mT if tall else x
        x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
        for _ in range(5):  # drives every singular value into 0.7 .. 1.2
            s = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(s, s, s, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
        return (x.mT if tall else x).to(g.dtype)

    def orthogonalize_stack(self, stack):
        """stack (n, ..., a, b), each matrix orthogonalized. Of a shared stack each process has some matrices whole
        (experts), or some rows of every matrix; these are exchanged, so that it has some whole, and then back."""
        if not hasattr(stack, "placements"):
            return self.orthogonalize(stack.flatten(0, -3)).view_as(stack)
        from torch.distributed.tensor import DTensor, Shard
        mesh, part, (a, b) = stack.device_mesh, stack.to_local(), stack.shape[-2:]
        matrices = part.flatten(0, -3)  # (m, rows, b)
        if any(p.is_shard(stack.dim() - 2) for p in stack.placements):
            whole = dict(run_check=False, shape=(len(matrices), a, b), stride=(a * b, b, 1))
            by_rows = [Shard(1) if p.is_shard() else p for p in stack.placements]
            by_matrix = [Shard(0)] * mesh.ndim
            mine = DTensor.from_local(matrices, mesh, by_rows, **whole).redistribute(placements=by_matrix).to_local()
            done = DTensor.from_local(self.orthogonalize(mine), mesh, by_matrix, **whole)
            done = done.redistribute(placements=by_rows).to_local()
        else:
            done = self.orthogonalize(matrices)
        return DTensor.from_local(done.view_as(part), mesh, stack.placements, run_check=False, shape=stack.shape,
                                  stride=stack.stride())

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            for params in by_shape.values():
                processes = params[0].device_mesh.size() if hasattr(params[0], "placements") else 1
                *experts, a, b = params[0].shape if params[0].dim() < 4 else params[0].flatten(1).shape
                matrices = max(processes, self.BATCH * processes // (a * b))  # at once: one or more for each process
                count = max(matrices // math.prod(experts), 1)
                for i in range(0, len(params), count):
                    self.update(params[i:i + count], group)

    def update(self, params, group):
        """One step of parameters of one shape."""
        for p in params:
            if "momentum" not in self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        shape, grads, m = params[0].shape, [p.grad for p in params], group["momentum"]
        buffers = [self.state[p]["momentum"] for p in params]
        torch._foreach_mul_(buffers, m)
        torch._foreach_add_(buffers, grads, alpha=1 - m)
        nesterov = torch._foreach_add(torch._foreach_mul(grads, 1 - m), buffers, alpha=m)
        stack = torch.stack(nesterov)  # (n, ..., a, b)
        stack = stack.flatten(2) if len(shape) == 4 else stack  # convolutions: (n, out, in·h·w)
        update = self.orthogonalize_stack(stack) * (-0.2 * group["lr"] * max(stack.shape[-2:]) ** 0.5)
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(params, [u.view(shape) for u in update.unbind()])


def for_muon(name, p, cfg):
    """Whether Muon takes this parameter; AdamW has the others."""
    return cfg.optimizer == "muon" and p.dim() > 1 and not any(part in name for part in NOT_HIDDEN)


def make_optimizers(model, cfg, device, dtype):
    """[AdamW] or [AdamW, Muon] over the parameters of a model that are to learn."""
    learning = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    hidden = [p for name, p in learning if for_muon(name, p, cfg)]
    matrices = [p for name, p in learning if p.dim() > 1 and not for_muon(name, p, cfg)]
    vectors = [p for name, p in learning if p.dim() < 2]
    groups = [dict(params=matrices, weight_decay=cfg.weight_decay), dict(params=vectors, weight_decay=0.0)]
    adamw = torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=(cfg.beta1, cfg.beta2), eps=1e-8, fused=True)
    if not hidden:
        return [adamw]
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    iteration = torch.bfloat16 if dtype == torch.bfloat16 or fast else torch.float32
    return [adamw, Muon(hidden, cfg.learning_rate, cfg.muon_momentum, cfg.weight_decay, iteration)]


def states(model, optimizers):
    """{"name of the parameter.key": tensor} of all that the optimizers remember from step to step."""
    return {f"{name}.{key}": t for name, p in model.named_parameters() for optimizer in optimizers
            for key, t in optimizer.state.get(p, {}).items()}


def make_states(model, optimizers, saved):
    """Make those `states` whose names a checkpoint has, to be filled from it. Raises ValueError for other names."""
    owner = {p: optimizer for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        keys = ("momentum",) if isinstance(owner.get(p), Muon) else ("step", "exp_avg", "exp_avg_sq")
        if p in owner and all(f"{name}.{key}" in saved for key in keys):
            owner[p].state[p] = {key: torch.zeros((), device=p.device) if key == "step" else torch.zeros_like(p)
                                 for key in keys}
    made = states(model, optimizers)
    if other := saved - made.keys():
        raise ValueError(f"it has {sorted(other)[0]}")
    return made


def learning_rate(step, cfg):
    """The rate of this step: linear warmup, then cosine decay, or flat and linear decay ("wsd")."""
    if step < cfg.warmup_iters:
        return cfg.learning_rate * (step + 1) / (cfg.warmup_iters + 1)
    if cfg.schedule == "cosine":
        done = (step - cfg.warmup_iters) / max(1, cfg.max_iters - cfg.warmup_iters)
        height = 0.5 * (1 + math.cos(math.pi * done))
    else:
        height = min(1.0, (cfg.max_iters - step) / max(1, cfg.decay_frac * cfg.max_iters))
    return cfg.min_lr + height * (cfg.learning_rate - cfg.min_lr)
