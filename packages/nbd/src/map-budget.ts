import { NbdError, protocolError } from './errors.ts'

/** The most replies for one map: 2^53 bytes of nothing, told in the longest requests, take half of them. */
const MAX_REPLIES = 4_194_304
/** The most extents in those replies, of all contexts, before they are rounded and neighbours are joined: 2 GiB. */
const MAX_TOLD = 268_435_456
/** Replies that may tell as little as they like. */
const FREE_REPLIES = 4096
/** What each later one has to tell on average: disks have sectors of no fewer bytes. */
const LEAST_PER_REPLY = 512

/** What one map of an export may cost, so that no server can keep a client at it without an end. */
export class MapBudget {
  #replies = 0
  #told = 0

  /**
   * Takes note of a reply that told of so many extents, after which the map reaches up to `reached`.
   * Throws `NBD_PROTOCOL` when the server does not get on, `NBD_FRAGMENTED` when it tells of too many extents.
   */
  spend(extents: number, reached: number): void {
    this.#replies++
    this.#told += extents
    const isSlow = reached < (this.#replies - FREE_REPLIES) * LEAST_PER_REPLY
    if (this.#told > MAX_TOLD)
      throw new NbdError(
        'NBD_FRAGMENTED',
        `The server has told of ${this.#told} extents, which are too many. A copy of the disk has fewer and larger ones.`,
        { context: { extents: this.#told, reached } },
      )
    if (!isSlow && this.#replies <= MAX_REPLIES) return
    throw protocolError('it tells of extents without end', {
      replies: this.#replies,
      extents: this.#told,
      reached,
    })
  }
}
