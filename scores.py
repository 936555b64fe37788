"""What answers and captions are worth beside those that people gave: exact matches, CIDEr-D and BLEU-4."""
import math
import re
import unicodedata

from common import print0

WORD = re.compile(r"""
    \d+(?:[.,:]\d+)+ | (?:[^\W\d_]\.){2,}               # 3.5 1,000 10:30, u.s.
    | (?:mr|mrs|ms|dr|st|jr|vs)\.(?=\s+\S)              # abbreviations keep their period
    | can(?=not\b) | \w+?(?=n't\b) | n't\b | '(?:s|re|ve|ll|d|m)\b     # can not, do n't, it 's
    | o'clock\b | \w+(?:[-/]\w+)* | [^\w\s]            # t-shirt, black/white, and each sign
""", re.VERBOSE)
PUNCTUATION = set("'\"`.?!,:-;") | {"\u2026"}  # what pycocoevalcap does not count
BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}  # which it does


def words(text):
    """The words of a caption, as the Penn Treebank's rules and pycocoevalcap's list of punctuation leave them, joined
    by spaces. Its own tokenizer is a Java program; of 66,169 captions of Flickr8k and COCO all but 46 come out alike.
    """
    found = WORD.findall(text.lower().replace("\u2019", "'"))
    return " ".join(BRACKETS.get(w, w) for w in found if w not in PUNCTUATION)


def loosely(text):
    """A caption as it is compared: lower case, without punctuation and signs, single spaces."""
    kept = (" " if unicodedata.category(c)[0] in "PS" else c for c in unicodedata.normalize("NFC", text.lower()))
    return " ".join("".join(kept).split())


def strictly(text):
    """An answer as it is compared: lower case, single spaces, without a last period. Signs mean something: -5, C++."""
    return re.sub(r"(?<=[^.])\.$", "", " ".join(unicodedata.normalize("NFC", text.lower()).split()))


def agrees(text, row):
    """Is the text one of the row's answers?"""
    for answer in row.answers:
        form = loosely if row.kind == "caption" and loosely(answer) else strictly
        if form(text) == form(answer):
            return True
    return False


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
    scored = [(text, [words(a) for a in row.answers if words(a)]) for text, row in pairs]
    scored = [(text, answers) for text, answers in scored if answers]
    if len(scored) < len(pairs):
        print0(f"{len(pairs) - len(scored):,} of {len(pairs):,} pictures have no caption with words to compare with")
    if not scored:
        return {}
    said = {i: [words(text)] for i, (text, _) in enumerate(scored)}
    meant = {i: answers for i, (_, answers) in enumerate(scored)}
    found = {"BLEU-4": Bleu(4).compute_score(meant, said, verbose=0)[0][3]}
    if len(scored) < 2:  # it weighs words by how few pictures have them
        print0("CIDEr-D needs captions of two pictures at least")
        return found
    return {"CIDEr-D": float(Cider().compute_score(meant, said)[0])} | found
