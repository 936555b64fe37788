"""What lies beside the vocabulary in a folder, as AutoTokenizer of transformers (5.24) reads it: settings, tokens to
add, chat templates.

Sources: transformers, tokenization_utils_tokenizers.py, tokenization_utils_base.py.
"""
import json

import config
from prepare.tokenizer_spec import added

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
SIDE_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


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
    default, others = folder / "chat_template.jinja", sorted((folder / "additional_chat_templates").glob("*.jinja"))
    if default.is_file():
        settings["chat_template"] = default.read_text(encoding="utf-8")
    if others:
        paths = {path.stem: path for path in others} | ({"default": default} if default.is_file() else {})
        settings["chat_template"] = [{"name": name, "template": path.read_text(encoding="utf-8")}
                                     for name, path in paths.items()]
    return settings


def declared_tokens(folder, settings, own):
    """{id: token} that a folder declares. own: the added_tokens of its tokenizer.json."""
    if "added_tokens_decoder" in settings:
        return {int(i): token for i, token in settings["added_tokens_decoder"].items()}
    special = {content(settings[key]) for key in NAMED if settings.get(key)}
    special |= {content(token) for token in settings.get("extra_special_tokens") or []}
    older = {int(i): added(text, int(i), text in special)
             for text, i in read_json(folder / "added_tokens.json").items()}
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
    with config.mistakes(Exception):  # the library raises nothing more exact
        library = tokenizers.Tokenizer.from_str(json.dumps(spec))
        library.add_tokens([tokenizers.AddedToken(**{k: t[k] for k in flags if k in t}) for t in wanted.values()])
    for i, token in declared.items():
        if (given := library.token_to_id(token["content"])) != i:
            raise ValueError(f"it declares {token['content']!r} as id {i}, but AutoTokenizer gives it {given}")
    return json.loads(library.to_str())
