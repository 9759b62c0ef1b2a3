"""One step of a distillation as one module: student, teacher and losses, which engines wrap as a whole."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLAttention

from ..modeling.compat import checkpoint_activations
from ..modeling.decoder import LinMUDecoderLayer
from ..modeling.layout.prompt import Prompt
from ..modeling.mixers import recurrent_layers
from .engines.zero import lend_shapes
from .losses import IGNORE_INDEX, hidden_loss, next_token_targets, output_losses, squared_errors
from .rows.collator import TOPK_FIELDS
from .stages import Stage
from .teacher import Given, Teacher


Inputs = dict[str, Tensor]
WEIGHTS = ("hid", "tok", "seq", "sup")


class DistillationModel(nn.Module):
    """
    All that a training step computes, so that the hooks of DDP and FSDP2, which wrap it, see every use of a parameter.

    Args:
        student (`LinMUForConditionalGeneration`): With LoRA in place and [`set_trainable`] done.
        teacher (`Teacher`): See [`as_teacher`].
        stage (`Stage`): What is compared, and with which weight.
        temperature (`float`, *optional*, defaults to 1.0): tau of Eq. 7.
        logits_chunk_size (`int`, *optional*, defaults to 1024): Positions whose logits exist at a time.
        checkpoints (`bool`, *optional*, defaults to `False`): Whether the student's activations are checkpointed.
        position_shift (`int`, *optional*, defaults to 0): Largest number that is added to all positions of a row.
        layers (`Sequence[int]`, *optional*): The replaced layers that are compared in a step that the teacher feeds,
            by default all. Losses are those of all layers, so that the losses of disjoint groups add up. Given, no
            parameter is moved when this module is: [`LayerOffload`] says where they are.
    """

    def __init__(
        self,
        student,
        teacher: Teacher,
        stage: Stage,
        temperature: float = 1.0,
        logits_chunk_size: int = 1024,
        checkpoints: bool = False,
        position_shift: int = 0,
        layers: Sequence[int] | None = None,
    ):
        super().__init__()
        self.student, self.teacher, self.stage = student, teacher, stage
        self.temperature, self.logits_chunk_size, self.checkpoints = temperature, logits_chunk_size, checkpoints
        self.config, self.position_shift = student.config, position_shift
        self.replaced = recurrent_layers(student.config.text_config.layer_types)
        self.compared, self.moves = list(self.replaced if layers is None else layers), layers is None
        ours, theirs = student.config.text_config, teacher.config.text_config
        self.comparable = (ours.hidden_size, len(ours.layer_types)) == (theirs.hidden_size, len(theirs.layer_types))
        # What FSDP2 loads piece by piece. Not the vision side: a process with text alone would not ask for it, and the
        # others would wait.
        self._no_split_modules = [LinMUDecoderLayer.__name__, Qwen2_5_VLAttention.__name__]

    def train(self, mode: bool = True) -> "DistillationModel":
        # Reentrant checkpoints and gradients that are taken at once would disagree: blocks alone need none.
        super().train(mode and self.stage.hidden_input == "student")
        self.training = mode
        return self

    def _apply(self, fn, recurse=True):
        return super()._apply(fn, recurse) if self.moves else self

    def tie_weights(self, **kwargs) -> None:
        self.student.tie_weights(**kwargs)

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs=None, **kwargs) -> None:
        checkpoint_activations(self.student, True, activation_checkpointing_kwargs, **kwargs)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs=None, **kwargs) -> None:
        """The same by the name that a Trainer before Transformers 5.24 calls."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)

    def forward(self, inputs: Inputs, counts: Tensor, compare: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
        """
        Computes the weighted sum of the stage's losses on one micro-batch.

        Args:
            inputs (`dict[str, Tensor]`): A batch of [`DistillCollator`].
            counts (`Tensor` of shape `[3]`): Real tokens, answer tokens and pseudo-target tokens of the global batch.
            compare (`bool`, *optional*, defaults to `False`): Whether the mixers are compared without L_hid, too.

        Returns:
            `tuple[Tensor, dict[str, Tensor]]`: The loss, and what it is made of, detached: each loss without its
            weight, `agreement`, and with a comparison `errors` and `energies` of every replaced layer, [l], see
            [`squared_errors`].
        """
        inputs, stage = dict(inputs), self.stage
        labels, pseudo_labels = inputs.pop("labels"), inputs.pop("pseudo_labels", None)
        topk = {key: inputs.pop(key) for key in TOPK_FIELDS if key in inputs}
        given, embeds = self._read(inputs)
        prompt = given.prompt
        # With stored log-probabilities nothing but L_hid needs the teacher.
        compare = stage.hid > 0 or (compare and self.comparable and not topk)
        if stage.hidden_input == "teacher":
            losses, compared = self._fit_blocks(given, embeds, counts[0])
        else:
            known: dict[int, Tensor] = {}
            teacher_states = None
            if compare or self._asks(topk):
                teacher_states = self.teacher(given, partial(_keep, known) if compare else None)
            answer = self.student.model.language_model(
                inputs_embeds=embeds, prompt=prompt, output_mixer_states=compare, return_dict=True
            )
            losses, compared = {}, {}
            if compare:
                ours = [answer.mixer_outputs[index] for index in self.replaced]
                ours = ours if stage.hid else [output.detach() for output in ours]
                errors, energies = squared_errors(
                    ours, [known[index] for index in self.replaced], _real(prompt, embeds)
                )
                compared = {"errors": errors, "energies": energies}
                if stage.hid:
                    losses["hid"] = hidden_loss(errors, counts[0])
            losses |= self._output_losses(
                answer.last_hidden_state, teacher_states, topk, labels, pseudo_labels, counts
            )
        loss = sum(getattr(stage, key) * losses[key] for key in WEIGHTS if key in losses)
        sums = {key: value.detach() for key, value in (losses | compared).items()}
        return loss, sums

    def _read(self, inputs: Inputs) -> tuple[Given, Tensor]:
        """What the teacher reads, and the student's embeddings."""
        model = self.student.model
        frozen = not any(
            p.requires_grad for part in (model.visual, model.get_input_embeddings()) for p in part.parameters()
        )
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            prompt, media = Prompt.read_batch(model, inputs)
            if self.position_shift and self.training:
                prompt = replace(prompt, positions=self._shift(prompt))
            features = model.encode_media(media)
            embeds = model.embed_prompt(prompt, features)
        given = Given(prompt, embeds.detach(), features, media)
        if self.checkpoints and self.training and frozen:
            # A reentrant checkpoint without an input to differentiate would silently drop all gradients.
            embeds = embeds.detach().requires_grad_()
        return given, embeds

    def _shift(self, prompt: Prompt) -> Tensor:
        """Adds one number to all positions of a sequence, another for every sequence."""
        positions: Any = prompt.positions
        rows = len(prompt.lengths or range(positions.shape[-2]))
        shift = torch.randint(self.position_shift + 1, (rows, 1)).to(positions.device)
        if prompt.lengths is not None:  # of one row
            shift = shift[:, 0].repeat_interleave(torch.tensor(prompt.lengths, device=shift.device))[None]
        return positions + shift

    # ---- L_hid with every block on the teacher's own input

    def _fit_blocks(self, given: Given, embeds: Tensor, num_tokens: Tensor):
        """
        Compares the blocks as the teacher comes by their layers. Each block's gradients are taken at once, so that
        memory holds the activations of one block, whatever the number of layers.
        """
        text: Any = self.student.model.language_model
        prompt = given.prompt
        kinds = sorted({self.config.text_config.layer_types[index] for index in self.compared})
        rope, layout, _ = text.prepare(
            embeds, prompt.mask, prompt.positions, prompt.vision_layout, packed=prompt.lengths, layer_types=kinds
        )
        real, found = _real(prompt, embeds), {}

        def fit(target: Tensor, layer, mixer_input: Tensor):
            def compare():
                errors, energies = squared_errors([layer.mix(mixer_input, rope, layout)], [target], real)
                return hidden_loss(errors, num_tokens) / len(self.replaced), errors, energies

            parameters = [p for p in layer.mixer.parameters() if p.requires_grad]
            if not (parameters and takes_gradients):
                with torch.no_grad():
                    return compare()
            with torch.enable_grad():
                found = GradientsAtOnce.apply(compare, *parameters)
            torch.clear_autocast_cache()  # it would hold the parameters of all blocks in half precision
            return found

        def see(index: int, mixer_input: Tensor, mixer_output: Tensor, layer: nn.Module | None) -> Tensor | None:
            if index not in self.compared:
                return None

            def run(layer, mixer_input: Tensor) -> Tensor:
                found[index] = fit(mixer_output, layer, mixer_input)  # DeepSpeed detaches what a call returns here
                return found[index][0]

            # Inside the layer's call where its parameters are loaded already, else in a call of its own.
            return run(layer, mixer_input) if layer is not None else text.layers[index](mixer_input, run=run)

        takes_gradients = torch.is_grad_enabled()
        self.teacher(given, see, self.compared[-1] + 1)
        losses, errors, energies = zip(*(found[index] for index in self.compared))
        return {"hid": torch.stack(losses).sum()}, {"errors": torch.cat(errors), "energies": torch.cat(energies)}

    # ---- Losses on the logits

    def _asks(self, topk: Inputs) -> bool:
        """Whether L_tok takes the teacher's own logits."""
        return self.stage.tok > 0 and not topk

    def _output_losses(
        self, hidden_states, teacher_states, topk: Inputs, labels, pseudo_labels, counts
    ) -> dict[str, Tensor]:
        _, num_answers, num_pseudo = counts
        stage = self.stage
        targets = {"tok": labels} if stage.tok else {}
        if stage.sup:
            targets["sup"] = labels
        if stage.seq:
            targets["seq"] = pseudo_labels
        if not targets:
            return {}
        targets = {key: next_token_targets(value) for key, value in targets.items()}
        counted = torch.stack([value != IGNORE_INDEX for value in targets.values()]).any(0)
        return output_losses(
            hidden_states[counted],
            self.student.lm_head,
            {key: value[counted] for key, value in targets.items()},
            {"tok": num_answers, "sup": num_answers, "seq": num_pseudo},
            teacher_hidden=teacher_states[counted] if self._asks(topk) else None,
            **{key: value[counted] for key, value in topk.items()},
            teacher_head=self.teacher.head,
            temperature=self.temperature,
            beta=stage.beta,
            chunk_size=self.logits_chunk_size,
        )


class GradientsAtOnce(torch.autograd.Function):
    """
    A loss whose gradients are taken in the forward pass, after which its graph is gone; the backward pass hands them
    on, so that anything that waits for it, such as DDP, sees nothing unusual.
    """

    @staticmethod
    def forward(ctx, compare: Callable, *parameters: Tensor):
        """
        Computes the loss and its gradients, which the backward pass returns.

        Args:
            compare (`Callable`): Returns the loss and tensors that are not differentiated.
            parameters (`Tensor`): What the loss is differentiated by.
        """
        with torch.enable_grad():
            loss, *others = compare()
        ctx.parameters = parameters
        ctx.gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        outputs = [output.detach() for output in (loss, *others)]
        ctx.mark_non_differentiable(*outputs[1:])
        return tuple(outputs)

    @staticmethod
    def backward(ctx, grad_loss: Tensor, *_):
        gradients, ctx.gradients = ctx.gradients, None
        lend_shapes(ctx.parameters)
        return (None, *(None if g is None else g.mul_(grad_loss) for g in gradients))


def _keep(known: dict[int, Tensor], index: int, mixer_input: Tensor, mixer_output: Tensor, layer) -> None:
    known[index] = mixer_output


def _real(prompt: Prompt, embeds: Tensor) -> Tensor:
    """1 at the tokens that are not padding, `[b, t]`."""
    return embeds.new_ones(embeds.shape[:2]) if prompt.mask is None else prompt.mask
