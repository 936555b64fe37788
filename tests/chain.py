"""The four stages on the built-in shapes, and a table of what each gains and costs: two cores, 20 minutes.

    python tests/chain.py                 # prepares the data, trains what is not there yet, prints the table
    python tests/chain.py --seed=1        # another run of all stages, in out/shapes_*_1

What is found is kept for each seed in chain.json, and the means are written into README.md. Captions, answers and
preferences are about the test pictures, which show held-out combinations only; a caption may be plain or begin with
"there is". The text loss is that of conversations without a picture.
"""
import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import config


@dataclass
class Settings:
    """Which run of the stages."""
    seed: int = 1337  # [0, inf) of the weights and of the order of the data


if __name__ == "__main__":  # a typo is told before torch is imported
    settings = config.run(config.load, Settings)

import numpy as np
import torch

import records

import common
import runs
import train
import vlm
from prepare import images, shards
from prepare.shapes import SIDE
from scores import agree

SCENES = {"text": 8000, "align": 16000, "instruct": 16000, "prefer": 2500}  # to learn from in each stage, in order
FORMS = {"minutes": ".1f", "margin": ".2f", "text loss": ".4f"}  # of other columns: a share, in per cent
COLUMNS = "minutes", "captions", "answers", "blank", "wrong picture", "pairs", "margin", "plain", "text loss"
KEPT = ROOT / "tests/chain.json"
MARKS = "<!-- chain: written by tests/chain.py -->\n", "<!-- end of the chain -->\n"


def train_stages(seed):
    """Prepare and train what is not there yet, going on where it stopped -> {stage: (its run's directory, minutes)}."""
    done, before = {}, []
    for stage, scenes in SCENES.items():
        script, keys = ("vlm.py", "vlm.py:VlmConfig") if before else ("train.py", train.KEYS)
        file, out = f"config/shapes_{stage}.py", ROOT / f"out/shapes_{stage}_{seed}"
        if not (ROOT / f"data/shapes_{stage}/meta.json").is_file():
            prepare = ["prepare/shapes.py", f"--stage={stage}", f"--images={scenes}"]
            subprocess.run([sys.executable, *prepare], cwd=ROOT, check=True)
        given, _ = config.load(keys, [str(ROOT / file)], config.SHAPE)
        log = runs.read_log(out / "log.jsonl")
        if not log or log[-1]["step"] < given["max_iters"]:
            begin = ["--init_from=resume"] if runs.latest(out) else [file, f"--seed={seed}", *before]
            with subprocess.Popen([sys.executable, script, *begin, f"--out_dir={out}"], cwd=ROOT) as training:
                pass  # not subprocess.run, which kills what Ctrl-C has told to save
            if training.returncode:
                sys.exit(training.returncode)
            log = runs.read_log(out / "log.jsonl")
        done[stage], before = (out, log[-1]["seconds"] / 60), [f"--init_from={out}"]
    return done


def see(directory, device):
    """The scores of a Llama that sees, {column: number}."""
    cfg = vlm.VlmConfig(batch_size=64, sample_tokens=40)
    model, tok = vlm.open_run(directory)
    run = vlm.Runner(cfg, model, tok, device, common.pick_dtype("auto", device)[0])
    pairs, = run.read(images.load(ROOT / "data/shapes_prefer", "test"))
    chosen, rejected = run.log_probs(pairs, np.arange(len(pairs)))
    found = {"pairs": (chosen > rejected).float().mean(), "margin": (chosen - rejected).mean()}
    data, = run.read(images.load(ROOT / "data/shapes_instruct", "test"))
    rows = [row for row in data.questions() if row.pictures]
    captions, answers = ([row for row in rows if row.kind == kind] for kind in ("caption", "answer"))
    said = run.answers(captions)
    found |= {"captions": agree(said, captions), "answers": agree(run.answers(answers), answers)}
    found["plain"] = np.mean([text == row.answers[0] for text, row in zip(said, captions)])
    pictures, n = run.pictures, len(run.pictures.names)
    blank = model.encoder.cut(np.full((SIDE, SIDE, 3), 128, np.uint8))[0].to(device)
    for column, others in (("wrong picture", lambda which: pictures([(i + n // 2) % n for i in which])),
                           ("blank", lambda which: torch.cat([blank] * len(which)))):
        run.pictures = others
        found[column] = agree(run.answers(answers[::4]), answers[::4])
    return found


def text_loss(directory, device):
    """Nats per token of the answers in conversations without a picture."""
    cfg = train.TrainConfig(dataset="shapes_text", init_from=str(directory), block_size=64, eval_only=True)
    task = train.Text(cfg, {}, directory, device)
    return task.val_loss(task.model)


def table(seeds):
    """[{stage: {column: number}}, ...], one of each seed, as a table of means and deviations."""
    lines = ["| stage | " + " | ".join(COLUMNS) + " |", "|---" * (1 + len(COLUMNS)) + "|"]
    for stage in SCENES:
        cells = []
        for column in COLUMNS:
            values, form = [found[stage][column] for found in seeds if column in found[stage]], FORMS.get(column, ".1%")
            deviation = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 and column != "minutes" else ""
            cells.append(f"{statistics.mean(values):{form}}{deviation}" if values else "")
        lines.append(f"| {stage} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def readme(kept):
    """What README says of chain.json."""
    machine, count = kept["machine"], len(kept["seeds"])
    what = f"Mean ± deviation of {count} seeds" if count > 1 else "One seed"
    return (f"{table([*kept['seeds'].values()])}\n{what}, on {records.machine(machine)}, "
            f"{machine['date'].split()[0]}.\n")


def main(cfg):
    device, begin = common.pick_device("auto"), time.monotonic()
    done = train_stages(cfg.seed)
    print(f"{(time.monotonic() - begin) / 60:.1f} minutes for what was not there yet")
    found = {}
    for stage, (out, minutes) in done.items():
        found[stage] = {"minutes": minutes, "text loss": text_loss(out, device)}
        found[stage] |= {} if stage == "text" else see(out, device)
        found[stage] = {column: float(number) for column, number in found[stage].items()}
    print("\n" + table([found]), end="")
    kept = json.loads(KEPT.read_text()) if KEPT.exists() else {"seeds": {}}
    kept["machine"] = records.facts_of_machine(device.type)
    kept["seeds"][str(cfg.seed)] = found
    shards.write_text(KEPT, json.dumps(kept, indent=1) + "\n")
    records.write_readme(readme(kept), MARKS)


if __name__ == "__main__":
    config.run(main, settings)
