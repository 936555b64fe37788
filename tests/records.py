r"""The trained figures of the README, each made again by one call and set beside the figure it is held to.

    python tests/records.py                                    # what there is
    python tests/records.py tales shakespeare shapes photos    # two cores: an hour
    python tests/records.py scout flickr8k                     # a GPU: some minutes each
    python tests/records.py scout --max_iters=3 --device=cpu   # a trial: what follows the names goes to each training

Runs lie in out/records/. A script whose data has not been prepared says how that is done.
"""
import re
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import config  # noqa: E402


@dataclass
class Record:
    """Stages of one script, each of which goes on from the one before; the best weights of the last are then scored."""
    script: str
    stages: tuple[str, ...]  # what follows the script's name
    score: str  # the same for scoring
    figure: str  # a pattern of what the script then prints, with one group around the figure
    mark: float
    whose: str


BITS, NUMBER = r"([\d.]+) bits/byte", r" ([\d.]+)"
RECORDS = {
    "tales": Record("train.py", ("config/tales.py",), "--eval_only", BITS, 0.2172, "bits/byte, the floor"),
    "shakespeare": Record("train.py", ("config/shakespeare_best.py",), "--eval_only", "val loss" + NUMBER, 1.4697,
                          "validation loss, nanoGPT in three minutes of an A100"),
    "scout": Record("train.py", ("config/scout.py --optimizer=muon --learning_rate=3e-3 --min_lr=0 --warmup_iters=50 "
                                 "--dropout=0.2 --max_iters=700 --eval_interval=175",),
                    "--eval_only", BITS, 0.4402, "bits/byte, stories15M"),
    "shapes": Record("vlm.py", ("config/vlm_shapes.py",), "--eval", "answer exact" + NUMBER, 0.27,
                     "of answers, the best guess"),
    "photos": Record("vlm.py", ("config/vlm_flickr8k.py",), "--eval --split=test", "BLEU-4" + NUMBER, 0.213,
                     "BLEU-4, Show, Attend and Tell's hard attention"),
    "flickr8k": Record("vlm.py", ("config/vlm_align.py --encoder=efficientnet_lite0",
                                  "config/vlm_instruct.py --dataset=flickr8k --block_size=320 --batch_size=48 "
                                  "--learning_rate=1e-4 --gradient_accumulation_steps=1 --max_iters=625 "
                                  "--eval_interval=125 --sample_tokens=40"),
                       "--eval --split=test", "BLEU-4" + NUMBER, 0.213,
                       "BLEU-4, Show, Attend and Tell's hard attention"),
}


def commands(name, more):
    """The words of each command of a record, `more` added to those that train."""
    record, before = RECORDS[name], ()
    for number, stage in enumerate(record.stages, 1):
        words, out = [record.script, *shlex.split(stage)], ROOT / f"out/records/{name}_{number}"
        yield [*words, *before, f"--out_dir={out}", *more]
        before = f"--init_from={out / 'best'}",
    yield [*words, *before, f"--out_dir={out / 'best'}", *record.score.split()]


def run(words):
    """Run a command of this project, showing what it prints -> that as text."""
    print(f"\n$ python {' '.join(words)}", flush=True)
    lines = []
    with subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    if process.returncode:
        sys.exit(process.returncode)
    return "".join(lines)


def main(argv):
    (names, more), found = config.names_first(argv, RECORDS, "record"), []
    for name in names:
        record, start = RECORDS[name], time.perf_counter()
        *_, printed = [run(words) for words in commands(name, more)]
        figure = re.search(record.figure, printed)
        if not figure:
            raise config.Mistake(f"{name}: the last command printed no {record.figure}; it says why, "
                                 "and can be run again alone")
        minutes = (time.perf_counter() - start) / 60
        found.append(f"| {name} | {figure[1]} | {record.mark} {record.whose} | {minutes:.1f} |")
    rows = found or [f"| {name} | | {record.mark} {record.whose} | |" for name, record in RECORDS.items()]
    print("\n| what | here | held to | minutes |\n|---|---|---|---|", *rows, sep="\n")


if __name__ == "__main__":
    config.run(main, sys.argv[1:])
