"""What the scores of LV-Eval and InfiniteBench share: words of an answer, their F1, ROUGE-L.

The two folders beside this file load it by path: the harness imports the functions of a task from a file of its own
folder, which is no package.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence

CHINESE_PUNCTUATION = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【"  # noqa: RUF001
    "】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."  # noqa: RUF001
)
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ALL_PUNCTUATION = str.maketrans("", "", string.punctuation + CHINESE_PUNCTUATION)


def english_words(text: str) -> list[str]:
    """Words in lower case, without punctuation and articles (the normalization of SQuAD, arXiv 1606.05250)."""
    return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION)).split()


def plain_chinese(text: str) -> str:
    """Text in lower case, without punctuation and white space."""
    return "".join(text.lower().translate(_ALL_PUNCTUATION).split())


def chinese_words(text: str) -> list[str]:
    """Words as ``jieba`` cuts them, in lower case, without punctuation."""
    return [word for word in map(plain_chinese, cut(text)) if word]


def cut(text: str) -> list[str]:
    """The pieces of a Chinese text, as ``jieba`` cuts it: nothing is lost."""
    import jieba

    jieba.setLogLevel("WARNING")
    return list(jieba.cut(text))


def f1(answer: Sequence[str], target: Sequence[str]) -> float:
    """F1 of two bags of words: 2PR / (P + R), where P and R are the shared words over those of answer and target."""
    shared = (Counter(answer) & Counter(target)).total()
    return 2 * shared / (len(answer) + len(target)) if shared else 0.0


def rouge_l(answer: str, target: str) -> float:
    """F of ROUGE-L as the package ``rouge`` computes it, over different words; 0 for an empty text."""
    from rouge import Rouge

    try:
        return Rouge(metrics=["rouge-l"], stats=["f"]).get_scores(answer, target)[0]["rouge-l"]["f"]
    except ValueError:  # one of the two has no words
        return 0.0
