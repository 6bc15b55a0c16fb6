import { abortError, bytesBody, readUpload, type UploadBody, VarveError } from '@varve/core'
import { MultipartUpload } from './multipart-upload.ts'
import { BUFFER_SIZE, largestStream, plannedPartSize, streamPartSize } from './part-plan.ts'
import { putObject, type Upload } from './put-object.ts'

/** Stores a replayable body of known size in parts, each read from the body on its own. */
export async function uploadInParts(upload: Upload, body: UploadBody, size: number): Promise<void> {
  const { settings } = upload.bucket
  const partSize = plannedPartSize(size, settings, settings.partSize)
  const count = Math.ceil(size / partSize)
  const multipart = await MultipartUpload.create(upload)
  try {
    let next = 0
    await runTogether(upload.signal, settings.parallelParts, async signal => {
      while (next < count && !signal.aborted) {
        const start = next++ * partSize
        const range = { start, end: Math.min(size, start + partSize) }
        await multipart.send(start / partSize + 1, body, range, signal)
      }
    })
    await multipart.complete(size)
  } catch (error) {
    throw await multipart.abort(error)
  }
}

/**
 * Stores a body that opens once, or whose size is unknown: a part is read into memory, so that it can be sent
 * again, while those before it are on their way.
 *
 * @returns its size
 */
export async function uploadStream(upload: Upload, body: UploadBody): Promise<number> {
  const { key, signal } = upload
  const { settings } = upload.bucket
  const limit = largestStream(settings, body.size)
  if (body.size !== undefined && body.size > limit) throw tooLarge(key, limit)
  const broken = new AbortController()
  const ends = signal ? AbortSignal.any([signal, broken.signal]) : broken.signal
  const sending = new Map<Promise<void>, number>()
  let multipart: MultipartUpload | undefined
  let failure: { error: unknown } | undefined
  let size = 0

  const fail = (error: unknown) => {
    failure ??= { error }
    broken.abort(error)
  }
  const send = (number: number, { memory, length }: Part, to: MultipartUpload) => {
    const bytes = bytesBody(memory.subarray(0, length))
    const sent = to
      .send(number, bytes, { start: 0, end: length }, ends)
      .then(() => parts.recycle(memory), fail)
      .finally(() => sending.delete(sent))
    sending.set(sent, memory.byteLength)
  }
  const room = async (needed: number) => {
    const taken = () => [...sending.values()].reduce((sum, bytes) => sum + bytes, 0)
    while (sending.size > 0 && (sending.size >= settings.parallelParts || taken() + needed > BUFFER_SIZE)) {
      await Promise.race(sending.keys())
    }
  }
  const parts = new PartReader(body, {
    key,
    signal: ends,
    room,
    sizeOf: number => {
      if (number > settings.maxParts) throw tooLarge(key, limit)
      return streamPartSize(number, settings, body.size)
    },
  })

  try {
    for (let number = 1; ; number++) {
      const part = await parts.next(number)
      if (part.length === 0 && number > 1) break
      size += part.length
      if (part.last && number === 1) {
        await putObject(upload, bytesBody(part.memory.subarray(0, part.length)), size)
        return size
      }
      multipart ??= await MultipartUpload.create(upload)
      send(number, part, multipart)
      if (part.last) break
    }
  } catch (error) {
    fail(error)
  } finally {
    await parts.end()
    await Promise.all(sending.keys())
  }
  try {
    if (failure) throw signal?.aborted ? abortError(signal) : failure.error
    await multipart?.complete(size)
    return size
  } catch (error) {
    throw multipart ? await multipart.abort(error) : error
  }
}

interface Part {
  readonly memory: Buffer
  readonly length: number
  /** Whether the source has ended with it. */
  readonly last: boolean
}

/** Reads a body into parts of given sizes. */
class PartReader {
  readonly #body: UploadBody
  readonly #source: AsyncGenerator<Uint8Array>
  readonly #sizeOf: (number: number) => number
  readonly #room: (bytes: number) => Promise<void>
  #free: Buffer[] = []
  #chunk: Uint8Array | undefined
  #taken = 0

  constructor(
    body: UploadBody,
    options: {
      key: string
      signal: AbortSignal
      sizeOf: (number: number) => number
      room: (bytes: number) => Promise<void>
    },
  ) {
    this.#body = body
    this.#source = readUpload(body, options)
    this.#sizeOf = options.sizeOf
    this.#room = options.room
  }

  async next(number: number): Promise<Part> {
    if (!(await this.#fetch())) return { memory: Buffer.alloc(0), length: 0, last: true }
    const size = Math.min(this.#sizeOf(number), this.#body.size ?? Number.POSITIVE_INFINITY)
    await this.#room(size)
    const memory = this.#memory(size)
    let length = 0
    while (length < size && (await this.#fetch())) {
      const chunk = this.#chunk ?? memory
      const bytes = Math.min(size - length, chunk.byteLength - this.#taken)
      memory.set(chunk.subarray(this.#taken, this.#taken + bytes), length)
      length += bytes
      this.#taken += bytes
      if (this.#taken === chunk.byteLength) {
        this.#body.recycle?.(chunk)
        this.#chunk = undefined
      }
    }
    return { memory, length, last: length < size || !(await this.#fetch()) }
  }

  /** Takes the memory of a part back that has been sent. */
  recycle(memory: Buffer): void {
    this.#free.push(memory)
  }

  async end(): Promise<void> {
    await this.#source.return(undefined)
  }

  /** Sees to a chunk that has bytes left; false at the end of the source. */
  async #fetch(): Promise<boolean> {
    if (this.#chunk) return true
    const { value, done } = await this.#source.next()
    if (done) return false
    this.#chunk = value
    this.#taken = 0
    return true
  }

  #memory(size: number): Buffer {
    const found = this.#free.find(memory => memory.byteLength === size)
    this.#free = this.#free.filter(memory => memory.byteLength === size && memory !== found)
    return found ?? Buffer.allocUnsafeSlow(size)
  }
}

/** Runs a number of workers until all are done; when one fails the others are given up. */
async function runTogether(
  signal: AbortSignal | undefined,
  count: number,
  work: (signal: AbortSignal) => Promise<void>,
): Promise<void> {
  const broken = new AbortController()
  const ends = signal ? AbortSignal.any([signal, broken.signal]) : broken.signal
  let failure: { error: unknown } | undefined
  await Promise.all(
    Array.from({ length: count }, () =>
      work(ends).catch(error => {
        failure ??= { error }
        broken.abort(error)
      }),
    ),
  )
  if (signal?.aborted) throw abortError(signal)
  if (failure) throw failure.error
}

function tooLarge(key: string, limit: number): VarveError {
  return new VarveError(
    'UPLOAD_FAILED',
    `${key} is larger than the ${limit} bytes that fit into the parts of a stream. Give a body that can be opened again and knows its size.`,
    { context: { key, limit } },
  )
}
