// The Models tab: the server's load, models and adapters.
import { useId, useState } from 'preact/hooks';
import { describeError, forgetKey, requestJson } from '../api/client';
import { type Sample, total } from '../api/metrics';
import { readMetrics, refreshModels, refreshProps, server } from '../api/server';
import type { Adapter, Model } from '../api/types';
import { bytes, count, figure, moment, plural } from '../base/format';
import { go } from '../base/route';
import { useStore } from '../base/store';
import { ConfirmButton, Names, Notice } from '../base/widgets';
import { startChat } from '../chat/session';
import { usePolling } from '../base/polling';

const POLL_MILLISECONDS = 2000;

export function ModelsTab() {
  const state = useStore(server);
  const [load, setLoad] = useState<Load | null>(null);
  const [problem, setProblem] = useState<string | null>(null);
  usePolling(POLL_MILLISECONDS, async () => {
    const [samples] = await Promise.all([readMetrics(), refreshModels(false), refreshProps()]);
    setLoad((before) => nextLoad(before, samples, Date.now()));
  });
  const unload = async (name: string) => {
    setProblem(null);
    try {
      await requestJson(`v1/adapters/${encodeURIComponent(name)}`, { method: 'DELETE' });
    } catch (error) {
      setProblem(describeError(error));
    }
    await refreshModels(false);
  };
  return (
    <main class="page">
      <section>
        <h2>Server</h2>
        <Figures load={load} />
      </section>
      <section>
        <h2>Models and adapters</h2>
        {state.error !== null && <Notice kind="bad" text={state.error} />}
        {problem !== null && <Notice kind="bad" text={problem} />}
        <ModelTable models={state.models} adapters={state.adapters ?? []} onUnload={(name) => void unload(name)} />
      </section>
      <section>
        <h2>Load an adapter</h2>
        <LoadForm taken={state.adapters ?? []} />
      </section>
      <p class="muted small">
        <button type="button" class="link" onClick={() => (forgetKey(), location.reload())}>
          Forget the API key
        </button>{' '}
        stored in this tab, if any.
      </p>
    </main>
  );
}

interface Load {
  samples: Sample[] | null;
  generated: number | null;
  at: number;
  tokensPerSecond: number | null;
}

function nextLoad(before: Load | null, samples: Sample[] | null, at: number): Load {
  const generated = samples && total(samples, 'metal_candle_generated_tokens_total');
  const seconds = before ? (at - before.at) / 1000 : 0;
  const known = before !== null && before.generated !== null && generated !== null && generated >= before.generated && seconds > 0;
  return { samples, generated, at, tokensPerSecond: known ? (generated - before.generated!) / seconds : null };
}

function Figures({ load }: { load: Load | null }) {
  const { props } = useStore(server);
  const samples = load?.samples ?? null;
  const metric = (name: string, labels?: Record<string, string>) => (samples ? total(samples, `metal_candle_${name}`, labels) : null);
  const running = metric('requests_running') ?? props?.running;
  const queries = metric('prefix_cache_queries_total');
  const hits = metric('prefix_cache_hits_total');
  const kv = metric('kv_bytes');
  const number = (value: unknown) => (typeof value === 'number' ? count(value) : null);
  const figures: [label: string, value: string | null, note?: string][] = [
    ['Running', number(running), 'Requests with a slot'],
    ['Waiting', number(metric('requests_waiting') ?? props?.waiting), 'Queued requests'],
    ['Generating', load?.tokensPerSecond != null ? `${figure(load.tokensPerSecond)} tokens/s` : null, 'Total of all requests'],
    ['Generated', number(metric('generated_tokens_total')), 'Tokens since the server started'],
    ['Prefix cache', queries && hits !== null ? `${figure((hits / queries) * 100)} %` : null, 'Prompt tokens found in the cache'],
    ['KV cache', kv === null ? null : bytes(kv), 'Memory of the KV cache'],
    ['Slots', number(props?.total_slots), 'Maximum number of running requests'],
    ['Context', number(props?.n_ctx), 'Maximum number of tokens in a prompt and its response'],
    ['Adapters', number(metric('adapters_loaded')), 'Adapters in memory'],
    ['Version', props?.build_info?.replace('metal-candle ', '') ?? null],
  ];
  const known = figures.filter(([, value]) => value !== null);
  return (
    <>
      <dl class="figures">
        {known.map(([label, value, note]) => (
          <div key={label} title={note}>
            <dt>{label}</dt>
            <dd>{value}</dd>
          </div>
        ))}
      </dl>
      {load !== null && samples === null && <p class="muted"><Names text="Start the server with `--metrics` to show more metrics." /></p>}
    </>
  );
}

function ModelTable(props: { models: Model[]; adapters: Adapter[]; onUnload: (name: string) => void }) {
  const { models, adapters } = props;
  const chat = (names: string[]) => go('chat', startChat(names));
  // Adapters are listed below their base model.
  const ordered = models.filter((model) => !model.parent).flatMap((base) => [base, ...models.filter((model) => model.parent === base.id)]);
  const rest = models.filter((model) => !ordered.includes(model));
  if (models.length === 0) return <p class="muted">The server lists no models.</p>;
  return (
    <div class="scroll-x" tabIndex={0}>
      <table class="data stacking">
        <thead>
          <tr>
            <th>Name</th>
            <th>Kind</th>
            <th class="right">Generation</th>
            <th class="right">Size</th>
            <th class="right">In flight</th>
            <th>Source</th>
            <th>Loaded</th>
            <th>
              <span class="visually-hidden">Actions</span>
            </th>
          </tr>
        </thead>
        <tbody>
          {[...ordered, ...rest].map((model) => {
            const adapter = adapters.find((candidate) => candidate.id === model.id);
            return (
              <tr key={model.id}>
                <th scope="row" class={`clip${model.parent ? ' child' : ''}`} title={model.id}>
                  {model.id}
                </th>
                <td class="nowrap">{kindOf(model, adapter)}</td>
                <td class="right" data-label="generation">{adapter?.generation ?? model.generation ?? ''}</td>
                <td class="right nowrap">{adapter?.bytes != null ? bytes(adapter.bytes) : ''}</td>
                <td class="right" data-label="in flight">{adapter?.in_flight ?? ''}</td>
                <td class="clip" title={adapter?.source ?? ''}>
                  {adapter?.source ?? ''}
                </td>
                <td class="nowrap">{moment((adapter?.created_at ?? model.created) * 1000)}</td>
                <td class="buttons">
                  <button type="button" class="quiet" onClick={() => chat([model.id])}>
                    Chat
                  </button>
                  {model.parent && (
                    <button type="button" class="quiet" title={`Compare with ${model.parent}`} onClick={() => chat([model.parent!, model.id])}>
                      Compare
                    </button>
                  )}
                  {adapter && (
                    <ConfirmButton
                      label="Unload"
                      confirm={adapter.in_flight ? `Unload, ${plural(adapter.in_flight, 'request')} running` : 'Unload now'}
                      title="Running requests finish with this adapter; new requests are rejected"
                      onConfirm={() => props.onUnload(model.id)}
                    />
                  )}
                </td>
              </tr>
            );
          })}
        </tbody>
      </table>
    </div>
  );
}

const METHODS: Record<string, string> = { lora: 'LoRA', dora: 'DoRA', pissa: 'PiSSA', rslora: 'rsLoRA' };

function kindOf(model: Model, adapter: Adapter | undefined): string {
  if (!model.parent && !adapter) return model.context_length ? `model, context ${count(model.context_length)}` : 'model';
  const name = adapter?.method ?? model.adapter?.method ?? 'adapter';
  const method = METHODS[name.toLowerCase()] ?? name;
  const rank = adapter?.rank ?? model.adapter?.rank;
  return rank ? `${method}, rank ${rank}` : method;
}

const NAME = /^[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}$/;

function LoadForm({ taken }: { taken: Adapter[] }) {
  const nameId = useId();
  const pathId = useId();
  const [name, setName] = useState('');
  const [path, setPath] = useState('');
  const [busy, setBusy] = useState(false);
  const [done, setDone] = useState<string | null>(null);
  const [problem, setProblem] = useState<string | null>(null);
  const old = taken.find((adapter) => adapter.id === name);
  const badName = name !== '' && !NAME.test(name);
  const load = async () => {
    setBusy(true);
    setDone(null);
    setProblem(null);
    try {
      const replacing = old ? { replace: true, ...(old.generation !== undefined ? { expected_generation: old.generation } : {}) } : {};
      const adapter = await requestJson<Adapter>('v1/adapters', { method: 'POST', json: { name, path, ...replacing } });
      setDone(`${adapter.id} is loaded${adapter.generation !== undefined ? ` as generation ${adapter.generation}` : ''}.`);
      setName('');
      setPath('');
    } catch (error) {
      setProblem(describeError(error));
    }
    setBusy(false);
    await refreshModels(false);
  };
  return (
    <form
      class="line-form"
      onSubmit={(event) => {
        event.preventDefault();
        void load();
      }}
    >
      <label for={nameId}>
        Name
        <input id={nameId} value={name} autocomplete="off" spellcheck={false} aria-invalid={badName} placeholder="my-adapter" onInput={(event) => setName(event.currentTarget.value)} />
      </label>
      <label for={pathId} class="grow">
        Folder, relative to the server's adapter root
        <input id={pathId} value={path} autocomplete="off" spellcheck={false} placeholder="001/adapter" onInput={(event) => setPath(event.currentTarget.value)} />
      </label>
      <button type="submit" class="primary" disabled={busy || name === '' || badName || path === ''}>
        {busy ? 'Loading…' : old ? 'Replace' : 'Load'}
      </button>
      {badName && <p class="hint bad">A name has at most 64 letters, digits, dots, dashes and underscores, and does not start with a dot.</p>}
      {old && !badName && <p class="hint">An adapter with this name exists. Replacing it creates a new generation; running requests finish with the old generation.</p>}
      {done !== null && <Notice kind="info" text={done} />}
      {problem !== null && <Notice kind="bad" text={problem} />}
    </form>
  );
}
