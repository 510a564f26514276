"""Texts of every script, a server on this machine, and JavaScript in Node."""

import functools
import http.server
import json
import random
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

from modeling_mtpf.model.texts_mtpf import PROBES

MODULE = Path(__file__).parents[2] / "demo" / "browser"
CHROMIUM_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
SCRIPTS = [
    "abcXYZ éÉñßœ", "αβΣςΩΟΔ", "приветЙё", "אבג שלוםָ", "العربيةَّ", "हिन्दी क्षि", "বাংলা", "தமிழ்", "ไทยภาษาำ",
    "东京漢字日本", "ひらがなカタカナがガ", "한국어 각", "ქართული", "հայ", "አማርኛ", "🙂👩🏽‍🚀🇵🇹❤️", "e\u0301a\u0323\u0302 \u0301",
    "!?.,;:'\"-_()[]{}", "0123٣४½²", " \t\n\r\u00a0\u2003\u200b\ufeff\u0085\u2028\x1c", "ﬁﬂ①Å\u212b…",
    "\ufffd\x00\x07\U0010ffff\ue000", "İıſẞ", "ᠮᠣᠩᠭᠣᠯ", "བོད་སྐད", "ខ្មែរ", "𞤀𞤣𞤤𞤢𞤥", "𐌀𝒳𝟙", "[CLS][MASK]<s>",
]  # fmt: skip


def awkward_texts(count: int, seed: int = 0) -> list[str]:
    """Return texts of one script and of several, with words, marks, emoji and spaces at random places."""
    generator = random.Random(seed)
    texts = [*PROBES, "\ud800 alone", "Ada Lovelace met Charles Babbage in London on Monday. " * 40]
    texts += ["Ada met Noor " + script + " in London" for script in SCRIPTS]
    while len(texts) < count:
        pool = "".join(generator.sample(SCRIPTS, generator.choice([1, 1, 2, 3, 6])))
        letters = (
            generator.choice([" ", "", ""]) + generator.choice(pool) for _ in range(generator.randrange(30))
        )
        texts.append("".join(letters))
    return texts


def run_node(script: str, value: object) -> object:
    """Run a module in Node next to the runner; it reads JSON from ``input`` and prints JSON."""
    prelude = "import fs from 'node:fs'; const input = JSON.parse(fs.readFileSync(0));"
    command = ["node", "--input-type=module", "-e", prelude + script]
    done = subprocess.run(
        command, cwd=MODULE, input=json.dumps(value), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def without_utf16(results, texts):
    """Check the UTF-16 offsets of entities, and return the results without them, as Python's are."""

    def checked(entity, units: bytes):
        start, end = 2 * entity.pop("utf16_start"), 2 * entity.pop("utf16_end")
        assert units[start:end] == entity["word"].encode("utf-16-le", "surrogatepass")
        return entity

    for result in results.values():
        for text, row in zip(texts, result, strict=True):
            units = text.encode("utf-16-le", "surrogatepass")
            for entity in row if isinstance(row, list) else []:
                if "start" in entity:
                    checked(entity, units)
    return results


@contextmanager
def serving(handler, **options):
    """Serve on this machine; yield the address and a function that stops it."""

    class Quiet(handler):
        def log_message(self, *arguments):
            pass

    class Server(http.server.ThreadingHTTPServer):
        def handle_error(self, request, client_address):  # the browser leaves before it has read all
            if not isinstance(sys.exc_info()[1], ConnectionError):
                super().handle_error(request, client_address)

    server = Server(("127.0.0.1", 0), functools.partial(Quiet, **options))
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def stop():
        server.shutdown()
        server.server_close()

    try:
        yield f"http://127.0.0.1:{server.server_port}/", stop
    finally:
        stop()
