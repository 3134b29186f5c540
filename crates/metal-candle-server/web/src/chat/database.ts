// Stores conversations in IndexedDB: heads for the list, and conversations by id.
import { type Conversation, readConversation } from './conversation';

export interface Head {
  id: string;
  title: string;
  updated: number;
}

let opened: Promise<IDBDatabase> | null = null;

function open(): Promise<IDBDatabase> {
  opened ??= new Promise((resolve, reject) => {
    const request = indexedDB.open('metal-candle', 1);
    request.onupgradeneeded = () => {
      request.result.createObjectStore('heads', { keyPath: 'id' });
      request.result.createObjectStore('conversations', { keyPath: 'id' });
    };
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
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

async function query<T>(store: string, send: (store: IDBObjectStore) => IDBRequest<T>): Promise<T> {
  const request = send((await open()).transaction(store).objectStore(store));
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

/** The heads of all conversations, most recently updated first. */
export async function readHeads(): Promise<Head[]> {
  const heads = await query<Head[]>('heads', (store) => store.getAll() as IDBRequest<Head[]>);
  return heads.sort((a, b) => b.updated - a.updated);
}

export async function loadConversation(id: string): Promise<Conversation | null> {
  return readConversation(await query<unknown>('conversations', (store) => store.get(id) as IDBRequest<unknown>));
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
