// Tests the web UI in Chromium: `npm run e2e` with the mock server, `npm run e2e -- URL [KEY]` with a running server.
//
// With a running server, the checks that need canned responses are skipped. CHROMIUM is the path of the browser.
import { mkdirSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { chromium } from 'playwright-core';
import { startMock } from './mock.mjs';

const [url, serverKey] = process.argv.slice(2);
const mocked = url === undefined;
const ARGUMENTS = ['--no-sandbox', '--headless=new', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking', '--disable-component-update', '--disable-sync'];
const folder = join(tmpdir(), `page-e2e-${process.pid}`);
mkdirSync(folder, { recursive: true });
const file = (name, text) => {
  const path = join(folder, name);
  writeFileSync(path, text);
  return path;
};

const browser = await chromium.launch({ executablePath: process.env.CHROMIUM ?? '/usr/bin/chromium', args: ARGUMENTS });
let failures = 0;
let passed = 0;

function assert(condition, message) {
  if (!condition) throw new Error(message);
}

/** Runs one check in a fresh profile. Afterwards nothing may have left the origin or been reported in the console. */
async function check(name, act, { only = null, key = null, viewport = { width: 1280, height: 800 }, colorScheme = 'light', hash = '', allow = [], offline = false, delay = 4 } = {}) {
  if ((only === 'mock' && !mocked) || (only === 'server' && mocked)) return;
  const mock = mocked ? await startMock({ key, delay }) : null;
  const base = mock?.url ?? url;
  const context = await browser.newContext({ viewport, colorScheme, acceptDownloads: true });
  const page = await context.newPage();
  page.setDefaultTimeout(mocked ? 10_000 : 60_000);
  const problems = [];
  // A server may be started without metrics or jobs.
  const allowed = mocked ? allow : [...allow, 404];
  const origin = new URL(base).origin;
  page.on('request', (request) => {
    if (!request.url().startsWith(origin) && !/^(data|blob):/.test(request.url())) problems.push(`request to ${request.url()}`);
  });
  page.on('console', (message) => {
    // Chromium reports every response with an error status; some checks expect them.
    if (message.type() === 'error' && /status of (\d+)/.test(message.text()) && allowed.includes(Number(/status of (\d+)/.exec(message.text())[1]))) return;
    if (offline && /ERR_CONNECTION_REFUSED|ERR_EMPTY_RESPONSE|ERR_CONNECTION_RESET/.test(message.text())) return;
    if (message.type() === 'error' || message.type() === 'warning') problems.push(`console: ${message.text()}`);
  });
  page.on('pageerror', (error) => problems.push(`error: ${error.message}`));
  try {
    if (!mocked && serverKey) await context.addInitScript((value) => sessionStorage.setItem('metal-candle.key', value), serverKey);
    await page.goto(base + hash);
    await act(page, mock, context);
    assert(problems.length === 0, problems.join('; '));
    passed += 1;
    console.log(`ok    ${name}`);
  } catch (error) {
    failures += 1;
    await page.screenshot({ path: join(folder, `${name.replaceAll(/\W+/g, '-')}.png`) }).catch(() => undefined);
    console.log(`FAIL  ${name}\n      ${String(error.message ?? error).split('\n').slice(0, 6).join('\n      ')}`);
  }
  await context.close();
  await mock?.close();
}

const prompt = (page) => page.getByLabel('Prompt', { exact: true });
const answers = (page) => page.locator('.answer');

async function say(page, text, { wait = true } = {}) {
  await prompt(page).fill(text);
  // Sending requires the list of models.
  await page.locator('button[aria-label=Send]:enabled').waitFor();
  await page.keyboard.press('Enter');
  if (!wait) return;
  await page.locator('.answer.done, .answer.failed, .answer.stopped').last().waitFor();
  await page.getByRole('button', { name: 'Send' }).waitFor();
}

/** Limits answers of a real server, whose models may write up to the end of the context. */
async function limit(page, tokens) {
  await page.getByLabel('Max tokens').fill(String(tokens));
}

/** A real model may end an answer before the check can stop it. */
async function neverEnding(page) {
  if (mocked) return;
  await page.route('**/v1/chat/completions', (route) => route.continue({ postData: JSON.stringify({ ...route.request().postDataJSON(), ignore_eos: true }) }));
}

await check('an answer streams in', async (page, mock) => {
  if (mocked) {
    await say(page, 'hello', { wait: false });
    const lengths = new Set();
    while (!(await page.getByRole('button', { name: 'Send' }).isVisible())) lengths.add((await answers(page).last().innerText()).length);
    assert(lengths.size > 3, `saw ${lengths.size} lengths of the text`);
    assert((await answers(page).last().innerText()).includes('Größe, 日本語 and 👩‍👩‍👧 arrive whole.'), 'the text is damaged');
    assert(mock.state.bodies.at(-1)[1].stream_options.include_usage, 'usage was not requested');
  } else {
    await limit(page, 24);
    await say(page, 'Write a function that adds two numbers.');
  }
  const text = await answers(page).last().innerText();
  for (const part of [/\d+ tokens?/, /seed \d+/, /first token after/, /prompt \d+/]) assert(part.test(text), `no ${part} in ${text}`);
  assert((await answers(page).last().getAttribute('class')).includes('done'), 'the answer is not done');
}, { delay: 40 });

await check('stopping ends the request and retains the text', async (page, mock) => {
  await neverEnding(page);
  await say(page, 'a long story', { wait: false });
  await page.locator('.answer.streaming').waitFor();
  await page.waitForTimeout(200);
  await page.keyboard.press('Escape');
  await page.locator('.answer.stopped').waitFor();
  assert((await answers(page).last().locator('.markdown').innerText()).length > 0, 'the text is missing');
  if (mock) {
    await page.waitForTimeout(100);
    assert(mock.state.cancelled === 1 && mock.state.running === 0, 'the server is still generating');
  }
});

await check('a chat survives a reload, also during a response', async (page) => {
  await neverEnding(page);
  await say(page, 'a long story', { wait: false });
  await page.locator('.answer.streaming .markdown').waitFor();
  await page.waitForTimeout(1500);
  await page.reload();
  await page.locator('.answer').waitFor();
  assert((await page.locator('.prompt-text').innerText()) === 'a long story', 'the prompt is missing');
  assert((await answers(page).last().locator('.markdown').innerText()).length > 0, 'the text is missing');
  assert(!(await answers(page).last().getAttribute('class')).includes('streaming'), 'the answer still runs');
  assert((await page.locator('.heads a').count()) === 1, 'the list does not have one conversation');
});

await check('a setting changed before the models are listed does not lose the model', async (page) => {
  await page.route('**/v1/models', async (route) => {
    await new Promise((resolve) => setTimeout(resolve, 800));
    await route.continue();
  });
  await page.reload();
  await limit(page, 8);
  assert((await page.getByLabel('Model', { exact: true }).inputValue()) === '', 'the models were listed too early for this check');
  await page.waitForTimeout(1500);
  await say(page, 'hello');
});

await check('editing and regenerating create versions', async (page, mock) => {
  await limit(page, 8);
  await say(page, 'first');
  await page.getByRole('button', { name: 'Regenerate' }).click();
  await page.getByText('2/2').waitFor();
  await page.getByRole('button', { name: 'Send' }).waitFor();
  await page.getByRole('button', { name: 'Edit prompt' }).click();
  await page.getByLabel('Edited prompt').fill('changed');
  await page.keyboard.press('Enter');
  await page.getByText('3/3').waitFor();
  await page.getByRole('button', { name: 'Send' }).waitFor();
  await page.getByRole('button', { name: 'Previous version' }).click();
  assert((await page.locator('.prompt-text').innerText()) === 'first', 'the other version is not shown');
  if (mock) {
    const seeds = mock.state.bodies.filter(([path]) => path.endsWith('completions')).map(([, body]) => body.seed);
    assert(new Set(seeds).size === 3, 'the seeds are not different');
  }
});

await check('the model of a conversation can be changed', async (page, mock) => {
  await page.getByLabel('Model', { exact: true }).selectOption('rust-docs');
  await say(page, 'hello');
  assert((await answers(page).last().innerText()).includes('rust-docs says'), 'the base model answered');
  await page.getByLabel('Model', { exact: true }).selectOption('nano');
  await say(page, 'again');
  const last = mock.state.bodies.at(-1)[1];
  assert(last.model === 'nano' && last.messages.length === 3, 'the second request is wrong');
}, { only: 'mock' });

await check('two models respond side by side with the same seed', async (page, mock) => {
  if (!mocked) await limit(page, 16);
  await page.getByRole('button', { name: 'Compare' }).click();
  await say(page, 'hello');
  assert((await answers(page).count()) === 2, 'there are not two answers');
  const [left, right] = [await answers(page).nth(0).boundingBox(), await answers(page).nth(1).boundingBox()];
  assert(left.y === right.y && left.x + left.width <= right.x, 'they are not side by side');
  const texts = await answers(page).allInnerTexts();
  const [a, b] = texts.map((text) => /seed (\d+)/.exec(text)[1]);
  assert(a === b, 'the seeds differ');
  if (mock) {
    const bodies = mock.state.bodies.filter(([path]) => path.endsWith('completions')).map(([, body]) => body);
    assert(bodies.length === 2 && bodies[0].seed === bodies[1].seed && bodies[0].model !== bodies[1].model, 'the requests are wrong');
  } else if ((await page.getByLabel('Second model').inputValue()) === (await page.getByLabel('Model', { exact: true }).inputValue())) {
    const [one, two] = await page.locator('.answer .markdown').allInnerTexts();
    assert(one === two, 'the same model and seed returned different texts');
  }
});

await check('valid parameters are sent, invalid ones are not', async (page, mock) => {
  await page.getByLabel('Temperature').fill('0.25');
  await page.getByLabel('Max tokens').fill('3');
  await page.getByLabel('Seed').fill('42');
  await page.getByLabel('System prompt').fill('Be brief.');
  await page.getByLabel('Temperature').fill('hot');
  await page.getByText('Enter a number from 0 to 2').waitFor();
  await say(page, 'hello');
  const body = mock.state.bodies.at(-1)[1];
  assert(body.temperature === 0.25 && body.max_tokens === 3 && body.seed === 42, JSON.stringify(body));
  assert(body.messages[0].role === 'system' && body.messages[0].content === 'Be brief.', 'no system prompt');
  assert((await answers(page).last().innerText()).includes('token limit reached'), 'the finish reason is not shown');
}, { only: 'mock' });

await check('HTML in a response stays text', async (page) => {
  await say(page, 'html please');
  const shown = await answers(page).last().innerText();
  for (const part of ['<script>window.broken = 1</script>', 'onerror=', '<b>bold?</b>']) assert(shown.includes(part), `${part} is not shown`);
  const found = await page.locator('.answer').evaluate((element) => element.querySelectorAll('script, img, b:not(.call b), iframe').length);
  assert(found === 0, 'the text was parsed as HTML');
  assert((await page.evaluate(() => window.broken)) === undefined, 'the script ran');
  const links = await page.locator('.answer a').evaluateAll((all) => all.map((link) => [link.getAttribute('href'), link.rel, link.target]));
  assert(links.length === 2 && links.every(([href, rel]) => href.startsWith('https://example.org/') && rel.includes('noreferrer')), JSON.stringify(links));
}, { only: 'mock' });

await check('HTML in a prompt and in names stays text', async (page, mock) => {
  mock.state.adapters[0].source = '<img src=x onerror="window.broken=1">';
  await say(page, '<img src=x onerror="window.broken=1">');
  assert((await page.locator('.prompt-text').innerText()).startsWith('<img'), 'the prompt is not shown');
  await page.getByRole('link', { name: 'Models' }).click();
  await page.getByText('<img src=x').first().waitFor();
  assert((await page.evaluate(() => [document.images.length, window.broken])).join() === '0,', 'the text was parsed as HTML');
}, { only: 'mock' });

await check('errors before and during a response are shown', async (page) => {
  await say(page, 'too long');
  await page.getByText('The prompt has 3012 tokens').waitFor();
  await say(page, 'fail now');
  await page.getByText('the step failed').waitFor();
}, { only: 'mock', allow: [400] });

await check('a wrong key prompts again', async (page) => {
  const dialog = page.getByRole('dialog');
  await dialog.waitFor();
  await page.getByLabel('API key', { exact: true }).fill('wrong');
  await page.keyboard.press('Enter');
  await page.getByText('The server rejected the key.').waitFor();
  await page.getByLabel('API key', { exact: true }).fill('right');
  await page.keyboard.press('Enter');
  await dialog.waitFor({ state: 'hidden' });
  await page.getByLabel('Model', { exact: true }).locator('option', { hasText: 'rust-docs' }).waitFor({ state: 'attached' });
  await page.reload();
  await say(page, 'hello');
  assert(!(await dialog.isVisible()), 'the key was not stored');
  const stored = await page.evaluate(() => [JSON.stringify(localStorage).includes('right'), Object.values(sessionStorage).includes('right')]);
  assert(!stored[0] && stored[1], 'the key is stored elsewhere');
}, { only: 'mock', key: 'right', allow: [401] });

await check('a dismissed key prompt does not reopen', async (page) => {
  await page.getByRole('dialog').waitFor();
  await page.keyboard.press('Escape');
  await page.getByText('The key is missing or wrong').waitFor();
  await page.getByRole('link', { name: 'Models' }).click();
  await page.waitForTimeout(2500);
  assert(!(await page.getByRole('dialog').isVisible()), 'the prompt reopened');
}, { only: 'mock', key: 'right', allow: [401] });

await check('a stopped and restarted server is detected', async (page, mock) => {
  const port = Number(new URL(mock.url).port);
  await page.getByLabel('Model', { exact: true }).locator('option', { hasText: 'rust-docs' }).waitFor({ state: 'attached' });
  await mock.close();
  await say(page, 'hello');
  await page.getByText('The server does not respond.').waitFor();
  const again = await startMock({ port });
  await page.getByText('Disconnected', { exact: true }).waitFor({ state: 'hidden' });
  await page.getByRole('button', { name: 'Regenerate' }).click();
  await page.locator('.answer.done').waitFor();
  await again.close();
}, { only: 'mock', offline: true });

await check('a text is continued, coloured and inserted', async (page, mock) => {
  await page.getByLabel('Text', { exact: true }).fill('fn main() {\n    ');
  if (!mocked) await page.getByRole('button', { name: 'Parameters' }).click().then(() => limit(page, 12));
  await page.getByLabel('Text', { exact: true }).press('Control+Enter');
  await page.getByRole('button', { name: 'Insert' }).waitFor();
  assert((await page.locator('.result .token[class*="level-"]').count()) > 2, 'no token has a colour');
  await page.locator('.result-text .token').filter({ hasText: /\w/ }).first().hover();
  assert((await page.locator('.alternatives tr').count()) >= 2, 'no alternatives are shown');
  const shown = await page.locator('.result-text').evaluate((element) => element.textContent);
  await page.getByLabel('Text', { exact: true }).focus();
  await page.keyboard.press('Tab');
  assert((await page.getByLabel('Text', { exact: true }).inputValue()) === shown, 'the text was not inserted');
  if (mock) assert(mock.state.bodies.at(-1)[1].suffix === undefined && mock.state.bodies.at(-1)[1].logprobs === 5, 'the request is wrong');
}, { hash: '#complete' });

await check('a gap is filled in at the cursor', async (page, mock) => {
  const area = page.getByLabel('Text', { exact: true });
  await area.fill('let a = ;\nprint(a)');
  await page.getByText('Fill in', { exact: true }).click();
  await area.focus();
  await area.evaluate((element) => element.setSelectionRange(8, 8));
  await page.getByRole('button', { name: 'Fill in at the cursor' }).click();
  await page.getByRole('button', { name: 'Insert' }).waitFor();
  const body = mock.state.bodies.at(-1)[1];
  assert(body.prompt === 'let a = ' && body.suffix === ';\nprint(a)', JSON.stringify(body));
  await page.getByRole('button', { name: 'Insert' }).click();
  assert((await area.inputValue()) === 'let a = let sum = left + right;;\nprint(a)', await area.inputValue());
}, { only: 'mock', hash: '#complete' });

await check('adapters are loaded and unloaded', async (page, mock) => {
  await page.getByRole('rowheader', { name: 'rust-docs' }).waitFor();
  await page.getByLabel('Name').fill('fresh');
  await page.getByLabel('Folder').fill('missing/adapter');
  await page.getByRole('button', { name: 'Load', exact: true }).click();
  await page.getByText('No adapter is at').waitFor();
  await page.getByLabel('Folder').fill('002/adapter');
  await page.getByRole('button', { name: 'Load', exact: true }).click();
  await page.getByText('fresh is loaded as generation 5.').waitFor();
  const row = page.getByRole('row', { name: /fresh/ });
  await row.getByRole('button', { name: 'Unload' }).click();
  assert(mock.state.adapters.length === 3, 'one click unloaded it');
  await row.getByRole('button', { name: 'Unload now' }).click();
  await row.waitFor({ state: 'detached' });
  assert(mock.state.requests.includes('DELETE /v1/adapters/fresh'), 'no request');
}, { only: 'mock', hash: '#models', allow: [404] });

await check('findings of an invalid file are shown, a valid file trains, and its checkpoint can chat', async (page, mock) => {
  await page.getByRole('button', { name: 'New run' }).click();
  await page.getByLabel('Training data: upload a file').setInputFiles(file('bad.jsonl', '{"text":"fine"}\n{"txt":"no"}\nno json\n'));
  await page.getByText('The file cannot be used: ').waitFor();
  await page.getByText('Line 3').waitFor();
  await page.getByText('no json', { exact: true }).waitFor();
  assert(await page.getByRole('button', { name: 'Start the run' }).isDisabled(), 'a run can start with an invalid file');
  await page.getByLabel('Training data: upload a file').setInputFiles(file('good.jsonl', '{"text":"fine"}\n{"text":"also"}\n'));
  await page.getByText('2 rows, 114 tokens, no problems found').waitFor();
  await page.getByLabel('Max steps').fill('0');
  await page.getByText('Enter a whole number from 1').waitFor();
  await page.getByLabel('Max steps').fill('60');
  await page.getByLabel('Name').fill('mine');
  await page.getByText('412 MB').waitFor();
  assert(mock.state.jobs.size === 2, 'the plan started a job');
  await page.getByRole('button', { name: 'Start the run' }).click();
  await page.getByRole('heading', { name: 'mine' }).waitFor();
  await page.locator('.plot canvas').waitFor();
  await page.getByRole('heading', { name: 'Checkpoints' }).waitFor({ timeout: 20_000 });
  await page.locator('section', { hasText: 'Checkpoints' }).getByRole('button', { name: 'Compare with base' }).first().click();
  await say(page, 'hello');
  assert((await answers(page).nth(1).innerText()).includes('ckpt-step-40 says'), 'the checkpoint did not respond');
}, { only: 'mock', hash: '#runs' });

await check('a server trains an uploaded file, and its checkpoint is compared with the base model', async (page) => {
  const offered = await page.getByRole('button', { name: 'New run' }).isEnabled();
  await page.waitForTimeout(500);
  if (!offered || (await page.getByRole('button', { name: 'New run' }).isDisabled())) return console.log('      (the server runs no jobs)');
  await page.getByRole('button', { name: 'New run' }).click();
  await page.getByLabel('Training data: upload a file').setInputFiles(file('bad.jsonl', '{"text":"fine"}\n{"txt":"no"}\nno json\n'));
  await page.getByText('The file cannot be used').waitFor();
  await page.getByText('Line 3').waitFor();
  const rows = Array.from({ length: 40 }, (_, index) => JSON.stringify({ text: `fn add_${index}(a: i32) -> i32 { a + ${index} }` }));
  await page.getByLabel('Training data: upload a file').setInputFiles(file('good.jsonl', `${rows.join('\n')}\n`));
  await page.getByText(/40 rows, [\d,]+ tokens/).waitFor();
  await page.getByLabel('Max steps').fill('12');
  await page.getByLabel('Save interval').fill('6');
  await page.getByLabel('Name').fill('tried');
  await page.getByText('Peak memory').waitFor();
  await page.getByRole('button', { name: 'Start the run' }).click();
  await page.getByRole('heading', { name: 'tried' }).waitFor();
  await page.locator('.plot canvas').waitFor();
  await page.locator('.job .status.succeeded').waitFor({ timeout: 180_000 });
  await page.locator('.figures div', { hasText: 'Step' }).getByText('12', { exact: true }).waitFor();
  await page.getByRole('button', { name: 'Compare with base' }).first().click();
  await limit(page, 8);
  await say(page, 'fn add_3');
  assert((await page.locator('.answer.done').count()) === 2, await page.locator('.answers').innerText());
}, { only: 'server', hash: '#runs' });

await check('the curve has the values of the events, and a run can be cancelled', async (page) => {
  await page.getByRole('button', { name: 'New run' }).click();
  await page.getByLabel('Training data: upload a file').setInputFiles(file('good.jsonl', '{"text":"fine"}\n'));
  await page.getByText('412 MB').waitFor();
  await page.getByRole('button', { name: 'Start the run' }).click();
  await page.locator('.plot canvas').waitFor();
  await page.waitForTimeout(3500);
  const step = Number((await page.locator('.figures div', { hasText: 'Step' }).locator('dd').first().innerText()).replace(',', ''));
  assert(step >= 6, `only ${step} steps are shown`);
  const box = await page.locator('.plot .u-over').boundingBox();
  await page.mouse.move(box.x + 1, box.y + box.height / 2);
  const legend = await page.locator('.u-legend').innerText();
  const expected = Number((0.9 + 2.4 * Math.exp(-1 / 45) + Math.sin(12.9898) * 0.12).toPrecision(3));
  assert(legend.includes(String(expected)), `${expected} is not in ${legend}`);
  await page.getByRole('button', { name: 'Pause' }).click();
  await page.locator('.job .status.paused').waitFor();
  await page.getByRole('button', { name: 'Resume' }).click();
  await page.locator('.job .status.running').waitFor();
  await page.getByRole('button', { name: 'Cancel run' }).click();
  await page.getByRole('button', { name: 'Cancel now' }).click();
  await page.locator('.job .status.cancelled').waitFor();
}, { only: 'mock', hash: '#runs' });

await check('a conversation is exported, imported, renamed and deleted', async (page) => {
  await limit(page, 8);
  await say(page, 'remember me');
  const actions = page.getByLabel('Conversation actions');
  await actions.click();
  const [saved] = await Promise.all([page.waitForEvent('download'), page.getByRole('button', { name: 'Export as JSON' }).click()]);
  const path = join(folder, 'export.json');
  await saved.saveAs(path);
  await actions.click().catch(() => undefined);
  if (!(await page.getByRole('button', { name: 'Rename' }).isVisible())) await actions.click();
  await page.getByRole('button', { name: 'Rename' }).click();
  await page.getByLabel('Title').fill('renamed');
  await page.keyboard.press('Enter');
  await page.locator('.heads a', { hasText: 'renamed' }).waitFor();
  await page.locator('.sidebar input[type=file]').setInputFiles(path);
  await page.locator('.heads a', { hasText: 'remember me' }).waitFor();
  assert((await page.locator('.heads a').count()) === 2, 'the import replaced the conversation');
  await actions.click();
  await page.getByRole('button', { name: 'Delete' }).click();
  await page.getByRole('button', { name: 'Delete permanently' }).click();
  await page.locator('.heads a', { hasText: 'remember me' }).waitFor({ state: 'detached' });
  await page.reload();
  await page.locator('.heads a').first().waitFor();
  assert((await page.locator('.heads a').allInnerTexts()).join() === 'renamed', 'the list is wrong after a reload');
});

for (const tab of ['chat', 'complete', 'models', 'runs', 'runs/new', 'runs/ftjob-done']) {
  await check(`phone width without horizontal scroll: ${tab}`, async (page) => {
    if (tab === 'chat') {
      await page.getByRole('button', { name: 'Compare' }).click();
      await say(page, mocked ? 'a stack with a_word_that_is_very_wide_and_has_no_space_in_it_at_all_to_break' : 'hi');
    }
    await page.waitForTimeout(600);
    const wide = await page.evaluate(() => {
      const limit = innerWidth;
      if (document.documentElement.scrollWidth <= limit && document.body.scrollWidth <= limit) {
        const scrolls = (element) => element.closest('.scroll-x, pre, .heads, .visually-hidden, .u-legend');
        const out = [...document.querySelectorAll('main *')].find((element) => !scrolls(element) && element.getBoundingClientRect().right > limit + 1);
        return out ? out.outerHTML.slice(0, 120) : null;
      }
      return `page ${document.documentElement.scrollWidth}`;
    });
    assert(wide === null, wide);
  }, { viewport: { width: 360, height: 740 }, hash: `#${tab}` });
}

await check('dark mode follows the system and the switch', async (page) => {
  const shade = () => page.evaluate(() => getComputedStyle(document.body).backgroundColor.match(/\d+/g).map(Number)[0]);
  assert((await shade()) < 60, 'not dark by the system');
  await page.getByRole('button', { name: 'System theme' }).click();
  assert((await shade()) > 200, 'not light by the switch');
  await page.getByRole('button', { name: 'Light theme' }).click();
  await page.emulateMedia({ colorScheme: 'light' });
  assert((await shade()) < 60, 'not dark by the switch');
  await page.reload();
  assert((await shade()) < 60, 'the setting was not stored');
}, { colorScheme: 'dark' });

await check('the keyboard reaches everything, with a visible focus', async (page) => {
  await page.getByLabel('Model', { exact: true }).locator('option').nth(1).waitFor({ state: 'attached' });
  await page.locator('body').click({ position: { x: 700, y: 300 } });
  const seen = [];
  for (let presses = 0; presses < 40; presses += 1) {
    await page.keyboard.press('Tab');
    const entry = await page.evaluate(() => {
      const element = document.activeElement;
      const box = element.closest('.composer-box') ?? element;
      const style = getComputedStyle(element);
      const name = element.getAttribute('aria-label') ?? element.labels?.[0]?.innerText ?? element.innerText ?? element.placeholder;
      return { tag: element.tagName, name: name.trim(), visible: style.outlineStyle !== 'none' || getComputedStyle(box).boxShadow !== 'none' };
    });
    if (entry.tag !== 'BODY') seen.push(entry);
  }
  for (const name of ['Chat', 'Complete', 'New chat', 'Model', 'Compare', 'Prompt', 'Temperature']) {
    assert(seen.some((entry) => entry.name === name), `Tab does not reach ${name}: ${seen.map((entry) => entry.name).join(', ')}`);
  }
  const nameless = seen.filter((entry) => entry.name === '');
  const invisible = seen.filter((entry) => !entry.visible);
  assert(nameless.length === 0 && invisible.length === 0, JSON.stringify([...nameless, ...invisible]));
  await prompt(page).focus();
  await page.keyboard.type('one');
  await page.keyboard.press('Shift+Enter');
  await page.keyboard.type('two');
  assert((await prompt(page).inputValue()) === 'one\ntwo', 'Shift+Enter does not insert a line break');
}, { only: 'mock' });

await check('the security headers are strict', async (page) => {
  const response = await page.reload();
  const headers = response.headers();
  for (const part of ["default-src 'none'", "script-src 'self'", "style-src 'self'", "connect-src 'self'", "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'"]) {
    assert(headers['content-security-policy']?.includes(part), `no ${part}`);
  }
  assert(headers['x-content-type-options'] === 'nosniff' && headers['referrer-policy'] === 'no-referrer', JSON.stringify(headers));
});

await browser.close();
console.log(`${passed} passed, ${failures} failed${failures ? `; pictures are in ${folder}` : ''}`);
process.exit(failures ? 1 : 0);
