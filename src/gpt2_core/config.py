"""GPT2Config: everything that defines a GPT-2 except its weights.

Names and defaults are those of the released checkpoints' ``config.json``; newer aliases
(``hidden_size``, ``num_hidden_layers``, ...) are readable here and nowhere else.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

from gpt2_core.errors import ConfigError, nearest

ACTIVATIONS = (
    "gelu_new",
    "gelu",
    "gelu_pytorch_tanh",
    "gelu_fast",
    "quick_gelu",
    "relu",
    "silu",
    "swish",
    "tanh",
)
SUMMARY_TYPES = ("cls_index", "last", "first", "mean")
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")

# Newer names of the same things, as later libraries write them: alias -> field.
ALIASES: Mapping[str, str] = MappingProxyType(
    {
        "n_ctx": "n_positions",
        "max_position_embeddings": "n_positions",
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
    }
)

# Keys of a config.json that switch on something GPT-2 as released does not have.
_UNSUPPORTED = {
    "add_cross_attention": "cross-attention",
    "is_encoder_decoder": "an encoder",
}


@dataclass(frozen=True)
class GPT2Config:
    """The shape and behaviour of a GPT-2, frozen and validated.

    Defaults build the smallest released model (124,439,808 parameters). Keys that this class does not know
    are kept in ``extra`` and written back, so a file survives a round trip.

    Raises: ConfigError, for a value no model can be built from.
    Source: Radford et al. 2019, section 2.3; ``hparams.json`` and ``config.json`` of the released checkpoints.
    """

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    resid_pdrop: float = 0.1
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    reorder_and_upcast_attn: bool = False
    summary_type: str = "cls_index"
    summary_use_proj: bool = True
    summary_activation: str | None = None
    summary_proj_to_labels: bool = True
    summary_first_dropout: float = 0.1
    use_cache: bool = True
    bos_token_id: int | None = 50256
    eos_token_id: int | tuple[int, ...] | None = 50256
    pad_token_id: int | None = None
    tie_word_embeddings: bool = True
    num_labels: int = 2
    output_attentions: bool = False
    output_hidden_states: bool = False
    classifier_dropout: float | None = None
    problem_type: str | None = None
    id2label: Mapping[int, str] | None = None
    pruned_heads: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __new__(cls, *values: Any, **named: Any) -> GPT2Config:  # noqa: D102 - here, so that a wrong name is our error
        for key in named:
            if key not in FIELDS:
                raise _unknown(key, named[key])
        return super().__new__(cls)

    def __post_init__(self) -> None:
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        if isinstance(self.eos_token_id, (list, tuple)):
            put("eos_token_id", tuple(self.eos_token_id))
        _check_plain_values(self)
        put("pruned_heads", _normal_pruned_heads(self))
        if self.id2label is not None:
            labels = _normal_labels(self.id2label)
            if len(labels) != self.num_labels:
                raise ConfigError(
                    f"id2label names {len(labels)} labels but num_labels is {self.num_labels}; "
                    "give one label per output, or leave id2label out"
                )
            put("id2label", MappingProxyType(labels))
        put("extra", _own_extra(self.extra))
        for key, what in _UNSUPPORTED.items():
            if self.extra.get(key):
                raise ConfigError(
                    f"{key}={self.extra[key]!r} asks for {what}, which GPT-2 as released does not have; "
                    f"expected {key}=false. Remove it from the configuration if the weights do not need it"
                )

    # -- derived ---------------------------------------------------------------------------------------------

    @property
    def head_dim(self) -> int:
        """The width of one attention head: ``n_embd // n_head``."""
        return self.n_embd // self.n_head

    @property
    def inner_dim(self) -> int:
        """The width of the feed-forward layer: ``n_inner``, or ``4 * n_embd`` where it is None."""
        return self.n_inner if self.n_inner is not None else 4 * self.n_embd

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every id that ends a text, as a tuple (empty where there is none)."""
        if self.eos_token_id is None:
            return ()
        return self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)

    def heads_of(self, layer: int) -> int:
        """How many heads layer ``layer`` (from 0) has left after pruning."""
        return self.n_head - len(self.pruned_heads.get(layer, ()))

    @property
    def n_ctx(self) -> int:
        """Older name of ``n_positions``."""
        return self.n_positions

    @property
    def max_position_embeddings(self) -> int:
        """Newer name of ``n_positions``."""
        return self.n_positions

    @property
    def hidden_size(self) -> int:
        """Newer name of ``n_embd``."""
        return self.n_embd

    @property
    def num_hidden_layers(self) -> int:
        """Newer name of ``n_layer``."""
        return self.n_layer

    @property
    def num_attention_heads(self) -> int:
        """Newer name of ``n_head``."""
        return self.n_head

    # -- making, reading, writing ----------------------------------------------------------------------------

    def replace(self, **changes: Any) -> GPT2Config:
        """A copy with ``changes`` applied and validated, under any of their names.

        A new number of labels drops the old labels; new labels bring their number.

        Raises: ConfigError, for unknown names, names that contradict each other, and impossible values.
        """
        changes = _by_field(changes)
        for key in changes:
            if key not in FIELDS:
                raise _unknown(key, changes[key])
        labels = changes.get("id2label")
        if "id2label" in changes or changes.get("num_labels", self.num_labels) != self.num_labels:
            changes.setdefault("id2label", None)
            if labels is not None:
                changes.setdefault("num_labels", len(_normal_labels(labels)))
            changes.setdefault("extra", _with_labels(self.extra, labels))
        return dataclasses.replace(self, **changes)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> GPT2Config:
        """A config from the keys of a ``config.json``; unknown keys are kept in ``extra``.

        Raises: ConfigError, where an alias contradicts the field it stands for or a value is impossible.
        """
        if not isinstance(data, Mapping):
            raise ConfigError(f"a configuration must be a mapping of names to values, got {type(data).__name__}")
        named = _by_field(data)
        known = {key: value for key, value in named.items() if key in FIELDS and key != "extra"}
        extra = {key: value for key, value in named.items() if key not in known}
        if known.get("id2label") is not None and "num_labels" not in known:
            known["num_labels"] = len(_normal_labels(known["id2label"]))
        if known.get("pruned_heads") is None:
            known.pop("pruned_heads", None)
        model_type = extra.pop("model_type", "gpt2")
        if model_type != "gpt2":
            raise ConfigError(
                f"model_type is {_shown(model_type)}, expected 'gpt2'; this library reads GPT-2 checkpoints only"
            )
        return cls(**known, extra=extra)

    def to_dict(self) -> dict[str, Any]:
        """Plain values under the names a ``config.json`` uses, ``extra`` included; JSON can hold them all."""
        out: dict[str, Any] = {"model_type": "gpt2"}
        for name in FIELDS:
            if name != "extra":
                out[name] = getattr(self, name)
        out["n_ctx"] = self.n_positions
        if isinstance(self.eos_token_id, tuple):
            out["eos_token_id"] = list(self.eos_token_id)
        out["pruned_heads"] = {str(layer): list(heads) for layer, heads in self.pruned_heads.items()}
        if self.id2label is None:
            del out["id2label"]
        else:
            out["id2label"] = {str(key): value for key, value in self.id2label.items()}
        out.update(copy.deepcopy(dict(self.extra)))
        return out

    def to_json_string(self) -> str:
        """``to_dict`` as JSON, keys sorted, ending in a line feed.

        Raises: ConfigError, where ``extra`` holds something that JSON cannot.
        """
        try:
            text = json.dumps(self.to_dict(), indent=2, sort_keys=True, ensure_ascii=False) + "\n"
            if not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text):  # no text has these alone
                text = json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"
            return text
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"the configuration cannot be written: {error}; expected texts, numbers, lists and dicts in extra"
            ) from error

    @classmethod
    def from_json_file(cls, path: str | Path) -> GPT2Config:
        """Read one ``config.json``.

        Raises: ConfigError, where the file is missing, may not be read, is not JSON, or holds impossible values.
        """
        from gpt2_core.files import MOST_CONFIG, read_small_file

        path = Path(path)
        try:
            data = json.loads(read_small_file(path, ConfigError, MOST_CONFIG).decode("utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"{path} does not exist; expected a config.json beside the weights") from None
        except (ValueError, RecursionError) as error:  # ValueError: also for a number of thousands of digits
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"{path} is not valid JSON ({error}); download it again or mend it") from error
        try:
            return cls.from_dict(data)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | Path,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        **changes: Any,
    ) -> GPT2Config:
        """The config of a preset name, a folder, a ``config.json`` or a hub name, with ``changes`` applied.

        Preset names (``gpt2`` ... ``gpt2-xl``, ``distilgpt2``, ``gpt2-tales``, and their hub names) need no network.

        Raises: ConfigError for an unreadable file, HubError for a name that cannot be resolved.
        """
        from gpt2_core.files import existing

        path = existing(name_or_folder)
        if path is not None and not path.is_dir():
            config = cls.from_json_file(path)
        elif path is None and revision is None and str(name_or_folder) in PRESETS:
            config = PRESETS[str(name_or_folder)]
        else:
            from gpt2_core.hub import resolve

            folder = resolve(
                name_or_folder,
                kind="config",
                revision=revision,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
            )
            config = cls.from_json_file(folder / "config.json")
        return config.replace(**changes) if changes else config

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write ``config.json`` into ``folder`` (made where missing), whole or not at all; returns its path.

        Raises: WriteError, where the system refuses; ConfigError, where ``extra`` holds what JSON cannot.
        """
        from gpt2_core.files import atomic_write, make_folder

        content = self.to_json_string().encode("utf-8")
        path = Path(folder) / "config.json"
        make_folder(path.parent)
        with atomic_write(path) as file:
            file.write(content)
        return path

    def __hash__(self) -> int:
        return hash(self.to_json_string())

    def __reduce__(self) -> tuple[Any, ...]:
        return (GPT2Config.from_dict, (self.to_dict(),))


FIELDS: tuple[str, ...] = tuple(f.name for f in fields(GPT2Config))

#: The most of a size: what an index of 32 bits counts. No released model has more than 48 layers, and every layer costs
#: time and memory before a single weight is read.
MOST, MOST_LAYERS = 2**31 - 1, 10_000
_MOST_DEEP, _MOST_VALUES = 50, 1_000_000  # of settings nobody here knows: Python's own limit on depth is far away
_MOST_SHOWN = 200
_POSITIVE = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "num_labels")
_SHARES = ("resid_pdrop", "embd_pdrop", "attn_pdrop", "summary_first_dropout", "classifier_dropout")
_FLAGS = (
    "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx",
    "reorder_and_upcast_attn",
    "summary_use_proj",
    "summary_proj_to_labels",
    "use_cache",
    "tie_word_embeddings",
    "output_attentions",
    "output_hidden_states",
)


def check_config(config: object) -> None:
    """Raise ConfigError for anything but a GPT2Config, such as a dictionary."""
    if not isinstance(config, GPT2Config):
        remedy = "; make one with GPT2Config.from_dict(...)" if isinstance(config, Mapping) else ""
        raise ConfigError(f"config is a {type(config).__name__}, expected a GPT2Config{remedy}")


def _unknown(key: str, value: object) -> ConfigError:
    if key in ALIASES:
        return ConfigError(
            f"{key!r} is another name of {ALIASES[key]}; say {ALIASES[key]}={value!r}, or use "
            f"GPT2Config.from_dict({{{key!r}: ...}}), which takes both"
        )
    return ConfigError(
        f"GPT2Config has no field {key!r}; expected the names of a GPT-2's config.json, and what else it shall keep in "
        f"extra={{{key!r}: ...}}{nearest(key, FIELDS)}"
    )


def _by_field(given: Mapping[str, Any]) -> dict[str, Any]:
    """The values under the names of the fields they stand for; other keys stay as they are."""
    out: dict[str, Any] = {}
    said: dict[str, str] = {}
    for key, value in given.items():
        name = ALIASES.get(key, key)
        if name in said and out[name] != value:
            both = "" if name in (key, said[name]) else f", which are both {name}"
            raise ConfigError(f"{key}={value!r} contradicts {said[name]}={out[name]!r}{both}; keep one of the two")
        out[name], said[name] = value, key
    return out


def _own_extra(given: Any) -> Mapping[str, Any]:
    """A copy that nobody else can change, of keys that are no fields."""
    if not isinstance(given, Mapping):
        raise ConfigError(f"extra is {_shown(given)}, expected a mapping of names to values")
    for key in given:
        if not isinstance(key, str):
            raise ConfigError(f"extra holds the key {key!r}, expected names")
        if key in ALIASES or (key in FIELDS and key != "extra"):
            what = f"another name of {ALIASES[key]}" if key in ALIASES else "a field"
            raise ConfigError(f"extra holds {key!r}, which is {what}; say {ALIASES.get(key, key)}=... instead")
        if _endless(given[key]):
            raise ConfigError(
                f"extra holds {key!r} with lists or mappings more than {_MOST_DEEP} deep, or with more than "
                f"{_MOST_VALUES:,} values; expected plain settings"
            )
    return MappingProxyType(copy.deepcopy(dict(given)))


def _endless(value: object) -> bool:
    """Whether lists and mappings stand in each other too deep, or too often: one may stand in many places."""
    level, count = [value], 0
    for _ in range(_MOST_DEEP):
        nested = [each for each in level if isinstance(each, (Mapping, list, tuple))]
        count += sum(map(len, nested))
        if not nested or count > _MOST_VALUES:
            break
        level = [one for each in nested for one in (each.values() if isinstance(each, Mapping) else each)]
    return bool(nested)


def _shown(value: object) -> str:
    """A value for a message, cut where it is long."""
    try:
        text = repr(value)
    except ValueError:  # Python does not write numbers of thousands of digits
        return "a number too long to show"
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


def _with_labels(extra: Mapping[str, Any], labels: Any) -> dict[str, Any]:
    """``extra`` with the label2id, if a file had one, that goes with these labels."""
    out = {key: value for key, value in extra.items() if key != "label2id"}
    if labels is not None and "label2id" in extra:
        out["label2id"] = {name: number for number, name in _normal_labels(labels).items()}
    return out


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_plain_values(config: GPT2Config) -> None:
    def refuse(name: str, expected: str) -> None:
        raise ConfigError(f"{name} is {_shown(getattr(config, name))}, expected {expected}")

    for name in _POSITIVE:
        value, most = getattr(config, name), MOST_LAYERS if name == "n_layer" else MOST
        if not _is_int(value) or not 1 <= value <= most:
            refuse(name, f"a whole number from 1 to {most:,}")
    if config.n_inner is not None and (not _is_int(config.n_inner) or not 1 <= config.n_inner <= MOST):
        refuse("n_inner", f"None (for 4 * n_embd) or a whole number from 1 to {MOST:,}")
    if config.n_embd % config.n_head:
        raise ConfigError(
            f"n_embd={config.n_embd} cannot be split into n_head={config.n_head} heads of equal width; "
            "make n_embd a multiple of n_head"
        )
    for name in _SHARES:
        value = getattr(config, name)
        if value is None and name == "classifier_dropout":
            continue
        if not _is_number(value) or not 0.0 <= value < 1.0:
            refuse(name, "a probability from 0 up to, but not including, 1")
    for name in _FLAGS:
        if not isinstance(getattr(config, name), bool):
            refuse(name, "true or false")
    if not _is_number(config.layer_norm_epsilon) or not 0 < config.layer_norm_epsilon <= sys.float_info.max:
        refuse("layer_norm_epsilon", "a finite number above 0")
    if not _is_number(config.initializer_range) or not 0 <= config.initializer_range <= sys.float_info.max:
        refuse("initializer_range", "a finite number of at least 0")
    if config.activation_function not in ACTIVATIONS:
        refuse("activation_function", f"one of {', '.join(ACTIVATIONS)}")
    if config.summary_type not in SUMMARY_TYPES:
        refuse("summary_type", f"one of {', '.join(SUMMARY_TYPES)}")
    if config.summary_activation not in (None, "tanh"):
        refuse("summary_activation", "None or 'tanh'")
    if config.problem_type is not None and config.problem_type not in PROBLEM_TYPES:
        refuse("problem_type", f"None or one of {', '.join(PROBLEM_TYPES)}")
    for name in ("bos_token_id", "pad_token_id"):
        value = getattr(config, name)
        if value is not None and (not _is_int(value) or value < 0):
            refuse(name, "None or a token id of at least 0")
    ids = config.eos_token_ids
    if not all(_is_int(value) and value >= 0 for value in ids):
        refuse("eos_token_id", "None, a token id of at least 0, or several of them")


def _normal_labels(given: Any) -> dict[int, str]:
    try:
        return {int(key): str(value) for key, value in given.items()}
    except (AttributeError, TypeError, ValueError):
        raise ConfigError(f"id2label is {_shown(given)}, expected a mapping of label numbers to names") from None


def _normal_pruned_heads(config: GPT2Config) -> Mapping[int, tuple[int, ...]]:
    try:
        given = {int(layer): sorted({int(head) for head in heads}) for layer, heads in config.pruned_heads.items()}
    except (AttributeError, TypeError, ValueError):
        raise ConfigError(
            f"pruned_heads is {_shown(config.pruned_heads)}, expected a mapping of layer numbers to lists of head "
            f"numbers"
        ) from None
    for layer, heads in given.items():
        if not 0 <= layer < config.n_layer:
            raise ConfigError(f"pruned_heads names layer {_shown(layer)}, expected 0 to {config.n_layer - 1}")
        for head in heads:
            if not 0 <= head < config.n_head:
                raise ConfigError(f"pruned_heads[{layer}] names head {_shown(head)}, expected 0 to {config.n_head - 1}")
        if len(heads) >= config.n_head:
            raise ConfigError(f"pruned_heads[{layer}] removes all {config.n_head} heads; at least one must stay")
    return MappingProxyType({layer: tuple(heads) for layer, heads in sorted(given.items()) if heads})


def _presets() -> Mapping[str, GPT2Config]:
    # Sizes: table 2 of Radford et al. 2019 (as corrected by the released hparams.json); distilgpt2's model card.
    sizes = {
        "gpt2": (12, 768, 12),
        "gpt2-medium": (24, 1024, 16),
        "gpt2-large": (36, 1280, 20),
        "gpt2-xl": (48, 1600, 25),
    }
    presets = {
        name: GPT2Config(n_layer=n_layer, n_embd=n_embd, n_head=n_head)
        for name, (n_layer, n_embd, n_head) in sizes.items()
    }
    presets |= {f"openai-community/{name}": config for name, config in presets.items()}
    presets["distilgpt2"] = presets["distilbert/distilgpt2"] = GPT2Config(n_layer=6)
    presets["gpt2-tales"] = GPT2Config(n_layer=6, n_embd=192, n_head=6, n_positions=512)
    return MappingProxyType(presets)


PRESETS: Mapping[str, GPT2Config] = _presets()
