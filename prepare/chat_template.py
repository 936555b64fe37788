"""Chat templates, run as transformers runs them (its utils/chat_template_utils.py)."""
import functools
import json
from datetime import datetime


@functools.lru_cache
def compiled(template):
    """A chat template in jinja2's sandbox, with what transformers gives it there (utils/chat_template_utils.py)."""
    import jinja2
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} ... {% endgeneration %}: what the assistant says. It renders as its body."""
        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            return jinja2.nodes.Scope(parser.parse_statements(["name:endgeneration"], drop_needle=True), lineno=line)

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


def render(template, messages, date, values):
    """Text of messages by a template that sees these values too. strftime_now formats date, None: the present one."""
    if isinstance(date, str):
        date = datetime.fromisoformat(date)
    return compiled(template).render(messages=[complete(message) for message in messages], **values,
                                     strftime_now=lambda form: (date or datetime.now()).strftime(form))
