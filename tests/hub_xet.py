"""How large files get into the local Hub and out again: over Xet, the client's default; out also over plain HTTP.

In Xet a file is a list of segments, a segment a range of chunks of a xorb. The client decides about chunks
and hashes; the storage keeps xorbs and shards as they come, checks that they are complete, and answers which
chunks make up a file. Formats and protocol: https://huggingface.co/docs/xet (xorb, shard, api).
"""

from __future__ import annotations

import base64
import itertools
import json
import re
import secrets
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from email.message import Message
from typing import Any
from urllib.parse import parse_qs, urlsplit

from hub_storage import HubError, HubStorage, Repository

SHARD_MAGIC = b"HFRepoMetaData\0"
XORB_FOOTER_MAGIC = b"XETBLOB"
ENTRY_SIZE = 48  # every record of a shard, its header included
WITH_VERIFICATION, WITH_METADATA = 1 << 31, 1 << 30
NO_COMPRESSION, LZ4, LZ4_BYTE_GROUPED = 0, 1, 2


class XetFormatError(HubError):
    """An upload that the Xet storage cannot accept."""

    def __init__(self, message: str) -> None:
        super().__init__(400, message)


@dataclass(frozen=True)
class Segment:
    """A run of chunks of one xorb."""

    xorb: str
    size: int
    first_chunk: int
    end_chunk: int


@dataclass(frozen=True)
class Xorb:
    """The serialised chunks of a xorb; `offsets` has one entry more than there are chunks."""

    data: bytes
    offsets: tuple[int, ...]


class XetStore:
    """Xorbs and files by their Xet hash, and the Xet hash of a file by its sha256."""

    def __init__(self) -> None:
        self._xorbs: dict[str, Xorb] = {}
        self._files: dict[str, list[Segment]] = {}
        self._by_sha256: dict[str, str] = {}

    def put_xorb(self, xorb_hash: str, data: bytes) -> bool:
        """Store a xorb; return whether it is new.

        Raises:
            XetFormatError: the chunks do not add up to the upload, as after a broken connection.
        """
        xorb = Xorb(data, _chunk_offsets(data))
        is_new = xorb_hash not in self._xorbs
        self._xorbs[xorb_hash] = xorb
        return is_new

    def put_shard(self, shard: bytes) -> None:
        """Register the files that a shard describes, all or none of them.

        Raises:
            XetFormatError: the shard is malformed, or refers to chunks that were never uploaded.
        """
        described = list(_files_of_shard(shard))
        for _, _, segments in described:
            for segment in segments:
                xorb = self._xorbs.get(segment.xorb)
                if xorb is None or segment.end_chunk >= len(xorb.offsets):
                    raise XetFormatError(
                        f"The shard refers to chunks of xorb {segment.xorb} that are not stored."
                    )
        for xet_hash, sha256, segments in described:
            self._files[xet_hash] = segments
            if sha256 is not None:
                self._by_sha256[sha256] = xet_hash

    def hash_of(self, sha256: str) -> str | None:
        """Return the Xet hash of the file with this sha256, `None` when it is not stored here."""
        return self._by_sha256.get(sha256)

    def size(self, xet_hash: str) -> int:
        """Return the size of a file in bytes."""
        return sum(segment.size for segment in self._files[xet_hash])

    def xorb(self, xorb_hash: str) -> bytes:
        """Return the serialised chunks of a xorb; raise `HubError` 404 for an unknown hash."""
        if xorb_hash not in self._xorbs:
            raise HubError(404, f"No xorb {xorb_hash}")
        return self._xorbs[xorb_hash].data

    def read(self, xet_hash: str) -> bytes:
        """Put a file together from its chunks."""
        return b"".join(itertools.chain.from_iterable(map(self._chunks, self._files[xet_hash])))

    def reconstruction(self, xet_hash: str, xorbs_url: str, start: int, end: int | None) -> dict[str, Any]:
        """Answer which chunks make up bytes `start` to `end` (included; `None`: the last) of a file.

        Raises:
            HubError: 404 for an unknown file, 416 when `start` lies past its end.
        """
        if xet_hash not in self._files:
            raise HubError(404, f"No file {xet_hash}")
        segments = self._files[xet_hash]
        if start >= self.size(xet_hash):
            raise HubError(416, f"The file ends before byte {start}")
        terms: list[dict[str, Any]] = []
        fetch: dict[str, list[dict[str, Any]]] = {}
        position = offset = 0
        for segment in segments:
            first, position = position, position + segment.size
            if position <= start or (end is not None and first > end):
                continue
            if not terms:
                offset = start - first
            chunks = {"start": segment.first_chunk, "end": segment.end_chunk}
            offsets = self._xorbs[segment.xorb].offsets
            span = {"start": offsets[segment.first_chunk], "end": offsets[segment.end_chunk] - 1}
            terms.append({"hash": segment.xorb, "unpacked_length": segment.size, "range": chunks})
            fetch.setdefault(segment.xorb, []).append(
                {"range": chunks, "url": f"{xorbs_url}/{segment.xorb}", "url_range": span}
            )
        return {"offset_into_first_range": offset, "terms": terms, "fetch_info": fetch}

    def _chunks(self, segment: Segment) -> Iterator[bytes]:
        xorb = self._xorbs[segment.xorb]
        for offset in xorb.offsets[segment.first_chunk : segment.end_chunk]:
            stored, scheme, size = _chunk_header(xorb.data, offset)
            yield _decompress(xorb.data[offset + 8 : offset + 8 + stored], scheme, size)


def _chunk_header(data: bytes, offset: int) -> tuple[int, int, int]:
    """Read (stored size, compression scheme, size) of the chunk at `offset`."""
    stored = int.from_bytes(data[offset + 1 : offset + 4], "little")
    return stored, data[offset + 4], int.from_bytes(data[offset + 5 : offset + 8], "little")


def _chunk_offsets(data: bytes) -> tuple[int, ...]:
    """Walk over the chunk headers of a xorb, up to its optional footer."""
    offsets = [0]
    while offsets[-1] < len(data) and not data.startswith(XORB_FOOTER_MAGIC, offsets[-1]):
        if offsets[-1] + 8 > len(data):
            raise XetFormatError("The xorb ends inside a chunk header.")
        offsets.append(offsets[-1] + 8 + _chunk_header(data, offsets[-1])[0])
    if offsets[-1] > len(data) or len(offsets) == 1:
        raise XetFormatError("The xorb ends inside a chunk.")
    return tuple(offsets)


def _hash_text(raw: bytes) -> str:
    """Write 32 bytes as Xet does: four little-endian 64-bit numbers in hexadecimal."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", raw))


def _files_of_shard(shard: bytes) -> Iterator[tuple[str, str | None, list[Segment]]]:
    """Yield (Xet hash, sha256, segments) for each file of a shard."""
    if not shard.startswith(SHARD_MAGIC):
        raise XetFormatError("This is not a shard.")
    position = ENTRY_SIZE

    def record(layout: str) -> tuple[Any, ...]:
        nonlocal position
        try:
            fields = struct.unpack_from(layout, shard, position)
        except struct.error as error:
            raise XetFormatError("The shard ends inside a file.") from error
        position += ENTRY_SIZE
        return fields

    while True:
        file_hash, flags, count = record("<32sII")
        if file_hash == b"\xff" * 32:
            return
        segments = []
        for _ in range(count):
            xorb, _, size, first, end = record("<32s4I")
            segments.append(Segment(_hash_text(xorb), size, first, end))
        if flags & WITH_VERIFICATION:
            position += ENTRY_SIZE * count
        sha256 = _hash_text(record("<32s")[0]) if flags & WITH_METADATA else None
        yield _hash_text(file_hash), sha256, segments


def _decompress(stored: bytes, scheme: int, size: int) -> bytes:
    import pyarrow  # late: whoever asks for no content does without

    if scheme == NO_COMPRESSION:
        return stored
    if scheme not in (LZ4, LZ4_BYTE_GROUPED):
        raise XetFormatError(f"Unknown compression scheme {scheme}.")
    data = bytearray(pyarrow.decompress(stored, size, codec="lz4"))
    if scheme == LZ4_BYTE_GROUPED:  # all first bytes of four, then all second ones, …: floats compress better
        grouped, data, start = data, bytearray(size), 0
        for place in range(4):
            count = len(range(place, size, 4))
            data[place::4] = grouped[start : start + count]
            start += count
    return bytes(data)


@dataclass(frozen=True)
class User:
    """Who sends a request; a role "read" may not write anywhere."""

    name: str
    role: str


@dataclass
class Request:
    """One HTTP request; `user` is `None` for an anonymous one."""

    method: str
    target: str
    headers: Message
    body: bytes = b""
    user: User | None = None
    params: dict[str, str] = field(default_factory=dict)

    @property
    def path(self) -> str:
        """The path, still quoted."""
        return urlsplit(self.target).path

    @property
    def query(self) -> dict[str, str]:
        """The query; of a repeated key, the last value."""
        return {key: values[-1] for key, values in parse_qs(urlsplit(self.target).query).items()}

    def json(self) -> Any:
        """The body as JSON; raises `HubError` 400 when it is none."""
        try:
            return json.loads(self.body or b"{}")
        except ValueError as error:
            raise HubError(400, f"The body is not JSON: {error}") from error


@dataclass
class Response:
    """One HTTP answer; a body that is not bytes is sent as JSON."""

    body: Any = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)

    def encoded(self) -> bytes:
        """The body as bytes."""
        return self.body if isinstance(self.body, bytes) else json.dumps(self.body).encode()


def parse_range(header: str, size: int) -> tuple[int, int]:
    """Read a `Range` header; return the first and the last byte, or raise `HubError` 416."""
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", header)
    if match and match[1]:
        start, end = int(match[1]), min(int(match[2] or size), size - 1)
    else:
        start, end = max(size - int(match[2]), 0) if match and match[2] else size, size - 1
    if start > end:
        raise HubError(416, f"The content has {size} bytes", headers={"Content-Range": f"bytes */{size}"})
    return start, end


class LargeFileApi:
    """The routes by which content travels; a part of `HubApi`."""

    def __init__(self, storage: HubStorage) -> None:
        self.storage = storage
        self.secret = secrets.token_hex(8)  # in the path of signed addresses, which need no token
        self.url = self.storage_url = ""
        self._xet_scopes: dict[str, str] = {}

    # Uploads

    def preupload(self, request: Request, repository: Repository) -> Response:
        """Say how each file is to be uploaded, and what is there already."""
        files = repository.resolve(request.params["revision"]).files
        answers = []
        for wanted in request.json()["files"]:
            path, sample = wanted["path"], base64.b64decode(wanted.get("sample", ""))
            large = self.storage.is_large(files, path, wanted["size"], sample)
            present = {"oid": files[path].etag} if path in files else {}
            mode = "lfs" if large else "regular"
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **present})
        return Response({"files": answers})

    # Downloads

    def resolve(self, request: Request, repository: Repository) -> Response:
        """Serve a regular file; send a large one's client to the storage, or to Xet."""
        commit = repository.resolve(request.params["revision"])
        headers = {"X-Repo-Commit": commit.sha}
        file = commit.files.get(request.params["path"])
        if file is None:
            raise HubError(404, "Entry not found", "EntryNotFound", headers)
        headers["ETag"] = f'"{file.etag}"'
        if file.sha256 is None:
            return self._content(request, self.storage.get(file.content), headers)
        headers |= {"X-Linked-ETag": f'"{file.etag}"', "X-Linked-Size": str(file.size)}
        headers["Location"] = f"{self._storage_address}/{file.content}"
        if file.xet_hash is not None:
            kind = f"{repository.repo_type}s/{repository.repo_id}"
            headers["X-Xet-Hash"] = file.xet_hash
            headers["Link"] = f'<{self.url}/api/{kind}/xet-read-token/{commit.sha}>; rel="xet-auth"'
        return Response(status=302, headers=headers)

    def download(self, request: Request, _: None) -> Response:
        """Serve a large file over plain HTTP, also one that came over Xet."""
        key = request.params["key"]
        return self._content(request, self.storage.get(key), {"ETag": f'"{key}"'})

    @property
    def _storage_address(self) -> str:
        return f"{self.storage_url}/storage/{self.secret}"

    def _content(self, request: Request, data: bytes, headers: dict[str, str]) -> Response:
        headers["Accept-Ranges"] = "bytes"
        if "Range" not in request.headers:
            return Response(data, headers=headers)
        start, end = parse_range(request.headers["Range"], len(data))
        headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
        return Response(data[start : end + 1], 206, headers)

    # Xet

    def xet_write_token(self, request: Request, repository: Repository) -> Response:
        """Hand out the address of the Xet storage and a token: to hf_xet in the body, else in headers."""
        revision = request.params["revision"]
        if request.query.get("create_pr") != "1":
            repository.resolve(revision)
        token = f"xet_{secrets.token_hex(8)}"
        self._xet_scopes[token] = request.params["scope"]
        address, expiry = f"{self.url}/xet/{self.secret}", int(time.time()) + 3600
        headers = {"X-Xet-Cas-Url": address, "X-Xet-Access-Token": token}
        headers["X-Xet-Token-Expiration"] = str(expiry)
        return Response({"casUrl": address, "accessToken": token, "exp": expiry}, headers=headers)

    xet_read_token = xet_write_token

    def xet_upload_xorb(self, request: Request, _: None) -> Response:
        """Take a xorb."""
        self._require_xet_scope(request, "write")
        return Response({"was_inserted": self.storage.xet.put_xorb(request.params["key"], request.body)})

    def xet_upload_shard(self, request: Request, _: None) -> Response:
        """Take a shard, which makes files of the xorbs uploaded before."""
        self._require_xet_scope(request, "write")
        self.storage.xet.put_shard(request.body)
        return Response({"result": 1})

    def xet_reconstruction(self, request: Request, _: None) -> Response:
        """Tell which parts of which xorbs make up a file, or a range of it."""
        self._require_xet_scope(request, "read")
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", "bytes=0-"))
        if match is None:
            raise HubError(400, "Invalid range")
        end = int(match[2]) if match[2] else None
        xorbs_url = f"{self._storage_address}/xorbs"
        return Response(self.storage.xet.reconstruction(request.params["key"], xorbs_url, int(match[1]), end))

    def xet_download(self, request: Request, _: None) -> Response:
        """Serve a range of a xorb."""
        return self._content(request, self.storage.xet.xorb(request.params["key"]), {})

    def _require_xet_scope(self, request: Request, scope: str) -> None:
        granted = self._xet_scopes.get(request.headers.get("Authorization", "").removeprefix("Bearer "))
        if granted is None:
            raise HubError(401, "Invalid Xet token")
        if scope == "write" and granted != "write":
            raise HubError(403, "The Xet token does not allow to upload")
