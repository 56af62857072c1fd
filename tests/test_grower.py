"""One growth step: what is chosen, what is accepted, and that a rejection leaves no trace."""

import copy
import functools
import math

import pytest
import torch
import torch.nn.functional as F
from relu_nets import batches, mlp, problem
from torch import nn

import growkern as gk
from growkern.passes import Passes
from growkern.surgery import trial

pytestmark = pytest.mark.usefixtures("one_thread")


def train(model, optimizer, data, steps=20):
    model.train()
    for step in range(steps):
        x, y = data[step % len(data)]
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()


def snapshot(model, optimizer):
    modules = [(name, m.training, vars(m).keys()) for name, m in model.named_modules()]
    sizes = [(getattr(m, "in_features", None), getattr(m, "out_features", None)) for m in model.modules()]
    ids = [id(p) for p in model.parameters()]
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    return copy.deepcopy((model.state_dict(), optimizer.state_dict())), modules, sizes, ids, held


def assert_same(before, after):
    for a, b in zip(before[0], after[0], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    assert before[1:] == after[1:]


def full_loss(model, data):
    model.eval()
    with torch.no_grad():
        total = sum(F.mse_loss(model(x), y).item() * len(x) for x, y in data)
    return total / sum(len(x) for x, _ in data)


@pytest.mark.parametrize("method", ["tiny", "joint", "fisher"])
def test_a_step_lowers_the_loss_and_tells_the_truth(method):
    model, data = mlp(), batches()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    train(model, optimizer, data)
    model.train()
    before = full_loss(model, data[2:])
    model.train()
    grower = gk.Grower(model, optimizer, F.mse_loss, method=method, neurons=2)
    event = grower.step(data)
    assert all(m.training for m in model.modules())
    assert event.accepted
    assert event.neurons == 2
    assert event.loss_before == pytest.approx(before, rel=1e-6)
    assert event.loss_after == pytest.approx(full_loss(model, data[2:]), rel=1e-5)
    assert event.loss_after < event.loss_before
    assert event.widths == {"0": model[0].out_features, "3": model[3].out_features}
    assert event.site in str(event)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    train(model, optimizer, data, 200)
    assert full_loss(model, data) < event.loss_after


def test_amplitudes_are_chosen_on_samples_that_were_not_measured():
    """What fits the noise of few samples must not pass for an improvement."""
    g = torch.Generator().manual_seed(0)
    data = [(torch.randn(20, 30, generator=g), torch.randn(20, 4, generator=g)) for _ in range(60)]
    losses = {}  # on fresh samples
    for share in (0, 0.5):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(30, 3), nn.ReLU(), nn.Linear(3, 4))
        event = gk.Grower(model, None, F.mse_loss, neurons=2, held_out=share).step(data[:2])
        losses[share] = full_loss(model, data[2:])
        if not share:
            assert event.accepted
            assert event.loss_after < 0.8 * event.loss_before
    torch.manual_seed(0)
    ungrown = full_loss(nn.Sequential(nn.Linear(30, 3), nn.ReLU(), nn.Linear(3, 4)), data[2:])
    assert losses[0] > 1.05 * ungrown
    assert losses[0.5] < 1.01 * ungrown


@pytest.mark.parametrize(
    ("size", "share", "measured"), [(1, 0.5, 1), (2, 0.25, 1), (3, 0.5, 2), (8, 0.25, 6), (4, 1, 1), (4, 0, 4)]
)
def test_how_many_batches_are_held_out(size, share, measured):
    data = [(torch.full((1, 8), float(n)), torch.zeros(1, 4)) for n in range(size)]
    first, last = Passes(mlp(), data, F.mse_loss).divided(share)
    assert first.batches == data[:measured]
    assert last.batches == (data[measured:] or data)


@pytest.mark.parametrize("cost", ["parameters", "flops"])
def test_best_is_the_site_with_the_largest_gain_per_cost(cost):
    model, data = mlp(), batches()
    sites = gk.find_sites(model, data[0][0])
    moments = gk.collect(model, sites, data[:2], F.mse_loss)
    found = gk.solve(moments, neurons=2)
    promise = {n: found[n].gain / getattr(moments[n], f"unit_{cost}") for n in found}
    event = gk.Grower(model, None, F.mse_loss, neurons=2, cost=cost).step(data)
    assert event.site == max(promise, key=promise.get)
    assert event.gain == pytest.approx(found[event.site].gain)


def test_all_visits_every_site_and_measures_anew():
    model, data = mlp(), batches()
    optimizer = torch.optim.SGD(model.parameters(), 1e-2, momentum=0.9)
    train(model, optimizer, data)
    event = gk.Grower(model, optimizer, F.mse_loss, neurons=1, where="all").step(data)
    assert [part.site for part in event.parts] == ["0", "3"]
    assert event.neurons == sum(part.neurons for part in event.parts) == 2
    assert event.parts[1].loss_before == pytest.approx(event.parts[0].loss_after, rel=1e-6)
    assert event.loss_after == event.parts[1].loss_after < event.loss_before == event.parts[0].loss_before
    assert event.widths == {"0": 4, "3": 6}
    train(model, optimizer, data)


def test_random_takes_turns_and_preserves_the_function():
    model, data = mlp(), batches()
    grower = gk.Grower(model, torch.optim.SGD(model.parameters(), 0.1), F.mse_loss, method="random", neurons=3)
    before = full_loss(model, data)
    events = [grower.step(data) for _ in range(3)]
    assert [event.site for event in events] == ["0", "3", "0"]
    assert all(event.accepted and event.scale == 1 for event in events)
    assert full_loss(model, data) == pytest.approx(before, rel=1e-6)


def test_gradmax_chooses_by_squares():
    model, data = mlp(), batches()
    moments = gk.collect(model, gk.find_sites(model, data[0][0]), data, F.mse_loss)
    found = gk.solve(moments, method="gradmax", neurons=2)
    promise = {n: found[n].singular_values.square().sum() / moments[n].unit_parameters for n in found}
    event = gk.Grower(model, None, F.mse_loss, method="gradmax", neurons=2).step(data)
    assert event.site == max(promise, key=promise.get)
    assert event.accepted
    assert event.scale == 1


def test_rejection_leaves_model_and_optimizer_bit_identical(monkeypatch):
    model, data = mlp(), batches()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    train(model, optimizer, data)
    grower = gk.Grower(model, optimizer, F.mse_loss, neurons=2, update=True)
    before = snapshot(model, optimizer)
    evaluated = []

    def worse_at_every_scale(model, new, *, scale, update):
        evaluated.append(scale)
        return trial(model, new, scale=1e6 * math.copysign(1, scale), update=update)

    monkeypatch.setattr("growkern.grower.trial", worse_at_every_scale)
    event = grower.step(data)
    assert not event.accepted
    assert event.neurons == event.scale == 0
    assert event.loss_after == event.loss_before
    assert "no amplitude" in str(event)
    assert min(evaluated) <= -16
    assert max(evaluated) >= 16
    assert_same(before, snapshot(model, optimizer))


def test_nothing_above_chance_is_a_rejection():
    model, (x, y) = mlp(), problem()
    optimizer = torch.optim.Adam(model.parameters())
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        noise = model.eval()(x) + torch.randn(y.shape, generator=g)
    before = snapshot(model, optimizer)
    event = gk.Grower(model, optimizer, F.mse_loss).step([(x, noise)])
    assert not event.accepted
    assert event.reason == "no neuron stands above chance"
    assert_same(before, snapshot(model, optimizer))
    wide = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 4))
    few = gk.Grower(wide, torch.optim.SGD(wide.parameters(), 0.1), F.mse_loss).step([(x[:40], noise[:40])])
    assert "give more batches" in few.reason
    flat = gk.Grower(wide, None, lambda z, _: 0 * z.sum()).step([(x, noise)])
    assert flat.reason == "all gradients are zero"


def test_an_error_leaves_no_trace():
    model, data = mlp(), batches()
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer, data)
    before = snapshot(model, optimizer)
    calls = []

    def fails_late(output, target):
        calls.append(None)
        if len(calls) > 9:
            raise RuntimeError("the user's loss failed")
        return F.mse_loss(output, target)

    with pytest.raises(RuntimeError, match="the user's loss failed"):
        gk.Grower(model, optimizer, fails_late, neurons=2).step(data)
    assert_same(before, snapshot(model, optimizer))


def test_when_it_pays():
    """While the existing weights can still do most, training pays more; once they are fitted, only neurons help."""
    model, data = mlp(), batches()
    sites = gk.find_sites(model, data[0][0])
    grower = gk.Grower(model, None, F.mse_loss, sites=sites[1:], when="pays", neurons=2)
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model[5].bias.fill_(30.0)
    event = grower.step(data)
    assert not event.accepted
    assert event.reason == "training on pays more"
    model.load_state_dict(before)
    moments = gk.collect(model, sites, data[:2], F.mse_loss)
    update = gk.solve(moments["3"], neurons=1).best_update * 2  # v is half of what is missing: 4 outputs share a mean
    with torch.no_grad():
        model[5].weight += update[:, :-1]
        model[5].bias += update[:, -1]
    event = grower.step(data)
    assert event.accepted


def test_schedule_of_epochs():
    grower = gk.Grower(mlp(), None, F.mse_loss, when={2, 5})
    assert [epoch for epoch in range(8) if grower.due(epoch)] == [2, 5]
    assert all(gk.Grower(mlp(), None, F.mse_loss).due(epoch) for epoch in range(3))


def test_update_is_applied_on_request():
    model, data = mlp(), batches()
    site = gk.find_sites(model, data[0][0])[:1]
    plain, updated = copy.deepcopy(model), copy.deepcopy(model)
    gk.Grower(plain, None, F.mse_loss, sites=site, neurons=1).step(data)
    gk.Grower(updated, None, F.mse_loss, sites=site, neurons=1, update=True).step(data)
    assert torch.equal(plain[3].weight[:, :3], model[3].weight)
    assert not torch.allclose(updated[3].weight[:, :3], model[3].weight)


def test_center_leaves_flattening_sites_out():
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.Conv2d(2, 3, 3, padding=1), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 3)),
    )
    g = torch.Generator().manual_seed(0)
    data = [(torch.randn(30, 1, 6, 6, generator=g), torch.randint(0, 3, (30,), generator=g))]
    grower = gk.Grower(model, None, F.cross_entropy, kernel="center", neurons=1, method="joint")
    event = grower.step(data)
    assert [s.name for s in grower.sites] == ["0"]
    assert event.accepted
    assert model[2].weight.shape == (3, 3, 3, 3)
    assert (model[2].weight[:, 2] != 0).sum(0).nonzero().tolist() == [[1, 1]]


def test_sites_of_both_kinds_over_several_batches_without_draws():
    """Convolutions take a second pass, linear layers then do not."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(3 * 36, 4), nn.Tanh(), nn.Linear(4, 3)),
    )
    g = torch.Generator().manual_seed(0)
    data = [(torch.randn(20, 1, 6, 6, generator=g), torch.randint(0, 3, (20,), generator=g)) for _ in range(3)]
    before = full_cross_entropy(model, data[2:])
    event = gk.Grower(model, None, F.cross_entropy, neurons=1, where="all").step(data)
    assert [part.site for part in event.parts] == ["0", "2", "5"]
    assert event.accepted
    assert event.loss_before == pytest.approx(before, rel=1e-6)
    assert event.loss_after == pytest.approx(full_cross_entropy(model, data[2:]), rel=1e-5)
    moments = gk.collect(model, gk.find_sites(model, data[0][0]), data, F.cross_entropy, null_draws=0)
    assert [m.xr is None for m in moments.values()] == [False, False, True]


def full_cross_entropy(model, data):
    with torch.no_grad():
        return sum(F.cross_entropy(model(x), y).item() for x, y in data) / len(data)


def test_bottlenecks_looks_and_does_not_touch():
    model, data = mlp(), batches()
    before = copy.deepcopy(model.state_dict())
    table = gk.bottlenecks(model, data, F.mse_loss)
    assert_rows = {row["site"]: row for row in table.rows}
    moments = gk.collect(model, gk.find_sites(model, data[0][0]), data, F.mse_loss)
    for name, new in gk.solve(moments).items():
        row = assert_rows[name]
        assert row["bottleneck"] == pytest.approx(new.bottleneck)
        assert row["reachable"] == pytest.approx(new.reachable)
        assert row["share"] == pytest.approx(new.bottleneck / moments[name].vv.trace().item(), rel=1e-5)
        assert (row["neurons"], row["removed"], row["gain"]) == (
            len(new),
            pytest.approx(new.removed),
            pytest.approx(new.gain),
        )
    lines = str(table).splitlines()
    assert lines[0].split() == ["site", "units", "bottleneck", "share", "reachable", "neurons", "removed", "gain"]
    assert len(lines) == 3
    assert [r["bottleneck"] for r in table.rows] == sorted((r["bottleneck"] for r in table.rows), reverse=True)
    torch.testing.assert_close(before, model.state_dict(), rtol=0, atol=0)


def test_bottlenecks_reads_sums_of_sequences_in_any_order():
    model = nn.Sequential(nn.Linear(5, 2), nn.Tanh(), nn.Linear(2, 3)).double()
    x, y = torch.randn(40, 6, 5, dtype=torch.float64), torch.randn(40, 6, 3, dtype=torch.float64)
    total = functools.partial(F.mse_loss, reduction="sum")
    (expected,) = gk.bottlenecks(model, [(x, y)], total, reduction="sum").rows
    swapped = [(x.transpose(0, 1), y.transpose(0, 1))]
    (row,) = gk.bottlenecks(model, swapped, total, reduction="sum", batch_dim=1).rows
    assert row == pytest.approx(expected)
    (mean,) = gk.bottlenecks(model, swapped, F.mse_loss, batch_dim=1).rows
    assert mean["bottleneck"] == pytest.approx(row["bottleneck"] / 3**2)  # a mean over rows of the mean of 3 outputs


class Noisy(nn.Module):
    """Random also in evaluation mode."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.fc2, self.noisy = nn.Linear(8, 3), nn.Linear(3, 4), True

    def forward(self, x):
        z = self.fc2(torch.tanh(self.fc1(x)))
        return z + 0.5 * torch.randn(4) if self.noisy else z


def test_every_amplitude_sees_the_same_random_numbers():
    """Otherwise the luckiest of a dozen draws would pass for an improvement."""
    model, data = Noisy(), batches()
    passes = Passes(model.eval(), data, F.mse_loss)
    with torch.no_grad():
        assert passes.loss() == passes.loss()
    site = gk.GrowthSite("fc1", "fc2", ("tanh()",))
    event = gk.Grower(model, None, F.mse_loss, sites=[site], neurons=2).step(data)
    assert event.accepted
    assert event.loss_after == pytest.approx(Passes(model, data[2:], F.mse_loss).loss(), rel=1e-6)


def test_what_no_gradient_reaches_is_left_alone():
    """A frozen backbone, and a head that the loss does not use."""
    model, data = mlp(), batches()
    for parameter in model[:4].parameters():
        parameter.requires_grad_(False)
    grower = gk.Grower(model, None, F.mse_loss, neurons=1)
    grower.step(data)
    assert [site.name for site in grower.sites] == ["3"]
    assert [row["site"] for row in gk.bottlenecks(model, data, F.mse_loss).rows] == ["3"]

    class TwoHeads(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.d = nn.Linear(8, 3), nn.Linear(3, 4), nn.Linear(8, 3), nn.Linear(3, 4)

        def forward(self, x):
            return {"used": self.b(torch.relu(self.a(x))), "unused": self.d(torch.relu(self.c(x)))}

    model = TwoHeads()
    grower = gk.Grower(model, None, lambda output, target: F.mse_loss(output["used"], target), neurons=1)
    grower.step(data)
    assert [site.name for site in grower.sites] == ["a"]


def test_units_are_rounded_up_to_what_a_site_grows_by():
    model, data = mlp(), batches()
    event = gk.Grower(model, None, F.mse_loss, method="gradmax", neurons=3).step(data)
    assert event.neurons == 4
    model = nn.Sequential(nn.Linear(8, 8), nn.GroupNorm(2, 8), nn.Tanh(), nn.Linear(8, 4))
    event = gk.Grower(model, None, F.mse_loss, neurons=3).step(data)
    assert event.neurons == 4
    assert model[1].num_groups == 3


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gain_is_the_derivative_of_the_loss_as_it_is_reduced(reduction):
    model, data = mlp().double(), [(x.double(), y.double()) for x, y in batches()]

    def loss_fn(output, target):
        return F.mse_loss(output, target, reduction=reduction)

    sites = gk.find_sites(model, data[0][0])
    new = gk.solve(gk.collect(model, sites, data, loss_fn, reduction=reduction)["3"], neurons=2, paired=True)
    passes = Passes(model.eval(), data, loss_fn, reduction)
    with torch.no_grad():
        before = passes.loss()
        with trial(model, new, scale=1e-7):
            slope = (before - passes.loss()) / 1e-7
    assert new.gain == pytest.approx(slope, rel=1e-4)
