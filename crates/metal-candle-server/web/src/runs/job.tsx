// The details of a fine-tuning job: status, curves, checkpoints and events.
import type { ComponentChildren } from 'preact';
import { useState } from 'preact/hooks';
import { describeError, requestJson } from '../api/client';
import type { Checkpoint, Job, JobEvent } from '../api/types';
import { count, duration, figure, label, moment, plural, quantity } from '../base/format';
import { go } from '../base/route';
import { ConfirmButton, Names, Notice } from '../base/widgets';
import { startChat } from '../chat/session';
import { curvesOf, lastOf, lowest } from './curves';
import { type Feed, isActive, putJob } from './feed';
import { StatusLabel } from './status';

/** The suffix that the user chose, or the id. */
export function nameOf(job: Job): string {
  return job.user_provided_suffix || job.id;
}

export function JobView({ job, feed, children }: { job: Job; feed: Feed | null; children: ComponentChildren }) {
  const [problem, setProblem] = useState<string | null>(null);
  const post = async (action: 'cancel' | 'pause' | 'resume') => {
    setProblem(null);
    try {
      putJob(await requestJson<Job>(`v1/fine_tuning/jobs/${encodeURIComponent(job.id)}/${action}`, { method: 'POST', json: {} }));
    } catch (error) {
      setProblem(describeError(error));
    }
  };
  return (
    <article class="job">
      <header class="row">
        <h2>{nameOf(job)}</h2>
        <StatusLabel job={job} />
        <span class="space" />
        {job.fine_tuned_model !== null && job.status === 'succeeded' && <ChatButtons model={job.fine_tuned_model} base={job.model} />}
        {isActive(job.status) && (
          <>
            {job.metal_candle?.is_paused ? (
              <button type="button" onClick={() => void post('resume')}>
                Resume
              </button>
            ) : (
              <button type="button" onClick={() => void post('pause')}>
                Pause
              </button>
            )}
            <ConfirmButton class="plain" label="Cancel run" confirm="Cancel now" onConfirm={() => void post('cancel')} />
          </>
        )}
      </header>
      {problem !== null && <Notice kind="bad" text={problem} />}
      {job.error?.message && <Notice kind="bad" text={job.error.message} />}
      <Facts job={job} feed={feed} />
      {children}
      <Checkpoints job={job} list={feed?.checkpoints ?? []} />
      <Events list={feed?.events ?? []} />
    </article>
  );
}

function ChatButtons({ model, base, look }: { model: string; base: string; look?: 'quiet' }) {
  return (
    <>
      <button type="button" class={look} onClick={() => go('chat', startChat([model]))}>
        Chat
      </button>
      <button type="button" class={look} title={`Side by side with ${base}`} onClick={() => go('chat', startChat([base, model]))}>
        Compare with base
      </button>
    </>
  );
}

function Facts({ job, feed }: { job: Job; feed: Feed | null }) {
  const curves = curvesOf(feed?.events ?? []);
  const train = lastOf(curves.train_loss);
  const valid = lowest(curves.valid_loss);
  const now = Date.now() / 1000;
  const facts: [string, string][] = [['Model', job.model]];
  if (train) facts.push(['Step', count(train.step)], ['Training loss', figure(train.value)]);
  if (valid) facts.push(['Lowest validation loss', `${figure(valid.value)} at step ${count(valid.step)}`]);
  if (job.trained_tokens) facts.push(['Trained tokens', count(job.trained_tokens)]);
  if (job.finished_at !== null) facts.push(['Duration', duration(job.finished_at - job.created_at)]);
  else if (job.estimated_finish && job.estimated_finish > now) facts.push(['Time left', duration(job.estimated_finish - now)]);
  const settings = [...Object.entries(job.hyperparameters ?? {}), ...Object.entries(job.metal_candle ?? {}), ['seed', job.seed] as const].filter(
    ([key, value]) => value !== null && value !== undefined && key !== 'is_paused',
  );
  return (
    <>
      <dl class="figures">
        {facts.map(([name, value]) => (
          <div key={name}>
            <dt>{name}</dt>
            <dd>{value}</dd>
          </div>
        ))}
      </dl>
      <details class="settings-list">
        <summary>Settings</summary>
        <table class="data">
          <tbody>
            {[['id', job.id] as const, ...settings].map(([key, value]) => (
              <tr key={key}>
                <th scope="row">{label(key)}</th>
                <td>{quantity(key, value)}</td>
              </tr>
            ))}
          </tbody>
        </table>
      </details>
    </>
  );
}

function Checkpoints({ job, list }: { job: Job; list: Checkpoint[] }) {
  if (list.length === 0) return null;
  const loss = (checkpoint: Checkpoint, ...names: string[]) => {
    const value = names.map((name) => checkpoint.metrics[name]).find((found) => typeof found === 'number');
    return typeof value === 'number' ? figure(value) : '';
  };
  const ordered = [...list].sort((a, b) => b.step_number - a.step_number);
  return (
    <section>
      <h3>Checkpoints</h3>
      <div class="scroll-x" tabIndex={0}>
        <table class="data stacking">
          <thead>
            <tr>
              <th class="right">Step</th>
              <th class="right">Training loss</th>
              <th class="right">Validation loss</th>
              <th>Time</th>
              <th>Name</th>
              <th>
                <span class="visually-hidden">Actions</span>
              </th>
            </tr>
          </thead>
          <tbody>
            {ordered.map((checkpoint) => (
              <tr key={checkpoint.id}>
                <th scope="row" class="right" data-label="step">
                  {count(checkpoint.step_number)}
                </th>
                <td class="right" data-label="training loss">{loss(checkpoint, 'train_loss', 'loss')}</td>
                <td class="right" data-label="validation loss">{loss(checkpoint, 'full_valid_loss', 'valid_loss')}</td>
                <td class="nowrap">{moment(checkpoint.created_at * 1000)}</td>
                <td class="clip" title={checkpoint.fine_tuned_model_checkpoint}>
                  {checkpoint.fine_tuned_model_checkpoint}
                </td>
                <td class="buttons">
                  <ChatButtons model={checkpoint.fine_tuned_model_checkpoint} base={job.model} look="quiet" />
                </td>
              </tr>
            ))}
          </tbody>
        </table>
      </div>
    </section>
  );
}

const MAX_EVENTS = 200;

function Events({ list }: { list: JobEvent[] }) {
  const messages = list.filter((event) => event.type !== 'metrics');
  if (messages.length === 0) return null;
  const warnings = messages.filter((event) => event.level !== 'info').length;
  return (
    <section>
      <h3>
        Events {warnings > 0 && <span class="badge warn">{plural(warnings, 'warning')}</span>}
      </h3>
      <ol class="events">
        {messages
          .slice(-MAX_EVENTS)
          .reverse()
          .map((event) => (
            <li key={event.id} class={event.level}>
              <time>{moment(event.created_at * 1000)}</time> <span>
                <Names text={event.message} />
              </span>
            </li>
          ))}
      </ol>
    </section>
  );
}
