// The Complete tab: continues a text or fills in at the cursor, and colours tokens by probability.
import { useEffect, useRef, useState } from 'preact/hooks';
import { describeError, request } from '../api/client';
import { baseModel, server } from '../api/server';
import { readEvents } from '../api/sse';
import type { CompletionChunk } from '../api/types';
import { randomSeed, readSetting, writeSetting } from '../base/browser';
import { duration, figure, plural } from '../base/format';
import { useStore } from '../base/store';
import { IconButton, Notice } from '../base/widgets';
import { ModelSelect } from '../settings/model-select';
import { ParameterPanel } from '../settings/panel';
import { type Parameters, readParameters, requestFields } from '../settings/parameters';
import { addCompletionChunk, type Completion, type CompletionToken, completionText, level, meanProbability, NO_COMPLETION } from './tokens';

type Mode = 'continue' | 'fill';

interface Run {
  prefix: string;
  suffix: string;
  seed: number;
  completion: Completion;
  running: boolean;
  stopped: boolean;
  started: number;
  ended: number | null;
}

const EXAMPLE = 'fn fibonacci(n: u64) -> u64 {\n    ';
const DEFAULT_TOKENS = 64;

export function CompleteTab() {
  const state = useStore(server);
  const [text, setText] = useState(() => readSetting('complete.text', EXAMPLE));
  const [selectedMode, setMode] = useState<Mode>(() => (readSetting<unknown>('complete.mode', 'continue') === 'fill' ? 'fill' : 'continue'));
  const [chosen, setChosen] = useState(() => readSetting('complete.model', ''));
  const [parameters, setParameters] = useState(() => readParameters(readSetting('complete.parameters', { max_tokens: DEFAULT_TOKENS })));
  const [open, setOpen] = useState(false);
  const [run, setRun] = useState<Run | null>(null);
  const area = useRef<HTMLTextAreaElement>(null);
  const cursor = useRef(text.length);
  const controller = useRef<AbortController | null>(null);
  const canFill = state.props?.fill_in_the_middle !== false;
  const mode = canFill ? selectedMode : 'continue';
  const model = chosen !== '' && state.models.some((known) => known.id === chosen) ? chosen : baseModel(state);

  useEffect(() => () => controller.current?.abort(), []);
  useEffect(() => {
    const timer = setTimeout(() => writeSetting('complete.text', text), 500);
    return () => clearTimeout(timer);
  }, [text]);

  const complete = async () => {
    if (model === '' || run?.running) return;
    const at = mode === 'fill' ? (area.current?.selectionStart ?? cursor.current) : text.length;
    const prefix = text.slice(0, at);
    const suffix = text.slice(at);
    const seed = parameters.seed ?? randomSeed();
    const abort = new AbortController();
    controller.current = abort;
    let completion = NO_COMPLETION;
    const started = Date.now();
    const show = (running: boolean) =>
      setRun({ prefix, suffix, seed, completion, running, stopped: abort.signal.aborted, started, ended: running ? null : Date.now() });
    show(true);
    let timer: ReturnType<typeof setTimeout> | undefined;
    try {
      const response = await request('v1/completions', {
        method: 'POST',
        signal: abort.signal,
        json: {
          ...requestFields(parameters, 'completion'),
          model,
          prompt: prefix,
          ...(mode === 'fill' ? { suffix } : {}),
          seed,
          logprobs: 5,
          stream: true,
          stream_options: { include_usage: true },
        },
      });
      for await (const { data } of readEvents(response.body!)) {
        if (data === '[DONE]') break;
        completion = addCompletionChunk(completion, JSON.parse(data) as CompletionChunk);
        timer ??= setTimeout(() => {
          timer = undefined;
          show(true);
        }, 33);
      }
      if (completion.finish === null && completion.error === null) completion = { ...completion, error: 'The connection closed before the completion ended.' };
    } catch (error) {
      if (!abort.signal.aborted) completion = { ...completion, error: describeError(error) };
    }
    clearTimeout(timer);
    show(false);
  };

  const accept = () => {
    if (!run || run.running) return;
    const added = completionText(run.completion);
    const next = run.prefix + added + run.suffix;
    setText(next);
    setRun(null);
    const end = run.prefix.length + added.length;
    cursor.current = end;
    requestAnimationFrame(() => {
      area.current?.focus();
      area.current?.setSelectionRange(end, end);
    });
  };
  const dismiss = () => {
    if (run?.running) controller.current?.abort();
    else setRun(null);
    area.current?.focus();
  };
  const ready = run !== null && !run.running && run.completion.tokens.length > 0;

  return (
    <div class="complete">
      <main
        class="complete-main"
        onKeyDown={(event) => {
          if (event.key === 'Escape' && run) dismiss();
          if (event.key === 'Enter' && (event.ctrlKey || event.metaKey)) {
            event.preventDefault();
            void complete();
          }
        }}
      >
        <div class="toolbar">
          <ModelSelect value={model} label="Model" onChange={(next) => (setChosen(next), writeSetting('complete.model', next))} />
          <div class="segments" role="radiogroup" aria-label="Mode">
            {(['continue', 'fill'] as const).map((name) => (
              <label
                key={name}
                class={mode === name ? 'on' : ''}
                title={name === 'continue' ? 'Append to the text' : canFill ? 'Insert at the cursor' : 'This model does not support fill-in-the-middle'}
              >
                <input
                  type="radio"
                  name="mode"
                  class="visually-hidden"
                  checked={mode === name}
                  disabled={name === 'fill' && !canFill}
                  onChange={() => (setMode(name), writeSetting('complete.mode', name))}
                />
                {name === 'continue' ? 'Continue' : 'Fill in'}
              </label>
            ))}
          </div>
          <span class="space" />
          <IconButton icon="sliders" label="Parameters" pressed={open} onClick={() => setOpen(!open)} />
        </div>
        <label class="visually-hidden" for="complete-text">
          Text
        </label>
        <textarea
          id="complete-text"
          ref={area}
          class="mono editor"
          spellcheck={false}
          value={text}
          placeholder="Start a text or some code"
          onInput={(event) => setText(event.currentTarget.value)}
          onSelect={(event) => (cursor.current = event.currentTarget.selectionStart)}
          onKeyDown={(event) => {
            if (event.key === 'Tab' && !event.shiftKey && ready) {
              event.preventDefault();
              accept();
            }
          }}
        />
        <div class="row">
          {run?.running ? (
            <button type="button" class="primary" onClick={() => controller.current?.abort()}>
              Stop
            </button>
          ) : (
            <button type="button" class="primary" disabled={model === ''} onClick={() => void complete()}>
              {mode === 'fill' ? 'Fill in at the cursor' : 'Continue the text'}
            </button>
          )}
          {ready && (
            <>
              <button type="button" onClick={accept}>
                Insert
              </button>
              <button type="button" class="quiet" onClick={dismiss}>
                Discard
              </button>
            </>
          )}
          <span class="hint keys">{ready ? 'Tab to insert, Escape to discard' : run?.running ? 'Escape to stop' : 'Ctrl+Enter'}</span>
        </div>
        {state.error !== null && <Notice kind="bad" text={state.error} />}
        {run && <Result run={run} />}
      </main>
      {open && (
        <aside class="side-panel shown" aria-label="Parameters">
          <div class="side-head">
            <h2>Parameters</h2>
            <IconButton icon="close" label="Close parameters" onClick={() => setOpen(false)} />
          </div>
          <ParameterPanel
            kind="completion"
            value={parameters}
            defaults={state.props?.default_generation_settings?.params ?? {}}
            onChange={(next: Parameters) => (setParameters(next), writeSetting('complete.parameters', next))}
          />
        </aside>
      )}
    </div>
  );
}

const CONTEXT = 400;

function Result({ run }: { run: Run }) {
  const [picked, setPicked] = useState<number | null>(null);
  useEffect(() => setPicked(null), [run.started]);
  const { completion, prefix, suffix } = run;
  const token = picked === null ? undefined : completion.tokens[picked];
  return (
    <section class="result" aria-label="Completion">
      <pre
        class="result-text"
        tabIndex={0}
        aria-label="Completion. Use the arrow keys to select a token."
        onKeyDown={(event) => {
          const by = event.key === 'ArrowRight' ? 1 : event.key === 'ArrowLeft' ? -1 : 0;
          if (by === 0 || completion.tokens.length === 0) return;
          event.preventDefault();
          setPicked(Math.max(0, Math.min(completion.tokens.length - 1, picked === null ? 0 : picked + by)));
        }}
      >
        <span class="muted">
          {prefix.length > CONTEXT && '…'}
          {prefix.slice(-CONTEXT)}
        </span>
        {completion.tokens.map((entry, index) => (
          <TokenSpan key={index} token={entry} picked={index === picked} onPick={() => setPicked(index)} />
        ))}
        {run.running && <span class="caret" />}
        <span class="muted">
          {suffix.slice(0, CONTEXT)}
          {suffix.length > CONTEXT && '…'}
        </span>
      </pre>
      {completion.error !== null && <Notice kind="bad" text={completion.error} />}
      <Summary run={run} />
      {token && token.logProbability !== null ? <Alternatives token={token} /> : <Legend />}
    </section>
  );
}

function TokenSpan({ token, picked, onPick }: { token: CompletionToken; picked: boolean; onPick: () => void }) {
  if (token.logProbability === null) return <span class="token">{token.text}</span>;
  const percent = percentage(token.logProbability);
  return (
    <span
      class={`token level-${level(token.logProbability)}${picked ? ' picked' : ''}${/^\s*\n\s*$/.test(token.text) ? ' newline' : ''}`}
      title={`${JSON.stringify(token.text)} ${percent}`}
      onMouseEnter={onPick}
      onClick={onPick}
    >
      {token.text}
    </span>
  );
}

function Alternatives({ token }: { token: CompletionToken }) {
  const rows = token.alternatives.some(([text]) => text === token.text) ? token.alternatives : [[token.text, token.logProbability!] as const, ...token.alternatives];
  return (
    <div class="alternatives">
      <table aria-label="Most likely tokens at this position">
      <tbody>
        {rows.map(([text, value]) => (
          <tr key={text} class={text === token.text ? 'chosen' : ''}>
            <td class="mono">{JSON.stringify(text)}</td>
            <td class="right">{percentage(value)}</td>
            <td class="bar">
              <meter min={0} max={1} value={Math.exp(value)} aria-hidden="true" />
            </td>
          </tr>
        ))}
      </tbody>
      </table>
    </div>
  );
}

const LEVELS = ['under 5 %', '5 to 20 %', '20 to 50 %', '50 to 80 %', '80 to 95 %', 'over 95 %'];

function Legend() {
  return (
    <p class="legend">
      Probability of each token:
      {LEVELS.map((text, index) => (
        <span key={text} class={`token level-${index}`}>
          {text}
        </span>
      ))}
    </p>
  );
}

function Summary({ run }: { run: Run }) {
  const { completion } = run;
  const parts: string[] = [];
  if (run.stopped) parts.push('stopped');
  if (completion.finish === 'length') parts.push('token limit reached');
  parts.push(plural(completion.usage?.completion_tokens ?? completion.tokens.length, 'token'));
  const mean = meanProbability(completion);
  if (mean !== null) parts.push(`mean probability ${figure(mean * 100)} %`);
  if (run.ended !== null) parts.push(duration((run.ended - run.started) / 1000));
  parts.push(`seed ${run.seed}`);
  return (
    <p class="statistics" role="status">
      {parts.map((part) => (
        <span key={part}>{part}</span>
      ))}
    </p>
  );
}

function percentage(logProbability: number): string {
  const percent = Math.exp(logProbability) * 100;
  return percent < 0.1 ? '< 0.1 %' : `${percent >= 99.95 ? '100' : percent.toFixed(1)} %`;
}
