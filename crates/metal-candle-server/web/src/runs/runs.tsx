// The Runs tab: fine-tuning jobs, the curves of the selected jobs, and the form for a new job.
import { useEffect, useRef, useState } from 'preact/hooks';
import type { Job } from '../api/types';
import { moment } from '../base/format';
import { usePolling } from '../base/polling';
import { formatRoute, go, route } from '../base/route';
import { useStore } from '../base/store';
import { Icon, Notice } from '../base/widgets';
import { CurvesView } from './curves-view';
import { feeds, isActive, jobs, refreshFeed, refreshJobs } from './feed';
import { NewRun } from './form';
import { JobView, nameOf } from './job';
import { StatusLabel } from './status';

const POLL_MILLISECONDS = 1500;
const POLL_WITHOUT_JOBS = 30_000;

export function RunsTab() {
  const { item } = useStore(route);
  const { list, problem, off } = useStore(jobs);
  const loaded = useStore(feeds);
  const [compared, setCompared] = useState<string[]>([]);
  const job = list?.find((candidate) => candidate.id === item);
  const followed = [...new Set([...(job ? [job.id] : []), ...compared])];

  // Only the first request may prompt for a key; otherwise the prompt would return after each dismissal.
  const isPrompted = useRef(false);
  usePolling(off ? POLL_WITHOUT_JOBS : POLL_MILLISECONDS, async () => {
    await refreshJobs(!isPrompted.current);
    isPrompted.current = true;
    await follow();
  });
  // Ended jobs are read once more, to show their last events.
  const [ended, setEnded] = useState<string[]>([]);
  const follow = async () => {
    for (const id of followed) {
      const known = jobs.get().list?.find((candidate) => candidate.id === id);
      if (!known || ended.includes(id)) continue;
      const read = await refreshFeed(id).then(() => true, () => false);
      if (read && !isActive(known.status)) setEnded((before) => [...before, id]);
    }
  };
  useEffect(() => void follow(), [followed.join(' ')]);

  const toggle = (id: string) => setCompared((before) => (before.includes(id) ? before.filter((other) => other !== id) : [...before, id].slice(-6)));
  const chosen = followed.map((id) => list?.find((candidate) => candidate.id === id)).filter((found) => found !== undefined);
  return (
    <div class="runs">
      <aside class="sidebar runs-list" aria-label="Runs">
        <button type="button" class="new" disabled={off} onClick={() => go('runs', 'new')}>
          <Icon name="plus" /> New run
        </button>
        {problem !== null && <Notice kind={off ? 'info' : 'bad'} text={problem} />}
        <ul class="heads">
          {(list ?? []).map((entry) => (
            <li key={entry.id}>
              <JobEntry job={entry} open={entry.id === item} compared={compared.includes(entry.id)} onCompare={() => toggle(entry.id)} />
            </li>
          ))}
        </ul>
        {(list?.length ?? 0) > 1 && <p class="hint">Select runs to compare their curves.</p>}
        {list?.length === 0 && <p class="muted">No runs yet.</p>}
      </aside>
      <main class="page">
        {off && list === null ? (
          <p class="muted">Fine-tuning jobs are not available.</p>
        ) : item === 'new' ? (
          <NewRun onStarted={(started) => go('runs', started.id)} onCancel={() => go('runs', null)} />
        ) : job ? (
          <JobView job={job} feed={loaded[job.id] ?? null}>
            <CurvesView jobs={chosen} feeds={loaded} />
          </JobView>
        ) : chosen.length > 0 ? (
          <CurvesView jobs={chosen} feeds={loaded} />
        ) : (
          <p class="muted">{item !== null && list !== null ? 'The server has no run with this id.' : 'Select a run, or start a new one.'}</p>
        )}
      </main>
    </div>
  );
}

function JobEntry({ job, open, compared, onCompare }: { job: Job; open: boolean; compared: boolean; onCompare: () => void }) {
  return (
    <div class={`job-entry${open ? ' open' : ''}`}>
      <a href={formatRoute({ tab: 'runs', item: job.id })} aria-current={open ? 'page' : undefined}>
        <span class="job-name">{nameOf(job)}</span>
        <span class="job-state">
          <StatusLabel job={job} /> <span class="muted">{moment(job.created_at * 1000)}</span>
        </span>
      </a>
      <label title="Show the curves of this run in the same plot">
        <input type="checkbox" checked={compared} aria-label={`Compare ${nameOf(job)}`} onChange={onCompare} />
      </label>
    </div>
  );
}
