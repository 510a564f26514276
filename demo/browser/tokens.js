/**
 * Sub-words with their places in the text.
 *
 * The library `@huggingface/tokenizers` gives sub-words without offsets. So the steps before its model, which
 * make words of a text, are done here, with the rules of the Rust library, and every character remembers which
 * characters of the text it stands for.
 */

/** What cannot be used: an export, a tokenizer, an app or a text; the message is one sentence. */
export class RunnerError extends Error {
  name = "RunnerError";
}

/**
 * @typedef {{first: number, start: number, end: number}} Word
 *   Index of its first sub-word, and its first character in the text and the one after its last.
 * @typedef {{ids: number[], words: Word[]}} Encoding Sub-words of a text, without special tokens.
 * @typedef {(piece: Piece) => Piece} Normalizer
 * @typedef {(piece: Piece) => Piece[]} Splitter
 */

const WORD = "\\p{Alphabetic}\\p{M}\\p{Nd}\\p{Pc}\\p{Join_Control}";
const WHITE = /\p{White_Space}/u;
// The Rust library reads Unicode 8: what later versions added is no punctuation, mark or format to it.
const LATER_PUNCTUATION =
  "\\u061d\\u09fd\\u0a76\\u0c77\\u0c84\\u1b4e\\u1b4f\\u1b7d-\\u1b7f\\u2e43-\\u2e5d\\u{10d6e}\\u{10ead}\\u{10ed0}" +
  "\\u{10f55}-\\u{10f59}\\u{10f86}-\\u{10f89}\\u{113d4}-\\u{113d8}\\u{1144b}-\\u{1144f}\\u{1145a}-\\u{1145d}" +
  "\\u{11660}-\\u{1166c}\\u{116b9}\\u{1183b}\\u{11944}-\\u{11946}\\u{119e2}\\u{11a3f}-\\u{11a46}" +
  "\\u{11a9a}-\\u{11aa2}\\u{11b00}-\\u{11b09}\\u{11be1}\\u{11c41}-\\u{11c45}\\u{11c70}\\u{11c71}" +
  "\\u{11ef7}\\u{11ef8}\\u{11f43}-\\u{11f4f}\\u{11fff}\\u{12ff1}\\u{12ff2}\\u{16d6d}-\\u{16d6f}" +
  "\\u{16e97}-\\u{16e9a}\\u{16fe2}\\u{1e5ff}\\u{1e95e}\\u{1e95f}";
const LATER_MARKS =
  "\\u07fd\\u0897-\\u089f\\u08ca-\\u08e2\\u09fe\\u0afa-\\u0aff\\u0b55\\u0c04\\u0c3c\\u0d00\\u0d3b\\u0d3c\\u0d81" +
  "\\u0eba\\u0ece\\u180f\\u1885\\u1886\\u1abf-\\u1aeb\\u1df6-\\u1dfb\\ua82c\\ua8c5\\ua8ff\\ua9bd" +
  "\\u{10d24}-\\u{10d27}\\u{10d69}-\\u{10d6d}\\u{10eab}-\\u{10eff}\\u{10f46}-\\u{10f50}\\u{10f82}-\\u{10f85}" +
  "\\u{11070}-\\u{11074}\\u{110c2}\\u{110cd}\\u{111c9}\\u{111cf}\\u{1123e}\\u{11241}\\u{1133b}" +
  "\\u{113bb}-\\u{113e2}\\u{11438}-\\u{1145e}\\u{1182f}-\\u{1183a}\\u{1193b}-\\u{11943}\\u{119d4}-\\u{11a99}" +
  "\\u{11b60}-\\u{11b66}\\u{11c30}-\\u{11cb6}\\u{11d31}-\\u{11d97}\\u{11ef3}-\\u{11f5a}\\u{13430}-\\u{13455}" +
  "\\u{1611e}-\\u{1612f}\\u{16f4f}\\u{16fe4}\\u{1cf00}-\\u{1cf46}\\u{1e000}-\\u{1e02a}\\u{1e08f}" +
  "\\u{1e130}-\\u{1e136}\\u{1e2ae}-\\u{1e2ef}\\u{1e4ec}-\\u{1e4ef}\\u{1e5ee}\\u{1e5ef}\\u{1e6e3}-\\u{1e6f5}" +
  "\\u{1e944}-\\u{1e94a}";
const PUNCTUATION = `(?![${LATER_PUNCTUATION}])[\\p{P}!-\\/:-@\\[-\`{-~]`;
const MARK = new RegExp(`(?![${LATER_MARKS}])\\p{Mn}`, "gu");
const CONTROL = new RegExp(`(?![\\t\\n\\r\\u0890\\u0891${LATER_MARKS}])[\\p{Cc}\\p{Cf}\\p{Co}\\ufffd]`, "u");
const HAN = new RegExp(
  "[\\u4e00-\\u9fff\\u3400-\\u4dbf\\u{20000}-\\u{2a6df}\\u{2a700}-\\u{2b73f}\\u{2b740}-\\u{2b81f}" +
    "\\u{2b920}-\\u{2ceaf}\\uf900-\\ufaff\\u{2f800}-\\u{2fa1f}]",
  "u",
);
const GPT2 =
  /'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\p{White_Space}\p{L}\p{N}]+|\p{White_Space}+(?!\P{White_Space})|\p{White_Space}+/gu;
const MAX_CACHED = 50_000;

/** Text of which each UTF-16 unit stands for the characters `from[i]` to `to[i]` of the original. */
class Piece {
  /** @param {string} text @param {Int32Array} from @param {Int32Array} to */
  constructor(text, from, to) {
    this.text = text;
    this.from = from;
    this.to = to;
  }

  /** @param {string} text */
  static of(text) {
    const from = new Int32Array(text.length);
    let [unit, character] = [0, 0];
    for (const c of text) {
      for (let i = 0; i < c.length; i++) from[unit++] = character;
      character++;
    }
    return new Piece(text, from, from.map((i) => i + 1));
  }

  /** @param {number} start @param {number} end */
  slice(start, end) {
    return new Piece(this.text.slice(start, end), this.from.subarray(start, end), this.to.subarray(start, end));
  }

  /** Put a text before it, which stands for its first character. @param {string} text */
  prepend(text) {
    if (!this.text) return this;
    const grown = (/** @type {Int32Array} */ array) => {
      const result = new Int32Array(array.length + text.length).fill(array[0]);
      result.set(array, text.length);
      return result;
    };
    return new Piece(text + this.text, grown(this.from), grown(this.to));
  }

  /**
   * Replace what a pattern matches. The first new character stands for the first of the match, the others for
   * as many at its end: a composed letter for its base, and marks that join nothing for themselves.
   * @param {RegExp} pattern @param {(match: string) => string} change
   */
  replace(pattern, change) {
    /** @type {string[]} */ const texts = [];
    /** @type {number[]} */ const from = [];
    /** @type {number[]} */ const to = [];
    let last = 0;
    const keep = (/** @type {number} */ end) => {
      for (let i = last; i < end; i++) from.push(this.from[i]), to.push(this.to[i]);
      texts.push(this.text.slice(last, end));
    };
    for (const { 0: match, index } of this.text.matchAll(pattern)) {
      keep(index);
      last = index + match.length;
      const text = match && change(match);
      texts.push(text);
      const shift = match.length - text.length;
      for (let i = 0; i < text.length; i++) {
        const source = index + (i ? Math.max(0, Math.min(match.length - 1, i + shift)) : 0);
        from.push(this.from[source]);
        to.push(this.to[source]);
      }
    }
    keep(this.text.length);
    return new Piece(texts.join(""), Int32Array.from(from), Int32Array.from(to));
  }
}

/** A normalizer that changes each character for itself. @param {(c: string) => string} change @returns {Normalizer} */
function each(change) {
  const known = new Map();
  const remembered = (/** @type {string} */ c) => {
    if (!known.has(c)) known.set(c, change(c));
    return known.get(c);
  };
  return (piece) => piece.replace(/[^]/gu, remembered);
}

/** @param {any} config @returns {Normalizer} */
function bertNormalizer(config) {
  const strip = config.strip_accents ?? config.lowercase;
  return each((c) => {
    if (config.clean_text) {
      if (CONTROL.test(c)) return "";
      if (WHITE.test(c)) return " ";
    }
    if (config.handle_chinese_chars && HAN.test(c)) c = ` ${c} `;
    if (strip) c = c.normalize("NFD").replace(MARK, "");
    return config.lowercase ? c.toLowerCase() : c;
  });
}

/** A form of Unicode: characters with the marks and vowels that may join them. @param {string} form @returns {Normalizer} */
const unicode = (form) => (piece) =>
  /^[\0-\x7f]*$/.test(piece.text) ? piece : piece.replace(/[^][\p{M}\u1160-\u11ff]*/gu, (c) => c.normalize(form));

/** @param {any} config @returns {Normalizer} */
function normalizer(config) {
  switch (config?.type) {
    case undefined:
      return (piece) => piece;
    case "Sequence": {
      const steps = /** @type {Normalizer[]} */ (config.normalizers.map(normalizer));
      return (piece) => steps.reduce((text, step) => step(text), piece);
    }
    case "BertNormalizer":
      return bertNormalizer(config);
    case "NFC":
    case "NFD":
    case "NFKC":
    case "NFKD":
      return unicode(config.type);
    case "Lowercase":
      return each((c) => c.toLowerCase());
    case "StripAccents":
      return each((c) => c.replace(/\p{M}/u, ""));
    case "Prepend":
      return (piece) => piece.prepend(config.prepend);
    case "Replace":
      return (piece) => piece.replace(pattern(config.pattern), () => config.content);
    case "Strip":
      return ({ text, ...rest }) => {
        const start = config.strip_left ? text.search(/\P{White_Space}|$/u) : 0;
        const end = config.strip_right ? text.search(/\p{White_Space}*$/u) : text.length;
        return new Piece(text, rest.from, rest.to).slice(start, Math.max(start, end));
      };
  }
  throw new RunnerError(`The tokenizer's normalizer ${config.type} is not known here; use runner.py or a server.`);
}

/** @param {{Regex?: string, String?: string}} source */
function pattern({ Regex, String }) {
  return new RegExp(Regex ?? escaped(String ?? ""), "gu");
}

const escaped = (/** @type {string} */ text) => text.replace(/[\\^$.*+?()[\]{}|/-]/g, "\\$&");

/**
 * Split at what a pattern matches, as the Rust library's `SplitDelimiterBehavior` of that name.
 * @param {RegExp} expression @param {string} behavior @param {boolean} [invert] @returns {Splitter}
 */
function split(expression, behavior, invert = false) {
  return (piece) => {
    /** @type {[number, number, boolean][]} */ const parts = [];
    let last = 0;
    for (const { 0: match, index } of piece.text.matchAll(expression)) {
      if (index > last) parts.push([last, index, invert]);
      if (match) parts.push([index, index + match.length, !invert]);
      last = index + match.length;
    }
    if (last < piece.text.length) parts.push([last, piece.text.length, invert]);
    return joined(parts, behavior).map(([start, end]) => piece.slice(start, end));
  };
}

/** @param {[number, number, boolean][]} parts @param {string} behavior */
function joined(parts, behavior) {
  const kind = behavior.replaceAll("_", "").toLowerCase();
  if (kind === "removed") return parts.filter(([, , match]) => !match);
  if (kind === "isolated") return parts;
  const next = kind === "mergedwithnext";
  /** @type {[number, number, boolean][]} */ const result = [];
  let before = false;
  for (const part of next ? parts.reverse() : parts) {
    const last = result.at(-1);
    const joins = kind === "contiguous" ? last?.[2] === part[2] : part[2] && !before;
    if (last && joins) next ? (last[0] = part[0]) : (last[1] = part[1]);
    else result.push([...part]);
    before = part[2];
  }
  return next ? result.reverse() : result;
}

const BYTES = (() => {
  const plain = (/** @type {number} */ b) => (b > 32 && b < 127) || (b > 160 && b !== 173);
  let other = 256;
  return Array.from({ length: 256 }, (_, b) => String.fromCharCode(plain(b) ? b : other++));
})();

/** @param {any} config @returns {Splitter} */
function splitter(config) {
  switch (config?.type) {
    case undefined:
      return (piece) => [piece];
    case "Sequence": {
      const steps = /** @type {Splitter[]} */ (config.pretokenizers.map(splitter));
      return (piece) => steps.reduce((pieces, step) => pieces.flatMap(step), [piece]);
    }
    case "BertPreTokenizer":
      return splitter({ type: "Sequence", pretokenizers: [{ type: "WhitespaceSplit" }, { type: "Punctuation" }] });
    case "WhitespaceSplit":
      return split(/\p{White_Space}/gu, "removed");
    case "Whitespace":
      return split(new RegExp(`[${WORD}]+|[^${WORD}\\p{White_Space}]+`, "gu"), "removed", true);
    case "Punctuation":
      return split(new RegExp(PUNCTUATION, "gu"), config.behavior ?? "isolated");
    case "Digits":
      return split(/\p{N}/gu, config.individual_digits ? "isolated" : "contiguous");
    case "Split":
      return split(pattern(config.pattern), config.behavior, config.invert);
    case "Metaspace": {
      const mark = config.replacement;
      const parts = config.split === false ? (/** @type {Piece} */ p) => [p] : split(pattern({ String: mark }), "MergedWithNext");
      return (piece) => {
        const spaced = piece.replace(/ /gu, () => mark);
        const first = config.prepend_scheme === "first" ? piece.from[0] === 0 : config.prepend_scheme !== "never";
        return parts(first && !spaced.text.startsWith(mark) ? spaced.prepend(mark) : spaced);
      };
    }
    case "ByteLevel": {
      const utf8 = new TextEncoder();
      const bytes = each((c) => Array.from(utf8.encode(c), (b) => BYTES[b]).join(""));
      const parts = config.use_regex === false ? (/** @type {Piece} */ p) => [p] : split(GPT2, "isolated");
      return (piece) => parts(config.add_prefix_space && !piece.text.startsWith(" ") ? piece.prepend(" ") : piece).map(bytes);
    }
  }
  throw new RunnerError(`The tokenizer's pre-tokenizer ${config.type} is not known here; use runner.py or a server.`);
}

/**
 * Cut added tokens such as `[MASK]` out of a text.
 * @param {any[]} tokens @param {Normalizer} [normalize] @returns {(piece: Piece) => (Piece | {id: number, piece: Piece})[]}
 */
function addedTokens(tokens, normalize) {
  const content = (/** @type {any} */ token) => (normalize ? normalize(Piece.of(token.content)).text : token.content);
  const known = new Map(tokens.map((token) => [content(token), token]));
  known.delete("");
  if (!known.size) return (piece) => [piece];
  const longest = [...known.keys()].sort((a, b) => b.length - a.length);
  const expression = new RegExp(longest.map(escaped).join("|"), "gu");
  const word = new RegExp(`[${WORD}]`, "u");
  return (piece) => {
    const { text } = piece;
    /** @type {(Piece | {id: number, piece: Piece})[]} */ const parts = [];
    let last = 0;
    for (const match of text.matchAll(expression)) {
      const token = known.get(match[0]);
      let [start, end] = [match.index, match.index + match[0].length];
      if (start < last) continue;
      if (token.single_word && (word.test(text.slice(0, start).slice(-1)) || word.test(text.slice(end, end + 1)))) continue;
      while (token.lstrip && start > last && WHITE.test(text[start - 1])) start--;
      while (token.rstrip && end < text.length && WHITE.test(text[end])) end++;
      if (start > last) parts.push(piece.slice(last, start));
      parts.push({ id: token.id, piece: piece.slice(start, end) });
      last = end;
    }
    if (last < text.length) parts.push(piece.slice(last, text.length));
    return parts;
  };
}

/** A tokenizer that gives sub-words and the words' places. */
export class WordTokenizer {
  /**
   * @param {any} config The content of `tokenizer.json`.
   * @param {new (tokenizer: any, config: any) => any} Tokenizer Of `@huggingface/tokenizers`; its model is used.
   */
  constructor(config, Tokenizer) {
    // Its other parts are done here, and some of them it could not read.
    const rest = { normalizer: null, pre_tokenizer: null, post_processor: null, decoder: null };
    this.model = new Tokenizer({ ...config, ...rest }, {}).model;
    this.normalize = normalizer(config.normalizer);
    this.split = splitter(config.pre_tokenizer);
    const normalized = config.added_tokens.filter((/** @type {any} */ token) => token.normalized);
    this.added = addedTokens(config.added_tokens.filter((/** @type {any} */ token) => !token.normalized));
    this.addedNormalized = addedTokens(normalized, this.normalize);
    /** @type {Map<string, number[]>} */ this.known = new Map();
  }

  /** @param {string} word @returns {number[]} */
  subwords(word) {
    let ids = this.known.get(word);
    if (!ids) {
      const { tokens_to_ids: table, unk_token_id: unknown } = this.model;
      ids = this.model([word]).map((/** @type {string} */ token) => table.get(token) ?? unknown);
      if (this.known.size >= MAX_CACHED) this.known.clear();
      this.known.set(word, /** @type {number[]} */ (ids));
    }
    return /** @type {number[]} */ (ids);
  }

  /**
   * Cut a text into sub-words. A lone surrogate is read as U+FFFD.
   * @param {string} text @returns {Encoding}
   */
  encode(text) {
    /** @type {Encoding} */ const result = { ids: [], words: [] };
    const push = (/** @type {number[]} */ ids, /** @type {Piece} */ { from, to }) => {
      if (ids.length) result.words.push({ first: result.ids.length, start: from[0], end: to[to.length - 1] });
      for (const id of ids) result.ids.push(id);
    };
    for (const part of this.added(Piece.of(text.replace(/\p{Surrogate}/gu, "\ufffd")))) {
      if ("id" in part) {
        push([part.id], part.piece);
        continue;
      }
      for (const inner of this.addedNormalized(this.normalize(part))) {
        if ("id" in inner) push([inner.id], inner.piece);
        else for (const word of this.split(inner)) if (word.text) push(this.subwords(word.text), word);
      }
    }
    return result;
  }
}
