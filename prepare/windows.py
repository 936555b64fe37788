"""How a split is cut into windows and in which order they are drawn: a pure function of the seed and a counter. At
the end of the file: how continuations of one text share a row.

There is no loader state to save or to lose: resuming is exact, and the order does not depend on the number of
processes, each of which takes its own rows of a step's batch.
"""
import bisect
import heapq
from functools import lru_cache

import numpy as np

import config
from prepare.shards import LEARN, START


def rng_for(seed, *counters):
    """A generator that depends on these integers alone."""
    return np.random.default_rng([seed, *counters])


@lru_cache(maxsize=2)
def order(seed, epoch, length):
    """The numbers of the examples of an epoch, in drawing order."""
    return rng_for(seed, 2, epoch).permutation(length)


def places(split, condition):
    """Where the condition holds for an element of a split, which is read by pieces."""
    return np.concatenate([i + np.flatnonzero(condition(split[i:i + 2**24])) for i in range(0, len(split), 2**24)])


class Windows:
    """A split cut into windows of at most block_size + 1 tokens; neighbours share one token, the first's last target.

    They lie side by side wherever they fall, in training from an offset that changes with each epoch; or, with
    cfg.whole_docs, each begins with a document and holds as many whole ones as fit (longer ones are cut).
    """

    def __init__(self, split, cfg, bos_id=None):
        self.split, self.cfg, self.bos_id, self.epochs = split, cfg, bos_id, {}
        self.packed_spans, self.packing_efficiency = None, 1.0  # the share of block_size that targets fill
        self.per_epoch = len(split) // cfg.block_size - 1
        if cfg.whole_docs:
            begins = places(split, lambda ids: ids == bos_id)
            if not len(begins):
                raise config.Mistake(f"whole_docs: no document in {split.directory} begins with BOS; leave it out")
            self.packed_spans = self.pack([*begins.tolist(), len(split)])
            self.packing_efficiency = float((np.diff(self.packed_spans).mean() - 1) / cfg.block_size)
            self.per_epoch = len(self.packed_spans)

    def pack(self, edges):
        """[start, end) of windows over the documents between these edges, (n, 2)."""
        spans, start, end = [], edges[0], edges[0]
        for edge in edges[1:]:
            if edge - start > self.cfg.block_size + 1 and end > start:
                spans.append((start, end))
                start = end
            while edge - start > self.cfg.block_size + 1:
                spans.append((start, start + self.cfg.block_size + 1))
                start += self.cfg.block_size
            end = edge
        return np.array([*spans, (start, end)])

    def in_order(self):
        """[start, end) of windows that hold each token of the split but the first as a target once, (n, 2)."""
        return self.spans_from(0, len(self.split) - 1)

    def spans_from(self, first, last):
        """[start, end) of the packed windows, or else of those that begin at first, first + block_size, ... < last."""
        if self.packed_spans is not None:
            return self.packed_spans
        starts = np.arange(first, last, self.cfg.block_size)
        return np.stack((starts, np.minimum(starts + self.cfg.block_size + 1, len(self.split))), 1)

    def epoch(self, number):
        """[start, end) of an epoch's windows in drawing order, (n, 2)."""
        if number not in self.epochs:
            T, rng = self.cfg.block_size, rng_for(self.cfg.seed, 0, number)
            offset = rng.integers(T) if self.packed_spans is None else 0
            self.epochs = {number: rng.permutation(self.spans_from(offset, len(self.split) - T))}  # the last is enough
        return self.epochs[number]

    def draw(self, first, count):
        """[start, end) of `count` windows from the one numbered `first` over all epochs, (count, 2)."""
        index = np.arange(first, first + count)
        return np.stack([self.epoch(int(i // self.per_epoch))[i % self.per_epoch] for i in index])

    def targets(self):
        """Targets of all windows in order."""
        return int((np.diff(self.in_order()) - 1).sum())

    def empty(self, count):
        """Inputs and targets of `count` windows without any token, (count, block_size) int64 each."""
        shape = count, self.cfg.block_size
        return np.zeros(shape, np.int64), np.full(shape, -100, np.int64)

    def read(self, spans):
        """Inputs, targets and positions of these windows, (len(spans), block_size) int64 each. Targets that do not
        count are -100; positions are None where they run through."""
        x, y = self.empty(len(spans))
        for row, (start, end) in enumerate(spans):
            if end > start:
                ids = self.split[start:end]
                x[row, :len(ids) - 1], y[row, :len(ids) - 1] = ids[:-1], ids[1:]
        return x, y, document_positions(np.where(y == -100, -1, x), self.bos_id) if self.cfg.doc_mask else None


class Conversations(Windows):
    """Windows of whole conversations, as many as fit, of which only what is marked is learned. Positions begin again
    at 0 with each, so that none sees another. A span [first, end) counts conversations in the order of `order`.

    Raises `Mistake` for a conversation that is longer than block_size + 1: the last token is only a target."""

    def __init__(self, split, cfg):
        self.split, self.cfg, self.epochs = split, cfg, {}
        self.edges = np.append(places(split.marks, lambda marks: marks & START), len(split))  # of the conversations
        sizes = np.diff(self.edges) - 1
        if sizes.max() > cfg.block_size:
            raise config.Mistake(f"the longest conversation has {sizes.max() + 1} tokens: give --block_size="
                                 f"{-(-sizes.max() // 64) * 64}, or cut it with prepare/chat.py --longest="
                                 f"{cfg.block_size}")
        rows = best_fit(sizes.tolist(), cfg.block_size)
        self.order = np.concatenate(rows)
        ends = np.cumsum([len(row) for row in rows])
        self.packed_spans = np.stack((np.append(0, ends[:-1]), ends), 1)
        self.packing_efficiency = float(sizes.sum() / (len(rows) * cfg.block_size))
        self.per_epoch = len(rows)

    def targets(self):
        return len(places(self.split.marks, lambda marks: marks & LEARN))

    def example(self, number):
        """(ids, whether each is learned) of a conversation, int64 and bool (n,)."""
        start, end = self.edges[number:number + 2]
        return self.split[start:end].astype(np.int64), (self.split.marks[start:end] & LEARN).astype(bool)

    def read(self, spans):
        x, y = self.empty(len(spans))
        positions = np.zeros_like(x)
        for row, (first, end) in enumerate(spans):
            at = 0
            for number in self.order[first:end]:
                ids, learned = self.example(number)
                place = row, slice(at, at + len(ids) - 1)
                x[place], y[place] = ids[:-1], np.where(learned, ids, -100)[1:]
                positions[place] = np.arange(len(ids) - 1)
                at += len(ids) - 1
            positions[row, at:] = np.arange(self.cfg.block_size - at)  # padding, as one more conversation
        return x, y, positions


def windows_of(split, cfg, bos_id=None):
    """The windows of a split: of text, or of conversations where it has marks."""
    return Windows(split, cfg, bos_id) if split.marks is None else Conversations(split, cfg)


def best_fit(sizes, room):
    """Put things of these sizes into rows of this room: the largest first, each into the fullest row that has room for
    it (best fit decreasing). Returns the numbers of the things in each row, a list of lists."""
    rows = [[] for _ in sizes]  # more than are needed
    free, lefts = {room: list(range(len(rows)))}, [room]  # {room left: heap of rows}, sorted keys
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        at = bisect.bisect_left(lefts, sizes[i])
        left = lefts[at]
        row = heapq.heappop(free[left])
        rows[row].append(i)
        if not free[left]:
            del free[lefts.pop(at)]
        left -= sizes[i]
        if left not in free:
            free[left] = []
            bisect.insort(lefts, left)
        heapq.heappush(free[left], row)
    return [row for row in rows if row]


def document_positions(x, bos_id):
    """Positions (B, T) that begin again at 0 with each document of x (at each BOS, and at the window's start)."""
    at = np.arange(x.shape[1])
    return at - np.maximum.accumulate(np.where(x == bos_id, at, 0), axis=1)


# -- texts that begin alike --------------------------------------------------------------------------------------

class Continuations:
    """A text and continuations of it as one row of tokens (or several such, one after the other): the text once, then
    each continuation but for its last token, which predicts nothing.

    ids, positions: (T,); positions jump back where another continuation begins (see `Decoder.masks` in model.py).
    source, target: where each token of the continuations is predicted, and that token. sizes: their numbers of tokens.
    """

    def __init__(self):
        self.ids, self.positions, self.source, self.target, self.sizes = [], [], [], [], []

    def add(self, text, continuations):
        """Append a text (ids), and continuations that share it."""
        last = len(self.ids) + len(text) - 1
        self.ids += text
        self.positions += range(len(text))
        for ids in continuations:
            self.source += [last, *range(len(self.ids), len(self.ids) + len(ids) - 1)][:len(ids)]
            self.target += ids
            self.sizes.append(len(ids))
            self.ids += ids[:-1]
            self.positions += range(len(text), len(text) + len(ids) - 1)


def stack(rows):
    """Some `Continuations` as `Llama.losses` takes them: ids, positions (B, T), source, target (M,) int64; and the
    sizes of all continuations."""
    T = max(len(row.ids) for row in rows)
    ids, positions = np.zeros((2, len(rows), T), np.int64)  # padding sees itself alone
    for i, row in enumerate(rows):
        ids[i, :len(row.ids)], positions[i, :len(row.ids)] = row.ids, row.positions
    source = [i * T + place for i, row in enumerate(rows) for place in row.source]
    target, sizes = ([n for row in rows for n in getattr(row, name)] for name in ("target", "sizes"))
    return ids, positions, *(np.array(numbers, np.int64) for numbers in (source, target, sizes))
