"""A folder of a tokenizer means what AutoTokenizer makes of it: ids, BOS and EOS, added tokens, side files, chats."""
import functools
import io
import itertools
import json
import random
import sys
from collections import Counter

import pytest
from conftest import ROOT, need_transformers_5_24, real_data

import config
from prepare import tokenizer, tokenizer_files, tokenizer_spec
from prepare.tokenizer_spec import STRIP

SOURCE = "".join((ROOT / file).read_text(encoding="utf-8") for file in ("model.py", "train.py"))[:60_000]
TEXTS = [
    "", " ", "a", "  two  spaces", " trail ", "\n\n \n", "\ttab\r\n", "x" + " " * 40 + "y", "naïve café e\u0301",
    "你好，世界 🙂", "it's IT'S 1234567 ３.14 ٣", "\u2581 low \u2581\u2581line", "<0x41><0xE2>",
    "<s>a</s> b <unk>", "a <s> b</s>  c", "<|im_start|>user\n hi<|im_end|>", "x <tool> y<tool>z", "Tool <TOOL> tool",
    "a <strip>  b", "un<word>ded <word>, a<word> <word>b", "def f(x):\n    return x  # self.<|endoftext|>",
    "\x00\x7f\ufeff\u200b", "the <ent>\nthe <pad>", "[INST] hi [/INST] ok</s>"]
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
               "remove_extra_whitespaces": False, "split_digits": True,
               "allow_whitespace_only_pieces": True} | options
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(SOURCE.split("\n")), model_writer=out,
                                             minloglevel=2, **options)
    return out.getvalue()


def byte_level_json(special=("<|endoftext|>", "<|im_start|>", "<|im_end|>"), cut=None):
    """A tokenizer.json of SmolLM2's form, made by the tokenizers library."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence([
        cut or pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=cut is None)])
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator([SOURCE], trainers.BpeTrainer(
        vocab_size=600, special_tokens=list(special), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return json.loads(made.to_str())


def replace(old, new):
    """The step, of normalizing and of decoding, that replaces {"String": text}."""
    return {"type": "Replace", "pattern": old, "content": new}


def low_line_json(**parts):
    """A tokenizer.json of the form that Llama 2 has on the hub, with other parts in place of its own."""
    spec, _ = tokenizer_files.lone_sentencepiece(sentencepiece_model())
    names = {t["content"] for t in spec["added_tokens"]}

    def low(piece):
        return piece if piece in names else piece.replace(" ", "\u2581")
    model = spec["model"]
    model["vocab"] = {low(piece): i for piece, i in model["vocab"].items()}
    model["merges"] = [[low(left), low(right)] for left, right in model["merges"]]
    spec["normalizer"] = {"type": "Sequence", "normalizers": [
        {"type": "Prepend", "prepend": "\u2581"}, replace({"String": " "}, "\u2581")]}
    spec["decoder"]["decoders"].insert(0, replace({"String": "\u2581"}, " "))
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
    as_text = low_line_json()
    as_text["model"]["merges"] = [" ".join(pair) for pair in as_text["model"]["merges"]]
    bare_added, ends = low_line_json(), {"<s>": 1, "</s>": 2}
    bare_added["added_tokens"] = []
    specs = {
        "byte level": byte_level, "low lines": low, "merges as text": as_text, "holes": holes,
        "no added tokens": bare_added,
        "metaspace first": low_line_json(normalizer=None, pre_tokenizer=metaspace("first", False)),
        "metaspace always": low_line_json(normalizer=None, pre_tokenizer=metaspace("always", True)),
        "no prefix": no_prefix, "BOS by template": low | {"post_processor": tokenizer_spec.around(ends, "<s>")},
        "both by template": low | {"post_processor": tokenizer_spec.around(ends, "<s>", "</s>")},
        "llama 3's words": byte_level_json(cut=pre_tokenizers.Split(Regex(tokenizer_spec.LLAMA3_WORDS), "isolated")),
        "NFC": with_normalizer({"type": "NFC"}), "lower case": with_normalizer({"type": "Lowercase"}),
        "replaced": with_normalizer({"type": "Prepend", "prepend": "_"}, replace({"String": "a"}, "b")),
        "unigram": trained_json("unigram"), "word level": trained_json("word level")}
    return {name: {"tokenizer.json": spec} for name, spec in specs.items()} | {
        "sentencepiece": {"tokenizer.model": sentencepiece_model()},
        "sentencepiece, symbols": {"tokenizer.model": sentencepiece_model(
            user_defined_symbols=["<tool>", "    "], control_symbols=["[INST]", "[/INST]"])},
        "sentencepiece, no prefix": {"tokenizer.model": sentencepiece_model(
            add_dummy_prefix=False, user_defined_symbols=["<tool>"])},
        "sentencepiece, no bytes": {"tokenizer.model": sentencepiece_model(byte_fallback=False)},
        "two files": {"vocab.json": pairs["vocab"], "merges.txt": merges}}


def token(content, **flags):
    return {"content": content, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False,
            "special": True} | flags


LLAMA, PLAIN, GPT2 = ({"tokenizer_class": name}
                      for name in ("LlamaTokenizer", "PreTrainedTokenizerFast", "GPT2Tokenizer"))
SIZES = {"sentencepiece": 500, "low lines": 500, "byte level": 600}
MORE = [token("<strip>", rstrip=True, lstrip=True), token("<word>", single_word=True, special=False, normalized=True),
        token("<TOOL>", special=False, normalized=True)]


def sides(size):
    """{name: {side file: content}} for a vocabulary of so many tokens."""
    declared = {str(size + i): t for i, t in enumerate([token("<|im_start|>"), token("<|im_end|>"), *MORE])}
    added = {"<|im_start|>": size, "<|im_end|>": size + 1, "<tool>": size + 2}
    made = {"nothing": {}, "a class": {"tokenizer_config.json": {}},
            **{model: {"config.json": {"model_type": model}, "tokenizer_config.json": {}}
               for model in ("llama", "llama4", "mistral", "mixtral", "llava", "gpt2")},
            "added_tokens.json": {"added_tokens.json": added, "tokenizer_config.json": {"eos_token": "<|im_end|>"}},
            "added_tokens.json alone": {"added_tokens.json": added},
            "special_tokens_map.json": {"special_tokens_map.json": {
                "bos_token": token("<s>"), "eos_token": token("<|im_end|>", rstrip=True), "pad_token": "<pad>",
                "additional_special_tokens": ["<ent>", "<tool>"]}, "tokenizer_config.json": {}},
            "map and added": {"special_tokens_map.json": {"eos_token": "<|im_end|>",
                                                          "extra_special_tokens": ["<|im_start|>"]},
                              "added_tokens.json": added, "tokenizer_config.json": {"extra_special_tokens": ["<ent>"]}},
            "declared": {"tokenizer_config.json": {"added_tokens_decoder": declared, "eos_token": "<|im_end|>"}},
            "declared, first ones too": {"tokenizer_config.json": {
                "added_tokens_decoder": {"0": token("<unk>", normalized=True), "1": token("<s>"), "2": token("</s>")},
                "pad_token": "</s>", "additional_special_tokens": ["<ent>"]}},
            "extra": {"tokenizer_config.json": {"extra_special_tokens": ["<ent>", "<strip>"], "pad_token": "<pad>"}},
            "named of its own": {"tokenizer_config.json": {"extra_special_tokens": {"tool_token": "<tool>"},
                                                           "image_token": "<ent>"}},
            "empty list": {"tokenizer_config.json": {"additional_special_tokens": []}},
            "no BOS": {"tokenizer_config.json": {"bos_token": None, "add_bos_token": True}},
            "nulls": {"tokenizer_config.json": dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"))},
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
    """The same ids of each text, alone and with what goes around it by default; the same special and added tokens."""
    assert [ours.encode(x, special=True) for x in texts] == theirs(texts, add_special_tokens=False)["input_ids"]
    assert [ours.encode(x, ours.adds_bos, ours.adds_eos, special=True) for x in texts] == theirs(texts)["input_ids"]
    for mine, their, always in ((ours.bos_id, theirs.bos_token_id, ours.adds_bos),
                                (ours.eos_id, theirs.eos_token_id, ours.adds_eos)):
        assert mine == their or their is None and (always or by_usual_names)  # what every text gets needs no name
    assert ours.added == theirs.get_added_vocab()
    assert ours.special == {t.content: i for i, t in theirs.added_tokens_decoder.items() if t.special}
    assert ours.ids == theirs.get_vocab()
    for ids in theirs(texts)["input_ids"]:
        assert ours.decode(ids, special=True) == theirs.decode(ids)
        if not any(t.special and t.normalized for t in theirs.added_tokens_decoder.values()):  # those it does not skip
            assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def cases():
    """(vocabulary, class, name of the side files): chief vocabularies with all side files, the others with few."""
    for name in vocabularies():
        chief = name in ("sentencepiece", "sentencepiece, symbols", "low lines", "byte level")
        for family in (LLAMA, PLAIN, {}, GPT2):
            if (family == GPT2) != (name == "two files") and not (family == GPT2 and name == "byte level"):
                continue
            for side in sides(0) if chief else ("nothing", "a class"):
                if not (side == "nothing" and family or side == "gpt2" and name != "byte level"):
                    yield name, family, side


def made(folder, name, family, side):
    """The folder, with these files written into it."""
    files = dict(sides(SIZES.get(name, 500))[side])
    if family:
        files["tokenizer_config.json"] = files.get("tokenizer_config.json", {}) | family
    return write(folder, vocabularies()[name], files)


def why_refused(folder, theirs):
    """What the one line says of a folder that is refused, or None."""
    settings, older = ({} if not (folder / file).exists() else json.loads((folder / file).read_text())
                       for file in ("tokenizer_config.json", "added_tokens.json"))
    declared = {t["content"]: int(i) for i, t in settings.get("added_tokens_decoder", {}).items()} or older
    at_odds = any(theirs.convert_tokens_to_ids(text) != i for text, i in declared.items())
    return "but AutoTokenizer gives it" if at_odds else None


CHIEF = ("byte level", "low lines", "sentencepiece", "sentencepiece, symbols")


@pytest.mark.parametrize("name", [*CHIEF, "the others"])
def test_a_folder_means_what_autotokenizer_makes_of_it(name, tmp_path):
    need_transformers_5_24()
    from transformers import AutoTokenizer
    chosen = [case for case in cases() if case[0] == name or name == "the others" and case[0] not in CHIEF]
    compared = 0
    for n, case in enumerate(chosen):
        if case == ("byte level", GPT2, "add_prefix_space None"):
            continue  # transformers raises a TypeError
        folder, saved = made(tmp_path / str(n), *case), tmp_path / f"{n} saved"
        theirs = AutoTokenizer.from_pretrained(folder)
        if why := why_refused(folder, theirs):
            with pytest.raises(config.Mistake, match=why) as e:
                tokenizer.load(folder)
            assert "\n" not in str(e.value)
            continue
        ours, compared = tokenizer.load(folder), compared + 1
        ours.save(saved)
        try:
            assert_same(ours, theirs, by_usual_names=case[2] == "nothing")
            assert_same(ours, AutoTokenizer.from_pretrained(saved), by_usual_names=True)
        except AssertionError as e:
            raise AssertionError(f"{case}: {e}") from None
        again = tokenizer.load(saved)
        assert (again.spec, again.settings, again.model) == (ours.spec, ours.settings, ours.model)
        assert again.fingerprint == ours.fingerprint
    assert compared > 30


# ---- the files as published, with what others put beside them ---------------------------------------------------


def real(folder, names, *sides):
    """A folder with files of data/tokenizers, {name in the folder: name there}, and side files."""
    paths = {name: real_data(f"tokenizers/{there}") for name, there in names.items()}
    return write(folder, {name: path.read_bytes() for name, path in paths.items()}, *sides)


LLAMA2, LLAMA3, MISTRAL = ({"tokenizer.model": f"{name}.model"}
                           for name in ("llama2_tokenizer", "llama3_tokenizer", "mistral_v3_32768"))
GPT2_FILES = {"vocab.json": "gpt2_encoder.json", "merges.txt": "gpt2_vocab.bpe"}
CHAT_TOKENS = {"<|im_start|>": 32000, "<|im_end|>": 32001}


def llama3_settings():
    names = enumerate(tokenizer_files.RANK_FILES[128_000][1], 128_000)
    return {"added_tokens_decoder": {str(i): token(name) for i, name in names}, "bos_token": "<|begin_of_text|>",
            "eos_token": "<|eot_id|>", "add_bos_token": True}


@pytest.mark.parametrize("names, settings, added", [
    (LLAMA2, None, None), (LLAMA2, LLAMA | {"eos_token": "<|im_end|>", "add_bos_token": True}, CHAT_TOKENS),
    (LLAMA2, PLAIN | {"eos_token": "<|im_end|>"}, CHAT_TOKENS), (MISTRAL, None, None),
    (LLAMA3, llama3_settings(), None),
    (GPT2_FILES, GPT2 | {"add_bos_token": True, "pad_token": "<pad>"}, None)])
def test_published_files_mean_what_autotokenizer_makes_of_them(names, settings, added, tmp_path):
    need_transformers_5_24()
    from transformers import AutoTokenizer
    sides = {"tokenizer_config.json": settings, "added_tokens.json": added}
    folder = real(tmp_path / "a", names, {name: value for name, value in sides.items() if value is not None})
    ours = tokenizer.load(folder)
    assert_same(ours, AutoTokenizer.from_pretrained(folder), by_usual_names=False)
    if added:
        assert ours.eos_id in ours.stop_ids and ours.eos_id == 32001 and ours.vocab_size == 32002


def test_a_rank_file_knows_its_special_tokens_and_no_others(tmp_path):
    bare = tokenizer.load(real(tmp_path / "a", LLAMA3))
    assert (bare.bos_id, bare.adds_bos, bare.vocab_size) == (128_000, True, 128_256)  # as Meta's own code
    for settings, why in (PLAIN | {"pad_token": "<pad>"}, "'<pad>' is no special"), (LLAMA, "does not read"):
        folder = real(tmp_path / "b", LLAMA3, {"tokenizer_config.json": settings})
        with pytest.raises(config.Mistake, match=why):
            tokenizer.load(folder)


def earlier_folder(folder):
    """A folder as the first version of this project saved a SentencePiece model with a symbol of its user's."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "<tool>", " a", "b", "ab", " ab", " ", "a"]
    merges = [[" ", "a"], ["a", "b"], [" ", "ab"], [" a", "b"]]
    spec = tokenizer_spec.make_spec(
        tokenizer_spec.bpe({piece: i for i, piece in enumerate(pieces)}, merges, unk_token="<unk>", fuse_unk=True,
                            byte_fallback=True), {"<unk>": 0, "<s>": 1, "</s>": 2}, None,
        {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}, tokenizer_spec.STRIP]},
        {"type": "Prepend", "prepend": " "}, "<s>") | {"truncation": None, "padding": None}
    spec["added_tokens"].append(tokenizer_spec.added_token("<tool>", 259, False, normalized=False))
    return write(folder, {"tokenizer.json": spec, "tokenizer_config.json": PLAIN | {
        "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_prefix_space": True,
        "clean_up_tokenization_spaces": False}})


def test_what_an_earlier_version_saved_opens_as_it_was(tmp_path):
    """Fingerprints and ids as commit 39000c7 gave them: data sets and runs made by it stay of use."""
    found = tokenizer.load(earlier_folder(tmp_path / "a"))
    assert found.fingerprint == "59c8eaf3c98ade649b940a2bddc7f92e3f64f635d292f317fdf2004e8638b579"
    assert found.encode("ab  <tool>a\u2581é<s>", bos=True) == [
        1, 263, 264, 264, 259, 260, 229, 153, 132, 198, 172, 63, 118, 65]
    assert (found.bos_id, found.eos_id, found.stop_ids, found.adds_bos) == (1, 2, {2}, True)
    assert found.kind == "sentencepiece"
    assert tokenizer.byte().fingerprint.startswith("ddfe1053810d43e5")
    assert tokenizer.char("hello\n", ["<s>", "</s>"]).fingerprint.startswith("c7868358188befd0")


@pytest.mark.parametrize("vocabulary, file, name", [
    ("byte level", "tokenizer_config.json", "Qwen2Tokenizer"), ("low lines", "config.json", "CodeLlamaTokenizer")])
def test_classes_of_others_are_followed(vocabulary, file, name, tmp_path):
    from transformers import AutoTokenizer
    folder = write(tmp_path / "a", vocabularies()[vocabulary], {file: {"tokenizer_class": name}})
    ours, theirs = tokenizer.load(folder), AutoTokenizer.from_pretrained(folder)
    assert [ours.encode(x, special=True) for x in TEXTS] == theirs(TEXTS, add_special_tokens=False)["input_ids"]
    assert (ours.bos_id, ours.eos_id, ours.ids) == (theirs.bos_token_id, theirs.eos_token_id, theirs.get_vocab())


def test_transformers_is_asked_for_where_a_folder_needs_it(tmp_path, monkeypatch):
    folder = write(tmp_path / "a", vocabularies()["byte level"], {"tokenizer_config.json": LLAMA})
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(config.Mistake, match="pip install transformers"):
        tokenizer.load(folder)
    write(folder, {"tokenizer_config.json": PLAIN})
    assert tokenizer.load(folder).encode("the")


# ---- stop tokens, and one line where something cannot be ----------------------------------------------------------


@pytest.mark.parametrize("stops, expected", [(None, {0, 2}), (1, {1, 2}), ([0, 1], {0, 1, 2}), ([], {2})])
def test_stop_tokens_are_those_of_generation_config(stops, expected, tmp_path):
    """Without it: EOS and the special tokens of the usual names. They go where the tokenizer goes."""
    settings = PLAIN | {"eos_token": "<|im_end|>"}
    folder = write(tmp_path / "a", vocabularies()["byte level"], {"tokenizer_config.json": settings},
                   {"generation_config.json": {"eos_token_id": stops}})
    found = tokenizer.load(folder)
    found.save(tmp_path / "saved")
    for t in found, tokenizer.load(tmp_path / "saved"), tokenizer.Tokenizer(found.spec, found.settings):
        assert t.stop_ids == expected


@pytest.mark.parametrize("model, saved, expected", [
    ({"eos_token_id": [0, 1]}, {}, {0, 1, 2}), ({"text_config": {"eos_token_id": [1]}}, {}, {1, 2}),
    ({"eos_token_id": 1}, {}, {0, 2}), ({"eos_token_id": None}, {}, {0, 2}),  # the usual names
    ({"eos_token_id": [0, 1]}, {"stop_ids": [3]}, {2, 3})])
def test_stop_tokens_are_those_that_config_lists_where_nothing_else_names_them(model, saved, expected, tmp_path):
    settings = PLAIN | {"eos_token": "<|im_end|>"} | saved
    folder = write(tmp_path / "a", vocabularies()["byte level"], {"tokenizer_config.json": settings,
                                                                  "config.json": model})
    assert tokenizer.load(folder).stop_ids == expected
    write(folder, {"generation_config.json": {"eos_token_id": 4}})
    assert tokenizer.load(folder).stop_ids == {2, 4}


@pytest.mark.parametrize("file, content, why", [
    ("tokenizer_config.json", "{", "delimiter|property name"), ("tokenizer_config.json", "[]", "list"),
    ("added_tokens.json", {"<x>": 7000}, "'<x>' as id 7000, but AutoTokenizer gives it 600"),
    ("added_tokens.json", {"<x>": "a"}, "'a'"), ("special_tokens_map.json", {"bos_token": {"text": "<s>"}}, "content"),
    ("generation_config.json", {"eos_token_id": "2"}, "eos_token_id"),
    ("generation_config.json", {"eos_token_id": ["</s>"]}, "eos_token_id"),
    ("config.json", {"eos_token_id": ["</s>"]}, "eos_token_id")])
def test_side_files_that_cannot_be_followed_are_one_line(file, content, why, tmp_path):
    folder = write(tmp_path / "a", vocabularies()["byte level"], {file: content})
    with pytest.raises(config.Mistake, match=why) as e:
        tokenizer.load(folder)
    assert "\n" not in str(e.value) and str(folder) in str(e.value)


@pytest.mark.parametrize("part, value, why", [
    ("decoder", {"type": "WordPiece", "prefix": "##", "cleanup": True}, "its decoder"),
    ("post_processor", {"type": "RobertaProcessing", "sep": ["a", 1], "cls": ["b", 2]}, "its post-processor"),
    ("post_processor", tokenizer_spec.around({"<|im_end|>": 2, "<|im_start|>": 1}, "<|im_start|>"), None)])
def test_what_a_tokenizer_json_does_is_known_or_one_line(part, value, why, tmp_path):
    folder = write(tmp_path / "a", {"tokenizer.json": byte_level_json() | {part: value}})
    if why:
        with pytest.raises(config.Mistake, match=why):
            tokenizer.load(folder)
        return
    write(folder, {"tokenizer_config.json": PLAIN})  # nobody calls it BOS, but each text gets it
    assert (tokenizer.load(folder).bos_id, tokenizer.load(folder).adds_bos) == (1, True)
    write(folder, {"tokenizer_config.json": PLAIN | {"bos_token": "<|im_end|>"}})
    with pytest.raises(config.Mistake, match="around a text"):
        tokenizer.load(folder)


def test_no_text_becomes_a_special_token_unless_asked(tmp_path):
    """A vocabulary with symbols of its own takes a whole text that is a piece for it, special or not."""
    need_transformers_5_24()
    found = tokenizer.load(write(tmp_path / "a", vocabularies()["sentencepiece, no prefix"]))
    assert found.encode("<s>", special=True) == [1] and 1 not in found.encode("a<s>")
    with pytest.raises(config.Mistake, match="spells their names"):
        found.encode("<s>")


def test_a_tokenizer_can_be_told_to_add_bos(tmp_path):
    """So that what is saved beside a model does what the model's training data did."""
    from transformers import AutoTokenizer
    bare = tokenizer.load(write(tmp_path / "a", vocabularies()["byte level"], {
        "tokenizer_config.json": PLAIN | {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}}))
    told = bare.adding_bos()
    told.save(tmp_path / "saved")
    assert (bare.adds_bos, told.adds_bos, told.fingerprint) == (False, True, bare.fingerprint)
    assert AutoTokenizer.from_pretrained(tmp_path / "saved")("the").input_ids == told.encode("the", bos=True)
    assert tokenizer.char("ab").adding_bos().adds_bos is False  # there is none


# ---- training -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [
    " ".join(SOURCE.split()) * 30, "\u2585 ".join(SOURCE.split("\n")), "\0".join(SOURCE.split("\n")),
    SOURCE.replace("\n", "\n\ud800")], ids=["one long line", "U+2585", "NUL", "surrogates"])
def test_training_sees_all_of_a_text(text):
    """SentencePiece drops lines that are too long or hold characters that it keeps for itself, without a word."""
    words = ["self", "return", "def"]
    pieces = {piece.strip() for piece in tokenizer.train_sentencepiece([text], 600).vocab}
    assert pieces >= set(words) and len(text) > 50_000


def test_long_lines_are_cut_at_spaces_and_nothing_is_lost():
    text = "word " * 200_000 + "x" * 600_000 + "\nshort"
    lines = list(tokenizer.sentences([text]))
    assert "".join(lines) == text.replace("\n", "") and max(map(len, lines)) <= tokenizer.LINE_LIMIT
    assert all(line.startswith((" word", "word", " x", "x", "short")) for line in lines)


LOW, BYTES, FUSE = replace({"String": "\u2581"}, " "), {"type": "ByteFallback"}, {"type": "Fuse"}


@pytest.mark.parametrize("steps, known", [
    ([LOW], True), ([LOW, BYTES], True), ([LOW, FUSE, STRIP], True), ([FUSE, LOW], True),
    ([], False), ([LOW, BYTES, STRIP], False), ([replace({"String": "a"}, "b"), FUSE], False),
    ([{"type": "BPEDecoder", "suffix": "a"}, FUSE], False), ([LOW, FUSE, STRIP | {"content": "_"}], False),
    ([LOW, FUSE, STRIP | {"start": 2}], False), ([LOW, FUSE, STRIP | {"stop": 1}], False),
    ([LOW, FUSE, STRIP | {"start": 0}], True),
    ([{"type": "Metaspace", "replacement": "_", "prepend_scheme": "never", "split": True}], False)])
def test_decoders_give_the_text_of_the_library_or_are_refused(steps, known, tmp_path):
    """Without Fuse what Strip drops is the space of each token."""
    from tokenizers import Tokenizer
    spec = low_line_json(decoder={"type": "Sequence", "decoders": steps})
    folder = write(tmp_path / "a", {"tokenizer.json": spec, "tokenizer_config.json": PLAIN})
    if not known:
        with pytest.raises(config.Mistake, match="its decoder"):
            tokenizer.load(folder)
        return
    ours, theirs = tokenizer.load(folder), Tokenizer.from_str(json.dumps(spec))
    for ids in [theirs.encode(text).ids for text in TEXTS]:
        assert ours.decode(ids, special=True) == theirs.decode(ids, skip_special_tokens=False)


# ---- by which algorithm ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ignore_merges", [False, True])
def test_merging_by_rank_is_chosen_exactly_where_it_gives_the_ids_of_the_merges(ignore_merges):
    """Vocabularies of all kinds over three letters, and every word of these up to the longest token, alone and after
    a letter that nothing merges with."""
    words = ["".join(letters) for n in range(1, 6) for letters in itertools.product("abc", repeat=n)]
    words += ["x" + word for word in words]
    step, rng, found = tokenizer_spec.byte_level(False), random.Random(0), Counter()
    cut = {"type": "Sequence", "pretokenizers": [tokenizer_spec.split(tokenizer_spec.LLAMA3_WORDS), step]}
    for _ in range(30):
        vocab, merges = dict(tokenizer_spec.CHAR_TO_BYTE), []
        while len(vocab) < 263:
            pair = rng.choices(["a", "b", "c", *[*vocab][256:]], k=2)
            if len("".join(pair)) <= 5 and "".join(pair) not in vocab:
                merges.append(pair)
                vocab["".join(pair)] = len(vocab)
        if rng.random() < 0.3:  # every way to make a token, as in Llama 3's file
            merges = tokenizer_spec.merges_of(vocab, lambda left, right: (vocab[left], vocab[right]))
        model = tokenizer_spec.bpe(vocab, merges, ignore_merges=ignore_merges)
        tok = tokenizer.Tokenizer(tokenizer_spec.make_spec(model, {}, cut, step))
        tok._words = tokenizer_spec.LLAMA3_WORDS  # as if it were of that kind
        by_rank = tok._tiktoken.encode_ordinary_batch(words)
        found[tok.kind] += 1
        assert (tok.kind == "tiktoken") == (by_rank == tok._run(words)), merges
    assert min(found["tiktoken"], found["json"]) > 4
