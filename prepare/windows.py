"""How a split is cut into windows and in which order they are drawn: a pure function of (seed, step).

There is no loader state to save or to lose: resuming is exact, and the order does not depend on the number of
processes, each of which takes its own rows of a step's batch.
"""
import numpy as np


def draws(seed, *counters):
    """A generator that depends on these integers alone."""
    return np.random.default_rng([seed, *counters])


class Windows:
    """A split cut into windows of at most block_size + 1 tokens, neighbours sharing one token, the first's last target.

    They lie side by side wherever they fall, in training from an offset that changes with each epoch; or, if
    cfg.whole_docs, each begins with a document and holds as many whole ones as fit (longer ones are cut).

    cfg: block_size, whole_docs, seed, batch_size, gradient_accumulation_steps. cut: [start, end) of the windows of
    whole documents in the order of the split, (n, 2), else None. fill: the mean share of a window that holds targets.
    """

    def __init__(self, split, cfg, bos_id=None):
        self.split, self.cfg, self.cut, self.cached = split, cfg, None, {}
        if cfg.whole_docs:
            begins = np.concatenate([i + np.flatnonzero(split[i:i + 2**24] == bos_id)
                                     for i in range(0, len(split), 2**24)])
            self.cut = self.pack([*begins.tolist(), len(split)])
        self.per_epoch = len(split) // cfg.block_size - 1 if self.cut is None else len(self.cut)
        self.fill = 1.0 if self.cut is None else float((np.diff(self.cut).mean() - 1) / cfg.block_size)

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

    def epoch(self, number):
        """[start, end) of an epoch's windows in drawing order, (n, 2); number None: all of the split, in order."""
        if number not in self.cached:
            T, length, rng = self.cfg.block_size, len(self.split), draws(self.cfg.seed, 0, number or 0)
            spans = self.cut
            if spans is None:
                starts = np.arange(0, length - 1, T) if number is None else np.arange(rng.integers(T), length - T, T)
                spans = np.stack((starts, np.minimum(starts + T + 1, length)), 1)
            if number is not None:
                spans = rng.permutation(spans)
                self.cached = {key: value for key, value in self.cached.items() if key is None}  # of epochs, the last
            self.cached[number] = spans
        return self.cached[number]

    def step(self, step):
        """[start, end) of the windows of a step's whole batch, over all processes, (sequences, 2)."""
        n = self.cfg.batch_size * self.cfg.gradient_accumulation_steps
        index = np.arange(step * n, (step + 1) * n)
        return np.stack([self.epoch(int(e))[i] for e, i in zip(index // self.per_epoch, index % self.per_epoch)])

    def read(self, spans):
        """Inputs and targets of these windows, (len(spans), block_size) int64 each; targets past the end are -100."""
        x = np.zeros((len(spans), self.cfg.block_size), np.int64)
        y = np.full_like(x, -100)
        for row, (start, end) in enumerate(spans):
            ids = self.split[start:end]
            x[row, :len(ids) - 1], y[row, :len(ids) - 1] = ids[:-1], ids[1:]
        return x, y


def restarts(x, bos_id):
    """Positions (B, T) that begin again at 0 with each document of x (at each BOS, and at the window's start)."""
    at = np.arange(x.shape[1])
    return at - np.maximum.accumulate(np.where(x == bos_id, at, 0), axis=1)
