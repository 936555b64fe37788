"""Serve a run to OpenAI's clients, under /v1, and to people, as a page for chat at /. All requests share one batch.

    pip install -e ".[serve]"
    python serve.py                                  the newest run under out/, at http://127.0.0.1:8000
    python serve.py out/smollm2 --rows=4 --port=9000

Answers /v1/chat/completions (of runs that see, with pictures as data URIs), /v1/completions and /v1/models, whole or
streaming. There are no passwords: only this machine can reach it, unless --host says otherwise.
"""
import html
import json
import logging
import secrets
import socket
import sys
import time
from contextlib import aclosing
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path

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
    body: int = 20_000_000  # [1, inf) bytes of a request: a large photo, in base64
    # -- the machine
    device: str = "auto"  # "auto" takes cuda, then mps, then cpu
    dtype: str = "auto"  # {auto, float32, bfloat16, float16} auto takes what is fast here
    quantize: str = "none"  # {none, int8, int4} bits of the matrices, on an x86 processor: faster, less exact


def read_settings(argv):
    """ServeConfig of the command line, whose first word may be what to serve."""
    cfg = config.load(ServeConfig, [f"--init_from={argv[0]}", *argv[1:]] if argv and argv[0][:1] != "-" else argv)
    if missing := [name for name in ("fastapi", "uvicorn", *["gradio"] * cfg.page) if not find_spec(name)]:
        raise config.Mistake(f'the server needs {", ".join(missing)}: pip install -e ".[serve]"')
    return cfg


if __name__ == "__main__":  # before torch is imported: a typo answers at once
    settings = config.run(read_settings, sys.argv[1:])

import uvicorn
from fastapi import APIRouter, FastAPI, Request
from fastapi.middleware.trustedhost import TrustedHostMiddleware
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from common import print0
from engine import Asked, Engine

api = APIRouter()
NO_ANSWER = "(no answer: "


async def read(request, limit):
    """The body of a request as `Asked`. Raises `HTTPException` or pydantic's `ValidationError`."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > limit:
            raise HTTPException(413, f"the body has more than {limit} bytes")
    return Asked.model_validate_json(bytes(body))


def error_object(e):
    """(OpenAI's error object for an exception, its HTTP status)."""
    status = getattr(e, "status_code", 400 if isinstance(e, (config.Mistake, ValidationError)) else 500)
    if isinstance(e, ValidationError):
        e = "; ".join(f"{'.'.join(map(str, wrong['loc']))}: {wrong['msg']}" for wrong in e.errors()[:3])
    return {"error": {"message": getattr(e, "detail", str(e)), "param": None, "code": None,
                      "type": "server_error" if status == 500 else "invalid_request_error"}}, status


def described(engine, name):
    """OpenAI's model object of the model of this name."""
    if name != engine.name:
        raise HTTPException(404, f"there is no model {name!r}, only {engine.name!r}")
    return {"id": name, "object": "model", "created": 0, "owned_by": "everyllama"}


@api.get("/models")
@api.get("/models/")
async def models(request: Request):
    engine = request.app.state.engine
    return {"object": "list", "data": [described(engine, engine.name)]}


@api.get("/models/{name:path}")  # owner/model, of the hub
async def model(request: Request, name: str):
    return described(request.app.state.engine, name)


@api.post("/chat/completions")
@api.post("/completions")
async def answer(request: Request):
    """The next message of a chat, or the continuation of a text."""
    engine, cfg, chat = request.app.state.engine, request.app.state.cfg, "chat" in request.url.path
    asked = await read(request, cfg.body)
    described(engine, asked.model)
    if chat != bool(asked.messages):
        raise config.Mistake("a chat takes messages, a completion a prompt")
    if engine.held() >= cfg.rows + cfg.waiting:
        raise HTTPException(429, "too many requests are waiting: come again")
    prompt = await engine.read(asked.turns() if chat else asked.prompt)
    kind = "chat.completion" + ".chunk" * asked.stream if chat else "text_completion"
    head = {"id": f"cmpl-{secrets.token_hex(12)}", "object": kind, "created": int(time.time()), "model": asked.model}

    def body(text, new, finish):
        role = {} if asked.stream and new > 1 else {"role": "assistant"}  # once in a stream: clients join what comes
        said = {"delta" if asked.stream else "message": role | {"content": text}} if chat else {"text": text}
        return head | {"choices": [said | {"index": 0, "logprobs": None, "finish_reason": finish}]}

    def usage(new):
        return {"usage": {"prompt_tokens": len(prompt), "completion_tokens": new, "total_tokens": len(prompt) + new}}

    async def events():
        try:
            async with aclosing(engine.write(prompt, asked)) as pieces:
                async for text, new, finish in pieces:
                    yield f"data: {json.dumps(body(text, new, finish))}\n\n"
            if asked.stream_options.get("include_usage"):
                yield f"data: {json.dumps(head | {'choices': []} | usage(new))}\n\n"
        except Exception as e:
            yield f"data: {json.dumps(error_object(e)[0])}\n\n"
        yield "data: [DONE]\n\n"
    if asked.stream:
        return StreamingResponse(events(), media_type="text/event-stream")
    whole = ""
    async with aclosing(engine.write(prompt, asked)) as pieces:
        async for text, new, finish in pieces:
            whole += text
            if await request.is_disconnected():
                break
    return body(whole, new, finish) | usage(new)


def turns_of(messages):
    """gradio's messages, several for a turn with pictures, as `Engine.read` takes a chat; less what had no answer."""
    turns = []
    for role, same in groupby(messages, lambda message: message["role"]):
        said = ([{"text": m["content"]}] if isinstance(m["content"], str) else m["content"] for m in same)
        parts = [Path(part["file"]["path"]).read_bytes() if "file" in part else
                 html.unescape(part["text"]) if role == "assistant" else part["text"] for some in said for part in some]
        turns = turns[:-1] if role == "assistant" and parts[0].startswith(NO_ANSWER) else [*turns, (role, parts)]
    return turns


def add_page(app, engine, limit):
    """Put a page by gradio at /: a chat, with pictures where the model sees, or texts to continue."""
    import gradio
    chats, sees = bool(engine.tok.chat_template), bool(engine.eyes)
    async def chat(new, history):
        text, files = (new["text"], new["files"]) if sees else (new, ())
        said = {"role": "user", "content": [{"text": text}, *({"file": {"path": path}} for path in files)]}
        shown = "" if chats else text
        try:
            prompt = await (engine.recent(turns_of([*history, said])) if chats else engine.read(text))
            async with aclosing(engine.write(prompt, Asked(model=engine.name, max_tokens=engine.size // 4))) as pieces:
                async for piece, *_ in pieces:
                    shown += piece
                    yield html.escape(shown, quote=False)  # the page would take it for HTML
        except config.Mistake as e:
            yield f"{NO_ANSWER}{html.escape(str(e), quote=False)})"  # gradio.Error would hide the chat
    page = gradio.ChatInterface(
        chat, multimodal=sees, title=engine.name,
        description="Drop a picture, and ask." if sees else None if chats else "Begin a text: the model goes on.",
        chatbot=gradio.Chatbot(render_markdown=False, height="65vh", show_label=False, buttons=["copy", "copy_all"]),
        textbox=gradio.MultimodalTextbox(file_types=["image"], file_count="multiple") if sees else None,
        concurrency_limit=engine.rows, analytics_enabled=False)
    gradio.mount_gradio_app(app, page, "/", max_file_size=limit, footer_links=["gradio"])


def make_app(engine, cfg):
    """The application: OpenAI's API, and the page if it is wanted."""
    kinds = HTTPException, ValidationError, config.Mistake, ClientDisconnect, Exception
    handlers = dict.fromkeys(kinds, lambda _, e: JSONResponse(*error_object(e)))
    v1, app = (FastAPI(title="everyllama", openapi_url=None, exception_handlers=handlers) for _ in range(2))
    v1.state.engine, v1.state.cfg = engine, cfg
    v1.include_router(api)
    app.mount("/v1", v1)  # or the page would answer for what is not there
    if cfg.host in ("127.0.0.1", "localhost", "::1"):  # or the web could read answers, by a name that leads here
        here = ["127.0.0.1", "localhost", "[::1]", "["]  # the last: how Starlette up to 1.0 reads any IPv6 address
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=here)
    if cfg.page:
        add_page(app, engine, cfg.body)
    return app


def main(cfg):
    host, family = (f"[{cfg.host}]", socket.AF_INET6) if ":" in cfg.host else (cfg.host, socket.AF_INET)
    with config.mistakes(OSError, prefix=f"cannot listen at {host}:{cfg.port}: "):
        listener = socket.create_server((cfg.host, cfg.port), family=family)
    engine = Engine.load(cfg)
    server = uvicorn.Server(uvicorn.Config(make_app(engine, cfg), log_level="warning", timeout_graceful_shutdown=3))
    print0(f"{engine.name} at http://{host}:{listener.getsockname()[1]}, the API under /v1")
    logging.getLogger("uvicorn.error").addFilter(lambda _: not server.should_exit)  # cutting off a page is no error
    server.run([listener])


if __name__ == "__main__":
    config.run(main, settings)
