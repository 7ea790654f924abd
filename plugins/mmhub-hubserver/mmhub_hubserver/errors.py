"""The refusals of this hub, each with the HTTP status and the `X-Error-Code` that Hub clients act on."""


class HubError(Exception):
    """A refusal whose message is shown to the client as it is."""

    status = 500
    code: str | None = None

    def __init__(self, message: str, *, commit: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.commit = commit


class Invalid(HubError):
    status = 400


class Unprocessable(Invalid):
    """Well-formed, but asks for something this hub never stores."""

    status = 422


class Unauthorized(HubError):
    status = 401


class Forbidden(HubError):
    status = 403


class RepoNotFound(HubError):
    status = 404
    code = "RepoNotFound"


class RepoHidden(RepoNotFound):
    """What somebody who is not logged in is told, whether the repository is private or does not exist."""

    status = 401


class RevisionNotFound(HubError):
    status = 404
    code = "RevisionNotFound"


class EntryNotFound(HubError):
    status = 404
    code = "EntryNotFound"


class Gated(HubError):
    status = 403
    code = "GatedRepo"


class GatedLogin(Gated):
    status = 401


class RouteNotFound(HubError):
    status = 404


class MethodNotAllowed(HubError):
    status = 405


class Conflict(HubError):
    status = 409


class Stale(HubError):
    status = 412


class TooLarge(HubError):
    status = 413


class StorageFailed(HubError):
    status = 507  # and not 500, which clients repeat for half a minute


class StoreUnusable(HubError):
    """The data folder is in use by another server, or was written by a version this one does not know."""


BROKEN = (HubError, KeyError, ValueError, OSError)
"""What reading one repository may raise if it was deleted meanwhile or is damaged: the others are worth listing."""
