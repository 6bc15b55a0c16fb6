import { randomUUID } from 'node:crypto'
import {
  AbortMultipartUploadCommand,
  type CompletedPart,
  CompleteMultipartUploadCommand,
  CreateMultipartUploadCommand,
  UploadPartCommand,
} from '@aws-sdk/client-s3'
import { abortError, type ByteRange, isVarveError, type UploadBody } from '@varve/core'
import { type Bucket, UPLOAD_TAG } from './bucket.ts'
import { abortBy, GRACE_MS, soonAfter } from './grace.ts'
import { objectOptions, type Upload } from './put-object.ts'
import { backOff, isTransient, statusOf, withRetries } from './retrying.ts'
import { withNote } from './s3-error.ts'
import { type FoundUpload, foundUploads, isGone } from './stale-uploads.ts'
import { UploadStream } from './upload-stream.ts'

/** The most that a client's clock may differ from the server's, which refuses requests otherwise. */
const CLOCK_SKEW_MS = 15 * 60_000

/** Uploads of this process, by bucket: none of them is one whose beginning was lost. */
const running = new WeakMap<Bucket, Set<string>>()

/** An object that is sent in parts and seen when it is complete. Its owner completes it or aborts it. */
export class MultipartUpload {
  readonly #upload: Upload
  readonly #id: string
  readonly #tag: string
  readonly #parts: CompletedPart[] = []
  #sent = 0

  private constructor(upload: Upload, id: string, tag: string) {
    this.#upload = upload
    this.#id = id
    this.#tag = tag
  }

  /** Begins an upload. One whose answer is lost is looked for and removed. */
  static async create(upload: Upload): Promise<MultipartUpload> {
    const { bucket, key, signal } = upload
    const { checksums, retries } = bucket.settings
    const action = { doing: `Writing ${key}`, permission: 's3:PutObject' }
    const tag = randomUUID()
    const began = Date.now()
    let lost = false
    const attempt = async () => {
      try {
        const { UploadId } = await bucket.client.send(
          new CreateMultipartUploadCommand({
            ...bucket.at(key),
            ...objectOptions(bucket),
            ...(checksums === 'WHEN_SUPPORTED' && { ChecksumAlgorithm: 'CRC32' }),
            Metadata: { [UPLOAD_TAG]: tag },
          }),
          abortBy(soonAfter(signal)),
        )
        if (UploadId === undefined) throw new Error('the storage began an upload without an id')
        return UploadId
      } catch (error) {
        lost ||= statusOf(error) === undefined
        throw error
      }
    }
    try {
      const id = await withRetries(attempt, { retries, signal }).catch(error => {
        throw bucket.error(error, action)
      })
      uploadsOf(bucket).add(id)
      return new MultipartUpload(upload, id, tag)
    } finally {
      if (lost) await removeLost(upload, began).catch(() => undefined) // cleanUp finds it later
    }
  }

  /** Sends one part of a replayable body, again where it fails for a moment. Parts may be sent in any order. */
  async send(number: number, body: UploadBody, range: ByteRange, signal: AbortSignal): Promise<void> {
    const { bucket, key } = this.#upload
    const size = range.end - range.start
    const action = { doing: `Writing ${key}`, permission: 's3:PutObject' }
    const attempt = async () => {
      let sent = 0
      const onSent = (bytes: number) => {
        sent += bytes
        this.#progress(bytes)
      }
      // A part that is with the storage as a whole is stored whether anyone waits or not: one that was given up is waited
      // for a little, or it would come after the upload was removed, and stay.
      const cut = new AbortController()
      const stream = new UploadStream(body, { key, range, signal: cut.signal, onSent })
      const giveUp = () => {
        if (!stream.complete) cut.abort(signal.reason)
      }
      signal.addEventListener('abort', giveUp, { once: true })
      if (signal.aborted) giveUp()
      try {
        const { ETag, ChecksumCRC32 } = await bucket.client.send(
          new UploadPartCommand({
            ...bucket.at(key),
            UploadId: this.#id,
            PartNumber: number,
            Body: stream,
            ContentLength: size,
          }),
          abortBy(AbortSignal.any([cut.signal, soonAfter(signal)])),
        )
        this.#parts.push({ PartNumber: number, ETag, ...(ChecksumCRC32 !== undefined && { ChecksumCRC32 }) })
        if (sent < size) onSent(size - sent)
      } catch (error) {
        this.#progress(-sent)
        throw stream.failure ? stream.failure.error : error
      } finally {
        signal.removeEventListener('abort', giveUp)
        stream.destroy()
      }
    }
    try {
      await withRetries(attempt, { retries: bucket.settings.retries, signal })
    } catch (error) {
      throw bucket.error(error, action)
    }
  }

  /** Makes the object of the parts. After an abort it still ends as the storage has it. */
  async complete(size: number): Promise<void> {
    const { bucket, key, signal } = this.#upload
    const action = { doing: `Completing ${key}`, permission: 's3:PutObject' }
    const parts = this.#parts.toSorted((a, b) => (a.PartNumber ?? 0) - (b.PartNumber ?? 0))
    if (signal?.aborted) throw abortError(signal)
    for (let failures = 0; ; failures++) {
      try {
        await bucket.client.send(
          new CompleteMultipartUploadCommand({
            ...bucket.at(key),
            UploadId: this.#id,
            MultipartUpload: { Parts: parts },
          }),
          abortBy(soonAfter(signal)),
        )
        break
      } catch (error) {
        // It may have succeeded although an error came back; the second attempt then finds no upload.
        if (await this.#isStored(size)) break
        if (signal?.aborted) throw abortError(signal)
        if (failures >= bucket.settings.retries || !isTransient(error)) throw bucket.error(error, action)
        await backOff(failures, signal)
      }
    }
    uploadsOf(bucket).delete(this.#id)
  }

  /** Removes the parts. What was thrown before is `error`; it is given back, with a word on what could not be removed. */
  async abort(error: unknown): Promise<unknown> {
    const { bucket, key } = this.#upload
    try {
      await removeUpload(bucket, { key, uploadId: this.#id })
      return error
    } catch {
      const note = `The unfinished upload of ${key} could not be removed and takes space; cleanUp removes it.`
      return isVarveError(error) ? withNote(error, note) : error
    } finally {
      uploadsOf(bucket).delete(this.#id)
    }
  }

  async #isStored(size: number): Promise<boolean> {
    const { bucket, key, signal } = this.#upload
    const rules = signal?.aborted ? { retries: 0 } : {}
    const head = await bucket.head(key, { ...rules, signal: soonAfter(signal) }).catch(() => undefined)
    return head?.upload === this.#tag && head.size === size
  }

  #progress(bytes: number): void {
    this.#sent += bytes
    if (bytes > 0) this.#upload.onProgress?.(this.#sent)
  }
}

/** Removes an unfinished upload; one that is not there is no error. */
export async function removeUpload(
  bucket: Bucket,
  { key, uploadId }: Pick<FoundUpload, 'key' | 'uploadId'>,
): Promise<void> {
  const action = { doing: `Removing the unfinished upload of ${key}`, permission: 's3:AbortMultipartUpload' }
  const command = new AbortMultipartUploadCommand({ ...bucket.at(key), UploadId: uploadId })
  const signal = AbortSignal.timeout(GRACE_MS)
  try {
    await withRetries(() => bucket.client.send(command, { abortSignal: signal }), {
      retries: bucket.settings.retries,
      signal,
    })
  } catch (error) {
    if (isGone(error)) return
    throw bucket.error(error, action)
  }
}

/** An upload that was begun, but whose id was lost with the answer. */
async function removeLost({ bucket, key }: Upload, began: number): Promise<void> {
  const signal = AbortSignal.timeout(GRACE_MS)
  for await (const found of foundUploads(bucket, key, { signal })) {
    const ours = found.key === key && found.begunAt.getTime() >= began - CLOCK_SKEW_MS
    if (ours && !uploadsOf(bucket).has(found.uploadId)) await removeUpload(bucket, found)
  }
}

function uploadsOf(bucket: Bucket): Set<string> {
  const ids = running.get(bucket) ?? new Set()
  running.set(bucket, ids)
  return ids
}
