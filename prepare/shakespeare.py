"""Prepare tiny Shakespeare, one id per character, as nanoGPT's shakespeare_char has it: the last tenth validates.

    python prepare/shakespeare.py                       # downloads 1.1 MB
    python prepare/shakespeare.py --input FILE          # any text file
"""
import sys
import urllib.request
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from any folder
import config  # noqa: E402
from prepare import shards, tokenizer  # noqa: E402

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"


@dataclass
class Settings:
    input: str | None = None  # text file; None: download tiny Shakespeare
    out: str | None = None  # folder to write; None: data/shakespeare
    val_fraction: float = 0.1  # share of the characters at the end that validates, nanoGPT's

    def __post_init__(self):
        if not 0 < self.val_fraction < 1:
            raise ValueError("val_fraction lies between 0 and 1")


def read(path):
    """The text of a file, or of the download when path is None."""
    if path is not None:
        with config.mistakes(OSError, UnicodeDecodeError, prefix=f"--input {path}: "):
            return Path(path).read_bytes().decode("utf-8")
    try:
        with urllib.request.urlopen(URL, timeout=20) as answer:
            return answer.read().decode("utf-8")
    except OSError as e:
        raise config.Mistake(f"cannot download tiny Shakespeare ({e}): give a text file with --input FILE, "
                             "or make data that needs no network with `python prepare/tales.py`") from None


def main():
    cfg = config.load(Settings)
    text = read(cfg.input)
    cut = int(len(text) * (1 - cfg.val_fraction))
    if not 0 < cut < len(text):
        raise config.Mistake(f"{len(text)} characters are too few to split into training and validation")
    tok = tokenizer.char(text)
    writer = shards.Writer(cfg.out or config.ROOT / "data/shakespeare", tok)
    for split, part in ("train", text[:cut]), ("val", text[cut:]):
        writer.add(split, tok.encode(part), len(part.encode()))
        print(f"{split}: {len(part):,} characters")
    writer.finish()
    print(f"{writer.directory}: vocabulary {tok.vocab_size}")


if __name__ == "__main__":
    config.run(main)
