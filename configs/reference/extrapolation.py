"""Which positions hold beyond the length they were trained on?

Press et al. 2022 ("Train short, test long"): ALiBi does, sinusoidal and learned ones break soon,
rotary ones degrade. Kazemnejad et al. 2023: on algorithmic tasks none at all goes furthest, then
T5's, ALiBi, and rotary ones last.

    python -m experiments.ablate --config=configs/reference/extrapolation.py --workers=2 \\
        --workdir=runs/extrapolation --config.task.path=input.txt

Scaled down to nanoGPT's CPU recipe, trained at 64 characters of tiny Shakespeare and tested at 64
to 512 (`input.txt` of github.com/karpathy/char-rnn), and to multi-query recall trained at a length
of 32 and tested up to 256. `learned` has a row for every position, most of them never trained.
"""

from experiments.config import settings
from experiments.config.claims import equal, less

LENGTHS = (128, 256, 512)
POSITIONS = ("rope", "alibi", "none", "sinusoidal(scale=0.02)")


def get_config():
    config = settings.config("text", level="char", context=64, eval_lengths=LENGTHS)
    config.model.update(position="learned", num_layers=4, model_dim=128, num_heads=4)
    config.optimizer.update(learning_rate=1e-3, final_learning_rate=1e-4, warmup_steps=100)
    config.train.update(steps=2000, batch_size=12, seeds=4, eval_every=500)
    return config


def bases():
    recall = {
        "task": {
            "name": "recall",
            "vocab_size": 32,
            "num_pairs": 4,
            "length": 32,
            "test_lengths": (64, 128, 256),
        },
        "model.num_layers": 2,
        "model.model_dim": 64,
        "model.num_heads": 1,
        "model.tie_embeddings": False,
        "model.init_stddev": 0.125,
        "optimizer.learning_rate": 3e-3,
        "optimizer.final_learning_rate": 3e-3,
        "optimizer.warmup_steps": 30,
        "train.batch_size": 64,
        "train.steps": 600,
        "train.eval_every": 100,
    }
    return {"text": {}, "recall": recall}


def sweep_position():
    for position in POSITIONS:
        yield {"model.position": position}
    yield {"base": "recall", "model.position": "t5(bidirectional=False)"}


def claims():
    learned, rope, alibi, none = "text", *(f"text.position={x}" for x in POSITIONS[:3])
    sinusoidal = "text.position=sinusoidal_scale=0.02_"
    order = {"rope": rope, "alibi": alibi, "learned": learned, "none": none}
    names = list(order)
    for better, worse in zip(names, names[1:], strict=False):
        says = f"at the trained length {better} is better than {worse} (independent runs)"
        yield less(order[better], order[worse], says=says)
    for length in LENGTHS:
        yield less(
            f"{alibi}@length_{length}/loss",
            f"{alibi}@test/loss",
            by=-0.03,
            says=f"alibi at {length} is no worse than at 64 (Press et al. 2022)",
        )
    lost = {}
    for name, cell in {"sinusoidal": sinusoidal, **order}.items():
        lost[name] = f"{cell}@length_512/loss", f"{cell}@test/loss"
        if name != "alibi":
            source = "independent runs" if name == "none" else "Press et al. 2022"
            says = f"{name} at 512 is worse than at 64 by more than 0.35 ({source})"
            yield less(*reversed(lost[name]), by=0.35, says=says)
    says = "from 64 to 512 {} loses less than {} ({})"
    for less_lost, more_lost, source in (
        ("rope", "sinusoidal", "Press et al. 2022"),
        ("none", "learned", "Kazemnejad et al. 2023"),
        ("none", "sinusoidal", "Kazemnejad et al. 2023"),
    ):
        text = says.format(less_lost, more_lost, source)
        yield less(lost[less_lost], lost[more_lost], says=text)
    at = "length_256/accuracy"
    none, rope, alibi, t5 = (
        f"recall.position={x}" for x in ("none", "rope", "alibi", "t5_bidirectional=False_")
    )
    for worse, better in ((t5, none), (alibi, t5), (rope, alibi)):
        first, second = (cell.partition("=")[2].partition("_")[0] for cell in (better, worse))
        says = f"recall at 256, trained at 32: {first} is better than {second}"
        yield less(worse, better, at=at, says=f"{says} (Kazemnejad et al. 2023)")
    yield equal(
        f"{none}@{at}",
        f"{none}@validation/accuracy",
        within=0.1,
        says="recall without positions holds at 256 what it has at 32",
    )
