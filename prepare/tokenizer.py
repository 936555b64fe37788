"""Text to token ids and back: characters, bytes, SentencePiece, tiktoken rank files, GPT-2, any tokenizer.json.

A tokenizer here *is* its tokenizer.json: prepare/tokenizer_files.py turns every other kind of file into that. So
AutoTokenizer gives the ids that training used, and one class serves all kinds. The `tokenizers` library runs it; but
plain Python is enough for characters and bytes, and tiktoken, where it gives the same ids, is four times as fast.
"""
import codecs
import functools
import hashlib
import io
import json
import os
import re
import struct
from pathlib import Path

import config
from prepare import chat_template, tokenizer_files
from prepare.tokenizer_files import SIDE_FILES, named_tokens
from prepare.tokenizer_spec import (CHAR_TO_BYTE, CHARACTERS, around, bpe, byte_level, bytes_of_tokens, ends_of,
                                    kind_of, make_spec, split, valid)

PROBE = "It's 12345.67  HELLO'S größer e\u0301 你好🙂\n\n\tx+=y; /* a */\r\n    end "  # shows how words are cut
TIKTOKEN_LIMIT = 400_000  # characters in a text: on longer runs of spaces its regex overflows its stack
STOP_NAMES = {*tokenizer_files.USUAL_NAMES["eos_token"], "<|eot|>", "<|eot_id|>", "<|eom|>", "<|eom_id|>", "<|im_end|>",
              "<|end|>"}
LINE_LIMIT = 250_000  # characters, at most 1,000,000 bytes: SentencePiece drops longer lines without a word
# What SentencePiece trains on: lines, cut at U+2585, which it keeps for itself, and in front of a space where too long.
LINE = re.compile(rf"[^\n\u2585]{{1,{LINE_LIMIT}}}(?![^ \n\u2585])|[^\n\u2585]{{1,{LINE_LIMIT}}}")


class Tokenizer(chat_template.Chats):
    """Text to ids and back, and conversations to ids. Make one with `char`, `byte`, `train_sentencepiece` or `load`.

    spec: what its tokenizer.json holds; settings: its tokenizer_config.json; model: the SentencePiece file it came
    from, as bytes, which `save` hands on. kind: char | byte | sentencepiece | tiktoken | json, by how it works.
    vocab_size: the largest id + 1. added, special: {text: id} of the tokens that are found in a text before it is cut,
    and of those among them that mean more than their text. bos_id, eos_id: int or None. adds_bos, adds_eos: whether
    transformers puts them around a text unless told otherwise. stop_ids: the ids that end a generation: EOS, and those
    of generation_config.json, or else a list in config.json, or the special tokens of the usual names. chat_template:
    {name: jinja text}.
    """

    def __init__(self, spec, settings=None, model=None):
        self.spec, self.model = spec | {"truncation": None, "padding": None}, model
        self.settings = {"bos_token": None, "eos_token": None, "clean_up_tokenization_spaces": False} | (settings or {})
        self.settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # with which AutoTokenizer reads the spec alone
        vocab, tokens = spec["model"]["vocab"], spec.get("added_tokens") or []
        self.vocab = vocab if isinstance(vocab, dict) else {piece: i for i, (piece, _) in enumerate(vocab)}
        self.added = {t["content"]: t["id"] for t in tokens}
        self.special = {t["content"]: t["id"] for t in tokens if t["special"]}
        self.ids = self.vocab | self.added
        taken = set(self.ids.values())
        if len(taken) < len(self.ids) or not all(type(i) is int and 0 <= i < 1 << 31 for i in taken):
            raise ValueError("its ids are not different whole numbers from 0 up")
        self.vocab_size = max(taken) + 1
        self.kind, self._words = kind_of(spec, self.vocab, tokens)
        self._bytes, self._drops_space = bytes_of_tokens(spec, self.vocab)
        for t in tokens:  # one that is found in normalized text decodes to what is found
            normalizer = t.get("normalized") and spec.get("normalizer") and self._library.normalizer
            text = normalizer.normalize_str(t["content"]).replace("▁", " ") if normalizer else t["content"]
            self._bytes[t["id"]] = text.encode()
        self._plain = {i: piece for i, piece in self._bytes.items() if i not in self.special.values()}
        self._read_settings()

    def _read_settings(self):
        """BOS, EOS, stop tokens and chat templates."""
        self._named = named_tokens(self.settings)
        before, after = ends_of(self.spec)  # which every text gets, even if nobody names them
        self.bos_id, self.eos_id = (self.ids.get(self._named.get(key), ends[0] if ends else None)
                                    for key, ends in (("bos_token", before), ("eos_token", after)))
        self.adds_bos, self.adds_eos = before == [self.bos_id], after == [self.eos_id]
        if len(before) > self.adds_bos or len(after) > self.adds_eos:
            raise ValueError(f"it puts the tokens {before} and {after} around a text, where BOS is {self.bos_id} and "
                             f"EOS {self.eos_id}")
        usual = [i for text, i in self.special.items() if text in STOP_NAMES]
        self.stop_ids = {*self.settings.get("stop_ids", usual), self.eos_id} - {None}
        template = self.settings.get("chat_template") or []
        self.chat_template = ({"default": template} if isinstance(template, str) else
                              template if isinstance(template, dict) else {t["name"]: t["template"] for t in template})

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

    # -- encoding ----------------------------------------------------------------------------------------------------

    @functools.cached_property
    def _library(self):
        """The tokenizer that the `tokenizers` library makes of the spec."""
        import tokenizers
        with tokenizer_files.one_line():
            library = tokenizers.Tokenizer.from_str(json.dumps(self.spec))
        for text, i in self.added.items():
            if library.token_to_id(text) != i:
                raise config.Mistake(f"its token {text!r} should have the id {i}, but the ids before it have holes: "
                                     f"AutoTokenizer gives it {library.token_to_id(text)}")
        return library

    @functools.cached_property
    def _tiktoken(self):
        import tiktoken
        ranks = {piece: i for i, piece in self._plain.items()}
        return tiktoken.Encoding("everyllama", pat_str=self._words, mergeable_ranks=ranks, special_tokens={})

    @functools.cached_property
    def _never_text(self):
        """The special tokens that are pieces of the vocabulary too, but for the unknown one: no text may become one."""
        model = self.spec["model"]
        unknown = {self.vocab.get(model.get("unk_token")), model.get("unk_id")}
        return {self.vocab[t] for t in self.special if t in self.vocab} - unknown

    def _run(self, texts, special=False):
        """Ids of each text by the library. special: take the names of special tokens for those tokens."""
        self._library.encode_special_tokens = not special or self.settings.get("split_special_tokens", False)
        with config.mistakes(Exception, prefix="this tokenizer cannot encode that: "):
            batch = [e.ids for e in self._library.encode_batch_fast(texts, add_special_tokens=False)]
        if not special and not all(self._never_text.isdisjoint(ids) for ids in batch):
            raise config.Mistake("this tokenizer makes special tokens of a plain text that spells their names")
        return batch

    def _encode(self, texts):
        """Ids of each text, names of special tokens being plain text, by the fastest way, on all cores, or on one where
        the environment says TOKENIZERS_PARALLELISM=false."""
        if self.kind == "byte":
            return [list(t.encode()) for t in texts]
        if self.kind == "char":
            try:
                return [[self.vocab[c] for c in t] for t in texts]
            except KeyError as e:
                raise config.Mistake(f"the character {e.args[0]!r} is not among the {len(self._plain)} of this "
                                     "vocabulary") from None
        if self.kind == "tiktoken" and max(map(len, texts), default=0) <= TIKTOKEN_LIMIT:
            threads = 1 if os.environ.get("TOKENIZERS_PARALLELISM") == "false" else os.cpu_count()
            return self._tiktoken.encode_ordinary_batch(texts, num_threads=threads)
        return self._run(texts)

    def encode_batch(self, texts, bos=False, eos=False, special=False):
        """Ids of many texts at once: list[str] -> list[list[int]]. bos, eos: put that token around each text, if there
        is one. special: take the names of special tokens in the texts for those tokens, as AutoTokenizer does, and not
        for plain text. A char tokenizer raises `config.Mistake` at a character that it does not have."""
        texts = [valid(t) for t in texts]
        batch = self._run(texts, special=True) if special else self._encode(texts)
        before = [self.bos_id] if bos and self.bos_id is not None else []
        after = [self.eos_id] if eos and self.eos_id is not None else []
        return [before + ids + after for ids in batch] if before or after else batch

    def encode(self, text, bos=False, eos=False, special=False):
        """Ids of one text, as in `encode_batch`."""
        return self.encode_batch([text], bos, eos, special)[0]

    # -- decoding ----------------------------------------------------------------------------------------------------

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

    # -- this tokenizer as another one, and as files -------------------------------------------------------------

    def adding_bos(self):
        """This tokenizer with its BOS, if any, in front of a text by default: saved beside a model, it then treats
        prompts as the training data were treated."""
        texts = {i: text for text, i in self.ids.items()}
        ends = around(self.ids, texts.get(self.bos_id), texts[self.eos_id] if self.adds_eos else None)
        return Tokenizer(self.spec | {"post_processor": ends}, self.settings, self.model)

    def save(self, directory):
        """Write tokenizer.json, tokenizer_config.json and, if it came from SentencePiece, tokenizer.model."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        files = {"tokenizer.model": self.model} if self.model else {}
        files |= {"tokenizer_config.json": json.dumps(self.settings, indent=2).encode(),
                  "tokenizer.json": json.dumps(self.spec).encode()}
        for name, data in files.items():
            with config.atomic_write(directory / name) as tmp:
                tmp.write_bytes(data)


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


# -- making one --------------------------------------------------------------------------------------------------

def char(text, special=()):
    """One token for each character that text has, then the special tokens, of which the first (say "<s>") begins a
    document and the last ends it; without any there is neither BOS nor EOS."""
    if not text:
        raise config.Mistake("a character tokenizer needs a text to take its characters from")
    vocab = {c: i for i, c in enumerate(sorted(set(text)))}
    special = {t: len(vocab) + i for i, t in enumerate(special)}
    bos, eos = [*special, None][0], [None, *special][-1]
    model = {"type": "WordLevel", "vocab": vocab | special, "unk_token": "<unk>"}
    spec = make_spec(model, special, split(CHARACTERS), {"type": "Fuse"}, bos=bos)
    return Tokenizer(spec, {"bos_token": bos, "eos_token": eos})


def byte():
    """The 256 bytes, each its own id, then BOS <s> and EOS </s>."""
    step = byte_level(False)
    spec = make_spec(bpe(CHAR_TO_BYTE, []), {"<s>": 256, "</s>": 257}, step, step, bos="<s>")
    return Tokenizer(spec, {"bos_token": "<s>", "eos_token": "</s>"})


def sentences(texts):
    """The lines of texts, so that SentencePiece drops none of them."""
    return (line[0] for text in texts for line in LINE.finditer(valid(text)))


def train_sentencepiece(texts, vocab_size, added=0):
    """A SentencePiece BPE of exactly vocab_size tokens, less those that are `added` to it, trained on the lines of
    texts (an iterable of str), always the same. Its settings are Llama 2's (digits apart, byte fallback, no
    normalisation), but no space is put in front of a text. Where the texts have too few words for so many tokens, the
    last ones are never used."""
    import sentencepiece
    trained, count = io.BytesIO(), vocab_size - added
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences(texts), model_writer=trained, model_type="bpe", vocab_size=count,
            hard_vocab_limit=False, byte_fallback=True, split_digits=True, allow_whitespace_only_pieces=True,
            normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False,
            max_sentence_length=1 << 20, num_threads=1, minloglevel=2)
    except RuntimeError as e:
        least = re.search(r"required_chars\. \d+ vs (\d+)", str(e))
        reason = ("there is no text to train on" if "sentences_.empty()" in str(e) else
                  f"smaller than its characters need: --vocab_size={int(least[1]) + added} at least" if least else
                  "give a larger --vocab_size")
        raise config.Mistake(f"cannot train a vocabulary of {vocab_size} tokens: {reason}") from e
    proto = tokenizer_files.parse_sentencepiece(trained.getvalue())
    if len(proto.pieces) < count:
        print(f"only {len(proto.pieces):,} of {count:,} tokens were found; the others are never used")
    for i in range(count - len(proto.pieces)):
        proto.pieces.add(piece=f"<unused_{i}>", type=tokenizer_files.UNUSED)
    data = proto.SerializeToString()
    return Tokenizer(*tokenizer_files.lone_sentencepiece(data), data)


def load(path):
    """Tokenizer from a file or folder: tokenizer.json, a SentencePiece or Llama tokenizer.model, or GPT-2's two files.
    What cannot be read, or would get other ids here (see prepare/tokenizer_files.py), raises `config.Mistake`."""
    path, is_folder = Path(path), Path(path).is_dir()
    if is_folder:
        names = ("tokenizer.json", "tokenizer.model", *(first for first, _ in tokenizer_files.PAIRS))
        path = next((path / n for n in names if (path / n).is_file()), path)
    if not path.is_file():
        raise config.Mistake(f"{path}: there is no tokenizer (tokenizer.json, tokenizer.model, or encoder.json and "
                             "vocab.bpe)")
    in_folder = is_folder or path.name == "tokenizer.json" or path.name == "tokenizer.model" and any(
        path.with_name(name).is_file() for name in SIDE_FILES)
    model = path.with_name("tokenizer.model") if path.name == "tokenizer.json" else path
    wrong = (ValueError, TypeError, AttributeError, IndexError, RecursionError, OSError, config.Mistake)
    with config.mistakes(*wrong, prefix=f"{path} is no tokenizer that can be used: "), \
            config.mistakes(KeyError, prefix="it lacks "):
        spec, settings = tokenizer_files.read(path, in_folder)
        is_sentencepiece = spec["model"].get("byte_fallback") and model.is_file()
        tok = Tokenizer(spec, settings, model.read_bytes() if is_sentencepiece else None)
        tok.encode_batch([])  # an engine that cannot be built says so now
    return tok
