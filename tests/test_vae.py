"""The autoencoder against diffusers' AutoencoderKL, with random weights."""

import pytest
import torch

from tinyflow.vae import VAE, VAEConfig

diffusers = pytest.importorskip("diffusers")

NAMES = {"down_blocks": "down", "up_blocks": "up", "resnets": "blocks", "downsamplers.0.conv": "resample",
         "upsamplers.0.conv": "resample", "conv_shortcut": "shortcut", "conv_norm_out": "norm_out",
         "mid_block.blocks.1": "mid.2", "mid_block.blocks.0": "mid.0", "mid_block.attentions.0": "mid.1",
         "group_norm": "norm", "to_out.0": "to_out"}
SMALL = VAEConfig(channels=(8, 16, 16), layers=1, latent_channels=3, groups=4)
DEEP = VAEConfig(channels=(16, 32, 32, 32), layers=2, latent_channels=4, groups=8, scale=0.7, shift=-0.2)


def pair(config: VAEConfig):
    """The same random autoencoder twice: theirs, ours."""
    torch.manual_seed(0)
    levels = len(config.channels)
    peer = diffusers.AutoencoderKL(
        down_block_types=levels * ["DownEncoderBlock2D"], up_block_types=levels * ["UpDecoderBlock2D"],
        block_out_channels=config.channels, layers_per_block=config.layers, norm_num_groups=config.groups,
        latent_channels=config.latent_channels, use_quant_conv=False, use_post_quant_conv=False)
    state = {}
    for name, parameter in peer.requires_grad_(False).eval().named_parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
        for old, new in NAMES.items():
            name = name.replace(old, new)
        state[name] = parameter
    ours = VAE(config).requires_grad_(False).eval()
    ours.load_state_dict(state)
    return peer, ours


@pytest.mark.parametrize("config", [SMALL, DEEP])
@pytest.mark.parametrize("batch, height, width", [(1, 40, 24), (3, 24, 56)])
def test_both_directions_agree_with_diffusers(config, batch, height, width):
    peer, ours = pair(config)
    pictures = torch.rand(batch, 3, height, width) * 2 - 1
    latents = ours.encode(pictures)
    assert latents.shape == (batch, config.latent_channels, height // ours.factor, width // ours.factor)
    z = latents / config.scale + config.shift
    torch.testing.assert_close(z, peer.encode(pictures).latent_dist.mean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.decode(latents), peer.decode(z).sample, atol=1e-5, rtol=1e-5)


def test_latents_are_shifted_and_scaled_as_sd3_does():
    peer, ours = pair(VAEConfig(channels=(8, 8), layers=1, latent_channels=2, groups=4))
    pictures = torch.rand(1, 3, 8, 8)
    mean = peer.encode(pictures).latent_dist.mean
    torch.testing.assert_close(ours.encode(pictures), (mean - 0.0609) * 1.5305)


def test_a_picture_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="multiples of 4 pixels, not 30 x 24"):
        VAE(SMALL).encode(torch.zeros(1, 3, 24, 30))


def test_the_public_size():
    with torch.device("meta"):
        vae = VAE()
    state = vae.state_dict()
    assert vae.factor == 8 and len(state) == 244
    assert sum(tensor.numel() for tensor in state.values()) == 83_819_683
    assert vae.encode(torch.zeros(1, 3, 64, 48, device="meta")).shape == (1, 16, 8, 6)
