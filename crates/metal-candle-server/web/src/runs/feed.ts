// Polls fine-tuning jobs, their events and checkpoints.
import { ApiError, describeError, requestJson } from '../api/client';
import type { Checkpoint, Job, JobEvent, JobStatus, List } from '../api/types';
import { createStore } from '../base/store';

export interface Feed {
  /** In chronological order. */
  events: JobEvent[];
  checkpoints: Checkpoint[];
}

export interface Jobs {
  list: Job[] | null;
  problem: string | null;
  /** Whether the server does not run jobs or the key may not use them. */
  off: boolean;
}

export const jobs = createStore<Jobs>({ list: null, problem: null, off: false });
export const feeds = createStore<Record<string, Feed>>({});

const PAGE = 100;
const EVENTS_PAGE = 1000;
const MAX_PAGES = 1000;

export function isActive(status: JobStatus): boolean {
  return status === 'running' || status === 'queued' || status === 'validating_files' || status === 'paused';
}

export async function refreshJobs(promptForKey: boolean): Promise<void> {
  try {
    const list: Job[] = [];
    for (let after = ''; list.length < 1000; ) {
      const page = await requestJson<List<Job>>(`v1/fine_tuning/jobs?limit=${PAGE}${after}`, { promptForKey });
      list.push(...page.data);
      const last = page.data[page.data.length - 1];
      if (!page.has_more || !last) break;
      after = `&after=${encodeURIComponent(last.id)}`;
    }
    jobs.set({ list: list.sort((a, b) => b.created_at - a.created_at), problem: null, off: false });
  } catch (error) {
    const off = error instanceof ApiError && [401, 403, 404].includes(error.status);
    jobs.set((state) => ({ ...state, problem: describeError(error), off }));
  }
}

/** Adds a new or changed job to the list. */
export function putJob(job: Job): void {
  jobs.set((state) => ({ ...state, list: [job, ...(state.list ?? []).filter((other) => other.id !== job.id)].sort((a, b) => b.created_at - a.created_at) }));
}

export async function refreshFeed(job: string): Promise<void> {
  const path = `v1/fine_tuning/jobs/${encodeURIComponent(job)}`;
  const known = feeds.get()[job]?.events ?? [];
  const [events, checkpoints] = await Promise.all([
    newEvents((query) => requestJson<List<JobEvent>>(`${path}/events?order=asc&limit=${EVENTS_PAGE}${query}`, { promptForKey: false }), known),
    requestJson<List<Checkpoint>>(`${path}/checkpoints?limit=${PAGE}`, { promptForKey: false }).then((list) => list.data, () => feeds.get()[job]?.checkpoints ?? []),
  ]);
  feeds.set((all) => ({ ...all, [job]: { events: [...known, ...events], checkpoints } }));
}

/** The events after `known` in chronological order, from all pages. */
export async function newEvents(read: (query: string) => Promise<List<JobEvent>>, known: JobEvent[]): Promise<JobEvent[]> {
  const found: JobEvent[] = [];
  for (let pages = 0; pages < MAX_PAGES; pages += 1) {
    const last = found[found.length - 1] ?? known[known.length - 1];
    const page = await read(last ? `&after=${encodeURIComponent(last.id)}` : '');
    found.push(...page.data);
    if (!page.has_more || page.data.length === 0) break;
  }
  return found;
}
