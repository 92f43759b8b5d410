"""Measures of a classifier's curvature in its input, sample by sample, with what they bound and a picture of it."""

from fastcure.analysis.bounds import Bounds, quadratic_bounds, robustness_bounds
from fastcure.analysis.curve import AccuracyCurve, accuracy_curve
from fastcure.analysis.norms import FrobeniusNorm, GradientCurvature, curvature_along_gradient, frobenius_norm
from fastcure.analysis.profile import CurvatureProfile, curvature_profile
from fastcure.analysis.surface import LossSurface, loss_surface

__all__ = [
    "AccuracyCurve",
    "Bounds",
    "CurvatureProfile",
    "FrobeniusNorm",
    "GradientCurvature",
    "LossSurface",
    "accuracy_curve",
    "curvature_along_gradient",
    "curvature_profile",
    "frobenius_norm",
    "loss_surface",
    "quadratic_bounds",
    "robustness_bounds",
]
