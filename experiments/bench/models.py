"""Whole Transformers: a forward pass, train step or decode step, ours and other libraries'."""

import dataclasses
import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import attention
from attention.parts import check_choices
from experiments.bench.work import (
    Foreign,
    JaxWork,
    Unavailable,
    Work,
    torch,
    torch_device,
)
from experiments.tasks.ranges import at_least, check_fields, ranged


@dataclasses.dataclass(frozen=True)
class ModelWork(Work):
    """A Transformer: a language model, an encoder-decoder or a Vision Transformer.

    Pre-norm, GELU, biases, learned positions, tied embeddings, a class token for images.

    Attributes:
      library: 'attention', 'flax.linen' (of its stock attention, Dense, LayerNorm, Embed), 'torch'
        (of `torch.nn.TransformerEncoder` or `torch.nn.Transformer`).
      architecture: 'decoder'; 'encoder_decoder' with as many layers each, which reads a source as
        long as its target; 'vision', which sorts images into vocab_size classes.
      derivative: 'none', the logits; 'train', a step of AdamW; 'decode', one token more for texts
        that are `context` − 1 tokens long; 'generate', the likeliest text of `context` tokens.
      num_layers, model_dim, num_heads, num_kv_heads, vocab_size: as of
        `attention.nn.TransformerConfig`; the MLP is 4 times as wide as the model.
      context, batch: T and B; of 'vision' B alone.
      image_size, patch_size: pixels of a side, of images of three channels.
      score, position, normalizer, layers, implementation: of our attention.
      scan_layers, remat_layers: of our stack.
      seeds, seeds_impl: that many models at once, by 'vmap' or one after another by 'map'.
      dtype: of the computation.
    """

    library: str = "attention"
    architecture: str = "decoder"
    derivative: str = "train"
    num_layers: int = ranged(4, at_least(1))
    model_dim: int = ranged(128, at_least(1))
    num_heads: int = ranged(4, at_least(1))
    num_kv_heads: int | None = ranged(None, at_least(1))
    vocab_size: int = ranged(256, at_least(1))
    context: int = ranged(256, at_least(1))
    batch: int = ranged(32, at_least(1))
    image_size: int = ranged(32, at_least(1))
    patch_size: int = ranged(4, at_least(1))
    score: str = "scaled_dot"
    position: str = "learned"
    normalizer: str = "softmax"
    layers: str = ""
    implementation: str | None = None
    scan_layers: bool = False
    remat_layers: bool = False
    seeds: int = ranged(1, at_least(1))
    seeds_impl: str = "map"
    dtype: str = "float32"

    def __post_init__(self):
        check_fields(self)
        check_choices(
            self,
            library=("attention", "flax.linen", "torch"),
            architecture=("decoder", "encoder_decoder", "vision"),
            derivative=("none", "train", "decode", "generate"),
            seeds_impl=("map", "vmap"),
        )
        for kind in ("score", "position", "normalizer"):
            attention.parse(kind, getattr(self, kind))  # raises where a part cannot be parsed
        attention.parse_layers(self.layers)
        if self.architecture == "vision":
            if self.derivative in ("decode", "generate"):
                raise ValueError(f"derivative={self.derivative!r} is of texts, not of images")
            if self.image_size % self.patch_size:
                raise ValueError(
                    f"patch_size={self.patch_size} must divide image_size={self.image_size}"
                )

    @property
    def num_patches(self) -> int:
        """Of an image."""
        return (self.image_size // self.patch_size) ** 2

    def build(self) -> JaxWork | Foreign:
        if self.library != "attention":
            _plain(self)
        if self.library == "torch":
            return _torch(self)
        module = self.module()
        if self.derivative == "generate":
            return _generation(self, module)
        inputs = self.inputs()
        seeds = jnp.arange(self.seeds)
        init = jax.jit(jax.vmap(lambda seed: module.init(jax.random.key(seed), *inputs)))
        params = init(seeds)
        if self.derivative == "none":
            return JaxWork(_logits, (module, self.seeds_impl), (params, inputs))
        if self.derivative == "decode":
            if self.library != "attention":
                raise Unavailable(f"{self.library}'s stock blocks do not decode step by step here")
            state = _start(module, self, params, inputs)
            static = (module, self.seeds_impl)
            return JaxWork(_decode, static, (params, state, inputs[-1][:, :1]), carry=1)
        import optax

        optimizer = jax.jit(jax.vmap(optax.adamw(1e-3).init))(params)
        arguments = ((params, optimizer), inputs, self.targets())
        return JaxWork(_train, (module, self.seeds_impl), arguments, carry=0)

    def module(self) -> Any:
        """The Linen module."""
        if self.library == "flax.linen":
            from experiments.bench import linen_stock

            return linen_stock.build(self)
        try:
            from attention.models import EncoderDecoder, LanguageModel, VisionTransformer
            from attention.nn import TransformerConfig
        except ImportError:
            raise Unavailable("flax is not installed: pip install '.[nn]'") from None
        kinds = ("score", "position", "normalizer")
        parts = {kind: attention.parse(kind, getattr(self, kind)) for kind in kinds}
        mechanism = functools.partial(attention.Mechanism, **parts)
        sizes = (
            *("vocab_size", "model_dim", "num_layers", "num_heads", "num_kv_heads"),
            *("scan_layers", "remat_layers", "implementation"),
        )
        of_images = self.architecture == "vision"
        config = TransformerConfig(
            decoder=mechanism(mask=attention.masks.Causal()),
            encoder=mechanism() if of_images else mechanism(mask=attention.masks.Padding()),
            cross=attention.Mechanism(
                parts["score"], mask=attention.masks.Padding(), normalizer=parts["normalizer"]
            ),
            layers=attention.parse_layers(self.layers),
            use_bias=True,
            dtype=jnp.dtype(self.dtype),
            **{name: getattr(self, name) for name in sizes},
        )
        if of_images:
            return VisionTransformer(config, (self.patch_size, self.patch_size), 3)
        return {"decoder": LanguageModel, "encoder_decoder": EncoderDecoder}[self.architecture](
            config
        )

    def inputs(self) -> tuple[np.ndarray, ...]:
        """What the model reads: tokens, source and tokens, or images [B, height, width, 3]."""
        if self.architecture == "vision":
            shape = (self.batch, self.image_size, self.image_size, 3)
            return (np.random.default_rng(0).normal(size=shape).astype(np.float32),)
        tokens = self.tokens()
        return (tokens, tokens) if self.architecture == "encoder_decoder" else (tokens,)

    def targets(self) -> np.ndarray:
        """What it is to predict: the next tokens [B, T], or classes [B]."""
        if self.architecture == "vision":
            return np.random.default_rng(1).integers(self.vocab_size, size=self.batch)
        return np.roll(self.tokens(), -1, axis=1)

    def tokens(self) -> np.ndarray:
        """[B, T] int32."""
        shape = (self.batch, self.context)
        return np.random.default_rng(0).integers(self.vocab_size, size=shape, dtype=np.int32)

    def flops(self) -> float | None:
        """Of all matrix products; three times as many with the gradient."""
        plain = self.architecture != "encoder_decoder" and not self.layers
        if self.derivative in ("decode", "generate") or not plain:
            return None
        of_images = self.architecture == "vision"
        M, T = self.model_dim, self.num_patches + 1 if of_images else self.context
        heads = (self.num_kv_heads or self.num_heads) / self.num_heads
        keys = T if of_images else (T + 1) / 2  # that a query sees
        blocks = self.num_layers * T * (2 * M * M * (2 + 2 * heads + 8) + 4 * M * keys)
        numbers = 3 * self.image_size**2 + self.vocab_size if of_images else T * self.vocab_size
        times = 3 if self.derivative == "train" else 1
        return (blocks + 2 * M * numbers) * self.batch * self.seeds * times

    def different(self) -> "ModelWork | None":
        if self.library != "attention":
            return None
        other = "softmax" if self.normalizer != "softmax" else "softmax_off_by_one"
        return dataclasses.replace(self, normalizer=other)

    def oracle(self) -> None:
        return None


def _plain(work):
    """Raises `Unavailable` where a peer's stock blocks have no such option."""
    options = (
        *("score", "position", "normalizer", "layers", "implementation"),
        *("scan_layers", "remat_layers", "num_kv_heads"),
    )
    for field in dataclasses.fields(work):
        value = getattr(work, field.name)
        if field.name in options and value != field.default:
            raise Unavailable(f"{work.library} has no {field.name} {value!r} here")


def _over_seeds(seeds_impl, function, *trees):
    if jax.tree.leaves(trees[0])[0].shape[0] == 1:
        result = function(*(jax.tree.map(lambda x: x[0], tree) for tree in trees))
        return jax.tree.map(lambda x: x[None], result)
    if seeds_impl == "vmap":
        return jax.vmap(function)(*trees)
    return jax.lax.map(lambda own: function(*own), trees)


def _logits(static, params, inputs):
    module, seeds_impl = static
    return _over_seeds(seeds_impl, lambda own: module.apply(own, *inputs), params)


def _train(static, state, inputs, targets):
    import optax

    module, seeds_impl = static

    def step(params, optimizer):
        def loss(params):
            logits = module.apply(params, *inputs)
            return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

        value, gradients = jax.value_and_grad(loss)(params)
        updates, optimizer = optax.adamw(1e-3).update(gradients, optimizer, params)
        return (optax.apply_updates(params, updates), optimizer), value

    return _over_seeds(seeds_impl, step, *state)


def _start(module, work, params, inputs):
    """The state after `context` − 1 tokens."""

    def start(params):
        if work.architecture == "encoder_decoder":
            state = module.apply(params, inputs[0], None, work.context, method="start")
        else:
            state = module.apply(params, work.batch, work.context, method="start")
        return module.apply(params, state, inputs[-1][:, 1:], method="step")[1]

    return jax.jit(jax.vmap(start))(params)


def _decode(static, params, state, tokens):
    module, seeds_impl = static

    def step(params, state):
        logits, new = module.apply(params, state, tokens, method="step")
        caches = jax.tree.map(  # the token's slot is free again, so that runs are alike
            lambda cache, old: cache._replace(length=old.length),
            *(new.self_attention, state.self_attention),
            is_leaf=lambda x: hasattr(x, "length"),
        )
        return new._replace(self_attention=caches), logits

    return _over_seeds(seeds_impl, step, params, state)


def _generation(work, module):
    if work.architecture != "decoder" or work.seeds != 1:
        raise Unavailable("derivative='generate' is for one decoder")
    tokens = work.tokens()
    variables = jax.jit(module.init)(jax.random.key(0), tokens)
    return JaxWork(_generate, (module, work), (variables, tokens[:, :1]))


def _generate(static, variables, begin):
    """Tokens [context, B], each the likeliest after those before it."""
    module, work = static

    if work.library == "attention":
        state = module.apply(variables, work.batch, work.context, method="start")

        def next_logits(state, tokens):
            return module.apply(variables, state, tokens, method="step")

    else:
        state, params = variables["cache"], variables["params"]

        def next_logits(state, tokens):
            own = {"params": params, "cache": state}
            logits, changed = module.apply(own, tokens, mutable=["cache"])
            return logits, changed["cache"]

    def step(carry, _):
        state, tokens = carry
        logits, state = next_logits(state, tokens)
        tokens = jnp.argmax(logits, axis=-1).astype(tokens.dtype)
        return (state, tokens), tokens[:, 0]

    return jax.lax.scan(step, (state, begin), None, length=work.context)[1]


def _torch_generation(work, model):
    """() -> tokens [context, B], by a loop over tokens with a cache of keys and values."""
    lib = torch()
    functional, layers = lib.nn.functional, model.stack.layers
    heads, width = work.num_heads, work.model_dim // work.num_heads
    caches = lib.zeros(len(layers), 2, work.batch, heads, work.context, width)
    caches = caches.to(torch_device())
    begin = lib.tensor(work.tokens()[:, 0], dtype=lib.long, device=torch_device())

    def attend(layer, cache, x, t):
        own = layer.self_attn
        projected = functional.linear(x, own.in_proj_weight, own.in_proj_bias)
        query, cache[0, :, :, t], cache[1, :, :, t] = projected.view(-1, 3, heads, width).unbind(1)
        keys, values = cache[:, :, :, : t + 1]
        out = functional.scaled_dot_product_attention(query[:, :, None], keys, values)
        return own.out_proj(out.flatten(1))

    def run():
        tokens, text = begin, []
        with lib.inference_mode():
            for t in range(work.context):
                x = model.embedding(tokens) + model.place[t]
                for layer, cache in zip(layers, caches, strict=True):
                    x = x + attend(layer, cache, layer.norm1(x), t)
                    hidden = layer.activation(layer.linear1(layer.norm2(x)))
                    x = x + layer.linear2(hidden)
                logits = model.stack.norm(x) @ model.embedding.weight.T
                tokens = logits.argmax(-1)
                text.append(tokens)
        return lib.stack(text)

    return run


def _torch(work):
    if work.derivative == "decode" or work.seeds != 1:
        raise Unavailable("torch's own layers neither decode step by step nor train several seeds")
    lib = torch()
    lib.manual_seed(0)
    nn, device = lib.nn, torch_device()
    sizes = (work.model_dim, work.num_heads)
    options = {
        "dim_feedforward": 4 * work.model_dim,
        "dropout": 0.0,
        "activation": "gelu",
        "batch_first": True,
        "norm_first": True,
    }

    def encoder():
        layer = nn.TransformerEncoderLayer(*sizes, **options)
        norm = nn.LayerNorm(work.model_dim)
        return nn.TransformerEncoder(layer, work.num_layers, norm, enable_nested_tensor=False)

    class TorchVision(nn.Module):
        def __init__(self):
            super().__init__()
            side = work.patch_size
            self.patch = nn.Conv2d(3, work.model_dim, side, stride=side)
            self.first = nn.Parameter(lib.randn(work.model_dim) * 0.02)
            self.place = nn.Parameter(lib.randn(work.num_patches + 1, work.model_dim) * 0.02)
            self.stack = encoder()
            self.classes = nn.Linear(work.model_dim, work.vocab_size)

        def forward(self, images):
            x = self.patch(images.permute(0, 3, 1, 2)).flatten(2).transpose(1, 2)
            x = lib.cat([self.first.to(x.dtype).expand(len(x), 1, -1), x], dim=1) + self.place
            return self.classes(self.stack(x)[:, 0])

    class TorchModel(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(work.vocab_size, work.model_dim)
            self.place = nn.Parameter(lib.randn(work.context, work.model_dim) * 0.02)
            depth = {"num_encoder_layers": work.num_layers, "num_decoder_layers": work.num_layers}
            if work.architecture == "encoder_decoder":
                with warnings.catch_warnings(action="ignore"):  # norm_first: nothing is nested
                    self.stack = nn.Transformer(*sizes, **depth, **options)
            else:
                self.stack = encoder()
            self.mask = nn.Transformer.generate_square_subsequent_mask(work.context, device=device)

        def forward(self, tokens):
            x = self.embedding(tokens) + self.place
            if work.architecture == "encoder_decoder":
                x = self.stack(x, x, tgt_mask=self.mask, tgt_is_causal=True)
            else:
                x = self.stack(x, mask=self.mask, is_causal=True)
            return x @ self.embedding.weight.T

    of_images = work.architecture == "vision"
    model = (TorchVision if of_images else TorchModel)().to(device)
    model = model.train(work.derivative == "train")
    if work.derivative == "generate":
        if work.architecture != "decoder":
            raise Unavailable("derivative='generate' is for one decoder")
        return Foreign(_torch_generation(work, model))
    inputs = lib.tensor(work.inputs()[-1], device=device)
    inputs = inputs if of_images else inputs.long()
    targets = lib.tensor(work.targets(), dtype=lib.long, device=device)
    optimizer = lib.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-4, fused=True)

    narrow = {"dtype": getattr(lib, work.dtype), "enabled": work.dtype != "float32"}

    def run():
        if work.derivative == "none":
            with lib.no_grad(), lib.autocast(device, **narrow):
                result = model(inputs)
        else:
            optimizer.zero_grad()
            with lib.autocast(device, **narrow):
                logits = model(inputs).float()
            result = nn.functional.cross_entropy(logits.flatten(0, -2), targets.flatten())
            result.backward()
            optimizer.step()
        if device == "cuda":
            lib.cuda.synchronize()
        return result.detach()

    return Foreign(run)
