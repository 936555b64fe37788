r"""The trained figures of the README, each made again by one call, kept in records.json and written into the README.

    python tests/records.py                                    # what there is
    python tests/records.py tales shakespeare shapes photos    # two cores: about two hours
    python tests/records.py scout flickr8k                     # a GPU: some minutes each
    python tests/records.py scout --max_iters=3 --device=cpu   # a trial, not kept: what follows goes to each training
    python tests/records.py tales out/tales out/tales_2        # from runs of this machine that are there, one a seed
    python tests/records.py --readme                           # write README's table from records.json

Runs lie in out/records/. A script whose data has not been prepared says how that is done.
"""
import json
import re
import shlex
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import config
from bench import hardware

KEPT = ROOT / "tests/records.json"
MARKS = "<!-- records: written by tests/records.py -->\n", "<!-- end of records -->\n"


@dataclass
class Record:
    """Stages of one script, each of which goes on from the one before; the best weights of the last are then scored."""
    what: str
    script: str
    stages: tuple[str, ...]  # what follows the script's name
    score: str  # the same for scoring
    figures: dict[str, str]  # unit: a pattern of what the script then prints, with one group around the figure
    beside: str  # what it is to be compared with
    seeds: int = 3  # trainings, whose mean and deviation are kept; 1 where one takes more than ten minutes


NUMBER = r" (-?[\d.]+)"
BITS = {"bits/byte": r"([\d.]+) bits/byte"}
CAPTIONS = {"CIDEr-D": "CIDEr-D" + NUMBER, "BLEU-4": "BLEU-4" + NUMBER}
RECORDS = {
    "tales": Record("tales, 1.25M parameters", "train.py", ("config/tales.py",), "--eval_only", BITS,
                    "0.2172, the floor"),
    "shakespeare": Record(
        "Shakespeare's characters, 2.7M parameters", "train.py", ("config/shakespeare_best.py",), "--eval_only",
        {"nats/character": "val loss" + NUMBER}, "1.4697, nanoGPT in three minutes of an A100"),
    "scout": Record(
        "TinyStories, 128M parameters, 16 experts", "train.py",
        ("config/scout.py --optimizer=muon --learning_rate=3e-3 --min_lr=0 --warmup_iters=50 --dropout=0.2 "
         "--max_iters=700 --eval_interval=175",), "--eval_only", BITS, "0.4402, stories15M", seeds=1),
    "shapes": Record(
        "shapes, 1.4M parameters, held-out combinations", "vlm.py", ("config/vlm_shapes.py",), "--eval",
        {"of captions exact": "caption exact" + NUMBER, "of answers exact": "answer exact" + NUMBER},
        "answers: 0.27, the best guess"),
    "photos": Record(
        "Flickr8k's test photos, from scratch", "vlm.py", ("config/vlm_flickr8k.py",), "--eval --split=test", CAPTIONS,
        "BLEU-4: 0.213, Show, Attend and Tell's hard attention", seeds=1),
    "flickr8k": Record(
        "the same with SmolLM2-135M", "vlm.py",
        ("config/vlm_align.py --encoder=efficientnet_lite0",
         "config/vlm_instruct.py --dataset=flickr8k --block_size=320 --batch_size=48 --learning_rate=1e-4 "
         "--gradient_accumulation_steps=1 --max_iters=625 --eval_interval=125 --sample_tokens=40"),
        "--eval --split=test", CAPTIONS, "BLEU-4: 0.213, Show, Attend and Tell's hard attention", seeds=1),
}


def commands(name, more, seed=1337):
    """The words of each command of a record, `more` added to those that train."""
    record, before = RECORDS[name], ()
    for number, stage in enumerate(record.stages, 1):
        out = ROOT / f"out/records/{name}_{seed}_{number}"
        yield [record.script, *shlex.split(stage), *before, f"--out_dir={out}", f"--seed={seed}", *more]
        before = f"--init_from={out / 'best'}",
    yield scoring(name, out)


def scoring(name, out):
    """The words of the command that scores the best weights of a run."""
    record = RECORDS[name]
    return [record.script, *shlex.split(record.stages[-1]), f"--init_from={out / 'best'}", f"--out_dir={out / 'best'}",
            *record.score.split()]


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


def score(name, words):
    """{unit: figure} of what a scoring command prints."""
    printed, found = run(words), {}
    for unit, pattern in RECORDS[name].figures.items():
        figure = re.search(pattern, printed)
        if not figure:
            raise config.Mistake(f"{name}: the last command printed no {pattern}; it says why, and can be run again "
                                 "alone")
        found[unit] = float(figure[1])
    return found


def measure(name, more, seeds):
    """Train and score a record with so many seeds, as `summary` has it."""
    scores, minutes = [], []
    for seed in range(1337, 1337 + seeds):
        start = time.perf_counter()
        *training, last = commands(name, more, seed)
        for words in training:
            run(words)
        minutes.append((time.perf_counter() - start) / 60)
        scores.append(score(name, last))
    from common import pick_device
    return summary(name, scores, minutes, pick_device("auto").type)  # as each training does


OF_NO_WEIGHT = {"out_dir", "init_from", "seed", "device", "dtype", "compile", "log_interval", "sample_tokens",
                "sample_images", "tensorboard"}  # settings that a run may have otherwise, and still be of a record


def from_runs(name, directories):
    """The record of runs that are there, as `summary` has it. Raises `Mistake` for one that was trained otherwise."""
    record, scores, minutes, seeds = RECORDS[name], [], [], set()
    if len(record.stages) > 1:
        raise config.Mistake(f"{name} has {len(record.stages)} stages, of which a run does not tell: train it anew")
    settings = f"{record.script}:{record.script[:-3].capitalize()}Config"
    given, shape = config.load(settings, shlex.split(record.stages[0]), config.SHAPE)
    wanted = {key.name: key.default for key in config.keys_of(settings).values()} | given
    for out in map(Path, directories):
        with config.mistakes(OSError, ValueError, KeyError, prefix=f"{out} is no run: "):
            facts = json.loads((out / "run.json").read_text(encoding="utf-8"))
            has, model = ({k: tuple(v) if isinstance(v, list) else v for k, v in facts[part].items()}
                          for part in ("settings", "model"))
            log = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
            other = [k for k, v in wanted.items() if k not in OF_NO_WEIGHT and has[k] != v]
            other += [k for k, v in shape.items() if model[k] != v]
        if other:
            raise config.Mistake(f"{out} has another {', '.join(other)} than the record {name}")
        if log[-1]["step"] < has["max_iters"] or has["seed"] in seeds:
            raise config.Mistake(f"{out} is not finished, or has the seed of another one")
        seeds.add(has["seed"])
        minutes.append(log[-1]["seconds"] / 60)
        scores.append(score(name, scoring(name, out.absolute())))
    commit, dirty = facts["git_commit"][:7], "-dirty" * facts["git_commit"].endswith("-dirty")
    return summary(name, scores, minutes, "cuda" if facts["gpu"] else "cpu") | {
        "commit": commit + dirty, "torch": facts["torch"].split("+")[0],
        "date": facts["started"].replace("T", " ")[:16]}


def summary(name, scores, minutes, device):
    """{"figures": {unit: values}, "minutes": of one training, commit, command, machine and so on}."""
    commit = subprocess.run(["git", "-C", ROOT, "describe", "--always", "--dirty"], capture_output=True, text=True)
    return {"figures": {unit: [found[unit] for found in scores] for unit in scores[0]},
            "minutes": round(statistics.median(minutes), 1), "commit": commit.stdout.strip(),
            "command": " && ".join(" ".join(["python", RECORDS[name].script, stage]) for stage in RECORDS[name].stages)
            } | facts_of_machine(device)


def facts_of_machine(device):
    """What is kept with figures of what they were measured on, now."""
    facts = hardware(device)
    return {key: facts[key] for key in ("processor", "units", "cores", "gpu", "torch", "date")}


def machine(record):
    """What a record was made on, as README says it."""
    return record["gpu"] or f"{record['cores']} cores, {record['units'][-1] if record['units'] else 'no units'}"


def spread(values):
    """Mean and deviation of some figures, or the one there is."""
    deviation = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{deviation}"


def table(kept):
    """The rows of README's table."""
    lines = ["| what | figure | seeds | beside | training, minutes | on | when |", "|---|---|---|---|---|---|---|"]
    for name, record in RECORDS.items():
        for made in kept.get(name, {}).values():
            figures = ", ".join(f"{spread(values)} {unit}" for unit, values in made["figures"].items())
            seeds = len(next(iter(made["figures"].values())))
            lines.append(f"| {record.what} (`{name}`) | {figures} | {seeds} | {record.beside} | {made['minutes']} "
                         f"| {machine(made)} | {made['date'].split()[0]}, {made['commit']} |")
    return "\n".join(lines) + "\n"


def write_readme(text, marks=MARKS):
    """Put a table between its marks in README.md."""
    path = ROOT / "README.md"
    before, _, rest = path.read_text(encoding="utf-8").partition(marks[0])
    _, _, after = rest.partition(marks[1])
    path.write_text(before + marks[0] + text + marks[1] + after, encoding="utf-8")


def main(argv):
    kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    if argv == ["--readme"]:
        return write_readme(table(kept))
    there = [word for word in argv[1:] if Path(word).is_dir()]
    names, more = config.names_first([word for word in argv if word not in there], RECORDS, "record")
    for name in names:
        made = from_runs(name, there) if there else measure(name, more, 1 if more else RECORDS[name].seeds)
        if more:  # a trial
            print(f"\n{name}: {made['figures']} in {made['minutes']} minutes")
        else:
            kept.setdefault(name, {})[machine(made)] = made
            KEPT.write_text(json.dumps(kept, indent=1) + "\n")
            write_readme(table(kept))
    if not names:
        print(*(f"{name:<12} {record.what}, beside {record.beside}" for name, record in RECORDS.items()), sep="\n")


if __name__ == "__main__":
    config.run(main, sys.argv[1:])
