"""Text from a Llama: from the newest run here, from any run directory, or from a Hugging Face hub name.

    python sample.py --start "Once upon"                    the newest run under out/
    python sample.py --init_from out/tales --num_samples 3
    python sample.py --start FILE:prompt.txt --temperature 0
    python sample.py --init_from out/smollm2 --chat         a conversation, for models with a chat template
    python sample.py --trace --start "Once upon"            each step of one forward pass, with its shape and FLOPs
"""
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import config

BITS = {"none": 32, "int8": 8, "int4": 4}


@dataclass
class SampleConfig:
    """How to sample."""
    # -- what is said
    init_from: str | None = None  # a run directory or hub name; None: the newest run under out/
    start: tuple[str, ...] = ()  # the prompt, or several, or FILE:path; none: the beginning of a document
    num_samples: int = 1  # [1, inf) texts for each prompt
    max_new_tokens: int = 256  # [1, inf) longest continuation; a text that ends by itself is shorter
    # -- how words are chosen
    temperature: float = 0.8  # [0, 1e4] below 1 prefers likely words, which small models need; 0 is greedy
    top_k: int = 0  # [0, inf) keep this many most likely tokens; 0: no limit
    top_p: float = 0.95  # [0, 1] keep the fewest tokens that hold this probability; cuts the tail of nonsense
    min_p: float = 0.0  # [0, 1] keep tokens at least this likely relative to the best; 0: no limit
    seed: int = 1337  # [0, inf) same seed, same text
    # -- other uses
    chat: bool = False  # talk with the model in its own chat template
    system: str | None = None  # system message of the chat; None: the template's own
    trace: bool = False  # list the steps of one forward pass over the prompt, to learn what happens in a Llama
    # -- the machine
    device: str = "auto"  # "auto" takes cuda, then mps, then cpu
    compile: bool = False  # a token's step as one graph, on a GPU one CUDA graph: pays after thousands of tokens
    dtype: str = "auto"  # {auto, float32, bfloat16, float16} auto takes what is fast here
    quantize: str = "none"  # {none, int8, int4} bits of the matrices, on an x86 processor: faster, less exact
    save: str | None = None  # with --quantize: folder to write the rounded model to, instead of sampling

    def __post_init__(self):
        if self.quantize != "none" and (self.compile or self.dtype not in ("auto", "float32")):
            raise ValueError("--quantize goes with neither --compile nor --dtype: what is not rounded stays in float32")
        if self.save and self.quantize == "none":
            raise ValueError("--save writes rounded weights: it wants --quantize")
        if self.save and (self.start or self.chat):
            raise ValueError("--save writes weights and no text: leave --start and --chat out")
        if self.trace and (self.quantize != "none" or self.compile or len(self.start) > 1):
            raise ValueError("--trace follows one --start through plain weights: leave --quantize and --compile out")
        if self.chat and (self.start or self.trace):
            raise ValueError(f"--chat asks for what you say: leave {'--start' if self.start else '--trace'} out")
        if self.system is not None and not self.chat:
            raise ValueError("--system is for --chat")


if __name__ == "__main__":  # before torch is imported: a typo answers at once
    settings = config.run(config.load, SampleConfig)

import torch

import adapter
import decode
import lora
from checkpoint import find_checkpoint
from common import pick_device
from model import Attention, Experts, Llama
from prepare import weights
from shard import can_compile


# -- what to sample from -----------------------------------------------------------------------------------------

def newest_run(out=config.ROOT / "out"):
    """The run directory under out/ whose weights were written last."""
    runs = [path for pattern in ("*/config.json", "*/adapter_config.json") for path in out.glob(pattern)]
    if not runs:
        raise config.Mistake(f"no trained model under {out}: train one with `python prepare/tales.py && "
                             "python train.py config/tales.py`, or name one with --init_from")
    return max(runs, key=lambda path: path.stat().st_mtime).parent


def find(name):
    """The directory of a run or of a hub name; of the newest run where the name is None."""
    with config.mistakes(ValueError, FileNotFoundError):
        return find_checkpoint(newest_run() if name is None else name)


def read_prompt(text):
    """The text of a prompt, or of the file it names as FILE:path."""
    if not text.startswith("FILE:"):
        return text
    with config.mistakes(OSError, UnicodeDecodeError, prefix=f"cannot read the prompt {text}: "):
        return Path(os.path.expanduser(text[len("FILE:"):])).read_text(encoding="utf-8-sig")


def load(cfg, rows=1):
    """(model, tokenizer, directory) ready to sample so many rows at once, on the device and in the dtype asked for."""
    device, bits, directory = pick_device(cfg.device), BITS[cfg.quantize], find(cfg.init_from)
    with config.mistakes(ValueError, FileNotFoundError):
        rounded = decode.bits_of(directory)
        if bits < 32 or rounded:
            decode.check_quantize(device)
        if rounded:
            if bits < 32 or cfg.compile or cfg.trace or cfg.dtype not in ("auto", "float32"):
                raise config.Mistake(f"{directory} has weights of {rounded} bits: leave --quantize, --compile, --trace "
                                     "and --dtype out")
            model = decode.load_quantized(directory)
        else:
            can_compile(cfg, device)
            dtype = decode.dtype_to_decode(cfg.dtype, device)
            model = adapter.load(directory, dtype, device)
            if dtype == torch.float32:  # a narrower one would round away much of what an adapter changes
                lora.merge(model)
        model = decode.to_decode(model, cfg.compile, bits, rows if cfg.dtype == "auto" else 0)
    tok = adapter.load_tokenizer(directory)
    with config.mistakes(config.Mistake, prefix=f"{directory}: "):
        weights.need_fit(tok, model.config.vocab_size)
    return model, tok, directory


# -- text --------------------------------------------------------------------------------------------------------

def encode_prompt(tok, text, model):
    """ids, `known`, of a text to continue; without one, of the beginning of a document: BOS, or a line's end."""
    return known(tok.encode(text, bos=tok.adds_bos or not text) or tok.encode("\n"), tok, model)


def known(ids, tok, model):
    """ids, if the model has all of them: a tokenizer can have added tokens that it has not."""
    for i in ids:
        if model.config.vocab_size <= i < tok.vocab_size:  # those of vlm.PictureTokenizer's pictures are beyond both
            raise config.Mistake(f"the prompt has {tok.decode([i], special=True)!r}, which is not in the model's "
                                 "vocabulary")
    return ids


def fitting(ids, model):
    """ids, if the model's context holds them and at least one more."""
    room = model.config.context - len(ids)
    if not ids or room < 1:
        raise config.Mistake("the prompt is empty" if not ids else f"the prompt has {len(ids)} tokens, and the model's "
                             f"context holds {model.config.context}: shorten it by at least {1 - room}")
    return ids


def write(model, tok, ids, cfg, seed, cache=None):
    """Generate after ids and print each piece as it comes; returns the new ids. cache: has the first of ids."""
    text, new, stops = tok.stream(after=ids), [], tok.stop_ids | set(model.config.eos_ids)
    idx = torch.tensor([ids[0 if cache is None else int(cache.lengths):]], device=model.lm_head.weight.device)
    for token in model.stream(idx, cfg.max_new_tokens, stops, cache=cache, temperature=cfg.temperature, top_k=cfg.top_k,
                              top_p=cfg.top_p, min_p=cfg.min_p, seed=seed):
        new.append(token.item())
        print(text.feed(new[-1]) if new[-1] not in stops else "", end="", flush=True)
    print(text.end(), flush=True)
    if len(ids) + len(new) == model.config.context and len(new) < cfg.max_new_tokens:
        print(f"(the model's context of {model.config.context} tokens is full)", file=sys.stderr)
    return new


def complete(model, tok, cfg, title):
    """Continue every prompt num_samples times; title goes first."""
    prompts = [read_prompt(t) for t in cfg.start] or [""]
    if cfg.start and "" in prompts:
        raise config.Mistake("the prompt is empty: give some text, or leave --start out to begin a document")
    encoded = [fitting(encode_prompt(tok, prompt, model), model) for prompt in prompts]
    print(title, file=sys.stderr)
    count, seconds = 0, 0.0
    for prompt, ids in zip(prompts, encoded):
        for i in range(cfg.num_samples):
            print(prompt, end="", flush=True)
            begin = time.perf_counter()
            new = write(model, tok, ids, cfg, cfg.seed + i)
            count += len(new)
            seconds += time.perf_counter() - begin
            if len(prompts) * cfg.num_samples > 1:
                print("---", flush=True)
    print(f"{count} tokens, {count / seconds:.1f} tokens/s", file=sys.stderr)


class Conversation:
    """A cache and the ids in it: of a conversation that grows, each turn reads only what is new."""

    def __init__(self, model):
        self.model, self.ids = model, []
        self.cache = decode.new_cache(model, 1, 256)

    def reply(self, tok, ids, cfg, seed):
        """`write` after the conversation ids, as they are now; returns the new ids."""
        self.cache.rewind(len(os.path.commonprefix([self.ids, ids[:-1]])))
        size = min(len(ids) + cfg.max_new_tokens, self.model.config.context)
        if size > self.cache.size:
            self.cache.grow(decode.power_of_two(size))  # seldom, and never back
        new = write(self.model, tok, ids, cfg, seed, self.cache)
        self.ids = (ids + new)[:-1]  # the last one was never read
        return new


def chat(model, tok, cfg, title):
    """A conversation until an empty line, Ctrl-C or Ctrl-D; the oldest turns are dropped when the context is full."""
    if not tok.chat_template:
        raise config.Mistake("this model has no chat template; use --start, or a chat model such as "
                             "`python prepare/smollm2.py`")
    print(title, file=sys.stderr)
    system = [{"role": "system", "content": cfg.system}] if cfg.system is not None else []
    turns, conversation, context = [], Conversation(model), model.config.context
    while True:
        try:
            text = input("you> ").strip()
        except (EOFError, KeyboardInterrupt):
            text = ""
        if not text:
            print()
            return
        kept = [*turns, {"role": "user", "content": text}]
        try:
            ids = tok.chat(system + kept)
            while len(ids) > context - 16 and len(kept) > 2:
                kept = kept[2:]
                ids = tok.chat(system + kept)
            fitting(known(ids, tok, model), model)
        except config.Mistake as e:
            print(e, file=sys.stderr)
            continue
        if dropped := (len(turns) + 1 - len(kept)) // 2:
            print(f"(the context of {context} tokens is full: the first {dropped} questions and answers were dropped)",
                  file=sys.stderr)
        turns = kept
        print("llama> ", end="", flush=True)
        begin = time.perf_counter()
        new = conversation.reply(tok, ids, cfg, cfg.seed + len(turns))
        print(f"({len(new) / (time.perf_counter() - begin):.1f} tokens/s)", file=sys.stderr)
        turns.append({"role": "assistant", "content": tok.decode([i for i in new if i not in tok.stop_ids])})


# -- what happens in a forward pass ------------------------------------------------------------------------------

def steps_of(model, ids, *more):
    """The steps of a forward pass over ids (T,), in order: (name, shape that comes out, parameters, FLOPs, note).

    model: a Llama, or one that sees (vlm.py), which takes `more` after the ids. FLOPs: 2 for each weight that a row is
    multiplied with, and 4·d for each key that a query head sees. Parameters of tied weights are counted where they are
    used first."""
    cfg, steps, seen, hooks = getattr(model, "llama", model).config, [], set(), []

    def after(name):
        def hook(module, _, output):
            new = [p for p in module.parameters(recurse=False) if p not in seen]
            seen.update(new)
            note = f"chose {output.topk(cfg.top_k).indices.tolist()}" if name.endswith(".router") else ""
            steps.append((name, output.shape, sum(p.numel() for p in new), 2 * products(module, output), note))
        return hook

    def before_o_proj(name, attention):
        def hook(_, inputs):
            rows, T, width = inputs[0].shape
            keys, note = T * T, "each sees all"
            if isinstance(attention, Attention):
                keys = sum(t % (attention.chunk or T) + 1 for t in range(T))
                note = "no RoPE" if attention.nope else "RoPE"
                note += f", chunks of {attention.chunk}" if attention.chunk else ""
            steps.append((f"{name}.attend", inputs[0].shape, 0, 4 * rows * width * keys, note))
        return hook

    for name, module in model.named_modules():
        if hasattr(module, "o_proj"):
            hooks.append(module.o_proj.register_forward_pre_hook(before_o_proj(name, module)))
        if list(module.parameters(recurse=False)):
            hooks.append(module.register_forward_hook(after(name)))
    with torch.inference_mode():
        model(torch.tensor([ids], device=next(model.parameters()).device), *more)
    for hook in hooks:
        hook.remove()
    return steps


def products(module, output):
    """Products of a weight and a number in what a module makes."""
    if isinstance(module, torch.nn.Conv2d):
        return module.weight.numel() * output[:, 0].numel()  # output (N, C, H, W)
    if isinstance(module, (torch.nn.Linear, decode.PackedLinear)):
        return module.weight.numel() * output.shape[:-1].numel()
    if isinstance(module, Experts):  # a row goes to one of them
        return sum(p.numel() // len(p) for p in module.parameters()) * output.shape[:-1].numel()
    return 0


def print_steps(steps):
    """Print `steps_of` as a table."""
    form = f"{{:<{max(len(step[0]) for step in steps)}}} {{:>16}} {{:>13}} {{:>16}}  {{}}"
    print(form.format("step", "shape", "parameters", "FLOPs", ""))
    for name, shape, parameters, flops, note in steps:
        print(form.format(name, " x ".join(map(str, shape)), f"{parameters:,}", f"{flops:,}", note))
    print(form.format("in all", "", *(f"{sum(step[i] for step in steps):,}" for i in (2, 3)), ""))


def trace(model, tok, cfg, title):
    """Print the steps of a forward pass over the first prompt."""
    prompt = read_prompt(cfg.start[0]) if cfg.start else ""
    ids = fitting(encode_prompt(tok, prompt, model), model)
    print(title, "tokens: " + " ".join(f"{i}={tok.decode([i], special=True)!r}" for i in ids), sep="\n")
    print_steps(steps_of(model, ids))


def main(cfg):
    """Load the model once, then complete, chat or trace."""
    advice = "try --dtype=bfloat16, fewer --max_new_tokens or --device=cpu: "
    if cfg.save:
        with config.mistakes(OSError, prefix="--save: "):
            Path(cfg.save).mkdir(parents=True, exist_ok=True)
        if any(Path(cfg.save).iterdir()):
            raise config.Mistake(f"--save: {cfg.save} is not empty")
    with config.mistakes(torch.OutOfMemoryError, prefix=advice):
        model, tok, directory = load(cfg)
        with torch.device("meta"):
            parameters = Llama(model.config).counts()[0]  # two of 4 bits share a number
        if parameters < 10e6:  # they stay in the caches of one core; two would mostly wait for each other
            torch.set_num_threads(1)
        if cfg.save:
            with config.mistakes(OSError, prefix="--save: "):
                decode.save_quantized(model, BITS[cfg.quantize], cfg.save)
                tok.save(cfg.save)
            print(f"{cfg.save}: {parameters:,} parameters as {cfg.quantize}")
            return
        talk = chat if cfg.chat else trace if cfg.trace else complete
        talk(model, tok, cfg, f"{cfg.init_from or directory}: {parameters:,} parameters")


if __name__ == "__main__":
    config.run(main, settings)
