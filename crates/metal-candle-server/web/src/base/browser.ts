// Wraps browser APIs: random ids, clipboard, downloads, theme and persistent settings.

/** A random id. `crypto.randomUUID` is only available on localhost and over HTTPS. */
export function randomId(): string {
  return [...crypto.getRandomValues(new Uint8Array(12))].map((byte) => byte.toString(16).padStart(2, '0')).join('');
}

export function randomSeed(): number {
  return crypto.getRandomValues(new Uint32Array(1))[0]! >>> 1;
}

/** Copies text to the clipboard. Returns whether it succeeded. */
export async function copyText(text: string): Promise<boolean> {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const area = document.createElement('textarea');
    area.value = text;
    area.style.position = 'fixed';
    area.style.opacity = '0';
    const focused = document.activeElement;
    document.body.append(area);
    area.select();
    const copied = document.execCommand('copy');
    area.remove();
    if (focused instanceof HTMLElement) focused.focus();
    return copied;
  }
}

export function download(name: string, text: string, type: string): void {
  const link = document.createElement('a');
  link.href = URL.createObjectURL(new Blob([text], { type }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

/** Reads a setting. Returns `fallback` if there is no storage or the value is invalid. */
export function readSetting<T>(key: string, fallback: T): T {
  try {
    const text = localStorage.getItem(`metal-candle.${key}`);
    return text === null ? fallback : (JSON.parse(text) as T);
  } catch {
    return fallback;
  }
}

export function writeSetting(key: string, value: unknown): void {
  try {
    localStorage.setItem(`metal-candle.${key}`, JSON.stringify(value));
  } catch {
    // A private window may have no storage; the setting then lasts until the tab is closed.
  }
}

export type Theme = 'auto' | 'light' | 'dark';

export function readTheme(): Theme {
  const theme = readSetting<unknown>('theme', 'auto');
  return theme === 'light' || theme === 'dark' ? theme : 'auto';
}

export function applyTheme(theme: Theme): void {
  document.documentElement.dataset.theme = theme;
  document.dispatchEvent(new Event('themechange'));
}
