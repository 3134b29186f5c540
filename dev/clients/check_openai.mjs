// Checks npm's `openai`: strict accumulation of streams, error classes, aborts by leaving the loop.
import assert from "node:assert/strict";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

// the packages are outside the repository
const require = createRequire(`${process.env.CLIENT_MODULES}/package.json`);
const { default: OpenAI } = await import(pathToFileURL(require.resolve("openai")).href);

const root = process.env.SERVER_ROOT;
const model = process.env.SERVER_MODEL ?? "nano";
const apiKey = process.env.SERVER_KEY;
const client = new OpenAI({ baseURL: `${root}/v1`, apiKey, maxRetries: 0, timeout: 60_000 });
const messages = [{ role: "user", content: "Write a Rust function that adds two numbers." }];
const fields = { model, messages, temperature: 0, max_tokens: 40 };
const parameters = {
  type: "object",
  properties: { a: { type: "integer" }, b: { type: "integer" } },
  required: ["a", "b"],
  additionalProperties: false,
};
const tool = { type: "function", function: { name: "add", description: "Add two numbers.", parameters, strict: true } };

class Skip extends Error {}

async function waitIdle() {
  const end = Date.now() + 3000;
  for (;;) {
    const text = await (await fetch(`${root}/metrics`, { headers: { authorization: `Bearer ${apiKey}` } })).text();
    if (/^metal_candle_requests_running 0$/m.test(text)) return;
    assert(Date.now() < end, "answers are still running");
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
}

async function needsRoute(path) {
  const headers = { authorization: `Bearer ${apiKey}`, "content-type": "application/json" };
  const answer = await fetch(root + path, { method: "POST", headers, body: "{}" });
  if (answer.status === 404) throw new Skip(`the server has no ${path}`);
}

async function needsTools() {
  try {
    const answer = await client.chat.completions.create({ ...fields, tools: [tool], tool_choice: "required", parallel_tool_calls: false, max_tokens: 200 });
    if (answer.choices[0].message.tool_calls?.length) return answer;
  } catch (error) {
    if (!(error instanceof OpenAI.BadRequestError)) throw error;
  }
  throw new Skip("the server does not call tools");
}

const checks = {
  async "stream helper equals plain answer"() {
    const plain = await client.chat.completions.create(fields);
    const stream = client.chat.completions.stream({ ...fields, stream_options: { include_usage: true } });
    const final = await stream.finalChatCompletion();
    assert.equal(final.choices[0].message.content, plain.choices[0].message.content);
    assert.equal(final.choices[0].message.role, "assistant");
    assert.equal(final.choices[0].finish_reason, plain.choices[0].finish_reason);
    assert.deepEqual(final.usage.total_tokens, plain.usage.total_tokens);
  },
  async "stream helper with choices and log-probabilities"() {
    const many = { ...fields, n: 3, seed: 5, temperature: 0.9, logprobs: true, top_logprobs: 2 };
    const plain = await client.chat.completions.create(many);
    const final = await client.chat.completions.stream(many).finalChatCompletion();
    const shape = (answer) => answer.choices.map((choice) => [
      choice.index, choice.message.content, choice.finish_reason, choice.logprobs.content.map((token) => token.token),
    ]);
    assert.deepEqual(shape(final), shape(plain));
  },
  async "leaving the loop frees the slot"() {
    await waitIdle();
    const stream = await client.chat.completions.create({ ...fields, max_tokens: 1900, stream: true, ignore_eos: true });
    for await (const _ of stream) break;
    await waitIdle();
  },
  async "an aborted request frees the slot"() {
    const controller = new AbortController();
    const call = client.chat.completions.create({ ...fields, max_tokens: 1900, ignore_eos: true }, { signal: controller.signal });
    setTimeout(() => controller.abort(), 300);
    await assert.rejects(call, OpenAI.APIUserAbortError);
    await waitIdle();
  },
  async "completions"() {
    const body = { model, prompt: "fn add(a: i32", temperature: 0, max_tokens: 12 };
    const plain = await client.completions.create(body);
    let text = "";
    for await (const chunk of await client.completions.create({ ...body, stream: true })) text += chunk.choices[0].text;
    assert.equal(text, plain.choices[0].text);
  },
  async "errors are typed"() {
    const fails = (change, kind, param) => assert.rejects(client.chat.completions.create({ ...fields, ...change }), (error) => {
      assert(error instanceof kind, String(error));
      if (param) assert.equal(error.param, param);
      return true;
    });
    await fails({ model: "gpt-9" }, OpenAI.NotFoundError, "model");
    await fails({ temperature: 3 }, OpenAI.BadRequestError, "temperature");
    await fails({ messages: [{ role: "user", content: "word ".repeat(20000) }], stream: true }, OpenAI.BadRequestError, "messages");
    const wrong = new OpenAI({ baseURL: `${root}/v1`, apiKey: "wrong", maxRetries: 0 });
    await assert.rejects(wrong.chat.completions.create(fields), OpenAI.AuthenticationError);
    const listed = [];
    for await (const one of client.models.list()) listed.push(one.id);
    assert(listed.includes(model));
  },
  async "tool calls"() {
    const plain = await needsTools();
    const body = { ...fields, tools: [tool], tool_choice: "required", parallel_tool_calls: false, max_tokens: 200 };
    const final = await client.chat.completions.stream(body).finalChatCompletion();
    const shape = (answer) => answer.choices[0].message.tool_calls.map((call) => [call.type, call.function.name, call.function.arguments]);
    assert.deepEqual(shape(final), shape(plain));
    assert.equal(final.choices[0].finish_reason, "tool_calls");
  },
  async "responses"() {
    await needsRoute("/v1/responses");
    const body = { model, input: messages[0].content, temperature: 0, max_output_tokens: 40 };
    const plain = await client.responses.create(body);
    let text = "";
    const stream = client.responses.stream(body);
    for await (const event of stream) if (event.type === "response.output_text.delta") text += event.delta;
    assert.equal(text, plain.output_text);
    assert.equal((await stream.finalResponse()).output_text, text);
  },
};

let failed = 0, skipped = 0;
for (const [name, run] of Object.entries(checks)) {
  try {
    await run();
    console.log(`ok       openai (npm): ${name}`);
  } catch (error) {
    // the built-in model supports everything that is checked
    if (error instanceof Skip && (process.env.SERVER_MODEL ?? "nano") !== "nano") {
      skipped += 1;
      console.log(`skipped  openai (npm): ${name}: ${error.message}`);
    } else {
      failed += 1;
      console.log(`FAILED   openai (npm): ${name}\n${error.stack}`);
    }
  }
}
console.log(`openai (npm): ${Object.keys(checks).length - failed - skipped} passed, ${failed} failed, ${skipped} skipped`);
process.exit(failed ? 1 : 0);
