"""Every setting of an experiment with its default; files in configs/ change what they are about."""

import dataclasses
import json
import typing
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from experiments import results, tasks


def config(task: str, **task_settings) -> ConfigDict:
    """The settings of an experiment on `task`, one of `experiments.tasks.TASKS`."""
    return ConfigDict(
        {
            "task": task_config(task, **task_settings),
            "mesh": "",  # of devices, as 'data:4,model:2': batch over data, heads over model
            "fully_sharded": False,  # parameters over data as well
            "model": {
                "architecture": "transformer",  # or 'rnn'
                "score": "scaled_dot",  # these four are read by `attention.parse`
                "position": "rope",
                "mask": "causal",
                "normalizer": "softmax",
                "num_layers": 2,
                "model_dim": 64,
                "num_heads": 4,
                "num_kv_heads": placeholder(int),  # num_heads
                "head_dim": placeholder(int),  # model_dim // num_heads
                "mlp_dim": placeholder(int),  # 4 · model_dim
                "norm": "pre",
                "dropout_rate": 0.0,
                "attention_dropout_rate": 0.0,
                "use_bias": False,
                "tie_embeddings": True,
                "init_stddev": 0.02,
                "scan_layers": False,  # True: compile time flat in depth, but slow steps on a CPU
                "remat_layers": False,  # less memory, one forward pass more
                "dtype": "float32",  # of the computation; parameters are float32
                "implementation": placeholder(str),  # the kernel; chosen by `attend`
                "rnn": {
                    "cell": "gru",  # or 'lstm'
                    "bidirectional": True,  # the encoder
                    "attention": "bahdanau",  # or 'luong', 'none'
                    "window": "none",  # of luong: 'local_m', 'local_p'
                    "window_width": 5,
                    "input_feeding": True,  # of luong
                },
            },
            "optimizer": {  # AdamW, linear warm-up, cosine decay
                "learning_rate": 1e-3,
                "final_learning_rate": 1e-4,
                "warmup_steps": 50,
                "b1": 0.9,
                "b2": 0.99,
                "weight_decay": 0.1,
                "clip_norm": 1.0,
                "label_smoothing": 0.0,
                "ema_decay": 0.0,  # judge a model by the running mean of its parameters
            },
            "decoding": {
                "beam_size": 5,  # of tasks that translate
                "length_penalty": 0.6,
                "timed_tokens": 0,  # a language model is timed on generating so many; 0: not
            },
            "train": {
                "steps": 500,
                "batch_size": 32,
                "eval_batch_size": 128,
                "seeds": 3,
                "seeds_impl": "map",  # in one program one after another, or side by side: 'vmap'
                "log_every": 50,
                "eval_every": 100,
                "checkpoint_every": 1000,
                "explosion": 10.0,  # a loss so many times the first is a failure; 0: NaN only
                "patience": 0,  # evaluations without a better one that end a run; 0: never
            },
        }
    )


def task_config(name: str, **settings) -> ConfigDict:
    """The fields of a task with their defaults, `settings` replacing some."""
    task = tasks.create({"name": name, **settings})
    hints = typing.get_type_hints(type(task))
    fields = {"name": name}
    for field in dataclasses.fields(task):
        value = getattr(task, field.name)
        optional = [kind for kind in typing.get_args(hints[field.name]) if kind is not type(None)]
        fields[field.name] = placeholder(optional[0]) if value is None else value
    return ConfigDict(fields)


def override(config: ConfigDict, changes: Mapping[str, Any]) -> ConfigDict:
    """A locked copy of `config` with some settings, named by dotted keys, replaced.

    Raises:
      ValueError: for a key that does not exist (naming the nearest) or a value of another type.
    """
    config = config.copy_and_resolve_references()
    changes = dict(changes)
    if task := changes.pop("task", None):
        with config.unlocked():
            config.task = task_config(**task)
    config.lock()
    for key, value in changes.items():
        *path, last = key.split(".")
        node = config
        try:
            for part in path:
                node = node[part]
            node[last] = value
        except (KeyError, AttributeError) as error:
            raise ValueError(f"{key}: {error}") from None
        except TypeError:
            raise ValueError(
                f"{key} must be {type(node[last]).__name__}, like {node[last]!r}; got {value!r}"
            ) from None
    return config


def describe(config: ConfigDict) -> dict[str, Any]:
    """All settings as JSON, and the fingerprint of the text where the task reads one."""
    task = tasks.create(config.task)
    described = json.loads(json.dumps(config.to_dict()))
    if hasattr(task, "fingerprint"):
        described["task"]["fingerprint"] = task.fingerprint
    return described


def read(described: Mapping[str, Any]) -> ConfigDict:
    """The config that `describe` described."""
    own = {key: value for key, value in described["task"].items() if key != "fingerprint"}
    found = config(own["name"])
    found.unlock()
    found.update({**described, "task": own})
    return found.lock()


def complete(described: Mapping[str, Any]) -> dict[str, Any]:
    """What `describe` described, with the default of each setting that was not known then."""

    def filled(default, value):
        if not (isinstance(default, Mapping) and isinstance(value, Mapping)):
            return value
        own = {key: filled(default.get(key), x) for key, x in value.items()}
        return {**default, **own}

    defaults = json.loads(json.dumps(config(described["task"]["name"]).to_dict()))
    return filled(defaults, described)


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """What two described configs disagree on, a line each: 'model.num_heads is 4 there, 8 here'."""
    found = results.differences(there, here)
    return [f"{name} is {a!r} there, {b!r} here" for name, a, b in found]
