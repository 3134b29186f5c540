// The Chat tab: the list of conversations, the open conversation, and its parameters.
import { useEffect, useLayoutEffect, useRef, useState } from 'preact/hooks';
import { baseModel, contextLength, server } from '../api/server';
import { download, readSetting, writeSetting } from '../base/browser';
import { go, route } from '../base/route';
import { useStore } from '../base/store';
import { ConfirmButton, Icon, IconButton, Menu, Notice } from '../base/widgets';
import { ModelSelect } from '../settings/model-select';
import { ParameterPanel } from '../settings/panel';
import { schemaProblem } from '../settings/parameters';
import { isRunning } from './answer';
import { Composer } from './composer';
import { type Conversation, newConversation, pathTo, showVersion, type Turn, versions } from './conversation';
import { changeChat, chats, loadChats, openChat, removeChat, renameChat, sendPrompt, startChat, stopAnswers } from './session';
import { Sidebar } from './sidebar';
import { TurnView } from './turn';

type Drawer = 'list' | 'parameters' | null;

export function ChatTab() {
  const { item } = useStore(route);
  const { open, running } = useStore(chats);
  const state = useStore(server);
  const [missing, setMissing] = useState(false);
  const [drawer, setDrawer] = useState<Drawer>(null);
  const [panel, setPanel] = useState(() => readSetting('parameters-open', true));

  useEffect(() => void loadChats(), []);
  useEffect(() => {
    setMissing(false);
    if (item !== null) void openChat(item).then((found) => setMissing(!found));
  }, [item]);

  useEffect(() => {
    if (drawer === null) return;
    const onKey = (event: KeyboardEvent) => {
      if (event.key === 'Escape') setDrawer(null);
    };
    window.addEventListener('keydown', onKey);
    return () => window.removeEventListener('keydown', onKey);
  }, [drawer]);

  // A conversation is stored with its first prompt; until then an empty one is shown.
  const conversation = item === null ? null : (open[item] ?? null);
  const base = baseModel(state);
  useEffect(() => {
    // A conversation may be started before the models are loaded.
    if (conversation === null || base === '' || !conversation.models.includes('')) return;
    changeChat(conversation.id, (before) => ({ ...before, models: before.models.map((model) => model || base) }));
  }, [conversation, base]);
  const begin = (): string => {
    const id = startChat([base]);
    go('chat', id, 'replace');
    return id;
  };
  const ensure = (): string => conversation?.id ?? begin();
  const fresh = () => {
    setDrawer(null);
    go('chat', null);
  };
  const toggleParameters = () => {
    if (matchMedia('(max-width: 1080px)').matches) {
      setDrawer(drawer === 'parameters' ? null : 'parameters');
    } else {
      writeSetting('parameters-open', !panel);
      setPanel(!panel);
    }
  };
  const shown = conversation ?? newConversation('', [base], 0);
  const change = (part: Partial<Conversation>) => changeChat(ensure(), (before) => ({ ...before, ...part }));

  return (
    <div class={`chat${panel ? ' with-parameters' : ''}${drawer ? ` drawer-${drawer}` : ''}`}>
      <aside class="sidebar" aria-label="Conversations">
        <Sidebar current={item} onNew={fresh} onOpen={(id) => (setDrawer(null), go('chat', id))} />
      </aside>
      {missing && conversation === null ? (
        <main class="chat-main">
          <div class="thread empty">
            <p>This conversation is not stored in this browser.</p>
            <button type="button" onClick={fresh}>
              New conversation
            </button>
          </div>
        </main>
      ) : (
        <Main
          conversation={shown}
          running={running.includes(shown.id)}
          onModels={(models) => change({ models })}
          onSend={(prompt) => void sendPrompt(ensure(), prompt, shown.head)}
          onDrawer={() => setDrawer(drawer === 'list' ? null : 'list')}
          onParameters={toggleParameters}
          onRemoved={fresh}
        />
      )}
      <aside class="side-panel" aria-label="Parameters">
        <div class="side-head">
          <h2>Parameters</h2>
          <IconButton icon="close" label="Close parameters" onClick={toggleParameters} />
        </div>
        <label class="stacked">
          System prompt
          <textarea rows={4} value={shown.system} placeholder="None" onInput={(event) => change({ system: event.currentTarget.value })} />
        </label>
        <ParameterPanel
          key={shown.id}
          kind="chat"
          value={shown.parameters}
          defaults={state.props?.default_generation_settings?.params ?? {}}
          onChange={(parameters) => change({ parameters })}
        />
      </aside>
      {drawer !== null && <button type="button" class="scrim" aria-label="Close" onClick={() => setDrawer(null)} />}
    </div>
  );
}

interface MainProps {
  conversation: Conversation;
  running: boolean;
  onModels: (models: string[]) => void;
  onSend: (prompt: string) => void;
  onDrawer: () => void;
  onParameters: () => void;
  onRemoved: () => void;
}

function Main(props: MainProps) {
  const { conversation, running, onModels } = props;
  const state = useStore(server);
  const thread = useRef<HTMLDivElement>(null);
  const following = useRef(true);
  const [away, setAway] = useState(false);
  const { id, models, parameters } = conversation;
  const path = pathTo(conversation, conversation.head);
  const last = path[path.length - 1];
  const badSchema = parameters.format === 'json_schema' && schemaProblem(parameters.schema) !== null;
  const ready = models.every((model) => model !== '') && !badSchema;

  useEffect(() => {
    following.current = true;
  }, [id, last?.id]);
  useLayoutEffect(() => {
    if (following.current && thread.current) thread.current.scrollTop = thread.current.scrollHeight;
  });
  useEffect(() => {
    const onKey = (event: KeyboardEvent) => {
      if (event.key === 'Escape' && running && !document.querySelector('dialog[open]')) stopAnswers(id);
    };
    window.addEventListener('keydown', onKey);
    return () => window.removeEventListener('keydown', onKey);
  }, [id, running]);

  const compare = () => {
    const other = state.models.find((model) => model.id !== models[0] && model.parent) ?? state.models.find((model) => model.id !== models[0]);
    onModels([models[0]!, other?.id ?? models[0]!]);
  };
  const again = (turn: Turn, prompt: string) => void sendPrompt(id, prompt, turn.parent);

  return (
    <main class="chat-main">
      <div class="toolbar">
        <IconButton icon="menu" label="Conversations" class="quiet only-narrow" onClick={props.onDrawer} />
        <div class="pickers">
          {models.map((model, lane) => (
            <ModelSelect
              key={lane}
              value={model}
              label={lane === 0 ? 'Model' : 'Second model'}
              onChange={(next) => onModels(models.map((other, index) => (index === lane ? next : other)))}
            />
          ))}
          {models.length === 1 ? (
            <button type="button" class="quiet" aria-label="Compare" disabled={running || state.models.length === 0} onClick={compare} title="Send each prompt to two models with the same seed">
              <Icon name="columns" /> <span class="wide-text">Compare</span>
            </button>
          ) : (
            <IconButton icon="close" label="Stop comparing" disabled={running} onClick={() => onModels(models.slice(0, 1))} />
          )}
        </div>
        {path.length > 0 && <Actions conversation={conversation} onRemoved={props.onRemoved} />}
        <IconButton icon="sliders" label="Parameters" onClick={props.onParameters} />
      </div>
      <div
        ref={thread}
        class={`thread${path.length === 0 ? ' empty' : ''}`}
        role="log"
        aria-live="off"
        aria-label="Conversation"
        tabIndex={0}
        onScroll={(event) => {
          const { scrollHeight, scrollTop, clientHeight } = event.currentTarget;
          following.current = scrollHeight - scrollTop - clientHeight < 40;
          setAway(!following.current);
        }}
      >
        {state.error !== null && <Notice kind="bad" text={state.error} />}
        {path.length === 0 ? (
          <Welcome models={models} />
        ) : (
          path.map((turn) => (
            <TurnView
              key={turn.id}
              turn={turn}
              versions={versions(conversation, turn).map((version) => version.id)}
              busy={running}
              onVersion={(version) => changeChat(id, (before) => showVersion(before, version))}
              onEdit={(prompt) => again(turn, prompt)}
              onAgain={() => again(turn, turn.prompt)}
            />
          ))
        )}
      </div>
      <div class="composer-area">
        {away && path.length > 0 && (
          <button
            type="button"
            class="to-end"
            aria-label="Go to the end"
            onClick={() => thread.current?.scrollTo({ top: thread.current.scrollHeight })}
          >
            <Icon name="down" />
          </button>
        )}
        {badSchema && <Notice kind="warn" text="The JSON schema in the parameters has a mistake." />}
        <Composer
          id={id}
          running={running}
          ready={ready}
          used={tokensUsed(last)}
          context={contextLength(state, models[0] ?? '')}
          onSend={props.onSend}
          onStop={() => stopAnswers(id)}
        />
      </div>
      <p class="visually-hidden" role="status">
        {announcement(last)}
      </p>
    </main>
  );
}

function Welcome({ models }: { models: string[] }) {
  const { loaded } = useStore(server);
  if (!loaded) return <p class="muted">Loading models…</p>;
  return (
    <div class="welcome">
      {models.length === 2 ? (
        <p>Each prompt is sent to both models with the same seed. Their responses are shown side by side.</p>
      ) : (
        <p>Select a model or adapter above and write a prompt. Compare sends each prompt to two models.</p>
      )}
    </div>
  );
}

function Actions({ conversation, onRemoved }: { conversation: Conversation; onRemoved: () => void }) {
  const [renaming, setRenaming] = useState(false);
  if (renaming) {
    return (
      <form
        class="rename"
        onSubmit={(event) => {
          event.preventDefault();
          renameChat(conversation.id, String(new FormData(event.currentTarget).get('title') ?? ''));
          setRenaming(false);
        }}
      >
        <input
          name="title"
          aria-label="Title"
          defaultValue={conversation.title}
          ref={(element) => element?.focus()}
          onBlur={() => setRenaming(false)}
          onKeyDown={(event) => {
            if (event.key === 'Escape') setRenaming(false);
          }}
        />
      </form>
    );
  }
  return (
    <Menu label="Conversation actions">
      <button type="button" class="quiet" onClick={() => setRenaming(true)}>
        Rename
      </button>
      <button
        type="button"
        class="quiet"
        onClick={() => download(`${conversation.title.replace(/[^\p{L}\p{N} _-]/gu, '') || 'conversation'}.json`, JSON.stringify(conversation, null, 2), 'application/json')}
      >
        Export as JSON
      </button>
      <ConfirmButton label="Delete" confirm="Delete permanently" onConfirm={() => (void removeChat(conversation.id), onRemoved())} />
    </Menu>
  );
}

function tokensUsed(turn: Turn | undefined): number {
  const sums = turn?.answers.map((answer) => (answer.usage ? answer.usage.prompt_tokens + answer.usage.completion_tokens : 0));
  return Math.max(0, ...(sums ?? []));
}

/** Screen readers announce the start and end of an answer, because they would read streamed text in fragments. */
function announcement(turn: Turn | undefined): string {
  if (!turn) return '';
  if (turn.answers.some(isRunning)) return 'Generating a response.';
  return turn.answers.some((answer) => answer.state === 'failed') ? 'The response failed.' : 'The response is complete.';
}
