"""What of a model decides its memory: layer counts and widths, with parameter counts from them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from inferfleet.errors import Error


class CapacityError(Error, ValueError):
    """A question that has no answer; the text names the rule that it breaks."""


@dataclass(frozen=True)
class Experts:
    """The mixture-of-experts part of a model. Widths are elements."""

    count: int
    per_token: int
    width: int  # intermediate size of one expert
    shared_width: int = 0  # intermediate size of the experts every token passes
    dense_layers: int = 0  # first layers that have an ordinary MLP instead
    bias_per_layer: int = 0  # elements, all experts of a layer together


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention: one compressed vector a token instead of keys and values."""

    kv_rank: int
    rope_dim: int
    query_rank: int  # 0: queries are projected directly
    nope_dim: int
    value_dim: int


@dataclass(frozen=True)
class Recurrent:
    """Layers that keep a state of constant size for each sequence instead of a KV cache."""

    layers: int
    state_bytes: int  # one layer, one sequence
    params: int  # one layer's mixer, elements


@dataclass(frozen=True, eq=True)
class Dimensions:
    """A model's shape, in the words of its config.json. Widths and ranks are elements."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    intermediate: int
    context: int  # tokens, the longest the model was made for
    tied: bool = False
    experts: Experts | None = None
    latent: Latent | None = None
    recurrent: Recurrent | None = None
    window: int | None = None  # tokens a sliding layer sees
    window_layers: int = 0  # how many layers slide; the rest see everything
    mlp_matrices: int = 3  # 2: no gate
    rotary_dim: int | None = None  # None: head_dim; 0: no rotary table
    extra_params: int = 0  # what the rules do not count: biases, vision towers
    native: str = "bf16"  # the quantization of the published checkpoint
    tasks: tuple[str, ...] = ("chat",)
    released: str = ""  # YYYY-MM
    rough: str = ""  # why a prediction is only an estimate; empty: it is not
    source: str = ""
    params_billion: float = 0.0  # as published, to check the dimensions

    def __hash__(self) -> int:
        return hash((self.name, self.layers, self.hidden))

    @property
    def attention_layers(self) -> int:
        """Layers with keys and values (or a latent vector) in the cache."""
        return self.layers - (self.recurrent.layers if self.recurrent else 0)

    @property
    def full_layers(self) -> int:
        """Attention layers that keep every token."""
        return self.attention_layers - self.window_layers

    @cached_property
    def embedding_params(self) -> int:
        """Elements of one vocabulary matrix: vocab x hidden."""
        return self.vocab * self.hidden

    @cached_property
    def attention_params(self) -> int:
        """Elements of one attention layer's projections: q, k, v, o (or MLA's six)."""
        if self.latent is None:
            return self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)
        mla, heads = self.latent, self.heads
        query = mla.nope_dim + mla.rope_dim
        first = mla.query_rank or self.hidden
        return (
            self.hidden * mla.query_rank
            + first * heads * query
            + self.hidden * (mla.kv_rank + mla.rope_dim)
            + mla.kv_rank * heads * (mla.nope_dim + mla.value_dim)
            + heads * mla.value_dim * self.hidden
        )

    @cached_property
    def expert_params(self) -> int:
        """Elements of all routed experts of all layers: layers x experts x 3 x hidden x width."""
        moe = self.experts
        if moe is None:
            return 0
        return (self.layers - moe.dense_layers) * moe.count * 3 * self.hidden * moe.width

    @cached_property
    def linear_params(self) -> int:
        """Elements that weight quantization reaches: attention, MLPs, experts, mixers."""
        moe = self.experts
        total = self.attention_layers * self.attention_params + self.expert_params
        if self.recurrent:
            total += self.recurrent.layers * self.recurrent.params
        mlp = self.mlp_matrices * self.hidden * self.intermediate
        if moe is None:
            return total + self.layers * mlp
        return (
            total
            + moe.dense_layers * mlp
            + (self.layers - moe.dense_layers) * (3 * self.hidden * moe.shared_width)
        )

    @cached_property
    def plain_params(self) -> int:
        """Elements that stay in 16 bit: embeddings, head, norms, routers, biases, towers."""
        moe, total = self.experts, self.embedding_params * (1 if self.tied else 2)
        total += self.hidden * (2 * self.layers + 1) + self.extra_params
        if moe is not None:
            sparse = self.layers - moe.dense_layers
            total += sparse * (self.hidden * moe.count + moe.bias_per_layer)
        return total

    @property
    def params(self) -> int:
        """All elements of the model."""
        return self.linear_params + self.plain_params

    @cached_property
    def active_params(self) -> int:
        """Elements one token meets, without the input embedding."""
        moe = self.experts
        total = self.linear_params + self.embedding_params
        if moe is None:
            return total
        return total - self.expert_params + self.expert_params * moe.per_token // moe.count
