"""Original layer names of Stable Diffusion's U-Net.

The original programs count blocks through all levels.
"""

from collections.abc import Iterator

from diffusers import UNet2DConditionModel

RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
}  # fmt: skip
ENDS = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
}  # fmt: skip


def original_names(unet: UNet2DConditionModel) -> Iterator[tuple[str, str]]:
    """Yield (diffusers' name, original name) of every layer that has both.

    The blocks of a level follow each other. The layer that changes the size is the level's last block.
    """
    per = unet.config.layers_per_block
    if not isinstance(per, int):
        return
    for name, _ in unet.named_modules():
        if name in ENDS:
            yield name, ENDS[name]
            continue
        kind, *rest = name.split(".")
        if kind == "mid_block" and len(rest) > 1:
            layer, i, tail = rest[0], int(rest[1]), rest[2:]
            block, inner = (
                f"middle_block.{1 if layer == 'attentions' else 2 * i}",
                tail if layer == "attentions" else _resnet(tail),
            )
        elif kind in ("down_blocks", "up_blocks") and len(rest) > 2:
            level, layer, i, tail = int(rest[0]), rest[1], int(rest[2]), rest[3:]
            if layer == "downsamplers":
                block, inner = f"input_blocks.{(level + 1) * (per + 1)}.0", ["op", *tail[1:]]
            elif layer == "upsamplers":
                after = 2 if "CrossAttn" in unet.config.up_block_types[level] else 1
                block, inner = f"output_blocks.{level * (per + 1) + per}.{after}", tail
            else:
                place = 1 + level * (per + 1) + i if kind == "down_blocks" else level * (per + 1) + i
                block = (
                    f"{'input' if kind == 'down_blocks' else 'output'}_blocks."
                    f"{place}.{1 if layer == 'attentions' else 0}"
                )
                inner = tail if layer == "attentions" else _resnet(tail)
        else:
            continue
        yield name, ".".join([block, *inner])


def _resnet(tail: list[str]) -> list[str]:
    return [RESNET.get(part, part) for part in tail]
