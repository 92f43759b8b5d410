"""Warnings that name the line of the caller's code, however deep in the library they arise."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import warnings

import torch

TORCH = os.path.dirname(torch.__file__) + os.sep
_PASSED_BY = (os.path.dirname(os.path.dirname(__file__)) + os.sep, TORCH, contextlib.__file__, functools.__file__)


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Issue a warning in the name of the innermost code outside of fastcure and torch."""
    level, frame = 1, sys._getframe()
    while frame.f_back and frame.f_code.co_filename.startswith(_PASSED_BY):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)
