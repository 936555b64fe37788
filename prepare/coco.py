"""Prepare COCO captions: 118,000 photos with five captions each for training, 5,000 for validation.

    python prepare/coco.py                              # from the hub, 20 GB
    python prepare/coco.py --input FOLDER               # COCO's own layout
    python prepare/coco.py --input FOLDER --limit 1000

FOLDER holds train2017/ and val2017/ (or 2014) with the photos, and captions_*.json in itself or in annotations/.
The photos stay where they are. Photos without captions, and captions without photos, are left out.
"""
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from any folder
import config
from prepare import images, picture_files


def from_folder(folder, out, limit):
    """{split: records} of COCO's captions files; `out` is not used, for the photos stay where they are."""
    records = {}
    for split in ("train", "val"):
        files = sorted([*folder.glob(f"captions_{split}*.json"), *folder.glob(f"annotations/captions_{split}*.json")])
        if not files:
            raise config.Mistake(f"--input must hold COCO's captions_{split}2017.json, in itself or in annotations/")
        pairs = [(file, folder / file.stem.removeprefix("captions_")) for file in files]
        file, place = next((pair for pair in reversed(pairs) if pair[1].is_dir()), pairs[-1])  # the newest with photos
        with config.mistakes(OSError, ValueError, KeyError, TypeError, AttributeError,
                             prefix=f"{file} is not COCO's: "):
            table = json.loads(file.read_text(encoding="utf-8-sig"))
            texts, useless = {}, 0
            for a in table["annotations"]:
                if isinstance(a.get("caption"), str) and a["caption"].strip():
                    texts.setdefault(a["image_id"], []).append(" ".join(a["caption"].split()))
                else:
                    useless += 1
            found = [(picture_files.find(place / i["file_name"]), texts[i["id"]]) for i in table["images"]
                     if i["id"] in texts]
        found = [{"image": str(path.resolve()), "captions": words} for path, words in found if path.is_file()]
        records[split] = found[:limit]
        print(f"{file.name}: {len(found):,} of {len(table['images']):,} photos are there, with captions"
              + f"; {useless:,} captions are empty or no text" * (useless > 0))
        if split == "train" and not found:
            raise config.Mistake(f"none of the {len(table['images']):,} photos of {file} is in {place}")
    return records


def main():
    images.prepare(config.load(images.Settings), "coco", "jxie/coco_captions", from_folder,
                   lambda row: [row["caption"]])


if __name__ == "__main__":
    config.run(main)
