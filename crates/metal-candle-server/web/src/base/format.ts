// Formats numbers, sizes, durations and dates.

export function count(value: number): string {
  return Math.round(value).toLocaleString('en-US');
}

export function plural(value: number, one: string, many = `${one}s`): string {
  return `${count(value)} ${value === 1 ? one : many}`;
}

/** Three significant digits; very small and large values in scientific notation. */
export function figure(value: number): string {
  if (!Number.isFinite(value)) return '–';
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e7)) return value.toExponential(2);
  if (size >= 1000) return count(value);
  return String(Number(value.toPrecision(size >= 100 ? 4 : 3)));
}

export function bytes(value: number): string {
  const units = ['B', 'kB', 'MB', 'GB', 'TB'];
  let unit = 0;
  while (value >= 1000 && unit < units.length - 1) {
    value /= 1000;
    unit += 1;
  }
  return `${unit === 0 || value >= 100 ? Math.round(value) : value.toFixed(1)} ${units[unit]}`;
}

export function duration(seconds: number): string {
  if (!Number.isFinite(seconds)) return '–';
  if (seconds < 1) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 60) return `${seconds.toFixed(1)} s`;
  const whole = Math.round(seconds);
  const hours = Math.floor(whole / 3600);
  const minutes = Math.floor((whole % 3600) / 60);
  if (hours > 0) return `${hours} h ${minutes} min`;
  return `${minutes} min ${whole % 60} s`;
}

/** Today's times as hours and minutes, other times with the date. */
export function moment(milliseconds: number): string {
  const date = new Date(milliseconds);
  const two = (value: number) => String(value).padStart(2, '0');
  const time = `${two(date.getHours())}:${two(date.getMinutes())}`;
  if (date.toDateString() === new Date().toDateString()) return time;
  return `${date.getFullYear()}-${two(date.getMonth() + 1)}-${two(date.getDate())} ${time}`;
}

const LABELS: Record<string, string> = { seconds: 'Time', n_epochs: 'Epochs', kv_cache_bytes: 'KV cache', id: 'ID' };

/** `peak_memory_bytes` becomes `Peak memory`: the unit is shown with the value. */
export function label(key: string): string {
  const known = LABELS[key];
  if (known) return known;
  const words = key.replace(/_(bytes|seconds)$/, '').replace('_per_second', '/s').replaceAll('_', ' ');
  return words.charAt(0).toUpperCase() + words.slice(1);
}

/** Formats a value from the server. The suffix of its key is the unit. */
export function quantity(key: string, value: unknown): string {
  if (typeof value === 'number') {
    if (/bytes$/.test(key)) return bytes(value);
    if (/seconds$/.test(key)) return duration(value);
    return Number.isInteger(value) ? count(value) : figure(value);
  }
  if (value === null || value === undefined) return '–';
  if (typeof value === 'boolean') return value ? 'yes' : 'no';
  return typeof value === 'string' ? value : JSON.stringify(value);
}
