"""The answers of `fit`, `recommend` and `size` on a terminal: tables, and where memory goes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from inferfleet.advice import Advice, options_of
from inferfleet.capacity import GIB, Bounds, Fit, Memory, OllamaPrediction, Recommendation, Size
from inferfleet.capacity import bounds as roofline
from inferfleet.report import counted

WIDTH = 64  # columns of the bar
SHOWN = 5  # recommendations
_PARTS = {  # each told by its sign as well as by its colour
    "weights": ("█", "blue"),
    "activation": ("▓", "yellow"),
    "NCCL and CUDA": ("#", "magenta"),
    "CUDA graphs": ("=", "cyan"),
    "KV cache": ("▒", "green"),
    "free": ("·", "dim"),
}
_VERDICTS = {"fits": "green", "tight": "yellow", "does not fit": "bold red"}


def show_fit(out: Console, found: Fit, users: int) -> None:
    """Where the memory of one GPU goes, the verdict, what it carries, and what to change."""
    each = found.prediction
    setup = each.setup
    split = setup.tensor_parallel * setup.pipeline_parallel
    kind = setup.quantization or setup.model.native
    out.print(
        f"[bold]{escape(setup.model.name)}[/] ({kind}) on {split} x {setup.gpu.name}, "
        f"{each.context} tokens of context, at most {each.sequences} sequences, "
        f"{each.batched_tokens} tokens a batch"
    )
    out.print(_memory(found))
    out.print(bar(found.parts, setup.gpu.memory))
    colour, reason = _VERDICTS[each.verdict], f": {each.reason}" if each.reason else ""
    out.print(f"[{colour}]{each.verdict}[/]{escape(reason)}")
    if each.rough:
        out.print(f"Only an estimate, 15 % either way: {escape(each.rough)}.")
    if each.verdict != "does not fit":
        _show_carried(out, found, users)
    for remedy in found.remedies:
        options = ", ".join(f"--{name} {value}" for name, value in remedy.options)
        out.print(f"  it fits if you {escape(remedy.text)}  [dim]({escape(options)})[/]")
    if each.verdict != "fits" and not found.remedies:
        out.print("  No change of options makes it fit: a smaller model, or more memory.")


def _show_carried(out: Console, found: Fit, users: int) -> None:
    each, (low, high) = found.prediction, found.prediction.kv_tokens_range
    out.print(
        f"KV cache: {each.kv_tokens} tokens (between {low} and {high}), "
        f"{each.kv_token_bytes} bytes each on one GPU"
    )
    enough = "enough" if found.enough else "not enough"
    out.print(
        f"{counted(found.instances, 'instance')} expected to carry "
        f"{counted(found.carries, 'request')} of {each.context} tokens at once: {enough} for "
        f"{counted(users, 'user')} asking at the same time"
    )
    out.print(speed(roofline(each)))


def _memory(found: Fit) -> Table:
    each = found.prediction
    table = Table("where one GPU's memory goes", box=None, pad_edge=False)
    for heading in ("GiB", "from", "to"):
        table.add_column(heading, justify="right")
    best, worst = _named(each.optimistic), _named(each.pessimistic)
    for name, size in found.parts:
        ends = sorted((best[name], worst[name])) if name in best else [size, size]
        sign, colour = _PARTS[name]
        cells = [f"{end / GIB:.2f}" for end in (size, *ends)]
        table.add_row(Text(f"{sign} {name}", style=colour), *cells)
    return table


def _named(memory: Memory) -> dict[str, int]:
    return {
        "weights": memory.weights,
        "activation": memory.activation,
        "NCCL and CUDA": memory.non_torch,
        "CUDA graphs": memory.graphs_deducted + memory.graphs_beside,
        "KV cache": max(0, memory.pool),
    }


def bar(parts: Sequence[tuple[str, int]], memory: int) -> Text:
    """A stacked bar of one GPU's memory, and how much does not find room in it."""
    drawn, column, end = Text("["), 0, 0
    for name, size in parts:
        end += size
        upto = max(column, min(WIDTH, round(end / memory * WIDTH)))
        sign, colour = _PARTS[name]
        drawn.append(sign * (upto - column), style=colour)
        column = upto
    over = f", {(end - memory) / GIB:.1f} GiB more than there is" if end > memory else ""
    return drawn + Text(f"] {memory / GIB:.1f} GiB{over}")


def speed(found: Bounds) -> str:
    """Bounds, worded as bounds."""
    return (
        f"No faster than (a bound, not a promise): {found.decode:.0f} tokens/s for one request, "
        f"{found.prefill:.0f} prompt tokens/s, {found.first_token:.2f} s to the first token of a "
        "full context"
    )


def show_advice(out: Console, advice: Advice, users: int) -> None:
    """What to run, the best first, and what the next larger GPU would buy."""
    if not advice.found:
        out.print(f"{escape(advice.where)}: nothing in the catalogue carries that.")
    else:
        out.print(f"[bold]{escape(advice.where)}[/], for {counted(users, 'user')} at once:")
    for rank, each in enumerate(advice.found[:SHOWN], 1):
        _show_recommended(out, rank, each)
    if advice.larger and advice.gained:
        what = advice.gained.model
        same = bool(advice.found) and advice.found[0].model == what
        carries = f"{advice.gained.carries} requests at once"
        said = f"the same model with {carries}" if same else f"{what}, {carries}"
        out.print(f"The next larger GPU, {advice.larger.name}, would buy: {escape(said)}.")


def _show_recommended(out: Console, rank: int, each: Recommendation) -> None:
    size = f"{counted(each.instances, 'instance')}"
    if each.setup:
        size += f" on {counted(each.setup.tensor_parallel, 'GPU')}"
    out.print(f"{rank}. [bold]{escape(each.model)}[/] with {each.engine}: {size}")
    out.print(f"   {escape(each.why)}")
    if isinstance(each.prediction, OllamaPrediction):
        out.print(f"   {each.prediction.rough}")
    if options := options_of(each.setup):
        out.print("   options: " + ", ".join(f"{k}: {v}" for k, v in options.items()))
    if each.speed:
        bound = each.speed
        out.print(
            f"   no faster than (a bound, not a promise): {bound.decode:.0f} tokens/s a request "
            f"with {counted(bound.requests, 'request')} running, {bound.prefill:.0f} prompt "
            "tokens/s"
        )


def show_sizes(out: Console, found: Iterable[Size], users: int) -> None:
    """Hardware that carries the users, the least memory first."""
    every = list(found)
    first = every[0]
    out.print(
        f"[bold]{escape(first.setup.model.name)}[/], {counted(users, 'request')} of "
        f"{first.prediction.context} tokens at once; weights on the share: "
        f"{first.share / GIB:.0f} GiB"
    )
    table = Table("GPUs", "hosts", "instances", "RAM of a host", "disk of a host", box=None)
    for each in every:
        split = each.setup.tensor_parallel
        table.add_row(
            f"{each.gpus} x {each.setup.gpu.name}",
            str(each.hosts),
            f"{each.instances} on {counted(split, 'GPU')}",
            f"{each.ram / GIB:.0f} GiB",
            f"{each.disk / GIB:.0f} GiB",
        )
    out.print(table)
