"""Prepare HellaSwag (Zellers et al. 2019, Rowan/hellaswag): 10,042 beginnings with four endings each, one of them true.

    python prepare/hellaswag.py                         # the validation split from the hub
    python prepare/hellaswag.py --input FILES           # jsonl, json (each also packed) or parquet
    python train.py --eval_only --hellaswag=True --init_from=out/smollm2    # scores; the flag works in training too

Writes data/hellaswag/val.jsonl: {"query", "endings", "label"}, one item a line. Items with the raw fields are cleaned
as EleutherAI's lm-evaluation-harness cleans them; items that have a "query" are taken as they are. The scores are the
harness's as well: acc picks the ending of the highest probability, acc_norm divides log-probabilities by the
ending's characters first.
"""
import itertools
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from any folder
import config
from prepare import shards, sources
from prepare.windows import Continuations

OFFLINE = "give HellaSwag's own files, say hellaswag_val.jsonl, with --input"
FOLDER = config.ROOT / "data/hellaswag"  # where train.py looks


@dataclass
class Settings:
    """Where the items come from and go to."""
    input: tuple[str, ...] = ()  # files, folders or globs of jsonl, json (each also packed) and parquet; none: the hub
    out: str | None = None  # folder to write; None: data/hellaswag, where train.py looks
    limit: int | None = None  # [1, inf) stop after this many items; None: all of them


def clean(words):
    """Without the marks that WikiHow's pages left: [title] ends a sentence, any other [...] goes."""
    return re.sub(r"\[.*?\]", "", words.strip().replace(" [title]", ". ")).replace("  ", " ")


def normalise(item):
    """{"query", "endings", "label"} of a raw item (activity_label, ctx_a, ctx_b, endings, label) or a cleaned one; a
    ValueError for anything else."""
    try:
        if "query" in item:
            query, endings = item["query"], list(item["endings"])
        else:
            query = clean(f"{item['activity_label']}: {item['ctx_a']} {item['ctx_b'].capitalize()}")
            endings = [clean(ending) for ending in item["endings"]]
        label = int(item["label"])
        right = isinstance(item["endings"], list) and all(isinstance(s, str) for s in (query, *endings))
        if not (right and query.strip() and 0 <= label < len(endings)):
            raise ValueError
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ValueError(f"this is no HellaSwag item with its label: {str(item)[:200]}") from None
    return {"query": query, "endings": endings, "label": label}


def items(paths):
    """The items of files, normalised; without any paths those of the hub."""
    if not paths:
        for rows, _, _ in sources.hub_batches("Rowan/hellaswag", None, "validation", otherwise=OFFLINE):
            with config.mistakes(ValueError, prefix="Rowan/hellaswag: "):
                yield from map(normalise, rows)
    for _, place, item in sources.Files(paths).read():
        with config.mistakes(ValueError, prefix=f"{place}: "):
            yield normalise(item)


# -- what train.py scores -----------------------------------------------------------------------------------------

def load(limit=0):
    """The items that were prepared, or the first `limit` of them."""
    path = FOLDER / "val.jsonl"
    if not path.is_file():
        raise config.Mistake(f"no HellaSwag in {FOLDER}: run `python prepare/hellaswag.py` first")
    with config.mistakes(OSError, ValueError, prefix=f"{path} is damaged, prepare it again: "), open(path) as f:
        return [json.loads(line) for line in itertools.islice(f, limit or None)]


def rows(items, tok, longest):
    """`Continuations` for each item. Where context and ending exceed `longest` positions the context loses its
    beginning; as the endings then keep different parts of it, each gets its own."""
    texts = []
    for item in items:  # spaces that end the context go to the endings, since words begin with them
        texts += [item["query"].rstrip(), *(f"{item['query']} {ending}" for ending in item["endings"])]
    encoded, made = iter(tok.encode_batch(texts, bos=tok.adds_bos)), []
    for item in items:
        context, row = next(encoded), Continuations()
        endings = [next(encoded)[len(context):] for _ in item["endings"]]
        most = max(map(len, endings))
        if most > longest:
            raise config.Mistake(f"HellaSwag has an ending of {most} tokens, beyond the model's context of {longest}")
        if len(context) + most - 1 <= longest:
            row.add(context, endings)
        else:
            for ending in endings:
                row.add(context[-(longest + 1 - len(ending)):], [ending])
        made.append(row)
    return made


def correct(items, scores):
    """(acc, acc_norm) as numbers of items whose true ending scores best, also per character. scores: of each item as
    from `log_likelihoods` of scores.py; None counts for nothing."""
    acc = norm = 0
    for item, row in zip(items, scores):
        if row:
            per_character = [score / max(len(ending), 1) for score, ending in zip(row, item["endings"])]
            acc += row.index(max(row)) == item["label"]
            norm += per_character.index(max(per_character)) == item["label"]
    return acc, norm


def main():
    cfg = config.load(Settings)
    out = shards.own_folder(cfg.out or FOLDER, r"val\.jsonl(\.\d+\.tmp)?", cfg.input)
    found = items(sources.find_files(cfg.input, out))
    lines = [json.dumps(item) for item in itertools.islice(found, cfg.limit)]
    if not lines:
        raise config.Mistake("there are no items in the input")
    out.mkdir(parents=True, exist_ok=True)
    shards.write_text(out / "val.jsonl", "\n".join(lines) + "\n")
    print(f"{out}/val.jsonl: {len(lines):,} items")


if __name__ == "__main__":
    config.run(main)
