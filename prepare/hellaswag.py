"""Prepare HellaSwag (Zellers et al. 2019, Rowan/hellaswag): 10,042 beginnings with four endings each, one of them true.

    python prepare/hellaswag.py                         # the validation split from the hub
    python prepare/hellaswag.py --input FILES           # jsonl, json (each also .gz) or parquet

Writes data/hellaswag/val.jsonl: {"query", "endings", "label"}, one item a line. Items with the raw fields are cleaned
as EleutherAI's lm-evaluation-harness cleans them; items that have a "query" are taken as they are.
"""
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from any folder
import config  # noqa: E402
from prepare import shards, text  # noqa: E402


@dataclass
class Settings:
    input: tuple[str, ...] = ()  # files, folders or globs of jsonl, json (each also .gz) and parquet; none: the hub
    out: str | None = None  # folder to write; None: data/hellaswag
    limit: int | None = None  # stop after this many items; None: all of them


def clean(words):
    """Without the marks that WikiHow's pages left: [title] ends a sentence, any other [...] goes."""
    words = re.sub(r"\[.*?\]", "", words.strip().replace(" [title]", ". "))
    return words.replace("  ", " ")


def normalise(item):
    """{"query", "endings", "label"} of a raw item (activity_label, ctx_a, ctx_b, endings, label) or a cleaned one."""
    try:
        if "query" in item:
            query, endings = item["query"], list(item["endings"])
        else:
            query = clean(f"{item['activity_label']}: {item['ctx_a']} {item['ctx_b'].capitalize()}")
            endings = [clean(ending) for ending in item["endings"]]
        label = int(item["label"])
        if not all(isinstance(s, str) for s in (query, *endings)) or not 0 <= label < len(endings):
            raise ValueError
    except (KeyError, TypeError, ValueError, AttributeError):
        raise config.Mistake(f"this is no HellaSwag item with its label: {str(item)[:200]}") from None
    return {"query": query, "endings": endings, "label": label}


def items(cfg):
    """The raw items, from files or from the hub."""
    if not cfg.input:
        yield from text.open_hub("Rowan/hellaswag", None, "validation")
    for path in text.find_files(cfg.input):
        with open(path, "rb") as raw:
            yield from text.records(path, raw)


def main():
    cfg = config.load(Settings)
    out = Path(cfg.out) if cfg.out else config.ROOT / "data/hellaswag"
    lines = [json.dumps(normalise(item)) for _, item in zip(range(cfg.limit or 10**9), items(cfg))]
    out.mkdir(parents=True, exist_ok=True)
    shards.write_text(out / "val.jsonl", "\n".join(lines) + "\n")
    print(f"{out}/val.jsonl: {len(lines):,} items")


if __name__ == "__main__":
    config.run(main)
