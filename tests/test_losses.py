"""LinearKL and the validation figures against the same formulas written plainly."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.training.losses import LinearKL, acceptance_lengths, draft_statistics, plain_kl

R, D, V = 13, 6, 29


def hidden(seed: int, rows: int = R, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(rows, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(V, D, dtype=torch.float64, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("chunk", [1, 5, 13, 100])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_loss_and_gradient_equal_autograd_through_full_logits(weight, chunk, temperature):
    teacher, scale, outer = hidden(0), 0.37, torch.tensor([1.0, -2.0], dtype=torch.float64)
    ours = [hidden(1).requires_grad_(), hidden(2).requires_grad_()]
    plain = [h.detach().clone().requires_grad_() for h in ours]
    losses = LinearKL.apply(weight, teacher, scale, temperature, chunk, None, *ours)
    expected = plain_kl(weight, teacher, scale, temperature, plain)
    (losses * outer).sum().backward()
    (expected * outer).sum().backward()
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-14)
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-11, atol=1e-13)


def test_gradient_is_the_derivative_of_the_loss(weight):
    def losses(*students):
        return LinearKL.apply(weight, hidden(0, 3), 0.5, 1.5, 2, None, *students)

    assert torch.autograd.gradcheck(losses, (hidden(1, 3).requires_grad_(), hidden(2, 3).requires_grad_()))


def test_a_head_that_equals_the_teacher_has_no_loss_and_no_gradient(weight):
    student = hidden(0).requires_grad_()
    loss = LinearKL.apply(weight, hidden(0), 1.0, 1.0, 4, None, student).sum()
    loss.backward()
    assert loss.item() == 0 and student.grad.abs().max() == 0


def test_heads_together_give_the_bits_of_heads_alone(weight):
    weight, teacher = weight.float(), hidden(0, dtype=torch.float32)
    together = [hidden(s, dtype=torch.float32).requires_grad_() for s in (1, 2, 3)]
    LinearKL.apply(weight, teacher, 0.1, 1.0, 5, None, *together).sum().backward()
    for student in together:
        alone = student.detach().clone().requires_grad_()
        LinearKL.apply(weight, teacher, 0.1, 1.0, 5, None, alone).sum().backward()
        assert torch.equal(alone.grad, student.grad)


def test_no_rows_is_no_loss(weight):
    student = hidden(1, 0).requires_grad_()
    loss = LinearKL.apply(weight, hidden(0, 0), 1.0, 1.0, 5, None, student).sum()
    loss.backward()
    assert loss.item() == 0 and student.grad.shape == (0, D)


def test_bfloat16_weights_take_float32_heads(weight):
    student = hidden(1, dtype=torch.float32).requires_grad_()
    plain = hidden(1).requires_grad_()
    LinearKL.apply(weight.bfloat16(), hidden(0).bfloat16(), 1.0, 1.0, 5, None, student).sum().backward()
    plain_kl(weight, hidden(0), 1.0, 1.0, [plain]).sum().backward()
    assert student.grad.dtype == torch.float32
    assert (student.grad - plain.grad).norm() < 0.05 * plain.grad.norm()


def test_no_tensor_is_larger_than_a_chunk_of_logits(weight):
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    rows, chunk = 40, 4
    student = hidden(1, rows).requires_grad_()
    with Watch():
        LinearKL.apply(weight, hidden(0, rows), 1.0, 1.0, chunk, None, student).sum().backward()
    assert largest == max(chunk * V, rows * D)


def test_statistics_equal_their_definitions(weight):
    teacher, students = hidden(0), [hidden(0) + 0.3 * hidden(1), hidden(2)]
    found = draft_statistics(weight, teacher, students, chunk=5)
    p = (teacher @ weight.t()).softmax(-1)
    for h, student in enumerate(students):
        q = (student @ weight.t()).softmax(-1)
        torch.testing.assert_close(found["overlap"][h].double(), torch.minimum(p, q).sum(-1), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found["loss"][h].double(), (p * (p / q).log()).sum(-1), rtol=1e-6, atol=1e-6)
        assert torch.equal(found["match"][h].bool(), p.argmax(-1) == q.argmax(-1))


@pytest.mark.parametrize("horizon", [1, 3, 8])
def test_acceptance_length_equals_a_loop_over_rounds(horizon):
    # Three responses of 4, 1 and 6 rows: consecutive places are one response.
    index = torch.tensor([3, 4, 5, 6, 9, 20, 21, 22, 23, 24, 25])
    responses = [range(0, 4), range(4, 5), range(5, 11)]
    accept = torch.rand(2, len(index), generator=torch.Generator().manual_seed(0))
    found = acceptance_lengths(accept, index, horizon)
    for h in range(2):
        for rows in responses:
            for t in rows:
                ahead = [accept[h, i].item() for i in range(t, min(t + horizon, rows.stop))]
                expected = 1 + sum(math.prod(ahead[: j + 1]) for j in range(len(ahead)))
                assert found[h, t].item() == pytest.approx(expected, rel=1e-6)


def test_acceptance_length_of_a_perfect_head_is_all_drafts_and_the_bonus():
    found = acceptance_lengths(torch.ones(1, 20), torch.arange(20), horizon=8)
    assert found[0, 0] == 9 and found[0, -1] == 2 and found[0, 15] == 6
