"""Calibration: against brute force, against data whose truth is known, and as a report."""

import json
import math

import numpy as np
import pytest

from align_jax.evaluation.calibration import accuracy, calibrate
from align_jax.evaluation.calibration_report import format_calibration, write_calibration_report


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def made_pairs(rng, count, *, scale=1.0):
    """Pairs whose order was drawn with the probability that `scale` times the rewards promise."""
    a, b = rng.normal(0, 1.2, (2, count))
    first = rng.random(count) < 1 / (1 + np.exp(-scale * (a - b)))
    return np.where(first, a, b), np.where(first, b, a)


def test_numbers_against_brute_force():
    rng = np.random.default_rng(0)
    chosen, rejected = made_pairs(rng, 60)
    chosen[3] = rejected[3]  # a tie
    out = calibrate(chosen, rejected, bins=5, resamples=20)
    right, brier, nll = 0.0, 0.0, 0.0
    bins = [[] for _ in range(5)]
    for c, r in zip(chosen, rejected):
        p = sigmoid(c - r)
        brier, nll = brier + (1 - p) ** 2, nll - math.log(p)
        correct = 0.5 if c == r else float(c > r)
        right += correct
        confidence = max(p, 1 - p)
        bins[min(4, int((confidence - 0.5) * 10))].append((confidence, correct))
    ece = sum(abs(sum(correct - confidence for confidence, correct in one)) for one in bins) / 60
    assert out["accuracy"] == pytest.approx(right / 60) == accuracy(chosen, rejected)
    assert out["brier"] == pytest.approx(brier / 60)
    assert out["nll"] == pytest.approx(nll / 60)
    assert out["ece"] == pytest.approx(ece)
    filled = [one for one in bins if one]
    assert len(out["reliability"]) == len(filled)
    for row, one in zip(out["reliability"], filled):
        confidence, correct = np.mean(one, axis=0)
        assert row["pairs"] == len(one)
        assert row["confidence"] == pytest.approx(confidence)
        assert row["accuracy"] == pytest.approx(correct)
        assert row["accuracy_ci95"][0] <= correct <= row["accuracy_ci95"][1]
    by_size = sorted(
        zip(np.abs(chosen - rejected), (chosen > rejected) + 0.5 * (chosen == rejected))
    )
    sizes = [8] * 4 + [7] * 4  # 60 in eighths
    assert [row["pairs"] for row in out["by_difference"]] == sizes
    for row, size in zip(out["by_difference"], sizes):
        part, by_size = np.array(by_size[:size]), by_size[size:]
        assert row["difference"] == pytest.approx(part[:, 0].mean())
        assert row["accuracy"] == pytest.approx(part[:, 1].mean())
    for name, values in (("chosen", chosen), ("rejected", rejected)):
        assert out["rewards"][name]["mean"] == pytest.approx(sum(values) / 60)
        assert out["rewards"][name]["std"] == pytest.approx(np.std(values))
        assert out["rewards"][name]["quantiles"][2] == pytest.approx(np.median(values))


def test_which_response_is_called_chosen_says_nothing_about_calibration():
    """Counting every pair both ways gives the same curve: right(p) - p and its mirror image."""
    chosen, rejected = made_pairs(np.random.default_rng(1), 400)
    out = calibrate(chosen, rejected, bins=5, resamples=5)
    p = np.concatenate([1 / (1 + np.exp(rejected - chosen)), 1 / (1 + np.exp(chosen - rejected))])
    won = np.repeat([1.0, 0.0], 400)
    place = np.minimum((p * 10).astype(int), 9)
    both_ways = sum(abs((won - p)[place == b].sum()) for b in range(10)) / 800
    assert out["ece"] == pytest.approx(both_ways)


def test_a_calibrated_model_has_an_ece_that_chance_explains_and_an_overconfident_one_has_not():
    rng = np.random.default_rng(2)
    covered, by_chance, detected = 0, 0, 0
    for _ in range(40):
        out = calibrate(*made_pairs(rng, 300), resamples=200)
        covered += out["ece_ci95"][0] == 0.0  # the truth is 0
        by_chance += out["ece"] <= out["ece_if_calibrated"]["quantile_95"]
        wrong = calibrate(*made_pairs(rng, 300, scale=0.2), resamples=200)
        detected += wrong["ece"] > wrong["ece_if_calibrated"]["quantile_95"]
        assert wrong["ece_ci95"][0] > 0
    assert covered >= 36 and by_chance >= 34 and detected == 40


def test_pairs_of_one_ranking_share_their_responses():
    """What chance does to a calibrated model is what it does to made rankings of 16."""
    rng = np.random.default_rng(5)
    prompts, count = 20, 16
    first, second = np.triu_indices(count, 1)
    eces, expected, of_single_pairs = [], [], []
    for _ in range(80):
        logits = 0.5 * rng.normal(size=(prompts, count))
        order = np.argsort(-(logits + rng.gumbel(size=logits.shape)), axis=1)
        ranked = np.take_along_axis(logits, order, axis=1)
        numbers = order + count * np.arange(prompts)[:, None]
        pairs = [x[:, side].ravel() for x in (ranked, numbers) for side in (first, second)]
        responses = np.stack(pairs[2:], 1)
        out = calibrate(*pairs[:2], responses=responses, resamples=40)
        eces.append(out["ece"])
        expected.append(out["ece_if_calibrated"]["mean"])
        of_single_pairs.append(calibrate(*pairs[:2], resamples=40)["ece_if_calibrated"]["mean"])
    assert np.mean(eces) == pytest.approx(np.mean(expected), rel=0.06)
    assert np.mean(eces) > 1.12 * np.mean(of_single_pairs)


def test_the_interval_of_the_accuracy_takes_prompts_as_units():
    """20 copies of every pair under one prompt: no more information than one copy."""
    rng = np.random.default_rng(3)
    chosen, rejected = made_pairs(rng, 100)
    width = lambda out: out["accuracy_ci95"][1] - out["accuracy_ci95"][0]  # noqa: E731
    single = width(calibrate(chosen, rejected))
    copies = [np.repeat(x, 20) for x in (chosen, rejected)]
    groups = np.repeat(np.arange(100), 20).tolist()
    assert width(calibrate(*copies, groups=groups)) == pytest.approx(single, rel=0.15)
    assert width(calibrate(*copies)) < single / 3
    share = accuracy(chosen, rejected)
    normal = 2 * 1.96 * math.sqrt(share * (1 - share) / 100)
    assert single == pytest.approx(normal, rel=0.2)


def test_accuracy_by_strength():
    out = calibrate(
        np.array([2.0, 1.0, 0.0, 3.0]),
        np.array([1.0, 2.0, -1.0, 0.0]),
        strengths=["3", "1", "3", None],
        resamples=5,
    )
    assert list(out["by_strength"]) == ["3", "1"]
    assert out["by_strength"]["3"]["accuracy"] == 1 and out["by_strength"]["3"]["pairs"] == 2
    assert out["by_strength"]["1"]["accuracy"] == 0


def test_many_strengths_are_put_into_quarters():
    rng = np.random.default_rng(6)
    chosen, rejected = made_pairs(rng, 200)
    strengths = rng.permutation(np.arange(200) // 2).tolist()  # 100 numbers, twice each
    out = calibrate(chosen, rejected, strengths=strengths, resamples=5)
    assert list(out["by_strength"]) == ["75 to 99", "50 to 74", "25 to 49", "0 to 24"]
    for quarter, row in zip((3, 2, 1, 0), out["by_strength"].values()):
        members = np.array(strengths) // 25 == quarter
        assert row["pairs"] == 50 == members.sum()
        assert row["accuracy"] == pytest.approx(accuracy(chosen[members], rejected[members]))
    few = calibrate(chosen, rejected, strengths=[10.0, 2.0] * 99 + ["sure", None], resamples=5)
    assert list(few["by_strength"]) == ["sure", "10", "2"]  # by size, not by the alphabet
    assert calibrate(chosen, rejected, strengths=[3.0] * 200, resamples=5)["by_strength"] == {}


def test_all_right_is_no_certainty():
    """28 of 28: resampling knows nothing else; Wilson's interval is 1 / (1 + z^2 / n) to 1."""
    out = calibrate(np.ones(28), np.zeros(28), resamples=20)
    assert out["accuracy_ci95"] == pytest.approx([1 / (1 + 1.959964**2 / 28), 1.0])
    twice = calibrate(np.ones(28), np.zeros(28), groups=[*range(14)] * 2, resamples=20)
    assert twice["accuracy_ci95"] == pytest.approx([1 / (1 + 1.959964**2 / 14), 1.0])


@pytest.mark.parametrize(
    ("chosen", "rejected", "message"),
    [
        ([], [], "must be"),
        ([1.0], [1.0, 2.0], "must be"),
        ([1.0, math.nan], [0.0, 0.0], r"chosen\[1\] is nan"),
        ([1.0], [math.inf], r"rejected\[0\] is inf"),
    ],
)
def test_what_cannot_be_calibrated(chosen, rejected, message):
    with pytest.raises(ValueError, match=message):
        calibrate(np.array(chosen), np.array(rejected))


def test_the_report_holds_the_numbers_and_a_figure(tmp_path):
    chosen, rejected = made_pairs(np.random.default_rng(4), 80)
    strengths = ["2"] * 40 + ["1"] * 40
    summary = calibrate(chosen, rejected, strengths=strengths) | {"config": {"model": "<m>"}}
    curves = [{"step": 1, "loss": 0.7, "rewards/accuracies": 0.5}]
    page = write_calibration_report(
        tmp_path / "report",
        title="A <reward> model",
        summary=summary,
        chosen=chosen,
        rejected=rejected,
        curves=curves,
    )
    names = {path.name for path in (tmp_path / "report").iterdir()}
    assert names == {"index.html", "summary.json", "calibration.png", "curves.png"}
    assert json.loads((tmp_path / "report" / "summary.json").read_text())["ece"] == summary["ece"]
    text = page.read_text()
    assert "A &lt;reward&gt; model" in text and "&lt;m&gt;" in text
    assert f"{summary['accuracy']:.3f}" in text and text.count("data:image/png;base64,") == 2
    assert (tmp_path / "report" / "calibration.png").read_bytes()[:4] == b"\x89PNG"
    members = {"accuracy": [0.5, 0.625], "disagreement": 0.25}
    printed = format_calibration(summary | {"ensemble": members})
    assert "members: accuracy 0.500, 0.625" in printed and "disagreement 0.250" in printed
    assert printed.isascii() and max(map(len, printed.splitlines())) <= 80
