"""Fused linear head: per-token log-probability and full-vocabulary entropy without the logits."""
