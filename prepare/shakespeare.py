"""Prepare tiny Shakespeare, one id per character, as nanoGPT's shakespeare_char has it: the last tenth validates.

    python prepare/shakespeare.py                       # downloads 1.1 MB
    python prepare/shakespeare.py --input FILES         # any text, one after another
"""
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from any folder
import config
from prepare import formats, shards, sources, tokenizer

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"


@dataclass
class Settings:
    """What can be chosen; the defaults give nanoGPT's data."""
    input: tuple[str, ...] = ()  # files, folders or globs of txt, jsonl, json, parquet; none: download tiny Shakespeare
    out: str | None = None  # folder to write; None: data/shakespeare
    tokenizer: str | None = "char"  # or 'byte', a tokenizer's file or folder; None: train a SentencePiece BPE
    vocab_size: int = 1024  # [1, 1048576] tokens of that BPE: a megabyte has few words
    val_fraction: float = 0.1  # (0, 1) share of the characters at the end that validates, nanoGPT's
    limit: int | None = None  # [1, inf) only the first so many characters; None: all of them
    field: str = "text"  # where a record of jsonl, json or parquet has its text


def read_file(path, cfg):
    """The text of a .txt file to the letter; of other kinds the documents, blank lines between them."""
    format, compression = formats.format_of(path)
    if format != ".txt":
        return "\n\n".join(sources.Files([path], (), cfg.field))
    with formats.opened(path) as file:
        return "".join(formats.text_of_file(file, compression))


def main():
    cfg = config.load(Settings)
    out = shards.own_folder(cfg.out or config.ROOT / "data/shakespeare", shards.DATA_FILES, cfg.input)
    paths = sources.find_files(cfg.input, out)
    whole = ("".join(read_file(path, cfg) for path in paths) if cfg.input else
             sources.download(URL, sources.OFFLINE).decode("utf-8"))[:cfg.limit]
    cut = int(len(whole) * (1 - cfg.val_fraction))
    if not 0 < cut < len(whole):
        raise config.Mistake(f"{len(whole)} characters cannot be split into training and validation "
                             f"at val_fraction={cfg.val_fraction}")
    tok = (tokenizer.char(whole) if cfg.tokenizer == "char" else tokenizer.byte() if cfg.tokenizer == "byte" else
           tokenizer.load(cfg.tokenizer) if cfg.tokenizer else
           tokenizer.train_sentencepiece([whole[:cut]], cfg.vocab_size))
    writer = shards.Writer(out, tok)
    for split, part in ("train", whole[:cut]), ("val", whole[cut:]):
        writer.add(split, tok.encode(part), len(part.encode()))
        print(f"{split}: {len(part):,} characters")
    writer.finish()
    print(f"{out}: vocabulary {tok.vocab_size}")


if __name__ == "__main__":
    config.run(main)
