"""LinMU with full attention everywhere and NVILA's vision side is NVILA: SigLIP, its encoders and Qwen2, put together
here as NVILA does it: every media token of the prompt gives way to a block of embeddings."""

import pytest
import tiny
import tiny_nvila
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, SiglipVisionModel

from linmu_hf import LinMUConfig
from linmu_hf.families.nvila.configuration import NVILAConfig


class PooledTwiceSample(tiny_nvila.Sample):
    smaller_scales = 1 + 4
    pool_sizes = ((4, 1, 1), (2, 2, 1))


class PlainSample(tiny_nvila.Sample):
    pool_sizes = ((1, 1, 1),)


S2 = tiny_nvila.S2 | {"s2_scales": "8,16,24", "pool_sizes": [[4, 1, 1], [2, 2, 1]]}
CASES = {
    "text": (S2, PooledTwiceSample(9)),
    "S2 image": (S2, PooledTwiceSample(2, ("image", 3, 4), 4)),
    "untiled images": (S2, PooledTwiceSample(2, ("image", 1, 1), 1, ("image", 1, 1), 4)),
    "TSP video": (S2, PooledTwiceSample(2, ("video", 2), 4)),
    "everything": (S2, PooledTwiceSample(1, ("image", 5, 2), 1, ("video", 1), 1, ("image", 1, 1), ("video", 2), 3)),
    "Lite tiles": (tiny_nvila.LITE, tiny_nvila.LiteSample(2, ("image", 2, 3), 4)),
    "Lite images": (tiny_nvila.LITE, tiny_nvila.LiteSample(2, ("image", 1, 1), ("image", 1, 1), 4)),
    "Lite video": (tiny_nvila.LITE, tiny_nvila.LiteSample(2, ("video", 3), 4)),
    "basic video": ({"image_aspect_ratio": "resize"}, PlainSample(2, ("video", 3), 1, ("image", 1, 1), 4)),
}


class PlainNVILA:
    """NVILA from its parts, with the weights of a LinMU model."""

    def __init__(self, model):
        self.config, text = model.config.vision_config, model.config.text_config
        state = model.state_dict()
        self.tower = SiglipVisionModel(self.config.tower_config).eval()
        tower = "model.visual.vision_tower."
        self.tower.load_state_dict({n.removeprefix(tower): w for n, w in state.items() if n.startswith(tower)})
        self.projector = {n.split("layers.")[1]: w for n, w in state.items() if "mm_projector" in n}
        fields = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        self.llm = Qwen2ForCausalLM(
            Qwen2Config(
                **{name: getattr(text, name) for name in (*fields, "num_key_value_heads", "rope_parameters")},
                tie_word_embeddings=False,
            )
        ).eval()
        names = {"model.language_model.": "model.", ".mixer.": ".self_attn."}
        llm = {n: w for n, w in state.items() if "visual" not in n}
        for old, new in names.items():
            llm = {n.replace(old, new): w for n, w in llm.items()}
        self.llm.load_state_dict(llm)

    def encode(self, tiles):
        """Patches `[n, s, s, c]`."""
        hidden = self.tower(tiles, output_hidden_states=True).hidden_states[-2]
        edge = int(hidden.shape[1] ** 0.5)
        return hidden.view(len(tiles), edge, edge, -1)

    def project(self, maps):
        """Tokens `[n, g * g, d]` of maps `[n, s, s, c]`, written out for one map after the other."""
        weights, k = self.projector, 3 if "3x3" in self.config.projector_type else 2
        tokens = []
        for image in maps:
            edge = -(-len(image) // k) * k
            padded = torch.zeros(edge, edge, image.shape[-1])
            padded[: len(image), : len(image)] = image
            rows = [
                torch.cat([padded[i + di, j + dj] for di in range(k) for dj in range(k)])
                for i in range(0, edge, k)
                for j in range(0, edge, k)
            ]
            tokens.append(torch.stack(rows))
        x = torch.stack(tokens)
        last = 7 if k == 3 else 4
        for i in range(1, last + 1):
            if f"{i}.weight" not in weights:
                x = torch.nn.functional.gelu(x)
            elif weights[f"{i}.weight"].ndim == 1:
                x = torch.nn.functional.layer_norm(
                    x, x.shape[-1:], weights[f"{i}.weight"], weights[f"{i}.bias"], eps=1e-5
                )
            else:
                x = x @ weights[f"{i}.weight"].T + weights[f"{i}.bias"]
        return x

    def s2_image(self, tiles, rows, columns):
        """Block of a tiled image: one grid."""
        patches, maps, start = self.encode(tiles), [], 0
        edges = [scale // self.config.s2_scales[0] for scale in self.config.s2_scales[:-1]]
        for high, wide in [*((edge, edge) for edge in edges), (rows, columns)]:
            own = patches[start : start + high * wide]
            maps.append(torch.cat([torch.cat([own[i * wide + j] for j in range(wide)], 1) for i in range(high)], 0))
            start += high * wide
        size = maps[-1].shape[:2]
        channels_first = [one.permute(2, 0, 1)[None] for one in maps]
        resized = [torch.nn.functional.interpolate(one, size=size, mode="area") for one in channels_first]
        joined = torch.cat(resized, 1)[0].permute(1, 2, 0)
        s = patches.shape[1]
        blocks = [joined[i * s : i * s + s, j * s : j * s + s] for i in range(rows) for j in range(columns)]
        tokens = self.project(torch.stack(blocks))
        g = int(tokens.shape[1] ** 0.5)
        grids = [own.view(g, g, -1) for own in tokens]
        merged = torch.cat([torch.cat(grids[i * columns : (i + 1) * columns], 1) for i in range(rows)], 0)
        return [merged.flatten(0, 1)]

    def blocks(self, kind, size, pixels):
        """The blocks of a medium, without what separates them."""
        copies = len(self.config.s2_scales or [1])
        if kind == "image" and self.config.s2_scales and len(pixels) > 1:
            return self.s2_image(pixels, *size)
        tokens = self.project(torch.cat([self.encode(pixels)] * copies, -1))
        if kind == "image":
            return list(tokens)
        g, blocks = int(tokens.shape[1] ** 0.5), []
        for t, h, w in self.config.pool_sizes:
            video = tokens.view(len(pixels) // t, t, g // h, h, g // w, w, -1).mean((1, 3, 5))
            blocks += list(video.flatten(1, 2))
        return blocks

    @torch.no_grad()
    def logits(self, sample):
        embed = self.llm.get_input_embeddings()
        newline, start, pieces = embed(torch.tensor([tiny_nvila.NEWLINE])), 0, []
        pixels = {kind: iter(own) for kind, own in sample.pixels.items()}
        for part, end in zip(sample.parts, sample.cuts):
            if isinstance(part, int):
                pieces.append(embed(torch.tensor(sample.ids[start:end])))
            else:
                blocks = self.blocks(part[0], part[1:], next(pixels[part[0]]))
                twice = part[0] == "image" and len(blocks) > 1  # one of the encoder, one of the text
                pieces += [piece for block in blocks for piece in (block, *[newline] * (2 if twice else 1))]
            start = end
        return self.llm(inputs_embeds=torch.cat(pieces)[None]).logits[0]


@pytest.mark.parametrize(("vision", "sample"), CASES.values(), ids=CASES)
def test_logits_are_those_of_its_parts(vision, sample):
    model = tiny_nvila.plain(vision=vision, layer_types=["full_attention"] * 4)
    expected = PlainNVILA(model).logits(sample)
    with torch.no_grad():
        actual = model(**tiny.batch(sample, dtype=torch.float32)).logits[0]
    assert expected.abs().max() > 0.5
    torch.testing.assert_close(actual, expected, atol=5e-6, rtol=1e-5)


def test_a_batch_of_images_of_several_sizes():
    """The tiles of all images go through the tower together; each image keeps its own."""
    model = tiny_nvila.plain(vision=S2, layer_types=["full_attention"] * 4)
    sample = PooledTwiceSample(1, ("image", 3, 4), 1, ("image", 1, 1), 2, ("image", 9, 1), 3)
    parts = PlainNVILA(model)
    with torch.no_grad():
        actual = model(**tiny.batch(sample, dtype=torch.float32)).logits[0]
    torch.testing.assert_close(actual, parts.logits(sample), atol=5e-6, rtol=1e-5)


def test_the_configuration_of_a_teacher_becomes_that_of_its_student():
    vision = tiny_nvila.vision_config(**tiny_nvila.S2)
    text = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 3}
    text |= {"vocab_size": 64, "rope_theta": 1e6}
    teacher = NVILAConfig(text_config=text, vision_config=vision, image_token_id=65, video_token_id=66)
    config = LinMUConfig.from_teacher(teacher, keep_attention=(1,))
    assert config.text_config.layer_types == ["m_mate", "full_attention", "m_mate"]
    assert config.text_config.rope_parameters == {"rope_type": "default", "rope_theta": 1e6}
    assert config.vision_config.to_dict() == vision.to_dict()
    assert (config.image_token_id, config.video_token_id) == (65, 66)
    assert config.vision_start_token_id is None and config.vision_end_token_id is None
