"""The benchmarks: rivals compute the same, timing alternates, and results are complete."""

import dataclasses
import json
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks import excess_loss, outer_step, power_law, sweeps, timing
from benchmarks.table import table
from benchmarks.timing import Side
from metadyn import trajectories
from metadyn.domains.linear import LinearRegression
from metadyn.learners.attention import TransformerConfig
from metadyn.learners.deltanet import DeltaNetConfig
from metadyn.learners.lstm import LSTMConfig

T, B, H = 7, 6, 16


@pytest.fixture(scope="module")
def metadyn_lstm():
    """Returns metadyn's weights, episodes x and y [T, B, N], and the loss and gradient on them."""
    params, *rest, gradient = random_case(LSTMConfig(hidden=H).make(LinearRegression(steps=T)))
    return flat(params), *rest, flat(gradient)


def random_case(meta):
    """Returns weights away from a start, episodes, and the loss and gradient on them."""
    leaves, tree = jax.tree.flatten(meta.init(jax.random.key(0)))
    noise = jax.random.split(jax.random.key(1), len(leaves))
    params = tree.unflatten(
        leaf + 0.3 * jax.random.normal(key, leaf.shape)
        for key, leaf in zip(noise, leaves, strict=True)
    )
    rng = np.random.default_rng(2)
    x, y = rng.standard_normal((2, T, B, outer_step.N)).astype(np.float32)

    def objective(params):
        answers = meta.unroll(params, x.swapaxes(1, 2), y.swapaxes(1, 2))
        return jnp.mean((answers - y.swapaxes(1, 2)) ** 2)

    return params, x, y, *jax.jit(jax.value_and_grad(objective))(params)


def flat(params):
    """Returns weights by the names that the tests have for them."""
    return params["body"] | {name: params[name] for name in ("readout", "offset")}


def by_gate(name, value):
    """Returns gates in the rivals' order i f g o, where metadyn's is i f o g."""
    value = np.asarray(value)
    if name in ("readout", "offset"):
        return value
    i, f, third, fourth = np.split(value, 4)
    return np.concatenate([i, f, fourth, third])


def check_gradient(gradient, reference):
    """Compares each leaf to 1e-5 of its greatest entry."""
    for name, leaf in reference.items():
        expected = by_gate(name, leaf)
        scale = np.abs(expected).max()
        assert scale > 0
        np.testing.assert_allclose(gradient[name], expected, rtol=0, atol=1e-5 * scale)


def test_loss_and_gradient_equal_those_of_flax(metadyn_lstm):
    """Both have the same weights and episodes."""
    params, x, y, loss, gradient = metadyn_lstm
    network = outer_step.flax_network(H)
    cell = network.body.rnn.cell
    weights = {
        "input": cell.dense_i.kernel,
        "recurrent": cell.dense_h.kernel,
        "bias": cell.dense_h.bias,
        "readout": network.readout.kernel,
        "offset": network.readout.bias,
    }
    for name, weight in weights.items():
        weight[...] = jnp.asarray(by_gate(name, params[name]).T)
    flax_loss, flax_gradient = nnx.value_and_grad(lambda network: network(x, y))(network)
    np.testing.assert_allclose(loss, flax_loss, rtol=1e-6)
    cell = flax_gradient["body"]["rnn"]["cell"]
    leaves = {
        "input": cell["dense_i"]["kernel"],
        "recurrent": cell["dense_h"]["kernel"],
        "bias": cell["dense_h"]["bias"],
        "readout": flax_gradient["readout"]["kernel"],
        "offset": flax_gradient["readout"]["bias"],
    }
    check_gradient(gradient, {name: np.asarray(leaf[...]).T for name, leaf in leaves.items()})


@pytest.mark.parametrize("model", ["lstm", "lstm loop"])
def test_loss_and_gradient_equal_those_of_pytorch(model, metadyn_lstm):
    """Both have the same weights and episodes. The test needs PyTorch."""
    torch = pytest.importorskip("torch")
    params, x, y, loss, gradient = metadyn_lstm
    network = outer_step.torch_network(H, model)
    named = dict(network.body.named_parameters())
    if model == "lstm":
        named = {name.removeprefix("lstm."): leaf for name, leaf in named.items()}
        names = "weight_ih_l0", "weight_hh_l0", "bias_ih_l0"
        torch.nn.init.zeros_(named["bias_hh_l0"])
    else:
        names = "input.weight", "recurrent.weight", "input.bias"
    weights = dict(
        zip(("input", "recurrent", "bias"), (named[name] for name in names), strict=True)
    )
    weights |= {"readout": network.readout.weight, "offset": network.readout.bias}

    with torch.no_grad():
        for name, leaf in weights.items():
            leaf.copy_(torch.tensor(by_gate(name, params[name])))
    torch_loss = network(torch.tensor(x), torch.tensor(y))
    torch_loss.backward()
    np.testing.assert_allclose(loss, torch_loss.item(), rtol=1e-6)
    check_gradient(gradient, {name: np.asarray(leaf.grad) for name, leaf in weights.items()})


BLOCKS = {"transformer": TransformerConfig(hidden=H), "deltanet": DeltaNetConfig(hidden=H)}


@pytest.fixture(scope="module", params=BLOCKS)
def metadyn_blocks(request):
    """Returns, for a network of blocks, its name and, by path, what `metadyn_lstm` returns."""
    meta = BLOCKS[request.param].make(LinearRegression(steps=T))
    params, *rest = random_case(meta)
    by_path = lambda tree: {
        ".".join(str(part.key) for part in path): np.asarray(leaf)
        for path, leaf in jax.tree.leaves_with_path(tree)
    }
    *episodes, loss, gradient = rest
    return request.param, by_path(params), *episodes, loss, by_path(gradient)


def check_leaves(loss, gradient, rival_loss, rival_gradient):
    """Tolerances allow for the constants that differ: 1e-6 or 1e-7 is added to squares in norms,
    and 1e-6 or 1e-12 to lengths of keys."""
    np.testing.assert_allclose(loss, rival_loss, rtol=1e-4)
    assert rival_gradient.keys() == gradient.keys()
    greatest = max(np.abs(leaf).max() for leaf in rival_gradient.values())
    for path, leaf in rival_gradient.items():
        scale = max(np.abs(leaf).max(), 1e-3 * greatest)  # the gradient of the keys' bias is zero
        np.testing.assert_allclose(gradient[path], leaf, rtol=0, atol=1e-3 * scale, err_msg=path)


def test_blocks_equal_those_of_flax(metadyn_blocks):
    """A transformer and a DeltaNet have metadyn's weights and episodes."""
    model, params, x, y, loss, gradient = metadyn_blocks
    network = outer_step.flax_network(H, model)
    graph, state = nnx.split(network)
    leaves = dict(nnx.to_flat_state(state))
    heads = (4, H // 4)

    def part_for(path, by_path):
        """Returns metadyn's part for a leaf of Flax, which separates queries, keys and values."""
        name = ".".join(map(str, path))
        name = name.replace("mixer.strength", "mixer.rate").replace("mixer.attention", "mixer")
        if name.startswith("readout"):
            return by_path["readout"].T if name.endswith("kernel") else by_path["offset"]
        part = {"query": 0, "key": 1, "value": 2}.get(path[-2])
        if part is not None:
            joined = by_path[name.replace(str(path[-2]), "project")]
            part = joined[..., part * H : (part + 1) * H]
            return part.reshape(*part.shape[:-1], *heads)
        leaf = by_path[name]
        is_output = "attention" in path and path[-2:] == ("out", "kernel")
        return leaf.reshape(*heads, H) if is_output else leaf

    for path, leaf in leaves.items():
        leaf[...] = jnp.asarray(part_for(path, params))
    network = nnx.merge(graph, nnx.from_flat_state(leaves))
    flax_loss, flax_gradient = nnx.jit(nnx.value_and_grad(lambda network: network(x, y)))(network)
    flax_gradient = {path: np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(flax_gradient)}
    expected = {path: part_for(path, gradient) for path in flax_gradient}
    check_leaves(loss, expected, flax_loss, flax_gradient)


def test_blocks_equal_those_of_pytorch(metadyn_blocks):
    """A transformer and a DeltaNet have metadyn's weights and episodes. This needs PyTorch."""
    torch = pytest.importorskip("torch")
    model, params, x, y, loss, gradient = metadyn_blocks
    network = outer_step.torch_network(H, model)
    new_names = {"mlp.0": "wide", "mlp.2": "narrow", "strength": "rate"}

    def part_for(name, by_name):
        for torch_name, metadyn_name in new_names.items():
            name = name.replace(torch_name, metadyn_name)
        if name.startswith("readout"):
            return by_name["readout"] if name.endswith("weight") else by_name["offset"]
        if "norms" in name:
            return by_name[name.replace("weight", "scale")]
        return by_name[name.replace("weight", "kernel")].T

    leaves = dict(network.named_parameters())
    with torch.no_grad():
        for name, leaf in leaves.items():
            leaf.copy_(torch.tensor(part_for(name, params)))
    torch_loss = network(torch.tensor(x), torch.tensor(y))
    torch_loss.backward()
    torch_gradient = {name: leaf.grad.numpy() for name, leaf in leaves.items()}
    expected = {name: part_for(name, gradient) for name in torch_gradient}
    check_leaves(loss, expected, torch_loss.item(), torch_gradient)


def test_networks_under_vmap_take_the_same_steps_as_each_by_itself():
    """Two networks with their own rates take three steps, each also by PyTorch's own Adam."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    rates, network = (1e-2, 3e-2), outer_step.torch_network(4, "lstm loop", 2)
    x, y = torch.randn(2, 2, T, B, 2)
    y = 30 * y  # large enough for gradients to be clipped
    weights = {name: torch.stack([leaf, leaf + 0.1]) for name, leaf in network.state_dict().items()}
    zeros = {name: torch.zeros_like(leaf) for name, leaf in weights.items()}
    state, step = (weights, zeros, zeros), sweeps.torch_step(network, torch.tensor(rates))
    for t in (1.0, 2.0, 3.0):
        state = step(*state, torch.tensor(t), x, y)
    for i, rate in enumerate(rates):
        network.load_state_dict({name: leaf[i] for name, leaf in weights.items()})
        adam = torch.optim.Adam(network.parameters(), lr=rate)
        for _ in range(3):
            adam.zero_grad()
            network(x[i], y[i]).backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), outer_step.CLIP)
            adam.step()
        for name, leaf in network.state_dict().items():
            torch.testing.assert_close(state[0][name][i], leaf, rtol=1e-4, atol=1e-5)


def test_a_row_of_sweeps_shows_seconds_and_memory_of_settings(monkeypatch, capsys):
    """A run takes 100 MiB and 3 MiB a setting, and 50 s of compiling and a second a setting."""

    def measured_twice(command, *options):
        (rates, noise) = (options.index(f"--{o}") for o in ("outer.learning-rate", "domain.sigma"))
        count = (noise - rates - 1) * (len(options) - noise - 1)
        return 50.0 + count, float(count), 100.0 + 3 * count

    monkeypatch.setattr(sweeps, "twice", measured_twice)
    sweeps.main(["--settings", "1", "4", "64"])
    *_, first, second, third = capsys.readouterr().out.splitlines()
    assert first == "| 1 | 51 | 1 | 103 | – | 51 | 1 |"
    assert second == "| 4 | 54 | 4 | 112 | 3 | 204 | 4 |"
    assert third == "| 64 | 114 | 64 | 292 | 3 | 3264 | 64 |"


def sleeping_side(seconds, log):
    """Returns a side that sleeps, and logs each time that it does."""

    def run(count):
        with open(log, "a") as file:
            file.write(f"{seconds} ")
        time.sleep(count * seconds)

    return run


def missing_side():
    raise ModuleNotFoundError("No module named 'rival'")


def test_sides_alternate_and_one_that_cannot_run_is_left_out(tmp_path, capsys):
    log = tmp_path / "log"
    slow, fast = (
        Side(__name__, "sleeping_side", {"seconds": s, "log": str(log)}) for s in (0.04, 0.02)
    )
    sides = {"slow": slow, "fast": fast, "missing": Side(__name__, "missing_side")}
    seconds = timing.alternate(sides, repeats=3, seconds=0.1)
    assert list(seconds) == ["slow", "fast"]
    assert np.all(seconds["slow"] >= 0.04)
    assert np.median(seconds["slow"] / seconds["fast"]) == pytest.approx(2, rel=0.3)
    assert log.read_text().split()[-6:] == ["0.04", "0.02"] * 3
    assert "missing: not measured (ModuleNotFoundError: No module named 'rival')" in (
        capsys.readouterr().out
    )


def test_results_are_medians_with_intervals_and_verdicts():
    samples = [1.0, 2.0, 3.0, 4.0, 50.0]
    plain = timing.result("x", samples)
    assert (plain.value, plain.target, plain.met) == (3.0, None, None)
    assert 1.0 <= plain.low <= 3.0 <= plain.high <= 50.0
    assert timing.result("x", samples, at_least=3.0).met is True
    assert timing.result("x", samples, at_most=2.9).met is False


def test_the_readme_has_the_stored_results():
    folder = Path(timing.__file__).parent
    lines = table(json.loads((folder / "results-cpu.json").read_text()))
    assert "\n".join(lines) in (folder / "README.md").read_text()


def test_a_share_is_in_the_row_of_its_time():
    rows = [
        timing.result("step: ours, ms", [2.0]),
        timing.result("step: ours, share of the product rate", [0.25]),
        timing.result("step: × theirs", [3.0], at_least=4.0),
    ]
    *_, first, second = table([dataclasses.asdict(row) for row in rows])
    assert first == "| step: ours, ms | 2 | [2, 2] | 0.25 | | |"
    assert second == "| step: × theirs | 3 | [3, 3] | | at least 4 | **missed** |"


def test_the_slower_of_products_and_copies_is_the_limit():
    limits = timing.Limits(products=100.0, copies=10.0)
    assert limits.share(np.array([2.0]), operations=50.0)[0] == 0.25
    assert limits.share(np.array([2.0]), operations=50.0, moved=10.0)[0] == 0.5


def test_the_command_writes_a_list_of_results(tmp_path, monkeypatch, capsys):
    path = tmp_path / "results.json"
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--json", str(path), "--only", "one"])
    benchmarks = {
        "one": lambda full: iter([timing.result("ratio", [2.0], at_least=1.0)]),
        "two": lambda full: iter([timing.result("other", [1.0])]),
    }
    timing.main(benchmarks, "Two benchmarks.")
    (row,) = json.loads(path.read_text())
    assert set(row) == {"name", "value", "low", "high", "target", "met", "device"}
    assert (row["name"], row["value"], row["target"], row["met"]) == (
        "ratio",
        2.0,
        "at least 1",
        True,
    )
    assert "ratio" in capsys.readouterr().out


@pytest.mark.parametrize("problem", excess_loss.TARGET)
def test_each_row_of_excess_loss_changes_a_valid_configuration(problem):
    separate = (excess_loss.STAGES, excess_loss.AVERAGED)
    unchanged, configs = excess_loss.settings(problem), []
    for changes in excess_loss.rows(problem).values():
        shared = {name: value for name, value in changes.items() if name not in separate}
        for stage in changes.get(excess_loss.STAGES, [{}]):
            configs.append(excess_loss.settings(problem, shared | stage))
    assert sum(config != unchanged for config in configs) >= 9
    assert "muon" in {config.outer.optimizer for config in configs}


def losses(mean, seeds=1, tasks=400):
    """Returns a made-up measurement whose loss, over seeds and tasks, is about `mean`."""
    noise = 1 + 0.05 * np.random.default_rng(seeds).standard_normal((seeds, tasks, 3))
    about = trajectories.About("lstm", "LSTM", "meta", "observations", loss_floor=0.1)
    coords = {"time": ("step", range(3))}
    axes = {"loss": ("seed", "task", "step")}
    description = trajectories.describe(about, axes, coords, {})
    return trajectories.dataset({"loss": mean * noise}, description)


def test_a_planted_power_law_is_recovered():
    """The excess is 40 / (episodes^0.5 units^0.25) over Bayes' loss 0.6, of which 0.1 is noise."""
    planted = lambda units, episodes: 40 * episodes**-0.5 * units**-0.25
    points = [
        power_law.Point(u, e, losses(0.6 + 0.5 * planted(u, e), seeds=4))
        for u in (16, 64)
        for e in (10_000, 40_000, 160_000)
    ]
    law = power_law.fitted(points, losses(0.6), [(256, 10_000_000)])
    assert law.exponents.low[0] < 0.5 < law.exponents.high[0]
    assert law.exponents.low[1] < 0.25 < law.exponents.high[1]
    assert np.ptp([bound[0] for bound in law.exponents]) < 0.1
    assert law.at.low[0] < planted(256, 10_000_000) < law.at.high[0]
    assert law.misfit < 0.1
    (axis,) = power_law.drawn(points, losses(0.6)).axes
    _, labels = axis.get_legend_handles_labels()
    assert labels == ["16 units", "64 units"]
    measured = [bars[0].get_xydata() for bars in axis.containers]
    excess = [[[e, planted(u, e)] for e in (10_000, 40_000, 160_000)] for u in (16, 64)]
    np.testing.assert_allclose(measured, excess, rtol=0, atol=0.01)  # five times their noise
