"""The report of a run: one self-contained HTML page, its pictures, and summary.json."""

import base64
import html
import json
import math
import os
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from align_jax.evaluation import figures

POLICIES = {"base": "base", "best_of_4": "best of 4", "trained": "trained"}
FIELDS = ("reward_mean", "reward_ci95", "win_rate", "kl", "distinct_2")
_SAMPLE_FIELDS = ("prompt", "base", "base_score", "trained", "trained_score")

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


def _check(summary: Mapping, samples: Sequence[Mapping]) -> None:
    missing = [
        f"{key}.{field}"
        for key in POLICIES
        for field in FIELDS
        if field not in summary.get(key, {})
    ]
    if "seconds" not in summary:
        missing.append("seconds")
    if missing:
        raise ValueError(f"the summary lacks {', '.join(missing)}")
    for index, sample in enumerate(samples):
        absent = [field for field in _SAMPLE_FIELDS if field not in sample]
        if absent:
            raise ValueError(f"samples[{index}] lacks {', '.join(absent)}")


def _number(value: float | None, pattern: str = "{:.3f}") -> str:
    return "n/a" if value is None or not math.isfinite(value) else pattern.format(value)


def _cells(key: str, row: Mapping[str, float], signs: tuple[str, str]) -> list[str]:
    """A policy's row of the table of results; `signs` are plus-minus and at-most."""
    plus_minus, at_most = signs
    kl = _number(row["kl"], "{:.2f}")
    return [
        f"{_number(row['reward_mean'])} {plus_minus} {_number(row['reward_ci95'])}",
        _number(row["win_rate"]),
        f"{at_most} {kl}" if key == "best_of_4" else kl,
        _number(row["distinct_2"]),
    ]


_HEADINGS = ("mean reward", "win rate", "KL (nats)", "distinct-2")


def _seconds(summary: Mapping) -> list[tuple[str, float]]:
    """Phases and their seconds, the total last."""
    phases = {name: value for name, value in summary["seconds"].items() if name != "total"}
    total = summary["seconds"].get("total", sum(phases.values()))
    return [*phases.items(), ("total", total)]


def format_summary(summary: Mapping) -> str:
    """The closing summary for a terminal of 80 columns, in ASCII; `summary` as for write_report."""
    rows = [("", *_HEADINGS)]
    rows += [(label, *_cells(key, summary[key], ("+-", "<="))) for key, label in POLICIES.items()]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        row[0].ljust(widths[0])
        + "".join("   " + cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))
        for row in rows
    ]
    lines.insert(1, "-" * len(lines[0]))
    lines.append("(+- 95 % interval by prompt; win rate against base samples, ties half)")
    if "exploitation" in summary:
        lines += ["", *textwrap.wrap(summary["exploitation"]["line"], 80)]
    phases = [f"{name} {_number(value, '{:.1f}')} s" for name, value in _seconds(summary)]
    lines += ["", *textwrap.wrap("Time: " + ", ".join(phases), 80, break_on_hyphens=False)]
    return "\n".join(lines)


def _text(value: object) -> str:
    """Escaped for HTML, control characters (model output has them) replaced."""
    printable = re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", "\N{REPLACEMENT CHARACTER}", str(value))
    return html.escape(printable)


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
    rows = [
        (key, [label, *_cells(key, summary[key], ("±", "≤"))]) for key, label in POLICIES.items()
    ]
    parts = [
        html_table(("policy", *_HEADINGS), rows, "results"),
        '<p class="caption">Mean reward with its 95 % confidence interval by prompt. Win rate: the '
        "probability that a sample beats a base sample of the same prompt, ties half. KL: of whole "
        "responses to the base; for best of 4 the bound log 4 − 3/4. Distinct-2: distinct pairs of "
        "words over all pairs, in corpora of equal size.</p>",
    ]
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
    rows = "".join(
        f"<tr><td>{_text(sample['prompt'])}</td>"
        f"<td>{_text(sample['base'])}</td>"
        f'<td class="number">{_number(sample["base_score"], "{:+.2f}")}</td>'
        f"<td>{_text(sample['trained'])}</td>"
        f'<td class="number">{_number(sample["trained_score"], "{:+.2f}")}</td></tr>\n'
        for sample in samples
    )
    return (
        '<div class="scroll"><table class="samples"><thead><tr><th>prompt</th><th>base</th>'
        '<th class="number score">score</th><th>trained</th><th class="number score">score</th>'
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
    """Writes index.html, curves.png, rewards.png, frontier.png and summary.json; returns the page.

    directory: made if missing, say WORKDIR/report. A report that is there survives a failure.
    summary: `base`, `best_of_4`, `trained`, each with reward_mean, reward_ci95 (half-width),
    win_rate,
        kl (nats; of best_of_4 its bound) and distinct_2; `seconds` {phase: seconds}, whose total is
        added up unless given; what else there is (seed, config ...) is kept and listed, and
        `exploitation` (of statistics.exploitation) shown. NaN becomes null in summary.json.
    curves: rows of metrics.jsonl; steps without a known metric are passed over.
    rewards: `base` [P, M], `trained` [P, K] and perhaps `best_of_4` [P, G], for the pictures.
    samples: {prompt, base, base_score, trained, trained_score} each, shown in this order.
    notes: sentences for the reader. Raises ValueError if summary or samples lack a field.
    """
    _check(summary, samples)
    pictures = {
        "curves.png": figures.training_curves(curves),
        "rewards.png": figures.reward_histogram(rewards),
        "frontier.png": figures.reward_against_kl(rewards["base"], summary["trained"]),
    }
    pictures = {name: picture for name, picture in pictures.items() if picture is not None}
    summary = plain(summary)
    page = _page(title, summary, pictures, samples, [*_curve_notes(curves), *notes])
    listing = json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    return write_files(directory, page, listing, pictures)
