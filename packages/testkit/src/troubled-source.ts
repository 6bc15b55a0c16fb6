import { Readable } from 'node:stream'
import type { UploadBody } from '@varve/core'
import { patternBytes } from './pattern.ts'

const CHUNK_SIZE = 64 * 1024

/** What becomes of a {@link troubledSource} after its good bytes. */
export type Trouble =
  /** It ends. */
  | { readonly kind: 'end' }
  /** It fails with this error. */
  | { readonly kind: 'fail'; readonly error: Error }
  /** It is destroyed without an error, like a pipe that is cut off. */
  | { readonly kind: 'vanish' }
  /** It gives nothing more until `resumed` resolves, and then the rest up to `size` bytes. */
  | { readonly kind: 'wait'; readonly resumed: Promise<unknown>; readonly size: number }

/** Options of {@link troubledSource}. */
export interface TroubledSourceOptions {
  /** How many pattern bytes come first. */
  readonly bytes: number
  /** Seed of the pattern. Default: 0. */
  readonly seed?: number
  /** Called when the good bytes are taken and more is asked for. */
  readonly onTaken?: () => void
}

/** A stream of pattern bytes that gets into trouble at a given place. */
export function troubledSource(trouble: Trouble, options: TroubledSourceOptions): Readable {
  const { bytes, seed = 0, onTaken } = options
  let position = 0
  let end = bytes
  let troubled = false
  return new Readable({
    highWaterMark: CHUNK_SIZE,
    read() {
      if (position === end && !troubled) {
        troubled = true
        onTaken?.()
        if (trouble.kind === 'fail') this.destroy(trouble.error)
        if (trouble.kind === 'vanish') this.destroy()
        if (trouble.kind === 'wait') {
          end = trouble.size
          trouble.resumed.then(
            () => this._read(CHUNK_SIZE),
            (error: Error) => this.destroy(error),
          )
        }
        if (trouble.kind !== 'end') return
      }
      const length = Math.min(CHUNK_SIZE, end - position)
      position += length
      this.push(length === 0 ? null : patternBytes(seed, position - length, length))
    },
  })
}

/** A body that opens once, of a size that it promises. */
export function bodyOf(size: number, open: () => Readable): UploadBody {
  return { size, replayable: false, open }
}
