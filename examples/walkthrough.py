"""Attention step by step, each step checked against `attention.attend`.

python examples/walkthrough.py

1. Self-attention by hand: "I love learning" (Vaswani et al. 2017, sec. 3.2.1).
2. A fuzzy dictionary: from the exact lookup of a Python dict to a blend of all values.
3. Queries and keys of different widths: what projections to a common one can express, by SVD.
"""

import jax
import numpy as np

import attention
from attention import Mechanism, normalizers, scores

WORDS = ("I", "love", "learning")
PRICES = {"apple": 2.0, "bread": 3.0, "cheese": 7.0, "dates": 5.0}


def attend(mechanism, query, key, value):
    """One head: [T, D], [S, D], [S, V] -> output [T, V], weights [T, S]."""
    params = mechanism.init(
        jax.random.key(0), num_heads=1, head_dim=key.shape[1], value_dim=value.shape[1]
    )
    query, key, value = (np.float32(x)[:, None] for x in (query, key, value))
    out, aux = attention.attend(mechanism, params, query, key, value, aux=("weights",))
    return np.asarray(out[:, 0]), np.asarray(aux["weights"][0])


def softmax(x):
    """Every row divided by its sum, after exp."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def self_attention(model_dim=512, head_dim=64):
    """Every step of one head over WORDS, by name."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(len(WORDS), model_dim))
    w_q, w_k, w_v = rng.normal(size=(3, model_dim, head_dim)) * model_dim**-0.5
    query, key, value = x @ w_q, x @ w_k, x @ w_v
    products = query @ key.T
    scaled = products / np.sqrt(head_dim)
    weights = softmax(scaled)
    return {
        "X": x,
        "Q = X W_Q": query,
        "K = X W_K": key,
        "V = X W_V": value,
        "Q Kᵀ": products,
        f"Q Kᵀ / √{head_dim}": scaled,
        "weights = softmax of each row": weights,
        "output = weights V": weights @ value,
    }


def look_up(word, mechanism):
    """The price of a word: its vector is the query, all words are keys, prices are values."""
    keys = np.eye(len(PRICES))
    query = keys[[list(PRICES).index(word)]]
    out, weights = attend(mechanism, query, keys, np.array([list(PRICES.values())]).T)
    return float(out[0, 0]), weights[0]


def at_temperature(temperature):
    """The lookup between the two: exact as it nears 0, the mean of all values far from it."""
    return Mechanism(scores.Scale(scores.Dot(), factor=1 / temperature))


def texts(num=6, topics=3, widths=(12, 20), noise=0.02):
    """The same texts as vectors of n and of n' numbers, of which `topics` matter: X, Y."""
    rng = np.random.default_rng(1)
    about = np.repeat(np.eye(topics), num // topics, axis=0)
    about += 0.4 * rng.normal(size=about.shape)
    about /= np.linalg.norm(about, axis=1, keepdims=True)
    languages = [np.linalg.qr(rng.normal(size=(n, topics)))[0].T for n in widths]
    return [about @ words + noise * rng.normal(size=(num, words.shape[1])) for words in languages]


def best_projections(form, width):
    """W_Q [n, m], W_K [n', m] whose W_Q W_Kᵀ is closest to the form [n, n'].  Eckart & Young 1936.

    The m largest singular values and their vectors; what is left out, √Σ_{i>m} σ_i², is the error,
    and no two matrices of that width have a smaller one.
    """
    u, sigma, vt = np.linalg.svd(form, full_matrices=False)
    root = np.sqrt(sigma[:width])
    return u[:, :width] * root, vt[:width].T * root


def main():
    print("1. Self-attention by hand:", *WORDS)
    steps = self_attention()
    for name, x in steps.items():
        print(f"\n{name}  {x.shape}\n{x}")
    query, key, value = (steps[f"{name} = X W_{name}"] for name in "QKV")
    out, weights = attend(Mechanism(), query, key, value)
    error = np.abs(out - steps["output = weights V"]).max()
    print(f"\nattention.attend differs by {error:.1e}, its weights by "
          f"{np.abs(weights - steps['weights = softmax of each row']).max():.1e}")  # fmt: skip

    print("\n2. A fuzzy dictionary:", PRICES)
    hard = Mechanism(scores.Dot(), normalizer=normalizers.Hardmax())
    print("PRICES['cheese'] =", PRICES["cheese"], " hardmax:", look_up("cheese", hard)[0])
    for temperature in (0.05, 0.3, 1, 10, 1000):
        price, weights = look_up("cheese", at_temperature(temperature))
        print(f"softmax at temperature {temperature:<5} {price:.3f}  weights {weights}")
    print("the mean of all prices", np.mean(list(PRICES.values())))

    print("\n3. Texts of width n = 12 and n' = 20, compared by one bilinear form x A yᵀ")
    x, y = texts()
    form = x.T @ y
    sigma = np.linalg.svd(form, compute_uv=False)
    print("singular values of A = Xᵀ Y:", sigma)
    for width in (1, 2, 3, 6):
        w_q, w_k = best_projections(form, width)
        error = np.linalg.norm(form - w_q @ w_k.T)
        _, weights = attend(hard, x @ w_q, y @ w_k, np.eye(len(y)))
        share = np.mean(np.argmax(weights, axis=1) == np.argmax(x @ form @ y.T, axis=1))
        left = np.sqrt(np.sum(sigma[width:] ** 2))
        print(f"m = {width}: |A − W_Q W_Kᵀ| = {error:.4f} = √Σ σ² of the rest {left:.4f}; "
              f"chooses as A does for {share:.0%} of the texts")  # fmt: skip


if __name__ == "__main__":
    with np.printoptions(precision=2, suppress=True, threshold=15, edgeitems=3, linewidth=100):
        main()
