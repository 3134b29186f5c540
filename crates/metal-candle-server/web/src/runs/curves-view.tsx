// The curves of one or several jobs, with controls for metric, smoothing and axes.
import { useMemo, useState } from 'preact/hooks';
import type { Job } from '../api/types';
import { readSetting, writeSetting } from '../base/browser';
import { label } from '../base/format';
import { type Curves, curvesOf, type Point, smooth } from './curves';
import type { Feed } from './feed';
import { nameOf } from './job';
import { Plot, type PlotSeries } from './plot';

interface View {
  smoothing: number;
  logarithmic: boolean;
  byTime: boolean;
}

const NO_VIEW: View = { smoothing: 0, logarithmic: false, byTime: false };

export function CurvesView({ jobs, feeds }: { jobs: Job[]; feeds: Record<string, Feed> }) {
  const [view, setView] = useState<View>(() => ({ ...NO_VIEW, ...readSetting('curves', NO_VIEW) }));
  const [metric, setMetric] = useState('loss');
  const change = (part: Partial<View>) => {
    const next = { ...view, ...part };
    writeSetting('curves', next);
    setView(next);
  };
  const curves = useMemo(() => jobs.map((job) => curvesOf(feeds[job.id]?.events ?? [])), [jobs.map((job) => job.id).join(' '), feeds]);
  const others = [...new Set(curves.flatMap(Object.keys))].filter((name) => name !== 'train_loss' && name !== 'valid_loss').sort();
  const shown = metric === 'loss' || others.includes(metric) ? metric : 'loss';
  const series = jobs.flatMap((job, index) => seriesOf(curves[index]!, shown, view, index, jobs.length > 1 ? `${nameOf(job)} ` : ''));
  const has = series.some((entry) => entry.points.length > 0);
  return (
    <section class="curves">
      <div class="row">
        <select aria-label="Metric" value={shown} onChange={(event) => setMetric(event.currentTarget.value)}>
          <option value="loss">Loss</option>
          {others.map((name) => (
            <option key={name} value={name}>
              {label(name)}
            </option>
          ))}
        </select>
        <label>
          Smoothing{' '}
          <input
            type="range"
            min={0}
            max={0.99}
            step={0.01}
            value={view.smoothing}
            aria-valuetext={String(view.smoothing)}
            onInput={(event) => change({ smoothing: Number(event.currentTarget.value) })}
          />
        </label>
        <label>
          <input type="checkbox" checked={view.logarithmic} onChange={(event) => change({ logarithmic: event.currentTarget.checked })} /> Log scale
        </label>
        <label>
          <input type="checkbox" checked={view.byTime} onChange={(event) => change({ byTime: event.currentTarget.checked })} /> Time axis
        </label>
      </div>
      {has ? (
        <Plot series={series} xLabel={view.byTime ? 'Seconds' : 'Step'} logarithmic={view.logarithmic} label={`Curves of ${shown}`} />
      ) : (
        <p class="muted">No metrics yet.</p>
      )}
    </section>
  );
}

function seriesOf(curves: Curves, metric: string, view: View, color: number, prefix: string): PlotSeries[] {
  const toXy = (points: Point[], values = points.map((point) => point.value)) =>
    points
      .map((point, index) => ({ x: view.byTime ? point.time : point.step, y: values[index]! }))
      .filter((point) => !view.logarithmic || point.y > 0);
  const lines = (points: Point[], name: string, at: number): PlotSeries[] => {
    if (points.length === 0) return [];
    const label = `${prefix}${name}`.trim();
    if (view.smoothing === 0) return [{ label, color: at, style: 'line', points: toXy(points) }];
    const smoothed = toXy(points, smooth(points.map((point) => point.value), view.smoothing));
    return [
      { label: `${label}, raw`, color: at, style: 'faint', points: toXy(points) },
      { label, color: at, style: 'line', points: smoothed },
    ];
  };
  const first = color % 6;
  if (metric !== 'loss') return lines(curves[metric] ?? [], label(metric).toLowerCase(), first);
  const valid = curves.valid_loss ?? [];
  return [
    ...lines(curves.train_loss ?? [], 'training', first),
    // The validation loss of a single job has its own colour; with several jobs, the colour identifies the job.
    ...(valid.length > 0 ? [{ label: `${prefix}validation`, color: prefix === '' ? 1 : first, style: 'points' as const, points: toXy(valid) }] : []),
  ];
}
