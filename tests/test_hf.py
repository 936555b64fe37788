"""Directories of Llamas as others write them: the logits of transformers, or one line that names what is not supported.

VARIANTS is the list of what config.json may say, TENSORS of what the weights may look like, FILES of what else may lie
in the directory. Each variant names what is right: SAME, the logits of transformers, or words of our one line. Nothing
may open here that transformers refuses, or that it fills with random weights. Written for transformers 5.24. Version 4
knows no rope_parameters, takes the embedding for a tied head that differs, and null for Llama 4's kv heads and
head_dim: the last two are lines here.
"""
import http.server
import json
import re
import shutil
import threading

import pytest
import torch
from conftest import need_transformers_5_24
from safetensors.torch import load_file, save_file

from checkpoint import find_checkpoint
from model import Llama, LlamaConfig

transformers = pytest.importorskip("transformers", reason="needs transformers, the oracle of these tests")
transformers.logging.set_verbosity(transformers.logging.CRITICAL)
transformers.logging.disable_progress_bar()

SAME = ()  # no words: it opens
GONE = object()  # a key that the variant leaves out
LENGTH = 24  # positions compared: several chunks, and beyond the original context of the scaled RoPEs
LLAMA = dict(
    model_type="llama", architectures=["LlamaForCausalLM"], vocab_size=48, hidden_size=32, intermediate_size=40,
    num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-5,
    tie_word_embeddings=False, rope_theta=10000.0, hidden_act="silu", bos_token_id=1, eos_token_id=2)
LLAMA4 = dict(
    model_type="llama4_text", architectures=["Llama4ForCausalLM"], vocab_size=48, hidden_size=32, intermediate_size=24,
    intermediate_size_mlp=40, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    max_position_embeddings=64, rms_norm_eps=1e-5, num_local_experts=3, num_experts_per_tok=1,
    interleave_moe_layer_step=2, no_rope_layer_interval=4, attention_chunk_size=5, use_qk_norm=True,
    attn_temperature_tuning=True, attn_scale=0.2, floor_scale=3, rope_theta=500000.0, tie_word_embeddings=False,
    hidden_act="silu", bos_token_id=1, eos_token_id=2)
VISION = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=128, image_size=28,
              patch_size=14, vision_output_dim=64, projector_input_dim=64, projector_output_dim=64)
WHOLE = dict(model_type="llama4", architectures=["Llama4ForConditionalGeneration"], text_config=LLAMA4,
             vision_config=VISION, boi_token_index=4, eoi_token_index=5, image_token_index=6)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=16)
STEP = LLAMA3 | dict(low_freq_factor=1.0, high_freq_factor=1.0)
HEAD, EMBEDDING, NORM = "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"
YARN = dict(type="yarn", factor=2.0, original_max_position_embeddings=16)


def changed(what, **changes):
    """A dict with some of its keys changed, or left out where the change is GONE."""
    return {k: v for k, v in (what | changes).items() if v is not GONE}


VARIANTS = {
    # sizes
    "plain": (LLAMA, {}, SAME),
    "no kv heads: one for each query head": (LLAMA, dict(num_key_value_heads=GONE), SAME),
    "kv heads null": (LLAMA, dict(num_key_value_heads=None), SAME),
    "kv heads 0": (LLAMA, dict(num_key_value_heads=0), ("num_key_value_heads",)),
    "head_dim null": (LLAMA, dict(head_dim=None), SAME),
    "head_dim of its own": (LLAMA, dict(head_dim=16), SAME),
    "head_dim 0": (LLAMA, dict(head_dim=0), ("head_dim",)),
    "head_dim odd": (LLAMA, dict(head_dim=7), ("head_dim",)),
    "no eps: 1e-6": (LLAMA, dict(rms_norm_eps=GONE), SAME),
    "large eps": (LLAMA, dict(rms_norm_eps=0.1), SAME),
    "no context: 2048": (LLAMA, dict(max_position_embeddings=GONE), SAME),
    "no vocab_size: 32000": (LLAMA, dict(vocab_size=GONE), SAME),
    "no layers": (LLAMA, dict(num_hidden_layers=None), ("num_hidden_layers",)),
    "a size in quotes": (LLAMA, dict(hidden_size="32"), ("hidden_size",)),
    "heads that do not divide": (LLAMA, dict(num_attention_heads=5), ("n_head",)),
    # what a block computes
    "swish is silu": (LLAMA, dict(hidden_act="swish"), SAME),
    "gelu": (LLAMA, dict(hidden_act="gelu"), ("hidden_act", "gelu")),
    "biases in attention": (LLAMA, dict(attention_bias=True), ("attention_bias",)),
    "biases in the MLP": (LLAMA, dict(mlp_bias=True), ("mlp_bias",)),
    "not causal": (LLAMA, dict(is_causal=False), ("is_causal",)),
    "sliding window": (LLAMA, dict(sliding_window=4), ("sliding_window",)),
    "sliding window null": (LLAMA, dict(sliding_window=None), SAME),
    "layers that differ": (LLAMA, dict(per_layer_config={"0": {"intermediate_size": 8}}), ("per_layer_config",)),
    "pretraining_tp": (LLAMA, dict(pretraining_tp=2), SAME),
    "dropout, which is for training": (LLAMA, dict(attention_dropout=0.5), SAME),
    "keys of other tools": (LLAMA, dict(unsloth_version="2025.1", use_cache=False, torch_dtype="bfloat16"), SAME),
    "quantized": (LLAMA, dict(quantization_config={"quant_method": "fp8"}), ("quantization_config",)),
    "weights in another file": (LLAMA, dict(transformers_weights="a.safetensors"), ("transformers_weights",)),
    # tied embeddings
    "tied": (LLAMA, dict(tie_word_embeddings=True), SAME),
    "no flag: untied": (LLAMA, dict(tie_word_embeddings=GONE), SAME),
    "flag null": (LLAMA, dict(tie_word_embeddings=None), ("tie_word_embeddings",)),
    # tokens
    "padding": (LLAMA, dict(pad_token_id=3), SAME),
    "padding -1": (LLAMA, dict(pad_token_id=-1), SAME),
    "padding null": (LLAMA, dict(pad_token_id=None), SAME),
    "padding beyond the vocabulary": (LLAMA, dict(pad_token_id=48), ("pad_token_id",)),
    "EOS in quotes": (LLAMA, dict(eos_token_id="</s>"), ("eos_ids",)),
    "EOS with null": (LLAMA, dict(eos_token_id=[2, None]), ("eos_ids",)),
    "BOS a list": (LLAMA, dict(bos_token_id=[1]), ("bos_token_id",)),
    # RoPE
    "theta": (LLAMA, dict(rope_theta=500.0), SAME),
    "theta a whole number": (LLAMA, dict(rope_theta=500), SAME),
    "no theta: 10000": (LLAMA, dict(rope_theta=GONE), SAME),
    "theta null": (LLAMA, dict(rope_theta=None), ("rope_theta",)),
    "theta in rope_parameters": (LLAMA, dict(rope_theta=GONE, rope_parameters=dict(rope_theta=500.0)), SAME),
    "theta in both: rope_parameters counts": (LLAMA, dict(rope_parameters=dict(rope_theta=500.0)), SAME),
    "theta in rope_scaling": (LLAMA, dict(rope_scaling=LLAMA3 | dict(rope_theta=500.0)), SAME),
    "scaling null": (LLAMA, dict(rope_scaling=None), SAME),
    "scaling {}": (LLAMA, dict(rope_scaling={}), SAME),
    "scaling {}, parameters llama3": (LLAMA, dict(rope_scaling={}, rope_parameters=LLAMA3), SAME),
    "parameters {}": (LLAMA, dict(rope_parameters={}), SAME),
    "parameters null": (LLAMA, dict(rope_parameters=None), SAME),
    "parameters a list": (LLAMA, dict(rope_parameters=[]), ("rope_parameters",)),
    "scaling default": (LLAMA, dict(rope_scaling=dict(rope_type="default")), SAME),
    "default with a factor, which does nothing": (LLAMA, dict(rope_scaling=dict(type="default", factor=4.0)), SAME),
    "no type: default": (LLAMA, dict(rope_scaling=dict(factor=4.0)), SAME),
    "type null": (LLAMA, dict(rope_scaling=dict(rope_type=None, factor=4.0)), ("rope_type",)),
    "llama3": (LLAMA, dict(rope_scaling=LLAMA3), SAME),
    "llama3, old spelling": (LLAMA, dict(rope_scaling=changed(LLAMA3, rope_type=GONE, type="llama3")), SAME),
    "llama3 in rope_parameters": (LLAMA, dict(rope_parameters=LLAMA3), SAME),
    "llama3, whole numbers": (LLAMA, dict(rope_scaling=LLAMA3 | dict(factor=8, low_freq_factor=1, high_freq_factor=4)),
                              SAME),
    "llama3, low = high": (LLAMA, dict(rope_scaling=STEP), SAME),
    "llama3, low > high": (LLAMA, dict(rope_scaling=LLAMA3 | dict(low_freq_factor=5.0)), ("low_freq_factor",)),
    "llama3, factor below 1": (LLAMA, dict(rope_scaling=LLAMA3 | dict(factor=0.5)), SAME),
    "llama3, factor 0": (LLAMA, dict(rope_scaling=LLAMA3 | dict(factor=0.0)), ("rope_scaling",)),
    "llama3, factor in quotes": (LLAMA, dict(rope_scaling=LLAMA3 | dict(factor="8")), ("rope_scaling",)),
    "llama3 without low_freq_factor": (LLAMA, dict(rope_scaling=changed(LLAMA3, low_freq_factor=GONE)),
                                       ("rope_scaling",)),
    "llama3 without its original context: max_position_embeddings": (
        LLAMA, dict(rope_scaling=changed(LLAMA3, original_max_position_embeddings=GONE)), SAME),
    "llama3, the original context at the top counts": (
        LLAMA, dict(rope_scaling=LLAMA3, original_max_position_embeddings=48), SAME),
    "both: rope_scaling counts": (LLAMA, dict(rope_scaling=LLAMA3, rope_parameters=dict(rope_type="default")), SAME),
    "both: and the theta of rope_parameters does not": (
        LLAMA, dict(rope_theta=GONE, rope_scaling=LLAMA3, rope_parameters=dict(rope_theta=500.0)), SAME),
    "both: yarn beside default": (LLAMA, dict(rope_scaling=YARN, rope_parameters=dict(
        rope_type="default", rope_theta=10000.0)), ("yarn",)),
    "both types: rope_type counts": (LLAMA, dict(rope_scaling=dict(type="yarn", rope_type="linear", factor=2.0)), SAME),
    "linear": (LLAMA, dict(rope_scaling=dict(type="linear", factor=4.0)), SAME),
    "linear, a whole number": (LLAMA, dict(rope_parameters=dict(rope_type="linear", factor=3)), SAME),
    "linear without a factor": (LLAMA, dict(rope_scaling=dict(type="linear")), ("rope_scaling",)),
    "dynamic": (LLAMA, dict(rope_scaling=dict(type="dynamic", factor=2.0)), ("dynamic",)),
    "yarn": (LLAMA, dict(rope_scaling=YARN), ("yarn",)),
    "longrope": (LLAMA, dict(rope_scaling=dict(
        rope_type="longrope", factor=2.0, short_factor=[1.0] * 4, long_factor=[2.0] * 4,
        original_max_position_embeddings=16)), ("longrope",)),
    "proportional": (LLAMA, dict(rope_parameters=dict(rope_type="proportional", rope_theta=1e4)), ("proportional",)),
    "a type nobody knows": (LLAMA, dict(rope_scaling=dict(type="su", factor=2.0)), ("su",)),
    "a type for each kind of layer": (LLAMA, dict(
        layer_types=["full_attention"] * 2, rope_parameters={"full_attention": LLAMA3}), ("rope_parameters",)),
    "partial RoPE": (LLAMA, dict(partial_rotary_factor=0.5), ("partial_rotary_factor",)),
    "partial RoPE in rope_parameters": (LLAMA, dict(rope_parameters=LLAMA3 | dict(partial_rotary_factor=0.5)),
                                        ("partial_rotary_factor",)),
    "all of RoPE": (LLAMA, dict(partial_rotary_factor=1.0), SAME),
    # families
    "no model_type": (LLAMA, dict(model_type=GONE), ("model_type",)),
    "no architectures": (LLAMA, dict(architectures=GONE), SAME),
    "architectures null": (LLAMA, dict(architectures=None), SAME),
    "a model without a head": (LLAMA, dict(architectures=["LlamaModel"]), ("LlamaModel",)),
    "a classifier": (LLAMA, dict(architectures=["LlamaForSequenceClassification"]), ("SequenceClassification",)),
    "mistral": (LLAMA, dict(model_type="mistral", architectures=["MistralForCausalLM"]), ("mistral",)),
    "qwen2": (LLAMA, dict(model_type="qwen2", architectures=["Qwen2ForCausalLM"]), ("qwen2",)),
    "mistral's architecture": (LLAMA, dict(architectures=["MistralForCausalLM"]), ("MistralForCausalLM",)),
    # Llama 4
    "4": (LLAMA4, {}, SAME),
    "4 widths of no 16 bytes": (LLAMA4, dict(hidden_size=34, num_attention_heads=2, intermediate_size=23), SAME),
    "4 kv heads null": (LLAMA4, dict(num_key_value_heads=None), ("num_key_value_heads",)),
    "4 head_dim null": (LLAMA4, dict(head_dim=None), ("head_dim",)),
    "4 no head_dim: 128": (LLAMA4, dict(head_dim=GONE), SAME),
    "4 no theta: 500000": (LLAMA4, dict(rope_theta=GONE), SAME),
    "4 scaled": (LLAMA4, dict(rope_scaling=STEP), SAME),
    "4 linear": (LLAMA4, dict(rope_scaling=dict(type="linear", factor=2.0)), SAME),
    "4 yarn": (LLAMA4, dict(rope_parameters=YARN), ("yarn",)),
    "4 tied": (LLAMA4, dict(tie_word_embeddings=True), SAME),
    "4 biases in attention": (LLAMA4, dict(attention_bias=True), ("attention_bias",)),
    "4 every layer a mixture": (LLAMA4, dict(interleave_moe_layer_step=1), SAME),
    "4 no step: every layer": (LLAMA4, dict(interleave_moe_layer_step=GONE), SAME),
    "4 step beyond the layers: all dense": (LLAMA4, dict(interleave_moe_layer_step=9), SAME),
    "4 step 0": (LLAMA4, dict(interleave_moe_layer_step=0), ("interleave_moe_layer_step",)),
    "4 mixtures listed": (LLAMA4, dict(moe_layers=[0, 1, 2, 3]), SAME),
    "4 mixtures listed in any order, and beyond the layers": (LLAMA4, dict(moe_layers=[7, 3, 5, 1]), SAME),
    "4 no mixtures listed": (LLAMA4, dict(moe_layers=[]), SAME),
    "4 mixtures listed, step 0": (LLAMA4, dict(moe_layers=[1, 3], interleave_moe_layer_step=0), SAME),
    "4 mixtures listed, 0 a token": (LLAMA4, dict(moe_layers=[1, 3], num_experts_per_tok=0), ("num_experts_per_tok",)),
    "4 dense, with zeros": (LLAMA4, dict(moe_layers=[], interleave_moe_layer_step=0, num_local_experts=0,
                                         num_experts_per_tok=0), SAME),
    "4 mixtures null: by the step": (LLAMA4, dict(moe_layers=None), SAME),
    "4 mixtures without a pattern": (LLAMA4, dict(moe_layers=[0, 3]), ("moe_layers",)),
    "4 mixtures no list": (LLAMA4, dict(moe_layers=3), ("moe_layers",)),
    "4 two experts a token": (LLAMA4, dict(num_experts_per_tok=2), SAME),
    "4 more experts a token than there are": (LLAMA4, dict(num_experts_per_tok=4), ("top_k",)),
    "4 two experts a token, and no mixture": (LLAMA4, dict(num_experts_per_tok=2, moe_layers=[]), SAME),
    "4 jitter, which is for training": (LLAMA4, dict(router_jitter_noise=0.5), SAME),
    "4 RoPE by the interval": (LLAMA4, dict(no_rope_layer_interval=2), SAME),
    "4 RoPE nowhere": (LLAMA4, dict(no_rope_layer_interval=1), SAME),
    "4 interval beyond the layers: RoPE everywhere": (LLAMA4, dict(no_rope_layer_interval=9), SAME),
    "4 interval 0": (LLAMA4, dict(no_rope_layer_interval=0), ("no_rope_layer_interval",)),
    "4 no interval: 4": (LLAMA4, dict(no_rope_layer_interval=GONE), SAME),
    "4 RoPE listed": (LLAMA4, dict(no_rope_layers=[1, 0, 1, 0]), SAME),
    "4 RoPE listed []: by the interval": (LLAMA4, dict(no_rope_layers=[]), SAME),
    "4 RoPE listed for more layers": (LLAMA4, dict(no_rope_layers=[1, 1, 0, 1, 1, 0]), ("no_rope_layers",)),
    "4 RoPE listed for fewer layers": (LLAMA4, dict(no_rope_layers=[1, 1, 0]), ("no_rope_layers",)),
    "4 RoPE without a pattern": (LLAMA4, dict(no_rope_layers=[0, 1, 1, 0]), ("no_rope_layers",)),
    "4 layer_types as they come": (LLAMA4, dict(layer_types=["chunked_attention"] * 3 + ["full_attention"]), SAME),
    "4 layer_types null": (LLAMA4, dict(layer_types=None), SAME),
    "4 all full": (LLAMA4, dict(layer_types=["full_attention"] * 4), SAME),
    "4 all chunked": (LLAMA4, dict(layer_types=["chunked_attention"] * 4), ("layer_types",)),
    "4 sliding": (LLAMA4, dict(layer_types=["sliding_attention"] * 4), ("layer_types",)),
    "4 chunk null: all full": (LLAMA4, dict(attention_chunk_size=None), SAME),
    "4 chunk null, layers chunked": (LLAMA4, dict(attention_chunk_size=None, layer_types=[
        "chunked_attention"] * 3 + ["full_attention"]), ("layer_types",)),
    "4 chunk 0": (LLAMA4, dict(attention_chunk_size=0), ("attention_chunk_size",)),
    "4 no chunk: 8192": (LLAMA4, dict(attention_chunk_size=GONE), SAME),
    "4 chunk beyond the context": (LLAMA4, dict(attention_chunk_size=1000), SAME),
    "4 no norm of q and k": (LLAMA4, dict(use_qk_norm=False), SAME),
    "4 no temperature": (LLAMA4, dict(attn_temperature_tuning=False), SAME),
    "4 temperature null": (LLAMA4, dict(attn_temperature_tuning=None), ("attn_temperature_tuning",)),
    "4 temperature's scale 0": (LLAMA4, dict(attn_scale=0.0), SAME),
    "4 temperature by default": (LLAMA4, dict(attn_temperature_tuning=GONE, attn_scale=GONE, floor_scale=GONE), SAME),
    "4 floor_scale 0": (LLAMA4, dict(floor_scale=0), ("floor_scale",)),
    "4 whole": (WHOLE, {}, SAME),
    "4 whole, text a list": (WHOLE, dict(text_config=[1]), ("text_config",)),
    "4 whole, tied": (WHOLE, dict(text_config=LLAMA4 | dict(tie_word_embeddings=True)), SAME),
    "4 whole, tied outside only": (WHOLE, dict(tie_word_embeddings=True), SAME),
    "4 whole, text of no type": (WHOLE, dict(text_config=changed(LLAMA4, model_type=GONE)), SAME),
    "4 whole, quantized": (WHOLE, dict(quantization_config={"quant_method": "fp8"}), ("quantization_config",)),
    "4 whole, text quantized": (WHOLE, dict(text_config=LLAMA4 | dict(quantization_config={"quant_method": "fp8"})),
                                ("quantization_config",)),
}


def draw(hf):
    """A model of transformers with random weights that make distinct logits."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in hf.named_parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (0.1 if "norm" in name else 0.3) + ("norm" in name))
    return hf


def from_config(config):
    """A model of transformers for the dict of a config.json."""
    known = transformers.AutoConfig.for_model(**json.loads(json.dumps(config)))  # a copy: it writes into dicts
    if config["model_type"] == "llama4":
        return transformers.Llama4ForConditionalGeneration(known)
    return transformers.AutoModelForCausalLM.from_config(known)


def write(folder, config):
    """A directory with this config.json and weights that fit it; those of the base where transformers refuses it."""
    try:
        hf = from_config(config)
    except Exception:  # of many kinds
        hf = from_config({"llama4": WHOLE, "llama4_text": LLAMA4}.get(config.get("model_type"), LLAMA))
    tied = hf.config.get_text_config().tie_word_embeddings
    tensors = {n: t for n, t in draw(hf).state_dict().items() if not (tied and n.endswith(HEAD))}
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


IDS = torch.randint(48, (2, LENGTH), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def theirs(folder):
    """Logits of transformers in float32, or None for what it refuses or fills with random weights."""
    try:
        hf, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
        return None if info["missing_keys"] else hf.eval()(IDS).logits
    except Exception:  # each of its kinds of refusal
        return None


@torch.no_grad()
def ours(folder):
    """(our logits in float32, None) or (None, our one line)."""
    try:
        return Llama.from_pretrained(folder, dtype=torch.float32)(IDS)[0], None
    except (ValueError, FileNotFoundError) as e:
        return None, str(e)


def compare(folder, words):
    """Hold a directory against transformers: SAME logits, or words in one line."""
    got, line = ours(folder)
    if words:
        assert line is not None and "\n" not in line and all(word in line for word in words), line
    else:
        want = theirs(folder)
        assert line is None and want is not None, line
        assert want.std() > 0.1 and (got - want).abs().max() <= 1e-5 * want.abs().max()


# -- config.json -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", VARIANTS)
def test_config_json(name, tmp_path):
    base, change, words = VARIANTS[name]
    if name == "4 chunk null: all full":
        need_transformers_5_24()
    compare(write(tmp_path, changed(base, **change)), words)


# -- tensors -----------------------------------------------------------------------------------------------------

TIED, TIED4 = LLAMA | dict(tie_word_embeddings=True), LLAMA4 | dict(tie_word_embeddings=True)


def renamed(function):
    """A change of tensors: other names."""
    return lambda t: {function(name): tensor for name, tensor in t.items()}


def cast(dtype, part=""):
    """A change of tensors: another dtype, of those whose name has this part."""
    return lambda t: {n: x.to(dtype) if part in n else x for n, x in t.items()}


def without(name):
    return lambda t: {n: x for n, x in t.items() if n != name}


TENSORS = {
    "tied, the head too, the same": (TIED, lambda t: t | {HEAD: t[EMBEDDING].clone()}, SAME),
    "tied, the head too, another": (TIED, lambda t: t | {HEAD: t[EMBEDDING] + 1}, ("tie_word_embeddings", HEAD)),
    "tied, the head too, nearly the same": (TIED, lambda t: t | {HEAD: t[EMBEDDING] * 1.001}, ("tie_word_embeddings",)),
    "tied, the head too, of another dtype": (TIED, lambda t: t | {HEAD: t[EMBEDDING].bfloat16()}, (HEAD,)),
    "tied, only the head": (TIED, renamed(lambda n: HEAD if n == EMBEDDING else n), SAME),
    "tied, neither": (TIED, without(EMBEDDING), ("missing", EMBEDDING)),
    "untied without a head": (LLAMA, without(HEAD), ("missing", HEAD)),
    "4 tied, the head too, another": (TIED4, lambda t: t | {HEAD: t[EMBEDDING] + 1}, ("tie_word_embeddings", HEAD)),
    "one missing": (LLAMA, without(NORM), ("missing", NORM)),
    "one too many": (LLAMA, lambda t: t | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)},
                     ("unexpected", "q_proj.bias")),
    "more layers than the config": (LLAMA, lambda t: t | {n.replace(".1.", ".2."): x.clone() for n, x in t.items()
                                                          if ".1." in n}, ("unexpected", "model.layers.2")),
    "another shape": (LLAMA, lambda t: t | {NORM: torch.ones(31)}, (NORM, "(31,)", "(32,)")),
    "old frequencies": (LLAMA, lambda t: t | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}, SAME),
    "no prefix": (LLAMA, renamed(lambda n: n.removeprefix("model.")), SAME),
    "no prefix, tied": (TIED, renamed(lambda n: n.removeprefix("model.")), SAME),
    "one prefix more": (LLAMA, renamed(lambda n: f"model.{n}"), SAME),
    "another prefix": (LLAMA, renamed(lambda n: f"base.{n}"), ("missing",)),
    "Llama 4's prefix in a Llama": (LLAMA, renamed(lambda n: f"language_model.{n}"), ("missing",)),
    "with and without prefix": (LLAMA, lambda t: t | {"norm.weight": t[NORM] + 1}, ("twice", NORM)),
    "float16": (LLAMA, cast(torch.float16), SAME),
    "bfloat16": (LLAMA, cast(torch.bfloat16), SAME),
    "float64": (LLAMA, cast(torch.float64), SAME),
    "norms of another dtype": (LLAMA, cast(torch.bfloat16, "proj"), SAME),
    "float8": (LLAMA, cast(torch.float8_e4m3fn, "q_proj"), ("q_proj", "float8")),
    "int8": (LLAMA, cast(torch.int8, "q_proj"), ("q_proj", "int8")),
    "4 with the prefix of the whole": (LLAMA4, renamed(lambda n: f"language_model.{n}"), SAME),
    "4 no prefix": (LLAMA4, renamed(lambda n: n.removeprefix("model.")), ("missing",)),
    "4 an expert missing": (LLAMA4, without("model.layers.1.feed_forward.experts.down_proj"), ("missing", "down_proj")),
    "4 experts one by one": (LLAMA4, renamed(lambda n: n.replace("experts.down", "experts.0.down")), ("missing",)),
    "4 whole, names of the text": (WHOLE, renamed(lambda n: n.removeprefix("language_model.")), SAME),
    "4 whole, one prefix more": (WHOLE, renamed(lambda n: f"model.{n}"), ("missing",)),
    "4 whole, only the text": (WHOLE, lambda t: {n: x for n, x in t.items() if n.startswith("language_model.")}, SAME),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors(name, tmp_path):
    config, change, words = TENSORS[name]
    write(tmp_path, config)
    tensors = change(load_file(tmp_path / "model.safetensors"))
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    compare(tmp_path, words)


@pytest.mark.parametrize("dtypes, kept", [
    ((torch.float32,), torch.float32), ((torch.float16,), torch.float16), ((torch.bfloat16,), torch.bfloat16),
    ((torch.float64,), torch.float64), ((torch.bfloat16, torch.float32), torch.float32),
    ((torch.bfloat16, torch.float16), torch.float32), ((torch.float16, torch.float64), torch.float64)])
def test_the_dtype_that_is_kept_holds_all_of_the_files(dtypes, kept, tmp_path):
    tensors = load_file(write(tmp_path, LLAMA) / "model.safetensors")
    tensors = {n: x.to(dtypes[i % len(dtypes)]) for i, (n, x) in enumerate(tensors.items())}
    save_file(tensors, tmp_path / "model.safetensors")
    found = Llama.from_pretrained(tmp_path)
    assert {p.dtype for p in found.parameters()} == {kept}
    assert found(IDS)[0].isfinite().all()


# -- files -------------------------------------------------------------------------------------------------------

def sharded(folder):
    hf = from_config(LLAMA)
    draw(hf).save_pretrained(folder, max_shard_size="10KB")
    (folder / "model.safetensors").unlink()
    assert len(list(folder.glob("model-*.safetensors"))) > 2


def index_of(folder, **table):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))


def move(folder, name):
    (folder / "model.safetensors").rename(folder / name)


def one_shard(folder, name, listed=None):
    move(folder, name)
    index_of(folder, **{NORM: listed or name})


FILES = {
    "parts and an index": (sharded, SAME),
    "one part, another name": (lambda d: one_shard(d, "weights.safetensors"), SAME),
    "the whole, and an index of nothing": (lambda d: index_of(d, a="nothing.safetensors"), SAME),
    "a part that is absent": (lambda d: one_shard(d, "a.safetensors", "b.safetensors"), ("b.safetensors",)),
    "a part outside": (lambda d: one_shard(d, "a.safetensors", "../b.safetensors"), ("b.safetensors",)),
    "an index of nothing": (lambda d: (move(d, "a.safetensors"), index_of(d)), ("weight_map",)),
    "an index that is no JSON": (lambda d: (move(d, "a"), (d / "model.safetensors.index.json").write_text("{")),
                                 ("index.json",)),
    "parts of pickles": (lambda d: move(d, "pytorch_model.bin.index.json"), ("no model.safetensors", "pickled")),
    "a variant": (lambda d: move(d, "model.fp16.safetensors"), ("no model.safetensors",)),
    "pickles": (lambda d: move(d, "pytorch_model.bin"), ("no model.safetensors", "pickled")),
    "no weights": (lambda d: move(d, "a.txt"), ("no model.safetensors",)),
    "weights cut": (lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:-9]),
                    ("model.safetensors is not a readable",)),
    "no config.json": (lambda d: (d / "config.json").unlink(), ("no config.json",)),
    "config.json no JSON": (lambda d: (d / "config.json").write_text("{"), ("config.json is not JSON",)),
    "config.json a folder": (lambda d: ((d / "config.json").unlink(), (d / "config.json").mkdir()), ("cannot read",)),
    "config.json a list": (lambda d: (d / "config.json").write_text("[]"), ("config.json holds no",)),
    "an adapter": (lambda d: ((d / "config.json").unlink(), (d / "adapter_config.json").write_text("{}"),
                              move(d, "adapter_model.safetensors")), ("adapter_config.json", "merge")),
    "an adapter beside the model": (lambda d: (d / "adapter_config.json").write_text("{}"), ("adapter_config.json",)),
    "4 whole without text_config: Scout's sizes": (
        lambda d: (write(d, WHOLE), (d / "config.json").write_text(json.dumps(changed(WHOLE, text_config=GONE)))),
        ("missing",)),
    "settings for generation": (lambda d: (d / "generation_config.json").write_text('{"temperature": 0.6}'), SAME),
}


@pytest.mark.parametrize("name", FILES)
def test_files(name, tmp_path):
    change, words = FILES[name]
    change(write(tmp_path, LLAMA))
    compare(tmp_path, words)


def test_scout_as_it_was_first_published(tmp_path):
    """Transformers 4.51 wrote the temperature's switch as a number, which the types of 5 do not allow."""
    scout = LLAMA4 | dict(moe_layers=[0, 1, 2, 3], no_rope_layers=[], interleave_moe_layer_step=1, rope_scaling=STEP,
                          for_llm_compressor=False, output_router_logits=False, eos_token_id=[2, 3])
    compare(write(tmp_path, scout), SAME)
    want, _ = ours(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(scout | dict(attn_temperature_tuning=4)))
    assert torch.equal(ours(tmp_path)[0], want)


@torch.no_grad()
def test_the_text_within_the_whole_llama4(tmp_path):
    """The class that the released files name, whose own forward needs pictures in some versions."""
    cls = transformers.Llama4ForConditionalGeneration
    hf = cls.from_pretrained(write(tmp_path, WHOLE), attn_implementation="eager").language_model.eval()
    want, (got, _) = hf(IDS).logits, ours(tmp_path)
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize("config, generation, ends", [
    (GONE, None, (2,)), (7, None, (7,)), ([7, 9], None, (7, 9)), ([], None, ()), (None, None, ()), (0, None, (0,)),
    (7, {}, (7,)), (7, {"eos_token_id": None}, (7,)), (7, {"eos_token_id": 7}, (7,)),
    (7, {"eos_token_id": [9, 7]}, (7, 9)), ([7, 7], {"eos_token_id": 9}, (7, 9)),
    (None, {"eos_token_id": [9, 8]}, (9, 8)), (GONE, {"eos_token_id": [9]}, (9,))])
def test_what_ends_a_generation(config, generation, ends, tmp_path):
    """generation_config.json's tokens, which are all that transformers knows, and those that config.json names."""
    write(tmp_path, changed(LLAMA, eos_token_id=config))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    found = Llama.from_pretrained(tmp_path)
    assert found.config.eos_ids == ends
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).generation_config.eos_token_id
    assert {theirs} - {None} <= set(ends) if not isinstance(theirs, list) else set(theirs) <= set(ends)
    found.save_pretrained(tmp_path / "again")
    assert Llama.from_pretrained(tmp_path / "again").config == found.config


# -- there and back ----------------------------------------------------------------------------------------------

@torch.no_grad()
@pytest.mark.parametrize("name", [n for n, (_, _, words) in VARIANTS.items() if words == SAME])
def test_what_we_write_opens_in_transformers(name, tmp_path):
    """And in the same way here, with the same logits, for all that can be read."""
    base, change, _ = VARIANTS[name]
    found = Llama.from_pretrained(write(tmp_path, changed(base, **change)), dtype=torch.float32)
    found.save_pretrained(tmp_path / "again")
    again = Llama.from_pretrained(tmp_path / "again")
    assert again.config == found.config
    want, got = theirs(tmp_path / "again"), again(IDS)[0]
    assert torch.equal(got, found(IDS)[0]) and (got - want).abs().max() <= 1e-5 * want.abs().max()


OURS = dict(vocab_size=48, n_layer=4, n_head=4, n_kv_head=2, dim=32, ffn_dim=40, context=64)
OURS4 = OURS | dict(arch="llama4", expert_dim=24, n_experts=3, moe_every=2, nope_every=4, chunk=5, qk_norm=True,
                    attn_scale=0.2, floor_scale=3)


@torch.no_grad()
@pytest.mark.parametrize("fields", [
    OURS, OURS | dict(tie_embeddings=True, eos_ids=(3, 2), bos_id=0), OURS | dict(rope_scaling=(4.0, 1.0, 1.0, 1.0)),
    OURS | dict(rope_scaling=(8.5, 1.5, 4.25, 16.5)), OURS4, OURS4 | dict(moe_every=9), OURS4 | dict(nope_every=9),
    OURS4 | dict(nope_every=9, moe_every=9, n_layer=2), OURS4 | dict(n_experts=0), OURS4 | dict(nope_every=1),
    OURS4 | dict(chunk=0), OURS4 | dict(nope_every=0, attn_scale=0.0), OURS4 | dict(chunk=0, nope_every=1, moe_every=1),
    OURS4 | dict(tie_embeddings=True, top_k=3, rope_scaling=(16.0, 1.0, 1.0, 8.0))])
def test_what_we_train_opens_in_transformers(fields, tmp_path):
    """Also where an interval is beyond the number of layers."""
    torch.manual_seed(0)
    trained = Llama(LlamaConfig(**fields)).eval()
    torch.nn.init.normal_(trained.lm_head.weight, std=0.3)
    trained.save_pretrained(tmp_path)
    compare(tmp_path, SAME)
    assert (trained(IDS)[0] - ours(tmp_path)[0]).abs().max() == 0


@pytest.mark.parametrize("base", [LLAMA, LLAMA | dict(rope_scaling=LLAMA3), TIED, LLAMA4,
                                  LLAMA4 | dict(rope_scaling=STEP), LLAMA4 | dict(moe_layers=[]), WHOLE])
@pytest.mark.parametrize("old", (False, True))
def test_what_transformers_writes_opens_here(base, old, tmp_path):
    """Its own spelling, and that of 4.x."""
    draw(from_config(base)).save_pretrained(tmp_path)
    if old:
        config = json.loads((tmp_path / "config.json").read_text())
        for part in (config, config.get("text_config", config)):
            rope = part.pop("rope_parameters", {})
            part |= {"torch_dtype": part.pop("dtype", "float32"), "rope_theta": rope.pop("rope_theta", GONE),
                     "rope_scaling": rope if rope.get("rope_type", "default") != "default" else None}
        (tmp_path / "config.json").write_text(json.dumps(config, default=lambda _: 10000.0))
    compare(tmp_path, SAME)


@torch.no_grad()
def test_large_weights_go_into_parts(tmp_path):
    """As transformers cuts them; nothing of what lay there before is read in their place."""
    small, other = Llama.from_pretrained(write(tmp_path, LLAMA)), tmp_path / "model.fp16.safetensors"
    shutil.copy(tmp_path / "model.safetensors", other)
    for size in ("10KB", "20KB", "5GB", "10KB"):
        small.save_pretrained(tmp_path, max_shard_size=size)
        parts = set(tmp_path.glob("*.safetensors")) - {other}
        assert other.exists()
        assert (len(parts) == 1) == (size == "5GB") == (not (tmp_path / "model.safetensors.index.json").exists())
        assert {p.stat().st_mode for p in parts} == {(tmp_path / "config.json").stat().st_mode}
        compare(tmp_path, SAME)
        assert torch.equal(Llama.from_pretrained(tmp_path)(IDS)[0], small(IDS)[0])
        with torch.no_grad():
            small.model.norm.weight += 0.1


# -- names of directories and of the hub -------------------------------------------------------------------------

class Hub(http.server.BaseHTTPRequestHandler):
    """A hub of our own: ann/open, ann/gated (its files want a token), ann/private (it is there with a token only)."""
    protocol_version = "HTTP/1.1"
    folder, seen = None, []

    def do_GET(self):
        commit, token = "0" * 40, self.headers.get("Authorization") == "Bearer secret"
        _, *words = self.path.partition("?")[0].split("/")
        owner_model = "/".join(words[2:4] if words[0] == "api" else words[:2])
        self.seen.append(self.path)
        if owner_model not in ("ann/open", "ann/gated") and not (owner_model == "ann/private" and token):
            return self.answer(401 if not token else 404, {"X-Error-Code": "RepoNotFound"})
        if words[4:5] == ["revision"]:
            return self.answer(200, body=json.dumps({"id": owner_model, "sha": commit, "siblings": []}).encode())
        if words[4:5] == ["tree"]:
            files = [p for p in self.folder.rglob("*") if p.is_file()]
            return self.answer(200, body=json.dumps([
                {"type": "file", "path": str(p.relative_to(self.folder)), "size": p.stat().st_size, "oid": p.name}
                for p in files]).encode())
        if owner_model == "ann/gated" and not token:
            return self.answer(401, {"X-Error-Code": "GatedRepo"})
        data = self.folder.joinpath(*words[4:]).read_bytes()
        self.answer(200, {"ETag": f'"{words[-1]}"', "X-Repo-Commit": commit}, data)

    do_HEAD = do_GET

    def answer(self, code, headers={}, body=b""):
        self.send_response(code)
        for name, value in (headers | {"Content-Length": str(len(body)), "Content-Type": "application/json"}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The only hub that huggingface_hub knows of, without a token."""
    constants = pytest.importorskip("huggingface_hub.constants")
    (tmp_path / "hub").mkdir()
    Hub.folder, Hub.seen = write(tmp_path / "hub", LLAMA), []
    for name in ("original/model.safetensors", "original/params.json", "original/tokenizer.model", "onnx/config.json",
                 "additional_chat_templates/rag.jinja", "consolidated.safetensors"):
        (Hub.folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(Hub.folder / "model.safetensors", Hub.folder / name)
    (Hub.folder / "pytorch_model.bin").write_bytes(b"pickle")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    serve_at(monkeypatch, f"http://127.0.0.1:{server.server_port}")
    monkeypatch.chdir(tmp_path)
    yield
    server.shutdown()


def serve_at(monkeypatch, url):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
                        url + "/{repo_id}/resolve/{revision}/{filename}")


def found(name):
    """The files that find_checkpoint finds, or its one line."""
    try:
        folder = find_checkpoint(name)
        return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    except FileNotFoundError as e:
        assert "\n" not in str(e)
        return str(e)


def test_names_of_the_hub(hub, tmp_path, monkeypatch):
    files = ["additional_chat_templates/rag.jinja", "config.json", "model.safetensors"]  # no pickle, no other format
    assert found("ann/open") == files and not any(
        other in path for path in Hub.seen for other in ("original", "onnx", "consolidated"))
    assert all(words in found("ann/gated") for words in ("no directory ann/gated", "is gated", "HF_TOKEN"))
    for name in ("ann/private", "ann/none", "org/nothere"):
        assert f"no directory {name}, and the hub has no public model of that name" in found(name)
    (tmp_path / "out/run").mkdir(parents=True)
    assert found("out/run") == []  # a directory comes first
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert found("ann/gated") == found("ann/private") == files
    monkeypatch.setattr(Hub, "do_GET", lambda self: self.answer(500))
    assert "no directory ann/other" in found("ann/other") and "does not answer" in found("ann/other")


@pytest.mark.parametrize("changes, why", [
    ({"model_type": "mistral"}, "model_type 'mistral'"), ({"hidden_act": "gelu"}, "hidden_act"),
    ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantization_config"),
    ({"quantization_config": {"quant_method": "everyllama", "bits": 8}}, None)])  # `decode.load_quantized` reads it
def test_weights_come_from_the_hub_once_their_config_is_known_to_be_read(hub, changes, why):
    (Hub.folder / "config.json").write_text(json.dumps(changed(LLAMA, **changes)))
    if why:
        with pytest.raises(ValueError, match=why):
            find_checkpoint("ann/open")
    assert why or "model.safetensors" in found("ann/open")
    assert any("model.safetensors" in path for path in Hub.seen) == (not why)


def test_a_model_of_the_hub_with_pickled_weights_alone_says_so(hub):
    (Hub.folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no model.safetensors .*pickled"):
        Llama.from_pretrained("ann/open")


def test_without_the_hub(hub, monkeypatch):
    files = found("ann/open")
    for offline in (False, True):
        serve_at(monkeypatch, "http://127.0.0.1:9")  # where nothing answers
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
        assert found("ann/open") == files  # the copy
        assert "no directory ann/other" in found("ann/other") and "does not answer" in found("ann/other")


@pytest.mark.parametrize("name", ["nothere", "/tmp/nothere", "./nothere", "../nothere", "~/nothere", "a/b/c", "out/",
                                  "a b/c", "-/-", "out/run..", ".git/x", "a\\b/c", "llama.gguf"])
def test_names_that_the_hub_cannot_have(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    serve_at(monkeypatch, "http://127.0.0.1:9")
    with pytest.raises(FileNotFoundError, match=f"^no directory {re.escape(name)}$"):
        Llama.from_pretrained(name)


def test_a_file_in_place_of_a_directory(tmp_path):
    folder = write(tmp_path, LLAMA)
    with pytest.raises(FileNotFoundError, match="no directory .*model.safetensors"):
        Llama.from_pretrained(folder / "model.safetensors")
    assert Llama.from_pretrained(str(folder)).config == Llama.from_pretrained(folder).config
