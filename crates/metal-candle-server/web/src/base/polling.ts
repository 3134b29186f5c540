// Repeats a request while the page is visible, one at a time.
import { useEffect, useRef } from 'preact/hooks';

export function usePolling(milliseconds: number, act: () => Promise<void>): void {
  const latest = useRef(act);
  latest.current = act;
  useEffect(() => {
    let timer: ReturnType<typeof setTimeout> | undefined;
    let ended = false;
    let busy = false;
    const tick = async () => {
      if (busy || ended) return;
      busy = true;
      clearTimeout(timer);
      await latest.current().catch(() => undefined);
      busy = false;
      if (!ended && document.visibilityState === 'visible') timer = setTimeout(tick, milliseconds);
    };
    const onVisible = () => {
      if (document.visibilityState === 'visible') void tick();
    };
    void tick();
    document.addEventListener('visibilitychange', onVisible);
    return () => {
      ended = true;
      clearTimeout(timer);
      document.removeEventListener('visibilitychange', onVisible);
    };
  }, [milliseconds]);
}
