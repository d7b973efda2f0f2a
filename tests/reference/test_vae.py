"""The VAE: patches and pieces in and out of one latent space, its KL, the scaling, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence

from mdm.plugins.errors import InputError
from mdm.reference.multimodal import MDM
from mdm.reference.vae import IMAGE, TEXT, kl_to_normal

Make = Callable[..., MDM]
Figure = Callable[[str, float, float], None]


@pytest.mark.parametrize("height", [1, 2, 4, 8])
@pytest.mark.parametrize(("patch", "channels"), [(8, 3), (2, 4), (1, 1)])
def test_patches_round_trip_bit_by_bit(tiny_model: Make, height: int, patch: int, channels: int) -> None:
    vae = tiny_model(patch=patch, in_channels=channels).vae
    picture = torch.randn(2, channels, height * patch, 5 * patch)
    patches = vae.patchify(picture)
    assert patches.shape == (2, height * 5, patch * patch * channels)
    assert torch.equal(vae.unpatchify(patches, height), picture)


def test_a_patch_is_a_square_of_the_picture_in_row_order(tiny_model: Make) -> None:
    picture = torch.arange(3 * 32 * 32.0).reshape(1, 3, 32, 32)
    patches = tiny_model().vae.patchify(picture)[0]  # [16,192]
    for row in range(4):
        for column in range(4):
            square = picture[0, :, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8]
            assert torch.equal(patches[row * 4 + column], square.flatten())


@given(mean=st.floats(-20, 20), log_variance=st.floats(-12, 6))
@settings(deadline=None)
def test_kl_is_that_of_torch_distributions(mean: float, log_variance: float) -> None:
    m, v = torch.tensor([mean, log_variance], dtype=torch.float64)
    expected = kl_divergence(Normal(m, (0.5 * v).exp()), Normal(torch.zeros_like(m), torch.ones_like(m)))
    torch.testing.assert_close(kl_to_normal(m, v), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("modality", [IMAGE, TEXT])
def test_scaled_latents_come_back(tiny_model: Make, modality: int, figure: Figure) -> None:
    vae = tiny_model().vae
    s = torch.randn(2, 7, 12)
    z = vae._scaled(s, modality)
    figure(
        f"latent scaling there and back, modality {modality}", float((vae._unscaled(z, modality) - s).abs().max()), 2e-6
    )
    expected = (s - vae.latent_mean[modality]) / vae.latent_scale[modality]
    assert torch.equal(z, expected)
    assert not torch.allclose(vae._scaled(s, 1 - modality), z)  # the modalities are told apart


def test_encoding_and_decoding_use_the_scaling(tiny_model: Make) -> None:
    vae = tiny_model().vae
    picture, ids = torch.randn(2, 3, 32, 32), torch.randint(40, (2, 8))
    patches = vae.patchify(picture)
    for latents, tokens, modality in (
        (vae.encode_image(picture), patches, IMAGE),
        (vae.encode_text(ids), ids, TEXT),
    ):
        torch.testing.assert_close(vae._unscaled(latents, modality), vae.posterior(tokens, modality)[0])
    z = torch.randn(2, 16, 12)
    assert torch.equal(vae.decode_image(z, 4), vae.unpatchify(vae.image_head(vae._unscaled(z, IMAGE)), 4))
    assert torch.equal(vae.decode_text(z), vae.text_head(vae._unscaled(z, TEXT)))


def test_tokens_are_encoded_one_by_one(tiny_model: Make) -> None:
    vae = tiny_model().vae
    one, two = torch.tensor([[5, 6, 7]]), torch.tensor([[5, 9, 7]])
    same = (vae.encode_text(one) == vae.encode_text(two)).all(-1)[0]
    assert same.tolist() == [True, False, True]


def test_the_log_variance_is_bounded(tiny_model: Make) -> None:
    _, log_variance = tiny_model().vae.posterior(1e4 * torch.randn(1, 16, 192), IMAGE)
    assert (float(log_variance.min()), float(log_variance.max())) == (-12, 6)


@pytest.mark.parametrize("bad", [-1, 40, 10**9])
def test_an_id_out_of_range_is_an_error(tiny_model: Make, bad: int) -> None:
    with pytest.raises(InputError, match=rf"token ids reach from .*{bad}.*, expected 0 to 39"):
        tiny_model().vae.encode_text(torch.tensor([[3, bad, 4]]))


def test_no_ids_are_no_latents(tiny_model: Make) -> None:
    assert tiny_model().vae.encode_text(torch.zeros(2, 0, dtype=torch.long)).shape == (2, 0, 12)


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 4, 32, 32), (1, 3, 30, 32), (1, 3, 32, 33), (1, 1, 3, 32, 32)])
def test_a_misshapen_picture_is_an_error(tiny_model: Make, shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="expected \\(batch, 3, height, width\\), both sides multiples of 8") as caught:
        tiny_model().vae.encode_image(torch.zeros(shape))
    assert str(shape) in str(caught.value)
