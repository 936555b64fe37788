"""Settings: defaults, then a Python file of overrides, then the command line.

A script declares its settings as a dataclass whose every field carries a trailing
comment with its reason, and calls `load(cls)`. A config file is plain assignments
(`batch_size = 64`), run in a namespace of its own; the command line takes
`--key=value` or `--key value`. Nothing here imports torch, so a mistyped key answers
at once. The dataclass is read as source text, so that `load` can also accept
the fields of a class whose module is slow to import (`model.py:LlamaConfig`).
"""
import ast
import contextlib
import difflib
import inspect
import itertools
import os
import runpy
import sys
import textwrap
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


class Mistake(Exception):
    """Something the user can put right: shown as one line, exit code 2, no traceback."""


@contextlib.contextmanager
def mistakes(*kinds, prefix=""):
    """Within this block, exceptions of these kinds are the user's to mend: re-raise them as `Mistake`."""
    try:
        yield
    except BrokenPipeError:  # for `run`
        raise
    except kinds as e:
        raise Mistake(prefix + " ".join(str(e).split())) from e


def run(main, *args):
    """Call main(*args); a `Mistake` ends the program with one line on stderr and exit code 2, Ctrl-C with 130, and a reader
    of its output that leaves, as `| head` does, with 141 and no word."""
    try:
        try:
            return main(*args)
        finally:
            sys.stdout.flush()
    except Mistake as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered has somewhere to go
        sys.exit(141)


@dataclass
class Key:
    """One setting: its type as written (`int`, `str | None`, `tuple[str, ...]`), default and reason."""
    name: str
    type: str
    default: Any
    why: str


def _keys_in(source, class_name):
    """The settings of dataclass `class_name` in Python text `source` -> {name: Key}, in order."""
    lines, found = source.splitlines(), {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            for field in node.body:
                if isinstance(field, ast.AnnAssign):
                    tail = lines[field.end_lineno - 1].encode()[field.end_col_offset:].decode()
                    found[field.target.id] = Key(field.target.id, ast.unparse(field.annotation),
                                                 ast.literal_eval(field.value), tail.strip().lstrip("# "))
    return found


def keys_of(cls):
    """The settings of a dataclass and its bases; of "file.py:Class" without importing it, bases written file.Class too."""
    found = {}
    if isinstance(cls, str):
        file, name = cls.split(":")
        source = (ROOT / file).read_text(encoding="utf-8")
        tree = next(n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == name)
        for base in tree.bases:
            found |= keys_of(f"{Path(file).with_name(base.value.id)}.py:{base.attr}")
        return found | _keys_in(source, name)
    for base in reversed(cls.__mro__[:-1]):
        found |= _keys_in(textwrap.dedent(inspect.getsource(base)), base.__name__)
    return found


BASIC = {"int": int, "float": float, "bool": bool, "str": str}


def _typed(key, value, where):
    """`value` as key's type. Text from the command line is parsed; a Python value is checked."""
    name, optional = key.type.removesuffix(" | None"), key.type.endswith(" | None")
    wrong = Mistake(f"{where}: {key.name} takes {key.type}, not {value!r}")
    if optional and (value is None or value in ("None", "none")):
        return None
    if name.startswith("tuple["):
        item = name[len("tuple["):].split(",")[0]
        if not isinstance(value, (tuple, list)):
            value = [value]
        return tuple(_typed(Key(key.name, item, None, ""), v, where) for v in value)
    kind = BASIC[name]
    if isinstance(value, str) and kind is not str:
        try:
            if kind is bool:
                return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[value.lower()]
            if kind is int and "e" in value.lower():  # 1e6 reads better than 1000000
                if float(value) != int(float(value)):
                    raise ValueError
                return int(float(value))
            return kind(value)
        except (ValueError, KeyError, OverflowError):
            raise wrong from None
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise wrong
    return value


def _find(known, name, where):
    """The Key called `name`, or an error that names the nearest one."""
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, 1, 0.5)
    raise Mistake(f"{where}: unknown key '{name}'" + (f"; did you mean '{near[0]}'?" if near else "; -h lists them all"))


def _from_file(path, known):
    """{key: value} from a file of Python assignments."""
    if not Path(path).is_file():
        have = ", ".join(sorted(f"config/{p.name}" for p in (ROOT / "config").glob("[!_]*.py")))
        raise Mistake(f"no config file {path}; there are {have}")
    try:
        left = runpy.run_path(str(path))
    except SyntaxError as e:
        raise Mistake(f"{path}, line {e.lineno}: {e.msg}") from None
    except Exception as e:
        line = next((f.lineno for f in reversed(inspect.trace()) if Path(f.filename) == Path(path)), "?")
        raise Mistake(f"{path}, line {line}: {type(e).__name__}: {e}") from None
    return {name: _typed(_find(known, name, path), value, path) for name, value in left.items()
            if not name.startswith("_") and not isinstance(value, types.ModuleType)}


def _from_args(args, known):
    """{key: value} from --key=value, --key value, --flag, and --list a b c."""
    values, i = {}, 0
    while i < len(args):
        if not args[i].startswith("--"):
            raise Mistake(f"command line: '{args[i]}' is neither a config file (*.py) nor --key=value")
        name, equals, value = args[i][2:].partition("=")
        i, key = i + 1, _find(known, name.replace("-", "_"), "command line")
        if not equals:
            count = 0
            while i + count < len(args) and not args[i + count].startswith("--"):
                count += 1
            many = key.type.startswith("tuple[")
            if key.type == "bool" and (not count or args[i].lower() not in ("true", "false", "1", "0", "yes", "no")):
                value, count = True, 0
            elif not count:
                raise Mistake(f"command line: --{name} needs a value ({key.type})")
            else:
                count = count if many else 1
                value = tuple(args[i:i + count]) if many else args[i]
            i += count
        values[key.name] = _typed(key, value, "command line")
    return values


def _help(doc, own, other):
    """What -h prints: every key, its default (of another class, whose defaults a preset may replace: its type) and reason."""
    print(textwrap.dedent(doc or "").strip())
    for title, keys in (("settings and their defaults", own), ("shape of the model, where it departs from the preset", other)):
        if keys:
            print(f"\n{title}:")
        for k in keys.values():
            head = f"  --{k.name}={k.default!r}" if keys is own else f"  --{k.name}={k.type}"
            print(textwrap.fill(k.why, 120, initial_indent=head.ljust(40) + " ", subsequent_indent=" " * 41))


def names_first(argv, known, kind):
    """(the names that argv begins with, the rest of argv); raises `Mistake` for a name that is not in `known`."""
    names = list(itertools.takewhile(lambda a: not a.startswith("-"), argv))
    if unknown := [n for n in names if n not in known]:
        raise Mistake(f"no {kind} '{unknown[0]}'; there are {', '.join(known)}")
    return names, argv[len(names):]


def load(cls, argv=None, also=None):
    """Settings of dataclass `cls` from its defaults, the config files (*.py) and --keys in argv (default: sys.argv).

    also: "file.py:Class", a dataclass (read without importing it) whose fields are accepted too. cls may be given
    in this way as well, where its bases are slow to import; then {field: value given} stands for the instance.
    Returns cls(...), or (cls(...), {field of the other class: value given}) when `also` is set. Values
    that `cls.__post_init__` refuses with ValueError, unknown keys and wrong types raise `Mistake`;
    -h prints the keys and exits.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    own, other = keys_of(cls), keys_of(also) if also else {}
    if {"-h", "--help"} & set(argv):
        _help(sys.modules["__main__" if isinstance(cls, str) else cls.__module__].__doc__, own, other)
        sys.exit(0)
    known = other | own
    values = {}
    while argv and argv[0].endswith(".py") and not argv[0].startswith("--"):  # config files come first
        values |= _from_file(argv.pop(0), known)
    values |= _from_args(argv, known)
    given = {k: v for k, v in values.items() if k in own}
    with mistakes(ValueError):
        cfg = given if isinstance(cls, str) else cls(**given)
    return (cfg, {k: v for k, v in values.items() if k not in own}) if also else cfg
