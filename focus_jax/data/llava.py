"""LLaVA's conversations: `{id, image?, conversations: [{from, value}]}`, one at a time.

Whatever a file holds comes out as a `Dialogue` or as a `BadRow` that says where and why.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from focus_jax.data.dialogue import Dialogue, Exchange
from focus_jax.data.image_store import shown
from focus_jax.data.row_files import MAX_ROW, JsonRows, Place, Row, RowSource

MARKER = "<image>"
_USER, _MODEL = "a user", "the model"
_ROLES = {"human": _USER, "user": _USER, "gpt": _MODEL, "assistant": _MODEL}


@dataclass(frozen=True)
class BadRow:
    """A row that is left out. `kind` is for counting: "json", "shape", "turns", "markers", ..."""

    place: Place
    id: str
    kind: str
    reason: str

    @property
    def where(self) -> str:
        """File, line and number of the row."""
        return str(self.place)

    def to_json(self) -> str:
        """One line; pure ASCII, for a row may hold what no encoding has."""
        file, line, row = self.place
        fields = {"file": file, "line": line, "row": row, "id": self.id[:200]}
        return json.dumps({**fields, "kind": self.kind, "reason": self.reason[:500]})


class _Unfit(Exception):
    """What is wrong with a row, and its kind."""

    def __init__(self, kind: str, reason: str):
        super().__init__(reason)
        self.kind = kind


def read_rows(path: str | Path) -> Iterator[Dialogue | BadRow]:
    """Every row of a JSON list or of JSON lines, in order.

    Raises FileNotFoundError, and ValueError where the list itself is cut off.
    """
    return parse_rows(JsonRows(path))


def parse_rows(rows: RowSource) -> Iterator[Dialogue | BadRow]:
    """Every row of a source, in order."""
    return (parse_row(rows[index]) for index in range(len(rows)))


def parse_row(row: Row) -> Dialogue | BadRow:
    """A row of LLaVA's JSON as turns of user and model.

    As LLaVA's own reader does: an only "<image>" of a turn moves to its front, a model's turn
    before the first user's is dropped. Several markers in a turn stay where they are, but for a
    row's only image they are one; a row with one image and no marker gets one in front; in a row
    without images a marker is text. A last question without answer is dropped. A row without id has
    its place for one. Images that a shard or a parquet file holds beside a row are its images.
    """
    name = row.key
    try:
        value = _load(row.raw)
        name = _id(value, row)
        images = row.beside or _images(value)
        turns = _with_markers(_turns(value.get("conversations")), images)
        _check_encodable(name, *images, *(text for turn in turns for text in turn))
    except _Unfit as error:
        return BadRow(row.place, _encodable(name), error.kind, _encodable(str(error)))
    return Dialogue(name, tuple(images), turns, str(row.place))


def _load(raw: bytes) -> dict[str, Any]:
    if len(raw) > MAX_ROW:
        raise _Unfit("json", f"the row has more than {MAX_ROW} bytes")
    try:
        value = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _Unfit("encoding", f"not UTF-8 at its byte {error.start + 1}") from error
    except RecursionError as error:
        raise _Unfit("json", "nested too deeply") from error
    except ValueError as error:
        raise _Unfit("json", f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise _Unfit("shape", f"the row is {_kind(value)}: an object is needed")
    return value


def _id(value: dict[str, Any], row: Row) -> str:
    found = value.get("id")
    if found is None:
        return row.key or str(row.place.row)
    if isinstance(found, str):
        return found
    if isinstance(found, int) and not isinstance(found, bool):
        return str(found)
    raise _Unfit("shape", f"`id` is {_kind(found)}: a string or a whole number is needed")


def _images(value: dict[str, Any]) -> tuple[str, ...]:
    found = value.get("image")
    if found is None or found == "":
        return ()
    names = found if isinstance(found, list) else [found]
    for name in names:
        if not isinstance(name, str):
            raise _Unfit("shape", f"`image` holds {_kind(name)}: file names are needed")
    return tuple(names)


def _turns(conversations: Any) -> tuple[Exchange, ...]:
    if not isinstance(conversations, list):
        raise _Unfit("shape", f"`conversations` is {_kind(conversations)}: a list is needed")
    said = [_turn(number, turn) for number, turn in enumerate(conversations, 1)]
    if said and said[0][0] is _MODEL:
        del said[0]
    if len(said) % 2:
        del said[-1]
    if not said:
        raise _Unfit("turns", "`conversations` holds no question with an answer")
    for number, (role, _) in enumerate(said):
        if role is not (_MODEL if number % 2 else _USER):
            raise _Unfit("turns", f"{role} speaks twice in a row: turns are to alternate")
    texts = [text for _, text in said]
    return tuple(zip(texts[::2], texts[1::2], strict=True))


def _turn(number: int, turn: Any) -> tuple[str, str]:
    if not isinstance(turn, dict):
        raise _Unfit("shape", f"turn {number} is {_kind(turn)}: an object is needed")
    role, text = turn.get("from"), turn.get("value")
    if not isinstance(role, str) or role not in _ROLES:
        known = ", ".join(_ROLES)
        given = shown(role) if isinstance(role, str) else _kind(role)
        raise _Unfit("turns", f"`from` of turn {number} is {given}: one of {known} is needed")
    if not isinstance(text, str):
        raise _Unfit("shape", f"`value` of turn {number} is {_kind(text)}: a string is needed")
    return _ROLES[role], text


def _with_markers(turns: tuple[Exchange, ...], images: tuple[str, ...]) -> tuple[Exchange, ...]:
    """The turns with a marker for every image."""
    if not images:
        return turns
    holders = [number for number, (user, _) in enumerate(turns) if MARKER in user]
    if len(images) == 1 and len(holders) < 2:
        at = holders[0] if holders else 0
        user, answer = turns[at]
        return (*turns[:at], (_in_front(user), answer), *turns[at + 1 :])
    count = sum(user.count(MARKER) for user, _ in turns)
    if count != len(images):
        in_answers = sum(answer.count(MARKER) for _, answer in turns)
        hint = f" ({in_answers} more in answers, where none may be)" if in_answers else ""
        raise _Unfit("markers", f"{len(images)} images for {count} times {MARKER}{hint}")
    return tuple((_marker_first(user), answer) for user, answer in turns)


def _marker_first(text: str) -> str:
    return _in_front(text) if text.count(MARKER) == 1 else text


def _in_front(text: str) -> str:
    return f"{MARKER}\n{text.replace(MARKER, '').strip()}".strip()


def _check_encodable(*texts: str) -> None:
    for text in texts:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            sign = f"U+{ord(text[error.start]):04X}"
            raise _Unfit("encoding", f"half of a surrogate pair ({sign}) in a text") from error


def _encodable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false"}
    return "missing" if value is None else names.get(type(value), "a number")
