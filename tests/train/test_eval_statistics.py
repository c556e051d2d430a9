"""mean@n, pass@k and their intervals, against enumeration, known variances and numbers by hand."""

import itertools
import math

import numpy as np
import pytest

from entrocraft.train.config_evaluation import EvaluationConfig, EvaluationSetConfig, ks
from entrocraft.train.eval_statistics import Outcome, as_metrics, bootstrap_intervals, pass_at_k, summarise


def outcome(problem: int, right: int, samples: int = 4, **changes) -> Outcome:
    values = {"distinct": right, "reward": float(right), "no_verdict": 0, "tokens": 10, "truncated": 0}
    return Outcome(problem=problem, samples=samples, right=right, **(values | changes))


# n = 6 is small enough to enumerate every choice of k responses; c from none to all.
@pytest.mark.parametrize("correct", range(7))
@pytest.mark.parametrize("k", [1, 2, 5, 6])
def test_pass_at_k_is_the_share_of_choices_with_a_right_one(correct, k):
    graded = [True] * correct + [False] * (6 - correct)
    choices = [any(choice) for choice in itertools.combinations(graded, k)]
    assert pass_at_k(correct, 6, k) == pytest.approx(sum(choices) / len(choices), abs=1e-14)


def test_pass_at_k_of_many_samples_is_exact():
    exact = 1 - math.comb(1024 - 3, 256) / math.comb(1024, 256)
    assert pass_at_k(3, 1024, 256) == pytest.approx(exact, rel=1e-12)
    assert pass_at_k(1, 32, 32) == 1.0  # where resampling with replacement says 0.64


def test_pass_at_k_refuses_what_it_cannot_mean():
    for arguments in ((5, 4, 1), (-1, 4, 1), (1, 4, 0), (1, 4, 5)):
        with pytest.raises(ValueError, match="expected 0 <= c <= n, 1 <= k <= n"):
            pass_at_k(*arguments)


def test_summary_by_hand():
    """Three problems of four responses: 4, 1 and 0 right."""
    outcomes = [
        outcome(0, 4, distinct=2, tokens=40, entropy=20.0, others={"strict": 3}),
        outcome(1, 1, reward=-2.0, no_verdict=2, tokens=20, entropy=6.0, others={"strict": 1}),
        outcome(2, 0, tokens=60, truncated=3, entropy=4.0, others={"strict": 0}),
    ]
    summary = summarise(outcomes, [1, 2, 4], bootstrap=0)
    assert summary["accuracy"] == summary["pass_at_1"] == pytest.approx(5 / 12)
    assert summary["pass_at_2"] == pytest.approx((1 + 0.5 + 0) / 3)
    assert summary["pass_at_4"] == pytest.approx(2 / 3)
    assert summary["strict_accuracy"] == pytest.approx(4 / 12)
    assert summary["reward"] == pytest.approx((4 - 2) / 10)
    assert summary["distinct_correct"] == pytest.approx(3 / 3)
    assert (summary["no_verdict"], summary["response_length"]) == (2, 10.0)
    assert summary["truncated_fraction"] == pytest.approx(3 / 12)
    assert summary["entropy"] == pytest.approx(30 / 120)
    assert summary["intervals"] == {}


def test_intervals_are_those_of_the_mean_over_problems():
    """400 independent problems: the interval is the mean and 1.96 standard errors to each side."""
    value_PS = np.random.default_rng(5).normal(0.3, 0.2, size=(400, 2))
    low_high = bootstrap_intervals(value_PS, 4000)
    error = 1.96 * value_PS.std(0) / 20
    np.testing.assert_allclose(low_high[:, 0], value_PS.mean(0) - error, atol=0.1 * error.max())
    np.testing.assert_allclose(low_high[:, 1], value_PS.mean(0) + error, atol=0.1 * error.max())


def test_responses_to_one_problem_count_as_one_observation():
    """30 problems, each always or never solved: 64 responses to each make nobody surer of the mean."""
    few = summarise([outcome(p, 4 * (p < 12)) for p in range(30)], [1], bootstrap=2000)
    many = summarise([outcome(p, 64 * (p < 12), samples=64) for p in range(30)], [1], bootstrap=2000)
    assert few["intervals"]["accuracy"] == many["intervals"]["accuracy"]
    low, high = many["intervals"]["accuracy"]
    # The binomial's 2.5 and 97.5 percentiles of 30 draws at 0.4 are 7 and 17.
    assert (low, high) == (pytest.approx(7 / 30), pytest.approx(17 / 30))


def test_intervals_cover_the_truth_as_often_as_they_say():
    """300 sets of 40 problems, whose chances of being solved differ: mean@8 within its interval in about 95 %."""
    generator, covered = np.random.default_rng(0), 0
    for _ in range(300):
        right = generator.binomial(8, generator.beta(2, 3, size=40))  # the mean over all problems is 0.4
        summary = summarise([outcome(p, int(c), samples=8) for p, c in enumerate(right)], [1], bootstrap=300)
        low, high = summary["intervals"]["accuracy"]
        covered += low <= 0.4 <= high
    assert 0.90 <= covered / 300 <= 0.98


def test_what_cannot_be_summarised():
    with pytest.raises(ValueError, match="no outcomes"):
        summarise([], [1], bootstrap=0)
    with pytest.raises(ValueError, match=r"different numbers of responses: \[4, 8\]"):
        summarise([outcome(0, 1), outcome(1, 1, samples=8)], [1], bootstrap=0)


def test_metrics_are_named_by_set_and_the_unnamed_one_is_plain():
    a, b = (summarise([outcome(0, right)], [4], bootstrap=10) for right in (4, 2))
    metrics = as_metrics({"eval": a, "amc": b}, "eval")
    assert (metrics["eval_accuracy"], metrics["eval_amc_accuracy"], metrics["eval_pass_at_4"]) == (1.0, 0.5, 1.0)
    assert (metrics["eval_amc_accuracy_low"], metrics["eval_amc_accuracy_high"]) == (0.5, 0.5)
    assert not {"eval_problems", "eval_intervals"} & set(metrics)
    assert as_metrics({"a": a, "amc": b}, "eval")["eval_accuracy"] == 0.75
    assert as_metrics({}, "eval") == {}


def test_ks_are_powers_of_two_and_n_unless_asked_for():
    assert ks(32, []) == [1, 2, 4, 8, 16, 32]
    assert ks(6, []) == [1, 2, 4, 6]
    assert ks(1, []) == [1]
    assert ks(8, [8, 1, 8]) == [1, 8]


def test_when_an_evaluation_is_due():
    def steps(config):
        return [step for step in range(1, 10) if config.due(step, 32 * (step - 1), 32 * step)]

    assert steps(EvaluationConfig(every=3)) == [3, 6, 9]
    assert steps(EvaluationConfig(at_prompts=[100, 200, 256])) == [4, 7, 8]  # 128, 224, 256 prompts
    assert steps(EvaluationConfig()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pass_at": [16]}, "evaluation.pass_at = [16]: expected numbers from 1 to 8"),
        ({"pass_at": [0]}, "evaluation.pass_at = [0]"),
        ({"pass_at": [8], "sets": {"a": EvaluationSetConfig(path="x", samples=4)}}, "from 1 to 4, the fewest"),
        ({"at_prompts": [0]}, "evaluation.at_prompts = [0]"),
        ({"top_p": 0.0}, "evaluation.top_p = 0.0"),
        ({"top_k": -1}, "evaluation.top_k = -1"),
        ({"max_response_tokens": 0}, "evaluation.max_response_tokens = 0"),
        ({"sets": {"a b": EvaluationSetConfig(path="x")}}, "evaluation.sets = 'a b': expected names of letters"),
    ],
)
def test_settings_out_of_range(changes, message):
    with pytest.raises(ValueError, match=r".") as caught:
        EvaluationConfig(**changes)
    assert message in str(caught.value)
    with pytest.raises(ValueError, match="samples = 0"):
        EvaluationSetConfig(path="x", samples=0)
