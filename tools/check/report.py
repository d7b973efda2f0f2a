"""Everything one run of `mdm check` has to say. `report.json`, JUnit, Markdown and the HTML page are made of it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from mdm.tools.check.finding import Finding, Verdict, worst_of

SCHEMA = 1  # of report.json


@dataclass(frozen=True)
class Drift:
    """Error against evaluation for one task: with errors building up, and with every step from the true state."""

    task: str
    seed: int
    free: list[float]  # rms error of the latents after each evaluation
    forced: list[float]
    free_floor: list[float] | None = None  # of the model's own arithmetic in the deployed types
    forced_floor: list[float] | None = None
    limit: list[float] | None = None  # of one evaluation


@dataclass(frozen=True)
class BlockErrors:
    """Along one graph: the error that a part adds, and what has built up behind it."""

    graph: str
    parts: list[str]  # "backbone.blocks.3", in graph order
    own: list[float]  # the part alone, from true inputs: rms
    own_floor: list[float]
    grown: list[float]  # the whole graph on the backend, behind this part
    grown_floor: list[float]


@dataclass(frozen=True)
class Divergence:
    """The first node whose own error leaves its floor."""

    graph: str
    node: str
    module: str  # module path of the PyTorch model
    op: str
    dtype: str
    inputs: dict[str, list[int]]  # name -> shape
    outputs: dict[str, list[int]]
    error: float  # rms, own
    floor: float
    said: str
    folder: str = ""  # of the smallest sub-model with its inputs, below the report's
    reproduce: str = ""


@dataclass(frozen=True)
class PicturePair:
    task: str
    seed: int
    truth: npt.NDArray[np.uint8]  # [H,W,3]
    found: npt.NDArray[np.uint8]
    psnr: float
    ssim: float


@dataclass(frozen=True)
class TextPair:
    task: str
    seed: int
    truth: str
    found: str
    agreement: float  # share of equal tokens


@dataclass
class Report:
    bundle: str  # its name
    backend: str
    against: str  # "reference", "golden", or what it was compared with
    findings: list[Finding] = field(default_factory=list)
    drifts: list[Drift] = field(default_factory=list)
    blocks: list[BlockErrors] = field(default_factory=list)
    divergences: list[Divergence] = field(default_factory=list)
    pictures: list[PicturePair] = field(default_factory=list)
    texts: list[TextPair] = field(default_factory=list)
    fingerprint: dict[str, str] = field(default_factory=dict)  # everything that matters for the result
    multiples: dict[str, float] = field(default_factory=dict)  # of the floor: "rms", "worst"
    seconds: dict[str, float] = field(default_factory=dict)  # level -> time it took
    created: str = ""  # ISO, UTC
    command: str = ""  # that makes this report again

    @property
    def verdict(self) -> Verdict:
        """Of everything that ran. Nothing ran: SKIPPED, which is no success."""
        return worst_of(finding.verdict for finding in self.findings)

    def counts(self) -> dict[str, int]:
        return {verdict.value: sum(f.verdict is verdict for f in self.findings) for verdict in Verdict}

    def of_level(self, level: str) -> list[Finding]:
        return [finding for finding in self.findings if finding.level == level]
