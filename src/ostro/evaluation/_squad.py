"""Agreement of two short answers as SQuAD measures it.

A stand-in for `transformers.data.metrics.squad_metrics`, which transformers 5 no longer has and
SuperGLUE's task `record` in lm-evaluation-harness imports: the same names, the same values.
"""

import re
import string
from collections import Counter

_ARTICLE = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _words(text: str) -> list[str]:
    return _ARTICLE.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split()


def compute_exact(gold: str, predicted: str) -> int:
    """1 where both have the same words, but for case, punctuation and articles."""
    return int(_words(gold) == _words(predicted))


def compute_f1(gold: str, predicted: str) -> float:
    """Harmonic mean of the shares of words that one answer has in common with the other."""
    wanted, found = _words(gold), _words(predicted)
    common = sum((Counter(wanted) & Counter(found)).values())
    if not wanted or not found:
        return float(wanted == found)
    return 2 * common / (len(wanted) + len(found))
