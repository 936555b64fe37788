"""What a model is worth: its loss on held-out text, the endings of HellaSwag that it finds likeliest, and answers and
captions beside those that people gave (exact matches, CIDEr-D, BLEU-4)."""
import math
import re
import time
import unicodedata

import numpy as np
import torch
from tqdm import tqdm

from common import RANK, WORLD, IdleThreads, all_reduce_sum, print0, to_device
from prepare import hellaswag
from prepare.windows import stack


# -- loss --------------------------------------------------------------------------------------------------------

def track(batches, what, total=None, delay=0):
    """The batches, with a bar on the first process, once they take longer than `delay` seconds."""
    return tqdm(batches, what, total, unit="batch", leave=False, delay=delay, disable=RANK > 0)


@torch.no_grad()
def evaluate(model, batches, device, autocast):
    """The mean of model(*args)[1] over batches [(count, args), ...], weighted by count, over all processes."""
    was_training, total, targets = model.training, 0.0, 0
    model.eval()
    with IdleThreads(device) as threads:
        for count, args in batches:
            begin = time.perf_counter()
            with autocast:
                loss = model(*to_device(device, *args))[1].item()
            total += loss * count
            targets += count
            threads.adapt(time.perf_counter() - begin)
    model.train(was_training)
    total, targets = all_reduce_sum(total, targets)
    return total / targets


def eval_spans(windows, device, limit=0):
    """[start, end) of the windows of a split that this process evaluates, (n, 2).

    limit: take about this many tokens, spread evenly and always the same; 0: each token but the first, exactly once.
    """
    cfg, spans = windows.cfg, windows.in_order()
    wanted = -(-limit // cfg.block_size) if limit else len(spans)
    if wanted < len(spans):
        spans = spans[np.linspace(0, len(spans) - 1, wanted).astype(int)]
    # All processes need the same number of batches, since those that share a model compute together. What is missing
    # is filled with (0, 0), which has no target. On a GPU all batches are full: a smaller one would be compiled anew.
    multiple = WORLD * (cfg.batch_size if device.type == "cuda" else 1)
    filler = np.zeros((-len(spans) % multiple, 2))
    return np.concatenate((spans, filler)).astype(int)[RANK::WORLD]


def micro_batch(windows, spans):
    """(targets, (x, y, positions)) of these windows, as `evaluate` and `fit` take them."""
    x, y, positions = windows.read(spans)
    return int((y != -100).sum()), (x, y, positions)


def eval_batches(windows, spans):
    """A `micro_batch` of cfg.batch_size windows after the other, each read when it is asked for."""
    for i in range(0, len(spans), windows.cfg.batch_size):
        yield micro_batch(windows, spans[i:i + windows.cfg.batch_size])


def bits_per_byte(loss, windows):
    """Nats per token over these windows -> bits per byte of the text, which does not depend on the tokenizer."""
    return loss / math.log(2) * windows.targets() / windows.split.bytes


# -- HellaSwag ---------------------------------------------------------------------------------------------------

@torch.no_grad()
def log_likelihoods(model, rows, device, tokens):
    """Log-probability in nats of each ending of HellaSwag after its context: a list of floats for each row.

    rows: of `hellaswag.rows`; tokens: positions of a batch, whose rows have similar lengths. Each process computes its
    share of the batches, and leaves None for the other rows."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i].ids))  # what takes most memory comes first
    batches, scores, was_training = [], [None] * len(rows), model.training
    while order:
        count = max(tokens // len(rows[order[0]].ids), 1)
        batches.append(order[:count])
        order = order[count:]
    mine = range(RANK, -(-len(batches) // WORLD) * WORLD, WORLD)  # as many for each: they may share one model
    model.eval()
    for number in track(mine, "HellaSwag", len(mine)):
        batch = batches[number % len(batches)]
        part = [rows[i] for i in batch]
        *arrays, sizes = stack(part)
        nats = model.losses(*to_device(device, *arrays)).cpu().double().split(sizes.tolist())
        sums = iter([-ending.sum().item() for ending in nats])
        if number < len(batches):  # else a batch that was repeated, to have as many as the others
            for i, row in zip(batch, part):
                scores[i] = [next(sums) for _ in row.sizes]
    model.train(was_training)
    return scores


class HellaSwag:
    """The scores of a model on HellaSwag, of which each process takes a share.

    Reads and tokenizes the items at once, so that what is wrong with them shows before a long run."""

    def __init__(self, cfg, tok, context):
        self.items = hellaswag.load(cfg.hellaswag_items)
        self.rows = hellaswag.rows(self.items, tok, context)
        self.tokens = cfg.batch_size * cfg.block_size

    def __call__(self, model, device, autocast):
        """{name: value} for the log."""
        tokens = 256 if device.type == "cpu" else self.tokens  # what stays in cache, or fits in memory
        with autocast:
            scores = log_likelihoods(model, self.rows, device, tokens)
        count = len(self.items)
        acc, norm = (right / count for right in all_reduce_sum(*hellaswag.correct(self.items, scores)))
        error = [math.sqrt(p * (1 - p) / max(count - 1, 1)) for p in (acc, norm)]
        print0(f"hellaswag acc {acc:.4f} ± {error[0]:.3f}  acc_norm {norm:.4f} ± {error[1]:.3f}  "
               f"over {count:,} items")
        return {"hellaswag_acc": acc, "hellaswag_acc_norm": norm, "hellaswag_items": count}


# -- answers and captions ----------------------------------------------------------------------------------------

MARKS = "".join(c for c in map(chr, range(0x300, 0xfe00)) if unicodedata.category(c)[0] == "M")  # which \w has not
CHAR = rf"[\w{MARKS}]"  # of a word, with its accents and vowel signs
WORD = re.compile(rf"""
    (?<!\w)[-+]?\d*(?:[.,:]\d+)+ | (?<![\w)-])[-+]\d+\b                         # 3.5 1,000 10:30 .5, -5 +3
    | (?:[^\W\d_]\.){{2,}} | (?:mr|mrs|ms|dr|st|jr|vs)\.(?=\s+\S)               # u.s., abbreviations keep their period
    | can(?=not\b) | {CHAR}+?(?=n't\b) | n't\b | '(?:s|re|ve|ll|d|m)\b | 'n\b'?  # can not, do n't, it 's, rock 'n' roll
    | {CHAR}+(?:(?:[-/]|(?<=\b[dlno])'(?=\w\w)|(?<=[aeiouy])'(?=[aeiou])){CHAR}+)*  # t-shirt, black/white, o'clock
    | [^\w\s\u200b-\u200d\u2060\ufe00-\ufe0f\ufeff]                             # and each sign that is seen
""", re.VERBOSE)
QUOTES = str.maketrans("\u2018\u2019\u201c\u201d", "''\"\"")
PUNCTUATION = set("'\"`.?!,:-;\u2026\u2013\u2014\u00ab\u00bb")  # what pycocoevalcap does not count
BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}  # which it does


def words(text):
    """The words of a caption, as the Penn Treebank's rules and pycocoevalcap's list of punctuation leave them, joined
    by spaces. Its own tokenizer is a Java program; of 66,169 captions of Flickr8k and COCO all but 40 come out alike.
    """
    found = WORD.findall(unicodedata.normalize("NFC", text.lower()).translate(QUOTES))
    return " ".join(BRACKETS.get(w, w) for w in found if w not in PUNCTUATION)


def loosely(text):
    """A caption as it is compared: lower case, without punctuation and signs (and what an emoji leaves), single spaces.
    """
    kept = (" " if unicodedata.category(c)[0] in "PS" else c for c in unicodedata.normalize("NFC", text.lower()))
    return " ".join(word for word in "".join(kept).split() if any(map(str.isalnum, word)))


def strictly(text):
    """An answer as it is compared: lower case, single spaces, without a last period. Signs mean something: -5, C++."""
    return re.sub(r"(?<=[^.])\.$", "", " ".join(unicodedata.normalize("NFC", text.lower()).split()))


def agrees(text, row):
    """Is the text one of the row's answers?"""
    forms = [loosely if row.kind == "caption" and loosely(answer) else strictly for answer in row.answers]
    return any(form(text) == form(answer) for form, answer in zip(forms, row.answers))


def agree(texts, rows):
    """Share of texts that are one of their row's answers; NaN where there are none."""
    return sum(map(agrees, texts, rows)) / len(rows) if len(rows) else math.nan


def caption_scores(pairs):
    """CIDEr-D (arXiv:1411.5726) and BLEU-4 of (text, row) pairs by pycocoevalcap; what cannot be scored is said."""
    try:
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
    except ImportError:
        print0("for CIDEr-D and BLEU-4: pip install pycocoevalcap")
        return {}
    scored = [(words(text), list(filter(None, map(words, row.answers)))) for text, row in pairs]
    scored = [(text, answers) for text, answers in scored if answers]
    if len(scored) < len(pairs):
        print0(f"{len(pairs) - len(scored):,} of {len(pairs):,} pictures have no caption with words to compare with")
    if not scored:
        return {}
    said = {i: [text] for i, (text, _) in enumerate(scored)}
    meant = {i: answers for i, (_, answers) in enumerate(scored)}
    found = {"BLEU-4": Bleu(4).compute_score(meant, said, verbose=0)[0][3]}
    if len(scored) < 2:  # it weighs words by how few pictures have them
        print0("CIDEr-D needs captions of two pictures at least")
        return found
    return {"CIDEr-D": float(Cider().compute_score(meant, said)[0])} | found


def measured(texts, rows):
    """{name: value} of the model's texts for these rows: the share of each kind that is exact, and captions' scores."""
    found = {}
    for kind in sorted({row.kind for row in rows}):
        pairs = [(text, row) for text, row in zip(texts, rows) if row.kind == kind]
        found[f"{kind} exact"] = agree(*zip(*pairs))
        if kind == "caption":
            found |= caption_scores(pairs)
    return found
