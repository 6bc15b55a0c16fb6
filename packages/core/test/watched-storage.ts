import type { Readable } from 'node:stream'
import { VarveError } from '../src/errors.ts'
import {
  assertKey,
  type CallOptions,
  type CleanUpOptions,
  type GetOptions,
  type StoredObject,
  type UploadBody,
} from '../src/storage.ts'
import { MemoryStorage } from './memory-storage.ts'

/** A storage in memory that tells what it was asked for and when objects were written, and fails when told to. */
export class WatchedStorage extends MemoryStorage {
  /** Every call that was made, such as `delete web-1/…/manifest.json`. */
  readonly calls: string[] = []
  /** Called before each call is answered; what it throws is the answer. */
  intercept: ((call: string) => void) | undefined
  /** What {@link WatchedStorage.cleanUp} was asked for. */
  cleanedUp: CleanUpOptions | undefined
  readonly #modified = new Map<string, Date>()

  /** The objects' keys, sorted. */
  get keys(): string[] {
    return [...this.objects.keys()].sort()
  }

  /** Changes an object in place. */
  damage(key: string, change: (bytes: Buffer) => Buffer): void {
    const object = this.objects.get(key)
    if (!object) throw new Error(`no object ${key}`)
    this.objects.set(key, change(Buffer.from(object)))
  }

  /** Removes every object of a prefix. */
  drop(prefix: string): void {
    for (const key of this.keys) if (key.startsWith(prefix)) this.objects.delete(key)
  }

  /** Sets the time that every object of a prefix was written; undefined where the storage does not tell. */
  setModified(prefix: string, modifiedAt: Date | undefined): void {
    for (const key of this.keys) {
      if (!key.startsWith(prefix)) continue
      if (modifiedAt) this.#modified.set(key, modifiedAt)
      else this.#modified.delete(key)
    }
  }

  override async put(key: string, body: UploadBody | Readable): Promise<StoredObject> {
    this.#call('put', key)
    this.#modified.set(key, new Date())
    return super.put(key, body)
  }

  override async get(key: string, options: GetOptions = {}): Promise<Readable> {
    this.#call('get', key, options.signal)
    return super.get(key, options)
  }

  override async stat(key: string, { signal }: CallOptions = {}): Promise<StoredObject | undefined> {
    this.#call('stat', key, signal)
    const object = await super.stat(key)
    return object && this.#dated(object)
  }

  override async *list(prefix: string, { signal }: CallOptions = {}): AsyncGenerator<StoredObject> {
    this.#call('list', prefix, signal, 'prefix')
    const objects: StoredObject[] = []
    for await (const object of super.list(prefix)) objects.push(this.#dated(object))
    // In no particular order, as the contract says: here the newest id comes first.
    yield* objects.sort((a, b) => (a.key < b.key ? 1 : -1))
  }

  override async delete(key: string, { signal }: CallOptions = {}): Promise<void> {
    this.#call('delete', key, signal)
    return super.delete(key)
  }

  async cleanUp(options: CleanUpOptions): Promise<number> {
    this.cleanedUp = options
    return 3
  }

  #call(verb: string, key: string, signal?: AbortSignal, what: 'key' | 'prefix' = 'key'): void {
    assertKey(key, what)
    if (signal?.aborted) throw new VarveError('ABORTED', 'Given up.')
    const call = `${verb} ${key}`
    this.calls.push(call)
    this.intercept?.(call)
  }

  #dated(object: StoredObject): StoredObject {
    const modifiedAt = this.#modified.get(object.key)
    return modifiedAt ? { ...object, modifiedAt } : object
  }
}
