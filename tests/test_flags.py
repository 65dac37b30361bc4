"""Flags that can't work: each script ends with one line that says which, before it writes anything."""

import importlib
import pathlib

import gymnasium as gym
import pytest
import torch


class PlainEnv(gym.Env):
    """Discrete actions, but no end, no time limit and no pictures."""

    action_space = gym.spaces.Discrete(2)

    def __init__(self, states: gym.Space, render_mode: str | None = None) -> None:
        self.observation_space, self.render_mode = states, render_mode

    def reset(self, *, seed=None, options=None):
        return self.observation_space.sample(), {}


gym.register("TestPlain-v0", entry_point=PlainEnv, kwargs={"states": gym.spaces.Box(0, 1, (1,))})
gym.register("TestCountable-v0", entry_point=PlainEnv, kwargs={"states": gym.spaces.Discrete(2)})


@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [
        ("dyna_q", "--planning-steps -1", "--planning-steps -1"),
        ("dyna_q", "--epsilon 1.5", "--epsilon"),
        ("dyna_q", "--prioritized --planning-steps 0", "--prioritized needs"),
        ("dyna_q", "--prioritized --kappa 0.1", "no --kappa"),
        ("dyna_q", "--env-id no_such_module:Maze-v0", "no_such_module"),
        ("dyna_q", "--env-id NoMaze-v0", "NoMaze.* exist; try DynaMaze-v0, or your own as my_env:MyEnv-v0"),
        ("dyna_q", "--env-id Pendulum-v1", "action space.*Discrete"),
        ("dyna_q", "--env-id CartPole-v1", "states.*dyna_dqn.py"),
        ("dyna_q", "--env-id TestCountable-v0 --capture-video", "can't film --env-id TestCountable.* it has no render"),
        ("dyna_dqn", "--planning-steps -1", "--planning-steps -1"),
        ("dyna_dqn", "--gamma 1.1", "--gamma"),
        ("dyna_dqn", "--env-id no_such_module:Pole-v0", "no_such_module"),
        ("dyna_dqn", "--env-id Pendulum-v1", "action space.*Discrete"),
        ("dyna_dqn", "--env-id FrozenLake-v1", "vectors.*dyna_q.py"),
        ("dyna_dqn", "--env-id Sokoban-v0 --num-boxes 9", "num_boxes=9"),
        ("dyna_dqn", "--env-id TestPlain-v0 --capture-video", "can't film --env-id TestPlain-v0: it has no render"),
        ("world_model_rollouts", "--horizon 0", "--horizon must be at least 1"),
        ("world_model_rollouts", "--gamma 1.1", "--gamma.* from 0 to 1"),
        ("world_model_rollouts", "--gamma 1", "--gamma 1 needs --reward-scale"),  # whose default would be 0
        ("world_model_rollouts", "--num-envs 1 --num-steps 3 --num-minibatches 2", "--num-minibatches"),
        ("world_model_rollouts", "--env-id TestPlain-v0", "no time limit.*register it with max_episode_steps"),
        ("world_model_rollouts", "--env-id NoPole-v0", "NoPole-v0: .*exist; try CartPole-v1, or your own as my_env:"),
        ("world_model_rollouts", "--env-id FrozenLake-v1", "needed: vectors"),
        ("world_model_gp", "--gamma 1", "--gamma must be from 0 to below 1"),  # rewards are scaled by 1 - gamma
        ("world_model_gp", "--policy-updates 0", "--policy-updates must be at least 1"),
        ("world_model_gp", "--num-envs 1 --num-steps 3 --num-minibatches 2", "--num-minibatches"),
        ("distillation", "--loss mse", "--loss mse compares Q-values: give --teacher-path a file of dyna_dqn.py"),
        ("distillation", "--correction", "--correction needs --states student"),
        ("distillation", "--env-ids NoMaze-v0", "NoMaze"),
        ("distillation", "--env-ids CartPole-v1 CartPole-v1", "each once"),
        ("distillation", "--env-ids Pendulum-v1", "Discrete"),
        ("distillation", "--env-ids FrozenLake-v1", "vectors"),
        ("distillation", "--num-boxes 30", "boxes"),
        ("distillation", "--temperature 0", "--temperature 0"),
        ("distillation", "--teacher-path other.pt", "other.pt holds no teacher"),
        ("distral", "--tasks 5by5", "unknown task '5by5'"),
        ("distral", "--tasks 5x5-1 5x5-1", "each once"),
        ("distral", "--held-out 6x6-1", "--held-out another one"),
        ("distral", "--tasks 5x5-9", "num_boxes=9"),
        ("distral", "--total-timesteps 0", "--total-timesteps"),
        ("distral", "--alpha -0.1", "--alpha -0.1"),
        ("distral", "--beta 0", "--beta 0.0"),
        ("distral", "--seed 1000000", "--seed must be from 0 to 999999"),
        ("distral_tabular", "--alpha 1.2", "--alpha 1.2"),
        ("distral_tabular", "--beta 0", "--beta 0.0"),
        ("distral_tabular", "--pseudo-count 0", "--pseudo-count 0.0 must be above 0"),
        ("distral_tabular", "--num-tasks 51", "ask for 51 goals, the rooms have 50"),
        ("distral_tabular", "--evaluate none.npz", "can't read the tables none.npz"),
        ("i2a", "--eval-levels nowhere.txt", "No such file or directory: 'nowhere.txt'"),
        ("i2a", "--levels nowhere.txt", "No such file or directory: 'nowhere.txt'"),
        ("i2a", "--env-model-path nowhere.pt", "can't read the checkpoint nowhere.pt"),
        ("i2a", "--resume a.pt --evaluate b.pt", "give one of them"),
        ("distral", "--resume a.pt --evaluate b.pt", "give one of them"),
        ("dyna_dqn", "--resume a.pt --evaluate b.pt", "give one of them"),
        ("world_model_rollouts", "--resume a.pt --evaluate b.pt", "give one of them"),
        ("world_model_gp", "--resume a.pt --evaluate b.pt", "give one of them"),
        ("i2a", "--rollout-policy pretrained", "--pretrained-path"),
        ("i2a", "--resume a.pt --preset paper", "--preset is for new runs"),
        ("i2a", "--finetune-model --env-model perfect", "--finetune-model needs"),
        ("i2a", "--finetune-model --agent model-free", "--finetune-model needs"),
        ("i2a", "--num-boxes 9", "num_boxes=9"),
        ("i2a", "--num-steps 61", "--num-steps must be at most --max-episode-steps"),
        ("i2a", "--observation rgb --no-symmetry", "--view board"),
        ("i2a", "--observation rgb --view board", "--no-symmetry"),
        ("i2a", "--view board", "--view board needs --no-symmetry"),
        ("i2a", "--cnn-channels 32 36", "--symmetry needs channels and units in eights"),
        ("i2a", "--encoder-channels 12", "--encoder-channels"),
        ("i2a", "--dense 100", "--dense"),
        ("i2a", "--lstm 33", "--lstm"),
        ("i2a", "--encoder-dense 12", "--encoder-dense"),
        ("i2a", "--rollout-channels 12", "--rollout-channels"),
        ("i2a", "--rollout-dense 12", "--rollout-dense"),
        ("i2a", "--num-minibatches 1025", "--num-minibatches needs at least two rows"),
        ("i2a", "--cuda-graph --num-minibatches 3", "--cuda-graph needs --num-minibatches"),
        ("i2a", "--cuda-graph --no-cuda", "--cuda-graph needs a GPU"),
        ("i2a", "--imagination-depth 0", "--imagination-depth must be at least 1"),
        ("i2a", "--model-frames 639", "--model-frames 640"),
        ("i2a", "--seed -1", "--seed must be from 0"),
        ("i2a", "--seed 1000000", "--seed must be from 0"),
    ],
)
def test_bad_flags_are_one_clear_line(script, flags, message):
    torch.save({"args": {}}, "other.pt")
    module = importlib.import_module(script)
    with pytest.raises(SystemExit, match=message) as error:
        module.main(module.parse_args(flags.split()))
    assert "\n" not in str(error.value)
    if "--capture-video" not in flags:  # its folder is named after the run's
        assert not pathlib.Path("runs").exists()


def test_no_discount_where_rewards_are_not_scaled_by_it():
    parse_args = importlib.import_module("world_model_rollouts").parse_args
    assert parse_args(["--gamma", "1", "--reward-scale", "0.1"]).gamma == 1
    assert parse_args(["--gamma", "1", "--model", "real"]).gamma == 1
