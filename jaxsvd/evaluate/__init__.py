"""How good a model is: perplexity, and an adapter to lm-evaluation-harness (`jaxsvd.evaluate.harness`)."""

from jaxsvd.evaluate.scoring import Comparison, Result, Row, compare, measure, perplexity

__all__ = ["Comparison", "Result", "Row", "compare", "measure", "perplexity"]
