// Uploads a JSONL file and shows the server's validation report.
import { useEffect, useId, useState } from 'preact/hooks';
import { describeError, requestJson } from '../api/client';
import type { FileObject, Finding, List } from '../api/types';
import { bytes, count, plural } from '../base/format';
import { createStore, useStore } from '../base/store';
import { ConfirmButton, Names, Notice } from '../base/widgets';

export const files = createStore<FileObject[] | null>(null);

/** Files uploaded from this page, to show the lines of findings. */
const uploaded = new Map<string, File>();

export async function refreshFiles(): Promise<void> {
  const list = await requestJson<List<FileObject>>('v1/files?purpose=fine-tune&limit=1000').catch(() => null);
  if (list) files.set(list.data.sort((a, b) => b.created_at - a.created_at));
}

async function upload(file: File): Promise<FileObject> {
  const form = new FormData();
  form.append('purpose', 'fine-tune');
  form.append('file', file, file.name);
  let object = await requestJson<FileObject>('v1/files', { method: 'POST', form });
  uploaded.set(object.id, file);
  // The validation of a large file may continue after the upload.
  for (let tries = 0; object.status === 'uploaded' && tries < 600; tries += 1) {
    await new Promise((resolve) => setTimeout(resolve, 500));
    object = await requestJson<FileObject>(`v1/files/${encodeURIComponent(object.id)}`);
  }
  return object;
}

interface Props {
  label: string;
  optional?: boolean;
  value: string;
  onChange: (id: string) => void;
}

/** Selects a file of the server or uploads a new one. */
export function FileField({ label, optional, value, onChange }: Props) {
  const list = useStore(files);
  const [sending, setSending] = useState<string | null>(null);
  const [problem, setProblem] = useState<string | null>(null);
  const [over, setOver] = useState(false);
  const id = useId();
  const chosen = list?.find((file) => file.id === value);
  const take = async (file: File | undefined) => {
    if (!file) return;
    setProblem(null);
    setSending(file.name);
    try {
      const object = await upload(file);
      files.set((all) => [object, ...(all ?? []).filter((other) => other.id !== object.id)]);
      onChange(object.id);
    } catch (error) {
      setProblem(describeError(error));
    }
    setSending(null);
  };
  const remove = async (file: FileObject) => {
    setProblem(null);
    try {
      await requestJson(`v1/files/${encodeURIComponent(file.id)}`, { method: 'DELETE' });
      files.set((all) => (all ?? []).filter((other) => other.id !== file.id));
      onChange('');
    } catch (error) {
      setProblem(describeError(error));
    }
  };
  return (
    <fieldset
      class={`file-field${over ? ' over' : ''}`}
      onDragOver={(event) => {
        event.preventDefault();
        setOver(true);
      }}
      onDragLeave={() => setOver(false)}
      onDrop={(event) => {
        event.preventDefault();
        setOver(false);
        void take(event.dataTransfer?.files[0]);
      }}
    >
      <legend>{label}</legend>
      <div class="row">
        <select aria-label={`${label}: uploaded files`} value={value} onChange={(event) => onChange(event.currentTarget.value)}>
          <option value="">{optional ? 'None' : 'Select an uploaded file'}</option>
          {(list ?? []).map((file) => (
            <option key={file.id} value={file.id}>
              {file.filename} ({bytes(file.bytes)}
              {file.status === 'error' ? ', invalid' : file.report?.rows !== undefined ? `, ${plural(file.report.rows, 'row')}` : ''})
            </option>
          ))}
        </select>
        <label class="button" for={id}>
          Upload a file
        </label>
        <input
          id={id}
          type="file"
          class="visually-hidden"
          accept=".jsonl,application/jsonl,application/x-ndjson"
          aria-label={`${label}: upload a file`}
          disabled={sending !== null}
          onChange={(event) => {
            void take(event.currentTarget.files?.[0]);
            event.currentTarget.value = '';
          }}
        />
        {chosen && <ConfirmButton label="Delete" confirm="Delete from the server" onConfirm={() => void remove(chosen)} />}
      </div>
      {sending !== null && (
        <p class="muted" role="status">
          <span class="pulse" /> Uploading and checking {sending}
        </p>
      )}
      {problem !== null && <Notice kind="bad" text={problem} />}
      {chosen && <Report file={chosen} />}
    </fieldset>
  );
}

const MAX_FINDINGS = 20;

function Report({ file }: { file: FileObject }) {
  const findings = file.report?.findings ?? [];
  const refused = file.status === 'error';
  const sizes = [
    file.report?.rows !== undefined ? plural(file.report.rows, 'row') : null,
    file.report?.tokens !== undefined ? plural(file.report.tokens, 'token') : null,
  ].filter((part) => part !== null);
  return (
    <div class="report">
      {refused ? (
        <Notice kind="bad" text={`The file cannot be used${file.status_details ? `: ${file.status_details}` : '.'}`} />
      ) : (
        <p class="good">
          {sizes.join(', ') || 'Checked'}
          {findings.length === 0 ? ', no problems found' : `, ${plural(findings.length, 'finding')}`}
        </p>
      )}
      {findings.length > 0 && <Findings file={file} findings={findings} />}
    </div>
  );
}

function Findings({ file, findings }: { file: FileObject; findings: Finding[] }) {
  const [lines, setLines] = useState<Map<number, string>>(new Map());
  const shown = findings.slice(0, MAX_FINDINGS);
  useEffect(() => {
    const local = uploaded.get(file.id);
    if (!local) return;
    const numbers = new Set(shown.flatMap((finding) => (typeof finding.line === 'number' ? [finding.line] : [])));
    readLines(local, numbers).then(setLines, () => undefined);
  }, [file.id]);
  return (
    <>
      <ol class="findings">
        {shown.map((finding, index) => (
          <li key={index}>
            <b>{typeof finding.line === 'number' ? `Line ${count(finding.line)}` : 'File'}</b> <Names text={finding.message} />
            {typeof finding.line === 'number' && lines.has(finding.line) && <code class="data-line">{lines.get(finding.line)}</code>}
          </li>
        ))}
      </ol>
      {findings.length > shown.length && <p class="muted">and {count(findings.length - shown.length)} more</p>}
    </>
  );
}

const LINE_CHARACTERS = 160;

/** The starts of the lines with these numbers, which start at 1. Reads up to the last of them. */
export async function readLines(file: Blob, numbers: Set<number>): Promise<Map<number, string>> {
  const found = new Map<number, string>();
  const last = Math.max(0, ...numbers);
  const reader = file.stream().getReader();
  const decoder = new TextDecoder();
  let number = 1;
  let line = '';
  const end = () => {
    if (numbers.has(number)) found.set(number, line.length > LINE_CHARACTERS ? `${line.slice(0, LINE_CHARACTERS)}…` : line);
    number += 1;
    line = '';
  };
  while (number <= last) {
    const { done, value } = await reader.read();
    const parts = (done ? '' : decoder.decode(value, { stream: true })).split('\n');
    parts.forEach((part, index) => {
      if (index > 0) end();
      if (line.length <= LINE_CHARACTERS) line += part;
    });
    if (done) {
      end();
      break;
    }
  }
  reader.cancel().catch(() => undefined);
  return found;
}
