"""Counters of arithmetic and memory traffic."""
