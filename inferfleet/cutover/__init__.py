"""Moving a model from one pool of the gateways to another, and back: `inferfleet cutover`.

onhost    runs on the gateways' hosts, where their private addresses are
asking    sends it over the transport and reads the answer
wanted    what an operator asks for: a model and weights, by the inventory's names
state     what all gateways together say of each model: weights, requests, the shadow's report
orders    other weights at all gateways or at none; the way back
showing   text, and JSON
"""

from __future__ import annotations

from inferfleet.cutover.asking import Site, by_hand, sites
from inferfleet.cutover.orders import Outcome, back, move, survey

__all__ = ["Outcome", "Site", "back", "by_hand", "move", "sites", "survey"]
