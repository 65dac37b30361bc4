"""I2A's loop, its checkpoints and its command line: whole runs, tiny ones. The parts: test_i2a.py."""

import itertools
import os
import pathlib
import socket
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import assert_same, n_step_returns, rows_of, seeded
from test_i2a import CPU, FREE, SMALL, boards, some_rows, step_of

import i2a
from i2a import A
from sokoban_env import SokobanVectorEnv, exclude_levels, generate_levels, save_levels

TINY = [
    "--size", "6", "--num-boxes", "1", "--cnn-channels", "8", "--encoder-channels", "8", "--dense", "16",
    "--lstm", "16", "--model-width", "4", "--imagination-depth", "2", "--num-envs", "8", "--num-steps", "4",
    "--num-minibatches", "2", "--update-epochs", "2", "--model-frames", "1024", "--model-steps", "20",
    "--eval-episodes", "20", "--max-episode-steps", "10", "--log-frequency", "64", "--total-timesteps", "1280",
]  # fmt: skip


def train(*flags: str) -> pathlib.Path:
    """Run i2a.py in this process; the folder that it wrote to."""
    before = set(pathlib.Path("runs").glob("*"))
    i2a.main(i2a.parse_args([*flags]))
    (folder,) = set(pathlib.Path("runs").glob("*")) - before
    return folder


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, torch.Tensor]]:
    """The levels (L, H, W) of each start of episodes, with the number of environments."""
    levels, place = [], SokobanVectorEnv._place

    def watched(self: SokobanVectorEnv, rows: object, chosen: object, number: object) -> None:
        levels.append((self.num_envs, torch.as_tensor(chosen).clone()))
        place(self, rows, chosen, number)

    monkeypatch.setattr(SokobanVectorEnv, "_place", watched)
    return levels


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[torch.nn.ModuleDict]:
    """The networks of each run."""
    networks, make = [], i2a.make_networks
    monkeypatch.setattr(i2a, "make_networks", lambda *a: networks.append(make(*a)) or networks[-1])
    return networks


# ------------------------------------------------------------------------------------------------- the loop, end to end


class Watch:
    """What the environments of the training loop (of 8 rows) were told and did."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, num_envs: int = 8) -> None:
        self.steps, step = [], SokobanVectorEnv.step

        def watched(env: SokobanVectorEnv, actions: torch.Tensor) -> tuple:
            before = env.get_state(pool=False)["cells"] if env.max_episode_steps != float("inf") else None
            result = step(env, actions)
            if before is not None and env.num_envs == num_envs:
                true_next = result[4].get("final_obs", result[0]).clone()
                self.steps.append((before, actions, *result[1:4], true_next))
                self.final.append(result[4].get("final_info"))
            return result

        self.final: list[dict | None] = []
        monkeypatch.setattr(SokobanVectorEnv, "step", watched)

    def last(self, num: int) -> tuple[torch.Tensor, ...]:
        """Boards, actions, rewards, terminated, truncated, true next boards: (num, B, ...) each."""
        return tuple(torch.stack(column) for column in zip(*self.steps[-num:], strict=True))


@pytest.mark.parametrize("agent", ["i2a", "model-free"])
def test_one_epoch_of_one_minibatch_is_a2c(agent: str, made: list, monkeypatch: pytest.MonkeyPatch):
    """Of the whole loop under --preset paper-small, against a plain n-step A2C gradient written here."""
    pairs, ends, watch = [], [], Watch(monkeypatch, 32)

    def agent_on(boards: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # at depth 1 under the perfect model the imagination is the same each time
        return made[0]["agent"](boards[:, None], i2a.imagine(made[0], boards[:, None], 1, seeded()))

    def a2c_gradient() -> list[torch.Tensor]:
        boards, actions, rewards, terminated, truncated, following = watch.last(8)
        after = agent_on(following.flatten(0, 1))[1].detach().view(8, 32)
        returns = n_step_returns(0.1 * rewards, terminated, truncated, after, 0.9).flatten()
        logits, values = agent_on(boards.flatten(0, 1))
        log_pi = logits.log_softmax(-1)
        taken = log_pi.gather(1, actions.view(-1, 1)).squeeze(1)
        losses = 0.5 * (returns - values) ** 2 - taken * (returns - values.detach())
        losses = losses + 0.001 * (log_pi.exp() * log_pi).sum(1)
        ends.append((int(terminated.sum()), int(truncated.sum())))
        return torch.autograd.grad(losses.mean(), list(made[0]["agent"].parameters()))

    class Recorder(torch.optim.SGD):
        def step(self) -> None:
            pairs.append(([p.grad.clone() for p in made[0]["agent"].parameters()], a2c_gradient()))

    monkeypatch.setattr(torch.optim, "Adam", lambda groups, *_, **__: Recorder(groups, 1.0))
    save_levels("near.txt", generate_levels(40, size=6, num_boxes=1, seed=3, max_pulls=3)[0])
    flags = ["--preset", "paper-small", "--levels", "near.txt", "--size", "6", "--dense", "16", "--lstm", "8"]
    flags += ["--imagination-depth", "1", "--env-model", "perfect", "--max-episode-steps", "10", "--gamma", "0.9"]
    flags += ["--gae-lambda", "1", "--max-grad-norm", "1e9", "--eval-episodes", "4", "--total-timesteps", "768"]
    train(*flags, "--agent", agent)
    assert len(pairs) == 3 and all(sum(column) > 0 for column in zip(*ends, strict=True))
    for gradients, expected in pairs:
        assert torch.cat([x.flatten() for x in expected]).norm() > 0.01
        for one, other in zip(gradients, expected, strict=True):
            assert (one - other).abs().max() < 1e-6


def test_the_loop_reads_each_frame_with_its_own_rollouts(monkeypatch: pytest.MonkeyPatch):
    """In acting, in the bootstrap of the next frames and of an episode's own last one, and in each minibatch:
    rollout a begins with what action a does in the frame that stands beside it."""
    forward, seen = i2a.I2AAgent.forward, []

    def watch(self: i2a.I2AAgent, frames: torch.Tensor, imagined: tuple) -> tuple:
        seen.append((frames.clone(), [x.clone() for x in imagined]))
        return forward(self, frames, imagined)

    monkeypatch.setattr(i2a.I2AAgent, "forward", watch)
    train(*TINY, "--env-model", "perfect", "--frame-stack", "2", "--total-timesteps", "960")
    model = i2a.PerfectModel(SMALL)
    for frames, (imagined, rewards, _) in seen:
        actions = torch.arange(A).repeat(len(frames))
        frame, reward, _ = model.predict(frames.repeat_interleave(A, 0), actions)
        assert torch.equal(imagined[:, :, 0].flatten(0, 1), frame)
        assert torch.equal(rewards[:, :, 0].flatten(), reward)
    # acting; two minibatches of 16 in each of two epochs and, as many, the bootstraps; then the evaluation
    assert [len(frames) for frames, _ in seen[:18]] == ([8] * 4 + [16] * 5) * 2


def test_each_epoch_sees_each_row_once(monkeypatch: pytest.MonkeyPatch):
    calls, watch, update, advantages, discounts = [], Watch(monkeypatch), i2a.update, i2a.generalized_advantages, []
    monkeypatch.setattr(i2a, "generalized_advantages", lambda *a: discounts.append(a[5:]) or advantages(*a))
    monkeypatch.setattr(i2a, "update", lambda *a: calls.append(a[3:]) or update(*a))
    monkeypatch.setattr(torch.optim.Adam, "step", lambda *_: None)
    flags = ["--update-epochs", "3", "--num-minibatches", "4", "--total-timesteps", "32", "--no-anneal-lr"]
    flags += ["--gamma", "0.9", "--gae-lambda", "0.7"]
    train(*TINY, "--agent", "model-free", *flags)
    assert discounts == [(0.9, 0.7)]
    boards, actions, *_ = watch.last(4)
    epochs = [[torch.cat(x) for x in zip(*calls[i : i + 4], strict=True)] for i in (0, 4, 8)]
    assert [len(rows[0]) for rows in calls] == [8] * 12
    for frames, action, _, advantages, _ in epochs:
        pairs = (frames.flatten(1), action), (boards.flatten(0, 1).flatten(1), actions.flatten())
        given, done = (torch.cat([b, a[:, None]], 1).tolist() for b, a in pairs)  # each action beside its board
        assert sorted(given) == sorted(done)
        assert torch.equal(advantages.sort()[0], epochs[0][3].sort()[0])
    assert not torch.equal(epochs[0][3], epochs[1][3])  # in another order


@pytest.mark.parametrize(
    ("anneal", "expected"),
    [
        ("--anneal-from 0", [0.004, 0.003, 0.002, 0.001]),
        ("--anneal-from 0.5", [0.004, 0.004, 0.004, 0.002]),
        ("--no-anneal-lr", [0.004] * 4),
    ],
)
def test_the_learning_rate_falls_to_nothing(anneal: str, expected: list[float], monkeypatch: pytest.MonkeyPatch):
    rates, update = [], i2a.update
    monkeypatch.setattr(i2a, "update", lambda *a: rates.append([g["lr"] for g in a[2].param_groups]) or update(*a))
    flags = ["--env-model", "copy", "--update-epochs", "1", "--num-minibatches", "1", "--total-timesteps", "128"]
    folder = train(*TINY, *flags, "--learning-rate", "0.004", *anneal.split())
    assert rates == [pytest.approx([x, x]) for x in expected]
    assert [row.get("charts/learning_rate") for row in rows_of(folder)[:2]] == pytest.approx(expected[1::2])


def test_a_row_holds_the_means_since_the_last(monkeypatch: pytest.MonkeyPatch):
    watch, calls = Watch(monkeypatch), itertools.count()
    monkeypatch.setattr(i2a, "update", lambda *_: next(calls) + torch.arange(6.0))
    rows = rows_of(train(*TINY, "--agent", "model-free", "--total-timesteps", "256", "--log-frequency", "128"))
    assert [row["global_step"] for row in rows] == [128, 256, 256]
    names = ["policy_loss", "value_loss", "entropy", "clipfrac", "distillation", "gradient_norm"]
    for i, row in enumerate(rows[:2]):  # 4 updates of 2 epochs of 2 minibatches
        assert [row[f"losses/{name}"] for name in names] == pytest.approx([16 * i + 7.5 + k for k in range(6)])
        final = [x for x in watch.final[16 * i : 16 * i + 16] if x]
        ended = torch.cat([x["_success"] for x in final])
        for name, values in (
            ("solved", torch.cat([x["success"] for x in final])),
            ("episodic_return", torch.cat([x["episode"]["r"] for x in final])),
            ("episodic_length", torch.cat([x["episode"]["l"] for x in final])),
        ):
            assert row[f"charts/{name}"] == pytest.approx(values[ended].float().mean().item())


def test_finetuning_sees_no_reset(monkeypatch: pytest.MonkeyPatch):
    loss, batches = i2a.model_loss, []
    monkeypatch.setattr(i2a, "model_loss", lambda model, batch: batches.append(batch) or loss(model, batch))
    folder = train(*TINY, "--finetune-model", "--max-episode-steps", "5", "--env-model", "poor")
    fresh = [batch for batch in batches if len(batch["action"]) == 32]
    assert len(fresh) == 8  # one for each update
    model = i2a.PerfectModel(SMALL)
    for batch in fresh:
        frame, reward, end = model.predict(batch["frames"], batch["action"])
        assert torch.equal(frame, batch["next"]) and torch.equal(end, batch["end"])
        assert torch.allclose(reward, batch["reward"])
    assert rows_of(folder)[-2]["losses/model_loss"] > 0


@pytest.mark.parametrize("finetune", [False, True])
def test_a_run_moves_what_it_should(finetune: bool, made: list, monkeypatch: pytest.MonkeyPatch):
    first, pretrain = {}, i2a.pretrain_model

    def watch(*args: object) -> None:
        pretrain(*args)
        first.update({name: value.clone() for name, value in made[0].state_dict().items()})

    monkeypatch.setattr(i2a, "pretrain_model", watch)
    folder = train(*TINY, *["--finetune-model"] * finetune)
    after = made[0].state_dict()
    moved = {name.split(".")[0] for name, value in first.items() if not torch.equal(value, after[name])}
    assert moved == {"agent", "rollout_policy", *["env_model"] * finetune}
    rows = rows_of(folder)
    assert rows[0]["global_step"] == 1024 and rows[1]["global_step"] > 1024  # the model's frames are counted
    metrics = {name for row in rows for name in row}
    assert metrics >= {
        "charts/episodic_return", "charts/episodic_length", "charts/solved", "charts/SPS", "charts/minutes",
        "losses/policy_loss", "losses/value_loss", "losses/entropy", "losses/distillation", "losses/gradient_norm",
        "model/exact_board_accuracy", "model/all_right", "model/exact_rollouts", "eval/solved",
    }  # fmt: skip
    export = torch.load(folder / "agent.pt")
    assert export["global_step"] == 1280
    assert_same(dict(after), export["networks"])


def test_what_is_held_out_is_held_out(drawn: list, monkeypatch: pytest.MonkeyPatch):
    played, evaluate = [], i2a.evaluate
    monkeypatch.setattr(i2a, "evaluate", lambda *a: played.append(a[2]) or evaluate(*a))
    flags = ["--max-episode-steps", "4", "--eval-episodes", "200", "--agent", "model-free", "--seed", "3"]
    train(*TINY, *flags)
    training = torch.cat([chosen for num_envs, chosen in drawn if num_envs == 8])
    assert len(training) > 200 and exclude_levels(training, played[0]).all()
    evaluated = torch.cat([chosen for num_envs, chosen in drawn if num_envs == 200])
    assert torch.equal(evaluated[:200], played[0]) and len(set(map(bytes, played[0].numpy()))) == 200
    train(*TINY, *flags, "--seed", "4", "--exp-name", "other")
    assert torch.equal(played[0], played[1])  # the same for every seed


def test_measuring_and_compiling_change_nothing(monkeypatch: pytest.MonkeyPatch):
    compiler, compiled = torch.compile, []
    monkeypatch.setattr(torch, "compile", lambda f, **_: compiled.append(f.__self__) or f)
    changes = ["--log-frequency", "32"], ["--log-frequency", "1000", "--compile"]
    often, once = (torch.load(train(*TINY, *change) / "agent.pt")["networks"] for change in changes)
    assert_same(often, once)
    assert [type(network) for network in compiled] == [i2a.I2AAgent, i2a.EnvModel, i2a.RolloutPolicy]
    frames, action = boards(8)[:, None], torch.arange(8) % A
    imagined = torch.zeros(8, A, 2, 6, 6, dtype=torch.uint8), torch.randn(8, A, 2), torch.ones(8, A, 2)
    for network, inputs in zip(compiled, ((frames, imagined), (frames, action), (frames,)), strict=True):
        traced = compiler(network.forward, backend="eager", fullgraph=True)  # all but the compiler itself
        torch.testing.assert_close(traced(*inputs), network(*inputs))


VARIANTS = [
    ["--agent", "model-free", "--view", "board", "--no-symmetry", "--no-norm-adv"],
    ["--env-model", "perfect", "--rollout-policy", "random", "--no-symmetry"],
    ["--env-model", "copy", "--bf16", "--lstm", "32"],
    ["--env-model", "poor", "--no-reward-prediction", "--imagination-depth", "1"],
    ["--frame-stack", "4", "--optimizer", "rmsprop", "--finetune-model"],
    ["--preset", "paper-small", "--view", "player"],
    ["--preset", "paper", "--model-steps", "2", "--cnn-channels", "8", "8", "--frame-stack", "2"],
]  # fmt: skip


@pytest.mark.parametrize("flags", VARIANTS, ids=lambda flags: "-".join(flags[:2]).strip("-"))
def test_every_variant_runs(flags: list[str]):
    folder = train(*TINY, "--model-frames", "1024", "--total-timesteps", "1152", "--eval-episodes", "4", *flags)
    rows = rows_of(folder)
    assert rows[-1]["eval/solved"] >= 0 and all(np.isfinite(x) for row in rows for x in row.values())


def test_a_pretrained_policy_acts_in_imagination_and_collects(made: list, monkeypatch: pytest.MonkeyPatch):
    path = train(*TINY, "--agent", "model-free", "--total-timesteps", "64") / "agent.pt"
    policies, collect = [], i2a.collect_transitions
    monkeypatch.setattr(i2a, "collect_transitions", lambda *a: policies.append(a[1]) or collect(*a))
    second = train(*TINY, "--rollout-policy", "pretrained", "--pretrained-path", str(path), "--total-timesteps", "1088")
    teacher, networks = made
    frames = boards(5)[:, None]
    expected, _ = teacher["agent"](frames, ())
    assert torch.equal(networks["rollout_policy"](frames), expected)  # and it has stayed so
    assert len(policies) == 2 and all(torch.equal(policy(frames), expected) for policy in policies)
    path.unlink()  # the export holds all that it needs
    i2a.main(i2a.parse_args(["--evaluate", str(second / "agent.pt"), "--eval-episodes", "5"]))


def test_a_model_from_another_runs_file_is_not_pretrained(made: list):
    first = train(*TINY, "--total-timesteps", "1056") / "agent.pt"
    second = train(*TINY, "--env-model-path", str(first), "--rollout-policy", "random", "--total-timesteps", "64")
    assert_same(made[0]["env_model"].state_dict(), made[1]["env_model"].state_dict())
    assert rows_of(second)[0]["global_step"] == 64


def test_evaluation_of_an_export(capsys: pytest.CaptureFixture):
    folder = train(*TINY, "--env-model", "perfect", "--rollout-policy", "random", "--total-timesteps", "64")
    solved = rows_of(folder)[-1]["eval/solved"]
    path = folder / "agent.pt"
    capsys.readouterr()
    i2a.main(i2a.parse_args(["--evaluate", str(path)]))  # the same levels again
    text = capsys.readouterr().out
    assert text.startswith(f"{path}, trained on 64 frames: ") and f'"eval/solved": {solved}' in text
    save_levels("held_out.txt", generate_levels(6, size=6, num_boxes=2, seed=9)[0])
    i2a.main(i2a.parse_args(["--evaluate", str(path), "--eval-levels", "held_out.txt", "--greedy"]))
    assert len(list(pathlib.Path("runs").iterdir())) == 1  # no run of its own


LEARNING = [
    *TINY, "--agent", "model-free", "--num-envs", "32", "--num-steps", "30", "--num-minibatches", "4",
    "--update-epochs", "4", "--cnn-channels", "16", "16", "--dense", "128", "--max-episode-steps", "30",
    "--learning-rate", "3e-3", "--log-frequency", "8000", "--total-timesteps", "32000", "--eval-episodes", "300",
]  # fmt: skip


def test_learning_raises_the_solve_rate():
    rows = rows_of(train(*LEARNING))
    assert rows[-1]["eval/solved"] > rows[0]["charts/solved"] + 0.25
    assert rows[-2]["losses/entropy"] < rows[0]["losses/entropy"] - 0.2


# ------------------------------------------------------------------------------------------------- checkpoints and runs


@pytest.mark.parametrize(
    ("flags", "when"),
    [
        (["--frame-stack", "2"], "update"),
        (["--finetune-model"], "update"),
        (["--env-model", "copy", "--optimizer", "rmsprop", "--no-anneal-lr"], "save_checkpoint"),
    ],
)
def test_a_killed_run_resumes_bit_for_bit(flags: list[str], when: str, monkeypatch: pytest.MonkeyPatch):
    whole = train(*TINY, *flags)
    original, calls = getattr(i2a, when), itertools.count(1)
    deadly = 2 * 4 * 3 + 2 if when == "update" else 3  # in the fourth update, or after a row and before its checkpoint

    def die(*args: object) -> object:
        if next(calls) == deadly:
            raise KeyboardInterrupt
        return original(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(i2a, when, die)
        i2a.main(i2a.parse_args([*TINY, *flags, "--exp-name", "killed"]))
    (killed,) = pathlib.Path("runs").glob("*killed*")
    assert not (killed / "agent.pt").exists()
    i2a.main(i2a.parse_args(["--resume", str(killed / "checkpoint.pt")]))
    one, other = (torch.load(folder / "checkpoint.pt") for folder in (whole, killed))
    same = ("networks", "optimizer", "model_optimizer", "global_step", "processes")
    assert_same(*({name: state[name] for name in same if name in state} for state in (one, other)))
    rows, again = rows_of(whole), rows_of(killed)
    minutes = [row["charts/minutes"] for row in again if "charts/minutes" in row]
    assert len(minutes) > 3 and minutes == sorted(minutes)
    for row in (*rows, *again):
        row.pop("charts/SPS", None), row.pop("charts/minutes", None)
    assert rows == again
    i2a.main(i2a.parse_args(["--evaluate", str(killed / "agent.pt")]))  # knows of no resuming
    assert other["args"]["resume"] is torch.load(killed / "agent.pt")["args"]["resume"] is None


@pytest.mark.parametrize("anneal", [["--anneal-from", "0"], ["--no-anneal-lr"]])
def test_flags_beside_resume_win(anneal: list[str], drawn: list, monkeypatch: pytest.MonkeyPatch):
    flags = ["--agent", "model-free", "--num-boxes", "1", "--total-timesteps", "320", *anneal]
    path, rates, update = train(*TINY, *flags) / "checkpoint.pt", [], i2a.update
    assert torch.load(path)["processes"][0]["env"]["pool"]["boards"].eq(3).flatten(1).sum(1).max() == 1
    drawn.clear()
    monkeypatch.setattr(i2a, "update", lambda *a: rates.append(a[2].param_groups[0]["lr"]) or update(*a))
    changes = ["--num-boxes", "2", "--learning-rate", "1e-4", "--total-timesteps", "640"]
    i2a.main(i2a.parse_args(["--resume", str(path), *changes]))
    assert rates[0] == pytest.approx(0.5e-4 if "--anneal-from" in anneal else 1e-4)
    after = [chosen for num, chosen in drawn if num == 8 and len(chosen) < 8]  # what followed on finished episodes
    assert len(after) > 10 and all((chosen.eq(3) | chosen.eq(4)).flatten(1).sum(1).eq(2).all() for chosen in after)
    assert torch.load(path)["global_step"] == 640 and torch.load(path)["args"]["num_boxes"] == 2


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return str(s.getsockname()[1])


def one_of_two(rank: int, folder: str, port: str, rows: list[torch.Tensor]) -> None:
    """A whole run, as torchrun starts it; then one update on every other row."""
    os.chdir(folder)
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
    networks, make = [], i2a.make_networks
    i2a.make_networks = lambda *a: networks.append(make(*a)) or networks[-1]
    i2a.main(i2a.parse_args(TINY))
    i2a.make_networks = make
    torch.save(networks[0].state_dict(), f"weights{rank}.pt")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    gradient, _ = step_of(replace(FREE, max_grad_norm=0.05), [x[rank::2] for x in rows])
    torch.save(gradient, f"gradient{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_train_one_agent(tmp_path: pathlib.Path):
    rows = some_rows(i2a.make_networks(SMALL, CPU))
    whole, _ = step_of(replace(FREE, max_grad_norm=0.05), rows)
    mp.spawn(one_of_two, (str(tmp_path), free_port(), rows), nprocs=2)
    for rank in range(2):  # the mean of the gradients is the whole batch's; it is what is clipped
        for name, gradient in torch.load(f"gradient{rank}.pt").items():
            assert torch.allclose(gradient, whole[name], atol=1e-6)
    (folder,) = pathlib.Path("runs").iterdir()
    state = torch.load(folder / "checkpoint.pt")
    assert len(state["processes"]) == 2
    assert [process["env"]["pool"]["seed"] for process in state["processes"]] == [1000, 1001]  # other levels
    assert not torch.equal(state["processes"][0]["rng"], state["processes"][1]["rng"])
    assert state["global_step"] == 1024 + 4 * 64  # 2 x 8 environments x 4 steps an update
    assert_same(torch.load("weights0.pt"), torch.load("weights1.pt"))
    assert_same(torch.load("weights0.pt"), state["networks"])
    assert "processes (here 1)" in refused("--resume", str(folder / "checkpoint.pt"), "--total-timesteps", "2000")


# ------------------------------------------------------------------------------------------------------------ bad input


def refused(*flags: str) -> str:
    """The one line that a run with these flags ends with."""
    with pytest.raises(SystemExit) as error:
        i2a.main(i2a.parse_args(list(flags)))
    assert "\n" not in error.value.code
    return error.value.code


def test_what_a_levels_file_brings():
    save_levels("large.txt", generate_levels(2, size=9, num_boxes=1)[0])
    assert "large.txt: level 0 is 9x9, too large for size 6x6" in refused(*TINY, "--levels", "large.txt")
    save_levels("two.txt", generate_levels(2, size=6, num_boxes=2)[0])
    args = i2a.parse_args([*TINY, "--levels", "two.txt", "--num-boxes", "1"])
    assert args.num_boxes == 2 and i2a.held_out_levels(args).eq(3).flatten(1).sum(1).min() == 2
    torch.save({"args": asdict(args)}, "trained.pt")
    pathlib.Path("two.txt").unlink()  # an evaluation needs it no more
    assert i2a.parse_args(["--evaluate", "trained.pt"]).num_boxes == 2


def test_bad_checkpoints():
    folder = train(*TINY, "--agent", "model-free", "--total-timesteps", "64")
    good = folder / "checkpoint.pt"
    state = torch.load(good)
    export = str(good.with_name("agent.pt"))
    assert f"{export} can't go on: --resume takes a checkpoint.pt" in refused("--resume", export)
    for flag, *change in (["--evaluate", "--dense", "24"], ["--resume", "--size", "7"], ["--resume", "--agent", "i2a"]):
        assert f"{good} was made with other parts or sizes" in refused(flag, str(good), *change)
    for change in (["--num-envs", "4"], ["--optimizer", "rmsprop"]):
        assert "can't change when a run goes on" in refused("--resume", str(good), *change)
    assert "other parts or sizes" in refused(*TINY, "--env-model-path", str(good))  # it has no model
    del state["networks"]["agent.critic.weight"]
    torch.save(state, "hollow.pt")
    assert "hollow.pt was made with other parts" in refused("--evaluate", "hollow.pt")


def test_a_loss_that_is_no_number_keeps_the_last_checkpoint(monkeypatch: pytest.MonkeyPatch):
    losses, calls = i2a.ppo_losses, itertools.count(1)

    def breaking(*args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        policy_loss, *others = losses(*args)
        if next(calls) == 13:  # of the fourth update; every loss is finite, and the weights are lost all the same
            policy_loss.register_hook(lambda gradient: gradient * float("nan"))
        return policy_loss, *others

    monkeypatch.setattr(i2a, "ppo_losses", breaking)
    message = refused(*TINY, "--agent", "model-free")
    assert " is nan at step 128: " in message
    (folder,) = pathlib.Path("runs").iterdir()
    state = torch.load(folder / "checkpoint.pt")
    assert state["global_step"] == 64 and all(value.isfinite().all() for value in state["networks"].values())
