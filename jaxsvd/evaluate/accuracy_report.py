"""What a check of accuracy says: a table for people, JSON for programs."""

from typing import Any

from jaxsvd.evaluate.accuracy import Outcome
from jaxsvd.evaluate.matching import Failure, Matching, TokenMatch
from jaxsvd.evaluate.report import json_value
from jaxsvd.tokenizer import Tokenizer, has_tokenizer

_SHOWN = 3  # of each list of findings; JSON has them all


def table(outcome: Outcome) -> str:
    """What was compared, a line per tolerance, what fails first and where, and the verdict."""
    reference = outcome.reference
    lines = [
        f"model      {outcome.folder} ({outcome.subject})",
        f"reference  {outcome.against or 'the same checkpoint'} ({reference.source})",
        f"prompts    {len(reference.prompts)}, {reference.logits.shape[1]} new tokens each, greedy",
    ]
    if outcome.against:
        lines.append("measures   what compression changes as well: the reference is another model")
    lines += ["", *(_matched(outcome) if outcome.matching else _compared(outcome))]
    return "\n".join([*lines, "PASSED" if outcome.passed else f"FAILED: {verdict(outcome)}"])


def verdict(outcome: Outcome) -> str:
    """What fails first and where, in a sentence."""
    if outcome.matching is None:
        return _first_difference(outcome)
    blamed = [
        f"{suspect.path} alone deviates from its weights by {suspect.error:.3g} "
        f"(bound {outcome.projection_tolerance:g})"
        for suspect in outcome.suspects
    ]
    more = [f"{len(blamed) - _SHOWN} more projections"] if len(blamed) > _SHOWN else []
    failure = next(outcome.matching.failures(), None)
    return "; ".join([*([_said(outcome, failure)] if failure else []), *blamed[:_SHOWN], *more])


def _said(outcome: Outcome, failure: Failure) -> str:
    assert outcome.matching
    say, match = _words(outcome), outcome.matching.tokens[failure.prompt][failure.position]
    place = f"prompt {failure.prompt}, new token {failure.position}"
    if failure.rule == "divergence":
        return (
            f"{place}: {say(match.actual)} is the likeliest, expected {say(match.expected)}, "
            f"by {failure.error:.3g} (near-ties are closer than {failure.bound:g})"
        )
    return (
        f"{place}: of the greatest logits (k {failure.rule}), that of {say(failure.token)} has an error of "
        f"{failure.error:.3g} (bound {failure.bound:g})"
    )


def _first_difference(outcome: Outcome) -> str:
    say, differences = _words(outcome), outcome.differences or []
    first = min(differences, key=lambda difference: (difference.position, difference.prompt))
    return (
        f"prompt {first.prompt}, new token {first.position}: {say(first.actual)}, expected {say(first.expected)} "
        f"({len(differences)} of {len(outcome.reference.prompts)} texts differ)"
    )


def as_json(outcome: Outcome) -> dict[str, Any]:
    """Everything that was found, token by token."""
    reference, matching = outcome.reference, outcome.matching
    found: dict[str, Any] = {
        "mode": outcome.mode,
        "passed": outcome.passed,
        "model": str(outcome.folder),
        "subject": outcome.subject,
        "reference": reference.source,
        "against": outcome.against,
        "measures": "compression" if outcome.against else "implementation",
        "num_tokens": reference.logits.shape[1],
        "prompts": [
            {"prompt": text, "token_ids": ids, "expected_token_ids": tokens}
            for text, ids, tokens in zip(reference.texts, reference.prompts, reference.tokens.tolist(), strict=True)
        ],
    }
    if matching:
        failures = [failure._asdict() | {"error": json_value(failure.error)} for failure in matching.failures()]
        rows = [{name: json_value(value) for name, value in row.items()} for row in _rows(matching)]
        found |= {"tolerances": rows, "restarts": list(matching.restarts), "failures": failures}
        found["projection_tolerance"] = json_value(outcome.projection_tolerance)
        found["projections"] = [each._asdict() | {"error": json_value(each.error)} for each in outcome.deviations]
        found["suspects"] = [suspect.path for suspect in outcome.suspects]
        found["tokens"] = [[_token(match, matching) for match in row] for row in matching.tokens]
    else:
        found["differences"] = [difference._asdict() for difference in outcome.differences or []]
    return found


def _token(match: TokenMatch, matching: Matching) -> dict[str, Any]:
    names = [tolerance.name for tolerance in matching.tolerances]
    errors = dict(zip(names, map(json_value, match.errors), strict=True))
    numbers = {"gap": json_value(match.gap), "shift": json_value(match.shift), "errors": errors}
    return {"expected": match.expected, "actual": match.actual} | numbers


def _rows(matching: Matching) -> list[dict[str, Any]]:
    """A row per tolerance, and one for divergence: the greatest error and where it is, the mean over tokens."""
    places = [(prompt, position) for prompt, row in enumerate(matching.tokens) for position in range(len(row))]
    matches = [match for row in matching.tokens for match in row]
    columns = [
        (tolerance.name, tolerance.atol, tolerance.rtol, [match.errors[i] for match in matches])
        for i, tolerance in enumerate(matching.tolerances)
    ]
    rows = []
    for name, atol, bound, errors in [*columns, ("divergence", None, matching.divergence, [m.gap for m in matches])]:
        worst = max(errors)
        prompt, position = places[errors.index(worst)]
        diverged = any(match.expected != match.actual for match in matches)
        passed = worst <= bound if atol is not None else not diverged or worst < bound
        mean = sum(errors) / len(errors)
        row = {"k": name, "max_error": worst, "mean_error": mean, "atol": atol, "bound": bound, "passed": passed}
        rows.append(row | {"prompt": prompt, "position": position})
    return rows


def _matched(outcome: Outcome) -> list[str]:
    matching = outcome.matching
    assert matching
    lines = [["", "max error", "mean error", "bound", "largest at", ""]]
    for row in _rows(matching):
        place = f"prompt {row['prompt']}, token {row['position']}" if row["max_error"] else ""
        name = row["k"] if row["k"] == "divergence" else f"k {row['k']}"
        lines.append([name, *_numbers(row["max_error"], row["mean_error"], row["bound"]), place, _word(row["passed"])])
    errors = [deviation.error for deviation in outcome.deviations]
    numbers = _numbers(errors[0], sum(errors) / len(errors), outcome.projection_tolerance)
    lines.append(["projection", *numbers, outcome.deviations[0].path, _word(not outcome.suspects)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    said = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
    if matching.restarts:
        places = ", ".join(map(str, matching.restarts[:_SHOWN])) + (" …" if len(matching.restarts) > _SHOWN else "")
        said += ["", f"the likeliest token was another one; back to the expected text from token {places}"]
    return [*said, ""]


def _numbers(greatest: float, mean: float, bound: float) -> list[str]:
    return [f"{greatest:.3g}", f"{mean:.3g}", f"{bound:g}"]


def _word(passed: bool) -> str:
    return "pass" if passed else "FAIL"


def _compared(outcome: Outcome) -> list[str]:
    differing = len(outcome.differences or [])
    return [f"the same text: {len(outcome.reference.prompts) - differing} of {len(outcome.reference.prompts)}", ""]


def _words(outcome: Outcome) -> Any:
    """How a token is called: by its id, and by its text where there is a tokenizer."""
    tokenizer = Tokenizer(outcome.folder) if has_tokenizer(outcome.folder) else None
    return lambda token: f"{token} ({tokenizer.decode([token])!r})" if tokenizer else str(token)
