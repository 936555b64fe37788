"""Prepare Flickr8k: 8,000 photos with five captions each, in the usual split of 6,000, 1,000 and 1,000.

    python prepare/flickr8k.py                          # from the hub
    python prepare/flickr8k.py --input FOLDER           # its own files, as they are handed out for research

FOLDER holds captions.txt (or Flickr8k.token.txt), the lists Flickr_8k.{train,dev,test}Images.txt, and the photos in
any folder below it or in tar files, from which they are unpacked into the output folder. A photo is found whatever its
ending: .jpg, .JPG, .png.
"""
import csv
import re
import sys
import tarfile
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from any folder
import config
from prepare import images, picture_files

LISTS = {"train": "Flickr_8k.trainImages.txt", "val": "Flickr_8k.devImages.txt", "test": "Flickr_8k.testImages.txt"}
NEEDED = "--input must hold Flickr8k's own files: "


def tidy(caption):
    """A caption without the spaces that its tokenizer put before punctuation, with a capital and an end."""
    text = re.sub(r"\s+([.,!?;:'])", r"\1", " ".join(caption.replace('"', " ").split()))
    text = text[:1].upper() + text[1:]
    return text if text.endswith(tuple(".!?。！？…")) else text + "."


def captions(folder):
    """{photo: its captions} from captions.txt (CSV: photo,caption) or Flickr8k.token.txt (photo#number<tab>caption)."""
    path = folder / "Flickr8k.token.txt"
    path, found = path if path.is_file() else folder / "captions.txt", {}
    with config.mistakes(OSError, UnicodeDecodeError, csv.Error, prefix=NEEDED):
        lines = path.read_text(encoding="utf-8-sig").split("\n")
        if path.name == "captions.txt":  # each line by itself: a stray quote takes no other along
            pairs = [(row[0], ",".join(row[1:])) for row in (next(csv.reader([line]), []) for line in lines) if row]
        else:
            pairs = [line.partition("\t")[::2] for line in lines]
            pairs = [(name.rpartition("#")[0] or name, text) for name, text in pairs]
    for name, text in pairs:
        if any(map(str.isalnum, text)) and name != "image":  # the head of the CSV file
            found.setdefault(name.strip(), []).append(tidy(text))
    return picture_files.ByName(found)


def photos(folder, out, names):
    """{photo: its path} of the photos `names`; those that are in tar files only are unpacked into out/images."""
    found = picture_files.ByName({p.name: str(p.resolve()) for p in picture_files.below(folder)[0]})
    missing = picture_files.ByName({name: name for name in names if not found.get(name)})
    unpacked = {}
    for path in sorted(folder.glob("*.tar*")) if missing.values else []:
        with config.mistakes(tarfile.TarError, OSError, EOFError, prefix=f"{path}: "), tarfile.open(path) as tar:
            for member in tqdm(tar, path.name, unit=" files", leave=False, delay=1):
                name = Path(member.name).name
                if member.isfile() and missing.get(name) and Path(name).suffix.lower() in picture_files.ENDINGS:
                    (out / "images").mkdir(parents=True, exist_ok=True)
                    (out / "images" / name).write_bytes(tar.extractfile(member).read())
                    unpacked[name] = f"images/{name}"
    unpacked = picture_files.ByName(unpacked)
    return {name: found.get(name) or unpacked.get(name) for name in names}


def from_folder(folder, out, limit):
    """{split: records} of Flickr8k's own files."""
    texts, names = captions(folder), {}
    for split, name in LISTS.items():
        with config.mistakes(OSError, UnicodeDecodeError, prefix=NEEDED):
            lines = (folder / name).read_text(encoding="utf-8-sig").split("\n")
        listed = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
        names[split] = [n for n in listed if texts.get(n)]
        if without := len(listed) - len(names[split]):
            print(f"{name}: {without:,} of {len(listed):,} photos have no captions")
        names[split] = names[split][:limit]
    paths = photos(folder, out, [n for some in names.values() for n in some])
    return {split: [{"image": paths[n] or str((folder / n).resolve()), "captions": texts.get(n)} for n in some]
            for split, some in names.items()}


def main():
    images.prepare(config.load(images.Settings), "flickr8k", "jxie/flickr8k", from_folder,
                   lambda row: [tidy(row[f"caption_{i}"]) for i in range(5)])


if __name__ == "__main__":
    config.run(main)
