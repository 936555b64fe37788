"""Prepare FineWeb-Edu (HuggingFaceFW/fineweb-edu, sample-10BT): web pages picked for what they teach.

    python prepare/fineweb_edu.py                       # streams 28 GB from the hub, 10 billion tokens
    python prepare/fineweb_edu.py --limit 100000        # the first 100,000 pages
    python prepare/fineweb_edu.py --input FILES

Shard 0 validates: of the hundred shards' worth of pages one in a hundred is held out, and together they fill
val_000.bin. They are picked by a hash of their text, not as the first hundred million tokens, because a page that
the crawl met twice would otherwise be in the validation shard and in a training shard too.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from any folder
import config
from prepare import text


@dataclass
class Settings(text.Settings):
    """What can be chosen; the defaults suit config/mini_llama.py."""
    input: tuple[str, ...] = ()  # files, folders or globs of txt, jsonl, json (also packed), parquet; none: the hub
    vocab_size: int = 32000  # [1, 1048576] tokens of the SentencePiece BPE trained without --tokenizer: mini-llama's


def main():
    text.prepare(config.load(Settings), "fineweb_edu", ("HuggingFaceFW/fineweb-edu", "sample-10BT"))


if __name__ == "__main__":
    config.run(main)
