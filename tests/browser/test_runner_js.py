"""The JavaScript runner in Node: words, decoding, results and refusals are those of the Python ones."""

import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from browser_tools import MODULE, awkward_texts, without_utf16
from conftest import SENTENCES, assert_close, make_tokenizer
from safetensors import safe_open
from safetensors.numpy import load_file, save
from test_prefix import add_prefixed, words_head
from tokenizers import Tokenizer, normalizers, pre_tokenizers

from modeling_mtpf import MtpfModel
from modeling_mtpf.export import export_onnx, runner
from modeling_mtpf.model.texts_mtpf import plain_backend

pytest_plugins = ["browser_fixtures"]


def backends() -> dict[str, Tokenizer]:
    """Return tokenizers that normalize and split in all ways that encoders of text use."""
    pieces, byte_level = (plain_backend(make_tokenizer(kind)) for kind in (False, True))

    def changed(normalizer, pre_tokenizer=None, base=pieces):
        tokenizer = Tokenizer.from_str(base.to_str())
        tokenizer.normalizer = normalizer
        if pre_tokenizer is not None:
            tokenizer.pre_tokenizer = pre_tokenizer
        return tokenizer

    sequence, splits = normalizers.Sequence, pre_tokenizers
    marks = sequence([normalizers.NFD(), normalizers.StripAccents(), normalizers.Strip()])
    return {
        "bert": pieces,
        "bert-cased": changed(normalizers.BertNormalizer(lowercase=False)),
        "bert-accents": changed(normalizers.BertNormalizer(lowercase=True, strip_accents=False)),
        "byte-level": byte_level,
        "byte-level-nfc": changed(normalizers.NFC(), base=byte_level),
        "metaspace": changed(
            sequence([normalizers.NFKC(), normalizers.Lowercase(), normalizers.Replace("x", "yz")]),
            splits.Sequence([splits.WhitespaceSplit(), splits.Metaspace()]),
        ),
        "digits": changed(
            marks, splits.Sequence([splits.Whitespace(), splits.Digits(individual_digits=True)])
        ),
    }


IDS_OF = """
import { Tokenizer } from "@huggingface/tokenizers";
import { WordTokenizer } from "./tokens.js";
const tokenizer = new WordTokenizer(JSON.parse(input.tokenizer), Tokenizer);
console.log(JSON.stringify(input.texts.map((text) => {
  const { ids, words } = tokenizer.encode(text);
  return { ids, words: words.map(({ first, start, end }) => [first, start, end]) };
})));"""


@pytest.mark.parametrize("kind", backends())
def test_words_are_those_of_the_tokenizers_library(kind, node):
    tokenizer = backends()[kind]
    texts = [text for text in awkward_texts(600) if "\ud800" not in text]
    expected = []
    for encoding in tokenizer.encode_batch(texts, add_special_tokens=False):
        words: dict[int, tuple[int, int, int]] = {}
        for token, (word, (start, end)) in enumerate(zip(encoding.word_ids, encoding.offsets, strict=True)):
            first, low, high = words.get(word, (token, start, end))
            words[word] = first, min(low, start), max(high, end)
        expected.append({"ids": encoding.ids, "words": [list(word) for word in words.values()]})
    results = node(IDS_OF, {"tokenizer": tokenizer.to_str(), "texts": texts})
    wrong = [text for text, one, other in zip(texts, results, expected, strict=True) if one != other]
    assert not wrong


@pytest.mark.slow
@pytest.mark.parametrize("lowercase", [True, False])
def test_every_character_is_read_as_by_the_tokenizers_library(lowercase, node):
    """But a few that later versions of Unicode than the library's decompose."""
    tokenizer = Tokenizer.from_str(backends()["byte-level"].to_str())
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    bytes_of = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )  # so that ids tell characters
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.BertPreTokenizer(), bytes_of])
    codes = [code for code in (*range(0x33500), *range(0xE0000, 0xE0200)) if not 0xD800 <= code < 0xE000]
    texts = [f"a{chr(code)}b" for code in codes]
    expected = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    results = node(IDS_OF, {"tokenizer": tokenizer.to_str(), "texts": texts})
    wrong = [hex(c) for c, one, other in zip(codes, results, expected, strict=True) if one["ids"] != other]
    assert len(wrong) < 40, wrong


def test_tags_are_decoded_as_by_the_python_runner(node):
    generator = np.random.default_rng(0)
    schemes = [["I-LOC", "B-PER", "O", "B-LOC", "I-PER", "I-ORG"], ["O", "B-A-B", "I-A-B", "B", "I-A"]]
    cases = [
        {"labels": labels, "scores": generator.normal(size=(words, len(labels))).tolist()}
        for labels in schemes
        for words in [*range(0, 9)] * 30
    ]
    results = node(
        'import { decode } from "./runner.js";'
        "console.log(JSON.stringify(input.map(({ labels, scores }) => decode(scores, labels))));",
        cases,
    )
    expected = [
        runner._decode(np.array(case["scores"]).reshape(-1, len(case["labels"])), case["labels"])
        for case in cases
    ]
    assert results == expected


TYPED = """
import { RunnerError, fromUrl } from "MODULE/runner.js";
import { openFolder, type Entity, type Runner } from "MODULE/node.js";
const runner: Runner = await openFolder("phone", { intraOpNumThreads: 1 });
const results = await runner.predict(["Hi"], ["intent"], { topK: null, threshold: 0.5 });
const entities = results.entities[0] as Entity[];
export const start: number = entities[0].utf16_start;
export const read: (name: string) => Promise<ArrayBuffer> = fromUrl("http://localhost/phone/");
export const error: Error = new RunnerError("no");
// @ts-expect-error: a number is no text
await runner.predict(5, ["intent"]);
// @ts-expect-error: no such option
await runner.predict("Hi", ["intent"], { top_k: 3 });
// @ts-expect-error: a list for each app
export const label: string = results.intent;
"""


def test_types_are_those_that_the_comments_say(node, tmp_path):
    """TypeScript checks the runner, and a program in which three calls must be wrong."""
    compiler = MODULE / "node_modules" / "typescript" / "bin" / "tsc"
    if not compiler.is_file():
        pytest.skip("typescript is missing; run: npm ci --ignore-scripts --prefix demo/browser")
    program = tmp_path / "use.mts"
    program.write_text(TYPED.replace("MODULE", MODULE.as_posix()))
    flags = "--noEmit --allowJs --checkJs --strict --skipLibCheck --target esnext --module nodenext".split()
    done = subprocess.run(["node", compiler, *flags, program], cwd=MODULE, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


OPEN = """
import { openFolder } from "./node.js";
const attempt = async (work) => {
  try { return await work(); } catch (error) { return error.name + ": " + error.message; }
};
"""


def test_results_in_node_are_those_of_the_python_runner(page_export, native):
    texts = awkward_texts(200)
    apps = ["entities", "intent", "moods", "short"]
    results = native(
        OPEN + "const runner = await openFolder(input.folder, { intraOpNumThreads: 1 });"
        "console.log(JSON.stringify(await runner.predict(input.texts, input.apps, { batchSize: 7 })));",
        {"folder": str(page_export), "texts": texts, "apps": apps},
    )
    expected = runner.Runner(page_export, threads=1).predict(texts, apps)
    assert sum(map(len, expected["entities"])) > 100
    assert len({len(labels) for labels in expected["moods"]}) > 1
    assert_close(without_utf16(results, texts), expected)


@pytest.mark.slow
def test_apps_with_and_without_a_prefix_give_what_the_python_runner_gives(folders, native, tmp_path):
    """Those without one have inputs of no slots."""
    model = MtpfModel.from_pretrained(folders / "backbone").eval()
    head = words_head()
    head.bias.data[0] -= 20
    add_prefixed(model, "slots", 3, head)
    model.save_adapter(tmp_path / "slots", "slots")
    export_onnx(folders / "backbone", [tmp_path / "slots", folders / "intent"], tmp_path / "phone")
    names, texts = ["slots", "intent"], awkward_texts(60)
    results = native(
        OPEN + "const runner = await openFolder(input.folder);"
        "console.log(JSON.stringify(await runner.predict(input.texts, input.names)));",
        {"folder": str(tmp_path / "phone"), "texts": texts, "names": names},
    )
    expected = runner.Runner(tmp_path / "phone", threads=1).predict(texts, names)
    assert any(expected["slots"])
    assert_close(without_utf16(results, texts), expected)


def test_texts_in_scope_are_those_of_the_python_runner(page_export, native):
    apps = ["entities", "intent"]
    texts = [*awkward_texts(60), *SENTENCES]
    script = "const runner = await openFolder(input.folder);"
    script += "console.log(JSON.stringify(await runner.predict(input.texts, input.apps, { inScope: true })));"
    results = native(OPEN + script, {"folder": str(page_export), "texts": texts, "apps": apps})
    expected = runner.Runner(page_export, threads=1).predict(texts, apps, in_scope=True)
    assert {row["in_scope"] for row in expected["intent"]} == {True, False}
    assert [row["in_scope"] for row in results["intent"]] == [row["in_scope"] for row in expected["intent"]]
    assert_close(without_utf16(results, texts), expected)


def test_top_k_and_threshold_are_those_of_predict(page_export, native, folders):
    from modeling_mtpf import MtpfModel

    model = MtpfModel.from_pretrained(folders / "backbone").eval()
    for name in ("entities", "intent"):
        model.load_adapter(folders / name)
    options = [{"topK": 1}, {"topK": 3}, {"topK": None}, {"topK": 2, "threshold": 0.4}, {"threshold": 0.99}]
    results = native(
        OPEN + "const runner = await openFolder(input.folder); const results = [];"
        "for (const options of input.options)"
        "  results.push(await runner.predict(input.texts, ['entities', 'intent'], options));"
        "console.log(JSON.stringify(results));",
        {"folder": str(page_export), "texts": SENTENCES, "options": options},
    )
    for result, chosen in zip(results, options, strict=True):
        keywords = {"top_k": chosen.get("topK", 1), "threshold": chosen.get("threshold")}
        expected = model.predict(SENTENCES, ["entities", "intent"], **keywords)
        assert_close(without_utf16(result, SENTENCES), expected)


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda m: m.pop("files"), "not a folder of mtpf export, or damaged: export.json"),
        (lambda m: m.update(format_version=2), "format_version is 2"),
        (lambda m: m.update(max_length="x"), "max_length is"),
        (lambda m: m.update(window_overlap=1), "window_overlap is 1"),
        (lambda m: m.update(special_tokens=[[-1], []]), "special_tokens is"),
        (lambda m: m["apps"]["intent"].update(file="../intent.safetensors"), "files is"),
        (
            lambda m: m["apps"]["intent"].update(file="apps/none.safetensors"),
            "apps/none.safetensors cannot be read",
        ),
        (lambda m: m["files"]["trunk.onnx"].update(sha256="0" * 64), "trunk.onnx is missing or not the file"),
        (lambda m: m.update(needs_onnxruntime=[99, 0]), "install 99.0 or newer"),
    ],
)
def test_a_damaged_export_is_refused_in_one_sentence(damage, message, page_export, native, tmp_path):
    folder = shutil.copytree(page_export, tmp_path / "copy")
    manifest = json.loads((folder / "export.json").read_text())
    damage(manifest)
    (folder / "export.json").write_text(json.dumps(manifest))
    script = OPEN + "console.log(JSON.stringify(await attempt(() => openFolder(input))));"
    error = native(script, str(folder))
    assert error.startswith("RunnerError: ") and message in error and "\n" not in error


def test_wrong_calls_are_refused_in_one_sentence(page_export, native):
    script = """
const runner = await openFolder(input);
const calls = [["Hi", ["date"]], [["Hi", null], ["intent"]], [["Hi"], ["intent"], { topK: 0 }],
  [["Hi"], ["intent"], { threshold: 2 }], [["Hi"], ["intent"], { batchSize: 0.5 }],
  [["Hi"], ["intent"], { inScope: true, topK: 2 }], [["Hi"], ["entities", "moods"], { inScope: true }]];
const errors = [];
for (const call of calls) errors.push(await attempt(() => runner.predict(...call)));
console.log(JSON.stringify([errors, await runner.predict([], ["intent"])]));"""
    errors, nothing = native(OPEN + script, str(page_export))
    expected = [
        "no app 'date'; this export has: ",
        "Text 1 is null",
        "topK is 0",
        "threshold is 2",
        "batchSize is 0.5",
        "leave topK, which is 2, at 1",
        "App 'moods' cannot say what is out of scope",
    ]
    for error, part in zip(errors, expected, strict=True):
        assert error.startswith("RunnerError: ") and part in error
    assert nothing == {"intent": []}


def test_parts_of_a_bundle_give_what_apps_of_their_heads_give(page_export, native, tmp_path):
    """One LoRA with the heads of two parts next to each other, made from an app of the same LoRA."""
    folder = Path(shutil.copytree(page_export, tmp_path / "copy"))
    manifest = json.loads((folder / "export.json").read_text())
    path = folder / manifest["apps"]["entities"]["file"]
    tensors = load_file(path)
    with safe_open(path, "numpy") as file:
        app = json.loads(file.metadata()["app"])
    part = {key: app[key] for key in ("kind", "labels", "max_length")}
    moods = {
        "name": "moods",
        "kind": "text-classification",
        "labels": app["labels"],
        "max_length": app["max_length"],
    }
    bundle = {**app, "kind": "bundle", "parts": [{"name": "tags", **part}, moods]}
    single = {**app, "kind": "text-classification"}
    for name in ("head.weight", "head.bias"):
        tensors[name] = np.concatenate([tensors[name], tensors[name]], axis=-1)
    for name, about, of in (("both", bundle, tensors), ("single", single, load_file(path))):
        data = save(of, metadata={"app": json.dumps(about)})
        (folder / "apps" / f"{name}.safetensors").write_bytes(data)
        entry = {
            "file": f"apps/{name}.safetensors",
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
        }
        manifest["apps"][name] = {**entry, "kind": about["kind"]}
    (folder / "export.json").write_text(json.dumps(manifest))
    names = ["both", "both/tags", "tags", "both/moods", "entities", "single"]
    script = """
const runner = await openFolder(input.folder);
const results = await runner.predict(input.texts, input.names);
console.log(JSON.stringify([results, await attempt(() => runner.predict("Hi", ["none"]))]));"""
    results, error = native(OPEN + script, {"folder": str(folder), "texts": SENTENCES, "names": names})
    assert results["tags"] == results["both/tags"]
    assert results["both"] == [
        {"tags": tags, "moods": mood}
        for tags, mood in zip(results["tags"], results["both/moods"], strict=True)
    ]
    assert any(results["tags"])
    assert_close(results["tags"], results["entities"])
    assert_close(results["both/moods"], results["single"])
    assert "There is no app 'none'; this export has: " in error and "both/tags" in error
