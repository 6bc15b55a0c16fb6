import { PassThrough } from 'node:stream'
import type { ProgressEvent, VarveEvent } from '@varve/core'
import { expect, test } from 'vitest'
import { eventText } from '../src/event-text.ts'
import { formatBar } from '../src/progress-bars.ts'
import { ProgressLines } from '../src/progress-lines.ts'
import { ProgressView } from '../src/progress-view.ts'

const GiB = 1024 ** 3

function progress(disk: string, bytesDone: number, more: Partial<ProgressEvent> = {}): ProgressEvent {
  const bytesTotal = 3 * GiB
  const percent = (bytesDone / bytesTotal) * 100
  return { type: 'progress', disk, bytesDone, bytesTotal, percent, bytesPerSecond: 350 * 1024 ** 2, ...more }
}

/** Lines without their time of day. */
function linesOf(output: PassThrough): string[] {
  const text = String(output.read() ?? '')
  expect(text).toMatch(/^(\d\d:\d\d:\d\d .*\n)*$/)
  return text
    .split('\n')
    .slice(0, -1)
    .map(line => line.slice(9))
}

test('without a terminal there is a line for each disk every ten seconds and one at its end', () => {
  const output = new PassThrough()
  let now = Date.now()
  const lines = new ProgressLines(output, () => now)
  for (let seconds = 0; seconds <= 25; seconds += 0.25) {
    lines.progress(progress('vda', seconds * 0.1 * GiB, { secondsLeft: 30 - seconds }))
    lines.progress(progress('vdb', seconds * 0.12 * GiB))
    now += 250
  }
  lines.progress(progress('vda', 3 * GiB))
  lines.progress(progress('vda', 3 * GiB))
  expect(linesOf(output)).toEqual([
    'vda: 33 % of 3.0 GiB, 350 MiB/s, 20 s left',
    'vdb: 40 % of 3.0 GiB, 350 MiB/s',
    'vda: 66 % of 3.0 GiB, 350 MiB/s, 10 s left',
    'vdb: 80 % of 3.0 GiB, 350 MiB/s',
    'vdb: 100 % of 3.0 GiB',
    'vda: 100 % of 3.0 GiB',
  ])
})

test('stages, fallbacks and warnings are lines, and external commands only with --verbose', () => {
  const command: VarveEvent = {
    type: 'command',
    command: 'qemu-img',
    args: ['info', 'my disk'],
    exitCode: 1,
    stdout: '',
    stderr: 'no such file\ngiving up\n',
    durationMs: 12,
  }
  const events: VarveEvent[] = [
    { type: 'stage', stage: 'upload', message: 'Uploading vda (full)' },
    { type: 'fallback', disk: 'vda', reason: 'bitmap-missing', message: 'Bitmap not found, falling back.' },
    { type: 'warning', message: 'Look at this.' },
    command,
  ]
  const show = (verbose: boolean) => {
    const output = new PassThrough()
    const view = new ProgressView(output, { verbose })
    for (const event of events) view.update(event)
    view.close()
    return String(output.read()).replaceAll(/^\d\d:\d\d:\d\d /gm, '')
  }
  const told = 'Uploading vda (full)\nBitmap not found, falling back.\nWarning: Look at this.\n'
  expect(show(false)).toBe(told)
  expect(show(true)).toBe(
    `${told}$ qemu-img info 'my disk'  # exit 1, 12 ms\n    no such file\n    giving up\n`,
  )
})

test('a command that did not end by itself says so', () => {
  const event = {
    type: 'command',
    command: 'virsh',
    args: [],
    stdout: '',
    stderr: '',
    durationMs: 3,
  } as const
  expect(eventText({ ...event, exitCode: undefined }, { verbose: true })).toContain('ended by a signal')
})

test('a bar has percent, bytes, rate and time left, and fits 80 columns', () => {
  const options = {}
  const half = progress('vda', 1.5 * GiB, { secondsLeft: 240 })
  const text = formatBar(options, { progress: 0.5, maxWidth: 80 }, { event: half, seconds: 4 })
  expect(text).toBe('vda  ██████████░░░░░░░░░░  50 %  1.5 GiB of 3.0 GiB  350 MiB/s  4 min left')
  expect(text.length).toBeLessThanOrEqual(80)
  const begun = progress('vda', 0, { bytesPerSecond: 0 })
  expect(formatBar(options, { progress: 0, maxWidth: 80 }, { event: begun, seconds: 0 })).toBe(
    'vda  ░░░░░░░░░░░░░░░░░░░░   0 %  0 B of 3.0 GiB',
  )
  const done = progress('vda', 3 * GiB)
  expect(formatBar(options, { progress: 1, maxWidth: 200 }, { event: done, seconds: 12 })).toBe(
    `vda  ${'█'.repeat(40)} 100 %  3.0 GiB in 12 s, 256 MiB/s`,
  )
})

test('on a terminal every line is shown and every disk has a bar, and the cursor comes back', () => {
  const output = Object.assign(new PassThrough(), { isTTY: true, columns: 100 })
  const view = new ProgressView(output, { verbose: false })
  view.update({ type: 'stage', stage: 'plan', message: 'Looking at web-1' })
  view.update(progress('vda', 0))
  view.update({ type: 'warning', message: 'In between.' })
  view.update(progress('vdb', 1.5 * GiB))
  view.update(progress('vda', 3 * GiB))
  view.update(progress('vdb', 3 * GiB))
  view.update({ type: 'stage', stage: 'publish', message: 'Writing the manifest' })
  view.close()
  const text = String(output.read())
  expect(text.startsWith('Looking at web-1\n')).toBe(true)
  expect(text).toContain('Warning: In between.\n')
  expect(text).toMatch(/vda {2}█+ 100 %[^\n]*\n[^\n]*vdb {2}█+ 100 %[^\n]*\nWriting the manifest\n$/)
  const [hide, show] = ['\u001b[?25l', '\u001b[?25h']
  expect(text.split(hide).length).toBe(2)
  expect(text.split(show).length).toBe(2)
  expect(text.indexOf(show)).toBeGreaterThan(text.lastIndexOf(hide))
})
