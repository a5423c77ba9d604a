"""The numbers of a round. Pure functions on samples; keys are those of the trackers, without `val/gen/`."""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from math import isfinite, nan, prod

from verl_valgen.records import GroupNumbers, RoundNumbers, Sample, Verdict
from verl_valgen.scores.names import OWN_PROMPTS

_MAX_SOURCE_CHARS = 64

_MAX_SOURCES = 32
"""Data sources with numbers of their own, at most: a data set with a source for every row would fill a tracker."""


def summarize_round(
    samples: Sequence[Sample],
    seconds: float,
    num_tokens: int,
    *,
    strategies: Sequence[str] = (),
    n: int = 1,
    logs_all: bool = False,
) -> RoundNumbers:
    """The numbers of a round: of all samples or by strategy, and by data source for the first strategy.

    Args:
        samples: The samples of one round. Answers that were not begun when time was up count in `num_samples` alone.
        seconds: How long the answers took.
        num_tokens: Number of generated tokens, including those of candidates that were not chosen.
        strategies: The names of the strategies that are configured. With any there are no numbers of all samples, as
            these would mix greedy answers with sampled ones.
        n: Number of completions that each prompt is asked for where it is sampled.
        logs_all: See `RoundNumbers`.
    """
    begun = [sample for sample in samples if sample.finish_reason != "time" or sample.num_new_tokens > 0]
    by_strategy = {name: [sample for sample in begun if sample.strategy == name] for name in strategies}
    of_source: dict[str | None, list[Sample]] = defaultdict(list)
    for sample in by_strategy[strategies[0]] if strategies else begun:
        of_source[_source(sample)].append(sample)
    by_source = {name: of_source[name] for name in _sources(samples)}
    return RoundNumbers(
        num_samples=len(samples),
        seconds=seconds,
        tokens_per_s=num_tokens / seconds if seconds > 0 else 0.0,
        overall=summarize(begun, n) if begun and not strategies else GroupNumbers(),
        by_strategy={name: summarize(group, n) for name, group in by_strategy.items() if group},
        by_source={name: summarize(group, n) for name, group in by_source.items() if group},
        logs_all=logs_all,
    )


def source_key(data_source: str) -> str:
    """A data source as part of a key that every tracker takes; different ones for different sources."""
    parts = re.sub(r"[^A-Za-z0-9_./-]", "_", data_source).split("/")
    key = "/".join(part for part in parts if part.strip("."))
    if key and key == data_source and key != OWN_PROMPTS and len(key) <= _MAX_SOURCE_CHARS:
        return key
    digest = hashlib.sha256(data_source.encode("utf-8", errors="backslashreplace")).hexdigest()[:8]
    return f"{(key or '_')[: _MAX_SOURCE_CHARS - 9].rstrip('/')}_{digest}"


def _sources(samples: Sequence[Sample]) -> list[str]:
    """The data sources that have numbers, as parts of keys, in order: `_MAX_SOURCES` of the data, and own prompts.

    Answers that were not begun count here, or it would depend on the time which sources are among the first. Own
    prompts are a source beside others; where there is nothing else, their numbers would be those of the round.
    """
    sources = dict.fromkeys(map(_source, samples))
    of_data = [source for source in sources if source not in (None, OWN_PROMPTS)]
    has_both = OWN_PROMPTS in sources and len(sources) > 1
    return [*of_data[:_MAX_SOURCES], *([OWN_PROMPTS] if has_both else [])]


def _source(sample: Sample) -> str | None:
    if sample.data_source is not None:
        return source_key(sample.data_source)
    return OWN_PROMPTS if sample.row is None else None


def summarize(samples: Sequence[Sample], n: int) -> GroupNumbers:
    """The numbers of a group of samples, at least one; `n` as in `summarize_round`."""
    always = {
        "num_new_tokens": _mean(sample.num_new_tokens for sample in samples),
        "cut_off": _mean(sample.finish_reason == "length" for sample in samples),
        "empty": _mean(not sample.generation.strip() for sample in samples),
    }
    further = {
        "distinct_2": distinct_2([sample.output_ids for sample in samples]),
        "seq_rep_4": _mean(seq_rep_4(sample.output_ids) for sample in samples),
    }
    scores: dict[str, float] = {}
    from_several: dict[str, float] = {}
    for metric in dict.fromkeys(name for sample in samples for name in sample.verdicts):
        means, derived = summarize_metric(metric, samples, n)
        scores |= means
        from_several |= derived
    logprobs = [score for sample in samples if (score := sample.scores.get("mean_logprob")) is not None]
    if logprobs:
        further["mean_logprob"] = _mean(logprobs)
    main = {key for name in scores for key in (f"{name}_pass_at_{n}", f"{name}_majority")}
    # A score of its own goes before a derived one of that name.
    from_several = {key: value for key, value in _finite(from_several).items() if key not in scores}
    derived = {key: value for key, value in from_several.items() if key in main}
    further |= {key: value for key, value in from_several.items() if key not in main}
    return GroupNumbers(always, _finite(scores), derived, _finite(further))


def summarize_metric(metric: str, samples: Sequence[Sample], n: int) -> tuple[dict[str, float], dict[str, float]]:
    """The mean of each of a metric's scores, and what several answers to a prompt add: best, worst, pass@k and more."""
    by_prompt: dict[tuple[int, str], list[Verdict]] = defaultdict(list)
    for sample in samples:
        if metric in sample.verdicts and sample.verdicts[metric].scores:
            by_prompt[sample.index, sample.strategy].append(sample.verdicts[metric])
    names = dict.fromkeys(name for verdicts in by_prompt.values() for v in verdicts for name in v.scores)
    means: dict[str, float] = {}
    derived: dict[str, float] = {}
    for name in names:
        groups = [[v for v in verdicts if isfinite(v.scores.get(name, nan))] for verdicts in by_prompt.values()]
        groups = [group for group in groups if group]
        if groups:
            means[name] = _mean(v.scores[name] for group in groups for v in group)
            derived |= _derive(name, groups, n)
    return means, derived


def _derive(name: str, groups: Sequence[Sequence[Verdict]], n: int) -> dict[str, float]:
    """The numbers that several completions of a prompt give; {} where every prompt has one.

    Args:
        groups: The verdicts that have this score, all finite, by prompt; at least one each.
        n: As in `summarize_round`. That k is up to the configuration, and not to how many of the answers came in time,
            keeps the keys the same from round to round.
    """
    scores = [[v.scores[name] for v in group] for group in groups]
    if max(map(len, scores)) == 1:
        return {}
    derived = {f"{name}_best": _mean(map(max, scores)), f"{name}_worst": _mean(map(min, scores))}
    declared = groups[0][0].is_correctness
    is_correctness = all(score in (0, 1) for group in scores for score in group) if declared is None else declared
    if is_correctness:
        for k in _powers_of_two_and(n):
            if with_at_least_k := [group for group in scores if len(group) >= k]:
                derived[f"{name}_pass_at_{k}"] = _mean(pass_at_k(len(g), g.count(1), k) for g in with_at_least_k)
        derived[f"{name}_majority"] = _mean(majority(group, name) for group in groups)
    return derived


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that at least one of k completions is right, drawn from n of which c are right; unbiased.

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


def seq_rep_4(ids: Sequence[int]) -> float:
    """The share of an answer's 4-grams of tokens that repeat an earlier one; 0.0 where it has fewer than four tokens.

    Source: S. Welleck et al., "Neural Text Generation with Unlikelihood Training", ICLR 2020, section 6 (seq-rep-n).
    """
    ngrams = list(zip(ids, ids[1:], ids[2:], ids[3:], strict=False))
    return 1.0 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def _finite(numbers: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in numbers.items() if isfinite(value)}


def _mean(values: Iterable[float]) -> float:
    numbers = [float(value) for value in values]
    return sum(numbers) / len(numbers)


def _powers_of_two_and(n: int) -> list[int]:
    return sorted({2**i for i in range(n.bit_length()) if 2**i <= n} | {n})
