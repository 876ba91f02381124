"""Python programs that stream one chat: with openai, huggingface_hub and ollama."""

from __future__ import annotations

import json
import shlex

from inferfleet.clients.access import Access, Configuration, Endpoint, Served
from inferfleet.errors import Error

EXTENSION_OUTPUT = 16_000  # tokens the Hugging Face extension keeps for the answer, always
_SAY = '[{"role": "user", "content": "Say hello."}]'


def openai(access: Access) -> Configuration:
    """The `openai` package."""
    endpoint, model = access.chats()[0]
    http = (
        f"    http_client=DefaultHttpxClient(verify={_trust(access)}),\n" if access.ca else ""
    )  # fmt: skip
    text = f"""\
{_imports(access)}from openai import {"DefaultHttpxClient, " if access.ca else ""}OpenAI

client = OpenAI(
    base_url={_quoted(endpoint.base)},
    api_key={_key(access)},
{http})
stream = client.chat.completions.create(
    model={_quoted(model.name)},
    messages={_SAY},
    max_tokens={min(64, model.output)},  # {_limits(model)}
    stream=True,
)
for event in stream:
    print(event.choices[0].delta.content or "", end="", flush=True)
print()
"""
    return Configuration(text, "a Python program (pip install openai)", tuple(_others(access)))


def huggingface(access: Access) -> Configuration:
    """The `huggingface_hub` package, and what the extension for VS Code needs changed."""
    endpoint, model = access.chats()[0]
    # huggingface_hub has no parameter for it; this variable replaces the system's certificates
    trust = f'os.environ["SSL_CERT_FILE"] = {_quoted(access.ca)}\n' if access.ca else ""
    imports = "import os\n\n" if access.key or access.ca else ""
    text = f"""\
{_extension(endpoint)}{imports}from huggingface_hub import InferenceClient

{trust}client = InferenceClient(
    base_url={_quoted(endpoint.base)},
    api_key={_key(access)},
)
stream = client.chat.completions.create(
    model={_quoted(model.name)},
    messages={_SAY},
    max_tokens={min(64, model.output)},  # {_limits(model)}
    stream=True,
)
for event in stream:
    print(event.choices[0].delta.content or "", end="", flush=True)
print()
"""
    place = "a Python program (pip install huggingface_hub)"
    return Configuration(text, place, (*_hub_notes(access), *_others(access)))


def ollama(access: Access) -> Configuration:
    """The `ollama` package. Raises Error where nothing speaks Ollama's own API."""
    if not access.ollama:
        raise Error(
            f"phase '{access.phase}' has no Ollama API: its engines are reached by OpenAI's alone;"
            " give it the role gateway, which speaks Ollama's over any engine, or use --for openai"
        )
    here = [found for found in access.chats() if found[0].base == f"{access.ollama}/v1"]
    _, model = (here or list(access.chats()))[0]
    header = f'{{"Authorization": "Bearer " + os.environ[{_quoted(access.key)}]}}'
    more = [f"    headers={header},\n"] if access.key else []
    more += [f"    verify={_trust(access)},\n"] if access.ca else []
    text = f"""\
{_command(access, model)}{_imports(access)}from ollama import Client

client = Client(
    host={_quoted(access.ollama)},
{"".join(more)})
stream = client.chat(
    model={_quoted(model.name)},
    messages={_SAY},
    options={{"num_predict": {min(64, model.output)}}},  # {_limits(model)}
    stream=True,
)
for part in stream:
    print(part.message.content or "", end="", flush=True)
print()
"""
    return Configuration(text, "a Python program (pip install ollama)", tuple(_others(access)))


def _command(access: Access, model: Served) -> str:
    """How the command `ollama` gets there, if it can: it sends no key and trusts no CA of ours."""
    if access.key:
        return "# The command `ollama` sends no key, so only programs come in here.\n"
    return f"# The command line: OLLAMA_HOST={access.ollama} ollama run {shlex.quote(model.name)}\n"


def _extension(endpoint: Endpoint) -> str:
    origin = endpoint.base.removesuffix("/v1")
    return f"""\
# Hugging Face's chat extension for VS Code has no setting for the address. Change the constant in
# its src/provider.ts and build it again:
#     const BASE_URL = {_quoted(endpoint.base)};
# The fork with the setting wants it without /v1; it sends no key and calls no tools:
#     "huggingface.customTGIEndpoint": {_quoted(origin)}
# VS Code's own "Custom Endpoint" needs neither (--for vscode).

"""


def _hub_notes(access: Access) -> list[str]:
    notes = []
    if not access.gateway:
        notes.append(
            "the extension's list of models stays empty: it wants `providers` in /v1/models, which"
            " no engine sends; the role gateway does"
        )
    short = [m.name for _, m in access.chats() if m.context <= EXTENSION_OUTPUT]
    if short:
        notes.append(
            f"the extension refuses every prompt for {', '.join(dict.fromkeys(short))}: it keeps"
            f" {EXTENSION_OUTPUT} tokens for the answer, and the context has no more"
        )
    if access.key:
        notes.append("the fork of the extension sends no key, and is of no use here")
    return notes


def _imports(access: Access) -> str:
    found = ["import os\n"] if access.key else []
    found += ["import ssl\n"] if access.ca else []
    return "".join([*found, "\n" if found else ""])


def _trust(access: Access) -> str:
    return f"ssl.create_default_context(cafile={_quoted(access.ca)})"


def _key(access: Access) -> str:
    return f"os.environ[{_quoted(access.key)}]" if access.key else '"none"'


def _limits(model: Served) -> str:
    return f"at most {model.output}; prompt and answer: {model.context}"


def _others(access: Access) -> list[str]:
    first, *others = access.chats()
    if not others:
        return []
    said = ", ".join(f"{model.name} at {endpoint.base}" for endpoint, model in others)
    return [f"this asks {first[1].name}; there are also {said}"]


def _quoted(value: str) -> str:
    """A string literal of Python: JSON's are, as long as they are not kept to ASCII."""
    return json.dumps(value, ensure_ascii=False)
