import { randomUUID } from 'node:crypto'
import { PutObjectCommand, type PutObjectCommandInput } from '@aws-sdk/client-s3'
import { abortError, type UploadBody, type VarveError } from '@varve/core'
import { type Bucket, UPLOAD_TAG } from './bucket.ts'
import { abortBy, GRACE_MS, withGrace } from './grace.ts'
import { isTransient, statusOf, withRetries } from './retrying.ts'
import { withNote } from './s3-error.ts'
import { UploadStream } from './upload-stream.ts'

/** What an upload is made with. */
export interface Upload {
  readonly bucket: Bucket
  readonly key: string
  readonly signal?: AbortSignal | undefined
  /** Called with the bytes that have reached the storage so far. */
  readonly onProgress?: ((bytes: number) => void) | undefined
}

/** Options of the objects that are made: where the settings name them. */
export function objectOptions({
  settings,
}: Bucket): Pick<PutObjectCommandInput, 'StorageClass' | 'ServerSideEncryption' | 'SSEKMSKeyId'> {
  const { storageClass, serverSideEncryption, kmsKeyId } = settings
  return {
    // The provider knows its classes; the SDK's list is of Amazon's.
    ...(storageClass !== undefined && {
      StorageClass: storageClass as PutObjectCommandInput['StorageClass'] & string,
    }),
    ...(serverSideEncryption !== undefined && { ServerSideEncryption: serverSideEncryption }),
    ...(kmsKeyId !== undefined && { SSEKMSKeyId: kmsKeyId }),
  }
}

/** Stores a replayable body in one request; the object is replaced at once when the last byte has come. */
export async function putObject(upload: Upload, body: UploadBody, size: number): Promise<void> {
  const { bucket, key, signal, onProgress } = upload
  const action = { doing: `Writing ${key}`, permission: 's3:PutObject' }
  const tag = randomUUID()
  let mayBeStored = false

  const attempt = async () => {
    let sent = 0
    const onSent = (bytes: number) => {
      sent += bytes
      if (!stream.complete) onProgress?.(sent)
    }
    // before the storage can have the whole, so that a callback that throws fails an upload that is not stored
    const onLast = () => onProgress?.(size)
    const stream = new UploadStream(body, { key, leastChunk: bucket.leastChunk, signal, onSent, onLast })
    try {
      const command = new PutObjectCommand({
        ...bucket.at(key),
        ...objectOptions(bucket),
        Body: stream,
        ContentLength: size,
        Metadata: { [UPLOAD_TAG]: tag },
      })
      // until its last byte is given an abort comes by the stream; from then on the storage has the object
      await withGrace(signal, late => bucket.client.send(command, abortBy(late)))
    } catch (error) {
      if (stream.failure) throw stream.failure.error
      const refused = statusOf(error) !== undefined && !isTransient(error)
      mayBeStored ||= stream.complete && !refused
      throw error
    } finally {
      stream.destroy()
    }
  }
  try {
    await withRetries(attempt, { retries: bucket.settings.retries, signal })
  } catch (error) {
    const failure = signal?.aborted ? abortError(signal) : bucket.error(error, action)
    // An answer may have been lost, also that of an attempt before the last. What counts is what the storage holds now.
    if (!mayBeStored || !(await isStored(upload, { tag, size }, failure))) throw failure
  }
}

/** Whether the object is that of an upload, whole. Where the storage does not say soon, `failure` is thrown, and says so. */
async function isStored(
  { bucket, key }: Upload,
  { tag, size }: { tag: string; size: number },
  failure: VarveError,
): Promise<boolean> {
  try {
    const head = await bucket.head(key, { signal: AbortSignal.timeout(GRACE_MS) })
    return head?.upload === tag && head.size === size
  } catch {
    throw withNote(failure, notKnown(key))
  }
}

/** A word on an upload that failed, and may be stored. */
export function notKnown(key: string): string {
  return `Whether the storage has ${key} all the same is not known; write it again.`
}
