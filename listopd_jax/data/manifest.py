"""The artefacts that the code may load from outside, listed in `third_party/manifest.toml`, and checks against it."""

import functools
import os
import pathlib
import tomllib

from listopd_jax import files
from listopd_jax.errors import UserError, first_line

MANIFEST = pathlib.Path(__file__).parents[2] / "third_party" / "manifest.toml"


@functools.cache
def artefacts() -> tuple[dict, ...]:
    """The manifest's entries: dicts with name, kind, source, revision, licence and files."""
    try:
        return tuple(tomllib.loads(MANIFEST.read_text(encoding="utf-8"))["artefact"])
    except (OSError, ValueError, KeyError) as e:
        raise UserError(
            f"{MANIFEST}: missing or broken ({e}); run from a checkout, or set data.verify=False"
        ) from e


def artefact(name: str) -> dict:
    """The entry of that name; UserError if there is none."""
    found = next((a for a in artefacts() if a["name"] == name), None)
    if found is None:
        names = ", ".join(a["name"] for a in artefacts())
        raise UserError(f"{name}: not in third_party/manifest.toml, which lists {names}")
    return found


def revision(hub_id: str) -> str:
    """The pinned commit of a hub repository; "main" for one that the manifest does not list."""
    return next((a["revision"] for a in artefacts() if a["name"] == hub_id), "main")


def verify(path: str | os.PathLike, name: str = "") -> str | None:
    """Compare a file with the manifest's entry for its base name; returns the entry's name, None without one.

    Only data sets are looked up by base name alone, because names such as tokenizer.json belong to many
    artefacts: give `name` to check against one entry. Size is compared first, then SHA-256.

    Raises:
      UserError: the file has the name of a known one, but another size or digest; or it cannot be read.
    """
    path = pathlib.Path(path)
    candidates = [artefact(name)] if name else [a for a in artefacts() if a["kind"] == "dataset"]
    for entry in candidates:
        for known in entry.get("files", ()):
            if pathlib.PurePosixPath(known["path"]).name == path.name and "sha256" in known:
                _compare(path, known, entry["name"])
                return entry["name"]
    return None


def _compare(path: pathlib.Path, known: dict, name: str) -> None:
    advice = "fetch it again, or set data.verify=False to use it as it is"
    try:
        size = path.stat().st_size
        if size != known["bytes"]:
            raise UserError(
                f"{path}: truncated or modified: {size} bytes where {name} has {known['bytes']}; {advice}"
            )
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror or e})") from e
    digest = files.sha256(path)
    if digest != known["sha256"]:
        raise UserError(
            f"{path}: modified: {size} bytes as {name}, but SHA-256 {digest[:12]}…, "
            f"not {known['sha256'][:12]}…; {advice}"
        )


def download(name: str, file: str) -> str:
    """Fetch one file of a hub data set into the hub's cache and return its path; a cached file is used.

    Raises UserError if the hub cannot be reached or the disk is full.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    entry = artefact(name)
    try:
        return huggingface_hub.hf_hub_download(
            entry["source"], file, repo_type="dataset", revision=entry["revision"]
        )
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError, ValueError) as e:
        raise UserError(
            f"{entry['source']}: {file} cannot be downloaded ({first_line(e)}); "
            "fetch it elsewhere and set data.path and data.meta_path"
        ) from e
