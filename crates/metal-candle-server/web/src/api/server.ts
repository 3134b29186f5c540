// Stores the models, adapters and properties of the server for all tabs.
import { createStore } from '../base/store';
import { ApiError, describeError, reachable, request, requestJson } from './client';
import { parseMetrics, type Sample } from './metrics';
import type { Adapter, List, Model, Props } from './types';

export interface Server {
  models: Model[];
  /** Null if the server has no list of adapters or the key may not read it. */
  adapters: Adapter[] | null;
  props: Props | null;
  loaded: boolean;
  error: string | null;
}

export const server = createStore<Server>({ models: [], adapters: null, props: null, loaded: false, error: null });

export async function refreshModels(promptForKey = true): Promise<void> {
  try {
    const models = (await requestJson<List<Model>>('v1/models', { promptForKey })).data;
    server.set((state) => ({ ...state, models, loaded: true, error: null }));
  } catch (error) {
    server.set((state) => ({ ...state, loaded: true, error: describeError(error) }));
    return;
  }
  const adapters = await requestJson<List<Adapter>>('v1/adapters', { promptForKey: false }).then((list) => list.data, () => null);
  server.set((state) => ({ ...state, adapters }));
}

export async function refreshProps(): Promise<void> {
  const props = await requestJson<Props>('props', { promptForKey: false }).catch(() => null);
  server.set((state) => ({ ...state, props }));
}

let metricsOff = false;

/** The server's metrics; null if they are off. */
export async function readMetrics(): Promise<Sample[] | null> {
  if (metricsOff) return null;
  try {
    return parseMetrics(await (await request('metrics', { promptForKey: false })).text());
  } catch (error) {
    // The setting does not change while the server runs.
    metricsOff = error instanceof ApiError && error.status === 404;
    return null;
  }
}

/** The default model of new conversations: the first model that is not an adapter. */
export function baseModel(state: Server): string {
  return (state.models.find((model) => !model.parent) ?? state.models[0])?.id ?? '';
}

/** The context length of a model, or of an adapter's base model. */
export function contextLength(state: Server, id: string): number | null {
  const model = state.models.find((candidate) => candidate.id === id);
  const parent = state.models.find((candidate) => candidate.id === model?.parent);
  return model?.context_length ?? parent?.context_length ?? state.props?.n_ctx ?? null;
}

/** While the server does not respond, polls it every three seconds. */
export function watchServer(): void {
  reachable.subscribe(() => {
    if (reachable.get()) return;
    const timer = setInterval(() => {
      request('health', { promptForKey: false }).then(
        () => void refreshModels(false),
        () => undefined,
      );
      if (reachable.get()) clearInterval(timer);
    }, 3000);
  });
}
