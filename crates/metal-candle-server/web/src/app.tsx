// The frame of the web UI: tabs, theme, server state and the dialog for the API key.
import { useEffect, useRef, useState } from 'preact/hooks';
import { submitKey, keyPrompt, reachable } from './api/client';
import { refreshModels, refreshProps, watchServer } from './api/server';
import { applyTheme, readTheme, type Theme, writeSetting } from './base/browser';
import { formatRoute, route, TABS, type Tab } from './base/route';
import { useStore } from './base/store';
import { IconButton } from './base/widgets';
import { ChatTab } from './chat/chat';
import { CompleteTab } from './complete/complete';
import { ModelsTab } from './models/models';
import { RunsTab } from './runs/runs';

const NAMES: Record<Tab, string> = { chat: 'Chat', complete: 'Complete', models: 'Models', runs: 'Runs' };
const VIEWS: Record<Tab, () => preact.JSX.Element> = { chat: ChatTab, complete: CompleteTab, models: ModelsTab, runs: RunsTab };

export function App() {
  const { tab } = useStore(route);
  const online = useStore(reachable);
  // Each tab returns to the item that was open in it.
  const items = useRef<Partial<Record<Tab, string | null>>>({});
  items.current[tab] = route.get().item;
  useEffect(() => {
    watchServer();
    void refreshModels();
    void refreshProps();
  }, []);
  useEffect(() => {
    document.title = `${NAMES[tab]} · metal-candle`;
  }, [tab]);
  const View = VIEWS[tab];
  return (
    <>
      <header class="top">
        <span class="brand">
          <svg viewBox="0 0 16 16" width="18" height="18" aria-hidden="true">
            <path d="M8 1c.6 2.6 3.8 4.3 3.8 8A3.8 4.4 0 0 1 8 14a3.8 4.4 0 0 1-3.8-5C4.2 6.6 6 6 8 1z" />
          </svg>
          <span class="wide-text">metal-candle</span>
        </span>
        <nav class="tabs" aria-label="Tabs">
          {TABS.map((name) => (
            <a key={name} href={formatRoute({ tab: name, item: items.current[name] ?? null })} aria-current={name === tab ? 'page' : undefined}>
              {NAMES[name]}
            </a>
          ))}
        </nav>
        <span class="space" />
        {!online && (
          <span class="offline" role="alert">
            Disconnected
          </span>
        )}
        <ThemeButton />
      </header>
      <View />
      <KeyDialog />
    </>
  );
}

const NEXT: Record<Theme, Theme> = { auto: 'light', light: 'dark', dark: 'auto' };
const THEMES: Record<Theme, string> = { auto: 'System theme', light: 'Light theme', dark: 'Dark theme' };

function ThemeButton() {
  const [theme, setTheme] = useState<Theme>(readTheme);
  const change = () => {
    const next = NEXT[theme];
    setTheme(next);
    writeSetting('theme', next);
    applyTheme(next);
  };
  return <IconButton icon={theme} label={THEMES[theme]} onClick={change} />;
}

function KeyDialog() {
  const prompt = useStore(keyPrompt);
  const dialog = useRef<HTMLDialogElement>(null);
  const [text, setText] = useState('');
  useEffect(() => {
    if (prompt && !dialog.current?.open) {
      setText('');
      dialog.current?.showModal();
    } else if (!prompt) {
      dialog.current?.close();
    }
  }, [prompt]);
  return (
    <dialog
      ref={dialog}
      aria-labelledby="key-title"
      onCancel={(event) => {
        event.preventDefault();
        submitKey(null);
      }}
    >
      <form
        onSubmit={(event) => {
          event.preventDefault();
          if (text.trim() !== '') submitKey(text.trim());
        }}
      >
        <h2 id="key-title">This server requires an API key</h2>
        {prompt?.wrong && (
          <p class="notice bad" role="alert">
            The server rejected the key.
          </p>
        )}
        <label class="stacked">
          API key
          <input type="password" autocomplete="off" value={text} onInput={(event) => setText(event.currentTarget.value)} />
        </label>
        <p class="hint">The key is stored until this tab is closed.</p>
        <div class="row end">
          <button type="button" class="quiet" onClick={() => submitKey(null)}>
            Cancel
          </button>
          <button type="submit" class="primary" disabled={text.trim() === ''}>
            Use key
          </button>
        </div>
      </form>
    </dialog>
  );
}
