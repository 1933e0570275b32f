"""Scores of translations, by sacreBLEU (Post 2018, arXiv:1804.08771)."""

from collections.abc import Sequence

import numpy as np

TOKENIZERS = ("none", "13a", "intl", "char", "zh", "ja-mecab", "ko-mecab", "flores200")


def score(hypotheses: Sequence[str], references: Sequence[str], tokenize: str) -> dict[str, float]:
    """Scores of a corpus: 'bleu' and 'chrf' of 100, 'exact_match' of 1.

    - bleu: the geometric mean of the precisions of 1- to 4-grams times a penalty for brevity, over
      the corpus (Papineni et al. 2002), case counting;
    - chrf: the F₂ score of character 1- to 6-grams (Popović 2015);
    - exact_match: the share of hypotheses that are their reference, white space aside.

    Args:
      hypotheses: translations [n].
      references: the right translation of each [n].
      tokenize: how BLEU finds words, one of TOKENIZERS.

    Raises:
      ValueError: for sequences of different length or none at all, or where sacreBLEU lacks what
        the tokenizer needs.
    """
    _check(hypotheses, references)
    from sacrebleu.metrics import CHRF

    same = [h.split() == r.split() for h, r in zip(hypotheses, references, strict=True)]
    return {
        "bleu": _bleu(tokenize).corpus_score(list(hypotheses), [list(references)]).score,
        "chrf": CHRF().corpus_score(list(hypotheses), [list(references)]).score,
        "exact_match": float(np.mean(same)),
    }


def signature(tokenize: str) -> str:
    """What to cite a BLEU with: 'nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:2.6.0'."""
    bleu = _bleu(tokenize)
    bleu.corpus_score(["a"], [["a"]])  # the number of references is part of it
    return str(bleu.get_signature())


def by_length(
    hypotheses: Sequence[str],
    references: Sequence[str],
    lengths: np.ndarray,
    tokenize: str,
    width: int = 10,
) -> dict[str, float]:
    """BLEU of the sentences whose sources have 1 to width tokens, width + 1 to 2 · width, ...

    Bahdanau et al. 2015 (arXiv:1409.0473), fig. 2.  Ranges without a sentence are left out.

    Args:
      hypotheses, references, tokenize: see `score`.
      lengths: of the sources, at least 1 [n].
      width: of a range.

    Returns:
      {'1-10': ..., '11-20': ...}, ascending.
    """
    _check(hypotheses, references)
    ranges = (np.asarray(lengths) - 1) // width
    scores = {}
    # Else a range of sentences shorter than four tokens scores 0 however good; no other changes.
    bleu = _bleu(tokenize, effective_order=True)
    for number in np.unique(ranges).tolist():
        rows = np.flatnonzero(ranges == number).tolist()
        texts = [hypotheses[i] for i in rows], [[references[i] for i in rows]]
        scores[f"{number * width + 1}-{(number + 1) * width}"] = bleu.corpus_score(*texts).score
    return scores


def _check(hypotheses, references):
    if len(hypotheses) != len(references) or not references:
        raise ValueError(
            f"{len(hypotheses)} hypotheses for {len(references)} references: give one for each, "
            "and at least one"
        )


def _bleu(tokenize, **options):
    from sacrebleu.metrics import BLEU

    try:
        # force: silences the warning that a text is tokenised already.
        return BLEU(tokenize=tokenize, force=True, **options)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"bleu_tokenize={tokenize!r} cannot be used: {reason}") from error
