# Small Triton kernels for the tests of the build: they are imported by its processes, as `some_kernels`.

import triton
import triton.language as tl


@triton.jit
def scaled_add(x, y, out, n, scale, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    tl.store(out + at, tl.load(x + at, inside) + scale * tl.load(y + at, inside), inside)


@triton.jit
def product(a, b, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(out + at, tl.dot(tl.load(a + at), tl.load(b + at)))


@triton.jit
def hoarder(x, out, steps, SIZE: tl.constexpr):
    """Keeps more numbers at once than a few warps have registers."""
    at = tl.arange(0, SIZE)
    kept = tl.load(x + at)
    more = tl.load(x + SIZE + at)
    for _ in range(steps):
        kept, more = kept * more + 1.0, more * kept - 1.0
    tl.store(out + at, kept + more)


@triton.jit
def one_too_many(x, BLOCK: tl.constexpr):
    tl.store(x + tl.arange(0, BLOCK), tl.load(x + tl.arange(0, BLOCK + 1)))
