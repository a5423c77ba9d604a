"""Each metric against what it is defined by; and which settings make one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from unit.scores.test_aggregates import sample

from verl_valgen.scores.metrics import METRICS, check_metrics, load_metric
from verl_valgen.scores.metrics.base import normalized
from verl_valgen.settings.checks import ConfigError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Eiffel-Tower!", "eiffeltower"),
        ("a cat, an owl\nand the dog", "cat owl and dog"),
        ("theory", "theory"),
        ("", ""),
        ("Été à Paris.", "été à paris"),
    ],
)
def test_normalized_as_squad_does(text, expected):
    assert normalized(text) == expected


@pytest.mark.parametrize(
    ("name", "generation", "reference", "expected"),
    [
        ("exact_match", "The Paris.", "paris", 1.0),
        ("exact_match", "Paris, France", "Paris", 0.0),
        ("token_f1", "Paris France", "Paris", 2 / 3),
        ("token_f1", "b b", "b c c", 2 / 5),
        ("token_f1", "the", "a", 1.0),
        ("token_f1", "", "x", 0.0),
        ("rouge_l", "the cat sat", "the cat ran", 2 / 3),
        ("rouge_l", "日本", "日本", 0.0),  # rouge-score knows no such letters
        ("bleu", "a b c d e", "a b c d e", 100.0),
        ("chrf", "abc", "abc", 100.0),
        ("chrf", "abc", "xyz", 0.0),
        ("math", "The answer is $\\frac{1}{2}$", "0.5", 1.0),
        ("math", "so \\boxed{12}", "$12$", 1.0),
        ("math", "13", "12", 0.0),
        ("math", "no idea", "12", 0.0),
        ("math", "so it is 12", "12", 1.0),
        ("math", "18 dollars", "18", 1.0),
    ],
)
def test_scores(name, generation, reference, expected):
    assert load_metric(name)(sample(generation=generation, reference=reference)) == pytest.approx(expected)


def test_bleu_is_sacrebleus_own():
    import sacrebleu

    expected = sacrebleu.sentence_bleu(
        "the cat sat on a mat", ["the cat sat on the mat"], use_effective_order=True
    ).score
    found = load_metric("bleu")(sample(generation="the cat sat on a mat", reference="the cat sat on the mat"))
    assert 0 < expected < 100
    assert found == pytest.approx(expected)


@pytest.mark.parametrize(
    "right", ["2x+3", r"2\sqrt{3}", r"2\pi", "5x", "3+4i", r"(-\infty, 3)", "2xy", "x^2+1", "-7", "1/2"]
)
def test_math_takes_a_bare_formula_as_a_whole(right):
    metric = load_metric("math")
    for answer in (right, f"${right}$", rf"so \boxed{{{right}}}", rf"It is \({right}\)."):
        assert metric(sample(generation=answer, reference=right)) == 1.0, answer
    for answer in ("2", "3", "5", "1", "2x+7", "the end"):
        assert metric(sample(generation=answer, reference=right)) == 0.0, answer


@pytest.mark.parametrize("reference", ["Paris", "a story", ""])
def test_math_says_nothing_where_the_reference_is_no_mathematics(reference):
    assert load_metric("math")(sample(generation=reference, reference=reference)) is None


@pytest.mark.parametrize("name", METRICS)
def test_without_a_reference_there_is_no_score(name):
    assert load_metric(name)(sample(reference=None)) is None


def test_math_goes_by_the_ground_truth_and_votes_by_value():
    metric = load_metric("math")
    assert metric(sample(generation="$4$", reference="a story", ground_truth=4)) == 1.0
    votes = [metric.vote(sample(generation=text)) for text in ("we get $0.50$", "\\boxed{0.5}", "none")]
    assert votes == [votes[0], votes[0], "none"]


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "own.py"
    path.write_text(
        "raise_on_import = 1\n"
        "def length(sample): return len(sample.generation)\n"
        "def with_default(sample, scale=2): return scale\n"
        "def compute_score(data_source, solution_str, ground_truth, extra_info=None):\n"
        "    return {'score': float(solution_str == ground_truth), 'from': data_source, 'extra': extra_info['x']}\n"
        "def two(a, b): return 0\n"
        "def nothing(): return 0\n"
        "by_name = lambda sample: 1.0\n"
        "class Judge:\n    @staticmethod\n    def judge(sample): return 0.5\n"
    )
    return path


def test_functions_of_ones_own(own):
    assert load_metric(f"{own}:length")(sample(generation="abc")) == 3
    assert load_metric(f"{own}:Judge.judge")(sample()) == 0.5
    assert load_metric(f"{own}:Judge.judge").name == "judge"
    assert load_metric("operator:attrgetter").name == "attrgetter"


def test_verls_signature(own):
    metric = load_metric(f"{own}:compute_score")
    given: dict[str, Any] = {"generation": "4", "data_source": "d", "extra_info": {"x": 7}}
    assert metric(sample(**given, reference="4")) == {"score": 1.0, "from": "d", "extra": 7}
    assert metric(sample(**given, reference="4", ground_truth="5")) == {"score": 0.0, "from": "d", "extra": 7}
    assert metric(sample(**given)) is None


def test_a_function_with_verls_signature_gets_the_reasoning_too(tmp_path):
    (tmp_path / "own.py").write_text(
        "def verls(solution_str, ground_truth): return float(solution_str == 'so</think>4')\n"
        "def ours(sample): return float(sample.generation == '4')\n"
    )
    one = sample(generation="4", whole_generation="so</think>4", reference="4")
    assert load_metric(f"{tmp_path}/own.py:verls")(one) == load_metric(f"{tmp_path}/own.py:ours")(one) == 1.0
    assert load_metric("exact_match")(one) == 1.0


def test_verls_own_reward_functions():
    metric = load_metric("verl.utils.reward_score:default_compute_score")
    given = {"data_source": "openai/gsm8k", "ground_truth": "18", "reference": "so 18"}
    assert metric(sample(generation="16 + 2 = 18\n#### 18", **given)) == 1.0
    assert metric(sample(generation="#### 17", **given)) == 0.0
    with pytest.raises(NotImplementedError):
        metric(sample(reference="x", data_source="capitals"))


def test_what_can_be_named(own):
    specs = [
        *METRICS,
        *(f"{own}:{name}" for name in ("length", "with_default", "compute_score", "by_name", "Judge.judge")),
    ]
    check_metrics([*specs, "verl.utils.reward_score:default_compute_score"], "generation.metrics")


@pytest.mark.parametrize(
    ("specs", "reason"),
    [
        (["blue"], "must be names (exact_match, token_f1, rouge_l, bleu, chrf, math) or functions (file.py:function, "),
        (["{own}:missing"], "own.py:missing: the file defines no missing"),
        (["{own}:two"], "own.py:two must take a sample, or data_source, solution_str, ground_truth and extra_info"),
        (["{own}:nothing"], "own.py:nothing must take a sample"),
        (["/nowhere/x.py:f"], "/nowhere/x.py:f: there is no such file"),
        (["{folder}:f"], "there is no such module"),
        (["no_such_package.module:f"], "No module named 'no_such_package'"),
        (["no_such_module:f"], "no_such_module:f: there is no such module"),
        (["{own}:length", "{own}:length"], "must have different names, got 'length' twice"),
        (["{broken}:f"], "broken.py:f: it is no Python"),
        (["{empty}:f"], "empty.py:f: the file defines no f"),
        (["{huge}:f"], "huge.py:f: the file is larger than 1 MiB"),
        (["{own}:\x1b[31m"], "the file defines no \\x1b[31m"),
    ],
    ids=str,
)
def test_what_cannot(own, specs, reason):
    files = {name: own.with_name(f"{name}.py") for name in ("broken", "empty", "huge")}
    files["broken"].write_text("def f(:")
    files["empty"].touch()
    files["huge"].write_bytes(b"#" * (1 << 20) + b"\n")
    named = [spec.format(own=own, folder=own.parent, **files) for spec in specs]
    with pytest.raises(ConfigError) as caught:
        check_metrics(named, "generation.metrics")
    assert str(caught.value).startswith("generation.metrics")
    assert reason in str(caught.value)
    assert str(caught.value).isprintable()


def test_checking_executes_nothing(tmp_path):
    (tmp_path / "own.py").write_text("raise SystemExit('executed')\ndef f(sample): return 1\n")
    check_metrics([f"{tmp_path}/own.py:f"], "generation.metrics")


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    from verl_valgen.scores import metrics

    monkeypatch.setattr(metrics, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"rouge_l needs a package: pip install verl-valgen\[metrics\]"):
        check_metrics(["rouge_l"], "generation.metrics")
    for name, extra in (("rouge_l", "metrics"), ("bleu", "metrics"), ("math", "math")):
        package = METRICS[name].package
        for module in [package, *(module for module in sys.modules if module.startswith(f"{package}."))]:
            monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ImportError, match=rf"{name} needs a package: pip install verl-valgen\[{extra}\]"):
            load_metric(name)


def test_verls_functions_are_given_what_they_take(tmp_path):
    (tmp_path / "own.py").write_text(
        "def few(solution_str, ground_truth, method='x'): return solution_str == ground_truth and method == 'x'\n"
        "def many(solution_str, ground_truth, **kwargs): return {'score': 1, 'n': len(kwargs)}\n"
        "def careless(data_source, solution_str, ground_truth, extra_info): return extra_info.get('x', 7)\n"
    )
    one = sample(generation="4", reference="4")
    assert load_metric(f"{tmp_path}/own.py:few")(one) is True
    assert load_metric(f"{tmp_path}/own.py:many")(one) == {"score": 1, "n": 2}
    assert load_metric(f"{tmp_path}/own.py:careless")(one) == 7
    assert load_metric("verl.utils.reward_score.gsm8k:compute_score")(sample(generation="#### 4", reference="4")) == 1.0


def test_what_a_module_defines_is_told_from_what_is_within(tmp_path):
    (tmp_path / "own.py").write_text(
        "from collections.abc import Callable\n"
        "if True:\n    def score(sample): return 1\n"
        "class Other:\n    def score(self, a, b, c): return 1\n    def inner(sample): return 1\n"
        "named: Callable = score\n"
        "async def later(sample): return 1\n"
        "def seconds(sample): return 1\n"
    )
    check_metrics([f"{tmp_path}/own.py:score", f"{tmp_path}/own.py:named"], "metrics")
    for name, reason in (
        ("inner", "the file defines no inner"),
        ("later", "must not be async"),
        ("seconds", "a round has a number called seconds already"),
    ):
        with pytest.raises(ConfigError, match=reason):
            check_metrics([f"{tmp_path}/own.py:{name}"], "metrics")
