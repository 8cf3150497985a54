"""Checks whether an environment is right: the rules of forking, a checker, and a contract to inherit.

Read `rules` first (each rule is one function), then `checker` (`check_env`) and `testing`
(`EnvContract` for pytest, and `PigEnv`, the smallest complete environment).
"""

from at2po_env.contract.checker import check_env
from at2po_env.contract.testing import EnvContract, PigEnv

__all__ = ["EnvContract", "PigEnv", "check_env"]
