"""How wrong an answer is: log-probabilities, entropies and gradients against fp64, on a slice of rows and columns."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from head_cases import Case, exact_rows, exact_weight_grad, relative_error
from rivals import Answer, Rival
from suite_cases import Job, Operands
from torch import Tensor

from entrocraft.kernels import linear_logprob_entropy

ROWS, COLUMNS = 64, 32


class Truth:
    """fp64 values and gradients of some rows, and of the weight's gradient in some columns."""

    def __init__(self, operands: Operands, job: Job) -> None:
        case, temperature_T = operands
        if temperature_T is not None:
            # z / tau is the head of hidden / tau; its gradient is that of hidden times tau.
            case = case._replace(hidden_TH=case.hidden_TH.detach().double() / temperature_T[:, None].double())
        if "upstream" not in job.needs and job.gradients:
            case = case._replace(grad_logprob_T=-case.grad_logprob_T)
        self.rows = torch.linspace(0, len(case.target_T) - 1, min(ROWS, len(case.target_T)), device=case[0].device)
        self.rows = self.rows.long().unique()
        self.of_rows = exact_rows(case, self.rows)
        self.hidden_grad_NH = self.of_rows["hidden_grad"]
        if temperature_T is not None:
            self.hidden_grad_NH = self.hidden_grad_NH / temperature_T[self.rows, None].double()
        self.weight_grad_NH: Tensor | None = None
        self.loss: float | None = None
        if job.gradients == 2:
            self._of_weight(case)

    def _of_weight(self, case: Case) -> None:
        """Half of the columns are targets, the others any; logsumexp and entropy of all rows are our own in fp64, since
        where a target is nearly certain, 1 - p is a difference that fp32 does not hold."""
        few = case.target_T[: COLUMNS // 2]
        others = torch.arange(COLUMNS // 2, device=few.device) % len(case.weight_VH)
        self.columns = torch.cat([few, others]).unique()
        parts, weight_VH = [], case.weight_VH.detach().double()
        with torch.no_grad():
            for hidden_NH, target_N in zip(case.hidden_TH.split(4096), case.target_T.split(4096), strict=True):
                parts.append(linear_logprob_entropy(hidden_NH.detach().double(), weight_VH, target_N))
        stats = type(parts[0]).cat(parts)
        self.weight_grad_NH = exact_weight_grad(case, self.columns, stats)
        share_T = case.grad_logprob_T.double() * stats.logprob_T + case.grad_entropy_T.double() * stats.entropy_T
        self.loss, self.loss_size = float(share_T.sum()), float(share_T.abs().sum())

    def errors(self, answer: Answer, gradients: Sequence[Tensor]) -> dict[str, float]:
        """Mean and largest errors in nats, relative errors of gradients and loss; only of what the answer has.

        The loss is relative to the sum of the sizes of its terms, which may cancel.
        """
        found: dict[str, float] = {}
        if answer.loss is not None and self.loss is not None:
            found["loss"] = abs(float(answer.loss.detach()) - self.loss) / self.loss_size
        for name, value_T in (("logprob", answer.logprob_T), ("entropy", answer.entropy_T)):
            if value_T is not None:
                found |= value_errors(name, value_T[self.rows], self.of_rows[name])
        if gradients:
            found["hidden_grad"] = relative_error(gradients[0][self.rows], self.hidden_grad_NH)
        if len(gradients) == 2 and self.weight_grad_NH is not None:
            found["weight_grad"] = relative_error(gradients[1][self.columns], self.weight_grad_NH)
        return found


def value_errors(name: str, value_N: Tensor, exact_N: Tensor) -> dict[str, float]:
    """Mean and largest errors of "logprob" or "entropy", nats."""
    error_N = (value_N.detach().double() - exact_N.detach().double()).abs()
    return {f"{name}_mean": float(error_N.mean()), f"{name}_max": float(error_N.max())}


def bounds(rival: Rival) -> dict[str, float]:
    """Errors that a rival's arithmetic explains."""
    most = {"logprob_mean": rival.logprob_error, "entropy_mean": 3 * rival.logprob_error, "loss": rival.logprob_error}
    return most | {"hidden_grad": rival.gradient_error, "weight_grad": rival.gradient_error}
