"""The files that hold a tokenizer, each read as a tokenizer.json: what prepare/tokenizer.py runs.

A folder means what AutoTokenizer of transformers (5.24) makes of it, with what lies beside the vocabulary:
tokenizer_config.json, special_tokens_map.json, added_tokens.json, generation_config.json and chat templates. Where
other ids would come out, one line says why. Two departures: the rank files of Llama 3 and 4 get Meta's special tokens
and its cut of words, of which AutoTokenizer knows nothing; and a folder without any settings gets BOS and EOS by their
usual names. A lone tokenizer.model means what Meta's code makes of it: BOS begins a text, and decoding gives back every
character.

Sources: transformers, tokenization_utils_tokenizers.py, tokenization_utils_base.py, convert_slow_tokenizer.py.
"""
import base64
import json
import re

import config
from prepare.tokenizer_spec import (BYTE_TO_CHAR, LLAMA3_WORDS, LLAMA4_WORDS, STRIP, added, around, bpe, byte_level,
                                    make_spec, merges_of, replace, split)

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
SIDE_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
PAIRS = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))  # GPT-2's two files, under both names
RANK_LINE = re.compile(rb"[A-Za-z0-9+/]+=* \d+\s")  # what a rank file begins with
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = range(1, 6)  # types of pieces in sentencepiece_model.proto

USUAL_NAMES = {  # the first that exists, where no settings name one
    "bos_token": ("<|begin_of_text|>", "<s>", "<|endoftext|>"),
    "eos_token": ("<|end_of_text|>", "</s>", "<|endoftext|>")}
BUILD_ONLY = ("added_tokens_decoder", "add_bos_token", "add_eos_token", "legacy", "auto_map")  # tokenizer.json says it

CLASS_NAMES = {  # the tokenizer classes that build a tokenizer of their own, and the tokens that they name unasked
    "LlamaTokenizer": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "GPT2Tokenizer": dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")}
CLASS_FORMS = {"LlamaTokenizer": ("json", "sentencepiece"), "GPT2Tokenizer": ("json", "gpt2")}  # what they read
AS_IT_IS = (None, "PreTrainedTokenizerFast", "TokenizersBackend", "PreTrainedTokenizer")  # classes that build none
MODEL_CLASSES = {"gpt2": "GPT2Tokenizer"}  # the class that a model_type implies
RUN_AS_IT_IS = ("mistral", "mixtral", "llava", "llava_next")  # model types for which AutoTokenizer heeds no class


# -- what lies beside the vocabulary in a folder -----------------------------------------------------------------

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


def read_settings(folder):
    """A folder's tokenizer_config.json, with what special_tokens_map.json, generation_config.json (as "stop_ids") and
    the files of chat templates add to it or put in its place."""
    settings = read_json(folder / "tokenizer_config.json")
    if "additional_special_tokens" in settings and not settings.get("extra_special_tokens"):
        settings["extra_special_tokens"] = settings.pop("additional_special_tokens")
    if "added_tokens_decoder" not in settings:  # the older way
        older, extra = read_json(folder / "special_tokens_map.json"), settings.get("extra_special_tokens")
        settings |= older
        if isinstance(extra, list) and "extra_special_tokens" in older:
            settings["extra_special_tokens"] = extra + [t for t in older["extra_special_tokens"] if t not in extra]
    stops = read_json(folder / "generation_config.json").get("eos_token_id")
    if stops is not None:
        settings["stop_ids"] = stops if isinstance(stops, list) else [stops]
        if not all(type(i) is int for i in settings["stop_ids"]):
            raise ValueError(f"generation_config.json: eos_token_id {stops!r} is no id or list of ids")
    files = {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if (folder / "chat_template.jinja").is_file():
        files["default"] = folder / "chat_template.jinja"
    if files:
        settings["chat_template"] = [{"name": name, "template": path.read_text(encoding="utf-8")}
                                     for name, path in files.items()]
    return settings


def declared_tokens(folder, settings, own):
    """{id: token} that a folder declares. own: the added_tokens of its tokenizer.json."""
    if "added_tokens_decoder" in settings:
        return {int(i): token for i, token in settings["added_tokens_decoder"].items()}
    special = {content(settings[key]) for key in NAMED if settings.get(key)}
    special |= {content(token) for token in settings.get("extra_special_tokens") or []}
    older = read_json(folder / "added_tokens.json").items()
    return {int(i): added(text, int(i), text in special) for text, i in older} | {token["id"]: token for token in own}


def named_tokens(settings):
    """{key: token} of the tokens that settings name: bos_token, ..., then those that only this model has."""
    keys = [*NAMED, *(key for key in settings if key.endswith("_token") and key not in NAMED)]
    return {key: settings[key] for key in keys if isinstance(settings.get(key), (str, dict))}


def add_tokens(spec, settings, declared, extra):
    """spec with the tokens that it lacks, added in AutoTokenizer's order: declared, named, extra. The `tokenizers`
    library gives each the next free id, or that of a piece of the same text."""
    named = list(named_tokens(settings).values())
    names = {content(token) for token in named}
    wanted = {t["content"]: t | {"special": t.get("special", False) or t["content"] in names}
              for _, t in sorted(declared.items())}
    there = {t["content"]: t for t in spec["added_tokens"]}
    known = there.keys() | wanted.keys()
    for token in named + extra:
        if (text := content(token)) not in known:
            token = token if isinstance(token, dict) else {"content": text}
            wanted[text] = token | {"special": token.get("special", True) or text in names}
    if all(there.get(text) == there.get(text, {}) | token for text, token in wanted.items()):
        return spec
    import tokenizers
    flags = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    with config.mistakes(Exception):  # the library raises nothing more exact
        library = tokenizers.Tokenizer.from_str(json.dumps(spec))
        library.add_tokens([tokenizers.AddedToken(**{k: t[k] for k in flags if k in t}) for t in wanted.values()])
    for i, token in declared.items():
        if (given := library.token_to_id(token["content"])) != i:
            raise ValueError(f"it declares {token['content']!r} as id {i}, but AutoTokenizer gives it {given}")
    return json.loads(library.to_str())


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


def sentencepiece_names(proto):
    """{"bos_token": text, ...} of the tokens that a SentencePiece model names."""
    trainer = proto.trainer_spec
    return {f"{end}_token": getattr(trainer, f"{end}_piece") for end in ("bos", "eos", "unk")
            if getattr(trainer, f"{end}_id") >= 0}


def sentencepiece_spec(proto, pieces, legacy, space):
    """What AutoTokenizer makes of a SentencePiece model where no class is named: its ids are SentencePiece's.

    pieces: the text of each id. legacy: every part of a text between special tokens, not the first alone, gets a space
    in front. space: what stands for a space in pieces.
    """
    prefix, fallback = proto.normalizer_spec.add_dummy_prefix, proto.trainer_spec.byte_fallback
    whole = [re.escape(piece) for piece, p in zip(pieces, proto.pieces) if p.type == USER_DEFINED]
    ranks = {piece: (-p.score, i) for i, (piece, p) in enumerate(zip(pieces, proto.pieces)) if p.type == NORMAL}
    model = bpe({piece: i for i, piece in enumerate(pieces)}, merges_of(ranks, lambda left, right: (left, right)),
                unk_token=proto.trainer_spec.unk_piece, fuse_unk=True, byte_fallback=fallback,
                ignore_merges=bool(whole))
    normalizers, cuts, decoders = [], [], []
    if space != " ":
        normalizers.append(replace({"String": " "}, space))
        decoders.append(replace({"String": space}, " "))
    if prefix and legacy:
        normalizers.append({"type": "Prepend", "prepend": space})
    elif prefix:
        cuts.append({"type": "Metaspace", "replacement": space, "prepend_scheme": "first", "split": False})
    if whole:
        cuts.append(split("|".join(sorted(whole, key=len, reverse=True))))
    decoders += [{"type": "ByteFallback"}] * fallback + [{"type": "Fuse"}] + [STRIP] * prefix
    return make_spec(model, {}, {"type": "Sequence", "pretokenizers": cuts} if cuts else None,
                     {"type": "Sequence", "decoders": decoders},
                     {"type": "Sequence", "normalizers": normalizers} if normalizers else None)


def lone_sentencepiece(data):
    """(tokenizer.json, settings) of a SentencePiece model by itself.

    The vocabulary gets spaces where SentencePiece has U+2581. So a U+2581 in a text is spelled in bytes and comes back,
    which is the one departure from SentencePiece's ids: there it turns into a space.
    """
    proto = parse_sentencepiece(data)
    pieces = [p.piece.replace("▁", " ") if p.type in (NORMAL, USER_DEFINED) else p.piece for p in proto.pieces]
    names = {"bos_token": None, "eos_token": None} | sentencepiece_names(proto)
    special = {t: i for i, (t, p) in enumerate(zip(pieces, proto.pieces)) if p.type in (UNKNOWN, CONTROL)}
    spec = sentencepiece_spec(proto, pieces, True, " ")
    return spec | {"added_tokens": [added(t, i) for t, i in special.items()],
                   "post_processor": around(special, names["bos_token"])}, names


def folder_sentencepiece(proto, settings, declared):
    """tokenizer.json of a SentencePiece model in a folder that names no class which would build its own."""
    kept = {p.piece for i, p in enumerate(proto.pieces) if i not in declared}
    pieces = [declared[i]["content"] if i in declared and declared[i]["content"] not in kept else p.piece
              for i, p in enumerate(proto.pieces)]
    if proto.normalizer_spec.add_dummy_prefix:
        for token in declared.values():
            token["normalized"] = False
    return sentencepiece_spec(proto, pieces, settings.get("legacy", True), "▁")


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
    """The vocabulary and merges of GPT-2's encoder.json and vocab.bpe, elsewhere called vocab.json and merges.txt."""
    first, second = next(pair for pair in PAIRS if path.name.endswith(pair))
    start = path.name.removesuffix(first).removesuffix(second)
    vocab = json.loads(path.with_name(start + first).read_bytes())
    lines = path.with_name(start + second).read_bytes().decode().split("\n")
    return vocab, [line.split(" ") for line in lines if line and not line.startswith("#version")]


# -- all of it ---------------------------------------------------------------------------------------------------

def form_of(path, data):
    """How a file holds a vocabulary: "gpt2", "ranks", "json" or "sentencepiece"."""
    if path.name.endswith(sum(PAIRS, ())):
        return "gpt2"
    if RANK_LINE.match(data):
        return "ranks"
    return "json" if data.lstrip()[:1] == b"{" or path.suffix == ".json" else "sentencepiece"


def class_of(path, form, data, settings):
    """The tokenizer class that builds a tokenizer of its own from this vocabulary, or None: it is run as it is."""
    model = read_json(path.parent / "config.json")
    name = settings.get("tokenizer_class") or model.get("tokenizer_class") or MODEL_CLASSES.get(model.get("model_type"))
    if name in AS_IT_IS or model.get("model_type") in RUN_AS_IT_IS:
        return None
    name = name.removesuffix("Fast")
    if name == "LlamaTokenizer" and form == "json" and b'"ByteLevel"' in data:
        return None  # Llama 3's, under the name of Llama 2's
    if form not in CLASS_FORMS.get(name, ()):
        raise ValueError(f"its tokenizer_class {name} does not read {path.name}, or is no Llama's")
    return name


def built_spec(family, form, source, settings):
    """What the class `family` builds of a vocabulary, whatever else its tokenizer.json says. source: (vocab, merges) of
    GPT-2's files, a SentencePiece message, or a tokenizer.json."""
    if form == "gpt2":
        vocab, merges = source
    elif form == "sentencepiece":
        vocab = {p.piece: i for i, p in enumerate(source.pieces)}
        ranks = {p.piece: i for i, p in enumerate(source.pieces) if p.type not in (UNKNOWN, CONTROL)}
        merges = merges_of(ranks, lambda left, right: len(left))
    else:
        vocab, merges = source["model"]["vocab"], source["model"].get("merges")
        if not isinstance(vocab, dict) or merges is None:
            raise ValueError(f"it is no BPE, as its tokenizer_class {family} wants")
    prefix = settings.get("add_prefix_space")
    if family == "GPT2Tokenizer":
        spec = make_spec(bpe(vocab, merges), {}, byte_level(True, bool(prefix)), byte_level(True))
    else:
        prefix = prefix is not False
        scheme = "never" if not prefix else "always" if settings.get("legacy") else "first"
        decoders = [replace({"String": "▁"}, " "), {"type": "ByteFallback"}, {"type": "Fuse"}] + [STRIP] * prefix
        spec = make_spec(bpe(vocab, merges, fuse_unk=True, byte_fallback=True), {},
                         {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False},
                         {"type": "Sequence", "decoders": decoders})
    return spec | {"post_processor": source.get("post_processor") if form == "json" else None}


def read(path, in_folder):
    """(tokenizer.json, settings) of a vocabulary's file. in_folder: with all that lies beside it."""
    data = path.read_bytes()
    form, settings, declared, family, unasked = form_of(path, data), {}, {}, None, None
    if form == "sentencepiece" and not in_folder:
        return lone_sentencepiece(data)
    if in_folder:
        settings = read_settings(path.parent)
        family = class_of(path, form, data, settings)
    if form == "sentencepiece":
        source, own = parse_sentencepiece(data), []
        unasked = [added(p.piece, i, p.type == CONTROL, normalized=False) for i, p in enumerate(source.pieces)
                   if p.type == CONTROL or p.type == USER_DEFINED and family]
    elif form == "gpt2":
        source, family, own = read_gpt2(path), "GPT2Tokenizer", []
    else:
        source = read_ranks(data) if form == "ranks" else json.loads(data)
        source["added_tokens"] = source.get("added_tokens") or []
        own = source["added_tokens"] if form == "json" else []
    if in_folder:
        declared = declared_tokens(path.parent, settings, own)
    if family:
        spec, names = built_spec(family, form, source, settings), CLASS_NAMES[family]
    elif form == "sentencepiece":
        spec, names = folder_sentencepiece(source, settings, declared), sentencepiece_names(source)
    else:
        spec, names = source, {}
    has_settings = in_folder and any(path.with_name(name).is_file() for name in SIDE_FILES)
    if not has_settings:
        special = {t["content"] for t in spec["added_tokens"] if t["special"]}
        names = {key: next(filter(special.__contains__, usual), None) for key, usual in USUAL_NAMES.items()} | names
    settings = names | settings
    if isinstance(settings.get("extra_special_tokens"), dict):
        settings |= settings.pop("extra_special_tokens")
    older = settings.pop("additional_special_tokens", None)
    extra = settings.pop("extra_special_tokens", older if unasked is None else unasked) or []
    known = {t["content"] for t in [*spec["added_tokens"], *declared.values()]}
    spec = add_tokens(spec, settings, declared, extra)
    settings |= {key: content(token) for key, token in named_tokens(settings).items()}
    ids = {t["content"]: t["id"] for t in spec["added_tokens"]}
    if form == "ranks" and ids.keys() - known:
        raise ValueError(f"{min(ids.keys() - known)!r} is no special token of Meta's rank file, and nothing declares "
                         "its id")
    if form != "json" and (form != "ranks" or has_settings):  # a tokenizer.json does not heed these settings
        asked = (settings.get(f"{end}_token") if settings.get(f"add_{end}_token") else None for end in ("bos", "eos"))
        spec["post_processor"] = around(ids, *asked)
    return spec, {key: value for key, value in settings.items() if key not in BUILD_ONLY}
