"""Every number that a run logs: its name, its unit, its meaning.

The trackers take their tags from here, and so do `metrics.jsonl`, the report and the README.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """A number that is logged again and again.

    `tag` is what TensorBoard and `metrics.jsonl` call it; `{subset}` in it stands for the part of
    the text, one of `subsets`, that it was measured on.
    """

    name: str
    unit: str
    meaning: str
    subsets: tuple[str, ...]
    tag: str


METRICS = (
    Metric(
        "loss",
        "nats per token",
        "Mean cross-entropy of the step's batch, before the weights change. Every step.",
        ("train",),
        "loss/{subset}",
    ),
    Metric(
        "learning_rate",
        "",
        "AdamW's rate, by the schedule; Muon's is twice it.",
        ("train",),
        "learning_rate",
    ),
    Metric(
        "grad_norm", "", "Length of the whole gradient before clipping.", ("train",), "grad_norm"
    ),
    Metric(
        "tokens_per_second",
        "tokens/s",
        "Mean speed since the last printed line; evaluations and saves do not count.",
        ("train",),
        "tokens_per_second",
    ),
    Metric(
        "eval_loss",
        "nats per token",
        "Mean cross-entropy over the fixed batches of an evaluation, without dropout.",
        ("train", "val"),
        "eval/{subset}_loss",
    ),
    Metric(
        "bits_per_byte",
        "bits",
        "eval_loss for each byte of the text: comparable between tokenizers.",
        ("train", "val"),
        "eval/{subset}_bits_per_byte",
    ),
    Metric(
        "nonfinite",
        "values",
        "Weights and gradients that were NaN or infinite when a histogram was made; only if any.",
        ("train",),
        "nonfinite",
    ),
)
_BY_NAME = {metric.name: metric for metric in METRICS}


def get_metric(name: str) -> Metric:
    """The declaration of a metric. Raises KeyError for an undeclared one."""
    return _BY_NAME[name]


def get_tag(name: str, subset: str) -> str:
    """What TensorBoard and `metrics.jsonl` call a metric. Raises KeyError for an undeclared one."""
    declared = get_metric(name)
    assert subset in declared.subsets, f"{name} has no subset {subset}"
    return declared.tag.format(subset=subset)
