// Manages open conversations: sends prompts, streams the answers, and saves conversations.
import { randomId, randomSeed } from '../base/browser';
import { createStore } from '../base/store';
import { describeError, request } from '../api/client';
import { readEvents } from '../api/sse';
import type { ChatChunk } from '../api/types';
import { requestFields } from '../settings/parameters';
import { type Answer, addChunk, fail, finish, stop } from './answer';
import { addTurn, changeAnswer, type Conversation, messagesFor, newConversation, readConversation, titleOf } from './conversation';
import { deleteConversation, type Head, loadConversation, readHeads, saveConversation } from './database';

export interface Chats {
  /** Null until the database has been read. */
  heads: Head[] | null;
  open: Record<string, Conversation>;
  /** The ids of conversations with a running answer. */
  running: string[];
  /** An error of the database; conversations then last until the page is closed. */
  problem: string | null;
}

export const chats = createStore<Chats>({ heads: null, open: {}, running: [], problem: null });

const RENDER_MILLISECONDS = 33;
const SAVE_MILLISECONDS = 1000;

const controllers = new Map<string, AbortController>();
const unsaved = new Map<string, ReturnType<typeof setTimeout>>();

export async function loadChats(): Promise<void> {
  try {
    const heads = await readHeads();
    chats.set((state) => ({ ...state, heads: mergeHeads(heads, state.heads ?? []) }));
  } catch (error) {
    chats.set((state) => ({ ...state, heads: state.heads ?? [], problem: `Conversations cannot be stored: ${describeError(error)}` }));
  }
}

function mergeHeads(stored: Head[], known: Head[]): Head[] {
  return [...known.filter((head) => !stored.some((other) => other.id === head.id)), ...stored].sort((a, b) => b.updated - a.updated);
}

/** Opens a stored conversation. Returns false if the id does not exist. */
export async function openChat(id: string): Promise<boolean> {
  if (chats.get().open[id]) return true;
  const conversation = await loadConversation(id).catch(() => null);
  if (!conversation) return false;
  // The conversation may have been opened during the query.
  chats.set((state) => ({ ...state, open: { [id]: conversation, ...state.open } }));
  return true;
}

/** Creates a conversation. It is stored with its first prompt. */
export function startChat(models: string[]): string {
  const id = randomId();
  chats.set((state) => ({ ...state, open: { ...state.open, [id]: newConversation(id, models, Date.now()) } }));
  return id;
}

export function changeChat(id: string, change: (conversation: Conversation) => Conversation): void {
  const before = chats.get().open[id];
  if (!before) return;
  const after = change(before);
  if (after === before) return;
  chats.set((state) => ({ ...state, open: { ...state.open, [id]: after } }));
  if (Object.keys(after.turns).length > 0) saveSoon(id);
}

function saveSoon(id: string): void {
  if (!unsaved.has(id)) unsaved.set(id, setTimeout(() => save(id), SAVE_MILLISECONDS));
}

function save(id: string): void {
  clearTimeout(unsaved.get(id));
  unsaved.delete(id);
  const conversation = chats.get().open[id];
  if (!conversation) return;
  const { title, updated } = conversation;
  chats.set((state) => ({
    ...state,
    heads: mergeHeads([{ id, title, updated }], (state.heads ?? []).filter((head) => head.id !== id)),
  }));
  saveConversation(conversation).catch((error: unknown) => {
    chats.set((state) => ({ ...state, problem: `Conversations cannot be stored: ${describeError(error)}` }));
  });
}

// A hidden page may be closed without another event.
document.addEventListener('visibilitychange', () => {
  if (document.visibilityState === 'hidden') for (const id of [...unsaved.keys()]) save(id);
});
window.addEventListener('pagehide', () => {
  for (const id of [...unsaved.keys()]) save(id);
});

export async function removeChat(id: string): Promise<void> {
  stopAnswers(id);
  clearTimeout(unsaved.get(id));
  unsaved.delete(id);
  chats.set((state) => {
    const { [id]: _removed, ...open } = state.open;
    return { ...state, open, heads: (state.heads ?? []).filter((head) => head.id !== id) };
  });
  await deleteConversation(id).catch(() => undefined);
}

/** Adds the conversations of an exported file with new ids. Returns the id of the first; null if the file contains none. */
export function importChats(text: string): string | null {
  const value: unknown = JSON.parse(text);
  const found = (Array.isArray(value) ? value : [value]).map(readConversation).filter((conversation) => conversation !== null);
  const ids = found.map((conversation) => {
    const id = randomId();
    chats.set((state) => ({ ...state, open: { ...state.open, [id]: { ...conversation, id, updated: Date.now() } } }));
    save(id);
    return id;
  });
  return ids[0] ?? null;
}

export function renameChat(id: string, title: string): void {
  changeChat(id, (conversation) => ({ ...conversation, title: title.trim() || conversation.title }));
  save(id);
}

/** Sends a prompt after `parent` to all models of the conversation, with the same seed. */
export async function sendPrompt(id: string, prompt: string, parent: string | null): Promise<void> {
  const conversation = chats.get().open[id];
  if (!conversation || controllers.has(id)) return;
  const turn = {
    id: randomId(),
    parent,
    prompt,
    seed: conversation.parameters.seed ?? randomSeed(),
    created: Date.now(),
  };
  changeChat(id, (before) => addTurn({ ...before, title: before.title || titleOf(prompt) }, turn));
  save(id);
  const controller = new AbortController();
  controllers.set(id, controller);
  updateRunning();
  const lanes = chats.get().open[id]!.turns[turn.id]!.answers.map((_, lane) => streamAnswer(id, turn.id, lane, controller.signal));
  await Promise.all(lanes);
  controllers.delete(id);
  updateRunning();
  changeChat(id, (before) => ({ ...before, updated: Date.now() }));
  save(id);
}

export function stopAnswers(id: string): void {
  controllers.get(id)?.abort();
}

function updateRunning(): void {
  chats.set((state) => ({ ...state, running: [...controllers.keys()] }));
}

async function streamAnswer(id: string, turn: string, lane: number, signal: AbortSignal): Promise<void> {
  const conversation = chats.get().open[id]!;
  const { seed, answers } = conversation.turns[turn]!;
  let pending: [ChatChunk, number][] = [];
  let timer: ReturnType<typeof setTimeout> | undefined;
  const flush = (last?: (answer: Answer) => Answer) => {
    clearTimeout(timer);
    timer = undefined;
    const chunks = pending;
    pending = [];
    changeChat(id, (before) =>
      changeAnswer(before, turn, lane, (answer) => {
        const after = chunks.reduce((value, [chunk, at]) => addChunk(value, chunk, at), answer);
        return last ? last(after) : after;
      }),
    );
  };
  try {
    const response = await request('v1/chat/completions', {
      method: 'POST',
      signal,
      json: {
        ...requestFields(conversation.parameters, 'chat'),
        model: answers[lane]!.model,
        messages: messagesFor(conversation, turn, lane),
        seed,
        stream: true,
        stream_options: { include_usage: true },
      },
    });
    for await (const { data } of readEvents(response.body!)) {
      if (data === '[DONE]') break;
      pending.push([JSON.parse(data) as ChatChunk, Date.now()]);
      timer ??= setTimeout(flush, RENDER_MILLISECONDS);
    }
    flush((answer) => finish(answer, Date.now()));
  } catch (error) {
    const now = Date.now();
    flush((answer) => (signal.aborted ? stop(answer, now) : fail(answer, describeError(error), now)));
  }
}
