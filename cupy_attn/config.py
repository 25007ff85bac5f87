"""``config.json`` -> :class:`AttentionConfig`: what one Qwen3 attention layer needs to know, validated once."""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import ConfigError, FileError, IgnoredWarning

PRECISE_THRESHOLD = 20.0
"""Above this max |k_norm.weight| the scores take the split or float32 product (docs/numerics.md)."""

MODEL_TYPES = ("qwen3", "qwen3_moe")
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")
FULL, SLIDING = "full_attention", "sliding_attention"

# transformers' own defaults for keys that a config.json may leave out.
DEFAULT_EPS = 1e-6
DEFAULT_MAX_POSITIONS = 32768

_ROPE_KEYS = {
    "rope_type", "type", "rope_theta", "factor", "attention_factor", "beta_fast", "beta_slow", "truncate",
    "mscale", "mscale_all_dim", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
    "partial_rotary_factor",
}  # fmt: skip


# (key, value without effect, cure): keys of other models that would change the attention.
_REFUSED = (
    ("quantization_config", None, "dequantise the checkpoint and drop the key"),
    ("dual_chunk_attention_config", None, "use the model's plain config.json"),
    ("attn_output_gate", False, "take a Qwen3 model"),
    ("use_qk_norm", True, "take a Qwen3 model"),
)


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Parameters of one RoPE kind, spelled as in ``config.json``.

    ``rope_theta`` is the base of the frequencies. ``factor`` is how far the context is stretched.
    ``attention_factor`` (yarn) multiplies cos and sin; None means the paper's ``0.1 ln(factor) + 1``, or
    the ratio that ``mscale`` and ``mscale_all_dim`` give.
    Sources: arXiv:2104.09864 (RoPE), arXiv:2309.00071 (YaRN), arXiv:2407.21783 (llama3).
    """

    rope_theta: float
    rope_type: str = "default"
    factor: float = 1.0
    original_max_position_embeddings: int | None = None
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    mscale: float | None = None
    mscale_all_dim: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None

    def __post_init__(self) -> None:
        if self.rope_type not in ROPE_TYPES:
            raise ConfigError(
                f"rope_type {self.rope_type!r} is not supported; this package knows {', '.join(ROPE_TYPES)}."
            )
        _positive("rope_theta", self.rope_theta)
        if self.rope_theta <= 1:
            raise ConfigError(
                f"rope_theta is {self.rope_theta}; it must be greater than 1, and is a million or more in Qwen3."
            )
        _positive("rope factor", self.factor)
        if self.factor < 1:
            raise ConfigError(f"rope factor is {self.factor}; it stretches the context, so it must be at least 1.")
        for name in ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"):
            value = getattr(self, name)
            if value is not None:
                _positive(f"rope {name}", value)
        if not isinstance(self.truncate, bool):
            raise ConfigError(f"rope truncate is {self.truncate!r}; it must be true or false.")
        if self.rope_type == "yarn" and self.beta_fast < self.beta_slow:
            raise ConfigError(
                f"rope beta_fast is {self.beta_fast} and beta_slow {self.beta_slow}; beta_fast must be the larger."
            )
        if self.rope_type in ("yarn", "llama3"):
            _positive_int("rope original_max_position_embeddings", self.original_max_position_embeddings)
        if self.rope_type == "llama3":
            for name in ("low_freq_factor", "high_freq_factor"):
                if getattr(self, name) is None:
                    raise ConfigError(f"rope_type llama3 needs {name}; add it to rope_scaling.")
                _positive(f"rope {name}", getattr(self, name))
            assert self.low_freq_factor is not None
            assert self.high_freq_factor is not None
            if self.high_freq_factor <= self.low_freq_factor:
                raise ConfigError(
                    f"rope high_freq_factor is {self.high_freq_factor} and low_freq_factor "
                    f"{self.low_freq_factor}; high_freq_factor must be the larger."
                )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that differ from their defaults, as ``rope_parameters`` of transformers 5."""
        out: dict[str, Any] = {"rope_type": self.rope_type, "rope_theta": self.rope_theta}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name not in out and value != field.default:
                out[field.name] = value
        return out


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """Shape and numerics of the attention layers of one Qwen3 model; frozen and validated.

    Parameters
    ----------
    hidden_size : int
        H, width of the hidden states. Unrelated to ``num_attention_heads * head_dim``.
    num_attention_heads, num_key_value_heads : int
        Hq and Hkv; Hq must be a multiple of Hkv. Query head h reads KV head ``h // (Hq / Hkv)``.
    head_dim : int
        D, even (RoPE rotates pairs i, i + D/2).
    rope : RopeConfig
        Frequencies of the rotary embedding.
    rms_norm_eps : float
        Added to the mean square, in units of x^2; the same for all three norms.
    max_position_embeddings : int
        Positions the model was trained for, before any rope scaling that stretches them.
    attention_bias : bool
        Whether the four projections have biases.
    sliding_window : int or None
        Tokens a sliding layer sees, itself included; None: no layer slides.
    layer_types : tuple of str or None
        ``full_attention`` or ``sliding_attention`` for every layer; None: all alike.
    num_hidden_layers : int or None
        Number of layers, if known.
    model_type : str
        ``qwen3`` or ``qwen3_moe``.
    precise_threshold : float
        Max |k_norm.weight| above which GPU scores take the precise path; so do those of layers whose weights of q and k
        together make as large ones: see ``weights.takes_precise_path``. Parts of it decide on products that make
        good, in Hopper's prefill, what rounding hidden states changes of keys: see ``weights.multiplies_rest``.

    Raises
    ------
    ConfigError
        For a value that is unknown, out of range, or contradicts another.
    """

    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope: RopeConfig
    rms_norm_eps: float = DEFAULT_EPS
    max_position_embeddings: int = DEFAULT_MAX_POSITIONS
    attention_bias: bool = False
    sliding_window: int | None = None
    layer_types: tuple[str, ...] | None = None
    num_hidden_layers: int | None = None
    model_type: str = "qwen3"
    precise_threshold: float = PRECISE_THRESHOLD

    def __post_init__(self) -> None:
        for name in ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim",
                     "max_position_embeddings"):  # fmt: skip
            _positive_int(name, getattr(self, name))
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of num_key_value_heads "
                f"{self.num_key_value_heads}; each KV head must serve the same number of query heads."
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim is {self.head_dim}; RoPE rotates pairs, so it must be even.")
        _positive("rms_norm_eps", self.rms_norm_eps)
        _positive("precise_threshold", self.precise_threshold)
        if not isinstance(self.attention_bias, bool):
            raise ConfigError(f"attention_bias is {self.attention_bias!r}; it must be true or false.")
        if self.model_type not in MODEL_TYPES:
            raise ConfigError(
                f"model_type is {self.model_type!r}; this package runs the attention layers of "
                f"{' and '.join(MODEL_TYPES)}, other models differ in norms, gates or RoPE."
            )
        if self.rope.rope_type == "dynamic" and self.head_dim == 2:
            raise ConfigError("rope_type dynamic has no meaning at head_dim 2; use a larger head_dim.")
        if self.sliding_window is not None:
            _positive_int("sliding_window", self.sliding_window)
        if self.num_hidden_layers is not None:
            _positive_int("num_hidden_layers", self.num_hidden_layers)
        if self.layer_types is not None and self.model_type == "qwen3_moe":
            raise ConfigError("layer_types is given for qwen3_moe, all of whose layers are alike; leave it out.")
        if self.layer_types is not None:
            self._check_layer_types(self.layer_types)

    def _check_layer_types(self, layer_types: tuple[str, ...]) -> None:
        unknown = sorted({str(t) for t in layer_types} - {FULL, SLIDING})
        if unknown:
            raise ConfigError(
                f"layer_types holds {', '.join(map(repr, unknown))}; this package knows {FULL!r} and {SLIDING!r}."
            )
        if self.num_hidden_layers is not None and len(layer_types) != self.num_hidden_layers:
            raise ConfigError(
                f"layer_types has {len(layer_types)} entries and num_hidden_layers is {self.num_hidden_layers}; "
                "they must agree."
            )
        if SLIDING in layer_types and self.sliding_window is None:
            raise ConfigError(
                f"layer_types names {SLIDING!r} layers but no window is in force; set use_sliding_window to true "
                "and sliding_window to a length, or make every layer full_attention."
            )

    @property
    def group(self) -> int:
        """G, query heads per KV head."""
        return self.num_attention_heads // self.num_key_value_heads

    @property
    def q_size(self) -> int:
        """Columns of Q: Hq * D."""
        return self.num_attention_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Columns of K, and of V: Hkv * D."""
        return self.num_key_value_heads * self.head_dim

    @property
    def lasting_positions(self) -> int:
        """Positions below this have the same angles however long the sequence grows: all, but for dynamic RoPE."""
        return self.max_position_embeddings if self.rope.rope_type == "dynamic" else self.max_position

    @property
    def max_position(self) -> int:
        """Positions 0 .. max_position - 1 are accepted.

        ``max_position_embeddings``, or ``factor`` times the original length where rope scaling stretches it
        (linear, dynamic, yarn), whichever is larger.
        """
        original = self.rope.original_max_position_embeddings or self.max_position_embeddings
        if self.rope.rope_type == "llama3":  # its max_position_embeddings is the stretched one
            return self.max_position_embeddings
        return max(self.max_position_embeddings, int(self.rope.factor * original))

    def window(self, layer: int) -> int | None:
        """Return the sliding window of one layer in tokens (itself included), or None if it sees everything."""
        self.check_layer(layer)
        if self.layer_types is None:
            return self.sliding_window
        return self.sliding_window if self.layer_types[layer] == SLIDING else None

    def check_layer(self, layer: int) -> None:
        """Raise ConfigError unless ``layer`` is an index of this model."""
        count = self.num_hidden_layers if self.layer_types is None else len(self.layer_types)
        if isinstance(layer, bool) or not isinstance(layer, int) or layer < 0:
            raise ConfigError(f"layer is {layer!r}; it must be an integer of at least 0.")
        if count is not None and layer >= count:
            raise ConfigError(f"layer {layer} is out of range; the model has layers 0 to {count - 1}.")

    @classmethod
    def from_pretrained(cls, path: str | Path) -> AttentionConfig:
        """Read ``config.json`` from a model folder, or from the file itself.

        Raises
        ------
        FileError
            The file is missing or not JSON.
        ConfigError
            A value is missing, unknown or contradictory.
        """
        file = Path(path)
        if file.is_dir() or file.suffix != ".json":
            file = file / "config.json"
        try:
            text = file.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise FileError(f"{file} does not exist; name a model folder that holds config.json.") from None
        except (OSError, UnicodeDecodeError) as error:
            raise FileError(f"{file} cannot be read ({error}); name a readable config.json.") from None
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise FileError(f"{file} is not valid JSON ({error}); download it again.") from None
        if not isinstance(data, dict):
            raise FileError(f"{file} holds a JSON {type(data).__name__}, not an object; download it again.")
        return cls.from_dict(data)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], *, precise_threshold: float = PRECISE_THRESHOLD) -> AttentionConfig:
        """Build from the parsed ``config.json`` of any Qwen3 size, dense or MoE.

        Both spellings are read: ``rope_theta`` with ``rope_scaling`` (transformers 4) and ``rope_parameters``
        (transformers 5). Keys that do not concern attention are ignored.

        Parameters
        ----------
        config : mapping
            The parsed JSON object.
        precise_threshold : float
            See :class:`AttentionConfig`.

        Raises
        ------
        ConfigError
            A value is missing, unknown or contradictory.
        """
        if not isinstance(config, Mapping):
            raise ConfigError(f"the config is a {type(config).__name__}; pass the parsed config.json, a dict.")
        for key, harmless, cure in _REFUSED:
            if config.get(key, harmless) != harmless:
                raise ConfigError(f"{key} is {config[key]!r}, which this package does not run; {cure}.")
        hidden_size = _positive_int("hidden_size", _required(config, "hidden_size"))
        heads = _positive_int("num_attention_heads", _required(config, "num_attention_heads"))
        kv_heads = _required(config, "num_key_value_heads", none_means=heads)
        head_dim = config.get("head_dim")
        if head_dim is None:
            if hidden_size % heads:
                raise ConfigError(
                    f"head_dim is absent and hidden_size {hidden_size} is not a multiple of num_attention_heads "
                    f"{heads}; add head_dim to the config."
                )
            head_dim = hidden_size // heads
        max_positions = _positive_int(
            "max_position_embeddings", _or_default(config, "max_position_embeddings", DEFAULT_MAX_POSITIONS)
        )
        window, layer_types, num_layers = _sliding(config)
        return cls(
            hidden_size=hidden_size,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            rope=_rope(config, max_positions),
            rms_norm_eps=_or_default(config, "rms_norm_eps", DEFAULT_EPS),
            max_position_embeddings=max_positions,
            attention_bias=_or_default(config, "attention_bias", False),
            sliding_window=window,
            layer_types=layer_types,
            num_hidden_layers=num_layers,
            model_type=_or_default(config, "model_type", "qwen3"),
            precise_threshold=precise_threshold,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return a ``config.json`` object that :meth:`from_dict` and transformers 5 read back to the same layer."""
        return {
            "model_type": self.model_type,
            "hidden_size": self.hidden_size,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "rms_norm_eps": self.rms_norm_eps,
            "max_position_embeddings": self.max_position_embeddings,
            "attention_bias": self.attention_bias,
            "rope_parameters": self.rope.to_dict(),
            "use_sliding_window": self.sliding_window is not None,
            "sliding_window": self.sliding_window,
            "max_window_layers": 0,  # where layer_types is null, all layers are alike
            "layer_types": None if self.layer_types is None else list(self.layer_types),
            "num_hidden_layers": self.num_hidden_layers,
        }


def _sliding(config: Mapping[str, Any]) -> tuple[int | None, tuple[str, ...] | None, int | None]:
    """Return (window in force, type of every layer, number of layers)."""
    num_layers = config.get("num_hidden_layers")
    if num_layers is not None:
        _positive_int("num_hidden_layers", num_layers)
    use_window = _or_default(config, "use_sliding_window", False)
    if not isinstance(use_window, bool):
        raise ConfigError(f"use_sliding_window is {use_window!r}; it must be true or false.")
    window = config.get("sliding_window") if use_window else None
    if use_window and window is None:
        raise ConfigError("use_sliding_window is true but sliding_window is absent; give its length in tokens.")
    if window is not None:
        _positive_int("sliding_window", window)
    if config.get("model_type") == "qwen3_moe":  # transformers slides every layer of the MoE models
        return window, None, num_layers
    layer_types = config.get("layer_types")
    if layer_types is not None:
        if not isinstance(layer_types, list | tuple):
            raise ConfigError(f"layer_types is {layer_types!r}; it must be a list with one name for each layer.")
        if not layer_types:
            raise ConfigError("layer_types is empty; give one name for each layer, or null.")
        return window, tuple(layer_types), num_layers
    if window is None:
        return None, None, num_layers
    first_sliding = _or_default(config, "max_window_layers", 28)
    if isinstance(first_sliding, bool) or not isinstance(first_sliding, int) or first_sliding < 0:
        raise ConfigError(f"max_window_layers is {first_sliding!r}; it must be an integer of at least 0.")
    if first_sliding == 0:
        return window, None, num_layers
    if num_layers is None:
        raise ConfigError(
            "use_sliding_window is true but neither layer_types nor num_hidden_layers says which layers slide; "
            "add one of them."
        )
    return window, tuple(SLIDING if i >= first_sliding else FULL for i in range(num_layers)), num_layers


def _rope(config: Mapping[str, Any], max_positions: int) -> RopeConfig:
    """Merge ``rope_theta``, ``rope_scaling`` and ``rope_parameters`` into one RopeConfig."""
    merged: dict[str, Any] = {}
    for source in ("rope_parameters", "rope_scaling"):
        values = config.get(source)
        if values is None:
            continue
        if not isinstance(values, Mapping):
            raise ConfigError(f"{source} is {values!r}; it must be an object or null.")
        if FULL in values or SLIDING in values:
            raise ConfigError(
                f"{source} is nested by layer type, which Qwen3 does not use; give one flat object for all layers."
            )
        for key, value in values.items():
            _merge(merged, "rope_type" if key == "type" else key, value, source)
    for key in ("rope_theta", "partial_rotary_factor"):
        if config.get(key) is not None:
            _merge(merged, key, config[key], "the top level")
    merged = {key: value for key, value in merged.items() if value is not None}

    if merged.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError("partial_rotary_factor is not 1; Qwen3 rotates the whole head, other models are not run.")
    refused = sorted({"mrope_section", "short_factor", "long_factor"} & set(merged))
    if refused:
        raise ConfigError(f"rope has {', '.join(refused)}, which no supported kind uses; it belongs to another model.")
    unknown = sorted(set(merged) - _ROPE_KEYS)
    if unknown:
        warnings.warn(
            f"rope keys {', '.join(unknown)} are not known to this package and were ignored; check their spelling.",
            IgnoredWarning,
            stacklevel=4,
        )
    rope = {key: value for key, value in merged.items() if key in _ROPE_KEYS}
    if "rope_theta" not in rope:
        raise ConfigError("rope_theta is absent; take it from the model's published config.json.")
    kind = rope.get("rope_type", "default")
    if kind == "default":  # what the other keys say has no effect there
        if rope.get("factor", 1) != 1:
            raise ConfigError(
                f"rope has factor {rope['factor']} but rope_type is {rope.get('rope_type', 'absent')}; name the kind "
                f"that stretches ({', '.join(ROPE_TYPES[1:])}) or drop the factor."
            )
        return RopeConfig(rope_theta=rope["rope_theta"])
    if kind == "yarn":
        rope.setdefault("original_max_position_embeddings", max_positions)
        original = _positive_int("rope original_max_position_embeddings", rope["original_max_position_embeddings"])
        rope.setdefault("factor", max_positions / original)
    elif kind in ROPE_TYPES and "factor" not in rope:
        raise ConfigError(f"rope_type {kind} needs factor; add it to rope_scaling.")
    if kind in ("linear", "dynamic"):  # transformers stretches max_position_embeddings itself for these
        rope.pop("original_max_position_embeddings", None)
    return RopeConfig(**rope)


def _merge(merged: dict[str, Any], key: str, value: Any, source: str) -> None:
    if value is None:
        return
    if merged.get(key, value) != value:
        raise ConfigError(
            f"the config gives {key} twice, as {merged[key]!r} and as {value!r} (in {source}); keep the right one."
        )
    merged[key] = value


def _required(config: Mapping[str, Any], key: str, none_means: Any = None) -> Any:
    if key not in config:
        raise ConfigError(f"{key} is absent from the config; add it.")
    value = config[key]
    return none_means if value is None else value


def _or_default(config: Mapping[str, Any], key: str, default: Any) -> Any:
    value = config.get(key)
    return default if value is None else value


def _positive_int(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} is {value!r}; it must be an integer of at least 1.")
    return value


def _positive(name: str, value: Any) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value <= 0:
        raise ConfigError(f"{name} is {value!r}; it must be a finite number greater than 0.")
