// The form for a new run: files, settings, and the server's plan for them.
import { useEffect, useId, useRef, useState } from 'preact/hooks';
import { ApiError, describeError, requestJson } from '../api/client';
import { baseModel, server } from '../api/server';
import type { Job, Plan } from '../api/types';
import { label, quantity } from '../base/format';
import { useStore } from '../base/store';
import { Names, Notice } from '../base/widgets';
import { FileField, files, refreshFiles } from './data-file';
import { putJob } from './feed';
import { jobRequest, nameProblem, NO_SETTINGS, type Settings, SETTINGS, settingProblem } from './job-request';

const PLAN_DELAY = 700;

type Planned = { state: 'none' | 'asking' } | { state: 'ready'; plan: Plan } | { state: 'failed'; problem: string };

export function NewRun({ onStarted, onCancel }: { onStarted: (job: Job) => void; onCancel: () => void }) {
  const state = useStore(server);
  const list = useStore(files);
  const bases = state.models.filter((model) => !model.parent);
  const [settings, setSettings] = useState<Settings>(NO_SETTINGS);
  const [planned, setPlanned] = useState<Planned>({ state: 'none' });
  const [starting, setStarting] = useState(false);
  const [problem, setProblem] = useState<string | null>(null);
  const set = (part: Partial<Settings>) => setSettings((before) => ({ ...before, ...part }));
  const model = settings.model || baseModel(state);
  const usable = (id: string) => list?.find((file) => file.id === id)?.status !== 'error';
  const valid = SETTINGS.every((entry) => settingProblem(entry, settings.values[entry.name] ?? '') === null);
  const complete = settings.training !== '' && usable(settings.training) && usable(settings.validation) && valid && nameProblem(settings.suffix) === null && model !== '';
  const body = complete ? JSON.stringify(jobRequest({ ...settings, model })) : null;

  useEffect(() => void refreshFiles(), []);
  useEffect(() => {
    setProblem(null);
    if (body === null) return setPlanned({ state: 'none' });
    const abort = new AbortController();
    setPlanned({ state: 'asking' });
    const timer = setTimeout(async () => {
      while (!abort.signal.aborted) {
        try {
          const answer = await requestJson<{ plan?: Plan }>('v1/fine_tuning/jobs', {
            method: 'POST',
            json: { ...(JSON.parse(body) as object), dry_run: true },
            signal: abort.signal,
          });
          return setPlanned({ state: 'ready', plan: answer.plan ?? {} });
        } catch (error) {
          if (abort.signal.aborted) return;
          // The server computes one plan at a time, and may still compute the plan of the previous settings.
          if (!(error instanceof ApiError && error.status === 503)) return setPlanned({ state: 'failed', problem: withParameter(error) });
        }
        await new Promise((resolve) => setTimeout(resolve, PLAN_DELAY));
      }
    }, PLAN_DELAY);
    return () => {
      clearTimeout(timer);
      abort.abort();
    };
  }, [body]);

  const start = async () => {
    if (body === null) return;
    setStarting(true);
    setProblem(null);
    try {
      const job = await requestJson<Job>('v1/fine_tuning/jobs', { method: 'POST', json: JSON.parse(body) as unknown });
      putJob(job);
      onStarted(job);
    } catch (error) {
      setProblem(withParameter(error));
      setStarting(false);
    }
  };
  const heading = useRef<HTMLHeadingElement>(null);
  useEffect(() => heading.current?.focus(), []);
  return (
    <form
      class="new-run"
      onSubmit={(event) => {
        event.preventDefault();
        void start();
      }}
    >
      <h2 ref={heading} tabIndex={-1}>
        New run
      </h2>
      <FileField label="Training data" value={settings.training} onChange={(training) => set({ training })} />
      <p class="hint">
        <Names text="JSONL: each line is a chat (`messages`), a `prompt` with a `completion`, or a `text`." />
      </p>
      <FileField label="Validation data" optional value={settings.validation} onChange={(validation) => set({ validation })} />
      <fieldset>
        <legend>Settings</legend>
        <div class="settings-grid">
          <Labeled label="Model">
            {(id) => (
              <select id={id} value={model} onChange={(event) => set({ model: event.currentTarget.value })}>
                {bases.map((base) => (
                  <option key={base.id}>{base.id}</option>
                ))}
              </select>
            )}
          </Labeled>
          <Labeled label="Name" hint="Part of the adapter's name.">
            {(id) => (
              <>
                <input
                  id={id}
                  value={settings.suffix}
                  autocomplete="off"
                  placeholder="none"
                  aria-invalid={nameProblem(settings.suffix) !== null}
                  onInput={(event) => set({ suffix: event.currentTarget.value })}
                />
                {nameProblem(settings.suffix) !== null && <p class="hint bad">{nameProblem(settings.suffix)}</p>}
              </>
            )}
          </Labeled>
          {SETTINGS.map((entry) => (
            <Setting key={entry.name} entry={entry} text={settings.values[entry.name] ?? ''} onChange={(text) => set({ values: { ...settings.values, [entry.name]: text } })} />
          ))}
          <Labeled label="Serve" hint="The checkpoint that is served under the adapter's name during training.">
            {(id) => (
              <select id={id} value={settings.serve} onChange={(event) => set({ serve: event.currentTarget.value as Settings['serve'] })}>
                <option value="">the latest checkpoint</option>
                <option value="best">the checkpoint with the lowest validation loss</option>
                <option value="none">none</option>
              </select>
            )}
          </Labeled>
        </div>
      </fieldset>
      <PlanView planned={planned} />
      {problem !== null && <Notice kind="bad" text={problem} />}
      <div class="row">
        <button type="submit" class="primary" disabled={body === null || starting || planned.state !== 'ready'}>
          {starting ? 'Starting…' : 'Start the run'}
        </button>
        <button type="button" class="quiet" onClick={onCancel}>
          Cancel
        </button>
      </div>
    </form>
  );
}

function withParameter(error: unknown): string {
  const text = describeError(error);
  return error instanceof ApiError && error.param !== null && !text.includes(error.param) ? `${text} (${error.param})` : text;
}

function PlanView({ planned }: { planned: Planned }) {
  return (
    <fieldset class="plan" aria-live="polite">
      <legend>Plan</legend>
      {planned.state === 'none' && <p class="muted">Select a training file and enter valid settings to compute the plan.</p>}
      {planned.state === 'asking' && (
        <p class="muted">
          <span class="pulse" /> Computing…
        </p>
      )}
      {planned.state === 'failed' && <Notice kind="bad" text={planned.problem} />}
      {planned.state === 'ready' && <PlanFigures plan={planned.plan} />}
    </fieldset>
  );
}

const MAIN = ['steps', 'seconds', 'peak_memory_bytes', 'memory_limit_bytes', 'tokens', 'tokens_per_second'];

function PlanFigures({ plan }: { plan: Plan }) {
  const values = Object.entries(plan).filter(([, value]) => value !== null && typeof value !== 'object');
  const main = MAIN.flatMap((key) => values.filter(([name]) => name === key));
  const others = values.filter(([name]) => !MAIN.includes(name));
  const figures = (entries: [string, unknown][]) => (
    <dl class="figures">
      {entries.map(([key, value]) => (
        <div key={key}>
          <dt>{label(key)}</dt>
          <dd>{quantity(key, value)}</dd>
        </div>
      ))}
    </dl>
  );
  return (
    <>
      {figures(main)}
      {others.length > 0 && (
        <details>
          <summary class="muted">Details</summary>
          {figures(others)}
        </details>
      )}
    </>
  );
}

function Labeled(props: { label: string; hint?: string; children: (id: string) => preact.ComponentChildren }) {
  const id = useId();
  return (
    <div class="field" title={props.hint}>
      <label for={id}>{props.label}</label>
      {props.children(id)}
    </div>
  );
}

function Setting({ entry, text, onChange }: { entry: (typeof SETTINGS)[number]; text: string; onChange: (text: string) => void }) {
  const problem = settingProblem(entry, text);
  return (
    <Labeled label={entry.label} hint={entry.hint}>
      {(id) => (
        <>
          <input
            id={id}
            inputMode="decimal"
            autocomplete="off"
            placeholder="default"
            value={text}
            aria-invalid={problem !== null}
            onInput={(event) => onChange(event.currentTarget.value)}
          />
          {problem !== null && <p class="hint bad">{problem}</p>}
        </>
      )}
    </Labeled>
  );
}
