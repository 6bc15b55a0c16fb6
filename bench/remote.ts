import { createReadStream, readFileSync } from 'node:fs'
import { PutObjectCommand, S3Client } from '@aws-sdk/client-s3'
import type { StorageDriver, UploadBody } from '@varve/core'
import { FtpDriver, type FtpDriverOptions } from '@varve/driver-ftp'
import { RcloneDriver, type RcloneDriverOptions } from '@varve/driver-rclone'
import { S3Driver, type S3DriverOptions } from '@varve/driver-s3'
import { SftpDriver, type SftpDriverOptions } from '@varve/driver-sftp'
import { Client as FtpClient } from 'basic-ftp'
import SftpClient from 'ssh2-sftp-client'

/** Which driver reaches a server, and with what options. */
export type RemoteAddress =
  | { readonly type: 's3'; readonly options: S3DriverOptions }
  | { readonly type: 'sftp'; readonly options: SftpDriverOptions }
  | { readonly type: 'ftp'; readonly options: FtpDriverOptions }
  | { readonly type: 'rclone'; readonly options: RcloneDriverOptions }

function driverOf({ type, options }: RemoteAddress): StorageDriver {
  if (type === 's3') return new S3Driver(options)
  if (type === 'sftp') return new SftpDriver(options)
  return type === 'ftp' ? new FtpDriver(options) : new RcloneDriver(options)
}

/** How often the rclones of a driver are looked at, in milliseconds. */
const LOOK_EVERY_MS = 20

/** Does something, and tells how much memory an rclone had at most that ran meanwhile, in MiB; 0 without rclone. */
async function withChildren<T>(
  { type }: RemoteAddress,
  work: () => Promise<T>,
): Promise<{ result: T; childMiB: number }> {
  if (type !== 'rclone') return { result: await work(), childMiB: 0 }
  let childMiB = 0
  const timer = setInterval(() => {
    const children = readFileSync(`/proc/self/task/${process.pid}/children`, 'utf8')
    for (const pid of children.split(' ').filter(Boolean)) childMiB = Math.max(childMiB, peakMiBOf(pid))
  }, LOOK_EVERY_MS)
  try {
    const result = await work()
    return { result, childMiB }
  } finally {
    clearInterval(timer)
  }
}

function peakMiBOf(pid: string): number {
  try {
    const [, kiB = 0] = /^VmHWM:\s+(\d+) kB$/m.exec(readFileSync(`/proc/${pid}/status`, 'utf8')) ?? []
    return Number(kiB) / 1024
  } catch {
    return 0 // it has ended
  }
}

/** Uploads the first bytes of a file by Varve's driver. */
export async function put(input: {
  address: RemoteAddress
  key: string
  file: string
  bytes: number
}): Promise<object> {
  const { address, key, file, bytes } = input
  await using driver = driverOf(address)
  const body: UploadBody = {
    size: bytes,
    replayable: true,
    open: ({ start, end } = { start: 0, end: bytes }) =>
      createReadStream(file, { start, end: end - 1, highWaterMark: 1024 * 1024 }),
  }
  const { result, childMiB } = await withChildren(address, () => driver.put(key, body))
  return { size: result.size, childMiB }
}

/** Downloads what {@link put} stored. */
export async function get({ address, key }: { address: RemoteAddress; key: string }): Promise<object> {
  await using driver = driverOf(address)
  let bytes = 0
  const { childMiB } = await withChildren(address, async () => {
    const stream = await driver.get(key)
    for await (const chunk of stream) {
      bytes += chunk.length
      stream.recycle?.(chunk)
    }
  })
  return { bytes, childMiB }
}

/** The same as {@link put} by what the driver's library itself offers. */
export async function plainPut(input: {
  address: RemoteAddress
  file: string
  bytes: number
}): Promise<object> {
  const { address, file, bytes } = input
  const source = () => createReadStream(file, { end: bytes - 1 })
  if (address.type === 's3') {
    const { endpoint = '', bucket, accessKey = '', secretKey = '' } = address.options
    const client = new S3Client({
      endpoint,
      region: 'us-east-1',
      forcePathStyle: true,
      requestChecksumCalculation: 'WHEN_REQUIRED',
      credentials: { accessKeyId: accessKey, secretAccessKey: secretKey },
    })
    await client.send(
      new PutObjectCommand({ Bucket: bucket, Key: 'plain', Body: source(), ContentLength: bytes }),
    )
    client.destroy()
  } else if (address.type === 'sftp') {
    const client = new SftpClient()
    const { host, port = 22, username, password = '' } = address.options
    await client.connect({ host, port, username, password })
    await client.put(source(), 'plain')
    await client.end()
  } else if (address.type === 'ftp') {
    const { host, port = 21, username, password } = address.options
    const client = new FtpClient()
    await client.access({ host, port, user: username, password })
    await client.uploadFrom(source(), 'plain')
    client.close()
  } else throw new Error(`${address.type} has no library`)
  return { bytes }
}
