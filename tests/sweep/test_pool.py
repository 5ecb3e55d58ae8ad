"""Rules of the pool that a real cluster meets only by chance; everything else is tested on Ray."""

from __future__ import annotations

import asyncio
import time

from comptrust.sweep import pool as p


def test_a_withdrawn_dense_cell_gets_the_worker_of_a_cell_that_waits_for_it(monkeypatch):
    """No node has room for a third worker: its dense cell goes to one of the two that wait for it, not to another third worker.

    The cell is asked for again before those that wait have heard that it is queued.
    """
    monkeypatch.setattr(p, "_kill", lambda handle: None)
    need = p.Need()
    cells = [("dense", "m", True), ("a", "m", False), ("b", "m", False)]

    async def run() -> None:
        pool = p.Pool(lambda need, number: number, cells, limit=3)
        dense, _ = await pool.acquire("dense", "m", True, need)
        workers = [(await pool.acquire(key, "m", False, need))[0] for key in ("a", "b")]
        for number in workers:
            await pool.progress(number, "preparing", 1, 1)
        pool._withdraw(time.time() + 1)
        assert await pool.release(dense, None, dead=True)  # withdrawn
        await pool.dense_running("m", "queued")
        again = asyncio.create_task(pool.acquire("dense", "m", True, need))
        await asyncio.sleep(0)
        assert not again.done() and len(pool.slots) == 2
        assert await pool.wait_dense(workers[0], "m") == "queued"  # what makes a waiting cell give its worker back
        await pool.release(workers[0], "m")
        assert (await asyncio.wait_for(again, 2))[0] == workers[0]
        # Later there may be room again.
        pool.no_room[need] -= p.PENDING_S
        third, _ = await asyncio.wait_for(pool.acquire("a", "m", False, need), 2)
        assert third not in (*workers, dense)

    asyncio.run(run())


def test_finished_rows_are_told_again_until_they_were_heard():
    """A driver that waited for an answer in vain asks again: the rows of that answer are among those of the next."""

    async def run() -> None:
        pool = p.Pool(lambda need, number: number, [(k, "m", False) for k in "abc"], limit=1)
        told = []
        for key, heard in (("a", 0), ("b", 0), ("c", 2)):
            await pool.finish(key, "m", False, "done", {"key": key})
            told.append([row["key"] for row in (await pool.snapshot(heard))["finished"]])
        assert told == [["a"], ["a", "b"], ["c"]]
        assert (await pool.snapshot(0))["finished"] == [{"key": "c"}]  # a call that comes late costs nothing
        assert (await pool.snapshot(3))["finished"] == []

    asyncio.run(run())
