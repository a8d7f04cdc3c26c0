// A stock client, @openai/agents-realtime, pointed at a server by its address and nothing else; prints what it lived through.
//   node agents.cjs MODULES URL SCENARIO SOUND PICTURE      (sound: 24 kHz PCM16 as base64 lines of 100 ms; picture: a data: URI)
"use strict";
const { createRequire } = require("node:module");
const { readFileSync } = require("node:fs");
const [modules, url, scenario, sound, picture] = process.argv.slice(2);
const load = createRequire(`${modules}/package.json`);
const { OpenAIRealtimeWebSocket, RealtimeAgent, RealtimeSession, tool } = load("@openai/agents-realtime");
const { z } = load("zod");

const looked = [];
const look = tool({
  name: "look",
  description: "Looks somewhere.",
  parameters: z.object({ at: z.string() }),
  execute: async ({ at }) => (looked.push(at), "a ball"),
});
const agent = new RealtimeAgent({ name: "attend", instructions: "Be brief.", tools: scenario === "function" ? [look] : [] });
const session = new RealtimeSession(agent, { transport: new OpenAIRealtimeWebSocket({ url }), model: "nano", tracingDisabled: true });

const events = [], waiting = [], errors = [];
let heard = 0, interrupted = 0;
session.on("transport_event", (event) => {
  events.push(event);
  for (const wake of waiting.splice(0)) wake();
});
session.on("audio", ({ data }) => (heard += data.byteLength / 48));
session.on("audio_interrupted", () => (interrupted += 1));
session.on("error", ({ error }) => errors.push(JSON.stringify(error)));

const of = (type) => events.filter((event) => event.type === type);
async function until(type, count = 1) {
  while (of(type).length < count) await new Promise((wake) => waiting.push(wake));
  return of(type).at(-1);
}
function speak() {
  for (const line of readFileSync(sound, "ascii").split("\n")) {
    const bytes = Buffer.from(line, "base64");
    session.sendAudio(bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.length));
  }
}

const scenarios = {
  async typed() {
    session.sendMessage("How many?");
    await until("response.done");
  },
  async spoken() {
    session.addImage(readFileSync(picture, "ascii"), { triggerResponse: false });
    speak();
    await until("response.done");
    await until("conversation.item.input_audio_transcription.completed");
  },
  async interruption() {
    session.sendMessage("Count.");
    await until("response.done");
    speak();
    await until("conversation.item.truncated");
    await until("response.done", 2);
  },
  async function() {
    session.sendMessage("Look left.");
    await until("response.done", 2);
  },
};

(async () => {
  await session.connect({ apiKey: "any" });
  await until("session.updated");
  await scenarios[scenario]();
  await until("session.created"); // was long ago: one more turn of the loop for the history
  await new Promise((done) => setImmediate(done));
  const responses = of("response.done").map(({ response }) => response);
  console.log(JSON.stringify({ responses, history: session.history, kinds: events.map(({ type }) => type), heard, interrupted, looked, errors }));
  session.close();
  process.exit(0);
})();
