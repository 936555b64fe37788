"""The pictures of a data set as a model takes them, and the features that frozen encoders made of them, kept on disk.

data/<name>/features/ holds, for each encoder that looked, <fingerprint>.npy, (pictures, P, W) float16, and
<fingerprint>.ready.npy, which of them are there.
"""
import hashlib
import json
import math
import os
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import config
import vision
from common import RANK, WORLD, autocast_to, print0, together
from prepare import picture_files, shards


class Pictures:
    """What a model sees of pictures, by number: pixels, or the kept features of an encoder that does not learn."""

    def __init__(self, folder, names, encoder, dtype, limit=None):
        """names: of the pictures by number, rows of the folder's images.npy or paths; dtype: of the encoder's products;
        limit: GiB that the folder's features may take, None for an encoder that learns."""
        self.folder, self.names, self.encoder, self.dtype = Path(folder), names, encoder, dtype
        self.device, self.kept = next(encoder.parameters()).device, None
        self.array = picture_files.open_array(folder, names)
        if limit is not None and names:
            self.keep(limit)

    def look(self, i):
        """Picture number i as people see it: (H, W, 3) uint8, or a PIL image."""
        name = self.names[i]
        return np.asarray(self.array[name]) if isinstance(name, int) else picture_files.read(self.folder / name)

    def pixels(self, which):
        """(n, 3, S, S) of the pictures numbered `which`."""
        size = self.encoder.size
        return torch.cat([torch.empty(0, 3, size, size), *(self.encoder.cut(self.look(i))[0] for i in which)])

    def encode(self, which):
        """Features (n, P, W) of the pictures numbered `which`, on the CPU."""
        with torch.no_grad(), autocast_to(self.dtype, self.device):
            return self.encoder(self.pixels(which).to(self.device)).float().cpu()

    def __call__(self, which):
        """(n, P, W) features where the encoder does not learn, else (n, 3, S, S) pixels."""
        if self.kept is None:
            return self.pixels(which)
        x, which = torch.zeros(len(which), self.encoder.grid ** 2, self.encoder.width), np.array(which, int)
        kept = which < len(self.kept)
        x[kept] = torch.from_numpy(self.kept[which[kept]].astype(np.float32))
        if not kept.all():
            x[~kept] = self.encode(which[~kept])
        return x

    def fingerprint(self, names):
        """Stands for what these pictures and the encoder's weights and dtype make together."""
        digest = hashlib.sha256(json.dumps([names, vision.digest_of(self.encoder), str(self.dtype)]).encode())
        for stat in map(self.stat, names):
            digest.update(f"{stat.st_size} {stat.st_mtime_ns}".encode())
        return digest.hexdigest()[:16]

    def stat(self, name):
        """Facts about the file that holds a picture."""
        return (self.folder / ("images.npy" if isinstance(name, int) else name)).stat()

    def keep(self, limit):
        """Have the frozen encoder see every picture once, as float16 in files that later runs find again."""
        shape = self.encoder.grid ** 2, self.encoder.width
        place = self.folder / "features"
        barred = not os.access(place if place.is_dir() else self.folder, os.W_OK)
        count = 0 if barred else min(len(self.names), int(limit * 2**30 / (2 * shape[0] * shape[1])))
        print0(f"features   {count:,} of {len(self.names):,} pictures x {shape[0]} x {shape[1]}, "
               f"{count * shape[0] * shape[1] * 2 / 2**30:.2f} of at most {limit:g} GiB (feature_gb) in {place}"
               + ", which is read-only" * barred + "; the others are encoded at each use" * (count < len(self.names)))
        if not count:
            self.kept = np.empty((0, *shape))
            return
        name = self.fingerprint(self.names[:count])
        files = {place / f"{name}.npy": ((count, *shape), np.float16),
                 place / f"{name}.ready.npy": ((count,), np.uint8)}
        with together():
            place.mkdir(exist_ok=True)
            if RANK == 0 and not all(whole(path, *form) for path, form in files.items()):
                make_room(place, limit * 2**30 - 2 * count * math.prod(shape))
                for path, (size, dtype) in files.items():
                    shards.new_array(path.with_suffix(".tmp"), size, dtype)
                    path.with_suffix(".tmp").replace(path)
        with together():  # all read what is missing before one of them fills it
            self.kept, ready = (np.lib.format.open_memmap(path, "r+") for path in files)
            os.utime(place / f"{name}.npy")  # it is in use
            missing = np.flatnonzero(ready == 0)[RANK::WORLD]
        bar = tqdm(total=len(missing), desc="encoding", unit=" pictures", disable=RANK > 0 or not len(missing))
        with together(), bar:
            for i in range(0, len(missing), 32):
                chunk = missing[i:i + 32]
                self.kept[chunk] = self.encode(chunk).numpy()
                ready[chunk] = 1
                bar.update(len(chunk))


def make_room(folder, most):
    """Remove the features that were used longest ago, until those in a folder take `most` bytes."""
    kept = sorted(folder.glob("?" * 16 + ".npy"), key=lambda path: path.stat().st_mtime)  # named by a fingerprint
    while kept and sum(path.stat().st_size for path in kept) > most:
        oldest = kept.pop(0)
        print0(f"features   {oldest.name} of another run was removed: feature_gb is for all in the folder")
        oldest.with_suffix(".ready.npy").unlink(missing_ok=True)
        oldest.unlink()


def whole(path, shape, dtype):
    """Is there an array of this shape and type in the file?"""
    try:
        array = np.load(path, mmap_mode="r")
        return array.shape == shape and array.dtype == dtype
    except (OSError, ValueError, EOFError):
        return False


def pairs_digest(pictures, *splits):
    """Stands for the examples of these splits as they are read, in their order, for the files of their pictures, and,
    after a "+", for the pixels of those that are rows of images.npy, whose size tells little."""
    sizes = [pictures.stat(name).st_size for name in pictures.names]
    digest = hashlib.sha256(json.dumps([pictures.names, sizes]).encode())
    for row in (row for data in splits for rows in data.examples for row in rows):
        digest.update(row.ids.tobytes() + row.learn.tobytes() + json.dumps(row.pictures).encode())
    rows, pixels = [name for name in pictures.names if isinstance(name, int)], hashlib.sha256()
    for row in rows:
        pixels.update(pictures.array[row].tobytes())
    return digest.hexdigest() + f"+{pixels.hexdigest()}" * bool(rows)


def read_references(path, pairs):
    """What a reference model thinks of pairs of answers, as a run saved it. pairs: their `pairs_digest`."""
    with config.mistakes(Exception, prefix=f"{path} cannot be read: "):
        saved = torch.load(path, weights_only=True)
    if not isinstance(saved, dict) or saved.get("pairs") not in (pairs, pairs.partition("+")[0]):  # once without pixels
        raise config.Mistake(f"{path} belongs to other pairs of answers: go on with the data and the block_size that "
                             "this run began with, or begin anew with another --out_dir")
    return saved["references"]
