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
from prepare import images, shards  # noqa: E402

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
    """A record for vlm.py from one of LLaVA's or RLAIF-V's. Raises ValueError with the reason where it is of no use."""
    pictures = [str((place / p).resolve()) for p in images.images_of(raw) if p]
    if "chosen" in raw:
        texts = [raw.get(k) for k in ("question", "chosen", "rejected")]
        made = dict(zip(("question", "chosen", "rejected"), texts))
    else:
        turns = raw.get("conversations") or [{"from": "human", "value": raw.get("instruction")},
                                             {"from": "gpt", "value": raw.get("output")}]
        texts = [t.get("value") for t in turns]
        if any(t.get("from") != ("human", "gpt")[i % 2] for i, t in enumerate(turns)) or len(turns) % 2:
            raise ValueError("its turns do not go from human to gpt and back")
        made = {"conversations": [{"from": t["from"], "value": t["value"]} for t in turns]}
    if not all(isinstance(t, str) and t.strip() for t in texts):
        raise ValueError("it says nothing, or not in LLaVA's or RLAIF-V's fields")
    marks = sum(t.count(MARK) for t in texts[::2 if "conversations" in made else 1])
    if sum(t.count(MARK) for t in texts) != marks or marks not in ({0, len(pictures)} if pictures else {0}):
        raise ValueError(f"its pictures ({len(pictures)}) and its {MARK} marks in questions ({marks}) do not match")
    return made | ({"image": pictures if len(pictures) > 1 else pictures[0]} if pictures else {})


def main():
    cfg = config.load(Settings)
    if not cfg.input:
        raise config.Mistake("name LLaVA's files with --input, for example llava_instruct_150k.json from "
                             "huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K, and its pictures with --images")
    out = shards.own_folder(cfg.out or config.ROOT / "data/llava", images.FILES, cfg.input)
    place = Path(cfg.images or Path(cfg.input[0]).parent)
    records, reasons = {"train": [], "val": []}, []
    for path in cfg.input:
        raw, made, before = images.read_json(path)[:cfg.limit], [], len(reasons)
        for n, record in enumerate(raw, 1):
            try:
                made.append(record_of(record, place))
            except (ValueError, TypeError, AttributeError) as e:
                reasons.append(f"{path}: record {n}: {e}")
        print(f"{path}: {len(raw):,} records, {len(reasons) - before:,} of no use")
        for m in made:
            share = int.from_bytes(hashlib.sha256(json.dumps(m, sort_keys=True).encode()).digest()[:4], "big") / 2**32
            records["val" if share < cfg.val_fraction else "train"].append(m)
    if reasons and not records["train"] + records["val"]:
        raise config.Mistake(f"no usable record: {reasons[0]}")
    images.save(records, out)


if __name__ == "__main__":
    config.run(main)
