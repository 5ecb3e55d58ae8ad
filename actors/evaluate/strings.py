"""Fixed strings of the DecodingTrust protocol (CC BY-SA 4.0, see ``actors/data/decodingtrust.json``); no evaluation items."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

from ..errors import BadInput
from .protocol import Message

STRINGS: dict[str, Any] = json.loads((files("comptrust.actors.data") / "decodingtrust.json").read_text(encoding="utf-8"))


def classification(task_message: str, text: str, examples: Any = ()) -> list[Message]:
    """The chat of a labelling task; ``examples`` are (input, label) pairs, shown as turns."""
    layout = STRINGS["classification"]
    if not examples:
        return [Message("system", layout["zero_shot_system"]), Message("user", f"{task_message}\n{text}")]
    chat = [
        Message("system", layout["few_shot_system"]),
        Message("user", task_message),
        Message("assistant", layout["few_shot_ack"]),
    ]
    for question, label in examples:
        chat += [Message("user", question), Message("assistant", label[:1].upper() + label[1:])]
    return [*chat, Message("user", text)]


class Demos:
    """Example lists of a pack by ``demos_id`` ((input, label) pairs, shared by many records)."""

    def __init__(self, pack: Any) -> None:
        self._lists = {r["demos_id"]: r["examples"] for r in pack.records("demos")}

    def __getitem__(self, demos_id: str) -> list[Any]:
        if demos_id not in self._lists:
            raise BadInput(f"no examples {demos_id!r}", where="demos.jsonl", fix="Copy the data pack again")
        return self._lists[demos_id]
