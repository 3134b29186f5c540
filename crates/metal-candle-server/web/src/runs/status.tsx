// The state of a job as a coloured label.
import type { JobStatus } from '../api/types';

export function StatusLabel({ status }: { status: JobStatus }) {
  return (
    <span class={`status ${status}`}>
      {(status === 'running' || status === 'validating_files') && <span class="pulse" />}
      {status.replaceAll('_', ' ')}
    </span>
  );
}
