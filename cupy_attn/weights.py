"""safetensors or plain dicts -> :class:`AttentionWeights`: the tensors of one layer, checked by name and shape."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .arrays import STORAGE_DTYPES, as_array, storage_dtype, to_numpy
from .config import AttentionConfig
from .errors import FileError, IgnoredWarning, PrecisionWarning, WeightsError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

# A conversion that moves a tensor by more than this relative L2 is worth a warning: float16's own rounding unit.
LOSS_WARNING = 2.0**-11

_NORMS = {"input_norm": "input_layernorm", "q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}
_PROJECTIONS = ("q", "k", "v", "o")


@dataclasses.dataclass(frozen=True)
class NormStats:
    """Magnitudes of one norm weight: ``max_abs``, mean, standard deviation, quartiles of |w|."""

    max_abs: float
    mean: float
    std: float
    quartiles_abs: tuple[float, float, float]

    @property
    def rms(self) -> float:
        """Root mean square."""
        return float(np.hypot(self.mean, self.std))

    @classmethod
    def of(cls, weight: np.ndarray) -> NormStats:
        """Measure a weight [D] in float64."""
        w = weight.astype(np.float64)
        low, middle, high = (float(x) for x in np.quantile(np.abs(w), (0.25, 0.5, 0.75)))
        return cls(float(np.abs(w).max()), float(w.mean()), float(w.std()), (low, middle, high))


# Norm weights of trained models peak at about this multiple of their root mean square.
PEAK_TO_RMS = 8
# How far below the threshold the product of two peaks that meet has to stay, and how far below half of it where prefill
# leaves out what rounding hidden states leaves over. Found by simulation: docs/numerics.md.
PEAK_TO_PAIR, PEAK_TO_PAIR_WITHOUT_REST = 2.5, 4


def largest_pair_product(q_norm: np.ndarray, k_norm: np.ndarray) -> float:
    """Return the largest product of a weight of q and one of k that meet in a score.

    RoPE mixes dims i and i + D/2, so what meets is the larger |w_q| of such a pair and the larger |w_k| of it.
    """
    q, k = (np.abs(w.astype(np.float64)).reshape(2, -1).max(0) for w in (q_norm, k_norm))
    return float((q * k).max())


def takes_precise_path(config: AttentionConfig, q_norm: np.ndarray, k_norm: np.ndarray) -> bool:
    """Return whether scores of a layer need operands of more than float16's precision.

    They do where one of three is too large:

    * max |w_k|, above ``config.precise_threshold``: what rounding does ahead of the norm is multiplied by it.
    * rms(w_q) rms(w_k), the standard deviation of the scores over random heads, above that threshold over
      ``PEAK_TO_RMS``: many middling weights add up to what one large one does.
    * :func:`largest_pair_product`, above the threshold over ``PEAK_TO_PAIR``: one pair of dims then carries the scores,
      and rounding its q' and k' to float16 moves all of them in proportion, with nothing to average it out.
    """
    return _exceeds(config.precise_threshold, PEAK_TO_PAIR, q_norm, k_norm)


def multiplies_rest(config: AttentionConfig, q_norm: np.ndarray, k_norm: np.ndarray) -> bool:
    """Return whether prefill on the normal path multiplies K's weights with what rounding hidden states leaves over.

    Keys that round to the other neighbour here and there cost little where scores are small: the rules are those of
    :func:`takes_precise_path`, with half of the first two limits and less than a third of the third (docs/numerics.md).
    """
    return _exceeds(config.precise_threshold / 2, PEAK_TO_PAIR_WITHOUT_REST, q_norm, k_norm)


def _exceeds(threshold: float, peak_to_pair: float, q_norm: np.ndarray, k_norm: np.ndarray) -> bool:
    """Apply the three rules of :func:`takes_precise_path`."""
    q, k = NormStats.of(q_norm), NormStats.of(k_norm)
    return (
        k.max_abs > threshold
        or q.rms * k.rms > threshold / PEAK_TO_RMS
        or largest_pair_product(q_norm, k_norm) > threshold / peak_to_pair
    )


@dataclasses.dataclass(frozen=True)
class ConversionLoss:
    """What converting one tensor to a narrower dtype cost.

    ``zeroed``: non-zero values that became 0. ``rounded``: values that changed at all, zeroed ones included.
    ``max_abs``: largest change. ``relative``: L2 norm of the change over that of the tensor.
    """

    zeroed: int
    rounded: int
    size: int
    max_abs: float
    relative: float


@dataclasses.dataclass(frozen=True)
class AttentionWeights:
    """Tensors of one attention layer, in host memory.

    Parameters
    ----------
    layer : int
        Index in the model.
    input_norm : ndarray [H]
        ``input_layernorm.weight``.
    qkv_proj : ndarray [(Hq + 2 Hkv) D, H]
        Rows of ``q_proj``, then ``k_proj``, then ``v_proj``; each [out, in] as in the checkpoint.
    q_norm, k_norm : ndarray [D]
        Per-head norms, shared by all heads.
    o_proj : ndarray [H, Hq D]
        Output projection.
    qkv_bias, o_bias : ndarray [(Hq + 2 Hkv) D], [H], or None
        Biases, if the config has them.
    losses : dict of str to ConversionLoss
        What :meth:`astype` lost, by tensor (``q_proj``, ``k_proj`` and so on); empty if nothing was converted or
        nothing changed.
    """

    layer: int
    input_norm: np.ndarray
    qkv_proj: np.ndarray
    q_norm: np.ndarray
    k_norm: np.ndarray
    o_proj: np.ndarray
    qkv_bias: np.ndarray | None = None
    o_bias: np.ndarray | None = None
    losses: dict[str, ConversionLoss] = dataclasses.field(default_factory=dict)

    @property
    def q_norm_stats(self) -> NormStats:
        """Statistics of ``q_norm``."""
        return NormStats.of(self.q_norm)

    @property
    def k_norm_stats(self) -> NormStats:
        """Statistics of ``k_norm``."""
        return NormStats.of(self.k_norm)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Dtype of the projections."""
        return self.qkv_proj.dtype

    def tensors(self) -> dict[str, np.ndarray]:
        """Return every tensor that is present, by field name."""
        pairs = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: value for name, value in pairs.items() if isinstance(value, np.ndarray)}

    def check(self, config: AttentionConfig) -> None:
        """Raise WeightsError unless every tensor has the shape the config asks for."""
        rows = config.q_size + 2 * config.kv_size
        shapes: dict[str, tuple[int, ...]] = {
            "input_norm": (config.hidden_size,), "qkv_proj": (rows, config.hidden_size), "q_norm": (config.head_dim,),
            "k_norm": (config.head_dim,), "o_proj": (config.hidden_size, config.q_size), "qkv_bias": (rows,),
            "o_bias": (config.hidden_size,),
        }  # fmt: skip
        held = self.tensors()
        for name, tensor in held.items():
            if tensor.shape != shapes[name]:
                raise WeightsError(
                    f"layer {self.layer} {name} has shape {list(tensor.shape)}, the config says {list(shapes[name])}; "
                    "use the config of this checkpoint."
                )
        if {"qkv_bias", "o_bias"} & set(held) != ({"qkv_bias", "o_bias"} if config.attention_bias else set()):
            raise WeightsError(
                f"attention_bias is {config.attention_bias} and the weights hold {sorted(held)}; "
                "build them with this config."
            )

    def astype(self, dtype: Any) -> AttentionWeights:
        """Return the weights in another storage dtype, with what that lost in ``losses``.

        Raises
        ------
        WeightsError
            A value is too large for the dtype.

        Warns
        -----
        PrecisionWarning
            A tensor moved by more than ``LOSS_WARNING`` (relative L2): its values lie below the dtype's range.
        """
        target = storage_dtype(dtype)
        tensors: dict[str, Any] = {}
        losses = dict(self.losses)
        q_rows = self.o_proj.shape[1]
        cuts = [q_rows, (q_rows + len(self.qkv_proj)) // 2]
        for name, tensor in self.tensors().items():
            # q, k and v one by one: what is lost of a small one must not hide behind a large one.
            fused = name.startswith("qkv")
            parts = {f"{p}{name[3:]}": t for p, t in zip("qkv", np.split(tensor, cuts), strict=True)} if fused else {}
            converted = []
            for part_name, part in (parts or {name: tensor}).items():
                result, loss = _convert(f"layer {self.layer} {part_name}", part, target)
                converted.append(result)
                if loss is not None:
                    losses[part_name] = loss
            tensors[name] = np.concatenate(converted) if fused else converted[0]
        return dataclasses.replace(self, **tensors, losses=losses)

    @classmethod
    def from_pretrained(
        cls, path: str | Path, layer: int = 0, *, config: AttentionConfig | None = None, dtype: Any = None
    ) -> AttentionWeights:
        """Read one layer from a model folder; only that layer's tensors are read from disk.

        Parameters
        ----------
        path : str or Path
            Folder with ``config.json`` and ``model.safetensors`` or ``model.safetensors.index.json`` and its shards.
        layer : int
            0-based index.
        config : AttentionConfig, optional
            Instead of the folder's own ``config.json``.
        dtype : str or dtype, optional
            Convert as :meth:`astype`; None keeps the stored dtype.

        Raises
        ------
        FileError
            A file is missing, damaged or not safetensors.
        ConfigError
            The layer is out of range or ``config.json`` is not usable.
        WeightsError
            A tensor is missing, misshapen or of a dtype other than float32, float16, bfloat16.
        """
        folder = Path(path)
        config = AttentionConfig.from_pretrained(folder) if config is None else config
        config.check_layer(layer)
        with _open_checkpoint(folder) as checkpoint:
            weights = cls.from_dict(checkpoint, config, layer=layer)
        return weights if dtype is None else weights.astype(dtype)

    @classmethod
    def from_dict(cls, tensors: Mapping[str, Any], config: AttentionConfig, *, layer: int = 0) -> AttentionWeights:
        """Collect one layer from arrays under their checkpoint names.

        Parameters
        ----------
        tensors : mapping of str to array
            Names as in a checkpoint, ``model.layers.{layer}.self_attn.q_proj.weight`` and so on; the leading
            ``model.`` may be absent, and so may ``layers.{layer}.`` where the dict holds one layer only.
            NumPy, CuPy or DLPack arrays.
        config : AttentionConfig
            Says which shapes to expect and whether there are biases.
        layer : int
            0-based index.

        Raises
        ------
        WeightsError
            A tensor is missing, misshapen or of a dtype other than float32, float16, bfloat16.
        """
        config.check_layer(layer)
        prefix = _find_prefix(tensors, layer)
        rows = {"q": config.q_size, "k": config.kv_size, "v": config.kv_size, "o": config.hidden_size}
        columns = {
            "q": config.hidden_size,
            "k": config.hidden_size,
            "v": config.hidden_size,
            "o": config.q_size,
        }

        def take(name: str, *shape: int) -> np.ndarray:
            return _take(tensors, f"{prefix}{name}", shape)

        norm_sizes = {"input_norm": config.hidden_size, "q_norm": config.head_dim, "k_norm": config.head_dim}
        norms = {
            field: _take_norm(tensors, f"{prefix}{_NORMS[field]}.weight", size) for field, size in norm_sizes.items()
        }
        projections = {p: take(f"self_attn.{p}_proj.weight", rows[p], columns[p]) for p in _PROJECTIONS}
        biases: dict[str, np.ndarray] = {}
        present = [p for p in _PROJECTIONS if f"{prefix}self_attn.{p}_proj.bias" in tensors]
        if config.attention_bias:
            biases = {p: take(f"self_attn.{p}_proj.bias", rows[p]) for p in _PROJECTIONS}
        elif present:
            warnings.warn(
                f"layer {layer} holds biases of {', '.join(f'{p}_proj' for p in present)} but attention_bias is false; "
                "they were ignored, set it to true if the model was trained with them.",
                IgnoredWarning,
                stacklevel=2,
            )
        qkv_bias = _concatenate([biases[p] for p in "qkv"]) if biases else None
        qkv_proj = _concatenate([projections[p] for p in "qkv"])
        return cls(
            layer=layer,
            input_norm=norms["input_norm"],
            qkv_proj=qkv_proj,
            q_norm=norms["q_norm"],
            k_norm=norms["k_norm"],
            o_proj=projections["o"],
            qkv_bias=qkv_bias,
            o_bias=biases.get("o"),
        )

    def to_dict(self, config: AttentionConfig, prefix: str | None = None) -> dict[str, np.ndarray]:
        """Return the tensors under their checkpoint names, ``model.layers.{layer}.`` unless a prefix is given."""
        prefix = f"model.layers.{self.layer}." if prefix is None else prefix
        cuts = [config.q_size, config.q_size + config.kv_size]
        out = {f"{prefix}{name}.weight": getattr(self, field) for field, name in _NORMS.items()}
        parts = [*np.split(self.qkv_proj, cuts), self.o_proj]
        out |= {f"{prefix}self_attn.{p}_proj.weight": w for p, w in zip(_PROJECTIONS, parts, strict=True)}
        if self.qkv_bias is not None and self.o_bias is not None:
            parts = [*np.split(self.qkv_bias, cuts), self.o_bias]
            out |= {f"{prefix}self_attn.{p}_proj.bias": b for p, b in zip(_PROJECTIONS, parts, strict=True)}
        return out


def read_norms(path: str | Path, config: AttentionConfig) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yield (layer, Q-norm weight, K-norm weight) for every layer a checkpoint holds, reading only those."""
    with _open_checkpoint(Path(path)) as checkpoint:
        layer = 0
        while config.num_hidden_layers is None or layer < config.num_hidden_layers:
            try:
                prefix = _find_prefix(checkpoint, layer)
            except WeightsError:
                if config.num_hidden_layers is None and layer:
                    return
                raise
            names = (f"{prefix}self_attn.{n}_norm.weight" for n in "qk")
            q_norm, k_norm = (_take_norm(checkpoint, name, config.head_dim) for name in names)
            yield layer, q_norm, k_norm
            layer += 1


class _Checkpoint(Mapping[str, Any]):
    """The tensors of one or more safetensors files as a lazy mapping; nothing is read before it is asked for."""

    def __init__(self, handles: Mapping[Path, Any], where: Mapping[str, Path]) -> None:
        self._handles, self._where = handles, where

    def __getitem__(self, name: str) -> Any:
        file = self._where[name]
        handle = self._handles[file]
        try:
            if handle.get_slice(name).get_dtype() not in _SAFETENSORS_DTYPES:
                raise WeightsError(
                    f"{name} in {file.name} is stored as {handle.get_slice(name).get_dtype()}; this package reads "
                    f"{', '.join(_SAFETENSORS_DTYPES)}, dequantise the checkpoint first."
                )
            return handle.get_tensor(name)
        except WeightsError:
            raise
        except Exception as error:  # safetensors raises its own class for a lost tensor
            raise FileError(f"{name} cannot be read from {file} ({error}); download the file again.") from None

    def __contains__(self, name: object) -> bool:
        return name in self._where  # Mapping's own would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


_SAFETENSORS_DTYPES = ("F32", "F16", "BF16")


@contextlib.contextmanager
def _open_checkpoint(folder: Path) -> Iterator[_Checkpoint]:
    """Open every shard of a model folder (or one .safetensors file) and map tensor names to them."""
    import safetensors

    index = _read_index(folder)
    with contextlib.ExitStack() as stack:
        handles: dict[Path, Any] = {}
        where: dict[str, Path] = {}
        for file, names in index.items():
            try:
                handle = stack.enter_context(safetensors.safe_open(file, framework="np"))
            except FileNotFoundError:
                raise FileError(f"{file} does not exist; download the missing shard.") from None
            except Exception as error:  # SafetensorError, OSError: a damaged or foreign file
                raise FileError(f"{file} is not a readable safetensors file ({error}); download it again.") from None
            held = set(handle.keys())
            lost = sorted(set(names or ()) - held)
            if lost:
                raise FileError(f"{INDEX_NAME} places {lost[0]} in {file.name}, which does not hold it; "
                                "download both files again.")  # fmt: skip
            handles[file] = handle
            where.update(dict.fromkeys(names or held, file))
        yield _Checkpoint(handles, where)


def _read_index(folder: Path) -> dict[Path, list[str] | None]:
    """Return the safetensors files of a model and the names the index places in each (None: whatever it holds)."""
    if folder.is_file():
        return {folder: None}
    if not folder.is_dir():
        raise FileError(f"{folder} does not exist; name a model folder.")
    index_file = folder / INDEX_NAME
    if not index_file.exists():
        if not (folder / SINGLE_NAME).exists():
            raise FileError(
                f"{folder} holds neither {SINGLE_NAME} nor {INDEX_NAME}; name a folder with safetensors weights."
            )
        return {folder / SINGLE_NAME: None}
    try:
        weight_map = json.loads(index_file.read_text(encoding="utf-8"))["weight_map"]
        files: dict[Path, list[str] | None] = {}
        for name, shard in weight_map.items():
            if Path(shard).name != shard:
                raise ValueError(f"shard {shard!r} is not a plain file name")
            names = files.setdefault(folder / shard, [])
            assert names is not None
            names.append(name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FileError(f"{index_file} is not a safetensors index ({error}); download it again.") from None
    return files


def _find_prefix(tensors: Mapping[str, Any], layer: int) -> str:
    """Return what stands before ``self_attn.`` in the names of one layer."""
    candidates = [f"{head}layers.{layer}." for head in ("model.", "", "model.language_model.")]
    for prefix in [*candidates, ""]:
        if f"{prefix}self_attn.k_proj.weight" in tensors or f"{prefix}self_attn.q_proj.weight" in tensors:
            return prefix
    raise WeightsError(
        f"{candidates[0]}self_attn.q_proj.weight is missing among {len(tensors)} tensors; "
        f"check that the checkpoint is a Qwen3 model and holds layer {layer}."
    )


def _take(tensors: Mapping[str, Any], name: str, shape: tuple[int, ...]) -> np.ndarray:
    if name not in tensors:
        raise WeightsError(f"{name} is missing from the weights; check that the checkpoint is a whole Qwen3 model.")
    tensor = to_numpy(as_array(name, tensors[name]))
    if tensor.shape != shape:
        raise WeightsError(
            f"{name} has shape {list(tensor.shape)}, the config says {list(shape)}; use the config of this checkpoint."
        )
    if tensor.dtype not in STORAGE_DTYPES.values():
        raise WeightsError(f"{name} has dtype {tensor.dtype}; convert it to one of {', '.join(STORAGE_DTYPES)}.")
    return tensor


def _take_norm(tensors: Mapping[str, Any], name: str, size: int) -> np.ndarray:
    weight = _take(tensors, name, (size,))
    if not np.isfinite(weight.astype(np.float32)).all():
        raise WeightsError(f"{name} holds NaN or Inf; download the checkpoint again.")
    return weight


def _concatenate(parts: list[np.ndarray]) -> np.ndarray:
    """Join along rows; parts of unlike dtypes meet in float32, which holds both 16-bit dtypes exactly."""
    if len({part.dtype for part in parts}) > 1:
        parts = [part.astype(np.float32) for part in parts]
    return np.concatenate(parts)


def _convert(name: str, tensor: np.ndarray, target: np.dtype[Any]) -> tuple[np.ndarray, ConversionLoss | None]:
    """Convert one tensor; raise on overflow, return what was lost, warn if that is more than rounding."""
    if tensor.dtype == target:
        return tensor, None
    with np.errstate(over="ignore"):
        converted = tensor.astype(target)
    before, after = tensor.astype(np.float32), converted.astype(np.float32)
    over = np.isfinite(before) & ~np.isfinite(after)
    if over.any():
        raise WeightsError(
            f"{name}: {int(over.sum())} of {tensor.size} values do not fit {target} (largest magnitude "
            f"{float(np.abs(before[over]).max()):.6g}); use dtype bfloat16 or float32."
        )
    change = np.abs(after - before)
    if not change.any():
        return converted, None
    norm = float(np.linalg.norm(before.ravel()))
    loss = ConversionLoss(
        zeroed=int(((after == 0) & (before != 0)).sum()),
        rounded=int((change > 0).sum()),
        size=tensor.size,
        max_abs=float(change.max()),
        relative=float(np.linalg.norm(change.ravel())) / norm,
    )
    limit = max(LOSS_WARNING, float(_half_ulp(target)))
    if loss.relative > limit:
        warnings.warn(
            f"{name}: converting {tensor.dtype} to {target} set {loss.zeroed} of {loss.size} values to zero and moved "
            f"the tensor by {loss.relative:.2g} (relative L2); use dtype bfloat16 or float32.",
            PrecisionWarning,
            stacklevel=4,
        )
    return converted, loss


def _half_ulp(dtype: np.dtype[Any]) -> float:
    """Return the largest relative rounding error of a normal number."""
    return {"float16": 2.0**-11, "bfloat16": 2.0**-8}.get(dtype.name, 2.0**-24)
