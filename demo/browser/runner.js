/** Run the apps of an `mtpf export` in a browser or in Node: what `runner.py` does, with the same results. */

import { RunnerError, WordTokenizer } from "./tokens.js";

export { RunnerError, WordTokenizer };

/**
 * @typedef {{label: string | null, score: number, in_scope?: boolean}} Label
 * @typedef {{entity_group: string, score: number, word: string, start: number, end: number, utf16_start: number, utf16_end: number}} Entity
 *   `start` and `end` count characters, as in Python; `text.slice(utf16_start, utf16_end)` is the word.
 * @typedef {Label | Label[] | Entity[] | Record<string, Label | Label[] | Entity[]>} Result
 *   Of a text app, a text app with any number of labels, a token app, and a bundle: for each part its result.
 * @typedef {{threshold: number, projection: number[][], means: number[][], background: number[][]}} Scope
 * @typedef {{name: string, kind: string, labels: string[], problem_type?: string, first: number, scope?: Scope}} Part
 *   A head: its labels are the columns of the logits from `first` on. An app that is no bundle has one, named "".
 * @typedef {{name: string, kind: string, max_length: number, parts: Map<string, Part>, inputs: Record<string, any>}} App
 * @typedef {{batchSize?: number, topK?: number | null, threshold?: number | null, inScope?: boolean}} PredictOptions
 *   As of `MtpfModel.predict`: `topK` labels of a text app (`null`: all), the least score of entities and labels, and
 *   whether text apps say, as `in_scope`, that a text is about anything that they were fitted on.
 * @typedef {(name: string, sha256?: string) => Promise<ArrayBuffer>} ReadFile Reads a file of the export.
 * @typedef {{ort: any, Tokenizer: new (tokenizer: any, config: any) => any, session?: object}} Libraries
 *   onnxruntime-web or onnxruntime-node, the class of `@huggingface/tokenizers`, options of the sessions.
 * @typedef {{start: number, part: [number, number], rows: number[][]}} Window Logits of a window of a text, a row a
 *   token, and the rows that label words.
 */

const KINDS = ["text-classification", "token-classification"];
const NEEDED = ["trunk.onnx", "tail.onnx", "tokenizer.json"];
/** Emoji, arrows and pictographs. */
const SYMBOL = /[\ufe0f\u20e3\u2190-\u21ff\u2300-\u2bff\u{1f000}-\u{1faff}]/u;
/** What Python's `str.strip` takes away. */
const LEADING = /^[\t-\r\x1c-\x20\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+/;

/** Files of an export at an address. @param {string | URL} folder @returns {ReadFile} */
export function fromUrl(folder) {
  return async (name, sha256) => {
    const url = new URL(name, folder);
    if (sha256) url.searchParams.set("sha256", sha256.slice(0, 16)); // no cache gives the file of an older export
    const response = await fetch(url);
    if (!response.ok) throw new RunnerError(`${url} cannot be read (status ${response.status}).`);
    return response.arrayBuffer();
  };
}

/** The apps of one export. */
export class Runner {
  /**
   * Open an export.
   * @param {ReadFile} read @param {Libraries} libraries @returns {Promise<Runner>}
   * @throws {RunnerError} It is not an export, or damaged, or needs a newer onnxruntime.
   */
  static async open(read, { ort, Tokenizer, session = {} }) {
    const runner = new Runner();
    await refused("This is not a folder of mtpf export, or damaged: export.json", async () => {
      runner.manifest = JSON.parse(new TextDecoder().decode(await read("export.json")));
      checkManifest(runner.manifest);
    });
    const { manifest } = runner;
    const [major, minor] = ort.env.versions.common.split(".").map(Number);
    const [oldMajor, oldMinor] = manifest.needs_onnxruntime;
    if (major < oldMajor || (major === oldMajor && minor < oldMinor))
      throw new RunnerError(`onnxruntime is ${major}.${minor}; install ${oldMajor}.${oldMinor} or newer.`);
    runner.ort = ort;
    const file = async (/** @type {string} */ name, /** @type {{sha256: string, bytes?: number}} */ entry) => {
      const data = await refused(`${name} cannot be read`, () => read(name, entry.sha256));
      if (!(await isFile(data, entry)))
        throw new RunnerError(`${name} is missing or not the file that was exported; export it again.`);
      return data;
    };
    const graph = async (/** @type {string} */ name) => {
      const data = await file(name, manifest.files[name]);
      return refused(`onnxruntime cannot read ${name}`, () => ort.InferenceSession.create(new Uint8Array(data), session));
    };
    const words = async () => {
      const data = await file("tokenizer.json", manifest.files["tokenizer.json"]);
      return refused("The tokenizer is damaged; export it again", () => {
        const tokenizer = new WordTokenizer(JSON.parse(new TextDecoder().decode(data)), Tokenizer);
        tokenizer.encode("Call Ada at 5pm \u{10ffff}");
        return tokenizer;
      });
    };
    /** @type {[string, any][]} */ const listed = Object.entries(manifest.apps);
    // The tokenizer is made while other threads read the graphs and compile onnxruntime.
    const [tokenizer, trunk, tail, ...apps] = await Promise.all([
      words(),
      graph("trunk.onnx"),
      graph("tail.onnx"),
      ...listed.map(([, entry]) => file(entry.file, entry)),
    ]);
    Object.assign(runner, { tokenizer, trunk, tail });
    for (const [index, [name]] of listed.entries()) {
      await refused(`The app ${name} is damaged; export it again`, () => {
        runner.apps.set(name, readApp(apps[index], name, ort));
      });
    }
    return runner;
  }

  constructor() {
    /** @type {any} */ this.manifest = null;
    /** @type {any} */ this.ort = null;
    /** @type {any} */ this.trunk = null;
    /** @type {any} */ this.tail = null;
    /** @type {WordTokenizer} */ this.tokenizer = /** @type {any} */ (null);
    /** @type {Map<string, App>} */ this.apps = new Map();
  }

  /**
   * Apply apps to texts: the trunk once for a batch, the tail once for each app or bundle. A name is that of an
   * app, of a bundle, `bundle/part`, or a part's that nothing else has.
   * @param {string | string[]} texts @param {string[]} names @param {PredictOptions} [options]
   * @returns {Promise<Record<string, Result[]>>} For each app a result for each text.
   * @throws {RunnerError} A text is not a string, there is no such app, or an option is invalid.
   */
  async predict(texts, names, options = {}) {
    const rows = typeof texts === "string" ? [texts] : [...texts];
    this.#check(rows, options);
    const meant = names.map((name) => this.#find(name));
    if (options.inScope) checkScope(meant);
    const encoded = rows.map((text) => this.tokenizer.encode(text));
    /** @type {Map<string, Window[][]>} */ const pieces = new Map(meant.map(([{ name }]) => [name, rows.map(() => [])]));
    const windows = this.#windows(encoded.map(({ ids }) => ids.length), [...pieces.keys()]);
    const order = [...windows.values()].sort((a, b) => a.end - a.start - (b.end - b.start));
    const { batchSize = 32 } = options;
    for (let at = 0; at < order.length; at += batchSize)
      await this.#runBatch(order.slice(at, at + batchSize), encoded, pieces);
    for (const windows of [...pieces.values()].flat()) windows.sort((a, b) => a.start - b.start);
    const resultOf = (/** @type {Part} */ part, /** @type {Window[]} */ windows, /** @type {number} */ text) => {
      const end = part.first + part.labels.length;
      const own = windows.map((window) => ({ ...window, rows: window.rows.map((row) => row.slice(part.first, end)) }));
      if (part.kind === KINDS[0]) return labelsOf(own, part, options);
      return entitiesOf(rows[text], encoded[text].words, own, part.labels, options.threshold ?? 0);
    };
    /** @type {Record<string, Result[]>} */ const results = {};
    meant.forEach(([{ name, parts }, part], index) => {
      const byText = /** @type {Window[][]} */ (pieces.get(name));
      results[names[index]] = byText.map((windows, text) => {
        if (part) return resultOf(part, windows, text);
        return Object.fromEntries([...parts].map(([key, each]) => [key, resultOf(each, windows, text)]));
      });
    });
    return results;
  }

  /** The app and the part that a name means; no part for all of a bundle. @param {string} name @returns {[App, Part | null]} */
  #find(name) {
    const app = this.apps.get(name);
    if (app) return [app, app.parts.get("") ?? null];
    /** @type {[App, Part][]} */ const every = [...this.apps.values()].flatMap((bundle) =>
      [...bundle.parts.values()].flatMap((part) => (part.name ? [/** @type {[App, Part]} */ ([bundle, part])] : [])),
    );
    const fitting = every.filter(([bundle, part]) => name === part.name || name === `${bundle.name}/${part.name}`);
    if (fitting.length === 1) return fitting[0];
    const known = [...this.apps.keys(), ...every.map(([bundle, part]) => `${bundle.name}/${part.name}`)].join(", ");
    throw new RunnerError(`${fitting.length ? "Several bundles have a part" : "There is no app"} '${name}'; this export has: ${known}.`);
  }

  /** @param {unknown[]} texts @param {PredictOptions} options */
  #check(texts, { batchSize = 32, topK = 1, threshold = null, inScope = false }) {
    const wrong = texts.findIndex((text) => typeof text !== "string");
    if (wrong >= 0) throw new RunnerError(`Text ${wrong} is ${texts[wrong] === null ? "null" : typeof texts[wrong]}, not a string.`);
    if (!whole(batchSize, 1, 1e9)) throw new RunnerError(`batchSize is ${batchSize}; it must be a whole number of at least 1.`);
    if (topK !== null && !whole(topK, 1, 1e9)) throw new RunnerError(`topK is ${topK}; it must be a whole number of at least 1, or null for all.`);
    if (threshold !== null && !(typeof threshold === "number" && threshold >= 0 && threshold <= 1))
      throw new RunnerError(`threshold is ${threshold}; it must be a number from 0 to 1.`);
    if (inScope && topK !== 1) throw new RunnerError(`inScope belongs to a text's best label; leave topK, which is ${topK}, at 1.`);
  }

  /**
   * Cut texts of so many sub-words into windows that overlap.
   * @param {number[]} sizes @param {string[]} names
   */
  #windows(sizes, names) {
    const { special_tokens: [before, after], max_length, window_overlap } = this.manifest;
    /** @type {Map<string, {text: number, start: number, end: number, apps: Map<string, [number, number]>}>} */
    const windows = new Map();
    for (const name of names) {
      const most = Math.min(max_length, /** @type {App} */ (this.apps.get(name)).max_length);
      const room = most - before.length - after.length;
      const step = Math.max(1, room - Math.floor(most * window_overlap));
      sizes.forEach((size, text) => {
        /** @type {[number, number][]} */ const cuts = [];
        for (let i = 0; i < Math.max(1, size - room + step); i += step) cuts.push([i, Math.min(i + room, size)]);
        cuts.forEach(([start, end], i) => {
          // In the middle of an overlap both windows show as much of a word's surroundings.
          const low = i ? (cuts[i - 1][1] + start) >> 1 : 0;
          const high = i + 1 < cuts.length ? (end + cuts[i + 1][0]) >> 1 : size;
          const key = `${text} ${start} ${end}`;
          const window = windows.get(key) ?? { text, start, end, apps: new Map() };
          window.apps.set(name, [before.length + low - start, before.length + high - start]);
          windows.set(key, window);
        });
      });
    }
    return windows;
  }

  /**
   * @param {{text: number, start: number, end: number, apps: Map<string, [number, number]>}[]} batch Sorted by length.
   * @param {import("./tokens.js").Encoding[]} encoded @param {Map<string, Window[][]>} pieces Receives the logits.
   */
  async #runBatch(batch, encoded, pieces) {
    const { special_tokens: [before, after], pad_token_id } = this.manifest;
    const rows = batch.map(({ text, start, end }) => [...before, ...encoded[text].ids.slice(start, end), ...after]);
    const width = rows[rows.length - 1].length;
    const ids = new BigInt64Array(rows.length * width).fill(BigInt(pad_token_id));
    const mask = new BigInt64Array(rows.length * width);
    rows.forEach((row, r) => row.forEach((id, i) => ((ids[r * width + i] = BigInt(id)), (mask[r * width + i] = 1n))));
    const { Tensor } = this.ort;
    const input = (/** @type {BigInt64Array} */ data) => new Tensor("int64", data, [data.length / width, width]);
    const { hidden_states } = await refused("onnxruntime cannot run the trunk", () =>
      this.trunk.run({ input_ids: input(ids), attention_mask: input(mask) }),
    );
    for (const name of new Set(batch.flatMap(({ apps }) => [...apps.keys()]))) {
      const part = batch.flatMap(({ apps }, row) => (apps.has(name) ? [row] : []));
      const app = /** @type {App} */ (this.apps.get(name));
      const hidden = part.length === batch.length ? hidden_states : picked(hidden_states, part, Tensor);
      const attention_mask = part.length === batch.length ? input(mask) : picked(input(mask), part, Tensor);
      const { logits } = await refused(`onnxruntime cannot run the tail with the app '${name}'`, () =>
        this.tail.run({ hidden_states: hidden, attention_mask, ...app.inputs }, ["logits"]),
      );
      const labels = app.inputs["head.bias"].dims[0];
      part.forEach((row, r) => {
        const { text, start, apps } = batch[row];
        const scores = rows[row].map((_, token) => {
          const first = (r * width + token) * labels;
          return /** @type {number[]} */ (Array.from(logits.data.subarray(first, first + labels)));
        });
        if (!scores.flat().every(Number.isFinite))
          throw new RunnerError(`The app '${name}' gives scores that are not finite numbers.`);
        /** @type {Window[][]} */ (pieces.get(name))[text].push({ start, part: /** @type {[number, number]} */ (apps.get(name)), rows: scores });
      });
    }
  }
}

/** Raise `RunnerError` for whatever goes wrong inside. @template T @param {string} what @param {() => T | Promise<T>} work */
async function refused(what, work) {
  try {
    return await work();
  } catch (error) {
    if (error instanceof RunnerError) throw error;
    const reason = String(/** @type {any} */ (error)?.message ?? error).split("\n")[0].slice(0, 200);
    throw new RunnerError(`${what} (${reason}).`);
  }
}

/** @param {unknown} value @param {number} low @param {number} high */
const whole = (value, low, high) => Number.isInteger(value) && /** @type {number} */ (value) >= low && /** @type {number} */ (value) <= high;

/** @param {any} manifest */
function checkManifest(manifest) {
  const { format_version, max_length, pad_token_id, window_overlap, special_tokens, files, apps, needs_onnxruntime } = manifest;
  const names = [...Object.keys(files), ...Object.values(apps).map((/** @type {any} */ app) => app.file)];
  const special = special_tokens.flat();
  const inside = (/** @type {string} */ name) => /^[\w.-]+(\/[\w.-]+)*$/.test(name) && !name.split("/").includes("..");
  check(
    ["format_version", format_version, format_version === 1],
    ["max_length", max_length, whole(max_length, 3, 1e6)],
    ["pad_token_id", pad_token_id, whole(pad_token_id, 0, 1e7)],
    ["window_overlap", window_overlap, typeof window_overlap === "number" && window_overlap >= 0 && window_overlap <= 0.9],
    ["special_tokens", special, special_tokens.length === 2 && special.length <= 64 && special.every((/** @type {any} */ id) => whole(id, 0, 1e7))],
    ["files", names, names.every(inside) && NEEDED.every((name) => name in files)],
    ["needs_onnxruntime", needs_onnxruntime, needs_onnxruntime.length === 2 && needs_onnxruntime.every((/** @type {any} */ n) => whole(n, 0, 1e6))],
  );
}

/** Raise for the first [name, value, whether it is accepted] that is not. @param {...[string, unknown, boolean]} facts */
function check(...facts) {
  for (const [name, value, accepted] of facts) if (!accepted) throw new Error(`${name} is ${JSON.stringify(value)}`.slice(0, 200));
}

/**
 * Whether data are those of the export: by hash, or by length where a page has no hashes (http of another machine).
 * @param {ArrayBuffer} data @param {{sha256: string, bytes?: number}} entry
 */
async function isFile(data, { sha256, bytes }) {
  if (!globalThis.crypto?.subtle) return bytes === undefined || bytes === data.byteLength;
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", data));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("") === sha256;
}

/**
 * Read safetensors: eight bytes with the length of the header, the header, the tensors.
 * @param {ArrayBuffer} data @param {string} name @param {any} ort @returns {App}
 */
function readApp(data, name, ort) {
  const start = 8 + Number(new DataView(data).getBigUint64(0, true));
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(data, 8, start - 8)));
  const app = JSON.parse(header.__metadata__.app);
  delete header.__metadata__;
  /** @type {Record<string, any>} */ const inputs = {};
  for (const [input, { dtype, shape, data_offsets: [first, end] }] of Object.entries(header)) {
    const bytes = data.slice(start + first, start + end);
    check([`${input} dtype`, dtype, dtype === "F32" || dtype === "F16"]);
    const values = dtype === "F32" ? new Float32Array(bytes) : Float32Array.from(new Uint16Array(bytes), half);
    check([input, "not finite", values.every(Number.isFinite)]);
    inputs[input] = new ort.Tensor("float32", values, shape);
  }
  /** @type {Map<string, Part>} */ const parts = new Map();
  let total = 0;
  for (const part of app.kind === "bundle" ? app.parts : [{ ...app, name: "" }]) {
    const { kind, labels } = part;
    check(
      ["kind", kind, KINDS.includes(kind)],
      ["labels", labels, Array.isArray(labels) && labels.every((/** @type {any} */ label) => typeof label === "string")],
      ["name", part.name, typeof part.name === "string" && !parts.has(part.name)],
    );
    parts.set(part.name, { ...part, first: total, scope: part.scope && readScope(part.scope, labels.length) });
    total += labels.length;
  }
  check(
    ["max_length", app.max_length, whole(app.max_length, 3, 1e6)],
    ["number of labels", total, parts.size > 0 && inputs["head.weight"].dims[1] === total],
  );
  return { kind: app.kind, max_length: app.max_length, name, parts, inputs };
}

/** What tells texts out of scope, as `runner.py` reads it. @param {any} scope @param {number} labels @returns {Scope} */
function readScope({ threshold, ...arrays }, labels) {
  const rows = (/** @type {[number, number, string]} */ [count, axes, data]) => {
    const bytes = Uint8Array.from(atob(data), (character) => character.charCodeAt(0));
    const values = Array.from(new Uint16Array(bytes.buffer), half);
    check(["size of scope", values.length, values.length === count * axes && values.every(Number.isFinite)]);
    return Array.from({ length: count }, (_, row) => values.slice(row * axes, (row + 1) * axes));
  };
  const [count, axes] = arrays.projection;
  const same = [count, arrays.background[0], arrays.background[1], arrays.means[1]].join();
  check(["scope", same, same === [labels, 2, axes, axes].join()], ["threshold of scope", threshold, Number.isFinite(threshold)]);
  return { threshold, projection: rows(arrays.projection), means: rows(arrays.means), background: rows(arrays.background) };
}

/** Raise for a text app that has no scope. @param {[App, Part | null][]} meant */
function checkScope(meant) {
  for (const [app, part] of meant)
    for (const each of part ? [part] : app.parts.values())
      if (each.kind === KINDS[0] && (each.problem_type || !each.scope))
        throw new RunnerError(`App '${[app.name, each.name].filter(Boolean).join("/")}' cannot say what is out of scope; leave out inScope.`);
}

/** Whether a text's logits lie where those of the training texts do. @param {Scope} scope @param {number[]} logits */
function contains({ threshold, projection, means, background: [center, inverse] }, logits) {
  const most = Math.max(...logits);
  const shifted = logits.map((value) => value - most);
  const point = center.map((_, axis) => shifted.reduce((sum, value, label) => sum + value * projection[label][axis], 0));
  const distance = (/** @type {number[]} */ mean, /** @type {number[]} */ weight) =>
    point.reduce((sum, value, axis) => sum + (weight[axis] ?? 1) * (value - mean[axis]) ** 2, 0);
  const near = Math.min(...means.map((mean) => distance(mean, [])));
  return distance(center, inverse) - near - Math.log(shifted.reduce((sum, value) => sum + Math.exp(value), 0)) >= threshold;
}

/** The number that 16 bits are. @param {number} bits */
function half(bits) {
  const [sign, exponent, fraction] = [bits & 0x8000 ? -1 : 1, (bits >> 10) & 31, bits & 1023];
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (exponent ? (1024 + fraction) * 2 ** (exponent - 25) : fraction * 2 ** -24);
}

/** Rows of a tensor. @param {any} tensor @param {number[]} rows @param {any} Tensor */
function picked(tensor, rows, Tensor) {
  const [, ...inner] = tensor.dims;
  const size = inner.reduce((/** @type {number} */ a, /** @type {number} */ b) => a * b, 1);
  const data = new tensor.data.constructor(rows.length * size);
  rows.forEach((row, r) => data.set(tensor.data.subarray(row * size, (row + 1) * size), r * size));
  return new Tensor(tensor.type, data, [rows.length, ...inner]);
}

/** @param {number[]} logits */
function softmax(logits) {
  const most = Math.max(...logits);
  const powers = logits.map((value) => Math.exp(value - most));
  const sum = powers.reduce((a, b) => a + b);
  return powers.map((value) => value / sum);
}

const sigmoid = (/** @type {number[]} */ logits) => logits.map((value) => 0.5 + 0.5 * Math.tanh(value / 2));

/** Index of the largest, the first of equals. @param {ArrayLike<number>} values */
function argmax(values) {
  let best = 0;
  for (let i = 1; i < values.length; i++) if (values[i] > values[best]) best = i;
  return best;
}

/** Labels of a text: windows' probabilities, weighted by length. @param {Window[]} windows @param {Part} part @param {PredictOptions} options */
function labelsOf(windows, { labels, problem_type, scope }, { topK = 1, threshold = null, inScope = false }) {
  const several = problem_type === "multi_label_classification";
  const total = windows.reduce((sum, { rows }) => sum + rows.length, 0);
  const mean = labels.map(() => 0);
  const meanLogits = labels.map(() => 0);
  for (const { rows } of windows) {
    const logits = labels.map((_, label) => rows.reduce((sum, row) => sum + row[label], 0) / rows.length);
    logits.forEach((value, label) => (meanLogits[label] += (value * rows.length) / total));
    (several ? sigmoid : softmax)(logits).forEach((value, label) => (mean[label] += (value * rows.length) / total));
  }
  const most = several && topK === 1 ? null : topK;
  const least = threshold ?? (several ? 0.5 : 0);
  const order = labels.map((_, label) => label).sort((a, b) => mean[b] - mean[a]);
  const best = order.slice(0, most ?? labels.length).map((label) => ({ label: labels[label], score: mean[label] }));
  if (most !== 1) return best.filter(({ score }) => score >= least);
  const result = best[0].score >= least ? best[0] : { ...best[0], label: null };
  return inScope && scope ? { ...result, in_scope: contains(scope, meanLogits) } : result;
}

/**
 * Entities of a text: words labelled by their first sub-word with the best valid IOB2 tags, and joined.
 * @param {string} text @param {import("./tokens.js").Word[]} words @param {Window[]} windows @param {string[]} labels
 * @param {number} threshold @returns {Entity[]}
 */
function entitiesOf(text, words, windows, labels, threshold) {
  const characters = [...text];
  const tokens = windows.flatMap(({ rows, part: [first, end] }) => rows.slice(first, end));
  const spans = words.flatMap(({ first, start, end }) => {
    // Byte-level tokenizers count the space before a word as part of it.
    const word = characters.slice(start, end).join("");
    if (SYMBOL.test(word) && !/[\p{L}\p{N}]/u.test(word)) return []; // apps take them for parts of entities
    const spaces = word.match(LEADING)?.[0].length ?? 0;
    return start + spaces < end ? [{ first, start: start + spaces, end }] : [];
  });
  const scores = spans.map(({ first }) => softmax(tokens[first]));
  const tags = decode(scores.map((row) => row.map((value) => Math.log(Math.max(value, 1e-30)))), labels);
  /** @type {{group: string, scores: number[], start: number, end: number}[]} */ const runs = [];
  /** @type {string | null} */ let group = null;
  spans.forEach(({ start, end }, word) => {
    const limit = spans[word + 1]?.start ?? characters.length;
    while (end < limit && /^\p{M}/u.test(characters[end])) end++; // marks that tokenizers strip
    const [prefix, kind] = tagOf(labels[tags[word]]);
    const score = scores[word][tags[word]];
    if (prefix === "I" && kind === group) {
      const last = runs[runs.length - 1];
      last.end = end;
      last.scores.push(score);
    } else if (prefix) runs.push({ group: kind, scores: [score], start, end });
    group = prefix ? kind : null;
  });
  const found = runs.map(({ group, scores: of, start, end }) => ({
    entity_group: group,
    score: of.reduce((a, b) => a + b) / of.length,
    word: characters.slice(start, end).join(""),
    start,
    end,
  }));
  return withUtf16(text, found.filter(({ score }) => score >= threshold));
}

/**
 * Add to entities, whose offsets count characters, the offsets in UTF-16.
 * @template {{start: number, end: number}} T @param {string} text @param {T[]} entities In order.
 * @returns {(T & {utf16_start: number, utf16_end: number})[]}
 */
export function withUtf16(text, entities) {
  const units = [0];
  for (const character of text) units.push(units[units.length - 1] + character.length);
  return entities.map((entity) => ({ ...entity, utf16_start: units[entity.start], utf16_end: units[entity.end] }));
}

/** @param {string} label @returns {[prefix: "B" | "I" | "", kind: string]} */
function tagOf(label) {
  const [prefix, ...kind] = label.split("-");
  return prefix === "B" || prefix === "I" ? [prefix, kind.join("-")] : ["", ""];
}

/**
 * The best labels of words, in which I-X follows B-X or I-X (Viterbi).
 * @param {number[][]} scores Log-probabilities, a row a word. @param {string[]} labels @returns {number[]}
 */
export function decode(scores, labels) {
  const continues = labels.map((label) => label.startsWith("I-") && labels.includes("B" + label.slice(1)));
  const kinds = labels.map((label) => (/^[BI]-/.test(label) ? label.slice(2) : ""));
  let total = continues.map((open) => (open ? -Infinity : 0));
  /** @type {number[][]} */ const steps = [];
  for (const [word, row] of scores.entries()) {
    const back = labels.map((_, to) => argmax(total.map((value, from) => (!continues[to] || kinds[from] === kinds[to] ? value : -Infinity))));
    total = row.map((score, to) => {
      if (!word) return total[to] + score;
      return !continues[to] || kinds[back[to]] === kinds[to] ? total[back[to]] + score : -Infinity;
    });
    steps.push(back);
  }
  const best = steps.length ? [argmax(total)] : [];
  for (let word = steps.length - 1; word > 0; word--) best.push(steps[word][best[best.length - 1]]);
  return best.reverse();
}
