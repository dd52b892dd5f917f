"""Probes on the page: does the partner help, what is restored, which words are likely.

Reads the `probes.json` that `trainer.evaluate` writes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from trainer.report.charts import Estimate, intervals, number
from trainer.report.data import Run
from trainer.report.elements import (
    card,
    folded,
    grid,
    legend,
    missing,
    picture,
    section,
)

# probe, what it is called, its unit, what the partner is
PROBES = (
    ("mlm", "Words", "MLM loss, nats a masked word", "image"),
    ("recon", "Pixels", "RECON loss, squared error a masked pixel", "caption"),
    ("mim", "Pixels", "MIM loss, absolute error a masked pixel", "caption"),
)
_PARTNERS = {
    "true": "its own",
    "shuffled": "another's",
    "blank": "a blank",
    "empty": "an empty",
}


def probe_sections(runs: Sequence[Run]) -> list[str]:
    """Probes, reconstructions and words at masked places."""
    notes = [_missing(run) for run in runs if not run.probes]
    if len(notes) == len(runs):
        return [section("Probes", *notes)]
    sections = [
        section(
            "Probes",
            legend([run.name for run in runs]),
            grid(*filter(None, (_probe(runs, *probe) for probe in PROBES))),
            *notes,
            lead="Words are masked and the image is clean, or the other way round. A "
            "model that reads its partner loses when the partner is wrong.",
        )
    ]
    figures = grid(*(part for run in runs for part in _figures(run, named=runs[1:])))
    words = _of_each_run(runs, _words)
    if any((run.probes or {}).get("figures") for run in runs):
        sections.append(section("Reconstructions", figures))
    if words:
        lead = "Every boxed word was masked. Below it what the model would put there."
        sections.append(section("Words at masked places", words, lead=lead))
    return sections


def headline(runs: Sequence[Run]) -> str:
    """One sentence: in how many runs a wrong partner is worse, for sure."""
    measured = [run for run in runs if run.probes]
    sentences = []
    for probes, restored, partner in (
        (("mlm",), "words", "image"),
        (("recon", "mim"), "pixels", "caption"),
    ):
        gaps = [
            gap
            for run in measured
            for probe in probes
            if (gap := shuffled_gap(run, probe))
        ]
        clear = sum(gap["ci95"][0] > 0 for gap in gaps)
        if gaps:
            verb = "helps" if clear == len(gaps) else "does not surely help"
            some = f" ({clear} of {len(gaps)} runs)" if len(gaps) > 1 else ""
            sentences.append(f"the right {partner} {verb} to restore {restored}{some}")
    if not sentences:
        return ""
    text = ", and ".join(sentences)
    pairs = ", ".join(
        sorted(
            {
                f"{run.probes['pairs']:,}"
                for run in measured
                if run.probes and "pairs" in run.probes
            }
        )
    )
    return f"On {pairs} held-out pairs, {text}." if pairs else f"{text.capitalize()}."


def shuffled_gap(run: Run, probe: str) -> Mapping[str, Any] | None:
    """How much worse another pair's partner is than the true one."""
    return ((run.probes or {}).get(probe) or {}).get("gaps", {}).get("shuffled")


def _missing(run: Run) -> str:
    cure = f"python -m trainer.evaluate {run.path} --task probes"
    return missing(f"No probes of {run.name} yet.", cure)


def _probe(runs: Sequence[Run], probe: str, title: str, unit: str, partner: str) -> str:
    """A card, or nothing where no run has such a probe."""
    losses = _estimates(runs, probe, "conditions", partner)
    gaps = _estimates(runs, probe, "gaps", partner)
    if not losses:
        return ""
    body = [f'<p class="unit">{escape(unit)}, given</p>']
    body.append(intervals(losses, label=f"{unit} by partner"))
    if gaps:
        body.append(f'<p class="unit">Worse than with its own {partner} by</p>')
        body.append(intervals(gaps, label=f"{unit}: loss by partner", zero=True))
    note = "Dots are means, bars 95 % bootstrap intervals. Right of the line at 0: the "
    return card(*body, title=title, note=f"{note}wrong {partner} is worse.")


def _estimates(
    runs: Sequence[Run], probe: str, part: str, partner: str
) -> list[Estimate]:
    """One per condition and run, conditions together."""
    found: dict[str, list[Estimate]] = {}
    for colour, run in enumerate(runs):
        values = ((run.probes or {}).get(probe) or {}).get(part, {})
        for name, value in values.items():
            low, high = value["ci95"]
            found.setdefault(name, []).append(
                Estimate(
                    label=f"{_PARTNERS.get(name, name)} {partner}",
                    colour=colour,
                    mean=value["mean"],
                    low=low,
                    high=high,
                )
            )
    return [one for estimates in found.values() for one in estimates]


def _of_each_run(runs: Sequence[Run], part: Any) -> str:
    """`part(run)` of every run that has it: the first open, the others folded."""
    made = [(run.name, html) for run in runs if (html := part(run))]
    if not made:
        return ""
    rest = [folded(f"The same of {name}", html) for name, html in made[1:]]
    name = f'<p class="unit">{escape(made[0][0])}</p>' if rest else ""
    return name + made[0][1] + "".join(rest)


def _figures(run: Run, *, named: object) -> list[str]:
    """A run's figures, under its name where there are others beside it."""
    figures = (run.probes or {}).get("figures", ())
    # A single figure is what the section is called after.
    titles = [one.get("title", "") if len(figures) > 1 else "" for one in figures]
    return [
        card(
            picture(run.path, figure["file"], figure.get("title", "")),
            title=": ".join(filter(None, [run.name if named else "", title])),
            note=figure.get("caption", ""),
            classes="figure",
        )
        for figure, title in zip(figures, titles, strict=True)
    ]


def _words(run: Run) -> str:
    pairs = [
        card(
            f'<div class="pair">{picture(run.path, pair["image"], pair.get("uid", ""))}'
            f'<div class="words">{"".join(_word(token) for token in pair["tokens"])}'
            "</div></div>"
        )
        for pair in (run.probes or {}).get("top_words", ())
    ]
    return "".join(pairs)


def _word(token: Mapping[str, Any]) -> str:
    if not token.get("masked"):
        return f"<b>{escape(token['text'])}</b>"
    rows = "".join(
        f"<li{' class=hit' if word == token['text'] else ''} "
        f'style="--p:{100 * share:.1f}%"><span>{escape(word)}</span>'
        f"<span>{number(100 * share, 1)}</span></li>"
        for word, share in token.get("top5", ())
    )
    return f'<div class="guess"><b>{escape(token["text"])}</b><ol>{rows}</ol></div>'
