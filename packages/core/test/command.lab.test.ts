import { mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { inspect } from 'node:util'
import { afterEach, beforeEach, expect, test } from 'vitest'
import { runCommand } from '../src/command.ts'
import type { VarveEvent } from '../src/events.ts'

let folder: string
beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), 'varve-command-'))
})
afterEach(() => rm(folder, { recursive: true }))

test('a command has a session of its own, which the Ctrl-C of a terminal does not reach', async () => {
  const { stdout } = await runCommand('sh', ['-c', 'ps -o sid= -p $$; echo $$'])
  const [session, pid] = stdout.trim().split(/\s+/)
  expect(session).toBe(pid)
})

test('a command that a Ctrl-C ended before it began is started again', async () => {
  const marker = join(folder, 'began')
  const script = 'if [ -e "$0" ]; then echo done; else touch "$0"; kill -INT $$; fi'
  expect(await runCommand('sh', ['-c', script, marker])).toMatchObject({ stdout: 'done' })
})

test('a command that a Ctrl-C always ends is an error, and one that was given up is not started again', async () => {
  const killed = () => runCommand('sh', ['-c', 'kill -INT $$'])
  await expect(killed()).rejects.toMatchObject({ code: 'COMMAND_FAILED' })
  const given = new AbortController()
  const aborted = runCommand('sh', ['-c', 'kill -INT $$'], { signal: given.signal })
  given.abort(new Error('enough'))
  await expect(aborted).rejects.toMatchObject({ code: 'ABORTED' })
})

test('an error of a command says what to do', async () => {
  await expect(runCommand('sh', ['-c', 'echo no room >&2; exit 3'])).rejects.toMatchObject({
    code: 'COMMAND_FAILED',
    message: 'sh -c failed (exit 3): no room; put that right and try again',
  })
  await expect(runCommand('sleep', ['60'], { timeoutMs: 100 })).rejects.toMatchObject({
    code: 'COMMAND_TIMEOUT',
    message: expect.stringMatching(/^sleep 60 did not end within 0.1 s.*file system.*try again/),
  })
})

test('a program that is not installed is told of with the package that has it', async () => {
  for (const program of ['qemu-img', 'qemu-io', 'qemu-nbd'])
    await expect(runCommand(program, [], { env: { PATH: folder } })).rejects.toMatchObject({
      code: 'COMMAND_MISSING',
      message: `The program ${program} is not installed. Install it (Debian package qemu-utils) and try again.`,
    })
})

test('the key in the name of a backing file on Ceph is in no event and in no error', async () => {
  const path = join(folder, 'image')
  const secret = 'AQAfake/key+of+Ceph=='
  const name = `rbd:vms/template:id=admin:key=${secret}:mon_host=127.0.0.1\\:1`
  await runCommand('qemu-img', ['create', '-f', 'qcow2', '-u', '-F', 'raw', '-b', name, path, '1M'])
  const events: VarveEvent[] = []
  const run = { onEvent: (event: VarveEvent) => events.push(event) }
  const { stdout } = await runCommand('qemu-img', ['info', '--output=json', path], run)
  expect(stdout).toContain(secret)
  expect(events).toMatchObject([{ stdout: expect.stringContaining('key=…') }])
  expect(JSON.stringify(events)).not.toContain(secret)
  const said = join(folder, 'said')
  await writeFile(said, `cannot open ${name}\n`)
  const failing = runCommand('sh', ['-c', 'cat "$0" >&2; exit 1', said], run)
  const error = await failing.catch(error => error)
  expect(error).toMatchObject({ code: 'COMMAND_FAILED', message: expect.stringContaining('key=…') })
  expect(JSON.stringify(events) + inspect(error, { depth: 9 })).not.toContain(secret)
})
