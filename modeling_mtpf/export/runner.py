# mypy: ignore-errors
"""Run the apps of an `mtpf export` without torch: ``python runner.py --app entities < texts.txt``."""

import argparse
import base64
import contextlib
import hashlib
import json
import re
import sys
import unicodedata
from pathlib import Path

import numpy as np
import onnxruntime as ort
import tokenizers


class RunnerError(ValueError):
    """A folder, an app or a text that cannot be used."""


@contextlib.contextmanager
def _refused(what):
    """Raise `RunnerError` for whatever goes wrong inside; tokenizers may panic, which is not an Exception."""
    try:
        yield
    except RunnerError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = str(error).splitlines() or [""]
        raise RunnerError(f"{what} ({type(error).__name__}: {reason[0][:200]}).") from error


def _check(*facts):
    """Raise `ValueError` for the first (name, value, whether it is accepted) that is not."""
    for name, value, accepted in facts:
        if not accepted:
            raise ValueError(f"{name} is {value!r}"[:200])


def _whole(value, low, high):
    return type(value) is int and low <= value <= high


class Runner:
    """The apps of one exported folder; threads may share it. ``threads=0`` uses all cores."""

    def __init__(self, folder=".", threads=0):
        folder = Path(folder)
        with _refused(f"{folder} is not a folder of mtpf export, or damaged: export.json"):
            with open(folder / "export.json", encoding="utf-8") as file:
                self.manifest = manifest = json.loads(file.read(10_000_000))
            needed, apps = manifest["needs_onnxruntime"], manifest["apps"]
            listed = {**manifest["files"], **{app["file"]: app for app in apps.values()}}
            self.before, self.after = manifest["special_tokens"]
            hashes = {folder / name: entry["sha256"] for name, entry in listed.items()}
            needs = {"trunk.onnx", "tail.onnx", "tokenizer.json"}
            inside = [(folder / name).resolve().is_relative_to(folder.resolve()) for name in listed]
            overlap, special = manifest["window_overlap"], [*self.before, *self.after]
            _check(
                ("format_version", version := manifest["format_version"], version == 1),
                ("max_length", most := manifest["max_length"], _whole(most, 3, 10**6)),
                ("pad_token_id", pad := manifest["pad_token_id"], _whole(pad, 0, 10**7)),
                ("window_overlap", overlap, type(overlap) is float and 0 <= overlap <= 0.9),
                ("special_tokens", special, all(_whole(i, 0, 10**7) for i in special) and len(special) <= 64),
                ("files", list(listed), all(inside) and needs <= listed.keys()),
                ("needs_onnxruntime", needed, len(needed) == 2 and all(_whole(i, 0, 10**6) for i in needed)),
            )
        if [int(part) for part in ort.__version__.split(".")[:2]] < needed:
            raise RunnerError(f"onnxruntime is {ort.__version__}; install {needed[0]}.{needed[1]} or newer.")
        for path, digest in hashes.items():
            if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != digest:
                name = ascii(str(path))  # which may hold what a terminal obeys
                raise RunnerError(f"{name} is missing or not the file that was exported; export it again.")
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        # Otherwise the waiting threads of one session spin and take the cores from the other.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        with _refused(f"onnxruntime cannot read the graphs in {folder}"):
            self.trunk = ort.InferenceSession(folder / "trunk.onnx", options, ["CPUExecutionProvider"])
            self.tail = ort.InferenceSession(folder / "tail.onnx", options, ["CPUExecutionProvider"])
        with _refused(f"The tokenizer of {folder} is damaged; export it again"):
            self.tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
            self.tokenizer.encode("Call Ada at 5pm \U0010ffff", add_special_tokens=False)
        with _refused(f"An app of {folder} is damaged; export it again"):
            self.apps = {name: self._app((folder / app["file"]).read_bytes()) for name, app in apps.items()}

    def _app(self, data):
        """Read safetensors: eight bytes with the length of the header, the header, the tensors."""
        start = 8 + int.from_bytes(data[:8], "little")
        header, inputs = json.loads(data[8:start]), {}
        app = json.loads(header.pop("__metadata__")["app"])
        for name, entry in header.items():
            first, last = (start + offset for offset in entry["data_offsets"])
            values = np.frombuffer(data[first:last], {"F32": "<f4", "F16": "<f2"}[entry["dtype"]])
            inputs[name] = values.astype(np.float32).reshape(entry["shape"])
        listed, parts, total = app["parts"] if app["kind"] == "bundle" else [{**app, "name": ""}], {}, 0
        for part in listed:
            labels, name = part["labels"], part["name"]
            _check(
                ("kind", part["kind"], part["kind"] in ("text-classification", "token-classification")),
                ("labels", labels, isinstance(labels, list) and all(isinstance(x, str) for x in labels)),
                ("name", name, isinstance(name, str) and name not in parts),
            )
            total += len(labels)
            parts[name] = {**part, "columns": slice(total - len(labels), total)}
            if scope := part.get("scope"):
                parts[name]["scope"] = _read_scope(scope, len(labels))
        _check(
            ("max_length", app["max_length"], _whole(app["max_length"], 3, 10**6)),
            ("number of labels", total, parts and inputs["head.weight"].shape[1:] == (total,)),
            *((name, "not finite", np.isfinite(values).all()) for name, values in inputs.items()),
        )
        return {**app, "inputs": inputs, "parts": parts}

    def _find(self, name):
        """Return the app and the part that a name means; no part for all of a bundle."""
        if name in self.apps:
            return name, None if self.apps[name]["kind"] == "bundle" else ""
        every = [(app, part) for app in self.apps for part in self.apps[app]["parts"] if part]
        fitting = [(app, part) for app, part in every if name in (part, f"{app}/{part}")]
        if len(fitting) != 1:
            known = ", ".join([*self.apps, *(f"{app}/{part}" for app, part in every)])
            what = "Several bundles have a part" if fitting else "There is no app"
            raise RunnerError(f"{what} {name!r}; this export has: {known}.")
        return fitting[0]

    def predict(self, texts, apps, batch_size=32, in_scope=False):
        """Return for each app one result per text, as ``MtpfModel.predict`` does.

        A name is that of an app, of a bundle, ``bundle/part``, or a part's that nothing else has.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        if wrong := [(i, type(text).__name__) for i, text in enumerate(texts) if not isinstance(text, str)]:
            raise RunnerError(f"Text {wrong[0][0]} is {wrong[0][1]}, not a string.")
        meant, parts = {name: self._find(name) for name in apps}, {}
        for app, part in meant.values():
            parts.setdefault(app, set()).update(self.apps[app]["parts"] if part is None else [part])
        about = {(app, part): self.apps[app]["parts"][part] for app in parts for part in parts[app]}
        kinds = {key: part.get("problem_type") or part["kind"] for key, part in about.items()}
        lacking = [
            k for k, part in about.items() if kinds[k] != "token-classification" and not part.get("scope")
        ]
        if in_scope and lacking:
            name = "/".join(filter(None, lacking[0]))
            raise RunnerError(f"App {name!r} cannot say what is out of scope; leave out in_scope.")
        lone = dict.fromkeys(range(0xD800, 0xE000), 0xFFFD)  # surrogates, which no tokenizer takes
        with _refused("The tokenizer cannot read a text"):
            encoded = self.tokenizer.encode_batch(
                [t.translate(lone) for t in texts], add_special_tokens=False
            )
        windows = self._windows([len(tokens.ids) for tokens in encoded], parts)
        order = sorted(windows, key=lambda window: window[2] - window[1])
        pieces = {(app, part): [[] for _ in texts] for app in parts for part in parts[app]}
        for batch in (order[at : at + batch_size] for at in range(0, len(order), batch_size)):
            rows = [[*self.before, *encoded[text].ids[i:j], *self.after] for text, i, j in batch]
            mask = np.array([[1] * len(r) + [0] * (len(rows[-1]) - len(r)) for r in rows], np.int64)
            ids = np.full_like(mask, self.manifest["pad_token_id"])
            ids[mask == 1] = np.concatenate(rows)
            with _refused("onnxruntime cannot run the trunk"):
                hidden = self.trunk.run(None, {"input_ids": ids, "attention_mask": mask})[0]
            for name in {name for window in batch for name in windows[window]}:
                part = [row for row, window in enumerate(batch) if name in windows[window]]
                data = {"hidden_states": hidden[part], "attention_mask": mask[part]}
                with _refused(f"onnxruntime cannot run the tail with the app {name!r}"):
                    logits = self.tail.run(["logits"], data | self.apps[name]["inputs"])[0]
                for row, scores in zip(part, logits, strict=True):
                    if not np.isfinite(scores[: len(rows[row])]).all():
                        raise RunnerError(f"The app {name!r} gives scores that are not finite numbers.")
                    for part in parts[name]:
                        logits_of_part = scores[: len(rows[row]), self.apps[name]["parts"][part]["columns"]]
                        piece = batch[row][1], logits_of_part, windows[batch[row]][name]
                        pieces[name, part][batch[row][0]].append(piece)
        for (name, part), by_text in pieces.items():
            of_part = about[name, part]
            result = self._label if of_part["kind"] == "text-classification" else self._entities
            rows = zip(texts, encoded, map(sorted, by_text), strict=True)
            several = kinds[name, part] == "multi_label_classification"
            result = self._label_set if several else result
            pieces[name, part] = [result(*row, of_part["labels"]) for row in rows]
            if in_scope and kinds[name, part] == "text-classification":
                for row, texts_pieces in zip(pieces[name, part], by_text, strict=True):
                    row["in_scope"] = _contains(
                        of_part["scope"], _average(texts_pieces, lambda logits: logits)
                    )
        return {
            name: pieces[app, part]
            if part is not None
            else [{p: pieces[app, p][i] for p in self.apps[app]["parts"]} for i in range(len(texts))]
            for name, (app, part) in meant.items()
        }

    def _windows(self, sizes, apps):
        """Return windows (text, first sub-word, end): app → the part of the window that it labels."""
        windows, shift = {}, len(self.before)
        for name in apps:
            most = min(self.manifest["max_length"], self.apps[name]["max_length"])
            room = most - shift - len(self.after)
            step = max(1, room - int(most * self.manifest["window_overlap"]))
            for text, size in enumerate(sizes):
                cuts = [(i, min(i + room, size)) for i in range(0, max(1, size - room + step), step)]
                # In the middle of an overlap both windows show as much of a word's surroundings.
                inner = [(left[1] + right[0]) // 2 for left, right in zip(cuts, cuts[1:], strict=False)]
                for (i, j), low, high in zip(cuts, [0, *inner], [*inner, size], strict=True):
                    windows.setdefault((text, i, j), {})[name] = slice(shift + low - i, shift + high - i)
        return windows

    def _label(self, text, tokens, pieces, labels):
        mean = _average(pieces, _softmax)
        return {"label": labels[int(mean.argmax())], "score": float(mean.max())}

    def _label_set(self, text, tokens, pieces, labels):
        mean = _average(pieces, lambda logits: 0.5 + 0.5 * np.tanh(logits / 2))  # sigmoid
        best = [int(i) for i in np.argsort(-mean, kind="stable") if mean[i] >= 0.5]
        return [{"label": labels[i], "score": float(mean[i])} for i in best]

    def _entities(self, text, tokens, pieces, labels):
        """Label words by their first sub-word with the best valid IOB2 tags, and join them."""
        scores = _softmax(np.concatenate([logits[part] for _, logits, part in pieces]))  # (tokens, labels)
        words, runs, group = {}, [], None
        for token, (word, (start, end)) in enumerate(zip(tokens.word_ids, tokens.offsets, strict=True)):
            first, low, high = words.get(word, (token, start, end))
            words[word] = first, min(low, start), max(high, end)
        # Byte-level tokenizers count the space before a word as part of it.
        spans = [(t, j - len(text[i:j].lstrip()), j) for word, (t, i, j) in words.items() if word is not None]
        symbol = re.compile(r"(?s)(?=.*[\ufe0f\u20e3\u2190-\u21ff\u2300-\u2bff\U0001f000-\U0001faff])[\W_]*")
        spans = [(t, i, j) for t, i, j in spans if i < j and not symbol.fullmatch(text[i:j])]  # words alone
        limits = [*(start for _, start, _ in spans[1:]), len(text)]
        scores = scores[[token for token, _, _ in spans]]
        tags = _decode(np.log(np.maximum(scores, 1e-30)), labels)
        for row, best, (_, start, end), limit in zip(scores, tags, spans, limits, strict=False):
            while end < limit and unicodedata.category(text[end])[0] == "M":  # marks that tokenizers strip
                end += 1
            prefix, _, kind = labels[best].partition("-")
            if prefix == "I" and kind == group:
                runs[-1].update(end=end, score=[*runs[-1]["score"], row[best]])
            elif prefix in ("B", "I"):
                runs.append(dict(entity_group=kind, score=[row[best]], word="", start=start, end=end))
            group = kind if prefix in ("B", "I") else None
        return [{**s, "score": float(np.mean(s["score"])), "word": text[s["start"] : s["end"]]} for s in runs]


def _decode(scores, labels):
    """Return the best labels of words, from log-probabilities, in which I-X follows B-X or I-X (Viterbi)."""
    continues = np.array([label[:2] == "I-" and "B" + label[1:] in labels for label in labels])
    kinds = np.array([label[2:] if label[:2] in ("B-", "I-") else "" for label in labels])
    step = np.where(~continues | (kinds[:, None] == kinds), 0, -np.inf)
    total, steps = np.where(continues, -np.inf, 0), []
    for row in scores:
        steps.append((total[:, None] + step).argmax(0))
        total = (total[:, None] + step).max(0) + row if len(steps) > 1 else total + row
    best = [int(total.argmax())] if steps else []
    for back in steps[:0:-1]:
        best.append(int(back[best[-1]]))
    return best[::-1]


def _average(pieces, probabilities):
    """Average the probabilities of a text's windows, weighted by their length."""
    every = [probabilities(logits.mean(0)) for _, logits, _ in pieces]
    return np.average(every, axis=0, weights=[len(logits) for _, logits, _ in pieces])


def _read_scope(scope, labels):
    read = {"threshold": scope["threshold"]}
    for name in ("projection", "means", "background"):
        *shape, data = scope[name]
        read[name] = np.frombuffer(base64.b64decode(data), "<f2").astype(np.float32).reshape(shape)
    shapes = read["projection"].shape, read["background"].shape, read["means"].shape[1:]
    axes = shapes[0][-1]
    _check(
        ("scope", shapes, shapes == ((labels, axes), (2, axes), (axes,))),
        ("threshold of scope", read["threshold"], np.isfinite(read["threshold"])),
    )
    return read


def _contains(scope, logits):
    """Say whether a text's logits lie where those of the training texts do, as ``Scope.contains`` does."""
    logits = logits - logits.max()
    point = logits @ scope["projection"]
    near = ((point - scope["means"]) ** 2).sum(-1).min()
    far = ((point - scope["background"][0]) ** 2 * scope["background"][1]).sum()
    return bool(far - near - np.log(np.exp(logits).sum()) >= scope["threshold"])


def _softmax(logits):
    return (powers := np.exp(logits - logits.max(-1, keepdims=True))) / powers.sum(-1, keepdims=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Apply apps to the lines of standard input.")
    parser.add_argument("--app", action="append", required=True, help="may be given several times")
    parser.add_argument("--in_scope", action="store_true", help="say which texts are about what an app knows")
    options = parser.parse_args()
    lines = [line.decode("utf-8", "replace").rstrip("\r\n") for line in sys.stdin.buffer]
    try:
        results = Runner(Path(__file__).parent).predict(lines, options.app, in_scope=options.in_scope)
    except RunnerError as error:
        sys.exit(f"error: {error}")
    for line in zip(*results.values(), strict=True):
        sys.stdout.write(json.dumps(dict(zip(results, line, strict=True)), ensure_ascii=False) + "\n")
