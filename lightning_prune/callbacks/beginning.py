"""What the start of a fit says of a network: what was not seen of it, and what cannot be cut along."""

from __future__ import annotations

from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_prune.callbacks.network import Network
from lightning_prune.text import listed


def warn_of_nothing(network: Network) -> None:
    """Warn that the network has nothing that may go."""
    reasons = "; ".join(f"{path}: {reason}" for path, reason in network.graph.refused[:5])
    name = type(network.module).__name__
    rank_zero_warn(f"nothing in {name} can be pruned, training goes on without it ({reasons})")


def warn_of_the_unseen(network: Network) -> None:
    """Warn of what no run has shown: steps that fail, and parameters that are trained but not used."""
    if any(path.startswith("validation_step") for path, _ in network.graph.refused):
        rank_zero_warn(
            "validation_step could not be run on a batch, for the reason in the report: what it alone hands out may be "
            "cut, so exclude that"
        )
    evidence = network.graph.evidence
    if evidence is not None and all(run.program.training for run in evidence.runs):
        rank_zero_warn(
            "nothing of the module could be run in evaluation mode, for the reasons in the report: after a cut its "
            "operators are followed, but no outputs are compared, and what it returns in evaluation mode only may be "
            "cut. Set example_input_array on the module, so that forward can be run"
        )
    if network.unused:
        rank_zero_warn(
            f"the runs that channels were found by did not use {listed(list(network.unused), 90)}. If a later step "
            f"does, what feeds them may be cut by then, and it fails: exclude that{network.likely_feeders()}. If none "
            f"does, nothing is wrong."
        )
