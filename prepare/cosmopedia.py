"""Prepare Cosmopedia v2 (HuggingFaceTB/smollm-corpus): textbooks, stories and posts written by a language model.

    python prepare/cosmopedia.py --limit 100000         # the first 100,000 of 39 million documents, from the hub
    python prepare/cosmopedia.py --input FILES
"""
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from any folder
import config
from prepare import text


@dataclass
class Settings(text.Settings):
    """What can be chosen; the defaults suit config/llama4_tiny.py."""
    input: tuple[str, ...] = ()  # files, folders or globs of txt, jsonl, json (also packed), parquet; none: the hub
    vocab_size: int = 32000  # [1, 1048576] tokens of the SentencePiece BPE trained without --tokenizer: llama4-tiny's


def main():
    text.prepare(config.load(Settings), "cosmopedia", ("HuggingFaceTB/smollm-corpus", "cosmopedia-v2"))


if __name__ == "__main__":
    config.run(main)
