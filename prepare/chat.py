"""Prepare conversations to fine-tune a model: python prepare/chat.py --input FILES --init_from MODEL

A record of a jsonl, json or parquet file is one conversation, in any of these forms:
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}     OpenAI's
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]}         ShareGPT's
    {"instruction": "Translate.", "input": "Hi", "output": "Salut"}             Alpaca's, also with "history": [[q, a]]
    {"prompt": "Hi", "completion": "Hello!"}           texts, or lists of messages; only the completion is learned
Beside them may stand "tools" (JSON schemas; OpenAI's older "functions" too) and "system" (a text). A message with
"weight": 0 or "train": false is read but not learned.

The model's own chat template writes them (see prepare/chat_template.py). What is learned is each turn of the assistant
with the token that ends it, and nothing else. Conversations that are too long lose whole turns from their end.
Which of them validate is decided by a hash, so one that comes twice is not on both sides.
"""
import bisect
import itertools
import json
import shlex
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from any folder
import config
from prepare import chat_template, shards, sources, text, tokenizer

SPEAKERS = "system", "user", "assistant", "tool"
ROLES = {"human": "user", "gpt": "assistant", "developer": "system", "function": "tool", "observation": "tool"}
EXAMPLES = 3  # conversations that are printed
SHOWN = 1500  # characters of each
BLOCK_SIZE = 1024  # that of config/finetune.py
ROWS = 1000  # of the embedding, whose median length tells what is usual


@dataclass
class Settings:
    """Which conversations, for which model."""
    input: tuple[str, ...] = ()  # files, folders or globs of jsonl, json (also packed) and parquet; needed
    val: tuple[str, ...] = ()  # the same to validate on, even if in the input; none: a share of the input
    init_from: str | None = None  # the model that is to learn them, a directory or a hub name; needed
    template: str | None = None  # a jinja file, or a tokenizer's folder, with another chat template than the model's
    out: str | None = None  # folder to write; None: data/chat
    longest: int | None = None  # [2, inf) tokens in a conversation; longer ones are cut; None: the model's context
    val_fraction: float = 0.05  # [0, 1) share of the conversations held out: data sets for fine-tuning are small
    limit: int | None = None  # [1, inf) stop after this many records of the input; None: all of them
    skip_bad: bool = False  # leave out records that are wrong, and count them; False: the first one ends it
    date: str = "2026-01-01"  # that some templates print: fixed, or the same command would give other ids tomorrow


# -- records -----------------------------------------------------------------------------------------------------

def messages_in(record):
    """The messages of a record, in the words of its form. Raises ValueError for none of the forms."""
    def turn(role, said):
        return said if isinstance(said, list) else [{"role": role, "content": said}]
    if "messages" in record or "conversations" in record:
        messages = record.get("messages") or record.get("conversations", [])
    elif {"prompt", "completion"} <= record.keys():
        prompt = [message | {"weight": 0} for message in turn("user", record["prompt"])]
        messages = prompt + turn("assistant", record["completion"])
    elif {"instruction", "output"} <= record.keys():
        asked = "\n\n".join(filter(None, (record["instruction"], record.get("input"))))
        before = [one for q, a in record.get("history") or () for one in turn("user", q) + turn("assistant", a)]
        messages = before + turn("user", asked) + turn("assistant", record["output"])
    else:
        raise ValueError("a record needs messages, conversations, prompt and completion, or instruction and output; it "
                         f"has {', '.join(record)[:200] or 'nothing'}")
    if not isinstance(messages, list):
        raise ValueError(f"messages stand in a list, not in {str(messages)[:40]!r}")
    return (turn("system", record["system"]) if record.get("system") else []) + messages


def text_of(content):
    """The text of a message's content: a text, or a list of parts {"type": "text", "text": ...}."""
    parts = content if isinstance(content, list) else [content]
    parts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else part for part in parts]
    if not all(isinstance(part, str) for part in parts):
        raise ValueError(f"its content is a text or a list of them, not {str(content)[:40]!r}")
    return "".join(parts)


def called(call):
    """A tool call whose arguments are an object, as templates want them; OpenAI writes its JSON as a text."""
    function = call.get("function", call)
    if isinstance(function.get("arguments"), str):
        function = function | {"arguments": json.loads(function["arguments"].strip() or "{}")}
    return call | {"function": function} if "function" in call else function


def renamed(message, name):
    """A message whose tool calls, if any, name this function; templates get its content, too."""
    calls = [call | ({"function": call["function"] | {"name": name}} if "function" in call else {"name": name})
             for call in message.get("tool_calls", ())]
    return {"content": ""} | message | {"tool_calls": calls} if calls else message


def message_of(message):
    """(a message for templates, whether it is to be learned). Raises ValueError that says what is wrong."""
    calls = "tool_calls", "function_call"  # an empty one is none, but templates ask whether it is there
    message = {key: value for key, value in message.items() if value or value is not None and key not in calls}
    weight, train = message.pop("weight", 1), message.pop("train", True)
    for theirs, ours in ("from", "role"), ("value", "content"):
        if theirs in message:
            message[ours] = message.pop(theirs)
    if message.get("role") == "function_call":  # of LLaMA-Factory's: JSON of a call, or of a list of them
        message |= {"role": "assistant", "function_call": json.loads(message.pop("content", ""))}
    role = message["role"] = ROLES.get(message.get("role"), message.get("role"))
    if role not in SPEAKERS:
        raise ValueError(f"its role is one of {', '.join(SPEAKERS)}, not {role!r}")
    if weight not in (0, 1):
        raise ValueError(f"its weight is 0 or 1, not {weight!r}")
    if train not in (0, 1):
        raise ValueError(f"its train is true or false, not {train!r}")
    if "content" in message:
        message["content"] = text_of(message["content"])
    if "function_call" in message:  # OpenAI's, before there were tool_calls
        calls = message.pop("function_call")
        message["tool_calls"] = [{"type": "function", "function": call}
                                 for call in (calls if isinstance(calls, list) else [calls])]
    if message.get("tool_calls"):
        message["tool_calls"] = [called(call) for call in message["tool_calls"]]
    elif not message.get("content", "").strip() and role in ("user", "assistant"):
        raise ValueError(f"the {role} says nothing")
    return message, bool(role == "assistant" and weight and train)


def conversation_of(record):
    """(messages, which of them are to be learned, tools or None) of a record. Raises ValueError."""
    if isinstance(record, ValueError):  # a line that is no JSON
        raise record
    if not isinstance(record, dict):
        raise ValueError(f"a record is an object, not {str(record)[:40]!r}")
    record = {key: value for key, value in record.items() if value is not None}
    if record.get("image") or record.get("images"):
        raise ValueError("it is about pictures, which are for vlm.py")
    found = []
    for n, message in enumerate(messages_in(record), 1):
        try:
            found.append(message_of(message))
        except (ValueError, TypeError, AttributeError) as e:
            raise ValueError(f"message {n}: {e}") from None
    tools, functions = (json.loads(given.strip() or "null") if isinstance(given, str) else given
                        for given in map(record.get, ("tools", "functions")))
    if tools and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise ValueError(f"tools are a list of objects, not {str(tools)[:40]!r}")
    tools = tools or [{"type": "function", "function": one} for one in functions or ()]
    return [message for message, _ in found], [learned for _, learned in found], tools or None


# -- lessons: ids, and which of them are learned -----------------------------------------------------------------

class Lessons:
    """What the conversations of files become. Counts what is read, cut, dropped and bad in `counts`."""

    def __init__(self, tok, cfg, longest):
        self.tok, self.cfg, self.longest, self.counts = tok, cfg, longest, Counter()

    def read(self, paths, limit=None):
        """(hash of the conversation, ids, which of them are learned) of each that can be learned from, among so many
        records."""
        source = sources.Files(paths)
        with tqdm(total=1, bar_format="{percentage:3.0f}%|{bar:20}| {desc} [{elapsed}<{remaining}]") as bar:
            for _, place, record in itertools.islice(source.read(), limit):
                self.counts["records"] += 1
                try:
                    messages, learn, tools = conversation_of(record)
                    lesson = self.lesson(messages, learn, tools)
                except (ValueError, TypeError, AttributeError, config.Mistake) as e:
                    if not self.cfg.skip_bad:
                        raise config.Mistake(f"{place}: {e}; --skip_bad leaves such records out") from None
                    self.counts["bad"] += 1
                    if self.counts["bad"] <= EXAMPLES:
                        print(f"skipped: {place}: {e}", flush=True)
                    continue
                if lesson:  # the same one told twice, with other names or times, is on one side of the split
                    yield text.hash_of(json.dumps(lesson[0])), *lesson
                bar.set_description_str(f"{self.counts['records']:,} conversations", refresh=False)
                bar.update(source.fraction() - bar.n)

    def lesson(self, messages, learn, tools):
        """(ids, which of them are learned) of a conversation up to the last answer to be learned that fits; None where
        there is none."""
        def size(end):
            return len(self.tok.chat(messages[:end], False, tools, date=self.cfg.date))
        ends = [i + 1 for i, learned in enumerate(learn) if learned]
        if not ends:
            self.counts["silent"] += 1
            return None
        self.check_template(messages[:ends[-1]], tools)
        fitting = len(ends) if size(ends[-1]) <= self.longest else bisect.bisect_right(ends, self.longest, key=size)
        if not fitting:
            self.counts["too long"] += 1
            return None
        end = ends[fitting - 1]
        if fitting < len(ends):
            self.counts["cut"] += 1
            self.counts["messages cut"] += len(messages) - end
        ids, learned = self.tok.lesson(messages[:end], learn[:end], tools, self.cfg.date)
        if self.tok.stop_ids.isdisjoint(itertools.compress(ids, learned)):
            self.counts["endless"] += 1
        return ids, learned

    def check_template(self, messages, tools):
        """Refuse tool calls that the template leaves out: an answer of nothing would be learned. Count what else it
        leaves out: tools, and words of the messages."""
        def written(messages, tools):
            return self.tok.render(messages, False, tools, date=self.cfg.date)
        name, calls = chat_template.SECRET, sum(len(message.get("tool_calls", ())) for message in messages)
        if calls and written([renamed(message, name) for message in messages], tools).count(name) < calls:
            raise config.Mistake("this chat template writes no tool calls, or not all of them: --template takes one "
                                 "that does")
        if tools and written(messages, tools) == written(messages, [*tools, *tools]):
            self.counts["no tools"] += 1
        said = [message.get("content", "").strip() != "" for message in messages]
        marked = [message | {"content": f"{name}{message['content']}{name}"} if says else message
                  for message, says in zip(messages, said)]
        if written(marked, tools).count(name) < 2 * sum(said):
            self.counts["no words"] += 1

    def report(self):
        """Lines that say what was left out, and why."""
        c, longest = self.counts, f"{self.longest:,} tokens"
        lines = {"cut": f"cut: {c['cut']:,} conversations lost {c['messages cut']:,} messages beyond {longest}",
                 "too long": f"dropped: {c['too long']:,} conversations, whose first answer ends beyond {longest}",
                 "silent": f"dropped: {c['silent']:,} conversations, in which there is no answer to learn",
                 "endless": f"no end of an answer is learned in {c['endless']:,} conversations: it would not stop",
                 "no words": f"the chat template leaves out words of {c['no words']:,} conversations",
                 "no tools": f"the chat template leaves out the tools of {c['no tools']:,} conversations",
                 "bad": f"skipped: {c['bad']:,} bad records"}
        return [line for key, line in lines.items() if c[key]]


def held_out(lessons, fraction):
    """(split, ids, which of them are learned) of the lessons; the first thousand settle where the split lies."""
    head = list(itertools.islice(lessons, text.HEAD))
    hashes = {lesson[0] for lesson in head}
    if fraction and len(hashes) == 1:
        raise config.Mistake("the input has 1 conversation to learn from, too few to train on some and validate on "
                             "others: --val takes files to validate on")
    threshold = text.threshold_of(hashes, fraction) if fraction and hashes else 0
    for hash, ids, learned in itertools.chain(head, lessons):
        yield "val" if hash < threshold else "train", ids, learned


def shown(tok, ids, learned):
    """The text of a lesson, with >>> and <<< around what is learned."""
    parts = []
    for learn, group in itertools.groupby(zip(ids, learned), key=lambda pair: pair[1]):
        words = tok.decode([i for i, _ in group], special=True)
        parts.append(f">>>{words}<<<" if learn else words)
    whole = "".join(parts)
    return whole if len(whole) <= SHOWN else f"{whole[:SHOWN]}... ({len(whole) - SHOWN:,} more characters)"


# -- the model ---------------------------------------------------------------------------------------------------

def with_template(tok, source):
    """The tokenizer with the chat template of a jinja file or of a tokenizer's folder."""
    if Path(source).is_dir():
        template = tokenizer.load(source).settings.get("chat_template")
        if not template:
            raise config.Mistake(f"--template {source}: the tokenizer there has no chat template")
    else:
        with config.mistakes(OSError, ValueError, prefix="--template: "):
            template = Path(source).read_text(encoding="utf-8-sig")
    settings = {key: value for key, value in tok.settings.items() if key != "stop_ids"}  # those of another form
    return tokenizer.Tokenizer(tok.spec, settings | {"chat_template": template}, tok.model)


def unlearned(files, tok, date):
    """Names of the special tokens that a chat consists of and the model seems never to have learned: their row of the
    embedding, in one of these safetensors files, is shorter than a hundredth of the usual, or that of another one.
    Raises `Mistake` for those that have no row."""
    from safetensors import safe_open
    talk = [{"role": role, "content": role} for role in ("system", "user", "assistant")]
    try:
        chat = tok.chat(talk[1:], False, date=date)
    except config.Mistake:  # some templates demand a system turn, others refuse it
        chat = tok.chat(talk, False, date=date)
    names = {i: name for name, i in tok.special.items()}
    for path in files:
        with safe_open(path, "pt") as file:
            for key in (key for key in file.keys() if key.endswith("embed_tokens.weight")):
                rows = file.get_slice(key)
                if beyond := [names[i] for i in sorted(names.keys() & set(chat)) if i >= rows.get_shape()[0]]:
                    raise config.Mistake(f"the chat template writes {', '.join(beyond)}, which the model lacks: "
                                         "--template takes another")
                usual = rows[:ROWS].float().norm(dim=1).median()
                special = {i: rows[i:i + 1].float()[0] for i in names if i < rows.get_shape()[0]}
                return [names[i] for i in sorted(special.keys() & set(chat)) if special[i].norm() < usual / 100
                        or any(special[i].equal(row) for other, row in special.items() if other != i)]
    return []


def open_model(cfg):
    """(tokenizer, context) of the model; says what of its template it has never learned."""
    import adapter
    import checkpoint
    with config.mistakes(ValueError, FileNotFoundError):
        directory = checkpoint.find_checkpoint(cfg.init_from)
        tok = adapter.load_tokenizer(directory)
        base = adapter.base_of(directory) if adapter.is_adapter(directory) else directory
        context = base != directory and adapter.context_of(directory)
        context = context or checkpoint.config_from_hf(checkpoint.read_json(base / "config.json")).context
        files = checkpoint.weight_files(base)
    tok = with_template(tok, cfg.template) if cfg.template else tok
    if not tok.chat_template:
        raise config.Mistake(f"{cfg.init_from} has no chat template: --template takes one, a jinja file or "
                             "the folder of a model that has one")
    if never := unlearned(files, tok, cfg.date):
        print(f"{cfg.init_from} seems never to have learned {', '.join(never)}, which its chat template writes: train "
              "all weights (LoRA leaves the embedding as it is), or start from a model that chats", flush=True)
    return tok, context


# -- the data set ------------------------------------------------------------------------------------------------

def write(out, tok, lessons, paths, val_paths):
    """Write the data set `out` of the conversations in these files, print the first ones; returns (meta.json, tokens
    of the longest conversation, {split: tokens learned})."""
    writer, longest, learning = shards.Writer(out, tok, marked=True), 0, Counter()
    given = (("val", ids, learned) for _, ids, learned in lessons.read(val_paths)) if val_paths else ()
    fraction = 0 if val_paths else lessons.cfg.val_fraction
    split_up = held_out(lessons.read(paths, lessons.cfg.limit), fraction)
    for n, (split, ids, learned) in enumerate(itertools.chain(split_up, given)):
        marks = np.array(learned, np.uint8) * shards.LEARN
        marks[0] |= shards.START
        writer.add(split, ids, 0, marks=marks)
        longest, learning[split] = max(longest, len(ids)), learning[split] + sum(learned)
        if n < EXAMPLES:
            print(f"--- conversation {n + 1}\n{shown(tok, ids, learned)}", flush=True)
    if not longest:
        raise config.Mistake(" ".join(["there is no conversation to learn from;", *lessons.report()]))
    return writer.finish(date=lessons.cfg.date, template=bool(lessons.cfg.template)), longest, learning


def main():
    cfg = config.load(Settings)
    if not cfg.input or not cfg.init_from:
        raise config.Mistake("which conversations, for which model? --input FILES --init_from MODEL")
    out = shards.own_folder(cfg.out or config.ROOT / "data/chat", shards.DATA_FILES, [*cfg.input, *cfg.val])
    val_paths = sources.find_files(cfg.val, out, "--val")
    validating = {path.resolve() for path in val_paths}
    paths = [path for path in sources.find_files(cfg.input, out) if path.resolve() not in validating]
    if not paths:
        raise config.Mistake("--val takes all files of --input: there is nothing to train on")
    tok, context = open_model(cfg)
    if cfg.longest and cfg.longest > context:
        print(f"--longest={cfg.longest} exceeds the model's context: it is {context} tokens here", flush=True)
    lessons = Lessons(tok, cfg, min(cfg.longest or context, context))
    meta, longest, learning = write(out, tok, lessons, paths, val_paths)
    print("---", *lessons.report(), sep="\n")
    for split in shards.SPLITS:
        counts = meta["splits"][split]
        print(f"{split}: {counts['documents']:,} conversations, {counts['tokens']:,} tokens, of which "
              f"{learning[split]:,} are learned")
    if not all(meta["splits"][split]["documents"] for split in shards.SPLITS):
        print(f"{out} is ready, but for training there is nothing to validate on: see --val_fraction and --val")
        return
    command = ["train.py", "config/finetune.py", f"--init_from={cfg.init_from}", f"--dataset={text.name_of(out)}"]
    if Path(cfg.init_from).resolve() == config.ROOT / "out/finetune":  # where config/finetune.py would write
        command.append("--out_dir=out/finetune_2")
    block_size = min(max(BLOCK_SIZE, -(-(longest - 1) // 64) * 64), context)
    command += [f"--block_size={block_size}"] if block_size != BLOCK_SIZE else []
    print(f"{out} is ready: python {shlex.join(command)}")


if __name__ == "__main__":
    config.run(main)
