"""The page of every mechanism has them all, and says of each what is so."""

import pytest

from attention import parsing
from docs import mechanisms

PARTS = {
    kind: {parsing.unparse(part).split("(")[0]: part for part in mechanisms.parts(module, base)}
    for kind, _, module, base in mechanisms._SECTIONS
}


@pytest.mark.parametrize("kind", PARTS)
def test_the_page_has_every_part_that_a_config_can_name(kind):
    with pytest.raises(ValueError, match="known are") as error:
        parsing.parse(kind, "no_such_part")
    names = str(error.value).split("known are ")[1].split(", ")
    combined = {"and", "or", "not", "sum"}  # by &, |, ~ and +
    assert set(PARTS[kind]) >= set(names) - combined - {"none"}


@pytest.mark.parametrize(
    ("kind", "name", "ends"),
    [
        ("score", "elu_features", "|  | linear, pallas_tpu, cudnn, splash |  |"),
        ("score", "gaussian", "| 1 | linear, pallas_tpu, splash |  |"),
        ("position", "cope", "|  | whole rows |"),
        ("position", "learned", "| 4,096 · M once | linear, pallas_tpu, cudnn, splash |  |"),
        ("mask", "sliding_window", "| pallas_tpu, cudnn, splash | caches 257 tokens |"),
        ("mask", "segments", "| linear, pallas_tpu, splash |  |"),
        ("normalizer", "token_entmax", "| 1 · M a query head |  | dense only |"),
        ("normalizer", "softmax", "|  | pallas_tpu, cudnn, splash |  |"),
    ],
)
def test_what_a_row_says(kind, name, ends):
    row = mechanisms.row(kind, PARTS[kind][name]).strip().replace(" mosaic_gpu,", "")
    assert row.startswith(f"| `{name}")
    assert row.endswith(ends)
