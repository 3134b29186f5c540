// A conversation is a tree of turns, changed by pure functions.
import { NO_PARAMETERS, type Parameters, readParameters } from '../settings/parameters';
import { type Answer, interrupted, newAnswer } from './answer';

/** A prompt and its answers, one per model. Turns with the same parent are versions of each other. */
export interface Turn {
  id: string;
  parent: string | null;
  prompt: string;
  /** All models get the same seed, so that their answers can be compared. */
  seed: number;
  created: number;
  answers: Answer[];
}

export interface Conversation {
  id: string;
  title: string;
  created: number;
  updated: number;
  /** The models, one or two. */
  models: string[];
  system: string;
  parameters: Parameters;
  turns: Record<string, Turn>;
  /** The last turn of the visible path. */
  head: string | null;
}

export interface ChatMessage {
  role: 'system' | 'user' | 'assistant';
  content: string;
}

export function newConversation(id: string, models: string[], now: number): Conversation {
  return { id, title: '', created: now, updated: now, models, system: '', parameters: NO_PARAMETERS, turns: {}, head: null };
}

/** The path from the first turn to `end`. */
export function pathTo(conversation: Conversation, end: string | null): Turn[] {
  const path: Turn[] = [];
  for (let id = end; id !== null; ) {
    const turn: Turn | undefined = conversation.turns[id];
    if (!turn || path.includes(turn)) break;
    path.push(turn);
    id = turn.parent;
  }
  return path.reverse();
}

/** The turns with the same parent as `turn`, oldest first. */
export function versions(conversation: Conversation, turn: Turn): Turn[] {
  return Object.values(conversation.turns)
    .filter((other) => other.parent === turn.parent)
    .sort((a, b) => a.created - b.created || (a.id < b.id ? -1 : 1));
}

export function titleOf(prompt: string): string {
  const line = prompt.trim().split('\n')[0]!.trim();
  return line.length > 60 ? `${line.slice(0, 59).trimEnd()}…` : line;
}

export function addTurn(conversation: Conversation, turn: Omit<Turn, 'answers'>): Conversation {
  const answers = conversation.models.map((model) => newAnswer(model, turn.created));
  return {
    ...conversation,
    title: conversation.title || titleOf(turn.prompt),
    updated: turn.created,
    turns: { ...conversation.turns, [turn.id]: { ...turn, answers } },
    head: turn.id,
  };
}

export function changeAnswer(conversation: Conversation, id: string, lane: number, change: (answer: Answer) => Answer): Conversation {
  const turn = conversation.turns[id];
  const answer = turn?.answers[lane];
  if (!turn || !answer) return conversation;
  const changed = change(answer);
  if (changed === answer) return conversation;
  const answers = turn.answers.map((other, index) => (index === lane ? changed : other));
  return { ...conversation, turns: { ...conversation.turns, [id]: { ...turn, answers } } };
}

/** Shows the most recent path through `id`. */
export function showVersion(conversation: Conversation, id: string): Conversation {
  let head = id;
  for (;;) {
    const children = Object.values(conversation.turns).filter((turn) => turn.parent === head);
    if (children.length === 0) return { ...conversation, head };
    head = children.reduce((last, turn) => (turn.created >= last.created ? turn : last)).id;
  }
}

/** The messages to send for a turn. A lane without its own answer uses the answer of the first lane. */
export function messagesFor(conversation: Conversation, id: string, lane: number): ChatMessage[] {
  const messages: ChatMessage[] = [];
  if (conversation.system.trim() !== '') messages.push({ role: 'system', content: conversation.system });
  for (const turn of pathTo(conversation, id)) {
    if (turn.id === id) {
      messages.push({ role: 'user', content: turn.prompt });
      break;
    }
    const answer = turn.answers[lane] ?? turn.answers[0];
    // Chat templates require alternating roles, so prompts without an answer are omitted.
    if (!answer || answer.text === '') continue;
    messages.push({ role: 'user', content: turn.prompt }, { role: 'assistant', content: answer.text });
  }
  return messages;
}

/** Validates a conversation from storage or a file; null if it is invalid. Answers that were streaming are marked as stopped. */
export function readConversation(value: unknown): Conversation | null {
  if (typeof value !== 'object' || value === null) return null;
  const given = value as Partial<Conversation>;
  if (typeof given.id !== 'string' || typeof given.turns !== 'object' || given.turns === null) return null;
  const turns: Record<string, Turn> = {};
  for (const turn of Object.values(given.turns) as Partial<Turn>[]) {
    if (typeof turn?.id !== 'string' || typeof turn.prompt !== 'string' || !Array.isArray(turn.answers)) return null;
    turns[turn.id] = {
      id: turn.id,
      parent: typeof turn.parent === 'string' ? turn.parent : null,
      prompt: turn.prompt,
      seed: Number(turn.seed) || 0,
      created: Number(turn.created) || 0,
      answers: turn.answers.map(interrupted),
    };
  }
  const models = Array.isArray(given.models) ? given.models.filter((model) => typeof model === 'string').slice(0, 2) : [];
  return {
    id: given.id,
    title: String(given.title ?? ''),
    created: Number(given.created) || 0,
    updated: Number(given.updated) || 0,
    models: models.length > 0 ? models : [''],
    system: String(given.system ?? ''),
    parameters: readParameters(given.parameters),
    turns,
    head: typeof given.head === 'string' && turns[given.head] ? given.head : null,
  };
}
