"""Two reports with something of everything: of a sound bundle, and of a broken one full of hostile names. And tiny
models with their bundles."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from mdm.tools.check.finding import LEVELS, Array, Difference, Finding, Limits, Verdict
from mdm.tools.check.report import BlockErrors, Divergence, Drift, PicturePair, Report, TextPair

if TYPE_CHECKING:
    from .deployed import Exported

NASTY = '<script>alert("x")</script> & | `a` \x00\x1b[31m \n# head ]]> \udcff <img src=http://127.0.0.1:9/x.png>'
COMMAND = "mdm check mdm-tiny.bundle --level blocks --case 'batch 2, text 5' --seed 0"


def finding(
    level: str, subject: str, part: str, used: float, verdict: Verdict = Verdict.PASS, case: str = "seed 0"
) -> Finding:
    floor = Difference(2e-7, 1e-6, 5e-7, 1.0, (0, 3, 1), 0.5, 0.5)
    limits = Limits(8e-7, 1.6e-5, "4 x floor in the mean, 16 x at worst")
    error = Difference(8e-7 * used, 1e-5 * used, 6e-6 * used, 0.999999, (1, 4, 15), 0.25, 0.2500025)
    said = "" if verdict is Verdict.PASS else "the rms error is 31 times the floor"
    reproduce = "" if verdict is Verdict.PASS else COMMAND
    return Finding(level, subject, part, case, verdict, said, (2, 16, 64), error, floor, limits, (), reproduce)


def picture(seed: int, size: int = 16) -> Array:
    """A disc on a gradient."""
    y, x = np.mgrid[:size, :size] / size
    disc = np.hypot(x - 0.3 - 0.05 * seed, y - 0.5) < 0.25
    colours = [np.where(disc, 0.9, 0.2 * y), np.full((size, size), 0.3), 0.4 + 0.4 * x]
    return (255 * np.stack(colours, axis=-1)).astype(np.uint8)  # [H,W,3]


def drift(task: str, steps: int, grow: float) -> Drift:
    noise = 1 + 0.3 * np.sin(np.arange(steps) * 2.1)
    floor = 1e-7 * np.exp(np.linspace(0, 2, steps))
    return Drift(
        task, 0, list(floor * noise * grow ** np.linspace(0, 1, steps)), list(2e-7 * noise), list(floor),
        [1e-7] * steps, list(4 * floor),
    )  # fmt: skip


def blocks(graph: str, count: int, broken: bool = False) -> BlockErrors:
    wobble = 1 + 0.4 * np.sin(np.arange(count) * 1.7)
    own, grown = 2e-7 * wobble, 2e-7 * np.sqrt(np.arange(count) + 1.0) * wobble
    grown_floor = 0.8 * grown
    if broken:
        own[count // 2], grown[count // 2 :] = 4e-4, 4e-4
    parts = ["embed", *(f"backbone.blocks.{index}" for index in range(count - 2)), "head"][:count]
    return BlockErrors(graph, parts, list(own), [1.5e-7] * count, list(grown), list(grown_floor))


@pytest.fixture
def sound() -> Report:
    report = Report("mdm-tiny", "onnxruntime-cpu", "reference", created="2026-11-20T12:00:00Z", command=COMMAND)
    report.findings = [
        Finding("files", "manifest.json", "", "", Verdict.PASS),
        Finding("files", "weights.safetensors", "sha256", "", Verdict.SKIPPED, "--no-hashes was given"),
        *(finding("operators", op, "y", 0.02 + 0.03 * n) for n, op in enumerate(("SelectiveScan", "SSD", "Conv1d"))),
        *(finding("blocks", "denoiser", f"backbone.blocks.{n}", (n + 1) / 75, case="batch 2") for n in range(60)),
        *(finding("steps", task, "noise estimate", 0.3) for task in ("t2i", "caption")),
        finding("trajectories", "t2i", "latents", 0.62),
        Finding("decoded", "t2i", "picture", "seed 0", Verdict.PASS, figures=(("psnr", 71.25), ("ssim", 0.99998))),
    ]
    report.drifts = [drift("t2i", 20, 1.5), drift("joint", 250, 2), drift("caption", 1, 1)]
    report.blocks = [blocks("denoiser", 14), blocks("autoencoder", 1), blocks("dim-huge", 60)]
    report.blocks[0].parts[1:3] = ["a-module-path-that-goes-on-and-on.blocks.0", "x" * 300]
    other = picture(0)
    other[3, 4] += 1
    report.pictures = [PicturePair("t2i", 0, picture(0), other, 71.25, 0.99998)]
    report.pictures += [PicturePair("t2i", seed, picture(seed), picture(seed), float("inf"), 1.0) for seed in (1, 2)]
    report.texts = [TextPair("caption", 0, "a red disc on the left", "a red disc on the left", 1.0)]
    report.fingerprint = {
        "mdm-deploy": "0.1.0", "checkpoint": "3f" * 32, "onnxruntime": "1.27.0", "torch": "2.13.0+cpu",
        "numpy": "2.4.2", "CPU": "x86-64, 2 cores, AVX-512", "threads": "1",
    }  # fmt: skip
    report.multiples = {"rms": 4.0, "worst": 16.0}
    report.seconds = {"files": 0.2, "operators": 3.1, "blocks": 12.7, "steps": 4.0, "trajectories": 31.5}
    return report


@pytest.fixture
def failing(sound: Report) -> Report:
    nan = float("nan")
    sound.findings += [
        finding("blocks", "denoiser", "backbone.blocks.6", 31.0, Verdict.FAIL, "batch 2, text 5"),
        finding("steps", NASTY, "noise estimate", 7.5, Verdict.FAIL),
        Finding(
            "steps", "joint", "text logits", "seed 3", Verdict.FAIL, "3 values are not finite", (2, 9),
            Difference(nan, nan, nan, nan, (1, 4), nan, 0.25, 3), None, Limits(1e-4, 1e-4, "table for fp32"),
            (), COMMAND,
        ),
        finding("decoded", "caption", "text", 0.9, Verdict.AMBIGUOUS),
        *(finding("operators", f"CausalConv1d{n}", "y", 1.5 + n, Verdict.FAIL) for n in range(20)),
    ]  # fmt: skip
    sound.bundle = NASTY
    broken = drift("t2i", 40, 1e4)
    broken.free[30:] = [nan] * 10
    sound.drifts.insert(0, broken)
    sound.drifts.append(Drift("dead", 1, [nan, 0.0, float("inf")], [0.0, 0.0, 0.0]))
    sound.blocks.insert(0, blocks("denoiser, broken", 14, broken=True))
    sound.divergences = [
        Divergence(
            "denoiser", "/backbone/blocks.6/mixer/SSD", "backbone.blocks.6.mixer", "mdm::SSD", "float32",
            {"x": [2, 16, 4, 32], "dt": [2, 16, 4], "A": [4]}, {"y": [2, 16, 4, 32]}, 3.9e-4, 2e-7,
            "its own error is 1950 times its floor, from true inputs", "submodels/denoiser-0006", COMMAND,
        )
    ]  # fmt: skip
    sound.pictures.insert(0, PicturePair("t2i", 7, picture(0, 64), picture(3, 64), 14.2, 0.71))
    sound.texts.append(
        TextPair("caption", 7, "a red disc on the left", f"a blue disc <b>on</b> the right {NASTY}", 0.6)
    )
    sound.fingerprint["host"] = NASTY
    assert {one.level for one in sound.findings} == set(LEVELS)
    return sound


# ------------------------------------------------------------------------------------------------- exported models


@pytest.fixture(scope="session")
def exported(
    tmp_path_factory: pytest.TempPathFactory, tiny: Callable[..., dict[str, Any]], tiny_model: Callable[..., Any]
) -> Callable[[str], Exported]:
    """exported("keep"): see `deployed.CASES`."""

    @cache
    def make(name: str) -> Exported:
        import torch
        from safetensors.torch import save_file

        from mdm.export import export_bundle
        from mdm.reference import SHIPPED_TOKENIZER, build_model, load_config
        from mdm.reference.autoencoder import Autoencoder, AutoencoderShape

        from .deployed import CASES, Exported

        folder, (changes, options) = tmp_path_factory.mktemp(name), CASES[name]
        config, checkpoint, autoencoder = tiny(**changes), folder / f"{name}.safetensors", None
        with torch.random.fork_rng():
            torch.manual_seed(4)
            model = build_model(load_config(config)) if config["family"] == "dim" else tiny_model(**changes)
            save_file(model.state_dict(), checkpoint)
            if name == "latent":
                autoencoder = folder / "vae.safetensors"
                shape = AutoencoderShape(channels=(32, 32), blocks=1, latent=config["in_channels"])
                save_file(Autoencoder(shape).state_dict(), autoencoder)
                options = options | {"autoencoder": autoencoder}
        if config["family"] == "mdm":
            options = options | {"tokenizer": SHIPPED_TOKENIZER}
        return Exported(
            export_bundle(checkpoint, config, folder / f"{name}.bundle", **options), checkpoint, autoencoder
        )

    return make
