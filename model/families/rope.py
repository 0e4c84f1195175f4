"""Reads rotary position settings from a Hugging Face config, in the old form and in that of transformers 5.

    old             "rope_theta": 10000.0, "rope_scaling": {"rope_type" or "type": ..., "factor": ...} or null
    transformers 5  "rope_parameters": {"rope_theta": 10000.0, "rope_type": ..., "factor": ...}

Standard library only. It does not know how the angles are computed: that is model/rotary.py.
"""

from __future__ import annotations

from model.config import Rope
from model.families.fields import Fields

DEFAULT_THETA = 10_000.0


def read_rope(fields: Fields, context_length: int) -> Rope:
    """Reads the settings. Raises ValueError for a kind of scaling that is not supported."""
    scaling = fields.nested("rope_parameters") or fields.nested("rope_scaling") or Fields({}, fields.where)
    theta_source = scaling if "rope_theta" in scaling else fields
    theta = theta_source.number("rope_theta", DEFAULT_THETA, minimum=1.0)
    for place in (fields, scaling):
        place.require("partial_rotary_factor", 1, 1.0)
    kind_key = "rope_type" if "rope_type" in scaling else "type"
    scaling.require(kind_key, "default", "linear", "llama3")
    kind = scaling.get(kind_key) or "default"
    if kind == "linear":
        return Rope(theta, "linear", factor=scaling.number("factor", minimum=1.0))
    if kind == "llama3":
        return _read_llama3(scaling, theta, context_length)
    return Rope(theta)


def _read_llama3(scaling: Fields, theta: float, context_length: int) -> Rope:
    rope = Rope(
        theta,
        "llama3",
        factor=scaling.number("factor", minimum=1.0),
        low_freq_factor=scaling.number("low_freq_factor"),
        high_freq_factor=scaling.number("high_freq_factor"),
        original_context_length=scaling.count("original_max_position_embeddings", context_length),
    )
    if not 0 < rope.low_freq_factor < rope.high_freq_factor:
        raise scaling.fail("high_freq_factor", "a number above low_freq_factor, and both above 0")
    return rope
