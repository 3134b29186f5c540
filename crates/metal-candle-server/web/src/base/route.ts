// Stores the open tab and its open item in the URL fragment.
import { createStore } from './store';

export const TABS = ['chat', 'complete', 'models', 'runs'] as const;
export type Tab = (typeof TABS)[number];

export interface Route {
  tab: Tab;
  /** The id of a conversation or a job. */
  item: string | null;
}

export function parseRoute(hash: string): Route {
  const [tab = '', item = ''] = hash.replace(/^#\/?/, '').split('/');
  const known = TABS.find((name) => name === tab) ?? 'chat';
  try {
    return { tab: known, item: item === '' ? null : decodeURIComponent(item) };
  } catch {
    return { tab: known, item: null };
  }
}

export function formatRoute(route: Route): string {
  return route.item === null ? `#${route.tab}` : `#${route.tab}/${encodeURIComponent(route.item)}`;
}

export const route = createStore<Route>(parseRoute(location.hash));

window.addEventListener('hashchange', () => route.set(parseRoute(location.hash)));

export function go(tab: Tab, item: string | null = null, how: 'push' | 'replace' = 'push'): void {
  const next = { tab, item };
  const hash = formatRoute(next);
  if (hash === location.hash) return;
  if (how === 'replace') history.replaceState(null, '', hash);
  else history.pushState(null, '', hash);
  route.set(next);
}
