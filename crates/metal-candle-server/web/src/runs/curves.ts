// Converts the events of fine-tuning jobs to curves, and curves to the columns of a plot.
import type { JobEvent } from '../api/types';

export interface Point {
  step: number;
  /** Seconds since the first metrics of the job. */
  time: number;
  value: number;
}

/** Curves by metric. */
export type Curves = Record<string, Point[]>;

// Columns of a metrics row that are not curves.
const NOT_CURVES = new Set(['step', 'epoch', 'event', 'tokens', 'trained_tokens', 'total_steps']);

/** The curves of chronological events. A step that was repeated after a resume replaces the previous one. */
export function curvesOf(events: JobEvent[]): Curves {
  const curves: Record<string, Map<number, Point>> = {};
  const start = events.find((event) => event.type === 'metrics')?.created_at ?? 0;
  for (const { data, created_at } of events) {
    const step = data?.step;
    if (!data || typeof step !== 'number') continue;
    for (const [key, value] of Object.entries(data)) {
      if (NOT_CURVES.has(key) || typeof value !== 'number' || !Number.isFinite(value)) continue;
      const name = metricName(key, data.event);
      (curves[name] ??= new Map()).set(step, { step, time: created_at - start, value });
    }
  }
  return Object.fromEntries(Object.entries(curves).map(([name, points]) => [name, [...points.values()].sort((a, b) => a.step - b.step)]));
}

/** In `metrics.jsonl`, both losses are called `loss`, and `event` is the kind of row. */
function metricName(key: string, kind: unknown): string {
  if (key === 'loss') return kind === 'evaluation' ? 'valid_loss' : 'train_loss';
  return key === 'full_valid_loss' ? 'valid_loss' : key;
}

/** Bias-corrected exponential smoothing; a weight of 0 changes nothing. */
export function smooth(values: number[], weight: number): number[] {
  let sum = 0;
  let weights = 0;
  return values.map((value) => {
    sum = sum * weight + value * (1 - weight);
    weights = weights * weight + (1 - weight);
    return sum / weights;
  });
}

/** One sorted column of all x, and one column per series, with null where the series has no point. */
export function align(series: { x: number; y: number }[][]): [number[], ...(number | null)[][]] {
  const xs = [...new Set(series.flatMap((points) => points.map((point) => point.x)))].sort((a, b) => a - b);
  const index = new Map(xs.map((x, position) => [x, position]));
  const columns = series.map((points) => {
    const column = new Array<number | null>(xs.length).fill(null);
    for (const { x, y } of points) column[index.get(x)!] = y;
    return column;
  });
  return [xs, ...columns];
}

export function lastOf(points: Point[] | undefined): Point | undefined {
  return points?.[points.length - 1];
}

export function lowest(points: Point[] | undefined): Point | undefined {
  return points?.reduce<Point | undefined>((best, point) => (best && best.value <= point.value ? best : point), undefined);
}
