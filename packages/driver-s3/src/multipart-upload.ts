import { randomUUID } from 'node:crypto'
import {
  AbortMultipartUploadCommand,
  type CompletedPart,
  CompleteMultipartUploadCommand,
  CreateMultipartUploadCommand,
  UploadPartCommand,
} from '@aws-sdk/client-s3'
import { abortError, type ByteRange, isVarveError, type UploadBody } from '@varve/core'
import { type Bucket, type CallRules, UPLOAD_TAG } from './bucket.ts'
import { abortBy, GRACE_MS, withGrace } from './grace.ts'
import { notKnown, objectOptions, type Upload } from './put-object.ts'
import { backOff, isTransient, mayBeDone, withRetries } from './retrying.ts'
import { withNote } from './s3-error.ts'
import { type FoundUpload, foundUploads, hasPartsSince, isGone } from './stale-uploads.ts'
import { UploadStream } from './upload-stream.ts'

/** How exactly a listing tells when an upload began, in milliseconds. */
const CLOCK_TICK_MS = 1000

/** How many uploads of this process there are of an object that are begun or about to be, by bucket and name. */
const underWay = new Map<string, number>()

/** An object that is sent in parts and seen when it is complete. Its owner completes it or aborts it. */
export class MultipartUpload {
  readonly #upload: Upload
  readonly #id: string
  readonly #tag: string
  readonly #parts: CompletedPart[] = []
  #sent = 0
  #size = 0
  /** Whether the storage was asked to make the object. */
  #mayBeStored = false

  private constructor(upload: Upload, id: string, tag: string) {
    this.#upload = upload
    this.#id = id
    this.#tag = tag
  }

  /**
   * Begins an upload. One whose answer is lost is looked for and removed when another was begun; where none could be, the
   * error says that it may be left.
   */
  static async create(upload: Upload): Promise<MultipartUpload> {
    const { bucket, key, signal } = upload
    const { checksums, retries } = bucket.settings
    const action = { doing: `Writing ${key}`, permission: 's3:PutObject' }
    const tag = randomUUID()
    const began = performance.now()
    let lost = false
    const attempt = async () => {
      try {
        const command = new CreateMultipartUploadCommand({
          ...bucket.at(key),
          ...objectOptions(bucket),
          ...(checksums === 'WHEN_SUPPORTED' && { ChecksumAlgorithm: 'CRC32' }),
          Metadata: { [UPLOAD_TAG]: tag },
        })
        const { UploadId } = await withGrace(signal, late => bucket.client.send(command, abortBy(late)))
        if (UploadId !== undefined) return UploadId
      } catch (error) {
        lost ||= mayBeDone(error)
        throw error
      }
      lost = true
      throw new Error('the storage began an upload without an id')
    }
    count(upload, 1)
    try {
      const id = await withRetries(attempt, { retries, signal })
      if (lost) await removeLost(upload, id, performance.now() - began).catch(() => undefined) // cleanUp finds it later
      return new MultipartUpload(upload, id, tag)
    } catch (error) {
      count(upload, -1)
      const failure = bucket.error(error, action)
      throw lost ? withNote(failure, mayBeLeft(key)) : failure
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
      const { leastChunk } = bucket
      const stream = new UploadStream(body, { key, range, leastChunk, signal: cut.signal, onSent })
      const giveUp = () => {
        if (!stream.complete) cut.abort(signal.reason)
      }
      signal.addEventListener('abort', giveUp, { once: true })
      if (signal.aborted) giveUp()
      try {
        const command = new UploadPartCommand({
          ...bucket.at(key),
          UploadId: this.#id,
          PartNumber: number,
          Body: stream,
          ContentLength: size,
        })
        const { ETag, ChecksumCRC32 } = await withGrace(signal, (late = signal) =>
          bucket.client.send(command, { abortSignal: AbortSignal.any([cut.signal, late]) }),
        )
        if (stream.failure) throw stream.failure.error
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
    const command = new CompleteMultipartUploadCommand({
      ...bucket.at(key),
      UploadId: this.#id,
      MultipartUpload: { Parts: parts },
    })
    if (signal?.aborted) throw abortError(signal)
    this.#size = size
    this.#mayBeStored = true
    for (let failures = 0; ; failures++) {
      try {
        await withGrace(signal, late => bucket.client.send(command, abortBy(late)))
        break
      } catch (error) {
        // It may have succeeded although an error came back; the second attempt then finds no upload.
        const rules = signal?.aborted ? { retries: 0 } : {}
        const asked = withGrace(signal, late => this.#isStored({ ...rules, signal: late }))
        if (await asked.catch(() => false)) break
        if (signal?.aborted) throw abortError(signal)
        if (failures >= bucket.settings.retries || !isTransient(error)) throw bucket.error(error, action)
        await backOff(failures, signal)
      }
    }
    count(this.#upload, -1)
  }

  /**
   * Removes the parts and throws `error`, with a word on what could not be removed. Returns where the upload is gone since
   * its object is stored all the same.
   */
  async abort(error: unknown): Promise<void> {
    const { bucket, key } = this.#upload
    const signal = AbortSignal.timeout(GRACE_MS)
    const notes = this.#mayBeStored ? [notKnown(key)] : []
    const noted = () => (isVarveError(error) && notes.length > 0 ? withNote(error, notes.join(' ')) : error)
    let removed: boolean
    try {
      removed = await removeUpload(bucket, { key, uploadId: this.#id }, signal)
    } catch {
      notes.push(`The unfinished upload of ${key} could not be removed and takes space; cleanUp removes it.`)
      throw noted()
    } finally {
      count(this.#upload, -1)
    }
    if (removed || !this.#mayBeStored) throw error
    const isStored = await this.#isStored({ signal }).catch(() => {
      throw noted()
    })
    if (!isStored) throw error
  }

  async #isStored(rules: CallRules): Promise<boolean> {
    const { bucket, key } = this.#upload
    const head = await bucket.head(key, rules)
    return head?.upload === this.#tag && head.size === this.#size
  }

  #progress(bytes: number): void {
    this.#sent += bytes
    if (bytes > 0) this.#upload.onProgress?.(this.#sent)
  }
}

/** A word on an upload whose beginning failed, and may have succeeded. */
function mayBeLeft(key: string): string {
  return `The storage may have begun an upload of ${key} all the same, which has no parts; cleanUp removes it.`
}

/** Removes an unfinished upload; false where it is not there. Default of `signal`: after {@link GRACE_MS}. */
export async function removeUpload(
  bucket: Bucket,
  { key, uploadId }: Pick<FoundUpload, 'key' | 'uploadId'>,
  signal: AbortSignal = AbortSignal.timeout(GRACE_MS),
): Promise<boolean> {
  const action = { doing: `Removing the unfinished upload of ${key}`, permission: 's3:AbortMultipartUpload' }
  const command = new AbortMultipartUploadCommand({ ...bucket.at(key), UploadId: uploadId })
  try {
    await withRetries(() => bucket.client.send(command, { abortSignal: signal }), {
      retries: bucket.settings.retries,
      signal,
    })
    return true
  } catch (error) {
    if (isGone(error)) return false
    throw bucket.error(error, action)
  }
}

/**
 * Removes uploads that were begun within `took` milliseconds before `id`, but whose answers were lost. Nothing says whose
 * an upload is: one that may be of somebody else stays, and is for cleanUp.
 */
async function removeLost(upload: Upload, id: string, took: number): Promise<void> {
  const { bucket, key } = upload
  const signal = AbortSignal.timeout(GRACE_MS)
  const uploads: FoundUpload[] = []
  for await (const found of foundUploads(bucket, key, { signal })) if (found.key === key) uploads.push(found)
  const end = uploads.find(({ uploadId }) => uploadId === id)?.begunAt.getTime()
  if (end === undefined) return
  for (const other of uploads) {
    const begun = other.begunAt.getTime()
    if (other.uploadId === id || begun > end || begun < end - took - CLOCK_TICK_MS) continue
    if (await hasPartsSince(bucket, other, new Date(0), { signal })) continue
    if (underWay.get(nameOf(upload)) === 1) await removeUpload(bucket, other, signal)
  }
}

function count(upload: Upload, change: 1 | -1): void {
  const name = nameOf(upload)
  const uploads = (underWay.get(name) ?? 0) + change
  if (uploads > 0) underWay.set(name, uploads)
  else underWay.delete(name)
}

/** The object's name without that of the server, which may have several. */
function nameOf({ bucket, key }: Upload): string {
  const { Bucket, Key } = bucket.at(key)
  return `${Bucket}/${Key}`
}
