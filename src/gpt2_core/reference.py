"""GPT-2 in float64 numpy, written to be read: the oracle that every framework is held to.

Read it from top to bottom: five small functions, the block, the transformer. What stands on top of the transformer
(language model, multiple choice, classifiers) is in reference_heads.py. There is no dropout: it only infers.

Letters, in the comments at the end of lines:

    B  rows of the batch          H  attention heads               C  model width, C = H * D
    T  new tokens of each row     D  width of one head             V  vocabulary
    S  all tokens of each row, those in the cache (``past``) and the T new ones

A model two wide with one head and one token to look at gives that token's value back, whatever the query:

>>> q, k, v = np.ones((1, 1, 1, 2)), np.ones((1, 1, 1, 2)), np.array([[[[3.0, 5.0]]]])
>>> attend(q, k, v, visible(1, 1), scale=0.5)[0]
array([[[[3., 5.]]]])

With two tokens of equal keys, the second one sees the mean of both values, the first one only its own:

>>> q, k, v = np.ones((1, 1, 2, 2)), np.ones((1, 1, 2, 2)), np.array([[[[3.0, 5.0], [5.0, 9.0]]]])
>>> attend(q, k, v, visible(2, 2), scale=0.5)[0]
array([[[[3., 5.],
         [4., 7.]]]])

Source: Radford et al. 2019, section 2.3, and the released code and weights.
"""

# mypy: disable-error-code="no-any-return"
# (numpy types much of its arithmetic as Any; naming every result again would hide the formulas.)

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gpt2_core import reference_heads as heads
from gpt2_core.config import GPT2Config, check_config
from gpt2_core.errors import CheckpointMismatchError, GenerationError, InputError
from gpt2_core.initialization import initial_values
from gpt2_core.inputs import check_one_input, check_one_past
from gpt2_core.outputs import BaseOutput
from gpt2_core.parameters import PREFIX, Head, parameter_table
from gpt2_core.reference_inputs import read_arrays, read_head_masks, read_inputs

Array = NDArray[np.float64]
Weights = Mapping[str, Array]
Past = tuple[tuple[Array, Array], ...]


# -- arithmetic ----------------------------------------------------------------------------------------------


def layer_norm(x: Array, w: Weights, name: str, epsilon: float) -> Array:
    """Each vector (..., C) to mean 0 and variance 1, then gain and bias (Ba et al. 2016)."""
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = (centred**2).mean(axis=-1, keepdims=True)
    return centred / np.sqrt(variance + epsilon) * w[f"{name}.weight"] + w[f"{name}.bias"]


def project(x: Array, w: Weights, name: str) -> Array:
    """(..., in) -> (..., out); kernels are (in, out), as released."""
    return x @ w[f"{name}.weight"] + w[f"{name}.bias"]


def gelu_new(x: Array) -> Array:
    """GELU by tanh, as the released models use it (Hendrycks & Gimpel 2016, section 2)."""
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def gelu(x: Array) -> Array:
    """GELU proper: x times the chance that a standard normal number is below x."""
    return 0.5 * x * (1 + np.vectorize(math.erf, otypes=[np.float64])(x / math.sqrt(2)))


def gelu_fast(x: Array) -> Array:
    """GELU by tanh with sqrt(2/pi) rounded to 0.7978845608, as some forks of the field wrote it."""
    return 0.5 * x * (1 + np.tanh(x * 0.7978845608 * (1 + 0.044715 * x * x)))


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)), by way of tanh so that no exponential overflows."""
    return 0.5 * (1 + np.tanh(0.5 * x))


ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "gelu_new": gelu_new,
    "gelu_pytorch_tanh": gelu_new,
    "gelu": gelu,
    "gelu_fast": gelu_fast,
    "quick_gelu": lambda x: x * sigmoid(1.702 * x),
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x * sigmoid(x),
    "swish": lambda x: x * sigmoid(x),
    "tanh": np.tanh,
}


def softmax(scores: Array) -> Array:
    """Scores (..., S) to probabilities; the maximum is taken off first so that nothing overflows."""
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


# -- attention -----------------------------------------------------------------------------------------------


def visible(T: int, S: int, attention_mask: NDArray[np.bool_] | None = None) -> NDArray[np.bool_]:
    """Which key each query sees: (1 or B, 1, T, S), True where it does.

    A query sees itself and what came before, but no padding; itself always, so that a padded query has a defined
    (and unused) result instead of 0/0.
    """
    query = np.arange(S - T, S)[:, None]  # (T, 1)
    key = np.arange(S)[None, :]  # (1, S)
    causal = (key <= query)[None, None]  # (1, 1, T, S)
    if attention_mask is None:
        return causal
    return (causal & attention_mask[:, None, None, :]) | (key == query)


def attend(q: Array, k: Array, v: Array, mask: NDArray[np.bool_], scale: float, head_mask: Any = 1.0) -> Any:
    """What each query gathers (B, H, T, D), and with which probabilities (B, H, T, S)."""
    scores = scale * (q @ k.swapaxes(-1, -2))  # (B, H, T, D) @ (B, H, D, S) -> (B, H, T, S)
    probs = softmax(np.where(mask, scores, -np.inf)) * head_mask
    return probs @ v, probs  # (B, H, T, S) @ (B, H, S, D) -> (B, H, T, D)


def attention(
    x: Array,  # (B, T, C)
    w: Weights,
    config: GPT2Config,
    layer: int,
    mask: NDArray[np.bool_],  # (1 or B, 1, T, S)
    head_mask: Any,  # broadcastable to (B, H, T, S)
    past: tuple[Array, Array] | None,  # two of (B, H, S - T, D)
) -> tuple[Array, Array, tuple[Array, Array]]:
    """What attention adds to the stream (B, T, C), its probabilities, and the keys and values of all S positions."""
    B, T, _ = x.shape
    packed = project(x, w, "attn.c_attn")  # (B, T, 3 * H * D)
    packed = packed.reshape(B, T, 3, config.heads_of(layer), config.head_dim)
    q, k, v = packed.transpose(2, 0, 3, 1, 4)  # three of (B, H, T, D)
    if past is not None:
        k = np.concatenate((past[0], k), axis=2)  # (B, H, S, D)
        v = np.concatenate((past[1], v), axis=2)  # (B, H, S, D)
    scale = 1 / math.sqrt(config.head_dim) if config.scale_attn_weights else 1.0
    if config.scale_attn_by_inverse_layer_idx:
        scale /= layer + 1
    gathered, probs = attend(q, k, v, mask, scale, head_mask)
    merged = gathered.transpose(0, 2, 1, 3).reshape(B, T, -1)  # (B, T, H * D)
    return project(merged, w, "attn.c_proj"), probs, (k, v)


# -- the transformer -----------------------------------------------------------------------------------------


def mlp(x: Array, w: Weights, config: GPT2Config) -> Array:
    """The feed-forward layer: (B, T, C) -> (B, T, 4 * C) -> (B, T, C)."""
    return project(ACTIVATIONS[config.activation_function](project(x, w, "mlp.c_fc")), w, "mlp.c_proj")


def block(
    x: Array, w: Weights, config: GPT2Config, layer: int, mask: NDArray[np.bool_], head_mask: Any, past: Any
) -> tuple[Array, Array, tuple[Array, Array]]:
    """One layer: attention, then feed-forward, each behind a layer norm and added to the stream x (B, T, C)."""
    epsilon = config.layer_norm_epsilon
    attended, probs, present = attention(layer_norm(x, w, "ln_1", epsilon), w, config, layer, mask, head_mask, past)
    x = x + attended
    x = x + mlp(layer_norm(x, w, "ln_2", epsilon), w, config)
    return x, probs, present


def transformer(
    x: Array,  # (B, T, C): embeddings
    weights: Weights,
    config: GPT2Config,
    mask: NDArray[np.bool_],
    head_masks: list[Any],
    past: Past | None,
) -> tuple[list[Array], list[Array], Past]:
    """All layers: n_layer + 1 hidden states (B, T, C), n_layer attentions (B, H, T, S), and the cache."""
    hidden, attentions, presents = [x], [], []
    for layer in range(config.n_layer):
        w = under(weights, f"h.{layer}.")
        x, probs, present = block(x, w, config, layer, mask, head_masks[layer], past[layer] if past else None)
        hidden.append(x)
        attentions.append(probs)
        presents.append(present)
    hidden[-1] = layer_norm(x, weights, "ln_f", config.layer_norm_epsilon)
    return hidden, attentions, tuple(presents)


def positions(T: int, S: int, attention_mask: NDArray[np.bool_] | None) -> NDArray[np.int64]:
    """Positions (1 or B, T) of the new tokens: with a mask, the count of real tokens before each one.

    >>> positions(4, 4, np.array([[False, False, True, True]]))
    array([[0, 0, 0, 1]])
    """
    if attention_mask is None:
        return np.arange(S - T, S)[None]
    return np.maximum(attention_mask.cumsum(axis=1) - 1, 0)[:, S - T :]


def under(weights: Weights, prefix: str) -> Weights:
    """The weights whose names begin with ``prefix``, named without it."""
    return {name[len(prefix) :]: value for name, value in weights.items() if name.startswith(prefix)}


# -- the model -----------------------------------------------------------------------------------------------


class ReferenceModel:
    """GPT-2 with any head, from a mapping of parameter names to arrays; all arithmetic in float64.

    >>> config = GPT2Config(vocab_size=10, n_positions=8, n_embd=4, n_layer=1, n_head=2)
    >>> out = ReferenceModel.from_seed(config)([[1, 2, 3]], labels=[[1, 2, 3]])
    >>> out.logits.shape, len(out.past), out.past[0][0].shape
    ((1, 3, 10), 1, (1, 2, 3, 2))

    Raises: CheckpointMismatchError, where parameters are missing, unexpected or misshaped; ConfigError, where
    ``config`` is no GPT2Config.
    """

    def __init__(self, config: GPT2Config, parameters: Mapping[str, ArrayLike], head: Head | str = Head.LM) -> None:
        """Take ``parameters`` under the names of ``parameter_table(config, head)``, in any float format."""
        check_config(config)
        self.config, self.head = config, Head(head)
        table = {row.name: row.shape for row in parameter_table(config, self.head)}
        given = {name: np.asarray(value) for name, value in parameters.items()}
        missing = [name for name in table if name not in given]
        unexpected = [name for name in given if name not in table]
        misshaped = [(n, given[n].shape, table[n]) for n in table if n in given and given[n].shape != table[n]]
        if missing or unexpected or misshaped:
            raise CheckpointMismatchError("given as a mapping", missing, unexpected, misshaped)
        self.parameters: dict[str, Array] = {name: given[name].astype(np.float64) for name in table}
        self._body = self.parameters if self.head is Head.NONE else under(self.parameters, PREFIX)

    @classmethod
    def from_seed(cls, config: GPT2Config, head: Head | str = Head.LM, seed: int = 0) -> ReferenceModel:
        """A model with the project's seeded initial values, the same bits as in every framework."""
        check_config(config)
        return cls(config, initial_values(config, head, seed), head)

    @classmethod
    def from_pretrained(
        cls, name_or_folder: str | Path, head: Head | str = Head.LM, *, seed: int = 0, **options: Any
    ) -> ReferenceModel:
        """A trained model by name, folder or file; ``options`` are those of `gpt2_core.pretrained.open_pretrained`.

        ``seed`` gives the values of a classification head that the file does not have. In float64 a model takes twice
        the memory of its float32 file.

        Raises: HubError, ConfigError, or CheckpointError and its kinds.
        """
        from gpt2_core.pretrained import open_pretrained

        pretrained = open_pretrained(name_or_folder, head, **options)
        with pretrained.checkpoint:
            return cls(pretrained.config, {row.name: tensor.array() for row, tensor in pretrained.tensors(seed)}, head)

    def language_model(self) -> ReferenceModel:
        """This model as a plain language model: itself, or a double-heads model without its choice head.

        Raises: GenerationError, where it has no language-model head.
        """
        if self.head is Head.LM:
            return self
        if self.head is not Head.DOUBLE:
            raise GenerationError(
                f"this model's head is {self.head.value!r}, expected 'lm' or 'double': "
                "only a language model writes text"
            )
        names = {row.name for row in parameter_table(self.config, Head.LM)}
        return ReferenceModel(self.config, {n: v for n, v in self.parameters.items() if n in names}, Head.LM)

    def generate(self, input_ids: ArrayLike, attention_mask: ArrayLike | None = None, **settings: Any) -> Any:
        """Continue prompts; see `gpt2_core.generation.generate`."""
        from gpt2_core.generation import generate

        return generate(self, input_ids, attention_mask, **settings)

    def __call__(
        self,
        input_ids: Any = None,
        past: Any = None,
        attention_mask: Any = None,
        token_type_ids: Any = None,
        position_ids: Any = None,
        head_mask: Any = None,
        inputs_embeds: Any = None,
        labels: Any = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        *,
        past_key_values: Any = None,
        mc_token_ids: Any = None,
        mc_labels: Any = None,
        start_positions: Any = None,
        end_positions: Any = None,
    ) -> Any:
        """Run the model over new tokens, after those in ``past``; returns the output of its head (see outputs.py).

        Args:
            input_ids: (B, T) token ids, with double heads (B, choices, T); or give ``inputs_embeds``.
            past: what an earlier call returned as ``past``: n_layer pairs (key, value), each (B, H, S, D), or stacked
                arrays (2, B, H, S, D); ``past_key_values`` is the same argument.
            attention_mask: (B, S), 1 for real tokens and 0 for padding, cached tokens included.
            token_type_ids: (B, T) ids embedded through the token table and added.
            position_ids: (B, T); by default counted, over real tokens where there is a mask.
            head_mask: (H,), (n_layer, H) or (n_layer, B, H, T, S), multiplied into the attention probabilities.
            inputs_embeds: (B, T, C) instead of ``input_ids``.
            labels: what the head is to predict; the language model's are the input ids, shifted inside.
            use_cache, output_attentions, output_hidden_states: what to return; by default as the config says.
            mc_token_ids, mc_labels: double heads: (B, choices) where to read each choice, (B,) the right one.
            start_positions, end_positions: question answering: (B,) each.

        Raises: InputError, for shapes, ids, labels or lengths that this model cannot take.
        """
        config, head = self.config, self.head
        past = check_one_past(past, past_key_values)
        check_one_input(input_ids, inputs_embeds)
        unused = heads.unused_arguments(
            head, labels=labels, mc_token_ids=mc_token_ids, mc_labels=mc_labels, start_positions=start_positions,
            end_positions=end_positions,
        )  # fmt: skip
        if unused:
            raise InputError(f"a model with head {head.value!r} does not take {', '.join(unused)}; leave it out")
        input_ids, attention_mask, token_type_ids, position_ids, head_mask, inputs_embeds = read_arrays(
            input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids,
            position_ids=position_ids, head_mask=head_mask, inputs_embeds=inputs_embeds,
        )  # fmt: skip
        labels, mc_token_ids, mc_labels, start_positions, end_positions = read_arrays(
            labels=labels, mc_token_ids=mc_token_ids, mc_labels=mc_labels, start_positions=start_positions,
            end_positions=end_positions,
        )  # fmt: skip
        choices = None
        if head is Head.DOUBLE:
            choices = heads.choices_of(input_ids, inputs_embeds)
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds = (
                heads.fold(given) for given in (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
            )
        given = read_inputs(config, input_ids, inputs_embeds, past, attention_mask, token_type_ids, position_ids)
        B, T, S = given.B, given.T, given.S
        if given.position_ids is None:
            given.position_ids = positions(T, S, given.attention_mask)
        x = self._embed(given.input_ids, given.inputs_embeds, given.token_type_ids, given.position_ids)
        mask = visible(T, S, given.attention_mask)
        head_masks = read_head_masks(config, head_mask, B, T, S)
        hidden, attentions, presents = transformer(x, self._body, config, mask, head_masks, given.past)
        out = BaseOutput(
            last_hidden_state=hidden[-1],
            past=presents if _or(use_cache, config.use_cache) else None,
            hidden_states=tuple(hidden) if _or(output_hidden_states, config.output_hidden_states) else None,
            attentions=tuple(attentions) if _or(output_attentions, config.output_attentions) else None,
        )
        if head is Head.NONE:
            return out
        if head is Head.LM:
            return heads.language_model(self.parameters, config, out, labels)
        if head is Head.TOKEN:
            return heads.token_classifier(self.parameters, out, labels)
        if head is Head.QA:
            return heads.question_answering(self.parameters, out, start_positions, end_positions)
        last = heads.last_real(given.input_ids, given.attention_mask, config.pad_token_id, B, T)
        if head is Head.SEQUENCE:
            return heads.sequence_classifier(self.parameters, config, out, last, labels)
        return heads.double_heads(self.parameters, config, out, last, choices, labels, mc_token_ids, mc_labels)

    def _embed(self, input_ids: Any, inputs_embeds: Any, token_type_ids: Any, position_ids: Any) -> Array:
        """What enters the first block (B, T, C): tokens, positions and token types, looked up and added."""
        wte, wpe = self._body["wte.weight"], self._body["wpe.weight"]
        x = wte[input_ids] if inputs_embeds is None else inputs_embeds
        x = x + wpe[position_ids]
        return x if token_type_ids is None else x + wte[token_type_ids]


def _or(given: bool | None, default: bool) -> bool:
    return default if given is None else bool(given)
