"""The quiz's table: what answers, rewards and their controls teach the quick start's model.

    python prepare/tales.py && python train.py config/tales.py && python prepare/quiz.py
    python prepare/quiz.py --names=False --excerpts=1 --conversations=8000 --out=data/quiz_begin
    python tests/quiz_table.py                                      # all rows; two cores: 50 minutes
    python tests/quiz_table.py half grpo --device=cpu               # some, with keys for all of them

Each row is a run in out/quiz_table/, made after those that it needs, which then answers all validation questions
greedily; one that is complete is not made again. Those after "grpo" begin where it does and take its steps, "more" as
many seconds: equal compute; "dpo" takes its own. Without arguments the table is kept in quiz_table.json, and written
into README.md.
"""
import json
import math
import re
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import records

import common
import config
import feedback
import runs
import train

OUT = ROOT / "out/quiz_table"
KEPT = ROOT / "tests/quiz_table.json"
MARKS = "<!-- quiz: written by tests/quiz_table.py -->\n", "<!-- end of the quiz -->\n"
ROWS = {  # name: (what is learned, the command, where it begins)
    "begin": ("to copy", "train.py config/quiz_begin.py", "out/tales"),
    "sft": ("then the answers (SFT)", "train.py config/quiz.py", "begin"),
    "lora": ("then the answers, with LoRA", "train.py config/quiz.py --lora_rank=16 --learning_rate=3e-3",
             "begin"),
    "half": ("SFT, stopped early", "train.py config/quiz.py --max_iters=110", "begin"),
    "grpo": ("rewards (GRPO)", "feedback.py config/quiz_grpo.py", "half"),
    "grpo2": ("rewards (GRPO)", "feedback.py config/quiz_grpo.py --seed=1338", "half"),
    "grpo3": ("rewards (GRPO)", "feedback.py config/quiz_grpo.py --seed=1339", "half"),
    "rank1": ("rewards, LoRA of rank 1", "feedback.py config/quiz_grpo.py --lora_rank=1", "half"),
    "rejection": ("its own right answers (rejection sampling)", "feedback.py config/quiz_grpo.py --baseline=zero",
                  "half"),
    "random": ("random rewards", "feedback.py config/quiz_grpo.py --reward=random", "half"),
    "more": ("more SFT, from the same start", "train.py config/quiz.py", "half"),
    "dpo": ("preferences (DPO)", "feedback.py config/quiz_dpo.py", "half"),
}


def python(*words):
    """Run a script of ours -> what it printed. Ends this one too where it fails."""
    print(f"\n$ python {' '.join(words)}", flush=True)
    with subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        lines = [line for line in process.stdout if not print(line, end="", flush=True)]
    if process.returncode:
        sys.exit(process.returncode)
    return "".join(lines)


def last(name):
    """The last entry of a row's log that says what a step took; None before there is one."""
    return next((e for e in reversed(runs.read_log(OUT / name / "log.jsonl")) if "train_loss" in e), None)


def make(name, keys):
    """Train a row, after those that it needs, unless that is done."""
    _, command, start = ROWS[name]
    for needed in ["grpo"] * (name == "more") + [start] * (start in ROWS):
        make(needed, keys)
    script, *words = command.split()
    if name == "more":
        words += [f"--max_iters={round(last('grpo')['seconds'] * last('half')['step'] / last('half')['seconds'])}"]
    wanted, _ = config.load({"train.py": train.KEYS, "feedback.py": feedback.KEYS}[script], words, config.SHAPE)
    ours = {key: value for key, value in wanted.items() if key not in ("init_from", "out_dir", "dataset")}
    if last(name):
        has = json.loads((OUT / name / "run.json").read_text(encoding="utf-8"))["settings"]
        if last(name)["step"] == ours["max_iters"] and {key: has.get(key) for key in ours} == ours:
            return
    python(script, *words, f"--init_from={OUT / start if start in ROWS else start}", f"--out_dir={OUT / name}", *keys)


def measure(name, keys):
    """{steps, seconds, share of right answers, questions} of one row."""
    make(name, keys)
    said = python("feedback.py", "--eval_only", "--dataset=quiz", f"--init_from={OUT / name}")
    share, count = re.search(r"val accuracy (\S+) of (\S+)", said).groups()
    end = last(name)
    return {"steps": end["step"], "seconds": end["seconds"], "share": float(share), "of": int(count.replace(",", ""))}


def table(found):
    """{name: what was measured} as a table; rows of one kind are seeds of it."""
    lines = ["| what learns | command | steps | seconds | right, % |", "|---|---|---|---|---|"]
    for what in dict.fromkeys(ROWS[name][0] for name in found):
        names = [name for name in found if ROWS[name][0] == what]
        shares, first = [100 * found[name]["share"] for name in names], found[names[0]]
        error = statistics.stdev(shares) if len(names) > 1 else 100 * math.sqrt(
            first["share"] * (1 - first["share"]) / first["of"])
        lines.append(f"| {what} | `{ROWS[names[0]][1]}` | {first['steps']:,} | {first['seconds']:.0f} | "
                     f"{statistics.mean(shares):.1f} ± {error:.1f}{f', {len(names)} seeds' * (len(names) > 1)} |")
    return "\n".join(lines) + "\n"


def readme(kept):
    """What README says of quiz_table.json."""
    machine, count = kept["machine"], max(row["of"] for row in kept["rows"].values())
    return (f"{table(kept['rows'])}\nOf {count:,} questions about held-out combinations; ± is the deviation of seeds, "
            f"or the standard error.\nOn {records.machine(machine)}, {machine['date'].split()[0]}.\n")


def main():
    names, keys = config.names_first(sys.argv[1:], ROWS, "row")
    found = {name: measure(name, keys) for name in names or ROWS}
    print("\n" + table(found), end="")
    if not sys.argv[1:]:
        kept = {"machine": records.facts_of_machine(common.pick_device("auto").type), "rows": found}
        KEPT.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
        records.write_readme(readme(kept), MARKS)


if __name__ == "__main__":
    config.run(main)
