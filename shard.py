"""A model on several processes: split over all of them (PyTorch's fully_shard), or a copy on each; and compiled.

In order: the model is made on the meta device, where tensors have shapes and no memory; its blocks are split (and
compiled before that, so that no graph is cut where FSDP gathers weights); each process gets memory for its part; and
that is filled, from a seed or a checkpoint. No process ever holds the whole of a split model, on its GPU or its host.
"""
import inspect
from contextlib import nullcontext

import torch
import torch.distributed as dist

import config
from common import WORLD, first_line
from model import Llama


class Place:
    """Where a model's weights go: whole onto this process's device, or a part of each onto every process."""

    def __init__(self, cfg, device, dtype):
        """cfg: train.TrainConfig; dtype: of matrix products."""
        self.device, self.dtype, self.mesh, self.compile = device, dtype, None, False
        if cfg.shard and WORLD > 1:
            self.mesh, self.compile = device_mesh(cfg.replicas, device), can_compile(cfg, device)

    def new(self, shape, seed):
        """A Llama with the weights that `seed` draws, bit for bit those of one process."""
        with torch.device("meta"):
            llama = Llama(shape)
        self.split(llama)
        llama.allocate(self.device).init_weights(seed)
        return llama

    def split(self, llama):
        """Split a Llama, on the meta device or filled: each process then computes with one whole block at a time. Where
        each has the whole, leave it as it is."""
        if self.mesh is None:
            return
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
        from torch.distributed.tensor import Shard

        def rows(p):  # the axis to split: the first, or the second if the experts cannot be shared out evenly
            parts = self.mesh.size(-1)
            return Shard(1) if p.dim() == 3 and p.shape[0] % parts and p.shape[1] % parts == 0 else None
        policy = MixedPrecisionPolicy(param_dtype=self.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        tied = llama.config.tie_embeddings
        if self.compile:
            for block in llama.model.layers:
                block.compile()
        for block in [*llama.model.layers, *([] if tied else [llama.lm_head])]:
            # In dtype already, so autocast keeps no copy for the backward pass.
            fully_shard(block, mesh=self.mesh, mp_policy=policy, shard_placement_fn=rows)
        if not tied:  # of its own, so that it does not stay whole until the loss; in float32, as the residual stream is
            fully_shard(llama.model.embed_tokens, mesh=self.mesh)
        fully_shard(llama, mesh=self.mesh, reshard_after_forward=True)
        register_fsdp_forward_method(llama, "generate")
        register_fsdp_forward_method(llama, "losses")

    def eager(self):
        """A context in which compiled blocks run as they are: for texts, whose many lengths would each be compiled."""
        return torch.compiler.set_stance("force_eager") if self.compile else nullcontext()


def device_mesh(replicas, device):
    """All processes in a row, each with its part; or with several replicas (HSDP) as rows of parts, so that neighbours
    share a model and gather over fast links, and only gradients cross between the replicas."""
    from torch.distributed.device_mesh import init_device_mesh
    if WORLD % replicas:
        raise config.Mistake(f"replicas={replicas} must divide the {WORLD} processes")
    if replicas == 1:
        return init_device_mesh(device.type, (WORLD,))
    return init_device_mesh(device.type, (replicas, WORLD // replicas), mesh_dim_names=("replicate", "shard"))


def can_compile(cfg, device):
    """Whether cfg asks for torch.compile. Raises `Mistake` where the tools for it are missing."""
    if not (device.type == "cuda" if cfg.compile is None else cfg.compile):
        return False
    try:  # before the first step: it needs a C++ compiler, or Triton
        torch.compile(lambda x: x * 2 + 1)(torch.ones(8, device=device))
    except Exception as e:  # the compiler's own kinds of exception differ from release to release
        raise config.Mistake(f"torch.compile does not work here ({first_line(e)}): "
                             "leave it off with --compile=False") from e
    return True


def share_buffers(model):
    """Give the copies of a model the first one's buffers: of batch norms, which each process counted for itself."""
    for buffer in model.buffers():
        dist.broadcast(buffer, 0)


def data_parallel(model):
    """A copy of the model on each process; the backward pass leaves the mean of all gradients on every one."""
    DDP = torch.nn.parallel.DistributedDataParallel
    torch_2_13 = "forward_sync_buffers" in inspect.signature(DDP).parameters  # its new name of broadcast_buffers
    no_buffers = {"forward_sync_buffers" if torch_2_13 else "broadcast_buffers": False}  # each counts its own load
    return DDP(model, gradient_as_bucket_view=True, **no_buffers)
