"""TGI: what every engine proves, and that it serves the model it was told to."""

from inferfleet.model import Instance
from inferfleet.verify.proofs import *  # noqa: F403
from inferfleet.verify.proofs import Ask, url


def test_serves_the_model(ask: Ask, instance: Instance) -> None:
    """it serves the deployment's model and revision"""
    answer = ask(url(instance, "/info"))
    assert answer.status == 200, answer.error or answer.text[:500]
    info, model = answer.json(), instance.deployment.model
    assert info["model_id"] == model.repository or info["model_id"].startswith("/")
    if model.revision and info["model_id"] == model.repository:
        assert info["model_sha"] == model.revision


def test_takes_as_many_tokens_as_promised(ask: Ask, instance: Instance) -> None:
    """prompt and answer may be as long as the options say"""
    answer = ask(url(instance, "/info"))
    wanted = instance.options.get("max_total_tokens")
    assert wanted is None or answer.json()["max_total_tokens"] == wanted
