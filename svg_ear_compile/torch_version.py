"""The releases of PyTorch that the package was tried with."""

from __future__ import annotations

import warnings

# The backend rewrites Dynamo's graph and calls compile_fx, neither of which is a stable interface.
# CONTRIBUTING.md says how a release is tried before it is added here.
OLDEST_TRIED = (2, 11)
NEWEST_TRIED = (2, 15)


def warn_if_untried(version: str) -> None:
    """Warn if `version`, a `torch.__version__`, is not of a minor release that was tried.

    A nightly or local build counts as the release that it leads to: "2.16.0a0+git1234" as 2.16.
    """
    major, minor = version.split(".")[:2]
    if OLDEST_TRIED <= (int(major), int(minor)) <= NEWEST_TRIED:
        return
    oldest, newest = (f"{major}.{minor}" for major, minor in (OLDEST_TRIED, NEWEST_TRIED))
    warnings.warn(
        f"svg_ear_compile was tried with PyTorch {oldest} to {newest} and this is {version}: "
        f"attention may be left dense or fail to compile.",
        stacklevel=3,
    )
