"""The tiny models and batches on which Transformers' mixins are run."""

import tiny
import torch

from linmu_hf import (
    LinMUConfig,
    LinMUForConditionalGeneration,
    LinMUModel,
    LinMUTextConfig,
    LinMUTextModel,
    NVILAVisionConfig,
)


PAD, BOS, EOS = 0, 1, 2
# The mixins draw text below 5 and cut high ids off, so placeholders are low ids, and text begins after them.
IMAGE, VIDEO, START, END, FIRST_WORD = 5, 6, 7, 8, 9
VOCABULARY = 99


class TextTester:
    """Makes [`LinMUTextModel`] and batches of text, under the attribute names that the mixins look up."""

    base_model_class = LinMUTextModel
    causal_lm_class = None
    is_training = False
    batch_size, seq_length = 3, 11
    hidden_size, num_hidden_layers, num_attention_heads, num_key_value_heads = 32, 2, 4, 2
    vocab_size = VOCABULARY

    def __init__(self, parent, layer_types=("m_mate", "m_mate")):
        self.parent, self.layer_types = parent, list(layer_types)

    def get_config(self):
        return LinMUTextConfig(
            vocab_size=VOCABULARY,
            hidden_size=self.hidden_size,
            intermediate_size=48,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads,
            max_position_embeddings=512,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
            timescale_range=[2.0, 200.0],
            window_size=[2, 2, 2],
            image_window_size=[1, 2, 2],
            layer_types=self.layer_types,
            pad_token_id=PAD,
            bos_token_id=BOS,
            eos_token_id=EOS,
        )

    def prepare_config_and_inputs_for_common(self):
        ids = torch.randint(FIRST_WORD, VOCABULARY, (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class VisionTextTester(TextTester):
    """Makes [`LinMUForConditionalGeneration`] and batches with one image a row."""

    base_model_class = LinMUModel
    conditional_generation_class = LinMUForConditionalGeneration
    is_training = True
    image_tokens = 6
    seq_length = image_tokens + 7
    grid = (1, 4, 6)  # patches of every image; 2 x 2 of them are merged into one token
    pixels = (1 * 4 * 6, 3 * 2 * 2 * 2)  # patches; channels, frames, height and width of one

    def get_config(self):
        return LinMUConfig(
            text_config=super().get_config(),
            vision_config=tiny.vision_config(depth=2, hidden_size=32, out_hidden_size=self.hidden_size),
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            vision_start_token_id=START,
            vision_end_token_id=END,
        )

    def prepare_config_and_inputs_for_common(self):
        config, inputs = self.get_config(), super().prepare_config_and_inputs_for_common()[1]
        ids = inputs["input_ids"]
        ids[:, 2], ids[:, 3 : 3 + self.image_tokens], ids[:, 3 + self.image_tokens] = START, IMAGE, END
        return config, self.with_images(inputs)

    def with_images(self, inputs):
        """The batch with an image for every row that has placeholders."""
        places = inputs["input_ids"] == IMAGE
        images = int(places.any(1).sum())
        return inputs | {
            "pixel_values": torch.rand(images * self.pixels[0], *self.pixels[1:]),
            "image_grid_thw": torch.tensor([self.grid] * images),
            "mm_token_type_ids": places.int(),
        }


class NVILATester(VisionTextTester):
    """The same with NVILA's vision side; an image is one tile, of which the mixins can also make a video."""

    image_tokens = 4
    seq_length = image_tokens + 7
    grid = (1, 2, 2)  # tokens
    pixels = (1, 3, 8, 8)  # tiles, channels, height, width

    def get_config(self):
        tower = {
            "hidden_size": 32,
            "intermediate_size": 24,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": 8,
            "patch_size": 2,
        }
        return LinMUConfig(
            text_config=TextTester.get_config(self),
            vision_config=NVILAVisionConfig(
                tower_config=tower,
                image_aspect_ratio="dynamic_s2",
                s2_scales=[8, 16],
                out_hidden_size=self.hidden_size,
            ),
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            vision_start_token_id=None,
            vision_end_token_id=None,
        )
