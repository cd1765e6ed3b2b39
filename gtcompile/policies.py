"""Policies, for `AdaptiveBackprop(policy=...)` and the trainers' callbacks: what to train within a budget."""

from gtcompile.selection.policies import NAMES as NAMES
from gtcompile.selection.policies import Best as Best
from gtcompile.selection.policies import Choose as Choose
from gtcompile.selection.policies import LastLayers as LastLayers
from gtcompile.selection.policies import Lisa as Lisa
from gtcompile.selection.policies import OccasionallyFull as OccasionallyFull
from gtcompile.selection.policies import Paper as Paper
from gtcompile.selection.policies import Policy as Policy
from gtcompile.selection.policies import Progressive as Progressive
from gtcompile.selection.policies import Random as Random
from gtcompile.selection.policies import Rotating as Rotating
from gtcompile.selection.policies import Sampled as Sampled

__all__ = [
    "NAMES",
    "Best",
    "Choose",
    "LastLayers",
    "Lisa",
    "OccasionallyFull",
    "Paper",
    "Policy",
    "Progressive",
    "Random",
    "Rotating",
    "Sampled",
]
