"""`python tools/gpu_check`: is every GPU kernel right on this GPU, and how fast is it? See `__main__.py`.

It runs from a checkout where only torch, Triton and numpy are: nothing here may import click, rich, or what does.
"""
