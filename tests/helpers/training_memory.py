"""A training step on real tensors at a chosen shape, whose memory is counted."""

import copy
from collections import Counter

import torch
from transformers import Qwen2_5_VLConfig

from linmu_hf import LinMUConfig, LinMUForConditionalGeneration
from linmu_hf.distillation.costs.accounting import Account
from linmu_hf.distillation.costs.tracing import prepare_student, with_layers
from linmu_hf.distillation.layerwise.layer_groups import freeze_others
from linmu_hf.distillation.layerwise.offload import LayerOffload, always_there
from linmu_hf.distillation.losses import IGNORE_INDEX
from linmu_hf.distillation.model import DistillationModel
from linmu_hf.distillation.teacher import as_teacher
from linmu_hf.modeling.compat import checkpoint_activations


VIDEO = 990


def teacher_config(layers=4, hidden_size=256, intermediate_size=1024, vocab_size=1000):
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": vocab_size,
            "hidden_size": hidden_size,
            "intermediate_size": intermediate_size,
            "num_hidden_layers": layers,
            "num_attention_heads": hidden_size // 64,
            "num_key_value_heads": hidden_size // 128,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 12, 12]},
            "eos_token_id": 1,
            "bos_token_id": None,
            "pad_token_id": 0,
        },
        vision_config={
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "patch_size": 4,
            "window_size": 16,
            "fullatt_block_indexes": [0],
            "out_hidden_size": hidden_size,
        },
        image_token_id=VIDEO - 1,
        video_token_id=VIDEO,
        vision_start_token_id=VIDEO + 1,
        vision_end_token_id=VIDEO + 2,
    )


def student_config(**sizes):
    return LinMUConfig.from_teacher(teacher_config(**sizes), state_size=64)


def video_batch(tokens, vision, answers):
    """One row: text, then a video of frames of 4 x 4 tokens, answers among the text."""
    text = tokens - vision
    ids = torch.full((1, tokens), 5)
    ids[:, text:] = VIDEO
    labels = torch.full((1, tokens), IGNORE_INDEX)
    labels[:, 1 : 1 + answers] = 5
    grid = torch.tensor([[vision // 16, 8, 8]])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == VIDEO) * 2,
        "pixel_values_videos": torch.zeros(int(grid.prod()), 3 * 2 * 4 * 4),
        "video_grid_thw": grid,
        "labels": labels,
        "pseudo_labels": labels,
    }


def build(config, stage, shared, checkpoints, dtype=torch.float32):
    """Student and teacher of one backbone, as a distillation wraps them."""
    torch.manual_seed(0)
    student = LinMUForConditionalGeneration(copy.deepcopy(config)).to(dtype).eval()
    full = with_layers(config, ["full_attention"] * config.text_config.num_hidden_layers)
    teacher = LinMUForConditionalGeneration(full).to(dtype).eval()
    student.load_state_dict(teacher.state_dict(), strict=False)
    teacher = as_teacher(student, teacher, shared)
    prepare_student(student, stage)
    if checkpoints:
        checkpoint_activations(student)
    return DistillationModel(student, teacher, stage, checkpoints=checkpoints).train()


def measure(config, stage, tokens=1024, vision=640, shared=True, checkpoints=False, dtype=torch.float32):
    """Two steps, states of AdamW included: what was held at the peak, by tag."""
    model = build(config, stage, shared, checkpoints, dtype)
    batch = video_batch(tokens, vision, tokens // 8)
    if not stage.seq:
        batch.pop("pseudo_labels")
    account = Account()
    for tensor in batch.values():
        account.hold(tensor, "inputs")
    for tensor in (*model.parameters(), *model.student.parameters(), *model.buffers(), *model.student.buffers()):
        account.hold(tensor, "weights")
    account.tag_gradients(model.student)
    trained = [parameter for parameter in model.student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    counts = torch.tensor([tokens, tokens // 8, tokens // 8])
    with account:
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                loss, _ = model(dict(batch), counts)
            loss.backward()
            del loss
            with account.tagged("states"):
                optimizer.step()
            optimizer.zero_grad()
    held = max(account.peaks.values(), key=Counter.total)
    return Counter({tag: size for tag, size in held.items() if tag != "inputs"})


def measure_group(config, stage, group, tokens=512, vision=256):
    """A teacher-fed step of some layers, the others being in CPU memory: what it holds at its peak, and multiplies."""
    model = build(config, stage, shared=True, checkpoints=False)
    student, account = model.student, Account()
    freeze_others(student, group)
    batch = video_batch(tokens, vision, tokens // 8)
    batch.pop("pseudo_labels")
    with LayerOffload(student, model.teacher, torch.device("cpu")).active() as offload, offload.training(group):
        mixers = [student.model.language_model.layers[index].mixer for index in group]
        for module in (*always_there(student), *mixers):
            for tensor in (*module.parameters(), *module.buffers()):
                account.hold(tensor, "weights")
        for tensor in (*offload.places, *batch.values()):
            account.hold(tensor, "places")
        account.tag_gradients(student)
        trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, fused=True)
        step = DistillationModel(student, model.teacher, stage, layers=group).train()
        with account:
            for _ in range(2):
                account.flops = account.attention = 0
                loss, _ = step(dict(batch), torch.tensor([tokens, tokens // 8, tokens // 8]))
                loss.backward()
                del loss
                optimizer.step()
                optimizer.zero_grad()
    return account.peak, account.flops + account.attention
