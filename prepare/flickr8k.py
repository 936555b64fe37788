"""Prepare Flickr8k: 8,000 photos with five captions each, in the usual split of 6,000, 1,000 and 1,000.

    python prepare/flickr8k.py                          # from the hub
    python prepare/flickr8k.py --input FOLDER           # its own files, as they are handed out for research

FOLDER holds captions.txt (or Flickr8k.token.txt), the lists Flickr_8k.{train,dev,test}Images.txt, and the photos in
any folder below it or in tar files, which are unpacked into the output folder.
"""
import re
import sys
import tarfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from any folder
import config  # noqa: E402
from prepare import images, shards  # noqa: E402

HUB = "jxie/flickr8k"
LISTS = {"train": "Flickr_8k.trainImages.txt", "val": "Flickr_8k.devImages.txt", "test": "Flickr_8k.testImages.txt"}


def tidy(caption):
    """A caption without the spaces that its tokenizer put before punctuation, with a capital and an end."""
    text = re.sub(r"\s+([.,!?;:'])", r"\1", " ".join(caption.replace('"', " ").split()))
    text = text[:1].upper() + text[1:]
    return text if text.endswith((".", "!", "?")) else text + "."


def captions(folder):
    """{photo: its captions} from captions.txt (photo,caption) or Flickr8k.token.txt (photo#number<tab>caption)."""
    path = folder / "Flickr8k.token.txt"
    path = path if path.is_file() else folder / "captions.txt"
    found = {}
    with config.mistakes(OSError, UnicodeDecodeError, prefix="--input must hold Flickr8k's own files: "):
        for line in path.read_text(encoding="utf-8").splitlines():
            name, _, text = line.partition("\t" if path.name.startswith("Flickr8k") else ",")
            if text.strip() and name != "image":
                found.setdefault(name.split("#")[0], []).append(tidy(text))
    return found


def photos(folder, out):
    """{photo: its path}; those in tar files are unpacked into out/images."""
    found = {p.name: p.resolve() for p in folder.rglob("*.jpg")}
    for path in sorted(folder.glob("*.tar*")):
        with config.mistakes(tarfile.TarError, OSError, prefix=f"{path}: "), tarfile.open(path) as tar:
            for member in tar:
                name = Path(member.name).name
                if member.isfile() and name.endswith(".jpg"):
                    (out / "images").mkdir(parents=True, exist_ok=True)
                    (out / "images" / name).write_bytes(tar.extractfile(member).read())
                    found[name] = Path("images") / name
    return {name: str(path) for name, path in found.items()}


def from_folder(folder, out, limit):
    """{split: records} of Flickr8k's own files."""
    texts, names, records = captions(folder), {}, {}
    for split, name in LISTS.items():
        with config.mistakes(OSError, prefix="--input must hold Flickr8k's own files: "):
            names[split] = (folder / name).read_text(encoding="utf-8").split()[:limit]
    paths = photos(folder, out)
    for split in LISTS:
        records[split] = [{"image": paths.get(n, n), "captions": texts[n]} for n in names[split] if n in texts]
    return records


def main():
    cfg = config.load(images.Settings)
    inputs = [cfg.input] if cfg.input else []
    out = shards.own_folder(cfg.out or config.ROOT / "data/flickr8k", images.FILES, inputs)
    if cfg.input:
        records = from_folder(Path(cfg.input), out, cfg.limit)
    else:
        keys = [f"caption_{i}" for i in range(5)]
        records = images.from_hub(HUB, out, cfg.limit, lambda row: {"captions": [tidy(row[k]) for k in keys]})
    images.save(records, out)


if __name__ == "__main__":
    config.run(main)
