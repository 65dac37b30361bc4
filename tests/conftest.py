"""What several test files use, and what holds for every test: one thread, a seed, and a folder to write to."""

import csv
import pathlib
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(1)


def seeded(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows_of(folder: pathlib.Path) -> list[dict[str, float]]:
    """The rows of a run's metrics, without what is empty."""
    with (folder / "metrics.csv").open(newline="") as file:
        return [{name: float(x) for name, x in row.items() if x} for row in csv.DictReader(file)]


def assert_same(one: Any, other: Any) -> None:
    """Bit for bit the same: nested containers, tensors and arrays with their types, numbers, strings."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    elif isinstance(one, torch.Tensor | np.ndarray):
        assert type(one) is type(other) and one.dtype == other.dtype
        assert one.shape == other.shape and bool((one == other).all())
    else:
        assert type(one) is type(other) and one == other


def n_step_returns(
    rewards: torch.Tensor, terminated: torch.Tensor, truncated: torch.Tensor, next_values: torch.Tensor, gamma: float
) -> torch.Tensor:
    """Of T steps, (T, ...): what each pays until its episode ends, or until step T and V of the state after that."""
    returns = torch.zeros_like(rewards)
    for t in range(len(rewards)):
        goes_on = torch.ones_like(rewards[0])
        for k in range(t, len(rewards)):
            bootstraps = ~terminated[k] & (truncated[k] | (k == len(rewards) - 1))
            reached = rewards[k] + gamma * bootstraps * next_values[k]
            returns[t] += goes_on * gamma ** (k - t) * reached
            goes_on = goes_on * ~(terminated[k] | truncated[k])
    return returns


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list]:
    """watch(owner, name): the calls (arguments, result) of owner.name from here on; `instead` may be called for it."""

    def start(owner: object, name: str, instead: Callable | None = None) -> list:
        calls, function = [], instead or getattr(owner, name)

        def watched(*args, **kwargs):
            result = function(*args, **kwargs)
            calls.append(((*args, *kwargs.values()), result))
            return result

        monkeypatch.setattr(owner, name, watched)
        return calls

    return start


class RampEnv(gym.Env):
    """State (t / 10, episode / 1000) in one array that is filled again. Action `first` + a pays a.

    An episode ends by itself, or is truncated, after `length` steps.
    """

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), dtype=np.float32)

    def __init__(self, num_actions: int, first: int, length: float, truncates: bool = False) -> None:
        self.action_space = gym.spaces.Discrete(num_actions, start=first)
        self.length, self.truncates, self.episode, self.state = length, truncates, 0, np.zeros(2, dtype=np.float32)

    def _observe(self):
        self.state[:] = self.t / 10, self.episode / 1000
        return self.state

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        self.episode += 1
        return self._observe(), {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.t += 1
        end, reward = self.t == self.length, float(action - self.action_space.start)
        return self._observe(), reward, end and not self.truncates, end and self.truncates, {}
