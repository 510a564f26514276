/** The page: entities as marks in the text, labels as bars, as one types. `?server=ADDRESS` asks a server instead. */

import { withUtf16 } from "./runner.js";

const byId = (id) => document.getElementById(id);
const [input, layers, results, time] = ["text", "layers", "results", "time"].map(byId);
const TOP = 5; // bars of an app
const TINTS = 6; // in style.css
const PAUSE = 700; // milliseconds without typing before the results are read out

/** An element with attributes and children. */
function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function say(text, error = false) {
  byId("status").textContent = text;
  byId("status").className = error ? "error" : "";
}

// ------------------------------------------------------------------------------------ where results come from

/** The worker with the runner. */
async function local() {
  const offline = await cached();
  const worker = new Worker("worker.js", { type: "module" });
  const waiting = new Map();
  const apps = await new Promise((resolve, reject) => {
    worker.onerror = (event) => reject(new Error(event.message || "The runner cannot be loaded."));
    worker.onmessage = ({ data }) => {
      if (data.apps) resolve(data.apps);
      else if (data.id === undefined) reject(new Error(data.error));
      else waiting.get(data.id)(data), waiting.delete(data.id);
    };
  });
  let last = 0;
  const predict = (text, names) =>
    new Promise((resolve) => {
      waiting.set(++last, resolve);
      worker.postMessage({ id: last, text, apps: names, options: { topK: TOP } });
    });
  return { apps, predict, where: "in this browser", offline };
}

/** Wait for the service worker, which keeps all files for later; false where there can be none. */
async function cached() {
  try {
    const keeper = navigator.serviceWorker;
    const registered = keeper.register("sw.js");
    if (keeper.controller) {
      registered.catch(() => {}); // looks for a newer one, for which nothing waits
      return true;
    }
    await registered;
    await Promise.race([
      new Promise((resolve) => keeper.addEventListener("controllerchange", resolve, { once: true })),
      new Promise((_, reject) => setTimeout(reject, 5000)),
    ]);
    return true;
  } catch {
    return false; // http of another machine, or a browser that does not allow it
  }
}

/** A server of `mtpf serve`. */
async function remote(address) {
  const base = new URL(address.endsWith("/") ? address : `${address}/`, location.href);
  const ask = async (path, body) => {
    const options = body && { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
    const response = await fetch(new URL(path, base), options).catch(() => {
      throw new Error(`${base.host} does not answer, or does not allow this page (CORS).`);
    });
    if (!response.ok) throw new Error(`${base.host} answers with status ${response.status}.`);
    return response.json();
  };
  const apps = Object.values((await ask("apps")).apps).flatMap(({ name, kind, parts }) =>
    parts ? parts.map((part) => ({ name: `${name}/${part.name}`, kind: part.kind })) : [{ name, kind }],
  );
  let options = { top_k: TOP };
  const predict = async (text, names) => {
    const [start, body] = [performance.now(), { texts: [text], apps: names }];
    try {
      const answer = await ask("predict", { ...body, ...options }).catch(() => {
        options = {}; // a server of an export has no top_k
        return ask("predict", body);
      });
      const rows = Array.isArray(answer) ? Object.fromEntries(names.map((name) => [name, [answer[0].results[name]]])) : answer.results;
      for (const { name, kind } of apps) if (kind === "token-classification" && rows[name]) rows[name] = [withUtf16(text, rows[name][0])];
      return { results: rows, ms: performance.now() - start };
    } catch (error) {
      return { error: error.message };
    }
  };
  return { apps, predict, where: `on ${base.host}` };
}

// ------------------------------------------------------------------------------------------------- showing

const percent = (score) => `${Math.round(100 * score)} %`;
const tints = new Map();
const tint = (group) => `t${tints.get(group) ?? tints.set(group, tints.size % TINTS).get(group)}`;

/** The text again, its entities as marks; it lies behind the text. */
function marked(text, entities, row) {
  const layer = element("div", { class: "layer", dir: "auto" });
  let last = 0;
  for (const { entity_group, utf16_start, utf16_end } of entities) {
    const mark = element("mark", { class: tint(entity_group), "data-label": entity_group }, text.slice(utf16_start, utf16_end));
    mark.style.setProperty("--row", row);
    layer.append(text.slice(last, utf16_start), mark);
    last = utf16_end;
  }
  layer.append(`${text.slice(last)}\n`);
  return layer;
}

function bars(labels) {
  const list = element("ul", { class: "bars" });
  for (const { label, score } of [labels].flat()) {
    const bar = element("i");
    bar.style.transform = `scaleX(${score})`;
    list.append(element("li", {}, element("span", {}, label ?? "no label"), element("span", { class: "bar", "aria-hidden": "true" }, bar), element("span", { class: "percent" }, percent(score))));
  }
  return list.children.length ? list : element("p", {}, "no label");
}

function entityList(entities) {
  const items = entities.map(({ entity_group, word, score }) =>
    element("li", { class: tint(entity_group) }, element("bdi", {}, word), " ", element("b", {}, entity_group), ` ${percent(score)}`),
  );
  return items.length ? element("ul", { class: "entities" }, ...items) : element("p", {}, "no entity");
}

function show(text, apps, { results: byApp, ms, error }, where) {
  time.textContent = error ?? `${ms.toFixed(1)} ms, ${where}`;
  time.className = error ? "error" : "";
  if (error) return "";
  const tokenApps = apps.filter(({ kind }) => kind === "token-classification");
  layers.replaceChildren(marked(text, [], 0), ...tokenApps.map(({ name }, row) => marked(text, byApp[name][0], row)));
  const spoken = [];
  results.replaceChildren(
    ...apps.flatMap(({ name, kind }) => {
      const [result] = byApp[name];
      const isToken = kind === "token-classification";
      const parts = isToken ? result.map((e) => `${e.word}, ${e.entity_group}`) : [result].flat().slice(0, 1).map((r) => `${r.label}, ${percent(r.score)}`);
      spoken.push(`${name}: ${parts.join("; ") || "nothing"}`);
      return [element("h2", {}, name), isToken ? entityList(result) : bars(result)];
    }),
  );
  return `${spoken.join(". ")}.`;
}

async function start() {
  say("Loading");
  const server = new URLSearchParams(location.search).get("server");
  const engine = server ? await remote(server) : await local();
  for (const { name } of engine.apps) {
    const box = element("input", { type: "checkbox", name });
    box.checked = true;
    byId("apps").append(element("label", {}, box, name));
  }
  byId("apps").hidden = false;
  let [busy, again, pause] = [false, false, 0];
  const update = async () => {
    layers.firstChild ?? layers.append(marked(input.value, [], 0));
    layers.firstChild.textContent = `${input.value}\n`; // the height follows at once
    if (busy) return void (again = true);
    busy = true;
    results.setAttribute("aria-busy", "true");
    do {
      again = false;
      const text = input.value;
      const chosen = engine.apps.filter(({ name }) => byId("apps").querySelector(`[name="${CSS.escape(name)}"]`).checked);
      const answer = await engine.predict(text, chosen.map(({ name }) => name));
      const summary = show(text, chosen, answer, engine.where);
      clearTimeout(pause);
      pause = setTimeout(() => (byId("summary").textContent = summary), PAUSE);
    } while (again);
    busy = false;
    results.setAttribute("aria-busy", "false");
  };
  input.addEventListener("input", () => {
    // Marks that no longer fit the text would mislead until the new ones come.
    for (const layer of [...layers.children].slice(1)) if (layer.textContent !== `${input.value}\n`) layer.replaceChildren(`${input.value}\n`);
    update();
  });
  byId("apps").addEventListener("change", update);
  say(`Ready after ${Math.round(performance.now())} ms, ${engine.where}${engine.offline ? ", also without network" : ""}.`);
  await update();
  document.documentElement.dataset.ready = "true";
}

start().catch((error) => {
  say(error.message, true);
  document.documentElement.dataset.ready = "failed";
});
