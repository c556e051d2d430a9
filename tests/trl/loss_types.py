"""TRL's loss types, and the aggregation of ours that is the same."""

AGGREGATIONS = {
    "grpo": "seq_mean_token_mean",
    "bnpo": "token_mean",
    "dr_grpo": "fixed",
    "dapo": "token_mean",
    "luspo": "seq_mean_token_sum",
}
# These two have losses of their own besides.
OWN = {"cispo": "token_mean", "sapo": "seq_mean_token_mean"}
