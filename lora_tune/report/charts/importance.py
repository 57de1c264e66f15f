"""Which settings mattered for a good loss at the first rung, with intervals."""

from typing import TYPE_CHECKING

import altair as alt

from lora_tune.records import StudySnapshot
from lora_tune.report import formatting as fmt
from lora_tune.report.charts.chart import GREY, ReportChart, layer, report_chart
from lora_tune.report.charts.values import first_results, first_steps, rounded, sentence_case

if TYPE_CHECKING:
    from lora_tune.search.importance import Importance

NAME = "importance"
MIN_TRIALS = 16
"""As in ``search/importance.py``, which is imported when there are enough: Optuna takes its time."""

_NAMES = {
    "rank": "rank",
    "alpha_ratio": "alpha ratio",
    "lora_dropout": "dropout",
    "target_set": "target modules",
    "effective_step": "effective step",
}
_CERTAIN = 0.95  # share of the resamples in which the first setting has to be first again


def importance_chart(snapshot: StudySnapshot) -> ReportChart | None:
    """Return the chart, None with fewer than 16 results at the first rung."""
    if len(first_results(snapshot)) < MIN_TRIALS:
        return None
    from lora_tune.search.importance import setting_importance

    found = setting_importance(snapshot.trials)
    if found is None:
        return None
    rows = [
        {
            "k": _NAMES[s.setting],
            "y": rounded(100 * s.share),
            "lo": rounded(100 * s.low),
            "hi": rounded(100 * s.high),
        }
        for s in found.settings
    ]
    return report_chart(
        _layers([str(row["k"]) for row in rows]),
        name=NAME,
        title=_title(found),
        text=_text(found),
        caption=_caption(snapshot, found),
        rows={"settings": rows},
        height=60 + 40 * len(rows),
    )


def _layers(order: list[str]) -> list[alt.Chart]:
    rows = layer("settings")
    y = alt.Y("k:N", sort=order, title=None, axis=alt.Axis(labelLimit=110))
    tooltip = [
        alt.Tooltip("k:N", title="setting"),
        alt.Tooltip("y:Q", title="share in %", format=".0f"),
        alt.Tooltip("lo:Q", title="95 % interval from", format=".0f"),
        alt.Tooltip("hi:Q", title="to", format=".0f"),
    ]
    title = "share of the importance (%)"
    x = alt.X("y:Q", title=title, scale=alt.Scale(domain=[0, 100]), axis=alt.Axis(tickCount=5))
    return [
        rows.mark_bar(height=18, opacity=0.85).encode(x=x, y=y, tooltip=tooltip),
        rows.mark_rule(strokeWidth=2, color=GREY).encode(x="lo:Q", x2="hi:Q", y=y, tooltip=tooltip),
        *(
            rows.mark_tick(thickness=2, size=12, color=GREY).encode(x=f"{end}:Q", y=y)
            for end in ("lo", "hi")
        ),
    ]


def _share(value: float) -> str:
    return f"{100 * value:.0f} %"


def _title(found: "Importance") -> str:
    first = found.settings[0]
    name = _NAMES[first.setting]
    again = _share(found.first_again)
    interval = f"{_share(first.share)}, 95 % interval {100 * first.low:.0f} to {_share(first.high)}"
    if found.first_again >= _CERTAIN:
        return (
            f"{sentence_case(name)} mattered most for a good loss at the first rung: {interval} of the "
            "importance."
        )
    return (
        f"No setting stands out for certain: {name} has the largest share, {interval}, and is first in "
        f"{again} of the resamples."
    )


def _text(found: "Importance") -> str:
    items = ", ".join(
        f"{_NAMES[s.setting]} {_share(s.share)} ({100 * s.low:.0f} to {_share(s.high)})"
        for s in found.settings
    )
    return f"Shares with 95 % intervals, {fmt.plural(found.num_trials, 'trial')}: {items}."


def _caption(snapshot: StudySnapshot, found: "Importance") -> str:
    diverged = ""
    if found.num_diverged:
        diverged = f" and {found.num_diverged} that diverged, counted as worse than all others"
    return (
        f"PED-ANOVA of Optuna: how differently a setting is spread among the {found.num_best} best trials "
        f"and among all, at {first_steps(snapshot)}; from {fmt.plural(found.num_trials, 'trial')}{diverged}, "
        "repeats left out. Intervals are of resampled trials. A setting that did nothing gets a small share "
        "too. Effective step: learning rate times lora_alpha / 32."
    )
