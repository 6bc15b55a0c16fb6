import { type ChildProcess, type ChildProcessByStdio, spawn } from 'node:child_process'
import { once } from 'node:events'
import { readFileSync, watch } from 'node:fs'
import { copyFile, mkdir, mkdtemp, readdir, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { Readable } from 'node:stream'
import { compareImages, createQcow2, qemuIo } from '@varve/testkit/lab'
import { execa } from 'execa'
import { afterAll, afterEach, beforeAll, beforeEach, expect, test } from 'vitest'
import { type Bundle, bundle } from '../../core/test/bundle.ts'
import { type CliResult, cli } from './test-terminal.ts'

let program: Bundle
beforeAll(async () => {
  program = await bundle(new URL('../src/main.ts', import.meta.url))
})
afterAll(() => program[Symbol.asyncDispose]())

let folder: string
let disk: string
beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), 'varve-interrupt-'))
  disk = join(folder, 'disk.qcow2')
  const nas = join(folder, 'nas')
  await mkdir(nas)
  const slow = { command: join(folder, 'slow-rclone'), remotes: { nas: { type: 'alias', remote: nas } } }
  const config = {
    storages: { nas: { type: 'local', path: nas }, slow: { type: 'rclone', remoteName: 'nas', ...slow } },
    stateDir: join(folder, 'state'),
  }
  await writeFile(slow.command, '#!/bin/sh\nexec rclone --bwlimit 2M "$@"\n', { mode: 0o755 })
  await writeFile(join(folder, 'varve.config.json'), JSON.stringify(config))
  await createQcow2(disk, 64 * 1024 * 1024)
  await qemuIo(disk, 'qcow2', ['write -P 0x11 0 32M'])
})
afterEach(() => rm(folder, { recursive: true }))

const run = (...args: string[]): Promise<CliResult> => cli(args, { cwd: folder })

async function bitmaps(): Promise<unknown> {
  const { stdout } = await execa('qemu-img', ['info', '--output=json', disk])
  return JSON.parse(stdout)['format-specific'].data.bitmaps
}

/** Starts `varve` as a process of its own, in a process group of its own, as a terminal does. */
function startVarve(...args: string[]): ChildProcessByStdio<null, Readable, Readable> {
  const config = ['--config', join(folder, 'varve.config.json')]
  return spawn(process.execPath, [program.path, ...args, ...config], {
    detached: true,
    stdio: ['ignore', 'pipe', 'pipe'],
  })
}

/** Sends a signal to the whole process group. */
function send({ pid }: ChildProcess, signal: NodeJS.Signals): void {
  if (pid !== undefined) process.kill(-pid, signal)
}

/**
 * A throttled backup that is sent a signal once its upload has begun: `once`, `again and again` to its end, or once
 * and `unread`, after the terminal has gone.
 */
async function interruptedBackup(
  signal: NodeJS.Signals,
  how: 'once' | 'again and again' | 'unread',
): Promise<{ code: unknown; stderr: string }> {
  const child = startVarve(
    'backup',
    'web-1',
    '--disk',
    `vda=${disk}`,
    '--storage',
    'nas',
    '--bandwidth',
    '1M',
    '--verbose',
  )
  let stderr = ''
  let again: NodeJS.Timeout | undefined
  child.stderr.setEncoding('utf8').on('data', (chunk: string) => {
    const before = stderr
    stderr += chunk
    const shown = (text: string) => !before.includes(text) && stderr.includes(text)
    if (shown('Uploading vda')) {
      if (how === 'unread') for (const stream of [child.stdout, child.stderr]) stream.destroy()
      send(child, signal)
    }
    if (how !== 'again and again' || !shown('Stopping and cleaning up')) return
    send(child, signal) // at once: the clean-up may be over in a moment
    again = setInterval(() => send(child, signal), 250) // a new program gets one too until it has a session of its own
  })
  const [code] = await once(child, 'exit')
  clearInterval(again)
  return { code, stderr }
}

async function expectSettled(): Promise<void> {
  expect(await readdir(join(folder, 'state', 'runs'))).toEqual([])
  expect((await execa('pgrep', ['-f', `qemu-nbd.*${folder}`], { reject: false })).stdout).toBe('')
}

test.each([
  ['SIGINT', 'again and again', 'Ctrl-C'],
  ['SIGTERM', 'once', 'SIGTERM'],
  ['SIGHUP', 'unread', 'SIGHUP'],
] as const)(
  '%s, sent %s during a backup, waits for the clean-up, which leaves nothing',
  async (signal, how, named) => {
    const before = await bitmaps()
    const { code, stderr } = await interruptedBackup(signal, how)
    expect(code, stderr).toBe(1)
    if (how !== 'unread') expect(stderr).toContain(`Error: Stopped by ${named}.\n  code: ABORTED`)
    if (how === 'again and again') expect(stderr).toContain('Still cleaning up')
    expect(await readdir(join(folder, 'nas'))).toEqual([])
    expect(await bitmaps()).toEqual(before)
    await expectSettled()
  },
)

/** A restore from the slow storage that gets a Ctrl-C once its journal has recorded a step. */
async function interruptedRestore(
  step: string,
  ...args: string[]
): Promise<{ code: unknown; stderr: string }> {
  const child = startVarve('restore', ...args, '--storage', 'slow')
  const runs = join(folder, 'state', 'runs')
  const isRecorded = (name: string) => readFileSync(join(runs, name), 'utf8').includes(`"${step}"`)
  const watcher = watch(runs, (event, name) => {
    if (event !== 'change' || !name || !isRecorded(name)) return
    watcher.close()
    send(child, 'SIGINT')
  })
  let stderr = ''
  child.stderr.setEncoding('utf8').on('data', (chunk: string) => {
    stderr += chunk
  })
  const [code] = await once(child, 'close')
  return { code, stderr }
}

test('Ctrl-C during a restore leaves no file, and one in place is told to be incomplete', async () => {
  const taken = await run('backup', 'web-1', '--disk', `vda=${disk}`, '--storage', 'nas', '--json')
  expect(taken.code, taken.stderr).toBe(0)
  const { id } = JSON.parse(taken.stdout)
  await copyFile(disk, join(folder, 'wanted'))
  await qemuIo(disk, 'qcow2', ['write -P 0x22 0 32M'])
  const files = await readdir(folder)

  const toFile = await interruptedRestore(
    'target-create',
    id,
    '--to-disk',
    `vda=${join(folder, 'new.qcow2')}`,
  )
  expect(toFile.code, toFile.stderr).toBe(1)
  expect(toFile.stderr).toMatch(/^Error: Stopped by Ctrl-C\.\n {2}code: ABORTED\n$/m)
  expect(await readdir(folder)).toEqual(files)
  await expectSettled()

  const inPlace = await interruptedRestore('write-in-place', id, '--to-disk', `vda=${disk}`, '--in-place')
  expect(inPlace.code, inPlace.stderr).toBe(1)
  expect(inPlace.stderr).toMatch(
    /^Error: Stopped by Ctrl-C\. .* vda holds neither .* Restore again .*\n {2}code: ABORTED\n$/m,
  )
  expect(await readdir(folder)).toEqual(files)
  expect(await readdir(join(folder, 'state', 'runs')), 'the disk stays on record').toHaveLength(1)

  const again = await run('restore', id, '--to-disk', `vda=${disk}`, '--in-place', '--storage', 'nas')
  expect(again.code, again.stderr).toBe(0)
  await expectSettled()
  const image = (name: string) => ({ path: join(folder, name), format: 'qcow2' }) as const
  expect(await compareImages(image('disk.qcow2'), image('wanted'))).toMatchObject({ identical: true })
})
