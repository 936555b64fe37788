"""Prepare conversations about pictures in LLaVA's JSON format, and preferences with RLAIF-V's fields.

    python prepare/llava.py --input llava_instruct_150k.json --images coco/train2017
    python prepare/llava.py --input blip_laion_cc_sbu_558k.json --images images --out data/llava_pretrain
    python prepare/llava.py --input rlaif.jsonl --images images --out data/rlaif
    python prepare/llava.py --input llava.json ultrachat.jsonl --images images     # several files are mixed

A record has "conversations", or OpenAI's "messages", or "instruction" and "output", or "question", "chosen" and
"rejected"; a conversation begins with "system", if it is there. "image", "images" or "image_path", the first that is
not empty, name files under the pictures' folder (without them, the record is text only). Those whose `<image>` marks do
not match their pictures, that say nothing, that are about a video, or that hold what is not learned here (history,
tools, answers with "weight": 0 or "train": false), are counted and left out. Pictures are held out for validation, with
all that is said about them, by a hash of their files; records without one by a hash of their text.
"""
import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from any folder
import config
from prepare import images, picture_files, shards, text


@dataclass
class Settings:
    """Where the conversations and their pictures come from and go to."""
    input: tuple[str, ...] = ()  # .json or .jsonl files
    images: str | None = None  # folder that the records' pictures are named from; None: the folder of the first file
    out: str | None = None  # folder to write; None: data/llava
    limit: int | None = None  # [1, inf) stop after this many records of each file; None: all of them
    val_fraction: float = 0.02  # [0, 1) share of the records held out


FROM = {role: name for name, role in images.ROLES.items()}


def text_of(content):
    """The text of a turn's content: a text, or OpenAI's list of parts, in which a mark stands for each picture. What is
    neither stays as it is."""
    if not isinstance(content, list) or {*map(type, content)} != {dict}:
        return content
    texts = [images.IMAGE + "\n" if part.get("type") in ("image", "image_url") else
             part.get("text") if part.get("type") == "text" else None for part in content]
    return "".join(texts) if {*map(type, texts)} == {str} else content


def turns_of(raw, key):
    """LLaVA's turns of a record's conversations or of OpenAI's messages."""
    turns = raw[key]
    images.need(isinstance(turns, list) and {*map(type, turns)} == {dict}, f"its {key} are not a list of turns")
    unlearned = [t.get("from", t.get("role")) for t in turns if 0 in (t.get("weight"), t.get("train"))]  # False is 0
    images.need("gpt" not in unlearned and "assistant" not in unlearned, "it has answers that are not to be learned")
    if key == "messages":
        turns = [{"from": FROM.get(str(m.get("role"))), "value": m.get("content")} for m in turns]
    return [turn | {"value": text_of(turn.get("value"))} for turn in turns]


def record_of(raw, place):
    """A record for vlm.py from one of LLaVA's or RLAIF-V's. Raises ValueError where its image is no file's name."""
    images.need(not raw.get("video") and not raw.get("videos"), "it is about a video")
    named = (raw.get(key) for key in ("image", "images", "image_path"))
    pictures = images.images_of({"image": next((some for some in named if some not in (None, "", [])), None)})
    pictures = [p for p in pictures if p not in (None, "")]
    images.need(all(isinstance(p, str) and "\0" not in p for p in pictures), "its image is not the name of a file")
    for key in "history", "tools", "functions":
        images.need(not raw.get(key), f"it has {key}, which are not learned beside pictures")
    made, system = {k: raw[k] for k in ("question", "chosen", "rejected") if raw.get(k)}, raw.get("system")
    if "chosen" in made:
        images.need(not system, "it has a system text beside a chosen answer")
    else:
        talk = next((turns_of(raw, key) for key in ("conversations", "messages") if raw.get(key)), None)
        if talk is None:
            asked = [text for text in (raw.get("instruction"), raw.get("input")) if text]
            images.need(all(isinstance(text, str) for text in asked), "one of its texts is empty or no text")
            talk = [{"from": "human", "value": "\n\n".join(asked)}, {"from": "gpt", "value": raw.get("output")}]
        made["conversations"] = [{"from": "system", "value": system}] * bool(system) + talk
    paths = [str(picture_files.find(place / p).resolve()) for p in pictures]
    return made | ({"image": paths if len(paths) > 1 else paths[0]} if paths else {})


def hold_out(records, files, fraction):
    """{"train": ..., "val": ...}: about `fraction` of the records held out, at least one where that can be, and no
    picture on both sides. files: {path: hash of the picture's file}."""
    keys = [[files[p] for p in images.images_of(r)] or [json.dumps(r, sort_keys=True)] for r in records]
    above = {key: key for some in keys for key in some}  # a forest: pictures of one record have one root, the least

    def root(key):
        while above[key] != key:
            above[key] = above[above[key]]  # halves the way for the next time
            key = above[key]
        return key
    for first, *others in keys:
        for other in others:
            least, most = sorted((root(first), root(other)))
            above[most] = least
    hashes = [text.hash_of(root(first)) for first, *_ in keys]
    threshold = text.threshold_of(hashes, fraction) if fraction and len(set(hashes)) > 1 else 0
    sides = {"train": [], "val": []}
    for record, hash in zip(records, hashes):
        sides["val" if hash < threshold else "train"].append(record)
    return sides


def main():
    cfg = config.load(Settings)
    if not cfg.input:
        raise config.Mistake("name LLaVA's files with --input, for example llava_instruct_150k.json from "
                             "huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K, and its pictures with --images")
    out = shards.own_folder(cfg.out or config.ROOT / "data/llava", images.FILES, cfg.input)
    place, sieve, records, refused = Path(cfg.images or Path(cfg.input[0]).parent), images.Sieve(out), [], 0
    for path in cfg.input:
        raw = images.read_json(path)[:cfg.limit]
        records += sieve.keep(raw, f"{path}: record", change=lambda record: record_of(record, place))
        before, refused = refused, sum(map(len, sieve.refused.values()))
        print(f"{path}: {len(raw):,} records, {refused - before:,} of no use")
    images.save(hold_out(records, sieve.pictures, cfg.val_fraction), out, sieve=sieve)


if __name__ == "__main__":
    config.run(main)
