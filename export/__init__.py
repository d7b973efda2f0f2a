"""Third floor: from a PyTorch model to a bundle (ONNX graphs, weights, tables, golden outputs).

May import `mdm.reference`, `mdm.plugins` and `mdm.runtime`.

    export_bundle("nnet_ema.pth", "dim-huge-256", "huge.bundle", precision="fp16")
"""

from mdm.export.bundle import export_bundle

__all__ = ["export_bundle"]
