import type { Operation } from './operation.ts'

/**
 * Which operations end with which signal. A signal has one listener however many operations it has, since a
 * listener of its own for each small read would cost more than the read.
 */
export class AbortWatch {
  readonly #onAbort: (operation: Operation, signal: AbortSignal) => void
  readonly #watched = new Map<AbortSignal, { operations: Set<Operation>; listener: () => void }>()

  constructor(onAbort: (operation: Operation, signal: AbortSignal) => void) {
    this.#onAbort = onAbort
  }

  /** Watches `signal` for `operation`. */
  add(operation: Operation, signal: AbortSignal): void {
    const watched = this.#watched.get(signal)
    if (watched) {
      watched.operations.add(operation)
      return
    }
    const operations = new Set([operation])
    const listener = () => {
      for (const aborted of [...operations]) this.#onAbort(aborted, signal)
    }
    signal.addEventListener('abort', listener)
    this.#watched.set(signal, { operations, listener })
  }

  /** `operation` does not end with `signal` any more. */
  delete(operation: Operation, signal: AbortSignal): void {
    const watched = this.#watched.get(signal)
    watched?.operations.delete(operation)
    if (!watched || watched.operations.size > 0) return
    signal.removeEventListener('abort', watched.listener)
    this.#watched.delete(signal)
  }
}
