"""What may be asked of a run, in OpenAI's words, and the batch that answers it all: serve.py without HTTP."""
import asyncio
import base64
import io
import secrets
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from itertools import groupby
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import AliasChoices, BaseModel, BeforeValidator, Field, model_validator

import config
import sample
import vlm
from decode import Batch
from prepare.images import IMAGE, with_pictures


# -- what may be asked -------------------------------------------------------------------------------------------

def picture(uri):
    """The bytes of a picture's file, which is written as data:image/...;base64,..."""
    kind, _, data = str(uri).partition(";base64,")
    if not kind.startswith("data:image/"):
        raise ValueError("a picture comes as data:image/...;base64,...: no address is fetched")
    return base64.b64decode(data, validate=True)


class Url(BaseModel):
    """Where a picture is: within the request."""
    url: Annotated[bytes, BeforeValidator(picture)]


class Text(BaseModel):
    """A part of a turn that is read as text."""
    type: Literal["text"]
    text: str


class Picture(BaseModel):
    """A part of a turn that is seen: a data URI."""
    type: Literal["image_url"]
    image_url: Url


def parts_of(said, info):
    """The content of a turn as parts: a text alone is one; null, or left out, of an assistant who called a tool none.
    """
    said = [] if said is None and info.data.get("role") == "assistant" else said
    return [{"type": "text", "text": said}] if isinstance(said, str) else said


class Message(BaseModel):
    """A turn of a chat."""
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Annotated[list[Annotated[Text | Picture, Field(discriminator="type")]], BeforeValidator(parts_of),
                       Field(validate_default=True)] = None


class Asked(BaseModel):
    """What is read of a request. What would change the answer and is not known here is refused, not ignored."""
    model: str
    messages: list[Message] = []  # of a chat
    prompt: Annotated[str, BeforeValidator(  # of a completion; some clients make a list of it
        lambda prompt: prompt[0] if isinstance(prompt, list) and len(prompt) == 1 else prompt)] = ""
    stream: bool = False
    stream_options: dict = {}
    stop: Annotated[list[Annotated[str, Field(min_length=1, max_length=256)]], Field(max_length=4),
                    BeforeValidator(lambda stop: [stop] if isinstance(stop, str) else stop)] = []
    limit: int | None = Field(None, ge=1, validation_alias=AliasChoices("max_tokens", "max_completion_tokens"))
    temperature: float | None = Field(None, ge=0, le=2)  # None: that of sample.py; 0, as in vlm.py, of what sees
    top_k: int = Field(sample.SampleConfig.top_k, ge=0)
    top_p: float = Field(sample.SampleConfig.top_p, ge=0, le=1)
    min_p: float = Field(sample.SampleConfig.min_p, ge=0, le=1)
    seed: int = Field(default_factory=lambda: secrets.randbits(62), ge=0, lt=2**63)
    # -- what may only be said as if it were not
    n: Literal[1] = 1
    best_of: Literal[1] = 1
    logprobs: Literal[False, 0] = False
    echo: Literal[False] = False
    suffix: Literal[""] = ""
    frequency_penalty: float = Field(0, ge=0, le=0)
    presence_penalty: float = Field(0, ge=0, le=0)
    logit_bias: dict = Field({}, max_length=0)
    response_format: dict[Literal["type"], Literal["text"]] = {}
    functions: list = Field([], max_length=0)
    tools: list = Field([], max_length=0)
    repetition_penalty: float = Field(1, ge=1, le=1)  # this and the next: as other servers name them
    repeat_penalty: float = Field(1, ge=1, le=1)
    typical_p: float = Field(1, ge=1, le=1)
    min_tokens: Literal[0] = 0
    ignore_eos: Literal[False] = False
    stop_token_ids: list = Field([], max_length=0)
    bad_words: list = Field([], max_length=0)
    use_beam_search: Literal[False] = False
    modalities: list[Literal["text"]] = []
    add_generation_prompt: Literal[True] = True
    continue_final_message: Literal[False] = False
    include_stop_str_in_output: Literal[False] = False
    mirostat: Literal[0] = 0
    dry_multiplier: float = Field(0, ge=0, le=0)
    xtc_probability: float = Field(0, ge=0, le=0)
    unknown: None = Field(None, validation_alias=AliasChoices(
        "grammar", "json_schema", "structured_outputs", "guided_json", "guided_regex", "guided_choice",
        "guided_grammar", "allowed_token_ids", "chat_template", "documents", "truncate_prompt_tokens", "n_predict"))

    @model_validator(mode="before")
    @classmethod
    def without_nulls(cls, fields):
        """To clients, null means not given."""
        return {k: v for k, v in fields.items() if v is not None} if isinstance(fields, dict) else fields

    def turns(self):
        """The chat as `Engine.read` takes it. OpenAI's newer word for "system" is "developer"."""
        return [("system" if message.role == "developer" else message.role,
                 [part.text if part.type == "text" else part.image_url.url for part in message.content])
                for message in self.messages]


# -- answers -----------------------------------------------------------------------------------------------------

class TooLong(config.Mistake):
    """A prompt that leaves no room for an answer."""


class Engine:
    """A model, its tokenizer, and a `Batch` that a thread beside the event loop steps while requests are there."""

    def __init__(self, name, model, tok, rows, size, eyes=None):
        """rows: requests at a time; size: tokens of the longest, prompt included; eyes: vlm.Runner of one that sees."""
        self.name, self.model, self.tok, self.rows, self.eyes = name, model, tok, rows, eyes
        self.size = min(size, model.config.context)
        self.stop_ids = frozenset(tok.stop_ids | set(model.config.eos_ids))
        self.autocast = eyes.autocast if eyes else nullcontext()
        advice = f"{rows} requests of {self.size} tokens are too many: try fewer --rows or a shorter --context: "
        with self.autocast, config.mistakes(RuntimeError, prefix=advice):  # torch's, of too little memory
            self.batch = Batch(model, rows, self.size)
        self.thread = ThreadPoolExecutor(1)
        self.reading, self.task, self.left = 0, None, []  # prompts in the making; what runs `decode`; who has gone

    @classmethod
    @config.mistakes(torch.OutOfMemoryError, prefix="try a smaller model, or --device=cpu: ")
    def load(cls, cfg):
        """That of a serve.ServeConfig."""
        directory = sample.find(cfg.init_from)
        machine = {"init_from": str(directory), "device": cfg.device, "dtype": cfg.dtype}
        local = cfg.init_from is None or Path(cfg.init_from).is_dir()
        name = directory.resolve().name if local else cfg.init_from  # owner/model, of the hub
        if not vlm.sees(directory):
            how = config.make(sample.SampleConfig, machine | {"quantize": cfg.quantize})
            model, tok, _ = sample.load(how, cfg.rows)
            return cls(name, model, tok, cfg.rows, cfg.context)
        if cfg.quantize != "none":
            raise config.Mistake("--quantize is for runs that read text alone; this one sees")
        eyes = vlm.load(config.make(vlm.VlmConfig, machine))
        return cls(name, eyes.vlm.llama, eyes.tok, cfg.rows, cfg.context, eyes)

    def held(self):
        """Requests that run, or wait for a row, or whose prompt is in the making."""
        return self.reading + sum(not r.done for r in (*self.batch.running, *self.batch.waiting))

    async def read(self, said, room=1):
        """The prompt, ids or with pictures embeddings (T, D), that asks for the next turn of a chat, [(role, [a text or
        the bytes of a picture's file, ...]), ...], or for what follows a text, and leaves room for so many tokens.
        Raises `Mistake`."""
        self.reading += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self.thread, self.prompt, said, room)
        finally:
            self.reading -= 1

    async def recent(self, turns):
        """`read` of a chat with room for an answer, without its oldest turns where it has grown too long."""
        while True:
            try:
                return await self.read(turns, self.size // 4)
            except TooLong:
                if len(turns) < 3:
                    raise
                turns = turns[2:]

    def prompt(self, said, room):
        if isinstance(said, str):
            return self.fitting(sample.encode_prompt(self.tok, said, self.model), room)
        turns, files = [], []
        for role, parts in said:
            pictures = [io.BytesIO(part) for part in parts if isinstance(part, bytes)]
            placed = [kind for kind, _ in groupby(parts, type)].count(str) > 1  # by the texts around them
            text = "".join(part if isinstance(part, str) else IMAGE * placed for part in parts)
            turns.append({"role": role, "content": with_pictures(text, len(pictures))})
            files += pictures
        if files and not self.eyes:
            raise config.Mistake("this run reads text alone: leave the pictures out")
        ids = sample.known(self.tok.chat(turns), self.tok, self.model)
        if not self.eyes:
            return self.fitting(ids, room)
        run, sees = self.eyes, self.eyes.vlm
        if ids.count(sees.mark) != len(files):
            raise config.Mistake(f"{IMAGE} in a text stands for a picture: leave it out")
        self.fitting(ids + len(files) * (sees.image_tokens - 1) * [0], room)  # before any is looked at
        if not files:
            return ids
        features, canvases = zip(*(vlm.look(run, file) for file in files))
        ids = self.fitting(torch.from_numpy(sees.spread(ids, canvases)), room)
        with torch.no_grad(), self.autocast:
            return sees.embed(ids[None].to(run.device), torch.cat(features))[0]

    def fitting(self, prompt, room):
        if not len(prompt):
            raise config.Mistake("the prompt is empty")
        if len(prompt) > self.size - room:
            raise TooLong(f"a prompt of {len(prompt)} tokens: it may have {self.size - room} here")
        return prompt

    async def write(self, prompt, asked):
        """Yield (text, its tokens so far, None) of an answer as `Asked` says, and at its end (text, tokens, "stop" or
        "length"). It takes a row when the first piece is asked for, and frees it when no more are. Raises what a step
        raised."""
        usual = 0 if self.eyes else sample.SampleConfig.temperature
        request = self.batch.add(prompt, asked.limit or self.size, self.stop_ids, asked.seed, top_k=asked.top_k,
                                 top_p=asked.top_p, min_p=asked.min_p,
                                 temperature=usual if asked.temperature is None else asked.temperature)
        request.queue = asyncio.Queue()
        if self.task is None or self.task.done():
            self.task = asyncio.create_task(self.decode())
        text, held = self.tok.stream(after=() if torch.is_tensor(prompt) else prompt), ""
        try:
            for count in range(1, request.max_new_tokens + 1):
                token = await request.queue.get()
                if isinstance(token, Exception):
                    raise token
                ended = token in self.stop_ids
                last = ended or count == request.max_new_tokens
                held += ("" if ended else text.feed(token)) + (text.end() if last else "")
                found = [held.index(stop) for stop in asked.stop if stop in held]
                if found or last:
                    yield held[:min(found, default=None)], count, "stop" if found or ended else "length"
                    return
                begun = max((n for stop in asked.stop for n in range(1, len(stop)) if held.endswith(stop[:n])),
                            default=0)
                yield held[:len(held) - begun], count, None  # the rest may become a stop
                held = held[len(held) - begun:]
        finally:
            self.left.append(request)

    async def decode(self):
        """Step until there is nothing to do. Requests enter at any time, and leave between two steps."""
        while self.batch.busy:
            try:
                found = await asyncio.get_running_loop().run_in_executor(self.thread, self.step)
            except Exception as e:  # such as too little memory: those that are here fail, later ones need not
                found = [(r, e) for r in (*self.batch.running, *self.batch.waiting)]
                self.batch.running.clear()
                self.batch.waiting.clear()
            for request, token in found:
                request.queue.put_nowait(token)
            while self.left:
                self.batch.drop(self.left.pop())

    def step(self):
        with self.autocast:
            return self.batch.step()
