"""The pool: long-lived workers pinned to GPUs, handed to coordinators by model affinity. Runs inside one Ray actor.

Rules. Dense cells first; a cell waits until its model's dense cell is done or has failed. A free worker takes a cell of the model it
holds; it changes model only when no cell of its model is left to come. Workers are added while cells wait and there is room, idle ones
give their GPU back. A worker that no node has room for yet (an autoscaler may bring one) loses its cell to one that is free. A worker is
made for one kind of need (GPUs, CPUs, memory) and dies with its driver: nothing is detached. A model here is a model in one dtype.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

#: A free worker waits so long for a cell of its own model before it takes another model's. A large model's load costs more.
AFFINITY_WAIT_S = 2.0
#: A cell that waits for a worker looks again so often.
POLL_S = 0.3
#: Stage of a worker that has a cell and has not said anything about it.
PENDING = "starting"
#: Stage of a worker whose cell is prepared and has nothing yet to be compared with.
WAITING = "waiting for dense"
#: A worker that has not started by then gives its cell up, if another could have it.
PENDING_S = 30.0
#: A worker without a cell for so long gives its GPU back.
IDLE_S = 30.0


@dataclass(frozen=True)
class Need:
    """Resources of one cell, as Ray counts them."""

    gpus: float = 0
    cpus: int = 1
    memory: int = 0  # bytes, 0: none reserved


@dataclass
class Request:
    key: str
    model: str
    dense: bool
    need: Need
    future: asyncio.Future
    since: float = field(default_factory=time.monotonic)


@dataclass
class Slot:
    """One worker as the pool sees it."""

    id: int
    need: Need
    handle: Any
    model: str | None = None
    key: str | None = None  # cell at work
    wants: str | None = None  # its model
    dense: bool = False  # it is the dense cell
    idle_since: float = field(default_factory=time.monotonic)
    stage: str = PENDING
    done: int = 0
    total: int = 0
    started: float = 0.0
    waits: bool = False  # for the dense cell: what it says of its preparation comes late

    @property
    def alive(self) -> bool:
        """It has been heard of."""
        return self.model is not None or self.stage != PENDING


class Pool:
    """``make(need, id)`` creates a worker; there are at most ``limit``; ``cells`` is [(key, model, dense)]."""

    def __init__(self, make: Any, cells: list[tuple[str, str, bool]], limit: int) -> None:
        self.make, self.limit = make, limit
        self.to_come = Counter(model for _, model, _ in cells)
        # A dense cell that is not among the cells to do was done before.
        self.dense = {model: "queued" for _, model, dense in cells if dense}
        self.waiting: deque[Request] = deque()
        self.slots: dict[int, Slot] = {}
        self.next_id = 0
        self.dense_changed = asyncio.Event()
        self.states: dict[str, str] = {}
        self.finished: list[dict[str, Any]] = []
        self.told = 0  # rows that have left ``finished``
        self.loads = 0
        self.withdrawn: set[int] = set()  # workers ended before they started
        self.no_room: dict[Need, float] = {}  # when such a worker was last withdrawn

    # -- coordinators -------------------------------------------------------------------------------------------------

    async def acquire(self, key: str, model: str, dense: bool, need: Need) -> tuple[int, Any]:
        """A worker for this cell; waits until there is one. A cell whose coordinator died has its worker already."""
        for slot in self.slots.values():
            if slot.key == key:
                return slot.id, slot.handle
        request = next((r for r in self.waiting if r.key == key), None)
        if request is None:
            request = Request(key, model, dense, need, asyncio.get_running_loop().create_future())
            self.waiting.append(request)
        self.states[key] = "waiting"
        self._schedule()
        while not request.future.done():
            await asyncio.wait([request.future], timeout=POLL_S)
            self._schedule()
        return request.future.result()

    async def release(self, worker: int, model: str | None, dead: bool = False, retire: bool = False) -> bool:
        """Give a worker back; ``model`` is what it holds now. True if it had been withdrawn: that costs its cell no attempt."""
        slot = self.slots.get(worker)
        if slot is None:
            return worker in self.withdrawn
        if dead or retire:
            del self.slots[worker]
            if retire:
                _kill(slot.handle)
        else:
            if model != slot.model:
                self.loads += 1
            slot.model, slot.key, slot.stage, slot.idle_since = model, None, "idle", time.monotonic()
        self._schedule()
        return False

    async def finish(self, key: str, model: str, dense: bool, state: str, row: dict[str, Any] | None = None) -> None:
        """A cell has ended (``done`` or ``failed``): it will not come again."""
        self.states[key] = state
        self.to_come[model] -= 1
        if row is not None:
            self.finished.append(row)
        if dense:
            self._dense(model, state)
        self._schedule()

    async def dense_running(self, model: str, state: str) -> None:
        self._dense(model, state)

    def _dense(self, model: str, state: str) -> None:
        self.dense[model] = state
        self.dense_changed.set()
        self.dense_changed = asyncio.Event()

    async def wait_dense(self, worker: int, model: str) -> str:
        """``done``, ``failed``, ``absent`` (done in an earlier run), or ``queued``: nobody works on it, so don't hold a worker for it."""
        slot = self.slots.get(worker)
        while self.dense.get(model) == "running":
            if slot:
                slot.stage, slot.done, slot.total, slot.waits = WAITING, 0, 0, True
            await self.dense_changed.wait()
        if slot and slot.waits:
            slot.stage, slot.waits = "prepared", False
        return self.dense.get(model, "absent")

    async def progress(self, worker: int, stage: str, done: int, total: int) -> None:
        if (slot := self.slots.get(worker)) and not slot.waits:
            slot.stage, slot.done, slot.total = stage, done, total

    async def snapshot(self, heard: int) -> dict[str, Any]:
        """What the live view shows; the finished rows but the first ``heard``, which are let go: an answer may get lost."""
        self._schedule()
        del self.finished[: max(0, heard - self.told)]
        self.told = max(heard, self.told)
        return {
            "states": dict(Counter(self.states.values())),
            "finished": list(self.finished),
            "loads": self.loads,
            "workers": [
                {
                    "id": s.id,
                    "key": s.key,
                    "model": s.model,
                    "stage": s.stage,
                    "done": s.done,
                    "total": s.total,
                    "started": s.started,
                }
                for s in self.slots.values()
            ],
        }

    # -- assignment ---------------------------------------------------------------------------------------------------

    def _schedule(self) -> None:
        now = time.monotonic()
        while self.waiting:
            pick = self._pick(now)
            if pick is None:
                break
            request, slot = pick
            self.waiting.remove(request)
            slot.key, slot.stage, slot.started, slot.done, slot.total = request.key, PENDING, time.time(), 0, 0
            slot.wants, slot.dense = request.model, request.dense
            self.states[request.key] = "running"
            if request.dense:
                self._dense(request.model, "running")
            if not request.future.done():
                request.future.set_result((slot.id, slot.handle))
        for slot in [s for s in self.slots.values() if s.key is None and now - s.idle_since > IDLE_S]:
            if not any(r.need == slot.need for r in self.waiting):
                del self.slots[slot.id]
                _kill(slot.handle)
        self._withdraw(time.time() - PENDING_S)

    def _withdraw(self, before: float) -> None:
        """End workers that were to start ``before`` and did not, one for each worker that could have the cell instead.

        That is a free one of the same kind; or, for a dense cell, one that has a cell of its model and waits for it.
        """
        for slot in self.slots.values():
            if slot.alive or slot.key is None or slot.started > before:
                continue
            others = [s for s in self.slots.values() if s.alive and s.need == slot.need]
            if any(s.key is None or (slot.dense and s.wants == slot.wants) for s in others):
                del self.slots[slot.id]
                self.withdrawn.add(slot.id)
                self.no_room[slot.need] = time.monotonic()
                _kill(slot.handle)
                return

    def _pick(self, now: float) -> tuple[Request, Slot] | None:
        ready = [r for r in self.waiting if not r.future.done()]
        ready.sort(key=lambda r: (not r.dense, r.since))
        free = [s for s in self.slots.values() if s.key is None]
        for request in ready:  # a worker that holds the model
            for slot in free:
                if slot.need == request.need and slot.model == request.model:
                    return request, slot
        for request in ready:
            if self._blocked(request):
                continue
            for slot in free:  # an empty worker, or one whose own model is finished or does not come
                if slot.need == request.need and (
                    slot.model is None or self.to_come[slot.model] <= 0 or now - slot.idle_since > AFFINITY_WAIT_S
                ):
                    return request, slot
            # Not at once after one was withdrawn: its dense cell would wait for the next, and those that wait for it keep all workers.
            room = now - self.no_room.get(request.need, -PENDING_S) >= PENDING_S
            room = room or not any(s.need == request.need for s in self.slots.values())
            if room and len(self.slots) < self.limit:
                slot = self._grow(request.need)
                return request, slot
            other = next((s for s in free if s.need != request.need and not any(r.need == s.need for r in ready)), None)
            if other is not None:  # room is taken by an idle worker of another kind
                del self.slots[other.id]
                _kill(other.handle)
                return request, self._grow(request.need)
        return None

    def _blocked(self, request: Request) -> bool:
        """A cell whose model's dense cell still waits for a worker must not take the room it needs."""
        return not request.dense and self.dense.get(request.model) == "queued" and any(r.dense for r in self.waiting)

    def _grow(self, need: Need) -> Slot:
        slot = Slot(self.next_id, need, self.make(need, self.next_id))
        self.slots[slot.id] = slot
        self.next_id += 1
        return slot


def _kill(handle: Any) -> None:
    import ray

    ray.kill(handle)
