"""A folder of a tokenizer means what AutoTokenizer makes of it: ids, BOS and EOS, added tokens, side files, chats."""
import functools
import io
import json
import os
import shutil
from datetime import date
from pathlib import Path

import pytest
from conftest import ROOT

import config
from prepare import tokenizer, tokenizer_files

REAL_DATA = Path(os.environ.get("EVERYLLAMA_DATA", ROOT.parent / "shared/data"))
SOURCE = (ROOT / "model.py").read_text(encoding="utf-8")[:60_000]
TEXTS = [
    "", " ", "a", "  two  spaces", " trail ", "\n\n \n", "\ttab\r\n", "x" + " " * 40 + "y", "naïve café e\u0301", "你好，世界 🙂",
    "it's IT'S 1234567 ３.14 ٣", "\u2581 low \u2581\u2581line", "<0x41><0xE2>", "<s>a</s> b <unk>", "a <s> b</s>  c",
    "<|im_start|>user\n hi<|im_end|>", "x <tool> y<tool>z", "Tool <TOOL> tool", "a <strip>  b", "un<word>ded <word>, a<word> <word>b",
    "def f(x):\n    return x  # self.<|endoftext|>", "\x00\x7f\ufeff\u200b", "the <ent>\nthe <pad>", "[INST] hi [/INST] ok</s>"]
CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}"
          "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
INST = ("{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content | trim + ' [/INST]' }}"
        "{% elif m.role == 'assistant' %}{% generation %}{{ ' ' + m.content + ' ' }}{{ eos_token }}{% endgeneration %}"
        "{% else %}{% continue %}{% endif %}{% endfor %}")


def sentencepiece_model(**options):
    """A small SentencePiece model, as bytes, made as Llama 2's was."""
    import sentencepiece
    out = io.BytesIO()
    options = {"vocab_size": 500, "model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity",
               "remove_extra_whitespaces": False, "split_digits": True, "allow_whitespace_only_pieces": True} | options
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(SOURCE.split("\n")), model_writer=out, minloglevel=2, **options)
    return out.getvalue()


def byte_level_json(special=("<|endoftext|>", "<|im_start|>", "<|im_end|>"), cut=None):
    """A tokenizer.json of SmolLM2's form, made by the tokenizers library."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence([cut or pre_tokenizers.Digits(individual_digits=True),
                                                  pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=cut is None)])
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator([SOURCE], trainers.BpeTrainer(
        vocab_size=600, special_tokens=list(special), show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return json.loads(made.to_str())


def low_line_json(**parts):
    """A tokenizer.json of the form that Llama 2 has on the hub, with other parts in place of its own."""
    spec, _ = tokenizer_files.lone_sentencepiece(sentencepiece_model())
    names = {t["content"] for t in spec["added_tokens"]}

    def low(piece):
        return piece if piece in names else piece.replace(" ", "\u2581")
    model = spec["model"]
    model |= {"vocab": {low(p): i for p, i in model["vocab"].items()}, "merges": [[low(a), low(b)] for a, b in model["merges"]]}
    spec["normalizer"] = {"type": "Sequence", "normalizers": [
        {"type": "Prepend", "prepend": "\u2581"}, {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}]}
    spec["decoder"]["decoders"].insert(0, {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "})
    return spec | parts


def trained_json(kind):
    """A tokenizer.json of another model than BPE."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    if kind == "unigram":
        made, trainer = Tokenizer(models.Unigram()), trainers.UnigramTrainer(
            vocab_size=400, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False)
        made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    else:
        made, trainer = Tokenizer(models.WordLevel(unk_token="<unk>")), trainers.WordLevelTrainer(
            vocab_size=400, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
        made.pre_tokenizer, made.decoder = pre_tokenizers.WhitespaceSplit(), decoders.Fuse()
    made.train_from_iterator(SOURCE.split("\n"), trainer)
    return json.loads(made.to_str())


def with_normalizer(*normalizers):
    return byte_level_json() | {"normalizer": {"type": "Sequence", "normalizers": list(normalizers)}}


def metaspace(scheme, split):
    return {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": scheme, "split": split}


@functools.cache
def vocabularies():
    """{name: {file: content}}: the files that hold a vocabulary."""
    from tokenizers import Regex, pre_tokenizers
    byte_level, low = byte_level_json(), low_line_json()
    pairs = byte_level["model"]
    merges = "#version: 0.2\n" + "\n".join(" ".join(pair) for pair in pairs["merges"])
    no_prefix = low_line_json(normalizer=None, pre_tokenizer=metaspace("never", False))
    holes = byte_level_json()
    holes["model"]["vocab"] = {p: i + 5 * (i > 300) for p, i in holes["model"]["vocab"].items()}
    bare_added = low_line_json()
    bare_added["added_tokens"] = []
    specs = {
        "byte level": byte_level, "low lines": low, "holes": holes, "no added tokens": bare_added,
        "metaspace first": low_line_json(normalizer=None, pre_tokenizer=metaspace("first", False)),
        "metaspace always": low_line_json(normalizer=None, pre_tokenizer=metaspace("always", True)),
        "no prefix": no_prefix, "BOS by template": low | {"post_processor": tokenizer_files.around({"<s>": 1, "</s>": 2}, "<s>")},
        "both by template": low | {"post_processor": tokenizer_files.around({"<s>": 1, "</s>": 2}, "<s>", "</s>")},
        "llama 3's words": byte_level_json(cut=pre_tokenizers.Split(Regex(tokenizer_files.LLAMA3_WORDS), "isolated")),
        "NFC": with_normalizer({"type": "NFC"}), "lower case": with_normalizer({"type": "Lowercase"}),
        "replaced": with_normalizer({"type": "Prepend", "prepend": "_"}, {"type": "Replace", "pattern": {"String": "a"}, "content": "b"}),
        "unigram": trained_json("unigram"), "word level": trained_json("word level")}
    return {name: {"tokenizer.json": spec} for name, spec in specs.items()} | {
        "sentencepiece": {"tokenizer.model": sentencepiece_model()},
        "sentencepiece, symbols": {"tokenizer.model": sentencepiece_model(
            user_defined_symbols=["<tool>", "    "], control_symbols=["[INST]", "[/INST]"])},
        "sentencepiece, no prefix": {"tokenizer.model": sentencepiece_model(add_dummy_prefix=False, user_defined_symbols=["<tool>"])},
        "two files": {"vocab.json": pairs["vocab"], "merges.txt": merges}}


def token(content, **flags):
    return {"content": content, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False,
            "special": True} | flags


LLAMA, PLAIN, GPT2 = ({"tokenizer_class": name} for name in ("LlamaTokenizer", "PreTrainedTokenizerFast", "GPT2Tokenizer"))
SIZES = {"sentencepiece": 500, "low lines": 500, "byte level": 600}
MORE = {"strip": token("<strip>", rstrip=True, lstrip=True), "word": token("<word>", single_word=True, special=False, normalized=True),
        "tool": token("<TOOL>", special=False, normalized=True)}


def sides(size):
    """{name: {side file: content}} for a vocabulary of so many tokens."""
    declared = {str(size + i): t for i, t in enumerate([token("<|im_start|>"), token("<|im_end|>"), *MORE.values()])}
    added = {"<|im_start|>": size, "<|im_end|>": size + 1, "<tool>": size + 2}
    made = {"nothing": {}, "a class": {"tokenizer_config.json": {}},
            "config.json": {"config.json": {"model_type": "llama"}, "tokenizer_config.json": {}},
            "added_tokens.json": {"added_tokens.json": added, "tokenizer_config.json": {"eos_token": "<|im_end|>"}},
            "added_tokens.json alone": {"added_tokens.json": added},
            "special_tokens_map.json": {"special_tokens_map.json": {
                "bos_token": token("<s>"), "eos_token": token("<|im_end|>", rstrip=True), "pad_token": "<pad>",
                "additional_special_tokens": ["<ent>", "<tool>"]}, "tokenizer_config.json": {}},
            "map and added": {"special_tokens_map.json": {"eos_token": "<|im_end|>", "extra_special_tokens": ["<|im_start|>"]},
                              "added_tokens.json": added, "tokenizer_config.json": {"extra_special_tokens": ["<ent>"]}},
            "declared": {"tokenizer_config.json": {"added_tokens_decoder": declared, "eos_token": "<|im_end|>"}},
            "declared, first ones too": {"tokenizer_config.json": {
                "added_tokens_decoder": {"0": token("<unk>", normalized=True), "1": token("<s>"), "2": token("</s>")},
                "pad_token": "</s>", "additional_special_tokens": ["<ent>"]}},
            "extra": {"tokenizer_config.json": {"extra_special_tokens": ["<ent>", "<strip>"], "pad_token": "<pad>"}},
            "named of its own": {"tokenizer_config.json": {"extra_special_tokens": {"tool_token": "<tool>"}, "image_token": "<ent>"}},
            "empty list": {"tokenizer_config.json": {"additional_special_tokens": []}},
            "no BOS": {"tokenizer_config.json": {"bos_token": None, "add_bos_token": True}},
            "nulls": {"tokenizer_config.json": {"bos_token": None, "eos_token": None, "unk_token": None, "pad_token": None}},
            "typed": {"tokenizer_config.json": {"bos_token": token("<s>") | {"__type": "AddedToken"},
                                                "eos_token": token("<tool>", lstrip=True) | {"__type": "AddedToken"}}}}
    for bos in True, False:
        for eos in True, False:
            made[f"BOS {bos}, EOS {eos}"] = {"tokenizer_config.json": {"add_bos_token": bos, "add_eos_token": eos}}
    for key in "legacy", "add_prefix_space":
        for value in True, False, None:
            made[f"{key} {value}"] = {"tokenizer_config.json": {key: value}}
    made["split_special_tokens"] = {"tokenizer_config.json": {"split_special_tokens": True}}
    return made


def write(folder, *files):
    folder.mkdir(exist_ok=True)
    for name, value in (item for part in files for item in part.items()):
        (folder / name).parent.mkdir(exist_ok=True)
        data = value if isinstance(value, bytes) else (value if isinstance(value, str) else json.dumps(value)).encode()
        (folder / name).write_bytes(data)
    return folder


def assert_same(ours, theirs, by_usual_names, texts=TEXTS):
    """The same ids of every text, alone and as transformers gives them by default, the same special and added tokens."""
    assert [ours.encode(x, special=True) for x in texts] == theirs(texts, add_special_tokens=False)["input_ids"]
    assert [ours.encode(x, ours.adds_bos, ours.adds_eos, special=True) for x in texts] == theirs(texts)["input_ids"]
    for mine, their, always in (ours.bos_id, theirs.bos_token_id, ours.adds_bos), (ours.eos_id, theirs.eos_token_id, ours.adds_eos):
        assert mine == their or their is None and (always or by_usual_names)  # what every text gets needs no name
    assert ours.added == theirs.get_added_vocab()
    assert ours.special == {t.content: i for i, t in theirs.added_tokens_decoder.items() if t.special}
    assert ours.ids == theirs.get_vocab()


def cases():
    """(vocabulary, class, side files): each vocabulary with each class, the three chief ones with all side files."""
    for name in vocabularies():
        classes = [LLAMA, PLAIN, {}] + [GPT2] * (name in ("byte level", "two files"))
        for family in classes:
            if name == "two files" and family != GPT2:
                continue
            for side in sides(SIZES.get(name, 0)) if name in SIZES or name == "sentencepiece, symbols" else ("nothing", "a class"):
                if side == "nothing" and family:
                    continue
                if name == "sentencepiece, symbols" and "added" in side + "declared":
                    continue
                yield pytest.param(name, family, side, id=f"{name}-{family.get('tokenizer_class')}-{side}")
