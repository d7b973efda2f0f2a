"""Third floor: from a PyTorch model to a bundle (ONNX graphs, weights, tables, golden outputs).

May import `mdm.reference`, `mdm.plugins` and `mdm.runtime`.
"""
