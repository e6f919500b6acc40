"""`captured` of ppo_atari, simulated on the CPU: what is recorded, copied, overwritten; --cuda-graphs."""

import contextlib
import functools

import pytest
import torch
from conftest import same, scalars, state
from torch import nn


def flat(results):
    """The tensors of what act or compute_gradients return."""
    return list(results.values() if isinstance(results, dict) else results)


def gradients_of(agent):
    return [x.grad for x in agent.parameters()]


def attach(gradients, agent):
    for x, gradient in zip(agent.parameters(), gradients, strict=True):
        x.grad = gradient


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

    class Stream:
        def wait_stream(self, other):
            log.append("wait")

    @contextlib.contextmanager
    def graph(recorded):
        log.append("record")
        recorded.begin()
        yield
        recorded.end()

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
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
            events.append("call")
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


def test_b47_gradients_are_attached_again_after_zero_grad(calls, agent):
    """Those of the recording, which had none to start from: replays would add to one that is not theirs."""
    graph, arguments = calls
    gradient(*arguments())
    old = gradients_of(agent)
    graph(*arguments())
    first = gradients_of(agent)
    assert not any(a is b for a, b in zip(first, old, strict=True))
    for _ in range(2):
        agent.zero_grad()
        assert gradients_of(agent) == [None, None]
        graph(*arguments(3.0))
        assert all(a is b for a, b in zip(gradients_of(agent), first, strict=True))


def test_the_order_of_warming_up_and_recording(calls, events):
    """Three calls between two waits; then one that is recorded, and no more."""
    graph, arguments = calls
    with torch.autocast("cpu", enabled=False):  # as in the rollout, where autocast caches
        assert torch.is_autocast_cache_enabled()
        graph(*arguments())
        assert torch.is_autocast_cache_enabled(), "for the eager calls beside it"
    warm_up = ["wait", *["call"] * 3, "wait"]
    assert events == [*warm_up, "record", "call without autocast's cache"]
    graph(*arguments())
    assert len(events) == 7, "nothing is recorded twice"


# --- a training of ppo_atari ---


def test_training_on_graphs_is_the_eager_one(atari, train, captured, monkeypatch):
    """Over time limits, new minibatches, advantages and betas: all weights and curves, bit for bit."""
    flags = {"objective": "kl-penalty", "kl_penalty_coef": 0.1, "kl_penalty_target": 1e-5, "target_kl": 1e-4}
    flags |= {"update_epochs": 3, "learning_rate": 1e-3}
    eager = train(atari, "CountMixed", 4, **flags)
    act, compute_gradients, graphs = atari.Agent.act, atari.compute_gradients, {}

    def graph_of(what, function, agent):
        if what not in graphs:
            graphs[what] = captured(function, agent)
        return graphs[what]

    def replay_act(agent, obs):
        return graph_of("act", functools.partial(act, agent), agent)(obs)

    def replay_gradients(agent, *args):
        return graph_of("gradients", compute_gradients, agent)(agent, *args)

    monkeypatch.setattr(atari.Agent, "act", replay_act)
    monkeypatch.setattr(atari.train, "__defaults__", (*atari.train.__defaults__[:-1], replay_gradients))
    replayed = train(atari, "CountMixed", 4, **flags)
    assert len(graphs) == 2
    assert same(state(eager["agent"]), state(replayed["agent"]))
    logged, again = scalars(eager), scalars(replayed)
    assert all(again[name] == logged[name] for name in logged if "SPS" not in name)
    assert 4 < sum(logged["charts/updates"]) < 24, "the target KL ended some updates"
    assert len(set(logged["charts/kl_coef"])) > 1, "beta changed"


def test_without_a_gpu_nothing_is_captured(atari, train, monkeypatch):
    """--cuda-graphs changes no weight of a run on the CPU."""
    plain = train(atari, "CountMixed", 2)
    monkeypatch.setattr(atari, "captured", None)
    asked = train(atari, "CountMixed", 2, cuda_graphs=True)
    assert same(state(plain["agent"]), state(asked["agent"]))
