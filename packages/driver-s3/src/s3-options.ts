import { isKey, VarveError } from '@varve/core'

const MIB = 1024 * 1024
/** The least size of a part that is not the last one, in bytes. A rule of S3. */
export const MIN_PART_SIZE: number = 5 * MIB
/** The largest part, and the largest object that is sent in one request, in bytes. A rule of S3. */
export const MAX_PART_SIZE: number = 5 * 1024 * MIB
/** The largest object that is planned for, in bytes. */
export const MAX_OBJECT_SIZE: number = 5 * 1024 * 1024 * MIB
const MOST_PARTS = 10_000

/** Options of {@link S3Driver}. */
export interface S3DriverOptions {
  /**
   * The address of the server, such as `https://minio.example:9000`. Default: that of AWS for the region.
   */
  endpoint?: string
  /** The bucket that holds the backups. It must be there. */
  bucket: string
  /** The region, such as `eu-central-1`. Default: `us-east-1` with an `endpoint`; needed without one. */
  region?: string
  /**
   * The id of the access key. Default: with `secretKey` left out too, what the AWS SDK finds: environment
   * variables, `~/.aws`, the role of the machine.
   */
  accessKey?: string
  /** The secret of the access key. */
  secretKey?: string
  /** The token of temporary credentials. Default: none. */
  sessionToken?: string
  /** Put before each key, with a `/` between: a folder in the bucket. Default: none, the whole bucket. */
  pathPrefix?: string
  /**
   * Whether the bucket is named in the path (`https://host/bucket/key`) rather than in the host's name
   * (`https://bucket.host/key`). Default: true with an `endpoint`, false without.
   */
  pathStyle?: boolean
  /** The storage class of new objects, such as `STANDARD_IA`. Default: the bucket's. */
  storageClass?: string
  /** The encryption of new objects at the server: `AES256`, `aws:kms` or `aws:kms:dsse`. Default: the bucket's. */
  serverSideEncryption?: 'AES256' | 'aws:kms' | 'aws:kms:dsse'
  /** The id of the key for `aws:kms` and `aws:kms:dsse`. Default: the account's own key for S3. */
  kmsKeyId?: string
  /** A certificate authority to trust besides the public ones: PEM text, or the absolute path of a PEM file. */
  ca?: string
  /**
   * When uploads carry a CRC32 for the server to check, in a trailer of the body. `WHEN_SUPPORTED`: each
   * upload; `WHEN_REQUIRED`: none. Many compatible servers, Ceph 16 among them, refuse the trailer.
   * Default: `WHEN_SUPPORTED` at AWS, `WHEN_REQUIRED` with an `endpoint` elsewhere.
   */
  checksums?: 'WHEN_SUPPORTED' | 'WHEN_REQUIRED'
  /**
   * The size of a part in bytes, from 5 MiB on. Parts of an object that would need more than `maxParts` are
   * larger. Objects up to this size are sent in one request. A body that opens once has parts of its own, which are in
   * memory; the largest of them are of this size where it is more than 96 MiB, and with `equalParts` more than 32 MiB.
   * Other memory does not depend on it. Default: 16 MiB.
   */
  partSize?: number
  /** The most parts an object may have at this provider, 1 to 10000. Default: 10000. */
  maxParts?: number
  /**
   * Whether all parts but the last must be of one size, also where the size of the object is not known
   * (Cloudflare R2 wants that). Default: false, which lets them grow.
   */
  equalParts?: boolean
  /** Parts of one upload that are sent at the same time. Default: 4. */
  parallelParts?: number
  /**
   * How long the server may make no progress before a request is given up, in milliseconds. Once all of an upload is
   * sent, as long again as that took, at most ten times this: the network may still carry it. Default: 60000.
   */
  timeoutMs?: number
  /** How often a request that failed for a moment is made again. Default: 6, which takes about 12 s. */
  retries?: number
}

/** The options with their defaults. */
export interface S3Settings extends S3DriverOptions {
  readonly region: string
  /** What is before each key: empty, or ending with a slash. */
  readonly prefix: string
  readonly pathStyle: boolean
  readonly checksums: 'WHEN_SUPPORTED' | 'WHEN_REQUIRED'
  readonly partSize: number
  readonly maxParts: number
  readonly equalParts: boolean
  readonly parallelParts: number
  readonly timeoutMs: number
  readonly retries: number
}

/** @throws INVALID_CONFIG */
export function settingsOf(options: S3DriverOptions): S3Settings {
  const { endpoint, bucket, region, accessKey, secretKey, sessionToken, pathPrefix = '', ca } = options
  if (endpoint !== undefined) assertEndpoint(endpoint)
  if (!/^[\w.-]{1,255}$/.test(bucket)) {
    throw invalid('bucket', 'It must be the name of a bucket, such as backups')
  }
  if (region === undefined && endpoint === undefined) {
    throw invalid('region', 'Without an endpoint it must be given, such as eu-central-1')
  }
  if (region !== undefined && !/^[\w-]+$/.test(region)) {
    throw invalid('region', 'It must be the name of a region, such as eu-central-1')
  }
  if ((accessKey === undefined) !== (secretKey === undefined)) {
    throw invalid('accessKey', 'It and secretKey must be given together')
  }
  if (accessKey === '') throw invalid('accessKey', 'It must not be empty')
  if (secretKey === '') throw invalid('secretKey', 'It must not be empty')
  if (sessionToken !== undefined && accessKey === undefined) {
    throw invalid('sessionToken', 'It needs accessKey and secretKey')
  }
  const folder = pathPrefix.replace(/^\/|\/$/g, '')
  if (folder !== '' && !isKey(folder)) {
    throw invalid('pathPrefix', 'It must be names joined by "/", such as backups/host-1')
  }
  if (ca !== undefined && !ca.startsWith('/') && !ca.includes('-----BEGIN CERTIFICATE-----')) {
    throw invalid('ca', 'It must be a certificate in PEM or the absolute path of a file with one')
  }
  return {
    ...options,
    region: region ?? 'us-east-1',
    prefix: folder === '' ? '' : `${folder}/`,
    pathStyle: options.pathStyle ?? endpoint !== undefined,
    checksums: options.checksums ?? (isAws(endpoint) ? 'WHEN_SUPPORTED' : 'WHEN_REQUIRED'),
    partSize: whole(options, 'partSize', 16 * MIB, MIN_PART_SIZE, MAX_PART_SIZE),
    maxParts: whole(options, 'maxParts', MOST_PARTS, 1, MOST_PARTS),
    equalParts: options.equalParts ?? false,
    parallelParts: whole(options, 'parallelParts', 4, 1, 64),
    timeoutMs: whole(options, 'timeoutMs', 60_000, 1, 2 ** 31 - 1),
    retries: whole(options, 'retries', 6, 0, 100),
  }
}

function assertEndpoint(endpoint: string): void {
  const rule = 'It must be the address of a server, such as https://s3.example:9000, without a user or a path'
  const url = URL.canParse(endpoint) ? new URL(endpoint) : undefined
  if (!url || !/^https?:$/.test(url.protocol)) throw invalid('endpoint', rule)
  if (url.username || url.password || url.search || url.hash || url.pathname !== '/') {
    throw invalid('endpoint', rule)
  }
}

/** Whether an endpoint is one of Amazon's own, which all take a checksum in a trailer. */
function isAws(endpoint: string | undefined): boolean {
  if (endpoint === undefined) return true
  return /\.(amazonaws\.com|amazonaws\.com\.cn|api\.aws)$/.test(new URL(endpoint).hostname)
}

function whole(
  options: S3DriverOptions,
  name: 'partSize' | 'maxParts' | 'parallelParts' | 'timeoutMs' | 'retries',
  standard: number,
  least: number,
  most: number,
): number {
  const value = options[name] ?? standard
  if (Number.isSafeInteger(value) && value >= least && value <= most) return value
  throw invalid(name, `It must be a whole number from ${least} to ${most}`)
}

/** The value is not told: it may be a secret that was put into the wrong field. */
function invalid(field: string, rule: string): VarveError {
  return new VarveError('INVALID_CONFIG', `${field} of an S3 storage is not valid. ${rule}.`, {
    context: { field },
  })
}
