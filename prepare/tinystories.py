"""Prepare TinyStories (Eldan & Li 2023, roneneldan/TinyStories): short stories in a small child's words.

    python prepare/tinystories.py                       # streams 1.9 GB from the hub
    python prepare/tinystories.py --input FILES         # the same stories, or others, from files

Trains the SentencePiece BPE of 32,768 tokens that config/scout.py expects, or takes --tokenizer FILE.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from any folder
import config
from prepare import text


@dataclass
class Settings(text.Settings):
    """What can be chosen; the defaults suit config/scout.py."""
    input: tuple[str, ...] = ()  # files, folders or globs of txt, jsonl, json (also packed), parquet; none: the hub
    separator: tuple[str, ...] = ("<|endoftext|>", "\n\n")  # between stories: the mark, or blank lines without it


def main():
    text.prepare(config.load(Settings), "tinystories", ("roneneldan/TinyStories", None))


if __name__ == "__main__":
    config.run(main)
