"""The drawing of a bundle's graphs: like the bundle's own, and of the right checkpoint."""

from __future__ import annotations

from collections.abc import Callable

import onnx
import pytest
import torch

from mdm.plugins.errors import InputError
from mdm.tools.check.standards import blueprint as module
from mdm.tools.check.standards.blueprint import make_blueprint

from ..deployed import Exported

Find = Callable[[str], Exported]


@pytest.mark.parametrize("name", ["mdm", "dim", "latent", "half"])
def test_it_draws_the_bundles_graphs(exported: Find, name: str) -> None:
    """Node by node; where the weights lie is said in the bundle alone."""
    bundle, blueprint = exported(name).model.bundle, exported(name).reference.blueprint
    assert blueprint.built.keys() == bundle.manifest["graphs"].keys()
    for graph in blueprint.built:
        file = onnx.load_from_string(bundle.graph_bytes(graph))
        drawn = blueprint.model(graph)
        assert [node.SerializeToString() for node in file.graph.node] == [
            node.SerializeToString() for node in drawn.graph.node
        ]
        assert blueprint.spec(graph).name == graph


def test_without_the_autoencoder_its_graphs_are_left_out(exported: Find) -> None:
    blueprint = make_blueprint(exported("latent").model.bundle, exported("latent").checkpoint, None)
    missing = exported("latent").model.manifest["graphs"].keys() - blueprint.built.keys()
    assert missing == {"encode_image", "decode_image"}


def test_weights_are_the_checkpoints_and_kept_where_they_are_few(
    exported: Find, monkeypatch: pytest.MonkeyPatch
) -> None:
    blueprint = exported("mdm").reference.blueprint
    graph = blueprint.built["decode_text"]
    name = next(iter(graph.stored))
    value = blueprint.value("decode_text", name)
    assert blueprint.value("decode_text", name) is value
    assert list(value.shape) == list(graph.stored[name].shape)
    assert value.dtype == torch.float32
    monkeypatch.setattr(module, "MOST_HELD", 0)
    again = blueprint.value("decode_text", name)
    assert again is not value
    assert torch.equal(again, value)


def test_another_checkpoint_is_refused(exported: Find) -> None:
    with pytest.raises(InputError, match="is not the checkpoint that bundle") as refused:
        make_blueprint(exported("mdm").model.bundle, exported("dim").checkpoint, None)
    lines = str(refused.value).splitlines()
    assert len(lines) == 3
    assert lines[2] == "name the right one with --checkpoint"
    with pytest.raises(InputError, match="cannot be read"):
        make_blueprint(exported("mdm").model.bundle, exported("dim").checkpoint.parent / "none.safetensors", None)


def test_truth_and_drawing_say_the_same_in_float64(exported: Find, figure: Callable[[str, float, float], None]) -> None:
    from mdm.tools.check.finding import difference

    worst = 0.0
    for name in ("keep", "dim", "latent", "half"):
        blueprint = exported(name).reference.blueprint
        for graph in blueprint.built:
            (case,) = exported(name).reference.cases(graph)
            drawn = blueprint.evaluation(graph, exact=True).run(case.inputs)
            for output, true in case.expected.items():
                worst = max(worst, difference(drawn[output].numpy(), true).rms)
    figure("drawing and model, both in float64", worst, 1e-5)
