import base64
import html.parser
import json
import math

import numpy as np
import pytest

from align_jax.evaluation import figures, report
from align_jax.evaluation import statistics as st

HOSTILE = "</td><script>alert('x')</script><img src=\"http://example.com/a.png\"> & \x00 \udc80"


def make_summary():
    row = {
        "reward_mean": 0.1854,
        "reward_ci95": 0.0301,
        "win_rate": 0.5,
        "kl": 0.0,
        "distinct_2": 0.9,
    }
    return {
        "base": row,
        "best_of_4": {
            **row,
            "reward_mean": 0.597,
            "win_rate": 0.78,
            "kl": st.best_of_n_kl_bound(4),
        },
        "trained": {**row, "reward_mean": np.float32(0.5), "win_rate": 0.7, "kl": 3.1234},
        "seconds": {"sampling": 84.15, "training": 92.0},
        "seed": 3,
        "exploitation": {"line": "The trained policy leans on <wonderful>."},
    }


def make_inputs(**changes):
    rng = np.random.default_rng(0)
    inputs = {
        "title": "Sentiment <b>& more</b>",
        "summary": make_summary(),
        "curves": [
            {"step": step, "wall_time": 0.0, "loss": 0.7, "rewards/chosen": -step / 10.0}
            for step in range(1, 6)
        ],
        "rewards": {"base": rng.uniform(-1, 1, (4, 8)), "trained": rng.uniform(0, 1, (4, 2))},
        "samples": [
            {
                "prompt": "P",
                "base": "B",
                "base_score": -0.25,
                "trained": HOSTILE,
                "trained_score": 0.5,
            }
        ],
        "notes": ["a note with <i>tags</i>"],
    }
    return {**inputs, **changes}


class Page(html.parser.HTMLParser):
    """Tags with their attributes, cells by row and the text of a page, whose tags must balance."""

    VOID = {"meta", "img", "link", "br"}

    def __init__(self, path):
        super().__init__()
        self.tags, self.rows, self.open, self.pieces = [], [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []
        self.text = " ".join(self.pieces)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.pieces.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run") / "report"
    path = report.write_report(directory, **make_inputs())
    assert path == directory / "index.html"
    return directory


def test_the_files_are_there_and_nothing_else(written):
    names = ["curves.png", "frontier.png", "index.html", "rewards.png", "summary.json"]
    assert sorted(path.name for path in written.iterdir()) == names
    for name in names[:2] + names[3:4]:
        assert (written / name).read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_summary_json_has_the_schema_and_the_numbers(written):
    summary = json.loads((written / "summary.json").read_text())
    for policy in ("base", "best_of_4", "trained"):
        fields = ["distinct_2", "kl", "reward_ci95", "reward_mean", "win_rate"]
        assert sorted(summary[policy]) == fields
    assert summary["trained"]["kl"] == 3.1234 and summary["trained"]["reward_mean"] == 0.5
    assert summary["seconds"] == {"sampling": 84.15, "training": 92.0} and summary["seed"] == 3


def test_the_page_is_self_contained_and_embeds_the_pictures(written):
    page = Page(written / "index.html")
    sources = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    embedded = [
        base64.b64decode(source.removeprefix("data:image/png;base64,")) for source in sources
    ]
    assert embedded == [
        (written / name).read_bytes() for name in ("curves.png", "rewards.png", "frontier.png")
    ]
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object")
        for name, value in attributes.items():
            assert not name.startswith("on") and "://" not in (value or "")
    raw = (written / "index.html").read_text()
    assert "url(" not in raw and "@import" not in raw


def test_model_output_is_shown_and_not_interpreted(written):
    page = Page(written / "index.html")
    (row,) = [row for row in page.rows if row[0] == "P"]
    visible = HOSTILE.replace("\x00", r"\x00").replace("\udc80", r"\udc80")
    assert row == ["P", "B", "-0.25", visible, "+0.50"]
    assert "<i>tags</i>" in page.text and "Sentiment <b>& more</b>" in page.text
    assert "leans on <wonderful>." in page.text


def test_the_table_of_results_is_rounded_and_right_aligned(written):
    page = Page(written / "index.html")
    assert page.rows[1:4] == [
        ["base", "0.185 ± 0.030", "0.500", "0.00", "0.900"],
        ["best of 4", "0.597 ± 0.030", "0.780", "≤ 0.64", "0.900"],
        ["trained", "0.500 ± 0.030", "0.700", "3.12", "0.900"],
    ]
    assert [row for row in page.rows if len(row) == 2] == [
        ["phase", "seconds"],
        ["sampling", "84.2"],
        ["training", "92.0"],
        ["total", "176.2"],
    ]
    cells = [attributes.get("class") for tag, attributes in page.tags if tag == "td"]
    assert cells.count("number") == len(cells) - 3
    assert "text-align: right" in (written / "index.html").read_text()


def test_a_falling_reward_of_the_chosen_is_said(written, tmp_path):
    assert "chosen responses ended at -0.50" in Page(written / "index.html").text
    rising = [{"step": 1, "loss": 0.7, "rewards/chosen": 0.2}]
    path = report.write_report(tmp_path, **make_inputs(curves=rising))
    assert "chosen responses" not in Page(path).text


def test_not_a_number_is_null_and_reads_na(tmp_path):
    summary = make_summary()
    summary["trained"] = {**summary["trained"], "reward_ci95": math.nan, "distinct_2": None}
    path = report.write_report(tmp_path, **make_inputs(summary=summary, curves=[]))
    trained = json.loads((tmp_path / "summary.json").read_text())["trained"]
    assert trained["reward_ci95"] is None and trained["distinct_2"] is None
    assert ["trained", "0.500 ± n/a", "0.700", "3.12", "n/a"] in Page(path).rows
    assert not (tmp_path / "curves.png").exists()


def test_what_the_summary_or_a_sample_lacks_is_named(tmp_path):
    summary = make_summary()
    summary["trained"] = {"reward_mean": 0.5, "reward_ci95": 0.0, "win_rate": 0.7, "kl": 1.0}
    summary["best_of_4"] = {"reward_mean": 0.5, "reward_ci95": 0.0}
    del summary["seconds"]
    with pytest.raises(ValueError, match=r"best_of_4\.kl.*trained\.distinct_2, seconds"):
        report.write_report(tmp_path / "r", **make_inputs(summary=summary))
    with pytest.raises(ValueError, match=r"samples\[0\] lacks base_score, trained_score"):
        samples = [{"prompt": "", "base": "", "trained": ""}]
        report.write_report(tmp_path / "r", **make_inputs(samples=samples))
    assert not (tmp_path / "r").exists()


def test_there_is_a_column_for_what_was_measured_and_for_nothing_else(tmp_path):
    summary = {
        "trained": {"distinct_2": 0.9, "loss": 1.25, "accuracy": 0.75, "accuracy_ci95": [0.5, 1.0]}
        | {"judged: win_rate": 0.625, "judged: win_rate_ci95": 0.1, "pairs": 40},
        "seconds": {"loss": 1.0},
    }
    samples = [{"prompt": "P", "trained": "T", "trained_score": None}]
    changes = {"summary": summary, "rewards": {}, "samples": samples, "curves": []}
    page = Page(report.write_report(tmp_path, **make_inputs(**changes)))
    assert page.rows[:2] == [
        ["policy", "judged: win rate", "distinct-2", "loss", "accuracy", "pairs"],
        ["trained", "0.625 ± 0.100", "0.900", "1.250", "0.750 [0.500, 1.000]", "40"],
    ]
    assert ["P", "T"] in page.rows and "mean reward" not in page.text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.html", "summary.json"]
    assert "best of 4" not in report.format_summary(summary)


def test_a_table_that_is_too_wide_is_turned_around():
    row = {f"measure {n}": n / 3 for n in range(12)}
    summary = {"base": row, "trained": row, "seconds": {}}
    lines = report.format_table(summary).split("\n")
    assert max(map(len, lines)) <= 80
    assert lines[0].split() == ["base", "trained"]
    assert lines[3].split() == ["measure", "1", "0.333", "0.333"]


@pytest.mark.parametrize("failing", ["picture", "write", "json"])
def test_an_existing_report_survives_a_failure(tmp_path, monkeypatch, failing):
    report.write_report(tmp_path, **make_inputs())
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    changes = {"title": "another"}
    if failing == "picture":
        monkeypatch.setattr(figures, "reward_against_kl", lambda *_: 1 / 0)
    elif failing == "write":
        original = type(tmp_path).write_bytes

        def full_at_the_page(path, content):
            if "index" in path.name:
                original(path, content[:100])
                raise OSError(28, "No space left on device")
            return original(path, content)

        monkeypatch.setattr(type(tmp_path), "write_bytes", full_at_the_page)
    else:
        changes["summary"] = {**make_summary(), "seed": object()}
    with pytest.raises((ZeroDivisionError, OSError, TypeError)):
        report.write_report(tmp_path, **make_inputs(**changes))
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_files_get_the_permissions_of_any_new_file(written, tmp_path):
    (tmp_path / "any").write_text("")
    modes = {path.stat().st_mode for path in written.iterdir()}
    assert modes == {(tmp_path / "any").stat().st_mode}


def test_the_closing_summary_fits_a_terminal():
    summary = make_summary()
    summary["exploitation"] = {"line": "word " * 60}
    summary["seconds"] = {f"phase number {n}": 10.0 * n for n in range(12)}
    text = report.format_summary(summary)
    lines = text.split("\n")
    assert text.isascii() and max(map(len, lines)) <= 80
    table = lines[:5]
    assert len({len(line) for line in table}) == 1
    assert table[4].split() == ["trained", "0.500", "+-", "0.030", "0.700", "3.12", "0.900"]
    assert table[3].split()[-3:-1] == ["<=", "0.64"]
    assert "total 660.0 s" in " ".join(lines)


@pytest.mark.parametrize("count", [1, 400])
def test_curves_are_drawn_for_one_row_and_for_many(count):
    rows = [{"step": n, "loss": 1 / (n + 1), "logps/chosen": math.nan} for n in range(count)]
    assert figures.training_curves(rows).startswith(b"\x89PNG")
    assert figures.training_curves([{"step": 1, "unknown": 2.0}]) is None


def test_running_mean_is_the_mean_of_the_neighbours():
    values = np.random.default_rng(1).normal(size=30)
    expected = [values[max(0, n - 2) : n + 3].mean() for n in range(30)]
    np.testing.assert_allclose(figures._running_mean(values, 5), expected, rtol=1e-12)


def test_pictures_of_equal_rewards_and_a_small_pool():
    assert figures.reward_histogram({"base": np.zeros((2, 2))}).startswith(b"\x89PNG")
    trained = {"reward_mean": 0.0, "reward_ci95": math.nan, "kl": 0.0}
    assert figures.reward_against_kl(np.zeros((2, 1)), trained).startswith(b"\x89PNG")
