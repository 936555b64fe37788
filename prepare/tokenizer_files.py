"""The files that hold a tokenizer, each read as a tokenizer.json: what prepare/tokenizer.py runs.

A folder means what AutoTokenizer of transformers (5.24) makes of it, with what lies beside the vocabulary:
tokenizer_config.json, special_tokens_map.json, added_tokens.json, generation_config.json and chat templates. Where
other ids would come out, one line says why. Two departures: the rank files of Llama 3 and 4 get Meta's special tokens
and its cut of words, of which AutoTokenizer knows nothing; and a folder without any settings gets BOS and EOS by their
usual names. A lone tokenizer.model means what Meta's code makes of it: BOS begins a text, and decoding gives back every
character.

Sources: transformers, tokenization_utils_tokenizers.py, convert_slow_tokenizer.py.
"""
import base64
import json
import re

import config
from prepare.tokenizer_settings import (SIDE_FILES, add_tokens, content, declared_tokens, named_tokens, read_json,
                                        read_settings)
from prepare.tokenizer_spec import (BYTE_TO_CHAR, LLAMA3_WORDS, LLAMA4_WORDS, STRIP, added, around, bpe, byte_level,
                                    make_spec, merges_of, metaspace, replace, split)

PAIRS = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))  # GPT-2's two files, under both names
RANK_LINE = re.compile(rb"[A-Za-z0-9+/]+=* \d+\s")  # what a rank file begins with
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = range(1, 6)  # types of pieces in sentencepiece_model.proto

BOS_NAMES = ("<|begin_of_text|>", "<s>", "<|endoftext|>")  # the first that exists, where no settings name one
EOS_NAMES = ("<|end_of_text|>", "</s>", "<|endoftext|>")
BUILD_ONLY = ("added_tokens_decoder", "add_bos_token", "add_eos_token", "legacy", "auto_map")  # tokenizer.json says it

CLASS_NAMES = {  # the tokenizer classes that build a tokenizer of their own, and the tokens that they name unasked
    "LlamaTokenizer": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "GPT2Tokenizer": dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")}
AS_IT_IS = (None, "PreTrainedTokenizerFast", "TokenizersBackend", "PreTrainedTokenizer")  # those that build none
MODEL_CLASSES = {"gpt2": "GPT2Tokenizer"}  # the class that a model_type implies
RUN_AS_IT_IS = ("mistral", "mixtral", "llava", "llava_next")  # model types for which AutoTokenizer heeds no class


# -- the tokenizers that AutoTokenizer builds of a vocabulary ----------------------------------------------------

def llama_spec(vocab, merges, settings):
    """What the class LlamaTokenizer makes of a vocabulary, whatever else its tokenizer.json says."""
    prefix = settings.get("add_prefix_space") is not False
    scheme = "never" if not prefix else "always" if settings.get("legacy") else "first"
    decoders = [replace({"String": "▁"}, " "), {"type": "ByteFallback"}, {"type": "Fuse"}] + [STRIP] * prefix
    return make_spec(bpe(vocab, merges, fuse_unk=True, byte_fallback=True), {}, metaspace("▁", scheme),
                     {"type": "Sequence", "decoders": decoders})


def gpt2_spec(vocab, merges, settings):
    """What the class GPT2Tokenizer makes of a vocabulary, whatever else its tokenizer.json says."""
    return make_spec(bpe(vocab, merges), {}, byte_level(True, bool(settings.get("add_prefix_space"))), byte_level(True))


def sentencepiece_spec(proto, pieces, legacy, space):
    """What AutoTokenizer makes of a SentencePiece model where no class is named: its ids are SentencePiece's.

    pieces: the text of each id. legacy: every part of a text between special tokens, not the first alone, gets a space
    in front. space: what stands for a space in pieces.
    """
    prefix, fallback = proto.normalizer_spec.add_dummy_prefix, proto.trainer_spec.byte_fallback
    whole = [re.escape(piece) for piece, p in zip(pieces, proto.pieces) if p.type == USER_DEFINED]
    ranks = {piece: (-p.score, i) for i, (piece, p) in enumerate(zip(pieces, proto.pieces)) if p.type == NORMAL}
    merges = merges_of(ranks, lambda left, right: (left, right))
    model = bpe({piece: i for i, piece in enumerate(pieces)}, merges, unk_token=proto.trainer_spec.unk_piece,
                fuse_unk=True, byte_fallback=fallback, ignore_merges=bool(whole))
    normalizers, cuts, decoders = [], [], []
    if space != " ":
        normalizers.append(replace({"String": " "}, space))
        decoders.append(replace({"String": space}, " "))
    if prefix and legacy:
        normalizers.append({"type": "Prepend", "prepend": space})
    elif prefix:
        cuts.append(metaspace(space, "first"))
    if whole:
        cuts.append(split("|".join(sorted(whole, key=len, reverse=True))))
    decoders += [{"type": "ByteFallback"}] * fallback + [{"type": "Fuse"}] + [STRIP] * prefix
    return make_spec(model, {}, {"type": "Sequence", "pretokenizers": cuts} if cuts else None,
                     {"type": "Sequence", "decoders": decoders},
                     {"type": "Sequence", "normalizers": normalizers} if normalizers else None)


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


def read_gpt2(path):
    """(vocabulary, merges) of GPT-2's encoder.json and vocab.bpe, elsewhere called vocab.json and merges.txt."""
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
    if form not in {"LlamaTokenizer": ("json", "sentencepiece"), "GPT2Tokenizer": ("json", "gpt2")}.get(name, ()):
        raise ValueError(f"its tokenizer_class {name} does not read {path.name}, or is no Llama's")
    return name


def built_spec(family, form, source, settings):
    """What the class `family` builds of a vocabulary. source: what `parse` gives."""
    post_processor = None
    if form == "gpt2":
        vocab, merges = source
    elif form == "sentencepiece":
        vocab = {p.piece: i for i, p in enumerate(source.pieces)}
        ranks = {p.piece: i for i, p in enumerate(source.pieces) if p.type not in (UNKNOWN, CONTROL)}
        merges = merges_of(ranks, lambda left, right: len(left))
    else:
        model, post_processor = source["model"], source["post_processor"]
        vocab, merges = model["vocab"], model.get("merges")
        if not isinstance(vocab, dict) or merges is None:
            raise ValueError(f"it is no BPE, as its tokenizer_class {family} wants")
    build = {"LlamaTokenizer": llama_spec, "GPT2Tokenizer": gpt2_spec}[family]
    return build(vocab, merges, settings) | {"post_processor": post_processor}


def usual_names(spec):
    """BOS and EOS of a vocabulary beside which nothing names them: the special tokens of the usual names."""
    special = {t["content"] for t in spec["added_tokens"] if t["special"]}
    return {key: next((name for name in names if name in special), None)
            for key, names in (("bos_token", BOS_NAMES), ("eos_token", EOS_NAMES))}


def parse(path, form, data):
    """What a file says of a vocabulary: (vocab, merges), a SentencePiece message, or a tokenizer.json."""
    if form == "gpt2":
        return read_gpt2(path)
    if form == "sentencepiece":
        return parse_sentencepiece(data)
    spec = read_ranks(data) if form == "ranks" else json.loads(data)
    return spec | {"added_tokens": spec.get("added_tokens") or [], "post_processor": spec.get("post_processor")}


def read(path, in_folder):
    """(tokenizer.json, settings) of a vocabulary's file. in_folder: with all that lies beside it."""
    data, settings, family, declared, unasked = path.read_bytes(), {}, None, {}, None
    form = form_of(path, data)
    if form == "sentencepiece" and not in_folder:
        return lone_sentencepiece(data)
    if in_folder:
        settings = read_settings(path.parent)
        family = class_of(path, form, data, settings)
    source = parse(path, form, data)
    if in_folder:
        declared = declared_tokens(path.parent, settings, source["added_tokens"] if form == "json" else [])
    if form == "sentencepiece":
        unasked = [added(p.piece, i, p.type == CONTROL, normalized=False) for i, p in enumerate(source.pieces)
                   if p.type == CONTROL or p.type == USER_DEFINED and family]
    if form == "gpt2":
        family = "GPT2Tokenizer"
    if family:
        spec, names = built_spec(family, form, source, settings), CLASS_NAMES[family]
    elif form == "sentencepiece":
        spec, names = folder_sentencepiece(source, settings, declared), sentencepiece_names(source)
    else:
        spec, names = source, {}
    has_settings = in_folder and any(path.with_name(name).is_file() for name in SIDE_FILES)
    settings = (names if has_settings else usual_names(spec) | names) | settings
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
