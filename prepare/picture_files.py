"""Files of pictures: found by any name, read as viewers read them, drawn with their texts."""
import contextlib
import io
import os
import sys
import textwrap
import unicodedata
import warnings
import zlib
from collections import Counter
from functools import lru_cache
from pathlib import Path

import numpy as np

import config
from prepare.sources import walk

ENDINGS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".avif")
MAX_PIXELS = 100_000_000  # a photo has up to 60 million; more than this is a mistake or an attack
PNG = b"\x89PNG\r\n\x1a\n"
FONTS = ("DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Micro Hei", "Microsoft YaHei", "PingFang SC",
         "Noto Sans Devanagari", "Noto Sans Thai")  # of `draw`: each for what the earlier ones lack


def read(path):
    """The picture in a file (path or bytes stream) as upright RGB; transparency becomes white, of an animation the
    first frame counts, 16 bits a channel become 8. Raises `config.Mistake`, one line, for what is no readable picture.
    """
    from PIL import Image, ImageOps
    stream = hasattr(path, "read")
    try:
        data = path.read() if stream else Path(path).read_bytes()
        if data[4:10] == b"ftyphe" or data[4:12] == b"ftypmif1" and b"avif" not in data[:64]:
            raise ValueError("it is HEIC, which cannot be read: convert it to JPEG")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about sizes, which are checked here, and about odd metadata
            Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit: it refuses large photos of good faith
            with Image.open(io.BytesIO(_bare_png(data) if data.startswith(PNG) else data)) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise ValueError(f"{image.width} x {image.height} pixels are more than the {MAX_PIXELS:,} allowed")
                image.load()
                with contextlib.suppress(Exception):  # whatever damaged metadata lead to
                    ImageOps.exif_transpose(image, in_place=True)
                return _rgb(image)
    except Exception as e:  # Pillow's decoders raise whatever a damaged file leads them to
        reason = {"FileNotFoundError": "there is no such file", "UnidentifiedImageError": "it is not a picture",
                  "IsADirectoryError": "it is a folder"}.get(type(e).__name__) or " ".join(str(e).split()) or repr(e)
        if isinstance(e, IsADirectoryError) and not below(path)[0]:
            reason += f" without pictures that can be read, which end in {', '.join(ENDINGS)}"
        name = str(getattr(path, "name", "a picture") if stream else path)
        raise config.Mistake(f"{name if len(name) < 500 else name[:500] + '...'}: {reason[:500]}") from e


def _bare_png(data):
    """The bytes of a PNG file without what no decoder needs: text and profiles, however large or damaged."""
    kept, at = [PNG], len(PNG)
    while at < len(data):
        end = at + 12 + int.from_bytes(data[at:at + 4], "big")  # length, name, contents, checksum
        name, sound = data[at + 4:at + 8], zlib.crc32(data[at + 4:end - 4]) == int.from_bytes(data[end - 4:end], "big")
        if name in (b"IHDR", b"PLTE", b"IDAT", b"IEND") or name in (b"tRNS", b"eXIf") and sound:
            kept.append(data[at:end])
        at = end
    return b"".join(kept)


def _rgb(image):
    from PIL import Image
    if image.mode.startswith("I") or image.mode == "F":  # Pillow would clip these instead of scaling them
        x = np.asarray(image, np.float32)
        most = x.max(initial=0, where=np.isfinite(x))
        small = image.mode == "F" and most <= 2  # from 0 to 1, of which resizing can leave a little more
        deep = image.mode.startswith("I;16") or image.format == "PNG"  # 16 bits, however dark
        top = 1 if small else next(t for t in (65535 if deep else 255, 65535, most) if most <= t)
        x = np.where(x == image.info.get("transparency", np.nan), top, np.nan_to_num(x).clip(0, top))
        image = Image.fromarray((x * (255 / top)).round().astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def on_square(image, size, color):
    """The whole picture, as large as fits, in the middle of a square (PIL, size x size) of this color (r, g, b)."""
    from PIL import Image
    scale = size / max(image.size)
    small = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.BICUBIC)
    square = Image.new("RGB", (size, size), color)
    square.paste(small, ((size - small.width) // 2, (size - small.height) // 2))
    return square


class ByName:
    """What belongs to names of files: found by the whole name, or else without ending, case and form of accents."""

    def __init__(self, values):
        """values: {name: value}."""
        self.values, self.loose = values, {self.key(name): value for name, value in values.items()}

    @staticmethod
    def key(name):
        return unicodedata.normalize("NFC", Path(name).stem).casefold()

    def get(self, name, default=None):
        return self.values[name] if name in self.values else self.loose.get(self.key(name), default)


@lru_cache(maxsize=4096)
def _pictures_in(folder):
    try:
        return ByName({p.name: p for p in sorted(folder.iterdir()) if p.suffix.lower() in ENDINGS})
    except OSError:
        return ByName({})


def find(path):
    """The file that a data set means by a path: lists say a.jpg where the folder has a.JPG or a.png. The path itself
    where there is none."""
    return path if os.path.isfile(path) else _pictures_in(path.parent).get(path.name, path)


def below(folder):
    """(the pictures in a folder and below, by name; the number of other files and of hidden entries there)."""
    hidden = Counter()
    files = [p for p in walk(folder, hidden) if p.is_file()]
    inside = [p for p in files if p.suffix.lower() in ENDINGS]
    return inside, len(files) - len(inside) + hidden.total()


def expand(paths):
    """The paths, each folder replaced by the pictures in it and below, by name; what else lies there is counted. A
    folder without any stays, to be named as what it is."""
    found = []
    for path in map(Path, paths):
        inside, others = below(path) if path.is_dir() else ([], 0)
        if inside and others:
            print(f"{path}: {others:,} files are hidden or no pictures by their names", file=sys.stderr)
        found += inside or [path]
    return found


def open_array(folder, names):
    """The folder's images.npy (N, H, W, 3) uint8, or None. Raises `Mistake` where it is something else, or where any of
    the pictures `names` (rows, or paths from the folder) is not there."""
    path, array = Path(folder) / "images.npy", None
    if path.is_file():
        with config.mistakes(OSError, ValueError, EOFError, prefix=f"{path} cannot be read: "):
            array = np.load(path, mmap_mode="r")
            if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3 or 0 in array.shape[1:]:
                raise ValueError(f"it must hold pictures (N, H, W, 3) of uint8, not {array.shape} of {array.dtype}")
    rows = 0 if array is None else len(array)
    gone = [n for n in names if (not 0 <= n < rows if isinstance(n, int) else not os.path.isfile(Path(folder) / n))]
    if gone:
        first = f"{path} has {rows} rows, no {gone[0]}" if isinstance(gone[0], int) else Path(folder) / gone[0]
        raise config.Mistake(f"{len(gone):,} of the {len(names):,} pictures of {folder} are not there (any more): "
                             f"{first}; prepare the data again")
    return array


def draw(path, pictures, texts):
    """A grid of pictures (PIL or arrays) with their texts, as a PNG."""
    from matplotlib import font_manager
    from matplotlib.figure import Figure

    from runs import write_figure
    installed = {font.name for font in font_manager.fontManager.ttflist}
    fonts = [name for name in FONTS if name in installed]
    rows, columns = -(-len(texts) // 4), min(4, len(texts))
    figure = Figure(figsize=(3 * columns, 3.6 * rows), dpi=80, layout="constrained")
    for axes, picture, text in zip(figure.subplots(rows, columns, squeeze=False).flat, pictures, texts):
        axes.imshow(picture)
        lines = "\n".join(textwrap.fill(line, 38) for line in text.split("\n"))
        axes.set_title(lines, fontsize=8, fontfamily=fonts, parse_math=False)
    for axes in figure.axes:
        axes.axis("off")
    write_figure(figure, path)
