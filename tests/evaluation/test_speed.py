"""What the benchmark measures and how it adds it up; never how fast this machine is."""

import itertools
import json
from dataclasses import replace

import pytest
import torch
from evaluation_fixtures import SMALL

from linmu_hf.commands import bench as benchmark_cli
from linmu_hf.evaluation.speed.measure import (
    Clock,
    Variant,
    cache_bytes,
    growth_exponent,
    in_turns,
    largest_batch,
    measure,
    summarise,
)
from linmu_hf.evaluation.speed.models import (
    PRESETS,
    TINY_VISION,
    BenchmarkDecoder,
    FlexMAOnly,
    LocalSwinOnly,
    ablated,
    prompt_layout,
    text_config,
    vision_config,
    vision_encoder,
)
from linmu_hf.families.family import Preset
from linmu_hf.modeling.layout.token_layout import TokenLayout
from linmu_hf.ops.backends import use_kernels
from linmu_hf.ops.ssd import scan as ssd
from linmu_hf.ops.ssd.plain import ssd_recurrence
from linmu_hf.testbed.check_teacher import TEACHERS


@pytest.fixture(autouse=True)
def small_preset(monkeypatch):
    monkeypatch.setitem(PRESETS, "small", ("qwen2_5_vl_vision", Preset(SMALL, TINY_VISION)))


@pytest.fixture
def decoder():
    torch.manual_seed(0)
    return BenchmarkDecoder(text_config("small"))


def embeddings(decoder, tokens):
    return torch.randn(1, tokens, decoder.text.config.hidden_size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("media", ["video", "image"])
@pytest.mark.parametrize("tokens", [1, 40, 255, 256, 300, 1000, 4096])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.95, 1.0])
def test_prompts_have_the_tokens_that_were_asked_for(media, tokens, share):
    layout = prompt_layout(tokens, share, (4, 8), media)
    if layout is None:
        assert int(tokens * share) == 0
        return
    assert layout.shape == (1, tokens, 4)
    vision = layout[0][layout[0, :, 0] >= 0]
    assert 0 < len(vision) <= tokens * share
    # no more is left out than a frame, or the text between images
    images = int(vision[:, 0].max()) + 1
    assert len(vision) > tokens * share - 32 - (images if media == "image" else 0)
    # every span is a whole grid, each cell once
    for span in range(images):
        cells = vision[vision[:, 0] == span, 1:]
        assert len({tuple(cell) for cell in cells.tolist()}) == len(cells) == (cells.amax(0) + 1).prod()
    assert images == 1 if media == "video" else (vision[:, 1] == 0).all()


def test_the_clock_watches_the_device_that_it_is_given(monkeypatch):
    """With several GPUs the current one is another: it would have nothing to wait for, and hold no memory."""
    watched = []
    for name in ("synchronize", "reset_peak_memory_stats", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda device=None: watched.append(device) or 5)
    assert Clock("cuda:1")(lambda: "done")[1:] == (5, "done")
    assert watched == [torch.device("cuda:1")] * 4


def test_images_have_text_between_them():
    spans = prompt_layout(200, 1.0, (4, 8), "image")[0, :, 0].tolist()
    assert all(b in (-1, a) or a == -1 for a, b in itertools.pairwise(spans))


def test_spans_of_a_video_are_as_long_as_allowed():
    spans = prompt_layout(1000, 0.9, (4, 4), "video", span_tokens=100)[0, :, 0]
    assert spans[spans >= 0].bincount().tolist() == [96] * 9 + [32]


@pytest.mark.parametrize("preset", ["qwen2.5-vl-7b", "nvila-8b", "nvila-8b-video", "tiny", "tiny-wide"])
def test_presets_have_the_shapes_of_their_models(preset):
    config = text_config(preset)
    assert config.layer_types == ["m_mate"] * config.num_hidden_layers
    sizes = (config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads)
    big = (3584, 28, 28, 4)
    assert sizes == {"tiny": (128, 4, 4, 2), "tiny-wide": (512, 8, 8, 2)}.get(preset, big)
    if preset.startswith("nvila"):
        assert "mrope_section" not in config.rope_parameters
    else:
        assert 2 * sum(config.rope_parameters["mrope_section"]) == config.head_dim


def test_nvilas_presets_have_its_vision_side():
    image, video = vision_config("nvila-8b"), vision_config("nvila-8b-video")
    assert (image.mm_hidden_size, image.tile_tokens, image.out_hidden_size) == (3456, 16, 3584)
    assert (video.mm_hidden_size, video.tile_tokens, video.pool_sizes) == (1152, 16, [[8, 1, 1]])
    assert vision_config("tiny").model_type == "qwen2_5_vl_vision"


@pytest.mark.parametrize(
    "preset, media, size, frames", [("nvila-8b", "image", 3072, 10), ("nvila-8b-video", "video", 256, 121)]
)
def test_nvilas_prompts(preset, media, size, frames):
    """Whole images in S2 blocks, or frames of one tile, and a line break after each."""
    arguments = benchmark_cli.parse_arguments(["--model", preset, "--device", "cpu"])
    assert (arguments.media, arguments.grid[0] * arguments.grid[1]) == (media, size)
    layout = prompt_layout(32768, 0.95, arguments.grid, arguments.media, separators=True)[0]
    places = (layout[:, 0] >= 0).nonzero().flatten().view(frames, size)
    assert (places[:, -1] - places[:, 0] == size - 1).all() and (places[1:, 0] > places[:-1, -1] + 1).all()
    assert places[-1, -1] < 32767
    if media == "video":
        assert (places.diff(dim=0) == size + 1).all()  # one line break, and nothing else, between two frames
        assert layout[places[:, 0], 1].tolist() == list(range(frames)) and set(
            layout[places].flatten(0, 1)[:, 0].tolist()
        ) == {0}


def test_separators_need_room():
    assert prompt_layout(64, 1.0, (8, 8), separators=True) is None
    assert (prompt_layout(65, 1.0, (8, 8), separators=True)[0, :, 0] >= 0).tolist() == [True] * 64 + [False]


SMALL_TOWER = {
    "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 1, "image_size": 8,
    "patch_size": 2,
}  # fmt: skip


@pytest.mark.parametrize("media", ["image", "video"])
def test_nvilas_encoder_is_given_the_tiles_of_the_prompt(media, monkeypatch):
    scales = {"image_aspect_ratio": "dynamic_s2", "s2_scales": [8, 16, 24]}
    pools = {"image_aspect_ratio": "resize", "video_encoder": "tsp", "pool_sizes": [[4, 1, 1]]}
    vision = {**(scales if media == "image" else pools), "tower_config": SMALL_TOWER}
    monkeypatch.setitem(PRESETS, "small", ("nvila_vision", Preset(SMALL, vision)))
    grid = (6, 8) if media == "image" else (2, 2)
    layout = prompt_layout(200, 0.8, grid, media, separators=True)
    encode = vision_encoder("small", layout, media, torch.float32, "cpu")
    tiles = 3 * (1 + 4 + 12) if media == "image" else 4 * 40
    assert encode.args[1].shape == (tiles, 3, 8, 8)
    with torch.no_grad():
        tokens = torch.cat(encode().pooler_output)
    assert tokens.shape == ((layout[..., 0] >= 0).sum(), 32)
    with pytest.raises(ValueError, match=r"has the entry \[\d+, 3, 3\]"):
        vision_encoder("small", prompt_layout(30, 0.9, (3, 3), media), media, torch.float32, "cpu")


def test_a_teacher_folder_is_a_model(teacher_folder):
    config = text_config(str(teacher_folder))
    assert config.hidden_size > 0 and set(config.layer_types) == {"m_mate"}


def test_the_decoder_is_the_text_model(decoder):
    """Prefill and steps give what the model gives for all tokens at once."""
    ids = torch.randint(0, 64, (1, 12))
    embeds = decoder.text.embed_tokens(ids)
    logits, cache = decoder.prefill(embeds, None)
    following = [logits.argmax(-1)]
    for _ in range(3):
        following.append(decoder.step(following[-1], cache))
    for _ in range(4):
        ids = torch.cat([ids, decoder.head(decoder.text(input_ids=ids).last_hidden_state[:, -1:]).argmax(-1)], 1)
    assert ids[0, 12:].tolist() == torch.cat(following, 1)[0].tolist()


def test_chunks_change_nothing(decoder):
    layout = prompt_layout(300, 0.8, (4, 4), "video", span_tokens=64)
    whole, _ = decoder.prefill(embeddings(decoder, 300), layout)
    chunked, _ = decoder.prefill(embeddings(decoder, 300), layout, chunk_size=64)
    torch.testing.assert_close(chunked, whole, atol=1e-4, rtol=1e-4)


def test_the_teacher_attends_and_shares_the_rest(decoder):
    arguments = benchmark_cli.parse_arguments(["--model", "small", "--device", "cpu"])
    variants = benchmark_cli.build_variants(arguments, text_config("small"))
    student, teacher = variants["student"].decoder, variants["teacher"].decoder
    assert list(variants) == ["student", "teacher"]
    assert all(not layer.recurrent for layer in teacher.text.layers)
    assert teacher.text.layers[1].mlp is student.text.layers[1].mlp
    logits, cache = teacher.prefill(embeddings(teacher, 20), None)
    assert logits.isfinite().all()
    per_token = 2 * 2 * 2 * 8 * 4  # layers, keys and values, heads, head_dim, bytes
    assert cache_bytes(cache) == 20 * per_token
    assert cache_bytes(student.prefill(embeddings(student, 20), None)[1]) == cache_bytes(
        student.prefill(embeddings(student, 40), None)[1]
    )


def spread(decoder, changed: int, layout):
    """Which of the outputs move when one token of the prompt changes."""
    embeds = embeddings(decoder, layout.shape[1])
    other = embeds.clone()
    other[:, changed] += 1
    outputs = [decoder.text(inputs_embeds=e, vision_layout=layout).last_hidden_state for e in (embeds, other)]
    return (outputs[0] - outputs[1]).abs().amax(-1)[0] > 1e-7


def test_branches_are_really_off(decoder):
    layout = prompt_layout(80, 0.85, (8, 8), "image")  # 8 text, 64 vision, 8 text
    decoder.text.config.image_window_size[:] = [1, 4, 4]
    first_vision, last_text = 8, 79
    assert spread(decoder, 2, layout)[last_text]
    swin = ablated(decoder, LocalSwinOnly)  # text in all that follows, a vision token in the windows around it
    assert spread(swin, 2, layout).nonzero().flatten().tolist() == list(range(2, 80))
    assert (
        16 <= spread(swin, first_vision, layout)[8:72].sum() < 64 and not spread(swin, first_vision, layout)[72:].any()
    )
    flex = ablated(decoder, FlexMAOnly)
    for layer in flex.text.layers:
        layer.mixer.block.local_swin = None
    assert spread(flex, first_vision, layout).sum() >= 64 + 8
    assert {id(p) for p in swin.parameters()} == {id(p) for p in decoder.parameters()}
    assert spread(decoder, 2, layout)[last_text]  # whose blocks are whole still


def test_without_flex_ma_nothing_is_scanned_and_text_alone_is_cached(decoder, monkeypatch):
    from linmu_hf.modeling.mixers import flex_ma

    def fail(*args, **kwargs):
        raise AssertionError("scanned")

    for scan in ("ssd", "ssd_pair", "ssd_step"):
        monkeypatch.setattr(flex_ma, scan, fail)
    decoder = ablated(decoder, LocalSwinOnly)
    _, cache = decoder.prefill(embeddings(decoder, 80), prompt_layout(80, 0.8, (8, 8)))
    decoder.step(torch.zeros(1, 1, dtype=torch.long), cache)
    assert {name for layer in cache.layers for name in layer.slots} == {"keys", "values"}
    assert not any(layer.has_previous_state[0] for layer in cache.layers)


def test_without_local_swin_is_flex_ma_with_the_fusion_left_out(decoder):
    """The block is then the output projection of its scan, put back into the order of the tokens."""
    block, layout = decoder.text.layers[0].mixer, prompt_layout(80, 0.8, (8, 8))
    built = TokenLayout.build(decoder.text.config, 1, 80, "cpu", None, layout)
    hidden = embeddings(decoder, 80)
    rope = decoder.text.rotary_emb(hidden, torch.arange(80).expand(3, 1, -1))
    flex, _ = block.branches(hidden, rope, replace(built, vision=None, near=None))
    order = built.orders[block.config.scan_order(0)]
    y = FlexMAOnly(block)(hidden, rope, built)
    torch.testing.assert_close(y[0, order], block.flex_ma.o_proj(flex))


def test_named_backends_are_the_ones_that_run(decoder, monkeypatch):
    embeds, taken = embeddings(decoder, 20), []
    monkeypatch.setitem(ssd.PLAIN, "recurrence", lambda *args: taken.append(1) or ssd_recurrence(*args))
    expected, _ = decoder.prefill(embeds, None)
    with use_kernels(ssd="recurrence"):
        assert not taken
        actual, _ = decoder.prefill(embeds, None)
    assert len(taken) == 2
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("exponent", [0.0, 1.0, 1.7, 2.0])
def test_growth_exponents_of_known_curves(exponent):
    lengths = [1000, 2000, 8000, 64000]
    assert growth_exponent(lengths, [3e-6 * n**exponent for n in lengths]) == pytest.approx(exponent, abs=1e-9)


def test_one_point_has_no_slope():
    assert growth_exponent([1024], [1.0]) is None
    assert growth_exponent([], []) is None


@pytest.mark.parametrize("most", [0, 1, 2, 3, 17, 100, 1000, 70000])
def test_the_largest_batch_is_found(most):
    tried = []
    found = largest_batch(lambda batch: tried.append(batch) or batch <= most, limit=4096)
    expected = min(most, 4096)
    assert found <= expected and found >= expected * 15 / 16 - 1
    assert max(tried) <= 4096 and len(tried) < 30


def test_a_variant_that_runs_out_of_memory_leaves_the_others_alone(decoder):
    variants = {"a": Variant(decoder), "b": Variant(decoder)}
    calls = []

    def call(name):
        calls.append(name)
        if name == "b" and calls.count("b") == 2:
            raise torch.OutOfMemoryError("no")
        return (len(calls),)

    results = in_turns(variants, call, 3)
    assert calls == ["a", "b", "a", "b", "a"]
    assert len(results["a"]) == 3 and results["b"] == []
    assert variants["b"].failure == "out of memory" and variants["a"].failure is None
    with pytest.raises(RuntimeError, match="a fault"):
        variants["a"].run(lambda: (_ for _ in ()).throw(RuntimeError("a fault")))


def test_the_fastest_of_the_measurements_counts(decoder, monkeypatch):
    now = iter([0, 5, 0, 2, 0, 9, *[0, 16, 0, 4, 0, 8]])
    monkeypatch.setattr(Clock, "_peak", lambda self: 7)
    monkeypatch.setattr("linmu_hf.evaluation.speed.measure.time.perf_counter", lambda: next(now))
    monkeypatch.setattr("linmu_hf.evaluation.speed.measure.time.process_time", lambda: next(now))
    variants = {"student": Variant(decoder)}
    [row] = measure(variants, [30], layout_of=lambda n: None, batches=[2], steps=4, repeats=3, report=lambda _: None)
    assert (row["ttft_s"], row["peak_bytes"], row["decode"]["2"]) == (2, 7, {"step_s": 1, "tokens_per_s": 2})
    assert row["cache_bytes"] > 0


def test_speedups_are_teacher_over_student():
    def row(model, tokens, ttft, step):
        return {
            "model": model,
            "tokens": tokens,
            "ttft_s": ttft,
            "decode": {"1": {"step_s": step, "tokens_per_s": 1 / step}},
        }

    rows = [row("student", 100, 1.0, 0.5), row("teacher", 100, 4.0, 1.0), row("student", 200, 2.0, 0.5)]
    rows.append({"model": "teacher", "tokens": 200, "error": "out of memory"})
    summary = summarise(rows)
    assert summary["speedups"] == [{"model": "student", "tokens": 100, "ttft": 4.0, "throughput": {"1": 2.0}}]
    assert summary["growth_exponents"]["student"] == pytest.approx({"ttft": 1.0, "decode": 0.0})
    assert summary["growth_exponents"]["teacher"] == {"ttft": None, "decode": None}


def test_the_fastest_teacher_counts():
    def row(model, ttft, step):
        return {"model": model, "tokens": 8, "ttft_s": ttft, "decode": {"1": {"tokens_per_s": 1 / step}}}

    rows = [row("student", 1.0, 1.0), row("teacher", 6.0, 2.0), row("teacher, cudnn", 3.0, 4.0)]
    assert summarise(rows)["speedups"] == [{"model": "student", "tokens": 8, "ttft": 3.0, "throughput": {"1": 2.0}}]


def test_teachers_by_named_attention(tmp_path):
    file = tmp_path / "bench.json"
    arguments = ["--model", "small", "--lengths", "20", "--device", "cpu", "--repeats", "1", "--steps", "1"]
    benchmark_cli.main([*arguments, "--teacher_backends", "math", "cudnn", "--json", str(file)])
    rows = {row["model"]: row for row in json.loads(file.read_text())["rows"]}
    assert list(rows) == ["student", "teacher", "teacher, math", "teacher, cudnn"]
    assert rows["teacher, math"]["ttft_s"] > 0 and rows["teacher, math"]["decode"]["1"]["step_s"] > 0
    assert rows["teacher, cudnn"]["error"].startswith("RuntimeError: No ")  # available kernel, or viable backend


def test_one_run_end_to_end(tmp_path, capsys):
    file, picture = tmp_path / "new" / "bench.json", tmp_path / "new" / "bench.png"
    arguments = ["--model", "small", "--lengths", "80", "40", "--grid", "4x4", "--device", "cpu", "--repeats", "1"]
    arguments += ["--steps", "2", "--batch_sizes", "1", "3", "--ablate", "--vision_encoder"]
    arguments += ["--backends", "recurrence", "--teacher_max_tokens", "40", "--prefill_chunk", "32"]
    benchmark_cli.main([*arguments, "--json", str(file), "--png", str(picture)])
    results = json.loads(file.read_text())
    assert set(results) == {"setting", "machine", "versions", "rows", "growth_exponents", "speedups"}
    names = ["student", "teacher", "student, recurrence", "student without Local-Swin", "student without Flex-MA"]
    assert [(row["model"], row["tokens"]) for row in results["rows"]] == [
        (name, tokens) for tokens in (40, 80) for name in names if (name, tokens) != ("teacher", 80)
    ]
    for row in results["rows"]:
        assert row["ttft_s"] > 0 and row["vision_encoder_s"] > 0 and row["peak_bytes"] > 0
        assert row["vision_tokens"] == {40: 32, 80: 64}[row["tokens"]]
        assert set(row["decode"]) == {"1", "3"} and all(entry["step_s"] > 0 for entry in row["decode"].values())
    assert results["machine"]["cores"] and results["versions"]["torch"]
    assert results["setting"]["text_config"]["hidden_size"] == 32
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert not list(file.parent.glob(".*"))
    assert "student against teacher, 40 tokens" in capsys.readouterr().out


def test_an_interrupted_run_leaves_the_lengths_it_finished(tmp_path, monkeypatch):
    def interrupted(variants, lengths, **options):
        if lengths == [20]:
            raise KeyboardInterrupt
        return measure(variants, lengths, **options)

    monkeypatch.setattr(benchmark_cli, "measure", interrupted)
    file = tmp_path / "bench.json"
    arguments = ["--model", "small", "--lengths", "10", "20", "--device", "cpu", "--repeats", "1", "--steps", "1"]
    assert benchmark_cli.main([*arguments, "--json", str(file)]) == 130
    assert {row["tokens"] for row in json.loads(file.read_text())["rows"]} == {10}


BAD = {
    "--lengths 0": "--lengths 0 must be at least 1",
    "--batch_sizes 0": "--batch_sizes 0 must be at least 1",
    "--repeats 0": "--repeats 0 must be at least 1",
    "--grid 16": "--grid 16 must be height x width",
    "--grid 0x4": "--grid 0x4 must be height x width",
    "--vision_share 1.5": "--vision_share 1.5 must be between 0 and 1",
    "--device tpu9x": "--device tpu9x is unknown",
    "--device cuda": "needs a CUDA GPU",
    "--device cpu --largest_batch": "--largest_batch needs a GPU",
    "--json .": "is a folder",
    "--json /proc/a.json": "--json /proc/a.json cannot be written",
    "--png new/a.foo": "--png new/a.foo must end in .png",
    "--json new/a.json --no_teacher --teacher_max_tokens 2048": "--teacher_max_tokens has no effect with --no_teacher",
    "--no_teacher --teacher_backends math": "--teacher_backends has no effect with --no_teacher",
    "--no_teacher --teacher_max_tokens 2048": "--teacher_max_tokens has no effect with --no_teacher",
    "--lengths 8 --teacher_max_tokens 5": "--teacher_max_tokens 5 leaves the teacher out at every length",
    "--model nowhere": "nowhere is neither a file, a folder nor one of the presets",
    "--device cpu --backends abacus --lengths 8": "abacus",
}


@pytest.mark.parametrize("arguments", BAD)
def test_bad_arguments_give_one_clear_error(arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if arguments == "--device cuda" and torch.cuda.is_available():
        arguments = "--device cuda --lengths 0"
        BAD[arguments] = BAD["--lengths 0"]
    try:
        code = benchmark_cli.main(arguments.split())
    except SystemExit as stopped:  # argparse's own way
        code = stopped.code
    text = capsys.readouterr().err.splitlines()[-1]
    assert code == 2 and text.startswith("linmu-bench: error: ") and BAD[arguments] in text
    assert not list(tmp_path.iterdir())


def test_other_models_are_refused(text_only_folder, capsys):
    for folder, message in ((text_only_folder, "a 'qwen2' model: give a"), (TEACHERS["nvila"], "NVILA as it was pub")):
        assert benchmark_cli.main(["--model", str(folder)]) == 2
        assert message in capsys.readouterr().err
