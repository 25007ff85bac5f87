"""Exceptions and warnings: each message is one sentence with the values and what to do."""

from __future__ import annotations


class CupyAttnError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(CupyAttnError, ValueError):
    """A ``config.json`` value is missing, unknown, or contradicts another."""


class WeightsError(CupyAttnError, ValueError):
    """A tensor is missing, misshapen, of a wrong dtype, or does not survive a conversion."""


class InputError(CupyAttnError, ValueError):
    """An argument of a call has a wrong shape, dtype, device or value."""


class CacheError(CupyAttnError, ValueError):
    """A KV cache is full, or belongs to another layer, config, dtype or device."""


class FileError(CupyAttnError, OSError):
    """A file is missing, damaged, of another format, or cannot be written."""


class DeviceError(CupyAttnError, RuntimeError):
    """No usable GPU, or no kernel for this GPU or this shape."""


class KernelBuildError(CupyAttnError, RuntimeError):
    """A CUDA source did not compile; the message carries NVRTC's log."""


class CupyAttnWarning(UserWarning):
    """Base of every warning this package gives."""


class PrecisionWarning(CupyAttnWarning):
    """A conversion lost more than rounding."""


class IgnoredWarning(CupyAttnWarning):
    """Something in a checkpoint or config was ignored on purpose."""


class SlowPathWarning(CupyAttnWarning):
    """A layer runs as separate array operations because no kernel takes it."""
