"""The files that hold a tokenizer, each read as a tokenizer.json: what prepare/tokenizer.py runs.

A folder means what AutoTokenizer of transformers (5.24) makes of it, side files included: special_tokens_map.json,
added_tokens.json, tokenizer_config.json, generation_config.json and chat templates. Two departures: the rank files
of Llama 3 and 4 get Meta's special tokens, and its cut of words, of which AutoTokenizer knows nothing; and a folder
without any settings gets BOS and EOS by their usual names. A lone tokenizer.model means what Meta's code makes of it:
BOS begins a text, and decoding gives back every character.
"""
import base64
import json
import re
from pathlib import Path

import config

# Byte-level vocabularies are written with one printable character for each byte (GPT-2's table).
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTE_TO_CHAR = {b: chr(b) for b in PRINTABLE} | {
    b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in PRINTABLE)}

# How a text is cut into words before merging, as published with Llama 3 and Llama 4.
LLAMA3_WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                r"|\s*[\r\n]+|\s+(?!\S)|\s+")
LLAMA4_WORDS = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
                r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
                r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")

BOS_NAMES = ("<|begin_of_text|>", "<s>", "<|endoftext|>")  # the first that exists, where no settings name one
EOS_NAMES = ("<|end_of_text|>", "</s>", "<|endoftext|>")
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = range(1, 6)  # types of pieces in sentencepiece_model.proto
PAIRS = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))  # GPT-2's two files, under both names
AS_IT_IS = (None, "PreTrainedTokenizerFast", "TokenizersBackend", "PreTrainedTokenizer")
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}  # drops the space that encoding puts in front
RANK_LINE = re.compile(rb"[A-Za-z0-9+/]+=* \d+\s")  # what a rank file begins with
CLASS_NAMES = {  # the tokenizer classes that build a tokenizer of their own, and the tokens that they name unasked
    "LlamaTokenizer": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "GPT2Tokenizer": dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")}


# -- the parts of a tokenizer.json -------------------------------------------------------------------------------

def make_spec(model, special, cut, undo, normalizer=None, bos=None):
    """A tokenizer.json. special: {text: id}; bos: the special token that AutoTokenizer puts in front of a text."""
    return {"version": "1.0", "added_tokens": [added(text, id) for text, id in special.items()],
            "normalizer": normalizer, "pre_tokenizer": cut, "post_processor": around(special, bos), "decoder": undo,
            "model": model}


def added(content, id, special=True, **flags):
    """One of the tokens that are found in a text before it is cut and merged."""
    return {"id": id, "content": content, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": not special, "special": special} | flags


def around(ids, before=None, after=None):
    """The post-processor that puts the tokens `before` and `after` around a text; ids: {text: id}."""
    def one(name, number):
        tokens = ({"SpecialToken": {"id": t, "type_id": number}} if t else None for t in (before, after))
        first, last = tokens
        return [part for part in (first, {"Sequence": {"id": name, "type_id": number}}, last) if part]
    used = {t: {"id": t, "ids": [ids[t]], "tokens": [t]} for t in (before, after) if t}
    return {"type": "TemplateProcessing", "single": one("A", 0), "pair": one("A", 0) + one("B", 1),
            "special_tokens": used} if used else None


def bpe(vocab, merges, **more):
    """The model of a tokenizer.json. vocab: {piece: id}; merges: [left, right] each, the first the most urgent."""
    return {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            "vocab": vocab, "merges": merges, **more}


def split(pattern):
    """The step of cutting that isolates what a regular expression matches."""
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def byte_level(use_regex, add_prefix_space=False):
    """The step, of cutting and of decoding, that writes bytes as characters; use_regex: it cuts words as GPT-2 does."""
    return {"type": "ByteLevel", "add_prefix_space": add_prefix_space, "trim_offsets": True, "use_regex": use_regex}


def replace(old, new):
    return {"type": "Replace", "pattern": old, "content": new}


def merges_of(ranks, urgency):
    """Every way to make a piece of two others, the lowest rank first. ranks: {piece: rank}; urgency(left, right): which
    of the ways to make the same piece comes first."""
    merges = []
    for piece in sorted(ranks, key=ranks.get):
        if len(piece) > 1000:
            raise ValueError(f"it has a piece of {len(piece)} characters")
        pairs = [[piece[:i], piece[i:]] for i in range(1, len(piece)) if piece[:i] in ranks and piece[i:] in ranks]
        merges += sorted(pairs, key=lambda pair: urgency(*pair))
    return merges


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


def scores_of(proto, pieces, types):
    """{piece: its rank in merging} of the pieces of these types: the higher the score, the lower the rank."""
    return {piece: (-p.score, i) for i, (piece, p) in enumerate(zip(pieces, proto.pieces)) if p.type in types}


def read_sentencepiece(data):
    """(tokenizer.json, settings) of a lone SentencePiece model.

    The vocabulary gets spaces where SentencePiece has U+2581. So a U+2581 in a text is spelled in bytes and comes back,
    which is the one departure from SentencePiece's ids: there it turns into a space.
    """
    proto = parse_sentencepiece(data)
    pieces = [p.piece.replace("▁", " ") if p.type in (NORMAL, USER_DEFINED) else p.piece for p in proto.pieces]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    if len(vocab) < len(pieces):
        raise ValueError("two of its pieces are the same")
    special = {t: i for i, (t, p) in enumerate(zip(pieces, proto.pieces)) if p.type in (UNKNOWN, CONTROL)}
    bos, eos = (pieces[i] if 0 <= i < len(pieces) and proto.pieces[i].type == CONTROL else None
                for i in (proto.trainer_spec.bos_id, proto.trainer_spec.eos_id))
    unk, prefix = next(t for t in special if proto.pieces[vocab[t]].type == UNKNOWN), proto.normalizer_spec.add_dummy_prefix
    ranks = scores_of(proto, pieces, (NORMAL, USER_DEFINED))
    merges = merges_of(ranks, lambda left, right: (ranks[left], ranks[right]))
    undo = [{"type": "ByteFallback"}, {"type": "Fuse"}, STRIP][:2 + prefix]
    spec = make_spec(bpe(vocab, merges, unk_token=unk, fuse_unk=True, byte_fallback=True), special, None,
                     {"type": "Sequence", "decoders": undo},
                     {"type": "Prepend", "prepend": " "} if prefix else None, bos)
    spec["added_tokens"] += [added(t, i, False, normalized=False)
                             for i, (t, p) in enumerate(zip(pieces, proto.pieces)) if p.type == USER_DEFINED]
    return spec, {"bos_token": bos, "eos_token": eos, "unk_token": unk, "add_prefix_space": prefix}


# -- Meta's rank files and GPT-2's two files ---------------------------------------------------------------------

def llama3_special():
    """Llama 3's 256 special tokens in the order of their ids (meta-llama/llama-models, models/llama3/tokenizer.py)."""
    named = ["begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1",
             "finetune_right_pad_id", "step_id", "start_header_id", "end_header_id", "eom_id", "eot_id",
             "python_tag", "image"]
    return [f"<|{n}|>" for n in named + [f"reserved_special_token_{i}" for i in range(2, 246)]]


def llama4_special():
    """Llama 4's 2,048 special tokens in the order of their ids (llama-models, models/llama4/tokenizer.py)."""
    def reserved(group, *span):
        return [f"{group}_reserved_special_token_{i}" for i in range(*span)]
    named = ["begin_of_text", "end_of_text", "fim_prefix", "fim_middle", "fim_suffix",
             "header_start", "header_end", "eom", "eot", "step", *reserved("text_post_train", 6),
             "python_start", "python_end", "finetune_right_pad", *reserved("text_post_train", 8, 69),
             "image_start", "image_end", *reserved("vision", 2), "tile_x_separator", "tile_y_separator",
             *reserved("vision", 2, 6), "image", *reserved("vision", 6, 7), "patch", *reserved("vision", 7, 1048),
             *reserved("reasoning", 8), "reasoning_thinking_start", "reasoning_thinking_end"]
    return [f"<|{n}|>" for n in named + [f"reserved_special_token_{i}" for i in range(2048 - len(named))]]


RANK_FILES = {128_000: (LLAMA3_WORDS, llama3_special), 200_000: (LLAMA4_WORDS, llama4_special)}


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
    special = {name: len(ranks) + i for i, name in enumerate(names())}
    cut = {"type": "Sequence", "pretokenizers": [split(words), byte_level(False)]}
    merges = merges_of(ranks, lambda left, right: (ranks[left], ranks[right]))
    return make_spec(bpe(ranks, merges, ignore_merges=True), special, cut, byte_level(True), bos=BOS_NAMES[0])


def read_gpt2(vocab, merges):
    """tokenizer.json of GPT-2's encoder.json and vocab.bpe, elsewhere called vocab.json and merges.txt."""
    vocab = json.loads(vocab)
    merges = [line.split(" ") for line in merges.decode().split("\n") if line and not line.startswith("#version")]
    made = {left + right for left, right in merges} | set(BYTE_TO_CHAR.values())
    special = {text: i for text, i in vocab.items() if text not in made}
    return make_spec(bpe(vocab, merges), special, byte_level(True), byte_level(True))


# -- a folder, as AutoTokenizer reads it -------------------------------------------------------------------------

SIDE_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
BUILD_ONLY = ("added_tokens_decoder", "add_bos_token", "add_eos_token", "legacy", "auto_map")  # tokenizer.json says it


def read_json(path):
    return json.loads(path.read_bytes()) if path.is_file() else {}


def content(token):
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
        settings["stop_ids"] = sorted(stops) if isinstance(stops, list) else [stops]
    templates = {path.stem: path.read_text(encoding="utf-8")
                 for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if (folder / "chat_template.jinja").is_file():
        templates["default"] = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if templates.keys() == {"default"}:
        settings["chat_template"] = templates["default"]
    elif templates:
        settings["chat_template"] = [{"name": name, "template": text} for name, text in templates.items()]
    return settings


def declared_tokens(folder, settings, own):
    """{id: token} that a folder declares. own: the added_tokens of its tokenizer.json."""
    if "added_tokens_decoder" in settings:
        return {int(i): token for i, token in settings["added_tokens_decoder"].items()}
    special = {content(settings[key]) for key in NAMED if settings.get(key)}
    special |= {content(token) for token in settings.get("extra_special_tokens") or []}
    older = {i: added(text, i, text in special) for text, i in read_json(folder / "added_tokens.json").items()}
    return older | {token["id"]: token for token in own}


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
    library = tokenizers.Tokenizer.from_str(json.dumps(spec))
    library.add_tokens([tokenizers.AddedToken(**{k: t[k] for k in flags if k in t}) for t in wanted.values()])
    for i, token in declared.items():
        if (free := library.token_to_id(token["content"])) != i:
            raise ValueError(f"it declares {token['content']!r} as id {i}, where the next free id is {free}")
    return json.loads(library.to_str())


def llama_spec(vocab, merges, settings):
    """What the class LlamaTokenizer makes of a vocabulary, whatever else its tokenizer.json says."""
    prefix = settings.get("add_prefix_space") is not False
    scheme = "never" if not prefix else "always" if settings.get("legacy") else "first"
    cut = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
    undo = [replace({"String": "▁"}, " "), {"type": "ByteFallback"}, {"type": "Fuse"}, STRIP][:3 + prefix]
    return make_spec(bpe(vocab, merges, fuse_unk=True, byte_fallback=True), {}, cut, {"type": "Sequence", "decoders": undo})


def gpt2_spec(vocab, merges, settings):
    """What the class GPT2Tokenizer makes of a vocabulary, whatever else its tokenizer.json says."""
    return make_spec(bpe(vocab, merges), {}, byte_level(True, bool(settings.get("add_prefix_space"))), byte_level(True))


def sentencepiece_spec(proto, legacy, declared):
    """What AutoTokenizer makes of a SentencePiece model where no class is named. declared: names for its pieces."""
    kept = {p.piece for i, p in enumerate(proto.pieces) if i not in declared}
    pieces = [declared[i]["content"] if i in declared and declared[i]["content"] not in kept else p.piece
              for i, p in enumerate(proto.pieces)]
    prefix, fallback = proto.normalizer_spec.add_dummy_prefix, proto.trainer_spec.byte_fallback
    whole = [re.escape(piece) for piece, p in zip(pieces, proto.pieces) if p.type == USER_DEFINED]
    model = bpe({piece: i for i, piece in enumerate(pieces)},
                merges_of(scores_of(proto, pieces, (NORMAL,)), lambda left, right: (left, right)),
                unk_token=proto.trainer_spec.unk_piece, fuse_unk=True, byte_fallback=fallback, ignore_merges=bool(whole))
    normal, cut, undo = [replace({"String": " "}, "▁")], [], [replace({"String": "▁"}, " ")]
    if prefix:
        cut.append({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always" if legacy else "first",
                    "split": False})
    if prefix and legacy:
        normal.append(replace({"Regex": r"\A▁"}, "▁▁"))  # Metaspace would add nothing there
    if whole:
        cut.append(split("|".join(sorted(whole, key=len, reverse=True))))
    undo += [{"type": "ByteFallback"}] * fallback + [{"type": "Fuse"}] * (fallback or prefix) + [STRIP] * prefix
    return make_spec(model, {}, {"type": "Sequence", "pretokenizers": cut}, {"type": "Sequence", "decoders": undo},
                     {"type": "Sequence", "normalizers": normal})


def read_vocabulary(path, data, family, settings, declared):
    """(tokenizer.json, names of tokens that go without saying, tokens that it adds unasked) of a folder's vocabulary."""
    if path.name == "tokenizer.json":
        spec = json.loads(data)
        spec["added_tokens"] = spec.get("added_tokens") or []
        if family:
            build, model = {"LlamaTokenizer": llama_spec, "GPT2Tokenizer": gpt2_spec}[family], spec["model"]
            if not isinstance(model["vocab"], dict):
                raise ValueError(f"it is no BPE, as its tokenizer_class {family} wants")
            spec = build(model["vocab"], model["merges"], settings) | {"post_processor": spec.get("post_processor")}
        return spec, CLASS_NAMES.get(family, {}), None
    if path.name != "tokenizer.model":
        pair = next(pair for pair in PAIRS if path.name in pair)
        model = read_gpt2(*(path.with_name(name).read_bytes() for name in pair))["model"]
        return gpt2_spec(model["vocab"], model["merges"], settings), CLASS_NAMES["GPT2Tokenizer"], None
    if RANK_LINE.match(data):
        return read_ranks(data) | {"post_processor": None}, {}, None
    proto = parse_sentencepiece(data)
    added_types = (CONTROL, USER_DEFINED) if family else (CONTROL,)
    unasked = [added(p.piece, i, p.type == CONTROL, normalized=False)
               for i, p in enumerate(proto.pieces) if p.type in added_types]
    if family:
        vocab = {p.piece: i for i, p in enumerate(proto.pieces)}
        ranks = {p.piece: i for i, p in enumerate(proto.pieces) if p.type not in (UNKNOWN, CONTROL)}
        return llama_spec(vocab, merges_of(ranks, lambda left, right: len(left)), settings), CLASS_NAMES[family], unasked
    if proto.normalizer_spec.add_dummy_prefix:
        for token in declared.values():
            token["normalized"] = False
    trainer = proto.trainer_spec
    names = {f"{name}_token": getattr(trainer, f"{name}_piece") for name in ("bos", "eos", "unk")
             if getattr(trainer, f"{name}_id") >= 0}
    return sentencepiece_spec(proto, settings.get("legacy", True), declared), names, unasked


def read_folder(path, data):
    """(tokenizer.json, settings) of what AutoTokenizer makes of the folder in which the file `path` is the vocabulary."""
    folder, settings = path.parent, read_settings(path.parent)
    family = settings.get("tokenizer_class") or read_json(folder / "config.json").get("tokenizer_class")
    family = None if family in AS_IT_IS or b'"ByteLevel"' in data and "Llama" in family else family.removesuffix("Fast")
    ranks = RANK_LINE.match(data)
    if family and (family not in CLASS_NAMES or ranks or path.name == "tokenizer.model" and family == "GPT2Tokenizer"):
        raise ValueError(f"its tokenizer_class is {family}, which is not read here: what goes with {path.name} is "
                         f"{'' if ranks else 'LlamaTokenizer or '}PreTrainedTokenizerFast")
    own = json.loads(data).get("added_tokens") or [] if path.name == "tokenizer.json" else []
    declared = declared_tokens(folder, settings, own)
    spec, names, unasked = read_vocabulary(path, data, family, settings, declared)
    if isinstance(settings.get("extra_special_tokens"), dict):
        settings |= settings.pop("extra_special_tokens")
    older = settings.pop("additional_special_tokens", None) if unasked is None else unasked
    extra = settings.pop("extra_special_tokens", older) or []
    settings = names | settings
    spec = add_tokens(spec, settings, declared, extra)
    ids = {t["content"]: t["id"] for t in spec["added_tokens"]}
    settings |= {key: content(token) for key, token in named_tokens(settings).items()}
    if path.name != "tokenizer.json":
        bos, eos = (settings.get(f"{end}_token") if settings.get(f"add_{end}_token") else None for end in ("bos", "eos"))
        spec["post_processor"] = around(ids, bos, eos)
    return spec, {key: value for key, value in settings.items() if key not in BUILD_ONLY}


def usual_names(spec):
    """BOS and EOS of a vocabulary whose settings name none, by the texts that are usual."""
    texts = {piece if isinstance(piece, str) else piece[0] for piece in spec["model"]["vocab"]}
    texts |= {t["content"] for t in spec.get("added_tokens") or []}
    return {key: next((name for name in names if name in texts), None)
            for key, names in (("bos_token", BOS_NAMES), ("eos_token", EOS_NAMES))}


def read(path, is_folder):
    """(tokenizer.json, settings, SentencePiece model or None) of a vocabulary's file, with its folder or alone."""
    data, model = path.read_bytes(), None
    pair = next((pair for pair in PAIRS if path.name.endswith(pair)), None)
    has_settings = any((path.parent / name).is_file() for name in SIDE_FILES)
    if path.name == "tokenizer.json" or has_settings and path.name in ("tokenizer.model", *sum(PAIRS, ())):
        spec, settings = read_folder(path, data)
    elif pair:
        start = path.name.removesuffix(pair[0]).removesuffix(pair[1])
        spec, settings = read_gpt2(*(path.with_name(start + name).read_bytes() for name in pair)), {}
    elif data.lstrip()[:1] == b"{":
        spec, settings = json.loads(data), {}
    elif RANK_LINE.match(data):
        spec, settings = read_ranks(data), {}
    else:
        spec, settings = read_folder(path, data) if is_folder else read_sentencepiece(data)
    if not has_settings:
        settings = usual_names(spec) | settings
    if spec["model"].get("byte_fallback") and (path.parent / "tokenizer.model").is_file():
        path = path.parent / "tokenizer.model"
    if path.suffix != ".json" and not RANK_LINE.match(data) and not pair:
        model = path.read_bytes()
    return spec, settings, model
