"""LoRA's adapters in PEFT's format: adapter_config.json and adapter_model.safetensors, as peft writes and reads them.

    llama = adapter.load(name)                   an adapter and its base model, or any other checkpoint
    adapter.save(llama, directory)               the adapter alone; of a plain Llama all of it
    python adapter.py --merge=out/mine --out=out/merged                    one checkpoint of whole weights

adapter_config.json is kept as `llama.adapter`. What it asks for that is not supported is named and refused, and so is
every tensor that has no place. Sources: peft 0.21 `tuners/tuners_utils.py`, `tuners/lora/layer.py`,
`utils/save_and_load.py`; rsLoRA (arXiv:2312.03732).
"""
import hashlib
import json
import os
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import config


@dataclass
class MergeConfig:
    """How to merge an adapter into its base model."""
    merge: str | None = None  # directory or hub name of the adapter
    out: str | None = None  # directory for the whole weights
    dtype: str = "float32"  # {float32, bfloat16, float16} float32 keeps what was learned; the others round it

    def __post_init__(self):
        if not self.merge or not self.out:
            raise ValueError("what is to be merged, and where to? --merge=ADAPTER --out=DIRECTORY")


if __name__ == "__main__":  # before torch is imported: a typo answers at once
    settings = config.run(config.load, MergeConfig)

import torch
import torch.nn as nn

import checkpoint
import lora
from common import RANK
from model import put
from prepare import shards, tokenizer

MATRICES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]  # not the router: peft cannot
EXPERTS = ["feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"]
READ = {"base_model_name_or_path", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules",
        "target_parameters", "exclude_modules", "layers_to_transform", "peft_type", "peft_version"}
HARMLESS = {"task_type", "auto_mapping", "inference_mode", "layers_pattern", "lora_dropout", "megatron_core",
            "qalora_group_size", "eva_config", "runtime_config", "fan_in_fan_out",  # for other layers than Linear
            "ensure_weight_tying"}  # of modules_to_save; they change no logits
DEFAULTS = {"bias": ("none",), "init_lora_weights": (True, "gaussian", "orthogonal", "eva"), "revision": ("main",)}
LAYOUT = "0.21.2"  # the release of peft as which A and B are written
BASE = "base.sha256"  # what `digest` said of the base model when the adapter was saved


# -- which matrices, of which rank -----------------------------------------------------------------------------------

def begin(llama, rank, alpha, base, seed):
    """Freeze a Llama of `base`, a directory or hub name, and give it a new adapter, which on the meta device is not
    drawn yet. One that has an adapter goes on with it; raises ValueError where that has another rank or alpha."""
    if hasattr(llama, "adapter"):
        if (have := (llama.adapter["r"], llama.adapter["lora_alpha"])) != (rank, alpha):
            raise ValueError(f"{base} is an adapter of rank {have[0]} and alpha {have[1]}, not {rank} and {alpha}: "
                             "leave lora_rank and lora_alpha out, or merge it first")
        return
    llama.adapter = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": portable(base),
                     "r": rank, "lora_alpha": alpha, "use_rslora": False, "target_modules": MATRICES,
                     "target_parameters": EXPERTS if llama.config.n_experts else None, "bias": "none",
                     "lora_dropout": 0.0, "inference_mode": True, "peft_version": LAYOUT}
    lora.attach(llama, ranks(llama, llama.adapter))
    if not llama.lm_head.weight.is_meta:
        lora.draw(llama, seed)


def ranks(llama, settings):
    """{name: (rank, scale)} of the matrices that settings, an adapter_config.json, choose."""
    layers, found = settings.get("layers_to_transform"), {}
    layers = [layers] if isinstance(layers, int) else layers
    for name in lora.matrices(llama):
        if ".experts." in name:
            wanted = fits(settings.get("target_parameters"), name)
        else:
            wanted = fits(settings.get("target_modules"), name) and not fits(settings.get("exclude_modules"), name)
            wanted = wanted and (not layers or int(name.split(".")[2]) in layers)  # model.layers.0.self_attn.q_proj
        if wanted:
            rank = by_pattern(settings.get("rank_pattern"), name, settings["r"])
            alpha = by_pattern(settings.get("alpha_pattern"), name, settings["lora_alpha"])
            found[name] = rank, alpha / (rank ** 0.5 if settings.get("use_rslora") else rank)
    if not found:
        raise ValueError(f"target_modules {settings.get('target_modules')} names no matrix of this model")
    return found


def fits(wanted, name):
    """Whether `wanted`, a list of names' ends, a regular expression for whole names or "all-linear", has this name."""
    if isinstance(wanted, str):
        return wanted.lower() == "all-linear" or re.fullmatch(wanted, name) is not None
    return any(f".{name}".endswith(f".{end}") for end in wanted or ())


def by_pattern(patterns, name, default):
    """The value of the first pattern, a regular expression, that fits the end of a name."""
    return next((value for pattern, value in (patterns or {}).items() if re.match(rf"(.*\.)?({pattern})$", name)),
                default)


def describe(llama):
    """What learns, as people read it."""
    a, count = llama.adapter, sum(p.numel() for p in llama.parameters() if p.requires_grad)
    return (f"rank {a['r']}, alpha {a['lora_alpha']}, on {a['base_model_name_or_path']}: {count:,} parameters learn, "
            f"the others are {str(llama.lm_head.weight.dtype).removeprefix('torch.')} and frozen"
            + "; without the dropout that it was learned with" * bool(a.get("lora_dropout")))


# -- layout of the tensors -------------------------------------------------------------------------------------------

def places(llama):
    """(name in PEFT's files, name here, module) of each LoraLinear and LoraStack. peft wraps Experts twice where both
    of its stacks are adapted; the inner wrapper has gate_up_proj."""
    for name, module in llama.named_modules():
        if isinstance(module, lora.LoraLinear):
            yield f"base_model.model.{name}", name, module
        elif isinstance(module, lora.LoraExperts):
            stacks = [part for part in ("gate_up_proj", "down_proj") if hasattr(module, part)]
            for part in stacks:
                inner = ".base_layer" if part != stacks[-1] else ""
                yield f"base_model.model.{name}{inner}", f"{name}.{part}", getattr(module, part)


def to_peft(A, B):
    """A and B of a module as the files have them. For experts A (E·r, out), where the rows of one lie together, and
    B (in, r·E), where the columns of one lie E apart."""
    return (A, B) if A.dim() == 2 else (A.flatten(0, 1), B.permute(1, 2, 0).flatten(1))


def from_peft(A, B, module, version):
    """The reverse, for a module. Up to peft 0.19.0 an expert's A (E·r, in) was on the side of x, and B (out, r·E): the
    change is the same where they change places. Where in = out the shapes do not tell, and the version does."""
    if module.lora_A.dim() == 2:
        return A, B
    (E, rank, out), inputs = module.lora_A.shape, module.lora_B.shape[1]
    A, B = A.unflatten(0, (E, rank)), B.unflatten(1, (rank, E)).permute(2, 0, 1)
    swapped = version < (0, 19, 1) if inputs == out else A.shape[2] == inputs
    return (B.mT, A.mT) if swapped else (A, B)


# -- files -----------------------------------------------------------------------------------------------------------

def load(name, dtype=None, device="cpu", split=None, new=None, **overrides):
    """The Llama of a checkpoint, or of an adapter and its base model: a directory or a hub name.

    dtype is that of the base model; A and B are float32. split: as `prepare` of `checkpoint.load`. new: what `begin`
    takes after llama, for a new adapter. The rest, and the errors, are as for `checkpoint.load`. PEFT's files hold no
    context: an adapter has its run's, which may be longer than its base model's."""
    directory = checkpoint.find_checkpoint(name)
    settings = read_settings(directory) if is_adapter(directory) else None
    base = base_of(directory) if settings else directory
    if settings and (context := context_of(directory)):
        overrides = {"context": context} | overrides

    def prepare(llama):
        if settings:
            try:
                lora.attach(llama, ranks(llama, settings))
            except (re.error, TypeError) as e:
                raise ValueError(f"{directory / 'adapter_config.json'}: target_modules and patterns must be lists of "
                                 f"names or regular expressions: {e}") from None
            llama.adapter = settings | {"peft_version": LAYOUT}  # however its files were, it is written anew
            name = Path(settings["base_model_name_or_path"]).as_posix()
            if base.as_posix().endswith(f"/{name}"):  # it lies beside this adapter, but the next one may be elsewhere
                llama.adapter["base_model_name_or_path"] = portable(base)
        if new:
            begin(llama, *new)
        if split:
            split(llama)
    llama = checkpoint.load(base, dtype, device, prepare, **overrides)
    if settings:
        read_tensors(llama, directory / "adapter_model.safetensors", settings)
        if not split and (directory / "vlm.json").is_file():  # its base model may have no token for pictures
            grow(llama, checkpoint.read_json(directory / "vlm.json").get("image_id", 0) + 1)
    elif new:
        lora.draw(llama, new[-1])
    return llama


def grow(llama, vocab_size):
    """Give a Llama embeddings for vocab_size tokens (up to a multiple of 64); the new ones are the mean of the old."""
    old = llama.config.vocab_size
    if old >= vocab_size:
        return llama
    llama.config = llama.model.cfg = replace(llama.config, vocab_size=-(-vocab_size // 64) * 64)
    for layer in llama.model.embed_tokens, llama.lm_head:
        w = layer.weight.detach()
        layer.weight = nn.Parameter(torch.cat((w, w.mean(0).expand(llama.config.vocab_size - old, -1))))
    if llama.config.tie_embeddings:
        llama.lm_head.weight = llama.model.embed_tokens.weight
    return llama


def context_of(directory):
    """The longest text, in tokens, for which the run of an adapter was made; None without a run."""
    return config.of_run(directory, "train.py:TrainConfig")[1].get("context")


def is_adapter(directory):
    """Whether a directory holds an adapter instead of whole weights."""
    return os.path.isfile(Path(directory) / "adapter_config.json")


def read_settings(directory):
    """The dict of an adapter_config.json. Raises ValueError, naming the key, for what is not supported."""
    path = Path(directory) / "adapter_config.json"
    settings = checkpoint.read_json(path)
    if settings.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type {settings.get('peft_type')!r} is not supported; 'LORA' is")
    for key, value in settings.items():
        if value and key not in READ | HARMLESS and value not in DEFAULTS.get(key, ()):
            raise ValueError(f"{path}: {key} {value!r} is not supported")
    for key in "r", "lora_alpha", "rank_pattern", "alpha_pattern":
        value = settings.get(key)
        numbers = value.values() if isinstance(value, dict) else [value] if value or "pattern" not in key else []
        if not all(type(n) in (int, float) and 0 < n < 2**40 for n in numbers):
            raise ValueError(f"{path}: {key} must be a positive number, or an object of some, not {value!r}")
        if key in ("r", "rank_pattern") and not all(type(n) is int for n in numbers):
            raise ValueError(f"{path}: {key} must be a whole number, or an object of some, not {value!r}")
    if not settings.get("target_modules") and not settings.get("target_parameters"):
        raise ValueError(f"{path}: there are no target_modules; what is adapted has to be said")
    return settings


def base_of(directory):
    """Where the base model of an adapter is. A relative path begins at the current directory, as for peft, at any
    folder that the adapter is in, so that a folder of runs can be moved as a whole, or at the project's root, where
    `portable` has it begin."""
    directory = Path(directory).absolute()
    name = read_settings(directory).get("base_model_name_or_path")
    if not name or not isinstance(name, str):
        raise ValueError(f"{directory}/adapter_config.json names no base model in base_model_name_or_path")
    for start in (Path(), directory, *directory.parents, config.ROOT):
        if os.path.isdir(start / name):
            return start / name
    try:
        return checkpoint.find_checkpoint(name)
    except FileNotFoundError as e:
        raise FileNotFoundError(f"the base model of the adapter {directory} is missing: {e}; where it is now can be "
                                "written into base_model_name_or_path of adapter_config.json") from None


def portable(source):
    """The name of a base model for an adapter_config.json: a path from the project's root if it is in there."""
    if not Path(source).is_dir():
        return str(source)  # on the hub
    path = Path(os.path.abspath(source))
    return (path.relative_to(config.ROOT) if config.ROOT in path.parents else path).as_posix()  # as Windows reads too


def digest(llama):
    """What tells a base model from the same one after training: the hash of its first k_proj, in bfloat16, in which
    the base may be opened; "" in float16, which rounds otherwise. All processes that share the model call it."""
    k_proj = llama.model.layers[0].self_attn.k_proj
    weight = checkpoint.whole(getattr(k_proj, "base_layer", k_proj).weight).cpu()
    if weight.dtype == torch.float16:
        return ""
    return hashlib.sha256(weight.bfloat16().contiguous().view(torch.uint8).numpy()).hexdigest()


@torch.no_grad()
def read_tensors(llama, path, settings):
    """Read A and B of every module. Raises ValueError for tensors that are missing, mis-shaped or have no place, and
    for those that were learned on a base model of other weights."""
    if not path.is_file():
        raise FileNotFoundError(f"no {path} (pickled weights are not read: they can run code)")
    tensors = {name.replace("model.language_model.", "model."): t for name, t in checkpoint.read_tensors(path).items()}
    file, now = path.with_name(BASE), digest(llama)
    if now and file.is_file() and file.read_text().strip() != now:  # peft writes no such file
        raise ValueError(f"{path.parent}: the base model has changed since ({settings['base_model_name_or_path']})")
    version = re.match(r"(\d+)\.(\d+)\.(\d+)", str(settings.get("peft_version")))  # before 0.18 there was none
    version = tuple(map(int, version.groups())) if version else (0, 0, 0)
    names = {f"{place}.lora_{part}.weight" for place, *_ in places(llama) for part in "AB"}
    checkpoint.refuse(path, {"missing": names - tensors.keys(), "not supported": tensors.keys() - names})
    for place, _, module in places(llama):
        pair = [tensors[f"{place}.lora_{part}.weight"] for part in "AB"]
        try:
            for own, t in zip((module.lora_A, module.lora_B), from_peft(*pair, module, version)):
                if own.shape != t.shape or not t.is_floating_point():
                    raise ValueError
                put(own, t)
        except (ValueError, RuntimeError, IndexError):
            checkpoint.refuse(path, {"of the wrong shape or type": [f"{place} {[tuple(t.shape) for t in pair]}"]})


def save(llama, directory):
    """Write a checkpoint: of an adapted Llama the adapter alone, else all of it."""
    if not hasattr(llama, "adapter"):
        return checkpoint.save(llama, directory)
    directory, tensors = Path(directory), {}
    for place, _, module in places(llama):
        pair = to_peft(*(checkpoint.whole(t).cpu() for t in (module.lora_A, module.lora_B)))
        tensors |= {f"{place}.lora_{part}.weight": t.contiguous() for part, t in zip("AB", pair)}
    base = digest(llama)
    if RANK > 0:  # of processes that share the model
        return
    directory.mkdir(parents=True, exist_ok=True)
    with config.atomic_write(directory / "adapter_model.safetensors") as path:
        checkpoint.write_tensors(tensors, path)
    if base:
        shards.write_text(directory / BASE, base + "\n")  # metadata of safetensors have no fixed order
    shards.write_text(directory / "adapter_config.json", json.dumps(llama.adapter, indent=2) + "\n")


def name_ends(llama, tok):
    """Have config.json say what ends an answer, for other tools: it is in the tokenizer, with the chat template."""
    known = sorted(i for i in tok.stop_ids if i < llama.config.vocab_size)
    llama.config.eos_ids = tuple(dict.fromkeys((*llama.config.eos_ids, *known)))


def load_tokenizer(directory):
    """The tokenizer of a checkpoint; of an adapter without one, its base model's."""
    own = any((Path(directory) / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
    return tokenizer.load(base_of(directory) if is_adapter(directory) and not own else directory)


def main(cfg):
    """Merge an adapter into its base model, and write whole weights and the tokenizer."""
    with config.mistakes(ValueError, OSError):
        directory = checkpoint.find_checkpoint(cfg.merge)
        if not is_adapter(directory):
            raise config.Mistake(f"{directory} holds no adapter (adapter_config.json)")
        if Path(cfg.out).is_dir() and any(Path(cfg.out).iterdir()):
            raise config.Mistake(f"{cfg.out} is not empty: give another --out")
        llama, tok = load(directory, torch.float32), load_tokenizer(directory)
        lost = lora.merge(llama, getattr(torch, cfg.dtype))
        if tok.chat_template:
            name_ends(llama, tok)
        checkpoint.save(llama, cfg.out)
        tok.save(cfg.out)
    if (directory / "vlm.json").is_file():
        print(f"{directory}'s projector and encoder are left out: {cfg.out} does not see", file=sys.stderr)
    print(f"{cfg.out}: {llama.counts()[0]:,} parameters in {cfg.dtype}; rounding takes {lost:.1%} of what was learned")
    if lost > 0.01:
        print("to keep all of it, keep the adapter, or merge with --dtype=float32")


if __name__ == "__main__":
    config.run(main, settings)
