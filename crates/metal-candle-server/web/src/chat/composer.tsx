// The input for the next prompt. Enter sends it, Shift+Enter inserts a line break.
import { useEffect, useLayoutEffect, useRef, useState } from 'preact/hooks';
import { count } from '../base/format';
import { Icon } from '../base/widgets';

interface Props {
  /** The id of the conversation. Each conversation has its own draft. */
  id: string;
  running: boolean;
  ready: boolean;
  used: number;
  context: number | null;
  onSend: (prompt: string) => void;
  onStop: () => void;
}

const drafts = new Map<string, string>();

export function Composer({ id, running, ready, used, context, onSend, onStop }: Props) {
  const [text, setText] = useState(drafts.get(id) ?? '');
  const area = useRef<HTMLTextAreaElement>(null);
  useEffect(() => {
    setText(drafts.get(id) ?? '');
    if (matchMedia('(hover: hover)').matches) area.current?.focus();
  }, [id]);
  useLayoutEffect(() => {
    const element = area.current!;
    element.style.height = 'auto';
    element.style.height = `${Math.min(element.scrollHeight + 2, innerHeight * 0.4)}px`;
  }, [text]);
  const write = (next: string) => {
    drafts.set(id, next);
    setText(next);
  };
  const canSend = ready && !running && text.trim() !== '';
  const send = () => {
    if (!canSend) return;
    onSend(text);
    write('');
    area.current?.focus();
  };
  return (
    <form
      class="composer"
      onSubmit={(event) => {
        event.preventDefault();
        send();
      }}
    >
      <div class="composer-box">
        <textarea
          ref={area}
          rows={1}
          aria-label="Prompt"
          placeholder="Write a prompt"
          value={text}
          onInput={(event) => write(event.currentTarget.value)}
          onKeyDown={(event) => {
            if (event.key !== 'Enter' || event.shiftKey || event.isComposing) return;
            event.preventDefault();
            send();
          }}
        />
        {running ? (
          <button type="button" class="primary round" aria-label="Stop" title="Stop (Escape)" onClick={onStop}>
            <Icon name="stop" />
          </button>
        ) : (
          <button type="submit" class="primary round" aria-label="Send" title="Send (Enter)" disabled={!canSend}>
            <Icon name="send" />
          </button>
        )}
      </div>
      <p class="composer-note">
        <span class="keys-hint">{running ? 'Escape to stop' : 'Enter to send, Shift+Enter for a new line'}</span>
        {context !== null && used > 0 && (
          <span class={used > context * 0.9 ? 'bad' : ''} title="Tokens of the last prompt and response, of the model's context length">
            <meter min={0} max={context} high={context * 0.9} value={used} aria-label="Context used" /> {count(used)} of {count(context)} tokens
          </span>
        )}
      </p>
    </form>
  );
}
