"""Recurrent policies: sb3-contrib, rsl_rl and TorchRL."""

from __future__ import annotations

import copy

import numpy
import pytest
import torch
from before_after import TRAINED, assert_same, check_accuracy, check_state_dicts, converted, with_gradients
from torch import Tensor, nn

import lstm_ext

pytestmark = pytest.mark.full


# ---- sb3-contrib


def agent_of_sb3(policy="MlpLstmPolicy", **options):
    sb3 = pytest.importorskip("sb3_contrib")
    return sb3.RecurrentPPO(
        policy,
        "CartPole-v1",
        n_steps=64,
        batch_size=64,
        n_epochs=2,
        seed=0,
        device="cpu",
        policy_kwargs={"lstm_hidden_size": 16, **options},
    )


def states_of(policy: nn.Module, batch: int, dtype: torch.dtype):
    from sb3_contrib.common.recurrent.type_aliases import RNNStates

    generator = torch.Generator().manual_seed(2)
    size = (policy.lstm_actor.num_layers, batch, policy.lstm_actor.hidden_size)
    h, c, h_critic, c_critic = [torch.randn(size, generator=generator).to(dtype) for _ in range(4)]
    return RNNStates((h, c), (h_critic, c_critic))


def evaluate(policy: nn.Module, starts: Tensor, observations: Tensor) -> dict[str, Tensor]:
    """Of three sequences, flat as sb3-contrib has them."""
    dtype = policy.lstm_actor.weight_hh_l0.dtype
    policy.extract_features = lambda observation, extractor=None: (
        observation
    )  # which would be float32 in any case
    actions = torch.arange(len(starts)) % 2
    states = states_of(policy, 3, dtype)
    values, log_prob, entropy = policy.evaluate_actions(
        observations.to(dtype), actions, states, starts.to(dtype)
    )
    return with_gradients(policy, {"values": values, "log_prob": log_prob, "entropy": entropy})


@pytest.mark.parametrize("episodes", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"n_lstm_layers": 2}, {"shared_lstm": True, "enable_critic_lstm": False}],
    ids=["two", "deep", "shared"],
)
def test_sb3_evaluates(options, episodes):
    policy = agent_of_sb3(**options).policy
    count = 1 if "shared_lstm" in options else 2
    observations = torch.randn(60, 4)
    starts = (torch.rand(60) < 0.2).float() if episodes else torch.zeros(60)
    check_accuracy(policy, lambda model: evaluate(model, starts, observations), count)
    check_state_dicts(policy, count)


def test_sb3_learns_saves_and_loads(tmp_path):
    theirs = agent_of_sb3().learn(128)
    ours = agent_of_sb3()  # only now: it seeds torch's generator
    lstm_ext.convert(ours.policy)
    ours.learn(128)
    assert_same(ours.policy, theirs.policy, **TRAINED)
    ours.save(tmp_path / "agent")
    loaded = type(ours).load(tmp_path / "agent", device="cpu")
    assert not any([entry.ours for entry in lstm_ext.report(loaded.policy)])
    lstm_ext.convert(loaded.policy)
    assert_same(loaded.policy, ours.policy, rtol=0, atol=0)
    observation, _ = ours.get_env().envs[0].reset(seed=3)
    expected, state = ours.predict(observation, deterministic=True)
    found, state_of_loaded = loaded.predict(observation, deterministic=True)
    assert found == expected
    torch.testing.assert_close(state_of_loaded, state)


# ---- rsl_rl


def toy_env():
    vec_env = pytest.importorskip("rsl_rl.env")
    from tensordict import TensorDict

    class Env(vec_env.VecEnv):
        """Points that are pushed about; an episode ends at random."""

        num_envs, num_actions, max_episode_length, device = 6, 2, 20, "cpu"

        def __init__(self):
            self.cfg = {}
            self.generator = torch.Generator().manual_seed(3)
            self.episode_length_buf = torch.zeros(self.num_envs, dtype=torch.long)
            self.x = torch.randn(self.num_envs, 4, generator=self.generator)

        def get_observations(self):
            return TensorDict({"policy": self.x.clone()}, [self.num_envs])

        def step(self, actions):
            self.x = 0.9 * self.x + 0.1 * torch.randn(self.x.shape, generator=self.generator)
            self.x[:, :2] += 0.1 * actions
            dones = (torch.rand(self.num_envs, generator=self.generator) < 0.2).long()
            return self.get_observations(), -self.x.square().sum(1), dones, {}

    return Env()


def config_of_rsl_rl() -> dict:
    model = {"class_name": "RNNModel", "hidden_dims": [16], "rnn_hidden_dim": 16, "rnn_type": "lstm"}
    gaussian = {"class_name": "GaussianDistribution", "init_std": 1.0}
    return {
        "num_steps_per_env": 12,
        "save_interval": 100,
        "obs_groups": {"actor": ["policy"], "critic": ["policy"]},
        "actor": {**model, "distribution_cfg": gaussian},
        "critic": dict(model),
        "algorithm": {"class_name": "PPO", "num_learning_epochs": 2, "num_mini_batches": 2},
        "multi_gpu": None,
    }


def runner_of_rsl_rl():
    runners = pytest.importorskip("rsl_rl.runners")
    torch.manual_seed(0)
    return runners.OnPolicyRunner(toy_env(), config_of_rsl_rl())


def test_rsl_rl_learns_saves_and_loads(tmp_path):
    theirs, ours = runner_of_rsl_rl(), runner_of_rsl_rl()
    for model in (ours.alg.actor, ours.alg.critic):
        lstm_ext.convert(model)
    for runner in (theirs, ours):
        torch.manual_seed(1)
        runner.learn(2)
    assert_same(ours.alg.actor, theirs.alg.actor, **TRAINED)
    assert_same(ours.alg.critic, theirs.alg.critic, **TRAINED)
    ours.save(tmp_path / "runner.pt")
    other = runner_of_rsl_rl()
    other.load(tmp_path / "runner.pt")
    assert_same(other.alg.actor, ours.alg.actor, rtol=0, atol=0)


def test_rsl_rl_exports(tmp_path):
    """It looks for torch's layer by its class, and compiles it with TorchScript."""
    onnxruntime = pytest.importorskip("onnxruntime")
    runner = runner_of_rsl_rl()
    lstm_ext.convert(runner.alg.actor, as_subclass=False)
    with pytest.raises(NotImplementedError, match=r"lstm_ext.*LSTM"):
        runner.export_policy_to_jit(str(tmp_path))
    lstm_ext.convert(runner.alg.actor)
    runner.export_policy_to_jit(str(tmp_path))
    runner.export_policy_to_onnx(str(tmp_path))
    assert type(runner.alg.actor.rnn.rnn) is lstm_ext.TorchLSTM

    observations = runner.env.get_observations()[:1]
    runner.alg.actor.reset()
    expected = runner.alg.actor(observations)
    exported = torch.jit.load(tmp_path / "policy.pt")
    torch.testing.assert_close(exported(observations["policy"]), expected)
    session = onnxruntime.InferenceSession(str(tmp_path / "policy.onnx"), providers=["CPUExecutionProvider"])
    state = {i.name: numpy.zeros(i.shape, numpy.float32) for i in session.get_inputs()[1:]}
    first = session.get_inputs()[0].name
    actions = session.run(None, {first: observations["policy"].numpy(), **state})[0]
    torch.testing.assert_close(torch.from_numpy(actions), expected)


# ---- TorchRL; more of it in tests/nn/test_torchrl.py


def test_torchrl():
    modules = pytest.importorskip("torchrl.modules")
    from tensordict import TensorDict

    keys = {"in_keys": ["x", "h", "c"], "out_keys": ["y", ("next", "h"), ("next", "c")]}
    module = modules.LSTMModule(input_size=3, hidden_size=16, device="cpu", **keys)
    content = {"x": torch.randn(4, 9, 3), "is_init": torch.rand(4, 9, 1) < 0.2}
    content |= {key: torch.randn(4, 9, 1, 16) for key in ("h", "c")}

    def run(module: nn.Module) -> dict[str, Tensor]:
        dtype = module.lstm.weight_hh_l0.dtype
        data = TensorDict(
            {k: v if v.dtype == torch.bool else v.to(dtype) for k, v in content.items()}, [4, 9]
        )
        with modules.set_recurrent_mode(True):
            return with_gradients(module, {"y": module(data)["y"]})

    check_accuracy(module, run)
    check_state_dicts(module)
    assert type(copy.deepcopy(converted(module)).lstm) is lstm_ext.TorchLSTM
