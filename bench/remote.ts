import { createReadStream } from 'node:fs'
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

const KEY = 'by-varve'

function driverOf({ type, options }: RemoteAddress): StorageDriver {
  if (type === 's3') return new S3Driver(options)
  if (type === 'sftp') return new SftpDriver(options)
  return type === 'ftp' ? new FtpDriver(options) : new RcloneDriver(options)
}

/** Uploads the first bytes of a file by Varve's driver. */
export async function put(input: { address: RemoteAddress; file: string; bytes: number }): Promise<object> {
  const { address, file, bytes } = input
  await using driver = driverOf(address)
  const body: UploadBody = {
    size: bytes,
    replayable: true,
    open: ({ start, end } = { start: 0, end: bytes }) =>
      createReadStream(file, { start, end: end - 1, highWaterMark: 1024 * 1024 }),
  }
  const { size } = await driver.put(KEY, body)
  return { size }
}

/** Downloads what {@link put} stored. */
export async function get({ address }: { address: RemoteAddress }): Promise<object> {
  await using driver = driverOf(address)
  const stream = await driver.get(KEY)
  let bytes = 0
  for await (const chunk of stream) {
    bytes += chunk.length
    stream.recycle?.(chunk)
  }
  return { bytes }
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
