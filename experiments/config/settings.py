"""Every setting of an experiment: its default, its range, who reads it.

Files in configs/ change some of them.

    python -m experiments.config.settings

lists them all.
"""

import dataclasses
import inspect
import json
import math
import os
import re
import typing
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

import attention
from attention.integers import INT32_MAX
from attention.layers import embeds
from experiments import tasks
from experiments.tasks.ranges import (
    FRACTION,
    NUMBER,
    SWITCH,
    TEXT,
    ValueRange,
    above,
    at_least,
    between,
    exactly,
    one_of,
)


class Reader(NamedTuple):
    """When a setting has an effect: `reads(config)`, which `when` says in words.

    Elsewhere a value other than the default is an error. An `inherited` setting is allowed: a
    variant of a sweep has it from a base that reads it.
    """

    when: str
    reads: Callable[[ConfigDict], bool]
    inherited: bool = False


def _tasks(reads: Callable[[Any], bool], when: str) -> Reader:
    return Reader(when, lambda c: reads(tasks.TASKS[c.task.name]))


EVERYONE = Reader("any settings", lambda c: True)
CAPTIONS = _tasks(lambda task: task.architecture == "captioner", "task.name captions")
DECODER = Reader(
    "model.architecture='transformer'", lambda c: c.model.architecture == "transformer"
)
TRANSFORMER = Reader(
    "model.architecture='transformer', and with task.name captions, whose images one reads",
    lambda c: DECODER.reads(c) or CAPTIONS.reads(c),
)
RNN = Reader("model.architecture='rnn'", lambda c: c.model.architecture == "rnn")
ATTENTION = Reader(
    "attention, not model.rnn.attention='none'",
    lambda c: c.model.architecture != "rnn" or c.model.rnn.attention != "none",
    inherited=True,
)
ANY_ATTENTION = Reader(
    f"{ATTENTION.when}, and with task.name captions",
    lambda c: ATTENTION.reads(c) or CAPTIONS.reads(c),
    inherited=True,
)
RNN_ENCODER = Reader(
    "model.architecture='rnn' of a task from text to text",
    lambda c: RNN.reads(c) and not CAPTIONS.reads(c),
)
LUONG = Reader(
    "model.rnn.attention='luong'", lambda c: RNN.reads(c) and c.model.rnn.attention == "luong"
)
LUONG_OF_TEXTS = Reader(
    f"{LUONG.when} of a task from text to text",
    lambda c: LUONG.reads(c) and RNN_ENCODER.reads(c),
)
WINDOW = Reader("a model.rnn.window", lambda c: LUONG.reads(c) and c.model.rnn.window != "none")
WRITING = _tasks(lambda task: hasattr(task, "references"), "task.name translation or captions")
LANGUAGE_MODEL = _tasks(
    lambda task: task.architecture == "decoder", "a task of a decoder alone, such as text"
)

IMAGES = _tasks(lambda task: task.architecture == "image_classifier", "a task of images")
TOKENS = _tasks(lambda task: task.architecture != "image_classifier", "a task of tokens")
LATENT = Reader("a model.kv_rank", lambda c: TRANSFORMER.reads(c) and c.model.kv_rank is not None)
PATCHES = Reader("a task of images or of captions", lambda c: IMAGES.reads(c) or CAPTIONS.reads(c))
MASKED = Reader(
    "the Transformer of a task of tokens (model.layers has masks for images)",
    lambda c: DECODER.reads(c) and not IMAGES.reads(c),
)

PART = ValueRange("a text that `attention.parse` reads", TEXT.holds)


class Setting(NamedTuple):
    """A setting.

    Attributes:
      default: its value, or the type of a setting that is None unless given.
      range: the values it may have, beside None.
      says: what it is, where its name does not tell.
      reader: who reads it.
    """

    default: Any
    range: ValueRange
    says: str = ""
    reader: Reader = EVERYONE


_SEED = between(0, INT32_MAX)

SETTINGS: dict[str, Any] = {
    "mesh": Setting("", TEXT, "of devices, 'data:4,model:2': batch over data, heads over model"),
    "fully_sharded": Setting(False, SWITCH, "parameters over data as well"),
    "threads": Setting(
        0,
        at_least(0),
        "of XLA on a CPU; results depend on them to the bit; 0: the cores that the run begins on",
    ),
    "model": {
        "architecture": Setting("transformer", one_of("transformer", "rnn")),
        "score": Setting("scaled_dot", PART, reader=ATTENTION),
        "position": Setting("rope", PART, reader=ANY_ATTENTION),
        "mask": Setting("causal", PART, "of a decoder", MASKED),
        "layers": Setting(
            "",
            ValueRange("a text that `attention.parse_layers` reads", TEXT.holds),
            "what the layers of a decoder, or of images, have of their own, repeated to num_layers",
            DECODER,
        ),
        "normalizer": Setting("softmax", PART, reader=ATTENTION),
        "num_layers": Setting(2, at_least(1), "of encoder and decoder each"),
        "model_dim": Setting(64, at_least(1)),
        "num_heads": Setting(4, at_least(1), reader=ANY_ATTENTION),
        "num_kv_heads": Setting(int, at_least(1), "num_heads unless given", TRANSFORMER),
        "head_dim": Setting(int, at_least(1), "model_dim // num_heads unless given", TRANSFORMER),
        "mlp_dim": Setting(int, at_least(1), "4 · model_dim unless given", TRANSFORMER),
        "mlp": Setting(
            "gelu",
            one_of("gelu", "swiglu", "geglu", "reglu"),
            "gated ones have three matrices of mlp_dim instead of two",
            TRANSFORMER,
        ),
        "block": Setting(
            "sequential",
            one_of("sequential", "parallel"),
            "attention and MLP one after the other, or both of one input",
            TRANSFORMER,
        ),
        "norm": Setting("pre", one_of("pre", "post"), reader=TRANSFORMER),
        "norm_kind": Setting("layer", one_of("layer", "rms"), reader=TRANSFORMER),
        "qk_norm": Setting(
            "none",
            one_of("none", "rms", "rms_full", "l2"),
            "of query and key, with learned gains: by head, of all heads together, directions",
            TRANSFORMER,
        ),
        "readout": Setting(
            "none",
            one_of("none", "differential", "differential_v1", "exclusive"),
            "of the heads of self-attention: two query heads each, one against the other; the same "
            "with half of the keys each; or without what lies along the token's own value",
            TRANSFORMER,
        ),
        "output_gate": Setting(
            "none",
            one_of("none", "element", "head"),
            "on what the heads read; one for each element, or for each head",
            TRANSFORMER,
        ),
        "value_residual": Setting(
            "none",
            one_of("none", "first_layer", "token"),
            "added to the values of self-attention: those of the first layer, or of the token's id",
            TRANSFORMER,
        ),
        "kv_rank": Setting(
            int,
            at_least(1),
            "self-attention makes keys and values of all heads from so many numbers; from x unless "
            "given",
            TRANSFORMER,
        ),
        "rotary_dim": Setting(
            int, at_least(1), "of a key beside those, which turns; half of head_dim", LATENT
        ),
        "query_rank": Setting(
            int,
            at_least(1),
            "queries of all heads are made from so many numbers; from x unless given",
            LATENT,
        ),
        "head_mix": Setting(
            "none",
            one_of("none", "talking"),
            "whether heads of self-attention mix their scores and their weights",
            TRANSFORMER,
        ),
        "dropout_rate": Setting(0.0, FRACTION),
        "attention_dropout_rate": Setting(0.0, FRACTION, reader=TRANSFORMER),
        "use_bias": Setting(False, SWITCH, reader=TRANSFORMER),
        "patch_size": Setting(4, at_least(1), "pixels of a patch, to a side", PATCHES),
        "pooling": Setting(
            "class", one_of("class", "mean"), "what a class is told by: its token, or all", IMAGES
        ),
        "registers": Setting(0, at_least(0), "learned tokens beside the patches", PATCHES),
        "tie_embeddings": Setting(True, SWITCH, reader=TOKENS),
        "init_stddev": Setting(0.02, above(0.0)),
        "scan_layers": Setting(
            False, SWITCH, "compile time flat in depth, but slow steps on a CPU", TRANSFORMER
        ),
        "remat_layers": Setting(False, SWITCH, "less memory, one forward pass more", TRANSFORMER),
        "dtype": Setting(
            "float32",
            one_of("float32", "bfloat16", "float16", "float64"),
            "of the computation; parameters are float32. float64 needs JAX_ENABLE_X64=1",
        ),
        "implementation": Setting(str, TEXT, "the kernel; chosen by `attend`", TRANSFORMER),
        "rnn": {
            "cell": Setting("gru", one_of("gru", "lstm"), reader=RNN),
            "bidirectional": Setting(True, SWITCH, "the encoder", RNN_ENCODER),
            "attention": Setting("bahdanau", one_of("bahdanau", "luong", "none"), reader=RNN),
            "window": Setting("none", one_of("none", "local_m", "local_p"), reader=LUONG_OF_TEXTS),
            "window_width": Setting(5, at_least(1), "states to each side", WINDOW),
            "input_feeding": Setting(
                True, SWITCH, "Luong et al., sec. 3.3; `models.Luong` by itself has False", LUONG
            ),
        },
    },
    "optimizer": {  # AdamW, linear warm-up, cosine decay
        "learning_rate": Setting(1e-3, at_least(0.0), "the largest"),
        "final_learning_rate": Setting(1e-4, at_least(0.0)),
        "warmup_steps": Setting(50, at_least(0), "train.steps or more: the rate only rises"),
        "b1": Setting(0.9, FRACTION),
        "b2": Setting(0.99, FRACTION),
        "weight_decay": Setting(0.1, at_least(0.0)),
        "clip_norm": Setting(1.0, above(0.0) | exactly(math.inf), "inf: not clipped"),
        "label_smoothing": Setting(0.0, FRACTION),
        "qk_clip": Setting(
            math.inf,
            above(0.0) | exactly(math.inf),
            "the largest score; the weights of query and key of heads with a larger one shrink "
            "after a step; inf: not clipped",
            DECODER,  # the steps of a recurrent one tell no scores
        ),
        "ema_decay": Setting(0.0, FRACTION, "a model is judged by this mean of its parameters"),
    },
    "decoding": {
        "beam_size": Setting(5, at_least(1), reader=WRITING),
        "length_penalty": Setting(0.6, NUMBER, reader=WRITING),
        "timed_tokens": Setting(
            0, at_least(0), "a model is timed on generating so many; 0: not", LANGUAGE_MODEL
        ),
    },
    "train": {
        "steps": Setting(500, at_least(1)),
        "batch_size": Setting(32, at_least(1)),
        "eval_batch_size": Setting(128, at_least(1)),
        "seeds": Setting(3, at_least(1)),
        "first_seed": Setting(0, _SEED, "the others follow it"),
        "data_seed": Setting(int, _SEED, "draws the batches of all seeds; each its own"),
        "init_seed": Setting(int, _SEED, "draws the parameters of all seeds; each its own"),
        "seeds_impl": Setting(
            "map", one_of("map", "vmap"), "in one program one after another, or side by side"
        ),
        "log_every": Setting(50, at_least(1)),
        "eval_every": Setting(100, at_least(1)),
        "checkpoint_every": Setting(1000, at_least(1)),
        "explosion": Setting(
            10.0, above(1.0) | exactly(0), "a loss so many times the first is a failure; 0: NaN is"
        ),
        "patience": Setting(
            0,
            at_least(0),
            "evaluations without a better one that end a run, whose result is then that of its "
            "best parameters, not its last; 0: never",
        ),
    },
}


def config(task: str, **task_settings) -> ConfigDict:
    """The settings of an experiment on `task`, one of `experiments.tasks.TASKS`.

    It is locked, so that a name that a config file misspells is an error.
    """
    settings = {"task": task_config(task, **task_settings), **_defaults(SETTINGS)}
    return ConfigDict(settings).lock()


def _defaults(node):
    if isinstance(node, Setting):
        return placeholder(node.default) if isinstance(node.default, type) else node.default
    return {name: _defaults(own) for name, own in node.items()}


def task_config(name: str, **settings) -> ConfigDict:
    """The fields of a task with their defaults, `settings` replacing some."""
    task = tasks.create({"name": name, **settings})
    hints = typing.get_type_hints(type(task))
    fields = {"name": name}
    for field in dataclasses.fields(task):  # type: ignore[arg-type]
        value = getattr(task, field.name)
        optional = [kind for kind in typing.get_args(hints[field.name]) if kind is not type(None)]
        fields[field.name] = placeholder(optional[0]) if value is None else value
    return ConfigDict(fields)


def argument(file: str, arg: str, arguments: Collection[str]) -> str:
    """The checked argument of a config file, 'sort' of configs/transduction.py:sort.

    It is one of `arguments`, or empty for the first of them. ValueError for any other, naming
    `file`, which is the `__file__` of the config.
    """
    first, *_ = arguments
    if (arg or first) not in arguments:
        raise ValueError(f"{os.path.relpath(file)} takes :{', :'.join(arguments)}; got {arg!r}")
    return arg or first


def check(config: ConfigDict) -> None:
    """Raises ValueError, naming the setting, where a value is out of its range."""
    import jax

    for name, setting in _flat(SETTINGS):
        value = get(config, name)
        if not (value is None and isinstance(setting.default, type)):
            setting.range.check(name, value)
    if config.model.dtype == "float64" and not jax.config.read("jax_enable_x64"):
        raise ValueError("model.dtype='float64' needs JAX_ENABLE_X64=1 in the environment")
    c, model = config.train, config.model
    if (last := c.first_seed + c.seeds - 1) > INT32_MAX:
        raise ValueError(
            f"train.first_seed={c.first_seed} and train.seeds={c.seeds} end at seed {last}: seeds "
            f"go up to {INT32_MAX}"
        )
    if None not in (c.data_seed, c.init_seed) and c.seeds > 1:
        if not (model.dropout_rate or model.attention_dropout_rate):
            raise ValueError(
                f"train.data_seed={c.data_seed} and train.init_seed={c.init_seed} leave nothing in "
                f"which {c.seeds} seeds differ: leave one of them out, or set train.seeds=1"
            )


def check_read(config: ConfigDict, changed: Collection[str] = ()) -> None:
    """Raises ValueError where a setting is not at its default though nothing reads it.

    `changed` are the dotted names of those that a sweep or a flag has set itself; they are not
    inherited (see `Reader`).
    """
    no_layer_attends = _mixers_alone(config)
    for name, setting in _flat(SETTINGS):
        value, reader = get(config, name), setting.reader
        default = None if isinstance(setting.default, type) else setting.default
        if value == default:
            continue
        if no_layer_attends and name in _OF_ATTENTION and name in changed:
            raise ValueError(
                f"{name}={value!r} is of attention, and model.layers={config.model.layers!r} has "
                f"mixers alone: leave it at {default!r}, or add a layer that attends"
            )
        if reader.reads(config) or (reader.inherited and name not in changed):
            continue
        raise ValueError(
            f"{name}={value!r} is read only with {reader.when}: leave it at {default!r}"
        )
    if config.task.get("path") or config.task.get("tfds"):
        defaults = task_config(config.task.name)
        for name, value in config.task.items():
            if name.startswith("synthetic_") and value != defaults[name]:
                raise ValueError(
                    f"task.{name}={value!r} is read only where the data are generated, without "
                    f"path and tfds: leave it at {defaults[name]!r}"
                )
    if RNN_ENCODER.reads(config) and ATTENTION.reads(config):
        if embeds(attention.parse("position", config.model.position)):
            raise ValueError(
                f"model.position={config.model.position!r} is added to embeddings, which is "
                "read only with model.architecture='transformer': choose 'none', or one that "
                "acts on query, key or scores"
            )


def _mixers_alone(config):
    """Whether a model has layers of which none attends."""
    if not (DECODER.reads(config) and LANGUAGE_MODEL.reads(config)):
        return False
    layers = attention.parse_layers(config.model.layers)
    return bool(layers) and all(layer.mixer is not None for layer in layers)


_OF_ATTENTION = (
    *("model.score", "model.normalizer", "model.num_kv_heads", "model.qk_norm", "model.readout"),
    *("model.output_gate", "model.value_residual", "model.kv_rank", "model.rotary_dim"),
    *("model.query_rank", "model.head_mix", "model.attention_dropout_rate"),
    *("model.implementation", "optimizer.qk_clip"),
)


def seeds(config: ConfigDict, of: str = "") -> tuple[int, ...]:
    """The seeds of a run; `of` 'data' those that draw the batches, of 'init' the parameters."""
    first, count = config.train.first_seed, config.train.seeds
    fixed = config.train[f"{of}_seed"] if of else None
    return tuple(range(first, first + count)) if fixed is None else (fixed,) * count


def get(config: ConfigDict, name: str) -> Any:
    """The setting of a dotted name."""
    for part in name.split("."):
        config = config[part]
    return config


def _flat(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Setting]]:
    for key, own in node.items():
        if isinstance(own, Setting):
            yield f"{prefix}{key}", own
        else:
            yield from _flat(own, f"{prefix}{key}.")


def override(config: ConfigDict, changes: Mapping[str, Any]) -> ConfigDict:
    """A locked copy of `config` with some settings, named by dotted keys, replaced.

    Raises:
      ValueError: for a key that does not exist (naming the nearest) or a value of another type.
    """
    config = config.copy_and_resolve_references()
    changes = dict(changes)
    if "task" in changes:
        task = changes.pop("task")
        if not isinstance(task, Mapping) or "name" not in task:
            raise ValueError(f"task={task!r} must be a dict with the 'name' of a task")
        with config.unlocked():
            config.task = task_config(**task)
    config.lock()
    for key, value in changes.items():
        *path, last = str(key).split(".")
        node = config
        try:
            for part in path:
                node = node[part]
            old = node[last]
        except (KeyError, AttributeError) as error:
            listed = "no setting; python -m experiments.config.settings lists them"
            text = error if "Did you mean" in str(error) else listed  # else it is the bare name
            raise ValueError(f"{key}: {text}") from None
        except TypeError:
            raise ValueError(f"{key} is no setting: {'.'.join(path)} has none below it") from None
        if isinstance(old, ConfigDict):
            raise ValueError(f"{key} is a group of settings: change one of {', '.join(old)}")
        try:
            node[last] = value
        except TypeError:
            raise ValueError(
                f"{key} must be {type(old).__name__}, like {old!r}; got {value!r}"
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
    settings = config(own["name"])
    settings.unlock()
    settings.update({**described, "task": own})
    return settings.lock()


def complete(described: Mapping[str, Any]) -> dict[str, Any]:
    """The result of `describe`, with the defaults of settings that did not exist then."""

    def filled(default, value):
        if not (isinstance(default, Mapping) and isinstance(value, Mapping)):
            return value
        own = {key: filled(default.get(key), x) for key, x in value.items()}
        return {**default, **own}

    defaults = json.loads(json.dumps(config(described["task"]["name"]).to_dict()))
    return filled(defaults, described)


def _meanings(kind: type) -> dict[str, str]:
    """By field of a task what the section 'Attributes' of its docstring says, in one line."""
    section = (inspect.getdoc(kind) or "").partition("Attributes:\n")[2]
    entries = re.findall(r"^  (\w+(?:, \w+)*): (.*(?:\n    .*)*)", section, re.MULTILINE)
    return {
        name: " ".join(text.split()).rstrip(".")
        for names, text in entries
        for name in names.split(", ")
    }


def table() -> str:
    """All settings in Markdown: default, range, meaning, and who reads those that not all do."""
    lines = ["| setting | default | range | |", "|---|---|---|---|"]
    for name, setting in _flat(SETTINGS):
        default = None if isinstance(setting.default, type) else setting.default
        only = "" if setting.reader is EVERYONE else f"read only with {setting.reader.when}"
        says = "; ".join(filter(None, (setting.says, only)))
        lines.append(f"| {name} | {default!r} | {setting.range.text} | {says} |")
    for task, kind in tasks.TASKS.items():
        meanings = _meanings(kind)
        for field in dataclasses.fields(kind):
            allowed = field.metadata["range"].text if "range" in field.metadata else ""
            says = "; ".join(filter(None, (meanings.get(field.name), f"of task.name={task!r}")))
            lines.append(f"| task.{field.name} | {field.default!r} | {allowed} | {says} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
