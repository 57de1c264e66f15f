"""What a study took: optimizer steps of each phase, time, and how good its forecast was."""

from dataclasses import dataclass

from lora_tune.records import Forecast, StudySnapshot, TrialState
from lora_tune.report.resolved import spec_value
from lora_tune.search.plan import start_steps


@dataclass(frozen=True, slots=True, kw_only=True)
class CostSummary:
    """Steps are those of finished segments, cool-downs counted; a cached trial takes none."""

    wall_s: float
    num_tokens: int  # trained on, search and confirmation
    tokens_per_s: float | None  # over all wall time, so loading and evaluation are in it
    search_steps: int
    confirmation_steps: int  # of finished runs; a refit on all rows is not counted
    grid_steps: int  # all trials of the search, each trained once at full length
    forecast: Forecast | None
    forecast_error: float | None  # took / forecast - 1: above 0 it took longer; None until finished

    @property
    def total_steps(self) -> int:
        """Steps of search and confirmation."""
        return self.search_steps + self.confirmation_steps


def summarize_cost(snapshot: StudySnapshot, *, finished: bool) -> CostSummary:
    """Add up what all trials and confirmation runs took."""
    trained = [t for t in snapshot.trials if t.state is not TrialState.CACHED]
    rungs = snapshot.lock.rungs
    runs = snapshot.confirmation.runs if snapshot.confirmation else ()
    num_tokens = sum(r.num_tokens for t in trained for r in t.rungs)
    num_tokens += sum(run.num_tokens for run in runs)
    forecast, wall_s = snapshot.lock.forecast, snapshot.wall_s
    known = finished and forecast is not None and forecast.total_s > 0
    return CostSummary(
        wall_s=wall_s,
        num_tokens=num_tokens,
        tokens_per_s=num_tokens / wall_s if wall_s > 0 else None,
        search_steps=_search_steps(snapshot),
        confirmation_steps=_confirmation_steps(snapshot),
        grid_steps=len(trained) * max(rungs, default=0),
        forecast=forecast,
        forecast_error=wall_s / forecast.total_s - 1 if known and forecast else None,
    )


def _search_steps(snapshot: StudySnapshot) -> int:
    rungs = snapshot.lock.rungs
    ratio = spec_value(snapshot.lock.spec, "train", "cooldown_ratio")
    starts = start_steps(rungs, cooldown_ratio=ratio if isinstance(ratio, int | float) else 0.0)
    return sum(
        result.steps - starts[result.rung]
        for trial in snapshot.trials
        if trial.state is not TrialState.CACHED
        for result in trial.rungs
        if result.rung < len(rungs)
    )


def _confirmation_steps(snapshot: StudySnapshot) -> int:
    confirmation = snapshot.confirmation
    if confirmation is None:
        return 0
    steps = {candidate.name: candidate.steps for candidate in confirmation.candidates}
    complete = (run for run in confirmation.runs if run.state is TrialState.COMPLETE)
    return sum(steps[run.candidate] for run in complete)
