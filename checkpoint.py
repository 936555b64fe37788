"""Checkpoints in Hugging Face's format: config.json and safetensors files, as transformers writes and reads them.

    model = checkpoint.load(name)          a directory, or a model's name on the Hugging Face hub
    checkpoint.save(model, directory)

Parameters have Hugging Face's names already, so only config.json is translated: `config_to_hf`, `config_from_hf`.
"""
import contextlib
import difflib
import functools
import json
import os
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError

from common import RANK, WORLD, first_line, together
from model import Llama, LlamaConfig, put


def load(name, dtype=None, device="cpu", prepare=None, **overrides):
    """A Llama from a directory or a Hugging Face hub name: config.json and *.safetensors, whole or in parts.

    dtype None keeps the files', or the narrowest that holds all; overrides replace fields of the config (dropout=0.1).
    prepare(llama) changes the model while it is on the meta device: puts modules around others (adapter.py), or splits
    it over all processes (`shard.Place.split`), of which each then reads its own part. Raises FileNotFoundError where
    there is nothing to read, and ValueError, naming it, for what is not supported and for missing, unexpected or
    mis-shaped tensors.
    """
    directory = find_checkpoint(name)
    if os.path.exists(directory / "adapter_config.json"):
        raise ValueError(f"{directory} holds an adapter (adapter_config.json), which adapter.load opens; or merge it")
    generation = directory / "generation_config.json"
    cfg = config_from_hf(read_json(directory / "config.json"), read_json(generation) if generation.exists() else {})
    cfg = replace(cfg, **overrides)
    with torch.device("meta"):
        llama = Llama(cfg)
    places = _find_tensors(directory, cfg, {name: t.shape for name, t in llama.state_dict().items()})
    llama.to(dtype or functools.reduce(torch.promote_types, {DTYPES[dtype] for *_, dtype, _ in places.values()}))
    if prepare:
        prepare(llama)
    _fill(llama.allocate(device), places)
    return llama.eval()


def save(llama, directory, state=None, max_shard_size="5GB"):
    """Write config.json and the weights (state; None: the model's own) as transformers does: model.safetensors, or
    parts of at most max_shard_size and an index. Each file appears whole or not at all. All processes that share a
    model call it together: each gathers and writes some of the files, one at a time and none larger than its share.
    """
    state = dict(llama.state_dict() if state is None else state)
    if llama.config.tie_embeddings:
        state.pop("lm_head.weight", None)
    dtype = next(iter(state.values())).dtype
    write(directory, config_to_hf(llama.config, str(dtype).removeprefix("torch.")), state, max_shard_size)


def write(directory, hf, state, max_shard_size="5GB"):
    """Write hf, the dict of a config.json (None: without one), and the tensors of state. See `save`."""
    from huggingface_hub import split_torch_state_dict_into_shards
    directory = Path(directory)
    rank, world = (RANK, WORLD) if any(hasattr(t, "placements") for t in state.values()) else (0, 1)
    if world > 1:
        max_shard_size = min(5 * 10**9, sum(t.numel() * t.itemsize for t in state.values()) // world)
    shapes = {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in state.items()}
    split = split_torch_state_dict_into_shards(shapes, max_shard_size=max_shard_size)
    files = list(split.filename_to_tensors.items())
    texts = {"config.json": hf} if hf else {}
    if split.is_sharded:
        texts["model.safetensors.index.json"] = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    written = together if world > 1 else contextlib.nullcontext
    with contextlib.ExitStack() as stack:
        with written():  # all have a place to write to before one waits for another
            directory.mkdir(parents=True, exist_ok=True)
            folder = stack.enter_context(tempfile.TemporaryDirectory(".tmp", dir=directory))
        for start in range(0, len(files), world):  # as many files as processes
            mine, tensors = None, {}
            for owner, (file, names) in enumerate(files[start:start + world]):
                mine = file if owner == rank else mine
                for name in names:
                    t = whole(state[name])
                    if owner == rank:
                        tensors[name] = t.cpu().contiguous()
            with written():
                if mine:
                    write_tensors(tensors, Path(folder, mine))
        with written():
            for file, content in texts.items() if rank == 0 else ():
                Path(folder, file).write_text(json.dumps(content, indent=2) + "\n")
            for file in Path(folder).iterdir():
                file.chmod(directory.stat().st_mode & 0o666)  # safetensors lets only the owner read
                with open(file, "rb+") as f:  # Windows syncs no file that is open only for reading
                    os.fsync(f.fileno())
                file.replace(directory / file.name)
    if rank == 0:
        remove_weights(directory, except_for={*texts, *split.filename_to_tensors})


def write_tensors(tensors, path):
    """Write {name: tensor} as a safetensors file. Raises OSError where the disk is full, as other files do."""
    from safetensors.torch import save_file
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as e:
        raise OSError(first_line(e)) from None


def whole(t):
    """A tensor, detached; of one that the processes share each process gets all of it, and all must ask for it."""
    return t.detach().full_tensor() if hasattr(t, "placements") else t.detach()


def remove_weights(directory, except_for):
    """Remove the weights of a directory but for these names: of before, cut into files in another way."""
    for pattern in "model.safetensors", "model.safetensors.index.json", "model-?????-of-?????.safetensors":
        for file in directory.glob(pattern):
            if file.name not in except_for:
                file.unlink(missing_ok=True)


def find_checkpoint(name):
    """The local directory of a checkpoint: `name` itself, or the copy of the Hugging Face hub's model of that name.

    Raises FileNotFoundError when there is neither, and ValueError for a model of the hub that is not supported, before
    its weights, which can be many gigabytes, are fetched. One that is not public needs a token in HF_TOKEN."""
    if os.path.isdir(name):  # Path.is_dir raises an error of its own before Python 3.14 where nothing may be read
        return Path(name)
    name = str(name)
    if name.count("/") != 1 or name.startswith("out/"):  # a name on the hub is owner/model
        found = [*Path("out").glob("*/config.json"), *Path("out").glob("*/adapter_config.json")]
        runs = sorted(str(path.parent) for path in found if name.startswith("out/"))
        near = difflib.get_close_matches(name, runs, n=3, cutoff=0)
        raise FileNotFoundError(f"no directory {name}" + (f"; there are {', '.join(near)}" if near else ""))
    small = "*.json", "*.model", "*.jinja"
    directory = _fetch(name, *small)
    if not (directory / "adapter_config.json").exists():
        hf = read_json(directory / "config.json")
        how = hf.get("quantization_config")
        own = isinstance(how, dict) and how.get("quant_method") == METHOD  # which decode.load_quantized reads
        config_from_hf(hf | {"quantization_config": None} if own else hf)
    return _fetch(name, *small, "*.safetensors")


def _fetch(name, *patterns):
    """The local copy of the files of a hub's model whose names fit; errors as in `find_checkpoint`."""
    from huggingface_hub import errors, snapshot_download
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=[  # other formats
            "*/*.json", "*/*.safetensors", "*/*.model", "consolidated*"]))
    except errors.HFValidationError:
        raise FileNotFoundError(f"no directory {name}") from None
    except errors.GatedRepoError:
        why = "the hub's model of that name is gated: ask for access on its page and set HF_TOKEN"
    except errors.RepositoryNotFoundError:
        why = "the hub has no public model of that name (a private one needs HF_TOKEN)"
    except errors.LocalEntryNotFoundError:
        why = "the hub does not answer, and nothing of that name is in its cache"
    except Exception as e:  # the hub's client raises many kinds, none of them ours to mend
        why = f"the hub did not give a model of that name: {type(e).__name__}: {' '.join(str(e).split())[:200]}"
    raise FileNotFoundError(f"no directory {name}, and {why}")


# -- config.json ----------------------------------------------------------------------------------------------------

LLAMA_KEYS = {  # field of LlamaConfig: (key of config.json, what transformers takes where the key is left out)
    "vocab_size": ("vocab_size", 32000), "n_layer": ("num_hidden_layers", 32), "n_head": ("num_attention_heads", 32),
    "n_kv_head": ("num_key_value_heads", None), "dim": ("hidden_size", 4096), "head_dim": ("head_dim", None),
    "ffn_dim": ("intermediate_size", 11008), "context": ("max_position_embeddings", 2048),
    "norm_eps": ("rms_norm_eps", 1e-6), "tie_embeddings": ("tie_word_embeddings", False), "bos_id": ("bos_token_id", 1)}
LLAMA4_KEYS = {
    "vocab_size": ("vocab_size", 202048), "n_layer": ("num_hidden_layers", 48), "n_head": ("num_attention_heads", 40),
    "n_kv_head": ("num_key_value_heads", 8), "dim": ("hidden_size", 5120), "head_dim": ("head_dim", 128),
    "ffn_dim": ("intermediate_size_mlp", 16384), "context": ("max_position_embeddings", 131072),
    "norm_eps": ("rms_norm_eps", 1e-5), "tie_embeddings": ("tie_word_embeddings", False), "bos_id": ("bos_token_id", 1),
    "expert_dim": ("intermediate_size", 8192), "n_experts": ("num_local_experts", 16),
    "top_k": ("num_experts_per_tok", 1), "moe_every": ("interleave_moe_layer_step", 1),
    "nope_every": ("no_rope_layer_interval", 4), "chunk": ("attention_chunk_size", 8192),
    "qk_norm": ("use_qk_norm", True), "attn_scale": ("attn_scale", 0.1), "floor_scale": ("floor_scale", 8192)}
SCALING_KEYS = "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"
SUPPORTED = {  # config keys that change what a model computes, or where it lies, and their values supported here
    "hidden_act": ("silu", "swish"), "attention_bias": (False,), "mlp_bias": (False,), "is_causal": (True,),
    "partial_rotary_factor": (1, None), "sliding_window": (None,), "per_layer_config": (None,),
    "quantization_config": (None,), "compression_config": (None,), "transformers_weights": (None,)}
METHOD = "everyllama"  # quant_method of what decode.save_quantized writes
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
VISION = "vision_model.", "multi_modal_projector."  # in Llama4ForConditionalGeneration, beside "language_model."
ARCHITECTURES = {"LlamaForCausalLM", "Llama4ForCausalLM", "Llama4ForConditionalGeneration"}


def config_to_hf(cfg, dtype="float32"):
    """LlamaConfig -> the dict of a config.json, with the spellings of transformers 4 and 5 for dtype and RoPE."""
    llama4, scaling = cfg.arch == "llama4", None
    if cfg.rope_scaling:  # whole numbers as int, which transformers requires for the original context
        numbers = [int(x) if x % 1 == 0 else x for x in cfg.rope_scaling]
        scaling = {"rope_type": "llama3"} | dict(zip(SCALING_KEYS, numbers))
    hf = {key: getattr(cfg, field) for field, (key, _) in (LLAMA4_KEYS if llama4 else LLAMA_KEYS).items()}
    hf |= {"architectures": ["Llama4ForCausalLM" if llama4 else "LlamaForCausalLM"],
           "model_type": "llama4_text" if llama4 else "llama", "dtype": dtype, "torch_dtype": dtype,
           "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
           "eos_token_id": cfg.eos_ids[0] if len(cfg.eos_ids) == 1 else list(cfg.eos_ids) or None,
           "rope_theta": cfg.rope_theta, "rope_scaling": scaling,
           "rope_parameters": {"rope_theta": cfg.rope_theta, "rope_type": "default"} | (scaling or {})}
    if llama4:  # transformers requires some of these keys even if no layer uses them
        layers = range(cfg.n_layer)
        hf |= {"moe_layers": [i for i in layers if cfg.is_moe(i)],
               "no_rope_layers": [int(not cfg.is_nope(i)) for i in layers],  # 1 means that RoPE is used
               "no_rope_layer_interval": cfg.nope_every or cfg.n_layer + 1,
               "layer_types": ["chunked_attention" if cfg.chunk_of(i) else "full_attention" for i in layers],
               "attn_temperature_tuning": cfg.attn_scale > 0, "attention_chunk_size": cfg.chunk or cfg.context,
               "intermediate_size": cfg.expert_dim or cfg.ffn_dim, "num_local_experts": cfg.n_experts or 1}
    return hf


def config_from_hf(hf, generation=None):
    """The dict of a config.json, and that of a generation_config.json for its end tokens -> LlamaConfig.

    Keys mean what they mean to transformers 5 (configuration_llama.py, configuration_llama4.py). Raises ValueError,
    naming the key, for what is not supported."""
    family = hf.get("model_type")
    if family not in ("llama", "llama4", "llama4_text"):
        raise ValueError(f"config.json: model_type {family!r} is not supported: it takes llama, llama4 and llama4_text")
    try:
        text = (hf.get("text_config") or {}) if family == "llama4" else hf  # beside it: vision_config
        if set(hf.get("architectures") or ()) - ARCHITECTURES:
            raise ValueError(f"architectures {hf['architectures']} is none of {', '.join(sorted(ARCHITECTURES))}")
        if not isinstance(text, dict):
            raise ValueError(f"text_config {text!r} is no object")
        _refuse_unsupported(hf)
        _refuse_unsupported(text)
        cfg = LlamaConfig(**_common_fields(text, LLAMA_KEYS, 10000.0)) if family == "llama" else _llama4_config(text)
        ends = _token_ids((generation or {}).get("eos_token_id"))
        if "eos_token_id" in text or not ends:
            ends = cfg.eos_ids + ends
        return replace(cfg, eos_ids=tuple(dict.fromkeys(ends)))  # each once, in order
    except (ValueError, TypeError) as e:
        raise ValueError(f"config.json: {e}") from None


def _refuse_unsupported(hf):
    """Raise ValueError for a value of a key in SUPPORTED that is not supported."""
    for key, supported in SUPPORTED.items():
        if hf.get(key, supported[0]) not in supported:
            raise ValueError(f"{key} {hf[key]!r} is not supported; {supported[0]!r} is")


def _common_fields(hf, keys, rope_theta):
    """{field: value} of LlamaConfig, for what all families have. rope_theta: the default if there is none."""
    fields = {"eos_ids": _token_ids(hf.get("eos_token_id", 2))}
    for field, (key, default) in keys.items():
        value = hf.get(key, default)
        if value is None and (default is None or field in ("chunk", "bos_id")):
            continue  # LlamaConfig's own: as many as query heads, dim / n_head, full attention, no BOS
        expected = int if default is None else type(default)
        may_be_zero = expected is not int or field == "bos_id"
        if type(value) is not expected or (value < 1 and not may_be_zero):
            raise ValueError(f"{key} ({field}) must be a positive {expected.__name__}, not {value!r}")
        fields[field] = value
    pad, vocab_size = hf.get("pad_token_id"), fields["vocab_size"]
    if pad is not None and not (type(pad) is int and -vocab_size <= pad < vocab_size):
        raise ValueError(f"pad_token_id {pad!r} is none of vocab_size={vocab_size} tokens")
    fields["rope_theta"], fields["rope_scaling"] = _read_rope(hf, rope_theta, fields["context"])
    return fields


def _token_ids(ids):
    """A number, a list of them, or None -> tuple."""
    return () if ids is None else tuple(ids) if isinstance(ids, list) else (ids,)


def _read_rope(hf, theta, context):
    """(rope_theta, rope_scaling) of a config.json. `rope_scaling` (transformers 4) overrules `rope_parameters` (5)."""
    rope = hf.get("rope_scaling") or hf.get("rope_parameters")
    rope = {} if rope is None else rope
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise ValueError(f"rope_parameters {rope} is no object of numbers; RoPE by type of layer is not supported")
    _refuse_unsupported(rope)
    theta = rope.get("rope_theta", hf.get("rope_theta", theta))
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type == "default":
        return theta, ()
    if rope_type == "linear":  # an original context of one position: no pair turns within it, so none is kept
        return theta, (rope.get("factor"), 1, 1, 1)
    if rope_type != "llama3":
        raise ValueError(f"rope_type {rope_type!r} is not supported; 'default', 'linear' and 'llama3' are")
    factor, low, high, original = (rope.get(key) for key in SCALING_KEYS)
    if None not in (low, high) and low > high:
        raise ValueError(f"low_freq_factor {low} is above high_freq_factor {high}")
    for given in (rope, hf):  # the top level of config.json overrules its dict
        context = given.get("original_max_position_embeddings", context)
    return theta, (factor, low, high, context)


def _llama4_config(hf):
    """LlamaConfig of a Llama 4's text model. What config.json lists for each layer overrules the intervals."""
    if hf.get("moe_layers") is not None:  # then these are not read, and may be 0
        unread = ("interleave_moe_layer_step", "num_local_experts", "num_experts_per_tok")
        hf = hf | dict.fromkeys(unread[:1] if hf["moe_layers"] else unread, 1)
    cfg = LlamaConfig(arch="llama4", **_common_fields(hf, LLAMA4_KEYS, 500000.0))
    layers = range(cfg.n_layer)

    def listed(key, kind):
        """The list of a key, None where it is left out."""
        values = hf.get(key)
        if values is not None and not (isinstance(values, list) and all(isinstance(v, kind) for v in values)):
            raise ValueError(f"{key} {values!r} is no list of {kind.__name__}")
        return values

    def interval(key, chosen):
        """n if exactly every n-th layer is chosen (a bool for each), 0 if none is."""
        n = chosen.index(True) + 1 if True in chosen else 0
        if chosen != [n > 0 and (i + 1) % n == 0 for i in layers]:
            raise ValueError(f"{key} {hf[key]} is no regular pattern of layers: every n-th is all that is supported")
        return n

    moe, rope, types = listed("moe_layers", int), listed("no_rope_layers", int), listed("layer_types", str)
    is_moe = [cfg.is_moe(i) if moe is None else i in moe for i in layers]
    is_nope = [not r for r in rope] if rope else [cfg.is_nope(i) for i in layers]  # 1 means that RoPE is used
    nope_every = interval("no_rope_layers", is_nope)
    full = ["full_attention"] * cfg.n_layer
    by_rope = ["chunked_attention" if cfg.chunk and not nope else "full_attention" for nope in is_nope]
    types = by_rope if types is None else types
    if types not in (by_rope, full):
        raise ValueError(f"layer_types {types} must be chunked_attention where RoPE is used, or nowhere")
    if types == full:
        cfg = replace(cfg, chunk=0)
    if not any(is_moe):
        cfg = replace(cfg, n_experts=0, top_k=1)
    tuning = hf.get("attn_temperature_tuning", True)  # transformers 4.51 wrote 4 for true
    if not isinstance(tuning, int):
        raise ValueError(f"attn_temperature_tuning must be true or false, not {tuning!r}")
    if not (tuning and nope_every):
        cfg = replace(cfg, attn_scale=0.0)
    return replace(cfg, moe_every=interval("moe_layers", is_moe) or 1, nope_every=nope_every)


def read_json(path):
    """The dict in a JSON file."""
    if not path.exists():
        raise FileNotFoundError(f"no {path.name} in {path.parent}")
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path} is not JSON: {e}") from None
    except OSError as e:
        raise ValueError(f"cannot read {path}: {e.strerror}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object")
    return value


def weight_files(directory):
    """The safetensors files of a checkpoint: the whole or, where there is none, the parts that an index names."""
    whole, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if whole.exists():
        return [whole]
    if not index.exists():
        raise FileNotFoundError(f"no model.safetensors in {directory} "
                                "(pickled weights are not read: they can run code)")
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise ValueError(f"{index} has no weight_map")
    return [directory / file for file in sorted({Path(str(file)).name for file in table.values()})]


def read_tensors(path, prefixes=("",)):
    """{name: tensor} of a safetensors file, or of all those of a checkpoint, whose names begin with one of prefixes."""
    tensors = {}
    for part in weight_files(path) if path.is_dir() else [path]:
        with opened(part) as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys() if name.startswith(prefixes)}
    return tensors


def _our_name(name, cfg, shapes):
    """The name here of a tensor that a file calls `name`; None for one that the language model does not use."""
    if name.endswith("rotary_emb.inv_freq"):  # transformers before 4.32 stored RoPE's frequencies
        return None
    if cfg.arch == "llama4":  # Llama4ForConditionalGeneration wraps the language model
        return None if name.startswith(VISION) else name.removeprefix("language_model.")
    names = name, f"model.{name}", name.removeprefix("model.")  # LlamaModel's have no prefix
    return next((n for n in names if n in shapes), name)


def _find_tensors(directory, cfg, shapes):
    """{name here: (path, name in the file, dtype, shape)} of exactly the names of `shapes` ({name: shape}), by the
    headers of a directory's safetensors files: what is wrong with them is found before anything is read."""
    found, head, embedding = {}, "lm_head.weight", "model.embed_tokens.weight"
    for path in weight_files(directory):
        with opened(path) as file:
            for name in file.keys():
                ours, part = _our_name(name, cfg, shapes), file.get_slice(name)
                if ours in found:
                    raise ValueError(f"{path}: {ours} is there twice, once as {name}")
                if ours is not None:
                    found[ours] = path, name, part.get_dtype(), tuple(part.get_shape())
    tied_head = found.pop(head, None) if cfg.tie_embeddings else None  # a file may have it, or have it alone
    if tied_head:
        _need_equal(directory, found.setdefault(embedding, tied_head), tied_head)
    absent = {head} if cfg.tie_embeddings else set()
    wrong = [f"{name} {dtype} {shape} for {tuple(shapes[name])}" for name, (*_, dtype, shape) in found.items()
             if name in shapes and (shape != tuple(shapes[name]) or dtype not in DTYPES)]
    refuse(directory, {"missing": shapes.keys() - found.keys() - absent, "unexpected": found.keys() - shapes.keys(),
                       "of the wrong shape or type": wrong})
    return found


def refuse(where, wrong):
    """Raise ValueError if any tensors are wrong: {what they are: their names}."""
    for what, names in wrong.items():
        if names:
            more = ", …" if len(names) > 5 else ""
            raise ValueError(f"{where}: {len(names)} tensors are {what}: {', '.join(sorted(names)[:5])}{more}")


@contextlib.contextmanager
def opened(path):
    """A safetensors file, open; what is wrong with it is a ValueError."""
    from safetensors import safe_open
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as e:
        raise ValueError(f"{path} is not a readable safetensors file: {e}") from None


def _need_equal(directory, embedding, head):
    """Raise ValueError if the embedding and the head, as in `_find_tensors`, are two matrices."""
    with opened(embedding[0]) as one, opened(head[0]) as two:
        same = embedding[2:] == head[2:] and torch.equal(one.get_tensor(embedding[1]), two.get_tensor(head[1]))
    if not same:
        raise ValueError(f"{directory}: tie_word_embeddings is true in config.json, but {head[1]} is not "
                         f"{embedding[1]}; false keeps both")


@torch.no_grad()
def _fill(llama, places):
    """Read each parameter, or the part of it that this process has, from where `_find_tensors` found it."""
    parameters = {name.replace(".base_layer", ""): p for name, p in llama.named_parameters()}  # of an adapted one
    for path in {path for path, *_ in places.values()}:
        with opened(path) as file:
            for ours, (where, name, *_) in places.items():
                if where == path:
                    put(parameters[ours], file.get_tensor(name))  # nothing of it is read before it is copied


# -- tensors by name, of a run that goes on -------------------------------------------------------------------------

def tensor_names(directory):
    """The names of all tensors in a directory of safetensors. Raises ValueError where there is nothing to read."""
    names, paths = set(), list(directory.glob("*.safetensors"))
    if not paths:
        raise ValueError(f"no tensors in {directory}")
    for path in paths:
        with opened(path) as file:
            names |= set(file.keys())
    return names


def save_parts(tensors, directory):
    """Write split tensors {name: tensor} into a new directory as safetensors, each process its own parts
    (torch.distributed.checkpoint). Raises OSError, on all of them, where one cannot write."""
    import torch.distributed.checkpoint as dcp
    with together():
        directory.mkdir(exist_ok=True)
    share = sum(t.numel() * t.itemsize for t in tensors.values()) // WORLD
    count = 1 + share // 2**28  # files of each process: the writer holds one in memory beside what it writes
    files = {name: 1 + i * count // len(tensors) for i, name in enumerate(sorted(tensors))}
    writer = dcp.HuggingFaceStorageWriter(str(directory), files, save_distributed=True)
    try:
        with _quiet():
            dcp.save(tensors, storage_writer=writer)
    except dcp.CheckpointException as e:  # a BaseException; it reaches every process
        raise OSError(first_line(next(iter(e.failures.values()))[0])) from None


def load_tensors(tensors, directory):
    """Fill {name: tensor}, or the parts of them that this process has, from what `write` or `save_parts` wrote."""
    one_file = directory / "model.safetensors"
    if one_file.exists() and not any(hasattr(t, "placements") for t in tensors.values()):
        with opened(one_file) as file:
            for name, t in tensors.items():
                t.copy_(file.get_tensor(name))
        return
    import torch.distributed.checkpoint as dcp  # seconds
    try:
        with _quiet():
            dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(directory)), no_dist=True)
    except dcp.CheckpointException as e:
        raise ValueError(first_line(next(iter(e.failures.values()))[0])) from None


@contextlib.contextmanager
def _quiet():
    """Without torch's warnings: that no processes are there, that other releases may read other files."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
