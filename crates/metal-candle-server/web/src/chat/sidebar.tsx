// The list of conversations, with a filter and import.
import { useRef, useState } from 'preact/hooks';
import { moment } from '../base/format';
import { formatRoute } from '../base/route';
import { useStore } from '../base/store';
import { Icon, Notice } from '../base/widgets';
import { chats, importChats } from './session';

export function Sidebar({ current, onNew, onOpen }: { current: string | null; onNew: () => void; onOpen: (id: string) => void }) {
  const { heads, running, problem } = useStore(chats);
  const [filter, setFilter] = useState('');
  const [failed, setFailed] = useState<string | null>(null);
  const input = useRef<HTMLInputElement>(null);
  const shown = (heads ?? []).filter((head) => head.title.toLowerCase().includes(filter.trim().toLowerCase()));
  const take = async (file: File | undefined) => {
    if (!file) return;
    try {
      const id = importChats(await file.text());
      setFailed(id === null ? 'The file contains no conversation.' : null);
      if (id !== null) onOpen(id);
    } catch {
      setFailed('The file is not an exported conversation.');
    }
  };
  return (
    <>
      <button type="button" class="new" onClick={onNew}>
        <Icon name="plus" /> New chat
      </button>
      {(heads?.length ?? 0) > 6 && (
        <input type="search" placeholder="Filter" aria-label="Filter conversations" value={filter} onInput={(event) => setFilter(event.currentTarget.value)} />
      )}
      {problem !== null && <Notice kind="warn" text={problem} />}
      <nav class="heads" aria-label="Conversations">
        {shown.map((head) => (
          <a
            key={head.id}
            href={formatRoute({ tab: 'chat', item: head.id })}
            aria-current={head.id === current ? 'page' : undefined}
            title={`${head.title}\n${moment(head.updated)}`}
            onClick={() => onOpen(head.id)}
          >
            {running.includes(head.id) && <span class="pulse" />}
            {head.title || 'Untitled'}
          </a>
        ))}
        {heads?.length === 0 && <p class="muted">Conversations are stored in this browser only.</p>}
        {heads !== null && heads.length > 0 && shown.length === 0 && <p class="muted">No matching conversations.</p>}
      </nav>
      <input
        ref={input}
        type="file"
        accept="application/json,.json"
        class="visually-hidden"
        tabIndex={-1}
        aria-hidden="true"
        onChange={(event) => {
          void take(event.currentTarget.files?.[0]);
          event.currentTarget.value = '';
        }}
      />
      {failed !== null && <Notice kind="bad" text={failed} />}
      <button type="button" class="quiet" onClick={() => input.current?.click()}>
        Import a conversation
      </button>
    </>
  );
}
