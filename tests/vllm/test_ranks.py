"""Two processes under torchrun, each with vLLM inside."""

import json
import os
import subprocess
import sys
from pathlib import Path

from vllm_kit import PROMPTS

HERE = Path(__file__).parent


def test_two_ranks_sample_from_their_own_weights(tmp_path):
    launcher = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(HERE), "PYTHONWARNINGS": "ignore"}
    command = [*launcher, str(HERE / "ranks.py"), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for rank in range(2):
        answer = json.loads((tmp_path / f"{rank}.json").read_text())
        assert max(answer["differences"]) < 5e-5
        assert answer["version"] == 2
        assert [tuple(prompt) for prompt in answer["prompts"]] == PROMPTS[2 * rank : 2 * rank + 2]
        assert answer["sum"] == 1
