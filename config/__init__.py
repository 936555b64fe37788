"""Settings: defaults, then a Python file of overrides, then the command line.

A script declares its settings as a dataclass and calls `load(cls)`. Every field carries a trailing comment with its
reason, begun by the interval of a number or the choices for a word; a comment above begins a group of -h:

    # -- steps
    batch_size: int = 32  # [1, inf) sequences in one forward pass; what memory allows
    optimizer: str = "muon"  # {muon, adamw} Muon learns faster

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
import os
import re
import runpy
import sys
import textwrap
import types
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SHAPE = "model.py:LlamaConfig"  # whose fields a training script takes beside its own


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


@contextlib.contextmanager
def printing():
    """A block that prints. Where that fails, what is printed from then on, or still buffered, goes nowhere."""
    try:
        yield
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def run(main, *args):
    """Call main(*args). A `Mistake`, or OSError, with which the machine refuses something, ends the program with one
    line on stderr and exit code 2, Ctrl-C with 130, and a reader of its output that leaves, as `| head` does, with 141
    and no word. What the terminal's encoding lacks is replaced."""
    def last_word(kind, *rest):  # while torch is being imported, outside of main
        print("interrupted", file=sys.stderr) if kind is KeyboardInterrupt else sys.__excepthook__(kind, *rest)
    sys.excepthook = last_word
    sys.stdin = sys.stdin or open(os.devnull)  # None: closed
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # another class within a test
            stream.reconfigure(errors="replace")
    try:
        with mistakes(OSError):
            try:
                return main(*args)
            finally:
                with printing():
                    sys.stdout.flush()
    except Mistake as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(141)


# -- keys --------------------------------------------------------------------------------------------------------

COMMENT = re.compile(r"# (?P<limits>[\[(]\S+, \S+[\])] |\{.*?\} )?(?P<why>.*)")
BOOLS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
KINDS = {"int": int, "float": float, "bool": bool, "str": str}
READERS = {"int": ast.literal_eval, "float": float, "bool": lambda text: BOOLS[text.lower()],  # of text
           "str": lambda text: os.path.expanduser(text) if text.startswith("~/") else text}  # no shell does so after =


@dataclass
class Key:
    """One setting: its type as written (`int`, `str | None`, `tuple[str, ...]`), default, reason, limits ("[1, inf)" of
    a number, "{muon, adamw}" of a word, or ""), and its group in -h."""
    name: str
    type: str
    default: Any
    why: str
    limits: str = ""
    group: str = ""

    def read(self, value, where):
        """value in this key's type. Text is read for what it means, a Python value is checked. Raises `Mistake`."""
        name = self.type.removesuffix(" | None")
        value = value.item() if getattr(value, "shape", None) == () else value  # a number of numpy's
        if name != self.type and value in (None, "None", "none"):
            return None
        if name.startswith("tuple["):
            item = replace(self, type=name[len("tuple["):].split(",")[0])
            value = () if value in ("()", ("()",)) else value  # as -h shows it
            values = value if isinstance(value, (tuple, list)) else [value]
            if item.type != "str" and len(values) == 1 and isinstance(values[0], str):
                values = values[0].split(",")  # 8,1,4,8192
            return tuple(item.read(v, where) for v in values)
        found = value
        with contextlib.suppress(ValueError, SyntaxError, OverflowError, KeyError):
            found = READERS[name](value) if isinstance(value, str) else value
            if type(found) in (int, float) and name in ("int", "float") and KINDS[name](found) == found:
                found = KINDS[name](found)  # 1 for a float, and 1e6 for an int
        if type(found) is not KINDS[name]:
            raise Mistake(f"{where}: {self.name} takes {self.type}, not {value!r}")
        self.check(found, where)
        return found

    def check(self, value, where):
        """Raise `Mistake` for a value outside of the limits."""
        if self.limits.startswith("{") and value not in (allowed := self.limits[1:-1].split(", ")):
            raise Mistake(f"{where}: {self.name} must be one of {', '.join(allowed)}, not {value!r}")
        if self.limits and type(value) in (int, float):
            low, high = map(float, self.limits[1:-1].split(", "))
            above = low <= value if self.limits[0] == "[" else low < value
            below = value <= high if self.limits[-1] == "]" else value < high
            if not (above and below and abs(value) < 2**63):  # a NaN is neither; from 2**63 on numpy overflows
                raise Mistake(f"{where}: {self.name} must lie in {self.limits}, not {value!r}")


def keys_of(cls):
    """{name: Key} of a dataclass and of its bases, which its source writes as file.Class. cls: the class, or
    "file.py:Class", which is not imported."""
    file, _, name = (cls if isinstance(cls, str) else f"{inspect.getsourcefile(cls)}:{cls.__name__}").rpartition(":")
    source = (ROOT / file).read_text(encoding="utf-8")
    node = next(n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == name)
    keys, lines, group = {}, source.splitlines(), "settings"
    for base in node.bases:
        keys |= keys_of(f"{Path(file).with_name(base.value.id)}.py:{base.attr}")
    for field in node.body:
        if isinstance(field, ast.AnnAssign):
            above = lines[field.lineno - 2].strip()
            group = above.removeprefix("# -- ") if above.startswith("# -- ") else group
            name, comment = field.target.id, COMMENT.search(lines[field.end_lineno - 1])
            keys[name] = Key(name, ast.unparse(field.annotation), ast.literal_eval(field.value), comment["why"],
                             (comment["limits"] or "").strip(), keys[name].group if name in keys else group)
    return keys


OTHER_NAMES = {  # what other programs call these keys
    "prompt": "start", "data": "dataset", "steps": "max_iters", "lr": "learning_rate"}


def _find(known, name, where, advice=""):
    """The Key called `name`, or an error that names the one that was meant: by another name that it has elsewhere, its
    initials (bs), its beginning (lora), or its letters; and ends with more advice."""
    if name in known:
        return known[name]
    meant = [k for k in known if k == OTHER_NAMES.get(name)]
    meant += [k for k in known if "".join(word[0] for word in k.split("_")) == name]
    meant += [k for k in known if k.startswith(name)] + difflib.get_close_matches(name, known, 1, 0.65)
    hint = f"did you mean '{meant[0]}'?" if meant else "-h lists them all"
    raise Mistake(f"{where}: unknown key '{name}'; {hint}{advice}")


# -- files and words ---------------------------------------------------------------------------------------------

def as_seen(path):
    """A path as seen from here; as it is where nothing leads there, as to another drive of Windows."""
    try:
        return Path(os.path.relpath(path)).as_posix()  # Windows, too, reads it so, and no shell wants quotes
    except ValueError:
        return Path(path).as_posix()


@contextlib.contextmanager
def atomic_write(path):
    """A temporary path that takes the place of `path` once the block ends well: `with atomic_write(path) as tmp`."""
    path = Path(path)
    tmp = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        tmp.touch()
        mode = tmp.stat().st_mode
        yield tmp
        with open(tmp, "rb+") as f:  # Windows syncs no file that is open only for reading
            os.fsync(f.fileno())
        os.chmod(tmp, mode)  # safetensors lets nobody else read its files
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)


def _files():
    """{name: path} of the config files of this project, as seen from here."""
    return {path.stem: as_seen(path) for path in sorted((ROOT / "config").glob("[!_]*.py"))}


def _from_file(path, known):
    """{key: value} from a file of Python assignments; modules, functions, classes and what else it imports are
    its own. A file of the project means the project's out/, unless what it names is in one here."""
    if not os.path.isfile(path):
        raise Mistake(f"no config file {path}; there are {', '.join(_files().values())}")
    try:
        left = runpy.run_path(str(path))
    except SyntaxError as e:
        raise Mistake(f"{path}, line {e.lineno}: {e.msg}") from None
    except Exception as e:
        line = next((f.lineno for f in reversed(inspect.trace()) if Path(f.filename) == Path(path)), "?")
        raise Mistake(f"{path}, line {line}: {type(e).__name__}: {e}") from None
    imports = [node for node in ast.walk(ast.parse(Path(path).read_bytes())) if isinstance(node, ast.ImportFrom)]
    imported = {alias.asname or alias.name for node in imports for alias in node.names} - known.keys()
    command = rf"(\w+\.py) config/{re.escape(Path(path).name)}"  # that it begins with
    script = re.search(command, left["__doc__"] or "")
    left = {name: value for name, value in left.items()
            if not (name.startswith("_") or name in imported or isinstance(value, types.ModuleType) or callable(value))}
    if left.keys() - known and script and script[1] != Path(sys.argv[0]).name:
        raise Mistake(f"{path} is for {script[1]}")
    if Path(path).resolve().parent == ROOT / "config":
        left = {name: as_seen(ROOT / value) if str(value).startswith("out/") and not os.path.exists(value) else value
                for name, value in left.items()}
    advice = " (a name of your own begins with _)"
    return {name: _find(known, name, path, advice).read(value, path) for name, value in left.items()}


def _from_args(args, known):
    """{key: value} from --key=value, --key value, --flag, and --list a b c; a list of texts may come in parts."""
    values, args, where = {}, list(args), "command line"
    while args:
        word = args.pop(0)
        if not word.startswith("--"):
            if word.endswith(".py"):
                raise Mistake(f"{where}: {word} comes too late: config files stand before --keys")
            near = difflib.get_close_matches(Path(word).stem, _files(), 1)
            hint = f"did you mean {_files()[near[0]]}?" if near else "-h shows what is"
            raise Mistake(f"{where}: '{word}' is neither a config file (*.py) nor --key=value; {hint}")
        name, equals, value = word[2:].partition("=")
        key = _find(known, name.replace("-", "_"), where)
        if not equals:
            words = list(itertools.takewhile(lambda word: not word.startswith("--"), args))
            if key.type.startswith("bool") and (not words or words[0].lower() not in BOOLS):
                value, words = True, []
            elif not words:
                hint = f"; if {args[0]!r} is one: --{name}={args[0]!r}" if args else ""
                raise Mistake(f"{where}: --{name} needs a value ({key.type}){hint}")
            elif key.type.startswith("tuple["):
                value = tuple(words)
            else:
                value, words = words[0], words[:1]
            args = args[len(words):]
        read = key.read(value, where)
        values[key.name] = values.get(key.name, ()) + read if key.type.startswith("tuple[str") else read
    return values


def names_first(argv, known, kind):
    """(the names that argv begins with, the rest of argv); raises `Mistake` for a name that is not in `known`. With -h
    it prints the script's docstring and exits instead."""
    if {"-h", "--help"} & {*argv}:
        print(sys.modules["__main__"].__doc__)
        sys.exit()
    names = list(itertools.takewhile(lambda a: not a.startswith("-"), argv))
    if unknown := [n for n in names if n not in known]:
        raise Mistake(f"no {kind} '{unknown[0]}'; there are {', '.join(known) or 'none'}")
    return names, argv[len(names):]


# -- loading -----------------------------------------------------------------------------------------------------

def _presets():
    """The names of model.py's presets, read from its text."""
    tree = ast.parse((ROOT / "model.py").read_text(encoding="utf-8"))
    function = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "_presets")
    return [key.value for key in function.body[-1].value.keys]


def _help(doc, keys):
    """Print every key with its default, its limits and its reason, in groups; of model the presets too."""
    print(textwrap.dedent(doc or "").strip())
    for group in dict.fromkeys(key.group for key in keys.values()):
        print(f"\n{group}:")
        for key in (key for key in keys.values() if key.group == group):
            why = f"{key.limits} {key.why}".strip()
            if key.name == "model":
                why += ": " + ", ".join(_presets())
            print(textwrap.fill(why, 120, initial_indent=f"  --{key.name}={key.default!r}".ljust(40) + " ",
                                subsequent_indent=" " * 41, break_on_hyphens=False))


def load(cls, argv=None, also=None):
    """Settings of `cls` from its defaults, the config files (*.py) and --keys in argv (default: sys.argv).

    cls: a dataclass; or "file.py:Class", which is not imported, and {key: value} of what was given, in the order in
    which it was said, stands for its instance. also: "file.py:Class" whose fields are accepted too: then the result is
    a pair, with {key: value} of these. What `cls.__post_init__` refuses with ValueError, unknown keys and wrong types
    raise `Mistake`; -h prints the keys and exits.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    own, other = keys_of(cls), keys_of(also) if also else {}
    if {"-h", "--help"} & set(argv):
        _help(sys.modules["__main__"].__doc__, own | other)
        sys.exit(0)
    known, values = other | own, {}
    while argv and argv[0].endswith(".py") and not argv[0].startswith("--"):  # config files come first
        values |= _from_file(argv.pop(0), known)
    flags = _from_args(argv, known)
    values = {k: v for k, v in values.items() if k not in flags} | flags  # in the order in which they are said
    given = {k: v for k, v in values.items() if k in own}
    settings = given if isinstance(cls, str) else make(cls, given)
    return (settings, {k: v for k, v in values.items() if k not in own}) if also else settings


def make(cls, given):
    """cls(**given); what it refuses with ValueError is a `Mistake`."""
    with mistakes(ValueError):
        return cls(**given)


def of_run(directory, cls):
    """(settings, shape) that the run.json of a run directory holds, or of the run of which it is the best/ or a
    checkpoint: {key: value} each, of those keys that `cls` and `SHAPE` still have. ({}, {}) without a run.
    """
    if not os.path.isdir(directory):  # the name of a model on the hub
        return {}, {}
    directory = Path(directory).absolute()
    behind = Path(os.path.realpath(directory))  # a link
    files = [folder / "run.json" for folder in (directory, *behind.parents[:2], *directory.parents[:2])]
    path = next((file for file in files if os.path.isfile(file)), None)
    if path is None:
        return {}, {}
    wrong = OSError, ValueError, RecursionError, AttributeError, KeyError, TypeError
    with mistakes(*wrong, prefix=f"{path} is no record of a run: "):
        facts = json.loads(path.read_text(encoding="utf-8"))
        parts = (facts["settings"], keys_of(cls)), (facts["model"], keys_of(SHAPE))
        return [{name: keys[name].read(value, path) for name, value in part.items() if name in keys}
                for part, keys in parts]
