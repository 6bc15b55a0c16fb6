import { protocolError } from './errors.ts'

/** The most replies for one map: 2^53 bytes of nothing, told in the longest requests, take half of them. */
const MAX_REPLIES = 4_194_304
/** The most extents in those replies, of all contexts, before neighbours are joined. */
const MAX_TOLD = 67_108_864
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
   * Throws `NBD_PROTOCOL` when the server does not get on.
   */
  spend(extents: number, reached: number): void {
    this.#replies++
    this.#told += extents
    const isSlow = reached < (this.#replies - FREE_REPLIES) * LEAST_PER_REPLY
    if (!isSlow && this.#replies <= MAX_REPLIES && this.#told <= MAX_TOLD) return
    throw protocolError('it tells of extents without end', {
      replies: this.#replies,
      extents: this.#told,
      reached,
    })
  }
}
