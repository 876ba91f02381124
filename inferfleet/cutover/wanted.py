"""What an operator asks for, in the inventory's words. Pure; all mistakes are UsageErrors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from inferfleet.cutover.asking import Site
from inferfleet.errors import UsageError
from inferfleet.yamlbuild import did_you_mean


def model(asked: str, found: Iterable[Site]) -> str:
    """The model of that name or alias; without a name, the only one there is."""
    models = list(dict.fromkeys(name for site in found for name in site.models))
    aliases = {alias: name for site in found for alias, name in site.aliases.items()}
    name = aliases.get(asked, asked) if asked or len(models) > 1 else models[0]
    if name in models:
        return name
    known = f"the gateways serve {', '.join(models)}"
    if not asked:
        raise UsageError(f"which model? Say --model NAME; {known}")
    raise UsageError(f"there is no model '{asked}'{did_you_mean(asked, models)}; {known}")


def weights(text: str, site: Site) -> dict[str, float]:
    """`POOL=WEIGHT,...`, or `POOL` for all of it, as weights of all pools of the site's one model.

    Pools are called what the inventory calls them: deployments and providers.
    """
    (name,) = site.models
    known = {**{pool: pool for pool in site.models[name]["pools"]}, **site.names[name]}
    found = dict.fromkeys(site.models[name]["pools"], 0.0)
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if len(parts) == 1 and "=" not in text:
        return {**found, _pool(parts[0], name, known): 100.0}
    for part in parts:
        said, equals, number = part.partition("=")
        if not equals:
            raise UsageError(f"--to {text}: '{part}' lacks its weight, such as {part}=10")
        found[_pool(said.strip(), name, known)] = _weight(number.strip(), text)
    if not any(found.values()):
        raise UsageError(f"--to {text}: one pool at least needs a weight above 0")
    return found


def _pool(said: str, name: str, known: Mapping[str, str]) -> str:
    if said not in known:
        listed = ", ".join(dict.fromkeys(known.values()))
        meant = did_you_mean(said, known)
        raise UsageError(f"'{said}' is no pool of '{name}'{meant}; it has {listed}")
    return known[said]


def _weight(text: str, whole: str) -> float:
    try:
        found = float(text.removesuffix("%"))
    except ValueError:
        found = -1
    if not 0 <= found < float("inf"):
        raise UsageError(f"--to {whole}: a weight is a number from 0 on, not '{text}'")
    return found
