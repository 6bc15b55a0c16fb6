import { ListObjectsV2Command } from '@aws-sdk/client-s3'
import { isKey, type StoredObject, VarveError } from '@varve/core'
import type { Bucket, CallRules } from './bucket.ts'

/** The objects whose key begins with `prefix`, page by page. What is no key of Varve's is left out. */
export async function* listObjects(
  bucket: Bucket,
  prefix: string,
  rules: CallRules,
): AsyncGenerator<StoredObject> {
  const action = { doing: `Listing ${prefix}`.trim(), permission: 's3:ListBucket' }
  let token: string | undefined
  do {
    const command: ListObjectsV2Command = new ListObjectsV2Command({
      Bucket: bucket.settings.bucket,
      Prefix: bucket.settings.prefix + prefix,
      EncodingType: 'url', // a name may hold what XML cannot
      ...(token !== undefined && { ContinuationToken: token }),
    })
    const page = await bucket.call(action, options => bucket.client.send(command, options), rules)
    for (const { Key = '', Size: size = 0, LastModified: modifiedAt } of page.Contents ?? []) {
      const key = bucket.keyOf(readName(Key, page.EncodingType))
      if (key === undefined || !isKey(key)) continue
      yield { key, size, ...(modifiedAt && { modifiedAt: wholeSeconds(modifiedAt) }) }
    }
    const next = page.IsTruncated ? page.NextContinuationToken : undefined
    if (page.IsTruncated && (next === undefined || next === token)) {
      throw new VarveError(
        'STORAGE_FAILED',
        `The listing of ${bucket.location} does not go on after its first pages. Look at the server's log and its version.`,
        { context: { location: bucket.location } },
      )
    }
    token = next
  } while (token !== undefined)
}

/** A name of a listing, which says whether it encodes them: not every server does. */
export function readName(name: string, encoding: 'url' | undefined): string {
  if (encoding !== 'url') return name
  try {
    return decodeURIComponent(name.replaceAll('+', ' '))
  } catch {
    return '' // it is no text, and so no key
  }
}

/** A listing tells milliseconds and HEAD, by an HTTP date, does not: it is one time either way. */
function wholeSeconds(time: Date): Date {
  return new Date(Math.floor(time.getTime() / 1000) * 1000)
}
