"""Objectives of a training step."""
