"""The numbers that a run logs: their names, units and meanings.

The trackers, `metrics.jsonl`, the report and the README take their tags from here.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """A number that is logged repeatedly.

    `tag` is its name in `metrics.jsonl`, with `{subset}` for one of `subsets`. `chart` is its name
    in TensorBoard, which sorts charts by name: the losses come first.
    """

    unit: str
    meaning: str
    tag: str
    subsets: tuple[str, ...] = ("train",)
    chart: str = "{tag}"


METRICS = {
    "loss": Metric(
        "nats per token",
        "Mean cross-entropy of the step's batch, before the weights change. Every step.",
        "loss/{subset}",
    ),
    "learning_rate": Metric(
        "",
        "AdamW's rate, by the schedule; Muon's is twice it.",
        "learning_rate",
        chart="optimizer/{tag}",
    ),
    "grad_norm": Metric("", "Gradient norm before clipping.", "grad_norm", chart="optimizer/{tag}"),
    "tokens_per_second": Metric(
        "tokens/s",
        "Mean speed since the last printed line; evaluations and saves do not count.",
        "tokens_per_second",
    ),
    "eval_loss": Metric(
        "nats per token",
        "Mean cross-entropy over the fixed batches of an evaluation, without dropout.",
        "eval/{subset}_loss",
        ("train", "val"),
    ),
    "bits_per_byte": Metric(
        "bits",
        "eval_loss for each byte of the text: comparable between tokenizers.",
        "eval/{subset}_bits_per_byte",
        ("train", "val"),
        chart="eval/{subset}_loss_bits_per_byte",
    ),
    "nonfinite": Metric(
        "values",
        "Weights and gradients that were NaN or infinite when a histogram was made; only if any.",
        "nonfinite",
    ),
}


def get_tag(name: str, subset: str) -> str:
    """Return the tag of a metric. Raises KeyError for an undeclared one."""
    return METRICS[name].tag.format(subset=subset)


def get_chart(name: str, subset: str) -> str:
    """Return the name of a metric's chart in TensorBoard. Raises KeyError for an undeclared one."""
    return METRICS[name].chart.format(tag=get_tag(name, subset), subset=subset)
