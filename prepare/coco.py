"""Prepare COCO captions: 118,000 photos with five captions each for training, 5,000 for validation.

    python prepare/coco.py                              # from the hub, 20 GB
    python prepare/coco.py --input FOLDER               # COCO's own layout
    python prepare/coco.py --input FOLDER --limit 1000

FOLDER holds train2017/ and val2017/ (or 2014) with the photos, and captions_*.json in itself or in annotations/.
The photos stay where they are. Photos without captions, and captions without photos, are left out.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from any folder
import config  # noqa: E402
from prepare import images, shards  # noqa: E402

HUB = "jxie/coco_captions"


def from_folder(folder, limit):
    """{split: records} of COCO's captions files."""
    records = {}
    for split in ("train", "val"):
        files = sorted([*folder.glob(f"captions_{split}*.json"), *folder.glob(f"annotations/captions_{split}*.json")])
        if not files:
            raise config.Mistake(f"--input must hold COCO's captions_{split}2017.json, in itself or in annotations/")
        place = folder / files[-1].stem.removeprefix("captions_")
        with config.mistakes(OSError, ValueError, KeyError, TypeError, AttributeError,
                             prefix=f"{files[-1]} is not COCO's: "):
            table = images.json_of(files[-1])
            texts, useless = {}, 0
            for a in table["annotations"]:
                if isinstance(a.get("caption"), str) and a["caption"].strip():
                    texts.setdefault(a["image_id"], []).append(" ".join(a["caption"].split()))
                else:
                    useless += 1
            found = [(images.find(place / i["file_name"]), texts[i["id"]]) for i in table["images"] if i["id"] in texts]
        found = [{"image": str(path.resolve()), "captions": words} for path, words in found if path.is_file()]
        records[split] = found[:limit]
        print(f"{files[-1].name}: {len(found):,} of {len(table['images']):,} photos are there, with captions"
              + f"; {useless:,} captions are empty or no text" * (useless > 0))
        if split == "train" and not found:
            raise config.Mistake(f"none of the {len(table['images']):,} photos of {files[-1]} is in {place}")
    return records


def main():
    cfg = config.load(images.Settings)
    inputs = [cfg.input] if cfg.input else []
    out = shards.own_folder(cfg.out or config.ROOT / "data/coco", images.FILES, inputs)
    if cfg.input:
        records = from_folder(Path(cfg.input), cfg.limit)
    else:
        records = images.from_hub(HUB, out, cfg.limit, lambda r: {"captions": [r["caption"]]})
    images.save(records, out)


if __name__ == "__main__":
    config.run(main)
