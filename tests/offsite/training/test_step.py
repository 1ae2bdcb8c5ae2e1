from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from offsite.errors import DataError, RunFailed
from offsite.training.config import LoopConfig
from offsite.training.processes import Processes
from offsite.training.step import Stepper, rate

CPU = torch.device("cpu")
ALONE = Processes(0, 1, CPU, True)


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def squared(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    errors = functional.mse_loss(model(batch["x"]), batch["y"], reduction="none").mean(-1)
    return (errors * batch["counted"]).sum(), batch["counted"].sum()


def make_batch(num_rows: int = 8, seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(num_rows, 4, generator=generator), torch.randn(num_rows, 3, generator=generator)
    return {"x": x, "y": y, "counted": torch.tensor([1.0, 0.0, 1.0, 1.0] * 8)[:num_rows]}


def make_stepper(model: nn.Module, loss=squared, **changes: object) -> Stepper:
    config = LoopConfig(**{"steps": 10, "precision": "fp32", "learning_rate": 0.01, **changes})
    return Stepper(model, dict(model.named_parameters()), loss, config, ALONE)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


def test_a_step_is_torchs_adamw_on_the_mean_over_counted_positions():
    ours, theirs = make_model(), make_model()
    stepper = make_stepper(ours, weight_decay=0.1, clip_norm=0.0, schedule="constant")
    matrices, vectors = [theirs[0].weight, theirs[2].weight], [theirs[0].bias, theirs[2].bias]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    oracle = torch.optim.AdamW(groups, lr=0.01, foreach=False)
    for number in (1, 2, 3):
        batch = make_batch(seed=number)
        done = stepper.step(number, batch)
        oracle.zero_grad()
        total, count = squared(theirs, batch)
        (total / count).backward()
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in theirs.parameters()))
        oracle.step()
        assert done.loss == pytest.approx((total / count).item())
        assert done.gradient_norm == pytest.approx(norm)
        assert done.rate == 0.01
    for name, tensor in weights(theirs).items():
        torch.testing.assert_close(weights(ours)[name], tensor, rtol=0, atol=1e-7)


def test_clipping_is_torchs_by_global_norm():
    ours, theirs = make_model(), make_model()
    make_stepper(ours, clip_norm=0.05).step(1, make_batch())
    total, count = squared(theirs, make_batch())
    (total / count).backward()
    nn.utils.clip_grad_norm_(theirs.parameters(), 0.05)
    for left, right in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(left.grad, right.grad, rtol=0, atol=1e-8)


@pytest.mark.parametrize("accumulate", [2, 3, 4, 8])
def test_parts_do_not_change_a_step(accumulate):
    at_once, in_parts = make_model(), make_model()
    one, many = make_stepper(at_once), make_stepper(in_parts, accumulate=accumulate)
    for number in range(1, 6):
        left, right = one.step(number, make_batch(seed=number)), many.step(number, make_batch(seed=number))
        assert left.loss == pytest.approx(right.loss, abs=1e-6)
        assert left.gradient_norm == pytest.approx(right.gradient_norm, abs=1e-6)
    for name, tensor in weights(at_once).items():
        torch.testing.assert_close(weights(in_parts)[name], tensor, rtol=0, atol=1e-6)


def test_every_row_goes_through_once():
    seen: list[Tensor] = []

    def noting(model, batch):
        seen.append(batch["x"])
        return squared(model, batch)

    make_stepper(make_model(), noting, accumulate=3).step(1, make_batch(8))
    assert [len(rows) for rows in seen] == [2, 3, 3]
    assert torch.equal(torch.cat(seen), make_batch(8)["x"])


def test_processes_take_different_rows_and_seeds():
    seen: list[tuple[Tensor, Tensor]] = []

    def noting(model, batch):
        seen.append((batch["x"], torch.rand(2)))
        return squared(model, batch)

    make_stepper(make_model(), noting, accumulate=4).step(1, make_batch(8))
    config = LoopConfig(steps=10, precision="fp32", accumulate=2)
    model = make_model()
    second = Stepper(model, dict(model.named_parameters()), noting, config, Processes(1, 2, CPU, False))
    for part, rows in second._parts(make_batch(8), 1):
        assert torch.equal(rows["x"], seen[part][0])
    assert len({float(drawn[0]) for _, drawn in seen}) == 4


def test_what_is_drawn_depends_on_seed_step_and_part_only():
    drawn: list[float] = []

    def drawing(model, batch):
        drawn.append(float(torch.rand(())))
        return squared(model, batch)

    for seed, number in [(0, 1), (0, 2), (1, 1), (0, 1)]:
        make_stepper(make_model(), drawing, seed=seed).step(number, make_batch())
        torch.rand(100)
    assert drawn[0] == drawn[3]
    assert len(set(drawn)) == 3


def test_too_few_rows_are_refused():
    with pytest.raises(DataError, match=r"batch of step 1: 2 rows, expected 4 or more \(1 processes, 4 parts each\)"):
        make_stepper(make_model(), accumulate=4).step(1, make_batch(2))


def test_a_step_that_counts_nothing_changes_nothing():
    model = make_model()
    before = weights(model)
    stepper = make_stepper(model, weight_decay=0.5)
    done = stepper.step(1, {**make_batch(), "counted": torch.zeros(8)})
    assert done.loss is None
    assert stepper.updates() == {}
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(model).items())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_the_update(value):
    model = make_model()
    before = weights(model)
    with pytest.raises(RunFailed, match=r"loss is (nan|inf) at step 3"):
        make_stepper(model, lambda m, b: (squared(m, b)[0] * value, b["counted"].sum())).step(3, make_batch())
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(model).items())


def test_a_gradient_that_is_not_finite_stops_before_the_update():
    def cliff(model, batch):
        return (model(batch["x"]).sum() * 0.0).sqrt(), batch["counted"].sum()

    model = make_model()
    before = weights(model)
    with pytest.raises(RunFailed, match="gradient norm is nan at step 1"):
        make_stepper(model, cliff).step(1, make_batch())
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(model).items())


def test_a_tensor_without_gradient_has_no_moments():
    model = make_model()
    model.register_parameter("unused", nn.Parameter(torch.ones(2, 2)))
    stepper = make_stepper(model, weight_decay=0.1)
    stepper.step(1, make_batch())
    assert "unused" not in stepper.updates()
    assert set(stepper.updates().values()) == {1}
    assert set(stepper.moments()) == {f"{n}.{k}" for n in stepper.updates() for k in ("exp_avg", "exp_avg_sq")}
    assert torch.equal(model.unused.detach(), torch.ones(2, 2))


def test_restart_goes_on_as_if_never_stopped():
    unbroken, broken = make_model(), make_model()
    one, two = make_stepper(unbroken), make_stepper(broken)
    for number in (1, 2):
        one.step(number, make_batch(seed=number))
        two.step(number, make_batch(seed=number))
    copy, moments = make_model(), {name: tensor.clone() for name, tensor in two.moments().items()}
    copy.load_state_dict(broken.state_dict())
    three = make_stepper(copy)
    three.restart(two.updates())
    for name, tensor in three.moments().items():
        tensor.copy_(moments[name])
    one.step(3, make_batch(seed=3))
    three.step(3, make_batch(seed=3))
    assert all(torch.equal(weights(unbroken)[name], tensor) for name, tensor in weights(copy).items())


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 0.8, 0.6, 0.4, 0.2]),
        ("cosine", [0.5, 1.0, 0.8828427, 0.6, 0.3171573, 0.2]),
    ],
)
def test_the_rate_follows_its_schedule(schedule, expected):
    config = LoopConfig(steps=6, warmup_steps=2, schedule=schedule, min_rate_share=0.2, learning_rate=1.0)
    assert [rate(config, number) for number in range(1, 7)] == pytest.approx(expected)


def test_the_rate_at_the_edges():
    assert rate(LoopConfig(steps=5, learning_rate=1.0), 1) == 1.0
    assert rate(LoopConfig(steps=1, learning_rate=1.0), 1) == 1.0
    assert rate(LoopConfig(steps=2, warmup_steps=4, learning_rate=1.0), 2) == 0.5
    assert rate(LoopConfig(steps=2, warmup_steps=2, learning_rate=1.0), 2) == 1.0


def test_bf16_computes_in_bf16_and_keeps_float32_weights():
    kinds = []

    def noting(model, batch):
        kinds.append(model(batch["x"]).dtype)
        return squared(model, batch)

    model = make_model()
    make_stepper(model, noting, precision="bf16").step(1, make_batch())
    assert kinds == [torch.bfloat16]
    assert {tensor.dtype for tensor in model.parameters()} == {torch.float32}
    assert {tensor.grad.dtype for tensor in model.parameters()} == {torch.float32}


def test_a_weight_first_used_without_gradient_still_learns():
    def twice(model, batch):
        with torch.no_grad():
            model(batch["x"])
        return squared(model, batch)

    model = make_model()
    done = make_stepper(model, twice, precision="bf16").step(1, make_batch())
    assert done.gradient_norm > 0
    assert all(tensor.grad is not None for tensor in model.parameters())


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        ({"input_ids": torch.ones(2, 5), "attention_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])}, 8),
        ({"input_ids": torch.ones(2, 5)}, 10),
        ({"pixel_values": torch.ones(2, 3, 4, 4)}, 2),
    ],
)
def test_tokens_are_counted_without_padding(batch, expected):
    def loss(model, rows):
        return sum(tensor.float().square().sum() for tensor in model.parameters()), torch.tensor(1)

    assert make_stepper(make_model(), loss).step(1, batch).num_tokens == expected
