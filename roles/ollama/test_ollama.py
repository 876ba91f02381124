"""Ollama: what every engine proves, and that the model is there under its name."""

from collections.abc import Callable

from inferfleet.calibration import Observed
from inferfleet.model import Instance, Inventory
from inferfleet.verify import memory
from inferfleet.verify.proofs import *  # noqa: F403
from inferfleet.verify.proofs import Ask, chat, url


def test_has_the_model(ask: Ask, instance: Instance) -> None:
    """the model is pulled, under the name clients ask for"""
    answer = ask(url(instance, "/api/tags"))
    assert answer.status == 200, answer.error or answer.text[:500]
    names = {model["name"] for model in answer.json()["models"]}
    wanted = instance.deployment.model.served_name
    assert wanted in names or f"{wanted}:latest" in names


def test_sits_on_the_gpus(ask: Ask, instance: Instance) -> None:
    """the loaded model is in GPU memory, as far as the inventory asks"""
    share = instance.options["min_gpu_share"] if instance.gpus else 0
    name = instance.deployment.model.served_name
    body = {"model": name, "stream": False}
    loaded = ask(url(instance, "/api/generate"), json=body, timeout=600)
    assert loaded.status == 200, loaded.error or loaded.text[:500]
    models = ask(url(instance, "/api/ps")).json()["models"]
    (model,) = [m for m in models if m["name"] in (name, f"{name}:latest")]
    inside, size = model.get("size_vram", 0), model["size"]
    assert inside >= share * size, f"{inside} of {size} bytes are in GPU memory"


def test_keeps_prompts_here(ask: Ask, instance: Instance) -> None:
    """nothing is passed on to ollama.com, unless the inventory allows it"""
    if instance.options["cloud"]:
        return
    answer = ask(url(instance, "/api/status"))
    assert answer.status == 200, answer.error or answer.text[:500]
    assert answer.json().get("cloud", {}).get("disabled") is True


def test_uses_its_gpu(
    ask: Ask,
    instance: Instance,
    inventory: Inventory,
    teach: Callable[[Observed | None], None],
) -> None:
    """the loaded model lies on the GPU, where it has one"""
    answer = ask(url(instance, "/v1/chat/completions"), json=chat(instance))
    assert answer.status == 200, answer.error or answer.text[:500]
    wanted = instance.deployment.model.served_name
    listed = ask(url(instance, "/api/ps")).json()["models"]
    loaded = next(each for each in listed if each["name"] in (wanted, f"{wanted}:latest"))
    assert not instance.gpus or loaded["size_vram"] > 0, "it runs on the CPU alone"
    teach(memory.ollama_observed(instance, inventory, loaded))
