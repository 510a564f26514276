/** Keeps the page and the export for use without network. Files with a hash never change; others are asked for first. */

const CACHE = "mtpf";
const SHELL = ["./", "main.js", "style.css", "runner.js", "tokens.js"];

self.addEventListener("install", (event) => {
  self.skipWaiting();
  event.waitUntil(caches.open(CACHE).then((cache) => cache.addAll(SHELL)));
});
self.addEventListener("activate", (event) => event.waitUntil(self.clients.claim()));

self.addEventListener("fetch", (event) => {
  const url = new URL(event.request.url);
  if (event.request.method !== "GET" || !url.href.startsWith(self.registration.scope)) return;
  event.respondWith(url.searchParams.has("sha256") ? stored(event.request) : newest(event.request, event));
});

async function stored(request) {
  const cache = await caches.open(CACHE);
  const known = await cache.match(request);
  if (known) return known;
  const response = await fetch(request);
  if (response.ok) await cache.put(request, response.clone()).catch(() => {}); // no room: works with network only
  return response;
}

async function newest(request, event) {
  const cache = await caches.open(CACHE);
  try {
    const response = await fetch(request);
    if (response.ok && response.status === 200) {
      const copy = response.clone();
      event.waitUntil(cache.put(request, copy).catch(() => {}));
      if (request.url.endsWith("/export.json")) event.waitUntil(response.clone().json().then(prune, () => {}));
    }
    return response;
  } catch (error) {
    const known = await cache.match(request, { ignoreSearch: request.mode === "navigate" });
    if (known) return known;
    throw error;
  }
}

/** Delete files of older exports. */
async function prune({ files, apps }) {
  const hashes = new Set([...Object.values(files), ...Object.values(apps)].map(({ sha256 }) => sha256.slice(0, 16)));
  const cache = await caches.open(CACHE);
  for (const request of await cache.keys()) {
    const hash = new URL(request.url).searchParams.get("sha256");
    if (hash && !hashes.has(hash)) await cache.delete(request);
  }
}
