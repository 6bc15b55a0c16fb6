import { Readable } from 'node:stream'
import { VarveError } from '@varve/core'
import { describe, expect, test } from 'vitest'
import { begin, type Contract, errorOf, expectNothing } from './contract-target.ts'
import { bodyOf, troubledSource } from './troubled-source.ts'

/** Sources that are none, and what is told of one that fails: as `readUpload` of the core sees and tells it. */
export function describeOddSources(contract: Contract): void {
  describe('odd sources', () => {
    const goodBytes = contract.streamSize / 2
    const boom = new Error('the source broke')

    test("the source's error is the cause of the failure", async () => {
      const { driver } = await begin(contract.create)
      const source = troubledSource({ kind: 'fail', error: boom }, { bytes: 10 })
      await expect(driver.put('a', source)).rejects.toHaveProperty('cause', boom)
    })

    test("a VarveError of the source comes through as it is, with the driver's hands clean", async () => {
      const target = await begin(contract.create)
      const error = new VarveError('NBD_FAILED', 'The export is gone.')
      const source = troubledSource({ kind: 'fail', error }, { bytes: goodBytes })
      await expect(target.driver.put('a', source)).rejects.toBe(error)
      await expectNothing(target)
    })

    test('a body that cannot be opened is a failed upload', async () => {
      const target = await begin(contract.create)
      const body = bodyOf(10, () => {
        throw boom
      })
      await expect(target.driver.put('a', body)).rejects.toMatchObject(errorOf('UPLOAD_FAILED'))
      await expectNothing(target)
    })

    test('a stream of something else than bytes is a failed upload', async () => {
      const target = await begin(contract.create)
      const source = Readable.from([Buffer.from('bytes'), { no: 'bytes' }])
      await expect(target.driver.put('a', source)).rejects.toMatchObject(errorOf('UPLOAD_FAILED'))
      await expectNothing(target)
    })

    test('a stream that was read to its end before is refused', async () => {
      const target = await begin(contract.create)
      const source = Readable.from([Buffer.from('x')])
      await source.toArray()
      await expect(target.driver.put('a', source)).rejects.toMatchObject({ name: 'VarveError' })
      await expectNothing(target)
    })
  })
}
