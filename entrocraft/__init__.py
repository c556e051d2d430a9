"""Entropy control for RL of language models: schedules, predicted entropy change, rejection rules, controller."""
