import { Readable } from 'node:stream'
import { beforeEach, expect, test } from 'vitest'
import { findBackup, listBackups } from '../src/backups.ts'
import { ChainManager } from '../src/chain-manager.ts'
import type { CommandEvent, VarveEvent } from '../src/events.ts'
import { emit } from '../src/run-options.ts'
import { bytesBody, type CallOptions, type StorageDriver } from '../src/storage.ts'
import { tellCommands } from '../src/tell-commands.ts'
import { dayId, storeFakeChain } from './fake-backup.ts'
import { noRejectionUnhandled } from './no-rejection-unhandled.ts'
import { WatchedStorage } from './watched-storage.ts'

/** A driver each of whose calls runs a program, as far as it tells, of the call's name. */
function programDriver(storage: StorageDriver, given: unknown[] = []): StorageDriver {
  const tell = (name: string, options: CallOptions = {}) => {
    given.push(options)
    options.onCommand?.(commandEvent(name))
  }
  return {
    type: storage.type,
    location: storage.location,
    capabilities: storage.capabilities,
    async put(key, body, options) {
      tell('put', options)
      return storage.put(key, body, options)
    },
    async get(key, options) {
      tell('get', options)
      return storage.get(key, options)
    },
    async stat(key, options) {
      tell('stat', options)
      return storage.stat(key, options)
    },
    async *list(prefix, options) {
      tell('list', options)
      yield* storage.list(prefix, options)
    },
    async delete(key, options) {
      tell('delete', options)
      return storage.delete(key, options)
    },
    async check(options) {
      tell('check', options)
      return storage.check(options)
    },
    async cleanUp(options) {
      tell('cleanUp', options)
      return 0
    },
    [Symbol.asyncDispose]: () => storage[Symbol.asyncDispose](),
  }
}

function commandEvent(command: string): CommandEvent {
  return { type: 'command', command, args: [], exitCode: 0, stdout: '', stderr: '', durationMs: 1 }
}

let storage: WatchedStorage
let told: string[]
const onCommand = (event: VarveEvent) => void (event.type === 'command' && told.push(event.command))

beforeEach(() => {
  storage = new WatchedStorage()
  told = []
})

test('each call tells of its programs, keeps its own options, and outlives a listener that throws', async () => {
  const given: unknown[] = []
  const { signal } = new AbortController()
  const olderThan = new Date(0)
  const driver = tellCommands(programDriver(storage, given), event => {
    onCommand(event)
    throw new Error('a view that is broken')
  })
  await driver.put('a', bytesBody(Buffer.from('x')), { signal })
  const stream = await driver.get('a', { range: { start: 0, end: 1 }, signal })
  expect(await stream.toArray()).toEqual([Buffer.from('x')])
  expect(await driver.stat('a', { signal })).toMatchObject({ size: 1 })
  expect(await Readable.from(driver.list('', { signal })).toArray()).toHaveLength(1)
  await driver.delete('a', { signal })
  await driver.check({ signal })
  await driver.cleanUp?.({ olderThan, signal })
  expect(told).toEqual(['put', 'get', 'stat', 'list', 'delete', 'check', 'cleanUp'])
  const all = { signal, onCommand: expect.any(Function) }
  const range = { start: 0, end: 1 }
  expect(given).toEqual([all, { ...all, range }, all, all, all, all, { ...all, olderThan }])
})

test('a listener that rejects ends nothing', async () => {
  await using _ = await noRejectionUnhandled()
  const rejects = async (event: VarveEvent) => {
    onCommand(event)
    throw new Error('the database is away')
  }
  const driver = tellCommands(programDriver(storage), rejects)
  await driver.put('a', bytesBody(Buffer.from('x')))
  emit({ onEvent: rejects }, commandEvent('virsh'))
  expect(told).toEqual(['put', 'virsh'])
})

test('a driver without cleanUp stays one, and without a listener it is itself', () => {
  const { cleanUp: _, ...without } = programDriver(storage)
  expect(tellCommands(without, onCommand).cleanUp).toBeUndefined()
  expect(tellCommands(without, undefined)).toBe(without)
})

test('all that looks at backups tells of the programs of its storage', async () => {
  await storeFakeChain(storage, [1, 2])
  const driver = programDriver(storage)
  const chains = new ChainManager({ storage: driver })
  const id = dayId(2)
  const toldBy = async (call: () => Promise<unknown>) => {
    told = []
    storage.calls.length = 0
    await call()
    const calls = storage.calls.map(call => call.split(' ')[0])
    expect(calls.length).toBeGreaterThan(0)
    expect(told.filter(name => name !== 'cleanUp')).toEqual(calls)
  }
  await toldBy(() => findBackup(driver, id, { onCommand }))
  await toldBy(() => listBackups(driver, { onCommand }))
  await toldBy(() => chains.list({ onCommand }))
  await toldBy(() => chains.resolve(id, { onCommand }))
  await toldBy(() => chains.nextKind('web-1', {}, { onCommand }))
  await toldBy(() => chains.verify(id, { deep: true, onCommand }))
  await toldBy(() => chains.delete(id, { onEvent: onCommand }))
  await toldBy(() => chains.prune({ keepLast: 1 }, { onEvent: onCommand }))
  expect(told).toContain('cleanUp')
})
