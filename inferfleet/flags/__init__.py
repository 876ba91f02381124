"""Flags and environment variables of engines, by release: what a release does not know is found
before it is pushed, and what to write instead is said.

    lint("vllm", "0.32.0", ["--swap-space", "4"])
    [Finding("--swap-space", "vLLM 0.32.0 has no --swap-space: it left with 0.18.0; ...")]
"""

from inferfleet.flags.lint import Finding, lint, lint_own, lint_variables
from inferfleet.flags.tables import has, table

__all__ = ["Finding", "has", "lint", "lint_own", "lint_variables", "table"]
