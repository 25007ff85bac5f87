"""Activations, dumps and caches as files: read with every check, written whole or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .arrays import BFLOAT16, STORAGE_DTYPES, to_numpy
from .cache import KVCache
from .config import AttentionConfig
from .errors import CacheError, ConfigError, FileError, InputError
from .layer import Attention
from .reference import STAGES

FORMATS = (".npy", ".npz", ".safetensors")
HIDDEN_NAMES = ("hidden_states", "x", "input")
"""Names under which the activations of a file with several arrays are looked for."""

POSITIONS, OUTPUT = "positions", "y"
CACHE_FORMAT, DUMP_FORMAT = "cupy_attn cache 1", "cupy_attn dump 1"


@dataclasses.dataclass(frozen=True)
class Dump:
    """Activations of one layer: what went in, and, as far as they were kept, the stages and what came out.

    ``hidden_states`` is [B, S, H], also where the file has one sequence without a batch axis (``batched`` False);
    ``positions`` [S] or [B, S] or None; ``stages`` holds what of ``reference.STAGES`` and ``y`` the file has, with a
    batch axis; ``metadata`` its strings.
    """

    hidden_states: np.ndarray
    batched: bool
    positions: np.ndarray | None
    stages: dict[str, np.ndarray]
    metadata: dict[str, str]


def load_arrays(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Read every array of a .npy, .npz or .safetensors file, and the metadata of the last.

    The one array of a .npy is named ``hidden_states``. Pickled data is refused, never loaded. A 2-byte void dtype,
    which is how NumPy stores bfloat16, is read as bfloat16.

    Raises
    ------
    FileError
        The file is missing, damaged, of another format, or pickled.
    """
    path = Path(path)
    if path.suffix not in FORMATS:
        raise FileError(f"{path} is none of {', '.join(FORMATS)}; convert it to one of them.")
    if not path.is_file():
        raise FileError(f"{path} does not exist; check the name.")
    try:
        if path.suffix == ".safetensors":
            return _load_safetensors(path)
        arrays = _load_npy(path) if path.suffix == ".npy" else _load_npz(path)
    except FileError:
        raise
    except Exception as error:  # NumPy and zipfile raise a dozen classes for a damaged file; MemoryError for its sizes
        if isinstance(error, ValueError) and "Object arrays" in str(error):
            raise FileError(
                f"{path} holds pickled objects, which can run code and are never loaded; save a plain float array."
            ) from None
        reason = (str(error).splitlines() or [type(error).__name__])[0]  # NumPy's advice below it is to allow pickles
        raise FileError(f"{path} is not a readable {path.suffix} file ({reason}); write it again.") from None
    return {name: a.view(BFLOAT16) if a.dtype == np.dtype("V2") else a for name, a in arrays.items()}, {}


def _load_npy(path: Path) -> dict[str, np.ndarray]:
    with open(path, "rb") as file:
        return {HIDDEN_NAMES[0]: _read_npy(file)}


def _load_npz(path: Path) -> dict[str, np.ndarray]:
    arrays = {}
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            with archive.open(name) as file:
                arrays[name.removesuffix(".npy")] = _read_npy(file)
    return arrays


def _read_npy(file: Any) -> np.ndarray:
    array: np.ndarray = np.lib.format.read_array(file, allow_pickle=False)
    if file.read(1):
        raise ValueError(f"it goes on after the {list(array.shape)} its header says")
    return array


def _load_safetensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    import safetensors

    try:
        with safetensors.safe_open(path, framework="np") as handle:
            return {name: handle.get_tensor(name) for name in handle.keys()}, handle.metadata() or {}  # noqa: SIM118
    except Exception as error:  # SafetensorError for a header that lies, OSError, TypeError for a foreign dtype
        raise FileError(f"{path} is not a readable .safetensors file ({error}); write it again.") from None


def load_dump(path: str | Path, key: str | None = None) -> Dump:
    """Read activations, with positions and stages if the file has them.

    Parameters
    ----------
    path : str or Path
        .npy, .npz or .safetensors.
    key : str, optional
        Name of the activations; default: one of ``HIDDEN_NAMES``, or the only array.

    Raises
    ------
    FileError
        The file is not readable or holds no activations.
    InputError
        The activations are not [tokens, hidden] or [batch, tokens, hidden] floats.
    """
    arrays, metadata = load_arrays(path)
    if not arrays:
        raise FileError(f"{path} holds no arrays; write it again.")
    if key is None:
        key = next((name for name in HIDDEN_NAMES if name in arrays), None)
        if key is None and len(arrays) == 1:
            key = next(iter(arrays))
    if key is None or key not in arrays:
        wanted = "none is named " + " or ".join(HIDDEN_NAMES) if key is None else f"none is named {key}"
        raise FileError(f"{path} holds {_listed(arrays)}, {wanted}; name the activations with --key.")
    hidden = check_activations(f"{path}: {key}", arrays[key])
    batched = arrays[key].ndim == 3
    stages = {name: arrays[name] for name in (*STAGES, OUTPUT) if name in arrays and name != key}
    if not batched:
        stages = {name: stage[None] for name, stage in stages.items()}
    return Dump(hidden, batched, arrays.get(POSITIONS), stages, metadata)


def check_activations(name: str, x: np.ndarray, hidden_size: int | None = None) -> np.ndarray:
    """Return activations as [B, S, H] after checking shape, dtype, width and that every value is finite."""
    if x.ndim not in (2, 3):
        raise InputError(
            f"{name} has shape {list(x.shape)}; activations are [tokens, hidden] or [batch, tokens, hidden]."
        )
    if x.dtype not in (*STORAGE_DTYPES.values(), np.dtype(np.float64)):
        raise InputError(f"{name} is {x.dtype}; save it as float16, bfloat16, float32 or float64.")
    if x.size == 0:
        raise InputError(f"{name} has shape {list(x.shape)} and holds no token; save at least one.")
    if hidden_size is not None and x.shape[-1] != hidden_size:
        raise InputError(
            f"{name} has rows of {x.shape[-1]}, the model's hidden_size is {hidden_size}; "
            "take activations of this model."
        )
    rows = x.reshape(-1, x.shape[-1])
    bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    if bad.size:
        first = int(bad[0])
        row = f"row {first}" if x.ndim == 2 else f"batch {first // x.shape[1]} token {first % x.shape[1]}"
        what = "NaN" if np.isnan(rows[first]).any() else "Inf"
        raise InputError(f"{name} holds {what} first in {row} ({bad.size} rows in all); dump the activations again.")
    return x[None] if x.ndim == 2 else x


def check_stages(
    stages: Mapping[str, np.ndarray], config: AttentionConfig, batch: int, seq: int
) -> Mapping[str, np.ndarray]:
    """Return a dump's stages after checking that each holds numbers in the layer's shape."""
    hidden, rows = (batch, seq, config.hidden_size), (batch, config.num_attention_heads, seq)
    q, kv = (batch, seq, rows[1], config.head_dim), (batch, seq, config.num_key_value_heads, config.head_dim)
    shapes = {"input_norm": hidden, "q": q, "k": kv, "v": kv, "q_norm": q, "k_norm": kv, "q_rope": q, "k_rope": kv,
              "scores": (*rows, seq), "row_max": rows, "lse": rows, "probs": (*rows, seq), "attention": q,
              "output": hidden, OUTPUT: hidden}  # fmt: skip
    for name, stage in stages.items():
        if stage.shape != shapes[name] or (stage.dtype.kind not in "fiu" and stage.dtype != BFLOAT16):
            raise InputError(
                f"the dump's {name} has shape {list(stage.shape)} and dtype {stage.dtype}, the layer gives floats of "
                f"shape {list(shapes[name])}; dump it again, from this layer."
            )
    return stages


def save_arrays(path: str | Path, arrays: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> None:
    """Write arrays as .npy (exactly one), .npz or .safetensors; the file appears whole or not at all.

    bfloat16 goes into .npy and .npz as float32, which holds it exactly, since NumPy's formats do not know it.

    Raises
    ------
    FileError
        The place cannot be written, the disk is full, or the suffix is unknown.
    """
    path = check_output(path, len(arrays))
    host = {name: np.ascontiguousarray(to_numpy(a)) for name, a in arrays.items()}
    if path.suffix == ".safetensors":
        import safetensors.numpy

        data = safetensors.numpy.save(host, dict(metadata or {}))
        write_whole(path, lambda file: file.write(data))
        return
    plain = {name: a.astype(np.float32) if a.dtype == BFLOAT16 else a for name, a in host.items()}
    if path.suffix == ".npy":
        write_whole(path, lambda file: np.save(file, next(iter(plain.values())), allow_pickle=False))
    else:
        write_whole(path, lambda file: np.savez(file, **plain))  # type: ignore[arg-type]


def check_output(path: str | Path, count: int = 1) -> Path:
    """Return the path after checking, before any work is done, that ``count`` arrays can be written there."""
    path = Path(path)
    if path.suffix not in FORMATS:
        raise FileError(f"{path} is none of {', '.join(FORMATS)}; choose one of these endings.")
    if path.suffix == ".npy" and count != 1:
        raise FileError(f"{path} would hold {count} arrays and a .npy holds one; use .npz or .safetensors.")
    check_place(path)
    return path


def check_place(path: Path) -> None:
    """Check, before any work is done, that a file can be written there."""
    if path.is_dir():
        raise FileError(f"{path} is a folder; name a file.")
    if not path.absolute().parent.is_dir():
        raise FileError(f"{path.parent} does not exist; make the folder first.")
    if not os.access(path.absolute().parent, os.W_OK):
        raise FileError(f"{path.parent} is not writable; name another place.")


def write_whole(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then rename it; on any failure remove it again."""
    path = path.absolute()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise FileError(
            f"{path} cannot be written ({error.strerror or error}); nothing was written, name another place or free "
            "space."
        ) from None
    finally:  # after Ctrl-C too; once renamed there is nothing to remove
        with contextlib.suppress(OSError):
            temporary.unlink()


def save_cache(path: str | Path, cache: KVCache) -> None:
    """Write a cache as .safetensors, with the config and layer it belongs to.

    Raises
    ------
    FileError
        The place cannot be written.
    """
    metadata = {
        "format": CACHE_FORMAT,
        "layer": str(cache.layer),
        "config": json.dumps(cache.config.to_dict()),
    }
    save_arrays(check_cache_path(path), cache.state(), metadata)


def load_cache(path: str | Path, layer: Attention, room: int) -> KVCache:
    """Read a cache for a layer, with room for ``room`` more tokens in each sequence.

    Raises
    ------
    FileError
        The file is not a cache.
    CacheError
        It is of another config, layer or dtype.
    """
    arrays, metadata = load_arrays(check_cache_path(path))
    wanted = {"k", "v", POSITIONS, "lengths"}
    if metadata.get("format") != CACHE_FORMAT or not wanted <= set(arrays):
        raise FileError(f"{path} is not a cache of this package; give one that --cache-out wrote.")
    try:
        stored_config = AttentionConfig.from_dict(json.loads(metadata["config"]))
        stored_layer = int(metadata["layer"])
    except (KeyError, TypeError, ValueError, ConfigError) as error:
        raise FileError(f"{path} is a damaged cache ({error}); write it again.") from None
    k = arrays["k"]
    if any(arrays[name].dtype.kind not in "iu" for name in (POSITIONS, "lengths")):
        raise CacheError(f"{path}: positions and lengths are not integers; the file is damaged, write it again.")
    if k.ndim != 4 or k.shape[0] < 1 or k.dtype not in STORAGE_DTYPES.values():
        raise CacheError(
            f"{path}: k has shape {list(k.shape)} and dtype {k.dtype}; the file is damaged, write it again."
        )
    stored = KVCache(stored_config, stored_layer, batch=k.shape[0], capacity=1, dtype=k.dtype)
    stored.check_config(layer.config, layer.layer, layer.dtype)
    cache = layer.new_cache(k.shape[0], k.shape[1] + room)
    cache.restore(arrays)
    return cache


def check_cache_path(path: str | Path) -> Path:
    """Return the path if it ends in .safetensors, the only format that keeps a cache's config."""
    if Path(path).suffix != ".safetensors":
        raise FileError(f"{path} does not end in .safetensors; caches are kept in that format only.")
    return Path(path)


@contextlib.contextmanager
def new_folder(path: Path, *, replaceable: re.Pattern[str] | None = None) -> Iterator[Path]:
    """Give a temporary folder to fill, which becomes ``path`` at the end and is removed on any failure.

    A folder that is already there must be empty, or hold nothing but files whose names match ``replaceable``; these
    are replaced one by one and the folder stays: it may be the current one, or a mount point.
    """
    if path.exists() and not path.is_dir():
        raise FileError(f"{path} is a file; name a folder.")
    held = sorted(p.name for p in path.iterdir()) if path.is_dir() else []
    if held and replaceable is None:
        raise FileError(f"{path} exists and is not empty; name another folder, or pass --force to replace a demo.")
    foreign = [name for name in held if replaceable is not None and not replaceable.fullmatch(name)]
    if foreign:
        raise FileError(f"{path} holds {foreign[0]}, which is not part of a demo; name another folder.")
    there = path.is_dir()
    try:
        place = path.absolute() if there else path.absolute().parent
        place.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=place))
    except OSError as error:
        raise FileError(f"{path} cannot be made ({error.strerror or error}); name another place.") from None
    try:
        yield temporary
        if there:
            new = {file.name for file in temporary.iterdir()}
            for name in new:
                os.replace(temporary / name, path / name)
            for name in set(held) - new:
                (path / name).unlink()
        else:
            os.chmod(temporary, 0o755)
            os.replace(temporary, path)
    except OSError as error:
        if isinstance(error, FileError):
            raise
        raise FileError(f"{path} cannot be written ({error.strerror or error}); name another place.") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _listed(arrays: Mapping[str, Any]) -> str:
    names = sorted(arrays)
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
