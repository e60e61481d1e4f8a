"""Decision patterns: which units are on or off together when a network predicts a class, and what that says of them."""

from lightning_prune.patterns.evidence import STATUSES, Evidence, evidence_of
from lightning_prune.patterns.mining import Pattern, PatternError, PatternMining, mine
from lightning_prune.patterns.signatures import Signatures, signatures_of
from lightning_prune.patterns.tree import Tree, grow_tree

__all__ = [
    "STATUSES",
    "Evidence",
    "Pattern",
    "PatternError",
    "PatternMining",
    "Signatures",
    "Tree",
    "evidence_of",
    "grow_tree",
    "mine",
    "signatures_of",
]
