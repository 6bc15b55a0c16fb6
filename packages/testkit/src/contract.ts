import { describe } from 'vitest'
import { describeKeys } from './contract-keys.ts'
import { describeListing } from './contract-listing.ts'
import { describeObjects } from './contract-objects.ts'
import { describeOddSources } from './contract-odd-sources.ts'
import { describePublishing } from './contract-publishing.ts'
import { describeReading } from './contract-reading.ts'
import { describeRemote } from './contract-remote.ts'
import { describeSources } from './contract-sources.ts'
import { describeStorage } from './contract-storage.ts'
import { type Contract, type ContractOptions, type DriverTarget, tries } from './contract-target.ts'
import { isThorough } from './thorough.ts'

/** More than a page of S3's listings, and of most others'. */
const THOROUGH_OBJECTS = 1100
/** For one test of a driver each of whose calls starts a program, over more than a page of objects. */
const THOROUGH_TIMEOUT_MS = 1_800_000

/**
 * Declares the tests of the storage driver contract for a driver, in a test file of Vitest. They belong
 * against a real server, with an `inspect` that does not trust the driver.
 *
 * ```ts
 * describeDriver('MyDriver', {
 *   capabilities: { rangeRead: true, atomicPublish: true, resume: false, parallelParts: false },
 *   create: async () => ({ driver: new MyDriver(…), inspect, readRaw, dispose }),
 * })
 * ```
 *
 * With `VARVE_THOROUGH=1` in the environment nothing is left out for the time that it takes: all parts are tried, and a
 * long listing has at least 1100 objects.
 */
export function describeDriver<T extends DriverTarget>(name: string, options: ContractOptions<T>): void {
  const contract: Contract = {
    largeSize: 48 * 1024 * 1024 + 12345,
    streamSize: 3_000_000,
    manyObjects: 2500,
    turns: 25,
    brief: false,
    timeoutMs: 60_000,
    ...options,
  }
  if (isThorough) {
    delete contract.parts
    contract.brief = false
    contract.manyObjects = Math.max(contract.manyObjects, THOROUGH_OBJECTS)
    contract.timeoutMs = Math.max(contract.timeoutMs, THOROUGH_TIMEOUT_MS)
  }
  describe(`${name} keeps the storage driver contract`, { timeout: contract.timeoutMs }, () => {
    if (tries(contract, 'objects')) describeObjects(contract)
    if (tries(contract, 'keys')) describeKeys(contract)
    if (tries(contract, 'sources')) describeSources(contract)
    if (tries(contract, 'odd sources')) describeOddSources(contract)
    if (tries(contract, 'publishing')) describePublishing(contract)
    if (tries(contract, 'reading')) describeReading(contract)
    if (tries(contract, 'listing')) describeListing(contract)
    if (tries(contract, 'storage')) describeStorage(contract)
    describeRemote(contract)
  })
}
