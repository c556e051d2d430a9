"""FusedHead: the statistics of a Hugging Face causal LM's head, without its logits.

`model(input_ids).logits` is backbone -> head -> scale -> softcap. FusedHead runs the backbone alone, takes the hidden
rows that are asked for, and gives them with the head's weight to `linear_logprob_entropy`. The weight is the model's
own Parameter, so a tied embedding collects both of its gradients, and activation checkpointing inside the backbone
works as it does in `model(...)`.

A scale s before a softcap needs no argument of the op: cap tanh(s a / cap) / tau = cap' tanh(a / cap') / tau' with
cap' = cap / s and tau' = tau / s.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from entrocraft.kernels.clamped_entropy import clamped_entropy
from entrocraft.kernels.linear_logprob import linear_logprob_entropy
from entrocraft.kernels.logits_logprob import logits_logprob_entropy_reference
from entrocraft.kernels.token_stats import TokenStats

# What multiplies the logits, as (model_type prefix, config attribute, exponent). `logits_scaling` divides in one family
# and multiplies in another, so the attribute's name alone does not tell.
LOGIT_SCALES = (
    ("cohere", "logit_scale", 1),
    ("falcon_h1", "lm_head_multiplier", 1),
    ("granite", "logits_scaling", -1),
    ("hyperclovax", "logits_scaling", 1),
    ("minicpm3", "logits_scaling", -1),
    ("muse_glimmer", "output_multiplier", 1),
)


# What caps the logits; the same thing under two names.
LOGIT_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap")

_REFERENCE_ROWS = 16384  # of the weight, cast at once


class FusedHead:
    """Per-token log-probability and entropy of a Hugging Face causal LM, from its backbone and its head's weight.

    ```
    head = FusedHead(model, cache_bytes=2 << 30)  # a causal LM whose head is linear on the backbone's output
    stats = head(target_T, position_T, input_ids=input_ids_BS, attention_mask=mask_BS, temperature=1.0)
    ```

    Keyword arguments are those of `linear_logprob_entropy` that every call shall have (mode, cache_bytes,
    buffer_bytes, varentropy, ...). Holds the model and no parameters of its own; the head is looked up at each call,
    so that wrapping, freezing, or re-tying it afterwards is honoured. Differentiable as `linear_logprob_entropy` is.
    Under autocast the hidden rows and the weight are first cast to its dtype, as autocast does for a linear layer;
    sums stay in fp32.

    Raises ValueError, when constructed or called, for a model without an output embedding, an encoder-decoder, a head
    that is not a plain linear layer (LoRA or another adapter, quantized), parameters between backbone and head (BERT's
    transform), or an unknown logit scale. What a model does to its logits in code alone, with neither parameters nor a
    known entry of its configuration, is not seen here: `check` compares with the model's own logits.
    """

    def __init__(self, model: nn.Module, **options: Any) -> None:
        self.options = options
        # An adapter wrapper hides the causal LM, whose `base_model` is the backbone; the wrapper's own is not.
        unwrap = getattr(model, "get_base_model", None)
        self.model: Any = unwrap() if callable(unwrap) else model
        for needed in ("get_output_embeddings", "config", "base_model"):
            if not hasattr(self.model, needed):
                raise ValueError(
                    f"model is a {type(model).__name__} without `{needed}`; expected a Hugging Face causal LM"
                )
        if getattr(self.model.config, "is_encoder_decoder", False):
            raise ValueError(f"model is the encoder-decoder {type(self.model).__name__}; expected a causal LM")
        self.scale, self.softcap = _scale_and_softcap(self.model.config)
        self.head_parameters()
        _check_nothing_between(self.model)

    def __call__(
        self,
        target_T: Tensor,
        position_T: Tensor | None = None,
        *,
        temperature: float | Tensor = 1.0,
        ignore_index: int = -100,
        collision: bool = False,
        validate: bool = False,
        **backbone_inputs: Any,
    ) -> TokenStats:
        """Statistics of `target_T` at the rows `position_T` of the backbone's flattened [B * S, H] output.

        Position b * S + s holds what predicts token s + 1 of row b. Without `position_T` all B * S rows are used, in
        order, and `target_T` may be [B, S]. `backbone_inputs` (input_ids, attention_mask, position_ids, ...) go to the
        backbone. The other arguments are those of `linear_logprob_entropy`.
        """
        hidden_TH = self.hidden(**backbone_inputs).flatten(0, -2)
        if position_T is not None:
            hidden_TH = hidden_TH.index_select(0, position_T)
        return self.stats(
            hidden_TH,
            target_T.flatten(),
            temperature=temperature,
            ignore_index=ignore_index,
            collision=collision,
            validate=validate,
        )

    def hidden(self, **backbone_inputs: Any) -> Tensor:
        """The backbone's last hidden state, [B, S, H], after its final norm."""
        output = self.model.base_model(**{"use_cache": False} | backbone_inputs)
        return output.last_hidden_state

    def stats(
        self, hidden_TH: Tensor, target_T: Tensor, *, temperature: float | Tensor = 1.0, **options: Any
    ) -> TokenStats:
        """Statistics of hidden rows [T, H] that are at hand; arguments as for `linear_logprob_entropy`."""
        hidden_TH, weight_VH, bias_V = self._operands(hidden_TH)
        return linear_logprob_entropy(
            hidden_TH, weight_VH, target_T, bias_V=bias_V, **self._bends(temperature), **self.options | options
        )

    def reference_stats(
        self, hidden_TH: Tensor, target_T: Tensor, *, temperature: float | Tensor = 1.0, **options: Any
    ) -> TokenStats:
        """What `stats` should give, from fp32 logits [T, V] of these rows: for a few of them. `options` are those of
        `logits_logprob_entropy_reference`."""
        return logits_logprob_entropy_reference(
            self.reference_logits(hidden_TH), target_T, **self._bends(temperature), **options
        )

    def reference_logits(self, hidden_TH: Tensor) -> Tensor:
        """fp32 logits [T, V] before scale, softcap and temperature. The weight is cast a slice at a time, so that a
        large vocabulary in bf16 is never held in fp32."""
        hidden_TH, weight_VH, bias_V = self._operands(hidden_TH)
        logit_TV = torch.cat([hidden_TH.float() @ part.float().T for part in weight_VH.split(_REFERENCE_ROWS)], dim=1)
        return logit_TV if bias_V is None else logit_TV + bias_V.float()

    def clamped_entropy(self, hidden_TH: Tensor, *, share: float, temperature: float | Tensor = 1.0) -> Tensor:
        """Entropy of each row without the least likely `share` of the vocabulary; as the function of that name."""
        hidden_TH, weight_VH, bias_V = self._operands(hidden_TH)
        return clamped_entropy(hidden_TH, weight_VH, share=share, bias_V=bias_V, **self._bends(temperature))

    def _operands(self, hidden_TH: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Hidden rows, weight and bias in the dtype that autocast asks for."""
        weight_VH, bias_V = self.head_parameters()
        device_type = hidden_TH.device.type
        if torch.is_autocast_enabled(device_type):
            dtype = torch.get_autocast_dtype(device_type)
            hidden_TH, weight_VH = hidden_TH.to(dtype), weight_VH.to(dtype)
            bias_V = None if bias_V is None else bias_V.to(dtype)
        return hidden_TH, weight_VH, bias_V

    def _bends(self, temperature: float | Tensor) -> dict[str, Any]:
        """Temperature and softcap with the model's own logit scale in them."""
        softcap = None if self.softcap is None else self.softcap / self.scale
        return {"temperature": temperature / self.scale, "softcap": softcap}

    def head_parameters(self) -> tuple[Tensor, Tensor | None]:
        """Weight [V, H] and bias [V] or None of the model's head."""
        head = self.model.get_output_embeddings()
        if head is None:
            raise ValueError(f"{type(self.model).__name__} has no output embedding; expected a causal LM with a head")
        # An adapter's parameters live beside the weight: reading the weight alone would ignore them in silence.
        for adapter in ("lora_A", "lora_embedding_A", "base_layer", "modules_to_save", "original_module"):
            if hasattr(head, adapter):
                raise ValueError(
                    f"the head is a {type(head).__name__} with `{adapter}`, an adapter whose part of the logits its "
                    "weight does not have; leave the head out of the adapter's target modules, or merge it first"
                )
        weight_VH = getattr(head, "weight", None)
        if not isinstance(weight_VH, Tensor) or not weight_VH.is_floating_point() or weight_VH.dim() != 2:
            raise ValueError(
                f"the head is a {type(head).__name__} without a floating point weight [V, H]; expected a linear layer "
                "(keep a quantized model's head unquantized)"
            )
        return weight_VH, getattr(head, "bias", None)

    @torch.no_grad()
    def check(self, input_ids_BS: Tensor, *, tolerance: float = 1e-2) -> float:
        """Largest difference, in nats, to log-softmax of the model's own logits on a few tokens.

        Call it once for an architecture that is new to you: it costs one ordinary forward pass. Raises ValueError past
        `tolerance`, which means that the model does something to its logits that the configuration does not tell.
        """
        logit_TV = self.model(input_ids=input_ids_BS, use_cache=False).logits.flatten(0, -2).float()
        stats = self(logit_TV.argmax(1), input_ids=input_ids_BS)
        return self.compare(stats.logprob_T, logit_TV, tolerance=tolerance)

    def compare(self, logprob_T: Tensor, logit_TV: Tensor, *, tolerance: float) -> float:
        """The comparison of `check`, where model and head were run by other means: `logprob_T` of the likeliest tokens,
        at temperature 1, with the model's own logits."""
        expected_T = logit_TV.log_softmax(1).amax(1)
        worst = float((logprob_T - expected_T).abs().max())
        if not worst <= tolerance:
            raise ValueError(
                f"{type(self.model).__name__} gives log-probabilities {worst:.3g} nats away from FusedHead's, expected "
                f"at most {tolerance}: it changes its logits in a way that is not known here"
            )
        return worst


def _check_nothing_between(model: Any) -> None:
    """ValueError for a parameter that is neither backbone's nor head's: a layer before the head, or one beside it."""
    known = {id(p) for module in (model.base_model, model.get_output_embeddings()) for p in module.parameters()}
    foreign = [name for name, p in model.named_parameters() if id(p) not in known]
    if foreign:
        raise ValueError(
            f"{type(model).__name__} has {len(foreign)} parameters outside of its backbone and its head, such as "
            f"{foreign[0]}; expected a head that is linear on the backbone's output. If they transform the hidden "
            "rows, apply them yourself and use linear_logprob_entropy; if they have no part in the logits (a value "
            "head), keep them in a module of their own, and compare by FusedHead.check()"
        )


def _scale_and_softcap(config: Any) -> tuple[float, float | None]:
    """Scale and softcap that the model applies to its head's output."""
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    model_type = getattr(config, "model_type", "")
    scale = 1.0
    for prefix, attribute, exponent in LOGIT_SCALES:
        if model_type.startswith(prefix) and hasattr(text, attribute):
            scale = float(getattr(text, attribute)) ** exponent
            break
    else:
        for attribute in sorted({attribute for _, attribute, _ in LOGIT_SCALES}):
            if getattr(text, attribute, None) not in (None, 1, 1.0):
                raise ValueError(
                    f"config.{attribute} is {getattr(text, attribute)} in the unknown model type {model_type!r}: "
                    "whether it multiplies or divides is not known; look at the model's code and add it to LOGIT_SCALES"
                )
    softcap = next((cap for name in LOGIT_SOFTCAPS if (cap := getattr(text, name, None)) is not None), None)
    return scale, None if softcap is None else float(softcap)
