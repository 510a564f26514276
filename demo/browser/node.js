/** The runner in Node: `const runner = await openFolder("phone")`. */

import { readFile } from "node:fs/promises";
import { join } from "node:path";

import { Tokenizer } from "@huggingface/tokenizers";
import * as ort from "onnxruntime-node";

import { Runner, RunnerError } from "./runner.js";

export * from "./runner.js";

/**
 * Open an export with onnxruntime-node.
 * @param {string} folder @param {object} [session] Options of the sessions, e.g. `{intraOpNumThreads: 1}`.
 * @returns {Promise<Runner>}
 */
export function openFolder(folder, session) {
  const read = async (/** @type {string} */ name) => {
    try {
      const { buffer, byteOffset, byteLength } = await readFile(join(folder, name));
      return /** @type {ArrayBuffer} */ (buffer.slice(byteOffset, byteOffset + byteLength));
    } catch (error) {
      throw new RunnerError(`${join(folder, name)} cannot be read (${/** @type {any} */ (error).code}).`);
    }
  };
  return Runner.open(read, { ort: { ...ort }, Tokenizer, session });
}
