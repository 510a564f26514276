"""Run the apps of an `mtpf export` with onnxruntime, tokenizers and numpy alone.

python runner.py --app entities --app intent < texts.txt      # one JSON object per line of text
Runner("exported").predict(["Call Ada at 5pm"], ["entities"])  # after: from runner import Runner
"""

import argparse
import functools
import hashlib
import json
import sys
import threading
from pathlib import Path

import numpy as np
import onnxruntime
import tokenizers


class RunnerError(ValueError):
    """A folder, an app or a text that cannot be used."""


class Runner:
    """The apps of one exported folder; threads may share it. ``threads=0`` uses all cores."""

    def __init__(self, folder=".", threads=0):
        folder, self.lock = Path(folder), threading.Lock()
        try:
            self.manifest = json.loads((folder / "export.json").read_text("utf-8"))
            needed, apps = self.manifest["needs_onnxruntime"], self.manifest["apps"]
            listed = {**self.manifest["files"], **{app["file"]: app for app in apps.values()}}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise RunnerError(f"{folder} is no folder of mtpf export: export.json: {error!r}") from error
        if [int(part) for part in onnxruntime.__version__.split(".")[:2]] < needed:
            least, found = f"{needed[0]}.{needed[1]}", onnxruntime.__version__
            raise RunnerError(f"onnxruntime is {found}; install {least} or newer.")
        for path, entry in ((folder / name, entry) for name, entry in listed.items()):
            if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != entry["sha256"]:
                raise RunnerError(f"{path} is missing or not the file that was exported; export it again.")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        # Else the threads of one session wait in a loop and take the cores from the other.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        try:
            session = functools.partial(onnxruntime.InferenceSession, providers=["CPUExecutionProvider"])
            self.trunk, self.tail = (session(folder / f"{name}.onnx", options) for name in ("trunk", "tail"))
        except Exception as error:
            raise RunnerError(f"onnxruntime cannot read the graphs in {folder}: {error}") from error
        self.tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_padding()
        self.apps = {name: _app((folder / app["file"]).read_bytes()) for name, app in apps.items()}

    def predict(self, texts, apps, batch_size=32):
        """Return for each app one result per text, as ``MtpfModel.predict`` does."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        if odd := [(i, type(text).__name__) for i, text in enumerate(texts) if not isinstance(text, str)]:
            raise RunnerError(f"Text {odd[0][0]} is {odd[0][1]}, not a string.")
        if unknown := [name for name in apps if name not in self.apps]:
            raise RunnerError(f"There is no app {unknown[0]!r}; this export has: {', '.join(self.apps)}.")
        most = min([self.manifest["max_length"], *(self.apps[name]["max_length"] for name in apps)])
        with self.lock:  # the tokenizer keeps this setting
            self.tokenizer.enable_truncation(most, stride=int(most * self.manifest["window_overlap"]))
            encoded = self.tokenizer.encode_batch(texts)
        windows = [(t, window) for t, own in enumerate(encoded) for window in (own, *own.overflowing)]
        windows.sort(key=lambda item: len(item[1].ids))
        pieces = {name: [[] for _ in texts] for name in apps}
        for start in range(0, len(windows), batch_size):
            batch = windows[start : start + batch_size]
            ids = np.full((len(batch), len(batch[-1][1].ids)), self.manifest["pad_token_id"], np.int64)
            mask = np.zeros_like(ids)
            for row, (_, window) in enumerate(batch):
                ids[row, : len(window.ids)], mask[row, : len(window.ids)] = window.ids, 1
            hidden = self.trunk.run(None, {"input_ids": ids, "attention_mask": mask})[0]
            for name, own in pieces.items():
                inputs = {"hidden_states": hidden, "attention_mask": mask, **self.apps[name]["inputs"]}
                logits = self.tail.run(["logits"], inputs)[0]  # (windows, tokens, labels)
                for row, (text, window) in enumerate(batch):
                    own[text].append((window, logits[row, : len(window.ids)]))
        for name, found in pieces.items():
            label = _text_label if self.apps[name]["kind"] == "text-classification" else _entities
            pieces[name] = list(map(label, found, texts, [self.apps[name]["labels"]] * len(texts)))
        return pieces


def _app(data):
    """Read safetensors: eight bytes with the length of the header, the header, the tensors."""
    start = 8 + int.from_bytes(data[:8], "little")
    header, inputs = json.loads(data[8:start]), {}
    app = json.loads(header.pop("__metadata__")["app"])
    for name, entry in header.items():
        first, last = (start + offset for offset in entry["data_offsets"])
        values = np.frombuffer(data[first:last], {"F32": "<f4", "F16": "<f2"}[entry["dtype"]])
        inputs[name] = values.astype(np.float32).reshape(entry["shape"])
    return {**app, "inputs": inputs}


def _softmax(logits):
    return (powers := np.exp(logits - logits.max(-1, keepdims=True))) / powers.sum(-1, keepdims=True)


def _text_label(pieces, text, labels):
    """Average the probabilities of a text's windows, weighted by their length."""
    weights = np.array([len(window.ids) for window, _ in pieces], np.float32)
    mean = weights @ np.stack([_softmax(logits.mean(0)) for _, logits in pieces]) / weights.sum()
    return {"label": labels[int(mean.argmax())], "score": float(mean.max())}


def _entities(pieces, text, labels):
    """Label each word in the window that shows most of its surroundings, then join IOB2 spans."""
    words, spans, group = {}, [], None
    for window, logits in pieces:
        for token, word in enumerate(ids := window.word_ids):
            if word is not None:
                start, end = window.offsets[token]
                low, high, best, own = words.get(word, (start, end, (-np.inf,), None))
                place = (-start, min(token, len(ids) - 1 - token), token)  # its beginning, far from borders
                if (token == 0 or ids[token - 1] != word) and place > best:
                    best, own = place, logits[token]
                words[word] = min(low, start), max(high, end), best, own
    for start, end, _, own in sorted((w for w in words.values() if w[0] < w[1]), key=lambda w: w[:2]):
        label, score = labels[int(own.argmax())], float(_softmax(own).max())
        prefix, _, kind = label.partition("-")
        if prefix == "I" and kind == group:
            spans[-1]["score"].append(score)
            spans[-1]["end"] = end
        elif prefix in ("B", "I"):
            spans.append(dict(entity_group=kind, score=[score], word="", start=start, end=end))
        group = kind if prefix in ("B", "I") else None
    for span in spans:
        span.update(score=sum(span["score"]) / len(span["score"]), word=text[span["start"] : span["end"]])
    return spans


def _main():
    parser = argparse.ArgumentParser(description="Apply apps to the lines of standard input.")
    parser.add_argument("--app", action="append", required=True, help="may be given several times")
    given = parser.parse_args()
    texts = sys.stdin.buffer.read().decode("utf-8", "replace").splitlines()
    try:
        results = Runner(Path(__file__).parent).predict(texts, given.app)
    except RunnerError as error:
        sys.exit(f"error: {error}")
    for row in zip(*results.values(), strict=True):
        sys.stdout.write(json.dumps(dict(zip(results, row, strict=True)), ensure_ascii=False) + "\n")


if __name__ == "__main__":
    _main()
