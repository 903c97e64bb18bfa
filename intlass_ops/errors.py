"""The errors intlass_ops raises beyond ValueError and TypeError for bad arguments.

One class for each thing a caller may want to catch; the message says what to do about it.
"""

from __future__ import annotations


class IntlassError(RuntimeError):
    """Base of every error below.

    >>> issubclass(FallbackError, IntlassError) and issubclass(IntlassError, RuntimeError)
    True
    """


class BackendUnavailableError(IntlassError):
    """CuPy, NVRTC, the CUDA headers, the driver or a supported GPU is missing."""


class KernelCompileError(IntlassError):
    """NVRTC refused a kernel. The message carries its log, the config and the architecture."""


class KernelNotReadyError(IntlassError):
    """A kernel would have to be compiled or loaded while a CUDA graph is being captured."""


class KernelLaunchError(IntlassError):
    """The driver refused a launch, or it was attempted where CUDA cannot work (after a fork)."""


class FallbackError(IntlassError):
    """Inside ``strict()``, something would have run without our kernels."""
