"""Settings: defaults, then a Python file of overrides, then the command line.

A script declares its settings as a dataclass whose every field carries a trailing comment with its reason, begun by
the interval of its values where it is a number, and calls `load(cls)`:

    batch_size: int = 32  # [1, inf) sequences in one forward pass; what memory allows

A config file is plain assignments (`batch_size = 64`), run in a namespace of its own; the command line takes
`--key=value` or `--key value`. Nothing here imports torch, so a mistyped key answers at once. The dataclass is read as
source text, so that `load` can also accept the fields of a class whose module is slow to import
(`model.py:LlamaConfig`).
"""
import ast
import contextlib
import difflib
import inspect
import itertools
import json
import math
import os
import re
import runpy
import sys
import textwrap
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


# -- mistakes ----------------------------------------------------------------------------------------------------

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
    """Call main(*args). A `Mistake` ends the program with one line on stderr and exit code 2, Ctrl-C with 130, and a
    reader of its output that leaves, as `| head` does, with 141 and no word.

    Characters that the terminal lacks, or that it sends in another encoding, are replaced: they end no run."""
    sys.excepthook = _one_line_for_ctrl_c  # while torch is being imported, outside of main
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # None without a terminal, another class within a test
            stream.reconfigure(errors="replace")
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


def _one_line_for_ctrl_c(kind, error, traceback):
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


# -- keys --------------------------------------------------------------------------------------------------------

@dataclass
class Key:
    """One setting: its type as written (`int`, `str | None`, `tuple[str, ...]`), default, reason, and the interval
    (text, low, high, whether low is allowed, whether high is) of a number, or None."""
    name: str
    type: str
    default: Any
    why: str
    interval: tuple | None = None

    def check(self, value, where):
        """Raise `Mistake` for a number outside of the interval."""
        if self.interval is None or type(value) not in (int, float):
            return
        text, low, high, low_in, high_in = self.interval
        above = value >= low if low_in else value > low
        below = value <= high if high_in else value < high
        if not (above and below):  # a NaN is neither
            raise Mistake(f"{where}: {self.name} must lie in {text}, not {value!r}")


INTERVAL = re.compile(r"([\[(])(-?[\d.e+-]+|-inf), (-?[\d.e+-]+|inf)([\])]) ")
LARGEST = 2**63  # what "inf" means for an int: beyond it numpy and torch overflow


def _key(name, type_, default, comment):
    """The Key of a field, whose trailing comment may begin with its interval."""
    match = INTERVAL.match(comment)
    if not match:
        return Key(name, type_, default, comment)
    low, high = (float(bound) if "." in bound or "e-" in bound or "inf" in bound else int(float(bound))
                 for bound in (match[2], match[3]))
    if high == math.inf and type_.startswith("int"):
        high = LARGEST
    interval = match[0].strip(), low, high, match[1] == "[", match[4] == "]"
    return Key(name, type_, default, comment[match.end():], interval)


def _keys_in(source, class_name):
    """The settings of dataclass `class_name` in Python text `source` -> {name: Key}, in order."""
    lines, keys = source.splitlines(), {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            for field in node.body:
                if isinstance(field, ast.AnnAssign):
                    comment = lines[field.end_lineno - 1].encode()[field.end_col_offset:].decode().strip().lstrip("# ")
                    name, type_ = field.target.id, ast.unparse(field.annotation)
                    keys[name] = _key(name, type_, ast.literal_eval(field.value), comment)
    return keys


def keys_of(cls):
    """The settings of a dataclass and its bases; of "file.py:Class" without importing it, bases written file.Class."""
    keys = {}
    if isinstance(cls, str):
        file, name = cls.split(":")
        source = (ROOT / file).read_text(encoding="utf-8")
        tree = next(n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == name)
        for base in tree.bases:
            keys |= keys_of(f"{Path(file).with_name(base.value.id)}.py:{base.attr}")
        return keys | _keys_in(source, name)
    for base in reversed(cls.__mro__[:-1]):
        keys |= _keys_in(textwrap.dedent(inspect.getsource(base)), base.__name__)
    return keys


# -- values ------------------------------------------------------------------------------------------------------

BASIC = {"int": int, "float": float, "bool": bool, "str": str}
BOOLS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def _typed(key, value, where):
    """`value` as key's type. Text from the command line is parsed; a Python value is checked."""
    name, optional = key.type.removesuffix(" | None"), key.type.endswith(" | None")
    wrong = Mistake(f"{where}: {key.name} takes {key.type}, not {value!r}")
    if optional and (value is None or value in ("None", "none")):
        return None
    if name.startswith("tuple["):
        item = name[len("tuple["):].split(",")[0]
        values = value if isinstance(value, (tuple, list)) else [value]
        if item != "str" and len(values) == 1 and isinstance(values[0], str):
            values = values[0].split(",")  # 8,1,4,8192
        return tuple(_typed(Key(key.name, item, None, "", key.interval), v, where) for v in values)
    kind = BASIC[name]
    if isinstance(value, str) and kind is not str:
        value = _parsed(value, kind, wrong)
    if kind is float and type(value) is int:
        value = float(value)
    elif kind is int and type(value) is float and value.is_integer():
        value = int(value)  # 1e6 in a config file
    if type(value) is not kind:
        raise wrong
    key.check(value, where)
    return value


def _parsed(text, kind, wrong):
    """Text of the command line as a bool, int or float; raises `wrong`."""
    try:
        if kind is bool:
            return BOOLS[text.lower()]
        if kind is int and "e" in text.lower():  # 1e6 reads better than 1000000
            if not float(text).is_integer():
                raise wrong
            return int(float(text))
        return kind(text)
    except (ValueError, KeyError, OverflowError):
        raise wrong from None


def _find(known, name, where):
    """The Key called `name`, or an error that names the nearest one: by its initials (lr), or by its letters."""
    if name in known:
        return known[name]
    initials = [k for k in known if "".join(word[0] for word in k.split("_")) == name]
    near = initials or difflib.get_close_matches(name, known, 1, 0.65)
    hint = f"did you mean '{near[0]}'?" if near else "-h lists them all"
    raise Mistake(f"{where}: unknown key '{name}'; {hint}")


def _from_file(path, known):
    """{key: value} from a file of Python assignments; modules and functions in it are its own."""
    if not Path(path).is_file():
        files = sorted(os.path.relpath(p) for p in (ROOT / "config").glob("[!_]*.py"))
        raise Mistake(f"no config file {path}; there are {', '.join(files)}")
    try:
        left = runpy.run_path(str(path))
    except SyntaxError as e:
        raise Mistake(f"{path}, line {e.lineno}: {e.msg}") from None
    except Exception as e:
        line = next((f.lineno for f in reversed(inspect.trace()) if Path(f.filename) == Path(path)), "?")
        raise Mistake(f"{path}, line {line}: {type(e).__name__}: {e}") from None
    if Path(path).name.startswith("vlm_") and "stage" in left and "stage" not in known:
        raise Mistake(f"{path} is for vlm.py")
    return {name: _typed(_find(known, name, path), value, path) for name, value in left.items()
            if not name.startswith("_") and not isinstance(value, (types.ModuleType, types.FunctionType, type))}


def _from_args(args, known):
    """{key: value} from --key=value, --key value, --flag, and --list a b c."""
    values, i = {}, 0
    while i < len(args):
        if not args[i].startswith("--"):
            file = ROOT / "config" / f"{args[i].removeprefix('config/')}.py"
            hint = f"; did you mean {os.path.relpath(file)}?" if file.is_file() else "; -h shows what is"
            if args[i].endswith(".py"):
                raise Mistake(f"command line: {args[i]} comes too late: config files stand before --keys")
            raise Mistake(f"command line: '{args[i]}' is neither a config file (*.py) nor --key=value{hint}")
        name, equals, value = args[i][2:].partition("=")
        i, key = i + 1, _find(known, name.replace("-", "_"), "command line")
        if not equals:
            words = list(itertools.takewhile(lambda word: not word.startswith("--"), args[i:]))
            if key.type.startswith("bool") and (not words or words[0].lower() not in BOOLS):
                value, words = True, []
            elif not words:
                raise Mistake(f"command line: --{name} needs a value ({key.type})")
            elif key.type.startswith("tuple["):
                value = tuple(words)
            else:
                value, words = words[0], words[:1]
            i += len(words)
        values[key.name] = _typed(key, value, "command line")
    return values


# -- loading -----------------------------------------------------------------------------------------------------

def _help(doc, own, other):
    """Print every key, its default (of another class, whose defaults a preset may replace: its type) and its reason."""
    print(textwrap.dedent(doc or "").strip())
    for title, keys in (("settings and their defaults", own),
                        ("shape of the model, where it departs from the preset", other)):
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
    settings = given if isinstance(cls, str) else make(cls, given)
    return (settings, {k: v for k, v in values.items() if k not in own}) if also else settings


def make(cls, given):
    """cls(**given); what it refuses with ValueError is a `Mistake`."""
    with mistakes(ValueError):
        return cls(**given)


def of_run(directory, cls, also):
    """(settings, shape) that the run.json of a run directory holds, or of the run of which it is the best/ or a
    checkpoint: {key: value} each, of those keys that dataclasses `cls` and `also` still have. ({}, {}) without a run.
    """
    directory = Path(directory)
    path = next((p / "run.json" for p in (directory, *directory.absolute().parents[:2]) if (p / "run.json").is_file()),
                None)
    if path is None:
        return {}, {}
    wrong = OSError, ValueError, RecursionError, AttributeError, KeyError, TypeError
    with mistakes(*wrong, prefix=f"{path} is no record of a run: "):
        facts = json.loads(path.read_text(encoding="utf-8"))
        found = []
        for part, keys in (facts["settings"], keys_of(cls)), (facts["model"], keys_of(also)):
            found.append({name: _typed(keys[name], value, path) for name, value in part.items() if name in keys})
    return found
