"""What a model cannot read or do, as a refusal that names the part of the request at fault."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mmhub.errors import InputError, UsageError
from mmhub_serve.errors import Refused, refusal_of


@contextmanager
def blaming(param: str, several: bool = False) -> Iterator[None]:
    """Say of inputs that cannot be used that they are `param`, and which one of `several`.

    Raises:
        Refused: 400, for an InputError or UsageError inside.
    """
    try:
        yield
    except InputError as error:
        place = f"{param}[{error.row or 0}]" if several else param
        refusal = refusal_of(error, f"{place}.{error.modality}" if several and error.modality else place)
        if several:
            refusal.message = f"{place}: {error.message}"
        if "truncate" in (error.hint or ""):  # which requests cannot ask for
            refusal.hint, refusal.code = "shorten it", "context_length_exceeded"
        raise refusal from None
    except UsageError as error:
        raise refusal_of(error, param) from None


def check_count(number: int, most: int, param: str) -> None:
    """Refuse none, and more than a request may hold."""
    if not 1 <= number <= most:
        raise Refused(400, f"{param} holds {number}", f"give between 1 and {most} at once", param=param)
