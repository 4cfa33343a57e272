"""Options and values of earlier versions, with the sentence that answers whoever gives them."""

from __future__ import annotations

_TUNE_AGAIN = "a budget that names it has to be tuned again"
REMOVED = {
    "first_order": f'compensation "first_order" was replaced by "gaussian": {_TUNE_AGAIN}',
    "second_order": f'compensation "second_order" was replaced by "gaussian": {_TUNE_AGAIN}',
    "cost_exponent": f"cost_exponent was removed, it is always 1 now: {_TUNE_AGAIN}",
    "max_error": "max_error needs a tuned budget: "
    "let `svg-ear tune --max-error` make one and give it as the option budget",
}
"""Name of a removed option, or a removed value of an option, to its sentence."""
