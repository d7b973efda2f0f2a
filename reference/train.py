"""The trainer: VAE first, then frozen; then the diffusion with AdamW (and Muon), a warmed-up EMA, atomic checkpoints.

A run is deterministic: step n draws everything from a generator seeded with (seed, n), so a resumed run walks the
same path as one that was never stopped.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdm.plugins.errors import InputError
from mdm.reference.checkpoint import save_checkpoint, write_atomically
from mdm.reference.config import Config
from mdm.reference.data import Data
from mdm.reference.dim import DiM
from mdm.reference.loss import Weights, dim_loss, mdm_loss, vae_loss
from mdm.reference.multimodal import MDM
from mdm.reference.muon import Muon
from mdm.reference.tasks import TASKS
from mdm.reference.vae import FLAT, IMAGE, TEXT

Report = Callable[[str, int, int, Mapping[str, float]], None]  # phase, step, steps, parts of the loss


@dataclass(frozen=True)
class Phase:
    """A part of the diffusion stage: the learning rate's factor goes linearly from `first` to `last`."""

    steps: int
    first: float = 1.0
    last: float = 1.0
    weights: Weights = dataclasses.field(default_factory=Weights)


@dataclass(frozen=True)
class Recipe:
    """How a preset is trained. The defaults are the paper's for the big model (Appendix C)."""

    phases: tuple[Phase, ...] = (Phase(500_000),)
    batch: int = 256
    lr: float = 1e-4
    muon_lr: float = 0.0  # above 0: Muon for the matrices of mixers and skips, AdamW for the rest
    ema: float = 0.9999
    warmup: int = 1000
    vae_steps: int = 100_000
    vae_lr: float = 1e-4
    mix: Mapping[str, int] = dataclasses.field(
        default_factory=lambda: {"text_to_image": 40, "caption": 20, "joint": 20}
    )
    extra: tuple[tuple[str, int], ...] = ()  # beside the mix, one of these in turn each step: task and rows

    @property
    def steps(self) -> int:
        return sum(phase.steps for phase in self.phases)

    def scaled(self, steps: int) -> Recipe:
        """The same recipe over another number of steps, each phase keeping its share."""
        ends = [round(steps * sum(p.steps for p in self.phases[: i + 1]) / self.steps) for i in range(len(self.phases))]
        lengths = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        phases = [dataclasses.replace(p, steps=n) for p, n in zip(self.phases, lengths, strict=True)]
        return dataclasses.replace(self, phases=tuple(phases))

    def at(self, step: int) -> tuple[float, Weights]:
        """The learning rate's factor and the loss weights of a step."""
        warm = min(1.0, (step + 1) / self.warmup)
        for phase in self.phases:
            if step < phase.steps:
                return warm * (phase.first + (phase.last - phase.first) * step / phase.steps), phase.weights
            step -= phase.steps
        raise IndexError(f"the recipe has {self.steps} steps")


# mdm-tiny: first much noise, where place, count and colour are decided, then less, where shape and size are. Flat
# background counts little: it is most of a picture and drowns the shapes.
RECIPES: dict[str, Recipe] = {
    "mdm-tiny": Recipe(
        phases=(
            Phase(3000, 1.0, 0.5, Weights(flat=0.3, image_noise_shift=0.3)),
            Phase(3400, 0.7, 0.0, Weights(flat=0.15, image_noise_shift=0.5)),
        ),
        batch=48, lr=2e-3, muon_lr=0.015, warmup=100, vae_steps=4000, vae_lr=3e-3,
        mix={"text_to_image": 46, "caption": 20, "ask": 13, "joint": 21},
        extra=(("complete", 24), ("class_to_image", 8), ("turn", 8)),
    ),
}  # fmt: skip


def train_vae(model: MDM, data: Data, recipe: Recipe, seed: int, report: Report) -> None:
    """Train the VAE alone on patches and uniform piece ids, then measure and store its latents' mean and scale."""
    vae = model.vae
    optimizer = torch.optim.AdamW(vae.parameters(), lr=recipe.vae_lr, weight_decay=0)
    generator = torch.Generator().manual_seed(seed)
    patches = _patch_pool(model, data, generator)
    busy = patches[patches.std(dim=1) >= FLAT]  # flat background would drown the rest
    for step in range(recipe.vae_steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.vae_lr * (1 - step / recipe.vae_steps)
        picks = [
            pool[torch.randint(len(pool), (n,), generator=generator)]
            for pool, n in ((busy, 896), (patches, 128))
            if len(pool)
        ]
        ids = torch.randint(model.config.vocabulary, (256,), generator=generator)
        loss = vae_loss(vae, torch.cat(picks), ids, generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        report("vae", step + 1, recipe.vae_steps, {"loss": float(loss.detach())})
    with torch.no_grad():
        for modality, tokens in ((IMAGE, patches), (TEXT, torch.arange(model.config.vocabulary))):
            latents = vae.posterior(tokens, modality)[0]
            vae.latent_mean[modality] = latents.mean(0)
            vae.latent_scale[modality] = (latents - latents.mean(0)).square().mean().sqrt()


def _patch_pool(model: MDM, data: Data, generator: torch.Generator) -> Tensor:
    """Patches of up to 2000 pictures [n,p*p*C]."""
    return model.vae.patchify(data.pictures(2000, generator)).flatten(0, 1)


def vae_quality(model: MDM, data: Data, seed: int) -> dict[str, float]:
    """PSNR of decoded pictures in dB and the share of pieces that survive the latent space."""
    with torch.no_grad():
        pictures = data.pictures(200, torch.Generator().manual_seed(seed))
        decoded = model.vae.decode_image(model.vae.encode_image(pictures), model.config.side)
        ids = torch.arange(model.config.vocabulary)[None]
        kept = model.vae.decode_text(model.vae.encode_text(ids)).argmax(-1) == ids
        return {
            "psnr": float(10 * torch.log10(4 / F.mse_loss(decoded, pictures))),
            "pieces": float(kept.float().mean()),
        }


class Trainer:
    """The diffusion stage. `run` may be stopped at any step and resumed from the state file."""

    def __init__(self, model: DiM | MDM, data: Data, recipe: Recipe, seed: int) -> None:
        self.model, self.data, self.recipe, self.seed = model, data, recipe, seed
        self.step = 0
        trained = {name: p for name, p in model.named_parameters() if not name.startswith("vae.")}
        self.ema = {name: p.detach().clone() for name, p in trained.items()}
        matrices = {
            n
            for n, p in trained.items()
            if recipe.muon_lr and p.ndim == 2 and n.endswith(("in_proj.weight", "out_proj.weight", "both.weight"))
        }
        rest = [p for name, p in trained.items() if name not in matrices]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(rest, lr=recipe.lr, weight_decay=0, betas=(0.9, 0.99))
        ]
        if matrices:
            self.optimizers.append(Muon([trained[n] for n in sorted(matrices)], lr=recipe.muon_lr))
        self.trained = trained

    def run(self, report: Report, state: Path | None = None, save_every: int = 500) -> None:
        if isinstance(self.model, MDM):
            self.model.vae.requires_grad_(False)
        while self.step < self.recipe.steps:
            log = self.one_step()
            self.step += 1
            report("diffusion", self.step, self.recipe.steps, log)
            if state is not None and (self.step % save_every == 0 or self.step == self.recipe.steps):
                self.save(state)

    def one_step(self) -> dict[str, float]:
        recipe, generator = self.recipe, torch.Generator().manual_seed(self.seed * 1_000_003 + self.step)
        factor, weights = recipe.at(self.step)
        for optimizer, lr in zip(self.optimizers, (recipe.lr, recipe.muon_lr), strict=False):
            for group in optimizer.param_groups:
                group["lr"] = lr * factor
            optimizer.zero_grad()
        log: dict[str, float] = {}
        for tasks in self.batches():
            rows = self.data.draw(tasks, self.text_length(tasks), generator)
            if isinstance(self.model, DiM):
                loss, parts = dim_loss(self.model, rows, generator)
            else:
                loss, parts = mdm_loss(self.model, rows, weights, generator)
            (loss * len(tasks) / recipe.batch).backward()  # a row counts the same in either batch
            log = parts | log
        log["grad"] = float(nn.utils.clip_grad_norm_(list(self.trained.values()), 1.0))
        for optimizer in self.optimizers:
            optimizer.step()
        self.update_ema()
        return log

    def batches(self) -> list[list[str]]:
        """The tasks of this step's rows: the mix, which shares one shape, and one extra task in turn."""
        mix = {task: share for task, share in self.recipe.mix.items() if task in self.data.tasks} or {
            "class_to_image": 1
        }
        total, tasks = sum(mix.values()), []
        for task, share in mix.items():
            tasks += [task] * max(1, round(self.recipe.batch * share / total))
        extra = [(task, rows) for task, rows in self.recipe.extra if task in self.data.tasks]
        more = [[task] * rows for task, rows in extra[self.step % len(extra) :][:1]] if extra else []
        return [tasks, *more]

    def text_length(self, tasks: list[str]) -> int:
        """The mix uses the shortest text segment; tasks without a picture or with two need room for a prompt."""
        if not TASKS[tasks[0]].text:
            return 0
        lengths = self.model.config.text_lengths
        return min(lengths) if TASKS[tasks[0]].pictures == 1 else max(lengths)

    @torch.no_grad()
    def update_ema(self) -> None:
        """Warmed up: a short run forgets its random start."""
        keep = min(self.recipe.ema, (1 + self.step) / (10 + self.step))
        for name, average in self.ema.items():
            average.lerp_(self.trained[name].detach(), 1 - keep)

    def save(self, path: Path) -> None:
        content = {
            "step": self.step,
            "seed": self.seed,
            "model": self.model.state_dict(),
            "ema": self.ema,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        buffer = io.BytesIO()
        torch.save(content, buffer)
        write_atomically(path, buffer.getvalue())

    def resume(self, path: Path) -> None:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
            if content["seed"] != self.seed:
                raise ValueError(f"it was begun with seed {content['seed']}, not {self.seed}")
            self.model.load_state_dict(content["model"])
            for optimizer, state in zip(self.optimizers, content["optimizers"], strict=True):
                optimizer.load_state_dict(state)
            for name, average in self.ema.items():
                average.copy_(content["ema"][name])
            self.step = int(content["step"])
        except Exception as error:  # whatever torch makes of a file that is something else
            found = " ".join(str(error).split())[:150] or type(error).__name__
            raise InputError(
                f"training state '{path}' does not belong to this run: {found}\nremove it to start anew"
            ) from error

    def export(self, path: Path, config: Config, **facts: str) -> None:
        """The checkpoint people use: the EMA weights, and the VAE as it is."""
        tensors = dict(self.model.state_dict()) | self.ema
        save_checkpoint(path, tensors, config, **facts)
