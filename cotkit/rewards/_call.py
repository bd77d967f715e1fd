"""What rewards share that are made of other callables: calls, groups of a prompt, lengths in tokens."""

import json
from collections.abc import Callable, Sequence
from math import isinf, isnan
from typing import Any

from cotkit.rewards._text import text_of

RIGHT = 0.5  # a reward of at least this says "right"

Reward = Callable[..., list[float | None]]


def functions(fn: str, **callables: Any) -> None:
    """Raise TypeError unless every keyword can be called."""
    for name, value in callables.items():
        if not callable(value):
            raise TypeError(f"{fn}: expected {name} as a function, got {type(value).__name__}.")


def scores(
    fn: str, reward: Reward, prompts: Any, completions: Sequence[Any], columns: dict[str, Any]
) -> list[float | None]:
    """What another reward gives, checked: one number or None (NaN, as TRL writes it) for each completion."""
    given = list(reward(prompts=prompts, completions=completions, **columns))
    if len(given) != len(completions):
        raise ValueError(
            f"{fn}: expected {len(completions)} rewards, got {len(given)} from {name_of(reward)}. "
            f"Return one per completion."
        )
    return [None if s is None else _finite(fn, float(s), reward) for s in given]


def _finite(fn: str, score: float, reward: Any) -> float | None:
    if isinf(score):
        raise ValueError(f"{fn}: expected finite rewards or None, got {score} from {name_of(reward)}.")
    return None if isnan(score) else score


def name_of(reward: Any) -> str:
    """The name TRL would log."""
    inner = getattr(reward, "func", reward)
    return getattr(inner, "__name__", type(inner).__name__)


def verdicts(
    fn: str, correct: Reward, prompts: Any, completions: Sequence[Any], columns: dict[str, Any]
) -> list[bool | None]:
    """Which completions are right; None where that cannot be said."""
    given = scores(fn, correct, prompts, completions, columns)
    return [None if s is None else s >= RIGHT for s in given]


def lengths(
    fn: str, completions: Sequence[Any], columns: dict[str, Any], length: Callable[[str], int] | None
) -> list[int]:
    """Lengths in tokens: of ``completion_ids``, else by ``length``; never of characters in silence."""
    ids = columns.get("completion_ids")
    if ids is not None:
        if len(ids) != len(completions):
            raise ValueError(f"{fn}: expected {len(completions)} completion_ids, got {len(ids)}.")
        return [len(i) for i in ids]
    if length is None:
        raise ValueError(
            f"{fn}: expected completion_ids or length=, got neither. TRL hands over completion_ids; "
            f'elsewhere pass length=lambda text: len(tokenizer(text)["input_ids"]).'
        )
    return [int(length(text_of(c))) for c in completions]


def groups(fn: str, prompts: Any, n: int, size: int | None) -> list[list[int]]:
    """Places of the completions of each prompt; ValueError when a group is not whole."""
    asked = list(prompts) if prompts is not None else []
    if len(asked) != n:
        raise ValueError(f"{fn}: expected {n} prompts, got {len(asked)}. Pass one per completion.")
    places: dict[str, list[int]] = {}
    for i, prompt in enumerate(asked):
        places.setdefault(_key(prompt), []).append(i)
    counts = {len(p) for p in places.values()}
    if size is None:
        if len(counts) > 1:
            raise ValueError(
                f"{fn}: expected every prompt equally often, got {min(counts)} to {max(counts)} times. "
                f"{_SPLIT}; if a question stands in the data twice, pass group_size=."
            )
        return list(places.values())
    wrong = next((c for c in counts if c % size), None)
    if wrong is not None:
        raise ValueError(f"{fn}: expected each prompt {size} times, got {wrong}. {_SPLIT}.")
    # a question that stands in the data twice: its groups follow one another
    return [p[i : i + size] for p in places.values() for i in range(0, len(p), size)]


_SPLIT = "A group must reach the reward whole: make per_device_train_batch_size a multiple of num_generations"


def _key(prompt: Any) -> str:
    return json.dumps(prompt, sort_keys=True, default=lambda x: type(x).__name__)


def prompt_text(prompt: Any) -> str:
    """Text of a prompt: itself, or what its messages say, one after the other."""
    if isinstance(prompt, list | tuple):
        return "\n".join(text_of(m) for m in prompt if isinstance(m, dict))
    return text_of(prompt)


def part_of(columns: dict[str, Any], places: Sequence[int], n: int) -> dict[str, Any]:
    """The columns of some completions; what is no list of ``n`` values (TRL's ``trainer_state``) stays."""
    return {
        name: [value[i] for i in places] if isinstance(value, list | tuple) and len(value) == n else value
        for name, value in columns.items()
    }
