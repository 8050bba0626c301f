"""The distillation loss and the validation figures, compared with the same formulas on full logits."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.config import load
from pipeline.errors import UserError
from pipeline.training.acceptance import acceptance_lengths, draft_statistics
from pipeline.training.chunked_loss import LinearDistillation, plain_loss
from pipeline.training.losses import TERMS, parse

R, D, V = 13, 6, 29


def hidden(seed: int, rows: int = R, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(rows, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(V, D, dtype=torch.float64, generator=torch.Generator().manual_seed(9))


LOSSES = [
    *({name: 1.0} for name in TERMS), {"kl": 0.3}, {"kl": 1.0, "ce": 0.1}, {"ce": 2.0, "kl": 0.5},
    {"kl": 1.0, "tvd": 0.5}, {"tvd": 0.5, "overlap": 2.0}, {name: 0.3 + i for i, name in enumerate(TERMS)},
]  # fmt: skip
LOSS = pytest.mark.parametrize("terms", LOSSES, ids=lambda terms: "+".join(f"{w:g}*{n}" for n, w in terms.items()))


@LOSS
@pytest.mark.parametrize("chunk", [1, 5, 13, 100])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_loss_and_gradient_equal_autograd_through_full_logits(weight, terms, chunk, temperature):
    teacher, scale, outer = hidden(0), 0.37, torch.tensor([1.0, -2.0], dtype=torch.float64)
    ours = [hidden(1).requires_grad_(), hidden(2).requires_grad_()]
    plain = [h.detach().clone().requires_grad_() for h in ours]
    losses = LinearDistillation.apply(weight, teacher, terms, scale, temperature, chunk, 0.0, None, *ours)
    expected = plain_loss(weight, teacher, terms, scale, temperature, plain)
    (losses * outer).sum().backward()
    (expected * outer).sum().backward()
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-14)
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-11, atol=1e-13)


@LOSS
@pytest.mark.parametrize("cap", [0.5, 3.0])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_capped_logits_equal_autograd_through_full_logits(weight, terms, cap, temperature):
    ours = hidden(1).requires_grad_()
    plain = ours.detach().clone().requires_grad_()
    loss = LinearDistillation.apply(weight, hidden(0), terms, 0.37, temperature, 5, cap, None, ours)
    expected = plain_loss(weight, hidden(0), terms, 0.37, temperature, [plain], cap)
    loss.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("terms", [t for t in LOSSES if "tvd++" not in t], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 1.5])
def test_gradient_is_the_derivative_of_the_loss(weight, terms, temperature):
    def losses(*students):
        return LinearDistillation.apply(weight, hidden(0, 3), terms, 0.5, temperature, 2, 0.0, None, *students)

    assert torch.autograd.gradcheck(losses, (hidden(1, 3).requires_grad_(), hidden(2, 3).requires_grad_()))


def test_tvd_plus_plus_is_the_policy_gradient_of_normalised_rewards_by_hand():
    """Three tokens and one row: p = (.5, .3, .2), q = (.2, .2, .6). Tokens 0 and 1 have reward 1, so m = .4."""
    p, q = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64), torch.tensor([[0.2, 0.2, 0.6]], dtype=torch.float64)
    student = q.log().requires_grad_()  # with W = 1 the hidden states are the logits
    loss = LinearDistillation.apply(
        torch.eye(3).double(), p.log(), {"tvd++": 1.0}, 1.0, 1.0, 4, 0.0, None, student
    ).sum()
    loss.backward()
    assert loss.item() == pytest.approx(0.4)
    expected = torch.tensor([[0.2 * -0.6, 0.2 * -0.6, 0.6 * 0.4]]).double() / math.sqrt(0.4 * 0.6)
    torch.testing.assert_close(student.grad, expected)


@pytest.mark.parametrize("name", TERMS)
def test_gradients_have_the_lengths_that_the_table_of_the_terms_gives(weight, name):
    p_logits = hidden(0) @ weight.t()
    q_logits = (p_logits + 0.5 * hidden(1) @ weight.t()).requires_grad_()  # with W = 1 hidden states are logits
    eye = torch.eye(V, dtype=torch.float64)
    LinearDistillation.apply(eye, p_logits, {name: 1.0}, 1.0, 1.0, 4, 0.0, None, q_logits).sum().backward()
    p, q = p_logits.softmax(-1), q_logits.detach().softmax(-1)
    overlap, m = torch.minimum(p, q).sum(-1), (q * (p > q)).sum(-1)
    length = {
        "kl": 2 * (1 - overlap), "ce": 2 * (1 - q.gather(-1, p.argmax(-1, keepdim=True))[:, 0]),
        "tvd": 2 * m * (1 - m), "tvd++": 2 * (m * (1 - m)).sqrt(), "overlap": 2 * m * (1 - m) / overlap,
    }  # fmt: skip
    torch.testing.assert_close(q_logits.grad.abs().sum(-1), length[name])
    assert (m <= overlap).all()


@pytest.mark.parametrize("name", TERMS)
def test_gradients_keep_their_size_when_the_temperature_rises(weight, name):
    def size(temperature: float) -> float:
        student = hidden(1).requires_grad_()
        LinearDistillation.apply(
            weight, hidden(0), {name: 1.0}, 1.0, temperature, 4, 0.0, None, student
        ).sum().backward()
        return student.grad.norm().item()

    assert size(200.0) == pytest.approx(size(100.0), rel=0.05)


@pytest.mark.parametrize("terms", [{name: 1.0} for name in TERMS if name != "ce"], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_head_that_equals_the_teacher_has_no_loss_and_no_gradient(weight, terms, dtype):
    student = hidden(0, dtype=dtype).requires_grad_()
    loss = LinearDistillation.apply(
        weight.to(dtype), hidden(0, dtype=dtype), terms, 1.0, 1.0, 4, 0.0, None, student
    ).sum()
    loss.backward()
    assert abs(loss.item()) < 20 * torch.finfo(dtype).eps and student.grad.abs().max() == 0


@pytest.mark.parametrize("terms", [{name: 1.0} for name in TERMS], ids=str)
def test_a_head_that_is_all_but_sure_of_another_token_leaves_numbers(terms):
    """The logits are 300 apart, so in float32 the overlap and some probabilities are 0."""
    weight, teacher = torch.eye(4), torch.tensor([[300.0, 0, 0, 0]])
    student = torch.tensor([[0.0, 300, 0, 0]], requires_grad=True)
    loss = LinearDistillation.apply(weight, teacher, terms, 1.0, 1.0, 4, 0.0, None, student).sum()
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all() and student.grad.abs().sum() <= 2


@LOSS
def test_heads_together_give_the_bits_of_heads_alone(weight, terms):
    weight, teacher = weight.float(), hidden(0, dtype=torch.float32)
    together = [hidden(s, dtype=torch.float32).requires_grad_() for s in (1, 2, 3)]
    LinearDistillation.apply(weight, teacher, terms, 0.1, 1.0, 5, 0.0, None, *together).sum().backward()
    for student in together:
        alone = student.detach().clone().requires_grad_()
        LinearDistillation.apply(weight, teacher, terms, 0.1, 1.0, 5, 0.0, None, alone).sum().backward()
        assert torch.equal(alone.grad, student.grad)


@LOSS
def test_no_rows_is_no_loss(weight, terms):
    student = hidden(1, 0).requires_grad_()
    loss = LinearDistillation.apply(weight, hidden(0, 0), terms, 1.0, 1.0, 5, 0.0, None, student).sum()
    loss.backward()
    assert loss.item() == 0 and student.grad.shape == (0, D)


@LOSS
def test_bfloat16_weights_take_float32_heads(weight, terms):
    student = hidden(1, dtype=torch.float32).requires_grad_()
    plain = hidden(1).requires_grad_()
    weight, teacher = weight.bfloat16(), hidden(0).bfloat16()
    LinearDistillation.apply(weight, teacher, terms, 1.0, 1.0, 5, 0.0, None, student).sum().backward()
    plain_loss(weight.double(), teacher.double(), terms, 1.0, 1.0, [plain]).sum().backward()
    assert student.grad.dtype == torch.float32
    # A rounded logit changes kl by little, but p > q may turn into p < q.
    assert (student.grad - plain.grad).norm() < (0.01 if terms.keys() <= {"kl", "ce"} else 0.1) * plain.grad.norm()


@LOSS
def test_nothing_but_four_or_five_buffers_is_as_large_as_a_chunk_of_logits(weight, terms):
    rows, chunk = 40, 8
    large: set[int] = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.numel() >= chunk * V and out.shape != (rows, D):
                assert out.numel() == chunk * V
                large.add(out.data_ptr())  # the buffers live on, so whatever is made beside them lies elsewhere
            return out

    student = hidden(1, rows).requires_grad_()
    with Watch():
        LinearDistillation.apply(weight, hidden(0, rows), terms, 1.0, 1.0, chunk, 0.0, None, student).sum().backward()
    assert len(large) == (4 if len(terms) == 1 else 5)


# ---- what distill.loss says


def test_terms_are_names_with_weights():
    assert parse(["kl"]) == {"kl": 1.0}
    assert parse(["tvd++", "0.1*ce", " 2 * kl "]) == {"tvd++": 1.0, "ce": 0.1, "kl": 2.0}
    assert parse(load(None, ["distill.loss=[kl, 0.1*tvd++]"]).distill.loss) == {"kl": 1.0, "tvd++": 0.1}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["kll"], r"no term 'kll'\. Did you mean kl\?"),
        (["tvd+"], r"Did you mean tvd(\+\+)?\?"),
        (["kl*0.5"], r"no term '0\.5'\. Write NAME or WEIGHT\*NAME\."),
        ([""], "no term ''"),
        (["kl", "0*ce"], "weight of ce must be a number above 0, and is '0'"),
        (["-1*kl"], "weight of kl"),
        (["nan*kl"], "weight of kl"),
        (["inf*kl"], "weight of kl"),
        (["a*kl"], "weight of kl must be a number above 0, and is 'a'"),
        (["*kl"], "weight of kl"),
        (["kl", "0.5*kl"], "kl is there twice"),
        ([], "a loss needs a term"),
    ],
)
def test_what_is_no_loss_is_told(words, said):
    with pytest.raises(UserError, match=said) as caught:
        parse(words)
    assert str(caught.value).startswith(f"distill.loss=[{', '.join(words)}]: ")


# ---- how heads are judged


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
