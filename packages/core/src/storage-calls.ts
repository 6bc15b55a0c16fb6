import { abortError, isVarveError } from './errors.ts'
import { unlessAborted } from './giving-up.ts'
import type { CallOptions, StorageDriver, StoredObject } from './storage.ts'

/**
 * A storage whose calls end as soon as their signal is aborted, and not when the storage lets them: a guest that writes to an
 * overlay cannot wait for that. What the storage still does then has to be waited for before its objects are looked at.
 */
export class StorageCalls {
  readonly storage: StorageDriver
  readonly #under = new Set<Promise<void>>()
  #unanswered = false

  constructor(storage: StorageDriver) {
    this.storage = {
      type: storage.type,
      location: storage.location,
      capabilities: storage.capabilities,
      ...(storage.notice !== undefined && { notice: storage.notice }),
      put: (key, body, options) => this.#call(() => storage.put(key, body, options), options),
      get: (key, options) => this.#call(() => storage.get(key, options), options),
      stat: (key, options) => this.#call(() => storage.stat(key, options), options),
      list: (prefix, options) => this.#list(storage.list(prefix, options), options),
      delete: (key, options) => this.#call(() => storage.delete(key, options), options),
      check: options => this.#call(() => storage.check(options), options),
      [Symbol.asyncDispose]: () => storage[Symbol.asyncDispose](),
    }
  }

  /** Waits for what the storage still does. False where it did not answer when it was told to end that. */
  async ended(): Promise<boolean> {
    await Promise.all(this.#under)
    return !this.#unanswered
  }

  async #call<T>(begin: () => Promise<T>, { signal }: CallOptions = {}): Promise<T> {
    if (signal?.aborted) throw abortError(signal)
    const call = begin()
    const ended = call
      .then(
        () => undefined,
        error => {
          this.#unanswered ||= isVarveError(error, 'ABORTED') && error.context.unanswered === true
        },
      )
      .then(() => void this.#under.delete(ended))
    this.#under.add(ended)
    return unlessAborted(call, signal)
  }

  async *#list(objects: AsyncIterable<StoredObject>, options?: CallOptions): AsyncGenerator<StoredObject> {
    const iterator = objects[Symbol.asyncIterator]()
    try {
      for (;;) {
        const next = await this.#call(() => iterator.next(), options)
        if (next.done) return
        yield next.value
      }
    } finally {
      iterator.return?.().catch(() => undefined) // not waited for: it waits for the call that was given up
    }
  }
}
