"""Prepare conversations about pictures in LLaVA's JSON format, and preferences with RLAIF-V's fields.

    python prepare/llava.py --input llava_instruct_150k.json --images coco/train2017
    python prepare/llava.py --input blip_laion_cc_sbu_558k.json --images images --out data/llava_pretrain
    python prepare/llava.py --input rlaif.jsonl --images images --out data/rlaif
    python prepare/llava.py --input llava.json ultrachat.jsonl --images images     # several files are mixed

A record has "conversations", or "instruction" and "output", or "question", "chosen" and "rejected"; "image" names a
file under the pictures' folder (without it, the record is text only). Those whose `<image>` marks do not match their
pictures, or that say nothing, are counted and left out. Records are held out for validation by a hash of their text.
"""
import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from any folder
import config  # noqa: E402
from prepare import images  # noqa: E402

MARK = "<image>"


@dataclass
class Settings:
    """Where the conversations and their pictures come from and go to."""
    input: tuple[str, ...] = ()  # .json or .jsonl files
    images: str | None = None  # folder that the records' pictures are named from; None: the folder of the first file
    out: str | None = None  # folder to write; None: data/llava
    limit: int | None = None  # [1, inf) stop after this many records of each file; None: all of them
    val_fraction: float = 0.02  # [0, 1) share of the records held out


def record_of(raw, place):
    """A record for vlm.py from one of LLaVA's or RLAIF-V's, or None where it is of no use."""
    pictures = [str((place / p).resolve()) for p in images.images_of(raw) if p]
    if "chosen" in raw:
        texts = [raw.get(k) for k in ("question", "chosen", "rejected")]
        made = dict(zip(("question", "chosen", "rejected"), texts))
    else:
        turns = raw.get("conversations") or [{"from": "human", "value": raw.get("instruction")},
                                             {"from": "gpt", "value": raw.get("output")}]
        texts = [t.get("value") for t in turns]
        if any(t.get("from") != ("human", "gpt")[i % 2] for i, t in enumerate(turns)) or len(turns) % 2:
            return None
        made = {"conversations": [{"from": t["from"], "value": t["value"]} for t in turns]}
    if not all(isinstance(t, str) and t.strip() for t in texts):
        return None
    marks = sum(t.count(MARK) for t in texts[::2 if "conversations" in made else 1])
    if sum(t.count(MARK) for t in texts) != marks or marks not in ({0, len(pictures)} if pictures else {0}):
        return None
    return made | ({"image": pictures if len(pictures) > 1 else pictures[0]} if pictures else {})


def main():
    cfg = config.load(Settings)
    if not cfg.input:
        raise config.Mistake("name LLaVA's files with --input, for example llava_instruct_150k.json from "
                             "huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K, and its pictures with --images")
    out, place = Path(cfg.out) if cfg.out else config.ROOT / "data/llava", Path(cfg.images or Path(cfg.input[0]).parent)
    records = {"train": [], "val": []}
    for path in cfg.input:
        raw = images.read_json(path)[:cfg.limit]
        made = [m for r in raw if (m := record_of(r, place)) is not None]
        print(f"{path}: {len(raw):,} records, {len(raw) - len(made):,} of no use")
        for m in made:
            share = int.from_bytes(hashlib.sha256(json.dumps(m, sort_keys=True).encode()).digest()[:4], "big") / 2**32
            records["val" if share < cfg.val_fraction else "train"].append(m)
    images.save(records, out)


if __name__ == "__main__":
    config.run(main)
