"""The error of the head against fp64 at the vocabularies of real models, on rows as peaked as a language model's.

The same bf16 operands go to the head and to fp64, so that what is measured is the arithmetic and nothing else. Peaked
rows: weight ~ N(0, 1/H), hidden = alpha W_y + noise, for an entropy of 0.3 to 1.5 nats with top logits of 18 to 30.
"""

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from entrocraft.kernels import linear_logprob_entropy, linear_logprob_entropy_reference

TRITON = torch.cuda.is_available()
T, H = 24, 128
# Mean error in nats. On a CPU products of bf16 operands are fp32 ones, and sums are centred; on a GPU wgmma truncates
# the fp32 accumulator a little more.
MEAN_ERROR = {"logprob_T": 1e-5, "entropy_T": 3e-5} if TRITON else {"logprob_T": 1e-6, "entropy_T": 1e-6}


def _operands(V: int, kind: str, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """hidden, weight, target; half of the peaked rows have another target than the token they peak at."""
    weight_VH = torch.randn(V, H, device=device) / H**0.5
    target_T = torch.randint(0, V, (T,), device=device)
    if kind == "random":
        hidden_TH = 3 * torch.randn(T, H, device=device)
    else:
        hidden_TH = 20 * weight_VH[target_T] + 1.8 * torch.randn(T, H, device=device)
        # The others of the most probable ten carry the entropy of such rows.
        target_T[::2] = (hidden_TH[::2] @ weight_VH.T).topk(10, dim=1).indices[:, 3]
    return hidden_TH.bfloat16(), weight_VH.bfloat16(), target_T


def _eager(hidden_TH: Tensor, weight_VH: Tensor, target_T: Tensor) -> dict[str, Tensor]:
    """bf16 logits and fp32 statistics: what trainers do."""
    logp_TV = (hidden_TH @ weight_VH.T).float().log_softmax(1)
    return {"logprob_T": logp_TV.gather(1, target_T[:, None])[:, 0], "entropy_T": -(logp_TV.exp() * logp_TV).sum(1)}


@pytest.mark.parametrize("V", [151_936, 262_144])
@pytest.mark.parametrize("kind", ["peaked", "random"])
def test_statistics_at_real_vocabularies(device, V, kind):
    torch.manual_seed(V)
    hidden_TH, weight_VH, target_T = _operands(V, kind, device)
    padded = V - 271  # as heads are padded whose tokenizer knows fewer tokens
    target_T = target_T % padded
    stats = linear_logprob_entropy(hidden_TH, weight_VH, target_T, vocab_size=padded)
    exact = linear_logprob_entropy_reference(hidden_TH.double(), weight_VH[:padded].double(), target_T)
    eager = _eager(hidden_TH, weight_VH[:padded], target_T)
    if kind == "peaked":
        assert 0.3 <= float(exact.entropy_T.mean()) <= 1.5
        top_T = exact.lse_T[1::2] + exact.logprob_T[1::2]
        assert 18 <= float(top_T.mean()) <= 30
    for name, most in MEAN_ERROR.items():
        wanted = getattr(exact, name)
        error, error_eager = (
            float((one.double() - wanted).abs().mean()) for one in (getattr(stats, name), eager[name])
        )
        print(f"{kind} V={V} {name}: {error:.1e}; eager with bf16 logits {error_eager:.1e}")
        assert error <= most
        assert error <= error_eager / 100
        if TRITON:
            logit_TV = torch.mm(hidden_TH, weight_VH[:padded].T, out_dtype=torch.float32).double()
            logp_TV = logit_TV.log_softmax(1)
            library = {
                "logprob_T": logp_TV.gather(1, target_T[:, None])[:, 0],
                "entropy_T": -(logp_TV.exp() * logp_TV).sum(1),
            }
            assert error <= 1.5 * float((library[name] - wanted).abs().mean()) + 1e-7


@pytest.mark.parametrize("options", [{"mode": "recompute"}, {"mode": "cache", "cache_bytes": 1 << 30}], ids=str)
def test_gradients_at_a_real_vocabulary(device, options):
    # One store in bf16: the exact gradient of the logits rounded to bf16, carried through exact products.
    torch.manual_seed(3)
    V = 151_936
    hidden_TH, weight_VH, target_T = _operands(V, "peaked", device)
    upstream = torch.randn(2, T, device=device)
    leaves = [hidden_TH.requires_grad_(), weight_VH.requires_grad_()]
    stats = linear_logprob_entropy(leaves[0], leaves[1], target_T, **options)
    actual = torch.autograd.grad((upstream * torch.stack([stats.logprob_T, stats.entropy_T])).sum(), leaves)
    logp_TV = (hidden_TH.detach().double() @ weight_VH.detach().double().T).log_softmax(1)
    p_TV = logp_TV.exp()
    entropy_T = -(p_TV * logp_TV).sum(1)
    dz_TV = -p_TV * (upstream[0][:, None] + upstream[1][:, None] * (logp_TV + entropy_T[:, None]))
    dz_TV[torch.arange(T, device=device), target_T] += upstream[0]
    stored_TV = dz_TV.bfloat16().double()
    for got, left, right in (
        (actual[0], lambda dz: dz, weight_VH),
        (actual[1], lambda dz: dz.T, hidden_TH),
    ):
        exact, stored = (left(dz) @ right.detach().double() for dz in (dz_TV, stored_TV))
        # The gradient itself is a bf16 tensor too, and rounds once whatever was done before.
        rounded = stored.bfloat16().double()
        error, allowed = (float((one.double() - exact).norm() / exact.norm()) for one in (got, rounded))
        print(f"{options['mode']}: {error:.2e}, one store in bf16 {allowed:.2e}")
        assert error <= 1.6 * allowed


@hypothesis.settings(max_examples=25)
@hypothesis.given(
    T=st.integers(1, 40),
    V=st.integers(1, 300),
    H=st.integers(1, 24),
    seed=st.integers(0, 2**31),
    mode=st.sampled_from(["recompute", "cache", "frozen"]),
    budget=st.integers(0, 1 << 14),
    softcap=st.one_of(st.none(), st.floats(1.0, 50.0)),
    zeros=st.booleans(),
)
def test_every_mode_has_the_same_gradient(device, T, V, H, seed, mode, budget, softcap, zeros):
    torch.manual_seed(seed)
    hidden_TH = (2 * torch.randn(T, H, device=device)).requires_grad_()
    weight_VH = torch.randn(V, H, device=device, requires_grad=mode != "frozen")
    target_T = torch.randint(-1, V, (T,), device=device)
    upstream = torch.randn(3, T, device=device) * ((torch.rand(T, device=device) < 0.5) | (not zeros))
    gradients = []
    for op, dtype in (
        (linear_logprob_entropy, torch.float32),
        (linear_logprob_entropy_reference, torch.float64),
    ):
        more = {"mode": mode, "cache_bytes": budget, "buffer_bytes": 1 + budget} if op is linear_logprob_entropy else {}
        leaves = [leaf.detach().to(dtype).requires_grad_(leaf.requires_grad) for leaf in (hidden_TH, weight_VH)]
        stats = op(leaves[0], leaves[1], target_T, softcap=softcap, ignore_index=-1, **more)
        total = (upstream * torch.stack([stats.logprob_T, stats.entropy_T, stats.lse_T])).sum()
        gradients.append(torch.autograd.grad(total, [leaf for leaf in leaves if leaf.requires_grad]))
    for actual, wanted in zip(*gradients, strict=True):
        bound = 2e-5 * max(1.0, float(wanted.abs().max()))
        assert float((actual.double() - wanted).abs().max()) <= bound
