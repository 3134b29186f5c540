// Stores conversations in IndexedDB: short heads for the list, and whole conversations by id.
import { type Conversation, readConversation } from './conversation';

export interface Head {
  id: string;
  title: string;
  updated: number;
}

let opened: Promise<IDBDatabase> | null = null;

function open(): Promise<IDBDatabase> {
  opened ??= new Promise((resolve, reject) => {
    const asked = indexedDB.open('metal-candle', 1);
    asked.onupgradeneeded = () => {
      asked.result.createObjectStore('heads', { keyPath: 'id' });
      asked.result.createObjectStore('conversations', { keyPath: 'id' });
    };
    asked.onsuccess = () => resolve(asked.result);
    asked.onerror = () => reject(asked.error);
  });
  return opened;
}

async function change(act: (heads: IDBObjectStore, conversations: IDBObjectStore) => void): Promise<void> {
  const transaction = (await open()).transaction(['heads', 'conversations'], 'readwrite');
  act(transaction.objectStore('heads'), transaction.objectStore('conversations'));
  return new Promise((resolve, reject) => {
    transaction.oncomplete = () => resolve();
    transaction.onabort = () => reject(transaction.error);
  });
}

async function ask<T>(store: string, question: (store: IDBObjectStore) => IDBRequest<T>): Promise<T> {
  const asked = question((await open()).transaction(store).objectStore(store));
  return new Promise((resolve, reject) => {
    asked.onsuccess = () => resolve(asked.result);
    asked.onerror = () => reject(asked.error);
  });
}

/** The heads of all conversations, the last changed first. */
export async function readHeads(): Promise<Head[]> {
  const heads = await ask<Head[]>('heads', (store) => store.getAll() as IDBRequest<Head[]>);
  return heads.sort((a, b) => b.updated - a.updated);
}

export async function loadConversation(id: string): Promise<Conversation | null> {
  return readConversation(await ask<unknown>('conversations', (store) => store.get(id) as IDBRequest<unknown>));
}

export function saveConversation(conversation: Conversation): Promise<void> {
  const { id, title, updated } = conversation;
  return change((heads, conversations) => {
    heads.put({ id, title, updated });
    conversations.put(conversation);
  });
}

export function deleteConversation(id: string): Promise<void> {
  return change((heads, conversations) => {
    heads.delete(id);
    conversations.delete(id);
  });
}
