from collections.abc import Callable

from pointsman.daemon.routing.body import Features
from pointsman.daemon.routing.policies import Rng
from pointsman.daemon.routing.table import Plan, Pool
from pointsman.daemon.shm.choosing import Booked, Chooser
from pointsman.daemon.shm.prefix import HashChain

class ShortWay:
    def __init__(
        self,
        chooser: Chooser,
        chain: HashChain,
        rng: Rng,
        unlocked: Callable[[Features, int, Pool, int], Booked],
        charge: Callable[[Booked, float, int], None],
    ) -> None: ...
    def read_prompt(self, features: Features) -> int: ...
    def choose(
        self,
        features: Features,
        body_bytes: int,
        pool: Pool,
        plan: Plan,
        prompt_tokens: int,
        now: float,
        is_retry: bool = False,
    ) -> Booked: ...
    def finish(
        self,
        booked: Booked,
        now: float,
        output_tokens: int | None,
        was_computed: bool = True,
        verdict: int = ...,
    ) -> bool: ...
