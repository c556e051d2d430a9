"""`entrocraft eval`: measures a model on held-out problems, and goes on where it was stopped.

    entrocraft eval runs/qwen3_4b
    entrocraft eval runs/qwen3_4b --data amc23.jsonl --samples 32 --pass-at 1 8 32 --temperature 0.6 --top-p 0.95
    entrocraft eval Qwen/Qwen3-4B --config train/configs/evaluation.yaml --evaluation.samples=64

The first argument is the folder of a run that has ended or was stopped, or a model: a folder with safetensors or a hub
id. Any setting of the trainer may follow, as on its command line. Results go to `eval/` in the run's folder, or to
`--out`: `results.json`, `pass_at_k.png`, `samples.jsonl`, and `<set>.jsonl` with a line for each batch of problems,
from which a stopped evaluation goes on; what it gives then is what it would have given. It is one process: with vLLM
and `--evaluation.entropy false` the model is in memory once, in vLLM's.
"""

from __future__ import annotations

import argparse
import json
import os
import zlib
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from entrocraft.train.config import Config
from entrocraft.train.config_evaluation import ks
from entrocraft.train.config_reader import load_config, to_dict
from entrocraft.train.engines import build_engine
from entrocraft.train.eval_figure import plot_pass_at_k
from entrocraft.train.eval_record import Record
from entrocraft.train.eval_statistics import summarise
from entrocraft.train.evaluation import evaluate, spread_out
from entrocraft.train.parallel import local_device
from entrocraft.train.policy import Policy, choose_device
from entrocraft.train.problem_sets import DEFAULT_SET, load_held_out
from entrocraft.train.rewards import RewardPool
from entrocraft.train.run import EVALUATE
from entrocraft.train.sharding import compute_dtype
from entrocraft.train.stored_policy import StoredPolicy

# Settings of `data` that say how a held-out set is read: any, and that of `data.eval`.
_READING = (
    *("prompt_field", "answer_field", "answer_pattern", "prompt_template"),
    *("chat_template", "max_prompt_tokens", "on_long", "on_missing"),
)
_READING_DEFAULT = ("eval", "eval_split", "subset", "revision", "system", "limit")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="entrocraft eval", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="folder of a run, folder of a model, or hub id of a model")
    parser.add_argument("--data", help="the same as --data.eval: evaluate on this set")
    parser.add_argument("--set", action="append", default=[], metavar="NAME", help="only this set; may be repeated")
    parser.add_argument("--samples", type=int, help="n, responses per problem")
    parser.add_argument("--pass-at", type=int, nargs="+", metavar="K", help="the k of pass@k")
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="folder to write into (default: eval/ in the run's folder)")
    parser.add_argument("--again", action="store_true", help="set results of other settings aside and start over")
    return parser


def _configuration(options: argparse.Namespace, extra: Sequence[str]) -> tuple[Config, Path]:
    """The configuration, with the model in it, and the folder to write into."""
    folder = Path(options.model).expanduser()
    if (folder / "config.yaml").is_file():
        model, out = folder / "model", folder / "eval"
        if not model.is_dir():
            raise FileNotFoundError(f"{model}: no such folder; a run writes it when it ends or is stopped")
        arguments = ["--config", str(folder / "config.yaml"), *extra, "--model.path", str(model)]
    else:
        if options.out is None:
            raise ValueError(f"{options.model!r} is not the folder of a run: say with --out DIR where results go")
        out, arguments = options.out, [*extra, "--model.path", options.model]
    given = {
        "data.eval": options.data,
        "evaluation.samples": options.samples,
        "evaluation.pass_at": options.pass_at,
        "evaluation.temperature": options.temperature,
        "evaluation.top_p": options.top_p,
        "evaluation.top_k": options.top_k,
    }
    arguments += [f"--{name}={value}" for name, value in given.items() if value is not None]
    return load_config(arguments), options.out or out


def _identity(config: Config, seed: int, name: str) -> dict[str, Any]:
    """What two halves of one evaluation must share: the model, by its files, and every setting that counts."""
    assert config.model.path is not None
    folder = Path(config.model.path).expanduser()
    files = {p.name: [p.stat().st_size, p.stat().st_mtime_ns] for p in sorted(folder.glob("*.safetensors"))}
    settings = to_dict(config)
    groups = {key: settings[key] for key in ("evaluation", "reward", "sampling", "model")}
    read = (*_READING, *_READING_DEFAULT) if name == DEFAULT_SET else _READING
    groups["data"] = {key: settings["data"][key] for key in read}
    for unread in ("pass_at", "bootstrap", "every", "at_prompts", "saved_samples", "saved_samples_every"):
        del groups["evaluation"][unread]
    groups["param_dtype"] = config.parallel.param_dtype
    groups["evaluation"]["sets"] = {name: groups["evaluation"]["sets"].get(name)}
    del groups["reward"]["workers"]
    return {"set": name, "seed": seed, "model_files": files, **groups}


def _show(summaries: dict[str, dict[str, Any]], console: Console) -> None:
    """Prints the table, in percent: a column a set; mean@n and each pass@k, its interval below."""
    keys = list(dict.fromkeys(key for s in summaries.values() for key in s if key == "accuracy" or "pass_at_" in key))
    others = list(dict.fromkeys(key for s in summaries.values() for key in s if key.endswith("_accuracy")))
    table = Table("percent", *summaries)

    def cell(summary: dict[str, Any], key: str) -> str:
        if key not in summary:
            return ""
        low, high = summary["intervals"].get(key, (None, None))
        interval = "" if low is None else f"\n{100 * low:.1f}-{100 * high:.1f}"
        return f"{100 * summary[key]:.1f}{interval}"

    table.add_row("problems x n", *(f"{s['problems']} x {s['samples']}" for s in summaries.values()), end_section=True)
    for key in ("accuracy", *others, *(key for key in keys if key != "accuracy")):
        name = {"accuracy": "mean@n"}.get(key, key.replace("_at_", "@").replace("_accuracy", ", mean@n"))
        table.add_row(name, *(cell(summary, key) for summary in summaries.values()))
    console.print(table)


def load_policy(config: Config) -> Policy:
    """The model in what `parallel.param_dtype` says; its weights stay in their files where nothing computes with them
    here, which is with vLLM and without `evaluation.entropy`."""
    device = local_device(choose_device(config.device))
    if config.engine.name != "hf" and not config.evaluation.entropy:
        return StoredPolicy(config.model, device)
    return Policy.load(
        config.model,
        temperature=config.sampling.temperature,
        device=device,
        seed=config.seed,
        dtype=compute_dtype(config.parallel, device=device, pretrained=True),
    )


def refuse_torchrun() -> None:
    """Raises ValueError in one of several processes: each would do all of it, and write the same files."""
    size = os.environ.get("WORLD_SIZE", "1")
    if int(size) > 1:
        raise ValueError(
            f"WORLD_SIZE = {size}: `entrocraft eval` is one process, expected 1. Start it without torchrun; for a "
            "model that does not fit on one device start `entrocraft serve MODEL --tensor-parallel-size N` and "
            "evaluate with --engine.name vllm_server --evaluation.entropy false"
        )


def run_evaluation(config: Config, out: Path, *, seed: int, only: Sequence[str], again: bool) -> dict[str, Any]:
    """Evaluates every held-out set of the configuration, or those in `only`; returns summaries by set.

    Raises ValueError where there is no such set, nothing to evaluate on, or results of other settings in `out`.
    """
    policy = load_policy(config)
    held_out = load_held_out(config, policy.tokenizer, context=policy.context)
    names = [held.name for held in held_out]
    if not names:
        raise ValueError(
            "nothing to evaluate on: neither data.eval nor evaluation.sets is given; try --data FILE.jsonl"
        )
    if unknown := sorted(set(only) - set(names)):
        raise ValueError(f"--set {unknown[0]}: no such set; there are {names}")
    summaries: dict[str, Any] = {}
    with RewardPool.of(config.reward) as pool, closing(build_engine(config, policy)) as engine:
        engine.publish(0)
        for held in held_out:
            if only and held.name not in only:
                continue
            with Record(out, held.name, _identity(config, seed, held.name), again=again) as record:
                # By its name, so that the random numbers of a set do not depend on which others there are.
                stream = (seed, EVALUATE, zlib.crc32(held.name.encode()))
                batches = evaluate(policy, engine, held, pool, config, stream=stream, first=len(record.outcomes))
                for outcomes, samples in batches:
                    record.add(outcomes, spread_out(samples, config.evaluation.saved_samples))
            pass_at = ks(held.samples, config.evaluation.pass_at)
            summary = summarise(record.outcomes, pass_at, bootstrap=config.evaluation.bootstrap)
            summaries[held.name] = {**summary, "dropped": held.dropped}
    return summaries


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry; returns 0."""
    options, extra = _parser().parse_known_args(argv)
    refuse_torchrun()
    config, out = _configuration(options, extra)
    out.mkdir(parents=True, exist_ok=True)
    summaries = run_evaluation(config, out, seed=options.seed, only=options.set, again=options.again)
    evaluation = asdict(config.evaluation)
    settings = {key: evaluation[key] for key in ("temperature", "top_p", "top_k", "max_response_tokens")}
    settings |= {"model": config.model.path, "seed": options.seed, "reward": config.reward.name}
    results = out / "results.json"
    results.write_text(json.dumps({**settings, "sets": summaries}, indent=1) + "\n")
    plot_pass_at_k(summaries, out / "pass_at_k.png", title=Path(options.model).name)
    _show(summaries, Console())
    print(results)
    return 0
