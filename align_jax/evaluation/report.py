"""The report of a run: one self-contained HTML page, its pictures, and summary.json.

Its table has a row for each policy of the summary and a column for each thing that was measured.
"""

import base64
import html
import json
import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from align_jax.evaluation import figures
from align_jax.text import printable

# Rows of the table, in this order, and what they are called.
POLICIES = {"base": "base", "best_of_4": "best of 4", "trained": "trained"}

# Policies whose samples are shown side by side.
_SHOWN = ("base", "trained")


class Column(NamedTuple):
    """How a measured field is shown: its heading, the format of a number, and what it is."""

    heading: str
    pattern: str = "{:.3f}"
    caption: str = ""


# Fields with a heading of their own, in the order of their columns; others follow as they are
# called. `NAME: field` is the field of the evaluator NAME.
COLUMNS = {
    "reward_mean": Column(
        "mean reward", caption="Mean reward with its 95 % confidence interval by prompt."
    ),
    "win_rate": Column(
        "win rate",
        caption="Win rate: the probability that a sample beats a base sample of the same prompt, "
        "ties half.",
    ),
    "kl": Column("KL (nats)", "{:.2f}", "KL: of whole responses to the base{bound}."),
    "distinct_2": Column(
        "distinct-2",
        caption="Distinct-2: distinct pairs of words over all pairs, in corpora of equal size.",
    ),
}
_INTERVAL = "_ci95"
OF_EVALUATOR = ": "

_STYLE = """
:root { color-scheme: light dark; --ink: #22262b; --soft: #626a74; --line: #d9dde2;
  --paper: #ffffff; --tint: #f4f6f8; --accent: #1f6fb2; }
@media (prefers-color-scheme: dark) { :root { --ink: #dfe3e8; --soft: #98a1ac; --line: #363c44;
  --paper: #16191d; --tint: #1f242a; --accent: #6fb1ea; } }
body { margin: 0 auto; max-width: 62rem; padding: 2rem 1.2rem 4rem; color: var(--ink);
  background: var(--paper); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 1.2rem; }
h2 { font-size: 1.1rem; margin: 2.4rem 0 .6rem; }
p.caption, figcaption { color: var(--soft); font-size: .875rem; margin: .5rem 0 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .94rem; }
th, td { padding: .42rem .7rem; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top; }
thead th { color: var(--soft); font-weight: 600; font-size: .85rem; }
td.number, th.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
tr.trained td, tr.trained th { color: var(--accent); font-weight: 600; }
blockquote { margin: 1.2rem 0; padding: .7rem 1rem; background: var(--tint);
  border-left: 3px solid var(--accent); }
figure { margin: 0 0 1.6rem; }
figure img { display: block; max-width: 100%; background: #fff; border: 1px solid var(--line);
  border-radius: 4px; }
table.narrow { width: auto; min-width: 18rem; }
table.samples { min-width: 44rem; table-layout: fixed; }
table.samples td { overflow-wrap: anywhere; white-space: pre-wrap; }
table.samples .score { width: 3.6rem; }
pre { background: var(--tint); padding: .8rem 1rem; overflow-x: auto; font-size: .84rem; }
"""

_CAPTIONS = {
    "curves.png": (
        "Training",
        "Per optimizer step, on training batches. Dotted: the value at no preference. Accuracy and "
        "loss on training pairs say how well they are fitted, not how good the policy is.",
    ),
    "rewards.png": (
        "Rewards",
        "Rewards of single samples on held-out prompts; dotted lines at the means.",
    ),
    "frontier.png": (
        "Reward against KL",
        "What a nat of divergence from the base buys. Best of n needs no training, but n samples "
        "for each answer; its KL is an upper bound: the true curve lies there or further left.",
    ),
}


def plain(value):
    """`value` as JSON can hold it: numpy scalars and arrays unpacked, NaN and infinities None."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _rows(summary: Mapping) -> dict[str, Mapping]:
    return {key: summary[key] for key in POLICIES if key in summary}


def measured(summary: Mapping) -> list[str]:
    """Fields that some policy of a summary has: those of `COLUMNS` first; no intervals."""
    fields = dict.fromkeys(field for row in _rows(summary).values() for field in row)
    known = list(COLUMNS)

    def place(field: str) -> int:
        name = field.rpartition(OF_EVALUATOR)[2]
        return known.index(name) if name in known else len(known)

    return sorted((field for field in fields if not field.endswith(_INTERVAL)), key=place)


def _check(summary: Mapping, samples: Sequence[Mapping]) -> None:
    missing = [
        f"{key}.{field}"
        for key, row in _rows(summary).items()
        for field in measured(summary)
        if field not in row
    ]
    if not _rows(summary):
        missing.append(f"a policy ({', '.join(POLICIES)})")
    if "seconds" not in summary:
        missing.append("seconds")
    if missing:
        raise ValueError(f"the summary lacks {', '.join(missing)}")
    shown = [key for key in _SHOWN if any(key in sample for sample in samples)]
    fields = ["prompt", *(field for key in shown for field in (key, f"{key}_score"))]
    for index, sample in enumerate(samples):
        absent = [field for field in fields if field not in sample]
        if absent:
            raise ValueError(f"samples[{index}] lacks {', '.join(absent)}")


def _number(value: float | None, pattern: str = "{:.3f}") -> str:
    return "n/a" if value is None or not math.isfinite(value) else pattern.format(value)


def _column(field: str) -> Column:
    name = field.rpartition(OF_EVALUATOR)[2]
    return COLUMNS.get(name, Column(name))


def _heading(field: str) -> str:
    evaluator, separator, _ = field.rpartition(OF_EVALUATOR)
    return evaluator + separator + _column(field).heading


def _cell(key: str, row: Mapping, field: str, signs: tuple[str, str]) -> str:
    """What a policy has of a field, with its interval; `signs` are plus-minus and at-most."""
    plus_minus, at_most = signs
    pattern = "{}" if isinstance(row[field], int) else _column(field).pattern
    cell = _number(row[field], pattern)
    if field == "kl" and key == "best_of_4":
        return f"{at_most} {cell}"
    interval = row.get(field.removesuffix("_mean") + _INTERVAL, ())
    if isinstance(interval, list | tuple):
        ends = ", ".join(_number(end, pattern) for end in interval)
        return f"{cell} [{ends}]" if ends else cell
    return f"{cell} {plus_minus} {_number(interval, pattern)}"


def _table(summary: Mapping, signs: tuple[str, str]) -> list[list[str]]:
    """Headings, then a row of cells for each policy, its label first."""
    fields = measured(summary)
    body = [
        [POLICIES[key], *(_cell(key, row, field, signs) for field in fields)]
        for key, row in _rows(summary).items()
    ]
    return [["", *map(_heading, fields)], *body]


def _seconds(summary: Mapping) -> list[tuple[str, float]]:
    """Phases and their seconds, the total last."""
    phases = {name: value for name, value in summary["seconds"].items() if name != "total"}
    total = summary["seconds"].get("total", sum(phases.values()))
    return [*phases.items(), ("total", total)]


def format_table(summary: Mapping) -> str:
    """The table for a terminal of 80 columns, in ASCII; turned around where it is too wide."""
    rows = _table(summary, ("+-", "<="))
    if _width(rows) > 80:
        rows = [list(row) for row in zip(*rows)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [
        row[0].ljust(widths[0])
        + "".join("   " + cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))
        for row in rows
    ]
    lines.insert(1, "-" * len(lines[0]))
    fields = {field.rpartition(OF_EVALUATOR)[2] for field in measured(summary)}
    notes = ["+- 95 % interval by prompt"] if any("+-" in line for line in lines) else []
    if "win_rate" in fields:
        notes.append("win rate against base samples, ties half")
    if notes:
        lines.append(f"({'; '.join(notes)})")
    return "\n".join(lines)


def _width(rows: Sequence[Sequence[str]]) -> int:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return sum(widths) + 3 * (len(widths) - 1)


def format_summary(summary: Mapping) -> str:
    """The closing summary for a terminal of 80 columns, in ASCII; `summary` as for write_report."""
    lines = [format_table(summary)]
    if "exploitation" in summary:
        lines += ["", *textwrap.wrap(summary["exploitation"]["line"], 80)]
    phases = [f"{name} {_number(value, '{:.1f}')} s" for name, value in _seconds(summary)]
    lines += ["", *textwrap.wrap("Time: " + ", ".join(phases), 80, break_on_hyphens=False)]
    return "\n".join(lines)


def _text(value: object) -> str:
    """Escaped for HTML; model output has control and direction characters, which are shown."""
    return html.escape(printable(str(value)))


def html_table(headings: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]], css: str) -> str:
    """Rows (class, cells): the first column is a heading, the others are numbers."""
    head = "".join(f'<th class="number">{_text(heading)}</th>' for heading in headings[1:])
    body = "".join(
        f'<tr class="{name}"><th scope="row">{_text(cells[0])}</th>'
        + "".join(f'<td class="number">{_text(cell)}</td>' for cell in cells[1:])
        + "</tr>\n"
        for name, cells in rows
    )
    return (
        f'<div class="scroll"><table class="{css}"><thead><tr><th>{_text(headings[0])}</th>{head}'
        f"</tr></thead><tbody>\n{body}</tbody></table></div>"
    )


def _results(summary: Mapping) -> str:
    headings, *cells = _table(summary, ("±", "≤"))
    rows = list(zip(_rows(summary), cells))
    bound = "; for best of 4 the bound log 4 − 3/4" if "best_of_4" in summary else ""
    captions = dict.fromkeys(_column(field).caption for field in measured(summary))
    caption = " ".join(one.format(bound=bound) for one in captions if one)
    parts = [html_table(["policy", *headings[1:]], rows, "results")]
    if caption:
        parts.append(f'<p class="caption">{_text(caption)}</p>')
    if "exploitation" in summary:
        parts.append(f"<blockquote>{_text(summary['exploitation']['line'])}</blockquote>")
    return "\n".join(parts)


def _curve_notes(curves: Sequence[Mapping[str, float]]) -> list[str]:
    chosen = [row["rewards/chosen"] for row in curves if "rewards/chosen" in row]
    final = float(np.mean(chosen[-max(1, len(chosen) // 5) :])) if chosen else 0.0
    if final >= 0:
        return []
    return [
        f"The implicit reward of the chosen responses ended at {final:.2f} (mean of the last "
        "fifth): the policy became less likely than the base to write them, and the margin comes "
        "from making the rejected ones less likely still. DPO's loss allows this."
    ]


def _samples_table(samples: Sequence[Mapping]) -> str:
    """Prompt, text and score of each policy that has samples; no scores where nothing has one."""
    shown = [key for key in _SHOWN if key in samples[0]]
    scored = [k for k in shown if any(sample[f"{k}_score"] is not None for sample in samples)]
    score = '<th class="number score">score</th>'
    head = "".join(f"<th>{key}</th>{score if key in scored else ''}" for key in shown)

    def cells(sample: Mapping, key: str) -> str:
        number = _number(sample[f"{key}_score"], "{:+.2f}")
        text = f"<td>{_text(sample[key])}</td>"
        return f'{text}<td class="number">{number}</td>' if key in scored else text

    rows = "".join(
        f"<tr><td>{_text(sample['prompt'])}</td>"
        + "".join(cells(sample, key) for key in shown)
        + "</tr>\n"
        for sample in samples
    )
    return (
        f'<div class="scroll"><table class="samples"><thead><tr><th>prompt</th>{head}'
        f"</tr></thead><tbody>\n{rows}</tbody></table></div>"
    )


def _page(
    title: str,
    summary: Mapping,
    pictures: Mapping[str, bytes],
    samples: Sequence[Mapping],
    notes: Sequence[str],
) -> str:
    sections = [("Result", _results(summary))]
    if notes:
        items = "".join(f"<li>{_text(note)}</li>" for note in notes)
        sections.append(("Notes", f"<ul>{items}</ul>"))
    for name, picture in pictures.items():
        heading, caption = _CAPTIONS[name]
        sections.append((heading, html_figure(picture, heading, caption)))
    if samples:
        sections.append(("Samples side by side", _samples_table(samples)))
    times = [("", [name, _number(value, "{:.1f}")]) for name, value in _seconds(summary)]
    sections.append(("Time", html_table(("phase", "seconds"), times, "narrow")))
    details = {
        key: value
        for key, value in summary.items()
        if key not in (*POLICIES, "seconds", "exploitation")
    }
    if details:
        listing = json.dumps(details, indent=2, ensure_ascii=False)
        sections.append(("Settings", f"<pre>{_text(listing)}</pre>"))
    return html_page(title, sections)


def html_figure(picture: bytes, heading: str, caption: str) -> str:
    """A PNG inside the page, with its caption."""
    source = "data:image/png;base64," + base64.b64encode(picture).decode("ascii")
    return (
        f'<figure><img src="{source}" alt="{_text(heading)}">'
        f"<figcaption>{_text(caption)}</figcaption></figure>"
    )


def html_page(title: str, sections: Sequence[tuple[str, str]]) -> str:
    """One self-contained page of sections (heading, HTML)."""
    body = "\n".join(f"<section><h2>{heading}</h2>\n{part}</section>" for heading, part in sections)
    # The policy keeps the page inert whatever the model wrote: no scripts, nothing fetched.
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_text(title)}</title><style>{_STYLE}</style></head>
<body><h1>{_text(title)}</h1>
{body}
</body></html>
"""


def _replace_files(directory: Path, contents: Mapping[str, bytes]) -> None:
    """Writes all files under temporary names, then renames all: what fails leaves the old ones."""
    temporary = {name: directory / f".{name}.{os.getpid()}" for name in contents}
    try:
        for name, content in contents.items():
            temporary[name].write_bytes(content)
        for name in contents:
            os.replace(temporary[name], directory / name)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)


def write_files(
    directory: str | os.PathLike, page: str, listing: str, pictures: Mapping[str, bytes]
) -> Path:
    """Writes index.html, summary.json and the pictures of a report; returns the page's path."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    # Decoded model output can hold lone surrogates, which UTF-8 cannot.
    texts = {"summary.json": listing, "index.html": page}
    encoded = {name: text.encode("utf-8", "replace") for name, text in texts.items()}
    _replace_files(directory, {**pictures, **encoded})
    return directory / "index.html"


def write_report(
    directory: str | os.PathLike,
    *,
    title: str,
    summary: Mapping,
    curves: Sequence[Mapping[str, float]],
    rewards: Mapping[str, np.ndarray],
    samples: Sequence[Mapping],
    notes: Sequence[str] = (),
) -> Path:
    """Writes index.html, summary.json and the pictures there are numbers for; returns the page.

    Args:
      directory: made if missing, say WORKDIR/report. A report that is there survives a failure.
      summary: of `base`, `best_of_4` and `trained` those there are, with the same measured fields:
        reward_mean, win_rate, kl (nats; of best_of_4 its bound), distinct_2 and others; None or NaN
        where a policy was not measured. `FIELD_ci95` (`reward_ci95`) is the half-width of a 95 %
        interval, or its ends. `seconds` {phase: seconds}, whose total is added up unless given.
        What else there is (seed, config ...) is kept and listed, and `exploitation` (of
        statistics.exploitation) shown. NaN becomes null in summary.json.
      curves: rows of metrics.jsonl; steps without a known metric are passed over. curves.png.
      rewards: `base` [P, M], `trained` [P, K] and perhaps `best_of_4` [P, G]. rewards.png, and of
        both base and trained frontier.png, if the KL was measured.
      samples: {prompt, base, base_score, trained, trained_score} each, shown in this order; one of
        the policies may be absent, and a score None.
      notes: sentences for the reader.

    Raises:
      ValueError: summary or samples lack a field.
    """
    _check(summary, samples)
    pictures = {"curves.png": figures.training_curves(curves)}
    if rewards:
        pictures["rewards.png"] = figures.reward_histogram(rewards)
    if "base" in rewards and {"reward_mean", "reward_ci95", "kl"} <= summary["trained"].keys():
        pictures["frontier.png"] = figures.reward_against_kl(rewards["base"], summary["trained"])
    pictures = {name: picture for name, picture in pictures.items() if picture is not None}
    summary = plain(summary)
    page = _page(title, summary, pictures, samples, [*_curve_notes(curves), *notes])
    listing = json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    return write_files(directory, page, listing, pictures)
