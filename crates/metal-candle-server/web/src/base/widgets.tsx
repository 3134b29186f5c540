// Small components that several tabs use.
import type { ComponentChildren } from 'preact';
import { useEffect, useRef, useState } from 'preact/hooks';

/** A button that must be pressed twice. */
export function ConfirmButton(props: { label: string; confirm: string; onConfirm: () => void; class?: string; title?: string; disabled?: boolean }) {
  const [armed, setArmed] = useState(false);
  useEffect(() => {
    if (!armed) return;
    const timer = setTimeout(() => setArmed(false), 4000);
    return () => clearTimeout(timer);
  }, [armed]);
  return (
    <button
      type="button"
      class={`${props.class ?? 'quiet'}${armed ? ' danger' : ''}`}
      title={props.title}
      disabled={props.disabled}
      onBlur={() => setArmed(false)}
      onClick={() => {
        if (armed) props.onConfirm();
        setArmed(!armed);
      }}
    >
      {armed ? props.confirm : props.label}
    </button>
  );
}

/** A button with a menu of actions. Escape, an action, or losing focus closes it. */
export function Menu({ label, children }: { label: string; children: ComponentChildren }) {
  const element = useRef<HTMLDetailsElement>(null);
  const close = () => {
    if (element.current) element.current.open = false;
  };
  return (
    <details
      ref={element}
      class="menu"
      onKeyDown={(event) => {
        if (event.key !== 'Escape' || !element.current?.open) return;
        event.stopPropagation();
        close();
        element.current.querySelector('summary')?.focus();
      }}
      onFocusOut={(event) => {
        if (!element.current?.contains(event.relatedTarget as Node | null)) close();
      }}
    >
      <summary aria-label={label} title={label} class="button quiet">
        <Icon name="more" />
      </summary>
      <div class="menu-items">{children}</div>
    </details>
  );
}

/** Text with names in backticks, which are shown as code. */
export function Names({ text }: { text: string }) {
  return <>{text.split('`').map((part, index, parts) => (index % 2 === 1 && index < parts.length - 1 ? <code>{part}</code> : part))}</>;
}

export function Notice({ kind, text }: { kind: 'info' | 'warn' | 'bad'; text: string }) {
  return (
    <p class={`notice ${kind}`} role={kind === 'bad' ? 'alert' : 'status'}>
      <Names text={text} />
    </p>
  );
}

const ICONS = {
  more: 'M3 8h.01M8 8h.01M13 8h.01',
  menu: 'M2 4h12M2 8h12M2 12h12',
  plus: 'M8 3v10M3 8h10',
  close: 'M4 4l8 8M12 4l-8 8',
  sliders: 'M2 5h7M13 5h1M2 11h1M7 11h7M11 3v4M5 9v4',
  send: 'M8 13V3M3.5 7.5L8 3l4.5 4.5',
  stop: 'M4.5 4.5h7v7h-7z',
  edit: 'M3 13l.8-3.2L10.5 3l2.5 2.5-6.8 6.7z',
  again: 'M13 8a5 5 0 1 1-1.5-3.5M13 2v3h-3',
  left: 'M10 3L5 8l5 5',
  right: 'M6 3l5 5-5 5',
  down: 'M8 3v10M3.5 8.5L8 13l4.5-4.5',
  columns: 'M2.5 3h4.5v10H2.5zM9 3h4.5v10H9z',
  auto: 'M8 2a6 6 0 1 0 0 12zM8 2a6 6 0 0 1 0 12',
  light: 'M8 5a3 3 0 1 0 0 6 3 3 0 0 0 0-6M8 1v1.5M8 13.5V15M1 8h1.5M13.5 8H15M3 3l1 1M12 12l1 1M3 13l1-1M12 4l1-1',
  dark: 'M13.5 9.5A6 6 0 0 1 6.5 2.5a6 6 0 1 0 7 7z',
} as const;

export type IconName = keyof typeof ICONS;

export function Icon({ name }: { name: IconName }) {
  return (
    <svg class={`icon icon-${name}`} viewBox="0 0 16 16" width="16" height="16" aria-hidden="true" focusable="false">
      <path d={ICONS[name]} />
    </svg>
  );
}

/** A button that shows only an icon. */
export function IconButton(props: { icon: IconName; label: string; onClick: () => void; class?: string; disabled?: boolean; pressed?: boolean }) {
  return (
    <button
      type="button"
      class={props.class ?? 'quiet'}
      aria-label={props.label}
      title={props.label}
      aria-pressed={props.pressed}
      disabled={props.disabled}
      onClick={props.onClick}
    >
      <Icon name={props.icon} />
    </button>
  );
}
