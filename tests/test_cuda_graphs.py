"""`captured` of ppo_atari, simulated on the CPU: what is recorded, copied, overwritten; --cuda-graphs."""

import contextlib
import functools

import pytest
import torch
from conftest import same, saved, scalars, state
from torch import nn


def flat(results):
    """The tensors of what act or compute_gradients return."""
    return list(results.values() if isinstance(results, dict) else results)


def gradients_of(agent):
    return [x.grad for x in agent.parameters()]


def attach(gradients, agent):
    for x, gradient in zip(agent.parameters(), gradients, strict=True):
        x.grad = gradient


class Stream:
    """Of a GPU: where the work is put."""

    events, current = None, "the usual stream"

    def wait_stream(self, other):
        self.events.append("wait")


class Graph:
    """Stands in for torch.cuda.CUDAGraph. As there, recording computes and draws nothing. A replay does again
    what was recorded, with the same tensors for input, and writes into those that were returned."""

    recording = None  # the graph that is being recorded

    def begin(self):
        self.random_state, Graph.recording = torch.get_rng_state(), self

    def call(self, function, agent, args):
        """What is recorded. Where there is a gradient already, backward() adds to it."""
        self.function, self.agent, self.args, self.before = function, agent, args, gradients_of(agent)
        results = function(*args)
        self.outputs = flat(results)
        return results

    def end(self):
        Graph.recording = None
        torch.set_rng_state(self.random_state)
        self.gradients = gradients_of(self.agent)
        inputs = [x for x in self.args if torch.is_tensor(x)]
        for x in [*self.outputs, *self.gradients]:  # what a GPU's memory happens to hold
            if x is not None and not any(x is y for y in inputs):
                x.fill_(-999)

    def replay(self):
        attached = gradients_of(self.agent)
        attach(self.before, self.agent)
        results = self.function(*self.args)
        new = [*flat(results), *gradients_of(self.agent)]
        for x, y in zip([*self.outputs, *self.gradients], new, strict=True):
            if x is not None:
                x.copy_(y)
        attach(attached, self.agent)


@pytest.fixture
def events(monkeypatch):
    """torch.cuda is simulated from here on; the list of what happens."""
    log = []

    @contextlib.contextmanager
    def stream(new):
        old, Stream.current = Stream.current, "a side stream"
        yield
        Stream.current = old

    @contextlib.contextmanager
    def graph(recorded):
        log.append("record")
        recorded.begin()
        yield
        recorded.end()

    monkeypatch.setattr(Stream, "events", log)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "get_rng_state", torch.get_rng_state)
    monkeypatch.setattr(torch.cuda, "set_rng_state", torch.set_rng_state)
    return log


@pytest.fixture
def captured(atari, events):
    """captured(function, agent) of the script, on the simulated GPU."""

    def start(function, agent):
        def call(*args):
            if Graph.recording:
                cached = "with" if torch.is_autocast_cache_enabled() else "without"
                events.append(f"call {cached} autocast's cache")
                return Graph.recording.call(function, agent, args)
            events.append(f"call on {Stream.current}")
            return function(*args)

        return atari.captured(call, agent)

    return start


@pytest.fixture
def agent(seeded):
    return nn.Linear(3, 1)


def gradient(agent, batch, rows, scale):
    """A small compute_gradients: of the mean output over some rows, noise included."""
    x = batch["x"].index_select(0, rows)
    loss = (agent(x) * torch.rand(len(rows), 1) * scale).mean()
    loss.backward()
    return {"loss": loss.detach()}


@pytest.fixture
def calls(captured, agent):
    """The graph of `gradient`, and a function that draws the arguments of a call."""

    def arguments(scale=1.0):
        return agent, {"x": torch.randn(8, 3)}, torch.randperm(8)[:4], torch.tensor(scale)

    return captured(gradient, agent), arguments


# --- one captured function ---


def test_a_call_returns_what_the_function_would(calls, agent):
    """The first call and later ones: the result, the gradients, and the random numbers after it."""
    graph, arguments = calls
    for number in range(4):
        args, random_state = arguments(float(number + 1)), torch.get_rng_state()
        agent.zero_grad()
        expected = gradient(*args)["loss"].clone(), *(x.clone() for x in gradients_of(agent))
        drawn = torch.rand(3)
        torch.set_rng_state(random_state)
        agent.zero_grad()
        found = graph(*args)["loss"], *gradients_of(agent)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), number
        assert torch.equal(torch.rand(3), drawn), number


def test_recording_draws_no_random_numbers(calls):
    """Although it calls the function to warm up: the first call draws as often as any other."""
    graph, arguments = calls
    args = arguments()
    states = []
    for _ in range(2):
        torch.manual_seed(5)
        graph(*args)
        states.append(torch.get_rng_state())
    torch.manual_seed(5)
    torch.rand(4, 1)
    assert torch.equal(states[0], states[1]) and torch.equal(states[0], torch.get_rng_state())


def test_b48_tensors_of_later_calls_are_copied_into_those_of_the_first(calls):
    """In dictionaries as well; the later ones are only read, and one that was changed in place counts."""
    graph, arguments = calls
    first, second = arguments(1.0), arguments(2.0)
    graph(*first)
    kept = [x.clone() for x in (second[1]["x"], *second[2:])]
    graph(*second)
    for old, new, copy in zip((first[1]["x"], *first[2:]), (second[1]["x"], *second[2:]), kept, strict=True):
        assert old.data_ptr() != new.data_ptr() and torch.equal(old, new) and torch.equal(new, copy)
    first[3].fill_(0.0)
    assert graph(*first)["loss"] == 0, "its own tensors are used as they are now"


def test_stats_of_a_call_stay_what_they_were(calls):
    """train keeps those of all minibatches, although a graph writes to the same memory each time."""
    graph, arguments = calls
    one = graph(*arguments())["loss"]
    before = one.item()
    two = graph(*arguments(5.0))["loss"]
    assert one.item() == before != two.item()


def test_b47_gradients_are_attached_again_after_zero_grad(calls, agent):
    """The tensors of the recording, with the gradient of this call alone in them."""
    graph, arguments = calls
    graph(*arguments())
    first = gradients_of(agent)
    for _ in range(2):
        agent.zero_grad()
        assert gradients_of(agent) == [None, None]
        args, random_state = arguments(3.0), torch.get_rng_state()
        graph(*args)
        found = gradients_of(agent)
        assert all(a is b for a, b in zip(found, first, strict=True))
        agent.zero_grad()
        torch.set_rng_state(random_state)
        gradient(*args)
        assert all(torch.equal(a, b) for a, b in zip(found, gradients_of(agent), strict=True))
        attach(found, agent)


def test_recording_starts_without_gradients(calls, agent):
    """One that is there already would be outside of the graph's memory, and replays would add to it."""
    graph, arguments = calls
    gradient(*arguments())
    old = gradients_of(agent)
    graph(*arguments())
    assert not any(a is b for a, b in zip(gradients_of(agent), old, strict=True))


def test_the_order_of_warming_up_and_recording(calls, events):
    """Three calls on a stream of their own, between two waits; then one that is recorded, and no more."""
    graph, arguments = calls
    with torch.autocast("cpu", enabled=False):  # as in the rollout, where autocast caches
        assert torch.is_autocast_cache_enabled()
        graph(*arguments())
        assert torch.is_autocast_cache_enabled(), "for the eager calls beside it"
    warm_up = ["wait", *["call on a side stream"] * 3, "wait"]
    assert events == [*warm_up, "record", "call without autocast's cache"]
    graph(*arguments())
    assert len(events) == 7, "nothing is recorded twice"


# --- a training of ppo_atari ---


@pytest.fixture
def on_graphs(atari, captured, monkeypatch):
    """From here on train acts and computes gradients as it does on a GPU with --cuda-graphs."""
    act, compute_gradients = atari.Agent.act, atari.compute_gradients
    graphs = {}

    def graph_of(function, agent):
        key = id(agent), getattr(function, "__name__", "act")
        if key not in graphs:
            graphs[key] = captured(function, agent), agent  # agent: so that no other one gets its id
        return graphs[key][0]

    def switch_on():
        spied = {
            "act": lambda agent, obs: graph_of(functools.partial(act, agent), agent)(obs),
            "gradients": lambda agent, *args: graph_of(compute_gradients, agent)(agent, *args),
        }
        monkeypatch.setattr(atari.Agent, "act", spied["act"])
        monkeypatch.setattr(atari.train, "__defaults__", (*atari.train.__defaults__[:-1], spied["gradients"]))
        return graphs

    return switch_on


FLAGS = {
    "clip": {"target_kl": 1e-4},
    "kl-penalty": {"kl_penalty_coef": 0.1, "kl_penalty_target": 1e-5},
}


@pytest.mark.parametrize("objective", FLAGS)
def test_training_on_graphs_is_the_eager_one(atari, train, on_graphs, objective):
    """Over time limits, new minibatches, advantages and betas: all weights and curves, bit for bit."""
    flags = {"objective": objective, "update_epochs": 3, "learning_rate": 1e-3} | FLAGS[objective]
    eager = train(atari, "CountMixed", 4, **flags)
    graphs = on_graphs()
    replayed = train(atari, "CountMixed", 4, **flags)
    assert len(graphs) == 2
    assert same(state(eager["agent"]), state(replayed["agent"]))
    logged, again = (
        {name: numbers for name, numbers in scalars(x).items() if "SPS" not in name}
        for x in (eager, replayed)
    )
    assert logged == again
    if objective == "clip":
        assert 4 < sum(logged["charts/updates"]) < 24, "the target KL ended some updates"
    else:
        assert len(set(logged["charts/kl_coef"])) > 1, "beta changed"


# --- --cuda-graphs where there is no GPU ---


def test_without_a_gpu_nothing_is_captured(atari, train, monkeypatch):
    """--cuda-graphs changes no weight of a run on the CPU."""
    plain = train(atari, "CountMixed", 2)
    monkeypatch.setattr(atari, "captured", None)
    asked = train(atari, "CountMixed", 2, cuda_graphs=True)
    assert same(state(plain["agent"]), state(asked["agent"]))


def test_a_resumed_run_may_switch_graphs_on_and_off(atari, train, cli):
    """The checkpoint then says what the run goes on with."""
    run_dir = train(atari, "BreakoutNoFrameskip-v4", 1)["run_dir"]
    for iterations, flag, value in ((2, "--cuda-graphs", True), (3, "--no-cuda-graphs", False)):
        more = [flag, "--total-timesteps", 16 * iterations, "--eval-episodes", 0]
        code, _, err = cli(atari, "--resume", run_dir, *more)
        assert code == 0, err
        checkpoint = saved(run_dir / "checkpoint.pt")
        assert checkpoint["global_step"] == 16 * iterations and checkpoint["args"]["cuda_graphs"] is value
