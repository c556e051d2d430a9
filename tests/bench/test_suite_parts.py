"""The suite's parts: its data, its truth, its clock, its scales; a contender with a wrong answer is refused."""

import dataclasses
import functools
import math

import pytest
import rivals_trl
import torch
from bench_policy_loss import CALLS as POLICY_LOSS
from bench_scoring import CALLS as SCORING
from rivals import ALWAYS, Answer, all_rivals, run
from rivals_trl import chunked_setting, trainers_chunk
from suite_cases import HEADS, JOBS, Shape, make_operands, shapes
from suite_contest import Clock, Contender, Measured, compete, complaint, machine_rates, same_bits
from suite_errors import Truth, bounds
from suite_rates import Work, derived
from suite_watch import Stopwatch, Thunk

from entrocraft.kernels import linear_logprob_entropy_reference

SHAPE = Shape(48, 64, 600)
RIVALS = {rival.name: rival for rival in all_rivals()}


@pytest.mark.parametrize("V", [2_000, 20_000, 151_936])
def test_peaked_data_is_as_peaked_as_a_language_model(V):
    case, _ = make_operands(Shape(192, 256, V), JOBS["statistics"], "peaked", device="cpu", dtype=torch.float32)
    logit_TV = case.hidden_TH @ case.weight_VH.T
    logp_TV = logit_TV.log_softmax(1)
    entropy = float(-(logp_TV.exp() * logp_TV).sum(1).mean())
    assert 0.3 < entropy < 1.5
    assert 18 < float(logit_TV.amax(1).mean()) < 30


def test_random_data_is_nearly_uniform_and_unknown_data_an_error():
    case, _ = make_operands(SHAPE, JOBS["statistics"], "random", device="cpu", dtype=torch.float32)
    logp_TV = (case.hidden_TH @ case.weight_VH.T).log_softmax(1)
    assert -(logp_TV.exp() * logp_TV).sum(1).mean() > math.log(600) - 0.8
    with pytest.raises(ValueError, match="data is 'flat'; expected one of peaked, random"):
        make_operands(SHAPE, JOBS["statistics"], "flat", device="cpu")


def test_operands_are_the_same_each_time_and_have_the_zero_rows_asked_for():
    one, two = (make_operands(Shape(4_000, 8, 64), JOBS["tenth_live"], "peaked", device="cpu") for _ in range(2))
    assert same_bits(tuple(one.case), tuple(two.case))
    assert abs(float((one.case.grad_logprob_T == 0).double().mean()) - 0.9) < 0.02


def test_every_head_of_the_matrix_is_named_and_sizes_multiply():
    assert {
        (2_560, 151_936),
        (4_096, 151_936),
        (4_096, 128_256),
        (2_560, 262_144),
        (2_880, 201_088),
        (8_192, 128_256),
    } <= set(HEADS.values())
    assert [shape for _, shape in shapes(["small"], [1, 2], [10, 20])] == [
        (1, 128, 10),
        (2, 128, 10),
        (1, 128, 20),
        (2, 128, 20),
    ]


@pytest.mark.parametrize("name", JOBS)
def test_the_truth_of_every_job_is_that_of_the_fp64_reference(name):
    job = JOBS[name]
    operands = make_operands(SHAPE, job, "peaked", device="cpu")
    case, temperature_T = operands
    leaves = [leaf.detach().double().requires_grad_(leaf.requires_grad) for leaf in case[:2]]
    stats = linear_logprob_entropy_reference(
        leaves[0], leaves[1], case.target_T, temperature=1.0 if temperature_T is None else temperature_T.double()
    )
    gradients: tuple = ()
    if job.gradients:
        sign = 1 if "upstream" in job.needs else -1
        total = sign * (case.grad_logprob_T * stats.logprob_T).sum() + (case.grad_entropy_T * stats.entropy_T).sum()
        gradients = torch.autograd.grad(total, [leaf for leaf in leaves if leaf.requires_grad])
    errors = Truth(operands, job).errors(Answer(stats.logprob_T, stats.entropy_T), gradients)
    assert len(errors) == 4 + job.gradients
    assert max(errors.values()) < 1e-9


@pytest.mark.parametrize("name", sorted(ALWAYS))
def test_every_rival_that_needs_no_gpu_agrees_with_fp64_on_every_job(name):
    rival = RIVALS[name]
    assert rival.why_not(SHAPE, "cpu") is None, "install the extra `bench`"
    done = [job_name for job_name in JOBS if rival.does(job_name, JOBS[job_name])]
    assert done
    for job_name in done if name != "torch_compile" else ["statistics"]:  # each further job is compiled for seconds
        operands = make_operands(SHAPE, JOBS[job_name], "peaked", device="cpu")
        answer, gradients = run(rival, operands, JOBS[job_name])
        errors = Truth(operands, JOBS[job_name]).errors(answer, gradients)
        assert errors, job_name
        assert refused(name, errors) is None, (job_name, errors)


def refused(name, errors):
    return complaint(name, errors, bounds(RIVALS[name]))


def test_those_who_are_wrong_or_do_not_fit_are_not_timed_and_the_others_are():
    def too_large():
        raise torch.OutOfMemoryError

    def nearest(value):
        return {"off": abs(float(value) - 2.0)}

    calls = {"right": lambda: torch.tensor(2.0), "wrong": lambda: torch.tensor(3.0), "large": too_large}
    field = {name: Contender(thunk, "as it is", nearest, {"off": 0.1}) for name, thunk in calls.items()}
    found = compete(field, "cpu", 4)
    assert found["wrong"] == "wrong is wrong and is not timed: off 1 > 0.1"
    assert found["large"] == "large does not fit into this machine's memory"
    assert isinstance(found["right"], Measured)
    assert len(found["right"].seconds) == 4
    assert found["right"].info["errors"] == {"off": 0.0}
    assert found["right"].info["repeats"] is True


def test_a_rival_that_is_wrong_is_refused_by_name_and_number():
    job = JOBS["logprob"]
    operands = make_operands(SHAPE, job, "peaked", device="cpu")
    answer, (hidden_grad, weight_grad) = run(RIVALS["entrocraft"], operands, job)
    assert answer.logprob_T is not None
    truth = Truth(operands, job)
    shifted = Answer(answer.logprob_T + 1e-3)
    assert refused("eager_bf16", truth.errors(shifted, ())) is None  # within what its logits lose
    assert "logprob_mean 0.001 > 1e-05" in str(refused("entrocraft", truth.errors(shifted, ())))
    tripled = truth.errors(answer, (hidden_grad, 3 * weight_grad))
    assert str(refused("entrocraft", tripled)).startswith("entrocraft is wrong and is not timed: weight_grad 2")
    nothing = truth.errors(Answer(answer.logprob_T * float("nan")), ())
    assert "nan" in str(refused("entrocraft", nothing))


def test_restrictions_are_reasons():
    assert RIVALS["cce"].why_not(SHAPE, "cpu") in ("cut_cross_entropy is not installed", "it has no path on a CPU")
    narrow = dataclasses.replace(RIVALS["trl_chunked"], hidden_multiple=128, vocab_multiple=8)
    assert narrow.why_not(SHAPE, "cpu") == "it wants H a multiple of 128 and V of 8"
    assert not RIVALS["trl_chunked"].does("row_temperature", JOBS["row_temperature"])
    assert not RIVALS["quack"].does("both", JOBS["both"])
    assert not RIVALS["entrocraft_cache"].does("statistics", JOBS["statistics"])


def test_products_are_counted():
    half = JOBS["half_zero"]
    assert half.useful_products() == 2.0
    assert [
        RIVALS[name].products(half) for name in ("entrocraft", "entrocraft_cache", "trl_chunked", "eager_bf16")
    ] == [2.5, 2, 4, 3]
    frozen = [
        RIVALS[name].products(JOBS["frozen"]) for name in ("entrocraft", "verl_triton", "verl_torch", "eager_fp32")
    ]
    assert frozen == [3, 4, 4, 2]
    assert RIVALS["cce"].products(JOBS["statistics"]) == 1


@pytest.mark.parametrize("name", sorted(ALWAYS - {"torch_compile"}))
def test_products_are_those_that_torch_makes(name):
    for job_name in ("statistics", "logprob", "both", "frozen", "mean_loss"):
        job = JOBS[job_name]
        if RIVALS[name].does(job_name, job):
            operands = make_operands(SHAPE, job, "peaked", device="cpu")
            made = sum(2 * T * H * V for T, H, V in products_of(run, RIVALS[name], operands, job))
            assert made == RIVALS[name].products(job) * SHAPE.product_operations(), job_name


def products_of(call, *arguments):
    """Sizes of every matrix product that torch makes in a call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        call(*arguments)
    first = {"aten::mm": 0, "aten::addmm": 1, "aten::addmm_": 1}  # where the two factors begin
    events = [(event.name, event.input_shapes) for event in profile.events() or [] if event.name in first]
    factors = [shapes[first[name] : first[name] + 2] for name, shapes in events]
    return [(left[0], left[1], right[1]) for left, right in factors]


def test_trl_s_op_is_called_as_its_trainers_call_it():
    from trl.trainer import utils  # pyright: ignore[reportMissingImports]

    chunk = utils._CHUNKED_LOGPROB_CHUNK_SIZE
    assert trainers_chunk() == chunk
    for settings in (RIVALS["trl_chunked"].settings, *(calls["trl_chunked"][1] for calls in (SCORING, POLICY_LOSS))):
        assert f"vocabulary chunk of {chunk:,}" in settings
    operands = make_operands(Shape(3, 4, chunk + 100), JOBS["statistics"], "random", device="cpu")
    made = products_of(run, RIVALS["trl_chunked"], operands, JOBS["statistics"])
    assert [V for _, _, V in made] == [chunk, 100]


def test_without_trl_its_chunk_is_an_import_error(monkeypatch, tmp_path):
    monkeypatch.setattr(rivals_trl.importlib.util, "find_spec", lambda name: None)
    trainers_chunk.cache_clear()
    with pytest.raises(ImportError, match="No module named 'trl'"):
        trainers_chunk()
    assert chunked_setting() == "ChunkedLogProbFunction, its trainers' vocabulary chunk"
    trainers_chunk.cache_clear()


def test_a_wrong_mean_loss_is_refused():
    job = JOBS["mean_loss"]
    operands = make_operands(SHAPE, job, "peaked", device="cpu")
    truth = Truth(operands, job)
    for name in ("entrocraft_policy_loss", "torch_linear_cross_entropy"):
        answer, gradients = run(RIVALS[name], operands, job)
        assert answer.loss is not None
        assert refused(name, truth.errors(answer, gradients)) is None
        wrong = truth.errors(answer._replace(loss=answer.loss * 1.2), gradients)
        assert wrong["loss"] == pytest.approx(0.2, rel=0.05)  # torch's is a number of bf16
        assert str(refused(name, wrong)).startswith(f"{name} is wrong and is not timed: loss ")


def test_the_loss_that_is_compared_is_that_of_the_fp64_reference():
    for job_name in ("logprob", "both", "half_zero", "mean_loss"):
        job = JOBS[job_name]
        operands = make_operands(SHAPE, job, "peaked", device="cpu")
        case = operands.case
        hidden_TH, weight_VH = (leaf.detach().double() for leaf in case[:2])
        stats = linear_logprob_entropy_reference(hidden_TH, weight_VH, case.target_T)
        sign = 1 if "upstream" in job.needs else -1
        exact = sign * case.grad_logprob_T.double() * stats.logprob_T + case.grad_entropy_T.double() * stats.entropy_T
        truth = Truth(operands, job)
        assert truth.loss == pytest.approx(float(exact.sum()), abs=1e-9)
        assert truth.errors(Answer(loss=exact.sum() + exact.abs().sum()), ())["loss"] == pytest.approx(1.0)


def test_quack_takes_any_number_of_tokens_on_one_of_its_paths_alone(monkeypatch):
    here = dataclasses.replace(RIVALS["quack"], packages=(), gpu=False, capability=(0, 0))
    assert here.why_not(Shape(36, 64, 1024), "cpu") == "it wants T a multiple of 8"
    assert here.why_not(Shape(40, 64, 1024), "cpu") is None
    for capability, V, reason in (((9, 0), 1024, None), ((9, 0), 1032, "of 8"), ((10, 0), 1024, "of 8")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
        told = here.why_not(Shape(36, 64, V), "cuda")
        assert told is None if reason is None else reason in str(told)


@pytest.mark.parametrize(("rounds", "cold"), [(1, 1), (2, 2), (5, 3), (30, 10)])
def test_a_cold_number_is_a_median(rounds, cold):
    calls: list[int] = []
    field = {"a": Contender(lambda: calls.append(0), "", lambda made: {}, {})}
    found = compete(field, "cpu", rounds)["a"]
    assert isinstance(found, Measured)
    assert found.info["cold_rounds"] == cold
    assert len(calls) == 3 + rounds + cold  # two to check, one to weigh


def test_rates_follow_from_the_work_and_the_machine():
    rate = {"gemm_tflops": 2.0, "copy_gbs": 10.0}
    found = derived(Work(1e12, 3, 4, 10**9), 8.0, rate)
    assert found["useful_tflops"] == 3 / 8
    assert found["executed_tflops"] == 4 / 8
    assert found["share_of_gemm"] == 1 / 4
    assert found["gbs"] == 1 / 8
    assert found["floor_ms"] == 1500  # three products; a gigabyte would take 100 ms
    assert derived(Work(1e9, 1, 1, 10**9), 8.0, rate)["floor_ms"] == 100


def test_the_clock_tells_what_was_measured_and_rounds_take_turns():
    clock = Clock()
    tick = clock.play([0.5, 0.25])
    times = [clock()]
    for _ in range(3):
        tick()
        times.append(clock())
    assert times == [0.0, 0.5, 0.75, 0.75]
    order: list[str] = []
    thunks: dict[str, Thunk] = {name: functools.partial(order.append, name) for name in "abc"}
    found = compete({name: Contender(thunk, "", lambda made: {}, {}) for name, thunk in thunks.items()}, "cpu", 2)
    # Each is called twice to be checked and once to be weighed; warm rounds follow, then as many cold ones.
    assert "".join(order) == "aaabbbccc" + "abcbca" + "abcbca"
    taken = [one.seconds for one in found.values() if isinstance(one, Measured)]
    assert len(taken) == 3
    assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in taken)


def test_transient_memory_is_what_stands_beyond_the_result():
    value = torch.ones(1 << 18)  # 1 MiB

    def twice() -> torch.Tensor:
        first = value + 1
        second = first * 2
        del first
        return second

    peak = Stopwatch("cpu").peak_bytes(twice)
    assert (1 << 20) <= peak < (1 << 20) + 4096


def test_bits_are_compared_in_nests():
    one = (torch.tensor([1.0]), None, [torch.tensor([2.0])])
    assert same_bits(one, (torch.tensor([1.0]), None, [torch.tensor([2.0])]))
    assert not same_bits(one, (torch.tensor([1.0]), None, [torch.tensor([2.0000002])]))
    assert not same_bits(one[0], None)


def test_the_machine_has_a_rate():
    rates = machine_rates("cpu", torch.bfloat16, 64, 64, 512)
    assert 1e-4 < rates["gemm_tflops"] < 100
    assert 0.1 < rates["copy_gbs"] < 10_000
