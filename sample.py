"""Text from a Llama: from the newest run here, from any run directory, or from a Hugging Face hub name.

    python sample.py --start "Once upon"                    the newest run under out/
    python sample.py --init_from out/tales --num_samples 3
    python sample.py --start FILE:prompt.txt --temperature 0
    python sample.py --init_from out/smollm2 --chat         a conversation, for models with a chat template
"""
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import config


@dataclass
class SampleConfig:
    """How to sample."""
    init_from: str | None = None  # a run directory or hub name; None: the newest run under out/
    start: tuple[str, ...] = ()  # the prompt, several for several texts, or FILE:path; none: the beginning of a document
    num_samples: int = 1  # texts for each prompt
    max_new_tokens: int = 256  # longest continuation; a text that ends by itself is shorter
    temperature: float = 0.8  # below 1 prefers likely words, which small models need; 0 is greedy
    top_k: int = 0  # keep this many most likely tokens; 0: no limit
    top_p: float = 0.95  # keep the fewest tokens that hold this probability; cuts the tail of nonsense
    min_p: float = 0.0  # keep tokens at least this likely relative to the best; 0: no limit
    seed: int = 1337  # same seed, same text
    chat: bool = False  # talk with the model in its own chat template
    system: str | None = None  # system message of the chat; None: the template's own
    device: str = "auto"  # "auto" takes cuda, then mps, then cpu
    compile: bool = False  # a token's step as one compiled graph, on a GPU one CUDA graph: pays after thousands of tokens
    dtype: str = "auto"  # "float32", "bfloat16", "float16"; "auto" takes what is fast here

    def __post_init__(self):
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ValueError(f"dtype must be auto, float32, bfloat16 or float16, not {self.dtype!r}")
        for name, low, high in (("num_samples", 1, 1 << 20), ("max_new_tokens", 1, 1 << 30), ("temperature", 0, 1e4),
                                ("top_k", 0, 1 << 30), ("top_p", 0, 1), ("min_p", 0, 1)):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} must lie between {low} and {high}, not {getattr(self, name)}")


def newest_run(out=config.ROOT / "out"):
    """The run directory under out/ whose weights were written last."""
    runs = [path.parent for path in out.glob("*/config.json")]
    if not runs:
        raise config.Mistake(f"no trained model under {out}: train one with `python prepare/tales.py && "
                             "python train.py config/tales.py`, or name one with --init_from")
    return max(runs, key=lambda run: (run / "config.json").stat().st_mtime)


def read_prompt(text):
    """The text of a prompt, or of the file it names as FILE:path."""
    if not text.startswith("FILE:"):
        return text
    with config.mistakes(OSError, UnicodeDecodeError, prefix=f"cannot read the prompt {text}: "):
        return Path(text[len("FILE:"):]).read_text(encoding="utf-8")


def load(cfg):
    """(model, tokenizer, directory) ready to sample on the device and in the dtype asked for."""
    from common import pick_device, pick_dtype
    import torch  # noqa: F401

    from model import Llama, find_checkpoint
    from prepare import tokenizer
    directory = Path(cfg.init_from) if cfg.init_from else newest_run()
    device = pick_device(cfg.device)
    dtype, _ = pick_dtype(cfg.dtype, device)
    with config.mistakes(ValueError, FileNotFoundError):
        directory = find_checkpoint(directory)
        model = Llama.from_pretrained(directory, dtype=dtype, device=device).to_decode(cfg.compile)
    tok = tokenizer.load(directory)
    if tok.vocab_size > model.config.vocab_size:
        raise config.Mistake(f"{directory}: the tokenizer has {tok.vocab_size} tokens, the model {model.config.vocab_size}; "
                             "they do not belong together")
    return model, tok, directory


def fitting(ids, model):
    """ids, if the model's context holds them and at least one more."""
    room = model.config.context - len(ids)
    if not ids or room < 1:
        raise config.Mistake("the prompt is empty" if not ids else f"the prompt has {len(ids)} tokens, and the model's "
                             f"context holds {model.config.context}: shorten it by at least {1 - room}")
    return ids


def write(model, tok, ids, cfg, seed):
    """Generate after ids and print each piece as it comes; returns the new ids."""
    import torch
    text, new, stops = tok.stream(after=ids), [], tok.stop_ids | set(model.config.eos_ids)
    idx = torch.tensor([ids], device=model.lm_head.weight.device)
    for token in model.stream(idx, cfg.max_new_tokens, cfg.temperature, cfg.top_k, cfg.top_p, cfg.min_p,
                              stops, seed):
        new.append(token.item())
        print(text.feed(new[-1]) if new[-1] not in stops else "", end="", flush=True)
    print(text.end(), flush=True)
    return new


def complete(model, tok, cfg, title):
    """Continue every prompt num_samples times; title goes first."""
    prompts = [read_prompt(t) for t in cfg.start] or [""]
    if cfg.start and "" in prompts:
        raise config.Mistake("the prompt is empty: give some text, or leave --start out to begin a document")
    encoded = [fitting(tok.encode(p, bos=True) if p or tok.bos_id is not None else tok.encode("\n"), model) for p in prompts]
    print(title, file=sys.stderr)
    count, seconds = 0, 0.0
    for prompt, ids in zip(prompts, encoded):
        for i in range(cfg.num_samples):
            print(prompt, end="", flush=True)
            begin = time.perf_counter()
            count += len(write(model, tok, ids, cfg, cfg.seed + i))
            seconds += time.perf_counter() - begin
            if len(prompts) * cfg.num_samples > 1:
                print("---", flush=True)
    print(f"{count} tokens, {count / seconds:.1f} tokens/s", file=sys.stderr)


def chat(model, tok, cfg, title):
    """A conversation until an empty line, Ctrl-C or Ctrl-D; the oldest turns are dropped when the context is full."""
    if not tok.chat_template:
        raise config.Mistake("this model has no chat template; use --start, or a chat model such as `python prepare/smollm2.py`")
    print(title, file=sys.stderr)
    system = [{"role": "system", "content": cfg.system}] if cfg.system else []
    turns = []
    while True:
        try:
            text = input("you> ").strip()
        except (EOFError, KeyboardInterrupt):
            text = ""
        if not text:
            print()
            return
        turns.append({"role": "user", "content": text})
        ids = tok.chat(system + turns)
        while len(ids) > model.config.context - 16 and len(turns) > 2:
            del turns[:2]
            ids = tok.chat(system + turns)
        print("llama> ", end="", flush=True)
        begin = time.perf_counter()
        new = write(model, tok, fitting(ids, model), cfg, cfg.seed + len(turns))
        print(f"({len(new) / (time.perf_counter() - begin):.1f} tokens/s)", file=sys.stderr)
        turns.append({"role": "assistant", "content": tok.decode([i for i in new if i not in tok.stop_ids])})


def main(cfg):
    """Load the model once, then complete or chat."""
    import torch
    with config.mistakes(torch.OutOfMemoryError, prefix="try --dtype=bfloat16, fewer --max_new_tokens or --device=cpu: "):
        model, tok, directory = load(cfg)
        if model.counts()[0] < 10e6:  # it stays in the caches of one core; two would mostly wait for each other, or for other programs
            torch.set_num_threads(1)
        (chat if cfg.chat else complete)(model, tok, cfg, f"{os.path.relpath(directory)}: {model.counts()[0]:,} parameters")


if __name__ == "__main__":
    config.run(lambda: main(config.load(SampleConfig)))
