"""Ollama: what every engine proves, and that the model is there under its name."""

from inferfleet.model import Instance
from inferfleet.verify.proofs import *  # noqa: F403
from inferfleet.verify.proofs import Ask, url


def test_has_the_model(ask: Ask, instance: Instance) -> None:
    """the model is pulled, under the name clients ask for"""
    answer = ask(url(instance, "/api/tags"))
    assert answer.status == 200, answer.error or answer.text[:500]
    names = {model["name"] for model in answer.json()["models"]}
    wanted = instance.deployment.model.served_name
    assert wanted in names or f"{wanted}:latest" in names


def test_keeps_prompts_here(ask: Ask, instance: Instance) -> None:
    """nothing is passed on to ollama.com"""
    answer = ask(url(instance, "/api/status"))
    assert answer.status == 200, answer.error or answer.text[:500]
    assert answer.json().get("cloud", {}).get("disabled") is True
