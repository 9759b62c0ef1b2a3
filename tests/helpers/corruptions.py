"""What can be wrong with a call: functions that change some of its arguments and say which an error must name."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from transformers import DynamicCache


@dataclass
class Call:
    """A call under corruption: its arguments, and the names of which an error must name one."""

    model: object
    before: dict
    names: tuple[str, ...] = ()

    def __post_init__(self):
        self.inputs = dict(self.before)

    def refused(self, *names):
        self.names += names

    @property
    def shape(self):
        return self.before["attention_mask"].shape

    @property
    def placeholders(self):
        """Where the call as it was has placeholders, `[b, t]`."""
        return self.model.model.token_types(self.before["input_ids"]) > 0

    def refused_without_types(self):
        """Embeddings of placeholders outside the vocabulary do not say what they are."""
        lost = "input_ids" not in self.inputs and "mm_token_type_ids" not in self.inputs
        if lost and self.kinds() and self.model.config.image_token_id >= self.model.model.n_embeddings:
            self.refused("mm_token_type_ids")

    def kinds(self):
        """Media of the call: (kind, name of its pixels, name of its grid)."""
        every = (("image", "pixel_values", "image_grid_thw"), ("video", "pixel_values_videos", "video_grid_thw"))
        return [one for one in every if one[1] in self.before]

    def derived(self):
        """Positions and layout of the call as it was."""
        return self.model.model.get_positions(**self.before)


CORRUPTIONS = {}  # name -> (arguments it changes, function of the call and a function that draws)


def corruption(*arguments, media=None, generate=False):
    def register(function):
        CORRUPTIONS[function.__name__] = (set(arguments), function, media, generate)
        return function

    return register


@corruption("input_ids", generate=True)
def token_outside_the_vocabulary(call, choose):
    ids = call.inputs["input_ids"] = call.inputs["input_ids"].clone()
    ids[0, choose(st.integers(0, ids.shape[1] - 1))] = choose(st.sampled_from([-1, -100, 64, 65, 2**31]))
    call.refused("input_ids")


@corruption("input_ids", "attention_mask", "mm_token_type_ids", generate=True)
def no_rows(call, choose):
    for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
        call.inputs[name] = call.inputs[name][:0]
    call.refused("input_ids")


@corruption("input_ids", "attention_mask", "mm_token_type_ids")
def no_tokens(call, choose):
    for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
        call.inputs[name] = call.inputs[name][:, :0]
    call.refused("input_ids")


@corruption("input_ids")
def ids_of_another_kind(call, choose):
    ids = call.inputs["input_ids"]
    call.inputs["input_ids"] = choose(
        st.sampled_from([ids.float(), ids.bool(), ids[0], ids[None], ids.tolist(), None])
    )
    call.refused("input_ids")


@corruption("input_ids")
def ids_in_int32(call, choose):
    call.inputs["input_ids"] = call.inputs["input_ids"].int()


@corruption("input_ids", "inputs_embeds")
def ids_and_embeddings(call, choose):
    call.inputs["inputs_embeds"] = call.model.model.embed(call.inputs["input_ids"])
    call.refused("inputs_embeds")


@corruption("input_ids", "inputs_embeds")
def embeddings_in_place_of_ids(call, choose):
    call.inputs["inputs_embeds"] = call.model.model.embed(call.inputs.pop("input_ids")).detach()
    call.refused_without_types()


@corruption("input_ids", "inputs_embeds")
def embeddings_of_another_kind(call, choose):
    embeds = call.model.model.embed(call.inputs.pop("input_ids")).detach()
    wrong = [
        embeds[..., :-1],
        embeds[0],
        embeds.long(),
        embeds.double(),
        embeds.half(),
        embeds[:, :0],
        embeds.tolist(),
    ]
    call.inputs["inputs_embeds"] = choose(st.sampled_from(wrong))
    call.refused("inputs_embeds")


@corruption("attention_mask", generate=True)
def mask_of_another_shape(call, choose):
    mask = call.inputs["attention_mask"]
    wider = torch.cat([mask, torch.ones_like(mask[:, :2])], dim=1)
    wrong = [wider, mask[:, 1:], mask[:, :1], mask.repeat(3, 1), mask[:0], mask[0], mask[None], mask[:, None, None]]
    call.inputs["attention_mask"] = choose(st.sampled_from(wrong))
    call.refused("attention_mask")


@corruption("attention_mask", generate=True)
def mask_with_other_values(call, choose):
    mask = call.inputs["attention_mask"]
    wrong = [mask * 2, mask - 2, (mask - 1.0) * 1e9 - 1, mask / 2, mask * float("nan"), -mask]
    call.inputs["attention_mask"] = choose(st.sampled_from(wrong))
    call.refused("attention_mask")


@corruption("attention_mask")
def mask_in_another_dtype(call, choose):
    dtype = choose(st.sampled_from([torch.bool, torch.int32, torch.uint8, torch.float32, torch.float16]))
    call.inputs["attention_mask"] = call.inputs["attention_mask"].to(dtype)


@corruption("attention_mask", "input_ids", media=("image", "video"), generate=True)
def mask_over_a_placeholder(call, choose):
    mask = call.before["attention_mask"].clone()
    places = (mask.bool() & call.placeholders).nonzero()
    mask[tuple(places[choose(st.integers(0, len(places) - 1))])] = 0
    call.inputs["attention_mask"] = mask
    call.refused("image_grid_thw", "video_grid_thw")


@corruption("input_ids", media=("image", "video"), generate=True)
def media_without_placeholders(call, choose):
    call.inputs["input_ids"] = call.inputs["input_ids"].masked_fill(call.placeholders, 5)
    call.refused("mm_token_type_ids", "image_grid_thw", "video_grid_thw")


@corruption(
    "input_ids",
    "pixel_values",
    "pixel_values_videos",
    "image_grid_thw",
    "video_grid_thw",
    media=("image", "video"),
    generate=True,
)
def placeholders_without_media(call, choose):
    _, pixels, grid = choose(st.sampled_from(call.kinds()))
    del call.inputs[pixels], call.inputs[grid]
    call.refused(grid)


@corruption("image_grid_thw", "video_grid_thw", media=("image", "video"), generate=True)
def another_grid(call, choose):
    _, _, name = choose(st.sampled_from(call.kinds()))
    grid = call.inputs[name].clone()
    entry = choose(st.integers(0, len(grid) - 1)), choose(st.integers(0, 2))
    grid[entry] = choose(st.sampled_from([value for value in (0, -2, 1, 3, 8, 10**6) if value != grid[entry]]))
    call.inputs[name] = grid
    call.refused(name)


@corruption("image_grid_thw", "video_grid_thw", media=("image", "video"), generate=True)
def grids_of_another_kind(call, choose):
    _, _, name = choose(st.sampled_from(call.kinds()))
    grid = call.inputs[name]
    wrong = [
        grid[:, :2],
        grid[0],
        grid.float(),
        grid.tolist(),
        grid[:-1],
        torch.cat([grid, grid[:1]]),
        None,
        grid.flip(1) + 2,
    ]
    call.inputs[name] = choose(st.sampled_from(wrong))
    call.refused(name)


@corruption("image_grid_thw", media=("image",), generate=True)
def grids_in_another_order(call, choose):
    grid = call.inputs["image_grid_thw"]
    sizes = grid.prod(1)
    call.inputs["image_grid_thw"] = grid.flip(0)
    if not torch.equal(sizes, sizes.flip(0)):
        call.refused("image_grid_thw")


@corruption("image_grid_thw", "video_grid_thw", media=("image", "video"))
def grids_in_int32(call, choose):
    _, _, name = choose(st.sampled_from(call.kinds()))
    call.inputs[name] = call.inputs[name].int()


@corruption("pixel_values", "pixel_values_videos", media=("image", "video"), generate=True)
def pixels_of_another_shape(call, choose):
    _, name, _ = choose(st.sampled_from(call.kinds()))
    pixels = call.inputs[name]
    wrong = [
        pixels[:-1],
        pixels[:0],
        torch.cat([pixels, pixels[:2]]),
        pixels[:, :-1],
        pixels[None],
        torch.cat([pixels, pixels], dim=1),
        None,
    ]
    call.inputs[name] = choose(st.sampled_from(wrong))
    call.refused(name)


@corruption("pixel_values", "pixel_values_videos", media=("image", "video"), generate=True)
def pixels_that_are_not_finite(call, choose):
    _, name, _ = choose(st.sampled_from(call.kinds()))
    pixels = call.inputs[name] = call.inputs[name].clone()
    place = choose(st.integers(0, pixels.numel() - 1))
    pixels.view(-1)[place] = choose(st.sampled_from([float("nan"), float("inf"), -float("inf")]))
    call.refused(name)


@corruption("pixel_values", "pixel_values_videos", media=("image", "video"))
def pixels_of_another_type(call, choose):
    _, name, _ = choose(st.sampled_from(call.kinds()))
    call.inputs[name] = choose(st.sampled_from([call.inputs[name].long(), call.inputs[name].tolist()]))
    call.refused(name)


@corruption("pixel_values", "pixel_values_videos", media=("image", "video"))
def pixels_in_float64(call, choose):
    _, name, _ = choose(st.sampled_from(call.kinds()))
    call.inputs[name] = call.inputs[name].double()


@corruption("mm_token_type_ids", generate=True)
def other_token_types(call, choose):
    types = call.inputs["mm_token_type_ids"]
    real = call.before["attention_mask"].bool().nonzero()
    flipped = types.clone()
    place = tuple(real[choose(st.integers(0, len(real) - 1))])
    flipped[place] = choose(st.sampled_from([value for value in (0, 1, 2, 3, -1) if value != types[place]]))
    call.inputs["mm_token_type_ids"] = choose(st.sampled_from([flipped, 2 - types, types + 1]))
    call.refused("mm_token_type_ids", "image_grid_thw", "video_grid_thw")


@corruption("mm_token_type_ids")
def token_types_of_another_kind(call, choose):
    types = call.inputs["mm_token_type_ids"]
    wrong = [types[:, 1:], types[0], types.float(), types.tolist(), types.bool(), types.repeat(3, 1)]
    call.inputs["mm_token_type_ids"] = choose(st.sampled_from(wrong))
    call.refused("mm_token_type_ids")


@corruption("mm_token_type_ids", generate=True)
def no_token_types(call, choose):
    del call.inputs["mm_token_type_ids"]
    call.refused_without_types()


@corruption("second_per_grid_ts", media=("video",), generate=True)
def other_seconds(call, choose):
    given = call.inputs["second_per_grid_ts"]
    wrong = [
        [],
        [*given, 1.0],
        [-1.0] * len(given),
        [float("nan")] * len(given),
        ["1"] * len(given),
        1.0,
        [None] * len(given),
    ]
    call.inputs["second_per_grid_ts"] = choose(st.sampled_from(wrong))
    call.refused("second_per_grid_ts")


@corruption("second_per_grid_ts", media=("video",), generate=True)
def no_seconds_or_a_tensor_of_them(call, choose):
    given = call.inputs.pop("second_per_grid_ts")
    if choose(st.booleans()):
        call.inputs["second_per_grid_ts"] = torch.tensor(given)


@corruption("position_ids")
def other_positions(call, choose):
    positions, _ = call.derived()
    wrong = [
        positions[..., 1:], positions[:2], positions[:, :0], positions.float(), positions.tolist(), positions[0, 0],
        positions.repeat(1, 3, 1), positions[None],
    ]  # fmt: skip
    call.inputs["position_ids"] = choose(st.sampled_from(wrong))
    call.refused("position_ids")


@corruption("position_ids", "mm_token_type_ids")  # which is not read beside positions
def positions_as_derived(call, choose):
    call.inputs["position_ids"] = call.derived()[0]


# Besides these two, nothing is read by which positions are found.
@corruption(
    "position_ids", "vision_layout", "mm_token_type_ids", "input_ids", "attention_mask", "second_per_grid_ts",
    media=("image", "video"),
)  # fmt: skip
def layout_as_derived(call, choose):
    call.inputs["position_ids"], call.inputs["vision_layout"] = call.derived()


@corruption(
    "position_ids", "vision_layout", "mm_token_type_ids", "input_ids", "attention_mask", media=("image", "video")
)
def another_layout(call, choose):
    call.inputs["position_ids"], layout = call.derived()
    vision, text = (layout[..., 0] >= 0).nonzero(), (layout[..., 0] < 0).nonzero()
    place = tuple(vision[choose(st.integers(0, len(vision) - 1))])
    moved, marked, dropped, doubled = (layout.clone() for _ in range(4))
    moved[place] += torch.tensor([0, *(choose(st.permutations([1, 0, 0])))])
    marked[tuple(text[choose(st.integers(0, len(text) - 1))])] = 0
    dropped[place] = -1
    doubled[tuple(vision[0])] = layout[tuple(vision[1])]
    wrong = [
        moved, marked, dropped, doubled, layout[..., :3], layout[:, 1:], layout.float(), layout.tolist(),
        torch.full_like(layout, -1), layout.abs(),
    ]  # fmt: skip
    call.inputs["vision_layout"] = choose(st.sampled_from(wrong))
    call.refused("vision_layout")


@corruption("labels", "logits_to_keep")
def other_labels(call, choose):
    labels = torch.ones(call.shape, dtype=torch.long)
    wrong = [
        labels[:, 1:], labels[0], labels[:0], labels.float(), labels * 64, labels * -1, labels * -101,
        labels[..., None], labels.tolist(),
    ]  # fmt: skip
    call.inputs["labels"] = choose(st.sampled_from(wrong))
    call.refused("labels")


@corruption("labels", "logits_to_keep")
def labels_without_their_logits(call, choose):
    call.inputs |= {"labels": torch.ones(call.shape, dtype=torch.long), "logits_to_keep": 2}
    call.refused("labels")


@corruption("labels", "logits_to_keep")
def good_labels(call, choose):
    call.inputs["labels"] = torch.ones(call.shape, dtype=torch.long).index_fill(1, torch.tensor([1]), -100)


@corruption("labels", "logits_to_keep")
def other_choice_of_logits(call, choose):
    wrong = [
        -1,
        1.5,
        "2",
        True,
        torch.tensor([10**4]),
        torch.tensor([-(10**4)]),
        torch.tensor([0.5]),
        torch.tensor([[0]]),
        [0],
    ]
    call.inputs["logits_to_keep"] = choose(st.sampled_from(wrong))
    call.refused("logits_to_keep")


@corruption("labels", "logits_to_keep")
def all_logits_by_number_or_index(call, choose):
    t = call.shape[1]
    call.inputs["logits_to_keep"] = choose(st.sampled_from([0, t, 10**6, torch.arange(t), torch.arange(t) - t]))


@corruption("past_key_values")
def no_cache_or_an_empty_one(call, choose):
    if choose(st.booleans()):
        call.inputs["use_cache"] = False
    else:
        call.inputs["past_key_values"] = DynamicCache(config=call.model.config.text_config)


@corruption("past_key_values", "attention_mask", "input_ids", "position_ids")
def another_cache(call, choose):
    if choose(st.booleans()):
        call.inputs["past_key_values"] = choose(st.sampled_from([(), [], ((None, None),) * 2, "dynamic"]))
    else:
        b = call.shape[0] + 1
        held = call.model(input_ids=torch.ones(b, 2, dtype=torch.long)).past_key_values
        call.inputs["past_key_values"] = held
    call.refused("past_key_values")
