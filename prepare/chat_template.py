"""Conversations: their text by a chat template, run as transformers runs it (its utils/chat_template_utils.py), their
ids, and which of these the assistant says."""
import functools
import itertools
import json
import re
import secrets
from datetime import datetime

import config
from prepare.tokenizer_spec import valid

SECRET = str(secrets.randbits(128))  # digits that nobody can guess, and that no filter of a template changes
ALIAS = f"<{SECRET}>{{}}>"  # a second name of the special token with this id, which no text has
BEGIN, END = f"{SECRET}[", f"{SECRET}]"  # around what the assistant says, in the text of a template that marks it


@functools.lru_cache
def compiled(template):
    """A chat template in jinja2's sandbox, with what transformers gives it there."""
    import jinja2
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} ... {% endgeneration %}: what the assistant says. It renders as BEGIN, its body, END."""
        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            begin, end = (jinja2.nodes.Output([jinja2.nodes.TemplateData(mark)], lineno=line) for mark in (BEGIN, END))
            return [begin, jinja2.nodes.Scope(body, lineno=line), end]

    def refuse(message):
        raise jinja2.TemplateError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                        extensions=[Generation, "jinja2.ext.loopcontrols"])
    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = refuse
    return env.from_string(template)


def complete(message):
    """A message as templates get it: without keys that are None, its reasoning under the two names in use."""
    message = {key: value for key, value in message.items() if value is not None}
    for key in ("reasoning_content", "thinking", "reasoning"):
        if key in message:
            return {"thinking": message[key]} | message | {"reasoning_content": message[key]}
    return message


def each_text(x, change):
    """x with `change` applied to every str in its lists and dicts, keys included."""
    if isinstance(x, dict):
        return {each_text(key, change): each_text(value, change) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [each_text(value, change) for value in x]
    return change(x) if isinstance(x, str) else x


class Chats:
    """What a tokenizer does with conversations: the part of `tokenizer.Tokenizer` that needs its chat template."""

    def render(self, messages, add_generation_prompt=True, tools=None, documents=None, date=None):
        """Text of a conversation, as apply_chat_template(tokenize=False) of transformers gives it.

        messages: [{"role": ..., "content": ...}, ...]; tools: JSON schemas; documents: dicts; date: the datetime.date,
        or "2026-01-31", that templates print (None: today's). The template is not trusted: it runs in jinja2's sandbox.
        Raises `config.Mistake` if there is none, or if it refuses the conversation.
        """
        return "".join(self._pieces(messages, add_generation_prompt, tools, documents, date))

    def _pieces(self, messages, add_generation_prompt, tools, documents, date):
        """What the template writes, by turns outside and inside of its marks."""
        if not self.chat_template:
            raise config.Mistake("this tokenizer has no chat template: its model continues texts, it does not chat")
        name = "tool_use" if tools is not None and "tool_use" in self.chat_template else "default"
        if name not in self.chat_template:
            raise config.Mistake(f"none of its chat templates {sorted(self.chat_template)} is the default")
        values = {"tools": tools, "documents": documents, "add_generation_prompt": add_generation_prompt}
        with config.mistakes(Exception, prefix="chat template: "):  # a template can fail in any way
            day = datetime.fromisoformat(date) if isinstance(date, str) else date
            written = valid(compiled(self.chat_template[name]).render(
                self._named | values, messages=[complete(message) for message in messages],
                strftime_now=lambda form: (day or datetime.now()).strftime(form)))
        return re.split(f"{re.escape(BEGIN)}|{re.escape(END)}", written)

    @functools.cached_property
    def _names(self):
        """Matches the names of special tokens, the longest first."""
        return re.compile("|".join(map(re.escape, sorted(self.special, key=len, reverse=True))) or "(?!)")

    @functools.cached_property
    def _aliases(self):
        """{id of an alias: id of its special token}. The library finds aliases in a text even where it takes the names
        of special tokens for plain text."""
        import tokenizers
        flags = "single_word", "lstrip", "rstrip", "normalized"
        self._library.add_tokens([
            tokenizers.AddedToken(ALIAS.format(t["id"]), **{flag: t.get(flag, False) for flag in flags})
            for t in self.spec["added_tokens"] if t["special"]])
        return {self._library.token_to_id(ALIAS.format(i)): i for i in self.special.values()}

    def chat(self, messages, add_generation_prompt=True, tools=None, documents=None, date=None):
        """Ids of a conversation in the form that the model was trained on; arguments and errors as in `render`.

        They are those of AutoTokenizer, but that a special token's name within a message stays text, so that no message
        can end itself and speak for another. For that, names are hidden from the template; then the special tokens that
        the template wrote go by their aliases, and what was hidden is text again.
        """
        return self._chat(messages, add_generation_prompt, tools, documents, date)[0]

    def _chat(self, messages, add_generation_prompt, tools, documents, date):
        """(ids as in `chat`, [first, end) of the ids that each mark of the template overlaps)."""
        def hide(text):
            return self._names.sub(lambda name: f"{SECRET}{self.special[name[0]]:010}", text)
        messages, tools, documents = each_text([messages, tools, documents], hide)
        pieces = self._pieces(messages, add_generation_prompt, tools, documents, date)
        hidden = any(SECRET in piece for piece in pieces)
        if hidden:
            names = {i: name for name, i in self.special.items()}
            pieces = [self._names.sub(lambda name: ALIAS.format(self.special[name[0]]), piece) for piece in pieces]
            pieces = [re.sub(rf"{SECRET}(\d{{10}})", lambda name: names[int(name[1])], piece) for piece in pieces]
        aliases, text = self._aliases if hidden else {}, "".join(pieces)
        ids = [aliases.get(i, i) for i in self._run([text], special=not hidden)[0]]
        if len(pieces) == 1:
            return ids, []
        places = self._library.encode(text, add_special_tokens=False).offsets  # of each id in the text
        edges, spans = [0, *itertools.accumulate(map(len, pieces))], []
        for first, end in zip(edges[1::2], edges[2::2]):
            inside = [n for n, (left, right) in enumerate(places) if left < end and right > first]
            spans += [(inside[0], inside[-1] + 1)] if inside else [(0, 0)]
        return ids, spans

    def lesson(self, messages, learn, tools=None, date=None):
        """(ids of a conversation, list of bool: which of them are to be learned).

        Learned is each assistant turn with its end, where learn (a bool for each message) says so. What a template
        marks with {% generation %} is that turn: every id that overlaps the mark, as for transformers and TRL.
        Without marks it goes from the end of the prompt that asks for it to the first stop token.
        Raises `config.Mistake` where that cannot be told.
        """
        ids, spans = self._chat(messages, False, tools, None, date)
        said = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not spans:
            spans = [self._turn(ids, messages[:i + 1], tools, date) for i in said if learn[i]]
        elif len(spans) == len(said):
            spans = [span for i, span in zip(said, spans) if learn[i]]
        elif not all(learn[i] for i in said):
            raise config.Mistake(f"this chat template marks {len(spans)} turns, where the assistant has {len(said)}: "
                                 "which of them is not to be learned cannot be told")
        learned = [False] * len(ids)
        for first, end in spans:
            learned[first:end] = [True] * (end - first)
        return ids, learned

    def _turn(self, ids, messages, tools, date):
        """[first, end) of the last of the messages, with its end, in the ids of a conversation that they begin."""
        if len(messages) == 1:
            raise config.Mistake("the assistant speaks first: there is no prompt")
        before = self.chat(messages[:-1], True, tools, None, date)
        after = self.chat(messages, False, tools, None, date)
        end = next((n for n in range(len(before), len(after)) if after[n] in self.stop_ids), None)
        if end is None:
            raise config.Mistake("no stop token ends the assistant's turn in this chat template")
        if after[:len(before)] != before:
            raise config.Mistake("the prompt has other ids when the answer follows it: an answer that begins with "
                                 "white space joins what is before it, or this chat template changes earlier turns")
        if ids[:end + 1] != after[:end + 1]:
            raise config.Mistake("this chat template changes earlier turns, so that answers cannot be learned as they "
                                 "were given")
        return len(before), end + 1
