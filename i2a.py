"""Imagination-Augmented Agents (I2A) on Sokoban: Racaniere, Weber et al. 2017, arXiv 1707.06203.

A learned model of the environment imagines one rollout for each action; an encoder reads the rollouts, and an
actor-critic sees their embeddings beside the real observation. It learns what to make of an imperfect model. Ours:
networks see the board from the player's place and know the square's symmetries, and PPO takes several epochs over one
rollout. `--preset paper` has none of it. Other differences from the paper are in docs/i2a.md.

    python i2a.py                               # from nothing to a trained agent, 7x7 rooms with two boxes
    python i2a.py --agent model-free            # the baseline; --env-model copy | poor | perfect: the other ones
    python i2a.py --evaluate runs/NAME/agent.pt # solve rate on held-out levels
    python i2a.py --preset paper                # the paper's sizes (80x80 RGB, 10x10, 4 boxes): a GPU's job

Shapes: `T` steps of a rollout, `B` environments, `M` rows of a minibatch or of the model's data, `A` actions, `D`
imagination depth, `R = B * A` imagined rollouts, of which row b * A + a starts with action a in environment b, `F`
stacked frames, `H, W` pixels of a frame (cells of the board, for `cells`), `C` classes of a pixel, `P` input planes,
`L` levels, `K` features, each under the square's 8 symmetries.
"""

import contextlib
import csv
import ctypes
import datetime
import functools
import json
import math
import os
import pathlib
import random
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torch.nn.utils.parametrize as parametrize
import tyro
from torch import Tensor
from tqdm import tqdm

import sokoban_env
from sokoban_env import SokobanVectorEnv, convert_observation, generate_levels

A = 5  # actions: no-op, up, down, left, right
REWARDS = (-1.1, -0.1, 0.9, 10.9)  # every reward that Sokoban pays
EVAL_SEED = 10**9  # of the held-out levels
NUM_PLANES = {"cells": 4, "rgb": 3}  # of a frame
RGB_LAYERS = ((8, 4), (4, 2), (3, 1))  # kernel and stride of the paper's three convolutions


@dataclass
class Args:
    exp_name: str = "i2a"  # the name of this experiment
    seed: int = 1  # seed of the experiment
    torch_deterministic: bool = True  # only deterministic algorithms
    cuda: bool = True  # use a GPU if there is one
    track: bool = False  # track the run in Weights and Biases
    wandb_project_name: str = "model-based-rl"  # the Weights and Biases project
    wandb_entity: str | None = None  # the Weights and Biases team
    save_model: bool = True  # write agent.pt (weights only) at the end

    # Algorithm specific arguments
    preset: Literal["default", "paper-small", "paper"] = "default"  # paper-small: the paper's A2C and view, small
    agent: Literal["i2a", "model-free"] = "i2a"  # model-free: the same agent without its imagination
    size: int = 7  # board size
    num_boxes: int = 2  # boxes of a level (of --levels, if given: what the file has)
    max_episode_steps: int = 60  # steps after which an episode is truncated
    observation: Literal["cells", "rgb"] = "cells"  # what the agent sees; rgb: 8x8 pixels a cell
    frame_stack: int = 1  # frames of an observation
    view: Literal["player", "board"] = "player"  # player: networks see the board with the player in its middle
    levels: str | None = None  # train on this Boxoban file or folder instead of generated levels
    total_timesteps: int = 200_000  # environment frames, those of the model's pretraining included
    num_envs: int = 64  # parallel environments of each process
    num_steps: int = 32  # steps of a rollout before each update
    optimizer: Literal["adam", "rmsprop"] = "adam"  # RMSProp is the paper's
    learning_rate: float = 1e-3  # learning rate
    anneal_lr: bool = True  # let the learning rate fall linearly to 0
    anneal_from: float = 0.7  # from this share of the frames on; 0 is CleanRL's line
    gamma: float = 0.99  # discount
    gae_lambda: float = 0.8  # 1: the n-step returns of the paper
    num_minibatches: int = 8  # minibatches of an epoch
    update_epochs: int = 4  # epochs; A2C: 1, with 1 minibatch and --no-norm-adv
    norm_adv: bool = True  # normalise the advantages of a minibatch
    clip_coef: float = 0.2  # PPO's clipping
    ent_coef: float = 0.01  # entropy bonus
    vf_coef: float = 2.0  # weight of the value loss
    distill_coef: float = 1.0  # weight of the distillation loss
    max_grad_norm: float = 1.0  # gradient clipping, of the agent and of the rollout policy apart
    reward_scale: float = 0.1  # the agent's losses see rewards times this
    symmetry: bool = True  # networks that know the square's eight symmetries (player's view only)

    imagination_depth: int = 8  # steps D of each imagined rollout
    env_model: Literal["learned", "poor", "perfect", "copy"] = "learned"  # copy: an identity; perfect: the simulator
    env_model_path: str | None = None  # take the environment model of this file instead of pretraining one
    finetune_model: bool = False  # go on training the model on fresh transitions, by its own loss
    reward_prediction: bool = True  # let the encoder see predicted rewards and ends
    rollout_policy: Literal["distilled", "random", "pretrained"] = "distilled"  # who acts in imagination
    greedy_rollouts: bool = True  # it takes its likeliest action, not a sampled one (random: always sampled)
    pretrained_path: str | None = None  # of a model-free agent, who collects the model's data (--rollout-policy, too)
    model_frames: int = 5_000  # transitions that the model is pretrained on
    model_steps: int = 3_000  # optimiser steps of the pretraining
    model_width: int = 16  # channels of the environment model
    cnn_channels: tuple[int, ...] = (32, 32, 32)  # channels of the model-free path
    cnn_padding: bool = True  # off: only a network's first convolution is padded; maps shrink to the player
    dense: int = 256  # units of the model-free path's dense layer
    encoder_channels: tuple[int, ...] = (32,)  # channels of the rollout encoder
    encoder_dense: int = 32  # units of its dense layer
    lstm: int = 64  # units of its LSTM
    rollout_channels: tuple[int, ...] = (64,)  # channels of the distilled rollout policy
    rollout_dense: int = 64  # units of its dense layer

    compile: bool = False  # torch.compile the networks
    cuda_graph: bool = False  # launch a rollout, and an update, as one CUDA graph
    bf16: bool = False  # bfloat16 autocast
    log_frequency: int = 20_000  # frames between rows of metrics, each with a checkpoint
    resume: str | None = None  # continue from this checkpoint.pt, with its flags; others beside it override them
    evaluate: str | None = None  # evaluate this checkpoint.pt or agent.pt, with its flags, and stop
    eval_episodes: int = 1000  # held-out levels of an evaluation
    eval_levels: str | None = None  # evaluate on this Boxoban file or folder
    greedy: bool = False  # evaluate the likeliest actions instead of sampled ones


# The paper's setting. Its learning rate, steps of a rollout, discount, and all of the model's data are not published.
PAPER_SMALL = Args(
    view="board", symmetry=False, num_minibatches=1, update_epochs=1, norm_adv=False, anneal_lr=False, num_envs=32,
    num_steps=8, learning_rate=3e-3, gamma=0.97, gae_lambda=0.95, ent_coef=0.001, vf_coef=0.5, cnn_channels=(16, 16),
    dense=128, encoder_channels=(16, 16), encoder_dense=32, lstm=64, rollout_channels=(16,), rollout_dense=32,
    imagination_depth=3, greedy_rollouts=False, model_frames=20_000, total_timesteps=1_500_000,
)  # fmt: skip
PRESETS = {
    "default": Args(),
    "paper-small": PAPER_SMALL,
    "paper": replace(
        PAPER_SMALL, size=10, num_boxes=4, max_episode_steps=120, observation="rgb", total_timesteps=10**9, num_steps=5,
        optimizer="rmsprop", learning_rate=7e-4, gae_lambda=1.0, ent_coef=0.01, reward_scale=1.0, imagination_depth=5,
        cnn_channels=(32, 64, 64), dense=512, encoder_channels=(32, 64, 64), encoder_dense=512, lstm=512,
        rollout_channels=(16, 16), model_width=64, model_frames=1_000_000, model_steps=100_000, log_frequency=1_000_000,
    ),
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


def new_run(name: str) -> str:
    """Make the folder runs/<name>__<time> of a new run, with a suffix where that is taken; returns the run's name."""
    stem = re.sub("[:/]", "-", f"{name}__{int(time.time())}")
    try:
        for suffix in ("", "-2", "-3", "-4", "-5", "-6"):
            with contextlib.suppress(FileExistsError):
                os.makedirs(f"runs/{stem}{suffix}")
                print(f"writing to runs/{stem}{suffix}", flush=True)
                return stem + suffix
    except OSError as e:
        sys.exit(f"can't create runs/{stem}: {e.strerror}; run from a folder that you can write to")
    sys.exit(f"runs/{stem} exists, and five more like it: wait a second")


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A temporary path to write to, which takes the place of `path` when all went well; exits with a line if not."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:  # torch reports a full disk as a RuntimeError
        sys.exit(f"can't write {path}: {str(e).splitlines()[0]}; what stood there before is whole")


class Logger:
    """Metrics to `runs/<run_name>/metrics.csv`, to the terminal and, with `args.track`, to Weights and Biases.

    One call of `log` is one row. `rows` go into checkpoints: a resumed run takes them up, and has each row once.
    """

    def __init__(self, args: Any, run_name: str, rows: Iterable[dict[str, float]] = ()) -> None:
        self.path = pathlib.Path("runs") / run_name / "metrics.csv"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.rows, self.wandb = list(rows), None
        if args.track:
            import wandb

            try:
                self.wandb = wandb.init(
                    project=args.wandb_project_name, entity=args.wandb_entity, name=run_name, id=run_name,
                    resume="allow", config=vars(args), dir=str(self.path.parent),
                )  # fmt: skip
            except wandb.Error as e:
                sys.exit(f"--track: log in by `wandb login`, or set WANDB_MODE=offline: {str(e).splitlines()[0]}")

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Write a row. A loss that is not finite ends the run: log before you save, and the checkpoint is good."""
        row = {"global_step": step, **metrics}
        self.rows.append(row)
        with replacing(self.path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(name for row in self.rows for name in row)))
            writer.writeheader()
            writer.writerows(self.rows)
        if self.wandb:
            self.wandb.log(row, step=len(self.rows))  # a row that a resumed run writes again is dropped
        if not sys.stderr.isatty():  # a terminal has a progress bar instead
            print(" ".join(f"{name}={value:.6g}" for name, value in row.items()), flush=True)
        for name, value in metrics.items():
            if name.startswith("losses/") and not math.isfinite(value):
                sys.exit(f"{name} is {value} at step {step}: lower the learning rate; the last checkpoint is good")

    def close(self) -> None:
        if self.wandb:
            self.wandb.finish()


def save_checkpoint(path: pathlib.Path, state: dict[str, Any]) -> None:
    """torch.save, so that a run that dies in it keeps its last checkpoint."""
    with replacing(path) as temporary:
        torch.save(state, temporary)


def load_checkpoint(path: str, device: str | torch.device) -> dict[str, Any]:
    """What `save_checkpoint` wrote, its tensors on `device`. `weights_only`: a foreign file can't run code."""
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except OSError as e:
        sys.exit(f"can't read the checkpoint {path}: {e.strerror or e}")
    except Exception as e:  # a damaged file can fail anywhere in torch's reader
        sys.exit(f"can't read the checkpoint {path}: damaged, or not made by torch.save ({type(e).__name__})")


def saved_args(path: str) -> Any:
    """The `Args` of a checkpoint: the defaults for the flags that are given beside it."""
    try:
        return Args(**load_checkpoint(path, "cpu")["args"])
    except (KeyError, TypeError):
        sys.exit(f"{path} was written by another script, or another version of this one")


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


def player_view(cells: Tensor) -> Tensor:
    """Boards (..., H, W) rolled so that the player stands in the middle: (..., V, V'), odd sides.

    Where H is even V is H-1: rows 0 and H-1 are both wall, and one is left out. So the middle is a cell, and to turn
    the board is to turn the view.
    """
    height, width = cells.shape[-2:]
    view_height, view_width = (height - 1) // 2 * 2 + 1, (width - 1) // 2 * 2 + 1
    boards = cells.reshape(-1, height * width)
    player = boards.argmax(1)[:, None]  # (N, 1), its value is the highest
    y, x = torch.arange(view_height, device=cells.device), torch.arange(view_width, device=cells.device)
    rows = (player // width + y - view_height // 2) % view_height  # (N, V)
    columns = (player % width + x - view_width // 2) % view_width  # (N, V')
    index = rows[:, :, None] * width + columns[:, None, :]
    return boards.gather(1, index.flatten(1)).reshape(*cells.shape[:-2], view_height, view_width)


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


# ------------------------------------------------------------------------------------------ the square's symmetries

# What the actions become under each of the eight, in the order of `turn_boards`
TURNED = (
    (0, 1, 2, 3, 4), (0, 3, 4, 2, 1), (0, 2, 1, 4, 3), (0, 4, 3, 1, 2),
    (0, 1, 2, 4, 3), (0, 4, 3, 2, 1), (0, 2, 1, 3, 4), (0, 3, 4, 1, 2),
)  # fmt: skip


def turn_boards(cells: Tensor, which: int) -> Tensor:
    """Boards (..., H, W) after `which` % 4 quarter turns counter-clockwise; from 4 on also mirrored, left to right."""
    cells = torch.rot90(cells, which % 4, (-2, -1))
    return cells.flip(-1) if which >= 4 else cells


@functools.cache
def symmetry_table() -> Tensor:
    """Entry (g, h) is g⁻¹h: the symmetry that, followed by g, is h. (8, 8)."""
    board, table = torch.arange(9).view(3, 3), torch.empty(8, 8, dtype=torch.long)
    turned = [turn_boards(board, which).tolist() for which in range(8)]
    for g in range(8):
        for first in range(8):
            table[g, turned.index(turn_boards(turn_boards(board, first), g).tolist())] = first
    return table


class TurnedWeights(nn.Module):
    """The weights of a layer that knows the square's symmetries, from an eighth of them (Cohen and Welling 2016).

    Output channel 8 * k + g is feature k, computed with its weights ψ_k turned by g. If the input turns by t, each map
    turns by t, and what was in channel g is in channel tg. Inputs are such features too, or plain `planes`.
    """

    def __init__(self, shape: torch.Size, kernel: int, planes: bool) -> None:
        super().__init__()
        self.shape = shape  # of the layer's weights: (outputs, inputs, n, n), (outputs, inputs * n * n) or (outputs,)
        cells = torch.arange(kernel**2).view(kernel, kernel)
        turned = torch.stack([turn_boards(cells, g) for g in range(8)])  # (8, n, n)
        table = torch.zeros(8, 1, dtype=torch.long) if planes else symmetry_table()
        # At [g, h, y, x]: where in a flat ψ_k stands what ψ_k, turned by g, has at symmetry h and place (y, x)
        self.register_buffer("index", kernel**2 * table[:, :, None, None] + turned[:, None], persistent=False)

    def forward(self, psi: Tensor) -> Tensor:
        """ψ (K, features, 8 * n * n), for planes (K, inputs, n * n) -> weights of the layer's shape.

        With them the layer computes (f ⋆ ψ_k)(g) = Σ_h f(h) ψ_k(g⁻¹h), over symmetries and places h (equation 11 of
        Cohen and Welling).
        """
        weight = psi.index_select(2, self.index.flatten()).unflatten(2, self.index.shape)  # (K, features, 8, 8, n, n)
        return weight.transpose(1, 2).reshape(self.shape)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The ψ of such weights, by which register_parametrization finds its shape: those that are not turned."""
        psi = weight[::8].reshape(len(weight) // 8, -1, self.index[0].numel())
        return psi.contiguous()  # Adam's fused kernel goes wrong where a parameter and its gradient lie differently


def make_equivariant(layer: nn.Module, kernel: int = 1, planes: bool = False, std: float = 2**0.5) -> nn.Module:
    """Give a convolution, a dense layer of maps of `kernel` by `kernel`, or an LSTM cell TurnedWeights."""
    for name, weight in list(layer.named_parameters()):
        bias = "bias" in name  # the weight of a plane of ones
        turned = TurnedWeights(weight.shape, 1 if bias else kernel, planes or bias)
        parametrize.register_parametrization(layer, name, turned)
        psi = layer.parametrizations[name].original
        if bias:
            nn.init.zeros_(psi)
        else:
            nn.init.orthogonal_(psi, std)
    return layer


class Actor(nn.Module):
    """Features (B, units) that know the symmetries to logits (B, A).

    Its layer has two features, `stay` and `up`. Channel g of `up` says how good the action is that g makes of up. Two
    of the eight (a turn, and one mirrored) make the same direction of it: that direction's logit is their mean.
    """

    def __init__(self, units: int) -> None:
        super().__init__()
        self.layer = make_equivariant(nn.Linear(units, 16), std=0.01)
        directions = F.one_hot(torch.tensor(TURNED)[:, 1], A)[:, 1:]  # (8, A - 1)
        self.register_buffer("directions", directions / 2, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        stay, up = self.layer(x).chunk(2, 1)  # (B, 8)
        return torch.cat([stay.mean(1, keepdim=True), up @ self.directions], 1)


# --------------------------------------------------------------------------------------------------------- networks


def to_planes(frames: Tensor, kind: str, view: str) -> Tensor:
    """Frames (B, F, H, W[, 3]) uint8 to network input (B, F * P, H, W), float32; H, W of the view."""
    if kind == "rgb":
        return frames.permute(0, 1, 4, 2, 3).float().flatten(1, 2) / 255
    if view == "player":
        frames = player_view(frames)
    return cell_planes(frames).flatten(1, 2)


class FrameNet(nn.Module):
    """Frames to a feature vector: the paper's convolutions and strides for `rgb`, 3x3 ones (ours) for `cells`; a dense
    layer."""

    def __init__(self, args: Args, planes: int, channels: tuple[int, ...], units: int, first_stride: int = 1) -> None:
        super().__init__()
        self.kind, self.view = args.observation, args.view
        pixels = 8 * args.size if self.kind == "rgb" else args.size
        if self.view == "player":
            pixels = (pixels - 1) // 2 * 2 + 1
        frame, layers = torch.zeros(1, planes, pixels, pixels), []
        for i, width in enumerate(channels):
            if self.kind == "rgb":
                kernel, stride = RGB_LAYERS[i]
                padding = 0
            else:
                kernel = 3
                stride = first_stride if i == 0 else 1
                padding = 1 if i == 0 or args.cnn_padding else 0
            layer = nn.Conv2d(planes, width, kernel, stride, padding)
            layers += [make_equivariant(layer, kernel, i == 0) if args.symmetry else layer_init(layer), nn.ReLU()]
            planes = width
        self.convs = nn.Sequential(*layers[:-1])  # the last ReLU comes after `flatten`: its gradient is faster there
        try:
            side = self.convs(frame).shape[-1]
        except RuntimeError:
            sys.exit(f"--no-cnn-padding leaves nothing of a {pixels}x{pixels} view after {len(channels)} convolutions")
        dense = nn.Linear(planes * side**2, units)
        self.dense = make_equivariant(dense, side) if args.symmetry else layer_init(dense)

    def forward(self, frames: Tensor, rewards: Tensor | None = None) -> Tensor:
        """frames (B, F, H, W[, 3]), rewards (B,), which become a plane, if any -> features (B, units)."""
        x = to_planes(frames, self.kind, self.view)
        if rewards is not None:
            x = torch.cat([x, rewards[:, None, None, None].expand(-1, 1, *x.shape[2:])], 1)
        x = F.relu(self.convs(x).flatten(1))
        return F.relu(self.dense(x))


class EnvModel(nn.Module):
    """The environment model: p(next frame, reward, end | last frames, action) (section 3.2 and appendix).

    A convolution over frames and action planes, pool-and-inject, a second convolution; from there a categorical over
    the C classes of each pixel, one over reward values, and the probability that the episode ends.
    """

    def __init__(self, args: Args) -> None:
        super().__init__()
        self.kind = args.observation
        width = max(1, args.model_width // 8) if args.env_model == "poor" else args.model_width
        planes, palette = NUM_PLANES[self.kind] * args.frame_stack, torch.as_tensor(sokoban_env.SPRITE_PALETTE)
        if self.kind == "cells":  # the outer wall is read (no padding), but only what is inside it is predicted
            self.conv1 = nn.Conv2d(planes, 2 * width, 3)
            self.frame = nn.Conv2d(width, 7, 1)
        else:  # the paper's 8x8 convolution of stride 8 to the board's resolution, and a deconvolution back
            shrink = nn.Conv2d(planes, 2 * width, 8, 8)
            self.conv1 = nn.Sequential(shrink, nn.ReLU(), nn.Conv2d(2 * width, 2 * width, 3, padding=1))
            self.frame = nn.ConvTranspose2d(width, len(palette), 8, 8)
        self.action = nn.Embedding(A, 2 * width)  # adds the same as one-hot action planes through a 1x1 convolution
        self.inject = nn.Linear(2 * width, width)
        self.conv2 = nn.Conv2d(2 * width, width, 3, padding=1)
        self.event = nn.Conv2d(width, 16, 1)
        self.outcome = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, len(REWARDS) + 1))
        self.register_buffer("rewards", torch.tensor(REWARDS))
        self.register_buffer("prior", 4 * torch.eye(7))  # most cells stay as they are (ours)
        self.register_buffer("palette", palette, persistent=False)  # (C, 3), of `rgb`

    def forward(self, frames: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """frames (B, F, H, W[, 3]), action (B,) -> logits: frame (`classes` of it), reward (B, 4), end (B,)."""
        x = to_planes(frames, self.kind, "board")
        h = F.relu(self.conv1(x) + self.action(action)[:, :, None, None])  # (B, 2 * width, H-2, W-2), for `cells`
        # Pool-and-inject: the global maximum of each channel, given back to every cell (added through a linear layer:
        # the same as concatenating the maxima before a 1x1 convolution)
        h = F.relu(self.conv2(h) + self.inject(h.amax((2, 3)))[:, :, None, None])
        frame = self.frame(h)
        if self.kind == "cells":
            frame = frame + F.embedding(frames[:, -1, 1:-1, 1:-1].int(), self.prior).movedim(-1, 1)
        outcome = self.outcome(F.relu(self.event(h)).amax((2, 3)))
        return frame, outcome[:, :-1], outcome[:, -1]

    def predict(self, frames: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The likeliest next frame (B, H, W[, 3]) uint8, its reward (B,), and whether it ends the episode (B,)."""
        logits, reward, end = self(frames, action)
        if self.kind == "cells":
            frame = frames[:, -1].clone()
            frame[:, 1:-1, 1:-1] = logits.argmax(1).byte()
        else:
            frame = self.palette[logits.argmax(1)]
        return frame, self.rewards[reward.argmax(1)], end > 0

    def classes(self, frame: Tensor) -> Tensor:
        """The classes of a true next frame (B, H, W[, 3]): cell values, or indices of colours."""
        if self.kind == "cells":
            return frame[:, 1:-1, 1:-1].long()
        return (frame[..., None, :] == self.palette).all(-1).byte().argmax(-1)


class CopyModel(EnvModel):
    """The paper's copy model: an identity that pays nothing, with the parameters of a real model."""

    def predict(self, frames: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return frames[:, -1], torch.zeros_like(action, dtype=torch.float32), torch.zeros_like(action, dtype=torch.bool)


class PerfectModel(nn.Module):
    """The simulator in the model's place."""

    def __init__(self, args: Args) -> None:
        super().__init__()
        self.kind, self.size, self.envs = args.observation, args.size, {}  # environments by their number

    def predict(self, frames: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        cells = convert_observation(frames[:, -1], self.kind, "cells")
        if len(cells) not in self.envs:
            settings = {"size": self.size, "max_episode_steps": None, "observation": self.kind, "device": cells.device}
            # `levels` must be given, and is not used: set_state replaces every board
            self.envs[len(cells)] = SokobanVectorEnv(len(cells), levels=["#####\n#@$.#\n#####"], **settings)
        self.envs[len(cells)].set_state({"cells": cells})
        frame, reward, end, _, info = self.envs[len(cells)].step(action)
        return info.get("final_obs", frame), reward, end


class RolloutPolicy(nn.Module):
    """π̂: a small, fast policy that acts in imagination."""

    def __init__(self, args: Args) -> None:
        super().__init__()
        planes, units = NUM_PLANES[args.observation] * args.frame_stack, args.rollout_dense
        self.features = FrameNet(args, planes, args.rollout_channels, units, first_stride=2)
        self.actor = Actor(units) if args.symmetry else layer_init(nn.Linear(units, A), 0.01)

    def forward(self, frames: Tensor) -> Tensor:
        """frames (B, F, H, W[, 3]) -> logits (B, A)."""
        return self.actor(self.features(frames))


class RandomPolicy(nn.Module):
    """Every action alike, in π̂'s place."""

    def __init__(self, _: Args | None = None) -> None:
        super().__init__()

    def forward(self, frames: Tensor) -> Tensor:
        return torch.zeros(len(frames), A, device=frames.device)


class RolloutEncoder(nn.Module):
    """A CNN on each imagined frame with its reward, then an LSTM that reads the rollout backwards."""

    def __init__(self, args: Args) -> None:
        super().__init__()
        self.reads_rewards, self.symmetry = args.reward_prediction, args.symmetry
        planes = NUM_PLANES[args.observation] + 1  # and the reward
        self.features = FrameNet(args, planes, args.encoder_channels, args.encoder_dense, first_stride=2)
        self.lstm = nn.LSTMCell(args.encoder_dense, args.lstm)
        if args.symmetry:
            make_equivariant(self.lstm, std=0.5)  # as large as torch's own at first
            self.register_buffer("turned", torch.tensor(TURNED).T, persistent=False)  # (A, 8)

    def forward(self, frames: Tensor, rewards: Tensor, alive: Tensor) -> Tensor:
        """frames (B, A, D, H, W[, 3]), rewards and alive (B, A, D) -> [e_1, ..., e_A] (B, A * LSTM)."""
        if not self.reads_rewards:  # hide the ends too: an end gives the last reward away
            rewards, alive = torch.zeros_like(rewards), torch.ones_like(alive)
        depth = rewards.shape[2]
        x = self.features(frames.flatten(0, 2)[:, None], rewards.flatten())  # (R * D, units)
        x, alive = x.unflatten(0, (-1, depth)), alive.flatten(0, 1)  # (R, D, units), (R, D)
        h = c = torch.zeros(len(x), self.lstm.hidden_size, device=x.device, dtype=x.dtype)
        for d in reversed(range(depth)):  # t+τ first
            h, c = self.lstm(x[:, d], (h, c))
            h, c = h * alive[:, d, None], c * alive[:, d, None]  # nothing is read past the imagined end
        embeddings = h.unflatten(0, (-1, A))  # (B, A, LSTM), which the aggregator concatenates
        if not self.symmetry:
            return embeddings.flatten(1)
        # Channel g's weights are turned by g: what they take for action a is g(a) on the board. So slot a takes channel
        # g from rollout g(a)
        channels = embeddings.unflatten(2, (-1, 8))  # (B, A, K, 8)
        return channels.gather(1, self.turned[None, :, None].expand_as(channels)).flatten(1)


class I2AAgent(nn.Module):
    """A model-free path and the aggregated embeddings of A imagined rollouts, to a policy and a value."""

    def __init__(self, args: Args) -> None:
        super().__init__()
        self.bf16, self.symmetry = args.bf16, args.symmetry
        planes = NUM_PLANES[args.observation] * args.frame_stack
        self.features = FrameNet(args, planes, args.cnn_channels, args.dense)
        self.encoder = RolloutEncoder(args) if args.agent == "i2a" else None
        joint = args.dense + (A * args.lstm if self.encoder else 0)
        self.actor = Actor(joint) if args.symmetry else layer_init(nn.Linear(joint, A), 0.01)
        summed = joint // 8 if args.symmetry else joint
        self.critic = layer_init(nn.Linear(summed, 1), 1.0)

    def forward(self, frames: Tensor, imagined: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """frames (B, F, H, W[, 3]), imagined: of `imagine` -> logits (B, A), value (B,), float32."""
        with torch.autocast(frames.device.type, torch.bfloat16, enabled=self.bf16):
            x = self.features(frames)  # (B, dense)
            if self.encoder is not None:
                x = torch.cat([x, self.encoder(*imagined)], 1)  # (B, dense + A * LSTM)
        x = x.float()
        logits = self.actor(x)
        if self.symmetry:  # a sum over the eight is the same for all turned boards; / √8 keeps its scale
            x = x.unflatten(1, (-1, 8)).sum(2) / 8**0.5
        return logits, self.critic(x).squeeze(-1)


class PretrainedPolicy(I2AAgent):
    """A frozen model-free agent, as rollout policy or to collect the model's data."""

    def __init__(self, args: Args) -> None:
        super().__init__(replace(args, agent="model-free"))
        self.requires_grad_(False)

    def forward(self, frames: Tensor) -> Tensor:
        return super().forward(frames, ())[0]


def make_networks(args: Args, device: torch.device) -> nn.ModuleDict:
    """The `agent` and, for I2A, its `env_model` (frozen) and `rollout_policy`."""
    networks = nn.ModuleDict({"agent": I2AAgent(args)})
    if args.agent == "i2a":
        models = {"learned": EnvModel, "poor": EnvModel, "copy": CopyModel, "perfect": PerfectModel}
        policies = {"distilled": RolloutPolicy, "pretrained": PretrainedPolicy, "random": RandomPolicy}
        networks["env_model"] = models[args.env_model](args).requires_grad_(False)
        networks["rollout_policy"] = policies[args.rollout_policy](args)
    return networks.to(device)


def make_optimizer(args: Args, networks: nn.ModuleDict) -> torch.optim.Optimizer:
    """One group of parameters is the agent's, another the rollout policy's, if it is distilled."""
    groups = [{"params": list(networks["agent"].parameters())}]
    if args.agent == "i2a" and args.rollout_policy == "distilled":
        groups.append({"params": list(networks["rollout_policy"].parameters())})
    if args.optimizer == "adam":
        return torch.optim.Adam(groups, args.learning_rate, eps=1e-5, fused=True, capturable=args.cuda_graph)
    return torch.optim.RMSprop(groups, args.learning_rate, eps=1e-5, capturable=args.cuda_graph)


def load_networks(networks: nn.Module, path: str, prefix: str = "") -> None:
    """Load a file's weights whose names start with `prefix`; exits if they are of other parts or sizes."""
    saved = load_checkpoint(path, "cpu").get("networks", {})
    weights = {name.removeprefix(prefix): x for name, x in saved.items() if name.startswith(prefix)}
    try:
        networks.load_state_dict(weights)
    except RuntimeError as e:
        sys.exit(f"{path} was made with other parts or sizes than these flags: {str(e).splitlines()[1].strip()}")


# -------------------------------------------------------------------------------------------------------- algorithm


def sample(logits: Tensor, rng: torch.Generator) -> Tensor:
    """Actions (B,) ~ softmax(logits): the Gumbel-max trick (-log of Exp(1) is Gumbel noise)."""
    return (logits - torch.empty_like(logits).exponential_(generator=rng).log()).argmax(-1)


def as_frames(observation: Tensor, frame_stack: int) -> Tensor:
    """What the environment returns, with its axis of stacked frames: (B, F, H, W[, 3])."""
    return observation if frame_stack > 1 else observation[:, None]


@torch.no_grad()
def imagine(
    networks: Any, frames: Tensor, depth: int, rng: torch.Generator, greedy: bool = False
) -> tuple[Tensor, ...]:
    """The imagination core, unrolled: from frames (B, F, H, W[, 3]), one rollout for each action.

    Returns:
        frames (B, A, D, H, W[, 3]) uint8; rewards (B, A, D); alive (B, A, D): 1 up to and including the step that ends
        the rollout, then 0. Nothing for a model-free agent.
    """
    if "env_model" not in networks:
        return ()
    steps = []
    action = torch.arange(A, device=frames.device).repeat(len(frames))  # rollout b * A + a starts with action a
    frames = frames.repeat_interleave(A, 0)  # (R, F, H, W)
    alive = torch.ones(len(frames), device=frames.device)
    for d in range(depth):
        if d > 0:
            logits = networks["rollout_policy"](frames)
            action = logits.argmax(-1) if greedy else sample(logits, rng)  # a_t ~ π̂(ô_t)
        frame, reward, end = networks["env_model"].predict(frames, action)  # ô_{t+1}, r̂_{t+1} = M(ô_t, a_t)
        steps.append((frame, reward * alive, alive))
        alive = alive * ~end
        frames = torch.cat([frames[:, 1:], frame[:, None]], 1)
    return tuple(torch.stack(column, 1).unflatten(0, (-1, A)) for column in zip(*steps, strict=True))


def distillation_loss(policy_logits: Tensor, rollout_logits: Tensor) -> Tensor:
    """D_KL(π‖π̂) = Σ_a π (log π - log π̂), the cross-entropy less a constant. π is the target: only π̂ learns."""
    log_pi, log_pi_hat = policy_logits.detach().log_softmax(-1), rollout_logits.log_softmax(-1)
    return (log_pi.exp() * (log_pi - log_pi_hat)).sum(-1).mean()


def log_probabilities(logits: Tensor, actions: Tensor) -> Tensor:
    """log π(a|s) of actions (...,), from logits (..., A)."""
    return logits.log_softmax(-1).gather(-1, actions[..., None]).squeeze(-1)


def ppo_losses(
    logits: Tensor, values: Tensor, actions: Tensor, old_log_probs: Tensor, advantages: Tensor, returns: Tensor,
    clip_coef: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """PPO's clipped surrogate, (R_t - V(s_t))², the entropy of π, and the share of clipped rows: means over the rows.

    At the first step of an update π = π_old, where the surrogate's gradient is A2C's, that of -log π(a_t|s_t) A_t.
    """
    ratio = (log_probabilities(logits, actions) - old_log_probs).exp()  # π(a|s) / π_old(a|s)
    clipped = ratio.clamp(1 - clip_coef, 1 + clip_coef)
    policy_loss = -torch.min(ratio * advantages, clipped * advantages).mean()
    value_loss = F.mse_loss(values, returns)
    log_pi = logits.log_softmax(-1)
    entropy = -(log_pi.exp() * log_pi).sum(-1).mean()
    return policy_loss, value_loss, entropy, (ratio != clipped).float().mean()


@torch.no_grad()
@parametrize.cached()  # TurnedWeights are laid out once a rollout
def rollout(
    args: Args, networks: nn.ModuleDict, envs: SokobanVectorEnv, frames: Tensor, rng: torch.Generator
) -> tuple[list[Tensor], dict[str, Tensor], Tensor, Tensor]:
    """Act for T steps from frames (B, F, H, W[, 3]). What is imagined is part of the observation, and kept with it.

    Returns:
        rows for `update` and transitions for `model_loss`, of (T * B, ...) each; the frames to go on from; four sums
        over the episodes that ended: how many, solved ones, returns, lengths (4,).
    """
    agent, steps, episodes = networks["agent"], [], torch.zeros(4, device=frames.device)
    # For an environment whose episode was truncated, its final frames; not used for the others. It happens once at
    # most, since --num-steps is at most --max-episode-steps
    last = frames
    for _ in range(args.num_steps):
        imagined = imagine(networks, frames, args.imagination_depth, rng, args.greedy_rollouts)
        logits, value = agent(frames, imagined)
        action = sample(logits, rng)
        observation, reward, terminated, truncated, info = envs.step(action)
        true_next = as_frames(info.get("final_obs", observation), args.frame_stack)
        last = torch.where(truncated.view(-1, *[1] * (last.ndim - 1)), true_next, last)
        if "final_info" in info:
            final = info["final_info"]
            ended = (info["_final_info"], final["success"], final["episode"]["r"], final["episode"]["l"])
            episodes += torch.stack([x.sum() for x in ended])
        step = (frames, action, log_probabilities(logits, action), value, reward, terminated, truncated)
        steps.append((*step, true_next[:, -1], *imagined))
        frames = as_frames(observation, args.frame_stack)
    columns = [torch.stack(column) for column in zip(*steps, strict=True)]  # (T, B, ...) each
    boards, actions, log_probs, values, rewards, terminated, truncated, next_boards, *imagined = columns

    # V(s_{t+1}) of the true next observations: of a truncated episode, its own last one
    both = torch.cat([frames, last])  # (2 * B, F, ...)
    imagined_too = imagine(networks, both, args.imagination_depth, rng, args.greedy_rollouts)
    after, at_truncation = agent(both, imagined_too)[1].chunk(2)
    next_values = torch.where(truncated, at_truncation, torch.cat([values[1:], after[None]]))  # (T, B)
    advantages = generalized_advantages(
        args.reward_scale * rewards, values, next_values, terminated, terminated | truncated, args.gamma,
        args.gae_lambda,
    )  # fmt: skip
    rows = (boards, actions, log_probs, advantages, advantages + values, *imagined)
    transitions = {"frames": boards, "next": next_boards, "action": actions, "reward": rewards, "end": terminated}
    flat = {name: x.flatten(0, 1) for name, x in transitions.items()}
    return [x.flatten(0, 1) for x in rows], flat, frames, episodes


def average_gradients(parameters: list[nn.Parameter]) -> None:
    """With several processes: every gradient becomes the mean over the processes."""
    if dist.is_initialized():
        flat = torch.cat([p.grad.flatten() for p in parameters])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for p, gradient in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            p.grad.copy_(gradient.view_as(p))


LOSSES = ("policy_loss", "value_loss", "entropy", "clipfrac", "distillation", "gradient_norm")


@parametrize.cached()  # ends with the call: the step's new weights are seen after it
def update(args: Args, networks: nn.ModuleDict, optimizer: torch.optim.Optimizer, *rows: Tensor) -> Tensor:
    """One step of the agent and of π̂ on M rows; returns LOSSES (6,).

    `rows`: frames (M, F, H, W[, 3]), actions, log π_old(a|s), advantages, returns (M,), and what was imagined.
    """
    frames, actions, old_log_probs, advantages, returns, *imagined = rows
    if args.norm_adv:
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    logits, values = networks["agent"](frames, imagined)  # (M, A), (M,)
    policy_loss, value_loss, entropy, clipfrac = ppo_losses(
        logits, values, actions, old_log_probs, advantages, returns, args.clip_coef
    )
    loss = policy_loss + args.vf_coef * value_loss - args.ent_coef * entropy
    distill_loss = torch.zeros_like(loss)
    if args.agent == "i2a" and args.rollout_policy == "distilled":
        distill_loss = distillation_loss(logits, networks["rollout_policy"](frames))
    optimizer.zero_grad(set_to_none=True)
    (loss + args.distill_coef * distill_loss).backward()
    norms = []
    for group in optimizer.param_groups:  # the agent's and π̂'s: clipped apart, so that one does not shrink the other
        average_gradients(group["params"])
        norms.append(nn.utils.clip_grad_norm_(group["params"], args.max_grad_norm))
    optimizer.step()
    return torch.stack([policy_loss, value_loss, entropy, clipfrac, distill_loss, norms[0]]).detach()


class Captured:
    """A function of fixed shapes, replayed as a CUDA graph from its third call on: one launch instead of thousands.

    A graph repeats kernels, and nothing that Python did: what changes from call to call must be a tensor. Those given
    are copied to where the graph reads them, and the next call overwrites what this one returned.
    """

    def __init__(self, function: Callable, rng: torch.Generator) -> None:
        self.function, self.rng, self.graph, self.calls = function, rng, None, 0

    def __call__(self, *tensors: Tensor) -> Any:
        self.calls += 1
        if self.calls <= 2:  # warm-up: makes the optimiser's state, and chooses kernels
            return self.function(*tensors)
        if self.graph is None:
            self.inputs = [x.clone() for x in tensors]
            self.graph = torch.cuda.CUDAGraph()
            self.graph.register_generator_state(self.rng)
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.outputs = self.function(*self.inputs)
        for old, new in zip(self.inputs, tensors, strict=True):
            old.copy_(new)
        self.graph.replay()
        return self.outputs


# ------------------------------------------------------------------------------------ the environment model's training


def collect_transitions(
    args: Args, policy: nn.Module, num: int, seed: int, device: torch.device, levels: Tensor | None
) -> dict[str, Tensor]:
    """`num` transitions for the model: frames (M, F, H, W) and next (M, H, W) as cells, action, reward, end.

    Three quarters come from fresh levels (of `levels`, if given), a quarter from boards a few pulls before their end:
    random play would hardly meet most rewards and the end otherwise (ours). `next` is before any reset.
    """
    rng, parts = torch.Generator(device).manual_seed(seed), []
    number = 256 if args.size == 5 else 1024  # there are few on 5x5
    near, _ = generate_levels(
        number, size=args.size, num_boxes=args.num_boxes, seed=EVAL_SEED // 4 + seed, max_pulls=16
    )
    for share, boards, limit in ((0.75, levels, args.max_episode_steps), (0.25, near, 8)):
        envs = make_envs(replace(args, observation="cells", max_episode_steps=limit), 64, boards, device)
        observation, _ = envs.reset(seed=seed)
        for _ in range(round(share * num / 64)):
            frames = as_frames(observation, args.frame_stack)
            with torch.no_grad():
                action = sample(policy(convert_observation(frames, "cells", args.observation)), rng)
            observation, reward, end, _, info = envs.step(action)
            true_next = as_frames(info.get("final_obs", observation), args.frame_stack)[:, -1]
            parts.append({"frames": frames, "next": true_next, "action": action, "reward": reward, "end": end})
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def model_loss(env_model: EnvModel, batch: dict[str, Tensor]) -> Tensor:
    """Negative log likelihood (B,) of the next frame (summed over its pixels), of the reward and of the end."""
    frame, reward, end = env_model(batch["frames"], batch["action"])
    reward_class = (batch["reward"][:, None] - env_model.rewards).abs().argmin(1)
    loss = F.cross_entropy(frame.float(), env_model.classes(batch["next"]), reduction="none").flatten(1).sum(1)
    loss = loss + F.cross_entropy(reward.float(), reward_class, reduction="none")
    return loss + F.binary_cross_entropy_with_logits(end.float(), batch["end"].float(), reduction="none")


@torch.no_grad()
def model_metrics(env_model: nn.Module, data: dict[str, Tensor]) -> dict[str, float]:
    """How often the model's next board is right in every cell, and its reward and end with it."""
    frame, reward, end = env_model.predict(data["frames"], data["action"])
    board = (frame == data["next"]).flatten(1).all(1)
    whole = board & ((reward - data["reward"]).abs() < 0.01) & (end == data["end"])
    return {"model/exact_board_accuracy": board.float().mean().item(), "model/all_right": whole.float().mean().item()}


@torch.no_grad()
def rollout_accuracy(args: Args, networks: nn.ModuleDict, frames: Tensor, seed: int) -> dict[str, float]:
    """The share of rollouts from frames (B, F, H, W[, 3]) that are imagined exactly as the simulator plays them."""
    simulator = {"env_model": PerfectModel(args), "rollout_policy": networks["rollout_policy"]}
    both = []
    for models in (networks, simulator):  # with a generator of its own: measuring must not change what follows
        rng = torch.Generator(frames.device).manual_seed(seed)
        both.append(imagine(models, frames, args.imagination_depth, rng, args.greedy_rollouts))
    (ours, _, _), (true, _, alive) = both
    right = (ours == true).flatten(3).all(3) | (alive == 0)  # (B, A, D); nothing counts after the true end
    return {"model/exact_rollouts": right.all(2).float().mean().item()}


def pretrain_model(
    env_model: EnvModel, args: Args, levels: Tensor | None, rng: torch.Generator, logger: Logger
) -> None:
    """Collect transitions and fit the model to them; log how right it is on transitions of other levels.

    Half of each batch is uniform, half in proportion to each transition's latest loss: so the rare ones (pushes,
    blocked pushes, rewards) are seen most. Each batch stands under one of the board's symmetries. (Both are ours.)
    """
    policy = RandomPolicy()
    if args.pretrained_path:
        policy = PretrainedPolicy(args).to(rng.device)
        load_networks(policy, args.pretrained_path, "agent.")
    tenth = min(args.model_frames // 10, 2048)
    data = collect_transitions(args, policy, args.model_frames - tenth, args.seed, rng.device, levels)
    held_out = collect_transitions(args, policy, tenth, EVAL_SEED // 2 + args.seed, rng.device, levels)
    for name in ("frames", "next"):
        held_out[name] = convert_observation(held_out[name], "cells", args.observation)
    half, size, turned = 32, len(data["action"]), torch.tensor(TURNED, device=rng.device)
    optimizer = torch.optim.Adam(env_model.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, args.model_steps)
    priority = torch.full((size,), 1e3, device=rng.device)
    for step in range(1, args.model_steps + 1):
        cumulative = priority.double().cumsum(0)  # not torch.multinomial, which takes at most 2^24 rows
        points = torch.rand(half, dtype=torch.float64, generator=rng, device=rng.device) * cumulative[-1]
        hard = torch.searchsorted(cumulative, points).clamp(max=size - 1)
        index = torch.cat([torch.randint(size, (half,), generator=rng, device=rng.device), hard])
        batch = {name: x[index] for name, x in data.items()}
        for name in ("frames", "next"):
            batch[name] = convert_observation(turn_boards(batch[name], step % 8), "cells", args.observation)
        batch["action"] = turned[step % 8][batch["action"]]
        loss = model_loss(env_model, batch)
        optimizer.zero_grad(set_to_none=True)
        loss.mean().backward()
        nn.utils.clip_grad_norm_(env_model.parameters(), 10.0)
        optimizer.step()
        schedule.step()
        priority[index] = loss.detach().nan_to_num(1e3).clamp(1e-6, 1e6)  # NaN ends the run at the row
        if step % 500 == 0 or step == args.model_steps:
            metrics = {"losses/model_loss": loss.mean().item(), "model/step": step}
            logger.log(args.model_frames, model_metrics(env_model, held_out) | metrics)


# ------------------------------------------------------------------------------------------------------------- playing


def read_levels(path: str, size: int) -> Tensor:
    """The levels (L, H, W) of a Boxoban file or folder."""
    try:
        return sokoban_env.load_levels(path, size)
    except (OSError, ValueError) as e:
        sys.exit(f"--levels or --eval-levels: {e}")


def held_out_levels(args: Args) -> Tensor:
    """The levels (L, H, W) of an evaluation: of `--eval-levels`, or the generator's, which the agent never plays."""
    if args.eval_levels:
        return read_levels(args.eval_levels, args.size)[: args.eval_episodes]
    try:
        return generate_levels(args.eval_episodes, size=args.size, num_boxes=args.num_boxes, seed=EVAL_SEED)[0]
    except ValueError as e:
        sys.exit(str(e))


def make_envs(
    args: Args, num_envs: int, levels: Tensor | None, device: torch.device, **kwargs: Any
) -> SokobanVectorEnv:
    return SokobanVectorEnv(
        num_envs, levels=levels, size=args.size, num_boxes=args.num_boxes, max_episode_steps=args.max_episode_steps,
        observation=args.observation, frame_stack=args.frame_stack, device=device, **kwargs,
    )  # fmt: skip


@torch.no_grad()
@parametrize.cached()
def evaluate(args: Args, networks: nn.ModuleDict, levels: Tensor, device: torch.device) -> tuple[dict, Tensor]:
    """Play each level (L, H, W) once; returns metrics, and which levels were solved (L,)."""
    rng = torch.Generator(device).manual_seed(args.seed)
    solved, lengths = [], []
    for part in levels.split(1024):
        envs = make_envs(args, len(part), part, device)
        observation, _ = envs.reset(seed=args.seed, options={"levels": part})
        playing = torch.ones(len(part), dtype=torch.bool, device=device)
        solved.append(torch.zeros_like(playing))
        lengths.append(torch.zeros(len(part), device=device))
        while playing.any():
            frames = as_frames(observation, args.frame_stack)
            imagined = imagine(networks, frames, args.imagination_depth, rng, args.greedy_rollouts)
            logits, _ = networks["agent"](frames, imagined)
            action = logits.argmax(-1) if args.greedy else sample(logits, rng)
            observation, _, terminated, truncated, _ = envs.step(action)
            lengths[-1] += playing
            solved[-1] |= playing & terminated
            playing &= ~(terminated | truncated)
    which, steps = torch.cat(solved), torch.cat(lengths)
    metrics = {"eval/solved": which.double().mean().item()}
    if which.any():
        metrics["eval/mean_steps"] = steps[which].mean().item()
    if which.any() and args.agent == "i2a":
        imagined_steps = A * args.imagination_depth * steps.sum()
        metrics["eval/imagined_steps_per_solved"] = (imagined_steps / which.sum()).item()
    return metrics, which


def parse_args(argv: list[str] | None = None) -> Args:
    """The command line, over the flags of the checkpoint to resume or evaluate, or over the preset."""
    given = tyro.cli(Args, args=argv)
    if given.resume and given.evaluate:
        sys.exit("--resume goes on with a run, --evaluate plays an agent: give one of them")
    path = given.resume or given.evaluate
    if path and given.preset != "default":
        sys.exit(f"--preset is for new runs: leave it out, {path} has its own flags")
    default = saved_args(path) if path else PRESETS[given.preset]
    args = tyro.cli(Args, args=argv, default=default)
    if args.levels and not args.evaluate:
        cells = read_levels(args.levels, args.size)
        boxes = ((cells == sokoban_env.BOX) | (cells == sokoban_env.BOX_ON_TARGET)).sum((1, 2))
        args = replace(args, num_boxes=int(boxes.max()))
    if args.finetune_model and (args.agent == "model-free" or args.env_model not in ("learned", "poor")):
        sys.exit("--finetune-model needs --agent i2a and --env-model learned or poor")
    if args.rollout_policy == "pretrained" and not args.pretrained_path:
        sys.exit("--rollout-policy pretrained needs --pretrained-path, a model-free agent's file")
    if args.rollout_policy == "random":
        args = replace(args, greedy_rollouts=False)  # the likeliest of equals would always be the no-op
    if args.num_steps > args.max_episode_steps:
        sys.exit("--num-steps must be at most --max-episode-steps")  # a rollout then holds one truncation at most
    deepest = max(len(args.cnn_channels), len(args.encoder_channels), len(args.rollout_channels))
    if args.observation == "rgb" and (args.view == "player" or deepest > 3):
        sys.exit("--observation rgb needs --view board, --no-symmetry and at most three convolutions")
    if args.symmetry and args.view == "board":
        sys.exit("--view board needs --no-symmetry: strides of 2 do not turn with a board of even size")
    channels = (*args.cnn_channels, *args.encoder_channels, *args.rollout_channels)
    units = (args.dense, args.encoder_dense, args.lstm, args.rollout_dense)
    if args.symmetry and any(width % 8 for width in channels + units):
        sys.exit(
            "--symmetry needs channels and units in eights: of --cnn-channels, --dense, --encoder-channels, "
            "--encoder-dense, --lstm, --rollout-channels and --rollout-dense"
        )
    if args.num_envs * args.num_steps < 2 * args.num_minibatches:
        sys.exit("--num-minibatches needs at least two rows in each, of --num-envs times --num-steps")
    if args.cuda_graph and args.num_envs * args.num_steps % args.num_minibatches:
        sys.exit("--cuda-graph needs --num-minibatches of one size: a divisor of --num-envs times --num-steps")
    if not 0 <= args.anneal_from < 1:
        sys.exit("--anneal-from must be at least 0, and less than 1")
    if args.imagination_depth < 1 or args.model_frames < 640:
        sys.exit("--imagination-depth must be at least 1, and --model-frames 640")
    if not 0 <= args.seed < EVAL_SEED // 1000:
        sys.exit(f"--seed must be from 0 to {EVAL_SEED // 1000 - 1}")
    return args


def main(args: Args) -> None:
    keep_freed_memory()
    cuda = args.cuda and torch.cuda.is_available()
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu")
    rank, world = 0, 1
    if "WORLD_SIZE" in os.environ:  # torchrun. The others wait while rank 0 pretrains the model
        dist.init_process_group("nccl" if cuda else "gloo", timeout=datetime.timedelta(days=2))
        rank, world = dist.get_rank(), dist.get_world_size()
    if cuda:
        torch.cuda.set_device(device)  # NCCL and torch.distributed's objects go by it
        torch.set_float32_matmul_precision("high")
    if args.cuda_graph:
        if not cuda:
            sys.exit("--cuda-graph needs a GPU; without one, give --no-cuda-graph")
        torch.cuda.set_stream(torch.cuda.Stream())  # not the default one, where nothing can be captured
    seed_everything(args.seed, args.torch_deterministic)  # the same initial weights in all processes
    rng = torch.Generator(device).manual_seed(1000 * args.seed + rank)
    eval_levels, networks = held_out_levels(args), make_networks(args, device)
    path = args.evaluate or args.resume
    state = load_checkpoint(path, device) if path else None
    if state:
        load_networks(networks, path)
    elif args.agent == "i2a" and args.env_model_path:
        load_networks(networks["env_model"], args.env_model_path, "env_model.")
    if not state and args.agent == "i2a" and args.rollout_policy == "pretrained":
        load_networks(networks["rollout_policy"], args.pretrained_path, "agent.")
    if args.compile:
        for network in networks.values():
            network.compile()
    if args.evaluate:
        metrics, _ = evaluate(args, networks, eval_levels, device)
        print(f"{path}, trained on {state['global_step']:,} frames: {json.dumps(metrics)}")
        return

    # ---- everything that the loop touches; a new run, or one that goes on
    T, B = args.num_steps, args.num_envs
    levels = read_levels(args.levels, args.size) if args.levels else None
    envs = make_envs(args, B, levels, device, exclude=eval_levels)
    observation, _ = envs.reset(seed=1000 * args.seed + rank)
    optimizer = make_optimizer(args, networks)
    model_optimizer = torch.optim.Adam(networks["env_model"].parameters(), 1e-4) if args.finetune_model else None
    global_step, minutes, start, rows, run_name = 0, 0.0, time.time(), [], ""
    if state:
        if len(state.get("processes", [])) != world:
            sys.exit(f"{path} can't go on: --resume takes a checkpoint.pt, of as many processes (here {world})")
        run_name, rows, global_step, minutes = (state[name] for name in ("run_name", "rows", "global_step", "minutes"))
        local = state["processes"][rank]
        if len(local["rng"]) == len(rng.get_state()):
            rng.set_state(local["rng"].cpu())
        else:  # saved on a CPU and resumed on a GPU, or the other way: other random numbers from here on
            rng.manual_seed(1000 * args.seed + rank + global_step)
        if any(getattr(args, name) != state["args"][name] for name in ("num_boxes", "levels")):
            del local["env"]["pool"]  # a curriculum's next stage: forget the saved levels, make others
        if args.num_envs != state["args"]["num_envs"] or args.optimizer != state["args"]["optimizer"]:
            sys.exit(f"--num-envs and --optimizer can't change when a run goes on: leave them to {path}")
        observation = envs.set_state(local["env"])
        for group in state["optimizer"]["param_groups"]:
            group["capturable"] = args.cuda_graph
        optimizer.load_state_dict(state["optimizer"])
        if state["model_optimizer"] and model_optimizer:
            model_optimizer.load_state_dict(state["model_optimizer"])
    elif rank == 0:
        run_name = new_run(f"Sokoban-{args.size}x{args.size}-{args.num_boxes}__{args.exp_name}__{args.seed}")
    logger = Logger(args, run_name, rows) if rank == 0 else None

    # ---- the environment model comes first: learned once, then frozen
    if args.agent == "i2a" and not state:
        env_model = networks["env_model"].requires_grad_()
        if args.env_model in ("learned", "poor") and not args.env_model_path:
            if rank == 0:
                pretrain_model(env_model, args, levels, rng, logger)
            global_step = args.model_frames
        if world > 1:
            for tensor in env_model.state_dict().values():
                dist.broadcast(tensor, 0)
    if args.agent == "i2a":
        networks["env_model"].requires_grad_(args.finetune_model)

    # ---- the agent
    frames = as_frames(observation, args.frame_stack)  # (B, F, H, W[, 3])
    episodes, losses, model_losses = (torch.zeros(n, device=device) for n in (4, 6, 1))  # sums since the last row
    row_step, row_time = global_step, time.time()
    act = functools.partial(rollout, args, networks, envs, rng=rng)
    learn = functools.partial(update, args, networks, optimizer)
    learning_rate = torch.tensor(args.learning_rate, device=device)  # where a graph reads it
    if args.cuda_graph:
        act = Captured(act, rng)
        learn = Captured(learn, rng) if world == 1 else learn  # several processes talk in an update
    bar = tqdm(total=args.total_timesteps, initial=global_step, disable=rank > 0 or not sys.stderr.isatty())
    while global_step < args.total_timesteps:
        left = 1.0
        if args.anneal_lr:
            left = min(1.0, (1 - global_step / args.total_timesteps) / (1 - args.anneal_from))
        learning_rate.fill_(args.learning_rate * left)
        for group in optimizer.param_groups:  # set in any case: --resume brings the old rate back
            group["lr"] = learning_rate if args.cuda_graph else args.learning_rate * left

        # 1. Act, with what the model imagines
        batch, transitions, frames, ended = act(frames)
        if args.cuda_graph:
            envs.refill()  # with new levels, which a graph can't make
        episodes += ended

        # 2. Update the agent and π̂, in minibatches of M of the T * B rows
        for _ in range(args.update_epochs):
            for index in torch.randperm(T * B, generator=rng, device=device).tensor_split(args.num_minibatches):
                losses += learn(*[x[index] for x in batch])

        # 3. With --finetune-model, the model learns from the same transitions, by its own loss only
        if args.finetune_model:
            model_optimizer.zero_grad(set_to_none=True)
            loss = model_loss(networks["env_model"], transitions).mean()
            loss.backward()
            average_gradients(list(networks["env_model"].parameters()))
            model_optimizer.step()
            model_losses += loss.detach()

        # 4. Log, then save what was logged
        before, global_step = global_step, global_step + T * B * world
        bar.update(T * B * world)
        if global_step // args.log_frequency == before // args.log_frequency and global_step < args.total_timesteps:
            continue
        if world > 1:
            for total in (episodes, losses, model_losses):
                dist.all_reduce(total)
        if rank == 0:
            seconds, iterations = time.time() - row_time, (global_step - row_step) // (T * B)  # of all processes
            losses /= iterations * args.update_epochs * args.num_minibatches
            metrics = {f"losses/{name}": loss for name, loss in zip(LOSSES, losses.tolist(), strict=True)}
            if args.finetune_model:
                metrics["losses/model_loss"] = model_losses.item() / iterations
            metrics["charts/minutes"] = minutes + (time.time() - start) / 60
            metrics["charts/learning_rate"] = args.learning_rate * left
            metrics["charts/SPS"] = (global_step - row_step) / seconds  # in the first row with compilation and warm-up
            ended, solved, total_return, total_length = episodes.tolist()
            if ended:
                metrics["charts/solved"] = solved / ended
                metrics["charts/episodic_return"] = total_return / ended
                metrics["charts/episodic_length"] = total_length / ended
            if args.agent == "i2a":
                metrics |= model_metrics(networks["env_model"], transitions)
                metrics |= rollout_accuracy(args, networks, frames, global_step)
            logger.log(global_step, metrics)
            bar.set_postfix(solved=metrics.get("charts/solved"), SPS=metrics["charts/SPS"])
        local = {"rng": rng.get_state(), "env": envs.get_state()}
        processes = [local] * world
        if world > 1:
            dist.all_gather_object(processes, local)
        if rank == 0:
            save_checkpoint(logger.path.with_name("checkpoint.pt"), {
                "args": asdict(replace(args, resume=None)), "run_name": run_name, "rows": logger.rows,
                "global_step": global_step, "minutes": metrics["charts/minutes"], "processes": processes,
                "networks": networks.state_dict(), "optimizer": optimizer.state_dict(),
                "model_optimizer": model_optimizer and model_optimizer.state_dict(),
            })  # fmt: skip
        for total in (episodes, losses, model_losses):
            total.zero_()
        row_step, row_time = global_step, time.time()

    # ---- evaluate on held-out levels, and export
    bar.close()
    if rank == 0:
        logger.log(global_step, evaluate(args, networks, eval_levels, device)[0])
        if args.save_model:
            export = {"args": asdict(replace(args, resume=None)), "networks": networks.state_dict()}
            save_checkpoint(logger.path.with_name("agent.pt"), export | {"global_step": global_step})
            print(f"to measure it again: python {sys.argv[0]} --evaluate runs/{run_name}/agent.pt")
        logger.close()
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main(parse_args())
    except KeyboardInterrupt:
        sys.exit("stopped; --resume runs/NAME/checkpoint.pt goes on from the agent's last row, if there is one")
