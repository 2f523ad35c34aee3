// An app that knows only the page `src/sync/shapes.md` and the library nostr-tools: reads what sledge wrote from a relay, and
// publishes its own there.
//
// In, on stdin: {"secret": hex, "relay": URL}. Out, on stdout: what it has read, as JSON.
import { readFileSync } from "node:fs";
import { createHash } from "node:crypto";
import { finalizeEvent, getPublicKey, nip44, verifyEvent } from "nostr-tools";
import { Relay, useWebSocketImplementation } from "nostr-tools/relay";
import { hexToBytes } from "@noble/hashes/utils.js";
import WebSocket from "ws";

const { secret, relay: url } = JSON.parse(readFileSync(0, "utf8"));
const key = hexToBytes(secret);
const me = getPublicKey(key);
const self = nip44.v2.utils.getConversationKey(key, me);
const NAMESPACE = "com.openagents.sync";

const value = (event, name) => event.tags.find((tag) => tag[0] === name)?.[1];
const schema = (event) => event.tags.find((tag) => tag[0] === "l" && tag[2] === NAMESPACE)?.[1];
const label = (schema) => [["L", NAMESPACE], ["l", `${schema}/1`, NAMESPACE], ["-"]];
const seal = (body) => nip44.v2.encrypt(JSON.stringify(body), self);
const sign = (kind, created_at, tags, content) => finalizeEvent({ kind, created_at, tags, content }, key);

// A content that is sealed for several readers has its key in a tag of its own.
function open(event) {
  const between = nip44.v2.utils.getConversationKey(key, event.pubkey);
  const wrapped = event.tags.find((tag) => tag[0] === "key" && tag[1] === me)?.[2];
  const with_key = wrapped ? hexToBytes(nip44.v2.decrypt(wrapped, between)) : between;
  return JSON.parse(nip44.v2.decrypt(event.content, with_key));
}

// A stamp is text, and the order of the texts is the order of the stamps.
const DEVICE = "00000000000000ff";
const stamp = (wall_ms, counter = 0) =>
  `${wall_ms.toString(16).padStart(12, "0")}-${counter.toString(16).padStart(4, "0")}-${DEVICE}`;
const second = (hlc) => Math.floor(parseInt(hlc.slice(0, 12), 16) / 1000);

function merge(into, fields) {
  for (const [name, field] of Object.entries(fields)) {
    if (!into[name] || field[1] > into[name][1]) into[name] = field;
  }
  return into;
}

// The relay gives labelled events only to who has proven the key (NIP-42), and takes them only from there.
useWebSocketImplementation(WebSocket);
const relay = new Relay(url);
const asked = new Promise((resolve) => {
  relay.onauth = async (template) => {
    resolve();
    return finalizeEvent(template, key);
  };
});
await relay.connect();
await asked;
await relay.authPromise;
const events = await new Promise((resolve, reject) => {
  const found = [];
  const subscription = relay.subscribe([{ authors: [me], "#L": [NAMESPACE] }], {
    onevent: (event) => found.push(event),
    oneose: () => {
      resolve(found);
      subscription.close();
    },
    onclose: reject,
  });
});

// Reading.
const read = { valid: events.every((event) => verifyEvent(event)), messages: [], head: {}, settings: {} };
const named = new Set(events.flatMap((event) => event.tags.filter((tag) => tag[0] === "prev").map((tag) => tag[1])));
for (const event of events) {
  if (schema(event) === "chat.msg/1") {
    const { role, content, createdAt, hlc, parents, v } = open(event);
    read.messages.push({ id: value(event, "d").split(":").pop(), role, content, createdAt, hlc, parents, v });
  } else if (schema(event) === "chat.head/1") {
    const { v, ...fields } = open(event);
    merge(read.head, fields);
  } else if (schema(event) === "settings/1" && event.kind === 10001) {
    merge(read.settings, open(event).f);
  }
}
read.messages.sort((one, other) => (one.hlc < other.hlc ? -1 : 1));
read.heads = events.filter((event) => schema(event) === "settings/1" && !named.has(event.id)).map((event) => event.id);
read.training = events.filter((event) => schema(event) === "training/1").map((event) => ({
  text: event.content,
  hash: value(event, "x") === createHash("sha256").update(event.content).digest("hex"),
  quality: value(event, "quality"),
}));

// Writing: an answer in the same chat, another title, one more setting.
const chat = value(events.find((event) => schema(event) === "chat.head/1"), "d").slice("oa:c:".length);
const latest = [read.head, read.settings].flatMap((fields) => Object.values(fields).map((field) => field[1]));
const latestMs = Math.max(...[...latest, ...read.messages.map((m) => m.hlc)].map((s) => parseInt(s.slice(0, 12), 16)));
const now = latestMs + 5000;
const newest = (wanted) => Math.max(0, ...events.filter((e) => schema(e) === wanted).map((e) => e.created_at));

const followed = new Set(read.messages.flatMap((message) => message.parents));
const parents = read.messages.map((message) => message.id).filter((id) => !followed.has(id));
const answer = { v: 1, role: "assistant", content: "from TypeScript", createdAt: now, hlc: stamp(now), parents };
const uuid = "8a6e0804-2bd0-4672-b79d-d97027f9071a";
const message = sign(
  30001,
  second(stamp(now)),
  [["d", `oa:m:${chat}:${uuid}`], ["a", `30001:${me}:oa:c:${chat}`], ...label("chat.msg")],
  seal(answer),
);

const head = { ...read.head, title: ["TypeScript title", stamp(now, 1)] };
const headAt = Math.max(second(stamp(now)), newest("chat.head/1") + 1);
const headEvent = sign(30001, headAt, [["d", `oa:c:${chat}`], ...label("chat.head")], seal({ v: 1, ...head }));

const fields = { ...read.settings, "from.typescript": [true, stamp(now, 2)] };
const settings = sign(
  10001,
  Math.max(second(stamp(now)), newest("settings/1")),
  [["d", "settings"], ...read.heads.map((id) => ["prev", id]), ...label("settings")],
  seal({ v: 1, dev: DEVICE, f: fields }),
);
const deletion = sign(
  5,
  second(stamp(now)),
  [["a", `30001:${me}:oa:m:${chat}:${read.messages[0].id}`], ...label("chat.msg")],
  "",
);

// Each answer is awaited; a refusal ends the script.
for (const event of [message, headEvent, settings, deletion]) await relay.publish(event);
relay.close();
process.stdout.write(JSON.stringify(read));
