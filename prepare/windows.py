"""How a split is cut into windows and in which order they are drawn: a pure function of the seed and a counter.

There is no loader state to save or to lose: resuming is exact, and the order does not depend on the number of
processes, each of which takes its own rows of a step's batch.
"""
import numpy as np


def rng_for(seed, *counters):
    """A generator that depends on these integers alone."""
    return np.random.default_rng([seed, *counters])


class Windows:
    """A split cut into windows of at most block_size + 1 tokens; neighbours share one token, the first's last target.

    They lie side by side wherever they fall, in training from an offset that changes with each epoch; or, with
    cfg.whole_docs, each begins with a document and holds as many whole ones as fit (longer ones are cut).
    """

    def __init__(self, split, cfg, bos_id=None):
        self.split, self.cfg, self.epochs = split, cfg, {}
        self.packed_spans, self.packing_efficiency = None, 1.0  # the share of block_size that targets fill
        self.per_epoch = len(split) // cfg.block_size - 1
        if cfg.whole_docs:
            begins = np.concatenate([i + np.flatnonzero(split[i:i + 2**24] == bos_id)
                                     for i in range(0, len(split), 2**24)])
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
        if self.packed_spans is not None:
            return self.packed_spans
        return self.side_by_side(np.arange(0, len(self.split) - 1, self.cfg.block_size))

    def side_by_side(self, starts):
        """[start, end) of the windows that begin at `starts`, (n, 2)."""
        return np.stack((starts, np.minimum(starts + self.cfg.block_size + 1, len(self.split))), 1)

    def epoch(self, number):
        """[start, end) of an epoch's windows in drawing order, (n, 2)."""
        if number not in self.epochs:
            T, rng = self.cfg.block_size, rng_for(self.cfg.seed, 0, number)
            spans = self.packed_spans
            if spans is None:
                spans = self.side_by_side(np.arange(rng.integers(T), len(self.split) - T, T))
            self.epochs = {number: rng.permutation(spans)}  # the last one is enough
        return self.epochs[number]

    def draw(self, first, count):
        """[start, end) of `count` windows from the one numbered `first` over all epochs, (count, 2)."""
        index = np.arange(first, first + count)
        epochs, places = index // self.per_epoch, index % self.per_epoch
        return np.stack([self.epoch(int(e))[i] for e, i in zip(epochs, places)])

    def read(self, spans):
        """Inputs and targets of these windows, (len(spans), block_size) int64 each; targets past the end are -100."""
        x = np.zeros((len(spans), self.cfg.block_size), np.int64)
        y = np.full_like(x, -100)
        for row, (start, end) in enumerate(spans):
            ids = self.split[start:end]
            x[row, :len(ids) - 1], y[row, :len(ids) - 1] = ids[:-1], ids[1:]
        return x, y


def document_positions(x, bos_id):
    """Positions (B, T) that begin again at 0 with each document of x (at each BOS, and at the window's start)."""
    at = np.arange(x.shape[1])
    return at - np.maximum.accumulate(np.where(x == bos_id, at, 0), axis=1)
