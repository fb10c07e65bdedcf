"""How good a model is: perplexity, and an adapter to lm-evaluation-harness (`jaxsvd.evaluate.harness`)."""

from jaxsvd.evaluate.perplexity import Comparison, Result, compare, perplexity

__all__ = ["Comparison", "Result", "compare", "perplexity"]
