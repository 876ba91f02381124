"""vLLM proves what every engine has to."""

from inferfleet.verify.proofs import *  # noqa: F403
