import { abortError, type UploadBody, VarveError } from '@varve/core'
import { MultipartUpload } from './multipart-upload.ts'
import {
  largestBufferedPart,
  largestStream,
  memoryOfParts,
  type PartLimits,
  plannedPartSize,
  streamPartSize,
} from './part-plan.ts'
import { type Part, PartReader } from './part-reader.ts'
import { putObject, type Upload } from './put-object.ts'
import { MAX_PART_SIZE } from './s3-options.ts'

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
    await multipart.abort(error)
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
  if (body.size !== undefined && body.size > largestStream(settings, body.size)) {
    throw tooLarge(key, settings, body.size)
  }
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
  const send = (number: number, part: Part, to: MultipartUpload) => {
    const sent = to
      .send(number, part.body, { start: 0, end: part.length }, ends)
      .then(() => parts.recycle(part), fail)
      .finally(() => sending.delete(sent))
    sending.set(sent, part.length)
  }
  const room = async (needed: number) => {
    const taken = () => [...sending.values()].reduce((sum, bytes) => sum + bytes, needed)
    while (sending.size > 0 && (sending.size >= settings.parallelParts || taken() > memoryOfParts(needed))) {
      await Promise.race(sending.keys())
    }
  }
  const parts = new PartReader(body, {
    key,
    signal: ends,
    room,
    sizeOf: number => {
      if (number > settings.maxParts) throw tooLarge(key, settings, body.size)
      return streamPartSize(number, settings, body.size)
    },
  })

  try {
    for (let number = 1; ; number++) {
      const part = await parts.next(number)
      if (part.length === 0 && number > 1) break
      size += part.length
      if (part.last && number === 1) {
        await putObject(upload, part.body, size)
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
  } catch (error) {
    if (!multipart) throw error
    await multipart.abort(error)
  }
  return size
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

function tooLarge(key: string, limits: PartLimits, size: number | undefined): VarveError {
  const limit = largestStream(limits, size)
  const partSize = Math.min(MAX_PART_SIZE, 2 * largestBufferedPart(limits))
  const next = largestStream({ ...limits, partSize }, size)
  return new VarveError(
    'UPLOAD_FAILED',
    `${key} is larger than the ${limit} bytes that fit into the parts of a stream. Set partSize to ${partSize} for one of up to ${next}, or more; it takes so much memory. Or keep it on another storage.`,
    { context: { key, limit, partSize } },
  )
}
