import { text } from 'node:stream/consumers'
import { setImmediate as turn } from 'node:timers/promises'
import { expect, test } from 'vitest'
import { VarveError } from '../src/errors.ts'
import { bytesBody, type StoredObject } from '../src/storage.ts'
import { StorageCalls } from '../src/storage-calls.ts'
import { MemoryStorage } from './memory-storage.ts'

/** A storage whose calls wait until they are let go, whatever their signal says. */
class HeldStorage extends MemoryStorage {
  readonly #held: (() => void)[] = []
  /** How many calls it was asked for. */
  get calls(): number {
    return this.#held.length
  }
  #hold(): Promise<void> {
    return new Promise(resolve => void this.#held.push(resolve))
  }
  letGo(): void {
    for (const resolve of this.#held) resolve()
  }
  override async put(...args: Parameters<MemoryStorage['put']>): Promise<StoredObject> {
    await this.#hold()
    return super.put(...args)
  }
  override async stat(...args: Parameters<MemoryStorage['stat']>): Promise<StoredObject | undefined> {
    await this.#hold()
    return super.stat(...args)
  }
  override async *list(...args: Parameters<MemoryStorage['list']>): AsyncGenerator<StoredObject> {
    await this.#hold()
    yield* super.list(...args)
  }
}

const body = bytesBody(Buffer.from('content'))
const keysOf = async (objects: AsyncIterable<StoredObject>): Promise<string[]> => {
  const keys: string[] = []
  for await (const { key } of objects) keys.push(key)
  return keys
}

test.each(['put', 'stat', 'list'] as const)(
  '%s ends when it is given up, and what the storage still does is waited for',
  async method => {
    const held = new HeldStorage()
    const calls = new StorageCalls(held)
    const giveUp = new AbortController()
    const { signal } = giveUp
    const begin = {
      put: () => calls.storage.put('a', body, { signal }),
      stat: () => calls.storage.stat('a', { signal }),
      list: () => keysOf(calls.storage.list('', { signal })),
    }[method]
    const call = begin()
    giveUp.abort()
    await expect(call).rejects.toMatchObject({ code: 'ABORTED' })
    await expect(begin()).rejects.toMatchObject({ code: 'ABORTED' })
    expect(held.calls).toBe(1) // the second was not begun

    let answered: boolean | undefined
    const ended = calls.ended().then(result => {
      answered = result
    })
    await turn()
    expect(answered).toBeUndefined()
    held.letGo()
    await ended
    expect(answered).toBe(true)
    expect([...held.objects.keys()]).toEqual(method === 'put' ? ['a'] : [])
  },
)

test('a storage that does not answer when it is told to end is told from one that fails', async () => {
  const failing = async (error: VarveError) => {
    const storage = Object.assign(new MemoryStorage(), { put: () => Promise.reject(error) })
    const calls = new StorageCalls(storage)
    await expect(calls.storage.put('a', body)).rejects.toBe(error)
    return calls.ended()
  }
  expect(await failing(new VarveError('STORAGE_FAILED', 'It failed.'))).toBe(true)
  expect(await failing(new VarveError('ABORTED', 'It ended.'))).toBe(true)
  expect(await failing(new VarveError('ABORTED', 'It hangs.', { context: { unanswered: true } }))).toBe(false)
})

test('what is not given up comes through as it is', async () => {
  const { storage } = new StorageCalls(new MemoryStorage())
  const { signal } = new AbortController()
  await storage.put('a/b', body, { signal })
  await storage.put('a/c', body, { signal })
  expect(await text(await storage.get('a/b', { range: { start: 3, end: 7 }, signal }))).toBe('tent')
  expect(await storage.stat('a/c', { signal })).toMatchObject({ size: 7 })
  expect(await keysOf(storage.list('a/', { signal }))).toEqual(['a/b', 'a/c'])
  await storage.delete('a/b', { signal })
  expect(await keysOf(storage.list('', { signal }))).toEqual(['a/c'])
})
