"""Learn from feedback on answers: a reward for each (GRPO), or which of two is better (DPO). The loop is train.py's.

    python feedback.py config/quiz_grpo.py                  its own answers, rewarded where they are right
    python feedback.py config/quiz_dpo.py                   pairs of a right and a wrong answer
    python feedback.py --eval_only --init_from=out/quiz     how many of all validation questions it answers

Of train.py's keys, epochs, doc_mask, whole_docs, hellaswag, head_copy and shard are refused; block_size, model,
eval_tokens, sample_tokens and hellaswag_items are without effect.

GRPO, on policy: for each question the model draws a group of answers; one that earns more than the mean of its group
becomes likelier, one that earns less becomes rarer. Each answer is used once, so nothing has to be clipped, and there
is no reference model. Letters in shapes: B rows, T positions, n answers, M tokens that are learned.

Sources: GRPO, DeepSeekMath (arXiv:2402.03300); the mean over tokens, DAPO (2503.14476); DPO (2305.18290).
"""
import copy
import itertools
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import NamedTuple

import config

KEYS = "feedback.py:FeedbackConfig"

if __name__ == "__main__":  # before torch is imported: a typo answers at once
    settings = config.run(config.load, KEYS, None, config.SHAPE)

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import adapter
import common
import runs
import train
from common import RANK, WORLD, print0
from decode import decode_all
from prepare import chat, sources
from prepare.quiz import grade
from prepare.windows import Continuations, order, rng_for, stack


@dataclass
class FeedbackConfig(train.TrainConfig):
    """How to learn from feedback; batch_size counts questions (or pairs)."""
    dataset: str = "quiz"  # folder under data/ (or a path) with conversations in train.jsonl and val.jsonl
    out_dir: str | None = None  # where the run is kept; None: out/feedback_<dataset>
    objective: str = "grpo"  # {grpo, dpo} grpo draws answers and rewards them; dpo compares two that are given
    group: int = 8  # [2, inf) answers to one question: some must be right and some wrong to teach anything
    baseline: str = "mean"  # {mean, zero} is taken off a reward: its group's mean; zero: learn right answers alone
    reward: str = "right"  # {right, random} random is the control, which must gain nothing
    answer_tokens: int = 16  # [1, inf) longest answer
    eval_questions: int = 1000  # [1, inf) validation questions answered greedily at each evaluation
    beta: float = 0.1  # (0, 1000] DPO's strength of the tie to the reference model; its authors'
    reference: str | None = None  # DPO's reference model; None: what the run starts from
    unused, text_only = ("block_size", "shard"), train.TEXT_ONLY


class Question(NamedTuple):
    """What a model is asked."""
    turns: list  # messages, up to the answer
    answer: str
    wrong: str | None = None  # a wrong answer, if the data has one
    place: str = ""  # where it stands: file, line and number
    tools: list | None = None  # JSON schemas

    def given(self):
        """What the chat template gets beside messages; with today's date a run would not go on as it began."""
        return {"tools": self.tools, "date": chat.Settings.date}

    def mistakes(self):
        """A block whose mistakes name this question."""
        return config.mistakes(config.Mistake, prefix=f"{self.place}: ")


def question_of(record):
    """The first question of a record whose answer is to be learned: a conversation as prepare/chat.py reads it, and
    "wrong": an answer to this one, or a list of one to each, learned or not. Raises ValueError."""
    turns, learn, tools = chat.conversation_of(record)
    n = learn.index(True) if any(learn) else None
    if n is None or not turns[n].get("content", "").strip():
        raise ValueError("it has no answer in words")
    if turns[n].get("tool_calls"):
        raise ValueError("its first answer calls a tool, too: here words alone are learned")
    if not "".join(turn.get("content", "") for turn in turns[:n][-1:]).strip():
        raise ValueError("nothing is asked before its first answer")
    wrong = record.get("wrong")
    if isinstance(wrong, list):
        wrong = dict(enumerate(wrong)).get(sum(turn["role"] == "assistant" for turn in turns[:n]))
    if not isinstance(wrong, str | None):
        raise ValueError(f"its wrong answer is a text, or a list of one to each answer, not {str(wrong)[:40]!r}")
    return Question(turns[:n], turns[n]["content"], wrong, tools=tools)


def read_questions(folder, split):
    """The first question of each line of <split>.jsonl."""
    path, questions = folder / f"{split}.jsonl", []
    with config.mistakes(OSError, prefix=f"cannot read {path}: "):
        for _, place, record in sources.Files([path]).read():
            with config.mistakes(ValueError, TypeError, AttributeError, prefix=f"{place}: "):
                questions.append(question_of(record)._replace(place=place))
    if not questions:
        raise config.Mistake(f"{path} asks nothing")
    return questions


# -- objectives --------------------------------------------------------------------------------------------------

class Answers(nn.Module):
    """A Llama and what becomes of its answers: `forward` returns loss_of(nats of each answer (n,), what belongs to
    them), which is (any, loss) where it learns."""

    def __init__(self, llama, loss_of):
        super().__init__()
        self.llama, self.loss_of = llama, loss_of

    def forward(self, idx, positions, source, target, sizes, given=None):
        """Arguments from `stack`: prompts, each followed by answers to it."""
        nats = self.llama.losses(idx, positions, source, target)  # (M,)
        answer = torch.arange(len(sizes), device=idx.device).repeat_interleave(
            sizes, output_size=len(source))  # (M,) the answer that a token belongs to
        return self.loss_of(torch.zeros(len(sizes), device=idx.device).index_add(0, answer, nats), given)


def policy_loss(nats, weights):
    """The policy gradient's loss, for weights (n,): advantage / all tokens drawn in the micro-batch."""
    return None, (nats * weights).sum()


def preference(log_probs, reference, beta):
    """DPO's margins (B,) and loss, from log-probabilities (2, B) of chosen and rejected answers, both models'."""
    gain = log_probs - reference
    margins = beta * (gain[0] - gain[1])
    return margins, -F.logsigmoid(margins).mean()


# -- what is trained ---------------------------------------------------------------------------------------------

class Feedback:
    """A Llama and the questions that it answers: what `train.fit` trains. Its heirs say what is learned from them."""

    def __init__(self, cfg, shape, out, device):
        self.cfg, self.device, self.floor = cfg, device, None
        self.folder = runs.folder_of(cfg)
        self.dtype, self.why_dtype = common.agreed_dtype(cfg.dtype, device)
        self.autocast = common.autocast_to(self.dtype, device)
        self.questions, self.val = (read_questions(self.folder, split) for split in ("train", "val"))
        self.llama, self.tok = train.start_from(cfg, shape, out, train.Place(cfg, device, self.dtype))
        train.need_shape(self.llama.config, shape)
        self.llama.to(device).train().model.checkpointing = cfg.checkpointing
        adapter.name_ends(self.llama, self.tok)
        drawn = 0 if cfg.eval_only else min(cfg.max_iters * train.sequences_per_step(cfg), len(self.questions))
        for question in (*map(self.question, range(drawn)), *self.val[:cfg.eval_questions]):
            self.check_room(question)
        self.flops_per_token = self.llama.flops_per_token(len(self.prompt(self.questions[0])))
        self.train_fingerprint, digest = runs.digests_of(self.folder)
        self.val_fingerprint = [digest, cfg.eval_questions, cfg.objective]
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
        with question.mistakes():
            return self.tok.chat(question.turns, **question.given())

    def check_room(self, question):
        """Refuse a question that, with an answer of answer_tokens or one of its own, is beyond the model's context."""
        context, most = self.llama.config.context, self.cfg.answer_tokens
        turns = [*question.turns, {"role": "assistant", "content": question.answer + (question.wrong or "")}]
        with question.mistakes():  # a token has a byte at least: most texts need no cutting, which takes longer
            if len(self.tok.render(turns, False, **question.given()).encode()) + most <= context or (
                    len(self.tok.chat(turns, False, **question.given())) + most <= context):
                return
        size = len(self.prompt(question))
        most = max(most, *(len(self.ids_of(question, a)) for a in (question.answer, question.wrong) if a))
        if size + most > context:
            raise config.Mistake(f"{question.place}: a question of {size} tokens leaves no room for {most} more in the "
                                 f"model's context={context}")

    def ids_of(self, question, answer):
        """The ids that the template makes of an answer to this question, with its end: all that follows the prompt,
        wherever the template's mark begins."""
        turns, prompt = [*question.turns, {"role": "assistant", "content": answer}], self.prompt(question)
        with question.mistakes():
            ids, learned = self.tok.lesson(turns, [False] * len(question.turns) + [True], **question.given())
            if ids[:len(prompt)] != prompt:
                raise config.Mistake("the prompt has other ids when the answer follows it, in this chat template")
        return ids[len(prompt):max((n + 1 for n, learn in enumerate(learned) if learn), default=0)]

    def rows(self, prompts, answers):
        """`Continuations` of each prompt (ids), for answers to each: in one row where the prompt is longer than they
        are together; else each has its own, which then has less to attend to."""
        rows = []
        for prompt, some in zip(prompts, map(list, answers)):
            shared = len(prompt) > sum(map(len, some))
            for together in [some] if shared else [[answer] for answer in some]:
                rows.append(Continuations())
                rows[-1].add(prompt, together)
        return rows

    def answer(self, prompts, temperature, seed=0):
        """Answers (ids with their end) to these prompts."""
        self.llama.eval()
        rows = max(64, 2**16 // (max(map(len, prompts)) + self.cfg.answer_tokens))  # at a time: so much cache
        with self.autocast:
            answers = decode_all(self.llama, prompts, self.cfg.answer_tokens, rows, seed, temperature=temperature,
                                 stop_ids=self.tok.stop_ids)
        self.llama.train()
        return answers

    def text(self, ids):
        """An answer as text, without its end."""
        return self.tok.decode([i for i in ids if i not in self.tok.stop_ids])

    @torch.no_grad()
    def knows(self, questions):
        """Of each question, whether every token of its answer, as the template writes it, is the likeliest after those
        before it: then greedy decoding gives it. One pass over all, without decoding."""
        rows = self.rows(map(self.prompt, questions), ([self.ids_of(q, q.answer)] for q in questions))
        known = np.ones(len(rows), bool)
        self.llama.eval()
        by_length = np.argsort([len(row.ids) for row in rows])
        for i in range(0, len(rows), 32):
            some = by_length[i:i + 32]
            idx, _, source, target, _ = common.to_device(self.device, *stack([rows[n] for n in some]))
            with self.autocast:
                likeliest = self.llama.lm_head(self.llama.model(idx)[0].flatten(0, 1)[source]).argmax(-1)
            known[some[(source[likeliest != target] // idx.shape[1]).cpu()]] = False
        self.llama.train()
        return known

    def accuracy(self):
        """The share of validation questions answered rightly, greedily; prints some, and shares by first word."""
        mine = self.val[:self.cfg.eval_questions][RANK::WORLD]
        right, words = self.knows(mine), defaultdict(list)
        asked = [q.turns[-1]["content"].strip().splitlines()[-1] for q in mine]
        for question, ok in zip(asked, right):
            words[question.split()[0]].append(ok)
        shown = self.answer([self.prompt(q) for q in mine[:3]], temperature=0) if RANK == 0 else []
        for question, ids, q, ok in zip(asked, shown, mine, right):
            print0(f"  | {question} {self.text(ids).strip()} ({'right' if ok else q.answer})")
        print0("  | " + ", ".join(f"{word} {np.mean(oks):.1%} of {len(oks):,}" for word, oks in sorted(words.items())))
        right, count = common.all_reduce_sum(int(right.sum()), len(mine))
        return right / count

    def save(self, directory):
        """Write the model and the tokenizer."""
        adapter.save(self.llama, directory)
        self.tok.save(directory)


class Rewards(Feedback):
    """GRPO."""

    def objective(self):
        sizes = map(len, self.tok.encode_batch([question.answer for question in self.questions]))
        if long := sum(size >= self.cfg.answer_tokens for size in sizes):  # an end comes after them
            print0(f"answers    {long:,} of {len(self.questions):,} are longer than answer_tokens="
                   f"{self.cfg.answer_tokens}, and earn no reward")
        return Answers(self.llama, policy_loss)

    def micro_batch(self, questions, number):
        """(tokens, arrays for `Answers`) of a group of answers to each; those of no advantage only count."""
        cfg = self.cfg
        prompts, asked = [*map(self.prompt, questions)], [q for q in questions for _ in range(cfg.group)]
        answers = self.answer([ids for ids in prompts for _ in range(cfg.group)], temperature=1.0,
                              seed=int(rng_for(cfg.seed, 3, number).integers(2**62)))
        if cfg.reward == "random":
            rewards = rng_for(cfg.seed, 4, number).integers(2, size=len(asked)).astype(np.float32)
        else:
            rewards = np.array([grade(self.text(a), q.answer) for a, q in zip(answers, asked)], np.float32)
        self.mean_reward = float(rewards.mean())
        groups = rewards.reshape(-1, cfg.group)  # (questions, group)
        advantages = groups - groups.mean(1, keepdims=True) if cfg.baseline == "mean" else groups
        teach = advantages != 0
        teach[0, 0] |= not teach.any()  # every process takes the step
        rows = self.rows(prompts, (itertools.compress(answers[i:i + cfg.group], taught)
                                   for i, taught in zip(range(0, len(answers), cfg.group), teach)))
        count = sum(map(len, answers))
        return count, (*stack([row for row in rows if row.sizes]), advantages[teach] / np.float32(count))

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
        if same := [q.place for q in (*self.questions, *self.val) if grade(q.wrong, q.answer)]:
            raise config.Mistake(f"{same[0]}: the wrong answer is the right one (so in {len(same):,} of all)")
        if self.cfg.reference == self.cfg.init_from:
            frozen = copy.deepcopy(self.llama)
        else:  # another model, or on a resume what the run began with
            place = train.Place(self.cfg, self.device, self.dtype)
            frozen, _ = train.load_llama(replace(self.cfg, lora_rank=0), {}, self.cfg.reference, place,
                                         narrow=hasattr(self.llama, "adapter"))
        self.frozen = Answers(frozen.to(self.device).eval(), lambda nats, _: -nats.view(-1, 2).mT)
        return Answers(self.llama, lambda nats, reference: preference(-nats.view(-1, 2).mT, reference, self.cfg.beta))

    def micro_batch(self, questions, number=0):
        """(pairs, arrays for `Answers`): to each question the chosen answer, then the rejected."""
        arrays = stack(self.rows(map(self.prompt, questions),
                                 ([self.ids_of(q, text) for text in (q.answer, q.wrong)] for q in questions)))
        with torch.no_grad(), self.autocast:
            reference = self.frozen(*common.to_device(self.device, *arrays))
        return len(questions), (*arrays, reference)

    @torch.no_grad()
    def evaluate(self, model):
        """{"val_loss": DPO's, ...} for the log: how often the chosen answer gained more, and by how much."""
        sums, mine = np.zeros(4), self.val[:self.cfg.eval_questions][RANK::WORLD]
        model.eval()
        for i in range(0, len(mine), self.cfg.batch_size):
            _, args = self.micro_batch(mine[i:i + self.cfg.batch_size])
            with self.autocast:
                margins = model(*common.to_device(self.device, *args))[0].float()
            sums += [t.sum().item() for t in (-F.logsigmoid(margins), margins > 0, margins)] + [len(margins)]
        model.train()
        *sums, count = common.all_reduce_sum(*sums.tolist())
        loss, gained, margin = (total / count for total in sums)
        accuracy = self.accuracy()
        print0(f"val loss {loss:.4f}  preferred {gained:.4f}  margin {margin:.3f}  answers right {accuracy:.4f}")
        return {"val_loss": loss, "val_preferred": gained, "val_margin": margin, "val_accuracy": accuracy}


def main(given, shape):
    """Train as the settings say; those of a run that goes on hold."""
    if given.get("init_from") == "resume":
        given, shape = train.with_run(given, shape, KEYS, "feedback_")
    elif given.get("eval_only"):  # a run of train.py may have settings that are refused here
        source, only = given.get("init_from", "scratch"), ("dataset", "answer_tokens", "device", "dtype")
        given, shape = train.with_run(given, shape, KEYS, directory=source, only=only)
    cfg = config.make(FeedbackConfig, given)
    if cfg.init_from == "scratch":
        raise config.Mistake("feedback needs a model that answers already: give --init_from")
    if cfg.shard:
        raise config.Mistake("--shard=True is train.py's: feedback has a copy of the model on each process")
    cfg.reference = cfg.reference or cfg.init_from
    if cfg.eval_only:
        with common.in_company():
            device, out = train.begin(cfg, "feedback_")
            task = Rewards(replace(cfg, eval_questions=10**9), shape, out, device)
            print0(f"val accuracy {task.accuracy():.4f} of {len(task.val):,} questions of {task.folder}, "
                   f"by {out if cfg.init_from == 'resume' else cfg.init_from}")
    else:
        train.start({"grpo": Rewards, "dpo": Preferences}[cfg.objective], cfg, shape, "feedback_")


if __name__ == "__main__":
    config.run(main, *settings)
    common.cleanup()
