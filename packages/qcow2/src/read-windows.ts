import type { ImageFile } from './image-file.ts'

/** Bytes of one read of a table, at most. */
export const WINDOW_BYTES: number = 4 * 1024 * 1024

const WINDOWS_IN_FLIGHT = 4

/** A part of a file. */
export interface Window {
  readonly offset: number
  /** At most {@link WINDOW_BYTES}. */
  readonly length: number
}

/** Reads windows of a file, several at once, and visits them in order; `visit` must not keep the bytes. */
export async function readWindows(
  file: ImageFile,
  windows: Iterable<Window>,
  signal: AbortSignal | undefined,
  visit: (bytes: DataView) => void,
): Promise<void> {
  const pending = windows[Symbol.iterator]()
  const inFlight: { bytes: DataView<ArrayBuffer>; done: Promise<void> }[] = []
  const free: ArrayBuffer[] = []
  const startRead = ({ offset, length }: Window): void => {
    const reused = free.pop()
    const buffer = reused && reused.byteLength >= length ? reused : new ArrayBuffer(length)
    const bytes = new DataView(buffer, 0, length)
    const done = file.read(offset, new Uint8Array(buffer, 0, length), signal ? { signal } : {})
    done.catch(() => undefined) // awaited in its turn; if an earlier one fails first, that error counts
    inFlight.push({ bytes, done })
  }
  try {
    for (;;) {
      while (inFlight.length < WINDOWS_IN_FLIGHT) {
        const next = pending.next()
        if (next.done) break
        startRead(next.value)
      }
      const window = inFlight.shift()
      if (!window) return
      await window.done
      visit(window.bytes)
      free.push(window.bytes.buffer)
    }
  } finally {
    await Promise.allSettled(inFlight.map(window => window.done))
  }
}
