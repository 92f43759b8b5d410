"""Measuring a trained network: `fastcure evaluate`."""
