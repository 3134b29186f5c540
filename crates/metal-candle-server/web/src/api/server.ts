// Holds the lists of models and adapters and the properties of the server, for all tabs.
import { createStore } from '../base/store';
import { ApiError, describeError, reachable, request, requestJson } from './client';
import { parseMetrics, type Sample } from './metrics';
import type { Adapter, List, Model, Props } from './types';

export interface Server {
  models: Model[];
  /** Null where the server has no such list or the key may not read it. */
  adapters: Adapter[] | null;
  props: Props | null;
  loaded: boolean;
  error: string | null;
}

export const server = createStore<Server>({ models: [], adapters: null, props: null, loaded: false, error: null });

export async function refreshModels(ask = true): Promise<void> {
  try {
    const models = (await requestJson<List<Model>>('v1/models', { ask })).data;
    server.set((state) => ({ ...state, models, loaded: true, error: null }));
  } catch (error) {
    server.set((state) => ({ ...state, loaded: true, error: describeError(error) }));
    return;
  }
  const adapters = await requestJson<List<Adapter>>('v1/adapters', { ask: false }).then((list) => list.data, () => null);
  server.set((state) => ({ ...state, adapters }));
}

export async function refreshProps(): Promise<void> {
  const props = await requestJson<Props>('props', { ask: false }).catch(() => null);
  server.set((state) => ({ ...state, props }));
}

let metricsOff = false;

/** The server's metrics; null if they are off. */
export async function readMetrics(): Promise<Sample[] | null> {
  if (metricsOff) return null;
  try {
    return parseMetrics(await (await request('metrics', { ask: false })).text());
  } catch (error) {
    // A setting of the server that does not change while it runs.
    metricsOff = error instanceof ApiError && error.status === 404;
    return null;
  }
}

/** The model that new conversations use: the first that is not an adapter. */
export function baseModel(state: Server): string {
  return (state.models.find((model) => !model.parent) ?? state.models[0])?.id ?? '';
}

/** The context length of a model, or of the model that it belongs to. */
export function contextLength(state: Server, id: string): number | null {
  const model = state.models.find((candidate) => candidate.id === id);
  const parent = state.models.find((candidate) => candidate.id === model?.parent);
  return model?.context_length ?? parent?.context_length ?? state.props?.n_ctx ?? null;
}

/** While the server does not answer, asks every three seconds whether it is back. */
export function watchServer(): void {
  reachable.subscribe(() => {
    if (reachable.get()) return;
    const timer = setInterval(() => {
      request('health', { ask: false }).then(
        () => void refreshModels(false),
        () => undefined,
      );
      if (reachable.get()) clearInterval(timer);
    }, 3000);
  });
}
