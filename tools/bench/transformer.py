"""A diffusion transformer to measure Mamba against: out of the same graph builder, in the same step graph.

    h += gate * attention(norm(h) * scale + shift)        every token sees every token; heads of 64
    h += gate * mlp(norm(h) * scale + shift)              E -> I -> E with silu; I makes the parameters equal

It is DiT with the modulation that our models have: one of time and class for all blocks, to which each half of a block
adds its own. Its sequence holds latent tokens alone: prefix, separators, pads, local convolutions and long skips, which
cost a Mamba model time, are left out, and so are the biases of its blocks.

Attention is `com.microsoft::MultiHeadAttention`, whose CPU kernel goes through keys and values piece by piece, so that
its memory grows with L and not with its square. It is the best that ONNX Runtime has on a CPU: from 256 to 16,384
tokens it did 78 to 87 billion multiply-adds a second, where a linear layer did 99. Times of other forms over its own,
and megabytes taken at 4096 tokens (8 heads of 64, two cores with AVX-512, ONNX Runtime 1.31.1; each ratio within one
run):

    tokens                               256    529   1024   2025   4096   8100     MB
    MultiHeadAttention                     1      1      1      1      1      1     16
    Attention of opset 23               0.90   0.97   1.05   1.07   1.94      -    528
    MatMul, Softmax, MatMul             1.02   1.06   1.14   1.14   1.96      -    532
    the same in blocks of 256 queries   1.10   1.08   1.16   1.06   1.13   1.20     72

What opset 23 would gain at 256 tokens is 1% of a step, so one form serves all lengths.

Letters: B batch, L latent tokens, d latent width, E width, I width inside an MLP.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mdm.plugins.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from mdm.export.graph import Graph, Value
    from mdm.export.graphs import Built
    from mdm.export.weights import Weights
    from mdm.reference.config import Config

HEAD = 64
MICROSOFT = "com.microsoft"  # ONNX Runtime's own domain
SHARED = (  # what it has in common with an MDM
    "latent_in.", "latent_out.", "backbone.time", "backbone.class", "backbone.modulation", "backbone.norm_out",
    "backbone.position",
)  # fmt: skip


@dataclass(frozen=True)
class Transformer:
    """`config` is of an MDM, whose ends, positions and steering it has."""

    config: Config
    blocks: int
    hidden: int  # I

    def shapes(self) -> dict[str, tuple[int, ...]]:
        from mdm.export.weights import empty_model, shapes_of

        E, I = self.config.width, self.hidden
        shapes = {name: shape for name, shape in shapes_of(empty_model(self.config)).items() if name.startswith(SHARED)}
        matrices = {
            "attention": {"query": (E, E), "key": (E, E), "value": (E, E), "out": (E, E)},
            "mlp": {"up": (I, E), "down": (E, I)},
        }
        for index in range(self.blocks):
            for half, inside in matrices.items():
                path = f"backbone.blocks.{index}.{half}"
                shapes |= {f"{path}.modulation": (3, E), f"{path}.norm.weight": (E,)}
                shapes |= {f"{path}.{name}.weight": shape for name, shape in inside.items()}
        return shapes

    def tensors(self) -> dict[str, Tensor]:
        """Random weights, the same at every call. Vectors are biases and scales of norms: numbers about 1."""
        import torch

        chance = torch.Generator().manual_seed(0)

        def draw(shape: tuple[int, ...]) -> Tensor:
            if len(shape) == 1:
                return 0.5 + torch.rand(shape, generator=chance)
            return torch.randn(shape, generator=chance) / shape[-1] ** 0.5

        return {name: draw(shape) for name, shape in self.shapes().items()}

    def step_graph(self, weights: Weights, side: int) -> Built:
        """One unguided sampler stage over a picture of side x side tokens; the solver is that of all step graphs."""
        from mdm.export.backbone import Backbone, Segments
        from mdm.export.bundle import OPSETS
        from mdm.export.graph import Graph
        from mdm.export.graphs import Built, GraphSpec
        from mdm.export.layers import linear
        from mdm.export.precision import make_precision
        from mdm.export.step import Step

        g = Graph("transformer", weights, make_precision("fp32"), OPSETS[0])
        segments = Segments(False, 1, side, weights.position(side))
        step = Step(g, self.config, segments, guided=False)
        y = g.input("y", "int64", ["batch"])
        shared = Backbone(g, self.config, segments, None)
        h = linear(g, step.point, "latent_in", "ends")  # [B,L,E]
        with g.scope("backbone"):
            modulation, condition, _ = shared.steering(step.t, y)
            h = h + shared.position(2, 2 + segments.image_tokens)
            for index in range(self.blocks):
                with g.scope("blocks", index):
                    h = half(g, "attention", h, modulation, attention)
                    h = half(g, "mlp", h, modulation, mlp)
            h = shared.modulate_out(h, g.unsqueeze(condition, 1))
        step.finish(linear(g, h, "latent_out", "ends"), None)
        model = g.model()
        model.opset_import.add(domain=MICROSOFT, version=1)
        return Built(GraphSpec(g.name, "step", "image", ("image",)), model, g.stored)


def transformer_as_heavy(config: Config, blocks: int, parameters: int) -> Transformer:
    """The one whose blocks hold that many parameters together, to the 16 columns that suit matrix kernels."""
    E = config.width
    beside = blocks * (4 * E * E + 2 * (3 * E + E))  # attention, modulations, norms
    hidden = 16 * round((parameters - beside) / (2 * E * blocks) / 16)
    if hidden < 16:
        raise InputError(
            f"{blocks} transformer blocks of width {E} are heavier without their MLPs ({beside:,} parameters) than the "
            f"Mamba blocks ({parameters:,})\ntake fewer transformer blocks"
        )
    return Transformer(config, blocks, hidden)


def half(g: Graph, name: str, h: Value, modulation: Value, work: Callable[[Graph, Value], Value]) -> Value:
    """adaLN -> work -> gated residual, as in a Mamba block; modulation [B,3,E] is shift, 1 + scale, 1 + gate."""
    from mdm.export.layers import rms_norm

    with g.scope(name):
        shift, scale, gate = g.split(g.weight("modulation", h.dtype) + modulation, [1, 1, 1], axis=1)  # [B,1,E] each
        return h + gate * work(g, rms_norm(g, h, "norm") * scale + shift)


def attention(g: Graph, u: Value) -> Value:
    from mdm.export.layers import linear

    parts = [linear(g, u, name, "mixer", bias=False) for name in ("query", "key", "value")]
    heads = g.weights.checkpoint.expected[f"{g.path}.out.weight"][0] // HEAD
    seen = g.op("MultiHeadAttention", *parts, domain=MICROSOFT, num_heads=heads)  # [B,L,E]
    return linear(g, seen, "out", "mixer", bias=False)


def mlp(g: Graph, u: Value) -> Value:
    from mdm.export.layers import linear, silu

    return linear(g, silu(linear(g, u, "up", "mixer", bias=False)), "down", "mixer", bias=False)
