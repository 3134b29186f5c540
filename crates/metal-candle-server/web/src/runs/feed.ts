// Reads the fine-tuning jobs and follows their events and checkpoints.
import { describeError, requestJson } from '../api/client';
import type { Checkpoint, Job, JobEvent, JobStatus, List } from '../api/types';
import { createStore } from '../base/store';

export interface Feed {
  /** In chronological order. */
  events: JobEvent[];
  checkpoints: Checkpoint[];
}

export const jobs = createStore<{ list: Job[] | null; problem: string | null }>({ list: null, problem: null });
export const feeds = createStore<Record<string, Feed>>({});

const PAGE = 100;
const MOST_PAGES = 200;

export function isActive(status: JobStatus): boolean {
  return status === 'running' || status === 'queued' || status === 'validating_files' || status === 'paused';
}

export async function refreshJobs(ask: boolean): Promise<void> {
  try {
    const list: Job[] = [];
    for (let after = ''; list.length < 1000; ) {
      const page = await requestJson<List<Job>>(`v1/fine_tuning/jobs?limit=${PAGE}${after}`, { ask });
      list.push(...page.data);
      const last = page.data[page.data.length - 1];
      if (!page.has_more || !last) break;
      after = `&after=${encodeURIComponent(last.id)}`;
    }
    jobs.set({ list: list.sort((a, b) => b.created_at - a.created_at), problem: null });
  } catch (error) {
    jobs.set((state) => ({ ...state, problem: describeError(error) }));
  }
}

/** Puts a job that was created or cancelled into the list. */
export function noteJob(job: Job): void {
  jobs.set((state) => ({ ...state, list: [job, ...(state.list ?? []).filter((other) => other.id !== job.id)].sort((a, b) => b.created_at - a.created_at) }));
}

export async function refreshFeed(job: string): Promise<void> {
  const path = `v1/fine_tuning/jobs/${encodeURIComponent(job)}`;
  const known = feeds.get()[job]?.events ?? [];
  const [events, checkpoints] = await Promise.all([
    newEvents((query) => requestJson<List<JobEvent>>(`${path}/events?limit=${PAGE}${query}`, { ask: false }), known),
    requestJson<List<Checkpoint>>(`${path}/checkpoints?limit=${PAGE}`, { ask: false }).then((list) => list.data, () => feeds.get()[job]?.checkpoints ?? []),
  ]);
  feeds.set((all) => ({ ...all, [job]: { events: [...known, ...events], checkpoints } }));
}

/**
 * The events that are not in `known`, in chronological order. Lists are newest first, and `after` asks for older ones:
 * pages are read until one holds a known event.
 */
export async function newEvents(read: (query: string) => Promise<List<JobEvent>>, known: JobEvent[]): Promise<JobEvent[]> {
  const seen = new Set(known.map((event) => event.id));
  const found: JobEvent[] = [];
  let after = '';
  for (let pages = 0; pages < MOST_PAGES; pages += 1) {
    const page = await read(after);
    const fresh = page.data.filter((event) => !seen.has(event.id));
    for (const event of fresh) seen.add(event.id);
    found.push(...fresh);
    const last = page.data[page.data.length - 1];
    if (!page.has_more || !last || fresh.length < page.data.length) break;
    after = `&after=${encodeURIComponent(last.id)}`;
  }
  return found.reverse();
}
