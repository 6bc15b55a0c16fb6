import { describeDriver } from '@varve/testkit'
import { MemoryDriver } from '../custom-driver/memory-driver.ts'

describeDriver('The MemoryDriver of the examples', {
  capabilities: { rangeRead: true, atomicPublish: true, resume: false, parallelParts: false },
  async create() {
    const driver = new MemoryDriver()
    return {
      driver,
      inspect: async () =>
        Array.from(driver.objects, ([name, { bytes }]) => ({ name, size: bytes.byteLength })),
      readRaw: async name => driver.objects.get(name)?.bytes ?? new Uint8Array(),
      dispose: async () => driver[Symbol.asyncDispose](),
    }
  },
  largeSize: 5_000_011,
})
