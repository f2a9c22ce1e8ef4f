"""What a backend's codes mean: whether to send a key again, and what to tell who asked."""

from __future__ import annotations

import msgspec

from pointsman.daemon.stores.results import MISSING, Code, Corrupt, Failure, Invalid, Missing, NoSpace, Transient


class CodeTable(msgspec.Struct, frozen=True):
    """The final codes of a backend by what they mean; every other code is Transient.

    A code that nobody knows is sent again, a bounded number of times: giving up on a hiccup costs more than that.
    """

    invalid: frozenset[Code] = frozenset()
    no_space: frozenset[Code] = frozenset()
    corrupt: frozenset[Code] = frozenset()
    missing: frozenset[Code] = frozenset()
    """when a key is read, deleted or looked at; of a write it is Transient, as nothing can be missing there"""
    is_no_space_retried: bool = False
    """the code is also seen while the backend recovers"""
    is_corrupt_retried: bool = False
    """reading again may take another way or another copy"""

    def judge(self, code: Code, *, is_write: bool = False) -> Failure:
        if code in self.missing and not is_write:
            return MISSING
        if code in self.invalid:
            return Invalid(code)
        if code in self.no_space:
            return NoSpace(code)
        if code in self.corrupt:
            return Corrupt(code)
        return Transient(code)

    def is_retried(self, failure: Failure) -> bool:
        match failure:
            case Transient():
                return True
            case NoSpace():
                return self.is_no_space_retried
            case Corrupt():
                return self.is_corrupt_retried
            case Missing() | Invalid():
                return False
