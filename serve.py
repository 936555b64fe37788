"""Serve a run to OpenAI's clients, under /v1, and to people, as a page for chat at /. All requests share one batch.

    pip install -e ".[serve]"
    python serve.py                                  the newest run under out/, at http://127.0.0.1:8000
    python serve.py out/smollm2 --rows=4 --port=9000

Answers /v1/chat/completions and /v1/completions, whole or streaming, and /v1/models, with OpenAI's errors. There are no
passwords: only this machine can reach it, unless --host says otherwise.
"""
import sys
from dataclasses import dataclass
from importlib.util import find_spec

import config


@dataclass
class ServeConfig:
    """What to serve, and how much of it."""
    init_from: str | None = None  # a run directory or hub name; None: the newest run under out/
    host: str = "127.0.0.1"  # address to listen at: of this machine alone; 0.0.0.0 lets the whole network in
    port: int = 8000  # [0, 65535] the usual one; 0: one that is free
    page: bool = True  # a page for chat at /; False: the API alone, which starts sooner
    # -- limits
    rows: int = 16  # [1, inf) requests that are decoded together; each has its part of the cache
    context: int = 2048  # [2, inf) tokens of a request with its prompt, for which the cache has room
    waiting: int = 64  # [0, inf) requests that may wait for a row; others are told to come again
    body: int = 1_000_000  # [1, inf) bytes of a request, far more than its context holds
    # -- the machine
    device: str = "auto"  # "auto" takes cuda, then mps, then cpu
    dtype: str = "auto"  # {auto, float32, bfloat16, float16} auto takes what is fast here
    quantize: str = "none"  # {none, int8, int4} bits of the matrices, on an x86 processor: faster, less exact


def read_settings(argv):
    """ServeConfig of the command line, whose first word may be what to serve."""
    cfg = config.load(ServeConfig, [f"--init_from={argv[0]}", *argv[1:]] if argv and argv[0][0] != "-" else argv)
    if missing := [name for name in ("fastapi", "uvicorn", *["gradio"] * cfg.page) if not find_spec(name)]:
        raise config.Mistake(f'the server needs {", ".join(missing)}: pip install -e ".[serve]"')
    return cfg


if __name__ == "__main__":  # read the arguments before torch is imported: a typo answers at once
    settings = config.run(read_settings, sys.argv[1:])

import json  # noqa: E402
import secrets  # noqa: E402
import socket  # noqa: E402
import time  # noqa: E402
from contextlib import aclosing  # noqa: E402
from typing import Annotated, Literal  # noqa: E402

from fastapi import FastAPI, Request  # noqa: E402
from fastapi.responses import JSONResponse, StreamingResponse  # noqa: E402
from pydantic import BaseModel, Field, ValidationError, model_validator  # noqa: E402
from starlette.middleware.trustedhost import TrustedHostMiddleware  # noqa: E402

import sample  # noqa: E402
from engine import Engine  # noqa: E402


class Refused(config.Mistake):
    """A client's mistake."""

    def __init__(self, message, status=400, code=None):
        super().__init__(message)
        self.status, self.code = status, code


def error_object(e):
    """OpenAI's error object for an exception."""
    kind = "invalid_request_error" if isinstance(e, config.Mistake) else "server_error"
    return {"error": {"message": str(e), "type": kind, "param": None, "code": getattr(e, "code", None)}}


# -- requests ----------------------------------------------------------------------------------------------------

Stop = Annotated[str, Field(min_length=1, max_length=256)]


class Part(BaseModel):
    """A piece of a message."""
    type: Literal["text"]  # no pictures yet
    text: str


class Message(BaseModel):
    """A turn of a chat."""
    role: str
    content: str | list[Part]


class Asked(BaseModel):
    """What is read of a request. What would change the answer and is not known here is refused, not ignored."""
    model: str
    messages: list[Message] = []  # of a chat
    prompt: str = ""  # of a completion
    stream: bool = False
    stream_options: dict = {}
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] = []
    max_tokens: Annotated[int, Field(ge=1)] | None = None  # None: what the context holds
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None  # the newer name of max_tokens
    temperature: Annotated[float, Field(ge=0, le=2)] = sample.SampleConfig.temperature
    top_p: Annotated[float, Field(ge=0, le=1)] = sample.SampleConfig.top_p
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    n: Literal[1] = 1
    logprobs: Literal[False, 0] = False
    tools: Annotated[list, Field(max_length=0)] = []

    @model_validator(mode="before")
    @classmethod
    def without_nulls(cls, fields):
        """To clients, null means not given."""
        return {k: v for k, v in fields.items() if v is not None} if isinstance(fields, dict) else fields

    def ids(self, tok):
        """Ids of the prompt."""
        if not self.messages:
            return tok.encode(self.prompt, bos=tok.adds_bos or not self.prompt) or tok.encode("\n")
        return tok.chat([{"role": m.role, "content": m.content if isinstance(m.content, str) else
                          "".join(part.text for part in m.content)} for m in self.messages])


async def read(request, limit):
    """The body of a request as `Asked`. Raises `Refused`."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > limit:
            raise Refused(f"the body has more than {limit} bytes", 413)
    try:
        return Asked.model_validate_json(bytes(body))
    except ValidationError as e:
        first = e.errors()[0]
        raise Refused(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


# -- answers -----------------------------------------------------------------------------------------------------

class Service:
    """A model with its tokenizer, and what it says to requests."""

    def __init__(self, cfg, model, tok, name):
        cfg.context = min(cfg.context, model.config.context)
        self.cfg, self.tok, self.name = cfg, tok, name
        self.engine = Engine(model, cfg.rows, cfg.context)
        self.stop_ids = frozenset(tok.stop_ids | set(model.config.eos_ids))

    def begin(self, asked):
        """The engine's request for what is asked. Raises `Mistake`."""
        if asked.model != self.name:
            raise Refused(f"there is no model {asked.model!r}, only {self.name!r}", 404, "model_not_found")
        if len(self.engine.requests()) >= self.cfg.rows + self.cfg.waiting:
            raise Refused("too many requests are waiting: come again", 429, "queue_full")
        limit = asked.max_tokens or asked.max_completion_tokens or self.cfg.context
        seed = secrets.randbits(62) if asked.seed is None else asked.seed
        with config.mistakes(ValueError):  # a prompt that is too long
            return self.engine.add(asked.ids(self.tok), limit, self.stop_ids, seed, temperature=asked.temperature,
                                   top_p=asked.top_p)

    async def pieces(self, asked, request):
        """Yield (text, None) of an answer, and at its end (text, "stop" or "length")."""
        text, held = self.tok.stream(after=request.prompt), ""
        stops = [asked.stop] if isinstance(asked.stop, str) else asked.stop
        async with aclosing(self.engine.tokens(request)) as tokens:
            async for token, last in tokens:
                ended = token in self.stop_ids
                held += ("" if ended else text.feed(token)) + (text.end() if last else "")
                found = [held.index(stop) for stop in stops if stop in held]
                if found or last:
                    yield held[:min(found, default=None)], "stop" if found or ended else "length"
                    return
                begun = max((n for stop in stops for n in range(1, len(stop)) if held.endswith(stop[:n])), default=0)
                yield held[:len(held) - begun], None  # the rest may become a stop
                held = held[len(held) - begun:]


async def answer(service, request, chat):
    """The response to a request for a chat's next message, or for a completion."""
    asked = await read(request, service.cfg.body)
    if chat != bool(asked.messages):
        raise Refused("a chat takes messages, a completion a prompt")
    running = service.begin(asked)
    kind = "chat.completion" + ".chunk" * asked.stream if chat else "text_completion"
    head = {"id": f"cmpl-{secrets.token_hex(12)}", "object": kind, "created": int(time.time()), "model": service.name}

    def body(text, finish):
        part = {"delta" if asked.stream else "message": {"role": "assistant", "content": text}}
        part = part if chat else {"text": text}
        return head | {"choices": [{"index": 0, "logprobs": None, "finish_reason": finish} | part]}

    def usage():
        read, new = len(running.prompt), len(running.new)
        return {"usage": {"prompt_tokens": read, "completion_tokens": new, "total_tokens": read + new}}

    async def events():
        try:
            async with aclosing(service.pieces(asked, running)) as pieces:
                async for text, finish in pieces:
                    yield event(body(text, finish))
            if asked.stream_options.get("include_usage"):
                yield event(head | {"choices": []} | usage())
        except Exception as e:
            yield event(error_object(e))
        yield "data: [DONE]\n\n"
    if asked.stream:
        return StreamingResponse(events(), media_type="text/event-stream")
    whole = ""
    async with aclosing(service.pieces(asked, running)) as pieces:
        async for text, finish in pieces:
            whole += text
            if await request.is_disconnected():
                break
    return body(whole, finish) | usage()


def event(content):
    """A server-sent event."""
    return f"data: {json.dumps(content)}\n\n"


def make_app(service):
    """The application: OpenAI's API, and the page if it is wanted."""
    app = FastAPI(title="everyllama", openapi_url=None)
    if service.cfg.host == "127.0.0.1":  # or pages of the web could read answers, by a name that leads here
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])

    @app.post("/v1/chat/completions")
    async def chat(request: Request):
        return await answer(service, request, True)

    @app.post("/v1/completions")
    async def complete(request: Request):
        return await answer(service, request, False)

    @app.get("/v1/models")
    async def models():
        model = {"id": service.name, "object": "model", "created": 0, "owned_by": "everyllama"}
        return {"object": "list", "data": [model]}

    @app.exception_handler(config.Mistake)
    async def refused(_, e):
        return JSONResponse(error_object(e), getattr(e, "status", 400))

    @app.exception_handler(Exception)
    async def failed(_, e):
        return JSONResponse(error_object(e), 500)
    return with_page(app, service) if service.cfg.page else app


def with_page(app, service):
    """app with a page at /, by gradio: a chat, or texts to continue, by a model without a chat template."""
    import gradio
    chats = bool(service.tok.chat_template)

    def asked(text, history):
        """The request for an answer to text, without what is too old for the context."""
        said = [*({key: m[key] for key in ("role", "content")} for m in history), {"role": "user", "content": text}]
        new = Asked(model=service.name, max_tokens=service.cfg.context // 4,
                    **{"messages": said} if chats else {"prompt": text})
        fits = len(new.ids(service.tok)) < service.cfg.context * 3 // 4
        return new if fits or not history else asked(text, history[2:])

    async def say(text, history):
        request, shown = asked(text, history), "" if chats else text
        try:
            async with aclosing(service.pieces(request, service.begin(request))) as pieces:
                async for piece, _ in pieces:
                    shown += piece
                    yield shown
        except config.Mistake as e:
            raise gradio.Error(str(e), print_exception=False) from e
    page = gradio.ChatInterface(
        say, title=service.name, description=None if chats else "Begin a text, and the model goes on with it.",
        chatbot=gradio.Chatbot(render_markdown=False, height="70vh"),  # what a model says is text, no HTML
        api_name="chat", flagging_mode="never", concurrency_limit=service.cfg.rows, analytics_enabled=False)
    return gradio.mount_gradio_app(app, page, "/", max_file_size="1mb")


def main(cfg):
    import uvicorn
    machine = {key: getattr(cfg, key) for key in ("init_from", "device", "dtype", "quantize")}
    model, tok, directory = sample.load(config.make(sample.SampleConfig, machine), cfg.rows)
    with config.mistakes(OSError, prefix=f"cannot listen at {cfg.host}:{cfg.port}: "):
        listener = socket.create_server((cfg.host, cfg.port))
    app = make_app(Service(cfg, model, tok, directory.resolve().name))
    print(f"{directory.resolve().name} at http://{cfg.host}:{listener.getsockname()[1]}, the API under /v1", flush=True)
    uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=3)).run([listener])


if __name__ == "__main__":
    config.run(main, settings)
