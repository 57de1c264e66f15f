"""Learning rate over a trial: warm-up, constant, and a linear cool-down branch at a rung's end."""


def learning_rate_at(
    step: int, *, peak: float, warmup_steps: int, hold_step: int, end_step: int
) -> float:
    """Return the learning rate of an optimizer step (1 is the first).

    Rises linearly over ``warmup_steps``, stays at ``peak`` through ``hold_step``, then falls
    linearly so that a step after ``end_step`` would have zero.

    >>> [learning_rate_at(s, peak=1.0, warmup_steps=2, hold_step=4, end_step=6) for s in (1, 2, 4)]
    [0.5, 1.0, 1.0]
    >>> round(learning_rate_at(6, peak=1.0, warmup_steps=2, hold_step=4, end_step=6), 3)
    0.333
    """
    rise = min(1.0, step / warmup_steps) if warmup_steps else 1.0
    fall = 1.0
    if step > hold_step:
        fall = (end_step - step + 1) / (end_step - hold_step + 1)
    return peak * rise * fall
