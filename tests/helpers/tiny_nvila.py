"""Tiny random NVILA models, and batches as its processor would return them; placeholders outside the vocabulary."""

from typing import ClassVar

import tiny
import torch

from linmu_hf import LinMUConfig, LinMUForConditionalGeneration, NVILAVisionConfig


IMAGE, VIDEO, NEWLINE = 66, 67, 10
EDGE, PATCH = 8, 2  # of a tile, in pixels: 4 x 4 patches, 2 x 2 tokens
TOKENS = 2
S2 = {"image_aspect_ratio": "dynamic_s2", "s2_scales": [8, 16], "video_encoder": "tsp", "pool_sizes": [[2, 1, 1]]}
LITE = {"image_aspect_ratio": "dynamic", "projector_type": "mlp_downsample_3x3_fix"}


def vision_config(**options) -> NVILAVisionConfig:
    tower = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": EDGE,
        "patch_size": PATCH,
    }
    return NVILAVisionConfig(tower_config=tower, out_hidden_size=32, **options)


def config(vision=S2, tie_word_embeddings=False, **options) -> LinMUConfig:
    return LinMUConfig(
        text_config=tiny.text_config(rope_parameters={"rope_type": "default", "rope_theta": 1e4}, **options),
        vision_config=vision_config(**vision),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=None,
        vision_end_token_id=None,
        tie_word_embeddings=tie_word_embeddings,
    )


def plain(seed=0, vision=S2, **options) -> LinMUForConditionalGeneration:
    """A model as users have it, in float32."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return tiny.randomise(LinMUForConditionalGeneration(config(vision, **options)), seed).eval()


def model(*args, **options) -> LinMUForConditionalGeneration:
    """The same in float64."""
    return tiny.exact(plain(*args, **options))


class Sample(tiny.Sample):
    """`("image", rows, columns)` in tiles of the last scale, `("video", t)` in pooled frames."""

    placeholders: ClassVar[dict[str, int]] = {"image": IMAGE, "video": VIDEO}
    another_image = ("image", 2, 2)
    smaller_scales = 1  # tiles of the scales before the last
    pool_sizes = ((2, 1, 1),)

    def medium(self, kind, *size):
        if kind == "image":
            return self.image(*size)
        frames = size[0] * self.pool_sizes[0][0]
        rows = [[frames // t, TOKENS // h, TOKENS // w] for t, h, w in self.pool_sizes]
        ids = [token for t, h, w in rows for token in ([VIDEO] * (h * w) + [NEWLINE]) * t]
        return ids, rows, (frames, 3, EDGE, EDGE)

    def image(self, rows, columns):
        tiles = 1 if rows * columns == 1 else self.smaller_scales + rows * columns
        ids = [IMAGE] * (rows * columns * TOKENS**2) + [NEWLINE]
        return ids, [[1, TOKENS * rows, TOKENS * columns]], (tiles, 3, EDGE, EDGE)


class LiteSample(Sample):
    """The same of a model with tiles and a thumbnail; its videos are not pooled."""

    pool_sizes = ((1, 1, 1),)

    def image(self, rows, columns):
        tiles = 1 if rows * columns == 1 else rows * columns + 1
        ids = ([IMAGE] * TOKENS**2 + [NEWLINE] * min(tiles, 2)) * tiles
        return ids, [[1, TOKENS * rows, TOKENS * columns]], (tiles, 3, EDGE, EDGE)
