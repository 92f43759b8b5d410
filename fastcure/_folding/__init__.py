"""Batch norms folded into the layer before, and ReLUs fused with the sum before them: `fastcure.prepare`."""
