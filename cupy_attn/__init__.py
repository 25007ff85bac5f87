"""One Qwen3 attention layer, whole, on CUDA through CuPy or on the CPU through NumPy, without PyTorch."""

from .accuracy import check_collapse, max_error, relative_l2
from .cache import KVCache
from .config import AttentionConfig, RopeConfig
from .errors import (
    CacheError,
    ConfigError,
    CupyAttnError,
    CupyAttnWarning,
    DeviceError,
    FileError,
    IgnoredWarning,
    InputError,
    KernelBuildError,
    PrecisionWarning,
    SlowPathWarning,
    WeightsError,
)
from .layer import Attention, forward
from .ops import apply_rope, gqa_attention, project_output, project_qkv, qk_norm, rms_norm, split_heads
from .rope import inverse_frequencies, rope_angles
from .warmup import build_at_import as _build_at_import
from .weights import AttentionWeights, NormStats

__version__ = "0.1.0"

__all__ = [
    "Attention",
    "AttentionConfig",
    "AttentionWeights",
    "CacheError",
    "ConfigError",
    "CupyAttnError",
    "CupyAttnWarning",
    "DeviceError",
    "FileError",
    "IgnoredWarning",
    "InputError",
    "KVCache",
    "KernelBuildError",
    "NormStats",
    "PrecisionWarning",
    "RopeConfig",
    "SlowPathWarning",
    "WeightsError",
    "apply_rope",
    "check_collapse",
    "forward",
    "gqa_attention",
    "inverse_frequencies",
    "max_error",
    "project_output",
    "project_qkv",
    "qk_norm",
    "relative_l2",
    "rms_norm",
    "rope_angles",
    "split_heads",
]

_build_at_import()
