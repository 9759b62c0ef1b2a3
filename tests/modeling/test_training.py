"""Gradients: checkpointing, mixed precision, mixer states, and the start of the new parameters."""

import pytest
import tiny
import torch

from linmu_hf.modeling.mixers.m_mate import MMate


SAMPLES = tiny.Sample(3, ("image", 3, 5), 2, ("video", 3, 3, 2), 2), tiny.Sample(4)
OPTIONS = {"default": {}, "hybrid": {"layer_types": ["m_mate", "full_attention", "m_mate", "m_mate"]}}

both = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def losses(model, inputs):
    """A loss on the logits and one on the mixer states, as distillation has them."""
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    outputs = model(**inputs, labels=labels, output_mixer_states=True)
    real = inputs["attention_mask"].bool()
    hidden = sum(states[real].square().mean() for states in (*outputs.mixer_outputs, *outputs.mixer_inputs))
    return outputs.loss, hidden


def gradients(model, loss):
    grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return {name: grad for (name, _), grad in zip(model.named_parameters(), grads)}


@both
@pytest.mark.parametrize("which", [0, 1], ids=["loss of tokens", "loss of mixer states"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
def test_checkpointing_gives_the_same_gradients(reentrant, which, options):
    inputs, results = tiny.batch(*SAMPLES), []
    for checkpointing in (False, True):
        model = tiny.model(**options).train()
        if checkpointing:
            tiny.checkpoint(model, use_reentrant=reentrant)
            assert model.model.language_model.gradient_checkpointing
        losses(model, inputs)[which].backward()
        results.append({name: parameter.grad for name, parameter in model.named_parameters()})
    plain, saved = results
    for name, grad in plain.items():
        if grad is None:  # the last MLP has no part in the mixer states
            assert saved[name] is None or not saved[name].any(), name
            continue
        torch.testing.assert_close(saved[name], grad, atol=1e-9, rtol=1e-9, msg=name)
    mixers = [name for name in plain if ".mixer." in name]
    assert all(saved[name] is not None and saved[name].any() for name in mixers)


@both
def test_mixer_states_are_what_the_layers_see(options):
    model, inputs = tiny.model(**options), tiny.batch(*SAMPLES)
    layers = model.model.language_model.layers
    seen = []
    for layer in layers:
        layer.mixer.register_forward_hook(
            lambda module, args, kwargs, output: seen.append((args or tuple(kwargs.values()))[0]), with_kwargs=True
        )
    outputs = model(**inputs, output_mixer_states=True, output_hidden_states=True)
    assert len(outputs.mixer_inputs) == len(outputs.mixer_outputs) == len(layers) == len(outputs.hidden_states) - 1
    real = inputs["attention_mask"].bool()
    for i, layer in enumerate(layers):
        assert torch.equal(outputs.mixer_inputs[i], seen[i])
        middle = outputs.hidden_states[i] + outputs.mixer_outputs[i]
        if i + 1 < len(layers):
            expected = middle + layer.mlp(layer.post_attention_layernorm(middle))
            torch.testing.assert_close(outputs.hidden_states[i + 1][real], expected[real])


@both
def test_run_mixers_with_a_models_own_inputs_gives_its_outputs(options):
    model, inputs = tiny.model(**options), tiny.batch(*SAMPLES)
    where = {name: value for name, value in inputs.items() if "pixel" not in name}
    positions, layout = model.model.get_positions(**where)
    outputs = model(**inputs, output_mixer_states=True)
    given = tuple(state.detach().requires_grad_() for state in outputs.mixer_inputs)
    mixed = model.model.language_model.run_mixers(
        given, attention_mask=inputs["attention_mask"], vision_layout=layout, position_ids=positions
    )
    real = inputs["attention_mask"].bool()
    for i, kind in enumerate(model.config.text_config.layer_types):
        if kind == "full_attention":
            assert mixed[i] is None
            continue
        torch.testing.assert_close(mixed[i][real], outputs.mixer_outputs[i][real])
        others = torch.autograd.grad(mixed[i].sum(), given, retain_graph=True, allow_unused=True)
        assert [grad is not None for grad in others] == [j == i for j in range(len(given))]


@both
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_autocast_trains(checkpointing, options):
    """`bf16=True` of a Trainer: parameters in float32, matrix products in bfloat16."""
    inputs = tiny.batch(*SAMPLES, dtype=torch.float32)
    model = tiny.plain(**options).train()
    reference = gradients(model, losses(model, inputs)[0])
    if checkpointing:
        tiny.checkpoint(model, use_reentrant=False)
    with torch.autocast("cpu", torch.bfloat16):
        loss, hidden = losses(model, inputs)
    (loss + 0 * hidden).backward()
    for name, parameter in model.named_parameters():
        grad, right = parameter.grad.flatten(), reference[name].flatten()
        assert grad.dtype == torch.float32 and grad.isfinite().all()
        if "language_model.layers" in name and right.numel() > 4:
            assert torch.cosine_similarity(grad, right, dim=0) > 0.9, name


@torch.no_grad()
@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_close(dtype, options):
    model = tiny.plain(**options)
    expected = model(**tiny.batch(*SAMPLES, dtype=torch.float32)).logits
    actual = model.to(dtype)(**tiny.batch(*SAMPLES, dtype=dtype)).logits.float()
    real = tiny.batch(*SAMPLES)["attention_mask"].bool()
    error = (actual - expected)[real].norm() / expected[real].norm()
    assert error < (0.05 if dtype == torch.bfloat16 else 0.01)


@pytest.mark.parametrize("options", [{}, {"timescale_init": "mamba2", "output_norm": "layer_norm"}], ids=str)
def test_new_parameters_start_the_same_and_leave_the_teachers_alone(options):
    """Parameters that conversion copies may be on meta; all others are set, in place and without chance."""
    starts = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        with torch.device("meta"):
            mixer = MMate(tiny.text_config(**options), 1)
        copied = [name for name, _ in mixer.named_parameters() if is_copied(name)]
        for name, parameter in list(mixer.named_parameters()):
            if name not in copied:
                owner = mixer.get_submodule(name.rpartition(".")[0])
                noise = torch.nn.Parameter(torch.full(parameter.shape, torch.nan))
                setattr(owner, name.rpartition(".")[2], noise)
        before = dict(mixer.named_parameters())
        mixer.reset_new_parameters()
        after = dict(mixer.named_parameters())
        assert all(after[name] is before[name] for name in before)  # in place
        assert {name for name, parameter in after.items() if parameter.is_meta} == set(copied)
        starts.append({name: parameter for name, parameter in after.items() if name not in copied})
    for name, parameter in starts[0].items():
        assert parameter.isfinite().all(), name
        assert torch.equal(parameter, starts[1][name])


def is_copied(name):
    return any(part in name for part in ("q_proj", "k_proj", "v_proj", "o_proj", "x_proj", "b_proj", "c_proj"))


def test_reset_does_not_touch_copied_values():
    mixer = tiny.model().model.language_model.layers[0].mixer
    before = {name: parameter.clone() for name, parameter in mixer.named_parameters()}
    mixer.reset_new_parameters()
    for name, parameter in mixer.named_parameters():
        assert torch.equal(parameter, before[name]) == is_copied(name), name


@torch.no_grad()
def test_the_start():
    """Gates half open, no skip, a convolution that changes nothing, half-lives within the range."""
    config = tiny.text_config(timescale_range=[2.0, 200.0])
    mixer = MMate(config, 0)
    mixer.reset_new_parameters()
    u = torch.randn(5, 32)
    assert (mixer.flex_ma.gate_proj(u).sigmoid() == 0.5).all() and (mixer.fusion_proj(u).sigmoid() == 0.5).all()
    for scan in (mixer.flex_ma.forward_scan, mixer.flex_ma.reverse_scan):
        assert not scan.D.any() and scan.conv_weight.sum() == scan.conv_weight[-1].sum() == scan.conv_weight.shape[1]
        dt = torch.nn.functional.softplus(scan.dt_proj(u) + scan.dt_bias)
        half_life = torch.log(torch.tensor(2.0)) / (dt * scan.A_log.exp())
        torch.testing.assert_close(half_life[0], torch.tensor([2.0, 9.2831776, 43.0886942, 200.0]), rtol=1e-4, atol=0)
