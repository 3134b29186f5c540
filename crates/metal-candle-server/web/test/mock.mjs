// A mock server for tests of the web UI: the built files with their headers, and canned API responses.
//
// `node test/mock.mjs [PORT [KEY]]` serves until it is stopped.
import { createServer } from 'node:http';
import { readFileSync } from 'node:fs';
import { fileURLToPath } from 'node:url';

const dist = fileURLToPath(new URL('../dist/', import.meta.url));
const POLICY =
  "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";
const PAGES = {
  '/': ['index.html', 'text/html; charset=utf-8'],
  '/app.js': ['app.js', 'text/javascript; charset=utf-8'],
  '/app.css': ['app.css', 'text/css; charset=utf-8'],
};
const now = () => Math.floor(Date.now() / 1000);
const sleep = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));

const ANSWERS = {
  html: '<script>window.broken = 1</script><img src=x onerror="window.broken = 1"> stays **text**.\n\n<b>bold?</b> [bad](javascript:alert(1)) [good](https://example.org/) ![picture](https://example.org/p.png)\n\n```html\n<script>window.broken = 1</script>\n```\n',
  code: "A `Stack` keeps its values in a vector. `push` and `pop` work at its end, so both take constant time.\n\n```rust\n/// A last-in, first-out list.\n#[derive(Debug, Default)]\npub struct Stack<T> {\n    values: Vec<T>,\n}\n\nimpl<T> Stack<T> {\n    pub fn push(&mut self, value: T) {\n        self.values.push(value); // at the end\n    }\n\n    pub fn pop(&mut self) -> Option<T> {\n        self.values.pop()\n    }\n}\n```\n\n| method | time |\n|---|---:|\n| `push` | O(1) amortised |\n| `pop` | O(1) |\n\n1. Create it with `Stack::default()`.\n2. Push values, then pop them in reverse order.\n\nIn Python a list does the same:\n\n```python\nstack = []\nstack.append(\"first\")  # push\nprint(f\"last: {stack.pop()}\")\n```\n",
  plain: 'The quick brown fox jumps over the lazy dog. Größe, 日本語 and 👩‍👩‍👧 arrive whole.',
};

/** Every request that the mock has seen, and the state that it keeps. */
export function startMock({ port = 0, key = null, delay = 12 } = {}) {
  const state = {
    requests: [],
    bodies: [],
    running: 0,
    cancelled: 0,
    generated: 51234,
    models: [{ id: 'nano', context_length: 2048 }],
    adapters: [
      adapter('rust-docs', 1, 'lora', 16, 'runs/001/adapter'),
      adapter('commit-messages', 3, 'dora', 8, 'runs/004/adapter'),
    ],
    generations: 4,
    files: new Map(),
    jobs: new Map(),
  };
  state.jobs.set('ftjob-done', job({ id: 'ftjob-done', suffix: 'docs', steps: 240, started: now() - 86_400, ended: true }));
  state.jobs.set('ftjob-bad', {
    ...job({ id: 'ftjob-bad', suffix: 'hot', steps: 40, started: now() - 7200, ended: true }),
    failed: { code: 'diverged', message: 'the loss is not finite after step 38; lower the learning rate', param: null },
  });

  const server = createServer((request, response) => {
    handle(state, { key, delay }, request, response).catch((error) => {
      if (!response.headersSent) fail(response, 500, String(error), 'server_error');
      else response.end();
    });
  });
  return new Promise((resolve) => {
    server.listen(port, '127.0.0.1', () => {
      resolve({
        url: `http://127.0.0.1:${server.address().port}/`,
        state,
        close: () => new Promise((done) => (server.closeAllConnections(), server.close(done))),
      });
    });
  });
}

function adapter(id, generation, method, rank, source) {
  return { id, object: 'adapter', base: 'nano', generation, method, rank, bytes: rank * 41_000, in_flight: 0, source, created_at: now() - 3600 };
}

async function handle(state, options, request, response) {
  const { pathname, searchParams } = new URL(request.url, 'http://localhost');
  state.requests.push(`${request.method} ${pathname}`);
  const page = request.method === 'GET' ? PAGES[pathname] : undefined;
  if (page) {
    response.writeHead(200, {
      'content-type': page[1],
      'content-security-policy': POLICY,
      'x-content-type-options': 'nosniff',
      'referrer-policy': 'no-referrer',
      'cache-control': 'no-cache',
    });
    return response.end(readFileSync(dist + page[0]));
  }
  if (pathname === '/health') return send(response, { status: 'ok' });
  if (options.key !== null && request.headers.authorization !== `Bearer ${options.key}`) {
    return fail(response, 401, 'the key is missing or wrong', 'authentication_error', 'invalid_api_key');
  }
  const body = await read(request);
  const json = request.headers['content-type'] === 'application/json' ? JSON.parse(body.toString() || '{}') : null;
  if (json) state.bodies.push([pathname, json]);
  const route = `${request.method} ${pathname}`;
  if (route === 'GET /v1/models') return send(response, { object: 'list', data: models(state) });
  if (route === 'GET /props') return send(response, props());
  if (route === 'GET /metrics') return metrics(state, response);
  if (route === 'GET /v1/adapters') return send(response, { object: 'list', data: state.adapters });
  if (route === 'POST /v1/adapters') return loadAdapter(state, response, json);
  if (route === 'POST /v1/chat/completions') return chat(state, options, request, response, json);
  if (route === 'POST /v1/completions') return complete(state, options, request, response, json);
  if (pathname.startsWith('/v1/adapters/')) return unload(state, response, decodeURIComponent(pathname.slice(13)));
  if (pathname.startsWith('/v1/files')) return files(state, request, response, pathname, body);
  if (pathname.startsWith('/v1/fine_tuning/jobs')) return jobs(state, request, response, pathname, searchParams, json);
  return fail(response, 404, `no route \`${pathname}\``, 'not_found_error');
}

function read(request) {
  return new Promise((resolve, reject) => {
    const parts = [];
    request.on('data', (part) => parts.push(part));
    request.on('end', () => resolve(Buffer.concat(parts)));
    request.on('error', reject);
  });
}

function send(response, value, status = 200) {
  response.writeHead(status, { 'content-type': 'application/json', 'cache-control': 'no-store' });
  response.end(JSON.stringify(value));
}

function fail(response, status, message, type, code = null, param = null) {
  send(response, { error: { message, type, param, code } }, status);
}

function models(state) {
  const base = { object: 'model', created: now() - 7200, owned_by: 'local' };
  return [
    ...state.models.map((model) => ({ ...base, ...model })),
    ...state.adapters.map(({ id, generation, rank, method }) => ({ ...base, id, parent: 'nano', generation, context_length: 2048, adapter: { rank, method } })),
  ];
}

function props() {
  return {
    default_generation_settings: {
      n_ctx: 2048,
      params: { temperature: 0.7, top_p: 0.9, top_k: 0, min_p: 0, repeat_penalty: 1.1, frequency_penalty: 0, presence_penalty: 0, seed: 0, n_predict: -1 },
    },
    total_slots: 8,
    n_ctx: 2048,
    model_path: 'nano',
    build_info: 'metal-candle 0.0.0',
    fill_in_the_middle: true,
    running: 0,
    waiting: 0,
    deterministic: true,
  };
}

function metrics(state, response) {
  state.generated += state.running * 80;
  response.writeHead(200, { 'content-type': 'text/plain; version=0.0.4' });
  response.end(
    [
      '# TYPE metal_candle_requests_running gauge',
      `metal_candle_requests_running ${state.running}`,
      'metal_candle_requests_waiting 0',
      `metal_candle_generated_tokens_total ${state.generated}`,
      'metal_candle_prefix_cache_queries_total 20000',
      'metal_candle_prefix_cache_hits_total 12900',
      'metal_candle_kv_bytes 31457280',
      'metal_candle_kv_slots{state="used"} 1',
      '',
    ].join('\n'),
  );
}

function loadAdapter(state, response, { name, path, replace }) {
  const old = state.adapters.find((entry) => entry.id === name);
  if (old && !replace) return fail(response, 409, `an adapter has the name \`${name}\``, 'conflict_error');
  if (path.startsWith('/') || path.includes('..') || path.includes('missing')) {
    return fail(response, 404, `no adapter is at \`${path}\` below the root of adapters`, 'not_found_error', null, 'path');
  }
  const loaded = adapter(name, (state.generations += 1), 'lora', 8, path);
  state.adapters = [...state.adapters.filter((entry) => entry.id !== name), loaded];
  return send(response, loaded, 201);
}

function unload(state, response, name) {
  const found = state.adapters.find((entry) => entry.id === name);
  if (!found) return fail(response, 404, `no adapter has the name \`${name}\``, 'not_found_error');
  state.adapters = state.adapters.filter((entry) => entry !== found);
  return send(response, { id: name, object: 'adapter', deleted: true, in_flight: found.in_flight });
}

/** Cuts a text into pieces of two or three characters, never inside one. */
function pieces(text, size = 3) {
  const segments = [...new Intl.Segmenter('en', { granularity: 'grapheme' }).segment(text)].map(({ segment }) => segment);
  const found = [];
  for (let at = 0; at < segments.length; at += size) found.push(segments.slice(at, at + size).join(''));
  return found;
}

/** Writes events until the client is gone. Cuts each in two, as a network may. */
function stream(state, request, response) {
  let open = true;
  state.running += 1;
  const end = (cancelled) => {
    if (!open) return;
    open = false;
    state.running -= 1;
    if (cancelled) state.cancelled += 1;
  };
  response.on('close', () => end(!response.writableEnded));
  response.writeHead(200, { 'content-type': 'text/event-stream; charset=utf-8', 'cache-control': 'no-cache, no-transform' });
  return {
    isOpen: () => open,
    async send(value) {
      const bytes = Buffer.from(`data: ${typeof value === 'string' ? value : JSON.stringify(value)}\n\n`);
      const middle = Math.floor(bytes.length / 2);
      response.write(bytes.subarray(0, middle));
      await sleep(1);
      response.write(bytes.subarray(middle));
    },
    close() {
      end(false);
      response.end();
    },
  };
}

async function chat(state, options, request, response, body) {
  const known = models(state).find((model) => model.id === body.model) ?? (/^ft:/.test(body.model) ? { id: body.model } : null);
  if (!known) return fail(response, 404, `no model has the name \`${body.model}\``, 'not_found_error', 'model_not_found', 'model');
  const prompt = body.messages.at(-1).content;
  if (/too long/.test(prompt)) {
    return fail(response, 400, 'the prompt has 3012 tokens and the context 2048', 'invalid_request_error', 'context_length_exceeded', 'messages');
  }
  const kind = /html/i.test(prompt) ? 'html' : /stack/i.test(prompt) ? 'code' : 'plain';
  let text = ANSWERS[kind];
  if (/long/i.test(prompt)) text = 'All work and no play makes a dull page. '.repeat(200);
  if (body.model !== 'nano') text = `${body.model} says: ${text}`;
  if (body.seed !== undefined && /seed/.test(prompt)) text = `seed ${body.seed}`;
  const output = stream(state, request, response);
  const chunk = (choices, usage = null) => ({ id: 'chatcmpl-1', object: 'chat.completion.chunk', created: now(), model: body.model, choices, usage });
  await sleep(options.delay * 10);
  await output.send(chunk([{ index: 0, delta: { role: 'assistant', content: '' }, logprobs: null, finish_reason: null }]));
  await output.send(chunk([{ index: 0, delta: {}, logprobs: null, finish_reason: null }]));
  if (/think/.test(prompt)) await output.send(chunk([{ index: 0, delta: { reasoning_content: 'The user wants a thought.' }, finish_reason: null }]));
  let tokens = 0;
  for (const piece of pieces(text)) {
    if (!output.isOpen()) return;
    if (/fail/.test(prompt) && tokens === 5) {
      await output.send({ error: { message: 'the step failed', type: 'server_error', param: null, code: null } });
      return output.close();
    }
    await output.send(chunk([{ index: 0, delta: { content: piece }, logprobs: null, finish_reason: null }]));
    tokens += 1;
    if (body.max_tokens && tokens >= body.max_tokens) break;
    await sleep(options.delay);
  }
  const finish = body.max_tokens && tokens >= body.max_tokens ? 'length' : 'stop';
  await output.send(chunk([{ index: 0, delta: {}, logprobs: null, finish_reason: finish }]));
  if (body.stream_options?.include_usage) {
    const prompted = 20 + JSON.stringify(body.messages).length / 4;
    await output.send(
      chunk([], {
        prompt_tokens: Math.round(prompted), completion_tokens: tokens + 1, total_tokens: Math.round(prompted) + tokens + 1,
        prompt_tokens_details: { cached_tokens: body.messages.length > 2 ? 64 : 0 },
      }),
    );
  }
  await output.send('[DONE]');
  output.close();
}

async function complete(state, options, request, response, body) {
  if (!models(state).some((model) => model.id === body.model)) {
    return fail(response, 404, `no model has the name \`${body.model}\``, 'not_found_error', 'model_not_found', 'model');
  }
  const text = body.suffix === undefined ? 'match n {\n        0 => 0,\n        1 => 1,\n        n => fibonacci(n - 1) + fibonacci(n - 2),\n    }\n}\n' : 'let sum = left + right;';
  const output = stream(state, request, response);
  const chunk = (choices, usage = null) => ({ id: 'cmpl-1', object: 'text_completion', created: now(), model: body.model, choices, usage });
  const tokens = text.match(/\s*\w+|\s*[^\s\w]+|\s+$/g);
  for (const [index, token] of tokens.entries()) {
    if (!output.isOpen()) return;
    const probability = [0.99, 0.86, 0.62, 0.31, 0.12, 0.03][(index * 7) % 6];
    const logprobs = {
      tokens: [token],
      token_logprobs: [Math.log(probability)],
      top_logprobs: [{ [token]: Math.log(probability), ' if': Math.log((1 - probability) * 0.6), '\n': Math.log((1 - probability) * 0.3) }],
      text_offset: [0],
    };
    await output.send(chunk([{ index: 0, text: token, logprobs, finish_reason: null }]));
    await sleep(options.delay);
  }
  await output.send(chunk([{ index: 0, text: '', logprobs: null, finish_reason: 'stop' }]));
  await output.send(chunk([], { prompt_tokens: 12, completion_tokens: tokens.length, total_tokens: 12 + tokens.length }));
  await output.send('[DONE]');
  output.close();
}

function files(state, request, response, pathname, body) {
  const id = pathname.slice('/v1/files/'.length);
  if (request.method === 'GET' && id === '') return send(response, { object: 'list', data: [...state.files.values()], has_more: false });
  if (request.method === 'GET') return state.files.has(id) ? send(response, state.files.get(id)) : fail(response, 404, `no file \`${id}\``, 'not_found_error');
  if (request.method === 'DELETE') {
    state.files.delete(id);
    return send(response, { id, object: 'file', deleted: true });
  }
  const text = body.toString();
  const purpose = /name="purpose"\r\n\r\n([^\r]*)/.exec(text)?.[1];
  const part = /name="file"; filename="([^"]*)"[^]*?\r\n\r\n([^]*?)\r\n--/.exec(text);
  if (purpose !== 'fine-tune' || !part) return fail(response, 400, 'the form needs `purpose` and `file`', 'invalid_request_error');
  const lines = part[2].split('\n').filter((line) => line !== '');
  const findings = [];
  let bad = false;
  lines.forEach((line, index) => {
    try {
      const row = JSON.parse(line);
      if (!row.messages && row.text === undefined && row.prompt === undefined) {
        bad = true;
        findings.push({ line: index + 1, message: 'the row has none of `messages`, `prompt` and `text`' });
      } else if (row.text === '') {
        findings.push({ line: index + 1, message: 'the row is empty and is left out' });
      }
    } catch {
      bad = true;
      findings.push({ line: index + 1, message: 'the line is not JSON' });
    }
  });
  const file = {
    id: `file-${state.files.size + 1}`, object: 'file', bytes: part[2].length, created_at: now(), filename: part[1], purpose,
    status: bad ? 'error' : 'processed', status_details: bad ? 'a line cannot be used' : null,
    report: { rows: lines.length, tokens: lines.length * 57, findings },
  };
  state.files.set(file.id, file);
  return send(response, file);
}

function job({ id, suffix, steps, started, ended = false, body = {} }) {
  return { id, suffix, steps, started, stopped: ended ? started + steps / 4 : null, cancelled: false, body };
}

/** A job does four steps a second. */
function stepsOf(entry) {
  return Math.min(entry.steps, Math.floor(((entry.stopped ?? Date.now() / 1000) - entry.started) * 4));
}

function view(entry) {
  const done = stepsOf(entry) >= entry.steps || entry.cancelled || entry.failed;
  const status = entry.failed ? 'failed' : entry.cancelled ? 'cancelled' : done ? 'succeeded' : entry.paused ? 'queued' : 'running';
  return {
    id: entry.id, object: 'fine_tuning.job', created_at: Math.floor(entry.started), finished_at: done ? Math.floor(entry.started + stepsOf(entry) / 4) : null,
    status, model: 'nano', fine_tuned_model: status === 'failed' ? null : `ft:nano:local:${entry.suffix}:${entry.id}`, organization_id: 'local', result_files: [],
    trained_tokens: stepsOf(entry) * 512, training_file: 'file-1', validation_file: null, seed: 7,
    hyperparameters: { n_epochs: 3, batch_size: 8, learning_rate_multiplier: 1 }, method: { type: 'supervised' }, error: entry.failed ?? null,
    estimated_finish: done ? null : Math.floor(entry.started + entry.steps / 4), metadata: null, integrations: [], user_provided_suffix: entry.suffix,
    metal_candle: { rank: 16, alpha: 32, learning_rate: 2e-4, max_steps: entry.steps, save_interval: 40, serve: 'best', is_paused: Boolean(entry.paused) },
  };
}

function events(entry) {
  const found = [{ level: 'info', message: 'the data is valid', type: 'message', step: 0 }];
  for (let step = 1; step <= stepsOf(entry); step += 1) {
    const noise = Math.sin(step * 12.9898) * 0.12;
    const loss = 0.9 + 2.4 * Math.exp(-step / 45) + noise;
    found.push({
      level: 'info', message: `step ${step}`, type: 'metrics', step,
      data: { event: 'step', step, epoch: step / 80, loss, learning_rate: 2e-4 * Math.min(1, step / 20) * (1 - step / 300), grad_norm: 1 + noise * 3, tokens: step * 600, trained_tokens: step * 512 },
    });
    if (step % 20 === 0) found.push({ level: 'info', message: `evaluation at step ${step}`, type: 'metrics', step, data: { event: 'evaluation', step, loss: loss - noise + 0.15 } });
    if (step % 40 === 0) found.push({ level: 'info', message: `checkpoint at step ${step}`, type: 'message', step });
    if (step === 60) found.push({ level: 'warn', message: '3 rows are longer than the context and were cut', type: 'message', step });
  }
  if (entry.failed) found.push({ level: 'error', message: entry.failed.message, type: 'message', step: stepsOf(entry) });
  return found
    .map(({ step, ...event }, index) => ({ id: `ftevent-${entry.id}-${index}`, object: 'fine_tuning.job.event', created_at: Math.floor(entry.started + step / 4), data: null, ...event }))
    .reverse();
}

function checkpoints(entry) {
  return Array.from({ length: Math.floor(stepsOf(entry) / 40) }, (_, index) => {
    const step = (index + 1) * 40;
    return {
      id: `ftckpt-${entry.id}-${step}`, object: 'fine_tuning.job.checkpoint', created_at: Math.floor(entry.started + step / 4), fine_tuning_job_id: entry.id,
      fine_tuned_model_checkpoint: `ft:nano:local:${entry.suffix}:${entry.id}:ckpt-step-${step}`, step_number: step,
      metrics: { step, train_loss: 0.9 + 2.4 * Math.exp(-step / 45), full_valid_loss: 1.05 + 2.4 * Math.exp(-step / 45) },
    };
  }).reverse();
}

function pageOf(list, parameters) {
  const start = parameters.has('after') ? list.findIndex((entry) => entry.id === parameters.get('after')) + 1 : 0;
  const data = list.slice(start, start + Number(parameters.get('limit') ?? 20));
  return { object: 'list', data, first_id: data[0]?.id ?? null, last_id: data.at(-1)?.id ?? null, has_more: start + data.length < list.length };
}

function jobs(state, request, response, pathname, parameters, body) {
  const [id, part] = pathname.slice('/v1/fine_tuning/jobs/'.length).split('/').map(decodeURIComponent);
  if (request.method === 'POST' && !id) {
    const file = state.files.get(body.training_file);
    if (!file) return fail(response, 404, `no file \`${body.training_file}\``, 'not_found_error', null, 'training_file');
    const steps = body.metal_candle?.max_steps ?? 160;
    if (body.metal_candle?.rank > 256) return fail(response, 400, 'the rank 512 is over the limit of 256', 'invalid_request_error', null, 'metal_candle.rank');
    if (body.dry_run) return send(response, { plan: { peak_memory_bytes: 412_000_000, memory_limit_bytes: 18_000_000_000, weights_bytes: 11_217_792, seconds: steps / 4, steps, tokens: steps * 456, tokens_per_second: 623.8 } });
    const made = job({ id: `ftjob-${state.jobs.size + 1}`, suffix: body.suffix ?? 'run', steps, started: Date.now() / 1000, body });
    state.jobs.set(made.id, made);
    return send(response, view(made));
  }
  if (!id) return send(response, pageOf([...state.jobs.values()].map(view).sort((a, b) => b.created_at - a.created_at), parameters));
  const entry = state.jobs.get(id);
  if (!entry) return fail(response, 404, `no job \`${id}\``, 'not_found_error');
  if (part === 'events') return send(response, pageOf(parameters.get('order') === 'asc' ? events(entry).reverse() : events(entry), parameters));
  if (part === 'checkpoints') return send(response, pageOf(checkpoints(entry), parameters));
  if (part === 'pause') {
    entry.stopped = Date.now() / 1000;
    entry.paused = true;
  }
  if (part === 'resume') {
    entry.started += Date.now() / 1000 - entry.stopped;
    entry.stopped = null;
    entry.paused = false;
  }
  if (part === 'cancel') {
    if (view(entry).finished_at !== null) return fail(response, 409, 'the job has ended', 'conflict_error');
    entry.stopped = Date.now() / 1000;
    entry.cancelled = true;
  }
  return send(response, view(entry));
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  const mock = await startMock({ port: Number(process.argv[2] ?? 8080), key: process.argv[3] ?? null, delay: 25 });
  console.log(mock.url);
}
