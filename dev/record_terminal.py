#!/usr/bin/env python3
"""Record commands in a terminal and draw the recording as an animated SVG.

    dev/record_terminal.py record SESSION.cast --cwd FOLDER -- 'metal-candle train' 'metal-candle runs'
    dev/record_terminal.py draw SESSION.cast docs/images/train.svg

`record` runs the commands one after the other in a pseudo-terminal and writes their output, with times, as an
asciicast (version 2). `draw` replays the recording on a small terminal and writes its distinct screens as one SVG. Pauses
are shortened, so the picture runs faster than the commands did. The last screen stays. Only the standard library is used.
"""

import argparse
import codecs
import fcntl
import html
import json
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time

PROMPT = "\x1b[32m$\x1b[0m "
LONGEST_PAUSE = 0.9  # seconds of the picture between two screens
SPEED = 12.0  # how much faster than the commands the picture runs
LAST_SCREEN = 8.0  # seconds for which the last screen stays before the picture starts again
COLOURS = {30: "#6b7280", 31: "#f87171", 32: "#86d993", 33: "#e5c07b", 34: "#7aa2f7", 35: "#c099ff", 36: "#7dcfff", 37: "#d4d7dd"}
CHARACTER, LINE, MARGIN = 7.83, 18, 16


def record(path, commands, columns, rows, folder):
    """Runs `commands` and writes their output to `path`."""
    started = time.monotonic()
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": str(columns), "LINES": str(rows)}
    with open(path, "w", encoding="utf-8") as file:
        file.write(json.dumps({"version": 2, "width": columns, "height": rows}) + "\n")

        def write(text):
            file.write(json.dumps([round(time.monotonic() - started, 3), "o", text]) + "\n")

        for command in commands:
            write(PROMPT)
            for character in command:
                write(character.replace("\n", "\r\n"))
            write("\r\n")
            master, slave = pty.openpty()
            fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
            process = subprocess.Popen(
                ["bash", "-c", command], cwd=folder, env=environment, stdin=slave, stdout=slave, stderr=slave, close_fds=True
            )
            os.close(slave)
            decoder = codecs.getincrementaldecoder("utf-8")("replace")
            while True:
                ready, _, _ = select.select([master], [], [], 0.2)
                if ready:
                    try:
                        found = os.read(master, 65536)
                    except OSError:  # Linux reports the closed end as an error
                        break
                    if not found:
                        break
                    write(decoder.decode(found))
                elif process.poll() is not None:
                    break
            os.close(master)
            if process.wait() != 0:
                raise SystemExit(f"`{command}` ended with {process.returncode}")


class Screen:
    """A terminal of `columns` x `rows` that supports the program's output: SGR, cursor moves, erasing."""

    def __init__(self, columns, rows):
        self.columns, self.rows = columns, rows
        self.cells = [[(" ", None)] * columns for _ in range(rows)]
        self.row = self.column = 0
        self.style = None

    def feed(self, text):
        for match in re.finditer(r"\x1b\[([?\d;]*)([A-Za-z])|\x1b[()=>][A-Z0-9]?|(.)", text, re.DOTALL):
            if match[3] is not None:
                self.put(match[3])
            elif match[2]:
                self.control([int(number) for number in re.findall(r"\d+", match[1])], match[2])

    def put(self, character):
        if character == "\r":
            self.column = 0
        elif character == "\n":
            self.new_line()
        elif character >= " ":
            if self.column >= self.columns:
                self.column = 0
                self.new_line()
            self.cells[self.row][self.column] = (character, self.style)
            self.column += 1

    def new_line(self):
        self.row += 1
        if self.row == self.rows:
            self.cells = self.cells[1:] + [[(" ", None)] * self.columns]
            self.row -= 1

    def control(self, numbers, letter):
        first = numbers[0] if numbers else None
        if letter == "m":
            self.colour(numbers or [0])
        elif letter == "A":
            self.row = max(0, self.row - (first or 1))
        elif letter == "B":
            self.row = min(self.rows - 1, self.row + (first or 1))
        elif letter == "C":
            self.column = min(self.columns - 1, self.column + (first or 1))
        elif letter == "D":
            self.column = max(0, self.column - (first or 1))
        elif letter == "G":
            self.column = (first or 1) - 1
        elif letter == "K":
            start, end = (0, self.columns) if first == 2 else (0, self.column) if first == 1 else (self.column, self.columns)
            self.cells[self.row][start:end] = [(" ", None)] * (end - start)
        elif letter == "J":
            self.control([], "K")
            for row in range(self.row + 1, self.rows):
                self.cells[row] = [(" ", None)] * self.columns

    def colour(self, numbers):
        for number in numbers:
            if number == 0 or number == 39:
                self.style = None
            elif number == 1:
                self.style = self.style or "bold"
            elif number == 2:
                self.style = COLOURS[30]
            elif number in COLOURS:
                self.style = COLOURS[number]
            elif number - 60 in COLOURS:
                self.style = COLOURS[number - 60]

    def lines(self):
        """The rows as tuples of (text, style)."""
        result = []
        for cells in self.cells:
            spans = []
            for character, style in cells:
                if spans and spans[-1][1] == style:
                    spans[-1][0] += character
                else:
                    spans.append([character, style])
            if spans and spans[-1][1] is None:
                spans[-1][0] = spans[-1][0].rstrip()
            result.append(tuple((text, style) for text, style in spans if text))
        return tuple(result)


def screens(path):
    """The distinct screens of a recording, and the second of the picture at which each appears."""
    with open(path, encoding="utf-8") as file:
        header = json.loads(file.readline())
        events = [json.loads(line) for line in file]
    screen = Screen(header["width"], header["height"])
    found, now, before = [], 0.0, 0.0
    pending = 0.0
    for moment, _, text in events:
        pending += min((moment - before) / SPEED, LONGEST_PAUSE)
        before = moment
        screen.feed(text)
        lines = screen.lines()
        if found and (lines == found[-1][1] or pending < 0.04):
            if lines != found[-1][1]:
                found[-1] = (found[-1][0], lines)
            continue
        now += max(pending, 0.04)
        pending = 0.0
        found.append((now, lines))
    return header, found, now


def draw(path, output):
    """Writes the recording `path` as an SVG."""
    header, found, end = screens(path)
    total = end + LAST_SCREEN
    width = round(2 * MARGIN + header["width"] * CHARACTER)
    height = 2 * MARGIN + header["height"] * LINE
    ids, rows, groups, keyframes = {}, [], [], []
    for number, (start, lines) in enumerate(found):
        until = found[number + 1][0] if number + 1 < len(found) else total
        uses = []
        for row, spans in enumerate(lines):
            if not spans:
                continue
            if spans not in ids:
                ids[spans] = f"r{len(ids)}"
                rows.append(f'<g id="{ids[spans]}">{text_of(spans)}</g>')
            uses.append(f'<use href="#{ids[spans]}" y="{row * LINE}"/>')
        last = number + 1 == len(found)
        groups.append(f'<g class="f{" last" if last else ""}" style="animation-name:k{number}">{"".join(uses)}</g>')
        first, then = 100 * start / total, 100 * until / total
        shown = f"0%,{first:.3f}%{{visibility:hidden}}{first + 0.001:.3f}%,{then:.3f}%{{visibility:visible}}"
        keyframes.append(f"@keyframes k{number}{{{shown}" + ("" if last else f"{then + 0.001:.3f}%,100%{{visibility:hidden}}") + "}")
    style = (
        f".f{{visibility:hidden;animation-duration:{total:.2f}s;animation-iteration-count:infinite;"
        "animation-timing-function:step-end}.last{visibility:visible}"
        "@media (prefers-reduced-motion:reduce){.f{animation:none!important}}"
        "text{font:13px ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',monospace;fill:#d4d7dd;white-space:pre}"
    )
    with open(output, "w", encoding="utf-8") as file:
        file.write(
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">\n'
            f"<style>{style}{''.join(keyframes)}</style>\n<defs>\n" + "\n".join(rows) + "\n</defs>\n"
            f'<rect width="100%" height="100%" rx="8" fill="#16181d"/>\n<g transform="translate({MARGIN},{MARGIN + 13})">\n'
            + "\n".join(groups) + "\n</g>\n</svg>\n"
        )


def text_of(spans):
    """One row as SVG text: a span for each style, each at its column."""
    result, column = [], 0
    for text, style in spans:
        visible = text.strip(" ")
        if visible:
            x = (column + len(text) - len(text.lstrip(" "))) * CHARACTER
            length = len(visible) * CHARACTER
            paint = "" if style is None else ' font-weight="bold"' if style == "bold" else f' style="fill:{style}"'
            result.append(
                f'<text x="{x:.1f}" textLength="{length:.1f}" lengthAdjust="spacingAndGlyphs"{paint}>{html.escape(visible)}</text>'
            )
        column += len(text)
    return "".join(result)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    recorder = commands.add_parser("record")
    recorder.add_argument("recording")
    recorder.add_argument("--cwd", default=".")
    recorder.add_argument("--columns", type=int, default=110)
    recorder.add_argument("--rows", type=int, default=36)
    recorder.add_argument("commands", nargs="+")
    drawer = commands.add_parser("draw")
    drawer.add_argument("recording")
    drawer.add_argument("picture")
    arguments = parser.parse_args()
    if arguments.command == "record":
        record(arguments.recording, arguments.commands, arguments.columns, arguments.rows, arguments.cwd)
    else:
        draw(arguments.recording, arguments.picture)


if __name__ == "__main__":
    main()
