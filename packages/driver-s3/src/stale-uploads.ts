import { isDeepStrictEqual } from 'node:util'
import { ListMultipartUploadsCommand, ListPartsCommand } from '@aws-sdk/client-s3'
import { isKey, VarveError } from '@varve/core'
import type { Bucket, CallRules } from './bucket.ts'
import { readName } from './list-objects.ts'

/** An upload in parts that was neither completed nor aborted. */
export interface FoundUpload {
  readonly key: string
  readonly uploadId: string
  readonly begunAt: Date
}

/** The unfinished uploads of keys that begin with `prefix`. */
export async function* foundUploads(
  bucket: Bucket,
  prefix: string,
  rules: CallRules,
): AsyncGenerator<FoundUpload> {
  const action = { doing: 'Listing unfinished uploads', permission: 's3:ListBucketMultipartUploads' }
  let place: { KeyMarker?: string; UploadIdMarker?: string } = {}
  for (;;) {
    const command: ListMultipartUploadsCommand = new ListMultipartUploadsCommand({
      Bucket: bucket.settings.bucket,
      Prefix: bucket.settings.prefix + prefix,
      EncodingType: 'url',
      ...place,
    })
    const page = await bucket.call(action, options => bucket.client.send(command, options), rules)
    for (const { Key, UploadId, Initiated } of page.Uploads ?? []) {
      const key = bucket.keyOf(readName(Key ?? '', page.EncodingType))
      if (key === undefined || !isKey(key) || UploadId === undefined || Initiated === undefined) continue
      yield { key, uploadId: UploadId, begunAt: Initiated }
    }
    if (!page.IsTruncated) return
    const next: typeof place = {
      KeyMarker: readName(page.NextKeyMarker ?? '', page.EncodingType),
      ...(page.NextUploadIdMarker !== undefined && { UploadIdMarker: page.NextUploadIdMarker }),
    }
    if (next.KeyMarker === '' || isDeepStrictEqual(next, place)) throw endless(bucket)
    place = next
  }
}

/** Whether any part of an upload was written at `time` or later. One that is gone by now was not. */
export async function hasPartsSince(
  bucket: Bucket,
  { key, uploadId }: FoundUpload,
  time: Date,
  rules: CallRules,
): Promise<boolean> {
  const action = {
    doing: `Looking at the unfinished upload of ${key}`,
    permission: 's3:ListMultipartUploadParts',
  }
  let marker: string | undefined
  do {
    const command: ListPartsCommand = new ListPartsCommand({
      ...bucket.at(key),
      UploadId: uploadId,
      ...(marker !== undefined && { PartNumberMarker: marker }),
    })
    const page = await bucket.call(
      action,
      options => bucket.client.send(command, options).catch(unlessGone),
      rules,
    )
    if (page?.Parts?.some(part => part.LastModified && part.LastModified >= time)) return true
    const next = page?.IsTruncated ? page.NextPartNumberMarker : undefined
    if (page?.IsTruncated && (next === undefined || next === marker)) throw endless(bucket)
    marker = next
  } while (marker !== undefined)
  return false
}

/** The error of a listing that says that it goes on, but not where, or where it was before. */
function endless({ location }: Bucket): VarveError {
  return new VarveError(
    'STORAGE_FAILED',
    `The listing of unfinished uploads in ${location} does not go on after its first pages. Look at the server's log and its version.`,
    { context: { location } },
  )
}

function unlessGone(error: unknown): undefined {
  if (isGone(error)) return undefined
  throw error
}

/** Whether an upload is not there. Ceph's gateway says so as if it were the object. */
export function isGone(error: unknown): boolean {
  return error instanceof Error && (error.name === 'NoSuchUpload' || error.name === 'NoSuchKey')
}
