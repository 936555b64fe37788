"""Text to token ids and back: characters, bytes, SentencePiece, tiktoken rank files, GPT-2, any tokenizer.json.

A tokenizer here *is* its tokenizer.json, the Hugging Face format: every other kind of file is turned into that
dictionary when it is read. So AutoTokenizer gives the ids that training used, and one class serves all kinds.
Only what runs it differs: plain Python for characters and bytes, tiktoken where it gives the same ids (five
times faster), the `tokenizers` library for the rest.
"""
import base64
import codecs
import functools
import hashlib
import io
import itertools
import json
import os
import re
import struct
from datetime import datetime
from pathlib import Path

import config

# Byte-level vocabularies are written with one printable character for each byte (GPT-2's table).
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTE_TO_CHAR = {b: chr(b) for b in PRINTABLE} | {
    b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in PRINTABLE)}
CHAR_TO_BYTE = {c: b for b, c in BYTE_TO_CHAR.items()}

# How a text is cut before merging: into words, as published with GPT-2, Llama 3 and Llama 4, or into characters.
GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                r"|\s*[\r\n]+|\s+(?!\S)|\s+")
LLAMA4_WORDS = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
                r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
                r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
CHARACTERS = r"[\s\S]"
PROBE = "It's 12345.67  HELLO'S größer e\u0301 你好🙂\n\n\tx+=y; /* a */\r\n    end "  # shows how words are cut
TIKTOKEN_LIMIT = 400_000  # characters in a text: on longer runs of spaces its regex overflows its stack

BOS_NAMES = ("<|begin_of_text|>", "<s>", "<|endoftext|>")  # the first that exists, where no settings name one
EOS_NAMES = ("<|end_of_text|>", "</s>", "<|endoftext|>")
STOP_NAMES = {*EOS_NAMES, "<|eot|>", "<|eot_id|>", "<|eom|>", "<|eom_id|>", "<|im_end|>", "<|end|>"}


class Tokenizer:
    """Text to ids and back. Make one with `char`, `byte`, `train_sentencepiece` or `load`.

    spec: what its tokenizer.json holds; settings: its tokenizer_config.json; model: the SentencePiece file it came
    from, as bytes, which `save` hands on. kind: char | byte | sentencepiece | tiktoken | json, by how it works.
    vocab_size: the largest id + 1. special: {text: id}. bos_id, eos_id: int or None. stop_ids: the ids that end a
    generation. chat_template: jinja text or None.
    """
    file = "tokenizer.json"

    def __init__(self, spec, settings=None, model=None):
        self.spec, self.model, settings = spec | {"truncation": None, "padding": None}, model, settings or {}
        vocab, added = spec["model"]["vocab"], spec.get("added_tokens") or []
        self.vocab = vocab if isinstance(vocab, dict) else {piece: i for i, (piece, _) in enumerate(vocab)}
        self.special = {t["content"]: t["id"] for t in added if t["special"]}
        self.ids = self.vocab | {t["content"]: t["id"] for t in added}
        taken = set(self.ids.values())
        if len(taken) < len(self.ids) or not all(type(i) is int and 0 <= i < 1 << 31 for i in taken):
            raise ValueError("its ids are not different whole numbers from 0 up")
        self.vocab_size = max(taken) + 1
        self.kind, self._words = _kind(spec, self.vocab, added)
        self._bytes, self._drops_space = _decoder(spec, self.vocab)
        self._bytes |= {t["id"]: t["content"].encode() for t in added}
        self._plain = dict(self._bytes)  # without the special tokens
        for i in self.special.values():
            del self._plain[i]
        self.settings = settings | {"tokenizer_class": "PreTrainedTokenizerFast"}  # AutoTokenizer reads the spec alone
        for key, names in (("bos_token", BOS_NAMES), ("eos_token", EOS_NAMES)):
            self.settings.setdefault(key, next((n for n in names if n in self.ids), None))
        self.settings.setdefault("clean_up_tokenization_spaces", False)
        self.bos_id, self.eos_id = self.ids.get(self._name("bos_token")), self.ids.get(self._name("eos_token"))
        self.stop_ids = {i for t, i in self.special.items() if t in STOP_NAMES} | {self.eos_id} - {None}
        self.chat_template = settings.get("chat_template")

    def _name(self, key):
        """The text of the token that the settings call `key`, or None."""
        token = self.settings.get(key)
        return token["content"] if isinstance(token, dict) else token

    @functools.cached_property
    def fingerprint(self):
        """sha256 over the bytes of every ordinary token and the ids of a probe text: the same for the same vocabulary,
        whichever format it was read from."""
        digest = hashlib.sha256(str(self.vocab_size).encode())
        for i, piece in sorted(self._plain.items()):
            digest.update(struct.pack("<II", i, len(piece)) + piece)
        if self.kind != "char":
            digest.update(repr(self.encode(PROBE)).encode())
        return digest.hexdigest()

    @functools.cached_property
    def _library(self):
        """The `tokenizers` engine, set to take the names of special tokens in a text for text."""
        import tokenizers
        try:
            engine = tokenizers.Tokenizer.from_str(json.dumps(self.spec))
        except BaseException as e:  # the library raises plain Exceptions, and panics, which are not even those
            if isinstance(e, (KeyboardInterrupt, SystemExit)):
                raise
            raise config.Mistake(" ".join(str(e).split())) from e
        engine.encode_special_tokens = True
        return engine

    @functools.cached_property
    def adds_bos(self):
        """Whether transformers, and whatever builds on it, begins a text with BOS unless told otherwise."""
        return self.bos_id is not None and self.bos_id in self._library.encode("").ids

    @functools.cached_property
    def _tiktoken(self):
        import tiktoken
        ranks = {piece: i for i, piece in self._plain.items()}
        return tiktoken.Encoding("everyllama", pat_str=self._words, mergeable_ranks=ranks, special_tokens={})

    def _encode(self, texts):
        """Ids of each text, with nothing around them. The libraries use all cores, or one where the environment says
        TOKENIZERS_PARALLELISM=false."""
        if self.kind == "byte":
            return [list(t.encode()) for t in texts]
        if self.kind == "char":
            try:
                return [[self.vocab[c] for c in t] for t in texts]
            except KeyError as e:
                raise config.Mistake(f"the character {e.args[0]!r} is not among the {len(self._plain)} of this "
                                     "vocabulary") from None
        if self.kind == "tiktoken":
            threads = 1 if os.environ.get("TOKENIZERS_PARALLELISM") == "false" else os.cpu_count()
            short = [t if len(t) <= TIKTOKEN_LIMIT else "" for t in texts]
            batch = self._tiktoken.encode_ordinary_batch(short, num_threads=threads)
            return [self._library.encode(t, add_special_tokens=False).ids if len(t) > TIKTOKEN_LIMIT else ids
                    for t, ids in zip(texts, batch)]
        engine = self._library
        with config.mistakes(Exception, prefix="this tokenizer cannot encode that: "):
            return [e.ids for e in engine.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_batch(self, texts, bos=False, eos=False):
        """Ids of many texts at once: list[str] -> list[list[int]].

        bos, eos: put that token around each text, if this tokenizer has one. Names of special tokens in the texts are
        plain text. Lone surrogates become U+FFFD. A char tokenizer raises `config.Mistake` at a character that it does
        not have.
        """
        batch = self._encode([valid(t) for t in texts])
        first, last = self._around(bos, eos)
        return [first + ids + last for ids in batch] if first or last else batch

    def encode(self, text, bos=False, eos=False, special=False):
        """Ids of one text, as in `encode_batch`. special=True takes the names of special tokens for those tokens."""
        if not special:
            return self.encode_batch([text], bos, eos)[0]
        first, last = self._around(bos, eos)
        return first + self._join(self._names.split(text)) + last

    def _around(self, bos, eos):
        return [self.bos_id] * (bos and self.bos_id is not None), [self.eos_id] * (eos and self.eos_id is not None)

    @functools.cached_property
    def _names(self):
        """Matches the special tokens, the longest first, with the white space that they swallow."""
        tokens = sorted((t for t in self.spec.get("added_tokens") or [] if t["special"]),
                        key=lambda t: -len(t["content"]))
        patterns = ((r"\s*" if t.get("lstrip") else "") + re.escape(t["content"]) + (r"\s*" if t.get("rstrip") else "")
                    for t in tokens)
        return re.compile(f"({'|'.join(patterns) or '(?!)'})")

    def _join(self, parts):
        """Ids of [text, name, text, ..., name, text], as `_names.split` gives them."""
        batch = self.encode_batch(parts[::2])
        for name, ids in zip(parts[1::2], batch[1:]):
            ids.insert(0, self.special[name if name in self.special else name.strip()])
        return list(itertools.chain(*batch))

    def decode(self, ids, special=False):
        """Text of ids (any iterable of integers). Special tokens are left out unless special=True; bytes that are not
        UTF-8 become U+FFFD; an id outside the vocabulary has no text."""
        table = self._bytes if special else self._plain
        data = b"".join(table.get(int(i), b"") for i in ids)
        return (data.removeprefix(b" ") if self._drops_space else data).decode("utf-8", "replace")

    def stream(self, after=()):
        """A `Stream` that decodes id by id. after: the ids that came before, whose text is not repeated."""
        stream = Stream(self._plain, self._drops_space)
        for i in after:
            stream.feed(i)
        return stream

    @functools.cached_property
    def _template(self):
        """The chat template, compiled."""
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def refuse(message):
            raise jinja2.TemplateError(message)

        env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                            extensions=["jinja2.ext.loopcontrols"])
        env.filters["tojson"] = lambda x, **options: json.dumps(x, ensure_ascii=False, **options)
        env.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
        return env.from_string(self.chat_template)

    def chat(self, messages, add_generation_prompt=True):
        """Ids of a conversation [{"role": ..., "content": ...}, ...] in the form that the model was trained on.

        Names of special tokens within a message stay text. The template is not trusted: it runs in jinja2's
        sandbox. Raises `config.Mistake` if there is none, or if it refuses the conversation.
        """
        if not self.chat_template:
            raise config.Mistake("this tokenizer has no chat template: its model continues texts, it does not chat")
        said = json.dumps(messages, ensure_ascii=False)
        mark = next(chr(c) for c in range(0xE000, 0xF900) if chr(c) not in said)  # breaks names until they are encoded
        messages = _each_text(messages, lambda text: self._names.sub(lambda name: mark.join(name[0]), text))
        names = {key: self._name(key) for key in self.settings if key.endswith("_token")}
        with config.mistakes(Exception, prefix="chat template: "):  # a template can fail in any way
            text = self._template.render(
                messages=messages, add_generation_prompt=add_generation_prompt, tools=None, documents=None, **names)
        return self._join([part.replace(mark, "") for part in self._names.split(text)])

    def save(self, directory):
        """Write tokenizer.json, tokenizer_config.json and, if it came from SentencePiece, tokenizer.model."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        files = {"tokenizer.model": self.model} if self.model else {}
        files |= {"tokenizer_config.json": json.dumps(self.settings, indent=2).encode(),
                  "tokenizer.json": json.dumps(self.spec).encode()}
        for name, data in files.items():
            (directory / f"{name}.tmp").write_bytes(data)
            os.replace(directory / f"{name}.tmp", directory / name)


class Stream:
    """Decoding id by id: what `feed` returns, and at last `end`, adds up to `decode` of all the ids. The bytes of a
    character that is not complete yet are held back."""

    def __init__(self, table, drops_space):
        self.table, self.drops_space = table, drops_space
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, id):
        """The text that this id completes, often ""."""
        piece = self.table.get(int(id), b"")
        if self.drops_space and piece:
            piece, self.drops_space = piece.removeprefix(b" "), False
        return self.utf8.decode(piece)

    def end(self):
        """What was held back: "" or U+FFFD."""
        return self.utf8.decode(b"", final=True)


def valid(text):
    """text with U+FFFD for lone surrogates, which UTF-8 cannot hold: what `encode` sees of a text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _each_text(x, change):
    """x with `change` applied to every str in its lists and dicts."""
    if isinstance(x, dict):
        return {k: _each_text(v, change) for k, v in x.items()}
    return [_each_text(v, change) for v in x] if isinstance(x, list) else change(x) if isinstance(x, str) else x


def _steps(node):
    """The steps of a normalizer, pre-tokenizer or decoder of a tokenizer.json, its sequences laid flat."""
    if node and node["type"] == "Sequence":
        return [step for inner in node.values() if isinstance(inner, list) for n in inner for step in _steps(n)]
    return [node] if node else []


def _kind(spec, vocab, added):
    """(kind, pattern that cuts words or None) of a tokenizer.json.

    It is "tiktoken" if merging by rank gives the same ids: its merges come in the order of the ids that they make and
    make every token, so that the lowest id that two neighbours form is also the first merge that applies to them.
    """
    model, cut, undo = spec["model"], _steps(spec.get("pre_tokenizer")), _steps(spec.get("decoder"))
    undo, special = [step["type"] for step in undo], {t["id"] for t in added}
    plain = {t: i for t, i in vocab.items() if i not in special}
    as_it_comes = not spec.get("normalizer") and all(t["special"] for t in added)  # the text, before it is cut
    kind = model.get("type", "BPE" if "merges" in model else None)  # old files leave it out
    if kind == "WordLevel" and as_it_comes and cut == [_split(CHARACTERS)] and undo == ["Fuse"]:
        return "char" if {len(t) for t in plain} <= {1} else "json", None
    if kind != "BPE":
        return "json", None
    if model.get("byte_fallback"):
        return "sentencepiece", None
    *before, last = cut or [{"type": None}]
    if undo != ["ByteLevel"] or last["type"] != "ByteLevel" or last["add_prefix_space"] or not as_it_comes:
        return "json", None
    if not before and plain == CHAR_TO_BYTE:
        return "byte", None
    merges = (m.split(" ") if isinstance(m, str) else m for m in model["merges"])
    made = [vocab[a + b] for a, b in merges]
    if made == sorted(made) and set(plain.values()) == {vocab.get(c) for c in CHAR_TO_BYTE}.union(made):
        if not before and last.get("use_regex", True):
            return "tiktoken", GPT2_WORDS
        for words in (LLAMA3_WORDS, LLAMA4_WORDS):
            if before == [_split(words)] and not last.get("use_regex", True):
                return "tiktoken", words
    return "json", None


def _decoder(spec, vocab):
    """({id: the bytes that it stands for}, whether decoding drops the space that encoding puts in front of a text)."""
    steps = {step["type"]: step for step in _steps(spec.get("decoder"))}
    if "ByteLevel" in steps:
        return {i: bytes(CHAR_TO_BYTE[c] for c in piece) if CHAR_TO_BYTE.keys() >= set(piece) else piece.encode()
                for piece, i in vocab.items()}, False
    if not steps.keys() & {"ByteFallback", "Metaspace", "Fuse"}:
        raise ValueError(f"its decoder {sorted(steps)} is none of ByteLevel, ByteFallback, Metaspace and Fuse")
    space = "▁" if steps.keys() & {"Replace", "Metaspace"} else " "
    table = {i: piece.replace(space, " ").encode() for piece, i in vocab.items()}
    if "ByteFallback" in steps:
        table |= {vocab[f"<0x{b:02X}>"]: bytes([b]) for b in range(256) if f"<0x{b:02X}>" in vocab}
    prefix = steps["Metaspace"].get("prepend_scheme", "always") if "Metaspace" in steps else "never"
    return table, prefix != "never" or steps.get("Strip", {}).get("start", 0) > 0


def make_spec(model, special, cut, undo, normalizer=None, bos=None):
    """A tokenizer.json. special: {text: id}; bos: the special token that AutoTokenizer puts in front of a text."""
    front = [{"SpecialToken": {"id": bos, "type_id": 0}}] if bos else []
    first, second = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
    post = {"type": "TemplateProcessing", "single": front + [first], "pair": front + [first] + front + [second],
            "special_tokens": {bos: {"id": bos, "ids": [special[bos]], "tokens": [bos]}}} if bos else None
    return {"version": "1.0", "added_tokens": [_added(t, i) for t, i in special.items()], "normalizer": normalizer,
            "pre_tokenizer": cut, "post_processor": post, "decoder": undo, "model": model}


def _added(text, id, special=True):
    return {"id": id, "content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
            "special": special}


def bpe(vocab, merges, **more):
    """The model of a tokenizer.json. vocab: {piece: id}; merges: [left, right] each, the first the most urgent."""
    return {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            "vocab": vocab, "merges": merges, **more}


def _split(pattern):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def byte_level(use_regex):
    """The step, of cutting and of decoding, that writes bytes as characters; use_regex: it cuts words as GPT-2 does."""
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _merges(ranks):
    """Every way to make a piece of a vocabulary of two others, in the order of the pieces' ranks: {piece: rank}."""
    merges = []
    for piece in sorted(ranks, key=ranks.get):
        if len(piece) > 1000:
            raise ValueError(f"it has a piece of {len(piece)} characters")
        pairs = [[piece[:i], piece[i:]] for i in range(1, len(piece)) if piece[:i] in ranks and piece[i:] in ranks]
        merges += sorted(pairs, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    return merges


def char(text, special=()):
    """One token for each character that text has, then the special tokens, of which the first (say "<s>") begins a
    document and the last ends it; without any there is neither BOS nor EOS."""
    if not text:
        raise config.Mistake("a character tokenizer needs a text to take its characters from")
    vocab = {c: i for i, c in enumerate(sorted(set(text)))}
    special = {t: len(vocab) + i for i, t in enumerate(special)}
    bos, eos = [*special, None][0], [None, *special][-1]
    model = {"type": "WordLevel", "vocab": vocab | special, "unk_token": "<unk>"}
    spec = make_spec(model, special, _split(CHARACTERS), {"type": "Fuse"}, bos=bos)
    return Tokenizer(spec, {"bos_token": bos, "eos_token": eos})


def byte():
    """The 256 bytes, each its own id, then BOS <s> and EOS </s>."""
    special, step = {"<s>": 256, "</s>": 257}, byte_level(False)
    return Tokenizer(make_spec(bpe(CHAR_TO_BYTE, []), special, step, step, bos="<s>"))


def train_sentencepiece(texts, vocab_size):
    """A SentencePiece BPE of exactly vocab_size tokens, trained on the lines of texts (an iterable of str).

    Deterministic. Its settings are Llama 2's (digits apart, byte fallback, no normalisation), but no space is put in
    front of a text. Where the texts have too few words for so many tokens, the last ones are never used.
    """
    import sentencepiece
    out = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line for text in texts for line in text.split("\n") if line), model_writer=out,
            model_type="bpe", vocab_size=vocab_size, hard_vocab_limit=False, byte_fallback=True, split_digits=True,
            allow_whitespace_only_pieces=True, normalization_rule_name="identity", add_dummy_prefix=False,
            remove_extra_whitespaces=False, max_sentence_length=1 << 20, num_threads=1, minloglevel=2)
    except RuntimeError as e:
        reason = str(e).rpartition("] ")[2].strip() or "there is no text to train on"
        raise config.Mistake(f"cannot train a vocabulary of {vocab_size} tokens: {reason}") from e
    trained = sum(number == 1 for number, _ in _fields(out.getvalue()))
    for i in range(vocab_size - trained):
        name = f"<unused_{i}>".encode()  # a protobuf message grows by appending to it
        piece = b"\n" + bytes([len(name)]) + name + b"\x18" + bytes([UNUSED])
        out.write(b"\n" + bytes([len(piece)]) + piece)
    return Tokenizer(*_read_sentencepiece(out.getvalue()), out.getvalue())


NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = range(1, 6)  # types of pieces in sentencepiece_model.proto


def _fields(data):
    """(field number, value) of each field of a protobuf message; a value is an int, or bytes for all else."""
    at = 0

    def varint():
        nonlocal at
        value = 0
        for shift in range(0, 70, 7):
            at += 1
            value |= (data[at - 1] & 127) << shift
            if data[at - 1] < 128:
                return value
        raise ValueError("a number without end")

    while at < len(data):
        number, wire = divmod(varint(), 8)
        if wire == 0:
            yield number, varint()
        else:
            size = varint() if wire == 2 else {1: 8, 5: 4}.get(wire)
            if size is None or at + size > len(data):
                raise ValueError("a field without end")
            yield number, data[at:at + size]
            at += size


def _read_sentencepiece(data):
    """(tokenizer.json, settings) of a SentencePiece BPE model: Llama 1 and 2, TinyLlama, Mistral, or trained here.

    The vocabulary gets spaces where SentencePiece has U+2581. So a U+2581 in a text is spelled in bytes and comes back,
    which is the one departure from SentencePiece's ids: there it turns into a space.
    """
    fields = list(_fields(data))
    trainer, normalizer = ({k: v for n, m in fields if n == number for k, v in _fields(m)} for number in (2, 3))
    pieces = [{1: b"", 2: bytes(4), 3: NORMAL} | dict(_fields(m)) for n, m in fields if n == 1]
    types = [p[3] for p in pieces]
    if trainer.get(3) != 2 or UNKNOWN not in types:
        raise ValueError("it is not a SentencePiece BPE model")
    if normalizer.get(2) or normalizer.get(4, 1) or not normalizer.get(5, 1) or trainer.get(24):
        raise ValueError("it changes texts before it encodes them, so they could not be decoded exactly")
    texts = [p[1].decode().replace("▁", " ") if t in (NORMAL, USER_DEFINED) else p[1].decode()
             for p, t in zip(pieces, types)]
    vocab = {text: i for i, text in enumerate(texts)}
    if len(vocab) < len(texts):
        raise ValueError("two of its pieces are the same")
    ranks = {text: (-struct.unpack("<f", p[2])[0], vocab[text]) for text, p, t in zip(texts, pieces, types)
             if t in (NORMAL, USER_DEFINED)}
    special = {text: vocab[text] for text, t in zip(texts, types) if t in (UNKNOWN, CONTROL)}
    bos, eos = (texts[i] if i < len(texts) and types[i] == CONTROL else None
                for i in (trainer.get(41, 1), trainer.get(42, 2)))
    unk, prefix = texts[types.index(UNKNOWN)], bool(normalizer.get(3, 1))
    undo = [{"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    spec = make_spec(bpe(vocab, _merges(ranks), unk_token=unk, fuse_unk=True, byte_fallback=True), special, None,
                 {"type": "Sequence", "decoders": undo[:2 + prefix]},
                 {"type": "Prepend", "prepend": " "} if prefix else None, bos)
    spec["added_tokens"] += [_added(text, vocab[text], False) for text, t in zip(texts, types) if t == USER_DEFINED]
    return spec, {"bos_token": bos, "eos_token": eos, "unk_token": unk, "add_prefix_space": prefix}


def _llama3_special():
    """Llama 3's 256 special tokens in the order of their ids (meta-llama/llama-models, models/llama3/tokenizer.py)."""
    named = ["begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1",
             "finetune_right_pad_id", "step_id", "start_header_id", "end_header_id", "eom_id", "eot_id",
             "python_tag", "image"]
    return [f"<|{n}|>" for n in named + [f"reserved_special_token_{i}" for i in range(2, 246)]]


def _llama4_special():
    """Llama 4's 2,048 special tokens in the order of their ids (llama-models, models/llama4/tokenizer.py)."""
    def reserved(kind, *span):
        return [f"{kind}_reserved_special_token_{i}" for i in range(*span)]
    named = ["begin_of_text", "end_of_text", "fim_prefix", "fim_middle", "fim_suffix",
             "header_start", "header_end", "eom", "eot", "step", *reserved("text_post_train", 6),
             "python_start", "python_end", "finetune_right_pad", *reserved("text_post_train", 8, 69),
             "image_start", "image_end", *reserved("vision", 2), "tile_x_separator", "tile_y_separator",
             *reserved("vision", 2, 6), "image", *reserved("vision", 6, 7), "patch", *reserved("vision", 7, 1048),
             *reserved("reasoning", 8), "reasoning_thinking_start", "reasoning_thinking_end"]
    return [f"<|{n}|>" for n in named + [f"reserved_special_token_{i}" for i in range(2048 - len(named))]]


RANK_FILES = {128_000: (LLAMA3_WORDS, _llama3_special), 200_000: (LLAMA4_WORDS, _llama4_special)}


def _read_ranks(data):
    """tokenizer.json of Llama 3's or Llama 4's tokenizer.model: lines of a token in base64 and its rank."""
    ranks = {}
    for line in data.splitlines():
        token, rank = line.split()
        ranks["".join(BYTE_TO_CHAR[b] for b in base64.b64decode(token, validate=True))] = int(rank)
    if len(ranks) not in RANK_FILES:
        raise ValueError(f"it has {len(ranks)} ranks; Llama 3 has 128000, Llama 4 200000")
    if set(ranks.values()) != set(range(len(ranks))) or not ranks.keys() >= CHAR_TO_BYTE.keys():
        raise ValueError("ranks or bytes are missing")
    words, names = RANK_FILES[len(ranks)]
    special = {name: len(ranks) + i for i, name in enumerate(names())}
    cut = {"type": "Sequence", "pretokenizers": [_split(words), byte_level(False)]}
    return make_spec(bpe(ranks, _merges(ranks), ignore_merges=True), special, cut, byte_level(True), bos=BOS_NAMES[0])


def _read_gpt2(vocab, merges):
    """tokenizer.json of GPT-2's encoder.json and vocab.bpe, elsewhere called vocab.json and merges.txt."""
    vocab = json.loads(vocab)
    merges = [line.split(" ") for line in merges.decode().split("\n") if line and not line.startswith("#version")]
    made = {a + b for a, b in merges} | CHAR_TO_BYTE.keys()
    special = {text: i for text, i in vocab.items() if text not in made}
    return make_spec(bpe(vocab, merges), special, byte_level(True), byte_level(True))


PAIRS = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))  # GPT-2's two files, under both names


def _read_settings(folder):
    """A folder's tokenizer_config.json, with its chat template, wherever that is kept, as one text."""
    path, jinja = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    settings = json.loads(path.read_bytes()) if path.is_file() else {}
    settings.pop("auto_map", None)  # names code to run, which is never wanted
    if jinja.is_file():
        settings["chat_template"] = jinja.read_text(encoding="utf-8")
    elif isinstance(settings.get("chat_template"), list):
        settings["chat_template"] = {t["name"]: t["template"] for t in settings["chat_template"]}.get("default")
    return settings


def load(path):
    """Tokenizer from a file or folder: tokenizer.json, a SentencePiece or Llama tokenizer.model, or GPT-2's two files.

    A tokenizer_config.json beside the first two names BOS and EOS and holds the chat template. Anything that cannot
    be read raises `config.Mistake`.
    """
    path = Path(path)
    if path.is_dir():
        names = ("tokenizer.json", "tokenizer.model", *(a for a, _ in PAIRS))
        path = next((path / n for n in names if (path / n).is_file()), path)
    if not path.is_file():
        raise config.Mistake(f"{path}: there is no tokenizer (tokenizer.json, tokenizer.model, or encoder.json and "
                             "vocab.bpe)")
    wrong = (ValueError, TypeError, AttributeError, IndexError, RecursionError, struct.error, OSError, config.Mistake)
    with config.mistakes(*wrong, prefix=f"{path} is no tokenizer that can be used: "), \
            config.mistakes(KeyError, prefix="it lacks "):
        data, settings, model = path.read_bytes(), {}, None
        pair = next((p for p in PAIRS if path.name.endswith(p)), None)
        if pair:
            start = path.name.removesuffix(pair[0]).removesuffix(pair[1])
            spec = _read_gpt2(*(path.with_name(start + name).read_bytes() for name in pair))
        elif data.lstrip()[:1] == b"{":
            spec = json.loads(data)
            if spec["model"].get("byte_fallback") and path.with_name("tokenizer.model").is_file():
                model = path.with_name("tokenizer.model").read_bytes()
        elif re.match(rb"[A-Za-z0-9+/]+=* \d+\s", data):
            spec = _read_ranks(data)
        else:
            with config.mistakes(*wrong, prefix="read as a SentencePiece model: "):
                (spec, settings), model = _read_sentencepiece(data), data
        if path.name in ("tokenizer.json", "tokenizer.model"):
            settings = settings | _read_settings(path.parent)
        tok = Tokenizer(spec, settings, model)
        tok.encode_batch([])  # an engine that cannot be built says so now
    return tok
