import type { UploadBody } from '@varve/core'
import { describe, expect, test } from 'vitest'
import { bytesOf, type Contract, expectStored, place } from './contract-target.ts'
import { cutBytes, cutCalls, cutDownloads, cutUploads, forEachAnswer } from './network-cuts.ts'
import { patternBytes } from './pattern.ts'
import { PatternBody } from './pattern-body.ts'
import { beginRemote, expectWholeOrNothing, outcomeOf, type Remote } from './remote-target.ts'

const how = 'reset'

/** Uploads whose connection is cut: what is stored is whole or not there. */
export function describeCutUploads(contract: Contract, remote: Remote): void {
  describe('uploads that are cut', () => {
    test('an upload that is cut anywhere is whole, or fails and leaves nothing', async () => {
      await cutUploads(remote, {
        how,
        toServer: { even: 8, beforeEnd: [1024, 256, 64, 16, 1, 0] },
        toClient: { even: 8, beforeEnd: [1, 0] },
      })
    })

    test('a body that opens once is stored whole, or fails and leaves nothing, when its upload is cut', async () => {
      const places = { even: 2, beforeEnd: [1, 0] }
      await cutUploads(remote, { how, toServer: places, toClient: places }, { replayable: false })
    })

    test('a body of unknown size that can be opened again is stored whole, or fails and leaves nothing', async () => {
      const target = await beginRemote(remote)
      const source = new PatternBody({ size: contract.largeSize, seed: 24 })
      const body: UploadBody = { replayable: true, open: () => source.open() }
      const { cuts } = target.proxy
      target.proxy.cutAfter(0.8 * source.size, 'toServer')
      const outcome = await outcomeOf(target.driver.put('a/large', body))
      expect(target.proxy.cuts - cuts).toBe(1)
      await expectWholeOrNothing(target, 'a/large', { bytes: bytesOf(source), outcome, remote })
    })

    if (contract.capabilities.resume) {
      test('an upload that is cut goes on where it broke off, and does not begin again', async () => {
        const target = await beginRemote(remote)
        const body = new PatternBody({ size: remote.resumeSize, seed: 23 })
        const before = target.proxy.bytesToServer
        target.proxy.cutAfter(0.8 * body.size, 'toServer')
        await target.driver.put('a/large', body)
        expect(target.proxy.cuts).toBe(1)
        expect(target.proxy.bytesToServer - before).toBeLessThan(1.6 * body.size)
        expect(body.faults).toEqual([])
        await expectStored(target, 'a/large', bytesOf(body))
      })
    }
  })
}

/** Uploads over an object that is there. */
export function describeCutReplacements({ capabilities }: Contract, remote: Remote): void {
  if (!capabilities.atomicPublish) return
  test('an object stays as it was when the upload that would replace it is cut and fails', async () => {
    const former = patternBytes(22, 0, 1000)
    const toServer = { even: 2, beforeEnd: [64, 1, 0] }
    const toClient = { even: 1, beforeEnd: [0] }
    await cutUploads(remote, { how, toServer, toClient }, { former })
  })
}

/** Downloads whose connection is cut. */
export function describeCutDownloads({ brief }: Contract, remote: Remote): void {
  test('a download that is cut anywhere gives the right bytes or fails', async () => {
    const target = await beginRemote(remote)
    const bytes = cutBytes(remote)
    await place(target, 'a/object', bytes)
    const all = { key: 'a/object', range: { start: 0, end: bytes.length } }
    const middle = { key: 'a/object', range: { start: 1001, end: bytes.length - 1001 } }
    await cutDownloads(target, remote, {
      ...all,
      cuts: { how, toClient: { even: 6, beforeEnd: [1, 0] }, toServer: { even: 2, beforeEnd: [0] } },
    })
    if (brief) return
    await cutDownloads(target, remote, {
      ...middle,
      cuts: { how, toClient: { even: 3, beforeEnd: [1] } },
    })
    await expectStored(target, 'a/object', bytes)
  })
}

/** Other calls whose connection is cut: no answer is a wrong one. */
export function describeCutCalls({ brief }: Contract, remote: Remote): void {
  test('a call that is cut anywhere gives the right answer or fails', async () => {
    const target = await beginRemote(remote)
    const toClient = brief ? { even: 1, beforeEnd: [1] } : { even: 2, beforeEnd: [1, 0] }
    const toServer = { even: 1, beforeEnd: [0] }
    await forEachAnswer(target, remote, (call, look) =>
      cutCalls(target, remote, { how, toClient, toServer }, call, look),
    )
  })
}
