"""What came of an attempt, as the machine of the breaker has it, and as the native side does (`shm.choosing`)."""

from pointsman.daemon.resilience.breaker import Verdict
from pointsman.daemon.shm.choosing import FAILED, NEUTRAL, SUCCEEDED

VERDICTS = {SUCCEEDED: Verdict.SUCCESS, FAILED: Verdict.FAILURE, NEUTRAL: Verdict.NEUTRAL}
NUMBERS = {verdict: number for number, verdict in VERDICTS.items()}
