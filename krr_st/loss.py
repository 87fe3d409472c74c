"""The kernel ridge regression loss of KRR-ST: what the outer loop minimises."""

from typing import Any

import torch
from torch import Tensor


class _SpdSolve(torch.autograd.Function):
    """A = K⁻¹Y for symmetric positive definite K, with one Cholesky factor for both directions.

    dL/dY = K⁻¹ dL/dA and dL/dK = -dL/dY Aᵀ: half the work of differentiating the factorisation.
    """

    @staticmethod
    def forward(ctx: Any, k: Tensor, y: Tensor) -> Tensor:
        # _ex: no error check, so no host synchronisation.
        factor, failed = torch.linalg.cholesky_ex(k)
        if k.dtype == torch.float32 and bool(failed.any()):  # a device without float64
            factor, failed = torch.linalg.cholesky_ex(k.cpu().double())
            factor, failed = factor.to(k), failed.to(k.device)
        # Of a matrix with NaN, say, half a factor is left: finite garbage on some devices.
        if k.is_cuda:  # substitution takes longer there than all the rest
            lower = triangular_inverse(factor)
            factor = lower.mT @ lower
        solution = _apply(factor, y).masked_fill_(failed > 0, torch.nan)
        ctx.save_for_backward(factor, solution)
        return solution

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        factor, solution = ctx.saved_tensors
        grad_y = _apply(factor, grad)
        return -grad_y @ solution.mT, grad_y


def triangular_inverse(lower: Tensor, size: int = 32) -> Tensor:
    """Inverse of a lower triangular matrix (n, n): substitution in blocks of at most `size`, then products.

    For a GPU, where substitution waits for itself: at n = 1000 on an H100 blocks of 32 were the fastest.

    Inverses of neighbours on the diagonal are joined, again and again:
    [[A, 0], [B, C]]⁻¹ = [[A⁻¹, 0], [-C⁻¹ B A⁻¹, C⁻¹]].
    """
    n, count = len(lower), 1
    while count * size < n:
        count *= 2
    size = -(-n // count)
    whole = torch.eye(count * size, dtype=lower.dtype, device=lower.device)  # filled up with a diagonal of 1
    whole[:n, :n] = lower
    eye = torch.eye(size, dtype=lower.dtype, device=lower.device)
    found = torch.linalg.solve_triangular(_blocks(whole, count, 0), eye, upper=False)
    while count > 1:
        below = _blocks(whole, count, 1)[::2]
        first, second, count, size = found[::2], found[1::2], count // 2, 2 * size
        found = found.new_zeros(count, size, size)
        found[:, : size // 2, : size // 2], found[:, size // 2 :, size // 2 :] = first, second
        found[:, size // 2 :, : size // 2] = -second @ (below @ first)
    return found[0, :n, :n]


def _blocks(matrix: Tensor, count: int, below: int) -> Tensor:
    """The diagonal blocks of count x count, or those `below` them: (count - below, size, size)."""
    size = len(matrix) // count
    return matrix.view(count, size, count, size).diagonal(-below, 0, 2).permute(2, 0, 1)


def _apply(factor: Tensor, y: Tensor) -> Tensor:
    """K⁻¹Y from the inverse on CUDA, elsewhere from K's Cholesky factor."""
    return factor @ y if factor.is_cuda else torch.cholesky_solve(y, factor)


def _solve_dtype(x: Tensor) -> torch.dtype:
    """float64 where the device has it: then K + λI is positive definite in arithmetic, too.

    λ is 1e-6 of the trace, so the condition number is at most about 1e6: more than float32 can
    factorise safely, far less than float64 can. Only the m×m solve pays for it.
    """
    return torch.float32 if x.device.type == "mps" else torch.float64


def krr_predict(f_real: Tensor, f_syn: Tensor, y_syn: Tensor, ridge: float = 1e-6) -> Tensor:
    """Targets that kernel ridge regression on the synthetic set predicts for the real images.

        K_rs (K_ss + λI)⁻¹ Y_s,  λ = ridge · trace(K_ss) without gradient,

    with a linear kernel on features that each have a constant 1 appended (here, inside). From f_real
    (b, d), f_syn (m, d), y_syn (m, D) and ridge > 0 to (b, D), float32 or the inputs' wider dtype.

    Source: Lee et al., arXiv 2310.06511, eq. 4-5 and alg. 1; kernel with bias as in FRePo.
    """
    k_rs, weights = real_kernel(f_real, f_syn), krr_weights(f_syn, y_syn, ridge)
    with torch.autocast(f_syn.device.type, enabled=False):
        return k_rs @ weights.to(k_rs.dtype)


def krr_weights(f_syn: Tensor, y_syn: Tensor, ridge: float = 1e-6) -> Tensor:
    """(K_ss + λI)⁻¹ Y_s of `krr_predict`, (m, D): all of it that needs no real images."""
    f_syn = _at_least_float32(f_syn)
    with torch.autocast(f_syn.device.type, enabled=False):
        if ridge < torch.finfo(f_syn.dtype).eps:  # K itself may not be rounded by more than λ
            f_syn = f_syn.to(_solve_dtype(f_syn))
        # <(f, 1), (g, 1)> = <f, g> + 1: the constant column without copying the features.
        return kernel_weights(f_syn @ f_syn.mT + 1.0, y_syn, ridge)


def real_kernel(f_real: Tensor, f_syn: Tensor) -> Tensor:
    """K_rs (b, m) of `krr_predict`."""
    f_syn = _at_least_float32(f_syn)
    with torch.autocast(f_syn.device.type, enabled=False):
        return f_real.to(f_syn.dtype) @ f_syn.mT + 1.0


def _at_least_float32(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


def kernel_weights(k_ss: Tensor, y_syn: Tensor, ridge: float) -> Tensor:
    """(K_ss + λI)⁻¹ Y_s, (m, D), with λ = ridge · trace(K_ss) without gradient; solved in float64.

    The kernel is (m, m), y_syn (m, D).
    """
    lam = ridge * k_ss.detach().diagonal().sum()
    exact = _solve_dtype(k_ss)
    eye = torch.eye(len(k_ss), dtype=exact, device=k_ss.device)
    return _SpdSolve.apply(k_ss.to(exact) + lam.to(exact) * eye, y_syn.to(exact))


def krr_loss(f_real: Tensor, y_real: Tensor, f_syn: Tensor, y_syn: Tensor, ridge: float = 1e-6) -> Tensor:
    """Mean squared error of `krr_predict` against the target model's representations.

    The mean is over all entries of y_real (b, D). Gradients flow into f_syn (m, d) and y_syn (m, D),
    and into f_real (b, d) unless it is detached.

    Raises:
        ValueError: shapes do not fit together, or ridge is not positive.
    """
    b, m, d, outputs = len(f_real), len(f_syn), f_syn.shape[-1], y_syn.shape[-1]
    shapes = [tuple(t.shape) for t in (f_real, y_real, f_syn, y_syn)]
    if shapes != [(b, d), (b, outputs), (m, d), (m, outputs)]:
        raise ValueError(f"features and targets must be (b, d), (b, D), (m, d), (m, D), got {shapes}")
    if not ridge > 0:
        raise ValueError(f"ridge must be positive, got {ridge}")
    predicted = krr_predict(f_real, f_syn, y_syn, ridge)
    return torch.nn.functional.mse_loss(predicted, y_real.to(predicted.dtype))
