"""Imagination-Augmented Agents (I2A) on Sokoban: Racaniere, Weber et al. 2017, arXiv 1707.06203.

A learned model of the environment imagines one rollout for each action; an encoder reads the rollouts, and an
actor-critic sees their embeddings beside the real observation. It learns what to make of an imperfect model.

    python i2a.py                               # from nothing to a trained agent on small rooms, on one CPU thread
    python i2a.py --agent model-free            # the baseline; --env-model copy | poor | perfect: the other ones
    python i2a.py --evaluate runs/NAME/agent.pt # solve rate on held-out levels
    python i2a.py --preset paper                # the paper's sizes (80x80 RGB, 10x10, 4 boxes): a GPU's job

Shapes: `T` steps of a rollout, `B` environments, `A` actions, `D` imagination depth, `R = B * A` imagined rollouts in
batch-major order (row b * A + a starts with action a in environment b), `F` stacked frames, `H, W` pixels (cells, for
`cells`), `C` classes of a pixel, `P` input planes.
"""

import contextlib
import copy
import csv
import ctypes
import datetime
import functools
import json
import math
import os
import pathlib
import random
import signal
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch import Tensor
from tqdm import tqdm

import sokoban_env
from sokoban_env import SokobanVectorEnv, convert_observation, generate_levels

A = 5  # actions: no-op, up, down, left, right
REWARDS = (-1.1, -0.1, 0.9, 10.9)  # every reward that Sokoban pays
EVAL_SEED = 10**9  # of the held-out levels
TRANSITION = ("frames", "next", "action", "reward", "end")  # what the environment model learns from
# What may change when a run goes on: its length, a curriculum, where and how often it reports
MAY_CHANGE = (
    "total_timesteps", "num_boxes", "levels", "max_episode_steps", "learning_rate", "ent_coef", "eval_levels",
    "eval_episodes", "resume", "cuda", "track", "wandb_project_name", "wandb_entity", "capture_video", "save_model",
    "checkpoint_minutes", "log_frequency",
)  # fmt: skip


@dataclass
class Args:
    exp_name: str = pathlib.Path(__file__).stem
    """the name of this experiment (of this file)"""
    seed: int = 1
    """seed of the experiment"""
    torch_deterministic: bool = True
    """only deterministic algorithms"""
    cuda: bool = True
    """use a GPU if there is one"""
    track: bool = False
    """track the run in Weights and Biases"""
    wandb_project_name: str = "model-based-rl"
    """the Weights and Biases project"""
    wandb_entity: str | None = None
    """the Weights and Biases team"""
    capture_video: bool = False
    """write a GIF of evaluation episodes beside the agent"""
    save_model: bool = True
    """write agent.pt (weights only) at the end"""

    # Algorithm specific arguments
    preset: Literal["laptop", "paper"] = "laptop"
    """laptop: λ = .95 (ours); paper: the paper's sizes, optimiser and n-step returns; flags override a preset"""
    agent: Literal["i2a", "model-free"] = "i2a"
    """model-free: the same agent without its imagination"""
    size: int = 7
    """board size"""
    num_boxes: int = 1
    """boxes of a level"""
    max_episode_steps: int = 60
    """steps after which an episode is truncated (the paper's 10x10 rooms: 120)"""
    observation: Literal["cells", "tiny_rgb", "rgb"] = "cells"
    """what the agent sees"""
    frame_stack: int = 1
    """frames of an observation (the lecture's setting: 4)"""
    levels: str | None = None
    """train on this Boxoban file or folder instead of generated levels"""
    total_timesteps: int = 1_500_000
    """environment frames, those of the model's pretraining included"""
    num_envs: int = 32
    """parallel environments of each process"""
    num_steps: int = 8
    """steps n of a rollout before each update"""
    learning_rate: float = 3e-3
    """learning rate (ours: the paper doesn't publish it)"""
    optimizer: Literal["adam", "rmsprop"] = "adam"
    """RMSProp is the paper's"""
    gamma: float = 0.97
    """discount (ours, after the DRC and Thinker papers)"""
    gae_lambda: float = 1.0
    """1 is the n-step return of the paper; the laptop preset brings .95, which needs fewer frames"""
    ent_coef: float = 0.001
    """entropy bonus: with rewards scaled by .1, the paper's .01"""
    vf_coef: float = 0.5
    """weight of the value loss (ours)"""
    distill_coef: float = 1.0
    """weight of the distillation loss (ours: the paper searched it)"""
    max_grad_norm: float = 1.0
    """gradient clipping (ours)"""
    reward_scale: float = 0.1
    """the agent's losses see rewards times this (ours)"""

    imagination_depth: int = 3
    """steps D of each imagined rollout (the paper's headline: 5)"""
    env_model: Literal["learned", "poor", "perfect", "copy"] = "learned"
    """perfect: the simulator; copy: an identity model of the same size; poor: too small a model"""
    env_model_path: str | None = None
    """load the environment model of this checkpoint instead of pretraining one"""
    finetune_model: bool = False
    """go on training the model on fresh transitions, by its own loss"""
    reward_prediction: bool = True
    """let the encoder see predicted rewards"""
    rollout_policy: Literal["distilled", "random", "pretrained"] = "distilled"
    """who acts in imagination; pretrained: the model-free agent of --pretrained-path, frozen"""
    kl_direction: Literal["forward", "reverse"] = "forward"
    """distillation: D_KL(π‖π̂) (paper), or D_KL(π̂‖π) (lecture)"""
    pretrained_path: str | None = None
    """a model-free agent's file, for --rollout-policy pretrained and --model-data pretrained"""
    model_data: Literal["random", "pretrained"] = "random"
    """who collects the model's data; pretrained: the (partially trained) agent of --pretrained-path"""
    model_frames: int = 20_000
    """transitions that the model is pretrained on"""
    model_steps: int = 3_000
    """most optimiser steps of the pretraining"""
    model_learning_rate: float = 1e-2
    """learning rate of the pretraining, decays linearly"""

    width_multiplier: float = 1.0
    """scales every width of the agent's own networks (the paper's wide baseline: 2)"""
    model_width: int = 16
    """channels of the environment model"""
    cnn_channels: tuple[int, ...] = (16, 16)
    """channels of the model-free path"""
    encoder_channels: tuple[int, ...] = (16, 16)
    """channels of the rollout encoder"""
    dense: int = 128
    """units of the model-free path's dense layer"""
    lstm: int = 64
    """units of the rollout encoder's LSTM"""

    compile: bool = False
    """torch.compile imagination, networks, returns, losses and the optimiser's step"""
    bf16: bool = False
    """bfloat16 autocast"""
    checkpoint_minutes: float = 3.0
    """minutes between checkpoints"""
    log_frequency: int = 20_000
    """frames between rows of metrics"""
    resume: str | None = None
    """continue from this checkpoint.pt, with its flags; length, learning rate and levels may be other ones"""
    evaluate: str | None = None
    """evaluate this checkpoint.pt or agent.pt, and stop"""
    eval_episodes: int = 1000
    """held-out levels of an evaluation"""
    eval_levels: str | None = None
    """evaluate on this Boxoban file or folder"""


# The paper has the sizes of the agent's networks, RMSProp, 32 to 64 workers, the entropy bonus and the depth; its
# learning rate, steps a rollout, episode limit, and the model's data, width and training are ours
PRESETS: dict[str, dict[str, Any]] = {
    "laptop": {"gae_lambda": 0.95},
    "paper": {
        "size": 10, "num_boxes": 4, "max_episode_steps": 120, "observation": "rgb", "total_timesteps": 10**9,
        "num_envs": 32, "num_steps": 5, "optimizer": "rmsprop", "learning_rate": 7e-4, "ent_coef": 0.01,
        "reward_scale": 1.0, "imagination_depth": 5, "cnn_channels": (32, 64, 64), "encoder_channels": (32, 64, 64),
        "dense": 512, "lstm": 512, "model_width": 64, "model_frames": 1_000_000, "model_steps": 100_000,
    },
}  # fmt: skip


# ---------------------------------------------------------------------------------- utilities, the same in every script


def seed_everything(seed: int, deterministic: bool) -> None:
    """Seed Python, numpy and torch; with `deterministic`, let torch use deterministic algorithms only."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    torch.backends.cudnn.deterministic = deterministic


def layer_init(layer: nn.Module, std: float = 2**0.5, bias: float = 0.0) -> nn.Module:
    """Orthogonal weights of gain `std`, constant bias."""
    nn.init.orthogonal_(layer.weight, std)
    nn.init.constant_(layer.bias, bias)
    return layer


class Logger:
    """Metrics to `runs/<run_name>/metrics.csv`, to the terminal and, with `args.track`, to Weights and Biases.

    One call of `log` is one row; a metric that is new adds a column. The W&B run's id is its name, so that a resumed
    run goes on under it.
    """

    def __init__(self, args: Any, run_name: str) -> None:
        self.path = pathlib.Path("runs") / run_name / "metrics.csv"
        self.rows: list[dict[str, Any]] = []
        self.columns: list[str] = []
        self.run = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            sys.exit(f"can't create {self.path.parent}: {e.strerror}; run from a folder that you can write to")
        if args.track:
            import wandb

            try:
                self.run = wandb.init(
                    project=args.wandb_project_name, entity=args.wandb_entity, name=run_name, id=run_name,
                    resume="allow", config=vars(args), dir=str(self.path.parent),
                )  # fmt: skip
            except wandb.Error as e:
                sys.exit(f"--track: {str(e).splitlines()[0]}; log in by `wandb login`, or set WANDB_MODE=offline")
            self.run.define_metric("*", step_metric="global_step")

    def restore(self, num_rows: int) -> None:
        """Take up the file of a resumed run, cut back to the rows that its checkpoint had counted."""
        try:
            with self.path.open(newline="") as file:
                self.rows = [{k: v for k, v in row.items() if v} for row in csv.DictReader(file)][:num_rows]
        except OSError as e:
            print(f"can't read {self.path}: {e.strerror}; its earlier rows are lost", file=sys.stderr)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Write a row.

        Raises:
            SystemExit: a loss that is not finite, after the row that shows it. Log before you save a checkpoint, and
            the last one is good.
        """
        row = {"global_step": step, **metrics}
        self.rows.append(row)
        try:
            if set(row) <= set(self.columns):
                with self.path.open("a", newline="") as file:
                    csv.DictWriter(file, self.columns).writerow(row)
            else:
                self.columns = list(dict.fromkeys(name for row in self.rows for name in row))
                temporary = self.path.with_name("metrics.csv.tmp")
                with temporary.open("w", newline="") as file:
                    writer = csv.DictWriter(file, self.columns)
                    writer.writeheader()
                    writer.writerows(self.rows)
                os.replace(temporary, self.path)
        except OSError as e:
            sys.exit(f"can't write {self.path}: {e.strerror}; mend that and --resume from the last checkpoint")
        if self.run is not None:
            self.run.log(row)
        if not sys.stderr.isatty():  # a terminal has a progress bar instead
            print(" ".join(f"{name}={value:.6g}" for name, value in row.items()), flush=True)
        for name, value in metrics.items():
            if name.startswith("losses/") and not math.isfinite(value):
                sys.exit(f"{name} is {value} at step {step}: lower --learning-rate; the last checkpoint is good")

    def close(self) -> None:
        if self.run is not None:
            self.run.finish()


def save_checkpoint(path: str | os.PathLike, state: dict[str, Any]) -> None:
    """torch.save through a temporary file: a run that dies in it keeps its last checkpoint."""
    path = pathlib.Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        torch.save(state, temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:  # torch reports a full or read-only disk as a RuntimeError
        sys.exit(f"can't write {path}: {str(e).splitlines()[0]}")


def load_checkpoint(path: str | os.PathLike, device: str | torch.device) -> dict[str, Any]:
    """What `save_checkpoint` wrote, its tensors on `device`. `weights_only`: a foreign file can't run code.

    Raises:
        SystemExit: the file can't be read, is damaged, or is no checkpoint.
    """
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except OSError as e:
        sys.exit(f"can't read {path}: {e.strerror}")
    except Exception:  # a damaged file can fail anywhere in torch's reader
        sys.exit(f"{path} is damaged, or no checkpoint of this project: train one, or take an older copy")
    if not isinstance(state, dict) or not isinstance(state.get("args"), dict):
        sys.exit(f"{path} is no checkpoint of this project: it holds no `args`")
    return state


def saved_args(path: str | os.PathLike, state: dict[str, Any]) -> Any:
    """The `Args` of a checkpoint; exits if another script wrote it."""
    if unknown := set(state["args"]) ^ {field.name for field in fields(Args)}:
        names = ", ".join(sorted(unknown)[:4]) + ", …" * (len(unknown) > 4)
        sys.exit(f"{path} is of another script or version of it (its flags differ: {names}): give it to its own")
    return Args(**state["args"])


def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory for the next tensors: page faults cost more than small networks' arithmetic."""
    with contextlib.suppress(OSError, AttributeError):  # another C library: nothing to do
        libc = ctypes.CDLL("libc.so.6")
        for option, value in ((-3, 2**25), (-1, 2**31 - 1), (-2, 2**26)):  # M_MMAP_THRESHOLD, _TRIM_THRESHOLD, _TOP_PAD
            libc.mallopt(option, value)


# `cells` as four planes (wall, target, box, player), one row a cell value: lossless, and fewer than one-hot's seven
CELL_PLANES = ((1, 0, 0, 0), (0, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 1, 1, 0), (0, 0, 0, 1), (0, 1, 0, 1))


@functools.cache
def cell_table(device: torch.device) -> Tensor:
    """CELL_PLANES on the device, copied there once."""
    return torch.tensor(CELL_PLANES, dtype=torch.float32, device=device)


def cell_planes(cells: Tensor) -> Tensor:
    """Boards (..., H, W) of uint8 cells to network input (..., 4, H, W), float32 (channels last in memory: faster)."""
    return F.embedding(cells.int(), cell_table(cells.device)).movedim(-1, -3)


def generalized_advantages(
    rewards: Tensor, values: Tensor, next_values: Tensor, terminated: Tensor, done: Tensor, gamma: float, lam: float
) -> Tensor:
    """A_t = Σ_k (γλ)^k δ_{t+k} with δ_t = r_{t+1} + γ V(s_{t+1}) - V(s_t); all (T, B), flags bool.

    λ = 1 is the n-step return: Σ_{k<n} γ^k r_{t+k+1} + γ^n V(s_{t+n}) - V(s_t). `terminated` stops the bootstrap,
    `done` (terminated or truncated) cuts the sum; `next_values` are those of the true next observations, before resets.
    """
    deltas = rewards + gamma * next_values * ~terminated - values
    result, running = torch.empty_like(deltas), torch.zeros_like(deltas[0])
    for t in reversed(range(len(deltas))):
        running = deltas[t] + gamma * lam * ~done[t] * running
        result[t] = running
    return result


# --------------------------------------------------------------------------------------------------------- networks


@functools.cache
def palette(kind: str, device: torch.device) -> Tensor:
    """The colours (C, 3) of an RGB observation, copied to the device once."""
    return torch.as_tensor(sokoban_env.SPRITE_PALETTE if kind == "rgb" else sokoban_env.TINY_PALETTE, device=device)


def encode(frame: Tensor, kind: str) -> Tensor:
    """A frame (..., H, W[, 3]) as the class of each pixel (..., H, W): its cell value, or its colour in the palette."""
    if kind == "cells":
        return frame.long()
    return (frame[..., None, :] == palette(kind, frame.device)).all(-1).byte().argmax(-1)


def decode(classes: Tensor, kind: str) -> Tensor:
    """The inverse of `encode`."""
    return classes.byte() if kind == "cells" else palette(kind, classes.device)[classes]


def to_planes(frames: Tensor, kind: str) -> Tensor:
    """Frames (B, F, H, W[, 3]) uint8 to network input (B, F * P, H, W), float32."""
    if kind == "cells":
        return cell_planes(frames).flatten(1, 2)
    return frames.permute(0, 1, 4, 2, 3).float().flatten(1, 2) / 255


def num_planes(kind: str) -> int:
    return 4 if kind == "cells" else 3


def board_pixels(args: Args) -> int:
    return args.size * (8 if args.observation == "rgb" else 1)


def conv_trunk(planes: int, channels: tuple[int, ...], stride: int, kind: str, pixels: int) -> nn.Sequential:
    """Convolutions to a flat feature vector: the paper's kernels for `rgb`, 3x3 ones (ours) for a pixel a cell."""
    layers: list[nn.Module] = []
    for i, channel in enumerate(channels):
        kernel, step, padding = ((8, 4, 3)[i], (4, 2, 1)[i], 0) if kind == "rgb" else (3, 1 if i else stride, 1)
        layers += [layer_init(nn.Conv2d(planes, channel, kernel, step, padding)), nn.ReLU(inplace=True)]
        planes = channel
    trunk = nn.Sequential(*layers, nn.Flatten())
    trunk.num_features = trunk(torch.zeros(1, layers[0].in_channels, pixels, pixels)).shape[1]
    return trunk


class EnvModel(nn.Module):
    """The environment model: p(next frame, reward, end | last frames, action) (section 3.2 and appendix).

    A convolution over frames and action planes, pool-and-inject, a second convolution; from there a categorical over
    the C classes of each pixel, one over reward values, and the probability that the episode ends.
    """

    def __init__(self, kind: str, frame_stack: int, width: int) -> None:
        super().__init__()
        self.kind = kind
        self.classes = 7 if kind != "rgb" else len(sokoban_env.SPRITE_PALETTE)
        planes = num_planes(kind) * frame_stack
        # `rgb`: the paper's 8x8 convolution of stride 8 to the board's resolution, and a deconvolution back
        self.shrink = nn.Conv2d(planes, 2 * width, 8, 8) if kind == "rgb" else None
        self.conv1 = nn.Conv2d(2 * width if kind == "rgb" else planes, 2 * width, 3, padding=1)
        self.action = nn.Embedding(A, 2 * width)  # one-hot action planes through a 1x1 convolution
        self.inject = nn.Linear(2 * width, width)
        self.conv2 = nn.Conv2d(2 * width, width, 3, padding=1)
        self.frame = nn.ConvTranspose2d(width, self.classes, 8, 8) if kind == "rgb" else nn.Conv2d(width, 7, 1)
        self.event = nn.Conv2d(width, 16, 1)
        self.outcome = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, len(REWARDS) + 1))
        self.register_buffer("rewards", torch.tensor(REWARDS))
        self.register_buffer("prior", 4 * torch.eye(7))  # most cells stay as they are (ours)

    def forward(self, frames: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """frames (B, F, H, W[, 3]), action (B,) -> logits: frame (B, C, H, W), reward (B, 4), end (B,)."""
        x = to_planes(frames, self.kind)
        if self.shrink is not None:
            x = F.relu(self.shrink(x))
        h = F.relu(self.conv1(x) + self.action(action)[:, :, None, None], inplace=True)  # (B, 2 * width, H, W)
        # Pool-and-inject: the global maximum of each channel, given back to every cell
        pooled = F.max_pool2d(h, h.shape[2:]).flatten(1)  # (B, 2 * width)
        h = F.relu(self.conv2(h) + self.inject(pooled)[:, :, None, None], inplace=True)  # (B, width, H, W)
        frame = self.frame(h)
        if self.shrink is None:
            frame = frame + F.embedding(encode(frames[:, -1], self.kind), self.prior).movedim(-1, 1)
        event = F.relu(self.event(h), inplace=True)
        outcome = self.outcome(F.max_pool2d(event, event.shape[2:]).flatten(1))
        return frame, outcome[:, :-1], outcome[:, -1]

    def predict(self, frames: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The likeliest next frame (B, H, W[, 3]) uint8, its reward (B,), and whether it ends the episode (B,)."""
        frame, reward, end = self(frames, action)
        return decode(frame.argmax(1), self.kind), self.rewards[reward.argmax(1)], end > 0


class CopyModel(EnvModel):
    """The paper's copy model: an identity that pays nothing, with the parameters of a real model."""

    def predict(self, frames: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return frames[:, -1], torch.zeros_like(action, dtype=torch.float32), torch.zeros_like(action, dtype=torch.bool)


class PerfectModel(nn.Module):
    """The simulator in the model's place."""

    def __init__(self, kind: str, size: int) -> None:
        super().__init__()
        self.kind, self.size, self.envs = kind, size, None

    @torch.compiler.disable  # the simulator's steps are not for torch.compile
    def predict(self, frames: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        cells = convert_observation(frames[:, -1], self.kind, "cells")
        if self.envs is None or self.envs.num_envs != len(cells):
            settings = {"size": self.size, "max_episode_steps": None, "observation": self.kind, "device": cells.device}
            # Its own level is never seen: each call sets the boards
            self.envs = SokobanVectorEnv(len(cells), levels=["#####\n#@$.#\n#####"], **settings)
        self.envs.set_state({"cells": cells})
        frame, reward, end, _, info = self.envs.step(action)
        return true_next_observation(frame, info), reward, end


class RolloutPolicy(nn.Module):
    """π̂: a small, fast policy that acts in imagination."""

    def __init__(self, kind: str, frame_stack: int, pixels: int) -> None:
        super().__init__()
        self.kind = kind
        self.trunk = conv_trunk(num_planes(kind) * frame_stack, (16, 16)[: 1 + (kind == "rgb")], 2, kind, pixels)
        self.dense = layer_init(nn.Linear(self.trunk.num_features, 32))
        self.actor = layer_init(nn.Linear(32, A), 0.01)

    def forward(self, frames: Tensor) -> Tensor:
        """frames (B, F, H, W[, 3]) -> logits (B, A)."""
        return self.actor(F.relu(self.dense(self.trunk(to_planes(frames, self.kind)))))


class RolloutEncoder(nn.Module):
    """A CNN on each imagined frame with its reward, then an LSTM that reads the rollout backwards."""

    def __init__(self, kind: str, channels: tuple[int, ...], lstm: int, pixels: int) -> None:
        super().__init__()
        self.kind = kind
        self.trunk = conv_trunk(num_planes(kind) + 1, channels, 2, kind, pixels)
        self.project = layer_init(nn.Linear(self.trunk.num_features, lstm if kind == "rgb" else lstm // 2))
        self.lstm = nn.LSTMCell(self.project.out_features, lstm)

    def forward(self, frames: Tensor, rewards: Tensor, alive: Tensor) -> Tensor:
        """frames (D, R, H, W[, 3]), rewards and alive (D, R) -> embedding (R, LSTM)."""
        depth, rollouts = rewards.shape
        x = to_planes(frames.flatten(0, 1)[:, None], self.kind)  # (D * R, P, H, W)
        reward_plane = rewards.flatten()[:, None, None, None].expand(-1, 1, *x.shape[2:])
        x = self.trunk(torch.cat([x, reward_plane], 1))
        x = F.relu(self.project(x)).unflatten(0, (depth, rollouts))
        h = c = torch.zeros(rollouts, self.lstm.hidden_size, device=x.device, dtype=x.dtype)
        for d in reversed(range(depth)):  # t+τ first
            h, c = self.lstm(x[d], (h, c))
            h, c = h * alive[d, :, None], c * alive[d, :, None]  # nothing is read past the imagined end
        return h


class I2AAgent(nn.Module):
    """A model-free path and the aggregated embeddings of A imagined rollouts, to a policy and a value."""

    def __init__(self, args: Args) -> None:
        super().__init__()
        self.kind = args.observation
        wider = lambda widths: tuple(round(args.width_multiplier * width) for width in widths)  # noqa: E731
        (dense, lstm), pixels = wider((args.dense, args.lstm)), board_pixels(args)
        planes = num_planes(self.kind) * args.frame_stack
        self.trunk = conv_trunk(planes, wider(args.cnn_channels), 1, self.kind, pixels)
        self.dense = layer_init(nn.Linear(self.trunk.num_features, dense))
        self.encoder = None
        if args.agent == "i2a":
            self.encoder = RolloutEncoder(self.kind, wider(args.encoder_channels), lstm, pixels)
        joint = dense + (A * lstm if self.encoder else 0)
        self.actor, self.critic = layer_init(nn.Linear(joint, A), 0.01), layer_init(nn.Linear(joint, 1), 1.0)

    def forward(self, frames: Tensor, imagined: tuple[Tensor, Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """frames (B, F, H, W[, 3]), imagined: of `imagine` -> logits (B, A), value (B,), float32."""
        x = F.relu(self.dense(self.trunk(to_planes(frames, self.kind))))  # (B, dense)
        if self.encoder is not None:
            embedding = self.encoder(*imagined)  # (B * A, LSTM)
            # The aggregator concatenates each environment's e_1 ... e_A: (B, dense + A * LSTM)
            x = torch.cat([x, embedding.unflatten(0, (len(x), A)).flatten(1)], 1)
        return self.actor(x).float(), self.critic(x).squeeze(-1).float()


# -------------------------------------------------------------------------------------------------------- algorithm


def sample(logits: Tensor, noise: Tensor) -> Tensor:
    """Actions (B,) ~ softmax(logits), by `noise` (B, A) ~ Exp(1): the argmax of p / noise."""
    return (logits - noise.log()).argmax(-1)


def true_next_observation(observation: Tensor, info: dict[str, Any]) -> Tensor:
    """What a step led to, (B, ...): same-step autoreset puts the next episode's first observation into its place.

    On a GPU, the sizes of the masks have come to the host with the environment's step, the loop's one wait for it.
    """
    if "final_obs" not in info:
        return observation
    observation = observation.clone()
    observation[info["_final_obs"]] = info["final_obs"]
    return observation


@torch.no_grad()
def imagine(env_model: nn.Module, rollout_policy: Any, frames: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The imagination core, unrolled: from frames (B, F, H, W[, 3]), one rollout for each action.

    `noise` (D, R, A) ~ Exp(1) decides which actions are sampled; `rollout_policy` maps frames to logits (None: random).

    Returns:
        frames (D, R, H, W[, 3]); rewards (D, R); alive (D, R): 1 up to the rollout's imagined end, then 0.
    """
    action = torch.arange(A, device=frames.device).repeat(len(frames))  # rollout b * A + a starts with action a
    frames = frames.repeat_interleave(A, 0)  # (R, F, H, W)
    alive = torch.ones(len(frames), device=frames.device)
    steps = []
    for d in range(len(noise)):
        frame, reward, end = env_model.predict(frames, action)  # ô_{t+1}, r̂_{t+1} = M(ô_t, a_t)
        steps.append((frame, reward * alive, alive))
        if d + 1 < len(noise):
            alive = alive * ~end
            frames = torch.cat([frames[:, 1:], frame[:, None]], 1)
            logits = torch.zeros_like(noise[d]) if rollout_policy is None else rollout_policy(frames)
            action = sample(logits, noise[d])  # a_{t+1} ~ π̂(ô_{t+1})
    return tuple(map(torch.stack, zip(*steps, strict=True)))


def distillation_loss(policy_logits: Tensor, rollout_logits: Tensor, direction: str) -> Tensor:
    """D_KL(π‖π̂) = Σ_a π (log π - log π̂), or `reverse`, D_KL(π̂‖π). π is the constant target: only π̂ learns."""
    log_pi, log_pi_hat = policy_logits.detach().log_softmax(-1), rollout_logits.log_softmax(-1)
    if direction == "reverse":
        return (log_pi_hat.exp() * (log_pi_hat - log_pi)).sum(-1).mean()
    return (log_pi.exp() * (log_pi - log_pi_hat)).sum(-1).mean()


def actor_critic_losses(logits: Tensor, values: Tensor, actions: Tensor, advantages: Tensor) -> tuple[Tensor, ...]:
    """-log π(a_t|s_t) A_t; (R_t - V(s_t))², the return R_t being A_t + V(s_t); the entropy of π: means over (T, B)."""
    log_pi = logits.log_softmax(-1)  # (T, B, A)
    policy_loss = -(log_pi.gather(-1, actions[..., None]).squeeze(-1) * advantages).mean()
    value_loss = F.mse_loss(values, advantages + values.detach())
    return policy_loss, value_loss, -(log_pi.exp() * log_pi).sum(-1).mean()


def average_gradients(parameters: list[nn.Parameter]) -> None:
    """With several processes: every gradient becomes the mean over the processes."""
    if dist.is_initialized():
        flat = torch.cat([p.grad.flatten() for p in parameters])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for p, gradient in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            p.grad.copy_(gradient.view_as(p))


# ------------------------------------------------------------------------------------ the environment model's training


def play_solutions(levels: Tensor, solutions: list[str]) -> tuple[Tensor, Tensor]:
    """Boards (S + 1, L, H, W) and rewards (S, L) while the levels' solutions are played; another level follows each."""
    actions = torch.zeros(max(map(len, solutions)), len(levels), dtype=torch.int64)  # 0: no-op
    for i, solution in enumerate(solutions):
        actions[: len(solution), i] = torch.tensor(["udlr".index(move) + 1 for move in solution.lower()])
    env = SokobanVectorEnv(len(levels), size=tuple(levels.shape[1:]), levels=levels, max_episode_steps=None)
    boards, rewards = [env.reset(options={"levels": levels})[0]], []
    for action in actions:
        board, reward, *_ = env.step(action)
        boards.append(board)
        rewards.append(reward)
    return torch.stack(boards), torch.stack(rewards)


def near_rewards(levels: Tensor, solutions: list[str], rng: np.random.Generator, most: int = 8) -> Tensor:
    """Boards (L, H, W) that are 1 to `most` moves from a box on its target: each level's solution, played up to there.

    Every other level stops before its end, the rest before any of their boxes' arrivals.
    """
    back = rng.integers(1, most + 1, len(levels))
    boards, rewards = play_solutions(levels, solutions)
    arrivals = [np.flatnonzero(row[: len(s)] > 0) + 1 for row, s in zip(rewards.T, solutions, strict=True)]
    cut = [x[-1 if i % 2 else rng.integers(len(x))] for i, x in enumerate(arrivals)]
    return boards[np.maximum(0, cut - back), np.arange(len(levels))]


def collect_transitions(
    args: Args, policy: Any, num: int, seed: int, device: torch.device, levels: Tensor | None = None
) -> dict[str, Tensor]:
    """`num` transitions for the model: frames (M, F, H, W) and next (M, H, W) as cells, action, reward, end.

    Three quarters come from fresh levels (of `levels`, if given), a quarter from boards shortly before a box reaches
    its target in a generated solution: random play would hardly meet these rewards and the end otherwise (ours).
    `next` is the true next board, before any reset.
    """
    rng, parts = np.random.default_rng(seed), []
    settings = {"size": args.size, "num_boxes": args.num_boxes}
    near = near_rewards(*generate_levels(max(1, min(num // 8, 1024)), **settings, seed=seed), rng)
    stacked = (64, args.frame_stack, args.size, args.size)
    for share, boards, limit in ((0.75, levels, args.max_episode_steps), (0.25, near, 8)):
        settings |= {"levels": boards, "max_episode_steps": limit, "frame_stack": args.frame_stack}
        envs = SokobanVectorEnv(64, **settings, device=device)
        observation, _ = envs.reset(seed=seed)
        for _ in range(round(share * num / 64)):
            frames = observation.reshape(stacked)
            noise = torch.as_tensor(rng.exponential(size=(64, A)), dtype=torch.float32, device=device)
            seen = convert_observation(frames, "cells", args.observation)
            action = sample(torch.zeros_like(noise) if policy is None else policy(seen), noise)
            observation, reward, end, _, info = envs.step(action)
            following = true_next_observation(observation, info).reshape(stacked)[:, -1]
            parts.append((frames, following, action, reward, end))
    return dict(zip(TRANSITION, map(torch.cat, zip(*parts, strict=True)), strict=True))


# The actions after a quarter turn counter-clockwise (up becomes left, down right, left down, right up), and mirrored
TURNED, MIRRORED = (0, 3, 4, 2, 1), (0, 1, 2, 4, 3)


def symmetry(batch: dict[str, Tensor], which: int) -> dict[str, Tensor]:
    """A batch of transitions under one of the square's eight symmetries, `which` 0 to 7: boards and actions."""
    frames, following, action = batch["frames"], batch["next"], batch["action"]
    table = torch.arange(A, device=action.device)
    for _ in range(which % 4):
        table = torch.tensor(TURNED, device=action.device)[table]
    frames, following = (torch.rot90(x, which % 4, (-2, -1)) for x in (frames, following))
    if which >= 4:
        table = torch.tensor(MIRRORED, device=action.device)[table]
        frames, following = frames.flip(-1), following.flip(-1)
    return batch | {"frames": frames, "next": following, "action": table[action]}


def model_loss(env_model: EnvModel, batch: dict[str, Tensor]) -> Tensor:
    """Negative log likelihood (B,) of the next frame (summed over its pixels), of the reward and of the end."""
    target = encode(convert_observation(batch["next"], "cells", env_model.kind), env_model.kind)
    frame, reward, end = env_model(convert_observation(batch["frames"], "cells", env_model.kind), batch["action"])
    reward_class = (batch["reward"][:, None] - env_model.rewards).abs().argmin(1)
    loss = F.cross_entropy(frame.float(), target, reduction="none").flatten(1).sum(1)
    loss = loss + F.cross_entropy(reward.float(), reward_class, reduction="none")
    return loss + F.binary_cross_entropy_with_logits(end.float(), batch["end"].float(), reduction="none")


@torch.no_grad()
def model_metrics(env_model: nn.Module, data: dict[str, Tensor], suffix: str = "") -> dict[str, float]:
    """How often the model is right: whole boards (all, pushes, blocked pushes), rewards of each value, ends."""
    kind, parts = env_model.kind, []
    for batch in zip(*(data[name].split(1024) for name in ("frames", "next", "action")), strict=True):
        frames, following = (convert_observation(x, "cells", kind) for x in batch[:2])
        frame, reward, end = env_model.predict(frames, batch[2])
        parts.append(((frame == following).flatten(1).all(1), reward, end))
    exact, reward, end = map(torch.cat, zip(*parts, strict=True))
    reward = (reward - data["reward"]).abs() < 0.01
    end = end == data["end"]
    board, width = data["frames"][:, -1].flatten(1), data["next"].shape[-1]
    step = torch.tensor([0, -width, width, -1, 1], device=board.device)
    ahead = (board >= sokoban_env.PLAYER).byte().argmax(1) + step[data["action"]]
    at_box = (board.gather(1, ahead[:, None])[:, 0] - sokoban_env.BOX) < 2  # uint8: a box or a box on a target
    moved = (data["frames"][:, -1] != data["next"]).flatten(1).any(1)
    masks = {
        "exact_board_accuracy": (exact, torch.ones_like(moved)),
        "exact_board_accuracy_pushes": (exact, at_box & moved),
        "exact_board_accuracy_blocked_pushes": (exact, at_box & ~moved),
        "termination_recall": (end, data["end"]),
        "all_right": (exact & reward & end, torch.ones_like(moved)),
    }
    for value in REWARDS:
        masks[f"reward_recall_{value:+.1f}"] = (reward, (data["reward"] - value).abs() < 0.01)
    result = {f"model/{name}{suffix}": right[mask].float().mean().item() for name, (right, mask) in masks.items()}
    return {name: value for name, value in result.items() if value == value}  # without what did not occur


def pretrain_model(
    env_model: EnvModel, data: dict[str, Tensor], held_out: dict[str, Tensor], args: Args, rng: torch.Generator,
    logger: Logger, stop: list[int],
) -> None:  # fmt: skip
    """Fit the model until `held_out`, transitions of other levels, is all right three times in a row, or to the end of
    `--model-steps`, and keep the best weights. `stop` that is not empty ends it at once.

    Half of each batch is uniform, half in proportion to each transition's latest loss: so the rare ones (pushes,
    blocked pushes, rewards) are seen most. Each batch stands under one of the board's symmetries. (Both are ours.)
    """
    size = 64
    optimizer = torch.optim.Adam(env_model.parameters(), args.model_learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / args.model_steps)
    priority = torch.full((len(data["action"]),), 1e3, device=rng.device)
    best, right_in_a_row, weights = -1.0, 0, {}
    for step in range(args.model_steps):
        index = torch.cat([
            torch.randint(len(priority), (size // 2,), generator=rng, device=rng.device),
            torch.multinomial(priority, size // 2, replacement=True, generator=rng),
        ])  # fmt: skip
        loss = model_loss(env_model, symmetry({name: value[index] for name, value in data.items()}, step % 8))
        optimizer.zero_grad(set_to_none=True)
        loss.mean().backward()
        nn.utils.clip_grad_norm_(env_model.parameters(), 10.0)
        optimizer.step()
        schedule.step()
        priority[index] = loss.detach().nan_to_num(1e3).clamp(1e-6, 1e6)  # a loss that is no number stops at the row
        if stop:
            return
        if (step + 1) % 500 == 0 or step + 1 == args.model_steps:
            metrics = model_metrics(env_model, held_out)
            logger.log(args.model_frames, metrics | {"losses/model_loss": loss.mean().item(), "model/step": step + 1})
            if metrics["model/all_right"] >= best:
                best, weights = metrics["model/all_right"], copy.deepcopy(env_model.state_dict())
            right_in_a_row = right_in_a_row + 1 if metrics["model/all_right"] == 1 else 0
            if right_in_a_row == 3:
                break
    env_model.load_state_dict(weights)


# ------------------------------------------------------------------------------------------------ building and playing


class PretrainedPolicy(I2AAgent):
    """A frozen model-free agent, as rollout policy or to collect the model's data."""

    def __init__(self, args: Args) -> None:
        super().__init__(replace(args, agent="model-free"))
        self.requires_grad_(False)

    def forward(self, frames: Tensor) -> Tensor:
        return super().forward(frames, None)[0]


def load_networks(networks: nn.Module, state: dict[str, Any], path: str, prefix: str = "") -> None:
    """Load a file's weights whose names start with `prefix`; exits if they are of other parts or sizes."""
    saved = state.get("networks", {})
    try:
        networks.load_state_dict({k.removeprefix(prefix): v for k, v in saved.items() if k.startswith(prefix)})
    except RuntimeError as e:
        sys.exit(f"{path} was made with other parts or sizes than these flags: {str(e).splitlines()[1].strip()}")


def make_networks(args: Args, device: torch.device) -> nn.ModuleDict:
    """The `agent` and, for I2A, its `env_model` (frozen) and `rollout_policy` (none for a random one)."""
    networks = nn.ModuleDict({"agent": I2AAgent(args)})
    if args.agent == "i2a":
        if args.env_model == "perfect":
            networks["env_model"] = PerfectModel(args.observation, args.size)
        else:
            model_class = CopyModel if args.env_model == "copy" else EnvModel
            width = max(1, args.model_width // 8) if args.env_model == "poor" else args.model_width
            networks["env_model"] = model_class(args.observation, args.frame_stack, width).requires_grad_(False)
        if args.rollout_policy == "distilled":
            networks["rollout_policy"] = RolloutPolicy(args.observation, args.frame_stack, board_pixels(args))
        elif args.rollout_policy == "pretrained":
            networks["rollout_policy"] = PretrainedPolicy(args)
    return networks.to(device)


def imagination(args: Args, networks: nn.ModuleDict, rng: torch.Generator) -> Any:
    """The function frames (B, F, H, W[, 3]) -> imagined rollouts, its noise from `rng`; None for a model-free agent."""
    rollout_policy = getattr(networks, "rollout_policy", None)

    def dream(frames: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        noise = torch.empty(args.imagination_depth, len(frames) * A, A, device=frames.device)
        noise.exponential_(generator=rng)
        frames, rewards, alive = imagine(networks["env_model"], rollout_policy, frames, noise)
        return frames, rewards * args.reward_prediction, alive

    return dream if args.agent == "i2a" else None


@torch.no_grad()
def depth_metrics(args: Args, networks: nn.ModuleDict, frames: Tensor, seed: int) -> dict[str, float]:
    """The share of rollouts imagined exactly as the simulator plays them, up to each depth."""
    rng = torch.Generator(frames.device).manual_seed(seed)  # its own: measuring must not change what follows
    rollout_policy = getattr(networks, "rollout_policy", None)
    noise = torch.empty(args.imagination_depth, len(frames) * A, A, device=frames.device).exponential_(generator=rng)
    models = (networks["env_model"], PerfectModel(args.observation, args.size))
    (ours, _, _), (true, _, alive) = (imagine(model, rollout_policy, frames, noise) for model in models)
    right = (ours == true).flatten(2).all(2) | (alive == 0)  # (D, R); nothing counts after the true end
    shares = right.float().cumprod(0).mean(1).tolist()
    return {f"model/exact_board_accuracy_depth_{d}": share for d, share in enumerate(shares, start=1)}


def read_levels(path: str, size: int) -> Tensor:
    """The levels (L, H, W) of a Boxoban file or folder."""
    try:
        return sokoban_env.load_levels(path, size)
    except OSError as e:
        sys.exit(f"can't read {path}: {e.strerror}")
    except ValueError as e:
        sys.exit(str(e))


def held_out_levels(args: Args) -> Tensor:
    """The levels (L, H, W) of an evaluation: of `--eval-levels`, or the generator's, which training then leaves out."""
    if args.eval_levels:
        return read_levels(args.eval_levels, args.size)[: args.eval_episodes]
    try:
        return generate_levels(args.eval_episodes, size=args.size, num_boxes=args.num_boxes, seed=EVAL_SEED)[0]
    except ValueError as e:
        sys.exit(str(e))


@torch.no_grad()
def evaluate(args: Args, networks: nn.ModuleDict, levels: Tensor, device: torch.device) -> tuple[dict, Tensor]:
    """Play each level once, actions sampled.

    Returns:
        metrics: share solved with its 95 % (Wilson) interval, mean steps of the solved, imagined steps per solved
        level; and the boards (S, L, H, W) at every step, where games that are over stand still.
    """
    rng = torch.Generator(device).manual_seed(args.seed)
    dream = imagination(args, networks, rng)
    envs = SokobanVectorEnv(
        len(levels), size=args.size, levels=levels, max_episode_steps=args.max_episode_steps,
        observation=args.observation, frame_stack=args.frame_stack, device=device,
    )  # fmt: skip
    observation, _ = envs.reset(seed=args.seed, options={"levels": levels})
    playing = torch.arange(len(levels), device=device)
    solved, length = torch.zeros(2, len(levels), device=device)
    boards = [levels.to(device)]
    while len(playing):
        frames = observation if args.frame_stack > 1 else observation[:, None]
        frames = frames[playing]
        logits, _ = networks["agent"](frames, dream(frames) if dream else None)
        action = torch.zeros(len(levels), dtype=torch.int64, device=device)
        action[playing] = sample(logits, torch.empty_like(logits).exponential_(generator=rng))
        observation, _, _, _, info = envs.step(action)
        last = true_next_observation(observation, info)
        last = convert_observation(last if args.frame_stack == 1 else last[:, -1], args.observation, "cells")
        boards.append(boards[-1].clone())
        boards[-1][playing] = last[playing]
        if "final_info" in info:
            ended = playing[info["_final_info"][playing]]
            solved[ended] = info["final_info"]["success"][ended].float()
            length[ended] = info["final_info"]["episode"]["l"][ended].float()
            playing = playing[~info["_final_info"][playing]]
    n, p, z = len(levels), solved.mean().item(), 1.96
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    interval = [(centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)]
    metrics = {"eval/solved": p, "eval/solved_low": interval[0], "eval/solved_high": interval[1]}
    if p > 0:
        metrics["eval/mean_steps"] = (length * solved).sum().item() / (n * p)
        if dream:
            metrics["eval/imagined_steps_per_solved"] = A * args.imagination_depth * length.sum().item() / (n * p)
    return metrics, torch.stack(boards)


def write_gif(path: pathlib.Path, boards: Tensor) -> None:
    """Boards (S, N, H, W) as a film of N games side by side."""
    from PIL import Image  # comes with matplotlib

    pictures = convert_observation(boards.cpu(), "cells", "rgb").transpose(1, 2).flatten(2, 3).numpy()
    film = [Image.fromarray(picture).resize((2 * picture.shape[1], 2 * picture.shape[0]), 0) for picture in pictures]
    temporary = path.with_name(path.name + ".tmp")
    film[0].save(temporary, format="GIF", save_all=True, append_images=film[1:], duration=150, loop=0)
    os.replace(temporary, path)
    print(f"wrote {path}")


def check_args(args: Args) -> None:
    """Refuse flags that can't work, before anything is written."""
    least = {
        "num_envs": 1, "num_steps": 1, "log_frequency": 1, "eval_episodes": 1, "model_steps": 1, "model_width": 1,
        "dense": 1, "lstm": 2, "num_boxes": 1, "max_episode_steps": 1, "model_frames": 1000, "seed": 0,
    }  # fmt: skip
    for name, value in least.items():
        if getattr(args, name) < value:
            sys.exit(f"--{name.replace('_', '-')} {getattr(args, name)}: must be {value} or more")
    channels = (args.cnn_channels, args.encoder_channels)
    narrowest = min(min(widths, default=0) for widths in channels)
    pretrained = "pretrained" in (args.rollout_policy, args.model_data)
    learns = args.agent == "i2a" and args.env_model in ("learned", "poor")
    for wrong, message in (
        (args.agent == "i2a" and args.imagination_depth < 1, "imagination_depth must be at least 1 for agent i2a"),
        (not 1 <= args.frame_stack <= 4, f"frame_stack is {args.frame_stack}, must be 1 to 4"),
        (args.finetune_model and not learns, "--finetune-model needs --agent i2a and --env-model learned or poor"),
        (args.env_model_path and not learns, "--env-model-path needs --agent i2a and --env-model learned or poor"),
        (pretrained and not args.pretrained_path, "`pretrained` needs --pretrained-path, a model-free agent's file"),
        (args.observation == "rgb" and max(map(len, channels)) > 3, "rgb has kernels for at most three convolutions"),
        (narrowest < 1, f"cnn_channels and encoder_channels are {channels}, need widths of at least 1"),
        (args.width_multiplier * min(args.dense, args.lstm / 2, narrowest) < 1, "width_multiplier makes a width of 0"),
        (min(args.learning_rate, args.model_learning_rate) <= 0, "a learning rate must be above 0"),
        (not (0 <= args.gamma <= 1 and 0 <= args.gae_lambda <= 1), "gamma and gae_lambda must be from 0 to 1"),
        (args.seed >= EVAL_SEED // 1000, f"seed is {args.seed}, must be below {EVAL_SEED // 1000:,}"),
    ):  # fmt: skip
        if wrong:
            sys.exit(message)


def parse_args(argv: list[str] | None = None) -> Args:
    """The command line, over the flags of the checkpoint to resume or evaluate, or over the preset."""
    given = tyro.cli(Args, args=argv)
    if not (path := given.resume or given.evaluate):
        return tyro.cli(Args, args=argv, default=replace(Args(), **PRESETS[given.preset]))
    saved = saved_args(path, load_checkpoint(path, "cpu"))
    args = tyro.cli(Args, args=argv, default=saved)
    changed = {field.name for field in fields(Args) if getattr(args, field.name) != getattr(saved, field.name)}
    if given.resume and (wrong := changed - {*MAY_CHANGE}):
        flags = ", ".join("--" + name.replace("_", "-") for name in sorted(wrong))
        sys.exit(f"{flags}: {path} brings its own, which can't change in a run; leave these out")
    return replace(args, eval_levels=given.levels) if given.evaluate and given.levels else args


def main(args: Args) -> None:
    check_args(args)
    keep_freed_memory()
    cuda = args.cuda and torch.cuda.is_available()
    if "WORLD_SIZE" in os.environ:  # torchrun
        # Rank 0 alone pretrains the model, and may take long
        dist.init_process_group("nccl" if cuda else "gloo", timeout=datetime.timedelta(days=2))
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu")
    if cuda:
        torch.cuda.set_device(device)  # NCCL and torch.distributed's objects go by it
    seed_everything(args.seed, args.torch_deterministic)
    rng = torch.Generator(device).manual_seed(1000 * args.seed + rank)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.bf16)
    networks = make_networks(args, device)
    eval_levels = held_out_levels(args)
    state = load_checkpoint(args.evaluate or args.resume, device) if args.evaluate or args.resume else None
    if state:
        load_networks(networks, state, args.evaluate or args.resume)
    if args.evaluate:
        with autocast:
            metrics, boards = evaluate(args, networks, eval_levels, device)
        print(f"{args.evaluate}, trained on {state['global_step']:,} frames: {json.dumps(metrics)}")
        if args.capture_video:
            write_gif(pathlib.Path(args.evaluate).with_suffix(".gif"), boards[:, :8])
        return

    # ---- everything that the loop touches
    if state and "processes" not in state:
        sys.exit(f"{args.resume} holds weights only: --evaluate it, or --resume the checkpoint.pt beside it")
    teacher = args.pretrained_path if args.rollout_policy == "pretrained" else None
    for name, path, prefix in (("env_model", args.env_model_path, "env_model."), ("rollout_policy", teacher, "agent.")):
        if path and name in networks and not state:
            load_networks(networks[name], load_checkpoint(path, device), path, prefix)
    collector = None
    if args.model_data == "pretrained" and not (state and state["has_model"]):
        collector = PretrainedPolicy(args).to(device)
        load_networks(collector, load_checkpoint(args.pretrained_path, device), args.pretrained_path, "agent.")
    levels = read_levels(args.levels, args.size) if args.levels else None
    try:
        envs = SokobanVectorEnv(
            args.num_envs, size=args.size, num_boxes=args.num_boxes, max_episode_steps=args.max_episode_steps,
            levels=levels, observation=args.observation, frame_stack=args.frame_stack, device=device,
            exclude=eval_levels,
        )  # fmt: skip
        observation, _ = envs.reset(seed=1000 * args.seed + rank)
    except ValueError as e:
        sys.exit(str(e))
    stacked = (-1, args.frame_stack, *observation.shape[-2 if args.observation == "cells" else -3 :])
    agent, dream = networks["agent"], imagination(args, networks, rng)
    distils = args.agent == "i2a" and args.rollout_policy == "distilled"
    groups = [list(networks[name].parameters()) for name in ("agent", "rollout_policy")[: 1 + distils]]
    parameters = [p for group in groups for p in group]
    optimizer_class = {"adam": torch.optim.Adam, "rmsprop": torch.optim.RMSprop}[args.optimizer]
    optimizer = optimizer_class(parameters, args.learning_rate, eps=1e-5)
    compiled = torch.compile if args.compile else lambda function: function
    act, dream_on, pi_hat = compiled(agent), dream and compiled(dream), distils and compiled(networks["rollout_policy"])
    advantages_of, losses_of = compiled(generalized_advantages), compiled(actor_critic_losses)
    apply_gradients = compiled(optimizer.step)
    model_optimizer = torch.optim.Adam(networks["env_model"].parameters(), 1e-4) if args.finetune_model else None
    global_step, imagined, minutes, started = 0, None, 0.0, time.time()
    has_model = args.agent == "model-free" or args.env_model in ("perfect", "copy")
    task = f"Sokoban-{args.size}x{args.size}-{args.num_boxes}"
    run_name = state["run_name"] if state else f"{task}__{args.exp_name}__{args.seed}__{int(started)}"
    folder = pathlib.Path("runs") / run_name
    logger = Logger(args, run_name) if rank == 0 else None
    if state:
        if len(state["processes"]) != world:
            sys.exit(f"{args.resume} was saved by {len(state['processes'])} processes, this run has {world}")
        local = state["processes"][rank]
        rng.set_state(local["rng"].cpu())
        if any(getattr(args, name) != state["args"][name] for name in ("num_boxes", "levels")):
            del local["env"]["pool"]  # a curriculum's next stage: its own levels from the next episode on
        observation, imagined = envs.set_state(local["env"]), local["imagined"]
        optimizer.load_state_dict(state["optimizer"])
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate
        if model_optimizer:
            model_optimizer.load_state_dict(state["model_optimizer"])
        global_step, has_model, minutes = state["global_step"], state["has_model"], state["minutes"]
        if rank == 0:
            logger.restore(state["rows"])

    def save() -> None:
        local = {"rng": rng.get_state(), "env": envs.get_state(), "imagined": imagined}
        processes = [local] * world
        if world > 1:
            dist.all_gather_object(processes, local)
        if rank == 0:
            save_checkpoint(folder / "checkpoint.pt", {
                "args": asdict(replace(args, resume=None)), "run_name": run_name, "processes": processes,
                "networks": networks.state_dict(), "optimizer": optimizer.state_dict(),
                "model_optimizer": model_optimizer and model_optimizer.state_dict(), "global_step": global_step,
                "has_model": has_model, "minutes": minutes + (time.time() - started) / 60, "rows": len(logger.rows),
            })  # fmt: skip

    stop: list[int] = []
    handlers = {s: signal.signal(s, lambda number, _: stop.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}

    # ---- the environment model comes first: learned once, then frozen
    if not has_model:
        save()
        env_model = networks["env_model"].requires_grad_()
        if not args.env_model_path:
            if rank == 0:
                tenth, seed = args.model_frames // 10, args.seed
                data = collect_transitions(args, collector, args.model_frames - tenth, seed, device, levels)
                held_out = collect_transitions(args, collector, tenth, EVAL_SEED // 2 + seed, device, levels)
                pretrain_model(env_model, data, held_out, args, rng, logger, stop)
            if stop:
                sys.exit(
                    f"stopped while the model learned; python i2a.py --resume {folder}/checkpoint.pt begins that anew"
                )
            global_step += args.model_frames
        for tensor in env_model.state_dict().values() if world > 1 else ():
            dist.broadcast(tensor, 0)
        has_model = True
        save()
    if dream:
        networks["env_model"].requires_grad_(args.finetune_model)

    # ---- the agent
    hide_bar = rank > 0 or not sys.stderr.isatty()
    bar = tqdm(total=args.total_timesteps, initial=global_step, unit=" frames", disable=hide_bar)
    frames = observation.reshape(stacked)  # (B, F, H, W[, 3])
    if dream and imagined is None:
        with autocast:
            imagined = dream_on(frames)
    first_step, first_time, saved_at = global_step, time.time(), time.time()
    names = ("policy_loss", "value_loss", "entropy", "distillation", "gradient_norm", "model_loss")
    sums, iterations = torch.zeros(4 + len(names), device=device), 0  # of what ended episodes were, and of the losses
    while global_step < args.total_timesteps:
        # 1. Act for T steps, and keep the graph: the policy stays as it is until the update, which needs no second pass
        steps = []
        for _ in range(args.num_steps):
            with autocast:
                logits, value = act(frames, imagined)
            action = sample(logits.detach(), torch.empty_like(logits).exponential_(generator=rng))
            observation, reward, terminated, truncated, info = envs.step(action)
            true_next = true_next_observation(observation, info).reshape(stacked)
            if "final_info" in info:
                final = info["final_info"]
                episodes = (info["_final_info"], final["success"], final["episode"]["r"], final["episode"]["l"])
                sums[:4] += torch.stack([x.sum() for x in episodes])
            steps.append((frames, action, reward, terminated, truncated, true_next, logits, value))
            frames = observation.reshape(stacked)
            with autocast:
                imagined = dream_on(frames) if dream else None
        batch, actions, rewards, terminated, truncated, true_next, logits, values = (
            torch.stack(column) for column in zip(*steps, strict=True)
        )  # (T, B, ...)

        # 2. V(s_{t+1}) of the true next observations: of a truncated episode, its own last one
        with torch.no_grad(), autocast:
            next_values = torch.cat([values[1:], agent(frames, imagined)[1][None]])  # (T, B)
            t, b = truncated.nonzero(as_tuple=True)
            if len(t):
                last = true_next[t, b]
                next_values[t, b] = agent(last, dream(last) if dream else None)[1]

        # 3. One update of the agent and of π̂
        advantages = advantages_of(
            args.reward_scale * rewards, values.detach(), next_values, terminated, terminated | truncated, args.gamma,
            args.gae_lambda,
        )  # fmt: skip
        policy_loss, value_loss, entropy = losses_of(logits, values, actions, advantages)
        loss = policy_loss + args.vf_coef * value_loss - args.ent_coef * entropy
        distill_loss = torch.zeros((), device=device)
        if distils:
            with autocast:
                rollout_logits = pi_hat(batch.flatten(0, 1)).float()
            distill_loss = distillation_loss(logits.flatten(0, 1), rollout_logits, args.kl_direction)
        optimizer.zero_grad(set_to_none=True)
        (loss + args.distill_coef * distill_loss).backward()
        average_gradients(parameters)
        # Each by itself: the gradient of π̂ does not scale the agent's
        norms = [nn.utils.clip_grad_norm_(group, args.max_grad_norm) for group in groups]
        apply_gradients()
        losses = [policy_loss, value_loss, entropy, distill_loss, torch.stack(norms).norm()]
        sums[4:9] += torch.stack(losses).detach()
        iterations += 1

        # 4. With --finetune-model, the model learns from the same transitions, by its own loss only
        before, global_step = global_step, global_step + args.num_envs * args.num_steps * world
        log = global_step // args.log_frequency > before // args.log_frequency or global_step >= args.total_timesteps
        log |= bool(stop) and world == 1  # several processes stop together, at the next row
        if args.finetune_model or (log and dream):
            cells = (convert_observation(x, args.observation, "cells") for x in (batch, true_next[:, :, -1]))
            fresh = (x.flatten(0, 1) for x in (*cells, actions, rewards, terminated))
            fresh = dict(zip(TRANSITION, fresh, strict=True))
        if args.finetune_model:
            model_optimizer.zero_grad(set_to_none=True)
            finetune_loss = model_loss(networks["env_model"], fresh).mean()
            finetune_loss.backward()
            average_gradients(list(networks["env_model"].parameters()))
            model_optimizer.step()
            sums[9] += finetune_loss.detach()

        # 5. Log, then save what was logged
        bar.update(global_step - before)
        if not log:
            continue
        due = time.time() - saved_at > 60 * args.checkpoint_minutes or global_step >= args.total_timesteps
        flags = torch.tensor([len(stop), due], device=device)
        if world > 1:
            dist.all_reduce(sums)
            dist.all_reduce(flags, dist.ReduceOp.MAX)
        if rank == 0:
            episodes, *totals = sums[:4].tolist()
            charts = ("charts/solved", "charts/episodic_return", "charts/episodic_length")
            metrics = {name: total / episodes for name, total in zip(charts, totals, strict=True) if episodes}
            means = zip(names[: 5 + args.finetune_model], (sums[4:] / iterations / world).tolist(), strict=False)
            metrics |= {f"losses/{name}": mean for name, mean in means}
            sps = (global_step - first_step) / (time.time() - first_time)
            metrics |= {"charts/SPS": sps, "charts/minutes": minutes + (time.time() - started) / 60}
            if dream:
                metrics["charts/imagined_steps_per_second"] = sps * A * args.imagination_depth
                metrics |= model_metrics(networks["env_model"], fresh, "_own_states")
                metrics |= depth_metrics(args, networks, frames, global_step)
            logger.log(global_step, metrics)
            bar.set_postfix(solved=metrics.get("charts/solved"), SPS=int(sps))
        sums.zero_()
        iterations = 0
        stopping, due = flags.tolist()
        if stopping or due:
            save()
            saved_at = time.time()
        if stopping:
            sys.exit(f"stopped after {global_step:,} frames; to go on: python i2a.py --resume {folder}/checkpoint.pt")

    # ---- evaluate on held-out levels, and export
    bar.close()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if rank == 0:
        with autocast:
            metrics, boards = evaluate(args, networks, eval_levels, device)
        logger.log(global_step, metrics)
        if args.capture_video:
            write_gif(folder / "episodes.gif", boards[:, :8])
        if args.save_model:
            export = {"args": asdict(replace(args, resume=None)), "networks": networks.state_dict()}
            save_checkpoint(folder / "agent.pt", export | {"global_step": global_step})
            print(f"to see it play: python i2a.py --evaluate {folder}/agent.pt --capture-video")
        logger.close()
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(parse_args())
