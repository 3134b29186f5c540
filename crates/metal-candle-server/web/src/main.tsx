// Renders the app.
import { render } from 'preact';
import { App } from './app';
import { applyTheme, readTheme } from './base/browser';
import './style/base.css';
import './style/chat.css';
import './style/pages.css';

applyTheme(readTheme());
render(<App />, document.getElementById('app')!);
