"""A tokenizer.json: the parts it is written of, and what it says that a tokenizer does."""

# Byte-level vocabularies are written with one printable character for each byte (GPT-2's table).
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTE_TO_CHAR = {b: chr(b) for b in PRINTABLE} | {
    b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in PRINTABLE)}

CHAR_TO_BYTE = {c: b for b, c in BYTE_TO_CHAR.items()}

# How a text is cut before merging: into words, as published with Llama 3, Llama 4 and GPT-2, or into characters.
LLAMA3_WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                r"|\s*[\r\n]+|\s+(?!\S)|\s+")
LLAMA4_WORDS = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
                r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
                r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CHARACTERS = r"[\s\S]"
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}  # drops the space that encoding puts in front


def valid(text):
    """text with U+FFFD for lone surrogates, which UTF-8 cannot hold: what a tokenizer sees of a text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


# -- writing one -------------------------------------------------------------------------------------------------

def make_spec(model, special, pre_tokenizer, decoder, normalizer=None, bos=None):
    """A tokenizer.json. special: {text: id}; bos: the special token that AutoTokenizer puts in front of a text."""
    return {"version": "1.0", "added_tokens": [added_token(text, id) for text, id in special.items()],
            "normalizer": normalizer, "pre_tokenizer": pre_tokenizer, "post_processor": around(special, bos),
            "decoder": decoder, "model": model}


def added_token(content, id, special=True, **flags):
    """One of the tokens that are found in a text before it is cut and merged."""
    return {"id": id, "content": content, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": not special, "special": special} | flags


def around(ids, before=None, after=None):
    """The post-processor that puts the tokens `before` and `after` around a text, None for neither; ids: {text: id}."""
    def with_ends(name, number):
        parts = ("SpecialToken", before), ("Sequence", name), ("SpecialToken", after)
        return [{part: {"id": id, "type_id": number}} for part, id in parts if id]
    used = {token: {"id": token, "ids": [ids[token]], "tokens": [token]} for token in (before, after) if token}
    return {"type": "TemplateProcessing", "single": with_ends("A", 0), "pair": with_ends("A", 0) + with_ends("B", 1),
            "special_tokens": used} if used else None


def bpe(vocab, merges, **more):
    """The model of a tokenizer.json. vocab: {piece: id}; merges: [left, right] each, the first the most urgent."""
    return {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            "vocab": vocab, "merges": merges, **more}


def split(pattern):
    """The step of cutting that isolates what a regular expression matches."""
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def byte_level(use_regex):
    """The step, of cutting and of decoding, that writes bytes as characters; use_regex: it cuts words as GPT-2 does."""
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


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


# -- reading one -------------------------------------------------------------------------------------------------

def steps_of(node):
    """The steps of a normalizer, pre-tokenizer or decoder of a tokenizer.json, its sequences laid flat."""
    if node and node["type"] == "Sequence":
        return [step for inner in node.values() if isinstance(inner, list) for n in inner for step in steps_of(n)]
    return [node] if node else []


def ends_of(spec):
    """The ids that a tokenizer.json puts before and after a text by default."""
    ends, side = ([], []), 0
    for step in steps_of(spec.get("post_processor")):
        if step["type"] not in ("TemplateProcessing", "ByteLevel"):
            raise ValueError(f"its post-processor {step['type']} is none that a Llama has")
        for part in step.get("single", ()):
            if "Sequence" in part:  # the text
                side = 1
            else:
                ends[side].extend(step["special_tokens"][part["SpecialToken"]["id"]]["ids"])
    return ends


def kind_of(spec, vocab, added):
    """(kind, pattern that cuts words or None) of a tokenizer.json.

    It is "tiktoken" if merging by rank gives the same ids."""
    model, cut = spec["model"], steps_of(spec.get("pre_tokenizer"))
    decoder, added_ids = [step["type"] for step in steps_of(spec.get("decoder"))], {t["id"] for t in added}
    plain = {piece: i for piece, i in vocab.items() if i not in added_ids}
    as_it_comes = not spec.get("normalizer") and all(t["special"] for t in added)  # the text, before it is cut
    algorithm = model.get("type", "BPE" if "merges" in model else None)  # old files leave it out
    if algorithm == "WordLevel" and as_it_comes and cut == [split(CHARACTERS)] and decoder == ["Fuse"]:
        return "char" if {len(piece) for piece in plain} <= {1} else "json", None
    if algorithm != "BPE":
        return "json", None
    if model.get("byte_fallback"):
        return "sentencepiece", None
    *before, last = cut or [{"type": None}]
    if decoder != ["ByteLevel"] or last["type"] != "ByteLevel" or last["add_prefix_space"] or not as_it_comes:
        return "json", None
    if not before and plain == CHAR_TO_BYTE:
        return "byte", None
    if last.get("use_regex", True):
        words = None if before else GPT2_WORDS
    else:
        words = next((words for words in (LLAMA3_WORDS, LLAMA4_WORDS) if before == [split(words)]), None)
    return ("tiktoken", words) if words and merges_by_rank(model, plain) else ("json", None)


def merges_by_rank(model, plain):
    """Whether the merges of a byte-level BPE give the ids that merging by rank does: always of those neighbours that
    form the lowest id; a word that is a token is that token. plain: {piece: id}.

    The merges must come in the order of the ids that they make, and make every token. Then the two ways can part only
    at neighbours that form a token without a merge for just these two. Of the token by itself the merges would leave
    the same two pieces. They cannot where every way to make a token is a merge.
    """
    merges = [(a, b) for a, b in (m.split(" ") if isinstance(m, str) else m for m in model["merges"])]
    made = [plain.get(a + b, -1) for a, b in merges]
    if (made != sorted(made) or set(plain.values()) != {plain.get(c) for c in CHAR_TO_BYTE}.union(made)
            or not all(a in plain and b in plain for a, b in merges)):
        return False
    whole_words = model.get("ignore_merges", False)
    if whole_words and len(set(merges)) == sum(piece[:i] in plain and piece[i:] in plain
                                               for piece in plain for i in range(1, len(piece))):
        return True  # as in Llama 3's file: checked first, being twice as fast as what follows
    from tokenizers import Tokenizer, models
    lengths = {len(e) for e in Tokenizer(models.BPE(plain, merges)).encode_batch_fast(list(plain))}
    return 2 not in lengths if whole_words else lengths == {1}


def bytes_of_tokens(spec, vocab):
    """({id: the bytes that it stands for}, whether decoding drops the space that encoding puts in front of a text)."""
    steps = {step["type"]: step for step in steps_of(spec.get("decoder"))}
    if "ByteLevel" in steps:
        return {i: bytes(CHAR_TO_BYTE[c] for c in piece) if CHAR_TO_BYTE.keys() >= set(piece) else piece.encode()
                for piece, i in vocab.items()}, False
    if not steps or steps.keys() - {"Replace", "ByteFallback", "Metaspace", "Fuse", "Strip"}:
        raise ValueError(f"its decoder {sorted(steps)} is none of ByteLevel, Replace, ByteFallback, Metaspace and Fuse")
    if "Strip" in steps and "Fuse" not in [*steps][:[*steps].index("Strip")]:
        raise ValueError("its decoder has no Fuse before Strip, which then strips each token")
    if steps.get("Strip", STRIP) not in (STRIP, STRIP | {"start": 0}):
        raise ValueError(f"its decoder strips {steps['Strip']}")
    if steps.get("Metaspace", {}).get("replacement", "▁") != "▁":
        raise ValueError(f"its decoder has {steps['Metaspace']['replacement']!r} for spaces")
    if "Replace" in steps and ("▁" not in steps["Replace"]["pattern"].values() or steps["Replace"]["content"] != " "):
        raise ValueError(f"its decoder replaces {steps['Replace']['pattern']} by {steps['Replace']['content']!r}")
    space = "▁" if steps.keys() & {"Replace", "Metaspace"} else " "
    table = {i: piece.replace(space, " ").encode() for piece, i in vocab.items()}
    if "ByteFallback" in steps:
        table |= {vocab[f"<0x{b:02X}>"]: bytes([b]) for b in range(256) if f"<0x{b:02X}>" in vocab}
    prefix = steps["Metaspace"].get("prepend_scheme", "always") if "Metaspace" in steps else "never"
    return table, prefix != "never" or steps.get("Strip", {}).get("start", 0) > 0
