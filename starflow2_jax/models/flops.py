"""Floating-point operations of a training step and of the sampler's steps, counted by hand from the sizes."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from starflow2_jax.models.layers import TransformerConfig
from starflow2_jax.models.likelihood import CHUNK
from starflow2_jax.models.pretzel import PretzelConfig
from starflow2_jax.models.vlm import VisionConfig
from starflow2_jax.sequence import Shape
from starflow2_jax.stages import Stage

RULE = (
    "matrix products only; a frozen parameter costs 2 FLOP per token forward, and 2 more if a gradient passes through "
    "it; a trained one costs 6; attention counts as causal over whole rows, half of all pairs; recomputation does not "
    "count; all positions of a batch count, padding included"
)
SAMPLING_RULE = (
    "matrix products only, 2 FLOP per parameter and position; read: from empty caches, attention counts as causal; "
    "write: one text position of each row and of its guidance, caches half full"
)
FROM_INPUTS = ("full", "offload")  # remat policies that recompute a layer from its input


@dataclass(frozen=True)
class Flops:
    """FLOP of one step of all chips together, by part of the model.

    model: what the mathematics needs, counted by `RULE`; their sum is the numerator of an MFU. hardware: what the
    compiled program executes, with recomputation, and attention as its kernel computes it.
    """

    model: dict[str, float]
    hardware: dict[str, float]

    @property
    def total(self) -> float:
        """The sum of `model`."""
        return sum(self.model.values())

    @property
    def executed(self) -> float:
        """The sum of `hardware`."""
        return sum(self.hardware.values())

    def mfu(self, seconds: float, chips: int, peak: float) -> float:
        """Model FLOP utilisation of a step that takes `seconds` on `chips` of `peak` FLOP/s each."""
        return self.total / (seconds * chips * peak)


@dataclass(frozen=True)
class Term:
    """Products of one kind."""

    part: str  # of the model
    forward: float  # FLOP of the forward pass
    times: float  # FLOP of the step / FLOP forward: 1, 1 more for the inputs' gradient, 1 more for the weights'
    again: float = 0.0  # FLOP recomputed in the backward pass / FLOP forward
    needed: float = 1.0  # the share of `forward` that the mathematics needs


def training_flops(cfg: PretzelConfig, stage: Stage, shape: Shape, text_chunk: int = CHUNK) -> Flops:
    """FLOP of one training step over a batch of `shape`, counted by `RULE`.

    text_chunk: positions of a row that the text head takes at once. Norms, softmax and the optimizer are left out.
    """
    return sums(_terms(cfg, stage, shape, text_chunk))


def sampling_flops(cfg: PretzelConfig, stage: Stage, rows: int, capacity: int, lanes: int) -> dict[str, Flops]:
    """FLOP of the sampler's `read` of capacity / 2 positions and of a step of `write`, by `SAMPLING_RULE`.

    lanes: cache rows of each row, for guidance. The executed FLOP count attention over the whole `capacity` of the
    caches.
    """
    length = capacity // 2
    images = rows * max(1, length // (cfg.tokens + 2))
    read = [*_forward_streams(cfg, stage, rows, length, capacity, length / 2)]
    for _ in range(cfg.shallow_blocks):
        read += _forward("shallow flow", cfg.shallow, images, cfg.tokens, cfg.tokens, cfg.tokens / 2)
        read.append(Term("shallow flow", 2.0 * 3 * cfg.channels * cfg.shallow.width * images * cfg.tokens, 1))
    write = [*_forward_streams(cfg, stage, rows * lanes, 1, capacity, capacity / 2)]
    write.append(Term("text head", 2.0 * cfg.vlm.vocabulary * cfg.vlm.width * rows, 1))
    return {"read": sums(read), "write": sums(write)}


def sums(terms: Iterable[Term]) -> Flops:
    """The terms added up by part of the model."""
    model: dict[str, float] = {}
    hardware: dict[str, float] = {}
    for term in terms:
        model[term.part] = model.get(term.part, 0.0) + term.forward * term.needed * term.times
        hardware[term.part] = hardware.get(term.part, 0.0) + term.forward * (term.times + term.again)
    return Flops(model, hardware)


def _forward_streams(
    cfg: PretzelConfig, stage: Stage, rows: int, length: int, capacity: int, seen: float
) -> Iterator[Term]:
    """Both streams over (rows, length) with caches of `capacity`, of which a position sees `seen` on average."""
    E, E_vlm, D = cfg.deep.width, cfg.vlm.width, cfg.channels
    linear = {
        "adapter": cfg.adapter_hidden * (D + E_vlm),
        "embeddings": E * (D + E_vlm),
        "Gaussian head": 2 * D * E,
    }
    if stage.skips:
        linear["skips"] = 2 * E * E_vlm
    for part, parameters in linear.items():
        yield Term(part, 2.0 * parameters * rows * length, 1)
    yield from _forward("VLM", cfg.vlm.transformer, rows, length, capacity, seen)
    yield from _forward("deep flow", cfg.deep, rows, length, capacity, seen)


def _forward(part: str, c: TransformerConfig, rows: int, length: int, keys: int, seen: float) -> Iterator[Term]:
    """A stack's forward pass over (rows, length); attention multiplies all `keys`, of which `seen` are visible."""
    yield Term(part, 2.0 * c.layers * sum(matrix_parameters(c)) * rows * length, 1)
    products = 2 * 2.0 * c.layers * c.heads * c.head * rows * length * keys
    yield Term(f"{part} attention", products, 1, needed=seen / keys)


def _terms(cfg: PretzelConfig, stage: Stage, shape: Shape, text_chunk: int) -> Iterator[Term]:
    """Every product of a training step."""
    B, S, M, P, T = shape.rows, shape.length, shape.images, shape.patches, shape.vlm_length
    trains = set(stage.trains)
    vlm_moves, flow_moves = "vlm" in trains, "deep" in trains
    positions, vlm_positions = B * S, B * (T or S)
    through = vlm_moves or "adapter" in trains  # a gradient passes through the VLM's layers
    N, D, E, E_vlm = cfg.tokens, cfg.channels, cfg.deep.width, cfg.vlm.width

    def linear(part, parameters, tokens, trained, into):
        return Term(part, 2.0 * parameters * tokens, 1 + trained + into)

    for block in range(cfg.shallow_blocks):
        yield from _stack("shallow flow", cfg.shallow, B * M, N, flow_moves, flow_moves)
        yield linear("shallow flow", D * cfg.shallow.width, B * M * N, flow_moves, flow_moves and block > 0)
        yield linear("shallow flow", 2 * D * cfg.shallow.width, B * M * N, flow_moves, flow_moves)

    if not T:  # with a vlm_length the VLM sees no flow image
        moves = "adapter" in trains
        yield linear("adapter", D * cfg.adapter_hidden, positions, moves, moves and flow_moves)
        yield linear("adapter", cfg.adapter_hidden * E_vlm, positions, moves, moves)
    yield from _stack("VLM", cfg.vlm.transformer, B, T or S, vlm_moves, through)
    if cfg.vlm.vision and P:
        yield from _vision(cfg.vlm.vision, B, P, vlm_moves)
    if stage.text_loss:
        chunk = min(text_chunk, S)
        forward = 2.0 * cfg.vlm.vocabulary * E_vlm * B * -(-S // chunk) * chunk
        yield Term("text head", forward, 2 + vlm_moves, again=1)  # the backward pass makes each chunk's logits again
    if stage.deep:
        yield linear("embeddings", D * E, positions, flow_moves, flow_moves)
        yield linear("embeddings", E_vlm * E, positions, flow_moves, through)
        yield from _stack("deep flow", cfg.deep, B, S, flow_moves, flow_moves)
        yield linear("Gaussian head", 2 * D * E, positions, flow_moves, flow_moves)
    if stage.skips:
        yield linear("skips", E_vlm * E, vlm_positions, "w_vlm" in trains, through)
        yield linear("skips", E * E_vlm, positions, "w_d" in trains, flow_moves)


def _stack(part: str, c: TransformerConfig, rows: int, length: int, trained: bool, through: bool) -> Iterator[Term]:
    """A causal stack over (rows, length). `through`: whether a gradient passes on to the stack's input."""
    projections, mlp = matrix_parameters(c)
    down = c.mlp_hidden * c.width
    policy = c.remat if through else "none"
    again = 1 - down / (projections + mlp) if policy in FROM_INPUTS else 0  # the last product is not needed
    yield Term(part, 2.0 * c.layers * (projections + mlp) * rows * length, 1 + trained + through, again)
    # The products q k^T and weights v have no parameters: the gradients of both inputs cost twice the forward pass.
    products = 2 * 2.0 * c.layers * c.heads * c.head * rows * length * length
    times = 3 if through else 1
    yield Term(
        f"{part} attention", products, times, executed_attention(c.kernel, policy, trained, through) - times, needed=0.5
    )


def executed_attention(kernel: str, policy: str, trained: bool, through: bool) -> float:
    """FLOP that a kernel executes in a step / FLOP of attention's two products over whole rows, recomputation included.

    The kernels skip what causality hides, and compute the logits again in the backward pass: splash attention once for
    the gradient of the queries and once for that of keys and values, the Triton kernel also twice, cuDNN once.
    """
    if kernel == "xla":
        again = {"none": 0.0, "dots": 1.0 if trained else 0.5}.get(policy, 1.0)
        return 3 + again if through else 1
    backward = 2.5 if kernel.startswith("cudnn") else 3.5
    saved = policy in ("none", "dots") if kernel.startswith("splash") else policy == "none"
    return 0.5 * (1 + backward + (not saved)) if through else 0.5


def _vision(c: VisionConfig, rows: int, patches: int, trained: bool) -> Iterator[Term]:
    """The vision tower over (rows, patches). The program multiplies whole rows; only visible patches are needed."""
    t, part = c.transformer, "vision tower"
    projections, mlp = matrix_parameters(t)
    tokens, times = rows * patches, 3 if trained else 1
    policy = t.remat if trained else "none"
    again = 1 - t.mlp_hidden * t.width / (projections + mlp) if policy in FROM_INPUTS else 0
    yield Term(part, 2.0 * t.layers * (projections + mlp) * tokens, times, again)
    yield Term(part, 2.0 * c.embedding_parameters * tokens, 1 + trained)
    yield Term(part, 2.0 * c.merger_parameters * (tokens / c.merge**2), times)
    needed = c.visible_patches(patches) / patches
    products = 2 * 2.0 * t.layers * t.width * rows * patches * patches
    yield Term(f"{part} attention", products, times, float(policy != "none"), needed)


def matrix_parameters(c: TransformerConfig) -> tuple[int, int]:
    """Parameters of a layer's matrices: the four of attention together, and those of the MLP."""
    projections = c.width * c.head * (2 * c.heads + 2 * c.kv)
    return projections, (3 if c.gated_mlp else 2) * c.width * c.mlp_hidden
