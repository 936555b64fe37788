"""The files that hold a tokenizer, each read as a tokenizer.json: what prepare/tokenizer.py runs.

A folder means what AutoTokenizer of transformers makes of it. A tokenizer.json of which it would change nothing, as of
those that are saved here, is read without it. Two departures: the rank files of Llama 3 and 4 get Meta's special tokens
and its cut of words, of which AutoTokenizer knows nothing; and a folder without any settings gets BOS and EOS by their
usual names. A lone tokenizer.model means what Meta's code makes of it: BOS begins a text, and decoding gives back every
character.
"""
import base64
import contextlib
import json
import re

import config
from prepare.tokenizer_spec import (BYTE_TO_CHAR, LLAMA3_WORDS, LLAMA4_WORDS, STRIP, around, bpe, byte_level, make_spec,
                                    merges_of, split)

SIDE_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
PAIRS = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))  # GPT-2's two files, under both names
RANK_LINE = re.compile(rb"[A-Za-z0-9+/]+=* \d+\s")  # what a rank file begins with
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = range(1, 6)  # types of pieces in sentencepiece_model.proto

USUAL_NAMES = {  # the first that exists, where no settings name one
    "bos_token": ("<|begin_of_text|>", "<s>", "<|endoftext|>"),
    "eos_token": ("<|end_of_text|>", "</s>", "<|endoftext|>")}
BUILD_ONLY = ("added_tokens_decoder", "extra_special_tokens", "additional_special_tokens", "add_bos_token",
              "add_eos_token", "legacy", "auto_map")  # settings whose effect the tokenizer.json then has
BUILD_NONE = ("PreTrainedTokenizerFast", "TokenizersBackend")  # classes that run a tokenizer.json as it is


@contextlib.contextmanager
def one_line():
    """What the libraries raise is a `config.Mistake`: plain Exceptions, and panics, which are not even those."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:
        raise config.Mistake(" ".join(str(e).split())) from e


# -- a folder ----------------------------------------------------------------------------------------------------

def read_json(path):
    """The object in a JSON file, {} where there is no such file."""
    if not path.is_file():
        return {}
    with config.mistakes(ValueError, prefix=f"{path.name}: "):
        value = json.loads(path.read_bytes())
        if not isinstance(value, dict):
            raise ValueError(f"it holds a {type(value).__name__}, not an object")
    return value


def content(token):
    """The text of a token, which side files give as a string or as an object."""
    return token["content"] if isinstance(token, dict) else token


def named_tokens(settings):
    """{key: text} of the tokens that settings name: bos_token, eos_token, ..."""
    return {key: content(token) for key, token in settings.items()
            if key.endswith("_token") and isinstance(token, (str, dict))}


def read_settings(folder):
    """A folder's tokenizer_config.json, with what generation_config.json (as "stop_ids") and the files of chat
    templates add to it or put in its place. Where nothing else names stop tokens, those of config.json are taken if it
    lists some: a lone one is EOS, beside which those of the usual names may end turns."""
    settings, model = read_json(folder / "tokenizer_config.json"), read_json(folder / "config.json")
    file, stops = "generation_config.json", read_json(folder / "generation_config.json").get("eos_token_id")
    listed = (model.get("text_config") or model).get("eos_token_id")  # Llama 4's are nested
    if stops is None and isinstance(listed, list) and "stop_ids" not in settings:
        file, stops = "config.json", listed
    if stops is not None:
        settings["stop_ids"] = stops if isinstance(stops, list) else [stops]
        if not all(type(i) is int for i in settings["stop_ids"]):
            raise ValueError(f"{file}: eos_token_id {stops!r} is no id or list of ids")
    files = {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if (folder / "chat_template.jinja").is_file():
        files["default"] = folder / "chat_template.jinja"
    if files:
        settings["chat_template"] = [{"name": name, "template": path.read_text(encoding="utf-8")}
                                     for name, path in files.items()]
    return settings


def why_not_alone(folder, spec, settings):
    """Why AutoTokenizer does not take a folder's tokenizer.json as it is, or None, as for each that is saved here."""
    if settings.get("tokenizer_class") not in BUILD_NONE:
        return f"its tokenizer_class {settings.get('tokenizer_class')} does not read it"
    declared, own = settings.get("added_tokens_decoder"), {token["content"]: token for token in spec["added_tokens"]}
    if declared is None and any((folder / name).is_file() for name in SIDE_FILES[1:]):
        return "older side files add to it"
    more = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    special = [*named_tokens(settings).values(), *map(content, more)]
    wanted = [{"content": text, "special": True} for text in special] + [*(declared or {}).values()]
    lacking = [token["content"] for token in wanted if not token.items() <= own.get(token["content"], {}).items()]
    return f"{lacking[0]!r} is no special token of it" if lacking else None


def from_transformers(folder, settings):
    """(tokenizer.json, {"bos_token": text, ...}) of what AutoTokenizer makes of a folder."""
    try:
        from transformers import AutoTokenizer
    except ImportError as e:
        raise config.Mistake("transformers reads such a folder: `pip install transformers`") from e
    declared = {int(i): content(token) for i, token in settings.get("added_tokens_decoder", {}).items()}
    declared = declared or {int(i): text for text, i in read_json(folder / "added_tokens.json").items()}
    with one_line():
        theirs = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    if not getattr(theirs, "is_fast", False):
        raise ValueError(f"transformers has no fast {type(theirs).__name__}")
    if not all(theirs.special_tokens_map.values()):
        raise ValueError("a side file has a token without content")
    for i, text in declared.items():
        if (given := theirs.convert_tokens_to_ids(text)) != i:
            raise ValueError(f"it declares {text!r} as id {i}, but AutoTokenizer gives it {given}")
    return json.loads(theirs.backend_tokenizer.to_str()), theirs.special_tokens_map


# -- SentencePiece: Llama 1 and 2, TinyLlama, Mistral, or trained here -------------------------------------------

def parse_sentencepiece(data):
    """The protobuf message of a SentencePiece BPE model; a ValueError unless it keeps every character of a text."""
    from sentencepiece import sentencepiece_model_pb2
    with config.mistakes(Exception, prefix="read as a SentencePiece model: "):
        proto = sentencepiece_model_pb2.ModelProto.FromString(data)
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    if trainer.model_type != trainer.BPE or not any(p.type == UNKNOWN for p in proto.pieces):
        raise ValueError("it is not a SentencePiece BPE model")
    if (normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces or not normalizer.escape_whitespaces
            or trainer.treat_whitespace_as_suffix):
        raise ValueError("it changes texts before it encodes them, so they could not be decoded exactly")
    if len({p.piece for p in proto.pieces}) < len(proto.pieces):
        raise ValueError("two of its pieces are the same")
    return proto


def lone_sentencepiece(data):
    """(tokenizer.json, settings) of a SentencePiece model by itself: its ids are SentencePiece's.

    The vocabulary gets spaces where SentencePiece has U+2581. So a U+2581 in a text is spelled in bytes and comes back,
    which is the one departure from SentencePiece's ids: there it turns into a space.
    """
    proto = parse_sentencepiece(data)
    trainer, prefix = proto.trainer_spec, proto.normalizer_spec.add_dummy_prefix
    pieces = [p.piece.replace("▁", " ") if p.type in (NORMAL, USER_DEFINED) else p.piece for p in proto.pieces]
    special = {t: i for i, (t, p) in enumerate(zip(pieces, proto.pieces)) if p.type in (UNKNOWN, CONTROL)}
    names = {"bos_token": None, "eos_token": None} | {
        f"{end}_token": getattr(trainer, f"{end}_piece") for end in ("bos", "eos", "unk")
        if getattr(trainer, f"{end}_id") >= 0}
    if not prefix:
        names["add_prefix_space"] = False  # for llama.cpp, which adds one unless this is said
    whole = [re.escape(t) for t, p in zip(pieces, proto.pieces) if p.type == USER_DEFINED]  # never cut, never merged
    ranks = {t: (-p.score, i) for i, (t, p) in enumerate(zip(pieces, proto.pieces)) if p.type == NORMAL}
    model = bpe({t: i for i, t in enumerate(pieces)}, merges_of(ranks, lambda left, right: (left, right)),
                unk_token=trainer.unk_piece, fuse_unk=True, byte_fallback=trainer.byte_fallback,
                ignore_merges=bool(whole))
    cut = split("|".join(sorted(whole, key=len, reverse=True))) if whole else None
    decoders = [{"type": "ByteFallback"}] * trainer.byte_fallback + [{"type": "Fuse"}] + [STRIP] * prefix
    spec = make_spec(model, special, cut, {"type": "Sequence", "decoders": decoders},
                     {"type": "Prepend", "prepend": " "} if prefix else None, names["bos_token"])
    return spec, names


# -- Meta's rank files and GPT-2's two files ---------------------------------------------------------------------

LLAMA3_NAMED = """begin_of_text end_of_text reserved_special_token_0 reserved_special_token_1 finetune_right_pad_id
    step_id start_header_id end_header_id eom_id eot_id python_tag image"""
LLAMA4_NAMED = """begin_of_text end_of_text fim_prefix fim_middle fim_suffix header_start header_end eom eot step
    text_post_train:0-5 python_start python_end finetune_right_pad text_post_train:8-68 image_start image_end vision:0-1
    tile_x_separator tile_y_separator vision:2-5 image vision:6-6 patch vision:7-1047 reasoning:0-7
    reasoning_thinking_start reasoning_thinking_end"""  # vision:0-1 stands for two reserved tokens


def special_names(named, first, total):
    """So many special tokens in the order of their ids; those without a name are reserved, numbered from `first` on."""
    names = []
    for name in named.split():
        group, _, span = name.partition(":")
        low, _, high = span.partition("-")
        names += [f"{group}_reserved_special_token_{i}" for i in range(int(low), int(high) + 1)] if span else [name]
    return [f"<|{n}|>" for n in names + [f"reserved_special_token_{first + i}" for i in range(total - len(names))]]


RANK_FILES = {  # ranks: how words are cut, special tokens (meta-llama/llama-models, llama3 and llama4/tokenizer.py)
    128_000: (LLAMA3_WORDS, special_names(LLAMA3_NAMED, 2, 256)),
    200_000: (LLAMA4_WORDS, special_names(LLAMA4_NAMED, 0, 2048))}


def read_ranks(data):
    """tokenizer.json of Llama 3's or Llama 4's tokenizer.model: lines of a token in base64 and its rank."""
    ranks = {}
    for line in data.splitlines():
        token, rank = line.split()
        ranks["".join(BYTE_TO_CHAR[b] for b in base64.b64decode(token, validate=True))] = int(rank)
    if len(ranks) not in RANK_FILES:
        raise ValueError(f"it has {len(ranks)} ranks; Llama 3 has 128000, Llama 4 200000")
    if set(ranks.values()) != set(range(len(ranks))) or not ranks.keys() >= set(BYTE_TO_CHAR.values()):
        raise ValueError("ranks or bytes are missing")
    words, names = RANK_FILES[len(ranks)]
    special = {name: len(ranks) + i for i, name in enumerate(names)}
    cut = {"type": "Sequence", "pretokenizers": [split(words), byte_level(False)]}
    merges = merges_of(ranks, lambda left, right: (ranks[left], ranks[right]))
    return make_spec(bpe(ranks, merges, ignore_merges=True), special, cut, byte_level(True), bos="<|begin_of_text|>")


def read_gpt2(path):
    """tokenizer.json of GPT-2's encoder.json and vocab.bpe, elsewhere called vocab.json and merges.txt."""
    first, second = next(pair for pair in PAIRS if path.name.endswith(pair))
    start = path.name.removesuffix(first).removesuffix(second)
    vocab = json.loads(path.with_name(start + first).read_bytes())
    lines = path.with_name(start + second).read_bytes().decode().split("\n")
    merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    end = "<|endoftext|>"
    return make_spec(bpe(vocab, merges), {end: vocab.get(end, len(vocab))}, byte_level(True), byte_level(True))


# -- all of it ---------------------------------------------------------------------------------------------------

def form_of(path, data):
    """How a file holds a vocabulary: "gpt2", "ranks", "json" or "sentencepiece"."""
    if path.name.endswith(sum(PAIRS, ())):
        return "gpt2"
    if RANK_LINE.match(data):
        return "ranks"
    return "json" if data.lstrip()[:1] == b"{" or path.suffix == ".json" else "sentencepiece"


def read_file(path, data, form):
    """(tokenizer.json, settings) of a vocabulary's file by itself."""
    if form == "sentencepiece":
        return lone_sentencepiece(data)
    spec = json.loads(data) if form == "json" else read_ranks(data) if form == "ranks" else read_gpt2(path)
    spec["added_tokens"] = spec.get("added_tokens") or []
    special = {token["content"] for token in spec["added_tokens"] if token["special"]}
    return spec, {key: next(filter(special.__contains__, usual), None) for key, usual in USUAL_NAMES.items()}


def read(path, in_folder):
    """(tokenizer.json, settings) of a vocabulary's file. in_folder: with all that lies beside it."""
    data, folder = path.read_bytes(), path.parent
    form = form_of(path, data)
    spec, settings = read_file(path, data, form)
    if not in_folder:
        return spec, settings
    has_settings = any((folder / name).is_file() for name in SIDE_FILES)
    settings = read_settings(folder) if has_settings else settings | read_settings(folder)
    builds = has_settings or form == "json" and (folder / "config.json").is_file()  # whose model type implies a class
    if form == "ranks":
        settings.setdefault("tokenizer_class", BUILD_NONE[0])
    why = why_not_alone(folder, spec, settings) if builds else None
    if form == "ranks" and has_settings:
        if why:
            raise ValueError(f"Meta's rank file: {why}")
        asked = (settings.get(f"{end}_token") if settings.get(f"add_{end}_token") else None for end in ("bos", "eos"))
        spec["post_processor"] = around({token["content"]: token["id"] for token in spec["added_tokens"]}, *asked)
    elif form == "sentencepiece" or why:
        spec, named = from_transformers(folder, settings)
        settings |= named
    settings |= named_tokens(settings)
    return spec, {key: value for key, value in settings.items() if key not in BUILD_ONLY}
