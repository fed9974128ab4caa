"""Budgets: `--max-cost` and `--max-total-tokens` end a run before it costs more, over all of its ranks.

Each rank takes a share of what is left of a budget from a file in the state, the smaller the less there is, and sends a
request only while what it has spent, and what its requests in flight are expected to cost, is less than its share. So a
budget is exceeded by no more than what was in flight was wrongly expected to cost.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sqlite3
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import sdg
from sdg_plugins.common.files import rank_file
from sdg_plugins.common.lease import brief_lock
from sdg_plugins.common.prices import Tokens, cost_of, estimated_tokens, in_money, price_of, tokens_of
from sdg_plugins.common.state import replace_file

UNKNOWN = 8  # requests in flight until the first response tells what one costs
SHARES = 100  # of a budget and each rank: the smallest part that a rank takes

_budgets: weakref.WeakKeyDictionary[Any, Budget] = weakref.WeakKeyDictionary()  # by what stops the run


@sdg.hookimpl(trylast=True)
def wrap_requests(run: sdg.Run, send: sdg.Send) -> sdg.Send:
    """Hold requests back that a budget does not allow, and estimate the tokens that a server does not report."""
    budget = _budgets.get(run.stop)  # one for all models of the run, which is linked first
    priced = any(price_of(run.options, name) for name in ("", *run.options.models))
    if budget is None and (priced or run.options.max_total_tokens):
        budget = _budgets[run.stop] = Budget(run)
    return budget.link(run, send) if budget else send


@sdg.hookimpl
def observe(run: sdg.Run) -> contextlib.AbstractAsyncContextManager[None] | None:
    return _returning(budget) if (budget := _budgets.get(run.stop)) else None


@contextlib.asynccontextmanager
async def _returning(budget: Budget) -> AsyncIterator[None]:
    """Return the unused shares at the end."""
    try:
        yield
    finally:
        await asyncio.to_thread(budget.settle)


class Cap:
    """One budget, and this rank's share of it.

    Args:
        name: in the state.
        most: what all ranks may spend.
        spent: returns what this rank has spent.
        run: whose.

    Attributes:
        share: what this rank may spend.
        others: what the other ranks have spent or may spend, as last seen.
    """

    def __init__(self, name: str, most: float, spent: Callable[[], float], run: sdg.Run) -> None:
        self.name, self.most, self.spent, self._run = name, most, spent, run
        self.share = self.others = 0.0

    @property
    def total(self) -> float:
        """What all ranks have spent, or may spend."""
        return self.others + self.spent()

    def settle(self) -> None:
        """Return what this rank has not spent of its share."""
        self._record(lambda others: self.spent())

    def extend(self) -> bool:
        """Take a further share of what is left; False if there is nothing. Called in a thread."""
        before = self.share
        ranks = self._run.options.world_size

        def more(others: float) -> float:
            left = self.most - others - self.share
            part = left if ranks == 1 else max(left / (2 * ranks), self.most / (SHARES * ranks))
            return self.share + max(0.0, min(left, part))

        self._record(more)
        return self.share > before

    def _record(self, share: Callable[[float], float]) -> None:
        """Record another share of this rank, given those of the others, with no other rank in between."""
        run, name = self._run, f"budget-{self.name}.json"
        with brief_lock(run.state / f"{name}.lock"):
            path = run.state / name
            known: dict[str, float] = json.loads(path.read_bytes()) if path.exists() else {}
            own = f"{run.options.rank:05d}"
            self.others = sum(amount for rank, amount in known.items() if rank != own)
            self.share = share(self.others)
            replace_file(run, name, json.dumps({**known, own: self.share}, indent=2).encode())


class Budget:
    """The budgets of a run, as far as this rank is concerned."""

    def __init__(self, run: sdg.Run) -> None:
        self._run, self._earlier = run, tokens_of(recorded_totals(run), run.options.models)
        self._answered = self._in_flight = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._turn = asyncio.Lock()
        self._said = False
        options = run.options
        amounts: dict[str, tuple[float | None, Callable[[], float]]] = {
            "tokens": (options.max_total_tokens, lambda: sum(tokens.total for tokens in self._tokens().values())),
            "cost": (options.max_cost, lambda: cost_of(options, self._tokens()) or 0.0),
        }
        self._caps = [Cap(name, most, spent, run) for name, (most, spent) in amounts.items() if most is not None]
        self._before = [cap.spent() for cap in self._caps]
        self.settle()

    def settle(self) -> None:
        """Return what this rank has not spent of its shares."""
        for cap in self._caps:
            cap.settle()

    def link(self, run: sdg.Run, send: sdg.Send) -> sdg.Send:
        """The link of a model's chain of `send`; `run` is the model's."""

        async def within_budget(request: sdg.Request) -> sdg.Response:
            await self._admit()
            try:
                response = await send(request)
                self._answered += 1
                if not response.reply.usage:
                    self._estimate(run, request, response.reply)
                return response
            finally:
                self._in_flight -= 1
                while self._waiting:
                    if not (waiting := self._waiting.popleft()).done():
                        waiting.set_result(None)

        return within_budget

    def _tokens(self) -> dict[str, Tokens]:
        now = tokens_of(self._run.counts, self._earlier.keys() - {""})
        return {name: tokens + now[name] for name, tokens in self._earlier.items()}

    def _estimate(self, run: sdg.Run, request: sdg.Request, reply: sdg.Reply) -> None:
        if not self._said:
            self._said = True
            sdg.say("the server reports no usage: tokens are estimated, one for 4 characters")
        tokens = estimated_tokens(request, reply)
        run.counts["estimated_prompt_tokens"] += int(tokens.prompt)
        run.counts["estimated_completion_tokens"] += int(tokens.completion)

    def _has_room(self, cap: Cap, before: float) -> bool:
        """True if one more request may be sent, given what those in flight probably cost."""
        spent = cap.spent()
        if not self._answered:
            return self._in_flight < UNKNOWN and spent < cap.share
        mean = (spent - before) / self._answered
        return spent + self._in_flight * mean < cap.share * (1 - 1e-9)  # sums of prices are not exact

    async def _admit(self) -> None:
        """Wait until a request may be sent. Canceled when a budget is used up."""
        while True:
            full = [
                cap for cap, before in zip(self._caps, self._before, strict=True) if not self._has_room(cap, before)
            ]
            if not full:
                self._in_flight += 1
                return
            if await self._extended(full[0]):
                continue
            if not self._in_flight and full[0].spent() >= full[0].share:
                self._run.stop(sdg.BudgetSpent(spent_message(full[0])))
                raise asyncio.CancelledError
            if self._in_flight:
                waiting: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                self._waiting.append(waiting)
                await waiting

    async def _extended(self, cap: Cap) -> bool:
        """Get this rank a larger share of a budget; True if it is worth while to look again."""
        share = cap.share
        async with self._turn:
            return cap.share > share or await asyncio.to_thread(cap.extend)


def spent_message(cap: Cap) -> str:
    """What is said when a budget is used up."""
    option, shown = ("--max-cost", in_money) if cap.name == "cost" else ("--max-total-tokens", lambda n: f"{n:,.0f}")
    return (
        f"{option} {shown(cap.most)} is used up, {shown(cap.total)} spent: completed responses are saved; run the same "
        f"command with a larger {option} to go on"
    )


def recorded_totals(run: sdg.Run) -> Mapping[str, float]:
    """What earlier processes of this rank have counted."""
    path = rank_file(run.state, run.options.rank, "sqlite3")
    if not path.exists():
        return {}
    with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=60)) as state:
        return dict(state.execute("SELECT name, value FROM totals"))
