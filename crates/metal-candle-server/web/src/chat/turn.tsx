// Shows a prompt, its answers with statistics, and their actions.
import { useEffect, useRef, useState } from 'preact/hooks';
import { count, duration, figure, plural } from '../base/format';
import { IconButton, Notice } from '../base/widgets';
import { CopyButton } from '../text/code';
import { Markdown } from '../text/markdown';
import { type Answer, isRunning, statistics } from './answer';
import type { Turn } from './conversation';

interface Props {
  turn: Turn;
  /** The ids of the turns with the same parent. */
  versions: string[];
  busy: boolean;
  onVersion: (id: string) => void;
  onEdit: (prompt: string) => void;
  onAgain: () => void;
}

export function TurnView({ turn, versions, busy, onVersion, onEdit, onAgain }: Props) {
  const [editing, setEditing] = useState(false);
  const position = versions.indexOf(turn.id);
  return (
    <section class="turn" aria-label="Prompt and answer">
      {editing ? (
        <EditPrompt
          prompt={turn.prompt}
          busy={busy}
          onCancel={() => setEditing(false)}
          onSave={(prompt) => {
            setEditing(false);
            onEdit(prompt);
          }}
        />
      ) : (
        <div class="prompt">
          <div class="prompt-text">{turn.prompt}</div>
          <div class="actions">
            {versions.length > 1 && (
              <span class="versions">
                <IconButton icon="left" label="Previous version" disabled={busy || position === 0} onClick={() => onVersion(versions[position - 1]!)} />
                <span aria-label={`Version ${position + 1} of ${versions.length}`}>
                  {position + 1}/{versions.length}
                </span>
                <IconButton icon="right" label="Next version" disabled={busy || position === versions.length - 1} onClick={() => onVersion(versions[position + 1]!)} />
              </span>
            )}
            <CopyButton text={turn.prompt} label="Copy prompt" />
            <IconButton icon="edit" label="Edit prompt" disabled={busy} onClick={() => setEditing(true)} />
            <IconButton icon="again" label="Regenerate" disabled={busy} onClick={onAgain} />
          </div>
        </div>
      )}
      <div class={`answers lanes-${turn.answers.length}`}>
        {turn.answers.map((answer, lane) => (
          <AnswerView key={lane} answer={answer} seed={turn.seed} />
        ))}
      </div>
    </section>
  );
}

function EditPrompt(props: { prompt: string; busy: boolean; onCancel: () => void; onSave: (prompt: string) => void }) {
  const [text, setText] = useState(props.prompt);
  const area = useRef<HTMLTextAreaElement>(null);
  useEffect(() => {
    area.current?.focus();
    area.current?.setSelectionRange(text.length, text.length);
  }, []);
  const ready = text.trim() !== '' && !props.busy;
  return (
    <div class="prompt editing">
      <textarea
        ref={area}
        aria-label="Edited prompt"
        rows={Math.min(12, text.split('\n').length + 1)}
        value={text}
        onInput={(event) => setText(event.currentTarget.value)}
        onKeyDown={(event) => {
          if (event.key === 'Escape') {
            event.stopPropagation();
            props.onCancel();
          } else if (event.key === 'Enter' && !event.shiftKey && !event.isComposing) {
            event.preventDefault();
            if (ready) props.onSave(text);
          }
        }}
      />
      <div class="row end">
        <button type="button" onClick={props.onCancel}>
          Cancel
        </button>
        <button type="button" class="primary" disabled={!ready} onClick={() => props.onSave(text)}>
          Send as a new version
        </button>
      </div>
    </div>
  );
}

function AnswerView({ answer, seed }: { answer: Answer; seed: number }) {
  const running = isRunning(answer);
  return (
    <article class={`answer ${answer.state}`} aria-busy={running}>
      <header>{answer.model}</header>
      {answer.reasoning !== '' && <Reasoning answer={answer} />}
      {answer.state === 'waiting' && (
        <p class="muted waiting-text">
          <span class="pulse" /> Waiting for the first token
        </p>
      )}
      {answer.text !== '' && <Markdown text={answer.text} />}
      {answer.calls.map((call, index) => (
        <pre key={index} class="call" tabIndex={0}>
          <b>{call.name}</b> {call.arguments}
        </pre>
      ))}
      {answer.state === 'failed' && (
        <Notice kind="bad" text={answer.error ?? ''} />
      )}
      {answer.state !== 'waiting' && <Footer answer={answer} seed={seed} />}
    </article>
  );
}

function Reasoning({ answer }: { answer: Answer }) {
  const thinking = isRunning(answer) && answer.text === '';
  return (
    <details class="reasoning" open={thinking}>
      <summary>{thinking ? 'Thinking…' : 'Reasoning'}</summary>
      <div class="plain-text">{answer.reasoning}</div>
    </details>
  );
}

const FINISH_REASONS: Record<string, string> = {
  length: 'token limit reached',
  tool_calls: 'tool call',
  content_filter: 'content filter',
};

function Footer({ answer, seed }: { answer: Answer; seed: number }) {
  const figures = statistics(answer);
  const parts: [string, string][] = [];
  if (answer.state === 'stopped') parts.push(['stopped', 'Generation was stopped.']);
  else if (answer.finish !== null && FINISH_REASONS[answer.finish]) parts.push([FINISH_REASONS[answer.finish]!, `finish_reason: ${answer.finish}`]);
  if (figures.tokens > 0) {
    parts.push([
      `${figures.exact ? '' : '~'}${plural(figures.tokens, 'token')}`,
      figures.exact ? 'Generated tokens, counted by the server.' : 'Chunks received so far.',
    ]);
  }
  if (figures.tokensPerSecond !== null) parts.push([`${figure(figures.tokensPerSecond)} tokens/s`, 'Decode speed after the first token.']);
  if (figures.secondsToFirst !== null) parts.push([`first token after ${duration(figures.secondsToFirst)}`, 'Time from the request to the first token.']);
  if (figures.prompt !== null) {
    const cached = figures.cached ? `, ${count(figures.cached)} cached` : '';
    parts.push([`prompt ${count(figures.prompt)}${cached}`, 'Prompt tokens, and the number of them found in the prefix cache.']);
  }
  if (figures.accepted) parts.push([`${count(figures.accepted)} drafts accepted`, 'Draft tokens accepted in speculative decoding.']);
  parts.push([`seed ${seed}`, 'The same seed, model and parameters reproduce the response.']);
  return (
    <footer>
      <span class="statistics">
        {parts.map(([text, title]) => (
          <span key={title} title={title}>
            {text}
          </span>
        ))}
      </span>
      {!isRunning(answer) && answer.text !== '' && <CopyButton text={answer.text} label="Copy response" />}
    </footer>
  );
}
