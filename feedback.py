"""Learn from feedback on answers: a reward for each (GRPO), or which of two is better (DPO). The loop is train.py's.

    python feedback.py config/quiz_grpo.py --init_from=out/quiz     its own answers, rewarded where they are right
    python feedback.py config/quiz_dpo.py --init_from=out/quiz      pairs of a right and a wrong answer

GRPO, on policy: for each question the model draws a group of answers; one that earns more than the mean of its group
becomes likelier, one that earns less becomes rarer. Each answer is used once, so nothing has to be clipped, and there
is no reference model. Letters in shapes: B rows, T positions, M tokens that are learned.

Sources: GRPO, DeepSeekMath (arXiv:2402.03300); the mean over tokens, DAPO (2503.14476); DPO (2305.18290).
"""
import copy
import json
from dataclasses import dataclass, replace

import config

if __name__ == "__main__":  # read the arguments before torch is imported: a typo answers at once
    settings = config.run(config.load, "feedback.py:FeedbackConfig", None, "model.py:LlamaConfig")

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn as nn  # noqa: E402
import torch.nn.functional as F  # noqa: E402

import adapter  # noqa: E402
import common  # noqa: E402
import train  # noqa: E402
from common import RANK, WORLD, print0  # noqa: E402
from decode import decode_all  # noqa: E402
from prepare.quiz import grade  # noqa: E402
from prepare.windows import order, rng_for  # noqa: E402


@dataclass
class FeedbackConfig(train.TrainConfig):
    """How to learn from feedback; batch_size counts questions (or pairs)."""
    dataset: str = "quiz"  # folder under data/ (or a path) with conversations in train.jsonl and val.jsonl
    out_dir: str | None = None  # where the run is kept; None: out/feedback_<dataset>
    objective: str = "grpo"  # "grpo" draws answers and rewards them; "dpo" compares two that are given
    group: int = 8  # [2, inf) answers to one question: some must be right and some wrong to teach anything
    baseline: str = "mean"  # what a reward is compared to: "mean" of its group; "zero" learns right answers alone
    reward: str = "right"  # "right" rewards the right answer; "random" is the control, which must gain nothing
    answer_tokens: int = 16  # [1, inf) longest answer
    eval_questions: int = 1000  # [1, inf) validation questions answered greedily at each evaluation
    beta: float = 0.1  # (0, 1000] DPO's strength of the tie to the reference model; its authors'
    reference: str | None = None  # DPO's reference model; None: what the run starts from

    def __post_init__(self):
        super().__post_init__()
        for name, allowed in (("objective", ("grpo", "dpo")), ("baseline", ("mean", "zero")),
                              ("reward", ("right", "random"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {getattr(self, name)!r}")


@dataclass
class Question:
    """A place in a conversation where the model is to answer."""
    turns: list  # the messages before the answer
    answer: str
    wrong: str | None = None  # a wrong answer, if the data has one


def read_questions(folder, split):
    """The questions of <split>.jsonl, whose lines are {"messages": [...], "wrong": [an answer to each question]}."""
    path, questions = folder / f"{split}.jsonl", []
    with config.mistakes(OSError, ValueError, KeyError, prefix=f"cannot read {path}: "):
        for line in path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            wrong = iter(record.get("wrong", ()))
            for i, message in enumerate(record["messages"]):
                if message["role"] == "assistant":
                    questions.append(Question(record["messages"][:i], message["content"], next(wrong, None)))
    if not questions:
        raise config.Mistake(f"{path} asks nothing")
    return questions


# -- objectives --------------------------------------------------------------------------------------------------

def row_losses(llama, idx, targets):
    """The summed nats of each row's targets, (B,), for idx and targets (B, T), -100 where nothing is learned."""
    source = (targets.flatten() != -100).nonzero().squeeze(1)  # (M,)
    nats = llama.losses(idx, None, source, targets.flatten()[source])  # (M,)
    row = source // idx.shape[1]
    return torch.zeros(len(idx), device=idx.device).index_add(0, row, nats)


class Rewarded(nn.Module):
    """A Llama whose loss is the policy gradient's: nats of each answer times its weight."""

    def __init__(self, llama):
        super().__init__()
        self.llama = llama

    def forward(self, idx, targets, weights):
        """idx, targets (B, T), weights (B,): advantage over the tokens of the micro-batch -> (None, loss)."""
        return None, (row_losses(self.llama, idx, targets) * weights).sum()


def preference(log_probs, reference, beta):
    """DPO's margins (B,) and loss, from the log-probabilities (2, B) of chosen and rejected answers, and those of the
    reference model."""
    gain = log_probs - reference
    margins = beta * (gain[0] - gain[1])
    return margins, -F.logsigmoid(margins).mean()


class Preferred(nn.Module):
    """A Llama whose loss is DPO's."""

    def __init__(self, llama, beta):
        super().__init__()
        self.llama, self.beta = llama, beta

    def forward(self, idx, targets, reference):
        """idx, targets (2B, T): B chosen answers, then B rejected; reference (2, B) -> margins (B,), loss."""
        return preference(-row_losses(self.llama, idx, targets).view(2, -1), reference, self.beta)


# -- what is trained ---------------------------------------------------------------------------------------------

class Feedback:
    """A Llama and the questions that it answers: what `train.fit` trains. Its heirs say what is learned from them."""

    def __init__(self, cfg, shape, out, device):
        self.cfg, self.device, self.floor = cfg, device, None
        self.folder = train.folder_of(cfg)
        self.dtype, self.why_dtype = common.pick_dtype(cfg.dtype, device)
        self.autocast = common.autocast_to(self.dtype, device)
        self.questions, self.val = (read_questions(self.folder, split) for split in ("train", "val"))
        self.llama, self.tok = train.start_from(cfg, shape, out, train.Place(cfg, device, self.dtype))
        self.llama.to(device).train().model.checkpointing = cfg.checkpointing
        self.flops_per_token = self.llama.flops_per_token(len(self.prompt(self.questions[0])))
        self.val_fingerprint = [len(self.val), cfg.eval_questions, cfg.objective]
        self.model = self.objective()

    def describe(self):
        """Print what is trained, on what and how."""
        cfg = self.cfg
        print0(f"model      {self.llama.counts()[0]:,} parameters")
        print0(f"data       {self.folder.name}: {len(self.questions):,} questions, {len(self.val):,} validation")
        print0(f"step       {train.sequences_per_step(cfg)} questions, {cfg.objective}")
        train.print_schedule(self, len(self.questions))

    def batch(self, drawn):
        """This process's micro-batches of the step that begins after `drawn` questions."""
        return [self.micro_batch([self.question(int(n)) for n in row], int(row[0]))
                for row in train.numbers_of_step(self.cfg, drawn)]

    def question(self, number):
        """The question of this number over all epochs, each in an order of its own."""
        epoch, place = divmod(number, len(self.questions))
        return self.questions[order(self.cfg.seed, epoch, len(self.questions))[place]]

    def prompt(self, question):
        """The ids of all that stands before the answer."""
        ids = self.tok.chat(question.turns)
        if len(ids) + self.cfg.answer_tokens > self.llama.config.context:
            raise config.Mistake(f"a question of {len(ids)} tokens leaves no room for {self.cfg.answer_tokens} more in "
                                 f"the model's context={self.llama.config.context}")
        return ids

    def ids_of(self, question, answer):
        """The ids that the template makes of an answer to this question, with its end."""
        turns = [*question.turns, {"role": "assistant", "content": answer}]
        ids, learned = self.tok.lesson(turns, [False] * len(question.turns) + [True])
        return [i for i, learn in zip(ids, learned) if learn]

    def rows(self, prompts, answers):
        """idx, targets (B, T) int64 of prompts and answers, lists of ids: of the answers alone is learned."""
        T = max(len(p) + len(a) for p, a in zip(prompts, answers)) - 1
        idx, targets = np.zeros((len(prompts), T), np.int64), np.full((len(prompts), T), -100)
        for row, (p, a) in enumerate(zip(prompts, answers)):
            idx[row, :len(p) + len(a) - 1] = (p + a)[:-1]
            targets[row, len(p) - 1:len(p) + len(a) - 1] = a
        return idx, targets

    def answer(self, prompts, temperature, seed=0):
        """Answers (ids with their end) to these prompts."""
        self.llama.eval()
        with self.autocast:
            answers = decode_all(self.llama, prompts, self.cfg.answer_tokens, rows=len(prompts), seed=seed,
                                 temperature=temperature, stop_ids=self.tok.stop_ids)
        self.llama.train()
        return answers

    def text(self, ids):
        """An answer as text, without its end."""
        return self.tok.decode([i for i in ids if i not in self.tok.stop_ids])

    def accuracy(self):
        """The share of validation questions that are answered rightly, greedily; prints some."""
        mine = self.val[:self.cfg.eval_questions][RANK::WORLD]
        right = 0
        for i in range(0, len(mine), 64):  # rows that share a cache
            some = mine[i:i + 64]
            texts = [self.text(ids) for ids in self.answer([self.prompt(q) for q in some], temperature=0)]
            right += sum(grade(text, q.answer) for text, q in zip(texts, some))
            for text, q in list(zip(texts, some))[:3 if i == 0 else 0]:
                print0(f"  | {q.turns[-1]['content'].splitlines()[-1]} {text.strip()} "
                       f"({'right' if grade(text, q.answer) else q.answer})")
        right, count = common.all_reduce_sum(right, len(mine))
        return right / count

    def save(self, directory):
        """Write the model and the tokenizer."""
        adapter.save(self.llama, directory)
        self.tok.save(directory)


class Rewards(Feedback):
    """GRPO."""

    def objective(self):
        return Rewarded(self.llama)

    def micro_batch(self, questions, number):
        """(tokens, (idx, targets, weights)): a group of answers to each question; those of no advantage are left out,
        but count."""
        cfg = self.cfg
        asked = [q for q in questions for _ in range(cfg.group)]
        prompts = [ids for ids in map(self.prompt, questions) for _ in range(cfg.group)]
        answers = self.answer(prompts, temperature=1.0, seed=int(rng_for(cfg.seed, 3, number).integers(2**62)))
        if cfg.reward == "random":
            rewards = rng_for(cfg.seed, 4, number).integers(2, size=len(asked)).astype(np.float32)
        else:
            rewards = np.array([grade(self.text(a), q.answer) for a, q in zip(answers, asked)], np.float32)
        self.mean_reward = float(rewards.mean())
        groups = rewards.reshape(-1, cfg.group)  # (questions, group)
        advantages = (groups - groups.mean(1, keepdims=True) if cfg.baseline == "mean" else groups).flatten()
        teach = np.flatnonzero(advantages) if advantages.any() else np.arange(1)
        count = sum(map(len, answers))
        idx, targets = self.rows([prompts[i] for i in teach], [answers[i] for i in teach])
        return count, (idx, targets, advantages[teach] / np.float32(count))

    def evaluate(self, model):
        """{"val_loss": the share of wrong answers, ...} for the log."""
        accuracy = self.accuracy()
        print0(f"val accuracy {accuracy:.4f}  reward of the last answers drawn {self.mean_reward:.3f}")
        return {"val_loss": 1 - accuracy, "val_accuracy": accuracy}


class Preferences(Feedback):
    """DPO."""

    def objective(self):
        if any(q.wrong is None for q in (*self.questions, *self.val)):
            raise config.Mistake(f"{self.folder} has no wrong answers to compare with: DPO takes pairs")
        self.frozen = copy.deepcopy(self.llama)  # on a resume, what the run began with
        if self.cfg.init_from == "resume":
            place = train.Place(self.cfg, self.device, self.dtype)
            self.frozen, _ = train.load_llama(replace(self.cfg, lora_rank=0), {}, self.cfg.reference, place)
        self.frozen.to(self.device).eval().requires_grad_(False)
        return Preferred(self.llama, self.cfg.beta)

    def micro_batch(self, questions, number=0):
        """(pairs, (idx, targets, reference))."""
        answers = [self.ids_of(q, q.answer) for q in questions] + [self.ids_of(q, q.wrong) for q in questions]
        idx, targets = self.rows([*map(self.prompt, questions)] * 2, answers)
        with torch.no_grad(), self.autocast:
            nats = row_losses(self.frozen, *common.to_device(self.device, idx, targets))
        return len(questions), (idx, targets, -nats.view(2, -1))

    @torch.no_grad()
    def evaluate(self, model):
        """{"val_loss": DPO's, ...} for the log: how often the chosen answer gained more, and by how much."""
        margins, mine = [], self.val[:self.cfg.eval_questions][RANK::WORLD]
        model.eval()
        for i in range(0, len(mine), self.cfg.batch_size):
            _, args = self.micro_batch(mine[i:i + self.cfg.batch_size])
            with self.autocast:
                margins.append(model(*common.to_device(self.device, *args))[0].float().cpu())
        model.train()
        margins = torch.cat(margins)
        loss, gained, margin, count = common.all_reduce_sum(
            -F.logsigmoid(margins).sum().item(), (margins > 0).sum().item(), margins.sum().item(), len(margins))
        accuracy = self.accuracy()
        print0(f"val loss {loss / count:.4f}  preferred {gained / count:.4f}  margin {margin / count:.3f}  "
               f"answers right {accuracy:.4f}")
        return {"val_loss": loss / count, "val_preferred": gained / count, "val_margin": margin / count,
                "val_accuracy": accuracy}


def main(given, shape):
    """Train as the settings say; those of a run that goes on hold."""
    if given.get("init_from") == "resume":
        out = train.run_directory(given.get("out_dir"), given.get("dataset", FeedbackConfig.dataset), "feedback_")
        given, shape = train.with_run(given | {"out_dir": str(out)}, shape, out, "feedback.py:FeedbackConfig")
    cfg = config.make(FeedbackConfig, given)
    if cfg.init_from == "scratch":
        raise config.Mistake("feedback needs a model that answers already: give --init_from")
    if cfg.shard:
        raise config.Mistake("--shard=True is train.py's: feedback has a copy of the model on each process")
    cfg.reference = cfg.reference or cfg.init_from
    train.start({"grpo": Rewards, "dpo": Preferences}[cfg.objective], cfg, shape, "feedback_")


if __name__ == "__main__":
    config.run(main, *settings)
    common.cleanup()
