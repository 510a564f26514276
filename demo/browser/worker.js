/** The runner, away from the page's own thread: `{id, text, apps, options}` → `{id, results, ms}` or `{id, error}`. */

import { Runner, fromUrl } from "./runner.js";
import * as ort from "./vendor/ort.wasm.min.mjs";
import { Tokenizer } from "./vendor/tokenizers.min.mjs";

ort.env.wasm.wasmPaths = new URL("vendor/", import.meta.url).href;
ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency) : 1;

const opened = Runner.open(fromUrl(new URL("./", import.meta.url)), { ort, Tokenizer });
opened.then(
  (runner) => {
    const apps = [...runner.apps.values()].flatMap((app) =>
      [...app.parts.values()].map(({ name, kind }) => ({ name: name ? `${app.name}/${name}` : app.name, kind })),
    );
    self.postMessage({ apps });
  },
  (error) => self.postMessage({ error: error.message }),
);

self.onmessage = async ({ data: { id, text, apps, options } }) => {
  try {
    const runner = await opened;
    const start = performance.now();
    const results = await runner.predict([text], apps, options);
    self.postMessage({ id, results, ms: performance.now() - start });
  } catch (error) {
    self.postMessage({ id, error: error.message });
  }
};
