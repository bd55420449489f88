"""Figures of results. Each function returns a `go.Figure` and leaves plotly's global templates alone."""

from ivlens.plots.checkup import plot_checkup
from ivlens.plots.continual import plot_continual
from ivlens.plots.dynamics import plot_change
from ivlens.plots.heads import plot_effects, plot_residual, plot_shares, plot_similarity
from ivlens.plots.recovery import plot_loss, plot_probabilities, plot_recovery
from ivlens.plots.scores import plot_balance, plot_evaluation, plot_search

__all__ = ["plot_balance", "plot_change", "plot_checkup", "plot_continual", "plot_effects", "plot_evaluation"]
__all__ += [
    "plot_loss",
    "plot_probabilities",
    "plot_recovery",
    "plot_residual",
    "plot_search",
    "plot_shares",
    "plot_similarity",
]
