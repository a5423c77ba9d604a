"""Overlap with the reference, as rouge-score and sacrebleu compute it."""

from __future__ import annotations

from verl_valgen.scores.metrics.base import ReferenceMetric


class RougeL(ReferenceMetric):
    """F-measure of the longest common subsequence of words, in [0, 1]. rouge-score's words are of a to z and digits."""

    name = "rouge_l"
    is_correctness = False

    def __init__(self) -> None:
        try:
            from rouge_score.rouge_scorer import RougeScorer
        except ImportError as error:
            raise ImportError("rouge_l needs a package: pip install verl-valgen[metrics]") from error
        self._scorer = RougeScorer(["rougeL"], use_stemmer=False)

    def compare(self, answer: str, reference: str) -> float:
        return float(self._scorer.score(reference, answer)["rougeL"].fmeasure)


class _Sacrebleu(ReferenceMetric):
    is_correctness = False

    def __init__(self) -> None:
        try:
            import sacrebleu
        except ImportError as error:
            raise ImportError(f"{self.name} needs a package: pip install verl-valgen[metrics]") from error
        # Without the effective order, sentences of fewer than four words would all score 0.
        self._metric = sacrebleu.BLEU(effective_order=True) if self.name == "bleu" else sacrebleu.CHRF()

    def compare(self, answer: str, reference: str) -> float:
        return float(self._metric.sentence_score(answer, [reference]).score)


class Bleu(_Sacrebleu):
    """sacrebleu's sentence BLEU, in [0, 100]."""

    name = "bleu"


class ChrF(_Sacrebleu):
    """sacrebleu's sentence chrF2, in [0, 100]."""

    name = "chrf"
