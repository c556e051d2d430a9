"""The lean trainer: sample, reward, score, decide, update, evaluate, save."""
