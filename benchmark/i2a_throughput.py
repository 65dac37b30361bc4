"""How fast i2a.py trains on one thread, what part of the machine's peak that is, and where the time goes.

    OMP_NUM_THREADS=1 python benchmark/i2a_throughput.py

Frames/s are those of i2a.py itself (charts/SPS of a short run with an untrained model: the same work). The peak is a
1024 x 1024 float32 matrix product in the same process; the arithmetic of a frame is counted by torch. Writes
benchmark/results/i2a_throughput.csv.
"""

import csv
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import tyro
from torch.utils.flop_counter import FlopCounterMode

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import i2a  # noqa: E402

LAPTOP = ["--size", "10", "--num-boxes", "4", "--num-envs", "64", "--cnn-channels", "16", "16", "--dense", "128"]
MINIPACMAN = [*LAPTOP[:9], "--dense", "256", "--lstm", "256", "--imagination-depth", "5"]
CASES = {
    "default": [],
    "10x10, depth 3, laptop sizes": LAPTOP,
    "10x10, depth 3, laptop sizes, bf16": [*LAPTOP, "--bf16"],
    "10x10, depth 1, laptop sizes": [*LAPTOP, "--imagination-depth", "1"],
    "10x10, depth 5, MiniPacman sizes": MINIPACMAN,
    "10x10, laptop sizes, model-free": [*LAPTOP, "--agent", "model-free"],
}


@dataclass
class Args:
    frames: int = 20_000
    """frames of each run"""


def seconds(function: Callable, repeats: int = 10) -> float:
    """The fastest of some calls, after a warm-up."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def peak() -> float:
    """Floating-point operations a second of a large matrix product."""
    a, b = torch.randn(2, 1024, 1024)
    return 2 * 1024**3 / seconds(lambda: a @ b)


def parts_of(flags: list[str]) -> dict[str, float]:
    """Seconds of each part for one step of all environments, and the floating-point operations of a frame."""
    args = i2a.parse_args(flags)
    networks, rng = i2a.make_networks(args, torch.device("cpu")), torch.Generator()
    envs = i2a.SokobanVectorEnv(args.num_envs, size=args.size, num_boxes=args.num_boxes)
    frames = envs.reset(seed=1)[0][:, None]
    dream = i2a.imagination(args, networks, rng)
    imagined, agent = dream(frames) if dream else None, networks["agent"]
    losses = []

    def forward() -> None:
        losses[:] = [sum(x.square().mean() for x in agent(frames, imagined))]

    def step() -> None:
        forward()
        losses[0].backward()

    with FlopCounterMode(display=False) as counter:
        dream and dream(frames)
        step()
    result = {"flop_per_frame": counter.get_total_flops() / args.num_envs, "environment": 0.0}
    result["environment"] = seconds(lambda: envs.step(torch.randint(i2a.A, (args.num_envs,))))
    if dream:
        rows, action = frames.repeat_interleave(i2a.A, 0), torch.arange(i2a.A).repeat(args.num_envs)
        depth = args.imagination_depth
        with torch.no_grad():
            result["environment model"] = depth * seconds(lambda: networks["env_model"].predict(rows, action))
            result["rollout policy"] = (depth - 1) * seconds(lambda: networks["rollout_policy"](rows))
        result["other imagination"] = max(0.0, seconds(lambda: dream(frames)) - sum(list(result.values())[2:]))
        result["encoder, forward"] = seconds(lambda: agent.encoder(*imagined))
    result["other networks, forward"] = seconds(forward) - result.get("encoder, forward", 0.0)
    result["backward"] = seconds(step) - result["other networks, forward"] - result.get("encoder, forward", 0.0)
    return result


def main(args: Args) -> None:
    torch.set_num_threads(1)
    i2a.keep_freed_memory()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, flags in CASES.items():
            settings = i2a.parse_args(flags)
            state = {"args": {}, "networks": i2a.make_networks(settings, torch.device("cpu")).state_dict()}
            i2a.save_checkpoint(pathlib.Path(folder) / "model.pt", state)
            steps = [
                "--total-timesteps",
                str(args.frames),
                "--log-frequency",
                str(args.frames // 2),
                "--eval-episodes",
                "1",
            ]
            steps += ["--env-model-path", "model.pt"] if settings.agent == "i2a" else []
            command = [sys.executable, str(ROOT / "i2a.py"), *flags, *steps]
            environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
            output = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=True)
            speed = max(float(text.split()[0]) for text in output.stdout.split("charts/SPS=")[1:])
            maximum, parts = peak(), parts_of(flags)
            flop = parts.pop("flop_per_frame")
            whole = sum(parts.values())
            row = {"case": name, "frames_per_second": round(speed), "mflop_per_frame": round(flop / 1e6, 2)}
            row |= {"peak_gflops": round(maximum / 1e9, 1), "share_of_peak": round(speed * flop / maximum, 3)}
            rows.append(row | {f"share: {part}": round(value / whole, 3) for part, value in parts.items()})
            print(rows[-1], flush=True)
    target = ROOT / "benchmark" / "results" / "i2a_throughput.csv"
    with target.with_suffix(".tmp").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)
    os.replace(target.with_suffix(".tmp"), target)


if __name__ == "__main__":
    main(tyro.cli(Args))
