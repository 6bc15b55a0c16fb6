import type { Socket } from 'node:net'
import { setTimeout as delay } from 'node:timers/promises'

/** What a flow holds at most before it stops reading: a little more than Linux's largest TCP window. */
const HELD_BYTES = 8 * 1024 * 1024
/** How long a reset waits, in rounds: a system that gets one drops what its program has not read yet. */
const LINGER_MS = 5
const LINGER_ROUNDS = 4
/** How many pieces a second bytes come in where their rate is limited. */
const PIECES_A_SECOND = 50
/** How late a piece may be without a delay of those behind it. */
const MOST_LATE_MS = 200
const NOTHING = Buffer.alloc(0)

/** How a connection is cut: reset at both ends, or one direction of it ended in order. */
export type Cut = 'reset' | 'end'

/** How many bytes may be handed on, and whether a cut comes after them. */
export interface Passage {
  readonly bytes: number
  readonly cut: Cut | undefined
}

/** What its proxy decides for a {@link DelayedFlow}. */
export interface FlowRules {
  /** How long a byte is on its way, in milliseconds. */
  delayMs(): number
  /** How many bytes a second are handed on at most; `Infinity` for no limit. */
  bytesPerSecond(): number
  /** Whether nothing is handed on for now. */
  stalled(): boolean
  /** Counts bytes that are about to be handed on. */
  pass(bytes: number): Passage
  /** Resets both ends of the connection. */
  cut(): void
}

type Held =
  | { readonly what: 'bytes'; readonly due: number; readonly bytes: Buffer }
  | { readonly what: 'end' | 'reset'; readonly due: number }

/**
 * One direction of a connection: whatever comes out of `source` goes into `sink`, in order and each thing its
 * delay after it came, so that a delay costs no bandwidth. When `sink` is slow, or the flow is stalled, `source` is read no
 * further than {@link HELD_BYTES}; where its rate is limited, than a tenth of a second's bytes.
 */
export class DelayedFlow {
  readonly #source: Socket
  readonly #sink: Socket
  readonly #rules: FlowRules
  readonly #held: Held[] = []
  #heldBytes = 0
  /** When the next bytes may go, at the rate that there is. */
  #free = 0
  #blocked = false
  #done = false
  #timer: NodeJS.Timeout | undefined

  constructor(source: Socket, sink: Socket, rules: FlowRules) {
    this.#source = source
    this.#sink = sink
    this.#rules = rules
    let ended = false
    source.on('data', (bytes: Buffer) => {
      if (this.#done) return // ended, with its source still at it
      this.#heldBytes += bytes.byteLength
      if (this.#heldBytes >= this.#mostHeld) source.pause()
      this.#hold({ what: 'bytes', due: this.#due(), bytes })
    })
    source.on('end', () => {
      ended = true
      this.#hold({ what: 'end', due: this.#due() })
    })
    source.on('close', failed => {
      if (failed || !ended) this.#hold({ what: 'reset', due: this.#due() })
    })
    sink.on('drain', () => {
      this.#blocked = false
      this.pump()
    })
  }

  /** Hands on what is due. To be called when a stall is over. */
  pump(): void {
    while (!this.#done && !this.#blocked && !this.#rules.stalled()) {
      const [head] = this.#held
      if (head === undefined) break
      const waitMs = Math.max(head.due, this.#free) - performance.now()
      if (waitMs > 0) {
        this.#wakeIn(waitMs)
        break
      }
      this.#held.shift()
      if (head.what === 'bytes') this.#handOn(this.#piece(head.bytes, head.due))
      else if (head.what === 'end') this.#sink.end()
      else this.#cutAfter(NOTHING)
    }
    if (!this.#done && this.#source.isPaused() && this.#heldBytes < this.#mostHeld / 2) this.#source.resume()
  }

  /** Drops what is held. */
  stop(): void {
    this.#done = true
    this.#held.length = 0
    clearTimeout(this.#timer)
  }

  get #mostHeld(): number {
    return Math.min(HELD_BYTES, this.#rules.bytesPerSecond() / 10)
  }

  /** As many of the bytes as go at once; the rest stays held. */
  #piece(bytes: Buffer, due: number): Buffer {
    const rate = this.#rules.bytesPerSecond()
    const piece = bytes.subarray(0, Math.ceil(rate / PIECES_A_SECOND))
    const rest = bytes.subarray(piece.byteLength)
    if (rest.byteLength > 0) this.#held.unshift({ what: 'bytes', due, bytes: rest })
    const from = Math.max(this.#free, performance.now() - MOST_LATE_MS)
    this.#free = from + (piece.byteLength / rate) * 1000
    return piece
  }

  #handOn(bytes: Buffer): void {
    this.#heldBytes -= bytes.byteLength
    const passed = this.#rules.pass(bytes.byteLength)
    if (passed.cut === 'reset') this.#cutAfter(bytes.subarray(0, passed.bytes))
    else if (passed.cut === 'end') this.#endAfter(bytes.subarray(0, passed.bytes))
    else if (!this.#sink.write(bytes)) this.#blocked = true
  }

  #endAfter(bytes: Buffer): void {
    this.stop()
    this.#sink.end(bytes)
    this.#source.resume()
  }

  /** Resets the connection behind these bytes: a reset overtakes what is not sent, and what is not read. */
  #cutAfter(bytes: Buffer): void {
    this.stop()
    this.#sink.write(bytes, async () => {
      // rounds, since one timer that is late fires before anything is read
      for (let round = 0; round < LINGER_ROUNDS; round++) await delay(LINGER_MS)
      this.#rules.cut()
    })
  }

  #hold(held: Held): void {
    if (this.#done) return
    this.#held.push(held)
    this.pump()
  }

  #due(): number {
    return performance.now() + this.#rules.delayMs()
  }

  #wakeIn(waitMs: number): void {
    this.#timer ??= setTimeout(() => {
      this.#timer = undefined
      this.pump()
    }, Math.ceil(waitMs))
  }
}
