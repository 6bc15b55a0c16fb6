import type { CommandEvent } from './events.ts'
import type { CallOptions, StorageDriver } from './storage.ts'
import { tell } from './tell.ts'

/** A storage each of whose calls tells a listener of the programs that it runs. What the listener throws, or rejects with, is ignored. */
export function tellCommands(storage: StorageDriver, listener: CallOptions['onCommand']): StorageDriver {
  if (!listener) return storage
  const cleanUp = storage.cleanUp?.bind(storage)
  const onCommand = (event: CommandEvent) => tell(listener, event)
  return {
    type: storage.type,
    location: storage.location,
    capabilities: storage.capabilities,
    ...(storage.notice !== undefined && { notice: storage.notice }),
    put: (key, body, options) => storage.put(key, body, { ...options, onCommand }),
    get: (key, options) => storage.get(key, { ...options, onCommand }),
    stat: (key, options) => storage.stat(key, { ...options, onCommand }),
    list: (prefix, options) => storage.list(prefix, { ...options, onCommand }),
    delete: (key, options) => storage.delete(key, { ...options, onCommand }),
    check: options => storage.check({ ...options, onCommand }),
    ...(cleanUp && { cleanUp: options => cleanUp({ ...options, onCommand }) }),
    [Symbol.asyncDispose]: () => storage[Symbol.asyncDispose](),
  }
}
