"""serve.py: OpenAI's own client, and clients that break the rules, against a real server with a tiny random model."""
import asyncio
import base64
import concurrent.futures
import contextlib
import io
import json
import os
import random
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch
from PIL import Image

pytest.importorskip("fastapi", reason="needs the packages of [serve]")
openai = pytest.importorskip("openai", reason="needs openai")
httpx = pytest.importorskip("httpx", reason="needs httpx")
uvicorn = pytest.importorskip("uvicorn", reason="needs the packages of [serve]")

import config
import serve
import vision
import vlm
from conftest import PATIENCE, ROOT
from prepare import examples, tokenizer
from prepare.images import with_pictures
from test_model import build, tiny

TEMPLATE = "{% for m in messages %}[{{ m.role }}: {{ m.content }}]{% endfor %}"
VOCABULARY = 97


def characters(more=""):
    """A tokenizer of 95 characters and more, BOS and EOS, with a chat template."""
    tok = tokenizer.char("".join(map(chr, range(32, 126))) + "é" + more, ("<s>", "</s>"))
    return tokenizer.Tokenizer(tok.spec, tok.settings | {"chat_template": TEMPLATE})


@contextlib.contextmanager
def serving(endless=False, engine=None, **settings):
    """(Engine, address) of a server in a thread, its model tiny and random. endless: no text ends by itself."""
    cfg = serve.ServeConfig(**{"page": False, "context": 3000} | settings)
    model = build(tiny("llama4-tiny", vocab_size=VOCABULARY, context=4096, chunk=64))
    engine = engine or serve.Engine("tiny", model, characters(), cfg.rows, cfg.context)
    engine.stop_ids = frozenset() if endless else engine.stop_ids
    listener = socket.create_server(("127.0.0.1", 0))
    app = serve.make_app(engine, cfg)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    until(lambda: server.started)
    try:
        yield engine, f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(PATIENCE)


def until(condition):
    """Wait for what is about to be true."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture(scope="module")
def served():
    with serving(rows=4, context=600) as (engine, address):
        yield engine, address, openai.OpenAI(base_url=address + "/v1", api_key="none", max_retries=0)


def greedy(engine, ids, count):
    """What the model says after ids by itself, (text, finish)."""
    new = engine.model.generate(torch.tensor([ids]), count, 0, eos_id=engine.stop_ids)[0, len(ids):].tolist()
    return engine.tok.decode(new), "stop" if new[-1] in engine.stop_ids else "length"


def test_a_completion_is_what_the_model_says(served):
    engine, _, client = served
    for prompt in "Once upon", "é", "":
        done = client.completions.create(model="tiny", prompt=prompt, max_tokens=20, temperature=0)
        ids = engine.tok.encode(prompt, bos=True)
        assert (done.choices[0].text, done.choices[0].finish_reason) == greedy(engine, ids, 20)
        assert done.usage.prompt_tokens == len(ids) and done.usage.total_tokens == len(ids) + 20
        parts = list(client.completions.create(model="tiny", prompt=prompt, max_tokens=20, temperature=0, stream=True))
        assert "".join(part.choices[0].text for part in parts) == done.choices[0].text
        assert [part.choices[0].finish_reason for part in parts] == [None] * (len(parts) - 1) + ["length"]


def test_a_chat_goes_by_its_template(served):
    engine, address, client = served
    messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    expect, finish = greedy(engine, engine.tok.encode("[system: be kind][user: hi]", bos=False), 12)
    done = client.chat.completions.create(model="tiny", messages=messages, max_completion_tokens=12, temperature=0)
    assert (done.choices[0].message.content, done.choices[0].finish_reason) == (expect, finish)
    assert done.choices[0].message.role == "assistant" and done.object == "chat.completion"
    messages[0]["role"] = "developer"  # its newer name
    assert client.chat.completions.create(model="tiny", messages=messages, max_tokens=12, temperature=0,
                                          modalities=["text"]).choices[0].message == done.choices[0].message
    parts = list(client.chat.completions.create(model="tiny", messages=messages, max_tokens=12, temperature=0,
                                                stream=True, stream_options={"include_usage": True}))
    assert [part.choices[0].delta.role for part in parts[:-1]] == ["assistant"] + [None] * (len(parts) - 2)
    assert parts[0].object == "chat.completion.chunk"
    assert "".join(part.choices[0].delta.content for part in parts[:-1]) == expect
    assert not parts[-1].choices and parts[-1].usage == done.usage
    raw = httpx.post(address + "/v1/chat/completions", json=dict(
        model="tiny", messages=messages, max_tokens=2, stream=True))
    assert raw.headers["content-type"].startswith("text/event-stream") and raw.text.endswith("data: [DONE]\n\n")


def test_a_stop_ends_the_text_before_it(served):
    engine, _, client = served
    text, _ = greedy(engine, engine.tok.encode("abc", bos=True), 60)
    for stop in (text[20:23], [text[30], "never to be seen"], text[-2:]):
        at = min(text.index(s) for s in ([stop] if isinstance(stop, str) else stop[:1]))
        ask = dict(model="tiny", prompt="abc", max_tokens=60, temperature=0, stop=stop)
        done = client.completions.create(**ask).choices[0]
        assert (done.text, done.finish_reason) == (text[:at], "stop")
        assert "".join(part.choices[0].text for part in client.completions.create(**ask, stream=True)) == text[:at]


def test_the_end_token_is_a_stop_and_no_text(served):
    engine, _, client = served
    engine.stop_ids, before = frozenset(range(256)), engine.stop_ids
    try:
        done = client.completions.create(model="tiny", prompt="abc", temperature=0).choices[0]
    finally:
        engine.stop_ids = before
    assert (done.text, done.finish_reason) == ("", "stop")


def test_a_seed_fixes_a_text_whatever_runs_beside_it(served):
    _, _, client = served

    def say(seed):
        return client.completions.create(model="tiny", prompt="abc", max_tokens=20, temperature=1, seed=seed
                                         ).choices[0].text
    alone = say(3)
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        together = list(pool.map(say, [1, 2, 3, 3, 4, 5]))
    assert together[2:4] == [alone, alone] and len({*together}) == 5
    unseeded = {client.completions.create(model="tiny", prompt="abc", max_tokens=20).choices[0].text for _ in "ab"}
    assert len(unseeded) == 2


def test_null_is_not_given(served):
    keys = "top_p", "stop", "seed", "n", "stream", "stream_options", "logprobs", "tools", "messages"
    answer = httpx.post(served[1] + "/v1/completions", json=GOOD | dict.fromkeys(keys))
    assert answer.json()["usage"]["completion_tokens"] == 2
    answer = httpx.post(served[1] + "/v1/completions", json=GOOD | dict.fromkeys((*keys, "temperature")))
    assert answer.json()["usage"]["completion_tokens"] in (1, 2)  # it draws then, and may draw the end


def test_what_changes_nothing_may_be_said(served):
    neutral = dict(n=1, best_of=1, logprobs=False, echo=False, suffix="", frequency_penalty=0.0, presence_penalty=0,
                   logit_bias={}, response_format={"type": "text"}, functions=[], tools=[], user="me",
                   repetition_penalty=1.0, repeat_penalty=1, typical_p=1.0, min_tokens=0, ignore_eos=False,
                   stop_token_ids=[])
    answer = httpx.post(served[1] + "/v1/completions", json=GOOD | neutral)
    assert answer.json()["usage"]["completion_tokens"] == 2


def test_top_k_and_min_p_choose(served):
    engine, _, client = served
    expect = greedy(engine, engine.tok.encode("abc", bos=True), 20)[0]
    for key in {"top_k": 1}, {"min_p": 1}:
        done = client.completions.create(model="tiny", prompt="abc", max_tokens=20, temperature=2, extra_body=key)
        assert done.choices[0].text == expect


def test_a_list_of_one_prompt_is_that_prompt(served):
    said = [served[2].completions.create(**GOOD | {"prompt": prompt}).choices[0].text for prompt in ("abc", ["abc"])]
    assert said[0] == said[1]


@pytest.mark.parametrize("turn", [{"content": None}, {}])
def test_an_assistant_that_only_called_a_tool_said_nothing(served, turn):
    """As OpenAI returns such a turn, and its client hands it on."""
    engine, _, client = served
    called = {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": {
        "name": "f", "arguments": "{}"}}]} | turn
    done = client.chat.completions.create(model="tiny", max_tokens=12, temperature=0, messages=[
        {"role": "user", "content": "hi"}, called, {"role": "tool", "tool_call_id": "1", "content": "5"}])
    ids = engine.tok.encode("[user: hi][assistant: ][tool: 5]", bos=False)
    assert done.choices[0].message.content == greedy(engine, ids, 12)[0]


@pytest.mark.parametrize("name", ["tiny", "owner/model"])
def test_models(served, monkeypatch, name):
    engine, address, client = served
    monkeypatch.setattr(engine, "name", name)
    listed, = client.models.list()
    assert listed.id == name and client.models.retrieve(name) == listed
    assert httpx.get(f"{address}/v1/models/{name}").status_code == 200  # which the client writes as owner%2Fmodel
    with pytest.raises(openai.NotFoundError, match=f"there is no model 'gpt-9', only '{name}'"):
        client.models.retrieve("gpt-9")


GOOD = {"model": "tiny", "prompt": "abc", "max_tokens": 2, "temperature": 0}  # or an end may be drawn


@pytest.mark.parametrize("changes, status, words", [
    ({"model": "gpt-9"}, 404, "no model 'gpt-9', only 'tiny'"), ({"model": None}, 400, "model"),
    ({"prompt": 3}, 400, "prompt"), ({"prompt": ["a", "b"]}, 400, "prompt"), ({"prompt": [[3]]}, 400, "prompt"),
    ({"prompt": "x" * 599}, 400, "a prompt of 600 tokens"),
    ({"max_tokens": 0}, 400, "max_tokens"), ({"max_tokens": "many"}, 400, "max_tokens"),
    ({"temperature": -1}, 400, "temperature"), ({"temperature": 1e9}, 400, "temperature"),
    ({"top_p": 1.5}, 400, "top_p"), ({"seed": -1}, 400, "seed"), ({"seed": 2**64}, 400, "seed"),
    ({"n": 2}, 400, "n: "), ({"logprobs": 5}, 400, "logprobs"), ({"tools": [{}]}, 400, "tools"),
    ({"frequency_penalty": 0.5}, 400, "frequency_penalty"), ({"presence_penalty": -1}, 400, "presence_penalty"),
    ({"logit_bias": {"5": 1}}, 400, "logit_bias"), ({"echo": True}, 400, "echo"), ({"suffix": "x"}, 400, "suffix"),
    ({"best_of": 2}, 400, "best_of"), ({"functions": [{}]}, 400, "functions"), ({"min_p": 2}, 400, "min_p"),
    ({"response_format": {"type": "json_object"}}, 400, "response_format"), ({"top_k": -1}, 400, "top_k"),
    ({"repetition_penalty": 1.1}, 400, "repetition_penalty"), ({"repeat_penalty": 0.9}, 400, "repeat_penalty"),
    ({"typical_p": 0.5}, 400, "typical_p"), ({"min_tokens": 5}, 400, "min_tokens"),
    ({"ignore_eos": True}, 400, "ignore_eos"), ({"stop_token_ids": [2]}, 400, "stop_token_ids"),
    ({"stop": 3}, 400, "stop"), ({"stop": ["a"] * 5}, 400, "stop"), ({"stop": ""}, 400, "stop"),
    ({"stop": "a" * 1000}, 400, "stop"), ({"stream": "perhaps"}, 400, "stream"),
    ({"stream_options": 3}, 400, "stream_options"), ({"prompt": "x" * 21_000_000}, 413, "more than 20000000 bytes"),
    ({"messages": [{"role": "user", "content": "x"}]}, 400, "a prompt"), ({"bad_words": ["a"]}, 400, "bad_words"),
    ({"guided_json": {"type": "object"}}, 400, "guided_json"), ({"guided_regex": "a*"}, 400, "guided_regex"),
    ({"guided_choice": ["a"]}, 400, "guided_choice"), ({"guided_grammar": "a"}, 400, "guided_grammar"),
    ({"structured_outputs": {"regex": "a"}}, 400, "structured_outputs"), ({"grammar": "a"}, 400, "grammar"),
    ({"json_schema": {}}, 400, "json_schema"), ({"use_beam_search": True}, 400, "use_beam_search"),
    ({"modalities": ["text", "audio"]}, 400, "modalities"), ({"allowed_token_ids": [1]}, 400, "allowed_token_ids"),
    ({"chat_template": "x"}, 400, "chat_template"), ({"continue_final_message": True}, 400, "continue_final_message"),
    ({"add_generation_prompt": False}, 400, "add_generation_prompt"), ({"n_predict": 3}, 400, "n_predict"),
    ({"mirostat": 2}, 400, "mirostat"), ({"dry_multiplier": 0.8}, 400, "dry_multiplier"),
    ({"xtc_probability": 0.5}, 400, "xtc_probability"), ({"truncate_prompt_tokens": 3}, 400, "truncate_prompt_tokens"),
    ({"include_stop_str_in_output": True}, 400, "include_stop_str_in_output"),
])
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_wrong_is_said_in_openais_way(served, changes, status, words, stream):
    answer = httpx.post(served[1] + "/v1/completions", json=GOOD | {"stream": stream} | changes)
    error = answer.json()["error"]
    assert answer.status_code == status and words in error["message"] and error["type"] == "invalid_request_error"


@pytest.mark.parametrize("messages", [
    [], "hi", [3], [{"role": "user"}], [{"role": "user", "content": None}], [{"content": "x"}], [{}],
    [{"role": "human", "content": "x"}],
    [{"role": "user", "content": [{"type": "image_url"}]}]])
def test_messages_that_are_none(served, messages):
    with pytest.raises(openai.BadRequestError, match="messages"):
        served[2].chat.completions.create(model="tiny", messages=messages)


def test_an_empty_prompt_is_said(served, monkeypatch):
    """Of a template that writes nothing."""
    monkeypatch.setattr(served[0].tok, "chat_template", {"default": "{{ '' }}"})
    for stream in False, True:
        with pytest.raises(openai.BadRequestError, match="the prompt is empty"):
            served[2].chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x"}], stream=stream)


def test_a_token_that_the_model_lacks_is_said(served, monkeypatch):
    monkeypatch.setattr(served[0].model.config, "vocab_size", 96)  # of 97, the last is </s>
    monkeypatch.setattr(served[0].tok, "chat_template", {"default": "{{ eos_token }}"})
    with pytest.raises(openai.BadRequestError, match="the prompt has '</s>', which is not in the model's vocabulary"):
        served[2].chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x"}])


def test_bodies_that_are_no_json_do_no_harm(served):
    """200 requests, each a good one with a few bytes of it changed, cut or doubled."""
    _, address, client = served
    draw = random.Random(0)
    with httpx.Client(timeout=PATIENCE) as http:
        for _ in range(200):
            body = bytearray(json.dumps(GOOD | {"stream": draw.random() < 0.5}).encode())
            for _ in range(draw.randint(1, 4)):
                at = draw.randrange(len(body))
                body[at:at + draw.randint(0, 3)] = bytes(draw.randrange(256) for _ in range(draw.randint(0, 3)))
            answer = http.post(address + draw.choice(("/v1/completions", "/v1/chat/completions")), content=bytes(body))
            assert answer.status_code == 200 or answer.status_code in (400, 404) and answer.json()["error"]["message"]
        for body in (b"", b"[" * 100000, b'{"a":' * 100000, b"\xff\xfe", b"null", b"NaN"):
            assert http.post(address + "/v1/completions", content=body).json()["error"]["message"]
        assert http.post(address + "/v1/completions", content=iter([b"x" * 2**23] * 3)).status_code == 413
    assert client.completions.create(**GOOD).usage.completion_tokens == 2


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_a_name_that_leads_here_from_elsewhere_is_no_way_in(served, host):
    with serving(engine=served[0], host=host) as (_, address):
        for name in "127.0.0.1", "localhost", "[::1]":
            assert httpx.get(address + "/v1/models", headers={"Host": f"{name}:80"}).status_code == 200
        assert httpx.get(address + "/v1/models", headers={"Host": "example.com"}).status_code == 400


def test_addresses_and_methods_that_are_not_served_are_errors_as_openai_has_them(served):
    missing(served[1])


def missing(address):
    for path, status in ("/v1/embeddings", 404), ("/v1/", 404), ("/v1/completions", 405), ("/v1/completions/", 405):
        answer = httpx.get(address + path, follow_redirects=True)
        assert answer.status_code == status and answer.json()["error"]["type"] == "invalid_request_error"
    assert httpx.get(address + "/v1/models/", follow_redirects=True).json()["object"] == "list"
    assert httpx.post(address + "/v1/completions/", follow_redirects=True, json={}).status_code == 400


def test_a_client_that_leaves_frees_its_row():
    with serving(True, rows=1, waiting=1) as (engine, address), httpx.Client(timeout=PATIENCE) as http:
        long = GOOD | {"max_tokens": 2900}
        with http.stream("POST", address + "/v1/completions", json=long | {"stream": True}) as answer:
            next(answer.iter_lines())
            running = engine.batch.running[0]
        until(lambda: running.done)
        assert len(running.new) < 2900
        with pytest.raises(httpx.ReadTimeout):  # nothing comes before the whole is there
            http.post(address + "/v1/completions", json=long, timeout=0.3)
        until(lambda: not engine.batch.busy)
        assert http.post(address + "/v1/completions", json=GOOD).status_code == 200


def test_a_full_queue_asks_to_come_again():
    with serving(True, rows=1, waiting=1) as (engine, address), httpx.Client(timeout=PATIENCE) as http:
        ask = dict(url=address + "/v1/completions", method="POST", json=GOOD | {"max_tokens": 2900, "stream": True})
        with http.stream(**ask) as first, http.stream(**ask) as second:
            lines = first.iter_lines()  # kept: httpx closes a stream whose reader is gone
            next(lines)
            client = openai.OpenAI(base_url=address + "/v1", api_key="none", max_retries=0)
            with pytest.raises(openai.RateLimitError) as e:
                client.completions.create(**GOOD)
            assert "come again" in str(e.value) and second.status_code == 200
        until(lambda: not engine.batch.busy)
        assert client.completions.create(**GOOD).usage.completion_tokens == 2


def test_a_step_that_fails_ends_no_later_request(monkeypatch):
    with serving() as (engine, address):
        monkeypatch.setattr("engine.Batch", None)  # there may be no memory for a second cache
        def fail():
            del engine.batch.step  # the next one goes well
            raise RuntimeError("out of memory")
        engine.batch.step = fail
        assert httpx.post(address + "/v1/completions", json=GOOD).json()["error"]["message"].endswith("out of memory")
        engine.batch.step = fail
        lines = httpx.post(address + "/v1/completions", json=GOOD | {"stream": True}).text.splitlines()
        assert json.loads(lines[0].removeprefix("data: "))["error"]["type"] == "server_error"
        assert httpx.post(address + "/v1/completions", json=GOOD).status_code == 200


def small(rows):
    """An Engine without a server."""
    model = build(tiny("stories15m", vocab_size=VOCABULARY, context=4096))
    return serve.Engine("tiny", model, characters(), rows, 3000)


def test_a_step_that_fails_halfway_leaves_nobody_waiting():
    """The first request has its only token already, when the prompt of the second finds no memory."""
    engine = small(rows=2)
    read = engine.batch.read

    def second_fails(prompt, row):
        if row:
            raise RuntimeError("out of memory")
        return read(prompt, row)
    engine.batch.read = second_fails

    async def ask():
        return [piece async for piece in engine.write([1], serve.Asked(model="tiny", max_tokens=1))]

    async def both():
        return await asyncio.wait_for(asyncio.gather(ask(), ask(), return_exceptions=True), 5)
    assert [type(answer) for answer in asyncio.run(both())] == [RuntimeError] * 2 and not engine.held()


SCOPE = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [(b"host", b"localhost")],
         "query_string": b"", "http_version": "1.1", "scheme": "http", "server": ("localhost", 80)}


def test_a_client_that_leaves_during_its_upload_is_no_error():
    messages = [{"type": "http.disconnect"}, {"type": "http.request", "body": b"{", "more_body": True}]

    async def receive():
        return messages.pop()

    async def send(_):
        pass
    asyncio.run(serve.make_app(small(rows=1), serve.ServeConfig(page=False))(dict(SCOPE), receive, send))
    assert not messages


def test_a_client_that_leaves_before_its_stream_begins_keeps_no_row():
    """It hangs up between its request and the first byte of the answer: the server finds that out when it sends."""
    cfg, engine = serve.ServeConfig(page=False, rows=1, context=3000), small(rows=1)
    engine.stop_ids = frozenset()
    body = json.dumps(GOOD | {"max_tokens": 2900, "stream": True}).encode()

    async def leave(version):
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive():
            return messages.pop() if messages else {"type": "http.disconnect"}

        async def send(_):
            raise OSError("the client has gone")
        with contextlib.suppress(Exception):
            await serve.make_app(engine, cfg)(SCOPE | {"asgi": {"version": "3.0", "spec_version": version}}, receive,
                                              send)
        for _ in range(20):  # steps, in which a row is freed
            await asyncio.sleep(0.01)
        return engine.held()
    for version in "2.3", "2.4":  # by which Starlette listens for it, or waits for an error
        assert asyncio.run(leave(version)) == 0


# -- pictures ----------------------------------------------------------------------------------------------------

def uri(width=20, height=30, color="red", kind="png"):
    """A picture as a data URI."""
    file = io.BytesIO()
    Image.new("RGB", (width, height), color).save(file, kind)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def about(*urls, text="what?"):
    """A request for a chat about pictures."""
    parts = [{"type": "image_url", "image_url": {"url": url, "detail": "low"}} for url in urls]
    return {"model": "eyes", "max_tokens": 12, "messages": [
        {"role": "user", "content": [*parts, {"type": "text", "text": text}]}]}


@pytest.fixture(scope="module")
def eyes(tmp_path_factory):
    """(Engine, address) of a run that sees, its weights random."""
    torch.manual_seed(0)
    tok, image_id = examples.with_image(characters("\n"))
    llama = build(tiny("stories15m", vocab_size=tok.vocab_size, context=200))
    model = vlm.Vlm(llama, vision.make_encoder("vit_tiny", None, False), image_id).freeze(("encoder",))
    run = tmp_path_factory.mktemp("out") / "eyes"
    model.save_pretrained(run, tok)
    engine = serve.Engine.load(serve.ServeConfig(init_from=str(run), device="cpu", rows=4))
    with serving(engine=engine) as served:
        yield served


def test_an_answer_about_pictures_is_the_models(eyes):
    """As vlm.py --ask has it, one after another and all at once; each picture counts."""
    engine, address = eyes

    def expected(*urls):
        files, run = [io.BytesIO(base64.b64decode(url.partition(",")[2])) for url in urls], engine.eyes
        features, canvases = zip(*(vlm.look(run, file) for file in files))
        ids = run.tok.chat([{"role": "user", "content": with_pictures("what?", len(urls))}])
        new, = run.vlm.generate([ids], torch.cat(features), 12, run.tok.stop_ids, canvases)
        return run.tok.decode([i for i in new if i not in run.tok.stop_ids])
    asked = [(uri(),), (uri(color="blue"),), (uri(), uri(color="blue")), (uri(50, 8, "green", "webp"),)]
    client = openai.OpenAI(base_url=address + "/v1", api_key="none", max_retries=0)

    def say(urls):
        done = client.chat.completions.create(**about(*urls))
        assert done.usage.prompt_tokens > 9 * len(urls)
        return done.choices[0].message.content
    alone = [say(urls) for urls in asked]
    assert alone == [expected(*urls) for urls in asked] and len(set(alone)) > 1
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert list(pool.map(say, asked * 3)) == alone * 3


@pytest.mark.parametrize("parts, text", [
    (["what?", b""], "<image>\nwhat?"), ([b"", b"", "wh", "at?"], "<image>\n<image>\nwhat?"),
    (["a: ", b"", " b: ", b"", "?"], "a: <image> b: <image>?"), ([b"", "a, ", b"", "b"], "<image>a, <image>b"),
    (["what? <image>", b""], "what? <image>"), (["wh", "at?"], "what?")])
def test_a_picture_between_texts_keeps_its_place(eyes, monkeypatch, parts, text):
    """Where there is one text, it stands as it was learned: before that, or where the text has it."""
    said = []
    monkeypatch.setattr(eyes[0].tok, "chat", lambda turns: said.extend(turns) or [])
    with pytest.raises(config.Mistake):
        eyes[0].prompt([("user", parts)], 1)
    assert said == [{"role": "user", "content": text}]


@pytest.mark.parametrize("url, status, words", [
    ("http://127.0.0.1:1/a.png", 400, "no address is fetched"), ("file:///etc/passwd", 400, "no address is fetched"),
    ("data:text/plain;base64,aGk=", 400, "data:image/"), ("data:image/png;base64,###", 400, "image_url.url"),
    ("data:image/png;base64,aGVsbG8=", 400, "it is not a picture"), ("data:image/png;base64,", 400, "not a picture"),
    (uri()[:62], 400, "a picture: "), (uri(20000, 5001), 400, "20000 x 5001 pixels are more than"),
    ("data:image/png;base64," + "A" * 2**25, 413, "more than 20000000 bytes")])
def test_what_is_no_picture_is_said(eyes, url, status, words):
    answer = httpx.post(eyes[1] + "/v1/chat/completions", json=about(url), timeout=PATIENCE)
    assert answer.status_code == status and words in answer.json()["error"]["message"]


def test_pictures_that_have_no_place(eyes, served):
    for address, request, words in (
            (eyes[1], about(*[uri()] * 30), "a prompt of "),
            (eyes[1], about(uri(), text="<image> <image>"), "leave it out"),
            (served[1], about(uri()) | {"model": "tiny"}, "reads text alone")):
        answer = httpx.post(address + "/v1/chat/completions", json=request)
        assert answer.status_code == 400 and words in answer.json()["error"]["message"]


# -- the program ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("host, family", [("127.0.0.1", socket.AF_INET), ("::1", socket.AF_INET6)])
def test_a_port_that_is_taken_is_one_line_before_anything_is_loaded(tmp_path, host, family):
    try:
        listener = socket.create_server((host, 0), family=family)
    except OSError:
        pytest.skip("needs IPv6")
    with listener as taken:
        port = taken.getsockname()[1]
        with pytest.raises(config.Mistake, match=f"cannot listen at .*:{port}: .*[Aa]ddress already in use"):
            serve.main(serve.read_settings([str(tmp_path), "--page=False", f"--host={host}", f"--port={port}"]))


def test_a_cache_that_is_too_large_is_one_line():
    with pytest.raises(config.Mistake, match="fewer --rows or a shorter --context"):
        small(rows=10**9)


def test_a_model_that_is_too_large_is_one_line(tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.\nGPU 0 has a total capacity of 1 GiB")
    build(tiny("stories15m", vocab_size=VOCABULARY)).save_pretrained(tmp_path)
    monkeypatch.setattr("sample.load", full)
    with pytest.raises(config.Mistake, match="--device=cpu: CUDA out of memory. GPU 0 has"):
        serve.Engine.load(serve.ServeConfig(init_from=str(tmp_path), device="cpu"))


def test_a_model_of_the_hub_has_its_name_there(tmp_path, monkeypatch):
    snapshot = tmp_path / "snapshots" / "0123abcd"
    build(tiny("stories15m", vocab_size=VOCABULARY)).save_pretrained(snapshot)
    characters().save(snapshot)
    for name, want in ("owner/model", "owner/model"), (str(snapshot), "0123abcd"):
        monkeypatch.setattr("huggingface_hub.snapshot_download", lambda asked, **_: {"owner/model": snapshot}[asked])
        engine = serve.Engine.load(serve.ServeConfig(init_from=name, device="cpu", dtype="float32"))
        assert engine.name == want


def test_an_empty_name_is_not_the_newest_run(tmp_path, monkeypatch):
    cfg = serve.read_settings(["", "--page=False", "--device=cpu"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sample.newest_run", None)
    with pytest.raises(config.Mistake, match="no directory"):
        serve.Engine.load(cfg)


def test_missing_packages_are_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(config.Mistake, match=r"the server needs gradio: pip install -e \"\.\[serve\]\""):
        serve.read_settings([])
    assert not serve.read_settings(["--page=False"]).page


@pytest.mark.slow
def test_a_thousand_requests_lose_nothing_and_leave_memory_flat():
    resident = psutil_of_this_process()
    with serving(rows=8) as (engine, address), httpx.Client(timeout=PATIENCE) as http:
        expect = {f"prompt {i}": greedy(engine, engine.tok.encode(f"prompt {i}", bos=True), 5 + i)[0]
                  for i in range(20)}

        def ask(i):
            prompt = f"prompt {i % 20}"
            body = GOOD | {"prompt": prompt, "max_tokens": 5 + i % 20, "temperature": 0, "stream": i % 3 == 0}
            answer = http.post(address + "/v1/completions", json=body)
            if i % 3:
                return answer.json()["choices"][0]["text"] == expect[prompt]
            parts = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
            return "".join(part["choices"][0]["text"] for part in parts) == expect[prompt]
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            assert all(pool.map(ask, range(300)))
            before = resident()
            assert all(pool.map(ask, range(1000)))
        assert resident() - before < 16 * 2**20 and not engine.batch.busy and not engine.batch.waiting


def psutil_of_this_process():
    """A function that tells the bytes of memory that this process holds."""
    psutil = pytest.importorskip("psutil", reason="needs psutil")
    return lambda: psutil.Process().memory_info().rss


def test_the_page_talks(tmp_path):
    """As it is started, and used through gradio's own client."""
    gradio_client = pytest.importorskip("gradio_client", reason="needs the packages of [serve]")  # gradio brings it
    build(tiny("stories15m", vocab_size=VOCABULARY, context=256)).save_pretrained(tmp_path / "run")
    characters().save(tmp_path / "run")
    with subprocess.Popen([sys.executable, "serve.py", tmp_path / "run", "--port=0"], cwd=ROOT, text=True,
                          stdout=subprocess.PIPE, env=os.environ | {"GRADIO_ANALYTICS_ENABLED": "False"}) as process:
        try:
            line = next(line for line in process.stdout if line.startswith("run at "))  # gradio 6.0 says "new" first
            address = line.split("at ")[1].split(",")[0]
            until(lambda: answers(address))
            assert "gradio" in httpx.get(address).text
            client = gradio_client.Client(address, verbose=False)
            said = [client.predict(str(text), api_name="/chat") for text in range(6)]  # each ends where chance has it
            assert any(len(text) > 3 for text in said) and not any(text.startswith("(no answer") for text in said)
            assert client.predict("x" * 300, api_name="/chat").startswith("(no answer: a prompt of ")
            said = client.predict("and now?", api_name="/chat")  # as if it had not been asked
            assert not said.startswith("(no answer")
            assert not any("<" in client.predict(f"<b>{i}</b>", api_name="/chat") for i in range(3))  # text, no HTML
            assert httpx.get(address + "/v1/models").json()["data"][0]["id"] == "run"
            missing(address)
        finally:
            process.terminate()


def answers(address):
    with contextlib.suppress(httpx.ConnectError):
        return httpx.get(address + "/v1/models").status_code == 200
