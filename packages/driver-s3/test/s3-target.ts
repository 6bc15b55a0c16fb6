import { randomBytes } from 'node:crypto'
import {
  CreateBucketCommand,
  CreateMultipartUploadCommand,
  GetObjectCommand,
  ListMultipartUploadsCommand,
  ListObjectsCommand,
  S3Client,
  UploadPartCommand,
} from '@aws-sdk/client-s3'
import { S3Driver, type S3DriverOptions } from '@varve/driver-s3'
import type { DriverTarget, RawObject } from '@varve/testkit'
import type { RadosgwLab, S3User } from '@varve/testkit/lab'

const MIB = 1024 * 1024

/** A user's own client of the gateway, as the SDK makes it. */
export function rawClient(gateway: RadosgwLab, { accessKey, secretKey }: S3User): S3Client {
  return new S3Client({
    endpoint: gateway.endpoint,
    region: 'us-east-1',
    forcePathStyle: true,
    credentials: { accessKeyId: accessKey, secretAccessKey: secretKey },
    requestChecksumCalculation: 'WHEN_REQUIRED',
    responseChecksumValidation: 'WHEN_REQUIRED',
  })
}

/** Makes a bucket and gives its name. */
export async function makeBucket(client: S3Client): Promise<string> {
  const Bucket = `lab-${randomBytes(6).toString('hex')}`
  await client.send(new CreateBucketCommand({ Bucket }))
  return Bucket
}

/** All that a bucket holds, objects and unfinished uploads, below a prefix that is left out of the names. */
export async function inBucket(client: S3Client, Bucket: string, Prefix = ''): Promise<RawObject[]> {
  const found: RawObject[] = []
  let Marker: string | undefined
  do {
    const page = await client.send(new ListObjectsCommand({ Bucket, Prefix, ...(Marker && { Marker }) }))
    for (const { Key = '', Size = 0 } of page.Contents ?? []) found.push({ name: Key, size: Size })
    Marker = page.IsTruncated ? page.Contents?.at(-1)?.Key : undefined
  } while (Marker !== undefined)
  const { Uploads = [], IsTruncated } = await client.send(new ListMultipartUploadsCommand({ Bucket, Prefix }))
  if (IsTruncated) throw new Error('more unfinished uploads than one page')
  for (const { Key, UploadId } of Uploads) found.push({ name: `${Key}?uploadId=${UploadId}`, size: 0 })
  return found.map(({ name, size }) => ({ name: name.slice(Prefix.length), size }))
}

/** A bucket for many tests, each of which has a prefix of its own in it. */
export class TestBucket {
  readonly client: S3Client
  readonly name: string
  readonly options: S3DriverOptions

  private constructor(gateway: RadosgwLab, user: S3User, client: S3Client, name: string) {
    const { accessKey, secretKey } = user
    this.client = client
    this.name = name
    this.options = { endpoint: gateway.endpoint, bucket: name, accessKey, secretKey, partSize: 5 * MIB }
  }

  static async make(gateway: RadosgwLab, user: S3User): Promise<TestBucket> {
    const client = rawClient(gateway, user)
    return new TestBucket(gateway, user, client, await makeBucket(client))
  }

  /** A driver on an empty prefix. */
  async target(options: Partial<S3DriverOptions> = {}): Promise<DriverTarget & { pathPrefix: string }> {
    const { client, name: bucket } = this
    const pathPrefix = `some/where-${randomBytes(6).toString('hex')}`
    const driver = new S3Driver({ ...this.options, pathPrefix, ...options })
    return {
      pathPrefix,
      driver,
      inspect: () => inBucket(client, bucket, `${pathPrefix}/`),
      async readRaw(name) {
        const at = { Bucket: bucket, Key: `${pathPrefix}/${name}` }
        const { Body } = await client.send(new GetObjectCommand(at))
        return (await Body?.transformToByteArray()) ?? new Uint8Array()
      },
      dispose: () => driver[Symbol.asyncDispose](),
    }
  }

  /** Leaves what a killed upload leaves below a prefix. */
  async leaveUnfinished({ pathPrefix }: { pathPrefix: string }): Promise<void> {
    const at = { Bucket: this.name, Key: `${pathPrefix}/killed/upload` }
    const { UploadId } = await this.client.send(new CreateMultipartUploadCommand(at))
    const part = { ...at, UploadId, PartNumber: 1, Body: Buffer.alloc(1000) }
    await this.client.send(new UploadPartCommand(part))
  }
}
