"""Weights that others keep in other layouts, as a run directory: config.json, model.safetensors and the tokenizer."""
import shlex
from pathlib import Path

import config


def halves(weight, n_head):
    """Rows of a q_proj or k_proj (n_head·d, D) from Meta's RoPE layout, pairs side by side, to Hugging Face's, pairs
    half a head apart. llama2.c and GGUF files have the former; without this they load and talk nonsense."""
    return weight.unflatten(0, (n_head, -1, 2)).transpose(1, 2).flatten(0, 2)


def own_folder(out):
    """The folder `out` to write to. Raises `config.Mistake` where it is a file, or holds a run that was trained, or a
    data set: they would lose their weights or their tokenizer."""
    if Path(out).is_file():
        raise config.Mistake(f"--out {out} is a file: choose a folder")
    whose = {"checkpoints": "run that was trained", "run.json": "run that was trained", "meta.json": "data set"}
    for name in whose:
        if Path(out, name).exists():
            raise config.Mistake(f"--out {out} holds a {whose[name]}: choose another folder")
    return out


def need_fit(tok, vocab_size):
    """Raise `config.Mistake` where a text can become tokens that a model of so many has not. Added ones are not looked
    at: a model may be without some, as Code Llama 34B is, or with [PAD] added later."""
    if max(tok.vocab.values(), default=0) >= vocab_size:
        raise config.Mistake(f"the tokenizer has {tok.vocab_size} tokens, the model {vocab_size}; they do not belong "
                             "together")


def save(out, cfg, state, tok):
    """Write a run directory. state: {Hugging Face name: tensor}, complete; raises `config.Mistake` if it is not, or if
    model and tokenizer do not belong together."""
    import torch

    from model import Llama
    need_fit(tok, cfg.vocab_size)
    with torch.device("meta"):
        model = Llama(cfg)
    want, have = ({n: t.shape for n, t in tensors} for tensors in (model.named_parameters(), state.items()))
    if wrong := sorted(n for n in have.keys() | want.keys() if have.get(n) != want.get(n)):
        raise config.Mistake(f"{len(wrong)} tensors are missing, unexpected or of the wrong shape: "
                             + ", ".join(wrong[:5]) + (", …" if wrong[5:] else ""))
    tok.save(out)
    model.save_pretrained(out, state)
    out = config.as_seen(out)
    print(f"{out}: {model.counts()[0]:,} parameters; now python sample.py --init_from {shlex.quote(out)}"
          + (" --chat" if tok.chat_template else ' --start "Once upon a time"'))
