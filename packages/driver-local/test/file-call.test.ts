import { execFileSync } from 'node:child_process'
import { closeSync, constants, openSync } from 'node:fs'
import { mkdtemp, open, readdir, readFile, rm, stat } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { bytesBody } from '@varve/core'
import { LocalDriver } from '@varve/driver-local'
import { afterEach, beforeEach, expect, test } from 'vitest'
import { fileCall } from '../src/file-call.ts'
import { temporaryStorage } from './temporary-storage.ts'

let folder: string
let pipe: string
beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), 'varve-pipe-'))
  pipe = join(folder, 'pipe')
  execFileSync('mkfifo', [pipe])
})
let hanging: Promise<unknown>[] = []
afterEach(async () => {
  await letGo()
  await rm(folder, { recursive: true })
})

/** Has so many calls hang in the kernel: a pipe is opened once somebody writes to it. */
function hang(calls: number): void {
  for (let call = 0; call < calls; call++) {
    hanging.push(fileCall(async () => (await open(pipe)).close()))
  }
}

/** Has the calls end that hang. */
async function letGo(): Promise<void> {
  const writer = openSync(pipe, constants.O_RDWR)
  await Promise.all(hanging)
  closeSync(writer)
  hanging = []
}

test('calls that hang leave the process threads for its other files', async () => {
  hang(8)
  for (let round = 0; round < 4; round++) expect((await stat(folder)).isDirectory()).toBe(true)
})

test('a call that waits is made in its turn, or never once it is given up', async () => {
  hang(2)
  const order: string[] = []
  const giveUp = new AbortController()
  const call = (name: string, signal?: AbortSignal) => fileCall(async () => void order.push(name), signal)
  const first = call('first')
  const givenUp = call('given up', giveUp.signal)
  const last = call('last', giveUp.signal)
  giveUp.abort()
  await expect(givenUp).rejects.toMatchObject({ code: 'ABORTED' })
  await expect(last).rejects.toMatchObject({ code: 'ABORTED' })
  await expect(call('too late', giveUp.signal)).rejects.toMatchObject({ code: 'ABORTED' })
  expect(order).toEqual([])
  const second = call('second')
  await letGo()
  await Promise.all([first, second])
  expect(order).toEqual(['first', 'second'])
})

test('a call that fails makes room for the next', async () => {
  const failing = () => fileCall(() => open(join(folder, 'missing')))
  for (let call = 0; call < 3; call++) await expect(failing()).rejects.toMatchObject({ code: 'ENOENT' })
  expect(await fileCall(() => readdir(folder))).toEqual(['pipe'])
})

test.each(['put', 'get', 'read', 'stat', 'delete', 'list', 'check', 'cleanUp'] as const)(
  '%s waits for calls that hang, can be given up, and does nothing afterwards',
  async method => {
    const { path } = await temporaryStorage()
    const driver = new LocalDriver({ path })
    await driver.put('a/object', bytesBody(Buffer.from('former')))
    const giveUp = new AbortController()
    const { signal } = giveUp
    const download = await driver.get('a/object', { signal })
    hang(2)
    const calls = {
      put: () => driver.put('a/object', bytesBody(Buffer.from('new')), { signal }),
      get: () => driver.get('a/object', { signal }),
      read: () => download.toArray(),
      stat: () => driver.stat('a/object', { signal }),
      delete: () => driver.delete('a/object', { signal }),
      list: () => driver.list('', { signal }).next(),
      check: () => driver.check({ signal }),
      cleanUp: () => driver.cleanUp({ olderThan: new Date(), signal }),
    }
    let ended = false
    const call = calls[method]().finally(() => {
      ended = true
    })
    const outcome = expect(call).rejects.toMatchObject({ code: 'ABORTED' })
    await stat(folder) // by a thread that is left
    expect(ended).toBe(false)
    giveUp.abort()
    await outcome
    await letGo()
    download.destroy()
    await driver.stat('a/object') // in its turn after all that still waited
    expect(await readdir(join(path, 'a'))).toEqual(['object'])
    expect(await readFile(join(path, 'a/object'), 'utf8')).toBe('former')
  },
)

test('a deletion that was given up while it waited half-way deletes nothing', async () => {
  const { path } = await temporaryStorage()
  const driver = new LocalDriver({ path })
  await driver.put('a/object', bytesBody(Buffer.from('x')))
  const giveUp = new AbortController()
  const deletion = driver.delete('a/object', { signal: giveUp.signal })
  hang(2) // once the folder of the storage is open
  await stat(folder)
  giveUp.abort()
  await expect(deletion).rejects.toMatchObject({ code: 'ABORTED' })
  await letGo()
  expect(await driver.stat('a/object')).toMatchObject({ size: 1 })
})
