"""Judging by workers on Ray (`rm.ray_pool`): what each worker holds, and what all of them share.

The driver alone has the ledger. Workers share one account, so that a budget or a rate holds for the whole run and the
calls of a worker that died are counted. No key travels: a worker reads its own environment.
"""

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

from rm.judging import SERVERS, build_judge
from rm.ray_pool import Pool, actor_here, cluster, fetch
from rubric_data.config import JudgeConfig
from rubric_data.endpoint import Account, Limits, limits_of
from rubric_data.errors import UserError
from rubric_data.judges import Judge
from rubric_data.labelling import Answer, Question, answer
from rubric_data.spending import Spent


class SharedAccount(Account):
    """An account that an actor on the driver's machine keeps. A copy anywhere in the cluster is the same account."""

    def __init__(self, limits: Limits) -> None:
        self._actor = actor_here(Account, limits)

    def spent(self) -> Spent:
        """See `Account`, as for the other methods."""
        return fetch(self._actor.spent.remote())

    def admit(self, likely_tokens: int) -> float:
        return fetch(self._actor.admit.remote(likely_tokens))

    def settle(self, tokens: tuple[int, int] | None, likely_tokens: int) -> None:
        fetch(self._actor.settle.remote(tokens, likely_tokens))

    def count_retry(self) -> None:
        fetch(self._actor.count_retry.remote())

    def count_failure(self, kind: str) -> None:
        fetch(self._actor.count_failure.remote(kind))


class RayJudges:
    """The engine whose judges work in ``pool``, ``batch_size`` questions at a time each; they call on ``account``."""

    def __init__(self, pool: Pool[Judge], account: Account | None, batch_size: int) -> None:
        self._pool = pool
        self._account = account
        self._batch_size = batch_size
        self.name, self.template = pool.first(_identity, None)

    @property
    def spent(self) -> Spent | None:
        """What all workers have used so far, those that died included; None if their judge costs nothing."""
        return None if self._account is None else self._account.spent()

    def ask(self, questions: Sequence[Question], stop: threading.Event) -> Iterator[Sequence[Answer]]:
        """See `rubric_data.labelling.Engine`. Raises UserError if a worker holds another judge than the first."""
        size = min(self._batch_size, max(1, math.ceil(len(questions) / self._pool.size)))
        batches = [questions[start : start + size] for start in range(0, len(questions), size)]
        for identity, answers in self._pool.map(_answer, batches, stop):
            if identity != (self.name, self.template):
                raise UserError(
                    f"workers: one holds the judge {identity[0]} (template {identity[1][:8]}), another {self.name} "
                    f"({self.template[:8]}); install the same version of rubric-rm on every machine"
                )
            yield answers


@contextmanager
def ray_judges(config: JudgeConfig) -> Iterator[RayJudges]:
    """The judge that ``config`` names, in ``config.workers`` workers. Raises UserError if it cannot be had.

    The calls in flight are shared out, at least one to each worker; rates and budgets are the account's.
    """
    limits = limits_of(config)
    with cluster(config.ray_address, config.workers):
        each = replace(config, concurrency=math.ceil(config.concurrency / config.workers))
        account = SharedAccount(limits) if config.judge in SERVERS else None
        with Pool(partial(build_judge, each, account), config.workers) as pool:
            yield RayJudges(pool, account, max(16, 4 * each.concurrency))


def _identity(judge: Judge, _: None) -> tuple[str, str]:
    return judge.name, judge.template


def _answer(judge: Judge, questions: Sequence[Question]) -> tuple[tuple[str, str], list[Answer]]:
    return _identity(judge, None), answer(judge, questions)
