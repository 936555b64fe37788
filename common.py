"""What several scripts need of the machine: the processes of a run, a device, a dtype, and files that appear whole."""
import ctypes
import math
import os
import re
import signal
import sys
import threading
import time
import uuid
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist

import config

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun sets both
PATIENCE = timedelta(minutes=10)  # for a process that does not answer, as on a node without power; then all end


# -- the processes of a run --------------------------------------------------------------------------------------

def print0(*words):
    """Print, on the first process only. A reader of the output that leaves, as `| head` does, stops the program as
    SIGTERM does, which a training run answers by saving. Without a terminal, or room on the disk, it goes on silently.
    """
    if RANK == 0:
        try:
            with config.printing():
                print(*words, flush=True)
        except BrokenPipeError:
            signal.raise_signal(signal.SIGTERM)
        except OSError:
            pass


def all_reduce_sum(*numbers):
    """The sums of these numbers over all processes."""
    if WORLD == 1:
        return list(numbers)
    sums = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(sums)
    return sums.tolist()


def gather(value):
    """[the value of each process]."""
    values = [value] * WORLD
    if WORLD > 1:
        dist.all_gather_object(values, value)
    return values


@contextmanager
def together():
    """A block that all processes run, and that all leave alike: where an error ends it on some, these raise it and the
    others OSError with its first line. Within the block no process may wait for another."""
    error = None
    try:
        yield
    except Exception as e:
        error = e
    lines = gather(error and first_line(error))
    if error or any(lines):
        raise error or OSError(next(line for line in lines if line))


@contextmanager
def in_company():
    """Within this block, the end or the silence of another process is a `Mistake`."""
    try:
        yield
    except RuntimeError as e:
        if WORLD == 1 or not re.search("gloo|NCCL|[Cc]onnection|[Tt]imed? ?out", str(e)):
            raise
        raise config.Mistake(f"another process has ended, for a reason of its own, or has not answered for {PATIENCE}; "
                             "the last checkpoint is whole") from e


def word_of_start(store):
    """A word on which the processes of this start agree, and which no earlier start had. Torchrun's store outlives
    processes that it starts again, and its count of restarts is each machine's own."""
    own = uuid.uuid4().hex
    if RANK > 0:
        store.set(f"asks {RANK}", own)
        word = store.get(f"answer to {own}").decode()  # waits
        store.add(f"heard {word}", 1)
        return word
    end, answered = time.monotonic() + PATIENCE.total_seconds(), set()
    while store.add(f"heard {own}", 0) < WORLD - 1:  # what dead ones have asked is answered too, and nobody hears it
        if time.monotonic() > end:
            raise config.Mistake(f"not all {WORLD} processes have come within {PATIENCE}")
        for rank in range(1, WORLD):
            if store.check([f"asks {rank}"]) and (ask := store.get(f"asks {rank}").decode()) not in answered:
                store.set(f"answer to {ask}", own)
                answered.add(ask)
        time.sleep(0.02)
    return own


def init_distributed(device):
    """Join the other processes, if there are any."""
    if WORLD > 1:
        store, _, _ = next(dist.rendezvous("env://", RANK, WORLD, timeout=PATIENCE))
        store = dist.PrefixStore(word_of_start(store), store)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=RANK, world_size=WORLD, timeout=PATIENCE)


def cleanup():
    """End this process together with the others. It skips the interpreter's own teardown, in which the threads of gloo
    now and then abort a run that is complete."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def first_line(error):
    """What an exception says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# -- hardware ----------------------------------------------------------------------------------------------------

def pick_device(name):
    """torch.device of this process. Raises `config.Mistake` for one that cannot be used."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as e:
        raise config.Mistake(f"device {name!r} cannot be used here: {first_line(e)}") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 for what stays in float32
        # With masks, cuDNN's gradients can be NaN and its decoding wrong (pytorch#196678, #193893).
        torch.backends.cuda.enable_cudnn_sdp(False)
    return device


def pick_dtype(name, device):
    """(torch.dtype of matrix products, why)."""
    if name != "auto":
        return getattr(torch, name), "as asked"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "tensor cores, and the range of float32"
        return torch.float16, "tensor cores; this GPU has no bfloat16"
    if device.type == "mps":
        return torch.float32, "safe on this device"
    ratio = bfloat16_speed()
    better = torch.bfloat16 if ratio > 1.5 else torch.float32
    return better, f"bfloat16 products run at {ratio:.2g}x the speed of float32 on this processor"


def agreed_dtype(name, device):
    """As `pick_dtype`, but one for all processes: gradients in float16 are scaled, and others are not."""
    dtype, why = pick_dtype(name, device)
    half, wide_half = all_reduce_sum(int(dtype == torch.float16), int(dtype == torch.bfloat16))
    if half in (0, WORLD) and wide_half in (0, WORLD):
        return dtype, why
    dtype = torch.float16 if half + wide_half == WORLD else torch.float32
    return dtype, "what all processes have, whose hardware differs"


def bfloat16_speed():
    """How many times faster than float32 this processor multiplies in bfloat16: it may have units for it, or crawl."""
    matrices = [torch.ones(512, 512, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    least = [math.inf, math.inf]
    for _ in range(20):  # in turn, and the least counts: on a busy machine some of them wait
        for i, a in enumerate(matrices):
            start = time.perf_counter()
            a @ a
            least[i] = min(least[i], time.perf_counter() - start)
        if least[1] > 50 * least[0]:
            break  # it crawls: known after half a second
    return least[0] / least[1]


def autocast_to(dtype, device):
    """The context in which matrix products run in dtype."""
    return torch.autocast(device.type, dtype) if dtype != torch.float32 else nullcontext()


def keep_freed_memory(keep=True):
    """Have glibc keep the blocks that torch frees: giving them back and faulting them in anew costs a CPU a tenth of a
    training step. keep False: give large ones back at once, for a host whose memory many processes share."""
    if sys.platform != "linux" or not hasattr(libc := ctypes.CDLL(None), "mallopt"):  # musl has none
        return
    if keep:
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block gets a mapping of its own, which ends when it is freed
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap's top is kept too
    else:  # by itself glibc raises this threshold to 32 MiB, and keeps what is smaller
        libc.mallopt(-3, 2**20)  # M_MMAP_THRESHOLD: blocks from a MiB on have a mapping of their own


class IdleThreads(AbstractContextManager):
    """How OpenMP's threads wait for each other on a CPU: in a loop, or asleep. `with IdleThreads(device) as threads:`

    Waiting in a loop is faster by a third as long as each thread has a core. Beside another busy program it holds the
    core that the awaited thread needs, and a step takes 4 to 30 times as long. libgomp lets threads sleep as soon as
    there are more of them than cores, so a second team of threads, which does nothing, switches it over. Which way is
    faster now is measured from step to step; neither changes a result.
    """

    def __init__(self, device):
        self.able = device.type == "cpu" and sys.platform == "linux" and (  # where the second team makes a difference
            1 < torch.get_num_threads() <= len(os.sched_getaffinity(0)) < 2 * torch.get_num_threads())
        self.second_team = None  # the Event that ends it
        self.steps, self.since_switch, self.patience = 0, 0, 16
        self.fastest, self.before_trial = math.inf, None  # seconds

    def __exit__(self, *_):
        if self.second_team:
            self.switch()

    def adapt(self, seconds):
        """After each step of so many seconds: go on waiting as now, or try the other way for a step."""
        if not self.able:
            return
        asleep = self.second_team is not None
        self.steps, self.since_switch = self.steps + 1, self.since_switch + 1
        self.fastest = min(self.fastest, seconds)
        if self.before_trial is not None:  # this step was a trial
            pays = seconds < self.before_trial
            if not asleep:  # waiting in a loop can cost 30 times as much: tried ever more rarely where it does not pay
                self.patience = 16 if pays else min(2 * self.patience, 512)
            self.before_trial = None
            if not pays:
                self.switch()
        elif (self.since_switch >= self.patience if asleep else
              self.steps == 3 or self.since_switch >= 3 and seconds > 1.5 * self.fastest):
            self.before_trial = seconds
            self.switch()

    def switch(self):
        """Start or end the second team."""
        self.since_switch = 0
        if self.second_team:
            self.second_team.set()
            self.second_team = None
            return
        end = self.second_team = threading.Event()

        def idle():
            torch.ones(1 << 17).neg_()  # large enough for two threads
            end.wait()
        threading.Thread(target=idle, daemon=True).start()


def peak_memory(device):
    """The most bytes that this process has held: on the GPU, or in all."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    try:
        import resource  # Windows has none
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def to_device(device, *arrays):
    """Arrays and tensors as tensors on device, None as it is; to a GPU without waiting."""
    def move(a):
        t = torch.as_tensor(a)
        pins = device.type == "cuda" and t.device.type == "cpu"  # what is on the GPU already cannot be pinned
        return t.pin_memory().to(device, non_blocking=True) if pins else t.to(device)
    return [a if a is None else move(a) for a in arrays]
