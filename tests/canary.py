"""Find planted secrets in whatever a run leaves: texts, binaries, and what is packed inside archives."""

import gzip
import io
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path


def leaks(folders: Iterable[Path], secrets: Iterable[str]) -> list[str]:
    """`file: secret` for each secret found in a file's bytes or name, or in those of a packed member, at any depth."""
    files = sorted(path for folder in folders for path in Path(folder).rglob("*"))
    wanted = [(secret, form) for secret in secrets for form in (secret.encode(), secret.encode("utf-16-le"))]
    found = {f"{path}: {secret}" for path in files for secret, _ in wanted if secret in str(path)}
    for path in (path for path in files if path.is_file()):
        for part in unpacked(path.read_bytes()):
            found |= {f"{path}: {secret}" for secret, form in wanted if form in part}
    return sorted(found)


def unpacked(content: bytes) -> Iterator[bytes]:
    """`content` and, where it is a zip or gzip archive, everything inside it."""
    yield content
    if content[:2] == b"\x1f\x8b":
        yield from unpacked(gzip.decompress(content))
    elif zipfile.is_zipfile(io.BytesIO(content)):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            for name in archive.namelist():
                yield name.encode()
                yield from unpacked(archive.read(name))
