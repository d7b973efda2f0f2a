"""MDM's network: three ways to say the same noise, a level for each modality, given tokens, and independent rows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mdm.plugins.errors import InputError
from mdm.reference.multimodal import MDM, eps_from, target_from, x0_from
from mdm.reference.schedule import CosineSchedule

Make = Callable[..., MDM]
Figure = Callable[[str, float, float], None]
KINDS = ("eps", "v", "x0")


def latents(rows: int = 2, tokens: int = 24, seed: int = 0) -> Tensor:
    return torch.randn(rows, tokens, 12, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("t", [1e-3, 0.3, 0.7, 0.999])
def test_what_the_network_should_say_gives_back_noise_and_latent(kind: str, t: float, figure: Figure) -> None:
    schedule, time = CosineSchedule(1.0), torch.tensor(t, dtype=torch.float64)
    a, s = schedule.alpha(time), schedule.sigma(time)
    z0, noise = latents(seed=1).double(), latents(seed=2).double()
    z = a * z0 + s * noise
    said = target_from(kind, z0, noise, a, s)
    error = max(
        float((eps_from(kind, said, z, a, s) - noise).abs().max()),
        float((x0_from(kind, said, z, a, s) - z0).abs().max()),
    )
    figure(f"noise and latent from {kind} at t = {t}", error, 1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_noise_and_latent_say_the_same_for_any_output(kind: str) -> None:
    """z = a x0 + s eps holds for a wrong output too: a sampler may use either."""
    a, s = torch.tensor(0.6, dtype=torch.float64), torch.tensor(0.8, dtype=torch.float64)
    z, output = latents(seed=3).double(), latents(seed=4).double()
    back = a * x0_from(kind, output, z, a, s) + s * eps_from(kind, output, z, a, s)
    torch.testing.assert_close(back, z, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["v", "x0"])
def test_the_latent_is_finite_where_no_signal_is_left(kind: str) -> None:
    a, s = torch.tensor(0.0), torch.tensor(1.0)
    z0, noise = latents(seed=5), latents(seed=6)
    torch.testing.assert_close(x0_from(kind, target_from(kind, z0, noise, a, s), noise, a, s), z0)


@pytest.mark.parametrize("text", KINDS)
@pytest.mark.parametrize("image", KINDS)
def test_forward_converts_each_modality_by_its_own_kind_and_level(tiny_model: Make, text: str, image: str) -> None:
    model, z, t = tiny_model(predict_text=text, predict_image=image), latents(), torch.tensor([200.0, 800.0])
    output, eps = model.predict(z, t, 8), model(z, t, 8)
    for kind, name, part in ((text, "text", slice(0, 8)), (image, "image", slice(8, 24))):
        schedule = model.schedules[name]
        a, s = (level(t.double() / 1000)[:, None, None].float() for level in (schedule.alpha, schedule.sigma))
        torch.testing.assert_close(eps[:, part], eps_from(kind, output[:, part], z[:, part], a, s))


def test_levels_of_every_token(tiny_model: Make) -> None:
    model, t = tiny_model(), torch.tensor([1.0, 500.0, 1000.0])
    alpha, sigma = model.levels(t, 8, 24)
    assert alpha.shape == sigma.shape == (3, 24, 1)
    for name, part in (("text", slice(0, 8)), ("image", slice(8, 24))):
        expected = model.schedules[name].alpha(t.double() / 1000).float()[:, None, None]
        assert torch.equal(alpha[:, part], expected.expand(-1, alpha[:, part].shape[1], 1))
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(3, 24, 1))
    assert alpha[1, 0] > alpha[1, 8]  # shift 2 keeps more signal than shift 0.5: the schedules are not swapped


@pytest.mark.parametrize(("text_tokens", "pictures"), [(8, 1), (20, 1), (5, 1), (0, 1), (20, 0), (8, 2), (0, 3)])
@pytest.mark.parametrize("scan", ["alternate", "parallel"])
def test_rows_of_a_batch_are_independent(
    tiny_model: Make, scan: str, text_tokens: int, pictures: int, figure: Figure
) -> None:
    model = tiny_model(scan=scan)
    z, t, y = latents(3, text_tokens + 16 * pictures), torch.tensor([5.0, 400.0, 999.0]), torch.tensor([0, 4, 2])
    given = torch.rand(z.shape[:2], generator=torch.Generator().manual_seed(7)) < 0.3
    # What the network says: as eps, a text's x0 is divided by sigma, at t = 0.005 by 1/250, and rounding with it.
    together = model.predict(z, t, text_tokens, given, y)
    assert together.isfinite().all()
    rows = [slice(i, i + 1) for i in range(3)]
    alone = torch.cat([model.predict(z[i], t[i], text_tokens, given[i], y[i]) for i in rows])
    figure(f"a row alone, {scan} {text_tokens}+{pictures}x16", float((together - alone).abs().max()), 1e-5)
    assert not torch.allclose(together[0], together[1])


def test_a_given_token_is_a_condition_not_a_latent(tiny_model: Make) -> None:
    model, z, t = tiny_model(), latents(1), torch.tensor([500.0])
    given = torch.zeros(1, 24, dtype=torch.bool)
    given[0, 3] = True
    eps = model(z, t, 8, given)
    others = [i for i in range(24) if i != 3]

    changed = z.clone()
    changed[0, 3] += 1
    assert not torch.equal(model(changed, t, 8, given)[0, others], eps[0, others])  # its content is told to the others
    assert not torch.equal(model(z, t, 8)[0, others], eps[0, others])  # and so is that it is given
    assert torch.equal(model(z, t, 8, torch.zeros(1, 24, dtype=torch.bool)), model(z, t, 8))
    for part in (model.given_embed, model.given_in.weight):
        part.add_(0.1)
        assert not torch.equal(model(z, t, 8, given)[0, others], eps[0, others])
        part.sub_(0.1)
    model.given_embed.add_(1.0)
    assert torch.equal(model(z, t, 8), tiny_model()(z, t, 8))  # it marks no other token


@pytest.mark.parametrize("what", ["class", "time"])
def test_class_and_time_steer(tiny_model: Make, what: str) -> None:
    model, z = tiny_model(), latents(1)
    one, two = torch.tensor([500.0]), torch.tensor([501.0])
    base = model.predict(z, one, 8, y=torch.tensor([1]))
    other = model.predict(z, two, 8, y=torch.tensor([1])) if what == "time" else model.predict(z, one, 8)
    assert not torch.allclose(base, other, atol=1e-6)
    assert torch.equal(model.predict(z, one, 8), model.predict(z, one, 8, y=torch.tensor([4])))  # none: the null class


@pytest.mark.parametrize(
    ("shape", "text_tokens", "said"),
    [
        ((2, 24, 11), 8, r"shape \(2, 24, 11\), expected \(batch, tokens, 12\)"),
        ((24, 12), 8, r"shape \(24, 12\), expected"),
        ((2, 23, 12), 8, "23 latent tokens with 8 of text"),
        ((2, 24, 12), 7, "24 latent tokens with 7 of text"),
        ((2, 37, 12), 21, "expected at most 20 of text, then whole pictures of 16"),
        ((2, 8, 12), 20, "8 latent tokens with 20 of text"),
        ((2, 16, 12), -16, "16 latent tokens with -16 of text"),
        ((2, 0, 12), 0, "0 latent tokens with 0 of text"),
    ],
)
def test_latents_that_fit_no_request_are_an_error(
    tiny_model: Make, shape: tuple[int, ...], text_tokens: int, said: str
) -> None:
    with pytest.raises(InputError, match=said) as caught:
        tiny_model()(torch.zeros(shape), torch.ones(shape[0]), text_tokens)
    assert len(str(caught.value).splitlines()) <= 3


@pytest.mark.parametrize(
    "y", [torch.tensor([5, 0]), torch.tensor([-1, 0]), torch.tensor([1.0, 0.0]), torch.tensor([1])]
)
def test_classes_that_do_not_exist_are_an_error(tiny_model: Make, y: Tensor) -> None:
    with pytest.raises(InputError, match="class ids"):
        tiny_model()(latents(), torch.ones(2), 8, y=y)
