"""Statistics of losses per row: intervals, paired comparisons, the decision; no torch, no Optuna."""
