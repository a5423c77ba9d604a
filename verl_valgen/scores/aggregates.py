"""The numbers of a round, of the samples' own. Pure functions; keys are those of the trackers, without `val/gen/`."""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from math import isfinite, nan, prod

import numpy as np

from verl_valgen.records import DEFAULT_STRATEGY, Sample
from verl_valgen.scores.scoring import Verdict

Scored = tuple[Sample, Mapping[str, Verdict]]

_MAX_SOURCE_CHARS = 64

_MAX_SOURCES = 32
"""Of which there are numbers of their own: a data set with a source for every row would fill a tracker."""


def round_scalars(scored: Sequence[Scored], seconds: float, num_tokens: int) -> dict[str, float]:
    """All numbers of a round: of all samples, of each strategy where there are several or one with a name, and of each
    source of data.

    Args:
        scored: The samples of one round, at least one. Answers that were not begun when time was up are counted, and
            that is all.
        seconds: That the answers took.
        num_tokens: That were generated, those of candidates that were not chosen included.
    """
    begun = [item for item in scored if item[0].finish_reason != "time" or item[0].num_new_tokens > 0]
    scalars = {
        "num_samples": float(len(scored)),
        "seconds": seconds,
        "tokens_per_s": num_tokens / seconds if seconds > 0 else 0.0,
        **(_of(begun) if begun else {}),
    }
    by_strategy, by_source = defaultdict(list), defaultdict(list)
    for item in begun:
        by_strategy[item[0].strategy].append(item)
        if item[0].data_source is not None:
            by_source[source_key(item[0].data_source)].append(item)
    if list(by_strategy) != [DEFAULT_STRATEGY]:
        for name, items in by_strategy.items():
            scalars |= {f"{name}/{key}": value for key, value in _of(items).items()}
    for name, items in list(by_source.items())[:_MAX_SOURCES]:
        scalars |= {f"by_source/{name}/{key}": value for key, value in _of(items).items()}
    return {key: value for key, value in scalars.items() if isfinite(value)}


def source_key(data_source: str) -> str:
    """A data source as part of a key that every tracker takes; different ones for different sources."""
    parts = re.sub(r"[^A-Za-z0-9_./-]", "_", data_source).split("/")
    key = "/".join(part for part in parts if part.strip("."))
    if key and key == data_source and len(key) <= _MAX_SOURCE_CHARS:
        return key
    digest = hashlib.sha256(data_source.encode("utf-8", errors="backslashreplace")).hexdigest()[:8]
    return f"{(key or '_')[: _MAX_SOURCE_CHARS - 9].rstrip('/')}_{digest}"


def _of(scored: Sequence[Scored]) -> dict[str, float]:
    samples = [sample for sample, _ in scored]
    values = {
        "num_new_tokens": _mean(sample.num_new_tokens for sample in samples),
        "cut_off": _mean(sample.finish_reason == "length" for sample in samples),
        "empty": _mean(not sample.generation.strip() for sample in samples),
        "distinct_2": distinct_2([sample.output_ids for sample in samples]),
        "repeated_ngram": _mean(repeated_ngram(sample.output_ids) for sample in samples),
    }
    metrics = dict.fromkeys(name for _, verdicts in scored for name in verdicts)
    for metric in metrics:
        values |= _of_metric(metric, scored)
    logprobs = [score for sample in samples if (score := sample.scores.get("mean_logprob")) is not None]
    return values | ({"mean_logprob": _mean(logprobs)} if logprobs else {})


def _of_metric(metric: str, scored: Sequence[Scored]) -> dict[str, float]:
    """The mean of each score, and where prompts have several completions: best, worst, pass@k, majority."""
    of_prompts: dict[tuple[int, str], list[Verdict]] = defaultdict(list)
    for sample, verdicts in scored:
        if metric in verdicts and verdicts[metric].scores:
            of_prompts[sample.index, sample.strategy].append(verdicts[metric])
    values = {}
    names = dict.fromkeys(name for verdicts in of_prompts.values() for v in verdicts for name in v.scores)
    for name in names:
        groups = [[v for v in verdicts if isfinite(v.scores.get(name, nan))] for verdicts in of_prompts.values()]
        scores = [[v.scores[name] for v in group] for group in groups if group]
        if not scores:
            continue
        values[name] = _mean(score for group in scores for score in group)
        most = max(map(len, scores))
        if most == 1:
            continue
        derived = {f"{name}_best": _mean(map(max, scores)), f"{name}_worst": _mean(map(min, scores))}
        judged = next(v.is_correctness for group in groups for v in group)
        is_correctness = all(score in (0, 1) for group in scores for score in group) if judged is None else judged
        if is_correctness:
            for k in _powers_of_two_and(most):  # of the prompts that have as many
                enough = [group for group in scores if len(group) >= k]
                derived[f"{name}_pass_at_{k}"] = _mean(pass_at_k(len(group), group.count(1), k) for group in enough)
            derived[f"{name}_majority"] = _mean(majority(group, name) for group in groups if group)
        values |= {key: value for key, value in derived.items() if key not in names}
    return values


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that of k completions, drawn from n of which c are right, one is right at least; unbiased.

    Source: M. Chen et al., "Evaluating Large Language Models Trained on Code", 2021, equation 1 (as in figure 3).
    """
    return 1.0 if n - c < k else 1.0 - prod(1.0 - k / i for i in range(n - c + 1, n + 1))


def majority(verdicts: Sequence[Verdict], name: str) -> float:
    """The score of the most frequent answer; of equally frequent ones, of the first.

    Source: X. Wang et al., "Self-Consistency Improves Chain of Thought Reasoning in Language Models", ICLR 2023.
    """
    (vote, _), *_ = Counter(verdict.vote for verdict in verdicts).most_common(1)
    return next(verdict.scores[name] for verdict in verdicts if verdict.vote == vote)


def distinct_2(answers: Sequence[Sequence[int]]) -> float:
    """Different pairs of neighbouring tokens, as a share of all of them, over all answers; 1.0 where there is none.

    Source: J. Li et al., "A Diversity-Promoting Objective Function for Neural Conversation Models", NAACL 2016, section
    5.1 (there divided by the number of tokens).
    """
    pairs = [pair for ids in answers for pair in pairwise(ids)]
    return len(set(pairs)) / len(pairs) if pairs else 1.0


def repeated_ngram(ids: Sequence[int]) -> float:
    """The length of the longest run of tokens that occurs twice (the two may overlap), as a share of all tokens."""
    num_tokens = len(ids)
    # By prefix doubling: classes[k][i] is the same for two places from which the same 2**k tokens follow.
    # (Karp, Miller, Rosenberg, "Rapid identification of repeated patterns in strings, trees and arrays", STOC 1972.)
    classes = [_classes(np.asarray(ids, dtype=np.int64))]
    while len(classes[-1]) > 2 ** (len(classes) - 1) and _has_equal(classes[-1]):
        classes.append(_classes(_of_both(classes[-1], 2 ** (len(classes) - 1), num_tokens)))

    def occurs_twice(length: int) -> bool:
        k = length.bit_length() - 1
        return k < len(classes) and _has_equal(_of_both(classes[k], length - 2**k, num_tokens))

    low, high = 0, max(0, num_tokens - 1)
    while low < high:  # where a run of some length occurs twice, so do shorter ones
        length = (low + high + 1) // 2
        low, high = (length, high) if occurs_twice(length) else (low, length - 1)
    return low / num_tokens if num_tokens else 0.0


def _classes(values: np.ndarray) -> np.ndarray:
    return np.unique(values, return_inverse=True)[1]


def _of_both(classes: np.ndarray, distance: int, num_tokens: int) -> np.ndarray:
    """One number for the classes at a place and at a distance behind it; there are num_tokens classes at most."""
    return classes[: len(classes) - distance] * num_tokens + classes[distance:]


def _has_equal(values: np.ndarray) -> bool:
    return len(np.unique(values)) < len(values)


def _mean(values: Iterable[float]) -> float:
    listed = [float(value) for value in values]
    return sum(listed) / len(listed)


def _powers_of_two_and(n: int) -> list[int]:
    return sorted({2**i for i in range(n.bit_length()) if 2**i <= n} | {n})
