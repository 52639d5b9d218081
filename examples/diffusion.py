"""A text-to-image UNet: LoRA on convolutions and a gated prefix in cross-attention, then the LoRA merged away."""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel

import epitaxy


def main(steps: int = 5) -> None:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(  # in earnest: from_pretrained("your/model", subfolder="unet")
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    picture, text, time = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 32), torch.tensor([10, 500])

    def predict() -> torch.Tensor:
        return unet(picture, time, encoder_hidden_states=text).sample

    bare = predict().detach()
    convolutions = epitaxy.attach(unet, epitaxy.LoRA(at=("resnet.conv", "sampler.conv"), rank=4), name="size")
    prefix = epitaxy.attach(unet, epitaxy.Prefix(tokens=4, gated=True, at="cross_attention"), name="style")
    epitaxy.activate(unet, ["size", "style"])
    print(f"a fresh adapter changes nothing: {torch.allclose(predict(), bare, atol=1e-6)}")

    optimiser = torch.optim.AdamW([*convolutions.parameters(), *prefix.parameters()], lr=1e-2)
    for _ in range(steps):
        loss = (predict() - picture).square().mean()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    print(f"loss after {steps} steps: {loss.item():.3f}")

    with torch.no_grad():
        adapted = predict()
        print(epitaxy.merge(unet, "size"))
        drift = (predict() - adapted).abs().max().item()
    epitaxy.unmerge(unet)
    epitaxy.detach(unet)
    print(f"merged against hooked: {drift:.1e}; the base is back: {torch.allclose(predict(), bare, atol=1e-6)}")


if __name__ == "__main__":
    main()
