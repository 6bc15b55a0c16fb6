import { HeadObjectCommand, ListObjectsV2Command, S3Client, type S3ClientConfig } from '@aws-sdk/client-s3'
import { abortError, type VarveError } from '@varve/core'
import { abortBy } from './grace.ts'
import { HttpHandler } from './http-handler.ts'
import { isTransient, statusOf, withRetries } from './retrying.ts'
import { type S3Action, s3Error } from './s3-error.ts'
import type { S3Settings } from './s3-options.ts'

const nothing = () => undefined
/** The SDK would warn on the console of requests that are made again here. */
const SILENT = { trace: nothing, debug: nothing, info: nothing, warn: nothing, error: nothing }

/** A rule of S3 for a body with a trailer, of which the SDK makes a chunk of each that it is given. */
const LEAST_CHUNK = 8192

/** How a call is made. */
export interface CallRules {
  /** Ends the call with `ABORTED`. */
  signal?: AbortSignal | undefined
  /** Default: that of the settings. */
  retries?: number
}

/** What the storage tells of an object. */
export interface ObjectHead {
  readonly size: number
  readonly modifiedAt?: Date
  /** The upload that made it, see {@link UPLOAD_TAG}. */
  readonly upload?: string | undefined
}

/** The metadata of an object that names the upload that made it: by it an upload whose answer was lost is known. */
export const UPLOAD_TAG = 'varve-upload'

/** A bucket and the prefix in it that belongs to the driver. */
export class Bucket implements Disposable {
  readonly settings: S3Settings
  readonly client: S3Client
  /** Where it is, for people. */
  readonly location: string

  constructor(settings: S3Settings) {
    const { endpoint, bucket, prefix } = settings
    const host = endpoint === undefined ? 's3:/' : new URL(endpoint).origin
    this.settings = settings
    this.location = `${host}/${bucket}/${prefix}`.replace(/\/$/, '')
    this.client = new S3Client(clientConfig(settings))
  }

  /** The least size of the chunks of a request but the last, in bytes; undefined where any may be. */
  get leastChunk(): number | undefined {
    return this.settings.checksums === 'WHEN_SUPPORTED' ? LEAST_CHUNK : undefined
  }

  /** What a command names its place by. */
  at(key: string): { Bucket: string; Key: string } {
    return { Bucket: this.settings.bucket, Key: this.settings.prefix + key }
  }

  /** The key of a name in the bucket; undefined for one outside the prefix. */
  keyOf(name: string): string | undefined {
    const { prefix } = this.settings
    return name.startsWith(prefix) ? name.slice(prefix.length) : undefined
  }

  /**
   * Makes a call, again where it fails for a moment.
   *
   * @throws what {@link s3Error} makes of the failure; ABORTED
   */
  async call<T>(
    action: S3Action,
    make: (options: { abortSignal?: AbortSignal }) => Promise<T>,
    { signal, retries = this.settings.retries }: CallRules = {},
  ): Promise<T> {
    try {
      return await withRetries(() => make(abortBy(signal)), { retries, signal })
    } catch (error) {
      throw this.error(error, action)
    }
  }

  /** An error of the SDK or the network as a VarveError. */
  error(error: unknown, action: S3Action): VarveError {
    return s3Error(error, action, this.location)
  }

  /** What the storage tells of an object, or undefined where there is none. */
  async head(key: string, rules: CallRules = {}): Promise<ObjectHead | undefined> {
    const action = { doing: `Looking up ${key}`, permission: 's3:GetObject' }
    try {
      const head = await withRetries(
        () => this.client.send(new HeadObjectCommand(this.at(key)), abortBy(rules.signal)),
        { retries: this.settings.retries, ...rules },
      )
      const { ContentLength: size = 0, LastModified: modifiedAt, Metadata } = head
      return { size, ...(modifiedAt && { modifiedAt }), upload: Metadata?.[UPLOAD_TAG] }
    } catch (error) {
      if (rules.signal?.aborted) throw abortError(rules.signal)
      if (isTransient(error) || !hasNoBody(error)) throw this.error(error, action)
      // The answer to HEAD has no body to say why. A listing says whether it is the bucket or the credentials.
      await this.probe(rules)
      if (statusIs(error, 404)) return undefined
      throw this.error(error, action)
    }
  }

  /** Finds out whether the bucket can be used at all. */
  async probe(rules: CallRules = {}): Promise<void> {
    const { bucket, prefix } = this.settings
    const action = { doing: 'Listing', permission: 's3:ListBucket' }
    const command = new ListObjectsV2Command({ Bucket: bucket, Prefix: prefix, MaxKeys: 1 })
    await this.call(action, options => this.client.send(command, options), rules)
  }

  [Symbol.dispose](): void {
    this.client.destroy()
  }
}

function hasNoBody(error: unknown): boolean {
  return [400, 401, 403, 404].some(status => statusIs(error, status))
}

function statusIs(error: unknown, status: number): boolean {
  return statusOf(error) === status
}

function clientConfig(settings: S3Settings): S3ClientConfig {
  const { endpoint, region, accessKey, secretKey, sessionToken, pathStyle, checksums, timeoutMs, ca } =
    settings
  const handler = new HttpHandler({ timeoutMs, ca })
  return {
    region,
    ...(endpoint !== undefined && { endpoint }),
    ...(accessKey !== undefined &&
      secretKey !== undefined && {
        credentials: {
          accessKeyId: accessKey,
          secretAccessKey: secretKey,
          ...(sessionToken !== undefined && { sessionToken }),
        },
      }),
    forcePathStyle: pathStyle,
    requestChecksumCalculation: checksums,
    // A download that goes on after a cut is in pieces, and backups are proven by their own digests.
    responseChecksumValidation: 'WHEN_REQUIRED',
    // A body is not sent to a server that refuses it: the answer would be lost with the connection.
    expectContinueHeader: 64 * 1024,
    logger: SILENT,
    maxAttempts: 1, // a retry reads the body anew, which the SDK cannot
    requestHandler: {
      metadata: { handlerProtocol: 'http/1.1' },
      handle: handler.handle.bind(handler),
      destroy: () => handler.destroy(),
    },
  }
}
