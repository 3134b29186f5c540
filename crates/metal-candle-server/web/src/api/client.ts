// Sends requests to the server, prompts for an API key after a 401, and converts error responses to `ApiError`.
import { createStore } from '../base/store';

const KEY = 'metal-candle.key';

export class ApiError extends Error {
  constructor(
    readonly status: number,
    message: string,
    readonly code: string | null = null,
    readonly param: string | null = null,
  ) {
    super(message);
  }
}

/** The prompt for a key while it is open; `wrong` if a key was rejected. */
export const keyPrompt = createStore<{ wrong: boolean } | null>(null);

/** Whether the last request reached the server. */
export const reachable = createStore(true);

let key: string | null = null;
try {
  key = sessionStorage.getItem(KEY);
} catch {
  // Without storage the key lasts until the page is closed.
}

let waiting: Promise<boolean> | null = null;
let resolvePrompt: ((given: boolean) => void) | null = null;

/** Opens the prompt, or waits for the open one. Resolves to false if the user dismissed it. */
function promptForKey(refused: string | null): Promise<boolean> {
  if (refused !== key) return Promise.resolve(true);
  waiting ??= new Promise((resolve) => {
    resolvePrompt = resolve;
    keyPrompt.set({ wrong: refused !== null });
  });
  return waiting;
}

/** Closes the prompt with a key; null dismisses it. */
export function submitKey(given: string | null): void {
  if (given !== null) {
    key = given;
    try {
      sessionStorage.setItem(KEY, given);
    } catch {
      // As above.
    }
  }
  keyPrompt.set(null);
  resolvePrompt?.(given !== null);
  waiting = null;
  resolvePrompt = null;
}

export function forgetKey(): void {
  key = null;
  try {
    sessionStorage.removeItem(KEY);
  } catch {
    // As above.
  }
}

export interface Call {
  method?: 'GET' | 'POST' | 'DELETE';
  json?: unknown;
  form?: FormData;
  signal?: AbortSignal;
  /** False for background requests, which must not open the prompt for a key. */
  promptForKey?: boolean;
}

/** Returns the response of a successful request. Paths are relative to the page, so a proxy may add a prefix. */
export async function request(path: string, call: Call = {}): Promise<Response> {
  for (;;) {
    const used = key;
    const headers = new Headers();
    if (used !== null) headers.set('authorization', `Bearer ${used}`);
    if (call.json !== undefined) headers.set('content-type', 'application/json');
    let response: Response;
    try {
      response = await fetch(path, {
        method: call.method ?? 'GET',
        headers,
        body: call.json !== undefined ? JSON.stringify(call.json) : (call.form ?? null),
        signal: call.signal ?? null,
        cache: 'no-store',
        credentials: 'omit',
        redirect: 'error',
      });
    } catch (error) {
      if (call.signal?.aborted) throw error;
      reachable.set(false);
      throw new ApiError(0, 'The server does not respond. It may have stopped.');
    }
    reachable.set(true);
    if (response.ok) return response;
    if (response.status === 401 && call.promptForKey !== false && (await promptForKey(used))) continue;
    throw await readError(response);
  }
}

export async function requestJson<T>(path: string, call: Call = {}): Promise<T> {
  const response = await request(path, call);
  try {
    return (await response.json()) as T;
  } catch (error) {
    if (call.signal?.aborted) throw error;
    throw new ApiError(response.status, 'The server sent a response that is not JSON.');
  }
}

async function readError(response: Response): Promise<ApiError> {
  const text = await response.text().catch(() => '');
  try {
    const { error } = JSON.parse(text) as { error?: { message?: unknown; code?: unknown; param?: unknown } };
    if (typeof error?.message === 'string') {
      const string = (value: unknown) => (typeof value === 'string' ? value : null);
      return new ApiError(response.status, error.message, string(error.code), string(error.param));
    }
  } catch {
    // The body is not an error of the server, for example the error page of a proxy.
  }
  return new ApiError(response.status, `The server responded with status ${response.status}.`);
}

/** Describes a thrown value as a sentence for the user. */
export function describeError(error: unknown): string {
  if (error instanceof ApiError) {
    const sentence = error.message.charAt(0).toUpperCase() + error.message.slice(1);
    if (error.status === 403) return `${sentence}${/[.!?]$/.test(sentence) ? '' : '.'} This requires an admin key.`;
    return sentence;
  }
  return error instanceof Error ? error.message : String(error);
}
