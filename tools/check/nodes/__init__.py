"""Graphs node by node: in torch, cut into parts, bisected, and as sub-models."""
