// The status of a job as a coloured label.
import type { Job } from '../api/types';

/** OpenAI's format reports a paused job as `queued`. */
export function StatusLabel({ job }: { job: Job }) {
  const status = job.metal_candle?.is_paused ? 'paused' : job.status;
  return (
    <span class={`status ${status}`}>
      {(status === 'running' || status === 'validating_files') && <span class="pulse" />}
      {status.replaceAll('_', ' ')}
    </span>
  );
}
