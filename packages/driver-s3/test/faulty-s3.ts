import { S3Driver, type S3DriverOptions } from '@varve/driver-s3'
import { onTestFinished } from 'vitest'
import { type Call, FakeS3, type Fault } from './fake-s3.ts'

export const MIB = 1024 * 1024
/** Of an object of two parts. */
export const SIZE = 6 * MIB + 1
export const slowDown: Fault = { when: 'before', answer: { status: 503, code: 'SlowDown' } }
/** Never resolves. */
export const never = new Promise<never>(() => undefined)

/** A driver of a server of its own, which has these faults, one for each call of the kind. */
export async function begin(
  options: Partial<S3DriverOptions> = {},
  faults: Partial<Record<Call, Fault[]>> = {},
) {
  const fake = await FakeS3.start()
  const driver = new S3Driver({ ...fake.options, partSize: 5 * MIB, ...options })
  onTestFinished(async () => {
    await driver[Symbol.asyncDispose]()
    await fake[Symbol.asyncDispose]()
  })
  for (const [call, script] of Object.entries(faults)) fake.faults.set(call as Call, script)
  return { fake, driver }
}

/** How often the server got a call. */
export function count(fake: FakeS3, call: Call): number {
  return fake.calls.filter(name => name === call).length
}
