"""What the model makes beside what the bundle makes: pictures with their difference, and texts word by word."""

from __future__ import annotations

import base64
import difflib
import io
import math
import re
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image

from mdm.tools.check.finding import Array
from mdm.tools.check.forms.markup import Markup, tag
from mdm.tools.check.forms.wording import exact
from mdm.tools.check.report import PicturePair, TextPair

MOST = 24  # pairs
LEGIBLE = 128  # pixels a picture is shown with at least


def picture_cards(pairs: Sequence[PicturePair]) -> list[Markup]:
    return [*map(picture_card, pairs[:MOST]), *left_out(pairs)]


def text_cards(pairs: Sequence[TextPair]) -> list[Markup]:
    return [*map(text_card, pairs[:MOST]), *left_out(pairs)]


def left_out(pairs: Sequence[PicturePair] | Sequence[TextPair]) -> list[Markup]:
    return [tag("p", f"{len(pairs) - MOST} more are left out.", class_="note")] if len(pairs) > MOST else []


def picture_card(pair: PicturePair) -> Markup:
    shown = [picture(pair.truth, "model"), picture(pair.found, "bundle")]
    if pair.truth.shape == pair.found.shape:
        factor, amplified = difference_of(pair.truth, pair.found)
        shown.append(picture(amplified, f"difference × {factor}" if amplified.any() else "no difference"))
    said = f"{pair.task}, seed {pair.seed}: PSNR {exact(pair.psnr)} dB, SSIM {exact(pair.ssim)}"
    return tag("figure", tag("div", shown, class_="strip"), tag("figcaption", said), class_="pair")


def difference_of(truth: Array, found: Array) -> tuple[int, Array]:
    """The absolute difference, times the largest power of two that clips nothing: the least of it becomes visible."""
    off = np.abs(truth.astype(np.int16) - found.astype(np.int16))  # [H,W,C]
    factor = 2 ** int(math.log2(255 / max(int(off.max(initial=0)), 1)))
    return factor, (off * factor).astype(np.uint8)


def picture(pixels: Array, name: str) -> Markup:
    """Enlarged by a whole factor, so that every pixel stays a square."""
    height, width = pixels.shape[:2]
    factor = -(-LEGIBLE // max(height, width))
    content = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(content, "PNG")
    data = "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()
    image = tag("img", src=data, width=width * factor, height=height * factor, alt=name)
    return tag("div", image, tag("span", name))


def text_card(pair: TextPair) -> Markup:
    truth, found = marked(pair.truth, pair.found)
    said = f"{pair.task}, seed {pair.seed}: {100 * pair.agreement:.4g} % of the tokens agree"
    rows = [tag("dt", "model"), tag("dd", truth), tag("dt", "bundle"), tag("dd", found)]
    return tag("figure", tag("figcaption", said), tag("dl", rows, class_="texts"), class_="pair")


def marked(truth: str, found: str) -> tuple[list[Markup], list[Markup]]:
    """Both texts with the words in which they differ marked."""
    a, b = (re.findall(r"\s+|\S+", text) for text in (truth, found))
    left: list[Markup] = []
    right: list[Markup] = []
    for kind, i1, i2, j1, j2 in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        same = kind == "equal"
        left += pieces(a[i1:i2], None if same else "del")
        right += pieces(b[j1:j2], None if same else "ins")
    return left, right


def pieces(words: Iterable[str], mark: str | None) -> Iterable[Markup]:
    text = "".join(words)
    return [tag(mark or "span", text)] if text else []
